"""How fast this code is, beside other implementations of the same work on the same machine (README, "Speed").

    python bench.py                                                     # all rows, all threads
    python bench.py --rows encoder decoder --rounds 7 --threads 1 --json bench.json

Each side of a row is a process of its own. They take turns (ours, peer, ours, peer ...), so that the machine's moods
hit them alike; ratios are of medians, the peer's time over ours. Ours runs in --dtype auto, and where that is bf16 in
fp32 too; the peers as they come, in fp32, where they can be imported. Weights are random, a function of a tensor's
shape alone: a peer that does the same must agree with ours in fp32. MB: the process's peak, imports included.
"""
import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fid
import losses
import sample
import train_tokenizer as tt
from model import DECODERS, DITS, ENCODERS, Decoder, DINOv2, LightningDiT, Tokenizer

AUTO, CPU = tt.autocast_dtype("auto", torch.device("cpu")), torch.device("cpu")
autocast = lambda side: torch.autocast("cpu", AUTO, enabled=side == "ours" and AUTO != torch.float32)


@torch.no_grad()
def fill(net):
    """The weights. Those of q, k, v are alike, joined or not; a position embedding is the same at every place."""
    for p in net.parameters():
        matrix, fan_in = p.ndim in (2, 4), p[0].numel() if p.ndim in (2, 4) else 1
        rows = torch.randn(768, fan_in, generator=torch.Generator().manual_seed(fan_in)) / fan_in ** 0.5
        rows = rows[torch.arange(len(p) if matrix else p.shape[-1]) % 768]
        p.copy_(rows.view_as(p) if matrix else 0.5 + 0.1 * rows[:, 0])


# Each of these prepares a side of a row and returns the work to be timed; where that gives a tensor, it is compared.

def forward(side, shape, net, f, backward=True):
    """f(x) of the module net; the output, or with `backward` the gradient of the first convolution."""
    fill(net)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = next(m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d))

    def work():
        net.zero_grad(set_to_none=True)
        with autocast(side), torch.set_grad_enabled(backward):
            y = f(x)
        if backward:
            y.backward(torch.ones_like(y) / y.numel())
        return weight.grad if backward else y
    return work


def vit(side, folder, backward=True):
    if side == "timm":
        net = importlib.import_module("timm").create_model("vit_base_patch14_dinov2", dynamic_img_size=True)
        return forward(side, (8, 3, 224, 224), net, lambda x: net.forward_features(x)[:, 1:], backward)
    if side == "transformers":
        from transformers import Dinov2Config, Dinov2Model
        net = Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).train()
        return forward(side, (8, 3, 224, 224), net, lambda x: net(x).last_hidden_state[:, 1:], backward)
    net = DINOv2(**ENCODERS["vitb14"])
    return forward(side, (8, 3, 224, 224), net, lambda x: net(x)[1], backward)


def decoder(side, folder):
    net = Decoder(**DECODERS["vavae"]).to(memory_format=torch.channels_last)
    if side == "diffusers":
        from diffusers.models.autoencoders import vae
        net = vae.Decoder(32, 3, ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4), (128, 128, 256, 256, 512), 2)
    return forward(side, (2, 32, 16, 16), net, net)


def dit(side, folder):
    """Flow matching, backward, AdamW; seconds per GFLOP: the peer's MLP is plain, its blocks embed t and y each."""
    z0, z1, t, y = torch.randn(8, 32, 16, 16), torch.randn(8, 32, 16, 16), torch.rand(8), torch.randint(1000, (8,))
    net = velocity = LightningDiT(**DITS["B/1"])
    if side == "diffusers":
        from diffusers import DiTTransformer2DModel
        net = DiTTransformer2DModel(12, 64, in_channels=32, sample_size=16, num_layers=12, patch_size=1).train()
        velocity = lambda z, t, y: net(z, t, class_labels=y).sample
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-4, fused=True)

    def work():
        with autocast(side):
            losses.flow_matching(velocity, z0, z1, t, y, w_cos=1.0)[0].backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    return work


