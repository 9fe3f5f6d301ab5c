"""Trains LightningDiT on the latents of an aligned tokenizer, by flow matching (AlignTok, Sections
3.3 and 4).

    z_t = (1 - t) z0 + t z1,  z1 ~ N(0, I),  t = 0 data, t = 1 noise
    L = E || v(z_t, t, y) - (z1 - z0) ||^2

CPU, after the tokenizer's tiny run:  python train_dit.py --preset tiny
One GPU of 80 GB:                     python train_dit.py --accum 16
Eight, the paper's 80K steps:         torchrun --standalone --nproc_per_node 8 train_dit.py --accum 2
Text to image, tiny:                  python train_dit.py --preset tiny --captions --out runs/t2i
With FLUX's text encoders:            torchrun ... train_dit.py --captions --data SHARDS
                                          --clip-text DIR --t5 DIR

A run is a folder, runs/dit: latents.npy (each image encoded once, as it is and flipped; normalised,
fp16), the last two dit_step*.pt (they resume, and sample.py reads their EMA), log.csv, PNG grids of
the EMA. The same command resumes it. What an image meets in an epoch (flip, dropped label, t, z1)
is a function of (seed, epoch, image).

Departures from LightningDiT's code: the paper's direction of time; the gradient is clipped; the
loader (FlowData) draws the noise and drops the labels.

With --align repa or reg it learns the features of a foundation encoder too: repa.py.

From text (mmdit.py, captions.py): the paper names neither text encoders nor recipe. y is a row of
text in the class' place, the empty prompt's where it is dropped; t is shifted as FLUX's sampler
shifts it; images are not flipped.

Legend: B batch, d latent channels, h w latent sides, K classes (class K: none).
"""
import copy
import hashlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

import captions
import losses
import repa
import runs
import toy
from data import (
    Crops,
    ShuffledBatches,
    batches,
    center_crop,
    check_images,
    on_rank_0,
    open_folders,
    rng,
    save_grid,
    to_pixels,
    to_tensor,
)
from fid import open_tokenizer
from files import (
    BatchedArray,
    UserError,
    ensure_statistics,
    fingerprint,
    load_encoder,
    print_0,
)
from mmdit import MMDITS, DoubleBlock, MMDiT, SingleBlock, time_shift
from model import DITS, LightningDiT, update_ema
from runs import count, fraction, positive, weight
from sample import choose_labels, generate, grid_rows, open_text_encoder, text_flags, time_grid

BINS = 5  # of t, in the log
COLUMNS = ["step", "loss", "mse", "cosine", "grad_norm",
           *(f"mse_t{i / BINS:g}-{(i + 1) / BINS:g}" for i in range(BINS))]
ALIGN_COLUMNS = ["align", "class"]


# ---- training

def training_step(batch, s, args, last):
    """One micro-batch: backward through the flow-matching loss. batch: (z0, or with --no-cache the
    images; y; N(0, 1) for t; z1; with --align what repa.flow_matching takes). Returns what is
    logged, as scalars on the device."""
    z0, y, normal, z1, *aligned = batch
    if s.encode:
        with torch.no_grad():
            z0 = s.tokenizer.normalize(s.tokenizer.encode(z0))  # (B, d, h, w)
    t = losses.logit_normal(normal, s.shift)  # (B,)
    with runs.no_sync(s.ddp_model, not last):
        with s.autocast():
            loss, mse, cosine, *terms = s.flow_matching(
                s.ddp_model, z0, z1, t, y, args.w_cos, *aligned)
        (loss / args.accum).backward()
    log = {"loss": loss.detach(), "mse": mse.mean(), "cosine": cosine} | dict(*terms)
    sums, numbers = by_time(mse, t)
    for i in range(BINS):
        log |= {f"sum{i}": sums[i], f"number{i}": numbers[i]}
    return log


def update(s, args):
    """Clips the gradient, one step of AdamW, then the EMA. Returns the gradient's norm."""
    norm = torch.nn.utils.clip_grad_norm_(s.trained, args.clip)
    s.opt.step()
    s.opt.zero_grad(set_to_none=True)
    update_ema(s.ema, s.model, args.ema_decay)
    return norm


