"""How fast this code is, beside other implementations of the same work on the same machine (README, "Speed").

    python bench.py                                                             # all rows, all threads
    python bench.py --rows encoder decoder --rounds 7 --threads 1 --json bench.json

Each side of a row is a process of its own. The sides take turns (ours, peer, ours, peer ...), so that the machine's
moods hit them alike, and the medians are compared: a ratio is the peer's time over ours. Ours runs in --dtype auto,
and where that is bf16 in fp32 as well; the peers as they come, in fp32. All weights are random, and a function of a
tensor's shape: where a peer does the same computation, its result must equal ours in fp32. GFLOP are counted. Memory
is the peak of the side's process, imports included. A peer that cannot be imported is left out.
"""
import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fid
import losses
import sample
import train_tokenizer as tt
from model import DECODERS, DITS, ENCODERS, Decoder, DINOv2, LightningDiT, Tokenizer

AUTO = tt.autocast_dtype("auto", torch.device("cpu"))


def precision(side):
    dtype = AUTO if side in ("ours", "doubled batch") else torch.float32
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def fill(net):
    """Weights that are a function of the shape alone, whatever the names and the order; q, k, v are alike, joined or
    not. A position embedding is the same everywhere, whichever rule resamples it."""
    for p in net.parameters():
        fan_in = p[0].numel() if p.ndim in (2, 4) else 1
        rows = torch.randn(768, fan_in, generator=torch.Generator().manual_seed(fan_in))
        if p.ndim in (2, 4):
            p.copy_((rows / fan_in ** 0.5)[torch.arange(len(p)) % 768].view_as(p))
        else:
            p.copy_(0.5 + 0.1 * rows[torch.arange(p.shape[-1]) % 768, 0])
    return net


# Each of the following prepares one side of a row, and returns the work to be timed. What that returns is compared.

