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
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import baselines
import data
import fid
import files
import losses
import model
import runs
import sample
import toy
import train_dit
import train_tokenizer as tt
from baselines import VAE
from files import BatchedArray, UserError, load_encoder, load_file, load_tokenizer, save_checkpoint
from model import DECODERS, DITS, ENCODERS, DINOv2, LightningDiT, Tokenizer
from results import judge
from toy import Shapes

HERE = Path(__file__).resolve().parent
TMP = Path(tempfile.mkdtemp(prefix="aligntok-"))
atexit.register(shutil.rmtree, TMP, ignore_errors=True)
CPU = torch.device("cpu")
SMALL = ["--preset", "tiny", "--encoder", "random:tiny14", "--batch-size", "4", "--val-images",
         "24", "--probe-images", "48", "--dtype", "fp32", "--disc-start", "0", "--log-every", "1",
         "--save-every", "2"]


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

    def function(*args):
        calls.append((args, original(*args)))
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


def write_shapes(root, n=24, size=32):
    """The first n shapes as PNG files, one folder per class."""
    shapes = Shapes(n=n, size=size)
    for i in range(n):
        path = root / shapes.classes[shapes.labels[i]] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.image(i).save(path)
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
    """Flags of train_dit.py for a tokenizer and 24 images that are written to folder d."""
    return ["--preset", "tiny", "--model", "mini", "--size", "32", "--batch-size", "8", "--dtype",
            "fp32", "--grid-every", "99", "--save-every", "99",
            "--tokenizer", save_tokenizer(small_tokenizer(), d / "tok.pt"),
            "--data", write_shapes(d / "data" / "train"), "--val", write_shapes(d / "data" / "val")]


def gaussian(mu, sigma):
    """Statistics without the images behind them."""
    mu, sigma = (torch.tensor(v).double() for v in (mu, sigma))
    return SimpleNamespace(n=None, rows=None, mu=mu, sigma=sigma)


# ---------------------------------------------------------------------------------------- the house

TIERS = [{"model", "losses"}, {"files"}, {"runs", "data"}, {"toy", "baselines", "vfm_vae"},
         {"fid", "sample"}, {"train_tokenizer", "train_dit"}]
ON_TOP = {"test_smoke", "test_faults", "bench", "results"}  # they may import anything


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
        assert {name: parameters(LightningDiT(**DITS[name])) for name in dits} == dits
        vae = VAE(DECODERS["vavae"])
    assert set(DITS) == {"tiny", *dits}
    assert parameters(vae.encoder) == 28_413_248 and parameters(vae.decoder) == 41_417_603
    assert parameters(losses.PatchGAN()) == 2_765_633
    for key in ("encoder.down.0.block.1.conv2.weight", "encoder.down.2.block.0.nin_shortcut.weight",
                "encoder.down.4.attn.1.proj_out.bias", "encoder.down.3.downsample.conv.weight",
                "encoder.mid.attn_1.q.weight", "decoder.up.4.attn.2.norm.weight",
                "decoder.up.1.upsample.conv.bias"):
        assert key in vae.state_dict(), key


