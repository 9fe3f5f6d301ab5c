"""The CPU smoke test: `python test_smoke.py` (or pytest), under two minutes, no network, no data.

Every part against a closed form, a hand value or an independent computation; every script end to end on small work.
`python test_smoke.py NAME ...` runs the tests whose names contain one of the words.

`python test_smoke.py --slow` runs the tests named slow_* too: real processes that are killed, stopped and starved, and
ranks that fail; 23 minutes on one busy core. `--slow slow_` runs these alone, `--slow slow_kills` one of them.
"""
import atexit
import collections
import contextlib
import copy
import csv
import errno
import functools
import http.client
import io
import json
import math
import multiprocessing
import operator
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import fid
import losses
import sample
import train_dit
import train_tokenizer as tt
from model import (
    DECODERS,
    DITS,
    ENCODERS,
    Adapter,
    AttnBlock,
    Decoder,
    DINOv2,
    Downsample,
    Encoder,
    GroupNorm,
    LightningDiT,
    Tokenizer,
    UserError,
    checkpoint_activations,
    dit_arguments,
    find_weights,
    load_encoder,
    load_file,
    rope_tables,
    rotate,
    sha256,
    sincos_embedding,
)
from train_tokenizer import Shapes, save_checkpoint, to_uint8

HERE = Path(__file__).resolve().parent
TMP = Path(tempfile.mkdtemp(prefix="aligntok-"))
atexit.register(shutil.rmtree, TMP, ignore_errors=True)
SMALL = ["--preset", "tiny", "--encoder", "random:tiny14", "--batch-size", "4", "--val-images", "24",
         "--probe-images", "48", "--dtype", "fp32", "--disc-start", "0", "--log-every", "1", "--save-every", "2"]


def error_of(call, *args):
    """The text of the UserError that a call must end in."""
    try:
        call(*args)
    except UserError as e:
        assert "\n" not in str(e), "one line"
        return str(e)
    raise AssertionError(f"no UserError from {args}")


def count(module):
    return sum(p.numel() for p in module.parameters())


def same(a, b):
    """Bit equality of nested dicts, lists, tensors and numbers; returns the first path that differs, or None."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return "keys"
        return next((f"{k}.{d}" for k in a if (d := same(a[k], b[k])) is not None), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return "length"
        return next((f"{i}.{d}" for i, (x, y) in enumerate(zip(a, b)) if (d := same(x, y)) is not None), None)
    if isinstance(a, torch.Tensor):
        return None if torch.equal(a, b) else f"tensor, by {(a - b).abs().max()}"
    return None if a == b else f"{a} != {b}"


def rows_of(out):
    """The rows of a run's log.csv."""
    return list(csv.DictReader((out / "log.csv").read_text().splitlines()))


def randomised(module, scale=0.3):
    """Random parameters everywhere, so that no zero or one hides a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * scale)
    return module


def start(script, *flags, ranks=0):
    """A script in a process of its own, or in `ranks` of them under torchrun, with all their workers in one group."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(HERE / script), *map(str, flags)], text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "TMPDIR": str(TMP)})


def end(process, timeout=300):
    """What a process says on stderr until its end; a hang is killed, and fails. Nothing of its group stays."""
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
    """Writes a script that runs another, its first argument, after a change to train_tokenizer.py's functions."""
    path.write_text("import hashlib, importlib, os, sys\nimport torch.distributed as dist\n"
                    f"import train_tokenizer as tt\n{change}\n"
                    "tt.run(importlib.import_module(sys.argv.pop(1)[:-3]).main)\n")
    return path


# In fp64 ranks can be compared with one process. In fp32 they differ by rounding, which one LeakyReLU near 0 makes 1e-3
# of a gradient, and the GAN multiplies by 10 to 100 a step.
IN_FP64 = """
import torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float, from_numpy = torch.Tensor.double, torch.from_numpy
torch.from_numpy = lambda a: from_numpy(a).double() if a.dtype.kind == "f" else from_numpy(a)
"""


# ------------------------------------------------------------------------------------------------------------ model.py

def test_parameter_counts():
    with torch.device("meta"):
        for name, parameters, keys in (("vits14", 22_056_576, 175), ("vitb14", 86_580_480, 175),
                                       ("vitl14", 304_368_640, 343), ("vitg14", 1_136_480_768, 567)):
            plain, reg = DINOv2(**ENCODERS[name]), DINOv2(**ENCODERS[name], registers=4)
            assert count(plain) == parameters and len(plain.state_dict()) == keys, name
            assert count(reg) == parameters + 4 * plain.dim and len(reg.state_dict()) == keys + 1, name
        encoder, decoder = Encoder(**DECODERS["vavae"]), Decoder(**DECODERS["vavae"])
        assert count(encoder) == 28_413_248 and count(decoder) == 41_417_603
    assert count(losses.PatchGAN()) == 2_765_633
    keys = encoder.state_dict().keys() | decoder.state_dict().keys()
    for key in ("down.0.block.1.conv2.weight", "down.2.block.0.nin_shortcut.weight", "down.4.attn.1.proj_out.bias",
                "down.3.downsample.conv.weight", "mid.attn_1.q.weight", "up.4.attn.2.norm.weight",
                "up.1.upsample.conv.bias"):
        assert key in keys, key


def test_dinov2_against_numpy():
    """A forward of a one-block register model, in plain numpy with loops over the heads."""
    net = randomised(DINOv2(dim=128, depth=1, registers=4, grid=3), 0.1).double().eval()
    w = {k: v.numpy() for k, v in net.state_dict().items()}
    x = torch.randn(1, 3, 42, 42, dtype=torch.float64)
    patches = [(x[0, :, 14 * i:14 * i + 14, 14 * j:14 * j + 14].numpy() * w["patch_embed.proj.weight"]).sum((1, 2, 3))
               for i in range(3) for j in range(3)]
    tokens = np.stack([w["cls_token"][0, 0]] + [p + w["patch_embed.proj.bias"] for p in patches]) + w["pos_embed"][0]
    tokens = np.concatenate([tokens[:1], w["register_tokens"][0], tokens[1:]])

    def norm(t, name):
        centred = t - t.mean(1, keepdims=True)
        return centred / np.sqrt(t.var(1, keepdims=True) + 1e-6) * w[name + ".weight"] + w[name + ".bias"]

    def linear(t, name):
        return t @ w[name + ".weight"].T + w[name + ".bias"]

    q, k, v = np.split(linear(norm(tokens, "blocks.0.norm1"), "blocks.0.attn.qkv"), 3, axis=1)
    heads = []
    for h in (slice(0, 64), slice(64, 128)):
        a = np.exp(q[:, h] @ k[:, h].T / 8)
        heads.append(a / a.sum(1, keepdims=True) @ v[:, h])
    tokens = tokens + w["blocks.0.ls1.gamma"] * linear(np.concatenate(heads, 1), "blocks.0.attn.proj")
    hidden = linear(norm(tokens, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    tokens = norm(tokens + w["blocks.0.ls2.gamma"] * linear(hidden, "blocks.0.mlp.fc2"), "norm")
    with torch.no_grad():
        cls, out = net(x)
    assert np.allclose(cls[0], tokens[0], atol=1e-10) and np.allclose(out[0], tokens[5:], atol=1e-10)


def test_position_embedding_rules():
    """Plain models resample by scale (h + 0.1) / grid with a bicubic kernel of a = -0.75; register models by size."""
    def bicubic(v, out, scale, a=-0.75):
        def k(t):
            t = abs(t)
            if t < 1:
                return (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1
            return a * (t ** 3 - 5 * t ** 2 + 8 * t - 4) if t < 2 else 0.0
        rows = []
        for i in range(out):
            centre = (i + 0.5) / scale - 0.5
            taps = range(math.floor(centre) - 1, math.floor(centre) + 3)
            rows.append(sum(k(centre - j) * v[min(max(j, 0), len(v) - 1)] for j in taps))
        return np.stack(rows)

    net = randomised(DINOv2(dim=64, depth=0, grid=5))
    grid = net.pos_embed.detach()[0, 1:].double().view(5, 5, 64).numpy()
    expected = bicubic(bicubic(grid, 3, 3.1 / 5).transpose(1, 0, 2), 7, 7.1 / 5).transpose(1, 0, 2)  # 3 rows, 7 columns
    found = net.position_embedding(3, 7).detach()
    assert np.allclose(found[0, 1:].view(3, 7, 64), expected, atol=1e-5)
    assert torch.equal(found[:, 0], net.pos_embed[:, 0])
    assert net.position_embedding(5, 5) is net.pos_embed
    reg = DINOv2(dim=64, depth=0, registers=4, grid=5)
    reg.pos_embed = net.pos_embed
    # enlarging needs no antialias, but its kernel is PIL's, a = -0.5; at the borders it leaves taps out instead
    larger = bicubic(bicubic(grid, 10, 2.0, -0.5).transpose(1, 0, 2), 10, 2.0, -0.5).transpose(1, 0, 2)
    found = reg.position_embedding(10, 10).detach()[0, 1:].view(10, 10, 64)
    assert np.allclose(found[3:-3, 3:-3], larger[3:-3, 3:-3], atol=1e-5)


def test_encoder_files():
    net = randomised(DINOv2(dim=128, depth=3, grid=4, registers=4))
    state = net.state_dict()
    forms = {"plain": state, "half": {k: v.half() for k, v in state.items()},
             "teacher": {"teacher": {f"backbone.{k}": v for k, v in state.items()} | {"dino_head.w": torch.zeros(1)}},
             "chunked": {k.replace("blocks.", f"blocks.{int(k[7]) // 2}.") if k.startswith("blocks.") else k: v
                         for k, v in state.items()}}
    for name, content in forms.items():
        torch.save(content, TMP / "e.pth")
        loaded, arguments = load_encoder(str(TMP / "e.pth"))
        assert arguments == {"dim": 128, "depth": 3, "swiglu": False, "registers": 4, "grid": 4}, name
        if name != "half":
            assert same(loaded.state_dict(), state) is None, name
    torch.save({k: v for k, v in state.items() if k != "blocks.1.ls1.gamma"}, TMP / "e.pth")
    assert "blocks.1.ls1.gamma" in error_of(load_encoder, str(TMP / "e.pth"))
    torch.save({"a": torch.zeros(1)}, TMP / "e.pth")
    assert "no DINOv2" in error_of(load_encoder, str(TMP / "e.pth"))
    assert "neither a file nor" in error_of(load_encoder, "vitx14")


def test_convolutional_parts():
    """GroupNorm, attention and the asymmetric downsampling against torch's own and explicit formulas."""
    for channels, groups in ((128, 32), (512, 32), (64, 16)):
        x, norm = torch.randn(2, channels, 6, 4), randomised(GroupNorm(channels))
        assert torch.allclose(norm(x), F.group_norm(x, groups, norm.weight, norm.bias, 1e-6), atol=1e-6)
    x = torch.randn(2, 64, 6, 4)
    attn = randomised(AttnBlock(64), 0.1)
    y = attn.norm(x)
    q, k, v = ((torch.einsum("oc,bchw->bohw", f.weight[:, :, 0, 0], y) + f.bias.view(-1, 1, 1)).flatten(2)
               for f in (attn.q, attn.k, attn.v))
    weights = (q.transpose(1, 2) @ k / 8).softmax(-1)  # (B, query, key)
    y = torch.einsum("bqk,bck->bcq", weights, v).view_as(x)
    assert torch.allclose(attn(x), x + attn.proj_out(y), atol=1e-5)
    down = randomised(Downsample(64))
    x = torch.randn(1, 64, 4, 4)
    corner = (x[0, :, :3, :3] * down.conv.weight[5]).sum() + down.conv.bias[5]  # the first window is not padded
    last = (x[0, :, 2:, 2:] * down.conv.weight[5, :, :2, :2]).sum() + down.conv.bias[5]
    assert torch.allclose(down(x)[0, 5, [0, 1], [0, 1]], torch.stack([corner, last]), atol=1e-4)
    decoder = Decoder(**DECODERS["tiny"])
    assert decoder(torch.randn(1, 32, 2, 3)).shape == (1, 3, 32, 48)
    assert Encoder(**DECODERS["tiny"])(torch.randn(1, 3, 32, 48)).shape == (1, 64, 2, 3)


def test_checkpointing_changes_no_gradient():
    def gradients(net, *inputs):
        """Also the number of values that are kept for the backward pass."""
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = net(*inputs)
        net.zero_grad()
        (out if torch.is_tensor(out) else out[0]).square().mean().backward()
        return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}, sum(kept)

    x = torch.rand(2, 3, 32, 32)
    for net, *inputs in ((Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]), x),
                         (tt.VAE(DECODERS["tiny"]), x, torch.randn(2, 32, 2, 2)),
                         (LightningDiT(dim=32, depth=2, heads=2, d=4, num_classes=3, grid=(2, 2)),
                          torch.randn(2, 4, 2, 2), torch.rand(2), torch.tensor([1, 3]))):
        random_weights(net).train()
        plain, kept = gradients(net, *inputs)
        checkpoint_activations(net)
        again, kept_now = gradients(net, *inputs)
        assert same(plain, again) is None and kept_now < 0.5 * kept, (kept_now, kept)


def test_tokenizer():
    tok = Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"], d=24).eval()
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        recon, z, tokens = tok(x)
        assert recon.shape == x.shape and z.shape == (2, 24, 4, 6) and tokens.shape == (2, 24, 192)
        # position (row 2, column 5) of z is the adapter's output at token 2 * 6 + 5
        assert torch.allclose(z[1, :, 2, 5], tok.adapter(tokens[1, 17]), atol=1e-6)
        assert torch.equal(tok.encode(x), z) and torch.equal(tok.decode(z), recon)
    assert "divisible by 16" in error_of(tok.encode, torch.zeros(1, 3, 64, 72))
    assert "no latent statistics" in error_of(tok.normalize, z)
    tok.latent_mean.copy_(torch.arange(24.0))
    tok.latent_std.fill_(2)
    assert torch.allclose(tok.normalize(z), (z - torch.arange(24.0).view(-1, 1, 1)) / 2)
    assert torch.allclose(tok.unnormalize(tok.normalize(z)), z, atol=1e-5)
    # DINOv2 sees ImageNet's normalisation of [0, 1], at 14/16 of the size
    seen = []
    tok.encoder.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    tok.encode(torch.full((1, 3, 32, 48), 0.0))
    assert seen[0].shape == (1, 3, 28, 42)
    assert torch.allclose(seen[0][0, :, 3, 3], torch.tensor([.0655, .1964, .4178]), atol=1e-4)  # (.5 - mean) / std
    before = tok.fingerprint()
    with torch.no_grad():
        tok.decoder.conv_out.bias.add_(1)
        assert tok.fingerprint() == before
        tok.adapter.fc2.bias.add_(1)
        assert tok.fingerprint() != before
    assert Adapter(8, 4, 16)(torch.zeros(2, 5, 8)).shape == (2, 5, 4)


