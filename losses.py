"""The losses of AlignTok and of its generator, each under the paper's equation.

    Eq. 1    L_rec = L1(x, x^) + w_p L_perceptual + w_g L_GAN    all stages
    Sec. 3   L_sp  = L2(z0*, z0)                                 stage 2
             L     = E || v(z_t, t) - (z1 - z0) ||^2             the generator

Reductions (a choice; the paper names none): L1, L_sp and the flow-matching loss are means over all
elements. LPIPS is a mean over positions, a sum over five layers, a mean over the batch. L_GAN is a
mean over patches and batch. The discriminator, its hinge loss and the adaptive w_g are VA-VAE's
(PatchGAN, Isola et al. 2017; adaptive weight, Esser et al. 2021).

Images are (B, 3, H, W) in [-1, 1]. Under autocast VGG16 and PatchGAN run in its type; norms,
distances, means and the adaptive weight are always fp32.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- Eq. 1: reconstruction

# L1(x, x^) + w_p L_perceptual
def reconstruction_loss(x, recon, lpips, w_p):
    """Eq. 1 without its last term, which training_step adds. Returns (sum, L1, L_perceptual),
    scalars. lpips: an LPIPS, or None where w_p = 0."""
    l1 = (x - recon).abs().mean()
    if lpips is None or w_p == 0:
        return l1, l1, torch.zeros_like(l1)
    perceptual = lpips(x, recon).mean()
    return l1 + w_p * perceptual, l1, perceptual


# L_GAN, the hinge loss of both sides: means over the batch and the patches
def hinge_g(fake):
    """The generator's side, L_GAN = -E D(x^)."""
    return -fake.float().mean()


