"""Files under one folder, local or in a bucket: s3://, gs://, oci://, through Composer's own clients.

One spelling of a URI serves data and checkpoints. Composer's clients lack deletion, read a 403 as "not
found" and mostly do not retry; what is missing is here, and nothing else.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from composer.utils import maybe_create_object_store_from_uri, parse_uri

from streaming_convert.retry import attempt, status

T = TypeVar("T")

SCHEMES = ("s3", "gs", "oci")


class StorageError(RuntimeError):
    """A file that cannot be listed, read, written or deleted; names it and the service's answer."""


def normalize_uri(uri: str) -> str:
    """The spelling that both libraries take: no trailing slash, a known scheme. Raises ValueError."""
    if "://" in uri and parse_uri(uri)[0] not in SCHEMES:
        raise ValueError(
            f"{uri!r} is neither a local path nor one of {', '.join(s + '://' for s in SCHEMES)}"
        )
    return uri.rstrip("/")


class Folder:
    """The files under `uri`, named relative to it. Safe to use from several threads, not across a fork."""

    def __init__(self, uri: str) -> None:
        """Raises StorageError where there are no usable credentials."""
        self.uri = normalize_uri(uri)
        self.remote = "://" in self.uri
        if self.remote:
            path = parse_uri(self.uri)[2].strip("/")
            self.prefix = f"{path}/" if path else ""
            self.store = self._attempt("open", "", lambda: maybe_create_object_store_from_uri(self.uri))

    def names(self) -> list[str]:
        """All files, at any depth; none for a folder that does not exist, and none halfway through `put`."""
        if self.remote:
            keys = self._attempt("list", "", lambda: self.store.list_objects(self.prefix))
            return [key.removeprefix(self.prefix) for key in keys]
        root = Path(self.uri)

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise StorageError(f"cannot list {self.uri}: {error}") from error

        return [
            Path(folder, name).relative_to(root).as_posix()
            for folder, _, names in os.walk(root, onerror=fail)
            for name in names
            if not name.endswith(".tmp")
        ]

    def put(self, name: str, source: Path) -> None:
        """Copies the local file `source` here; it appears whole or not at all."""
        if self.remote:
            key = self.prefix + name
            self._attempt("write", name, lambda: self.store.upload_object(key, str(source)))
            return
        target = Path(self.uri, name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, f"{target}.tmp")
            os.replace(f"{target}.tmp", target)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error}") from error

    def get(self, name: str, target: Path) -> None:
        """Copies a file from here to the local path `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.remote:
            key = self.prefix + name
            self._attempt(
                "read", name, lambda: self.store.download_object(key, str(target.absolute()), overwrite=True)
            )
            return
        try:
            shutil.copyfile(Path(self.uri, name), target)
        except OSError as error:
            raise StorageError(f"cannot read {self.uri}/{name}: {error}") from error

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch, "file")
            source.write_bytes(content)
            self.put(name, source)

    def read(self, name: str) -> bytes:
        """Content of a small file."""
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch, "file")
            self.get(name, target)
            return target.read_bytes()

    def delete(self, name: str) -> None:
        """Removes a file; no error if it is gone already."""
        if self.remote:
            self._attempt("delete", name, lambda: self._delete_object(self.prefix + name))
        else:
            Path(self.uri, name).unlink(missing_ok=True)

    def _delete_object(self, key: str) -> None:
        """Composer has no call for it; each service's own client does."""
        scheme = parse_uri(self.uri)[0]
        store = getattr(self.store, "s3_object_store", None) or self.store  # gs:// with an HMAC key
        try:
            if scheme == "oci":
                store.client.delete_object(store.namespace, store.bucket, key)
            elif hasattr(store, "use_gcs_sdk"):
                store.bucket.blob(key).delete()
            else:
                store.client.delete_object(Bucket=store.bucket, Key=key)
        except Exception as error:
            if status(error) != 404:
                raise

    def _attempt(self, verb: str, name: str, action: Callable[[], T]) -> T:
        return attempt(f"{verb} {self.uri}/{name}".rstrip("/"), action, StorageError)
