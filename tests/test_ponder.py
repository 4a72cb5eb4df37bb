"""The command line: the whole job on a tiny model, its files, resuming, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import data
import model as lm
import ponder
import rl

ROOT = Path(ponder.__file__).parent
SIZES = "--chunk 16 --chunks 6 --batch 2 --train-documents 4 --test-documents 5 --meta-steps 2 --meta-chunks 3 --iterations 3"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random GPT-2 with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = data.train_tokenizer((f.text for f in data.synthetic_source(4)), 400)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    model = lm.Model(tokenizer.get_vocab_size(), 32, 16, 4, 2)
    lm.save_gpt2(folder, model, lm.init_gpt2(jax.random.key(0), model))
    return folder


@pytest.fixture(scope="module")
def arguments(base) -> list[str]:
    return ["--base", str(base), "--data", "synthetic", "--dtype", "float32", *SIZES.split()]


def call(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """ponder.py's exit code and standard error."""
    monkeypatch.setattr(sys, "argv", ["ponder.py", *map(str, arguments)])
    try:
        ponder.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, arguments) -> Path:
    """One whole run, as a user starts it."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = subprocess.run([sys.executable, ROOT / "ponder.py", *arguments, "--out", out], capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    return out


def test_run_leaves_its_files(finished):
    for name in ("config.json", "metrics.jsonl", "results.json", "report.md", "ttt.safetensors", "policy.safetensors"):
        assert (finished / name).stat().st_size > 0, name
    for name in ("pareto.png", "timeline.png", "training.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG"), name
    report = (finished / "report.md").read_text()
    assert report.splitlines()[2].startswith("On 5 repositories that this run did not train on")
    assert not list(finished.glob(".*")), "a temporary file was left"


def test_results_have_the_agreed_fields_and_keep_the_budget(finished):
    results = json.loads((finished / "results.json").read_text())
    fields = {
        "scale",
        "data",
        "chunks_per_document",
        "documents",
        "repositories",
        "budget",
        "budget_per_chunk",
        "cost_model",
        "methods",
    }
    assert fields | {"seeds"} <= results.keys()
    names = {
        "base",
        "skip",
        "update_1",
        "update_2",
        "update_4",
        "every_n",
        "front_loaded",
        "random",
        "loss_threshold",
        "policy",
        "oracle",
    }
    assert results["methods"].keys() == names
    inner = {"loss", "loss_ci", "gain", "gain_ci", "cost_nominal", "cost_flops", "seconds", "update_rate", "oracle_recovery"}
    assert all(inner <= m.keys() for m in results["methods"].values())
    assert results["budget"] == 12.0 and results["budget_per_chunk"] == 2.0
    for document in results["per_document"]:
        assert document["loss"]["oracle"] <= min(document["loss"][n] for n in ("every_n", "front_loaded", "random"))
    for name in names - {"update_1", "update_2", "update_4"}:
        assert results["methods"][name]["cost_nominal"] <= 2.0 + 1e-6, name
    assert [results["methods"][n]["cost_nominal"] for n in ("skip", "update_1", "update_2", "update_4")] == [
        1.0,
        3.0,
        6.0,
        12.0,
    ]


def test_metrics_are_one_line_for_each_step(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows if r["stage"] == "policy"]
    assert steps == [1, 2, 3]
    assert all(np.isfinite(list(r.values())[2:]).all() for r in rows)


@pytest.mark.parametrize("stop", [("ttt", 1), ("policy", 2)])
def test_interrupted_run_resumes_to_the_same_result(finished, arguments, tmp_path, monkeypatch, capsys, stop):
    add = ponder.Log.add

    def interrupted(self, step, figures):
        add(self, step, figures)
        if (self.stage, step) == stop:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ponder.Log, "add", interrupted)
        code, err = call(patch, capsys, *arguments, "--out", out)
        assert code == 130 and "--resume" in err
    assert call(monkeypatch, capsys, *arguments, "--out", out, "--resume")[0] == 0
    for name in ("ttt.safetensors", "policy.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    losses = lambda folder: {n: m["loss"] for n, m in json.loads((folder / "results.json").read_text())["methods"].items()}
    assert losses(out) == losses(finished)


def test_evaluation_alone_repeats_the_result(finished, arguments, monkeypatch, capsys):
    before = json.loads((finished / "results.json").read_text())
    assert call(monkeypatch, capsys, *arguments, "--out", finished, "--resume", "--stage", "eval")[0] == 0
    after = json.loads((finished / "results.json").read_text())
    assert {n: m["loss"] for n, m in after["methods"].items()} == {n: m["loss"] for n, m in before["methods"].items()}


def test_fixed_action_and_flops_budget_are_accepted(arguments, tmp_path, monkeypatch, capsys):
    extra = ["--action", "UPDATE_1", "--cost", "flops", "--objective", "reconstruction", "--out", tmp_path / "run"]
    assert call(monkeypatch, capsys, *arguments, *extra)[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["cost_model"] == "flops" and results["methods"]["policy"]["cost_flops"] <= results["budget_per_chunk"] + 1e-6


@pytest.mark.parametrize(("change", "ships"), [({}, True), ({"fresh": True}, False), ({"chunk": 128}, False), ({"base": "x"}, False)])
def test_shipped_weights_serve_the_default_settings_alone(change, ships, tmp_path):
    cfg = ponder.resolve(ponder.Config(**change))
    assert ponder.ships(cfg) == ships
    assert ponder.weights_folder(cfg, tmp_path) == (ponder.ASSETS / "tiny" if ships else None)


# --- bad input: one line, exit code 2 ---


def refused(result: tuple[int, str], *words: str) -> None:
    code, err = result
    lines = [line for line in err.splitlines() if line.startswith("ponder.py:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert all(word in lines[0] for word in words), err


def test_missing_empty_and_binary_folders(base, tmp_path, monkeypatch, capsys):
    run = lambda folder: call(monkeypatch, capsys, "--base", base, "--chunk", 16, "--data", folder, "--out", tmp_path / "out" / folder.name)
    refused(run(tmp_path / "missing"), "--data", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty"), "no source code found")
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries" / "a.py").write_bytes(b"\0\1\2")
    refused(run(tmp_path / "binaries"), "no source code found", "1 binary")


def test_too_little_code(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("x = 1\n")
    arguments = ["--base", base, "--chunk", 16, "--data", tmp_path / "code", "--out", tmp_path / "out"]
    refused(call(monkeypatch, capsys, *arguments), "--chunks")


def test_output_folder_that_can_not_be_written(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    refused(call(monkeypatch, capsys, *arguments, "--out", tmp_path / "file" / "run"), "--out", "can't write")


def test_a_finished_run_is_not_overwritten(finished, arguments, monkeypatch, capsys):
    before = (finished / "results.json").read_bytes()
    refused(call(monkeypatch, capsys, *arguments, "--out", finished), "--resume")
    refused(call(monkeypatch, capsys, *arguments, "--out", finished, "--resume", "--seed", 7), "other settings", "seed")
    assert (finished / "results.json").read_bytes() == before


def test_damaged_checkpoint(finished, arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "ttt.safetensors", "policy_state.safetensors"):
        (out / name).write_bytes((finished / name).read_bytes())
    content = bytearray((out / "policy_state.safetensors").read_bytes())
    content[-3] ^= 1
    (out / "policy_state.safetensors").write_bytes(content)
    refused(call(monkeypatch, capsys, *arguments, "--out", out, "--resume"), "policy_state.safetensors", "checksum")
    (out / "policy_state.safetensors").write_bytes(content[:100])
    refused(call(monkeypatch, capsys, *arguments, "--out", out, "--resume"), "policy_state.safetensors")


def test_budget_below_the_cost_of_reading(arguments, tmp_path, monkeypatch, capsys):
    refused(call(monkeypatch, capsys, *arguments, "--budget", 5.9, "--out", tmp_path / "run"), "--budget 5.9", "costs 6")
    refused(call(monkeypatch, capsys, *arguments, "--budget", "inf", "--out", tmp_path / "run3"), "--budget inf")
    assert not (tmp_path / "run").exists(), "a refused run claimed its folder"
    refused(call(monkeypatch, capsys, *arguments, "--budget", "nan", "--out", tmp_path / "run2"), "--budget nan")


def test_budget_that_can_not_bind_is_noted(base, tmp_path, monkeypatch, capsys):
    cfg = ponder.resolve(ponder.Config(base=str(base), data="synthetic", chunk=16, chunks=6, budget=72.0))
    ponder.open_workspace(cfg, tmp_path)
    assert "can't bind" in capsys.readouterr().err


def test_a_policy_is_not_evaluated_under_another_budget(finished, arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("ttt.safetensors", "policy.safetensors"):
        (out / name).write_bytes((finished / name).read_bytes())
    result = call(monkeypatch, capsys, *arguments, "--out", out, "--resume", "--stage", "eval", "--budget", 20)
    refused(result, "trained for a budget of 12", "not a budget of 20")


@pytest.mark.parametrize("option", ["seed", "chunk", "iterations", "batch", "meta-steps"])
def test_negative_numbers(arguments, tmp_path, monkeypatch, capsys, option):
    refused(call(monkeypatch, capsys, *arguments, f"--{option}", -1, "--out", tmp_path / "run"), f"--{option} -1", "at least")


def test_unknown_scale(monkeypatch, capsys):
    code, err = call(monkeypatch, capsys, "--scale", "huge")
    assert code == 2 and "huge" in err and "tiny" in err and "Traceback" not in err


def test_hub_model_without_network(tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(call(monkeypatch, capsys, "--base", "ponderttt/no-such-model", "--out", tmp_path / "run"), "--base", "give a folder")


def test_state_round_trip_and_wrong_shape(tmp_path):
    policy = rl.init_policy(jax.random.key(3))
    ponder.save_state(tmp_path / "policy.safetensors", policy, note="x")
    back, meta = ponder.load_state(tmp_path / "policy.safetensors", policy)
    assert meta == {"note": "x"}
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(back)))
    with pytest.raises(lm.ModelError, match="another configuration"):
        ponder.load_state(tmp_path / "policy.safetensors", rl.init_policy(jax.random.key(3), hidden=8))


def test_windows_are_drawn_by_the_root_of_a_packages_size():
    sizes, length = [400, 100, 25], 11
    tokens = np.concatenate([np.append(0, np.full(size - 1, i + 1)) for i, size in enumerate(sizes)])
    windows = ponder.sample_windows(tokens, np.flatnonzero(tokens == 0), 0.5, np.random.default_rng(0), 4000, length)
    assert windows.shape == (4000, length) and windows.dtype == np.int32
    share = np.bincount(windows.max(1), minlength=4)[1:] / 4000
    np.testing.assert_allclose(share, np.sqrt(sizes) / np.sqrt(sizes).sum(), atol=0.03)
    assert all(len(set(w) - {0}) == 1 for w in windows)  # none crosses into another package
