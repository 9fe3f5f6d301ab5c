"""Draws images from a trained generator: noise at t = 1, its velocity down to t = 0, decoded.

    dz/dt = v(z, t),  t: 1 -> 0 in N intervals, by Euler (N evaluations) or Heun (2N)
    guidance:  v = v_null + cfg (v_class - v_null)  for lo <= t <= hi, elsewhere v_class alone
               (from text: the prompt in the class' place, the empty prompt in null's)

A grid of the last generator in runs/dit:  python sample.py --preset tiny
From text:                                 python sample.py --dit runs/t2i/dit_step00000800.pt
    --preset tiny --prompt "a red star on a blue ground"
50,000 images for fid.py, eight GPUs:
    torchrun --standalone --nproc_per_node 8 sample.py -n 50000 --out samples.npz

Time runs as in the paper: t = 0 data, t = 1 noise. LightningDiT's runs the other way: its released
checkpoints take --time lightning, and --latent-stats with the statistics of their training.

Image i is a function of the seed and i alone, but for the rounding of sums, which depends on batch
size and number of processes. The same command completes what is missing in --out.

Legend: B batch, d latent channels, h w latent sides, K classes (class K: none).
"""
import contextlib
import difflib
import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import repa
import runs
import toy
from baselines import VAE, FluxVAE
from captions import (
    ClipT5,
    Rows,
    Words,
    digest,
    read_prompts,
    save_captioned_grid,
    warn_of_cut,
    words_of,
)
from data import IMAGE_TYPES, rng, save_grid, shown, to_uint8
from files import (
    BatchedArray,
    UserError,
    build,
    dit_arguments,
    ensure_statistics,
    fingerprint,
    kind_of,
    load_file,
    load_tokenizer,
    lock,
    outdated,
    print_0,
    ranges,
    read_record,
    reading,
    require,
    sha256,
    unwrapped,
    write_atomically,
    write_record,
)
from mmdit import MMDiT, time_shift
from model import LightningDiT
from runs import argument, count, index
from vfm_vae import VFMVAE

# ---- the sampler

def time_grid(steps, shift=1.0):
    """steps + 1 times from 1 (noise) to 0 (data). A shift a > 1 puts more of them near noise:
    t' = a t / (1 + (a - 1) t)."""
    t = np.linspace(1.0, 0.0, steps + 1)
    t = shift * t / (1 + (shift - 1) * t)
    t[0] = 1  # rounding may lead it past 1, where the interval of the guidance ends
    return t.tolist()


class Velocity:
    """v(z, t) of a network for the classes y (B,), or rows of text (B, ...), with classifier-free
    guidance; z (B, d, h, w), t a number. It counts the evaluations of the network per image.

    cfg: scale, 1 for none. interval: the times lo <= t <= hi with guidance. channels: how many are
    guided (None: all; 3: the rule behind LightningDiT's published scales). time: "paper", or
    "lightning" for a network that has learned the other direction. null: what y is without class or
    text (None: class K)."""

    def __init__(self, model, y, cfg=1.0, interval=(0.0, 1.0), channels=None, time="paper",
                 null=None):
        self.model, self.y, self.channels, self.time = model, y, channels, time
        if null is None and model.num_classes:
            null = torch.full_like(y, model.num_classes)
        self.null, self.cfg = null, 1.0 if null is None else cfg
        self.lo, self.hi = interval
        self.conditional = self.unconditional = 0

    def network(self, z, t, y):
        lightning = self.time == "lightning"  # v(z, t) = -v_lightning(z, 1 - t)
        times = torch.full((len(z),), 1 - t if lightning else t, device=z.device)
        v = self.model(z, times, y).float()
        return -v if lightning else v

    def __call__(self, z, t):
        self.conditional += 1
        if self.cfg == 1 or not self.lo <= t <= self.hi:
            return self.network(z, t, self.y)
        self.unconditional += 1
        both = self.network(torch.cat([z, z]), t, torch.cat([self.y, self.null]))
        v, v_null = both.chunk(2)  # (B, d, h, w) each
        guided = v_null + self.cfg * (v - v_null)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, :self.channels], v[:, self.channels:]], dim=1)


def integrate(velocity, z, times, method="euler"):
    """Follows dz/dt = velocity(z, t) along the times: z at the first -> z at the last."""
    for t, t_next in itertools.pairwise(times):
        v = velocity(z, t)
        if method == "heun":  # the mean of the velocities at both ends
            v = (v + velocity(z + (t_next - t) * v, t_next)) / 2
        z = z + (t_next - t) * v
    return z


