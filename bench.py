"""How fast this code is, beside other implementations of the same work:

    python bench.py --rows encoder decoder
    python bench.py --device cuda --out runs/bench

The sides of a row take turns (a round is ours, peer, peer, ours). A turn runs the work twice and
times the second; on a GPU five times, and times the next five. Ratios are the other's median time
over ours. Ours runs in --dtype auto; on a CPU in fp32 too, on a GPU compiled too. Peers run in fp32
on a CPU, in --dtype auto on a GPU.
"""
import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

import data
import fid
import losses
import runs
import sample
import train_tokenizer
from model import DECODERS, DITS, ENCODERS, Decoder, DINOv2, LightningDiT, Tokenizer

CPU, FP32 = torch.device("cpu"), torch.float32


def peer(name):
    """The module, where it is installed and wanted; else None."""
    if not args.alone and importlib.util.find_spec(name.split(".")[0]):
        return importlib.import_module(name)


def step(net, f, backward=True, optimise=False):
    """The work in a dtype: f(), the way back into the weights of net, and AdamW."""
    trained = [p for p in net.train().parameters() if p.requires_grad]
    opt = optimise and torch.optim.AdamW(trained, 1e-4, fused=True)

    def work(dtype=None):
        with runs.autocast(device, dtype or peers), torch.set_grad_enabled(backward):
            y = f()
        if backward:
            net.zero_grad(set_to_none=True)
            y.backward(torch.ones_like(y) / y.numel())
        if optimise:
            opt.step()
    return work


def ours(net, work, checkpointing=False):
    """The sides of a network of ours."""
    flags = argparse.Namespace(compile=device.type == "cuda", checkpointing=checkpointing)
    runs.make_fast(net, flags, device)
    yield "ours", torch.compiler.set_stance("force_eager")(partial(work, auto))
    if device.type == "cuda":
        yield "ours compiled", partial(work, auto)
    else:
        yield "ours fp32", partial(work, FP32)


# Each function below yields (side, the work to be timed)

def encoder(folder, backward=True):
    x, net = torch.randn(8, 3, 224, 224), DINOv2(**ENCODERS["vitb14"])
    yield from ours(net, step(net, lambda: net(x)[1], backward))
    if timm := peer("timm"):
        vit = timm.create_model("vit_base_patch14_dinov2", dynamic_img_size=True)
        yield "timm", step(vit, lambda: vit.forward_features(x), backward)
    if transformers := peer("transformers"):
        hf = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, patch_size=14))
        yield "transformers", step(hf, lambda: hf(x).last_hidden_state, backward)


def decoder(folder):
    z, net = torch.randn(2, 32, 16, 16), Decoder(**DECODERS["vavae"])
    net.to(memory_format=torch.channels_last)
    yield from ours(net, step(net, lambda: net(z)))
    if vae := peer("diffusers.models.autoencoders.vae"):
        blocks = ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4)
        theirs = vae.Decoder(32, 3, blocks, (128, 128, 256, 256, 512), 2)
        yield "diffusers", step(theirs, lambda: theirs(z))


def dit(folder, name="B/1", n=8):
    z0, z1 = torch.randn(2, n, 32, 16, 16)
    t, y = torch.rand(n), torch.randint(1000, (n,))
    loss = partial(losses.flow_matching, z0=z0, z1=z1, t=t, y=y, w_cos=1.0)
    net = LightningDiT(**DITS[name])
    yield from ours(net, step(net, lambda: loss(net)[0], optimise=True))
    if name == "B/1" and (diffusers := peer("diffusers")):
        # other GFLOPs: its MLP is plain, and each block embeds t and y
        theirs = diffusers.DiTTransformer2DModel(12, 64, in_channels=32, sample_size=16,
                                                 num_layers=12, patch_size=1)
        velocity = lambda z, t, y: theirs(z, t, class_labels=y).sample
        yield "diffusers", step(theirs, lambda: loss(velocity)[0], optimise=True)


