"""Aligns a frozen DINOv2 into an image tokenizer, in the three stages of AlignTok (Section 3,
Figure 2).

    stage 1  latent alignment      E_p frozen; A, D train with L_rec       a semantic latent space
    stage 2  perceptual alignment  E_p, A, D train with L_rec + w_sp L_sp  details, not forgetting
    stage 3  decoder refinement    D alone trains with L_rec               sharper images

CPU, minutes, no download:  python train_tokenizer.py --preset tiny
One GPU:                    python train_tokenizer.py --accum 8
Eight GPUs, stage 2:        torchrun --standalone --nproc_per_node 8 train_tokenizer.py --stage 2

A run is a folder, runs/tokenizer: stage{1,2,3}.pt (each a whole tokenizer), the last two
stage*_step*.pt of each stage (they resume), log.csv, PNG grids (originals above, reconstructions
below), and story.png: what each stage reconstructs, with curves of held-out PSNR and probe (their
figures: held_out.csv). The same command resumes it.

The paper's baselines, --model vae and --model vavae, are one stage each; their result is vae.pt or
vavae.pt. --model vfmvae, the other system, has four stages, strong, weak, ssim and patchgan
(vfm_vae.STAGES), with a checkpoint of that name each.

Choices where the paper is silent: README, "Choices".

Legend: B batch, H W image sides, N tokens, D width, d latent channels, h w latent sides.
"""
import copy
import gc
import math
import operator
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import baselines
import losses
import runs
import story
import toy
import vfm_vae
from data import (
    Crops,
    ShuffledBatches,
    at_random,
    batches,
    check_images,
    in_order,
    on_rank_0,
    open_folders,
    rng,
    save_grid,
)
from fid import encode_images, linear_probe, psnr, ssim
from files import (
    ENCODER_URLS,
    UserError,
    build,
    check_same,
    find_weights,
    fingerprint,
    load_encoder,
    load_file,
    load_lpips,
    load_strictly,
    print_0,
    reading,
    save_checkpoint,
    warn,
)
from model import DECODERS, Tokenizer, add_lora, merge_lora, update_ema
from runs import count, index, positive, weight

# What trains; whether the frozen result of stage 1 is the reference of L_sp; whether the stage's
# result is the EMA of its weights.
STAGES = {
    1: {"name": "latent alignment", "trains": ("adapter", "decoder"),
        "reference": False, "ema": False},
    2: {"name": "perceptual alignment", "trains": ("encoder", "adapter", "decoder"),
        "reference": True, "ema": True},
    3: {"name": "decoder refinement", "trains": ("decoder",),
        "reference": False, "ema": True},
    0: {"name": "a baseline, from scratch",  # --model vae, vavae
        "trains": ("encoder", "quant_conv", "post_quant_conv", "decoder", "linear_proj"),
        "reference": False, "ema": True},
}
STAGES |= {name: {"name": "VFM-VAE", "reference": False, "ema": True} | row
           for name, row in vfm_vae.STAGES.items()}
COSTS = {2: 1.4, 3: 1.2}  # a step's time beside stage 1's, about: for the bar that foretells the end
LATENTS_STAY = (3, "ssim", "patchgan")  # only the decoder trains


def aligntok_objective(s, args, x):
    """Images x (B, 3, H, W) -> (what x^ should be, here x; x^; the terms that are added to L_rec:
    L_sp in stage 2, none in stages 1 and 3). Each tokenizer system has such a function, which
    training_step calls.

    The terms are a dict, name -> (weight, value). A weight None means: only logged. With (weight,
    value, layer, limit, beside) the weight is multiplied by the adaptive weight at that layer, of
    L_rec and what is added to it beside (losses.adaptive_weight)."""
    recon, z0, tokens = s.ddp_tokenizer(x)  # D(z0), z0 = A(E_p(x)) (B, d, h, w), E_p(x) (B, N, D)
    if s.reference is None:
        return x, recon, {}
    with torch.no_grad():  # the encoder and adapter that stage 1 has left, frozen
        tokens_ref = s.reference.features(x)
        z0_ref = s.reference.adapt(tokens_ref, *z0.shape[-2:])
    if args.sp_at == "encoder":  # the ablation "before the adapter"
        l_sp = losses.semantic_preservation(tokens, tokens_ref, args.sp_loss, dim=-1)
        return x, recon, {"sp": (args.w_sp, l_sp)}
    l_sp = losses.semantic_preservation(z0, z0_ref, args.sp_loss, dim=1)
    terms = {"sp": (args.w_sp, l_sp)}
    if args.sp_loss == "l2":  # L_sp as a fraction of the variance of stage 1's latents
        terms["sp_to_var"] = (None, l_sp / s.reference.latent_std.square().mean())
    return x, recon, terms


