"""Aligns a frozen DINOv2 into an image tokenizer, in the three stages of AlignTok (Section 3, Figure 2).

    stage 1  latent alignment       E_p frozen; A and D train with L_rec              -> a semantic latent space
    stage 2  perceptual alignment   E_p, A, D train with L_rec + w_sp L_sp, EMA       -> details, without forgetting
    stage 3  decoder refinement     D alone trains with L_rec; the latents stay       -> sharper reconstructions

On a CPU, nothing to download, a few minutes:   python train_tokenizer.py --preset tiny --stage all
One GPU:                 python train_tokenizer.py --stage all --data data/imagenet/train --accum 8
Eight GPUs, stage 2:     torchrun --nproc_per_node 8 train_tokenizer.py --stage 2

A run is a folder, runs/tokenizer: stage{1,2,3}.pt (each a whole tokenizer: Tokenizer.load reads it), the last two
stage*_step*.pt of each stage (they resume), log.csv, and PNG grids (originals above, reconstructions below).
Repeating a command resumes it. All randomness is a function of (seed, purpose, stage, epoch, image): neither a resume
nor the number of workers or ranks changes what a step sees.

The paper's baselines are one stage each: --model vae (KL) and --model vavae (KL, and the VF loss of Yao, Yang & Wang
2025 toward the frozen encoder); their result is vae.pt or vavae.pt.

Choices where the paper is silent (README, "Choices"): steps, batch, learning rate and discriminator are VA-VAE's in
spirit; EMA serves stages 2 and 3; D's warm-up is counted through the stages; D is updated on the batch G just made.

Legend: B batch, H W image sides, N tokens, D width, d latent channels, h w latent sides.
"""
import argparse
import contextlib
import copy
import csv
import fcntl
import hashlib
import multiprocessing
import operator
import os
import signal
import struct
import sys
import time
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import losses
from model import (
    DECODERS,
    ENCODERS,
    VAE,
    DINOv2,
    Tokenizer,
    UserError,
    build,
    checkpoint_activations,
    find_weights,
    load_encoder,
    load_file,
    load_strictly,
    print_0,
    reading,
)

# What trains, whether the frozen stage-1 copy is the reference of L_sp, whether the result is the EMA of the weights.
STAGES = {
    1: {"name": "latent alignment", "trains": ("adapter", "decoder"), "reference": False, "ema": False},
    2: {"name": "perceptual alignment", "trains": ("encoder", "adapter", "decoder"), "reference": True, "ema": True},
    3: {"name": "decoder refinement", "trains": ("decoder",), "reference": False, "ema": True},
    0: {"name": "a baseline, from scratch", "ema": True, "reference": False,
        "trains": ("encoder", "quant_conv", "post_quant_conv", "decoder", "linear_proj")},  # --model vae, vavae
}

# The defaults of the flags of the same name. size: image side in px; disc_ch: width of the discriminator.
PRESETS = {
    "tiny": {"size": 64, "encoder": "tiny14", "decoder": "tiny", "disc_ch": 16, "data": "shapes",
             "steps": (250, 300, 150), "batch_size": 32, "lr": 1e-3, "w_p": 0.0, "disc_start": 250, "ema_decay": 0.98,
             "workers": 0, "log_every": 25, "save_every": 100, "grid_every": 100, "val_images": 512,
             "probe_images": 4096, "pretrain_steps": 500},
    "paper": {"size": 256, "encoder": "vitl14", "decoder": "vavae", "disc_ch": 64, "data": "data/imagenet/train",
              "steps": (100_000, 200_000, 100_000), "batch_size": 256, "lr": 1e-4, "w_p": 1.0, "disc_start": 2_500,
              "ema_decay": 0.9999, "workers": 8, "log_every": 50, "save_every": 2_500, "grid_every": 2_500,
              "val_images": 5_000, "probe_images": 50_000, "pretrain_steps": 0},
}


# ------------------------------------------------------------------------------------------------- randomness, images

def rng(*key):
    """A generator that is a function of its hashed key alone, such as (seed, "augment", stage, epoch, image)."""
    return np.random.default_rng([k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key])


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # by content, whatever the name; no PostScript
MAX_ASPECT = 100  # 1 x 5000 px would become 256 x 1,280,000


def check_png(path):
    """Every chunk's CRC up to the end, IEND. PIL leaves out those of the pixels, and stops when it has all pixels."""
    with open(path, "rb") as f:
        f.seek(8)
        kind = b""
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", f.read(8))
            if zlib.crc32(f.read(length), zlib.crc32(kind)) != int.from_bytes(f.read(4)):
                raise OSError("truncated, or a chunk's CRC differs")


@contextlib.contextmanager
def open_image(path):
    """An image file as PIL opens it, before its pixels are read. Raises UserError, naming the file, where it is (or,
    inside the `with`, proves to be) damaged, has more than 89 megapixels (PIL's limit, of which PIL itself only warns),
    or is more than 100 times as long as wide."""
    with reading(path, "image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # before the pixels take memory
        with Image.open(path, formats=IMAGE_FORMATS) as img:
            if max(img.size) > MAX_ASPECT * min(img.size):
                raise ValueError(f"{img.width}x{img.height}, more than {MAX_ASPECT} times as long as wide")
            if img.format == "PNG":
                check_png(path)
            elif img.format == "JPEG" and b"\xff\xd9" not in img.fp.read():  # PIL has read up to the scan
                raise OSError("truncated: it has no end")  # of which libjpeg alone does not always complain
            yield img


def load_image(path):
    """Any image file -> PIL RGB: EXIF orientation applied, transparency on white, 16-bit grey scaled to 8; the first
    frame of several. Errors: see open_image."""
    with open_image(path) as img:
        return to_rgb(img)


def load_pixels(path):
    """The same -> uint8 (3, H, W). Most JPEG files go past PIL: torchvision's libjpeg gives the same values in half of
    the time."""
    with open_image(path) as img:
        if img.format != "JPEG" or img.mode not in ("RGB", "L") or {"exif", "xmp"} & img.info.keys():
            return to_pixels(to_rgb(img))
        img.fp.seek(0)
        data = torch.frombuffer(bytearray(img.fp.read()), dtype=torch.uint8)
        return torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)


