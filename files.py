"""Files that may be missing, cut off or hostile: checkpoints, external weights, and arrays
filled batch by batch over hours.

What the user can mend is a UserError, one line that names the file. No code is ever run from a
file. What is written appears under its name only when it is whole.
"""
import contextlib
import errno
import functools
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import stat
import sys
import urllib.request
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from losses import LPIPS
from model import ENCODERS, Tokenizer, encoder_arguments, make_encoder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What asks a script to stop. Windows lacks the last two; SLURM's --signal sends the last.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # IMAGENET1K_V1
VGG16_SHA256 = "397923af"  # its first characters, as in torch hub's file names
HEADS_URL = ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/"
             "v0.1/vgg.pth")
HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{}/dinov2_{}_pretrain.pth"
DINOV2_SHA256 = {
    "vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}
ENCODER_URLS = {  # of the other encoders; their sha256 are not known
    "dino-s16": "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
                "dino_deitsmall16_pretrain.pth",
    "dino-b16": "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/"
                "dino_vitbase16_pretrain.pth",
    "mae-b16": "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth",
    "mae-l16": "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth",
    "mae-h14": "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_huge.pth",
    "siglip2-l16-512":
        "https://huggingface.co/google/siglip2-large-patch16-512/resolve/main/model.safetensors",
}


class UserError(Exception):
    """What the user can mend; the scripts print it as one line and exit with status 1."""


class SystemFailure(UserError):
    """What the system refuses: no fault of a file's."""


def print_0(text):
    """Prints on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def warn(text):
    """Says it on stderr, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the terminal is gone
            print(f"WARNING: {text}", file=sys.stderr, flush=True)


def rank_and_world():
    """This rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """The list of all ranks' values."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier(hours=None):
    """All ranks wait for each other. hours: if more than a collective may take."""
    if dist.is_initialized():
        patient = hours and dist.new_group(backend="gloo", timeout=timedelta(hours=hours))
        dist.barrier(patient)


def sha256(path):
    digest = hashlib.sha256()
    with reading(path, "file"), open(path, "rb") as f:
        while part := f.read(2 ** 20):
            digest.update(part)
    return digest.hexdigest()


# ---- reading

def system_failure(e):
    """What the system says, where an error is its own: no permission, file handles or memory left,
    a network file system's error. Else None."""
    if isinstance(e, OSError) and e.errno and e.errno != errno.EINVAL:  # a damaged zip may seek < 0
        return e.strerror
    if failure := re.search(r"unable to (?:mmap|open|allocate) .*: (.*) \(\d+\)", str(e)):  # torch's
        return failure[1]
    no_memory = isinstance(e, MemoryError) or "can't allocate memory" in str(e)
    return "out of memory" if no_memory else None


@contextlib.contextmanager
def reading(path, kind):
    """Whatever goes wrong inside it becomes a UserError that names the file. kind: what the file
    should be, such as "checkpoint"."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise UserError(f"{path} is not a file")
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{kind} not found: {path}") from None
    except ImportError as e:  # of a package that a reader of transformers would need
        raise UserError(f"a package is lacking for the {kind} {path}: {' '.join(str(e).split())}"
                        ) from None
    except Exception as e:  # a decoder may raise anything
        if failure := system_failure(e):
            raise SystemFailure(f"cannot read {kind} {path}: {failure}") from e
        tells = isinstance(e, (ValueError, OSError)) and str(e)
        text = f"{'' if tells else type(e).__name__ + ' '}{e}"
        reason = text.strip().splitlines()[0].strip()[:200]
        raise UserError(f"unreadable {kind} {path} (damaged, or not what it should be): "
                        f"{reason}") from e


def load_file(path, kind="checkpoint"):
    """The dict in a .pt, .pth or .safetensors file, on the CPU: tensors, numbers and strings, never
    code.

    torch.load ignores the CRCs of this zip archive, so they are compared first. Files from before
    PyTorch 1.6 (the official VGG16 and Inception) have none; find_weights knows their sha256.
    Errors: UserError."""
    with reading(path, kind), open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on odd pickles
        if f.read(9)[8:] == b"{":  # safetensors: the length of a header, then the header in JSON
            try:
                from safetensors.torch import load_file as load_safetensors
            except ImportError:
                raise UserError(f"{path} is a safetensors file, which takes the package of that "
                                "name: pip install safetensors") from None
            return load_safetensors(path)
        mapped = zipfile.is_zipfile(f)
        if mapped:
            with zipfile.ZipFile(f) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
                if unpacked > os.path.getsize(path):  # torch.save does not compress
                    raise ValueError("it would unpack to more than its size")
                if damaged := archive.testzip():
                    raise ValueError(f"the CRC of {damaged} differs")
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise ValueError("TorchScript, as OpenAI's CLIP: a program, which is never run")
                if any(entry.compress_type for entry in archive.infolist()):
                    raise ValueError("it is compressed")  # mapped, it would be read as it stands
        # mapped: no copy in memory, and all ranks share its pages; torch takes names in UTF-8 alone
        mapped = mapped and not re.search("[\ud800-\udfff]", os.fspath(path))
        f.seek(0)
        try:
            content = torch.load(os.fspath(path) if mapped else f, map_location="cpu",
                                 weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:  # torch's text advises to run it
            raise ValueError("not only tensors, numbers and strings; nothing else is ever "
                             "loaded") from None
        if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
            raise ValueError("no dict of tensors")
    if isinstance(content.get("run"), dict):  # the name of the recipe before 2026-11-26
        content["recipe"] = content.pop("run")
    return content


def load_strictly(module, state, path):
    """module.load_state_dict(state). A tensor that is missing, unknown, misshapen, of another type
    or not finite is a UserError."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as e:
        problems = [line.strip() for line in str(e).splitlines()[1:]] or [str(e)]
        raise UserError(f"{path} does not fit {type(module).__name__}: "
                        f"{' '.join(problems)[:300]}") from None
    odd = [name for name, own in module.state_dict().items()
           if own.is_floating_point() != state.get(name, own).is_floating_point()
           # of the sum: ten times as fast as isfinite().all()
           or not own.is_meta and not own.sum().isfinite()]
    if odd:
        raise UserError(f"{path}: not finite, or of the wrong type: {', '.join(odd)[:300]}")


def build(cls, arguments, state, path):
    """cls(**arguments) with the weights `state`. Both come from `path`, which may be hostile: they
    must fit each other on the meta device before memory is taken."""
    def check(arguments):
        for name, value in arguments.items():
            if isinstance(value, dict):
                check(value)
            # blocks cost time on the meta device too
            limit = 100 if name in ("depth", "depth_single", "num_res_blocks") else 2 ** 20
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if len(numbers) > 16 or any(isinstance(n, int) and n > limit for n in numbers):
                raise ValueError(f"its argument {name} is absurd")

    with reading(path, "checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the meta device
        check(arguments)
        with torch.device("meta"):
            skeleton = cls(**arguments)
        load_strictly(skeleton, state, path)
        if sum(tensor.nbytes for tensor in state.values()) > os.path.getsize(path):
            raise ValueError("its tensors are larger than the file")  # views of a few numbers
        module = cls(**arguments)
    load_strictly(module, state, path)
    return module


def check_same(then, now, path, advice="repeat them, choose another --out, or --overwrite",
               may_change=()):
    """Refuses to go on from `path` with other arguments than it was made with. may_change: those
    that change the rounding alone; it only says so."""
    changed = {k: f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v}
    rounding = [changed.pop(k) for k in may_change if k in changed]
    if changed:
        raise UserError(f"{path} was made with other arguments ({', '.join(changed.values())}); "
                        f"{advice}")
    if rounding:
        print_0(f"NOTE: {path} was made with {', '.join(rounding)}; from here on sums are rounded "
                "in another way")


# ---- writing

def write_atomically(path, write):
    """Calls write(file) on a temporary file and then renames it to `path`."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        # torch.save hides a full disk behind a RuntimeError
        while not isinstance(e, OSError) and e.__context__:
            e = e.__context__
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def save_checkpoint(path, content):
    """Plain dicts of tensors, numbers and strings, atomically."""
    write_atomically(path, lambda f: torch.save(content, f))


warn_of_locks = functools.cache(warn)  # says the same only once
held_locks = set()
if hasattr(os, "register_at_fork"):
    # a loader's worker may outlive its parent, and must not keep its locks
    os.register_at_fork(after_in_child=lambda: [file.close() for file in held_locks])


@contextlib.contextmanager
def lock(path, message):
    """Holds a lock on the file `path`, which is made. UserError(message) if another process does.
    Where the system or the file system has no locks it goes on without."""
    with open(path, "a") as file:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(message) from None
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK):
                raise
            warn_of_locks(f"no locks here ({e.strerror}): nothing keeps a second process from "
                          "writing to the same --out")
        held_locks.add(file)
        try:
            yield
        finally:
            held_locks.remove(file)


def read_record(record):
    """What the JSON file `record` says of a result, {} where there is none."""
    if not record.exists():
        return {}
    with reading(record, "record of a recipe"):
        return dict(json.loads(record.read_text()))


def write_record(record, recipe):
    write_atomically(record, lambda f: f.write(json.dumps(recipe, indent=1).encode()))


def outdated(result, record, recipe, overwrite, present):
    """Whether another recipe than this has made `result`, a file or folder, by its `record`, and
    `overwrite` allows to delete that. Without `overwrite` it is an error that names the difference.
    present: whether a part of the result exists; without a record it is none of ours."""
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    then = read_record(record)
    if present and not then:
        raise UserError(f"{result} was not made by this script, which keeps {record}: move it "
                        "away, or choose another name")
    if overwrite:
        return any(then.get(k) != v for k, v in recipe.items())
    if then:
        check_same(then, recipe, result)
    return False


def ranges(n, size):
    """0..n-1 in ranges of `size`."""
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


class BatchedArray:
    """An array (n, *shape) on disk that all ranks fill batch by batch.

    Each batch is a file in the folder PATH.parts: a stop loses at most one. `finish` packs them
    into PATH (.npy, or .npz as arr_0), in twice the array's space. PATH.json: see `outdated`."""

    def __init__(self, path, n, shape, dtype, recipe, overwrite=False):
        self.path, self.n, self.shape, self.dtype = Path(path), n, tuple(shape), np.dtype(dtype)
        self.parts = Path(f"{path}.parts")
        self.rank, self.world = rank_and_world()
        self.lock = contextlib.ExitStack()
        if self.rank == 0:
            try:
                self._prepare(Path(f"{path}.json"), recipe | {"rows": n}, overwrite)
            except UserError:
                self.lock.close()
                raise
            except OSError as e:
                self.lock.close()
                raise UserError(f"cannot write {path}: {e.strerror}") from None
        barrier()
        self.complete = self.path.exists()
        if self.complete:
            self._close()

    def _prepare(self, record, recipe, overwrite):
        if self.path.exists() and not self.parts.exists() and not outdated(
                self.path, record, recipe, overwrite, True):
            return  # complete: no lock, as many runs may read it at once
        self.parts.mkdir(parents=True, exist_ok=True)
        self.lock.enter_context(lock(
            self.parts / ".lock", f"another process is writing {self.path}; wait for it"))
        written = self._written()
        if outdated(self.path, record, recipe, overwrite, self.path.exists() or written):
            self.path.unlink(missing_ok=True)
            self._delete_parts()
        elif written and not self.path.exists():  # its batches may be of another shape
            first, end, part = written[0]
            with reading(part, "batch (delete it, and it is made anew)"):
                self._check(part, np.load(part, mmap_mode="r"), end - first)
        write_record(record, recipe)

    def _written(self):
        """(first row, last row + 1, file) of each batch on disk."""
        names = [re.fullmatch(r"(\d+)-(\d+)\.npy", p.name) for p in self.parts.iterdir()]
        return sorted((int(m[1]), int(m[2]), self.parts / m[0]) for m in names if m)

    def missing(self, batch_size):
        """The batches of this rank that lack a row, as ranges of rows. A batch is always computed
        whole, because the rounding of a row depends on the batch that it is computed in."""
        lacking = np.ones(self.n, bool)
        for first, end, _ in self._written():
            lacking[first:end] = False
        batches = [batch for batch in ranges(self.n, batch_size) if lacking[batch].any()]
        barrier()  # all ranks have looked before one writes
        return batches[self.rank::self.world]

    def write(self, batch, values):
        """Stores the rows of a range, (len(batch), *shape)."""
        content = io.BytesIO()
        # in memory: for a file np.save uses C's stdio, which can hide a full disk
        np.save(content, np.ascontiguousarray(values, self.dtype))
        try:
            write_atomically(self.parts / f"{batch.start:09d}-{batch.stop:09d}.npy",
                             lambda f: f.write(content.getbuffer()))
        except UserError as e:
            raise UserError(f"{e}; make room and repeat the command to go on") from None

    def finish(self):
        """Rank 0 packs when all ranks are done."""
        barrier()
        if self.rank == 0:
            write_atomically(self.path, self._pack)
        self._close(hours=12)

    def mapped(self, kind):
        """The complete array, a read-only memory map. Errors: UserError."""
        # no checksum: reading ImageNet's 39 GiB takes minutes, and a flipped bit is one value
        with reading(self.path, f"{kind} (delete it to make it anew)"):
            array = np.load(self.path, mmap_mode="r")
            self._check(self.path, array, self.n)
            if self.path.stat().st_size != array.offset + array.nbytes:
                raise ValueError("bytes follow its end")
        return array

    def _check(self, path, array, n):
        if (array.shape, array.dtype) != ((n, *self.shape), self.dtype):
            raise UserError(f"{path} holds {array.dtype} {array.shape}, and {self.dtype} "
                            f"{(n, *self.shape)} is asked for: delete it, or choose another place")

    def _pack(self, f):
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
                  "shape": (self.n, *self.shape)}

        def write(f):
            np.lib.format.write_array_header_1_0(f, header)
            row = 0
            for first, end, part in self._written():
                if first <= row < end:  # they overlap where the batch size changed after a stop
                    with reading(part, "batch (delete it, and it is made anew)"):
                        array = np.load(part)
                        self._check(part, array, end - first)
                        f.write(array[row - first:].tobytes())
                    row = end
            if row < self.n:
                raise UserError(f"row {row} of {self.path} is gone from {self.parts}; repeat the "
                                "command, and it is made again")

        if self.path.suffix != ".npz":
            return write(f)
        with zipfile.ZipFile(f, "w") as z, z.open("arr_0.npy", "w", force_zip64=True) as entry:
            write(entry)

    def _delete_parts(self):
        for _, _, part in self._written():
            part.unlink()

    def _close(self, hours=None):
        if self.rank == 0 and self.parts.exists():
            self._delete_parts()
            self.lock.close()
            shutil.rmtree(self.parts, ignore_errors=True)
        barrier(hours)


# ---- external weights

def find_weights(url, digest, flag, file=None):
    """Path of an external weight file: `file` if given, else in torch hub's cache, downloaded to
    there if need be.

    digest: its sha256, or the first characters, or "" if not known. flag: the option that takes the
    file, for the messages."""
    if file:
        if not Path(file).is_file():
            raise UserError(f"{flag} {file}: no such file (the official one is {url})")
        print_0(f"{flag} {file}: sha256 {sha256(file)}")
        return Path(file)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            print_0(f"downloading {url}")
            with urllib.request.urlopen(url, timeout=60) as source, open(part, "wb") as f:
                shutil.copyfileobj(source, f)
                if f.tell() < int(source.headers["Content-Length"] or 0):
                    raise OSError("it ended early")
            if not sha256(part).startswith(digest):
                raise UserError(f"download of {url} is damaged (sha256 differs); pass {flag} FILE")
            part.replace(path)
        except (OSError, http.client.HTTPException) as e:
            raise UserError(f"missing weights {path.name}: get {url}, pass it as {flag} FILE "
                            f"(download: {e})") from None
        finally:
            with contextlib.suppress(OSError):  # of a file system that is read-only, too
                part.unlink(missing_ok=True)
    found = sha256(path)
    if not found.startswith(digest):
        raise UserError(f"{path} is damaged (its sha256 is {found}, not {digest}): delete it, or "
                        f"pass {flag} FILE")
    print_0(f"{path}: sha256 {found}")
    return path


# what the names in a file say of it; the first that fits
SIGNS = {
    "AlignTok or a baseline": r"^tokenizer$",
    "an autoencoder of LDM": r"(en|de)coder\.conv_in\.",  # and of VA-VAE
    "LightningDiT": r"x_embedder\.proj",
    "FLUX's transformer": r"^double_blocks\.",
    "DINOv2": r"(?s)\A(?=.*cls_token$)(?=.*pos)(?=.*(ls1\.gamma|layer_scale1))",
    "DINOv3": r"(?s)\A(?=.*cls_token$)(?!.*pos)",  # positions turn queries and keys
    "CLIP": r"class_embedding|resblocks|norm_pre\.",
    "SigLIP": r"head\.probe|attn_pool\.|layers\.\d+\.self_attn\.",
    "MAE": r"decoder_(pos_embed|embed|blocks)",
    "DINO v1 (a plain ViT)": r"(?s)\A(?=.*cls_token$)(?=.*pos)(?!.*(relative|gamma))",
    "another ViT (BEiT, ...)": r"cls_token$",
    "a ResNet": r"layer1\.0\.conv1\.|stages\.0\.layers\.0\.",
    "Inception": r"^Mixed_5b\.",
    "VGG16": r"^features\.28\.",
    "LPIPS heads": r"^lin0\.model",
}


def kind_of(state):
    """The network whose names a state dict holds, or None."""
    names = "\n".join(state)
    found = [kind for kind, sign in SIGNS.items() if re.search(sign, names, re.MULTILINE)]
    return found[0] if found else None


def require(kinds, state, path):
    """The one of `kinds`, a name in SIGNS or several, whose names these are; or a UserError."""
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if (found := kind_of(state)) not in kinds:
        names = f"its names are those of {found}" if found else f"names: {', '.join(state)}"
        raise UserError(f"{path} is no {', '.join(kinds)}: {names[:100]}")
    return found


def unwrapped(content):
    """The state dict in a file's content, without the prefixes of DDP and torch.compile."""
    for _ in range(3):  # one may hold another
        content = next((content[k] for k in ("ema", "teacher", "state_dict", "model")
                        if isinstance(content.get(k), dict)), content)
    return {re.sub(r"(?<![^.])(module|_orig_mod)\.", "", k): v for k, v in content.items()}


def load_weights(path, kind):
    """The state dict of a network, one of SIGNS, in a file. Errors: UserError."""
    content = load_file(path, kind)
    with reading(path, kind):
        state = unwrapped(content)
        require(kind, state, path)
    return state


def load_lpips(vgg16=None, heads=None):
    """(LPIPS, path of its VGG16), by find_weights. Errors: UserError."""
    vgg16 = find_weights(VGG16_URL, VGG16_SHA256, "--vgg16", vgg16)
    heads = find_weights(HEADS_URL, HEADS_SHA256, "--lpips-heads", heads)
    lpips = LPIPS()
    state = {k.removeprefix("features."): v for k, v in load_weights(vgg16, "VGG16").items()
             if k.startswith("features.")}
    load_strictly(lpips.vgg16, state, vgg16)
    state = {k.removeprefix("lin").replace(".model.1", ""): v
             for k, v in load_weights(heads, "LPIPS heads").items()}
    load_strictly(lpips.heads, state, heads)
    return lpips, vgg16


# the names of DINOv2 and of plain ViTs in transformers (in files; since version 5 others in memory)
# and timm -> the official ones; @ and a digit: a part of a tensor
VIT_NAMES = {
    r"^embeddings\.": "",
    r"^position_embeddings$": "pos_embed",
    r"^patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^reg_token$": "register_tokens",
    r"^(encoder\.layer|layers)\.": "blocks.",
    r"^blocks\.\d+\.(\d+\.)": r"blocks.\1",  # official, in chunks: blocks.CHUNK.i
    r"^layernorm\.": "norm.",
    r"\.attention\.(attention\.query|q_proj)\.": ".attn.qkv@0.",
    r"\.attention\.(attention\.key|k_proj)\.": ".attn.qkv@1.",
    r"\.attention\.(attention\.value|v_proj)\.": ".attn.qkv@2.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"\.mlp\.gate_proj\.": ".mlp.w12@0.",
    r"\.mlp\.up_proj\.": ".mlp.w12@1.",
    r"\.mlp\.weights_in\.": ".mlp.w12.",
    r"\.mlp\.(weights_out|down_proj)\.": ".mlp.w3.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"(\.\d+)\.intermediate\.dense\.": r"\1.mlp.fc1.",
    r"(\.\d+)\.output\.dense\.": r"\1.mlp.fc2.",
}
PRETRAINING = ("head.", "pooler.", "decoder_")  # beside an encoder; and MAE's mask_token


def encoder_state(content, path):
    """The state dict, under the official names, of the encoder in a file's content: official, a
    training checkpoint's teacher, of transformers, of timm; alone, or in a larger network."""
    state = unwrapped(content)
    kind = require(("DINOv2", "SigLIP", "MAE", "DINO v1 (a plain ViT)"), state, path)
    if kind == "SigLIP":
        if "embeddings.patch_embedding.weight" in state:  # a tower alone, of transformers 5
            state = {f"vision_model.{k}": v for k, v in state.items()}
        state = {k: v for k, v in state.items() if k.startswith("vision_model.")}
        if "vision_model.embeddings.patch_embedding.weight" not in state:
            raise UserError(f"{path} is no SigLIP2 vision tower of a fixed size in transformers' "
                            "layout")
        return state
    prefixes = {k.removesuffix("cls_token").removesuffix("embeddings.")
                for k in state if k.endswith("cls_token")}
    if len(prefixes) > 1:
        raise UserError(f"{path} holds more than one ViT: {', '.join(sorted(prefixes))}")
    prefix = prefixes.pop()
    parts = {}  # name -> its parts in order
    for name, tensor in sorted(state.items()):
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(PRETRAINING):
            name = name.removeprefix(prefix)
            for theirs, official in VIT_NAMES.items():
                name = re.sub(theirs, official, name)
            parts.setdefault(re.sub(r"@\d", "", name), {})[name] = tensor
    if sum(v.nbytes for p in parts.values() for v in p.values()) > os.path.getsize(path):
        raise ValueError("its tensors are larger than the file")  # before they are joined
    state = {name: torch.cat([p[k] for k in sorted(p)]) if len(p) > 1 else p.popitem()[1]
             for name, p in parts.items()}
    if kind != "DINOv2":
        state.pop("mask_token", None)
        return state
    side = state["patch_embed.proj.weight"].shape[-1]
    if side != 14:
        raise UserError(f"{path} is no DINOv2: its patches are {side} px wide, not 14")

    # timm: the MLP of the giant model goes by the names of the others
    if "blocks.0.mlp.fc1.weight" in state and (
            len(state["blocks.0.mlp.fc1.weight"]) == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]):
        state = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v
                 for k, v in state.items()}
    # timm: with registers the class token holds its own position embedding
    cls, positions = state["cls_token"], state["pos_embed"]
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(cls), positions], dim=1)
    # timm leaves out what only pretraining reads
    state.setdefault("mask_token", torch.zeros_like(cls[0]))
    return state