def train(args, run, s, stream):
    """From the step that `s` is at to the last one."""
    norm = None

    def row():
        return {"step": s.step} | averages(s.meter) | {"grad_norm": norm.item()}

    for _ in run.steps(s, args, row, partial(sample_grid, s, args)):
        for micro in range(args.accum):
            log = training_step(next(stream), s, args, last=micro == args.accum - 1)
            s.meter.add(s.step + 1, log)
        norm = update(s, args)
    print_0(f"complete: {run.last_good(s.prefix)}")


def by_time(values, t):
    """Values (B,) at times t (B,) -> their sums and numbers (BINS,) in equal bins of [0, 1],
    without waiting for the device. The loss varies more with t than over most of the training."""
    member = F.one_hot((t * BINS).long().clamp_max(BINS - 1), BINS).to(values.dtype)  # (B, BINS)
    return values @ member, member.sum(0)


def averages(meter):
    """A row of log.csv, over all ranks; a bin's squared error is its sum over its number."""
    mean = meter.average()
    row = {k: mean[k] for k in ("loss", "mse", "cosine", *ALIGN_COLUMNS) if k in mean}
    for i, column in enumerate(COLUMNS[-BINS:]):
        number = mean[f"number{i}"]
        row[column] = mean[f"sum{i}"] / number if number else ""
    return row


def sample_grid(s, args, path):
    """Eight images of up to twelve classes, one class a row. Without guidance, because guidance
    hides how far the training has come. One that a resume finds is left as it is."""
    if path.exists():
        return
    if s.text:
        return captioned_grid(s, args, path)
    K, labels, n = s.ema.num_classes, None, 64
    if K:
        classes = np.unique(np.linspace(0, K - 1, min(K, 12)).astype(int))
        n = 8 * len(classes)
        labels = choose_labels(",".join(map(str, classes)), K, n, args.seed)
    images, _ = generate(s.ema, s.tokenizer, np.arange(n), labels, args.seed, time_grid(20),
                         dtype=s.dtype)
    save_grid(grid_rows(images.cpu(), labels), path)


# ---- latents, noise

@torch.no_grad()
def cached_latents(path, tokenizer, data, args, device, views=2):
    """The normalised latents of all images, as they are and flipped: a read-only memory map
    (n, views, d, h, w) fp16. views: 1 leaves out the flipped, as a caption tells left from right.

    Encoded once, by all ranks; after a stop, only what is missing. In fp32, so that a latent does
    not depend on the hardware's bf16. The file belongs to one tokenizer (its fingerprint) and one
    data set (its file names, and the pixels of a few images): any other is refused."""
    n, side = len(data), args.size // tokenizer.factor
    crops, pixels = Crops(data, args.size), hashlib.sha256()
    for i in np.linspace(0, n - 1, min(n, 8)).astype(int):
        item = crops[0, int(i)]
        if isinstance(item, UserError):
            raise item
        pixels.update(item[0].numpy().tobytes())
    recipe = {"tokenizer": fingerprint(tokenizer), "data": data.identity,
              "pixels": pixels.hexdigest()[:16], "size": args.size}
    shape = (views, tokenizer.d, side, side)
    array = BatchedArray(path, n, shape, np.float16, recipe, args.overwrite)
    if not array.complete:
        missing = array.missing(args.encode_batch)
        gib = n * views * 2 * tokenizer.d * side ** 2 / 2 ** 30
        print_0(f"encoding {n} images{', original and flipped,' if views == 2 else ''} into {path} "
                f"({gib:.2f} GiB)")
        order = ([(0, i) for i in batch] for batch in missing)
        stream = batches(crops, order, args.workers, device)
        bar = tqdm(stream, "encoding", len(missing), disable=array.rank != 0, mininterval=1)
        with array.lock:
            for batch, (x, _) in zip(missing, bar):
                x = torch.stack([x, x.flip(3)][:views], dim=1).flatten(0, 1)  # (views*B, 3, H, W)
                z = tokenizer.normalize(runs.by_parts(tokenizer.encode, x, args.size ** 2))
                z = z.half()  # (views*B, d, h, w)
                if not z.isfinite().all():
                    raise UserError(
                        f"a latent of images {batch[0]} to {batch[-1]} is not finite in fp16")
                array.write(batch, z.unflatten(0, (-1, views)).cpu().numpy())
            array.finish()
    return array.mapped("cache of latents")


