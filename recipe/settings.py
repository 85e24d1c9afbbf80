"""Settings: pydantic dataclasses whose fields hold their type, their bounds and one sentence of meaning.

    lr: Positive = Field(1e-4, description="Learning rate after the warm-up.")

Values are taken as they are written ("1" is no number, true is no number; an integer may stand for a float),
unknown keys are refused, and what breaks a rule is a ConfigError of one line: key, value, what is allowed.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from functools import reduce
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, CoreSchema, core_schema

from storage import normalize_uri

T = TypeVar("T")
MISSING = "???"  # what OmegaConf writes for a key that must be given
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ConfigError(ValueError):
    """A setting that cannot be: the message names the key, what it was and what is allowed.

    Raised by a validator of a section, it begins with a key of that section.
    """


LIMITS = {"ge": "at least", "minimum": "at least", "gt": "more than", "exclusiveMinimum": "more than"}
LIMITS |= {"le": "at most", "maximum": "at most", "lt": "less than", "exclusiveMaximum": "less than"}
NUMBERS = {"int": "whole number", "float": "number"}


def limits(schema: dict[str, Any]) -> str:
    """Return the bounds of a number in words, from pydantic's names for them or from those of JSON Schema."""
    found = {word: f"{schema[name]:.10g}" for name, word in LIMITS.items() if name in schema}
    if found.keys() == {"at least", "at most"}:
        return f"from {found['at least']} to {found['at most']}"
    return " and ".join(f"{word} {number}" for word, number in found.items())


def say_ranges(schema: Any) -> Any:
    """Return pydantic's schema with errors that say both bounds of a number that has two, not the broken one.

    What has its own error already, by Says or as part of an inner section, keeps it.
    """
    if isinstance(schema, list | tuple):
        return type(schema)(map(say_ranges, schema))
    if not isinstance(schema, dict) or schema.get("type") == "custom-error":
        return schema
    if schema.get("type") in NUMBERS and len(schema.keys() & LIMITS.keys()) == 2:
        text = f"must be a {NUMBERS[schema['type']]} {limits(schema)}"
        return core_schema.custom_error_schema(schema, "rule", custom_error_message=text)
    return {key: say_ranges(value) for key, value in schema.items()}


@dataclass(config=STRICT)
class Settings:
    """Base of all sections. A nested section may be given as an instance or as a dictionary of its keys."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Take dictionaries for sections, which strictness would refuse; their values stay strict."""
        schema = inner = say_ranges(handler.resolve_ref_schema(handler(source)))
        while inner["type"] != "dataclass":
            inner = inner["schema"]
        inner["strict"] = False
        return schema

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown(cls, given: Any) -> Any:
        """Raise ConfigError for a key that is no field, with the field that was probably meant."""
        given_keys = given.kwargs if isinstance(given, ArgsKwargs) else given
        for key in given_keys if isinstance(given_keys, dict) else ():
            if key not in cls.__pydantic_fields__:
                shown = str(key) if str(key).isprintable() else ascii(key)  # a file's key may be two lines
                raise ConfigError(f"{shown}: is not a setting; {suggestion(cls, str(key))}")
        return given


def suggestion(section: type[Settings], key: str) -> str:
    """Return what to say of an unknown key: the setting that was probably meant, or all of the section."""
    known = {name.rpartition(".")[2]: name for name in reversed(list(setting_keys(section)))}
    if close := get_close_matches(key, known, 1):
        return f"did you mean {known[close[0]]}?"
    return f"only {', '.join(section.__pydantic_fields__)} are"