def stage(folder, number=2, name="vitb14", n=2, checkpointing=False):
    """A step with all losses; in stage 2 on a CPU against its parts (our own modules) one by one,
    in fp32."""
    lpips, critic = losses.LPIPS(), losses.PatchGAN()
    model, ema, frozen = (Tokenizer(ENCODERS[name], DECODERS["vavae"]).train() for _ in range(3))
    torch.nn.ModuleList([ema, frozen]).requires_grad_(False)
    for part, network in model.named_children():
        network.requires_grad_(part in train_tokenizer.STAGES[number]["trains"])
    runs.fast_weight_gradients(critic)
    if device.type == "cuda":
        runs.compile_parts([(lpips, "distance")])
    trained = [p for m in (model, critic) for p in m.parameters() if p.requires_grad]
    opt = torch.optim.Adam(trained, 1e-4, fused=True)
    flags = train_tokenizer.parse(["--accum", "1"])
    frozen.latent_std.fill_(1)
    s = argparse.Namespace(tokenizer=model, ddp_tokenizer=model, discriminator=critic,
                           ddp_discriminator=critic, lpips=lpips,
                           reference=frozen if number == 2 else None)
    s.objective = partial(train_tokenizer.aligntok_objective, s, flags)
    x, z = torch.rand(n, 3, 256, 256), torch.randn(n, 32, 16, 16)
    image = x.clone().requires_grad_()
    parts = (lambda: model.encode(x) - frozen.encode(x), lambda: model.decode(z),
             lambda: lpips(x, image), lambda: critic(image),
             lambda: losses.hinge_d(critic(x), critic(x)))

    def work(dtype=None):
        if dtype:
            s.autocast = partial(runs.autocast, device, dtype)
            train_tokenizer.training_step(x, [], s, flags, gan=True, last=True)
        else:
            for part in parts:
                part().sum().backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        train_tokenizer.update_ema(ema, model, 0.9999)
    yield from ours(model, work, checkpointing)
    if device.type == "cpu":
        yield "its parts", work


def sampling(folder):
    """50 Euler steps of one latent (64 on a GPU), guided in the paper's interval; against a plain
    loop: guided throughout, an autocast at each step."""
    n = 64 if device.type == "cuda" else 1
    net, paper = LightningDiT(**DITS["B/1"]).eval(), sample.PRESETS["paper"]
    z, y = torch.randn(n, 32, 16, 16), torch.zeros(n, dtype=torch.long)
    both = torch.cat([y, y + net.num_classes])
    times = sample.time_grid(50, paper["shift"])
    velocity = sample.Velocity(net, y, 4.0, paper["cfg_interval"])

    def plain(z, t):
        with runs.autocast(device, auto):
            v = net(torch.cat([z, z]), torch.full((2 * n,), t), both).float()
        v, v_null = v.chunk(2)
        return v_null + 4.0 * (v - v_null)

    @torch.no_grad()
    def work(dtype):
        with runs.autocast(device, dtype):
            sample.integrate(velocity, z, times)

    yield from ours(net, work)
    yield "plain loop", torch.compiler.set_stance("force_eager")(
        partial(torch.no_grad()(sample.integrate), plain, z, times))


def inception(folder):
    """The features of 50 images of 256 px, for FID."""
    net, x = fid.Inception(), torch.randint(256, (50, 3, 256, 256), dtype=torch.uint8)
    yield "ours", lambda: net(x)


def latents(folder):
    """z0 of 64 images of 256 px by the preset paper's encoder; train_dit.py encodes in fp32."""
    net, x = Tokenizer(ENCODERS["vitl14"], DECODERS["tiny"]).eval(), torch.randn(64, 3, 256, 256)

    @torch.no_grad()
    def encode(tf32=False, dtype=FP32):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        try:
            with runs.autocast(device, dtype):
                net.encode(x)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    yield "ours", encode
    yield "in TF32", partial(encode, True)
    yield "in bf16", partial(encode, False, torch.bfloat16)


def ceilings(folder):
    """What the card reaches at most: a product of bf16 matrices, a copy of 4 GB, the attention of
    LightningDiT-XL/1 on 64 images, one 3x3 convolution of 128 channels at 256 px."""
    bf16 = partial(torch.randn, dtype=torch.bfloat16)
    a, b = bf16(2, 8192, 8192)
    yield "matrix product", lambda: a @ b
    source = torch.empty(2 ** 32, dtype=torch.uint8)
    target = torch.empty_like(source)
    yield "copy of 4.3 GB", lambda: target.copy_(source)
    q = bf16(64, 16, 256, 72)
    yield "attention", lambda: F.scaled_dot_product_attention(q, q, q)
    x, w = bf16(8, 128, 256, 256), bf16(128, 128, 3, 3)
    x, w = (y.contiguous(memory_format=torch.channels_last) for y in (x, w))
    yield "3x3 convolution", lambda: F.conv2d(x, w, padding=1)