# ----------------------------------------------------------------------------------------------------------- losses.py

def test_gan_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert losses.hinge_d(real, fake).item() == 0.5 * (0.25 + 0.5) and losses.hinge_g(fake).item() == 1.5
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = losses.adaptive_weight((w * torch.tensor([3.0, 4.0])).sum(), 0.5 * w[0], w)  # norms 5 and .5
    assert abs(weight.item() - 5 / (0.5 + 1e-4)) < 1e-5 and not weight.requires_grad
    assert losses.adaptive_weight(w.sum() * 1e9, 0 * w.sum(), w).item() == 1e4


def test_a_collapsed_discriminator_shows_in_the_log():
    """One answer for every image: it is right on the real or on the fake ones, and the adaptive weight is at its clamp.
    One that tells them apart is right on both."""
    tok, args = Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]), tt.parse(["--preset", "tiny"])

    def logged(discriminator):
        s = SimpleNamespace(tokenizer=tok, generator=tok, discriminator=discriminator, critic=discriminator,
                            reference=None, lpips=None, autocast=contextlib.nullcontext)
        log = tt.training_step(torch.ones(2, 3, 32, 32), s, args, gan=True, last=True)
        return [log[k].item() for k in ("d_real", "d_fake", "adaptive")]

    class Brightness(torch.nn.Module):  # x is 1 everywhere, its reconstruction is not
        def forward(self, x):
            return x.mean((1, 2, 3)) - 0.9 + 0 * self.unused

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

    collapsed = losses.PatchGAN(16)
    for bias, right in ((0.5, [1, 0]), (-0.5, [0, 1])):
        torch.nn.init.zeros_(collapsed.main[-1].weight)
        torch.nn.init.constant_(collapsed.main[-1].bias, bias)
        assert logged(collapsed) == [*right, 1e4]
    *right, adaptive = logged(Brightness())
    assert right == [1, 1] and 0 < adaptive < 1e4


def test_semantic_preservation():
    z = torch.tensor([[[[1.0]], [[0.0]]]], requires_grad=True)
    ref = torch.tensor([[[[0.0]], [[2.0]]]], requires_grad=True)
    loss = losses.semantic_preservation(z, ref)
    loss.backward()
    assert loss.item() == 2.5 and z.grad.flatten().tolist() == [1, -2] and ref.grad is None
    assert losses.semantic_preservation(z, ref, "cosine").item() == 1
    tokens = torch.randn(2, 5, 8)
    assert abs(losses.semantic_preservation(tokens, 3 * tokens, "cosine", dim=-1).item()) < 1e-6


def test_baseline_losses():
    moments = torch.tensor([1.0, -2.0, math.log(4), 99.0]).view(1, 4, 1, 1)  # mean | log-variance; 99 is clamped to 20
    expected = 0.5 * (1 + 4 - 1 - math.log(4)) + 0.5 * (4 + math.exp(20) - 1 - 20)
    assert math.isclose(losses.kl_divergence(moments).item(), expected, rel_tol=1e-6)
    z = torch.tensor([[3.0, 3.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # the tokens (3, 0) and (3, 0)
    f = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])
    # cosines 1 and 0: relu(.5 - cos) has the mean .25; S(z') is 1 everywhere, S(F) 0 off the diagonal: .75 / 2
    assert math.isclose(losses.vf_loss(z, f).item(), 0.25 + 0.375, rel_tol=1e-6)
    assert math.isclose(losses.vf_loss(z, f, 0, 0).item(), 0.5 + 0.5, rel_tol=1e-6)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    assert losses.adaptive_weight(w.sum() * 1e9, 0 * w.sum(), w, limit=1e8).item() == 1e8


def test_lpips():
    """Random VGG16 and heads: zero for equal images, finite gradients where features vanish, and an independent sum."""
    vgg = torchvision.models.vgg16().features[:30].eval()
    heads = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    torch.save({f"features.{k}": v for k, v in vgg.state_dict().items()}, TMP / "vgg.pth")
    torch.save({f"lin{i}.model.1.weight": v for i, v in enumerate(heads)}, TMP / "heads.pth")
    lpips = losses.LPIPS(TMP / "vgg.pth", TMP / "heads.pth")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    expected, a, b = torch.zeros(2), *((t + torch.tensor([.030, .088, .188]).view(3, 1, 1)) /
                                       torch.tensor([.458, .448, .450]).view(3, 1, 1) for t in (x, y))
    with torch.no_grad():
        for i, layer in enumerate(vgg):
            a, b = layer(a), layer(b)
            if i in (3, 8, 15, 22, 29):
                diff = (F.normalize(a, dim=1) - F.normalize(b, dim=1)) ** 2
                expected += (diff * heads[(3, 8, 15, 22, 29).index(i)]).sum(1).mean((1, 2))
    assert torch.allclose(lpips(x, y), expected, atol=1e-5)
    assert lpips(x, x).abs().max() == 0
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        for layer in lpips.vgg16[:2]:
            if hasattr(layer, "bias"):
                layer.bias.fill_(-100)  # relu1_2 sees nothing
    lpips(torch.zeros(1, 3, 32, 32), flat).sum().backward()
    assert flat.grad.isfinite().all() and not any(p.requires_grad for p in lpips.parameters())
    assert not lpips.train().training
    torch.save({"lin0.model.1.weight": heads[0]}, TMP / "heads.pth")
    assert "heads.pth does not fit" in error_of(losses.LPIPS, TMP / "vgg.pth", TMP / "heads.pth")


def test_psnr_ssim():
    x = torch.zeros(2, 3, 16, 20)
    assert torch.allclose(losses.psnr(x, x + 0.2), torch.tensor(20.0).double(), atol=1e-5)  # .1 of the range
    a, b = 0.5, 0.7  # two flat images in [0, 1]: only the luminance term is left
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert torch.allclose(losses.ssim(x, x + 0.4), torch.tensor(expected).double(), atol=1e-6)
    noise = torch.rand(1, 3, 12, 12) * 2 - 1
    assert abs(losses.ssim(noise, noise).item() - 1) < 1e-12 and losses.ssim(noise, -noise).item() < 0


# --------------------------------------------------------------------------------------------------- train_tokenizer.py

def test_images():
    """Any mode to RGB, EXIF, transparency on white; ADM's crop; a broken file named."""
    rgb = np.zeros((20, 30, 3), np.uint8)
    rgb[:, :15] = (200, 100, 50)
    img = Image.fromarray(rgb)
    for mode, suffix in (("RGB", "png"), ("P", "png"), ("CMYK", "tif"), ("RGBA", "png"), ("L", "jpg"), ("1", "png"),
                         ("LA", "png")):
        img.convert(mode).save(TMP / f"m.{suffix}")
        loaded = tt.load_image(TMP / f"m.{suffix}")
        assert loaded.mode == "RGB" and loaded.size == (30, 20), mode
        if mode in ("RGB", "RGBA"):
            assert np.array_equal(loaded, rgb)
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(TMP / "m.png")
    assert np.array(tt.load_image(TMP / "m.png")).max() == 100
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(TMP / "m.png")
    assert np.array(tt.load_image(TMP / "m.png")).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    for told in ({"exif": exif}, {"xmp": b'<x:xmpmeta tiff:Orientation="6"/>'}):
        img.save(TMP / "m.jpg", **told)
        assert load_both_ways(TMP / "m.jpg").size == (20, 30)
    half = (TMP / "m.jpg").read_bytes()
    (TMP / "half.jpg").write_bytes(half[:len(half) // 2])
    assert "half.jpg" in error_of(tt.load_image, TMP / "half.jpg")
    # 130 x 70 to 16: halved twice to 32 x 17 by a box filter, then bicubic to 30 x 16, then the middle
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 130, 3), np.uint8))
    by_hand = big.resize((65, 35), Image.BOX).resize((32, 17), Image.BOX).resize((30, 16), Image.BICUBIC)
    assert np.array_equal(tt.center_crop(big, 16), np.array(by_hand)[:, 7:23])
    assert torch.equal(tt.to_tensor(tt.to_pixels(img))[:, 0, 0], torch.tensor([200, 100, 50.0]) / 127.5 - 1)
    # training: the decoder beside PIL's gives the same bytes; the crop is a square of the short side, flipped or not
    big = big.resize((120, 70), Image.BICUBIC)
    for mode, options in (("RGB", {}), ("RGB", {"subsampling": 0, "progressive": True}), ("L", {"quality": 30})):
        big.convert(mode).save(TMP / "m.jpg", **options)
        grey = load_both_ways(TMP / "m.jpg")
    pixels = tt.to_pixels(grey)
    squares = [grey.crop((left, 0, left + 70, 70)).resize((32, 32), Image.BICUBIC) for left in range(51)]
    by_pil = {(left, flip): tt.to_pixels(square.transpose(Image.FLIP_LEFT_RIGHT) if flip else square).int()
              for left, square in enumerate(squares) for flip in (False, True)}
    seen = set()
    for i in range(20):
        crop = tt.random_crop(pixels, 32, tt.rng(0, i)).int()
        found, off = min(((key, (crop - square).abs().max().item()) for key, square in by_pil.items()),
                         key=operator.itemgetter(1))
        assert off <= 2
        seen.add(found)
    assert len({left for left, _ in seen}) > 8 and len({flip for _, flip in seen}) == 2
    everything = torch.arange(256).byte().view(1, 1, 16, 16).expand(1, 3, -1, -1)
    back = tt.to_uint8(tt.to_tensor(everything))
    assert np.array_equal(back[0, ..., 0], everything[0, 0])


def test_folders():
    root = TMP / "folders"
    for name in ("b/2.png", "a/1.png", "a/deep/3.PNG", ".hidden.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / name, "PNG")
    data = tt.Folder(root)
    assert data.classes == ["a", "b"] and data.labels == [0, 0, 1] and len(data) == 3
    train, held_out = tt.open_data(str(root), None, 16, 10)
    assert len(train) == 2 and len(held_out) == 1 and not set(train.files) & set(held_out.files)
    assert tt.Folder(root / "a" / "deep").labels is None
    assert "not found" in error_of(tt.list_images, root / "nothing")
    (root / "empty").mkdir()
    assert "no images" in error_of(tt.list_images, root / "empty")
    (root / "a" / "1.png").write_bytes(b"not an image")
    batches = tt.batches(tt.View(data, 16), tt.in_order(3, 3), 0, torch.device("cpu"))
    assert "1.png" in error_of(next, batches)
    assert "1 unreadable" in error_of(tt.check_data, [data], SimpleNamespace(size=16, workers=0))


def test_shapes():
    shapes = tt.Shapes("train", n=48)
    assert len(shapes.classes) >= 10 and np.array_equal(shapes.image(5), tt.Shapes("train", n=9000).image(5))
    assert not np.array_equal(shapes.image(5), tt.Shapes("val").image(5))
    same_class = [np.asarray(shapes.image(i), float).mean((0, 1)) for i in (0, 12, 24, 36)]
    assert np.ptp(same_class, axis=0).max() > 20, "the class must not tell the colour"


def test_order():
    """Every image once an epoch, for any number of ranks and micro-batches; a resume goes on in the same order."""
    def stream(steps, **kw):
        iterator = iter(tt.Order(10, 4, (0, "order"), **kw))
        return [next(iterator) for _ in range(steps * kw.get("accum", 1))]

    for world in (1, 2, 3):  # 10 images: no rank's share of an epoch is as large as another's
        ranks = [iter(tt.Order(10, 6, (0, "order"), rank=r, world=world)) for r in range(world)]
        seen = [item for _ in range(5) for rank in ranks for item in next(rank)]
        assert sorted(seen) == [(epoch, i) for epoch in range(3) for i in range(10)], world
    whole = functools.reduce(operator.iadd, stream(5), [])
    assert sorted(i for _, i in whole[:10]) == list(range(10)) and sorted(i for _, i in whole[10:]) == list(range(10))
    assert [e for e, _ in whole] == [0] * 10 + [1] * 10 and [i for _, i in whole[:10]] != [i for _, i in whole[10:]]
    ranks = [stream(5, rank=r, world=2, accum=2) for r in range(2)]
    assert functools.reduce(operator.iadd, (a + b for a, b in zip(*ranks)), []) == whole
    assert functools.reduce(operator.iadd, stream(2, first_step=3), []) == whole[12:]
    view = tt.View(tt.Shapes(n=8), 48, (0, "augment"))
    crops = [torch.stack([view[epoch, i][0] for i in range(8)]) for epoch in (0, 0, 1)]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])


