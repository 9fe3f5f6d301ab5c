"""What threatens a run, a file or a process: damaged and hostile files, a full disk, signals,
kills, ranks and loader workers that die, and time itself.

    python test_faults.py              all of it: half an hour and more on two CPU cores
    python test_faults.py test_        the quick tests, a minute, in this process
    python test_faults.py slow_kills   one of them, by a part of its name

The tests test_* call the code with what it must refuse or survive. The tests slow_* start the
scripts as processes of their own, as they run in the world: what such a process does is judged by
its exit status, by what it says on stderr, and by the files it leaves.
"""
import collections
import contextlib
import copy
import errno
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import data
import fid
import files
import losses
import runs
import sample
import train_dit
import train_tokenizer as tt
from baselines import VAE
from files import UserError, load_file, load_tokenizer, save_checkpoint
from model import ENCODERS, DINOv2, LightningDiT
from test_smoke import (
    CPU,
    IN_FP64,
    SMALL,
    complete,
    driver,
    end,
    execute,
    folder,
    gaussian,
    load_both_ways,
    mini_dit,
    mini_size,
    png_chunk,
    png_of,
    refused,
    rows_of,
    same,
    save_tokenizer,
    small_run,
    small_tokenizer,
    start,
    write_shapes,
    write_shards,
)
from toy import Shapes

# ---------------------------------------------------------------------------------- hostile files

class Code:
    """Unpickled, it would create a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flip(content, bit):
    """Bytes with one bit changed."""
    byte = bytes([content[bit // 8] ^ 1 << bit % 8])
    return content[:bit // 8] + byte + content[bit // 8 + 1:]


def picture(form, **options):
    """The bytes of a small image file."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def three_scans(pixels):
    """The head and the three scans of a baseline JPEG that has a scan for each channel."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")  # of one channel, which serves as all three
    head, _, scan = file.getvalue()[:-2].partition(b"\xff\xda\0\x08\1\1")
    head, _, tail = head.partition(b"\xff\xc0\0\x0b")
    channels = b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    head += b"\xff\xc0\0\x11" + tail[:5] + b"\3" + channels + tail[9:]
    return [head, *(b"\xff\xda\0\x08\1" + bytes([c]) + scan for c in (1, 2, 3))]


def npy_of(content, **header):
    """An .npy file by hand."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def test_code_in_a_checkpoint():
    """A pickle that would run code, bare or in torch's zip, is refused before it runs."""
    with folder() as d:
        (d / "code.pt").write_bytes(pickle.dumps({"tokenizer": Code(d / "made")}))
        torch.save({"tokenizer": Code(d / "made")}, d / "zipped.pt")
        for name in ("code.pt", "zipped.pt"):
            with refused(name, "nothing else is ever loaded"):
                load_file(d / name)
        assert not (d / "made").exists()
        pickle.loads((d / "code.pt").read_bytes())
        assert (d / "made").exists(), "the code would have run"


