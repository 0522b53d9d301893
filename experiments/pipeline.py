"""A run from end to end: which stages it needs, what each one depends on, and what it leaves in its folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from evaluation.aggregate import average, h_score
from evaluation.records import Score, read_predictions, write_predictions
from evaluation.score import score_predictions
from experiments.artifacts import Artifact, Store
from experiments.context import CHECKPOINT, Context
from experiments.data import BenchmarkData, check_suite, identity, module_of
from experiments.errors import ConfigError
from experiments.models.adapter import Loaded, Sample, device_of
from experiments.runs import SCORES, Builds, Record
from experiments.schema import Experiment
from experiments.sequential import fuse_sequentially
from experiments.stages.evaluate import generate
from experiments.stages.fuse import PATCH, REPORT, Weights, fuse_into, fused_weights
from experiments.stages.grams import collect_grams
from experiments.stages.retain import sources
from experiments.stages.stitch import stitch_into
from experiments.stages.target import TargetLoss
from experiments.tasks import SAMPLES, TaskStages
from tailor.gram import Grams
from tailor.method import Evidence, Method, is_separable, sees_old_tasks
from tailor.methods.stitched import Stitched
from tailor.methods.zero_shot import ZeroShot
from tailor.patch import Patch

log = logging.getLogger(__name__)


def run(parts: Experiment, folder: Path, record: Record) -> None:
    """Runs ``parts`` and fills ``folder``: patch, fusion report, predictions, scores."""
    torch.set_num_threads(parts.threads)
    transformers.utils.logging.disable_progress_bar()  # the stages show their own
    check(parts)
    record.update(
        targets=[task.name for task in parts.tasks],
        learnt_targets=_learnt(parts),
        sees_old_tasks=sees_old_tasks(parts.method),
    )
    for left in (PATCH, REPORT, SCORES):  # by an earlier run in this folder
        (folder / left).unlink(missing_ok=True)
    shutil.rmtree(folder / "predictions", ignore_errors=True)
    store = Store(Path(parts.home), {"threads": parts.threads})
    pipeline = Pipeline(Context(parts, Builds(store, record), device_of(parts.device)))
    fusion, weights = pipeline.fused()
    pretrained, targets = pipeline.scores(weights, fusion.key, folder / "predictions")
    shutil.copyfile(fusion.folder / REPORT, folder / REPORT)
    if weights.patch is not None:
        _link(weights.patch, folder / PATCH)
    values = [[score.value for score in scores] for scores in (pretrained, targets)]
    summary = {"average": average(*values), "h_score": h_score(*values)}
    stored = {
        "pretrained": [score.to_json() for score in pretrained],
        "targets": [score.to_json() for score in targets],
        "summary": summary,
    }
    (folder / SCORES).write_text(json.dumps(stored, indent=1) + "\n")
    parts.logger.log(folder)
    log.info("%s: Avg %.2f, H-score %.2f", parts.choices["baseline"], summary["average"], summary["h_score"])


def check(parts: Experiment) -> None:
    """Before any stage: raises ConfigError if the parts don't fit each other, and what `check_suite` raises."""
    check_suite(parts.suite, *parts.tasks)
    if isinstance(parts.method, Stitched) and not parts.other_tasks:
        raise ConfigError(
            f"baseline={parts.choices['baseline']}: stitching takes several tasks, and there is {parts.task.name} "
            "alone; add one, such as +task@other_tasks.second=digits_okvqa, or choose experiment=digits_llava_stitched"
        )
    if sees_old_tasks(parts.method):
        sources(parts.calibration, parts.suite)
    if parts.calibration.inputs == "sequential" and (
        isinstance(parts.method, Stitched) or (parts.method.needs == "grams" and not is_separable(parts.method))
    ):
        raise ConfigError(
            f"calibration.inputs=sequential: baseline={parts.choices['baseline']} can't take layers one by one; "
            "set it to finetuned"
        )


def _learnt(parts: Experiment) -> list[str]:
    """The targets that the method makes use of."""
    if isinstance(parts.method, ZeroShot):
        return []
    return [task.name for task in (parts.tasks if isinstance(parts.method, Stitched) else [parts.task])]


