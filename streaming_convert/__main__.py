"""`python -m streaming_convert SOURCE --out FOLDER_OR_URI`: from images to a dataset that training streams.

Sources: digits, images, zip, emoji, mds, webdataset, parquet. Other commands: merge, verify, show.
--help explains each of them.
"""

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
import yaml

from recipe import commands
from storage import Folder, normalize_uri
from storage.manifest import MANIFEST, STORED_BYTES, STORED_DTYPE, DatasetError, Manifest
from streaming_convert import arrow, captions, mds, reader, sources, tars, writer
from streaming_convert.encoders import DTYPES, VAE, Encoder, Stored, load_text_encoder
from streaming_convert.images import FURTHER, Opener
from streaming_convert.sources import Source
from streaming_convert.tables import Columns

# These have no influence on what is written.
PASSING_OPTIONS = ("--workers", "--device", "--shard", "--max-rejected")
YAML = "train.yaml"
DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
MOST_BYTES = 256  # most tokens that train.yaml gives a network that reads captions as bytes
SHARD_HEADER = 1024  # bytes at most of a shard's description of its columns


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 refused or failed (with one message), 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        return args.run(args, argv)
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line: one subcommand per source, and merge, verify, show."""
    top = argparse.ArgumentParser(prog="python -m streaming_convert", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_sources(commands)

    merge = commands.add_parser(
        "merge", help="complete a dataset that several machines have converted with --shard"
    )
    merge.add_argument("out", type=_target, metavar="FOLDER_OR_URI", help="the --out of all these machines")
    merge.add_argument("--max-rejected", type=_at_least(0), default=0, help="as in the conversion")
    merge.set_defaults(run=run_merge)

    verify = commands.add_parser("verify", help="check every sample of a dataset against index and manifest")
    verify.add_argument("uri", type=_target, metavar="FOLDER_OR_URI")
    verify.set_defaults(run=run_verify)

    show = commands.add_parser("show", help="draw a picture of samples of a dataset")
    show.add_argument("uri", type=_target, metavar="FOLDER_OR_URI")
    show.add_argument("--out", required=True, metavar="PNG")
    show.add_argument("--vae", metavar="NAME", help="decoder of latents: a diffusers folder or hub name")
    show.add_argument("--rows", type=_at_least(1), default=10)
    show.add_argument("--columns", type=_at_least(1), default=10)
    show.set_defaults(run=run_show)
    return top


def _add_sources(commands: argparse._SubParsersAction) -> None:
    def source(name: str, about: str, build: Callable[[argparse.Namespace], Source]) -> Callable:
        command = commands.add_parser(name, help=about, parents=[_target_options()], allow_abbrev=False)
        command.set_defaults(run=run_convert, source=build)
        return command.add_argument

    source("digits", "scikit-learn's handwritten digits", lambda a: sources.digits())

    add = source(
        "images",
        "JPEG, PNG, WebP: one folder per class (as ImageNet), a label or a caption file",
        lambda a: sources.image_folder(
            a.path, _opener(a), a.labels, a.classes, a.unlabelled, a.allow_empty, _told(a)
        ),
    )
    add("path", metavar="FOLDER")
    add("--size", type=_at_least(1), required=True, help="side of the square that every image is brought to")
    add("--labels", metavar="FILE", help="CSV (file,class) or JSON; labels.csv or dataset.json is found")
    add("--allow-empty", action="store_true", help="a folder without images is a class without samples")
    _add_captions(add)
    _add_classes_and_formats(add)

    add = source(
        "zip",
        "ZIP or folder of PNG or NPY (pixels or latents) with dataset.json",
        lambda a: sources.archive(a.path, a.size, a.unlabelled, _told(a)),
    )
    add("path", metavar="FILE")
    _add_size(add)
    _add_captions(add)

    add = source("emoji", "Noto Color Emoji, by Unicode's groups and names", lambda a: sources.emoji(a.size))
    add("--size", type=_at_least(1), default=64, help="side in pixels (default: %(default)s)")

    add = source(
        "mds",
        "a Streaming dataset, of this program or of another",
        lambda a: mds.mds(a.path, _columns(a), _opener(a), a.classes, a.channels, _made(a)),
    )
    add("path", type=_target, metavar="FOLDER_OR_URI")
    _add_columns(add, "column")
    add("--latents", metavar="NAME", help="column of latents, without deviations")
    channels = "of latents that are stored as bytes of float16 (default: %(default)s)"
    add("--channels", type=_at_least(1), default=4, help=channels)
    add("--scaling", type=float, default=1.0, help="what the latents were multiplied by (default: 1)")
    add("--shift", type=float, default=0.0, help="what was subtracted from them before that (default: 0)")

    add = source(
        "webdataset",
        "tars of 000.jpg, 000.txt, 000.cls, 000.json",
        lambda a: tars.webdataset(a.path, _columns(a), _opener(a), a.classes),
    )
    add("path", nargs="+", metavar="FILE_OR_FOLDER", help="tars, or folders of them; s3:// and others, too")
    _add_columns(add, "ending of a file such as txt, or key in the .json,")

    add = source(
        "parquet",
        "Parquet or Arrow files of Hugging Face, img2dataset and others",
        lambda a: arrow.parquet(a.path, _columns(a), _opener(a), a.classes, a.split),
    )
    add("path", nargs="+", metavar="FILE_OR_FOLDER", help="files, or folders of them; s3:// and others, too")
    add("--split", metavar="NAME", help="of folders that hold several, such as train")
    _add_columns(add, "column")


def _add_columns(add: Callable, what: str) -> None:
    """Add the options of datasets of other programs; what: which of a row they name."""
    _add_size(add)
    for role in ("image", "label", "caption"):
        about = f"{what} that holds the {role} (where no column is named: found by its name)"
        add(f"--{role}", metavar="NAME", help=about)
    add("--grey", action="store_true", help="store grey pictures as one channel (colour ones are rejected)")
    _add_classes_and_formats(add)


def _add_size(add: Callable) -> None:
    add("--size", type=_at_least(1), help="side to bring pixels to (default: as they are)")


def _add_captions(add: Callable) -> None:
    add("--unlabelled", action="store_true", help="all labels 0, no classes")
    about = f"CSV or JSON lines with file and caption; `{captions.BESIDE}`: 1.txt for 1.jpg"
    add("--captions", metavar="FILE", help=about)
    about = "column of --captions that holds the captions (default: caption or text)"
    add("--caption-key", metavar="NAME", help=about)


def _add_classes_and_formats(add: Callable) -> None:
    about = "class names in order, one a line, such as LOC_synset_mapping.txt"
    add("--classes", metavar="FILE", help=about)
    add("--formats", nargs="+", choices=FURTHER, default=[], help="further formats to read")


def _columns(args: argparse.Namespace) -> Columns:
    return Columns(args.image, args.label, args.caption, getattr(args, "latents", None))


def _opener(args: argparse.Namespace) -> Opener:
    return Opener(args.size, getattr(args, "grey", False), tuple(args.formats))


def _made(args: argparse.Namespace) -> dict:
    """Return what is known of the encoder that made another program's latents."""
    known = {"scaling": args.scaling, "shift": args.shift, "model": args.vae}
    return {"name": "precomputed", "hash": None, **known}