def test_dinov2_against_numpy():
    """A forward of a one-block register model, in plain numpy with a loop over the heads."""
    net = random_weights(DINOv2(dim=128, depth=1, registers=4, grid=3), scale=0.1).double()
    w = {k: v.numpy() for k, v in net.state_dict().items()}
    x = torch.randn(1, 3, 42, 42, dtype=torch.float64)

    def norm(t, name):
        unit = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, keepdims=True) + 1e-6)
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(t, name):
        return t @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    squares = [x[0, :, i:i + 14, j:j + 14].numpy() for i in (0, 14, 28) for j in (0, 14, 28)]
    patches = [(s * w["patch_embed.proj.weight"]).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
               for s in squares]
    tokens = np.stack([w["cls_token"][0, 0], *patches]) + w["pos_embed"][0]
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
    models by size with PIL's, a = -0.5."""
    def both_sides(v, h, w, scale_h, scale_w, a):
        rows = bicubic(v, h, scale_h, a)
        return bicubic(rows.transpose(1, 0, 2), w, scale_w, a).transpose(1, 0, 2)

    net = random_weights(DINOv2(dim=64, depth=0, grid=5))
    grid = net.pos_embed.detach()[0, 1:].double().view(5, 5, 64).numpy()
    found = net.position_embedding(3, 7).detach()
    expected = both_sides(grid, 3, 7, 3.1 / 5, 7.1 / 5, -0.75)
    assert np.allclose(found[0, 1:].view(3, 7, 64), expected, atol=1e-5)
    assert torch.equal(found[:, 0], net.pos_embed[:, 0])
    assert net.position_embedding(5, 5) is net.pos_embed
    reg = DINOv2(dim=64, depth=0, registers=4, grid=5)
    reg.pos_embed = net.pos_embed
    # enlarging needs no antialias; at the borders torch leaves taps out, so only the inside counts
    found = reg.position_embedding(10, 10).detach()[0, 1:].view(10, 10, 64)
    expected = both_sides(grid, 10, 10, 2.0, 2.0, -0.5)
    assert np.allclose(found[3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-5)


def test_convolutional_parts():
    """GroupNorm's groups, attention over positions, and LDM's asymmetric downsampling."""
    for channels, groups in ((128, 32), (512, 32), (64, 16)):
        x, norm = torch.randn(2, channels, 6, 4), random_weights(model.GroupNorm(channels))
        expected = F.group_norm(x, groups, norm.weight, norm.bias, 1e-6)
        assert torch.allclose(norm(x), expected, atol=1e-6)

    x = torch.randn(2, 64, 6, 4)
    attn = random_weights(model.AttnBlock(64), scale=0.1)
    y = attn.norm(x)
    q, k, v = ((torch.einsum("oc,bchw->bohw", f.weight[:, :, 0, 0], y)
                + f.bias.view(-1, 1, 1)).flatten(2) for f in (attn.q, attn.k, attn.v))
    weights = (q.transpose(1, 2) @ k / 8).softmax(-1)  # (B, query, key)
    y = torch.einsum("bqk,bck->bcq", weights, v).view_as(x)
    assert torch.allclose(attn(x), x + attn.proj_out(y), atol=1e-5)

    x, down = torch.randn(1, 64, 4, 4), random_weights(model.Downsample(64))
    kernel, bias = down.conv.weight[5], down.conv.bias[5]
    first = (x[0, :, :3, :3] * kernel).sum() + bias  # the first window is not padded
    last = (x[0, :, 2:, 2:] * kernel[:, :2, :2]).sum() + bias
    assert torch.allclose(down(x)[0, 5, [0, 1], [0, 1]], torch.stack([first, last]), atol=1e-4)


def test_tokenizer():
    """z0 = A(E_p(x)), x^ = D(z0); the encoder's own normalisation and size; the statistics."""
    tok = frozen(Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"], d=24, hidden=16))
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    recon, z, tokens = tok(x)
    assert recon.shape == x.shape and z.shape == (2, 24, 4, 6) and tokens.shape == (2, 24, 192)
    # position (row 2, column 5) of z is the adapter's output at token 2 * 6 + 5
    assert torch.allclose(z[1, :, 2, 5], tok.adapter(tokens[1, 17]), atol=1e-6)
    assert torch.equal(tok.encode(x), z) and torch.equal(tok.decode(z), recon)
    assert "divisible by 16" in error_of(tok.encode, torch.zeros(1, 3, 64, 72), kind=ValueError)

    assert "no latent statistics" in error_of(tok.normalize, z, kind=ValueError)
    tok.latent_mean.copy_(torch.arange(24.0))
    tok.latent_std.fill_(2)
    assert torch.allclose(tok.normalize(z), (z - torch.arange(24.0).view(-1, 1, 1)) / 2)
    assert torch.allclose(tok.unnormalize(tok.normalize(z)), z, atol=1e-5)

    seen = []
    tok.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tok.encode(torch.zeros(1, 3, 32, 48))
    assert seen[0].shape == (1, 3, 28, 42)  # 14/16 of the size
    grey = torch.tensor([.0655, .1964, .4178])  # (.5 - mean) / std
    assert torch.allclose(seen[0][0, :, 3, 3], grey, atol=1e-4)


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
    pairs."""
    h, w, D = 3, 5, 16
    sincos, x = model.sincos_embedding(h, w, D)[0], torch.randn(h * w, D)
    y = model.rotate(x, *model.rope_tables(h, w, D))
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


def plain_dit(S, z, t, y, heads):
    """LightningDiT from its published description, patch 1, on a state dict in fp64; explicit
    softmax, no modules."""
    def linear(name, x):
        return x @ S[f"{name}.weight"].T + S[f"{name}.bias"]

    def norm(name, x):
        return S[f"{name}.weight"] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    def silu(x):
        return x / (1 + torch.exp(-x))

    B, _, h, w = z.shape
    D = S["x_embedder.proj.bias"].numel()
    cos, sin = (a.double() for a in model.rope_tables(h, w, D // heads))
    x = z.flatten(2).transpose(1, 2) @ S["x_embedder.proj.weight"].flatten(1).T
    x = x + S["x_embedder.proj.bias"] + model.sincos_embedding(h, w, D).double()
    angle = t[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))
    c = linear("t_embedder.mlp.2", silu(c)) + S["y_embedder.embedding_table.weight"][y]
    c, i = silu(c)[:, None], 0
    while (b := f"blocks.{i}.") + "norm1.weight" in S:
        a1, b1, g1, a2, b2, g2 = linear(f"{b}adaLN_modulation.1", c).split(D, -1)
        qkv = linear(f"{b}attn.qkv", norm(f"{b}norm1", x) * (1 + b1) + a1)
        q, k, v = (p.reshape(B, h * w, heads, -1).transpose(1, 2) for p in qkv.split(D, -1))
        q = model.rotate(norm(f"{b}attn.q_norm", q), cos, sin)
        k = model.rotate(norm(f"{b}attn.k_norm", k), cos, sin)
        weights = torch.exp(q @ k.transpose(2, 3) / math.sqrt(D // heads))
        out = weights / weights.sum(-1, keepdim=True) @ v
        x = x + g1 * linear(f"{b}attn.proj", out.transpose(1, 2).reshape(B, h * w, D))
        hidden = norm(f"{b}norm2", x) * (1 + b2) + a2
        gate, value = linear(f"{b}mlp.w12", hidden).chunk(2, -1)
        x = x + g2 * linear(f"{b}mlp.w3", silu(gate) * value)
        i += 1
    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(D, -1)
    x = norm("final_layer.norm_final", x) * (1 + scale) + shift
    return linear("final_layer.linear", x).transpose(1, 2).reshape(z.shape)


def test_dit_numerics():
    """LightningDiT against the plain one, at its own grid and at another."""
    dit = random_weights(small_dit(num_classes=10, qk_norm=True))
    S = {k: v.double() for k, v in dit.state_dict().items()}
    for side in ((4, 4), (3, 5)):
        z, t, y = torch.randn(3, 4, *side), torch.rand(3), torch.tensor([0, 7, 10])
        with torch.no_grad():
            got, want = dit(z, t, y), plain_dit(S, z.double(), t.double(), y, heads=2)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


# ---------------------------------------------------------------------------------------- losses.py

def test_reconstruction_loss():
    """Eq. 1 without its GAN term: means, and L_perceptual by w_p."""
    x, recon = torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), 0.5)
    recon[0] = -1
    found = losses.reconstruction_loss(x, recon, lambda *_: torch.tensor([1.0, 3.0]), w_p=0.25)
    assert found == (0.75 + 0.25 * 2, 0.75, 2)
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
    tokens = torch.randn(2, 5, 8)
    cosine = losses.semantic_preservation(tokens, 3 * tokens, "cosine", dim=-1)
    assert abs(cosine.item()) < 1e-6


def test_flow_matching():
    """The direction of time, the target z1 - z0, both losses, a finite first gradient, t."""
    (z0, z1), t = torch.randn(2, 4, 6, 2, 2), torch.tensor([0.0, 1.0, 0.25, 0.5])
    y, seen, answer = torch.zeros(4, dtype=torch.long), [], z1 - z0  # from data to noise

    def network(z_t, t, y):
        seen.append(z_t)
        return answer

    loss, mse, cosine = losses.flow_matching(network, z0, z1, t, y, w_cos=1.0)
    assert abs(loss) < 1e-6 and not mse.any() and abs(cosine) < 1e-6
    assert torch.equal(seen[0][0], z0[0])  # t = 0: data
    assert torch.equal(seen[0][1], z1[1])  # t = 1: noise
    assert torch.allclose(seen[0][2], 0.75 * z0[2] + 0.25 * z1[2])
    answer = 3 * (z0 - z1)  # opposite: 1 - cos = 2, and 4^2 times the energy of u
    loss, mse, cosine = losses.flow_matching(network, z0, z1, t, y, w_cos=0.5)
    energy = (z1 - z0).square().mean((1, 2, 3))
    assert torch.allclose(mse, 16 * energy) and abs(cosine - 2) < 1e-5
    assert abs(loss - 16 * energy.mean() - 1) < 1e-4

    dit = small_dit(d=6, num_classes=1, grid=(2, 2))  # v = 0: the cosine has no direction
    losses.flow_matching(dit, z0, z1, t, y, w_cos=1.0)[0].backward()
    trained = [p for p in dit.parameters() if p.requires_grad]
    assert 0 < torch.nn.utils.clip_grad_norm_(trained, 1.0) < 1e3
    expected = torch.tensor([0.5, 1 / (1 + math.exp(-2))])
    assert torch.allclose(losses.logit_normal(torch.tensor([0.0, 2.0])), expected)


def test_lpips():
    """Random VGG16 and heads from two files: an independent sum, zero for equal images, finite
    gradients where features vanish."""
    vgg = torchvision.models.vgg16().features[:30].eval()
    heads = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    paths = TMP / "vgg.pth", TMP / "heads.pth"
    torch.save({f"features.{k}": v for k, v in vgg.state_dict().items()}, paths[0])
    torch.save({f"lin{i}.model.1.weight": v for i, v in enumerate(heads)}, paths[1])
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
        lpips.vgg16[0].bias.fill_(-100)  # relu1_2 sees nothing
    lpips(torch.zeros(1, 3, 32, 32), flat).sum().backward()
    assert flat.grad.isfinite().all() and not any(p.requires_grad for p in lpips.parameters())
    assert not lpips.train().training
    torch.save({"lin0.model.1.weight": heads[0]}, paths[1])
    assert "heads.pth does not fit" in error_of(files.load_lpips, *paths)


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
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(TMP / "m.png")
    assert np.array(data.load_image(TMP / "m.png")).max() == 100
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


def test_crops():
    """ADM's centre crop by hand. In training: the bytes that PIL decodes, and a square of the short
    side, anywhere, flipped or not."""
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 130, 3), np.uint8))
    # 130 x 70 to 16: halved twice to 32 x 17 by a box filter, then bicubic to 30 x 16
    halved = big.resize((65, 35), Image.BOX).resize((32, 17), Image.BOX)
    by_hand = np.array(halved.resize((30, 16), Image.BICUBIC))[:, 7:23]
    assert np.array_equal(data.center_crop(big, 16), by_hand)

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


def test_folders():
    """Classes and labels of a folder; what is held out; the reader's mistakes, by name."""
    root = TMP / "folders"
    for name in ("b/2.png", "a/1.png", "a/deep/3.PNG", ".hidden.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / name, "PNG")
    images = data.ImageFolder(root)
    assert images.classes == ["a", "b"] and images.labels == [0, 0, 1] and len(images) == 3
    assert data.ImageFolder(root / "a" / "deep").labels is None
    train, held_out = data.open_folders(root, None, 10)
    assert len(train) == 2 and len(held_out) == 1 and not set(train.files) & set(held_out.files)
    train = write_shapes(TMP / "beside" / "train", 3)
    write_shapes(TMP / "beside" / "val", 3)
    assert [len(part) for part in data.open_folders(train, None, 1)] == [3, 3]
    assert "different classes" in error_of(data.open_folders, train, root, 1)

    assert "not found" in error_of(data.list_images, root / "nothing")
    (root / "empty").mkdir()
    assert "no images" in error_of(data.list_images, root / "empty")
    (root / "a" / "1.png").write_bytes(b"not an image")
    batches = data.batches(data.Crops(images, 16), data.in_order(3, 3), 0, CPU)
    assert "1.png" in error_of(next, batches)
    assert "1 unreadable" in error_of(data.check_images, [images], 16, 0)


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

    crops = data.Crops(Shapes(n=8), 48, (0, "augment"), noise=(4, 50, 50))
    first, again, other = ([crops[epoch, i] for i in range(8)] for epoch in (0, 0, 1))
    assert same(first, again) is None
    pixels, _, noise = (torch.stack(list(map(torch.as_tensor, part))) for part in zip(*first))
    assert not torch.equal(pixels, torch.stack([item[0] for item in other]))
    assert not torch.equal(noise, torch.stack([item[2] for item in other]))
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


def test_stand_in_encoder():
    """Trained on the labels once, then read from its file; refused where it was made otherwise."""
    args = SimpleNamespace(seed=0, size=32, pretrain_steps=2, overwrite=False, workers=0,
                           dtype="fp32")
    with folder() as d:
        stage = args, Shapes(n=24, size=32), SimpleNamespace(out=d, rank=0), CPU
        with recorded(toy, "pretrain_encoder") as trainings:
            first, again = (toy.stand_in_encoder(*stage)[0].state_dict() for _ in range(2))
        torch.manual_seed(0)
        untrained = DINOv2(**ENCODERS["tiny14"]).state_dict()
        assert len(trainings) == 1 and same(first, again) is None and same(first, untrained)
        args.size = 48
        with refused("encoder.pt", "size 32 -> 48"):
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
    recon, terms = baselines.objective(s, args, x, noise)
    vf = baselines.vf_loss(z_proj, reference.features(x), 0.5, 0.25)
    # a sum over an image's values beside a mean; L_rec's gradient is taken at the encoder's end
    expected = {"kl": (0.5 / (3 * 32 * 48), baselines.kl_divergence(moments)),
                "vf": (0.1, vf, vae.encoder.conv_out.weight, 1e8)}
    assert same(terms, expected) is None

    path = TMP / "official.pt"
    state = {k: v for k, v in vae.state_dict().items() if not k.startswith("latent_")}
    state |= {f"{k}.weight": torch.zeros(1) for k in ("loss.d", "foundation_model.x")}
    for content in ({"state_dict": state}, state):
        save_checkpoint(path, content)
        again = load_tokenizer(path, VAE).requires_grad_(False)
        assert torch.equal(again.encode(x), mean) and torch.equal(again.decode(z), vae.decode(z))
        assert again(x, noise)[2] is None  # a plain VAE
        assert "latent statistics" in error_of(again.normalize, z, kind=ValueError)
        assert "--latent-stats" in error_of(files.require_statistics, again, path)
    assert "not a tokenizer" in error_of(load_tokenizer, path)  # no system was named that knows it
    del state["quant_conv.bias"]
    save_checkpoint(path, state)
    assert "quant_conv.bias" in error_of(load_tokenizer, path, VAE)


def test_baseline_losses():
    """KL of two dimensions (a log-variance is clamped to 20), and the VF loss of two tokens."""
    moments = torch.tensor([1.0, -2.0, math.log(4), 99.0]).view(1, 4, 1, 1)
    expected = 0.5 * (1 + 4 - 1 - math.log(4)) + 0.5 * (4 + math.exp(20) - 1 - 20)
    assert math.isclose(baselines.kl_divergence(moments).item(), expected, rel_tol=1e-6)
    z = torch.tensor([[3.0, 3.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # the tokens (3, 0) and (3, 0)
    f = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])
    # cosines 1 and 0: relu(.5 - cos) has the mean .25; S(z') is 1 everywhere, S(F) 0 off the
    # diagonal: .75 / 2
    assert math.isclose(baselines.vf_loss(z, f).item(), 0.25 + 0.375, rel_tol=1e-6)
    assert math.isclose(baselines.vf_loss(z, f, 0, 0).item(), 0.5 + 0.5, rel_tol=1e-6)


# ----------------------------------------------------------------------------------------- files.py

def test_encoder_files():
    """DINOv2's sizes follow from its file: plain, in half precision, a teacher's, in chunks."""
    state = random_weights(DINOv2(dim=128, depth=3, grid=4, registers=4)).state_dict()
    teacher = {f"backbone.{k}": v for k, v in state.items()} | {"dino_head.w": torch.zeros(1)}
    chunked = {k.replace("blocks.", f"blocks.{int(k[7]) // 2}.") if "blocks." in k else k: v
               for k, v in state.items()}
    path = str(TMP / "e.pth")
    for name, content in {"plain": state, "half": {k: v.half() for k, v in state.items()},
                          "teacher": {"teacher": teacher}, "chunked": chunked}.items():
        torch.save(content, path)
        loaded, arguments = load_encoder(path)
        assert arguments == {"dim": 128, "depth": 3, "swiglu": False, "registers": 4, "grid": 4}
        assert name == "half" or same(loaded.state_dict(), state) is None, name
    torch.save({k: v for k, v in state.items() if k != "blocks.1.ls1.gamma"}, path)
    assert "blocks.1.ls1.gamma" in error_of(load_encoder, path)
    torch.save({"a": torch.zeros(1)}, path)
    assert "no DINOv2" in error_of(load_encoder, path)
    assert "neither a file nor" in error_of(load_encoder, "vitx14")


def test_fingerprint():
    """It is that of the latents: adapter and statistics change it, the decoder does not."""
    tok, seen = small_tokenizer(), []
    for part in (tok.decoder.conv_out.bias, tok.adapter.fc2.bias, tok.latent_std):
        seen.append(files.fingerprint(tok))
        part.add_(1)
    assert seen[0] == seen[1] and len({*seen, files.fingerprint(tok)}) == 3


def test_batched_array():
    """Filled batch by batch, over stops: what is there is not drawn again, and a batch is always
    whole. Never a half file under the final name; another recipe's is refused; damage is named."""
    values = np.random.default_rng(0).standard_normal((10, 2, 3)).astype(np.float16)

    def make(recipe="a", n=10, **kw):
        return BatchedArray(path, n, (2, 3), np.float16, {"tokenizer": recipe}, **kw)

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
                        meter=runs.Meter(CPU), networks={"linear": linear},
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
        for name in (*others, "a.pt", "a_step00000003.png"):
            (d / name).touch()
        with runs.Run(d, 0, []) as run:
            assert [p.name for p in run.checkpoints("a")] == sorted(checkpoints)
            run.forget("a")
        assert {p.name for p in d.iterdir()} == {".lock", "log.csv", *others}


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
    presets = {"a": {"size": 16, "steps": 9}, "paper": {"size": 256, "steps": 90}}
    args = parser.fill(["--preset", "a", "--steps", "3", "--batch-size", "8", "--accum", "3"],
                       presets)
    assert (args.size, args.steps) == (16, 3) and args.given == {"steps"}
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
                        (RuntimeError(no_compiler), SystemExit("error: --compile takes")),
                        (KeyboardInterrupt(), SystemExit("error: interrupted")),
                        (RuntimeError("ours"), RuntimeError("ours"))):
        with refused(str(says), kind=type(says)), patch.object(sample, "main", side_effect=error):
            runs.launch(sample.main)


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
            (small_dit(), torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 5]))):
        random_weights(net).train()
        plain, kept = gradients(net, *inputs)
        runs.checkpoint_activations(net)
        again, kept_now = gradients(net, *inputs)
        assert same(plain, again) is None and kept_now < 0.5 * kept, (kept_now, kept)


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


