"""Images with captions, text encoders, and the cache of encoded captions, for text to image.

    folder     NAME.jpg beside NAME.txt, at any depth
    shards     *.tar as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json

A text encoder makes of a prompt one row of numbers: L text tokens of width T, one after the other,
then the pooled text.

Legend: n prompts, L text tokens, T their width, P width of the pooled text.
"""
import copy
import hashlib
import json
import os
import re
import tarfile
import textwrap
from array import array
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import IMAGE_TYPES, ImageFolder, on_rank_0, open_image, shown, to_rgb, to_uint8
from files import (
    BatchedArray,
    SystemFailure,
    UserError,
    gather,
    print_0,
    reading,
    write_atomically,
)


def digest(strings):
    """A short hash of strings, in order."""
    total = hashlib.sha256()
    for text in strings:
        total.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return total.hexdigest()[:16]


class Strings:
    """Strings as bytes and offsets. A list of 400 million captions takes twice the memory, and a
    loader's worker would copy what it touches of it."""

    def __init__(self, strings=()):
        self.bytes, self.ends = bytearray(), array("q", [0])
        for text in strings:
            self.append(text)

    def append(self, text):
        self.bytes += text.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.bytes))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        start, end = self.ends[i], self.ends[i + 1]
        return self.bytes[start:end].decode("utf-8", "surrogateescape")


# ---- images with captions

class CaptionFolder(ImageFolder):
    """The images below a folder and the captions beside them."""

    def __init__(self, root):
        super().__init__(root, classes=())
        images = [Path(self.path(i)) for i in range(len(self))]
        texts = [path.with_suffix(".txt") for path in images]
        found = {path for path in Path(root).rglob("*.txt") if not path.name.startswith(".")}
        lacking = [p.name for p, text in zip(images, texts) if text not in found]
        alone = sorted(text.name for text in found.difference(texts))
        for names, fault in ((lacking, "images without a caption (NAME.txt beside NAME.jpg)"),
                             (alone, "captions without an image")):
            if names:
                raise UserError(f"{root} holds {len(names)} {fault}: {shown(names)}")
        self.captions = Strings(map(read_caption, texts))
        if empty := [text.name for text, c in zip(texts, self.captions) if not c]:
            raise UserError(f"{root} holds {len(empty)} empty captions: {shown(empty)}")

    def subset(self, chosen):
        part = super().subset(chosen)
        part.captions = Strings(self.captions[i] for i in chosen)
        return part


def read_caption(path):
    with reading(path, "caption"):
        return path.read_text("utf-8").strip()


class CaptionShards:
    """The samples in the *.tar of a folder, in order. A sample whose image cannot be read, or that
    lacks image or caption, is left out; their number and names are told.

    Each shard is read through once, by one of all ranks' workers; what was found is kept in
    `index`, a folder. Errors: UserError, as where a shard is cut off."""
    labels, classes = None, []

    def __init__(self, root, index, workers=0):
        shards = sorted(Path(root).glob("*.tar"))
        index, rank, world = Path(index), *_rank()
        index.mkdir(parents=True, exist_ok=True)
        todo = [(path, index / f"{path.stem}.json") for path in shards]
        loader = DataLoader(_Indexer(todo[rank::world]), batch_size=None, num_workers=workers,
                            collate_fn=None)
        errors = [e for e in tqdm(loader, "reading shards", disable=rank != 0, mininterval=1) if e]
        if errors := [e for part in gather(errors) for e in part]:
            raise UserError(f"{len(errors)} of {len(shards)} shards cannot be used: {errors[0]}")
        self.shards, self.names, self.captions = shards, Strings(), Strings()
        places, broken = array("q"), []
        for shard, (path, kept) in enumerate(todo):
            content = json.loads(kept.read_text())
            broken += [f"{path.name}:{name}" for name in content["broken"]]
            for name, offset, size, caption in content["samples"]:
                self.names.append(name)
                self.captions.append(caption)
                places.extend((shard, offset, size))
        self.places = np.array(places).reshape(-1, 3)  # shard, offset, bytes of an image
        if broken:
            print_0(f"WARNING: {len(broken)} broken samples are left out: {shown(broken)} (all: "
                    f"{index})")
        if not len(self):
            raise UserError(f"no sample in the {len(shards)} shards of {root} is whole")

    def __len__(self):
        return len(self.names)

    def image(self, i):
        shard, offset, size = self.places[i].tolist()
        path = self.shards[shard]
        with reading(path, "shard"), open(path, "rb") as f:
            f.seek(offset)
            content = f.read(size)
        return decode(content, self.names[i], path)

    def name(self, i):
        return os.fsencode(f"{self.shards[self.places[i, 0]].name}:{self.names[i]}")

    @property
    def identity(self):
        """A short hash of the list of samples."""
        return digest(os.fsdecode(self.name(i)) for i in range(len(self)))

    def subset(self, chosen):
        """The samples of these indices."""
        part = copy.copy(self)
        part.places = self.places[chosen]
        part.names, part.captions = (Strings(texts[i] for i in chosen)
                                     for texts in (self.names, self.captions))
        return part