def _told(args: argparse.Namespace) -> captions.Told | None:
    if args.caption_key and not args.captions:
        raise DatasetError("--caption-key: needs --captions FILE")
    return captions.Told(args.captions, args.caption_key) if args.captions else None


def _target_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    where = "the dataset: train/ and val/ are written there; s3://, gs://, oci:// too"
    add("--out", type=_target, required=True, metavar="FOLDER_OR_URI", help=where)
    add("--val", type=_share, default=0.0, metavar="SHARE", help="share of samples for val/ (default: 0)")
    add("--only", nargs="+", metavar="CLASS", help="keep only these classes, numbered in this order")
    add("--limit", type=_at_least(1), metavar="N", help="keep only N samples, drawn at random")
    add("--seed", type=_at_least(0), default=0, help="seed of --val and --limit (default: 0)")
    add("--flips", action="store_true", help="store every sample a second time, mirrored")
    add("--encoder", choices=("none", "vae"), default="none", help="default: none, which stores uint8 pixels")
    vae = f"diffusers folder or hub name (default: {DEFAULT_VAE}); of latents that exist, what made them"
    add("--vae", metavar="NAME", help=vae)
    add("--dtype", choices=DTYPES, default="fp32", help="precision of the encoder (default: fp32)")
    add("--batch-size", type=_at_least(1), default=32, help="of the encoder (default: %(default)s)")
    text = "encoder of captions (T5, CLIP, Qwen): a transformers folder or hub name"
    add("--text-encoder", metavar="NAME", help=text)
    add("--text-tokens", type=_at_least(1), default=64, help="most tokens per caption (default: %(default)s)")
    add("--device", help="device of the encoders, such as cuda:1 (default: a GPU if there is one)")
    samples = "most samples per shard (default: %(default)s)"
    add("--shard-samples", type=_at_least(1), default=1000, help=samples)
    size = "most bytes per shard, uncompressed (default: %(default)s)"
    add("--shard-size", type=_bytes, default="16mb", help=size)
    add("--compression", type=_compression, help="of shards, in Streaming's names: zstd:3 (default: none)")
    add("--max-rejected", type=_at_least(0), default=0, help="most bad samples to leave out, over all splits")
    workers = "worker processes (default: one per core, %(default)s)"
    add("--workers", type=_at_least(1), default=os.cpu_count(), help=workers)
    part = "convert as machine I of N; run merge at the end"
    add("--shard", type=_machine, default=(1, 1), metavar="I/N", help=part)
    return options