def test_training_step_against_autograd():
    """The gradients of one micro-batch of two, all terms on, against plain autograd of the paper's
    sum: L1 + w_g L_GAN + w_sp L_sp; and VA-VAE's L1 + w_kl KL + w_vf VF."""
    def check(network, loss, name):
        found = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
        network.zero_grad()
        (loss / 2).backward()
        own = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
        assert found.keys() == own.keys()
        whole, off = (torch.cat([f.flatten() for f in grads]).norm() for grads in (
            own.values(), [own[k] - found[k] for k in own]))
        assert off < 1e-4 * whole, (name, off / whole)

    def weight(loss, other, layer):
        norms = [torch.autograd.grad(f, layer, retain_graph=True)[0].norm() for f in (loss, other)]
        return norms[0] / (norms[1] + 1e-4)

    x = torch.rand(2, 3, 64, 64) * 2 - 1
    tok, ref = (Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]) for _ in range(2))
    frozen(ref)
    tok.encoder.mask_token.requires_grad_(False)
    s, args = stage_by_hand(tok, losses.PatchGAN(16), reference=ref)
    args.w_sp, args.w_g, args.accum = 3.0, 0.7, 2
    tt.training_step(x, [], s, args, gan=True, last=True)
    recon, z0, _ = tok(x)
    l1, l_gan = (x - recon).abs().mean(), -s.discriminator(recon).mean()
    w_gan = 0.7 * weight(l1, l_gan, tok.decoder.conv_out.weight)
    l_sp = (z0 - ref.encode(x)).square().mean()
    check(tok, l1 + w_gan * l_gan + 3 * l_sp, "stage 2")

    vae, foundation = VAE(DECODERS["tiny"], vf_dim=192), DINOv2(**ENCODERS["tiny14"])
    frozen(foundation)
    s, args = stage_by_hand(vae, losses.PatchGAN(16), reference=foundation)
    args.w_kl, args.w_vf, args.vf_margins, args.accum = 0.5, 0.7, [0.1, 0.2], 2
    s.objective, noise = functools.partial(baselines.objective, s, args), torch.randn(2, 32, 4, 4)
    tt.training_step(x, [noise], s, args, gan=False, last=True)
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    z = mean + (logvar / 2).exp() * noise
    l1 = (x - vae.decode(z)).abs().mean()
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    vf = baselines.vf_loss(vae.linear_proj(z), foundation.features(x), 0.1, 0.2)
    w_vf = 0.7 * weight(l1, vf, vae.encoder.conv_out.weight)
    check(vae, l1 + 0.5 / (3 * 64 * 64) * kl + w_vf * vf, "VA-VAE")