def training_step(x, noise, s, args, gan, last):
    """Figure 2, one micro-batch: backward through L_rec and the terms beside it, then through the
    discriminator's loss.

    x: (B, 3, H, W) in [-1, 1]. noise: what the objective takes after x; [] for AlignTok. s: the
    stage's networks (set_up_stage). gan: whether L_GAN is on yet. last: whether this is the last
    micro-batch of the step. Returns what is logged, as scalars on the device."""
    with runs.no_sync(s.ddp_tokenizer, not last), runs.no_sync(s.ddp_discriminator, not last):
        with s.autocast():
            x, recon, terms = s.objective(x, *noise)  # x^ (B, 3, H, W)
        recon = recon.float()

        # Eq. 1: L_rec = L1 + w_p L_perceptual + w_g L_GAN
        with s.autocast():
            l_rec, l1, perceptual = losses.reconstruction_loss(x, recon, s.lpips, args.w_p)
        log = {"l1": l1, "perceptual": perceptual, "rec": l_rec}
        linear_rec = loss = losses.linearised(l_rec, recon)  # the same gradients, at less cost
        if gan:
            s.discriminator.requires_grad_(False)  # of G's loss only the gradient of x^ is wanted
            with s.autocast():
                l_gan = losses.hinge_g(s.discriminator(recon))
            linear_gan = losses.linearised(l_gan, recon)
            last_layer = s.tokenizer.decoder.conv_out.weight
            adaptive = losses.adaptive_weight(linear_rec, linear_gan, last_layer)
            loss = loss + args.w_g * adaptive * linear_gan  # w_g = --w-g times the adaptive weight
            log |= {"g_loss": l_gan, "adaptive": adaptive}

        # Beside it: w_sp L_sp in stage 2; a baseline's own terms
        for name, (w, value, *balance) in terms.items():
            log[name] = value
            if balance:
                adaptive = losses.adaptive_weight(linear_rec, value, *balance)
                w = w * adaptive
                log[f"{name}_adaptive"] = adaptive
            if w is not None:
                loss = loss + w * value
        (loss / args.accum).backward()

        if gan:
            s.discriminator.requires_grad_(True)
            with s.autocast():  # two forwards: real and fake do not share BatchNorm's statistics
                real, fake = s.ddp_discriminator(x), s.ddp_discriminator(recon.detach())
            d_loss = losses.hinge_d(real, fake)
            (d_loss / args.accum).backward()
            log["d_loss"] = d_loss
            log["d_real"] = (real > 0).float().mean()  # D's accuracy on real images
            log["d_fake"] = (fake < 0).float().mean()  # and on reconstructions
    return {k: v.detach().float() for k, v in log.items()}


def update(s, args):
    """One step of Adam for G, and for D, which Adam leaves alone where it has no gradients; then
    the EMA."""
    for optimiser in (s.opt_g, s.opt_d):
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    if s.ema is not None:
        decay = args.ema_decay
        if decay is None:  # VFM-VAE's grows with the images seen
            images = (s.steps_before + s.step + 1) * args.batch_size
            decay = vfm_vae.ema_decay(images, args.batch_size)
        update_ema(s.ema, s.tokenizer, decay)


def train_stage(stage, args, run, data, held_out, lpips, device):
    """One stage, from its start or its last checkpoint, to its final checkpoint."""
    s = set_up_stage(stage, args, run, data, lpips, device)
    if resume_stage(s, args, run):
        return
    stream = training_images(s, args, data, device)
    describe_stage(s, args, data, device)

    def row():
        figures = s.meter.average()
        warn_of_gan(s, figures)
        return {"stage": s.number, "step": s.step} | figures

    draw = partial(show, s, args, data, held_out, device)
    for _ in run.steps(s, args, row, draw):
        gan = args.w_g > 0 and s.steps_before + s.step >= args.disc_start
        for micro in range(args.accum):
            x, _, *noise = next(stream)
            log = training_step(x, noise, s, args, gan, last=micro == args.accum - 1)
            s.meter.add(s.step + 1, log)
        update(s, args)
    if run.rank == 0:
        finish_stage(s, args, data, held_out, device, run.out / f"{s.prefix}.pt")
    runs.barrier(hours=12)  # the other ranks wait longer than a collective may take


def warn_of_gan(s, figures):
    """Says once in a stage what three rows of the log in a row show: a GAN from which G learns
    nothing. (One row, of few images, may show it in a good run.)"""
    if "d_loss" not in figures:
        return
    for fault, seen in {
            "the discriminator has collapsed: one answer to every image (d_real, d_fake)":
                min(figures["d_real"], figures["d_fake"]) < 0.01,
            "the discriminator has won: it is certain of every image (d_loss)":
                figures["d_loss"] < 0.01,
            "the adaptive weight of L_GAN is at its limit (adaptive)":
                figures.get("adaptive", 0) > 0.9 * losses.ADAPTIVE_LIMIT}.items():
        rows = s.rows_with.get(fault, 0)
        s.rows_with[fault] = rows + 1 if seen or rows >= 3 else 0
        if s.rows_with[fault] == 3:
            warn(f"{s.prefix}, step {s.step}: {fault}; a lower --w-g or --lr may help")