def _rank():
    distributed = torch.distributed.is_initialized()
    return ((torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed
            else (0, 1))


def decode(content, name, shard):
    """The bytes of an image in a shard -> PIL RGB. Errors: UserError."""
    with open_image(shard, f"image {name} in", content) as img:
        return to_rgb(img)


class _Indexer:
    """What a loader reads: item i reads shard i through, and returns the text of its error, or
    "". What is kept of a shard that has changed since is made anew."""

    def __init__(self, todo):
        self.todo = todo

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, i):
        path, kept = self.todo[i]
        try:
            now = {"size": path.stat().st_size, "time": path.stat().st_mtime_ns}
            then = json.loads(kept.read_text()) if kept.exists() else {}
            if then.items() >= now.items():
                return ""
            content = now | read_shard(path)
            write_atomically(kept, lambda f: f.write(json.dumps(content).encode()))
        except (UserError, ValueError) as e:
            return str(e)
        return ""


def read_shard(path):
    """{"samples": [image's name, offset, bytes, caption] each, "broken": names} of a tar."""
    found = {}  # key -> suffix -> (name, offset, bytes)
    with reading(path, "shard"), open(path, "rb") as f:
        f.seek(-min(1024, path.stat().st_size), 2)
        if f.read() != bytes(1024):  # a tar ends in 1024 zeros
            raise UserError(f"{path} is cut off: fetch it again, or take it away")
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, dot, suffix = member.name.rpartition(".")
                if member.isfile() and dot:
                    found.setdefault(key, {})[suffix.lower()] = (
                        member.name, member.offset_data, member.size)
        samples, broken = [], []
        for key, parts in found.items():
            images = [part for suffix, part in parts.items() if f".{suffix}" in IMAGE_TYPES]
            try:
                caption = ""
                if "txt" in parts:
                    _, offset, size = parts["txt"]
                    f.seek(offset)
                    caption = f.read(size).decode("utf-8").strip()
                name, offset, size = images[0]
                f.seek(offset)
                decode(f.read(size), name, path)
            except SystemFailure:
                raise
            except (UserError, UnicodeDecodeError, IndexError):
                caption = ""
            if caption:
                samples.append((name, offset, size, caption))
            else:
                broken.append(images[0][0] if images else key)
    return {"samples": samples, "broken": broken}


def open_captions(root, index, workers):
    """The images with captions in a folder; in its shards where it holds *.tar."""
    if not Path(root).is_dir():
        raise UserError(f"data folder not found: {root} (--captions: image + .txt, or *.tar)")
    if any(Path(root).glob("*.tar")):
        return CaptionShards(root, index, workers)
    return on_rank_0(CaptionFolder, root)


# ---- text encoders

def words_of(prompt):
    return re.findall(r"\w+", prompt.lower())


class Words:
    """The text encoder of the preset tiny: a small vocabulary, no weights. A token is the
    one-hot word and the one-hot place, the pooled text the number of times each word occurs."""
    identity, L = "words", 10

    def __init__(self, vocabulary):
        self.number = {word: i for i, word in enumerate(vocabulary)}
        self.T, self.P = len(self.number) + self.L, len(self.number)

    def __call__(self, prompts):
        """n prompts -> rows (n, L*T + P) float32."""
        text = np.zeros((len(prompts), self.L, self.T), np.float32)
        text[:, range(self.L), range(self.P, self.T)] = 1
        pooled = np.zeros((len(prompts), self.P), np.float32)
        for i, prompt in enumerate(prompts):
            words = words_of(prompt)
            if unknown := [word for word in words if word not in self.number]:
                raise UserError(f"the built-in text encoder does not know {shown(unknown)}; its "
                                f"words: {' '.join(self.number)} (or give --words, or --clip-text "
                                "and --t5)")
            if len(words) > self.L:
                warn_of_length(1, prompt, self.L)
            for place, word in enumerate(words[:self.L]):
                text[i, place, self.number[word]] = 1
                pooled[i, self.number[word]] += 1
        return np.concatenate([text.reshape(len(prompts), -1), pooled], axis=1)