def hinge_d(real, fake):
    """The discriminator's side: .5 (E relu(1 - D(x)) + E relu(1 + D(x^)))."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


ADAPTIVE_LIMIT = 1e4


# w_g = --w-g * |grad L_rec| / (|grad L_GAN| + 1e-4), the gradients at the decoder's last layer
def adaptive_weight(rec, other, last_layer, limit=ADAPTIVE_LIMIT, beside=0):
    """|grad rec| / (|grad other| + 1e-4) at a last layer, clamped to [0, limit], detached.
    With this weight the other loss pulls at that layer as strongly as the reconstruction loss does.
    L_GAN is weighed at the decoder's last layer, VA-VAE's VF loss at the encoder's. beside: what
    else counts as reconstruction.

    Under DDP the gradients are averaged over the ranks before the norms are taken (a mean of norms
    is another number), so every rank gets the same weight."""
    grads = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                         for loss in (rec + beside, other)])
    rec_norm, other_norm = average_over_ranks(grads.float()).flatten(1).norm(dim=1)
    return (rec_norm / (other_norm + 1e-4)).clamp(0, limit)


def linearised(loss, recon):
    """sum(g * x^) with the constant g = dL/dx^. Its gradient at x^ is g, as that of L is; so by the
    chain rule every weight of the tokenizer gets the gradient of L.

    The adaptive weight and the step both need this gradient. g is computed once, so the pass back
    through VGG16 and D is made once."""
    return (torch.autograd.grad(loss, recon)[0] * recon).sum()


# ---- stage 2: semantic preservation

# L_sp = L2(z0*, z0)
def semantic_preservation(z0, z0_ref, kind="l2", dim=1):
    """The distance of the latents in training from those of the frozen stage-1 encoder and adapter.
    z0 is the paper's z0*, z0_ref the paper's z0.

    Latents (B, d, h, w) with dim=1; or, for the ablation "before the adapter", tokens (B, N, D)
    with dim=-1. kind "l2": the mean of squares over all elements; "cosine", the other ablation:
    1 - cosine over the channels, mean over the positions."""
    z0, z0_ref = z0.float(), z0_ref.detach().float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(z0, z0_ref, dim=dim).mean()
    return F.mse_loss(z0, z0_ref)


# ---- of the other tokenizers

# KL(N(mean, var) || N(0, I))
def kl_divergence(moments):
    """Of mean | log-variance (B, 2d, h, w): summed over the dimensions, mean over the batch."""
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


# VF = mean relu(1 - m_cos - cos(F, z')) + mean relu(|S(z') - S(F)| - m_dist)
def vf_loss(z_proj, tokens, m_cos=0.5, m_dist=0.25):
    """VA-VAE's loss toward the foundation encoder: marginal cosine similarity and marginal distance
    matrix similarity. z_proj: z' (B, D, h, w); tokens: F (B, N, D), N = h*w; S: the cosines between
    the tokens of an image (B, N, N)."""
    z = F.normalize(z_proj.float().flatten(2).transpose(1, 2), dim=-1)  # (B, N, D)
    f = F.normalize(tokens.float(), dim=-1)
    with torch.autocast(z.device.type, enabled=False):
        difference = (z @ z.transpose(1, 2) - f @ f.transpose(1, 2)).abs()  # (B, N, N)
    cosine = (z * f).sum(-1)  # (B, N)
    return F.relu(1 - m_cos - cosine).mean() + F.relu(difference - m_dist).mean()


def ssim(x, y, signed=False):
    """Structural similarity (Wang et al. 2004), per image (B,), of (B, 3, H, W) in [-1, 1]. signed:
    of these values themselves, whose means may cancel; else of those in [0, 1], as all figures are.

    Gaussian window 11x11, sigma 1.5, valid positions only, K1 .01, K2 .03, population covariance,
    mean over RGB. ValueError for sides below 11."""
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs sides of at least 11, not {x.shape[-2]}x{x.shape[-1]}")
    x, y = (t.double() / 2 + (0 if signed else 0.5) for t in (x, y))  # of range 1
    window = x.new_tensor([math.exp(-(i - 5) ** 2 / (2 * 1.5 ** 2)) for i in range(11)])
    window = window / window.sum()

    def blur(t):
        # the window is a row times a column
        t = F.conv2d(t.flatten(0, 1)[:, None], window.view(1, 1, 1, 11))
        return F.conv2d(t, window.view(1, 1, 11, 1)).view(len(x), -1)  # (B, 3*h*w)

    mx, my = blur(x), blur(y)
    vx, vy = blur(x * x) - mx * mx, blur(y * y) - my * my
    cov = blur(x * y) - mx * my  # (B, 3*h*w)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    numerator = (2 * mx * my + c1) * (2 * cov + c2)
    return (numerator / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean(1)


# ---- the generator: flow matching

def logit_normal(normal, shift=1.0):
    """N(0, 1) -> t = sigmoid(normal) in (0, 1): the middle of the path, where the velocity is
    hardest, is seen most. A shift a > 1 moves it toward noise: a t / (1 + (a - 1) t)."""
    t = torch.sigmoid(normal)
    return shift * t / (1 + (shift - 1) * t)


# z_t = (1 - t) z0 + t z1,  u = z1 - z0,  L = E || v(z_t, t) - u ||^2
# [+ w_cos E (1 - cos(v, u)), LightningDiT's velocity-direction loss]
def flow_matching(model, z0, z1, t, y, w_cos=0.0):
    """The paper's objective: t = 0 is data, t = 1 is noise.

    z0: normalised latents (B, d, h, w); z1: noise like them; t: (B,); y: classes (B,). || . ||^2 is
    a mean over all elements, the cosine runs over the channels of each position. Returns (L,
    squared error per image (B,), mean of 1 - cos); of these only L has a gradient."""
    t_ = t.view(-1, 1, 1, 1)
    z_t = (1 - t_) * z0 + t_ * z1
    u = z1 - z0
    v = model(z_t, t, y).float()
    mse = (v - u).square().mean((1, 2, 3))  # (B,)
    # At first v is exactly 0. There the gradient of the cosine is u / (|u| eps): with an eps of
    # 1e-8 it would flood Adam's second moment for hundreds of steps. |u| is about sqrt(2 d), so
    # 1e-2 soon plays no part.
    cosine = (1 - F.cosine_similarity(v, u, dim=1, eps=1e-2)).mean()
    return mse.mean() + w_cos * cosine, mse.detach(), cosine.detach()


# ---- the two networks behind Eq. 1

class LPIPS(nn.Module):
    """L_perceptual: LPIPS v0.1 with VGG16 (Zhang et al. 2018); equals the package `lpips`
    (net="vgg").

    Its weights are two files, which files.load_lpips reads: torchvision's VGG16 and the five linear
    heads. It is always frozen and in eval mode; gradients reach the second image alone."""
    taps = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for blocks, c in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(blocks):
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
                c_in = c
            layers.append(nn.MaxPool2d(2))
        self.vgg16 = nn.Sequential(*layers[:-1])  # up to relu5_3
        self.heads = nn.ModuleList(
            nn.Conv2d(c, 1, 1, bias=False) for c in (64, 128, 256, 512, 512))
        # from [-1, 1] to torchvision's normalisation of [0, 1]
        for name, value in (("shift", [-0.030, -0.088, -0.188]),
                            ("scale", [0.458, 0.448, 0.450])):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def train(self, mode=True):
        return super().train(False)

    def features(self, x):
        """Yields the features (B, C, h, w) at each tap."""
        x = (x - self.shift) / self.scale
        x = x.contiguous(memory_format=torch.channels_last)
        for i, layer in enumerate(self.vgg16):
            x = layer(x)
            if i in self.taps:
                yield x

    def distance(self, f, g, head):
        """Features of two images at a tap, scaled to unit norm over the channels; the head's sum of
        their squared differences, averaged over the positions: (B,)."""
        f, g = (x.float() for x in (f, g))
        # the clamp keeps the root's gradient finite where all channels are zero
        f, g = (x / (x.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)
                for x in (f, g))
        with torch.autocast(f.device.type, enabled=False):
            return head((f - g).square()).mean((1, 2, 3))

    def forward(self, x, y):
        """(B, 3, H, W) twice, in [-1, 1] -> distance per image (B,), >= 0."""
        with torch.no_grad():
            target = list(self.features(x))
        return sum(map(self.distance, target, self.features(y), self.heads))


class PatchGAN(nn.Module):
    """D: the 70x70 patch discriminator of pix2pix, as in LDM: (B, 3, H, W) in [-1, 1] -> logits
    (B, 1, h', w'). 2,765,633 parameters at ch = 64."""

    def __init__(self, ch=64):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            layers += [nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False),
                       BatchNorm(c_out), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.main(x.contiguous(memory_format=torch.channels_last))


# ---- over the ranks of a distributed run

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
    """BatchNorm2d whose batch is that of all ranks, on CPUs and GPUs (torch's SyncBatchNorm refuses
    CPU tensors)."""

    def forward(self, x):
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            xf = x.float()
            # the number of values too: ranks may have other sizes, as VFM-VAE draws its scales
            count = xf.new_full((1,), x.numel() // x.shape[1])
            total = _SumOverRanks.apply(torch.cat([xf.sum((0, 2, 3)), count]))
            count = total[-1].detach()
            mean = total[:-1] / count  # (C,)
            centred = xf - mean.view(-1, 1, 1)
            # biased, as BatchNorm normalises; the running variance is unbiased
            var = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
            scale = self.weight * (var + self.eps).rsqrt()
            return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)