def test_damaged_checkpoints():
    """A flipped bit, a cut, a bomb, another kind of file, a folder, a pipe."""
    with folder() as d:
        tokenizer = small_tokenizer()
        good = Path(save_tokenizer(tokenizer, d / "good.pt")).read_bytes()
        inside = good.find(tokenizer.adapter.fc1.weight.numpy().tobytes())
        assert inside > 0
        with zipfile.ZipFile(d / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("a/data/0", bytes(10 ** 6))
        for name, content, word in (
                ("flipped", flip(good, 8 * inside), "the CRC of "),
                ("cut", good[:-1], "cut"),
                ("half", good[:len(good) // 2], "half"),
                ("empty", b"", "empty"),
                ("picture", picture("PNG"), "picture"),
                ("bomb", (d / "bomb.pt").read_bytes(), "more than its size")):
            (d / f"{name}.pt").write_bytes(content)
            with refused(f"{name}.pt", word):
                load_tokenizer(d / f"{name}.pt", VAE)
        os.mkfifo(d / "pipe.pt")
        for name in (".", "pipe.pt"):
            with refused("is not a file"):
                load_tokenizer(d / name, VAE)


def test_hostile_checkpoints():
    """What a file says of itself must fit its tensors before any memory is taken."""
    tokenizer = small_tokenizer()
    state = tokenizer.state_dict()
    content = {"arguments": tokenizer.arguments, "tokenizer": state}

    def with_arguments(**changed):
        return content | {"arguments": content["arguments"] | changed}

    def with_decoder(**changed):
        return with_arguments(decoder={"ch": 32, "ch_mult": [1], "num_res_blocks": 1} | changed)

    def with_tensor(tensor, name="adapter.fc1.weight"):
        return content | {"tokenizer": state | {name: tensor}}

    # views of one number: three tensors of 2^20 columns or rows in a file of a few kilobytes
    views = {f"adapter.{name}": torch.zeros(1).expand(shape) for name, shape in (
        ("fc1.weight", (2 ** 20, 64)), ("fc1.bias", (2 ** 20,)), ("fc2.weight", (8, 2 ** 20)))}
    with folder() as d:
        for word, wrong in {
                "dict": [1, 2],
                "not a tokenizer": {"tokenizer": state},
                "resume from": content | {"opt_g": {}},
                "not a tokenizer's": content | {"arguments": [1]},
                "must be a mapping": with_arguments(encoder=[1]),
                "argument depth": with_arguments(
                    encoder={"dim": 64, "depth": 10 ** 9, "grid": 4}),
                "argument grid": with_arguments(
                    encoder={"dim": 64, "depth": 1, "grid": 10 ** 9}),
                "argument ch_mult": with_decoder(ch_mult=[1] * 10 ** 5),
                "argument num_res_blocks": with_decoder(num_res_blocks=10 ** 9),
                "TypeError": with_arguments(encoder={"dim": "64", "depth": 1}),
                "unexpected keyword": with_arguments(x=1),
                "width 32": with_arguments(encoder={"dim": 32, "depth": 1}),
                "latent_mean": with_arguments(d=9),
                "size mismatch": with_tensor(torch.zeros(3)),
                "adapter.fc1.weight": with_tensor("text"),
                "not finite": with_tensor(torch.full((64, 64), math.nan)),
                "wrong type": with_tensor(torch.zeros(64, 64, dtype=torch.int64)),
                "larger than the file": with_arguments(hidden=2 ** 20) | {
                    "tokenizer": state | views},
                "NoneType": content | {"tokenizer": None}}.items():
            torch.save(wrong, d / "wrong.pt")
            with refused("wrong.pt", word):
                load_tokenizer(d / "wrong.pt", VAE)

        dit = LightningDiT(dim=32, depth=1, heads=2, d=8, num_classes=3, grid=(2, 2))
        for changed in ({"depth": 10 ** 9}, {"heads": 3}, {"heads": 0}, {"grid": [2, 2, 2]},
                        {"grid": 2 ** 40}):
            wrong = {"ema": dit.state_dict(), "arguments": dit.arguments | changed}
            torch.save(wrong, d / "wrong.pt")
            with refused("wrong.pt"):
                sample.load_dit(d / "wrong.pt")

        state = tokenizer.encoder.state_dict()
        views = {f"blocks.0.attention.{x}_proj.weight": torch.zeros(1).expand(2 ** 20, 2 ** 20)
                 for x in "qkv"}  # 12 TB, if they were joined
        endless = {}
        endless["model"] = endless
        for word, wrong in {
                "is no DINOv2": {"teacher": [1]}, "names: model": endless,
                "argument depth": state | {"blocks.999999999.norm1.weight": torch.zeros(64)},
                "AttributeError": state | {"cls_token": 1},
                "than the file": state | {"pos_embed": torch.zeros(1).expand(1, 2 ** 40, 64)},
                "larger than the file": state | views}.items():
            torch.save(wrong, d / "wrong.pt")
            with refused("wrong.pt", word):
                files.load_encoder(str(d / "wrong.pt"))
        torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), d / "wrong.pt")
        with refused("wrong.pt", "TorchScript", "never run"):
            files.load_encoder(str(d / "wrong.pt"))


def slow_hostile_stage_files(most=None):
    """What a stage starts from, and what it resumes from, with one part wrong. most: only so many
    parts."""
    run, flags = small_run(), [*SMALL, "--stage", "2", "--steps", "3"]
    with folder() as d:
        good = load_file(run / "stage1.pt")
        for part, wrong in (("opt_d", {}), ("recipe", [1]), ("total_steps", "2"), ("stage", None),
                            ("discriminator", {}), ("arguments", {}))[:most]:
            torch.save(good | {part: wrong}, d / "wrong.pt")
            with refused("wrong.pt"):
                execute(tt, *flags, "--out", d / part, "--init", d / "wrong.pt")
        good = load_file(run / "stage2_step00000002.pt")
        moments = copy.deepcopy(good["opt_g"])
        moments["state"][0]["exp_avg"] = torch.zeros(1)
        for part, wrong in (("opt_g", moments), ("rng", [1]), ("meter", None), ("step", "2"),
                            ("ema", {}), ("recipe", [1]))[:most]:
            out = d / f"resume-{part}"
            out.mkdir()
            torch.save(good | {part: wrong}, out / "stage2_step00000002.pt")
            with refused("stage2_step"):
                execute(tt, *flags, "--out", out, "--init", run / "stage1.pt")


def test_hostile_stage_files():
    slow_hostile_stage_files(1)


def read_npz(path):
    """All that fid.py reads of an npz: (statistics, number of images, batches)."""
    images, batches = fid.ImageSet(path), []
    if images.n:
        args = SimpleNamespace(batch_size=4, workers=0)
        batches = [x.tolist() for x, _ in images.read(args, 0, 1, CPU)]
    return {k: v.tolist() for k, v in images.statistics.items()}, images.n, batches


def test_damaged_npz():
    """Flipped bits at the end of each entry, where its CRC must notice them, and a cut."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    with folder() as d:
        path = d / "a.npz"
        for save in (np.savez, np.savez_compressed):
            sigma = np.arange(16.0).reshape(4, 4).T  # in Fortran's order
            save(path, arr_0=images, mu=np.arange(4.0), sigma=sigma, n=7)
            good, content = read_npz(path), path.read_bytes()
            assert good[0]["sigma"] == sigma.tolist()
            found = np.concatenate(good[2]).transpose(0, 2, 3, 1)
            assert good[1] == 6 and good[0]["n"] == 7 and np.array_equal(found, images)
            with zipfile.ZipFile(path) as z:
                ends = []
                for entry in z.infolist():
                    lengths = struct.unpack_from("<HH", content, entry.header_offset + 26)
                    ends.append(entry.header_offset + 30 + sum(lengths) + entry.compress_size)
            noticed = 0
            for bit in (8 * end - k for end in ends for k in range(1, 17)):
                path.write_bytes(flip(content, bit))
                try:
                    # a compressed entry may end in bits that mean nothing
                    assert read_npz(path) == good
                except UserError:
                    noticed += 1
            assert noticed == 64 if save is np.savez else noticed > 16
            path.write_bytes(content[:-1])
            with refused("a.npz"):
                read_npz(path)


def test_hostile_npz():
    """Headers that claim what is not there, objects, and statistics that are none."""
    def header(**changed):
        about = {"descr": "|u1", "fortran_order": False, "shape": (6, 8, 8, 3)} | changed
        return npy_of(bytes(6 * 8 * 8 * 3), **about)

    with folder() as d:
        path = d / "a.npz"
        huge = npy_of(bytes(8), descr="<f8", fortran_order=False, shape=(10 ** 15,))
        for entries in ({"arr_0": header(shape=(6, 10 ** 6, 10 ** 6, 3))},
                        {"arr_0": header(shape=(10 ** 12, 8, 8, 3))},
                        {"arr_0": header(shape=(-6, 8, 8, 3))},
                        {"arr_0": header(shape=(6, 8, 24))},
                        {"arr_0": header(descr="|O")},
                        {"arr_0": header(descr="|V999999999")},
                        {"arr_0": b""},
                        {"mu": header(), "sigma": pickle.dumps(Code(d / "made"))},
                        {"mu": b"", "sigma": b""},
                        {"mu": huge, "sigma": header()}):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
                for name, content in entries.items():
                    z.writestr(f"{name}.npy", content)
            with refused("a.npz"):
                read_npz(path)
        assert not (d / "made").exists()
        good = {"mu": np.arange(4.0), "sigma": np.eye(4), "n": 7}
        for wrong in ({"n": "many"}, {"n": [7, 7]}, {"n": 1}, {"sigma": np.array([{}])}):
            np.savez(path, **(good | wrong))
            with refused("a.npz"):
                read_npz(path)
        huge = gaussian([0.0] * 2, np.eye(2) * 1e308)
        with refused("not finite"):
            fid.frechet(huge, huge)


def test_hostile_cache():
    """latents.npy: cut, longer, of another shape or type, or not an array at all. A batch of it:
    cut, or not an array."""
    args = SimpleNamespace(size=32, overwrite=False, encode_batch=4, workers=0)
    tokenizer, shapes = small_tokenizer(), Shapes(n=4, size=32)
    with folder() as d:
        path, parts = d / "latents.npy", d / "latents.npy.parts"

        def cache():
            return train_dit.cached_latents(path, tokenizer, shapes, args, CPU)

        latents, good, forms = np.array(cache()), path.read_bytes(), [io.BytesIO(), io.BytesIO()]
        np.save(forms[0], latents.astype(np.float32))
        np.save(forms[1], latents[:3])
        damaged = [good[:-1], good[:99], b"", picture("PNG")]
        for wrong in (*damaged, good + b"\0", *(f.getvalue() for f in forms)):
            path.write_bytes(wrong)
            with refused("latents.npy", "delete it"):
                cache()
        path.unlink()
        parts.mkdir()
        batch = parts / "000000000-000000004.npy"
        for wrong in damaged:
            batch.write_bytes(wrong)
            with refused(batch.name, "delete it"):
                cache()
            assert not path.exists()
        batch.unlink()
        (parts / f".{batch.name}.part").write_bytes(b"left by a kill")
        assert np.array_equal(cache(), latents) and not parts.exists()


# ---------------------------------------------------------------------- hostile images and folders

def test_damaged_images():
    """A cut and a flipped bit in a PNG are seen; a JPEG may lack its end marker, but no pixel. The
    name tells nothing; what follows the end is no fault; nor are odd EXIF, a large colour profile,
    many frames."""
    jpeg, png, loaded = picture("JPEG"), picture("PNG"), {}
    with folder() as d:
        def load(content, name="a file, with-commas.png"):
            (d / name).write_bytes(content)
            return np.array(load_both_ways(d / name))

        for form in (jpeg, png):
            loaded[form] = load(form)
            assert loaded[form].shape == (24, 32, 3)
            assert np.array_equal(load(form, "a.gif"), loaded[form])
            assert load(form, "b\udcff.jpg").any()  # a name that is not UTF-8
            # as some of ImageNet have it
            assert np.array_equal(load(form + b"\0trailing"), loaded[form])

        cuts = [png[:-cut] for cut in range(1, 20)]
        for options in ({}, {"quality": 30}, {"subsampling": 0}, {"optimize": True}):
            whole = picture("JPEG", **options)
            pixels = load(whole)
            # the end marker alone, or half of it; of these PIL alone takes a few
            assert all(np.array_equal(load(whole[:-cut]), pixels) for cut in (1, 2))
            for cut in (*range(3, 30), *range(30, len(whole) - 600, 41)):
                try:
                    assert np.array_equal(load(whole[:-cut]), pixels), (options, cut)
                except UserError:
                    continue
                assert cut < 5, "a pixel hangs on the others"
        for options in ({"progressive": True}, {"restart_marker_blocks": 1}):
            cuts += [picture("JPEG", **options)[:-cut] for cut in range(1, 99)]
        scans = three_scans(np.random.default_rng(0).integers(0, 256, (24, 32), np.uint8))
        assert load(b"".join(scans) + b"\xff\xd9").any()
        cuts += [b"".join(scans[:n]) for n in (2, 3, 4)]
        flipped = [flip(png, 8 * i + i % 8) for i in range(len(png) - 40, len(png))]
        for damaged in cuts + flipped:
            with refused(", with-commas.png"):
                load(damaged)

        orientation_99 = b"\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"
        for exif in (b"garbage",
                     b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 50,
                     b"Exif\0\0II*\0\x08\0\0\0" + orientation_99):
            assert np.array_equal(load(picture("JPEG", exif=exif)), loaded[jpeg])
        profile = np.random.default_rng(0).bytes(3 * 2 ** 20)
        for odd in ({"exif": b"Exif\0\0garbage!"}, {"icc_profile": profile}):
            assert np.array_equal(load(picture("PNG", **odd)), loaded[png])

        frames = [Image.new("L", (8, 8), i) for i in range(50)]
        frames[7].save(d / "a.gif", save_all=True, append_images=frames)
        assert (np.array(data.load_image(d / "a.gif")) == 7).all()


def test_hostile_images():
    """Bombs are refused by name before their pixels take memory, without a warning."""
    jpeg = picture("JPEG")
    at = jpeg.find(b"\xff\xc0") + 5  # height and width in the frame's header

    def jpeg_of(side):
        return jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4:]

    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10 ** 8)))
    with folder() as d:
        path = d / "a file, with-commas.png"
        for bomb in (jpeg_of(60000),
                     jpeg_of(9500),  # 90 megapixels, of which PIL only warns
                     png_of(60000, 60000), png_of(10 ** 4, 9 * 10 ** 3),
                     png_of(1, 101, bytes(404)), png_of(0, 5),
                     png_of(4, 4, bytes(52), chunk=text),
                     b"", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
            path.write_bytes(bomb)
            with warnings.catch_warnings(record=True) as said, refused(", with-commas.png"):
                load_both_ways(path)
            assert not said
        path.write_bytes(png_of(1, 100, bytes(400)))  # just narrow enough
        assert np.array(load_both_ways(path)).shape == (100, 1, 3)
        assert data.center_crop(data.load_image(path), 64).size == (64, 64)
        os.mkfifo(d / "pipe.png")
        with refused("pipe.png is not a file"):
            data.load_image(d / "pipe.png")


def test_odd_folders():
    """Names that are not ASCII, or not UTF-8; a link in a circle; a folder that may not be
    listed."""
    with folder() as d:
        for name in ("naïve 类", "b\udcff, c"):  # the second is not UTF-8
            (d / name).mkdir()
            (d / name / "1.png").write_bytes(picture("PNG"))
        images = data.ImageFolder(d)
        assert images.classes == ["b\udcff, c", "naïve 类"] and len(images.identity) == 16
        assert Path(images.path(0)).exists() and "b\udcff" in images.path(0)
        assert len(data.Crops(images, 16)[0, 0][0]) == 3
        (d / "loop").symlink_to(d)
        with refused("loop is a link to a folder that it lies in"):
            data.list_images(d)
        (d / "loop").unlink()
        scandir = os.scandir

        def closed(path):  # root may list everything: this is what others meet
            if str(path).endswith("类"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return scandir(path)

        with patch.object(os, "scandir", closed), refused("cannot list", "类"):
            data.list_images(d)


def test_skip_unreadable():
    """Both training scripts without the unreadable images: the bits of a folder that never had
    them, after a resume too."""
    with folder() as d, mini_size():
        dit = [*mini_dit(d), "--workers", "1"]
        shutil.rmtree(d / "data")
        for part, n in (("train", 200), ("val", 24)):
            write_shapes(d / "data" / part, n)
        ends = {"clean": [], "broken": ["--skip-unreadable"]}
        shutil.copytree(d / "data", d / "broken")
        broken = next((d / "broken" / "train").rglob("*.png"))
        broken.write_bytes(b"damaged")
        (d / "data" / "train" / broken.relative_to(d / "broken" / "train")).unlink()
        for name, flags in ends.items():
            root = d / name.replace("clean", "data")
            images = ["--data", root / "train", "--val", root / "val"]
            for steps in (1, 2) if flags else (2,):
                execute(train_dit, *dit, *images, *flags, "--steps", steps, "--out", d / name)
        clean, skipped = (load_file(d / name / "dit_step00000002.pt") for name in ends)
        assert same(clean, skipped) is None
        execute(tt, *SMALL, *images, *flags, "--stage", "1", "--steps", "1", "--size", "32",
                "--out", d / "tok")
        recipe = load_file(d / "tok" / "stage1.pt")["recipe"]
        assert recipe["list of images"] == clean["recipe"]["data"]
        with refused("1 of 200", "--skip-unreadable goes on"):
            execute(train_dit, *dit, "--data", d / "broken" / "train", "--check-data", "--steps",
                    "3", "--out", d / "broken")


# ------------------------------------------------------------------------------- damaged at random

class TooLong(BaseException):
    """Not an Exception: nothing on the way may take it for a damaged file."""


def read_checkpoint(path):
    return [tensor.tolist() for tensor in load_tokenizer(path, VAE).state_dict().values()]


def read_image(path):
    return np.array(data.center_crop(load_both_ways(path), 16)).tolist()


READERS = {"jpg": read_image, "png": read_image, "npz": read_npz, "pt": read_checkpoint}


def slow_fuzz_of_files(number=500, seconds=20):
    """Damaged files of four kinds: each is one line of error, or handled, in time.

    A cut is always noticed, but for a JPEG's end marker; a flipped bit of a checkpoint, an npz or a PNG is noticed, or has
    changed nothing; with a flipped bit of a JPEG it may be a slightly other image."""
    def late(*_):
        raise TooLong

    r, counts = np.random.default_rng(0), collections.Counter()
    with folder() as d:
        save_tokenizer(small_tokenizer(), d / "a.pt")
        images = r.integers(0, 256, (6, 8, 8, 3), np.uint8)
        np.savez_compressed(d / "a.npz", arr_0=images, mu=np.arange(4.0), sigma=np.eye(4))
        (d / "a.jpg").write_bytes(picture("JPEG"))
        (d / "a.png").write_bytes(picture("PNG"))
        whole = {kind: (d / f"a.{kind}").read_bytes() for kind in READERS}
        content = {kind: read(d / f"a.{kind}") for kind, read in READERS.items()}
        before = signal.signal(signal.SIGALRM, late)
        try:
            for k in range(number):
                kind = true = list(READERS)[k % 4]
                damage = ("flipped", "cut", "flipped", "cut", "renamed")[k // 4 % 5]
                size = len(whole[kind])
                # half of the places in the headers or at the end, where the formats differ
                place = int(r.choice([r.integers(min(size, 400)),
                                      size - 1 - r.integers(min(size, 400)),
                                      *r.integers(size, size=2)]))
                if damage == "flipped":
                    damaged = flip(whole[kind], 8 * place + int(r.integers(8)))
                elif damage == "cut":
                    damaged = whole[kind][:place]
                else:
                    true = r.choice([other for other in READERS if other != kind])
                    damaged = whole[true]
                path = d / f"damaged.{kind}"
                path.write_bytes(damaged)
                signal.alarm(seconds)
                try:
                    found = READERS[kind](path)
                except UserError as e:
                    assert "\n" not in str(e) and path.name in str(e), e
                    assert {kind, true} != {"jpg", "png"}, "images are known by their content"
                    counts[kind, damage, "refused"] += 1
                else:
                    only_the_end = kind == "jpg" and place >= size - 2  # see test_damaged_images
                    assert damage != "cut" or only_the_end, (kind, place, size)
                    unchanged = found == content[true] or (kind, damage) == ("jpg", "flipped")
                    assert unchanged, (kind, damage, place)
                    counts[kind, damage, "handled"] += 1
                finally:
                    signal.alarm(0)
        finally:
            signal.signal(signal.SIGALRM, before)
    return ", ".join(f"{' '.join(key)} {n}" for key, n in sorted(counts.items()))


def test_fuzz():
    return slow_fuzz_of_files(40)


# ------------------------------------------------------------------------- what the system refuses

def test_downloads():
    """Only a whole file with the right sha256 gets the name; nothing else is left."""
    def interrupted_by(stop):
        def copyfileobj(source, f):
            f.write(source.read(100))
            if stop:
                raise stop
        return patch.object(shutil, "copyfileobj", copyfileobj)

    with folder() as d, patch.object(torch.hub, "get_dir", lambda: str(d)):
        def hub():
            return sorted(p.name for p in (d / "checkpoints").iterdir())

        (d / "weights.pth").write_bytes(b"weights" * 1000)
        url, digest = (d / "weights.pth").as_uri(), files.sha256(d / "weights.pth")
        with refused("sha256 differs"):
            files.find_weights(url, "0" * 64, "--flag")
        assert hub() == []
        for stop in (http.client.IncompleteRead(b""), ConnectionResetError("reset")):
            with interrupted_by(stop), refused("missing weights", "--flag"):
                files.find_weights(url, "", "--flag")
            assert hub() == []
        with interrupted_by(KeyboardInterrupt()), refused(kind=KeyboardInterrupt):
            files.find_weights(url, "", "--flag")
        assert hub() == []
        with interrupted_by(None), refused("it ended early"):  # the line goes dead, no error
            files.find_weights(url, "", "--flag")
        assert hub() == []
        found = files.find_weights(url, digest, "--flag")
        assert found.read_bytes() == b"weights" * 1000 and hub() == ["weights.pth"]
        (d / "checkpoints" / "weights.pth").write_bytes(b"damaged")
        with refused("is damaged"):
            files.find_weights(url, digest, "--flag")
        with refused("missing weights"):
            files.find_weights((d / "nothing.pth").as_uri(), "", "--flag")


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def halves(root):
    """The names of half-written files below a folder."""
    return [p.name for p in root.rglob("*") if p.name.endswith(".part")]


def test_full_disk_anywhere():
    """However much of a file there is room for: less than the whole is an error, and the file does
    not get its name."""
    picture, small = torch.zeros(2, 3, 16, 16), {"a": torch.zeros(500), "b": 1}

    def write_batches(path, finish=True):
        rows = files.BatchedArray(path, 300, (2,), np.float32, {})
        with rows.lock:
            for batch in rows.missing(150):
                rows.write(batch, np.ones((150, 2)))
            if finish:
                rows.finish()

    with folder() as d:
        for path, write in (
                (d / "a.pt", lambda path: save_checkpoint(path, small)),
                (d / "a.png", lambda path: data.save_grid([picture], path)),
                (d / "a.npy", write_batches),
                (d / "a.npz", write_batches),
                (d / "b.npy.parts" / "000000150-000000300.npy",
                 lambda _: write_batches(d / "b.npy", finish=False))):
            write(path)
            size = path.stat().st_size
            for room in {*range(0, size, 97), *range(max(0, size - 200), size, 7)}:
                path.unlink(missing_ok=True)
                with full_disk(room), refused("cannot write"):
                    write(path)
                assert not path.exists() and not halves(d)
            with full_disk(size):
                write(path)
            assert path.stat().st_size == size


def test_full_disk_tokenizer():
    """Log, checkpoint, pictures: one line each, and what was good is still there."""
    with folder() as d:
        shutil.copytree(small_run(), d / "tok")
        rewritten = {"log.csv", ".lock", "held_out.csv", "story.png"}
        before = {p.name: p.read_bytes() for p in (d / "tok").iterdir() if p.name not in rewritten}
        ours = [*SMALL, "--out", d / "tok", "--stage", "1", "--steps", "4", "--grid-every", "4"]
        four = "stage1_step00000004"
        for limits in ({300: "log.csv", 3_000_000: f"{four}.pt"},
                       {10_000: f"{four}.png", 90_000: "story.png"}):
            for limit, name in limits.items():
                with full_disk(limit), refused("cannot write", name, "File too large"):
                    execute(tt, *ours)
            after = {p.name: p.read_bytes() for p in (d / "tok").iterdir()
                     if p.name not in rewritten}
            assert ({after.pop(f"{four}.{kind}", None) is None for kind in ("pt", "png")}
                    == {300 in limits}) and after == before
            # the checkpoint is there, and its pictures come first at the next start
            with (patch.object(tt, "save_grid", side_effect=UserError("no picture")),
                  refused("no picture")):
                execute(tt, *ours)


def test_full_disk_log():
    """A row that was cut is gone after the next start."""
    with folder() as d, runs.Run(d, 0, ["stage", "step", "loss"]) as run:
        run.rewind_log(0, 9, 1, (1,))
        for step in (1, 2):
            run.log({"stage": 1, "step": step, "loss": 1 / 3})
        with full_disk(50), refused("cannot write", "log.csv", "File too large"):
            run.log({"stage": 1, "step": 3, "loss": 1 / 3})
        good = b"stage,step,loss\n1,1,0.333333\n1,2,0.333333\n"
        assert (d / "log.csv").read_bytes() != good, "half of the third row is there"
        run.rewind_log(3, 9, 1, (1,))
        assert (d / "log.csv").read_bytes() == good


def test_full_disk_generator():
    """The cache's recipe, a batch of it, its packing, a checkpoint; then it goes on to the end.
    Samples likewise: the batch, the packing, a PNG, the grid."""
    with folder() as d, mini_size():
        dit = [*mini_dit(d), "--encode-batch", "8", "--save-every", "1", "--steps", "2",
               "--out", d / "dit"]
        # a batch of 8 latents has 1,152 bytes, all 24 have 3,200
        for limit, name in ((0, "latents.npy.json"), (1000, "latents.npy.parts/000000000-"),
                            (2000, "latents.npy: "), (5000, "dit_step00000001.pt")):
            with full_disk(limit), refused("cannot write", name, "File too large"):
                execute(train_dit, *dit)
            assert (d / "dit" / "latents.npy").exists() == (limit == 5000)
            assert not halves(d)
        execute(train_dit, *dit)

        draw = ["--preset", "tiny", "--dit", d / "dit" / "dit_step00000002.pt",
                "--tokenizer", d / "tok.pt", "--steps", "2", "--num", "8"]
        pixels = 8 * 32 * 32 * 3  # bytes; a batch has a header of 128, the npz a directory too
        for out, limit, name in (("s.npz", pixels - 1, "s.npz.parts/000000000-000000008.npy: "),
                                 ("s.npz", pixels + 200, "s.npz: "),
                                 ("p", 1000, "p/000000.png: ")):
            with full_disk(limit), refused("cannot write", str(d / name), "File too large"):
                execute(sample, *draw, "--out", d / out)
        assert not halves(d) and not (d / "s.npz").exists()
        execute(sample, *draw, "--out", d / "s.npz", "--grid", d / "grid.png")
        good = (d / "grid.png").read_bytes()
        with full_disk(500), refused("cannot write", "grid.png", "File too large"):
            execute(sample, *draw, "--grid", d / "grid.png")
        assert (d / "grid.png").read_bytes() == good and not halves(d)
        assert not list(d.rglob("*.parts"))


def test_full_disk_figures():
    """fid.py's JSON and statistics; and a path that lies under a file."""
    with folder() as d:
        images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
        np.savez(d / "s.npz", arr_0=images)
        torch.save(DINOv2(**ENCODERS["tiny14"]).state_dict(), d / "e.pth")
        figure = [d / "s.npz", d / "s.npz", "--features", "dinov2", "--encoder", d / "e.pth",
                  "--workers", "0"]
        for flag, name in (("--json", "f.json"), ("--save-stats", "f.npz")):
            with full_disk(100), refused("cannot write", name, "File too large"):
                execute(fid, *figure, flag, d / name)
            with refused("cannot write", "f.json"):
                execute(fid, *figure, flag, d / "e.pth" / "f.json")
        assert sorted(p.name for p in d.iterdir()) == ["e.pth", "s.npz"]


def test_the_system_fails():
    """No file handles, memory or permission, a network file system's error: what the system says,
    and never that a file is damaged. No image is left out, no older checkpoint taken, for it."""
    def failing(number, name):
        def call(path, *args, **kw):
            if str(path).endswith(name):
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *args, **kw)
        original = open
        return patch("builtins.open", call)

    with folder() as d, mini_size():
        write_shapes(d / "data", 24)
        images = data.ImageFolder(d / "data")
        image = Path(images.path(0)).name
        save_tokenizer(small_tokenizer(), d / "a.pt")
        np.savez(d / "a.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
        args = SimpleNamespace(out=d, size=16, workers=0, check_data=False, skip_unreadable=True,
                               overwrite=False)
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE,
                       errno.ETIMEDOUT, errno.EACCES):
            for name, read in ((image, lambda: load_both_ways(images.path(0))),
                               (image, lambda: data.check_images([images], args)),
                               ("a.npz", lambda: fid.ImageSet(d / "a.npz")),
                               ("a.pt", lambda: load_tokenizer(d / "a.pt")),
                               ("a.pt", lambda: files.sha256(d / "a.pt"))):
                with failing(number, name), refused(
                        "cannot read", name, os.strerror(number), kind=files.SystemFailure):
                    read()
        (d / "log.csv").write_text("step\n1\n")
        stale = patch.object(Path, "read_text", side_effect=OSError(errno.ESTALE, "Stale handle"))
        with stale, runs.Run(d, 0, ["step"]) as run, refused(
                "cannot read log", "Stale", kind=files.SystemFailure):
            run.rewind_log(1, 2, 1)
        os.symlink("/proc/self/mem", d / "eio.png")  # whose first byte is nowhere
        with refused("cannot read image", "eio.png: Input/output", kind=files.SystemFailure):
            load_both_ways(d / "eio.png")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for read in (lambda: data.load_image(images.path(0)), lambda: data.ImageFolder(d)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                with refused("cannot", "Too many open files", kind=files.SystemFailure):
                    read()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with patch.object(Image, "open", side_effect=MemoryError), refused("out of memory"):
            data.load_image(images.path(0))
        for module, name in ((data.ImageOps, "exif_transpose"), (os, "stat")):
            fault = patch.object(module, name, side_effect=OSError(errno.ESTALE, "Stale handle"))
            with fault, refused("cannot read image", "Stale", kind=files.SystemFailure):
                data.load_image(images.path(0))

        flags = [*mini_dit(d), "--save-every", "1", "--steps", "2", "--out", d / "dit"]
        execute(train_dit, *flags)
        with failing(errno.EIO, "dit_step00000002.pt"), refused("cannot read checkpoint"):
            execute(train_dit, *flags)


def test_no_libjpeg():
    """A torchvision without decode_jpeg: PIL from the start, said once."""
    lacks = RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")
    with folder() as d:
        for k in range(3):
            (d / f"{k}.jpg").write_bytes(picture("JPEG", quality=50 + k))
        want = {f"{d}/{k}.jpg": data.load_pixels(d / f"{k}.jpg") for k in range(3)}
        data.has_decode_jpeg.cache_clear()
        said = io.StringIO()
        with patch("torchvision.io.decode_jpeg", side_effect=lacks) as decode:
            with contextlib.redirect_stdout(said):
                images, _ = data.open_folders(d, None, 1)
                assert torch.equal(images.pixels(0), want[images.path(0)])
            assert decode.call_count == 1 and said.getvalue().count("without libjpeg") == 1
        data.has_decode_jpeg.cache_clear()
        assert data.has_decode_jpeg()


class Fatal:
    """Data whose second image kills the process that loads it, as a lack of memory does."""
    labels = None

    def image(self, i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (32, 32))


def test_dead_worker():
    """One line, exit status 1, and no worker is left."""
    def main():
        list(data.batches(data.Crops(Fatal(), 32), data.in_order(4, 1), 1, CPU))

    with refused("error: a process that loads images has died", kind=SystemExit):
        runs.launch(main)
    assert not multiprocessing.active_children()


def test_signals():
    """SIGTERM, SIGHUP or SIGUSR1 to the whole process group, the loader's worker included: a
    checkpoint at the step boundary, a message, and the run goes on to the same end. Outside the
    loop there is nothing to lose: it ends at once. What nohup has ignored stays ignored."""
    logit_normal, calls = losses.logit_normal, []

    def planted(*args):
        calls.append(args)
        if len(calls) == 2:
            # a worker would obey its parent's signal
            group = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
            assert len(group) > 1
            subprocess.run(["kill", f"-{number}", *map(str, group)], check=True)
            time.sleep(0.2)
        return logit_normal(*args)

    with folder() as d, mini_size():
        flags = [*mini_dit(d), "--steps", "3", "--log-every", "1", "--workers", "1"]
        execute(train_dit, *flags, "--out", d / "a")
        stopped = "stopped by a signal at step 2", "dit_step00000002.pt", "repeat"
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            calls.clear()
            out = d / str(number)
            signal.signal(number, signal.SIG_DFL)  # under nohup one is ignored
            with patch.object(losses, "logit_normal", planted), refused(*stopped):
                execute(train_dit, *flags, "--out", out)
            execute(train_dit, *flags, "--out", out)
            assert same(*(load_file(r / "dit_step00000003.pt") for r in (d / "a", out))) is None
            assert (d / "a" / "log.csv").read_bytes() == (out / "log.csv").read_bytes()
            with refused("repeat the command", kind=SystemExit), runs.Run(out, 0, []):
                os.kill(os.getpid(), number)
                time.sleep(9)
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with runs.Run(d / "a", 0, []):
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)
    handlers = {s: signal.getsignal(s) for s in files.STOP_SIGNALS}
    data.keep_loading(0)
    for s, handler in handlers.items():
        assert signal.signal(s, handler) == signal.SIG_IGN, "a loader's worker"


