"""Class labels of files, from their folders or from a label file, and their numbers 0..K-1."""

import csv
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np

from storage import outside
from storage.manifest import DatasetError

LABEL_FILES = ("labels.csv", "labels.json", "dataset.json")
MANY, TOO_MANY = 100, 10_000  # classes that nobody has named: doubtful, and refused
MAX_CLASSES = 2**20  # limit for labels that are numbers; a larger one is a mistake


def hidden(name: str) -> bool:
    """Return True for names of files and folders to ignore: .DS_Store, and what macOS adds to a ZIP."""
    return name.startswith(".") or name == "__MACOSX"


def from_folders(folder: str, keys: list[str], allow_empty: bool = False) -> tuple[list[str], list[str]]:
    """Return the class of each file, that is its first folder, and all classes in the order of their numbers.

    Raises DatasetError for a file outside a class folder, and for a class without files unless `allow_empty`.
    """
    loose = [key for key in keys if "/" not in key]
    if loose:
        raise DatasetError(
            f"{folder}: no class folder and no label file says what {loose[0]} is; "
            f"add one of {', '.join(LABEL_FILES)}, or pass --labels FILE or --unlabelled"
        )
    found = [key.split("/")[0] for key in keys]
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir() and not hidden(path.name))
    empty = sorted(set(names) - set(found))
    if empty and not allow_empty:
        raise DatasetError(f"{folder}: the class folder {empty[0]!r} holds no images; --allow-empty keeps it")
    return found, names


def from_file(path: str, keys: list[str]) -> list[str | int]:
    """Return the label of each of the files `keys` from a CSV or JSON file, where names may lack a suffix."""
    text = read_text(path)
    rows = parse_json(text, path) if path.endswith(".json") else parse_csv(text, path)
    if rows is None:
        raise DatasetError(f"{path} holds no labels; pass --unlabelled to convert without")
    return match(rows, keys, path)


def match(rows: dict[str, str | int], keys: list[str], path: str) -> list[str | int]:
    """Return the label of each key. Raises DatasetError with the first key that has none."""
    found = [rows.get(key, rows.get(key.rpartition(".")[0])) for key in keys]
    missing = [key for key, label in zip(keys, found, strict=True) if label is None]
    if missing:
        raise DatasetError(f"{path} has no label for {missing[0]} ({len(missing)} files in all)")
    return found


def parse_json(text: str | bytes, path: str) -> dict[str, str | int] | None:
    """Parse {"labels": [[file, label], ...]} into {file: label}, or None if it is {"labels": null}."""
    content = outside.parse_json(text, path)
    try:
        rows = content["labels"]
        return None if rows is None else {name.replace("\\", "/"): label for name, label in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"labels": [["file", label], ...]}'
        raise DatasetError(f"{path} is not of the form {form}: {error!r}") from error


def parse_csv(text: str, path: str) -> dict[str, str | int]:
    """Parse rows `file,label`, or ImageNet's LOC_val_solution.csv, into {file: label}."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), strict=True) if row]
    except csv.Error as error:
        raise DatasetError(f"{path} is not a CSV file: {error}") from error
    short = [row for row in rows if len(row) < 2 or not row[1]]
    if short:
        raise DatasetError(f"{path}: a row has no class: {','.join(short[0])}")
    if rows and rows[0][:2] == ["ImageId", "PredictionString"]:  # the class, then boxes
        return {name: text.split()[0] for name, text, *_ in rows[1:]}
    return {name: int(label) if label.isdecimal() else label for name, label, *_ in rows}


def read_classes(path: str) -> list[str]:
    """Read class names, one per line, in label order; after an ImageNet synset its title may follow."""
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if all(re.match(r"n\d{8}\b", name) for name in names):
        names = [name.split()[0] for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DatasetError(f"{path} names the class {twice[0]!r} twice")
    if not names:
        raise DatasetError(f"{path} names no classes")
    return names


def number(labels: list[str | int], names: list[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Return the labels as int64 in 0..K-1, and the K class names: `names`, or the sorted labels.

    Whole numbers stay as they are, names become their positions. Raises DatasetError for an unknown label.
    """
    kinds = {type(label) for label in labels}
    if kinds == {int, str} and names:
        labels, kinds = list(map(str, labels)), {str}
    if kinds == {int}:
        names = names or [str(i) for i in range(min(max(labels) + 1, MAX_CLASSES))]
        wrong = [label for label in labels if not 0 <= label < len(names)]
        if wrong:
            raise DatasetError(f"label {wrong[0]} is not in 0..{len(names) - 1}")
        return np.array(labels, np.int64), names
    if kinds != {str}:
        found = " and ".join(sorted(map(repr, {type(label): label for label in labels}.values())))
        raise DatasetError(
            f"labels must be all whole numbers or all names, found {found}. Fix: list all classes by their "
            "names, numbers among them, one a line, in --classes FILE, or leave the labels out"
        )
    names = names or sorted(set(labels))
    position = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(labels) - set(position))
    if unknown:
        raise DatasetError(unknown_class(unknown[0], names))
    return np.array([position[label] for label in labels], np.int64), names


def refuse_values(labels: list[str | int]) -> None:
    """Raise DatasetError for labels, of classes that nobody has named, that are values such as years or
    scores: too many of them, a new one in every second row, or numbers most of which do not occur.
    """
    found = set(labels)
    numbers = all(isinstance(label, int) for label in found)
    classes = max(found) + 1 if numbers else len(found)
    doubtful = classes > MANY and (2 * classes > len(labels) or 2 * len(found) < classes)
    if doubtful or classes > TOO_MANY:
        some = ", ".join(map(repr, list(dict.fromkeys(labels))[:3]))
        raise DatasetError(
            f"labels: {len(found):,} values such as {some} in {len(labels):,} samples would become "
            f"{classes:,} classes. Fix: leave this label out, or list its classes in order in --classes FILE"
        )


def unknown_class(name: str, names: list[str]) -> str:
    """Return the error text for a class that is not among `names`."""
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"unknown class {name!r}; there are {len(names)}: {known}"


def read_text(path: str) -> str:
    """Read a UTF-8 text file without its byte order mark. Raises DatasetError if it cannot be read."""
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
