"""The losses of AlignTok and its generator, each under the paper's equation, and the image metrics of its tables.

    Eq. 1    L_rec = L1(x, x^) + w_p L_perceptual + w_g L_GAN      all stages             reconstruction_loss, hinge_*
    Sec. 3   L_sp  = L2(z0*, z0)                                   stage 2                semantic_preservation
             w_kl KL, w_vf VF                                      the baselines          kl_divergence, vf_loss
             L     = E || v(z_t, t) - (z1 - z0) ||^2               the generator          flow_matching

Choices where the paper is silent: every L1 and L2 is a mean over all elements; the discriminator, its hinge loss and
the adaptive w_g are VA-VAE's (PatchGAN, Isola et al. 2017; adaptive weight, Esser et al. 2021).

Images are (B, 3, H, W) in [-1, 1]. Under autocast VGG16 and PatchGAN run in its type; norms, distances, means and the
adaptive weight are fp32 always.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

from model import UserError, load_file, load_strictly

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's IMAGENET1K_V1
VGG16_SHA256 = "397923af"  # torch hub's convention: the first characters stand in the name
HEADS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


# ------------------------------------------------------------------------------------------- Eq. 1: reconstruction

class LPIPS(nn.Module):
    """L_perceptual: LPIPS v0.1 with VGG16 (Zhang et al. 2018); equals the package `lpips` (net="vgg").

    vgg16_file: torchvision's VGG16 state dict, with or without its classifier. heads_file: the five linear heads.
    It is always frozen and in eval mode; gradients reach its input alone."""

    def __init__(self, vgg16_file, heads_file):
        super().__init__()
        self.vgg16 = torchvision.models.vgg16(init_weights=False).features[:30]  # up to relu5_3
        self.taps = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in (64, 128, 256, 512, 512))
        state = load_file(vgg16_file, "VGG16")
        features = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        load_strictly(self.vgg16, features, vgg16_file)
        heads = load_file(heads_file, "LPIPS heads")
        heads = {k.removeprefix("lin").replace(".model.1", ""): v for k, v in heads.items()}
        load_strictly(self.heads, heads, heads_file)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        for layer in self.vgg16:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the taps are kept
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def train(self, mode=True):
        return super().train(False)

    def features(self, x):
        x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        for i, layer in enumerate(self.vgg16):
            x = layer(x)
            if i in self.taps:
                f = x.float()
                # the clamp keeps the gradient of the root finite where all channels are zero
                yield f / (f.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)

    def forward(self, x, y):
        """(B, 3, H, W) twice, [-1, 1] -> distance per image (B,), >= 0."""
        with torch.no_grad():
            target = list(self.features(x))
        distance = 0
        for f, g, head in zip(target, self.features(y), self.heads):
            with torch.autocast(x.device.type, enabled=False):
                distance = distance + head((f - g).square()).mean((1, 2, 3))
        return distance


def reconstruction_loss(x, recon, lpips, w_p):
    """Eq. 1 without its last term: L1 + w_p L_perceptual. Returns (sum, L1, L_perceptual), scalars."""
    l1 = (x - recon).abs().mean()
    if lpips is None or w_p == 0:
        return l1, l1, torch.zeros_like(l1)
    perceptual = lpips(x, recon).mean()
    return l1 + w_p * perceptual, l1, perceptual


# --------------------------------------------------------------------------------------------------- Eq. 1: the GAN

def average_over_ranks(t):
    """The mean of a tensor over all ranks, in place; without torchrun the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(t)
        t /= dist.get_world_size()
    return t


