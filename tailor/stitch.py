"""Stitch several fine-tuned models of one base into one (App. B.2).

Each task chooses its own mask, as if it were alone; the stitched mask is their union. The paper leaves open what an
entry becomes that several tasks chose. With m tasks, and for each entry the mean over the tasks that chose it,

* `paper`: mean of D, plus ΣC / m, where C is each task's own compensation and 0 off its own mask;
* `mean`: mean of D + C, for which finished patches are enough (`stitch_patches`);
* `joint`: the delta on the union that changes all tasks' layer outputs least, weighing the tasks alike.

For tensors without a Gram there is no compensation, and all three are the mean of D. One task alone comes out as its
own fusion, and the order of tasks has no effect: sums over tasks are taken in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tailor.checkpoint import Checkpoint
from tailor.decorate import Decorator, decorate_and_check, layer_error
from tailor.errors import InvalidSetting, NotFinite, PatchError, TailorError, telling_tokens
from tailor.fuse import Weights, fused_tensors
from tailor.method import Evidence, EvidenceKind, Fused, GramEvidence, Rng, difference, grams_of, sees_old_tasks
from tailor.methods.tailor import Tailor, require_a_gram
from tailor.patch import Patch
from tailor.report import FusionReport, TensorReport, settings_of
from tailor.scope import FUSIBLE_DTYPES, changed_tensors, require_same_tensors, select
from tailor.terms import Term, relative_objective, solve_terms

Stitching = Literal["paper", "mean", "joint"]
STITCHINGS: tuple[Stitching, ...] = get_args(Stitching)


def stitch(
    pretrained: Weights,
    finetuned: Sequence[Weights],
    method: Tailor,
    how: Stitching,
    *,
    evidence: Sequence[GramEvidence],
    scope: Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> tuple[Patch, FusionReport]:
    """Stitch `finetuned`, each with its `evidence`, and return what that changes as a patch of the pretrained weights.

    `method` holds the settings by which each task chooses its mask and, for `paper` and `mean`, decorates it; `joint`
    wants its decorator to be `exact`. A task that left a tensor as it was chooses nothing there, but if it has a Gram
    of it, `joint` holds that task's outputs. The other arguments are those of `tailor.fuse.fuse`. Memory is bounded
    by the tasks' versions of the largest tensor and their Grams.

    The report gives the `overlap_count` of entries that several tasks chose, and for each layer, on damped Grams,
    each of the `tasks`' own layer error after rounding to the storage dtype (None where a task changed nothing), and
    the `errors` of all tasks together, which `joint` makes least: what is lost, summed over tasks, over what the full
    deltas do, `stitched` before and `rounded` after rounding.

    Raises InvalidSetting if the arguments do not fit each other, and TailorError: see `tailor.errors`.
    """
    if how not in STITCHINGS:
        raise InvalidSetting(f"stitching: {how!r} is unknown; choose one of {', '.join(STITCHINGS)}")
    if not finetuned or len(finetuned) != len(evidence):
        raise InvalidSetting(
            f"stitching: {len(finetuned)} fine-tuned models with {len(evidence)} sets of Grams; give one for each task"
        )
    require_decorator(how, method.decorator)
    base = _open(pretrained)
    selected = None if scope is None else select(base, scope)
    tasks = tuple(
        _Task.of(base, _open(weights), grams_of(method, grams), selected)
        for weights, grams in zip(finetuned, evidence, strict=True)
    )
    stitching, any_task = _Stitch(tasks, method, how), _AnyTask(base, tasks)
    stream = fused_tensors(base, any_task, stitching, scope=scope, seed=seed, device=device, progress=progress)
    rows: list[TensorReport] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor, row in stream:
            rows.append(row)
            if row.fate == "fused":
                yield name, tensor

    settings = {"how": how, "task_count": len(tasks), **settings_of(method)}
    header = {
        "base": _folder_name(base),
        "method": "stitch",
        "settings": settings,
        "seed": seed,
        "tasks": sorted(_folder_name(task.weights) for task in tasks),
    }
    patch = Patch.between(base, tensors(), header)
    tensors_by_name = tuple(sorted(rows, key=lambda row: row.name))
    return patch, FusionReport("stitch", settings, seed, sees_old_tasks(method), tensors_by_name)


def require_decorator(how: Stitching, decorator: Decorator) -> None:
    """Raise InvalidSetting for `joint` with another decorator than `exact`, which would silently not be used."""
    if how == "joint" and decorator != "exact":
        raise InvalidSetting(
            f"stitching: joint solves for the compensation itself, so the decorator {decorator!r} would not be used; "
            "set it to 'exact'"
        )


def stitch_patches(base: Mapping[str, Tensor], patches: Sequence[Patch]) -> Patch:
    """`mean` from finished patches of `base`: each entry becomes its mean over the patches that change it.

    Patches of disjoint places stack, bit for bit. Each patch must fit the base as it does for `Patch.apply_to`, whose
    PatchError is raised, also for changed tensors that are not of a floating-point dtype. One tensor at a time is read.
    """
    if not patches:
        raise InvalidSetting("stitching: there are no patches; give at least one")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted({name for patch in patches for name in patch.tensors}):
            fused, masks = [], []
            for patch in patches:
                if name in patch.tensors:
                    alone = Patch({name: patch.tensors[name]}, patch.header)
                    fused += [tensor for _, tensor in alone.apply_to(base)]
                    masks.append(_mask_at(patch.tensors[name].indices(), fused[-1]))
            if fused[0].dtype not in FUSIBLE_DTYPES:
                raise PatchError(f"{name}: {fused[0].dtype} entries have no mean; leave this tensor out of the patches")
            mean = _mean_where(masks, fused).to(fused[0].dtype)
            yield name, torch.where(_count(masks) > 0, mean, base[name])

    headers = sorted((dict(patch.header) for patch in patches), key=lambda header: json.dumps(header, sort_keys=True))
    bases = {str(header.get("base", "")) for header in headers}
    made = {"base": bases.pop() if len(bases) == 1 else "", "method": "stitch", "settings": {"how": "mean"}}
    return Patch.between(base, tensors(), {**made, "patches": headers})


@dataclass(frozen=True, eq=False)
class _Task:
    """One fine-tuned model; `changed` are the tensors in scope that its fine-tuning changed."""

    weights: Mapping[str, Tensor]
    grams: GramEvidence
    changed: frozenset[str]

    @classmethod
    def of(
        cls,
        base: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grams: GramEvidence,
        selected: Sequence[str] | None,
    ) -> _Task:
        require_same_tensors(base, weights)
        changed = changed_tensors(base, weights, selected)
        require_a_gram(changed, grams)
        return cls(weights, grams, frozenset(changed))


@dataclass(frozen=True, eq=False)
class _AnyTask(Mapping[str, Tensor]):
    """What the engine takes the scope from: a tensor as the first task has it that changed it, else the base's."""

    base: Mapping[str, Tensor]
    tasks: Sequence[_Task]

    def __getitem__(self, name: str) -> Tensor:
        return next((task.weights for task in self.tasks if name in task.changed), self.base)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


