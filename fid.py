"""The figures of the paper's tables: FID, sFID, IS, precision, recall, KID, FD-DINOv2 of samples; rFID, PSNR, SSIM, LPIPS
of a tokenizer; the linear probe of its latents (Tables 1 to 4; Figure 3).

    Samples against a reference:  python fid.py REF SAMPLES [--metrics fid,sfid,is,pr,kid] [--features dinov2]
    A tokenizer's reconstruction: python fid.py --recon runs/tokenizer/stage3.pt data/imagenet/val
    Linear probe of its latents:  python fid.py --probe runs/tokenizer/stage3.pt data/imagenet/train data/imagenet/val
    A reference, once:            python fid.py data/imagenet/train --size 256 --save-stats ref.npz
    Preset tiny, a toy figure:    python fid.py shapes SAMPLES --features dinov2 --encoder runs/tokenizer/encoder.pt
    Eight GPUs:                   torchrun --nproc_per_node 8 fid.py ...

REF and SAMPLES: a folder of images (all levels), an npz with arr_0 (N, H, W, 3) uint8, an npz of statistics (mu, sigma, and
mu_s, sigma_s for sFID), an npz of both (ADM's reference batches: statistics for FID and sFID, images for the rest), or
`shapes`, the built-in training images.

The defaults are those of ADM's evaluator (Dhariwal & Nichol 2021): its resize rule, IS in chunks of 5000, k = 3.
Departures: precision and recall are computed in fp64, ADM's in fp16 (which moves them by .003 to .004); the Frechet
distance takes eigenvalues of symmetric matrices, not scipy's sqrtm. All networks run in fp32.

Legend: B batch, N images, D feature dimensions, H W image sides.
"""
import argparse
import hashlib
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.models.inception as tv
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

import losses
from model import Tokenizer, UserError, find_weights, load_encoder, load_file, load_strictly, sha256
from train_tokenizer import (Folder, Shapes, View, batches, center_crop, encode_means, in_order, linear_probe, print_0, run,
                             setup_ranks, to_uint8, write_atomically)

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
        """uint8 (B, 3, H, W) -> dict of fp32: pool (B, 2048); spatial (B, 2023), sFID's; logits (B, 1008), without bias."""
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
        return dict(pool=pool, spatial=spatial, logits=pool @ self.fc.weight.T)


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize of (B, C, H, W), src = i * in / out without the half-pixel shift, columns first."""
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
    return inception, digest


class DINOv2Features(nn.Module):
    """FD-DINOv2's features (Stein et al. 2023, dgm-eval): cls after the final norm, of the image resized to 224 px by PIL's
    bicubic filter; for an encoder whose own grid is smaller than 16 x 16, to that grid's size."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dims = encoder.eval().requires_grad_(False), encoder.dim
        self.side = min(16, encoder.grid) * encoder.patch
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images, resize=None):
        """uint8 (B, 3, H, W) -> dict of pool (B, D)."""
        small = [np.asarray(Image.fromarray(img).resize((self.side, self.side), Image.BICUBIC))
                 for img in images.permute(0, 2, 3, 1).cpu().numpy()]
        x = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(self.mean.device).float() / 255
        return dict(pool=self.encoder((x - self.mean) / self.std)[0])


def load_dinov2(spec):
    """(DINOv2Features, hash): an official name, a DINOv2 file, or the encoder inside a tokenizer's checkpoint."""
    file = Path(spec).is_file()
    if file and "tokenizer" in load_file(spec, "encoder"):
        encoder = Tokenizer.load(spec).encoder
    else:
        encoder = load_encoder(spec)[0]
    if file:
        return DINOv2Features(encoder), sha256(spec)
    digest = hashlib.sha256()  # by name: of the tensors, whichever file held them
    for tensor in encoder.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return DINOv2Features(encoder), digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- images

