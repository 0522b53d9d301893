"""The engine: stream tensors through a method, hold it to its mask, write, and account for every tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tailor.align import Aligned, Embeddings, OutDtype, align, require_precision
from tailor.bits import bit_patterns
from tailor.checkpoint import MAX_SHARD_BYTES, Checkpoint, CheckpointWriter
from tailor.chunks import chunks, is_finite
from tailor.errors import NotFinite, TailorError
from tailor.method import Evidence, Fused, Method, Rng, grams_of, require_nothing, target_of
from tailor.patch import Patch
from tailor.report import Fate, FusionReport, TensorReport, settings_of
from tailor.scope import changed_tensors, require_same_tensors, select

Weights = str | os.PathLike[str] | Mapping[str, Tensor]


def fuse(
    pretrained: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    method: Method,
    out: str | os.PathLike[str],
    *,
    scope: Iterable[str] | None = None,
    evidence: Evidence = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    embeddings: Embeddings = "refuse",
    out_dtype: OutDtype = "pretrained",
    max_shard_bytes: int | str = MAX_SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> FusionReport:
    """Fuse two checkpoint folders into a third, which appears whole or not at all.

    Deltas are taken after casting the base to the fine-tuned dtype; the result has the base's dtypes, its bits off the
    masks and outside the scope, and the fine-tuned folder's other files. `scope` are name patterns (default: every
    tensor that differs), `device` is where methods compute, `max_shard_bytes` (a number, or "5GB") limits the files of
    weights, and `progress` is called with each name when its tensor is done. Memory is bounded by a few times the
    largest tensor, unless the method's docstring says otherwise. `tailor.align.align` says what `embeddings` and
    `out_dtype` are for, and how tied tensors that one folder alone repeats are treated.

    Raises TailorError: see `tailor.errors` for what each kind means.
    """
    aligned = align(Checkpoint(pretrained), Checkpoint(finetuned), embeddings=embeddings, out_dtype=out_dtype)
    selected = None if scope is None else select(aligned.pretrained, scope)
    changed = changed_tensors(aligned.pretrained, aligned.finetuned, selected)
    require_precision(aligned.pretrained, aligned.finetuned, changed)
    fused = fused_tensors(
        aligned.pretrained,
        aligned.finetuned,
        method,
        scope=scope,
        changed=changed,
        evidence=evidence,
        seed=seed,
        device=device,
        progress=progress,
    )
    return FusionReport.of(method, seed, write_completed(aligned, fused, out, finetuned, max_shard_bytes))


def write_completed(
    aligned: Aligned,
    fused: Iterable[tuple[str, Tensor, TensorReport]],
    out: str | os.PathLike[str],
    like: str | os.PathLike[str],
    max_shard_bytes: int | str = MAX_SHARD_BYTES,
) -> list[TensorReport]:
    """Write a stream of `fused_tensors` as a checkpoint in the fine-tuned layout; returns a row for every tensor."""
    rows = aligned.dropped_rows()
    with CheckpointWriter(out, like, max_shard_bytes, forms=aligned.forms()) as writer:
        for name, tensor, row in aligned.completed(fused):
            writer.write(name, tensor)
            rows.append(row)
            del tensor  # before the next one is made
    return rows


def fuse_to_patch(
    pretrained: Weights,
    finetuned: Weights,
    method: Method,
    *,
    scope: Iterable[str] | None = None,
    changed: Sequence[str] | None = None,
    evidence: Evidence = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> tuple[Patch, FusionReport]:
    """Like `fuse`, but return what fusing changes as a patch of the pretrained weights, and write nothing."""
    rows: list[TensorReport] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor, row in fused_tensors(
            base,
            finetuned,
            method,
            scope=scope,
            changed=changed,
            evidence=evidence,
            seed=seed,
            device=device,
            progress=progress,
        ):
            rows.append(row)
            if row.fate == "fused":
                yield name, tensor

    base = _open(pretrained)
    header = {
        "base": base.folder.name if isinstance(base, Checkpoint) else "",
        "method": type(method).__name__,
        "settings": settings_of(method),
        "seed": seed,
    }
    patch = Patch.between(base, tensors(), header)
    return patch, FusionReport.of(method, seed, rows)


def fused_tensors(
    pretrained: Weights,
    finetuned: Weights,
    method: Method,
    *,
    scope: Iterable[str] | None = None,
    changed: Sequence[str] | None = None,
    evidence: Evidence = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Tensor, TensorReport]]:
    """Yield (name, tensor, report) for every tensor of the checkpoint, on the CPU: the stream that `fuse` writes.

    `changed` are the tensors in scope that differ, if they are known already: to find them takes reading all others.
    """
    _require_evidence(method, evidence)
    base, tuned = _open(pretrained), _open(finetuned)
    require_same_tensors(base, tuned)
    selected = None if scope is None else select(base, scope)
    if changed is None:
        changed = changed_tensors(base, tuned, selected)

    fates: dict[str, Fate] = dict.fromkeys(base, "copied")
    fates.update(dict.fromkeys(selected or (), "kept"))
    fates.update(dict.fromkeys(changed, "fused"))
    for name, fate in fates.items():
        if fate != "fused":
            tensor = base[name]
            yield name, tensor, TensorReport(name, tuple(tensor.shape), fate)
            del tensor

    todo = set(changed)
    sources = (_InScope(base, changed, "pretrained", device), _InScope(tuned, changed, "fine-tuned", device))
    for fused in method.fuse(*sources, evidence, Rng(seed)):
        if fused.name not in todo:
            raise TailorError(f"{type(method).__name__} yielded {fused.name} twice or out of scope; correct the method")
        todo.remove(fused.name)
        name = fused.name
        result, row = _settle(fused, base[name], type(method).__name__)
        del fused
        yield name, result, row
        del result  # before the next one is made
        if progress is not None:
            progress(name)
    if todo:
        raise TailorError(f"{type(method).__name__} left out {', '.join(sorted(todo))}; correct the method")


class _InScope(Mapping[str, Tensor]):
    """What a method sees of a checkpoint: the tensors in scope, on its device, checked for NaN and infinity."""

    def __init__(
        self, weights: Mapping[str, Tensor], names: Sequence[str], whose: str, device: str | torch.device
    ) -> None:
        self._weights, self._names, self._whose, self._device = weights, dict.fromkeys(names), whose, device
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._weights[name]
        if name not in self._checked:
            _require_finite(name, tensor, f"the {self._whose} tensor holds", "repair or replace this checkpoint")
            self._checked.add(name)
        return tensor.detach().to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _settle(fused: Fused, base: Tensor, method: str) -> tuple[Tensor, TensorReport]:
    """The tensor in the base's dtype, with the base's bits off the mask, and its row of the report."""
    name, shape, base = fused.name, tuple(base.shape), base.detach().cpu()
    mask = torch.ones((), dtype=torch.bool).expand(shape) if fused.mask is None else fused.mask.cpu()
    if tuple(fused.tensor.shape) != shape or tuple(mask.shape) != shape or mask.dtype != torch.bool:
        raise TailorError(
            f"{name}: {method} yielded {tuple(fused.tensor.shape)} under a {mask.dtype} mask {tuple(mask.shape)} for "
            f"a tensor {shape}; correct the method"
        )
    result = torch.empty(shape, dtype=base.dtype)
    mask_count = changed_count = 0
    for piece, chosen, after, before in chunks(result, mask, fused.tensor.cpu(), base):
        torch.where(chosen, after.to(base.dtype), before, out=piece)
        changed = bit_patterns(piece) != bit_patterns(before)
        if bool((changed & ~chosen).any()):
            raise TailorError(
                f"{name}: entries changed outside the mask of {method}; this is a defect, please report it"
            )
        mask_count += int(chosen.count_nonzero())
        changed_count += int(changed.count_nonzero())
    _require_finite(name, result, f"fused by {method} and rounded to {base.dtype}, it holds", "check the settings")
    return result, TensorReport(name, shape, "fused", mask_count, changed_count, fused.facts)


def _require_finite(name: str, tensor: Tensor, finding: str, way_out: str) -> None:
    if not is_finite(tensor):
        bad_count = int((~tensor.isfinite()).sum())
        raise NotFinite(f"{name}: {finding} {bad_count} NaN or infinite of {tensor.numel()} entries; {way_out}")


def _require_evidence(method: Method, evidence: Evidence) -> None:
    """Raise TailorError, before anything is read, unless the evidence is of the kind that the method declares."""
    match method.needs:
        case "nothing":
            require_nothing(method, evidence)
        case "grams":
            grams_of(method, evidence)
        case "gradients":
            target_of(method, evidence)


def _open(weights: Weights) -> Mapping[str, Tensor]:
    return weights if isinstance(weights, Mapping) else Checkpoint(weights)
