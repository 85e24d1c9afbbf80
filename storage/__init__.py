"""Files of one folder, on a disk or in a bucket (s3://, gs://, oci://), through the services' own clients.

A request is repeated while its failure may be temporary; only a 404 means that a file does not exist. Clients
are imported when a bucket is first used, since loading them takes longer than many a command.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import botocore.exceptions
import urllib3.exceptions

from storage.outside import read_bytes

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 8
NETWORK_ERRORS = (  # every client's own network error has one of these as its cause
    ConnectionError,
    TimeoutError,
    urllib3.exceptions.HTTPError,
    botocore.exceptions.IncompleteReadError,
)
DISK_ERRORS = [os.strerror(e) for e in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EFBIG)]
DISK_ERRORS.append("PytorchStreamWriter failed writing file")  # all that torch.save says about a full disk
OCI_PART = 64 * 2**20  # bytes per request; one stream is slower than the network


class StorageError(OSError):
    """A file cannot be listed, read, written or deleted; the message names it and the service's answer."""


class MissingError(StorageError, FileNotFoundError):
    """The file or the bucket does not exist."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the failure of the disk under a local file into a StorageError that names the file.

    torch, safetensors and sharded checkpoints raise errors of their own, whose text holds the system's answer
    or a part of it. Any other error passes through unchanged.
    """
    try:
        yield
    except StorageError:
        raise
    except BaseException as error:  # a sharded checkpoint's is no Exception
        texts = [str(e) for e in _chain(error)]
        answers = [os.strerror(e.errno) for e in _chain(error) if isinstance(e, OSError) and e.errno]
        answers += [answer for answer in DISK_ERRORS if any(answer in text for text in texts)]
        if not answers:
            raise
        raise StorageError(f"cannot write {path}: {answers[0]}") from error


def normalize_uri(uri: str) -> str:
    """Return `uri` without trailing slashes. Raises ValueError for an unknown scheme."""
    if "://" in uri and uri.partition("://")[0] not in CLIENTS:
        known = ", ".join(f"{scheme}://" for scheme in CLIENTS)
        raise ValueError(f"{uri!r} is neither a local path nor one of {known}")
    return uri.rstrip("/")


class Folder:
    """The files under `uri`, named relative to it. Threads may share one, forked processes may not."""

    def __init__(self, uri: str) -> None:
        """Open `uri`. Raises ValueError for an unknown scheme, StorageError without usable credentials."""
        self.uri = normalize_uri(uri)
        self.remote = "://" in self.uri
        scheme, _, rest = self.uri.partition("://")
        bucket, _, path = rest.partition("/")
        self.prefix = f"{path}/" if path else ""
        client, where = (CLIENTS[scheme], bucket.partition("@")[0]) if self.remote else (Disk, self.uri)
        self._client = self._attempt("open", "", lambda: client(where))

    def names(self) -> list[str]:
        """List all files at any depth; none if the folder does not exist.

        Unfinished writes are left out, and names by which a copy would land outside its own folder.
        """
        keys = self._attempt("list", "", lambda: self._client.list(self.prefix))
        names = [key.removeprefix(self.prefix) for key in keys if not key.endswith((".tmp", "/"))]
        return [name for name in names if name[0] != "/" and ".." not in name.split("/")]

    def put(self, name: str, source: Path) -> None:
        """Copy the local file `source` to `name` in this folder; it appears whole or not at all."""
        self._attempt("write", name, lambda: self._client.put(self.prefix + name, str(source)))

    def get(self, name: str, target: Path) -> None:
        """Copy the file `name` to the local path `target`. Raises MissingError if it does not exist."""
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._attempt("read", name, lambda: self._client.get(self.prefix + name, f"{target}.tmp"))
            os.replace(f"{target}.tmp", target)

    def write(self, name: str, content: bytes) -> None:
        """Write `content` as the file `name`, whole or not at all."""
        with writing(tempfile.gettempdir()), tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch, "file")
            source.write_bytes(content)
            self.put(name, source)

    def read(self, name: str, limit: int = 2**32) -> bytes:
        """Return the content of the file `name`.

        Raises MissingError if it does not exist, StorageError if it has more than `limit` bytes.
        """
        if not self.remote:
            return self._attempt("read", name, lambda: read_bytes(Path(self.uri, name), limit))
        with writing(tempfile.gettempdir()), tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch, "file")
            self.get(name, target)
            return self._attempt("read", name, lambda: read_bytes(target, limit))

    def delete(self, name: str) -> None:
        """Delete the file `name`; a file that does not exist is no error."""
        with suppress(MissingError):
            self._attempt("delete", name, lambda: self._client.delete(self.prefix + name))

    def _attempt(self, verb: str, name: str, action: Callable[[], T]) -> T:
        return attempt(f"{verb} {self.uri}/{name}".rstrip("/"), action)


class Folders(dict[str, Folder]):
    """Folders by their URIs, each opened when it is first asked for, once. Threads may share them."""

    def __missing__(self, uri: str) -> Folder:
        self[uri] = folder = Folder(uri)
        return folder


class Client(Protocol):
    """The access to one place by names of files below it; every method may raise any error."""

    def list(self, prefix: str) -> list[str]:
        """Return the names of all files that begin with `prefix`."""

    def put(self, key: str, source: str) -> None:
        """Copy the local file `source` to the file `key`."""

    def get(self, key: str, target: str) -> None:
        """Copy the file `key` to the local path `target`."""

    def delete(self, key: str) -> None:
        """Delete the file `key`."""


