"""Checkpoints brought to the same tensors: ties, grown vocabularies, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailor.align import Only, align, require_precision
from tailor.errors import CheckpointMismatch, InvalidSetting, PrecisionLoss
from tailor.fuse import fused_tensors
from tailor.methods.dare import Dare
from tailor.methods.finetune import FineTune
from tailor.report import TensorReport

EMBEDDING = torch.arange(6.0).reshape(3, 2)


def checkpoint(shift: float, **more: Tensor) -> dict[str, Tensor]:
    return {"embed": EMBEDDING + shift, "norm": torch.ones(2) + shift, **more}


def complete(base: dict[str, Tensor], tuned: dict[str, Tensor], **settings: str) -> tuple[dict, list[TensorReport]]:
    aligned = align(base, tuned, **settings)
    stream = list(aligned.completed(fused_tensors(aligned.pretrained, aligned.finetuned, FineTune())))
    return {name: tensor for name, tensor, _ in stream}, [row for *_, row in stream] + aligned.dropped_rows()


def test_a_duplicate_of_the_fine_tuned_checkpoint_gets_the_fused_tensor() -> None:
    base, tuned = checkpoint(0), checkpoint(1, head=EMBEDDING + 1)
    fused, rows = complete(base, tuned)
    assert torch.equal(fused["head"], EMBEDDING + 1)
    assert {row.name: row.fate for row in rows} == {"embed": "fused", "norm": "fused", "head": "tied"}
    assert next(row for row in rows if row.fate == "tied").facts == {"tied_to": "embed"}


def test_a_duplicate_of_the_pretrained_checkpoint_alone_is_accounted_for() -> None:
    base, tuned = checkpoint(0, head=EMBEDDING.clone()), checkpoint(1)
    fused, rows = complete(base, tuned)
    assert set(fused) == {"embed", "norm"}
    assert [row.name for row in rows if row.fate == "tied"] == ["head"]


def test_a_tensor_of_one_checkpoint_that_equals_no_other_is_refused() -> None:
    with pytest.raises(CheckpointMismatch, match="only in the fine-tuned: head"):
        align(checkpoint(0), checkpoint(1, head=EMBEDDING))
    # A bias of zeros equals other biases of zeros, which ties nothing.
    with pytest.raises(CheckpointMismatch, match="only in the fine-tuned: bias"):
        align(
            {**checkpoint(0), "other": torch.zeros(2)},
            {**checkpoint(1), "other": torch.zeros(2), "bias": torch.zeros(2)},
        )


def test_added_rows_are_refused_or_kept() -> None:
    base = checkpoint(0)
    tuned = {**checkpoint(1), "embed": torch.cat([EMBEDDING + 1, torch.tensor([[8.0, 9.0]])])}
    with pytest.raises(CheckpointMismatch, match="embed has rows 3 to 3 more; embeddings=keep_finetuned_rows"):
        align(base, tuned)
    fused, rows = complete(base, tuned, embeddings="keep_finetuned_rows")
    assert torch.equal(fused["embed"], tuned["embed"])
    assert next(row for row in rows if row.name == "embed").facts["added_row_count"] == 1


@pytest.mark.parametrize(
    "embed",
    [torch.zeros(2, 2), torch.zeros(4, 3), torch.zeros(4)],
    ids=["fewer rows", "more columns too", "another number of dimensions"],
)
def test_other_shapes_are_a_mismatch(embed: Tensor) -> None:
    with pytest.raises(CheckpointMismatch, match="shape of embed"):
        align(checkpoint(0), {**checkpoint(1), "embed": embed}, embeddings="keep_finetuned_rows")


def test_growth_by_different_numbers_of_rows_is_a_mismatch() -> None:
    tuned = {"embed": torch.zeros(5, 2), "norm": torch.zeros(3)}
    with pytest.raises(CheckpointMismatch, match="shape of embed"):
        align(checkpoint(0), tuned, embeddings="keep_finetuned_rows")


def test_the_result_may_take_the_fine_tuned_dtype() -> None:
    base = {name: tensor.bfloat16() for name, tensor in checkpoint(0).items()}
    fused, _ = complete(base, checkpoint(2**-12), out_dtype="finetuned")
    assert torch.equal(fused["norm"], torch.ones(2) + 2**-12)


def test_a_dtype_that_cannot_hold_the_change_is_told() -> None:
    base = {"norm": torch.ones(4, dtype=torch.bfloat16)}
    with pytest.raises(PrecisionLoss, match=r"bfloat16.*norm.*75%.*out_dtype=finetuned"):
        require_precision(base, {"norm": torch.tensor([1 + 2**-12] * 3 + [2.0])}, ["norm"])
    require_precision(base, {"norm": torch.tensor([1 + 2**-12] + [2.0] * 3)}, ["norm"])
    # A coarser fine-tuned dtype loses nothing more, and equal dtypes nothing at all.
    require_precision({"norm": torch.ones(4)}, {"norm": torch.full((4,), 2.0).half()}, ["norm"])


@pytest.mark.parametrize("setting", [{"embeddings": "drop"}, {"out_dtype": "int8"}])
def test_unknown_settings_are_refused(setting: dict[str, str]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(setting))):
        align(checkpoint(0), checkpoint(1), **setting)


def test_a_view_of_some_tensors_holds_no_others() -> None:
    view = Only(checkpoint(0), ["norm"])
    assert (list(view), len(view), "norm" in view, "embed" in view) == (["norm"], 1, True, False)
    with pytest.raises(KeyError):
        view["embed"]


def test_a_head_that_both_saved_beside_its_embeddings_is_one_tensor_with_them() -> None:
    def tied(shift: float) -> dict[str, Tensor]:
        return {"embed_tokens": EMBEDDING + shift, "lm_head": EMBEDDING + shift}

    aligned = align(tied(0), tied(1))
    stream = aligned.completed(fused_tensors(aligned.pretrained, aligned.finetuned, Dare(sparsity=0.5)))
    fused = {name: tensor for name, tensor, _ in stream}
    assert torch.equal(fused["lm_head"], fused["embed_tokens"])
    assert not aligned.copies.keys() - {"lm_head"}
    assert not align(tied(0), {**tied(1), "lm_head": EMBEDDING}).copies  # untied by fine-tuning
