"""A fused folder is an ordinary checkpoint of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tailor.fuse import fuse
from tailor.methods.wise_ft import WiseFT


@pytest.mark.parametrize("max_shard_bytes", ["5GB", "8KB"])
def test_from_pretrained_loads_what_was_fused(tmp_path: Path, max_shard_bytes: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    torch.manual_seed(0)
    base, tuned = LlamaForCausalLM(config).bfloat16(), LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="10KB")
    fuse(tmp_path / "base", tmp_path / "tuned", WiseFT(1), tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_bytes != "5GB")
    loaded, problems = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(problems.values())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[name]), name