def test_generator_step_leaves_the_discriminator_alone():
    """After one step D's gradients are those of its own loss, G's those of Eq. 1, and frozen parts
    have none."""
    tok, disc = Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]), losses.PatchGAN(16)
    frozen(tok.encoder)
    s, args = stage_by_hand(tok, disc)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    log = tt.training_step(x, [], s, args, gan=True, last=True)
    assert all(p.grad is None for p in tok.encoder.parameters())
    d_grads = [p.grad.clone() for p in disc.parameters()]
    disc.zero_grad()
    twin = copy.deepcopy(disc)
    with torch.no_grad():
        recon = tok(x)[0]
    losses.hinge_d(twin(x), twin(recon)).backward()
    for found, p in zip(d_grads, twin.parameters()):
        assert torch.allclose(found, p.grad, atol=1e-5)
    found = tok.decoder.conv_out.bias.grad.clone()
    tok.zero_grad()
    recon = tok(x)[0]  # Eq. 1 by hand, with the weight that was logged
    (F.l1_loss(x, recon) - 0.5 * log["adaptive"] * disc(recon).mean()).backward()
    assert torch.allclose(found, tok.decoder.conv_out.bias.grad, atol=1e-5)


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
    name = "encoder.blocks.0.attn.proj.weight"
    moved, ahead = ((raw[part][name] - one[name]).abs().mean() for part in ("ema", "tokenizer"))
    decay = tt.PRESETS["tiny"]["ema_decay"]
    assert 0 < moved < 3 * (1 - decay) * ahead, "the EMA starts as a copy and lags"

    rows = rows_of(out)
    steps = [(stage, step) for stage in "123" for step in "12"]
    assert [(row["stage"], row["step"]) for row in rows] == steps
    assert float(rows[2]["sp"]) < 1e-8 < float(rows[3]["sp"])  # it starts where stage 1 ended
    assert not rows[0]["sp"]
    second, third = (load_tokenizer(out / f"stage{n}.pt") for n in (2, 3))
    assert files.fingerprint(second) == files.fingerprint(third)
    assert third.latent_std.min() > 0 and not third.training
    assert Image.open(out / "stage2_step00000002.png").size == (8 * 64, 128)


