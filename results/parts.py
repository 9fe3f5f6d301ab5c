"""What results/miniature.sh does in Python, and several commands in one process, as each start of
one takes seconds:

    python results/parts.py COMMAND ARGUMENTS then COMMAND ARGUMENTS ...

COMMAND: one of the repository's scripts, such as train_dit.py, or a function below.
"""
import io
import json
import os
import sys
import tarfile
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NAMES = {  # of the 40 classes of Tiny ImageNet
    "n01443537": "goldfish", "n01742172": "boa constrictor", "n01784675": "centipede",
    "n01944390": "snail", "n02002724": "black stork", "n02094433": "yorkshire terrier",
    "n02123045": "tabby cat", "n02132136": "brown bear", "n02231487": "stick insect",
    "n02281406": "sulphur butterfly", "n02410509": "bison", "n02481823": "chimpanzee",
    "n02669723": "academic gown", "n02791270": "barbershop", "n02814533": "station wagon",
    "n02841315": "pair of binoculars", "n02909870": "bucket", "n02963159": "cardigan",
    "n03026506": "christmas stocking", "n03126707": "crane", "n03255030": "dumbbell",
    "n03404251": "fur coat", "n03584254": "ipod", "n03662601": "lifeboat",
    "n03770439": "miniskirt", "n03838899": "oboe", "n03937543": "pill bottle",
    "n03983396": "pop bottle", "n04070727": "refrigerator", "n04146614": "school bus",
    "n04259630": "sombrero", "n04328186": "stopwatch", "n04398044": "teapot",
    "n04486054": "triumphal arch", "n04532670": "viaduct", "n04597913": "wooden spoon",
    "n07615774": "ice lolly", "n07734744": "mushroom", "n07871810": "meat loaf",
    "n09246464": "cliff"}


def validation(checkpoint, out):
    """The figures in a stage's final checkpoint."""
    import torch
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    figures = content["validation"] | {"step": content["total_steps"]}
    Path(out).write_text(json.dumps(figures))


def ceiling(checkpoint, train, out, size, workers):
    """Reconstructions of every fourth training image, as an npz."""
    import numpy as np
    import torch

    from data import Crops, ImageFolder, batches, to_uint8
    from fid import open_tokenizer
    from runs import setup_ranks
    _, _, device = setup_ranks()
    data = ImageFolder(train)
    tokenizer, size = open_tokenizer(checkpoint, int(size), device)
    order = [[(0, i) for i in range(first, min(first + 400, len(data)), 4)]
             for first in range(0, len(data), 400)]
    loader = batches(Crops(data, size), order, int(workers), device)
    with torch.no_grad():
        rows = [to_uint8(tokenizer.decode(tokenizer.encode(x))) for x, _ in loader]
    np.savez(out, np.concatenate(rows))


def caption(name):
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def captions(train, folder):
    """The training images with captions as a shard; the captions of all classes as prompts.txt."""
    from files import UserError
    folder, classes = Path(folder), sorted(path.name for path in Path(train).iterdir())
    if unknown := [name for name in classes if name not in NAMES]:
        raise UserError(f"{train}: no name is known of the class {unknown[0]}; add it to NAMES in "
                        "results/parts.py")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{os.getpid()}.part"  # another row may be writing its own
    with tarfile.open(part, "w") as tar:
        for name in classes:
            for path in sorted(Path(train, name).glob("*.JPEG")):
                for suffix, content in (("jpg", path.read_bytes()),
                                        ("txt", caption(NAMES[name]).encode())):
                    member = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    part.rename(folder / "00000.tar")
    part.write_text("".join(caption(NAMES[c]) + "\n" for c in classes))
    part.rename(folder / "prompts.txt")


def distance(runs, name):
    return json.loads(Path(runs, f"{name}.json").read_text())["figures"][0]["value"]


def better(runs, new, old):
    """Exit status 3 where the distance `new` is not below `old`."""
    if distance(runs, new) >= distance(runs, old):
        sys.exit(3)


def row(runs, best):
    """Joins the files of figures in a row's folder into the file beside it. best: the scale of its
    guidance, or none."""
    runs, figures = Path(runs), {}
    for path in sorted(runs.glob("*.json")):
        content = json.loads(path.read_text())
        if "figures" in content:
            found = content["figures"]
            content = {f["metric"]: f["value"] for f in found}
            content |= {f"{f['metric']}, each set": f["note"] for f in found
                        if f["metric"].startswith("SE-CKNNA")}
        figures[path.stem] = content
    if best != "none":
        figures["best_cfg"] = float(best)
    runs.with_name(f"{runs.name}.json").write_text(json.dumps(figures, indent=1))


def main(words):
    while words:
        end = words.index("then") if "then" in words else len(words)
        (command, *arguments), words = words[:end], words[end + 1:]
        if command in ("better", "row"):  # they need no torch
            globals()[command](*arguments)
            continue
        from runs import launch
        if command.endswith(".py"):
            print(f"---- {command} {' '.join(arguments)}", flush=True)
            launch(partial(import_module(Path(command).stem).main, arguments))
        else:
            launch(partial(globals()[command], *arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
