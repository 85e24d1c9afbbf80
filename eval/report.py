"""What a sweep shows: a markdown table, curves, a grid of samples, and all of them on one HTML page."""

from __future__ import annotations

import base64
import html
import math
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from itertools import product, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text as MatplotlibText
from matplotlib.ticker import NullLocator
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from eval.reference import Reference
from recipe.generator import Generator
from recipe.metrics import nearest
from recipe.pictures import grid, lettering
from recipe.reference import MDSImages
from recipe.text import Text
from storage.outside import OutsideError, parse_json

Row = dict[str, Any]

MARK = " (trained on)"
SHOWN = 8  # pictures in a row of samples.png


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else f"{value:{spec}}"


def _mark(row: Row, key: str) -> str:
    """Return the mark of a number in features that the weights were finished on, else an empty text."""
    return MARK if row.get(f"trained_on{key}") else ""


def _ratio(row: Row, key: str) -> float | None:
    """Return the distance by that of random halves of the real images, where that is known."""
    floor = row[f"floor{key}"]
    return floor and row[f"frechet_distance{key}"] / floor


def _beside_real(row: Row, what: str, key: str) -> str:
    """Return the distance of the samples and, in brackets, that of as many real images."""
    if f"nearer_share{key}" not in row:
        return "-"
    distances = row[f"distance_{what}{key}"], row[f"real_{what}{key}"][0]
    return "{:.3f} ({:.3f})".format(*distances) + _mark(row, key)


def _mean_ratio(row: Row) -> str:
    marks = [_mark(row, key) for key in ("", *further(row))]
    return _number(row.get("FDr"), ".3f") + (max(marks) if "FDr" in row else "")


def further(row: Row) -> list[str]:
    """Return the ending of the columns of each extractor but the first, such as [pixels]."""
    return [name.removeprefix("frechet_distance") for name in row if name.startswith("frechet_distance[")]


