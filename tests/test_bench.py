"""The speed table: its rows on a tiny random model, and that PyTorch's step computes what ours does."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from conftest import CHUNK, MODEL, random_params

import eval as evaluation
import model as lm
import ponder

CFG = ponder.resolve(ponder.Config(chunk=CHUNK, hidden=12, dtype="float32", chunks=3, batch=2, meta_chunks=2))


@pytest.fixture(scope="module")
def bench():
    return evaluation.open_bench(evaluation.BenchOptions(repeats=3, longest=4), CFG, MODEL, random_params(MODEL, 0))


def test_a_median_is_that_of_its_samples(bench):
    seconds, samples = evaluation.measure(bench, {"a": lambda: None, "b": lambda: np.ones(3).sum()})
    assert set(seconds) == set(samples) == {"a", "b"}
    for name, s in samples.items():
        assert len(s["wall"]) == len(s["cpu"]) == 3
        assert seconds[name] == np.median(s["cpu" if evaluation.cores() == 1 else "wall"])


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch, which is not installed")
@pytest.mark.parametrize("kind", ["swiglu", "lora"])
def test_the_step_in_pytorch_computes_what_ours_does(bench, kind):
    b = evaluation.open_bench(bench.options, dataclasses.replace(CFG, fast=kind), MODEL, bench.params)
    ours, theirs, error = evaluation.update_pair(b)
    assert error(ours(), theirs(lambda f: f)()) < 1e-4
    halved = (0.5 * ours()[0], ours()[1])
    assert error(halved, theirs(lambda f: f)()) > 0.4


def test_features_cost_less_than_they_are_allowed(bench):
    flops, seconds, text = evaluation.bench_features(bench)
    assert flops["ratio"] > 0 and seconds["ratio"] == pytest.approx(seconds["ratio"]) and text["ratio"] > 0


def test_a_ppo_iteration_gives_the_same_whatever_is_run_again(bench):
    everything, epochs = evaluation.bench_ppo(bench)
    assert everything["difference"] < 1e-4 and epochs["difference"] < 1e-4
    for r in (everything, epochs):
        medians = [np.median(s["cpu" if evaluation.cores() == 1 else "wall"]) for s in r["samples"].values()]
        assert r["ratio"] == pytest.approx(medians[1] / medians[0])


def test_meta_flops(bench):
    """A step needs its own forward and backward besides, and the chunk's backward goes through it."""
    counts = [evaluation.meta_flops(bench.setup, steps) for steps in lm.STEPS]
    assert counts == sorted(counts) and jax.tree.leaves(counts)[0] > lm.count_flops(MODEL, bench.setup.fast, CHUNK)[0] * 0.5
