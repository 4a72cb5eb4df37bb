"""The command line: the whole job on a tiny model, its files, resuming, and bad input."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import eval as evaluation
import model as lm
import ponder
import rl


def call(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """ponder.py's exit code and standard error."""
    monkeypatch.setattr(sys, "argv", ["ponder.py", *map(str, arguments)])
    try:
        ponder.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def test_run_leaves_its_files(finished):
    states = [f"{name}.safetensors" for name in ("ttt", "policy", "policy_1")]
    for name in ("config.json", "metrics.jsonl", "results.json", "report.md", *states):
        assert (finished / name).stat().st_size > 0, name
    for name in ("pareto.png", "position.png", "timeline.png", "training.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG"), name
    report = (finished / "report.md").read_text()
    assert report.splitlines()[2].startswith("On 5 repositories that no stage here saw")
    assert not list(finished.glob(".*")), "a temporary file was left"


GATES = evaluation.GATES.keys() - {"ahead_threshold"}  # beside a policy that does not look ahead


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def losses_of(folder: Path) -> dict[str, float]:
    return {name: method["loss"] for name, method in results_of(folder)["methods"].items()}


def test_results_have_the_agreed_fields_and_keep_the_budget(finished):
    results = results_of(finished)
    fields = {"scale", "data", "files", "chunks_per_document", "documents", "repositories", "budget", "budget_per_chunk", "cost_model"}
    fields |= {"seeds", "methods", "comparisons", "frontier", "savings", "pareto_area", "policy_gain_by_seed", "per_repository"}
    assert fields <= results.keys()
    fixed, others = {"update_1", "update_2", "update_4"}, {"every_n", "front_loaded", "random", *GATES}
    assert results["methods"].keys() == {"base", "skip", "policy", "oracle"} | fixed | others
    assert results["comparisons"].keys() == others and results["savings"].keys() == fixed
    inner = {"loss", "loss_ci", "gain", "gain_ci", "cost_nominal", "cost_flops", "seconds", "update_rate", "oracle_recovery"}
    assert all(inner <= m.keys() for m in results["methods"].values())
    assert results["budget"] == 12.0 and results["budget_per_chunk"] == 2.0
    loss = results["per_repository"]["loss"]
    assert (np.asarray(loss["oracle"]) <= np.min([loss[n] for n in ("every_n", "front_loaded", "random")], 0) + 1e-6).all()
    for name in results["methods"].keys() - fixed:
        assert results["methods"][name]["cost_nominal"] <= 2.0 + 1e-6, name
    assert [results["methods"][n]["cost_nominal"] for n in ("skip", "update_1", "update_2", "update_4")] == [1.0, 3.0, 6.0, 12.0]
    budgets = [point["budget"] for point in results["frontier"]]
    np.testing.assert_allclose(budgets, [1 + 2 * share for share in (0.25, 0.5, 0.75, 1.0, 1.5)])
    assert all(point["cost_nominal"] <= point["budget"] + 1e-6 for point in results["frontier"])
    assert results["frontier"][3]["loss"] == pytest.approx(
        results["methods"]["update_1"]["loss"], abs=1e-6
    )  # its whole budget, its actions


def test_each_seed_trains_a_policy_of_its_own(finished):
    first, second = (lm.read_safetensors(finished / f"{ponder.policy_name(i)}.safetensors") for i in range(2))
    assert first.keys() == second.keys() and all(np.any(first[n] != second[n]) for n in first if "weight" in n)
    results = results_of(finished)
    assert results["seeds"] == 2 and len(results["policy_gain_by_seed"]) == 2
    assert np.mean(results["policy_gain_by_seed"]) == pytest.approx(results["methods"]["policy"]["gain"], abs=1e-6)


