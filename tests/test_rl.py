"""rl.py: features, rules and the budget, the episode, credits, the multiplier and PPO against plain loops."""

import itertools
import zlib
from collections import Counter
from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CHUNK, CHUNKS, LIGHT, MODEL, learn, make, make_windows, run_episode
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

import data
import model as lm
import rl

NOMINAL = np.asarray(rl.NOMINAL, np.float32)
U, PLACE = len(rl.FEATURES), {name: i for i, name in enumerate(rl.SIGNALS)}
CODE, AHEAD = rl.GROUPS["code"], rl.GROUPS["ahead"]
# Tokens with code of each kind, and many with none but a name.
TEXTS = ["\n", "    ", "def", "7", "==", "'", "#", "(", "é", "x1", "\n   ", '"""', *["name"] * 49]
CLASSES = rl.token_classes(TEXTS)
env = lambda budget, costs=NOMINAL: rl.Env(np.asarray(costs, np.float32), np.float32(budget))
follow = lambda policy, *plan: rl.make_rule(rl.follow, policy, plan_T=plan, hard=False)
window_of = lambda tiny, t: jax.tree.map(lambda x: x[t], tiny.windows)
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)


def read(tiny, rule, tokens=None, budget=1e6, seed=0, **options) -> rl.Step:
    """One document, read with a rule."""
    tokens = tiny.tokens if tokens is None else tokens
    windows = make_windows(tiny.spec, tiny.weights, tokens)
    document = rl.Document(windows, rl.text_features(tokens, CHUNK, CLASSES))
    rule = rule._replace(plan_T=np.resize(rule.plan_T, CHUNKS))  # of one shape: compiled once
    args = tiny.spec, tiny.weights, env(budget), document, rule, jax.random.key(seed)
    return jax.tree.map(np.asarray, run_episode(*args, **options))


tiny = pytest.fixture(scope="module")(lambda: make(MODEL, LIGHT))


@pytest.fixture(scope="module")
def policy() -> rl.Policy:
    """A random policy that is far from uniform."""
    policy = rl.init_policy(jax.random.key(0))
    policy.net["actor"]["weight"] = 200 * policy.net["actor"]["weight"]
    return policy


# --- 1. Features ------------------------------------------------------------------------------------
def test_there_are_32_features_in_six_groups_and_two_of_what_is_ahead():
    assert [len(group) for group in rl.GROUPS.values()] == [4, 6, 4, 8, 4, 6, 2]
    assert len(set(rl.FEATURES)) == U == 34 and "ahead" not in rl.DEFAULT_GROUPS
    kinds = {"\n": "newline", "\n  ": "newline indentation", "'": "quote", "x_1": "identifier digit", "é": ""}
    kinds |= {"==": "operator", '"""': "quote comment", "//": "operator comment", "):": "operator bracket"}
    for text, bits in zip(kinds, rl.token_classes(list(kinds)), strict=True):
        assert [name for name, bit in zip(CODE, bits, strict=True) if bit] == kinds[text].split()


