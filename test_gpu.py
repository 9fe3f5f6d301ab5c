"""What a GPU computes, beside what a CPU does; what only a GPU does.

    python test_smoke.py --device cuda [--out FOLDER] [words]   some minutes on one GPU
    python test_smoke.py --device cpu compiled fake             what needs none

A line a figure: PASS, FAIL or SKIP, its name, the figure, its bound, the seconds of its check. With
--out the same as FOLDER/CHECK.json. Networks and images are random; there is nothing to download.
"""
import argparse
import contextlib
import copy
import json
import signal
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import baselines
import fid
import losses
import repa
import runs
import sample
import train_dit
import train_tokenizer as tt
import vfm_vae
from baselines import VAE
from data import to_uint8
from mmdit import MMDITS, DoubleBlock, MMDiT, SingleBlock
from model import DECODERS, DITS, ENCODERS, Decoder, DINOv2, LightningDiT, Tokenizer, update_ema
from test_smoke import complete, end, folder, kill, random_weights, stage_by_hand, start

FP32, BF16 = torch.float32, torch.bfloat16
SMALL_ENCODER = {"dim": 64, "depth": 2, "grid": 2}
SMALL_DECODER = {"ch": 8, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2}


# ---- the same numbers as on a CPU

class Call(nn.Module):
    """A function as a network; `network`, if it has one."""

    def __init__(self, function, network=None):
        super().__init__()
        self.function, self.network = function, network

    def forward(self, *inputs):
        return self.function(*([self.network] if self.network else []), *inputs)


def networks():
    """name -> (network, inputs)."""
    def image(side, n=2):
        return torch.rand(n, 3, side, side) * 2 - 1

    dit = {"dim": 384, "depth": 4, "heads": 6, "grid": (8, 8)}
    flow = torch.randn(2, 32, 8, 8), torch.rand(2), torch.tensor([0, 999])
    small = {"dim": 384, "depth": 4}
    z, y = torch.randn(2, 2, 32, 8, 8)
    whole = torch.rand(2, 3, 128, 128).mul(255).byte().float()  # bytes have no gradient
    inception = fid.Inception()
    for conv in inception.modules():  # else nothing of the image is left in the features
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    return {
        "dinov2": (DINOv2(**small), image(224)),
        "dinov2 registers": (DINOv2(**small, registers=4), image(224)),
        "features": (Call(DINOv2.features, DINOv2(**small)), image(256)),
        "decoder": (Decoder(**DECODERS["vavae"]), torch.randn(1, 32, 8, 8)),
        "encoder": (baselines.Encoder(**DECODERS["vavae"]), image(128, 1)),
        "patchgan": (losses.PatchGAN(), image(128)),
        "lpips": (losses.LPIPS(), image(128), image(128)),
        "lightningdit": (LightningDiT(**dit), *flow),
        "lightningdit qk-norm": (LightningDiT(**dit, qk_norm=True), *flow),
        "mmdit": (MMDiT(grid=(8, 8), text=22, pooled=8, **MMDITS["tiny"]), *flow[:2],
                  torch.randn(2, 3 * 22 + 8)),
        "vfm-vae": (Call(vfm_vae.VFMVAE.decode, vfm_vae.VFMVAE(
            {"dinov2": SMALL_ENCODER}, **vfm_vae.reading_sizes("tiny", DINOv2(**SMALL_ENCODER)))),
            torch.randn(1, 32, 8, 8)),
        "inception tf1": (inception, whole),
        "inception torch": (Call(lambda net, x: net(x, "torch"), inception), whole),
        "l1": (Call(lambda a, b: losses.reconstruction_loss(a, b, None, 0)[0]), image(64),
               image(64)),
        "l_sp": (Call(losses.semantic_preservation), z, y),
        "l_sp cosine": (Call(lambda a, b: losses.semantic_preservation(a, b, "cosine")), z, y),
        "hinge": (Call(losses.hinge_d), z, y),
        "hinge of G": (Call(losses.hinge_g), z),
        "ssim": (Call(lambda a, b: losses.ssim(a, b).mean()), image(64), image(64)),
        "kl": (Call(losses.kl_divergence), z),
        "vf": (Call(losses.vf_loss), z, torch.randn(2, 64, 32)),
        "flow matching": (Call(lambda a, b: losses.flow_matching(
            lambda z_t, t, _: torch.sin(3 * z_t), a, b, torch.tensor([0.2, 0.7], device=a.device),
            None, 1.0)[0]), z, y),
    }


