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

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, SECRETS
from hypothesis import given
from hypothesis import strategies as st

import data
import eval as evaluation
import model as lm
import ponder
import rl


def call(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """The command line in this process -> (exit code, what it said)."""
    monkeypatch.setattr(sys, "argv", ["ponder.py", *map(str, arguments)])
    monkeypatch.setattr(ponder, "keep_memory", lambda: None)
    code = 0
    try:
        ponder.main()
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out + said.err


def refused(result: tuple[int, str], *words: str) -> None:
    """Exit code 2 and one line that has these words."""
    code, said = result
    line = said.strip().splitlines()[-1]
    assert code == 2 and line.startswith("ponder.py: ") and "Traceback" not in said, said
    assert all(word in line for word in words), line


def losses_of(folder: Path) -> dict[str, list[float]]:
    return json.loads((folder / "results.json").read_text())["per_repository"]["loss"]


def copy_of(finished: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(finished, folder)
    for name in without:
        (folder / name).unlink()
    return folder


# --- 1. A whole run -----------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    weights = {"ttt.safetensors", "ttt_state.safetensors"}
    for i in ("policy", "policy_1"):
        weights |= {f"{i}.safetensors", f"{i}_state.safetensors"}
    plots = {"pareto.png", "position.png", "timeline.png", "training.png"}
    assert names == weights | plots | {"config.json", "metrics.jsonl", "results.json", "report.md"}
    assert all((finished / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    report = (finished / "report.md").read_text()
    assert "nan" not in report and all(f"]({name})" in report for name in plots)
    for path in finished.iterdir():
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values())


def test_results_have_the_agreed_fields_and_keep_the_budget(finished):
    results = json.loads((finished / "results.json").read_text())
    fields = {"loss", "loss_ci", "gain", "gain_ci", "gain_over_base", "cost_nominal", "cost_flops", "seconds"}
    for name, m in results["methods"].items():
        assert m.keys() == fields | {"update_rate", "oracle_recovery", "rank_correlation"}
        assert m["cost_nominal"] <= results["budget_per_chunk"] + 1e-6 or name in evaluation.FIXED
    assert [results["methods"][f"update_{k}"]["cost_nominal"] for k in (1, 2, 4)] == [3, 6, 12]
    assert results["methods"]["skip"]["gain"] == 0 and results["methods"]["skip"]["cost_flops"] == 1
    assert len(results["frontier"]) == 5 and results["seeds"] == 2 == len(results["policy_gain_by_seed"])
    assert set(results["comparisons"]) == {*evaluation.BLIND, *rl.GATES} - {"ahead_threshold"}
    splits = {data.split_of(name) for name in results["per_repository"]["names"]}
    assert splits == {"test"}


def test_metrics_are_one_line_for_each_step(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = Counter((row["stage"], row["step"]) for row in rows)
    assert {("ttt", 1), ("ttt", 2), ("policy_warm_start", 0), ("policy", 3), ("policy_1", 3)} <= steps.keys()
    assert steps["policy", 1] == 1 and all(
        np.isfinite(x) for row in rows for k, x in row.items() if k != "stage"
    )


def test_each_stage_reads_repositories_of_its_own_split(tmp_path, arguments, monkeypatch):
    seen = {}
    monkeypatch.setattr(ponder, "check_hosts", lambda *_: None)
    cfg = ponder.tyro.cli(ponder.Config, args=[*arguments, "--weights", "none"])
    run = ponder.open_run(ponder.fill_in(cfg, 1), tmp_path, lm.make_mesh(), Counter())
    for name, texts in run.texts.items():
        seen[name] = {data.split_of(text.repo) for text in texts}
        assert all(len(text.tokens) == 6 * 16 + 1 and text.text_TU.shape == (6, 16) for text in texts)
    assert seen == {
        name: {split}
        for name, split in {
            "meta": "train",
            "train": "train",
            "meta_valid": "valid",
            "valid": "valid",
            "test": "test",
        }.items()
    }


# --- 2. Stopping and going on --------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[("ttt", 1), ("policy_warm_start", 0)], [("policy_1", 2)]])
def test_an_interrupted_run_resumes_to_the_same_result(
    finished, arguments, tmp_path, monkeypatch, capsys, stops
):
    out, add = tmp_path / "run", ponder.Log.add
    for i, stop in enumerate(stops):

        def interrupted(self, step, figures, stop=stop):
            add(self, step, figures)
            if (self.stage, step) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(ponder.Log, "add", interrupted)
        code, said = call(monkeypatch, capsys, *arguments, "--out", out, *["--resume"] * (i > 0))
        assert code == 130 and "--resume continues" in said
    monkeypatch.setattr(ponder.Log, "add", add)
    assert call(monkeypatch, capsys, *arguments, "--out", out, "--resume")[0] == 0
    for name in ("ttt", "policy", "policy_1"):
        ours, theirs = (safetensors.numpy.load_file(f / f"{name}.safetensors") for f in (out, finished))
        assert ours.keys() == theirs.keys() and all(np.array_equal(x, theirs[key]) for key, x in ours.items())
    assert losses_of(out) == losses_of(finished)


DYING = """
import os, sys
sys.path.insert(0, {root!r})
import data, ponder
writes = [0]
def dying(path, content, whole=data.write_atomic):
    writes[0] += 1
    if writes[0] == {number}:
        with open(path.with_name(f".{{path.name}}.{{os.getpid()}}"), "wb") as file:
            file.write(content[: len(content) // 2])
        os._exit(9)
    whole(path, content)
data.write_atomic = dying
sys.argv = ["ponder.py", *{arguments!r}]
ponder.main()
"""


def test_a_run_killed_while_writing_resumes_to_the_same_result(
    finished, arguments, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    program = DYING.format(root=str(ROOT), number=6, arguments=[*arguments, "--out", str(out)])
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 9
    assert call(monkeypatch, capsys, *arguments, "--out", out, "--resume")[0] == 0
    assert losses_of(out) == losses_of(finished) and not list(out.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ttt", "policy", "eval"])
def test_kills_at_random_moments_of_a_stage_change_nothing(stage, finished, arguments, tmp_path):
    rng, out = np.random.default_rng(len(stage)), tmp_path / "run"
    before = {"ttt": [], "policy": ["ttt"], "eval": ["ttt", "policy"]}[stage]
    command = lambda stage: [sys.executable, ROOT / "ponder.py", *arguments, "--stage", stage, "--out", out]
    weights = ["--weights", finished]
    for _ in range(5):
        more = [*(["--resume"] if (out / "config.json").exists() else []), *(weights if before else [])]
        process = subprocess.Popen(
            [*command(stage), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(3, 25))
        process.send_signal(signal.SIGKILL)
        process.wait()
    more = [*(["--resume"] if (out / "config.json").exists() else []), *(weights if before else [])]
    assert subprocess.run([*command(stage), *more]).returncode == 0
    if stage == "eval":
        assert losses_of(out) == losses_of(finished)
        return
    ours, theirs = (safetensors.numpy.load_file(f / f"{stage}.safetensors") for f in (out, finished))
    assert all(np.array_equal(x, theirs[key]) for key, x in ours.items())


def test_evaluation_alone_repeats_the_result(finished, arguments, tmp_path, monkeypatch, capsys):
    options = [*arguments, "--stage", "eval", "--weights", finished, "--out", tmp_path / "run"]
    assert call(monkeypatch, capsys, *options)[0] == 0
    assert losses_of(tmp_path / "run") == losses_of(finished)


# --- 3. Trained weights bring their settings along -------------------------------------------------------


def open_shipped(**changes):
    cfg = ponder.fill_in(ponder.Config(stage="eval", dtype="float32", **changes), 1)
    model, params = lm.load_model(ponder.ASSETS / "tiny")
    return ponder.choose_weights(cfg, Path("none"), model, ponder.base_digest(params))


@pytest.mark.parametrize("change", [{}, {"momentum": 0.3}, {"hidden": 256, "fast": "swiglu"}])
def test_shipped_weights_serve_options_that_fit(change):
    assert open_shipped(**change) == (ponder.ASSETS / "tiny", lm.Fast((6, 7), 256, momentum=0.3))


@pytest.mark.parametrize(
    "change",
    [{"weights": "none"}, {"momentum": 0.0}, {"fast": "lora"}, {"fast_blocks": (-1,)}, {"chunk": 128}],
)
def test_shipped_weights_are_left_where_options_ask_for_others(change):
    folder, fast = open_shipped(**change)
    assert folder is None and fast.blocks == ((7,) if "fast_blocks" in change else (6, 7))


def test_weights_that_do_not_fit_are_refused(finished, arguments, tmp_path, monkeypatch, capsys):
    options = [*arguments, "--stage", "eval", "--out", tmp_path / "run", "--weights"]
    refused(call(monkeypatch, capsys, *options, finished, "--momentum", "0.5"), "momentum")
    refused(call(monkeypatch, capsys, *options, ponder.ASSETS / "tiny"), "base")
    refused(call(monkeypatch, capsys, *options, tmp_path), "no trained fast weights")
    alone = copy_of(finished, tmp_path / "alone", "policy.safetensors")
    refused(call(monkeypatch, capsys, *options, alone), "no trained policy")
    assert not (tmp_path / "run").exists()


# --- 4. What can be wrong ------------------------------------------------------------------------------


def test_data_that_can_not_be_used(base, tmp_path, monkeypatch, capsys):
    options = ["--base", base, "--chunk", "16", "--chunks", "6", "--out", tmp_path / "run", "--data"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x.py").write_bytes(b"\0\1")
    (tmp_path / "little").mkdir()
    (tmp_path / "little" / "x.py").write_text("x = 1\n")
    refused(call(monkeypatch, capsys, *options, tmp_path / "missing"), "missing", "no such folder")
    refused(call(monkeypatch, capsys, *options, tmp_path / "empty"), "no source code")
    refused(call(monkeypatch, capsys, *options, tmp_path / "binary"), "1 binary")
    refused(call(monkeypatch, capsys, *options, tmp_path / "little"), "tokens of a document")
    assert not (tmp_path / "run").exists()


def test_folders_that_can_not_be_used(finished, arguments, tmp_path, monkeypatch, capsys):
    again = [*arguments, "--out"]
    refused(call(monkeypatch, capsys, *again, finished), "already holds a run")
    refused(call(monkeypatch, capsys, *again, tmp_path / "x", "--resume"), "no run in")
    refused(
        call(monkeypatch, capsys, *again, finished, "--resume", "--seed", "7"), "other settings", "seed: 0"
    )
    refused(call(monkeypatch, capsys, *again, "/proc/run"), "can't write there")
    damaged = copy_of(finished, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    refused(call(monkeypatch, capsys, *again, damaged, "--resume"), "config.json is damaged")


@pytest.mark.parametrize("damage", ["flipped", "cut", "other"])
def test_a_damaged_checkpoint_is_refused(finished, arguments, tmp_path, monkeypatch, capsys, damage):
    out = copy_of(finished, tmp_path / "run")
    path = out / "ttt.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    other = (finished / "policy.safetensors").read_bytes()
    path.write_bytes({"flipped": content, "cut": content[: len(content) // 2], "other": other}[damage])
    refused(call(monkeypatch, capsys, *arguments, "--out", out, "--resume"), "ttt.safetensors")


@pytest.mark.parametrize(
    "content", [b"{}\n", b'{"stage": "ttt"}\n', b"{x}\n", b'{"stage": "\xff", "step": 1}\n']
)
def test_damaged_figures_are_one_clear_line(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(data.UserError, match="damaged"):
        ponder.read_metrics(tmp_path / "metrics.jsonl")


def test_half_a_line_of_figures_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ttt", "step": 1}\n{"stage": "tt')
    assert ponder.read_metrics(tmp_path / "metrics.jsonl") == [{"stage": "ttt", "step": 1}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--budget 3", "reading a document costs 6"),
        ("--chunk 17", "two chunks must fit"),
        ("--fast-blocks 9", "blocks are 0 to 3"),
        ("--weights none --fast lora --objective reconstruction", "lora can't learn by reconstruction"),
        ("--base no/such/model", "no such folder"),
        ("--mesh-shape 3,3", "3 x 3 devices"),
        ("--mesh-shape 4", "give two numbers"),
        ("--hosts somewhere", "--hosts somewhere"),
        ("--stage compare", "--runs"),
        ("--generate", "--prompt"),
        ("--benchmark humaneval --solutions reference", "--allow-code-execution"),
        ("--generate --prompt x --samples 2 --temperature 0", "--samples"),
    ],
)  # fmt: skip
def test_options_that_can_not_be(arguments, tmp_path, monkeypatch, capsys, options, words):
    refused(call(monkeypatch, capsys, *arguments, "--out", tmp_path / "run", *options.split()), words)
    assert not (tmp_path / "run").exists()


def test_a_hub_model_without_network(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(
        call(monkeypatch, capsys, "--base", "no-such-model-here", "--out", tmp_path / "run"),
        "the hub did not",
    )


NUMBERS = ["chunks", "chunk", "batch", "train_documents", "valid_documents", "test_documents", "meta_steps"]
NUMBERS += ["iterations", "seed", "seeds", "hidden", "momentum", "temperature", "samples", "max_new_tokens"]


@given(st.dictionaries(st.sampled_from(NUMBERS), st.integers(-3, 5) | st.just(2**31)))
def test_settings_are_refused_in_one_line_or_valid(values):
    try:
        cfg = ponder.fill_in(ponder.Config(**values), 1)
    except data.UserError as error:
        assert "\n" not in str(error) and str(error).startswith("--")
    else:
        assert cfg.chunks >= 2 and cfg.seeds >= 1 and cfg.batch >= 1 and cfg.seed >= 0


def test_help_has_a_line_for_each_option_and_wrong_ones_are_named(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    code, said = call(monkeypatch, capsys, "--help")
    options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ponder.Config)]
    assert code == 0 and len(said.splitlines()) < 90 and all(f"{name} " in said for name in options)
    text = " ".join(said.replace("│", " ").split())
    assert not any(f"{name} (default" in text for name in options)  # each has its help
    code, said = call(monkeypatch, capsys, "--no-such-option")
    assert code == 2 and "--no-such-option" in said and "Traceback" not in said


def test_eval_is_the_same_door(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    command = [sys.executable, ROOT / "eval.py", "--stage", "compare", "--runs", finished, other]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("+0.0000 [0.0000, 0.0000]") >= 3, done.stderr


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    path, state = tmp_path / "x.safetensors", {"a": np.arange(3.0)}
    ponder.save_state(path, state, step=1)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        ponder.launch(lambda: ponder.save_state(path, {"a": np.zeros(3)}, step=2))
    assert stop.value.code == 2 and "free some space" in capsys.readouterr().err
    found, meta = ponder.load_state(path, state)
    assert meta["step"] == 1 and list(found["a"]) == [0, 1, 2] and list(tmp_path.iterdir()) == [path]


def test_too_little_memory_is_one_line_and_a_fault_of_the_program_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stop:
        ponder.launch(lambda: np.ones(1 << 58))
    assert stop.value.code == 2 and "out of memory" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        ponder.launch(lambda: 1 / 0)


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
    assert int(state.total_notfinite) == 1 and not any(np.any(x) for x in jax.tree.leaves(updates))


def test_training_reads_each_document_before_any_again_and_drops_those_that_ran_away(monkeypatch):
    cfg = ponder.fill_in(ponder.Config(batch=2, chunks=8), 1)
    texts = [data.Excerpt(f"{i}", np.int32([i]), text_TU=np.float32([i])) for i in range(5)]
    spec = lm.Spec(None, None, 8, lm.make_mesh())
    run = ponder.Run(cfg, Path(), spec, None, None, None, None, (), {"train": texts}, None)
    seen = []

    def rollout(spec, weights, env, documents, policy, key, credit):
        seen.extend(np.asarray(documents[0]).ravel().tolist())
        rewards = jnp.where(documents[1] == 3, jnp.nan, 0.0) * jnp.ones((1, 8))
        empty = [jnp.zeros((2, 8))] * 9
        return rl.Step(jnp.zeros((2, 8, 3)), *empty), rewards

    monkeypatch.setattr(rl, "rollout", rollout)
    sizes = [len(ponder.read_batch(run, place, None, (0, place))[1]) for place in range(0, 10, 2)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4] and sum(sizes) == 8


def test_a_run_says_what_a_repository_of_ones_own_gains(
    finished, arguments, base, tmp_path, monkeypatch, capsys
):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "pyproject.toml").write_text("")
    for path in sorted(Path(arguments[arguments.index("--data") + 1]).glob("*/*.py"))[:24]:
        (own / f"{path.parent.name}_{path.name}").write_text(path.read_text().replace("    ", "        "))
    monkeypatch.setattr(data, "drop_copies", lambda files, others, skipped: list(files))
    options = [x for x in arguments if x not in ("--data",)]
    options[options.index(arguments[arguments.index("--data") + 1])] = "--data"
    options.insert(options.index("--data") + 1, str(own))
    monkeypatch.setattr(ponder, "training_data", lambda cfg: arguments[arguments.index("--data") + 1])
    more = ["--stage", "eval", "--weights", finished, "--out", tmp_path / "run"]
    code, said = call(monkeypatch, capsys, *options, *more)
    assert code == 0 and "documents of mine" in said, said
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Where learning helped most" in report and "_module_0.py`" in report
