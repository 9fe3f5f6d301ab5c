"""What keeps a long run alive: ranks, a run's folder with its log and checkpoints, signals, the
meter that stops on a loss that is not finite, and the command line.

The same command resumes a run, which ends with the same bits as if it had never stopped.
"""
import argparse
import contextlib
import csv
import ctypes
import itertools
import math
import multiprocessing
import operator
import os
import re
import signal
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from files import (
    STOP_SIGNALS,
    SystemFailure,
    UserError,
    barrier,
    check_same,
    gather,
    load_file,
    load_strictly,
    lock,
    reading,
    save_checkpoint,
    system_failure,
    write_atomically,
)
from losses import average_over_ranks
from model import Block, DiTBlock, ResnetBlock, SigLIPBlock

# Page faults took up to a third of a step on CPUs (docs/engineering.md, Speed). So tensors lie in
# huge pages, where Linux gives them (PyTorch reads this before its first tensor), and glibc keeps
# the memory that it has. Beside GPUs it must give it back: each rank has read whole checkpoints.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if not torch.cuda.is_available():
    with contextlib.suppress(AttributeError, TypeError):  # another C library, Windows
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)  # never
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)


# ---- ranks

def under_torchrun():
    """Whether torchrun has started this process. UserError where its variables are not complete, or
    another launcher has started several processes."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if not missing:
        return True
    script = Path(sys.argv[0]).name
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys():
        raise UserError(
            f"of torchrun's variables {', '.join(missing)} are missing: start it by torchrun "
            f"--standalone --nproc_per_node GPUS {script} ...; for one process unset the others")
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            if os.environ[name] != "1":
                raise UserError(
                    f"{os.environ[name]} processes ({name}) that know nothing of each other: start "
                    "one per node, and in it torchrun (srun --ntasks-per-node 1 torchrun ... "
                    f"{script} ...); for one process: srun --ntasks 1")
            break
    return False


def setup_ranks():
    """(rank, world size, device). Under torchrun it joins the process group."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    # fp32 means fp32: no TF32 in validation, statistics, decoding, --dtype fp32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not under_torchrun():
        return 0, 1, device
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"more ranks on this node than its {torch.cuda.device_count()} GPUs "
                            "(--nproc_per_node)")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return dist.get_rank(), dist.get_world_size(), device


def wrap(module, device):
    """DistributedDataParallel under torchrun, else the module itself. Its buffers are the same on
    all ranks by construction."""
    if not dist.is_initialized():
        return module
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 prefers a newer name
        return DistributedDataParallel(module, ids, broadcast_buffers=False,
                                       gradient_as_bucket_view=True)


