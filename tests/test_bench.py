"""Speed: that PyTorch's step and text are ours. Pretraining: its checkpoint, and that it can be resumed."""

import dataclasses

import bench
import jax
import numpy as np
import pretrain
import pytest
from conftest import MODEL, made_up_code, random_params

import data
import model as lm
import ponder

SMALL = MODEL._replace(positions=32)
CFG = ponder.fill_in(ponder.Config(chunk=16, hidden=12, dtype="float32", chunks=2, batch=2), 1)


@pytest.mark.parametrize("kind", ["swiglu", "lora"])
def test_the_step_in_pytorch_computes_what_ours_does(kind):
    pytest.importorskip("torch")
    b = bench.open_bench(dataclasses.replace(CFG, fast=kind), 1, SMALL, random_params(SMALL, 0))
    ours, make, error = bench.update_pair(b)
    (loss, w), theirs = ours(), make(lambda function: function)()
    assert error((loss, w), theirs) < 1e-4
    assert error((loss, jax.tree.map(lambda x: 0.9 * x, w)), theirs) > 0.1


def test_generation_is_that_of_transformers_and_a_trace_has_lines():
    pytest.importorskip("torch")
    rows = bench.bench_decode(bench.open_bench(CFG, 1, SMALL, random_params(SMALL, 0)))
    assert [row.difference for row in rows] == [0, 0]
    assert next(bench.trace_programs(CFG))[1] > 100


def test_seconds_are_medians(monkeypatch):
    ticks = iter(np.cumsum([0, 0, 0, 3, 0, 0, 1, 0, 0, 8, 0]).tolist())
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(bench.time, name, lambda: next(ticks))
    assert bench.measure(3, {"a": lambda: None}) == {"a": 3}


def test_a_saved_gpt2_is_loaded_as_it_was(tmp_path):
    pretrain.save_gpt2(tmp_path, MODEL, params := random_params(MODEL, 0), np.float32)
    model, loaded = lm.load_model(tmp_path)
    assert model == MODEL and jax.tree.all(jax.tree.map(np.array_equal, params, loaded))


def test_a_resumed_pretraining_ends_like_one_that_ran_through(tmp_path, monkeypatch):
    files = [data.SourceFile(path.split("/")[0], path, text) for path, text in made_up_code(20)]
    small = {"TINY": MODEL._replace(vocab=300), "WINDOWS": 4, "EVERY": 2, "read_packages": lambda *_: files}
    for name, x in small.items():
        monkeypatch.setattr(pretrain, name, x)
    whole = pretrain.Pretrain(tmp_path / "whole", steps=4, dtype="float32")
    parts = dataclasses.replace(whole, out=tmp_path / "parts")
    pretrain.pretrain(whole)
    step, steps = pretrain.pretrain_step, iter("ab")  # two steps, then the run is stopped
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(pretrain, "pretrain_step", lambda *args: next(steps) and step(*args))
        pretrain.pretrain(parts)
    pretrain.pretrain(dataclasses.replace(parts, resume=True))
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (parts.out / name).read_bytes() == (whole.out / name).read_bytes()