class ClipT5:
    """FLUX's two text encoders through the package transformers, from local folders: T5's tokens,
    padded to L, without a mask; CLIP's pooled text, before its projection. In fp32."""

    def __init__(self, clip, t5, length, device):
        try:
            import transformers
        except ImportError:
            raise UserError("--clip-text and --t5 take the package transformers: pip install "
                            "transformers") from None
        transformers.logging.set_verbosity_error()
        self.parts, self.L, self.device = [], length, device
        for flag, folder, model in (("--clip-text", clip, transformers.CLIPTextModel),
                                    ("--t5", t5, transformers.T5EncoderModel)):
            if not Path(folder or "").is_dir() or not folder:
                raise UserError(f"{flag} {folder}: give a folder of transformers' layout "
                                "(config.json, weights, tokenizer)")
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True)
                network, report = model.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True)
            except Exception as e:  # the package may raise anything
                raise UserError(f"{flag} {folder} is no {model.__name__} of the package "
                                f"transformers: {str(e).splitlines()[0][:200]}") from e
            if report["missing_keys"]:
                raise UserError(f"{flag} {folder} is no {model.__name__}: it lacks "
                                f"{shown(sorted(report['missing_keys']))}")
            self.parts.append((tokenizer, network.float().requires_grad_(False).eval().to(device)))
        self.P, self.T = (network.config.hidden_size for _, network in self.parts)
        state = hashlib.sha256(str(length).encode())
        for _, network in self.parts:
            for name, tensor in sorted(network.state_dict().items()):
                state.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.identity = state.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, prompts):
        """n prompts -> rows (n, L*T + P) float32."""
        outputs = []
        for (tokenizer, network), length in zip(self.parts, (77, self.L)):
            long = [p for p in prompts if len(tokenizer(p)["input_ids"]) > length]
            if long:
                warn_of_length(len(long), long[0], length)
            ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                            return_tensors="pt")["input_ids"]
            outputs.append(network(input_ids=ids.to(self.device)))
        pooled, text = outputs[0].pooler_output, outputs[1].last_hidden_state
        return torch.cat([text.flatten(1), pooled], dim=1).float().cpu().numpy()


def warn_of_length(number, prompt, length):
    print_0(f"WARNING: {number} prompts are longer than the text encoder's {length} tokens, and "
            f"cut: {prompt[:60]!r} ...")


def cached_text(path, encoder, captions, batch_size, overwrite):
    """The rows of all captions, and of the empty prompt as the last one: a read-only memory map
    (n + 1, L*T + P) fp16, encoded once by all ranks. It belongs to one text encoder and these
    captions: any other is refused."""
    n, shape = len(captions), (encoder.L * encoder.T + encoder.P,)
    recipe = {"text encoder": encoder.identity, "captions": digest(captions)}
    rows = BatchedArray(path, n + 1, shape, np.float16, recipe, overwrite)
    if not rows.complete:
        print_0(f"encoding {n} captions into {path} ({(n + 1) * shape[0] * 2 / 2 ** 30:.2f} GiB)")
        bar = tqdm(rows.missing(batch_size), "encoding", disable=rows.rank != 0, mininterval=1)
        with rows.lock:
            for batch in bar:
                written = [captions[i] if i < n else "" for i in batch]
                part = encoder(written).astype(np.float16)
                if not np.isfinite(part).all():
                    raise UserError(
                        f"a caption of {batch[0]} to {batch[-1]} is not finite in fp16")
                rows.write(batch, part)
            rows.finish()
    with reading(path, "cache of captions (delete it to make it anew)"):
        rows = np.load(path, mmap_mode="r")
        if (rows.shape, rows.dtype) != ((n + 1, *shape), np.float16):
            raise ValueError(f"it holds {rows.dtype} {rows.shape}")
    return rows


# ---- prompts to draw

def read_prompts(file):
    """The lines of a file that are not empty."""
    with reading(file, "file of prompts"):
        prompts = [line.strip() for line in Path(file).read_text("utf-8").splitlines()]
    if not any(prompts):
        raise UserError(f"{file} holds no prompt (one a line)")
    return [prompt for prompt in prompts if prompt]


def save_captioned_grid(images, prompts, path, width=8):
    """Images (n, 3, H, W) in [-1, 1] as one PNG, image i over prompt i mod k."""
    pixels = to_uint8(images)
    cell = max(128, pixels.shape[2])
    lines = [textwrap.wrap(prompt, cell // 7)[:4] for prompt in prompts[:len(pixels)]]
    height = round(cell * pixels.shape[1] / pixels.shape[2])
    step, width = height + 12 * max(map(len, lines)) + 6, min(width, len(pixels))
    picture = Image.new("RGB", (width * cell, -(-len(pixels) // width) * step), "white")
    for i, image in enumerate(pixels):
        x, y = i % width * cell, i // width * step
        scaled = Image.fromarray(image).resize((cell, height), Image.BICUBIC)
        picture.paste(scaled, (x, y))
        ImageDraw.Draw(picture).text((x + 2, y + height + 2), "\n".join(lines[i % len(lines)]),
                                     fill="black")
    write_atomically(path, lambda f: picture.save(f, "PNG"))