def forward(side, net, shape, backward=True):
    """net: (module, function of x that gives a tensor). Returns the output, or the first convolution's gradient."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = next(m for m in fill(net[0]).modules() if isinstance(m, torch.nn.Conv2d)).weight

    def work():
        with precision(side), torch.set_grad_enabled(backward):
            y = net[1](x)
        if not backward:
            return y
        net[0].zero_grad(set_to_none=True)
        y.backward(torch.ones_like(y) / y.numel())
        return weight.grad
    return work


def vit(side):
    if side == "timm":
        net = importlib.import_module("timm").create_model("vit_base_patch14_dinov2", dynamic_img_size=True)
        return net, lambda x: net.forward_features(x)[:, 1:]
    if side == "transformers":
        from transformers import Dinov2Config, Dinov2Model
        net = Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).train()
        return net, lambda x: net(x).last_hidden_state[:, 1:]
    net = DINOv2(**ENCODERS["vitb14"])
    return net, lambda x: net(x)[1]


def convolutional_decoder(side):
    if side == "diffusers":
        from diffusers.models.autoencoders import vae
        net = vae.Decoder(32, 3, ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4), (128, 128, 256, 256, 512), 2)
    else:
        net = Decoder(**DECODERS["vavae"]).to(memory_format=torch.channels_last)
    return net, net


def dit(side, folder):
    """Flow matching, backward, AdamW. The peer has a plain MLP, and embeds time and class anew in each block: seconds
    per GFLOP are compared."""
    z0, z1, t, y = torch.randn(8, 32, 16, 16), torch.randn(8, 32, 16, 16), torch.rand(8), torch.randint(1000, (8,))
    net = velocity = LightningDiT(**DITS["B/1"])
    if side == "diffusers":
        from diffusers import DiTTransformer2DModel
        net = DiTTransformer2DModel(12, 64, in_channels=32, sample_size=16, num_layers=12, patch_size=1).train()
        velocity = lambda z, t, y: net(z, t, class_labels=y).sample
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-4, fused=True)

    def work():
        with precision(side):
            loss, _, _ = losses.flow_matching(velocity, z0, z1, t, y, w_cos=1.0)
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    return work


def stage_2(side, folder):
    """A step with all losses, against the sum of what it cannot do without, each part alone and in fp32: the encoder
    (timm's, if it is there), the frozen encoder, the decoder (diffusers'), LPIPS, D against G, D, Adam, EMA."""
    x = torch.rand(2, 3, 256, 256) * 2 - 1
    model, critic = Tokenizer(ENCODERS["vitb14"], DECODERS["vavae"]).train(), losses.PatchGAN()
    model.encoder.mask_token.requires_grad_(False)
    ema, reference = (copy.deepcopy(model).requires_grad_(False).eval() for _ in range(2))
    lpips = losses.LPIPS(f"{folder}/vgg16.pth", f"{folder}/heads.pth")
    s = SimpleNamespace(generator=model, tokenizer=model, critic=critic, discriminator=critic, lpips=lpips,
                        reference=reference, autocast=lambda: precision(side))
    args = SimpleNamespace(w_p=1.0, w_g=0.5, w_sp=1.0, sp_at="adapter", sp_loss="l2", accum=1)
    opts = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-4, fused=True) for m in (model, critic)]
    if side == "parts":
        timm, diffusers = (p if importlib.util.find_spec(p) else "ours fp32" for p in ("timm", "diffusers"))
        encode = forward(side, vit(timm), (2, 3, 224, 224))
        decode = forward(side, convolutional_decoder(diffusers), (2, 32, 16, 16))
        for p in itertools.chain(model.parameters(), critic.parameters()):
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    def parts():
        encode(), decode(), reference.features(x)
        image = x.clone().requires_grad_()
        (lpips(x, image).mean() + losses.hinge_g(critic.requires_grad_(False)(image))).backward()
        losses.hinge_d(critic.requires_grad_(True)(x), critic(x)).backward()

    def work():
        parts() if side == "parts" else tt.training_step(x, s, args, gan=True, last=True)
        for opt in opts:
            opt.step()
            if side != "parts":
                opt.zero_grad(set_to_none=True)
        tt.update_ema(ema, model, 0.9999)
    return work


def sampling(side, folder):
    """50 Euler steps of one latent: guidance in sample.py's interval, against the doubled batch at every step."""
    model, paper = fill(LightningDiT(**DITS["B/1"]).eval()), sample.PRESETS["paper"]
    times, always = sample.time_grid(50, paper["shift"]), side == "doubled batch"
    latents = SimpleNamespace(d=32, latent_mean=torch.zeros(1), unnormalize=lambda z: z, decode=lambda z: z)

    def work():
        sample.generate(model, latents, np.arange(1), np.arange(1), 0, times, dtype=AUTO, cfg=4.0,
                        interval=(0, 1) if always else paper["cfg_interval"])
    return work


def patched(module, folder):
    """A peer's Inception, whose own loader finds our random weights."""
    module = importlib.import_module(module)
    module.load_state_dict_from_url = lambda *args, **kwargs: torch.load(f"{folder}/inception.pth")
    return module


def inception(side, folder):
    x = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8)
    if side == "pytorch_fid":
        net = patched("pytorch_fid.inception", folder).InceptionV3([3]).eval()
        return torch.inference_mode()(lambda: net(x / 255)[0].flatten(1))
    if side == "torch_fidelity":  # with TensorFlow's resize: another result
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Peer
        net = Peer("inception", ["2048"], feature_extractor_weights_path=f"{folder}/inception.pth")
        return torch.inference_mode()(lambda: net(x) and None)
    net = fid.load_inception(f"{folder}/inception.pth")[0]
    return torch.inference_mode()(lambda: net(x, "torch")["pool"])