def test_at_random():
    """What validation measures: images of all classes of a sorted folder, always the same, each once."""
    chosen = [i for batch in tt.at_random(100, 32, 1000) for _, i in batch]
    assert len(set(chosen)) == 100 and chosen == sorted(chosen)
    assert len({i // 100 for i in chosen}) == 10, "all of ten classes of 100 images"
    assert tt.at_random(99, 32, 50) == tt.in_order(50, 32)


def test_linear_probe():
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    x = F.one_hot(y, 3) * 100.0 + torch.randn(300, 3)
    assert tt.linear_probe(x, y, x + torch.randn(300, 3), y) == 100
    assert tt.linear_probe(torch.zeros(300, 2), y, torch.zeros(300, 2), y) < 34
    # logistic regression on two overlapping unit Gaussians at +-1: Bayes' accuracy is Phi(1) = 84.1 %
    y = torch.arange(20000) % 2
    x = torch.randn(20000, 1) + (2.0 * y - 1)[:, None]
    assert abs(tt.linear_probe(x[:10000], y[:10000], x[10000:], y[10000:]) - 84.1) < 1.2


@functools.cache
def small_run():
    """All three stages, two steps each, with the GAN on; the folder of the run."""
    out = TMP / "run"
    tt.main([*SMALL, "--out", str(out), "--steps", "2"])
    return out


def test_stages_train_what_they_say():
    out = small_run()
    files = {n: load_file(out / f"stage{n}.pt")["tokenizer"] for n in (1, 2, 3)}
    torch.manual_seed(int(tt.rng(0, "encoder").integers(2 ** 62)))
    start, _ = load_encoder("random:tiny14")

    def changed(a, b):
        return {k.split(".")[0] for k in a if not k.startswith("latent_") and not torch.equal(a[k], b[k])}

    assert not changed({f"encoder.{k}": v for k, v in start.state_dict().items()}, files[1]), "stage 1 freezes E_p"
    assert changed(files[1], files[2]) == {"encoder", "adapter", "decoder"}
    assert changed(files[2], files[3]) == {"decoder"}
    assert same({k: v for k, v in files[2].items() if k.startswith("latent_")},
                {k: v for k, v in files[3].items() if k.startswith("latent_")}) is None
    assert all(torch.equal(f["encoder.mask_token"], files[1]["encoder.mask_token"]) for f in files.values())
    d = [load_file(out / f"stage{n}.pt")["discriminator"] for n in (1, 2, 3)]
    assert same(d[0], d[1]) and same(d[1], d[2]), "D trains in every stage"
    steps = [load_file(out / f"stage{n}.pt")["opt_d"]["state"][0]["step"].item() for n in (1, 2, 3)]
    assert steps == [2, 4, 6], "and continues, with its optimiser"
    raw = load_file(out / "stage2_step00000002.pt")
    decay = tt.PRESETS["tiny"]["ema_decay"]
    assert not changed(raw["ema"], files[2]) - {"latent_mean", "latent_std"}, "the stage's result is its EMA"
    name = "encoder.blocks.0.attn.proj.weight"
    moved, ahead = ((raw[which][name] - files[1][name]).abs().mean() for which in ("ema", "tokenizer"))
    assert 0 < moved < 3 * (1 - decay) * ahead, "EMA starts as a copy and lags"
    rows = rows_of(out)
    assert [(r["stage"], r["step"]) for r in rows] == [(str(s), str(k)) for s in (1, 2, 3) for k in (1, 2)]
    assert float(rows[2]["sp"]) < 1e-8 < float(rows[3]["sp"]) and not rows[0]["sp"]  # it starts where stage 1 left it
    tok = Tokenizer.load(out / "stage3.pt")
    assert tok.fingerprint() == Tokenizer.load(out / "stage2.pt").fingerprint() and tok.latent_std.min() > 0
    assert Image.open(out / "stage2_step00000002.png").size == (8 * 64, 128)


@contextlib.contextmanager
def recorded(module, name):
    """Inside it, a list of (arguments, result) of every call of a module's function."""
    calls, original = [], getattr(module, name)

    def function(*args):
        calls.append((args, original(*args)))
        return calls[-1][1]

    setattr(module, name, function)
    try:
        yield calls
    finally:
        setattr(module, name, original)


def test_nothing_grows_with_the_steps():
    """After two steps no parameter of an EMA, of the reference or of a frozen part holds a graph or a gradient."""
    flags = [*SMALL, "--steps", "2", "--workers", "0"]
    with folder() as d, mini_size():
        with recorded(tt, "set_up_stage") as stages:
            tt.main([*flags, "--out", str(d / "aligntok")])
            tt.main([*flags, "--model", "vavae", "--out", str(d / "vavae")])
        with recorded(train_dit, "update_ema") as updates:
            train_dit.main([*mini_dit(d), "--steps", "2", "--out", str(d / "dit")])
    modules = [m for _, s in stages for m in (s.tokenizer, s.discriminator, s.ema, s.reference, s.lpips) if m]
    (ema, generator, _), _ = updates[-1]
    assert len(modules) == 13 and len(updates) == 2
    for module in (*modules, ema, generator):
        for name, p in module.named_parameters():
            assert p.grad_fn is None and (p.requires_grad or p.grad is None), name
    assert not any(p.requires_grad for _, s in stages for m in (s.ema, s.reference) if m for p in m.parameters())


def test_ablations_of_stage_2():
    """L_sp before the adapter, and as a cosine: zero at the first step, since stage 2 starts where stage 1 ended."""
    start, sp = small_run() / "stage1.pt", {}
    for name, flags in {"l2": [], "encoder": ["--sp-at", "encoder"], "cosine": ["--sp-loss", "cosine"]}.items():
        out = TMP / f"sp-{name}"
        tt.main([*SMALL, "--stage", "2", "--init", str(start), "--out", str(out), "--steps", "2", *flags])
        first, sp[name] = rows_of(out)
        assert abs(float(first["sp"])) < 1e-6 < float(sp[name]["sp"])
        assert bool(first["sp_to_var"]) == (name == "l2")
    assert len({row["sp"] for row in sp.values()}) == 3


def test_baselines():
    """VAE and VA-VAE: what trains, the frozen foundation encoder, resume, the official layout."""
    flags = [*SMALL, "--accum", "2", "--steps", "3"]
    for model in ("vae", "vavae"):
        a, b = TMP / f"{model}-a", TMP / f"{model}-b"
        extra = flags if model == "vavae" else [f for f in flags if f not in ("--encoder", "random:tiny14")]
        tt.main([*extra, "--model", model, "--out", str(a)])
        first, last = (load_file(a / f"{model}_step{step:08d}.pt") for step in (2, 3))
        parts = {"encoder", "quant_conv", "post_quant_conv", "decoder"}
        if model == "vavae":
            parts.add("linear_proj")
            tt.main([*extra, "--model", model, "--out", str(b), "--steps", "2"])
            tt.main([*extra, "--model", model, "--out", str(b)])
            assert same(last, load_file(b / f"{model}_step00000003.pt")) is None
            no_margins = [*extra, "--model", model, "--vf-margins", "0", "0"]
            assert "vf_margins" in error_of(tt.main, [*no_margins, "--out", str(b), "--steps", "4"])
            tt.main([*no_margins, "--out", str(TMP / "vavae-c"), "--steps", "1"])
            assert float(rows_of(TMP / "vavae-c")[0]["vf"]) > float(rows_of(a)[0]["vf"]) + 0.1
        for state in (last["tokenizer"], last["ema"]):
            moved = {k.split(".")[0] for k, v in state.items() if not torch.equal(v, first["tokenizer"][k])}
            assert moved - {"latent_mean", "latent_std"} == parts
        row = rows_of(a)[-1]
        assert row["stage"] == "0" and float(row["kl"]) > 0 and bool(row["vf"]) == (model == "vavae") and not row["sp"]
        tok = Tokenizer.load(a / f"{model}.pt")
        x = torch.rand(2, 3, 64, 64) * 2 - 1
        with torch.no_grad():
            z, noise = tok.encode(x), torch.randn(2, 32, 4, 4)
            moments = tok.quant_conv(tok.encoder(x))
            assert torch.equal(z, moments[:, :32])
            sampled = tok(x, noise)[1]
            assert torch.allclose(sampled, z + noise * (moments[:, 32:] / 2).exp(), atol=1e-5)
            assert torch.equal(tok.unnormalize(tok.normalize(z)).sub(z).abs() < 1e-5, torch.ones_like(z, dtype=bool))
    official = {k: v for k, v in tok.state_dict().items() if not k.startswith("latent_")}
    official.update({"loss.discriminator.main.0.weight": torch.zeros(1), "foundation_model.x": torch.zeros(1)})
    save_checkpoint(TMP / "official.pt", {"state_dict": official})
    again = Tokenizer.load(TMP / "official.pt")
    with torch.no_grad():
        assert torch.equal(again.encode(x), tok.encode(x)) and torch.equal(again.decode(z), tok.decode(z))
    assert "latent statistics" in error_of(again.normalize, z)
    del official["quant_conv.bias"]
    save_checkpoint(TMP / "official.pt", official)
    assert "quant_conv.bias" in error_of(Tokenizer.load, TMP / "official.pt")
    for words, extra in {"no --stage": ["--model", "vae", "--stage", "1"], "no --encoder": ["--model", "vae"],
                         "earlier stage": ["--model", "vavae", "--init", "x"]}.items():
        assert words in error_of(tt.main, [*flags, *extra, "--out", str(TMP / "none")])


def test_generator_step_leaves_the_discriminator_alone():
    """After one step: D's gradients are those of its own loss, G's those of Eq. 1, and frozen parts have none."""
    torch.manual_seed(0)
    tok, disc = Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]), losses.PatchGAN(16)
    tok.encoder.requires_grad_(False).eval()
    s = SimpleNamespace(tokenizer=tok, generator=tok, discriminator=disc, critic=disc, reference=None, lpips=None,
                        autocast=contextlib.nullcontext)
    args = tt.parse(["--preset", "tiny"])
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    log = tt.training_step(x, s, args, gan=True, last=True)
    assert all(p.grad is None for p in tok.encoder.parameters())
    d_grads = [p.grad.clone() for p in disc.parameters()]
    disc.zero_grad()
    twin = copy.deepcopy(disc)
    with torch.no_grad():
        recon = tok(x)[0]
    losses.hinge_d(twin(x), twin(recon)).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(d_grads, twin.parameters()))
    found = tok.decoder.conv_out.bias.grad.clone()  # Eq. 1 by hand, with the weight that was logged
    tok.zero_grad()
    recon = tok(x)[0]
    (F.l1_loss(x, recon) - 0.5 * log["adaptive"] * disc(recon).mean()).backward()
    assert torch.allclose(found, tok.decoder.conv_out.bias.grad, atol=1e-5)


def test_resume_is_exact():
    """Stage 2, GAN and EMA on, across an epoch boundary, with accumulation: stopped at step 3 of 5, or never."""
    root = TMP / "resume"
    for i in range(14):
        (root / "data").mkdir(parents=True, exist_ok=True)
        tt.Shapes(n=14).image(i).save(root / "data" / f"{i}.png")
    flags = [*SMALL, "--data", str(root / "data"), "--stage", "2", "--init", str(small_run() / "stage1.pt"),
             "--accum", "2", "--save-every", "3", "--log-every", "2"]
    tt.main([*flags, "--out", str(root / "a"), "--steps", "5"])
    tt.main([*flags, "--out", str(root / "b"), "--steps", "3"])
    with open(root / "b" / "log.csv", "a") as f:
        f.write("2,5,0.1,0\n2,7,")  # rows past the checkpoint
    tt.main([*flags, "--out", str(root / "b"), "--steps", "5", "--workers", "1"])
    a, b = (load_file(root / r / "stage2_step00000005.pt") for r in "ab")
    assert same(a, b) is None, same(a, b)
    (root / "b" / "stage2.pt").unlink()  # as if killed while it was validated: row 5 is no multiple of --log-every
    tt.main([*flags, "--out", str(root / "b"), "--steps", "5"])
    assert same(*(load_file(root / r / "stage2.pt") for r in "ab")) is None
    assert (root / "a" / "log.csv").read_bytes() == (root / "b" / "log.csv").read_bytes()
    changed = error_of(tt.main, [*flags, "--out", str(root / "b"), "--steps", "5", "--lr", "0.1", "--w-sp", "2"])
    assert "lr 0.001 -> 0.1" in changed and "w_sp 1.0 -> 2.0" in changed and "batch" not in changed
    (root / "b" / "stage2.pt").unlink()
    assert "already at step 5" in error_of(tt.main, [*flags, "--out", str(root / "b"), "--steps", "4"])
    newest = root / "b" / "stage2_step00000005.pt"
    newest.write_bytes(newest.read_bytes()[:1000])  # a damaged checkpoint: the one before it serves
    tt.main([*flags, "--out", str(root / "b"), "--steps", "5"])
    assert same(a, load_file(newest)) is None


def test_run_folder():
    """log.csv has its header and whole rows whatever a kill left; two checkpoints stay; a damaged one is not `good`."""
    with folder() as d:
        (d / ".a_step00000009.pt.part").write_bytes(b"half")
        (d / "log.csv").touch()
        with tt.Run(d, 0, ["stage", "step", "loss"]) as run:
            run.rewind_log(1, 0)
            for step in range(1, 5):
                run.log({"stage": 1, "step": step, "loss": 1 / 3})
                run.save("a", step, {"run": {}, "step": step})
            assert run.last_good("a").name == "a_step00000004.pt"
            run.rewind_log(1, 2)
            assert (d / "log.csv").read_bytes() == b"stage,step,loss\n1,1,0.333333\n1,2,0.333333\n"
            with full_disk(50), refused("cannot write", "log.csv", "File too large"):
                run.log({"stage": 1, "step": 3, "loss": 1 / 3})
            run.rewind_log(1, 3)
            assert (d / "log.csv").read_bytes() == b"stage,step,loss\n1,1,0.333333\n1,2,0.333333\n"
        (d / "a_step00000004.pt").write_bytes(b"half")
        save_checkpoint(d / "a_step00000005.pt", {"step": 5})
        with tt.Run(d, 0, []) as run:
            assert run.resume("a", {})["step"] == 3 and run.last_good("a").name == "a_step00000003.pt"
            assert run.last_good("b") == "none"
        assert {p.name for p in d.iterdir()} == {".lock", "log.csv", *(f"a_step0000000{i}.pt" for i in (3, 4, 5))}


def test_signals():
    """SIGTERM to the whole process group, loader's worker included: a checkpoint at the step boundary, a message, and
    the run goes on to the same end. Outside the loop there is nothing to lose: it ends at once."""
    original = losses.logit_normal

    def planted(n):
        planted.calls += 1
        if planted.calls == 2:
            group = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
            subprocess.run(["kill", *map(str, group)], check=True)  # a worker would obey its parent's signal
            time.sleep(0.2)
        return original(n)

    with folder() as d, mini_size():
        flags = [*mini_dit(d), "--steps", "3", "--log-every", "1", "--workers", "1"]
        train_dit.main([*flags, "--out", str(d / "a")])
        planted.calls, losses.logit_normal = 0, planted
        try:
            with refused("stopped by a signal at step 2", "dit_step00000002.pt", "repeat"):
                train_dit.main([*flags, "--out", str(d / "b")])
        finally:
            losses.logit_normal = original
        train_dit.main([*flags, "--out", str(d / "b")])
        assert same(*(load_file(d / r / "dit_step00000003.pt") for r in "ab")) is None
        assert (d / "a" / "log.csv").read_bytes() == (d / "b" / "log.csv").read_bytes()
        try:
            with tt.Run(d / "a", 0, []):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(9)
            raise AssertionError("the signal was ignored")
        except SystemExit as e:
            assert "repeat the command" in e.code


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk():
    """Wherever it strikes: one line, what was good is still there, and no half file is left."""
    with folder() as d, mini_size():
        shutil.copytree(small_run(), d / "tok")
        before = {p.name: p.read_bytes() for p in (d / "tok").glob("*.p*")}
        ours = [*SMALL, "--out", str(d / "tok"), "--stage", "1", "--steps", "4"]
        four = "stage1_step00000004"
        for limit, name in ((300, "log.csv"), (10_000, f"{four}.png"), (3_000_000, f"{four}.pt")):
            with full_disk(limit), refused("cannot write", name, "File too large"):
                tt.main([*ours, "--grid-every", "4"])
        after = {p.name: p.read_bytes() for p in (d / "tok").iterdir() if p.name not in ("log.csv", ".lock")}
        assert after.pop("stage1_step00000004.png") and after == before

        dit = [*mini_dit(d), "--save-every", "1", "--steps", "2", "--out", str(d / "dit")]
        for limit, name in ((0, "latents.npy.json"), (1000, "latents.npy.part"), (5000, "dit_step00000001.pt")):
            with full_disk(limit), refused("cannot write", name):
                train_dit.main(dit)
        train_dit.main(dit)
        draw = ["--preset", "tiny", "--dit", str(d / "dit" / "dit_step00000002.pt"), "--tokenizer", str(d / "tok.pt"),
                "--steps", "2", "--num", "8"]
        rows = 8 * 32 * 32 * 3  # bytes; then it is packed, with the zip's directory
        for out, limit, name in (("s.npz", rows - 1, "s.npz.part"), ("s.npz", rows + 200, "s.npz"),
                                 ("p", 1000, "p/000000.png")):
            with full_disk(limit), refused("cannot write", str(d / name)):
                sample.main([*draw, "--out", str(d / out)])
        assert [p.name for p in (d / "p").iterdir() if p.suffix == ".part"] == [] and not (d / "s.npz").exists()
        sample.main([*draw, "--out", str(d / "s.npz"), "--grid", str(d / "grid.png")])
        good = (d / "grid.png").read_bytes()
        with full_disk(500), refused("cannot write", "grid.png"):
            sample.main([*draw, "--grid", str(d / "grid.png")])
        assert (d / "grid.png").read_bytes() == good

        torch.save(DINOv2(**ENCODERS["tiny14"]).state_dict(), d / "e.pth")
        figure = [str(d / "s.npz"), str(d / "s.npz"), "--features", "dinov2", "--encoder", str(d / "e.pth")]
        for flag, name in (("--json", "f.json"), ("--save-stats", "f.npz")):
            with full_disk(100), refused("cannot write", name, "File too large"):
                fid.main([*figure, flag, str(d / name)])
            with refused("cannot write", "f.json"):
                fid.main([*figure, flag, str(d / "e.pth" / "f.json")])  # a path under a file
        assert not [p.name for p in d.iterdir() if p.name.startswith((".", "f."))]


