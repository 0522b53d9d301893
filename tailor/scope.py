"""Which tensors a fusion may change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from tailor.checkpoint import shape_of
from tailor.chunks import chunks
from tailor.errors import CheckpointMismatch, ScopeError

FUSIBLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def select(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Names, in their order, that match at least one glob (`*`, `?`, `[...]`; case matters; `*` crosses dots).

    Raises ScopeError if a pattern matches nothing, naming the closest names, or if there is no pattern.
    """
    names = tuple(names)
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not patterns:
        raise ScopeError("scope: the list of patterns is empty; give at least one, or none at all for every change")
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            closest = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)) or "(there are no tensors)"
            raise ScopeError(f"scope: {pattern!r} matches no tensor; the closest names are {closest}")
        chosen |= matches
    return tuple(name for name in names if name in chosen)


def changed_tensors(
    pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Names of the tensors that differ anywhere once the base is cast to the fine-tuned dtype: the default scope.

    `names` restricts the comparison. Raises CheckpointMismatch if the two do not hold the same tensors, and ScopeError
    if a tensor differs whose dtype cannot be fused.
    """
    require_same_tensors(pretrained, finetuned)
    changed = []
    for name in pretrained if names is None else names:
        base, tuned = pretrained[name], finetuned[name]
        # Piece by piece, since most tensors that differ at all do so in the first, and the rest is not read.
        if all(torch.equal(before.to(after.dtype), after) for before, after in chunks(base, tuned)):
            continue
        for tensor in (base, tuned):
            if tensor.dtype not in FUSIBLE_DTYPES:
                raise ScopeError(
                    f"{name}: changed, but {tensor.dtype} weights cannot be fused; use float32, float16 or bfloat16, "
                    "or give a scope without it"
                )
        changed.append(name)
    return tuple(changed)


def require_same_tensors(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> None:
    """Raise CheckpointMismatch, listing every difference, unless both hold the same names with the same shapes."""
    differences = [f"only in the pretrained: {name}" for name in sorted(set(pretrained) - set(finetuned))]
    differences += [f"only in the fine-tuned: {name}" for name in sorted(set(finetuned) - set(pretrained))]
    for name in sorted(set(pretrained) & set(finetuned)):
        base, tuned = shape_of(pretrained, name), shape_of(finetuned, name)
        if base != tuned:
            differences.append(f"shape of {name}: pretrained {base}, fine-tuned {tuned}")
    if differences:
        raise CheckpointMismatch(
            "the checkpoints do not hold the same tensors; fuse two of one architecture and vocabulary:\n  "
            + "\n  ".join(differences)
        )