class Source(Dataset):
    """REF or SAMPLES: n images, or statistics, or both. size: centre-crop the images to it (None: as they are).

    Images of a folder must have one size, or `size` must be given."""

    def __init__(self, path, size=None):
        self.path, self.size, self.data, self.statistics, self.n = str(path), size, None, {}, 0
        if self.path.endswith(".npz"):
            self._open_npz()
        elif self.path == "shapes":
            self.data = Shapes("train", size=size or 64)
        elif Path(path).is_dir():
            self.data = Folder(path)
        else:
            raise UserError(f"{path}: no such folder or npz file")
        if self.data is not None:
            self.n = len(self.data)
            self.side = (size, size) if size else self.data.image(0).size
        if self.n == 1:
            raise UserError(f"{path} holds one image; a covariance takes at least two")

    def _open_npz(self):
        try:
            with np.load(self.path, allow_pickle=False) as npz:
                keys = npz.files
                known = ("mu", "sigma", "mu_s", "sigma_s", "n", "resize", "weights")
                self.statistics = {k: npz[k] for k in keys if k in known} if {"mu", "sigma"} <= set(keys) else {}
            if "arr_0" in keys:
                with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
                    self.n, H, W = self._read_header(f)
                    self.side = (self.size, self.size) if self.size else (W, H)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such folder or npz file") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as e:
            raise UserError(f"unreadable npz {self.path}: {str(e).splitlines()[0]}") from None
        if not self.n and not self.statistics:
            raise UserError(f"{self.path} holds neither images (arr_0) nor statistics (mu, sigma), but: {', '.join(keys)}")
        for k, v in self.statistics.items():
            if "mu" in k or "sigma" in k:
                if v.dtype.kind != "f" or v.ndim != 1 + ("sigma" in k) or len(set(v.shape)) > 1 or not np.isfinite(v).all():
                    raise UserError(f"{self.path}: {k} is no finite {'matrix' if 'sigma' in k else 'vector'} of floats")

    def _read_header(self, f):
        """Reads arr_0's header from the open file: (N, H, W)."""
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(f)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran or not shape[0]:
            raise UserError(f"{self.path}: arr_0 must be uint8 (N, H, W, 3), not {dtype} {shape}")
        return shape[:3]

    def _prepare(self, img):
        """PIL RGB -> uint8 (3, H, W)."""
        img = center_crop(img, self.size) if self.size else img
        return torch.from_numpy(np.array(img)).permute(2, 0, 1)

    def __getitem__(self, item):
        i = item[1]
        try:
            img = self.data.image(i)
        except UserError as e:
            return str(e)
        if not self.size and img.size != self.side:
            return (f"images of different sizes: {self.data.files[0]} is {self.side[0]}x{self.side[1]}, {self.data.files[i]} "
                    f"is {img.width}x{img.height}; --size N centre-crops all of them to N")
        return self._prepare(img), i

    def read(self, batch_size, rank, world, workers, device):
        """Yields (images uint8 (B, 3, H, W), their indices (B,)), this rank's share: whole batches in turn, so that each
        batch holds the same images however many ranks there are."""
        if self.data is not None:
            yield from batches(self, in_order(self.n, batch_size)[rank::world], workers, device)
            return
        # arr_0 of 50,000 images is 10 GB, perhaps compressed: read in order, a batch at a time
        try:
            with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
                _, H, W = self._read_header(f)
                for k, items in enumerate(in_order(self.n, batch_size)):
                    data = f.read(len(items) * H * W * 3)
                    if len(data) < len(items) * H * W * 3:
                        raise EOFError("arr_0 ends before its last image")
                    if k % world == rank:
                        images = np.frombuffer(data, np.uint8).reshape(-1, H, W, 3)
                        images = torch.stack([self._prepare(Image.fromarray(x)) for x in images])
                        yield images.to(device), torch.tensor([i for _, i in items], device=device)
        except (OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as e:
            raise UserError(f"unreadable npz {self.path}: {e}") from None


class Features:
    """Mean and covariance of features (n, D), accumulated batch by batch in fp64 in memory that does not grow with n; with
    `keep`, and while n <= D (see frechet), also the features themselves, in the order of the images."""

    def __init__(self, n, dims, device="cpu", keep=False, moments=True):
        self.n, self.count, self.moments = n, 0, moments
        self.mu = torch.zeros(dims, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dims, dims, dtype=torch.float64, device=device) if moments else None
        self.rows = torch.zeros(n, dims) if keep or n <= dims else None

    def add(self, x, index):
        """x (B, D) of the images `index` (B,)."""
        if self.rows is not None:
            self.rows[index.cpu()] = x.float().cpu()
        if self.moments:
            x = x.double()
            mean, total = x.mean(0), self.count + len(x)
            delta = mean - self.mu
            self.scatter.addmm_((x - mean).T, x - mean)  # centred by batch: E[xx'] - mm' would cancel
            self.scatter.addr_(delta, delta, alpha=self.count * len(x) / total)
            self.mu += delta * (len(x) / total)
            self.count = total

    def finish(self):
        """Joins the ranks' shares, on every rank; rows that a rank did not see are zero there."""
        if dist.is_initialized():
            if self.rows is not None:
                dist.all_reduce(self.rows)
            if self.moments:
                mu = self.mu * (self.count / self.n)
                dist.all_reduce(mu)
                self.scatter.addr_(self.mu - mu, self.mu - mu, alpha=self.count)
                dist.all_reduce(self.scatter)
                self.mu = mu
        if self.moments:
            self.sigma = self.scatter / (self.n - 1)
        return self

    @classmethod
    def of(cls, x):
        """The features (n, D) of a whole set."""
        features = cls(len(x), x.shape[1], x.device)
        features.add(x, torch.arange(len(x)))
        return features.finish()

    @classmethod
    def stored(cls, mu, sigma, device="cpu"):
        """Statistics from a file: nothing but mean and covariance."""
        features = cls.__new__(cls)
        features.rows = None
        features.mu, features.sigma = (torch.from_numpy(np.asarray(a, np.float64)).to(device) for a in (mu, sigma))
        return features

    def factor(self):
        """A with sigma = A' A: the centred features where n <= D, else from the eigenvalues."""
        if self.rows is not None and len(self.rows) <= len(self.mu):
            return (self.rows.to(self.mu) - self.mu) / (self.n - 1) ** 0.5  # (n, D)
        values, vectors = torch.linalg.eigh(self.sigma)
        return (vectors * values.clamp_min(0).sqrt()).T  # (D, D)


def join_errors(error):
    """Raises UserError on every rank if any rank has an error text."""
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, error)
        error = next((e for e in every if e), None)
    if error:
        raise UserError(error)