def test_discriminator_starts_once_and_statistics_stay():
    """--disc-start counts through the stages; stage 3 keeps the latent statistics of stage 2, also
    where other images would give others."""
    with folder() as d:
        execute(tt, *SMALL, "--out", d, "--steps", 2, "--disc-start", 3, "--stage", 1)
        execute(tt, *SMALL, "--out", d, "--steps", 2, "--disc-start", 3, "--stage", 2)
        execute(tt, *SMALL, "--out", d, "--steps", 1, "--disc-start", 3, "--stage", 3,
                "--encode-images", 20)
        assert [bool(row["d_loss"]) for row in rows_of(d)] == [False, False, False, True, True]
        two, three = (load_file(d / f"stage{n}.pt")["tokenizer"] for n in (2, 3))
        assert torch.equal(two["latent_mean"], three["latent_mean"])
        assert torch.equal(two["latent_std"], three["latent_std"])


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


def test_ablations_of_stage_2():
    """L_sp before the adapter, and as a cosine: zero at the first step, since stage 2 starts where
    stage 1 ended."""
    flags = [*SMALL, "--stage", 2, "--init", small_run() / "stage1.pt", "--steps", 2]
    seen = set()
    for name, more in {"l2": [], "encoder": ["--sp-at", "encoder"],
                       "cosine": ["--sp-loss", "cosine"]}.items():
        execute(tt, *flags, *more, "--out", TMP / f"sp-{name}")
        first, last = rows_of(TMP / f"sp-{name}")
        assert abs(float(first["sp"])) < 1e-6 < float(last["sp"])
        assert bool(first["sp_to_var"]) == (name == "l2")
        seen.add(last["sp"])
    assert len(seen) == 3


