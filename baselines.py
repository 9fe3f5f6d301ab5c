"""The tokenizers that AlignTok is compared with: LDM's convolutional VAE (Rombach et al. 2022),
VA-VAE (Yao, Yang and Wang 2025), which pulls the VAE's latents toward a foundation encoder while
it trains, and the VAE of FLUX (Black Forest Labs), which is taken as released.

    VAE       L_rec + w_kl KL(q(z|x) || N(0, I))
    VA-VAE    the same + w_vf VF(z', F)

Legend: B batch, H W image sides, h w latent sides, N = h*w tokens, D width of the foundation
encoder, d latent channels.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn

from files import unwrapped
from losses import kl_divergence, vf_loss
from model import Decoder, GroupNorm, LatentSpace, Level, Middle


class Encoder(nn.Module):
    """LDM's convolutional encoder, the mirror image of Decoder: (B, 3, H, W) -> (B, 2d, h, w), mean
    and log-variance of the latents. Five levels give H/h = 16; attention at the lowest one."""

    def __init__(self, d=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(([ch] + widths)[i], widths[i], num_res_blocks,
                  attention=i == last, downsample=i != last)
            for i in range(len(widths)))
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * d, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # (B, ch, H, W)
        for part in (*self.down, self.mid):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2d, h, w)


def sizes(state):
    """Decoder's arguments but d, from the names and shapes of the encoder beside it."""
    blocks = sorted(k for k in state
                    if re.fullmatch(r"encoder\.down\.\d\.block\.\d\.conv1\.weight", k))
    widths = [state[k].shape[0] for k in blocks if ".block.0." in k]
    ch = state["encoder.conv_in.weight"].shape[0]
    return {"ch": ch, "ch_mult": [w // ch for w in widths],
            "num_res_blocks": len(blocks) // len(widths)}


class VAE(LatentSpace):
    """LDM's VAE, and with vf_dim VA-VAE; official keys.

    decoder: arguments of Decoder and Encoder but d; d: latent channels; vf_dim: width D of
    VA-VAE's foundation encoder (None: a plain VAE)."""

    def __init__(self, decoder, d=32, vf_dim=None):
        super().__init__(d)
        self.arguments = {"decoder": decoder, "d": d, "vf_dim": vf_dim}
        self.encoder = Encoder(d=d, **decoder)
        self.quant_conv = nn.Conv2d(2 * d, 2 * d, 1)
        self.post_quant_conv = nn.Conv2d(d, d, 1)
        self.decoder = Decoder(d=d, **decoder)
        if vf_dim:  # z -> z', which is compared with the foundation encoder's tokens
            self.linear_proj = nn.Conv2d(d, vf_dim, 1, bias=False)
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def in_checkpoint(content):
        """(arguments, state dict) of a VAE in a checkpoint's content, ours or an official VA-VAE's;
        None where there is none."""
        if "vf_dim" in content.get("arguments", {}):
            return content["arguments"], content["tokenizer"]
        state = unwrapped(content)
        if not {"quant_conv.weight", "encoder.mid.block_1.conv1.weight"} <= state.keys():
            return None
        # Official files hold no sizes: they follow from names and shapes. What only training needs
        # is left out. The latent statistics are a file of their own: zero here.
        state = {k: v for k, v in state.items()
                 if not k.startswith(("loss.", "foundation_model.", "linear_proj."))}
        d = state["decoder.conv_in.weight"].shape[1]
        state |= {"latent_mean": torch.zeros(d), "latent_std": torch.zeros(d)}
        return {"decoder": sizes(state), "d": d}, state

    def features(self, x):
        """Mean and log-variance of z, as tokens (B, N, 2d)."""
        H, W = x.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"image sides must be divisible by {self.factor}, not {H}x{W}")
        return self.quant_conv(self.encoder(x)).flatten(2).transpose(1, 2)

    def adapt(self, moments, h, w):
        """Mean and log-variance (B, N, 2d) -> z0 (B, d, h, w): the mean."""
        return moments[..., :self.d].transpose(1, 2).reshape(-1, self.d, h, w)

    def decode(self, z):
        """z0 (B, d, h, w), not normalised -> images (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, noise):
        """x and standard normal noise (B, d, h, w) -> (x^, mean | log-variance (B, 2d, h, w),
        z' (B, D, h, w), or None for a plain VAE). z is sampled: mean + std * noise."""
        moments = self.quant_conv(self.encoder(x))  # (B, 2d, h, w)
        mean, logvar = moments.float().chunk(2, dim=1)
        z = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise  # (B, d, h, w)
        z_proj = self.linear_proj(z) if hasattr(self, "linear_proj") else None
        return self.decode(z), moments, z_proj

    def compiled(self):
        """What --compile compiles. Not the encoder's last layer, whose gradient alone the adaptive
        weight of the VF loss asks for."""
        return [(level, "forward") for level in self.encoder.down] + [(self.decoder, "body")]


# ---- the objective

def objective(s, args, x, noise):
    """x, the reconstruction and the terms beside L_rec, as train_tokenizer.aligntok_objective has
    them. s.reference: the frozen foundation encoder of VA-VAE, None for a plain VAE. noise:
    (B, d, h, w), standard normal."""
    recon, moments, z_proj = s.ddp_tokenizer(x, noise)
    # 1e-6 goes with a reconstruction loss summed over the 3HW values of an image; ours is a mean
    terms = {"kl": (args.w_kl / x[0].numel(), kl_divergence(moments))}
    if s.reference is not None:
        with torch.no_grad():
            tokens = s.reference.features(x)  # F (B, N, D)
        vf = vf_loss(z_proj, tokens, *args.vf_margins)
        terms["vf"] = (args.w_vf, vf, s.tokenizer.encoder.conv_out.weight, 1e8)
    return x, recon, terms


# ---- the VAE of FLUX

# FLUX.1's sizes: encoder 34,274,208 parameters, decoder 49,545,475
FLUX = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}

# the names of diffusers' AutoencoderKL -> LDM's, which the official files have
DIFFUSERS_NAMES = {
    r"^quant_conv\.": "encoder.quant_conv.",
    r"^post_quant_conv\.": "decoder.post_quant_conv.",
    r"\.down_blocks\.": ".down.",
    r"\.up_blocks\.": ".up.",  # counted from the lowest resolution, LDM's from the highest
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.attentions\.0\.": ".mid.attn_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.resnets\.": ".block.",
    r"\.(down|up)samplers\.0\.": r".\1sample.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"\.conv_norm_out\.": ".norm_out.",
    r"\.group_norm\.": ".norm.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.to_out\.0\.": ".proj_out.",
}


def from_diffusers(state):
    """A state dict of diffusers' AutoencoderKL under LDM's names."""
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks."))
    renamed = {}
    for name, tensor in state.items():
        for theirs, official in DIFFUSERS_NAMES.items():
            name = re.sub(theirs, official, name)
        name = re.sub(r"^decoder\.up\.(\d+)",
                      lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
        # theirs are linear layers, LDM's 1x1 convolutions
        linear = ".attn_1." in name and tensor.dim() == 2
        renamed[name] = tensor[..., None, None] if linear else tensor
    return renamed


class FluxVAE(LatentSpace):
    """The VAE of FLUX.1 (16 channels, factor 8), or of FLUX.2 (128, factor 16); official keys.

    Always frozen here: its latents are the mean, normalised by the constants of the release.
    decoder: arguments of Decoder and Encoder but d; z_channels: the decoder's d. flux2: 1x1
    convolutions around z, and z packed 2x2: channel c*4 + dy*2 + dx of a latent is channel c of
    the position (dy, dx)."""

    def __init__(self, decoder, z_channels=16, flux2=False):
        super().__init__(z_channels * (4 if flux2 else 1))
        self.arguments = {"decoder": decoder, "z_channels": z_channels, "flux2": flux2}
        self.pack = 2 if flux2 else 1
        self.factor = self.pack * 2 ** (len(decoder["ch_mult"]) - 1)
        self.encoder = Encoder(d=z_channels, **decoder)
        self.decoder = Decoder(d=z_channels, **decoder)
        for level in (*self.encoder.down, *self.decoder.up):
            level.attn = nn.ModuleList()  # attention in the middle only
        for m in self.modules():
            if isinstance(m, GroupNorm):
                m.num_groups = 32  # at any width
        if flux2:
            self.encoder.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
            self.decoder.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def in_checkpoint(content):
        """(arguments, state dict) in the content of an official file, in Black Forest Labs' layout
        or diffusers'; None where there is none."""
        state = unwrapped(content)
        if "encoder.conv_in.weight" not in state:
            return None
        if "decoder.up_blocks.0.resnets.0.conv1.weight" in state:
            state = from_diffusers(state)
        z_channels = state["decoder.conv_in.weight"].shape[1]
        flux2 = "bn.running_mean" in state
        if "quant_conv.weight" in state or ("encoder.quant_conv.weight" in state) != flux2:
            return None  # another autoencoder of LDM's
        if flux2:  # z is normalised by a BatchNorm without affine, eps 1e-4
            mean, std = state.pop("bn.running_mean"), (state.pop("bn.running_var") + 1e-4).sqrt()
            del state["bn.num_batches_tracked"]
        else:  # .3611 (z - .1159)
            mean, std = (torch.full((z_channels,), c) for c in (0.1159, 1 / 0.3611))
        state |= {"latent_mean": mean, "latent_std": std}
        return {"decoder": sizes(state), "z_channels": z_channels, "flux2": flux2}, state

    def features(self, x):
        """Mean and log-variance of z, as tokens (B, N, 2d)."""
        H, W = x.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"image sides must be divisible by {self.factor}, not {H}x{W}")
        moments = self.encoder(x)
        if self.pack > 1:
            moments = self.encoder.quant_conv(moments)
        return F.pixel_unshuffle(moments, self.pack).flatten(2).transpose(1, 2)

    def adapt(self, moments, h, w):
        """Mean and log-variance (B, N, 2d) -> z0 (B, d, h, w): the mean."""
        return moments[..., :self.d].transpose(1, 2).reshape(-1, self.d, h, w)

    def decode(self, z):
        """z0 (B, d, h, w), not normalised -> images (B, 3, H, W), about in [-1, 1]."""
        z = F.pixel_shuffle(z, self.pack)
        return self.decoder(self.decoder.post_quant_conv(z) if self.pack > 1 else z)
