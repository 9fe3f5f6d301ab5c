"""The networks of AlignTok (Chen et al., ICLR 2026, arXiv 2509.25162), Section 3 and Figure 2.

Top to bottom: files and weights; DINOv2, the foundation encoder; the adapter; the LDM convolutional encoder and
decoder; the tokenizer that joins them, and the baselines, VAE and VA-VAE; LightningDiT, the generator; the table of
named sizes.
DINOv2, the LDM modules and LightningDiT keep the official state-dict keys: released files load strictly, unmodified.

Departures: the decoder of AlignTok goes without VA-VAE's 1x1 `post_quant_conv` (a linear map before a 3x3 convolution);
DINOv2 has no stochastic depth, because nothing but the toy's stand-in trains it from scratch.

Legend: B batch, H W image sides, h w = H/16 W/16 latent sides, N tokens (h*w), D width, d latent channels,
C channels of a convolution, K classes.
"""
import contextlib
import ctypes
import hashlib
import http.client
import math
import os
import pickle
import re
import shutil
import urllib.request
import warnings
import zipfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# CPU tensors without page faults, which took up to a third of a step (README, "Speed"): in huge pages, where Linux
# gives them on request (PyTorch reads this at its first tensor), and from memory that glibc keeps once it has it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with contextlib.suppress(AttributeError):  # another C library
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)  # never
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)

# ---------------------------------------------------------------------------------------------------- files, weights

class UserError(Exception):
    """A mistake that the user can mend; the scripts print it as one line and exit with status 1."""


@contextlib.contextmanager
def reading(path, what):
    """Inside it, whatever goes wrong is the fault of the file's contents: a UserError of one line that names it."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{path} is not a file" if os.path.exists(path) else f"{what} not found: {path}")
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # a damaged file can make anything of a decoder
        kind = "" if isinstance(e, (ValueError, OSError)) and str(e) else f"{type(e).__name__} "  # says enough
        reason = f"{kind}{e}".splitlines()[0].strip()[:200]
        raise UserError(f"unreadable {what} {path} (damaged, or not what it should be): {reason}") from e


def load_file(path, what="checkpoint"):
    """The dict in a .pt or .pth file, on the CPU. Only tensors, numbers and strings are read, never code.

    The file is a zip archive, whose CRCs torch.load leaves alone: they are checked first, so that a flipped bit is
    noticed. Files from before PyTorch 1.6 (the official VGG16, Inception) are none and have no CRC; find_weights knows
    their sha256. Raises UserError, naming the file, where it is missing, damaged, or holds anything else."""
    with reading(path, what), open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of odd pickles
        if zipfile.is_zipfile(f):
            with zipfile.ZipFile(f) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                    raise ValueError("it would unpack to more than its size")  # torch.save does not compress
                if damaged := archive.testzip():
                    raise ValueError(f"the CRC of {damaged} differs")
        f.seek(0)
        try:
            content = torch.load(f, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch's text advises to switch the protection off
            raise ValueError("not only tensors, numbers and strings, and nothing else is ever loaded") from None
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise ValueError("no dict of tensors")
    return content


def load_strictly(module, state, path):
    """module.load_state_dict(state), where a missing, unknown or misshapen tensor, or one that is not finite, is an
    error that names the file."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as e:
        problems = [line.strip() for line in str(e).splitlines()[1:]] or [str(e)]
        raise UserError(f"{path} does not fit {type(module).__name__}: {' '.join(problems)[:300]}") from None
    odd = [name for name, own in module.state_dict().items()  # a sum is ten times faster than isfinite().all()
           if own.is_floating_point() != state.get(name, own).is_floating_point()
           or not own.is_meta and not own.sum().isfinite()]
    if odd:
        raise UserError(f"{path}: not finite, or of the wrong type: {', '.join(odd)[:300]}")


