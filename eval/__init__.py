"""Sampling, scores, exports and imports of trained weights."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter


def command_line(module: str, about: str) -> ArgumentParser:
    """Return the parser of `python -m MODULE`, whose help shows the module's docstring as it stands."""
    how = {"prog": f"python -m {module}", "description": about}
    return ArgumentParser(**how, formatter_class=RawDescriptionHelpFormatter)