# ---- the end of a stage

@torch.compiler.set_stance("force_eager")
def finish_stage(s, args, data, held_out, device, path):
    """The stage's result is its EMA, where it has one: computes its latent statistics, validates it
    and saves it as a tokenizer, with D for the next stage."""
    result = (s.ema or s.tokenizer).eval()
    if args.lora and s.stage == 2:
        merge_lora(result.encoder)
    train = encode_images(result, data, args.size, args.encode_images, args.workers, device)
    if s.stage not in LATENTS_STAY:  # else they keep the statistics of the stage before
        result.latent_mean.copy_(train.latent_mean)
        result.latent_std.copy_(train.latent_std)
    probe_on = train if labelled(data, held_out) else None
    figures = validate(result, probe_on, held_out, args, device, s.lpips)
    n = min(args.val_images, len(held_out))
    print(f"{path.stem} on {n} held-out images: " + ", ".join(
        f"{k} {v:.4f}" if k in ("rec", "ssim") else f"{k} {v:.2f}" for k, v in figures.items()))
    save_checkpoint(path, {
        "stage": s.stage, "step": s.step, "total_steps": s.steps_before + s.step,
        "recipe": s.recipe, "arguments": result.arguments, "classes": s.classes,
        "tokenizer": result.state_dict(),
        "discriminator": s.discriminator.state_dict(), "opt_d": s.opt_d.state_dict(),
        "validation": figures})
    print(f"saved {path}")


def labelled(*sets):
    return all(images.labels is not None for images in sets)


PROBES = {"probe": "latents", "probe_tokens": "tokens"}


@torch.no_grad()
def validate(tokenizer, train, held_out, args, device, lpips, probes=PROBES):
    """Held-out L_rec without its GAN term, PSNR, SSIM; where there are labels, the linear probe of
    the latents (Figure 3) and of the tokens before the adapter. train: the encoded training images
    for the probe, or None. In fp32."""
    order = at_random(args.val_images, 32, len(held_out))
    sums = {"rec": 0.0, "psnr": 0.0, "ssim": 0.0}
    for x, _ in batches(Crops(held_out, args.size), order, args.workers, device):
        recon = runs.by_parts(lambda few: tokenizer.decode(tokenizer.encode(few)), x,
                              args.size ** 2).clamp(-1, 1)
        rec, *_ = losses.reconstruction_loss(x, recon, lpips, args.w_p)
        sums["rec"] += rec.item() * len(x)
        sums["psnr"] += psnr(x, recon).sum().item()
        sums["ssim"] += ssim(x, recon).sum().item()
    figures = {k: v / min(args.val_images, len(held_out)) for k, v in sums.items()}
    if train:
        val = encode_images(tokenizer, held_out, args.size, args.val_images, args.workers, device)
        for name, part in probes.items():
            figures[name] = linear_probe(getattr(train, part), train.labels,
                                         getattr(val, part), val.labels, device)
    return figures


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # its dtype and batch would be compiled for little
def show(s, args, data, held_out, device, path):
    """On the way: a grid at `path`; beside it story.png, with figures that cost little: of a
    quarter of the held-out images, with a probe of a sixteenth of the training images; at most 512
    and 2,048."""
    tokenizer = s.ema or s.tokenizer
    order = in_order(min(8, len(held_out)), 8)
    x, _ = next(batches(Crops(held_out, args.size), order, 0, device))
    save_grid([x, tokenizer.decode(tokenizer.encode(x))], path)

    few = copy.copy(args)
    few.val_images = min(512, math.ceil(min(args.val_images, len(held_out)) / 4))
    train, n = None, min(2048, math.ceil(args.encode_images / 16))
    figures = {"images": few.val_images}
    if labelled(data, held_out):
        train = encode_images(tokenizer, data, args.size, n, args.workers, device)
    figures |= validate(tokenizer, train, held_out, few, device, s.lpips, {"probe": "latents"})
    story.tell(path, s.prefix, s.steps_before, s.steps_before + s.step, figures)


# ---- setting up a stage