def pictures(folder, n, h, w, suffix, write):
    os.makedirs(folder)
    for i in range(n):
        x = F.interpolate(torch.randn(1, 3, h // 4, w // 4), (h, w), mode="bicubic")[0]
        write((128 + 50 * x).clamp(0, 255).byte(), f"{folder}/{i}{suffix}")


def folders(folder):
    """The FID of two folders of 128 PNGs of 256 px, in batches of 50, without workers."""
    a, b, file = f"{folder}/a", f"{folder}/b", f"{folder}/inception.pth"
    for path in (a, b):
        pictures(path, 128, 256, 256, ".png", torchvision.io.write_png)
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(net.state_dict(), file)
    yield "ours", lambda: fid.main([a, b, "--inception", file, "--resize=torch", "--metrics=fid",
                                    "--batch-size=50"])
    if fidelity := peer("torch_fidelity"):
        yield "torch_fidelity", lambda: fidelity.calculate_metrics(
            input1=a, input2=b, fid=True, feature_extractor_weights_path=file, cuda=False,
            batch_size=50, verbose=False, save_cpu_ram=True)
    if score := peer("pytorch_fid.fid_score"):
        inception = peer("pytorch_fid.inception")
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(file)
        yield "pytorch_fid", lambda: score.calculate_fid_given_paths([a, b], 50, CPU, 2048, 0)
        if clean := peer("cleanfid.fid"):  # with pytorch-fid's network; its own is a download
            net = inception.InceptionV3(resize_input=False).eval()
            yield "clean-fid", lambda: clean.compute_fid(
                a, b, num_workers=0, batch_size=50, device=CPU, verbose=False,
                custom_feat_extractor=lambda x: net(x / 255)[0].flatten(1))


def frechet(folder):
    """The distance of two Gaussians of 2048 dimensions."""
    scale = torch.arange(1, 2049) ** -0.35
    a, b = (fid.FeatureStatistics.of(torch.randn(5000, 2048).double() * scale) for _ in range(2))
    yield "ours", lambda: fid.frechet(a, b)
    if score := peer("pytorch_fid.fid_score"):
        arrays = (v.numpy() for v in (a.mu, a.sigma, b.mu, b.sigma))
        yield "pytorch_fid", partial(score.calculate_frechet_distance, *arrays)


def loading(folder):
    """64 JPEGs of 500 x 375 px as batches of 32 training crops of 256 px, one process."""
    pictures(f"{folder}/class", 64, 375, 500, ".jpg",
             partial(torchvision.io.write_jpeg, quality=90))
    crops = data.Crops(data.ImageFolder(folder), 256, (0, "augment"))
    yield "ours", lambda: list(data.batches(crops, data.in_order(64, 32), 0, CPU))
    chain = T.Compose([T.Resize(256), T.RandomCrop(256), T.RandomHorizontalFlip(), T.ToTensor(),
                       T.Normalize([0.5] * 3, [0.5] * 3)])
    images = torchvision.datasets.ImageFolder(folder, chain)
    yield "torchvision", partial(list, DataLoader(images, 32, shuffle=True))


ROWS = {"features": partial(encoder, backward=False), "encoder": encoder, "decoder": decoder,
        "dit": dit, "stage2": stage, "sampling": sampling, "fid": folders, "frechet": frechet,
        "loading": loading}

# The real sizes: row -> (work, images)
GPU_ROWS = {
    "ceilings": (ceilings, 0),
    "xl 64": (partial(dit, name="XL/1", n=64), 64),
    "vit-l 2": (partial(stage, number=2, name="vitl14", n=32), 32),
    "vit-l 1": (partial(stage, number=1, name="vitl14", n=32), 32),
    "vit-l 3": (partial(stage, number=3, name="vitl14", n=32), 32),
    "vit-l 2c": (partial(stage, number=2, name="vitl14", n=32, checkpointing=True), 32),
    "sampling": (sampling, 64), "latents": (latents, 64), "inception": (inception, 50),
    "decoder": (decoder, 2), "encoder": (encoder, 8), "dit": (dit, 8),
    "xl 128": (partial(dit, name="XL/1", n=128), 128)}


def timed(work, repeats=None):
    """Seconds of the work, to its end on the device. On a GPU the mean of five in a row: the
    training loops do not wait for it after each step either."""
    repeats = repeats or (5 if device.type == "cuda" else 1)
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def warm_up(once):
    """(GFLOP, peak GiB or None) of the work; on a GPU its second run is compiled."""
    # on a CPU the counter knows this kind of attention only
    math = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with FlopCounterMode(display=False) as counter, math, torch.compiler.set_stance("force_eager"):
        once()
    if device.type == "cpu":
        return counter.get_total_flops() / 1e9, None
    timed(once)
    torch.cuda.reset_peak_memory_stats()
    timed(once)
    return counter.get_total_flops() / 1e9, torch.cuda.max_memory_allocated() / 2 ** 30


def profiled(work):
    """The kernels that take most of the time, as a table."""
    with torch.profiler.profile() as profile:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    kind = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=kind, row_limit=30, max_name_column_width=90)


def compile_only(row, work):
    with tempfile.TemporaryDirectory() as folder:
        sides = dict(work(folder))
        if "ours compiled" in sides:
            print(f"{row:8}  compiled in {timed(sides['ours compiled'], 1):.0f} s", flush=True)


def measure(row, work, images=0):
    with tempfile.TemporaryDirectory() as folder:
        sides, gflop, peak, times = dict(work(folder)), {}, {}, defaultdict(list)
        for side in list(sides):
            try:
                gflop[side], peak[side] = warm_up(sides[side])
            except torch.OutOfMemoryError as e:
                print(f"{row:8}  {side:14} out of memory: {str(e).splitlines()[0]}", flush=True)
                del sides[side]
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for side in [*sides, *reversed(sides)] * args.rounds:
            timed(sides[side])  # memory still has the shape that another side left
            times[side].append(timed(sides[side]))
        side = "ours compiled" if "ours compiled" in sides else "ours"
        if args.profile and side in sides:
            print(f"{row}, {side}\n{profiled(sides[side])}", flush=True)
    median = {side: statistics.median(seconds) for side, seconds in times.items()}
    for side, seconds in median.items():
        ratios = [f"{seconds / median[ours]:.2f} x {ours}" for ours in median
                  if "ours" in ours and "ours" not in side]
        rate = gflop[side] / seconds
        figures = {"row": row, "side": side, "seconds": seconds, "GFLOP": gflop[side]}
        for product in (r for r in results if r["side"] == "matrix product" and gflop[side]):
            share = figures["of the matrix product"] = rate / product["GFLOP"] * product["seconds"]
            ratios.insert(0, f"{100 * share:.0f} % of the matrix product")
        if images:
            figures["images/s"] = images / seconds
            ratios.insert(0, f"{images / seconds:.1f} images/s")
        if peak[side]:
            figures["peak GiB"] = peak[side]
            ratios.insert(0, f"{peak[side]:.1f} GiB")
        print(f"{row:8}  {side:14} {seconds:8.3f} s {gflop[side]:6.0f} GFLOP {rate:4.0f} GFLOP/s ",
              ", ".join(ratios), flush=True)
        yield figures


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--rows", nargs="+", metavar="ROW",
                   help=f"default: all; on a CPU {', '.join(ROWS)}; on a GPU {', '.join(GPU_ROWS)}")
    p.add_argument("--rounds", type=int, default=3, choices=range(1, 21), metavar="N",
                   help="default: %(default)s")
    p.add_argument("--alone", action="store_true", help="without peers")
    p.add_argument("--profile", action="store_true", help="and what takes the time")
    p.add_argument("--compile-only", action="store_true",
                   help="fill torch's cache of kernels, for the next run; nothing is timed")
    p.add_argument("--out", type=Path, help="folder for bench.json")
    args = p.parse_args()
    if args.compile_only and args.device == "cpu":
        p.error("--compile-only goes with --device cuda: on a CPU nothing is compiled")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch sees no GPU here")
    table = GPU_ROWS if args.device == "cuda" else {row: (work, 0) for row, work in ROWS.items()}
    if unknown := set(args.rows or ()) - set(table):
        p.error(f"--rows: with --device {args.device} there is no {', '.join(sorted(unknown))}; "
                f"there are {', '.join(table)}")
    runs.setup_ranks()  # no TF32
    device = torch.device(args.device)
    auto = runs.autocast_dtype("auto", device)
    peers = FP32 if args.device == "cpu" else auto
    torch.set_default_device(device)
    torch.backends.cudnn.benchmark = True
    results, todo = [], list(args.rows or table)
    failed = False
    while todo:
        row = todo[0]
        try:
            if args.compile_only:
                compile_only(row, table[row][0])
            else:
                results += measure(row, *table[row])
        except KeyboardInterrupt:
            print(f"SKIP {', '.join(todo)}: no time was left")
            break
        except RuntimeError:  # the next row may be measured
            traceback.print_exc()
            failed = True
        todo.pop(0)
        if results and args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "bench.json").write_text(json.dumps(results, indent=1))
    sys.exit(failed)