class Disk(Client):
    """A local folder."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def list(self, prefix: str) -> list[str]:
        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        files = (Path(at, name) for at, _, names in os.walk(self.root, onerror=fail) for name in names)
        return [path.relative_to(self.root).as_posix() for path in files]

    def put(self, key: str, source: str) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as old, open(f"{target}.tmp", "wb") as new:
            shutil.copyfileobj(old, new)
            os.fsync(new.fileno())
        os.replace(f"{target}.tmp", target)

    def get(self, key: str, target: str) -> None:
        shutil.copyfile(self.root / key, target)

    def delete(self, key: str) -> None:
        (self.root / key).unlink()


class S3(Client):
    """A bucket of S3 or of a service with the same protocol; `options` go to boto3's client."""

    def __init__(self, bucket: str, **options: str) -> None:
        import boto3
        from botocore.config import Config

        options.setdefault("endpoint_url", os.environ.get("S3_ENDPOINT_URL"))
        retries = Config(retries={"mode": "adaptive"})
        self.bucket, self.client = bucket, boto3.Session().client("s3", config=retries, **options)

    def list(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def put(self, key: str, source: str) -> None:
        acl = {"ACL": os.environ["S3_CANNED_ACL"]} if "S3_CANNED_ACL" in os.environ else None
        self.client.upload_file(source, self.bucket, key, ExtraArgs=acl)

    def get(self, key: str, target: str) -> None:
        self.client.download_file(self.bucket, key, target)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)


class GCS(Client):
    """A bucket of Google Cloud Storage, opened with the default credentials."""

    def __init__(self, bucket: str) -> None:
        from google.cloud.storage import Client

        self.bucket = Client(project=None).bucket(bucket)

    def list(self, prefix: str) -> list[str]:
        return [blob.name for blob in self.bucket.list_blobs(prefix=prefix)]

    def put(self, key: str, source: str) -> None:
        self.bucket.blob(key).upload_from_filename(source)

    def get(self, key: str, target: str) -> None:
        self.bucket.blob(key).download_to_filename(target)

    def delete(self, key: str) -> None:
        self.bucket.blob(key).delete()


def google(bucket: str) -> GCS | S3:
    """Open a bucket of Google Cloud Storage, by S3's protocol if GCS_KEY and GCS_SECRET hold an HMAC key."""
    if not {"GCS_KEY", "GCS_SECRET"} <= os.environ.keys():
        return GCS(bucket)
    login = {"aws_access_key_id": os.environ["GCS_KEY"], "aws_secret_access_key": os.environ["GCS_SECRET"]}
    return S3(bucket, region_name="auto", endpoint_url="https://storage.googleapis.com", **login)


class OCI(Client):
    """A bucket of Oracle's object storage, in the namespace of the account."""

    def __init__(self, bucket: str) -> None:
        import oci

        config = oci.config.from_file(os.environ.get("OCI_CONFIG_FILE", oci.config.DEFAULT_LOCATION))
        again = oci.retry.DEFAULT_RETRY_STRATEGY
        self.sdk, self.client = oci, oci.object_storage.ObjectStorageClient(config, retry_strategy=again)
        self.place = self.client.get_namespace().data, bucket

    def list(self, prefix: str) -> list[str]:
        every = self.sdk.pagination.list_call_get_all_results
        found = every(self.client.list_objects, *self.place, prefix=prefix)
        return [item.name for item in found.data.objects]

    def put(self, key: str, source: str) -> None:
        self.sdk.object_storage.UploadManager(self.client).upload_file(*self.place, key, source)

    def get(self, key: str, target: str) -> None:
        def fetch(start: int) -> None:
            part = f"bytes={start}-{start + OCI_PART - 1}"
            content = self.client.get_object(*self.place, key, range=part).data.content
            with open(target, "r+b") as file:
                file.seek(start)
                file.write(content)

        size = int(self.client.head_object(*self.place, key).headers["content-length"])
        Path(target).write_bytes(b"")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fetch, range(0, size, OCI_PART)))

    def delete(self, key: str) -> None:
        self.client.delete_object(*self.place, key)


CLIENTS = {"s3": S3, "gs": google, "oci": OCI}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, "last_exception", None) or error.__context__


def status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of any of the clients, or None."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = getattr(e, "status", None) or getattr(e, "code", None)
        if isinstance(code, int):
            return code
    return None


def transient(error: BaseException) -> bool:
    """Return True if the same request may succeed later: overload, server fault, or a network error."""
    code = status(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    return any(isinstance(e, NETWORK_ERRORS) for e in _chain(error))


def attempt(what: str, action: Callable[[], T], error_class: type[Exception] = StorageError) -> T:
    """Return the result of `action`, repeated after 1, 2, 4, ... seconds while its failure may be temporary.

    Raises `error_class`, or MissingError, with the message "cannot WHAT: the service's answer".
    """
    for number in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:  # each service has errors of its own
            cause = list(_chain(error))[-1]  # the first cause says most
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
            if error_class is StorageError and (isinstance(error, FileNotFoundError) or status(error) == 404):
                raise MissingError(f"cannot {what}: {reason}") from error
            if number + 1 == ATTEMPTS or not transient(error):
                raise error_class(f"cannot {what}: {reason}") from error
            log.warning("cannot %s yet (%s), trying again", what, reason)
            time.sleep(2**number)
    raise AssertionError("unreachable")
