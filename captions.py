"""Images with captions, text encoders, and the cache of encoded captions, for text to image.

    folder     NAME.jpg beside NAME.txt, at any depth
    shards     *.tar as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json

A text encoder makes of a prompt one row of numbers: L text tokens of width T, one after the other,
then the pooled text. Text files are UTF-8, with or without a byte order mark.

Legend: n prompts, L text tokens, T their width, P width of the pooled text.
"""
import copy
import functools
import hashlib
import json
import os
import re
import tarfile
import textwrap
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    IMAGE_TYPES,
    ImageFolder,
    list_images,
    on_rank_0,
    open_image,
    shown,
    to_rgb,
    to_uint8,
)
from files import (
    BatchedArray,
    SystemFailure,
    UserError,
    gather,
    print_0,
    ranges,
    rank_and_world,
    reading,
    sha256,
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
        self.ignored.pop("of .txt", None)
        parts, _ = list_images(root, {".txt"}, "captions")
        texts = os.fsdecode(b"".join(names for _, names in parts)).split("\0")[:-1]
        images = [os.fsdecode(self.name(i)) for i in range(len(self))]
        by_stem = {os.path.splitext(text)[0]: text for text in texts}
        beside = [by_stem.get(os.path.splitext(image)[0]) for image in images]
        lacking = [image for image, text in zip(images, beside) if not text]
        alone = sorted(set(texts).difference(beside))
        for names, fault in ((lacking, "images without a caption (NAME.txt beside NAME.jpg)"),
                             (alone, "captions without an image")):
            if names:
                raise UserError(f"{root} holds {len(names)} {fault}: {shown(names)}")
        self.captions = Strings(read_text(f"{root}/{text}", "caption") for text in beside)
        if empty := [text for text, caption in zip(beside, self.captions) if not caption]:
            raise UserError(f"{root} holds {len(empty)} empty captions: {shown(empty)}")

    def subset(self, chosen):
        part = super().subset(chosen)
        part.captions = Strings(self.captions[i] for i in chosen)
        return part


def read_text(path, kind):
    with reading(path, kind):
        return Path(path).read_text("utf-8-sig").strip()


class CaptionShards:
    """The samples in the *.tar of a folder, in order. A sample whose image cannot be read, or that
    lacks image or caption, is left out; their number and names are told.

    The shards are dealt out to the ranks and their loaders' workers. Each is read through once;
    what was found is kept in `index`, a folder. Errors: UserError, as where a shard is cut off."""
    labels, classes = None, []

    def __init__(self, root, index, workers=0):
        shards = sorted(Path(root).glob("*.tar"))
        index, (rank, world) = Path(index), rank_and_world()
        index.mkdir(parents=True, exist_ok=True)
        todo = [(path, index / f"{path.stem}.json") for path in shards]
        loader = DataLoader(_Indexer(todo[rank::world]), batch_size=None, num_workers=workers,
                            collate_fn=None)
        errors = [e for e in tqdm(loader, "reading shards", disable=rank != 0, mininterval=1) if e]
        if errors := [e for part in gather(errors) for e in part]:
            raise UserError(f"{len(errors)} of {len(shards)} shards cannot be used: {errors[0]}")
        self.root, self.shards, self.names, self.captions = root, shards, Strings(), Strings()
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

    def __str__(self):
        others = sum(path.suffix != ".tar" for path in Path(self.root).iterdir())
        return (f"{self.root}: {len(self.shards):,} shards, {len(self):,} images"
                + (f"; ignored: {others} other files or folders" if others else ""))

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


def decode(content, name, shard):
    """The bytes of an image in a shard -> PIL RGB. Errors: UserError."""
    with open_image(shard, f"image {name} in", content) as img:
        return to_rgb(img)


class _Indexer:
    """What a loader reads: item i reads shard i through, and returns the text of its error, or
    "". What is kept of a shard is made anew where the shard has changed since, or it is damaged, or
    older code has made it."""
    version = 2  # of read_shard

    def __init__(self, todo):
        self.todo = todo

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, i):
        path, kept = self.todo[i]
        try:
            with reading(path, "shard"):
                now = path.stat()
            try:
                then = json.loads(kept.read_bytes())
                known = then["version"], then["size"], then["time"]
                if known == (self.version, now.st_size, now.st_mtime_ns):
                    return ""
            except (OSError, ValueError, TypeError, KeyError):
                pass
            content = {"version": self.version, "size": now.st_size, "time": now.st_mtime_ns}
            content |= read_shard(path)
            write_atomically(kept, lambda f: f.write(json.dumps(content).encode()))
        except UserError as e:
            return str(e)
        return ""