@torch.inference_mode()
def extract(source, net, wanted, args, rank, world, device):
    """Runs the network over a source's images once. wanted: layer -> (moments, keep). Returns layer -> Features."""
    dims = dict(pool=net.dims, spatial=2023, logits=1008)
    out = {k: Features(source.n, dims[k], device, keep, moments) for k, (moments, keep) in wanted.items()}
    error = None
    bar = tqdm(total=source.n, desc=source.path, unit="img", disable=rank != 0, mininterval=1)
    try:
        for images, index in source.read(args.batch_size, rank, world, args.workers, device):
            layers = net(images, args.resize)
            for k, features in out.items():
                features.add(layers[k], index)
            bar.update(min(len(images) * world, source.n - bar.n))
    except UserError as e:
        error = str(e)
    bar.close()
    join_errors(error)
    return {k: features.finish() for k, features in out.items()}


# ---------------------------------------------------------------------------------------------------------- metrics

def frechet(a, b):
    """|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2) of two Features, in fp64.

    With S1 = A' A the eigenvalues of S1 S2 are those of the symmetric A S2 A'. Of a set with n <= D images A is the
    centred features, n x D: the problem is then n x n, and no root of a rounding error is summed D - n times."""
    if a.rows is None or b.rows is not None and len(b.rows) < len(a.rows):
        a, b = b, a
    A = a.factor()
    root = torch.linalg.eigvalsh(A @ b.sigma @ A.T).clamp_min(0).sqrt().sum()
    return ((a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * root).item()


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
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of the samples inside a ball of the reference,
    and the other way round. A point's ball reaches to its k-th nearest neighbour in its own set, itself excluded."""
    def radii(x):
        return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(x, x)])

    def covered(x, y):
        limits = radii(y)
        return torch.cat([(d <= limits).any(1) for d in _distances(x, y)]).double().mean().item()

    return covered(samples, ref), covered(ref, samples)


