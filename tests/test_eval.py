"""Schedules, the oracle, costs and statistics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import CHUNK, CHUNKS
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import model as lm
import rl

COSTS = np.asarray(rl.NOMINAL)


@given(chunks=st.integers(2, 40), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_schedules_fit_the_budget_and_waste_less_than_one_update(chunks, share, seed):
    budget = chunks * (1 + 11 * share)
    for name, plan in evaluation.schedules(COSTS, budget, chunks, seed).items():
        spent = COSTS[plan].sum()
        assert plan.shape == (chunks,) and spent <= budget * (1 + 1e-5), name
        left = [COSTS[plan].sum() + COSTS[plan.max()] - 1 for t in range(chunks) if plan[t] == 0 and plan.max()]
        assert not left or min(left) > budget * (1 - 1e-5), name


def test_schedules_are_what_they_are_called():
    plans = evaluation.schedules(COSTS, 48, 24, 0)
    assert plans["every_n"].tolist() == [1, 0] * 12
    assert plans["front_loaded"].tolist() == [1] * 12 + [0] * 12
    assert plans["random"].sum() == 12 and plans["random"].tolist() not in ([1, 0] * 12, [1] * 12 + [0] * 12)
    assert (evaluation.schedules(COSTS, 48, 24, 1)["random"] != plans["random"]).any()
    assert evaluation.schedules(COSTS, 24, 24, 0)["every_n"].max() == 0


# --- costs ---


def counted(function, *args) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


@pytest.mark.parametrize(("objective", "blocks"), [("next_token", 1), ("next_token", 2), ("reconstruction", 2)])
def test_flops_formula_agrees_with_xla(objective, blocks):
    """Matrix products dominate at this size; XLA also counts norms, softmax and the like."""
    model, fast = lm.Model(1024, 256, 256, 4, 4), lm.Fast(blocks, 128, objective)
    C = 128
    params = lm.init_gpt2(jax.random.key(0), model)
    lower, upper = lm.split_blocks(params, fast.blocks)
    slow = lm.init_slow(jax.random.key(1), model, fast)
    x_SD = jnp.zeros((2 * C, model.width))
    window = lm.Window(x_SD, jnp.zeros(C, jnp.int32), jnp.int32(C), x_SD if blocks > 1 else None)
    prefix = counted(lambda lower, upper, x: lm.prefix(model, fast, lower, upper, x), lower, upper, jnp.zeros(2 * C, jnp.int32))
    expected = lm.count_flops(model, fast, C)

    for action, steps in enumerate(lm.STEPS):

        def read(upper, slow, window, steps=steps):
            reading, *gradients = lm.differentiate(model, fast, upper, slow, slow["start"], window)
            return reading.losses_C, lm.ttt_update(fast, slow["log_step"], slow["start"], *gradients, steps, model.dtype)

        measured = prefix + counted(read, upper, slow, window)
        assert measured == pytest.approx(expected[action], rel=0.08), (steps, measured / expected[action])


# --- the oracle ---


@pytest.fixture(scope="module")
def read(tiny):
    """A document that is easy to learn from (the same few tokens again and again), ready to read."""
    tokens = np.random.RandomState(5).randint(0, 6, CHUNKS * CHUNK + 1).astype(np.int32)
    env = rl.Env(jnp.asarray(rl.NOMINAL), jnp.float32(1000))
    text = rl.text_features(tokens, CHUNK, np.eye(tiny.model.vocab, 8, dtype=np.float32))
    slow = tiny.slow | {"log_step": jax.tree.map(lambda x: x - 2, tiny.slow["log_step"])}
    setup = evaluation.Setup(tiny.model, tiny.fast, CHUNK, tiny.lower, tiny.upper, slow, env, COSTS)
    document, _ = evaluation.prepare(setup, evaluation.Tokens("repo", tokens, text))
    return setup, document


@pytest.fixture(scope="module")
def every_sequence(tiny, read):
    """Mean loss of all 4^5 action sequences."""
    setup, document = read
    sequences = np.asarray(list(itertools.product(range(4), repeat=CHUNKS)), np.int32)
    loss = lambda actions: lm.document_loss(setup.model, setup.fast, setup.upper, setup.slow, document.windows, actions)[0]
    return sequences, np.asarray(jax.jit(lambda s: jax.lax.map(loss, s))(sequences))


@pytest.mark.parametrize("budget", [7, 9, 11, 13, 20, 40])
def test_oracle_plan_is_nearly_the_best_sequence_of_all(read, every_sequence, budget):
    setup, document = read
    sequences, losses = every_sequence
    setup = setup._replace(env=setup.env._replace(budget=jnp.float32(budget)))
    loss_of = lambda plan: losses[(sequences == plan).all(1)].item()
    plan = evaluation.oracle_plan(setup, document)
    within = losses[COSTS[sequences].sum(1) <= budget]
    assert CHUNKS < COSTS[plan].sum() <= budget
    assert within.min() - 1e-6 <= loss_of(plan)
    assert loss_of([0] * CHUNKS) - loss_of(plan) > 0.5 * (loss_of([0] * CHUNKS) - within.min())


def test_calibration_takes_the_share_with_the_lowest_loss(read):
    setup, document = read
    setup = setup._replace(env=setup.env._replace(budget=jnp.float32(9)))
    policy = rl.init_policy(jax.random.key(0))
    policy.net["actor"]["weight"] = 100 * policy.net["actor"]["weight"]
    found = evaluation.calibrate(setup, [document], policy)
    gate = lambda x: rl.make_rule(CHUNKS, policy, feature="loss", threshold=x, action=1)
    best = lambda x: rl.make_rule(CHUNKS, policy, price=x)
    for name, rule in (("loss_threshold", gate), ("policy_price", best)):
        run = lambda x, rule=rule: evaluation.run_rule(setup, document, rule(x), jax.random.key(0))
        chosen = run(found[name])
        assert CHUNKS < chosen.cost.sum() <= 9, name
        if name == "loss_threshold":  # no other set of chunks above a threshold does better
            others = [float(run(x - 1e-3).loss.mean()) for x in np.quantile(document.skip_T, [0.0, 0.15, 0.3, 0.4, 0.5, 0.6])]
            assert chosen.loss.mean() == pytest.approx(min(others), abs=1e-6)


# --- statistics ---


def test_repositories_count_once_however_many_documents_they_have():
    repos = ["a", "b", "a", "a"]
    assert evaluation.per_repository(repos, np.asarray([1.0, 5.0, 2.0, 3.0])).tolist() == [2.0, 5.0]


def test_interval_is_close_to_students_for_normal_data():
    x = np.random.default_rng(0).normal(1.0, 2.0, 200)
    low, high = scipy.stats.t.interval(0.95, 199, x.mean(), scipy.stats.sem(x))
    assert evaluation.interval(x) == pytest.approx([low, high], abs=0.05)
    assert evaluation.interval(np.ones(5)) == [1.0, 1.0]


def fake_reads(skip, **others):
    read = lambda loss, action: evaluation.Read(np.asarray(loss, float), np.full(len(loss), action), 0.5)
    reads = {"skip": [read(x, 0) for x in skip], "base": [read([y + 1 for y in x], 0) for x in skip]}
    return reads | {name: [read(x, 1) for x in losses] for name, losses in others.items()}


def test_summary_and_comparison_of_hand_made_losses():
    texts = [evaluation.Tokens(r, np.zeros(1), np.zeros(1)) for r in ("a", "a", "b")]
    reads = fake_reads([[4, 4], [4, 2], [2, 2]], oracle=[[3, 3], [3, 1], [1, 1]], policy=[[3, 3], [4, 2], [2, 2]])
    setup = evaluation.Setup(*[None] * 7, np.asarray([1.0, 1.5, 2.0, 4.0]))
    methods = evaluation.summarise(setup, texts, reads)
    policy = methods["policy"]
    assert policy["loss"] == pytest.approx(2.5) and policy["gain"] == pytest.approx(0.25)
    assert policy["gain_over_base"] == pytest.approx(1.25)
    assert policy["oracle_recovery"] == pytest.approx(0.25) and methods["skip"]["gain_ci"] == [0.0, 0.0]
    assert (policy["cost_nominal"], policy["cost_flops"], policy["seconds"], policy["update_rate"]) == (3.0, 1.5, 0.25, 1.0)
    paired = evaluation.compare(texts, reads, "oracle", "policy")
    assert paired["difference"] == pytest.approx(0.75) and paired["better_on"] == 1.0


def test_frontier_holds_what_nothing_cheaper_beats():
    method = lambda cost, gain: {"cost_nominal": cost, "gain": gain}
    methods = {"skip": method(1, 0.0), "random": method(2, 0.1), "policy": method(2, 0.2), "update_1": method(3, 0.15)}
    methods |= {"update_2": method(6, 0.3), "oracle": method(1.5, 0.9), "base": method(1, 0.01)}
    assert evaluation.frontier(methods, "nominal") == ["skip", "policy", "update_2"]


@pytest.mark.parametrize(("ci", "word"), [([0.1, 0.2], "better than"), ([-0.2, -0.1], "worse than"), ([-0.1, 0.1], "not distinguishable")])
def test_verdict_says_it_whichever_way_it_went(ci, word):
    method = {"gain": 0.2, "gain_ci": [0.1, 0.3], "cost_nominal": 2.0, "cost_flops": 1.2}
    results = {"repositories": 7, "unseen": "held out", "methods": {"policy": method, "update_1": method}}
    sentence = evaluation.verdict(results, {"random": {"difference": 0.0, "ci": ci}})
    assert word in sentence and "100%" in sentence and "7 repositories held out" in sentence
    results["methods"]["update_1"] = method | {"gain_ci": [-0.1, 0.3]}
    assert "did not reliably beat" in evaluation.verdict(results, {})