def read_shard(path):
    """{"samples": [image's name, offset, bytes, caption] each, "broken": names} of a tar."""
    found = {}  # key -> suffix -> (name, offset, bytes)
    with reading(path, "shard"), open(path, "rb") as f:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, dot, suffix = member.name.rpartition(".")
                if member.isfile() and dot:
                    found.setdefault(key, {})[suffix.lower()] = (
                        member.name, member.offset_data, member.size)
        # tarfile takes a damaged header for the end, and zeros, as in a download's missing part.
        # At the true end are some blocks of 512 zeros, up to 10 KiB by default.
        f.seek(tar.offset)
        end = f.read(2 ** 16 + 1)
        if not 512 <= len(end) <= 2 ** 16 or end.strip(b"\0"):
            raise UserError(f"{path} is damaged at byte {tar.offset}, or cut off there: fetch it "
                            "again, or take it away")
        samples, broken = [], []
        for key, parts in found.items():
            images = [part for suffix, part in parts.items() if f".{suffix}" in IMAGE_TYPES]
            try:
                caption = ""
                if "txt" in parts:
                    _, offset, size = parts["txt"]
                    f.seek(offset)
                    caption = f.read(size).decode("utf-8-sig").strip()
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
        data = CaptionShards(root, index, workers)
    else:
        data = on_rank_0(CaptionFolder, root)
    print_0(data)
    return data


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

    def known(self, prompt):
        """The words of a prompt. Errors: UserError for one that is not in the vocabulary."""
        words = words_of(prompt)
        if unknown := [word for word in words if word not in self.number]:
            raise UserError(f"the built-in text encoder does not know {shown(unknown)}; its "
                            f"words: {' '.join(self.number)} (or give --words, or --clip-text and "
                            "--t5)")
        return words

    def cut(self, prompts):
        """{number of tokens: how many prompts are longer, and lose what is beyond}."""
        return Counter(self.L for prompt in prompts if len(self.known(prompt)) > self.L)

    def rest(self):
        pass

    def __call__(self, prompts):
        """n prompts -> rows (n, L*T + P) float32."""
        text = np.zeros((len(prompts), self.L, self.T), np.float32)
        text[:, range(self.L), range(self.P, self.T)] = 1
        pooled = np.zeros((len(prompts), self.P), np.float32)
        for i, prompt in enumerate(prompts):
            for place, word in enumerate(self.known(prompt)[:self.L]):
                text[i, place, self.number[word]] = 1
                pooled[i, self.number[word]] += 1
        return np.concatenate([text.reshape(len(prompts), -1), pooled], axis=1)


class ClipT5:
    """FLUX's two text encoders through the package transformers, from local folders: T5's tokens,
    padded to L, without a mask; CLIP's pooled text, before its projection. In fp32.

    A folder named text_encoder may have its tokenizer in `tokenizer` beside it, as in FLUX's
    release. The networks are loaded when they are first used: a complete cache needs none."""

    def __init__(self, clip, t5, length, device):
        try:
            import transformers
        except ImportError:
            raise UserError("--clip-text and --t5 take the package transformers: pip install "
                            "transformers") from None
        transformers.logging.set_verbosity_error()
        if not clip or not t5:
            raise UserError("--clip-text and --t5 go together: two folders of transformers' layout "
                            "(config.json, weights, tokenizer)")
        self.L, self.device, self.tokenizers, self.sources = length, device, [], []
        files, widths = [], []
        models = transformers.CLIPTextModel, transformers.T5EncoderModel
        for folder, model in zip((clip, t5), models):
            folder = words = Path(os.path.abspath(folder))
            if not (folder / "tokenizer_config.json").exists():
                words = folder.parent / folder.name.replace("text_encoder", "tokenizer")
            with reading(words / "tokenizer_config.json", "tokenizer"):
                self.tokenizers.append(transformers.AutoTokenizer.from_pretrained(
                    words, local_files_only=True))
            with reading(folder / "config.json", model.__name__):
                widths.append(model.config_class.from_pretrained(
                    folder, local_files_only=True).hidden_size)
            self.sources.append((folder, model))
            weights = set(folder.glob("*.safetensors")) or set(folder.glob("*.bin"))
            texts = {path for path in words.iterdir() if path.suffix in (".json", ".txt", ".model")}
            files += sorted({folder / "config.json"} | texts | weights,
                            key=lambda path: (path.name, path.parent == words))
        self.P, self.T = widths
        self.identity = on_rank_0(lambda: digest([str(length), *map(sha256, files)]))

    @functools.cached_property
    def networks(self):
        found = []
        for folder, model in self.sources:
            with reading(folder / "config.json", model.__name__):
                network, report = model.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True)
            if report["missing_keys"]:
                raise UserError(f"{folder} is no {model.__name__}: it lacks "
                                f"{shown(sorted(report['missing_keys']))}")
            found.append(network.float().requires_grad_(False).eval())
        return found

    def rest(self):
        """Leaves the device until the next call: T5-XXL takes 19 GB of it."""
        for network in self.networks:
            network.to("cpu")

    def cut(self, prompts):
        """{number of tokens: how many prompts are longer, and lose what is beyond}."""
        return Counter(
            length for tokenizer, length in zip(self.tokenizers, (77, self.L))
            for prompt in prompts if len(tokenizer(prompt)["input_ids"]) > length)

    @torch.no_grad()
    def __call__(self, prompts):
        """n prompts -> rows (n, L*T + P) float32."""
        outputs = []
        for tokenizer, network, length in zip(self.tokenizers, self.networks, (77, self.L)):
            ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                            return_tensors="pt")["input_ids"]
            outputs.append(network.to(self.device)(input_ids=ids.to(self.device)))
        pooled, text = outputs[0].pooler_output, outputs[1].last_hidden_state
        return torch.cat([text.flatten(1), pooled], dim=1).float().cpu().numpy()


