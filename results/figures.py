"""The tables and pictures of the README's experiment in miniature, from results/miniature/seed*/ROW.json:

    python results/figures.py                                   # tables on stdout, assets/miniature.svg
    DATA=... WEIGHTS=... python results/figures.py --runs DIR   # and pictures, from results/miniature.sh's OUT
"""
import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NAMES = {"vae": "VAE", "vavae": "VA-VAE, convolutional encoder", "stage1": "AlignTok, stage 1",
         "stage12": "AlignTok, stages 1+2", "stage123": "AlignTok, stages 1+2+3", "sp0": "w_sp = 0", "sp5": "w_sp = 5",
         "cosine": "cosine instead of L2", "before": "loss before the adapter",
         "margins0": "VA-VAE, no margins", "wvf1": "VA-VAE, no margins, w_vf = 1",
         "vae4800": "VAE, 4800 steps", "vavae4800": "VA-VAE, 4800 steps",
         "wvf4800": "VA-VAE, no margins, w_vf = 1, 4800 steps", "aligntok4800": "AlignTok, 1200 + 2400 + 1200 steps",
         "lora": "LoRA, rank 8", "vfmvae": "VFM-VAE", "repa12": "AlignTok, stages 1+2, REPA",
         "reg12": "AlignTok, stages 1+2, REG", "repavfm": "VFM-VAE, REPA", "regvfm": "VFM-VAE, REG",
         "text12": "AlignTok, stages 1+2", "textvae": "VAE", "textvavae": "VA-VAE, convolutional encoder"}
COLOURS = {"stage12": "#0072b2", "vavae": "#d55e00", "vae": "#009e73"}


def read(folder):
    """{row: {seed: figures}}"""
    rows = defaultdict(dict)
    for path in sorted(folder.glob("seed*/*.json")):
        rows[path.stem][int(path.parent.name[4:])] = json.loads(path.read_text())
    return rows


def last(figures):
    """The validation at the tokenizer's end."""
    return max((v for k, v in figures.items() if k.startswith("tokenizer")), key=lambda v: v["step"])


COLUMNS = {
    "PSNR, dB": lambda f: f"{f['recon']['PSNR']:.2f}", "SSIM": lambda f: f"{f['recon']['SSIM']:.3f}",
    "probe, %": lambda f: f"{last(f)['probe']:.1f}",
    "rFD": lambda f: f"{f['recon']['rFD-Lite0']:.0f}", "ceiling": lambda f: f"{f['ceiling']['FD-Lite0']:.0f}",
    "FD": lambda f: f"{f['plain']['FD-Lite0']:.0f}", "FD, guided (scale)":
        lambda f: f"{f['guided']['FD-Lite0']:.0f} ({f['best_cfg']:g})",
    "FD to its own reconstructions": lambda f: f"{f['own_plain']['FD-Lite0']:.1f}"}
STEPS = {"400 steps": "plain400", "800 steps": "plain800", "1600 steps": "plain"}
FD_AT = {f"FD, {name}": lambda f, key=key: f"{f[key]['FD-Lite0']:.0f}"
         for name, key in STEPS.items()}
OWN_AT = {f"to its own, {name}": lambda f, key=f"own_{key}": f"{f[key]['FD-Lite0']:.0f}"
          for name, key in STEPS.items()}
CKNNA = {}
for against, file in (("DINOv2", "cknna"), ("judge", "cknna_judge")):
    CKNNA |= {
        f"CKNNA, {against}": lambda f, file=file: f"{f[file]['CKNNA, latents']:.3f}",
        f"SE-CKNNA, {against}": lambda f, file=file: f"{f[file]['SE-CKNNA, latents']:.3f}",
        f"turned, {against}": lambda f, file=file:
            f"{float(f[file]['SE-CKNNA, latents, each set'].split('turned ')[1]):.3f}",
        f"encoder, {against}": lambda f, file=file: f"{f[file]['CKNNA, encoder']:.3f}"}
