"""What the stages ask of a model family, and what all families share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from experiments.errors import ConfigError, ModelError
from tailor.checkpoint import Checkpoint

IGNORED = -100
CONFIG = "config.json"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """A training example: the image, the prompt as benchmarks word it, and the answer to learn.

    To calibrate on, any may be missing: without ``image`` it is text alone, without ``answer`` it ends with the prompt,
    and without ``prompt`` the answer is a text as it stands, in no conversation.
    """

    image: Image | None
    prompt: str | None
    answer: str | None


@dataclass(frozen=True)
class Placement:
    """Where a model goes: all on ``device``, or spread by accelerate's ``device_map``, the rest offloaded to a folder.

    ``device_map`` is what `from_pretrained` takes: "auto", "balanced", "sequential", or device by module.
    """

    device: torch.device
    device_map: str | Mapping[str, str | int] | None = None
    offload_folder: Path | None = None

    def load(self, model_class: Any, folder: Path, dtype: torch.dtype | str) -> Any:
        """The model of a checkpoint folder, placed, for inference. ``dtype`` may be "auto": the checkpoint's own."""
        from transformers.utils import logging  # takes seconds, so only when a model is loaded

        logging.disable_progress_bar()  # the stages show their own
        spread: dict[str, Any] = {}
        if self.device_map is not None:
            device_map = self.device_map if isinstance(self.device_map, str) else dict(self.device_map)
            spread = {"device_map": device_map, "offload_folder": self.offload_folder}
        with reading(folder):
            model = model_class.from_pretrained(folder, dtype=dtype, **spread)
        return (model if spread else model.to(self.device)).eval()


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns what transformers raises for a folder that it can't read into a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        finding = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(f"{folder}: can't be read as a model ({finding}); complete or correct the folder") from error


def require_model_type(folder: Path, wanted: str) -> None:
    """Raises ModelError unless the folder's config is of that type: transformers would make up a model of its own."""
    found = read_config(folder).get("model_type")
    if found != wanted:
        raise ModelError(f"{folder / CONFIG}: is of model_type {found!r}, not {wanted!r}; choose the model that fits")


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint folder's `config.json`. Raises ModelError if it can't be read."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); complete the checkpoint's folder") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: is no JSON object; complete the checkpoint's folder")
    return config


@dataclass(frozen=True)
class Loaded:
    """A model in memory. ``tensor_names``: parameter path → name of the tensor in the checkpoint folder."""

    model: Any
    processor: Any
    tensor_names: Mapping[str, str]

    @property
    def device(self) -> torch.device:
        """Where batches go. A model that accelerate has spread moves them itself."""
        return torch.device("cpu") if hasattr(self.model, "hf_device_map") else self.model.device

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by the name of their checkpoint tensor."""
        named = dict(self.model.named_parameters())
        return {tensor: named[path] for path, tensor in self.tensor_names.items()}

    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies (checkpoint tensor name, weight) pairs into the model."""
        parameters = self.parameters
        with torch.no_grad():
            for name, weight in weights:
                if parameters[name].is_meta:
                    raise ModelError(
                        f"{name}: is offloaded, and an offloaded weight can't be replaced; use a device that holds the "
                        "whole model, or no device map"
                    )
                parameters[name].copy_(weight)


def device_of(name: str) -> torch.device:
    """The device of that name. Raises ConfigError if this machine has none such."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such kind of device, or none of it here
        finding = str(error).splitlines()[0]
        raise ConfigError(f"device={name}: {finding}; choose cpu or a device of this machine") from error


class Adapter(Protocol):
    """A model family (LLaVA, InstructBLIP): a frozen value of a `conf/model` file."""

    prompt_style: str

    def load(self, folder: Path, dtype: torch.dtype | str, placement: Placement) -> Loaded:
        """The model and processor of a checkpoint folder, ready for inference. Raises ModelError."""
        ...

    def prompt_batch(self, processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> Batch:
        """Left-padded inputs of `generate`."""
        ...

    def training_batch(self, processor: Any, samples: Sequence[Sample]) -> Batch:
        """Right-padded inputs with `labels` on the answers (and their end of sentence) alone.

        Either all samples have an image or none has. Raises ModelError for a kind of sample that the family can't read.
        """
        ...

    def token_mask(self, module: str, batch: Batch) -> Tensor | None:
        """Which tokens that reach ``module`` in a training batch are real: (batch, tokens) bool, None for all."""
        ...


def tensor_names(model: nn.Module, checkpoint: Checkpoint, renamings: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Parameter path → checkpoint tensor name, by the first of ``renamings`` (module prefix, tensor prefix) that fits.

    Raises ModelError listing every parameter whose tensor is missing or has another shape: a change of the module tree
    or of the file layout must not pass unnoticed.
    """
    names, problems = {}, []
    for path, parameter in model.named_parameters():
        candidates = [tensor + path.removeprefix(module) for module, tensor in renamings if path.startswith(module)]
        found = next((name for name in candidates if name in checkpoint), None)
        if found is None:
            problems.append(f"{path}: none of {', '.join(candidates) or 'any name'} is in the checkpoint")
        elif tuple(parameter.shape) != tuple(checkpoint.shape(found)):
            problems.append(f"{path}: {tuple(parameter.shape)} in memory, {tuple(checkpoint.shape(found))} in {found}")
        else:
            names[path] = found
    if problems:
        raise ModelError(
            f"{type(model).__name__} does not fit {checkpoint.folder}: {'; '.join(problems[:8])} "
            f"({len(problems)} in all); use a checkpoint of this architecture"
        )
    return names


def append_answers(encoded: Sequence[Sequence[int]], answers: Sequence[str | None], tokenizer: Any) -> Batch:
    """Prompt ids followed by answer ids and the end of sentence, right-padded; labels on the latter alone.

    Where there is no answer, the sequence ends with the prompt.
    """
    ids, labels = [], []
    for prompt, answer in zip(encoded, answers, strict=True):
        reply = (
            []
            if answer is None
            else [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        )
        ids.append(torch.tensor([*prompt, *reply]))
        labels.append(torch.tensor([IGNORED] * len(prompt) + reply))
    padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    lengths = torch.tensor([len(row) for row in ids])
    return {
        "input_ids": padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