def test_locks_of_the_dead():
    """A lock ends with the `with`, or with the error, though a loader's worker lives on, and though
    someone keeps the error."""
    with folder() as d, mini_size():
        flags = [*mini_dit(d), "--out", d / "out"]
        path = d / "out" / "latents.npy.parts" / ".lock"
        with patch.object(files.BatchedArray, "write", side_effect=UserError("planted")):
            try:
                execute(train_dit, *flags)
            except UserError as e:
                kept = e
        assert str(kept) == "planted" and path.exists()
        fork = multiprocessing.get_context("fork")
        ready = fork.Event()
        with files.lock(path, "held"):
            worker = fork.Process(target=lambda: ready.set() or time.sleep(60))
            worker.start()
            ready.wait()
            with refused("held"), files.lock(path, "held"):
                pass
        with files.lock(path, "held"):
            worker.kill()
            worker.join()


def test_killed_before_a_deletion():
    """Two checkpoints stay, though a kill came after a save and before what it deletes. The newest
    is damaged here: the one that is loaded and the one before it stay too."""
    with folder() as d, mini_size():
        flags = [*mini_dit(d), "--save-every", "1", "--out", d / "out"]
        execute(train_dit, *flags, "--steps", "3")
        two, three = sorted((d / "out").glob("*.pt"))
        one, four = (two.with_name(f"dit_step0000000{k}.pt") for k in (1, 4))
        shutil.copy(two, one)
        execute(train_dit, *flags, "--steps", "3")
        assert sorted((d / "out").glob("*.pt")) == [two, three]
        shutil.copy(two, one)
        four.write_bytes(b"damaged")
        execute(train_dit, *flags, "--steps", "3")
        assert sorted((d / "out").glob("*.pt")) == [two, three, four]