def test_baselines():
    """VAE and VA-VAE: what trains, the log, an exact resume, and which flags are not theirs."""
    flags = [*SMALL, "--accum", 2, "--steps", 3]
    plain = [flag for flag in flags if flag not in ("--encoder", "random:tiny14")]
    parts = {"encoder", "quant_conv", "post_quant_conv", "decoder"}
    for name, own, trains in (("vae", plain, parts), ("vavae", flags, parts | {"linear_proj"})):
        out = TMP / name
        execute(tt, *own, "--model", name, "--out", out)
        first, last = (load_file(out / f"{name}_step{step:08d}.pt") for step in (2, 3))
        for state in (last["tokenizer"], last["ema"]):
            moved = {k.split(".")[0] for k, v in state.items()
                     if not torch.equal(v, first["tokenizer"][k])}
            assert moved - {"latent_mean", "latent_std"} == trains
        row = rows_of(out)[-1]
        assert row["stage"] == "0" and float(row["kl"]) > 0 and not row["sp"]
        assert bool(row["vf"]) == bool(row["vf_adaptive"]) == (name == "vavae")
        vae = load_tokenizer(out / f"{name}.pt", VAE)
        z = torch.randn(2, 32, 4, 4)
        assert (vae.unnormalize(vae.normalize(z)) - z).abs().max() < 1e-5 and not vae.training

    again, vavae = TMP / "vavae-again", [*flags, "--model", "vavae"]
    execute(tt, *vavae, "--out", again, "--steps", 2)
    execute(tt, *vavae, "--out", again)
    assert same(last, load_file(again / "vavae_step00000003.pt")) is None
    margins = [*vavae, "--vf-margins", 0, 0]
    with refused("vf_margins"):
        execute(tt, *margins, "--out", again, "--steps", 4)
    execute(tt, *margins, "--out", TMP / "margins", "--steps", 1)
    assert float(rows_of(TMP / "margins")[0]["vf"]) > float(rows_of(again)[0]["vf"]) + 0.1
    for words, more in {"no --stage": ["vae", "--stage", 1], "no --encoder": ["vae"],
                        "earlier stage": ["vavae", "--init", "x"]}.items():
        with refused(words):
            execute(tt, *flags, "--model", *more, "--out", TMP / "none")


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
                 "--accum", "2", "--out", out, ranks=ranks)
        rows += rows_of(out)
        saved.append(load_file(out / "stage2_step00000001.pt"))
    one, two = rows
    for key, value in one.items():
        equal = value == two[key]
        assert equal or math.isclose(float(value), float(two[key]), rel_tol=1e-5, abs_tol=1e-9), key
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
            ("--vgg16", files.VGG16_URL): ["--w-p", 1, "--vgg16", TMP / "no-vgg.pth"],
            ("cannot write",): ["--out", TMP / "a-file" / "x"]}.items():
        with refused(*words):
            execute(tt, *SMALL, "--steps", 1, "--out", out, *flags)
    if files.fcntl:
        with runs.Run(out, 0, tt.COLUMNS), refused("another run"):
            execute(tt, *SMALL, "--steps", 1, "--out", out)
    assert "cut.pt" in error_of(load_tokenizer, cut)
    assert "take the stage's final one" in error_of(load_tokenizer, resume)


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

        execute(train_dit, *ours, "--out", d / "clipped", "--steps", 1, "--clip", 1e-3)
        moments = load_file(d / "clipped" / "dit_step00000001.pt")["opt"]["state"].values()
        norm = torch.cat([m["exp_avg"].flatten() for m in moments]).norm()
        close(norm.item(), 0.1 * 1e-3, 1e-5)  # AdamW's first moment: (1 - .9) of the gradient

        tokenizer, cache = small_tokenizer(), np.load(a / "latents.npy", mmap_mode="r")
        images = data.open_folders(d / "data" / "train", None, 1)[0]
        x = data.to_tensor(data.Crops(images, 32)[0, 5][0])
        z = tokenizer.normalize(tokenizer.encode(torch.stack([x, x.flip(2)])))
        assert np.abs(cache[5] - z.numpy()).max() < 2e-3 * z.abs().max()  # fp16

        args = train_dit.parse([str(flag) for flag in ours])
        cached, fresh = (train_dit.FlowData(images, latents, (8, 2, 2), 12, args)
                         for latents in (cache, None))
        (z0, *rest), (x, *same_rest) = cached[0, 5], fresh[0, 5]
        assert same(rest, same_rest) is None
        z = tokenizer.normalize(tokenizer.encode(x[None]))[0]
        assert (z0 - z).abs().max() < 2e-3 * z.abs().max()
        draws = [cached[epoch, i] for epoch in range(40) for i in range(24)]
        assert 0.07 < np.mean([y == 12 for _, y, _, _ in draws]) < 0.13  # --label-drop 0.1
        normal = torch.stack([n for _, _, n, _ in draws])
        assert abs(normal.mean()) < 0.15 and abs(normal.std() - 1) < 0.1

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
                ("dit_step00000004.pt", "lr 0.002 -> 0.1"): ["--lr", 0.1],
                ("--steps",): ["--steps", 0],
                ("--batch-size 9",): ["--batch-size", 9, "--accum", 2]}.items():
            with refused(*words):
                execute(train_dit, *ours, "--steps", 4, "--out", a, *flags)
        with refused("missing.pt"):  # on the built-in shapes
            execute(train_dit, "--preset", "tiny", "--tokenizer", "missing.pt", "--out", d / "c")


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
                            opt_g=opt, opt_d=None)
        args = SimpleNamespace(clip=clip, ema_decay=0.7)

        def numbers(tensors):
            return torch.cat([p.detach().flatten() for p in tensors]).tolist()

        w = numbers(trained)
        e, m, v = list(w), [0.0] * len(w), [0.0] * len(w)
        for t in (1, 2):
            for p in trained:
                p.grad = torch.randn_like(p)
            g = numbers(p.grad for p in trained)
            script.update(s, args, *([False] if script is tt else []))
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
    velocity(z, 0.51), velocity(z, 0.05)
    assert net.batches == [2, 4, 2, 2]
    assert (velocity.conditional, velocity.unconditional) == (3, 1)
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
    for spec in ("3", "0,-1", "dog"):
        with refused("--labels", spec):
            sample.choose_labels(spec, 3, 5, 0)
    assert "unconditional" in error_of(sample.choose_labels, "1", 0, 5, 0)


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