def test_metrics_are_one_line_for_each_step(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for stage in ("policy", "policy_1"):
        assert [r["step"] for r in rows if r["stage"] == stage] == [1, 2, 3]
    assert all(np.isfinite(list(r.values())[2:]).all() for r in rows)


@pytest.mark.parametrize("stops", [[("ttt", 1), ("policy_warm_start", 0)], [("policy_1", 2)]])
def test_interrupted_run_resumes_to_the_same_result(finished, arguments, tmp_path, monkeypatch, capsys, stops):
    add, left = ponder.Log.add, list(stops)

    def interrupted(self, step, figures):
        add(self, step, figures)
        if (self.stage, step) in left:
            left.remove((self.stage, step))
            raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(ponder.Log, "add", interrupted)
    for resume in ([], *[["--resume"]] * (len(stops) - 1)):
        code, err = call(monkeypatch, capsys, *arguments, "--out", out, *resume)
        assert code == 130 and "--resume" in err
    assert call(monkeypatch, capsys, *arguments, "--out", out, "--resume")[0] == 0 and not left
    for name in ("ttt.safetensors", "policy.safetensors", "policy_1.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    assert losses_of(out) == losses_of(finished)
    assert results_of(out)["facts"][:2] == results_of(finished)["facts"][:2]  # where weights and policy are from


def test_evaluation_alone_repeats_the_result(finished, arguments, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "results.json").unlink()
    assert call(monkeypatch, capsys, *arguments, "--out", out, "--resume", "--stage", "eval")[0] == 0
    assert losses_of(out) == losses_of(finished)


def test_an_evaluation_goes_on_in_the_folder_of_a_training(tmp_path):
    """Whatever the sizes of an evaluation alone, and with options that only a training takes, as they were."""
    trained = ponder.resolve(ponder.Config(stage="policy", look_ahead=True))
    (tmp_path / "config.json").write_text(json.dumps(ponder.settings(trained)))
    goes_on = ponder.Config(stage="eval", look_ahead=True, out=tmp_path, resume=True)
    assert ponder.choose_folder(ponder.resolve(goes_on)) == tmp_path
    with pytest.raises(ponder.UserError, match=r"other settings \(look_ahead: True\)"):
        ponder.choose_folder(ponder.resolve(dataclasses.replace(goes_on, look_ahead=False)))
    with pytest.raises(ponder.UserError, match="of a policy's training"):
        ponder.resolve(dataclasses.replace(goes_on, resume=False))


@pytest.mark.parametrize(
    "change", [{"valid_documents": 7}, {"cost": "flops"}, {"chunks": 12}, {"chunk": 128}, {"data": "pypi", "files": "all"}]
)
def test_a_calibration_is_for_its_documents_and_budget(change):
    terms = lambda cfg: ponder.terms(SimpleNamespace(cfg=ponder.resolve(cfg), budget=48.0))
    assert terms(ponder.Config(**change)) != terms(ponder.Config()) == terms(ponder.Config(seed=3, test_documents=5))


def test_weights_of_another_run_are_evaluated_and_calibrated_for_another_budget(finished, arguments, tmp_path, monkeypatch, capsys):
    extra = ["--weights", finished, "--stage", "eval", "--frontier", 0.5]
    assert call(monkeypatch, capsys, *arguments, *extra, "--out", tmp_path / "same")[0] == 0
    assert losses_of(tmp_path / "same") == losses_of(finished)
    assert call(monkeypatch, capsys, *arguments, *extra, "--budget", 9, "--out", tmp_path / "less")[0] == 0
    results = results_of(tmp_path / "less")
    assert results["budget_per_chunk"] == 1.5 and results["seeds"] == 2
    assert all(results["methods"][n]["cost_nominal"] <= 1.5 + 1e-6 for n in ("policy", "oracle", *evaluation.BLIND, *GATES))


def test_weights_without_a_policy_are_refused_by_the_evaluation(finished, arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "ttt.safetensors").write_bytes((finished / "ttt.safetensors").read_bytes())
    extra = ["--weights", tmp_path / "half", "--stage", "eval", "--out", tmp_path / "run"]
    refused(call(monkeypatch, capsys, *arguments, *extra), "--stage eval", "no trained weights")
    refused(
        call(monkeypatch, capsys, *arguments, "--weights", finished, "--fast", "linear", "--out", tmp_path / "run"), "another configuration"
    )


@pytest.mark.slow
def test_other_learners_rewards_and_budgets_are_accepted(arguments, tmp_path, monkeypatch, capsys):
    learner = ["--fast", "linear", "--fast-blocks", 1, 3, "--objective", "reconstruction", "--inner-optimizer", "sgd", "--momentum", 0.5]
    extra = ["--meta-action", "UPDATE_1", "--cost", "flops", "--reward", "next_chunk", "--drop-features", "code", "history", "--seeds", 1]
    extra += ["--look-ahead"]
    assert call(monkeypatch, capsys, *arguments, *learner, *extra, "--out", tmp_path / "run")[0] == 0
    results = results_of(tmp_path / "run")
    assert results["cost_model"] == "flops" and results["methods"]["policy"]["cost_flops"] <= results["budget_per_chunk"] + 1e-6
    assert unseen(tmp_path / "run") == {*rl.CODE, *rl.HISTORY}
    assert results["looks_ahead"] and "ahead_threshold" in results["methods"].keys() & results["comparisons"].keys()


def unseen(run: Path) -> set[str]:
    """The features that the run's policy does not see."""
    (keep,) = (value for name, value in lm.read_safetensors(run / "policy.safetensors").items() if "keep" in name)
    return {name for name, kept in zip(rl.FEATURES, keep, strict=True) if not kept}


def test_a_policy_does_not_look_ahead_unless_told_to(finished):
    assert unseen(finished) == {*rl.AHEAD} and not results_of(finished)["looks_ahead"]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, lm.Fast((6, 7), 256, momentum=0.3)),
        ({"fast": "lora", "momentum": 0.5}, lm.Fast((6, 7), 16, "lora", momentum=0.5)),
        ({"fast": "lora", "hidden": 3, "scale": "350m"}, lm.Fast((6, 7), 3, "lora", momentum=0.3)),
        ({"fast_blocks": (-1, 3)}, lm.Fast((3, 7), 256, momentum=0.3)),
        ({"fast_blocks": (5, 1, 5), "inner_optimizer": "sgd", "momentum": 0.0}, lm.Fast((1, 5), 256, optimizer="sgd")),
        ({"hidden": 9, "objective": "reconstruction"}, lm.Fast((6, 7), 9, objective="reconstruction", momentum=0.3)),
    ],
)
def test_options_choose_the_fast_weights(change, expected):
    assert ponder.fast_weights(ponder.Config(**change), lm.Model(**ponder.TINY)) == expected


