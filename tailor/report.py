"""The account of a fusion: what became of every tensor, and the totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from tailor.method import Method, sees_old_tasks

Fate = Literal["fused", "kept", "copied", "tied"]


@dataclass(frozen=True)
class TensorReport:
    """One tensor.

    `fate`: `fused` by the method, `kept` (in scope, but fine-tuning left it as it was), `copied` from the pretrained
    checkpoint, or `tied` to another tensor of which one checkpoint saved a duplicate, and counted there. `mask_count`
    entries were chosen, of which `changed_count` differ from the base in their bits. `facts` are the method's:
    `token_count`, `errors`, `residual`, `flipped_count`.
    """

    name: str
    shape: tuple[int, ...]
    fate: Fate
    mask_count: int = 0
    changed_count: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """A flat row; `token_count`, `errors` and `residual` are always there, None where they do not apply."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "fate": self.fate,
            "numel": self.numel,
            "mask_count": self.mask_count,
            "changed_count": self.changed_count,
            "token_count": None,
            "errors": None,
            "residual": None,
            **self.facts,
        }


@dataclass(frozen=True)
class FusionReport:
    """Method, settings and seed of a fusion, and a row for each tensor of the checkpoint, sorted by name.

    `sees_old_tasks` marks a method that learnt from samples of old tasks besides those of the target.
    """

    method: str
    settings: Mapping[str, Any]
    seed: int
    sees_old_tasks: bool
    tensors: tuple[TensorReport, ...]

    @classmethod
    def of(cls, method: Method, seed: int, tensors: Iterable[TensorReport]) -> FusionReport:
        """The report on a method's run."""
        rows = tuple(sorted(tensors, key=lambda row: row.name))
        return cls(type(method).__name__, settings_of(method), seed, sees_old_tasks(method), rows)

    @property
    def totals(self) -> dict[str, Any]:
        """Counts over all tensors, their shares of the parameters in scope, and the largest residual of any layer."""
        in_scope = [row for row in self.tensors if row.fate in ("fused", "kept")]
        scope_count = sum(row.numel for row in in_scope)
        mask_count = sum(row.mask_count for row in in_scope)
        changed_count = sum(row.changed_count for row in in_scope)
        residuals = [residual for row in in_scope if (residual := row.facts.get("residual")) is not None]
        return {
            "parameter_count": sum(row.numel for row in self.tensors if row.fate != "tied"),
            "scope_count": scope_count,
            "mask_count": mask_count,
            "changed_count": changed_count,
            "flipped_count": sum(row.facts.get("flipped_count", 0) for row in in_scope),
            "mask_fraction": mask_count / scope_count if scope_count else 0.0,
            "changed_fraction": changed_count / scope_count if scope_count else 0.0,
            "tensor_counts": {fate: sum(row.fate == fate for row in self.tensors) for fate in get_args(Fate)},
            "gram_tensor_count": sum("token_count" in row.facts for row in in_scope),
            "largest_residual": max(residuals, default=None),
        }

    def decorator_order(self, tokens: str = "calibration") -> dict[str, int] | None:
        """In how many layers one decorator errs no more than another; None unless all three were compared.

        `tokens` is `calibration` or `held_out`.
        """
        compared = [
            errors
            for row in self.tensors
            if {"none", "sparsegpt", "exact"} <= (errors := row.facts.get("errors", {}).get(tokens, {})).keys()
        ]
        if not compared:
            return None
        pairs = (("exact", "sparsegpt"), ("sparsegpt", "none"), ("exact", "none"))
        counts = {f"{low}<={high}": sum(e[low] <= e[high] for e in compared) for low, high in pairs}
        return {"layer_count": len(compared), **counts}

    def to_json(self) -> dict[str, Any]:
        """A plain dict of JSON types."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "seed": self.seed,
            "sees_old_tasks": self.sees_old_tasks,
            "totals": self.totals,
            "decorator_order": {tokens: self.decorator_order(tokens) for tokens in ("calibration", "held_out")},
            "tensors": [row.to_json() for row in self.tensors],
        }


def settings_of(method: Method) -> dict[str, Any]:
    """The method's fields as JSON types."""
    values = asdict(method)  # type: ignore[call-overload]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