def no_sync(module, skip):
    """Ranks average their gradients at the last micro-batch only."""
    if skip and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 goes through the block first (and downloads), then the others."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def autocast_dtype(name, device):
    """auto: bf16 where it is native (Ampere GPUs, CPUs with AVX512-BF16), else fp32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
        name = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- speed and memory

def make_fast(model, args, device, *more):
    """What both training scripts do to a network before its first step; in place, so keys stay.
    more: classes that are blocks for --checkpointing, too."""
    blocks = [part for part in model.modules()
              if isinstance(part, (Block, SigLIPBlock, ResnetBlock, DiTBlock, *more))]
    if compiles(args, device):
        compile_parts([(block, "forward") for block in blocks] if args.checkpointing
                      else model.compiled())
    elif device.type == "cpu":
        fast_weight_gradients(model)
    if args.checkpointing:
        checkpoint_activations(blocks)


def compiles(args, device):
    """By default on GPUs; not in the preset tiny, whose runs are shorter than their compilation."""
    if args.compile is None:
        return device.type == "cuda" and args.preset != "tiny"
    return args.compile


def compile_parts(parts):
    """torch.compile for the methods of parts of a network, (part, name)."""
    from torch._dynamo import config as dynamo  # they take seconds
    from torch._functorch import config as functorch

    functorch.donated_buffer = False  # an adaptive weight's graph is walked twice
    dynamo.cache_size_limit = 64  # a block's code meets more shapes than 8
    dynamo.optimize_ddp = False  # DDP would cut each block's graph where its buckets end
    for part, name in parts:
        setattr(part, name, torch.compile(getattr(part, name), dynamic=False))


def checkpoint_activations(blocks):
    """--checkpointing: each block keeps only its input and computes the rest again in the backward
    pass: less memory, the same gradients, slower."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def by_parts(f, x, pixels):
    """f(x) of a batch, a few images at once: 32 of 256 px. pixels: of an image. LDM's decoder takes
    140 MB for each image there; and CUDA's up-sampling fails at 2**31 numbers, which are 64 images
    of 512 px."""
    return torch.cat([f(few) for few in x.split(max(1, 2 ** 21 // pixels))])


class TapConvolution(torch.autograd.Function):
    """F.conv2d whose weight gradient is a matrix product for each tap (i, j) of the kernel:
    dW[:, :, i, j] = dy^T x, where dy (B*h*w, C_out) are the output's gradients and x (B*h*w, C_in)
    the inputs that this tap has met."""
    block = 2 ** 19  # numbers of x at once: they stay in the CPU's cache for all taps

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, dy):
        (x, weight), (for_x, for_weight, for_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        dx = dw = db = None
        if for_x:
            dx, *_ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1,
                (True, False, False))
        if for_weight:
            dw = weight_gradient(x, dy, weight, ctx.stride, ctx.padding)
        if for_bias:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None, None


def weight_gradient(x, dy, weight, stride, padding):
    (C_out, C_in, *kernel), (B, _, h, w) = weight.shape, dy.shape
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    x, dy = x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)  # (B, H, W, C_in), (B, h, w, C_out)
    dw = weight.new_zeros(*kernel, C_out, C_in)
    rows = max(1, TapConvolution.block // (B * w * C_in))
    for top in range(0, h, rows):
        block = dy[:, top:top + rows]
        n, block = block.shape[1], block.reshape(-1, C_out).t()
        for i, j in itertools.product(*map(range, kernel)):
            first = i + top * stride[0]
            met = x[:, first:first + n * stride[0]:stride[0], j:j + w * stride[1]:stride[1]]
            torch.addmm(dw[i, j], block, met.reshape(-1, C_in), out=dw[i, j])
    return dw.permute(2, 3, 0, 1)  # (C_out, C_in, kernel)


def fast_weight_gradients(model):
    """On a CPU that has AVX2 and not AVX-512, the weight gradient of a wide channels_last
    convolution runs at a fifth of the speed of its other passes. There it is computed by taps."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d) and min(conv.weight.shape[:2]) >= 64:  # never in groups
                conv._conv_forward = partial(by_taps, conv.stride, conv.padding)


def by_taps(stride, padding, x, weight, bias):
    if torch.is_autocast_enabled("cpu") or not x.is_cpu:
        return F.conv2d(x, weight, bias, stride, padding)
    return TapConvolution.apply(x, weight, bias, stride, padding)


# ---- a run's folder

class Run:
    """A folder with log.csv and checkpoints PREFIX_step*.pt, of which the last two are kept. Rank 0
    writes, and locks the folder until the `with` ends.

    SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 end the run at once where that loses nothing (set-up, cache,
    validation). Between defer_signals(True) and (False) they set `stopping`, which the loop obeys
    after its step."""

    def __init__(self, out, rank, columns):
        self.out, self.rank, self.columns = Path(out), rank, columns
        self.stopping = self.deferring = False
        self.later = 0  # steps of the command after the present stage, as long as its own
        self.lock, self.good, self.parent = contextlib.ExitStack(), {}, os.getppid()
        if rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                self.lock.enter_context(lock(
                    self.out / ".lock",
                    f"another run is writing to {out}; wait for it or choose another --out"))
                # what a killed run was writing
                for part in self.out.glob(".*_step*.part"):
                    part.unlink()
            except OSError as e:
                self.lock.close()
                raise UserError(f"cannot write to --out {out}: {e.strerror}") from None

    def __enter__(self):
        # what nohup has ignored stays ignored
        heeded = [s for s in STOP_SIGNALS
                  if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
        self.handlers = {s: signal.signal(s, self._stop) for s in heeded}
        return self

    def __exit__(self, *_):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.lock.close()

    def _stop(self, number, _):
        # a second Ctrl-C does not wait
        if not self.deferring or self.stopping and number == signal.SIGINT:
            sys.exit("error: stopped by a signal; repeat the command to go on")
        self.stopping = True

    def defer_signals(self, yes):
        self.deferring = yes
        if self.stopping and not yes:
            self._stop(None, None)

    def should_stop(self):
        """Whether any rank was asked to stop. The flag is on the CPU, so that no GPU waits."""
        if not dist.is_initialized():
            return self.stopping
        # SIGUSR1 ends torchrun, which does not pass it on
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            self.stopping = True
        flag = torch.tensor(float(self.stopping))
        dist.all_reduce(flag)
        return flag.item() > 0

    def checkpoints(self, prefix):
        return step_files(self.out, prefix, "pt")

    def last_good(self, prefix):
        return self.good.get(prefix, "none")

    def resume(self, s, stage=()):
        """Loads the newest good checkpoint, if any, into `s` and rewinds the log to its step. s:
        prefix, recipe (what must not change, but for may_change), networks, optimisers, meter, step
        and steps. stage: (its number,) where log.csv begins with it."""
        saved = self._newest(s.prefix, s.recipe, s.may_change)
        if saved:
            path = self.last_good(s.prefix)
            with reading(path, "checkpoint"):
                for name, network in s.networks.items():
                    load_strictly(network, saved[name], path)
                for name, optimiser in s.optimisers.items():
                    load_optimiser(optimiser, saved[name])
                s.meter.load(saved["meter"])
                s.step = operator.index(saved["step"])
                torch.set_rng_state(saved["rng"][self.rank % len(saved["rng"])])
            if s.step > s.steps:
                raise UserError(f"{path} is already at step {s.step}; --steps {s.steps} is less")
        steps = gather(s.step)
        if len(set(steps)) > 1:
            raise UserError(f"the ranks resume from different steps {steps}: all must see the "
                            f"folder --out {self.out}")
        if saved and self.rank == 0:  # a kill may have come between a save and what it deletes
            for old in [p for p in self.checkpoints(s.prefix) if p < path][:-1]:
                old.unlink()
        self.rewind_log(s.step, s.steps, s.log_every, stage)

    def _newest(self, prefix, recipe, may_change):
        for path in reversed(self.checkpoints(prefix)):
            try:
                content = load_file(path)
                if not isinstance(content.get("recipe"), dict):
                    raise UserError(f"{path} is no checkpoint to resume from")
            except SystemFailure:
                raise
            except UserError as e:
                print(f"WARNING: {e}; trying the checkpoint before it", file=sys.stderr)
                continue
            check_same(content["recipe"], recipe, path, may_change=may_change)
            self.good[prefix] = path
            return content
        if self.checkpoints(prefix):
            raise UserError(f"no checkpoint {prefix}_step*.pt in {self.out} can be read; "
                            "--overwrite starts again")

    def save(self, s):
        """Saves all that a resume needs, after a check of losses and weights."""
        s.meter.check(self, s.prefix)
        for network in s.networks.values():
            check_weights(network, self, s.prefix)
        content = {k: part.state_dict() for k, part in (s.networks | s.optimisers).items()}
        content |= {"step": s.step, "recipe": s.recipe, "meter": s.meter.state(),
                    "rng": rng_states(), "arguments": next(iter(s.networks.values())).arguments,
                    "classes": s.classes}
        path = self.out / f"{s.prefix}_step{s.step:08d}.pt"
        if self.rank == 0:
            save_checkpoint(path, content)
            for old in self.checkpoints(s.prefix)[:-2]:
                old.unlink()
        barrier()  # torchrun kills all ranks when one leaves: not before it is written
        self.good[s.prefix] = path

    def steps(self, s, args, row, draw):
        """Yields once a step, up to s.steps. Then it logs row(), saves and calls draw(path) where
        that is due, and obeys signals."""
        def picture():
            if due(s.step, args.grid_every, s.steps) and self.rank == 0:
                draw(self.out / f"{s.prefix}_step{s.step:08d}.png")

        bar = tqdm(total=s.steps, initial=s.step, desc=s.prefix, disable=self.rank != 0,
                   mininterval=1)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        if s.step:
            picture()  # the run may have ended between a checkpoint and its picture
        self.defer_signals(True)
        began, first = time.monotonic(), s.step
        while s.step < s.steps:
            yield
            s.step += 1
            bar.update()
            if due(s.step, args.log_every, s.steps):
                s.meter.check(self, s.prefix)
                figures = row()
                self.log(figures)
                shown = {k: f"{figures[k]:.3g}" for k in s.shown if k in figures}
                if self.later:
                    left = s.steps - s.step + self.later
                    shown["all stages"] = time_left(began, s.step - first, left)
                bar.set_postfix(shown)
                if s.step % args.log_every == 0:
                    s.meter.reset()
            stop = self.should_stop()
            if due(s.step, args.save_every, s.steps) or stop:
                self.save(s)
            if stop and s.step < s.steps:
                bar.close()
                raise UserError(f"stopped by a signal at step {s.step} of {s.prefix}; saved "
                                f"{self.last_good(s.prefix)}; repeat the command to go on")
            picture()  # not before: what ends it must not cost the steps since the checkpoint before
        bar.close()
        self.defer_signals(False)

    def forget(self, prefix):
        """--overwrite: deletes checkpoints and pictures; and a log with other columns. UserError
        where the final checkpoint is none of a run's."""
        if self.rank == 0:
            final = self.out / f"{prefix}.pt"
            if final.exists():
                try:
                    ours = isinstance(load_file(final).get("recipe"), dict)
                except UserError as e:
                    raise UserError(f"{e}; delete it, or choose another --out") from None
                if not ours:
                    raise UserError(f"{final} was not made by this script, and --overwrite would "
                                    "delete it: choose another --out")
            log = self.out / "log.csv"
            head = log.read_bytes().split(b"\n")[0].strip() if log.is_file() else b""
            if head.startswith((b"stage,step,", b"step,")) and head != ",".join(
                    self.columns).encode():
                log.unlink()
            for path in (final, *step_files(self.out, prefix, "(pt|png)")):
                path.unlink(missing_ok=True)
        barrier()  # nobody resumes from what is being deleted

    def log(self, row):
        if self.rank == 0:
            row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            try:
                with open(self.out / "log.csv", "a", newline="") as f:
                    csv.DictWriter(f, self.columns, lineterminator="\n").writerow(row)
            except OSError as e:
                raise UserError(f"cannot write {self.out / 'log.csv'}: {e.strerror}") from None

    def rewind_log(self, step, steps, log_every, stage=()):
        """Before going on from `step`: removes the rows after it. The steps since the last multiple
        of log_every have no row yet (the meter still counts them), unless `step` is the last one.
        stage: (its number,) where that is the first column."""
        logged = step if step == steps else step // log_every * log_every
        position, log, header = (*stage, logged), self.out / "log.csv", ",".join(self.columns)
        if self.rank > 0:
            return
        head, rows = f"{header}\n", []
        if log.exists():
            with reading(log, "log"):
                head, *rows = log.read_text().splitlines(keepends=True) or [head]
                if head.strip() != header:
                    raise UserError(f"{log} has other columns; move it away or choose another --out")
                rows = [row for row in rows if row.endswith("\n")  # else a kill has cut it
                        and tuple(map(int, row.split(",")[:len(position)])) <= position]
        write_atomically(log, lambda f: f.write("".join([head, *rows]).encode()))


def step_files(folder, prefix, suffix):
    """The files PREFIX_step00000000.SUFFIX in a folder, in the order of their steps. suffix: a
    regular expression."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    form = re.compile(rf"{prefix}_step\d{{8,}}\.{suffix}")
    return [Path(folder, name) for name in sorted(names) if form.fullmatch(name)]


def time_left(began, done, left):
    """How long `left` steps take at the rate of the `done` ones since `began` (time.monotonic)."""
    return tqdm.format_interval((time.monotonic() - began) / done * left) + " left"


def due(step, every, steps):
    """Whether what is done every `every` steps, and at the end, is done now."""
    return step % every == 0 or step == steps


class Meter:
    """Sums of the losses between two log steps, and the first step whose loss was not finite: on
    the device, which nothing waits for until `average` or `check`."""

    def __init__(self, device):
        self.reset()
        self.bad_step = torch.full((), 2 ** 62, device=device)

    def reset(self):
        self.sums, self.counts = {}, {}

    def add(self, step, losses):
        """losses: name -> scalar tensor, detached."""
        finite = torch.isfinite(sum(losses.values()))
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp(max=step))
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def check(self, run, prefix):
        """Stops all ranks together if any loss has been NaN or infinite."""
        if dist.is_initialized():
            dist.all_reduce(self.bad_step, dist.ReduceOp.MIN)
        if self.bad_step < 2 ** 62:
            raise UserError(f"the loss is not finite since step {int(self.bad_step)}; nothing of "
                            f"it was saved; last good checkpoint: {run.last_good(prefix)} (try a "
                            "lower --lr, or --dtype fp32)")

    def state(self):
        """Sums (averaged over the ranks) and counts, as numbers."""
        values = []
        if self.sums:
            values = average_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        return {"sums": dict(zip(self.sums, values)), "counts": dict(self.counts)}

    def load(self, state):
        self.sums = {k: torch.tensor(v, dtype=torch.float64, device=self.bad_step.device)
                     for k, v in state["sums"].items()}
        self.counts = dict(state["counts"])

    def average(self):
        state = self.state()
        return {k: v / self.counts[k] for k, v in state["sums"].items()}


# ---- what a checkpoint holds, checked

def rng_states():
    """The state of torch's generator on every rank."""
    return gather(torch.get_rng_state())


def load_optimiser(optimiser, state):
    """Adam's load_state_dict. The fused step would write beyond moments of another shape. Errors:
    ValueError."""
    optimiser.load_state_dict(state)
    for p, moments in optimiser.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != p.shape or not moments[name].sum().isfinite():
                raise ValueError("the optimiser's moments do not fit, or are not finite")
            # in the parameter's memory format, such as channels_last
            moments[name] = torch.empty_like(p, requires_grad=False).copy_(moments[name])
        if moments["step"].shape != ():
            raise ValueError("the optimiser's count of steps is not one number")
        moments["step"] = moments["step"].clone()  # nothing of a mapped file stays


def check_weights(module, run, prefix):
    """Weights must be finite (a bad gradient shows here first) and the same on all ranks."""
    total = torch.stack([p.double().sum() for p in module.parameters()]).sum()
    low, high = total.clone(), total.clone()
    if dist.is_initialized():
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    if not total.isfinite() or low != high:
        fault = "not the same on all ranks" if total.isfinite() else "not finite"
        raise UserError(f"weights are {fault}; nothing of it was saved; last good checkpoint: "
                        f"{run.last_good(prefix)}")


# ---- the command line

def argument(kind, test, wanted):
    """A type for argparse: a number that passes a test."""
    def parse(text):
        value = kind(text)
        if not test(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value
    parse.__name__ = kind.__name__  # for argparse's message
    return parse


count = argument(int, lambda x: x >= 1, "at least 1")
index = argument(int, lambda x: x >= 0, "at least 0")
positive = argument(float, lambda x: x > 0, "positive")
weight = argument(float, lambda x: 0 <= x < math.inf, "at least 0, and finite")
fraction = argument(float, lambda x: 0 <= x < 1, "in [0, 1)")


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring in --help; a bad flag is a UserError."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def parse_args(self, argv=None):
        """With ~ expanded, which the shell does not do in --out=~/x."""
        def expanded(value):
            if isinstance(value, list):
                return [expanded(v) for v in value]
            return os.path.expanduser(value) if isinstance(value, str) else value

        args = super().parse_args(argv)
        vars(args).update({name: expanded(value) for name, value in vars(args).items()})
        return args

    def training_flags(self):
        """What both training scripts take."""
        add = self.add_argument
        add("--data", help="folder of images, one folder per class or flat; 'shapes': built in")
        add("--val", help="folder of held-out images (default: `val` beside a folder `train`, else "
                          "5%% of the files, at most --val-images)")
        add("--check-data", action="store_true",
            help="first decode all images; unreadable.json in --out names those that cannot be")
        add("--skip-unreadable", action="store_true",
            help="the same, once, and train without them; at most 1 %%")
        add("--val-images", type=count, help="held-out images at most")
        add("--steps", type=count)
        add("--batch-size", type=count, help="global: over all ranks and micro-batches")
        add("--accum", type=count, default=1, help="micro-batches per step")
        add("--ema-decay", type=fraction)
        add("--seed", type=index, default=0)
        add("--size", type=count,
            help="image side in px, divisible by 16 (train_dit.py: default the tokenizer's)")
        add("--workers", type=index, help="loader processes per rank")
        add("--checkpointing", action="store_true",
            help="recompute activations: less memory, slower")
        for flag in ("--log-every", "--save-every", "--grid-every"):
            add(flag, type=count, help="steps")
        add("--overwrite", action="store_true", help="start again, whatever is in --out")

    def fill(self, argv, presets):
        """The arguments; what is not given is the --preset's."""
        add = self.add_argument
        add("--preset", choices=presets, default="paper", help="default: %(default)s")
        add("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
            help="of autocast; auto: bf16 where it is native")
        add("--compile", action=argparse.BooleanOptionalAction,
            help="torch.compile the blocks (default: on GPUs, but for the preset tiny)")
        args = self.parse_args(argv)
        preset = presets[args.preset]
        args.given = {name for name in preset if getattr(args, name, None) is not None}
        vars(args).update({k: v for k, v in preset.items() if k not in args.given})
        return args


def describe(s, args, images, world):
    """A training script's line on images, batch and steps."""
    return (f"  {images} images of {args.size} px, batch {args.batch_size} = {world} ranks x "
            f"{args.accum} micro-batches x {args.batch_size // world // args.accum}, "
            f"{images / args.batch_size:.1f} steps an epoch, {s.steps} steps"
            + (f", resuming at step {s.step}" if s.step else ""))


def check_batch_size(args, world):
    if args.batch_size % (world * args.accum):
        raise UserError(f"--batch-size {args.batch_size} does not split into {world} ranks x "
                        f"{args.accum} micro-batches")


def launch(main):
    """Runs a script's main. A user's mistake is one line on stderr and exit status 1."""
    with contextlib.suppress(AttributeError):  # stdout may have been replaced
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {' '.join(str(e).splitlines())}")  # one line, whatever a file is called
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    except (OSError, MemoryError) as e:  # no permission, no room
        failure = system_failure(e)
        if not failure:
            raise
        sys.exit(f"error: {failure}: {e.filename}" if getattr(e, "filename", None) else
                 f"error: {failure}")
    except RuntimeError as e:
        if failure := system_failure(e):
            sys.exit(f"error: {failure} (fewer images at once? fewer --workers?): {first_line(e)}")
        if short := re.search(r".*(out of memory|_ALLOC_FAILED).*", str(e)):  # cuBLAS, NCCL, too
            sys.exit(f"error: out of GPU memory (--accum N splits the batch; --checkpointing; fewer "
                     f"images at once): {short[0].strip()}")
        if isinstance(e, dist.DistBackendError):
            sys.exit("error: another rank has stopped, or the network between them: "
                     f"{first_line(e)}")
        if short := re.search(r".*(C(\+\+)? compiler|Compiler: .* not found|working triton|triton GPU "
                              r"compiler|CalledProcessError.*\b(g?cc|clang)\b).*", str(e)):
            sys.exit("error: --compile (on GPUs the default) takes a C++ compiler, such as g++, "
                     "and on GPUs Triton and Python's headers; --no-compile does without: "
                     f"{short[0].strip()}")
        if str(e).startswith("DataLoader worker"):  # torch raises it anywhere in main
            sys.exit("error: a process that loads images has died (short of memory? fewer "
                     f"--workers?): {e}")
        lost = any(words in str(e) for words in ("by peer", "Broken pipe", "Timed out"))
        if dist.is_initialized() and lost:  # gloo: a rank has left, and said why, or it hangs
            sys.exit("error: another rank has stopped")
        raise
    finally:
        end_workers()
    if dist.is_initialized():
        dist.destroy_process_group()


def first_line(e):
    return str(e).strip().split("\n")[0]


def end_workers():
    """Ends the loader's workers. Python's exit handler would send SIGTERM, which they ignore
    (data.keep_loading), and wait for ever."""
    if workers := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):
            # torch's handler would raise, in place of what went wrong
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()
