"""The CPU smoke test: `python test_smoke.py [WORD ...]`, or pytest. Minutes, no network, no data.

It reads like a specification, in the order of the files: each part against a closed form, a hand
value or an independent computation, each script end to end on small work. WORDs choose the tests
whose names contain one of them. Damaged files, kills and signals are test_faults.py's.
"""
import ast
import atexit
import contextlib
import copy
import csv
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest
from unittest.mock import Mock, patch

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw

import baselines
import captions
import data
import fid
import files
import losses
import mmdit
import model
import repa
import runs
import sample
import story
import toy
import train_dit
import train_tokenizer as tt
import vfm_vae
from baselines import VAE, FluxVAE
from files import (
    BatchedArray,
    SystemFailure,
    UserError,
    load_encoder,
    load_file,
    load_tokenizer,
    save_checkpoint,
)
from mmdit import MMDITS, MMDiT
from model import DECODERS, DITS, ENCODERS, DINOv2, LightningDiT, SigLIP, Tokenizer, ViT
from results import judge, t2i
from results import parts as miniature
from toy import Shapes

HERE = Path(__file__).resolve().parent
TMP = Path(tempfile.mkdtemp(prefix="aligntok-"))
atexit.register(shutil.rmtree, TMP, ignore_errors=True)
CPU = torch.device("cpu")
PLAIN = ["--preset", "tiny", "--batch-size", "4", "--val-images", "24", "--probe-images", "48",
         "--dtype", "fp32", "--disc-start", "0", "--log-every", "1", "--save-every", "2", "--size",
         "32"]
SMALL = [*PLAIN, "--encoder", "random:tiny14"]


# ----------------------------------------------------------------------------- what the tests share

@contextlib.contextmanager
def refused(*words, kind=UserError):
    """The block must raise an error of one line that holds these words."""
    try:
        yield
    except kind as e:
        assert "\n" not in str(e) and all(w in str(e) for w in words), str(e)
    else:
        raise AssertionError(f"no error about {words}")


def error_of(call, *args, kind=UserError):
    """The text of the error, one line, that a call must end in."""
    try:
        call(*args)
    except kind as e:
        assert "\n" not in str(e), "one line"
        return str(e)
    raise AssertionError(f"no {kind.__name__} from {args}")


@contextlib.contextmanager
def folder():
    # Windows deletes no file that is mapped
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as d:
        yield Path(d)


def same(a, b):
    """Bit equality of nested dicts, lists, tensors and numbers: the first path that differs, or
    None."""
    if isinstance(a, torch.Tensor):
        return None if torch.equal(a, b) else f"tensor, by {(a - b).abs().max()}"
    if not isinstance(a, (dict, list, tuple)):
        return None if a == b else f"{a} != {b}"
    keys, others = (x.keys() if isinstance(x, dict) else range(len(x)) for x in (a, b))
    if keys != others:
        return "keys, or length"
    return next((f"{k}.{d}" for k in keys if (d := same(a[k], b[k])) is not None), None)


def close(a, b, tolerance=1e-9):
    assert abs(a - b) <= tolerance * max(1, abs(b)), (a, b)


@contextlib.contextmanager
def recorded(module, name):
    """Inside it, a list of (arguments, result) of every call of a module's function."""
    calls, original = [], getattr(module, name)

    def function(*args, **kw):
        calls.append((args, original(*args, **kw)))
        return calls[-1][1]

    with patch.object(module, name, function):
        yield calls


def execute(script, *flags):
    """A script's main, in this process."""
    script.main([str(flag) for flag in flags])


def start(script, *flags, ranks=0):
    """A script in a process of its own, or in `ranks` of them under torchrun, with all their
    workers in one group."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks else []), HERE / script, *flags]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "TMPDIR": str(TMP)}
    return subprocess.Popen(
        [str(part) for part in command], text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True, env=os.environ | own)


def end(process, timeout=300):
    """What a process says on stderr until its end; a hang is killed, and fails. Nothing of its
    group stays."""
    try:
        return process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"a hang: {process.communicate()[1][-2000:]}") from None
    finally:
        kill(process)


def kill(process):
    """With its group, where the system has groups."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def complete(*command, **kw):
    process = start(*command, **kw)
    text = end(process)
    assert process.returncode == 0, text[-3000:]


def driver(path, change):
    """Writes a script that runs another, its first argument, after a change to the modules."""
    path.write_text("import hashlib, importlib, os, sys\n"
                    "import torch.distributed as dist\n"
                    "import data, files, losses, runs, train_dit\n"
                    "import train_tokenizer as tt\n"
                    f"{change}\n"
                    "runs.launch(importlib.import_module(sys.argv.pop(1)[:-3]).main)\n")
    return path


# In fp64 ranks can be compared with one process. In fp32 they differ by rounding, which one
# LeakyReLU near 0 makes 1e-3 of a gradient, and the GAN multiplies by 10 to 100 a step.
IN_FP64 = """
import torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float, from_numpy = torch.Tensor.double, torch.from_numpy
torch.from_numpy = lambda a: from_numpy(a).double() if a.dtype.kind == "f" else from_numpy(a)
"""


def rows_of(out):
    """The rows of a run's log.csv."""
    return list(csv.DictReader((out / "log.csv").read_text().splitlines()))


def load_both_ways(path):
    """load_image, after load_pixels has done the same."""
    try:
        img = data.load_image(path)
    except UserError:
        error_of(data.load_pixels, path)
        raise
    assert np.array_equal(data.load_pixels(path).permute(1, 2, 0), img)
    return img


def png_chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png_of(width, height, pixels=b"", chunk=b"", depth=8):
    """A PNG file by hand: its header may claim anything. chunk: a further one, after the header."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + chunk + pixels + png_chunk(b"IEND", b"")


def write_shapes(root, n=24, size=32):
    """The first n shapes as PNG files, one folder per class."""
    shapes = Shapes(n=n, size=size)
    for i in range(n):
        path = root / shapes.classes[shapes.labels[i]] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.image(i).save(path)
    return str(root)


def write_shard(path, samples):
    """A tar as img2dataset writes it. samples: {key: {suffix: bytes}}."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_shards(root, n=24, size=32):
    """The first n shapes with their captions in two shards."""
    shapes, shards = Shapes(n=n, size=size), ({}, {})
    for i, caption in enumerate(shapes.captions):
        png = io.BytesIO()
        shapes.image(i).save(png, "PNG")
        shards[2 * i // n][f"{i:05d}"] = {"png": png.getvalue(), "txt": caption.encode()}
    root.mkdir()
    for k, samples in enumerate(shards):
        write_shard(root / f"{k:05d}.tar", samples)
    return str(root)


def random_weights(net, seed=0, scale=0.2):
    """Nothing zero or one that would hide a mistake: at initialisation a LightningDiT's blocks, for
    one, are the identity."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=g))
    return net.eval()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def frozen(net):
    return net.requires_grad_(False).eval()


def small_tokenizer(d=8, seed=0):
    torch.manual_seed(seed)
    decoder = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1}
    tokenizer = Tokenizer({"dim": 64, "depth": 1, "grid": 4}, decoder, d=d)
    tokenizer.latent_mean.normal_()
    tokenizer.latent_std.uniform_(0.5, 2)
    return frozen(tokenizer)


def save_tokenizer(tokenizer, path):
    save_checkpoint(path, {"arguments": tokenizer.arguments, "tokenizer": tokenizer.state_dict()})
    return str(path)


def small_dit(**changed):
    sizes = {"dim": 32, "depth": 2, "heads": 2, "d": 4, "num_classes": 5, "grid": (4, 4)}
    return LightningDiT(**sizes | changed)


def save_dit(dit, path, tokenizer):
    save_checkpoint(path, {"arguments": dit.arguments, "ema": dit.state_dict(),
                           "recipe": {"tokenizer": files.fingerprint(tokenizer)}})
    return str(path)


@functools.cache
def small_run():
    """All three stages, two steps each, with the GAN on; the folder of the run."""
    execute(tt, *SMALL, "--out", TMP / "run", "--steps", 2)
    return TMP / "run"


@contextlib.contextmanager
def mini_size():
    with patch.dict(DITS, mini={"dim": 32, "depth": 1, "heads": 2}):
        yield


def mini_dit(d):
    """Flags of train_dit.py for a tokenizer, and 24 and 12 images, that are written to folder d."""
    return ["--preset", "tiny", "--model", "mini", "--size", "32", "--batch-size", "8", "--dtype",
            "fp32", "--grid-every", "99", "--save-every", "99",
            "--tokenizer", save_tokenizer(small_tokenizer(), d / "tok.pt"),
            "--data", write_shapes(d / "data" / "train", size=48),
            "--val", write_shapes(d / "data" / "val", 12, 48)]


def gaussian(mu, sigma):
    """Statistics without the images behind them."""
    mu, sigma = (torch.tensor(v).double() for v in (mu, sigma))
    return SimpleNamespace(n=None, rows=None, mu=mu, sigma=sigma)


# ---------------------------------------------------------------------------------------- the house

TIERS = [{"model", "losses"}, {"files", "mmdit", "repa"}, {"runs", "data"},
         {"toy", "baselines", "captions", "vfm_vae"}, {"fid", "sample", "story"},
         {"train_tokenizer", "train_dit"}]
ON_TOP = {"test_smoke", "test_faults", "test_gpu", "bench", "results"}  # they may import anything


def test_imports_go_one_way():
    """A file imports only from the tiers below its own; the networks and losses only torch."""
    tier = {name: i for i, names in enumerate(TIERS) for name in names}
    for path in [*HERE.glob("*.py"), *HERE.glob("results/*.py")]:
        imports = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                imports |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imports.add(node.module.split(".")[0])
        if path.stem not in tier:
            assert {path.stem, path.parent.name} & ON_TOP, f"{path.name} has no tier"
            continue
        above = {name for name in imports & tier.keys() if tier[name] >= tier[path.stem]}
        assert not above | imports & ON_TOP, f"{path.name} imports {above | imports & ON_TOP}"
        assert path.stem not in TIERS[0] or imports <= {"torch", "math"}, path.name


# ----------------------------------------------------------------------------------------- model.py

def test_parameter_counts():
    """The named sizes are the published ones, and the keys the official ones."""
    encoders = {"vits14": (22_056_576, 175), "vitb14": (86_580_480, 175),
                "vitl14": (304_368_640, 343), "vitg14": (1_136_480_768, 567)}
    dits = {"B/1": 130_556_192, "L/1": 458_152_960, "XL/1": 675_256_736, "1p0B/1": 1_029_401_120,
            "1p6B/1": 1_631_767_120}
    with torch.device("meta"):
        for name, (number, tensors) in encoders.items():
            plain, reg = (DINOv2(**ENCODERS[name], registers=n) for n in (0, 4))
            assert parameters(plain) == number and len(plain.state_dict()) == tensors, name
            assert parameters(reg) == number + 4 * plain.dim, name
            assert len(reg.state_dict()) == tensors + 1, name
        for name, sizes in {"dino-s16": (21_665_664, 150), "dino-b16": (85_798_656, 150),
                            "mae-b16": (85_798_656, 150), "mae-l16": (303_301_632, 294),
                            "mae-h14": (630_764_800, 390),
                            "siglip2-l16-512": (316_742_656, 400)}.items():
            net = model.make_encoder(**ENCODERS[name])
            assert (parameters(net), len(net.state_dict())) == sizes, name
        assert {name: parameters(LightningDiT(**DITS[name])) for name in dits} == dits
        vae, flux, flux2 = (VAE(DECODERS["vavae"]), FluxVAE(baselines.FLUX),
                            FluxVAE(baselines.FLUX, 32, flux2=True))
    assert set(DITS) == {"tiny", *dits}
    assert parameters(vae.encoder) == 28_413_248 and parameters(vae.decoder) == 41_417_603
    assert parameters(flux.encoder) == 34_274_208 and parameters(flux.decoder) == 49_545_475
    assert parameters(flux2.encoder) == 34_425_856 and parameters(flux2.decoder) == 49_620_259
    assert [len(m.state_dict()) - 2 for m in (flux, flux2)] == [244, 251 - 3]  # 3 of its BatchNorm
    assert parameters(losses.PatchGAN()) == 2_765_633
    # 2/3 of 4 x 64, rounded up to a multiple of 8
    assert model.Block(64, 1, swiglu=True).mlp.w3.in_features == 176
    for key in ("encoder.down.0.block.1.conv2.weight", "encoder.down.2.block.0.nin_shortcut.weight",
                "encoder.down.4.attn.1.proj_out.bias", "encoder.down.3.downsample.conv.weight",
                "encoder.mid.attn_1.q.weight", "decoder.up.4.attn.2.norm.weight",
                "decoder.up.1.upsample.conv.bias"):
        assert key in vae.state_dict(), key


def test_initialisation():
    """Mean and standard deviation of each weight at the start, by the published rules: the first
    pattern in its name counts."""
    sizes = {"dim": 64, "depth": 1, "heads": 2, "patch": 2, "num_classes": 99, "qk_norm": True}
    for net, rules in (
            (DINOv2(dim=128, depth=1, registers=4, grid=8), {
                "patch_embed": None, "bias": (0, 0), "norm": (1, 0), "gamma": (1, 0),
                "mask_token": (0, 0), "cls_token": (0, 1e-6), "register": (0, 1e-6),
                "": (0, 0.02)}),
            (LightningDiT(**sizes), {
                "pos_embed": None, "bias": (0, 0), "norm": (1, 0), "adaLN": (0, 0),
                "final_layer.linear": (0, 0), "t_embedder": (0, 0.02), "y_embedder": (0, 0.02),
                "": "xavier"}),
            (losses.PatchGAN(16), {
                "main.0.bias": None, "main.11.bias": None, "bias": (0, 0), "main.3.": (1, 0.02),
                "main.6.": (1, 0.02), "main.9.": (1, 0.02), "": (0, 0.02)})):
        for name, p in net.named_parameters():
            rule = next(rule for pattern, rule in rules.items() if pattern in name)
            if rule == "xavier":  # uniform; a convolution counts as the linear map of a patch
                limit = (6 / sum(p.flatten(1).shape)) ** 0.5
                assert 0.95 * limit < p.abs().max() <= limit, name
                rule = 0, limit / 3 ** 0.5
            if rule:
                (mean, std), n = rule, p.numel()
                assert abs(p.mean() - mean) <= 5 * std / n ** 0.5, name
                assert abs(p.std(correction=0) - std) <= 5 * std / (2 * n) ** 0.5, name


def test_dinov2_against_numpy():
    """A forward of a one-block register model on an oblong image, in plain numpy with a loop over
    the heads."""
    net = random_weights(DINOv2(dim=128, depth=1, registers=4, grid=3), scale=0.1).double()
    torch.nn.init.normal_(net.mask_token)  # a plain forward does not read it
    w = {k: v.numpy() for k, v in net.state_dict().items()}
    x = torch.randn(1, 3, 28, 42, dtype=torch.float64)

    def norm(t, name):
        unit = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, keepdims=True) + 1e-6)
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(t, name):
        return t @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    squares = [x[0, :, i:i + 14, j:j + 14].numpy() for i in (0, 14) for j in (0, 14, 28)]
    patches = [(s * w["patch_embed.proj.weight"]).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
               for s in squares]
    places = net.position_embedding(2, 3)[0].detach().numpy()
    tokens = np.stack([w["cls_token"][0, 0], *patches]) + places
    tokens = np.concatenate([tokens[:1], w["register_tokens"][0], tokens[1:]])
    q, k, v = np.split(linear(norm(tokens, "blocks.0.norm1"), "blocks.0.attn.qkv"), 3, axis=1)
    heads = []
    for h in (slice(0, 64), slice(64, 128)):
        a = np.exp(q[:, h] @ k[:, h].T / 8)
        heads.append(a / a.sum(1, keepdims=True) @ v[:, h])
    attended = linear(np.concatenate(heads, 1), "blocks.0.attn.proj")
    tokens = tokens + w["blocks.0.ls1.gamma"] * attended
    hidden = linear(norm(tokens, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    tokens = tokens + w["blocks.0.ls2.gamma"] * linear(hidden, "blocks.0.mlp.fc2")
    tokens = norm(tokens, "norm")
    with torch.no_grad():
        cls, out = net(x)
    assert np.allclose(cls[0], tokens[0], atol=1e-10)
    assert np.allclose(out[0], tokens[5:], atol=1e-10)
    assert "divisible by 14" in error_of(net, x[..., :40], kind=ValueError)


def pil_bicubic(image, h, w):
    """An array (H, W) resized to (h, w) by PIL: bicubic, with antialias."""
    return np.array(Image.fromarray(image).resize((w, h), Image.BICUBIC))


def bicubic(v, out, scale, a):
    """The rows of v resampled to `out` of them, by a loop over the kernel's definition."""
    def kernel(t):
        t = abs(t)
        if t < 1:
            return (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1
        return a * (t ** 3 - 5 * t ** 2 + 8 * t - 4) if t < 2 else 0.0

    rows = []
    for i in range(out):
        centre = (i + 0.5) / scale - 0.5
        taps = range(math.floor(centre) - 1, math.floor(centre) + 3)
        rows.append(sum(kernel(centre - j) * v[min(max(j, 0), len(v) - 1)] for j in taps))
    return np.stack(rows)


def test_position_embedding_rules():
    """Plain models resample by the scale (h + 0.1) / grid with a kernel of a = -0.75, register
    models by size as PIL does, with antialias."""
    net = random_weights(DINOv2(dim=64, depth=0, grid=5))
    reg = DINOv2(dim=64, depth=0, registers=4, grid=5)
    reg.pos_embed = net.pos_embed
    theirs = copy.deepcopy(net)  # as VFM-VAE reads them: plain models by size
    for tower in (reg, theirs):
        vfm_vae.FoundationEncoder(tower, (0,), 1)
    grid = net.pos_embed.detach()[0, 1:].view(5, 5, 64).numpy()
    for h, w in ((3, 7), (1, 25)):
        rows = bicubic(grid.astype(float), h, (h + 0.1) / 5, -0.75).transpose(1, 0, 2)
        expected = bicubic(rows, w, (w + 0.1) / 5, -0.75).transpose(1, 0, 2)
        found = net.position_embedding(h, w).detach()
        assert np.allclose(found[0, 1:].view(h, w, 64), expected, atol=1e-5)
        assert torch.equal(found[:, 0], net.pos_embed[:, 0])
        found = reg.position_embedding(h, w).detach()[0, 1:].view(h, w, 64)
        for k in range(3):
            assert np.allclose(found[..., k], pil_bicubic(grid[..., k], h, w), atol=1e-5)
    assert net.position_embedding(5, 5) is net.pos_embed
    # the others: DINO v1 as a plain DINOv2; MAE and SigLIP2 by size, without antialias
    dino, mae, siglip = ViT(64, 0, grid=5), ViT(64, 0, grid=5, fixed=True), SigLIP(64, 0, grid=5)
    dino.pos_embed = mae.pos_embed = net.pos_embed
    siglip.vision_model["embeddings"]["position_embedding"].weight.data = net.pos_embed[0, 1:]
    assert torch.equal(dino.position_embedding(3, 7), net.position_embedding(3, 7))
    rows = bicubic(grid.astype(float), 3, 3 / 5, -0.75).transpose(1, 0, 2)
    expected = bicubic(rows, 7, 7 / 5, -0.75).transpose(1, 0, 2).reshape(21, 64)
    for found in (mae.position_embedding(3, 7)[0, 1:], siglip.position_embedding(3, 7),
                  theirs.position_embedding(3, 7)[0, 1:]):
        assert np.allclose(found.detach(), expected, atol=1e-5)


def test_plain_vit():
    """DINO v1 and MAE are a DINOv2 whose LayerScale is 1; MAE's positions are sines and cosines of
    column, then row, and zero for cls; heads are 64 wide, 80 in MAE's largest."""
    for fixed in (False, True):
        vit = random_weights(ViT(128, 2, patch=14, grid=3, fixed=fixed))
        dino = DINOv2(128, 2, grid=3)
        dino.load_state_dict(vit.state_dict(), strict=False)
        x = torch.randn(2, 3, 42, 42)
        assert all(map(torch.equal, vit(x), dino(x)))
        assert [p is vit.pos_embed for p in vit.never_trains()] == [True] * fixed
        assert vit.pos_embed.requires_grad != fixed
    embedding = vit.pos_embed[0].view(10, 4, 32)
    angle = 2 / 10000 ** (5 / 32)  # patch 5 of 3 x 3: row 1, column 2
    values = [math.sin(angle), math.cos(angle), math.sin(angle / 2), math.cos(angle / 2)]
    assert torch.allclose(embedding[6, :, 5], torch.tensor(values)) and not embedding[0].any()
    assert "ViT takes sides divisible by 14" in error_of(vit, x[..., :40], kind=ValueError)
    assert [ViT(dim, 1, grid=1).blocks[0].attn.heads for dim in (384, 1280)] == [6, 16]


def test_siglip():
    """In the vector's place: one learned query over the tokens, then an MLP; tanh GELU; pixels in
    [-1, 1] as they are, 16 px a token."""
    net, x = random_weights(SigLIP(64, 1, grid=2)), torch.rand(2, 3, 32, 48) * 2 - 1
    net.vision_model["head"].attention.in_proj_bias.data.normal_()
    assert torch.allclose(net.prepared(x), x, atol=1e-6)
    vector, tokens = net(x)
    head = net.vision_model["head"]
    weights, biases = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    q, k, v = (y @ w.T + b for y, w, b in zip((head.probe[0], tokens, tokens), weights, biases))
    y = head.attention.out_proj((q @ k.transpose(1, 2) / 8).softmax(2) @ v)[:, 0]  # (B, D)
    hidden = F.gelu(head.mlp.fc1(head.layernorm(y)), approximate="tanh")
    assert torch.allclose(vector, y + head.mlp.fc2(hidden), atol=1e-4)
    assert tokens.shape == (2, 6, 64) and torch.equal(net.features(x), net(net.prepared(x))[1])
    net.features(x).square().sum().backward()
    idle = {id(p) for p in net.parameters() if p.grad is None}  # DDP would wait for these
    assert idle == {id(p) for p in net.never_trains()} == {id(p) for p in head.parameters()}
    with torch.device("meta"):
        heads = [SigLIP(dim, 1).blocks[0].self_attn.heads for dim in (768, 1024, 1152, 1536)]
    assert heads == [12, 16, 16, 16]
    with runs.autocast(CPU, torch.bfloat16):  # what the blocks add to, and the positions, stay fp32
        assert net.embed(x).dtype == net(x)[1].dtype == torch.float32
        for encoder in (ViT(64, 1, patch=14, grid=3), DINOv2(64, 1, grid=3)):
            random_weights(encoder)
            cls = encoder.embed(torch.zeros(1, 3, 28, 28))[0, 0]
            positions = encoder.position_embedding(2, 2)[0, 0]
            assert torch.equal(cls, encoder.cls_token[0, 0] + positions)


def test_convolutional_parts():
    """GroupNorm's groups and epsilon, and LDM's asymmetric downsampling."""
    for channels, groups in ((128, 32), (512, 32), (64, 16)):
        x, norm = 0.01 * torch.randn(2, channels, 6, 4), random_weights(model.GroupNorm(channels))
        expected = F.group_norm(x, groups, norm.weight, norm.bias, 1e-6)
        assert torch.allclose(norm(x), expected, atol=1e-6)

    x, down = torch.randn(1, 64, 4, 4), random_weights(model.Downsample(64))
    kernel, bias = down.conv.weight[5], down.conv.bias[5]
    first = (x[0, :, :3, :3] * kernel).sum() + bias  # the first window is not padded
    last = (x[0, :, 2:, 2:] * kernel[:, :2, :2]).sum() + bias
    assert torch.allclose(down(x)[0, 5, [0, 1], [0, 1]], torch.stack([first, last]), atol=1e-4)


def plain_ldm(S, x, levels):
    """LDM's encoder (levels "down") or decoder ("up") from its published description, on a state
    dict whose keys say where there is attention, a shortcut, a resampling."""
    def conv(name, x, **how):
        return F.conv2d(x, S[f"{name}.weight"], S[f"{name}.bias"], **how)

    def norm(name, x):
        groups = x.view(len(x), min(32, x.shape[1] // 4), -1)
        unit = groups - groups.mean(2, keepdim=True)
        unit = (unit / (unit.square().mean(2, keepdim=True) + 1e-6).sqrt()).view(x.shape)
        return unit * S[f"{name}.weight"].view(-1, 1, 1) + S[f"{name}.bias"].view(-1, 1, 1)

    def silu(x):
        return x / (1 + torch.exp(-x))

    def block(name, x):
        y = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", x)), padding=1)
        y = conv(f"{name}.conv2", silu(norm(f"{name}.norm2", y)), padding=1)
        return y + (conv(shortcut, x) if (shortcut := f"{name}.nin_shortcut") + ".bias" in S else x)

    def attention(name, x):
        y = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", y).flatten(2) for part in "qkv")  # (B, C, h*w)
        weights = (q.transpose(1, 2) @ k / x.shape[1] ** 0.5).softmax(2)  # (B, query, key)
        return x + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view(x.shape))

    def middle(x):
        return block("mid.block_2", attention("mid.attn_1", block("mid.block_1", x)))

    x = conv("conv_in", x, padding=1)
    if levels == "up":
        x = middle(x)
    order = range(5) if levels == "down" else range(4, -1, -1)
    for level in (f"{levels}.{i}" for i in order):
        for i in range(sum(f"{level}.block.{j}.conv1.bias" in S for j in range(9))):
            x = block(f"{level}.block.{i}", x)
            if f"{level}.attn.{i}.q.bias" in S:
                x = attention(f"{level}.attn.{i}", x)
        if f"{level}.downsample.conv.bias" in S:
            x = conv(f"{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{level}.upsample.conv.bias" in S:  # each pixel becomes 2 x 2
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(f"{level}.upsample.conv", x, padding=1)
    if levels == "down":
        x = middle(x)
    return conv("conv_out", silu(norm("norm_out", x)), padding=1)


def test_ldm_networks():
    """Encoder and decoder against the plain ones, forward and backward (where attention takes
    another way)."""
    sizes = DECODERS["tiny"]
    for net, x, levels in ((model.Decoder(d=4, **sizes), torch.randn(2, 4, 2, 3), "up"),
                           (baselines.Encoder(d=4, **sizes), torch.randn(2, 3, 32, 48), "down")):
        S = dict(random_weights(net).named_parameters())
        found, expected = net(x), plain_ldm(S, x, levels)
        scale = expected.abs().max()
        assert (found - expected).abs().max() < 1e-4 * scale
        with torch.no_grad():
            assert (net(x) - expected).abs().max() < 1e-4 * scale
        grads = [torch.autograd.grad(out.square().mean(), S["conv_in.weight"])[0]
                 for out in (found, expected)]
        assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


def test_tokenizer():
    """z0 = A(E_p(x)), x^ = D(z0); the encoder's own normalisation and size; the statistics."""
    tok = frozen(Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"], d=24, hidden=16))
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    recon, z, tokens = tok(x)
    assert recon.shape == x.shape and z.shape == (2, 24, 4, 6) and tokens.shape == (2, 24, 192)
    # position (row 2, column 5) of z is the adapter's output at token 2 * 6 + 5
    hidden = tok.adapter.fc1(tokens[1, 17])
    by_hand = tok.adapter.fc2(hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5)))
    assert torch.allclose(z[1, :, 2, 5], by_hand, atol=1e-6) and len(hidden) == 16
    assert Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]).adapter.fc1.out_features == 192
    assert torch.equal(tok.encode(x), z) and torch.equal(tok.decode(z), recon)
    assert "divisible by 16" in error_of(tok.encode, torch.zeros(1, 3, 64, 72), kind=ValueError)

    assert "no latent statistics" in error_of(tok.normalize, z, kind=ValueError)
    tok.latent_mean.copy_(torch.arange(24.0))
    tok.latent_std.fill_(2)
    assert torch.allclose(tok.normalize(z), (z - torch.arange(24.0).view(-1, 1, 1)) / 2)
    assert torch.allclose(tok.unnormalize(tok.normalize(z)), z, atol=1e-5)

    seen, x = [], x[:1, :, :32, :48]
    tok.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tok.encode(x)
    assert torch.equal(tok.features(x), tok.encoder(seen[0])[1])  # patch tokens alone
    statistics = zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, of [0, 1]
    for k, (mean, std) in enumerate(statistics):
        by_hand = pil_bicubic(((x[0, k] + 1) / 2).numpy(), 28, 42)  # 14/16 of the size
        assert np.allclose(seen[0][0, k], (by_hand - mean) / std, atol=1e-4)


def test_ema():
    """decay * EMA + (1 - decay) * model, of what trains."""
    ema, linear = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for p, value in zip((*ema.parameters(), *linear.parameters()), (1.0, 1.0, 5.0, 5.0)):
        torch.nn.init.constant_(p, value)
    linear.bias.requires_grad_(False)
    model.update_ema(ema, linear, 0.75)
    assert (ema.weight.item(), ema.bias.item()) == (2, 1) and ema.weight.grad_fn is None
    assert (linear.weight.item(), linear.bias.item()) == (5, 5)


def test_dit_output_is_zero_at_init():
    """With classes and without, at its own grid and at another; what it does not take."""
    for K, grid in ((10, (4, 4)), (0, (2, 3))):
        dit = small_dit(num_classes=K, grid=grid)
        y = torch.tensor([0, K]) if K else None  # K: the null class
        for side in (grid, (3, 5)):
            assert not dit(torch.randn(2, 4, *side), torch.tensor([0.0, 1.0]), y).any()
        assert hasattr(dit, "y_embedder") == (K > 0)
    z, t = torch.zeros(2, 5, 4, 4), torch.zeros(2)
    assert "latents of 4 channels" in error_of(dit, z, t, kind=ValueError)
    assert "RoPE" in error_of(LightningDiT, 32, 1, 3, kind=ValueError)


def test_positions_against_loops():
    """Sin-cos: column first, [sin, cos] of D/4 frequencies. RoPE: row first, neighbours turn as
    pairs, by complex products and, compiled, by real ones."""
    h, w, D = 3, 5, 16
    sincos, x = model.sincos_embedding(h, w, D)[0], torch.randn(h * w, D)
    y = model.rotate(x, *model.rope_tables(h, w, D))
    with patch("torch.compiler.is_compiling", lambda: True):
        assert torch.allclose(model.rotate(x, *model.rope_tables(h, w, D)), y, atol=1e-6)
    for n, (row, column) in enumerate(np.ndindex(h, w)):
        for k in range(D // 4):
            for first, place in ((0, column), (D // 2, row)):
                angle = place / 10000 ** (k / (D // 4))
                assert abs(sincos[n, first + k] - math.sin(angle)) < 1e-6
                assert abs(sincos[n, first + D // 4 + k] - math.cos(angle)) < 1e-6
            for first, place in ((0, row), (D // 2, column)):
                angle, i = place / 10000 ** (2 * k / (D // 2)), first + 2 * k
                cos, sin, (a, b) = math.cos(angle), math.sin(angle), x[n, i:i + 2]
                assert abs(y[n, i] - (a * cos - b * sin)) < 1e-5
                assert abs(y[n, i + 1] - (b * cos + a * sin)) < 1e-5


def plain_dit(S, z, t, y, heads, cls=None, taps=None):
    """LightningDiT from its published description, on a state dict in fp64; explicit softmax, no
    modules. cls: REG's noised class token, in front, without a position; taps: a list for the
    tokens after each block and before the last map."""
    def linear(name, x):
        return x @ S[f"{name}.weight"].T + S[f"{name}.bias"]

    def norm(name, x):
        return S[f"{name}.weight"] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    def silu(x):
        return x / (1 + torch.exp(-x))

    kernel = S["x_embedder.proj.weight"]
    (B, d, h, w), (D, _, p, _) = z.shape, kernel.shape
    h, w = h // p, w // p
    patches = list(np.ndindex(h, w))  # row by row
    cos, sin = (a.double() for a in model.rope_tables(h, w, D // heads))
    x = torch.stack([(z[:, None, :, p * r:p * r + p, p * c:p * c + p] * kernel).sum((2, 3, 4))
                     for r, c in patches], 1)  # (B, N, D)
    x = x + S["x_embedder.proj.bias"] + model.sincos_embedding(h, w, D).double()
    if cls is not None:
        cls = linear("cls_embedder", cls)
        cls = (cls - cls.mean(1, keepdim=True)) / (cls.var(1, False, keepdim=True) + 1e-5).sqrt()
        cls = cls * S["cls_norm.weight"] + S["cls_norm.bias"]
        x = torch.cat([cls[:, None], x], 1)
        cos, sin = torch.cat([cos[:1] * 0 + 1, cos]), torch.cat([sin[:1] * 0, sin])
    angle = t[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))
    c = linear("t_embedder.mlp.2", silu(c)) + S["y_embedder.embedding_table.weight"][y]
    c, i = silu(c)[:, None], 0
    while (b := f"blocks.{i}.") + "norm1.weight" in S:
        a1, b1, g1, a2, b2, g2 = linear(f"{b}adaLN_modulation.1", c).split(D, -1)
        qkv = linear(f"{b}attn.qkv", norm(f"{b}norm1", x) * (1 + b1) + a1)
        q, k, v = (p.reshape(B, len(cos), heads, -1).transpose(1, 2) for p in qkv.split(D, -1))
        q = model.rotate(norm(f"{b}attn.q_norm", q), cos, sin)
        k = model.rotate(norm(f"{b}attn.k_norm", k), cos, sin)
        weights = torch.exp(q @ k.transpose(2, 3) / math.sqrt(D // heads))
        out = weights / weights.sum(-1, keepdim=True) @ v
        x = x + g1 * linear(f"{b}attn.proj", out.transpose(1, 2).reshape(B, len(cos), D))
        hidden = norm(f"{b}norm2", x) * (1 + b2) + a2
        gate, value = linear(f"{b}mlp.w12", hidden).chunk(2, -1)
        x = x + g2 * linear(f"{b}mlp.w3", silu(gate) * value)
        i += 1
        if taps is not None:
            taps.append(x)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(D, -1)
    x = norm("final_layer.norm_final", x) * (1 + scale) + shift
    if taps is not None:
        taps.append(x)
    out, v = linear("final_layer.linear", x[:, -h * w:]), torch.zeros_like(z)
    for n, (r, c) in enumerate(patches):  # a token's numbers: row, column, channel
        for k, (i, j, channel) in enumerate(np.ndindex(p, p, d)):
            v[:, channel, p * r + i, p * c + j] = out[:, n, k]
    return v


def test_dit_numerics():
    """LightningDiT against the plain one, at its own grid and at others; RMSNorm's epsilon, and
    that it computes in fp32."""
    for side, sides in ((1, ((4, 4), (3, 5))), (2, ((4, 4), (2, 8)))):
        dit = random_weights(small_dit(num_classes=10, qk_norm=True, patch=side))
        S = {k: v.double() for k, v in dit.state_dict().items()}
        assert S["pos_embed"].shape == (1, 16 // side ** 2, 32)
        for size in sides:
            z, t, y = torch.randn(3, 4, *size), torch.rand(3), torch.tensor([0, 7, 10])
            with torch.no_grad():
                got, want = dit(z, t, y), plain_dit(S, z.double(), t.double(), y, heads=2)
            assert (got - want).abs().max() < 1e-4 * want.abs().max()

    tiny, norm = 1e-3 * torch.randn(5, 64), random_weights(model.RMSNorm(64))
    for x in (tiny, tiny.bfloat16()):
        unit = x.float() / (x.float().square().mean(1, keepdim=True) + 1e-6).sqrt()
        assert torch.allclose(norm(x), unit.to(x.dtype) * norm.weight, rtol=1e-5)


# ----------------------------------------------------------------------------------------- mmdit.py

SMALL_MMDIT = {"dim": 32, "depth": 1, "depth_single": 1, "axes": [4, 6, 6], "d": 3, "patch": 2,
               "text": 5, "pooled": 7}


def plain_mmdit(w, z, t, text, pooled, heads, axes):
    """FLUX's transformer of one image, in plain numpy, from an official state dict: one double
    block, one single block, patch 2."""
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    def norm(x, shift, scale):
        unit = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
        return unit * (1 + scale) + shift

    def turned(x, name, ids):
        """Queries or keys (S, head): RMSNorm, then each pair by id / 10000^(2i/axis)."""
        x = x / np.sqrt((x ** 2).mean(1, keepdims=True) + 1e-6) * w[f"{name}.scale"]
        out, first = np.empty_like(x), 0
        for axis, dim in enumerate(axes):
            for i in range(dim // 2):
                a, b = x[:, first + 2 * i], x[:, first + 2 * i + 1]
                angle = np.array([p[axis] for p in ids]) / 10000 ** (2 * i / dim)
                out[:, first + 2 * i] = a * np.cos(angle) - b * np.sin(angle)
                out[:, first + 2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
            first += dim
        return out

    def attend(streams):
        """streams: (q|k|v (n, 3D), name of its norm, ids), in order -> (S, D)."""
        D, out = len(w["img_in.bias"]), []
        for h in range(heads):
            part = slice(h * D // heads, (h + 1) * D // heads)
            q, k = (np.concatenate([turned(qkv[:, i * D:(i + 1) * D][:, part], f"{name}.{kind}", ids)
                                    for qkv, name, ids in streams])
                    for i, kind in enumerate(("query_norm", "key_norm")))
            v = np.concatenate([qkv[:, 2 * D:][:, part] for qkv, _, _ in streams])
            a = np.exp(q @ k.T / math.sqrt(sum(axes)))
            out.append(a / a.sum(1, keepdims=True) @ v)
        return np.concatenate(out, 1)

    d, H, W = z.shape
    places = [(r, c) for r in range(H // 2) for c in range(W // 2)]
    tokens = np.array([[z[c, 2 * row + dy, 2 * column + dx] for c, dy, dx in np.ndindex(d, 2, 2)]
                       for row, column in places])
    angles = [1000 * t / 10000 ** (i / 128) for i in range(128)]
    c = linear(np.concatenate([np.cos(angles), np.sin(angles)]), "time_in.in_layer")
    c = linear(silu(c), "time_in.out_layer") + linear(
        silu(linear(pooled, "vector_in.in_layer")), "vector_in.out_layer")
    img, txt = linear(tokens, "img_in"), linear(text, "txt_in")
    ids = {"txt": [(0, 0, 0)] * len(text), "img": [(0, *place) for place in places]}

    x, mod, b = {"txt": txt, "img": img}, {}, "double_blocks.0."
    for s in x:  # shift, scale, gate; then the MLP's
        mod[s] = np.split(linear(silu(c), f"{b}{s}_mod.lin"), 6)
    y = attend([(linear(norm(x[s], *mod[s][:2]), f"{b}{s}_attn.qkv"), f"{b}{s}_attn.norm", ids[s])
                for s in x])
    for s, part in (("txt", y[:len(text)]), ("img", y[len(text):])):
        x[s] = x[s] + mod[s][2] * linear(part, f"{b}{s}_attn.proj")
        hidden = gelu(linear(norm(x[s], *mod[s][3:5]), f"{b}{s}_mlp.0"))
        x[s] = x[s] + mod[s][5] * linear(hidden, f"{b}{s}_mlp.2")

    x, b, D = np.concatenate([x["txt"], x["img"]]), "single_blocks.0.", len(c)
    shift, scale, gate = np.split(linear(silu(c), f"{b}modulation.lin"), 3)
    both = linear(norm(x, shift, scale), f"{b}linear1")
    y = attend([(both[:, :3 * D], f"{b}norm", ids["txt"] + ids["img"])])
    x = x + gate * linear(np.concatenate([y, gelu(both[:, 3 * D:])], 1), f"{b}linear2")
    shift, scale = np.split(linear(silu(c), "final_layer.adaLN_modulation.1"), 2)
    x = linear(norm(x[len(text):], shift, scale), "final_layer.linear")
    v = np.empty_like(z)
    for token, (row, column) in zip(x, places):
        v[:, 2 * row:2 * row + 2, 2 * column:2 * column + 2] = token.reshape(d, 2, 2)
    return v


def test_mmdit_against_numpy():
    """FLUX's transformer: positions on three axes, order of the modulation, attention over text and
    image, in this order; at a grid that is no square, for two images; and for tokens, queries and
    keys so small that the norms' 1e-6 matters."""
    net = random_weights(MMDiT(**SMALL_MMDIT))
    z, t = torch.randn(2, 3, 4, 6), torch.tensor([0.3, 1.0])
    y = torch.randn(2, 4, 5), torch.randn(2, 7)
    rows = torch.cat([y[0].flatten(1), y[1]], dim=1)
    double, tokens = net.double_blocks[0], [*net.img_in.parameters(), *net.txt_in.parameters()]
    joint = double.img_attn.qkv, double.txt_attn.qkv, net.single_blocks[0].linear1
    queries_and_keys = [p[:64] for linear in joint for p in linear.parameters()]
    for small in ((), queries_and_keys, tokens):
        with torch.no_grad():
            for part in small:
                part *= 1e-3
            found = net(z, t, rows)
        w = {k: v.double().numpy() for k, v in net.state_dict().items()}
        for i in range(2):
            v = plain_mmdit(w, *(x[i].double().numpy() for x in (z, t, *y)), heads=2,
                            axes=(4, 6, 6))
            assert np.abs(found[i].numpy() - v).max() < 1e-4 * np.abs(v).max()
    assert "latents of 3 channels" in error_of(net, z[:, :2], t, rows, kind=ValueError)
    assert "heads of 15" in error_of(MMDiT, 30, 1, 1, (4, 6, 5), kind=ValueError)


def test_mmdit_sizes():
    """FLUX.1's own size without guidance; the sizes of the table; at the start the output is zero,
    and the blocks are the identity; the shift."""
    with torch.device("meta"):
        flux = MMDiT(3072, 19, 38, d=16, patch=2)
        sizes = {name: parameters(MMDiT(**arguments)) for name, arguments in MMDITS.items()}
    assert parameters(flux) == 11_891_178_560 and len(flux.state_dict()) == 776
    assert sizes == {"tiny": 6_031_392, "B": 162_224_160, "L": 662_411_296, "2B": 1_971_940_384}
    net = MMDiT(**SMALL_MMDIT)
    assert not net(torch.randn(2, 3, 4, 4), torch.rand(2), torch.randn(2, 4 * 5 + 7)).any()
    img, txt, c = torch.randn(1, 4, 32), torch.randn(1, 2, 32), torch.randn(1, 32)
    turns = mmdit.rope_tables(mmdit.positions(2, 2, 2), SMALL_MMDIT["axes"])
    assert same(net.double_blocks[0](img, txt, c, *turns), (img, txt)) is None
    assert torch.equal(net.single_blocks[0](img, c, *(table[2:] for table in turns)), img)
    close(mmdit.time_shift(256), math.exp(0.5))
    close(mmdit.time_shift(4096), math.exp(1.15))


# ---------------------------------------------------------------------------------------- losses.py

class Perceptual(torch.nn.Module):
    """In LPIPS' place. Like it, it sends gradients to its second image alone."""

    def distance(self, x, y):
        return 3 * (x.detach() - y).mean((1, 2, 3)).square()

    def forward(self, x, y):
        return self.distance(x, y)


def test_reconstruction_loss():
    """Eq. 1 without its GAN term: means, and L_perceptual by w_p."""
    x, recon = torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), 0.5)
    recon[0] = -1
    recon.requires_grad_(True)
    found = losses.reconstruction_loss(x, recon, Perceptual(), w_p=0.25)
    perceptual = 3 * (1 + 0.25) / 2
    assert found == (0.75 + 0.25 * perceptual, 0.75, perceptual)
    found[2].backward()
    assert recon.grad.any()
    assert losses.reconstruction_loss(x, recon, None, 0) == (0.75, 0.75, 0)


def test_gan_losses():
    """Hinge losses; the adaptive weight, a ratio of two gradients' norms, clamped; the line with a
    loss' gradient."""
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert losses.hinge_d(real, fake).item() == 0.5 * (0.25 + 0.5)
    assert losses.hinge_g(fake).item() == 1.5
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    rec = (w * torch.tensor([3.0, 4.0])).sum()  # its gradient has norm 5, that of 0.5 w[0] .5
    weight = losses.adaptive_weight(rec, 0.5 * w[0], w)
    assert abs(weight.item() - 5 / (0.5 + 1e-4)) < 1e-5 and not weight.requires_grad
    assert abs(losses.adaptive_weight(0.5 * w[0], rec, w).item() - 0.5 / (5 + 1e-4)) < 1e-6
    assert losses.adaptive_weight(w.sum() * 1e9, 0 * w.sum(), w).item() == 1e4
    assert losses.adaptive_weight(w.sum() * 1e9, 0 * w.sum(), w, limit=1e8).item() == 1e8
    line = losses.linearised((w ** 3).sum(), w)  # gradient 3 w^2
    assert line.item() == 3 * 27 + 3 * 64 and torch.autograd.grad(line, w)[0].tolist() == [27, 48]


def test_semantic_preservation():
    """A mean of squares that moves the latents in training only; the ablation's cosine."""
    z = torch.tensor([[[[1.0]], [[0.0]]]], requires_grad=True)
    ref = torch.tensor([[[[0.0]], [[2.0]]]], requires_grad=True)
    loss = losses.semantic_preservation(z, ref)
    loss.backward()
    assert loss.item() == 2.5 and z.grad.flatten().tolist() == [1, -2] and ref.grad is None
    assert losses.semantic_preservation(z, ref, "cosine").item() == 1
    a, b = torch.randn(2, 2, 5, 3, 4)
    by_hand = 1 - ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()
    assert torch.allclose(losses.semantic_preservation(a, b, "cosine"), by_hand)
    tokens = torch.randn(2, 5, 8)
    cosine = losses.semantic_preservation(tokens, 3 * tokens, "cosine", dim=-1)
    assert abs(cosine.item()) < 1e-6


def test_flow_matching():
    """The direction of time, the target z1 - z0, both losses, a finite first gradient, t."""
    (z0, z1), t = torch.randn(2, 4, 6, 2, 2), torch.tensor([0.0, 1.0, 0.25, 0.5])
    y, seen, answer = torch.arange(4), [], z1 - z0  # from data to noise

    def network(z_t, *condition):
        assert same(condition, (t, y)) is None
        seen.append(z_t)
        return answer

    loss, mse, cosine = losses.flow_matching(network, z0, z1, t, y, w_cos=1.0)
    assert abs(loss) < 1e-6 and not mse.any() and abs(cosine) < 1e-6
    assert torch.equal(seen[0][0], z0[0])  # t = 0: data
    assert torch.equal(seen[0][1], z1[1])  # t = 1: noise
    assert torch.allclose(seen[0][2], 0.75 * z0[2] + 0.25 * z1[2])
    answer, u = torch.randn_like(z0), z1 - z0
    found = losses.flow_matching(network, z0, z1, t, y, w_cos=0.5)
    mse = (answer - u).square().mean((1, 2, 3))
    cosine = 1 - ((answer * u).sum(1) / answer.norm(dim=1) / u.norm(dim=1)).mean()
    for a, b in zip(found, (mse.mean() + 0.5 * cosine, mse, cosine)):
        assert torch.allclose(a, b, rtol=1e-5)

    dit = small_dit(d=6, num_classes=4, grid=(2, 2))  # v = 0: the cosine has no direction
    loss, *logged = losses.flow_matching(dit, z0, z1, t, y, w_cos=1.0)
    loss.backward()
    assert not any(value.requires_grad for value in logged)
    trained = [p for p in dit.parameters() if p.requires_grad]
    assert 0 < torch.nn.utils.clip_grad_norm_(trained, 1.0) < 1e3
    expected = torch.tensor([0.5, 1 / (1 + math.exp(-2))])
    assert torch.allclose(losses.logit_normal(torch.tensor([0.0, 2.0])), expected)


def test_lpips():
    """Random VGG16 and heads from two files: an independent sum, zero for equal images, finite
    gradients where features all but vanish."""
    vgg = torchvision.models.vgg16().features[:30].eval()
    for conv in vgg:
        if hasattr(conv, "bias"):  # without it the unit norm would hide the input's scale
            torch.nn.init.normal_(conv.bias, std=0.1)
    heads = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    paths = TMP / "vgg.pth", TMP / "heads.pth"
    torch.save({"state_dict": prefixed("module.features.", vgg.state_dict())}, paths[0])
    torch.save({"model": {f"lin{i}.model.1.weight": v for i, v in enumerate(heads)}}, paths[1])
    lpips, path = files.load_lpips(*paths)
    assert path == paths[0]

    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([[.030, .088, .188], [.458, .448, .450]]).view(2, 3, 1, 1)
    expected, a, b, left = torch.zeros(2), (x + shift) / scale, (y + shift) / scale, list(heads)
    with torch.no_grad():
        for i, layer in enumerate(vgg):
            a, b = layer(a), layer(b)
            if i in (3, 8, 15, 22, 29):
                difference = (F.normalize(a, dim=1) - F.normalize(b, dim=1)) ** 2
                expected += (difference * left.pop(0)).sum(1).mean((1, 2))
    assert torch.allclose(lpips(x, y), expected, atol=1e-5)
    assert lpips(x, x).abs().max() == 0

    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        lpips.vgg16[2].weight.zero_()
        lpips.vgg16[2].bias.fill_(1e-25)  # whose square, in relu1_2's norm, is 0
    lpips(torch.zeros(1, 3, 32, 32), flat).sum().backward()
    assert flat.grad.isfinite().all() and not any(p.requires_grad for p in lpips.parameters())
    assert not lpips.train().training
    torch.save({"lin0.model.1.weight": heads[0]}, paths[1])
    assert "heads.pth does not fit" in error_of(files.load_lpips, *paths)


def test_patchgan():
    """The discriminator from its published description: LeakyReLU .2, and BatchNorm over the batch
    behind the middle three of five 4 x 4 convolutions."""
    net, x = random_weights(losses.PatchGAN(16)).train(), 0.01 * torch.randn(2, 3, 64, 64)
    S, y = dict(net.named_parameters()), x
    for i, stride in ((0, 2), (2, 2), (5, 2), (8, 1), (11, 1)):
        y = F.conv2d(y, S[f"main.{i}.weight"], S.get(f"main.{i}.bias"), stride, padding=1)
        if i in (2, 5, 8):
            y = y - y.mean((0, 2, 3), keepdim=True)
            y = y / (y.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
            weight, bias = (S[f"main.{i + 1}.{k}"].view(-1, 1, 1) for k in ("weight", "bias"))
            y = y * weight + bias
        if i < 11:
            y = torch.where(y > 0, y, 0.2 * y)
    assert torch.allclose(net(x), y, atol=1e-4 * y.abs().max().item())


def test_batch_norm_over_ranks():
    """Two ranks whose images have other sizes are one batch: output and running statistics."""
    x, other = 1 + torch.randn(2, 3, 8, 8), 3 * torch.randn(2, 3, 2, 2)
    both = torch.cat([v.transpose(0, 1).flatten(1) for v in (x, other)], dim=1)  # (3, n)
    centred = other - both.mean(1).view(3, 1, 1)
    sums = iter([torch.cat([other.sum((0, 2, 3)), torch.tensor([8.0])]),
                 centred.square().sum((0, 2, 3))])  # of the other rank
    norm, plain = losses.BatchNorm(3), torch.nn.BatchNorm1d(3)
    with (patch.object(losses.dist, "is_initialized", return_value=True),
          patch.object(losses.dist, "get_world_size", return_value=2),
          patch.object(losses._SumOverRanks, "apply", lambda t: t + next(sums))):
        y = norm(x)
    expected = plain(both[None])[0, :, :128]  # (3, 2*8*8)
    assert torch.allclose(y.transpose(0, 1).flatten(1), expected, atol=1e-5)
    for name, value in plain.state_dict().items():
        assert torch.allclose(norm.state_dict()[name], value, atol=1e-5), name


# ------------------------------------------------------------------------------------------ data.py

def test_images():
    """Any mode to RGB, 16 bits to 8, transparency on white, EXIF applied; a broken file named;
    [-1, 1] and back."""
    rgb = np.zeros((20, 30, 3), np.uint8)
    rgb[:, :15] = (200, 100, 50)
    img = Image.fromarray(rgb)
    for mode, suffix in (("RGB", "png"), ("P", "png"), ("CMYK", "tif"), ("RGBA", "png"),
                         ("L", "jpg"), ("1", "png"), ("LA", "png")):
        img.convert(mode).save(TMP / f"m.{suffix}")
        loaded = data.load_image(TMP / f"m.{suffix}")
        assert loaded.mode == "RGB" and loaded.size == (30, 20), mode
        assert mode not in ("RGB", "RGBA") or np.array_equal(loaded, rgb)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(TMP / "m.png")
    assert np.array(data.load_image(TMP / "m.png")).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    for told in ({"exif": exif}, {"xmp": b'<x:xmpmeta tiff:Orientation="6"/>'}):
        img.save(TMP / "m.jpg", **told)
        assert load_both_ways(TMP / "m.jpg").size == (20, 30)
    whole = (TMP / "m.jpg").read_bytes()
    (TMP / "half.jpg").write_bytes(whole[:len(whole) // 2])
    assert "half.jpg" in error_of(data.load_image, TMP / "half.jpg")

    corner = data.to_tensor(data.to_pixels(img))[:, 0, 0]
    assert torch.equal(corner, torch.tensor([200, 100, 50.0]) / 127.5 - 1)
    levels = torch.arange(256).byte().view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert np.array_equal(data.to_uint8(data.to_tensor(levels))[0, ..., 0], levels[0, 0])
    between = torch.tensor([-0.6, 7.4, 7.6, 255.6]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert data.to_uint8(between / 127.5 - 1)[0, ..., 0].flatten().tolist() == [0, 7, 8, 255]


def tiff_12(pixels):
    """A TIFF file of 12 bits a pixel, by hand: two pixels in three bytes."""
    pairs = zip(pixels.flat[::2], pixels.flat[1::2])
    content = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in pairs)
    (h, w), at = pixels.shape, 8 + 2 + 9 * 12 + 4
    tags = {256: w, 257: h, 258: 12, 259: 1, 262: 1, 273: at, 277: 1, 278: h, 279: len(content)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0\x09\0" + table + bytes(4) + content


def test_more_than_8_bits():
    """White is 1 of floats, 65535 of 16 bits, 4095 where a TIFF says 12 bits. What would come out
    black, or white, is refused: 12 bits in 16, other floats, 32 bits."""
    ramp = np.array([[0, 0.25], [0.5, 1]])

    def load(values, suffix="tif"):
        path = TMP / f"deep.{suffix}"
        if isinstance(values, bytes):
            path.write_bytes(values)
        else:
            Image.fromarray(values).save(path)
        return np.array(load_both_ways(path))[..., 0].tolist()

    want = (255 * ramp).astype(int).tolist()
    half = [[0, 64], [128, 255]]  # rounded, as floats are
    assert load(ramp.astype(np.float32)) == half
    for suffix in ("tif", "png"):
        assert load((65535 * ramp).astype(np.uint16), suffix) == want
        assert load(np.uint16([[0, 4096]]), suffix) == [[0, 15]]
        assert load(np.zeros((2, 2), np.uint16), suffix) == [[0, 0], [0, 0]]
        with refused("deep", "at most 12 bits"):
            load((4095 * ramp).astype(np.uint16), suffix)
    assert load((65535 * ramp).astype(np.int32)) == want
    assert load(tiff_12((4095 * ramp).astype(int))) == want
    assert load(tiff_12(np.array([[0, 16], [160, 240]]))) == [[0, 0], [9, 14]], "dark"
    pgm = b"P5 2 2 4095 " + (4095 * ramp).astype(">u2").tobytes()
    assert load(pgm, "pgm") == want  # its header says what white is
    for wrong in (255 * ramp, ramp - 0.1, ramp * np.nan):
        with refused("deep.tif", "floats from", "[0, 1]"):
            load(wrong.astype(np.float32))
    for wrong in ([[0, 65536]], [[-1, 5]]):
        with refused("deep.tif", "integers from"):
            load(np.int32(wrong))
    for white, expected in ((65535, 255), (0, 0), (4095, None)):  # colours: PIL does not write them
        rows = b"".join(b"\0" + struct.pack(">3H", white, 0, white) for _ in range(2))
        png = png_of(1, 2, rows, depth=16)
        if expected is not None:
            assert load(png, "png") == [[expected]] * 2
        else:
            with refused("deep.png", "at most 12 bits"):
                load(png, "png")


def test_crops():
    """ADM's centre crop by hand. In training: the bytes that PIL decodes, and a square of the short
    side, anywhere, flipped or not."""
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 130, 3), np.uint8))
    # 130 x 70 to 16: halved twice to 32 x 17 by a box filter, then bicubic to 30 x 16
    halved = big.resize((65, 35), Image.BOX).resize((32, 17), Image.BOX)
    by_hand = np.array(halved.resize((30, 16), Image.BICUBIC))[:, 7:23]
    assert np.array_equal(data.center_crop(big, 16), by_hand)
    for (w, h), size, resized, (left, top) in (  # ADM's rounding
            ((64, 64), 32, (32, 32), (0, 0)), ((49, 33), 20, (30, 20), (5, 0)),
            ((33, 48), 20, (20, 29), (0, 4)), ((20, 27), 20, (20, 27), (0, 3))):
        part = big.crop((0, 0, w, h))
        by_hand = part.resize(resized, Image.BOX if w == 64 else Image.BICUBIC)
        by_hand = by_hand.crop((left, top, left + size, top + size))
        assert np.array_equal(data.center_crop(part, size), by_hand), (w, h)

    big = big.resize((120, 70), Image.BICUBIC)
    for mode, options in (("RGB", {}), ("RGB", {"subsampling": 0, "progressive": True}),
                          ("L", {"quality": 30})):
        big.convert(mode).save(TMP / "m.jpg", **options)
        img = load_both_ways(TMP / "m.jpg")
    squares = {}
    for left in range(51):
        square = img.crop((left, 0, left + 70, 70)).resize((32, 32), Image.BICUBIC)
        squares[left, False] = data.to_pixels(square).int()
        squares[left, True] = squares[left, False].flip(2)
    seen = set()
    for i in range(20):
        crop = data.random_crop(data.to_pixels(img), 32, data.rng(0, i)).int()
        off = {key: (crop - square).abs().max().item() for key, square in squares.items()}
        found = min(off, key=off.get)
        assert off[found] <= 2
        seen.add(found)
    assert len({left for left, _ in seen}) > 8 and len({flip for _, flip in seen}) == 2
    tall = torch.arange(10).byte().view(1, 5, 2).expand(3, -1, -1)  # 4 squares, as they are
    crops = [data.random_crop(tall, 2, data.rng(i)) for i in range(400)]
    tops = np.array([int(crop.min()) // 2 for crop in crops])
    flips = np.array([bool(crop[0, 0, 0] > crop[0, 0, 1]) for crop in crops])
    assert all(70 < (tops == top).sum() < 130 for top in range(4)) and 160 < flips.sum() < 240
    assert all(torch.equal(crop[0] if not flip else crop[0].flip(1), tall[0, top:top + 2])
               for crop, top, flip in zip(crops, tops, flips))


def files_in(root, *names):
    """Files of these names below a folder, images all of them; a name that ends in / is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            Image.new("RGB", (20, 20)).save(path, "PNG")
    return root


def opened(*args):
    """What open_folders returns, and what it says."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        parts = data.open_folders(*args)
    return *parts, said.getvalue()


def names(images):
    return [images.name(i).decode() for i in range(len(images))]


def test_folders():
    """Classes and labels of a folder, by its sorted names; the reader's mistakes, by name."""
    root = files_in(TMP / "folders", "b/2.png", "a/1.png", "a/deep/3.PNG", "a-b/1.jfif", ".x.png",
                    "c/", "a/._1.png", "a/x.txt", "a/README", "b/y.txt", ".ipynb_checkpoints/1.png",
                    "__MACOSX/1.png", "a/@eaDir/1.png", "lost+found/", "$RECYCLE.BIN/1.png")
    images = data.ImageFolder(root)
    assert images.classes == ["a", "a-b", "b", "c"]  # c is empty: no number moves
    assert names(images) == ["a-b/1.jfif", "a/1.png", "a/deep/3.PNG", "b/2.png"]
    assert images.labels.tolist() == [1, 0, 0, 2]
    assert [data.Crops(images, 16)[0, i][1] for i in range(4)] == [1, 0, 0, 2]
    for text in ("4 classes (a ... c), 4 images", "2 of .txt", "1 without suffix", "2 hidden",
                 "5 hidden or system folders"):
        assert text in str(images), (text, str(images))
    listed = b"a-b/1.jfif\na/1.png\na/deep/3.PNG\nb/2.png"
    assert images.identity == hashlib.sha256(listed).hexdigest()[:16]
    flat = data.ImageFolder(root / "a" / "deep")
    assert flat.labels is None and flat.path(0) == f"{root}/a/deep/3.PNG"

    files_in(root, "cover.png", "none/")
    with refused("cover.png", "beside class folders"):
        data.open_folders(root, None, 10)
    assert len(data.ImageFolder(root, ())) == 5, "figures need no classes"
    parent = files_in(TMP / "parent", "Val/images/1.png", "train/a/1.png", "annotations/")
    with refused("no classes", f"give --data {parent}/train"):
        data.open_folders(parent, None, 10)
    assert "not found" in error_of(data.list_images, root / "nothing")
    assert "no images" in error_of(data.list_images, root / "none")


def test_held_out():
    """5 % of the files, or a folder of the same classes, or of no classes; never other numbers."""
    root = files_in(TMP / "5", *(f"{c}/{i}.png" for c in "ab" for i in range(30)), "c/1.png")
    train, held_out, said = opened(root, None, 10)
    assert len(held_out) == 3 and sorted(names(train) + names(held_out)) == names(data.ImageFolder(root))
    assert {*held_out.classes, *train.classes} == {"a", "b", "c"} and "3 of them" in said
    for part in (train, held_out):
        assert [part.classes[c] for c in part.labels] == [name[0] for name in names(part)]
    one = files_in(TMP / "one", *(f"{c}/1.png" for c in "abcd"))
    train, held_out, said = opened(one, None, 10)
    lost, = set("abcd") - {name[0] for name in names(train)}
    assert f"no training image in 1 of the classes: {lost}" in said
    assert ["abcd"[c] for c in train.labels] == [name[0] for name in names(train)]

    beside = files_in(TMP / "beside", "train/a/1.png", "train/b/1.png", "val/b/9.png", "val/b/8.png")
    train, held_out, said = opened(beside / "train", None, 1)
    here = os.getcwd()
    try:
        os.chdir(beside / "train")
        assert [names(images) for images in opened(".", None, 1)[:2]] == [
            names(images) for images in (train, held_out)], "from inside"
    finally:
        os.chdir(here)
    assert (len(train), held_out.labels.tolist()) == (2, [1, 1]) and "NOTE" not in said
    files_in(beside, "val/c/1.png")
    with refused("c is no class of the training images"):
        data.open_folders(beside / "train", None, 1)
    tiny = files_in(TMP / "tiny", "train/n01/images/1.png", "val/images/1.png")
    (tiny / "val" / "val_annotations.txt").write_text("1.png\tn01")
    train, held_out, said = opened(tiny / "train", None, 1)
    assert held_out.labels is None and len(held_out) == 1 and train.classes == ["n01"]
    assert "NOTE" in said and "without labels" in said and "probe is left out" in said
    with refused("images is no class"):  # asked for by name
        data.open_folders(tiny / "train", tiny / "val", 1)
    assert opened(tiny / "train", tiny / "val" / "images", 1)[1].labels is None


def test_many_files():
    """The names of n images take their bytes and 12 more each: no str, whose count of references a
    loader's worker would change, and copy the memory."""
    root, n = TMP / "many", 3000
    (root / "n01440764").mkdir(parents=True)
    for i in range(n):
        (root / "n01440764" / f"n01440764_{i:05d}.JPEG").touch()
    tracemalloc.start()
    images = data.ImageFolder(root)
    part = images.subset(np.arange(1, n))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    name = "n01440764/n01440764_00000.JPEG"
    assert used / n < len(name) + 1 + 2 * 12 + 8, used / n  # 8: the rest, of any n
    assert images.path(0) == f"{root}/{name}" and part.path(0) == images.path(1)


def test_checkpoints_are_mapped():
    """A checkpoint is read without a copy of its own in memory. What goes on from it has copied
    all: its file may be written over."""
    def anonymous():  # of this process's memory: what no file could give back; in KB
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    if not Path("/proc/self/status").exists():
        return
    path, module = TMP / "mapped.pt", torch.nn.Linear(2 ** 11, 2 ** 11)
    adam = torch.optim.Adam(module.parameters(), fused=True)
    module(torch.randn(1, 2 ** 11)).sum().backward()
    adam.step()
    save_checkpoint(path, {"tokenizer": module.state_dict(), "opt": adam.state_dict()})  # 48 MB
    before = anonymous()
    content = load_file(path)
    assert anonymous() - before < 4000
    files.load_strictly(module, content["tokenizer"], path)
    runs.load_optimiser(adam, content["opt"])
    del content
    assert str(path) not in Path("/proc/self/maps").read_text()

    # the system's refusals are its own; a name that is no UTF-8; a zip whose bytes are no tensors
    for said in ("unable to mmap 48 bytes from file <x.pt>: Cannot allocate memory (12)",
                 "unable to open file <x.pt> in read-only mode: Too many open files (24)"):
        with (patch("torch.load", side_effect=RuntimeError(said)),
              refused("cannot read checkpoint", said.split(": ")[1][:-5], kind=SystemFailure)):
            load_file(path)
    odd = TMP / os.fsdecode(b"\xff.pt")
    shutil.copy(path, odd)
    assert torch.equal(load_file(odd)["tokenizer"]["weight"], module.weight)
    # many small tensors: their headers outweigh what compression saves
    save_checkpoint(path, {str(i): torch.full((16,), float(i)) for i in range(40)})
    with (zipfile.ZipFile(path) as whole,
          zipfile.ZipFile(TMP / "small.pt", "w", zipfile.ZIP_DEFLATED) as small):
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry))
    assert "compressed" in error_of(load_file, TMP / "small.pt")


def test_unreadable():
    """A broken image is named before its batch. --check-data names all of them in a file;
    --skip-unreadable goes on without them, the same way again, if they are at most 1 %."""
    root = files_in(TMP / "broken", *(f"{c}/{i}.png" for c in "ab" for i in range(101)))
    good, _, _ = opened(root, root, 1)
    for name in ("a/0.png", "b/7.png"):
        (root / name).write_bytes(b"not an image")
    images, held_out, _ = opened(root, root, 1)
    batches = data.batches(data.Crops(images, 16), data.in_order(3, 3), 0, CPU)
    assert "a/0.png" in error_of(next, batches)

    (TMP / "check").mkdir()
    args = SimpleNamespace(out=TMP / "check", size=16, workers=0, check_data=True,
                           skip_unreadable=False, overwrite=False)
    record = TMP / "check" / "unreadable.json"
    with refused("2 of 202 images", str(record), "a/0.png", "--skip-unreadable"):
        data.check_images([images, held_out], args)
    assert list(json.loads(record.read_text())[images.identity]) == ["a/0.png", "b/7.png"]
    args.check_data, args.skip_unreadable = False, True
    with patch.object(data, "unreadable", None):  # the file serves
        left, same_left = data.check_images([images, held_out], args)
    assert names(left) == names(same_left) == [
        name for name in names(images) if name not in ("a/0.png", "b/7.png")]
    assert left.labels.tolist() == [0] * 100 + [1] * 100 and left.classes == ["a", "b"]
    record.unlink()
    args.workers = 2
    again, = data.check_images([good], args)
    assert again.identity == left.identity != images.identity
    record.unlink()
    (root / "b" / "8.png").write_bytes(b"")
    with refused("3 of 202 images", "more than 1 %"):
        data.check_images([images], args)


def test_order():
    """Every image once an epoch, for any number of ranks and micro-batches; a resume goes on in the
    same order. Crop and noise are a function of (epoch, image)."""
    def stream(steps, **kw):
        iterator = iter(data.ShuffledBatches(10, 4, (0, "order"), **kw))
        return [next(iterator) for _ in range(steps * kw.get("accum", 1))]

    for world in (1, 2, 3):  # 10 images: no rank's share of an epoch is as large as another's
        ranks = [iter(data.ShuffledBatches(10, 6, (0, "order"), rank=r, world=world))
                 for r in range(world)]
        seen = [item for _ in range(5) for rank in ranks for item in next(rank)]
        assert sorted(seen) == [(epoch, i) for epoch in range(3) for i in range(10)], world
    whole = list(chain(*stream(5)))
    epochs, order = zip(*whole)
    assert epochs == (0,) * 10 + (1,) * 10 and order[:10] != order[10:]
    ranks = [stream(5, rank=r, world=2, accum=2) for r in range(2)]
    assert list(chain(*chain(*zip(*ranks)))) == whole
    assert list(chain(*stream(2, first_step=3))) == whole[12:]

    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "b", 1), (0, 1)]
    assert len({data.rng(*key).integers(2 ** 62) for key in keys}) == len(keys)
    crops = data.Crops(Shapes(n=8), 48, (0, "augment"), noise=(4, 50, 50))
    first, again, other = ([crops[epoch, i] for i in range(8)] for epoch in (0, 0, 1))
    assert same(first, again) is None
    pixels, _, noise = (torch.stack(list(map(torch.as_tensor, part))) for part in zip(*first))
    assert not torch.equal(pixels, torch.stack([item[0] for item in other]))
    assert not torch.equal(noise, torch.stack([item[2] for item in other]))
    assert not torch.equal(noise[0], noise[1]) and crops[0, 5][1] == 5
    of_crop = data.rng(0, "augment", 0, 3).standard_normal((4, 50, 50), np.float32)
    assert not np.array_equal(noise[3], of_crop)
    crops.data.pixels = lambda i: torch.arange(300).byte().expand(3, 48, -1)  # the same
    assert len({crops[0, i][0][0, 0, 0].item() for i in range(8)}) > 4
    centred = data.Crops(Shapes(n=8), 48)[0, 5][0]
    assert torch.equal(centred, data.to_pixels(data.center_crop(Shapes(n=8).image(5), 48)))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_at_random():
    """What validation measures: images of all classes of a sorted folder, always the same, each
    once."""
    chosen = [i for batch in data.at_random(100, 32, 1000) for _, i in batch]
    assert len(set(chosen)) == 100 and chosen == sorted(chosen)
    assert len({i // 100 for i in chosen}) == 10, "all of ten classes of 100 images"
    assert data.at_random(99, 32, 50) == data.in_order(50, 32)


# ------------------------------------------------------------------------------------------- toy.py

def test_shapes():
    """Image i is a function of (split, i); its colour does not tell its class."""
    shapes = Shapes("train", n=48)
    assert len(shapes.classes) >= 10
    assert np.array_equal(shapes.image(5), Shapes("train", n=9000).image(5))
    assert not np.array_equal(shapes.image(5), Shapes("val").image(5))
    same_class = [np.asarray(shapes.image(i), float).mean((0, 1)) for i in (0, 12, 24, 36)]
    assert np.ptp(same_class, axis=0).max() > 20
    assert [part.split for part in toy.open_shapes(None, 64, 5)] == ["train", "val"]
    assert set(shapes.labels) == set(range(12))
    with patch.object(Shapes, "_texture", lambda self, r, a, b: np.ones((64, 64, 1)) * a):
        grounds = {tuple(shapes._draw(i)[0, 0]) for i in range(48)}
        assert len(grounds) == 48, "of any colour, whatever the class"
        for i in range(48):  # in flat colours: the lighter part is the shape, as its class says
            light = shapes._draw(i).astype(float).sum(2)
            light = light > (light.min() + light.max()) / 2
            rows, columns = (np.flatnonzero(light.any(axis)) for axis in (1, 0))
            box = light[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
            h, w = box.shape
            name = shapes.classes[shapes.labels[i]]
            assert not light[0, 0] and name not in ("ring", "frame") or not box[h // 2, w // 2]
            assert name not in ("circle", "square", "cross", "heart") or box[h // 2, w // 2]
            assert name != "triangle" or box[h // 4].sum() < box[3 * h // 4].sum(), "upright"


class Stripes:
    """Rows or columns, in red or in blue: four classes."""
    classes, labels = list("abcd"), [i % 4 for i in range(64)]

    def __len__(self):
        return 64

    def pixels(self, i):
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        pixels[i % 2 * 2] = 250 * (torch.arange(32) // 8 % 2)
        return pixels if i % 4 < 2 else pixels.transpose(1, 2)


def test_stand_in_pretraining():
    """It learns forms and not colours: of two forms in two colours the cross-entropy goes from
    log 4 = 1.39 to log 2 = 0.69."""
    args = SimpleNamespace(seed=2, size=32, pretrain_steps=25, workers=0, dtype="fp32",
                           log_every=10, batch_size=32)
    with (contextlib.redirect_stdout(io.StringIO()) as said,
          recorded(toy, "time_left") as times):
        toy.pretrain_encoder(DINOv2(dim=64, depth=1, grid=2), Stripes(), args, CPU, later=100)
    assert [call[0][1:] for call in times] == [(10, 15 + 250), (20, 5 + 250)]
    assert 0.5 < float(said.getvalue().split("loss ")[1].split(",")[0]) < 1


def test_captions_of_shapes():
    """Names of colours by hand; a caption names the shape and the colours that are in its image."""
    for rgb, name in {(1, 0, 0): "red", (0.9, 0.8, 0.1): "yellow", (0.1, 0.3, 0.2): "dark green",
                      (0, 0.4, 0.45): "dark cyan", (0.9, 0.1, 0.25): "red", (0.2, 0.2, 0.2): "black",
                      (0.6, 0.6, 0.5): "grey", (1, 0.9, 0.9): "white", (0.5, 0, 0.6): "purple",
                      (0.1, 0.05, 0.1): "black", (0.2, 0.3, 0.9): "blue"}.items():
        assert toy.colour_name(rgb) == name, (rgb, name)
    shapes, seen = Shapes(n=48), set()
    for i, caption in enumerate(shapes.captions):
        words = caption.removesuffix(" ground").split()
        subject, ground = words[:words.index("on")], words[words.index("on") + 1:]
        assert subject[0] == "a" and subject[-1] == shapes.classes[shapes.labels[i]]
        seen.add((caption.endswith("ground"), ground[0] == "a"))
        image = np.asarray(shapes.image(i), float) / 255
        corners = np.concatenate([image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3)])
        names = {toy.colour_name(c) for c in [corners.mean(0), *corners[::16]]}
        assert names & {" ".join(word for word in ground if word != "a")}, (caption, names)
    assert seen == {(True, True), (False, False)}


def test_stand_in_encoder():
    """Trained on the labels once, then read from its file; refused where it was made otherwise."""
    args = SimpleNamespace(seed=0, size=32, pretrain_steps=2, overwrite=False, workers=0,
                           dtype="fp32", log_every=1, batch_size=32, now=[1], steps_of={1: 7})
    with folder() as d:
        stage = args, Shapes(n=24, size=32), SimpleNamespace(out=d, rank=0, later=5), CPU
        with recorded(toy, "pretrain_encoder") as trainings:
            first, again = (toy.stand_in_encoder(*stage)[0].state_dict() for _ in range(2))
        torch.manual_seed(0)
        untrained = DINOv2(**ENCODERS["tiny14"]).state_dict()
        assert len(trainings) == 1 and same(first, again) is None and same(first, untrained)
        assert trainings[0][0][-1] == 7 + 5, "steps after it"
        args.size = 48
        with refused("encoder.pt", "size 32 -> 48"):
            toy.stand_in_encoder(*stage)
        torch.save({"teacher": again}, d / "encoder.pt")
        args.overwrite = True
        with refused("encoder.pt", "no stand-in", "--encoder"):  # a file of the user's
            toy.stand_in_encoder(*stage)
        args.pretrain_steps = 0  # as in the preset paper
        with refused("no official weights", "--encoder"):
            toy.stand_in_encoder(*stage)


# ------------------------------------------------------------------------------------- baselines.py

def test_vae():
    """x^, the moments and z' of a sampled z; latents are the mean; the objective's terms; a file in
    VA-VAE's layout, with its training parts, strictly."""
    vae = frozen(VAE(DECODERS["tiny"], d=8, vf_dim=64))
    x, noise = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 8, 2, 3)
    recon, moments, z_proj = vae(x, noise)
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    z = mean + noise * (logvar / 2).exp()
    by_hand = torch.einsum("oc,bchw->bohw", vae.linear_proj.weight[:, :, 0, 0], z)
    assert torch.equal(moments, torch.cat([mean, logvar], 1)) and torch.equal(vae.encode(x), mean)
    assert torch.allclose(recon, vae.decode(z), atol=1e-5)
    assert torch.allclose(z_proj, by_hand, atol=1e-5)
    assert "divisible by 16" in error_of(vae.encode, torch.zeros(1, 3, 64, 72), kind=ValueError)

    reference = small_tokenizer().encoder
    s = SimpleNamespace(tokenizer=vae, ddp_tokenizer=vae, reference=reference)
    args = SimpleNamespace(w_kl=0.5, w_vf=0.1, vf_margins=(0.5, 0.25))
    _, recon, terms = baselines.objective(s, args, x, noise)
    vf = losses.vf_loss(z_proj, reference.features(x), 0.5, 0.25)
    # a sum over an image's values beside a mean; L_rec's gradient is taken at the encoder's end
    expected = {"kl": (0.5 / (3 * 32 * 48), losses.kl_divergence(moments)),
                "vf": (0.1, vf, vae.encoder.conv_out.weight, 1e8)}
    assert same(terms, expected) is None

    path = TMP / "official.pt"
    state = {k: v for k, v in vae.state_dict().items() if not k.startswith("latent_")}
    state |= {f"{k}.weight": torch.zeros(1) for k in ("loss.d", "foundation_model.x")}
    for content in ({"state_dict": state}, prefixed("module.", state), {"model": state}, state):
        save_checkpoint(path, content)
        again = load_tokenizer(path, VAE).requires_grad_(False)
        assert torch.equal(again.encode(x), mean) and torch.equal(again.decode(z), vae.decode(z))
        assert again(x, noise)[2] is None  # a plain VAE
        assert "latent statistics" in error_of(again.normalize, z, kind=ValueError)
        assert "--latent-stats" in error_of(files.ensure_statistics, again, path)
    assert "not a tokenizer" in error_of(load_tokenizer, path)  # no system was named that knows it
    vae.quant_conv.bias[8:10] = torch.tensor([99.0, -99.0])  # log-variances beyond their clamp
    with patch.object(vae, "decode", lambda z: z):
        z, moments, _ = vae(x, 1e6 * noise)
    std = (moments[:, 8:].clamp(-30, 20) / 2).exp()
    assert torch.allclose(z, moments[:, :8] + std * 1e6 * noise)
    del state["quant_conv.bias"]
    save_checkpoint(path, state)
    assert "quant_conv.bias" in error_of(load_tokenizer, path, VAE)


def test_baseline_losses():
    """KL of two dimensions (a log-variance is clamped to [-30, 20]), and the VF loss of two tokens.
    """
    moments = torch.tensor([1.0, -2.0, math.log(4), 99.0]).view(1, 4, 1, 1)
    expected = 0.5 * (1 + 4 - 1 - math.log(4)) + 0.5 * (4 + math.exp(20) - 1 - 20)
    least = losses.kl_divergence(torch.tensor([0.0, -99.0]).view(1, 2, 1, 1)).item()
    assert math.isclose(least, 0.5 * (math.exp(-30) - 1 + 30), rel_tol=1e-6)
    assert math.isclose(losses.kl_divergence(moments).item(), expected, rel_tol=1e-6)
    z = torch.tensor([[3.0, 3.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # the tokens (3, 0) and (3, 0)
    f = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])
    # cosines 1 and 0: relu(.5 - cos) has the mean .25; S(z') is 1 everywhere, S(F) 0 off the
    # diagonal: .75 / 2
    assert math.isclose(losses.vf_loss(z, f).item(), 0.25 + 0.375, rel_tol=1e-6)
    assert math.isclose(losses.vf_loss(z, f, 0, 0).item(), 0.5 + 0.5, rel_tol=1e-6)


# --------------------------------------------------------------------------------------- vfm_vae.py

FIXTURES = HERE.parent / "shared" / "fixtures"  # outputs of official code, where they are


def fixture(name):
    """The arrays of a fixture, as tensors: weights, inputs, outputs."""
    if not FIXTURES.is_dir():
        raise SkipTest(f"no {FIXTURES}")
    with np.load(FIXTURES / f"{name}.npz") as f:
        arrays = {k: torch.from_numpy(f[k]) for k in f}
    return ({k[2:]: v for k, v in arrays.items() if k.startswith("w/")},
            {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(("in/", "draw/"))},
            {k[4:]: v for k, v in arrays.items() if k.startswith("out/")})


def equal(found, expected, names):
    """Within 1e-5 of the largest value, or of 1."""
    for name, tensor in found.items():
        want = expected[names.get(name, name)]
        off = (tensor.detach() - want).abs().max()
        assert tensor.shape == want.shape and off <= 1e-5 * max(1, want.abs().max()), (name, off)


def small_vfm(scale=2, foundation=None, **changed):
    """A VFM-VAE with nothing zero that would hide a mistake, 64 px and more."""
    torch.manual_seed(0)
    synthesis = {"channels": (16, 16, 16, 16, 16, 8), "injections": (64, 12, 8, 8),
                 "layers": (2, 3, 1, 2, 1, 2), "kernels": (5, 5, 7, 7, 7, 7),
                 "attentions": (1, 2, 1, 0, 0, 0), "noise": 2}
    foundation = foundation or {"siglip": {"dim": 64, "depth": 4, "grid": 8}}
    return random_weights(vfm_vae.VFMVAE(foundation, **{
        "synthesis": synthesis, "d": 8, "dim": 64, "layers": (0, 2, -1), "scale": scale,
        "width": 16, "expansion": 32, "style": 32} | changed))


def test_vfm_vae_sizes():
    """The parts' parameters and the official keys, at the released size."""
    with torch.device("meta"):
        siglip = {k: v for k, v in ENCODERS["siglip2-l16-512"].items() if k != "family"}
        sizes = vfm_vae.reading_sizes("paper", SigLIP(**siglip))
        assert (sizes["layers"], sizes["scale"]) == ((0, 12, -1), 2)
        tok = vfm_vae.VFMVAE({"siglip": siglip}, **sizes)
        d, vit = vfm_vae.MultiScalePatchGAN(), ViT()
    adapter, synthesis = tok.ldm_adapter, tok.synthesis
    assert parameters(tok.vfm_encoder) == 316_742_656
    assert parameters(tok.vfm_encoder.encoder["vision_model"].vision_model["head"]) == 12_595_200
    parts = [adapter.patch_quants, adapter.final_quant, adapter.post_quant, adapter.linear_proj,
             tok.mapping, *synthesis.z_convs, *synthesis.blocks]
    assert [parameters(p) for p in parts] == [
        9_740_352, 1_852_608, 1_907_328, 32_768, 525_312, 4_532_224, 609_280, 87_040, 284_416,
        28_462_090, 30_043_402, 29_865_866, 23_565_194, 6_120_200, 2_142_600]
    assert sum(p.numel() for p in tok.parameters() if p.requires_grad) == 139_770_680
    assert (parameters(vit), len(vit.state_dict())) == (21_665_664, 150)
    shapes = {k: list(v.shape) for k, v in tok.state_dict().items()}
    for key in ("ldm_adapter.patch_quants.2.0.blocks.0.attn.zero_k_bias", "mapping.mlp.fc1.bias",
                "synthesis.z_convs.3.2.1.bias", "synthesis.blocks.2.self_attns.1.attn.null_kv",
                "synthesis.blocks.5.last_upsample_conv.blur_weight",
                "synthesis.blocks.0.convs1.5.affine_pw1.proj.weight"):
        assert key in shapes
    assert shapes["synthesis.blocks.5.conv0.noise_const"] == [256, 256]
    assert "scale0_layer1.1.weight" in d.state_dict() and d.scale2_layer3[0].bias is not None
    if FIXTURES.is_dir():
        for name, prefix in (("vfmvae", ""), ("siglip2", "vfm_encoder.encoder.vision_model.")):
            lines = (FIXTURES / f"{name}_keys.txt").read_text().splitlines()
            for key, _, shape in (line.partition("  ") for line in lines):
                official = [int(n) for n in shape.split(",") if n.strip()]
                assert shapes.pop(prefix + key) == official, key
        assert set(shapes) == {"latent_mean", "latent_std", "ldm_adapter.linear_proj.weight"}


def test_vfm_vae_official_outputs():
    """Every array that the official code gave: encoder, projection, decoder, discriminator,
    DiffAug; weights loaded strictly under their own names."""
    state, given, out = fixture("siglip_vision")
    siglip = SigLIP(**model.siglip_arguments(state) | {"heads": 4})
    siglip.load_state_dict(state)
    for size in ("", "_96", "_32x48"):
        hidden = [siglip.embed(given["x" + size])]
        for block in siglip.blocks:
            hidden.append(block(hidden[-1]))
        last = siglip.norm(hidden[-1])
        found = {f"hidden{i}": x for i, x in enumerate(hidden)}
        found |= {"last": last, "pooled": siglip.pool(last)}
        expected = {k.removesuffix(size): v for k, v in out.items() if k.endswith(size)}
        equal({k: v for k, v in found.items() if k in expected}, expected, {})

    state, given, out = fixture("vfmvae_projection")
    adapter = vfm_vae.LDMAdapter(64, 3, 16, 2, 8, 32, linear_proj=True)
    adapter.load_state_dict(state)
    features = [given[f"feat{i}"] for i in range(3)]
    block = adapter.patch_quants[0][0].blocks[0]
    moments = adapter.moments(features, 4, 4)
    z = vfm_vae.sample(moments, given["noise"])
    t, last_layer = adapter.expand(z), adapter.final_quant.blocks[0].mlp.w2.weight
    pooled = F.adaptive_avg_pool2d(features[2].transpose(1, 2).view(2, 64, 8, 8), 4)
    rec = (t - given["target"]).abs().mean()
    vf = losses.vf_loss(adapter.linear_proj(z), pooled.flatten(2).transpose(1, 2), 0, 0)
    norms = [torch.autograd.grad(f, last_layer, retain_graph=True)[0].norm() for f in (rec, vf)]
    equal({"block0_attn": block.attn(block.norm1(features[0])), "block0": block(features[0]),
           "moments": moments, "z": z, "decompressed": t, "kl": losses.kl_divergence(moments),
           "vf_loss": vf, "rec": rec, "grad_rec_norm": norms[0], "grad_vf_norm": norms[1],
           "adaptive_weight": losses.adaptive_weight(rec, vf, last_layer, 1e8)}, out, {})

    state, given, out = fixture("vfmvae_decoder")
    tok, seen = vfm_vae.load(state), []
    for block in tok.synthesis.blocks:
        block.register_forward_hook(lambda _, args, found: seen.append(found))
    z = given["z"].requires_grad_()
    t = tok.ldm_adapter.expand(z)
    w = tok.mapping(t)
    image, lower = tok.paint(z)
    (image * given["cotangent"]).mean().backward()
    found = {"decompressed": t, "w": w, "image": image, "grad_z": z.grad,
             "style_block0_conv0": tok.synthesis.blocks[0].conv0.affine_pw1(w)}
    found |= {f"multi{i}": rgb for i, rgb in enumerate(lower)}
    for i in range(4):
        found |= {f"x{i}": seen[i][0], f"xsum{i}": seen[i][1],
                  f"zconv{i}": tok.synthesis.z_convs[i](t)}
    assert found.keys() == out.keys()
    equal(found, out, {})
    assert (z.grad - out["grad_z"]).norm() < 1e-4 * out["grad_z"].norm()

    state, given, out = fixture("vfmvae_discriminator")
    d = vfm_vae.ProjectedDiscriminator({"dim": 24, "heads": 3}, augment=False, p_crop=0).eval()
    d.load_state_dict(state)
    x, large = (given[k] / 127.5 - 1 for k in ("x_u8", "x_large_u8"))
    features, logits = d.features(x), d(x)
    found = {f"feature{i}": f[:2, :, :24] for i, f in enumerate(features)}
    found |= {"logits": logits, "logits_large": d(large), "g": -logits.mean(),
              "head0_main_first24": d.heads[0].main(features[0][:2])[:, :, :24],
              "d_real": F.relu(1 - logits).mean(), "d_fake": F.relu(1 + logits).mean(),
              "logits_train": d.train()(x)}
    after = {k: d.state_dict()[k.removeprefix("u_after_") + ".weight_u"]
             for k in out if k.startswith("u_after")}
    equal(found | after, out, {})

    _, given, out = fixture("diffaug")
    x = given["x"]
    for name in ("brightness", "saturation", "contrast", "translation", "cutout"):
        draws = [given[f"{name}{i}"] for i in (0, 1) if f"{name}{i}" in given]
        if len(draws) == 2:
            draws = [draw.flatten().long() for draw in draws]
        x = getattr(vfm_vae, name)(x, *draws)
        equal({name: x}, out, {name: f"after_{name}"})


def test_vfm_vae_encodes():
    """[-1, 1] at the border; which layers are read, doubled without antialias; mean and sample; the
    projection's averaged heads, unshuffled tokens, order of layers."""
    tok = small_vfm()
    tower, x = tok.vfm_encoder.encoder["vision_model"], torch.rand(2, 3, 64, 128) * 2 - 1
    doubled = F.interpolate((x + 1) / 2, scale_factor=2, mode="bilinear")
    first = tower.embed(doubled * 2 - 1)
    middle = tower.blocks[1](tower.blocks[0](first))
    last = tower.norm(tower.blocks[3](tower.blocks[2](middle)))
    tokens = tok.features(x)
    assert torch.allclose(tokens, torch.cat([first, middle, last], 2), atol=1e-4)

    block, y = tok.ldm_adapter.patch_quants[1][0].blocks[0], middle
    y1, heads = block.norm1(y), []
    bias = torch.cat([block.attn.q_bias, torch.zeros(64), block.attn.v_bias])
    for qkv in zip(*(p.split(16, 2) for p in (y1 @ block.attn.qkv.weight.T + bias).split(64, 2))):
        q, k, v = qkv
        heads.append((q @ k.transpose(1, 2) / 4).softmax(2) @ v)
    y = block.proj(block.norm3(y)) + block.attn.proj(sum(heads) / 4)
    m, z = block.mlp, block.mlp.norm(block.norm2(y))
    y = y + m.w2(F.gelu(m.w0(z), approximate="tanh") * m.w1(z))  # (2, 8*16, 16)
    by_hand = torch.stack([y.view(2, 8, 16, 16)[:, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)],
                          dim=-1).flatten(3)  # channel c, then dy, dx: (2, 4, 8, 64)
    seen = []
    tok.ldm_adapter.final_quant.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mean = tok.encode(x)
    assert torch.allclose(seen[0].view(2, 4, 8, 192)[..., 64:128], by_hand, atol=1e-4)
    assert mean.shape == (2, 8, 4, 8)

    moments, noise = tok.moments(tokens, 4, 8), torch.randn(2, 8, 4, 8)
    z = moments[:, :8] + (moments[:, 8:] / 2).exp() * noise
    assert torch.equal(mean, moments[:, :8]) and torch.equal(tok.adapt(tokens, 4, 8), mean)
    assert torch.allclose(tok.encode(x, noise), z, atol=1e-5)
    far, ends = torch.tensor([0.0, 0, 99, -99]), torch.tensor([10.0, -15]).exp()  # the clamp
    z = vfm_vae.sample(far.view(1, 4, 1, 1), torch.ones(1, 2, 1, 1)).flatten()
    assert torch.allclose(z, ends, atol=0)

    # DINOv2 by its layers: 14/16 or 28/16 of the size, cls and registers dropped
    for scale in (0.875, 1.75):
        tok = small_vfm(scale, {"dinov2": {"dim": 64, "depth": 2, "grid": 4, "registers": 4}},
                        layers=(0, 1, -1))
        dino = tok.vfm_encoder.encoder["vision_model"]
        small = F.interpolate((x + 1) / 2, scale_factor=scale, mode="bicubic")
        last = dino((small - dino.pixel_mean) / dino.pixel_std)[1]
        assert torch.allclose(tok.features(x)[..., 128:], last, atol=1e-4)
        assert tok.encode(x).shape == (2, 8, 4, 8)
    mae = small_vfm(1, {"mae": {"dim": 64, "depth": 2, "grid": 4}}, layers=(0, 1, -1))
    last = mae.vfm_encoder.encoder["vision_model"].features(x)
    assert torch.allclose(mae.features(x)[..., 128:], last, atol=1e-4)


def test_vfm_vae_decodes():
    """Modulation and demodulation of the weights, in loops; a ConvNeXt layer with its fixed noise;
    where z enters; features, not RGB, are accumulated."""
    conv, x, s = random_weights(vfm_vae.ModulatedConv(3, 4)), torch.randn(2, 3, 2, 5), torch.randn(2, 3)
    rgb = random_weights(vfm_vae.ToRGB(3, 6))
    style = torch.randn(2, 6)
    a, b, c = (style @ rgb.affine.proj.weight.T / 6 ** 0.5 + rgb.affine.proj.bias).split(3, 1)
    for net, found, scales, demodulate in (
            (conv, conv(x, s), s, True), (rgb, rgb(x, style), (a * b + c) / 3 ** 0.5, False)):
        for n in range(2):
            for o, kernel in enumerate(net.weight[:, :, 0, 0]):
                row = [kernel[i] * scales[n, i] for i in range(3)]
                if demodulate:
                    row = [v / (sum(u * u for u in row) + 1e-8).sqrt() for v in row]
                by_hand = sum(v * x[n, i] for i, v in enumerate(row)) + net.bias[0, o, 0, 0]
                assert torch.allclose(found[n, o], by_hand, atol=1e-5)

    tok = small_vfm()
    layer, x, w = tok.synthesis.blocks[2].conv0, torch.randn(1, 16, 4, 12), torch.randn(1, 32)
    noise = F.interpolate(layer.noise_const[None, None], (4, 12), mode="bilinear")  # from 8 x 8
    y = layer.dwconv(x) + layer.noise_strength * noise
    y = F.group_norm(y, 4, layer.norm.weight, layer.norm.bias, 1e-5)
    y = layer.pwconv2(F.gelu(layer.pwconv1(y, layer.affine_pw1(w))))
    assert torch.allclose(layer(x, w), x + layer.gamma * y, atol=1e-5)

    z, seen = torch.randn(1, 8, 4, 8), []
    t = tok.ldm_adapter.post_quant(z.flatten(2).transpose(1, 2)).transpose(1, 2).view(1, 32, 4, 8)
    g = t.mean((2, 3))
    g = g / (g.square().mean().sqrt())
    for fc in tok.mapping.mlp.values():
        seen.append(0.01 * (g @ fc.weight.T / 32 ** 0.5 + fc.bias))
        g = F.leaky_relu(seen[-1], 0.2)
    w, seen = seen[-1], []
    assert torch.allclose(tok.mapping(t), w, atol=1e-5)
    for conv in tok.synthesis.z_convs:
        conv.register_forward_hook(lambda _, args, out: seen.append(out))
    image, lower = tok.paint(z)
    assert [tuple(v.shape[1:]) for v in seen] == [(64, 1, 2), (12, 2, 4), (8, 4, 8), (8, 8, 16)]
    assert [v.shape[3] for v in (image, *lower)] == [128, 64, 32, 16, 8, 4]
    x, x_sum, images = torch.zeros(1, 0, 1, 2), None, []
    for block, injected in zip(tok.synthesis.blocks, [*seen, None, None]):
        x = x if injected is None else torch.cat([x, injected], 1)
        x = block.seperate_upsample_conv(x)
        for layer in (block.conv0, *block.convs1):
            x = layer(x, w)
        for layer in block.self_attns:
            x = layer(x)
        x_sum = x if x_sum is None else x + block.last_upsample_conv(x_sum)
        images.append(block.torgb(x_sum, w))
    assert torch.allclose(image, images[5], atol=1e-4) and torch.equal(tok.decode(z), image)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(lower, images[4::-1]))

    up, x = random_weights(vfm_vae.UpsampleConv(8, 4, blur=3)), torch.randn(1, 8, 3, 3)
    y = up.pointwise(up.depthwise(F.group_norm(x, 2, up.norm.weight, up.norm.bias)))
    y = F.pad(F.pixel_shuffle(y, 2), (1, 1, 1, 1), mode="replicate")
    by_hand = sum(a * b * y[:, :, i:i + 6, j:j + 6] / 16
                  for i, a in enumerate((1, 2, 1)) for j, b in enumerate((1, 2, 1)))
    assert torch.allclose(up(x), by_hand, atol=1e-5)
    attn, x = random_weights(vfm_vae.NullAttention(16)), torch.randn(1, 16, 1, 2)
    y = 4 * x / x.square().sum(1, keepdim=True).sqrt() * attn.norm.gamma
    q, k, v = (torch.einsum("oc,cn->on", f.weight[:, :, 0, 0], y[0, :, 0]).view(8, 2, 2)
               for f in (attn.to_q, attn.to_k, attn.to_v))  # (head, channel, position)
    k, v = (torch.cat([null[:, :, None], p], 2) for null, p in zip(attn.null_kv, (k, v)))
    weights = (torch.einsum("hcn,hcm->hnm", q, k) / 2 ** 0.5).softmax(2)
    y = torch.einsum("hnm,hcm->hcn", weights, v).reshape(1, 16, 1, 2)
    assert torch.allclose(attn(x), attn.to_out(y), atol=1e-5)


def test_vfm_vae_initialisation():
    """As published: the style's weights over their rate, its affine maps near 2, layers and
    attentions that hardly change their input, the projection's truncated normal."""
    torch.manual_seed(0)
    tok = vfm_vae.VFMVAE(None, small_vfm().arguments["synthesis"], dim=512)
    fc, block = tok.mapping.mlp["fc0"], tok.synthesis.blocks[1]
    layer, attention = block.conv0, block.self_attns[0]
    for tensor, std in ((fc.weight, 100), (layer.affine_pw1.proj.weight, 1), (block.torgb.weight, 0.1),
                        (layer.pwconv1.weight, 0.02), (layer.pwconv2.weight, 0.02),
                        (layer.dwconv.weight, 0.02), (attention.attn.null_kv, 0.02),
                        (tok.ldm_adapter.post_quant.blocks[0].attn.qkv.weight, 0.02),
                        (tok.ldm_adapter.patch_quants[0][0].blocks[0].mlp.w1.weight, 0.02),
                        (tok.ldm_adapter.linear_proj.weight, 0.5 * (2 / (32 + 512)) ** 0.5)):
        assert abs(tensor.std() / std - 1) < 0.2, (tuple(tensor.shape), tensor.std(), std)
    assert {*layer.affine_pw1.proj.bias.tolist()} == {1.0} and (layer.gamma == 1e-5).all()
    for tensor in (fc.bias, attention.attn.to_out.weight, attention.ff[3].weight,
                   tok.ldm_adapter.final_quant.blocks[0].proj.bias, layer.noise_strength):
        assert not tensor.any()
    with refused("zip()", kind=ValueError):
        tok.ldm_adapter.moments([torch.zeros(1, 64, 512)] * 2, 4, 4)


def test_vfm_vae_equivariance():
    """What each branch does to the image, the latent and the target; how often; which scales fit."""
    tok = small_vfm()
    x, noise = torch.rand(1, 3, 128, 128) * 2 - 1, torch.randn(1, 8, 8, 8)
    z = tok.encode(x, noise)
    recon, _, _, z_proj, last = tok(x, noise, 0.5, 1, False)
    small = F.interpolate(z, scale_factor=0.5, mode="bilinear")
    turned = torch.stack([small[:, :, 3 - j] for j in range(4)], 3)  # clockwise: rows to columns
    assert torch.allclose(recon, tok.decode(turned), atol=1e-4) and recon.shape[2] == 64
    assert torch.allclose(z_proj, tok.ldm_adapter.linear_proj(z)), "VF's z is untouched"
    pooled = tok.features(x)[..., 128:].transpose(1, 2).view(1, 64, 16, 16)
    pooled = F.adaptive_avg_pool2d(pooled, 8).flatten(2).transpose(1, 2)
    assert torch.allclose(last, pooled, atol=1e-4)

    shrunk = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
    recon = tok(x, noise, 0.5, 0, True)[0]
    assert torch.allclose(recon, tok.decode(tok.encode(shrunk, noise[..., :4, :4])), atol=1e-4)
    one = small_vfm(scale=1)
    one.vfm_encoder.mode = "bicubic"  # DINOv2's, but not in this branch
    recon = one(x, noise, 0.5, 0, True)[0]
    assert torch.allclose(recon, one.decode(one.encode(shrunk, noise[..., :4, :4])), atol=1e-4)
    target = vfm_vae.transformed(x, vfm_vae.Transform(0.5, 1, False), "bilinear")
    assert torch.equal(target, torch.stack([shrunk[:, :, 63 - j] for j in range(64)], 3))

    drawn = [vfm_vae.draw_transform(16, 16) for _ in range(4000)]
    share = {t: drawn.count(t) / 4000 for t in set(drawn)}
    for t, p in share.items():
        expected = 0.5 / 16 if not t.prior else 0.125 / 3
        if t == vfm_vae.Transform():
            expected += 0.375
        assert abs(p - expected) < 4 * (expected / 4000) ** 0.5, (t, p)
    assert len(share) == 16 + 3 and all(not t.turns and t.scale < 1 for t in share if t.prior)
    drawn = {vfm_vae.draw_transform(4, 4) for _ in range(200)}  # at 64 px nothing can shrink
    assert drawn == {vfm_vae.Transform(1.0, turns) for turns in range(4)}


def test_vfm_vae_discriminator():
    """Spectral norm as torch's old one; local batch norm as one of each group; DINO frozen, and
    transparent; DiffAug drawn for each image; the PatchGAN's scales."""
    sn, conv = vfm_vae.SNConv1d(6, 4, 9), torch.nn.Conv1d(6, 4, 9, padding=4,
                                                         padding_mode="circular")
    theirs = torch.nn.utils.spectral_norm(conv)
    theirs.load_state_dict(sn.state_dict())
    x = torch.randn(2, 6, 12)
    for mode in (True, True, False):
        found, expected = sn.train(mode)(x), theirs.train(mode)(x)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(sn.weight_u, theirs.weight_u, atol=1e-5)
    for net, out in ((sn, found), (theirs, expected)):
        out.square().sum().backward()
    assert torch.allclose(sn.weight_orig.grad, theirs.weight_orig.grad, atol=1e-3)

    norm = random_weights(vfm_vae.BatchNormLocal(3))
    for size, groups in ((4, 1), (8, 1), (16, 2), (18, 3)):
        x = torch.randn(size, 3, 5) * torch.arange(1, size + 1).view(-1, 1, 1)
        parts = [F.batch_norm(part, None, None, norm.weight, norm.bias, training=True)
                 for part in x.chunk(groups)]
        assert torch.allclose(norm(x), torch.cat(parts), atol=1e-5), size
    assert "batch of 9 does not split into 2" in error_of(norm, torch.zeros(9, 3, 5),
                                                          kind=ValueError)

    vit = {"dim": 24, "depth": 4, "heads": 3, "patch": 8, "grid": 4}
    d = vfm_vae.Discriminators(vfm_vae.ProjectedDiscriminator(vit, augment=False), ch=4).eval()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits, scales = d(x)
    assert logits.shape == (2, 5 * 16) and scales == []
    logits.sum().backward()
    assert x.grad.any() and d.main.heads[4].cls.weight_orig.grad.any()
    for stage, yes in ((False, True), (True, True), (True, False)):
        d.last_stage = stage
        d.requires_grad_(yes)
        trained = {name.split(".")[0] + name.split(".")[1][:3] for name, p in d.named_parameters()
                   if p.requires_grad}
        assert {name[:7] for name in trained} == (
            {"mainhea", "patchsc"} if stage and yes else {"mainhea"} if yes else set())
    scales = d(x)[1]
    assert [s[0].shape[2] for s in scales] == [17, 9, 5] and len(scales[0]) == 5
    assert torch.allclose(scales[0][0], F.leaky_relu(d.patch.scale2_layer0[0](x), 0.2))
    half = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    assert torch.allclose(scales[1][0], F.leaky_relu(d.patch.scale1_layer0[0](half), 0.2))
    ones = [[torch.zeros(1), torch.ones(2)], [torch.ones(3), torch.tensor([2.0, 4.0])]]
    assert vfm_vae.least_squares(ones, 1) == (0 + (1 + 9) / 2) / 2
    assert vfm_vae.feature_matching(ones, [[torch.ones(1), None], [torch.zeros(3), None]]) == 1

    torch.manual_seed(0)
    x, main = torch.rand(1, 3, 48, 48) * 2 - 1, vfm_vae.ProjectedDiscriminator(vit).eval()
    with patch.object(vfm_vae, "diffaug", torch.zeros_like):
        assert torch.equal(main(x)[:, 64:], main(torch.zeros(1, 3, 32, 32))[:, 64:])
    tower, seen = main.dino["model"]["model"], []
    tower.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for _ in range(40):  # half of the batches are a window, of any place
        main.features(x)
    windows = (((x + 1) / 2 - tower.pixel_mean) / tower.pixel_std).unfold(2, 32, 1).unfold(3, 32, 1)
    found = [(windows[0] - y[:, None, None]).abs().amax((0, 3, 4)) < 1e-5 for y in seen]
    assert 10 < sum(place.any() for place in found) < 30
    assert len({tuple(place.nonzero()[0].tolist()) for place in found if place.any()}) > 8
    six = vfm_vae.ProjectedDiscriminator(vit | {"depth": 6}, augment=False)
    assert "zip()" in error_of(six, x, kind=ValueError), "three taps for five heads"

    x = torch.rand(1, 3, 40, 32)
    one, grey = torch.ones(1, 1, 1, 1), x.mean(1, keepdim=True)
    for found, expected in ((vfm_vae.brightness(x, one), x + 0.5),
                            (vfm_vae.saturation(x, one), 2 * x - grey),
                            (vfm_vae.contrast(x, one), 1.5 * x - 0.5 * x.mean())):
        assert torch.allclose(found, expected, atol=1e-6)
    moved = vfm_vae.translation(x, torch.tensor([3]), torch.tensor([-2]))
    assert torch.equal(moved[..., :37, 2:], x[..., 3:, :-2])
    assert not moved[..., 37:, :].any() and not moved[..., :2].any()
    cut = vfm_vae.cutout(x + 1, torch.tensor([10]), torch.tensor([0]))
    assert (cut == 0).all(1).sum() == 8 * 3 and not cut[..., 6:14, :3].any()
    same_image = torch.rand(1, 3, 40, 32).expand(3, -1, -1, -1)
    changes = {"colour": ("brightness", "saturation", "contrast"), "place": ("translation",),
               "hole": ("cutout",)}
    for name, kept in changes.items():
        off = {op: lambda x, *_: x for op in chain(*changes.values()) if op not in kept}
        with patch.multiple(vfm_vae, **off):
            a, b, _ = vfm_vae.diffaug(same_image)
        assert not torch.allclose(a, b, atol=0.01), name
    drawn = {}  # by name: what 2000 images have drawn
    ops = {op: lambda x, *draws, op=op: drawn.update({op: draws}) or x
           for op in chain(*changes.values())}
    with patch.multiple(vfm_vae, **ops):
        vfm_vae.diffaug(torch.zeros(2000, 3, 40, 32))
    for op in changes["colour"]:
        assert drawn[op][0].min() < 0.01 and drawn[op][0].max() > 0.99, op
    assert [{*draw.tolist()} for draw in drawn["translation"]] == [
        {*range(-5, 6)}, {*range(-4, 5)}]
    assert [{*draw.tolist()} for draw in drawn["cutout"]] == [{*range(41)}, {*range(33)}]


def test_vfm_vae_objective():
    """The terms of each stage against their formulas, and their weights; G's gradients come from
    its own terms, D's from its loss; what VF's weight and the last stage do."""
    tok, s = small_vfm(), SimpleNamespace(steps_before=7, step=0, steps=100)
    args = SimpleNamespace(w_gan=0.3, disc_start=7)
    s.tokenizer = s.ddp_tokenizer = tok
    # x^ leaves [-1, 1]; so do targets of black and white, bicubic as DINOv2's
    tok.synthesis.blocks[5].torgb.weight.data *= 10
    tok.vfm_encoder.mode = "bicubic"
    last_layer = tok.ldm_adapter.final_quant.blocks[0].mlp.w2.weight
    x, noise = torch.randint(2, (2, 3, 128, 128)) * 2.0 - 1, torch.randn(2, 8, 8, 8)
    always = {"multires", "g_loss", "d_loss", "d_real", "d_fake"}
    terms_of = {"strong": {"kl", "vf"}, "weak": {"kl", "vf"}, "ssim": {"ssim"},
                "patchgan": {"patchgan", "matching"}}
    for s.stage, own in terms_of.items():
        d = vfm_vae.Discriminators(losses.PatchGAN(4), 4, last_stage=s.stage == "patchgan")
        s.discriminator = s.ddp_discriminator = d
        if turned := s.stage != "patchgan":
            transform, small = (0.5, 1), F.interpolate(x, (64, 64), mode="bicubic", antialias=True)
            expected = small.flip(2).transpose(2, 3)
        else:
            x, noise, transform = x[..., :64, :64], noise[..., :4, :4], ()
            expected = x
        with patch.object(vfm_vae, "draw_transform", return_value=vfm_vae.Transform(0.5, 1)):
            target, recon, terms = vfm_vae.objective(s, args, x, noise)
        assert terms.keys() == always | own and torch.allclose(target, expected, atol=1e-6)
        assert recon.is_leaf == (not turned), "then L_rec only watches"

        image, lower, moments, z_proj, last = tok(x, noise, *transform)
        (real, real_scales), (fake, fake_scales) = d(expected), d(image)
        (mean, logvar), unit = moments.chunk(2, 1), [v.clamp(-1, 1) for v in (expected, image)]
        shrunk = [F.interpolate(expected, y.shape[2:], mode="bicubic", antialias=True) for y in lower]
        by_hand = {
            "multires": sum((a - b).abs().mean() for a, b in zip(shrunk, lower)),
            "kl": (mean ** 2 + logvar.exp() - 1 - logvar).sum() / 2 / 2,  # a sum, of two images
            "vf": losses.vf_loss(z_proj, last, 0, 0) if "vf" in own else None,
            "ssim": 1 - losses.ssim(*unit, signed=True).mean(), "g_loss": -fake.mean(),
            "d_loss": F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
            "d_real": (real > 0).float().mean(), "d_fake": (fake < 0).float().mean()}
        if not turned:
            pairs = list(zip(real_scales, fake_scales, strict=True))
            by_hand["d_loss"] += sum(
                ((r[-1] - 1) ** 2).mean() + (f[-1] ** 2).mean() for r, f in pairs) / 3
            by_hand["patchgan"] = sum(((f[-1] - 1) ** 2).mean() for _, f in pairs) / 3
            by_hand["matching"] = sum(
                (r[k] - f[k]).abs().mean() for r, f in pairs for k in range(4)) / 3
        for name, (_, value, *balance) in terms.items():
            close(value.item(), by_hand[name].item(), 1e-5)
            assert bool(balance) == (name == "vf") and (
                not balance or balance[0] is last_layer and balance[1] == 1e8), name
        for name, value in {"vf": {"strong": 5, "weak": 1}.get(s.stage), "matching": 10, "g_loss": 0.3,
                            "multires": 0.1 * (s.stage == "strong"), "kl": 1e-6}.items():
            assert name not in terms or terms[name][0] == value, (s.stage, name)
        for name, (weight, value, *_) in terms.items():
            grads = {net: torch.autograd.grad(
                value, [p for p in net.parameters() if p.requires_grad], retain_graph=True,
                allow_unused=True) for net in (tok, d) if value.requires_grad}
            moved = [net for net, g in grads.items() if any(p is not None for p in g)]
            assert moved == ([] if weight is None else [d] if name == "d_loss" else [tok]), name

    args.disc_start = 8
    assert vfm_vae.objective(s, args, x, noise)[2].keys() == {"multires"}, "no GAN yet"
    s.stage, s.step = "strong", 25
    assert vfm_vae.objective(s, args, x, noise)[2]["multires"][0] == 0, "after a quarter"
    s.step = 24
    x, recon, terms = vfm_vae.objective(s, args, x, noise)
    rec = (x - recon).abs().mean()
    norms = [torch.autograd.grad(f, last_layer, retain_graph=True)[0].norm()
             for f in (rec + 0.1 * terms["multires"][1], terms["vf"][1])]
    found = losses.adaptive_weight(rec, *terms["vf"][1:])
    close(found.item(), (norms[0] / (norms[1] + 1e-4)).item(), 1e-4)
    # the published table: lr, images, l1, lpips, ssim, multires, vf, kl, gan, patchgan
    for stage, row in {"strong": (1e-4, 20e6, 1, 10, 0, 0.1, 5, 1e-6, 1, 0),
                       "weak": (1e-4, 20e6, 1, 10, 0, 0, 1, 1e-6, 1, 0),
                       "ssim": (5e-5, 1e6, 1, 2, 1, 0, 0, 0, 1, 0),
                       "patchgan": (5e-5, 3e6, 0, 0, 0, 0, 0, 0, 1, 1)}.items():
        names = ["lr", "images", "l1", "lpips", "ssim", "multires", "vf", "kl", "gan", "patchgan"]
        assert tuple(vfm_vae.STAGES[stage][k] for k in names) == row, stage
        of_stage = tt.of_stage(tt.parse(["--model", "vfmvae"]), stage)
        assert (of_stage.lr, of_stage.w_p, of_stage.disc_start) == (row[0], row[3], 0), stage
    for stage, parts in (("strong", 3), ("weak", 3), ("ssim", 3), ("patchgan", 3)):
        names = vfm_vae.STAGES[stage]["trains"]
        assert len(names) == parts and all(tok.get_submodule(name) for name in names)


def test_vfm_vae_ema():
    """The EMA's half-life is a twentieth of the images that all stages have seen, at most 160,000:
    after 40 steps of 512 two steps, late a decay of .9978."""
    args = SimpleNamespace(ema_decay=None, batch_size=512)
    for steps_before, step, decay in ((30, 9, 0.5 ** 0.5), (0, 39, 0.5 ** 0.5),
                                      (40_000, 0, 0.5 ** 0.0032)):
        net = torch.nn.Linear(1, 1, bias=False)
        ema = copy.deepcopy(net).requires_grad_(False)
        net.weight.data.fill_(1)
        ema.weight.fill_(0)
        opt = torch.optim.SGD(net.parameters(), 0.0)
        tt.update(SimpleNamespace(opt_g=opt, opt_d=opt, ema=ema, tokenizer=net, step=step,
                                  steps_before=steps_before), args)
        close(ema.weight.item(), 1 - decay, 1e-6)


def test_vfm_vae_files():
    """An official checkpoint is built from names and shapes; without the encoder it decodes; each
    mistake is one line."""
    tok = small_vfm()
    x, z = torch.rand(1, 3, 64, 64), torch.randn(1, 8, 4, 4)
    state = {k: v for k, v in tok.state_dict().items() if not k.startswith("latent_")}
    bare = {k: v for k, v in state.items() if "linear_proj" not in k}
    torch.save({"G": {}, "G_ema": bare}, TMP / "official.pth")
    for source in (state, {"G_ema": bare}, TMP / "official.pth"):
        again = frozen(vfm_vae.load(source))
        assert torch.equal(again.encode(x), tok.encode(x))
        assert torch.equal(again.decode(z), tok.decode(z))
        assert "no latent statistics" in error_of(again.normalize, z, kind=ValueError)
    decoder = frozen(vfm_vae.load({k: v for k, v in bare.items() if "vfm_encoder" not in k}))
    assert torch.equal(decoder.decode(z), tok.decode(z))
    # other encoders, and what the shapes tell or do not: two layers, heads that are not 64 wide
    plain, synthesis = {"dim": 64, "depth": 2, "grid": 4}, tok.arguments["synthesis"]
    for foundation, arguments, changed in (
            ({"dinov2": plain | {"registers": 4}}, {"scale": 0.875, "layers": (0, 1, -1)}, {}),
            ({"dinov2": plain | {"swiglu": True}}, {"scale": 1.75, "layers": (0, 1, -1)}, {}),
            ({"mae": plain | {"patch": 14}}, {"scale": 0.875, "layers": (0, 1, -1)}, {}),
            ({"dino": plain}, {"scale": 1, "layers": (0, -1)}, {"layers": (0, -1)}),
            ({"siglip": plain | {"heads": 4}}, {
                "layers": (0, 1, -1), "synthesis": synthesis | {
                    "heads": 4, "blurs": (5, 5, 3, 3, 5, 3)}}, {"encoder_heads": 4})):
        other = small_vfm(foundation=foundation, **arguments)
        again = vfm_vae.load(other.state_dict(), **changed)
        assert torch.equal(again.decode(again.encode(x)), other.decode(other.encode(x))), foundation
        if "layers" in changed:
            assert "2 layers are read" in error_of(vfm_vae.load, other.state_dict(), kind=ValueError)
    assert vfm_vae.arguments_of(state, scale=7, layers=(0, 3, -1)).items() >= {
        "scale": 7, "layers": (0, 3, -1)}.items()
    ours = {"arguments": tok.arguments, "tokenizer": tok.state_dict()}
    assert vfm_vae.load(ours, layers=(0, 3, -1)).arguments["layers"] == [0, 3, -1]
    dino = small_vfm(foundation={"dinov2": plain}, scale=0.875, layers=(0, 1, -1))
    older = {k: v for k, v in dino.arguments.items() if k != "positions"}
    for rule, source in (("size", dino.state_dict()), ("scale", {
            "arguments": older, "tokenizer": dino.state_dict()})):
        tower = vfm_vae.load(source).vfm_encoder.encoder["vision_model"]
        assert tower.rule == rule, "positions are resampled as they were in training"
    fewer = {k: v for k, v in state.items() if "z_convs.3" not in k}
    siglip = {k: v for k, v in tok.vfm_encoder.encoder["vision_model"].state_dict().items()}
    assert model.siglip_arguments(siglip) == {"dim": 64, "depth": 4, "hidden": 256, "patch": 16,
                                               "grid": 8}
    for words, call, *args in (
            ("can only decode", decoder.encode, x),
            ("no VFM-VAE", vfm_vae.load, siglip),
            ("z_convs.3.2.0.weight' is missing", vfm_vae.load, fewer),
            ("no SigLIP2", model.siglip_arguments, DINOv2(64, 1, grid=4).state_dict()),
            ("scale 1.5 does not fit patches of 16 px", small_vfm, 1.5),
            ("divisible by 4, not 4x6", tok.decode, torch.zeros(1, 8, 4, 6)),
            ("divisible by 16", tok.encode, torch.zeros(1, 3, 64, 72))):
        assert words in error_of(call, *args, kind=ValueError), words


def diffusers_state(state):
    """An LDM autoencoder's state dict as diffusers' AutoencoderKL names it."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if ".up." in name)
    middle = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
    others = {"norm_out": "conv_norm_out", "nin_shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "proj_out": "to_out.0"} | {k: f"to_{k}" for k in "qkv"}
    found = {}
    for name, tensor in state.items():
        net, part, *rest = name.split(".")
        if part in ("quant_conv", "post_quant_conv"):
            net = ""
        elif part == "mid":
            table = attention if rest[0] == "attn_1" else others
            if rest[0] == "attn_1" and tensor.dim() == 4:
                tensor = tensor[:, :, 0, 0]
            part, rest = "mid_block", [middle[rest[0]], table.get(rest[1], rest[1]), *rest[2:]]
        elif part in ("down", "up"):
            level = int(rest[0]) if part == "down" else levels - 1 - int(rest[0])
            kind = "resnets" if rest[1] == "block" else f"{rest[1]}rs.0"
            part, rest = f"{part}_blocks.{level}", [kind, *(others.get(k, k) for k in rest[2:])]
        found[".".join([net, others.get(part, part), *rest]).strip(".")] = tensor
    return found


def small_flux(**changed):
    """A narrow FluxVAE, and its official file."""
    sizes = {"ch": 32, "ch_mult": [1, 2, 1, 1], "num_res_blocks": 1}
    vae = random_weights(FluxVAE(sizes, 4, **changed), scale=0.05).requires_grad_(False)
    state = {k: v for k, v in vae.state_dict().items() if not k.startswith("latent_")}
    if vae.pack == 2:
        torch.manual_seed(0)
        state |= {"bn.running_mean": torch.randn(16), "bn.running_var": torch.rand(16) + 0.1,
                  "bn.num_batches_tracked": torch.tensor(7)}
    return vae, state


def test_flux_vae():
    """The latents of FLUX's VAE and FLUX.2's, from both layouts of their files, strictly."""
    x, path = torch.rand(2, 3, 32, 48) * 2 - 1, TMP / "ae.pt"
    for flux2 in (False, True):
        vae, state = small_flux(flux2=flux2)
        z = vae.encoder(x)  # mean and log-variance at factor 8
        z = vae.encoder.quant_conv(z)[:, :4] if flux2 else z[:, :4]  # the mean
        if flux2:
            packed = torch.empty(2, 16, 2, 3)
            for c, dy, dx in np.ndindex(4, 2, 2):
                packed[:, c * 4 + dy * 2 + dx] = z[:, c, dy::2, dx::2]
            mean, std = state["bn.running_mean"], (state["bn.running_var"] + 1e-4).sqrt()
            expected = (packed - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
            recon = vae.decoder(vae.decoder.post_quant_conv(z))
        else:
            expected, recon = 0.3611 * (z - 0.1159), vae.decoder(z)
        for content in (state, diffusers_state(state)):
            save_checkpoint(path, content)
            for systems in ((VAE, FluxVAE), (FluxVAE, VAE)):
                again = load_tokenizer(path, *systems).requires_grad_(False)
            latents = again.normalize(again.encode(x))
            assert torch.allclose(latents, expected, atol=1e-5)
            assert torch.allclose(again.decode(again.unnormalize(latents)), recon, atol=1e-4)
            assert again.factor == (16 if flux2 else 8) and again.d == latents.shape[1]
            files.ensure_statistics(again, path)
            short = dict(content)
            del short[next(k for k in short if k.endswith("conv_out.bias"))]
            save_checkpoint(path, short)
            assert "encoder.conv_out.bias" in error_of(load_tokenizer, path, FluxVAE)
        assert "divisible by" in error_of(again.encode, torch.zeros(1, 3, 32, 36), kind=ValueError)
        assert not any("attn" in k for k in state if "mid" not in k)
        norms = [m.num_groups for m in again.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert set(norms) == {32}
    assert diffusers_state(state).keys() > {  # as published
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias", "post_quant_conv.weight",
        "encoder.down_blocks.2.downsamplers.0.conv.weight", "decoder.mid_block.resnets.1.norm2.bias",
        "decoder.up_blocks.0.upsamplers.0.conv.bias", "decoder.mid_block.attentions.0.to_out.0.bias",
        "encoder.mid_block.attentions.0.group_norm.weight", "decoder.conv_norm_out.weight"}
    save_checkpoint(path, {k: v for k, v in diffusers_state(state).items() if "bn." not in k})
    assert "not a tokenizer" in error_of(load_tokenizer, path, VAE, FluxVAE)  # such as SD's

    with refused("ae.safetensors", "pip install safetensors"):
        safetensors = TMP / "ae.safetensors"
        safetensors.write_bytes(b"\2\0\0\0\0\0\0\0{}")
        with patch.dict(sys.modules, {"safetensors.torch": None}):
            load_tokenizer(safetensors, FluxVAE)


def test_flux_vae_fixture():
    """The official code's latents and images of small weights, where the fixture is at hand."""
    folder = HERE.parent / "shared" / "fixtures"
    if not folder.is_dir():
        return
    with np.load(folder / "flux_vae_small.npz") as f:
        arrays = {k: torch.from_numpy(f[k]) for k in f if not k.startswith("keys/")}
        names = dict(zip(f["keys/bfl"].tolist(), f["keys/diffusers"].tolist()))
    state = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
    theirs = diffusers_state(state)
    assert theirs.keys() == set(names.values())
    for content in (state, theirs):
        save_checkpoint(TMP / "ae.pt", content)
        vae = load_tokenizer(TMP / "ae.pt", VAE, FluxVAE).requires_grad_(False)
        moments = vae.features(arrays["in/x"])  # (1, 64, 8)
        latents = vae.normalize(vae.encode(arrays["in/x"]))
        for name, found in {"moments": moments.transpose(1, 2).view(1, 8, 8, 8),
                            "latent_scaled": latents,
                            "packed": F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2),
                            "decoded": vae.decode(vae.unnormalize(arrays["in/z"]))}.items():
            official = arrays[f"out/{name}"]
            assert (found - official).abs().max() < 1e-5 * official.abs().max().clamp_min(1), name
    with torch.device("meta"):
        state = {k: v for k, v in FluxVAE(baselines.FLUX).state_dict().items() if "latent" not in k}
    keys = [line.split() for line in (folder / "flux_vae_keys.txt").read_text().splitlines()]
    assert {bfl for bfl, *_ in keys} == state.keys()
    assert {diffusers for _, diffusers, *_ in keys} == diffusers_state(state).keys()


def test_flux_vae_as_a_tokenizer():
    """The generator takes two by two of its latents as a token; sample.py, fid.py --recon."""
    vae, state = small_flux()
    with folder() as d, mini_size():
        save_checkpoint(d / "ae.pt", state)
        tokenizer = ["--tokenizer", d / "ae.pt"]
        execute(train_dit, *mini_dit(d), *tokenizer, "--out", d / "dit", "--steps", 1)
        dit, _ = sample.load_dit(sample.last_dit(d / "dit"))
        assert (dit.d, dit.patch, dit.arguments["grid"], dit.grid) == (4, 2, [4, 4], (2, 2))
        execute(sample, "--preset", "tiny", *tokenizer, "--dit", sample.last_dit(d / "dit"), "-n",
                2, "--steps", 1, "--out", d / "s.npz")
        with np.load(d / "s.npz") as f:
            assert f["arr_0"].shape == (2, 32, 32, 3)
        with refused("--size", "divisible by 16"):
            execute(train_dit, *mini_dit(d), *tokenizer, "--out", d / "dit", "--size", 40)
        images = write_images(d / "a", n=4)
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        mse = (data.to_uint8(vae.decode(vae.encode(x))) - images.astype(float)) ** 2
        found = figures("--recon", d / "ae.pt", d / "a", "--size", 64, "--metrics", "psnr")
        close(found["PSNR"], (10 * np.log10(255 ** 2 / mse.mean((1, 2, 3)))).mean(), 1e-5)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # it has no foundation encoder
        assert [*fid.latents_and_tokens(vae, pixels, torch.arange(4), 1.0)] == ["latents"]


# -------------------------------------------------------------------------------------- captions.py

def test_caption_folder():
    """Images and the .txt beside them, at any depth, in the folders that images are looked for in;
    each mistake is one line."""
    with folder() as top:
        d = top / "d"
        write_images(d, n=4)
        if os.name == "posix":
            (d / "class1").rename(top / "elsewhere")
            (d / "class1").symlink_to(top / "elsewhere")
        for i, path in enumerate(sorted(d.glob("*/*.png"))):
            path.with_suffix(".TXT" if i == 3 else ".txt").write_text(f" number {i}\n", "utf-8-sig")
        files_in(d, ".ipynb_checkpoints/x.txt", "__MACOSX/000.txt", "class0/notes.md")
        with patch("builtins.print") as printed:
            pairs = captions.open_captions(d, d / "index", 0)
        assert "4 images; ignored" in str(printed.call_args[0][0])
        assert "1 of .md" in str(pairs) and ".txt" not in str(pairs)
        assert [*pairs.captions] == [f"number {i}" for i in range(4)] and len(pairs) == 4
        assert np.array_equal(pairs.image(2), Image.open(d / "class1" / "001.png"))
        part = pairs.subset([3, 2])
        assert [*part.captions] == ["number 3", "number 2"] and part.labels is None
        assert np.array_equal(part.image(1), pairs.image(2)) and part.identity != pairs.identity
        text = d / "class0" / "000.txt"
        for words, change in {
                ("1 empty captions", "class0/000.txt"): lambda: text.write_text(" \n"),
                ("1 images without a caption", "class0/000.png"): text.unlink,
                ("1 captions without an image", "class1/x.txt"): lambda: (
                    text.write_text("a"), (d / "class1" / "x.txt").write_text("a"))}.items():
            change()
            with refused(*words):
                captions.open_captions(d, d / "index", 0)
        with refused("not found", "missing"):
            captions.open_captions(d / "missing", d / "index", 0)


def jpeg(seed):
    content, pixels = io.BytesIO(), np.random.default_rng(seed).integers(0, 256, (40, 32, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(content, "JPEG")
    return content.getvalue()


def test_caption_shards():
    """The whole samples of two shards, in order; the broken ones are counted and named; a shard is
    read through once, and again when it or its index has changed; one that is cut off, or damaged
    in a way that tarfile takes for the end."""
    with folder() as d:
        whole = {f"{i:05d}": {"jpg": jpeg(i), "txt": f"picture {i}".encode(), "json": b"{}"}
                 for i in range(6)}
        whole["00003"] = {"JPG": jpeg(3), "TXT": "\ufeffpicture 3".encode()}
        Image.open(io.BytesIO(jpeg(0))).save(d / "a.png")
        png = (d / "a.png").read_bytes()
        broken = {"10": {"jpg": jpeg(0)[:500], "txt": b"cut"}, "11": {"jpg": jpeg(0)},
                  "12": {"txt": b"alone"}, "13": {"jpg": jpeg(0), "txt": b" "},
                  "14": {"png": png[:-14] + b"\1" + png[-13:], "txt": b"another CRC"}}
        write_shard(d / "00000.tar", dict(list(whole.items())[:4]))
        write_shard(d / "00001.tar", broken | dict(list(whole.items())[4:]))
        with patch("builtins.print") as printed:
            shards = captions.open_captions(d, d / "index", 1)
        text, found = (str(call[0][0]) for call in printed.call_args_list)
        assert "2 shards, 6 images; ignored: 2 other" in found  # a.png, index
        assert "5 broken samples" in text and all(f"00001.tar:{k}" in text for k in broken), text
        assert [*shards.captions] == [f"picture {i}" for i in range(6)] and len(shards) == 6
        for i in range(6):
            assert np.array_equal(shards.image(i), Image.open(io.BytesIO(jpeg(i))))
        with patch.object(captions, "read_shard", side_effect=AssertionError):
            again = captions.CaptionShards(d, d / "index")
        assert np.array_equal(again.places, shards.places) and again.identity == shards.identity
        write_shard(d / "00001.tar", {"00009": whole["00000"]})
        full = OSError(errno.EMFILE, "Too many open files")
        with patch("builtins.open", side_effect=full), refused("Too many open files"):
            shards.image(0)
        part = shards.subset([4, 1, 0])
        assert [*part.captions] == [f"picture {i}" for i in (4, 1, 0)]
        assert part.identity != shards.identity
        assert part.name(1) == b"00000.tar:00001.jpg"
        assert np.array_equal(part.image(2), Image.open(io.BytesIO(jpeg(0))))
        changed = captions.CaptionShards(d, d / "index")
        assert len(changed) == 5 and changed.identity != shards.identity
        now = (d / "00000.tar").stat()
        whole["00000"]["txt"] = b"another 0"
        write_shard(d / "00000.tar", dict(list(whole.items())[:4]))
        os.utime(d / "00000.tar", ns=(now.st_atime_ns, now.st_mtime_ns + 1))
        assert (d / "00000.tar").stat().st_size == now.st_size
        assert captions.CaptionShards(d, d / "index").captions[0] == "another 0"
        kept = d / "index" / "00000.json"
        older = json.loads(kept.read_text()) | {"samples": []}
        for damaged in ('{"size": 1', "[]", "{}", json.dumps(older | {"version": 1})):
            kept.write_text(damaged)
            assert len(captions.CaptionShards(d, d / "index")) == 5

        tar = (d / "00000.tar").read_bytes()
        with tarfile.open(d / "00000.tar") as f:
            third = f.getmembers()[2].offset
        for words, content in {
                "unexpected end of data": tar[:1500],
                "cut off there: fetch it again": tar[:third],
                f"damaged at byte {third}": tar[:third] + b"\1" + tar[third + 1:],
                "damaged at byte": tar[:third] + bytes(2 ** 17),
                "not what it should be": gzip.compress(tar)}.items():
            (d / "00001.tar").write_bytes(content)
            with refused("1 of 2 shards", "00001.tar", words):
                captions.CaptionShards(d, d / "index")
        (d / "00001.tar").write_bytes(tar[:third] + bytes(512))  # one block is an end too
        assert len(captions.CaptionShards(d, d / "index")) == 5
        if os.name == "posix":
            (d / "00001.tar").unlink()
            (d / "00001.tar").symlink_to(d / "gone")
            with refused("1 of 2 shards", "shard not found", "00001.tar"):
                captions.CaptionShards(d, d / "index", 1)


def test_strings():
    """Any text comes back; 100,000 captions take their bytes and a quarter of it for growth, and no
    object each."""
    texts = ["", "a star", "\u00e9t\u00e9 \u2603", os.fsdecode(b"\xff.jpg")]
    kept = captions.Strings(texts)
    assert [*kept] == texts and len(kept) == 4 and kept[2] == texts[2]
    prints = [captions.digest(t) for t in (kept, texts, texts[:2], ["", "a sta", "r"])]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    tracemalloc.start()
    kept = captions.Strings(f"a red star, number {i:06d}" for i in range(100_000))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1.25 * 100_000 * (26 + 8), taken


def test_words():
    """The built-in text encoder by hand: which word stands where, and how many times."""
    encoder = captions.Words(["red", "star", "on"])
    rows = torch.from_numpy(encoder(["Red star, on red", ""]))
    text, pooled = mmdit.unpack(rows, encoder.T, encoder.P)
    assert text.shape == (2, 10, 13) and pooled.tolist() == [[2, 1, 1], [0, 0, 0]]
    assert text[0, :5, :3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert torch.equal(text[:, :, 3:], torch.eye(10).expand(2, -1, -1)) and not text[1, :, :3].any()
    with refused("does not know blue", "red star on"):
        encoder(["red on blue"])
    assert encoder(["red " * 11])[0, -3:].tolist() == [10, 0, 0]
    assert encoder.cut(["red " * n for n in (9, 10, 11, 12)]) == {10: 2}
    with patch.object(captions.Words, "rest") as rested:
        rows = captions.Rows(encoder, ["red"] * 39 + ["star"], ahead=39)
        assert len(rows) == 41 and rested.call_count == 1
        for chosen, texts, times in (([38, -1, 0], ["red", "", "red"], 1),
                                     ([38, 39, -1], ["red", "star", ""], 2), ([39, -1], ["star", ""], 2),
                                     ([39, 0, -1], ["star", "red", ""], 3)):
            assert np.array_equal(rows[np.array(chosen)], encoder(texts))
            assert rested.call_count == times, "those encoded with the others were kept"
    with folder() as d:
        (d / "p.txt").write_text("a b\u2028c\r\n\n d\x0b\x85e\n", "utf-8")
        assert captions.read_prompts(d / "p.txt") == ["a b\u2028c", "d\x0b\x85e"], "lines alone"
        (d / "p.txt").write_text("a red kite\nA kite on blue\n", "utf-8-sig")
        args = SimpleNamespace(clip_text=None, t5=None, words=d / "p.txt", text_length=None)
        assert captions.read_prompts(d / "p.txt") == ["a red kite", "A kite on blue"]
        other = sample.open_text_encoder(args, "cpu")
        assert [*other.number] == ["a", "blue", "kite", "on", "red"]
        (d / "p.txt").write_text("a red kite\n")
        assert len({encoder.identity, other.identity,
                    sample.open_text_encoder(args, "cpu").identity}) == 3
        args.t5 = "t5"
        with refused("--words", "leave out --clip-text and --t5"):
            sample.open_text_encoder(args, "cpu")
        args.t5 = None
        (d / "p.txt").write_text("!\n")
        with refused("p.txt holds no word"):
            sample.open_text_encoder(args, "cpu")
        args.text_length = 9
        with refused("--text-length is T5's"):
            sample.open_text_encoder(args, "cpu")
    for flag in ("clip-text", "t5", "words", "text-length", "text-cache"):
        with refused(f"--{flag} goes with --captions"):
            train_dit.parse([f"--{flag}", "9"])


class FakeTransformers:
    """As much of the package as ClipT5 asks for: a token is a letter's number, a network's output
    its multiple."""
    logging = SimpleNamespace(set_verbosity_error=lambda: None)

    class AutoTokenizer:
        @classmethod
        def from_pretrained(cls, folder, **_):
            return lambda prompts, max_length=None, **_: {"input_ids": (
                torch.tensor([([ord(c) for c in p] + [0] * max_length)[:max_length]
                              for p in prompts]) if max_length else list(prompts))}

    class CLIPTextModel(torch.nn.Module):
        width, times = 2, 1.0
        config_class = SimpleNamespace(
            from_pretrained=lambda folder, **_: SimpleNamespace(hidden_size=2))

        @classmethod
        def from_pretrained(cls, folder, **_):
            model, weights = cls(), (folder / "model.safetensors").read_bytes()
            model.weight = torch.nn.Parameter(torch.tensor(cls.times))
            return model, {"missing_keys": ["norm"] if weights == b"broken" else []}

        def forward(self, input_ids):
            hidden = self.weight * input_ids[..., None].expand(-1, -1, self.width).float()
            return SimpleNamespace(last_hidden_state=hidden, pooler_output=hidden.sum(1))

    class T5EncoderModel(CLIPTextModel):
        width, times = 3, 10.0
        config_class = SimpleNamespace(
            from_pretrained=lambda folder, **_: SimpleNamespace(hidden_size=3))


def test_clip_and_t5():
    """CLIP's pooled text of 77 tokens and T5's tokens, padded or cut to L; what makes an encoder
    another one; FLUX's folders; no network for a complete cache; each mistake is one line, also
    without the package."""
    with folder() as d, patch.dict(sys.modules, transformers=FakeTransformers):
        clip, t5 = d / "clip", d / "text_encoder_2"
        files_in(clip, "config.json", "tokenizer_config.json", "vocab.json", "model.safetensors")
        files_in(d, "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
                 "tokenizer_2/tokenizer_config.json", "tokenizer_2/spiece.model")
        encoder = captions.ClipT5(clip, t5, 4, CPU)
        files_in(d, "tokenizer_2/config.json")  # a name that both its folders hold
        with patch.object(captions, "sha256", str), patch.object(
                captions, "digest", lambda texts: texts):
            paths = captions.ClipT5(clip, t5, 4, CPU).identity
        assert [p.parent.name for p in map(Path, paths) if p.name == "config.json"] == [
            "clip", "text_encoder_2", "tokenizer_2"], "always in one order"
        (d / "tokenizer_2/config.json").unlink()
        rows = torch.from_numpy(encoder(["ab", "abcdef"]))
        text, pooled = mmdit.unpack(rows, encoder.T, encoder.P)
        assert (encoder.L, encoder.T, encoder.P) == (4, 3, 2)
        assert text[:, :, 2].tolist() == [[970, 980, 0, 0], [970, 980, 990, 1000]]
        assert pooled.tolist() == [[195, 195], [597, 597]]
        moves = []
        with patch.object(torch.nn.Module, "to", lambda net, device: moves.append(device) or net):
            captions.Rows(encoder, ["ab"])
        assert moves == [CPU, CPU, "cpu", "cpu"], "both rest between calls"
        texts = ["a" * n for n in (4, 5, 77, 78, 6)]
        assert encoder.cut(texts) == {4: 4, 77: 1}
        with patch("builtins.print") as printed:
            made = captions.cached_text(d / "text.npy", encoder, texts, 2, False)
        told = [call[0][0] for call in printed.call_args_list if "WARNING" in call[0][0]]
        assert len(told) == 2 and "1 prompts are longer than the text encoder's 77 tokens" in told[1]
        for path in (clip / "config.json", clip / "vocab.json", clip / "model.safetensors",
                     t5 / "config.json", t5 / "model.safetensors", d / "tokenizer_2/spiece.model"):
            before = path.read_bytes()
            path.write_text("broken" if path.name == "model.safetensors" else "{}")
            assert captions.ClipT5(clip, t5, 4, CPU).identity != encoder.identity, path
            if path == t5 / "model.safetensors":
                with refused("text_encoder_2", "lacks norm"):
                    captions.ClipT5(clip, t5, 4, CPU)(["a"])
            path.write_bytes(before)
        files_in(t5, "README.md", "pytorch_model.bin")  # nothing that is read
        assert captions.ClipT5(clip, t5, 5, CPU).identity != encoder.identity
        again = captions.ClipT5(clip, t5, 4, CPU)
        assert np.array_equal(captions.cached_text(d / "text.npy", again, texts, 2, False), made)
        assert again.identity == encoder.identity and "networks" not in vars(again)
        with open(d / "text.npy", "ab") as f:
            f.write(b"\0")
        with refused("cache of captions", "bytes follow its end"):
            captions.cached_text(d / "text.npy", again, texts, 2, False)
        with refused("--clip-text and --t5 go together"):
            captions.ClipT5(clip, None, 4, CPU)
        with refused("tokenizer not found", "nowhere"):
            captions.ClipT5(clip, d / "nowhere", 4, CPU)
        with refused("T5EncoderModel not found", "tokenizer_2"):
            captions.ClipT5(clip, d / "tokenizer_2", 4, CPU)
        with patch.object(FakeTransformers.AutoTokenizer, "from_pretrained",
                          side_effect=OSError("no tokenizer\nthat is known")), refused(
                              "unreadable tokenizer", "no tokenizer"):
            captions.ClipT5(clip, t5, 4, CPU)
        with patch.object(FakeTransformers.AutoTokenizer, "from_pretrained", side_effect=ImportError(
                "\nT5Tokenizer requires\nsentencepiece")), refused(
                    "a package is lacking", "T5Tokenizer requires sentencepiece"):
            captions.ClipT5(clip, t5, 4, CPU)
        with patch.dict(sys.modules, transformers=None), refused("pip install transformers"):
            captions.ClipT5(clip, t5, 4, CPU)


# ----------------------------------------------------------------------------------------- files.py

def test_encoder_files():
    """DINOv2's sizes follow from its file: plain, in half precision, a teacher's, in chunks."""
    state = random_weights(DINOv2(dim=128, depth=3, grid=4, registers=4)).state_dict()
    teacher = prefixed("backbone.", state) | {"dino_head.w": torch.zeros(1)}
    chunked = {k.replace("blocks.", f"blocks.{int(k[7]) // 2}.") if "blocks." in k else k: v
               for k, v in state.items()}
    path = str(TMP / "e.pth")
    deeper = {"epoch": 3, "model": {"state_dict": prefixed("module._orig_mod.encoder.", state)}}
    for name, content in {"plain": state, "half": {k: v.half() for k, v in state.items()},
                          "DDP": {"state_dict": prefixed("module.", state)}, "deeper": deeper,
                          "compiled": {"model": prefixed("_orig_mod.", state)},
                          "with a head": state | {"head.weight": torch.zeros(1)},
                          "teacher": {"teacher": teacher}, "chunked": chunked}.items():
        torch.save(content, path)
        loaded, arguments = load_encoder(path)
        assert arguments == {"dim": 128, "depth": 3, "swiglu": False, "registers": 4, "grid": 4}
        assert name == "half" or same(loaded.state_dict(), state) is None, name
    torch.save({k: v for k, v in state.items() if k != "blocks.1.ls1.gamma"}, path)
    assert "blocks.1.ls1.gamma" in error_of(load_encoder, path)
    two = {"state_dict": prefixed("student.", state) | prefixed("teacher.", state)}
    wide = state | {"patch_embed.proj.weight": torch.zeros(128, 3, 16, 16)}
    for word, content in {"student., teacher.": two, "16 px": wide}.items():
        torch.save(content, path)
        assert word in error_of(load_encoder, path)
    assert "neither a file nor" in error_of(load_encoder, "vitx14")


# DINOv2's official names -> those of transformers' files; those that it has in memory since its
# version 5, which torch.save of a state dict writes; timm's. Several: equal parts of the tensor.
TRANSFORMERS = {
    "cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings", "register_": "embeddings.register_",
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer.",
    "attn.qkv": "attention.attention.query|attention.attention.key|attention.attention.value",
    "attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1", "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out",
    "norm.": "layernorm."}
TRANSFORMERS_5 = TRANSFORMERS | {
    "attn.qkv": "attention.q_proj|attention.k_proj|attention.v_proj",
    "attn.proj": "attention.o_proj", "mlp.w12": "mlp.gate_proj|mlp.up_proj",
    "mlp.w3": "mlp.down_proj"}
TIMM = {"register_tokens": "reg_token", "mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}


def renamed(state, table):
    """A state dict under other names, as `table` says."""
    out = {}
    for name, tensor in state.items():
        names = [name]
        for ours, theirs in table.items():
            names = [n.replace(ours, t) for t in theirs.split("|") for n in names]
        names = list(dict.fromkeys(names))
        out |= zip(names, tensor.chunk(len(names)))
    return out


def test_encoders_of_other_libraries():
    """A file of transformers or timm, whatever it is wrapped in, has the features of the official
    one; safetensors are read by their package, which is asked for by name."""
    x, path = torch.randn(2, 3, 42, 70), str(TMP / "other.pt")
    for sizes in ({}, {"registers": 4}, {"swiglu": True}, {"swiglu": True, "registers": 4}):
        net = random_weights(DINOv2(dim=128, depth=2, grid=5, **sizes))
        state = net.state_dict()
        timm = {k: v for k, v in state.items() if k != "mask_token"}
        if net.registers:  # the class token holds its position
            first, rest = state["pos_embed"].split([1, 25], dim=1)
            timm |= {"cls_token": state["cls_token"] + first, "pos_embed": rest}
        old, new, timm = renamed(state, TRANSFORMERS), renamed(state, TRANSFORMERS_5), renamed(
            timm, TIMM)
        with torch.no_grad():
            expected = torch.cat([t.flatten() for t in net(x)])
            for content in (old, new, timm, {"state_dict": prefixed("module.", timm)},
                            prefixed("dinov2.", old) | {"classifier.weight": torch.zeros(2, 256)},
                            {"teacher": prefixed("backbone.", new)}):
                torch.save(content, path)
                loaded, arguments = load_encoder(path)
                assert arguments == {"dim": 128, "depth": 2, "swiglu": False, "registers": 0,
                                     "grid": 5} | sizes
                features = torch.cat([t.flatten() for t in loaded.eval()(x)])
                assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.save({k: v for k, v in new.items() if ".1.attention.v_proj" not in k}, path)
    assert "blocks.1.attn.qkv.weight" in error_of(load_encoder, path)

    size = sum(v.nbytes for v in timm.values())
    Path(path).write_bytes(struct.pack("<Q", 2) + b"{}" + bytes(2 * size))  # a header shows
    package = SimpleNamespace(load_file=lambda file: {str(path): timm}[str(file)])
    with patch.dict(sys.modules, {"safetensors": SimpleNamespace(), "safetensors.torch": package}):
        loaded, _ = load_encoder(path)
    assert torch.equal(loaded.state_dict()["norm.weight"], state["norm.weight"])
    with (patch.dict(sys.modules, {"safetensors": None}),
          refused("other.pt", "pip install safetensors")):
        load_encoder(path)


def test_families_of_encoders():
    """A file's family follows from its names, DINO v1's or MAE's from its positions: with a
    decoder, of transformers, a whole SigLIP2, its tower alone. Only the family's own sides and
    names pass."""
    names = {"attn.qkv": TRANSFORMERS["attn.qkv"], "cls_token": "embeddings.cls_token",
             "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection",
             "blocks.": "encoder.layer.", "attn.proj": "attention.output.dense",
             "norm1": "layernorm_before", "norm2": "layernorm_after",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    dino, mae = (random_weights(ViT(64, 2, grid=3, fixed=fixed)) for fixed in (False, True))
    siglip, zero, path = random_weights(SigLIP(64, 2, grid=3)), torch.zeros(1), str(TMP / "f.pt")
    decoder = {"mask_token": zero, "decoder_pos_embed": zero, "decoder_blocks.0.norm1.bias": zero}
    huge = ViT(64, 1, patch=14, grid=3, fixed=True).state_dict()
    plain = {"dim": 64, "depth": 2, "patch": 16, "grid": 3}
    for family, net, content in (
            ("dino", dino, dino.state_dict()), ("mae", mae, {"model": mae.state_dict()}),
            ("mae", mae, {"model": mae.state_dict() | decoder, "epoch": 3}),
            ("mae", mae, {k: v.half() for k, v in mae.state_dict().items()}),
            ("mae", mae, prefixed("vit.", renamed(mae.state_dict(), names))
             | {"decoder.mask_token": zero}),
            ("siglip", siglip, siglip.state_dict() | {"text_model.x": zero, "logit_scale": zero}),
            ("siglip", siglip, renamed(siglip.state_dict(), {"vision_model.": ""}))):
        torch.save(content, path)
        found, arguments = load_encoder(path)
        assert arguments.pop("hidden", 256) == 256
        assert arguments == plain | {"family": family}
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(
            found.state_dict().values(), net.state_dict().values(), strict=True)), family
        assert [p.shape for p in found.never_trains()] == [p.shape for p in net.never_trains()]
    torch.save(huge, path)
    assert load_encoder(path)[1] == plain | {"family": "mae", "depth": 1, "patch": 14}
    for words, content in {"norm.weight": {k: v for k, v in huge.items() if k != "norm.weight"},
                           "Unexpected key": dino.state_dict() | {"dist_token": zero}}.items():
        torch.save(content, path)
        assert words in error_of(load_encoder, path)
    torch.save(mae.state_dict(), path)
    with patch.object(files, "find_weights", lambda url, *_: path if "vit_large" in url else None):
        assert "is not a mae-l16" in error_of(load_encoder, "mae-l16")
    with folder() as d, patch("torch.hub.get_dir", return_value=d):
        name = "siglip2-l16-512"
        assert f"{name}.safetensors: no such file" in error_of(load_encoder, name)
        (d / "checkpoints").mkdir()
        (d / "checkpoints" / f"{name}.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        with patch.dict(sys.modules, {"safetensors.torch": None}):
            assert "pip install safetensors" in error_of(load_encoder, name), "it is read"
    assert "no such size" in error_of(load_encoder, "random:mae-l16_reg4")
    assert "is no DINOv2: it holds ViT" in error_of(fid.load_dinov2, path)


def test_weights_of_other_networks():
    """They are named for what they are."""
    path = TMP / "other.pt"
    vit = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"]
    for kind, names in {
            "AlignTok": ["tokenizer", "arguments"],
            "an autoencoder of LDM": ["encoder.conv_in.weight", "foundation_model.cls_token", "loss.logvar"],
            "LightningDiT": ["module.x_embedder.proj.weight", "pos_embed"],
            "DINOv3": ["cls_token", "storage_tokens", "blocks.0.ls1.gamma"],
            "DINOv3 (transformers)": ["embeddings.cls_token", "layer.0.layer_scale1.lambda1"],
            "CLIP": ["visual.layer1.0.conv1.weight", "transformer.resblocks.0.ln_1.weight"],
            "CLIP (transformers)": ["vision_model.embeddings.class_embedding"],
            "CLIP (timm)": [*vit, "norm_pre.weight"],
            "SigLIP": ["vision_model.head.probe", "vision_model.encoder.layers.0.mlp.fc1.bias"],
            "another ViT": [*vit, "blocks.0.gamma_1"],
            "a ResNet": ["conv1.weight", "layer1.0.conv1.weight"]}.items():
        torch.save({"state_dict": dict.fromkeys(names, torch.zeros(1))}, path)
        if kind == "AlignTok":
            torch.save({name: {} for name in names}, path)
        error = error_of(load_encoder, str(path))
        assert kind.split(" (")[0] in error, (kind, error)
        assert kind == "SigLIP" or "is no DINOv2, SigLIP, MAE, DINO v1" in error, error
    torch.save({"fc.weight": torch.zeros(1)}, path)
    assert "(a plain ViT): names: fc.weight" in error_of(load_encoder, str(path))
    torch.save(renamed(small_tokenizer().encoder.state_dict(), TRANSFORMERS), path)
    assert "DINOv2" in error_of(load_tokenizer, path, VAE)
    assert "no Inception" in error_of(fid.load_inception, path)
    assert "no LightningDiT: its names are those of DINOv2" in error_of(sample.load_dit, path)
    assert "no VGG16" in error_of(files.load_lpips, path, path)


def test_fingerprint():
    """It is that of the latents: adapter and statistics change it, the decoder does not."""
    tok, seen = small_tokenizer(), []
    for part in (tok.decoder.conv_out.bias, tok.adapter.fc2.bias, tok.latent_std):
        seen.append(files.fingerprint(tok))
        part.add_(1)
    assert seen[0] == seen[1] and len({*seen, files.fingerprint(tok)}) == 3
    vae = frozen(VAE(DECODERS["tiny"]))
    before = files.fingerprint(vae)
    vae.post_quant_conv.bias.add_(1)  # a part of D
    assert files.fingerprint(vae) == before


def test_batched_array():
    """Filled batch by batch, over stops: what is there is not drawn again, and a batch is always
    whole. Never a half file under the final name; another recipe's is refused; damage is named."""
    values = np.random.default_rng(0).standard_normal((10, 2, 3)).astype(np.float16)

    def make(recipe="a", n=10, shape=(2, 3), **kw):
        return BatchedArray(path, n, shape, np.float16, {"tokenizer": recipe}, **kw)

    def fill(array, batch_size):
        for batch in array.missing(batch_size):
            array.write(batch, values[batch])

    with folder() as d:
        path = d / "a.npy"
        array = make()
        assert not array.complete
        assert array.missing(4) == [range(4), range(4, 8), range(8, 10)]
        array.write(range(4, 8), values[4:8])
        full = OSError(errno.ENOSPC, "No space left on device")
        with (patch.object(os, "fsync", side_effect=full),
              refused("No space", "000000000-000000004.npy", "make room")):
            array.write(range(4), values[:4])
        if files.fcntl:
            assert "another process is writing" in error_of(make)
        array.lock.close()  # a stop
        assert "(4, 2, 3), and float16 (4, 1, 3) is asked for" in error_of(
            lambda: make(shape=(1, 3)))
        for wrong, words in (({"recipe": "b"}, "tokenizer a -> b"), ({"n": 11}, "rows 10 -> 11")):
            with refused("a.npy", words):
                make(**wrong)

        array = make()
        assert array.missing(4) == [range(4), range(8, 10)]
        assert array.missing(2) == [range(2), range(2, 4), range(8, 10)]
        # whole batches, though rows 4 to 7 are there
        assert array.missing(3) == [range(3), range(3, 6), range(6, 9), range(9, 10)]
        fill(array, 3)
        assert array.missing(5) == [] and not path.exists()
        array.finish()
        assert (np.load(path) == values).all() and np.load(path).dtype == np.float16
        array.parts.mkdir()  # a kill just before the end leaves them
        (array.parts / "000000004-000000008.npy").touch()
        assert make().complete
        assert {p.name for p in d.iterdir()} == {"a.npy", "a.npy.json"}
        with patch.object(files, "lock", side_effect=AssertionError):  # many runs may read it at once
            assert make().complete and {p.name for p in d.iterdir()} == {"a.npy", "a.npy.json"}

        assert "tokenizer a -> b" in error_of(make, "b")
        (d / "a.npy.json").rename(d / "b")
        with refused("a.npy was not made by this script"):  # it is the user's own
            make("b", overwrite=True)
        (d / "b").rename(d / "a.npy.json")
        array = make("b", overwrite=True)
        assert not array.complete and not path.exists() and len(array.missing(4)) == 3
        fill(array, 4)
        (array.parts / "000000004-000000008.npy").write_bytes(b"half")
        with refused("000000004-000000008.npy", "delete it"):
            array.finish()
        array.lock.close()
        (d / "a.npy.json").write_bytes(b"half")
        assert "a.npy.json" in error_of(make, "b")


def test_batched_array_of_two_ranks():
    """The ranks take turns with the batches; rank 0 packs them, here as an npz."""
    values, arrays = np.arange(10), []
    with folder() as d, patch.object(files, "dist") as dist:
        dist.get_world_size.return_value = 2
        for rank in (0, 1):
            dist.get_rank.return_value = rank
            arrays.append(BatchedArray(d / "a.npz", 10, (), values.dtype, {}))
        batches = [array.missing(3) for array in arrays]
        assert batches == [[range(3), range(6, 9)], [range(3, 6), range(9, 10)]]
        for array, own in ((arrays[1], batches[1]), (arrays[0], batches[0])):
            for batch in own:
                array.write(batch, values[batch])
            array.finish()
        assert (np.load(d / "a.npz")["arr_0"] == values).all()


# ------------------------------------------------------------------------------------------ runs.py

def test_run_folder():
    """log.csv has its header and whole rows whatever a kill left; two checkpoints stay; a damaged
    one does not serve. Weights that are not finite are not saved."""
    row, linear = {"stage": 1, "loss": 1 / 3}, torch.nn.Linear(2, 2)
    linear.arguments = {}
    adam = torch.optim.Adam(linear.parameters())
    s = SimpleNamespace(prefix="a", recipe={}, may_change=(), step=0, steps=9, log_every=1,
                        meter=runs.Meter(CPU), classes=[], networks={"linear": linear},
                        optimisers={"adam": adam})
    with folder() as d:
        d /= "a[1-3]"  # no pattern
        d.mkdir()
        (d / ".a_step00000009.pt.part").write_bytes(b"half")
        log = d / "log.csv"
        log.touch()
        with runs.Run(d, 0, ["stage", "step", "loss"]) as run:
            run.resume(s, (1,))
            for s.step in range(1, 5):
                run.log(row | {"step": s.step})
                run.save(s)
            s.step = 5
            torch.nn.init.constant_(linear.bias, math.nan)
            with refused("weights are not finite", "a_step00000004.pt"):
                run.save(s)
            with open(log, "a") as f:
                f.write("1,1")  # cut by a kill
            run.rewind_log(2, 9, 1, (1,))
            assert log.read_bytes() == b"stage,step,loss\n1,1,0.333333\n1,2,0.333333\n"
            run.rewind_log(2, 9, 4, (1,))  # the meter of step 2 counts both again
            assert log.read_bytes() == b"stage,step,loss\n"
        (d / "a_step00000004.pt").write_bytes(b"half")
        save_checkpoint(d / "a_step00000005.pt", {"step": 5})
        with runs.Run(d, 0, ["stage", "step", "loss"]) as run:
            run.resume(s, (1,))
            assert s.step == 3 and linear.bias.isfinite().all() and run.last_good("b") == "none"
            assert run.last_good("a").name == "a_step00000003.pt"
            s.recipe = {"lr": 1}
            assert "lr None -> 1" in error_of(run.resume, s)
        with runs.Run(d, 0, []) as run:
            assert "other columns" in error_of(run.rewind_log, 0, 9, 1)
        checkpoints = {f"a_step0000000{i}.pt" for i in (3, 4, 5)}
        assert {p.name for p in d.iterdir()} == {".lock", "log.csv", *checkpoints}
        others = {"a_step.pt", "a_stepped.png", "a_step00000003.txt", "b_step00000003.pt", "aa.pt"}
        for name in (*others, "a_step00000003.png"):
            (d / name).touch()
        with runs.Run(d, 0, ["stage", "step", "loss"]) as run:
            assert [p.name for p in run.checkpoints("a")] == sorted(checkpoints)
            for content in ({"state_dict": {}}, {"recipe": "a user's"}):
                save_checkpoint(d / "a.pt", content)
                assert "a.pt was not made by this script" in error_of(run.forget, "a")
            (d / "a.pt").write_bytes(b"half")
            assert "a.pt (damaged" in error_of(run.forget, "a") and "delete it" in error_of(
                run.forget, "a")
            save_checkpoint(d / "a.pt", {"recipe": {}})
            run.forget("a")
        assert {p.name for p in d.iterdir()} == {".lock", "log.csv", *others}
        for content, stays in ((log.read_bytes(), False), (b"step,loss\n1,2\n", False),
                               (b"date,expense\n", True), (b"\xff\xfe", True)):
            log.write_bytes(content)
            with runs.Run(d, 0, ["stage", "step", "align"]) as run:
                run.forget("a")
            assert log.exists() == stays, "ours, with other columns, goes"


def test_time_left():
    """At the rate of the steps since the start of this process, resumed or not."""
    with patch.object(runs.time, "monotonic", lambda: 160.0):
        assert runs.time_left(100.0, 30, 45) == "01:30 left"
    d = TMP / "time-left"
    for steps, expected in ((2, [(1, 6), (2, 5)]), (4, [(1, 6), (2, 5)])):
        s = SimpleNamespace(prefix="a", step=steps - 2, steps=steps, shown=(), meter=Mock())
        args = SimpleNamespace(log_every=1, grid_every=9, save_every=9)
        with runs.Run(d, 0, ["step"]) as run, recorded(runs, "time_left") as times:
            run.later = 5
            with patch.object(run, "save"):
                for _ in run.steps(s, args, dict, lambda path: None):
                    pass
        assert [call[0][1:] for call in times] == expected


def test_meter():
    """Means over the steps since the last reset, also through a checkpoint; the first step whose
    loss was not finite."""
    meter, run = runs.Meter(CPU), SimpleNamespace(last_good=lambda _: "none")
    for step, loss, more in ((1, 2.0, {}), (2, 4.0, {"gan": torch.tensor(5.0)}), (3, 9.0, {})):
        meter.add(step, {"loss": torch.tensor(loss)} | more)
    again = runs.Meter(CPU)
    again.load(json.loads(json.dumps(meter.state())))
    assert meter.average() == again.average() == {"loss": 5, "gan": 5}
    meter.reset()
    meter.check(run, "a")
    for step, loss in ((4, 1.0), (5, math.nan), (6, 1.0), (7, math.inf)):
        meter.add(step, {"loss": torch.tensor(loss)})
    assert "since step 5;" in error_of(meter.check, run, "a")
    assert [step for step in range(1, 6) if runs.due(step, 2, 5)] == [2, 4, 5]


def test_dtype():
    """--dtype is autocast's; auto takes bf16 where it is native. On GPUs fp32 has no TF32."""
    tf32 = torch.backends.cuda.matmul, torch.backends.cudnn
    for backend in tf32:
        backend.allow_tf32 = True
    runs.setup_ranks()
    assert not any(backend.allow_tf32 for backend in tf32)
    x = torch.ones(2, 2)
    for native in (True, False):
        with patch.object(torch.cpu, "get_capabilities", create=True,
                          return_value={"avx512_bf16": native}):
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16),
                                ("auto", torch.bfloat16 if native else torch.float32)):
                assert runs.autocast_dtype(name, CPU) == dtype
                with runs.autocast(CPU, dtype):
                    assert (x @ x).dtype == dtype


def test_arguments():
    """The types of arguments take what they say; a bad flag is one line; --preset fills gaps."""
    for name, good, bad in (("count", "1 20", "0 -1 1.5"), ("index", "0 7", "-1 x"),
                            ("positive", "1e-9 inf", "0 -1 nan"), ("weight", "0 2.5", "-1 inf nan"),
                            ("fraction", "0 0.999", "1 -0.1 nan")):
        parser = runs.Parser("")
        parser.add_argument("--x", type=getattr(runs, name))
        for text in good.split():
            assert parser.parse_args([f"--x={text}"]).x == float(text)
        for text in bad.split():
            with refused("--x", text, "(see --help)"):
                parser.parse_args([f"--x={text}"])
    parser = runs.Parser("")
    parser.training_flags()
    presets = {"a": {"size": 16, "steps": 9, "workers": 8}, "paper": {"size": 256, "steps": 90}}
    args = parser.fill(["--preset", "a", "--steps", "3", "--batch-size", "8", "--accum", "3",
                        "--workers", "0"], presets)
    assert (args.size, args.steps, args.workers) == (16, 3, 0)
    assert args.given == {"steps", "workers"}
    assert "--batch-size 8 does not split" in error_of(runs.check_batch_size, args, 2)


def test_launchers():
    """One process without any; all variables of torchrun; half of them, or several processes
    without them, are one line that says what is missing and how to launch."""
    five = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "1")
    for variables, expected in (
            ({}, False), ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, False), (five, True),
            (five | {"SLURM_NTASKS": "8"}, True), ({"SLURM_NTASKS": "1"}, False),
            ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),
            ({"LOCAL_RANK": "0"}, ("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing",
                                   "torchrun --standalone --nproc_per_node")),
            ({"RANK": "1"}, ("LOCAL_RANK, WORLD_SIZE", "torchrun --standalone")),
            ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, ("8 processes", "srun", "torchrun"))):
        with patch.dict(os.environ, variables, clear=True):
            if isinstance(expected, bool):
                assert runs.under_torchrun() == expected, variables
            else:
                with refused(*expected):
                    runs.setup_ranks()


def test_locks():
    """One process at a time; where the system has no locks it goes on, and says so once."""
    with folder() as d:
        path, said = d / ".lock", io.StringIO()
        if files.fcntl:
            with files.lock(path, ""), refused("held"), files.lock(path, "held"):
                pass
        for number in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO):
            error = OSError(number, os.strerror(number))
            system = SimpleNamespace(flock=Mock(side_effect=error), LOCK_EX=0, LOCK_NB=0)
            with patch.object(files, "fcntl", system), contextlib.redirect_stderr(said):
                files.warn_of_locks.cache_clear()
                if number == errno.EIO:
                    assert "cannot write" in error_of(runs.Run, d, 0, [])
                    continue
                for _ in range(2):
                    with runs.Run(d, 0, []) as run:
                        run.rewind_log(0, 1, 1)
        assert said.getvalue().count("no locks here") == 3


def test_home():
    """~ in any path is the user's folder, also where the shell leaves it."""
    parser = runs.Parser("")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--out")
    args = parser.parse_args(["--out=~/x", "~/a", "b~"])
    home = os.path.expanduser("~")
    assert (args.out, args.paths) == (f"{home}/x", [f"{home}/a", "b~"])


def test_launch():
    """A user's mistake is one line and status 1; a mistake of ours is a traceback."""
    no_compiler = "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found"
    for error, says in ((UserError("a\nb"), SystemExit("error: a b")),
                        (RuntimeError(no_compiler), SystemExit("No working C++ compiler found")),
                        (RuntimeError("CalledProcessError: ptxas, no success"), RuntimeError("ptxas")),
                        (RuntimeError("raised:\nTritonMissing: Cannot find a working triton"),
                         SystemExit("error: --compile")),
                        (torch.OutOfMemoryError("CUDA out of memory.\nTried"),
                         SystemExit("error: out of GPU memory (--accum")),
                        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
                         SystemExit("error: out of GPU memory (--accum")),
                        (torch.distributed.DistBackendError(
                            "NCCL error\nLast error:\nCuda failure 2 'out of memory'"),
                         SystemExit("error: out of GPU memory (--accum")),
                        (torch.distributed.DistBackendError("NCCL\nerror"),
                         SystemExit("error: another rank has stopped, or the network")),
                        (PermissionError(errno.EACCES, "Permission denied", "a/val"),
                         SystemExit("error: Permission denied: a/val")),
                        (OSError(errno.ENOSPC, "No space left"), SystemExit("error: No space left")),
                        (MemoryError(), SystemExit("error: out of memory")),
                        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                         SystemExit("error: out of memory (fewer images")),
                        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nunable to "
                                      "allocate shared memory(shm) for file </torch_1>: No space left "
                                      "on device (28)"), SystemExit("error: No space left on device (")),
                        (KeyboardInterrupt(), SystemExit("error: interrupted")),
                        (RuntimeError("ours"), RuntimeError("ours"))):
        with refused(str(says), kind=type(says)), patch.object(sample, "main", side_effect=error):
            runs.launch(sample.main)


def test_compiled_by_default():
    """On GPUs, and not in the preset tiny, unless a flag says so."""
    for flags, cpu, cuda in ((["--preset", "tiny"], False, False), ([], False, True),
                             (["--preset", "tiny", "--compile"], True, True),
                             (["--no-compile"], False, False)):
        for script in (tt, train_dit, sample):
            args = script.parse(flags)
            found = [runs.compiles(args, torch.device(name)) for name in ("cpu", "cuda")]
            assert found == [cpu, cuda], (script, flags)


def test_compiled_under_ddp():
    """A block is one graph, under DDP too, whose buckets would cut it."""
    backend = Mock(side_effect=lambda graph, _: graph.forward)
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dit = small_dit()
        with patch("torch.compile", partial(torch.compile, backend=backend)):
            runs.make_fast(dit, SimpleNamespace(compile=True, checkpointing=False), CPU)
        ddp = runs.wrap(dit, CPU)
        ddp.bucket_bytes_cap = 1000
        with patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):
            ddp(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 5]))
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert backend.call_count == 1, backend.call_count


def test_checkpointing_changes_no_gradient():
    """--checkpointing keeps less than half for the backward pass, and changes no bit."""
    def gradients(net, *inputs):
        kept, hooks = [], torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = net(*inputs)
        net.zero_grad()
        (out if torch.is_tensor(out) else out[0]).square().mean().backward()
        trained = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
        return trained, sum(kept)

    x = torch.rand(2, 3, 32, 32)
    for net, *inputs in (
            (Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]), x),
            (VAE(DECODERS["tiny"]), x, torch.randn(2, 32, 2, 2)),
            (small_dit(), torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 5])),
            (MMDiT(**SMALL_MMDIT), torch.randn(2, 3, 4, 4), torch.rand(2),
             torch.randn(2, 4 * 5 + 7))):
        random_weights(net).train()
        runs.fast_weight_gradients(net)
        plain, kept = gradients(net, *inputs)
        runs.make_fast(net, SimpleNamespace(compile=False, checkpointing=True), CPU,
                       mmdit.DoubleBlock, mmdit.SingleBlock)
        again, kept_now = gradients(net, *inputs)
        assert same(plain, again) is None and kept_now < 0.5 * kept, (kept_now, kept)


def test_weight_gradients_by_taps():
    """Where AVX2 is all there is, the gradients of convolutions are those of autograd: for every
    kernel, stride and padding, whole and in blocks of rows, for what is frozen too."""
    for kernel, stride, padding, block in (
            ((3, 3), (1, 1), (1, 1), 2 ** 19), ((3, 3), (1, 1), (1, 1), 2 * 2 * 9 * 64),
            ((4, 4), (2, 2), (1, 1), 1), ((3, 3), (2, 2), (0, 0), 2 * 2 * 4 * 64),
            ((3, 2), (2, 1), (1, 0), 1), ((1, 1), (1, 1), (0, 0), 1)):
        conv = torch.nn.Conv2d(64, 65, kernel, stride, padding).double()
        x = torch.randn(2, 64, 7, 9).double().requires_grad_()
        inputs = (x, *conv.parameters())
        plain = torch.autograd.grad(conv(x).sin().sum(), inputs)
        with patch("torch.backends.cpu.get_cpu_capability", lambda: "AVX2"):
            runs.fast_weight_gradients(conv)
        with patch.object(runs.TapConvolution, "block", block):
            found = torch.autograd.grad(conv(x).sin().sum(), inputs)
        for a, b in zip(plain, found):
            assert torch.allclose(a, b), (kernel, stride, padding)
        assert type(conv(x).grad_fn).__name__ == "TapConvolutionBackward"
        conv.requires_grad_(False)
        assert torch.allclose(torch.autograd.grad(conv(x).sin().sum(), x)[0], plain[0])
    depthwise = torch.nn.Conv2d(64, 64, 3, groups=64)
    with patch("torch.backends.cpu.get_cpu_capability", lambda: "AVX2"):
        runs.fast_weight_gradients(depthwise)
    y = depthwise(torch.ones(1, 64, 3, 3))
    assert type(y.grad_fn).__name__ != "TapConvolutionBackward"


# ------------------------------------------------------------------------------- train_tokenizer.py

def stage_by_hand(tokenizer, discriminator, reference=None):
    """(s, args): what training_step reads of a stage, without a run around it."""
    args = tt.parse(["--preset", "tiny"])
    s = SimpleNamespace(tokenizer=tokenizer, ddp_tokenizer=tokenizer, lpips=None,
                        reference=reference,
                        discriminator=discriminator, ddp_discriminator=discriminator,
                        autocast=contextlib.nullcontext)
    s.objective = functools.partial(tt.aligntok_objective, s, args)
    return s, args


def losses_by_hand(net, d, reference, x, noise, gan, sp):
    """The paper's sums for one micro-batch, with the weights of test_steps_against_autograd: (G's
    loss, D's loss, what is logged). d: D, for G's loss and for its own. sp: "", or L_sp's kind."""
    def adaptive(other, layer):
        a, b = (torch.autograd.grad(f, layer, retain_graph=True)[0].norm() for f in (rec, other))
        return a / (b + 1e-4)

    def cosine(a, b, dim):
        return (a * b).sum(dim) / a.norm(dim=dim) / b.norm(dim=dim)

    if noise:  # a VAE's
        mean, logvar = net.quant_conv(net.encoder(x)).chunk(2, dim=1)
        z = mean + (logvar / 2).exp() * noise[0]
        recon = net.decode(z)
    else:
        recon, z0, tokens = net(x)
    l1, perceptual = (x - recon).abs().mean(), Perceptual()(x, recon).mean()
    rec = loss = l1 + 0.6 * perceptual
    log, d_loss = {"l1": l1, "perceptual": perceptual, "rec": rec}, None
    if gan:
        g_loss, real, fake = -d[0](recon).mean(), d[1](x), d[1](recon.detach())
        w_g = adaptive(g_loss, net.decoder.conv_out.weight)
        loss = loss + 0.7 * w_g * g_loss
        d_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        log |= {"g_loss": g_loss, "adaptive": w_g, "d_loss": d_loss,
                "d_real": (real > 0).float().mean(), "d_fake": (fake < 0).float().mean()}
    if noise:
        log["kl"] = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        loss = loss + 50 / (3 * 32 * 32) * log["kl"]
    if noise and reference:  # VA-VAE's
        f, p = reference.features(x), net.linear_proj(z).flatten(2).transpose(1, 2)
        of_p, of_f = (cosine(a[:, :, None], a[:, None], 3) for a in (p, f))
        vf = F.relu(1 - 0.1 - cosine(p, f, 2)).mean() + F.relu((of_p - of_f).abs() - 0.2).mean()
        log |= {"vf": vf, "vf_adaptive": adaptive(vf, net.encoder.conv_out.weight)}
        loss = loss + 0.4 * log["vf_adaptive"] * vf
    if sp:
        a, b, dim = z0, reference.encode(x), 1
        if "tokens" in sp:
            a, b, dim = tokens, reference.features(x), 2
        log["sp"] = 1 - cosine(a, b, dim).mean() if "cosine" in sp else (a - b).square().mean()
        loss = loss + 30 * log["sp"]
        if sp == "l2":
            log["sp_to_var"] = log["sp"] / reference.latent_std.square().mean()
    return loss, d_loss, log


def check_adam(network, key, name, rates, before, after):
    """A step of Adam (.5, .9) between two checkpoints: of the gradients that a network holds, with
    moments, rates (of its parts, "": of the rest) and weights by the formula."""
    trained = {k: p.grad for k, p in network.named_parameters() if p.requires_grad}
    states = [list(content[key]["state"].values()) for content in (before, after)]
    assert len(trained) == len(states[0]) == len(states[1])
    off, whole = {}, {}
    for (k, g), old, new in zip(trained.items(), *states):
        m, v, n, part = new["exp_avg"], new["exp_avg_sq"], new["step"], k.split(".")[0]
        found = (m - 0.5 * old["exp_avg"]) / 0.5
        square = 0.9 * old["exp_avg_sq"] + 0.1 * found.square()
        assert (v - square).norm() <= 1e-4 * square.norm(), k
        moved = after[name][k] - before[name][k]
        rate = rates.get(part, rates[""])
        by_hand = -rate * m / (1 - 0.5 ** n) / ((v / (1 - 0.9 ** n)).sqrt() + 1e-8)
        assert (moved - by_hand).abs().max() < 1e-3 * rate, k
        off[part] = off.get(part, 0) + (found - g).square().sum()
        whole[part] = whole.get(part, 0) + g.square().sum()
    for part, square in off.items():
        assert square < 1e-5 * whole[part], (part, square / whole[part])


def test_steps_against_autograd():
    """The second step of each stage, ablation and baseline, as the script makes it with numbers of
    its own: gradients, Adam, EMA and log, against plain autograd of the paper's sums."""
    common = "--steps 2 --accum 2 --save-every 1 --seed 3 --w-p 0.6 --w-g 0.7 --w-kl 50 --w-sp 30 "
    common += "--lr 1e-3 --encoder-lr 5e-4 --ema-decay 0.75"
    foundation = frozen(DINOv2(dim=64, depth=1, grid=4))
    with (folder() as d, patch.object(tt, "load_lpips", lambda *_: (Perceptual(), None)),
          patch.dict(DECODERS, tiny=DECODERS["tiny"] | {"ch": 8}),
          patch.object(tt, "linear_probe", lambda *_: 0.0),
          patch("torch.compile", side_effect=lambda f, **_: f) as compiled,
          recorded(runs, "checkpoint_activations") as checkpointed):
        torch.save(foundation.state_dict(), d / "e_p.pth")
        encoder = f"--encoder {d}/e_p.pth"
        two = f"{encoder} --init {d}/stage1/stage1.pt --stage 2"
        for name, trains, gan, sp, own in (  # what trains, with the GAN or without, L_sp's kind
                ("stage1", "adapter decoder", 0, "",
                 f"{encoder} --stage 1 --disc-start 99 --lr 2e-3"),
                ("stage2", "encoder adapter decoder", 1, "l2", f"{two} --disc-start 2"),
                ("cosine", "encoder adapter decoder", 1, "cosine", f"{two} --sp-loss cosine"),
                ("tokens", "encoder adapter decoder", 1, "tokens cosine",
                 f"{two} --sp-loss cosine --sp-at encoder"),
                ("stage3", "decoder", 1, "",
                 f"{encoder} --init {d}/stage2/stage2.pt --stage 3"),
                ("vae", "encoder quant_conv post_quant_conv decoder", 0, "",
                 "--model vae --w-g 0 --compile --checkpointing"),
                ("vavae", "encoder quant_conv post_quant_conv decoder linear_proj", 1, "",
                 f"{encoder} --model vavae --w-vf 0.4 --vf-margins 0.1 0.2")):
            with (recorded(tt, "training_step") as micro_batches,
                  recorded(tt, "train_stage") as stages):
                execute(tt, *PLAIN, *common.split(), *own.split(), "--out", d / name)
            assert len({x.mean().item() for (x, *_), _ in micro_batches}) == 4, "each other images"
            for (x, noise, *_), _ in micro_batches:
                assert len(x) == 2 and (not noise or noise[0].shape == (2, 32, 2, 2))
            assert [part.split for part in stages[0][0][3:5]] == ["train", "val"]
            before, after = map(load_file, sorted((d / name).glob("*_step*.pt")))

            net = (VAE if "vae" in name else Tokenizer)(**before["arguments"])
            net.load_state_dict(before["tokenizer"])
            for part in frozen(net).children():
                part.requires_grad_(part in [getattr(net, k) for k in trains.split()])
            if sp:
                net.encoder.mask_token.requires_grad_(False)  # no forward reads it
            reference = foundation if name == "vavae" else None
            if sp:
                reference = frozen(load_tokenizer(d / "stage1" / "stage1.pt"))
            discriminators, logs = [losses.PatchGAN(16) for _ in range(2)], []
            for discriminator in discriminators:
                discriminator.load_state_dict(before["discriminator"])
            for (x, noise, *_), _ in micro_batches[2:]:
                loss, d_loss, log = losses_by_hand(
                    net, discriminators, reference, x, noise, gan, sp)
                (loss / 2).backward()
                if gan:
                    (d_loss / 2).backward()
                logs.append(log)

            if "init" in own:  # nothing is drawn again: the first step moves a weight by a rate
                start = load_file(own.split()[3])
                for part in ("tokenizer", "discriminator"):
                    for k, p in start[part].items():
                        moved = (before[part][k] - p).abs().max()
                        assert moved < 4e-3 or "running" in k or "num_" in k, (name, k)
                for k, p in net.named_parameters():
                    by_hand = 0.75 * start["tokenizer"][k] + 0.25 * before["tokenizer"][k]
                    assert torch.allclose(before["ema"][k], by_hand, atol=1e-6), k
            rates = {"": 2e-3 if name == "stage1" else 1e-3} | ({"encoder": 5e-4} if sp else {})
            check_adam(net, "opt_g", "tokenizer", rates, before, after)
            if gan:
                check_adam(discriminators[1], "opt_d", "discriminator", {"": 1e-3}, before, after)
            else:
                assert same(before["discriminator"], after["discriminator"]) is None
            assert ("ema" in after) == (name != "stage1")
            for k, p in net.named_parameters():
                assert p.requires_grad or torch.equal(after["tokenizer"][k], p), k
                if "ema" in after:
                    by_hand = 0.75 * before["ema"][k] + 0.25 * after["tokenizer"][k]
                    assert torch.allclose(after["ema"][k], by_hand, atol=1e-6), k
            row = rows_of(d / name)[1]
            assert {k for k, v in row.items() if v} == {"stage", "step", *logs[0]}, name
            for k in logs[0]:
                mean = (logs[0][k] + logs[1][k]).item() / 2
                assert math.isclose(float(row[k]), mean, rel_tol=1e-4, abs_tol=1e-7), (name, k)
    blocks, = (call[0][0] for call in checkpointed)  # the VAE's alone, each compiled
    distance, *parts = [call[0][0].__name__ for call in compiled.call_args_list]
    assert distance == "distance" and parts == ["forward"] * len(blocks) and len(blocks) > 10


class Brightness(torch.nn.Module):
    """A discriminator that knows: x is 1 everywhere, its reconstruction is not."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x.mean((1, 2, 3)) - 0.9 + 0 * self.unused


def test_a_collapsed_discriminator_shows_in_the_log():
    """One answer for every image: it is right on the real or on the fake ones, and the adaptive
    weight is at its clamp. One that tells them apart is right on both."""
    def logged(discriminator):
        s, args = stage_by_hand(tok, discriminator)
        log = tt.training_step(torch.ones(2, 3, 32, 32), [], s, args, gan=True, last=True)
        return [log[k].item() for k in ("d_real", "d_fake", "adaptive")]

    tok, collapsed = Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]), losses.PatchGAN(16)
    torch.nn.init.zeros_(collapsed.main[-1].weight)
    for bias, right in ((0.5, [1, 0]), (-0.5, [0, 1])):
        torch.nn.init.constant_(collapsed.main[-1].bias, bias)
        assert logged(collapsed) == [*right, 1e4]
    *right, adaptive = logged(Brightness())
    assert right == [1, 1] and 0 < adaptive < 1e4

    s, args = stage_by_hand(tok, None)  # the weight of another term is at the limit of its own
    recon, layer = tok(torch.ones(1, 3, 32, 32))[0], tok.decoder.conv_in.weight
    s.objective = lambda x: (x, recon, {"term": (1.0, 0 * recon.sum(), layer, 5.0)})
    log = tt.training_step(torch.ones(1, 3, 32, 32), [], s, args, gan=False, last=True)
    assert log["term_adaptive"] == 5


def test_warnings_of_the_gan():
    """A discriminator that has collapsed or won, and an adaptive weight at its limit, are named
    once, after three such rows of the log; the rows of a healthy run are not."""
    s = SimpleNamespace(prefix="stage1", rows_with={}, step=0)
    healthy = {"d_real": 0.6, "d_fake": 0.5, "d_loss": 1.0, "adaptive": 0.3}
    won, limit = {"d_real": 1.0, "d_fake": 1.0, "d_loss": 0.0}, {"adaptive": 1e4}
    a, b, zero = ({"d_real": x, "d_fake": y} for x, y in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        for row in ({}, {"d_real": 0.95, "d_fake": 0.9, "d_loss": 0.1}, won, won, {},
                    won, won, won, won, a, b, zero, {}, a, a, a, {"adaptive": 900.0},
                    limit, limit, limit, limit):
            s.step += 1
            tt.warn_of_gan(s, healthy | row)
        tt.warn_of_gan(s, {"rec": 0.5})  # the GAN is off
    for line, words in zip(said.getvalue().splitlines(), (
            "step 8: the discriminator has won", "step 12: the discriminator has collapsed",
            "step 20: the adaptive weight"), strict=True):
        assert words in line, line

    def constant(self, x):
        return 0 * (x.mean() + self.main[0].weight.mean()).expand(len(x))

    with (patch.object(losses.PatchGAN, "forward", constant),
          contextlib.redirect_stderr(io.StringIO()) as said):
        execute(tt, *SMALL, "--stage", 1, "--steps", 4, "--out", TMP / "collapsed")
    assert said.getvalue().count("step 3: the discriminator has collapsed") == 1, said.getvalue()


def test_stages_train_what_they_say():
    """Which parts each stage changes; D goes on through all; a stage's result is its EMA; stage 3
    leaves the latents alone; a tokenizer's file needs nothing else."""
    def changed(a, b):
        return {k.split(".")[0] for k in a
                if not k.startswith("latent_") and not torch.equal(a[k], b[k])}

    out = small_run()
    finals = [load_file(out / f"stage{n}.pt") for n in (1, 2, 3)]
    one, two, three = (final["tokenizer"] for final in finals)
    assert all(final["classes"] == Shapes(n=1).classes for final in finals)
    torch.manual_seed(int(data.rng(0, "encoder").integers(2 ** 62)))
    begin = load_encoder("random:tiny14")[0].state_dict()
    assert not changed({f"encoder.{k}": v for k, v in begin.items()}, one), "E_p is frozen"
    assert changed(one, two) == {"encoder", "adapter", "decoder"}
    assert changed(two, three) == {"decoder"}
    assert torch.equal(one["encoder.mask_token"], two["encoder.mask_token"])
    d = [final["discriminator"] for final in finals]
    assert same(d[0], d[1]) and same(d[1], d[2]), "D trains in every stage"
    steps = [final["opt_d"]["state"][0]["step"].item() for final in finals]
    assert steps == [2, 4, 6], "and goes on, with its optimiser"

    raw = load_file(out / "stage2_step00000002.pt")
    assert not changed(raw["ema"], two), "the stage's result is its EMA"

    rows = rows_of(out)
    steps = [(stage, step) for stage in "123" for step in "12"]
    assert [(row["stage"], row["step"]) for row in rows] == steps
    assert float(rows[2]["sp"]) < 1e-8 < float(rows[3]["sp"])  # it starts where stage 1 ended
    assert not rows[0]["sp"]
    second, third = (load_tokenizer(out / f"stage{n}.pt") for n in (2, 3))
    assert files.fingerprint(second) == files.fingerprint(third)
    assert third.latent_std.min() > 0 and not third.training
    assert Image.open(out / "stage2_step00000002.png").size == (8 * 32, 64)


def test_stages_on_other_encoders():
    """MAE and SigLIP2 in DINOv2's place: the image stays as it is, one token for 16 px; what stage
    2 leaves alone; the tokenizer is rebuilt from its file."""
    rows = {f"{family}-mini": {"family": family, "dim": 64, "depth": 1, "patch": 16, "grid": 3}
            for family in ("mae", "siglip")}
    with (patch.dict(ENCODERS, rows), folder() as d, patch.object(tt, "linear_probe", lambda *_: 0),
          patch.dict(DECODERS, tiny=DECODERS["tiny"] | {"ch": 16})):
        for name, still in {"mae-mini": {"pos_embed"}, "siglip-mini": {
                k for k in SigLIP(64, 1, grid=3).state_dict() if ".head." in k}}.items():
            out = d / name
            execute(tt, *SMALL, "--encoder", f"random:{name}", "--steps", 1, "--out", out)
            one, two, three = (load_file(out / f"stage{n}.pt")["tokenizer"] for n in (1, 2, 3))
            stay = {k for k in one if "encoder." in k and torch.equal(one[k], two[k])}
            stay -= {k for k in stay if "k_proj.bias" in k}  # softmax does not see it
            assert stay == {f"encoder.{k}" for k in still}, (name, stay)
            assert all(torch.equal(two[k], three[k]) for k in two if "encoder." in k)
            tok = load_tokenizer(out / "stage3.pt")
            with recorded(tok.encoder, "embed") as calls:
                assert tok.encode(torch.zeros(1, 3, 48, 64)).shape == (1, 32, 3, 4)
            assert calls[0][0][0].shape == (1, 3, 48, 64)


def test_lora():
    """--lora: stage 2 trains two factors of each linear map in E_p's blocks and nothing else of it;
    step 0 is stage 1; an exact resume; the result, merged, is an ordinary tokenizer."""
    tok, x = small_tokenizer(), torch.rand(2, 3, 32, 32) * 2 - 1
    begin, before = copy.deepcopy(tok.state_dict()), tok.encode(x)
    model.add_lora(tok.encoder, 2)
    assert torch.equal(tok.encode(x), before), "B is zero"
    factors = {k: p for k, p in tok.encoder.named_parameters() if p.requires_grad}
    assert factors.keys() == {f"blocks.0.{m}.{k}" for k in "AB" for m in (
        "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    random_weights(tok)
    A, B = (factors[f"blocks.0.attn.qkv.{k}"].detach() for k in "AB")
    assert A.shape == (2, 64) and B.shape == (192, 2)
    with torch.no_grad():
        unmerged, by_hand = tok.encode(x), begin["encoder.blocks.0.attn.qkv.weight"] + B @ A
    model.merge_lora(tok.encoder)
    with torch.no_grad():
        assert (tok.encode(x) - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
    assert torch.allclose(tok.encoder.blocks[0].attn.qkv.weight, by_hand, atol=1e-6)
    assert tok.state_dict().keys() == begin.keys()
    assert not torch.allclose(unmerged, before, atol=1e-2)

    with patch.object(tt, "linear_probe", lambda *_: 0), folder() as d:
        flags = [*SMALL, "--stage", 2, "--init", small_run() / "stage1.pt", "--lora", 3]
        execute(tt, *flags, "--steps", 3, "--out", d / "a")
        for steps in (1, 3):
            execute(tt, *flags, "--steps", steps, "--save-every", 1, "--out", d / "b")
        assert same(*(load_file(d / out / "stage2.pt") for out in "ab")) is None
        steps = [load_file(d / "b" / f"stage2_step{n:08d}.pt") for n in (2, 3)]
        moved = {k for k, v in steps[1]["tokenizer"].items()
                 if "encoder." in k and not torch.equal(v, steps[0]["tokenizer"][k])}
        assert len(moved) == 2 * 4 * 4 and all(k[-2:] in (".A", ".B") for k in moved), moved
        one, two = load_tokenizer(small_run() / "stage1.pt"), load_tokenizer(d / "a" / "stage2.pt")
        ema = steps[1]["ema"]
        for k, v in two.encoder.state_dict().items():
            name = f"encoder.{k.removesuffix('weight')}"
            delta = ema[f"{name}B"] @ ema[f"{name}A"] if f"{name}A" in ema else 0 * v
            moved = v - one.encoder.state_dict()[k]
            assert torch.allclose(moved, delta, atol=1e-7), k
        with refused("lora 3 -> None"):
            execute(tt, *flags[:-2], "--steps", 4, "--out", d / "b")
        both = tt.parse(["--preset", "tiny", "--lora", "3"])  # stages 1 and 3 do not know of it
        assert [tt.of_stage(both, n).lora for n in (1, 2, 3)] == [None, 3, None]
        for more in (["--stage", 1], ["--stage", 3], ["--model", "vae"], ["--model", "vfmvae"]):
            with refused("--lora goes with --stage 2"):
                execute(tt, *SMALL, "--lora", 3, *more, "--out", d / "none")


def test_story():
    """Rows: originals, then each stage's last grid. Curves: held-out figures of the result on a
    quarter of the images, with a probe of a sixteenth of the training ones. held_out.csv holds
    them; measured again, a step's figures replace its row and the later ones."""
    out = small_run()
    picture, k = Image.open(out / "story.png"), story.SIDE
    for i, (stage, row) in enumerate([("1", 0), ("1", 1), ("2", 1), ("3", 1)]):
        grid = Image.open(out / f"stage{stage}_step00000002.png").crop(
            (0, 32 * row, 256, 32 * row + 32)).resize((8 * k, k), Image.BICUBIC)
        top = story.GAP + i * (k + story.GAP)
        part = picture.crop((story.GUTTER, top, story.GUTTER + 8 * k, top + k))
        assert np.array_equal(part, grid), (stage, row)

    with open(out / "held_out.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(row["stage"], row["begins"], row["steps"]) for row in rows] == [
        ("stage1", "0", "2"), ("stage2", "2", "4"), ("stage3", "4", "6")]
    tok = frozen(load_tokenizer(out / "stage3.pt"))
    x = data.to_tensor(torch.stack([data.Crops(Shapes("val", n=24, size=32), 32)[item][0]
                                    for item in data.at_random(6, 6, 24)[0]]))
    psnr = 10 * torch.log10(4 / (x - tok.decode(tok.encode(x)).clamp(-1, 1)).square().mean((1, 2, 3)))
    close(float(rows[2]["psnr"]), psnr.mean().item(), 1e-4)
    train, val = (fid.encode_images(tok, Shapes(split, n=n, size=32), 32, few, 0, CPU)
                  for split, n, few in (("train", 8192, 3), ("val", 24, 6)))
    probe = fid.linear_probe(train.latents, train.labels, val.latents, val.labels)
    close(float(rows[2]["probe"]), probe, 1e-4)

    with folder() as d:
        for stage, begins, steps, figures in (
                ("stage1", 5, 10, (9, 50)), ("strong", 20, 30, (20, 60)),
                ("strong", 20, 40, (29, 70)), ("vae", 12, 30, (19, math.nan))):
            path = d / f"{stage}_step000000{steps}.png"
            Image.new("RGB", (512, 512), "red").save(path)
            with recorded(story, "chart") as charts, patch.object(
                    ImageDraw.ImageDraw, "ellipse", autospec=True) as points:
                story.tell(path, stage, begins, steps,
                           dict(zip(("psnr", "probe"), figures), images=5))
            if steps == 40:
                assert [call[0][2] for call in charts] == [
                    [(10, 9), (30, 20), (40, 29)], [(10, 50), (30, 60), (40, 70)]]
                (a, b, c), _ = (np.reshape([call.args[1] for call in points.call_args_list[i:i + 3]],
                                           (3, 2, 2)).mean(1) for i in (0, 3))
                assert np.allclose((b - a) / (c - a), (20 / 30, 11 / 20)), "on a linear scale"
                assert (c - a)[1] < 0 < (c - a)[0], "better is higher, later is to the right"
        assert points.call_count == 2 + 1, "NaN has no point"
        assert Image.open(d / "story.png").size == (2 * (story.WIDTH + story.GAP), 2 * (
            3 * (k + story.GAP) + story.GAP + story.HEIGHT))
        assert (d / "held_out.csv").read_text().splitlines()[1:] == [
            "stage1,5,10,5,,9,,50", "vae,12,30,5,,19,,nan"]
        assert charts[0][0][3] == {"stage1": (5, 10), "vae": (12, 30)}, "the stages' bands"
        (d / "stage1_step00000010.png").write_bytes(b"half")  # no reason to end a later stage
        with contextlib.redirect_stderr(said := io.StringIO()):
            story.tell(path, "vae", 12, 30, {"psnr": 19.0, "images": 5})
        assert "stage1_step00000010.png" in said.getvalue()
        story.rewind(d, 29)
        assert len((d / "held_out.csv").read_text().splitlines()) == 2, "one row is left"
        with recorded(story, "chart") as charts:  # one point, no labels
            story.tell(d / "vae_step00000030.png", "vae", 0, 5, {"psnr": 7.0, "images": 9})
        assert [call[0][2] for call in charts] == [[(5, 7.0)]]


def test_a_picture_fails():
    """What ends a run while it draws costs no steps: the checkpoint is there, and a resume draws
    first what was missed. --overwrite forgets the figures of the run before."""
    with folder() as d:
        flags = [*SMALL, "--stage", 1, "--out", d / "a", "--steps", 4, "--grid-every", 2]
        with patch.object(tt, "save_grid", side_effect=UserError("no picture")), refused("picture"):
            execute(tt, *flags)
        assert [p.name for p in d.glob("a/*.pt")] == ["stage1_step00000002.pt"]
        execute(tt, *flags)
        execute(tt, *flags[:-5], d / "b", *flags[-4:])
        for name in ("held_out.csv", "stage1_step00000002.png", "story.png"):
            assert (d / "a" / name).read_bytes() == (d / "b" / name).read_bytes(), name
        execute(tt, *flags, "--grid-every", 3, "--overwrite")
        with open(d / "a" / "held_out.csv") as f:
            assert [row["steps"] for row in csv.DictReader(f)] == ["3", "4"]


def test_discriminator_starts_once():
    """--disc-start counts through the stages, each of its own steps."""
    with (folder() as d, patch.dict(tt.PRESETS["tiny"], steps=(2, 2, 1)),
          recorded(runs, "time_left") as times):
        execute(tt, *SMALL, "--out", d, "--disc-start", 3)
        # of the bar: steps done, and left in all stages; the last stage's own bar tells them
        assert np.allclose([call[0][1:] for call in times], [
            (1, 1 + 2 * 1.4 + 1.2), (2, 2 * 1.4 + 1.2), (1, 1 + 1.2 / 1.4), (2, 1.2 / 1.4)])
        rows = [(row["stage"], bool(row["d_loss"])) for row in rows_of(d)]
    assert rows == [("1", False), ("1", False), ("2", False), ("2", True), ("3", True)]


def write_ramps(root, n, blue):
    """n images of 96 x 32 in two classes: red is twice the column, green the class, blue the
    image's. Returns their centre crops in the order of their names, in [-1, 1], and the labels."""
    labels = [i // (n // 2) for i in range(n)]
    images = np.zeros((n, 32, 96, 3), np.uint8)
    for i, label in enumerate(labels):
        images[i, ..., 0] = np.arange(96) * 2
        images[i, ..., 1:] = 200 * label, blue + i
        path = root / f"class{label}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    centres = torch.from_numpy(images[:, :, 32:64]).permute(0, 3, 1, 2)
    return centres / 127.5 - 1, torch.tensor(labels)


def test_end_of_a_stage():
    """Training sees flipped random crops; statistics and probe come from centre crops of training
    images, the figures and the grid from held-out ones, all by the EMA; stage 3 keeps the
    statistics. Each against a plain computation on pixels that tell where they are from."""
    def crops_in(steps):
        """Image -> the red of its crop's first and last column, for the first step."""
        first, last = ((steps[0][0][0][:, :, 0, k] + 1) * 127.5 for k in (0, -1))
        return {int(blue): (a, b) for blue, a, b in zip(first[:, 2].round(), first[:, 0].tolist(),
                                                        last[:, 0].tolist())}

    crops = []
    with folder() as d, patch.object(tt, "load_lpips", lambda *_: (Perceptual(), None)):
        (x, y), (held_x, held_y) = write_ramps(d / "a", 16, 0), write_ramps(d / "b", 8, 100)
        start = load_file(small_run() / "stage1.pt")
        start["tokenizer"]["decoder.conv_out.bias"].copy_(torch.tensor([1.2, 0, -1.2]))
        save_checkpoint(d / "stage1.pt", start)
        flags = [*SMALL, "--data", d / "a", "--val", d / "b", "--out", d, "--batch-size", 8,
                 "--steps", 1, "--w-p", 0.6, "--lr", 0.03, "--check-data"]
        for stage, n, val_images in ((2, 10, 6), (3, 12, 99)):
            with (recorded(tt, "training_step") as steps, recorded(tt, "linear_probe") as probes,
                  recorded(tt, "check_images") as checks, recorded(tt, "open_folders") as opened):
                execute(tt, *flags, "--stage", stage, "--encode-images", n,
                        "--val-images", val_images)
            assert opened[0][0] == (str(d / "a"), str(d / "b"), val_images)
            assert [len(part) for part in checks[0][0][0]] == [16, 8]
            crops.append(crops_in(steps))

            content = load_file(d / f"stage{stage}.pt")
            tok = frozen(load_tokenizer(d / f"stage{stage}.pt"))
            chosen, held = ([i for batch in data.at_random(k, 64, total) for _, i in batch]
                            for k, total in ((n, 16), (val_images, 8)))
            tokens, z = tok.features(x[chosen]), tok.encode(x[chosen])
            if stage == 2:
                assert torch.allclose(tok.latent_mean, z.mean((0, 2, 3)), atol=1e-4)
                assert torch.allclose(tok.latent_std, z.std((0, 2, 3), correction=0), atol=1e-4)
                kept = tok.latent_mean, tok.latent_std
            assert same(kept, (tok.latent_mean, tok.latent_std)) is None

            v, labels = held_x[held], held_y[held]
            recon = tok.decode(tok.encode(v)).clamp(-1, 1)
            psnr = 10 * torch.log10(4 / (v - recon).square().mean((1, 2, 3)))
            rec = (v - recon).abs().mean() + 0.6 * Perceptual()(v, recon).mean()
            figures = {"rec": rec, "psnr": psnr.mean(), "ssim": losses.ssim(v, recon).mean(),
                       "probe": probes[-2][1], "probe_tokens": probes[-1][1]}
            assert figures.keys() == content["validation"].keys()
            for k, value in figures.items():
                close(content["validation"][k], float(value), 1e-4)
            by_hand = ((z.mean((2, 3)), y[chosen], tok.encode(v).mean((2, 3)), labels),
                       (tokens.mean(1), y[chosen], tok.features(v).mean(1), labels))
            for (found, _), expected in zip(probes[-2:], by_hand):
                assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))

            pictures = torch.cat([held_x, tok.decode(tok.encode(held_x))])
            grid = np.asarray(Image.open(d / f"stage{stage}_step00000001.png")).astype(int)
            grid = grid.reshape(2, 32, 8, 32, 3).transpose(0, 2, 1, 3, 4).reshape(16, 32, 32, 3)
            assert np.abs(grid - data.to_uint8(pictures)).max() <= 1
        with recorded(tt, "training_step") as steps:
            execute(tt, *flags, "--stage", 3, "--encode-images", 12, "--val-images", 99)
            assert not steps, "complete"
            execute(tt, *flags, "--stage", 3, "--overwrite", "--seed", 1)
        crops.append(crops_in(steps))
        for a in crops:  # eight training images; crops that start anywhere, flipped or not
            assert len(a) == 8 and max(a) < 16 and len({min(ends) for ends in a.values()}) > 3
            assert len({first < last for first, last in a.values()}) == 2
        for a, b in pairwise(crops):  # of another stage, of another seed
            assert list(a) != list(b) and any(a[i] != b[i] for i in a.keys() & b.keys())


def test_autocast():
    """--dtype bf16: in training E_p, A, D, LPIPS and the discriminator run in it, on images in
    fp32; validation is in fp32."""
    seen = []

    def watched(module):
        forward = module.forward

        def watch(self, *inputs):
            float32 = all(x.dtype == torch.float32 for x in inputs)
            seen.append((module.__name__, torch.is_autocast_enabled("cpu"), float32))
            return forward(self, *inputs)
        return patch.object(module, "forward", watch)

    with (folder() as d, watched(DINOv2), watched(losses.PatchGAN), watched(Perceptual),
          patch.object(tt, "load_lpips", lambda *_: (Perceptual(), None))):
        execute(tt, *SMALL, "--out", d, "--steps", 1, "--stage", 1, "--w-p", 1, "--dtype", "bf16")
    networks = [("DINOv2", True, True), ("Perceptual", True, True), *[("PatchGAN", True, True)] * 3]
    assert seen[:5] == networks
    assert not any(autocast for _, autocast, _ in seen[5:])


def test_seeds():
    """A seed draws E_p (random:NAME) and the other networks, another seed others, the other
    networks whatever E_p is; --d, --decoder and the preset's disc_ch are their sizes."""
    def begin(stage=1, *flags):
        args = tt.parse([*SMALL, *flags])
        start = tt.start_from_encoder(stage, args, None, None, CPU)
        tok = start.tokenizer
        assert tok.decoder.conv_in.in_channels == tok.d == args.d
        assert start.discriminator.main[0].out_channels == 16
        return [dict(part.state_dict()) for part in (
            tok.encoder, tok.decoder, start.discriminator)]

    first, again, other = begin(), begin(), begin(1, "--seed", "1", "--d", "24")
    assert same(first, again) is None
    for part, k in enumerate(("cls_token", "conv_out.weight", "main.0.weight")):
        assert not torch.equal(first[part][k], other[part][k])
    begin(0, "--d", "24")
    small, vae = begin(1, "--decoder", "small"), begin(0, "--decoder", "small")
    assert [len(part[1]["conv_out.weight"][0]) for part in (first, small, vae)] == [16, 32, 32]
    assert same(first[2], begin(1, "--encoder", "random:tiny14_reg4")[2]) is None


def test_recipe():
    """The defaults of the preset paper: Sections 3 and 4, VA-VAE's numbers, README's choices."""
    args = vars(tt.parse([]))
    for name, value in {
            "model": "aligntok", "encoder": "vitl14", "decoder": "vavae", "d": 32, "size": 256,
            "disc_ch": 64, "data": "data/imagenet/train", "batch_size": 256, "accum": 1,
            "lr": 1e-4, "encoder_lr": 1e-4, "w_p": 1, "w_g": 0.5, "w_sp": 1, "sp_loss": "l2",
            "sp_at": "adapter", "w_kl": 1e-6, "w_vf": 0.1, "vf_margins": [0.5, 0.25],
            "disc_start": 2500, "ema_decay": 0.9999, "encode_images": 50_000,
            "steps_of": {1: 100_000, 2: 200_000, 3: 100_000, 0: 400_000}}.items():
        assert args[name] == value, name
    files_given = ["--vgg16", "a", "--lpips-heads", "b"]
    for flags, w_p in (([], 0), (files_given, 1), ([*files_given, "--w-p", "0"], 0)):
        assert tt.parse(["--preset", "tiny", *flags]).w_p == w_p
    args = tt.parse(["--lr", "1", "--steps", "7"])
    assert args.encoder_lr == 1 and args.steps_of == dict.fromkeys(range(4), 7)

    harmless = "preset init out data val val_images steps steps_of workers compile checkpointing "
    harmless += "log_every save_every grid_every overwrite vgg16 lpips_heads encode_images "
    harmless += "check_data skip_unreadable pretrain_steps given encoder_given stages now dino"
    recipe = load_file(small_run() / "stage1.pt")["recipe"].keys()
    assert vars(args).keys() - harmless.split() == recipe - {
        "fingerprint at the start", "list of images", "lpips"}, "what a resume must repeat"


def test_nothing_grows_with_the_steps():
    """After two steps no parameter of an EMA, of the reference or of a frozen part holds a graph or
    a gradient."""
    flags = [*SMALL, "--steps", 2, "--workers", 0]
    with folder() as d, mini_size():
        with recorded(tt, "set_up_stage") as stages:
            execute(tt, *flags, "--out", d / "aligntok")
            execute(tt, *flags, "--model", "vavae", "--out", d / "vavae")
        with recorded(train_dit, "update_ema") as updates:
            execute(train_dit, *mini_dit(d), "--steps", 2, "--out", d / "dit")
    modules = [m for _, s in stages
               for m in (s.tokenizer, s.discriminator, s.ema, s.reference, s.lpips) if m]
    (ema, generator, _), _ = updates[-1]
    assert len(modules) == 13 and len(updates) == 2
    for module in (*modules, ema, generator):
        for name, p in module.named_parameters():
            assert p.grad_fn is None and (p.requires_grad or p.grad is None), name
    still = [m for _, s in stages for m in (s.ema, s.reference) if m]
    assert not any(p.requires_grad for m in still for p in m.parameters())


def test_baselines():
    """A VAE's file can be read; VA-VAE resumes exactly; which flags are not theirs."""
    execute(tt, *PLAIN, "--model", "vae", "--steps", 1, "--out", TMP / "vae")
    vae, z = load_tokenizer(TMP / "vae" / "vae.pt", VAE), torch.randn(2, 32, 2, 2)
    assert (vae.unnormalize(vae.normalize(z)) - z).abs().max() < 1e-5 and not vae.training

    flags, a, b = [*SMALL, "--accum", 2, "--steps", 3], TMP / "vavae", TMP / "vavae-again"
    vavae = [*flags, "--model", "vavae"]
    execute(tt, *vavae, "--out", a)
    execute(tt, *vavae, "--out", b, "--steps", 2)
    execute(tt, *vavae, "--out", b)
    last = "vavae_step00000003.pt"
    assert same(load_file(a / last), load_file(b / last)) is None
    with refused("vf_margins"):
        execute(tt, *vavae, "--vf-margins", 0, 0, "--out", b, "--steps", 4)
    for words, more in {"no --stage": ["vae", "--stage", 1], "no --encoder": ["vae"],
                        "earlier stage": ["vavae", "--init", "x"]}.items():
        with refused(words):
            execute(tt, *flags, "--model", *more, "--out", TMP / "none")


MINI_VFM = {"scale": 1, "width": 64, "expansion": 32, "style": 16,
            "synthesis": {"channels": (32, 32, 16, 16, 16, 16), "injections": (32, 16, 16, 16),
                          "layers": (1,) * 6, "kernels": (3,) * 6,
                          "attentions": (1, 0, 0, 0, 0, 0), "noise": 0}}


@patch.dict(vfm_vae.VFM_VAES, tiny=MINI_VFM)
@patch.object(tt, "linear_probe", lambda *_: 0.0)
def test_vfm_vae_trains():
    """Its four stages: what trains, what stays, the log; an exact resume, draws and all; its
    tokenizer serves the other scripts; each mistake is one line."""
    run, flags = TMP / "vfm", [*SMALL, "--model", "vfmvae", "--size", 64, "--val-images", 12,
                               "--encode-images", 24]
    execute(tt, *flags, "--steps", 2, "--out", run)
    stages, finals = list(vfm_vae.STAGES), []
    encoder = {"post_quant", "patch_quants", "final_quant", "linear_proj"}
    for i, stage in enumerate(stages):
        finals.append(load_file(run / f"{stage}.pt"))
        assert finals[i]["total_steps"] == 2 * (i + 1)
        if not i:
            continue
        before, now = (final["tokenizer"] for final in finals[-2:])
        moved = {k for k, v in now.items() if not torch.equal(v, before[k])}
        parts = {k.split(".")[1 if k.startswith("ldm") else 0] for k in moved} - {
            "latent_mean", "latent_std"}
        assert parts == {"weak": encoder | {"mapping", "synthesis"},
                         "ssim": {"post_quant", "mapping", "synthesis"},
                         "patchgan": {"synthesis"}}[stage], (stage, parts)
        assert ("linear_proj" in str(now.keys())) == (stage == "weak")
        assert ("latent_std" in moved) == (stage == "weak")
        d = [{k for k, v in finals[i]["discriminator"].items() if k.startswith(part)
              and not torch.equal(v, finals[i - 1]["discriminator"][k])}
             for part in ("main.", "patch.")]
        assert d[0] and bool(d[1]) == (stage == "patchgan")
    assert {k.split(".")[2] for k in moved} == {"3", "4", "5"}, "the decoder's second half"
    rows = rows_of(run)
    assert [(row["stage"], row["step"]) for row in rows] == [(s, n) for s in "1234" for n in "12"]
    for name, stages_with in {"kl": "12", "vf_adaptive": "12", "ssim": "3", "matching": "4",
                              "multires": "1234", "d_loss": "1234"}.items():
        assert {row["stage"] for row in rows if row[name]} == set(stages_with), name
    opt = finals[0]["opt_d"]["param_groups"][0]
    assert (opt["lr"], opt["betas"]) == (1e-3, (0.0, 0.99))

    again = TMP / "vfm-again"
    for steps in (1, 2):
        execute(tt, *flags, "--stage", "strong", "--steps", steps, "--out", again)
    a, b = (load_file(out / "strong_step00000002.pt") for out in (again, run))
    assert (difference := same(a, b)) is None, difference
    execute(tt, *flags, "--stage", "patchgan", "--init", run / "ssim.pt", "--steps", 1, "--out",
            TMP / "vfm-less", "--encode-images", 20, "--lr", 5e-4)
    less = load_file(TMP / "vfm-less" / "patchgan_step00000001.pt")
    assert {less[opt]["param_groups"][0]["lr"] for opt in ("opt_g", "opt_d")} == {5e-4}
    stay = [load_file(out)["tokenizer"]["latent_std"]
            for out in (run / "ssim.pt", TMP / "vfm-less" / "patchgan.pt")]
    assert torch.equal(*stay), "the decoder's stages keep the statistics, of whatever images"

    weak, last = (load_tokenizer(run / f"{stage}.pt", vfm_vae.VFMVAE)
                  for stage in ("weak", "patchgan"))
    prints = [files.fingerprint(t) for t in (weak, last)]
    assert prints[0] == prints[1] and last.latent_std.min() > 0
    with mini_size(), folder() as d:
        execute(train_dit, *mini_dit(d), "--size", 64, "--steps", 1, "--out", d / "dit",
                "--tokenizer", run / "patchgan.pt")
        execute(sample, "--preset", "tiny", "--dit", d / "dit" / "dit_step00000001.pt", "-n", 2,
                "--tokenizer", run / "weak.pt", "--steps", 2, "--out", d / "images")
        assert Image.open(d / "images" / "000001.png").size == (64, 64)

        # an official file: its statistics are another one; and one without the encoder
        state = {k: v for k, v in finals[3]["tokenizer"].items() if not k.startswith("latent_")}
        torch.save({"G_ema": state}, d / "official.pth")
        torch.save({k: v for k, v in state.items() if "vfm_enc" not in k}, d / "decoder.pth")
        torch.save({k: finals[3]["tokenizer"][f"latent_{k}"].view(1, 32, 1, 1)
                    for k in ("mean", "std")}, d / "stats.pt")
        ours = [*mini_dit(d), "--size", 64, "--steps", 1, "--out", d / "official", "--tokenizer",
                d / "official.pth"]
        with refused("no latent statistics", "--latent-stats FILE"):
            execute(train_dit, *ours)
        execute(train_dit, *ours, "--latent-stats", d / "stats.pt")
        a, b = (load_file(d / out / "dit_step00000001.pt") for out in ("official", "dit"))
        assert same(a["model"], b["model"]) is None, "the same latents"
        given = ["--preset", "tiny", "--dit", d / "official" / "dit_step00000001.pt", "-n", 2,
                 "--tokenizer", d / "official.pth", "--steps", 2, "--out", d / "more"]
        execute(sample, *given, "--latent-stats", d / "stats.pt")
        torch.save({"mean": torch.zeros(32), "std": torch.ones(32)}, d / "stats.pt")
        with refused("on the latents of another tokenizer"):
            execute(sample, *given, "--latent-stats", d / "stats.pt")
        last = run / "patchgan.pt"
        for script, *command in (
                (train_dit, *mini_dit(d), "--size", 80, "--tokenizer", last, "--out", d / "none"),
                (fid, "--recon", last, d / "data", "--size", 80),
                (fid, "--cknna", last, d / "data", "--size", 80)):
            with refused("divisible by 64, not 80"):
                execute(script, *command)
        with refused("decoder.pth", "holds no encoder"):
            execute(fid, "--cknna", d / "decoder.pth", d / "data")

    bare, mine = TMP / "bare.pt", TMP / "mine"
    save_checkpoint(bare, {k: v for k, v in finals[0].items() if k != "discriminator"})
    mine.mkdir()
    save_checkpoint(mine / "strong.pt", {"state_dict": {}})  # a file of the user's
    for words, more in {
            ("there is no", "--stage ssim"): ["--stage", "patchgan"],
            ("bare.pt", "discriminator"): ["--stage", "weak", "--init", bare],
            ("strong.pt", "not what it should be"): ["--stage", "strong", "--out", mine],
            ("strong.pt was not made", "--out"): ["--stage", "strong", "--out", mine, "--overwrite"],
            ("is of stage strong", "continues from stage ssim"):
                ["--stage", "patchgan", "--init", run / "strong.pt"],
            ("dino none -> random",): ["--stage", "weak", "--init", run / "strong.pt", "--dino",
                                       "random"],
            ("--model vfmvae has strong, weak",): ["--stage", 1],
            ("--init continues",): ["--stage", "strong", "--init", "x"],
            ("--decoder small: --model vfmvae has tiny, paper",): ["--decoder", "small"],
            ("latent sides by 4", "not 80"): ["--size", 80],
            ("--batch-size 9", "equal groups of at most 8"): ["--batch-size", 9],
            ("siglip2-l16-512.safetensors: no such file",): ["--encoder", "siglip2-l16-512"],
            ("encoder random:tiny14 -> random:vits14",):
                ["--stage", "weak", "--init", run / "strong.pt", "--encoder", "random:vits14"],
            ("--w-g is not for --model vfmvae",): ["--w-g", 0],
            ("--vf-margins is not",): ["--vf-margins", 0, 0],
            ("is no DINOv2, SigLIP",): ["--encoder", TMP / "no-siglip.pt"],
            ("--dino", files.ENCODER_URLS["dino-s16"]): ["--dino", TMP / "nothing.pth"]}.items():
        torch.save({"vision_model.x": torch.zeros(1)}, TMP / "no-siglip.pt")
        with refused(*words):
            execute(tt, *flags, "--steps", 1, "--out", TMP / "vfm-none", *more)
    older = copy.deepcopy(finals[0])  # without the rule of its positions
    assert older["arguments"].pop("positions") == "size"
    save_checkpoint(TMP / "older.pt", older)
    execute(tt, *flags, "--stage", "weak", "--steps", 1, "--init", TMP / "older.pt", "--out",
            TMP / "vfm-older")
    assert load_file(TMP / "vfm-older" / "weak.pt")["arguments"]["positions"] == "scale"
    with refused("--stage weak goes with --model vfmvae"):
        execute(tt, *SMALL, "--stage", "weak", "--out", TMP / "vfm-none")
    with refused("--decoder paper: --model aligntok has tiny, small, vavae"):
        execute(tt, *SMALL, "--decoder", "paper", "--out", TMP / "vfm-none")


def test_resume_is_exact():
    """Stage 2, GAN and EMA on, across an epoch boundary, with accumulation, images without labels:
    stopped at step 3 of 5, or never."""
    a, b, flat = TMP / "resume-a", TMP / "resume-b", TMP / "fourteen"
    write_shapes(flat, 14, 64)
    for path in flat.glob("*/*.png"):
        path.rename(flat / path.name)
    flags = [*SMALL, "--data", flat, "--stage", 2, "--init", small_run() / "stage1.pt",
             "--accum", 2, "--save-every", 3, "--log-every", 2]
    five = [*flags, "--out", b, "--steps", 5]
    execute(tt, *flags, "--out", a, "--steps", 5)
    execute(tt, *flags, "--out", b, "--steps", 3)
    with open(b / "log.csv", "a") as f:
        f.write("2,5,0.1,0\n2,7,")  # rows past the checkpoint
    execute(tt, *five, "--workers", 1)
    newest = b / "stage2_step00000005.pt"
    whole = load_file(a / newest.name)
    assert (difference := same(whole, load_file(newest))) is None, difference
    # as if killed while it was validated: row 5 is no multiple of --log-every
    (b / "stage2.pt").unlink()
    execute(tt, *five)
    assert same(load_file(a / "stage2.pt"), load_file(b / "stage2.pt")) is None
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()

    changed = error_of(execute, tt, *five, "--lr", 0.1, "--w-sp", 2)
    assert "lr 0.001 -> 0.1" in changed and "w_sp 1.0 -> 2.0" in changed
    assert "batch" not in changed
    (b / "stage2.pt").unlink()
    with refused("already at step 5"):
        execute(tt, *flags, "--out", b, "--steps", 4)
    newest.write_bytes(newest.read_bytes()[:1000])  # damaged: the checkpoint before it serves
    execute(tt, *five)
    assert same(whole, load_file(newest)) is None


def test_two_ranks_equal_one_process():
    """torchrun with two gloo processes against one process without it, same global batch: GAN, EMA,
    accumulation, BatchNorm over ranks."""
    fp64, saved, rows = driver(TMP / "fp64.py", IN_FP64), [], []
    for ranks in (0, 2):
        out = TMP / f"ranks{ranks}"
        complete(fp64, "train_tokenizer.py", *SMALL, "--stage", "2",
                 "--init", small_run() / "stage1.pt", "--steps", "1", "--batch-size", "8",
                 "--accum", "2", "--val-images", "4", "--encode-images", "12", "--out", out,
                 ranks=ranks)
        rows += rows_of(out)
        saved.append(load_file(out / "stage2_step00000001.pt"))
    one, two = rows
    for key, value in one.items():
        equal = value == two[key]
        assert equal or math.isclose(float(value), float(two[key]), rel_tol=1e-5, abs_tol=1e-9), key
    d = [content["discriminator"] for content in saved]
    assert all(torch.allclose(d[0][k], d[1][k]) for k in d[0] if "running" in k or "num_" in k)
    # Adam's first moments are half the first gradients. That both ranks hold the same weights is
    # check_weights' part, before each checkpoint.
    for part in ("opt_g", "opt_d"):
        one, two = (content[part]["state"] for content in saved)
        for k in one:
            a, b = one[k]["exp_avg"], two[k]["exp_avg"]
            assert (a - b).norm() <= 1e-8 * a.norm() + 1e-12, (part, k, (a - b).norm())


def test_non_finite_loss_stops_the_run():
    """At the next log step, naming the step and the last good checkpoint; nothing of it is kept."""
    calls, original, out = [], losses.hinge_g, TMP / "nan"

    def planted(fake):
        calls.append(fake)
        return original(fake) * (math.nan if len(calls) == 4 else 1)

    with (patch.object(losses, "hinge_g", planted),
          refused("since step 4", "stage1_step00000002.pt")):
        execute(tt, *SMALL, "--out", out, "--stage", 1, "--steps", 9, "--log-every", 3)
    assert [p.name for p in sorted(out.glob("*.pt"))] == ["stage1_step00000002.pt"]


def test_tokenizer_errors():
    """Each mistake on the command line, or in what a stage continues from, is one line."""
    run, out = small_run(), TMP / "errors"
    one, resume = run / "stage1.pt", run / "stage2_step00000002.pt"
    (TMP / "a-file").write_text("")
    whole, cut = one.read_bytes(), TMP / "cut.pt"
    cut.write_bytes(whole[:len(whole) // 2])
    for words, flags in {
            ("data folder not found",): ["--data", TMP / "nowhere"],
            ("--val", "held-out images"): ["--val", TMP],
            ("there is no", "--stage 1"): ["--stage", 2],
            ("is of stage 1; stage 3 continues from stage 2",): ["--stage", 3, "--init", one],
            ("d 32 -> 16",): ["--stage", 2, "--init", one, "--d", 16],
            ("is not the final checkpoint",): ["--stage", 2, "--init", resume],
            ("cut.pt",): ["--stage", 2, "--init", cut],
            ("divisible by 16",): ["--size", 60],
            ("invalid float value: 'x' (see --help)",): ["--lr", "x"],
            ("does not split",): ["--accum", 3],
            ("holds stage1 of --model aligntok", "--out"): ["--model", "vavae", "--out", run],
            ("--vgg16", files.VGG16_URL): ["--w-p", 1, "--vgg16", TMP / "no-vgg.pth"],
            ("cannot write",): ["--out", TMP / "a-file" / "x"]}.items():
        with refused(*words):
            execute(tt, *SMALL, "--steps", 1, "--out", out, *flags)
    if files.fcntl:
        with runs.Run(out, 0, tt.COLUMNS), refused("another run"):
            execute(tt, *SMALL, "--steps", 1, "--out", out)
    assert "cut.pt" in error_of(load_tokenizer, cut)
    assert "take the stage's final one" in error_of(load_tokenizer, resume)


# ------------------------------------------------------------------------------------------ repa.py

def small_aligned(align, **changed):
    sizes = {"dim": 32, "depth": 5, "heads": 2, "d": 4, "num_classes": 5, "grid": (2, 4)}
    return random_weights(repa.AlignedDiT(align, 24, qk_norm=True, **sizes | changed))


def test_repa_and_reg():
    """Loss and gradients against plain autograd: -.5 cos with the encoder's tokens after block
    5 * 8/28, REG's class token at .03; the velocity that sample.py integrates."""
    encoder = random_weights(ViT(24, 1, grid=3)).requires_grad_(False).double()
    images = torch.rand(3, 3, 32, 64) * 2 - 1
    z0, z1 = torch.randn(2, 3, 4, 2, 4).double()
    t, n, y = torch.rand(3).double(), torch.randn(3, 24).double(), torch.tensor([0, 5, 2])
    prepared = ((images + 1) / 2 - encoder.pixel_mean) / encoder.pixel_std
    with torch.no_grad():
        cls, tokens = encoder(prepared.double())
    def check(align):
        net = small_aligned(align).double()
        S, a, taps = dict(net.named_parameters()), t.view(-1, 1, 1, 1), []
        cls_t = (1 - t[:, None]) * cls + t[:, None] * n if align == "reg" else None
        v = plain_dit(S, (1 - a) * z0 + a * z1, t, y, 2, cls_t, taps)
        u, P = z1 - z0, taps[0]  # after the first of five
        for i in (0, 2, 4):
            P = P @ S[f"projector.{i}.weight"].T + S[f"projector.{i}.bias"]
            P = P * torch.sigmoid(P) if i < 4 else P
        target = tokens if align == "repa" else torch.cat([cls[:, None], tokens], 1)
        pairs = zip(P.flatten(0, 1), target.flatten(0, 1))
        cosines = [p @ f / p.norm() / f.norm() for p, f in pairs]
        by_hand = {"align": -sum(cosines) / len(cosines)}
        expected = ((v - u) ** 2).mean() + 0.5 * by_hand["align"]
        expected += 0.3 * (1 - (v * u).sum(1) / v.norm(dim=1) / u.norm(dim=1)).mean()
        if align == "reg":
            v_cls = taps[-1][:, 0] @ S["cls_out.weight"].T + S["cls_out.bias"]
            by_hand["class"] = ((v_cls - (n - cls)) ** 2).mean()
            expected += 0.03 * by_hand["class"]
        loss, mse, _, terms = repa.flow_matching(encoder, net, z0, z1, t, y, 0.3, images, n)
        close(loss.item(), expected.item(), 1e-6)
        assert terms.keys() == by_hand.keys()
        assert torch.allclose(mse, ((v - u) ** 2).mean((1, 2, 3)))
        for name, value in by_hand.items():
            close(terms[name].item(), value.item(), 1e-6)
        trained = {k: p for k, p in S.items() if p.requires_grad}
        grads = [torch.autograd.grad(f, list(trained.values())) for f in (loss, expected)]
        for k, g, g_by_hand in zip(trained, *grads):
            assert (g - g_by_hand).norm() <= 1e-5 * g_by_hand.norm() + 1e-12, (align, k)

        # for sampling: the class token in 3 channels of 2 x 4, F = 24, behind the latents
        z_t = (1 - a) * z0 + a * z1
        if align == "reg":
            both = torch.cat([z_t, cls_t.view(3, 3, 2, 4)], 1)
            assert net.extra == 3 and torch.allclose(net(both, t, y)[:, :4], v, atol=1e-6)
            assert torch.allclose(net(both, t, y)[:, 4:].flatten(1), v_cls, atol=1e-6)
            assert small_aligned("reg", grid=(4, 4)).extra == 2, "filled up"
        else:
            assert torch.allclose(net(z_t, t, y), v, atol=1e-6)
        cls_of, arguments, state = repa.for_sampling(net.arguments, net.state_dict())
        bare = cls_of(**arguments)
        bare.load_state_dict(state)
        assert ("projector" in str(state.keys())) is False
        assert type(bare) is (LightningDiT if align == "repa" else repa.AlignedDiT)
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        for align in ("repa", "reg"):
            check(align)
    fresh = repa.AlignedDiT("reg", 24, dim=32, depth=28, heads=2, d=4, grid=(2, 4))
    assert fresh.tap == 8 and not fresh(torch.randn(2, 7, 2, 4), torch.rand(2), y[:2]).any()
    assert fresh.projector[0].out_features == 128
    assert small_aligned("repa", hidden=7).projector[2].weight.shape == (7, 7)


def test_train_with_repa_and_reg():
    """--align: an exact resume, with the latents cached or not; what the encoder sees is what was
    encoded, flips and all; both are sampled, REG's class token by the same steps as z; each mistake
    is one line."""
    with folder() as d, mini_size():
        torch.manual_seed(0)
        torch.save(random_weights(ViT(24, 1, grid=2)).state_dict(), d / "vit.pth")
        ours = [*mini_dit(d), "--log-every", 1, "--align-encoder", d / "vit.pth", "--cache",
                d / "z.npy"]
        for align in ("repa", "reg"):
            a, b = d / align, d / f"{align}-again"
            flags = [*ours, "--align", align]
            with recorded(repa, "flow_matching") as calls:
                execute(train_dit, *flags, "--out", a, "--steps", 3)
            last = "dit_step00000003.pt"
            if align == "reg":
                for steps in (1, 3):
                    execute(train_dit, *flags, "--out", b, "--steps", steps)
                assert same(*(load_file(out / last) for out in (a, b))) is None
            rows = rows_of(a)
            assert all(float(row["align"]) and bool(row["class"]) == (align == "reg")
                       for row in rows)
            tok = load_tokenizer(d / "tok.pt")
            for (_, _, z0, _, _, _, _, images, n), _ in calls:
                assert torch.allclose(tok.normalize(tok.encode(images)), z0, atol=0.02)
                assert n.shape == (8, 24) and len({*n[:, 0].tolist()}) == 8

            execute(sample, "--preset", "tiny", "--dit", a / last, "--tokenizer", d / "tok.pt",
                    "-n", 2, "--steps", 2, "--cfg", 1, "--out", d / f"{align}.npz")
            saved = load_file(a / last)
            net = repa.AlignedDiT(**saved["arguments"])
            net.load_state_dict(saved["ema"])
            assert saved["model"].keys() == saved["ema"].keys()
            start = [data.rng(0, "noise", i).standard_normal((8 + net.extra, 2, 2), np.float32)
                     for i in (0, 1)]
            z = torch.from_numpy(np.stack(start))
            z, cls, y = z[:, :8], z[:, 8:].flatten(1)[:, :24], torch.tensor([0, 1])
            with torch.no_grad():
                for t in (1.0, 0.5):
                    v, v_cls, _ = net(z, torch.full((2,), t), y, cls)
                    z, cls = z - 0.5 * v, cls - 0.5 * v_cls if align == "reg" else cls
                expected = data.to_uint8(tok.decode(tok.unnormalize(z)))
            found = np.load(d / f"{align}.npz")["arr_0"]
            assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
        execute(train_dit, *flags, "--no-cache", "--out", d / "fresh", "--steps", 1)
        with refused("--cache", "z.npz", ".npy"):
            execute(train_dit, *flags, "--cache", d / "z.npz")
        assert math.isclose(float(rows_of(d / "fresh")[0]["loss"]), float(rows[0]["loss"]),
                            rel_tol=2e-3)
        for words, more in {
                ("align reg -> repa",): ["--align", "repa", "--out", a],
                ("--align-encoder ENCODER", "go together"): [],
                ("no DINOv2, SigLIP",): ["--align=reg", "--align-encoder", d / "tok.pt"]}.items():
            with refused(*words):
                execute(train_dit, *ours, "--steps", 4, "--out", d / "none", *more)
        content = load_file(d / "repa" / last)  # other features than it has learned
        torch.save(random_weights(ViT(24, 1, grid=2), 1).state_dict(), d / "vit.pth")
        with refused("features", "dit_step00000003.pt"):
            execute(train_dit, *ours, "--align", "repa", "--out", d / "repa", "--steps", 4)
        execute(train_dit, *ours, "--align", "reg", "--out", d / "repa", "--steps", 1,
                "--overwrite")
        assert rows_of(d / "repa")[0]["class"], "--overwrite forgets a log with other columns"
        assert content["recipe"]["features"]
        with refused("--align-encoder nothing"):
            execute(train_dit, *ours, "--align", "reg", "--align-encoder", "nothing", "--out",
                    d / "none")
        with refused("--captions and --align exclude each other"):
            train_dit.parse(["--align", "reg", "--align-encoder", "vitb14", "--captions"])
        with refused("go together"):
            train_dit.parse(["--align", "reg"])


# ------------------------------------------------------------------------------------- train_dit.py

def test_train_dit():
    """Bit-exact resume in fp32; the cache against encoding on the fly; what must be refused."""
    with folder() as d, mini_size():
        ours, a, b = [*mini_dit(d), "--log-every", 3], d / "a", d / "b"
        execute(train_dit, *ours, "--out", a, "--steps", 4)
        execute(train_dit, *ours, "--out", b, "--steps", 2)
        for _ in range(2):  # the second finds it complete
            execute(train_dit, *ours, "--out", b, "--steps", 4, "--workers", 1)
        assert same(*(load_file(out / "dit_step00000004.pt") for out in (a, b))) is None
        assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()

        saved = load_file(a / "dit_step00000004.pt")
        assert saved.pop("classes") == sorted(set(Shapes(n=24).classes)), "names of the folders"
        (d / "old").mkdir()  # of before there were names
        save_checkpoint(d / "old" / "dit_step00000004.pt", saved)
        for out, words in ((a, ["11 = triangle", "3 = cross"]), (d / "old", [])):
            ends = ["--tokenizer", d / "tok.pt", "--preset", "tiny", "--steps", 1, "--grid",
                    d / "grid.png", "--dit", out / "dit_step00000004.pt", "-n", 2, "--labels"]
            with contextlib.redirect_stdout(io.StringIO()) as said:
                execute(sample, *ends, "triangle,cross" if words else "11,3")
            assert all(word in said.getvalue() for word in words), said.getvalue()
        execute(train_dit, *ours, "--out", d / "old", "--steps", 5, "--cache", a / "latents.npy")
        save_checkpoint(d / "old" / "dit.pt", saved | {"classes": ["a", 1]})
        with refused("dit.pt", "not 12 strings"):
            execute(sample, "--tokenizer", d / "tok.pt", "--dit", d / "old" / "dit.pt")

        tokenizer, cache = small_tokenizer(), np.load(a / "latents.npy", mmap_mode="r")
        images = data.open_folders(d / "data" / "train", None, 1)[0]
        x = data.to_tensor(data.Crops(images, 32)[0, 5][0])
        z = tokenizer.normalize(tokenizer.encode(torch.stack([x, x.flip(2)])))
        assert np.abs(cache[5] - z.numpy()).max() < 2e-3 * z.abs().max()  # fp16

        args = train_dit.parse([str(flag) for flag in ours])
        cached, fresh = (train_dit.FlowData(images, latents, (8, 2, 2), 12, args)
                         for latents in (cache, None))
        for i in range(5):
            (z0, *rest), (x, *same_rest) = cached[0, i], fresh[0, i]
            assert same(rest, same_rest) is None
            assert rest[0] in (12, images.classes.index(Path(images.path(i)).parent.name))
            upright = data.to_tensor(data.Crops(images, 32)[0, i][0])
            assert torch.equal(x, upright) or torch.equal(x, upright.flip(2))
            z = tokenizer.normalize(tokenizer.encode(x[None]))[0]
            assert (z0 - z).abs().max() < 2e-3 * z.abs().max()
        items = [(epoch, i) for epoch in range(40) for i in range(24)]
        z0, y, normal, z1 = zip(*(cached[item] for item in items))
        flipped = [np.array_equal(z, cache[i, 1]) for z, (_, i) in zip(z0, items)]
        dropped = np.equal(y, 12)
        assert 0.45 < np.mean(flipped) < 0.55 and 0.07 < np.mean(dropped) < 0.13
        assert 0.3 < np.mean(np.array(flipped)[dropped]) < 0.7, "of each other they know nothing"
        for x in (torch.stack(normal), torch.stack(z1)[:, 0, 0, 0], z1[0], z1[1]):
            assert abs(x.mean()) < 0.4 and abs(x.std() - 1) < 0.3
        args.seed, args.label_drop = 1, 0.4
        other = train_dit.FlowData(images, cache, (8, 2, 2), 12, args)
        assert not torch.equal(other[0, 5][3], cached[0, 5][3])
        assert 0.35 < np.mean([other[item][1] == 12 for item in items]) < 0.45

        # what changes the rounding alone may change, and is named
        shutil.copytree(a, d / "a5")
        execute(train_dit, *ours, "--out", d / "a5", "--steps", 5)
        for step, flags, words in ((5, ["--accum", 4], "accum 1 -> 4"),
                                   (6, ["--dtype", "bf16", "--accum", 4], "float32 -> bfloat16")):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                execute(train_dit, *ours, "--out", b, "--steps", step, *flags)
            assert said.getvalue().count(words) == 1
        one, four = (load_file(out / "dit_step00000005.pt")["ema"] for out in (d / "a5", b))
        assert same(one, four) and all((one[k] - four[k]).abs().max() < 1e-5 for k in one)

        content = load_file(d / "tok.pt") | {"recipe": {"size": 32}}
        save_checkpoint(d / "sized.pt", content)
        flags = [flag for flag in ours if flag not in ("--size", "32")]
        sized = ["--tokenizer", d / "sized.pt", "--out", d / "sized"]
        execute(train_dit, *flags, *sized, "--steps", 1)
        assert load_file(d / "sized" / "dit_step00000001.pt")["recipe"]["size"] == 32

        other = save_tokenizer(small_tokenizer(seed=1), d / "other.pt")
        for words, flags in {
                ("latents.npy", "tokenizer"): ["--tokenizer", other],
                ("latents.npy", "(data "): ["--data", write_shapes(d / "fewer", 23)],
                ("dit_step00000004.pt", "lr 0.002 -> 0.1", "qk_norm", "batch_size", "beta2", "clip",
                 "w_cos", "label_drop", "ema_decay", "seed 0 -> 1", "cached True"): [
                    "--lr", 0.1, "--qk-norm", "--batch-size", 4, "--beta2", 0.5, "--clip", 2,
                    "--w-cos", 0, "--label-drop", 0, "--ema-decay", 0.5, "--seed", 1,
                    "--no-cache"],
                ("--steps",): ["--steps", 0],
                ("--batch-size 9",): ["--batch-size", 9, "--accum", 2]}.items():
            with refused(*words):
                execute(train_dit, *ours, "--steps", 4, "--out", a, *flags)
        with refused("missing.pt"):  # on the built-in shapes
            execute(train_dit, "--preset", "tiny", "--tokenizer", "missing.pt", "--out", d / "c")


def test_train_from_captions():
    """--captions, of shards: bit-exact resume, with and without a loader's worker; of the shapes.
    Dropped captions are the empty one, images are not flipped; the schedule of t; prompts to
    pictures, whatever the batch; what must be refused."""
    with folder() as d, patch.dict(MMDITS, mini={"dim": 32, "depth": 1, "depth_single": 1,
                                                 "axes": [4, 6, 6]}):
        ours = [*mini_dit(d)[:-4], "--captions", "--log-every", 1, "--data"]
        shards = [*ours, write_shards(d / "shards")]
        for steps in (1, 2):
            execute(train_dit, *shards, "--out", d / "a", "--steps", steps, "--workers", 2 - steps)
        with recorded(losses, "logit_normal") as times, recorded(train_dit, "generate") as drawn:
            execute(train_dit, *shards, "--out", d / "b", "--steps", 2)
        assert [shift for (_, shift), _ in times] == [mmdit.time_shift(4)] * 2
        ((ema, *_, schedule), _), = drawn
        assert schedule == sample.time_grid(20, mmdit.time_shift(4))
        saved = load_file(d / "b" / "dit_step00000002.pt")
        assert same(ema.state_dict(), saved["ema"]) is None and same(ema.state_dict(), saved["model"])
        assert same(*(load_file(d / k / "dit_step00000002.pt") for k in "ab")) is None
        assert (d / "a" / "log.csv").read_bytes() == (d / "b" / "log.csv").read_bytes()
        written, encoder = Shapes(n=24).captions, captions.Words(toy.VOCABULARY)
        text = np.load(d / "a" / "text.npy")
        assert np.array_equal(text, encoder([*written, ""]))
        with refused("text.npy", "text encoder words ->"), patch.object(
                captions.Words, "identity", "another"):
            execute(train_dit, *shards, "--out", d / "a", "--steps", 2)
        with patch.object(Shapes, "captions", [*written[:-1], "a red star on blue"]):
            changed = [*ours, write_shards(d / "changed"), "--out", d / "a", "--steps", 2]
        with refused("text.npy", "captions"):
            execute(train_dit, *changed)
        with refused("dit_step00000002.pt", "captions"):
            execute(train_dit, *changed, "--text-cache", d / "other.npy")
        with patch.object(toy, "open_shapes", lambda *_: (Shapes(n=24, size=32), None)):
            execute(train_dit, *ours, "shapes", "--out", d / "shapes", "--steps", 1)
        assert np.array_equal(text, np.load(d / "shapes" / "text.npy"))

        images = Shapes(size=32)
        args = train_dit.parse([str(flag) for flag in shards])
        latents = np.load(d / "a" / "latents.npy")
        assert latents.shape == (24, 1, 8, 2, 2)
        flow = train_dit.FlowData(images, latents, (8, 2, 2), 0, args, text)
        draws = [flow[epoch, i] for epoch in range(40) for i in range(24)]
        empty = [torch.equal(y, torch.from_numpy(text[24]).float()) for _, y, _, _ in draws]
        assert 0.07 < np.mean(empty) < 0.13
        kept = [i for i in range(24) if not empty[i]]
        assert all(np.array_equal(draws[i][1], text[i]) for i in kept)
        assert all(np.array_equal(draws[i][0], latents[i, 0]) for i in range(24))
        flow.text = np.load(d / "a" / "text.npy", mmap_mode="r")
        flow.latents = np.load(d / "a" / "latents.npy", mmap_mode="r")
        again = pickle.loads(pickle.dumps(flow))
        assert all(isinstance(a, np.memmap) for a in (again.text, again.latents))
        assert all(same(again[0, i], flow[0, i]) is None for i in range(4))

        dit, ours = d / "a" / "dit_step00000002.pt", [
            "--preset", "tiny", "--tokenizer", d / "tok.pt", "--steps", 2, "--dtype", "fp32"]
        ours += ["--dit", dit, "--prompt", "a red star on blue",
                 "--prompt", "a white ring on a dark green ground"]
        execute(sample, *ours, "-n", 3, "--out", d / "a.npz", "--batch-size", 3, "--grid",
                d / "grid.png")
        execute(sample, *ours, "-n", 5, "--out", d / "b.npz", "--batch-size", 2)
        with np.load(d / "a.npz") as a, np.load(d / "b.npz") as b:
            assert np.abs(a["arr_0"].astype(int) - b["arr_0"][:3]).max() <= 1
        assert Image.open(d / "grid.png").size[0] == 3 * 128
        with refused("a.npz", "prompts 2, "):
            execute(sample, *ours[:-1], "a red ring on blue", "-n", 3, "--out", d / "a.npz",
                    "--batch-size", 3)
        (d / "prompts.txt").write_text("\n")
        tokenizer, classes = small_tokenizer(), small_dit(depth=1, d=8)
        other = save_dit(classes, d / "classes.pt", tokenizer)
        for words, flags in {("--prompt TEXT",): ours[:-4],
                             ("does not know elephant",): [*ours, "--prompt", "an elephant"],
                             ("prompts.txt", "no prompt"): [*ours[:-4], "--prompts",
                                                            d / "prompts.txt"],
                             ("takes no prompts",): [*ours, "--dit", other],
                             ("--clip-text and --t5 go",): [*ours, "--clip-text", d],
                             ("--prompt and --prompts exclude",): [*ours, "--prompts", "x"],
                             ("has no classes",): [*ours, "--labels", 3],
                             ("finite",): [*ours, "--cfg", "nan"]}.items():
            with refused(*words), patch.dict(sys.modules, transformers=FakeTransformers):
                execute(sample, *flags)
        with refused("trained with another text encoder (words)"), patch.object(
                captions.Words, "identity", "another"):
            execute(sample, *ours)
        for more, steps in (([], 100_000), (["--preset", "tiny"], 800), (["--steps", "5"], 5)):
            assert train_dit.parse(["--captions", *more]).steps == steps
        for words, flags in {("--model XL/1", "2B"): ["--captions", "--model", "XL/1"],
                             ("--model 2B", "XL/1"): ["--model", "2B"],
                             ("--unconditional",): ["--captions", "--unconditional"],
                             ("--val exclude",): ["--captions", "--val", "x"],
                             ("--qk-norm exclude",): ["--captions", "--qk-norm"]}.items():
            with refused(*words):
                train_dit.parse(flags)


def test_flux_vae_from_text():
    """The schedule of t goes by the number of tokens, two by two of FLUX's latents each, in
    training and for pictures; as many of these as prompts."""
    with folder() as d, patch.dict(MMDITS, mini={"dim": 32, "depth": 1, "depth_single": 1,
                                                 "axes": [4, 6, 6]}):
        save_checkpoint(d / "ae.pt", small_flux()[1])
        tokenizer, prompts = ["--tokenizer", d / "ae.pt"], Shapes(n=33).captions
        with recorded(losses, "logit_normal") as times:
            execute(train_dit, *mini_dit(d)[:-4], *tokenizer, "--captions", "--data",
                    write_shards(d / "shards"), "--out", d / "t2i", "--steps", 1)
        assert [shift for (_, shift), _ in times] == [mmdit.time_shift(4)]
        (d / "prompts.txt").write_text("\n".join(prompts))
        with recorded(sample, "time_grid") as grids:
            execute(sample, "--preset", "tiny", *tokenizer, "--dit", sample.last_dit(d / "t2i"),
                    "--prompts", d / "prompts.txt", "--steps", 1, "--out", d / "s.npz")
        assert [shift for (_, shift), _ in grids] == [mmdit.time_shift(4)]
        with np.load(d / "s.npz") as f:
            assert f["arr_0"].shape == (33, 32, 32, 3)


def test_captioned_grid():
    """Each image has its own prompt under it, whole or with dots; the lines of the next row's
    images begin below it."""
    with folder() as d:
        prompts = [".", "Wg " * 99, "W"]
        captions.save_captioned_grid(torch.zeros(5, 3, 16, 16), prompts, d / "grid.png", width=2)
        grid = np.asarray(Image.open(d / "grid.png").convert("L"))
        step = len(grid) // 3
        assert grid.shape == (3 * step, 256) and step > 128
        below = [grid[i // 2 * step:][128:step, i % 2 * 128:][:, :128] for i in range(5)]
        ink = [(cell < 99).sum() for cell in below]
        assert 0 < ink[0] == ink[3] < ink[2] < ink[1] == ink[4], ink
        assert all((cell[-1] == 255).all() for cell in below)  # no letter is cut
        blank = (below[1] == 255).all(axis=1)
        assert (blank[:-1] & ~blank[1:]).sum() == 4, "lines"


def test_guidance_from_text():
    """v = v_null + cfg (v_text - v_null), both parts of the text, each image with its own prompt;
    FLUX's schedule of t."""
    net = random_weights(MMDiT(**SMALL_MMDIT | {"patch": 1, "d": 8, "grid": (2, 2)}))
    text = np.random.default_rng(0).standard_normal((3, 4 * 5 + 7)).astype(np.float32)
    tokenizer, times = small_tokenizer(), [1.0, 0.0]
    images, counts = sample.generate(net, tokenizer, np.arange(4), None, 0, times, text=text,
                                     cfg=3.0)
    assert counts == (1, 1)
    for i in range(4):
        z1 = torch.from_numpy(data.rng(0, "noise", i).standard_normal((8, 2, 2), np.float32))[None]
        with torch.no_grad():
            v, v_null = (net(z1, torch.ones(1), torch.from_numpy(row[None]))
                         for row in (text[i % 2], text[2]))
        z0 = z1 - (v_null + 3 * (v - v_null))
        want = tokenizer.decode(tokenizer.unnormalize(z0))
        assert torch.allclose(images[i:i + 1], want, atol=1e-4)
    t = losses.logit_normal(torch.tensor([0.0, 2.0]), shift=3.0)
    close(t[0].item(), 3 * 0.5 / (1 + 2 * 0.5), 1e-6)
    mu, plain = math.log(3.0), 1 / (1 + math.exp(-2))  # FLUX writes e^mu / (e^mu + 1/t - 1)
    close(t[1].item(), math.exp(mu) / (math.exp(mu) + 1 / plain - 1), 1e-6)


def plain_training(net, batches, lr, beta2, clip, w_cos, ema_decay):
    """AdamW on the paper's objective with w_cos, in plain loops. batches: for each step its
    micro-batches. The weights, their EMA, and each step's row of log.csv (NaN: none)."""
    weights = [p for p in net.parameters() if p.requires_grad]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    ema, rows = [w.detach().clone() for w in weights], []
    for step, micro_batches in enumerate(batches, 1):
        grads, seen, images = [0 for _ in weights], [], []
        for z0, y, normal, z1 in micro_batches:
            t = (1 / (1 + torch.exp(-normal))).view(-1, 1, 1, 1)
            found, u = net((1 - t) * z0 + t * z1, t.flatten(), y), z1 - z0
            errors = ((found - u) ** 2).mean((1, 2, 3))
            mse = errors.mean()
            cosine = ((found * u).sum(1) / found.norm(dim=1) / u.norm(dim=1)).mean()
            loss = mse + w_cos * (1 - cosine)
            own = torch.autograd.grad(loss, weights)
            grads = [g + o / len(micro_batches) for g, o in zip(grads, own)]
            seen.append([loss.item(), mse.item(), 1 - cosine.item()])
            images += zip(t.flatten().tolist(), errors.tolist())
        norm = math.sqrt(sum((g ** 2).sum().item() for g in grads))
        bins = [[e for t, e in images if i <= 5 * t < i + 1] for i in range(5)]
        by_time = [sum(e) / len(e) if e else math.nan for e in bins]
        rows.append([*np.mean(seen, axis=0), norm, *by_time])
        for k, g in enumerate(grads):
            g = g * min(1, clip / norm)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = beta2 * v[k] + (1 - beta2) * g ** 2
            root = (v[k] / (1 - beta2 ** step)).sqrt() + 1e-8
            weights[k].data -= lr * m[k] / (1 - 0.9 ** step) / root
            ema[k] = ema_decay * ema[k] + (1 - ema_decay) * weights[k].detach()
    return weights, ema, rows


def test_generator_against_plain_loops():
    """Two steps of two micro-batches, no flag at its default: weights, EMA and log are those of
    plain loops over the cached latents. sample.py takes the EMA."""
    def planted(*args):
        s, latents = set_up(*args)
        assert same(s.model.state_dict(), s.ema.state_dict()) is None, "a copy at start"
        begun.append(random_weights(copy.deepcopy(s.model)))  # at first gates are shut, v is 0
        s.model.load_state_dict(begun[0].state_dict())
        s.ema.load_state_dict(begun[0].state_dict())
        return s, latents

    def wrapped(module, _):  # in DDP's place; past it the ranks would not share gradients
        return lambda *inputs: passed.append(len(inputs[0])) or module(*inputs)

    begun, passed, set_up = [], [], train_dit.set_up
    with folder() as d, mini_size():
        ours = [*mini_dit(d), "--steps", 2, "--accum", 2, "--log-every", 1, "--seed", 5, "--lr",
                0.01, "--beta2", 0.8, "--clip", 0.5, "--w-cos", 0.3, "--label-drop", 0.4,
                "--ema-decay", 0.7, "--qk-norm", "--out", d / "run"]
        with (patch.object(train_dit, "set_up", planted), patch.object(runs, "wrap", wrapped),
              recorded(runs, "no_sync") as synced, recorded(train_dit, "generate") as grids):
            execute(train_dit, *ours)
        assert [skip for (_, skip), _ in synced] == [True, False] * 2 and passed == [4] * 4
        args = train_dit.parse(list(map(str, ours)))
        images = data.open_folders(args.data, args.val, 1)[0]
        flow = train_dit.FlowData(images, np.load(d / "run" / "latents.npy"), (8, 2, 2), 12, args)
        order = iter(data.ShuffledBatches(24, 8, (5, "order"), accum=2))
        micro = [torch.utils.data.default_collate([flow[i] for i in next(order)]) for _ in range(4)]
        assert parameters(begun[0].blocks[0].attn.q_norm) and (micro[0][1] == 12).any()
        first = [p.detach().clone() for p in begun[0].parameters() if p.requires_grad]
        weights, ema, rows = plain_training(
            begun[0], (micro[:2], micro[2:]), 0.01, 0.8, 0.5, 0.3, 0.7)

        path = d / "run" / "dit_step00000002.pt"
        saved = load_file(path)
        names = [k for k, p in begun[0].named_parameters() if p.requires_grad]
        for part, expected in (("model", weights), ("ema", ema)):
            off, moved = (torch.stack([(x - y).norm() for x, y in zip(pair, expected)]).norm()
                          for pair in ([saved[part][k] for k in names], first))
            assert off < 1e-5 * moved, (part, off / moved)
        for row, expected in zip(rows_of(d / "run"), rows):
            found = [float(value or "nan") for value in row.values()]
            assert np.allclose(found[1:], expected, rtol=1e-4, equal_nan=True), row
        assert rows[0][3] > 0.5, "clipped"
        flags = sample.parse(["--dit", str(path), "--tokenizer", str(d / "tok.pt")])
        assert same(sample.load_pair(flags)[0].state_dict(), saved["ema"]) is None
        # a picture of the EMA at the end, a class a row, without guidance
        (network, _, _, labels, seed, _), (_, evaluations) = grids[0]
        assert same(network.state_dict(), saved["ema"]) is None and seed == 5
        assert evaluations == (20, 0)
        assert labels.tolist() == [*range(12)] * 8


def test_generator_flags():
    """What the flags that the loops above leave alone do, each by its effect."""
    with folder() as d, mini_size(), patch.object(train_dit, "sample_grid") as grid:
        ours, out = [*mini_dit(d), "--steps", 1, "--log-every", 1], d / "out"

        def trained(*flags):
            execute(train_dit, *ours, "--cache", d / "z.npy", "--out", out, "--overwrite", *flags)
            row = rows_of(out)[0]
            saved = load_file(max(out.glob("dit_step*.pt")))
            return saved, float(row["loss"]), float(row["grad_norm"])

        with (recorded(runs, "checkpoint_activations") as checkpointed,
              recorded(train_dit, "open_folders") as opened,
              patch("torch.compile", side_effect=lambda f, **_: f) as compiled):
            saved, loss, norm = trained()
            assert not checkpointed and not compiled.called
            trained("--compile", "--checkpointing", "--val-images", 7)
            assert len(checkpointed) == compiled.call_count == 1
            assert opened[1][0] == (*(str(d / "data" / part) for part in ("train", "val")), 7)
        other = trained("--steps", 3, "--save-every", 2, "--log-every", 3, "--seed", 1)[0]
        moved = [part["model"]["x_embedder.proj.weight"] for part in (saved, other)]
        assert (moved[0] - moved[1]).abs().max() > 0.1, "another start, though lr is 0.002"
        assert [row["step"] for row in rows_of(out)] == ["3"]
        assert [p.name[-4:] for p in sorted(out.glob("*.pt"))] == ["2.pt", "3.pt"]
        drawn = [call[0][2].name[-5:] for call in grid.call_args_list]
        assert drawn == ["1.png", "1.png", "3.png"]
        assert saved["arguments"]["dim"] == 32 and saved["arguments"]["num_classes"] == 12
        assert (d / "z.npy").exists() and not (out / "latents.npy").exists()
        assert trained("--unconditional")[0]["arguments"]["num_classes"] == 0
        (d / "z.npy").unlink()  # --no-cache reads none, and sees the same latents
        fresh = trained("--no-cache")[1:]
        assert np.allclose(fresh, [loss, norm], rtol=2e-3) and not (d / "z.npy").exists()
        assert 0 < abs(trained("--dtype", "bf16")[2] - norm) < 0.02 * norm

        with (patch.object(runs, "setup_ranks", lambda: (1, 2, CPU)),
              recorded(train_dit, "ShuffledBatches") as orders):
            execute(train_dit, *ours, "--accum", 2, "--no-cache", "--out", d / "rank1")
        second = iter(orders[0][1])
        whole = iter(data.ShuffledBatches(24, 8, (0, "order"), accum=2))
        assert [next(second) for _ in range(2)] == [next(whole)[2:] for _ in range(2)]

        first = min((d / "data" / "train").glob("*/*.png"))
        Image.new("RGB", (32, 32)).save(first)  # under the same name
        with refused("z.npy", "pixels"):
            execute(train_dit, *ours, "--cache", d / "z.npy", "--out", d / "again")
        with (patch.object(train_dit, "set_up", side_effect=UserError("seen")) as set_up,
              refused("seen")):
            execute(train_dit, *ours[:2], "--tokenizer", d / "tok.pt", "--size", 32, "--out",
                    d / "shapes")
        assert set_up.call_args[0][3].split == "train"


def test_published_recipes():
    """The preset paper: LightningDiT's training for 80K steps, and its sampler with t turned."""
    for script, published in (
            (train_dit, {"model": "XL/1", "steps": 80_000, "batch_size": 1024,
                         "accum": 1, "lr": 2e-4, "beta2": 0.95, "ema_decay": 0.9999, "clip": 1,
                         "w_cos": 1, "label_drop": 0.1, "qk_norm": False}),
            (sample, {"steps": 250, "method": "euler", "shift": 1 / 0.3, "labels": "balanced",
                      "cfg_interval": (0, 1 - 0.11), "cfg_channels": None, "seed": 0})):
        args = vars(script.parse([]))
        assert {k: args[k] for k in published} == published


def test_workers_open_the_latents():
    """What a worker that is not a fork receives: the path of the memory map, not its content."""
    path, args = TMP / "map.npy", SimpleNamespace(label_drop=0.5, size=32, seed=0)
    latents = np.lib.format.open_memmap(path, "w+", np.float16, (999, 2, 8, 16, 16))
    latents[:] = 3
    latents.flush()
    latents = np.load(path, mmap_mode="r")
    ours = train_dit.FlowData(Shapes(n=999, size=32), latents, (8, 16, 16), 12, args)
    sent = pickle.dumps(ours)
    assert latents.nbytes > 8e6 and len(sent) < 1e4
    theirs = pickle.loads(sent)
    assert isinstance(theirs.latents, np.memmap)
    assert all(same(ours[0, i], theirs[0, i]) is None for i in (0, 998))
    fresh = train_dit.FlowData(Shapes(n=9, size=32), None, (8, 2, 2), 12, args)
    assert same(fresh[1, 5], pickle.loads(pickle.dumps(fresh))[1, 5]) is None


def test_loss_by_time():
    """The squared error in five equal bins of t."""
    t = torch.tensor([0.0, 1.0, 0.25, 0.3])
    sums, numbers = train_dit.by_time(torch.tensor([1.0, 2, 4, 8]), t)
    assert sums.tolist() == [1, 12, 0, 0, 2] and numbers.tolist() == [1, 2, 0, 0, 1]


def test_updates_against_loops():
    """Two updates of each script: the fused optimiser, the clip, the EMA and zero_grad, against
    loops over single numbers; what is frozen stays as it is."""
    conv, last = torch.nn.Conv2d(2, 3, 2), torch.nn.Conv2d(3, 1, 1)
    net = torch.nn.Sequential(conv, torch.nn.GroupNorm(1, 3), frozen(last))
    net.to(memory_format=torch.channels_last)
    for script, adam, (b1, b2), clip in ((tt, torch.optim.Adam, (0.5, 0.9), math.inf),
                                         (train_dit, torch.optim.AdamW, (0.9, 0.95), 0.1)):
        model, ema = copy.deepcopy(net), frozen(copy.deepcopy(net))
        trained = [p for p in model.parameters() if p.requires_grad]
        averaged = list(ema.parameters())[:len(trained)]
        opt = adam(trained, 0.01, betas=(b1, b2), weight_decay=0, fused=True)
        s = SimpleNamespace(tokenizer=model, model=model, ema=ema, trained=trained, opt=opt,
                            opt_g=opt, opt_d=Mock())
        args = SimpleNamespace(clip=clip, ema_decay=0.7)

        def numbers(tensors):
            return torch.cat([p.detach().flatten() for p in tensors]).tolist()

        w = numbers(trained)
        e, m, v = list(w), [0.0] * len(w), [0.0] * len(w)
        for t in (1, 2):
            for p in trained:
                p.grad = torch.randn_like(p)
            g = numbers(p.grad for p in trained)
            script.update(s, args)
            scale = min(1, clip / math.sqrt(sum(x * x for x in g)))
            for i, x in enumerate(g):
                m[i] = b1 * m[i] + (1 - b1) * scale * x
                v[i] = b2 * v[i] + (1 - b2) * (scale * x) ** 2
                w[i] -= 0.01 * m[i] / (1 - b1 ** t) / (math.sqrt(v[i] / (1 - b2 ** t)) + 1e-8)
                e[i] = 0.7 * e[i] + 0.3 * w[i]
            for found, expected in ((numbers(trained), w), (numbers(averaged), e)):
                assert np.allclose(found, expected, rtol=1e-5, atol=1e-7)
            assert all(p.grad is None for p in trained)
        for part in (model, ema):
            assert torch.equal(part[2].weight, last.weight) and torch.equal(part[2].bias, last.bias)


# ---------------------------------------------------------------------------------------- sample.py

def test_time_grid():
    """From 1 to 0 in equal steps, or shifted by LightningDiT's rule, with more steps near noise."""
    assert np.allclose(sample.time_grid(4), [1, 0.75, 0.5, 0.25, 0])
    assert sample.time_grid(7, 1.0) == sample.time_grid(7)
    s, t = 0.3, np.linspace(0, 1, 11)  # LightningDiT's direction, its rule
    shifted = sample.time_grid(10, 1 / s)
    assert np.allclose(1 - np.array(shifted), s * t / (1 + (s - 1) * t))
    assert shifted[0] == 1 and shifted[-1] == 0 and shifted[5] > 0.5
    # with a time above 1 guidance would be off there
    assert all(max(sample.time_grid(2, shift / 100)) == 1 for shift in range(1, 1001))


def test_samplers():
    """Along a straight path any grid arrives. For data N(m, s^2) the velocity E[z1 - z0 | z_t] and
    its flow, z_0 = m + s z_1, have closed forms: the error is of order 1 or 2."""
    z0, z1 = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for method in ("euler", "heun"):
        for shift in (1.0, 3.0):
            times = sample.time_grid(7, shift)
            z = sample.integrate(lambda z, t: z1 - z0, z1, times, method)
            assert (z - z0).abs().max() < 1e-12

    m, s, noise = 1.5, 0.4, torch.linspace(-2, 2, 9, dtype=torch.float64)

    def velocity(z, t):
        var = (1 - t) ** 2 * s ** 2 + t ** 2
        return -m + (t - (1 - t) * s ** 2) / var * (z - (1 - t) * m)

    def error(n, method):
        z = sample.integrate(velocity, noise, sample.time_grid(n), method)
        return (z - (m + s * noise)).abs().max().item()

    for method, order in (("euler", 1), ("heun", 2)):
        found = math.log2(error(64, method) / error(128, method))
        assert abs(found - order) < 0.15, (method, found)


def test_guidance():
    """v_null + cfg (v - v_null), in an interval of t, on all channels or the first; evaluations of
    the network are counted."""
    class Network:
        num_classes, batches = 5, []

        def __call__(self, z, t, y):
            self.batches.append(len(z))
            return z * (y.view(-1, 1, 1, 1) + 1.0) + t.view(-1, 1, 1, 1)

    net, z, y = Network(), torch.randn(2, 4, 2, 2), torch.tensor([0, 2])
    half = torch.full((2,), 0.5)
    v, v_null = net(z, half, y), net(z, half, torch.tensor([5, 5]))
    guided = v_null + 3 * (v - v_null)
    net.batches.clear()
    assert torch.equal(sample.Velocity(net, y)(z, 0.5), v) and net.batches == [2]
    velocity = sample.Velocity(net, y, cfg=3.0, interval=(0.1, 0.5))
    assert torch.allclose(velocity(z, 0.5), guided) and net.batches == [2, 4]
    velocity(z, 0.51), velocity(z, 0.05), velocity(z, 0.1)
    assert net.batches == [2, 4, 2, 2, 4]
    assert (velocity.conditional, velocity.unconditional) == (4, 2)
    three = sample.Velocity(net, y, cfg=3.0, channels=3)(z, 0.5)
    assert torch.allclose(three[:, :3], guided[:, :3]) and torch.equal(three[:, 3:], v[:, 3:])
    for method, evaluations in (("euler", 7), ("heun", 14)):  # N steps are N intervals
        velocity = sample.Velocity(net, y, cfg=1.0)
        sample.integrate(velocity, z, sample.time_grid(7), method)
        assert (velocity.conditional, velocity.unconditional) == (evaluations, 0)


def test_labels():
    """Balanced, random (image i's label is its own), or a list that is repeated."""
    assert sample.choose_labels("balanced", 3, 7, 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sample.choose_labels("2,0", 3, 5, 0).tolist() == [2, 0, 2, 0, 2]
    few, many = (sample.choose_labels("random", 10, n, 1) for n in (20, 200))
    assert (many[:20] == few).all() and set(many) == set(range(10))
    assert sample.choose_labels("balanced", 0, 5, 0) is None
    pets = ["0", "cat", "dog"]
    assert sample.choose_labels("dog,0,cat", 3, 4, 0, pets).tolist() == [2, 0, 1, 2]
    assert sample.name_labels(np.array([2, 1, 2]), pets) == "1 = cat, 2 = dog"
    assert sample.name_labels(np.arange(3), pets, 2) == "0 = 0, 1 = cat and 1 more"
    with refused("'dgo'", "close to it: dog"):
        sample.choose_labels("dgo", 3, 5, 0, pets)
    for spec in ("3", "0,-1", "dog"):
        with refused("--labels", spec, "0 to 2"):
            sample.choose_labels(spec, 3, 5, 0)
    assert "has no classes" in error_of(sample.choose_labels, "1", 0, 5, 0)


def test_sample_grid():
    """A class a row where all have as many images, else eight a row."""
    images, labels = torch.arange(24.0).view(24, 1, 1, 1), np.arange(24) % 3
    rows = sample.grid_rows(images, labels)
    assert [row.flatten().tolist() for row in rows] == [list(range(k, 24, 3)) for k in range(3)]
    assert [len(row) for row in sample.grid_rows(images[:23], labels)] == [8, 8]


def test_sample_of_ranks():
    """Two ranks, here threads, draw every image once between them."""
    def draw(batch):
        drawn.extend(batch)
        return torch.tensor(batch).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 127.5 - 1

    drawn, wait = [], threading.Barrier(2, timeout=20).wait
    with folder() as d, patch.object(runs, "barrier", wait), ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: sample.write_pngs(d, draw, 7, 2, {}, False, rank, 2), (0, 1)))
        assert sorted(drawn) == list(range(7))
        for i in range(7):
            assert (np.array(Image.open(d / f"{i:06d}.png")) == i).all()


def test_images_do_not_depend_on_the_batch():
    """Image i is a function of the seed and i, whatever is drawn beside it."""
    tokenizer, pictures = small_tokenizer(), []
    dit = random_weights(small_dit(d=8, num_classes=3, grid=(1, 2)))
    labels, times = sample.choose_labels("random", 3, 64, 5), sample.time_grid(3)
    for size in (1, 7, 64):
        images = [sample.generate(dit, tokenizer, np.array(batch), labels, 5, times, cfg=2.0)[0]
                  for batch in files.ranges(64, size)]
        pictures.append(torch.cat(images))
    first, *others = pictures
    scale = first.abs().max()
    assert all((p - first).abs().max() < 1e-4 * scale for p in others)
    assert (first[0] - first[1]).abs().max() > 1e-2 * scale  # and it does depend on i

    # large ones are decoded a few at once
    still = Mock(side_effect=lambda z, t, y: 0 * z, num_classes=0, extra=0,
                 arguments={"grid": (128, 128)})
    large = SimpleNamespace(latent_mean=torch.zeros(1), d=1, factor=8, unnormalize=lambda z: z,
                            decode=Mock(side_effect=lambda z: z))
    images, _ = sample.generate(still, large, np.arange(5), None, 0, [1.0, 0.0])
    assert [len(call.args[0]) for call in large.decode.call_args_list] == [2, 2, 1]
    noise = data.rng(0, "noise", 4).standard_normal((1, 128, 128), np.float32)
    assert torch.equal(images[4], torch.from_numpy(noise))


def test_official_dit():
    """Only names and shapes to go by; strict; and the other time direction."""
    dit = random_weights(small_dit(qk_norm=True, patch=2, grid=[4, 4]))
    state, path = dit.state_dict(), TMP / "dit.pt"
    z, y = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
    other = prefixed("module.", {k: v + 1 for k, v in state.items()})
    for content in (state, {"model": prefixed("_orig_mod.module.", state)},
                    {"model": other, "ema": state}):
        torch.save(content, path)
        loaded, content = sample.load_dit(path)
        assert "recipe" not in content and loaded.arguments == dit.arguments
        assert same(loaded.state_dict(), state) is None
    with torch.no_grad():
        v = sample.Velocity(loaded, y, time="lightning")(z, 0.3)
        assert torch.equal(v, -dit(z, torch.tensor([0.7, 0.7]), y))
    del state["blocks.1.attn.k_norm.weight"]
    torch.save({"ema": state}, path)
    with refused("dit.pt", "k_norm"):
        sample.load_dit(path)


def plain_samples(dit, tokenizer, n=5, seed=0, steps=2, shift=1.0, heun=False, cfg=3.0,
                  interval=(0, 1), channels=8, labels=(0, 1, 2), lightning=False, mean=None,
                  std=None):
    """uint8 (n, H, W, 3) by plain loops from sample.py's docstring."""
    def velocity(z, t):
        def v(y):
            times = torch.full((n,), float(1 - t if lightning else t))
            return (-1 if lightning else 1) * dit(z, times, y)

        found = v(y)
        if interval[0] <= t <= interval[1]:
            guided = (1 - cfg) * v(torch.full_like(y, 3)) + cfg * found
            found = torch.cat([guided[:, :channels], found[:, channels:]], 1)
        return found

    z = torch.from_numpy(np.stack([data.rng(seed, "noise", i).standard_normal((8, 2, 1), np.float32)
                                   for i in range(n)]))
    y = torch.tensor([labels[i % len(labels)] for i in range(n)])
    for k in range(steps, 0, -1):
        t, t_next = (shift * a / (1 + (shift - 1) * a) for a in (k / steps, (k - 1) / steps))
        v = velocity(z, t)
        if heun:
            v = (v + velocity(z - (t - t_next) * v, t_next)) / 2
        z = z - (t - t_next) * v
    mean = tokenizer.latent_mean if mean is None else mean
    std = tokenizer.latent_std if std is None else std
    x = tokenizer.decode(z * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).permute(0, 2, 3, 1)
    return np.floor((x.numpy() + 1) * 127.5 + 0.5).clip(0, 255)


@torch.no_grad()
def test_sample_flags():
    """Each flag by its effect on the images, beside all flags before it, against plain loops. The
    images of one value do not serve for another."""
    tokenizer = small_tokenizer()
    dit = random_weights(small_dit(depth=1, d=8, num_classes=3, grid=(2, 1)))
    stats = {"mean": torch.full((8,), 0.7), "std": torch.full((1, 8, 1, 1), 2.0)}
    drawn = [int(data.rng(4, "label", i).integers(3)) for i in range(5)]
    with folder() as d, patch.object(sample, "load_tokenizer", lambda *_: copy.deepcopy(tokenizer)):
        torch.save(stats, d / "stats.pt")
        flags, changed, last = [], {}, 0
        ours = ["--tokenizer", save_tokenizer(tokenizer, d / "tok.pt"), "--dit",
                save_dit(dit, d / "dit.pt", tokenizer), "--preset", "tiny", "--steps", 2, "-n", 5,
                "--dtype", "fp32", "--out", d / "a.npz"]
        for more, change in (
                ([], {}),
                (["--seed", 4], {"seed": 4}),
                (["--labels", "random"], {"labels": drawn}),
                (["--labels", "2,0"], {"labels": (2, 0)}),
                (["--steps", 3], {"steps": 3}),
                (["--shift", 3], {"shift": 3}),  # times 1, .857, .6, 0
                (["--cfg", 1.5], {"cfg": 1.5}),
                (["--cfg-interval", 0.7, 1], {"interval": (0.7, 1)}),
                (["--cfg-interval", 0, 0.7], {"interval": (0, 0.7)}),
                (["--cfg", 5], {"cfg": 5}),
                (["--cfg-channels", 3], {"channels": 3}),
                (["--method", "heun"], {"heun": True}),
                (["--time", "lightning"], {"lightning": True}),
                (["--latent-stats", d / "stats.pt"], stats),
                (["--cfg", 1], {"cfg": 1})):
            flags, changed = flags + more, changed | change
            if change is stats:  # the generator's must be the same
                theirs = copy.deepcopy(tokenizer)
                files.ensure_statistics(theirs, "", d / "stats.pt")
                save_dit(dit, d / "dit.pt", theirs)
            want = plain_samples(dit, tokenizer, **changed)
            assert np.abs(want - last).max() > 3, more
            execute(sample, *ours, *flags, "--overwrite")
            last = np.load(d / "a.npz")["arr_0"].astype(float)
            assert np.abs(last - want).max() <= 1, more
        with (recorded(sample, "generate") as calls,
              patch("torch.compile", side_effect=lambda f, **_: f) as compiled):
            for out, compile in ((d / "b", []), (d / "b.npz", ["--compile"])):
                assert not compiled.called
                execute(sample, *ours, *flags, *compile, "--dtype", "bf16", "--batch-size", 2,
                        "--out", out)
            assert compiled.call_count == len(dit.blocks)
        assert [len(images) for _, (images, _) in calls] == [2, 2, 1] * 2
        bf16 = calls[0][1][0]
        assert bf16.dtype == torch.float32, "the decoder's"
        assert 1 < np.abs(data.to_uint8(bf16) - last[:2]).max() < 30

        record, = d.glob("a.npz*.json")
        assert json.loads(record.read_text())["latent_stats"] == files.sha256(d / "stats.pt")
        with refused("images 0 to 4 is not finite", "--cfg"):
            execute(sample, *ours, *flags, "--cfg", 1e30, "--overwrite")
        with refused("--shift", "finite"):
            execute(sample, *ours, "--shift", "inf")
        save_dit(random_weights(dit, 1), d / "dit.pt", theirs)
        with refused("a.npz", "generator"):
            execute(sample, *ours, *flags)
        for step in (4, 12):
            (d / f"dit_step{step:08d}.pt").touch()
        assert sample.last_dit(d).name == "dit_step00000012.pt"


def test_sample_files():
    """npz, folder and grid hold the same images; a stop and a second call complete them; other
    arguments and a second process are refused."""
    tokenizer = small_tokenizer()
    dit = random_weights(small_dit(depth=1, d=8, num_classes=3, grid=(2, 1)))
    with folder() as d:
        ours = ["--tokenizer", save_tokenizer(tokenizer, d / "tok.pt"), "--dit",
                save_dit(dit, d / "dit.pt", tokenizer), "--preset", "tiny", "--steps", 2,
                "--num", 5, "--dtype", "fp32"]
        npz, pngs = d / "s.npz", d / "pngs"
        execute(sample, *ours, "--out", npz, "--batch-size", 2)
        with np.load(npz) as f:
            images = f["arr_0"]
        assert images.shape == (5, 32, 16, 3) and images.dtype == np.uint8
        execute(sample, *ours, "--out", pngs, "--batch-size", 5)
        (pngs / "000003.png").unlink()
        execute(sample, *ours, "--out", pngs, "--grid", d / "grid.png")
        found = sorted(pngs.glob("*.png"))
        assert [f.name for f in found] == [f"{i:06d}.png" for i in range(5)]
        again = np.stack([np.array(Image.open(f)) for f in found])
        assert np.abs(again.astype(int) - images).max() <= 1
        grid = np.array(Image.open(d / "grid.png")).astype(int)
        assert np.abs(grid - np.concatenate(images, axis=1)).max() <= 1

        (d / "s.npz.parts").mkdir()
        for out, held in ((npz, d / "s.npz.parts" / ".lock"), (pngs, pngs / ".lock")):
            if files.fcntl:
                with files.lock(held, ""), refused("another process", out.name):
                    execute(sample, *ours, "--out", out)
            with refused(out.name, "seed 0 -> 1"):
                execute(sample, *ours, "--out", out, "--seed", 1)
        # --overwrite deletes what was made there, and nothing of the user's
        users = {"cat.png", "000007.png"}
        for name in users:
            (pngs / name).touch()
        execute(sample, *ours, "--out", pngs, "--overwrite", "--seed", 1, "--num", 3)
        assert {p.name for p in pngs.glob("*.png")} == {
            "000000.png", "000001.png", "000002.png", *users}
        assert not np.array_equal(Image.open(pngs / "000000.png"), again[0])
        (pngs / "000003.png").write_text("the user's")
        with refused("000003.png is none of the 3 images"):
            execute(sample, *ours, "--out", pngs, "--seed", 1)
        (d / "mine").mkdir()
        (d / "mine" / "cat.png").touch()
        with refused("mine was not made by this script"):
            execute(sample, *ours, "--out", d / "mine", "--overwrite")
        assert (d / "mine" / "cat.png").exists()
        (pngs / "sampling.json").write_text('{"seed": 0')
        with refused("sampling.json"):
            execute(sample, *ours, "--out", pngs)


def test_sample_errors():
    """Each mistake is one line: a generator and a tokenizer must belong together."""
    tokenizer, dit = small_tokenizer(), small_dit(depth=1, d=8, num_classes=3, grid=(2, 2))
    with folder() as d:
        ours = ["--preset", "tiny", "--dit", save_dit(dit, d / "dit.pt", tokenizer),
                "--tokenizer", save_tokenizer(tokenizer, d / "tok.pt")]
        four = save_tokenizer(small_tokenizer(d=4), d / "4.pt")
        other = save_tokenizer(small_tokenizer(seed=1), d / "other.pt")
        tokenizer.latent_std.zero_()
        blank = save_tokenizer(tokenizer, d / "blank.pt")
        torch.save({"ema": dit.state_dict()}, d / "official.pt")
        torch.save({"mean": torch.zeros(3)}, d / "stats.pt")
        for words, flags in {
                ("--steps",): ["--steps", 0],
                ("LO <= HI", "0.9 0.1"): ["--cfg-interval", 0.9, 0.1],
                ("--labels 3", "0 to 2"): ["--labels", 3],
                ("missing.pt", "train_tokenizer.py"): ["--tokenizer", d / "missing.pt"],
                ("missing.pt",): ["--dit", d / "missing.pt"],
                ("--out cat.png", "--grid cat.png"): ["--out", "cat.png"],
                ("4 latent channels", "takes 8"): ["--tokenizer", four],
                ("another tokenizer",): ["--tokenizer", other],
                ("--time",): ["--dit", d / "official.pt"],
                ("blank.pt", "no latent statistics"): [
                    "--dit", d / "official.pt", "--time", "paper", "--tokenizer", blank],
                ("stats.pt", "8 channels"): ["--latent-stats", d / "stats.pt"]}.items():
            with refused(*words):
                execute(sample, *ours, *flags)


# ------------------------------------------------------------------------------------------- fid.py

def test_frechet_closed_forms():
    """Shifted sets, diagonal covariances, and two dimensions that do not commute."""
    r = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=r).double() @ torch.randn(8, 8, generator=r).double()
    a, shifted = (fid.FeatureStatistics.of(v) for v in (x, x + torch.arange(8.)))
    close(fid.frechet(a, a), 0)
    close(fid.frechet(a, shifted), sum(i * i for i in range(8)), 1e-6)
    # sum of (s1 - s2)^2
    one = gaussian([0., 0., 0.], np.diag([1., 4., 9.]))
    two = gaussian([1., 0., 0.], np.diag([4., 4., 1.]))
    close(fid.frechet(one, two), 1 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    # Tr (S1 S2)^(1/2) = sqrt(Tr S1 S2 + 2 sqrt(det S1 S2))
    one = gaussian([0., 0.], [[2., 1.], [1., 3.]])
    two = gaussian([0., 0.], [[1., -.5], [-.5, 4.]])
    product = one.sigma @ two.sigma
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    close(fid.frechet(one, two), (one.sigma.trace() + two.sigma.trace() - 2 * root).item())


def test_frechet_of_few_images():
    """With n <= D images the problem is n x n: the same distance as by D x D."""
    def without_rows(statistics):
        return gaussian(statistics.mu.numpy(), statistics.sigma.numpy())

    r = torch.Generator().manual_seed(1)
    few, many = torch.randn(20, 64, generator=r), 2 * torch.randn(300, 64, generator=r)
    a, b, c = (fid.FeatureStatistics.of(x) for x in (few, many, few[:7] + 1))
    assert a.rows is not None and b.rows is None
    by_rows = fid.frechet(a, b)
    assert by_rows == fid.frechet(b, a)
    close(by_rows, fid.frechet(without_rows(a), b), 1e-6)
    close(fid.frechet(a, c), fid.frechet(without_rows(c), a), 1e-6)  # both sets few
    close(fid.frechet(a, a), 0)


def test_streaming_covariance():
    """Batch by batch it is that of the whole, far from zero, where E[xx'] - mm' would lose it."""
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(2)).double() + 1e5
    statistics = fid.FeatureStatistics(100, 5)
    for index in torch.arange(100).split(7):  # a last batch of 2
        statistics.add(x[index], index)
    statistics.finish()
    assert torch.allclose(statistics.mu, x.mean(0), rtol=1e-14)
    assert torch.allclose(statistics.sigma, torch.cov((x - 1e5).T), rtol=1e-9)


def test_precision_recall_by_hand():
    """Points on a line."""
    ref = torch.tensor([[0.], [1.], [2.], [3.]])  # with k = 1 every ball has radius 1
    samples = torch.tensor([[3.5], [4.], [4.5], [10.]])  # radii .5 .5 .5 5.5
    # 3.5 and 4 (on the edge) lie in the ball of 3; of the reference only 3 lies in one, that of 3.5
    assert fid.precision_recall(ref, samples, k=1) == (0.5, 0.25)
    assert fid.precision_recall(ref, ref, k=3) == (1.0, 1.0)
    assert fid.precision_recall(ref, ref + 100, k=3) == (0.0, 0.0)
    x = torch.randn(100, 200, generator=torch.Generator().manual_seed(0)).abs()
    x[:30] = x[0]  # more than k equal images: their balls have radius 0
    rounding = 1 + 1e-7 * torch.randn(100, 200, generator=torch.Generator().manual_seed(1))
    for again in (x, x.flip(0), torch.cat([x, x[:50]]), x * rounding):
        assert fid.precision_recall(x, again) == fid.precision_recall(again, x) == (1.0, 1.0)
    ones = torch.ones(5, 1)
    assert fid.precision_recall(ones, ones + 1e-4) == (0.0, 0.0)  # near, and not equal


def test_kid_by_hand():
    """Two points a side: within k = 1; between the sets 1.5^3, 1, 1.5^3, 1. Subsets are seeded."""
    x, y = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[1., 1.], [0., 0.]])
    assert fid.kid(x, y) == (1 + 1 - 2 * (1.5 ** 3 + 1) / 2, 0, 2)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    assert fid.kid(x, x + 1, size=10) == fid.kid(x, x + 1, size=10)
    assert fid.kid(x, x + 1, size=10) != fid.kid(x, x + 1, size=10, seed=1)
    assert fid.kid(torch.rand(1010, 2), torch.rand(1020, 2), subsets=1)[2] == 1000


def test_inception_score_closed_forms():
    """One-hot predictions of K classes: K. Equal ones: 1. ADM's chunks are in file order,
    torch-fidelity's shuffled."""
    close(fid.inception_score(100 * torch.eye(10).repeat(20, 1))[0], 10, 1e-6)
    close(fid.inception_score(torch.zeros(50, 10))[0], 1)
    by_class = 100 * torch.eye(2).repeat_interleave(5000, 0)  # each chunk of 5000 is one class
    close(fid.inception_score(by_class)[0], 1, 1e-6)
    close(fid.inception_score(by_class, splits=4)[0], 2, 1e-2)
    two = torch.cat([100 * torch.eye(2).repeat_interleave(2500, 0), torch.zeros(5000, 2)])
    assert np.allclose(fid.inception_score(two), (1.5, 0.5))  # 2 and 1


def test_resize_tf1_by_hand():
    """TensorFlow 1's rule: source positions without a half-pixel shift, no averaging."""
    def row(values, size):
        image = torch.tensor(values).view(1, 1, 1, -1).expand(1, 1, 3, -1)
        return fid.resize_tf1(image, size)[0, 0, 0].tolist()

    assert row([0., 10.], 4) == [0, 5, 10, 10]  # 0 .5 1 1.5: the last beyond the last pixel
    assert row([1., 2., 3., 4.], 2) == [1, 3]  # 0 2
    assert row([0., 2., 6.], 2) == [0, 4]  # 0 1.5
    image = torch.arange(299. * 299).view(1, 1, 299, 299)
    assert torch.equal(fid.resize_tf1(image), image)
    rows = fid.resize_tf1(torch.tensor([[0., 10.], [20., 30.]])[None, None], 4)[0, 0, :, 0]
    assert rows.tolist() == [0, 10, 20, 20]


def test_inception():
    """Its names, sizes and values are torchvision's network with TensorFlow's pools, from a file;
    the two resize rules; where the features come from."""
    net = fid.Inception()
    assert parameters(net) == 23_850_960
    theirs = torchvision.models.Inception3(1008, aux_logits=False, init_weights=False).eval()
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # nothing zero or one, and nothing vanishes
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.2, 0.4)
            layer.bias.data.normal_(0, 0.1)
    state = theirs.state_dict()
    ours = net.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in state.items()}
    with folder() as d:  # the official file is of 2018
        torch.save({k: v for k, v in state.items() if "num_batches" not in k}, d / "i.pth")
        net, _ = fid.load_inception(d / "i.pth")

    def pool(x, kernel_size, stride, padding, count_include_pad=False):
        pools.append(x.shape[1])  # the last is Mixed_7c's
        return (F.max_pool2d(x, 3, 1, 1) if len(pools) == 9 else
                average(x, 3, 1, 1, count_include_pad=False))

    pools, average, seen = [], F.avg_pool2d, {}
    for name in ("Mixed_6d", "fc"):
        getattr(theirs, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    x = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    with torch.no_grad(), patch.object(F, "avg_pool2d", pool):
        logits = theirs((x.float() - 128) / 128)
    out = net(x)
    spatial = seen["Mixed_6d"][1][:, :7].permute(0, 2, 3, 1).flatten(1)  # branch1x1 first; HWC
    for name, want in (("pool", seen["fc"][0]), ("spatial", spatial),
                       ("logits", logits - theirs.fc.bias)):
        assert out[name].shape == (1, net.dims[name]) and want.std() > 1e-3
        assert (out[name] - want).norm() < 1e-4 * want.norm(), name

    def stop(_, args):
        entered.append(args[0])
        raise RuntimeError("entered")

    entered = []
    net.Conv2d_1a_3x3.register_forward_pre_hook(stop)
    row = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
    wide = torch.from_numpy(row).expand(1, 3, 5, -1)
    half_pixel = np.interp((np.arange(299) + 0.5) * 400 / 299 - 0.5, np.arange(400), row)
    corner = np.interp(np.arange(299) * 400 / 299, np.arange(400), row)
    for rule, want in (("torch", half_pixel / 127.5 - 1), ("tf1", (corner - 128) / 128)):
        with refused("entered", kind=RuntimeError):
            net(wide, rule)
        assert np.allclose(entered[-1][0, 1, 7], want, atol=1e-4), rule


def test_dinov2_features():
    """cls after the final norm, of PIL's bicubic resize to 224 px with DINOv2's mean and std."""
    encoder = random_weights(DINOv2(dim=64, depth=1, grid=5))
    img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    small = np.asarray(img.resize((70, 70), Image.BICUBIC), float) / 255
    small = (small - [.485, .456, .406]) / [.229, .224, .225]
    with torch.no_grad():
        cls, _ = encoder(torch.from_numpy(small).permute(2, 0, 1)[None].float())
        found = fid.DINOv2Features(encoder)(data.to_pixels(img)[None])["pool"]
    assert torch.allclose(found, cls, atol=1e-5)
    assert fid.DINOv2Features(DINOv2(dim=64, depth=0)).side == 224


def plain_ssim(x, y):
    """SSIM of two channels (H, W) of range 1, by a loop over the windows."""
    i = np.arange(11) - 5
    w = np.exp(-(i[:, None] ** 2 + i ** 2) / (2 * 1.5 ** 2))
    w, values = w / w.sum(), []
    for r, c in np.ndindex(x.shape[0] - 10, x.shape[1] - 10):
        a, b = x[r:r + 11, c:c + 11], y[r:r + 11, c:c + 11]
        ma, mb = (w * a).sum(), (w * b).sum()
        va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
        cov = (w * (a - ma) * (b - mb)).sum()
        values.append((2 * ma * mb + 0.01 ** 2) * (2 * cov + 0.03 ** 2)
                      / ((ma ** 2 + mb ** 2 + 0.01 ** 2) * (va + vb + 0.03 ** 2)))
    return np.mean(values)


def test_psnr_ssim():
    """A tenth of the range is 20 dB, a hundredth 40, image by image; SSIM against a loop."""
    x = torch.zeros(2, 3, 12, 14)
    off = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert torch.allclose(fid.psnr(x, x + off), torch.tensor([20.0, 40.0]).double(), atol=1e-5)
    x = torch.rand(2, 3, 12, 14) * torch.tensor([0.1, 2]).view(2, 1, 1, 1) - 1  # dark, and bright
    y = (x + 0.1 * torch.randn(x.shape)).clamp(-1, 1)
    for low in (-1, 0):  # 0: the values as they are, whose means lie around it
        by_hand = [np.mean([plain_ssim(*((c.double().numpy() - low) / 2 for c in pair))
                            for pair in zip(*images)]) for images in zip(x, y)]
        assert np.allclose(losses.ssim(x, y, signed=low == 0), by_hand, atol=1e-9)


def test_latent_statistics():
    """Of all images and positions; the probe's features are an image's means; its label beside
    them, of a random choice."""
    tokenizer, shapes = small_tokenizer(), Shapes(n=24, size=32)
    x = torch.stack([data.to_tensor(shapes.pixels(i)) for i in range(24)])
    z, tokens = tokenizer.encode(x), tokenizer.features(x).mean(1)
    found = fid.encode_images(tokenizer, shapes, 32, 24, 0, CPU, batch_size=7)
    for name, want in (("latents", z.mean((2, 3))), ("tokens", tokens),
                       ("labels", torch.tensor(shapes.labels)), ("latent_mean", z.mean((0, 2, 3))),
                       ("latent_std", z.std((0, 2, 3), correction=0))):
        assert torch.allclose(getattr(found, name), want, atol=1e-5), name
    some = fid.encode_images(tokenizer, shapes, 32, 12, 0, CPU).labels
    assert 3 < len(set(some.tolist())) < 12, "not the first"


def test_linear_probe():
    """The optimum of softmax regression with weight decay on features of the train set's mean and
    variance; two Gaussians at +-1, where Bayes' accuracy is Phi(1) = 84.1 %."""
    y = torch.arange(300) % 3
    x = F.one_hot(y, 3) * 100.0 + torch.randn(300, 3)
    assert fid.linear_probe(x, y, x + torch.randn(300, 3), y) == 100
    assert fid.linear_probe(torch.zeros(300, 2), y, torch.zeros(300, 2), y) < 34
    x = (x * torch.tensor([0.001, 1, 30]) + 5) + 40 * torch.randn(300, 3)
    with recorded(torch.nn, "Linear") as made:
        many = x[:200].repeat_interleave(330, 0), y[:200].repeat_interleave(330)
        accuracy = fid.linear_probe(*many, x[200:], y[200:])
    w, b = (p.detach().double().requires_grad_() for p in made[0][1].parameters())
    mean, std = x[:200].mean(0), x[:200].std(0, correction=0)
    x = ((x - mean) / std).double()
    loss = F.cross_entropy(x[:200] @ w.T + b, y[:200]) + 1e-4 / 2 * (w ** 2).sum()
    assert all(g.abs().max() < 2e-5 for g in torch.autograd.grad(loss, (w, b)))
    right = ((x[200:] @ w.T + b).argmax(1) == y[200:]).sum().item()
    close(accuracy, right, 1e-6)  # of 100
    assert right < 100
    y = torch.arange(20000) % 2
    x = torch.randn(20000, 1) + (2.0 * y - 1)[:, None]
    state = torch.get_rng_state()
    assert abs(fid.linear_probe(x[:10000], y[:10000], x[10000:], y[10000:]) - 84.1) < 1.2
    assert torch.equal(state, torch.get_rng_state()), "it draws nothing"


def figures(*argv, script=fid):
    """Runs fid.py on the command line's arguments; metric -> value."""
    with folder() as d:
        execute(script, *argv, "--workers", 0, "--json", d / "figures.json")
        found = json.loads((d / "figures.json").read_text())["figures"]
    return {f["metric"]: f["value"] for f in found}


def write_images(root, n=12, size=64, seed=0):
    """n PNG files in two class folders; returns them as an array, in the order of their names."""
    images = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    images[::2, :size // 2] = 30 * seed
    for i, image in enumerate(images):
        path = root / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return np.concatenate([images[::2], images[1::2]])


class Colours(torch.nn.Module):
    """In place of Inception: features of few dimensions, another scale under another rule."""

    def __init__(self):
        super().__init__()
        self.dims = {"pool": 3, "spatial": 2, "logits": 4}

    def forward(self, images, resize="tf1"):
        x = images.float() / (255 if resize == "tf1" else 100)
        return {"pool": x.mean((2, 3)), "spatial": x[:, :2, 0, 0], "logits": 3 * x[:, 0, -1, :4]}

    def of(self, images, resize="tf1"):
        """Of uint8 (N, H, W, 3), as fp64 arrays."""
        found = self(torch.from_numpy(images).permute(0, 3, 1, 2), resize)
        return {k: v.double().numpy() for k, v in found.items()}


def plain_frechet(a, b):
    s1, s2 = (np.cov(x.T) for x in (a, b))
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root


def plain_precision(ref, samples):
    """The share of samples that lie in a ball: k = 3."""
    reach = [sorted(np.linalg.norm(ref - r, axis=1))[3] for r in ref]
    return np.mean([any(np.linalg.norm(s - r) <= d for r, d in zip(ref, reach)) for s in samples])


def plain_kid(ref, samples, seed):
    """Of each of 100 subsets of the smaller set's size, by a loop over the pairs of images."""
    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    size, r, values = min(len(ref), len(samples)), np.random.RandomState(seed), []
    for _ in range(100):
        y, x = (s[r.choice(len(s), size, replace=False)] for s in (samples, ref))
        within = [k(s[i], s[j]) for s in (x, y) for i in range(size) for j in range(size) if i != j]
        values.append(2 * np.mean(within) - 2 * np.mean([k(a, b) for a in x for b in y]))
    return values


def plain_inception_score(logits):
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def test_fid_figures():
    """Every figure of the commands by hand, with a network of few features: of two sets of
    different sizes, under both resize rules; through statistics on disk; of reconstructions."""
    def metrics(a, b, seed=2020):
        parts = np.array_split(np.random.RandomState(seed).permutation(len(b["logits"])), 2)
        scores = [plain_inception_score(b["logits"][part]) for part in parts]
        a_, b_ = a["pool"], b["pool"]
        return {"FID": plain_frechet(a_, b_), "sFID": plain_frechet(a["spatial"], b["spatial"]),
                "IS": np.mean(scores), "precision": plain_precision(a_, b_),
                "recall": plain_precision(b_, a_), "KID": np.mean(plain_kid(a_, b_, seed))}

    def check(found, expected):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close(found[name], value, 1e-5)

    net = Colours()
    with folder() as d, patch.object(fid, "load_inception", lambda _: (net, "sha")):
        a, b = write_images(d / "a", 14, 16, seed=1), write_images(d / "b", 12, 16, seed=1) // 2
        b[:4] = a[0]  # precise, and little of it
        np.savez(d / "b.npz", arr_0=b)
        ours, expected = [d / "a", d / "b.npz", "--splits", 2], metrics(net.of(a), net.of(b))
        assert expected["precision"] != expected["recall"]
        with recorded(fid.Report, "add") as added:
            check(figures(*ours), expected)
        for (_, name, _, *numbers), _ in added:
            assert numbers[:2] == [None if name == "IS" else 14, 12], name
        pools = [net.of(x)["pool"] for x in (a, b)]
        close(fid.kid(*map(torch.from_numpy, pools))[1], np.std(plain_kid(*pools, 2020)), 1e-6)
        check(figures(*ours, "--seed", 3), metrics(net.of(a), net.of(b), 3))
        check(figures(*ours, "--resize", "torch"), metrics(net.of(a, "torch"), net.of(b, "torch")))
        whole = figures(*ours[:2], "--metrics", "is")  # fewer than 5000: one chunk
        check(whole, {"IS": plain_inception_score(net.of(b)["logits"])})
        small = [fid.center_crop(Image.fromarray(x), 8) for x in b]
        small = net.of(np.stack(list(map(np.asarray, small))))
        check(figures(d / "b.npz", d / "b.npz", "--size", 8, "--metrics", "is"),
              {"IS": plain_inception_score(small["logits"])})

        torch.backends.cudnn.allow_tf32 = True
        execute(fid, d / "a", "--save-stats", d / "ref.npz", "--workers", 0)
        assert not torch.backends.cudnn.allow_tf32
        check(figures(d / "ref.npz", d / "b.npz", "--metrics", "fid,sfid"),
              {k: expected[k] for k in ("FID", "sFID")})
        with np.load(d / "ref.npz") as f:  # ADM's names
            assert np.allclose(f["mu_s"], net.of(a)["spatial"].mean(0))
            assert f["sigma"].shape == (3, 3)
        with refused("was saved with resize tf1"):
            execute(fid, d / "ref.npz", *ours[1:], "--metrics", "fid", "--resize", "torch")
        execute(fid, d / "a", "--save-stats", d / "ref.npz", "--resize", "torch", "--workers", 0)
        with refused("was saved with resize torch"):
            execute(fid, d / "ref.npz", *ours[1:], "--metrics", "fid")


def test_fid_ranks():
    """Two ranks read each image once, and together find what one finds."""
    def as_ranks(call, *ranks):
        """call(rank) for each, in threads that stand for processes."""
        barrier, tensors = threading.Barrier(len(ranks), timeout=20), {}

        def all_reduce(x):
            tensors[threading.get_ident()] = x.clone()
            barrier.wait()
            x.copy_(sum(tensors.values()))
            barrier.wait()

        dist = SimpleNamespace(is_initialized=lambda: True, all_reduce=all_reduce)
        with patch.object(fid, "dist", dist), ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(call, ranks))

    x = torch.randn(23, 40)
    x[:10] += 5  # the ranks' means differ
    whole = fid.FeatureStatistics.of(x)

    def statistics(indices):
        own = fid.FeatureStatistics(23, 40)
        own.add(x[indices], indices)
        return own.finish()

    for found in as_ranks(statistics, torch.arange(10), torch.arange(10, 23)):
        assert torch.allclose(found.mu, whole.mu) and torch.allclose(found.sigma, whole.sigma)
        assert torch.equal(found.rows, x)
    args = SimpleNamespace(batch_size=3, workers=0)
    with folder() as d:
        images = write_images(d / "a", 14, 16)
        np.savez(d / "a.npz", arr_0=images)
        for path in (d / "a", d / "a.npz"):
            seen = [batch for rank in (0, 1)
                    for batch in fid.ImageSet(path).read(args, rank, 2, CPU)]
            assert sorted(i for _, indices in seen for i in indices.tolist()) == list(range(14))
            for pixels, indices in seen:
                assert np.array_equal(pixels.permute(0, 2, 3, 1), images[indices])


def test_fid_commands():
    """A folder, an npz, its statistics, and both in one give the same figure; the size of a batch
    changes nothing; each mistake is one line."""
    with folder() as d:
        a, b, encoder, ref = d / "a", d / "b", d / "encoder.pt", d / "ref.npz"
        images, _ = write_images(a, seed=1), write_images(b, seed=2)
        torch.save(DINOv2(**ENCODERS["tiny14"]).state_dict(), encoder)
        dinov2 = ["--features", "dinov2", "--encoder", encoder]
        by_folder = figures(a, b, *dinov2)
        assert by_folder.keys() == {"FD-DINOv2", "precision", "recall", "KID"}
        in_fives = figures(a, b, *dinov2, "--batch-size", 5)
        assert all(abs(in_fives[k] - v) < 1e-4 for k, v in by_folder.items())
        close(figures(a, a, *dinov2, "--metrics", "fid")["FD-DINOv2"], 0, 1e-6)

        np.savez_compressed(d / "images.npz", arr_0=images)
        execute(fid, a, "--save-stats", ref, *dinov2, "--workers", 0)
        with np.load(ref) as f:  # both in one file, as ADM's reference batches
            np.savez(d / "both.npz", arr_0=images[:8], mu=f["mu"], sigma=f["sigma"])
        np.savez(d / "few.npz", arr_0=images[:8])
        for name, metrics in (("images", by_folder), ("ref", ["FD-DINOv2"]), ("both", by_folder)):
            found = figures(d / f"{name}.npz", b, *dinov2)
            assert set(found) == set(metrics), name
            close(found["FD-DINOv2"], by_folder["FD-DINOv2"], 1e-6)

        # statistics in either order in memory
        mu, sigma = np.zeros(192), np.diag(np.arange(1.0, 193))
        sigma[3, 5] = sigma[5, 3] = 2
        for name, change in {"C": sigma, "F": np.asfortranarray(sigma), "nan": sigma * np.nan,
                             "skew": sigma + np.eye(192, k=7)}.items():
            np.savez(d / f"{name}.npz", mu=mu, sigma=change)
        c, f = (figures(d / f"{name}.npz", b, *dinov2)["FD-DINOv2"] for name in "CF")
        assert c == f
        with patch("builtins.print") as said:  # reference and samples exchanged
            figures(a, d / "C.npz", *dinov2)
            execute(fid, d / "few.npz", b, *dinov2, "--metrics", "fid", "--workers", 0)
        told = [text for text in map(str, said.call_args_list) if "exchanged?" in text]
        assert sum("C.npz holds statistics" in text for text in told) == 2  # before, and after
        assert sum("few.npz is 8 images" in text for text in told) == 2

        np.savez(d / "keys.npz", other=np.zeros(3))
        np.save(d / "images.npy", images)
        (d / "stylegan.pkl").write_bytes(pickle.dumps({"raw_mean": mu}))
        np.savez(d / "order.npz", arr_0=np.asfortranarray(images))
        np.savez(d / "dims.npz", mu=np.zeros(10), sigma=np.eye(10))
        np.savez(d / "pickle.npz", arr_0=np.array([{}], dtype=object))
        (d / "none").mkdir(), (d / "one").mkdir()
        Image.new("RGB", (64, 64)).save(d / "one" / "a.png")
        shutil.copytree(a, d / "wide"), shutil.copytree(b, d / "broken")
        Image.new("RGB", (80, 64)).save(d / "wide" / "class1" / "wide.png")
        (d / "broken" / "class1" / "broken.png").write_bytes(b"\x89PNG")
        assert figures(d / "wide", b, *dinov2, "--size", 48, "--metrics", "fid")
        for words, argv in {
                ("no images",): [d / "none", b],
                ("not found",): [d / "missing", b],
                ("one image",): [d / "one", b],
                ("other", "neither images (arr_0) nor statistics"): [d / "keys.npz", b],
                ("an .npy file", "arr_0="): [d / "images.npy", b],
                ("a pickle", "docs/evaluation.md"): [a, d / "stylegan.pkl"],
                ("is PyTorch's", "docs/evaluation.md"): [encoder, b],
                ("C order", "in F order"): [d / "order.npz", b],
                ("NaN",): [d / "nan.npz", b, *dinov2],
                ("not symmetric",): [d / "skew.npz", b, *dinov2],
                ("both.npz holds statistics", "exchanged?"): [a, d / "both.npz", *dinov2],
                ("(10,)",): [d / "dims.npz", b, *dinov2, "--metrics", "fid"],
                ("--metrics kid",): [d / "dims.npz", b, *dinov2, "--metrics", "kid"],
                ("object",): [d / "pickle.npz", b],
                ("pretrained.pth",): [a, b, "--inception", d / "pretrained.pth"],
                ("no Inception", "DINOv2"): [a, b, "--inception", encoder],
                ("--metrics nonsense",): [a, b, "--metrics", "nonsense"],
                ("two paths",): [a],
                ("was saved with weights",): [ref, b, *dinov2[:3], "random:tiny14"],
                ("64x64", "80x64", "wide.png", "--size"): [d / "wide", b, *dinov2],
                ("broken.png",): [a, d / "broken", *dinov2, "--size", 48]}.items():
            with refused(*words):
                execute(fid, *argv, "--workers", 0)


def test_fid_of_a_tokenizer():
    """--recon on 8-bit reconstructions, with the tokenizer's own encoder; --probe."""
    tokenizer = frozen(Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]))
    with folder() as d:
        images, a, path = write_images(d / "a", n=7), d / "a", d / "tokenizer.pt"
        save_checkpoint(path, {"tokenizer": tokenizer.state_dict(), "recipe": {"size": 64},
                               "arguments": tokenizer.arguments})
        found = figures("--recon", path, a, "--features", "dinov2", "--encoder", path,
                        "--metrics", "rfid,psnr,ssim", "--batch-size", 4)
        assert found.keys() == {"rFD-DINOv2", "PSNR", "SSIM"}
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        recon = tokenizer.decode(tokenizer.encode(x / 127.5 - 1))
        recon = ((recon + 1) * 127.5).round().clamp(0, 255)
        by_hand = 10 * np.log10(255 ** 2 / (recon - x).square().mean((1, 2, 3)).numpy())
        close(found["PSNR"], by_hand.mean(), 1e-5)
        close(found["SSIM"], losses.ssim(x / 127.5 - 1, recon / 127.5 - 1).mean().item(), 1e-5)
        net, pairs = Colours(), (images, recon.permute(0, 2, 3, 1).byte().numpy())
        with patch.object(fid, "load_inception", lambda _: (net, "sha")):
            execute(fid, "--recon", path, a, "--metrics", "rfid", "--workers", 0, "--json", d / "j")
        found = json.loads((d / "j").read_text())["figures"]
        assert [f["resize"] for f in found] == ["tf1", "torch"]
        for f in found:
            expected = plain_frechet(*(net.of(p, f["resize"])["pool"] for p in pairs))
            close(f["value"] / expected, 1, 1e-3)
        with refused("rfid,psnr,ssim,lpips"):  # what can be left out
            execute(fid, "--recon", path, a, "--metrics", "psnr,lpips", "--vgg16", "none",
                    "--lpips-heads", "none", "--workers", 0)
        for name, colour in (("train/x/0", "red"), ("train/x/1", "red"), ("train/y/0", "blue"),
                             ("val/x/0", "red"), ("val/y/0", "red"), ("val/y/1", "red"),
                             ("val/y/2", "red")):
            file = d / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), colour).save(file)
        for more, channels in (([], 32), (["--tokens"], 192)):
            with recorded(fid, "linear_probe") as probes:
                found = figures("--probe", path, d / "train", d / "val", *more)
            assert found == {"probe %": 25} and probes[0][0][0].shape == (3, channels)
        with (patch.object(fid, "Shapes", lambda split, n, size: Shapes(split, 4, size)),
              recorded(fid, "Shapes") as sets):
            execute(fid, "--probe", path, "shapes", "shapes", "--workers", 0)
            execute(fid, "--recon", path, "shapes", "--metrics", "psnr", "--workers", 0)
        assert [of for of, _ in sets] == [("train", 8192, 64), ("val", 512, 64), ("val", 512, 64)]
        with refused("class folders"):
            execute(fid, "--probe", path, a / "class0", a, "--workers", 0)


def test_cknna():
    """HSIC against its sum over quadruples of images, the mask and the whole against loops; a
    rotation of the features changes nothing; SE-CKNNA's sets, and what is read of them."""
    a, b = torch.randn(2, 7, 4, dtype=torch.float64)
    K, L = a @ a.T, b @ b.T
    total = sum(K[i, j] * (L[j, i] + L[q, r] - 2 * L[j, q])  # of distinct images
                for i, j, q, r in itertools.permutations(range(7), 4)).item()
    close(fid.hsic(K, L).item(), total / math.perm(7, 4))
    L, pairs = a @ b.T, list(itertools.permutations(range(7), 2))  # not symmetric
    total = sum(K[i, j] * L[j, i] for i, j in pairs)
    total += sum(K[i, j] for i, j in pairs) * sum(L[i, j] for i, j in pairs) / (6 * 5)
    total -= sum(K[i, j] * L[j, q] for i, j in pairs for q in range(7) if q != j) * 2 / 5
    close(fid.hsic(K, L).item(), total.item() / (7 * 4))

    x, y = (fid.prepared(v) for v in (a, b))
    limit = sorted(a.abs().flatten().tolist())[int(0.95 * 28)]
    clamped = a.clamp(-limit, limit)
    assert torch.allclose(x, clamped / clamped.norm(dim=1, keepdim=True))
    K, L = (v @ v.T for v in (x, y))
    near = torch.zeros(2, 7, 7)
    for n, M in enumerate((K, L)):
        for i in range(7):
            for j in sorted(set(range(7)) - {i}, key=lambda j: -M[i, j])[:2]:
                near[n, i, j] = 1
    own = [fid.hsic(M * m, M * m) for M, m in zip((K, L), near)]
    both = fid.hsic(K * near[0] * near[1], L * near[0] * near[1])
    close(fid.cknna(a, b, 2), (both / ((own[0] * own[1]).sqrt() + 1e-6)).item())
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    close(fid.cknna(a, a @ turn, 2, prepare=False), 1, 1e-4)

    pixels, indices = torch.full((40, 3, 8, 8), 128, dtype=torch.uint8), torch.arange(40)
    pixels[:, :, 0, 0] = 255
    sets = list(fid.variants(pixels, indices))
    assert [name for name, *_ in sets[:5]] == ["clean"] + [f"noise {s}" for s in fid.NOISE]
    one, two = (sets[i][2][:, :, 1:, 1:].float() for i in (1, 4))
    assert abs(one.std() / 255 - 0.05) < 2e-3 and abs(two.std() / 255 - 0.2) < 1e-2
    again = list(fid.variants(pixels[3:5], indices[3:5]))
    assert torch.equal(again[2][2], sets[2][2][3:5]), "an image's noise is its own"
    image = pixels[3].permute(1, 2, 0).numpy()
    noisy = image + np.random.RandomState(42 + 3).normal(0, 0.1, (8, 8, 3)) * 255
    assert np.array_equal(again[2][2][0].permute(1, 2, 0), noisy.clip(0, 255).astype(np.uint8))
    turned = {int(i): (p, scale) for _, chosen, x, scale in sets[5:] for i, p in zip(chosen, x)}
    assert sorted(turned) == list(range(40)) and len({s for _, s in turned.values()}) == 4
    corners = {tuple((p[0] == 255).nonzero()[0].tolist()) for p, _ in turned.values()}
    assert corners == {(0, 0), (0, 7), (7, 0), (7, 7)}
    for i, (p, scale) in turned.items():
        r = np.random.RandomState(42 + i)
        expected = np.rot90(pixels[i], r.choice([0, 90, 180, 270]) // 90, (1, 2))
        assert np.array_equal(p, expected) and scale == r.choice([1, 0.75, 0.5, 0.25])

    # what is compared: samples, and the encoder's last layer, of an image that VFM-VAE alone
    # shrinks with antialias
    vfm = small_vfm(0.875, {"dinov2": {"dim": 64, "depth": 2, "grid": 4}}, layers=(0, 1, -1))
    torch.manual_seed(0)
    pixels = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
    for tok, d, antialias in ((vfm, 8, True), (small_tokenizer(), 8, False),
                              (VAE(DECODERS["tiny"]), 32, False)):
        x = F.interpolate(pixels / 127.5 - 1, (64, 64), mode="bilinear", antialias=antialias)
        noise = torch.from_numpy(np.stack([
            data.rng("cknna", i).standard_normal((16, d), np.float32) for i in (5, 9)]))
        with torch.no_grad():
            found = fid.latents_and_tokens(tok, pixels, torch.tensor([5, 9]), 0.5)
            tokens, z = tok.features(x), tok.encode(x)
            if tok is vfm:
                z = tok.encode(x, noise.transpose(1, 2).unflatten(2, (4, 4)))
            elif d == 32:
                z = z + ((tokens[..., d:] / 2).exp() * noise).transpose(1, 2).unflatten(2, (4, 4))
        assert torch.allclose(found["latents"], z.mean((2, 3)), atol=1e-5), type(tok)
        if d == 8:
            assert torch.allclose(found["encoder"], tokens[..., -64:].mean(1), atol=1e-5), type(tok)


def test_cknna_fixture():
    """The official values."""
    _, given, out = fixture("cknna")
    for name in ("AB", "AC", "AA"):
        x, y = (given[k] for k in name)
        found = {f"{name}_k{k}": fid.cknna(x, y, k) for k in (2, 5, 10, 95)}
        found[f"{name}_raw_unbiased_k10"] = fid.cknna(x, y, prepare=False)
        equal({k: torch.tensor(v) for k, v in found.items()}, out, {})


def test_cknna_command():
    """A tokenizer against its own encoder: the encoder's CKNNA is 1; of a VFM-VAE and a VAE."""
    vfm = vfm_vae.VFMVAE({"dinov2": ENCODERS["tiny14"]}, **vfm_vae.reading_sizes(
        "tiny", DINOv2(**ENCODERS["tiny14"])))
    with folder() as d:
        write_images(d / "a", n=24)
        own = random_weights(Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]), scale=0.05)
        encoder = d / "encoder.pt"
        torch.save(own.encoder.state_dict(), encoder)
        for tokenizer in (own, random_weights(vfm, scale=0.05), VAE(DECODERS["tiny"])):
            save_checkpoint(d / "t.pt", {
                "tokenizer": tokenizer.state_dict(), "arguments": tokenizer.arguments,
                "recipe": {"size": 64}})
            with recorded(fid, "cknna") as parts, recorded(fid, "resize_pil") as by_pil:
                found = figures("--cknna", d / "t.pt", d / "a", "--reference", encoder,
                                "--batch-size", 7)
            close(found["SE-CKNNA, latents"], sum(part for _, part in parts[1:6]) / 5, 1e-4)
            assert len(by_pil) == 4 * 5, "five sets of four batches; no turned image"
            whose = ["latents"] if isinstance(tokenizer, VAE) else ["latents", "encoder"]
            assert list(found) == [f"{m}, {w}" for w in whose for m in ("CKNNA", "SE-CKNNA")]
            assert tokenizer is not own or found["CKNNA, encoder"] > 0.999 > found["CKNNA, latents"]
        ranks = SimpleNamespace(is_initialized=lambda: True)  # of which the others have left
        with patch.object(fid, "dist", ranks):
            args = SimpleNamespace(batch_size=7, workers=0)
            parts = [*fid.ImageSet(d / "a", 64).read(args, 0, 1, CPU)]
        assert [len(part) for part, _ in parts] == [7, 7, 7, 3]
        siglip = random_weights(SigLIP(64, 1, grid=2))
        torch.save(siglip.state_dict(), d / "siglip.pt")
        pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
        for file, net in ((encoder, own.encoder), (d / "siglip.pt", siglip)):
            features = fid.load_reference(SimpleNamespace(judge=None, reference=str(file)), "cpu")[0]
            side, net.rule = net.grid * net.patch, "antialias"  # timm's; SigLIP has one rule
            for name, scale in (("clean", 1), ("turned", 1), ("turned", 0.5)):
                x = F.interpolate(pixels / 255, (int(side * scale),) * 2, mode="bilinear")
                if name == "clean":
                    x = fid.resize_pil(pixels, side)
                x = (x - net.pixel_mean) / net.pixel_std
                found = features(name, pixels, scale)
                assert torch.allclose(found, net(x)[1].mean(1), atol=1e-5), (file, name, scale)
        with refused("quarter", "divisible by 64, not 80"):
            execute(fid, "--cknna", d / "t.pt", d / "a", "--size", 80, "--reference", encoder)
        for words, argv in {("10 neighbours",): ["--cknna", d / "t.pt", d / "a" / "class0"],
                            ("--cknna CKPT DATA",): []}.items():
            if argv:
                shutil.rmtree(d / "a" / "class1")
                for path in sorted((d / "a" / "class0").iterdir())[8:]:
                    path.unlink()
            with refused(*words):
                execute(fid, *argv, "--reference", encoder, "--workers", 0)


# ----------------------------------------------------- results/judge.py, results/t2i.py, results/parts.py

def test_judge():
    """EfficientNet-Lite0: its size, TensorFlow's padding, and fid.py's command with it."""
    net, conv = judge.EfficientNetLite0(), judge.SameConv(1, 1, 3, 2, bias=False)
    assert parameters(net) == 4_652_008
    x = torch.randn(1, 1, 4, 4)
    padded = F.pad(x, (0, 1, 0, 1))[0, 0]
    by_hand = [[(padded[i:i + 3, j:j + 3] * conv.weight[0, 0]).sum().item() for j in (0, 2)]
               for i in (0, 2)]
    assert torch.allclose(conv(x)[0, 0], torch.tensor(by_hand), atol=1e-6)
    with folder() as d:
        refs = [write_shapes(d / "a", 6), write_shapes(d / "b", 6, 48)]
        images = [torch.stack([fid.ImageSet(r)[0, i][0] for i in range(6)]) for r in refs]
        for module in net.modules():
            module.momentum = 1  # BatchNorm takes its statistics from images[0]: else all vanishes
        net.train()(images[0])
        save_checkpoint(d / "lite0.pth", net.eval().state_dict())
        found = figures(*refs, "--lite0", d / "lite0.pth", script=judge)
        rows = [net(x)["pool"].double() for x in images]
        means = [r.mean(0) for r in rows]
        a, b = ((r - r.mean(0)) / 5 ** 0.5 for r in rows)  # covariances a'a, b'b
        root = torch.linalg.matrix_norm(a @ b.T, "nuc")  # tr (a'a b'b)^(1/2)
        traces = a.square().sum() + b.square().sum()
        by_hand = ((means[0] - means[1]).square().sum() + traces - 2 * root).item()
        assert found.keys() == {"FD-Lite0", "precision", "recall", "KID"}
        assert by_hand > 1e-3 and math.isclose(found["FD-Lite0"], by_hand, rel_tol=1e-6)
        with refused("--lite0 FILE"):
            execute(judge, *refs)


def test_t2i_data_and_score():
    """Names of captions by hand; a sixth of each shape's and each pair's combinations is left out
    of the shard, and asked for; the judge's answers are counted by hand."""
    for caption, names in {"a red ring on blue": ("ring", "red", "blue"),
                           "a dark blue ell on a dark grey ground": ("ell", "dark blue", None),
                           "a white star on a dark green ground": ("star", "white", "dark green"),
                           "a grey cross on dark red": ("cross", "grey", "dark red")}.items():
        if None in names:
            error_of(t2i.parse, caption, kind=ValueError)
        else:
            found = zip(t2i.NAMES.values(), t2i.parse(caption))
            assert tuple(kind[i] for kind, i in found) == names
    for colour, ground in itertools.product(t2i.COLOURS, t2i.COLOURS):
        assert sum(t2i.left_out(f"a {colour} {s} on {ground}") for s in toy.SHAPES) == 2
    with folder() as d, patch.object(t2i, "Shapes", partial(Shapes, n=48)), patch("builtins.print"):
        t2i.write_data(d)
        written, asked = Shapes(n=48).captions, (d / "prompts.txt").read_text().splitlines()
        shards = captions.open_captions(d, d / "index", 0)
        assert sorted([*shards.captions, *asked]) == sorted(written) and 2 < len(asked) < 20
        assert all(map(t2i.left_out, asked)) and not any(map(t2i.left_out, shards.captions))
        first = next(i for i in range(48) if not t2i.left_out(written[i]))
        assert np.array_equal(shards.image(0), Shapes(n=48).image(first))

        torch.save(t2i.network().state_dict(), d / "judge.pt")
        np.savez(d / "s.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8))
        answers = torch.zeros(4, 42)  # "ring", "red" on "black", each time
        answers[:, [1, 12 + 3, 12 + 15]] = 1
        (d / "p.txt").write_text("a red ring on black\n" + 2 * "a red star on black\n")
        with patch.object(torch.nn.Sequential, "forward", lambda *_: answers):
            assert t2i.classes(d / "judge.pt", d / "s.npz") == {"images": 4, "shape": 0.25}
            assert t2i.score(d / "judge.pt", d / "s.npz", d / "p.txt") == {
                "images": 4, "shape": 0.5, "colour": 1, "ground": 1, "all": 0.5}


def test_miniature_captions():
    """The shard holds each training image, byte by byte, beside its class' name; a class without a
    name is refused before anything is written."""
    with folder() as d:
        for name in ("n03838899", "n01443537"):
            (d / "train" / name).mkdir(parents=True)
            Shapes(n=1).image(0).save(d / "train" / name / f"{name}_0.JPEG")
        miniature.captions(d / "train", d / "out")
        shards = captions.open_captions(d / "out", d / "index", 0)
        assert [*shards.captions] == ["a photo of a goldfish", "a photo of an oboe"]
        assert (d / "out/prompts.txt").read_text().splitlines() == [*shards.captions]
        with tarfile.open(d / "out/00000.tar") as tar:
            stored = tar.extractfile("n03838899_0.jpg").read()
        assert stored == (d / "train/n03838899/n03838899_0.JPEG").read_bytes()
        (d / "train/n0").mkdir()
        with refused("class n0"):
            miniature.captions(d / "train", d / "none")
        assert not (d / "none").exists()


# -------------------------------------------------------------------------------------- to run them

def setup_function(_):
    """Before each test, here and under pytest: a test draws the same numbers alone and among
    others."""
    torch.manual_seed(0)


def main():
    if "--device" in sys.argv:
        import test_gpu  # it takes what the tests share from here

        test_gpu.main()
    words, failed, began = [word for word in sys.argv[1:] if word != "--half"], 0, time.time()
    tests = {name: test for name, test in globals().items() if name.startswith("test_")
             and (not words or any(word in name for word in words))}
    number, other = len(tests), None
    half = "--half" in sys.argv  # every second test; Python alone takes most of their time
    parent = os.getppid()
    if half or number > 10:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        tests = {name: tests[name] for name in [*tests][half::2]}
        if not half:
            other = subprocess.Popen([sys.executable, __file__, "--half", *words])
    for name, test in tests.items():
        if half and os.getppid() != parent:
            break  # whoever asked is gone
        begin, said = time.time(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                setup_function(test)
                test()
            print(f"ok    {name} ({time.time() - begin:.1f} s)", flush=True)
        except SkipTest as e:
            print(f"skip  {name}: {e}", flush=True)
        except Exception:  # noqa: BLE001, whatever a test raises is its failure
            failed += 1
            print(f"FAIL  {name}\n{said.getvalue()[-2000:]}\n{traceback.format_exc()}", flush=True)
    runs.end_workers()  # an error that is kept keeps its loader, and the exit would wait for it
    if half:
        sys.exit(failed)
    if other:
        failed += abs(other.wait())
    print(f"{time.time() - began:.0f} s")
    print(f"{number - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
