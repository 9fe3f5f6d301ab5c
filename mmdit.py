"""FLUX's transformer (Black Forest Labs 2024): the generator of the paper's text-to-image
experiment. The official state-dict keys; without the embedding of a guidance scale, which only a
distilled model has.

    text tokens, image tokens -> double blocks: each kind has its own weights, attention is joint
                              -> single blocks: one sequence, text first; one set of weights
    condition of every block   = MLP(t) + MLP(pooled text)

The paper names neither depth, width nor text encoders: the sizes below are choices.

Legend: B batch, L text tokens, N image tokens, S = L + N, D width, d latent channels, p side of a
token in latent positions, T width of the text tokens, P of the pooled text.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import attention, modulate, rotate

# ---- positions, time

def rope_tables(ids, axes):
    """cos and sin (S, sum(axes)) for the positions ids (S, 3). Axis i of a position turns the next
    axes[i] dimensions of a head: axes[i]/2 frequencies (base 10000), each for a pair of
    neighbours."""
    angles = []
    for position, dim in zip(ids.double().T, axes):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(position[:, None] * 10000.0 ** -exponent)  # (S, dim/2)
    angles = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)  # (S, sum(axes))
    return angles.cos().float(), angles.sin().float()


def positions(L, h, w, device=None):
    """(L + h*w, 3): text tokens are all at (0, 0, 0), an image token is at (0, row, column)."""
    ids = torch.zeros(L + h * w, 3, device=device)
    ids[L:, 1] = torch.arange(h, device=device).repeat_interleave(w)
    ids[L:, 2] = torch.arange(w, device=device).repeat(h)
    return ids


def time_embedding(t):
    """t (B,) in [0, 1] -> (B, 256): cosines and sines of 1000 t."""
    steps = torch.arange(128, device=t.device)
    angles = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) * steps / 128)  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_shift(tokens):
    """FLUX's a in t' = a t / (1 + (a - 1) t), for N image tokens: more noise the more tokens there
    are, as neighbouring tokens are alike: the same noise hides less of a finer picture. ln a is
    linear: .5 at 256 tokens, 1.15 at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


# ---- blocks

def layer_norm(x):
    """Without weights: the modulation follows."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def gelu_mlp(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"),
                         nn.Linear(4 * dim, dim))


class Embedder(nn.Module):
    """The MLP that makes t, or the pooled text, a part of the condition."""

    def __init__(self, c_in, dim):
        super().__init__()
        self.in_layer = nn.Linear(c_in, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), 1e-6).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, qkv):
        """(B, S, 3D) -> q, k, v (B, heads, S, head); q and k normalised."""
        head = len(self.query_norm.scale)
        q, k, v = (y.unflatten(2, (-1, head)).transpose(1, 2) for y in qkv.chunk(3, dim=2))
        return self.query_norm(q), self.key_norm(k), v


def rotary_attention(q, k, v, cos, sin):
    """(B, heads, S, head) three times -> (B, S, D)."""
    y = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    return y.transpose(1, 2).flatten(2)


class Modulation(nn.Module):
    """The condition c (B, D) -> n parts (B, D): shift, scale, gate; for a double block twice."""

    def __init__(self, dim, n):
        super().__init__()
        self.n = n
        self.lin = nn.Linear(dim, n * dim)

    def forward(self, c):
        return self.lin(F.silu(c)).chunk(self.n, dim=1)


class StreamAttention(nn.Module):
    """One stream's part in the joint attention."""

    def __init__(self, dim, head):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(head)
        self.proj = nn.Linear(dim, dim)


class DoubleBlock(nn.Module):
    """Image and text, two streams: each with its own modulation, projections and MLP; one attention
    over all their tokens."""

    def __init__(self, dim, head):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(dim, 6), Modulation(dim, 6)
        self.img_attn, self.txt_attn = StreamAttention(dim, head), StreamAttention(dim, head)
        self.img_mlp, self.txt_mlp = gelu_mlp(dim), gelu_mlp(dim)

    def forward(self, img, txt, c, cos, sin):  # (B, N, D), (B, L, D), (B, D)
        parts, qkv = [], []
        for x, mod, attn in ((txt, self.txt_mod, self.txt_attn),
                             (img, self.img_mod, self.img_attn)):
            shift, scale, *later = mod(c)
            qkv.append(attn.norm(attn.qkv(modulate(layer_norm(x), shift, scale))))
            parts.append(later)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*qkv))  # (B, heads, S, head), text first
        joint = rotary_attention(q, k, v, cos, sin)  # (B, S, D)
        y_txt, y_img = joint.split([txt.shape[1], img.shape[1]], dim=1)
        txt = self.after_attention(txt, self.txt_attn.proj(y_txt), self.txt_mlp, *parts[0])
        img = self.after_attention(img, self.img_attn.proj(y_img), self.img_mlp, *parts[1])
        return img, txt

    @staticmethod
    def after_attention(x, y, mlp, gate, mlp_shift, mlp_scale, mlp_gate):
        """The rest of a stream's block. y: the attention's output, (B, N, D) or (B, L, D)."""
        x = x + gate[:, None] * y
        return x + mlp_gate[:, None] * mlp(modulate(layer_norm(x), mlp_shift, mlp_scale))


