"""Text to image on the built-in shapes: does a generator draw combinations of shape, colour and
ground that it has never seen? results/t2i.sh runs it all.

    python results/t2i.py data FOLDER          a shard to train on; prompts.txt asks for the rest
    python results/t2i.py judge FILE           trains a classifier, on shapes of its own
    python results/t2i.py score FILE NPZ PROMPTS   what it calls drawn pictures
    python results/t2i.py recon FILE CKPT      what it calls a tokenizer's reconstructions
    python results/t2i.py classes FILE NPZ     its shapes beside the classes 0, 1, ..., 11, 0, ...

Left out of the training is a sixth of all combinations: a sixth of each shape's, and two of twelve
of each pair of colours.

Legend: B batch, C names of all kinds.
"""
import argparse
import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines import VAE
from captions import read_prompts
from data import to_uint8
from files import load_tokenizer
from runs import launch
from toy import HUES, SHAPES, Shapes

COLOURS = ["black", "grey", "white", *HUES, *(f"dark {hue}" for hue in HUES)]
NAMES = {"shape": list(SHAPES), "colour": COLOURS, "ground": COLOURS}
PROMPTS = 500


def parse(caption):
    """The numbers of shape, colour and ground in a caption of the shapes."""
    colour, shape, ground = re.fullmatch(
        r"a (.+) (\w+) on (?:a )?(.+?)(?: ground)?", caption).groups()
    return [names.index(word) for names, word in zip(NAMES.values(), (shape, colour, ground))]


def left_out(caption):
    return sum(parse(caption)) % 6 == 0


def write_data(folder):
    """The training shapes with captions as a shard, but for the combinations that are left out;
    the captions of the first of these as prompts.txt."""
    shapes, folder = Shapes("train"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = shapes.captions
    with tarfile.open(folder / "00000.tar.part", "w") as tar:
        for i, caption in enumerate(written):
            if left_out(caption):
                continue
            png = io.BytesIO()
            shapes.image(i).save(png, "PNG")
            for suffix, content in (("png", png.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    unseen = [caption for caption in written if left_out(caption)]
    (folder / "00000.tar.part").rename(folder / "00000.tar")
    (folder / "prompts.txt").write_text("\n".join(unseen[:PROMPTS]) + "\n")
    for name, part in (("to train on", set(written).difference(unseen)), ("left out", unseen)):
        images = sum(caption in part for caption in written)
        print(f"{name}: {images} images, {len({tuple(parse(c)) for c in part})} combinations")


# ---- the judge

def network():
    """Pixels (B, 3, 64, 64) in [-1, 1] -> logits (B, C) of shape, colour and ground in a row."""
    layers, c_in = [], 3
    for c in (32, 64, 96, 128):
        layers += [nn.Conv2d(c_in, c, 3, 2, 1), nn.BatchNorm2d(c), nn.ReLU()]
        c_in = c
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.ReLU(),
                         nn.Dropout(0.3), nn.Linear(256, sum(map(len, NAMES.values()))))


def split(logits):
    """(B, C) -> three, of shape, colour and ground."""
    return logits.split([len(names) for names in NAMES.values()], dim=1)


def images_and_names(shapes):
    """uint8 (n, 3, 64, 64), int64 (n, 3)."""
    names = torch.tensor([parse(caption) for caption in shapes.captions])
    return torch.stack([shapes.pixels(i) for i in range(len(shapes))]), names


def to_float(pixels):
    return pixels.float() / 127.5 - 1


def train_judge(file, images=16384, steps=1600):
    torch.manual_seed(0)
    x, y = images_and_names(Shapes("judge", n=images))
    net = network()
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, steps)
    for step in range(steps):
        batch = torch.randint(len(x), (128,))
        images = to_float(x[batch])
        if step % 2:  # a decoder blurs
            small = F.interpolate(images, scale_factor=0.5, mode="area")
            images = F.interpolate(small, scale_factor=2, mode="bilinear")
        images = images + 0.05 * torch.randn_like(images)
        loss = sum(F.cross_entropy(logits, names)
                   for logits, names in zip(split(net(images)), y[batch].T))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    torch.save(net.state_dict(), file)
    return report(file, *images_and_names(Shapes("val", n=2048)))


@torch.no_grad()
def report(file, pixels, names):
    """The parts of images (n, 3, H, W) uint8 that the judge calls by their names (n, 3)."""
    net = network().eval()
    net.load_state_dict(torch.load(file, weights_only=True))
    found = torch.cat([torch.stack([part.argmax(1) for part in split(net(to_float(x)))], 1)
                       for x in pixels.split(256)])  # (n, 3)
    right = found == names
    figures = dict(zip(NAMES, right.double().mean(0).tolist()))
    return {"images": len(right)} | figures | {"all": right.all(1).double().mean().item()}


def read_images(samples):
    with np.load(samples) as content:
        return torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2)


def classes(file, samples):
    """Of a class-conditional generator's images: sample.py draws the classes in turn."""
    pixels = read_images(samples)
    names = torch.arange(len(pixels)) % len(SHAPES)
    return {"images": len(pixels),
            "shape": report(file, pixels, names[:, None].expand(-1, 3))["shape"]}


def score(file, samples, prompts):
    pixels = read_images(samples)
    names = torch.tensor([parse(prompt) for prompt in read_prompts(prompts)])
    return report(file, pixels, names[torch.arange(len(pixels)) % len(names)])


@torch.no_grad()
def recon(file, checkpoint):
    tokenizer = load_tokenizer(checkpoint, VAE)
    pixels, names = images_and_names(Shapes("val", n=PROMPTS))
    images = torch.cat([tokenizer.decode(tokenizer.encode(to_float(x))) for x in pixels.split(50)])
    return report(file, torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2), names)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"data": write_data, "judge": train_judge, "score": score, "recon": recon,
                "classes": classes}
    p.add_argument("command", choices=commands)
    p.add_argument("paths", nargs="+")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    figures = commands[args.command](*args.paths)
    if figures:
        print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    launch(main)
