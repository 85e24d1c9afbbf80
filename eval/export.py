"""Weights for inference, from what training leaves: `python -m eval.export SOURCE --average ema --out NAME`.

SOURCE is a training checkpoint (a .pt file, or the folder of .distcp files that sharded training writes), a
folder of exported weights with post-hoc averages (for `--average posthoc:LENGTH`), each local or in a bucket,
or weights themselves (for `--program`). Checkpoints are pickles: loading one can execute anything in it, so
open only your own.

`--program FILE.pt2` also writes the sampler as a torch.export program, (noise, label) -> images, which
`torch.export.load(FILE).module()` runs with torch alone, without this project's code; FILE.onnx is for
onnxruntime. With prompts it takes their tokens and lengths, too.

`--merge --out NAME` writes whole weights of an adapter's, which need no base any more.

`--card FOLDER` writes a folder for others: the weights and a model card with the scores of the run's sweep.
`--hub USER/MODEL` uploads it to the Hugging Face hub, for everyone to see unless `--private` is given.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import product
from operator import getitem, itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from composer.utils import dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from eval import command_line
from eval.card import make_folder, upload
from eval.sample import parse_interval
from recipe.adapter import adapter_state
from recipe.ema import combination, exponent, length_of
from recipe.generator import Sampler, quantize
from recipe.networks import AnyNetwork
from recipe.sampler import check_steps
from recipe.settings import make
from recipe.text import Text
from recipe.weights import (
    copy_weights,
    fetch_weights,
    load_tensors,
    load_weights,
    newest_weights,
    parse_facts,
    read_facts,
    save_weights,
)
from storage import Folder, StorageError

Facts = dict[str, Any]


class Export(NamedTuple):
    """Exported weights: the path of their JSON, and its content."""

    path: Path
    facts: Facts


# Where a checkpoint holds what describes its weights.
DESCRIPTION = ("state", "callbacks", "ExportWeights", "description")
STEP = ("state", "timestamp", "Timestamp", "batch")


@contextmanager
def local_copy(source: str) -> Iterator[Path]:
    """Return the path of a local source; of one in a bucket, that of a copy, kept as long as it is read.

    An adapter's base that lies beside it is copied, too.
    """
    if "://" not in source:
        yield Path(source)
        return
    parent, _, name = source.rstrip("/").rpartition("/")
    folder = Folder(parent)
    names, stem = folder.names(), name.removesuffix(".json").removesuffix(".safetensors")
    with TemporaryDirectory() as scratch:
        for file in names:
            if file == name or file.startswith((f"{name}/", f"{stem}.")):
                folder.get(file, Path(scratch, file))
        if f"{stem}.json" in names:  # of an adapter the base is still lacking
            fetch_weights(folder, stem, Path(scratch))
        yield Path(scratch, name)


def read_checkpoint(path: str | Path, average: str) -> tuple[dict[str, Tensor], Facts]:
    """Return the weights of one average (`ema` or `net`) and their description.

    The checkpoint is trusted: loading it can execute what it holds. Raises FileNotFoundError, or
    ValueError where it holds no such average or is not of this project.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    read = _read_sharded if path.is_dir() else _read_full
    state, description, step = read(path, f"{average}.")
    if not state:
        raise ValueError(f"{path} holds no weights {average!r}")
    facts = json.loads(description)
    if "adapter" in facts:
        state = adapter_state(state, facts["adapter"]["modules_to_save"])
    return state, {**facts, "average": average, "step": step, "train_seconds": None}


def _read_full(path: Path, prefix: str) -> tuple[dict[str, Tensor], str, int]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        description, step = (reduce(getitem, keys, content) for keys in (DESCRIPTION, STEP))
        model = content["state"]["model"]
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint of recipe/train.py: {error!r}") from error
    state = {name.removeprefix(prefix): t.clone() for name, t in model.items() if name.startswith(prefix)}
    return state, description, int(step)


