"""The speed table: its rows on a tiny random model, and that PyTorch's step computes what ours does."""

import dataclasses
import importlib.util

import numpy as np
import pytest
from conftest import CHUNK, MODEL, random_params

import eval as evaluation
import model as lm
import ponder

CFG = ponder.resolve(ponder.Config(chunk=CHUNK, hidden=12, dtype="float32", chunks=3, batch=2, meta_chunks=2))


def median(samples) -> float:
    return np.median(samples["cpu" if evaluation.cores() == 1 else "wall"])


@pytest.fixture(scope="module")
def bench():
    return evaluation.open_bench(evaluation.Speed(repeats=3, longest=4), CFG, MODEL, random_params(MODEL, 0))


def test_a_median_is_that_of_its_samples(bench):
    seconds, samples = evaluation.measure(bench, {"a": lambda: None, "b": lambda: np.ones(3).sum()})
    assert set(seconds) == set(samples) == {"a", "b"}
    for name, s in samples.items():
        assert len(s["wall"]) == len(s["cpu"]) == 3
        assert seconds[name] == median(s)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch, which is not installed")
@pytest.mark.parametrize("kind", ["swiglu", "lora"])
def test_the_step_in_pytorch_computes_what_ours_does(bench, kind):
    b = evaluation.open_bench(bench.options, dataclasses.replace(CFG, fast=kind), MODEL, bench.params)
    ours, theirs, error = evaluation.update_pair(b)
    assert error(ours(), theirs(lambda f: f)()) < 1e-4
    halved = (0.5 * ours()[0], ours()[1])
    assert error(halved, theirs(lambda f: f)()) > 0.4


def test_rows_of_features_follow_from_their_samples(bench):
    flops, seconds, _ = evaluation.bench_features(bench)
    prefix, predict, more, text = (median(seconds["samples"][name]) for name in ("prefix", "predict", "with features", "text"))
    assert seconds["ratio"] == pytest.approx((more - predict) / (prefix + predict)) and text > 0
    assert flops["ratio"] > 0 and flops["met"] == (flops["ratio"] < 0.01)


@pytest.mark.slow
def test_a_ppo_iteration_gives_the_same_whatever_is_run_again(bench):
    for r in evaluation.bench_ppo(bench):
        ours, theirs = map(median, r["samples"].values())
        assert r["difference"] < 1e-4 and r["ratio"] == pytest.approx(theirs / ours)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch, which is not installed")
def test_generation_is_the_same_beside_transformers(bench):
    *beside, growth = evaluation.bench_decode(bench)
    assert [r["difference"] for r in beside] == [0, 0] and all(r["ratio"] > 0 for r in beside)
    few, many = map(median, growth["samples"].values())
    assert growth["ratio"] == pytest.approx(many / few)


def test_meta_training_needs_more_for_every_inner_step(bench):
    """At least what reading with as many steps needs, and backward through it."""
    counts = np.asarray([evaluation.meta_flops(bench.setup, steps) for steps in lm.STEPS[:2]])
    reading = np.asarray(lm.count_flops(MODEL, bench.setup.fast, CHUNK)[:2])
    assert (np.diff(counts) > np.diff(reading)).all() and counts[0] > reading[0]


def test_a_table_has_a_line_for_each_row():
    rows = [evaluation.row("a", "1 s", "2 s", 2.0, "1.5x", True, {}), evaluation.row("b", "", "not installed", None, "1.5x", None, {})]
    lines = evaluation.bench_table([*rows, evaluation.row("c", "1 s", "1 s", 1.0, "", None, {})]).splitlines()
    assert lines[2] == "| a | 1 s | 2 s | 2 | 1.5x | yes |"
    assert lines[3].endswith("| not measured here |") and lines[4] == "| c | 1 s | 1 s | 1 |  |  |"
