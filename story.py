"""story.png, which tells what the training of a tokenizer has done so far: held-out images and,
below each other, their reconstructions after each stage; then the curves of PSNR and of the linear
probe over the steps.

The reconstructions come from the stages' last grids, the curves from held_out.csv beside them.
"""
import csv
import io
import math

from PIL import Image, ImageDraw, ImageFont

from files import UserError, reading, warn, write_atomically
from runs import step_files

COLUMNS = ["stage", "begins", "steps", "images", "rec", "psnr", "ssim", "probe"]
CURVES = {  # figure -> title, colour, and how it stands beside a stage's images
    "psnr": ("PSNR, dB", "#0072b2", "{:.1f} dB"),
    "probe": ("linear probe of the latents, %", "#d55e00", "probe {:.0f} %")}
# px, where an image has 128; larger ones scale all of it
SIDE, GUTTER, GAP, MARGIN, HEIGHT = 128, 108, 4, 28, 290
WIDTH = GUTTER + 8 * SIDE


def tell(grid, stage, begins, steps, figures):
    """Adds a row of held-out figures to held_out.csv in the folder of a stage's grid, and draws
    story.png anew. begins, steps: of all stages, when this one began and so far."""
    table = grid.with_name("held_out.csv")
    rows = rows_before(table, steps)
    rows.append({"stage": stage, "begins": begins, "steps": steps}
                | {k: f"{v:.6g}" for k, v in figures.items()})
    write(table, rows)
    with reading(table, "table"):
        curves = {name: [(int(row["steps"]), float(row[name])) for row in rows if row.get(name)]
                  for name in CURVES}
        # stage -> its first and, so far, its last step
        spans = {row["stage"]: (int(row["begins"]), int(row["steps"])) for row in rows}
    grids = {name: (step_files(grid.parent, name, "png") or [None])[-1] for name in spans}
    of = f"steps of all stages; on {figures['images']:,} held-out images"
    picture = draw(grids | {stage: grid}, curves, spans, of)
    write_atomically(grid.with_name("story.png"), lambda f: picture.save(f, "PNG", compress_level=1))


def rows_before(table, steps):
    """The rows of held_out.csv before a step of all stages: what comes later is measured again."""
    if not table.exists():
        return []
    with reading(table, "table"), open(table, newline="") as f:
        return [{k: row.get(k) for k in COLUMNS} for row in csv.DictReader(f)
                if int(row["steps"]) < steps]


def rewind(folder, steps):
    """Before a stage goes on from a step of all stages: forgets the later figures."""
    if (table := folder / "held_out.csv").exists():
        write(table, rows_before(table, steps + 1))


def write(table, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(table, lambda f: f.write(text.getvalue().encode()))


def draw(grids, curves, spans, of):
    """grids: stage -> its last grid, or None; curves: name -> [(step, figure)], of CURVES; spans:
    stage -> its first and last step; of: below the curves."""
    strips = {}
    for stage, path in grids.items():
        if not path:
            continue
        try:
            with reading(path, "picture"), Image.open(path) as img:
                w, h = img.width, img.height // 2
                strips["original"] = img.crop((0, 0, w, h))
                strips[stage] = img.crop((0, h, w, 2 * h))
        except UserError as e:  # of an earlier stage: no reason to end this one
            warn(f"{e}; story.png is drawn without it")
    k = math.ceil(h / SIDE)
    top = len(strips) * (SIDE + GAP) + GAP
    picture = Image.new("RGB", (k * (WIDTH + GAP), k * (top + HEIGHT)), "white")
    strips = {"original": strips.pop("original")} | strips
    at = {name: dict(curve) for name, curve in curves.items()}
    for i, (stage, strip) in enumerate(strips.items()):
        y = GAP + i * (SIDE + GAP)
        size = k * SIDE * strip.width // strip.height, k * SIDE
        picture.paste(strip.resize(size, Image.BICUBIC), (k * GUTTER, k * y))
        lines = [spoken(stage)]
        if stage in spans:
            end = spans[stage][1]
            lines += [words.format(at[name][end]) for name, (_, _, words) in CURVES.items()
                      if end in at[name]]
        text(picture, k, (GUTTER / 2, y + SIDE / 2), "\n".join(lines), "mm")
    curves = {name: curve for name, curve in curves.items() if curve}
    for i, (name, curve) in enumerate(curves.items()):
        part = chart(*CURVES[name][:2], curve, spans, of, 2 * k).reduce(2)  # smooth lines
        picture.paste(part, (k * (i * (WIDTH + GAP) // 2), k * top))
    return picture


def spoken(stage):
    """stage1 -> stage 1"""
    return stage.replace("stage", "stage ")


def chart(title, colour, curve, spans, of, k):
    """A curve with its axes; the stages are bands. curve: [(x, y)]; spans: name ->
    its first and last x."""
    picture = Image.new("RGB", (k * (WIDTH + GAP) // 2, k * HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    left, right, up, down = 64, (WIDTH + GAP) // 2 - MARGIN, 64, HEIGHT - 48
    curve = [(x, y) for x, y in curve if math.isfinite(y)] or [(0, 0)]
    low, high = (pick(y for _, y in curve) for pick in (min, max))
    if "%" in title:  # else a small loss would look like a fall
        low = 0
    room = max(0.08 * (high - low), 0.5)
    low, high, end = low - room * (low > 0), high + room, max(x for _, x in spans.values())

    def place(x, y):
        return left + (right - left) * x / end, down - (down - up) * (y - low) / (high - low)

    for i, (stage, span) in enumerate(spans.items()):
        a, b = (place(x, 0)[0] for x in span)
        pen.rectangle([k * a, k * up, k * b, k * down], fill=("#f3f3f3", "#e4e4e4")[i % 2])
        if b - a > 8 * len(spoken(stage)):
            text(picture, k, ((a + b) / 2, up - 4), spoken(stage), "md", "#777")
    for y in ticks(low, high, 5):
        at = place(0, y)[1]
        pen.line([k * left, k * at, k * right, k * at], fill="white", width=k)
        text(picture, k, (left - 6, at), f"{y:g}", "rm")
    for x in [x for x in ticks(0, end, 6) if x % 1 == 0]:
        text(picture, k, (place(x, 0)[0], down + 5), f"{x:,.0f}", "ma")
    text(picture, k, ((left + right) / 2, up - 42), title, "mm", colour, 18)
    text(picture, k, ((left + right) / 2, down + 34), of, "mm")
    points = [tuple(k * p for p in place(x, y)) for x, y in curve]
    pen.line(points, fill=colour, width=2 * k, joint="curve")
    for x, y in points:
        pen.ellipse([x - 4 * k, y - 4 * k, x + 4 * k, y + 4 * k], fill=colour)
    return picture


def ticks(low, high, most):
    """Round numbers from low to high, at most about so many: multiples of 1, 2 or 5 times a power
    of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(f for f in (1, 2, 5, 10) if f * power >= rough)
    return [round(i * step, 9) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def text(picture, k, place, words, anchor, colour="#222", size=16):
    font = ImageFont.load_default(k * size)
    ImageDraw.Draw(picture).text([k * p for p in place], words, colour, font, anchor, spacing=4 * k,
                                 align="center")