# What Windows lacks, and macOS in part; that ctypes.CDLL(None) raises; workers started by spawn
ANOTHER_SYSTEM = """
import ctypes, multiprocessing, os, signal, sys, time
import numpy, PIL.Image, torch, torchvision, torch.utils.data, tqdm  # they know other systems
torch.utils.data._utils.signal_handling._set_SIGCHLD_handler = lambda: None
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, names in (
        (signal, "SIGHUP SIGUSR1 SIGUSR2 SIGCHLD SIGALRM alarm"),
        (os, "fork forkpty register_at_fork sched_getaffinity killpg getuid mkfifo sysconf")):
    for name in names.split():
        delattr(module, name)
def library(name, *args, load=ctypes.CDLL):
    if name is None:
        raise TypeError("argument 1 must be str, not None")
    return load(name, *args)
ctypes.CDLL = library
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import runs, sample, train_dit, train_tokenizer
    def main():
        for flags in json:
            script, *flags = flags
            globals()[script[:-3]].main(flags)
        multiprocessing.Process(target=time.sleep, args=(999,)).start()  # launch ends it
    runs.launch(main)
"""


def test_another_system():
    """A tokenizer, a generator with a loader's worker, samples, where nothing is that only Linux
    has, and workers are started by spawn. That there are no locks is said once."""
    with folder() as d:
        tok = d / "tok" / "stage1.pt"
        images = ["--data", write_shapes(d / "data", 24, 64), "--val", write_shapes(d / "val", 24)]
        commands = [
            ["train_tokenizer.py", *SMALL, *images, "--stage", 1, "--steps", 2, "--out", d / "tok"],
            tiny_dit(tok, *images, "--steps", 1, "--workers", 1, "--out", d / "dit"),
            ["sample.py", "--preset", "tiny", "--tokenizer", tok, "--dit",
             d / "dit" / "dit_step00000001.pt", "--num", 2, "--steps", 1, "--out", d / "images"]]
        script = d / "script.py"
        script.write_text(ANOTHER_SYSTEM.replace(
            "in json", f"in {[[str(flag) for flag in flags] for flags in commands]!r}"))
        process = start(script)
        text = end(process)
        assert process.returncode == 0 and text.count("no locks here") == 1, text[-3000:]
        assert len(rows_of(d / "tok")) == 2 and (d / "images" / "000001.png").exists()


