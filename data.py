"""Images: files, preprocessing, folders and labels, order, loaders.

    files -> uint8 pixels (3, H, W) -> float in [-1, 1] on the device

All randomness is a function of (seed, purpose, stage, epoch, image): neither a resume nor
workers or ranks change it.
"""
import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import signal
import struct
import warnings
import zlib
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from files import (
    STOP_SIGNALS,
    SystemFailure,
    UserError,
    gather,
    print_0,
    ranges,
    reading,
    system_failure,
    write_atomically,
)


def rng(*key):
    """A generator for a key such as (seed, "augment", stage, epoch, image)."""
    return np.random.default_rng([k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key])


# ---- image files

# Known by their content, whatever the name; no PostScript, which is a program
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGE_TYPES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif",
               ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"}
MAX_ASPECT = 100  # 1 x 5000 px would become 256 x 1,280,000
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 24  # bytes; PIL's 2^20 refuse large colour profiles


def check_png(f):
    """Raises OSError unless every chunk has its CRC, up to the last one, IEND. PIL leaves out the
    CRCs of the pixels."""
    f.seek(8)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", f.read(8))
        if zlib.crc32(f.read(length), zlib.crc32(kind)) != int.from_bytes(f.read(4), "big"):
            raise OSError("truncated, or a chunk's CRC differs")


def with_end(jpeg):
    """The bytes of a JPEG that has no end marker, with one. OSError where more is missing: then the
    pixels depend on what stands in its place. Of several scans, or parts between restart markers,
    a whole one may be missing, which nothing tells."""
    with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as img:
        first = jpeg.rindex(b"\xff\xda", 0, img.fp.tell())  # the scan that PIL has come to
        one = jpeg[first + 4] == img.layers  # with all channels
    one = one and not any(marker in jpeg for marker in (b"\xff\xc2", b"\xff\xdd"))
    jpeg = jpeg.removesuffix(b"\xff")  # half of the marker
    fillers = b"", b"\x33" * 999, b"\x55" * 999, b"\xaa" * 999, b"\xfe" * 999
    whole = [jpeg + filler + b"\xff\xd9" for filler in fillers]
    if not one or len({Image.open(io.BytesIO(w), formats=("JPEG",)).tobytes() for w in whole}) > 1:
        raise OSError("truncated: it has no end")
    return whole[0]


@contextlib.contextmanager
def open_image(path, kind="image", content=None):
    """An image file as PIL opens it, before its pixels are read. content: the bytes of an image
    that is a part of the file; kind then names it.

    UserError where it is damaged (inside the `with` too), has more than 89 megapixels (PIL's
    limit), or is more than 100 times as long as wide."""
    with reading(path, kind), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        file = path if content is None else io.BytesIO(content)
        with Image.open(file, formats=IMAGE_FORMATS) as img:
            if max(img.size) > MAX_ASPECT * min(img.size):
                raise ValueError(f"{img.width}x{img.height}, more than {MAX_ASPECT} times as long "
                                 "as wide")
            if img.format == "PNG":
                with open(path, "rb") if content is None else io.BytesIO(content) as f:
                    check_png(f)
            # PIL has read up to the pixels; libjpeg does not always notice a missing end
            elif img.format == "JPEG" and b"\xff\xd9" not in img.fp.read():
                img.fp.seek(0)
                whole = with_end(img.fp.read())
                img = Image.open(io.BytesIO(whole), formats=("JPEG",))
            yield img


def load_image(path):
    """Image file -> PIL RGB: EXIF orientation applied, transparency on white, the first frame of
    several, 8 bits (see levels). Errors: see open_image."""
    with open_image(path) as img:
        return to_rgb(img)


def load_pixels(path):
    """The same as uint8 (3, H, W). Plain JPEG files are decoded by torchvision's libjpeg: PIL's
    values in half of the time."""
    with open_image(path) as img:
        plain = img.mode in ("RGB", "L") and not {"exif", "xmp"} & img.info.keys()
        if img.format != "JPEG" or not plain or not has_decode_jpeg():
            return to_pixels(to_rgb(img))
        img.fp.seek(0)
        try:
            return decode_jpeg(img.fp.read())
        except RuntimeError:  # PIL says what is wrong, or reads it
            return to_pixels(to_rgb(img))


