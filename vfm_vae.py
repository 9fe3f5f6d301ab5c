"""VFM-VAE ("Vision Foundation Models Can Be Good Tokenizers for Latent Diffusion Models", arXiv
2510.18457, CVPR 2026). AlignTok's question, the other answer: the foundation encoder stays frozen,
and the decoder learns to paint from its features.

    x -> frozen encoder, three layers -> projection -> z -> expansion -> style, four injections
      -> six blocks of modulated ConvNeXt layers -> an RGB image at every resolution, the last is x^

Official keys: the released checkpoints load strictly and unmodified. Written from a description of
the method, not from its code.

Departures. One forward serves both sides of the GAN, and G learns from D before D's step; the
released code draws the equivariance transform and runs the tokenizer twice, D first. Scales that
would leave latent sides not divisible by 4 are left out. Latents, their statistics and validation
are of the mean (theirs: samples). Images are train_tokenizer.py's: [-1, 1], crops as long as the
short side, bicubic (theirs: [0, 1], half to all of it, LANCZOS); so are the dtypes (theirs: bf16 in
the encoder, fp16 in three blocks). A stage starts from the EMA of the one before. A loss that is
not finite stops the run (theirs: is patched up or skipped). mapping.x_avg never moves: only
truncation would read it. The last stage trains blocks 3 to 5, the decoder's second half: the
released code names modules that do not exist, and trains nothing.

Legend: B batch, H W image sides, h w = H/16 W/16 latent sides, u*h u*w sides of the encoder's grid
of tokens, N their number, D the encoder's width, d latent channels, E channels of the expansion,
C channels of a block, S width of the style.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from losses import hinge_d, hinge_g, kl_divergence, ssim, vf_loss
from model import DINOv2, LatentSpace, ViT, attention, encoder_arguments, make_encoder

# ---- the foundation encoder, frozen

class FoundationEncoder(nn.Module):
    """The frozen encoder, read at several layers: multi-layer features.

    tower: an encoder of model.py. layers: 0 is the patches with their position, n the output of
    block n, counted from 1, -1 that of the last one after the final norm. scale: of the image
    before it. positions: the rule by which DINOv2's are resampled."""

    def __init__(self, tower, layers, scale, positions="size"):
        super().__init__()
        self.encoder = nn.ModuleDict({"vision_model": tower})
        self.layers, self.scale = layers, scale
        # of all resizing around it, but for the prior branch: that is bilinear
        self.mode = "bicubic" if isinstance(tower, DINOv2) else "bilinear"
        if self.mode == "bicubic" and not tower.registers:
            tower.rule = positions  # "size": as in transformers
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x):
        """(B, 3, H, W) in [0, 1], not [-1, 1] -> the layers' tokens, (B, N, D) each, in fp32."""
        tower = self.encoder["vision_model"]
        x = resize(x, self.scale, self.mode, antialias=False)  # (B, 3, scale*H, scale*W)
        x = tower.embed((x - tower.pixel_mean) / tower.pixel_std)  # (B, prefix + N, D)
        parts = [*tower.blocks, tower.norm]
        wanted = [n % (len(parts) + 1) for n in self.layers]  # -1: the norm
        outputs = {0: x}
        for n, part in enumerate(parts, 1):
            x = part(x)
            if n in wanted:  # of 24 layers of 1024 tokens few fit into memory
                outputs[n] = x
        return [outputs[n][:, tower.prefix:].float() for n in wanted]


def resize(x, scale, mode, antialias):
    """(B, C, H, W) -> (B, C, scale*H, scale*W)."""
    if scale == 1:
        return x
    size = [round(side * scale) for side in x.shape[-2:]]
    return F.interpolate(x, size, mode=mode, antialias=antialias)


# ---- projection and expansion

class ProjectionAttention(nn.Module):
    """Attention inside a change of width. A head has min(c_in, c_out) channels; going down the
    heads are averaged, going up they are concatenated."""

    def __init__(self, c_in, c_out):
        super().__init__()
        wide, narrow = max(c_in, c_out), min(c_in, c_out)
        if wide % narrow:
            raise ValueError(f"a projection's widths must divide: {c_in} -> {c_out}")
        self.heads, self.average = wide // narrow, c_in > c_out
        self.qkv = nn.Linear(c_in, 3 * wide, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(wide))
        self.v_bias = nn.Parameter(torch.zeros(wide))
        self.register_buffer("zero_k_bias", torch.zeros(wide))
        self.proj = nn.Linear(c_out, c_out)

    def forward(self, x):  # (B, N, c_in) -> (B, N, c_out)
        B, N, _ = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = (y.view(B, N, self.heads, -1).transpose(1, 2)  # (B, heads, N, narrow)
                   for y in F.linear(x, self.qkv.weight, bias).chunk(3, dim=2))
        y = attention(q, k, v)
        y = y.mean(1) if self.average else y.transpose(1, 2).flatten(2)  # (B, N, c_out)
        return self.proj(y)


class GeGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c, eps=1e-6)
        self.w0, self.w1, self.w2 = (
            nn.Linear(c, 2 * c), nn.Linear(c, 2 * c), nn.Linear(2 * c, c))

    def forward(self, x):
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class ProjectionBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = nn.LayerNorm(c_in)
        self.attn = ProjectionAttention(c_in, c_out)
        self.norm3 = nn.LayerNorm(c_in)
        self.proj = nn.Linear(c_in, c_out)
        self.norm2 = nn.LayerNorm(c_out)
        self.mlp = GeGLU(c_out)

    def forward(self, x):  # (B, N, c_in) -> (B, N, c_out)
        x = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Projection(nn.Module):
    """UniTok's attention-projection block over all tokens (B, N, c_in) -> (B, N, c_out)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.blocks = nn.ModuleList([ProjectionBlock(c_in, c_out)])

    def forward(self, x):
        return self.blocks[0](x)


def to_map(tokens, h, w):
    """(B, h*w, C), row by row -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (h, w))