@given(hnp.arrays(np.int32, 4 * 9 + 1, elements=st.integers(0, 11)))
def test_text_features_equal_a_loop(tokens):
    table, chunks = rl.text_features(tokens, 9, CLASSES[:12]), tokens[1:].reshape(4, 9).tolist()
    grams = lambda x, n: [tuple(x[j : j + n]) for j in range(10 - n)]  # within chunks: none spans two
    for t, x in enumerate(chunks):
        before = [i for y in chunks[:t] for i in y]
        expected = [sum(CLASSES[i][c] for i in x) / 9 for c in range(8)]
        expected += [len(set(x)) / 9, sum(i not in before for i in x) / 9]
        for n in (2, 6):
            old = [gram for y in chunks[:t] for gram in grams(y, n)]
            expected.append(sum(gram in old for gram in grams(x, n)) / (10 - n))
        expected.append(sum(np.log((len(before) + 12) / (before.count(i) + 1)) for i in x) / 9)
        expected.append(len(zlib.compress(b"".join(i.to_bytes(4, "little") for i in x))) / 36)
        again = {gram: sum(gram in grams(y, 3) for y in chunks[t + 1 :]) for gram in grams(x, 3)}
        new = [n for gram, n in again.items() if not any(gram in grams(y, 3) for y in chunks[:t])]
        expected += [np.log1p(sum(again.values())), np.log1p(sum(new))]
        np.testing.assert_allclose(table[t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start, t", [(0, 0), (16, 3)])
def test_features_of_a_reading_equal_a_loop(start, t):
    """16 tokens, so that features look at every row."""
    C, rng = 16, np.random.RandomState(start)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x_SD, top, outputs, logits = normal(2 * C, 6) + 1, normal(C, 6), normal(2, C, 6), normal(C, 9)
    query, key, losses, text = normal(4, C, 3), normal(2, 2 * C, 3), np.abs(normal(C)), np.arange(16.0)
    reading = lm.Reading(losses, logits, top, None, outputs, query, key)
    memory = rl.Memory(None, np.float32([1, 2, 0, 0]), np.float32(0.4), np.float32(2.5))
    window = lm.Window(x_SD, np.zeros(C, np.int32), np.int32(start))
    values = rl.features(reading, rl.Chunk(window, text, t, 5), memory, env(20))
    rows, below = [softmax(row) for row in logits], x_SD[start : start + C]
    entropy, best = np.mean([-(p * np.log(p)).sum() for p in rows]), np.mean([p.max() for p in rows])
    expected = [losses.mean(), losses.std(), entropy, best]
    expected += [np.log(np.sqrt((x**2).mean())) for x in (below, top)]
    expected += [1 - (x.mean(0) ** 2).sum() / np.mean([(row**2).sum() for row in x]) for x in (below, top)]
    now, before = below.mean(0), x_SD[:C].mean(0)
    shift = 1 - now @ before / np.sqrt(now @ now * (before @ before))
    expected += [np.sqrt((outputs**2).mean() / (top**2).mean()), shift]
    looks = []
    for head, i in itertools.product(range(4), range(C)):  # two heads of queries share one of keys
        p = softmax([query[head, i] @ key[head // 2, j] / np.sqrt(3) for j in range(start + i + 1)])
        distance = sum(p[j] * (start + i - j) for j in range(start + i + 1)) / C
        looks.append([-(p * np.log(p)).sum() / np.log(2 * C), p[:start].sum(), p[0], distance])
    expected += [*np.mean(looks, 0), *text[:8], 0 if t == 0 else losses.mean() - 0.4, 2.5]
    expected += [((20 - 7) / (5 - t) - 1) / 2, (5 - t) / 5, *text[8:]]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hard, budget", [(False, 1e6), (True, 20.0)])
def test_nothing_depends_on_a_later_chunk(tiny, policy, hard, budget):
    """But for the features that look ahead, which the policy does not see."""
    known = lambda steps: steps._replace(features_U=steps.features_U[:, : -len(AHEAD)])
    rule = rl.make_rule(rl.sample, policy, hard=hard)
    before = read(tiny, rule, budget=budget)
    assert before.features_U.shape == (CHUNKS, U) and np.isfinite(before.features_U).all()
    for s in range(CHUNKS):
        changed = tiny.tokens.copy()
        changed[s * CHUNK + 1 : (s + 1) * CHUNK + 1] += 7
        after = read(tiny, rule, changed % MODEL.vocab, budget)
        for name, value in known(before)._asdict().items():
            np.testing.assert_array_equal(value[:s], getattr(known(after), name)[:s], err_msg=name)
        assert before.loss[s] != after.loss[s]


def test_features_of_real_code_are_finite_and_none_is_constant_or_another():
    """Of the standard library, read by the shipped model that learns from half of the chunks."""
    C, T, folder = 64, 12, data.ASSETS / "tiny"
    repos = data.load_repositories(data.Source("stdlib"), (), None, 0, Counter())
    names = ("json", "email", "asyncio", "textwrap", "argparse")
    texts = ["".join(file.text for file in repos[name])[:10_000] for name in names]
    (model, params), tokenizer = lm.load_model(folder), data.load_tokenizer(folder)
    fast, slow = lm.Fast((6, 7), 256), lm.nest(lm.load_state(folder / "ttt.safetensors")[0])
    spec, weights = lm.Spec(model, fast, C), lm.split_weights(fast, params, slow)
    classes, rows = rl.token_classes(data.token_texts(tokenizer)), []
    for i, tokens in enumerate(text[: T * C + 1] for text in data.encode(tokenizer, texts)):
        document = rl.Document(make_windows(spec, weights, tokens), rl.text_features(tokens, C, classes))
        rule = follow(rl.init_policy(jax.random.key(1)), *np.random.RandomState(i).randint(0, 2, T))
        rows.append(run_episode(spec, weights, env(3 * T), document, rule, jax.random.key(i)).features_U)
    x, pairs = np.concatenate(rows), itertools.combinations(range(U), 2)
    alike = np.abs(np.corrcoef(x.T))
    assert np.isfinite(x).all() and [rl.FEATURES[i] for i in range(U) if x[:, i].std() < 1e-4] == []
    assert [(rl.FEATURES[i], rl.FEATURES[j]) for i, j in pairs if not alike[i, j] < 0.98] == []


def test_a_policy_normalises_its_features_and_sees_those_of_its_groups_alone():
    policy = rl.init_policy(jax.random.key(0), ("code", "ahead"))
    slopes = jax.jacobian(lambda x: rl.apply_policy(policy, x))(jnp.linspace(-0.5, 0.5, U))
    for slope in jax.tree.leaves(slopes):
        seen = np.abs(slope).reshape(-1, U).sum(0) > 0
        np.testing.assert_array_equal(seen, [name in CODE + AHEAD for name in rl.FEATURES])
    assert rl.looks_ahead(policy) and not rl.looks_ahead(rl.init_policy(jax.random.key(0)))
    norm, batches = policy.norm, [np.random.RandomState(n).normal(n, 1 + n, (n, U)) for n in (3, 50, 1, 7)]
    for batch in batches:
        norm = rl.update_normaliser(norm, batch.astype(np.float32))
    x, found = np.concatenate(batches), [norm.count, *norm.mean_U, *norm.var_U]
    close(found, [61, *x.mean(0), *x.var(0)])
    plain = rl.apply_policy(policy, (x - x.mean(0)) / x.std(0))
    jax.tree.map(close, rl.apply_policy(policy._replace(norm=norm), x), plain)


# --- 2. Rules and the budget ------------------------------------------------------------------------
@jax.jit
def spend(limits: rl.Env, rule: rl.Rule, signals_TU, key):
    """A document's decisions without the model -> (actions, log-probabilities, heads, masks)."""

    def step(counts_A, inputs):
        t, signals_U = inputs
        heads = rl.apply_policy(rule.policy, signals_U[:U])
        chunk, memory = rl.Chunk(None, None, t, len(signals_TU)), rl.Memory(None, counts_A, 0.0, 0.0)
        draw = jax.random.fold_in(key, t)
        action, log_prob, mask = rl.choose(rule, signals_U, heads, chunk, memory, limits, draw)
        return counts_A.at[action].add(1), (action, log_prob, heads, mask)

    return jax.lax.scan(step, jnp.zeros(4), (jnp.arange(len(signals_TU)), signals_TU))[1]


signals = lambda seed: np.random.RandomState(seed).standard_normal((6, len(rl.SIGNALS))).astype(np.float32)
KINDS = {"follow": rl.follow, "gate": rl.gate, "online": rl.gate, "sample": rl.sample, "price": rl.price}
plans = st.lists(st.integers(0, 3), min_size=6, max_size=6)
prices = st.tuples(*[st.floats(0.05, 4)] * 3).map(lambda rises: np.asarray([1.0, *(1 + np.cumsum(rises))]))
lows, seeds, scored = st.integers(0, 2), st.integers(0, 99), st.sampled_from(["gate", "online", "price"])


def run(rule, budget, costs=NOMINAL, seed=0):
    return jax.tree.map(np.asarray, spend(env(budget, costs), rule, signals(seed), jax.random.key(seed)))


def rule_of(kind, policy, low=0, plan=(1,) * 6, hard=True, scores=rl.QUANTILES) -> rl.Rule:
    """A rule of each kind, with 33 validation scores, so that quantiles are these themselves."""
    fields = {"scores_Q": scores, "signal": PLACE["inner_loss"], "drift": 0.2 * (kind == "online")}
    return rl.make_rule(KINDS[kind], policy, plan_T=plan, low=low, high=low + 1, hard=hard, **fields)


@given(plans, st.one_of(st.integers(6, 60), st.none()))
def test_a_plan_is_followed_or_becomes_the_largest_that_is_allowed(plan, budget):
    left = budget = budget or NOMINAL[plan].sum()
    rule = partial(rule_of, "follow", rl.init_policy(jax.random.key(0)), plan=plan)
    actions, soft = run(rule(), budget)[0], run(rule(hard=False), budget)[0]
    for t, action in enumerate(plan):
        expected = max(a for a in range(action + 1) if a == 0 or left - NOMINAL[a] >= 5 - t)
        assert (actions[t], soft[t]) == (expected, action)
        left -= NOMINAL[expected]
    assert left >= 0 and (actions.tolist() == plan or budget < NOMINAL[plan].sum())


@given(scored, st.floats(0.05, 1.1), prices, lows, seeds, st.sampled_from([0, 0, 1e6]))
def test_gates_and_prices_act_where_the_score_exceeds_its_quantile(kind, share, costs, low, seed, more):
    """That of the share of the chunks left that the budget left can pay for; the online gate's is that of all
    of both, and moves with what was spent above the even pace. With enough left all is learned from."""
    policy = rl.init_policy(jax.random.key(seed))
    policy.net["actor"]["weight"] = 100 * policy.net["actor"]["weight"]
    scores = more + np.sort(np.random.RandomState(seed).randn(33))
    rule = rule_of(kind, policy, low, scores=scores)
    budget = 6 * (costs[low] + share * (costs[low + 1] - costs[low]))
    actions, _, heads, masks = run(rule, budget, costs, seed)
    assert costs[actions].sum() <= budget * (1 + 1e-5)
    score_T, spent, even = signals(seed)[:, PLACE["inner_loss"]], 0.0, budget / 6
    score_T = np.diff(heads.logits_A)[:, low] if kind == "price" else score_T
    for t, score in enumerate(score_T):
        left = even if kind == "online" else (budget - spent) / (6 - t)
        share = (left - costs[low]) / (costs[low + 1] - costs[low]) * (1 if kind == "online" else rl.PACE)
        threshold = np.quantile(rule.scores_Q, np.clip(1 - share, 0, 1))
        threshold += rule.drift * (spent - t * even)
        wanted = low + 1 if score > threshold or share > 0.999 else low
        allowed = spent + costs + (5 - t) * costs[low] <= budget * (1 + 1e-6)
        np.testing.assert_array_equal(masks[t], allowed | (np.arange(4) == 0))
        assert actions[t] == max(a for a in range(wanted + 1) if masks[t][a])
        spent += costs[actions[t]]
    assert budget < 6 * costs[low + 1] * (1 + 1e-6) or set(actions) == {low + 1}
    assert spend._cache_size() == 1  # one program runs all rules


def test_a_plan_for_fewer_chunks_is_stretched(policy):
    assert run(follow(policy, 1, 0, 2), 99)[0].tolist() == [1, 1, 0, 0, 2, 2]


@pytest.mark.parametrize("hard", [True, False])
def test_actions_are_sampled_with_the_policys_probabilities(policy, hard):
    heads, memory = rl.Heads(jnp.float32([0, 1, -1, 2]), 0.0, 0.0), rl.Memory(None, jnp.zeros(4), 0.0, 0.0)
    limits, chunk = jax.tree.map(jnp.asarray, env(16)), rl.Chunk(None, None, 0, 6)  # too little for UPDATE_4
    rule = rule_of("sample", policy, hard=hard)
    one = lambda key: rl.choose(rule, jnp.zeros(36), heads, chunk, memory, limits, key)
    actions, log_probs, masks = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
    p = np.append(softmax([0, 1, -1]), 0) if hard else softmax([0, 1, -1, 2])
    np.testing.assert_allclose(np.bincount(actions, minlength=4) / 4000, p, atol=0.03)
    np.testing.assert_allclose(np.exp(log_probs), p[actions], rtol=1e-5)
    np.testing.assert_array_equal(masks, np.broadcast_to(p > 0, (4000, 4)))


@pytest.mark.parametrize("budget, low", [(1, 0), (2.9, 0), (3.1, 1), (6, 1), (7, 2), (12, 2), (15, 2)])
def test_calibration_takes_quantiles_of_scores_and_the_actions_around_the_budget(policy, budget, low):
    x = np.random.RandomState(0).standard_normal((4, 50, len(rl.SIGNALS))).astype(np.float32)
    known = rl.calibrate(policy, rl.Step(x[..., :U], *[None] * 8, x[..., U:]))
    scores = {"policy": np.diff(rl.apply_policy(policy, x[..., :U]).logits_A)[..., low]}
    scores |= {name: x[..., PLACE[signal]] for name, signal in rl.GATES.items()}
    for name, values in scores.items():
        rule = rl.calibrated_rule(known, name, env(50 * budget), 50)
        assert (rl.RULES[rule.kind], rule.low) == (rl.price if name == "policy" else rl.gate, low)
        assert rule.high == low + 1 and (name == "policy" or rule.signal == PLACE[rl.GATES[name]])
        close(rule.scores_Q, np.quantile(values, rl.QUANTILES))
        close(rule.drift, rl.DRIFT * np.std(rule.scores_Q) / 2 if name == "online_gate" else 0)


@given(st.integers(2, 40), st.floats(0, 1), prices, seeds)
def test_schedules_fit_the_budget_and_waste_less_than_one_update(chunks, share, costs, seed):
    budget = chunks * (1 + (costs[-1] - 1) * share)
    for plan in rl.plan_schedules(costs, budget, chunks, seed).values():
        spent, low = costs[plan].sum(), plan.min()
        assert plan.shape == (chunks,) and np.ptp(plan) <= 1 and spent <= budget * (1 + 1e-5)
        assert low == 3 or spent + costs[low + 1] - costs[low] > budget * (1 - 1e-5)
    plans, other = (rl.plan_schedules(NOMINAL, 48, 24, seed + i) for i in range(2))
    assert plans["every_n"].tolist() == [1, 0] * 12 and plans["front_loaded"].tolist() == [1] * 12 + [0] * 12
    assert len({tuple(plan) for plan in (*plans.values(), other["random"])}) == len(plans) + 1


@given(hnp.arrays(float, 5, elements=st.floats(0.01, 1), unique=True), st.floats(5, 60))
def test_the_oracles_plan_is_the_best_of_its_two_actions_and_near_the_best_of_all(worth_T, budget):
    """Where worths add up, and each further step is worth half of the one before."""
    plan, (action, _) = rl.plan_oracle(NOMINAL, budget, worth_T), rl.affordable_updates(NOMINAL, budget, 5)
    sequences = np.asarray(list(itertools.product(range(4), repeat=5)))
    spent, gain = NOMINAL[sequences].sum(1), (worth_T * np.asarray([0, 1, 1.5, 1.75])[sequences]).sum(1)
    within = spent <= budget * (1 + 1e-6)
    two = within & np.isin(sequences, [action - 1, action]).all(1)
    own = gain[within & (sequences == plan).all(1)].item()
    assert own >= gain[two].max() - 1e-9 and own >= gain[within].max() / 1.75


# --- 3. The episode and its credits -----------------------------------------------------------------
predict, features = jax.jit(lm.predict, static_argnums=0), jax.jit(rl.features)
loss_of = lambda w, spec, weights, window: lm.predict(spec, weights, w, window).loss
gradient = jax.jit(jax.grad(loss_of), static_argnums=1)
PLAN = (1, 3, 2, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget, hard", [(13, True), (5, False)])
def test_an_episode_equals_a_loop_that_predicts_decides_and_learns(tiny, policy, kind, budget, hard):
    rule, key = rule_of(kind, policy, plan=PLAN, hard=hard), jax.random.key(7)
    steps, blind = (read(tiny, rule, budget=budget, seed=7, probe=probe) for probe in (True, False))
    text_TU, limits = rl.text_features(tiny.tokens, CHUNK, CLASSES), jax.tree.map(jnp.asarray, env(budget))
    memory = rl.init_memory(tiny.spec.fast, tiny.weights.slow)
    for t in range(CHUNKS):
        chunk = rl.Chunk(window_of(tiny, t), text_TU[t], t, CHUNKS)
        reading = predict(tiny.spec, tiny.weights, memory.state.w, chunk.window)
        x_U = features(reading, chunk, memory, limits)
        heads, own = rl.apply_policy(policy, x_U), jax.random.fold_in(key, t)
        slope = jax.tree.leaves(gradient(memory.state.w, tiny.spec, tiny.weights, chunk.window))
        probed = jnp.stack([jnp.sqrt(sum((g**2).sum() for g in slope)), reading.loss])
        signals = jnp.append(x_U, probed)
        action, log_prob, mask = rl.choose(rule, signals, heads, chunk, memory, limits, own)
        values = action, log_prob, *heads[1:], reading.loss, NOMINAL[action], 0, probed
        jax.tree.map(close, jax.tree.map(lambda x, t=t: x[t], steps), rl.Step(x_U, mask, *values))
        state = learn(tiny.spec, tiny.weights, memory.state, chunk.window, action)
        mix = lambda old, new, t=t: new if t == 0 else 0.8 * old + 0.2 * new
        averages = mix(memory.loss_average, reading.loss), mix(memory.cost_average, NOMINAL[action])
        memory = rl.Memory(state, memory.counts_A.at[action].add(1), *averages)
    assert not np.any(blind.probed) and (steps.cost.sum() <= budget or not hard)


def test_an_update_is_credited_with_what_it_alone_gave(tiny, policy):
    """And sparse credits, every third chunk's times 3, with the same on average."""
    every, phases, states = read(tiny, follow(policy, *PLAN), credit=1).credit_T, {}, []
    state = lm.init_state(tiny.spec.fast, tiny.weights.slow)
    for t, action in enumerate(PLAN):
        states.append(state)
        state = learn(tiny.spec, tiny.weights, state, window_of(tiny, t), action)
    loss = lambda i, t: predict(tiny.spec, tiny.weights, states[i].w, window_of(tiny, t)).loss
    for t, u in itertools.product(range(CHUNKS), repeat=2):
        close(every[u, t], loss(t, u) - loss(t + 1, u) if t < u else 0)
    for seed in range(20):
        sparse = read(tiny, follow(policy, *PLAN), seed=seed, credit=3).credit_T
        phases[tuple(np.flatnonzero(np.any(sparse, 1)))] = sparse
    assert phases.keys() == {(1, 4), (2,), (3,)}  # which ones, chance decides; none stands before chunk 0
    close(np.mean(list(phases.values()), 0), every)


# --- 4. Advantages and the multiplier ---------------------------------------------------------------
gae, pid_update = jax.jit(rl.gae), jax.jit(rl.pid_update)
series, shares = hnp.arrays(np.float32, 7, elements=st.floats(-10, 10, width=32)), st.floats(0, 1, width=32)


@given(series, series, shares, shares)
def test_gae_equals_a_loop(reward, value, gamma, lam):
    v = np.append(value, 0.0)
    errors = [reward[t] + gamma * v[t + 1] - v[t] for t in range(7)]
    expected = [sum((gamma * lam) ** (u - t) * errors[u] for u in range(t, 7)) for t in range(7)]
    close(gae(reward, value, gamma, lam), expected)


def multipliers(gains: rl.PidGains, costs, limit) -> list[float]:
    """After each of these costs, if it had always been 2; checks that all stays within bounds."""
    pid, found = rl.Pid(0.0, 0.0, np.full(gains.delay, 2, np.float32), 0.0), []
    for cost in costs:
        pid = pid_update(gains, pid, cost, limit)
        assert 0 <= pid.multiplier <= gains.max and 0 <= pid.integral <= gains.integral_max
        found.append(float(pid.multiplier))
    return found


def test_pid_equals_a_series_worked_out_by_hand():
    """Costs 4, 6, 2, 0, 0, 8 at limit 2: smoothed they are 3, 4.5, 3.25, 1.625, 0.8125, 4.40625, from 2."""
    gains = rl.PidGains(kp=0.5, ki=0.1, kd=0.2, alpha_p=0.5, alpha_d=0.5, delay=2)
    integral = np.asarray([0.2, 0.6, 0.6, 0.4, 0.2, 0.8])
    error = np.asarray([1, 2.5, 1.25, -0.375, -1.1875, 2.40625])  # smoothed
    rise = np.asarray([3 - 2, 4.5 - 2, 3.25 - 3, 0, 0, 4.40625 - 1.625])  # over two updates
    close(multipliers(gains, [4, 6, 2, 0, 0, 8], 2), np.maximum(0.5 * error + integral + 0.2 * rise, 0))
    multipliers(rl.PidGains(integral_max=0.5, max=2.0), np.random.RandomState(0).exponential(9, 99), 8)


# --- 5. PPO -----------------------------------------------------------------------------------------
ppo_gradient = jax.jit(jax.grad(rl.ppo_loss, has_aux=True), static_argnums=1)
PPO = rl.Ppo(epochs=2, minibatches=4, learning_rate=3e-3)
fresh = lambda limit: rl.init_trainer(jax.random.key(0), rl.Ppo(), env(limit * CHUNKS), CHUNKS)


def random_steps(N=3, T=4, seed=0, costs=NOMINAL):
    """Steps (N, T) and their rewards, with some actions not allowed."""
    rng = np.random.RandomState(seed)
    normal = lambda *shape: rng.standard_normal((N, T, *shape)).astype(np.float32)
    mask = (rng.rand(N, T, 4) < 0.7) | (np.arange(4) == 0)
    action = np.asarray([[rng.choice(np.flatnonzero(row)) for row in rows] for rows in mask])
    values = -1 + 0.4 * normal(), normal(), normal(), normal(), costs[action]
    return rl.Step(normal(U), mask, action, *values, np.zeros((N, T)), normal(2)), normal()


def random_batch(size=12, seed=0) -> rl.Batch:
    steps, reward = random_steps(1, size, seed)
    return rl.Batch(*jax.tree.map(lambda x: x[0], (steps, reward, reward[:, ::-1], steps.loss)))


def test_ppo_loss_equals_a_loop(policy):
    ppo, batch = rl.Ppo(clip=0.3, value_weight=0.7, entropy_weight=0.05), random_batch(30)
    loss, entropy = rl.ppo_loss(policy.net, ppo, policy.norm, batch)
    steps, heads, terms = batch.steps, rl.apply_policy(policy, batch.steps.features_U), []
    for i, (mask, action) in enumerate(zip(steps.mask_A, steps.action, strict=True)):
        p = softmax(np.where(mask, heads.logits_A[i], -np.inf))
        ratio, advantage = p[action] / np.exp(steps.log_prob[i]), batch.advantage[i]
        surrogate = min(ratio * advantage, np.clip(ratio, 0.7, 1.3) * advantage)
        error = (heads.value[i] - batch.value_target[i]) ** 2
        error += (heads.cost_value[i] - batch.cost_target[i]) ** 2
        terms.append((surrogate, error, -(p[mask] * np.log(p[mask] + 1e-300)).sum()))
    surrogate, error, expected = np.mean(terms, 0)
    close([entropy, loss], [expected, -surrogate + 0.7 * error - 0.05 * expected])


def test_each_epoch_takes_each_row_once_in_an_order_of_its_own():
    ppo, batch, trainer, key = rl.Ppo(3, 3), random_batch(13), fresh(2.0), jax.random.key(5)
    improved, _ = jax.jit(rl.improve, static_argnums=0)(ppo, trainer, batch, key)
    orders = np.stack([jax.random.permutation(k, 13)[:12] for k in jax.random.split(key, 3)])
    net, state = trainer.policy.net, trainer.optimizer
    for rows in orders.reshape(9, 4):
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        gradient, _ = ppo_gradient(net, ppo, trainer.policy.norm, part)
        updates, state = rl.optimizer(ppo).update(gradient, state)
        net = optax.apply_updates(net, updates)
    assert np.any(orders[0] != orders[1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), improved.policy.net, net)


@pytest.mark.parametrize("multiplier", [0.0, 0.7, 9.0])
def test_the_advantage_is_reward_minus_priced_cost_of_each_document_alone(multiplier):
    """(A_R - lambda A_C) / (1 + lambda): A_R standardised, A_C centred; costs count from the limit."""
    ppo, (steps, reward), limit = rl.Ppo(gamma=0.9, gae_lambda=0.8), random_steps(), 2.5
    batch = jax.jit(rl.make_batch, static_argnums=0)(ppo, steps, reward, limit, multiplier)
    estimate = lambda rewards, values: np.stack([gae(r, v, 0.9, 0.8) for r, v in zip(rewards, values)])
    gain, cost = estimate(reward, steps.value), estimate(steps.cost - limit, steps.cost_value)
    standard = (gain - gain.mean()) / gain.std()
    close(batch.advantage, ((standard - multiplier * (cost - cost.mean())) / (1 + multiplier)).ravel())
    close(batch.value_target, (gain + steps.value).ravel())
    close(batch.cost_target, (cost + steps.cost_value).ravel())


# --- 6. Training ------------------------------------------------------------------------------------
def test_training_is_the_same_in_every_currency():
    """With costs 1, 1.235, ... for 1, 3, ... the multiplier and the policy's steps are the same."""
    found = []
    for costs in (NOMINAL, np.float32(1 + (NOMINAL - 1) * 0.1175)):
        own, (steps, noise) = env(24 * (costs[0] + costs[1]) / 2, costs), random_steps(8, 24, costs=costs)
        trainer = rl.init_trainer(jax.random.key(0), PPO, own, 24)
        for _ in range(3):
            trainer, _ = rl.train_iteration(PPO, own, steps, steps.action + noise, trainer, jax.random.key(1))
        found.append((trainer.pid.multiplier, jax.tree.leaves(trainer.policy.net)))
    assert found[0][0] > 1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-4), *found)


@given(st.floats(1.01, 12), prices)
def test_the_first_policy_starts_on_the_budget(limit, costs):
    p = softmax(rl.logits_on_budget(costs, limit))
    np.testing.assert_allclose(p @ costs, min(limit, np.mean(costs)), rtol=1e-6)
    start = rl.init_trainer(jax.random.key(0), rl.Ppo(), env(9 * limit, costs), 9).policy.net["actor"]["bias"]
    close(softmax(start), p)
    assert (np.diff(p) <= 1e-9).all()  # dearer actions are rarer


def test_a_taught_policy_ranks_actions_by_what_they_give():
    """Each action's reward is a feature times the action's weight, with noise; a SKIP has none."""
    start, weight = fresh(4.0), np.asarray([0, 1, 1.5, 2])
    steps, noise = random_steps(60, 24)
    reward = weight[steps.action] * steps.features_U[..., 5] + 0.1 * (steps.action > 0) * noise
    taught, error = rl.teach(PPO._replace(teach_steps=1000), steps, reward, start, jax.random.key(1))
    x = np.random.RandomState(1).standard_normal((500, U)).astype(np.float32)
    logits = rl.apply_policy(taught.policy, x).logits_A - start.policy.net["actor"]["bias"]
    given = np.asarray(logits - logits[:, :1])
    assert 0 < error < 0.3 and all(np.corrcoef(given[:, a], x[:, 5])[0, 1] > 0.8 for a in (1, 2, 3))
    assert given[:, 1].std() < given[:, 2].std() < given[:, 3].std() and np.abs(given.mean(0)).max() < 0.3
    unit = np.sqrt((reward**2).sum() / (steps.action > 0).sum())  # what logits count in
    assert given[:, 2].std() == pytest.approx(1.5 / unit, rel=0.2)


def roll(tiny, policy, limit, key):
    """A rollout of four documents, two of them twice."""
    tokens = np.stack([tiny.tokens, tiny.tokens[::-1]] * 2)
    documents = tokens, np.stack([rl.text_features(x, CHUNK, CLASSES) for x in tokens])
    return rl.rollout(tiny.spec, tiny.weights, env(limit * CHUNKS), documents, policy, key, credit=1)


def test_a_rollouts_rewards_add_up_to_the_gain_over_never_learning(tiny, policy):
    steps, reward_NT = roll(tiny, policy, 6.0, jax.random.key(3))
    for n, tokens in enumerate([tiny.tokens, tiny.tokens[::-1]] * 2):
        again = read(tiny, follow(policy, *np.asarray(steps.action[n])), tokens, credit=1)
        never = read(tiny, follow(policy, 0), tokens)
        close(reward_NT[n], again.credit_T.sum(0))
        close(reward_NT[n].sum(), (never.loss - steps.loss[n]).sum())
    assert np.any(reward_NT) and not np.any(reward_NT[np.asarray(steps.action) == 0])


def test_the_multiplier_makes_the_policy_cheaper_and_is_zero_below_the_limit(tiny):
    cost = {}
    for price, limit in ((0.0, 12.5), (10.0, 1.0)):
        trainer, own = fresh(5.5), env(limit * CHUNKS)
        for i in range(25):
            trainer = trainer._replace(pid=trainer.pid._replace(integral=jnp.float32(price)))
            steps, reward_NT = roll(tiny, trainer.policy, limit, jax.random.key(i))
            trainer, figures = rl.train_iteration(PPO, own, steps, reward_NT, trainer, jax.random.key(i))
            assert (figures["lambda"] > 0) == (price > 0)
        rates = [figures[f"rate_{name}"] for name in rl.ACTIONS]
        close([np.dot(rates, NOMINAL), figures["limit"]], [figures["cost"], limit])
        close([trainer.iteration, trainer.policy.norm.count], [25, 25 * 4 * CHUNKS])
        cost[price] = float(figures["cost"])
    assert cost[10.0] < 2 and cost[10.0] < cost[0.0] - 1, cost