# ---------------------------------------------------------------------------- real processes: kills

SLOW = [*SMALL, "--grid-every", "3", "--log-every", "3", "--save-every", "1", "--steps", "4"]

# Every process that this one starts inherits it, through torchrun too, which gives each rank a
# session of its own: so none that is left is missed.
os.environ["ALIGNTOK_TEST_FAULTS"] = MARK = str(os.getpid())


def alive():
    """The ids of the processes, of those that were started here, that are no zombies."""
    mark, found = f"ALIGNTOK_TEST_FAULTS={MARK}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended
            if mark in path.read_bytes().split(b"\0"):  # a zombie's is empty
                found.append(int(path.parent.name))
    return found


def tiny_dit(tokenizer, *more):
    return ["train_dit.py", "--preset", "tiny", "--tokenizer", tokenizer, "--val-images", "24",
            "--batch-size", "4", "--dtype", "fp32", "--log-every", "3", "--save-every", "1",
            "--grid-every", "3", "--steps", "6", *more]


def from_text(tokenizer, d, n):
    """Flags of train_dit.py, and n shapes with captions in the shards that are written to d."""
    return tiny_dit(tokenizer, "--captions", "--data", write_shards(d / "shards", n))


def sizes(root):
    """Name -> size of all files below a folder, while others write and rename there."""
    found = {}
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            found[str(path.relative_to(root))] = path.stat().st_size
    return found


