"""Speed: that PyTorch's step and text are ours. Pretraining: its loss, its model, and its resuming."""

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

CFG = ponder.fill_in(ponder.Config(chunk=16, hidden=12, dtype="float32", chunks=2, batch=2), 1)


def test_programs_are_small_and_no_longer_for_more_layers():
    lines = []
    for scale in ("125m", "xl"):
        cfg = ponder.fill_in(ponder.Config(scale=scale, dtype="float32"), 1)
        lines.append({name: count for name, count, _ in bench.trace_programs(cfg)})
    assert all(count <= 8000 for count in lines[0].values()), lines
    assert all(count <= 1.1 * lines[0][name] for name, count in lines[1].items()), lines


@pytest.mark.parametrize("kind", ["swiglu", "lora"])
def test_pytorch_takes_our_step_and_writes_our_text(base, kind):
    pytest.importorskip("torch")
    run = ponder.open_run(dataclasses.replace(CFG, base=str(base), fast=kind), base, lm.make_mesh())
    noise = lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape)  # all get a gradient
    slow = run.weights.slow | {"start": jax.tree.map(noise, run.weights.slow["start"])}
    ours, make = bench.update_pair(run._replace(weights=run.weights._replace(slow=slow)))
    (loss, state), (their_loss, theirs) = ours(), make(lambda function: function)()
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    for name, start in lm.flatten(slow["start"]).items():
        moves, expected = lm.flatten(state.w)[name] - start, theirs[name].numpy() - start
        np.testing.assert_allclose(moves, expected, atol=1e-4 * np.abs(moves).max(), err_msg=name)
    _, ours, make = bench.decode_pair(run, 2)
    np.testing.assert_array_equal(ours(), make(None)())


def test_a_saved_gpt2_is_loaded_as_it_was_and_a_few_rows_at_a_time_have_its_loss(tmp_path, monkeypatch):
    pretrain.save_gpt2(tmp_path, MODEL, params := random_params(MODEL, 0), np.float32)
    model, loaded = lm.load_model(tmp_path)
    assert model == MODEL and jax.tree.all(jax.tree.map(np.array_equal, params, loaded))
    rows = np.random.default_rng(0).integers(0, MODEL.vocab, (2, 14))
    expected = lm.token_losses(lm.forward(MODEL, params, rows[:, :-1]), rows[:, 1:]).mean()
    monkeypatch.setattr(pretrain, "LOSS_ROWS", 5)  # of 26 rows two at a time then
    np.testing.assert_allclose(pretrain.language_loss(MODEL, params, rows), expected, rtol=1e-5)


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
