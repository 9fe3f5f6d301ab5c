"""Trains LightningDiT on the latents of an aligned tokenizer, by flow matching (AlignTok, Sections 3.3 and 4).

    z_t = (1 - t) z0 + t z1,  z1 ~ N(0, I),  u = z1 - z0,  L = E || v(z_t, t, y) - u ||^2,   t = 0 data, t = 1 noise

On a CPU, after the tokenizer's tiny run:   python train_dit.py --preset tiny
One GPU:                                    python train_dit.py --data data/imagenet/train --accum 8
Eight GPUs, the paper's 80K steps:          torchrun --nproc_per_node 8 train_dit.py --model XL/1
The paper's 800 epochs:                     torchrun --nproc_per_node 8 train_dit.py --qk-norm --steps 1000000

A run is a folder, runs/dit: latents.npy (each image encoded once, as it is and flipped; normalised, fp16), the last two
dit_step*.pt (they resume, and sample.py reads their EMA), log.csv, and PNG grids drawn from the EMA.
Repeating a command resumes it. What an image meets in an epoch (flip, dropped label, t, z1) is a function of (seed,
epoch, image): neither a resume nor the number of workers or ranks changes it.

Departures from LightningDiT's code: the paper's time direction; the gradient is clipped; labels are dropped, and noise
is drawn, where the data is read, so that the loop is plain.

Legend: B batch, d latent channels, h w latent sides, K classes (class K: none).
"""
import argparse
import copy
import hashlib
import operator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import losses
from model import DITS, LightningDiT, UserError, checkpoint_activations, load_strictly, print_0, reading
from sample import Rows, choose_labels, generate, grid_rows, load_tokenizer, time_grid
from train_tokenizer import (
    Meter,
    Order,
    Parser,
    Run,
    View,
    autocast_dtype,
    batches,
    center_crop,
    check_weights,
    load_optimiser,
    no_sync,
    open_data,
    rng,
    rng_states,
    run,
    same_on_all_ranks,
    save_grid,
    setup_ranks,
    to_pixels,
    to_tensor,
    update_ema,
    wrap,
)

# The defaults of the flags of the same name. size: image side in px.
PRESETS = {
    "tiny": {"model": "tiny", "data": "shapes", "size": 64, "steps": 1200, "batch_size": 64, "lr": 2e-3,
             "ema_decay": 0.995, "workers": 0, "log_every": 25, "save_every": 400, "grid_every": 400,
             "encode_batch": 64, "val_images": 512},
    "paper": {"model": "XL/1", "data": "data/imagenet/train", "size": 256, "steps": 80_000, "batch_size": 1024,
              "lr": 2e-4, "ema_decay": 0.9999, "workers": 8, "log_every": 100, "save_every": 5_000,
              "grid_every": 5_000, "encode_batch": 128, "val_images": 5_000},
}
BINS = 5  # of t, in the log
COLUMNS = ["step", "loss", "mse", "cosine", "grad_norm",
           *(f"mse_t{i / BINS:g}-{(i + 1) / BINS:g}" for i in range(BINS))]


# ---------------------------------------------------------------------------------------------------- latents, noise