def kid(ref, samples, subsets=100, size=1000, seed=2020):
    """Kernel Inception Distance (Binkowski et al. 2018), unbiased, k(x, y) = (x.y / D + 1)^3: mean and standard deviation
    over random subsets, and their size, which is that of the smaller set where that has fewer images.

    The subsets are torch-fidelity's for the same seed, with the samples as its first input."""
    size = min(size, len(ref), len(samples))
    if size == len(ref) == len(samples):
        subsets = 1  # all of them would be the same
    r, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        y, x = (s[torch.from_numpy(r.choice(len(s), size, replace=False)).to(s.device)].double() for s in (samples, ref))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values)), size


# --------------------------------------------------------------------------------------------------------- commands

class Report:
    """The figures, each with what it takes to trace it, as a table and as JSON."""

    def __init__(self):
        self.figures, self.warnings = [], []

    def add(self, metric, value, n_ref=None, n=None, resize=None, weights=None, std=None, note=""):
        self.figures.append(dict(metric=metric, value=value, std=std, n_ref=n_ref, n=n, resize=resize,
                                 weights=weights and weights[:8], note=note))

    def warn(self, text):
        self.warnings.append(text)

    def warn_few(self, name, n):
        if n and n < 2048:
            self.warn(f"{name}: {n} images are fewer than 2048, too few for a covariance of 2048 dimensions. FID, sFID and IS "
                      f"at such an N are biased far off; they compare only with figures at the same N (KID is unbiased).")
        elif n and n < 10_000:
            self.warn(f"{name}: {n} images are far below the protocol's 50,000; FID and sFID come out higher, IS lower.")

    def write(self, path):
        rows = [("metric", "value", "N ref", "N", "resize", "weights", "")]
        for f in self.figures:
            value = f"{f['value']:.4f}" if abs(f["value"]) >= 0.1 or f["value"] == 0 else f"{f['value']:.4g}"
            value += "" if f["std"] is None else f" +- {f['std']:.2g}"
            rows.append((f["metric"], value, *("-" if f[k] is None else str(f[k]) for k in ("n_ref", "n", "resize", "weights")),
                         f["note"]))
        widths = [max(map(len, column)) for column in zip(*rows)]
        print("\n" + "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows))
        for text in self.warnings:
            print(f"WARNING: {text}")
        if path:
            write_atomically(path, lambda f: f.write(json.dumps(vars(self), indent=1).encode()))


def choose(given, offered):
    """The metrics of --metrics, or all that are offered."""
    chosen = given.split(",") if given else list(offered)
    unknown = [m for m in chosen if m not in offered]
    if unknown:
        raise UserError(f"--metrics {','.join(unknown)}: here there are {','.join(offered)}")
    return chosen


def load_network(args, device):
    """(network, hash of its weights, the resize rule's name, the distance's name)."""
    if args.features == "dinov2":
        net, digest = load_dinov2(args.encoder)
        return net.to(device), digest, f"PIL {net.side}", "FD-DINOv2"
    try:
        inception, digest = load_inception(args.inception)
    except UserError as e:
        hint = "; --metrics psnr,ssim,lpips goes without it" if args.recon else ""
        raise UserError(f"{e}{hint}") from None
    return inception.to(device), digest, args.resize, "FID"


def statistics(source, net, layer, digest, resize, device):
    """A source's stored statistics of a layer; raises UserError where they cannot be those of this network."""
    suffix = "_s" if layer == "spatial" else ""
    mu, sigma = source.statistics["mu" + suffix], source.statistics["sigma" + suffix]
    dims = 2023 if suffix else net.dims
    if len(mu) != dims or len(sigma) != dims:
        raise UserError(f"{source.path}: mu{suffix} and sigma{suffix} have {len(mu)} and {len(sigma)} dimensions, but these "
                        f"features {dims}: statistics of another network")
    for key, now in (("resize", resize), ("weights", digest)):
        then = str(source.statistics.get(key, now))
        if then != now:
            raise UserError(f"{source.path} was saved with {key} {then[:12]}, not {now[:12]}")
    return Features.stored(mu, sigma, device)


def evaluate(args, rank, world, device):
    """REF SAMPLES: every metric of generated images. With --save-stats REF alone may be given."""
    sources = [Source(path, args.size) for path in args.paths]
    offered = ["fid", "pr", "kid"] if args.features == "dinov2" else ["fid", "sfid", "is", "pr", "kid"]
    metrics = choose(args.metrics, offered)
    report = Report()
    for name, source in zip(("REF", "SAMPLES"), sources):  # a file of statistics allows less than images do
        cannot = [m for m in metrics if m in ("pr", "kid") + ("is",) * (name == "SAMPLES") and not source.n
                  or m == "sfid" and source.statistics and "mu_s" not in source.statistics]
        if cannot and (args.metrics or cannot == metrics):
            raise UserError(f"{source.path} holds no {'mu_s' if cannot == ['sfid'] else 'images'}, which {','.join(cannot)} "
                            f"needs; leave {'it' if len(cannot) == 1 else 'them'} out of --metrics")
        if cannot and len(sources) == 2:
            report.warn(f"{name} is a file of statistics: no {', '.join(cannot)}")
        metrics = [m for m in metrics if m not in cannot]
    for source in sources:
        if "pr" in metrics and source.n < 4:
            raise UserError(f"{source.path}: precision and recall take at least 4 images, not {source.n}")
    if args.save_stats and not sources[0].n:
        raise UserError(f"--save-stats: {args.paths[0]} holds no images")
    net, digest, resize, distance = load_network(args, device)

    # What each source must give: moments of which layers, and which layers whole
    found = []
    for name, source in zip(("REF", "SAMPLES"), sources):
        saving = bool(args.save_stats) and name == "REF"
        layers, wanted = {}, {}
        for metric, layer in (("fid", "pool"), ("sfid", "spatial")):
            if metric in metrics and source.statistics and not saving:
                layers[layer] = statistics(source, net, layer, digest, resize, device)
            elif (metric in metrics and len(sources) == 2) or (saving and metric in offered):
                wanted[layer] = (True, False)
        if len(sources) == 2:
            if "pr" in metrics or "kid" in metrics:
                wanted["pool"] = ("pool" in wanted, True)
            if "is" in metrics and name == "SAMPLES":
                wanted["logits"] = (False, True)
        if wanted:
            for layer, features in extract(source, net, wanted, args, rank, world, device).items():
                if layer in layers:  # the stored moments stay, the rows are new
                    layers[layer].images = features.rows
                else:
                    layers[layer] = features
                    features.images = features.rows
        found.append(layers)
    if rank != 0:
        return
    if args.save_stats:
        arrays = {f"{k}{s}": getattr(found[0][layer], k).cpu().numpy() for layer, s in (("pool", ""), ("spatial", "_s"))
                  if layer in found[0] for k in ("mu", "sigma")}
        write_atomically(args.save_stats, lambda f: np.savez(f, n=sources[0].n, resize=resize, weights=digest, **arrays))
        print(f"saved the statistics of {sources[0].n} images: {args.save_stats}")
        if len(sources) == 1:
            return

    ref, samples = found
    count = [s.n or (int(s.statistics["n"]) if "n" in s.statistics else None) for s in sources]
    stored = [int(s.statistics["n"]) if "n" in s.statistics else None if s.statistics else s.n for s in sources]
    moments = dict(n_ref=stored[0], n=stored[1], resize=resize, weights=digest)
    images = dict(moments, n_ref=count[0], n=count[1])
    if "fid" in metrics:
        report.add(distance, frechet(ref["pool"], samples["pool"]), **moments)
    if "sfid" in metrics:
        report.add("sFID", frechet(ref["spatial"], samples["spatial"]), **moments)
    if "is" in metrics:
        mean, std = inception_score(samples["logits"].rows, args.splits, args.seed)
        note = f"{args.splits} splits, shuffled" if args.splits else "chunks of 5000"
        report.add("IS", mean, None, sources[1].n, resize, digest, std, note)
    whole = [f["pool"].images.to(device) for f in found if {"pr", "kid"} & set(metrics)]
    if "pr" in metrics:
        for name, value in zip(("precision", "recall"), precision_recall(*whole)):
            report.add(name, value, **images, note="k = 3")
    if "kid" in metrics:
        mean, std, size = kid(*whole, seed=args.seed)
        report.add("KID", mean, **images, std=std, note=f"subsets of {size}{'' if size == 1000 else ', for want of images'}")
    for name, n in zip(("REF", "SAMPLES"), stored):
        report.warn_few(name, n)
    if all(s.n for s in sources) and sources[0].side != sources[1].side:
        report.warn("REF is {}x{} px and SAMPLES {}x{}: the resize to the network's input differs".format(
            *sources[0].side, *sources[1].side))
    report.write(args.json)


def load_tokenizer(path, size, device):
    """(tokenizer in eval mode, image side: --size, else the one that it was trained at)."""
    return Tokenizer.load(path).to(device), size or load_file(path).get("run", {}).get("size", 256)


@torch.inference_mode()
def reconstruction(args, rank, world, device):
    """--recon: rFID under both resize rules, PSNR, SSIM and LPIPS of 8-bit reconstructions of centre-cropped images."""
    path, data = args.recon
    metrics = choose(args.metrics, ["rfid", "psnr", "ssim", "lpips"])
    tokenizer, size = load_tokenizer(path, args.size, device)
    data = Shapes("val", n=512, size=size) if data == "shapes" else Source(data, size).data
    if data is None:
        raise UserError(f"--recon takes a folder of images (or shapes), not {args.recon[1]}")
    n, digest, rules, lpips = len(data), None, [], None
    if "rfid" in metrics:
        net, digest, rule, distance = load_network(args, device)
        rules = [rule] if args.features == "dinov2" else ["tf1", "torch"]
        pairs = {rule: [Features(n, net.dims, device) for _ in range(2)] for rule in rules}
    if "lpips" in metrics:
        try:
            files = (find_weights(losses.VGG16_URL, losses.VGG16_SHA256, "--vgg16", args.vgg16),
                     find_weights(losses.HEADS_URL, losses.HEADS_SHA256, "--lpips-heads", args.lpips_heads))
        except UserError as e:
            raise UserError(f"{e}; --metrics {','.join(m for m in metrics if m != 'lpips')} goes without it") from None
        lpips = losses.LPIPS(*files).to(device)
    measures = {k: f for k, f in (("psnr", losses.psnr), ("ssim", losses.ssim), ("lpips", lpips)) if k in metrics}

    values, error = torch.zeros(n, max(1, len(measures)), dtype=torch.float64), None
    order = in_order(n, args.batch_size)[rank::world]
    bar = tqdm(total=n, desc=path, unit="img", disable=rank != 0, mininterval=1)
    try:
        for items, (x, _) in zip(order, batches(View(data, size), order, args.workers, device)):
            index = torch.tensor([i for _, i in items])
            recon = torch.from_numpy(to_uint8(tokenizer.decode(tokenizer.encode(x)))).permute(0, 3, 1, 2).to(device)
            y = recon.float() / 127.5 - 1  # what a reader of the saved PNG would see
            for k, measure in enumerate(measures.values()):
                values[index, k] = measure(x, y).double().cpu()
            original = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).to(device)
            for rule in rules:
                for features, images in zip(pairs[rule], (original, recon)):
                    features.add(net(images, rule)["pool"], index)
            bar.update(min(len(x) * world, n - bar.n))
    except UserError as e:
        error = str(e)
    bar.close()
    join_errors(error)
    if dist.is_initialized():
        dist.all_reduce(values)
    report = Report()
    for rule in rules:
        a, b = (features.finish() for features in pairs[rule])
        if rank == 0:
            report.add(f"r{distance}", frechet(a, b), n, n, rule, digest)
    if rank != 0:
        return
    for k, name in enumerate(measures):
        report.add(name.upper(), values[:, k].mean().item(), n=n, resize=None,
                   weights=sha256(files[0]) if name == "lpips" else None, note="dB" if name == "psnr" else "")
    if rules:
        report.warn_few("DATA", n)
    report.write(args.json)


