"""Every setting, fed what it should not be: a run can start from it, or it is one line that names its key."""

import types
from dataclasses import is_dataclass, replace
from typing import Union, get_args, get_origin, get_type_hints

import pytest

from eval.sweep import SweepConfig
from recipe import plan, preflight
from recipe.checkpoints import identity
from recipe.config import ConfigError, TrainConfig, load_config
from recipe.manual import rows
from recipe.networks import CONFIGS
from recipe.objectives import OBJECTIVES
from recipe.plan import Cluster
from recipe.settings import setting_keys
from recipe.train import dry_run
from tests.conftest import refusal

HUGE, NONE = str(10**30), ["[]", "{}", "null"]
TEXTS = ["''", "nan", "x", "../x", "a/b", '"\\0"', "x" * 5000, "0ba", "-3ba", "1e400ba", "s3://", "1", *NONE]
NUMBERS = [".nan", ".inf", "-.inf", "-1", "0", "0.5", "1e-300", "1e300", HUGE, "x", "true", *NONE]
LISTS = ["[.nan]", "[-1]", "[0]", "[x]", "[[]]", "[null]", f"[{HUGE}]", "[1, 1]", "[0.5, 2]", "['']", *NONE]
SECTIONS = {n: hint for n, hint in get_type_hints(TrainConfig).items() if is_dataclass(hint)}
SECTIONS |= {"objective": OBJECTIVES["tvm"], "model": CONFIGS["dit"]}
EACH = {name: hint for name, hint in SECTIONS.items() if name not in ("objective", "model")}
EACH |= {f"objective {name}": objective for name, objective in OBJECTIVES.items()}
EACH |= {f"model {name}": network for name, network in CONFIGS.items()}
REQUIRED = ["run_name=x", "folder=x", "duration=9ba", "weights=[x]", "reference=x", "features={pixels: a}"]


def kinds(hint):
    """The plain types that a field may have."""
    if get_origin(hint) in (types.UnionType, Union):
        return set().union(*(kinds(part) for part in get_args(hint)))
    return {get_origin(hint) or hint}


def odd_settings(schema):
    """(field, value) for all fields of a schema that are no sections, and all odd values of their types."""
    for name, hint in get_type_hints(schema).items():
        found = kinds(hint)
        values = TEXTS if str in found else []
        values = values + (NUMBERS if found & {int, float, bool} else [])
        values = values + (LISTS if found & {list, dict} else [])
        yield from ((name, value) for value in ([] if is_dataclass(hint) else dict.fromkeys(values)))


def accepted(schema):
    """The odd settings that the schema takes; asserts that each other one is a line that names its key."""
    required = [r for r in REQUIRED if r.split("=")[0] in get_type_hints(schema)]
    for name, value in odd_settings(schema):
        try:
            load_config(schema, None, [*required, f"{name}={value}"])
        except ConfigError as error:
            assert name in str(error), (name, value)
            assert "\n" not in str(error), (name, value)
        else:
            yield name, value