def fid_folders(side, folder):
    """Two folders of 64 PNGs -> FID: decoding, features, covariances, distance; no worker processes."""
    pair, weights = [f"{folder}/a", f"{folder}/b"], f"{folder}/inception.pth"
    if side == "pytorch_fid":
        patched("pytorch_fid.inception", folder)
        from pytorch_fid.fid_score import calculate_fid_given_paths
        return lambda: torch.tensor(calculate_fid_given_paths(pair, 32, "cpu", 2048, num_workers=0))
    if side == "cleanfid":
        patched("cleanfid.inception_pytorch", folder)
        peer, flags = importlib.import_module("cleanfid.fid").compute_fid, {"mode": "legacy_pytorch", "num_workers": 0}
        return lambda: peer(*pair, **flags, device="cpu", use_dataparallel=False, verbose=False) and None
    if side == "torch_fidelity":
        flags = {"fid": True, "cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True}
        peer = importlib.import_module("torch_fidelity").calculate_metrics
        return lambda: peer(input1=pair[1], input2=pair[0], feature_extractor_weights_path=weights, **flags) and None
    flags = f"--metrics fid --resize torch --workers 0 --inception {weights} --json {folder}/fid.json"

    def work():
        fid.main([*pair, *flags.split()])
        return torch.tensor(json.loads(Path(folder, "fid.json").read_text())["figures"][0]["value"])
    return work


def frechet(side, folder):
    a, b = (fid.Features.of(torch.randn(5000, 2048).double() * torch.arange(1, 2049) ** -0.35) for _ in range(2))
    a.rows = b.rows = None
    if side == "pytorch_fid":
        from pytorch_fid.fid_score import calculate_frechet_distance
        return lambda: torch.tensor(calculate_frechet_distance(*(v.numpy() for v in (a.mu, a.sigma, b.mu, b.sigma))))
    return lambda: torch.tensor(fid.frechet(a, b))


def loading(side, folder):
    """64 JPEGs of 500 x 375 px -> batches of float crops of 256 px; one process."""
    if side == "ours":
        view, order = tt.View(tt.Folder(f"{folder}/jpeg"), 256, (0, "augment")), tt.in_order(64, 32)
        return lambda: [x for x, _ in tt.batches(view, order, 0, torch.device("cpu"))] and None
    from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, Resize, ToTensor
    chain = Compose([Resize(256), RandomCrop(256), RandomHorizontalFlip(), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])
    loader = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(f"{folder}/jpeg", chain), 32, shuffle=True)
    return lambda: list(loader) and None


# row: its function, the sides beside ours, what a run processes
ROWS = {
    "features": (lambda s, _: forward(s, vit(s), (8, 3, 224, 224), False),
                 ["ours fp32", "timm", "transformers"], 8, "images"),
    "encoder": (lambda s, _: forward(s, vit(s), (8, 3, 224, 224)),
                ["ours fp32", "timm", "transformers"], 8, "images"),
    "decoder": (lambda s, _: forward(s, convolutional_decoder(s), (2, 32, 16, 16)),
                ["ours fp32", "diffusers"], 2, "images"),
    "dit": (dit, ["ours fp32", "diffusers"], 8, "latents"),
    "stage2": (stage_2, ["ours fp32", "parts"], 2, "images"),
    "sampling": (sampling, ["doubled batch"], 1, "latents"),
    "inception": (inception, ["pytorch_fid", "torch_fidelity"], 32, "images"),
    "fid": (fid_folders, ["pytorch_fid", "torch_fidelity", "cleanfid"], 128, "images"),
    "frechet": (frechet, ["pytorch_fid"], 1, "distances"),
    "loading": (loading, ["torchvision"], 64, "images"),
}


