"""A run from end to end: which stages it needs, what each one depends on, and what it leaves in its folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import transformers

from evaluation.aggregate import average, h_score
from evaluation.records import Score, read_predictions, write_predictions
from evaluation.score import score_predictions
from experiments.artifacts import Artifact, Store
from experiments.data import BenchmarkData, check_suite, identity, module_of
from experiments.models.adapter import Loaded, Placement, Sample, device_of
from experiments.runs import SCORES, Builds, Record
from experiments.schema import Experiment
from experiments.stages.calibrate import draw
from experiments.stages.evaluate import generate
from experiments.stages.fuse import PATCH, REPORT, Weights, fuse_into, fused_weights
from experiments.stages.grams import collect_grams
from experiments.stages.target import TargetLoss
from tailor.checkpoint import Checkpoint
from tailor.gram import Grams
from tailor.method import Evidence, GramEvidence
from tailor.methods.zero_shot import ZeroShot
from tailor.patch import Patch
from tailor.scope import changed_tensors

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"


def run(parts: Experiment, folder: Path, record: Record) -> None:
    """Runs ``parts`` and fills ``folder``: patch, fusion report, predictions, scores."""
    torch.set_num_threads(parts.threads)
    transformers.utils.logging.disable_progress_bar()  # the stages show their own
    check_suite(parts.suite, parts.task)
    for left in (PATCH, REPORT, SCORES):  # by an earlier run in this folder
        (folder / left).unlink(missing_ok=True)
    shutil.rmtree(folder / "predictions", ignore_errors=True)
    pipeline = Pipeline(
        parts, Builds(Store(Path(parts.home), {"threads": parts.threads}), record), device_of(parts.device)
    )
    fusion, weights = pipeline.fused()
    scores = pipeline.scores(weights, fusion.key, folder / "predictions")
    shutil.copyfile(fusion.folder / REPORT, folder / REPORT)
    if weights.patch is not None:
        _link(weights.patch, folder / PATCH)
    pretrained, target = scores[:-1], scores[-1]
    values = [score.value for score in pretrained]
    summary = {"average": average(values, [target.value]), "h_score": h_score(values, [target.value])}
    stored = {"pretrained": [s.to_json() for s in pretrained], "target": target.to_json(), "summary": summary}
    (folder / SCORES).write_text(json.dumps(stored, indent=1) + "\n")
    parts.logger.log(folder)
    log.info("%s: Avg %.2f, H-score %.2f", parts.choices["baseline"], summary["average"], summary["h_score"])


@dataclass(frozen=True)
class Pipeline:
    """The stages of one run. Each is a function of artifacts before it, and is looked up before it is built."""

    parts: Experiment
    builds: Builds
    device: torch.device

    @cached_property
    def base(self) -> Artifact:
        base = self.parts.model.base

        def make(out: Path) -> None:
            base.build(out / CHECKPOINT)

        return self.builds.build("base", {"base": identity(base)}, [module_of(base)], make)

    @cached_property
    def finetuned(self) -> Artifact:
        parts = self.parts
        inputs = {**self._data, "base": self.base.key, "training": identity(parts.training)}

        def make(out: Path) -> None:
            rows = parts.task.samples(parts.task.train, parts.model.adapter.prompt_style)
            losses = parts.training.finetune(
                parts.model.adapter, self._base_folder, rows, out / CHECKPOINT, parts.seed, self.device
            )
            pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses}).to_csv(out / "losses.csv", index=False)

        return self.builds.build("finetuned", inputs, [module_of(parts.training), *self._task_modules], make)

    @property
    def tuned(self) -> Artifact:
        """What is fused with the base: the fine-tuned model, or for zero-shot, which needs none, the base again."""
        return self.base if isinstance(self.parts.method, ZeroShot) else self.finetuned

    @cached_property
    def grams(self) -> Artifact:
        parts, adapter = self.parts, self.parts.model.adapter
        inputs = {**self._data, "finetuned": self.finetuned.key, "calibration": parts.calibration.collection()}

        def make(out: Path) -> None:
            loaded = self._load(Weights(self._finetuned_folder, None), torch.float32)
            layers = changed_tensors(Checkpoint(self._base_folder), Checkpoint(self._finetuned_folder))
            batch_size = parts.calibration.batch_size
            for name in ("samples", "held_out"):
                grams = collect_grams(adapter, loaded, self._samples(name), layers, batch_size, f"calibrate ({name})")
                grams.save(out / f"{name}.safetensors")

        return self.builds.build("grams", inputs, [collect_grams.__module__, *self._task_modules], make)

    def fused(self) -> tuple[Artifact, Weights]:
        parts, method = self.parts, self.parts.method
        inputs = {
            "method": identity(method),
            "base": self.base.key,
            "finetuned": self.tuned.key,
            "seed": parts.seed,
            "device": parts.device,
        }
        if method.needs == "grams":
            inputs["grams"] = self.grams.key
        if method.needs == "gradients":
            inputs |= self._data | {"calibration": parts.calibration.collection()}

        def make(out: Path) -> None:
            folders = (self._base_folder, self.tuned.folder / CHECKPOINT)
            fuse_into(out, *folders, method, self._evidence(), parts.seed, self.device)

        modules = [module_of(method), fuse_into.__module__]
        if method.needs == "gradients":
            modules += [TargetLoss.__module__, *self._task_modules]
        fusion = self.builds.build("fused", inputs, modules, make)
        return fusion, fused_weights(method, self._base_folder, self.tuned.folder / CHECKPOINT, fusion.folder)

    def scores(self, weights: Weights, fusion_key: str, predictions: Path) -> list[Score]:
        """Scores of the pretrained benchmarks, then of the target; predictions are copied into ``predictions``."""
        predictions.mkdir(exist_ok=True)
        loaded: list[Loaded] = []
        scores = []
        for data in (*self.parts.suite, self.parts.task.test):
            answered = self._answers(weights, fusion_key, data, loaded)
            shutil.copyfile(answered.folder / "predictions.jsonl", predictions / f"{data.name}.jsonl")
            scores.append(self._score(data, predictions / f"{data.name}.jsonl"))
        return scores

    def _answers(self, weights: Weights, fusion_key: str, data: BenchmarkData, loaded: list[Loaded]) -> Artifact:
        parts, adapter = self.parts, self.parts.model.adapter
        instruction = data.instruction(adapter.prompt_style)
        # Whole checkpoints are named by themselves, so that zero-shot answers once for all targets and seeds.
        inputs = {
            "weights": weights.folder.parent.name if weights.patch is None else fusion_key,
            "adapter": identity(adapter),
            "data": data.identity(),
            "instruction": identity(instruction),
            "batch_size": parts.batch_size,
            "dtype": parts.dtype,
            "device": parts.device,
        }

        def make(out: Path) -> None:
            if not loaded:  # once for all benchmarks, and not at all if every answer is there
                loaded.append(self._load(weights, getattr(torch, parts.dtype)))
            examples = data.examples(adapter.prompt_style)
            answers = generate(adapter, loaded[0], examples, instruction.generation, parts.batch_size, data.name)
            write_predictions(out / "predictions.jsonl", answers)

        modules = [generate.__module__, *map(module_of, (adapter, data, data.benchmark, data.rows, Patch))]
        return self.builds.build(f"answers/{data.name}", inputs, modules, make)

    def _score(self, data: BenchmarkData, predictions: Path) -> Score:
        style = self.parts.model.adapter.prompt_style
        revision = json.dumps(data.identity()["rows"])
        score, _ = score_predictions(
            data.benchmark, data.examples(style), read_predictions(predictions), data.instruction(style), revision
        )
        return score

    def _evidence(self) -> Evidence:
        match self.parts.method.needs:
            case "grams":
                folder = self.grams.folder
                return GramEvidence(*(Grams.load(folder / f"{name}.safetensors") for name in ("samples", "held_out")))
            case "gradients":
                return TargetLoss(
                    self.parts.model.adapter,
                    self._load(Weights(self._base_folder, None), torch.float32),
                    self._samples("samples"),
                    self._samples("held_out"),
                    self.parts.calibration.batch_size,
                )
        return None

    def _load(self, weights: Weights, dtype: torch.dtype) -> Loaded:
        loaded = self.parts.model.adapter.load(weights.folder, dtype, Placement(self.device))
        if weights.patch is not None:
            loaded.set_weights(Patch.load(weights.patch).apply_to(Checkpoint(weights.folder)))
        return loaded

    @property
    def _base_folder(self) -> Path:
        return self.base.folder / CHECKPOINT

    @property
    def _finetuned_folder(self) -> Path:
        return self.finetuned.folder / CHECKPOINT

    @property
    def _task_modules(self) -> list[str]:
        """The code that turns the task's rows into batches."""
        task = self.parts.task
        return [module_of(part) for part in (task, task.test.benchmark, task.train, task.dev, self.parts.model.adapter)]

    @property
    def _data(self) -> dict[str, object]:
        parts = self.parts
        return {
            "task": parts.task.identity(),
            "adapter": identity(parts.model.adapter),
            "seed": parts.seed,
            "device": parts.device,
        }

    def _samples(self, setting: str) -> list[Sample]:
        """The calibration's ``samples`` from the target's training rows, or its ``held_out`` from development rows."""
        parts, task = self.parts, self.parts.task
        rows = task.samples(task.dev if setting == "held_out" else task.train, parts.model.adapter.prompt_style)
        return draw(rows, getattr(parts.calibration, setting), parts.seed, f"calibration.{setting}")


def _link(source: Path, target: Path) -> None:
    """A hard link, for what is large and never edited; a copy where the file system has none.

    ``target`` must not exist: copying onto a link would write into the artifact that it links to.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)