@torch.no_grad()
def generate(model, tokenizer, indices, labels, seed, times, method="euler", dtype=torch.float32,
             text=None, **guidance):
    """Images (B, 3, H, W), about in [-1, 1], of the indices; and the network's evaluations per
    image, (conditional, unconditional). labels: the classes of all images, or None. text: the rows
    of k prompts and of the empty one (see captions.py); image i is of prompt i mod k. guidance:
    arguments of Velocity."""
    device = tokenizer.latent_mean.device
    channels = tokenizer.d + repa.extra_channels(model.arguments)
    shape = (channels, *model.arguments["grid"])
    # a generator for each image: its noise is the same in any batch
    z1 = np.stack([rng(seed, "noise", int(i)).standard_normal(shape, np.float32) for i in indices])
    y = None if labels is None else torch.from_numpy(labels[indices].astype(np.int64)).to(device)
    if text is not None:
        y, guidance["null"] = (torch.from_numpy(text[rows].astype(np.float32)).to(device)
                               for rows in (indices % (len(text) - 1), 0 * indices - 1))
    velocity = Velocity(model, y, **guidance)
    with runs.autocast(device, dtype):
        z0 = integrate(velocity, torch.from_numpy(z1).to(device), times, method)  # (B, d, h, w)
    z0 = tokenizer.unnormalize(z0[:, :tokenizer.d])
    # in fp32: bf16 lacks a pixel's 256 levels
    images = runs.by_parts(tokenizer.decode, z0, z0[0, 0].numel() * tokenizer.factor ** 2)
    return images, (velocity.conditional, velocity.unconditional)


def choose_labels(spec, num_classes, num, seed, names=()):
    """The classes of images 0 to num-1: `balanced` (0, 1, ..., K-1, 0, ...), `random`, or a list of
    numbers and names, such as 3,3,dog, repeated. None for an unconditional model."""
    if not num_classes:
        if spec != "balanced":
            raise UserError(f"--labels {spec}: this generator has no classes")
        return None
    if spec == "balanced":
        return np.arange(num) % num_classes
    if spec == "random":
        return np.array([rng(seed, "label", i).integers(num_classes) for i in range(num)])
    chosen = []
    for c in spec.split(","):
        try:
            chosen.append(int(c))  # what looks like a number is one, whatever the classes are named
        except ValueError:
            if c not in names:
                close = difflib.get_close_matches(c, names, cutoff=0.5)
                raise UserError(
                    f"--labels {spec}: no class is named {c!r}"
                    + (f"; close to it: {', '.join(close)}" if close else "")
                    + ("" if names else "; the generator has no names, its classes are 0 to "
                       f"{num_classes - 1}")) from None
            chosen.append(names.index(c))
    if min(chosen) < 0 or max(chosen) >= num_classes:
        raise UserError(f"--labels {spec}: the generator's classes are 0 to {num_classes - 1}")
    return np.array(chosen)[np.arange(num) % len(chosen)]


def name_labels(labels, names, most=12):
    """What is drawn, such as "3 = dog, 7 = cat and 2 more"."""
    return shown([f"{c} = {names[c]}" for c in np.unique(labels)], most)


# ---- checkpoints, results

def load_dit(path):
    """(generator with the EMA weights, content of the file), of a checkpoint of train_dit.py or
    an official LightningDiT. Raises UserError."""
    content = load_file(path, "generator")
    with reading(path, "checkpoint of a generator"):
        state = unwrapped(content)
        if kind_of(state) == "FLUX's transformer" and "text encoder" in content.get("recipe", {}):
            return build(MMDiT, content["arguments"], state, path).eval(), content
        require("LightningDiT", state, path)
        if "ema" not in content:
            print_0(f"NOTE: {path} names no EMA: its weights are taken as they are")
        cls, arguments = LightningDiT, content.get("arguments") or dit_arguments(state)
        if "align" in arguments:
            cls, arguments, state = repa.for_sampling(arguments, state)
        return build(cls, arguments, state, path).eval(), content


