"""The figures of the paper's tables. Of samples: FID, sFID, IS, precision, recall, KID, FD-DINOv2.
Of a tokenizer: rFID, PSNR, SSIM, LPIPS, the linear probe of its latents (Figure 3), and their
alignment with a foundation encoder (CKNNA, and VFM-VAE's SE-CKNNA).

    Samples:     python fid.py REF SAMPLES [--metrics fid,sfid,is,pr,kid] [--features dinov2]
    Tokenizer:   python fid.py --recon runs/tokenizer/stage3.pt data/imagenet/val
    Probe:       python fid.py --probe runs/tokenizer/stage3.pt data/imagenet/{train,val}
    Alignment:   python fid.py --cknna runs/tokenizer/stage3.pt data/imagenet/val
    REF, once:   python fid.py data/imagenet/train --size 256 --save-stats ref.npz

REF and SAMPLES: a folder of images (all levels); an npz of images (arr_0: uint8 (N, H, W, 3)), of
statistics (mu, sigma; sFID's mu_s, sigma_s), or of both, as ADM's reference batches (statistics
for FID and sFID, images for the rest); or `shapes`, the built-in training images.

Defaults as in ADM's evaluator (Dhariwal and Nichol 2021): its resize rule, IS in chunks of 5000,
k = 3. Departures: precision and recall in fp64 (ADM's fp16 moves them by .003 to .004); Frechet
distance by eigenvalues of symmetric matrices, not scipy's sqrtm. Networks run in fp32.

Legend: B batch, N n images, D features, H W image sides, K classes, d latent channels.
"""
import hashlib
import io
import json
import math
import operator
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.models.inception as tv
from PIL import Image
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from tqdm import tqdm

from baselines import VAE, FluxVAE
from data import (
    Crops,
    ImageFolder,
    at_random,
    batches,
    center_crop,
    in_order,
    on_rank_0,
    rng,
    to_pixels,
    to_uint8,
)
from files import (
    UserError,
    find_weights,
    load_encoder,
    load_file,
    load_lpips,
    load_strictly,
    load_tokenizer,
    load_weights,
    print_0,
    reading,
    sha256,
    write_atomically,
)
from losses import ssim
from model import DINOv2, SigLIP, ViT
from runs import Parser, by_parts, count, index, launch, rank_0_first, setup_ranks
from toy import Shapes
from vfm_vae import VFMVAE, resize

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
# pytorch-fid's conversion of TensorFlow's graph
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


# ---- the networks

def average_pool(x):
    """TensorFlow's 3x3 average does not count the padding; torchvision's does."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class InceptionA(tv.InceptionA):  # Mixed_5b to 5d
    def forward(self, x):
        y = self.branch5x5_2(self.branch5x5_1(x))
        z = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), y, z, self.branch_pool(average_pool(x))], dim=1)


class InceptionC(tv.InceptionC):  # Mixed_6b to 6e
    def forward(self, x):
        y = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        z = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        z = self.branch7x7dbl_5(self.branch7x7dbl_4(z))
        # (B, 768, 17, 17)
        return torch.cat([self.branch1x1(x), y, z, self.branch_pool(average_pool(x))], dim=1)


class InceptionE(tv.InceptionE):  # Mixed_7b, 7c
    pool = staticmethod(average_pool)

    def forward(self, x):
        y = self.branch3x3_1(x)
        z = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        y = [self.branch3x3_2a(y), self.branch3x3_2b(y)]
        z = [self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z)]
        pool = self.branch_pool(self.pool(x))
        return torch.cat([self.branch1x1(x), *y, *z, pool], dim=1)  # (B, 2048, 8, 8)


class Inception(tv.Inception3):
    """Inception v3 as FID uses it (pt_inception-2015-12-05): 1008 classes, TensorFlow's pools, no
    auxiliary head. 23,850,960 parameters; keys as torchvision's and the official file's."""

    def __init__(self):
        blocks = [tv.BasicConv2d, InceptionA, tv.InceptionB, InceptionC,
                  tv.InceptionD, InceptionE, tv.InceptionAux]
        super().__init__(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        # a mistake in the graph of 2015, now part of FID
        self.Mixed_7c.pool = lambda x: F.max_pool2d(x, 3, 1, 1)
        self.dims = {"pool": 2048, "spatial": 2023, "logits": 1008}
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images, resize="tf1"):
        """uint8 (B, 3, H, W) -> dict of pool (B, 2048); spatial (B, 2023), sFID's; logits
        (B, 1008), without bias. resize: tf1, or torch as pytorch-fid."""
        x = images.float()
        if resize == "tf1":
            x = (resize_tf1(x) - 128) / 128
        else:
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear") - 1
        x = x.contiguous(memory_format=torch.channels_last)  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.maxpool2(x)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        # row, column, channel, as in TensorFlow
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17*17*7)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))
        pool = x.mean((2, 3))  # (B, 2048)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize of (B, C, H, W), columns first. Output pixel i is read at i *
    in / out; other libraries add half a pixel before they scale."""
    for dim in (3, 2):
        n = x.shape[dim]
        scale = torch.tensor(float(n), device=x.device) / size
        src = torch.arange(size, device=x.device) * scale  # (size,)
        low = src.long()
        high = (low + 1).clamp_max(n - 1)
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * (src - low).view(-1, *[1] * (3 - dim))
    return x


def load_inception(file=None):
    """(Inception, sha256), from a file, torch hub's cache or a download. Errors: UserError."""
    path = find_weights(INCEPTION_URL, INCEPTION_SHA256, "--inception", file)
    inception = Inception()
    # a plain dict has no version: BatchNorm then fills in num_batches_tracked, new since 2018
    load_strictly(inception, load_weights(path, "Inception"), path)
    digest = sha256(path)
    if digest != INCEPTION_SHA256:
        print_0(f"NOTE: {path} is not the official FID Inception (sha256 {digest[:8]}): its "
                "figures compare only with one another")
    # BatchNorm would take a seventh of the time
    for layer in inception.modules():
        if isinstance(layer, tv.BasicConv2d):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.bn)
            layer.bn = nn.Identity()
    return inception, digest


def resize_pil(images, side):
    """uint8 (B, 3, H, W) -> float (B, 3, side, side) in [0, 1], by PIL's bicubic filter."""
    def shrunk(img):
        return np.asarray(Image.fromarray(img).resize((side, side), Image.BICUBIC))

    with ThreadPoolExecutor() as pool:
        small = list(pool.map(shrunk, images.permute(0, 2, 3, 1).cpu().numpy()))
    small = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)
    return small.to(images.device).float() / 255