def stage_2(side, folder):
    """A step with all losses; against its parts one by one in fp32 (our modules, no slower than the peers'): E_p,
    frozen E_p, decoder, LPIPS, D for G and for itself, forward and backward; Adam; EMA."""
    x, z = torch.rand(2, 3, 256, 256) * 2 - 1, torch.randn(2, 32, 16, 16)
    torch.save(torchvision.models.vgg16(init_weights=False).state_dict(), f"{folder}/vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))},
               f"{folder}/heads.pth")
    critic, lpips = losses.PatchGAN(), losses.LPIPS(f"{folder}/vgg16.pth", f"{folder}/heads.pth")
    model, ema, reference = (Tokenizer(ENCODERS["vitb14"], DECODERS["vavae"]).train() for _ in range(3))
    for frozen in (ema, reference, model.encoder.mask_token):
        frozen.requires_grad_(False)
    s = argparse.Namespace(generator=model, tokenizer=model, critic=critic, discriminator=critic, lpips=lpips,
                           reference=reference, autocast=lambda: autocast(side))
    args = argparse.Namespace(w_p=1.0, w_g=0.5, w_sp=1.0, sp_at="adapter", sp_loss="l2", accum=1)
    opts = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-4, fused=True) for m in (model, critic)]

    def parts():
        image = x.clone().requires_grad_()
        critic.requires_grad_(False)
        for part in (lambda: model.encode(x), lambda: model.decode(z), lambda: lpips(x, image), lambda: critic(image)):
            part().sum().backward()
        reference.encode(x)
        losses.hinge_d(critic.requires_grad_(True)(x), critic(x)).backward()

    def work():
        parts() if side == "parts" else tt.training_step(x, s, args, gan=True, last=True)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        tt.update_ema(ema, model, 0.9999)
    return work


def sampling(side, folder):
    """50 Euler steps of a latent; guidance in sample.py's interval, against a loop with guidance at every step."""
    model, paper, one = LightningDiT(**DITS["B/1"]).eval(), sample.PRESETS["paper"], np.zeros(1, int)
    fill(model)
    latents = argparse.Namespace(d=32, latent_mean=torch.zeros(1), unnormalize=lambda z: z, decode=lambda z: z)
    times = sample.time_grid(50, paper["shift"])

    @torch.no_grad()
    def plain():
        z, y = torch.randn(1, 32, 16, 16), torch.tensor([0, 1000])
        for t, t_next in itertools.pairwise(times):
            with torch.autocast("cpu", AUTO, enabled=AUTO != torch.float32):
                v, v_null = model(torch.cat([z, z]), torch.full((2,), t), y).float().chunk(2)
            z = z + (t_next - t) * (v_null + 4 * (v - v_null))
    return plain if side == "plain loop" else lambda: sample.generate(
        model, latents, one, one, 0, times, dtype=AUTO, cfg=4.0, interval=paper["cfg_interval"])


def frechet(side, folder):
    torch.manual_seed(0)
    a, b = (fid.Features.of(torch.randn(5000, 2048).double() * torch.arange(1, 2049) ** -0.35) for _ in range(2))
    a.rows = b.rows = None
    if side == "ours":
        return lambda: torch.tensor(fid.frechet(a, b))
    peer = importlib.import_module("pytorch_fid.fid_score").calculate_frechet_distance
    return lambda: torch.tensor(peer(*(v.numpy() for v in (a.mu, a.sigma, b.mu, b.sigma))))


def loading(side, folder):
    """64 JPEGs of 500 x 375 px, noise at several scales, -> batches of 32 float crops of 256 px; one process."""
    root = f"{folder}/{side}"
    os.makedirs(f"{root}/class")
    for i in range(64):
        x = sum(F.interpolate(torch.randn(1, 3, 2 ** k, 2 ** k), (375, 500), mode="bicubic")[0] / 2 ** (k / 2)
                for k in range(1, 9))
        torchvision.io.write_jpeg((50 * x / x.std() + 128).clamp(0, 255).byte(), f"{root}/class/{i}.jpg", quality=90)
    if side == "ours":
        view = tt.View(tt.Folder(root), 256, (0, "augment"))
        return lambda: list(tt.batches(view, tt.in_order(64, 32), 0, CPU))
    from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, Resize, ToTensor
    chain = Compose([Resize(256), RandomCrop(256), RandomHorizontalFlip(), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])
    loader = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(root, chain), 32, shuffle=True)
    return lambda: list(loader)


