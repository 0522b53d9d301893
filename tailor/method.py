"""What a method is: an immutable value with one verb, the evidence that it asks for, and what it yields."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tailor.errors import InvalidSetting, TailorError
from tailor.gram import Grams

EvidenceKind = Literal["nothing", "grams", "gradients"]


@dataclass(frozen=True, eq=False)
class GramEvidence:
    """Undamped Grams of layer inputs.

    `calibration` and `held_out` are of the target task: to calibrate on, and others on which errors are reported too.
    `retain` is of samples of old tasks, or general-purpose ones, run through the pretrained model; only a method that
    `sees_old_tasks` may be given it. With `is_share`, the scope is one of several shares of a fusion, and may well hold
    no layer that has a Gram; otherwise that is an error.
    """

    calibration: Grams
    held_out: Grams | None = None
    retain: Grams | None = None
    is_share: bool = False


@runtime_checkable
class TargetTask(Protocol):
    """The target task as a function of the weights in scope (float32 or storage dtype), the rest being pretrained."""

    def gradient(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradient of the mean target loss at these weights, for each of them."""
        ...

    def score(self, weights: Mapping[str, Tensor]) -> float:
        """Target score at these weights on training plus development data; higher is better."""
        ...


Evidence = GramEvidence | TargetTask | None


class Fused(NamedTuple):
    """One fused tensor.

    `tensor` may be float32; the engine rounds it to the base's dtype and keeps the base's bits off `mask` (None: all
    True). `facts` go into the report as they are (JSON-ready): `token_count`, `errors`, `residual`, `flipped_count`.
    """

    name: str
    tensor: Tensor
    mask: Tensor | None
    facts: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Rng:
    """Randomness by name: what a tensor draws depends on run seed and name, never on the order of work."""

    run_seed: int = 0

    def seed(self, name: str) -> int:
        """A non-negative 63-bit seed: the head of sha256 over run seed and name."""
        digest = hashlib.sha256(f"{self.run_seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator seeded for the name, so that draws are the same whatever device they are moved to."""
        return torch.Generator().manual_seed(self.seed(name))


class Method(Protocol):
    """A fusion method: a frozen dataclass whose fields are its hyperparameters.

    One that learns from samples of old tasks says so by a class variable, `sees_old_tasks = True`: it competes with
    more knowledge than the others, and results must show that. One for which a tensor's outcome depends on what else is
    in scope (a ranking over all, say) has `is_separable = False`. Others need not mention either.
    """

    needs: ClassVar[EvidenceKind]

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield each tensor once, in any order.

        Both mappings hold the tensors in scope, under the same names, in their storage dtypes; reading an entry may
        read a file. They are never modified.
        """
        ...


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """The delta in float32, taken after casting the base to the fine-tuned dtype."""
    return tuned.float() - base.to(tuned.dtype).float()


def sees_old_tasks(method: object) -> bool:
    """Whether the method learns from samples of old tasks, and not from the target task alone."""
    return bool(getattr(method, "sees_old_tasks", False))


def is_separable(method: object) -> bool:
    """Whether fusing disjoint scopes one by one gives the tensors that fusing their union gives."""
    return bool(getattr(method, "is_separable", True))


def grams_of(method: Method, evidence: Evidence) -> GramEvidence:
    """The evidence as Grams. Raises TailorError if it is something else.

    Grams to retain must be there for a method that `sees_old_tasks`, and may not be for any other: it would silently
    ignore them.
    """
    name = type(method).__name__
    if not isinstance(evidence, GramEvidence):
        raise TailorError(f"{name} needs Grams of the target task; calibrate, and pass GramEvidence")
    if sees_old_tasks(method) and evidence.retain is None:
        raise TailorError(
            f"{name} needs Grams of samples to retain, run through the pretrained model; pass them as "
            "GramEvidence.retain"
        )
    if evidence.retain is not None and not sees_old_tasks(method):
        raise TailorError(f"{name} uses no samples of old tasks; pass GramEvidence without `retain`")
    return evidence


def target_of(method: Method, evidence: Evidence) -> TargetTask:
    """The evidence as a target task. Raises TailorError if it is something else."""
    if isinstance(evidence, GramEvidence) or not isinstance(evidence, TargetTask):
        raise TailorError(f"{type(method).__name__} needs gradients of the target loss; pass a TargetTask")
    return evidence


def require_nothing(method: Method, evidence: Evidence) -> None:
    """Raise TailorError if there is evidence: a method that takes none would silently ignore it."""
    if evidence is not None:
        raise TailorError(f"{type(method).__name__} uses no evidence of the target task; pass none")


def require_between(method: object, name: str, low: float, high: float) -> None:
    """Raise InvalidSetting unless the method's field is a number in [low, high]."""
    value = getattr(method, name)
    if not (isinstance(value, int | float) and low <= value <= high):
        raise InvalidSetting(f"{type(method).__name__}.{name} = {value!r} is outside [{low:g}, {high:g}]")


def require_count(method: object, name: str) -> None:
    """Raise InvalidSetting unless the method's field is a whole number, 0 or more."""
    value = getattr(method, name)
    if not (isinstance(value, int) and value >= 0):
        raise InvalidSetting(f"{type(method).__name__}.{name} = {value!r} is not a whole number of 0 or more")


def require_one_of(method: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise InvalidSetting unless the method's field is one of the choices."""
    value = getattr(method, name)
    if value not in choices:
        raise InvalidSetting(f"{type(method).__name__}.{name} = {value!r} is none of {', '.join(choices)}")
