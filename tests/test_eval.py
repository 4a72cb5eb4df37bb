"""Schedules, the oracle, costs and statistics."""

import dataclasses
import itertools
import json

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import CHUNK, CHUNKS, LIGHT, MODEL, make
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import model as lm
import ponder
import rl

COSTS = np.asarray(rl.NOMINAL)


@given(chunks=st.integers(2, 40), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_schedules_fit_the_budget_and_waste_less_than_one_update(chunks, share, seed):
    budget = chunks * (1 + 11 * share)
    for name, plan in evaluation.schedules(COSTS, budget, chunks, seed).items():
        spent = COSTS[plan].sum()
        assert plan.shape == (chunks,) and spent <= budget * (1 + 1e-5), name
        assert np.ptp(plan) <= 1, name
        if plan.min() < 3:
            assert spent + COSTS[plan.min() + 1] - COSTS[plan.min()] > budget * (1 - 1e-5), name


def test_schedules_are_what_they_are_called():
    plans = evaluation.schedules(COSTS, 48, 24, 0)
    assert plans["every_n"].tolist() == [1, 0] * 12
    assert plans["front_loaded"].tolist() == [1] * 12 + [0] * 12
    assert plans["random"].sum() == 12 and plans["random"].tolist() not in ([1, 0] * 12, [1] * 12 + [0] * 12)
    assert (evaluation.schedules(COSTS, 48, 24, 1)["random"] != plans["random"]).any()
    assert evaluation.schedules(COSTS, 24, 24, 0)["every_n"].max() == 0
    assert evaluation.schedules(COSTS, 24 * 4.5, 24, 0)["every_n"].tolist() == [2, 1] * 12  # above UPDATE_1's cost


# --- costs ---


def counted(function, *args) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


FASTS = {
    "last": lm.Fast((3,), 128),
    "swiglu": lm.Fast((2, 3), 128),
    "apart": lm.Fast((1, 3), 128),
    "swiglu reconstruction": lm.Fast((2, 3), 128, objective="reconstruction"),
    "linear": lm.Fast((2, 3), 0, "linear"),
    "linear reconstruction": lm.Fast((2, 3), 0, "linear", "reconstruction"),
    "lora": lm.Fast((2, 3), 32, "lora"),
    "sgd": lm.Fast((2, 3), 128, optimizer="sgd", momentum=0.9),
    "neox": lm.Fast((1, 3), 128),
    "neox lora": lm.Fast((2, 3), 32, "lora"),
    "llama": lm.Fast((2, 3), 128, objective="reconstruction"),
    "llama lora": lm.Fast((2, 3), 32, "lora"),
    "llama last": lm.Fast((3,), 128),
}
GPT2 = lm.Model(1024, 256, 256, 4, 4)
SHAPES = {
    "neox": GPT2._replace(kind="gpt_neox", hidden=768, activation="gelu", rotary=16, parallel=True, tied=False),
    "llama": GPT2._replace(
        kind="llama", heads=8, kv_heads=2, head_width=64, hidden=640, norm="rms", activation="silu", rotary=64, biases=()
    ),
}


@pytest.mark.parametrize("name", FASTS)
def test_flops_formula_agrees_with_xla(name):
    """Matrix products dominate at this size; XLA also counts norms, softmax and the like."""
    model, fast, C = SHAPES.get(name.split()[0], GPT2), FASTS[name], 128
    params = lm.init_gpt2(jax.random.key(0), model)
    lower, upper = lm.split_blocks(params, fast.blocks[0])
    slow = lm.init_slow(jax.random.key(1), model, fast)
    x_SD = jnp.zeros((2 * C, model.width))
    window = lm.Window(x_SD, jnp.zeros(C, jnp.int32), jnp.int32(C), x_SD if lm.caches_lowest(model, fast) else None)
    prefix = counted(lambda lower, upper, x: lm.prefix(model, fast, lower, upper, x), lower, upper, jnp.zeros(2 * C, jnp.int32))
    expected = lm.count_flops(model, fast, C)

    for action, steps in enumerate(lm.STEPS):
        if steps == 2 and name != "swiglu":
            continue  # between the others

        def read(upper, slow, window, steps=steps):
            state = lm.init_state(fast, slow)
            reading, *gradients = lm.differentiate(model, fast, upper, slow, state.weights, window)
            return reading.losses_C, lm.ttt_update(fast, slow, state, *gradients, steps, model.dtype)

        measured = prefix + counted(read, upper, slow, window)
        assert measured == pytest.approx(expected[action], rel=0.08), (steps, measured / expected[action])


# --- the oracle ---


@pytest.fixture(scope="module")
def texts():
    """Documents that are easy to learn from: the same few tokens again and again."""
    documents = [np.random.RandomState(5 + n).randint(0, 6, CHUNKS * CHUNK + 1).astype(np.int32) for n in range(2)]
    return [evaluation.Tokens("repo", d, rl.text_features(d, CHUNK, np.eye(MODEL.vocab, 8, dtype=np.float32))) for d in documents]


@pytest.fixture(scope="module")
def read(texts):
    """The first, ready to read."""
    tiny = make(MODEL, LIGHT)
    env = rl.Env(jnp.asarray(rl.NOMINAL), jnp.float32(1000))
    slow = tiny.slow | {"log_step": jax.tree.map(lambda x: x - 2, tiny.slow["log_step"])}
    setup = evaluation.Setup(tiny.model, tiny.fast, CHUNK, tiny.lower, tiny.upper, slow, env, COSTS, lm.make_mesh())
    return setup, evaluation.prepare(setup, texts[:1])


@pytest.fixture(scope="module")
def every_sequence(read):
    """Mean loss of all 4^5 action sequences."""
    setup, group = read
    windows = jax.tree.map(lambda x: x[0], group.document.windows)
    sequences = np.asarray(list(itertools.product(range(4), repeat=CHUNKS)), np.int32)
    loss = lambda actions: lm.document_loss(setup.model, setup.fast, setup.upper, setup.slow, windows, actions)[0]
    return sequences, np.asarray(jax.jit(lambda s: jax.lax.map(loss, s))(sequences))


@pytest.mark.parametrize("budget", [7, 9, 11, 13, 20, 40])
def test_oracle_plan_is_nearly_the_best_sequence_of_all(read, every_sequence, budget):
    setup, group = read
    sequences, losses = every_sequence
    setup = setup.at(budget)
    loss_of = lambda plan: losses[(sequences == plan).all(1)].item()
    plan = evaluation.oracle_plan(setup, evaluation.credits_everywhere(setup, group)[0], CHUNKS)
    within = losses[COSTS[sequences].sum(1) <= budget]
    assert CHUNKS < COSTS[plan].sum() <= budget
    share = (loss_of([0] * CHUNKS) - loss_of(plan)) / (loss_of([0] * CHUNKS) - within.min())
    assert share > (0.99 if budget <= 13 else 0.5)  # above, the best sequences take several kinds of steps


@given(hnp.arrays(float, (7, 7), elements=st.floats(-1, 1), unique=True), st.integers(1, 9), st.integers(7, 21))
def test_the_oracle_takes_the_chunks_that_give_most_to_the_next_ones(credit_TT, horizon, budget):
    setup = evaluation.Setup(*[None] * 6, rl.Env(COSTS, float(budget)), COSTS, None)
    plan = evaluation.oracle_plan(setup, credit_TT, horizon)
    value = [sum(credit_TT[u, t] for u in range(t + 1, min(t + horizon, 6) + 1)) for t in range(7)]
    assert set(plan) <= {0, 1} and plan.sum() == (budget - 7) // 2
    assert not plan.any() or plan.all() or min(v for v, a in zip(value, plan) if a) >= max(v for v, a in zip(value, plan) if not a)


def test_calibration_takes_what_has_the_lowest_loss(read, texts):
    setup, group = read
    setup, groups = setup.at(9), [group, evaluation.prepare(setup, texts[1:])]
    policy = rl.init_policy(jax.random.key(0))
    policy.net["actor"]["weight"] = 100 * policy.net["actor"]["weight"]
    found = json.loads(json.dumps(evaluation.calibrate(setup, texts, [policy], lambda x, _: x)[0]))
    assert found.keys() == {"policy", *evaluation.GATES, "oracle"}

    def loss(name, **changes):
        rule = evaluation.calibrated_rule(setup, CHUNKS, name, found[name] | changes, policy)
        steps = [evaluation.run_rule(setup, group, rule, jax.random.key(0), probe=True) for group in groups]
        assert max(s.cost.sum() for s in steps) <= 9, name
        return float(np.mean([s.loss.mean() for s in steps]))

    plan = rl.make_rule(CHUNKS, policy, plan=evaluation.schedules(COSTS, 9.0, CHUNKS, 0)["every_n"])
    seen = [evaluation.run_rule(setup, group, plan, jax.random.key(0), probe=True) for group in groups]
    unit = np.std([s.loss for s in seen]) / (COSTS[1] - COSTS[0])
    for name in evaluation.GATES:
        even = name == "online_gate"
        key, options = ("online", [x * unit for x in evaluation.DRIFTS]) if even else ("pace", evaluation.PACES)
        assert any(found[name][key] == pytest.approx(option, rel=1e-4) for option in options)
        assert loss(name) <= min(loss(name, **{key: option}) for option in options) + 1e-5, name
    less = evaluation.settle(setup.at(7), texts, evaluation.Judged(policy, found), lambda x, _: x)

    def followed(horizon, group):
        plan = evaluation.oracle_plan(setup.at(7), evaluation.credits_everywhere(setup.at(7), group)[0], horizon)
        return evaluation.run_rule(setup.at(7), group, rl.make_rule(CHUNKS, policy, plan=plan), jax.random.key(0)).loss.mean()

    losses = [np.mean([followed(horizon, group) for group in groups]) for horizon in evaluation.HORIZONS]
    assert less.keys() == found.keys() - {"policy"} and losses[evaluation.HORIZONS.index(less["oracle"]["horizon"])] <= min(losses) + 1e-5
    loss("policy")
    for budget, taken in ((3.0, {0, 1}), (6.0, {1, 2}), (12.0, {2, 3})):  # of the actions on both sides of the budget
        rule = evaluation.calibrated_rule(setup.at(CHUNKS * (budget - 1)), CHUNKS, "policy", found["policy"], policy)
        assert {int(rule.least), int(rule.action)} == taken
    for name, signal in evaluation.GATES.items():
        column = np.concatenate([np.append(s.features_U, s.probed, -1)[..., rl.SIGNALS.index(signal)].ravel() for s in seen])
        np.testing.assert_allclose(found[name]["threshold"][0][0], np.quantile(column, np.linspace(1, 0, rl.POINTS)), rtol=1e-5)


# --- statistics ---


def read_of(repo, loss, action=0, document=0, seed=0, seconds=0.5):
    losses = np.asarray(loss, float)
    return evaluation.Read(document, repo, losses, np.broadcast_to(action, losses.shape), seconds, seed)


def test_repositories_count_once_however_many_documents_and_seeds_they_have():
    reads = [read_of("b", [1, 3], document=0), read_of("a", [5, 5], document=1, seed=0), read_of("a", [8, 8], document=1, seed=1)]
    reads += [read_of("a", [2, 3], 1, document=2, seconds=2.5)]
    np.testing.assert_allclose(evaluation.losses(reads), [(5 + 8 + 2.5) / 3, 2.0])
    np.testing.assert_allclose(evaluation.per_repository(reads, [4, 1, 2, 6]), [3.0, 4.0])
    setup = evaluation.Setup(*[None] * 7, np.asarray([1.0, 1.6, 2.0, 4.0]), None)
    np.testing.assert_allclose(evaluation.costs(setup, reads, "nominal"), [5 / 3, 1])
    np.testing.assert_allclose(evaluation.costs(setup, reads, "flops"), [1.2, 1])
    np.testing.assert_allclose(evaluation.costs(setup, reads, "seconds"), [3.5 / 2 / 3, 0.25])


def test_interval_is_close_to_students_for_normal_data():
    x = np.random.default_rng(0).normal(1.0, 2.0, 200)
    low, high = scipy.stats.t.interval(0.95, 199, x.mean(), scipy.stats.sem(x))
    assert evaluation.interval(x) == pytest.approx([low, high], abs=0.05)
    assert evaluation.interval(np.ones(5)) == [1.0, 1.0]


@given(hnp.arrays(float, st.integers(1, 40), elements=st.floats(-9, 9)))
def test_iqm_is_the_mean_of_the_middle_half(values):
    quarter = len(values) // 4
    assert evaluation.iqm(values) == pytest.approx(np.mean(sorted(values)[quarter : len(values) - quarter]), abs=1e-9)


def reads_of(loss_R, action=0, **options):
    """One document of one chunk from each repository."""
    return [read_of(f"repo{i:03d}", [loss], action, i, **options) for i, loss in enumerate(loss_R)]


@given(hnp.arrays(np.int64, (3, 8), elements=st.integers(0, 9)))
def test_statistics_equal_loops(loss_MR):
    skip, ours, theirs = loss_MR
    reads = {name: reads_of(loss) for name, loss in zip(("skip", "policy", "random"), loss_MR)}
    found = evaluation.compare(reads, "policy", "random")
    differences, gains, others = theirs - ours, skip - ours, skip - theirs
    assert found["difference"] == pytest.approx(differences.mean()) and found["better_on"] == np.mean(ours < theirs)
    assert found["iqm"] == pytest.approx(np.sort(differences)[2:6].mean())
    assert found["ci"] == evaluation.interval(differences.astype(float))
    above, below = (np.mean([[sign * (a - b) > 0 for a in gains] for b in others]) for sign in (1, -1))
    assert found["probability_of_improvement"] == pytest.approx(above + (1 - above - below) / 2)
    assert found["cliffs_delta"] == pytest.approx(above - below)
    if np.ptp(differences) == 0:
        assert (found["wilcoxon_p"], found["t_p"], found["cohens_d"]) == (1.0, 1.0, 0.0)
        return
    deviation = np.sqrt(((differences - differences.mean()) ** 2).sum() / 7)
    assert found["cohens_d"] == pytest.approx(differences.mean() / deviation)
    t = abs(differences.mean()) / (deviation / np.sqrt(8))
    assert found["t_p"] == pytest.approx(2 * scipy.stats.t.sf(t, 7))


def test_wilcoxons_p_equals_the_enumeration_of_all_signs():
    theirs, ours = np.asarray([5.1, 4.3, 6.2, 5.8, 4.9, 7.7]), np.asarray([4.0, 4.6, 5.0, 5.1, 4.1, 5.5])
    reads = {"skip": reads_of(theirs + 1), "policy": reads_of(ours), "random": reads_of(theirs)}
    ranks = scipy.stats.rankdata(abs(theirs - ours))
    statistic = lambda signs: abs(sum(rank * sign for rank, sign in zip(ranks, signs)))
    everything = [statistic(signs) for signs in itertools.product([-1, 1], repeat=6)]
    expected = np.mean(np.asarray(everything) >= statistic(np.sign(theirs - ours)))
    assert evaluation.compare(reads, "policy", "random")["wilcoxon_p"] == pytest.approx(expected)


SETUP = evaluation.Setup(*[None] * 7, np.asarray([1.0, 1.5, 2.0, 4.0]), None)


def test_summary_and_comparison_of_hand_made_losses():
    """Two documents of a, one of b; the oracle learns from first chunks, the policy from others too."""
    make = lambda losses, *actions: [read_of("aab"[i], x, np.asarray(a), i) for i, (x, a) in enumerate(zip(losses, actions))]
    skip, first = [[4, 4], [4, 2], [2, 2]], [1, 0]
    reads = {"skip": make(skip, 0, 0, 0), "base": make(np.asarray(skip) + 1, 0, 0, 0)}
    reads |= {"oracle": make([[3, 3], [3, 1], [1, 1]], first, first, first)}
    reads |= {"policy": make([[3, 3], [4, 2], [2, 2]], [1, 1], first, [0, 1])}
    found = evaluation.Evaluation(reads, {}, [np.asarray([0.5, 0.1]), np.asarray([0.5, 0.0]), np.asarray([0.2, 0.1])])
    methods = evaluation.summarise(SETUP, found)
    policy = methods["policy"]
    assert policy["loss"] == pytest.approx(2.5) and policy["gain"] == pytest.approx(0.25) == policy["gain_iqm"]
    assert policy["gain_over_base"] == pytest.approx(1.25)
    assert policy["oracle_recovery"] == pytest.approx(0.25) and methods["skip"]["gain_ci"] == [0.0, 0.0]
    assert policy["update_rate"] == pytest.approx((0.75 + 0.5) / 2) and policy["seconds"] == 0.25
    assert policy["cost_nominal"] == pytest.approx((2.5 + 2) / 2) and policy["cost_flops"] == pytest.approx((1.375 + 1.25) / 2)
    assert policy["oracle_agreement"] == pytest.approx(((0.5 + 1) / 2 + 0) / 2)
    assert policy["rank_correlation"] == pytest.approx((1 - 1) / 2)  # right on the second document, wrong on the third
    assert methods["oracle"]["rank_correlation"] == pytest.approx(1) and methods["skip"]["rank_correlation"] is None
    paired = evaluation.compare(reads, "oracle", "policy")
    assert paired["difference"] == pytest.approx(0.75) and paired["better_on"] == 1.0


def test_best_methods_are_those_that_nothing_cheaper_beats():
    method = lambda cost, gain: {"cost_nominal": cost, "gain": gain}
    methods = {"skip": method(1, 0.0), "random": method(2, 0.1), "policy": method(2, 0.2), "update_1": method(3, 0.15)}
    methods |= {"update_2": method(6, 0.3), "oracle": method(1.5, 0.9), "base": method(1, 0.01)}
    assert evaluation.best_methods(methods, "nominal") == ["skip", "policy", "update_2"]


# --- the frontier and what it saves ---


def test_the_frontier_is_the_policy_at_each_budget_over_all_seeds():
    reads = {b: {"policy": reads_of([4 - b, 6 - b], a, seconds=b) + reads_of([2 - b, 6 - b], 0, seed=1)} for b, a in ((3.0, 2), (1.5, 1))}
    first, second = evaluation.frontier(SETUP, evaluation.Evaluation({}, reads, []))
    assert first == pytest.approx({"budget": 1.5, "loss": 3.0, "cost_nominal": 2.0, "cost_flops": 1.25, "seconds": 1.0})
    assert second == pytest.approx({"budget": 3.0, "loss": 1.5, "cost_nominal": 3.5, "cost_flops": 1.5, "seconds": 1.75})


def test_the_frontier_compares_where_all_methods_were_read():
    names = {"policy": 2.0, "oracle": 1.0, **dict.fromkeys((*evaluation.BLIND, *evaluation.GATES), 3.0)}
    reads = {name: reads_of([loss, 1 + loss]) for name, loss in names.items()}
    found = evaluation.Evaluation({"skip": reads_of([5, 6])}, {2.0: reads, 1.5: reads}, [])
    for row in evaluation.frontier(SETUP, found):
        assert row["gains"] == {name: 5 - loss for name, loss in names.items()}
        assert {name: c["difference"] for name, c in row["comparisons"].items()} == {n: 1 for n in names if n not in ("policy", "oracle")}
    text = evaluation.budgets_table(evaluation.frontier(SETUP, found))
    assert "| learned policy | +3.0000 | +3.0000 |" in text and "| random chunks | +2.0000 (+1.0000 [1.0000, 1.0000]) |" in text


@pytest.mark.parametrize(
    "target, cost",
    [(5.0, 1.0), (4.0, 1.0), (3.5, 1.5), (3.0, 2.0), (2.5, 4.5), (2.0, 5.0), (1.9, np.inf)],
)
def test_cost_at_is_where_the_frontier_first_reaches_a_loss(target, cost):
    """The third point is worse than the second, and costs more: nothing there is worth its cost."""
    loss, costs = np.asarray([4.0, 3.0, 3.5, 2.0]), np.asarray([1.0, 2.0, 4.0, 5.0])
    assert evaluation.cost_at(loss, costs, target) == pytest.approx(cost)


def hand_made(full_loss):
    """SKIP loses 4 everywhere, the policy 3 with half of UPDATE_1's updates and 2 with all of them."""
    ones = np.ones(4)
    half = [read_of(f"repo{i:03d}", [3, 3], np.asarray([0, 1]), i, seconds=0.75) for i in range(4)]
    full = {f"update_{n}": reads_of(full_loss * ones, a, seconds=n) for a, n in ((1, 1), (2, 2), (3, 4))}
    reads = {"skip": reads_of(4 * ones, 0)} | full
    frontier = {4.0: {"policy": half}, 6.0: {"policy": reads_of(2 * ones, 1)}}
    return evaluation.Evaluation(reads | {"policy": half, "base": reads["skip"], "oracle": half}, frontier, [np.asarray([0.1, 0.2])] * 4)


def test_savings_of_a_hand_made_frontier():
    saved = evaluation.savings(SETUP, hand_made(3.0), resamples=20)
    row = lambda total, learning: {"total": total, "total_ci": [total] * 2, "learning": learning, "learning_ci": [learning] * 2}
    flat = lambda row: [row["total"], *row["total_ci"], row["learning"], *row["learning_ci"]]
    for name, nominal, flops in (("update_1", 3, 1.5), ("update_2", 6, 2), ("update_4", 12, 4)):
        expected = row(1 - 2 / nominal, 1 - 1 / (nominal - 1))  # the policy's loss at cost 2, 1 above SKIP's
        assert flat(saved[name]["nominal"]) == pytest.approx(flat(expected)), name
        expected = row(1 - 1.25 / flops, 1 - 0.25 / (flops - 1))
        assert flat(saved[name]["flops"]) == pytest.approx(flat(expected)), name


def test_a_loss_that_the_frontier_does_not_reach_saves_nothing_known():
    saved = evaluation.savings(SETUP, hand_made(1.9), resamples=20)
    for currency in ("nominal", "flops"):
        assert saved["update_1"][currency] == {"total": None, "total_ci": [None] * 2, "learning": None, "learning_ci": [None] * 2}
    assert "not reached" in evaluation.savings_table(saved)


def test_savings_intervals_resample_repositories():
    """On three of four repositories the policy reaches UPDATE_1's loss at half its cost above SKIP, on one with all."""
    found = hand_made(3.0)
    found.frontier[4.0]["policy"][0] = read_of("repo000", [4, 4], np.asarray([0, 1]), 0)
    row = evaluation.savings(SETUP, found)["update_1"]["nominal"]
    assert row["learning"] == pytest.approx(1 - 1.2 / 2)  # mean losses 4, 3.25 and 2 at costs 1, 2 and 3
    low, high = row["learning_ci"]
    assert low < row["learning"] < high == pytest.approx(0.5)


@pytest.mark.parametrize("shape, area", [(((2, 3), (3, 2)), 0.5), (((2, 2.4), (3, 2)), 0.65), (((2, 4), (3, 4)), 0.0)])
def test_pareto_area_is_that_under_the_gain(shape, area):
    """SKIP loses 4 at cost 1, UPDATE_1 2 at cost 3."""
    methods = {"skip": {"cost_nominal": 1, "loss": 4.0}, "update_1": {"cost_nominal": 3, "gain": 2.0}}
    points = [{"cost_nominal": cost, "loss": loss} for cost, loss in shape]
    assert evaluation.pareto_area(methods, points) == pytest.approx(area, abs=0.005)
    for too_few in (points[:1], points[1:]):
        assert evaluation.pareto_area(methods, too_few) is None


def test_all_figures_are_numbers_that_json_can_hold():
    found = hand_made(3.0)
    reads = found.reads | dict.fromkeys((*evaluation.BLIND, *evaluation.GATES), found.reads["skip"])
    reads["policy"] = reads["policy"] + [r._replace(losses_T=r.losses_T - 0.5, seed=1) for r in reads["policy"]]
    results = evaluation.analyse(SETUP, found._replace(reads=reads))
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["policy_gain_by_seed"] == pytest.approx([1.0, 1.5])
    assert results["per_repository"]["loss"]["policy"] == pytest.approx([2.75] * 4)


@pytest.mark.parametrize(("ci", "word"), [([0.1, 0.2], "better than"), ([-0.2, -0.1], "worse than"), ([-0.1, 0.1], "not distinguishable")])
def test_verdict_says_it_whichever_way_it_went(ci, word):
    method = {"loss": 1.8, "gain": 0.2, "gain_ci": [0.1, 0.3], "cost_nominal": 2.0, "cost_flops": 1.2}
    results = {"repositories": 12, "unit": "repositories", "unseen": "held out", "methods": {"policy": method, "update_1": method}}
    results["methods"]["skip"] = {"loss": 2.0}
    results["comparisons"] = {"random": {"difference": 0.0, "ci": ci}}
    sentence = evaluation.verdict(results)
    assert word in sentence and "100%" in sentence and "12 repositories held out" in sentence and "10.0% (2.000 to 1.800)" in sentence
    assert evaluation.verdict(results | {"looks_ahead": False}) == sentence
    assert "policy, which looks ahead in the text, kept" in evaluation.verdict(results | {"looks_ahead": True})
    few = evaluation.verdict(results | {"repositories": 9})
    assert word not in few and "9 are too few to rank methods by" in few
    results["methods"]["update_1"] = method | {"gain_ci": [-0.1, 0.3]}
    assert "did not reliably beat" in evaluation.verdict(results)


def fake_results(shift: float) -> dict:
    names, skip = ["a", "b", "c"], np.asarray([2.0, 3.0, 4.0])
    method = lambda loss: {
        "loss": loss.mean(),
        "gain": (skip - loss).mean(),
        "gain_ci": evaluation.interval(skip - loss),
        "cost_nominal": 2.0,
        "oracle_recovery": 0.75,
    }
    loss = {"base": skip, "skip": skip, "update_1": skip - 0.5, "policy": skip - np.asarray([0.1, 0.2, 0.3]) - shift}
    per_repository = {"names": names, "loss": {name: x.tolist() for name, x in loss.items()}}
    comparisons = {"random": {"difference": 0.125, "ci": [0.0625, 0.25]}}
    return {"methods": {name: method(x) for name, x in loss.items()}, "per_repository": per_repository, "comparisons": comparisons}


@pytest.mark.parametrize("what", evaluation.ABLATIONS)
def test_an_ablation_runs_each_variant_once_and_compares_it_with_the_first(what, tmp_path, monkeypatch):
    ran = []

    def run(cfg):
        ran.append(cfg)
        cfg.out.mkdir(parents=True)
        (cfg.out / "config.json").write_text(json.dumps(ponder.settings(ponder.resolve(cfg))))
        (cfg.out / "results.json").write_text(json.dumps(fake_results(0.01 * len(ran) * np.arange(1, 4))))

    monkeypatch.setattr(ponder, "run", run)
    base, also = ponder.Config(out=tmp_path, test_documents=3), ()
    variants = evaluation.ABLATIONS[what]
    if what == "transfer":
        (tmp_path / "java").mkdir()
        also, variants = (tmp_path / "java",), variants | {"repositories of java": {"data": str(tmp_path / "java")}}
    for _ in range(2):  # the second time everything is there already
        evaluation.ablate(what, also, base)
    with pytest.raises(ponder.UserError, match=r"was run with other settings \((budget: \S+, )?chunks: 24"):
        evaluation.ablate(what, also, dataclasses.replace(base, chunks=8))
    with pytest.raises(ponder.UserError, match=r"was run with other settings \(test_documents: 3"):
        evaluation.ablate(what, also, dataclasses.replace(base, test_documents=4))
    assert len(ran) == len(variants) == len({cfg.out for cfg in ran})
    for cfg, change in zip(ran, variants.values(), strict=True):
        wanted = dict(change)
        if "budget" in wanted:
            wanted["budget"] *= cfg.chunks
        assert {name: getattr(cfg, name) for name in wanted} == wanted and cfg.test_documents == 3
        assert (cfg.stage == "eval") == (what in ("budget", "transfer"))
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    second = next(line for line in lines if line.startswith(f"| {list(variants)[1]} |"))
    assert "+0.0200" in second and "16.7%" in second  # 0.01 * mean(1, 2, 3) lower; 0.5 of 3
    assert "| 0.75 | +0.1250 [0.0625, 0.2500] |" in second
    assert (tmp_path / "ablation.png").stat().st_size > 1000


def test_variants_that_read_other_text_are_not_compared_in_pairs():
    first, longer = fake_results(0.0), fake_results(0.1 * np.arange(3))
    assert "+0.1000 [" in evaluation.ablation_table({"first": first, "second": longer}).splitlines()[-1]
    longer["per_repository"]["loss"]["base"][1] += 0.1
    assert evaluation.ablation_table({"first": first, "second": longer}).splitlines()[-1].endswith("|  |")
