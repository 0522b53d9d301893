"""The target task as a function of the weights: what Grafting descends and chooses by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.models.adapter import IGNORED, Adapter, Batch, Loaded, Sample


@dataclass
class TargetLoss:
    """Loss and accuracy over answer tokens, teacher-forced, on a model that is kept in memory (`tailor.TargetTask`).

    ``train`` gives the gradient; ``train`` and ``dev`` together the score. The model's weights are overwritten.
    """

    adapter: Adapter
    loaded: Loaded
    train: Sequence[Sample]
    dev: Sequence[Sample]
    batch_size: int
    _progress: tqdm = field(
        default_factory=lambda: tqdm(desc="grafting", unit="pass", leave=False, dynamic_ncols=True, disable=None)
    )

    def gradient(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient of the mean loss over all answer tokens of ``train``, by checkpoint tensor name, float32."""
        self.loaded.set_weights(weights.items())
        parameters = self.loaded.parameters
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in weights)
            parameter.grad = None
        batches = list(self._batches(self.train))
        tokens = sum(_answer_count(batch) for batch in batches)
        for batch in batches:
            # The model averages within the batch; weighing by tokens makes it the mean over all batches.
            (self.loaded.model(**batch).loss * (_answer_count(batch) / tokens)).backward()
        self._progress.update()
        return {name: _gradient(parameters[name]) for name in weights}

    @torch.no_grad()
    def score(self, weights: Mapping[str, Tensor]) -> float:
        """Percentage of answer tokens that the model ranks first, given the true ones before them."""
        self.loaded.set_weights(weights.items())
        right = total = 0
        for batch in self._batches([*self.train, *self.dev]):
            logits = self.loaded.model(**batch).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            asked = labels != IGNORED
            right += int((logits.argmax(-1) == labels)[asked].sum())
            total += int(asked.sum())
        self._progress.update()
        return 100 * right / total

    def _batches(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        for start in range(0, len(samples), self.batch_size):
            batch = self.adapter.training_batch(self.loaded.processor, samples[start : start + self.batch_size])
            yield {name: tensor.to(self.loaded.device) for name, tensor in batch.items()}


def _answer_count(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