def decode_jpeg(jpeg):
    content = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(content, torchvision.io.ImageReadMode.RGB)


@functools.cache
def has_decode_jpeg():
    """Whether torchvision was built with libjpeg."""
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    try:
        return decode_jpeg(jpeg.getvalue()).shape == (3, 8, 8)
    except (AttributeError, RuntimeError):
        return False


def to_rgb(img):
    wide = ";16" in str(img.tile)  # of several channels PIL keeps the upper 8 bits
    img.load()
    try:
        ImageOps.exif_transpose(img, in_place=True)
    except Exception as e:  # damaged EXIF tells no orientation
        if system_failure(e):
            raise
    if img.mode.startswith("I") or img.mode == "F":
        img = Image.fromarray(levels(img))
    elif wide and 0 < max(high for _, high in img.convert("RGB").getextrema()) < 16:
        raise ValueError(DARK)
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img if img.mode == "RGB" else img.convert("RGB")


DARK = ("its 16-bit values fill at most 12 bits, and white is 65535: it would be almost black; "
        "scale them to the whole range")


def levels(img):
    """PIL image of one channel of more than 8 bits -> uint8 (H, W). White is 1 of floats, 65535 of
    integers, 4095 where a TIFF says that it has 12 bits. ValueError where this would be a guess:
    other floats, integers beyond, and 16 bits of which the upper four are not used."""
    grey = np.asarray(img, np.float32)
    low, high = grey.min(), grey.max()
    if img.mode == "F":
        if not 0 <= low <= high <= 1:
            raise ValueError(f"floats from {low:g} to {high:g}: scale them to [0, 1]")
        return (255 * grey).round().astype(np.uint8)
    bits = getattr(img, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE)
    white = 4095 if bits == (12,) else 65535
    if low < 0 or high > white:
        raise ValueError(f"integers from {low:.0f} to {high:.0f}: scale them to 8 or 16 bits")
    if white == 65535 and 0 < 16 * high < white:
        raise ValueError(DARK)
    return (grey * (255 / white)).astype(np.uint8)


# ---- the preprocessing

