"""Objectives by name. To add one: its file, and its line here (docs/objectives.md)."""

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.objectives.base import Objective
from recipe.objectives.flow_matching import FlowMatching
from recipe.objectives.imf import IMF
from recipe.objectives.meanflow import MeanFlow
from recipe.objectives.tvm import TVM
from recipe.rules import describe

OBJECTIVES: dict[str, type[Objective]] = {
    "tvm": TVM,
    "flow_matching": FlowMatching,
    "meanflow": MeanFlow,
    "imf": IMF,
}


def from_facts(method: dict[str, Any]) -> Objective:
    """The objective of weights, from the `method` of their description. Raises ValueError."""
    name = method.get("objective")
    if name not in OBJECTIVES:
        raise ValueError(f"method.objective: {name!r} is not one of {', '.join(OBJECTIVES)}")
    settings = {key: value for key, value in method.items() if key != "objective"}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OBJECTIVES[name]), settings))
    except OmegaConfBaseException as error:
        raise ValueError(f"method.{describe(error)}") from error