@torch.no_grad()
def cached_latents(path, tokenizer, data, args, device):
    """The normalised latents of all images, a read-only memory map (n, 2, d, h, w) fp16: as it is, and flipped.

    Encoded once, by all ranks; a run that was stopped goes on from there. In fp32, so that a latent does not depend on
    the hardware's bf16. The file belongs to one tokenizer (its fingerprint) and one data set (its file names, and the
    pixels of a few images): any other is refused."""
    n, side = len(data), args.size // tokenizer.factor
    few = View(data, args.size)
    pixels = hashlib.sha256()
    for i in np.linspace(0, n - 1, min(n, 8)).astype(int):
        item = few[0, int(i)]
        pixels.update(item.encode() if isinstance(item, str) else item[0].numpy().tobytes())
    about = {"tokenizer": tokenizer.fingerprint(), "data": data.identity, "pixels": pixels.hexdigest()[:16],
             "size": args.size}
    rows = Rows(path, n, (2, tokenizer.d, side, side), np.float16, about, args.overwrite)
    if not rows.complete:
        print_0(f"encoding {len(rows.missing)} of {n} images, original and flipped, into {path} "
                f"({n * 4 * tokenizer.d * side ** 2 / 2 ** 30:.2f} GiB)")
        mine = rows.mine(args.encode_batch)
        order = [[(0, int(i)) for i in indices] for indices in mine]
        stream = batches(few, order, args.workers, device)
        for indices, (x, _) in zip(mine, tqdm(stream, "encoding", len(mine), disable=rows.rank != 0, mininterval=1)):
            z = tokenizer.normalize(tokenizer.encode(torch.stack([x, x.flip(3)], 1).flatten(0, 1)))  # (2B, d, h, w)
            if not z.half().isfinite().all():
                raise UserError(f"a latent of images {indices[0]} to {indices[-1]} is not finite in fp16")
            rows.write(indices, z.unflatten(0, (-1, 2)).half().cpu().numpy())
        rows.finish()
    # No checksum: reading ImageNet's 39 GiB first would cost minutes; a flipped bit is one latent with a wrong value
    with reading(path, "cache of latents (delete it, and it is made anew)"):
        latents = np.load(path, mmap_mode="r")
        if (latents.shape, latents.dtype) != ((n, 2, tokenizer.d, side, side), np.float16):
            raise ValueError(f"it holds {latents.dtype} {latents.shape}")
        if Path(path).stat().st_size != latents.offset + latents.nbytes:
            raise ValueError("bytes follow its end")
    return latents


class FlowData(Dataset):
    """What a DataLoader reads: item (epoch, i) is (x, y, n, z1). x: the latent (d, h, w) of image i, or, without
    `latents`, its pixels; original or flipped. y: its class, or K where the label is dropped. n ~ N(0, 1) makes t.
    z1: noise (d, h, w)."""

    def __init__(self, data, latents, shape, num_classes, args):
        self.data, self.latents, self.shape, self.num_classes = data, latents, shape, num_classes
        self.size, self.seed, self.drop = args.size, args.seed, args.label_drop

    def __getitem__(self, item):
        epoch, i = item
        r = rng(self.seed, "flow", epoch, i)
        flip, dropped, n = r.random() < 0.5, r.random() < self.drop, torch.tensor(r.standard_normal()).float()
        z1 = torch.from_numpy(r.standard_normal(self.shape, np.float32))
        if self.latents is not None:
            x = torch.from_numpy(self.latents[i, int(flip)].astype(np.float32))
        else:
            try:
                x = to_tensor(to_pixels(center_crop(self.data.image(i), self.size)))
            except UserError as e:
                return str(e)
            x = x.flip(2) if flip else x
        y = self.num_classes if dropped or not self.num_classes else self.data.labels[i]
        return x, y, n, z1


# ------------------------------------------------------------------------------------------------------------ training

def training_step(batch, s, args, last):
    """One micro-batch, backward. Returns what is logged, as scalars on the device."""
    x, y, n, z1 = batch
    if s.encode:  # --no-cache
        with torch.no_grad():
            x = s.tokenizer.normalize(s.tokenizer.encode(x))
    z0, t = x, losses.logit_normal(n)
    with no_sync(s.network, not last):
        with s.autocast():
            loss, mse, cosine = losses.flow_matching(s.network, z0, z1, t, y, args.w_cos)
        (loss / args.accum).backward()
    log = {"loss": loss.detach(), "mse": mse.mean(), "cosine": cosine}
    for kind, values in zip(("sum", "number"), losses.by_time(mse, t, BINS)):
        log.update({f"{kind}{i}": value for i, value in enumerate(values)})
    return log


def averages(meter, norm):
    """A row of log.csv: the mean squared error in a bin of t is its sum over its number, over all ranks."""
    mean = meter.average()
    row = {k: mean[k] for k in ("loss", "mse", "cosine")}
    for i, column in enumerate(COLUMNS[-BINS:]):
        row[column] = mean[f"sum{i}"] / mean[f"number{i}"] if mean[f"number{i}"] else ""
    return dict(row, grad_norm=norm.item())