def build(cls, arguments, state, path):
    """cls(**arguments) with the weights `state`, both from the file `path`, which may be damaged or hostile: that they
    fit each other is seen on the meta device, before any memory is taken."""
    def check(arguments):
        for name, value in arguments.items():
            limit = 100 if name in ("depth", "num_res_blocks") else 2 ** 20  # modules cost time on the meta device too
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if len(numbers) > 16 or any(isinstance(number, int) and number > limit for number in numbers):
                raise ValueError(f"its argument {name} is absurd")
            if isinstance(value, dict):
                check(value)

    with reading(path, "checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is copied to the meta device
        check(arguments)
        with torch.device("meta"):
            skeleton = cls(**arguments)
        load_strictly(skeleton, state, path)
        if sum(tensor.nbytes for tensor in state.values()) > os.path.getsize(path):
            raise ValueError("its tensors are larger than the file")  # views of a few numbers
        module = cls(**arguments)
    load_strictly(module, state, path)
    return module


def print_0(text):
    """Prints on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def find_weights(url, digest, flag, file=None):
    """Path of an external weight file: `file` if given, else torch hub's cache, else downloaded there.

    `digest` is the sha256, or its first characters, or "" where none is known: what is cached or downloaded must have
    it, and what was found is printed. `flag` is what the message names where there is no network."""
    if file:
        if not Path(file).is_file():
            raise UserError(f"{flag} {file}: no such file (the official one is {url})")
        print_0(f"{flag} {file}: sha256 {sha256(file)}")
        return Path(file)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            print_0(f"downloading {url}")
            with urllib.request.urlopen(url, timeout=60) as source, open(part, "wb") as f:
                shutil.copyfileobj(source, f)
                if f.tell() < int(source.headers["Content-Length"] or 0):
                    raise OSError("it ended early")
            if not sha256(part).startswith(digest):
                raise UserError(f"download of {url} is damaged (sha256 differs); fetch it by hand and pass {flag} FILE")
            part.rename(path)
        except (OSError, http.client.HTTPException) as e:
            raise UserError(f"missing weights {path.name}: get {url}, pass it as {flag} FILE (download: {e})") from None
        finally:
            if part.exists():  # whatever stopped it, Ctrl-C too
                part.unlink()
    found = sha256(path)
    if not found.startswith(digest):
        raise UserError(f"{path} is damaged (its sha256 is {found}, not {digest}): delete it, or pass {flag} FILE")
    print_0(f"{path}: sha256 {found}")
    return path


# ------------------------------------------------------------------------------------------------------------ DINOv2

def attention(q, k, v):
    """Softmax attention of (B, heads, N, D/heads). In bf16 the kernels keep the softmax in fp32. CPUs train in fp32:
    there PyTorch's bf16 backward is slower (6 times at 17 tokens, 1.1 times at 257, measured), its forward twice as
    fast."""
    if not (v.is_cpu and v.requires_grad):
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        # (B, heads, N, D/heads) each; by chunk, that their gradients are put together in one pass
        q, k, v = (y.view(B, N, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(first) * second), both halves from one matrix w12. DINOv2's giant model and LightningDiT use it."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads, swiglu):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        # DINOv2 rounds the hidden width of SwiGLU, 2/3 of the MLP's, up to a multiple of 8
        self.mlp = SwiGLU(dim, (int(4 * dim * 2 / 3) + 7) // 8 * 8) if swiglu else MLP(dim, 4 * dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, D), row-major


class DINOv2(nn.Module):
    """DINOv2 (Oquab et al. 2023), and with `registers` = 4 its register variants (Darcet et al. 2023).

    dim, depth: width and number of blocks; heads are 64 wide in every DINOv2. swiglu: the giant model's FFN.
    grid: side of the stored position embedding in patches (official: 37, that is 518 px)."""
    patch = 14

    def __init__(self, dim, depth, swiglu=False, registers=0, grid=37):
        super().__init__()
        if dim % 64:
            raise ValueError(f"width {dim} is not divisible by 64, the width of a head")
        self.dim, self.grid = dim, grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.registers = registers
        # Only masked pretraining reads it: it must never train, or DDP would wait for its gradient.
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.patch_embed = PatchEmbed(self.patch, 3, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // 64, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.initialise()

    def initialise(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in [self.cls_token] + ([self.register_tokens] if self.registers else []):
            nn.init.normal_(token, std=1e-6)

    def position_embedding(self, h, w):
        """(1, 1 + h*w, D) for h x w patches, in fp32. The official models resample by two different rules."""
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        cls, grid = self.pos_embed.float().split([1, self.grid ** 2], dim=1)
        grid = grid.transpose(1, 2).view(1, self.dim, self.grid, self.grid)
        if self.registers:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:  # the 0.1 guarded against rounding once; it shifts the samples, so the numbers depend on it
            scale = ((h + 0.1) / self.grid, (w + 0.1) / self.grid)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        assert grid.shape[-2:] == (h, w)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x):
        """x: (B, 3, H, W) with DINOv2's normalisation, sides divisible by 14.

        Returns cls (B, D) and patch tokens (B, H/14 * W/14, D), both after the final norm: official
        `x_norm_clstoken` and `x_norm_patchtokens`."""
        B, _, H, W = x.shape
        if H % self.patch or W % self.patch:
            raise UserError(f"DINOv2 takes sides divisible by {self.patch}, not {H}x{W}")
        x = self.patch_embed(x)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # (B, 1+N, D)
        x = x + self.position_embedding(H // self.patch, W // self.patch).to(x.dtype)
        if self.registers:  # they carry no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)  # (B, 1+4+N, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.registers:]

    def features(self, x, factor=16):
        """E_p: images (B, 3, H, W) in [-1, 1] -> patch tokens (B, H/16 * W/16, D). 14 px see what 16 px showed."""
        H, W = x.shape[-2:]
        if H % factor or W % factor:
            raise UserError(f"image sides must be divisible by {factor}, not {H}x{W}")
        x = ((x.float() + 1) / 2 - self.pixel_mean) / self.pixel_std
        size = (H // factor * self.patch, W // factor * self.patch)  # 256 -> 224
        return self(F.interpolate(x, size, mode="bicubic", antialias=True))[1]


def encoder_state(content):
    """The DINOv2 state dict in a file: official, a training checkpoint's teacher, or with chunked block keys."""
    if "teacher" in content:
        content = {k.removeprefix("backbone."): v for k, v in content["teacher"].items() if k.startswith("backbone.")}
    return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in content.items()}


