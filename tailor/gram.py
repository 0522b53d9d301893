"""Grams: second moments of layer inputs over the tokens of a task (the Hessian of Eq. 5)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tailor.errors import CheckpointError, EmptyCalibration, InvalidSetting, NotFinite, TailorError
from tailor.storage import TensorFile, save_tensors


class GramAccumulator:
    """Sums Xᵀ·X over batches of layer inputs, one token a row, on the device of the inputs.

    Products and sum are float32 (float64 for float64 inputs): n additions err by less than n * 6e-8 of the diagonal,
    far below a damping of 1 %, while float64 would double the largest thing that calibration keeps on an accelerator.
    `name` is for messages.
    """

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._sum: Tensor | None = None
        self._token_count = 0

    @property
    def token_count(self) -> int:
        """Tokens seen so far, padding left out."""
        return self._token_count

    @torch.no_grad()
    def add(self, inputs: Tensor, token_mask: Tensor | None = None) -> None:
        """Add inputs (..., in). `token_mask` (...,) is True at real tokens; None means that all are real."""
        width = inputs.shape[-1]
        if token_mask is None:
            tokens = inputs.reshape(-1, width)
        elif token_mask.shape == inputs.shape[:-1]:
            tokens = inputs[token_mask.to(inputs.device, torch.bool)]
        else:
            raise TailorError(
                f"{self._place}: token mask {tuple(token_mask.shape)} does not fit inputs {tuple(inputs.shape)}; "
                "give the mask of this layer's own tokens"
            )
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if self._sum is None:
            self._sum = torch.zeros(width, width, dtype=tokens.dtype, device=tokens.device)
        elif self._sum.shape[0] != width:
            raise TailorError(
                f"{self._place}: inputs of width {width} after width {self._sum.shape[0]}; use one accumulator a layer"
            )
        self._sum.addmm_(tokens.T, tokens)
        self._token_count += tokens.shape[0]

    def finish(self, damping: float) -> Tensor:
        """Gram 2/tokens * Xᵀ·X + damping * mean(diagonal) * I (Eq. 5), (in, in) float32, exactly symmetric.

        Raises EmptyCalibration if no token was seen and NotFinite if an input was NaN or infinite.
        """
        if self._sum is None or self._token_count == 0:
            raise EmptyCalibration(
                f"{self._place}: no calibration token reached this layer; check the scope or the calibration samples"
            )
        gram = (self._sum + self._sum.T) / self._token_count
        bad_count = int((~gram.isfinite()).sum())
        if bad_count:
            raise NotFinite(
                f"{self._place}: {bad_count} of {gram.numel()} entries of the Gram are NaN or infinite; the layer's "
                "inputs overflow or are undefined: check the token mask, or run calibration in float32 or bfloat16"
            )
        return damp(gram.float(), damping)

    @property
    def _place(self) -> str:
        return self._name or "Gram"


def damp(gram: Tensor, damping: float) -> Tensor:
    """A new gram + damping * mean(diagonal) * I. Raises InvalidSetting for a negative damping."""
    if not damping >= 0:
        raise InvalidSetting(f"damping: {damping} is negative; give a fraction of the mean diagonal, such as 0.01")
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    return damped


@dataclass(frozen=True, eq=False)
class Grams(Mapping[str, Tensor]):
    """Layer tensor name -> undamped Gram, (in, in) float32.

    Layers that read the same input (q, k and v, say) share one stored matrix:
    `keys_of_layers` maps a layer to the key of its matrix, `matrices` and `token_counts` a key to both.
    """

    keys_of_layers: Mapping[str, str]
    matrices: Mapping[str, Tensor]
    token_counts: Mapping[str, int]

    def __post_init__(self) -> None:
        for layer, key in self.keys_of_layers.items():
            if key not in self.matrices or key not in self.token_counts:
                raise CheckpointError(f"{layer}: its Gram {key!r} is missing; collect the Grams again")

    @classmethod
    def collect(cls, layers: Mapping[str, str], accumulators: Mapping[str, GramAccumulator]) -> Grams:
        """From layer -> key and key -> accumulator. Raises EmptyCalibration and NotFinite like `finish`."""
        used = sorted(set(layers.values()))
        matrices = {key: accumulators[key].finish(damping=0.0) for key in used}
        return cls(dict(layers), matrices, {key: accumulators[key].token_count for key in used})

    @classmethod
    def joined(cls, parts: Iterable[Grams]) -> Grams:
        """All layers of several, which must be different ones; nothing is read."""
        parts = list(parts)
        keys_of_layers = {layer: key for part in parts for layer, key in part.keys_of_layers.items()}
        if len(keys_of_layers) < sum(len(part) for part in parts):
            raise TailorError("Grams: a layer is in two of the sets to join; join sets of different layers")
        # A key is the name of one of its layers, so different layers have different keys.
        token_counts = {key: count for part in parts for key, count in part.token_counts.items()}
        return cls(keys_of_layers, _Joined(parts), token_counts)

    def __getitem__(self, layer: str) -> Tensor:
        return self.matrices[self.keys_of_layers[layer]]

    def __contains__(self, layer: object) -> bool:
        return layer in self.keys_of_layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of_layers)

    def __len__(self) -> int:
        return len(self.keys_of_layers)

    def token_count(self, layer: str) -> int:
        """Tokens over which the layer's Gram was taken."""
        return self.token_counts[self.keys_of_layers[layer]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all. Raises CheckpointError if it cannot be written."""
        header = {"layers": dict(self.keys_of_layers), "token_counts": dict(self.token_counts)}
        save_tensors(path, self.matrices, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Grams:
        """Read what `save` wrote; matrices come from a memory map as they are asked for. Raises CheckpointError."""
        file = TensorFile(path)
        header = file.header()
        if not {"layers", "token_counts"} <= header.keys():
            raise CheckpointError(f"{file.path}: not a file of Grams; give the one that calibration wrote")
        return cls(header["layers"], file, header["token_counts"])


class _Joined(Mapping[str, Tensor]):
    """Key -> Gram over several sets, each read as it is asked for."""

    def __init__(self, parts: Iterable[Grams]) -> None:
        self._sources = {key: part.matrices for part in parts for key in part.matrices}

    def __getitem__(self, key: str) -> Tensor:
        return self._sources[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
