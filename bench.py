"""How fast this code is, beside other implementations of the same work:

    python bench.py --rows encoder decoder

The sides of a row take turns (a round is ours, peer, peer, ours). A turn runs the work twice
and times the second. Ratios are the other's median time over ours. Ours runs in --dtype auto and in
fp32, the peers in fp32.
"""
import argparse
import importlib.util
import os
import statistics
import tempfile
import timeit
from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

import data
import fid
import files
import losses
import runs
import sample
import train_tokenizer
from model import DECODERS, DITS, ENCODERS, Decoder, DINOv2, LightningDiT, Tokenizer

CPU, FP32 = torch.device("cpu"), torch.float32
AUTO = runs.autocast_dtype("auto", CPU)
autocast = partial(runs.autocast, CPU)


def peer(name):
    """The module, where it is installed and wanted; else None."""
    if not args.alone and importlib.util.find_spec(name.split(".")[0]):
        return importlib.import_module(name)


def step(net, f, dtype=FP32, backward=True, optimise=False):
    """The work: f(), the way back into the weights of net, and AdamW."""
    trained = [p for p in net.train().parameters() if p.requires_grad]
    opt = optimise and torch.optim.AdamW(trained, 1e-4, fused=True)

    def work():
        with autocast(dtype), torch.set_grad_enabled(backward):
            y = f()
        if backward:
            net.zero_grad(set_to_none=True)
            y.backward(torch.ones_like(y) / y.numel())
        if optimise:
            opt.step()
    return work


# Each function below yields (side, the work to be timed)

def encoder(folder, backward=True):
    x, ours = torch.randn(8, 3, 224, 224), DINOv2(**ENCODERS["vitb14"])
    yield "ours", step(ours, lambda: ours(x)[1], AUTO, backward)
    yield "ours fp32", step(ours, lambda: ours(x)[1], FP32, backward)
    if timm := peer("timm"):
        vit = timm.create_model("vit_base_patch14_dinov2", dynamic_img_size=True)
        yield "timm", step(vit, lambda: vit.forward_features(x), FP32, backward)
    if transformers := peer("transformers"):
        net = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, patch_size=14))
        yield "transformers", step(net, lambda: net(x).last_hidden_state, FP32, backward)


def decoder(folder):
    z, ours = torch.randn(2, 32, 16, 16), Decoder(**DECODERS["vavae"])
    ours.to(memory_format=torch.channels_last)
    runs.fast_weight_gradients(ours)
    yield "ours", step(ours, lambda: ours(z), AUTO)
    yield "ours fp32", step(ours, lambda: ours(z))
    if vae := peer("diffusers.models.autoencoders.vae"):
        blocks = ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4)
        net = vae.Decoder(32, 3, blocks, (128, 128, 256, 256, 512), 2)
        yield "diffusers", step(net, lambda: net(z))


def dit(folder):
    z0, z1 = torch.randn(2, 8, 32, 16, 16)
    t, y = torch.rand(8), torch.randint(1000, (8,))
    loss = partial(losses.flow_matching, z0=z0, z1=z1, t=t, y=y, w_cos=1.0)
    ours = LightningDiT(**DITS["B/1"])
    yield "ours", step(ours, lambda: loss(ours)[0], AUTO, optimise=True)
    yield "ours fp32", step(ours, lambda: loss(ours)[0], optimise=True)
    if diffusers := peer("diffusers"):
        # other GFLOPs: its MLP is plain, and each block embeds t and y
        net = diffusers.DiTTransformer2DModel(12, 64, in_channels=32, sample_size=16,
                                              num_layers=12, patch_size=1)
        velocity = lambda z, t, y: net(z, t, class_labels=y).sample
        yield "diffusers", step(net, lambda: loss(velocity)[0], optimise=True)


