"""What pip installs: packages and YAMLs that work from any folder, and the version instead of a commit."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

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