def outcome(network, inputs, device, dtype, of_inputs=True):
    """Output and gradients, on the CPU in fp64, of the same weights and inputs on a device."""
    network = copy.deepcopy(network).to(device)
    inputs = [x.to(device, copy=True) for x in inputs]
    for x in inputs:
        x.requires_grad_(of_inputs and x.is_floating_point())
    with runs.autocast(device, dtype):
        out = network(*inputs)
    while not torch.is_tensor(out):
        out = out["pool"] if isinstance(out, dict) else out[-1]
    out.float().square().mean().sqrt().backward()
    leaves = dict(network.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}
    return out.detach().cpu().double(), {
        name: x.grad.cpu().double() for name, x in leaves.items() if x.grad is not None}


# Relative norms, of the output and of the worst gradient
BOUNDS = {"fp32": (1e-5, 1e-4), "torch's flags": (2e-3, 2e-2), "bf16": (2e-2, 5e-2)}
# Where rounding turns the sign of a ReLU's input, the gradient takes another way. A CPU that rounds
# its operands so differs from itself by .025 (TF32, both networks), in fp32 from fp64 by 8e-5
# (LPIPS); the encoder of the VAE, of 25 convolutions in a row, in bf16 by .0195 and .052, VFM-VAE's decoder
# in bf16 by .010 and .11.
LOOSER = {"lpips": {"fp32": (1e-5, 1e-3), "torch's flags": (2e-3, 5e-2), "bf16": (0.1, 0.1)},
          "patchgan": {"torch's flags": (2e-3, 5e-2), "bf16": (0.1, 0.1)},
          "encoder": {"bf16": (3e-2, 0.1)}, "vfm-vae": {"bf16": (2e-2, 0.2)}}


def compare(device):
    for name, (network, *inputs) in networks().items():
        yield name, partial(differences, name, network, inputs, device)


def differences(name, network, inputs, device):
    """Relative norm of what differs: of the output, and of the worst parameter's gradient."""
    torch.manual_seed(0)
    random_weights(network, scale=0.02)
    of_inputs = not name.startswith(("dinov2", "features"))  # an encoder's image needs none
    wanted, gradients = outcome(network, inputs, torch.device("cpu"), FP32, of_inputs)
    largest = max(g.norm() for g in gradients.values())
    for mode, (bound, gradient_bound) in (BOUNDS | LOOSER.get(name, {})).items():
        if name.startswith("inception") and mode == "bf16":
            continue  # figures are never in bf16
        dtype, tf32 = BF16 if mode == "bf16" else FP32, mode == "torch's flags"
        torch.backends.cudnn.allow_tf32 = tf32
        found, own = outcome(network, inputs, device, dtype, of_inputs)
        torch.backends.cudnn.allow_tf32 = False
        yield f"{name}, {mode}", ((found - wanted).norm() / wanted.norm()).item(), bound
        if name.startswith("inception"):
            continue  # nothing asks for its gradient
        # a gradient that is zero but for rounding has no relative error
        worst = max((own[k] - g).norm() / max(g.norm(), 1e-3 * largest)
                    for k, g in gradients.items())
        yield f"{name}, {mode}, gradient", worst.item(), gradient_bound


def sampler(device):
    yield "sampler", partial(sampled, device)