@dataclass(frozen=True)
class Pipeline:
    """The stages of one run. Each is a function of artifacts before it, and is looked up before it is built."""

    context: Context

    @property
    def parts(self) -> Experiment:
        return self.context.parts

    @cached_property
    def task(self) -> TaskStages:
        return TaskStages(self.context, self.parts.task, whose="")

    @cached_property
    def tasks(self) -> tuple[TaskStages, ...]:
        return (self.task, *(TaskStages(self.context, other, whose=other.name) for other in self.parts.other_tasks))

    @property
    def tuned(self) -> Artifact:
        """What is fused with the base: the fine-tuned model, or for zero-shot, which needs none, the base again."""
        return self.context.base if isinstance(self.parts.method, ZeroShot) else self.task.finetuned

    @cached_property
    def retain(self) -> Artifact:
        """Grams of samples of the old tasks in the pretrained model, for the layers that have one of the target."""
        parts, adapter, base = self.parts, self.parts.model.adapter, self.context.base
        drawn = sources(parts.calibration, parts.suite)
        layers = sorted(self.task.evidence().calibration)
        batch_size = parts.calibration.batch_size
        inputs = {
            "base": base.key,
            "samples": [source.identity() for source in drawn],
            "layers": layers,
            "batch_size": batch_size,
            "adapter": identity(adapter),
            "seed": parts.seed,
            "device": parts.device,
        }

        def make(out: Path) -> None:
            loaded = self.context.load(Weights(self.context.base_folder, None), torch.float32)
            grams = collect_grams(adapter, loaded, self._retained(), layers, batch_size, "calibrate (retain)")
            grams.save(out / f"{SAMPLES}.safetensors")

        modules = [collect_grams.__module__, module_of(adapter), *(name for each in drawn for name in each.modules())]
        return self.context.builds.build("retain", inputs, modules, make)

    def fused(self) -> tuple[Artifact, Weights]:
        if isinstance(self.parts.method, Stitched):
            return self._stitched(self.parts.method)
        parts, method, base_folder = self.parts, self.parts.method, self.context.base_folder
        if method.needs == "grams" and parts.calibration.inputs == "sequential":
            return self._sequential(method)
        inputs = {**self._fusion, "finetuned": self.tuned.key}
        if method.needs == "grams":
            inputs["grams"] = self.task.grams.key
        if sees_old_tasks(method):
            inputs["retain"] = self.retain.key
        if method.needs == "gradients":
            inputs |= self.task.data | {"calibration": parts.calibration.collection()}
        tuned_folder = self.tuned.folder / CHECKPOINT

        def make(out: Path) -> None:
            fuse_into(out, base_folder, tuned_folder, method, self._evidence(), parts.seed, self.context.device)

        modules = [module_of(method), fuse_into.__module__]
        if method.needs == "gradients":
            modules += [TargetLoss.__module__, *self.task.modules]
        fusion = self.context.builds.build("fused", inputs, modules, make)
        return fusion, fused_weights(method, base_folder, tuned_folder, fusion.folder)

    def _sequential(self, method: Method) -> tuple[Artifact, Weights]:
        parts, task = self.parts, self.task
        retained = self._retained() if sees_old_tasks(method) else None

        def make(out: Path) -> None:
            fuse_sequentially(out, self.context, task, method, retained)

        inputs = {**self._fusion, **task.data, "finetuned": task.finetuned.key, "inputs": "sequential"}
        inputs |= {"calibration": parts.calibration.collection()}
        if retained is not None:
            inputs["retain"] = [source.identity() for source in sources(parts.calibration, parts.suite)]
        modules = [module_of(method), fuse_sequentially.__module__, *task.modules]
        fusion = self.context.builds.build("fused", inputs, modules, make)
        return fusion, Weights(self.context.base_folder, fusion.folder / PATCH)

    def _retained(self) -> list[Sample]:
        """Samples that stand for the old tasks."""
        parts, style = self.parts, self.parts.model.adapter.prompt_style
        drawn = sources(parts.calibration, parts.suite)
        return [sample for source in drawn for sample in source.samples(parts.seed, style)]

    def _stitched(self, method: Stitched) -> tuple[Artifact, Weights]:
        learnt = [{"finetuned": task.finetuned.key, "grams": task.grams.key} for task in self.tasks]

        def make(out: Path) -> None:
            folders = [task.finetuned_folder for task in self.tasks]
            evidence = [task.evidence() for task in self.tasks]
            base_folder, seed = self.context.base_folder, self.parts.seed
            stitch_into(out, base_folder, folders, method, evidence, seed, self.context.device)

        modules = [module_of(method), stitch_into.__module__]
        fusion = self.context.builds.build("fused", {**self._fusion, "tasks": learnt}, modules, make)
        return fusion, Weights(self.context.base_folder, fusion.folder / PATCH)

    @property
    def _fusion(self) -> dict[str, Any]:
        return {
            "method": identity(self.parts.method),
            "base": self.context.base.key,
            "seed": self.parts.seed,
            "device": self.parts.device,
        }

    def _evidence(self) -> Evidence:
        method = self.parts.method
        match method.needs:
            case "grams":
                seen = Grams.load(self.retain.folder / f"{SAMPLES}.safetensors") if sees_old_tasks(method) else None
                return self.task.evidence(retain=seen)
            case "gradients":
                return self.task.loss()
        return None

    def scores(self, weights: Weights, fusion_key: str, predictions: Path) -> tuple[list[Score], list[Score]]:
        """Scores of the pretrained benchmarks, and of the targets; predictions are copied into ``predictions``."""
        predictions.mkdir(exist_ok=True)
        loaded: list[Loaded] = []

        def score(data: BenchmarkData) -> Score:
            answered = self._answers(weights, fusion_key, data, loaded)
            shutil.copyfile(answered.folder / "predictions.jsonl", predictions / f"{data.name}.jsonl")
            return self._score(data, predictions / f"{data.name}.jsonl")

        return [score(data) for data in self.parts.suite], [score(task.test) for task in self.parts.tasks]

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
                loaded.append(self.context.load(weights, getattr(torch, parts.dtype)))
            examples = data.examples(adapter.prompt_style)
            answers = generate(adapter, loaded[0], examples, instruction.generation, parts.batch_size, data.name)
            write_predictions(out / "predictions.jsonl", answers)

        modules = [generate.__module__, *map(module_of, (adapter, data, data.benchmark, data.rows, Patch))]
        return self.context.builds.build(f"answers/{data.name}", inputs, modules, make)

    def _score(self, data: BenchmarkData, predictions: Path) -> Score:
        style = self.parts.model.adapter.prompt_style
        revision = json.dumps(data.identity()["rows"])
        score, _ = score_predictions(
            data.benchmark, data.examples(style), read_predictions(predictions), data.instruction(style), revision
        )
        return score


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