def set_up_stage(stage, args, run, data, lpips, device):
    """The stage's networks, optimisers, EMA and recipe: the arguments that a resume must repeat."""
    if args.model == "vfmvae":
        start = start_vfm_vae(stage, args, data, run, device)
    elif stage in (0, 1):
        start = start_from_encoder(stage, args, data, run, device)
    else:
        start = start_from_stage_before(stage, args, run)
    tokenizer, discriminator = start.tokenizer.to(device), start.discriminator.to(device)
    if start.reference is not None:
        start.reference.to(device).requires_grad_(False).eval()

    tokenizer.requires_grad_(False).eval()
    for name, part in tokenizer.named_modules():
        if name in STAGES[stage]["trains"]:
            part.requires_grad_(True).train()
    if stage == 2:
        for p in tokenizer.encoder.never_trains():
            p.requires_grad_(False)
        if args.lora:
            seed_torch(args.seed, "lora")
            add_lora(tokenizer.encoder, args.lora)
    ema = copy.deepcopy(tokenizer).requires_grad_(False).eval() if STAGES[stage]["ema"] else None

    encoder_lr = args.encoder_lr if stage == 2 else args.lr
    groups = [{"params": [p for p in part.parameters() if p.requires_grad],
               "lr": encoder_lr if name == "encoder" else args.lr}
              for name, part in tokenizer.named_children()]
    betas = (0.0, 0.99) if args.model == "vfmvae" else (0.5, 0.9)
    opt_g = torch.optim.Adam(groups, betas=betas, fused=True)
    opt_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=betas, fused=True)
    if start.opt_d:
        runs.load_optimiser(opt_d, start.opt_d)
        opt_d.param_groups[0]["lr"] = args.lr  # the state has that of the stage before

    dtype = runs.autocast_dtype(args.dtype, device)
    recipe = {"model": args.model, "stage": stage, "dtype": str(dtype).removeprefix("torch."),
              "fingerprint at the start": fingerprint(tokenizer), "list of images": data.identity,
              "lpips": lpips is not None, "encoder_lr": encoder_lr}
    recipe |= {k: getattr(args, k) for k in (
        "encoder", "decoder", "d", "disc_ch", "size", "batch_size", "accum", "lr", "seed", "w_p",
        "w_g", "w_sp", "sp_loss", "sp_at", "w_kl", "w_vf", "vf_margins", "disc_start",
        "ema_decay", "lora")}
    if args.model == "vfmvae":
        recipe |= {"dino": args.dino, "w_gan": args.w_gan}
    # VFM-VAE's steps draw from it; a checkpoint keeps its state
    seed_torch(args.seed, "stage", stage, run.rank)
    number = args.stages.index(stage) + 1 if args.model == "vfmvae" else stage
    s = SimpleNamespace(
        stage=stage, number=number, prefix=prefix(stage, args), recipe=recipe,
        may_change=("dtype",), rows_with={}, step=0,
        steps=args.steps_of[stage], steps_before=start.steps, log_every=args.log_every,
        shown=("rec", "sp", "d_loss"), classes=data.classes, tokenizer=tokenizer,
        discriminator=discriminator,
        reference=start.reference, ema=ema, lpips=lpips, opt_g=opt_g, opt_d=opt_d,
        meter=runs.Meter(device), autocast=partial(runs.autocast, device, dtype))
    s.networks = {"tokenizer": tokenizer, "discriminator": discriminator}  # in a checkpoint
    if ema is not None:
        s.networks["ema"] = ema
    s.optimisers = {"opt_g": opt_g, "opt_d": opt_d}
    objective = {"aligntok": aligntok_objective, "vfmvae": vfm_vae.objective}.get(
        args.model, baselines.objective)
    s.objective = partial(objective, s, args)
    return s


def prefix(stage, args):
    """Of the stage's files."""
    return stage if stage in vfm_vae.STAGES else f"stage{stage}" if stage else args.model


def start_from_encoder(stage, args, data, run, device):
    """Stage 1 starts from E_p, a baseline from random weights."""
    seed_torch(args.seed, "encoder")  # for random:NAME
    if args.model == "vae":
        encoder = None
    elif args.encoder == "tiny14":
        encoder, arguments = toy.stand_in_encoder(args, data, run, device)
    else:
        with runs.rank_0_first():
            encoder, arguments = load_encoder(args.encoder)
    seed_torch(args.seed, "init")  # the same on every rank, whatever E_p is
    discriminator = losses.PatchGAN(args.disc_ch)
    if stage == 0:
        tokenizer = baselines.VAE(DECODERS[args.decoder], args.d, encoder and encoder.dim)
    else:
        tokenizer = Tokenizer(arguments, DECODERS[args.decoder], args.d)
        tokenizer.encoder.load_state_dict(encoder.state_dict())
        encoder = None
    return SimpleNamespace(tokenizer=tokenizer, discriminator=discriminator, reference=encoder,
                           opt_d=None, steps=0)