# Column title => the text for a row, and for what its columns of an extractor end in. What is empty in every
# row is left out; what is in FURTHER is there for further extractors, too.
COLUMNS = {
    "weights": lambda r, _: f"{Path(r['weights']).parent.parent.name}/{Path(r['weights']).name}",
    "objective": lambda r, _: r["objective"],
    "average": lambda r, _: r["average"],
    "step": lambda r, _: _number(r["step"], "d"),
    "NFE": lambda r, _: _number(r["nfe"], "d"),
    "w": lambda r, _: _number(r["w"], "g"),
    "interval": lambda r, _: "{:g} to {:g}".format(*r["interval"]) if "interval" in r else "-",
    "Frechet distance": lambda r, key: _number(r[f"frechet_distance{key}"], ".3f") + _mark(r, key),
    "/ floor": lambda r, key: _number(_ratio(r, key), ".2f"),
    "KID x 1000": lambda r, _: _number(1000 * r["kid"] if "kid" in r else None, ".3f"),
    "Inception score": lambda r, _: _number(r.get("inception_score"), ".2f"),
    "precision": lambda r, _: _number(r.get("precision"), ".3f"),
    "recall": lambda r, _: _number(r.get("recall"), ".3f"),
    "prompts": lambda r, _: r["prompts"] if "retrieval" in r else "-",
    "retrieval": lambda r, _: _number(r.get("retrieval"), ".3f"),
    "CLIP score": lambda r, _: _number(r.get("clip_score"), ".2f"),
    "class agreement": lambda r, _: _number(r["class_agreement"], ".3f"),
    "to training (real)": lambda r, key: _beside_real(r, "to_training", key),
    "to held-out (real)": lambda r, key: _beside_real(r, "to_held_out", key),
    "/ real": lambda r, key: _number(r.get(f"ratio_to_held_out{key}") if further(r) else None, ".3f"),
    "nearer than held-out": lambda r, _: _number(r.get("nearer_share"), ".3f"),
}
FURTHER = ("Frechet distance", "/ floor", "to held-out (real)", "/ real")
LEFT_ALIGNED = ("weights", "objective", "average")


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the titles of columns that say something, and the cells as text, newest weights first."""
    cells = {title: [text(r, "") for r in rows] for title, text in COLUMNS.items()}
    for key in further(rows[0]):
        cells |= {f"{title} {key}": [COLUMNS[title](r, key) for r in rows] for title in FURTHER}
    cells["FDr"] = list(map(_mean_ratio, rows))
    titles = [title for title in cells if set(cells[title]) != {"-"}]
    return titles, [[cells[title][i] for title in titles] for i in range(len(rows))]


def notes(rows: list[Row], protocol: str, doubts: list[str]) -> list[str]:
    """Return everything a reader needs to know to compare these numbers with others, or not to trust them."""
    first = rows[0]
    features = f"Features: {first['extractor']}"
    if (accuracy := first["classifier_accuracy"]) is not None:
        features += f", {'the first ' if further(first) else ''}of held-out accuracy {accuracy:.4f}"
    features += f". Reference: {first['reference']}. Network in {first['dtype']}, seed {first['seed']}."
    lines = [*(f"Warning: {doubt}" for doubt in doubts), protocol, features]
    if (floor := first["floor"]) is not None:
        floors = ", ".join([f"{floor:.3f}", *(f"{first[f'floor{key}']:.3f} {key}" for key in further(first))])
        lines.append(f"Floor: {floors}, the mean distance between random halves of the real data.")
    if any(_mark(row, key) for row in rows for key in ("", *further(row))):
        lines.append(
            f"{MARK.strip()}: the weights were finished on this extractor (objective frechet): no number in "
            "its features is an independent score."
        )
    if "retrieval" in first:
        lines.append(
            f"Prompts: captions of the reference, encoder {first['encoder'] or 'none'}. Retrieval: how often "
            "the image of a sample's own caption is among the 10 nearest of 100; chance is 0.1."
        )
    return lines + [copying_note(first)] if "nearer_share" in first else lines


def copying_note(row: Row) -> str:
    """Explain the columns about held-out images, and how far chance takes them."""
    ours, theirs = row["samples"], row["held_out_images"]
    chance = math.sqrt((ours + theirs + 1) / (12 * ours * theirs))  # of the Mann-Whitney statistic
    scatter = " and ".join(f"{row[f'real_to_{name}'][1]:.2f}" for name in ("training", "held_out"))
    return (
        f"Is it copying? Distances of {row['equal_numbers']:,} samples to as many training images, and to "
        f"held-out ones of {row['held_out']}, in brackets those of as many (other) training images; single "
        f"draws of the latter scatter by {scatter}. Nearer than held-out: the probability that a sample lies "
        "nearer to its nearest training image than a held-out image does to its own; "
        f"0.500 +- {chance:.3f} where nothing is copied. FDr: the distance to held-out images by that of "
        "real ones, 1 for real images; the mean over extractors."
    )


def markdown(rows: list[Row], protocol: str, doubts: list[str]) -> str:
    """Return the rows as a Markdown table, and the notes below it."""
    titles, cells = table(rows)
    rule = ["---" if title in LEFT_ALIGNED else "---:" for title in titles]
    lines = [f"| {' | '.join(map(plain, line))} |" for line in (titles, rule, *cells)]
    return "\n".join([*lines, "", *map(plain, notes(rows, protocol, doubts)), ""])


def plain(text: str) -> str:
    """Return text that reads the same in Markdown, in HTML made of it and on a terminal: no tags or links."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return re.sub(r"([\\*\[\]|~])", r"\\\1", html.escape(text, quote=False))


