"""Requests to object stores, tried again while the failure may pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import botocore.exceptions
import oci.exceptions
import requests
import urllib3.exceptions

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 8
NETWORK_ERRORS = (
    ConnectionError,
    TimeoutError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    oci.exceptions.RequestException,
    oci.exceptions.ConnectTimeout,
)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status(error: BaseException) -> int | None:
    """HTTP status behind an error of any of the services' libraries."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = getattr(e, "status", None) or getattr(e, "code", None)
        if isinstance(code, int):
            return code
    return None


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: overload, server fault, or the network."""
    code = status(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    return any(isinstance(e, NETWORK_ERRORS) for e in _chain(error))


def explain(error: BaseException) -> str:
    """The root of a chain of errors says most."""
    root = list(_chain(error))[-1]
    return f"{type(root).__name__}: {' '.join(str(root).split())[:300]}"


def attempt(what: str, action: Callable[[], T], error_class: type[Exception]) -> T:
    """Runs `action`, again after 1, 2, 4, ... seconds while the failure may pass.

    Raises `error_class` with "cannot WHAT: the service's answer".
    """
    for number in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:  # each service has its own
            if number + 1 == ATTEMPTS or not transient(error):
                raise error_class(f"cannot {what}: {explain(error)}") from error
            log.warning("cannot %s yet (%s), trying again", what, explain(error))
            time.sleep(2**number)
    raise AssertionError("unreachable")
