"""Which tensors may change."""

from __future__ import annotations

import pytest
import torch

from tailor.errors import CheckpointMismatch, ScopeError
from tailor.scope import changed_tensors, select

NAMES = ("model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "model.norm.weight", "projector.bias")


def test_globs_keep_the_order_of_the_names():
    assert select(NAMES, ["projector.*", "model.layers.*"]) == (NAMES[0], NAMES[1], NAMES[3])
    assert select(NAMES, ["*"]) == NAMES
    assert select(NAMES, ["model.layers.?.mlp.weight", "*.mlp.*"]) == NAMES[:2]


def test_a_pattern_in_vain_names_the_closest_tensors():
    with pytest.raises(ScopeError, match=r"'projektor.bias' matches no tensor.*projector\.bias"):
        select(NAMES, ["*", "projektor.bias"])
    with pytest.raises(ScopeError, match="empty"):
        select(NAMES, [])


def test_default_scope_is_what_differs_in_the_finetuned_dtype():
    base = {"same": torch.ones(3), "moved": torch.ones(3), "rounded": torch.tensor([1.0001])}
    tuned = {
        "same": torch.ones(3),
        "moved": torch.tensor([1.0, 1.0, 1.5]),
        "rounded": torch.tensor([1.0001]).bfloat16(),  # only the cast moved it
    }
    assert changed_tensors(base, tuned) == ("moved",)
    assert changed_tensors(base, tuned, ["same"]) == ()


def test_every_disagreement_is_listed():
    base = {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(1)}
    tuned = {"b": torch.ones(3, 2), "c": torch.ones(1), "d": torch.ones(1)}
    with pytest.raises(CheckpointMismatch) as caught:
        changed_tensors(base, tuned)
    message = str(caught.value)
    assert "only in the pretrained: a" in message and "only in the fine-tuned: d" in message
    assert "shape of b: pretrained (2, 3), fine-tuned (3, 2)" in message and "of c" not in message


def test_changed_integers_cannot_be_fused():
    with pytest.raises(ScopeError, match=r"ids: changed, but torch\.int64"):
        changed_tensors({"ids": torch.arange(3)}, {"ids": torch.ones(3, dtype=torch.int64)})
