"""The configuration of a fusion of given checkpoints: typed, strict, its groups instantiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from experiments.errors import ConfigError
from experiments.schema import DTYPES, instantiate_group, share_problems, strict

if TYPE_CHECKING:  # composing and checking a configuration must not wait for torch
    from experiments.models.adapter import Adapter
    from experiments.samples import SampleCalibration
    from tailor.align import Embeddings, OutDtype
    from tailor.method import Method
    from tailor.methods.stitched import Stitched


@dataclass
class FuseConfig:
    """What `conf/fuse.yaml` composes."""

    baseline: Any
    calibration: Any
    model: Any
    pretrained: str
    finetuned: Any
    out: str | None
    patch: str | None
    scope: Any
    embeddings: str
    out_dtype: str
    max_shard_size: Any
    sparsity: float
    omega: float
    seed: int
    device: Any
    device_map: Any
    dtype: str
    threads: int | None
    dry_run: bool
    home: str


@dataclass(frozen=True)
class Fusing:
    """A fusion's parts, ready to use. ``adapter`` is None where the checkpoint's own config is to tell."""

    method: Method | Stitched
    calibration: SampleCalibration
    adapter: Adapter | None
    pretrained: Path
    finetuned: tuple[Path, ...]
    out: Path | None
    patch: Path | None
    scope: tuple[str, ...] | None
    embeddings: Embeddings
    out_dtype: OutDtype
    max_shard_bytes: int
    seed: int
    devices: tuple[str, ...]
    device_map: str | Mapping[str, str | int] | None
    dtype: str
    threads: int | None
    dry_run: bool
    home: Path
    config: Mapping[str, Any]


def fusing(composed: DictConfig) -> Fusing:
    """The parts of a composed configuration. Raises ConfigError naming the key or group, or what a part raises."""
    config = strict(composed, FuseConfig)
    problems = share_problems(config)
    if config.dtype not in ("auto", *DTYPES):
        problems.append(f"dtype={config.dtype} is none of auto, {', '.join(DTYPES)}")
    if config.threads is not None and config.threads < 1:
        problems.append(f"threads={config.threads} is less than 1")
    if config.out is None and config.patch is None and not config.dry_run:
        problems.append("neither out nor patch is set, so there is nothing to write; name a folder or a file")
    if problems:
        raise ConfigError(f"configuration: {'; '.join(problems)}")
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    from tailor.sizes import parse_bytes

    model = None if resolved["model"] is None else instantiate_group("model", resolved["model"])
    scope, out, patch = resolved["scope"], config.out, config.patch
    return Fusing(
        method=instantiate_group("baseline", resolved["baseline"]),
        calibration=instantiate_group("calibration", resolved["calibration"]),
        adapter=None if model is None else model.adapter,
        pretrained=Path(config.pretrained),
        finetuned=tuple(map(Path, _texts("finetuned", resolved["finetuned"]))),
        out=None if out is None else Path(out),
        patch=None if patch is None else Path(patch),
        scope=None if scope is None else _texts("scope", scope),
        embeddings=config.embeddings,
        out_dtype=config.out_dtype,
        max_shard_bytes=parse_bytes(config.max_shard_size, "max_shard_size"),
        seed=config.seed,
        devices=_texts("device", resolved["device"]),
        device_map=resolved["device_map"],
        dtype=config.dtype,
        threads=config.threads,
        dry_run=config.dry_run,
        home=Path(config.home),
        config=resolved,
    )


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """One text, or a list of some."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not values or not all(isinstance(each, str) for each in values):
        raise ConfigError(f"configuration: {name}={value!r} is neither a text nor a list of texts")
    return tuple(values)