def start_from_stage_before(stage, args, run):
    """Stages 2 and 3 start from the final checkpoint of the stage before (its EMA, if any). Stage 2
    keeps a frozen copy of encoder and adapter: the reference of L_sp."""
    path = Path(args.init or run.out / f"stage{stage - 1}.pt")
    if not path.exists():
        raise UserError(
            f"there is no {path}: run --stage {stage - 1} first, or give --init CKPT")
    content = load_file(path)
    if not {"discriminator", "arguments", "total_steps"} <= content.keys():
        raise UserError(
            f"{path} is not the final checkpoint of a stage (expected stage{stage - 1}.pt)")
    with reading(path, "checkpoint"):
        if content["stage"] != stage - 1:
            raise UserError(f"{path} is of stage {content['stage']}; "
                            f"stage {stage} continues from stage {stage - 1}")
        wanted = {"decoder": args.decoder, "d": args.d, "disc_ch": args.disc_ch}
        if args.encoder_given:
            wanted["encoder"] = args.encoder
        check_same(content["recipe"], wanted, path, "repeat them, or give another --init")
        args.encoder = content["recipe"]["encoder"]
        tokenizer = build(Tokenizer, content["arguments"], content["tokenizer"], path)
        discriminator = losses.PatchGAN(args.disc_ch)
        load_strictly(discriminator, content["discriminator"], path)
        adam = torch.optim.Adam(discriminator.parameters(), fused=True)
        runs.load_optimiser(adam, content["opt_d"])  # raises where it does not fit
        steps = operator.index(content["total_steps"])
    reference = None
    if STAGES[stage]["reference"]:
        reference = copy.deepcopy(tokenizer)
        reference.decoder = None  # L_sp compares latents
    return SimpleNamespace(tokenizer=tokenizer, discriminator=discriminator, reference=reference,
                           opt_d=content["opt_d"], steps=steps)


def start_vfm_vae(stage, args, data, run, device):
    """The first stage starts from the foundation encoder, the others from the final checkpoint of
    the stage before."""
    last_stage, content, opt_d, steps = stage == "patchgan", None, None, 0
    if stage == "strong":
        seed_torch(args.seed, "encoder")  # for random:NAME
        if args.encoder == "tiny14":
            encoder, arguments = toy.stand_in_encoder(args, data, run, device)
        else:
            with runs.rank_0_first():
                encoder, arguments = load_encoder(args.encoder)
        seed_torch(args.seed, "init")
        family = arguments.get("family", "dinov2")
        arguments = {k: v for k, v in arguments.items() if k != "family"}
        tokenizer = vfm_vae.VFMVAE({family: arguments}, d=args.d, **vfm_vae.reading_sizes(
            args.decoder, encoder))
        tokenizer.vfm_encoder.encoder["vision_model"].load_state_dict(encoder.state_dict())
    else:
        before = prefix(args.stages[args.stages.index(stage) - 1], args)
        path = Path(args.init or run.out / f"{before}.pt")
        if not path.exists():
            raise UserError(
                f"there is no {path}: run --stage {before} first, or give --init CKPT")
        content = load_file(path)
        with reading(path, f"checkpoint of the stage {before}"):
            if content["stage"] != before:
                raise UserError(f"{path} is of stage {content['stage']}; "
                                f"stage {stage} continues from stage {before}")
            wanted = {"decoder": args.decoder, "d": args.d, "disc_ch": args.disc_ch,
                      "dino": args.dino}
            if args.encoder_given:
                wanted["encoder"] = args.encoder
            check_same(content["recipe"], wanted, path, "repeat them, or give another --init")
            args.encoder = content["recipe"]["encoder"]
            arguments, state = vfm_vae.VFMVAE.in_checkpoint(content)
            if not STAGES[stage]["vf"]:  # linear_proj serves the VF loss alone
                arguments = arguments | {"linear_proj": False}
                state = {k: v for k, v in state.items() if "linear_proj" not in k}
            tokenizer = build(vfm_vae.VFMVAE, arguments, state, path)
            steps, opt_d = operator.index(content["total_steps"]), content["opt_d"]
            state_d = content["discriminator"]
    main = losses.PatchGAN(args.disc_ch)
    if args.dino != "none":
        main = vfm_vae.ProjectedDiscriminator(mode=tokenizer.vfm_encoder.mode)
    discriminator = vfm_vae.Discriminators(main, args.disc_ch, last_stage)
    if content:
        load_strictly(discriminator, state_d, path)
        with reading(path, "checkpoint"):
            runs.load_optimiser(torch.optim.Adam(discriminator.parameters(), fused=True), opt_d)
    elif args.dino not in ("none", "random"):
        path = find_weights(ENCODER_URLS["dino-s16"], "", "--dino",
                            None if args.dino == "official" else args.dino)
        load_strictly(main.dino["model"]["model"], load_file(path, "DINO ViT-S/16"), path)
    return SimpleNamespace(tokenizer=tokenizer, discriminator=discriminator, reference=None,
                           opt_d=opt_d, steps=steps)


def seed_torch(*key):
    torch.manual_seed(int(rng(*key).integers(2 ** 62)))