def sampled(device):
    """Eight guided steps of Heun to bytes: how many per cent differ, and by how much."""
    torch.manual_seed(0)
    # with weights of .2, two kernels of one CPU would differ in .12 % of the bytes
    dit = random_weights(LightningDiT(**DITS["tiny"], grid=(4, 4), num_classes=12), scale=0.1)
    tokenizer = Tokenizer(ENCODERS["tiny14"], DECODERS["tiny"]).eval()
    tokenizer.latent_std.fill_(1)
    def images(where):
        dit.to(where)
        tokenizer.to(where)
        x, _ = sample.generate(dit, tokenizer, list(range(8)), torch.arange(12).numpy(), 0,
                               sample.time_grid(8), "heun", cfg=2.0)
        return torch.from_numpy(to_uint8(x)).int()

    off = (images(torch.device("cpu")) - images(device)).abs()
    yield "sampler, % of bytes", 100 * (off > 0).float().mean().item(), 0.1
    yield "sampler, largest difference", off.max().item(), 1


# ---- what only a GPU does

def stage_on(device, stage, dtype, width="tiny"):
    """(s, args, x): a stage's networks at their real or their smallest size."""
    encoder, decoder, side, n = {
        "tiny": ("tiny14", "tiny", 64, 4), "paper": ("vitb14", "vavae", 256, 4)}[width]
    torch.manual_seed(0)
    tokenizer = Tokenizer(ENCODERS[encoder], DECODERS[decoder]).to(device)
    tokenizer.requires_grad_(False).eval()
    for name, part in tokenizer.named_children():
        if name in tt.STAGES[stage]["trains"]:
            part.requires_grad_(True).train()
    tokenizer.latent_std.fill_(1)
    frozen = copy.deepcopy(tokenizer).requires_grad_(False) if stage == 2 else None
    s, args = stage_by_hand(tokenizer, losses.PatchGAN(16).to(device), frozen)
    args.w_p, s.lpips = 1.0, losses.LPIPS().to(device)
    s.autocast = partial(runs.autocast, device, dtype)
    s.ema, s.meter = copy.deepcopy(tokenizer).requires_grad_(False), runs.Meter(device)
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    s.opt_g = torch.optim.Adam(trained, 1e-4, fused=True)
    s.opt_d = torch.optim.Adam(s.discriminator.parameters(), 1e-4, fused=True)
    return s, args, torch.rand(n, 3, side, side, device=device) * 2 - 1


def system_on(device, network, frozen, noise, gan):
    """(s, args, inputs, gan): what tt.training_step takes for a network of AlignTok, VAE, VA-VAE or
    VFM-VAE, with all losses. frozen: AlignTok's reference, and VA-VAE's encoder."""
    s, args = stage_by_hand(network, losses.PatchGAN(16).to(device), frozen)
    s.lpips, args.w_p, inputs = random_weights(losses.LPIPS(), scale=0.02).to(device), 1.0, []
    if isinstance(network, VAE):
        inputs = [noise]
        args.model, s.reference = (
            ("vavae", frozen.encoder) if network.arguments["vf_dim"] else ("vae", None))
        s.objective = partial(baselines.objective, s, args)
    if isinstance(network, vfm_vae.VFMVAE):
        s.stage, s.steps_before, s.step, s.steps = "strong", 0, 0, 8
        args.w_gan, args.disc_start, inputs = float(gan), 0, [noise]
        s.discriminator = s.ddp_discriminator = vfm_vae.Discriminators(
            losses.PatchGAN(16), 16, last_stage=False).to(device)
        s.objective = partial(vfm_vae.objective, s, args)
        gan = False  # it has its own
    return s, args, inputs, gan


def generator_on(device, dtype, model=None, condition=None, loss=losses.flow_matching):
    """(s, args, batch) of train_dit.py. condition: labels by default."""
    if model is None:
        model = LightningDiT(**DITS["tiny"], grid=(4, 4), num_classes=12)
    model = model.to(device)
    s = SimpleNamespace(model=model, ddp_model=model, encode=False, shift=1.0,
                        flow_matching=loss, meter=runs.Meter(device),
                        ema=copy.deepcopy(model).requires_grad_(False),
                        trained=[p for p in model.parameters() if p.requires_grad],
                        autocast=partial(runs.autocast, device, dtype))
    s.opt = torch.optim.AdamW(s.trained, 1e-4, fused=True)
    z0, z1 = torch.randn(2, 4, 32, 4, 4, device=device)
    if condition is None:
        condition = torch.tensor([0, 1, 2, 12], device=device)
    batch = z0, condition, torch.randn(4, device=device), z1
    return s, train_dit.parse(["--preset", "tiny"]), batch


