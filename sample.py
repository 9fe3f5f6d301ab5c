"""Draws images from a trained LightningDiT: noise at t = 1, the velocity followed down to t = 0, the latent decoded.

    dz/dt = v(z, t),   t: 1 -> 0 in N intervals, by Euler (N evaluations) or Heun (2N)
    guidance:  v = v_null + cfg (v_class - v_null)   where lo <= t <= hi; elsewhere v_null is not computed

A grid of the last generator of runs/dit:   python sample.py --preset tiny
50,000 images for fid.py, eight GPUs:       torchrun --nproc_per_node 8 sample.py -n 50000 --out samples.npz
LightningDiT's published rule for guidance: python sample.py --cfg 10 --cfg-channels 3 --cfg-interval 0 0.89

Time runs as in the paper everywhere, t = 0 data and t = 1 noise; LightningDiT's own runs the other way. Its released
checkpoints are read too: --time lightning turns them round, --latent-stats takes the statistics they were trained with.
Image i is a function of the seed and i alone: neither the batch size nor the number of processes changes it (but for
the rounding of floating-point sums). Repeating a command completes what is missing in --out.

Legend: B batch, d latent channels, h w latent sides, K classes (class K: none).
"""
import errno
import itertools
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from model import LightningDiT, Tokenizer, UserError, build, dit_arguments, load_file, print_0, reading, sha256
from train_tokenizer import (
    Parser,
    autocast_dtype,
    check_same,
    lock,
    rng,
    run,
    save_grid,
    setup_ranks,
    to_uint8,
    write_atomically,
)

# The defaults of the flags of the same name. shift: LightningDiT's s = 0.3 seen from the paper's direction, 1 / s.
PRESETS = {
    "tiny": {"num": 96, "steps": 25, "cfg": 3.0, "cfg_interval": (0.0, 1.0), "shift": 1.0, "batch_size": 96},
    "paper": {"num": 64, "steps": 250, "cfg": 4.0, "cfg_interval": (0.0, 0.89), "shift": 1 / 0.3, "batch_size": 64},
}


# ------------------------------------------------------------------------------------------------------ the sampler