def to_tokens(x):
    return x.flatten(2).transpose(1, 2)


def sample(moments, noise):
    """Mean | log-variance (B, 2d, h, w), standard normal noise -> z = mean + std * noise."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise


class LDMAdapter(nn.Module):
    """All between encoder and z, and between z and decoder.

    dim: D; layers: how many; width: each layer's channels after its projection (None: the encoder's
    side is absent); unshuffle: u; d, expansion: d, E; linear_proj: z -> z', for the VF loss."""

    def __init__(self, dim, layers, width, unshuffle, d, expansion, linear_proj):
        super().__init__()
        self.unshuffle = unshuffle
        if width:
            self.patch_quants = nn.ModuleList(
                nn.Sequential(Projection(dim, width)) for _ in range(layers))
            self.final_quant = Projection(layers * width * unshuffle ** 2, 2 * d)
        self.post_quant = Projection(d, expansion)
        if linear_proj:
            self.linear_proj = nn.Conv2d(d, dim, 1, bias=False)
        self.initialise()

    def initialise(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_normal_(m.weight, gain=0.5)

    def moments(self, features, h, w):
        """The layers' tokens, (B, N, D) each -> mean | log-variance of z (B, 2d, h, w)."""
        u, maps = self.unshuffle, []
        for quant, tokens in zip(self.patch_quants, features, strict=True):
            y = to_map(quant(tokens), u * h, u * w)  # (B, 64, u*h, u*w)
            maps.append(F.pixel_unshuffle(y, u))  # (B, 64*u*u, h, w)
        y = to_tokens(torch.cat(maps, dim=1))  # (B, h*w, layers*64*u*u)
        return to_map(self.final_quant(y), h, w)

    def expand(self, z):
        """What enters the decoder: z (B, d, h, w) -> t (B, E, h, w)."""
        return to_map(self.post_quant(to_tokens(z)), *z.shape[-2:])


# ---- the style

class FullyConnected(nn.Module):
    """StyleGAN's linear layer with an equalised learning rate: the stored weight is N(0, 1) / lr
    at the start, and scaled where it is used."""

    def __init__(self, c_in, c_out, lr=1.0, bias=0.0):
        super().__init__()
        self.lr = lr
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / lr)
        self.bias = nn.Parameter(torch.full((c_out,), bias))

    def forward(self, x):
        gain = self.lr / math.sqrt(self.weight.shape[1])
        return F.linear(x, self.weight * gain, self.bias * self.lr)