def test_two_ranks_equal_one_process():
    """torchrun with two gloo processes against one process without it, same global batch: GAN, EMA, accumulation,
    BatchNorm over ranks."""
    fp64 = driver(TMP / "fp64.py", IN_FP64)
    for ranks in (0, 2):
        complete(fp64, "train_tokenizer.py", *SMALL, "--stage", "2", "--init", small_run() / "stage1.pt",
                 "--steps", "1", "--batch-size", "8", "--accum", "2", "--out", TMP / f"ranks{ranks}", ranks=ranks)
    (one,), (two,) = (rows_of(TMP / f"ranks{ranks}") for ranks in (0, 2))
    for key, value in one.items():
        assert value == two[key] or math.isclose(float(value), float(two[key]), rel_tol=1e-5, abs_tol=1e-9), key
    # Adam's first moments are half the first gradients. That both ranks hold the same weights is check_weights' part,
    # before each checkpoint.
    one, two = (load_file(TMP / f"ranks{ranks}" / "stage2_step00000001.pt") for ranks in (0, 2))
    for part in ("opt_g", "opt_d"):
        for k, v in one[part]["state"].items():
            difference = (v["exp_avg"] - two[part]["state"][k]["exp_avg"]).norm()
            assert difference <= 1e-8 * v["exp_avg"].norm() + 1e-12, (part, k, difference)


def test_non_finite_loss_stops_the_run():
    out = TMP / "nan"
    original = losses.hinge_g

    def planted(fake):
        planted.calls += 1
        return original(fake) * (float("nan") if planted.calls == 4 else 1)

    planted.calls, losses.hinge_g = 0, planted
    try:
        text = error_of(tt.main, [*SMALL, "--out", str(out), "--stage", "1", "--steps", "9", "--log-every", "3"])
    finally:
        losses.hinge_g = original
    assert "since step 4" in text and "stage1_step00000002.pt" in text, text
    assert [p.name for p in sorted(out.glob("*.pt"))] == ["stage1_step00000002.pt"]


def test_tokenizer_errors():
    out, run = str(TMP / "errors"), small_run()

    def error(*flags):
        return error_of(tt.main, [*SMALL, "--steps", "1", "--out", out, *flags])

    assert "data folder not found" in error("--data", str(TMP / "nowhere"))
    assert "there is no" in error("--stage", "2") and "--stage 1" in error("--stage", "2")
    assert "is of stage 1; stage 3 continues from stage 2" in error("--stage", "3", "--init", str(run / "stage1.pt"))
    assert "d 32 -> 16" in error("--stage", "2", "--init", str(run / "stage1.pt"), "--d", "16")
    assert "is not the final checkpoint" in error("--stage", "2", "--init", str(run / "stage1_step00000002.pt"))
    assert "divisible by 16" in error("--size", "60")
    assert "invalid float value: 'x' (see --help)" in error("--lr", "x")
    assert "does not split" in error("--accum", "3")
    missing = error("--w-p", "1", "--vgg16", str(TMP / "no-vgg.pth"))
    assert "--vgg16" in missing and losses.VGG16_URL in missing
    (TMP / "a-file").write_text("")
    assert "cannot write" in error("--out", str(TMP / "a-file" / "x"))
    whole = (run / "stage1.pt").read_bytes()
    (TMP / "cut.pt").write_bytes(whole[:len(whole) // 2])
    assert "cut.pt" in error("--stage", "2", "--init", str(TMP / "cut.pt"))
    assert "cut.pt" in error_of(Tokenizer.load, TMP / "cut.pt")
    assert "take the stage's final one" in error_of(Tokenizer.load, run / "stage2_step00000002.pt")
    with tt.Run(out, 0, tt.COLUMNS):
        assert "another run" in error()


# -------------------------------------------------------------------------------------------------------------- fid.py

def close(a, b, tolerance=1e-9):
    assert abs(a - b) <= tolerance * max(1, abs(b)), (a, b)


def gaussian(mu, sigma):
    """Statistics without the images behind them."""
    return SimpleNamespace(n=None, rows=None, mu=torch.tensor(mu).double(), sigma=torch.tensor(sigma).double())


def test_frechet_closed_forms():
    r = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=r).double() @ torch.randn(8, 8, generator=r).double()
    a = fid.Features.of(x)
    close(fid.frechet(a, a), 0)
    shifted = fid.Features.of(x + torch.arange(8.))
    close(fid.frechet(a, shifted), (torch.arange(8.) ** 2).sum().item(), 1e-6)
    # diagonal covariances: sum of (s1 - s2)^2
    one, two = gaussian([0., 0., 0.], np.diag([1., 4., 9.])), gaussian([1., 0., 0.], np.diag([4., 4., 1.]))
    close(fid.frechet(one, two), 1 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    # two dimensions that do not commute: Tr (S1 S2)^(1/2) = sqrt(Tr S1 S2 + 2 sqrt(det S1 S2))
    one, two = gaussian([0., 0.], [[2., 1.], [1., 3.]]), gaussian([0., 0.], [[1., -.5], [-.5, 4.]])
    product = one.sigma @ two.sigma
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    close(fid.frechet(one, two), (one.sigma.trace() + two.sigma.trace() - 2 * root).item())


def test_frechet_of_few_images():
    r = torch.Generator().manual_seed(1)
    few, many = torch.randn(20, 64, generator=r), 2 * torch.randn(300, 64, generator=r)
    a, b = fid.Features.of(few), fid.Features.of(many)
    assert a.rows is not None and b.rows is None  # N <= D: the N x N route
    by_rows = fid.frechet(a, b)
    assert by_rows == fid.frechet(b, a)
    close(by_rows, fid.frechet(gaussian(a.mu.numpy(), a.sigma.numpy()), b), 1e-6)  # the D x D route
    other = fid.Features.of(few[:7] + 1)  # both sets few
    close(fid.frechet(a, other), fid.frechet(gaussian(other.mu.numpy(), other.sigma.numpy()), a), 1e-6)
    close(fid.frechet(a, a), 0)


def test_streaming_covariance():
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(2)).double() + 1e5  # E[xx'] - mm' would lose it
    features = fid.Features(100, 5)
    for index in torch.arange(100).split(7):  # a last batch of 2
        features.add(x[index], index)
    features.finish()
    assert torch.allclose(features.mu, x.mean(0), rtol=1e-14)
    assert torch.allclose(features.sigma, torch.cov((x - 1e5).T), rtol=1e-9)


def test_precision_recall_by_hand():
    ref = torch.tensor([[0.], [1.], [2.], [3.]])  # with k = 1 every ball has radius 1
    samples = torch.tensor([[3.5], [4.], [4.5], [10.]])  # radii .5 .5 .5 5.5
    # 3.5 and 4 (on the edge) lie in the ball of 3; of the reference only 3 lies in a ball, that of 3.5
    assert fid.precision_recall(ref, samples, k=1) == (0.5, 0.25)
    assert fid.precision_recall(ref, ref, k=3) == (1.0, 1.0)
    assert fid.precision_recall(ref, ref + 100, k=3) == (0.0, 0.0)


def test_kid_by_hand():
    x, y = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[1., 1.], [0., 0.]])
    # k(x1, x2) = k(y1, y2) = 1; between the sets 1.5^3, 1, 1.5^3, 1
    mean, std, size = fid.kid(x, y)
    assert (mean, std, size) == (1 + 1 - 2 * (1.5 ** 3 + 1) / 2, 0, 2)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    assert fid.kid(x, x + 1, size=10) == fid.kid(x, x + 1, size=10)  # seeded
    assert fid.kid(x, x + 1, size=10) != fid.kid(x, x + 1, size=10, seed=1)


def test_inception_score_closed_forms():
    one_hot = 100 * torch.eye(10).repeat(20, 1)
    close(fid.inception_score(one_hot)[0], 10, 1e-6)
    close(fid.inception_score(torch.zeros(50, 10))[0], 1)
    sorted_classes = 100 * torch.eye(2).repeat_interleave(5000, 0)
    close(fid.inception_score(sorted_classes)[0], 1, 1e-6)  # ADM: each chunk of 5000, in file order, is one class
    close(fid.inception_score(sorted_classes, splits=4)[0], 2, 1e-2)  # torch-fidelity shuffles first


def test_resize_tf1_by_hand():
    def row(values, size):
        return fid.resize_tf1(torch.tensor(values).view(1, 1, 1, -1).expand(1, 1, 3, -1), size)[0, 0, 0].tolist()

    assert row([0., 10.], 4) == [0, 5, 10, 10]  # src 0 .5 1 1.5: the last one beyond the last pixel
    assert row([1., 2., 3., 4.], 2) == [1, 3]  # src 0 2: no averaging, no half pixel
    assert row([0., 2., 6.], 2) == [0, 4]  # src 0 1.5
    image = torch.arange(299. * 299).view(1, 1, 299, 299)
    assert torch.equal(fid.resize_tf1(image), image)
    rows = fid.resize_tf1(torch.tensor([[0., 10.], [20., 30.]])[None, None], 4)[0, 0, :, 0].tolist()
    assert rows == [0, 10, 20, 20]