def center_crop(img, size):
    """ADM's centre crop, for evaluation and latents: halved by a box filter while twice too large,
    resized (bicubic) to the short side `size`, cropped. PIL RGB -> PIL RGB."""
    while min(img.size) >= 2 * size:
        img = img.resize((img.width // 2, img.height // 2), Image.BOX)
    scale = size / min(img.size)
    img = img.resize((round(img.width * scale), round(img.height * scale)), Image.BICUBIC)
    left, top = (img.width - size) // 2, (img.height - size) // 2
    return img.crop((left, top, left + size, top + size))


def random_crop(pixels, size, r):
    """For tokenizer training: a random square of the short side, resized to `size`, flipped half of
    the time. uint8 (3, H, W) -> uint8 (3, size, size).

    torch's bicubic filter is several times as fast as PIL's."""
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
    """Float (B, 3, H, W) in [-1, 1] -> uint8 numpy (B, H, W, 3), rounded and clipped."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(rows, path):
    """Writes rows of images, each (n, 3, H, W) in [-1, 1], as one PNG."""
    rows = [np.concatenate(list(to_uint8(row)), axis=1) for row in rows]
    picture = Image.fromarray(np.concatenate(rows))
    write_atomically(path, lambda f: picture.save(f, "PNG"))


# ---- folders and labels

SYSTEM_FOLDERS = {"@eadir", "lost+found", "system volume information", "$recycle.bin"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}


def list_images(root, types=IMAGE_TYPES, kind="images"):
    """The image files below a folder, sorted by path, and what else is there. types: their
    suffixes, or those of other files; kind: how an error calls them.

    (parts, ignored). A part is (a folder directly in root, or "" for files in root itself; their
    paths from root, each with a zero byte behind it). ignored: counts of other files by suffix, of
    hidden files, and of folders that a system or a program has left."""
    ignored = Counter()

    def names_in(folder):
        """Sorted as paths are: a folder's name ends in /."""
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                hidden, suffix = name.startswith("."), name[name.rfind("."):].lower()
                # no link to a file is followed: that would take a stat each
                if suffix in types and not hidden and not entry.is_dir(follow_symlinks=False):
                    names.append(name)
                elif not entry.is_dir():
                    ignored["hidden" if hidden else f"of {suffix}" if "." in name
                            else "without suffix"] += 1
                elif hidden or name.startswith("__") or name.lower() in SYSTEM_FOLDERS:
                    ignored["hidden or system folders"] += 1
                elif (entry.is_symlink() and Path(folder).resolve().is_relative_to(
                        Path(entry.path).resolve())):
                    raise UserError(f"{entry.path} is a link to a folder that it lies in")
                else:
                    names.append(f"{name}/")
        return sorted(names)

    def below(folder, names):
        for name in names:
            if name.endswith("/"):
                yield from below(f"{folder}{name}", names_in(f"{root}/{folder}{name[:-1]}"))
            else:
                yield f"{folder}{name}\0"

    try:
        top = groupby(names_in(root), lambda name: name[:-1] if name.endswith("/") else "")
        parts = [(part, os.fsencode("".join(below("", names)))) for part, names in top]
    except FileNotFoundError:
        raise UserError(f"data folder not found: {root} (--data DIR: a folder per class, or "
                        "flat)") from None
    except OSError as e:
        raise SystemFailure(f"cannot list the data folder {e.filename}: {e.strerror}") from None
    if not any(names for _, names in parts):
        raise UserError(f"no {kind} in {root} (looked for {' '.join(sorted(types))})")
    return parts, ignored


class ImageFolder:
    """The image files below a folder, in the order of their paths.

    classes: the names of the folders directly in it, sorted, with or without images; [] where it is
    flat. Those of the training images are given to the held-out ones; () asks for none. labels:
    the classes' numbers (n,), or None. Errors: UserError.

    The names are bytes and offsets: a loader's worker would copy what it touches of a list."""

    def __init__(self, root, classes=None):
        parts, self.ignored = list_images(root)
        self.root, self.labels = str(root), None
        self.names = b"".join(names for _, names in parts)
        ends = np.flatnonzero(np.frombuffer(self.names, np.uint8) == 0)
        self.starts = np.append(0, ends[:-1] + 1)  # of the image's name in names
        folders = sorted(part for part, _ in parts if part)
        loose = [names for part, names in parts if not part]
        if classes is None and loose and any(names for part, names in parts if part):
            name = os.fsdecode(loose[0].split(b"\0")[0])
            raise UserError(f"{self.root}/{name} lies beside class folders: move it away, or into "
                            "one of them")
        if loose or classes is not None and not classes:
            self.classes = []
            return
        splits = [name for name in folders if name.lower() in SPLITS]
        if classes is None and (len(splits) > 1 or folders == ["train"]):
            first = min(splits, key=lambda name: "train" not in name.lower())
            raise UserError(f"{self.root} holds {shown(splits)}, which are no classes: give "
                            f"--data {self.root}/{first}")
        self.classes = folders if classes is None else list(classes)
        number = {name: i for i, name in enumerate(self.classes)}
        if unknown := [name for name in folders if name not in number]:
            raise UserError(f"{root}: {shown(unknown)} is no class of the training images (a flat "
                            "folder serves without labels)")
        numbers, counts = zip(*((number[part], names.count(b"\0")) for part, names in parts))
        self.labels = np.repeat(np.array(numbers, np.int32), counts)

    def __len__(self):
        return len(self.starts)

    def __str__(self):
        text = f"{len(self):,} images"
        if self.classes:
            few = [self.classes[0], *["..."] * (len(self.classes) > 2), *self.classes[1:][-1:]]
            K = len(self.classes)
            text = f"{K:,} class{'es' * (K > 1)} ({' '.join(few)}), {text}"
        if self.ignored:
            text += "; ignored: " + ", ".join(f"{n} {kind}" for kind, n in self.ignored.items())
        return f"{self.root}: {text}"

    def subset(self, chosen):
        """The images of these indices; the classes stay."""
        part = copy.copy(self)
        vars(part).pop("identity", None)
        part.starts = self.starts[chosen]
        part.labels = None if self.labels is None else self.labels[chosen]
        return part

    def name(self, i):
        """The path from root, as bytes."""
        return self.names[self.starts[i]:self.names.index(b"\0", self.starts[i])]

    def path(self, i):
        return f"{self.root}/{os.fsdecode(self.name(i))}"

    @functools.cached_property
    def identity(self):
        """A short hash of the list of files."""
        digest = hashlib.sha256()
        for batch in ranges(len(self), 4096):
            digest.update(b"\n" * (batch.start > 0) + b"\n".join(map(self.name, batch)))
        return digest.hexdigest()[:16]

    def image(self, i):
        return load_image(self.path(i))

    def pixels(self, i):
        return load_pixels(self.path(i))


def shown(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_folders(data, val, val_images):
    """(training images, held-out images), with the same classes. Held out: the folder `val` if
    given, else a folder `val` beside a folder `train`, else a fixed random 5 % of the files, at
    most val_images."""
    root, train = Path(os.path.abspath(data)), ImageFolder(data)  # "." has no name
    print_0(train)
    if not has_decode_jpeg():
        print_0("NOTE: torchvision is built without libjpeg: PIL decodes JPEG files, in twice the "
                "time")
    classes = train.classes
    if val is None and root.name == "train" and root.with_name("val").is_dir():
        val = root.with_name("val")
        if not any((val / name).is_dir() for name in classes):
            classes = []  # of another layout, such as Tiny ImageNet's
    if val is not None:
        held_out = ImageFolder(val, classes)
        print_0(f"held out: {held_out}")
        if train.classes and held_out.labels is None:
            print_0(f"NOTE: {val} is not in the class folders of {root}: it serves without "
                    "labels, and the linear probe is left out")
    else:
        if len(train) < 2:
            raise UserError(
                f"{root} holds one image; at least two are needed, one to validate on")
        order = rng("held out").permutation(len(train))
        n = min(val_images, max(1, len(train) // 20))
        print_0(f"held out: {n:,} of them")
        train, held_out = (train.subset(np.sort(part)) for part in (order[n:], order[:n]))
    if train.classes:
        counts = np.bincount(train.labels, minlength=len(train.classes))
        if empty := [train.classes[i] for i in np.flatnonzero(counts == 0)]:
            print_0(f"NOTE: no training image in {len(empty)} of the classes: {shown(empty)}")
    return train, held_out


def on_rank_0(make, *args):
    """make(*args), or its UserError, computed by rank 0 alone and sent to the others."""
    result = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = [make(*args)]
        except UserError as e:
            result = [e]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


# ---- order, loaders

class Crops(Dataset):
    """What a loader reads: item (epoch, i) is image i as uint8 (3, size, size), randomly cropped
    if there is a key, else centre-cropped; its label, or 0; and standard normal noise of shape
    `noise`, for a VAE or VFM-VAE.

    An unreadable image gives its UserError: what a worker raises arrives with a traceback."""

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
            return e
        item = pixels, 0 if self.data.labels is None else int(self.data.labels[i])
        if self.noise:
            r = rng(*self.key, "noise", epoch, i)
            item += (torch.from_numpy(r.standard_normal(self.noise, np.float32)),)
        return item


class ShuffledBatches:
    """The endless order of images, shuffled anew in each epoch, as one rank's batches of (epoch,
    image). A global batch is `accum` micro-batches in a row, each split over the ranks: its images
    are the same for any number of ranks."""

    def __init__(self, n, batch_size, key, first_step=0, accum=1, rank=0, world=1):
        self.n, self.key, self.start = n, key, first_step * batch_size
        self.micro_batch, self.rank, self.world = batch_size // accum, rank, world
        self.shuffles = {}

    def at(self, position):
        """(epoch, image) at a position of the endless order."""
        epoch, within = divmod(position, self.n)
        if epoch not in self.shuffles:
            # a batch may reach back into the epoch before
            self.shuffles = {e: s for e, s in self.shuffles.items() if e == epoch - 1}
            self.shuffles[epoch] = rng(*self.key, epoch).permutation(self.n)
        return epoch, int(self.shuffles[epoch][within])

    def __iter__(self):
        size = self.micro_batch // self.world
        first = self.start + self.rank * size
        while True:
            yield [self.at(first + j) for j in range(size)]
            first += self.micro_batch


def in_order(n, batch_size):
    """Batches of the images 0..n-1, for evaluation."""
    return [[(0, i) for i in batch] for batch in ranges(n, batch_size)]


def at_random(n, batch_size, total):
    """Batches of a fixed random choice of n of `total` images, in order, for evaluation. (The first
    n would be of the first classes.)"""
    chosen = sorted(rng("encode").permutation(total)[:n].tolist())
    return [[(0, chosen[i]) for _, i in batch] for batch in in_order(len(chosen), batch_size)]


def collate(items):
    broken = [item for item in items if isinstance(item, UserError)]
    return broken[0] if broken else default_collate(items)


def keep_loading(_):
    """In a loader's worker: ignores signals to the whole process group. The main process obeys
    them, and needs its workers until the step is done."""
    for s in STOP_SIGNALS:
        signal.signal(s, signal.SIG_IGN)


def batches(dataset, order, workers, device):
    """Yields batches, such as (images, labels), on the device. An unreadable image is a UserError
    before its batch."""
    loader = DataLoader(
        dataset, batch_sampler=order, num_workers=workers, collate_fn=collate,
        worker_init_fn=keep_loading, pin_memory=device.type == "cuda",
        generator=torch.Generator())  # else it would draw from torch's global one
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        batch = [part.to(device, non_blocking=True) for part in batch]
        if isinstance(dataset, Crops):
            batch[0] = to_tensor(batch[0])  # only here: uint8 is a quarter of the bytes
        yield batch


def check_images(sets, args, rank=0, world=1):
    """--check-data, --skip-unreadable: all ranks decode all images. unreadable.json in --out then
    names those that cannot be, with the reason, for each list of images.

    Returns the sets, with --skip-unreadable without these images. That takes them from the file
    where it is there, so that a resume sees the same images. UserError: there are some and the flag
    is not given, or more than 1 % of a set."""
    record, known = Path(args.out) / "unreadable.json", {}
    if args.skip_unreadable and not args.check_data and not args.overwrite:
        known = on_rank_0(read_record, record)
    for images in sets:
        if images.identity not in known:
            known[images.identity] = unreadable(images, args, rank, world)
    if rank == 0:
        write_atomically(record, lambda f: f.write(json.dumps(known, indent=1).encode()))
    readable = []
    for images in sets:
        bad = known[images.identity]
        if bad:
            text = f"{len(bad)} of {len(images)} images cannot be read, named in {record}"
            if not args.skip_unreadable:
                raise UserError(f"{text}, such as {next(iter(bad.values()))}; --skip-unreadable "
                                "goes on without them")
            if 100 * len(bad) > len(images):
                raise UserError(f"{text}: more than 1 %")
            print_0(f"left out: {text}")
            images = images.subset([i for i in range(len(images))
                                    if os.fsdecode(images.name(i)) not in bad])
        readable.append(images)
    return readable


def read_record(path):
    if not path.exists():
        return {}
    with reading(path, "record"):
        return {str(k): dict(names) for k, names in json.loads(path.read_text()).items()}


def unreadable(images, args, rank, world):
    """name -> error of the images that cannot be decoded."""
    bad, order = {}, ranges(len(images), 32)[rank::world]
    loader = DataLoader(Crops(images, args.size), num_workers=args.workers, collate_fn=list,
                        worker_init_fn=keep_loading,
                        batch_sampler=([(0, i) for i in batch] for batch in order))
    bar = tqdm(loader, "checking images", len(order), disable=rank != 0, mininterval=1)
    for batch, items in zip(order, bar):
        for i, item in zip(batch, items):
            if isinstance(item, SystemFailure):
                raise item
            if isinstance(item, UserError):
                bad[os.fsdecode(images.name(i))] = str(item)
    return {name: text for part in gather(bad) for name, text in sorted(part.items())}
