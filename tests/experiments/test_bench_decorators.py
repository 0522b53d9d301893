"""The benchmark of decorators, end to end on one tiny layer; what it times is not tested."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments.bench.decorators import main, median_seconds, random_layer


def test_one_tiny_layer(tmp_path, capsys):
    main(["--layers", "40x60", "--threads", "1", "--repeats", "1", "--out", str(tmp_path / "bench")])
    rows = pd.read_csv(tmp_path / "bench" / "decorators.csv")
    assert len(rows) == 1 and rows.notna().drop(columns=["peak_mib_sparsegpt", "peak_mib_exact"]).all(axis=None)
    row = rows.iloc[0]
    assert row.layer == "40x60" and row.outputs == 40 and row.inputs == 60 and "1 threads" in row.machine
    assert 0 < row.error_exact < row.error_sparsegpt < row.error_none < 1 and row.residual < 1e-4
    assert row.error_ratio == pytest.approx(row.error_exact / row.error_sparsegpt)
    assert row.time_ratio == pytest.approx(row.seconds_exact / row.seconds_sparsegpt) and row.time_bar == 1.1
    assert row.time_bar_met == (max(row.time_ratio, row.time_ratio_layer) <= 1.1)
    for kind, head in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / "bench" / f"decorators.{kind}").read_bytes().startswith(head)
    assert "40x60" in capsys.readouterr().out


def test_layers_are_the_same_each_time():
    one, two = (random_layer(8, 30, torch.device("cpu")) for _ in range(2))
    assert torch.equal(one.tuned, two.tuned) and torch.equal(one.grams["layer"], two.grams["layer"])
    assert not one.base.any() and one.tuned.shape == (8, 30)


def test_actions_take_turns():
    done = []
    median_seconds({name: lambda name=name: done.append(name) for name in "ab"}, torch.device("cpu"), 2)
    assert done == ["a", "b"] * 3  # once to warm up


@pytest.mark.parametrize("option", [["--layers", "40"], ["--layers", "0x4"], ["--repeats", "0"], ["--threads", "x"]])
def test_options_that_mean_nothing(option, capsys):
    with pytest.raises(SystemExit):
        main(option)
    assert option[1] in capsys.readouterr().err
