"""The whole pipeline on the CPU at its smallest: every stage, every baseline, both models, all targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evaluation.records import read_predictions
from experiments.errors import ArtifactError, ConfigError, TrainingError
from experiments.pipeline import CHECKPOINT, run
from experiments.runs import MANIFEST, Run, read_run, recorded
from experiments.stages.fuse import PATCH, REPORT
from tailor.checkpoint import Checkpoint
from tailor.errors import ScopeError, SingularGram
from tailor.patch import Patch
from tests.experiments.conftest import ROOT, SMALL, RunSmall, parts_of

# Those that stitch take several tasks: test_several_targets.py.
BASELINES = sorted(path.stem for path in (ROOT / "conf/baseline").glob("*.yaml") if "stitch" not in path.stem)
PAIRS = [
    ("digits_llava", "digits_flickr"),
    ("digits_llava", "digits_okvqa"),
    ("digits_instructblip", "digits_flickr"),
    ("digits_instructblip", "digits_gqa"),
]
EXTRA = {"grafting": ["baseline.steps=1"]}
NO_PROJECTOR = ["baseline.reset=[]", "baseline.keep_finetuned=[]"]  # nor a trained head


def stages(run: Run) -> dict[str, dict]:
    return run.manifest["stages"]


def checkpoint(run: Run, home: Path, stage: str) -> Checkpoint:
    return Checkpoint(home / "artifacts" / stage / stages(run)[stage]["key"] / CHECKPOINT)


def report(run: Run) -> dict:
    return json.loads((run.folder / REPORT).read_text())


@pytest.mark.parametrize(("model", "task"), PAIRS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_on_every_model_and_target(
    run_small: RunSmall, home: Path, model: str, task: str, baseline: str
) -> None:
    extra = (
        ["baseline.reset=[]", "baseline.keep_finetuned=[]"]
        if (baseline, model) == ("released_code", "digits_instructblip")
        else []
    )
    run = run_small(model, task, f"baseline={baseline}", *EXTRA.get(baseline, []), *extra)
    assert run.finished

    pretrained, targets, summary = run.scores()
    assert (len(pretrained), len(targets)) == (8, 1)
    assert all(score.count == 5 for score in (*pretrained, *targets))
    assert {"average", "h_score"} == summary.keys()
    for score in (*pretrained, *targets):
        predictions = read_predictions(run.folder / "predictions" / f"{score.benchmark}.jsonl")
        assert len(predictions) == 5
        assert score.generation["max_new_tokens"] >= 4
        assert score.prompt
        assert score.rule

    if baseline == "zero_shot":
        assert "finetuned" not in stages(run), "the pretrained model is there without fine-tuning it"
        assert report(run)["totals"]["changed_count"] == 0
        return
    base, finetuned = checkpoint(run, home, "base"), checkpoint(run, home, "finetuned")
    rows = {row["name"]: row for row in report(run)["tensors"]}
    assert set(rows) == set(base), "the report accounts for every tensor"
    changed_by_training = {name for name in base if not torch.equal(base[name], finetuned[name])}
    assert {name for name, row in rows.items() if row["fate"] == "fused"} == changed_by_training
    assert all(row["changed_count"] <= row["mask_count"] for row in rows.values())

    if baseline == "finetune":
        assert not (run.folder / PATCH).exists(), "a whole checkpoint needs no patch"
        return
    patch = Patch.load(run.folder / PATCH)
    for name, tensor in patch.apply_to(base):
        assert int((tensor != base[name]).sum()) == rows[name]["changed_count"]
    assert sum(row["changed_count"] for row in rows.values()) == patch.changed_count
    if baseline.startswith(("tailor", "magnitude")):
        for name in changed_by_training:
            assert rows[name]["mask_count"] == round(0.1 * base[name].numel()), name


@pytest.mark.parametrize("model", ["digits_llava", "digits_instructblip"])
def test_the_exact_decorator_is_the_optimum_on_every_layer(run_small: RunSmall, model: str) -> None:
    run = run_small(model, "digits_flickr", "baseline=tailor_exact")
    layers = [row for row in report(run)["tensors"] if row["errors"]]
    assert len(layers) > 10
    for row in layers:
        errors = row["errors"]["calibration"]
        assert errors["exact"] <= min(errors["none"], errors["sparsegpt"]) + 1e-6, row["name"]
        assert row["errors"]["held_out"].keys() == errors.keys()
        assert row["token_count"] > 0
    assert report(run)["decorator_order"]["calibration"]["exact<=none"] == len(layers)


def test_a_second_run_repeats_no_stage_and_gives_the_same_bytes(run_small: RunSmall) -> None:
    first, again = (run_small("digits_llava", "digits_flickr", "baseline=tailor") for _ in range(2))
    assert all(stage["reused"] for stage in stages(again).values())
    assert (first.folder / "scores.json").read_bytes() == (again.folder / "scores.json").read_bytes()


def test_a_sweep_fine_tunes_and_calibrates_once(run_small: RunSmall) -> None:
    run_small("digits_llava", "digits_flickr", "baseline=tailor")
    for override in ("sparsity=0.02", "omega=0.9", "calibration.damping=0.1"):
        swept = stages(run_small("digits_llava", "digits_flickr", "baseline=tailor", override))
        assert {name for name, stage in swept.items() if not stage["reused"]} <= {
            "fused",
            *(name for name in swept if name.startswith("answers/")),
        }
        assert not swept["fused"]["reused"]


def test_the_base_and_its_answers_serve_every_target_and_seed(run_small: RunSmall) -> None:
    first = stages(run_small("digits_llava", "digits_flickr", "baseline=zero_shot"))
    other = stages(run_small("digits_llava", "digits_okvqa", "baseline=zero_shot", "seed=7"))
    assert other["base"] == first["base"] | {"reused": True}
    assert all(stage["reused"] for name, stage in other.items() if name.startswith("answers/") and "fruit" not in name)


def test_two_builds_from_nothing_give_the_same_table(run_small: RunSmall, tmp_path: Path) -> None:
    runs = [run_small("digits_llava", "digits_flickr", "baseline=tailor", f"home={tmp_path / name}") for name in "ab"]
    assert not any(stage["reused"] for run in runs for stage in stages(run).values())
    first, second = ((run.folder / "scores.json").read_bytes() for run in runs)
    assert first == second
    assert (runs[0].folder / PATCH).read_bytes() == (runs[1].folder / PATCH).read_bytes()


def test_a_run_into_the_folder_of_another_spares_the_artifacts(home: Path, tmp_path: Path) -> None:
    patches = []
    for seed in (0, 1, 0):
        settings = ["baseline=dare", *SMALL, f"home={home}", f"seed={seed}"]
        parts = parts_of(*settings)
        with recorded(tmp_path, seed=seed, choices=dict(parts.choices), overrides=[]) as record:
            run(parts, tmp_path, record)
        patches.append((tmp_path / PATCH).read_bytes())
    assert patches[0] == patches[2] != patches[1]


def test_zero_shot_leaves_no_patch_of_an_earlier_run(home: Path, tmp_path: Path) -> None:
    for baseline in ("dare", "zero_shot"):
        parts = parts_of(f"baseline={baseline}", *SMALL, f"home={home}")
        with recorded(tmp_path, seed=0, choices=dict(parts.choices), overrides=[]) as record:
            run(parts, tmp_path, record)
        assert (tmp_path / PATCH).exists() == (baseline == "dare")


@pytest.mark.parametrize("model", ["digits_llava", "digits_instructblip"])
def test_fused_models_answer_in_bfloat16(run_small: RunSmall, model: str) -> None:
    whole = run_small(model, "digits_flickr", "baseline=tailor")
    half = run_small(model, "digits_flickr", "baseline=tailor", "dtype=bfloat16")
    assert half.finished
    assert stages(half)["fused"] == stages(whole)["fused"] | {"reused": True}
    assert stages(half)["answers/colour"]["key"] != stages(whole)["answers/colour"]["key"]


def test_fine_tuning_leaves_what_it_does_not_train(run_small: RunSmall, home: Path) -> None:
    run = run_small("digits_llava", "digits_flickr", "baseline=finetune")
    base, finetuned = checkpoint(run, home, "base"), checkpoint(run, home, "finetuned")
    changed = {name for name in base if not torch.equal(base[name], finetuned[name])}
    assert "language_model.lm_head.weight" in changed
    assert "multi_modal_projector.linear_1.weight" in changed
    assert not any(name.startswith("vision_tower") or ".layers.0." in name for name in changed)
    assert {path.name for path in finetuned.folder.iterdir()} == {path.name for path in base.folder.iterdir()}


def test_instructblip_trains_the_scope_of_the_paper(run_small: RunSmall, home: Path) -> None:
    run = run_small("digits_instructblip", "digits_gqa", "baseline=finetune")
    base, finetuned = checkpoint(run, home, "base"), checkpoint(run, home, "finetuned")
    changed = {name for name in base if not torch.equal(base[name], finetuned[name])}
    assert {"query_tokens", "language_projection.weight", "vision_model.post_layernorm.weight"} <= changed
    assert all(
        name.startswith(("qformer.", "query_tokens", "language_projection.", "vision_model.post_layernorm."))
        for name in changed
    )


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("training.scope=[language_model.no_such.*]", ScopeError, "no_such"),
        ("training.learning_rate=1e30", TrainingError, "fine-tuning, step .*lower training.learning_rate"),
        ("calibration.samples=1000", ConfigError, "calibration.samples=1000: there are 24 rows"),
        ("calibration.held_out=7", ConfigError, "calibration.held_out=7: there are 6 rows"),
        ("calibration.damping=0", SingularGram, "damping"),
        ("task.test.benchmark.name=colour", ConfigError, "colour stands twice"),
        ("device=abacus", ConfigError, "device=abacus: .*choose cpu"),
    ],
)
def test_a_failed_run_says_why_and_is_marked(
    run_small: RunSmall, tmp_path: Path, override: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_small("digits_llava", "digits_flickr", "baseline=tailor", override)
    run = read_run(tmp_path / "run0")
    assert run.manifest["status"] == "failed"
    assert "Traceback" not in run.manifest["error"]
    assert not (run.folder / "scores.json").exists()


def test_an_unforeseen_error_keeps_its_traceback(
    run_small: RunSmall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.pipeline.fused_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_small("digits_llava", "digits_flickr", "baseline=tailor")
    manifest = json.loads((tmp_path / "run0" / MANIFEST).read_text())
    assert manifest["status"] == "failed"
    assert "ZeroDivisionError" in manifest["error"]
    assert "Traceback" in manifest["error"]


def test_answers_that_were_tampered_with_are_not_scored(run_small: RunSmall, tmp_path: Path) -> None:
    own_home = f"home={tmp_path / 'own'}"
    run = run_small("digits_llava", "digits_flickr", "baseline=zero_shot", own_home)
    answers = tmp_path / "own/artifacts/answers/colour" / stages(run)["answers/colour"]["key"] / "predictions.jsonl"
    text = answers.read_text()
    answers.write_text(text.replace('"id": "4"', '"id": "3"'))  # in as many bytes
    assert text != answers.read_text()
    with pytest.raises(ArtifactError, match=r"predictions\.jsonl changed since it was written; delete"):
        run_small("digits_llava", "digits_flickr", "baseline=zero_shot", own_home)


def test_layers_may_read_what_the_fused_layers_below_give(run_small: RunSmall) -> None:
    runs = {
        inputs: run_small("digits_llava", "digits_okvqa", "baseline=tailor_exact", f"calibration.inputs={inputs}")
        for inputs in ("finetuned", "sequential")
    }
    reports = {inputs: json.loads((run.folder / REPORT).read_text()) for inputs, run in runs.items()}
    rows = {
        inputs: {row["name"]: row for row in report["tensors"] if row["fate"] == "fused"}
        for inputs, report in reports.items()
    }
    assert rows["finetuned"].keys() == rows["sequential"].keys()
    assert reports["finetuned"]["totals"]["mask_count"] == reports["sequential"]["totals"]["mask_count"]
    first, last = "multi_modal_projector.linear_1.weight", "language_model.lm_head.weight"
    # Nothing is fused below the first layer, so it reads the same; the last reads what all others give.
    for tokens in ("calibration", "held_out"):
        sequential, finetuned = (rows[inputs] for inputs in ("sequential", "finetuned"))
        assert sequential[first]["errors"][tokens] == pytest.approx(finetuned[first]["errors"][tokens])
        assert sequential[last]["errors"][tokens] != pytest.approx(finetuned[last]["errors"][tokens])