def to_rgb(img):
    """An image that PIL has opened -> PIL RGB."""
    img.load()
    with contextlib.suppress(Exception):  # rubbish in place of EXIF tells no orientation
        ImageOps.exif_transpose(img, in_place=True)
    if img.mode.startswith("I") or img.mode == "F":  # 16 bits in all files that are seen in practice
        img = Image.fromarray((np.asarray(img, np.float32) / 257).clip(0, 255).astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img if img.mode == "RGB" else img.convert("RGB")


def halve(img, size):
    """ADM's first step: halve with a box filter while at least twice too large."""
    while min(img.size) >= 2 * size:
        img = img.resize((img.width // 2, img.height // 2), Image.BOX)
    return img


def center_crop(img, size):
    """ADM's centre crop, for evaluation and for latents: halved, bicubic to short side `size`, cropped. PIL RGB -> PIL
    RGB of size x size."""
    img = halve(img, size)
    scale = size / min(img.size)
    img = img.resize((round(img.width * scale), round(img.height * scale)), Image.BICUBIC)
    left, top = (img.width - size) // 2, (img.height - size) // 2
    return img.crop((left, top, left + size, top + size))


def random_crop(pixels, size, r):
    """For tokenizer training: a random square of the short side, resized to `size`, and flipped half of the time. uint8
    (3, H, W) -> uint8 (3, size, size).

    Cropped first, so that nothing is resized in vain; by torch's bicubic filter, several times as fast as PIL's."""
    H, W = pixels.shape[1:]
    side = min(H, W)
    left, top = r.integers(W - side + 1), r.integers(H - side + 1)
    square = pixels[None, :, top:top + side, left:left + side]
    pixels = F.interpolate(square, (size, size), mode="bicubic", antialias=True)[0]
    return pixels.flip(2) if r.random() < 0.5 else pixels


def to_pixels(img):
    """PIL RGB -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(img)).permute(2, 0, 1)


def to_tensor(pixels):
    """uint8 (..., 3, H, W) -> float in [-1, 1], contiguous."""
    return pixels.contiguous().float().div_(127.5).sub_(1)


def to_uint8(images):
    """Float (B, 3, H, W) in [-1, 1] -> uint8 numpy (B, H, W, 3), rounded and clipped, as it would be saved."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(rows, path):
    """Writes a PNG: each of `rows` is (n, 3, H, W) in [-1, 1], one row of the picture."""
    rows = [np.concatenate(list(to_uint8(row)), axis=1) for row in rows]
    write_atomically(path, lambda f: Image.fromarray(np.concatenate(rows)).save(f, "PNG"))


# ----------------------------------------------------------------------------------------------------------- data

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def list_images(root):
    """All image files below a folder, sorted by name."""
    if not Path(root).is_dir():
        raise UserError(f"data folder not found: {root} (--data DIR: images in one folder per class, or flat)")

    def refuse(error):  # os.walk would leave such a folder out
        raise UserError(f"cannot list the data folder {error.filename}: {error.strerror}")

    files = []
    for d, _, names in os.walk(root, followlinks=True, onerror=refuse):
        if os.path.islink(d) and Path(d).parent.resolve().is_relative_to(Path(d).resolve()):
            raise UserError(f"{d} is a link to a folder that it lies in")
        files += [os.path.join(d, f) for f in names
                  if os.path.splitext(f)[1].lower() in IMAGE_TYPES and not f.startswith(".")]
    files.sort()
    if not files:
        raise UserError(f"no images in {root} (looked for {' '.join(sorted(IMAGE_TYPES))})")
    return files


class Folder:
    """Image files. With one folder per class: labels and classes, in sorted order; flat: labels None."""

    def __init__(self, root, files=None):
        self.root, self.files = str(root), files or list_images(root)
        parts = [os.path.relpath(f, root).split(os.sep) for f in self.files]
        self.classes = sorted({p[0] for p in parts}) if all(len(p) > 1 for p in parts) else []
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = [index[p[0]] for p in parts] if self.classes else None
        names = "\n".join("/".join(p) for p in parts)
        self.identity = hashlib.sha256(os.fsencode(names)).hexdigest()[:16]  # a name need not be UTF-8

    def __len__(self):
        return len(self.files)

    def image(self, i):
        return load_image(self.files[i])

    def pixels(self, i):
        return load_pixels(self.files[i])


def _ngon(n, inner=None):
    """A regular polygon, or with `inner` a star; the unit circle around it."""
    angles = np.arange(n * (2 if inner else 1)) * 2 * np.pi / (n * (2 if inner else 1))
    radii = np.where(np.arange(len(angles)) % 2, inner, 1.0) if inner else 1.0
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


_turn = np.linspace(0, 2 * np.pi, 48)
_circle = _ngon(48)


# The semantics of the built-in data: a polygon each; a second polygon, where there is one, is cut out.
SHAPES = {
    "circle": [_circle], "ring": [_circle, 0.6 * _circle], "crescent": [_circle, 0.85 * _circle + [0.45, 0]],
    "triangle": [_ngon(3)], "square": [_ngon(4)], "pentagon": [_ngon(5)], "star": [_ngon(5, 0.42)],
    "frame": [_ngon(4), 0.6 * _ngon(4)],
    "cross": [np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3),
                        (-1, .3), (-1, -.3), (-.3, -.3)])],
    "heart": [np.stack([np.sin(_turn) ** 3, -(13 * np.cos(_turn) - 5 * np.cos(2 * _turn) - 2 * np.cos(3 * _turn)
                                              - np.cos(4 * _turn)) / 16], axis=1)],
    "arrow": [np.array([(0, -1), (.8, -.1), (.3, -.1), (.3, 1), (-.3, 1), (-.3, -.1), (-.8, -.1)])],
    "ell": [np.array([(-.8, -1), (-.2, -1), (-.2, .4), (.8, .4), (.8, 1), (-.8, 1)])],
}


class Shapes:
    """The built-in data: one filled shape on a background, drawn on the fly, image i a function of (split, i).

    Semantics: the shape (12 classes, closed under flips). Nuisance: colours and textures of shape and ground, size,
    place, rotation by up to 17 degrees."""

    def __init__(self, split="train", n=8192, size=64):
        self.split, self.n, self.size = split, n, size
        self.classes = list(SHAPES)
        self.labels = [i % len(self.classes) for i in range(n)]
        self.identity = f"shapes-{split}-{n}-{size}"
        self._drawn = {}  # 12 KB an image at 64 px: an image is drawn once in a process

    def __len__(self):
        return self.n

    def image(self, i):
        if i not in self._drawn:
            self._drawn[i] = self._draw(i)
        return Image.fromarray(self._drawn[i])

    def pixels(self, i):
        return to_pixels(self.image(i))

    def _draw(self, i):
        r, S = rng("shapes", self.split, i), self.size
        colours = r.random((2, 2, 3))  # (ground or shape, its two colours, RGB)
        while colours[1, 0].mean() - colours[0, 0].mean() < 0.35:  # any hue, but the shape is the lighter of the two
            colours = r.random((2, 2, 3))
        colours[:, 1] = 0.75 * colours[:, 0] + 0.25 * colours[:, 1]  # the two of a texture are close to each other
        ground, shape = (self._texture(r, a, b) for a, b in colours)
        radius, angle = S * r.uniform(0.32, 0.45), r.uniform(-0.3, 0.3)
        place = S / 2 + 0.6 * r.uniform(radius - S / 2, S / 2 - radius, 2)
        turn = radius * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        canvas = Image.new("L", (4 * S, 4 * S))  # four times too large, then averaged: smooth edges
        for part, fill in zip(SHAPES[self.classes[self.labels[i]]], (255, 0)):
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in 4 * (part @ turn + place)], fill=fill)
        mask = np.asarray(canvas.reduce(4), np.float32)[..., None] / 255
        return ((mask * shape + (1 - mask) * ground) * 255).round().clip(0, 255).astype(np.uint8)

    def _texture(self, r, a, b):
        """(S, S, 3) in [0, 1] between colours a and b: flat, gradient, stripes, checks or clouds."""
        y, x = np.mgrid[:self.size, :self.size] / self.size
        angle, waves = r.uniform(0, np.pi), r.uniform(3, 7)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        kind = r.integers(5)
        if kind == 4:
            t = np.asarray(Image.fromarray(r.random((6, 6)).astype(np.float32)).resize((self.size,) * 2, Image.BICUBIC))
        else:
            t = (np.zeros_like(x), (along + 1) / 2, np.sin(2 * np.pi * waves * along) > 0,
                 (np.sin(2 * np.pi * waves * along) > 0) ^ (np.sin(2 * np.pi * waves * across) > 0))[kind]
        return a + (b - a) * np.asarray(t, np.float32)[..., None]