def _read_sharded(path: Path, prefix: str) -> tuple[dict[str, Tensor], str, int]:
    """Read the tensors of one average alone, however many ranks wrote them."""
    reader = dcp.FileSystemReader(path)
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a folder of a sharded checkpoint: {error}") from error
    prefix = f"state.model.{prefix}"
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(prefix)
    }
    others = {".".join(DESCRIPTION): "", ".".join(STEP): 0}
    if not others.keys() <= metadata.keys():
        raise ValueError(f"{path} is not a checkpoint of recipe/train.py: no {' or '.join(others)}")
    state |= others
    try:
        dcp.load(state, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"{path} is damaged: {next(iter(error.failures.values()))[0]}") from error
    description, step = (state.pop(name) for name in others)
    return {name.removeprefix(prefix): t for name, t in state.items()}, description, int(step)


def find_snapshots(folder: Path, step: int | None = None) -> list[Export]:
    """Return the post-hoc averages in a folder of weights, up to a step.

    Raises ValueError where they do not say their step, or are not of one network.
    """
    found = [Export(file, read_facts(file)) for file in sorted(folder.glob("*-posthoc_*.json"))]
    for file, facts in found:
        if not facts["step"]:
            raise ValueError(f"weights: {file}: step: {facts['step']} must be at least 1 for an average")
        if facts["model"] != found[0].facts["model"]:
            raise ValueError(f"weights: {file}: model: differs from that of {found[0].path}")
    return [export for export in found if step is None or export.facts["step"] <= step]


def synthesize(folder: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], Facts]:
    """Make the average of any length at a step (None: the last) from the folder's snapshots up to there.

    One snapshot is read at a time; sums are in float64. Raises ValueError where there are no snapshots, or
    one of them is damaged or not finite.
    """
    snapshots = find_snapshots(folder, step)
    if not snapshots:
        raise ValueError(
            f"{folder} holds no post-hoc averages; training keeps them with ema.posthoc=[0.05,0.1]"
        )
    last = max((facts for _, facts in snapshots), key=itemgetter("step"))
    profiles = [(exponent(length_of(facts["average"])), facts["step"]) for _, facts in snapshots]
    factors = combination(profiles, (exponent(length), last["step"]))
    total: dict[str, Tensor] = {}
    for factor, (file, _) in zip(factors, snapshots, strict=True):
        for name, tensor in load_tensors(file).items():
            if not tensor.isfinite().all():
                raise ValueError(f"weights: {file}: {name} is not finite, so no average is made of it")
            total[name] = total.get(name, 0) + float(factor) * tensor.double()
    digests = [facts["sha256"] for _, facts in snapshots]
    facts = {**last, "average": f"posthoc:{length:g}", "snapshots": digests}
    return {name: tensor.float() for name, tensor in total.items()}, facts


def save(path: str | Path, state: dict[str, Tensor], facts: Facts) -> Path:
    """Write weights with a description read elsewhere; return the JSON's path.

    Raises ValueError where the weights are not finite: nobody can use them.
    """
    facts = dict(facts)
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"average {facts['average']}: {bad[0]} is not finite, so {path} is not written")
    return save_weights(path, state, make(AnyNetwork, facts.pop("model"), "model"), facts)


def find_weights(names: list[str], averages: list[str], latest: bool, folder: Path) -> list[Export]:
    """Find all weights asked for, newest first within each name; `latest` keeps the newest step of each.

    Buckets are copied to FOLDER/downloads, synthesised averages written to FOLDER/posthoc, on each node.
    Raises OSError, ValueError where there are none, or they cannot be read.
    """
    found = []
    with dist.run_local_rank_zero_first():
        for name in names:
            path = mirror(name, folder / "downloads", latest) if "://" in name else Path(name)
            files = path.glob("*.json") if path.is_dir() else [path]
            exports = [Export(file, read_facts(file)) for file in files]
            wanted = [export for export in exports if export.facts["average"] in averages]
            wanted += synthesized(path, wanted, averages, latest, folder / "posthoc")
            if not wanted:
                raise ValueError(f"weights: {name} holds no weights with average in {averages}")
            wanted.sort(key=lambda export: (export.facts["step"] or 0, export.path.name), reverse=True)
            bases = {export.facts["adapter"]["sha256"] for export in wanted if "adapter" in export.facts}
            first = next((e for e in wanted if e.facts["sha256"] not in bases), wanted[0])
            newest = first.facts["step"]
            found += [export for export in wanted if not latest or export.facts["step"] == newest]
    return found