def test_official_dit():
    """Only names and shapes to go by; strict; and the other time direction."""
    dit = random_weights(small_dit(qk_norm=True))
    state, path = dit.state_dict(), TMP / "dit.pt"
    z, y = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
    torch.save({"ema": state, "model": {}}, path)
    loaded, content = sample.load_dit(path)
    assert "recipe" not in content and loaded.arguments == dit.arguments
    with torch.no_grad():
        v = sample.Velocity(loaded, y, time="lightning")(z, 0.3)
        assert torch.equal(v, -dit(z, torch.tensor([0.7, 0.7]), y))
    del state["blocks.1.attn.k_norm.weight"]
    for content, word in (({"ema": state}, "k_norm"), ({"model": state}, "ema")):
        torch.save(content, path)
        with refused("dit.pt", word):
            sample.load_dit(path)


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
        want, _ = sample.generate(dit, tokenizer, np.arange(5), np.arange(5) % 3, 0,
                                  sample.time_grid(2), cfg=3.0)
        assert images.shape == (5, 32, 16, 3) and images.dtype == np.uint8
        assert np.abs(images.astype(int) - data.to_uint8(want)).max() <= 1
        execute(sample, *ours, "--out", pngs, "--batch-size", 5)
        (pngs / "000003.png").unlink()
        execute(sample, *ours, "--out", pngs, "--grid", d / "grid.png")
        found = sorted(pngs.glob("*.png"))
        assert [f.name for f in found] == [f"{i:06d}.png" for i in range(5)]
        again = np.stack([np.array(Image.open(f)) for f in found])
        assert np.abs(again.astype(int) - images).max() <= 1
        assert Image.open(d / "grid.png").size == (5 * 16, 32)

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


def test_kid_by_hand():
    """Two points a side: within k = 1; between the sets 1.5^3, 1, 1.5^3, 1. Subsets are seeded."""
    x, y = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[1., 1.], [0., 0.]])
    assert fid.kid(x, y) == (1 + 1 - 2 * (1.5 ** 3 + 1) / 2, 0, 2)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    assert fid.kid(x, x + 1, size=10) == fid.kid(x, x + 1, size=10)
    assert fid.kid(x, x + 1, size=10) != fid.kid(x, x + 1, size=10, seed=1)