def waits(device):
    """Three steps in which nothing waits for the device. The first one may: cuDNN looks around."""
    def places(work):
        """The lines that make work wait."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{Path(w.filename).name}:{w.lineno}" for w in seen
                if "called a synchronizing" in str(w.message)]

    def waiting(name, step, arguments):
        step(*arguments)
        found = places(lambda: [step(*arguments) for _ in range(3)])
        yield f"{name} waits for the device {' '.join(sorted(set(found)))}", len(found), 0

    def seen():
        number = len(places(torch.ones((), device=device).item))
        yield "a wait that is not seen", abs(number - 1), 0

    def step_tokenizer(s, args, x):
        s.meter.add(1, tt.training_step(x, [], s, args, True, True))
        tt.update(s, args)

    def step_generator(s, args, batch):
        s.meter.add(1, train_dit.training_step(batch, s, args, True))
        train_dit.update(s, args)

    rows = [(f"stage {k}", step_tokenizer, stage_on(device, k, BF16)) for k in (1, 2, 3)]
    rows.append(("the generator", step_generator, generator_on(device, BF16)))
    yield "a wait", seen
    for row in rows:
        yield row[0], partial(waiting, *row)


def compiled(device, system):
    """Loss and gradients of compiled networks beside eager ones; the number of graphs.

    On a GPU at the real widths (VFM-VAE and MMDiT: tiny), in bf16 without a GAN, and with it in
    fp32, with checkpointing: a critic with random weights makes 40 % of bf16's rounding, in eager
    mode too. On a CPU the graphs are traced and run, but not turned into kernels, at small widths
    in fp32."""
    gpu = device.type == "cuda"
    compiler = torch.compile if gpu else partial(torch.compile, backend="aot_eager")
    decoder = DECODERS["vavae"] if gpu else SMALL_DECODER
    encoder = ENCODERS["vitb14"] if gpu else SMALL_ENCODER
    side, dim = (256, 768) if gpu else (64, 64)
    x = torch.rand(2, 3, side, side, device=device) * 2 - 1
    noise = torch.randn(2, 32, side // 16, side // 16, device=device)
    labels, t = torch.tensor([1, 3], device=device), torch.tensor([0.2, 0.7], device=device)
    rows = torch.randn(2, 22 * 3 + 8, device=device)  # three tokens of text, and the pooled one

    def objective(network, compile, dtype, gan):
        """The loss of a step of training, after its backward pass."""
        if isinstance(network, (LightningDiT, MMDiT)):
            with runs.autocast(device, dtype):
                condition = labels if isinstance(network, LightningDiT) else rows
                loss, *_ = losses.flow_matching(network, noise, noise.flip(0), t, condition, 1.0)
            loss.backward()
            return loss
        frozen = Tokenizer(encoder, decoder).to(device).requires_grad_(False)
        frozen.latent_std.fill_(1)
        s, args, inputs, gan = system_on(device, network, frozen, noise, gan)
        s.autocast = partial(runs.autocast, device, dtype)
        if compile:
            runs.compile_parts([(s.lpips, "distance")])
        return tt.training_step(x, inputs, s, args, gan, True)["rec"]

    def step(build, compile, checkpointing, dtype, gan):
        torch.manual_seed(0)
        network = random_weights(build(), scale=0.02).to(device).train()
        flags = SimpleNamespace(compile=compile, checkpointing=checkpointing)
        runs.make_fast(network, flags, device, vfm_vae.ConvNeXtLayer, DoubleBlock, SingleBlock)
        with patch.object(vfm_vae, "draw_transform", lambda *_: vfm_vae.Transform()):
            loss = objective(network, compile, dtype, gan)
        return loss.item(), torch.cat([p.grad.flatten().float() for p in network.parameters()
                                       if p.grad is not None])

    def beside_eager(name, build, graphs, *how):
        loss, gradients = step(build, False, *how)
        if FP32 in how:  # a control: what differs from call to call in eager mode
            _, again = step(build, False, *how)
            control = (gradients - again).norm() / gradients.norm()
            yield f"{name}, gradient of a second eager step", control.item(), 5e-3
        torch._dynamo.reset()
        stats = torch._dynamo.utils.counters
        stats.clear()
        with patch("torch.compile", compiler):
            own, found = step(build, True, *how)
        bound = 5e-2 if BF16 in how else 5e-3 if gpu else 5e-5
        yield f"compiled {name}, loss", abs(own - loss) / abs(loss), bound / 5
        yield (f"compiled {name}, gradient",
               ((gradients - found).norm() / gradients.norm()).item(), bound)
        own = stats["stats"]["unique_graphs"]
        yield f"compiled {name}, {own} of {graphs} graphs", abs(own - graphs), 0
        yield f"compiled {name}, broken graphs", sum(stats["graph_break"].values()), 0

    dit = {"grid": noise.shape[2:], "d": 32, "num_classes": 5} | (
        DITS["B/1"] if gpu else {"dim": 32, "depth": 2, "heads": 2})
    mmdit = {"grid": noise.shape[2:], "patch": 1, "text": 22, "pooled": 8} | MMDITS["tiny"]
    vfm = vfm_vae.reading_sizes("tiny", DINOv2(**encoder))
    # with LPIPS, whose five taps are five graphs
    build, graphs, graphs_checkpointing = {
        "stage-2": (lambda: Tokenizer(encoder, decoder), 7, 13),
        "vavae": (lambda: VAE(decoder, 32, dim), 11, 14),
        "vfmvae": (lambda: vfm_vae.VFMVAE({"dinov2": encoder}, **vfm), 11, 12),
        "lightningdit": (lambda: LightningDiT(**dit), 1, 1),
        "mmdit": (lambda: MMDiT(**mmdit), 2, 2)}[system]
    plain = (False, BF16, False) if gpu else (False, FP32, True)  # checkpointing, dtype, GAN
    yield system, partial(beside_eager, system, build, graphs, *plain)
    name = f"{system}, checkpointing"
    yield name, partial(beside_eager, name, build, graphs_checkpointing, True, FP32, True)


def fake(device):
    yield "fake", fake_steps


def fake_steps():
    """Every training step and forward pass on a CUDA device that is not there: tensors with a shape
    and a device, but no numbers, so that one which was left on the CPU is found. The backward
    passes need a driver, and are left out."""
    mode, cpu, cuda = FakeTensorMode(), torch.device("cpu"), torch.device("cuda:0")

    def on_cuda(x):
        return FakeTensor(mode, x.detach().to("meta"), cuda)

    def moved(*networks):
        for part in (part for network in networks if network for part in network.modules()):
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(on_cuda(p), p.requires_grad)
            for name, b in part._buffers.items():
                if b is not None:
                    part._buffers[name] = on_cuda(b)
        return networks[0]

    def gradient(loss, leaves, **_):
        return [torch.zeros_like(x) for x in (leaves if isinstance(leaves, list) else [leaves])]

    def on_the_cpu(name, found):
        return f"{name}, figures on the CPU", sum(x.is_cpu for x in found), 0

    encoder = DINOv2(**SMALL_ENCODER).requires_grad_(False)
    frozen = Tokenizer(SMALL_ENCODER, SMALL_DECODER).requires_grad_(False)
    frozen.latent_std.fill_(1)
    image, noise = torch.rand(2, 3, 64, 64), torch.randn(2, 32, 4, 4)
    steps = {f"stage {k}": (*stage_on(cpu, k, FP32), [], True) for k in (1, 2, 3)}
    vfm = vfm_vae.reading_sizes("tiny", encoder)
    for name, network in (("VAE", VAE(SMALL_DECODER)), ("VA-VAE", VAE(SMALL_DECODER, vf_dim=64)),
                          ("VFM-VAE", vfm_vae.VFMVAE({"dinov2": SMALL_ENCODER}, **vfm))):
        s, args, inputs, gan = system_on(cpu, network.train(), frozen, noise, True)
        s.ema = copy.deepcopy(network)
        steps[name] = s, args, image, inputs, gan
    aligned = DITS["tiny"] | {"width": encoder.dim, "grid": (4, 4), "num_classes": 12}
    generators = {"LightningDiT": generator_on(cpu, FP32)}
    mmdit = MMDiT(grid=(4, 4), text=22, pooled=8, **MMDITS["tiny"])
    generators["MMDiT"] = generator_on(cpu, FP32, mmdit, torch.randn(4, 3 * 22 + 8))
    for align in ("repa", "reg"):
        s, args, batch = generator_on(cpu, FP32, repa.AlignedDiT(align, **aligned),
                                      loss=partial(repa.flow_matching, encoder))
        generators[align] = s, args, (*batch, image.repeat(2, 1, 1, 1), torch.randn(4, encoder.dim))
    moved(encoder)
    # without a driver torch would switch bf16 off
    with (patch.object(torch.Tensor, "backward", lambda loss: None),
          patch("torch.autograd.grad", gradient),
          patch.object(vfm_vae, "draw_transform", lambda *_: vfm_vae.Transform()),
          patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
          patch("torch.cuda.is_bf16_supported", lambda *_, **__: True)):
        autocast = partial(runs.autocast, cuda, BF16)
        for name, (s, args, x, inputs, gan) in steps.items():
            moved(s.tokenizer, s.discriminator, s.lpips, s.reference, s.ema)
            x, inputs, s.autocast = on_cuda(x), list(map(on_cuda, inputs)), autocast
            with mode:
                log = tt.training_step(x, inputs, s, args, gan, True)
                update_ema(s.ema, s.tokenizer, 0.9)
            yield on_the_cpu(name, log.values())
        for name, (s, args, batch) in generators.items():
            moved(s.model)
            batch, s.autocast = tuple(map(on_cuda, batch)), autocast
            with mode:
                yield on_the_cpu(name, train_dit.training_step(batch, s, args, True).values())
        inception, dit = moved(fid.Inception()), generators["LightningDiT"][0].model
        flux = {"ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 1}
        tokenizers = {name: s.tokenizer for name, (s, *_) in steps.items()}
        tokenizers["VAE of FLUX"] = moved(baselines.FluxVAE(flux))
        bytes, image, noise = on_cuda(image.byte()), on_cuda(image), on_cuda(noise)
        velocity = sample.Velocity(dit, on_cuda(torch.tensor([1, 2])), 3.0)
        with mode, torch.no_grad():
            for rule in ("tf1", "torch"):
                yield on_the_cpu(f"Inception, {rule}", inception(bytes, rule).values())
            for name, tokenizer in tokenizers.items():
                tokenizer.has_statistics = True
                z = tokenizer.normalize(tokenizer.encode(image))
                yield on_the_cpu(f"{name}, latents", [z, tokenizer.decode(tokenizer.unnormalize(z))])
            times = sample.time_grid(3)
            yield on_the_cpu("sampler", [sample.integrate(velocity, noise, times, "heun")])
            yield on_the_cpu("DiffAug", [vfm_vae.diffaug(image)])
            yield on_the_cpu("PSNR, SSIM", [fid.psnr(image, image), losses.ssim(image, image)])


def scripts(device):
    yield "scripts", tiny_scripts


def tiny_scripts():
    """The scripts as processes: the preset tiny, 12 steps a stage; a stop and a resume of
    train_dit; sample and fid. Beside them torchrun with one rank: stage 1 compiled, then stage 2,
    which has a GAN."""
    with folder() as d, contextlib.ExitStack() as ends:
        tiny = ["--preset", "tiny", "--encoder", "random:tiny14", "--steps", 12, "--disc-start", 12,
                "--val-images", 64, "--encode-images", 256]

        def torchrun(*flags):
            ranks = start("train_tokenizer.py", *tiny, *flags, "--out", d / "torchrun", ranks=1)
            ends.callback(kill, ranks)
            return ranks

        def complete_ranks(ranks):
            said = end(ranks)
            assert ranks.returncode == 0, said[-3000:]

        ranks = torchrun("--stage", 1, "--compile")
        complete("train_tokenizer.py", *tiny, "--out", d / "alone")
        yield "train_tokenizer.py, alone", 0, 0
        flags = [*tiny[:2], "--tokenizer", d / "alone/stage3.pt", "--out", d / "dit", "--data",
                 "shapes", "--save-every", 20]
        process = start("train_dit.py", *flags, "--steps", 100_000)
        ends.callback(kill, process)
        deadline = time.time() + 100
        while not list(d.glob("dit/dit_step*.pt")) and time.time() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert "stopped by a signal" in end(process), "no stop by SIGTERM"
        saved = int(max(d.glob("dit/dit_step*.pt")).stem[-8:])
        complete("train_dit.py", *flags, "--steps", saved + 10)
        yield "train_dit.py, stopped and resumed", 0, 0
        complete_ranks(ranks)
        yield "train_tokenizer.py, torchrun, stage 1 compiled", 0, 0
        ranks = torchrun("--stage", 2)
        complete("sample.py", *tiny[:2], "--dit", d / f"dit/dit_step{saved + 10:08d}.pt",
                 "--tokenizer", d / "alone/stage3.pt", "-n", 64, "--steps", 8, "--out", d / "s.npz")
        complete("fid.py", "--probe", d / "alone/stage3.pt", "shapes", "shapes")
        complete("fid.py", d / "s.npz", d / "s.npz", "--features", "dinov2", "--encoder",
                 d / "alone/stage3.pt")
        yield "sample.py, fid.py", 0, 0
        complete_ranks(ranks)
        yield "train_tokenizer.py, torchrun, stage 2", 0, 0


# ---- to run them

CHECKS = {"compare": compare, "sampler": sampler, "waits": waits, "fake": fake, "scripts": scripts}
for system in ("stage-2", "vavae", "vfmvae", "lightningdit", "mmdit"):
    CHECKS[f"compiled-{system}"] = partial(compiled, system=system)
NEED_A_GPU = ("compare", "sampler", "waits")


def run_check(name, check, device, seconds):
    """Says and returns the rows of a check. What fails in one part does not hide the next; after
    the deadline none begins."""
    rows, began = [], time.time()

    def say(result, title, figure, bound):
        took = round(time.time() - began, 1)
        rows.append({"result": result, "name": title, "figure": figure, "bound": bound,
                     "seconds": took})
        number = f"{figure:.3g}" if isinstance(figure, float) else figure
        print(f"{result} {title}: {number} ({bound}) {took} s", flush=True)

    def failed(title, e):
        traceback.print_exception(e)
        say("FAIL", title, f"{type(e).__name__}: {str(e).splitlines()[:1]}", "-")

    def late(*_):
        raise TimeoutError(f"after {seconds} s")

    if name in NEED_A_GPU and device.type == "cpu":
        say("SKIP", name, "no GPU", "-")
        return rows
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
    try:
        for part, figures in check(device):
            if time.time() - began >= seconds:  # a compiler may have wrapped the time-out
                late()
            try:
                for title, figure, bound in figures():
                    # not `>`: NaN is above no bound
                    say("PASS" if figure <= bound else "FAIL", title, figure, bound)
            except TimeoutError:
                raise
            except Exception as e:  # noqa: BLE001, whatever a part raises is its failure
                failed(f"{name}, {part}", e)
    except Exception as e:  # noqa: BLE001, as above
        failed(name, e)
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("words", nargs="*", help="checks whose names hold one of them (default: all)")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--seconds", type=int, default=200,
                   help="deadline of a check (default: %(default)s)")
    p.add_argument("--out", type=Path, help="folder for CHECK.json")
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch sees no GPU here; --device cpu runs what needs none")
    runs.setup_ranks()  # no TF32
    rows = []
    for word in args.words:
        if not any(word in name for name in CHECKS):
            p.error(f"no check has {word} in its name: {', '.join(CHECKS)}")
    for name, check in CHECKS.items():
        if args.words and not any(word in name for word in args.words):
            continue
        found = run_check(name, check, torch.device(args.device), args.seconds)
        rows += found
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{name}.json").write_text(json.dumps(found, indent=1))
    failed = sum(row["result"] == "FAIL" for row in rows)
    print(f"{len(rows) - failed} passed or skipped, {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