class DINOv2Features(nn.Module):
    """FD-DINOv2's (Stein et al. 2023, dgm-eval): cls after the final norm, of the image at 224 px,
    or at the size of the encoder's own grid where that is below 16 x 16."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.dims = {"pool": encoder.dim}
        self.side = min(16, encoder.grid) * encoder.patch

    def forward(self, images, resize=None):
        """uint8 (B, 3, H, W) -> dict of pool (B, D)."""
        x = resize_pil(images, self.side)  # (B, 3, side, side)
        x = (x - self.encoder.pixel_mean) / self.encoder.pixel_std
        return {"pool": self.encoder(x)[0]}


def load_dinov2(spec, kinds=(DINOv2,)):
    """(DINOv2Features, sha256). spec: an official name, a DINOv2 file, or a checkpoint of the
    tokenizer that holds it. kinds: what it may be. Errors: UserError."""
    file = Path(spec).is_file()
    if file and "tokenizer" in (content := load_file(spec, "encoder")):
        tokenizer = load_tokenizer(spec, VAE, VFMVAE, content=content)
        encoder = getattr(tokenizer, "encoder", tokenizer)  # VFM-VAE's is of another form
    else:
        encoder = load_encoder(spec)[0]
    if not isinstance(encoder, kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{spec} is no {names}: it holds {type(encoder).__name__}")
    if file:
        return DINOv2Features(encoder), sha256(spec)
    # by name: of the tensors, whichever file held them
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return DINOv2Features(encoder), digest.hexdigest()


class FeatureNetwork(NamedTuple):
    net: nn.Module
    weights: str  # sha256
    resize: str  # the rule's name
    distance: str  # its name


def load_network(args, device):
    """The FeatureNetwork of --features, or the judge."""
    fields = args.judge
    if args.features == "dinov2":
        net, digest = load_dinov2(args.encoder)
        fields = net, digest, f"PIL {net.side}", "FD-DINOv2"
    elif args.features == "inception":
        fields = *load_inception(args.inception), args.resize, "FID"
    fields[0].to(device)
    return FeatureNetwork(*fields)


# ---- a set against another

class FeatureStatistics:
    """Mean mu (D,) and covariance sigma (D, D) of n images' features, summed by batches in fp64,
    in memory that does not grow with n.

    rows: with `keep`, or if n <= D (see frechet), the features (n, D)."""

    def __init__(self, n, dims, device="cpu", keep=False):
        self.n, self.count = n, 0
        self.mu = torch.zeros(dims, dtype=torch.float64, device=device)
        self.sigma = self.mu.new_zeros(dims, dims)  # times n - 1, until finish
        self.rows = torch.zeros(n, dims) if keep or n <= dims else None

    def add(self, x, index):
        """x (B, D) of the images `index` (B,)."""
        if self.rows is not None:
            self.rows[index] = x.float().cpu()
        x = x.double()
        mean, total = x.mean(0), self.count + len(x)
        delta = mean - self.mu  # (D,)
        # centred batch by batch: E[xx'] - mm' would cancel
        self.sigma.addmm_((x - mean).T, x - mean)
        self.sigma.addr_(delta, delta, alpha=self.count * len(x) / total)
        self.mu += delta * (len(x) / total)
        self.count = total

    def finish(self):
        """Joins what the ranks have added, on every rank. Returns itself."""
        if dist.is_initialized():
            mu = self.mu * (self.count / self.n)
            dist.all_reduce(mu)
            self.sigma.addr_(self.mu - mu, self.mu - mu, alpha=self.count)
            dist.all_reduce(self.sigma)
            self.mu = mu
            if self.rows is not None:
                dist.all_reduce(self.rows)  # each is zero but on one rank: exact
        self.sigma /= self.n - 1
        return self

    @classmethod
    def of(cls, x):
        """Those of a whole set's features x (n, D)."""
        statistics = cls(len(x), x.shape[1], x.device)
        statistics.add(x, torch.arange(len(x)))
        return statistics.finish()

    @classmethod
    def stored(cls, images, layer, network, device):
        """Those in an ImageSet's file. UserError where they cannot be this network's."""
        statistics, suffix = cls(0, 0), "_s" if layer == "spatial" else ""
        dims = network.net.dims[layer]
        for name, shape in (("mu", (dims,)), ("sigma", (dims, dims))):
            value = images.statistics[name + suffix]
            if value.shape != shape:
                raise UserError(f"{images.path}: {name + suffix} is {value.shape}, these features "
                                f"need {shape}: another network's?")
            if value.dtype.kind != "f" or not np.isfinite(value).all():
                raise UserError(f"{images.path}: {name + suffix} holds NaN or other than floats")
            if not np.allclose(value, value.T, rtol=0, atol=1e-6 * abs(value).max()):
                raise UserError(f"{images.path}: {name + suffix} is no covariance: not symmetric")
            setattr(statistics, name, torch.from_numpy(value.astype(np.float64)).to(device))
        # others' files hold neither: they are believed
        for key, now in (("resize", network.resize), ("weights", network.weights)):
            then = str(images.statistics.get(key, now))
            if then != now:
                raise UserError(f"{images.path} was saved with {key} {then[:12]}, not {now[:12]}")
        n = images.statistics.get("n")  # only our files hold it
        statistics.n, statistics.rows = n and int(n), None
        return statistics


# |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2)
def frechet(a, b):
    """Of two FeatureStatistics, in fp64, >= 0. UserError where it is not finite.

    With S1 = A'A the eigenvalues of S1 S2 are those of the symmetric A S2 A'. Of n <= D images A is
    the centred features: n eigenvalues. A D x D problem has D - n more: they are zero up to
    rounding, but the sum of their roots is not small."""
    # a gives A: the smaller of the sets with rows
    if a.rows is None or b.rows is not None and len(b.rows) < len(a.rows):
        a, b = b, a
    if a.rows is not None and a.n <= len(a.mu):
        A = (a.rows.to(a.mu) - a.mu) / (a.n - 1) ** 0.5  # (n, D)
    else:
        values, vectors = torch.linalg.eigh(a.sigma)
        A = (vectors * values.clamp_min(0).sqrt()).T  # (D, D)
    root = torch.linalg.eigvalsh(A @ b.sigma @ A.T).clamp_min(0).sqrt().sum()
    means = (a.mu - b.mu).square().sum()
    distance = means + a.sigma.trace() + b.sigma.trace() - 2 * root
    if not distance.isfinite():
        raise UserError("the Frechet distance is not finite: features or statistics too large")
    return max(0.0, distance.item())  # of equal sets rounding leaves about 1e-7