def time_grid(steps, shift=1.0):
    """steps + 1 times from 1 (noise) to 0 (data). A shift a > 1 puts more of them near noise: a t / (1 + (a-1) t)."""
    t = np.linspace(1.0, 0.0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


class Velocity:
    """v(z, t) of a network for the classes y (B,), with classifier-free guidance; z (B, d, h, w), t a number.

    cfg: scale, 1 for none. interval: the times lo <= t <= hi where guidance is on. channels: how many channels are
    guided (None: all; 3: the rule behind LightningDiT's published scales). time: "paper", or "lightning" for a network
    that has learned the other direction. It counts the evaluations of the network per image."""

    def __init__(self, model, y, cfg=1.0, interval=(0.0, 1.0), channels=None, time="paper"):
        self.model, self.y, self.channels, self.time = model, y, channels, time
        self.cfg, (self.lo, self.hi) = (cfg if model.num_classes else 1.0), interval
        self.conditional = self.unconditional = 0

    def network(self, z, t, y):
        if self.time == "paper":
            return self.model(z, torch.full((len(z),), t, device=z.device), y).float()
        return -self.model(z, torch.full((len(z),), 1 - t, device=z.device), y).float()

    def __call__(self, z, t):
        self.conditional += 1
        if self.cfg == 1 or not self.lo <= t <= self.hi:
            return self.network(z, t, self.y)
        self.unconditional += 1
        y = torch.cat([self.y, torch.full_like(self.y, self.model.num_classes)])
        v, v_null = self.network(torch.cat([z, z]), t, y).chunk(2)
        guided = v_null + self.cfg * (v - v_null)
        return guided if self.channels is None else torch.cat([guided[:, :self.channels], v[:, self.channels:]], dim=1)


def integrate(velocity, z, times, method="euler"):
    """Follows dz/dt = velocity(z, t) along the times, from z at the first to the result at the last."""
    for t, t_next in itertools.pairwise(times):
        v = velocity(z, t)
        if method == "heun":
            v = (v + velocity(z + (t_next - t) * v, t_next)) / 2
        z = z + (t_next - t) * v
    return z


def choose_labels(spec, num_classes, num, seed):
    """The classes of images 0 to num-1: `balanced` (0, 1, ..., K-1, 0, ...), `random`, or a list such as 3,3,7,
    repeated. None for an unconditional model."""
    if not num_classes:
        if spec != "balanced":
            raise UserError(f"--labels {spec}: this generator is unconditional, it knows no classes")
        return None
    if spec == "balanced":
        return np.arange(num) % num_classes
    if spec == "random":
        return np.array([rng(seed, "label", i).integers(num_classes) for i in range(num)])
    try:
        chosen = np.array([int(c) for c in spec.split(",")])
    except ValueError:
        raise UserError(f"--labels takes balanced, random, or classes such as 3,3,7; not {spec}") from None
    if chosen.min() < 0 or chosen.max() >= num_classes:
        raise UserError(f"--labels {spec}: the generator's classes are 0 to {num_classes - 1}")
    return chosen[np.arange(num) % len(chosen)]


@torch.no_grad()
def generate(model, tokenizer, indices, labels, seed, times, method="euler", dtype=torch.float32, **guidance):
    """Images (B, 3, H, W), about [-1, 1], of the given indices; labels: classes of all images, or None.

    Returns also the evaluations of the network per image, (conditional, unconditional)."""
    device = tokenizer.latent_mean.device
    shape = (tokenizer.d, *model.arguments["grid"])
    z = np.stack([rng(seed, "noise", int(i)).standard_normal(shape, np.float32) for i in indices])
    y = None if labels is None else torch.from_numpy(labels[indices].astype(np.int64)).to(device)
    velocity = Velocity(model, y, **guidance)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        z = integrate(velocity, torch.from_numpy(z).to(device), times, method)  # (B, d, h, w)
    images = tokenizer.decode(tokenizer.unnormalize(z))  # fp32: bf16 has not the 256 levels of a pixel
    return images, (velocity.conditional, velocity.unconditional)


def grid_rows(images, labels, width=8):
    """Images (n, 3, H, W) as rows for save_grid: one class a row where each class has several images."""
    if labels is not None:
        rows = [images[labels[:len(images)] == c][:width] for c in np.unique(labels[:len(images)])]
        if len(rows) <= 16 and 1 < min(len(row) for row in rows) == max(len(row) for row in rows):
            return rows
    width = min(width, len(images))
    return images[:len(images) // width * width].split(width)


# ------------------------------------------------------------------------------------------- checkpoints, and results

def load_tokenizer(path, d=None):
    """The tokenizer in a file; d: the latent channels that the generator takes."""
    if not Path(path).exists():
        raise UserError(f"there is no tokenizer {path}: run train_tokenizer.py first, or give --tokenizer CKPT")
    tokenizer = Tokenizer.load(path)
    if d is not None and tokenizer.d != d:
        raise UserError(f"the tokenizer {path} has {tokenizer.d} latent channels, the generator takes {d}")
    return tokenizer


def load_dit(path):
    """(LightningDiT with the EMA weights, content of the file): a checkpoint of train_dit.py or an official one."""
    content = load_file(path, "generator")
    state = content.get("ema")
    if not isinstance(state, dict) or "x_embedder.proj.weight" not in state:
        raise UserError(f"{path} is no checkpoint of a LightningDiT: no weights under \"ema\"")
    with reading(path, "checkpoint of a LightningDiT"):
        return build(LightningDiT, content.get("arguments") or dit_arguments(state), state, path).eval(), content


def share(missing, n, batch_size, rank, world):
    """Of n rows a rank has a run of neighbours, in batches: those batches that lack a row, whole, since the rounding of
    sums depends on a row's batch. So a stop changes no bit."""
    lacking = np.isin(np.arange(n), missing)
    mine = np.array_split(np.arange(n), world)[rank]
    return [batch for batch in np.split(mine, range(batch_size, len(mine), batch_size)) if lacking[batch].any()]


class Rows:
    """An array of n rows on disk, filled by all ranks in any order, and continued after a stop.

    While it grows: PATH.part, an .npy file, and PATH.done<rank>, the numbers of the rows that are safe in it. PATH.json
    says from the start what the rows are (`about`); other rows are refused, or with `overwrite` replaced. Only when no
    row is missing does the array get its name. Plain writes: a full disk is an error, not a memory map's crash."""

    def __init__(self, path, n, shape, dtype, about, overwrite=False):
        self.path, self.n, self.row = Path(path), n, (tuple(shape), np.dtype(dtype))
        self.part, self.about = (Path(f"{path}{suffix}") for suffix in (".part", ".json"))
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        about = json.loads(json.dumps(dict(about, rows=n)))  # as it will be read back
        self.lock = None
        if self.rank == 0:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.lock = lock(f"{path}.lock", f"another process is writing {path}; wait for it")
                self._start(about, overwrite)
            except UserError:
                self._unlock()
                raise
            except OSError as e:
                raise UserError(f"cannot write {path}: {e.strerror}") from None
        if self.world > 1:
            dist.barrier()
        self.complete = self.path.exists()
        if self.complete:
            self._unlock()
        else:
            with reading(self.part, "array (delete it to start again)"), open(self.part, "rb") as f:
                np.lib.format.read_magic(f)
                np.lib.format.read_array_header_1_0(f)
                self.offset = f.tell()
            done = [np.frombuffer(p.read_bytes()[:p.stat().st_size // 8 * 8], np.int64) for p in self._journals()]
            self.missing = np.setdiff1d(np.arange(n), np.concatenate([np.empty(0, np.int64), *done]))
            if self.world > 1:
                dist.barrier()  # all have read before the first writes
            self.rows = os.open(self.part, os.O_WRONLY)
            self.journal = os.open(f"{path}.done{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.ftruncate(self.journal, os.fstat(self.journal).st_size // 8 * 8)  # a number cut off

    def _journals(self):
        return sorted(self.path.parent.glob(f"{self.path.name}.done*"))

    def _start(self, about, overwrite):
        then = {}
        if self.about.exists():
            with reading(self.about, "record of what was being written"):
                then = dict(json.loads(self.about.read_text()))
        if overwrite and then != about:
            for old in [self.path, self.part, *self._journals()]:
                old.unlink(missing_ok=True)
        elif then or self.path.exists():
            check_same(then, about, self.path)
        write_atomically(self.about, lambda f: f.write(json.dumps(about, indent=1).encode()))
        if self.path.exists() or not self.part.exists():  # a kill in `finish` leaves them
            for old in [self.part, *self._journals()]:
                old.unlink(missing_ok=True)
        if not self.path.exists() and not self.part.exists():
            shape, dtype = self.row
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.n, *shape)}
            write_atomically(self.part, lambda f: np.lib.format.write_array_header_1_0(f, header))

    def _unlock(self):
        if self.lock is not None:
            Path(f"{self.path}.lock").unlink(missing_ok=True)
            self.lock.close()

    def mine(self, batch_size):
        """The batches of this rank that lack a row."""
        return share(self.missing, self.n, batch_size, self.rank, self.world)

    def write(self, indices, values):
        """Stores rows; only when they are on the disk are they noted as done."""
        values = np.ascontiguousarray(values, self.row[1])
        try:
            for i, value in zip(indices, values):
                if os.pwrite(self.rows, value, self.offset + int(i) * value.nbytes) < value.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.rows)
            os.write(self.journal, np.asarray(indices, np.int64).tobytes())
            os.fsync(self.journal)
        except OSError as e:
            raise UserError(f"cannot write {self.part}: {e.strerror}; make room and repeat the command: it goes on "
                            "from what is there") from None

    def finish(self, pack=None):
        """All ranks: wait for each other, then the array gets its name; pack(array file, destination file) may change
        its format on the way."""
        os.close(self.rows)
        os.close(self.journal)
        if self.world > 1:
            dist.barrier()
        if self.rank == 0:
            if pack:
                with open(self.part, "rb") as array:
                    write_atomically(self.path, lambda f: pack(array, f))
                self.part.unlink()
            else:
                os.replace(self.part, self.path)
            for old in self._journals():
                old.unlink()
        self._unlock()
        if self.world > 1:
            dist.barrier()


def pack_npz(array, f):
    """An .npy file -> an .npz file that holds it as arr_0, uncompressed, a piece at a time."""
    with zipfile.ZipFile(f, "w", allowZip64=True) as z, z.open("arr_0.npy", "w", force_zip64=True) as entry:
        shutil.copyfileobj(array, entry, 1 << 20)


def write_npz(path, draw, num, side, batch_size, about, overwrite):
    """num images as path (.npz, arr_0 (num, H, W, 3) uint8, as the ADM evaluator reads it)."""
    rows = Rows(path, num, (*side, 3), np.uint8, about, overwrite)
    if rows.complete:
        return
    for indices in tqdm(rows.mine(batch_size), desc="sampling", disable=rows.rank != 0, mininterval=1):
        rows.write(indices, to_uint8(draw(indices)))
    rows.finish(pack_npz)


def write_pngs(folder, draw, num, batch_size, about, overwrite, rank, world):
    """num images as folder/000000.png ..., each written at once, those that are there left alone."""
    folder = Path(folder)
    note = folder / "sampling.json"
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder / ".lock", f"another process is writing to {folder}; wait for it")
        except OSError as e:
            raise UserError(f"cannot write to --out {folder}: {e.strerror}") from None
        old = sorted(folder.glob("*.png"))
        about = json.loads(json.dumps(about))  # as it will be read back
        then = {}
        if note.exists():
            with reading(note, "record of what was sampled"):
                then = dict(json.loads(note.read_text()))
        if overwrite and then != about:
            for path in old:
                path.unlink()
        elif then or old:
            check_same(then, about, folder)
        write_atomically(note, lambda f: f.write(json.dumps(about, indent=1).encode()))
    if world > 1:
        dist.barrier()
    missing = {i for i in range(num) if not (folder / f"{i:06d}.png").exists()}
    if world > 1:
        dist.barrier()
    mine = share(list(missing), num, batch_size, rank, world)
    for indices in tqdm(mine, desc="sampling", disable=rank != 0, mininterval=1):
        for i, image in zip(indices, to_uint8(draw(indices))):
            if i in missing:
                write_atomically(folder / f"{i:06d}.png", lambda f, image=image: Image.fromarray(image).save(f, "PNG"))
    if world > 1:
        dist.barrier()
    if rank == 0:
        held.close()


# -------------------------------------------------------------------------------------------------------------- CLI

def parse(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--preset", choices=PRESETS, default="paper", help="default: %(default)s")
    add("--dit", help="generator (default: the last checkpoint in runs/dit)")
    add("--tokenizer", default="runs/tokenizer/stage3.pt", help="default: %(default)s")
    add("-n", "--num", type=int, help="images (under torchrun, which has options of that name, write -n)")
    add("--steps", type=int, help="intervals of the time grid")
    add("--method", choices=["euler", "heun"], default="euler", help="heun: two evaluations a step (default: euler)")
    add("--shift", type=float, help="time shift a, 1 for none: a t / (1 + (a-1) t); 1/s for LightningDiT's s")
    add("--cfg", type=float, help="guidance scale, 1 for none")
    add("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"), help="times (paper's) with guidance")
    add("--cfg-channels", type=int, help="guide the first channels only (3: LightningDiT's rule; default: all)")
    add("--labels", default="balanced", help="balanced, random, or classes such as 3,3,7 (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, help="images at once in one process; it changes nothing else")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of autocast; auto: bf16 where it is native")
    add("--out", help="NAME.npz (arr_0, for fid.py and the ADM evaluator) or a folder of PNGs")
    add("--grid", help="a picture of the first images (default without --out: samples.png beside the generator)")
    add("--time", choices=["paper", "lightning"], help="which way the generator's time runs; official: lightning")
    add("--latent-stats", help="file with mean and std of an official checkpoint's latents (default: the tokenizer's)")
    add("--overwrite", action="store_true", help="replace what other arguments have left in --out")
    args = p.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("num", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    lo, hi = args.cfg_interval
    if not 0 <= lo <= hi <= 1:
        raise UserError(f"--cfg-interval takes LO <= HI in [0, 1] (the paper's time, 0 is data), not {lo:g} {hi:g}")
    if args.shift <= 0 or args.seed < 0 or (args.cfg_channels is not None and args.cfg_channels < 1):
        raise UserError("--shift and --cfg-channels must be positive, --seed not negative")
    return args


def last_dit(folder="runs/dit"):
    found = sorted(Path(folder).glob("dit_step*.pt"))
    if not found:
        raise UserError(f"there is no generator in {folder}: run train_dit.py first, or give --dit CKPT")
    return found[-1]


def main(argv=None):
    args = parse(argv)
    rank, world, device = setup_ranks()
    path = Path(args.dit or last_dit())
    model, content = load_dit(path)
    tokenizer = load_tokenizer(args.tokenizer, model.d)
    if "run" in content:  # a checkpoint of train_dit.py says which latents it was trained on
        with reading(path, "generator"):
            its = content["run"]["tokenizer"]
        if its != tokenizer.fingerprint():
            raise UserError(f"{path} was trained on the latents of another tokenizer ({its}) than {args.tokenizer} "
                            f"({tokenizer.fingerprint()})")
    elif args.time is None:
        raise UserError(f"{path} is an official checkpoint: say which way its time runs, --time lightning or paper")
    if args.latent_stats:
        stats = load_file(args.latent_stats, "latent statistics")
        if not all(isinstance(stats.get(k), torch.Tensor) and stats[k].numel() == tokenizer.d
                   and stats[k].is_floating_point() and stats[k].isfinite().all() for k in ("mean", "std")):
            raise UserError(f"{args.latent_stats} does not hold mean and std of {tokenizer.d} channels, finite numbers")
        tokenizer.latent_mean.copy_(stats["mean"].flatten())
        tokenizer.latent_std.copy_(stats["std"].flatten())
    model.to(device)
    tokenizer.to(device)
    labels = choose_labels(args.labels, model.num_classes, args.num, args.seed)
    dtype, times, time = autocast_dtype(args.dtype, device), time_grid(args.steps, args.shift), args.time or "paper"
    evaluations = None

    def draw(indices):
        nonlocal evaluations
        images, evaluations = generate(
            model, tokenizer, indices, labels, args.seed, times, args.method, dtype, cfg=args.cfg,
            interval=args.cfg_interval, channels=args.cfg_channels, time=time)
        return images

    print_0(f"{path}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {model.num_classes or 'no'} "
            f"classes, {args.method}, {args.steps} steps, shift {args.shift:g}, cfg "
            f"{args.cfg if model.num_classes else 1:g} for t in [{args.cfg_interval[0]:g}, {args.cfg_interval[1]:g}], "
            f"{device.type}, {str(dtype).removeprefix('torch.')}")
    if args.out:
        about = {k: getattr(args, k) for k in ("steps", "method", "shift", "cfg", "cfg_interval", "cfg_channels",
                                               "labels", "seed", "latent_stats")}
        if rank == 0:
            about.update(time=time, dtype=str(dtype), generator=sha256(path), tokenizer=sha256(args.tokenizer))
        side = [s * tokenizer.factor for s in model.arguments["grid"]]
        if args.out.endswith(".npz"):
            write_npz(args.out, draw, args.num, side, args.batch_size, about, args.overwrite)
        else:
            write_pngs(args.out, draw, args.num, args.batch_size, about, args.overwrite, rank, world)
        print_0(f"{args.num} images in {args.out}")
    if rank == 0 and (args.grid or not args.out):  # cheap to draw again: image i does not depend on who draws it
        grid = args.grid or path.parent / "samples.png"
        n = min(args.num, 96) if args.out else args.num
        images = torch.cat([draw(np.arange(first, min(first + args.batch_size, n))).cpu()
                            for first in range(0, n, args.batch_size)])
        save_grid(grid_rows(images, labels), grid)
        print(f"{n} images in {grid}")
    if evaluations:
        print_0(f"network evaluations per image: {sum(evaluations)} = {evaluations[0]} + {evaluations[1]} without the "
                "class, for guidance")


if __name__ == "__main__":
    run(main)