class _SumOverRanks(torch.autograd.Function):
    """All-reduce with its true gradient, which is again the sum over the ranks."""

    @staticmethod
    def forward(ctx, t):
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose batch is the batch of all ranks, on CPU and GPU (torch's SyncBatchNorm refuses CPU tensors)."""

    def forward(self, x):
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            xf, count = x.float(), x.numel() // x.shape[1] * dist.get_world_size()
            mean = _SumOverRanks.apply(xf.sum((0, 2, 3))) / count  # (C,)
            centred = xf - mean.view(-1, 1, 1)
            var = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count  # biased, as BatchNorm normalises
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
            scale = self.weight * (var + self.eps).rsqrt()
            return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


class PatchGAN(nn.Module):
    """The 70x70 patch discriminator of pix2pix, as in LDM: (B, 3, H, W) in [-1, 1] -> logits (B, 1, h', w').

    2,765,633 parameters at ch = 64."""

    def __init__(self, ch=64):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            layers += [nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False), BatchNorm(c_out), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.main(x.contiguous(memory_format=torch.channels_last))


def hinge_d(real, fake):
    """The discriminator's loss: .5 (E relu(1 - D(x)) + E relu(1 + D(x^)))."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_g(fake):
    """L_GAN: -E D(x^)."""
    return -fake.float().mean()


def adaptive_weight(rec, other, last_layer, limit=1e4):
    """The factor on another loss that makes its gradient at a last layer as large as that of the reconstruction: for
    L_GAN at the decoder's, for VA-VAE's VF loss at the encoder's (limit 1e8).

    |grad rec| / (|grad other| + 1e-4), clamped to [0, limit], detached. Under DDP the gradients are averaged over the
    ranks before the norms are taken (a mean of norms is another number), so that every rank gets the same weight."""
    grads = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (rec, other)])
    rec_norm, other_norm = average_over_ranks(grads.float()).flatten(1).norm(dim=1)
    return (rec_norm / (other_norm + 1e-4)).clamp(0, limit)


# --------------------------------------------------------------------------------- stage 2: semantic preservation

def semantic_preservation(z, z_ref, kind="l2", dim=1):
    """L_sp = L2(z0*, z0): keeps what is being trained (z) where the frozen stage-1 copy puts it (z_ref).

    Latents (B, d, h, w), dim=1; or, the ablation "before the adapter", tokens (B, N, D) with dim=-1. kind "l2": mean of
    squares; "cosine", the other ablation: 1 - cosine over the channels, averaged over the positions."""
    z, z_ref = z.float(), z_ref.detach().float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(z, z_ref, dim=dim).mean()
    return F.mse_loss(z, z_ref)


# ------------------------------------------------------------------------------ the baselines: VAE, VA-VAE

def kl_divergence(moments):
    """KL(N(mean, var) || N(0, 1)) of mean | log-variance (B, 2d, h, w): summed over the dimensions, mean over B."""
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def vf_loss(z_proj, tokens, m_cos=0.5, m_dist=0.25):
    """VA-VAE's loss toward the foundation encoder: the marginal cosine and the marginal distance matrix similarity.

    z_proj: z' (B, D, h, w); tokens: F (B, N, D), N = h*w. With S the cosines between the tokens of an image,
    mean relu(1 - m_cos - cos(F, z')) + mean relu(|S(z') - S(F)| - m_dist)."""
    z = F.normalize(z_proj.float().flatten(2).transpose(1, 2), dim=-1)  # (B, N, D)
    f = F.normalize(tokens.float(), dim=-1)
    with torch.autocast(z.device.type, enabled=False):
        difference = (z @ z.transpose(1, 2) - f @ f.transpose(1, 2)).abs()  # (B, N, N)
    return F.relu(1 - m_cos - (z * f).sum(-1)).mean() + F.relu(difference - m_dist).mean()


# ------------------------------------------------------------------------------------------ generator: flow matching

def logit_normal(n):
    """n ~ N(0, 1) -> t = sigmoid(n) in (0, 1): the middle of the path is seen most, where the velocity is hardest."""
    return torch.sigmoid(n)


# z_t = (1 - t) z0 + t z1,  u = z1 - z0,  L = E || v(z_t, t) - u ||^2  [+ w_cos E (1 - cos(v, u)), LightningDiT's]
def flow_matching(model, z0, z1, t, y, w_cos=0.0):
    """The paper's objective, t = 0 data and t = 1 noise, and LightningDiT's velocity-direction loss.

    z0: normalised latents (B, d, h, w), z1: noise like them, t (B,), y (B,) classes. || . ||^2 is a mean over all
    elements; the cosine runs over the channels of each position. Returns (L, squared error per image (B,), mean of
    1 - cos); of these only L has a gradient."""
    t_ = t.view(-1, 1, 1, 1)
    z_t = (1 - t_) * z0 + t_ * z1
    u = z1 - z0
    v = model(z_t, t, y).float()
    mse = (v - u).square().mean((1, 2, 3))
    # v is exactly 0 at first, where the gradient of the cosine is u / (|u| eps): an eps of 1e-8 would flood Adam's
    # second moment for hundreds of steps. |u| is about sqrt(2 d), so that 1e-2 is out of the way at once.
    cosine = (1 - F.cosine_similarity(v, u, dim=1, eps=1e-2)).mean()
    return mse.mean() + w_cos * cosine, mse.detach(), cosine.detach()


def by_time(values, t, bins):
    """Values (B,) at times t (B,) -> their sums and numbers in equal bins of [0, 1], (bins,) each, without waiting for
    the device. The loss varies more with t than over most of the training, so only like compares with like."""
    member = F.one_hot((t * bins).long().clamp_max(bins - 1), bins).to(values.dtype)  # (B, bins)
    return values @ member, member.sum(0)


# -------------------------------------------------------------------------------------------------- image metrics

def psnr(x, y):
    """Peak signal-to-noise ratio in dB, per image (B,), of (B, 3, H, W) in [-1, 1]."""
    return 10 * torch.log10(4 / (x.double() - y.double()).square().mean((1, 2, 3)).clamp_min(1e-20))


def ssim(x, y):
    """Structural similarity (Wang et al. 2004), per image (B,), of (B, 3, H, W) in [-1, 1], sides >= 11.

    Gaussian window 11x11, sigma 1.5, valid positions only, K1 .01, K2 .03, population covariance, mean over RGB."""
    if min(x.shape[-2:]) < 11:
        raise UserError(f"SSIM needs sides of at least 11, not {x.shape[-2]}x{x.shape[-1]}")
    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2  # data range 1
    window = torch.tensor([math.exp(-(i - 5) ** 2 / (2 * 1.5 ** 2)) for i in range(11)], dtype=x.dtype, device=x.device)
    window = window / window.sum()

    def blur(t):
        t = F.conv2d(t.flatten(0, 1)[:, None], window.view(1, 1, 1, 11))
        return F.conv2d(t, window.view(1, 1, 11, 1)).view(len(x), -1)  # (B, 3*h*w)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean(1)
