"""What pip installs: packages and YAMLs that work from any folder, and the version instead of a commit."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
import yaml

from recipe import weights
from tests.conftest import ROOT

VERSION = f"version {metadata.version('terminal-velocity')}"
SCRIPT = """
import recipe
from recipe.commands import YAMLS
from recipe.config import TrainConfig, load_config
from recipe.weights import commit
config = load_config(TrainConfig, "yamls/digits.yaml", [])
print(recipe.__path__[0], YAMLS, config.run_name, commit(), sep="\\n")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the packages as setup.py builds them."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_every_module_and_every_yaml_is_installed(installed):
    packages = ("storage", "kernels", "recipe", "streaming_convert", "eval", "benchmarks")
    modules = {str(path.relative_to(ROOT)) for package in packages for path in (ROOT / package).rglob("*.py")}
    yamls = {f"recipe/{path.relative_to(ROOT)}" for path in (ROOT / "yamls").rglob("*") if path.is_file()}
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.suffix != ".pyc"}
    assert modules | yamls == {name for name in found if (installed / name).is_file()}


def test_the_installed_project_works_in_a_folder_without_checkout(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", SCRIPT]
    process = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    package = f"{installed}/recipe"
    assert process.stdout.splitlines() == [package, f"{package}/yamls", "digits", VERSION]


def test_a_commit_is_named_only_of_the_repository_that_holds_the_code(tmp_path, monkeypatch):
    """Not of that around an environment into which pip installed it."""

    def git(*words):
        who = ("-c", "user.name=x", "-c", "user.email=x@x")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)

    code = tmp_path / "recipe/weights.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(weights, "__file__", str(code))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project's")
    assert weights.commit() == VERSION
    git("add", ".")
    git("commit", "-q", "-m", "this one's")
    head = git("rev-parse", "--short=12", "HEAD").stdout.strip()
    assert weights.commit() == head
    code.write_text("changed")
    assert weights.commit() == f"{head}+"


def test_the_launch_file_of_skypilot_starts_the_run_on_every_node(tmp_path):
    task = yaml.safe_load((ROOT / "yamls/launch/skypilot.yaml").read_text())
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}
    given |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", **task["envs"], "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "composer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
    (tmp_path / "composer").chmod(0o755)
    said = subprocess.run(
        ["bash", "-euc", task["run"]], env=given, capture_output=True, text=True, check=True
    )
    words = said.stdout.splitlines()
    script = words.index("recipe/train.py")
    launcher = dict(zip(words[:script:2], words[1:script:2], strict=True))
    place = {"--world_size": "16", "--node_rank": "1", "--master_addr": "10.0.0.1", "--master_port": "29500"}
    assert launcher == {"-n": "8", **place}
    assert (ROOT / words[script + 1]).is_file() and "save_folder=s3://" in " ".join(words[script:])
    sky = pytest.importorskip("sky")  # its own parser, where it is installed
    parsed = sky.Task.from_yaml(str(ROOT / "yamls/launch/skypilot.yaml"))
    assert all(resources.use_spot for resources in parsed.resources)
