"""What a setting may be, beside it: `lr: float = rule(1e-4, positive)`; `check(self)` in __post_init__.

A rule is checked where the configuration is made: a setting that breaks one never leaves __post_init__.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, NamedTuple

from omegaconf.errors import OmegaConfBaseException

Number = int | float  # in a union of types OmegaConf takes no integer for a float


class Rule(NamedTuple):
    """Whether a value may be used (an error of its type or value says no), and what to say if not."""

    holds: Callable[[Any], bool]
    says: str


LARGEST = sys.float_info.max
positive = Rule(lambda x: 0 < x <= LARGEST, "must be positive and finite")
not_negative = Rule(lambda x: 0 <= x <= LARGEST, "must be finite and not negative")
finite = Rule(math.isfinite, "must be finite")
share = Rule(lambda x: 0 <= x <= 1, "must be between 0 and 1")
below_one = Rule(lambda x: 0 <= x < 1, "must be in [0, 1)")
filled = Rule(lambda x: len(x) > 0, "must not be empty")
positive_time = Rule(
    re.compile(r"0*[1-9]\d{0,14}(ba|ep|sp|sec)").fullmatch, "is not a time such as 2400ba, 3ep or 600sec"
)
no_clock = Rule(lambda x: not x.endswith("sec"), "must be in ba, ep or sp, since schedules need its end")
time_or_zero = Rule(re.compile(r"\d{1,15}(ba|ep|sp|sec)").fullmatch, positive_time.says)


def _is_path(text: str) -> bool:
    longest = max(len(part.encode()) for part in text.split("/"))
    return text.isprintable() and 0 < len(text) < 4096 and longest < 256


local = Rule(lambda x: _is_path(x) and "://" not in x, "is not a local path")
place = Rule(
    lambda x: _is_path(x) and re.fullmatch("(s3|gs|oci)://[^/]+(/.*)?|((?!://).)+", x),
    "is neither a local path nor a place in s3://, gs://, oci://",
)
file_name = Rule(
    re.compile(r"\w[\w.-]{0,99}").fullmatch, "must be letters, digits, `_`, `-` and `.`, at most 100"
)


def whole(low: int, high: int) -> Rule:
    """An integer of a range, both ends included; the upper one keeps slips from filling a machine."""
    return Rule(lambda x: low <= x <= high, f"must be a whole number from {low} to {high}")


def one_of(*allowed: str) -> Rule:
    """A name among others."""
    return Rule(lambda x: x in allowed, f"is not one of {', '.join(allowed)}")


def each(one: Rule) -> Rule:
    """A list of such values, or an empty one."""
    return Rule(lambda values: all(map(one.holds, values)), one.says)


def rule(default: Any, *rules: Rule) -> Any:  # noqa: ANN401
    """A dataclass field with its rules, which None passes; dataclasses.MISSING: required."""
    how = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**how, metadata={"rules": rules})


def obeys(value: Any, one: Rule) -> bool:  # noqa: ANN401
    """Whether the rule holds; a value of a type that it cannot compare breaks it."""
    try:
        return bool(one.holds(value))
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return False


def check(settings: Any, section: str = "") -> None:  # noqa: ANN401
    """Raises ValueError with the key (below `section`), the value and the rule that it breaks."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        for one in f.metadata.get("rules", ()) if value is not None else ():
            if not obeys(value, one):
                raise ValueError(f"{section and section + '.'}{f.name}: {value!r} {one.says}")


def describe(error: OmegaConfBaseException) -> str:
    """One line with the key."""
    key = error.full_key or error.key
    reason = str(error.msg or error).splitlines()[0]
    return f"{key}: {reason}" if key else reason