def training_images(s, args, data, device):
    """Wraps the networks for DDP and returns the endless stream of (x, label), for all systems
    but AlignTok (x, label, noise), from the stage's step on."""
    runs.make_fast(s.tokenizer, args, device, vfm_vae.ConvNeXtLayer)
    runs.fast_weight_gradients(s.discriminator)
    s.ddp_tokenizer = runs.wrap(s.tokenizer, device)
    s.ddp_discriminator = runs.wrap(s.discriminator, device)
    noise = (args.d, *[args.size // s.tokenizer.factor] * 2)
    if args.model == "aligntok":
        noise = None
    crops = Crops(data, args.size, (args.seed, "augment", s.stage), noise)
    order = ShuffledBatches(len(data), args.batch_size, (args.seed, "order", s.stage), s.step,
                            args.accum, args.rank, args.world)
    return batches(crops, order, args.workers, device)


def describe_stage(s, args, data, device):
    sizes = {True: 0, False: 0}  # trained, frozen
    for p in s.tokenizer.parameters():
        sizes[p.requires_grad] += p.numel()
    in_d = sum(p.numel() for p in s.discriminator.parameters())
    trains = [name for name, _ in s.tokenizer.named_modules()
              if name in STAGES[s.stage]["trains"]]
    name = f"stage {s.stage}" if s.stage else args.model
    weights = f"w_sp {args.w_sp:g}"
    if not s.stage:
        weights = f"w_kl {args.w_kl:g}, w_vf {args.w_vf * (args.model == 'vavae'):g}"
    weights = f"w_g {args.w_g:g} from step {args.disc_start} of all stages, {weights}"
    if args.model == "vfmvae":
        row = STAGES[s.stage] | {"gan": STAGES[s.stage]["gan"] * args.w_gan}
        weights = ", ".join(f"{k} {row[k]:g}" for k in vfm_vae.WEIGHTS if k != "lpips")
        weights += f" from step {args.disc_start} of all stages"
    print_0(
        f"\n{name}, {STAGES[s.stage]['name']}: {' '.join(trains)} train, {sizes[True] / 1e6:.2f}M "
        f"parameters; {sizes[False] / 1e6:.2f}M frozen; discriminator {in_d / 1e6:.2f}M\n"
        f"{runs.describe(s, args, len(data), args.world)}\n"
        f"  {device.type}, {s.recipe['dtype']}, w_p {args.w_p:g}, {weights}")


# ---- stop and resume

COLUMNS = ["stage", "step", "l1", "perceptual", "rec", "g_loss", "adaptive", "sp", "sp_to_var",
           "kl", "vf", "vf_adaptive", "d_loss", "d_real", "d_fake"]
VFM_COLUMNS = ["multires", "ssim", "patchgan", "matching"]


def check_folder(out, model):
    """UserError where `out` holds another system's run: its log would be rewound."""
    systems = {"aligntok": ["stage1", "stage2", "stage3"], "vae": ["vae"], "vavae": ["vavae"],
               "vfmvae": [*vfm_vae.STAGES]}
    del systems[model]
    for other, names in systems.items():
        for name in names:
            if (out / f"{name}.pt").exists() or runs.step_files(out, name, "pt"):
                raise UserError(f"{out} holds {name} of --model {other}: choose another --out")


def resume_stage(s, args, run):
    """Loads the stage's last good checkpoint, or returns True where the stage is complete."""
    final = run.out / f"{s.prefix}.pt"
    if args.overwrite:
        run.forget(s.prefix)
    if final.exists():
        done = load_file(final)
        with reading(final, "final checkpoint of a stage"):
            check_same(done["recipe"], s.recipe, final, may_change=s.may_change)
            step = operator.index(done["step"])
        if step >= s.steps:
            print_0(f"{s.prefix} is complete: {final}")
            return True
        if not run.checkpoints(s.prefix):
            raise UserError(f"{final} is at step {step} of {s.steps}, but its "
                            f"{s.prefix}_step*.pt are gone; --overwrite starts the stage again")
    run.resume(s, stage=(s.number,))
    if run.rank == 0:
        story.rewind(run.out, s.steps_before + s.step)
    return False


# ---- the command line

# Defaults of the flags. size: px; disc_ch: the discriminator's width; steps: of stages 1, 2, 3.
PRESETS = {
    "tiny": {
        "size": 64, "encoder": "tiny14", "decoder": "tiny", "disc_ch": 16, "data": "shapes",
        "steps": (250, 300, 150), "batch_size": 24, "lr": 1e-3, "w_p": 0.0, "disc_start": 250,
        "ema_decay": 0.98, "workers": 0, "log_every": 25, "save_every": 100, "grid_every": 100,
        "val_images": 512, "encode_images": 4096, "pretrain_steps": 400, "dino": None},
    "paper": {
        "size": 256, "encoder": "vitl14", "decoder": "vavae", "disc_ch": 64,
        "data": "data/imagenet/train", "steps": (100_000, 200_000, 100_000), "batch_size": 256,
        "lr": 1e-4, "w_p": 1.0, "disc_start": 2_500, "ema_decay": 0.9999, "workers": 8,
        "log_every": 50, "save_every": 2_500, "grid_every": 2_500, "val_images": 5_000,
        "encode_images": 50_000, "pretrain_steps": 0, "dino": None},
}
# What --model vfmvae changes. w_gan: times the stage's weight of the GAN; tiny's L_rec has no 10
# LPIPS, and a tenth balances it. None: as its stage says (vfm_vae.STAGES); steps: of its four stages.
VFM_PRESETS = {
    "tiny": {"steps": (300, 250, 70, 70), "batch_size": 16, "dino": "none", "w_gan": 0.1,
             "disc_start": 300},  # from scratch; before, it only holds L_rec back
    "paper": {"encoder": "siglip2-l16-512", "decoder": "paper", "dino": "official", "w_gan": 1.0,
              "disc_start": 0, "lr": None, "w_p": None, "ema_decay": None, "batch_size": 512,
              "steps": [round(row["images"] / 512) for row in vfm_vae.STAGES.values()]},
}


def parse(argv=None):
    p = runs.Parser(__doc__)
    add = p.add_argument
    add("--model", choices=["aligntok", "vae", "vavae", "vfmvae"], default="aligntok",
        help="vae, vavae: the paper's baselines, for the steps of all stages together; vfmvae: "
             "VFM-VAE")
    add("--stage", choices=["1", "2", "3", *vfm_vae.STAGES, "all"], default="all",
        help="1, 2, 3 of aligntok, the others of vfmvae (default: %(default)s)")
    add("--init", help="the stage before's final checkpoint (default: in --out)")
    add("--out", default="runs/tokenizer", help="the run's folder (default: %(default)s)")
    p.training_flags()
    add("--lr", type=positive, help="of Adam, for G and D")
    add("--encoder-lr", type=positive, help="of E_p in stage 2 (default: --lr)")
    add("--encoder",
        help="stage 1, vavae, vfmvae: vits14 ... vitg14, with _reg4; ablations: mae-l16, dino-b16, "
             "...; or a file of a DINOv2, MAE, DINO v1 or SigLIP2, or random:NAME")
    add("--dino", help="vfmvae: DINO's ViT-S/16 for the discriminator, official, a file or random; "
                       "none: a PatchGAN in its place")
    add("--decoder", help=f"its size: {', '.join(DECODERS)}; vfmvae: {', '.join(vfm_vae.VFM_VAES)}")
    add("--d", type=count, default=32, help="latent channels (default: %(default)s)")
    add("--vgg16", help="torchvision's VGG16 file, for L_perceptual")
    add("--lpips-heads", help="LPIPS v0.1 VGG heads, for L_perceptual")
    add("--w-p", type=weight, help="weight of L_perceptual")
    add("--w-g", type=weight, default=0.5,
        help="w_g is this times the adaptive weight; 0: no GAN (default: %(default)s)")
    add("--w-sp", type=weight, default=1.0, help="weight of L_sp in stage 2 (default: %(default)s)")
    add("--sp-loss", choices=["l2", "cosine"], default="l2", help="ablation: cosine")
    add("--sp-at", choices=["adapter", "encoder"], default="adapter",
        help="ablation: L_sp before the adapter")
    add("--lora", type=count, metavar="RANK",
        help="ablation, stage 2: of E_p low-rank updates train alone; merged when the stage ends")
    add("--w-kl", type=weight, default=1e-6,
        help="vae, vavae: weight of KL, beside a sum over pixels (default: %(default)s)")
    add("--w-vf", type=weight, default=0.1,
        help="vavae: weight of the VF loss, times its adaptive weight (default: %(default)s)")
    add("--vf-margins", type=weight, nargs=2, default=[0.5, 0.25], metavar=("M_COS", "M_DIST"),
        help="vavae: m_cos and m_dist of the VF loss (default: %(default)s)")
    add("--disc-start", type=index, help="step, counted through the stages, that begins the GAN")
    add("--encode-images", "--probe-images", type=count,
        help="training images for a stage's latent statistics and probe")
    args = p.fill(argv, PRESETS)

    sizes = vfm_vae.VFM_VAES if args.model == "vfmvae" else DECODERS
    if "decoder" in args.given and args.decoder not in sizes:
        raise UserError(f"--decoder {args.decoder}: --model {args.model} has {', '.join(sizes)}")
    if args.lora and (args.model != "aligntok" or args.stage in ("1", "3")):
        raise UserError("--lora goes with --stage 2 or all of aligntok: only there the encoder "
                        "trains")
    args.encoder_given, args.stages = "encoder" in args.given, [1, 2, 3]
    if args.model == "vfmvae":
        for name in ("encoder_lr", "w_g", "w_sp", "sp_loss", "sp_at", "w_kl", "w_vf", "vf_margins"):
            if getattr(args, name) != p.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} is not for --model vfmvae: its rates "
                                "and weights are those of its stages (vfm_vae.STAGES)")
        return parse_vfmvae(args)
    if args.stage in vfm_vae.STAGES:
        raise UserError(f"--stage {args.stage} goes with --model vfmvae")
    if args.preset == "tiny" and "w_p" not in args.given and args.vgg16 and args.lpips_heads:
        args.w_p = 1.0  # that preset leaves L_perceptual out only because it needs files
    args.encoder_lr = args.encoder_lr or args.lr
    steps = [args.steps] * 4 if isinstance(args.steps, int) else [*args.steps, sum(args.steps)]
    args.steps_of = dict(zip((1, 2, 3, 0), steps))
    if args.size % 16 or args.size < 32:  # 32: the least that PatchGAN takes
        raise UserError(f"--size must be divisible by 16 and at least 32, not {args.size}")
    if args.stage in ("1", "all") and args.init:
        raise UserError("--init continues from an earlier stage: it goes with --stage 2 or 3")
    baseline = args.model != "aligntok"
    if baseline and args.stage != "all" or args.model == "vae" and args.encoder_given:
        raise UserError(f"--model {args.model} is one stage, from scratch: no --stage, and for vae "
                        "no --encoder")
    stages = [0] if baseline else [1, 2, 3]
    args.now = stages if args.stage == "all" else [int(args.stage)]
    return args