def sample_grid(ema, tokenizer, args, dtype, path):
    """Eight images of up to twelve classes, one a row, without guidance: it flatters less and shows progress sooner."""
    K = ema.num_classes
    classes = np.unique(np.linspace(0, K - 1, min(K, 12)).astype(int)) if K else None
    labels = choose_labels(",".join(map(str, classes)), K, 8 * len(classes), args.seed) if K else None
    n = len(labels) if K else 64
    images, _ = generate(ema, tokenizer, np.arange(n), labels, args.seed, time_grid(20), dtype=dtype)
    save_grid(grid_rows(images.cpu(), labels), path)


def train(args, run_, rank, world, device):
    data, _ = open_data(args.data, args.val, args.size, args.val_images)
    tokenizer = load_tokenizer(args.tokenizer).requires_grad_(False).to(device)
    if args.size % tokenizer.factor:
        raise UserError(f"--size must be divisible by {tokenizer.factor}, not {args.size}")
    K = len(data.classes) if data.labels and not args.unconditional else 0
    side = args.size // tokenizer.factor
    shape = (tokenizer.d, side, side)
    cache = args.cache or run_.out / "latents.npy"
    latents = None if args.no_cache else cached_latents(cache, tokenizer, data, args, device)

    torch.manual_seed(int(rng(args.seed, "init").integers(2 ** 62)))
    model = LightningDiT(**DITS[args.model], d=shape[0], num_classes=K, grid=shape[1:], qk_norm=args.qk_norm).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True)
    dtype = autocast_dtype(args.dtype, device)
    same = dict(tokenizer=tokenizer.fingerprint(), data=data.identity, classes=K, dtype=str(dtype)[len("torch."):],
                cached=latents is not None, **{k: getattr(args, k) for k in (
                    "model", "qk_norm", "size", "batch_size", "accum", "lr", "beta2", "clip", "w_cos", "label_drop",
                    "ema_decay", "seed")})
    meter, step, prefix = Meter(device), 0, "dit"

    saved = run_.resume(prefix, same)
    if saved:
        path = run_.last_good(prefix)
        with reading(path, "checkpoint"):
            load_strictly(model, saved["model"], path)
            load_strictly(ema, saved["ema"], path)
            load_optimiser(opt, saved["opt"])
            meter.load(saved["meter"])
            step = operator.index(saved["step"])
            torch.set_rng_state(saved["rng"][rank % len(saved["rng"])])
        if step > args.steps:
            raise UserError(f"{run_.last_good(prefix)} is already at step {step}; --steps {args.steps} is behind it")
    same_on_all_ranks(step, args.out)
    # After the last logged step: the meter still holds what came later. But the last step of all has its row.
    run_.rewind_log(step if step == args.steps else step // args.log_every * args.log_every)

    if args.checkpointing:
        checkpoint_activations(model)
    if args.compile:  # block by block and in place: keys stay
        for block in model.blocks:
            block.compile()
    s = argparse.Namespace(
        tokenizer=tokenizer, network=wrap(model, device), encode=latents is None,
        autocast=lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
    order = Order(len(data), args.batch_size, (args.seed, "order"), step, args.accum, rank, world)
    stream = batches(FlowData(data, latents, shape, K, args), order, args.workers, device)
    print_0(f"LightningDiT {args.model}: {sum(p.numel() for p in trained) / 1e6:.2f}M parameters train; latents "
            f"{'x'.join(map(str, shape))}, {f'{K} classes' if K else 'unconditional'}\n  {len(data)} images, batch "
            f"{args.batch_size} = {world} ranks x {args.accum} micro-batches x {args.batch_size // world // args.accum}"
            f", {len(data) / args.batch_size:.1f} steps an epoch, {args.steps} steps = "
            f"{args.steps * args.batch_size / len(data):.1f} epochs{f', resuming at step {step}' if step else ''}\n"
            f"  {device.type}, {str(dtype).removeprefix('torch.')}, latents {'encoded anew' if s.encode else 'cached'}")

    bar = tqdm(total=args.steps, initial=step, desc="generator", disable=rank != 0, mininterval=1)
    run_.defer_signals(True)
    while step < args.steps:
        for micro in range(args.accum):
            meter.add(step + 1, training_step(next(stream), s, args, last=micro == args.accum - 1))
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        update_ema(ema, model, args.ema_decay)
        step += 1
        bar.update()

        if step % args.log_every == 0 or step == args.steps:
            meter.check(run_, prefix)
            row = dict(step=step, **averages(meter, norm))
            run_.log(row)
            if step % args.log_every == 0:
                meter.reset()
            bar.set_postfix(mse=f"{row['mse']:.3f}", cosine=f"{row['cosine']:.3f}")
        if rank == 0 and (step % args.grid_every == 0 or step == args.steps):
            sample_grid(ema, tokenizer, args, dtype, run_.out / f"{prefix}_step{step:08d}.png")
        stop = run_.should_stop()
        if step % args.save_every == 0 or step == args.steps or stop:
            meter.check(run_, prefix)
            check_weights(model, run_, prefix)
            run_.save(prefix, step, {
                "step": step, "run": same, "arguments": model.arguments, "model": model.state_dict(),
                "ema": ema.state_dict(), "opt": opt.state_dict(), "meter": meter.state(), "rng": rng_states()})
        if stop and step < args.steps:
            bar.close()
            raise UserError(f"stopped by a signal at step {step}; saved {run_.last_good(prefix)}; repeat the command "
                            "to go on")
    bar.close()
    run_.defer_signals(False)
    print_0(f"complete: {run_.last_good(prefix)}")


# -------------------------------------------------------------------------------------------------------------- CLI

def parse(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--preset", choices=PRESETS, default="paper", help="default: %(default)s")
    add("--tokenizer", default="runs/tokenizer/stage3.pt", help="default: %(default)s; stage 2's has the same latents")
    add("--data", help="folder of images, one folder per class (flat: unconditional); 'shapes' for the built-in data")
    add("--val", help="folder of held-out images, which do not train (as in train_tokenizer.py)")
    add("--val-images", type=int, help="how many are held out at most, where there is no other folder for them")
    add("--out", default="runs/dit", help="the run's folder (default: %(default)s)")
    add("--model", choices=DITS, help="size")
    add("--qk-norm", action="store_true", help="RMSNorm on queries and keys: for long trainings")
    add("--unconditional", action="store_true", help="ignore the classes")
    add("--steps", type=int)
    add("--batch-size", type=int, help="global: over all ranks and micro-batches")
    add("--accum", type=int, default=1, help="micro-batches per step")
    add("--lr", type=float, help="of AdamW, constant")
    add("--beta2", type=float, default=0.95, help="of AdamW (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; inf: none (default: %(default)s)")
    add("--w-cos", type=float, default=1.0, help="weight of the velocity-direction loss (default: %(default)s)")
    add("--label-drop", type=float, default=0.1, help="part of the labels dropped, for guidance (default: %(default)s)")
    add("--ema-decay", type=float)
    add("--seed", type=int, default=0)
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of autocast; auto: bf16 where it is native")
    add("--size", type=int, help="image side in px")
    add("--cache", help="file of the latents (default: latents.npy in --out); runs may share it")
    add("--no-cache", action="store_true", help="encode every batch anew: no disk, more time")
    add("--encode-batch", type=int, help="images at once while the cache is made")
    add("--workers", type=int, help="loader processes per rank")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    add("--log-every", type=int, help="steps")
    add("--save-every", type=int, help="steps")
    add("--grid-every", type=int, help="steps")
    add("--overwrite", action="store_true", help="start again, whatever is in --out; a cache that fits stays")
    args = p.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "batch_size", "accum", "size", "encode_batch", "log_every", "save_every", "grid_every",
                 "val_images"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if min(args.lr, args.clip) <= 0 or min(args.w_cos, args.workers, args.seed) < 0 or \
            not 0 <= args.ema_decay < 1 or not 0 <= args.beta2 < 1 or not 0 <= args.label_drop < 1:
        raise UserError("--lr and --clip must be positive, --w-cos, --workers and --seed not negative, --ema-decay, "
                        "--beta2 and --label-drop in [0, 1)")
    return args


def main(argv=None):
    args = parse(argv)
    rank, world, device = setup_ranks()
    if args.batch_size % (world * args.accum):
        raise UserError(f"--batch-size {args.batch_size} does not split into {world} ranks x {args.accum} "
                        "micro-batches")
    with Run(args.out, rank, COLUMNS) as run_:
        if args.overwrite and rank == 0:
            for path in [*run_.out.glob("dit_step*"), run_.out / "log.csv"]:
                path.unlink(missing_ok=True)
        train(args, run_, rank, world, device)


if __name__ == "__main__":
    run(main)
