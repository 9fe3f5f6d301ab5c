"""What the preset tiny needs, to do without download, data set and GPU: shapes that are drawn on
the fly, and a small encoder that stands in for DINOv2.
"""
import colorsys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from data import Crops, ShuffledBatches, batches, rng, to_pixels
from files import UserError, check_same, load_encoder, load_file, save_checkpoint
from model import ENCODERS, DINOv2
from runs import autocast, autocast_dtype, barrier, time_left


def _ngon(n, inner=None):
    """A regular polygon in the unit circle; with `inner`, the inner radius, a star."""
    n = 2 * n if inner else n
    angles = np.arange(n) * 2 * np.pi / n
    radii = np.where(np.arange(n) % 2, inner, 1.0) if inner else 1.0
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


_turn = np.linspace(0, 2 * np.pi, 48)
_circle = _ngon(48)
_heart = -(13 * np.cos(_turn) - 5 * np.cos(2 * _turn) - 2 * np.cos(3 * _turn)
           - np.cos(4 * _turn)) / 16

# A polygon each; a second polygon, where there is one, is cut out.
SHAPES = {
    "circle": [_circle],
    "ring": [_circle, 0.6 * _circle],
    "crescent": [_circle, 0.85 * _circle + [0.45, 0]],
    "triangle": [_ngon(3)],
    "square": [_ngon(4)],
    "pentagon": [_ngon(5)],
    "star": [_ngon(5, 0.42)],
    "frame": [_ngon(4), 0.6 * _ngon(4)],
    "cross": [np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1),
                        (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)])],
    "heart": [np.stack([np.sin(_turn) ** 3, _heart], axis=1)],
    "arrow": [np.array([(0, -1), (.8, -.1), (.3, -.1), (.3, 1), (-.3, 1), (-.3, -.1), (-.8, -.1)])],
    "ell": [np.array([(-.8, -1), (-.2, -1), (-.2, .4), (.8, .4), (.8, 1), (-.8, 1)])],
}


# names of hues, from 0 degrees on in steps of 60
HUES = ["red", "yellow", "green", "cyan", "blue", "purple"]
VOCABULARY = ["a", "an", "on", "ground", "dark", "black", "grey", "white", *HUES, *SHAPES]


def colour_name(rgb):
    """The name of a colour (3,) in [0, 1]: its hue, dark where no channel reaches a half; black,
    grey or white where its channels are much the same."""
    high, low = max(rgb), min(rgb)
    if high - low < 0.25 * high or high < 0.15:
        return "black" if high < 0.25 else "grey" if high < 0.75 else "white"
    hue = colorsys.rgb_to_hsv(*rgb)[0]
    return ("dark " if high < 0.5 else "") + HUES[round(6 * hue) % 6]


class Shapes:
    """One filled shape on a ground; image i is a function of (split, i). Colours, textures, size,
    place and rotation (up to 17 degrees) vary; the shape is lighter than the ground."""

    def __init__(self, split="train", n=8192, size=64):
        self.split, self.n, self.size = split, n, size
        self.classes = list(SHAPES)
        self.labels = [i % len(self.classes) for i in range(n)]
        self.identity = f"shapes-{split}-{n}-{size}"
        self._drawn = {}  # an image (12 KB at 64 px) is drawn once in a process

    def __len__(self):
        return self.n

    def image(self, i):
        if i not in self._drawn:
            self._drawn[i] = self._draw(i)
        return Image.fromarray(self._drawn[i])

    def pixels(self, i):
        return to_pixels(self.image(i))

    @property
    def captions(self):
        """Such as "a yellow ring on dark green", or "on a dark green ground"."""
        return [self._caption(i) for i in range(self.n)]

    def _caption(self, i):
        textures = self._textures(rng("shapes", self.split, i))
        ground, shape = (colour_name(texture.mean((0, 1))) for texture in textures)
        if rng("shapes", "words", self.split, i).random() < 0.5:
            ground = f"a {ground} ground"
        return f"a {shape} {self.classes[self.labels[i]]} on {ground}"

    def _textures(self, r):
        """Of ground and shape, (S, S, 3) in [0, 1] each."""
        colours = r.random((2, 2, 3))  # (ground or shape, its two colours, RGB)
        while colours[1, 0].mean() - colours[0, 0].mean() < 0.35:  # any hue, but a lighter shape
            colours = r.random((2, 2, 3))
        # a texture's two colours are close to each other
        colours[:, 1] = 0.75 * colours[:, 0] + 0.25 * colours[:, 1]
        return [self._texture(r, a, b) for a, b in colours]

    def _draw(self, i):
        r, S = rng("shapes", self.split, i), self.size
        ground, shape = self._textures(r)
        radius, angle = S * r.uniform(0.32, 0.45), r.uniform(-0.3, 0.3)
        place = S / 2 + 0.6 * r.uniform(radius - S / 2, S / 2 - radius, 2)
        turn = radius * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        canvas = Image.new("L", (4 * S, 4 * S))  # four times too large, then averaged: smooth edges
        for part, fill in zip(SHAPES[self.classes[self.labels[i]]], (255, 0)):
            points = [tuple(p) for p in 4 * (part @ turn + place)]
            ImageDraw.Draw(canvas).polygon(points, fill=fill)
        mask = np.asarray(canvas.reduce(4), np.float32)[..., None] / 255
        image = (mask * shape + (1 - mask) * ground) * 255
        return image.round().clip(0, 255).astype(np.uint8)

    def _texture(self, r, a, b):
        """(S, S, 3) in [0, 1] between colours a and b: flat, gradient, stripes, checks, clouds."""
        S = self.size
        y, x = np.mgrid[:S, :S] / S
        angle, waves = r.uniform(0, np.pi), r.uniform(3, 7)
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        stripes, bars = (np.sin(2 * np.pi * waves * t) > 0 for t in (along, across))
        kind = r.integers(5)
        if kind == 4:
            clouds = Image.fromarray(r.random((6, 6)).astype(np.float32))
            t = np.asarray(clouds.resize((S, S), Image.BICUBIC))
        else:
            t = (np.zeros_like(x), (along + 1) / 2, stripes, stripes ^ bars)[kind]
        return a + (b - a) * np.asarray(t, np.float32)[..., None]