def parse_vfmvae(args):
    """The rest of parse for --model vfmvae."""
    defaults = VFM_PRESETS[args.preset]
    vars(args).update({k: v for k, v in defaults.items() if k not in args.given})
    if "w_p" not in args.given and args.vgg16 and args.lpips_heads:
        args.w_p, args.w_gan = None, 1.0
    args.stages = list(vfm_vae.STAGES)
    if args.stage not in (*args.stages, "all"):
        raise UserError(f"--stage {args.stage}: --model vfmvae has {', '.join(args.stages)}")
    if args.stage in ("strong", "all") and args.init:
        raise UserError("--init continues from an earlier stage: it goes with --stage weak, ssim "
                        "or patchgan")
    if args.size % 64:
        raise UserError("--size must be divisible by 64 (latent sides by 4) for vfmvae, not "
                        f"{args.size}")
    steps = [args.steps] * 4 if isinstance(args.steps, int) else args.steps
    args.steps_of = dict(zip(args.stages, steps))
    args.w_g = 0.0  # its GAN is among the objective's terms
    args.now = args.stages if args.stage == "all" else [args.stage]
    return args


def of_stage(args, stage):
    """The arguments of one stage: what no flag gives is the stage's (vfm_vae.STAGES)."""
    args = copy.copy(args)
    if stage != 2:
        args.lora = None
    if args.model == "vfmvae":
        row = vfm_vae.STAGES[stage]
        args.lr = row["lr"] if args.lr is None else args.lr
        args.w_p = row["lpips"] if args.w_p is None else args.w_p
    return args


