"""Files of one dataset folder, on a local disk or in a bucket, through Streaming's own transfer clients."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from streaming_convert.retry import attempt, status

WORK = ".parts"  # bookkeeping of an unfinished conversion, inside the dataset folder


class DatasetError(ValueError):
    """The input, the target or the request is wrong in a way that the user can mend; shown as one line."""


class Store:
    """Reads and publishes the files of the folder `uri`. One per process: clients do not survive a fork."""

    def __init__(self, uri: str, scratch: Path | None = None) -> None:
        """`scratch`: where to make the scratch folder; a worker's lies in its parent's, which deletes it."""
        self.uri = uri.rstrip("/")
        self.remote = "://" in uri
        self._scratch = scratch
        self._staging: Path | None = None
        self._uploader = None
        self._downloader = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = self._uploader = None

    @property
    def staging(self) -> Path:
        """A private scratch folder; for a local target on its own disk, so that a rename is atomic."""
        if self._staging is None:
            if not self.remote:
                Path(self.uri, WORK).mkdir(parents=True, exist_ok=True)
            folder = self._scratch or (None if self.remote else Path(self.uri, WORK))
            self._staging = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
        return self._staging

    def publish(self, name: str) -> None:
        """Moves the file `name` from the scratch folder to its place, where it is whole or not at all."""
        if self.remote:
            # A bucket shows an object only when it is complete.
            attempt(f"upload {self.uri}/{name}", lambda: self._client().upload_file(name), DatasetError)
            return
        source, target = self.staging / name, Path(self.uri, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        os.replace(source, target)

    def write(self, name: str, data: bytes) -> None:
        """Publishes `data` as the file `name`."""
        path = self.staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.publish(name)

    def fetch(self, name: str) -> Path:
        """Local path of the file `name`, downloaded to the scratch folder if it is remote."""
        if not self.remote:
            return Path(self.uri, name)
        path, source = self.staging / name, f"{self.uri}/{name}"
        try:
            attempt(f"read {source}", lambda: self._download(source, path), DatasetError)
        except DatasetError as error:  # every provider has its own for a missing object
            if status(error) == 404 or isinstance(error.__cause__, FileNotFoundError):
                raise FileNotFoundError(source) from error
            raise
        return path

    def _download(self, source: str, path: Path) -> None:
        from streaming.base.storage import CloudDownloader

        self._downloader = self._downloader or CloudDownloader.get(self.uri)
        self._downloader.download(source, str(path))

    def read(self, name: str) -> bytes:
        """Content of the file `name`; FileNotFoundError if there is none."""
        path = self.fetch(name)
        data = path.read_bytes()
        if self.remote:
            path.unlink()
        return data

    def names(self) -> set[str]:
        """Names of all files in the folder, relative to it."""
        if not self.remote:
            root = Path(self.uri)
            return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        prefix = (self.uri.split("://", 1)[1].partition("/")[2] + "/").lstrip("/")
        keys = attempt(f"list {self.uri}", lambda: self._client().list_objects(), DatasetError)
        return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}

    def _client(self):  # noqa: ANN202 (the class depends on the provider)
        from streaming.base.storage import CloudUploader

        if self._uploader is None:
            # It warns that the folder it uploads from is not empty, which is how this class uses it.
            logging.getLogger("streaming.base.storage.upload").setLevel(logging.ERROR)
            self._uploader = CloudUploader.get((str(self.staging), self.uri), exist_ok=True)
        return self._uploader