def parse_lines(path: Path) -> list[tuple[int, Row | None]]:
    """Return the numbers and rows of a .jsonl file's lines; nothing if it does not exist.

    A row that is no JSON object, such as one that a kill cut short, is None.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            row = parse_json(line, str(path), nan=True)
        except OutsideError:
            row = None
        if line.strip():
            found.append((number, row if isinstance(row, dict) else None))
    return found


def read_lines(path: Path) -> list[Row]:
    """Return the rows of a .jsonl file; lines that are no JSON objects do not count."""
    return [row for _, row in parse_lines(path) if row is not None]


def reportable(row: Row | None) -> bool:
    """Return True if a report can be made of this row of a results.jsonl, whoever wrote it."""
    try:
        table([row]), notes([row], "", [])
        texts = [row[name] for name in ("weights", "objective", "average", "time", "commit")]
        numbers = [row["frechet_distance"], row["w"], row["nfe"], row["train_seconds"] or 0, row["step"] or 0]
        return all(isinstance(text, str) for text in texts) and all(map(math.isfinite, numbers))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Return a train.jsonl as columns of numbers; of steps that a resume repeated, the last line counts."""
    numbers = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in read_lines(path)]
    by_step = {row["step"]: row for row in numbers if "step" in row}
    rows = [by_step[step] for step in sorted(by_step)]
    names = {name for row in rows for name in row}
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def plot_losses(axis: Axes, log: dict[str, np.ndarray]) -> None:
    """Plot the loss terms over the steps of a run."""
    for key in sorted(log):
        group, _, name = key.rpartition("/")
        if group == "loss/train" and name != "total":
            window = min(10, 1 + len(log[key]) // 10)
            values = np.convolve(log[key], np.ones(window) / window, "valid")
            axis.plot(log["step"][-len(values) :], values, label=name.replace("_", " "))
    axis.set(xlabel="step", ylabel="loss", yscale="log", title="Loss terms (mean of at most 10 points)")
    axis.legend()


def best_curve(
    rows: list[Row], axis: str, value: Callable[[Row], float] = itemgetter("frechet_distance")
) -> tuple[list[float], list[float]]:
    """Return the known values of `axis`, and for each the lowest `value` over everything else."""
    known = sorted({row[axis] for row in rows} - {None})
    return known, [min(value(row) for row in rows if row[axis] == x) for x in known]


TITLES = {"step": "training step", "train_seconds": "training seconds"}
TITLES |= {"nfe": "NFE", "w": "guidance weight w"}


def plot_distances(panel: Axes, rows: list[Row], axis: str) -> None:
    """Plot the distance over one axis of the grid, a line for each objective, average and NFE.

    Weights that were finished on the extractor have lines of their own.
    """
    lines = ("objective", "average", *(() if axis == "nfe" else ("nfe",)))
    values = [list(dict.fromkeys(r[name] for r in rows)) for name in lines]
    for *key, trained in product(*values, (False, True)):
        named = zip(lines, key, values, strict=True)
        words = [f"{v} NFE" if n == "nfe" else v for n, v, all_v in named if len(all_v) > 1] or ["samples"]
        chosen = [r for r in rows if [r[name] for name in lines] == key]
        if chosen := [r for r in chosen if r.get("trained_on", False) == trained]:
            panel.plot(*best_curve(chosen, axis), marker="o", label=" ".join(words) + MARK * trained)
    if rows[0]["floor"] is not None:
        panel.axhline(rows[0]["floor"], color="grey", linestyle=":", label="halves of the real data")
    title = TITLES[axis]
    panel.set(xlabel=title, ylabel="Frechet distance", yscale="log", title=f"Lowest distance over {title}")
    if axis == "nfe":
        ticks = sorted({r["nfe"] for r in rows})
        panel.set_xscale("log")
        panel.set_xticks(ticks, map(str, ticks))
        panel.xaxis.set_minor_locator(NullLocator())
    panel.legend()


def plot_extractors(panel: Axes, rows: list[Row]) -> None:
    """Plot the lowest distance over the training step in each extractor, by what real images score there.

    Solid: to the reference, by that of random halves of it; dashed: to held-out images. Where a line of an
    extractor that was trained on falls and the others rise, the weights are over-fitted to it.
    """
    names = rows[0]["extractor"].split(", ")
    for colour, (name, key) in enumerate(zip(names, ["", *further(rows[0])], strict=True)):
        options = {"marker": "o", "color": f"C{colour}", "label": name + max(_mark(row, key) for row in rows)}
        if rows[0][f"floor{key}"] is not None:
            panel.plot(*best_curve(rows, "step", partial(_ratio, key=key)), "-", **options)
        if (ratio := f"ratio_to_held_out{key}") in rows[0]:
            panel.plot(*best_curve(rows, "step", itemgetter(ratio)), "--", **{**options, "label": None})
    panel.set(xlabel=TITLES["step"], ylabel="distance / real images", title="By extractor; dashed: held out")
    panel.legend(fontsize="small")


def plot_metrics(rows: list[Row], path: Path) -> None:
    """Draw the losses of the only run, if known, and the distance over each axis with several values.

    Several extractors at several steps of a run share one more panel. Objectives are compared by training
    seconds instead of steps, which cost each a different time.
    """
    runs: dict[Path, list[Row]] = {}
    for row in rows:
        runs.setdefault(Path(row["weights"]).parent.parent, []).append(row)
    log = read_log(next(iter(runs)) / "train.jsonl") if len(runs) == 1 else {}
    compared = len({r["objective"] for r in rows}) > 1
    axes = ("train_seconds" if compared else "step", "nfe", "w")
    varied = [a for a in axes if any(len({r[a] for r in run} - {None}) > 1 for run in runs.values())]
    plots = [partial(plot_losses, log=log)] if log else []
    plots += [partial(plot_distances, rows=rows, axis=axis) for axis in varied or ["nfe"]]
    if "step" in varied and len(runs) == 1 and further(rows[0]):
        plots += [partial(plot_extractors, rows=rows)]
    columns = min(len(plots), 2)
    lines = math.ceil(len(plots) / columns)
    size = (5.5 * columns, 4 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for panel, plot in zip_longest(panels.flat, plots, fillvalue=Axes.remove):
        plot(panel)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def real_examples(images: Dataset | None, classes: list[int]) -> Tensor | None:
    """Return the first images of each class, (len(classes) * SHOWN, C, H, W), white where they are few."""
    if not isinstance(images, MDSImages):
        return None
    found: dict[int, list[Tensor]] = {c: [] for c in classes}
    for i in range(len(images)):
        sample = images.row(i)
        shown = found.get(int(sample["label"]))
        if shown is not None and len(shown) < SHOWN:
            shown.append(torch.tensor(sample["image"]))
            if all(len(c) == SHOWN for c in found.values()):
                break
    blank = torch.full_like(images[0], 255)
    return torch.stack([image for c in found.values() for image in c + [blank] * (SHOWN - len(c))])


def shown_rows(
    images: Dataset | None, generator: Generator
) -> tuple[list[str], list[int], Callable[[Tensor], Text] | None, Tensor | None]:
    """Return names, labels, prompts (see Generator.batches) and real images of the rows to show."""
    classes, config = generator.net.config.classes, generator.net.config.text
    if config is None:
        labels = list(range(min(max(1, classes), 10)))
        names = generator.class_names or list(map(str, labels))
        return names[: len(labels)], labels, None, real_examples(images, labels)
    first = torch.arange(min(10, len(images)))
    names = ["\n".join(textwrap.wrap(row["caption"], 28, max_lines=2)) for row in images.rows(first)]
    labels = images.labels(first, classes).tolist()
    real = torch.stack([images[i] for i in first.tolist()])
    return names, labels, lambda index: images.text(index // SHOWN, config), real


def compared(rows: list[Row], weights: str) -> tuple[list[int], Row]:
    """Return each NFE at which these weights were scored, and the row of their lowest distance."""
    theirs = [r for r in rows if r["weights"] == weights]
    return sorted({r["nfe"] for r in theirs}), min(theirs, key=lambda r: r["frechet_distance"])


def newest_of_each_folder(rows: list[Row]) -> list[str]:
    """Return the first weights of every folder in the rows, in their order."""
    first: dict[Path, str] = {}
    for row in rows:
        first.setdefault(Path(row["weights"]).parent, row["weights"])
    return list(first.values())


def plot_samples(
    rows: list[Row], images: Dataset | None, generators: dict[str, Generator], path: Path
) -> None:
    """Draw one row per class, or per caption of the reference's first images: real images, samples of the
    first weights with each NFE, and of the other weights with their smallest NFE, all from the same noise.

    Weights that know other classes than the first, or take prompts where those do not, are left out.
    """
    first, generator = next(iter(generators.items()))
    kind = generator.net.config.classes, generator.net.config.text
    names, shown, text, real = shown_rows(images, generator)
    parts = {} if real is None else {"real": real}
    requested = torch.tensor(shown).repeat_interleave(SHOWN)
    for weights, generator in generators.items():
        if (generator.net.config.classes, generator.net.config.text) != kind:
            continue
        steps, best = compared(rows, weights)
        seeds, how = torch.arange(len(requested)), {"text": text, "interval": best.get("interval")}
        for nfe in steps if weights == first else steps[:1]:
            drawn = generator.batches(requested, seeds, nfe, best["w"], SHOWN, **how)
            title = f"{nfe} step{'s' if nfe > 1 else ''}"
            title = title if weights == first else f"{Path(weights).parent.parent.name}, {title}"
            parts[title] = torch.cat([images.cpu() for images, _ in drawn])
    pictures = [grid(x, len(x) // len(shown), max(1, 32 // x.shape[-1])) for x in parts.values()]
    size = (3.2 * len(parts), 0.42 * len(shown) + 0.5)
    figure, axes = plt.subplots(1, len(parts), figsize=size, squeeze=False, layout="constrained")
    for axis, picture, title in zip(axes[0], pictures, parts, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    run, best = Path(first).parent.parent.name, compared(rows, first)[1]
    within = " for t from {:g} to {:g}".format(*best["interval"]) if "interval" in best else ""
    title = f"{run}/{Path(first).name}, w = {best['w']:g}{within}, the same noise in every column of samples"
    write(figure.supxlabel("-"), title)
    step = pictures[0].shape[0] / len(shown)
    rows_at = [(i + 0.5) * step for i in range(len(shown))]
    axes[0, 0].set_yticks(rows_at, [lettering(name)[0] for name in names])  # a tick's text is its formatter's
    for label, name in zip(axes[0, 0].get_yticklabels(), names, strict=True):
        write(label, name)
    figure.savefig(path, dpi=120 if max(p.shape[1] for p in pictures) < 1000 else 300)
    plt.close(figure)


def write(label: MatplotlibText, text: str) -> None:
    """Set the text of a label as it stands, in a font that has its letters; `$` begins no formula."""
    text, file = lettering(text)
    label.set(text=text, parse_math=False)
    if file is not None:
        label.set_fontproperties(FontProperties(fname=file, size=label.get_size()))


def draw_nearest(rows: list[Row], reference: Reference, generator: Generator, path: Path) -> None:
    """Draw samples of the first row's weights above their nearest training images, two lines for each NFE."""
    config, text = generator.net.config, None
    seeds = torch.arange(20)
    labels = seeds % max(1, config.classes)
    if config.text is not None:
        own = seeds % len(reference.images)
        labels = reference.images.labels(own, config.classes)
        text = reference.images.text(own, config.text)
    steps, best = compared(rows, rows[0]["weights"])
    lines = []
    for nfe in steps:
        samples = generator(labels, seeds, nfe, best["w"], text, best.get("interval")).cpu()
        found = nearest(reference.extractor(samples).cpu(), reference.features)[1].tolist()
        lines += [samples, torch.stack([reference.images[i] for i in found]), torch.full_like(samples, 255)]
    picture = grid(torch.cat(lines[:-1]), len(seeds), max(1, 32 // lines[0].shape[-1]))
    Image.fromarray(picture).save(path)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430 }
body { max-width: 1200px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto } img { max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #dfe3ea }
th.left, td.left { text-align: left } th { border-bottom: 2px solid #1d2430 }
tr.best { background: #e7f3ea; font-weight: 600 } p, footer { color: #4a5365 }
"""


def html_table(rows: list[Row]) -> str:
    """Return the table as HTML, with the row of the lowest distance marked."""
    titles, cells = table(rows)
    classes = [' class="left"' if title in LEFT_ALIGNED else "" for title in titles]
    best = min(range(len(rows)), key=lambda i: rows[i]["frechet_distance"])

    def line(tag: str, texts: list[str], mark: str = "") -> str:
        parts = (f"<{tag}{c}>{html.escape(text)}</{tag}>" for c, text in zip(classes, texts, strict=True))
        return f"<tr{mark}>{''.join(parts)}</tr>"

    body = "".join(line("td", texts, " class=best" * (i == best)) for i, texts in enumerate(cells))
    head = f"<thead>{line('th', titles)}</thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def html_page(rows: list[Row], said: list[str], title: str, pictures: dict[str, Path]) -> str:
    """Return a page that needs no other file: notes, the table, and the pictures by their headings."""
    text = "".join(f"<p>{html.escape(note).replace('`', '')}</p>" for note in said)
    figures = ""
    for heading, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        figures += f'<h2>{heading}</h2><img alt="{heading}" src="data:image/png;base64,{data}">'
    made = sorted(r["time"] for r in rows if r.get("time"))
    commits = ", ".join(sorted({r["commit"] for r in rows}))
    footer = f"{len(rows)} cells, scored {made[0]} to {made[-1]}, commit {commits}; lowest distance marked."
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>{text}{html_table(rows)}{figures}"
        f"<footer><p>{html.escape(footer)}</p></footer></body></html>\n"
    )


def write_report(
    folder: Path,
    rows: list[Row],
    reference: Reference,
    generators: dict[str, Generator],
    protocol: str,
    doubts: list[str],
) -> None:
    """Write results.md (also printed), metrics.png, samples.png and report.html to the folder, and
    nearest.png where there are held-out images.

    generators: by the weights of `newest_of_each_folder`; protocol: in words; doubts: what speaks against
    the extractors.
    """
    text = markdown(rows, protocol, doubts)
    (folder / "results.md").write_text(text)
    pictures = {"Curves": folder / "metrics.png", "Samples": folder / "samples.png"}
    plot_metrics(rows, pictures["Curves"])
    plot_samples(rows, reference.images, generators, pictures["Samples"])
    if "nearer_share" in rows[0]:
        steps = ", ".join(map(str, compared(rows, rows[0]["weights"])[0]))
        heading = f"Samples of {steps} steps, each above its nearest training image"
        pictures[heading] = folder / "nearest.png"
        draw_nearest(rows, reference, generators[rows[0]["weights"]], pictures[heading])
    said = notes(rows, protocol, doubts)
    page = html_page(rows, said, f"Sweep {folder.name}", pictures)
    (folder / "report.html").write_text(page)
    names = ", ".join(["results.md", *(path.name for path in pictures.values())])
    sys.stdout.write(f"{text}\n{folder / 'report.html'} ({names})\n")