def test_inception():
    torch.manual_seed(0)
    net = fid.Inception()
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    # the official file's names are torchvision's of the model without auxiliary head, 1008 classes
    with torch.device("meta"):
        names = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in names.items()}
    without = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}  # as the file of 2018
    fid.load_strictly(net, without, "test")
    assert torch.equal(fid.average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))  # the padding does not count
    last = torch.zeros(1, 1, 3, 3)
    last[0, 0, 0, 0] = 1.
    assert net.Mixed_7c.pool(last).sum() == 4 and net.Mixed_7b.pool(last)[0, 0, 0, 0] == 0.25

    seen = {}
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.update(x=output))
    out = net(torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8))
    assert {k: tuple(v.shape) for k, v in out.items()} == {"pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
    assert torch.equal(out["spatial"].view(2, 17, 17, 7)[1, 3, 5], seen["x"][1, :7, 3, 5])  # HWC
    assert torch.allclose(out["logits"], out["pool"] @ net.fc.weight.T)


def figures(*argv):
    """Runs fid.py on the command line's arguments; metric -> value."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        fid.main([*map(str, argv), "--workers", "0", "--json", str(out)])
        return {f["metric"]: f["value"] for f in json.loads(out.read_text())["figures"]}


def fid_error(*argv):
    return error_of(fid.main, [*map(str, argv), "--workers", "0"])


def write_images(folder, n=12, size=64, seed=0):
    """n PNG files in two class folders; returns them as an array."""
    images = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    images[::2, : size // 2] = 30 * seed
    for i, image in enumerate(images):
        path = Path(folder) / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return np.concatenate([images[::2], images[1::2]])  # in the order of the file names


def test_lite0():
    """The judge: its size, TensorFlow's padding, and the command."""
    net = fid.EfficientNetLite0()
    assert count(net) == 4_652_008
    x = torch.randn(1, 1, 4, 4)
    conv = fid.SameConv(1, 1, 3, 2, bias=False)
    padded = F.pad(x, (0, 1, 0, 1))[0, 0]
    by_hand = [[(padded[i:i + 3, j:j + 3] * conv.weight[0, 0]).sum().item() for j in (0, 2)] for i in (0, 2)]
    assert torch.allclose(conv(x)[0, 0], torch.tensor(by_hand), atol=1e-6)
    with folder() as d:
        refs = [write_shapes(d / "a", 6), write_shapes(d / "b", 6, 48)]
        images = [torch.stack([fid.Source(r)[0, i][0] for i in range(6)]) for r in refs]
        for module in net.modules():
            module.momentum = 1  # batch norms take their statistics from images[0]: else random features vanish
        net.train()(images[0]), net.eval()
        save_checkpoint(d / "lite0.pth", net.state_dict())
        flags = ["--features", "lite0", "--lite0", str(d / "lite0.pth"), "--json", str(d / "out.json")]
        fid.main([*refs, *flags, "--workers", "0"])
        found = {f["metric"]: f["value"] for f in json.loads((d / "out.json").read_text())["figures"]}
        rows = [net(x)["pool"].double() for x in images]
        means, (a, b) = [r.mean(0) for r in rows], [(r - r.mean(0)) / 5 ** 0.5 for r in rows]  # covariances a'a, b'b
        root = torch.linalg.matrix_norm(a @ b.T, "nuc")  # tr (a'a b'b)^(1/2)
        by_hand = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * root
        assert found.keys() == {"FD-Lite0", "precision", "recall", "KID"}
        assert by_hand > 1e-3 and math.isclose(found["FD-Lite0"], by_hand.item(), rel_tol=1e-6)
        assert "--lite0 FILE" in error_of(fid.main, [*refs, "--features", "lite0"])


def test_fid_commands():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        a, b, toy = root / "a", root / "b", root / "encoder.pt"
        images, _ = write_images(a, seed=1), write_images(b, seed=2)
        torch.save(DINOv2(**ENCODERS["tiny14"]).state_dict(), toy)
        features = ["--features", "dinov2", "--encoder", toy]
        by_folder = figures(a, b, *features)
        assert set(by_folder) == {"FD-DINOv2", "precision", "recall", "KID"}
        assert all(abs(figures(a, b, *features, "--batch-size", "5")[k] - v) < 1e-4 for k, v in by_folder.items())
        close(figures(a, a, *features, "--metrics", "fid")["FD-DINOv2"], 0, 1e-6)

        # the same images as an npz; their statistics; both in one file, as ADM's reference batches
        np.savez_compressed(root / "images.npz", arr_0=images)
        close(figures(root / "images.npz", b, *features)["FD-DINOv2"], by_folder["FD-DINOv2"], 1e-6)
        fid.main([str(a), "--save-stats", str(root / "ref.npz"), *map(str, features), "--workers", "0"])
        by_statistics = figures(root / "ref.npz", b, *features)
        assert set(by_statistics) == {"FD-DINOv2"}
        close(by_statistics["FD-DINOv2"], by_folder["FD-DINOv2"], 1e-6)
        with np.load(root / "ref.npz") as ref:
            np.savez(root / "both.npz", arr_0=images[:8], mu=ref["mu"], sigma=ref["sigma"])
        both = figures(root / "both.npz", b, *features)
        assert set(both) == set(by_folder)
        close(both["FD-DINOv2"], by_folder["FD-DINOv2"], 1e-6)

        # one line for each mistake
        (root / "none").mkdir()
        assert "no images" in fid_error(root / "none", b)
        assert "not found" in fid_error(root / "missing", b)
        np.savez(root / "keys.npz", other=np.zeros(3))
        assert "neither images (arr_0) nor statistics" in fid_error(root / "keys.npz", b)
        np.savez(root / "dims.npz", mu=np.zeros(10), sigma=np.eye(10))
        assert "(10,)" in fid_error(root / "dims.npz", b, *features, "--metrics", "fid")
        assert "--metrics kid" in fid_error(root / "dims.npz", b, *features, "--metrics", "kid")
        np.savez(root / "pickle.npz", arr_0=np.array([{}], dtype=object))
        assert "object" in fid_error(root / "pickle.npz", b)
        assert "pretrained.pth" in fid_error(a, b, "--inception", root / "pretrained.pth")
        assert "does not fit Inception" in fid_error(a, b, "--inception", toy)
        assert "--metrics nonsense" in fid_error(a, b, "--metrics", "nonsense")
        assert "two paths" in fid_error(a)
        assert "was saved with weights" in fid_error(root / "ref.npz", b, "--features", "dinov2", "--encoder",
                                                 "random:tiny14")
        Image.new("RGB", (80, 64)).save(a / "class1" / "wide.png")
        wrong = fid_error(a, b, *features)
        assert "64x64" in wrong and "80x64" in wrong and "wide.png" in wrong and "--size" in wrong
        assert figures(a, b, *features, "--size", "48", "--metrics", "fid")
        (b / "class1" / "broken.png").write_bytes(b"\x89PNG")
        assert "broken.png" in fid_error(a, b, *features, "--size", "48")
        one = root / "one"
        one.mkdir()
        Image.new("RGB", (64, 64)).save(one / "a.png")
        assert "one image" in fid_error(one, b)


def test_fid_of_a_tokenizer():
    torch.manual_seed(0)
    tokenizer = Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]).eval()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images, path = write_images(root / "a", n=20), root / "tokenizer.pt"
        content = {"tokenizer": tokenizer.state_dict(), "arguments": tokenizer.arguments, "run": {"size": 64}}
        torch.save(content, path)
        features = ["--features", "dinov2", "--encoder", path]  # a tokenizer's own encoder
        found = figures("--recon", path, root / "a", *features, "--metrics", "rfid,psnr,ssim", "--batch-size", 8)
        assert set(found) == {"rFD-DINOv2", "PSNR", "SSIM"}
        with torch.no_grad():
            x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
            recon = ((tokenizer.decode(tokenizer.encode(x / 127.5 - 1)) + 1) * 127.5).round().clamp(0, 255)  # 8 bits
        by_hand = 10 * np.log10(255 ** 2 / (recon - x).square().mean((1, 2, 3)).numpy())
        close(found["PSNR"], by_hand.mean(), 1e-5)
        text = fid_error("--recon", path, root / "a", "--metrics", "psnr,lpips", "--vgg16", "none", "--lpips-heads",
                         "none")
        assert "rfid,psnr,ssim,lpips" in text  # what can be left out
        probe = figures("--probe", path, root / "a", root / "a")["probe %"]
        assert 0 <= probe <= 100
        assert figures("--probe", path, root / "a", root / "a", "--tokens")
        assert "class folders" in fid_error("--probe", path, root / "a" / "class0", root / "a")


# ------------------------------------------------------------------------------------------------------ hostile files

class Code:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flip(data, bit):
    return data[:bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:]


def load_both_ways(path):
    """load_image, after load_pixels has done the same."""
    try:
        img = tt.load_image(path)
    except UserError:
        error_of(tt.load_pixels, path)
        raise
    assert np.array_equal(tt.load_pixels(path).permute(1, 2, 0), img)
    return img


