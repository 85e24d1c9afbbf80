"""Objectives by name. To add one: its file, and its line here (docs/objectives.md)."""

from typing import Any

from recipe.objectives.base import Objective
from recipe.objectives.flow_matching import FlowMatching
from recipe.objectives.frechet import Frechet
from recipe.objectives.imf import IMF
from recipe.objectives.meanflow import MeanFlow
from recipe.objectives.tvm import TVM
from recipe.settings import ConfigError, make, one_of

OBJECTIVES: dict[str, type[Objective]] = {
    "tvm": TVM,
    "flow_matching": FlowMatching,
    "meanflow": MeanFlow,
    "imf": IMF,
    "frechet": Frechet,
}


AnyObjective = one_of("name", TVM.name, OBJECTIVES)


def from_facts(method: dict[str, Any]) -> Objective:
    """Return the objective of weights, from the `method` of their description. Raises ConfigError."""
    name = method.get("objective")
    known = [name for name, objective in OBJECTIVES.items() if not objective.finishes]
    if name not in known:
        raise ConfigError(f"method.objective: {name!r} is not one of {', '.join(known)}")
    settings = {"name" if key == "objective" else key: value for key, value in method.items()}
    return make(AnyObjective, settings, "method")
