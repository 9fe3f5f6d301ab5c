"""Alignment of the generator, VFM-VAE's "dual side": REPA (Yu et al., ICLR 2025) and REG (Wu et al.
2025) on LightningDiT. Training alone sees the encoder, which is frozen.

    REPA   L - .5 E cos(P(x_8), [patch tokens])         x_8: tokens after block 8 of 28
    REG    L - .5 E cos(P(x_8), [cls, patch tokens]) + .03 E || v_cls - (n - cls) ||^2
           with one token more, the noised class token cls_t = (1 - t) cls + t n, n ~ N(0, I)

Departures from REG's code, a SiT: LightningDiT's blocks, whose RoPE leaves the class token as it
is; times and the velocity's loss are those of train_dit.py; the encoder is prepared as E_p: its
resize and its positions, where theirs are timm's; the class token shares the image's sampler, an
ODE's where theirs is an SDE's, and its guidance; in a small model P is 4D wide (theirs: 2048).

The features of ImageNet, original and flipped, would be 1 TB: so the images are read in each step,
beside the cached latents.

Legend: B batch, N tokens, D width, F width of the encoder, d latent channels, H W latent sides.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import losses
from model import LightningDiT

W_ALIGN, W_CLASS = 0.5, 0.03


def extra_channels(arguments):
    """Of a generator's arguments: in so many channels REG's class token lies behind the latents
    while sample.py integrates both, filled up with numbers that nothing reads."""
    if arguments.get("align") != "reg":
        return 0
    H, W = arguments["grid"]
    return math.ceil(arguments["width"] / (H * W))


class AlignedDiT(LightningDiT):
    """align: "repa" or "reg"; width: F; projector: whether it is there, for training; hidden: its
    width inside (None: 4D, at most 2048); sizes: arguments of LightningDiT."""

    def __init__(self, align, width, projector=True, hidden=None, **sizes):
        super().__init__(**sizes)
        self.arguments |= {"align": align, "width": width}
        self.width, self.extra = width, extra_channels(self.arguments)
        self.tap = max(1, round(len(self.blocks) * 8 / 28))
        if projector:
            hidden = hidden or min(2048, 4 * self.dim)
            self.projector = nn.Sequential(
                nn.Linear(self.dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, width))
        if self.extra:
            self.cls_embedder = nn.Linear(width, self.dim)
            self.cls_norm = nn.LayerNorm(self.dim)
            self.cls_out = nn.Linear(self.dim, width)
        self.initialise()  # again, with what is new
        if self.extra:
            nn.init.zeros_(self.cls_out.weight)  # as LightningDiT's output

    def forward(self, z_t, t, y=None, cls_t=None):
        """For training, with the noised class token cls_t (B, F): LightningDiT's v (B, d, H, W);
        v of the class token (B, F), REPA's None; the projector's tokens (B, 1 + N or N, F).

        For sampling, without it: v of all channels of z_t (B, d + extra, H, W)."""
        sampling = cls_t is None
        if sampling:
            cls_t = z_t[:, self.d:].flatten(1)[:, :self.width]
        z_t = z_t[:, :self.d]
        x, c, cos, sin = self.embed(z_t, t, y)  # (B, N, D)
        N = x.shape[1]
        if self.extra:
            cls = self.cls_norm(self.cls_embedder(cls_t))
            x = torch.cat([cls[:, None], x], dim=1)  # (B, 1+N, D), its position is zero
            cos, sin = F.pad(cos, (0, 0, 1, 0), value=1.0), F.pad(sin, (0, 0, 1, 0))
        for i, block in enumerate(self.blocks, 1):
            x = block(x, c, cos, sin)
            if i == self.tap and not sampling:
                projected = self.projector(x)
        x = self.final_layer.modulated(x, c)
        v = self.unpatch(self.final_layer.linear(x[:, -N:]), *z_t.shape[-2:])
        v_cls = self.cls_out(x[:, 0]) if self.extra else None
        if not sampling:
            return v, v_cls, projected
        return torch.cat([v, self.behind(v_cls, v)], dim=1) if self.extra else v

    def behind(self, cls, z):
        """(B, F) -> (B, extra, H, W), as z."""
        B, _, H, W = z.shape
        return F.pad(cls, (0, self.extra * H * W - self.width)).view(B, self.extra, H, W)


def flow_matching(encoder, model, z0, z1, t, y, w_cos, images, n):
    """As losses.flow_matching, of an AlignedDiT; L has its terms too, which come last, for the log.

    encoder: frozen; images: (B, 3, h, w) in [-1, 1]; n: the class token's noise (B, F)."""
    with torch.no_grad():
        cls, tokens = encoder(encoder.prepared(images))  # (B, F), (B, N, F)
    cls, tokens = cls.float(), tokens.float()
    cls_t = torch.lerp(cls, n, t[:, None])  # (1 - t) cls + t n
    found = []

    def velocity(z_t, t, y):
        found.extend(model(z_t, t, y, cls_t))
        return found[0]

    loss, mse, cosine = losses.flow_matching(velocity, z0, z1, t, y, w_cos)
    _, v_cls, projected = found
    terms = {}
    if v_cls is not None:
        tokens = torch.cat([cls[:, None], tokens], dim=1)
        terms["class"] = (v_cls.float() - (n - cls)).square().mean()
        loss = loss + W_CLASS * terms["class"]
    terms["align"] = -F.cosine_similarity(projected.float(), tokens, dim=-1).mean()
    loss = loss + W_ALIGN * terms["align"]
    return loss, mse, cosine, {k: v.detach() for k, v in terms.items()}


def for_sampling(arguments, state):
    """(class, arguments, state dict) of a trained AlignedDiT without its projector."""
    state = {k: v for k, v in state.items() if not k.startswith("projector.")}
    if arguments["align"] == "reg":
        return AlignedDiT, arguments | {"projector": False}, state
    return LightningDiT, {k: v for k, v in arguments.items() if k not in ("align", "width")}, state