def named_arguments(name):
    """Arguments of model.make_encoder for an official name; None for another name."""
    arguments = ENCODERS.get(name.removesuffix("_reg4"))
    if arguments is None or "family" in arguments:  # only DINOv2 has registers
        return ENCODERS.get(name)
    registers = 4 if name.endswith("_reg4") else 0
    return {"swiglu": False, "grid": 37} | arguments | {"registers": registers}


def load_encoder(spec, flag="--encoder"):
    """(encoder, its arguments for model.make_encoder). spec: an official name (vits14 ...
    vitg14_reg4, and the others of model.ENCODERS), a file of a DINOv2, DINO v1, MAE or SigLIP2, or
    random:NAME for random weights. Errors: UserError."""
    name = spec.removeprefix("random:").removeprefix("dinov2_")
    if name.endswith("_reg"):  # torch hub's name for the same model
        name += "4"
    arguments = named_arguments(name)
    if spec.startswith("random:"):
        if arguments is None:
            raise UserError(f"{flag} {spec}: no such size, choose from {', '.join(ENCODERS)} "
                            "(and vit..._reg4)")
        print_0(f"encoder {name}: RANDOM weights, as asked for")
        return make_encoder(**arguments), arguments
    if arguments is not None and name != "tiny14":
        url = ENCODER_URLS.get(name) or DINOV2_URL.format(name.removesuffix("_reg4"), name)
        file = None
        if name.startswith("siglip"):  # by hand: its address names no file of its own
            file = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.safetensors"
        path = find_weights(url, DINOV2_SHA256.get(name, ""), flag, file)
    elif Path(spec).is_file():
        path = Path(spec)
        print_0(f"encoder {path}: sha256 {sha256(path)}")
    else:
        raise UserError(f"{flag} {spec}: neither a file nor one of "
                        f"{', '.join(list(ENCODERS)[1:])} (and vit..._reg4)")
    content = load_file(path, "encoder")
    with reading(path, "encoder"):
        state = encoder_state(content, path)
        found = encoder_arguments(state)
    if arguments is not None and any(found.get(k) != v for k, v in arguments.items()):
        raise UserError(f"{path} is not a {name}: found {found}")
    if "family" in found:
        print_0(f"{path} is taken for an encoder of the family {found['family']}")
    return build(make_encoder, found, state, path), found