def mirror(uri: str, folder: Path, latest: bool) -> Path:
    """Copy the weights of a bucket's folder that are not here yet, and return the local folder.

    `latest` leaves out all but the newest step, the snapshots that post-hoc averages are made from, and bases
    of adapters, whatever their step.
    """
    target = folder / uri.split("://", 1)[1].strip("/").replace("/", "-")
    target.mkdir(parents=True, exist_ok=True)
    source = Folder(uri)
    names = [name for name in sorted(source.names()) if "/" not in name and name.endswith(".json")]
    descriptions = {name: source.read(name) for name in names}
    facts = {name: parse_facts(text, f"{uri}/{name}") for name, text in descriptions.items()}
    bases = {fact["adapter"]["sha256"] for fact in facts.values() if "adapter" in fact}
    kept = {name: fact for name, fact in facts.items() if fact["sha256"] not in bases}
    newest = max((fact["step"] or 0 for fact in kept.values()), default=0)
    for name, fact in facts.items():
        snapshot = fact["average"].startswith("posthoc")
        if latest and name in kept and not snapshot and (fact["step"] or 0) < newest:
            continue
        copy_weights(source, name, descriptions[name], target)
    return target


def synthesized(
    path: Path, stored: list[Export], averages: list[str], latest: bool, folder: Path
) -> list[Export]:
    """Make the post-hoc averages of those lengths asked for that training did not store, and return them."""
    known = {"ema", "net", *(export.facts["average"] for export in stored)}
    lengths = [length_of(average) for average in averages if average not in known]
    snapshots = find_snapshots(path) if lengths and path.is_dir() else []
    steps = sorted({facts["step"] for _, facts in snapshots}, reverse=True)
    exports = []
    for step, length in product(steps[:1] if latest else steps, lengths):
        digests = [facts["sha256"] for _, facts in snapshots if facts["step"] <= step]
        mark = hashlib.sha256(repr(digests).encode()).hexdigest()[:8]  # no text of the files in a path
        file = folder / f"{path.parent.name}-{mark}-ba{step:07d}-posthoc_{length:g}.json"
        if not file.is_file() or read_facts(file).get("snapshots") != digests:
            save(file, *synthesize(path, length, step))
        exports.append(Export(file, read_facts(file)))
    return exports