# row: its function, the sides beside ours, how much of what a run processes
ROWS = {
    "features": (lambda s, f: vit(s, f, backward=False), ["ours fp32", "timm", "transformers"], 8, "images"),
    "encoder": (vit, ["ours fp32", "timm", "transformers"], 8, "images"),
    "decoder": (decoder, ["ours fp32", "diffusers"], 2, "images"),
    "dit": (dit, ["ours fp32", "diffusers"], 8, "latents"),
    "stage2": (stage_2, ["ours fp32", "parts"], 2, "images"),
    "sampling": (sampling, ["plain loop"], 1, "latents"),
    "frechet": (frechet, ["pytorch_fid"], 1, "distances"),
    "loading": (loading, ["torchvision"], 64, "images"),
}

work = None


def run(row, side, threads, folder):
    """In the side's process. The first time: prepares, and returns GFLOP and the result; then seconds and MB."""
    global work
    if work:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.set_num_threads(threads)
    for suffix in ("", "_backward"):  # attention has a name of its own on CPUs
        here, there = (f"_scaled_dot_product_flash_attention{part}{suffix}" for part in ("_for_cpu", ""))
        flop_registry[getattr(torch.ops.aten, here)] = flop_registry[getattr(torch.ops.aten, there)]
    work = ROWS[row][0](side, folder)
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops() / 1e9, result.float().numpy() if isinstance(result, torch.Tensor) else None


def measure(row, rounds, threads):
    """Prints and returns the row: {side: its figures}."""
    _, sides, count, unit = ROWS[row]
    peers = [s for s in sides if s in ("parts", "plain loop") or " " not in s and importlib.util.find_spec(s)]
    ours = ["ours"] + ["ours fp32"] * ("ours fp32" in sides and AUTO != torch.float32)
    pools = {side: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for side in ours + peers}
    with tempfile.TemporaryDirectory() as folder:
        ask = {side: lambda side=side, pool=pool: pool.submit(run, row, side, threads, folder).result()
               for side, pool in pools.items()}
        first, turns = {s: ask[s]() for s in ask}, [{s: ask[s]() for s in ask} for _ in range(rounds)]
    found = {}
    for side, (gflop, result) in first.items():
        pools[side].shutdown()
        seconds, mb = np.median([turn[side][0] for turn in turns]), turns[-1][side][1]
        found[side] = {"seconds": [turn[side][0] for turn in turns], "median": seconds, "gflop": gflop, "mb": mb}
        text = f"{row:8} {side:13} {seconds:8.3f} s {count / seconds:7.2f} {unit}/s {mb:5.0f} MB"
        text += f" {gflop:5.0f} GFLOP {gflop / seconds:4.0f} GFLOP/s" * (gflop > 50)
        for other in ours * (side in peers):
            work = gflop / found[other]["gflop"] if row == "dit" else 1
            found[side][f"over {other}"] = ratio = seconds / found[other]["median"] / work
            text += f"  {ratio:.2f} x {other}"
        if result is not None and side in peers:
            exact = first[ours[-1]][1]
            assert abs(result - exact).max() < 1e-3 * abs(exact).max(), f"{row}: {side} computes something else"
        print(text, flush=True)
    return found


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--rounds", type=int, default=5, help="runs of each side (default: %(default)s)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    p.add_argument("--json", help="write the figures there too")
    args = p.parse_args()
    report = {"date": time.strftime("%Y-%m-%d"), "threads": args.threads, "torch": torch.__version__, "auto": str(AUTO)}
    report["rows"] = {row: measure(row, args.rounds, args.threads) for row in args.rows}
    if args.json:
        with open(args.json, "w") as f:
            json.dump(report, f, indent=1)