def test_random_actions_mix_actions_differently_in_each_document():
    actions = ponder.random_actions(np.random.default_rng(0), 2000, 24)
    assert actions.shape == (2000, 24)
    share = (actions[..., None] == np.arange(4)).mean(1)
    np.testing.assert_allclose(share.mean(0), 1 / 4, atol=0.03)
    assert (share.max(1) > 0.9).mean() > 0.05 and (share.max(1) < 0.5).mean() > 0.05  # one action nearly everywhere, and many
    np.testing.assert_array_equal(actions, ponder.random_actions(np.random.default_rng(0), 2000, 24))


OTHERS = ({"fresh": True}, {"chunk": 128}, {"base": "x"}, {"fast": "lora"}, {"momentum": 0.0}, {"fast_blocks": (7,)})


@pytest.mark.parametrize(("change", "ships"), [({}, True), *((change, False) for change in OTHERS)])
def test_shipped_weights_serve_the_default_settings_alone(change, ships, tmp_path):
    cfg = ponder.resolve(ponder.Config(**change))
    assert ponder.ships(cfg) == ships
    assert ponder.weights_folder(cfg, tmp_path) == (ponder.ASSETS / "tiny" if ships else None)
    given = dataclasses.replace(cfg, weights=tmp_path / "other", resume=True)
    assert ponder.weights_folder(given, tmp_path) == tmp_path / "other"
    (tmp_path / "ttt_state.safetensors").write_bytes(b"")
    assert ponder.weights_folder(given, tmp_path) is None  # a run that is resumed goes on with what it began
    (tmp_path / "ttt.safetensors").write_bytes(b"")
    assert ponder.weights_folder(given, tmp_path) == tmp_path  # or has its own


@pytest.mark.parametrize(("name", "value"), [("momentum", 0.0), ("inner_optimizer", "sgd"), ("fast_blocks", (0, 1))])
def test_weights_of_another_learner_are_refused(name, value):
    """Their shapes are the same."""
    cfg = ponder.resolve(ponder.Config(stage="eval"))
    setup, *_ = ponder.open_setup(cfg, lm.make_mesh())
    ponder.load_slow(setup, ponder.ASSETS / "tiny")
    other = setup._replace(fast=ponder.fast_weights(dataclasses.replace(cfg, **{name: value}), setup.model))
    with pytest.raises(ponder.UserError, match=f"another --{name.replace('_', '-')};"):
        ponder.load_slow(other, ponder.ASSETS / "tiny")
    last = setup.upper[setup.model.names.norm]
    other = setup._replace(upper=setup.upper | {setup.model.names.norm: last | {"weight": last["weight"] + 1}})
    with pytest.raises(ponder.UserError, match="another --base;"):
        ponder.load_slow(other, ponder.ASSETS / "tiny")


def test_a_run_says_where_its_fast_weights_are_from(finished, arguments, tmp_path, monkeypatch, capsys):
    given = [*arguments, "--weights", finished, "--meta-steps", 1, "--out", tmp_path / "run", "--seeds", 1, "--frontier"]
    assert call(monkeypatch, capsys, *given, "--stage", "ttt")[0] == 0
    assert call(monkeypatch, capsys, *given, "--resume")[0] == 0
    assert results_of(tmp_path / "run")["facts"][0].endswith("meta-learned in this run, 1 steps")


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
    refused(call(monkeypatch, capsys, *arguments, "--out", finished, "--resume", "--seed", 7), "other settings", "seed: ")
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
    ponder.open_workspace(cfg, tmp_path, lm.make_mesh())
    assert "can't bind" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["seed", "seeds", "chunk", "iterations", "batch", "meta-steps", "hidden", "momentum"])
def test_negative_numbers(arguments, tmp_path, monkeypatch, capsys, option):
    refused(call(monkeypatch, capsys, *arguments, f"--{option}", -1, "--out", tmp_path / "run"), f"--{option} -1", "at least")


@pytest.mark.parametrize("share", [-0.1, 1e39, float("inf"), float("nan")])
def test_shares_that_can_not_be(share):
    for name in ("frontier", "compare"):
        with pytest.raises(ponder.UserError, match=f"--{name} .*shares must be"):
            ponder.resolve(ponder.Config(**{name: (0.5, share)}))


def test_fast_weights_that_can_not_be(arguments, tmp_path, monkeypatch, capsys):
    run = lambda *extra: call(monkeypatch, capsys, *arguments, *extra, "--out", tmp_path / "run")
    refused(run("--momentum", 1), "--momentum 1", "below 1")
    refused(run("--fast-blocks", 2, 4), "--fast-blocks 2 4", "0 to 3")
    refused(run("--fast", "lora", "--objective", "reconstruction"), "lora can't learn by reconstruction")
    refused(run("--files", "all"), "--files all")
    assert not (tmp_path / "run").exists()


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
