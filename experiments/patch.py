"""What fusing changed, as a file: ``python -m experiments.patch extract|apply|remove|stitch|info ...``.

extract BASE FUSED OUT                write the patch that turns one checkpoint folder into the other
apply   BASE PATCH [PATCH ...] OUT    write the fused checkpoint; files other than weights come from BASE
remove  FUSED PATCH [PATCH ...] OUT   write the base checkpoint, bit for bit; files other than weights come from FUSED
stitch  BASE PATCH [PATCH ...] OUT    write one patch of several tasks' patches: each entry is its mean where they meet
info    PATCH                         show where a patch comes from and what it changes

Several patches are applied in their order, and removed from the last to the first: name them the same way both times.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.console import size
from experiments.errors import FORESEEN
from tailor.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from tailor.patch import Patch, PatchedTensor

# What needs torch is imported where it is used, so that --help and a mistyped command answer at once.


def extract(base_folder: Path, fused_folder: Path, out: Path) -> None:
    """Writes the patch between two checkpoint folders, which are read a tensor at a time."""
    from tailor.checkpoint import Checkpoint
    from tailor.patch import Patch
    from tailor.scope import require_same_tensors

    if out.exists():
        raise CheckpointError(f"{out}: already exists; remove it or choose another file")
    base, fused = Checkpoint(base_folder), Checkpoint(fused_folder)
    require_same_tensors(base, fused)
    names = {"base": base_folder.resolve().name, "fused": fused_folder.resolve().name}
    patch = Patch.between(base, fused, names)
    patch.save(out)
    print(f"{out}: {summary(patch)}, {size(out.stat().st_size)}")


def flip(folder: Path, patch_files: Sequence[Path], out: Path, *, removing: bool) -> None:
    """Writes ``folder`` with patches applied in their order or, if ``removing``, removed from the last to the first.

    Tensors are streamed. Patched tensors that are not the recorded base as a whole, though their bits at the patched
    places are, get a warning: patches stack, but the result is not the model that the patch was made for.
    """
    from tailor.checkpoint import Checkpoint, CheckpointWriter
    from tailor.patch import Patch

    source = Checkpoint(folder)
    weights: Mapping[str, Tensor] = source
    patches = [(path, Patch.load(path)) for path in patch_files]
    unlike: dict[Path, tuple[str, ...]] = {}
    for path, patch in reversed(patches) if removing else patches:
        flipped = patch.removed(weights) if removing else patch.applied(weights)
        unlike[path] = patch.unlike(flipped if removing else weights)
        weights = flipped
    with CheckpointWriter(out, like=folder) as writer:
        for name in source:
            writer.write(name, weights[name])
    for path, patch in patches:
        if unlike[path]:
            print(
                f"warning: of {len(patch.tensors)} patched tensors, {len(unlike[path])} match the patch's base at the "
                f"patched places only and differ from it elsewhere: {', '.join(unlike[path])}",
                file=sys.stderr,
            )
        print(f"{out}: {'removed' if removing else 'applied'} {summary(patch)}")


def stitch(base_folder: Path, patch_files: Sequence[Path], out: Path) -> None:
    """Writes the mean of the patches, each entry's over those that change it; BASE is read a tensor at a time."""
    from tailor.checkpoint import Checkpoint
    from tailor.patch import Patch
    from tailor.stitch import stitch_patches

    if out.exists():
        raise CheckpointError(f"{out}: already exists; remove it or choose another file")
    patches = [Patch.load(path) for path in patch_files]
    patch = stitch_patches(Checkpoint(base_folder), patches)
    patch.save(out)
    print(f"{out}: stitched {len(patches)} patches to {summary(patch)}")


def info(patch_file: Path) -> None:
    """Prints header, counts and the size of each tensor's changes."""
    import torch
    from rich.table import Table

    from experiments.console import console
    from tailor.patch import Patch

    patch = Patch.load(patch_file)
    out = console(width=200, markup=False)
    for key, value in patch.header.items():
        out.print(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    table = Table()
    for column in ("tensor", "dtype", "shape", "entries", "changed", "share", "size", "of tensor"):
        table.add_column(column, justify="left" if column in ("tensor", "dtype", "shape") else "right")
    whole = 0
    for name, entry in patch.tensors.items():
        entries, changed = math.prod(entry.shape), entry.xors.numel()
        tensor_bytes = entries * getattr(torch, entry.dtype).itemsize
        whole += tensor_bytes
        shape = "×".join(map(str, entry.shape)) or "scalar"
        cells = (f"{entries:,}", f"{changed:,}", f"{changed / entries:.2%}", size(stored_bytes(entry)))
        table.add_row(name, entry.dtype, shape, *cells, f"{stored_bytes(entry) / tensor_bytes:.3f}")
    if patch.tensors:
        out.print(table)
    file_bytes = patch_file.stat().st_size
    share = f", {file_bytes / whole:.3f} of these tensors' {size(whole)}" if whole else ""
    out.print(f"{summary(patch)}; file {size(file_bytes)}{share}", soft_wrap=True)


def summary(patch: Patch) -> str:
    return f"{patch.changed_count:,} changed entries in {len(patch.tensors)} tensors"


def stored_bytes(entry: PatchedTensor) -> int:
    return entry.gaps.nbytes + entry.xors.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.patch", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="extract|apply|remove|stitch|info")
    for command, (description, arguments) in COMMANDS.items():
        subparser = commands.add_parser(command, help=description, description=description)
        for argument in arguments:
            several = "+" if argument == "patches" else None
            metavar = "PATCH" if several else argument.upper()
            subparser.add_argument(argument, type=Path, nargs=several, metavar=metavar, help=ARGUMENTS[argument])
    chosen = parser.parse_args()
    try:
        match chosen.command:
            case "extract":
                extract(chosen.base, chosen.fused, chosen.out)
            case "apply":
                flip(chosen.base, chosen.patches, chosen.out, removing=False)
            case "remove":
                flip(chosen.fused, chosen.patches, chosen.out, removing=True)
            case "stitch":
                stitch(chosen.base, chosen.patches, chosen.out)
            case "info":
                info(chosen.patch)
    except FORESEEN as error:
        sys.exit(f"error: {error}")


COMMANDS = {
    "extract": ("write the patch that turns BASE into FUSED", ("base", "fused", "out")),
    "apply": ("write BASE with the patches applied", ("base", "patches", "out")),
    "remove": ("write FUSED with the patches removed: its base", ("fused", "patches", "out")),
    "stitch": ("write one patch of several tasks' patches of BASE", ("base", "patches", "out")),
    "info": ("show where a patch comes from and what it changes", ("patch",)),
}
ARGUMENTS = {
    "base": "checkpoint folder",
    "fused": "checkpoint folder of the same tensors",
    "patch": "patch file",
    "patches": "patch files, in the order in which they are applied",
    "out": "what to write, a patch file or a checkpoint folder; must not exist yet",
}

if __name__ == "__main__":
    main()