# ---- tokenizers and generators

def load_tokenizer(path, *systems, content=None):
    """The tokenizer in a stage's final checkpoint, on the CPU, in eval mode. Errors: UserError.

    systems: other classes that the file may hold, such as baselines.VAE. content: the file's, if
    load_file has read it."""
    if not Path(path).exists():
        raise UserError(f"no tokenizer {path}: run train_tokenizer.py, or name another file")
    content = content or load_file(path, "tokenizer")
    if "opt_g" in content:
        raise UserError(f"{path} is a checkpoint to resume from, without EMA and statistics: take "
                        "the stage's final one")
    with reading(path, "tokenizer"):
        if "encoder" in content.get("arguments", {}):
            return build(Tokenizer, content["arguments"], content["tokenizer"], path).eval()
        for system in systems:
            if found := system.in_checkpoint(content):
                return build(system, *found, path).eval()
        kind = kind_of(unwrapped(content))
    raise UserError(f"{path} is not a tokenizer's checkpoint (such as runs/tokenizer/stage3.pt)"
                    + (f": its names are those of {kind}" if kind else ""))


def ensure_statistics(tokenizer, path, file=None):
    """The generator needs latent statistics; an official tokenizer's are another file, of mean and
    std, which is read into it if given."""
    statistics = load_file(file, "latent statistics") if file else {}
    for name, buffer in (("mean", tokenizer.latent_mean), ("std", tokenizer.latent_std)):
        if file:
            value = statistics.get(name)
            fits = isinstance(value, torch.Tensor) and value.numel() == tokenizer.d
            if not fits or not value.is_floating_point() or not value.isfinite().all():
                raise UserError(f"{file} does not hold mean and std of {tokenizer.d} channels, "
                                "finite numbers")
            buffer.copy_(value.flatten())
    if not tokenizer.latent_std.any():
        raise UserError(f"{path} has no latent statistics: its stage did not finish, or it is an "
                        "official file (--latent-stats FILE)")


# What a stage may train and leave the latents as they are; VFM-VAE's on the second line
DECODER = ("decoder.", "post_quant_conv.",
           "ldm_adapter.post_quant.", "ldm_adapter.linear_proj.", "mapping.", "synthesis.")


def fingerprint(tokenizer):
    """A short hash of what makes a tokenizer's latents: encoder, adapter, statistics. Stage 3 does
    not change it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if not name.startswith(DECODER):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def dit_arguments(state):
    """LightningDiT's arguments, from a state dict's names and shapes. The N = h*w tokens are taken
    for a square."""
    dim, d, patch, _ = state["x_embedder.proj.weight"].shape
    tokens, head_dim = state["feat_rope.freqs_cos"].shape
    table = state.get("y_embedder.embedding_table.weight")
    return {"dim": dim, "heads": dim // head_dim, "d": d, "patch": patch,
            "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
            "num_classes": 0 if table is None else len(table) - 1,
            "grid": [math.isqrt(tokens) * patch] * 2,
            "qk_norm": "blocks.0.attn.q_norm.weight" in state}