def probe(args, rank, world, device):
    """--probe: the linear probe of a tokenizer's latents (Figure 3), or of its pre-adapter tokens. One process does it."""
    if rank != 0:
        return
    path, *data = args.probe
    tokenizer, size = load_tokenizer(path, args.size, device)
    train, val = (Shapes(split, size=size, **({} if split == "train" else {"n": 512})) if d == "shapes" else
                  Source(d, size).data for d, split in zip(data, ("train", "val")))
    for name, d in (("TRAIN", train), ("VAL", val)):
        if d is None or not d.labels:
            raise UserError(f"--probe: {name} must be a folder with one folder per class, or shapes")
    if train.classes != val.classes:
        raise UserError("--probe: TRAIN and VAL hold different classes")
    (x, y), (vx, vy) = ((found[1 if args.tokens else 0], found[2]) for found in (
        encode_means(tokenizer, View(d, size), len(d), args.workers, device, args.batch_size) for d in (train, val)))
    report = Report()
    report.add("probe %", linear_probe(x, y, vx, vy), len(train), len(val), weights=sha256(path),
               note=f"{'pre-adapter tokens' if args.tokens else 'latents'}, {x.shape[1]} channels, {len(train.classes)} classes")
    report.write(args.json)


# -------------------------------------------------------------------------------------------------------------- CLI

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("paths", nargs="*", metavar="REF SAMPLES", help="folder, npz of images or of statistics, or shapes")
    add("--recon", nargs=2, metavar=("CKPT", "DATA"), help="rFID, PSNR, SSIM, LPIPS of a tokenizer on a folder (or shapes)")
    add("--probe", nargs=3, metavar=("CKPT", "TRAIN", "VAL"), help="linear probe of a tokenizer's latents")
    add("--tokens", action="store_true", help="--probe: of the encoder's tokens before the adapter")
    add("--metrics", help="of fid,sfid,is,pr,kid, or with --recon of rfid,psnr,ssim,lpips (default: all that the inputs allow)")
    add("--features", choices=["inception", "dinov2"], default="inception", help="dinov2: FD-DINOv2, and its pr and kid")
    add("--encoder", default="vitl14", help="--features dinov2: official name, DINOv2 file, or tokenizer checkpoint")
    add("--resize", choices=["tf1", "torch"], default="tf1", help="to 299 px: tf1 as ADM's evaluator, torch as pytorch-fid")
    add("--size", type=int, help="centre-crop all images to this side in px first (default: as they are; --recon and --probe: "
        "the tokenizer's)")
    add("--splits", type=int, help="IS: this many shuffled parts, as torch-fidelity (default: chunks of 5000, as ADM)")
    add("--seed", type=int, default=2020, help="of KID's subsets and of --splits (default: torch-fidelity's, %(default)s)")
    add("--save-stats", metavar="FILE", help="write REF's statistics to an npz; SAMPLES may then be absent")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth (default: torch hub's cache, or download)")
    add("--vgg16", metavar="FILE", help="torchvision's VGG16, for LPIPS")
    add("--lpips-heads", metavar="FILE", help="LPIPS v0.1 VGG heads")
    add("--batch-size", type=int, default=64, help="images per forward; it changes no figure (default: %(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="loader processes per rank (default: %(default)s)")
    args = p.parse_args(argv)
    if bool(args.paths) + bool(args.recon) + bool(args.probe) != 1:
        raise UserError("give REF SAMPLES, or --recon CKPT DATA, or --probe CKPT TRAIN VAL (see --help)")
    if args.paths and len(args.paths) not in ((1, 2) if args.save_stats else (2,)):
        raise UserError(f"REF and SAMPLES are two paths, not {len(args.paths)} (one alone goes with --save-stats FILE)")
    for name in ("batch_size", "size", "splits"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
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