def run_convert(args: argparse.Namespace, argv: list[str]) -> int:
    """Convert a source split by split; a finished identical dataset stays as it is."""
    paths = getattr(args, "path", [])
    for path in [paths] if isinstance(paths, str) else paths:
        if "://" not in args.out and Path(args.out).resolve().is_relative_to(Path(path).resolve()):
            raise DatasetError(f"--out {args.out} lies inside the source {path}")
    with writer.alone(args.out, args.shard):
        return _convert(args, argv)


def _convert(args: argparse.Namespace, argv: list[str]) -> int:
    source = sources.subset(args.source(args), args.only, args.limit, args.seed)
    _check_mirrors(source, args.flips, args.val)
    encoder = Stored(source)
    if args.encoder == "vae":
        encoder = VAE(source, args.vae or DEFAULT_VAE, args.dtype, args.batch_size, args.device)
    text, about = None, None
    if args.text_encoder:
        text, about = load_text_encoder(source, args.text_encoder, args.text_tokens, args.device)
    splits = split_keys(source.keys, args.val, args.seed)
    plans = [make_plan(args, argv, source, encoder, about, splits, split) for split in splits]
    jobs = [
        writer.Job(f"{args.out}/{split}", source, encoder, items, plan, text)
        for (split, items), plan in zip(splits.items(), plans, strict=True)
    ]
    complete = [writer.is_complete(job) for job in jobs]
    for job, done in zip(jobs, complete, strict=True):
        if done:
            print(f"{job.uri}: already complete")
        else:
            writer.convert(job, args.workers, args.shard)
    if args.shard == (1, 1):
        _finish(args.out, list(splits), args.max_rejected)
    elif not all(complete):
        print(f"{args.out}: this machine's part is done; when all parts are, run merge {args.out}")
    return 0


def _check_mirrors(source: Source, flips: bool, val: float) -> None:
    """Raise DatasetError if this source does not allow --flips or --val."""
    if flips and source.column == "latents":
        raise DatasetError("--flips: mirrored latents are not those of the mirrored image; flip the pixels")
    if source.flips and (flips or val):
        # --val would put an image into one split and its mirror image into the other
        asked = "--flips" if flips else "--val"
        raise DatasetError(f"{asked}: the source holds mirror images of its samples already")


def split_keys(keys: list[str], share: float, seed: int) -> dict[str, np.ndarray]:
    """Draw that share of the pictures for validation; return the positions of train and of val, if any.

    All samples of one picture, which have the same key, stay on the same side.
    """
    pictures = list(dict.fromkeys(keys))
    drawn = np.random.default_rng(seed).permutation(len(pictures))[: round(share * len(pictures))]
    held = {pictures[number] for number in drawn}
    held_out = np.array([key in held for key in keys])
    parts = {"train": np.flatnonzero(~held_out), "val": np.flatnonzero(held_out)}
    empty = [name for name, items in parts.items() if not len(items) and (name == "train" or share)]
    if empty:
        raise DatasetError(f"--val {share}: of {len(pictures)} samples, none are left for {empty[0]}")
    return {name: items for name, items in parts.items() if len(items)}


