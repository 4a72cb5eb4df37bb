"""What the parts hand on to each other: which documents, rules, budgets and draws. What would compile is replaced."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHUNKS, PATHS
from test_benchmarks import INSIDE, SUCCESSOR
from test_eval import COSTS
from test_generate import CODE
from test_model import SGD, assert_close, naive_steps, normal
from test_rl import PPO, env, fresh, make_batch, random_steps, read

import data
import eval as evaluation
import model as lm
import ponder
import rl

# --- ponder.py ---


def test_each_stage_reads_the_split_that_is_its_own(tmp_path, monkeypatch):
    cuts = ponder.document_cuts(ponder.resolve(ponder.Config(fresh=True)), tmp_path)
    assert {n: c.split for n, c in cuts.items()} == {
        "meta": "train",
        "meta_valid": "valid",
        "train": "train",
        "valid": "valid",
        "test": "test",
    }
    monkeypatch.setattr(evaluation, "calibrate", lambda _, texts, policies, progress: [(texts, p) for p in policies])
    work = SimpleNamespace(setup=None, texts={name: name for name in cuts})
    assert [j.calibration for j in ponder.calibrated(work, [0, 1])] == [("valid", 0), ("valid", 1)]


def test_policy_training_reads_all_documents_in_turn_with_draws_of_their_own(tmp_path, monkeypatch):
    cfg = ponder.resolve(ponder.Config(batch=2, iterations=6, teacher_documents=2, chunks=24, reward="next_chunk"))
    texts = [SimpleNamespace(tokens=np.full(3, i), text_TU=np.zeros((2, 16))) for i in range(4)]
    env = rl.Env(jnp.float32(rl.NOMINAL), jnp.float32(48))
    setup = evaluation.Setup(*[None] * 6, env, None, lm.make_mesh())
    work = SimpleNamespace(cfg=cfg, out=tmp_path, setup=setup, texts={"train": texts})
    read = []

    def rollout(mesh, model, fast, credit, chunk, lower, upper, slow, env, tokens, text, policy, key):
        read.append((*np.asarray(tokens)[:, 0].tolist(), str(jax.random.key_data(key)), credit, policy))
        return SimpleNamespace(features_U=np.zeros((2, 2, 3)), cost=np.ones(2)), np.zeros((2, 2))

    def iterate(ppo, env, steps, rewards, trainer, key):
        keys.add(str(jax.random.key_data(key)))
        return trainer._replace(iteration=trainer.iteration + 1), {"loss": 0, "gain": 0, "cost": 0, "lambda": 0}

    keys = set()
    monkeypatch.setattr(rl, "rollout", rollout)
    monkeypatch.setattr(rl, "teach", lambda ppo, steps, rewards, trainer, key: (trainer._replace(policy="taught"), 0.0))
    monkeypatch.setattr(rl, "train_iteration", iterate)
    monkeypatch.setattr(ponder, "save_state", lambda *_, **__: None)
    lessons = ponder.read_batch(work, 0, "blind", (0, 4, 0))
    assert ponder.train_policy(work, 0, lessons)[0] == "taught"
    documents = [set(r[:2]) for r in read]
    assert all(a | b == {0, 1, 2, 3} for a, b in zip(documents[::2], documents[1::2]))  # each before any again
    assert len({r[2] for r in read}) == 7 and len(keys) == 6  # draws of their own
    odd = dataclasses.replace(cfg, batch=2, teacher_documents=3, iterations=0)  # two batches, so that PPO starts after four documents
    assert list(ponder.teacher_places(odd)) == [0, 2]
    assert {r[3] for r in read} == {0} and [r[4] for r in read] == ["blind"] + ["taught"] * 6
    assert [ponder.ppo_of(dataclasses.replace(cfg, reward="credit", chunks=n)).credit for n in (7, 24)] == [1, 3]


def test_warm_starts_learn_from_one_reading_that_spends_the_budget_blindly(tmp_path, monkeypatch):
    cfg = ponder.resolve(ponder.Config(batch=2, teacher_documents=6, chunks=24, seeds=2))
    work = SimpleNamespace(cfg=cfg, out=tmp_path, setup=SimpleNamespace(env=env(1.25 * 24), mesh=lm.make_mesh()))
    read, taught = [], []
    monkeypatch.setattr(ponder, "read_batch", lambda work, place, policy, seed: read.append((place, policy)) or (np.full(1, place), None))
    monkeypatch.setattr(ponder, "train_policy", lambda work, i, lessons: taught.append(lessons[0].tolist()) or (None, None))
    monkeypatch.setattr(ponder, "calibrated", lambda *_: [])
    ponder.stage_policy(work)
    assert [place for place, _ in read] == [0, 2, 4] and taught == [[0, 2, 4]] * 2
    for _, policy in read:
        logits = rl.apply_policy(policy, normal(100, len(rl.FEATURES))).logits_A
        assert np.mean(jax.nn.softmax(logits) @ np.float32(rl.NOMINAL)) == pytest.approx(1.25, rel=0.05)


def test_meta_learning_goes_on_from_given_weights_with_batches_of_their_own(tmp_path, monkeypatch):
    slow = {"log_step": jnp.arange(3.0), "start": jnp.ones(2)}
    (tmp_path / "given").mkdir()
    ponder.write_state(tmp_path / "given" / "ttt.safetensors", slow)
    setup = evaluation.Setup(*[None] * 5, jax.tree.map(jnp.zeros_like, slow), None, None, lm.make_mesh())
    batches = []

    def step(mesh, model, fast, chunk, steps, lower, upper, slow, state, tokens, actions):
        batches.append((np.asarray(tokens).tolist(), np.asarray(actions).tolist()))
        return slow, state, 0.0, 0.0

    monkeypatch.setattr(ponder, "meta_step", step)
    monkeypatch.setattr(ponder, "learner", lambda setup: {})
    monkeypatch.setattr(ponder, "valid_loss", lambda *_: 0.0)
    texts = {"meta": [SimpleNamespace(tokens=np.full(4, i)) for i in range(50)], "meta_valid": []}
    for action in ("random", "UPDATE_2"):
        cfg = ponder.resolve(
            ponder.Config(stage="ttt", fresh=True, batch=4, meta_chunks=6, meta_steps=3, meta_action=action, weights=tmp_path / "given")
        )
        found = ponder.stage_ttt(SimpleNamespace(cfg=cfg, setup=setup, out=tmp_path, texts=texts))
        jax.tree.map(np.testing.assert_array_equal, found, slow)
    tokens, actions = zip(*batches)
    assert len({str(t) for t in tokens[:3]}) == 3 and len({str(a) for a in actions[:3]}) == 3
    assert (np.asarray(actions[3:]) == 2).all()


def test_the_newest_run_is_resumed_and_one_that_came_first_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = ponder.resolve(ponder.Config())
    for i, age in (("001", 30), ("002", 10), ("003", 20)):
        (tmp_path / "runs" / i).mkdir(parents=True)
        config = tmp_path / "runs" / i / "config.json"
        config.write_text(json.dumps(ponder.settings(cfg)))
        os.utime(config, (10**9 - age,) * 2)
    assert ponder.choose_folder(dataclasses.replace(cfg, resume=True)) == Path("runs/002")
    out = dataclasses.replace(cfg, out=tmp_path / "runs" / "001")  # begun, and ended, since its folder was chosen
    with pytest.raises(ponder.UserError, match="already holds a run"), ponder.claimed(out, out.out):
        pass


def test_the_budgets_currency_is_that_asked_for(base):
    for cost in ("nominal", "flops"):
        cfg = ponder.resolve(ponder.Config(base=str(base), chunk=16, chunks=6, cost=cost, dtype="float32"))
        setup, budget, *_ = ponder.open_setup(cfg, lm.make_mesh())
        wanted = rl.NOMINAL if cost == "nominal" else setup.flops_A
        np.testing.assert_allclose(setup.env.costs_A, wanted, rtol=1e-6)
        assert budget == pytest.approx(6 * (1 + wanted[1]) / 2)


def test_paths_in_a_runs_settings_are_of_its_checkout():
    paths = (ponder.ASSETS / "tiny", Path("runs/pypi"), Path("/else/where"))
    assert [ponder.settings(ponder.Config(weights=path))["weights"] for path in paths] == ["assets/tiny", "runs/pypi", "/else/where"]


def test_w0_and_step_sizes_have_rates_of_their_own():
    slow = {"start": jnp.zeros(2), "log_step": jnp.zeros(2)}
    optimizer = ponder.meta_optimizer(100)
    updates, _ = optimizer.update(jax.tree.map(lambda x: x + 0.1, slow), optimizer.init(slow), slow)
    np.testing.assert_allclose(updates["start"], -ponder.META_RATE, rtol=1e-3)
    np.testing.assert_allclose(updates["log_step"], -ponder.STEP_RATE, rtol=1e-3)


def test_half_a_line_of_figures_is_left_out(tmp_path):
    (tmp_path / "m").write_text('{"stage": "ttt", "step": 1}\n{"stage": "ttt", "step": 2}\n{"st')
    assert [r["step"] for r in ponder.read_metrics(tmp_path / "m")] == [1, 2]


@pytest.mark.parametrize("content", [b"{}\n", b'{"stage": "ttt"}\n', b"{x}\n", b'{"stage": "\xff", "step": 1}\n'])
def test_damaged_figures_are_one_clear_line(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ponder.UserError, match="damaged"):
        ponder.read_metrics(tmp_path / "m")


@pytest.mark.parametrize("content", ["null", "5", "[1]", "{"])
def test_damaged_settings_are_one_clear_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ponder.UserError, match="damaged"):
        ponder.choose_folder(ponder.resolve(ponder.Config(out=tmp_path, resume=True)))


# --- rl.py ---


def test_the_next_chunks_gain_is_what_learning_took_off_skips_loss(monkeypatch):
    """Without credits SKIP is read too, and the reward is what learning took off it."""

    def episode(model, fast, upper, slow, env, document, rule, key, credit=0, probe=False):
        loss = document + jnp.where(rule.kind == 0, 9.0, 7.0) * jnp.arange(3)
        return rl.Step(*[loss] * 10)

    monkeypatch.setattr(rl, "episode", episode)
    monkeypatch.setattr(rl, "prepare", lambda model, fast, chunk, lower, upper, tokens, text: tokens.sum() * 1.0)
    tokens, text = np.arange(8, dtype=np.int32).reshape(2, 4), np.zeros((2, 3, 16), np.float32)
    net = rl.init_policy(jax.random.key(0))
    _, reward = rl.rollout.__wrapped__(lm.make_mesh(), None, None, 0, 1, {}, {}, {}, env(9), tokens, text, net, jax.random.key(0))
    np.testing.assert_allclose(reward, [[2, 4, 0]] * 2)


def test_an_iteration_prices_with_the_new_multiplier_and_learns_features_last(monkeypatch):
    steps, reward = random_steps()
    trainer, seen = fresh(2.0), []
    assert trainer.pid.cost == 2.0  # in units of SKIP's per chunk
    monkeypatch.setattr(rl, "improve", lambda ppo, trainer, batch, key: seen.append((trainer, batch)) or (trainer, 0.0))
    after, figures = rl.train_iteration.__wrapped__(PPO, env(4.0), steps, reward, trainer, jax.random.key(0))
    ((before, batch),) = seen
    assert figures["lambda"] > 0
    np.testing.assert_allclose(batch.advantage, make_batch(PPO, steps, reward, 1.0, figures["lambda"]).advantage, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before.policy.norm, trainer.policy.norm)
    assert after.policy.norm.count > 11


def test_a_plan_serves_documents_of_another_length():
    rule = rl.make_rule(3, rl.init_policy(jax.random.key(0)), plan=[1, 0, 2])
    heads, memory = rl.Heads(jnp.zeros(4), 0.0, 0.0), rl.Memory(None, jnp.zeros(4), 0.0, 0.0)
    one = jax.jit(lambda t: rl.choose(rule, jnp.zeros(36), heads, jnp.ones(4, bool), env(99), memory, t, 6, jax.random.key(0))[0])
    assert [int(one(t)) for t in range(6)] == [1, 1, 0, 0, 2, 2]


def test_each_chunk_has_a_draw_of_its_own(tiny):
    rule = rl.make_rule(CHUNKS, rl.init_policy(jax.random.key(0)), hard=False)  # nearly uniform
    assert any(len(set(read(tiny, tiny.tokens, rule, seed=seed).action.tolist())) > 1 for seed in range(3))


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_that_are_computed_again_are_the_same(steps):
    fast = SGD._replace(remat=True)
    weights = {"a": normal(2, 3, 4)}
    slow = {"log_step": {"a": normal(7, seed=2) - 2}, "log_anneal": np.float32(-0.7)}
    state = lm.State(weights, (), np.float32(3))
    gradient_of = lambda w: {"a": 1.5 * w["a"] + normal(2, 3, 4, seed=5)}
    ours = lm.ttt_update(fast, slow, state, gradient_of, lambda: gradient_of(weights), steps, "float32")
    assert_close(ours, naive_steps(fast, slow, state, gradient_of, steps), rtol=1e-3, atol=1e-4)


# --- data.py ---


def test_repositories_stay_in_their_splits():
    found = "".join(data.split_of(f"repository-{i}")[1] for i in range(2000))
    assert hashlib.sha256(found.encode()).hexdigest()[:16] == "96de2589a411a430"


def test_validation_files_do_not_come_back_in_the_test(copies):
    repos = copies(test={"copy.py": {"beta": 20}, "own.py": {"gamma": 20}}, valid={"b.py": {"beta": 20}}, train={"a.py": {"alpha": 20}})
    assert PATHS(data.drop_leaks(repos, Counter())) == {"test": ["own.py"], "valid": ["b.py"], "train": ["a.py"]}


def test_completion_is_of_test_repositories(monkeypatch):
    files = lambda name: [data.SourceFile(name, f"{i}.py", CODE.replace("two", f"two{i}")) for i in range(10)]
    repos = {name: files(name) for name in (f"repo{i}" for i in range(30))}
    monkeypatch.setattr(data, "load_repos", lambda *_: repos)
    monkeypatch.setattr(evaluation, "first_chunks", lambda g, files, chunks: [0] * 99)
    g = SimpleNamespace(setup=SimpleNamespace(chunk=8), tokenizer=None)
    found = evaluation.completion_tasks(g, ponder.resolve(ponder.Config(test_documents=99)))
    assert set(found) == {name for name in repos if data.split_of(name) == "test"}


def test_completion_takes_a_folder_of_loose_files_for_one_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "first_chunks", lambda g, files, chunks: [0] * 99)
    g = SimpleNamespace(setup=SimpleNamespace(chunk=8), tokenizer=None)
    cfg = ponder.resolve(ponder.Config(data=str(tmp_path)))
    for i in range(5):
        if i == 4:
            with pytest.raises(data.DataError, match="one needs five files"):
                evaluation.completion_tasks(g, cfg)
        (tmp_path / f"{i}.py").write_text(CODE.replace("two", f"two{i}"))
    assert set(evaluation.completion_tasks(g, cfg)) == {tmp_path.name}


# --- eval.py ---


def test_every_method_is_read_at_its_budget(monkeypatch):
    """Which rule each method reads with, at which budget, and what it sees."""
    T, seen = 6, []
    setup = evaluation.Setup(
        None, None, 4, None, None, None, rl.Env(np.float32(rl.NOMINAL), np.float32(12)), np.float32(rl.NOMINAL), lm.make_mesh()
    )
    texts = [evaluation.Tokens(f"repo{i}", np.zeros(T * 4 + 1), None) for i in range(2)]
    table = {name: {"of": name} for name in (*evaluation.GATES, "policy")} | {"oracle": {"horizon": 4}}
    policies = [evaluation.Judged(i, table if i == 0 else {"policy": {"of": "policy 1"}}) for i in range(2)]
    rule_of = lambda s, chunks, name, known, policy: rl.make_rule(chunks, (name, float(s.env.budget), known["of"], policy), plan=0)
    monkeypatch.setattr(evaluation, "calibrated_rule", rule_of)
    monkeypatch.setattr(evaluation, "prepare", lambda s, some: evaluation.Group(SimpleNamespace(windows=None), len(some)))
    monkeypatch.setattr(evaluation, "read_prefix", lambda *_: jnp.zeros(1))
    monkeypatch.setattr(evaluation, "base_losses", lambda *_: jnp.ones((1, T)))
    monkeypatch.setattr(evaluation, "credits_everywhere", lambda *_: np.tril(np.ones((T, T)), -1)[None])

    own = {name: {"of": f"{name} at 18"} for name in evaluation.GATES} | {"oracle": {"horizon": 8}}
    asked, plan_of = set(), evaluation.oracle_plan
    note = lambda s, credit, horizon: asked.add((float(s.env.budget), horizon)) or plan_of(s, credit, horizon)
    monkeypatch.setattr(evaluation, "oracle_plan", note)

    def run_rule(s, group, rule, key, probe=False):
        seen.append((float(s.env.budget), rule.policy, probe))
        plan = jnp.broadcast_to(rule.plan_T, (1, T))
        return SimpleNamespace(loss=9.0 - plan, action=plan, dropped=jnp.zeros((1, T)))

    monkeypatch.setattr(evaluation, "run_rule", run_rule)
    found = evaluation.evaluate(setup, texts, policies, [9.0, 30.0], {18.0: own}, 0, lambda x, _: x)
    for budget, who, probe in seen:
        if isinstance(who, tuple):
            name, at, known, policy = who
            settled = name if at == 12 or name == "policy" else f"{name} at 18"
            assert at == budget and known == (settled if policy == 0 else "policy 1")
            assert probe == (evaluation.GATES.get(name) in ("gradient_norm", "inner_loss"))
    plans = {b: {name: rs[0].actions_T.sum() for name, rs in reads.items()} for b, reads in found.frontier.items()}
    assert plans.keys() == {9.0, 12.0, 18.0, 30.0} and all(plans[b].keys() == {"policy"} for b in (9.0, 30.0))
    for b in (12.0, 18.0):
        assert all(plans[b][name] == (b - 6) // 2 for name in (*evaluation.BLIND, "oracle"))
    assert [r.seed for r in found.reads["policy"]].count(1) == 2 and asked == {(12.0, 4), (18.0, 8)}


def test_tables_are_in_the_units_of_the_action():
    T, policy = 5, rl.init_policy(jax.random.key(0))
    setup = evaluation.Setup(*[None] * 6, rl.Env(np.float32(COSTS), np.float32(0)), COSTS, lm.make_mesh())
    logits = np.random.RandomState(0).standard_normal((20, T, 4))
    known = {
        "policy": evaluation.as_json(*(rl.price_table(logits, COSTS, a - 1, a) for a in (1, 2, 3))),
        "loss_threshold": evaluation.as_json(rl.gate_table(logits[..., 0], 1.0)) | {"pace": 1.0, "online": 0.0},
    }
    for budget, action in ((9.0, 1), (20.0, 2), (40.0, 3)):
        own, gate = (
            evaluation.calibrated_rule(setup.at(budget), T, name, known[name], policy).table.spend_TQ
            for name in ("policy", "loss_threshold")
        )
        np.testing.assert_allclose(gate[:, [0, -1]], [COSTS[[action - 1, action]] - 1] * T)
        np.testing.assert_allclose(own[:, [0, -1]], [COSTS[[action - 1, action]] - 1] * T, atol=1e-3)


def test_the_system_calls_that_the_judge_denies_are_denied():
    if os.uname().machine != "x86_64" or "OPEN" in evaluation.isolation():
        pytest.skip("numbers of x86-64, and this system leaves calls open")
    calls = (
        57, 58, 59, 322, 41, 62, 200, 234, 129, 297, 101, 310, 311, 302, 141, 251, 203, 142, 144, 314, 90, 91, 268, 92, 93, 94, 260,
        188, 189, 190, 197, 198, 199, 76, 280, 132, 235, 261, 86, 265, 88, 266, 272, 308, 165, 321, 298, 248, 250, 29, 30, 31, 64, 65,
        66, 220, 68, 69, 70, 71, 240, 241, 323, (1 << 30) + 39,
    )  # fmt: skip
    unknown = (424, 425, 434, 435, 437, 438, 440, 452, 463, 466, 469, 10**6)  # and all that come after them
    answer = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def answer(n):
    ctypes.set_errno(0)
    return libc.syscall(ctypes.c_long(n), -1, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno()
def f(x):
    left = [n for n in {calls} if answer(n) != 1] + [n for n in {unknown} if answer(n) != 38]
    if left: raise ValueError(left)
    return x + 1
"""
    v = evaluation.judge(SUCCESSOR, answer)
    assert v.result == "passed", v
    v = evaluation.judge(SUCCESSOR, INSIDE.format("[open('file', 'w') for _ in range(99)]"))
    assert (v.result, v.detail[:7]) == ("error", "OSError"), v
