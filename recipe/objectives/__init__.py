"""Objectives by name. To add one: its file, and its line here (docs/objectives.md)."""

from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Discriminator, Tag

from recipe.objectives.base import Objective
from recipe.objectives.flow_matching import FlowMatching
from recipe.objectives.frechet import Frechet
from recipe.objectives.imf import IMF
from recipe.objectives.meanflow import MeanFlow
from recipe.objectives.tvm import TVM
from recipe.settings import ConfigError, make

OBJECTIVES: dict[str, type[Objective]] = {
    "tvm": TVM,
    "flow_matching": FlowMatching,
    "meanflow": MeanFlow,
    "imf": IMF,
    "frechet": Frechet,
}


def name_of(given: Any) -> str | None:  # noqa: ANN401
    """Return the name of an objective, or of the settings of one, which is TVM without a name; else None."""
    return given.get("name", TVM.name) if isinstance(given, dict) else getattr(given, "name", None)


def refuse_others(given: Any) -> Any:  # noqa: ANN401
    """Raise ConfigError for an unknown name, and for a setting of another objective, saying whose it is."""
    name = name_of(given)
    if isinstance(given, dict) and name not in OBJECTIVES:
        raise ConfigError(f"name: {name!r} is not one of {', '.join(OBJECTIVES)}")
    for key in given if isinstance(given, dict) else ():
        owners = [other for other, cls in OBJECTIVES.items() if key in cls.__dataclass_fields__]
        if owners and name not in owners:
            raise ConfigError(f"{key}: a setting of {', '.join(owners)}, not of {name}")
    return given


AnyObjective = Annotated[
    Union[tuple(Annotated[cls, Tag(name)] for name, cls in OBJECTIVES.items())],  # noqa: UP007
    Discriminator(name_of),
    BeforeValidator(refuse_others),
]


def from_facts(method: dict[str, Any]) -> Objective:
    """Return the objective of weights, from the `method` of their description. Raises ConfigError."""
    name = method.get("objective")
    known = [name for name, objective in OBJECTIVES.items() if not objective.finishes]
    if name not in known:
        raise ConfigError(f"method.objective: {name!r} is not one of {', '.join(known)}")
    settings = {"name" if key == "objective" else key: value for key, value in method.items()}
    return make(AnyObjective, settings, "method")
