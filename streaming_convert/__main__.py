"""`python -m streaming_convert SOURCE --out FOLDER_OR_URI`: from images to a dataset that training streams.

Sources: digits, images, zip, emoji, mds. Other commands: merge, verify, show. `--help` after any of them.
"""

import argparse
import os
import shlex
import sys

import numpy as np
import xxhash

from streaming_convert import sources, writer
from streaming_convert.encoders import Encoder, Stored
from streaming_convert.manifest import Manifest
from streaming_convert.sources import Source
from streaming_convert.store import DatasetError


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 1 refused or failed (with one message), 2 usage."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        return args.run(args, argv)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m streaming_convert", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    target = _target_options()
    digits = commands.add_parser("digits", parents=[target], help="scikit-learn's handwritten digits")
    digits.set_defaults(run=run_convert, source=lambda args: sources.digits())
    return top


def _target_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    add(
        "--out",
        required=True,
        metavar="FOLDER_OR_URI",
        help="writes its train/ and val/",
    )
    add(
        "--val",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of samples for val/ (default: 0)",
    )
    add("--seed", type=int, default=0, help="of the choice of validation samples")
    add("--flips", action="store_true", help="store every sample a second time, mirrored")
    add("--shard-samples", type=int, default=1000, help="most samples per shard (default: %(default)s)")
    add("--compression", help="of the shards, as Streaming names it, such as zstd:3 (default: none)")
    add("--max-rejected", type=int, default=0, help="bad samples to leave out before failing (default: 0)")
    add("--workers", type=int, default=os.cpu_count(), help="default: one per core (%(default)s)")
    return options


def run_convert(args: argparse.Namespace, argv: list[str]) -> int:
    """Converts a source, split by split; a finished identical dataset is left as it is."""
    source = args.source(args)
    encoder = Stored(source)
    jobs = []
    for split, items in splits(len(source.keys), args.val, args.seed).items():
        manifest = plan(args, argv, split, source, encoder, items)
        jobs.append(writer.Job(f"{args.out.rstrip('/')}/{split}", source, encoder, items, manifest))
    complete = [writer.is_complete(job) for job in jobs]
    for job, done in zip(jobs, complete, strict=True):
        if done:
            print(f"{job.uri}: already complete")
            continue
        writer.convert(job, args.workers)
        manifest = writer.finish(job.uri, args.max_rejected)
        count = f"{manifest.num_samples} samples in {len(manifest.shards)} shards"
        print(f"{job.uri}: {count}, {manifest.rejected} rejected")
    return 0


def splits(samples: int, share: float, seed: int) -> dict[str, np.ndarray]:
    """Positions of the training and, if `share` > 0, of round(share * samples) random validation samples."""
    held_out = np.zeros(samples, bool)
    held_out[np.random.default_rng(seed).permutation(samples)[: round(share * samples)]] = True
    parts = {"train": np.flatnonzero(~held_out), "val": np.flatnonzero(held_out)}
    return {name: items for name, items in parts.items() if name == "train" or len(items)}


def plan(
    args: argparse.Namespace, argv: list[str], split: str, source: Source, encoder: Encoder, items: np.ndarray
) -> Manifest:
    """The manifest without results: everything that decides the bytes of the dataset."""
    listing = xxhash.xxh64()
    for item in items:
        listing.update(f"{source.keys[item]}\t{source.labels[item]}\n".encode())
    return Manifest(
        source=source.name,
        input={"split": split, "samples": len(items), "xxh64": listing.hexdigest()},
        command=shlex.join(["python", "-m", "streaming_convert", *argv]),
        column=encoder.column,
        shape=list(encoder.shape),
        class_names=source.class_names,
        encoder=encoder.info,
        crop=source.crop,
        flips=args.flips,
        compression=args.compression,
        shard_samples=args.shard_samples,
    )


if __name__ == "__main__":
    sys.exit(main())
