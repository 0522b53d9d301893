"""The run's configuration: typed at the top, strict everywhere, its groups instantiated before any stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import FORESEEN, ConfigError

if TYPE_CHECKING:  # composing and checking a configuration must not wait for torch
    from experiments.data import BenchmarkData, Task
    from experiments.models.pretrained import PretrainedModel
    from experiments.stages.calibrate import Calibration
    from experiments.stages.finetune import Training
    from experiments.tracking import Tracking
    from tailor.method import Method
    from tailor.methods.stitched import Stitched

DTYPES = ("float32", "bfloat16", "float16")
GROUPS = ("model", "task", "baseline", "training", "calibration", "suite", "logger")


@dataclass
class RunConfig:
    """What `conf/run.yaml` composes. The groups are nodes with a ``_target_``, checked when they are instantiated."""

    model: Any
    task: Any
    other_tasks: dict[str, Any]
    baseline: Any
    training: Any
    calibration: Any
    suite: dict[str, Any]
    logger: Any
    seed: int
    sparsity: float
    omega: float
    device: str
    dtype: str
    threads: int
    batch_size: int
    home: str


@dataclass(frozen=True)
class Experiment:
    """A run's parts, ready to use; `config` is what they were made from, resolved."""

    model: PretrainedModel
    task: Task
    other_tasks: tuple[Task, ...]
    method: Method | Stitched
    training: Training
    calibration: Calibration
    suite: tuple[BenchmarkData, ...]
    logger: Tracking
    seed: int
    device: str
    dtype: str
    threads: int
    batch_size: int
    home: str
    config: Mapping[str, Any]
    choices: Mapping[str, str]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All targets: they are scored, whichever of them the method learns."""
        return (self.task, *self.other_tasks)


def experiment(composed: DictConfig, choices: Mapping[str, str]) -> Experiment:
    """The parts of a composed configuration. Raises ConfigError naming the key or group, or what a part raises."""
    config = strict(composed, RunConfig)
    _check_ranges(config)
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    parts = {group: instantiate_group(group, resolved[group]) for group in GROUPS}
    other_tasks = [instantiate_group("task", node) for node in resolved["other_tasks"].values()]
    return Experiment(
        model=parts["model"],
        task=parts["task"],
        other_tasks=tuple(other_tasks),
        method=parts["baseline"],
        training=parts["training"],
        calibration=parts["calibration"],
        suite=tuple(parts["suite"].values()),
        logger=parts["logger"],
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        threads=config.threads,
        batch_size=config.batch_size,
        home=config.home,
        config=resolved,
        choices={group: choices[group] for group in GROUPS},
    )


def strict(composed: DictConfig, schema: type) -> Any:
    """``composed`` under the types of ``schema``. A key that it lacks is an error, ``+key=`` included."""
    try:
        plain = OmegaConf.to_container(composed)  # as a DictConfig it would bring its own unknown keys along
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in fields(schema))
        raise ConfigError(f"configuration: {str(error).splitlines()[0]} (the keys are {known})") from error
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"configuration: {', '.join(missing)} not set; name a value or an option")
    return merged


def share_problems(config: Any) -> list[str]:
    """What is wrong with the values that all configurations of fusions have."""
    problems = [
        f"{name}={getattr(config, name)} is outside [0, 1]"
        for name in ("sparsity", "omega")
        if not 0 <= getattr(config, name) <= 1
    ]
    if not 0 <= config.seed < 2**32:
        problems.append(f"seed={config.seed} is outside [0, 2³²)")
    return problems


def _check_ranges(config: Any) -> None:
    problems = share_problems(config)
    problems += [f"{name}={value} is less than 1" for name in ("threads", "batch_size") if (value := config[name]) < 1]
    if config.dtype not in DTYPES:
        problems.append(f"dtype={config.dtype} is none of {', '.join(DTYPES)}")
    if problems:
        raise ConfigError(f"configuration: {'; '.join(problems)}")


def instantiate_group(group: str, node: Any) -> Any:
    """What a group's node makes. Raises ConfigError, or the foreseen error that a part raised."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if not isinstance(node, dict):
        raise ConfigError(f"{group}={node}: choose one of the options in conf/{group}")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, FORESEEN):
                raise cause from None
            cause = cause.__cause__
        finding = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{group}: {finding} (in conf/{group} or an override of it)") from error
