"""Exact top-k masks. Ties are broken by a seeded hash of the index.

In bfloat16 a fifth of a mask can hang on ties, and breaking them by position would favour the first rows. The hash
depends on index and seed alone, so a mask is the same on every device and for every order of work.

A cut is found by counting, not sorting: float32 scores map to integers of the same order, whose upper and lower 16 bits
are histogrammed in turn. That needs little memory beside the scores, and works across tensors never held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tailor.chunks import chunks, has_nan, in_chunks
from tailor.errors import InvalidSetting, NotFinite

_HISTOGRAM_ENTRIES = 1 << 22
_HALF = 1 << 15
_NOTHING_ABOVE = (1 << 31) - 1
_WORD = (1 << 64) - 1


def top_fraction(score: Tensor, fraction: float, *, seed: int = 0, last: Tensor | None = None) -> Tensor:
    """Bool mask of the shape of `score` with exactly round(fraction · numel) True, at the highest scores.

    Rounding is Python's (a half goes to the even count); scores are compared in float32. Entries where `last` is True
    come after all others: give `last=delta == 0` so that no budget goes to entries that fine-tuning left as they were.
    Raises InvalidSetting for a fraction outside [0, 1] and NotFinite for a NaN score.
    """
    if not 0 <= fraction <= 1:
        raise InvalidSetting(f"fraction: {fraction} is outside [0, 1]; give the share of entries to choose")
    if last is not None:
        score = score.float().masked_fill(last, -torch.inf)
    return find_cut(lambda: (score,), round(fraction * score.numel()), seed=seed).mask(score)


@dataclass(frozen=True)
class Cut:
    """Where a ranking is cut: above `key`, and at `key` up to `tie_hash`."""

    key: int
    tie_hash: int
    seed: int

    def mask(self, score: Tensor, first_index: int = 0) -> Tensor:
        """Bool mask of one tensor of the ranking; `first_index` counts the entries of the tensors before it."""
        mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for chosen, piece in chunks(mask, score):
            keys = _ordered_keys(piece)
            torch.gt(keys, self.key, out=chosen)
            ties = (keys == self.key).nonzero()[:, 0]
            chosen[ties[_hash(ties + first_index, self.seed) <= self.tie_hash]] = True
            first_index += piece.numel()
        return mask


def find_cut(scores: Callable[[], Iterable[Tensor]], count: int, *, seed: int) -> Cut:
    """The cut above which `count` entries lie in the joint ranking of several tensors.

    `scores` is called three times and yields the same tensors in the same order each time. Memory: one tensor, its
    keys, and 8 bytes for each entry tied at the cut. Raises NotFinite for a NaN score.
    """
    if count == 0:
        return Cut(_NOTHING_ABOVE, 0, seed)
    upper = sum(_histogram(in_chunks(_upper_half, _without_nan(score), dtype=torch.int32)) for score in scores())
    bucket, count = _descend(upper, count)
    lower = sum(
        _histogram(torch.cat([_lower_half_within(piece, bucket) for (piece,) in chunks(score)])) for score in scores()
    )
    low_bits, count = _descend(lower, count)
    key = ((bucket - _HALF) << 16) | low_bits
    hashes, first_index = [], 0
    for piece in (piece for score in scores() for (piece,) in chunks(score)):
        ties = (_ordered_keys(piece) == key).nonzero()[:, 0]
        hashes.append(_hash(ties + first_index, seed).cpu())
        first_index += piece.numel()
    return Cut(key, int(torch.cat(hashes).kthvalue(count).values), seed)


def _ordered_keys(score: Tensor) -> Tensor:
    """Flat int32 keys in the order of the float32 scores: the bits, with those of negative numbers turned over."""
    bits = (score.detach().float() + 0.0).reshape(-1).view(torch.int32)  # + 0.0 makes both zeros the same bits
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _upper_half(score: Tensor) -> Tensor:
    return (_ordered_keys(score) >> 16) + _HALF


def _lower_half_within(score: Tensor, bucket: int) -> Tensor:
    keys = _ordered_keys(score)
    return keys[(keys >> 16) + _HALF == bucket] & 0xFFFF


def _histogram(buckets: Tensor) -> Tensor:
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for piece in torch.split(buckets.reshape(-1), _HISTOGRAM_ENTRIES):
        counts += torch.bincount(piece, minlength=1 << 16).cpu()
    return counts


def _descend(counts: Tensor | int, count: int) -> tuple[int, int]:
    """The bucket that holds the entry of rank `count` from the top, and that entry's rank within the bucket."""
    assert isinstance(counts, Tensor)
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, count))
    bucket = len(counts) - 1 - position
    return bucket, count - int(from_top[position] - counts[bucket])


def _without_nan(score: Tensor) -> Tensor:
    if has_nan(score):
        nan_count = int(score.isnan().sum())
        raise NotFinite(f"score: {nan_count} of {score.numel()} entries are NaN; check the weights and the Gram")
    return score


def _hash(index: Tensor, seed: int) -> Tensor:
    """splitmix64 of index and seed, int64 with wrap-around: a bijection of the index, so no two hashes are equal."""
    mixed = index ^ _signed(seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019)
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(values: Tensor, places: int) -> Tensor:
    """Logical shift; the one torch has for int64 copies the sign."""
    return (values >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word
