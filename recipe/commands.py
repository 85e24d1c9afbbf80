"""Commands as they can be pasted into the shell that shows them, and where the project's own files lie."""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALLED = Path(__file__).with_name("yamls")  # where setup.py puts the checkout's yamls/
YAMLS = INSTALLED if INSTALLED.is_dir() else ROOT / "yamls"


def short(path: Path) -> str:
    """Return the path relative to the current folder where it is below it, else the absolute one."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path.absolute())


def module(name: str, *words: str) -> str:
    """Return the command that runs a module of this project in this environment."""
    return shlex.join([short(Path(sys.executable)), "-m", name, *words])


def composer(script: str, *words: str) -> str:
    """Return the command that runs `recipe/train.py`, or another script, through Composer's launcher."""
    launcher = Path(sys.executable).with_name("composer")
    return shlex.join([short(launcher) if launcher.exists() else "composer", short(ROOT / script), *words])