def stage2(folder):
    """A step with all losses; against its parts (our own modules) one by one, in fp32."""
    vgg, heads = f"{folder}/vgg.pth", f"{folder}/heads.pth"
    torch.save(torchvision.models.vgg16(init_weights=False).state_dict(), vgg)
    torch.save({f"lin{i}.model.1.weight": torch.ones(1, c, 1, 1)
                for i, c in enumerate((64, 128, 256, 512, 512))}, heads)
    lpips, critic = files.load_lpips(vgg, heads)[0], losses.PatchGAN()
    model, ema, frozen = (Tokenizer(ENCODERS["vitb14"], DECODERS["vavae"]).train()
                          for _ in range(3))
    torch.nn.ModuleList([ema, frozen]).requires_grad_(False)
    for net in (model, critic):
        runs.fast_weight_gradients(net)
    trained = [p for m in (model, critic) for p in m.parameters() if p.requires_grad]
    opt = torch.optim.Adam(trained, 1e-4, fused=True)
    args = train_tokenizer.parse(["--accum", "1"])
    s = argparse.Namespace(tokenizer=model, ddp_tokenizer=model, discriminator=critic,
                           ddp_discriminator=critic, lpips=lpips, reference=frozen)
    s.objective = partial(train_tokenizer.aligntok_objective, s, args)
    x, z = torch.rand(2, 3, 256, 256), torch.randn(2, 32, 16, 16)
    image = x.clone().requires_grad_()
    parts = (lambda: model.encode(x) - frozen.encode(x), lambda: model.decode(z),
             lambda: lpips(x, image), lambda: critic(image),
             lambda: losses.hinge_d(critic(x), critic(x)))

    def work(dtype=None):
        if dtype:
            s.autocast = lambda: autocast(dtype)
            train_tokenizer.training_step(x, [], s, args, gan=True, last=True)
        else:
            for part in parts:
                part().sum().backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        train_tokenizer.update_ema(ema, model, 0.9999)
    yield "ours", partial(work, AUTO)
    yield "ours fp32", partial(work, FP32)
    yield "its parts", work


def sampling(folder):
    """50 Euler steps of one latent, guided in the paper's interval; against a plain loop: guided
    throughout, an autocast at each step."""
    model, paper = LightningDiT(**DITS["B/1"]).eval(), sample.PRESETS["paper"]
    z, y = torch.randn(1, 32, 16, 16), torch.tensor([0, model.num_classes])
    times = sample.time_grid(50, paper["shift"])
    velocity = sample.Velocity(model, y[:1], 4.0, paper["cfg_interval"])

    def plain(z, t):
        with autocast(AUTO):
            both = model(torch.cat([z, z]), torch.full((2,), t), y).float()
        v, v_null = both.chunk(2)
        return v_null + 4.0 * (v - v_null)

    ours = torch.no_grad()(autocast(AUTO)(sample.integrate))
    yield "ours", partial(ours, velocity, z, times)
    yield "plain loop", partial(torch.no_grad()(sample.integrate), plain, z, times)


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
        "dit": dit, "stage2": stage2, "sampling": sampling, "fid": folders, "frechet": frechet,
        "loading": loading}


def measure(row):
    with tempfile.TemporaryDirectory() as folder:
        sides, gflop, times = dict(ROWS[row](folder)), {}, defaultdict(list)
        for side, work in sides.items():  # to warm up
            # the counter knows this kind of attention only
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                work()
            gflop[side] = counter.get_total_flops() / 1e9
        for side in [*sides, *reversed(sides)] * args.rounds:
            sides[side]()  # memory still has the shape that another side left
            times[side].append(timeit.timeit(sides[side], number=1))
    median = {side: statistics.median(seconds) for side, seconds in times.items()}
    for side, seconds in median.items():
        ratios = [f"{seconds / median[ours]:.2f} x {ours}" for ours in median
                  if "ours" in ours and "ours" not in side]
        rate = gflop[side] / seconds
        print(f"{row:8}  {side:14} {seconds:8.3f} s {gflop[side]:6.0f} GFLOP {rate:4.0f} GFLOP/s ",
              ", ".join(ratios), flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--rounds", type=int, default=3, choices=range(1, 21), metavar="N",
                   help="default: %(default)s")
    p.add_argument("--alone", action="store_true", help="without peers")
    args = p.parse_args()
    for row in args.rows:
        measure(row)