def main(argv=None):
    args = parse(argv)
    args.rank, args.world, device = runs.setup_ranks()
    runs.check_batch_size(args, args.world)
    if args.model == "vfmvae":
        try:
            vfm_vae.local_groups(args.batch_size // args.world // args.accum)
        except ValueError as e:
            raise UserError(f"--batch-size {args.batch_size}: {e}") from None
    if args.data == "shapes":
        data, held_out = toy.open_shapes(args.val, args.size, args.val_images)
    else:
        data, held_out = on_rank_0(open_folders, args.data, args.val, args.val_images)
    lpips = None
    if args.w_p is None or args.w_p > 0:
        with runs.rank_0_first():
            lpips = load_lpips(args.vgg16, args.lpips_heads)[0].to(device)
        if runs.compiles(args, device):
            runs.compile_parts([(lpips, "distance")])
    elif args.preset == "tiny":
        print_0("w_p = 0: no perceptual loss (it takes --vgg16 and --lpips-heads)")
    began = time.time()
    columns = COLUMNS + VFM_COLUMNS * (args.model == "vfmvae")
    with runs.Run(args.out, args.rank, columns) as run:
        check_folder(run.out, args.model)
        if args.check_data or args.skip_unreadable:
            data, held_out = check_images([data, held_out], args, args.rank, args.world)
        for i, stage in enumerate(args.now):
            later = sum(args.steps_of[k] * COSTS.get(k, 1) for k in args.now[i + 1:])
            run.later = later / COSTS.get(stage, 1)
            train_stage(stage, of_stage(args, stage), run, data, held_out, lpips, device)
            gc.collect()  # compiled networks are cycles: their memory is the next stage's
    print_0(f"done in {(time.time() - began) / 60:.1f} min; story.png, grids and log.csv in {args.out}")


if __name__ == "__main__":
    runs.launch(main)