# The process kills itself at the moment KILL_AT, and says at which: a file is half written; it is
# whole, but has not got its name; it has got it; a file has been deleted.
AT_A_WRITE = """
left, fsync, replace, unlink = int(os.environ["KILL_AT"]), os.fsync, os.replace, os.unlink
def moment(what, path):
    global left
    left -= 1
    if left == 0:
        sys.stderr.write(f"killed: {what} {os.path.basename(path)}\\n")
        sys.stderr.flush()
        os.kill(os.getpid(), 9)
def half_written(fd):
    if left == 1:
        os.truncate(fd, os.fstat(fd).st_size // 2)
    moment("half-written", os.readlink(f"/proc/self/fd/{fd}"))
    fsync(fd)
def renamed(part, path):
    moment("unnamed", part)
    replace(part, path)
    moment("named", path)
def deleted(path, **kw):
    unlink(path, **kw)
    moment("deleted", path)
os.fsync, os.replace, os.unlink = half_written, renamed, deleted
"""


def assert_alike(a, b):
    """Two folders hold the same files: checkpoints bit by bit, all others byte by byte; and
    nothing half-written, no batch of an array."""
    names = [{name for name in sizes(root) if not name.endswith(".lock")} for root in (a, b)]
    assert names[0] == names[1], names[0] ^ names[1]
    assert not [name for name in names[0] if name.endswith((".part", ".parts"))], names[0]
    for name in sorted(names[0]):
        if name.endswith(".pt"):
            differs = same(load_file(a / name), load_file(b / name))
            assert differs is None, (name, differs)
        elif (a / name).is_file():
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def kill_until_complete(r, out, *command, most):
    """Repeats a command, and kills it, until it ends by itself. Returns where it was how often.

    Three kills of four hit one of the next `most` moments of AT_A_WRITE; the fourth comes from
    outside, within half a second after the first files have changed."""
    hit = collections.Counter()
    while True:
        aimed, wait = r.random() < 0.75, r.uniform(0, 0.5)
        os.environ["KILL_AT"] = str(r.integers(1, most + 1) if aimed else 0)
        before = sizes(out.parent)
        process = start(*command, "--out", out)
        while not aimed and process.poll() is None and sizes(out.parent) == before:
            time.sleep(0.003)
        if not aimed:
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGKILL)
        text = end(process)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, text[-3000:]
            return hit
        (what, name), = re.findall("killed: ([a-z-]+) (.*)", text) or [("any", "")]
        hit[what, re.sub("[0-9]+", "*", name)] += 1


def slow_kills():
    """SIGKILL at moments when files are written, and at random ones, then the same command again,
    until it is through: the folder is that of a run that was never killed. Three stages with GAN
    and EMA; the generator and its cache; samples as npz and as PNGs; a generator from text, its two
    caches and the index of its shards; samples of it."""
    r, hit = np.random.default_rng(0), {}
    with folder() as d:
        script = driver(d / "driver.py", AT_A_WRITE)
        tok, dit, text = (d / name / "a" / "out" for name in ("tokenizer", "dit", "text"))
        generator = tiny_dit(tok / "stage3.pt", "--data", write_shapes(d / "data", 100, 64),
                             "--encode-batch", "2")
        draw = ["sample.py", "--preset", "tiny", "--dtype", "fp32", "--tokenizer",
                tok / "stage3.pt", "--num", "40", "--batch-size", "2", "--steps", "2", "--dit"]
        by_class = [*draw, dit / "dit_step00000006.pt"]
        by_text = [*draw, text / "dit_step00000006.pt", "--prompt", "a red ring on a blue ground"]
        for name, out, most, command in (
                ("tokenizer", "out", 20, ["train_tokenizer.py", *SLOW]),
                ("dit", "out", 24, generator),
                ("npz", "out.npz", 12, by_class), ("png", "out", 16, by_class),
                ("text", "out", 24, [*from_text(tok / "stage3.pt", d, 40), "--encode-batch", "2"]),
                ("prompt", "out.npz", 12, by_text)):
            for run in "ab":
                (d / name / run).mkdir(parents=True)
            complete(*command, "--out", d / name / "a" / out)
            hit[name] = kill_until_complete(
                r, d / name / "b" / out, script, *command, most=most)
            assert_alike(d / name / "a", d / name / "b")
            found = ", ".join(f"{' '.join(w)} {n}" for w, n in sorted(hit[name].items()))
            print(f"{name}, {hit[name].total()} kills: {found}", flush=True)
    kinds = collections.Counter()
    for found in hit.values():
        for (kind, _), number in found.items():
            kinds[kind] += number
    assert kinds.total() >= 30 and len(kinds) == 5, kinds
    return f"{kinds.total()} kills: {dict(kinds)}"


# -------------------------------------------------------------------------- signals, ranks, workers

def slow_signals():
    """SIGTERM, Ctrl-C, SIGHUP and SIGUSR1, to the process, to its group with the loader's workers,
    to torchrun alone, which SIGUSR1 kills: a checkpoint at the step boundary, a message, no process
    is left, and bit for bit the end of a run that never stopped."""
    tok = ["train_tokenizer.py", *SLOW, "--stage", "2", "--init", small_run() / "stage1.pt",
           "--steps", "12"]
    with folder() as d:
        dit = tiny_dit(small_run() / "stage3.pt", "--steps", "40", "--cache", d / "latents.npy",
                       "--data", write_shapes(d / "data", 48, 64))
        text = [*from_text(small_run() / "stage3.pt", d, 48), "--steps", "40"]
        for command, ranks, workers, number, kill in (
                (text, 0, 2, signal.SIGTERM, os.killpg), (text, 2, 1, signal.SIGTERM, os.kill),
                (tok, 0, 0, signal.SIGTERM, os.kill), (tok, 0, 2, signal.SIGINT, os.killpg),
                (dit, 0, 0, signal.SIGINT, os.kill), (dit, 0, 2, signal.SIGTERM, os.killpg),
                (tok, 0, 2, signal.SIGUSR1, os.killpg), (tok, 0, 2, signal.SIGHUP, os.killpg),
                (tok, 2, 1, signal.SIGTERM, os.kill), (dit, 2, 1, signal.SIGTERM, os.kill),
                (tok, 2, 1, signal.SIGUSR1, os.kill), (dit, 2, 1, signal.SIGHUP, os.kill)):
            command = [*command, "--log-every", "1", "--save-every", "99", "--grid-every", "99",
                       "--workers", workers, "--out"]
            complete(*command, d / "a", ranks=ranks)
            process, log = start(*command, d / "b", ranks=ranks), d / "b" / "log.csv"
            while process.poll() is None and not (log.exists() and len(rows_of(d / "b")) > 2):
                time.sleep(0.01)
            kill(process.pid, number)
            text = end(process)
            stops = text.count("stopped by a signal at step")
            killed = ranks and number == signal.SIGUSR1  # torchrun itself
            assert process.returncode == (-number if killed else 1), text[-3000:]
            assert stops == max(1, ranks), text[-3000:]
            assert not alive()
            # torchrun itself leaves with a traceback
            assert ranks or "Traceback" not in text, text[-3000:]
            stopped, = (d / "b").glob("*_step*.pt")
            complete(*command, d / "b", ranks=ranks)
            stopped.unlink()
            assert_alike(d / "a", d / "b")
            shutil.rmtree(d / "a")
            shutil.rmtree(d / "b")