def picture(form, **options):
    """The bytes of a small image file."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).save(file, form, **options)
    return file.getvalue()


def png_of(width, height, pixels=b"", chunk=b""):
    """A PNG file by hand: its header may claim anything."""
    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk
            + part(b"IDAT", zlib.compress(pixels)) + part(b"IEND", b""))


def test_hostile_checkpoints():
    tokenizer = small_tokenizer()
    content = {"arguments": tokenizer.arguments, "tokenizer": tokenizer.state_dict()}

    def with_arguments(**changed):
        return content | {"arguments": content["arguments"] | changed}

    def with_tensor(tensor, name="adapter.fc1.weight"):
        return content | {"tokenizer": content["tokenizer"] | {name: tensor}}

    with folder() as d:
        (d / "code.pt").write_bytes(pickle.dumps({"tokenizer": Code(d / "made")}))
        torch.save({"tokenizer": Code(d / "made")}, d / "zipped.pt")
        for name in ("code.pt", "zipped.pt"):
            with refused(name, "nothing else is ever loaded"):
                load_file(d / name)
        assert not (d / "made").exists()
        pickle.loads((d / "code.pt").read_bytes())
        assert (d / "made").exists(), "the code would have run"

        torch.save(content, d / "good.pt")
        good = (d / "good.pt").read_bytes()
        inside = good.find(content["tokenizer"]["adapter.fc1.weight"].numpy().tobytes())
        with zipfile.ZipFile(d / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("a/data/0", bytes(10 ** 6))
        for name, data, word in (("flipped", flip(good, 8 * inside), "CRC of good/data/"), ("cut", good[:-1], "cut"),
                                 ("half", good[:len(good) // 2], "half"), ("empty", b"", "empty"),
                                 ("picture", picture("PNG"), "picture"),
                                 ("bomb", (d / "bomb.pt").read_bytes(), "more than its size")):
            (d / f"{name}.pt").write_bytes(data)
            with refused(f"{name}.pt", word):
                Tokenizer.load(d / f"{name}.pt")
        os.mkfifo(d / "pipe.pt")
        for name in (".", "pipe.pt"):
            with refused("is not a file"):
                Tokenizer.load(d / name)

        views = {f"adapter.{name}": torch.zeros(1).expand(shape) for name, shape in (
            ("fc1.weight", (2 ** 20, 64)), ("fc1.bias", (2 ** 20,)), ("fc2.weight", (8, 2 ** 20)))}
        for word, wrong in {
            "dict": [1, 2], "not a tokenizer": {"tokenizer": content["tokenizer"]},
            "resume from": content | {"opt_g": {}}, "'list'": content | {"arguments": [1]},
            "argument depth": with_arguments(encoder={"dim": 64, "depth": 10 ** 9, "grid": 4}),
            "argument grid": with_arguments(encoder={"dim": 64, "depth": 1, "grid": 10 ** 9}),
            "argument ch_mult": with_arguments(decoder={"ch": 32, "ch_mult": [1] * 10 ** 5, "num_res_blocks": 1}),
            "argument num_res_blocks": with_arguments(decoder={"ch": 32, "ch_mult": [1], "num_res_blocks": 10 ** 9}),
            "TypeError": with_arguments(encoder={"dim": "64", "depth": 1}), "unexpected keyword": with_arguments(x=1),
            "width 32": with_arguments(encoder={"dim": 32, "depth": 1}), "latent_mean": with_arguments(d=9),
            "size mismatch": with_tensor(torch.zeros(3)), "adapter.fc1.weight": with_tensor("text"),
            "not finite": with_tensor(torch.full((64, 64), math.nan)),
            "wrong type": with_tensor(torch.zeros(64, 64, dtype=torch.int64)),
            "larger than the file": {"arguments": content["arguments"] | {"hidden": 2 ** 20},
                                     "tokenizer": content["tokenizer"] | views},
            "NoneType": content | {"tokenizer": None},
        }.items():
            torch.save(wrong, d / "wrong.pt")
            with refused("wrong.pt", word):
                Tokenizer.load(d / "wrong.pt")
        dit = LightningDiT(dim=32, depth=1, heads=2, d=8, num_classes=3, grid=(2, 2))
        for changed in ({"depth": 10 ** 9}, {"heads": 3}, {"heads": 0}, {"grid": [2, 2, 2]}, {"grid": 2 ** 40}):
            torch.save({"ema": dit.state_dict(), "arguments": dit.arguments | changed}, d / "wrong.pt")
            with refused("wrong.pt"):
                sample.load_dit(d / "wrong.pt")
        state = tokenizer.encoder.state_dict()
        for wrong in ({"teacher": [1]}, state | {"blocks.999999999.norm1.weight": torch.zeros(64)},
                      state | {"cls_token": 1}, state | {"pos_embed": torch.zeros(1).expand(1, 2 ** 40, 64)}):
            torch.save(wrong, d / "wrong.pt")
            with refused("wrong.pt"):
                load_encoder(str(d / "wrong.pt"))


def slow_hostile_stage_files(most=None):
    """What a stage starts from, and what it resumes from, with one part wrong."""
    run, flags = small_run(), [*SMALL, "--stage", "2", "--steps", "3"]
    with folder() as d:
        good = load_file(run / "stage1.pt")
        for part, wrong in (("opt_d", {}), ("run", [1]), ("total_steps", "2"), ("stage", None), ("discriminator", {}),
                            ("arguments", {}))[:most]:
            torch.save(good | {part: wrong}, d / "wrong.pt")
            with refused("wrong.pt"):
                tt.main([*flags, "--out", str(d / part), "--init", str(d / "wrong.pt")])
        good = load_file(run / "stage2_step00000002.pt")
        moments = copy.deepcopy(good["opt_g"])
        moments["state"][0]["exp_avg"] = torch.zeros(1)
        for part, wrong in (("opt_g", moments), ("rng", [1]), ("meter", None), ("step", "2"), ("ema", {}))[:most]:
            (d / f"resume-{part}").mkdir()
            torch.save(good | {part: wrong}, d / f"resume-{part}" / "stage2_step00000002.pt")
            with refused("stage2_step00000002.pt"):
                tt.main([*flags, "--out", str(d / f"resume-{part}"), "--init", str(run / "stage1.pt")])


def test_hostile_stage_files():
    slow_hostile_stage_files(1)


def read_npz(path):
    """All that fid.py reads of an npz."""
    source = fid.Source(path)
    args = SimpleNamespace(batch_size=4, workers=0)
    images = [x for x, _ in source.read(args, 0, 1, torch.device("cpu"))] if source.n else []
    return {k: v.tolist() for k, v in source.statistics.items()}, source.n, [x.tolist() for x in images]


def test_hostile_npz():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    statistics = {"mu": np.arange(4.0), "sigma": np.eye(4), "n": 7}

    def header(**changed):
        return npy(**({"descr": "|u1", "fortran_order": False, "shape": (6, 8, 8, 3)} | changed), data=images.tobytes())

    def npy(data, **about):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, about)
        return file.getvalue() + data

    with folder() as d:
        path = d / "a.npz"
        for save in (np.savez, np.savez_compressed):
            save(path, arr_0=images, **statistics)
            good, data = read_npz(path), path.read_bytes()
            assert good[1] == 6 and good[0]["n"] == 7 and np.array_equal(
                np.concatenate(good[2]).transpose(0, 2, 3, 1), images)
            with zipfile.ZipFile(path) as z:
                ends = [entry.header_offset + 30 + sum(struct.unpack_from("<HH", data, entry.header_offset + 26))
                        + entry.compress_size for entry in z.infolist()]
            noticed = 0
            for bit in (8 * end - k for end in ends for k in range(1, 17)):  # each entry's last bytes
                path.write_bytes(flip(data, bit))
                try:
                    assert read_npz(path) == good  # a compressed entry may end in bits that mean nothing
                except UserError:
                    noticed += 1
            assert noticed == 64 if save is np.savez else noticed > 16
            path.write_bytes(data[:-1])
            with refused("a.npz"):
                read_npz(path)
        for entries in ({"arr_0": header(shape=(6, 10 ** 6, 10 ** 6, 3))}, {"arr_0": header(shape=(10 ** 12, 8, 8, 3))},
                        {"arr_0": header(shape=(-6, 8, 8, 3))}, {"arr_0": header(descr="|O")}, {"arr_0": b""},
                        {"arr_0": header(shape=(6, 8, 24))}, {"arr_0": header(descr="|V999999999")},
                        {"mu": header(), "sigma": pickle.dumps(Code(d / "made"))}, {"mu": b"", "sigma": b""},
                        {"mu": npy(bytes(8), descr="<f8", fortran_order=False, shape=(10 ** 15,)), "sigma": header()}):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
                for name, data in entries.items():
                    z.writestr(f"{name}.npy", data)
            with refused("a.npz"):
                read_npz(path)
        assert not (d / "made").exists()
        for wrong in ({"n": "many"}, {"n": [7, 7]}, {"n": 1}, {"sigma": np.array([{}])}):
            np.savez(path, **(statistics | wrong))
            with refused("a.npz"):
                read_npz(path)
        huge = gaussian([0.] * 2, np.eye(2) * 1e308)
        with refused("not finite"):
            fid.frechet(huge, huge)


def test_hostile_cache():
    """latents.npy: cut, longer, of another shape or type, or not an array at all."""
    tokenizer, data = small_tokenizer(), Shapes(n=4, size=32)
    args = SimpleNamespace(size=32, overwrite=False, encode_batch=4, workers=0)
    with folder() as d:
        path = d / "latents.npy"
        train_dit.cached_latents(path, tokenizer, data, args, torch.device("cpu"))
        good = path.read_bytes()
        forms = {name: io.BytesIO() for name in ("type", "shape")}
        np.save(forms["type"], np.load(path).astype(np.float32))
        np.save(forms["shape"], np.load(path)[:3])
        for wrong in (good[:-1], good[:99], b"", good + b"\0", picture("PNG"), *(f.getvalue() for f in forms.values())):
            path.write_bytes(wrong)
            with refused("latents.npy", "delete it"):
                train_dit.cached_latents(path, tokenizer, data, args, torch.device("cpu"))


def test_hostile_images():
    """Bombs are refused by name before their pixels take memory; a damaged end is seen; the name tells nothing."""
    jpeg, png = picture("JPEG"), picture("PNG")
    at = jpeg.find(b"\xff\xc0") + 5
    tall = jpeg[:at] + struct.pack(">HH", 60000, 60000) + jpeg[at + 4:]
    wide = jpeg[:at] + struct.pack(">HH", 9500, 9500) + jpeg[at + 4:]  # 90 megapixels, of which PIL only warns
    text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(10 ** 7))
    text = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    loaded = {}
    with folder() as d:
        def load(data, name="a file, with-commas.png"):
            (d / name).write_bytes(data)
            return np.array(load_both_ways(d / name))

        for form in (jpeg, png):
            loaded[form] = load(form)
            assert loaded[form].shape == (24, 32, 3)
            assert np.array_equal(load(form, "a.gif"), loaded[form]) and load(form, "b\udcff.jpg").any()
            assert np.array_equal(load(form + b"\0trailing"), loaded[form])  # as some of ImageNet have it
        cuts = [form[:-cut] for form in (jpeg, png) for cut in range(1, 20)]
        for half_an_end in [picture("JPEG", quality=q)[:-1] for q in range(60, 90)] + cuts:  # PIL alone takes a few
            with refused(", with-commas.png"):
                load(half_an_end)
        damaged = [flip(png, 8 * i + i % 8) for i in range(len(png) - 40, len(png))]
        for data in (tall, wide, png_of(60000, 60000), png_of(10 ** 4, 9 * 10 ** 3), png_of(1, 101, bytes(404)),
                     png_of(0, 5), png_of(4, 4, bytes(52), chunk=text), b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", *damaged):
            with warnings.catch_warnings(record=True) as said, refused(", with-commas.png"):
                load(data)
            assert not said
        assert load(png_of(1, 100, bytes(400))).shape == (100, 1, 3)
        assert tt.center_crop(tt.load_image(d / "a file, with-commas.png"), 64).size == (64, 64)
        for exif in (b"garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 50,
                     b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"):
            assert np.array_equal(load(picture("JPEG", exif=exif)), loaded[jpeg])
        assert np.array_equal(load(picture("PNG", exif=b"Exif\0\0garbage!")), loaded[png])
        frames = [Image.new("L", (8, 8), i) for i in range(50)]
        frames[7].save(d / "a.gif", save_all=True, append_images=frames)
        assert (np.array(tt.load_image(d / "a.gif")) == 7).all()
        os.mkfifo(d / "pipe.png")
        with refused("pipe.png is not a file"):
            tt.load_image(d / "pipe.png")


def test_odd_folders():
    with folder() as d:
        for name in ("naïve 类", "b\udcff, c"):  # the second is not UTF-8
            (d / name).mkdir()
            (d / name / "1.png").write_bytes(picture("PNG"))
        data = tt.Folder(d)
        assert data.classes == ["b\udcff, c", "naïve 类"] and len(data.identity) == 16
        assert len(tt.View(data, 16)[0, 0][0]) == 3
        (d / "loop").symlink_to(d)
        with refused("loop is a link to a folder that it lies in"):
            tt.list_images(d)
        (d / "loop").unlink()
        original = os.scandir

        def closed(path):  # root may list everything: what others meet
            if str(path).endswith("类"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return original(path)

        os.scandir = closed
        try:
            with refused("cannot list", "类"):
                tt.list_images(d)
        finally:
            os.scandir = original


def test_downloads():
    """Only a whole file with the right sha256 gets the name; nothing else is left."""
    def hub():
        return sorted(p.name for p in (d / "checkpoints").iterdir())

    with folder() as d:
        original, torch.hub.get_dir = torch.hub.get_dir, lambda: str(d)
        copy_of = shutil.copyfileobj
        try:
            (d / "weights.pth").write_bytes(b"weights" * 1000)
            url = (d / "weights.pth").as_uri()
            with refused("sha256 differs"):
                find_weights(url, "0" * 64, "--flag")
            assert hub() == []
            for stop in (http.client.IncompleteRead(b""), ConnectionResetError("reset"), KeyboardInterrupt()):
                def interrupted(source, f, stop=stop):
                    f.write(source.read(100))
                    raise stop
                shutil.copyfileobj = interrupted
                with contextlib.suppress(KeyboardInterrupt), refused("missing weights", "--flag"):
                    find_weights(url, "", "--flag")
                assert hub() == []
            shutil.copyfileobj = lambda source, f: f.write(source.read(100))  # the line goes dead, without an error
            with refused("it ended early"):
                find_weights(url, "", "--flag")
            shutil.copyfileobj = copy_of
            digest = sha256(d / "weights.pth")
            assert find_weights(url, digest, "--flag").read_bytes() == b"weights" * 1000 and hub() == ["weights.pth"]
            (d / "checkpoints" / "weights.pth").write_bytes(b"damaged")
            with refused("is damaged"):
                find_weights(url, digest, "--flag")
            with refused("missing weights"):
                find_weights((d / "nothing.pth").as_uri(), "", "--flag")
        finally:
            torch.hub.get_dir, shutil.copyfileobj = original, copy_of


class Fatal:
    """Data whose second image kills the process that loads it, as a lack of memory does."""
    labels = None

    def image(self, i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (32, 32))


def test_dead_worker():
    def main():
        list(tt.batches(tt.View(Fatal(), 32), tt.in_order(4, 1), 1, torch.device("cpu")))

    try:
        tt.run(main)
    except SystemExit as e:
        assert e.code.startswith("error: a process that loads images has died") and "\n" not in e.code, e.code
    else:
        raise AssertionError("no error")


class TooLong(BaseException):
    """Not an Exception: nothing on the way may take it for a damaged file."""


def slow_fuzz_of_files(files=500, seconds=20):
    """Damaged files of four kinds: each is one line of error, or handled, in time. A cut is always noticed; a flipped
    bit of a checkpoint, an npz or a PNG is noticed, or has changed nothing; a JPEG's may be a slightly other image."""
    def late(*_):
        raise TooLong

    def read_checkpoint(path):
        return [tensor.tolist() for tensor in Tokenizer.load(path).state_dict().values()]

    def read_image(path):
        return np.array(tt.center_crop(load_both_ways(path), 16)).tolist()

    r, counts = np.random.default_rng(0), collections.Counter()
    with folder() as d:
        save_tokenizer(small_tokenizer(), d / "a.pt")
        np.savez_compressed(d / "a.npz", arr_0=r.integers(0, 256, (6, 8, 8, 3), np.uint8), mu=np.arange(4.0),
                            sigma=np.eye(4))
        (d / "a.jpg").write_bytes(picture("JPEG"))
        (d / "a.png").write_bytes(picture("PNG"))
        readers = {"jpg": read_image, "png": read_image, "npz": read_npz, "pt": read_checkpoint}
        whole = {kind: (d / f"a.{kind}").read_bytes() for kind in readers}
        content = {kind: read(d / f"a.{kind}") for kind, read in readers.items()}
        before = signal.signal(signal.SIGALRM, late)
        try:
            for k in range(files):
                kind, damage = list(readers)[k % 4], ("flipped", "cut", "flipped", "cut", "renamed")[k // 4 % 5]
                size, true = len(whole[kind]), kind
                # half of the places in the headers or at the end, where the formats differ, half anywhere
                place = int(r.choice([r.integers(min(size, 400)), size - 1 - r.integers(min(size, 400)),
                                      *r.integers(size, size=2)]))
                data = flip(whole[kind], 8 * place + int(r.integers(8))) if damage == "flipped" else whole[kind][:place]
                if damage == "renamed":
                    true = r.choice([other for other in readers if other != kind])
                    data = whole[true]
                path = d / f"damaged.{kind}"
                path.write_bytes(data)
                signal.alarm(seconds)
                try:
                    found = readers[kind](path)
                except UserError as e:
                    assert "\n" not in str(e) and path.name in str(e), e
                    counts[kind, damage, "refused"] += 1
                    assert {kind, true} != {"jpg", "png"}, "images are known by their content"
                else:
                    counts[kind, damage, "handled"] += 1
                    assert damage != "cut", (kind, place, size)
                    assert found == content[true] or (kind, damage) == ("jpg", "flipped"), (kind, damage, place)
                finally:
                    signal.alarm(0)
        finally:
            signal.signal(signal.SIGALRM, before)
    print(", ".join(f"{' '.join(key)} {n}" for key, n in sorted(counts.items())))


def test_fuzz():
    slow_fuzz_of_files(40)


# ------------------------------------------------------------------------------- LightningDiT, train_dit.py, sample.py

@contextlib.contextmanager
def refused(*words):
    """The block must raise a UserError of one line that holds these words."""
    try:
        yield
    except UserError as e:
        assert "\n" not in str(e) and all(w in str(e) for w in words), str(e)
    else:
        raise AssertionError(f"no error about {words}")


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as d:
        yield Path(d)


def random_weights(model, seed=0):
    """Nothing zero: at initialisation a LightningDiT's blocks are the identity and would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model.eval()


def small_tokenizer(d=8, seed=0):
    torch.manual_seed(seed)
    decoder = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1}
    tokenizer = Tokenizer({"dim": 64, "depth": 1, "grid": 4}, decoder, d=d)
    tokenizer.latent_mean.normal_()
    tokenizer.latent_std.uniform_(0.5, 2)
    return tokenizer.requires_grad_(False).eval()


def save_tokenizer(tokenizer, path):
    save_checkpoint(path, {"arguments": tokenizer.arguments, "tokenizer": tokenizer.state_dict()})
    return str(path)


def save_dit(model, path, tokenizer):
    save_checkpoint(path, {"arguments": model.arguments, "ema": model.state_dict(),
                           "run": {"tokenizer": tokenizer.fingerprint()}})
    return str(path)


# -------------------------------------------------------------------------------------------------------- LightningDiT

def test_dit_sizes():
    counts = {"B/1": 130_556_192, "L/1": 458_152_960, "XL/1": 675_256_736, "1p0B/1": 1_029_401_120,
              "1p6B/1": 1_631_767_120}
    for name, count in counts.items():
        with torch.device("meta"):
            model = LightningDiT(**DITS[name])
        assert sum(p.numel() for p in model.parameters()) == count, name
    assert set(DITS) == {"tiny", *counts}


def test_dit_output_is_zero_at_init():
    for K, grid in ((10, (4, 4)), (0, (2, 3))):
        model = LightningDiT(dim=32, depth=2, heads=2, d=4, num_classes=K, grid=grid)
        y = torch.tensor([0, K]) if K else None  # K: the null class
        for side in (grid, (3, 5)):
            assert not model(torch.randn(2, 4, *side), torch.tensor([0.0, 1.0]), y).any()
        assert hasattr(model, "y_embedder") == (K > 0)


def test_positions_against_loops():
    h, w, D = 3, 5, 16
    sincos, cos, sin = sincos_embedding(h, w, D)[0], *rope_tables(h, w, D)
    x = torch.randn(h * w, D)
    y = rotate(x, cos, sin)
    for row in range(h):
        for column in range(w):
            n = row * w + column
            for k in range(D // 4):  # sin-cos: column first, [sin, cos] of D/4 frequencies; RoPE: row first, pairs
                for first, place in ((0, column), (D // 2, row)):
                    angle = place / 10000 ** (k / (D // 4))
                    assert abs(sincos[n, first + k] - math.sin(angle)) < 1e-6
                    assert abs(sincos[n, first + D // 4 + k] - math.cos(angle)) < 1e-6
                for first, place in ((0, row), (D // 2, column)):
                    angle, i = place / 10000 ** (2 * k / (D // 2)), first + 2 * k
                    assert abs(y[n, i] - (x[n, i] * math.cos(angle) - x[n, i + 1] * math.sin(angle))) < 1e-5
                    assert abs(y[n, i + 1] - (x[n, i + 1] * math.cos(angle) + x[n, i] * math.sin(angle))) < 1e-5


def plain_dit(S, z, t, y, heads):
    """LightningDiT from its published description, patch 1, on a state dict in fp64; explicit softmax, no modules."""
    def linear(name, x):
        return x @ S[f"{name}.weight"].T + S[f"{name}.bias"]

    def norm(name, x):
        return S[f"{name}.weight"] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    def silu(x):
        return x / (1 + torch.exp(-x))

    B, _, h, w = z.shape
    D = S["x_embedder.proj.bias"].numel()
    cos, sin = (a.double() for a in rope_tables(h, w, D // heads))
    x = z.flatten(2).transpose(1, 2) @ S["x_embedder.proj.weight"].flatten(1).T + S["x_embedder.proj.bias"]
    x = x + sincos_embedding(h, w, D).double()
    angle = t[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    c = silu(c + S["y_embedder.embedding_table.weight"][y])[:, None]
    i = 0
    while f"blocks.{i}.norm1.weight" in S:
        b = f"blocks.{i}."
        a1, b1, g1, a2, b2, g2 = linear(b + "adaLN_modulation.1", c).split(D, -1)
        q, k, v = (p.reshape(B, h * w, heads, -1).transpose(1, 2)
                   for p in linear(b + "attn.qkv", norm(b + "norm1", x) * (1 + b1) + a1).split(D, -1))
        q, k = rotate(norm(b + "attn.q_norm", q), cos, sin), rotate(norm(b + "attn.k_norm", k), cos, sin)
        weights = torch.exp(q @ k.transpose(2, 3) / math.sqrt(D // heads))
        out = weights / weights.sum(-1, keepdim=True) @ v
        x = x + g1 * linear(b + "attn.proj", out.transpose(1, 2).reshape(B, h * w, D))
        gate, value = linear(b + "mlp.w12", norm(b + "norm2", x) * (1 + b2) + a2).chunk(2, -1)
        x = x + g2 * linear(b + "mlp.w3", silu(gate) * value)
        i += 1
    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(D, -1)
    x = linear("final_layer.linear", norm("final_layer.norm_final", x) * (1 + scale) + shift)
    return x.transpose(1, 2).reshape(z.shape)


def test_dit_numerics():
    model = random_weights(LightningDiT(dim=32, depth=2, heads=2, d=4, num_classes=10, grid=(4, 4), qk_norm=True))
    S = {k: v.double() for k, v in model.state_dict().items()}
    for side in ((4, 4), (3, 5)):
        z, t, y = torch.randn(3, 4, *side), torch.rand(3), torch.tensor([0, 7, 10])
        with torch.no_grad():
            got, want = model(z, t, y), plain_dit(S, z.double(), t.double(), y, heads=2)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_official_checkpoint():
    """Only names and shapes to go by; strict; and the other time direction."""
    model = random_weights(LightningDiT(dim=32, depth=2, heads=2, d=4, num_classes=5, grid=(4, 4), qk_norm=True))
    assert dit_arguments(model.state_dict()) == model.arguments
    with folder() as d:
        torch.save({"ema": model.state_dict(), "model": {}}, d / "official.pt")
        loaded, content = sample.load_dit(d / "official.pt")
        assert "run" not in content and loaded.arguments == model.arguments
        z, y = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
        with torch.no_grad():
            v = sample.Velocity(loaded, y, time="lightning")(z, 0.3)
            assert torch.equal(v, -model(z, torch.tensor([0.7, 0.7]), y))
        state = model.state_dict()
        del state["blocks.1.attn.k_norm.weight"]
        torch.save({"ema": state}, d / "broken.pt")
        with refused("broken.pt", "k_norm"):
            sample.load_dit(d / "broken.pt")
        torch.save({"model": state}, d / "no_ema.pt")
        with refused("no_ema.pt", "ema"):
            sample.load_dit(d / "no_ema.pt")


# -------------------------------------------------------------------------------------------------------- flow matching

def test_flow_matching():
    z0, z1, y = torch.randn(4, 6, 2, 2), torch.randn(4, 6, 2, 2), torch.zeros(4, dtype=torch.long)
    seen = {}

    def network(z_t, t, y):
        seen.update(z_t=z_t, t=t)
        return seen["answer"]

    t = torch.tensor([0.0, 1.0, 0.25, 0.5])
    seen["answer"] = z1 - z0  # the direction: from data to noise
    loss, mse, cosine = losses.flow_matching(network, z0, z1, t, y, w_cos=1.0)
    assert abs(loss) < 1e-6 and not mse.any() and abs(cosine) < 1e-6
    assert torch.equal(seen["z_t"][0], z0[0]) and torch.equal(seen["z_t"][1], z1[1])  # t = 0 data, t = 1 noise
    assert torch.allclose(seen["z_t"][2], 0.75 * z0[2] + 0.25 * z1[2])
    seen["answer"] = 3 * (z0 - z1)  # opposite: 1 - cos = 2, and 4^2 times the energy of u
    loss, mse, cosine = losses.flow_matching(network, z0, z1, t, y, w_cos=0.5)
    energy = (z1 - z0).square().mean((1, 2, 3))
    assert torch.allclose(mse, 16 * energy) and abs(cosine - 2) < 1e-5 and abs(loss - 16 * energy.mean() - 1) < 1e-4
    # v = 0: the cosine has no direction
    model = LightningDiT(dim=32, depth=1, heads=2, d=6, num_classes=1, grid=(2, 2))
    losses.flow_matching(model, z0, z1, t, y, w_cos=1.0)[0].backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    assert 0 < norm < 1e3
    sums, numbers = losses.by_time(torch.tensor([1.0, 2, 4, 8]), torch.tensor([0.0, 1.0, 0.25, 0.3]), 4)
    assert sums.tolist() == [1, 12, 0, 2] and numbers.tolist() == [1, 2, 0, 1]
    assert torch.allclose(losses.logit_normal(torch.tensor([0.0, 2.0])), torch.tensor([0.5, 1 / (1 + math.exp(-2))]))


# -------------------------------------------------------------------------------------------------------- the sampler

def test_time_grid():
    assert np.allclose(sample.time_grid(4), [1, 0.75, 0.5, 0.25, 0]) and sample.time_grid(7, 1.0) == sample.time_grid(7)
    s, shifted = 0.3, sample.time_grid(10, 1 / 0.3)
    t = np.linspace(0, 1, 11)  # LightningDiT's direction, its rule
    assert np.allclose(1 - np.array(shifted), s * t / (1 + (s - 1) * t)) and shifted[0] == 1 and shifted[-1] == 0
    assert shifted[5] > 0.5  # more steps near noise


def test_samplers_recover_the_data():
    z0, z1 = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for method in ("euler", "heun"):
        for shift in (1.0, 3.0):
            z = sample.integrate(lambda z, t: z1 - z0, z1, sample.time_grid(7, shift), method)
            assert (z - z0).abs().max() < 1e-12


def test_samplers_order():
    """Data N(m, s^2): the velocity E[z1 - z0 | z_t] and its flow, z_0 = m + s z_1, are known in closed form."""
    m, s, z1 = 1.5, 0.4, torch.linspace(-2, 2, 9, dtype=torch.float64)

    def velocity(z, t):
        var = (1 - t) ** 2 * s ** 2 + t ** 2
        return -m + (t - (1 - t) * s ** 2) / var * (z - (1 - t) * m)

    for method, order in (("euler", 1), ("heun", 2)):
        error = [(sample.integrate(velocity, z1, sample.time_grid(n), method) - (m + s * z1)).abs().max().item()
                 for n in (64, 128)]
        assert abs(math.log2(error[0] / error[1]) - order) < 0.15, (method, error)


def test_guidance():
    class Network:
        num_classes, batches = 5, []

        def __call__(self, z, t, y):
            self.batches.append(len(z))
            return z * (y.view(-1, 1, 1, 1) + 1.0) + t.view(-1, 1, 1, 1)

    net, z, y = Network(), torch.randn(2, 4, 2, 2), torch.tensor([0, 2])
    conditional = sample.Velocity(net, y)(z, 0.5)
    assert torch.equal(conditional, net(z, torch.full((2,), 0.5), y))
    null = net(z, torch.full((2,), 0.5), torch.tensor([5, 5]))
    net.batches.clear()
    v = sample.Velocity(net, y, cfg=1.0)
    assert torch.equal(v(z, 0.5), conditional) and net.batches == [2] and (v.conditional, v.unconditional) == (1, 0)
    v = sample.Velocity(net, y, cfg=3.0, interval=(0.1, 0.5))
    assert torch.allclose(v(z, 0.5), null + 3 * (conditional - null)) and net.batches == [2, 4]
    v(z, 0.51), v(z, 0.05)
    assert net.batches == [2, 4, 2, 2] and (v.conditional, v.unconditional) == (3, 1)
    three = sample.Velocity(net, y, cfg=3.0, channels=3)(z, 0.5)
    assert torch.allclose(three[:, :3], (null + 3 * (conditional - null))[:, :3])
    assert torch.equal(three[:, 3:], conditional[:, 3:])
    for method, evaluations in (("euler", 7), ("heun", 14)):  # N steps are N intervals
        v = sample.Velocity(net, y)
        sample.integrate(v, z, sample.time_grid(7), method)
        assert v.conditional == evaluations and v.unconditional == 0


def test_labels():
    assert sample.choose_labels("balanced", 3, 7, 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sample.choose_labels("2,0", 3, 5, 0).tolist() == [2, 0, 2, 0, 2]
    few, many = sample.choose_labels("random", 10, 20, 1), sample.choose_labels("random", 10, 200, 1)
    assert (many[:20] == few).all() and set(many) == set(range(10))
    assert sample.choose_labels("balanced", 0, 5, 0) is None
    for spec in ("3", "0,-1", "dog"):
        with refused("--labels", spec):
            sample.choose_labels(spec, 3, 5, 0)
    with refused("unconditional"):
        sample.choose_labels("1", 0, 5, 0)


def test_images_do_not_depend_on_the_batch():
    tokenizer = small_tokenizer()
    model = random_weights(LightningDiT(dim=32, depth=2, heads=2, d=8, num_classes=3, grid=(1, 2)))
    labels, pictures = sample.choose_labels("random", 3, 64, 5), []
    for size in (1, 7, 64):
        images = [sample.generate(model, tokenizer, np.arange(i, min(i + size, 64)), labels, 5, sample.time_grid(3),
                                  cfg=2.0)[0] for i in range(0, 64, size)]
        pictures.append(torch.cat(images))
    scale = pictures[0].abs().max()
    assert all((p - pictures[0]).abs().max() < 1e-4 * scale for p in pictures[1:])
    assert (pictures[0][0] - pictures[0][1]).abs().max() > 1e-2 * scale  # and they do depend on i


def test_rows():
    """A full disk, a stop in the middle, and other contents: never a half file under the final name."""
    values = np.random.default_rng(0).standard_normal((10, 2, 3)).astype(np.float16)
    with folder() as d:
        path = d / "rows.npy"
        rows = sample.Rows(path, 10, (2, 3), np.float16, {"tokenizer": "a"})
        assert not rows.complete and rows.missing.tolist() == list(range(10))
        rows.write([7, 2], values[[7, 2]])
        good, rows.rows = rows.rows, os.open("/dev/full", os.O_WRONLY)
        with refused("No space", "rows.npy"):
            rows.write([3], values[[3]])
        assert not path.exists()
        for f in (good, rows.rows):
            os.close(f)
        rows.lock.close()
        with refused("tokenizer a -> b"):
            sample.Rows(path, 10, (2, 3), np.float16, {"tokenizer": "b"})
        rows = sample.Rows(path, 10, (2, 3), np.float16, {"tokenizer": "a"})
        assert rows.missing.tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
        assert [b.tolist() for b in rows.mine(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]  # whole batches
        assert [b.tolist() for b in sample.share([6, 7, 9], 10, 2, 1, 2)] == [[5, 6], [7, 8], [9]]
        assert [b.tolist() for b in sample.share([2], 3, 2, 0, 2)] == []
        for indices in rows.mine(3):
            rows.write(indices, values[indices])
        rows.finish()
        assert (np.load(path, mmap_mode="r") == values).all()
        assert sorted(p.name for p in d.iterdir()) == ["rows.npy", "rows.npy.json"]
        for left in ("rows.npy.part", "rows.npy.done0"):  # by a kill just before the end
            (d / left).touch()
        assert sample.Rows(path, 10, (2, 3), np.float16, {"tokenizer": "a"}).complete
        assert sorted(p.name for p in d.iterdir()) == ["rows.npy", "rows.npy.json"]
        with refused("tokenizer a -> b"):
            sample.Rows(path, 10, (2, 3), np.float16, {"tokenizer": "b"})
        assert not sample.Rows(path, 10, (2, 3), np.float16, {"tokenizer": "b"}, overwrite=True).complete
        for damaged in (f"{path}.part", f"{path}.json"):
            Path(damaged).write_bytes(b"half")
            with refused(damaged):
                sample.Rows(path, 10, (2, 3), np.float16, {"tokenizer": "b"})


def test_sample_files():
    """npz, folder and grid hold the same images; a stop and a second call complete them."""
    tokenizer = small_tokenizer()
    model = random_weights(LightningDiT(dim=32, depth=1, heads=2, d=8, num_classes=3, grid=(2, 1)))
    with folder() as d:
        ours = ["--tokenizer", save_tokenizer(tokenizer, d / "tok.pt"),
                "--dit", save_dit(model, d / "dit.pt", tokenizer),
                "--preset", "tiny", "--steps", "2", "--num", "5", "--dtype", "fp32"]
        sample.main([*ours, "--out", str(d / "s.npz"), "--batch-size", "2"])
        with np.load(d / "s.npz") as f:
            images = f["arr_0"]
        want, _ = sample.generate(model, tokenizer, np.arange(5), np.arange(5) % 3, 0, sample.time_grid(2), cfg=3.0)
        assert images.shape == (5, 32, 16, 3) and images.dtype == np.uint8
        assert np.abs(images.astype(int) - to_uint8(want)).max() <= 1
        sample.main([*ours, "--out", str(d / "pngs"), "--batch-size", "5"])
        (d / "pngs" / "000003.png").unlink()
        sample.main([*ours, "--out", str(d / "pngs"), "--grid", str(d / "grid.png")])
        files = sorted((d / "pngs").glob("*.png"))
        assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
        assert np.abs(np.stack([np.array(Image.open(f)) for f in files]).astype(int) - images).max() <= 1
        assert Image.open(d / "grid.png").size == (5 * 16, 32)
        for out in ("s.npz", "pngs"):
            with refused("seed 0 -> 1"):
                sample.main([*ours, "--out", str(d / out), "--seed", "1"])
        (d / "pngs" / "sampling.json").write_text('{"seed": 0')
        with refused("sampling.json"):
            sample.main([*ours, "--out", str(d / "pngs")])
        for out, locked in (("s.npz", "s.npz.lock"), ("pngs", "pngs/.lock")):
            with tt.lock(d / locked, ""), refused("another process", out):
                sample.main([*ours, "--out", str(d / out)])


def test_sample_errors():
    tokenizer, other = small_tokenizer(), small_tokenizer(seed=1)
    model = LightningDiT(dim=32, depth=1, heads=2, d=8, num_classes=3, grid=(2, 2))
    with folder() as d:
        tok, dit = save_tokenizer(tokenizer, d / "tok.pt"), save_dit(model, d / "dit.pt", tokenizer)
        ours = ["--preset", "tiny", "--dit", dit, "--tokenizer", tok]
        for words, argv in {
            ("--steps",): ["--steps", "0"],
            ("LO <= HI", "0.9 0.1"): ["--cfg-interval", "0.9", "0.1"],
            ("--labels 3", "0 to 2"): ["--labels", "3"],
            ("missing.pt", "train_tokenizer.py"): ["--tokenizer", str(d / "missing.pt")],
            ("missing.pt",): ["--dit", str(d / "missing.pt")],
            ("4 latent channels", "takes 8"): ["--tokenizer", save_tokenizer(small_tokenizer(d=4), d / "4.pt")],
            ("another tokenizer",): ["--tokenizer", save_tokenizer(other, d / "other.pt")],
        }.items():
            with refused(*words):
                sample.main([*ours, *argv])
        torch.save({"ema": model.state_dict()}, d / "official.pt")
        with refused("--time"):
            sample.main([*ours, "--dit", str(d / "official.pt")])
        torch.save({"mean": torch.zeros(3)}, d / "stats.pt")
        with refused("stats.pt", "8 channels"):
            sample.main([*ours, "--latent-stats", str(d / "stats.pt")])


# -------------------------------------------------------------------------------------------------------- train_dit.py

@contextlib.contextmanager
def mini_size():
    DITS["mini"] = {"dim": 32, "depth": 1, "heads": 2}
    try:
        yield
    finally:
        del DITS["mini"]


def write_shapes(root, n=24, size=32):
    shapes = Shapes(n=n, size=size)
    for i in range(n):
        path = root / shapes.classes[shapes.labels[i]] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.image(i).save(path)
    return str(root)


def mini_dit(d):
    """Flags of train_dit.py for a tokenizer and 24 images that are written to folder d."""
    return ["--preset", "tiny", "--model", "mini", "--tokenizer", save_tokenizer(small_tokenizer(), d / "tok.pt"),
            "--size", "32", "--data", write_shapes(d / "data" / "train"), "--val", write_shapes(d / "data" / "val"),
            "--batch-size", "8", "--dtype", "fp32", "--grid-every", "99", "--save-every", "99"]


def test_train_dit():
    """Bit-exact resume in fp32; the cache against encoding on the fly; what must be refused."""
    with folder() as d, mini_size():
        tokenizer, ours = small_tokenizer(), [*mini_dit(d), "--log-every", "3"]
        train_dit.main([*ours, "--out", str(d / "a"), "--steps", "4"])
        train_dit.main([*ours, "--out", str(d / "b"), "--steps", "2"])
        shutil.copytree(d / "b", d / "c")  # as a new process: the first one holds its folder's lock
        for _ in range(2):  # the second finds it complete
            train_dit.main([*ours, "--out", str(d / "c"), "--steps", "4", "--workers", "1"])
        a, c = (torch.load(d / name / "dit_step00000004.pt", weights_only=True) for name in "ac")
        for part in ("model", "ema"):
            assert all(torch.equal(v, c[part][k]) for k, v in a[part].items())
        assert (d / "a" / "log.csv").read_bytes() == (d / "c" / "log.csv").read_bytes()

        cache = np.load(d / "a" / "latents.npy", mmap_mode="r")
        data = train_dit.open_data(str(d / "data" / "train"), None, 32, 1)[0]
        x = tt.to_tensor(train_dit.View(data, 32)[0, 5][0])
        z = tokenizer.normalize(tokenizer.encode(torch.stack([x, x.flip(2)])))
        assert np.abs(cache[5] - z.numpy()).max() < 2e-3 * z.abs().max()  # fp16
        args = train_dit.parse(ours)
        items = [train_dit.FlowData(data, latents, (8, 2, 2), 12, args)[0, 5] for latents in (cache, None)]
        assert all(torch.equal(torch.as_tensor(p), torch.as_tensor(q)) for p, q in zip(items[0][1:], items[1][1:]))
        fresh = tokenizer.normalize(tokenizer.encode(items[1][0][None]))[0]
        assert (items[0][0] - fresh).abs().max() < 2e-3 * fresh.abs().max()
        draws = [train_dit.FlowData(data, cache, (8, 2, 2), 12, args)[e, i] for e in range(40) for i in range(24)]
        assert 0.07 < np.mean([y == 12 for _, y, _, _ in draws]) < 0.13  # --label-drop 0.1
        normal = torch.stack([n for _, _, n, _ in draws])
        assert abs(normal.mean()) < 0.15 and abs(normal.std() - 1) < 0.1

        again = [*ours, "--steps", "4"]
        for part in ("b", "d"):
            shutil.rmtree(d / part, ignore_errors=True)
            shutil.copytree(d / "a", d / part)
        save_tokenizer(small_tokenizer(seed=1), d / "other.pt")
        with refused("latents.npy", "tokenizer"):
            train_dit.main([*again, "--out", str(d / "b"), "--tokenizer", str(d / "other.pt")])
        Image.new("RGB", (32, 32)).save(d / "data" / "train" / "arrow" / "new.png")
        with refused("latents.npy", "data"):
            train_dit.main([*again, "--out", str(d / "d")])
    for words, argv in {("missing.pt",): ["--data", "shapes", "--tokenizer", "missing.pt"],
                        ("--steps",): ["--steps", "0"],
                        ("--batch-size 9",): ["--batch-size", "9", "--accum", "2"]}.items():
        with folder() as d, refused(*words):
            train_dit.main(["--preset", "tiny", "--out", str(d / "run"), *argv])


# ----------------------------------------------------------- python test_smoke.py --slow: runs as they are in the world

def sizes(folder):
    """Name -> size of all files below a folder, while others write and rename there."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found[str(path.relative_to(folder))] = path.stat().st_size
    return found


def assert_alike(a, b):
    """Two folders hold the same files: checkpoints bit by bit, all others byte by byte; and nothing half-written."""
    names = [{name for name in sizes(root) if not name.endswith(".lock")} for root in (a, b)]
    assert names[0] == names[1], names[0] ^ names[1]
    for name in sorted(names[0]):
        if name.endswith(".pt"):
            differs = same(load_file(a / name), load_file(b / name))
            assert differs is None, (name, differs)
        elif (a / name).is_file():
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def kill_until_complete(r, out, *command, most=40):
    """Repeats a command, killed at a random moment after its first files, every other time at one when a file is being
    written, until it ends by itself. Returns how often which file was being written at a kill ("": none)."""
    hit = collections.Counter()
    while True:
        aimed = r.random() < 0.5
        process, before = start(*command, "--out", out), sizes(out.parent)
        left = r.integers(1, most // 3 if aimed else most)
        while process.poll() is None and left > 0:
            time.sleep(0.003)
            now = sizes(out.parent)
            left -= now != before and (not aimed or any(Path(f).name[0] == "." and f.endswith(".part") for f in now))
            before = now
        time.sleep(0 if aimed else r.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        text = end(process)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, text[-3000:]
            return hit
        parts = [re.sub("[0-9]+", "*", Path(f).name) for f in sizes(out.parent) if f.endswith(".part")]
        hit[min(parts, default="")] += 1  # a name with a dot comes first: of write_atomically


SLOW = [*SMALL, "--grid-every", "3", "--log-every", "3", "--save-every", "1", "--steps", "4"]


def tiny_dit(tok, *more):
    return ["train_dit.py", "--preset", "tiny", "--tokenizer", tok, "--val-images", "24", "--batch-size", "4",
            "--dtype", "fp32", "--log-every", "3", "--save-every", "1", "--grid-every", "3", "--steps", "6", *more]


def slow_kills():
    """SIGKILL at random moments, then the same command again, until it is through: the folder is that of a run that was
    never killed. Three stages with GAN and EMA; the generator and its cache; samples as npz and as PNGs."""
    r, hit = np.random.default_rng(0), {}
    with folder() as d:
        tok, dit = (d / name / "a" / "out" for name in ("tokenizer", "dit"))
        draw = ["sample.py", "--preset", "tiny", "--dtype", "fp32", "--tokenizer", tok / "stage3.pt", "--dit",
                dit / "dit_step00000006.pt", "--num", "40", "--batch-size", "2", "--steps", "2"]
        for name, out, most, command in (
                ("tokenizer", "out", 40, ["train_tokenizer.py", *SLOW]),
                ("dit", "out", 40, tiny_dit(tok / "stage3.pt", "--data", write_shapes(d / "data", 100, 64),
                                            "--encode-batch", "2")),
                ("npz", "out.npz", 20, draw), ("png", "out", 20, draw)):
            for run in "ab":
                (d / name / run).mkdir(parents=True)
            complete(*command, "--out", d / name / "a" / out)
            hit[name] = kill_until_complete(r, d / name / "b" / out, *command, most=most)
            assert_alike(d / name / "a", d / name / "b")
    assert sum(found.total() for found in hit.values()) >= 30, hit
    return "; ".join(f"{name}: {found.total()} kills, {dict(found)}" for name, found in hit.items())


def slow_signals():
    """SIGTERM and Ctrl-C, to the process, to its group with the loader's workers, to torchrun alone: a checkpoint at
    the step boundary, a message, and bit for bit the end of a run that never stopped."""
    tok = ["train_tokenizer.py", *SLOW, "--stage", "2", "--init", small_run() / "stage1.pt", "--steps", "12"]
    with folder() as d:
        dit = tiny_dit(small_run() / "stage3.pt", "--steps", "40", "--cache", d / "latents.npy", "--data",
                       write_shapes(d / "data", 48, 64))
        for command, ranks, workers, number, kill in (
                (tok, 0, 0, signal.SIGTERM, os.kill), (tok, 0, 2, signal.SIGINT, os.killpg),
                (dit, 0, 0, signal.SIGINT, os.kill), (dit, 0, 2, signal.SIGTERM, os.killpg),
                (tok, 2, 1, signal.SIGTERM, os.kill), (dit, 2, 1, signal.SIGTERM, os.kill)):
            command = [*command, "--log-every", "1", "--save-every", "99", "--grid-every", "99", "--workers", workers,
                       "--out"]
            complete(*command, d / "a", ranks=ranks)
            process = start(*command, d / "b", ranks=ranks)
            while process.poll() is None and not ((d / "b" / "log.csv").exists() and len(rows_of(d / "b")) > 2):
                time.sleep(0.01)
            kill(process.pid, number)
            text = end(process)
            assert process.returncode == 1 and text.count("stopped by a signal at step") == max(1, ranks), text[-3000:]
            assert ranks or "Traceback" not in text, text[-3000:]  # torchrun itself leaves with one
            stopped, = (d / "b").glob("*_step*.pt")
            complete(*command, d / "b", ranks=ranks)
            stopped.unlink()
            assert_alike(d / "a", d / "b")
            shutil.rmtree(d / "a"), shutil.rmtree(d / "b")


EQUAL_ON_ALL_RANKS = """  # every parameter and buffer by its bits, where check_weights compares one sum
def check(module, *args):
    if dist.is_initialized():
        bits = b"".join(v.numpy().tobytes() for v in module.state_dict().values())
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, hashlib.sha256(bits).hexdigest())
        assert len(set(every)) == 1, "ranks differ"
tt.check_weights = check
"""

AT_THE_FOURTH_BATCH_OF_RANK_1 = """
import datetime, time
tt.timedelta = lambda **_: datetime.timedelta(seconds=30)  # not 30 minutes
batches = tt.batches
def planted(view, *args):
    for k, batch in enumerate(batches(view, *args), 1):
        if k == 4 and os.environ["RANK"] == "1":
            {}
        yield batch
tt.batches = planted
"""


def slow_ranks():
    """2 and 3 processes against one, the same global batch of 6: the losses of 5 steps, in every stage and the
    generator; at the end all ranks hold the same bits."""
    worst = {}
    with folder() as d:
        fp64, stage = driver(d / "driver.py", IN_FP64 + EQUAL_ON_ALL_RANKS), ["train_tokenizer.py", *SLOW, "--stage"]
        for name, command in {
                "stage 1": [*stage, "1"], "stage 2": [*stage, "2", "--init", small_run() / "stage1.pt"],
                "stage 3": [*stage, "3", "--init", small_run() / "stage2.pt"],
                "generator": tiny_dit(small_run() / "stage3.pt", "--data", write_shapes(d / "data", 48, 64),
                                      "--cache", d / "latents.npy")}.items():
            for ranks in (1, 2, 3):
                complete(fp64, *command, "--steps", "5", "--batch-size", "6", "--log-every", "1", "--grid-every", "99",
                         "--out", d / name / str(ranks), ranks=ranks)
                for one, many in zip(rows_of(d / name / "1"), rows_of(d / name / str(ranks)), strict=True):
                    difference = [abs(float(one[k]) - float(many[k])) / max(1e-2, abs(float(one[k])))
                                  for k in one if one[k]]
                    worst[name] = max(worst.get(name, 0), *difference)
    assert max(worst.values()) < 1e-5, worst
    return ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items())


def slow_one_rank_fails():
    """A NaN, an unreadable image, an exception or a SIGKILL on one rank of two ends both, with a message, no hang."""
    seconds = {}
    with folder() as d:
        for data in ("data", "broken"):
            write_shapes(d / data, 48, 64), write_shapes(d / "val", 24, 64)
        unreadable = min((d / "broken").rglob("*.png"))
        unreadable.write_bytes(b"not an image")
        tok = ["train_tokenizer.py", *SLOW, "--stage", "1"]
        dit = tiny_dit(small_run() / "stage3.pt", "--cache", d / "latents.npy", "--encode-batch", "48")
        for fault, action, data, commands, words in (
                ("NaN", "batch[0].view(-1)[0] = float('nan')", "data", (tok, dit),
                 ("error: the loss is not finite since step 4", "_step00000003.pt")),
                ("exception", "raise ValueError('planted')", "data", (tok, dit), ("planted",)),
                ("SIGKILL", "os.kill(os.getpid(), 9)", "data", (tok, dit), ("Signal 9",)),
                ("hang", "time.sleep(999)", "data", (tok,), ("error: another rank has stopped",)),
                ("image", "pass", "broken", (tok,), ("error: unreadable image", unreadable.name))):
            script = driver(d / "driver.py", AT_THE_FOURTH_BATCH_OF_RANK_1.format(action))
            for command in commands:
                process = start(script, *command, "--data", d / data, "--val", d / "val", "--out", d / "out", "--steps",
                                "9999", "--save-every", "3", "--log-every", "5", "--grid-every", "9999", ranks=2)
                while process.poll() is None and not list((d / "out").glob("*_step00000003.pt")):
                    time.sleep(0.01)
                began = time.time()
                text = end(process, 120)
                seconds[fault] = max(time.time() - began, seconds.get(fault, 0))
                assert process.returncode == 1 and all(word in text for word in words), text[-5000:]
                assert "[rank0]" not in text, f"a traceback of the rank that is well: {text[-5000:]}"
                saved = [load_file(path) for path in (d / "out").glob("*.pt")]
                assert fault == "image" or [content["step"] for content in saved] == [3]
                assert all(v.isfinite().all() for content in saved for part in ("tokenizer", "model", "ema")
                           for v in (content.get(part) or {}).values())
                shutil.rmtree(d / "out")
    return ", ".join(f"{fault} {s:.0f} s" for fault, s in seconds.items())


def slow_workers():
    """0, 1 and 4 loader's workers: the same bits."""
    with folder() as d:
        for name, command in {
                "tok": ["train_tokenizer.py", *SLOW, "--stage", "2", "--init", small_run() / "stage1.pt"],
                "dit": tiny_dit(small_run() / "stage3.pt", "--data", write_shapes(d / "data", 48, 64))}.items():
            for workers in (0, 1, 4):
                complete(*command, "--grid-every", "99", "--workers", workers, "--out", d / f"{name}{workers}")
                assert_alike(d / f"{name}0", d / f"{name}{workers}")


def setup_function(_):
    """Before each test, here and under pytest: a test draws the same numbers alone and among others."""
    torch.manual_seed(0)


def main():
    kinds, words = ("test_", "slow_") if "--slow" in sys.argv else "test_", [w for w in sys.argv[1:] if w != "--slow"]
    tests = [(n, f) for n, f in globals().items() if n.startswith(kinds) and callable(f)]
    if words:
        tests = [(n, f) for n, f in tests if any(word in n for word in words)]
    failed, began = 0, time.time()
    for name, test in tests:
        start, said = time.time(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                setup_function(test)
                figures = test()
            print(f"ok    {name} ({time.time() - start:.1f} s) {figures or ''}".rstrip(), flush=True)
        except Exception:  # noqa: BLE001, whatever a test raises is its failure
            failed += 1
            print(f"FAIL  {name}\n{said.getvalue()[-2000:]}\n{traceback.format_exc()}", flush=True)
    print(f"{time.time() - began:.0f} s")
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