def encoder_arguments(state):
    """The arguments of DINOv2 that fit a state dict: everything follows from the names and shapes of its tensors."""
    return {"dim": state["cls_token"].shape[-1],
            "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
            "swiglu": "blocks.0.mlp.w12.weight" in state,
            "registers": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
            "grid": math.isqrt(state["pos_embed"].shape[1] - 1)}


def load_encoder(spec):
    """A DINOv2 by official name (vits14 ... vitg14_reg4), by file, or random:NAME for random weights.

    Returns (DINOv2, its constructor's arguments)."""
    name = spec.removeprefix("random:").removeprefix("dinov2_")
    if name.endswith("_reg"):  # torch hub's name for the same model
        name += "4"
    arguments = ENCODERS.get(name.removesuffix("_reg4"))
    if arguments is not None:
        arguments = dict(arguments, registers=4 if name.endswith("_reg4") else 0)
    if spec.startswith("random:"):
        if arguments is None:
            raise UserError(f"--encoder {spec}: no such size, choose from {', '.join(ENCODERS)} (and _reg4)")
        print_0(f"encoder {name}: RANDOM weights, as asked for")
        return DINOv2(**arguments), arguments
    if arguments is not None and name != "tiny14":
        stem = f"dinov2_{name.removesuffix('_reg4')}"
        url = f"https://dl.fbaipublicfiles.com/dinov2/{stem}/dinov2_{name}_pretrain.pth"
        path = find_weights(url, DINOV2_SHA256.get(name, ""), "--encoder")
    elif Path(spec).is_file():
        path = Path(spec)
        print_0(f"encoder {path}: sha256 {sha256(path)}")
    else:
        raise UserError(f"--encoder {spec}: neither a file nor one of {', '.join(list(ENCODERS)[1:])} (and _reg4)")
    content = load_file(path, "encoder")
    try:
        state = encoder_state(content)
        found = encoder_arguments(state)
    except (KeyError, ValueError, IndexError, AttributeError):
        raise UserError(f"{path} is no DINOv2: cls_token, pos_embed or blocks.* missing") from None
    if found["dim"] % 64 or found["depth"] > 100:
        raise UserError(f"{path} is no DINOv2: width {found['dim']}, depth {found['depth']}")
    if arguments is not None and found != {"swiglu": False, "grid": 37} | arguments:
        raise UserError(f"{path} is not a {name}: found {found}")
    return build(DINOv2, found, state, path), found


