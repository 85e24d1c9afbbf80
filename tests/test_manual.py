"""What programs say of themselves, and what is made from the settings: a page, and schemas for editors."""

import importlib
import json
import re

import jsonschema
import pytest
from omegaconf import OmegaConf

from recipe.config import ConfigError, TrainConfig, load_config, yaml_of
from tests import settings
from tests.conftest import ROOT

KEYS = {
    "recipe.train": "optimizer.lr",
    "recipe.plan": "per_node",
    "recipe.preflight": "optimizer.lr",
    "eval.sweep": "floor_splits",
    "benchmarks.compiled": "gemm",
}
OTHERS = ["streaming_convert.__main__", "kernels.inspect", "tests.faults", "tests.parity"]
OTHERS += [f"eval.{name}" for name in ("app", "sample", "export", "import_weights", "reference")]
OTHERS += [f"benchmarks.{name}" for name in ("attention", "gpu", "loader", "step")]


def said(capsys, module, *arguments):
    """What the program prints before it ends with status 0."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(list(arguments))
    assert not end.value.code
    return capsys.readouterr().out


def test_every_program_is_among_these():
    """Those of the packages; of the tests, the two that are documented."""
    files = [
        path
        for folder in ("recipe", "kernels", "streaming_convert", "eval", "benchmarks")
        for path in (ROOT / folder).glob("*.py")
        if re.search('^if __name__ == "__main__":$', path.read_text(), re.MULTILINE)
    ]
    found = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in files}
    assert found | {"tests.faults", "tests.parity"} == {*KEYS, *OTHERS}


@pytest.mark.parametrize("module", [*KEYS, *OTHERS])
def test_help_says_what_a_program_does_its_usage_and_its_keys(module, capsys):
    text = said(capsys, module, "--help")
    name = module.removesuffix(".__main__")
    assert "usage: " in text
    assert name in text or f"{name.replace('.', '/')}.py" in text
    about = importlib.import_module(module).__doc__.split()
    assert " ".join(about[:12]) in " ".join(text.split())
    if module in KEYS:
        assert f"\n{KEYS[module]}: " in text
        assert said(capsys, module, "x.yaml", "-h") == text


def test_help_of_a_key_is_that_of_the_key(capsys):
    assert said(capsys, "recipe.train", "--help", "optimizer.lr") == (
        "optimizer.lr: number more than 0 (default 0.0001)\n    Learning rate after the warm-up.\n"
    )
    assert said(capsys, "recipe.plan", "--help", "gpu.arch=90").startswith(
        "gpu.arch: whole number from 80 to"
    )
    section = said(capsys, "recipe.train", "--help", "ema")
    assert [line.split(":")[0] for line in section.splitlines() if line[0] != " "] == [
        "ema.target_decay",
        "ema.decay",
        "ema.ramp",
        "ema.posthoc",
    ]
    guidance = said(capsys, "recipe.train", "--help", "objective.guidance")
    assert [line.split(":")[0] for line in guidance.splitlines() if line[0] != " "] == [
        "objective.guidance (tvm)",
        "objective.guidance (imf)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: composer recipe/train.py CONFIG.yaml"),
        (["--help", "optimizer.lrr"], "optimizer.lrr: is not a setting; did you mean optimizer.lr?"),
    ],
)
def test_what_help_does_not_know_is_one_line(arguments, message):
    with pytest.raises(SystemExit, match=f"^{message.replace('?', '[?]')}"):
        importlib.import_module("recipe.train").main(arguments)


@pytest.mark.parametrize("path", settings.files())
def test_what_is_made_from_the_settings_is_up_to_date(path):
    assert (ROOT / path).read_text() == settings.files()[path], "python -m tests.settings"


def problems(schema, values):
    schema = json.loads((ROOT / schema).read_text())
    validator = jsonschema.Draft7Validator(schema)
    validator.check_schema(schema)
    return [error.json_path for error in validator.iter_errors(values)]


YAMLS = [
    str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("yamls/**/*.yaml")) if "launch" not in str(path)
]


@pytest.mark.parametrize("path", YAMLS)
def test_every_yaml_points_editors_to_the_schema_that_it_fits(path):
    file = ROOT / path
    first, *_ = file.read_text().splitlines()
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / name).is_file()
    schema = str((file.parent / name).relative_to(ROOT))
    assert problems(schema, OmegaConf.to_container(OmegaConf.load(file))) == []


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"optimizer": {"lr": 0}}, "$.optimizer.lr"),
        ({"optimizer": {"learning_rate": 1e-3}}, "$.optimizer"),
        ({"duration": "2400"}, "$.duration"),
        ({"grid": {"nfe": []}}, "$.grid.nfe"),
        ({"objective": {"guidance": 1.0, "kappa": 0.5}}, "$.objective"),  # of two objectives
        ({"objective": {"name": "meanflow", "kappa": 1.0}}, "$.objective"),
        ({"model": {"width": 65537}}, "$.model"),  # of two networks
    ],
)
def test_an_editor_sees_what_a_run_would_refuse(values, where):
    assert problems("yamls/schema.json", values) == [where]


def test_an_editor_takes_what_a_run_takes():
    given = {"base": "base.yaml", "run_name": 2026, "duration": "???", "folder": "${run_name}"}
    given |= {"optimizer": {"lr": "${ema.decay}", "betas": [0, 0.5]}, "grid": {"nfe": 4, "interval": None}}
    for objective in ({"guidance": [1, 2]}, {"kappa": 0.5}, {"name": "imf", "guidance": 2}, {}):
        assert problems("yamls/schema.json", {**given, "objective": objective}) == []


def test_the_folder_of_a_dataset_stands_for_its_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/photos/train").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^data/photos: must be a YAML, or the folder of a dataset that "):
        yaml_of("data/photos")
    (tmp_path / "data/photos/train.yaml").write_text("run_name: photos\nfolder: x\nduration: 9ba\n")
    for path in ("data/photos", "data/photos/", "data/photos/train", "data/photos/train.yaml"):
        assert yaml_of(path) == "data/photos/train.yaml"
        assert load_config(TrainConfig, yaml_of(path), []).run_name == "photos"
    assert yaml_of("nothing.yaml") == "nothing.yaml"