def open_shapes(val, size, val_images):
    """(training shapes, held-out shapes), for --data shapes."""
    if val is not None:
        raise UserError("--val goes with --data DIR: the shapes have their own held-out images")
    return Shapes("train", size=size), Shapes("val", n=val_images, size=size)


# ---- the stand-in encoder

def pretrain_encoder(encoder, data, args, device, later=0):
    """Trains a small encoder on the labels for a minute: a STAND-IN for a foundation encoder.
    later: steps of stage 1 after it, for the bar.

    Mean patch token, one linear layer, cross-entropy. The colour channels are permuted at random
    (DINOv2's augmentations are gentler): the features learn shapes and not colours. That is the gap
    which stage 2 has to close."""
    torch.manual_seed(args.seed)
    head = nn.Linear(encoder.dim, len(data.classes)).to(device)
    encoder.to(device).train()
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 2e-3, (0.9, 0.99),
                                  weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, args.pretrain_steps, pct_start=0.15)
    order = ShuffledBatches(len(data), 64, (args.seed, "pretrain order"))
    crops = Crops(data, args.size, (args.seed, "pretrain crop"))
    stream = batches(crops, order, args.workers, device)
    dtype = autocast_dtype(args.dtype, device)
    later *= 5 * args.batch_size / 64  # an image takes about five times as long there
    bar = tqdm(range(args.pretrain_steps), "stand-in pretraining", mininterval=1)
    began = time.monotonic()
    for step in bar:
        x, y = next(stream)
        x = x[:, rng(args.seed, "pretrain colour", step).permutation(3).tolist()]
        with autocast(device, dtype):
            logits = head(encoder.features(x).mean(1)).float()
        loss = F.cross_entropy(logits, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % args.log_every == 0:
            left = args.pretrain_steps - step - 1 + later
            bar.set_postfix({"all stages": time_left(began, step + 1, left)})
    accuracy = (logits.argmax(1) == y).float().mean()
    print(f"stand-in pretraining: last batch loss {loss.item():.3f}, accuracy {accuracy:.1%}")


def stand_in_encoder(args, data, run, device):
    """(DINOv2, its arguments): the stand-in, trained once and kept as encoder.pt in the run."""
    path = run.out / "encoder.pt"
    recipe = {"seed": args.seed, "list of images": data.identity, "size": args.size,
              "steps": args.pretrain_steps}
    if data.labels is None or not args.pretrain_steps:
        raise UserError("tiny14 has no official weights; its stand-in is trained by --preset tiny, "
                        "on --data with one folder per class (or give --encoder)")
    then = load_file(path, "encoder").get("recipe") if path.exists() else recipe
    if not isinstance(then, dict):
        raise UserError(f"{path} is no stand-in that was trained here: give it as --encoder, or "
                        "choose another --out")
    if path.exists() and not args.overwrite:
        check_same(then, recipe, path)
    elif run.rank == 0:
        print("NOTE: the preset tiny has no foundation encoder. A small stand-in is first trained "
              "on the labels; its figures say nothing about DINOv2.")
        torch.manual_seed(args.seed)
        encoder = DINOv2(**ENCODERS["tiny14"])
        later = args.steps_of[args.now[0]] + run.later
        pretrain_encoder(encoder, data, args, device, later)
        # the layout of DINOv2's own training checkpoints
        state = {f"backbone.{k}": v for k, v in encoder.state_dict().items()}
        save_checkpoint(path, {"teacher": state, "recipe": recipe})
    barrier()
    return load_encoder(str(path))
