"""Objectives by name. To add one: its file, and its line here (docs/objectives.md)."""

from typing import Any

from recipe.objectives.base import Objective
from recipe.objectives.flow_matching import FlowMatching
from recipe.objectives.imf import IMF
from recipe.objectives.meanflow import MeanFlow
from recipe.objectives.tvm import TVM

OBJECTIVES: dict[str, type[Objective]] = {
    "tvm": TVM,
    "flow_matching": FlowMatching,
    "meanflow": MeanFlow,
    "imf": IMF,
}


def from_facts(method: dict[str, Any]) -> Objective:
    """The objective of weights, from the `method` of their description. Raises ValueError."""
    settings = dict(method)
    name = settings.pop("objective", None)
    if name not in OBJECTIVES:
        raise ValueError(f"method.objective: {name!r} is not one of {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[name](**settings)
    except TypeError as error:
        raise ValueError(f"method: {error}") from error
