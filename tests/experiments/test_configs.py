"""Every YAML composes and instantiates, and what does not fit is refused before any stage runs."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.data import BenchmarkData, check_suite
from experiments.errors import ConfigError
from experiments.schema import GROUPS
from tailor.errors import InvalidSetting
from tests.experiments.conftest import ROOT, parts_of

CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group in (*GROUPS, "experiment") for option in options(group)]
)
def test_every_option_composes_and_instantiates(group: str, option: str) -> None:
    parts = parts_of(f"{group}={option}")
    if group != "experiment":
        assert parts.choices[group] == option
    check_suite(parts.suite, *parts.tasks)


@pytest.mark.parametrize("option", options("benchmark"))
def test_every_benchmark_instantiates(option: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("run", [f"+benchmark={option}"])
    assert isinstance(instantiate(config.benchmark, _convert_="all"), BenchmarkData)


@pytest.mark.parametrize("option", options("baseline"))
def test_a_baseline_states_every_field_of_its_method(option: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        stated = set(compose("run", [f"baseline={option}"]).baseline) - {"_target_"}
    method = parts_of(f"baseline={option}").method
    assert is_dataclass(method)
    assert stated == {field.name for field in fields(method)}


@pytest.mark.parametrize("path", sorted(CONF.glob("experiment/*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_says_how_to_run_it(path: Path) -> None:
    package, command, *_ = path.read_text().splitlines()
    assert package == "# @package _global_"
    assert command.startswith("# python -m experiments.run -m experiment=" + path.stem)
    for line in path.read_text().splitlines():
        if line.startswith("# python -m experiments.run -m "):
            swept = dict(override.split("=") for override in line.split(" -m ")[2].split())
            values = {name: value.split(",") for name, value in swept.items()}
            for number in range(max(map(len, values.values()))):
                parts = parts_of(*(f"{name}={some[number % len(some)]}" for name, some in values.items()))
                check_suite(parts.suite, *parts.tasks)


def test_overrides_reach_the_method() -> None:
    method = parts_of("baseline=tailor_exact", "sparsity=0.2", "omega=0.25", "calibration.damping=0.1").method
    assert (method.sparsity, method.omega, method.decorator, method.damping) == (0.2, 0.25, "exact", 0.1)


def test_the_training_follows_the_model() -> None:
    assert parts_of("experiment=digits_instructblip_gqa").choices["training"] == "digits_instructblip"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity=1.5", r"sparsity=1.5 is outside \[0, 1\]"),
        ("omega=-0.1", r"omega=-0.1 is outside \[0, 1\]"),
        ("threads=0", "threads=0 is less than 1"),
        ("dtype=int8", "dtype=int8 is none of float32"),
        ("seed=one", "seed"),
        ("seed=-1", r"seed=-1 is outside \[0, 2"),
        ("~seed", "seed not set"),
        ("training.epochs=two", "Training.epochs: 'two' is not a whole number of at least 1"),
        ("training.epochs=0", "Training.epochs: 0 is not a whole number of at least 1"),
        ("training.learning_rate=abc", "Training.learning_rate: 'abc' is not a number of more than 0"),
        ("training.learning_rate=-1e-3", "Training.learning_rate: -0.001 is not a number of more than 0"),
        ("training.warmup=2", "Training.warmup: 2 is not a number of at least 0 and at most 1"),
        ("training.schedule=foo", "Training.schedule: 'foo' is not one of linear, cosine"),
        ("calibration.batch_size=0", "Calibration.batch_size: 0 is not"),
        ("calibration.retain_samples=0", "Calibration.retain_samples: 0 is not"),
        ("calibration.damping=-1", "Calibration.damping: -1 is not a number of at least 0"),
        ("calibration.compare_decorators=maybe", "Calibration.compare_decorators: 'maybe' is not true or false"),
        ("model.base.vision.steps=0", "Phase.steps: 0 is not"),
        ("task.train.count=0", "CaptionRows.count: 0 is not"),
        ("suite.colour.rows.split=tset", "QuestionRows.split: 'tset' is not one of train, dev, test"),
        ("suite.colour.rows.domain=studoi", "QuestionRows.domain: 'studoi' is not one of studio, street"),
        ("task.test.rows.style=strete", "CaptionRows.style: 'strete' is not one of everyday, street"),
        ("+learning_rate=1", "learning_rate"),
        ("other_tasks=3", "other_tasks"),
        ("+other_tasks.second=3", "task=3: choose one of the options in conf/task"),
        ("+baseline.rank=3", "baseline.*unexpected keyword argument 'rank'"),
        ("+suite.colour.rows.colour=3", "suite.*unexpected keyword argument 'colour'"),
        ("suite.colour.rows.skill=juggling", "'juggling' is not one of colour, digit"),
        ("task.train.novelty=much", "'much' is not one of none, some, all, any"),
        ("logger.mode=sometimes", "'sometimes' is none of offline, online"),
        ("model.adapter._target_=experiments.models.no_such", "model: .*no_such"),
    ],
)
def test_what_does_not_fit_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parts_of("baseline=dare", override)


def test_a_methods_own_range_is_named() -> None:
    with pytest.raises(InvalidSetting, match="alpha"):
        parts_of("baseline=wise_ft", "baseline.alpha=2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baseline.sparsity=1.5", r"Stitched.sparsity = 1.5 is outside \[0, 1\]"),
        ("baseline.how=sum", "Stitched.how = 'sum' is none of paper, mean, joint"),
        (
            "baseline.how=joint",
            "joint solves for the compensation itself, so the decorator 'sparsegpt' would not be used",
        ),
    ],
)
def test_a_stitching_that_cannot_be_is_named(override: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        parts_of("baseline=tailor_stitch_paper", override)


def test_the_target_may_not_count_as_pretrained() -> None:
    parts = parts_of("task.test.benchmark.name=colour")
    with pytest.raises(ConfigError, match="colour stands twice"):
        check_suite(parts.suite, parts.task)


def test_the_resolved_configuration_composes_the_same_parts() -> None:
    parts = parts_of("baseline=tailor", "omega=0.3")
    again = instantiate(OmegaConf.create(dict(parts.config)).baseline, _convert_="all")
    assert again == parts.method