@pytest.fixture
def small(digits, tmp_path, monkeypatch):
    """A YAML of a small run on the digits; what a setting writes, it writes into a folder of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(
        "run_name: small\nfolder: run\nduration: 10ba\n"
        "model: {size: 8, channels: 1, classes: 10, patch: 4, width: 16, depth: 1, heads: 2}\n"
        f"data: {{local: {digits}, batch_size: 16}}\n"
    )
    return str(path)


@pytest.mark.parametrize("section", [None, *EACH])
def test_an_odd_setting_is_one_line_or_a_run_that_can_start(section, small, digits):
    found: dict[str, list[str]] = {}
    for name, value in accepted(EACH[section] if section else TrainConfig):
        found.setdefault(name, []).append(value)
    assert found
    for name, value in [(name, value) for name, values in found.items() for value in {values[0], values[-1]}]:
        group, _, choice = (section or "").partition(" ")
        key = f"{group}.{name}" if section else name
        chosen = [f"{group}.{'name' if group == 'objective' else 'network'}={choice}"] if choice else []
        if choice == "mit":
            chosen += ["model.head_depth=1"]
        if choice == "frechet":
            chosen += [f"objective.features.pixels={digits}", f"init_from={digits}/../begin"]
        try:
            config = load_config(TrainConfig, small, [*chosen, f"{key}={value}"])
            assert "parameters: " in dry_run(config)
        except ConfigError as error:
            assert key in str(error), (key, value)
            assert "\n" not in str(error), (key, value)
        else:
            problems, _ = preflight.examine(config, 1)
            assert all(key in line and "\n" not in line for line in problems), (key, value, problems)


def test_an_odd_setting_of_a_sweep_is_one_line():
    assert {name for name, _ in accepted(SweepConfig)} >= {"folder", "w", "seed"}


def test_an_odd_setting_of_a_plan_is_one_line_or_a_plan(small):
    for name, value in accepted(Cluster):
        cluster = load_config(Cluster, None, [f"{name}={value}"])
        assert "| GPUs |" in plan.report(load_config(TrainConfig, small, ["data.batch_size=512"]), cluster)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", ["x", "[]", "1", "null"])
def test_a_value_in_the_place_of_a_section_is_one_line_that_names_it(section, value):
    with pytest.raises(ConfigError, match=f"^{section}: .*"):
        load_config(TrainConfig, None, [*REQUIRED[:3], f"{section}={value}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=.nan", "optimizer.lr: nan must be a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr: inf must be a finite number"),
        ("optimizer.weight_decay=-5", "optimizer.weight_decay: -5 must be at least 0"),
        ("optimizer.eps=0", "optimizer.eps: 0 must be more than 0"),
        ("duration=600sec", "duration: '600sec' must be a time in ba, ep or sp"),
        ("seed=-1", "seed: -1 must be a whole number from 0 to 2147483647"),
        ("save_interval=0ba", "save_interval: '0ba' must be a time"),
        ("duration=99tok", "duration: '99tok' must be a time"),
        ("data.canonical_nodes=0", "data.canonical_nodes: 0 must be a whole number from 1 to 65536"),
        ("data.cache_limit=1gb", "data.cache_limit: 1gb limits the copy of data.remote, which is not set"),
        ("microbatch=17", "microbatch: 17 is more than data.batch_size, 16"),
        ("run_name=../x", "run_name: '../x' must be letters"),
        ("run_name=''", "run_name: '' must be letters"),
        ("run_name=${oc.env:HOME}", "run_name: '${oc.env:HOME}' may refer to other keys only"),
        ("folder=runs/${oc.decode:x}", "folder: 'runs/${oc.decode:x}' may refer to other keys only"),
        ("folder=${${run_name}:x}", "folder: '${${run_name}:x}' may refer to other keys only"),
        ("grid.labels=[11]", "grid.labels: [11] must be in 0..10"),
    ],
)
def test_a_setting_that_breaks_its_rule_says_which_rule(small, override, message):
    assert refusal(ConfigError, load_config, TrainConfig, small, [override]).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=1798", "data.batch_size: 1798 is more than the 1797 samples of "),
        ("data.canonical_nodes=1798", "data.canonical_nodes: 1798 is more than the 1797 samples of "),
    ],
)
def test_more_than_the_dataset_holds_is_refused_before_the_start(small, override, message):
    (problem,), _ = preflight.examine(load_config(TrainConfig, small, [override]), 1)
    assert problem.startswith(message)


def test_the_manifest_is_read_once(small, monkeypatch):
    read, calls = preflight.open_dataset, []
    monkeypatch.setattr(preflight, "open_dataset", lambda *given: calls.append(given) or read(*given))
    problems, found = preflight.examine(load_config(TrainConfig, small, []), 1)
    assert (problems, found.manifest.num_samples, len(calls)) == ([], 1797, 1)


def test_a_number_is_a_number_everywhere(small):
    given = ["objective.guidance=2", "optimizer.betas=[0,0.5]", "step.clip=1", "log.peak_tflops=989"]
    given += ["data.normalize={mean: [127], std: [64.5]}"]
    config = load_config(TrainConfig, small, given)
    assert (config.objective.guidance_range, config.optimizer.betas) == ((2.0, 2.0), [0.0, 0.5])
    assert (config.step.clip, config.log.peak_tflops) == (1.0, 989.0)
    assert config.data.normalize == {"mean": [127], "std": [64.5]}
    assert load_config(TrainConfig, small, ["objective.guidance=[1,2.5]"]).objective.guidance_range == (
        1.0,
        2.5,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr='1'", "optimizer.lr: '1' must be a number"),
        ("optimizer.lr=true", "optimizer.lr: True must be a number"),
        ("seed=true", "seed: True must be a whole number"),
        ("seed=1.0", "seed: 1.0 must be a whole number"),
        ("ema.ramp=1", "ema.ramp: 1 must be true or false"),
        ("optimizer.betas=0.9", "optimizer.betas: 0.9 must be a list"),
        ("optimizer.betas=[0.9]", "optimizer.betas: [0.9] must have at least 2 items"),
        ("grid.nfe=0", "grid.nfe: 0 must be a whole number from 1 to 1000"),
        ("grid.nfe=[1,0]", "grid.nfe[1]: 0 must be a whole number from 1 to 1000"),
        ("optimizer.warm_up=1ba", "optimizer.warm_up: is not a setting; did you mean warmup?"),
        ("weight_decy=1", "weight_decy: is not a setting; did you mean optimizer.weight_decay?"),
        ("step.colour=1", "step.colour: is not a setting; only tangent_warmup, clip, max_skipped are"),
    ],
)
def test_a_value_is_taken_as_it_is_written(small, override, message):
    overrides = ["run_name=x", "folder=x", "duration=9ba", override]
    assert refusal(ConfigError, load_config, TrainConfig, None, overrides).startswith(message)


def test_a_key_that_must_be_given_is_named():
    for path, key in ((None, "run_name"), ("yamls/base.yaml", "duration")):
        with pytest.raises(ConfigError, match=f"^{key}: must be given$"):
            load_config(TrainConfig, path, ["run_name=x", "folder=runs/${duration}"] if path else [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("folder=runs/${grid.nope}", "folder: Interpolation key 'grid.nope' not found"),
        ("data.local=${data.remot}", "data.local: Interpolation key 'data.remot' not found"),
        ("folder=${folder}", "folder: Recursive interpolation detected"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_line(override, message):
    assert refusal(ConfigError, load_config, TrainConfig, "yamls/digits.yaml", [override]) == message


def test_what_yaml_reads_as_a_number_or_as_false_may_be_a_name(small):
    config = load_config(TrainConfig, small, ["run_name=2026", "log.wandb=off"])
    assert (config.run_name, config.log.wandb) == ("2026", "off")


def test_a_list_of_one_needs_no_brackets(small):
    given = ["grid.nfe=4", "grid.labels=3", "export=net", "ema.posthoc=0.05"]
    config = load_config(TrainConfig, small, given)
    assert (config.grid.nfe, config.grid.labels) == ([4], [3])
    assert (config.export, config.ema.posthoc) == (["net"], [0.05])
    config = load_config(SweepConfig, None, ["folder=x", "weights=runs/x/weights", "reference=x", "w=2"])
    assert (config.weights, config.w) == (["runs/x/weights"], [2.0])


@pytest.mark.parametrize("schema", [TrainConfig, SweepConfig, Cluster])
def test_every_setting_is_described_by_a_sentence(schema):
    found = list(rows(schema))
    assert {row.key.partition(" ")[0] for row in found} >= set(setting_keys(schema)) - set(SECTIONS)
    for row in found:
        assert row.meaning[0].isupper(), row
        assert row.meaning.endswith("."), row
        assert row.allowed, row


def test_an_objective_that_is_no_settings_class_would_not_be_checked():
    assert all("__pydantic_fields__" in vars(objective) for objective in OBJECTIVES.values())


def test_keys_may_refer_to_keys(small):
    config = load_config(TrainConfig, small, ["folder=runs/${run_name}-${data.batch_size}"])
    assert config.save_folder == "runs/small-16/checkpoints"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: b.yaml", "b": "base: a.yaml"}, "a.yaml: its base leads back to itself: "),
        ({"a": "base: [b, c]"}, "a.yaml: base: ['b', 'c'] is not the name of one YAML"),
        ({"a": "base: b.yaml"}, "b.yaml: no such file"),
        (
            {"a": "base: '${oc.env:HOME}/b.yaml'"},
            "base: '${oc.env:HOME}/b.yaml' may refer to other keys only",
        ),
        ({"a": "x: &x [*x]"}, "a.yaml: not valid YAML"),
        ({"a": "3"}, "a.yaml: "),
    ],
)
def test_a_yaml_that_cannot_be_read_is_one_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    said = refusal(ConfigError, load_config, TrainConfig, str(tmp_path / "a.yaml"), [])
    assert message in said and "\n" not in said
    if "b" in files:
        names = ["a.yaml", "b.yaml", "a.yaml"]
        assert " -> ".join(str(tmp_path / name) for name in names) in said


@pytest.mark.parametrize("name", ["yamls/digits.yaml", "digits.yaml", "digits"])
def test_the_projects_yamls_are_found_by_their_names_from_any_folder(tmp_path, monkeypatch, name):
    here = load_config(TrainConfig, "yamls/digits.yaml", [])
    monkeypatch.chdir(tmp_path)
    assert load_config(TrainConfig, name, []) == here
    (tmp_path / "mine.yaml").write_text(f"base: {name}\nseed: 7")
    assert load_config(TrainConfig, "mine.yaml", []) == replace(here, seed=7)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{run_name: own, folder: x, duration: 9ba}")
    assert load_config(TrainConfig, name, []).run_name == "own"


def test_a_plan_needs_no_data_and_takes_any_gpu(small, capsys):
    sheet = "gpu={flops: 5e14, memory: 1e11, memory_rate: 4e12, node_rate: 4e11, network_rate: 1e11}"
    plan.main([small, "data.local=nowhere", "gpus=1", sheet])
    assert "65% of 500 bf16 TFLOP/s" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"add it to GPUS in recipe/plan.py, or give its data sheet"):
        plan.main([small, "gpu=b300"])


def test_a_temporary_folder_too_long_for_sockets_is_one_line_instead_of_a_run_that_hangs(small, monkeypatch):
    monkeypatch.setattr(preflight, "gettempdir", lambda: "/tmp/" + 71 * "x")
    problems, _ = preflight.examine(load_config(TrainConfig, small, ["data.workers=1"]), 1)
    assert [line for line in problems if line.startswith("data.workers: 1 need a temporary folder")]
    assert preflight.examine(load_config(TrainConfig, small, ["data.workers=0"]), 1)[0] == []


def test_features_that_are_given_replace_those_of_the_yaml():
    given = ["objective.features={pixels: a}", "objective.features.pixels:2=b"]
    config = load_config(TrainConfig, "yamls/digits_frechet.yaml", given)
    assert config.objective.features == {"pixels": "a", "pixels:2": "b"}


def test_how_weights_begin_is_nothing_that_a_checkpoint_must_agree_on():
    network = ["model.network=mit", "model.head_depth=1", "objective.name=imf", "objective.guidance=[1,8]"]
    mine, theirs = (
        load_config(TrainConfig, "yamls/digits.yaml", [*network, f"model.gate_init={gate}"])
        for gate in (0.0, 0.5)
    )
    assert identity(mine) == identity(theirs)