# ----------------------------------------------------------------------------------------------------------- adapter

class Adapter(nn.Module):
    """A: the two-layer MLP that takes each patch token from the encoder's width D to the d latent channels."""

    def __init__(self, dim, d, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, tokens):  # (B, N, D) -> (B, N, d)
        return self.fc2(F.gelu(self.fc1(tokens)))


# --------------------------------------------------------------------------------- LDM convolutional encoder, decoder

class GroupNorm(nn.GroupNorm):
    """GroupNorm of 32 groups, but of no fewer than four channels each (ch = 128 has four): with one channel to a group
    it would be an instance norm, which takes the colour of the whole image away.

    In fp32 whatever the autocast, as CUDA's autocast has it. On CPUs that is also the faster way: the bf16 backward of
    channels_last takes 3 times as long (measured, 128 channels of 256 x 256)."""

    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention of one head over the pixels."""

    def __init__(self, c):
        super().__init__()
        self.norm = GroupNorm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, C, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, h*w, C)
        y = attention(q, k, v)[:, 0]
        return x + self.proj_out(y.transpose(1, 2).reshape(B, C, h, w))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as LDM


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each where asked, and a change of resolution."""

    def __init__(self, c_in, c_out, blocks, attention, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        if downsample:
            self.downsample = Downsample(c_out)
        if upsample:
            self.upsample = Upsample(c_out)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1 = ResnetBlock(c, c)
        self.attn_1 = AttnBlock(c)
        self.block_2 = ResnetBlock(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """The LDM / VA-VAE convolutional encoder, of the baselines: (B, 3, H, W) -> (B, 2d, h, w), mean and log-variance.

    Five levels give f=16; attention at the last one. It mirrors Decoder."""

    def __init__(self, d=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(([ch] + widths)[i], widths[i], num_res_blocks, attention=i == last, downsample=i != last)
            for i in range(len(widths)))
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * d, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # (B, ch, H, W)
        for part in (*self.down, self.mid):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2d, h, w)


class Decoder(nn.Module):
    """D: the LDM / VA-VAE convolutional decoder, (B, d, h, w) -> (B, 3, H, W), without a tanh at the end."""

    def __init__(self, d=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(d, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        # The official list is indexed by resolution, up.0 the highest, and is run from its end.
        self.up = nn.ModuleList(
            Level((widths + widths[-1:])[i + 1], widths[i], num_res_blocks + 1, attention=i == last, upsample=i != 0)
            for i in range(len(widths)))
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z.contiguous(memory_format=torch.channels_last))  # (B, 4*ch, h, w)
        for part in (self.mid, *reversed(self.up)):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


# --------------------------------------------------------------------------------------------------------- tokenizer

class LatentSpace(nn.Module):
    """What the generator needs of any tokenizer: the statistics of its latents, and its identity.

    The buffers latent_mean and latent_std (d,) are filled once, when a stage ends. Images are (B, 3, H, W) in [-1, 1]
    with sides divisible by 16; latents are (B, d, H/16, W/16)."""
    factor = 16

    def __init__(self, d):
        super().__init__()
        self.d = d
        self.register_buffer("latent_mean", torch.zeros(d))
        self.register_buffer("latent_std", torch.zeros(d))  # zero: not yet computed

    def normalize(self, z):
        """z0 -> latents of mean 0 and standard deviation 1 per channel, which the generator learns."""
        return (z - self._statistics(0)) / self._statistics(1)

    def unnormalize(self, z):
        """The inverse of normalize: what decode takes."""
        return z * self._statistics(1) + self._statistics(0)

    def _statistics(self, i):
        if not self.latent_std.any():
            raise UserError("the tokenizer has no latent statistics: it comes from a stage that did not finish")
        return (self.latent_mean, self.latent_std)[i].view(-1, 1, 1)

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> z0 (B, d, h, w), not normalised."""
        return self.adapt(self.features(x), x.shape[-2] // self.factor, x.shape[-1] // self.factor)

    def fingerprint(self):
        """A short hash of all that makes the latents: encoder, adapter, statistics. Stage 3 does not change it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class Tokenizer(LatentSpace):
    """AlignTok: z0 = A(E_p(x)), x^ = D(z0). No KL and no sampling (Section 3.1).

    encoder: arguments of DINOv2; decoder: arguments of Decoder but d; d: latent channels; hidden: the adapter's hidden
    width (default: the encoder's)."""

    def __init__(self, encoder, decoder, d=32, hidden=None):
        super().__init__(d)
        self.arguments = {"encoder": encoder, "decoder": decoder, "d": d, "hidden": hidden}  # what rebuilds the model
        self.encoder = DINOv2(**encoder)
        self.adapter = Adapter(self.encoder.dim, d, hidden or self.encoder.dim)
        self.decoder = Decoder(d=d, **decoder).to(memory_format=torch.channels_last)

    @staticmethod
    def load(path, content=None):
        """The tokenizer in a checkpoint of train_tokenizer.py, or an official VA-VAE's (without statistics: they are
        another file), on the CPU, in eval mode; needs nothing but the file.

        content: what load_file has read from it, if that has been done."""
        content = content or load_file(path, "tokenizer")
        if "opt_g" in content:
            raise UserError(f"{path} is a checkpoint to resume from, without EMA and statistics: take the stage's "
                            "final one")
        with reading(path, "tokenizer"):
            official = content.get("state_dict", content)
            if "encoder.conv_in.weight" in official:
                return VAE.from_official(official, path)
            if not {"tokenizer", "arguments"} <= content.keys():
                raise UserError(f"{path} is not a tokenizer's checkpoint (expected runs/tokenizer/stage3.pt or such)")
            kind = Tokenizer if "encoder" in content["arguments"] else VAE
            return build(kind, content["arguments"], content["tokenizer"], path).eval()

    def features(self, x):
        """E_p(x): patch tokens (B, N, D) before the adapter."""
        return self.encoder.features(x, self.factor)

    def adapt(self, tokens, h, w):
        """A: patch tokens (B, N, D) -> z0 (B, d, h, w)."""
        return self.adapter(tokens).transpose(1, 2).reshape(-1, self.d, h, w)

    def decode(self, z):
        """z0 (B, d, h, w), not normalised -> images (B, 3, H, W), [-1, 1] up to a little overshoot."""
        return self.decoder(z)

    def forward(self, x):
        """x -> (x^, z0, pre-adapter tokens): one call, so that DDP sees every trained part."""
        tokens = self.features(x)  # (B, N, D)
        z = self.adapt(tokens, x.shape[-2] // self.factor, x.shape[-1] // self.factor)  # (B, d, h, w)
        return self.decode(z), z, tokens

    def blocks(self):
        """The parts that --compile compiles."""
        return [*self.encoder.blocks, *self.decoder.up]


class VAE(LatentSpace):
    """The baselines: LDM's convolutional VAE, and VA-VAE (Yao, Yang & Wang 2025), which pulls its latents toward a
    foundation encoder while it trains. The keys are the official ones.

    decoder: arguments of Decoder and Encoder but d; vf_dim: the width D of VA-VAE's foundation encoder (None: a plain
    VAE). z is sampled in training; otherwise it is the mean."""
    not_of_the_model = ("loss.", "foundation_model.", "linear_proj.")  # prefixes in official VA-VAE checkpoints

    def __init__(self, decoder, d=32, vf_dim=None):
        super().__init__(d)
        self.arguments = {"decoder": decoder, "d": d, "vf_dim": vf_dim}  # what rebuilds the model
        self.encoder = Encoder(d=d, **decoder)
        self.quant_conv = nn.Conv2d(2 * d, 2 * d, 1)
        self.post_quant_conv = nn.Conv2d(d, d, 1)
        self.decoder = Decoder(d=d, **decoder)
        if vf_dim:
            self.linear_proj = nn.Conv2d(d, vf_dim, 1, bias=False)  # z -> z', which is compared with the foundation's
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_official(cls, state, path):
        """An official VA-VAE, in eval mode; its sizes follow from the names and shapes."""
        state = {k: v for k, v in state.items() if not k.startswith(cls.not_of_the_model)}
        first = sorted(k for k in state if re.fullmatch(r"encoder\.down\.\d\.block\.\d\.conv1\.weight", k))
        widths = [state[k].shape[0] for k in first if ".block.0." in k]
        ch = state["encoder.conv_in.weight"].shape[0]
        decoder = {"ch": ch, "ch_mult": [w // ch for w in widths], "num_res_blocks": len(first) // len(widths)}
        d = state["decoder.conv_in.weight"].shape[1]
        state |= {"latent_mean": torch.zeros(d), "latent_std": torch.zeros(d)}  # not yet known
        return build(cls, {"decoder": decoder, "d": d}, state, path).eval()

    def features(self, x):
        """Mean and log-variance of z, as tokens (B, N, 2d)."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise UserError(f"image sides must be divisible by {self.factor}, not {x.shape[-2]}x{x.shape[-1]}")
        return self.quant_conv(self.encoder(x)).flatten(2).transpose(1, 2)

    def adapt(self, tokens, h, w):
        """The mean of z: tokens (B, N, 2d) -> z0 (B, d, h, w)."""
        return tokens[..., :self.d].transpose(1, 2).reshape(-1, self.d, h, w)

    def decode(self, z):
        """z0 (B, d, h, w), not normalised -> images (B, 3, H, W), [-1, 1] up to a little overshoot."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, noise):
        """x and standard normal noise (B, d, h, w) -> (x^, z, mean | log-variance (B, 2d, h, w), z' (B, D, h, w), or
        None for a plain VAE)."""
        moments = self.quant_conv(self.encoder(x))  # (B, 2d, h, w)
        mean, logvar = moments.float().chunk(2, dim=1)
        z = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise  # (B, d, h, w)
        return self.decode(z), z, moments, self.linear_proj(z) if hasattr(self, "linear_proj") else None

    def blocks(self):
        """The parts that --compile compiles."""
        return [*self.encoder.down, *self.decoder.up]


# ------------------------------------------------------------------------------------------------------ LightningDiT

def sincos_embedding(h, w, dim, device=None):
    """The fixed position embedding (1, h*w, D): the first D/2 dims encode the column, the last D/2 the row, each half
    [sin, cos] of D/4 frequencies (base 10000). In fp64 up to the cast, as the official one."""
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))
    row = torch.arange(h, device=device).repeat_interleave(w)[:, None] * frequency  # (h*w, D/4)
    column = torch.arange(w, device=device).repeat(h)[:, None] * frequency
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)[None].float()


def rope_tables(h, w, head_dim, device=None):
    """cos and sin (h*w, head_dim) of the rotary embedding: the first half of a head turns with the row, the second with
    the column; each of the head_dim/4 frequencies (base 10000) serves a pair of neighbours."""
    half = head_dim // 2
    frequency = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64, device=device) / half)
    row = torch.arange(h, device=device).repeat_interleave(w)[:, None] * frequency  # (h*w, head_dim/4)
    column = torch.arange(w, device=device).repeat(h)[:, None] * frequency
    angles = torch.cat([row, column], dim=1).repeat_interleave(2, dim=1)  # (h*w, head_dim)
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Turn each pair of neighbours (a, b) of x (..., N, head_dim) by its angle: (a + ib)(cos + i sin), in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (..., N, head_dim/2)
    return torch.view_as_real(pairs * torch.complex(cos[:, ::2], sin[:, ::2])).flatten(-2)


