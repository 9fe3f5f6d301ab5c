"""The CPU smoke test: `python test_smoke.py [WORD ...]`, or pytest. Minutes, no network, no data.

It reads like a specification, in the order of the files: each part against a closed form, a hand
value or an independent computation, each script end to end on small work. WORDs choose the tests
whose names contain one of them. Damaged files, kills and signals are test_faults.py's.
"""
import ast
import atexit
import contextlib
import csv
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
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

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
    with tempfile.TemporaryDirectory() as d:
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
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"a hang: {process.communicate()[1][-2000:]}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


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
        for node in ast.walk(ast.parse(path.read_text())):
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
    sizes = DECODERS["tiny"] | {"ch": 16}
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
    """LightningDiT from its published description, on a state dict in fp64; explicit softmax, no
    modules."""
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
    out, v = linear("final_layer.linear", x), torch.zeros_like(z)
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


# ---------------------------------------------------------------------------------------- losses.py

class Perceptual(torch.nn.Module):
    """In LPIPS' place. Like it, it sends gradients to its second image alone."""

    def forward(self, x, y):
        return 3 * (x.detach() - y).mean((1, 2, 3)).square()


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
    least = baselines.kl_divergence(torch.tensor([0.0, -99.0]).view(1, 2, 1, 1)).item()
    assert math.isclose(least, 0.5 * (math.exp(-30) - 1 + 30), rel_tol=1e-6)
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
        (array.parts / ".000000000-000000004.npy.part").symlink_to("/dev/full")
        with refused("No space", "000000000-000000004.npy", "make room"):
            array.write(range(4), values[:4])
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
    s = SimpleNamespace(prefix="a", recipe={}, step=0, steps=9, log_every=1, meter=runs.Meter(CPU),
                        networks={"linear": linear}, optimisers={"adam": adam})
    with folder() as d:
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


def test_launch():
    """A user's mistake is one line and status 1; a mistake of ours is a traceback."""
    for error, says in ((UserError("a\nb"), SystemExit("error: a b")),
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
          patch.dict(DECODERS, tiny=DECODERS["tiny"] | {"ch": 16}),
          patch.object(tt, "linear_probe", lambda *_: 0.0),
          patch.object(torch.nn.Module, "compile") as compiled,
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
    assert compiled.call_count == 10 and len(checkpointed) == 1  # the VAE's levels


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
    s.objective = lambda x: (recon, {"term": (1.0, 0 * recon.sum(), layer, 5.0)})
    log = tt.training_step(torch.ones(1, 3, 32, 32), [], s, args, gan=False, last=True)
    assert log["term_adaptive"] == 5


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

    rows = rows_of(out)
    steps = [(stage, step) for stage in "123" for step in "12"]
    assert [(row["stage"], row["step"]) for row in rows] == steps
    assert float(rows[2]["sp"]) < 1e-8 < float(rows[3]["sp"])  # it starts where stage 1 ended
    assert not rows[0]["sp"]
    second, third = (load_tokenizer(out / f"stage{n}.pt") for n in (2, 3))
    assert files.fingerprint(second) == files.fingerprint(third)
    assert third.latent_std.min() > 0 and not third.training
    assert Image.open(out / "stage2_step00000002.png").size == (8 * 32, 64)


def test_discriminator_starts_once():
    """--disc-start counts through the stages, each of its own steps."""
    with folder() as d, patch.dict(tt.PRESETS["tiny"], steps=(2, 2, 1)):
        execute(tt, *SMALL, "--out", d, "--disc-start", 3)
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
            figures = {"rec": rec, "psnr": psnr.mean(), "ssim": fid.ssim(v, recon).mean(),
                       "probe": probes[0][1], "probe_tokens": probes[1][1]}
            assert figures.keys() == content["validation"].keys()
            for k, value in figures.items():
                close(content["validation"][k], float(value), 1e-4)
            by_hand = ((z.mean((2, 3)), y[chosen], tok.encode(v).mean((2, 3)), labels),
                       (tokens.mean(1), y[chosen], tok.features(v).mean(1), labels))
            for (found, _), expected in zip(probes, by_hand):
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
    networks whatever E_p is; --d and the preset's disc_ch are their sizes."""
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
    harmless += "check_data pretrain_steps given encoder_given"
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
            ("--vgg16", files.VGG16_URL): ["--w-p", 1, "--vgg16", TMP / "no-vgg.pth"],
            ("cannot write",): ["--out", TMP / "a-file" / "x"]}.items():
        with refused(*words):
            execute(tt, *SMALL, "--steps", 1, "--out", out, *flags)
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
            with files.lock(held, ""), refused("another process", out.name):
                execute(sample, *ours, "--out", out)
            with refused(out.name, "seed 0 -> 1"):
                execute(sample, *ours, "--out", out, "--seed", 1)
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