TABLES = {
    "Main comparison": (["vae", "vavae", "stage1", "stage12", "stage123"], COLUMNS),
    "Ablation": (["sp0", "stage12", "sp5", "before", "cosine", "lora"], COLUMNS),
    "Tried": (["margins0", "wvf1", "vae4800", "vavae4800", "wvf4800", "aligntok4800"], COLUMNS),
    "Second system": (["stage12", "vfmvae"], COLUMNS),
    "Alignment of the latents": (["vae", "vavae", "margins0", "wvf1", "stage1", "stage12", "sp0", "sp5", "before",
                                  "cosine", "lora", "vfmvae"], CKNNA),
    "How fast the latents are learned": (["vae", "vavae", "stage12", "vfmvae"], FD_AT | OWN_AT),
    "Dual side": (["stage12", "repa12", "reg12", "vfmvae", "repavfm", "regvfm"], FD_AT),
    "Text": (["textvae", "textvavae", "text12"],
             {"FD": COLUMNS["FD"], "FD, guidance 4": lambda f: f"{f['cfg4']['FD-Lite0']:.0f}",
              "FD to its own reconstructions": COLUMNS["FD to its own reconstructions"]})}


def cell(column, figures):
    """A dash where the row has no such figure."""
    try:
        return column(figures)
    except (KeyError, ValueError):
        return "-"


def table(rows, names, columns):
    """One line a row, the seeds separated by slashes."""
    seeds = sorted({seed for row in names if row in rows for seed in rows[row]})
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in filter(rows.get, names):
        last_seed = max(rows[row])  # those after it were not planned
        cells = [" / ".join(cell(column, rows[row].get(seed, {})) for seed in seeds if seed <= last_seed)
                 for column in columns.values()]
        if not {*"".join(cells)} <= {*"-/ "}:
            lines.append(f"| {NAMES[row]} (`{row}`) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def panel(x0, title, unit, curves, levels=(), log=False):
    """An SVG line chart at x0, 300 x 240. curves, levels: {row: [(x, y)]}, {row: y}, the levels dashed."""
    xs, ys = zip(*(point for curve in curves.values() for point in curve))
    ys = [*ys, *dict(levels).values()]
    low, high = min(ys) - 0.05 * np.ptp(ys), max(ys) + 0.05 * np.ptp(ys)
    place = np.log2 if log else float
    at_x = lambda x: x0 + 45 + 240 * (place(x) - place(min(xs))) / (place(max(xs)) - place(min(xs)))
    at_y = lambda y: 205 - 175 * (y - low) / (high - low)
    out = [f'<text x="{x0 + 165}" y="18" text-anchor="middle" font-weight="bold">{title}</text>',
           f'<text x="{x0 + 165}" y="238" text-anchor="middle">{unit}</text>',
           f'<path d="M{x0 + 45} 30V205H{x0 + 285}" fill="none" stroke="#888"/>']
    for x in sorted(set(xs)):
        out.append(f'<text x="{at_x(x):.1f}" y="219" text-anchor="middle">{x}</text>')
    for y in np.linspace(low, high, 4):
        out.append(f'<text x="{x0 + 41}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:.{0 if high > 40 else 1}f}</text>')
    for row, curve in curves.items():
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in curve)
        out.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[row]}" stroke-width="2"/>')
        out += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{COLOURS[row]}"/>' for x, y in curve]
    for row, y in dict(levels).items():
        out.append(f'<path d="M{x0 + 45} {at_y(y):.1f}H{x0 + 285}" stroke="{COLOURS[row]}" stroke-dasharray="4 4"/>')
    return out


def figure(rows, path):
    """Figure 3 (reconstruction and probe against the tokenizer's steps) and Figure 4 (convergence of the generator)."""
    seed0 = {row: rows[row][0] for row in COLOURS}
    align = [rows[row][0] for row in ("stage1", "stage12", "stage123") if 0 in rows[row]]
    on_the_way = {row: sorted((v["step"], v) for k, v in f.items() if k.startswith("tokenizer"))
                  for row, f in {**seed0, "stage12": {k + str(i): v for i, f in enumerate(align) for k, v in f.items()
                                                      if k.startswith("tokenizer")}}.items()}
    budget = last(seed0["vae"])["step"] / 1600
    steps = [(key, round(n * budget)) for key, n in (("plain400", 400), ("plain800", 800), ("plain", 1600))]
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="1210" height="275" font-family="sans-serif" font-size="11">',
           '<rect width="1210" height="275" fill="white"/>']
    for i, (key, title) in enumerate((("psnr", "PSNR, dB"), ("probe", "linear probe, %"))):
        svg += panel(300 * i, title, "steps of the tokenizer",
                     {row: [(step, v[key]) for step, v in points] for row, points in on_the_way.items()})
    for i, (prefix, title) in enumerate((("", "FD to real images"), ("own_", "FD to its own reconstructions"))):
        curves = {row: [(n, f[prefix + key]["FD-Lite0"]) for key, n in steps] for row, f in seed0.items()}
        levels = {} if prefix else {row: f["ceiling"]["FD-Lite0"] for row, f in seed0.items()}
        svg += panel(600 + 300 * i, title, "steps of the generator", curves, levels, log=True)
    for i, row in enumerate(COLOURS):
        svg.append(f'<text x="{380 + 160 * i}" y="264" fill="{COLOURS[row]}" font-weight="bold">'
                   f'{("AlignTok", "VA-VAE", "VAE")[i]}</text>')
    path.write_text("\n".join([*svg, "</svg>"]) + "\n")