def modulate(x, shift, scale):
    """adaLN: x (B, N, D) under the condition's shift and scale (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the quotient in fp32 whatever the autocast."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square() / y.shape[-1]  # one pass over y, not two
        return (y * (square + 1e-6).rsqrt()).to(x.dtype) * self.weight


class RotaryAttention(nn.Module):
    """Self-attention whose queries and keys carry their place in the grid; qk_norm keeps long trainings finite."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (RMSNorm(dim // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cos, sin):
        B, N, D = x.shape
        q, k, v = (y.view(B, N, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        q, k = (rotate(norm(y), cos, sin) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class DiTBlock(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the condition: adaLN-Zero (Peebles & Xie 2023)."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = RotaryAttention(dim, heads, qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 / 3 * (4 * dim)))  # 2/3: as many parameters as an MLP of 4D
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, cos, sin):  # x (B, N, D), c (B, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), cos, sin)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, N, out)


class TimeEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D): 128 cosines, then 128 sines, of t itself (DiT takes t times 1000), and an MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t.float()[:, None] * frequency  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LightningDiT(nn.Module):
    """v(z_t, t): the transformer of LightningDiT (Yao, Yang & Wang 2025), which the paper trains on its latents.

    grid: sides (h, w) of the latents it is built for, others work too; d: their channels; num_classes: K, 0 for an
    unconditional model; patch: side of a token in latent positions. The class K means "no class": it takes part in
    training where labels are dropped, and is the other end of guidance."""

    def __init__(self, dim, depth, heads, d=32, num_classes=1000, grid=(16, 16), patch=1, qk_norm=False):
        super().__init__()
        self.arguments = {"dim": dim, "depth": depth, "heads": heads, "d": d, "num_classes": num_classes,
                          "grid": list(grid), "patch": patch, "qk_norm": qk_norm}  # what rebuilds the model
        if dim % (4 * heads):
            raise ValueError(f"width {dim} is not divisible by 4 times its {heads} heads, as RoPE needs it")
        self.dim, self.heads, self.d, self.num_classes, self.patch = dim, heads, d, num_classes, patch
        h, w = grid
        self.grid = (h // patch, w // patch)  # in tokens
        self.x_embedder = PatchEmbed(patch, d, dim)
        self.t_embedder = TimeEmbedder(dim)
        if num_classes:
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})
        # Fixed, yet a parameter and buffers: the official files hold them.
        self.pos_embed = nn.Parameter(sincos_embedding(*self.grid, dim), requires_grad=False)
        self.feat_rope = nn.Module()
        for name, table in zip(("freqs_cos", "freqs_sin"), rope_tables(*self.grid, dim // heads)):
            self.feat_rope.register_buffer(name, table)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch * patch * d)
        self.initialise()

    def initialise(self):
        # Xavier keeps the variance through the linear maps; the patch convolution is one, once it is flattened
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        # the condition starts small beside the tokens, whatever the number of classes
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        if self.num_classes:
            nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        # adaLN-Zero: every gate is shut, so that every block is the identity; and the first output is 0
        for m in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1],
                  self.final_layer.linear):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def positions(self, h, w):
        """The position embedding (1, h*w, D) and RoPE's cos and sin (h*w, D/heads) for h x w tokens."""
        if (h, w) == self.grid:
            return self.pos_embed, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin
        device = self.pos_embed.device
        return sincos_embedding(h, w, self.dim, device), *rope_tables(h, w, self.dim // self.heads, device)

    def forward(self, z_t, t, y=None):
        """Normalised noisy latents z_t (B, d, H, W), t (B,) in the paper's time (0 data, 1 noise), classes y (B,) in
        [0, K] (K: none; an unconditional model takes no y) -> the paper's velocity v = z1 - z0 (B, d, H, W).

        An official checkpoint has learned the other direction: v(z_t, t, y) = -official(z_t, 1 - t, y)."""
        B, d, H, W = z_t.shape
        if d != self.d or H % self.patch or W % self.patch:
            raise UserError(f"this LightningDiT takes latents of {self.d} channels with sides divisible by "
                            f"{self.patch}, not {d}x{H}x{W}")
        h, w = H // self.patch, W // self.patch
        pos_embed, cos, sin = self.positions(h, w)
        x = self.x_embedder(z_t).contiguous() + pos_embed  # (B, N, D); the layout lasts through all blocks
        c = self.t_embedder(t)  # (B, D)
        if self.num_classes:
            c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c, cos, sin)
        x = self.final_layer(x, c)  # (B, N, p*p*d)
        return x.view(B, h, w, self.patch, self.patch, d).permute(0, 5, 1, 3, 2, 4).reshape(B, d, H, W)