class Mapping(nn.Module):
    """The style w (B, S): what is global in the latent. The same w goes to every layer."""

    def __init__(self, expansion, style):
        super().__init__()
        self.mlp = nn.ModuleDict({"fc0": FullyConnected(expansion, style, lr=0.01),
                                  "fc1": FullyConnected(style, style, lr=0.01)})
        self.register_buffer("x_avg", torch.zeros(style))

    def forward(self, t):
        g = t.mean((2, 3))  # (B, E)
        g = g * (g.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        return self.mlp["fc1"](F.leaky_relu(self.mlp["fc0"](g), 0.2))


class Affine(nn.Module):
    """w -> a style per channel, s = a*b + c. All biases are 1, so it starts near 2."""

    def __init__(self, style, c):
        super().__init__()
        self.proj = FullyConnected(style, 3 * c, bias=1.0)

    def forward(self, w):
        a, b, c = self.proj(w).chunk(3, dim=1)  # (B, C) each
        return a * b + c


# ---- the decoder

class GroupNorm(nn.GroupNorm):
    """32 groups, or fewer where one would have less than `least` channels; in fp32 whatever the
    autocast."""

    def __init__(self, c, least=4):
        super().__init__(min(32, c // least), c)

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class ModulatedConv(nn.Module):
    """A 1x1 convolution whose weights the style scales: W'[b,o,i] = W[o,i] s[b,i], divided by the
    norm of each output channel, sqrt(sum_i W'^2 + 1e-8)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(c_out, c_in, 1, 1), std=0.02))
        self.bias = nn.Parameter(torch.zeros(1, c_out, 1, 1))

    def forward(self, x, s, demodulate=True):  # x (B, C, H, W), s (B, C)
        W = self.weight.flatten(1) * s[:, None]  # (B, c_out, C): modulation
        if demodulate:
            W = W * (W.square().sum(2, keepdim=True) + 1e-8).rsqrt()
        y = torch.baddbmm(self.bias.flatten(2), W, x.flatten(2))  # (B, c_out, H*W)
        return y.unflatten(2, x.shape[2:])


class ToRGB(ModulatedConv):
    def __init__(self, c, style):
        super().__init__(c, 3)
        nn.init.normal_(self.weight, std=0.1)
        self.affine = Affine(style, c)

    def forward(self, x, w):
        return super().forward(x, self.affine(w) / math.sqrt(x.shape[1]), demodulate=False)


class ConvNeXtLayer(nn.Module):
    """A modulated ConvNeXt layer. noise: side of the fixed noise of released checkpoints: not
    drawn, but stored, and the output depends on it. 0: none."""

    def __init__(self, c, style, kernel, noise):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1, c, 1, 1), 1e-5))
        if noise:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            self.register_buffer("noise_const", torch.randn(noise, noise))
        self.affine_pw1 = Affine(style, c)
        self.dwconv = nn.Conv2d(c, c, kernel, padding=kernel // 2, groups=c)
        self.norm = GroupNorm(c)
        self.pwconv1 = ModulatedConv(c, 4 * c)
        self.pwconv2 = nn.Conv2d(4 * c, c, 1)
        for conv in (self.dwconv, self.pwconv2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)

    def forward(self, x, w):
        y = self.dwconv(x)
        if hasattr(self, "noise_const"):
            noise = F.interpolate(self.noise_const[None, None], y.shape[-2:], mode="bilinear")
            y = y + self.noise_strength * noise
        y = self.pwconv1(self.norm(y), self.affine_pw1(w))  # (B, 4C, H, W)
        return x + self.gamma * self.pwconv2(F.gelu(y))


class UpsampleConv(nn.Module):
    """Twice the sides: a separable convolution, PixelShuffle, a fixed blur. norm_last: the norm
    stands behind the shuffle."""

    def __init__(self, c_in, c_out, blur, norm_last=False):
        super().__init__()
        self.norm_last = norm_last
        self.norm = GroupNorm(c_out if norm_last else c_in)
        self.depthwise = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
        self.pointwise = nn.Conv2d(c_in, 4 * c_out, 1, bias=False)
        row = torch.tensor([1.0, 2, 1] if blur == 3 else [1.0, 4, 6, 4, 1])
        kernel = torch.outer(row, row) / row.sum() ** 2
        self.register_buffer("blur_weight", kernel.expand(c_out, 1, -1, -1).clone())

    def forward(self, x):
        x = x if self.norm_last else self.norm(x)
        x = self.pointwise(self.depthwise(x))  # (B, 4C, H, W)
        x = F.pixel_shuffle(x, 2)  # (B, C, 2H, 2W)
        x = self.norm(x) if self.norm_last else x
        C, _, k, _ = self.blur_weight.shape
        return F.conv2d(F.pad(x, [k // 2] * 4, mode="replicate"), self.blur_weight, groups=C)


class ChannelRMSNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x):
        return F.normalize(x.float(), dim=1).to(x.dtype) * math.sqrt(x.shape[1]) * self.gamma


class NullAttention(nn.Module):
    """Attention over all positions and one learned key and value: a position may attend to
    nothing."""

    def __init__(self, c, heads=8):
        super().__init__()
        self.heads = heads
        self.null_kv = nn.Parameter(0.02 * torch.randn(2, heads, c // heads))
        self.norm = ChannelRMSNorm(c)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Conv2d(c, c, 1, bias=False) for _ in range(4))
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x):
        B, C, H, W = x.shape
        y = self.norm(x)
        q, k, v = (f(y).view(B, self.heads, -1, H * W).transpose(2, 3)  # (B, heads, H*W, C/heads)
                   for f in (self.to_q, self.to_k, self.to_v))
        null_k, null_v = self.null_kv[:, None, :, None].expand(-1, B, -1, -1, -1).to(k.dtype)
        k, v = torch.cat([null_k, k], dim=2), torch.cat([null_v, v], dim=2)  # 1+H*W
        return self.to_out(attention(q, k, v).transpose(2, 3).reshape(B, C, H, W))


class AttentionLayer(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.attn = NullAttention(c, heads)
        self.ff = nn.Sequential(
            ChannelRMSNorm(c), nn.Conv2d(c, 4 * c, 1), nn.GELU(), nn.Conv2d(4 * c, c, 1))
        nn.init.zeros_(self.ff[3].weight)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ff(x)


class SynthesisBlock(nn.Module):
    """One resolution of the decoder: twice the sides of the one before.

    c_prev, c_z, c: channels of the block before (0: the first), the injection, this block."""

    def __init__(self, c_prev, c_z, c, style, layers, kernel, attentions, noise, blur, heads):
        super().__init__()
        # the misspelt name is the official key; block 0 alone normalises last
        self.seperate_upsample_conv = UpsampleConv(c_prev + c_z, c, blur, norm_last=not c_prev)
        self.conv0 = ConvNeXtLayer(c, style, kernel, noise)
        self.convs1 = nn.ModuleList(
            ConvNeXtLayer(c, style, kernel, noise) for _ in range(layers - 1))
        self.self_attns = nn.ModuleList(AttentionLayer(c, heads) for _ in range(attentions))
        self.torgb = ToRGB(c, style)
        if c_prev:
            self.last_upsample_conv = UpsampleConv(c_prev, c, blur)

    def forward(self, x, x_sum, w):
        """x: the block before and the injection (B, c_prev + c_z, H, W); x_sum: the features
        accumulated so far, or None -> x and x_sum (B, C, 2H, 2W), RGB (B, 3, 2H, 2W)."""
        x = self.seperate_upsample_conv(x)  # (B, C, 2H, 2W)
        for layer in (self.conv0, *self.convs1):
            x = layer(x, w)
        for layer in self.self_attns:
            x = layer(x)
        # features are accumulated, not RGB: each level's image is complete
        x_sum = x if x_sum is None else self.last_upsample_conv(x_sum) + x
        return x, x_sum, self.torgb(x_sum, w)


def injection(i, expansion, m):
    """t (B, E, h, w) -> what block i takes in beside the block before: (B, m, h', w'), where h' is
    h/4, h/2, h, 2h for i = 0 to 3."""
    def mix(c_in, c_out):
        return nn.Sequential(
            nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False),
            nn.Conv2d(c_in, c_out, 1, bias=False), GroupNorm(c_out, least=1), nn.LeakyReLU(0.2))

    out = nn.Sequential(nn.Conv2d(m, m, 1, bias=False), GroupNorm(m, least=1))
    if i < 2:
        u = (4, 2)[i]
        return nn.Sequential(nn.PixelUnshuffle(u), mix(expansion * u * u, m), out)
    if i == 2:
        return nn.Sequential(mix(expansion, m), out)
    return nn.Sequential(mix(expansion, 4 * m), nn.PixelShuffle(2), out)


class Synthesis(nn.Module):
    """t and w -> images at six resolutions. All tuples run from block 0, at h/2, to block 5, at 16h.

    channels, layers, kernels, attentions: of the blocks; injections: channels of the first four;
    noise: side of block 0's fixed noise, 8 in released checkpoints, 0 for none; heads: of all
    attentions; blurs: widths of the fixed blurs."""

    def __init__(self, expansion, style, channels, injections, layers, kernels, attentions, noise,
                 heads=8, blurs=(3, 3, 3, 5, 5, 5)):
        super().__init__()
        self.z_convs = nn.ModuleList(
            injection(i, expansion, m) for i, m in enumerate(injections))
        before, injected = [0, *channels], [*injections, 0, 0]
        self.blocks = nn.ModuleList(
            SynthesisBlock(before[i], injected[i], channels[i], style, layers[i], kernels[i],
                           attentions[i], noise << i, blurs[i], heads)
            for i in range(len(channels)))

    def forward(self, t, w):
        """t (B, E, h, w), w (B, S) -> the image (B, 3, 16h, 16w), and the five lower ones, from
        large to small."""
        x, x_sum, images = None, None, []
        for i, block in enumerate(self.blocks):
            parts = [x] if i else []
            if i < len(self.z_convs):
                parts.append(self.z_convs[i](t))
            x, x_sum, rgb = block(torch.cat(parts, dim=1), x_sum, w)
            images.append(rgb)
        *lower, image = images
        return image, lower[::-1]


# ---- equivariance: the latent branch resizes and turns z, the prior branch shrinks the image

class Transform(NamedTuple):
    """scale of both sides, and clockwise quarter turns. prior: the image is shrunk before the
    encoder; else the latent is resized and turned before the decoder."""
    scale: float = 1.0
    turns: int = 0
    prior: bool = False


def draw_transform(h, w):
    """One Transform for a process's whole micro-batch with latent sides h, w: the latent branch half
    of the time; else the prior branch, which changes a quarter of its batches and turns nothing.
    It draws from torch's generator, whose state a checkpoint keeps."""
    branch, pick, other = torch.rand(3).tolist()
    scales = [s for s in (0.25, 0.5, 0.75, 1.0) if not (h * s % 4 or w * s % 4)]
    smaller = scales[:-1]
    if branch < 0.5:
        return Transform(scales[int(pick * len(scales))], int(4 * other), prior=False)
    if smaller and other < 0.25:
        return Transform(smaller[int(pick * len(smaller))], 0, prior=True)
    return Transform()


def transformed(x, transform, mode):
    """What the decoder should paint of x (B, 3, H, W), in either branch."""
    x = resize(x, transform.scale, mode, antialias=True)
    return torch.rot90(x, transform.turns, (-1, -2))


# ---- the tokenizer

class VFMVAE(LatentSpace):
    """Images (B, 3, H, W) in [-1, 1] -> z (B, d, H/16, W/16) -> images. Latent sides must be
    divisible by 4.

    foundation: {family: arguments} of an encoder, or None for decoding only; dim: D; layers, scale,
    positions: see FoundationEncoder; width, expansion, linear_proj: see LDMAdapter; style: S;
    synthesis: arguments of Synthesis."""
    multiple = 4

    def __init__(self, foundation, synthesis, d=32, dim=1024, layers=(0, 12, -1), scale=2,
                 positions="size", width=64, expansion=512, style=512, linear_proj=True):
        super().__init__(d)
        self.arguments = {  # a checkpoint keeps them, to rebuild the model
            "foundation": foundation, "synthesis": synthesis, "d": d, "dim": dim,
            "layers": list(layers), "scale": scale, "positions": positions, "width": width,
            "expansion": expansion, "style": style, "linear_proj": linear_proj}
        patch = 16
        if foundation:
            (kind, arguments), = foundation.items()
            tower = make_encoder(kind, **arguments)
            patch = tower.patch
            self.vfm_encoder = FoundationEncoder(tower, layers, scale, positions)
        unshuffle = round(scale * self.factor / patch)  # u
        if not unshuffle or unshuffle * patch != scale * self.factor:
            raise ValueError(f"scale {scale:g} does not fit patches of {patch} px: with "
                             f"{patch / 16:g} or {patch / 8:g} tokens fill the latent grid")
        self.ldm_adapter = LDMAdapter(
            dim, len(layers), width, unshuffle, d, expansion, linear_proj)
        self.mapping = Mapping(expansion, style)
        self.synthesis = Synthesis(expansion, style, **synthesis)

    @staticmethod
    def in_checkpoint(content, **changed):
        """(arguments, state dict) of a VFM-VAE in a checkpoint's content, ours or an official one,
        or None. changed: see arguments_of."""
        if "foundation" in content.get("arguments", {}):
            # older ones lack the rule that they have learned with, AlignTok's
            return {"positions": "scale"} | content["arguments"] | changed, content["tokenizer"]
        state = content.get("G_ema", content)
        if "mapping.x_avg" not in state:
            return None
        # the latent statistics of official files are a file of their own: zero here
        zeros = torch.zeros(state["ldm_adapter.post_quant.blocks.0.norm1.weight"].shape)
        state = {"latent_mean": zeros, "latent_std": zeros.clone()} | state
        return arguments_of(state, **changed), state

    def features(self, x):
        """The layers' tokens as one tensor, like every tokenizer's features: (B, N, layers*D)."""
        H, W = x.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"image sides must be divisible by {self.factor}, not {H}x{W}")
        if not hasattr(self, "vfm_encoder"):
            raise ValueError("this VFM-VAE was loaded without its encoder: it can only decode")
        return torch.cat(self.vfm_encoder((x.float() + 1) / 2), dim=2)

    def moments(self, tokens, h, w):
        """Tokens (B, N, layers*D) -> mean | log-variance of z (B, 2d, h, w)."""
        features = tokens.chunk(len(self.arguments["layers"]), dim=2)
        return self.ldm_adapter.moments(features, h, w)

    def adapt(self, tokens, h, w):  # z (B, d, h, w): the mean
        return self.moments(tokens, h, w)[:, :self.d]

    def encode(self, x, noise=None):
        """Images (B, 3, H, W) in [-1, 1] -> z (B, d, h, w), not normalised: the mean, or with
        standard normal noise (B, d, h, w) a sample."""
        h, w = (side // self.factor for side in x.shape[-2:])
        moments = self.moments(self.features(x), h, w)
        return moments[:, :self.d] if noise is None else sample(moments, noise)

    def paint(self, z):
        """z (B, d, h, w) -> the image (B, 3, H, W), and the five lower ones, from large to small.
        ValueError unless h and w are divisible by 4."""
        h, w = z.shape[-2:]
        if h % self.multiple or w % self.multiple:
            raise ValueError(f"latent sides must be divisible by 4, not {h}x{w}: image sides by 64")
        t = self.ldm_adapter.expand(z)  # (B, E, h, w)
        return self.synthesis(t, self.mapping(t))

    def decode(self, z):
        """z (B, d, h, w), not normalised -> images (B, 3, H, W), about in [-1, 1]."""
        return self.paint(z)[0]

    def forward(self, x, noise, scale=1.0, turns=0, prior=False):
        """One call, so that DDP sees every part. noise: (B, d, h, w), standard normal. scale,
        turns, prior: a Transform. Returns x^ and the lower images, as paint does; the moments; z';
        and F, the encoder's last tokens on the latent grid (B, h*w, D)."""
        if prior:
            x = resize(x, scale, "bilinear", antialias=True)
        h, w = (side // self.factor for side in x.shape[-2:])
        tokens = self.features(x)
        moments = self.moments(tokens, h, w)  # (B, 2d, h, w)
        z = sample(moments, noise[..., :h, :w])
        z_proj = self.ldm_adapter.linear_proj(z) if self.arguments["linear_proj"] else None
        u, dim = self.ldm_adapter.unshuffle, self.arguments["dim"]
        last = F.avg_pool2d(to_map(tokens[..., -dim:], u * h, u * w), u)  # (B, D, h, w)
        if not prior:  # the latent branch, which may change nothing
            z = torch.rot90(resize(z, scale, "bilinear", antialias=False), turns, (-1, -2))
        return *self.paint(z), moments, z_proj, to_tokens(last)

    def compiled(self):
        """What --compile compiles: parts and their methods."""
        return [(block, "forward") for block in self.synthesis.blocks]


def arguments_of(state, encoder_heads=None, **changed):
    """VFMVAE's arguments, from a state dict's names and shapes; `changed` goes before them. They do
    not tell which layers are read (three: the first, the middle, the last; otherwise ValueError),
    nor the heads of an encoder that are not 64 wide."""
    def numbers(prefix):
        """How many modules stand in the list `prefix`."""
        return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})

    shapes, adapter = {k: list(v.shape) for k, v in state.items()}, "ldm_adapter."
    tower = "vfm_encoder.encoder.vision_model."
    inner = {k.removeprefix(tower): v for k, v in state.items() if k.startswith(tower)}
    foundation, patch, depth = None, 16, 24
    if inner:
        arguments = encoder_arguments(inner) | ({"heads": encoder_heads} if encoder_heads else {})
        patch, depth = arguments.get("patch", DINOv2.patch), arguments["depth"]
        foundation = {arguments.pop("family", "dinov2"): arguments}
    blocks = [f"synthesis.blocks.{i}." for i in range(numbers("synthesis.blocks."))]
    noise = shapes.get("synthesis.blocks.0.conv0.noise_const", [0])[0]
    # k: where in each z_conv its last 1x1 map stands
    injections = [shapes[f"synthesis.z_convs.{i}.{k}.0.weight"][0] for i, k in enumerate("2212")]
    synthesis = {
        "heads": next((v[1] for k, v in shapes.items() if k.endswith("null_kv")), 8),
        "blurs": [shapes[b + "seperate_upsample_conv.blur_weight"][-1] for b in blocks],
        "channels": [shapes[b + "conv0.gamma"][1] for b in blocks], "injections": injections,
        "layers": [1 + numbers(b + "convs1.") for b in blocks],
        "kernels": [shapes[b + "conv0.dwconv.weight"][-1] for b in blocks],
        "attentions": [numbers(b + "self_attns.") for b in blocks], "noise": noise}
    expansion, d = shapes[adapter + "post_quant.blocks.0.proj.weight"]
    found = {"foundation": foundation, "synthesis": synthesis, "d": d, "expansion": expansion,
             "style": len(state["mapping.x_avg"]), "width": None,
             "linear_proj": adapter + "linear_proj.weight" in state}
    if found["linear_proj"]:
        found["dim"] = shapes[adapter + "linear_proj.weight"][0]
    if number := numbers(adapter + "patch_quants."):
        layers = changed.get("layers", [0, depth // 2, -1])
        if len(layers) != number:
            raise ValueError(f"{number} layers are read: say which, load(..., layers=)")
        width, dim = shapes[adapter + "patch_quants.0.0.blocks.0.proj.weight"]
        into = shapes[adapter + "final_quant.blocks.0.proj.weight"][1]
        found |= {"width": width, "dim": dim, "layers": layers,
                  "scale": math.isqrt(into // (number * width)) * patch / 16}
    return found | changed


def load(source, **changed):
    """A state dict, an official checkpoint's content, or a path -> VFMVAE on the CPU, in eval mode,
    built from names and shapes. changed: what those of an official one do not tell, see
    arguments_of. Without the encoder's tensors it can only decode. ValueError where it is no VFM-VAE."""
    if not isinstance(source, dict):
        source = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    try:
        found = VFMVAE.in_checkpoint(source, **changed)
    except KeyError as e:
        raise ValueError(f"no VFM-VAE of this layout: {e} is missing") from None
    if not found:
        raise ValueError("no VFM-VAE: mapping.x_avg is missing")
    tokenizer = VFMVAE(**found[0])
    tokenizer.load_state_dict(found[1])
    return tokenizer.eval()


# ---- the discriminator: StyleGAN-T's

def brightness(x, r):  # each r: (B, 1, 1, 1), uniform in [0, 1)
    return x + (r - 0.5)


def saturation(x, r):
    grey = x.mean(1, keepdim=True)
    return (x - grey) * (2 * r) + grey


def contrast(x, r):
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (r + 0.5) + mean


def translation(x, dy, dx):
    """Each image moves up by dy and left by dx whole pixels (B,); zeros come in."""
    B, _, H, W = x.shape
    rows = torch.arange(H, device=x.device) + dy.view(B, 1)  # (B, H): where each row comes from
    columns = torch.arange(W, device=x.device) + dx.view(B, 1)
    inside = (((rows >= 0) & (rows < H))[:, None, :, None]
              & ((columns >= 0) & (columns < W))[:, None, None, :])  # (B, 1, H, W)
    rows, columns = rows.clamp(0, H - 1), columns.clamp(0, W - 1)
    image = torch.arange(B, device=x.device).view(B, 1, 1)
    moved = x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return moved.permute(0, 3, 1, 2) * inside


def cutout(x, y0, x0):
    """A rectangle around row y0 and column x0 (B,) of each image, a fifth of the sides, becomes
    zero: mid grey."""
    (B, _, H, W), keep = x.shape, []
    for size, centre in ((H, y0), (W, x0)):
        length = int(0.2 * size + 0.5)
        offset = torch.arange(size, device=x.device) - (centre.view(B, 1) - length // 2)
        keep.append((offset < 0) | (offset >= length))  # (B, size)
    return x * (keep[0][:, :, None] | keep[1][:, None, :])[:, None]


def diffaug(x):
    """DiffAug (Zhao et al. 2020): colour, translation, cutout, drawn for each image of (B, 3, H, W)
    in [-1, 1]. Gradients flow through it."""
    B, _, H, W = x.shape
    for change in (brightness, saturation, contrast):
        x = change(x, torch.rand(B, 1, 1, 1).to(x.device))
    shifts = [int(0.125 * size + 0.5) for size in (H, W)]
    x = translation(x, *(torch.randint(-n, n + 1, (B,)).to(x.device) for n in shifts))
    # of an even rectangle the centre may lie on the far edge
    ends = [size + 1 - int(0.2 * size + 0.5) % 2 for size in (H, W)]
    return cutout(x, *(torch.randint(0, n, (B,)).to(x.device) for n in ends))


class SNConv1d(nn.Module):
    """A convolution over the tokens, circular, whose weight is divided by its largest singular
    value: torch's old spectral norm, one power iteration each forward in training."""

    def __init__(self, c_in, c_out, k):
        super().__init__()
        conv = nn.Conv1d(c_in, c_out, k)
        self.bias, self.weight_orig = conv.bias, conv.weight
        self.register_buffer("weight_u", F.normalize(torch.randn(c_out), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(c_in * k), dim=0, eps=1e-12))

    def weight(self):
        W = self.weight_orig.flatten(1)  # (c_out, c_in*k)
        if self.training:
            with torch.no_grad():
                self.weight_v.copy_(F.normalize(W.T @ self.weight_u, dim=0, eps=1e-12))
                self.weight_u.copy_(F.normalize(W @ self.weight_v, dim=0, eps=1e-12))
        # copies: a later forward changes the buffers before the backward pass
        u, v = self.weight_u.clone(), self.weight_v.clone()
        return self.weight_orig / torch.dot(u, W @ v)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight()
        reach = weight.shape[2] // 2
        return F.conv1d(F.pad(x, (reach, reach), mode="circular"), weight, self.bias)


def local_groups(B):
    """How many groups of at most 8 images a batch of B makes. ValueError where they differ."""
    groups = math.ceil(B / 8)
    if B % groups:
        raise ValueError(f"a batch of {B} does not split into {groups} equal groups of at most 8 "
                         "images, which the discriminator's local batch norm takes")
    return groups


class BatchNormLocal(nn.Module):
    """BatchNorm over groups of at most 8 images, without running statistics: D sees the statistics
    of about 8, whatever the batch. In evaluation too. (B, C, ...); ValueError: see local_groups."""

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))
        self.bias = nn.Parameter(torch.zeros(c))

    def forward(self, x):
        B, C = x.shape[:2]
        groups = local_groups(B)
        y = x.float().reshape(groups, B // groups, C, -1)
        var, mean = torch.var_mean(y, dim=(1, 3), keepdim=True, correction=0)
        y = (y - mean) * (var + 1e-5).rsqrt() * self.weight.view(-1, 1) + self.bias.view(-1, 1)
        return y.view(x.shape).to(x.dtype)


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return (x + self.fn(x)) / math.sqrt(2)


class Head(nn.Module):
    """Tokens (B, C, N) -> logits (B, N)."""

    def __init__(self, c):
        super().__init__()
        def layer(k):
            return nn.Sequential(SNConv1d(c, c, k), BatchNormLocal(c), nn.LeakyReLU(0.2))
        self.main = nn.Sequential(layer(1), Residual(layer(9)))
        self.cls = SNConv1d(c, 1, 1)

    def forward(self, x):
        return self.cls(self.main(x)).flatten(1)


class ProjectedDiscriminator(nn.Module):
    """StyleGAN-T's (Sauer et al. 2023): heads on the features of a frozen DINO v1.

    vit: arguments of ViT. mode: of resizing. augment: DiffAug. p_crop: how often a larger image is
    cropped at random, once for the batch, and not resized."""

    def __init__(self, vit=None, mode="bilinear", augment=True, p_crop=0.5):
        super().__init__()
        vit = ViT(**vit or {})  # ViT-S/16
        self.mode, self.augment, self.p_crop = mode, augment, p_crop
        self.dino = nn.ModuleDict({"model": nn.ModuleDict({"model": vit})})
        self.heads = nn.ModuleList(Head(vit.dim) for _ in range(5))
        self.dino.requires_grad_(False)

    def requires_grad_(self, requires_grad=True):
        self.heads.requires_grad_(requires_grad)  # DINO stays frozen; gradients flow through it
        return self

    def features(self, x):
        """(B, 3, H, W) in [-1, 1] -> five maps of tokens (B, D, N), the cls token added to each: at
        the end of each quarter of the blocks, before the final norm; then before the first one."""
        vit = self.dino["model"]["model"]
        side, (H, W) = vit.grid * vit.patch, x.shape[-2:]
        if min(H, W) > side and torch.rand(()) < self.p_crop:
            top, left = (int(torch.randint(n - side + 1, ())) for n in (H, W))
            x = x[:, :, top:top + side, left:left + side]
        elif (H, W) != (side, side):
            x = F.interpolate(x, (side, side), mode=self.mode, antialias=max(H, W) > side)
        x = first = vit.embed(((x + 1) / 2 - vit.pixel_mean) / vit.pixel_std)  # (B, 1+N, D)
        taps = []
        for i, block in enumerate(vit.blocks, 1):
            x = block(x)
            if 4 * i % len(vit.blocks) == 0:
                taps.append(x)
        return [(y[:, 1:] + y[:, :1]).transpose(1, 2) for y in (*taps, first)]

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] -> logits (B, 5*N)."""
        taps = self.features(diffaug(x) if self.augment else x)
        return torch.cat([head(f) for head, f in zip(self.heads, taps, strict=True)], dim=1)


class MultiScalePatchGAN(nn.Module):
    """The last stage's second discriminator, pix2pixHD's (Wang et al. 2018): patches at three
    scales, of which number 2 sees the full resolution."""

    def __init__(self, ch=64):
        super().__init__()
        widths = [(3, ch, 2), (ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1),
                  (8 * ch, 1, 1)]
        for i in range(3):
            for j, (c_in, c_out, stride) in enumerate(widths):
                layer = nn.Sequential(nn.Conv2d(c_in, c_out, 4, stride, padding=2))
                nn.init.normal_(layer[0].weight, std=0.02)
                if 0 < j < 4:
                    layer.append(BatchNormLocal(c_out))
                if j < 4:
                    layer.append(nn.LeakyReLU(0.2))
                setattr(self, f"scale{i}_layer{j}", layer)

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] -> for each scale the outputs of its five layers, the last one
        being logits (B, 1, h', w')."""
        scales = []
        for i in (2, 1, 0):
            outputs = [x]
            for j in range(5):
                outputs.append(getattr(self, f"scale{i}_layer{j}")(outputs[-1]))
            scales.append(outputs[1:])
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        return scales


class Discriminators(nn.Module):
    """Both, so that one optimiser and one DDP hold them. main: a network (B, 3, H, W) -> logits;
    the PatchGAN, of width ch, trains, and runs, in the last stage only."""

    def __init__(self, main, ch=64, last_stage=False):
        super().__init__()
        self.main, self.patch, self.last_stage = main, MultiScalePatchGAN(ch), last_stage
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad=True):
        self.main.requires_grad_(requires_grad)
        self.patch.requires_grad_(requires_grad and self.last_stage)
        return self

    def forward(self, x):
        return self.main(x), self.patch(x) if self.last_stage else []


# ---- the GAN's losses

def least_squares(scales, target):
    """LSGAN's side of a MultiScalePatchGAN's outputs: mean (D - target)^2 over the patches, averaged
    over the scales."""
    return sum((outputs[-1].float() - target).square().mean() for outputs in scales) / len(scales)


def feature_matching(real, fake):
    """L1 of the four inner layers, summed over them and averaged over the scales. real is not
    trained toward fake."""
    pairs = [(r, f) for rs, fs in zip(real, fake) for r, f in zip(rs[:-1], fs[:-1])]
    return sum((f.float() - r.detach().float()).abs().mean() for r, f in pairs) / len(real)


# ---- the objective

# What trains, learning rate, images seen in the stage, whether there is equivariance, and the
# weights of the losses (WEIGHTS). l1 and lpips make L_rec, which train_tokenizer.py adds; VF's
# is times the adaptive weight; the PatchGAN brings 10 times feature matching. The released code
# counts the stages from 0.
WEIGHTS = ("l1", "lpips", "ssim", "multires", "vf", "kl", "gan", "patchgan")
ALL = ("ldm_adapter", "mapping", "synthesis")
DECODER = ("ldm_adapter.post_quant", "mapping", "synthesis")
SECOND_HALF = tuple(f"synthesis.blocks.{i}" for i in (3, 4, 5))  # a choice, see above
STAGES = {
    name: {"trains": trains, "lr": lr, "images": images, "equivariance": turned}
    | dict(zip(WEIGHTS, weights))
    for name, trains, lr, images, turned, weights in (
        # multires only in the first quarter           l1 lpips ssim multires vf  kl  gan patchgan
        ("strong", ALL, 1e-4, 20e6, True,              (1, 10,   0,   0.1,    5, 1e-6, 1, 0)),
        ("weak", ALL, 1e-4, 20e6, True,                (1, 10,   0,   0,      1, 1e-6, 1, 0)),
        ("ssim", DECODER, 5e-5, 1e6, True,             (1, 2,    1,   0,      0, 0,    1, 0)),
        ("patchgan", SECOND_HALF, 5e-5, 3e6, False,    (0, 0,    0,   0,      0, 0,    1, 1)))
}


def ema_decay(images, batch):
    """The EMA's decay after so many images: a half-life of a twentieth of them, at most 160,000."""
    return 0.5 ** (batch / min(160_000, 0.05 * images))


def multi_resolution(target, lower, mode):
    """Sum of the L1 of the five lower images against the target, shrunk to each."""
    small = [F.interpolate(target, y.shape[-2:], mode=mode, antialias=True) for y in lower]
    return sum((x - y.float()).abs().mean() for x, y in zip(small, lower))


def gan_terms(s, weights, w_gan, x, recon):
    """Both sides of the GAN. D's own loss sees x^ detached, and the generator's passes through a
    frozen D: one backward pass serves both."""
    real, real_scales = s.ddp_discriminator(x)
    fake, fake_scales = s.ddp_discriminator(recon.detach())
    d_loss = 2 * hinge_d(real, fake)  # here not halved
    s.discriminator.requires_grad_(False)
    logits, scales = s.discriminator(recon)
    s.discriminator.requires_grad_(True)
    terms = {"g_loss": (w_gan * weights["gan"], hinge_g(logits))}
    if weights["patchgan"]:
        d_loss = d_loss + least_squares(real_scales, 1) + least_squares(fake_scales, 0)
        matching = feature_matching(real_scales, scales)
        terms |= {"patchgan": (weights["patchgan"], least_squares(scales, 1)),
                  "matching": (10 * weights["patchgan"], matching)}
    return terms | {"d_loss": (1.0, d_loss), "d_real": (None, (real > 0).float().mean()),
                    "d_fake": (None, (fake < 0).float().mean())}


def objective(s, args, x, noise):
    """As train_tokenizer.aligntok_objective, which says what a term is: the images to paint, x^, and
    the terms beside L_rec = L1 + w_p LPIPS. args.w_gan: 1, or less where L_rec lacks LPIPS;
    args.disc_start: 0, or the step of all stages at which the GAN begins. s.stage: of STAGES;
    s.discriminator: a Discriminators; noise: (B, d, h, w), standard normal."""
    weights, mode = STAGES[s.stage], s.tokenizer.vfm_encoder.mode
    transform = draw_transform(*noise.shape[-2:]) if weights["equivariance"] else Transform()
    recon, lower, moments, z_proj, tokens = s.ddp_tokenizer(x, noise, *transform)
    x = transformed(x, transform, mode)
    multires = multi_resolution(x, lower, mode)
    w_multires = weights["multires"] * (s.step < s.steps / 4)
    # with weight 0 too: DDP waits for a gradient of every RGB
    terms = {"multires": (w_multires, multires)}
    if weights["kl"]:
        terms["kl"] = (weights["kl"], kl_divergence(moments))
    if weights["vf"]:  # margins 0. Its adaptive weight is that of VA-VAE, at most 1e8, but the
        # multi-resolution loss counts as reconstruction
        last_layer = s.tokenizer.ldm_adapter.final_quant.blocks[0].mlp.w2.weight
        terms["vf"] = (weights["vf"], vf_loss(z_proj, tokens, 0, 0), last_layer, 1e8,
                       w_multires * multires)
    if weights["ssim"]:
        similarity = ssim(x.clamp(-1, 1), recon.float().clamp(-1, 1), signed=True).mean()
        terms["ssim"] = (weights["ssim"], 1 - similarity)
    if s.steps_before + s.step >= args.disc_start:
        terms |= gan_terms(s, weights, args.w_gan, x, recon.float())
    if not weights["l1"]:  # L_rec is only logged: the gradient that training_step takes ends here
        recon = recon.detach().requires_grad_()
    return x, recon, terms


# ---- named sizes

# Arguments of VFMVAE; scale for patches of 16 px. paper: 139,770,680 parameters train.
VFM_VAES = {
    "tiny": {"scale": 1, "width": 64, "expansion": 128, "style": 128,
             "synthesis": {"channels": (128, 128, 64, 48, 32, 16), "injections": (128, 64, 32, 32),
                           "layers": (2, 2, 2, 2, 1, 1), "kernels": (3, 3, 3, 3, 3, 3),
                           "attentions": (1, 1, 1, 0, 0, 0), "noise": 0}},
    "paper": {"scale": 2, "width": 64, "expansion": 512, "style": 512,
              "synthesis": {"channels": (512, 512, 512, 512, 256, 128),
                            "injections": (512, 256, 128, 128), "layers": (7, 7, 7, 7, 5, 5),
                            "kernels": (5, 5, 7, 7, 7, 7), "attentions": (2, 2, 2, 0, 0, 0),
                            "noise": 8}},
}


def reading_sizes(name, tower):
    """VFMVAE's arguments of a named size that follow from its encoder: the first, the middle and
    the last layer are read, at the scale that fits its patches."""
    sizes = VFM_VAES[name]
    return sizes | {"dim": tower.dim, "layers": (0, len(tower.blocks) // 2, -1),
                    "scale": sizes["scale"] * tower.patch / 16}