@torch.no_grad()
def pictures(runs, out):
    """Reconstructions and samples of each row, one row a line; samples above their nearest training images."""
    from judge import load_judge

    from baselines import VAE
    from data import Crops, ImageFolder, in_order, save_grid, to_tensor
    from files import load_tokenizer
    from vfm_vae import VFMVAE
    finals = {"vae": "vae/vae", "vavae": "vavae/vavae", "vfmvae": "vfmvae/patchgan",
              "stage1": "aligntok/stage1", "stage12": "aligntok/stage2", "stage123": "aligntok/stage3",
              "vae4800": "vae4800/vae", "vavae4800": "vavae4800/vavae", "aligntok4800": "aligntok4800/stage3"}
    if lacking := [row for row in finals if not (runs / row / "guided.npz").exists()]:
        print(f"pictures without the rows that are not in {runs}: {', '.join(lacking)}")
    if len(lacking) == len(finals):
        sys.exit("error: none is left; --runs takes a seed's folder, such as runs/miniature/seed0")
    side = np.load(next(runs.glob("*/guided.npz")))["arr_0"].shape[1]
    val, train = (Crops(ImageFolder(f"{os.environ['DATA']}/{part}"), side) for part in ("val", "train"))
    x = to_tensor(torch.stack([val[0, i][0] for i in range(25, 2000, 166)]))
    lines, samples = [], []
    for row, file in finals.items():
        if row in lacking:
            continue
        tokenizer = load_tokenizer(runs / f"{file}.pt", VAE, VFMVAE)
        lines.append(tokenizer.decode(tokenizer.encode(x)))
        images = np.load(runs / row / "guided.npz")["arr_0"][1::413][:12]
        samples.append(to_tensor(torch.from_numpy(images).permute(0, 3, 1, 2)))
    save_grid([x, *lines], out / "miniature-reconstructions.png")
    save_grid(samples, out / "miniature-samples.png")
    net = load_judge(f"{os.environ['WEIGHTS']}/efficientnet-lite0-57934424.pth")[0]
    features = torch.cat([net(torch.stack([train[item][0] for item in batch]))["pool"]
                          for batch in in_order(len(train.data), 100)])
    own = net(((samples[-1].clamp(-1, 1) + 1) * 127.5).round().byte())["pool"]
    nearest = torch.cdist(own, features).topk(3, largest=False).indices  # (12, 3)
    neighbours = [to_tensor(torch.stack([train[0, int(i)][0] for i in column])) for column in nearest.T]
    save_grid([samples[-1], *neighbours], out / "miniature-neighbours.png")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, help="a seed's folder, such as runs/miniature/seed0")
    p.add_argument("--results", type=Path, default=ROOT / "results/miniature", help="default: results/miniature")
    p.add_argument("--out", type=Path, default=ROOT / "assets", help="where pictures go (default: assets)")
    args = p.parse_args()
    if args.runs and not (args.runs.is_dir() and {"DATA", "WEIGHTS"} <= os.environ.keys()):
        p.error("--runs takes the folder of a seed, with DATA and WEIGHTS as for results/miniature.sh")
    rows = read(args.results)
    if not rows:
        p.error(f"--results {args.results}: no seed*/ROW.json there")
    for title, (names, columns) in TABLES.items():
        text = table(rows, names, columns)
        if text.count("\n") > 2:  # two rows to compare
            print(f"{title}\n\n{text}\n")
    if "steps5" in (f := rows["stage12"].get(0, {})):
        print("FD against sampling steps:", {n: round(f[k]["FD-Lite0"], 1) for n, k in
                                             ((5, "steps5"), (10, "steps10"), (20, "plain"), (50, "steps50"))})
    if all("plain400" in rows[row].get(0, {}) for row in COLOURS):  # with the curves
        figure(rows, args.out / "miniature.svg")
    if args.runs:
        pictures(args.runs, args.out)