class _Part(NamedTuple):
    """What one task brings to one tensor.

    `compensation`, and the `residual` of its equations if it came from any, are for `paper` and `mean`; `gram` is
    damped, None for none.
    """

    task: _Task
    tuned: Tensor
    delta: Tensor
    mask: Tensor
    compensation: Tensor
    gram: Tensor | None
    residual: float | None = None


@dataclass(frozen=True, eq=False)
class _Stitch:
    """The tasks as one method, so that the engine streams, checks and accounts as it does for all."""

    tasks: Sequence[_Task]
    method: Tailor
    how: Stitching
    needs: ClassVar[EvidenceKind] = "nothing"  # each task has its own

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        for name, base in pretrained.items():
            yield self._stitch_tensor(name, base, rng)

    def _stitch_tensor(self, name: str, base: Tensor, rng: Rng) -> Fused:
        parts = [self._part(number, name, base, rng) for number in range(len(self.tasks))]
        masks = [part.mask for part in parts]
        count = _count(masks)
        union = count > 0
        weight = _mean_where(masks, [part.tuned for part in parts])
        facts: dict[str, Any] = {"overlap_count": int((count > 1).sum())}
        if all(part.gram is None for part in parts):
            return Fused(name, weight.float(), union, facts)

        start = torch.where(union, _mean_where(masks, [part.delta for part in parts]).float(), 0)
        compensation, residual = self._compensation(name, parts, start, union)
        stitched = start + compensation
        fused = (weight + compensation).float()
        rounded = torch.where(union, _change(base, fused, parts), 0)
        facts |= self._facts(name, parts, stitched, rounded) | {"residual": residual}
        return Fused(name, fused, union, facts)

    def _part(self, number: int, name: str, base: Tensor, rng: Rng) -> _Part:
        task, method = self.tasks[number], self.method
        grams = task.grams.calibration
        tuned = task.weights[name].detach().to(base.device)
        bad_count = int((~tuned.isfinite()).sum())
        if bad_count:
            raise NotFinite(
                f"{name}: fine-tuned model {number + 1} holds {bad_count} NaN or infinite of {tuned.numel()} entries; "
                "repair or replace this checkpoint"
            )
        delta = difference(base, tuned)
        nothing = torch.zeros_like(delta)
        if name not in task.changed:  # it chooses nothing, but its outputs count where it has a Gram
            gram = method.damped(grams, name, base) if name in grams else None
            return _Part(task, tuned, delta, nothing.bool(), nothing, gram)
        if name not in grams:
            mask = method.choose_by_salience(name, base, tuned, rng)
            return _Part(task, tuned, delta, mask, nothing, None)
        with telling_tokens(grams.token_count(name)):
            layer = method.choose(name, base, tuned, grams, rng)
            if self.how == "joint":
                return _Part(task, tuned, delta, layer.mask, nothing, layer.gram)
            decorated, residual = decorate_and_check(
                delta,
                layer.mask,
                layer.gram,
                method.decorator,
                name=name,
                factor=layer.factor,
                precision=method.precision,
            )
        compensation = torch.where(layer.mask, decorated - delta, 0)
        return _Part(task, tuned, delta, layer.mask, compensation, layer.gram, residual)

    def _compensation(
        self, name: str, parts: Sequence[_Part], start: Tensor, union: Tensor
    ) -> tuple[Tensor, float | None]:
        """The compensation of the stitched delta, and the largest residual of the equations behind it."""
        if self.how == "joint":
            for number, part in enumerate(parts, start=1):
                if part.gram is None and name in part.task.changed:
                    raise TailorError(
                        f"{name}: fine-tuned model {number} changed it, but has no Gram of it where others have one; "
                        "calibrate all tasks for the same layers"
                    )
            with telling_tokens(_token_count(name, parts)):
                compensation, residual = solve_terms(_terms(parts), start, union, name, self.method.precision)
            best = start + compensation
            return torch.where(union, best - start, 0), residual
        compensations = [part.compensation for part in parts]
        largest = max((part.residual for part in parts if part.residual is not None), default=None)
        if self.how == "mean":
            return torch.where(union, _mean_where([part.mask for part in parts], compensations).float(), 0), largest
        everywhere = [torch.ones_like(union)] * len(parts)  # App. B.2 divides by the number of tasks at every entry
        return _mean_where(everywhere, compensations).float(), largest

    def _facts(self, name: str, parts: Sequence[_Part], stitched: Tensor, rounded: Tensor) -> dict[str, Any]:
        with_gram = [part for part in parts if part.gram is not None]
        terms_on = {"calibration": _terms(parts)}
        held_out = [(part, part.task.grams.held_out) for part in with_gram]
        if all(grams is not None and name in grams for _, grams in held_out):
            terms_on["held_out"] = [
                Term(part.delta, self.method.damped(grams, name, part.delta)) for part, grams in held_out if grams
            ]
        return {
            "token_count": _token_count(name, parts),
            "errors": {
                tokens: {
                    "stitched": relative_objective(terms, stitched),
                    "rounded": relative_objective(terms, rounded),
                }
                for tokens, terms in terms_on.items()
            },
            "tasks": [
                {
                    "mask_count": int(part.mask.sum()),
                    "error": layer_error(part.delta, rounded, part.gram)
                    if part.gram is not None and name in part.task.changed
                    else None,
                }
                for part in parts
            ],
        }