class SingleBlock(nn.Module):
    """Attention and MLP side by side, from one linear layer and into one."""

    def __init__(self, dim, head):
        super().__init__()
        self.widths = [3 * dim, 4 * dim]
        self.modulation = Modulation(dim, 3)
        self.linear1 = nn.Linear(dim, 7 * dim)
        self.norm = QKNorm(head)
        self.linear2 = nn.Linear(5 * dim, dim)

    def forward(self, x, c, cos, sin):  # x (B, S, D), c (B, D)
        shift, scale, gate = self.modulation(c)
        qkv, hidden = self.linear1(modulate(layer_norm(x), shift, scale)).split(self.widths, dim=2)
        y = rotary_attention(*self.norm(qkv), cos, sin)  # (B, S, D)
        hidden = F.gelu(hidden, approximate="tanh")  # (B, S, 4D)
        return x + gate[:, None] * self.linear2(torch.cat([y, hidden], dim=2))


class LastLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(layer_norm(x), shift, scale))  # (B, N, out)


def unpack(rows, text, pooled):
    """Rows of text (B, L*T + P), see captions.py -> text tokens (B, L, T), pooled text (B, P)."""
    return rows[:, :-pooled].unflatten(1, (-1, text)), rows[:, -pooled:]


class MMDiT(nn.Module):
    """v(z_t, t, text). depth, depth_single: numbers of double and of single blocks; axes: the
    dimensions of a head that turn with each axis of a position, a head is sum(axes) wide; d, patch,
    grid: as LightningDiT's; text, pooled: widths of the text tokens and of the pooled text."""
    num_classes = 0  # text takes their place

    def __init__(self, dim, depth, depth_single, axes=(16, 56, 56), d=32, patch=1, grid=(16, 16),
                 text=4096, pooled=768):
        super().__init__()
        self.arguments = {"dim": dim, "depth": depth, "depth_single": depth_single,
                          "axes": list(axes), "d": d, "patch": patch, "grid": list(grid),
                          "text": text, "pooled": pooled}
        head = sum(axes)
        if dim % head or any(a % 2 for a in axes) or len(axes) != 3:
            raise ValueError(f"a width of {dim} is not made of heads of {head} = "
                             f"{' + '.join(map(str, axes))}, three even numbers")
        self.d, self.patch, self.axes = d, patch, axes
        self.img_in = nn.Linear(patch * patch * d, dim)
        self.time_in = Embedder(256, dim)
        self.vector_in = Embedder(pooled, dim)
        self.txt_in = nn.Linear(text, dim)
        self.double_blocks = nn.ModuleList(DoubleBlock(dim, head) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleBlock(dim, head) for _ in range(depth_single))
        self.final_layer = LastLayer(dim, patch * patch * d)
        self.initialise()

    def initialise(self):
        # as LightningDiT: a choice, FLUX's is not published
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in (self.time_in, self.vector_in):
            nn.init.normal_(m.in_layer.weight, std=0.02)
            nn.init.normal_(m.out_layer.weight, std=0.02)
        # all gates are shut, so every block is the identity; and the output is 0
        modulations = [m.lin for m in self.modules() if isinstance(m, Modulation)]
        last = [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for m in (*modulations, *last):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def compiled(self):
        """What --compile compiles: parts and their methods."""
        return [(block, "forward") for block in (*self.double_blocks, *self.single_blocks)]

    def forward(self, z_t, t, rows):
        """The paper's velocity v = z1 - z0 (B, d, H, W) at the noisy, normalised latents z_t
        (B, d, H, W) and the times t (B,), 0 data, 1 noise; also FLUX's own direction.

        rows: of text (B, L*T + P), L text tokens, one after the other, and the pooled text. Raises
        ValueError for other latents."""
        text, pooled = unpack(rows, self.arguments["text"], self.arguments["pooled"])
        _, d, H, W = z_t.shape
        if d != self.d or H % self.patch or W % self.patch:
            raise ValueError(f"this MMDiT takes latents of {self.d} channels with sides divisible "
                             f"by {self.patch}, not {d}x{H}x{W}")
        L, h, w = text.shape[1], H // self.patch, W // self.patch
        cos, sin = rope_tables(positions(L, h, w, z_t.device), self.axes)  # (S, head)
        tokens = F.pixel_unshuffle(z_t, self.patch)  # channel c*p*p + dy*p + dx, (B, d*p*p, h, w)
        img = self.img_in(tokens.flatten(2).transpose(1, 2))  # (B, N, D)
        txt = self.txt_in(text)  # (B, L, D)
        c = self.time_in(time_embedding(t)) + self.vector_in(pooled)  # (B, D)
        for block in self.double_blocks:
            img, txt = block(img, txt, c, cos, sin)
        x = torch.cat([txt, img], dim=1)  # (B, S, D)
        for block in self.single_blocks:
            x = block(x, c, cos, sin)
        x = self.final_layer(x[:, L:], c)  # (B, N, p*p*d)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (h, w)), self.patch)


# Arguments of MMDiT: 6, 162, 662 and 1,972M parameters at 32 channels, text 4096, pooled 768.
MMDITS = {
    "tiny": {"dim": 192, "depth": 2, "depth_single": 4, "axes": [8, 28, 28]},
    "B": {"dim": 768, "depth": 4, "depth_single": 8},
    "L": {"dim": 1280, "depth": 6, "depth_single": 12},
    "2B": {"dim": 1920, "depth": 8, "depth_single": 16},
}