class FlowData(Dataset):
    """What a loader reads: item (epoch, i) is (x, y, normal, z1). x: the latent (d, h, w) of image
    i, or without `latents` its pixels, maybe flipped; with `aligned`, an encoder's width, the
    pixels follow z1, and noise of that width. y: its class, or K where the label is
    dropped; with `text` (captions.cached_text) the row of its caption, or of the empty one, and no
    flip. normal ~ N(0, 1) makes t. z1: noise (d, h, w)."""

    def __init__(self, data, latents, shape, num_classes, args, text=None, aligned=0):
        self.data, self.aligned = data if latents is None or aligned else None, aligned
        self.labels, self.latents, self.shape = data.labels, latents, shape
        self.num_classes, self.label_drop, self.text = num_classes, args.label_drop, text
        self.size, self.seed = args.size, args.seed

    def __getitem__(self, item):
        epoch, i = item
        r = rng(self.seed, "flow", epoch, i)
        flip, dropped = r.random() < 0.5, r.random() < self.label_drop
        flip &= self.text is None
        normal = torch.tensor(r.standard_normal()).float()
        z1 = torch.from_numpy(r.standard_normal(self.shape, np.float32))
        if self.data is not None:
            try:
                x = image = to_tensor(to_pixels(center_crop(self.data.image(i), self.size)))
            except UserError as e:  # see Crops
                return e
            if flip:
                x = image = image.flip(2)
        if self.latents is not None:
            x = torch.from_numpy(self.latents[i, int(flip)].astype(np.float32))
        K = self.num_classes
        if self.text is not None:
            y = torch.from_numpy(self.text[-1 if dropped else i].astype(np.float32))
        else:
            y = K if dropped or not K else int(self.labels[i])
        if self.aligned:
            n = torch.from_numpy(r.standard_normal(self.aligned, np.float32))
            return x, y, normal, z1, image, n
        return x, y, normal, z1

    def __getstate__(self):
        """A worker that is not a fork opens the memory maps itself: pickled, they are copied."""
        maps = {"latents": self.latents, "text": self.text}
        return vars(self) | {k: None if m is None else m.filename for k, m in maps.items()}

    def __setstate__(self, state):
        vars(self).update(state)
        self.latents, self.text = (file and np.load(file, mmap_mode="r")
                                   for file in (self.latents, self.text))


# ---- set up

