"""The networks of AlignTok (Chen et al., ICLR 2026, arXiv 2509.25162), Section 3 and Figure 2.

The encoders, the LDM modules and LightningDiT keep the official state-dict keys: released files
load strictly and unmodified.

Departures: AlignTok's decoder lacks VA-VAE's 1x1 `post_quant_conv` (a linear map in front of
a 3x3 convolution); DINOv2 has no stochastic depth, because only the toy's stand-in trains it from
scratch.

Legend: B batch, H W image sides, h w = H/16 W/16 latent sides, N = h*w tokens, D width of a
transformer, d latent channels, C channels of a convolution, K classes.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# ---- DINOv2

def attention(q, k, v):
    """Softmax attention of (B, heads, N, D/heads); the kernels keep the softmax in fp32.

    On a CPU that trains it runs in fp32: PyTorch's bf16 backward is slower there (6 times at 17
    tokens, 1.1 times at 257, measured), although its forward is twice as fast."""
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
        # chunk, not unbind of a permuted tensor: its backward writes the three gradients once
        q, k, v = (y.view(B, N, self.heads, -1).transpose(1, 2)  # (B, heads, N, D/heads)
                   for y in self.qkv(x).chunk(3, dim=2))
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(first) * second), both halves from one matrix w12. DINOv2's giant model and
    LightningDiT use it in place of the MLP."""

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
    def __init__(self, dim, heads, swiglu, layer_scale=True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        if swiglu:  # 2/3 of the MLP's hidden width, rounded up to a multiple of 8
            self.mlp = SwiGLU(dim, (int(4 * dim * 2 / 3) + 7) // 8 * 8)
        else:
            self.mlp = MLP(dim, 4 * dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, D), row by row


def resampled(positions, h, w, rule):
    """The position embedding (1, g*g, D) of a grid of g x g patches -> (1, h*w, D), bicubic, in
    fp32. rule: the one that the encoder's own code has; they differ by 7 to 9 % at 224 px.

    "scale": by the scale (h + 0.1) / g. The 0.1 guards against a rounding error, and shifts the
    sampling points. "size": to h x w. "antialias": to h x w with antialias."""
    g = math.isqrt(positions.shape[1])
    grid = positions.float().transpose(1, 2).unflatten(2, (g, g))  # (1, D, g, g)
    if rule == "scale":
        scale = ((h + 0.1) / g, (w + 0.1) / g)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    else:
        grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=rule == "antialias")
    assert grid.shape[-2:] == (h, w)
    return grid.flatten(2).transpose(1, 2)


class Foundation(nn.Module):
    """What the foundation encoders share. Each has embed, blocks and norm.

    dim: D; patch: side of a patch in px; grid: side of the stored position embedding, in patches;
    pixels: mean and standard deviation of its images in [0, 1]."""
    prefix = 1  # tokens before those of the patches

    def __init__(self, dim, patch, grid, pixels):
        super().__init__()
        self.dim, self.patch, self.grid = dim, patch, grid
        for name, value in zip(("pixel_mean", "pixel_std"), pixels):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def in_patches(self, x):
        """Sides of images (B, 3, H, W) in patches. ValueError where they do not divide."""
        H, W = x.shape[-2:]
        if H % self.patch or W % self.patch:
            raise ValueError(
                f"{type(self).__name__} takes sides divisible by {self.patch}, not {H}x{W}")
        return H // self.patch, W // self.patch

    def forward(self, x):
        """x: (B, 3, H, W), normalised, sides divisible by the patch.

        Returns cls (B, D) and patch tokens (B, N, D), both after the final norm: DINOv2's official
        `x_norm_clstoken` and `x_norm_patchtokens`. Raises ValueError for other sides."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, self.prefix:]

    def prepared(self, x, factor=16):
        """Images (B, 3, H, W) in [-1, 1] -> what forward takes, normalised and resized.

        DINOv2's patches are 14 px wide and a latent position covers 16 px: the image is resized
        by 14/16 (256 -> 224), so that there is one token per latent position. With patches of
        16 px it stays as it is."""
        H, W = x.shape[-2:]
        if H % factor or W % factor:
            raise ValueError(f"image sides must be divisible by {factor}, not {H}x{W}")
        x = ((x.float() + 1) / 2 - self.pixel_mean) / self.pixel_std
        if self.patch == factor:
            return x
        size = (H // factor * self.patch, W // factor * self.patch)
        return F.interpolate(x, size, mode="bicubic", antialias=True)  # (B, 3, 14*h, 14*w)

    def features(self, x, factor=16):
        """E_p: images (B, 3, H, W) in [-1, 1] -> patch tokens (B, H/16 * W/16, D)."""
        return self(self.prepared(x, factor))[1]


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class DINOv2(Foundation):
    """DINOv2 (Oquab et al. 2023); with registers = 4 its register variants (Darcet et al. 2023).

    dim, depth: width and number of blocks; a head is 64 wide in every DINOv2. swiglu: the giant
    model's MLP. grid: side of the stored position embedding, in patches (official: 37 = 518 px)."""
    patch = 14

    def __init__(self, dim, depth, swiglu=False, registers=0, grid=37):
        super().__init__(dim, self.patch, grid, IMAGENET)
        if dim % 64:
            raise ValueError(f"width {dim} is not divisible by 64, the width of a head")
        self.registers, self.prefix = registers, 1 + registers
        # of resampled: the two families of released models were trained with different ones
        self.rule = "antialias" if registers else "scale"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        # Only masked pretraining reads it. It must not train: DDP would wait for its gradient.
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.patch_embed = PatchEmbed(self.patch, 3, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // 64, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.initialise()

    def initialise(self):
        # as the official code; trained weights replace it
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)

    def never_trains(self):
        """What no stage trains."""
        return [self.mask_token]

    def position_embedding(self, h, w):
        """(1, 1 + h*w, D) for h x w patches: the stored grid, resampled."""
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1].float(), self.pos_embed[:, 1:]
        return torch.cat([cls, resampled(grid, h, w, self.rule)], dim=1)

    def embed(self, x):
        """Images, as forward takes them -> cls, registers and patch tokens (B, 1+R+N, D), with
        position, before the first block."""
        B, (h, w) = len(x), self.in_patches(x)
        x = self.patch_embed(x)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # (B, 1+N, D)
        x = x + self.position_embedding(h, w)
        if self.registers:  # they carry no position
            registers = self.register_tokens.expand(B, -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # (B, 1+4+N, D)
        return x


# ---- adapter

class Adapter(nn.Module):
    """A: a two-layer MLP takes each patch token from the encoder's width D to d channels."""

    def __init__(self, dim, d, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, tokens):  # (B, N, D) -> (B, N, d)
        return self.fc2(F.gelu(self.fc1(tokens)))


# ---- the convolutional decoder of LDM, VA-VAE

class GroupNorm(nn.GroupNorm):
    """GroupNorm of 32 groups, or fewer where a group would have less than four channels: with one
    channel a group it would be an instance norm, which removes the colour of the whole image.

    It runs in fp32 whatever the autocast, as on CUDA. On a CPU that is also faster: the bf16
    backward of channels_last takes 3 times as long (measured, 128 channels of 256 x 256)."""

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
    """Self-attention with one head over all positions."""

    def __init__(self, c):
        super().__init__()
        self.norm = GroupNorm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, C, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None]  # (B, 1, h*w, C)
                   for f in (self.q, self.k, self.v))
        y = attention(q, k, v)[:, 0]  # (B, h*w, C)
        return x + self.proj_out(y.transpose(1, 2).reshape(B, C, h, w))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # LDM pads on the right and at the bottom only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each if asked for, then a resampling."""

    def __init__(self, c_in, c_out, blocks, attention, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
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


class Decoder(nn.Module):
    """D: (B, d, h, w) -> (B, 3, H, W), with no tanh at the end.

    ch: channels at full resolution; ch_mult: their multiples, from full resolution to that of the
    latents, five levels for H/h = 16; attention at the lowest one."""

    def __init__(self, d=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(d, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        # up.0 is the highest resolution, as in the official files; forward runs from the last one
        self.up = nn.ModuleList(
            Level((widths + widths[-1:])[i + 1], widths[i], num_res_blocks + 1,
                  attention=i == last, upsample=i != 0)
            for i in range(len(widths)))
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def body(self, z):
        x = self.conv_in(z.contiguous(memory_format=torch.channels_last))  # (B, 4*ch, h, w)
        for part in (self.mid, *reversed(self.up)):
            x = part(x)
        return F.silu(self.norm_out(x))  # (B, ch, H, W)

    def forward(self, z):
        return self.conv_out(self.body(z))  # (B, 3, H, W)


# ---- tokenizer

class LatentSpace(nn.Module):
    """What the generator needs of any tokenizer: the statistics of its latents, as the buffers
    latent_mean and latent_std (d,), filled once when a stage ends.

    Images are (B, 3, H, W) in [-1, 1] with sides divisible by 16, latents (B, d, H/16, W/16)."""
    factor = 16
    multiple = 1  # sides of the latents must be divisible by it

    def __init__(self, d):
        super().__init__()
        self.d = d
        self.register_buffer("latent_mean", torch.zeros(d))
        self.register_buffer("latent_std", torch.zeros(d))  # zero: not computed yet
        self.has_statistics = False  # until they were seen: a look at them waits for the device

    def normalize(self, z):
        """z0 -> latents of mean 0 and standard deviation 1 per channel: what the generator
        learns. Raises ValueError where there are no statistics yet."""
        mean, std = self.statistics()
        return (z - mean) / std

    def unnormalize(self, z):
        """The inverse of normalize: what decode takes."""
        mean, std = self.statistics()
        return z * std + mean

    def statistics(self):
        self.has_statistics = self.has_statistics or bool(self.latent_std.any())
        if not self.has_statistics:
            raise ValueError("the tokenizer has no latent statistics yet")
        return self.latent_mean.view(-1, 1, 1), self.latent_std.view(-1, 1, 1)

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> z0 (B, d, h, w), not normalised."""
        return self.adapt(self.features(x), x.shape[-2] // self.factor, x.shape[-1] // self.factor)


class Tokenizer(LatentSpace):
    """AlignTok: z0 = A(E_p(x)), x^ = D(z0). No KL and no sampling (Section 3.1).

    encoder: arguments of make_encoder; decoder: arguments of Decoder but d; d: latent channels;
    hidden: the adapter's hidden width (default: the encoder's)."""

    def __init__(self, encoder, decoder, d=32, hidden=None):
        super().__init__(d)
        # a checkpoint keeps them, to rebuild the model
        self.arguments = {"encoder": encoder, "decoder": decoder, "d": d, "hidden": hidden}
        self.encoder = make_encoder(**encoder)
        self.adapter = Adapter(self.encoder.dim, d, hidden or self.encoder.dim)
        self.decoder = Decoder(d=d, **decoder).to(memory_format=torch.channels_last)

    def features(self, x):
        """E_p(x): patch tokens (B, N, D), before the adapter."""
        return self.encoder.features(x, self.factor)

    def adapt(self, tokens, h, w):
        """A: patch tokens (B, N, D) -> z0 (B, d, h, w)."""
        return self.adapter(tokens).transpose(1, 2).reshape(-1, self.d, h, w)

    def decode(self, z):
        """D: z0 (B, d, h, w), not normalised -> images (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(z)

    def forward(self, x):
        """x -> (x^, z0, tokens before the adapter), in one call, so that DDP sees every part."""
        tokens = self.features(x)  # (B, N, D)
        h, w = x.shape[-2] // self.factor, x.shape[-1] // self.factor
        z = self.adapt(tokens, h, w)  # (B, d, h, w)
        return self.decode(z), z, tokens

    def compiled(self):
        """What --compile compiles: parts and their methods. Not the decoder's last convolution,
        whose gradient alone the adaptive weight of L_GAN asks for."""
        return [(block, "forward") for block in self.encoder.blocks] + [(self.decoder, "body")]


@torch.no_grad()  # else every parameter of the EMA would carry the graph of all its updates
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, for the parameters that train; the frozen ones are
    equal already, because the EMA begins as an exact copy."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)


# ---- LightningDiT

def sincos_embedding(h, w, dim, device=None):
    """The fixed position embedding (1, h*w, D): the first D/2 dimensions encode the column, the
    last D/2 the row, each half [sin, cos] of D/4 frequencies (base 10000). In fp64, as the
    official one."""
    exponent = torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4)
    frequency = 10000.0 ** -exponent  # (D/4,)
    row = torch.arange(h, device=device).repeat_interleave(w)[:, None] * frequency  # (h*w, D/4)
    column = torch.arange(w, device=device).repeat(h)[:, None] * frequency
    parts = [column.sin(), column.cos(), row.sin(), row.cos()]
    return torch.cat(parts, dim=1)[None].float()


def rope_tables(h, w, head_dim, device=None):
    """cos and sin (h*w, head_dim) of the rotary embedding: the first half of a head turns with the
    row, the second with the column. There are head_dim/4 frequencies (base 10000), each for a pair
    of neighbouring dimensions."""
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float64, device=device) / half
    frequency = 10000.0 ** -exponent  # (head_dim/4,)
    row = torch.arange(h, device=device).repeat_interleave(w)[:, None] * frequency
    column = torch.arange(w, device=device).repeat(h)[:, None] * frequency
    angles = torch.cat([row, column], dim=1).repeat_interleave(2, dim=1)  # (h*w, head_dim)
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Turns each pair of neighbours (a, b) of x (..., N, head_dim) by its angle, in fp32:
    a + ib becomes (a + ib)(cos + i sin)."""
    if torch.compiler.is_compiling():  # the compiler leaves complex numbers unfused
        (a, b), cos, sin = x.float().unflatten(-1, (-1, 2)).unbind(-1), cos[:, ::2], sin[:, ::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (..., N, head_dim/2)
    turned = pairs * torch.complex(cos[:, ::2], sin[:, ::2])
    return torch.view_as_real(turned).flatten(-2)


def modulate(x, shift, scale):
    """adaLN: x (B, N, D) under the condition's shift and scale (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the quotient is fp32 whatever the autocast."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        # a norm reads y once; y.square().mean() would write the squares first
        square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square() / y.shape[-1]
        return (y * (square + 1e-6).rsqrt()).to(x.dtype) * self.weight


class RotaryAttention(nn.Module):
    """Self-attention whose queries and keys are turned by their place in the grid. qk_norm
    normalises them first, which keeps long trainings finite."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (
            RMSNorm(dim // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cos, sin):
        B, N, D = x.shape
        q, k, v = (y.view(B, N, self.heads, -1).transpose(1, 2)  # (B, heads, N, D/heads)
                   for y in self.qkv(x).chunk(3, dim=2))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class DiTBlock(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the condition: adaLN-Zero (Peebles
    and Xie 2023)."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = RotaryAttention(dim, heads, qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 / 3 * (4 * dim)))  # as many parameters as an MLP of 4D
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, cos, sin):  # x (B, N, D), c (B, D)
        (shift_msa, scale_msa, gate_msa,
         shift_mlp, scale_mlp, gate_mlp) = self.adaLN_modulation(c).chunk(6, dim=1)  # (B, D) each
        y = self.attn(modulate(self.norm1(x), shift_msa, scale_msa), cos, sin)
        x = x + gate_msa[:, None] * y
        y = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x + gate_mlp[:, None] * y


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def modulated(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return modulate(self.norm_final(x), shift, scale)

    def forward(self, x, c):
        return self.linear(self.modulated(x, c))  # (B, N, out)


class TimeEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D): 128 cosines and 128 sines, then an MLP. LightningDiT takes t
    itself, where DiT takes 1000 t."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        steps = torch.arange(128, device=t.device)
        frequency = torch.exp(-math.log(10000) * steps / 128)
        angles = t.float()[:, None] * frequency  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LightningDiT(nn.Module):
    """v(z_t, t, y): the transformer of LightningDiT (Yao, Yang and Wang 2025), the generator that
    the paper trains on its latents.

    grid: sides (h, w) of the latents that it is built for, others work too; d: their channels;
    patch: side of a token in latent positions; num_classes: K, or 0 for an unconditional model.
    Class K means "no class": training puts it where a label is dropped, guidance starts from it."""

    def __init__(self, dim, depth, heads, d=32, num_classes=1000, grid=(16, 16), patch=1,
                 qk_norm=False):
        super().__init__()
        self.arguments = {"dim": dim, "depth": depth, "heads": heads, "d": d,
                          "num_classes": num_classes, "grid": list(grid), "patch": patch,
                          "qk_norm": qk_norm}
        if dim % (4 * heads):
            raise ValueError(f"RoPE needs a width divisible by 4 x {heads} heads, not {dim}")
        self.dim, self.heads, self.d, self.num_classes = dim, heads, d, num_classes
        h, w = grid
        self.patch, self.grid = patch, (h // patch, w // patch)  # grid: in tokens
        self.x_embedder = PatchEmbed(patch, d, dim)
        self.t_embedder = TimeEmbedder(dim)
        if num_classes:
            table = nn.Embedding(num_classes + 1, dim)
            self.y_embedder = nn.ModuleDict({"embedding_table": table})
        # Fixed; a parameter and buffers, because the official files hold them.
        self.pos_embed = nn.Parameter(sincos_embedding(*self.grid, dim), requires_grad=False)
        self.feat_rope = nn.Module()
        cos, sin = rope_tables(*self.grid, dim // heads)
        self.feat_rope.register_buffer("freqs_cos", cos)
        self.feat_rope.register_buffer("freqs_sin", sin)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch * patch * d)
        self.initialise()

    def initialise(self):
        # Xavier keeps the variance through linear maps; the patch convolution is one, flattened
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        # the condition starts small beside the tokens, whatever the number of classes
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)
        if self.num_classes:
            nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        # adaLN-Zero: all gates are shut, so every block is the identity; and the output is 0
        modulations = [m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer)]
        for m in (*modulations, self.final_layer.linear):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def positions(self, h, w):
        """Position embedding (1, h*w, D), RoPE's cos and sin (h*w, D/heads), for h x w tokens."""
        if (h, w) == self.grid:
            return self.pos_embed, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin
        device = self.pos_embed.device
        cos, sin = rope_tables(h, w, self.dim // self.heads, device)
        return sincos_embedding(h, w, self.dim, device), cos, sin

    def compiled(self):
        """What --compile compiles: parts and their methods."""
        return [(block, "forward") for block in self.blocks]

    def embed(self, z_t, t, y):
        """What forward takes -> tokens (B, N, D), condition (B, D), RoPE's cos and sin."""
        _, d, H, W = z_t.shape
        if d != self.d or H % self.patch or W % self.patch:
            raise ValueError(f"this LightningDiT takes latents of {self.d} channels with sides "
                             f"divisible by {self.patch}, not {d}x{H}x{W}")
        h, w = H // self.patch, W // self.patch
        pos_embed, cos, sin = self.positions(h, w)
        x = self.x_embedder(z_t).contiguous() + pos_embed  # (B, N, D)
        c = self.t_embedder(t)  # (B, D)
        if self.num_classes:
            c = c + self.y_embedder["embedding_table"](y)
        return x, c, cos, sin

    def unpatch(self, x, H, W):
        """(B, N, p*p*d) -> (B, d, H, W)."""
        p = self.patch
        x = x.view(-1, H // p, W // p, p, p, self.d)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.d, H, W)

    def forward(self, z_t, t, y=None):
        """The paper's velocity v = z1 - z0 (B, d, H, W) at the noisy, normalised latents z_t
        (B, d, H, W) and the times t (B,), 0 data, 1 noise.

        y: classes (B,) in [0, K], K: none; an unconditional model takes no y. An official
        checkpoint has learned the other direction: v(z_t, t, y) = -official(z_t, 1 - t, y).
        Raises ValueError for latents of another shape."""
        x, c, cos, sin = self.embed(z_t, t, y)
        for block in self.blocks:
            x = block(x, c, cos, sin)
        x = self.final_layer(x, c)  # (B, N, p*p*d)
        return self.unpatch(x, *z_t.shape[-2:])


# ---- the other encoders: DINO v1 and MAE, SigLIP2

class ViT(Foundation):
    """A plain ViT, without LayerScale: DINO v1 (Caron et al. 2021), MAE's encoder (He et al. 2022).

    heads: None for the released models', 64 wide but in MAE's largest. fixed: MAE's position
    embedding, sines and cosines that never train; DINO's is learned."""

    def __init__(self, dim=384, depth=12, heads=None, patch=16, grid=14, fixed=False):
        super().__init__(dim, patch, grid, IMAGENET)
        heads = heads or {1280: 16}.get(dim, max(1, dim // 64))
        self.fixed = fixed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim), not fixed)
        self.patch_embed = PatchEmbed(patch, 3, dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads, swiglu=False, layer_scale=False) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.initialise()

    def initialise(self):
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.fixed:  # the cls token's is zero
            self.pos_embed.data[:, 1:] = sincos_embedding(self.grid, self.grid, self.dim)
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def never_trains(self):
        return [self.pos_embed] if self.fixed else []

    def position_embedding(self, h, w):
        """(1, 1 + h*w, D) for h x w patches: the stored grid, resampled as the official code
        does."""
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1].float(), self.pos_embed[:, 1:]
        return torch.cat([cls, resampled(grid, h, w, "size" if self.fixed else "scale")], dim=1)

    def embed(self, x):
        """Images, as forward takes them -> cls and patch tokens (B, 1+N, D), with position."""
        positions = self.position_embedding(*self.in_patches(x))
        x = self.patch_embed(x)  # (B, N, D)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + positions


class TanhMLP(MLP):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SeparateAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = (f(x).view(B, N, self.heads, -1).transpose(1, 2)  # (B, heads, N, D/heads)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class SigLIPBlock(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attn = SeparateAttention(dim, heads)
        self.layer_norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TanhMLP(dim, hidden)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class PoolingHead(nn.Module):
    """One learned query over all tokens. No tokenizer uses it, but the checkpoints hold it."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TanhMLP(dim, hidden)

    def forward(self, tokens):  # (B, N, D) -> (B, D)
        probe = self.probe.expand(len(tokens), -1, -1)
        x = self.attention(probe, tokens, tokens, need_weights=False)[0]
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class SigLIP(Foundation):
    """The vision tower of SigLIP2 (Tschannen et al. 2025), of the files of a fixed size. No cls
    token: every token is a patch, and in its place forward returns the pooling head's vector.

    hidden: the MLP's width (None: 4D). heads: None for the released models', 64 wide each but in
    the two largest."""
    prefix = 0

    def __init__(self, dim, depth, heads=None, hidden=None, patch=16, grid=32):
        super().__init__(dim, patch, grid, ([0.5] * 3, [0.5] * 3))
        heads = heads or {1152: 16, 1536: 16}.get(dim, max(1, dim // 64))
        hidden = hidden or 4 * dim
        self.vision_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "patch_embedding": nn.Conv2d(3, dim, patch, patch),
                "position_embedding": nn.Embedding(grid * grid, dim)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(
                SigLIPBlock(dim, heads, hidden) for _ in range(depth))}),
            "post_layernorm": nn.LayerNorm(dim, eps=1e-6),
            "head": PoolingHead(dim, heads, hidden)})

    def never_trains(self):
        return list(self.vision_model["head"].parameters())  # no patch token depends on it

    def position_embedding(self, h, w):
        """(h*w, D): the stored grid, resampled by size."""
        stored = self.vision_model["embeddings"]["position_embedding"].weight
        if (h, w) == (self.grid, self.grid):
            return stored
        return resampled(stored[None], h, w, "size")[0]

    def embed(self, x):
        """Images, as forward takes them -> patch tokens (B, N, D), with position."""
        positions = self.position_embedding(*self.in_patches(x))
        x = self.vision_model["embeddings"]["patch_embedding"](x).flatten(2).transpose(1, 2)
        return x + positions  # in fp32 under autocast too, as all that is added to it

    @property
    def blocks(self):
        return self.vision_model["encoder"]["layers"]

    def norm(self, x):
        return self.vision_model["post_layernorm"](x)

    def pool(self, tokens):
        """Tokens after the last norm (B, N, D) -> the image's vector (B, D)."""
        return self.vision_model["head"](tokens)

    def forward(self, x):
        _, tokens = super().forward(x)
        return self.pool(tokens), tokens

    def features(self, x, factor=16):
        return super().forward(self.prepared(x, factor))[1]  # without the pooling


def siglip_arguments(state):
    """SigLIP's arguments, from a state dict's names and shapes. ValueError where it is no SigLIP2's
    vision tower."""
    try:
        dim, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
        positions = len(state["vision_model.embeddings.position_embedding.weight"])
        hidden = len(state["vision_model.encoder.layers.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as e:
        raise ValueError(f"no SigLIP2 vision tower of a fixed size: {e}") from None
    depth = sum(k.endswith(".layer_norm1.weight") for k in state)
    return {"dim": dim, "depth": depth, "hidden": hidden, "patch": patch,
            "grid": math.isqrt(positions)}


# ---- LoRA, an ablation of stage 2

class LoRA(nn.Linear):
    """y = W x + b + B A x, with W and b frozen (Hu et al. 2022; alpha is the rank). B is zero at
    the start."""

    def __init__(self, linear, rank):
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias, limit = linear.weight, linear.bias, linear.in_features ** -0.5
        # drawn on the CPU, as all weights are: the same on every device
        A = torch.empty(rank, self.in_features).uniform_(-limit, limit)
        self.A = nn.Parameter(A.to(self.weight.device))
        self.B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.A), self.B)

    def merged(self):
        linear = nn.Linear(self.in_features, self.out_features)
        linear.weight, linear.bias = self.weight, self.bias
        linear.weight.data += self.B.data @ self.A.data
        return linear


def add_lora(encoder, rank):
    """From here on a low-rank update of each linear map in the blocks is all of it that trains."""
    encoder.requires_grad_(False)
    for part in list(encoder.blocks.modules()):
        for name, m in part.named_children():
            if isinstance(m, nn.Linear):
                setattr(part, name, LoRA(m, rank))


def merge_lora(encoder):
    """Adds the updates, if there are any, to the weights: W + B A."""
    for part in list(encoder.blocks.modules()):
        for name, m in part.named_children():
            if isinstance(m, LoRA):
                setattr(part, name, m.merged())


# ---- named sizes

# The families of encoders. How they differ from DINOv2:
#           LayerScale  cls token   pixels    positions, resampled             patch, px
#   dinov2  yes         yes, or +4  ImageNet  learned, by scale or antialias   14
#   dino    no          yes         ImageNet  learned, by scale                16
#   mae     no          yes         ImageNet  fixed sin-cos, by size           16, or 14
#   siglip  no          no          .5, .5    learned, by size                 16
FAMILIES = {"dinov2": DINOv2, "dino": ViT, "mae": lambda **sizes: ViT(**sizes, fixed=True),
            "siglip": SigLIP}


def make_encoder(family="dinov2", **arguments):
    """The encoder of one of ENCODERS' rows, or of a file's arguments."""
    return FAMILIES[family](**arguments)


def encoder_arguments(state):
    """Arguments of make_encoder, from a state dict's official names and shapes. ValueError or
    KeyError where it is none of the encoders."""
    if "cls_token" not in state:
        return {"family": "siglip"} | siglip_arguments(state)
    found = {"dim": state["cls_token"].shape[-1],
             "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
             "grid": math.isqrt(state["pos_embed"].shape[1] - 1)}
    if "blocks.0.ls1.gamma" in state:
        return found | {
            "swiglu": "blocks.0.mlp.w12.weight" in state,
            "registers": state["register_tokens"].shape[1] if "register_tokens" in state else 0}
    family = "mae" if has_fixed_positions(state["pos_embed"]) else "dino"
    return {"family": family, "patch": state["patch_embed.proj.weight"].shape[-1]} | found


def has_fixed_positions(pos_embed):
    """Whether a position embedding (1, 1 + g*g, D) is MAE's: its encoder has the names of DINO
    v1's, but positions that no training has changed."""
    _, N, D = pos_embed.shape
    g = math.isqrt(N - 1)
    fixed = sincos_embedding(g, g, D)
    return g * g == N - 1 and torch.allclose(pos_embed[:, 1:].float(), fixed, atol=0.01)


# Arguments of make_encoder; name_reg4, DINOv2's register variants, add registers=4.
ENCODERS = {
    "tiny14": {"dim": 192, "depth": 4, "grid": 4},  # of the preset tiny; no official weights
    "vits14": {"dim": 384, "depth": 12},  # 22,056,576 parameters
    "vitb14": {"dim": 768, "depth": 12},  # 86,580,480
    "vitl14": {"dim": 1024, "depth": 24},  # 304,368,640
    "vitg14": {"dim": 1536, "depth": 40, "swiglu": True},  # 1,136,480,768
    "dino-s16": {"family": "dino", "dim": 384, "depth": 12, "patch": 16, "grid": 14},  # 21,665,664
    "dino-b16": {"family": "dino", "dim": 768, "depth": 12, "patch": 16, "grid": 14},  # 85,798,656
    "mae-b16": {"family": "mae", "dim": 768, "depth": 12, "patch": 16, "grid": 14},  # 85,798,656
    "mae-l16": {"family": "mae", "dim": 1024, "depth": 24, "patch": 16, "grid": 14},  # 303,301,632
    "mae-h14": {"family": "mae", "dim": 1280, "depth": 32, "patch": 14, "grid": 16},  # 630,764,800
    "siglip2-l16-512": {  # 316,742,656
        "family": "siglip", "dim": 1024, "depth": 24, "patch": 16, "grid": 32},
}

# Arguments of Decoder, and of the baselines' Encoder, but d.
DECODERS = {
    "tiny": {"ch": 16, "ch_mult": [1, 1, 2, 4, 8], "num_res_blocks": 1},
    "small": {"ch": 32, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 1},  # of the miniature
    # decoder 41,417,603 parameters, encoder 28,413,248
    "vavae": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2},
}

# Arguments of LightningDiT. Parameters at 32 channels, 16x16, 1000 classes, pos_embed counted.
DITS = {
    "tiny": {"dim": 192, "depth": 6, "heads": 3},  # for 4x4 latents on a CPU
    "B/1": {"dim": 768, "depth": 12, "heads": 12},  # 130,556,192
    "L/1": {"dim": 1024, "depth": 24, "heads": 16},  # 458,152,960
    "XL/1": {"dim": 1152, "depth": 28, "heads": 16},  # 675,256,736
    "1p0B/1": {"dim": 1536, "depth": 24, "heads": 24},  # 1,029,401,120
    "1p6B/1": {"dim": 1792, "depth": 28, "heads": 28},  # 1,631,767,120
}