def sections(annotation: Any) -> Iterator[type[Settings]]:
    """Yield the settings classes in an annotation: one of a section, several of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def setting_keys(section: type[Settings]) -> Iterator[str]:
    """Yield the keys of a section and, dotted, those of the sections in it."""
    for name, field in section.__pydantic_fields__.items():
        yield name
        for nested in sections(field.annotation):
            yield from (f"{name}.{key}" for key in setting_keys(nested))


def one_of(key: str, default: str, choices: dict[str, type[Settings]]) -> Any:
    """Return the type of a section that is one of several, chosen by its `key`, without it by `default`."""

    def chosen(given: Any) -> str | None:
        return given.get(key, default) if isinstance(given, dict) else getattr(given, key, None)

    def refuse_others(given: Any) -> Any:
        """Raise ConfigError for an unknown name, and for a setting of another choice, saying whose it is."""
        name = chosen(given)
        if isinstance(given, dict) and not (isinstance(name, str) and name in choices):
            raise ConfigError(f"{key}: {name!r} is not one of {', '.join(choices)}")
        for one in given if isinstance(given, dict) else ():
            owners = [other for other, section in choices.items() if one in section.__pydantic_fields__]
            if owners and name not in owners:
                raise ConfigError(f"{one}: a setting of {', '.join(owners)}, not of {name}")
        return given

    union = Union[tuple(Annotated[section, Tag(name)] for name, section in choices.items())]  # noqa: UP007
    return Annotated[union, Discriminator(chosen), BeforeValidator(refuse_others)]


def defaults(section: type[Settings]) -> dict[str, Any]:
    """Return the default values of a section as plain containers; MISSING for fields that must be given."""
    given = {
        name: MISSING if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in section.__pydantic_fields__.items()
    }
    return {name: asdict(value) if is_dataclass(value) else value for name, value in given.items()}


# ---------------------------------------------------------------- types that settings share


class Says(NamedTuple):
    """What is said, instead of pydantic's words, of a value that a type refuses: `must be ...`."""

    text: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Replace every error of the type by the text."""
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="rule", custom_error_message=self.text
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict:
        """Add the text where editors look for it."""
        return {**handler(schema), "errorMessage": self.text}


class OneOrMore:
    """A list that may be given as its only value, without brackets."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Put a value that is no container into a list."""
        return core_schema.no_info_before_validator_function(as_list, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict:
        """Return the list, or what it may hold."""
        listed = handler(schema)
        return {"anyOf": [listed, listed["items"]]}


def as_list(value: Any) -> Any:
    """Return a value that is neither None nor a container, in a list."""
    return value if value is None or isinstance(value, list | dict | tuple) else [value]


def as_text(value: Any) -> Any:
    """Return a whole number as text, since YAML reads a run or a folder called 2026 as a number."""
    return str(value) if type(value) is int else value


def as_switch(value: Any) -> Any:
    """Return `off`, which YAML reads as false, as text."""
    return "off" if value is False else value


def printable(text: str) -> str:
    """Return a path that a file system can hold. Raises ValueError for any other."""
    longest = max(len(part.encode()) for part in text.split("/"))
    if not (text.isprintable() and 0 < len(text) < 4096 and longest < 256):
        raise ValueError
    return text


def without_scheme(path: str) -> str:
    """Return a path without a scheme such as s3://. Raises ValueError for any other."""
    if "://" in path:
        raise ValueError
    return path


def ordered(pair: list[float]) -> list[float]:
    """Return two numbers of which the first is not the larger. Raises ValueError."""
    if pair[0] > pair[1]:
        raise ValueError
    return pair


Number = int | float  # kept as written, where float makes a float of an integer
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Many = Annotated[list[T], OneOrMore()]
Filled = Annotated[list[T], Field(min_length=1), OneOrMore()]

Interval = Annotated[
    list[Share],
    Field(min_length=2, max_length=2),
    AfterValidator(ordered),
    Says("must be two times [t_min, t_max] with 0 <= t_min <= t_max <= 1"),
]

SOME = "0*[1-9][0-9]{0,14}"
Time = Annotated[
    str, Field(pattern=f"^{SOME}(ba|ep|sp|sec)$"), Says("must be a time such as 2400ba, 3ep or 600sec")
]
Duration = Annotated[
    str,
    Field(pattern=f"^{SOME}(ba|ep|sp)$"),
    Says("must be a time in ba, ep or sp such as 2400ba, since schedules need its end"),
]
DurationOrZero = Annotated[
    str,
    Field(pattern="^[0-9]{1,15}(ba|ep|sp)$"),
    Says("must be a time in ba, ep or sp such as 100ba or 0ba, since schedules need its end"),
]
Seconds = Annotated[
    str, Field(pattern="^[0-9]{1,15}sec$"), Says("must be a time in seconds such as 86000sec")
]
NumberAsText = BeforeValidator(as_text, json_schema_input_type=str | int)
LocalPath = Annotated[
    str,
    AfterValidator(printable),
    AfterValidator(without_scheme),
    NumberAsText,
    Says("must be a local path"),
]
Place = Annotated[
    str,
    AfterValidator(printable),
    AfterValidator(normalize_uri),
    NumberAsText,
    Says("must be a local path or a place in s3://, gs://, oci://"),
]
Word = Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}$")]
FileName = Annotated[
    Word,
    BeforeValidator(as_text, json_schema_input_type=Word | int),
    Says("must be letters, digits, `_`, `-` and `.`, at most 100, the first neither `-` nor `.`"),
]
Wandb = Annotated[Literal["off", "online", "offline"], BeforeValidator(as_switch)]


# ---------------------------------------------------------------- from plain containers to settings


PLAINER = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid ": "a ",
}


def make(section: type[T], values: Any, where: str = "") -> T:
    """Make the settings that plain containers describe. Raises ConfigError, its key below `where`."""
    try:
        return TypeAdapter(section).validate_python(values)
    except ValidationError as error:
        raise ConfigError(explain(error, values, where)) from error


def explain(error: ValidationError, values: Any, where: str = "") -> str:
    """Return the first of the errors in `values` as one line: key, value, what is allowed."""
    found = error.errors(include_url=False)
    key = dotted(found[0]["loc"], values, found[0]["type"] == "missing", where)
    cause = found[0].get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return f"{key}.{cause}" if key else str(cause)
    if found[0]["type"] == "missing":
        return f"{key}: must be given"
    same = [e for e in found if dotted(e["loc"], values, False, where) == key]
    reasons = " or ".join(dict.fromkeys(map(reason, same)))
    return f"{key}: {brief(found[0]['input'])} {reasons}"


def dotted(loc: tuple[int | str, ...], values: Any, missing: bool, where: str) -> str:
    """Return the key at `loc` of `values`, a.b[0], without what pydantic puts between for unions."""
    key, here = where, values
    for part in loc[:-1] if missing else loc:
        if isinstance(here, dict) and part in here:
            key, here = f"{key}.{part}" if key else str(part), here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            key, here = f"{key}[{part}]", here[part]
    return (f"{key}.{loc[-1]}" if key else str(loc[-1])) if missing else key


def reason(error: Any) -> str:
    """Return what a setting may be, as `must ...`."""
    if error["type"] in ("dataclass_type", "dict_type", "union_tag_not_found"):
        return "must be a mapping of keys to values"
    text = re.sub(r"^\w+ (error, )?should ", "must ", error["msg"])
    return reduce(lambda words, ours: words.replace(*ours), PLAINER.items(), text)


def brief(value: Any) -> str:
    """Return a value as it is shown in an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
