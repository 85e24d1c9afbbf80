"""The README's way from a folder of pictures to a first sweep, run as it stands; the pages; the floors."""

import importlib
import inspect
import json
import pkgutil
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, TINY, run

SHORT = [*TINY, "duration=8ba", "export_interval=4ba", "grid.interval=null"]
PROGRAMS = {".venv/bin/python": [], ".venv/bin/composer": ["-m", "composer.cli.launcher", "-n", "1"]}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE = ("settings.md", "faults.md", "registers.md")  # by programs, to look things up in


def commands():
    """Those of the section, with 8 steps of training for 2400."""
    section = (ROOT / "README.md").read_text().partition("## Your own pictures")[2]
    script = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", "")
    for line in script.splitlines():
        program, *words = shlex.split(line.replace("ba0002400", "ba0000008"))
        more = SHORT if "recipe/train.py" in words else []
        yield [*PROGRAMS[program], *words, *more, *(["floor_splits=1"] if "eval/sweep.py" in words else [])]


def test_from_a_folder_of_pictures_to_a_first_sweep(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    for name in ("recipe", "eval", "yamls"):
        (tmp_path / name).symlink_to(ROOT / name)
    outputs = [run(*command, cwd=tmp_path).stdout for command in commands()]
    assert re.search(r"^next: \S*composer recipe/train.py data/photos/train.yaml$", outputs[0], re.MULTILINE)
    assert Image.open(tmp_path / "real.png").size == (320, 320)
    assert Image.open(tmp_path / "grid.png").size == (8 * (32 * 4 + 2) + 2, 2 * (32 * 4 + 2) + 2)
    rows = [json.loads(line) for line in (tmp_path / "runs/photos/results.jsonl").read_text().splitlines()]
    assert sorted((row["step"], row["nfe"], row["samples"]) for row in rows) == [
        (step, nfe, 36) for step in (4, 8) for nfe in (1, 2, 4)
    ]
    assert all(0 < row["frechet_distance"] < float("inf") for row in rows)


def test_packages_import_from_the_floors_below_alone():
    floors = ["kernels", "storage", "recipe", "streaming_convert", "eval", "benchmarks"]
    for floor, package in enumerate(floors):
        for file in (ROOT / package).rglob("*.py"):
            imported = re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.MULTILINE)
            assert not set(imported) & set(floors[floor + 1 :]), file


@pytest.mark.parametrize("package", ["storage", "recipe", "streaming_convert", "eval"])
def test_every_public_method_says_what_it_does(package):
    """Ruff asks it of modules, classes and functions; a method may leave it to the one that it overrides."""
    silent = []
    for name in (
        package,
        *(info.name for info in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")),
    ):
        for _, kind in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            public = kind.__module__ == name and not kind.__name__.startswith("_")
            own = vars(kind) if public else ()
            methods = [getattr(kind, method) for method in own if not method.startswith("_")]
            methods = [method for method in methods if inspect.isroutine(method)]
            silent += [f"{name}: {x.__qualname__}" for x in methods if not inspect.getdoc(x)]
    assert not silent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_pages_stay_short(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    assert len(text.splitlines()) <= (160 if page.parent == ROOT else 200) or page.name in MADE


def test_the_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")