# every parameter and buffer by its bits, where check_weights compares one sum
EQUAL_ON_ALL_RANKS = """
import hashlib
import torch.distributed as dist
import runs
def check(module, *args):
    if dist.is_initialized():
        bits = b"".join(v.numpy().tobytes() for v in module.state_dict().values())
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, hashlib.sha256(bits).hexdigest())
        assert len(set(every)) == 1, "ranks differ"
runs.check_weights = check
"""


def slow_ranks():
    """2 and 3 processes against one, the same global batch of 6, in fp64: the losses of 5 steps,
    in every stage, the generator and one from text, whose caches are the same; at the end all
    ranks hold the same bits. VFM-VAE draws for each rank: there only the ranks are alike."""
    worst = {}
    with folder() as d:
        script = driver(d / "driver.py", IN_FP64 + EQUAL_ON_ALL_RANKS)
        stage, run = ["train_tokenizer.py", *SLOW, "--stage"], small_run()
        for name, command in {
                "stage 1": [*stage, "1"],
                "stage 2": [*stage, "2", "--init", run / "stage1.pt"],
                "stage 3": [*stage, "3", "--init", run / "stage2.pt"],
                "VFM-VAE": [*stage, "strong", "--model", "vfmvae", "--size", "64"],
                "generator": tiny_dit(run / "stage3.pt", "--cache", d / "latents.npy",
                                      "--data", write_shapes(d / "data", 48, 64)),
                "from text": from_text(run / "stage3.pt", d, 48)}.items():
            worst[name] = 0.0
            for ranks in (1, 2, 3):
                out = d / name / str(ranks)
                complete(script, *command, "--steps", "5", "--batch-size", "6", "--log-every",
                         "1", "--grid-every", "99", "--out", out, ranks=ranks)
                rows = rows_of(d / name / "1"), rows_of(out)
                assert len(rows[0]) == 5
                if name == "VFM-VAE":
                    continue
                for one, many in zip(*rows, strict=True):
                    off = [abs(float(one[k]) - float(many[k])) / max(1e-2, abs(float(one[k])))
                           for k in one if one[k]]
                    worst[name] = max(worst[name], *off)
                for path in out.glob("*.npy"):
                    assert path.read_bytes() == (d / name / "1" / path.name).read_bytes(), path
    assert max(worst.values()) < 1e-5, worst
    return ", ".join(f"{name} {off:.1e}" for name, off in worst.items())


AT_THE_FOURTH_BATCH_OF_RANK_1 = """
import datetime, os, time
import runs, train_dit
import train_tokenizer as tt
runs.timedelta = lambda **_: datetime.timedelta(seconds=30)  # not 30 minutes
def planted(batches):
    def changed(dataset, *args):
        for k, batch in enumerate(batches(dataset, *args), 1):
            if k == 4 and os.environ["RANK"] == "1":
                {}
            yield batch
    return changed
tt.batches, train_dit.batches = planted(tt.batches), planted(train_dit.batches)
"""


def slow_one_rank_fails():
    """A NaN, an unreadable image, an exception, a hang or a SIGKILL on one rank of two ends both,
    with a message. Nothing that is not finite was saved."""
    seconds = collections.defaultdict(float)
    with folder() as d:
        for name, number in (("data", 48), ("broken", 48), ("val", 24)):
            write_shapes(d / name, number, 64)
        unreadable = min((d / "broken").rglob("*.png"))
        unreadable.write_bytes(b"not an image")
        tok = ["train_tokenizer.py", *SLOW, "--stage", "1"]
        dit = tiny_dit(small_run() / "stage3.pt", "--cache", d / "latents.npy",
                       "--encode-batch", "48")
        not_finite = "error: the loss is not finite since step 4", "_step00000003.pt"
        for fault, action, images, commands, words in (
                ("NaN", "batch[0].view(-1)[0] = float('nan')", "data", (tok, dit), not_finite),
                ("exception", "raise ValueError('planted')", "data", (tok, dit), ("planted",)),
                ("SIGKILL", "os.kill(os.getpid(), 9)", "data", (tok, dit), ("Signal 9",)),
                ("hang", "time.sleep(999)", "data", (tok,),
                 ("error: another rank has stopped",)),
                ("image", "pass", "broken", (tok,),
                 ("error: unreadable image", unreadable.name))):
            script = driver(d / "driver.py", AT_THE_FOURTH_BATCH_OF_RANK_1.format(action))
            for command in commands:
                process = start(script, *command, "--data", d / images, "--val", d / "val",
                                "--out", d / "out", "--steps", "9999", "--save-every", "3",
                                "--log-every", "5", "--grid-every", "9999", ranks=2)
                third = "*_step00000003.pt"
                while process.poll() is None and not list((d / "out").glob(third)):
                    time.sleep(0.01)
                began = time.time()
                text = end(process, 120)
                seconds[fault] = max(time.time() - began, seconds[fault])
                assert process.returncode == 1, text[-5000:]
                assert all(word in text for word in words), text[-5000:]
                # no traceback of the rank that is well
                assert "[rank0]" not in text, text[-5000:]
                assert not alive()
                saved = [load_file(path) for path in (d / "out").glob("*.pt")]
                assert fault == "image" or [content["step"] for content in saved] == [3]
                for content in saved:
                    for part in ("tokenizer", "model", "ema"):
                        state = content.get(part) or {}
                        assert all(v.isfinite().all() for v in state.values())
                shutil.rmtree(d / "out")
    return ", ".join(f"{fault} {s:.0f} s" for fault, s in seconds.items())


START_METHOD = """
import importlib, multiprocessing, sys
if __name__ == "__main__":
    import runs
    multiprocessing.set_start_method(sys.argv.pop(1))
    runs.launch(importlib.import_module(sys.argv.pop(1)[:-3]).main)
"""


def test_forkserver():
    """A loader's workers that are no forks (Python 3.14's default): the same bits."""
    with folder() as d:
        script = d / "start.py"
        script.write_text(START_METHOD)
        dit = ["--preset", "tiny", "--steps", "1", "--batch-size", "8", "--size", "32", "--dtype",
               "fp32", "--tokenizer", save_tokenizer(small_tokenizer(), d / "t.pt"),
               "--data", write_shapes(d / "data"), "--val", write_shapes(d / "val", 2)]
        complete("train_dit.py", *dit, "--out", d / "none")
        complete(script, "forkserver", "train_dit.py", *dit, "--workers", 1, "--out", d / "one")
        assert_alike(d / "none", d / "one")


RANK_1_LISTS_NOTHING = """
if os.environ["RANK"] == "1":
    data.list_images = None
"""


def slow_ranks_share_the_list():
    """Rank 0 alone lists the images; what is wrong with the folder ends all ranks, and so does a
    shard that one of them has found to be cut off."""
    with folder() as d:
        script = driver(d / "driver.py", RANK_1_LISTS_NOTHING)
        dit = [script, "train_dit.py", "--preset", "tiny", "--steps", "1", "--batch-size", "8",
               "--size", "32", "--tokenizer", save_tokenizer(small_tokenizer(), d / "t.pt")]
        write_shapes(d / "data")
        complete(*dit, "--data", d / "data", "--skip-unreadable", "--out", d / "out", ranks=2)
        assert (d / "out" / "dit_step00000001.pt").exists()
        second = Path(write_shards(d / "shards", 24)) / "00001.tar"
        second.write_bytes(second.read_bytes()[:9000])
        for words, flags in (("data folder not found", ["--data", d / "nowhere"]),
                             ("00001.tar is damaged", ["--captions", "--data", d / "shards"])):
            process = start(*dit, *flags, "--out", d / "b", ranks=2)
            assert words in end(process, 60)
            assert process.returncode