# exp(E KL(p(y|x) || p(y)))
def inception_score(logits, splits=None, seed=2020):
    """IS of logits (N, K): mean and standard deviation over parts of the set: ADM's, 5000 images
    in file order, or torch-fidelity's, `splits` parts after a shuffle."""
    parts, n, scores = logits.split(5000), len(logits), []
    if splits:
        shuffled = logits[torch.from_numpy(np.random.RandomState(seed).permutation(n))]
        parts = shuffled.tensor_split([i * n // splits for i in range(1, splits)])
    for part in parts:
        log_p = part.double().log_softmax(1)  # (n, K)
        log_marginal = log_p.logsumexp(0) - np.log(len(part))  # (K,)
        kl = (log_p.exp() * (log_p - log_marginal)).sum(1)  # (n,)
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def _distances(x, y):
    """Squared distances of x (n, D) to y (m, D): yields blocks (rows, m), each at most 256 MB.

    Features of equal images differ by rounding, and so do their distances: below 1e-6 of the
    features' length the distance is 0. Else more than k equal images, whose balls have the radius
    0, would lie outside their own balls."""
    y = y.double()
    for block in x.split(max(1, 2 ** 25 // len(y))):
        block = block.double()
        squares = block.square().sum(1, keepdim=True) + y.square().sum(1)
        distances = squares - 2 * block @ y.T
        yield distances.masked_fill_(distances < 1e-12 * squares, 0)


def precision_recall(ref, samples, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (n, D), (m, D): the
    share of the samples in a ball of the reference, and the reverse. A point's ball reaches to its
    k-th nearest neighbour in its own set."""
    def radii(x):
        # the nearest is the point itself
        return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(x, x)])

    def covered(x, y):
        limits = radii(y)  # (m,)
        inside = [(d <= limits).any(1) for d in _distances(x, y)]
        return torch.cat(inside).double().mean().item()

    return covered(samples, ref), covered(ref, samples)


# E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = (x.y / D + 1)^3
def kid(ref, samples, subsets=100, size=1000, seed=2020):
    """Kernel Inception Distance (Binkowski et al. 2018), unbiased, of features (n, D), (m, D): mean
    and standard deviation over random subsets, and their size, at most the smaller set's.

    The subsets are torch-fidelity's for the same seed, with the samples as its first input."""
    size = min(size, len(ref), len(samples))
    if size == len(ref) == len(samples):
        subsets = 1  # all of them would be the same
    r, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        y, x = (s[r.choice(len(s), size, replace=False)].double()
                for s in (samples, ref))  # (size, D)
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3
                      for a, b in ((x, x), (y, y), (x, y)))  # (size, size)
        # without an image's kernel with itself: unbiased
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values)), size


# ---- of a tokenizer

# 10 log10 (2^2 / MSE)
def psnr(x, y):
    """Peak signal-to-noise ratio in dB, per image (B,), of (B, 3, H, W) in [-1, 1]."""
    mse = (x.double() - y.double()).square().mean((1, 2, 3))  # (B,)
    return 10 * torch.log10(4 / mse.clamp_min(1e-20))


class Encoded(NamedTuple):
    latents: torch.Tensor  # z0, (n, d), mean over positions
    tokens: torch.Tensor  # before the adapter, (n, D); a VAE's: mean | log-variance
    labels: torch.Tensor  # (n,)
    latent_mean: torch.Tensor  # (d,), over all images and positions
    latent_std: torch.Tensor  # (d,)


@torch.no_grad()
def encode_images(tokenizer, data, size, n, workers, device, batch_size=64):
    """The Encoded, on the CPU, of the centre crops of n images: a fixed random choice."""
    order = at_random(n, batch_size, len(data))
    latents, tokens, labels, moments = [], [], [], 0
    for x, y in batches(Crops(data, size), order, workers, device):
        t = tokenizer.features(x)  # (B, N, D), N tokens
        h, w = (side // tokenizer.factor for side in x.shape[-2:])
        z = tokenizer.adapt(t, h, w).double()  # (B, d, h, w)
        # number, sum and sum of squares: (3, d)
        moments = moments + torch.stack([torch.ones_like(z), z, z.square()]).sum((1, 3, 4))
        latents.append(z.float().mean((2, 3)).cpu())
        tokens.append(t.float().mean(1).cpu())
        labels.append(y.cpu())
    number, total, squares = moments.cpu()
    mean = total / number
    std = (squares / number - mean.square()).clamp_min(0).sqrt()
    return Encoded(*map(torch.cat, (latents, tokens, labels)), mean.float(), std.float())


def linear_probe(train_x, train_y, val_x, val_y, device="cpu"):
    """Top-1 accuracy in per cent of a linear classifier on features (n, D) with labels (n,).

    The protocol (a choice; the paper states none): features averaged over the tokens, BatchNorm
    without affine (the train set's mean and variance), softmax regression to convergence by L-BFGS
    from zero, weight decay 1e-4. No randomness."""
    train_x, train_y, val_x, val_y = (a.to(device) for a in (train_x, train_y, val_x, val_y))
    mean, std = train_x.mean(0), train_x.std(0, correction=0) + 1e-5
    train_x, val_x = (train_x - mean) / std, (val_x - mean) / std
    with torch.random.fork_rng([]):  # from which it would draw weights
        linear = nn.Linear(train_x.shape[1], int(train_y.max()) + 1).to(device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=200, history_size=10,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = 0.0
        # ImageNet's logits need not fit at once
        for x, y in zip(train_x.split(65536), train_y.split(65536)):
            part = F.cross_entropy(linear(x), y, reduction="sum") / len(train_x)
            part.backward()
            loss += part.item()
        decay = 0.5e-4 * linear.weight.square().sum()
        decay.backward()
        return loss + decay.item()

    optimiser.step(closure)
    with torch.no_grad():
        return 100 * (linear(val_x).argmax(1) == val_y).float().mean().item()


# ---- of a tokenizer's features: alignment

def prepared(x):
    """Features (n, D) as CKNNA takes them: outliers clamped to the 95th percentile of all absolute
    values, then rows of unit norm."""
    limit = x.abs().flatten().kthvalue(int(0.95 * x.numel()) + 1).values
    return F.normalize(x.clamp(-limit, limit), dim=1)


# HSIC = [sum K L' + sum K sum L / (n-1)(n-2) - 2 sum (K L) / (n-2)] / n(n-3), diagonals zero
def hsic(K, L):
    """The unbiased estimate, of kernels (n, n) that need not be symmetric; n > 3."""
    n = len(K)
    K, L = (X.clone().fill_diagonal_(0) for X in (K, L))
    both = (K * L.T).sum(dtype=torch.float64)
    total_K, total_L = (X.sum(dtype=torch.float64) for X in (K, L))
    product = K.sum(0, dtype=torch.float64) @ L.sum(1, dtype=torch.float64)  # sum of K @ L
    return (both + total_K * total_L / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3))


def neighbours(K, k):
    """(n, n), true where a column is among the k largest of its row, not counting the row itself."""
    nearest = K.clone().fill_diagonal_(-math.inf).topk(k, dim=1).indices
    return torch.zeros_like(K, dtype=torch.bool).scatter_(1, nearest, True)


def cknna(a, b, k=10, prepare=True):
    """Centred kernel alignment of features (n, D), (n, D') of the same images, over pairs that are
    neighbours on both sides (Huh et al. 2024, The Platonic Representation Hypothesis)."""
    K, L = (x @ x.T for x in (map(prepared, (a, b)) if prepare else (a, b)))  # (n, n)
    near_K, near_L = neighbours(K, k), neighbours(L, k)
    near = near_K & near_L
    own = hsic(K * near_K, K * near_K) * hsic(L * near_L, L * near_L)
    return (hsic(K * near, L * near) / (own.sqrt() + 1e-6)).item()


NOISE = (0.05, 0.10, 0.15, 0.20)  # standard deviations, of pixels in [0, 1]


def variants(pixels, indices):
    """SE-CKNNA's sets of a batch of images, uint8 (B, 3, H, W): yields (set, indices, pixels,
    scale). "clean"; noise of four strengths; "turned": a rotation and a scale for each image. Each
    draw is numpy's for the seed 42 + index."""
    yield "clean", indices, pixels, 1.0
    images = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    for sigma in NOISE:
        noise = [np.random.RandomState(42 + i).normal(0, sigma, images.shape[1:]) * 255
                 for i in indices.tolist()]
        noisy = (images + np.stack(noise)).clip(0, 255).astype(np.uint8)
        yield f"noise {sigma}", indices, torch.from_numpy(noisy).permute(0, 3, 1, 2), 1.0
    turned, scales = pixels.clone(), []
    for j, i in enumerate(indices.tolist()):
        r = np.random.RandomState(42 + i)
        turned[j] = torch.rot90(pixels[j], r.choice([0, 90, 180, 270]) // 90, (1, 2))
        scales.append(r.choice([1, 0.75, 0.5, 0.25]))
    scales = torch.tensor(scales)
    for scale in (1.0, 0.75, 0.5, 0.25):
        chosen = scales == scale
        if chosen.any():
            yield "turned", indices[chosen], turned[chosen.to(turned.device)], scale


def latents_and_tokens(tokenizer, pixels, indices, scale):
    """{"latents": (B, d), sampled where the tokenizer samples; "encoder": the last tokens of its
    foundation encoder, (B, D), if it has one}: means over the positions, of uint8 (B, 3, H, W)."""
    x = pixels.float() / 127.5 - 1
    is_vfm = isinstance(tokenizer, VFMVAE)
    x = resize(x, scale, "bilinear", antialias=is_vfm)  # VFM-VAE's: as in its own training
    tokens = tokenizer.features(x)  # (B, N, D); a VAE's: mean | log-variance
    h, w = (side // tokenizer.factor for side in x.shape[-2:])
    if not isinstance(tokenizer, (VAE, VFMVAE, FluxVAE)):
        return {"latents": tokenizer.adapt(tokens, h, w).mean((2, 3)), "encoder": tokens.mean(1)}
    moments = tokenizer.moments(tokens, h, w).flatten(2).transpose(1, 2) if is_vfm else tokens
    mean, logvar = moments.float().chunk(2, dim=2)  # (B, h*w, d) each
    noise = [rng("cknna", i).standard_normal(mean.shape[1:], np.float32) for i in indices.tolist()]
    noise = torch.from_numpy(np.stack(noise)).to(mean.device)
    z = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise
    found = {"latents": z.mean(1)}
    if is_vfm:
        found["encoder"] = tokens[..., -tokenizer.arguments["dim"]:].mean(1)
    return found


# ---- images

def read_header(f, size):
    """(shape, "C" or "F": the order in memory, dtype) by the header of an .npy file of `size`
    bytes, open at its start. ValueError for a shape that the file cannot hold, pickled objects."""
    major, _ = np.lib.format.read_magic(f)
    shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(f)
    end = f.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=1) < 0 or end != size:
        raise ValueError(f"an array of {dtype} {shape} in {size} bytes")
    return shape, "F" if fortran else "C", dtype


def read_array(npz, name):
    """An array of the open zip `npz`, to its end, where zipfile compares the CRC."""
    entry = npz.getinfo(name + ".npy")
    if entry.file_size > 2 ** 28:  # eight times 2048 x 2048 in fp64
        raise ValueError(f"{name} takes {entry.file_size} bytes")
    data = npz.read(entry)
    shape, order, dtype = read_header(f := io.BytesIO(data), len(data))
    return np.frombuffer(data, dtype, offset=f.tell()).reshape(shape, order=order)


class ImageSet:
    """REF, SAMPLES or DATA: n images, statistics, or both. Errors: UserError. size: of centre crops
    (None: none, and all images have one size). split: of `shapes`. classes: see ImageFolder."""

    def __init__(self, path, size=None, split="train", classes=()):
        self.path, self.size, self.side = str(path), size, (size, size)
        self.data, self.statistics, self.n = None, {}, 0
        if path == "shapes":
            self.data = Shapes(split, 8192 if split == "train" else 512, size or 64)
        elif Path(path).is_dir():
            self.data = ImageFolder(path, classes)
        elif self._is_zip():
            self._open_npz()
        else:
            raise UserError(f"{path}: {self._named()}")
        if self.data is not None:
            self.n = len(self.data)
            if not size:
                self.side = self.data.image(0).size  # (W, H)
        if self.n == 1:
            raise UserError(f"{path} holds one image; a covariance takes at least two")

    def _is_zip(self):
        if not Path(self.path).is_file():
            return False
        with reading(self.path, "file"), open(self.path, "rb") as f:  # by its path, it hides errors
            return zipfile.is_zipfile(f)

    def _named(self):
        """What is neither a folder nor an npz."""
        if not Path(self.path).is_file():
            return "not found"
        with open(self.path, "rb") as f:
            start = f.read(6)
        if start == b"\x93NUMPY":
            return ("an .npy file; an npz is needed: np.savez('NAME.npz', arr_0=images), or "
                    "mu=..., sigma=... of statistics")
        if start[:1] == b"\x80":
            return ("a pickle, which is never loaded: it could run code; docs/evaluation.md shows "
                    "how its statistics become an npz")
        return "neither a folder nor a whole npz"

    def _open_npz(self):
        with reading(self.path, "npz"), zipfile.ZipFile(self.path) as npz:
            # open() compares the two places of an entry's name: no flipped bit can hide it
            for entry in npz.infolist():
                npz.open(entry).close()
            keys = [name.removesuffix(".npy") for name in npz.namelist()]
            if {"mu", "sigma"} <= set(keys):
                known = {"mu", "sigma", "mu_s", "sigma_s", "n", "resize", "weights"}
                self.statistics = {k: read_array(npz, k) for k in keys if k in known}
                if "n" in keys and operator.index(self.statistics["n"]) < 2:
                    raise ValueError(f"statistics of {self.statistics['n']} images")
            if "arr_0" in keys:
                with npz.open("arr_0.npy") as f:
                    self.n, H, W = self._read_header(npz, f)
                if not self.size:
                    self.side = W, H
        if not self.n and not self.statistics:
            torch_file = any(key.endswith("/data.pkl") for key in keys)
            kind = "is PyTorch's, no npz" if torch_file else f"holds {', '.join(keys)[:200]}"
            raise UserError(f"{self.path} {kind}: neither images (arr_0) nor statistics (mu, "
                            "sigma); docs/evaluation.md shows how others' become an npz")

    def _read_header(self, npz, f):
        """(N, H, W), by arr_0's header in its open entry f."""
        shape, order, dtype = read_header(f, npz.getinfo("arr_0.npy").file_size)
        images = len(shape) == 4 and shape[3] == 3 and dtype == np.uint8 and min(shape)
        if not images or order == "F" or shape[1] * shape[2] > 2 ** 24:
            raise UserError(f"{self.path}: arr_0 must be uint8 (N, H, W, 3) in C order, at most 16 "
                            f"megapixels each, not {dtype} {shape} in {order} order")
        return shape[:3]

    def _prepare(self, img):
        """PIL RGB -> uint8 (3, H, W)."""
        return to_pixels(center_crop(img, self.size) if self.size else img)

    def __getitem__(self, item):
        """(0, i) -> (uint8 (3, H, W), i), or a UserError, as data.Crops."""
        i = item[1]
        try:
            img = self.data.image(i)
        except UserError as e:
            return e
        if not self.size and img.size != self.side:
            W, H = self.side
            return UserError(f"images of different sizes: {self.data.path(0)} is {W}x{H}, "
                             f"{self.data.path(i)} is {img.width}x{img.height}; "
                             "--size N centre-crops all to N")
        return self._prepare(img), i

    def read(self, args, rank, world, device):
        """Yields (images uint8 (B, 3, H, W), indices (B,)): every world-th batch. A batch is the
        same for any number of ranks."""
        order, error = in_order(self.n, args.batch_size), None
        if self.data is None:
            stream = self._read_npz(order, rank, world)
        else:
            stream = batches(self, order[rank::world], args.workers, device)
        with tqdm(total=self.n, desc=self.path, unit="img", disable=rank > 0, mininterval=1) as bar:
            try:
                for images, indices in stream:
                    yield images.to(device), indices.cpu()
                    bar.update(min(len(images) * world, self.n - bar.n))
            except UserError as e:
                error = str(e)
        # one rank's error ends all: else the others would wait for ever
        if world > 1 and dist.is_initialized():
            errors = [None] * world
            dist.all_gather_object(errors, error)
            error = next(filter(None, errors), None)
        if error:
            raise UserError(error)

    def _read_npz(self, order, rank, world):
        """A batch at a time: arr_0 of 50,000 images is 10 GB, perhaps compressed."""
        with (reading(self.path, "npz"), zipfile.ZipFile(self.path) as npz,
              npz.open("arr_0.npy") as f):
            _, H, W = self._read_header(npz, f)
            for k, items in enumerate(order):
                # the last one ends the entry, where zipfile compares its CRC
                data = f.read(len(items) * H * W * 3)
                if k % world == rank:
                    images = np.frombuffer(data, np.uint8).reshape(len(items), H, W, 3)
                    images = [self._prepare(Image.fromarray(img)) for img in images]
                    yield torch.stack(images), torch.tensor([i for _, i in items])


# ---- commands

class Report:
    """The figures, each with its sources, as a table and as JSON. inputs: what was compared."""

    def __init__(self, **inputs):
        self.inputs, self.figures, self.warnings = inputs, [], []

    def add(self, metric, value, n_ref, n, resize, weights, std=None, note=""):
        self.figures.append({
            "metric": metric, "value": value, "std": std, "n_ref": n_ref, "n": n,
            "resize": resize, "weights": weights and weights[:8], "note": note})

    def warn_few(self, name, n):
        text = ", not the protocol's 50,000: FID and sFID are higher, IS lower"
        if n and n < 2048:
            text = (" are too few. Below 2048 a Frechet distance and IS are far off, and compare "
                    "only at the same N (KID is unbiased)")
        if n and n < 10_000:
            self.warnings.append(f"{name}: {n} images{text}")

    def write(self, path):
        print("\n" + "\n".join(f"{name}: {text}" for name, text in self.inputs.items()))
        rows = [("metric", "value", "N ref", "N", "resize", "weights", "")]
        for f in self.figures:
            value = f"{f['value']:.4f}" if abs(f["value"]) >= 0.1 else f"{f['value']:.3e}"
            value += f" +- {f['std']:.2g}" if f["std"] else ""
            traced = ("-" if f[k] is None else str(f[k])
                      for k in ("n_ref", "n", "resize", "weights"))
            rows.append((f["metric"], value, *traced, f["note"]))
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())
        for text in self.warnings:
            print(f"WARNING: {text}")
        if path:
            write_atomically(path, lambda f: f.write(json.dumps(vars(self), indent=1).encode()))


def evaluate(args, rank, world, device):
    """REF SAMPLES: every metric of generated images. With --save-stats REF may stand alone."""
    sets = {name: on_rank_0(ImageSet, path, args.size)
            for name, path in zip(("REF", "SAMPLES"), args.paths)}
    report = Report(**{name: images.path for name, images in sets.items()})
    inception = args.features == "inception"
    offered = ["fid", "sfid", "is", "pr", "kid"] if inception else ["fid", "pr", "kid"]
    metrics = choose(args.metrics, offered)
    for name, images in sets.items():
        metrics = possible(metrics, name, images, args, report)
    if args.save_stats and not sets["REF"].n:
        raise UserError(f"--save-stats: {sets['REF'].path} holds no images")
    if len(sets) == 2:
        check_order(metrics, *sets.values(), report)
    for text in report.warnings:  # before the work, and after it
        print_0(f"WARNING: {text}")
    with rank_0_first():
        network = load_network(args, device)

    statistics, computed = {}, {}  # name -> layer -> FeatureStatistics
    for name, images in sets.items():
        saving = args.save_stats and name == "REF"
        keep = {layer: False for metric, layer in (("fid", "pool"), ("sfid", "spatial"))
                if metric in (offered if saving else metrics)}  # see extract
        stored = {}
        if images.statistics and not saving:
            stored = {layer: FeatureStatistics.stored(images, layer, network, device)
                      for layer in keep}
            keep = {}
        if len(sets) == 2 and {"pr", "kid"} & set(metrics):
            keep["pool"] = True
        if name == "SAMPLES" and "is" in metrics:
            keep["logits"] = True
        computed[name] = (extract(images, network.net, keep, args, rank, world, device)
                          if keep else {})
        # the stored ones may be of more images, as in ADM's files
        statistics[name] = computed[name] | stored
    if rank != 0:
        return
    if args.save_stats:
        save_statistics(args.save_stats, sets["REF"].n, statistics["REF"], network)
    if len(sets) == 2:
        add_figures(report, metrics, sets, statistics, computed, network, args, device)
        add_warnings(report, sets, network.resize)
        report.write(args.json)


def choose(given, offered):
    """The metrics of --metrics, or all that are offered."""
    chosen = given.split(",") if given else offered
    if unknown := [m for m in chosen if m not in offered]:
        raise UserError(f"--metrics {','.join(unknown)}: here there are {','.join(offered)}")
    return chosen


def possible(metrics, name, images, args, report):
    """The metrics that REF or SAMPLES allows: statistics allow fewer than images. UserError where
    --metrics names more."""
    lacks = set()
    if not images.n:
        lacks = {"is", "pr", "kid"} if name == "SAMPLES" else {"pr", "kid"}
    if images.statistics and not {"mu_s", "sigma_s"} <= images.statistics.keys():
        lacks.add("sfid")
    lacking = [m for m in metrics if m in lacks]
    if lacking and args.metrics:
        raise UserError(f"{images.path} lacks the images (sfid: mu_s, sigma_s) for --metrics "
                        f"{','.join(lacking)}")
    if lacking:
        report.warnings.append(f"{images.path} holds statistics only: no {', '.join(lacking)}")
    metrics = [m for m in metrics if m not in lacks]
    if "pr" in metrics and images.n < 4:  # k = 3 neighbours
        raise UserError(f"{images.path}: precision and recall take at least 4 images")
    return metrics


def check_order(metrics, ref, samples, report):
    """Whether REF and SAMPLES look exchanged. UserError where SAMPLES alone holds statistics, and
    that would change a figure."""
    advice = "exchanged? The reference comes first"
    if samples.statistics and not ref.statistics:
        found = f"SAMPLES {samples.path} holds statistics, REF {ref.path} does not: {advice}"
        if {"is", "pr"} & set(metrics):
            raise UserError(f"{found} (--metrics fid is the same in either order)")
        report.warnings.append(found)
    n = ref.statistics.get("n", 0) if ref.statistics else ref.n
    if 0 < n < samples.n:
        report.warnings.append(f"REF {ref.path} is {n} images, SAMPLES {samples.path} is "
                               f"{samples.n}: {advice}")


@torch.inference_mode()
def extract(images, net, keep, args, rank, world, device):
    """layer -> FeatureStatistics of an ImageSet. keep: layer -> whether its rows are kept."""
    out = {layer: FeatureStatistics(images.n, net.dims[layer], device, rows)
           for layer, rows in keep.items()}
    for x, indices in images.read(args, rank, world, device):
        features = net(x, args.resize)
        for layer, statistics in out.items():
            statistics.add(features[layer], indices)
    return {layer: statistics.finish() for layer, statistics in out.items()}


def save_statistics(path, n, statistics, network):
    arrays = {"n": n, "resize": network.resize, "weights": network.weights}
    for layer, values in statistics.items():
        suffix = "_s" if layer == "spatial" else ""
        arrays["mu" + suffix] = values.mu.cpu().numpy()
        arrays["sigma" + suffix] = values.sigma.cpu().numpy()
    write_atomically(path, lambda f: np.savez(f, **arrays))
    print(f"saved the statistics of {n} images in {path}")


def add_figures(report, metrics, sets, statistics, computed, network, args, device):
    n_ref, n = sets["REF"].n, sets["SAMPLES"].n
    traced = network.resize, network.weights
    for metric, layer, name in (("fid", "pool", network.distance), ("sfid", "spatial", "sFID")):
        if metric in metrics:
            a, b = statistics["REF"][layer], statistics["SAMPLES"][layer]
            report.add(name, frechet(a, b), a.n, b.n, *traced)
    if "is" in metrics:
        logits = computed["SAMPLES"]["logits"].rows
        note = f"{args.splits} splits, shuffled" if args.splits else "chunks of 5000"
        mean, std = inception_score(logits, args.splits, args.seed)
        report.add("IS", mean, None, n, *traced, std, note)
    if {"pr", "kid"} & set(metrics):
        ref, samples = (computed[name]["pool"].rows.to(device) for name in sets)
    if "pr" in metrics:
        for name, value in zip(("precision", "recall"), precision_recall(ref, samples)):
            report.add(name, value, n_ref, n, *traced, note="k = 3")
    if "kid" in metrics:
        mean, std, size = kid(ref, samples, seed=args.seed)
        note = f"subsets of {size}" + (", for want of 1000 images" if size < 1000 else "")
        report.add("KID", mean, n_ref, n, *traced, std, note)


def add_warnings(report, sets, resize):
    ref, samples = sets.values()
    if ref.n and samples.n and ref.side != samples.side:
        report.warnings.append("REF is {}x{} px, SAMPLES {}x{}".format(*ref.side, *samples.side))
    for name, images in sets.items():
        stored = images.statistics
        report.warn_few(name, int(stored.get("n", 0)) if stored else images.n)
        # of others' files ADM's alone hold mu_s
        if stored and "resize" not in stored and ("mu_s" not in stored or resize != "tf1"):
            report.warnings.append(f"{images.path} does not name its resize rule: ADM's is tf1, "
                                   f"pytorch-fid's torch; this run used {resize}")


def open_tokenizer(path, size, device):
    """(tokenizer in eval mode, image side: `size`, else that of its training, 256 of a file that
    does not tell)."""
    content = load_file(path, "tokenizer") if os.path.exists(path) else None
    tokenizer = load_tokenizer(path, VAE, VFMVAE, FluxVAE, content=content)
    with reading(path, "tokenizer"):
        size = size or operator.index(content.get("recipe", {}).get("size", 256))
    if isinstance(tokenizer, VFMVAE) and not tokenizer.arguments["foundation"]:
        raise UserError(f"{path} holds no encoder: it can only decode")
    if size < 1 or size % (tokenizer.factor * tokenizer.multiple):
        raise UserError("--size must be divisible by "
                        f"{tokenizer.factor * tokenizer.multiple}, not {size}")
    return tokenizer.to(device), size


@torch.inference_mode()
def reconstruction(args, rank, world, device):
    """--recon: rFID under both resize rules, PSNR, SSIM, LPIPS, of 8-bit reconstructions of
    centre-cropped images."""
    metrics = choose(args.metrics, ["rfid", "psnr", "ssim", "lpips"])
    tokenizer, size = open_tokenizer(args.recon[0], args.size, device)
    images = on_rank_0(ImageSet, args.recon[1], size, "val")
    n = images.n
    if not n:
        raise UserError(f"--recon: {images.path} holds no images")
    measures = {k: f for k, f in (("psnr", psnr), ("ssim", ssim)) if k in metrics}
    weights, pairs = {}, {}  # pairs: resize rule -> two FeatureStatistics
    try:
        with rank_0_first():
            if "lpips" in metrics:
                lpips, vgg16 = load_lpips(args.vgg16, args.lpips_heads)
                measures["lpips"], weights["lpips"] = lpips.to(device), sha256(vgg16)
            if "rfid" in metrics:
                network = load_network(args, device)
                rules = ["tf1", "torch"] if args.features == "inception" else [network.resize]
                dims = network.net.dims["pool"]
                pairs = {rule: [FeatureStatistics(n, dims, device) for _ in range(2)]
                         for rule in rules}
    except UserError as e:
        raise UserError(f"{e}; or leave it out with --metrics, of rfid,psnr,ssim,lpips") from None

    values = torch.zeros(n, len(measures), dtype=torch.float64)
    for pixels, indices in images.read(args, rank, world, device):
        x = pixels.float() / 127.5 - 1  # (B, 3, H, W)
        recon = to_uint8(by_parts(lambda few: tokenizer.decode(tokenizer.encode(few)), x,
                                  x[0, 0].numel()))  # (B, H, W, 3)
        recon = torch.from_numpy(recon).permute(0, 3, 1, 2).to(device)
        y = recon.float() / 127.5 - 1  # as a saved PNG would hold it
        for k, measure in enumerate(measures.values()):
            values[indices, k] = measure(x, y).double().cpu()
        for rule, (a, b) in pairs.items():
            a.add(network.net(pixels, rule)["pool"], indices)
            b.add(network.net(recon, rule)["pool"], indices)
    if dist.is_initialized():
        dist.all_reduce(values)  # each is zero but on one rank

    report = Report(tokenizer=f"{args.recon[0]} {sha256(args.recon[0])[:8]}",
                    images=f"{images.path}, {size} px")
    for rule, pair in pairs.items():
        a, b = (statistics.finish() for statistics in pair)  # all ranks take part
        if rank == 0:
            report.add("r" + network.distance, frechet(a, b), n, n, rule, network.weights)
    if rank != 0:
        return
    for k, name in enumerate(measures):
        report.add(name.upper(), values[:, k].mean().item(), None, n, None,
                   weights.get(name), note="dB" if name == "psnr" else "")
    if pairs:
        report.warn_few(images.path, n)
    report.write(args.json)


def probe(args, rank, world, device):
    """--probe: the linear probe of latents (Figure 3), or of pre-adapter tokens; in one process."""
    if rank != 0:
        return
    path, *folders = args.probe
    tokenizer, size = open_tokenizer(path, args.size, device)
    sets, classes = [], None
    for folder, split in zip(folders, ("train", "val")):
        data = ImageSet(folder, size, split, classes).data
        if data is None or data.labels is None:
            raise UserError(f"--probe: {folder} must hold the class folders, or be shapes")
        sets.append(data)
        classes = data.classes
    train, val = (encode_images(tokenizer, data, size, len(data), args.workers, device,
                                args.batch_size) for data in sets)
    x, val_x = (e.tokens if args.tokens else e.latents for e in (train, val))
    accuracy = linear_probe(x, train.labels, val_x, val.labels, device)
    report = Report(tokenizer=path, train=folders[0], val=f"{folders[1]}, {size} px")
    kind = "pre-adapter tokens" if args.tokens else "latents"
    report.add("probe %", accuracy, len(x), len(val_x), None, sha256(path),
               note=f"{kind}, {x.shape[1]} channels")
    report.write(args.json)


def load_reference(args, device):
    """(features(name of the set, pixels uint8 (B, 3, H, W), scale) -> (B, D), the weights' sha256,
    the rule's name) of --reference, or of the judge."""
    if args.judge:
        net, digest, rule, _ = args.judge
        net.to(device)

        def features(name, pixels, scale):
            x = resize(pixels.float(), scale, "bilinear", antialias=False)
            return net(x.round().byte(), rule)["pool"]
        return features, digest, rule
    net, digest = load_dinov2(args.reference, (DINOv2, ViT, SigLIP))
    encoder = net.to(device).encoder
    if isinstance(encoder, DINOv2):
        encoder.rule = "antialias"  # timm's positions, as the protocol's reference has them

    def features(name, pixels, scale):
        if name != "turned":
            x = resize_pil(pixels, net.side)
        else:  # as the protocol has it, at scale 1 too
            side = int(net.side * scale)
            x = F.interpolate(pixels.float() / 255, (side, side), mode="bilinear")
        pad = -x.shape[-1] % encoder.patch
        x = F.pad(x, (0, pad, 0, pad), mode="reflect")
        return encoder((x - encoder.pixel_mean) / encoder.pixel_std)[1].mean(1)
    return features, digest, f"PIL {net.side}"


@torch.inference_mode()
def alignment(args, rank, world, device):
    """--cknna: CKNNA of latents, and of the tokenizer's own encoder, with a reference encoder;
    SE-CKNNA, its mean over noisy, turned and scaled images; in one process."""
    if rank != 0:
        return
    path, folder = args.cknna
    tokenizer, size = open_tokenizer(path, args.size, device)
    if size % (4 * tokenizer.factor):
        raise UserError("--cknna shrinks images to a quarter: --size must be divisible by "
                        f"{4 * tokenizer.factor}, not {size}")
    images = ImageSet(folder, size, "val")
    if images.n <= 10:
        raise UserError(f"--cknna: {folder} holds {images.n} images; 10 neighbours take more")
    if images.n > 20_000:
        raise UserError(f"--cknna: {folder} holds {images.n} images, and kernels of N x N would "
                        "not fit: give a folder of 10,000, as the protocol has")
    reference, digest, rule = load_reference(args, device)
    rows = {}  # (set, whose) -> (n, D)
    for pixels, indices in images.read(args, 0, 1, device):
        for name, chosen, x, scale in variants(pixels, indices):
            x = x.to(device)
            found = latents_and_tokens(tokenizer, x, chosen, scale)
            found["reference"] = reference(name, x, scale)
            for whose, features in found.items():
                out = rows.setdefault((name, whose), torch.zeros(images.n, features.shape[1]))
                out[chosen] = features.float().cpu()
    report = Report(tokenizer=f"{path} {sha256(path)[:8]}", images=f"{images.path}, {size} px",
                    reference="the judge" if args.judge else args.reference)
    for whose in ("latents", "encoder"):
        if ("clean", whose) not in rows:
            continue
        by_set = {name: cknna(rows[name, whose], rows[name, "reference"])
                  for name, part in rows if part == whose}
        clean = by_set.pop("clean")
        traced = images.n, images.n, rule, digest
        report.add(f"CKNNA, {whose}", clean, *traced, note="clean, k = 10")
        note = "mean of " + ", ".join(f"{name} {value:.4f}" for name, value in by_set.items())
        report.add(f"SE-CKNNA, {whose}", sum(by_set.values()) / len(by_set), *traced, note=note)
    if images.n != 10_000:
        report.warnings.append(f"{images.n} images, not the protocol's 10,000: CKNNA is a figure "
                               "of its N")
    report.write(args.json)


# ---- the command line

def parse(argv=None, judge=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("paths", nargs="*", metavar="REF SAMPLES",
        help="folder, npz of images or of statistics, or shapes")
    add("--recon", nargs=2, metavar=("CKPT", "DATA"),
        help="rFID, PSNR, SSIM, LPIPS of a tokenizer")
    add("--probe", nargs=3, metavar=("CKPT", "TRAIN", "VAL"),
        help="linear probe of a tokenizer's latents")
    add("--cknna", nargs=2, metavar=("CKPT", "DATA"),
        help="CKNNA and SE-CKNNA of a tokenizer's latents and encoder against --reference")
    add("--reference", default="vitg14",
        help="--cknna: official name, encoder file or tokenizer checkpoint (default: %(default)s)")
    add("--tokens", action="store_true", help="--probe: of the tokens before the adapter")
    add("--metrics",
        help="of fid,sfid,is,pr,kid; --recon: rfid,psnr,ssim,lpips (default: all possible)")
    if judge:
        p.set_defaults(features="judge")
    else:
        add("--features", choices=["inception", "dinov2"], default="inception",
            help="dinov2: FD-DINOv2, and pr and kid on DINOv2's features")
    add("--encoder", default="vitl14",
        help="of --features dinov2: official name, DINOv2 file or tokenizer checkpoint")
    add("--resize", choices=["tf1", "torch"], default="tf1",
        help="to 299 px: tf1 as ADM's, torch as pytorch-fid")
    add("--size", type=count,
        help="centre-crop all images to this side in px (default: none, or the tokenizer's)")
    add("--splits", type=count,
        help="IS: this many shuffled parts, as torch-fidelity (default: chunks of 5000)")
    add("--seed", type=index, default=2020,
        help="of KID's subsets and --splits (default: torch-fidelity's, %(default)s)")
    add("--save-stats", metavar="FILE", help="npz for REF's statistics; SAMPLES may be absent")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--inception", metavar="FILE",
        help="pt_inception-2015-12-05-6726825d.pth (default: torch hub's cache)")
    add("--vgg16", metavar="FILE", help="torchvision's VGG16, for LPIPS")
    add("--lpips-heads", metavar="FILE", help="LPIPS v0.1 VGG heads")
    add("--batch-size", type=count, default=64, help="images a forward (default: %(default)s)")
    # on a CPU the network takes all cores
    workers = min(8, os.cpu_count()) if torch.cuda.is_available() else 0
    add("--workers", type=index, default=workers,
        help="loader processes a rank (default: %(default)s)")
    args = p.parse_args(argv)

    args.judge = judge
    if sum(map(bool, (args.paths, args.recon, args.probe, args.cknna))) != 1:
        raise UserError("give REF SAMPLES, --recon CKPT DATA, --probe CKPT TRAIN VAL or --cknna "
                        "CKPT DATA")
    if args.paths and len(args.paths) not in ((1, 2) if args.save_stats else (2,)):
        raise UserError(f"REF SAMPLES are two paths, not {len(args.paths)}; --save-stats takes one")
    # before the work, not after it
    for file in filter(None, (args.save_stats, args.json)):
        parent = Path(file).parent
        if not parent.is_dir() or not os.access(parent, os.W_OK) or Path(file).is_dir():
            raise UserError(f"cannot write {file}: no such folder, not writable, or a folder")
    return args


def main(argv=None, judge=None):
    """judge, in place of --features: a FeatureNetwork's fields; see results/judge.py."""
    args = parse(argv, judge)
    command = (reconstruction if args.recon else probe if args.probe
               else alignment if args.cknna else evaluate)
    command(args, *setup_ranks())


if __name__ == "__main__":
    launch(main)