def load_pair(args):
    """(generator, tokenizer, names of the classes, if it knows them, identity of its text encoder,
    if it has one): generator and tokenizer must belong together, the latents need statistics."""
    path = args.dit
    model, content = load_dit(path)
    names = content.get("classes") or []
    if names and not (isinstance(names, list) and len(names) == model.num_classes
                      and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: its class names are not {model.num_classes} strings")
    tokenizer = load_tokenizer(args.tokenizer, VAE, VFMVAE, FluxVAE)
    if tokenizer.d != model.d:
        raise UserError(f"the tokenizer {args.tokenizer} has {tokenizer.d} latent channels, the "
                        f"generator takes {model.d}")
    ensure_statistics(tokenizer, args.tokenizer, args.latent_stats)
    if "recipe" in content:  # a checkpoint of train_dit.py
        with reading(path, "generator"):
            learned = content["recipe"]["tokenizer"]
        found = fingerprint(tokenizer)
        if learned != found:
            raise UserError(f"{path} was trained on the latents of another tokenizer ({learned}) "
                            f"than {args.tokenizer} ({found})")
    elif args.time is None:
        raise UserError(f"{path} is an official checkpoint: "
                        "say which way its time runs, --time lightning or paper")
    return model, tokenizer, names, content.get("recipe", {}).get("text encoder")


def grid_rows(images, labels, width=8):
    """Images (n, 3, H, W) as rows for save_grid: one class a row where there are at most 16, all
    with the same number of images, above 1."""
    if labels is not None:
        labels = labels[:len(images)]
        rows = [images[labels == c][:width] for c in np.unique(labels)]
        lengths = [len(row) for row in rows]
        if len(rows) <= 16 and 1 < min(lengths) == max(lengths):
            return rows
    width = min(width, len(images))
    return images[:len(images) // width * width].split(width)


def write_npz(path, draw, num, side, batch_size, recipe, overwrite):
    """num images as path: .npz, arr_0 (num, H, W, 3) uint8, as the ADM evaluator reads it."""
    array = BatchedArray(path, num, (*side, 3), np.uint8, recipe, overwrite)
    if array.complete:
        return
    missing = array.missing(batch_size)
    with array.lock:
        for batch in tqdm(missing, "sampling", disable=array.rank != 0, mininterval=1):
            array.write(batch, to_uint8(draw(batch)))
        array.finish()


def write_pngs(folder, draw, num, batch_size, recipe, overwrite, rank, world):
    """num images as folder/000000.png ..., each written atomically; those that are there stay. A
    batch that lacks one is drawn whole (see files.BatchedArray)."""
    folder = Path(folder)
    with contextlib.ExitStack() as held:
        if rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock(
                    folder / ".lock", f"another process is writing to {folder}; wait for it"))
                claim_pngs(folder, num, recipe, overwrite)
            except OSError as e:
                raise UserError(f"cannot write to --out {folder}: {e.strerror}") from None
        runs.barrier()
        paths = [png(folder, i) for i in range(num)]
        missing = {i for i, path in enumerate(paths) if not path.exists()}
        runs.barrier()  # all have looked before one writes
        order = [batch for batch in ranges(num, batch_size) if missing.intersection(batch)]
        for batch in tqdm(order[rank::world], "sampling", disable=rank != 0, mininterval=1):
            for i, image in zip(batch, to_uint8(draw(batch))):
                if i in missing:
                    write_atomically(paths[i], partial(Image.fromarray(image).save, format="PNG"))
        runs.barrier()


def png(folder, i):
    return folder / f"{i:06d}.png"


def claim_pngs(folder, num, recipe, overwrite):
    """Writes the folder's record: the recipe, and how many images were begun by it. Only these are
    ever deleted."""
    record = folder / "sampling.json"
    then = read_record(record)
    made = then.get("images", num if then else 0)  # older records lack it
    other = [path for i in range(made, num) if (path := png(folder, i)).exists()]
    if other:
        raise UserError(f"{other[0]} is none of the {made} images that sample.py has made there: "
                        "move it away, or choose another --out")
    present = any(path.suffix == ".png" for path in folder.iterdir())
    if outdated(folder, record, recipe, overwrite, present):
        for i in range(made):
            png(folder, i).unlink(missing_ok=True)
        made = 0
    write_record(record, recipe | {"images": max(made, num)})


# ---- text to image

def text_flags(p):
    """What train_dit.py and sample.py ask of a generator from text."""
    add = p.add_argument
    add("--clip-text", help="folder of CLIP-L in transformers' layout")
    add("--t5", help="folder of a T5 encoder in transformers' layout (without both: the built-in "
                     "text encoder)")
    add("--words", metavar="FILE",
        help="prompts, one a line: the built-in text encoder knows their words (default: those of "
             "the shapes)")
    add("--text-length", type=count, help="T5's tokens of a prompt (default: 256)")


def open_text_encoder(args, device):
    """FLUX's two of --clip-text and --t5; without them the built-in one, of the shapes' words or
    of --words."""
    if args.clip_text or args.t5:
        if args.words:
            raise UserError("--words is of the built-in text encoder: leave out --clip-text and "
                            "--t5")
        return ClipT5(args.clip_text, args.t5, args.text_length or 256, device)
    if args.text_length:
        raise UserError("--text-length is T5's: give --clip-text and --t5")
    if not args.words:
        return Words(toy.VOCABULARY)
    known = sorted({word for prompt in read_prompts(args.words) for word in words_of(prompt)})
    if not known:
        raise UserError(f"--words {args.words} holds no word")
    encoder = Words(known)
    encoder.identity += f" {digest(known)}"
    return encoder


def open_prompts(args, model, trained_with, device):
    """(the prompts, their rows and the empty prompt's) for a generator from text, trained_with the
    text encoder of that identity; (None, None) for another. Sets what follows from the prompts:
    the default of --num and --shift. Errors: UserError."""
    prompts = args.prompt or (args.prompts and read_prompts(args.prompts))
    if trained_with is None:
        if prompts:
            raise UserError(f"{args.dit} takes no prompts: it was trained without --captions")
        return None, None
    if not prompts:
        raise UserError(f"{args.dit} draws from text: give --prompt TEXT or --prompts FILE")
    encoder = open_text_encoder(args, device)
    if encoder.identity != trained_with:
        raise UserError(f"{args.dit} was trained with another text encoder ({trained_with}) than "
                        f"this one ({encoder.identity}): give the same --clip-text, --t5, "
                        "--text-length, --words")
    warn_of_cut(encoder.cut(prompts))
    if "num" not in args.given:
        args.num = len(prompts)
    if "shift" not in args.given:
        h, w = model.arguments["grid"]
        args.shift = time_shift(h * w / model.patch ** 2)
    return prompts, Rows(encoder, prompts)


# ---- the command line

# Defaults of the flags. shift: LightningDiT's s = 0.3 is 1/s in the paper's direction of time.
PRESETS = {
    "tiny": {"num": 96, "steps": 25, "cfg": 3.0, "cfg_interval": (0.0, 1.0), "shift": 1.0,
             "batch_size": 96},
    "paper": {"num": 64, "steps": 250, "cfg": 4.0, "cfg_interval": (0.0, 0.89), "shift": 1 / 0.3,
              "batch_size": 64},
}


def parse(argv=None):
    p = runs.Parser(__doc__)
    add = p.add_argument
    add("--dit", help="generator (default: the last checkpoint in runs/dit)")
    add("--tokenizer", default="runs/tokenizer/stage3.pt", help="default: %(default)s")
    add("-n", "--num", type=count,
        help="images (under torchrun, which has options of that name, write -n)")
    add("--steps", type=count, help="intervals of the time grid")
    add("--method", choices=["euler", "heun"], default="euler",
        help="heun: two evaluations a step (default: euler)")
    add("--shift", type=argument(float, lambda a: 0 < a < math.inf, "positive, and finite"),
        help="time shift a: a t / (1 + (a-1) t), 1 for none; 1/s for LightningDiT's s "
             "(default for text: FLUX's, by the number of tokens)")
    add("--cfg", type=argument(float, math.isfinite, "finite"),
        help="guidance scale, 1 for none")
    add("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"),
        help="times (the paper's) with guidance")
    add("--cfg-channels", type=count,
        help="guide the first channels only (3: LightningDiT's rule; default: all)")
    add("--labels", default="balanced",
        help="balanced, random, or classes by number or name: 3,3,dog (default: %(default)s)")
    add("--prompt", action="append", help="text to draw; may be repeated")
    add("--prompts", help="file of prompts, one a line")
    text_flags(p)
    add("--seed", type=index, default=0)
    add("--batch-size", type=count, help="images at once in one process")
    add("--out", help="NAME.npz (arr_0, for fid.py and the ADM evaluator) or a folder of PNGs")
    add("--grid", help="picture of the first images (without --out: samples.png by the generator)")
    add("--time", choices=["paper", "lightning"],
        help="direction of the generator's time; official: lightning")
    add("--latent-stats",
        help="file: mean and std of an official checkpoint's latents (default: the tokenizer's)")
    add("--overwrite", action="store_true", help="replace what other arguments left in --out")
    args = p.fill(argv, PRESETS)
    if args.prompt and args.prompts:
        raise UserError("--prompt and --prompts exclude each other")
    lo, hi = args.cfg_interval
    if not 0 <= lo <= hi <= 1:
        raise UserError(
            f"--cfg-interval takes LO <= HI in [0, 1] (times, 0 is data), not {lo:g} {hi:g}")
    if args.out and Path(args.out).suffix.lower() in IMAGE_TYPES:
        raise UserError(f"--out {args.out}: takes NAME.npz, or a folder of PNGs; one picture of "
                        f"the images is --grid {args.out}")
    return args


