"""What a sweep shows: a markdown table, curves and a grid of samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from eval.sample import Generator, grid

Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """The rows as a table, the newest weights first."""
    lines = [
        "| weights | objective | step | NFE | w | Frechet distance | / floor | class agreement |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        agreement = "-" if r["class_agreement"] is None else f"{r['class_agreement']:.3f}"
        lines.append(
            f"| {Path(r['weights']).parent.parent.name}/{Path(r['weights']).name} | {r['objective']} | "
            f"{r['step']} | {r['nfe']} | {r['w']:g} | {r['frechet_distance']:.3f} | "
            f"{r['frechet_distance'] / r['floor']:.2f} | {agreement} |"
        )
    first = rows[0]
    note = f"Floor: {first['floor']:.3f}, the mean distance between random halves of the real data."
    if first["classifier_accuracy"] is not None:
        note += f" Features: a classifier of held-out accuracy {first['classifier_accuracy']:.4f}."
    return "\n".join([*lines, "", f"{first['samples']} samples a row. {note}", ""])


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a train.jsonl; of steps that a resume repeated, the last line counts."""
    by_step = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        row = json.loads(line)
        by_step[row["step"]] = row
    rows = [by_step[step] for step in sorted(by_step)]
    names = rows[0].keys() if rows else ()
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` points."""
    window = max(1, min(window, len(values)))
    return np.convolve(values, np.ones(window) / window, "valid")


def plot_metrics(rows: list[Row], path: Path) -> None:
    """Loss terms of the first row's run (left), distance over training or over NFE (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    log = read_log(Path(rows[0]["weights"]).parent.parent / "train.jsonl")
    for name in ("terminal", "flow_matching"):
        if f"loss/train/{name}" in log:
            values = smooth(log[f"loss/train/{name}"], 10)
            left.plot(log["step"][-len(values) :], values, label=name.replace("_", " "))
    left.set(xlabel="step", ylabel="loss", yscale="log", title="Loss terms (running mean of 10 points)")
    left.legend()
    over_steps = len({r["step"] for r in rows if r["objective"] == rows[0]["objective"]}) > 1
    axis, other = ("step", "nfe") if over_steps else ("nfe", "objective")
    for value in dict.fromkeys(r[other] for r in rows):
        points = sorted((r[axis], r["frechet_distance"]) for r in rows if r[other] == value)
        right.plot(*zip(*points, strict=True), marker="o", label=f"{value} NFE" if over_steps else value)
    right.axhline(rows[0]["floor"], color="grey", linestyle=":", label="halves of the real data")
    right.set(xlabel=axis, ylabel="Frechet distance", yscale="log", title=f"Distance over {axis}")
    if not over_steps:
        right.set_xscale("log")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_samples(rows: list[Row], images: Tensor, labels: Tensor, path: Path, columns: int = 8) -> None:
    """One row per class: real images, then samples of the newest weights, each NFE from the same noise."""
    generator = Generator(rows[0]["weights"])
    classes = max(1, generator.net.config.classes)
    names = generator.facts["data"]["class_names"] or ["all"]
    shown = list(range(min(classes, 16)))
    real = [images[(labels == c).nonzero()[:columns, 0]] for c in shown]
    real = [torch.cat([r, r.new_full((columns - len(r), *r.shape[1:]), 255)]) for r in real]
    parts, titles = [torch.cat(real)], ["real"]
    requested = torch.tensor(shown).repeat_interleave(columns)
    for nfe in sorted({r["nfe"] for r in rows if r["weights"] == rows[0]["weights"]}):
        parts.append(generator(requested, torch.arange(len(requested)), nfe, rows[0]["w"]).cpu())
        titles.append(f"{nfe} step{'s' if nfe > 1 else ''}")
    scale = max(1, 32 // images.shape[-1])
    pictures = [grid(part, columns, scale) for part in parts]
    figure, axes = plt.subplots(1, len(parts), figsize=(3.2 * len(parts), 0.42 * len(shown) + 0.5))
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    step = picture.shape[0] / len(shown)
    axes[0].set_yticks([(i + 0.5) * step for i in range(len(shown))], [names[c] for c in shown])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(folder: Path, rows: list[Row], images: Tensor, labels: Tensor) -> None:
    """results.md (also printed), metrics.png and samples.png in the folder."""
    table = markdown(rows)
    (folder / "results.md").write_text(table)
    plot_metrics(rows, folder / "metrics.png")
    plot_samples(rows, images, labels, folder / "samples.png")
    sys.stdout.write(f"{table}\n{folder / 'results.md'}, metrics.png, samples.png\n")