def make_plan(
    args: argparse.Namespace,
    argv: list[str],
    source: Source,
    encoder: Encoder,
    text: dict | None,
    splits: dict[str, np.ndarray],
    split: str,
) -> Manifest:
    """Return the manifest of one split without results: all that decides the bytes of the dataset."""
    listing = xxhash.xxh64()
    for i in splits[split]:
        version = source.versions[i] if source.versions else ""
        caption = f"\t{ascii(source.captions[i])}" if source.captions else ""
        line = f"{source.keys[i]}\t{source.labels[i]}\t{version}{caption}\n"
        listing.update(line.encode(errors="surrogateescape"))
    went_in = {"split": split, "splits": list(splits), "samples": len(splits[split])}
    value_bytes = math.prod(encoder.shape) * STORED_BYTES[STORED_DTYPE[encoder.column]]
    sample_bytes = value_bytes + 12  # 8 of the label, 4 of the offset
    if source.captions:
        sample_bytes += 4 + max(len(str(caption).encode()) for caption in source.captions)
    if text:
        sample_bytes += 2 * text["tokens"] * text["width"] + 8
    return Manifest(
        source=source.name,
        input={**went_in, "flips": source.flips, "xxh64": listing.hexdigest()},
        command=_command(argv),
        column=encoder.column,
        shape=list(encoder.shape),
        class_names=source.class_names,
        encoder=encoder.info,
        crop=source.crop,
        flips=args.flips or source.flips,
        compression=args.compression,
        shard_samples=max(1, min(args.shard_samples, (args.shard_size - SHARD_HEADER) // sample_bytes)),
        caption_bytes={} if source.captions else None,
        text=text,
    )


def _command(argv: list[str]) -> str:
    """Return the command for the manifest, with OUT for --out and without options that change no result."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    kept = []
    for previous, word in zip([None, *words], words, strict=False):
        if previous == "--out":
            kept.append("OUT")
        elif previous not in PASSING_OPTIONS and word not in PASSING_OPTIONS:
            kept.append(word)
    return shlex.join(["python", "-m", "streaming_convert", *kept])


def run_merge(args: argparse.Namespace, argv: list[str]) -> int:
    """Complete train/ and val/ from the parts that all machines have converted."""
    folder = Folder(args.out)
    names = folder.names()
    known = [f"{split}/{file}" for split in ("train", "val") for file in (writer.PLAN, MANIFEST)]
    plans = [name for name in known if name in names]
    if not plans:
        raise DatasetError(f"{args.out} holds no conversion, finished or not")
    first = plans[0]
    plan = Manifest.from_json(folder.read(first), f"{args.out}/{first}", plan=first.endswith(writer.PLAN))
    splits = plan.input["splits"]
    finished = all(f"{split}/{MANIFEST}" in names for split in splits)
    _finish(args.out, splits, sys.maxsize if finished else args.max_rejected)
    return 0


def _finish(out: str, splits: list[str], max_rejected: int) -> None:
    uris = [f"{out}/{split}" for split in splits]
    manifests = writer.finish(uris, max_rejected)
    for uri, manifest in zip(uris, manifests, strict=True):
        count = f"{manifest.num_samples} samples in {len(manifest.shards)} shards"
        print(f"{uri}: {count}, {manifest.rejected} rejected")
        if manifest.text and (cut := manifest.text["cut"]):
            print(f"warning: {uri}: {cut} captions longer than {manifest.text['tokens']} tokens were cut")
    folder = Folder(out)
    if YAML not in folder.names():  # an existing file may hold changes of the user
        folder.write(YAML, training_yaml(out, manifests[0]).encode())
    fetch = f"copy {out}/{YAML} here, then " if folder.remote else ""
    train = commands.composer("recipe/train.py", YAML if folder.remote else f"{out}/{YAML}")
    print(f"next: {fetch}{train}")


def training_yaml(out: str, manifest: Manifest) -> str:
    """Return the text of a first configuration that trains on the dataset `out`.

    Up to 32 pixels its network is for a laptop, with at most 8x8 tokens; above, it is S with at most 16x16
    tokens, for a GPU.
    """
    name = re.sub(r"[^\w.-]", "_", out.rpartition("/")[2]).lstrip(".-")[:80] or "mine"
    latents, size = manifest.column == "latents", manifest.shape[1]
    small, classes = size <= 32 and not latents, len(manifest.class_names)
    side = 8 if small else 16
    patch = next(p for p in range(min(size, 2), size + 1) if size % p == 0 and size // p <= side)
    quarter, batch = (600, 32) if small else (2000, 128)
    where = {"local": f"data/{name}", "remote": f"{out}/train"} if "://" in out else {"local": f"{out}/train"}
    network = {"width": 128, "depth": 4, "heads": 4} if small else {"width": 384, "depth": 12, "heads": 6}
    model = {"size": size, "channels": manifest.shape[0] // (2 if latents else 1), "classes": classes}
    config = {
        "run_name": name,
        "folder": "runs/${run_name}",
        "duration": f"{4 * quarter}ba",
        **dict.fromkeys(("save_interval", "export_interval"), f"{quarter}ba"),
        "data": {
            **where,
            "batch_size": min(batch, manifest.num_samples),
            "workers": 0 if small else 4,
            "canonical_nodes": min(2, manifest.num_samples),
            "normalize": "manifest" if latents else "pixels",
        },
        "model": {**model, "patch": patch, **network, "label_std": 0.5, **_text_model(manifest)},
        "objective": {"guidance": 1.25 if classes or manifest.caption_bytes else 1.0, "gap_mean": 0.0},
        "optimizer": {"lr": 1e-3} if small else {"lr": 3e-4, "warmup": "100ba"},
        "step": {"clip": 1.0},
        "ema": {"decay": 0.999, "ramp": True},
        "grid": {"interval": f"{quarter}ba", "vae": manifest.encoder.get("model")},
    }
    return (
        "# Written by the converter as a start; docs/settings.md explains every key, as does --help.\n"
        "# On a GPU add: precision=amp_bf16 parallel.compile=true\n"
        + yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    )


def _text_model(manifest: Manifest) -> dict:
    """Return the section `model.text`: captions as bytes, or the dataset's embeddings of them."""
    if manifest.text:
        return {"text": {"encoder": "dataset", **{key: manifest.text[key] for key in ("tokens", "width")}}}
    if not manifest.caption_bytes:
        return {}
    longest = max(map(int, manifest.caption_bytes))
    return {"text": {"encoder": "bytes", "tokens": min(MOST_BYTES, 8 * (longest // 8 + 1))}}


def run_verify(args: argparse.Namespace, argv: list[str]) -> int:
    """Check every split of a dataset and print what is wrong. Returns 1 if anything is, else 0."""
    found = {uri: reader.verify(uri) for uri in mds.dataset_folders(args.uri).values()}
    for uri, problems in found.items():
        print(f"{uri}: {f'{len(problems)} problems' if problems else 'sound'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if any(found.values()) else 0


def run_show(args: argparse.Namespace, argv: list[str]) -> int:
    """Write a PNG with samples of the first split."""
    uri = next(iter(mds.dataset_folders(args.uri).values()))
    reader.sample_grid(uri, args.columns, args.rows, args.vae).save(args.out, format="PNG")
    print(f"{args.out}: samples of {uri}")
    return 0


def _target(text: str) -> str:
    try:
        target = normalize_uri(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not target or target.endswith(":"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder or URI")
    return target


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return integer


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: 0 up to, not including, 1")
    return share


def _machine(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 1/4")
    return int(number), int(of)


def _bytes(text: str) -> int:
    from streaming.base.util import bytes_to_int

    try:
        size = bytes_to_int(text)
    except (ValueError, TypeError):
        size = 0
    if not 0 < size < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at most 4gb, such as 64mb")
    return size


def _compression(text: str) -> str:
    from streaming.base.compression import is_compression

    if not is_compression(text) or text.startswith("gz"):  # gzip would store the time of day
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of br, bz2, snappy, zstd, or one of these with a level, such as zstd:3"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