def set_up(args, run, tokenizer, data, device):
    """(networks, optimiser, EMA and recipe; the latents or None)."""
    ensure_statistics(tokenizer, args.tokenizer, args.latent_stats)
    patch = max(1, 16 // tokenizer.factor)  # a token covers 16 px
    if args.size % (tokenizer.factor * patch):
        raise UserError(
            f"--size must be divisible by {tokenizer.factor * patch}, not {args.size}")
    labelled = data.labels is not None and not args.unconditional and not args.captions
    K = len(data.classes) if labelled else 0
    latents = None if args.no_cache else cached_latents(
        args.cache or run.out / "latents.npy", tokenizer, data, args, device,
        views=1 if args.captions else 2)
    text = set_up_text(args, run, data, device) if args.captions else None

    flow_matching, aligned = losses.flow_matching, None
    if args.align:
        torch.manual_seed(int(rng(args.seed, "align").integers(2 ** 62)))  # for random:NAME
        with runs.rank_0_first():
            aligned = load_encoder(args.align_encoder, "--align-encoder")[0]
        aligned.to(device).requires_grad_(False).eval()
        flow_matching = partial(repa.flow_matching, aligned)

    torch.manual_seed(int(rng(args.seed, "init").integers(2 ** 62)))  # the same on every rank
    side = args.size // tokenizer.factor
    latent = {"d": tokenizer.d, "grid": [side, side], "patch": patch}
    if text:
        model = MMDiT(**MMDITS[args.model], **latent, **text.widths).to(device)
    elif args.align:
        model = repa.AlignedDiT(args.align, aligned.dim, **DITS[args.model], **latent,
                                num_classes=K, qk_norm=args.qk_norm).to(device)
    else:
        model = LightningDiT(**DITS[args.model], **latent, num_classes=K,
                             qk_norm=args.qk_norm).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True)
    dtype = runs.autocast_dtype(args.dtype, device)
    recipe = {"tokenizer": fingerprint(tokenizer), "data": data.identity, "classes": K,
              "dtype": str(dtype).removeprefix("torch."), "cached": latents is not None}
    recipe |= {k: getattr(args, k) for k in (
        "model", "qk_norm", "size", "batch_size", "accum", "lr", "beta2", "clip", "w_cos",
        "label_drop", "ema_decay", "seed", "align", "align_encoder")}
    if text:
        recipe |= text.recipe
    if aligned:
        recipe["features"] = fingerprint(aligned)
    s = SimpleNamespace(
        prefix="dit", recipe=recipe, may_change=("dtype", "accum"), step=0, steps=args.steps,
        log_every=args.log_every, shown=("mse", "cosine"), classes=data.classes if K else [],
        tokenizer=tokenizer, model=model, ema=ema, trained=trained, opt=opt,
        meter=runs.Meter(device), encode=latents is None, dtype=dtype, text=text,
        flow_matching=flow_matching, aligned=aligned.dim if aligned else 0,
        shift=time_shift((side // patch) ** 2) if text else 1.0,
        autocast=partial(runs.autocast, device, dtype))
    s.networks, s.optimisers = {"model": model, "ema": ema}, {"opt": opt}  # in a checkpoint
    return s, latents


def training_latents(s, args, run, data, latents, world, device):
    """Wraps the network for DDP, says what will train, and returns the endless stream of
    (x, y, normal, z1), with --align also images and noise, from the step on."""
    runs.make_fast(s.model, args, device, DoubleBlock, SingleBlock)
    s.ddp_model = runs.wrap(s.model, device)
    K, shape = s.model.num_classes, (s.model.d, *s.model.arguments["grid"])
    order = ShuffledBatches(len(data), args.batch_size, (args.seed, "order"), s.step, args.accum,
                            run.rank, world)
    epochs = args.steps * args.batch_size / len(data)
    kind = "captions" if s.text else f"{K} classes" if K else "unconditional"
    print_0(
        f"{type(s.model).__name__} {args.model}: {sum(p.numel() for p in s.trained) / 1e6:.2f}M "
        f"parameters train; latents {'x'.join(map(str, shape))}, {kind}\n"
        f"{runs.describe(s, args, len(data), world)} = {epochs:.1f} epochs\n"
        f"  {device.type}, {s.recipe['dtype']}, latents {'encoded anew' if s.encode else 'cached'}")
    flow = FlowData(data, latents, shape, K, args, s.text and s.text.rows, s.aligned)
    return batches(flow, order, args.workers, device)


# ---- text to image

def set_up_text(args, run, data, device):
    """What a generator has from text: the rows of all captions and of the empty one, their widths,
    a few captions to show, and what a resume must repeat."""
    encoder, texts = open_text_encoder(args, device), data.captions
    rows = captions.cached_text(args.text_cache or run.out / "text.npy", encoder, texts,
                                args.encode_batch, args.overwrite)
    recipe = {"text encoder": encoder.identity, "captions": captions.digest(texts)}
    return SimpleNamespace(rows=rows, widths={"text": encoder.T, "pooled": encoder.P},
                           shown=[texts[i] for i in range(min(16, len(texts)))], recipe=recipe)


def captioned_grid(s, args, path):
    """An image of each of the first captions, without guidance."""
    images, _ = generate(s.ema, s.tokenizer, np.arange(len(s.text.shown)), None, args.seed,
                         time_grid(20, s.shift), dtype=s.dtype, text=s.text.rows)
    captions.save_captioned_grid(images.cpu(), s.text.shown, path)


# ---- the command line

# The defaults of the flags of the same name.
PRESETS = {
    "tiny": {
        "model": "tiny", "data": "shapes", "steps": 1200, "batch_size": 64, "lr": 2e-3,
        "ema_decay": 0.995, "workers": 0, "log_every": 25, "save_every": 400,
        "grid_every": 400, "encode_batch": 64, "val_images": 512},
    "paper": {
        "model": "XL/1", "data": "data/imagenet/train", "steps": 80_000, "batch_size": 1024,
        "lr": 2e-4, "ema_decay": 0.9999, "workers": 8, "log_every": 100,
        "save_every": 5_000, "grid_every": 5_000, "encode_batch": 128, "val_images": 5_000},
}
# What --captions changes. 100K steps: the paper's, at 256 px.
TEXT_PRESETS = {"tiny": {"model": "tiny", "steps": 800}, "paper": {"model": "2B", "steps": 100_000}}


def parse(argv=None):
    p = runs.Parser(__doc__)
    add = p.add_argument
    add("--tokenizer", default="runs/tokenizer/stage3.pt",
        help="default: %(default)s; stage 2's has the same latents; FLUX's VAE: its official file")
    add("--latent-stats", help="file of mean and std of the latents: of an official tokenizer")
    add("--model", choices=[*DITS, *MMDITS], help="size")
    add("--out", default="runs/dit", help="the run's folder (default: %(default)s)")
    p.training_flags()
    add("--qk-norm", action="store_true", help="RMSNorm on queries and keys: for long trainings")
    add("--unconditional", action="store_true", help="ignore the classes")
    add("--captions", action="store_true",
        help="text to image, by FLUX's transformer: --data holds NAME.jpg beside NAME.txt, or "
             "img2dataset's *.tar; 'shapes' has captions too")
    text_flags(p)
    add("--text-cache",
        help="file of the encoded captions (default: text.npy in --out); runs may share it")
    add("--lr", type=positive, help="of AdamW, constant")
    add("--beta2", type=fraction, default=0.95, help="of AdamW (default: %(default)s)")
    add("--clip", type=positive, default=1.0,
        help="largest norm of the gradient; inf: none (default: %(default)s)")
    add("--w-cos", type=weight, default=1.0,
        help="weight of the velocity-direction loss (default: %(default)s)")
    add("--align", choices=["repa", "reg"],
        help="learn the features of --align-encoder too (repa), and to draw its class token (reg)")
    add("--align-encoder", help="vitb14, another name, or a file, as train_tokenizer.py --encoder")
    add("--label-drop", type=fraction, default=0.1,
        help="part of labels, or captions, dropped, for guidance (default: %(default)s)")
    add("--cache", help="file of the latents (default: latents.npy in --out); runs may share it")
    add("--no-cache", action="store_true", help="encode every batch anew: no disk, more time")
    add("--encode-batch", type=count, help="images at once while the cache is made")
    args = p.fill(argv, PRESETS)
    if args.cache and args.cache.endswith(".npz"):
        raise UserError(f"--cache {args.cache}: it is read in place, as no zip can be; name it .npy")
    if args.captions:
        own = TEXT_PRESETS[args.preset]
        vars(args).update({k: v for k, v in own.items() if k not in args.given})
    sizes = MMDITS if args.captions else DITS
    if args.model not in sizes:
        raise UserError(f"--model {args.model} is a size {'without' if args.captions else 'of'} "
                        f"--captions; here: {', '.join(sizes)}")
    if bool(args.align) != bool(args.align_encoder):
        raise UserError("--align repa or reg and --align-encoder ENCODER (such as vitb14, or a "
                        "file) go together")
    for flag in ("clip_text", "t5", "words", "text_length", "text_cache"):
        if getattr(args, flag) and not args.captions:
            raise UserError(f"--{flag.replace('_', '-')} goes with --captions")
    # no class, nothing held out, always on, LightningDiT's
    for flag in ("unconditional", "val", "qk_norm", "align"):
        if args.captions and getattr(args, flag):
            raise UserError(f"--captions and --{flag.replace('_', '-')} exclude each other")
    return args


def main(argv=None):
    args = parse(argv)
    rank, world, device = runs.setup_ranks()
    runs.check_batch_size(args, world)
    with runs.Run(args.out, rank, COLUMNS + ALIGN_COLUMNS * bool(args.align)) as run:
        tokenizer, args.size = open_tokenizer(args.tokenizer, args.size, device)
        if args.data == "shapes":
            data, _ = toy.open_shapes(args.val, args.size, args.val_images)
        elif args.captions:
            data = captions.open_captions(args.data, run.out / "shards", args.workers)
        else:
            data, _ = on_rank_0(open_folders, args.data, args.val, args.val_images)
        if args.check_data or args.skip_unreadable:
            data, = check_images([data], args, rank, world)
        s, latents = set_up(args, run, tokenizer.requires_grad_(False), data, device)
        if args.overwrite:
            run.forget(s.prefix)
        run.resume(s)
        train(args, run, s, training_latents(s, args, run, data, latents, world, device))


if __name__ == "__main__":
    runs.launch(main)
