"""Fine-tuning on a target task through the transformers Trainer: loss on answers alone, in the scope asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, SchedulerType, Trainer, TrainerCallback, TrainingArguments, set_seed

from experiments import checks
from experiments.errors import TrainingError
from experiments.models.adapter import Adapter, Loaded, Placement, Sample
from tailor.scope import select

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What trains and how. ``scope``: patterns over checkpoint tensor names; ``warmup``: fraction of the steps.

    With several answers to a row (captions), every pass over the rows takes the next one; all passes are shuffled
    together.
    """

    scope: tuple[str, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    max_gradient_norm: float

    def __post_init__(self) -> None:
        checks.whole(self, "epochs", "batch_size")
        checks.real(self, "learning_rate", "max_gradient_norm", above=True)
        checks.real(self, "warmup", most=1.0)
        checks.real(self, "weight_decay")
        checks.one_of(self, "schedule", [schedule.value for schedule in SchedulerType])

    def finetune(
        self,
        adapter: Adapter,
        base: Path,
        rows: Sequence[Sequence[Sample]],
        out: Path,
        seed: int,
        device: torch.device,
    ) -> list[float]:
        """Trains the checkpoint folder ``base``, writes the fine-tuned one to ``out`` and returns each step's loss.

        ``rows`` hold one sample for each answer worth learning.

        Raises TrainingError if there is nothing to train or the loss is not finite.
        """
        if not rows:
            raise TrainingError("training data: no row to learn from; check the task's rows")
        set_seed(seed)
        loaded = adapter.load(base, torch.float32, Placement(device))
        self._freeze_all_but_scope(loaded)
        epochs = [[answers[epoch % len(answers)] for answers in rows] for epoch in range(self.epochs)]
        progress = _Progress()
        with TemporaryDirectory(dir=out.parent) as scratch:
            trainer = Trainer(
                model=loaded.model,
                args=self._arguments(scratch, seed, device),
                train_dataset=_Samples([sample for epoch in epochs for sample in epoch]),
                data_collator=lambda batch: adapter.training_batch(loaded.processor, batch),
                callbacks=[progress],
            )
            if trainer.args.n_gpu > 1 or trainer.args.device.type != device.type:
                raise TrainingError(
                    f"fine-tuning: {trainer.args.n_gpu} GPUs on {trainer.args.device} are in sight, but "
                    f"device={device}; show one with CUDA_VISIBLE_DEVICES, as several would silently multiply the batch"
                )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        loaded.model.save_pretrained(out)
        loaded.processor.save_pretrained(out)
        return progress.losses

    def _freeze_all_but_scope(self, loaded: Loaded) -> None:
        parameters = loaded.parameters
        trained = set(select(parameters, self.scope))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        count = sum(parameters[name].numel() for name in trained)
        total = sum(parameter.numel() for parameter in parameters.values())
        log.info("training %s of %s parameters in %d tensors:", f"{count:,}", f"{total:,}", len(trained))
        for pattern in self.scope:
            matched = select(parameters, [pattern])
            log.info(
                "  %-48s %10s in %d tensors", pattern, f"{sum(parameters[n].numel() for n in matched):,}", len(matched)
            )

    def _arguments(self, scratch: str, seed: int, device: torch.device) -> TrainingArguments:
        return TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,  # the samples of all epochs stand one after the other
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.schedule,
            warmup_steps=self.warmup,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_gradient_norm,
            seed=seed,
            data_seed=seed,
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            logging_nan_inf_filter=False,  # would report a NaN loss as 0
            disable_tqdm=True,  # its bar prints a line a step; ours shows the loss
        )


class _Progress(TrainerCallback):
    """A progress bar with the loss; stops the training as soon as that is not finite."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc="fine-tune", dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs[name])):
                raise TrainingError(
                    f"fine-tuning, step {state.global_step}: {name} is {logs[name]}; lower training.learning_rate or "
                    "check the data and the base model's weights"
                )
        self.losses.append(float(logs["loss"]))
        self._bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


class _Samples(torch.utils.data.Dataset[Sample]):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]
