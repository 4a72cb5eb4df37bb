"""ponder.py: a whole run and its files, stopping and going on, trained weights, and what can be wrong."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SECRETS, write
from hypothesis import given
from hypothesis import strategies as st

import data
import eval as evaluation
import model as lm
import ponder
import rl

FLOPS: dict[lm.Spec, np.ndarray] = {}  # counting them takes a second


@pytest.fixture
def call(monkeypatch, capsys):
    """Have the command line do something in this process -> (exit code, what it said)."""
    count = lm.count_flops
    known = lambda spec, w: FLOPS[spec] if spec in FLOPS else FLOPS.setdefault(spec, count(spec, w))

    def command(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ponder.py", *map(str, arguments)])
        monkeypatch.setattr(lm, "keep_memory", lambda: None)
        monkeypatch.setattr(lm, "count_flops", known)
        with pytest.raises(SystemExit) as stop:
            ponder.main()
            sys.exit(0)
        said = capsys.readouterr()
        return stop.value.code, said.out + said.err

    return command


def refused(result: tuple[int, str], *words: str) -> None:
    """Exit code 2 and one line that has these words."""
    code, said = result
    line = said.strip().splitlines()[-1]
    assert code == 2 and line.startswith("ponder.py: ") and "Traceback" not in said, said
    assert all(word in line for word in words), line


def losses_of(folder: Path) -> dict[str, list[float]]:
    return json.loads((folder / "results.json").read_text())["losses"]


def same_files(ours: Path, theirs: Path, *names: str) -> None:
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


# --- 1. A whole run -----------------------------------------------------------------------------------
def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    weights = {f"{name}.safetensors" for name in ("ttt", "ttt_state", "policy", "policy_state")}
    plots = {"pareto.png", "document.png"}
    assert names == weights | plots | {"config.json", "metrics.jsonl", "results.json", "report.md"}
    assert all((finished / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    report = (finished / "report.md").read_text()
    assert "nan" not in report and all(f"]({name})" in report for name in plots)
    for path in finished.iterdir():
        secrets = (*SECRETS, *SECRETS.values(), os.environ["PATH"])
        assert not any(secret.encode() in path.read_bytes() for secret in secrets)


def test_results_have_the_agreed_fields_and_keep_the_budget(finished):
    results = json.loads((finished / "results.json").read_text())
    fields = {"loss", "gain", "gain_ci", "nominal", "flops", "seconds", "updates"}
    for name, m in results["methods"].items():
        assert m.keys() == fields | {"oracle_recovery"}
        assert 6 * m["nominal"] <= results["budget"] + 1e-6 or name in evaluation.FIXED
    assert [results["methods"][name]["nominal"] for name in evaluation.FIXED] == [1, 3, 6, 12]
    assert results["methods"]["skip"]["gain"] == 0 and results["methods"]["skip"]["flops"] == 1
    loss, frontier = results["losses"], results["frontier"]
    assert (np.asarray(loss["oracle"]) <= np.min([loss[name] for name in evaluation.BLIND], 0) + 1e-6).all()
    assert len(frontier) == 3 and all(p["nominal"] <= p["budget"] + 1e-6 for p in frontier)
    assert set(results["comparisons"]) == {*evaluation.BLIND, *rl.GATES} - {"ahead_threshold"}
    assert {data.split_of(name) for name in results["names"]} == {"test"}


def test_metrics_are_one_line_for_each_step(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = Counter((row["stage"], row["step"]) for row in rows)
    assert {("ttt", 1), ("ttt", 2), ("warm_start", 0), ("policy", 3)} <= steps.keys()
    assert set(steps.values()) == {1, 2} and steps["policy", 1] == 1  # 2: a step, and its validation
    assert np.isfinite([x for row in rows for name, x in row.items() if name != "stage"]).all()


def test_each_stage_reads_repositories_of_its_own_split_at_a_budget_in_its_currency(tmp_path, arguments):
    cfg = ponder.tyro.cli(ponder.Config, args=[*arguments, "--weights", "none", "--cost", "flops"])
    run = ponder.open_run(ponder.fill_in(cfg, 1), tmp_path, lm.make_mesh(), Counter())
    splits = {"meta": "train", "meta_valid": "valid", "train": "train", "valid": "valid", "test": "test"}
    assert run.texts.keys() == splits.keys()
    for name, texts in run.texts.items():
        assert {data.split_of(text.repo) for text in texts} == {splits[name]}
        assert all(len(text.tokens) == 6 * 16 + 1 and text.text_TU.shape == (6, 16) for text in texts)
    np.testing.assert_allclose(run.env.costs_A, run.flops_A, rtol=1e-6)
    assert float(run.env.budget) == pytest.approx(6 * (1 + run.flops_A[1]) / 2)


# --- 2. Stopping and going on --------------------------------------------------------------------------
def test_an_interrupted_run_resumes_to_the_same_files(finished, arguments, tmp_path, monkeypatch, call):
    out = tmp_path / "run"
    stops = [("ttt", 1), ("warm_start", 0), ("policy", 2), "policy.safetensors"]

    def stopping(act, name_of):
        def act_and_stop(*args, **more):
            act(*args, **more)
            if stops and name_of(*args) == stops[0]:
                stops.pop(0)
                raise KeyboardInterrupt

        return act_and_stop

    monkeypatch.setattr(data.Log, "add", stopping(data.Log.add, lambda log, step, _: (log.stage, step)))
    monkeypatch.setattr(lm, "save_state", stopping(lm.save_state, lambda path, _: path.name))
    while stops:
        code, said = call(*arguments, "--out", out, *["--resume"] * out.exists())
        assert code == 130 and "--resume continues" in said
    assert call(*arguments, "--out", out, "--resume")[0] == 0
    same_files(out, finished, "ttt.safetensors", "policy.safetensors", "metrics.jsonl")
    assert losses_of(out) == losses_of(finished)


DYING = """
import itertools, os, ponder
writes = itertools.count(1)
def dying(file):
    if next(writes) == 4:
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os._exit(9)
os.fsync = dying
ponder.main()
"""  # writes are config.json, metrics.jsonl, then checkpoints


def test_a_run_killed_while_writing_resumes_to_the_same_files(finished, arguments, tmp_path, call):
    out = tmp_path / "run"
    again = [*arguments, "--stage", "ttt", "--out", out]
    killed = subprocess.run([sys.executable, "-c", DYING, *again], cwd=ROOT, capture_output=True)
    assert killed.returncode == 9, killed.stderr
    assert list(out.glob(".ttt_state.*")) and not (out / "ttt.safetensors").exists()
    assert call(*again, "--resume")[0] == 0
    same_files(out, finished, "ttt.safetensors", "ttt_state.safetensors")
    assert not list(out.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ttt", "policy", "eval"])
def test_kills_at_random_moments_of_a_stage_change_nothing(stage, finished, arguments, tmp_path):
    rng, out = np.random.default_rng(len(stage)), tmp_path / "run"
    command = [sys.executable, ROOT / "ponder.py", *arguments, "--stage", stage]
    command += ["--weights", finished] if stage != "ttt" else []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = time.monotonic()
    assert subprocess.run([*command, "--out", tmp_path / "whole"], **quiet).returncode == 0
    seconds = time.monotonic() - started
    resume = lambda: ["--resume"] if (out / "config.json").exists() else []
    for _ in range(5):
        process = subprocess.Popen([*command, "--out", out, *resume()], **quiet)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL)
    assert subprocess.run([*command, "--out", out, *resume()], **quiet).returncode == 0
    names, whole = ({path.name for path in folder.iterdir()} for folder in (out, tmp_path / "whole"))
    assert names == whole and (stage != "eval" or losses_of(out) == losses_of(finished))
    apart = {name for name in names if name.endswith((".json", ".md", ".png"))}  # they hold seconds, or --out
    same_files(out, tmp_path / "whole", *names - apart)


def test_evaluation_alone_repeats_the_result(finished, arguments, tmp_path, call):
    assert call(*arguments, "--stage", "eval", "--weights", finished, "--out", tmp_path / "run")[0] == 0
    assert losses_of(tmp_path / "run") == losses_of(finished)
    same_files(tmp_path / "run", finished, "ttt.safetensors", "policy.safetensors")


def test_the_newest_run_is_resumed_and_a_new_one_has_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = ponder.fill_in(ponder.Config(), 1)
    again = dataclasses.replace(cfg, resume=True)
    for name, age in (("001", 30), ("002", 10), ("003", 20)):
        run = write(Path("runs", name), {"config.json": json.dumps(dataclasses.asdict(cfg), default=str)})
        os.utime(run / "config.json", (10**9 - age,) * 2)
    assert ponder.choose_folder(cfg) == Path("runs/004")
    assert ponder.choose_folder(again) == Path("runs/002")
    Path("runs/004").mkdir()  # another process has just taken it
    assert ponder.claim_folder(cfg, Path("runs/004")) == Path("runs/005")


# --- 3. Trained weights bring their settings along -------------------------------------------------------
def open_shipped(out=Path("none"), **changes):
    cfg = ponder.fill_in(ponder.Config(stage="eval", dtype="float32", **changes), 1)
    model, params = lm.load_model(ponder.ASSETS / "tiny")
    folder = ponder.find_weights(cfg, out)
    return folder, ponder.choose_fast(cfg, folder, model, params)


def test_shipped_weights_serve_the_options_that_fit_them_and_a_resumed_run_has_its_own(tmp_path):
    shipped = lm.Fast((6, 7), 256, momentum=0.3)
    for change in ({}, {"weights": str(ponder.ASSETS / "tiny"), "momentum": 0.3, "fast_blocks": (-1, 6)}):
        assert open_shipped(**change) == (ponder.ASSETS / "tiny", shipped)
    for change in ({"weights": "none"}, {"fast": "lora"}, {"fast_blocks": (-1,)}, {"chunk": 8}):
        folder, fast = open_shipped(**change)
        assert folder is None and fast.blocks == ((7,) if "fast_blocks" in change else (6, 7))
    (tmp_path / "ttt_state.safetensors").touch()
    assert open_shipped(tmp_path, resume=True)[0] is None
    shutil.copy(ponder.ASSETS / "tiny" / "ttt.safetensors", tmp_path)
    assert open_shipped(tmp_path, resume=True)[0] == tmp_path


def test_weights_that_do_not_fit_are_refused(finished, arguments, tmp_path, call):
    options = [*arguments, "--stage", "eval", "--out", tmp_path / "run", "--weights"]
    refused(call(*options, finished, "--momentum", "0.5"), "momentum")
    refused(call(*options, ponder.ASSETS / "tiny"), "base")
    refused(call(*options, tmp_path), "no trained fast weights")
    alone = shutil.copytree(finished, tmp_path / "alone")
    (alone / "policy.safetensors").unlink()
    refused(call(*options, alone), "no trained policy")
    assert not (tmp_path / "run").exists()


# --- 4. What can be wrong ------------------------------------------------------------------------------
def test_folders_that_can_not_be_used(finished, arguments, tmp_path, call):
    again = [*arguments, "--out"]
    refused(call(*again, finished), "already holds a run")
    refused(call(*again, tmp_path / "x", "--resume"), "no run in")
    refused(call(*again, finished, "--resume", "--seed", "7"), "other settings", "seed: 0")
    refused(call(*again, "/proc/run"), "can't write there")
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    for content in ("{", "null", "[1]"):
        (damaged / "config.json").write_text(content)
        refused(call(*again, damaged, "--resume"), "config.json is damaged")


@pytest.mark.parametrize("damage", ["header", "cut", "other"])
def test_a_damaged_checkpoint_is_refused(finished, arguments, tmp_path, damage, call):
    out = shutil.copytree(finished, tmp_path / "run")
    path = out / "ttt.safetensors"
    content = bytearray(path.read_bytes())
    content[9] ^= 255
    other = (finished / "policy.safetensors").read_bytes()
    path.write_bytes({"header": content, "cut": content[: len(content) // 2], "other": other}[damage])
    refused(call(*arguments, "--out", out, "--resume"), "ttt.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--budget 5.9", "reading a document costs 6"),
        ("--chunk 17", "two chunks must fit"),
        ("--chunks 9999", "tokens of a document"),
        ("--data no-such", "no-such: no such folder"),
        ("--fast-blocks 9", "blocks are 0 to 3"),
        ("--weights none --fast lora --objective reconstruction", "lora can't learn by reconstruction"),
        ("--base no-such-model", "no folder, nor does the hub give it"),
        ("--mesh-shape 3,3", "3 x 3 devices"),
        ("--mesh-shape 4", "give two numbers"),
        ("--batch -1", "--batch -1: must be"),
        ("--hosts localhost,2,0", "HOST:PORT,COUNT,INDEX; hosts didn't meet (invalid literal"),
        ("--stage compare", "--runs"),
        ("--generate", "--prompt"),
        ("--generate --prompt x --context no-such", "--context no-such: no such folder"),
        ("--benchmark humaneval --solutions reference", "--allow-code-execution"),
        ("--generate --prompt x --samples 2 --temperature 0", "--samples"),
    ],
)
def test_options_that_can_not_be(arguments, tmp_path, options, words, monkeypatch, call):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(call(*arguments, "--out", tmp_path / "run", *options.split()), words)
    assert not (tmp_path / "run").exists()


NUMBERS = ["chunks", "chunk", "batch", "train_documents", "valid_documents", "test_documents", "meta_steps"]
NUMBERS += ["iterations", "seed", "hidden", "samples", "max_new_tokens"]
VALUES = dict.fromkeys(NUMBERS, st.integers(-3, 5) | st.integers(-(2**70), 2**70))
VALUES |= {"momentum": st.floats(), "temperature": st.floats()}
VALUES |= {"frontier": st.lists(st.floats(), max_size=3).map(tuple), "data": st.text("ab/~.: é☃\n")}
SETTING = st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name]))


@given(st.lists(SETTING, max_size=3).map(dict))
def test_settings_are_refused_in_one_line_or_valid(values):
    try:
        cfg = ponder.fill_in(ponder.Config(**values), 1)
    except data.UserError as error:
        assert "\n" not in str(error) and str(error).startswith("--")
    else:
        assert all(0 <= (getattr(cfg, name) or 0) < 2**31 for name in NUMBERS) and cfg.chunks > 1 <= cfg.batch
        assert 0 <= (cfg.momentum or 0) < 1 and all(0 <= share < np.inf for share in cfg.frontier)


def test_a_quick_run_is_small_where_no_option_says_otherwise():
    cfg = ponder.fill_in(ponder.Config(scale="125m", quick=True, iterations=5), 1)
    assert (cfg.meta_steps, cfg.iterations, cfg.test_documents, cfg.train_documents) == (20, 5, 8, 48)
    assert cfg.chunk == 512 and cfg.batch == 8


def test_help_has_a_line_for_each_option_and_wrong_ones_are_named(monkeypatch, call):
    monkeypatch.setenv("COLUMNS", "120")
    code, said = call("--help")
    options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ponder.Config)]
    assert code == 0 and len(said.splitlines()) < 90 and all(f"{name} " in said for name in options)
    text = " ".join(said.replace("│", " ").split())
    assert not any(f"{name} (default" in text for name in options)  # each has its help
    code, said = call("--no-such-option")
    assert code == 2 and "--no-such-option" in said and "Traceback" not in said


def test_eval_is_the_same_door(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    command = [sys.executable, ROOT / "eval.py", "--stage", "compare", "--runs", finished, other]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("+0.0000 [0.0000, 0.0000]") >= 3, done.stderr


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    path, state = tmp_path / "x.safetensors", {"a": np.arange(3.0)}
    lm.save_state(path, state, step=1)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(SystemExit) as stop:
        ponder.launch(lambda: lm.save_state(path, {"a": np.zeros(3)}, step=2))
    assert stop.value.code == 2 and "No space left on device; once that is mended" in capsys.readouterr().err
    found, meta = lm.load_state(path, state)
    assert meta["step"] == 1 and list(found["a"]) == [0, 1, 2] and list(tmp_path.iterdir()) == [path]


def test_too_little_memory_is_one_line_and_a_fault_of_the_program_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stop:
        ponder.launch(lambda: np.ones(1 << 58))
    assert stop.value.code == 2 and "out of memory" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        ponder.launch(lambda: 1 / 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        ponder.launch(Mock(side_effect=jax.errors.JaxRuntimeError("INTERNAL: a bug")))


# --- 5. The stages' parts --------------------------------------------------------------------------------
def test_random_actions_mix_actions_differently_in_each_document():
    actions = ponder.random_actions(np.random.default_rng(0), 200, 50)
    rates = (actions[..., None] == np.arange(4)).mean(1)
    assert (rates.max(1) > 0.9).any() and (rates.max(1) < 0.45).any()
    np.testing.assert_allclose(rates.mean(0), 0.25, atol=0.06)


def test_w0_and_step_sizes_have_rates_of_their_own_and_bad_steps_are_dropped():
    slow = {"start": jnp.zeros(2), "log_step": {"w": jnp.zeros(2)}}
    optimizer = ponder.meta_optimizer(10)
    state = optimizer.init(slow)
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, slow), state, slow)
    np.testing.assert_allclose(updates["start"], -ponder.META_RATE, rtol=1e-3)
    np.testing.assert_allclose(updates["log_step"]["w"], -ponder.STEP_RATE, rtol=1e-3)
    updates, state = optimizer.update(jax.tree.map(lambda x: x * np.nan, slow), state, slow)
    assert int(state[0][0].total_notfinite) == 1 and not any(np.any(x) for x in jax.tree.leaves(updates))


def test_training_reads_each_document_before_any_again_and_drops_those_that_ran_away(monkeypatch):
    cfg = ponder.fill_in(ponder.Config(batch=2, chunks=8), 1)
    texts = [data.Excerpt(f"{i}", np.int32([i]), text_TU=np.float32([i])) for i in range(5)]
    spec = lm.Spec(None, None, 8, lm.make_mesh())
    run = ponder.Run(cfg, Path(), spec, None, None, None, None, (), {"train": texts}, None)
    seen = []

    def rollout(spec, weights, env, documents, policy, key, credit):
        seen.extend(np.asarray(documents[0]).ravel().tolist())
        rewards = jnp.where(documents[1] == 3, jnp.nan, 0.0) * jnp.ones((1, 8))
        return rl.Step(jnp.zeros((2, 8, 3)), *[jnp.zeros((2, 8))] * 9), rewards

    monkeypatch.setattr(rl, "rollout", rollout)
    sizes = [len(ponder.read_batch(run, rl.Ppo(), place, None, place)[1]) for place in range(0, 10, 2)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4] and sum(sizes) == 8
    with pytest.raises(data.UserError, match="no loss of a batch was finite"):
        ponder.read_batch(run._replace(texts={"train": texts[3:4]}), rl.Ppo(), 0, None)


def test_ones_own_repository_is_evaluated(finished, arguments, code, tmp_path, monkeypatch, call):
    own = tmp_path / "mine"
    write(own, {"pyproject.toml": ""})
    for path in sorted(code.glob("*/*.py"))[:24]:
        (own / f"{path.parent.name}_{path.name}").write_text(path.read_text())
    monkeypatch.setattr(data, "long_lines", lambda files: set())  # nothing is a near-copy
    monkeypatch.setattr(data, "STAND_IN", data.Source(str(code)))
    more = ["--data", own, "--stage", "eval", "--weights", finished, "--out", tmp_path / "run"]
    status, said = call(*arguments, *more)
    assert status == 0 and "documents of one repository" in said, said