def dit_arguments(state):
    """The arguments of LightningDiT that fit a state dict, an official one too: they follow from names and shapes.

    Only the grid does not (N tokens are h*w of some h and w): a square one is assumed."""
    dim, d, patch, _ = state["x_embedder.proj.weight"].shape
    tokens, head_dim = state["feat_rope.freqs_cos"].shape
    table = state.get("y_embedder.embedding_table.weight")
    return {"dim": dim, "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
            "heads": dim // head_dim, "d": d, "num_classes": 0 if table is None else len(table) - 1,
            "grid": [math.isqrt(tokens) * patch] * 2, "patch": patch,
            "qk_norm": "blocks.0.attn.q_norm.weight" in state}


def checkpoint_activations(model):
    """Has each block of any of the networks above keep its input only, and recompute the rest in the backward pass
    (torch.utils.checkpoint): less memory, the same gradients, slower."""
    for block in model.modules():
        if isinstance(block, (Block, ResnetBlock, DiTBlock)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# ------------------------------------------------------------------------------------------------- named sizes

# name: arguments of DINOv2 (the register variants, name_reg4, add registers=4)
ENCODERS = {
    "tiny14": {"dim": 192, "depth": 4, "grid": 4},  # of the preset tiny; no official weights
    "vits14": {"dim": 384, "depth": 12},  # 22,056,576 parameters
    "vitb14": {"dim": 768, "depth": 12},  # 86,580,480
    "vitl14": {"dim": 1024, "depth": 24},  # 304,368,640
    "vitg14": {"dim": 1536, "depth": 40, "swiglu": True},  # 1,136,480,768
}
DINOV2_SHA256 = {
    "vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}

# name: arguments of Decoder and Encoder but d
DECODERS = {
    "tiny": {"ch": 32, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 1},
    "vavae": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2},  # decoder 41,417,603, encoder 28,413,248
}

# name: arguments of LightningDiT; parameters with 32 channels, 16x16 latents, 1000 classes, the fixed embedding counted
DITS = {
    "tiny": {"dim": 192, "depth": 6, "heads": 3},  # for 4x4 latents on a CPU
    "B/1": {"dim": 768, "depth": 12, "heads": 12},  # 130,556,192
    "L/1": {"dim": 1024, "depth": 24, "heads": 16},  # 458,152,960
    "XL/1": {"dim": 1152, "depth": 28, "heads": 16},  # 675,256,736
    "1p0B/1": {"dim": 1536, "depth": 24, "heads": 24},  # 1,029,401,120
    "1p6B/1": {"dim": 1792, "depth": 28, "heads": 28},  # 1,631,767,120
}
