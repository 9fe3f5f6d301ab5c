"""Images: files, preprocessing, folders and labels, order, loaders.

    files -> uint8 pixels (3, H, W) -> float in [-1, 1] on the device

All randomness is a function of (seed, purpose, stage, epoch, image): neither a resume nor
workers or ranks change it.
"""
import contextlib
import hashlib
import os
import signal
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from files import STOP_SIGNALS, UserError, gather, ranges, reading, write_atomically


def rng(*key):
    """A generator for a key such as (seed, "augment", stage, epoch, image)."""
    return np.random.default_rng([k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key])


# ---- image files

# Known by their content, whatever the name; no PostScript, which is a program
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_ASPECT = 100  # 1 x 5000 px would become 256 x 1,280,000


def check_png(path):
    """Raises OSError unless every chunk has its CRC, up to the last one, IEND. PIL leaves out the
    CRCs of the pixels."""
    with open(path, "rb") as f:
        f.seek(8)
        kind = b""
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", f.read(8))
            if zlib.crc32(f.read(length), zlib.crc32(kind)) != int.from_bytes(f.read(4), "big"):
                raise OSError("truncated, or a chunk's CRC differs")


@contextlib.contextmanager
def open_image(path):
    """An image file as PIL opens it, before its pixels are read.

    UserError where it is damaged (inside the `with` too), has more than 89 megapixels (PIL's
    limit), or is more than 100 times as long as wide."""
    with reading(path, "image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=IMAGE_FORMATS) as img:
            if max(img.size) > MAX_ASPECT * min(img.size):
                raise ValueError(f"{img.width}x{img.height}, more than {MAX_ASPECT} times as long "
                                 "as wide")
            if img.format == "PNG":
                check_png(path)
            # PIL has read up to the pixels; libjpeg does not always notice a missing end
            elif img.format == "JPEG" and b"\xff\xd9" not in img.fp.read():
                raise OSError("truncated: it has no end")
            yield img


def load_image(path):
    """Image file -> PIL RGB: EXIF orientation applied, transparency on white, 16-bit grey scaled to
    8 bits, the first frame of several. Errors: see open_image."""
    with open_image(path) as img:
        return to_rgb(img)


def load_pixels(path):
    """The same as uint8 (3, H, W). Plain JPEG files are decoded by torchvision's libjpeg: PIL's
    values in half of the time."""
    with open_image(path) as img:
        plain = img.mode in ("RGB", "L") and not {"exif", "xmp"} & img.info.keys()
        if img.format != "JPEG" or not plain:
            return to_pixels(to_rgb(img))
        img.fp.seek(0)
        data = torch.frombuffer(bytearray(img.fp.read()), dtype=torch.uint8)
        return torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)


def to_rgb(img):
    img.load()
    with contextlib.suppress(Exception):  # damaged EXIF tells no orientation
        ImageOps.exif_transpose(img, in_place=True)
    if img.mode.startswith("I") or img.mode == "F":  # 16 bits in practice
        grey = (np.asarray(img, np.float32) / 257).clip(0, 255)
        img = Image.fromarray(grey.astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img if img.mode == "RGB" else img.convert("RGB")


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

def list_images(root):
    """All image files below a folder, sorted by name."""
    if not Path(root).is_dir():
        raise UserError(f"data folder not found: {root} (--data DIR: a folder per class, or flat)")

    def refuse(error):  # os.walk would skip the folder
        raise UserError(f"cannot list the data folder {error.filename}: {error.strerror}")

    files = []
    for d, _, names in os.walk(root, followlinks=True, onerror=refuse):
        if os.path.islink(d) and Path(d).parent.resolve().is_relative_to(Path(d).resolve()):
            raise UserError(f"{d} is a link to a folder that it lies in")
        files += [os.path.join(d, name) for name in names if not name.startswith(".")
                  and os.path.splitext(name)[1].lower() in IMAGE_TYPES]
    files.sort()
    if not files:
        raise UserError(f"no images in {root} (looked for {' '.join(sorted(IMAGE_TYPES))})")
    return files


class ImageFolder:
    """The image files below a folder. labels: numbers of the classes (sorted folder names), or None
    where it is flat. identity: a short hash of the list of files."""

    def __init__(self, root, files=None):
        self.root, self.files = str(root), files or list_images(root)
        parts = [os.path.relpath(f, root).split(os.sep) for f in self.files]
        flat = not all(len(p) > 1 for p in parts)
        self.classes = [] if flat else sorted({p[0] for p in parts})
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = None if flat else [number[p[0]] for p in parts]
        names = os.fsencode("\n".join("/".join(p) for p in parts))  # a name need not be UTF-8
        self.identity = hashlib.sha256(names).hexdigest()[:16]

    def __len__(self):
        return len(self.files)

    def image(self, i):
        return load_image(self.files[i])

    def pixels(self, i):
        return load_pixels(self.files[i])


def open_folders(data, val, val_images):
    """(training images, held-out images). Held out: the folder `val` if given, else a folder `val`
    beside a folder `train`, else a fixed random 5 % of the files, at most val_images."""
    root = Path(data)
    if val is None and root.name == "train" and root.with_name("val").is_dir():
        val = root.with_name("val")
    if val is not None:
        train, held_out = ImageFolder(root), ImageFolder(val)
        if held_out.classes and held_out.classes != train.classes:
            raise UserError(f"{val} and {root} hold different classes")
        return train, held_out
    files = list_images(root)
    if len(files) < 2:
        raise UserError(f"{root} holds one image; at least two are needed, one to validate on")
    order = rng("held out").permutation(len(files))
    n = min(val_images, max(1, len(files) // 20))
    train, held_out = (ImageFolder(root, [files[i] for i in sorted(part)])
                       for part in (order[n:], order[:n]))
    if train.classes != held_out.classes:  # too few images: no probe
        held_out.labels = None
    return train, held_out


# ---- order, loaders

class Crops(Dataset):
    """What a loader reads: item (epoch, i) is image i as uint8 (3, size, size), randomly cropped
    if there is a key, else centre-cropped; its label, or 0; and standard normal noise of shape
    `noise`, for a VAE.

    An unreadable image gives the text of its error: a worker cannot raise a UserError."""

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
    broken = [item for item in items if isinstance(item, str)]
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
        if isinstance(batch, str):
            raise UserError(batch)
        batch = [part.to(device, non_blocking=True) for part in batch]
        if isinstance(dataset, Crops):
            batch[0] = to_tensor(batch[0])  # only here: uint8 is a quarter of the bytes
        yield batch


def check_images(sets, size, workers, rank=0, world=1):
    """--check-data: decodes every image, by all ranks. UserError: the unreadable ones."""
    bad = []
    for data in sets:
        order = in_order(len(data), 32)[rank::world]
        loader = DataLoader(Crops(data, size), batch_sampler=order, num_workers=workers,
                            collate_fn=list)
        for items in tqdm(loader, "checking images", disable=rank != 0, mininterval=1):
            bad += [item for item in items if isinstance(item, str)]
    bad = [text for part in gather(bad) for text in part]
    if bad:
        raise UserError(f"{len(bad)} unreadable images: {'; '.join(bad[:20])}")