def open_data(data, val, size, val_images):
    """(train, validation). Held out are, in this order: --val DIR; the folder `val` beside a folder `train`; else a
    fixed random 5 % of the files (at most val_images), which then do not train."""
    if data == "shapes":
        if val is not None:
            raise UserError("--val goes with --data DIR: the built-in shapes have their own held-out images")
        return Shapes("train", size=size), Shapes("val", n=val_images, size=size)
    root = Path(data)
    if val is None and root.name == "train" and (root.parent / "val").is_dir():
        val = root.parent / "val"
    if val is not None:
        train, held_out = Folder(root), Folder(val)
        if held_out.classes and held_out.classes != train.classes:
            raise UserError(f"{val} and {root} hold different classes")
        return train, held_out
    files = list_images(root)
    if len(files) < 2:
        raise UserError(f"{root} holds one image; at least two are needed, one of them to validate on")
    order = rng("held out").permutation(len(files))
    n = min(val_images, max(1, len(files) // 20))
    train, held_out = (Folder(root, [files[i] for i in sorted(part)]) for part in (order[n:], order[:n]))
    if train.classes != held_out.classes:  # too few images for every class to be in both: no probe
        held_out.labels = None
    return train, held_out


class View(Dataset):
    """What a DataLoader reads: item (epoch, i) is image i as uint8 (3, size, size), which `batches` makes float;
    cropped for training with the key's randomness, or with no key centre-cropped; its label; and, if `noise` is its
    shape, the standard normal noise that a VAE samples with. An unreadable image is returned as the text of its error:
    a worker has no better way."""

    def __init__(self, data, size, key=None, noise=None):
        self.data, self.size, self.key, self.noise = data, size, key, noise

    def __getitem__(self, item):
        epoch, i = item
        try:
            if self.key is None:
                pixels = to_pixels(center_crop(self.data.image(i), self.size))
            else:
                pixels = random_crop(self.data.pixels(i), self.size, rng(*self.key, epoch, i))
        except UserError as e:
            return str(e)
        item = pixels, self.data.labels[i] if self.data.labels else 0
        if self.noise:
            item += (torch.from_numpy(rng(*self.key, "noise", epoch, i).standard_normal(self.noise, np.float32)),)
        return item


class Order:
    """The endless order of images, as batches for one rank: position k is image k mod n of the shuffle of its epoch.

    A global batch is `accum` micro-batches in a row, each split over the ranks in a row."""

    def __init__(self, n, batch_size, key, first_step=0, accum=1, rank=0, world=1):
        self.n, self.key, self.start = n, key, first_step * batch_size
        self.micro, self.rank, self.world = batch_size // accum, rank, world
        self.shuffles = {}

    def __getitem__(self, k):
        epoch, within = divmod(k, self.n)
        if epoch not in self.shuffles:
            self.shuffles = {e: s for e, s in self.shuffles.items() if e == epoch - 1}
            self.shuffles[epoch] = rng(*self.key, epoch).permutation(self.n)
        return epoch, int(self.shuffles[epoch][within])

    def __iter__(self):
        local, first = self.micro // self.world, self.start
        while True:
            yield [self[first + self.rank * local + j] for j in range(local)]
            first += self.micro


def collate(items):
    broken = [item for item in items if isinstance(item, str)]
    if broken:
        return broken[0]
    return default_collate(items)


def keep_loading(_):
    """In a loader's worker. A signal to the whole process group (a scheduler's, torchrun's, Ctrl-C's) is for the main
    process to obey, which needs its workers up to the step boundary; they end with it."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def batches(view, order, workers, device):
    """Yields the batches of a view, such as (images, labels), on the device; an unreadable image ends the run, by name,
    before its step."""
    loader = DataLoader(view, batch_sampler=order, num_workers=workers, collate_fn=collate, worker_init_fn=keep_loading,
                        pin_memory=device.type == "cuda", generator=torch.Generator())  # not torch's global one
    for batch in loader:
        if isinstance(batch, str):
            raise UserError(batch)
        batch = [part.to(device, non_blocking=True) for part in batch]
        if isinstance(view, View):  # a quarter of the bytes until here
            batch[0] = to_tensor(batch[0])
        yield batch


def in_order(n, batch_size):
    """Batches of the images 0..n-1, once, for evaluation."""
    return [[(0, i) for i in range(first, min(first + batch_size, n))] for first in range(0, n, batch_size)]


def at_random(n, batch_size, total):
    """Batches of a fixed random choice of n (or all) of `total` images, in order, for evaluation."""
    chosen = sorted(rng("encode").permutation(total)[:n].tolist())
    return [[(0, chosen[i]) for _, i in batch] for batch in in_order(len(chosen), batch_size)]


# ------------------------------------------------------------------------------------------------ ranks, runs, files

def setup_ranks():
    """(rank, world size, device). Under torchrun it joins the process group: NCCL on GPUs, gloo on CPUs."""
    cuda = torch.cuda.is_available()
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        raise UserError(f"more ranks on this node than its {torch.cuda.device_count()} GPUs (--nproc_per_node)")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return dist.get_rank(), dist.get_world_size(), device


def wrap(module, device):
    """DistributedDataParallel under torchrun, else the module itself. Buffers agree by construction."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None,
                                   broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync(module, skip):
    """Gradients are averaged over the ranks at the last micro-batch only."""
    return module.no_sync() if skip and isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 goes through the block (and downloads, or trains and saves) before the others, which find it done."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def autocast_dtype(name, device):
    """--dtype: auto is bf16 where the hardware has it (Ampere GPUs, CPUs with AVX512-BF16), else fp32."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
            getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
        name = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def write_atomically(path, write):
    """Calls write(file) on a temporary file and then renames it: `path` is the old file or the new, never a half."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        while not isinstance(e, OSError) and e.__context__:  # torch.save hides a full disk behind a RuntimeError
            e = e.__context__
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}") from None
    finally:  # gone already where all went well
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def save_checkpoint(path, content):
    """Plain dicts of tensors, numbers and strings, atomically."""
    write_atomically(path, lambda f: torch.save(content, f))


def lock(path, message):
    """Opens and locks a file, until it is closed or forgotten, or the process ends, in whatever way. Raises
    UserError(message) where another holds it."""
    file = open(path, "a")  # noqa: SIM115, the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(file.fileno()).st_nlink:  # the other has just finished, and deleted it
            raise BlockingIOError
    except BlockingIOError:
        raise UserError(message) from None
    return file


class Run:
    """A folder with its log.csv and its checkpoints PREFIX_step*.pt, of which the last two are kept. Rank 0 writes.

    To be used in a `with`: the folder is locked meanwhile. SIGTERM and Ctrl-C end the run at once where that loses
    nothing (set-up, cache, validation); in the loop, between defer_signals(True) and (False), they set `stopping`,
    which the loop obeys at the next step boundary."""

    def __init__(self, out, rank, columns):
        self.out, self.rank, self.columns = Path(out), rank, columns
        self.stopping, self.deferring, self.lock, self.good = False, False, None, {}
        if rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                self.lock = lock(self.out / ".lock", f"another run is writing to {out}; choose another --out or wait "
                                                     "for it")
                for part in self.out.glob(".*_step*.part"):  # of a run that was killed; other names are written over
                    part.unlink()
            except OSError as e:
                raise UserError(f"cannot write to --out {out}: {e.strerror}") from None

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if self.lock is not None:
            self.lock.close()

    def _stop(self, number, _):
        if not self.deferring or self.stopping and number == signal.SIGINT:  # a second Ctrl-C does not wait either
            sys.exit("error: stopped by a signal; repeat the command to go on")
        self.stopping = True

    def defer_signals(self, yes):
        self.deferring = yes
        if self.stopping and not yes:
            self._stop(None, None)

    def should_stop(self):
        """Whether any rank was asked to stop; a flag on the CPU, so that no GPU waits."""
        if not dist.is_initialized():
            return self.stopping
        flag = torch.tensor(float(self.stopping))
        dist.all_reduce(flag)
        return flag.item() > 0

    def checkpoints(self, prefix):
        return sorted(self.out.glob(f"{prefix}_step*.pt"))

    def save(self, prefix, step, content):
        path = self.out / f"{prefix}_step{step:08d}.pt"
        if self.rank == 0:
            save_checkpoint(path, content)
            for old in self.checkpoints(prefix)[:-2]:
                old.unlink()
        if dist.is_initialized():
            dist.barrier()  # torchrun kills them all when one has left: nobody leaves before it is written
        self.good[prefix] = path

    def resume(self, prefix, now):
        """The content of the newest good checkpoint, or None. `now`: the arguments that must be the same as then."""
        for path in reversed(self.checkpoints(prefix)):
            try:
                content = load_file(path)
                if not isinstance(content.get("run"), dict):
                    raise UserError(f"{path} is no checkpoint to resume from")
            except UserError as e:
                print(f"WARNING: {e}; trying the checkpoint before it", file=sys.stderr)
                continue
            check_same(content["run"], now, path)
            self.good[prefix] = path
            return content
        if self.checkpoints(prefix):
            raise UserError(f"no checkpoint {prefix}_step*.pt in {self.out} can be read; --overwrite starts again")
        return None

    def forget(self, prefix):
        """Deletes a stage's checkpoints and pictures, for --overwrite."""
        if self.rank == 0:
            for path in [*self.out.glob(f"{prefix}.pt"), *self.out.glob(f"{prefix}_step*")]:
                path.unlink()
        if dist.is_initialized():
            dist.barrier()  # nobody resumes from what is being deleted

    def last_good(self, prefix):
        return self.good.get(prefix, "none")

    def log(self, row):
        if self.rank == 0:
            try:
                with open(self.out / "log.csv", "a", newline="") as f:
                    csv.DictWriter(f, self.columns, lineterminator="\n").writerow(
                        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            except OSError as e:
                raise UserError(f"cannot write {self.out / 'log.csv'}: {e.strerror}") from None

    def rewind_log(self, *position):
        """Keeps the header, or writes it, and the rows up to a position, the values of the first columns, such as
        (stage, step)."""
        log, header = self.out / "log.csv", ",".join(self.columns)
        if self.rank == 0:
            head, *rows = log.exists() and log.read_text().splitlines(keepends=True) or [f"{header}\n"]
            if head.strip() != header:
                raise UserError(f"{log} has other columns than this run writes; move it away or choose another --out")
            rows = [r for r in rows if r.endswith("\n") and tuple(map(int, r.split(",")[:len(position)])) <= position]
            write_atomically(log, lambda f: f.write("".join([head, *rows]).encode()))


def check_same(then, now, path, advice="repeat them, choose another --out, or --overwrite"):
    """Refuses to go on from `path` with other arguments, naming them."""
    changed = [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]
    if changed:
        raise UserError(f"{path} was made with other arguments ({', '.join(changed)}); {advice}")


class Meter:
    """Sums of the losses on the device between two log steps, and the first step whose loss was not finite.

    Nothing here waits for the device until `average` or `check` is called."""

    def __init__(self, device):
        self.reset()
        self.bad = torch.full((), 2 ** 62, device=device)

    def reset(self):
        self.sums, self.counts = {}, {}

    def add(self, step, parts):
        total = sum(parts.values())
        self.bad = torch.where(torch.isfinite(total), self.bad, self.bad.clamp(max=step))
        for k, v in parts.items():
            self.sums[k] = self.sums.get(k, 0) + v.double()
            self.counts[k] = self.counts.get(k, 0) + 1

    def check(self, run, prefix):
        """Stops all ranks together if any loss has been NaN or infinite since the start."""
        if dist.is_initialized():
            dist.all_reduce(self.bad, dist.ReduceOp.MIN)
        if self.bad < 2 ** 62:
            raise UserError(f"the loss is not finite since step {int(self.bad)}; nothing of it was saved; last good "
                            f"checkpoint: {run.last_good(prefix)} (try a lower --lr, or --dtype fp32)")

    def state(self):
        """Sums averaged over the ranks, as numbers."""
        values = losses.average_over_ranks(torch.stack(list(self.sums.values()))).tolist() if self.sums else []
        return {"sums": dict(zip(self.sums, values)), "counts": dict(self.counts)}

    def load(self, state):
        self.sums = {k: torch.tensor(v, dtype=torch.float64, device=self.bad.device) for k, v in state["sums"].items()}
        self.counts = dict(state["counts"])

    def average(self):
        state = self.state()
        return {k: v / self.counts[k] for k, v in state["sums"].items()}


def rng_states():
    """The state of torch's generator on every rank."""
    mine = torch.get_rng_state()
    if not dist.is_initialized():
        return [mine]
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return every


def load_optimiser(opt, state):
    """opt.load_state_dict(state) for Adam, whose fused step would write beyond moments of another shape or layout."""
    opt.load_state_dict(state)
    for p, moments in opt.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != p.shape or not moments[name].sum().isfinite():
                raise ValueError("the optimiser's moments do not fit, or are not finite")
            moments[name] = torch.empty_like(p, requires_grad=False).copy_(moments[name])
        if moments["step"].shape != ():
            raise ValueError("the optimiser's count of steps is not one number")


def same_on_all_ranks(step, out):
    """Every rank must resume from the same step: nodes that see different folders would train different things."""
    if dist.is_initialized():
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise UserError(f"the ranks resume from different steps {steps}: --out {out} must be a folder that all see")


@torch.no_grad()  # else every EMA parameter would carry the graph of all updates since the start
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, for the parameters that train; frozen ones are equal already."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)


def check_weights(module, run, prefix):
    """Before a checkpoint: finite (a bad gradient shows here before it shows in a loss), and the same on all ranks."""
    total = torch.stack([p.double().sum() for p in module.parameters()]).sum()
    low, high = total.clone(), total.clone()
    if dist.is_initialized():
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    if not total.isfinite() or low != high:
        what = "not finite" if not total.isfinite() else "not the same on all ranks"
        raise UserError(f"weights are {what}; nothing of it was saved; last good checkpoint: {run.last_good(prefix)}")


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring in --help; a bad flag is one line, like every mistake."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def end_workers():
    """Ends the loader's workers. They ignore SIGTERM (keep_loading), by which Python's exit handler would ask them to
    end; it would then wait for them for ever."""
    if workers := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):  # torch's handler would raise, in place of what went wrong
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()


def run(main):
    """Runs a script's main: a user's mistake is one line on stderr and exit status 1, not a traceback."""
    with contextlib.suppress(AttributeError):  # not a stream of the system's
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {' '.join(str(e).splitlines())}")  # one line, whatever a file is called
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    except RuntimeError as e:
        if str(e).startswith("DataLoader worker"):  # its signal may come anywhere in main
            sys.exit(f"error: a process that loads images has died, for want of memory perhaps (fewer --workers?): {e}")
        if dist.is_initialized() and any(words in str(e) for words in ("by peer", "Broken pipe", "Timed out")):
            sys.exit("error: another rank has stopped")  # gloo: it has left, and said why, or it hangs
        raise
    finally:
        end_workers()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- linear probe

@torch.no_grad()
def encode_means(tokenizer, view, n, workers, device, batch_size=64):
    """Encodes n images, a fixed random choice of the view's. Returns the means over positions of latents (n, d) and of
    pre-adapter tokens (n, D; a VAE's: mean and log-variance of its latents), the labels (n,), and the latents' mean and
    std per channel (d,), all on the CPU."""
    order = at_random(n, batch_size, len(view.data))
    latents, tokens, labels, moments = [], [], [], 0
    for x, y in batches(view, order, workers, device):
        t = tokenizer.features(x)  # (B, N, D)
        z = tokenizer.adapt(t, *(side // tokenizer.factor for side in x.shape[-2:])).double()  # (B, d, h, w)
        moments = moments + torch.stack([torch.ones_like(z), z, z.square()]).sum((1, 3, 4))  # (3, d)
        latents.append(z.float().mean((2, 3)).cpu())
        tokens.append(t.float().mean(1).cpu())
        labels.append(y.cpu())
    count, total, squares = moments.cpu()
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return torch.cat(latents), torch.cat(tokens), torch.cat(labels), (mean.float(), std.float())


def linear_probe(train_x, train_y, val_x, val_y):
    """Top-1 accuracy in per cent of a linear classifier on features (n, C) with labels (n,), trained on the train part.

    The protocol (a choice; the paper states none): features averaged over the tokens, BatchNorm without affine (the
    train set's mean and variance), one linear layer, softmax regression to convergence by L-BFGS from zero, weight
    decay 1e-4. No randomness."""
    mean, std = train_x.mean(0), train_x.std(0, correction=0) + 1e-5
    train_x, val_x = (train_x - mean) / std, (val_x - mean) / std
    linear = nn.Linear(train_x.shape[1], int(train_y.max()) + 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = 0.0
        for x, y in zip(train_x.split(65536), train_y.split(65536)):  # ImageNet's logits need not fit at once
            part = F.cross_entropy(linear(x), y, reduction="sum") / len(train_x)
            part.backward()
            loss += part.item()
        decay = 0.5e-4 * linear.weight.square().sum()
        decay.backward()
        return loss + decay.item()

    optimiser.step(closure)
    with torch.no_grad():
        return 100 * (linear(val_x).argmax(1) == val_y).float().mean().item()


# ------------------------------------------------------------------------------------------------------ validation

@torch.no_grad()
def validate(stage, tokenizer, data, held_out, args, device, lpips):
    """The line at the end of a stage: held-out L_rec without its GAN term, PSNR, SSIM, and the linear probe of the
    latents (Figure 3) with that of the pre-adapter tokens beside it. It also fills the latent statistics. In fp32."""
    tokenizer.eval()
    z, t, y, (mean, std) = encode_means(tokenizer, View(data, args.size), args.probe_images, args.workers, device)
    if stage != 3:  # which leaves encoder and adapter alone: the statistics stay, and with them the fingerprint
        tokenizer.latent_mean.copy_(mean)
        tokenizer.latent_std.copy_(std)
    view, n = View(held_out, args.size), min(args.val_images, len(held_out))
    sums = {"rec": 0.0, "psnr": 0.0, "ssim": 0.0}
    for x, _ in batches(view, at_random(n, 32, len(held_out)), args.workers, device):
        recon = tokenizer.decode(tokenizer.encode(x)).clamp(-1, 1)
        sums["rec"] += losses.reconstruction_loss(x, recon, lpips, args.w_p)[0].item() * len(x)
        sums["psnr"] += losses.psnr(x, recon).sum().item()
        sums["ssim"] += losses.ssim(x, recon).sum().item()
    result = {k: v / n for k, v in sums.items()}
    if data.labels and held_out.labels:
        vz, vt, vy, _ = encode_means(tokenizer, view, args.val_images, args.workers, device)
        result["probe"] = linear_probe(z, y, vz, vy)
        result["probe_tokens"] = linear_probe(t, y, vt, vy)
    return result


@torch.no_grad()
def reconstruction_grid(tokenizer, held_out, args, device, path):
    x, _ = next(batches(View(held_out, args.size), in_order(min(8, len(held_out)), 8), 0, device))
    save_grid([x, tokenizer.decode(tokenizer.encode(x))], path)


# ---------------------------------------------------------------------------------- the encoder's stand-in pretraining

def pretrain_encoder(encoder, data, args, device):
    """Trains a small encoder on the labels for a minute, as a STAND-IN for a foundation encoder (preset tiny only).

    Mean patch token, one linear layer, cross-entropy. The colour channels are permuted, which DINOv2's augmentations do
    more gently: the features learn shapes and not colours, and that is the gap which stage 2 has to close."""
    torch.manual_seed(args.seed)
    head = nn.Linear(encoder.dim, len(data.classes)).to(device)
    encoder.to(device).train()
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 2e-3, (0.9, 0.99), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, args.pretrain_steps, pct_start=0.15)
    order = Order(len(data), 64, (args.seed, "pretrain order"))
    stream = batches(View(data, args.size, (args.seed, "pretrain crop")), order, args.workers, device)
    dtype = autocast_dtype(args.dtype, device)
    for step in tqdm(range(args.pretrain_steps), desc="stand-in pretraining", mininterval=1):
        x, y = next(stream)
        x = x[:, rng(args.seed, "pretrain colour", step).permutation(3).tolist()]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = head(encoder.features(x).mean(1)).float()
        loss = F.cross_entropy(logits, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    accuracy = (logits.argmax(1) == y).float().mean()
    print(f"stand-in pretraining: last batch loss {loss.item():.3f}, accuracy {accuracy:.1%}")


def foundation_encoder(args, data, run_, rank, device):
    """E_p and its arguments: official or from a file; or, for the preset tiny, the stand-in trained here, once."""
    if args.encoder != "tiny14":
        with rank_0_first():
            return load_encoder(args.encoder)
    path = run_.out / "encoder.pt"
    what = {"seed": args.seed, "list of images": data.identity, "size": args.size, "steps": args.pretrain_steps}
    if not data.labels or not args.pretrain_steps:
        raise UserError("tiny14 has no official weights; its stand-in is trained by --preset tiny, on --data with one "
                        "folder per class (or give --encoder)")
    if path.exists() and not args.overwrite:
        check_same(load_file(path, "encoder").get("run", {}), what, path)
    elif rank == 0:
        print("NOTE: the preset tiny has no foundation encoder. A small one of the DINOv2 class is first trained on "
              "the labels, as a stand-in; its figures say nothing about DINOv2.")
        torch.manual_seed(args.seed)
        encoder = DINOv2(**ENCODERS["tiny14"])
        pretrain_encoder(encoder, data, args, device)
        state = {f"backbone.{k}": v for k, v in encoder.state_dict().items()}
        save_checkpoint(path, {"teacher": state, "run": what})  # the layout of DINOv2's own training checkpoints
    if dist.is_initialized():
        dist.barrier()
    return load_encoder(str(path))


# ------------------------------------------------------------------------------------------------------- the stages

def linearised(loss, x):
    """The linear function of x with the gradient that loss has here. What is built on it goes back through loss, for
    L_rec that is VGG16, once and not once more for each adaptive weight."""
    return (torch.autograd.grad(loss, x)[0] * x).sum()


def training_step(x, s, args, gan, last, noise=()):
    """Figure 2, one micro-batch: backward through L_rec + w_sp L_sp, then through the discriminator's loss.

    x: (B, 3, H, W). s: the stage's networks (see set_up_stage). gan: whether the adversarial terms are on yet. last:
    whether this micro-batch completes the global batch. noise: for a VAE, [(B, d, h, w)]. Returns what is logged, as
    scalars on the device."""
    with no_sync(s.generator, not last), no_sync(s.critic, not last):
        with s.autocast():
            recon, z, tokens, *z_proj = s.generator(x, *noise)  # x^ (B, 3, H, W), z0* (B, d, h, w), E_p(x) (B, N, D)
        recon = recon.float()

        # Eq. 1: L_rec = L1 + w_p L_perceptual + w_g L_GAN, w_g = --w-g times the ratio of the gradients
        with s.autocast():
            loss, l1, perceptual = losses.reconstruction_loss(x, recon, s.lpips, args.w_p)
        log = {"l1": l1, "perceptual": perceptual, "rec": loss}
        rec = loss = linearised(loss, recon)
        if gan:
            s.discriminator.requires_grad_(False)  # no gradient of G's loss in D's parameters
            with s.autocast():
                g_loss = losses.hinge_g(s.discriminator(recon))
            g = linearised(g_loss, recon)
            adaptive = losses.adaptive_weight(rec, g, s.tokenizer.decoder.conv_out.weight)
            loss = loss + args.w_g * adaptive * g
            log.update(g_loss=g_loss, adaptive=adaptive)

        # Stage 2: + w_sp L_sp, against the frozen stage-1 encoder and adapter
        if args.model == "aligntok" and s.reference is not None:
            with torch.no_grad(), s.autocast():
                tokens_ref = s.reference.features(x)
                z_ref = s.reference.adapt(tokens_ref, *z.shape[-2:])
            if args.sp_at == "adapter":
                l_sp = losses.semantic_preservation(z, z_ref, args.sp_loss, dim=1)
                if args.sp_loss == "l2":
                    log["sp_to_var"] = l_sp / s.reference.latent_std.square().mean()  # the variance of stage 1's z0
            else:
                l_sp = losses.semantic_preservation(tokens, tokens_ref, args.sp_loss, dim=-1)
            loss = loss + args.w_sp * l_sp
            log["sp"] = l_sp

        # The baselines: + w_kl KL, and VA-VAE's w_vf VF toward the frozen foundation encoder
        if args.model != "aligntok":
            kl = losses.kl_divergence(tokens)
            loss = loss + args.w_kl / x[0].numel() * kl  # 1e-6 goes with a sum over the 3HW values; L1 is their mean
            log["kl"] = kl
        if args.model == "vavae":
            with torch.no_grad(), s.autocast():
                foundation = s.reference.features(x)
            vf = losses.vf_loss(*z_proj, foundation, *args.vf_margins)
            adaptive = losses.adaptive_weight(rec, vf, s.tokenizer.encoder.conv_out.weight, limit=1e8)
            loss = loss + args.w_vf * adaptive * vf
            log.update(vf=vf, vf_adaptive=adaptive)
        (loss / args.accum).backward()

        if gan:
            s.discriminator.requires_grad_(True)
            with s.autocast():  # two forwards: real and fake do not share BatchNorm's statistics
                real, fake = s.critic(x), s.critic(recon.detach())
            d_loss = losses.hinge_d(real, fake)
            (d_loss / args.accum).backward()
            log.update(d_loss=d_loss, d_real=(real > 0).float().mean(), d_fake=(fake < 0).float().mean())
    return {k: v.detach().float() for k, v in log.items()}


COLUMNS = ["stage", "step", "l1", "perceptual", "rec", "g_loss", "adaptive", "sp", "sp_to_var", "kl",
           "vf", "vf_adaptive", "d_loss", "d_real", "d_fake"]


def start_of_stage(stage, args, data, run_, rank, device):
    """(tokenizer, discriminator, frozen reference or None, state of D's optimiser or None, steps trained before): stage
    1 starts from E_p, a baseline from nothing, the others from the final checkpoint of the stage before."""
    if stage in (0, 1):
        if args.init:
            raise UserError("--init continues from an earlier stage: it goes with --stage 2 or 3")
        torch.manual_seed(int(rng(args.seed, "encoder").integers(2 ** 62)))  # for random:NAME
        encoder, arguments = (None, None) if args.model == "vae" else foundation_encoder(args, data, run_, rank, device)
        torch.manual_seed(int(rng(args.seed, "init").integers(2 ** 62)))  # the same on every rank, whatever E_p is
        discriminator = losses.PatchGAN(args.disc_ch)
        if stage == 0:
            vae = VAE(DECODERS[args.decoder], d=args.d, vf_dim=encoder and encoder.dim)
            return vae, discriminator, encoder, None, 0
        tokenizer = Tokenizer(arguments, DECODERS[args.decoder], d=args.d)
        tokenizer.encoder.load_state_dict(encoder.state_dict())
        return tokenizer, discriminator, None, None, 0
    path = Path(args.init or run_.out / f"stage{stage - 1}.pt")
    if not path.exists():
        raise UserError(f"stage {stage} continues from stage {stage - 1}, but there is no {path}: "
                        f"run --stage {stage - 1} first, or give --init CKPT")
    content = load_file(path)
    if not {"discriminator", "arguments", "total_steps"} <= content.keys():
        raise UserError(f"{path} is not the final checkpoint of a stage (expected stage{stage - 1}.pt)")
    with reading(path, "checkpoint"):
        if content["stage"] != stage - 1:
            raise UserError(f"{path} is of stage {content['stage']}; stage {stage} continues from stage {stage - 1}")
        wanted = {"decoder": args.decoder, "d": args.d, "disc_ch": args.disc_ch}
        if args.encoder_given:
            wanted["encoder"] = args.encoder
        check_same(content["run"], wanted, path, "repeat them, or give another --init")
        args.encoder = content["run"]["encoder"]
        tokenizer = build(Tokenizer, content["arguments"], content["tokenizer"], path)
        discriminator = losses.PatchGAN(args.disc_ch)
        load_strictly(discriminator, content["discriminator"], path)
        load_optimiser(torch.optim.Adam(discriminator.parameters(), fused=True), content["opt_d"])  # does it fit?
        reference = copy.deepcopy(tokenizer) if STAGES[stage]["reference"] else None
        if reference is not None:
            reference.decoder = None  # L_sp compares latents: the frozen copy is encoder and adapter
        return tokenizer, discriminator, reference, content["opt_d"], operator.index(content["total_steps"])


def set_up_stage(stage, args, run_, data, lpips, rank, device):
    """The stage's networks, its optimisers and EMA, and `run`, the arguments that a resume must repeat."""
    tokenizer, discriminator, reference, opt_d_state, steps_before = start_of_stage(
        stage, args, data, run_, rank, device)
    tokenizer.to(device)
    discriminator.to(device)
    if reference is not None:
        reference.to(device).requires_grad_(False).eval()

    # What the stage trains
    tokenizer.requires_grad_(False).eval()
    for name, part in tokenizer.named_children():
        if name in STAGES[stage]["trains"]:
            part.requires_grad_(True).train()
    if stage == 2:
        tokenizer.encoder.mask_token.requires_grad_(False)  # no forward reads it
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    ema = copy.deepcopy(tokenizer).requires_grad_(False).eval() if STAGES[stage]["ema"] else None

    encoder_lr = args.encoder_lr if stage == 2 else args.lr
    opt_g = torch.optim.Adam([{"params": [p for p in part.parameters() if p.requires_grad],
                               "lr": encoder_lr if name == "encoder" else args.lr}
                              for name, part in tokenizer.named_children()], betas=(0.5, 0.9), fused=True)
    opt_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=(0.5, 0.9), fused=True)
    if opt_d_state:
        opt_d.load_state_dict(opt_d_state)
        opt_d.param_groups[0]["lr"] = args.lr  # the state brings the lr of the stage before
    dtype = autocast_dtype(args.dtype, device)
    what = {"model": args.model, "stage": stage, "fingerprint at the start": tokenizer.fingerprint(),
            "list of images": data.identity, "lpips": lpips is not None, "dtype": str(dtype).removeprefix("torch."),
            "encoder_lr": encoder_lr}
    what |= {k: getattr(args, k) for k in (
        "encoder", "decoder", "d", "disc_ch", "size", "batch_size", "accum", "lr", "seed", "w_p", "w_g", "w_sp",
        "sp_loss", "sp_at", "w_kl", "w_vf", "vf_margins", "disc_start", "ema_decay")}
    torch.manual_seed(int(rng(args.seed, "stage", stage, rank).integers(2 ** 62)))  # no step draws from it yet
    return SimpleNamespace(
        run=what, steps_before=steps_before, step=0, tokenizer=tokenizer, discriminator=discriminator, trained=trained,
        reference=reference, ema=ema, lpips=lpips, opt_g=opt_g, opt_d=opt_d, meter=Meter(device),
        autocast=lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32))


def stage_state(s):
    """All that a resume needs."""
    return {"stage": s.run["stage"], "step": s.step, "run": s.run, "arguments": s.tokenizer.arguments,
            "tokenizer": s.tokenizer.state_dict(), "ema": s.ema.state_dict() if s.ema is not None else None,
            "discriminator": s.discriminator.state_dict(), "opt_g": s.opt_g.state_dict(),
            "opt_d": s.opt_d.state_dict(), "meter": s.meter.state(), "rng": rng_states()}


def load_stage_state(s, saved, rank, path):
    with reading(path, "checkpoint"):
        for name in ("tokenizer", "discriminator", *(["ema"] if s.ema is not None else [])):
            load_strictly(getattr(s, name), saved[name], path)
        for name in ("opt_g", "opt_d"):
            load_optimiser(getattr(s, name), saved[name])
        s.meter.load(saved["meter"])
        s.step = operator.index(saved["step"])
        torch.set_rng_state(saved["rng"][rank % len(saved["rng"])])


def train_stage(stage, args, run_, data, held_out, lpips, rank, world, device):
    """One stage from its start, or from its last checkpoint, to its final checkpoint stage{N}.pt, or a baseline to its
    own, vae.pt or vavae.pt."""
    steps, prefix = args.steps_of[stage], f"stage{stage}" if stage else args.model
    final = run_.out / f"{prefix}.pt"
    s = set_up_stage(stage, args, run_, data, lpips, rank, device)
    if args.overwrite:
        run_.forget(prefix)
    if final.exists():
        done = load_file(final)
        check_same(done["run"], s.run, final)
        if done["step"] >= steps:
            print_0(f"{prefix} is complete: {final}")
            return
    saved = run_.resume(prefix, s.run)
    if saved:
        load_stage_state(s, saved, rank, run_.last_good(prefix))
        if s.step > steps:
            raise UserError(f"{run_.last_good(prefix)} is already at step {s.step}; --steps {steps} is behind it")
    elif final.exists():
        raise UserError(f"{final} is at step {done['step']} of {steps}, but the {prefix}_step*.pt to resume from are "
                        "gone; --overwrite starts the stage again")
    same_on_all_ranks(s.step, args.out)
    # After the last logged step: the meter still holds what came later. But the last step of all has its row.
    run_.rewind_log(stage, s.step if s.step == steps else s.step // args.log_every * args.log_every)

    if args.checkpointing:
        checkpoint_activations(s.tokenizer)
    if args.compile:  # block by block and in place: keys stay, and the adaptive weight's gradient stays cheap
        for block in s.tokenizer.blocks():
            block.compile()
    s.generator, s.critic = wrap(s.tokenizer, device), wrap(s.discriminator, device)
    order = Order(len(data), args.batch_size, (args.seed, "order", stage), s.step, args.accum, rank, world)
    side = args.size // s.tokenizer.factor
    view = View(data, args.size, (args.seed, "augment", stage), None if stage else (args.d, side, side))
    stream = batches(view, order, args.workers, device)
    describe_stage(stage, s, args, data, world, device)

    bar = tqdm(total=steps, initial=s.step, desc=prefix, disable=rank != 0, mininterval=1)
    run_.defer_signals(True)
    while s.step < steps:
        gan = args.w_g > 0 and s.steps_before + s.step >= args.disc_start
        for micro in range(args.accum):
            x, _, *noise = next(stream)
            s.meter.add(s.step + 1, training_step(x, s, args, gan, micro == args.accum - 1, noise))
        s.opt_g.step()
        s.opt_g.zero_grad(set_to_none=True)
        if gan:
            s.opt_d.step()
            s.opt_d.zero_grad(set_to_none=True)
        if s.ema is not None:
            update_ema(s.ema, s.tokenizer, args.ema_decay)
        s.step += 1
        bar.update()

        if s.step % args.log_every == 0 or s.step == steps:
            s.meter.check(run_, prefix)
            row = {"stage": stage, "step": s.step} | s.meter.average()
            run_.log(row)
            if s.step % args.log_every == 0:
                s.meter.reset()
            bar.set_postfix({k: f"{row[k]:.3g}" for k in ("rec", "sp", "d_loss") if k in row})
        if rank == 0 and (s.step % args.grid_every == 0 or s.step == steps):
            picture = run_.out / f"{prefix}_step{s.step:08d}.png"
            reconstruction_grid(s.ema or s.tokenizer, held_out, args, device, picture)
        stop = run_.should_stop()
        if s.step % args.save_every == 0 or s.step == steps or stop:
            s.meter.check(run_, prefix)
            for module in (s.tokenizer, s.discriminator):
                check_weights(module, run_, prefix)
            run_.save(prefix, s.step, stage_state(s))
        if stop and s.step < steps:
            bar.close()
            raise UserError(f"stopped by a signal at step {s.step} of {prefix}; saved {run_.last_good(prefix)}; "
                            "repeat the command to go on")
    bar.close()
    run_.defer_signals(False)
    # The others wait while rank 0 validates, which may take longer than a collective may
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12)) if dist.is_initialized() else None
    if rank == 0:
        finish_stage(stage, s, args, data, held_out, device, final)
    if dist.is_initialized():
        dist.barrier(patient)


def describe_stage(stage, s, args, data, world, device):
    count, d_count = (sum(p.numel() for p in params) for params in (s.trained, s.discriminator.parameters()))
    frozen = sum(p.numel() for p in s.tokenizer.parameters()) - count
    steps = args.steps_of[stage]
    trains = [name for name, _ in s.tokenizer.named_children() if name in STAGES[stage]["trains"]]
    weights = f"w_sp {args.w_sp:g}" if stage else f"w_kl {args.w_kl:g}, w_vf {args.w_vf * (args.model == 'vavae'):g}"
    print_0(f"\n{f'stage {stage}' if stage else args.model}, {STAGES[stage]['name']}: {' '.join(trains)} train, "
            f"{count / 1e6:.2f}M parameters; {frozen / 1e6:.2f}M frozen; discriminator {d_count / 1e6:.2f}M\n"
            f"  {len(data)} images of {args.size} px, batch {args.batch_size} = {world} ranks x {args.accum} "
            f"micro-batches x {args.batch_size // world // args.accum}, {len(data) / args.batch_size:.1f} steps an "
            f"epoch, {steps} steps{f', resuming at step {s.step}' if s.step else ''}\n"
            f"  {device.type}, {s.run['dtype']}, w_p {args.w_p:g}, w_g {args.w_g:g} from step {args.disc_start} of all "
            f"stages, {weights}")


def finish_stage(stage, s, args, data, held_out, device, final):
    """Validates the stage's result (its EMA, where it has one); saves it as a tokenizer, with D for the next stage."""
    result = s.ema or s.tokenizer
    figures = validate(stage, result, data, held_out, args, device, s.lpips)
    print(f"{final.stem} on {min(args.val_images, len(held_out))} held-out images: " + ", ".join(
        f"{k} {v:.4f}" if k in ("rec", "ssim") else f"{k} {v:.2f}" for k, v in figures.items()))
    save_checkpoint(final, {
        "stage": stage, "step": s.step, "total_steps": s.steps_before + s.step, "run": s.run,
        "arguments": result.arguments, "tokenizer": result.state_dict(),
        "discriminator": s.discriminator.state_dict(), "opt_d": s.opt_d.state_dict(), "validation": figures})
    print(f"saved {final}")


# -------------------------------------------------------------------------------------------------------------- CLI

def parse(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--preset", choices=PRESETS, default="paper", help="default: %(default)s")
    add("--model", choices=["aligntok", "vae", "vavae"], default="aligntok", help="vae, vavae: the paper's baselines")
    add("--stage", choices=["1", "2", "3", "all"], default="all", help="of aligntok (default: %(default)s)")
    add("--data", help="folder of images, one folder per class or flat; 'shapes' for the built-in data")
    add("--val", help="folder of held-out images (default: `val` beside a folder `train`, else 5%% are held out)")
    add("--out", default="runs/tokenizer", help="the run's folder (default: %(default)s)")
    add("--steps", type=int, help="steps of each stage, or of a baseline (default: as many as the stages together)")
    add("--batch-size", type=int, help="global: over all ranks and micro-batches")
    add("--accum", type=int, default=1, help="micro-batches per step; BatchNorm and w_g see one micro-batch at a time")
    add("--lr", type=float, help="of Adam, for G and D")
    add("--encoder-lr", type=float, help="of E_p in stage 2 (default: --lr)")
    add("--seed", type=int, default=0)
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of autocast; auto: bf16 where it is native")
    add("--init", help="the stage before's final checkpoint (default: in --out)")
    add("--encoder", help="stage 1, vavae: vits14 ... vitg14, with _reg4, or a DINOv2 file, or random:NAME")
    add("--d", type=int, default=32, help="latent channels")
    add("--size", type=int, help="image side in px, divisible by 16")
    add("--vgg16", help="torchvision's VGG16 file, for L_perceptual")
    add("--lpips-heads", help="LPIPS v0.1 VGG heads, for L_perceptual")
    add("--w-p", type=float, help="weight of L_perceptual")
    add("--w-g", type=float, default=0.5, help="L_GAN's part of the adaptive weight; 0: no GAN (default: %(default)s)")
    add("--w-sp", type=float, default=1.0, help="weight of L_sp in stage 2 (default: %(default)s)")
    add("--sp-loss", choices=["l2", "cosine"], default="l2", help="ablation: cosine")
    add("--sp-at", choices=["adapter", "encoder"], default="adapter", help="ablation: L_sp before the adapter")
    add("--w-kl", type=float, default=1e-6, help="vae, vavae: weight of KL, beside a sum over pixels (%(default)s)")
    add("--w-vf", type=float, default=0.1, help="vavae: the VF loss's part of its adaptive weight (%(default)s)")
    add("--vf-margins", type=float, nargs=2, default=[0.5, 0.25], metavar=("M_COS", "M_DIST"),
        help="vavae: m_cos and m_dist of the VF loss (default: %(default)s)")
    add("--disc-start", type=int, help="step, counted through the stages, at which the GAN begins")
    add("--ema-decay", type=float)
    add("--workers", type=int, help="loader processes per rank")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    add("--log-every", type=int, help="steps")
    add("--save-every", type=int, help="steps")
    add("--grid-every", type=int, help="steps")
    add("--val-images", type=int, help="held-out images at the end of a stage")
    add("--probe-images", type=int, help="training images for the probe and the latent statistics")
    add("--check-data", action="store_true", help="decode every image first, and name the unreadable ones")
    add("--overwrite", action="store_true", help="start the stage again, whatever is in --out")
    args = p.parse_args(argv)

    preset = PRESETS[args.preset]
    args.encoder_given = args.encoder is not None
    if args.preset == "tiny" and args.w_p is None and args.vgg16 and args.lpips_heads:
        args.w_p = 1.0  # the perceptual loss is off there only for want of its weights
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.encoder_lr is None:
        args.encoder_lr = args.lr
    steps = [args.steps] * 4 if isinstance(args.steps, int) else [*args.steps, sum(args.steps)]
    args.steps_of = dict(zip(STAGES, steps))
    for name in ("batch_size", "accum", "d", "log_every", "save_every", "grid_every", "val_images", "probe_images"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if min(args.steps_of.values()) < 1:
        raise UserError(f"--steps must be at least 1, not {args.steps}")
    if args.size % 16 or args.size < 32:  # 32: what PatchGAN takes
        raise UserError(f"--size must be divisible by 16 and at least 32, not {args.size}")
    not_negative = (args.w_p, args.w_g, args.w_sp, args.w_kl, args.w_vf, *args.vf_margins, args.workers,
                    args.disc_start, args.seed)
    if min(args.lr, args.encoder_lr) <= 0 or min(not_negative) < 0 or not 0 <= args.ema_decay < 1:
        raise UserError("--lr and --encoder-lr must be positive, weights, --vf-margins, --workers, --disc-start and "
                        "--seed not negative, --ema-decay in [0, 1)")
    return args


def main(argv=None):
    args = parse(argv)
    rank, world, device = setup_ranks()
    if args.batch_size % (world * args.accum):
        raise UserError(f"--batch-size {args.batch_size} does not split into {world} ranks x {args.accum} "
                        "micro-batches")
    if args.stage == "all" and args.init:
        raise UserError("--init continues from an earlier stage: it goes with --stage 2 or 3")
    stages = [1, 2, 3] if args.stage == "all" else [int(args.stage)]
    if args.model != "aligntok":
        if args.stage != "all" or args.model == "vae" and args.encoder_given:
            raise UserError(f"--model {args.model} is one stage, from scratch: no --stage, and for vae no --encoder")
        stages = [0]
    data, held_out = open_data(args.data, args.val, args.size, args.val_images)
    if args.check_data:
        check_data([data, held_out], args, rank, world)
    lpips = None
    if args.w_p > 0:
        with rank_0_first():
            files = (find_weights(losses.VGG16_URL, losses.VGG16_SHA256, "--vgg16", args.vgg16),
                     find_weights(losses.HEADS_URL, losses.HEADS_SHA256, "--lpips-heads", args.lpips_heads))
        lpips = losses.LPIPS(*files).to(device)
    elif args.preset == "tiny":
        print_0("w_p = 0: no perceptual loss (give --vgg16 and --lpips-heads to turn it on)")
    began = time.time()
    with Run(args.out, rank, COLUMNS) as run_:
        for stage in stages:
            train_stage(stage, args, run_, data, held_out, lpips, rank, world, device)
    print_0(f"done in {(time.time() - began) / 60:.1f} min; pictures and log.csv in {args.out}")


def check_data(sets, args, rank=0, world=1):
    """Decodes every image, by all ranks and workers; raises UserError that names the unreadable ones."""
    bad = []
    for data in sets:
        order = in_order(len(data), 32)[rank::world]
        loader = DataLoader(View(data, args.size), batch_sampler=order, num_workers=args.workers, collate_fn=list)
        for items in tqdm(loader, desc="checking images", disable=rank != 0, mininterval=1):
            bad += [item for item in items if isinstance(item, str)]
    if dist.is_initialized():
        every = [None] * world
        dist.all_gather_object(every, bad)
        bad = [text for part in every for text in part]
    if bad:
        raise UserError(f"{len(bad)} unreadable images: {'; '.join(bad[:20])}")


if __name__ == "__main__":
    run(main)
