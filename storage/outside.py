"""JSON from outside: read within bounds, with one line per fault that names the file and the key.

What another program or person may have written is read by `parse_json` and checked by `conform`. Nothing is
executed, resolved or looked up on behalf of a file.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

LARGEST = 2**28  # bytes of a file: an index of half a million shards, the labels of five million files
INTEGER = 2**63  # what int64 holds
adapter = cache(TypeAdapter)  # making one takes milliseconds
ESCAPE = re.compile(rb"\\(?:u[dD][89a-fA-F]..|.)", re.DOTALL)


class DatasetError(ValueError):
    """The input, the target or the request is wrong in a way that the user can fix; shown as one line."""


class OutsideError(DatasetError):
    """A file from outside is invalid; the message names the file."""


def read_bytes(path: str | Path, limit: int = LARGEST) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises OSError, OutsideError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):  # a pipe, or a device that never ends
            raise OutsideError(f"{path} is not a regular file")
        if about.st_size > limit:
            raise OutsideError(f"{path} has more than {limit} bytes")
        return file.read()  # file.read(limit) would allocate so much first


def file_digest(path: Path, digest: Any) -> str:  # noqa: ANN401
    """Return the hexadecimal digest of a file of any size; `digest` is a new object of hashlib or xxhash."""
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: str | bytes, where: str, nan: bool = False) -> Any:  # noqa: ANN401
    """Return the value of a JSON text that comes from `where`. Raises OutsideError.

    Refused are texts of more than LARGEST bytes, nesting of more than 200 levels, integers beyond 64 bits
    and, unless `nan`, numbers that are not finite.
    """
    text = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if len(text) > LARGEST:
        raise OutsideError(f"{where} has more than {LARGEST} bytes")
    try:
        whole = without_halves(text)
        value = from_json(whole, allow_inf_nan=nan)
        value = value if whole == text else json.loads(text)
    except ValueError as error:
        raise OutsideError(f"{where} is not JSON: {error}") from error
    _check_numbers(value, where, nan)
    return value


def without_halves(text: bytes) -> bytes:
    """Replace escaped surrogates, which Python writes for file names that are not UTF-8, by U+FFFD."""
    return ESCAPE.sub(lambda found: rb"\ufffd" if len(found[0]) == 6 else found[0], text)


def read_json(path: str | Path, nan: bool = False) -> Any:  # noqa: ANN401
    """Return the value of a local JSON file (see `parse_json`). Raises OSError, OutsideError."""
    return parse_json(read_bytes(path), str(path), nan)


def _check_numbers(value: Any, where: str, nan: bool) -> None:  # noqa: ANN401
    """Raise OutsideError for an integer beyond 64 bits and, unless `nan`, for a number like 1e999."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, int) and not -INTEGER <= item < INTEGER:
            raise OutsideError(f"{where} holds an integer of {len(str(abs(item)))} digits")
        elif isinstance(item, float) and not nan and not math.isfinite(item):
            raise OutsideError(f"{where} holds a number beyond the range of a float")


def conform(kind: type, text: bytes, where: str) -> Any:  # noqa: ANN401
    """Return the value of a JSON text from `where` that describes a `kind`. Raises OutsideError."""
    value = parse_json(text, where)
    check_kind(kind, text, where)
    return value


def check_kind(kind: type, text: bytes, where: str) -> None:
    """Check by pydantic's rules that a JSON text, which `parse_json` has accepted, describes a `kind`.

    Raises OutsideError with the first key that is wrong, what it is, and what is allowed.
    """
    try:
        adapter(kind).validate_json(without_halves(text))
    except ValidationError as error:
        raise OutsideError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """Return the first fault in one line: `input.samples: -3: input should be greater than or equal to 0`."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ascii(".".join(map(str, first["loc"])) or "the whole")[1:-1][:100]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: {reason.lower()}"
    return f"{key}: {short(first['input'])}: {reason[:1].lower()}{reason[1:]}"


def short(value: object) -> str:
    """Return a value as JSON in at most 100 ASCII characters, for a message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 100 else text[:97] + "..."
