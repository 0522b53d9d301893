"""What can be wrong with given checkpoints, samples and settings: one message each, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments import fuse_checks
from experiments.errors import ArtifactError, ConfigError, ModelError
from tailor.checkpoint import Checkpoint
from tailor.errors import CheckpointError, CheckpointMismatch, PrecisionLoss, ScopeError
from tests.experiments.pairs import Fuse, Pair, make_pair, write_samples
from tests.experiments.test_command_line import command


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def own(llama: Pair, tmp_path: Path) -> Pair:
    """A copy to damage."""
    shutil.copytree(llama.pretrained.parent, tmp_path / "own")
    return Pair("llama", *(tmp_path / "own" / name for name in ("pretrained", "finetuned", "samples/samples.jsonl")))


def test_from_the_command_line_it_is_one_message_and_exit_code_1(llama: Pair, tmp_path: Path) -> None:
    done = command("experiments.fuse", *llama.arguments, f"out={tmp_path / 'out'}", home=tmp_path / "home")
    assert done.returncode == 1
    assert "calibration.data=None: this baseline needs samples of the target task" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
    (manifest,) = (tmp_path / "home").glob("fuses/*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity=2", r"sparsity=2\.0 is outside \[0, 1\]"),
        ("dtype=int8", "dtype=int8 is none of auto, float32"),
        ("threads=0", "threads=0 is less than 1"),
        ("out=null", "neither out nor patch is set"),
        ("finetuned=[a,b]", "2 given, and this baseline takes one"),
        ("finetuned=[]", "finetuned=.* is neither a text nor a list of texts"),
        ("+sparcity=1", "sparcity"),
        ("calibration.samples=0", "samples: 0 is not a whole number of at least 1"),
        ("calibration.inputs=both", "inputs: 'both' is not one of finetuned, sequential"),
        ("calibration.data=chess", "chess: is neither a file nor a task of conf/task"),
        ("device=tpu", "device=tpu: .* choose cpu or a device of this machine"),
    ],
)
def test_settings(llama: Pair, fuse: Fuse, tmp_path: Path, override: str, message: str) -> None:
    samples = f"calibration.data={llama.samples}"
    with pytest.raises(ConfigError, match=message):
        fuse(*llama.arguments, samples, f"out={tmp_path / 'out'}", override)
    assert not (tmp_path / "out").exists()


def test_samples_of_old_tasks_are_neither_missing_nor_ignored(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    settings = (*llama.arguments, f"calibration.data={llama.samples}", f"out={tmp_path / 'out'}")
    with pytest.raises(ConfigError, match="retain: this baseline uses no samples of old tasks"):
        fuse(*settings, f"calibration.retain={llama.samples}")
    with pytest.raises(ConfigError, match="retain: this baseline needs samples of old tasks"):
        fuse(*settings, "baseline=tailor_two_sided")


def test_an_output_that_exists_is_left_alone(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out: already exists"):
        fuse(*llama.arguments, "baseline=dare", f"out={tmp_path / 'out'}")
    (tmp_path / "patch").write_text("mine")
    with pytest.raises(CheckpointError, match="patch: already exists"):
        fuse(*llama.arguments, "baseline=dare", f"patch={tmp_path / 'patch'}")
    assert (tmp_path / "patch").read_text() == "mine"


def test_a_disk_without_room_is_told_before_work_begins(
    llama: Pair, fuse: Fuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fuse_checks.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ArtifactError, match=r"out: needs 0\.0 GB, and .* has 0\.0 GB free"):
        fuse(*llama.arguments, "baseline=dare", f"out={tmp_path / 'out'}")


def test_a_tensor_of_one_checkpoint_only(own: Pair, fuse: Fuse, tmp_path: Path) -> None:
    tensors = dict(Checkpoint(own.finetuned))
    del tensors["model.norm.weight"]
    save_file(tensors, own.finetuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"only in the pretrained: model\.norm\.weight"):
        fuse(*own.arguments, "baseline=dare", f"out={tmp_path / 'out'}")


def test_a_truncated_file(own: Pair, fuse: Fuse, tmp_path: Path) -> None:
    weights = own.finetuned / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"finetuned/model\.safetensors: not a whole safetensors file"):
        fuse(*own.arguments, "baseline=dare", f"out={tmp_path / 'out'}")


def test_a_dtype_that_loses_the_delta(own: Pair, fuse: Fuse, tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in Checkpoint(own.pretrained).items()}
    save_file(base, own.pretrained / "model.safetensors", {"format": "pt"})
    tuned = {name: tensor.float() * (1 + 2**-11) for name, tensor in base.items()}
    save_file(tuned, own.finetuned / "model.safetensors", {"format": "pt"})
    settings = (*own.arguments, "baseline=magnitude", f"out={tmp_path / 'out'}")
    with pytest.raises(PrecisionLoss, match=r"bfloat16 of the pretrained checkpoint .* out_dtype=finetuned"):
        fuse(*settings)
    totals = fuse(*settings, "out_dtype=finetuned").report["totals"]
    assert totals["changed_fraction"] == pytest.approx(0.1, abs=0.01)


def test_a_scope_that_matches_nothing(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    with pytest.raises(ScopeError, match=r"'model\.layer\.\*' matches no tensor; the closest names are"):
        fuse(*llama.arguments, "baseline=dare", f"out={tmp_path / 'out'}", "scope=[model.layer.*]")


def test_a_kind_of_model_that_cannot_be_calibrated(own: Pair, fuse: Fuse, tmp_path: Path) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (own.pretrained / "config.json").write_text(json.dumps(config))
    settings = (*own.arguments, f"calibration.data={own.samples}", f"out={tmp_path / 'out'}")
    with pytest.raises(ModelError, match=r"model_type 't5' .* none that can be calibrated"):
        fuse(*settings)
    fuse(*settings, "baseline=dare")  # which needs no model class


def test_a_model_of_another_family_than_named(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    settings = (*llama.arguments, f"calibration.data={llama.samples}", f"out={tmp_path / 'out'}")
    with pytest.raises(ModelError, match="is of model_type 'llama', not 'llava'"):
        fuse(*settings, "model=digits_llava")


def test_a_folder_without_its_tokenizer(own: Pair, fuse: Fuse, tmp_path: Path) -> None:
    for path in own.finetuned.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="finetuned: can't be read as a model"):
        fuse(*own.arguments, f"calibration.data={own.samples}", f"out={tmp_path / 'out'}")


def test_samples_with_images_for_a_language_model(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples", 2, with_image=True)
    with pytest.raises(ModelError, match="reads no images"):
        fuse(*llama.arguments, f"calibration.data={samples}", f"out={tmp_path / 'out'}")


def test_lora_adapters_of_another_model(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    settings = (f"pretrained={llama.pretrained}", f"finetuned={adapters}", "baseline=dare", f"out={tmp_path / 'out'}")
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        fuse(*settings)
    layer = "base_model.model.transformer.h.0.q_proj"
    stored = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    save_file(stored, adapters / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="2 adapters belong to no module of"):
        fuse(*settings)
    assert not (tmp_path / "out").exists()
