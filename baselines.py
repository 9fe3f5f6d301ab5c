"""The tokenizers that AlignTok is compared with: LDM's convolutional VAE (Rombach et al. 2022) and
VA-VAE (Yao, Yang and Wang 2025), which pulls the VAE's latents toward a foundation encoder while
it trains.

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
        if "encoder.conv_in.weight" not in state:
            return None
        # Official files hold no sizes: they follow from names and shapes. What only training needs
        # is left out. The latent statistics are a file of their own: zero here.
        state = {k: v for k, v in state.items()
                 if not k.startswith(("loss.", "foundation_model.", "linear_proj."))}
        blocks = sorted(k for k in state
                        if re.fullmatch(r"encoder\.down\.\d\.block\.\d\.conv1\.weight", k))
        widths = [state[k].shape[0] for k in blocks if ".block.0." in k]
        ch = state["encoder.conv_in.weight"].shape[0]
        d = state["decoder.conv_in.weight"].shape[1]
        decoder = {"ch": ch, "ch_mult": [w // ch for w in widths],
                   "num_res_blocks": len(blocks) // len(widths)}
        state |= {"latent_mean": torch.zeros(d), "latent_std": torch.zeros(d)}
        return {"decoder": decoder, "d": d}, state

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
    """The reconstruction and the terms beside L_rec, as train_tokenizer.aligntok_objective returns
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