def slow_workers():
    """0, 1 and 4 loader's workers: the same bits."""
    with folder() as d:
        for name, command in {
                "tok": ["train_tokenizer.py", *SLOW, "--stage", "2", "--init",
                        small_run() / "stage1.pt"],
                "dit": tiny_dit(small_run() / "stage3.pt", "--data",
                                write_shapes(d / "data", 48, 64)),
                "text": from_text(small_run() / "stage3.pt", d, 48)}.items():
            for workers in (0, 1, 4):
                out = d / f"{name}{workers}"
                complete(*command, "--grid-every", "99", "--workers", workers, "--out", out)
                assert_alike(d / f"{name}0", out)


# ------------------------------------------------------------------------------------ ends, a soak

AT_THE_THIRD_STEP = """
import os, signal, sys
import torch
import runs, train_dit
import train_tokenizer as tt
def planted(step, calls=[0]):
    def training_step(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 3 and os.environ.get("RANK", "1") == "1":
            {}
        return step(*args, **kwargs)
    return training_step
for module in (tt, train_dit):
    module.training_step = planted(module.training_step)
runs.launch((tt if sys.argv.pop(1) == "train_tokenizer.py" else train_dit).main)
"""

ENDS = {
    "an exception": "raise ValueError('planted')",
    "SystemExit": "sys.exit('planted')",
    "out of memory": "raise torch.OutOfMemoryError('planted')",
    "no memory": "raise MemoryError",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "SIGHUP": "os.kill(os.getpid(), signal.SIGHUP)",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT)",
    "two Ctrl-C": "[os.kill(os.getpid(), signal.SIGINT) for _ in '12']",
}


def slow_ends():
    """Exceptions, exits and signals at the third step, with 0 and 2 workers, alone and with two
    ranks: whatever ends a script, all its processes are gone within ten seconds."""
    slowest = 0.0
    with folder() as d:
        tok = ["train_tokenizer.py", *SMALL, "--stage", "1", "--steps", "999", "--save-every",
               "999"]
        dit = ["train_dit.py", "--preset", "tiny", "--tokenizer",
               save_tokenizer(small_tokenizer(), d / "tok.pt"), "--size", "32", "--data",
               write_shapes(d / "data"), "--val", write_shapes(d / "val"), "--batch-size", "8",
               "--dtype", "fp32", "--steps", "999"]
        cases = [(tok, how, w, r) for how in ENDS for w, r in ((0, 0), (2, 0), (2, 2))]
        cases += [(dit, how, 2, 0) for how in ENDS] + [(dit, "an exception", 2, 2)]
        script, now = d / "driver.py", d / "now"
        for k, (command, how, workers, ranks) in enumerate(cases):
            action = f"open({str(now)!r}, 'w').close(); {ENDS[how]}"
            script.write_text(AT_THE_THIRD_STEP.format(action))
            process = start(script, *command, "--workers", workers, "--out", d / str(k),
                            ranks=ranks)
            while process.poll() is None and not now.exists():
                time.sleep(0.01)
            began = time.time()
            while alive() and time.time() < began + 20:
                process.poll()
                time.sleep(0.05)
            seconds, left = time.time() - began, alive()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            text = process.communicate()[1]
            case = f"{command[0]}, {how}, {workers} workers, {ranks} ranks"
            assert now.exists() and process.returncode, (case, text[-3000:])
            assert not left and seconds < 10, (case, seconds, text[-3000:])
            slowest = max(slowest, seconds)
            print(f"{case}: {seconds:.1f} s", flush=True)
            now.unlink()
    return f"{len(cases)} ends, the slowest after {slowest:.1f} s"


MEASURED = """
import json, os, sys, threading, time
import train_dit
import train_tokenizer as tt
rows = []
def measured(step):
    def training_step(*args, **kwargs):
        result = step(*args, **kwargs)
        pages = int(open("/proc/self/statm").read().split()[1])
        rows.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")),
                     threading.active_count(), time.perf_counter()))
        return result
    return training_step
for module in (tt, train_dit):
    module.training_step = measured(module.training_step)
script, out = sys.argv.pop(1), sys.argv.pop(1)
(tt if script == "train_tokenizer.py" else train_dit).main(sys.argv[1:])
json.dump(rows, open(out, "w"))
"""


def slow_soak(steps=3000):
    """Stages 1 to 3, a baseline and the generator at the smallest sizes, as many steps each:
    resident memory, open files, threads and the time of a step between the second and the last
    third."""
    said = []
    with folder() as d:
        script = d / "soak.py"
        script.write_text(MEASURED)
        images = ["--data", write_shapes(d / "data"), "--val", write_shapes(d / "val")]
        # Pictures and checkpoints come often: freed memory is kept (runs.py), so its peak must lie
        # in the first third
        quiet = ["--log-every", "10", "--save-every", "100", "--grid-every", "100", "--steps",
                 steps, "--size", "32"]
        tok = ["train_tokenizer.py", *SMALL, *images, *quiet]
        dit = ["train_dit.py", "--preset", "tiny", "--batch-size", "8", *images, *quiet]
        for name, out, (command, *flags) in (
                ("stage 1", "tok", [*tok, "--stage", "1"]),
                ("stage 2", "tok", [*tok, "--stage", "2"]),
                ("stage 3", "tok", [*tok, "--stage", "3"]),
                ("vavae", "vavae", [*tok, "--model", "vavae"]),
                ("generator", "dit", [*dit, "--tokenizer", d / "tok" / "stage3.pt"])):
            process = start(script, command, d / "rows.json", *flags, "--out", d / out)
            text = end(process, 3600)
            assert process.returncode == 0, text[-3000:]
            rows = json.loads((d / "rows.json").read_text())
            assert len(rows) == steps
            third = steps // 3
            seconds = [b[3] - a[3] for a, b in itertools.pairwise(rows)]
            middle = statistics.median(seconds[third:2 * third])
            last = statistics.median(seconds[2 * third:])
            grown = (rows[-1][0] - rows[third][0]) / 2 ** 20
            memory, handles, threads, _ = rows[-1]
            said.append(f"{name} {memory / 2 ** 20:.0f} MB ({grown:+.1f}), {handles} files, "
                        f"{threads} threads, {1000 * middle:.1f} then {1000 * last:.1f} ms")
            print(said[-1], flush=True)
            assert grown < 10 and last < 1.2 * middle, said[-1]
            assert handles <= rows[third][1] and threads <= rows[third][2], said[-1]
    return "; ".join(said)


# --------------------------------------------------------------------------------------- all of it

def setup_function(_):
    """Before each test, here and under pytest: a test draws the same numbers alone and among
    others."""
    torch.manual_seed(0)


def main():
    words, failed, began = sys.argv[1:], 0, time.time()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and tests send it
    tests = {name: test for name, test in globals().items() if name.startswith(("test_", "slow_"))
             and (not words or any(word in name for word in words))}
    for name, test in tests.items():
        begin, said = time.time(), io.StringIO()
        progress = said if name.startswith("test_") else sys.stdout
        try:
            with contextlib.redirect_stdout(progress), contextlib.redirect_stderr(said):
                setup_function(test)
                figures = test() or ""
                assert not alive(), "processes are left"
            seconds = time.time() - begin
            print(f"ok    {name} ({seconds:.1f} s) {figures}".rstrip(), flush=True)
        except Exception:  # noqa: BLE001, whatever a test raises is its failure
            failed += 1
            print(f"FAIL  {name}\n{said.getvalue()[-2000:]}\n{traceback.format_exc()}", flush=True)
        for pid in alive():
            os.kill(pid, signal.SIGKILL)
    print(f"{time.time() - began:.0f} s\n{len(tests) - failed} passed, {failed} failed")
    runs.end_workers()  # see test_smoke.py
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