def write_inputs(folder):
    """Random weights, and pictures like photographs: noise at several scales."""
    torch.save({f"features.{k}": v for k, v in torchvision.models.vgg16().features.state_dict().items()},
               f"{folder}/vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))},
               f"{folder}/heads.pth")
    for kind, h, w in (("a/{}.png", 256, 256), ("b/{}.png", 256, 256), ("jpeg/class/{}.jpg", 375, 500)):
        for i in range(64):
            path = Path(folder, kind.format(i))
            path.parent.mkdir(parents=True, exist_ok=True)
            x = sum(F.interpolate(torch.randn(1, 3, 2 ** k, 2 ** k), (h, w), mode="bicubic") / 2 ** (k / 2)
                    for k in range(1, 9))[0]
            Image.fromarray(tt.to_uint8(x[None] / x.std() * 0.4)[0]).save(path, quality=90)
    net = fid.Inception().train()
    for m in net.modules():
        m.momentum = None  # BatchNorm then keeps the statistics of these 16 images
    net(torch.stack([tt.to_tensor(Image.open(f"{folder}/a/{i}.png")) for i in range(16)]) * 127.5 + 127.5)
    torch.save(net.state_dict(), f"{folder}/inception.pth")


def serve(pipe, row, side, threads, folder):
    """The process of one side: sends its GFLOP and result, then as often as it is asked the seconds of a run."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for suffix in ("", "_backward"):  # on the CPU attention has names of its own
        name = "_scaled_dot_product_flash_attention"
        theirs, here = (getattr(torch.ops.aten, f"{name}{s}{suffix}") for s in ("", "_for_cpu"))
        flop_registry[here] = flop_registry[theirs]
    with contextlib.redirect_stdout(io.StringIO()):
        work = ROWS[row][0](side, folder)
        with FlopCounterMode(display=False) as counter:
            result = work()
        pipe.send((counter.get_total_flops() / 1e9, result if result is None else result.detach().float().numpy()))
        while pipe.recv():
            began = time.perf_counter()
            work()
            pipe.send(time.perf_counter() - began)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(row, rounds, threads, folder):
    """Prints and returns the row: {side: its figures}."""
    _, sides, count, unit = ROWS[row]
    sides = ["ours"] + [s for s in sides if s in ("parts", "doubled batch") or s == "ours fp32" and AUTO != torch.float32
                        or s != "ours fp32" and importlib.util.find_spec(s)]
    found, pipes = {}, {}
    for side in sides:
        pipes[side], end = multiprocessing.Pipe()
        multiprocessing.Process(target=serve, args=(end, row, side, threads, folder), daemon=True).start()
        end.close()  # so that a side's failure is seen here
        found[side] = dict(zip(("gflop", "result"), pipes[side].recv()), seconds=[])
    for side in sides * rounds:
        pipes[side].send(True)
        found[side]["seconds"].append(pipes[side].recv())
    exact = found.get("ours fp32", found["ours"])["result"]
    for side, f in found.items():
        pipes[side].send(False)
        f["peak_mb"], f["median"], result = pipes[side].recv(), statistics.median(f["seconds"]), f.pop("result")
        text = f"{row:9} {side:14} {f['median']:8.3f} s {count / f['median']:7.2f} {unit}/s {f['peak_mb']:6.0f} MB"
        if f["gflop"]:
            text += f" {f['gflop']:6.0f} GFLOP {f['gflop'] / f['median']:5.0f} GFLOP/s"
        for ours in ("ours", "ours fp32") if not side.startswith("ours") else ():
            if ours in found:
                work = f["gflop"] / found[ours]["gflop"] if row == "dit" else 1
                f[f"over {ours}"] = f["median"] / found[ours]["median"] / work
                text += f"  {f[f'over {ours}']:.2f} x {ours}"
        if result is not None and side != "ours":
            f["difference"] = float(abs(result - exact).max() / abs(exact).max())
            assert f["difference"] < 1e-3, f"{row}: {side} computes something else"
        print(text, flush=True)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--rounds", type=int, default=5, help="runs of each side (default: %(default)s)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    p.add_argument("--json", help="write the figures there too")
    args = p.parse_args()
    multiprocessing.set_start_method("spawn")
    os.environ["TQDM_DISABLE"] = "1"
    report = {"date": time.strftime("%Y-%m-%d"), "threads": args.threads, "torch": torch.__version__, "auto": str(AUTO)}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder)
        report["rows"] = {row: measure(row, args.rounds, args.threads, folder) for row in args.rows}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