def last_dit(folder="runs/dit"):
    found = runs.step_files(folder, "dit", "pt")
    if not found:
        raise UserError(f"no generator in {folder}: run train_dit.py first, or give --dit CKPT")
    return found[-1]


def main(argv=None):
    args = parse(argv)
    rank, world, device = runs.setup_ranks()
    args.dit = Path(args.dit or last_dit())
    model, tokenizer, names, trained_with = load_pair(args)
    prompts, text = open_prompts(args, model, trained_with, device)
    model.to(device)
    tokenizer.to(device)
    if runs.compiles(args, device):
        runs.compile_parts(model.compiled())
    labels = choose_labels(args.labels, model.num_classes, args.num, args.seed, names)
    dtype, times = runs.autocast_dtype(args.dtype, device), time_grid(args.steps, args.shift)
    guidance = {"cfg": args.cfg, "interval": args.cfg_interval, "channels": args.cfg_channels,
                "time": args.time or "paper"}
    evaluations = None

    def draw(indices):
        nonlocal evaluations
        images, evaluations = generate(model, tokenizer, np.asarray(indices), labels, args.seed,
                                       times, args.method, dtype, text, **guidance)
        if not images.isfinite().all():
            raise UserError(f"a pixel of images {indices[0]} to {indices[-1]} is not finite: lower "
                            "--cfg, try --dtype fp32, or another checkpoint")
        return images

    lo, hi = args.cfg_interval
    kind = "from text" if prompts else f"{model.num_classes or 'no'} classes"
    print_0(f"{args.dit}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
            f"{kind}, {args.method}, {args.steps} steps, shift "
            f"{args.shift:g}, cfg {args.cfg if prompts or model.num_classes else 1:g} for t in "
            f"[{lo:g}, {hi:g}], {device.type}, {str(dtype).removeprefix('torch.')}")
    if names:
        print_0(f"classes: {name_labels(labels, names)}")
    if args.out:
        recipe = {k: getattr(args, k) for k in (
            "steps", "method", "shift", "cfg", "cfg_interval", "cfg_channels", "labels", "seed")}
        if rank == 0:
            recipe["latent_stats"] = args.latent_stats and sha256(args.latent_stats)
            recipe |= {"time": guidance["time"], "dtype": str(dtype),
                       "generator": sha256(args.dit), "tokenizer": sha256(args.tokenizer)}
            if prompts:
                recipe["prompts"] = f"{len(prompts)}, {digest(prompts)}"
        if args.out.endswith(".npz"):
            side = [s * tokenizer.factor for s in model.arguments["grid"]]
            write_npz(args.out, draw, args.num, side, args.batch_size, recipe, args.overwrite)
        else:
            write_pngs(args.out, draw, args.num, args.batch_size, recipe, args.overwrite, rank,
                       world)
        print_0(f"{args.num} images in {args.out}")
    if rank == 0 and (args.grid or not args.out):  # drawn again: image i is the same
        grid = args.grid or args.dit.parent / "samples.png"
        n = min(args.num, 96) if args.out else args.num
        images = torch.cat([draw(batch).cpu() for batch in ranges(n, args.batch_size)])
        if prompts:
            save_captioned_grid(images, prompts, grid)
        else:
            save_grid(grid_rows(images, labels), grid)
        print(f"{n} images in {grid}")
    if evaluations:
        print_0(f"network evaluations per image: {sum(evaluations)} = {evaluations[0]} + "
                f"{evaluations[1]} without {'prompt' if prompts else 'the class'}, for guidance")


if __name__ == "__main__":
    runs.launch(main)