def test_inception_score_closed_forms():
    """One-hot predictions of K classes: K. Equal ones: 1. ADM's chunks are in file order,
    torch-fidelity's shuffled."""
    close(fid.inception_score(100 * torch.eye(10).repeat(20, 1))[0], 10, 1e-6)
    close(fid.inception_score(torch.zeros(50, 10))[0], 1)
    by_class = 100 * torch.eye(2).repeat_interleave(5000, 0)  # each chunk of 5000 is one class
    close(fid.inception_score(by_class)[0], 1, 1e-6)
    close(fid.inception_score(by_class, splits=4)[0], 2, 1e-2)


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
    """The official file's names and sizes, TensorFlow's pools, and where the features come from."""
    net = fid.Inception()
    assert parameters(net) == 23_850_960
    with torch.device("meta"):  # torchvision's, without auxiliary head, of 1008 classes
        theirs = torchvision.models.inception_v3(num_classes=1008, aux_logits=False,
                                                 init_weights=False).state_dict()
    ours = net.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    of_2018 = {k: v for k, v in ours.items() if "num_batches" not in k}
    files.load_strictly(net, of_2018, "test")
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(fid.average_pool(ones), ones)  # the padding does not count
    dot = F.pad(torch.ones(1, 1, 1, 1), (0, 2, 0, 2))
    assert net.Mixed_7c.pool(dot).sum() == 4 and net.Mixed_7b.pool(dot)[0, 0, 0, 0] == 0.25

    seen = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.append(out))
    out = net(torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8))
    shapes = {name: tuple(v.shape) for name, v in out.items()}
    assert shapes == {"pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
    assert torch.equal(out["spatial"].view(2, 17, 17, 7)[1, 3, 5], seen[0][1, :7, 3, 5])  # HWC
    assert torch.allclose(out["logits"], out["pool"] @ net.fc.weight.T)


def test_psnr_ssim():
    """A tenth of the range is 20 dB; of two flat images SSIM's luminance term is left."""
    x = torch.zeros(2, 3, 16, 20)
    assert torch.allclose(fid.psnr(x, x + 0.2), torch.tensor(20.0).double(), atol=1e-5)
    a, b = 0.5, 0.7  # in [0, 1]
    expected = torch.tensor((2 * a * b + 1e-4) / (a * a + b * b + 1e-4)).double()
    assert torch.allclose(fid.ssim(x, x + 0.4), expected, atol=1e-6)
    noise = torch.rand(1, 3, 12, 12) * 2 - 1
    assert abs(fid.ssim(noise, noise).item() - 1) < 1e-12 and fid.ssim(noise, -noise).item() < 0


def test_linear_probe():
    """Separable classes, nothing to tell, and two Gaussians at +-1, where Bayes' accuracy is
    Phi(1) = 84.1 %."""
    y = torch.arange(300) % 3
    x = F.one_hot(y, 3) * 100.0 + torch.randn(300, 3)
    assert fid.linear_probe(x, y, x + torch.randn(300, 3), y) == 100
    assert fid.linear_probe(torch.zeros(300, 2), y, torch.zeros(300, 2), y) < 34
    y = torch.arange(20000) % 2
    x = torch.randn(20000, 1) + (2.0 * y - 1)[:, None]
    assert abs(fid.linear_probe(x[:10000], y[:10000], x[10000:], y[10000:]) - 84.1) < 1.2


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
        for name, metrics in (("images", by_folder), ("ref", ["FD-DINOv2"]), ("both", by_folder)):
            found = figures(d / f"{name}.npz", b, *dinov2)
            assert set(found) == set(metrics), name
            close(found["FD-DINOv2"], by_folder["FD-DINOv2"], 1e-6)

        np.savez(d / "keys.npz", other=np.zeros(3))
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
                ("neither images (arr_0) nor statistics",): [d / "keys.npz", b],
                ("(10,)",): [d / "dims.npz", b, *dinov2, "--metrics", "fid"],
                ("--metrics kid",): [d / "dims.npz", b, *dinov2, "--metrics", "kid"],
                ("object",): [d / "pickle.npz", b],
                ("pretrained.pth",): [a, b, "--inception", d / "pretrained.pth"],
                ("does not fit Inception",): [a, b, "--inception", encoder],
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
        images, a, path = write_images(d / "a", n=20), d / "a", d / "tokenizer.pt"
        save_checkpoint(path, {"tokenizer": tokenizer.state_dict(), "recipe": {"size": 64},
                               "arguments": tokenizer.arguments})
        found = figures("--recon", path, a, "--features", "dinov2", "--encoder", path,
                        "--metrics", "rfid,psnr,ssim", "--batch-size", 8)
        assert found.keys() == {"rFD-DINOv2", "PSNR", "SSIM"}
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        recon = tokenizer.decode(tokenizer.encode(x / 127.5 - 1))
        recon = ((recon + 1) * 127.5).round().clamp(0, 255)
        by_hand = 10 * np.log10(255 ** 2 / (recon - x).square().mean((1, 2, 3)).numpy())
        close(found["PSNR"], by_hand.mean(), 1e-5)
        with refused("rfid,psnr,ssim,lpips"):  # what can be left out
            execute(fid, "--recon", path, a, "--metrics", "psnr,lpips", "--vgg16", "none",
                    "--lpips-heads", "none", "--workers", 0)
        assert 0 <= figures("--probe", path, a, a)["probe %"] <= 100
        assert figures("--probe", path, a, a, "--tokens")
        with refused("class folders"):
            execute(fid, "--probe", path, a / "class0", a, "--workers", 0)


# --------------------------------------------------------------------------------- results/judge.py

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


# -------------------------------------------------------------------------------------- to run them

def setup_function(_):
    """Before each test, here and under pytest: a test draws the same numbers alone and among
    others."""
    torch.manual_seed(0)


def main():
    words, failed, began = sys.argv[1:], 0, time.time()
    tests = {name: test for name, test in globals().items() if name.startswith("test_")
             and (not words or any(word in name for word in words))}
    for name, test in tests.items():
        begin, said = time.time(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                setup_function(test)
                test()
            print(f"ok    {name} ({time.time() - begin:.1f} s)", flush=True)
        except Exception:  # noqa: BLE001, whatever a test raises is its failure
            failed += 1
            print(f"FAIL  {name}\n{said.getvalue()[-2000:]}\n{traceback.format_exc()}", flush=True)
    print(f"{time.time() - began:.0f} s")
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