def warn_of_cut(cut):
    """cut: see Words.cut."""
    for length, number in cut.items():
        print_0(f"WARNING: {number} prompts are longer than the text encoder's {length} tokens, "
                "and cut")


class Rows:
    """The rows of prompts, and of the empty one as the last. `ahead` are encoded at once, the first
    of them now, before the generator fills a GPU, and the encoder rests in between: with T5-XXL a
    row is 4 MiB."""

    def __init__(self, encoder, prompts, ahead=256):
        self.encoder, self.prompts, self.ahead, self.known = encoder, [*prompts, ""], ahead, {}
        self.row(-1)

    def __len__(self):
        return len(self.prompts)

    def row(self, i):
        if i not in self.known:
            first = max(i, 0)
            chosen = [*range(first, min(first + self.ahead, len(self) - 1)), -1]
            self.known = {}
            for batch in ranges(len(chosen), 32):
                some = [chosen[j] for j in batch]
                self.known |= zip(some, self.encoder([self.prompts[j] for j in some]))
            self.encoder.rest()
        return self.known[i]

    def __getitem__(self, indices):
        return np.stack([self.row(i) for i in indices.tolist()])


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
        cut = Counter()
        with rows.lock:
            for batch in bar:
                texts = [captions[i] if i < n else "" for i in batch]
                cut += encoder.cut(texts)
                part = encoder(texts).astype(np.float16)
                if not np.isfinite(part).all():
                    raise UserError(
                        f"a caption of {batch[0]} to {batch[-1]} is not finite in fp16")
                rows.write(batch, part)
            rows.finish()
        warn_of_cut(sum(gather(cut), Counter()))
    return rows.mapped("cache of captions")


# ---- prompts to draw

def read_prompts(file):
    """The lines of a file that are not empty."""
    prompts = [line.strip() for line in read_text(file, "file of prompts").split("\n")]
    if not any(prompts):
        raise UserError(f"{file} holds no prompt (one a line)")
    return [prompt for prompt in prompts if prompt]


def save_captioned_grid(images, prompts, path, width=8):
    """Images (n, 3, H, W) in [-1, 1] as one PNG, image i over prompt i mod k, at most four lines
    of it."""
    pixels = to_uint8(images)
    cell = max(128, pixels.shape[2])
    texts = ["\n".join(textwrap.wrap(prompt, cell // 7, max_lines=4, placeholder=" ..."))
             for prompt in prompts[:len(pixels)]]
    height = round(cell * pixels.shape[1] / pixels.shape[2])
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    below = max(pen.multiline_textbbox((0, 0), text)[3] for text in texts)
    step, width = height + int(below) + 6, min(width, len(pixels))
    picture = Image.new("RGB", (width * cell, -(-len(pixels) // width) * step), "white")
    pen = ImageDraw.Draw(picture)
    for i, image in enumerate(pixels):
        x, y = i % width * cell, i // width * step
        scaled = Image.fromarray(image).resize((cell, height), Image.BICUBIC)
        picture.paste(scaled, (x, y))
        pen.text((x + 2, y + height + 2), texts[i % len(texts)], fill="black")
    write_atomically(path, lambda f: picture.save(f, "PNG"))