def _terms(parts: Sequence[_Part]) -> list[Term]:
    return [Term(part.delta, part.gram) for part in parts if part.gram is not None]


def _token_count(name: str, parts: Sequence[_Part]) -> int:
    return sum(part.task.grams.calibration.token_count(name) for part in parts if part.gram is not None)


def _change(base: Tensor, fused: Tensor, parts: Sequence[_Part]) -> Tensor:
    """What is left of the stitched delta after rounding to the base's dtype; it counts from where the deltas count."""
    dtype = reduce(torch.promote_types, (part.tuned.dtype for part in parts))
    return fused.to(base.dtype).float() - base.to(dtype).float()


def _count(masks: Sequence[Tensor]) -> Tensor:
    return torch.stack([mask.to(torch.int32) for mask in masks]).sum(0)


def _mean_where(masks: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Each entry's mean, in float64, over the tensors whose mask is True there; zero where none is."""
    total = torch.full(masks[0].shape, -0.0, dtype=torch.float64, device=masks[0].device)  # -0 + x is x, even for -0
    for mask, tensor in zip(masks, tensors, strict=True):
        total = torch.where(mask, total + tensor, total)
    return total / _count(masks).clamp(min=1)


def _mask_at(indices: Tensor, tensor: Tensor) -> Tensor:
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[indices] = True
    return mask.view(tensor.shape).to(tensor.device)


def _open(weights: Weights) -> Mapping[str, Tensor]:
    return weights if isinstance(weights, Mapping) else Checkpoint(weights)


def _folder_name(weights: Mapping[str, Tensor]) -> str:
    return weights.folder.name if isinstance(weights, Checkpoint) else ""