def merged(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """Return the weights of an adapter and its base together. Raises FileNotFoundError, ValueError."""
    net, facts = load_weights(newest_weights(path))
    if facts.pop("adapter", None) is None:
        raise ValueError(f"--merge: {path} is no adapter")
    return net.state_dict(), facts


class Program(Sampler):
    """A sampler whose steps and guidance are fixed: noise, labels int64 (B,) => uint8 images, or latents.

    A network with prompts takes their tokens (B, L) or embeddings (B, L, width), and lengths int64 (B,),
    after the label, or in its place where there are no classes.
    """

    def __init__(
        self, path: str | Path, nfe: int, w: float | None = None, interval: list[float] | None = None
    ) -> None:
        super().__init__(path)
        check_steps(nfe)
        self.nfe, (self.w, self.interval) = nfe, self.guidance(w, interval)

    def forward(self, noise: Tensor, *asked: Tensor) -> Tensor:
        text = None if self.prompts is None else Text(*asked[-2:])
        label = asked[0] if self.net.config.classes or text is None else torch.zeros_like(text.length)
        values = self.values(noise, label, self.nfe, self.w, text, self.interval)
        return quantize(values, "nearest") if self.facts["data"]["column"] == "image" else values.float()


def export_program(
    path: str | Path, nfe: int = 1, w: float | None = None, interval: list[float] | None = None
) -> torch.export.ExportedProgram:
    """Trace the sampler with its weights to one graph, for any batch size up to 65,536.

    w, interval: constants of the graph; None for those of `default_guidance`.
    """
    sampler = Program(path, nfe, w, interval)
    config, text = sampler.net.config, sampler.net.config.text
    example = [torch.zeros(2, config.channels, config.size, config.size)]
    if config.classes or text is None:
        example.append(torch.zeros(2, dtype=torch.int64))
    if text is not None:
        example += sampler.prompts.empty(2)
    batch = {0: torch.export.Dim("batch", min=1, max=2**16)}
    with torch.no_grad():
        return torch.export.export(
            sampler, tuple(example), dynamic_shapes=(batch, (batch,) * (len(example) - 1))
        )


def save_program(program: torch.export.ExportedProgram, path: str) -> None:
    """Write the sampler as a program of torch.export (.pt2), or of ONNX (.onnx). Raises ValueError."""
    if path.endswith(".pt2"):
        torch.export.save(program, path)
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("--program: ONNX needs pip install 'terminal-velocity[onnx]'") from error
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = command_line("eval.export", __doc__)
    add = parser.add_argument
    add("source", help="checkpoint (.pt or folder), folder of weights, or weights")
    add("--average", default="ema", help="ema, net or posthoc:LENGTH (default: ema)")
    add("--out", help="path of the weights to write, without suffix")
    add("--merge", action="store_true", help="of an adapter, write its base with it as whole weights")
    add("--program", help="the .pt2 or .onnx file of the sampler to write")
    add("--nfe", type=int, default=1, help="steps of the program's sampler")
    add("--w", type=float, help="its guidance weight; default: the one of a finish, or of training")
    within = "times between which that is in force, 0.4,0.65; default: that of a finish, or 0,1"
    add("--interval", help=within)
    add("--card", type=Path, help="folder of weights and a model card to write")
    results = "folder of the sweep whose scores the card shows; default: that of the run"
    add("--results", type=Path, help=results)
    add("--hub", metavar="USER/MODEL", help="upload the card's folder to the Hugging Face hub")
    add("--private", action="store_true", help="make the repository on the hub a private one")
    args = parser.parse_args(argv)
    if args.private and args.hub is None:
        parser.error("--private: is about --hub USER/MODEL, which is not given")
    if args.merge and args.out is None:
        parser.error("--merge: needs --out NAME")
    if args.merge and args.average != "ema":
        parser.error(f"--average: {args.average} is not with --merge, which takes what SOURCE names")
    if args.program is not None and Path(args.program).suffix not in (".pt2", ".onnx"):
        parser.error(f"--program: {args.program} must end in .pt2 (torch.export) or .onnx; no other is made")
    if args.hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.hub):
        parser.error(f"--hub: {args.hub} must be USER/MODEL")
    if not (args.out or args.program or args.card or args.hub):
        parser.error("nothing to write: give --out, --program, --card or --hub")
    try:
        check_steps(args.nfe, "--nfe")
        interval = None if args.interval is None else parse_interval(args.interval)
        weights = args.source
        if args.out is not None:
            posthoc = args.average not in ("ema", "net")
            average = length_of(args.average) if posthoc else args.average
            with local_copy(args.source) as source:
                read = synthesize if posthoc else read_checkpoint
                weights = save(args.out, *(merged(source) if args.merge else read(source, average)))
            sys.stdout.write(f"{weights}\n")
        if args.program is not None:
            program = export_program(newest_weights(weights), args.nfe, args.w, interval)
            save_program(program, args.program)
            sys.stdout.write(f"{args.program}\n")
        if args.card or args.hub:
            folder = args.card or Path(args.hub.rpartition("/")[2])
            sys.stdout.write(f"{make_folder(newest_weights(weights), folder, args.results)}\n")
            sys.stdout.write(f"{upload(folder, args.hub, args.private)}\n" if args.hub else "")
    except (OSError, ValueError, StorageError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
