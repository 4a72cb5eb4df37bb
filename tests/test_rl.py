"""rl.py: features, budget, policy, returns, the multiplier and PPO against plain loops."""

import math
import zlib
from collections import Counter
from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CHUNK, CHUNKS, LIGHT, MODEL, Tiny, document_loss, make, run_episode, windows
from hypothesis import given
from hypothesis import strategies as st

import data
import model as lm
import ponder
import rl

NOMINAL = np.asarray([1, 3, 6, 12], np.float32)
# Tokens that contain no code, and some of each kind.
TEXTS = ["\n", "    ", "def", "7", "==", "'", "#", "(", "é", "x1", "\n   ", '"""'] + [f"w{i}" for i in range(49)]
CLASSES = rl.token_classes(TEXTS)
U = len(rl.FEATURES)


def env(budget: float, costs=NOMINAL) -> rl.Env:
    return rl.Env(jnp.asarray(costs), jnp.float32(budget))


def document(tiny, tokens) -> rl.Document:
    text_TU = rl.text_features(tokens, CHUNK, CLASSES)
    return rl.Document(windows(tiny.model, tiny.fast, tiny.lower, tiny.upper, tokens, CHUNK), text_TU)


def read(tiny, tokens, rule, budget=1e6, seed=0, **options) -> rl.Step:
    args = (tiny.model, tiny.fast, tiny.upper, tiny.slow, env(budget), document(tiny, tokens), rule, jax.random.key(seed))
    return jax.tree.map(np.asarray, run_episode(*args, **options))


def constant(threshold: float) -> rl.Table:
    """The table of a threshold that is the same whatever is left."""
    return rl.Table(np.linspace(0, 1e9, rl.POINTS), np.full(rl.POINTS, threshold))


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return make(MODEL, LIGHT)


@pytest.fixture(scope="module")
def policy() -> rl.Policy:
    """A random policy that isn't near uniform, and that would mind what is ahead if it were not hidden."""
    net, hidden = rl.init_policy(jax.random.key(0)).net, rl.init_trainer(jax.random.key(0), rl.Ppo(), env(20), 6).policy.norm
    net |= {"actor": jax.tree.map(lambda x: 200 * x, net["actor"])}
    net |= {"hidden_1": net["hidden_1"] | {"weight": net["hidden_1"]["weight"].at[-2:].set(0.3)}}
    return rl.Policy(net, hidden)


# --- 1. Features --------------------------------------------------------------------------------


def test_there_are_32_features_in_six_groups_and_two_of_what_is_ahead():
    assert [len(g) for g in rl.GROUPS.values()] == [4, 6, 4, 8, 4, 6, 2]
    assert len(set(rl.FEATURES)) == U == 34 and list(rl.FEATURES) == [name for group in rl.GROUPS.values() for name in group]


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("\n", {"newline"}),
        ("    ", {"indentation"}),
        (" ", set()),
        ("\n    ", {"newline", "indentation"}),
        (" def", {"identifier"}),
        ("x_1", {"identifier", "digit"}),
        ("42", {"digit"}),
        ("==", {"operator"}),
        ("'", {"quote"}),
        ('"""', {"quote", "comment"}),
        ("#", {"comment"}),
        ("//", {"operator", "comment"}),
        ("):", {"bracket", "operator"}),
        ("[{", {"bracket"}),
        ("", set()),
        ("é", set()),
    ],
)
def test_a_token_has_these_kinds_of_code(text, kinds):
    (row,) = rl.token_classes([text])
    assert {name for name, bit in zip(rl.CODE, row, strict=True) if bit} == kinds


@given(hnp.arrays(np.int32, 4 * 9 + 1, elements=st.integers(0, 11)))
def test_text_features_equal_a_loop(tokens):
    classes = CLASSES[:12]
    table = rl.text_features(tokens, 9, classes)
    for t in range(4):
        x, before = [int(i) for i in tokens[1 + 9 * t : 10 + 9 * t]], [int(i) for i in tokens[1 : 1 + 9 * t]]
        expected = {name: sum(classes[i][c] for i in x) / 9 for c, name in enumerate(rl.CODE)}
        expected["distinct"] = len(set(x)) / 9
        expected["new_tokens"] = sum(i not in before for i in x) / 9
        for name, n in (("seen_bigrams", 2), ("seen_6grams", 6)):  # within chunks: none spans two
            old = [before[9 * s + j : 9 * s + j + n] for s in range(t) for j in range(9 - n + 1)]
            expected[name] = sum(x[j : j + n] in old for j in range(9 - n + 1)) / (9 - n + 1)
        expected["unigram_surprisal"] = sum(math.log((len(before) + 12) / (before.count(i) + 1)) for i in x) / 9
        raw = b"".join(i.to_bytes(4, "little") for i in x)
        expected["compression"] = len(zlib.compress(raw)) / 36
        grams = [[tuple(tokens[1 + 9 * s + j :][:3]) for j in range(7)] for s in range(4)]
        earlier = {gram for old in grams[:t] for gram in old}
        again = {gram: sum(gram in later for later in grams[t + 1 :]) for gram in grams[t]}
        expected["comes_again"] = math.log1p(sum(again.values()))
        expected["new_comes_again"] = math.log1p(sum(n for gram, n in again.items() if gram not in earlier))
        np.testing.assert_allclose(table[t], [expected[name] for name in rl.CODE + rl.SEQUENCE + rl.AHEAD], rtol=1e-5, atol=1e-6)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


@pytest.mark.parametrize("start, t", [(0, 0), (16, 3)])
def test_features_of_a_reading_equal_a_loop(start, t):
    """16 tokens, so that every row is a probe."""
    C, rng = 16, np.random.RandomState(start)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x_SD, top, outputs, logits = normal(2 * C, 6) + 1, normal(C, 6), normal(2, C, 6), normal(C, 9)
    query, key = normal(2, C, 3), normal(2, 2 * C, 3)
    losses, text = np.abs(normal(C)), np.arange(16, dtype=np.float32)
    reading = lm.Reading(losses, logits, top, None, outputs, query, key)
    memory = rl.Memory(None, np.float32([1, 2, 0, 0]), np.float32(0.4), np.float32(2.5))
    window = lm.Window(x_SD, np.zeros(C, np.int32), np.int32(start))
    values = rl.features(reading, window, text, memory, env(20), t, 5)
    got = dict(zip(rl.FEATURES, np.asarray(values), strict=True))

    rows = [softmax(row) for row in logits]
    expected = {"loss": losses.mean(), "loss_spread": losses.std()}
    expected["entropy"] = np.mean([-(p * np.log(p)).sum() for p in rows])
    expected["top_probability"] = np.mean([p.max() for p in rows])
    below = x_SD[start : start + C]
    for name, x in (("below", below), ("top", top)):
        expected[f"{name}_rms"] = np.log(np.sqrt((x**2).mean()))
        expected[f"{name}_spread"] = 1 - (x.mean(0) ** 2).sum() / np.mean([(row**2).sum() for row in x])
    expected["adapter_share"] = np.sqrt((outputs**2).mean() / (top**2).mean())
    now, before = below.mean(0), x_SD[:C].mean(0)
    expected["topic_shift"] = 0 if t == 0 else 1 - now @ before / np.sqrt(now @ now * (before @ before))
    entropy, on_context, on_first, distance = [], [], [], []
    for head in range(2):
        for i in range(C):
            p = softmax([query[head, i] @ key[head, j] / np.sqrt(3) for j in range(start + i + 1)])
            entropy.append(-(p * np.log(p)).sum() / np.log(2 * C))
            on_context.append(p[:start].sum())
            on_first.append(p[0])
            distance.append(sum(p[j] * (start + i - j) for j in range(start + i + 1)) / C)
    expected |= {"attention_entropy": np.mean(entropy), "attention_on_context": np.mean(on_context)}
    expected |= {"attention_on_first": np.mean(on_first), "attention_distance": np.mean(distance)}
    expected |= dict(zip(rl.CODE + rl.SEQUENCE + rl.AHEAD, text, strict=True))
    expected["loss_trend"] = 0 if t == 0 else losses.mean() - 0.4
    left = (5 - t) / 5
    expected |= {"recent_cost": 2.5, "budget_left": ((20 - 7) / (5 - t) - 1) / 2, "document_left": left}
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_nothing_depends_on_a_later_chunk(tiny, policy):
    """Features, actions, losses and values up to t are bit-identical when later tokens change, but for the features
    that look ahead, which the policy does not see."""
    known = lambda steps: steps._replace(features_U=steps.features_U[:, : -len(rl.AHEAD)])
    for hard, budget in ((False, 1e6), (True, 20.0)):
        rule = rl.make_rule(CHUNKS, policy, hard=hard)
        before = read(tiny, tiny.tokens, rule, budget)
        assert before.features_U.shape == (CHUNKS, U) and np.isfinite(before.features_U).all()
        for s in range(CHUNKS):
            changed = tiny.tokens.copy()
            changed[s * CHUNK + 1 : (s + 1) * CHUNK + 1] = (changed[s * CHUNK + 1 : (s + 1) * CHUNK + 1] + 7) % tiny.model.vocab
            after = read(tiny, changed, rule, budget)
            for name, value in known(before)._asdict().items():
                np.testing.assert_array_equal(value[:s], getattr(known(after), name)[:s], err_msg=name)
            assert before.loss[s] != after.loss[s] and np.any(before.features_U[s] != after.features_U[s])


def test_history_features_tell_what_was_done(tiny, policy):
    plan, costs = [1, 0, 3, 2, 0], [3, 1, 12, 6, 1]
    steps = read(tiny, tiny.tokens, rl.make_rule(CHUNKS, policy, plan=plan), budget=30)
    column = lambda name: steps.features_U[:, rl.FEATURES.index(name)]
    np.testing.assert_array_equal(steps.cost, costs)
    recent = [0, 3, 0.8 * 3 + 0.2 * 1, 0.8 * (0.8 * 3 + 0.2) + 0.2 * 12]
    np.testing.assert_allclose(column("recent_cost")[:4], recent, rtol=1e-5)
    np.testing.assert_allclose(column("budget_left"), [(x - 1) / 2 for x in (30 / 5, 27 / 4, 26 / 3, 14 / 2, 8 / 1)], rtol=1e-5)
    np.testing.assert_allclose(column("document_left"), [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-5)
    np.testing.assert_array_equal(column("loss"), steps.loss)
    average = steps.loss[0]
    for t in range(1, CHUNKS):
        np.testing.assert_allclose(column("loss_trend")[t], steps.loss[t] - average, atol=1e-5)
        average = 0.8 * average + 0.2 * steps.loss[t]


@pytest.fixture(scope="module")
def real_features() -> np.ndarray:
    """Features of chunks of the standard library, read by the shipped model that learns from half of them."""
    C, T, folder = 64, 12, ponder.ASSETS / "tiny"
    names = "json email textwrap argparse asyncio html logging"
    texts = dict.fromkeys(names.split(), "")
    for file in data.stdlib_source(Counter()):
        if file.repo in texts:
            texts[file.repo] = (texts[file.repo] + data.with_path(file))[:10_000]
    tokenizer = data.load_tokenizer(folder)
    classes = rl.token_classes(data.token_texts(tokenizer))
    (model, params), fast = lm.load_model(folder), lm.Fast((6, 7), 256)
    lower, upper = lm.split_blocks(params, fast.blocks[0])
    slow = ponder.load_state(folder / "ttt.safetensors", lm.init_slow(jax.random.key(0), model, fast))[0]
    uniform, rows = rl.init_policy(jax.random.key(1)), []
    for i, tokens in enumerate(data.encode(tokenizer, texts.values())):
        tokens = tokens[: T * C + 1]
        doc = rl.Document(windows(model, fast, lower, upper, tokens, C), rl.text_features(tokens, C, classes))
        rule = rl.make_rule(T, uniform, plan=np.random.RandomState(i).randint(0, 2, T), hard=False)
        rows.append(run_episode(model, fast, upper, slow, env(5.5 * T), doc, rule, jax.random.key(i)).features_U)
    return np.concatenate(rows)


def test_features_of_real_code_are_finite_and_none_is_constant(real_features):
    assert np.isfinite(real_features).all()
    assert [n for n, spread in zip(rl.FEATURES, real_features.std(0), strict=True) if spread < 1e-4] == []


def test_no_two_features_of_real_code_are_one(real_features):
    correlation = np.abs(np.corrcoef(real_features.T))
    pairs = [(rl.FEATURES[i], rl.FEATURES[j], correlation[i, j]) for i in range(U) for j in range(i)]
    assert [pair for pair in pairs if not pair[2] < 0.98] == []


@pytest.mark.parametrize("sizes", [(40,), (3, 50, 1, 7)])
def test_normaliser_has_the_mean_and_variance_of_all_batches(sizes):
    batches = [np.random.RandomState(i).normal(i, 1 + i, (n, 5)).astype(np.float32) for i, n in enumerate(sizes)]
    norm = rl.init_normaliser(5)
    for batch in batches:
        norm = rl.update_normaliser(norm, batch)
    everything = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(norm.count, len(everything), rtol=1e-3)
    np.testing.assert_allclose(norm.mean_U, everything.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(norm.var_U, everything.var(0), rtol=1e-3)


def test_dropped_features_are_not_seen(policy):
    dropped = rl.init_trainer(jax.random.key(0), rl.Ppo(), env(20), 6, ("code", "history")).policy
    unseen = np.asarray([name in rl.CODE + rl.HISTORY + rl.AHEAD for name in rl.FEATURES])
    norm = rl.update_normaliser(dropped.norm, np.random.RandomState(0).standard_normal((9, U)).astype(np.float32))
    np.testing.assert_array_equal(norm.keep_U, ~unseen)
    keep = lambda norm: jax.jacobian(lambda x: rl.apply_policy(rl.Policy(policy.net, norm), x))(jnp.linspace(-0.5, 0.5, U))
    for slopes in jax.tree.leaves(keep(norm)):
        moves = np.abs(np.asarray(slopes)).reshape(-1, U).sum(0) > 0
        np.testing.assert_array_equal(moves, ~unseen)
    assert all((np.asarray(x) != 0).all() for x in jax.tree.leaves(keep(norm._replace(keep_U=jnp.ones(U)))))


# --- 2. Choices and the budget ------------------------------------------------------------------


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


@jax.jit
def spend(costs_A, budget, rule, signals_TU, key):
    """A document's decisions without the model -> (actions, log_probs, heads, masks)."""
    limits, chunks = rl.Env(costs_A, budget), signals_TU.shape[0]

    def step(counts_A, inputs):
        t, signals_U = inputs
        heads = rl.apply_policy(rule.policy, signals_U[:U])
        mask = rl.may_take(rule, limits, counts_A, t, chunks)
        memory = rl.Memory(None, counts_A, 0.0, 0.0)
        action, log_prob = rl.choose(rule, signals_U, heads, mask, limits, memory, t, len(rule.plan_T), jax.random.fold_in(key, t))
        return counts_A.at[action].add(1), (action, log_prob, heads, mask)

    return jax.lax.scan(step, jnp.zeros(4), (jnp.arange(chunks), signals_TU))[1]


def signals(seed, scale=1.0):
    return scale * np.random.RandomState(seed).standard_normal((6, len(rl.SIGNALS))).astype(np.float32)


def run(costs, budget, rule, seed=0, scale=1.0):
    args = (np.asarray(costs, np.float32), np.float32(budget), rule, signals(seed, scale), jax.random.key(seed))
    return jax.tree.map(np.asarray, spend(*args))


plans = st.lists(st.integers(0, 3), min_size=6, max_size=6)
prices = st.tuples(*[st.floats(0.05, 4)] * 3).map(lambda rises: (1.0, *(1 + np.cumsum(rises))))  # rising from SKIP's 1


kinds = st.sampled_from(["plan", "gate", "online", "sampled", "priced"])


@given(st.floats(6, 80), prices, plans, kinds, st.integers(0, 3), st.floats(0, 3), st.integers(0, 99))
def test_the_budget_is_never_exceeded(budget, costs, plan, kind, action, pace, seed):
    policy = rl.init_policy(jax.random.key(0))
    gate = rl.gate_table(signals(seed, 0.5)[:, rl.SIGNALS.index("inner_loss")], costs[action] - 1)
    price = rl.price_table(rl.apply_policy(policy, signals(seed)[None, :, :U]).logits_A, costs)
    rule = {
        "plan": rl.make_rule(6, policy, plan=plan),
        "gate": rl.make_rule(6, policy, signal="inner_loss", table=gate, action=action, pace=pace),
        "online": rl.make_rule(6, policy, signal="inner_loss", table=gate, action=action, online=pace / 9),
        "sampled": rl.make_rule(6, policy),
        "priced": rl.make_rule(6, policy, table=price, pace=pace),
    }[kind]
    actions, *_ = run(costs, budget, rule, seed)
    assert np.asarray(costs)[actions].sum() <= budget * (1 + 1e-5)


@given(plans, prices)
def test_a_plan_that_the_budget_allows_is_followed(plan, costs):
    rule = rl.make_rule(6, rl.init_policy(jax.random.key(0)), plan=plan)
    actions, *_ = run(costs, np.asarray(costs, np.float32)[plan].sum(), rule)
    np.testing.assert_array_equal(actions, plan)


@given(plans, st.integers(6, 60))
def test_a_plan_beyond_the_budget_becomes_the_largest_allowed(plan, budget):
    rule = rl.make_rule(6, rl.init_policy(jax.random.key(0)), plan=plan)
    actions, *_ = run(NOMINAL, budget, rule)
    left, expected = budget, []
    for t, action in enumerate(plan):
        while action and left - NOMINAL[action] < 5 - t:
            action -= 1
        left -= NOMINAL[action]
        expected.append(action)
    np.testing.assert_array_equal(actions, expected)


def test_a_soft_rule_may_exceed_the_budget(policy):
    actions, *_ = run(NOMINAL, 6, rl.make_rule(6, policy, plan=3, hard=False))
    np.testing.assert_array_equal(actions, [3] * 6)


@pytest.mark.parametrize("signal", ["entropy", "gradient_norm", "inner_loss"])
def test_a_gate_acts_where_its_signal_exceeds_the_threshold(policy, signal):
    x = signals(4)[:, rl.SIGNALS.index(signal)]
    actions, *_ = run(NOMINAL, 100, rl.make_rule(6, policy, signal=signal, table=constant(0.1), action=2), seed=4)
    np.testing.assert_array_equal(actions, np.where(x > 0.1, 2, 0))
    assert 0 < actions.sum() < 12


samples = hnp.arrays(np.float32, st.integers(20, 80), elements=st.floats(-50, 50, width=32), unique=True)


@given(samples, st.floats(0.1, 11), st.floats(0, 1))
def test_a_gates_table_spends_what_it_says(values, extra, share):
    table = rl.gate_table(values, extra)
    assert (np.diff(table.spend_TQ) > 0).all() and (np.diff(table.threshold_TQ) <= 0).all()
    threshold = np.interp(share * extra, *(x[0] for x in table))
    # Between its points the table is linear and the values' distribution isn't.
    np.testing.assert_allclose(extra * (values > threshold).mean(), share * extra, atol=extra * (1 / len(values) + 1 / (rl.POINTS - 1)))


menus = st.sampled_from([(0, 1), (0, 3), (1, 2), (2, 3)])


@given(st.integers(0, 999), prices, st.floats(0, 1), st.integers(0, 4), menus)
def test_a_policys_table_spends_what_it_says_from_each_place_on(seed, costs, share, t, menu):
    logits, costs, (least, action) = np.random.RandomState(seed).standard_normal((60, 5, 4)), np.asarray(costs), menu
    logits *= 1 + np.arange(5)[:, None]  # places differ
    table = rl.price_table(logits, costs, least, action)
    assert (np.diff(table.spend_TQ) > 0).all() and (np.diff(table.threshold_TQ) <= 0).all()
    spends, thresholds = table.spend_TQ[t], table.threshold_TQ[t]
    np.testing.assert_allclose(spends[[0, -1]], costs[[least, action]] - 1, atol=1e-4)
    spend = spends[0] + share * (spends[-1] - spends[0])
    price = np.interp(spend, spends, thresholds)
    chosen = [max(range(least, action + 1), key=lambda a: row[a] - price * costs[a]) for row in logits[:, t:].reshape(-1, 4)]
    step = np.diff(spends).max() + (costs[3] - 1) / 60
    np.testing.assert_allclose(np.mean([costs[a] - 1 for a in chosen]), spend, atol=step)


@given(st.floats(1, 12), st.integers(0, 99), menus, st.sampled_from(["", "inner_loss"]), st.sampled_from([1.0, 3.0]))
def test_a_priced_policy_or_gate_takes_what_is_on_its_menu_while_it_can(budget, seed, menu, signal, pace):
    least, action = menu
    policy = rl.init_policy(jax.random.key(seed))
    table = rl.price_table(rl.apply_policy(policy, signals(seed)[None, :, :U]).logits_A, NOMINAL, least, action)
    if signal:
        share = rl.gate_table(signals(seed)[:, rl.SIGNALS.index(signal)], 1.0)
        table = share._replace(spend_TQ=NOMINAL[least] - 1 + share.spend_TQ * (NOMINAL[action] - NOMINAL[least]))
    rule = rl.make_rule(6, policy, signal=signal, table=table, pace=pace, least=least, action=action)
    actions, *_ = run(NOMINAL, 6 * budget, rule, seed)
    assert NOMINAL[actions].sum() <= 6 * budget * (1 + 1e-5) and actions.max() <= action
    if budget >= NOMINAL[least] + 0.01:
        assert actions.min() >= least


def test_a_priced_policy_spends_where_it_is_worth_most_and_has_the_whole_budget_spent_by_then():
    """Worth 4, 3, 2, 1, 0, -1 wherever the document is: half the budget goes to the first three."""
    policy = rl.init_policy(jax.random.key(1))
    logits = np.zeros((50, 6, 4)) + np.arange(4, -2, -1)[:, None] * (np.arange(4) == 1)
    table = rl.price_table(logits + 1e-3 * np.random.RandomState(0).standard_normal(logits.shape), rl.NOMINAL)
    heads = lambda t: rl.Heads(jnp.float32(logits[0, t]), 0.0, 0.0)
    limits, rule, counts, actions = env(12.0), rl.make_rule(6, policy, table=table, action=1), jnp.zeros(4), []
    for t in range(6):
        mask = rl.allowed(limits, counts, t, 6)
        action = int(
            rl.choose(
                rule, jnp.zeros(34), heads(t), mask, limits, rl.Memory(None, counts, 0.0, 0.0), t, len(rule.plan_T), jax.random.key(0)
            )[0]
        )
        counts = counts.at[action].add(1)
        actions.append(action)
    assert actions == [1, 1, 1, 0, 0, 0]


def test_with_enough_left_a_priced_policy_learns_everywhere_whatever_it_predicts():
    table = rl.price_table(np.random.RandomState(0).standard_normal((50, 6, 2)), rl.NOMINAL[:2])
    policy = rl.init_policy(jax.random.key(1))
    policy.net["actor"]["bias"] = jnp.asarray([99.0, 0.0, 0.0, 0.0])
    assert run(rl.NOMINAL, 18.0, rl.make_rule(6, policy, table=table, action=1))[0].tolist() == [1] * 6


def test_a_priced_policy_does_not_spend_on_more_than_it_wants():
    policy = rl.init_policy(jax.random.key(1))
    policy.net["actor"]["bias"] = jnp.asarray([0.0, 10.0, 0.0, 0.0])
    table = rl.price_table(np.asarray([[[0.0, 10.0, 0.0, 0.0]] * 6] * 50), rl.NOMINAL)
    for pace in (1.0, 1.7):
        assert run(rl.NOMINAL, 18.0, rl.make_rule(6, policy, table=table, pace=pace))[0].tolist() == [1] * 6


@jax.jit
def taken(rule, values_N, counts_A, t, budget):
    """Which values of the signal a gate acts on."""
    memory, limits = rl.Memory(None, counts_A, 0.0, 0.0), env(budget)
    heads = rl.Heads(jnp.zeros(4), 0.0, 0.0)
    one = lambda x: rl.choose(rule, jnp.full(34, x), heads, jnp.ones(4, bool), limits, memory, t, len(rule.plan_T), jax.random.key(0))[0]
    return jax.vmap(one)(values_N)


TABLE = rl.Table(np.linspace(0, 2, rl.POINTS), np.linspace(5, -5, rl.POINTS))  # 5 - 5 * spend
VALUES = np.linspace(-8, 8, 801).astype(np.float32)
spent_before = st.tuples(*[st.integers(0, 2)] * 4)


def assert_threshold(actions, threshold):
    above = VALUES - threshold
    clear = abs(above) > 0.01
    np.testing.assert_array_equal(actions[clear], np.where(above > 0, 2, 0)[clear])


@given(spent_before, st.floats(0.2, 3), st.floats(6, 60))
def test_a_gate_spends_what_is_left_for_each_chunk(counts, pace, budget):
    rule = rl.make_rule(12, rl.init_policy(jax.random.key(0)), signal="loss", table=TABLE, pace=pace, action=2)
    t = sum(counts)
    left = pace * ((budget - np.dot(counts, NOMINAL)) / (12 - t) - 1)
    more = np.asarray(taken(rule, VALUES, np.float32(counts), t, budget + 3))
    actions = np.asarray(taken(rule, VALUES, np.float32(counts), t, budget))
    if left < 1.999:
        assert_threshold(actions, 5 - 5 * max(left, 0))
    elif left > 2.001:  # more than the table's action can spend
        np.testing.assert_array_equal(actions, 2)
    assert (more >= actions).all()  # it falls when more is left


@given(spent_before, st.floats(0.01, 0.5))
def test_an_online_gates_threshold_drifts_with_what_was_spent(counts, online):
    rule = rl.make_rule(12, rl.init_policy(jax.random.key(0)), signal="loss", table=TABLE, online=online, action=2)
    t, budget = sum(counts), 24.0
    drift = online * (np.dot(counts, NOMINAL) - t * budget / 12)
    assert_threshold(np.asarray(taken(rule, VALUES, np.float32(counts), t, budget)), 0 + drift)


@pytest.mark.parametrize("budget", [6, 20, 100])
def test_log_prob_is_that_of_the_sampled_action(policy, budget):
    seen = set()
    for seed in range(8):
        actions, log_probs, heads, masks = run(NOMINAL, budget, rl.make_rule(6, policy), seed, scale=2)
        for action, log_prob, logits, mask in zip(actions, log_probs, heads.logits_A, masks, strict=True):
            assert mask[action] and mask[0]
            kept = log_softmax(logits[mask])
            np.testing.assert_allclose(log_prob, kept[mask[:action].sum()], atol=1e-4)
            seen.add(int(action))
    assert seen == ({0} if budget == 6 else {0, 1, 2, 3})


def test_actions_are_sampled_with_the_policys_probabilities(policy):
    heads = rl.Heads(jnp.asarray([0.0, 1.0, -1.0, 2.0]), 0.0, 0.0)
    mask = jnp.asarray([True, True, True, False])
    rule = rl.make_rule(6, policy)
    keys, memory = jax.random.split(jax.random.key(0), 4000), rl.Memory(None, jnp.zeros(4), 0.0, 0.0)
    actions, _ = jax.vmap(lambda key: rl.choose(rule, jnp.zeros(34), heads, mask, env(50), memory, 0, len(rule.plan_T), key))(keys)
    share = np.bincount(actions, minlength=4) / 4000
    np.testing.assert_allclose(share, [*softmax([0, 1, -1]), 0], atol=0.03)


@pytest.mark.parametrize("budget", [5, 13, 24])
def test_an_episode_keeps_the_budget_and_reports_its_choices(tiny, policy, budget):
    rules = [rl.make_rule(CHUNKS, policy, plan=2), rl.make_rule(CHUNKS, policy)]
    rules += [rl.make_rule(CHUNKS, policy, signal="loss", table=TABLE), rl.make_rule(CHUNKS, policy, table=TABLE)]
    for rule in rules:
        steps = read(tiny, tiny.tokens, rule, budget)
        np.testing.assert_array_equal(steps.cost, NOMINAL[steps.action])
        assert steps.cost.sum() <= budget
        heads = rl.apply_policy(policy, steps.features_U)
        np.testing.assert_allclose(steps.value, heads.value, atol=1e-4)
        np.testing.assert_allclose(steps.cost_value, heads.cost_value, atol=1e-4)
        for t, action in enumerate(steps.action):
            mask = steps.mask_A[t]
            kept = log_softmax(heads.logits_A[t][mask])
            np.testing.assert_allclose(steps.log_prob[t], kept[mask[:action].sum()], atol=1e-3)
    plan = read(tiny, tiny.tokens, rules[0], budget).action
    np.testing.assert_array_equal(plan, {5: [0] * 5, 13: [2, 1, 0, 0, 0], 24: [2, 2, 2, 1, 1]}[budget])


def test_an_episode_learns_what_its_actions_say(tiny, policy):
    """Losses are those of reading with the same actions, and skipping them all earns nothing."""
    loss = lambda plan: document_loss(tiny.model, tiny.fast, tiny.upper, tiny.slow, tiny.windows, np.asarray(plan))[1]
    for plan in ([1, 3, 2, 0, 1], [0] * 5):
        steps = read(tiny, tiny.tokens, rl.make_rule(CHUNKS, policy, plan=plan))
        np.testing.assert_allclose(steps.loss, loss(plan), atol=1e-4)
    np.testing.assert_allclose(rl.next_gains(loss([0] * 5), steps.loss), np.zeros(5), atol=1e-4)


# --- 3. Returns and the multiplier ----------------------------------------------------------------


def test_an_action_is_rewarded_with_the_gain_on_the_next_chunk():
    skip, loss = np.float32([9, 8, 7, 6]), np.float32([9, 6, 7.5, 2])
    np.testing.assert_array_equal(rl.next_gains(skip, loss), [2, -0.5, 4, 0])


def test_gates_see_the_inner_loss_and_its_gradient_when_asked(tiny, policy):
    rule = rl.make_rule(CHUNKS, policy, plan=[1, 0, 0, 0, 0])
    steps, blind = (read(tiny, tiny.tokens, rule, probe=probe) for probe in (True, False))
    assert not np.any(blind.probed)
    np.testing.assert_array_equal(steps.loss, blind.loss)
    np.testing.assert_allclose(steps.probed[:, 1], steps.loss, rtol=1e-6)  # next_token's own
    loss = lambda w: lm.predict(tiny.model, tiny.fast, tiny.upper, tiny.slow, w, jax.tree.map(lambda x: x[0], tiny.windows)).loss
    gradient = jax.jit(jax.grad(loss))(tiny.slow["start"])
    np.testing.assert_allclose(steps.probed[0, 0], np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient))), rtol=1e-4)


learn = jax.jit(lambda model, fast, *args: lm.read_chunk(model, fast, *args[:-1])[1](args[-1]), static_argnums=(0, 1))
predict = jax.jit(lm.predict, static_argnums=(0, 1))


def test_an_update_is_credited_with_what_it_alone_gave(tiny, policy):
    fixed, plan = (tiny.model, tiny.fast, tiny.upper, tiny.slow), [1, 3, 2, 0, 1]
    rule = rl.make_rule(CHUNKS, policy, plan=plan, hard=False)
    steps = read(tiny, tiny.tokens, rule, credit=1)
    window = lambda t: jax.tree.map(lambda x: x[t], tiny.windows)
    states = [lm.init_state(tiny.fast, tiny.slow)]
    for t, action in enumerate(plan):
        states.append(learn(*fixed, states[-1], window(t), action))
    loss = lambda i, t: float(predict(*fixed, states[i].weights, window(t)).loss)
    expected = [sum(loss(t, u) - loss(t + 1, u) for u in range(t + 1, CHUNKS)) for t in range(CHUNKS)]
    reward = np.asarray(rl.rewards(steps.credit_T))
    np.testing.assert_allclose(reward, expected, atol=2e-4)
    assert reward[3] == reward[4] == 0  # a SKIP, and the last action
    # They add up to the gain over never learning.
    np.testing.assert_allclose(reward.sum(), sum(loss(0, t) - loss(t, t) for t in range(CHUNKS)), atol=1e-3)


def test_sparse_credits_are_those_of_every_chunk_on_average(tiny, policy):
    """Every third chunk's loss is divided, times 3; which ones, chance decides."""
    rule = rl.make_rule(CHUNKS, policy, plan=[1, 3, 2, 0, 1], hard=False)
    every, phases = read(tiny, tiny.tokens, rule, credit=1).credit_T, {}
    for seed in range(20):
        sparse = read(tiny, tiny.tokens, rule, seed=seed, credit=3).credit_T
        phases[tuple(np.flatnonzero(np.any(sparse, 1)))] = sparse
    assert phases.keys() == {(1, 4), (2,), (3,)}  # chunk 0 has no update before it
    np.testing.assert_allclose(np.mean(list(phases.values()), 0), every, atol=1e-4)
    for divided, sparse in phases.items():
        np.testing.assert_allclose(sparse[list(divided)], 3 * every[list(divided)], atol=1e-4)


@given(plans, prices, st.floats(-1, 3), st.floats(6, 80))
def test_the_policys_best_action_at_a_price(plan, costs, price, budget):
    policy = rl.init_policy(jax.random.key(1))
    policy.net["actor"]["weight"] = 30 * policy.net["actor"]["weight"]
    actions, _, heads, masks = run(costs, budget, rl.make_rule(6, policy, table=constant(price)), seed=sum(plan))
    score = np.where(masks, np.asarray(heads.logits_A) - np.float32(price) * np.float32(costs), -np.inf)
    chosen = np.take_along_axis(score, actions[:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen, score.max(1), atol=1e-4)
    assert np.asarray(costs)[actions].sum() <= budget * (1 + 1e-5)


gae = jax.jit(rl.gae)
series = hnp.arrays(np.float32, 7, elements=st.floats(-10, 10, width=32))
share = st.floats(0, 1, width=32)


@given(series, series, share, share)
def test_gae_equals_a_loop(reward, value, gamma, lam):
    T, r, v = 7, reward.astype(np.float64), np.append(value, 0.0)
    errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(T)]
    expected = [sum((gamma * lam) ** (u - t) * errors[u] for u in range(t, T)) for t in range(T)]
    np.testing.assert_allclose(gae(reward, value, gamma, lam), expected, rtol=1e-4, atol=1e-3)


GAINS = rl.PidGains(kp=0.5, ki=0.1, kd=0.2, alpha_p=0.5, alpha_d=0.5, delay=2)
pid_update = jax.jit(rl.pid_update)


def multipliers(gains, costs, limit):
    pid, out = rl.init_pid(gains, limit), []
    for cost in costs:
        pid = pid_update(gains, pid, jnp.float32(cost), jnp.float32(limit))
        out.append(float(pid.multiplier))
    return out


def test_pid_equals_a_series_worked_out_by_hand():
    """Limit 2. I, P and the smoothed cost S start at 0, 0 and 2.

    cost  delta  I    P         S        rise of S over 2 updates  0.5 P + I + 0.2 rise
    4      2     0.2  1         3        3 - 2 = 1                 0.5 + 0.2 + 0.2
    6      4     0.6  2.5       4.5      4.5 - 2 = 2.5             1.25 + 0.6 + 0.5
    2      0     0.6  1.25      3.25     3.25 - 3 = 0.25           0.625 + 0.6 + 0.05
    0     -2     0.4  -0.375    1.625    falls: 0                  -0.1875 + 0.4
    0     -2     0.2  -1.1875   0.8125   falls: 0                  below 0
    8      6     0.8  2.40625   4.40625  4.40625 - 1.625           1.203125 + 0.8 + 0.55625"""
    expected = [0.9, 2.35, 1.275, 0.2125, 0, 2.559375]
    np.testing.assert_allclose(multipliers(GAINS, [4, 6, 2, 0, 0, 8], 2), expected, rtol=1e-5, atol=1e-6)


@given(st.lists(st.floats(0, 100, width=32), max_size=12), st.floats(1, 12, width=32))
def test_the_multiplier_and_its_integral_stay_within_bounds(costs, limit):
    pid = rl.init_pid(rl.PidGains(), limit)
    for cost in costs:
        pid = pid_update(rl.PidGains(integral_max=0.5, max=2.0), pid, cost, limit)
        assert 0 <= pid.multiplier <= 2 and 0 <= pid.integral <= 0.5


def test_a_long_excess_does_not_wind_the_integral_up():
    gains = rl.PidGains(kp=0.0, ki=1.0, kd=0.0, integral_max=3.0)
    after = multipliers(gains, [9] * 50 + [1] * 4, 2)
    assert after[49] == 3 and after[-4:] == [2, 1, 0, 0]


def test_the_proportional_term_is_positional():
    """lambda = max(0, cost - limit), with no memory of earlier lambdas."""
    gains = rl.PidGains(kp=1.0, ki=0.0, kd=0.0, alpha_p=0.0)
    np.testing.assert_allclose(multipliers(gains, [5, 5, 5, 2, 1, 4], 2), [3, 3, 3, 0, 0, 2], atol=1e-5)


def test_the_derivative_acts_on_rising_cost_alone():
    gains = rl.PidGains(kp=0.0, ki=0.0, kd=1.0, alpha_d=0.0, delay=1)
    for limit in (0, 3):  # the rise of the cost, not of the error
        pid = rl.init_pid(gains, 3)
        out = []
        for cost in (4, 6, 6, 2, 1, 3):
            pid = pid_update(gains, pid, jnp.float32(cost), jnp.float32(limit))
            out.append(float(pid.multiplier))
        np.testing.assert_allclose(out, [1, 2, 0, 0, 0, 2], atol=1e-5)


# --- 4. PPO ---------------------------------------------------------------------------------------


def random_batch(size=12, seed=0) -> rl.Batch:
    rng = np.random.RandomState(seed)
    mask = rng.rand(size, 4) < 0.7
    mask[:, 0] = True
    action = np.asarray([rng.choice(np.flatnonzero(row)) for row in mask])
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return rl.Batch(normal(size, U), mask, action, -1 + 0.4 * normal(size), normal(size), normal(size), normal(size))


@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_loss_equals_a_loop(policy, seed):
    ppo, batch = rl.Ppo(clip=0.3, value_weight=0.7, entropy_weight=0.05), random_batch(seed=seed)
    loss, entropy = rl.ppo_loss(policy.net, ppo, policy.norm, batch)
    heads, terms = rl.apply_policy(policy, batch.features_U), []
    for i in range(len(batch.action)):
        mask = batch.mask_A[i]
        kept = log_softmax(heads.logits_A[i][mask])
        ratio = math.exp(kept[mask[: batch.action[i]].sum()] - batch.log_prob[i])
        surrogate = min(ratio * batch.advantage[i], min(max(ratio, 0.7), 1.3) * batch.advantage[i])
        errors = (heads.value[i] - batch.value_target[i]) ** 2 + (heads.cost_value[i] - batch.cost_target[i]) ** 2
        terms.append((surrogate, errors, -(np.exp(kept) * kept).sum()))
    surrogate, errors, expected_entropy = np.mean(terms, 0)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-4)
    np.testing.assert_allclose(loss, -surrogate + 0.7 * errors - 0.05 * expected_entropy, rtol=1e-4)


ppo_gradient = jax.jit(jax.grad(rl.ppo_loss, has_aux=True), static_argnums=1)


@pytest.mark.parametrize("advantage, rises", [(1.0, True), (-1.0, False)])
def test_the_gradient_moves_probability_towards_advantage(advantage, rises):
    policy, ppo = rl.init_policy(jax.random.key(0)), rl.Ppo(value_weight=0.0, entropy_weight=0.0)
    x, action = np.random.RandomState(0).standard_normal((1, U)).astype(np.float32), np.asarray([2])
    log_prob = lambda net: jax.nn.log_softmax(rl.apply_policy(policy._replace(net=net), x).logits_A)[0, 2]
    before, zero = log_prob(policy.net)[None], np.zeros(1)
    batch = rl.Batch(x, np.ones((1, 4), bool), action, before, np.float32([advantage]), zero, zero)
    gradient = ppo_gradient(policy.net, ppo, policy.norm, batch)[0]
    better = jax.tree.map(lambda w, g: w - 0.01 * g, policy.net, gradient)
    assert (log_prob(better) > log_prob(policy.net)) == rises and log_prob(better) != log_prob(policy.net)
    far = batch._replace(log_prob=batch.log_prob - advantage)  # the ratio has left the clip range already
    clipped = ppo_gradient(policy.net, ppo, policy.norm, far)[0]
    assert not any(np.any(g) for g in jax.tree.leaves(clipped))


def test_each_epoch_takes_each_row_once_in_an_order_of_its_own():
    ppo, batch, trainer, key = rl.Ppo(epochs=3, minibatches=3), random_batch(13), fresh(2.0), jax.random.key(5)
    improved, entropy = jax.jit(rl.improve, static_argnums=0)(ppo, trainer, batch, key)
    net, state, entropies, rows = trainer.policy.net, trainer.optimizer, [], []
    for k in jax.random.split(key, 3):
        for part in np.asarray(jax.random.permutation(k, 13))[:12].reshape(3, 4):
            gradient, value = ppo_gradient(net, ppo, trainer.policy.norm, jax.tree.map(lambda x: x[part], batch))
            updates, state = rl.optimizer(ppo).update(gradient, state)
            net = optax.apply_updates(net, updates)
            entropies.append(value)
            rows.append(part)
    assert np.any(np.asarray(rows)[:3] != np.asarray(rows)[3:6])
    np.testing.assert_allclose(entropy, np.mean(entropies), rtol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), improved.policy.net, net)


def random_steps(N=3, T=4, seed=0):
    rng = np.random.RandomState(seed)
    normal = lambda *shape: rng.standard_normal((N, T, *shape)).astype(np.float32)
    action = rng.randint(0, 4, (N, T))
    steps = rl.Step(normal(U), np.ones((N, T, 4), bool), action, normal(), normal(), normal(), normal(), NOMINAL[action], None, normal(2))
    return steps, normal()


make_batch = jax.jit(rl.make_batch, static_argnums=0)


@pytest.mark.parametrize("multiplier", [0.0, 0.7, 9.0])
def test_the_advantage_is_reward_minus_priced_cost(multiplier):
    """(A_R - lambda A_C) / (1 + lambda): A_R standardised, A_C centred; costs count from the limit."""
    ppo, (steps, reward), limit = rl.Ppo(gamma=0.9, gae_lambda=0.8), random_steps(), 2.5
    batch = make_batch(ppo, steps, reward, limit, multiplier)
    reward_adv, cost_adv = np.zeros((3, 4)), np.zeros((3, 4))
    for n in range(3):
        for t in range(4):
            for u in range(t, 4):
                ahead = (0, 0) if u == 3 else (steps.value[n, u + 1], steps.cost_value[n, u + 1])
                reward_adv[n, t] += 0.72 ** (u - t) * (reward[n, u] + 0.9 * ahead[0] - steps.value[n, u])
                cost_adv[n, t] += 0.72 ** (u - t) * (steps.cost[n, u] - limit + 0.9 * ahead[1] - steps.cost_value[n, u])
    standard = (reward_adv - reward_adv.mean()) / reward_adv.std()
    expected = (standard - multiplier * (cost_adv - cost_adv.mean())) / (1 + multiplier)
    np.testing.assert_allclose(batch.advantage, expected.ravel(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(batch.value_target, (reward_adv + steps.value).ravel(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(batch.cost_target, (cost_adv + steps.cost_value).ravel(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(batch.features_U, steps.features_U.reshape(12, U))


def test_advantages_never_cross_documents():
    """Value targets are advantages before they are standardised over the batch."""
    ppo, (steps, reward) = rl.Ppo(gamma=0.9), random_steps()
    before = make_batch(ppo, steps, reward, 0.0, 0.5)
    reward, cost = reward.copy(), steps.cost.copy()
    reward[1] += np.float32([0, 1, 2, 3])
    cost[1] += 1
    after = make_batch(ppo, steps._replace(cost=cost), reward, 0.0, 0.5)
    for name in ("value_target", "cost_target"):
        old, new = (np.asarray(getattr(batch, name)).reshape(3, 4) for batch in (before, after))
        np.testing.assert_array_equal(old[[0, 2]], new[[0, 2]])
        assert np.any(old[1] != new[1])


# --- 5. Training ----------------------------------------------------------------------------------

PPO = rl.Ppo(epochs=2, minibatches=4, learning_rate=3e-3)


@pytest.fixture(scope="module")
def documents(tiny):
    """Tokens and text features of four documents, two of them twice."""
    tokens = np.stack([tiny.tokens, tiny.tokens[::-1]] * 2)
    return tokens, np.stack([rl.text_features(x, CHUNK, CLASSES) for x in tokens])


def roll(tiny, documents, policy, limit, key):
    frozen = (tiny.model, tiny.fast, PPO.credit, CHUNK, tiny.lower, tiny.upper, tiny.slow, env(limit * CHUNKS))
    return rl.rollout(lm.make_mesh(), *frozen, *documents, policy, key)


def train(tiny, documents, trainer, limit, seed=0):
    key = jax.random.fold_in(jax.random.key(seed), trainer.iteration)
    steps, reward_NT = roll(tiny, documents, trainer.policy, limit, key)
    return rl.train_iteration(PPO, env(limit * CHUNKS), steps, reward_NT, trainer, jax.random.fold_in(key, 1))


@pytest.mark.parametrize("step", [0.025, 0.47])
def test_training_is_the_same_in_every_currency(step):
    """Costs 1, 1 + step, ... for 1, 3, ...: the multiplier and the policy's steps are those of nominal costs."""
    rng, found = np.random.RandomState(0), []
    x, action = rng.standard_normal((8, 24, U)).astype(np.float32), rng.randint(0, 4, (8, 24))
    reward = (action * (1 + x[..., 5])).astype(np.float32)
    for costs in (NOMINAL, np.float32(1 + (NOMINAL - 1) / 2 * step)):
        own = env(24 * (costs[0] + costs[1]) / 2, costs)
        trainer = rl.init_trainer(jax.random.key(0), PPO, own, 24)
        for _ in range(3):
            heads = rl.apply_policy(trainer.policy, x)
            log_prob = np.take_along_axis(np.asarray(jax.nn.log_softmax(heads.logits_A)), action[..., None], -1)[..., 0]
            zero = np.zeros((8, 24), np.float32)
            steps = rl.Step(x, np.ones((8, 24, 4), bool), action, log_prob, heads.value, heads.cost_value, zero, costs[action], zero, None)
            trainer, figures = rl.train_iteration(PPO, own, steps, reward, trainer, jax.random.key(1))
        assert figures["cost"] == pytest.approx(costs[action].mean(), rel=1e-5)
        found.append((trainer.pid.multiplier, jax.tree.leaves(trainer.policy.net)))
    assert found[0][0] > 1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-4), *found)


def fresh(limit: float) -> rl.Trainer:
    return rl.init_trainer(jax.random.key(0), PPO, env(limit * CHUNKS), CHUNKS)


@given(st.floats(1.01, 12), prices)
def test_the_first_policy_costs_what_the_budget_allows(limit, costs):
    p = np.exp(log_softmax(rl.logits_on_budget(costs, limit)))
    np.testing.assert_allclose(p @ costs, min(limit, np.mean(costs)), rtol=1e-6)
    assert (np.diff(p) <= 1e-9).all()  # dearer actions are rarer


def test_the_first_policy_starts_on_the_budget(tiny, documents):
    assert fresh(1.0).policy.net["actor"]["bias"][1] < -40
    costs = [float(train(tiny, documents, fresh(2.0), 2.0, seed)[1]["cost"]) for seed in range(20)]
    np.testing.assert_allclose(np.mean(costs), 2.0, atol=0.25)


def test_an_iteration_is_deterministic_and_changes_the_policy(tiny, documents):
    start = fresh(4.0)
    first, figures = train(tiny, documents, start, 4.0)
    again, figures_again = train(tiny, documents, start, 4.0)
    jax.tree.map(np.testing.assert_array_equal, (first, figures), (again, figures_again))
    other, _ = train(tiny, documents, start, 4.0, seed=1)
    for name, layer in first.policy.net.items():
        assert np.any(layer["weight"] != start.policy.net[name]["weight"])
        assert np.any(layer["weight"] != other.policy.net[name]["weight"])
    assert first.iteration == 1 and all(np.isfinite(x) for x in figures.values())
    np.testing.assert_allclose(first.policy.norm.count, 4 * CHUNKS, rtol=1e-3)
    rates = [figures[f"rate_{name}"] for name in rl.ACTIONS]
    np.testing.assert_allclose(sum(rates), 1, rtol=1e-5)
    np.testing.assert_allclose(np.dot(rates, NOMINAL), figures["cost"], rtol=1e-5)
    second, next_figures = train(tiny, documents, first, 4.0)
    assert second.iteration == 2 and next_figures["cost"] != figures["cost"]  # other draws, by the iteration


def test_a_rollout_is_rewarded_with_what_its_updates_gave(tiny, documents, policy):
    steps, reward_NT = roll(tiny, documents, policy, 6.0, jax.random.key(3))
    for n, key in enumerate(jax.random.split(jax.random.key(3), 4)):
        rule = rl.make_rule(CHUNKS, policy, plan=steps.action[n], hard=False)
        args = (tiny.model, tiny.fast, tiny.upper, tiny.slow, env(30), document(tiny, documents[0][n]), rule, key)
        again = run_episode(*args, credit=3)
        np.testing.assert_allclose(steps.loss[n], again.loss, atol=1e-4)
        np.testing.assert_allclose(reward_NT[n], rl.rewards(again.credit_T), atol=5e-4)
    assert np.any(reward_NT)


def test_a_taught_policy_ranks_actions_by_what_they_give():
    """Each action's reward is a feature times the action's weight, with noise."""
    rng, weight = np.random.RandomState(0), np.asarray([0, 1, 1.5, 2])
    x, action = rng.standard_normal((60, 24, U)).astype(np.float32), rng.randint(0, 4, (60, 24))
    reward = (weight[action] * x[..., 5] + 0.1 * rng.standard_normal((60, 24)) * (action > 0)).astype(np.float32)
    steps = rl.Step(x, np.ones((60, 24, 4), bool), action, *[reward] * 4, NOMINAL[action], None, None)
    start = fresh(4.0)
    taught, error = rl.teach(PPO._replace(teach_steps=1000), steps, reward, start, jax.random.key(1))
    assert 0 < error < 0.3
    other = rng.standard_normal((500, U)).astype(np.float32)
    heads = rl.apply_policy(taught.policy, other)
    blind = start.policy.net["actor"]["bias"]
    given = np.asarray(heads.logits_A - blind - (heads.logits_A - blind)[:, :1])
    assert all(np.corrcoef(given[:, a], other[:, 5])[0, 1] > 0.8 for a in (1, 2, 3))
    assert given[:, 1].std() < given[:, 2].std() < given[:, 3].std()
    np.testing.assert_allclose(taught.policy.norm.mean_U, x.reshape(-1, U).mean(0), atol=1e-3)


@pytest.mark.parametrize("credit", [0, 1])
def test_what_skip_gets_too_is_not_taught_as_an_updates_worth(credit):
    """Where rewards are not credited: each action's is the same feature, with noise."""
    rng = np.random.RandomState(0)
    x, action = rng.standard_normal((60, 24, U)).astype(np.float32), rng.randint(0, 2, (60, 24))
    reward = (1 + x[..., 5] + 0.1 * rng.standard_normal((60, 24))).astype(np.float32) * ((action > 0) | (credit == 0))
    steps = rl.Step(x, np.ones((60, 24, 4), bool), action, *[reward] * 4, NOMINAL[action], None, None)
    taught, _ = rl.teach(PPO._replace(teach_steps=1000, credit=credit), steps, reward, fresh(4.0), jax.random.key(1))
    logits = rl.apply_policy(taught.policy, x.reshape(-1, U)).logits_A - fresh(4.0).policy.net["actor"]["bias"]
    worth = np.asarray(logits[:, 1] - logits[:, 0])
    assert (np.abs(worth.mean()) < 0.1 and worth.std() < 0.2) if credit == 0 else (worth.mean() > 0.5 and worth.std() > 0.5)
    given = worth if credit else logits[:, 1]
    assert given.std() == pytest.approx(0.7, abs=0.1)  # in units of the root mean square of what is rewarded, sqrt(2)


def test_the_multiplier_rises_above_the_limit_and_stays_zero_below(tiny, documents):
    for limit, rises in ((1.0, True), (12.5, False)):
        trainer, found = fresh(4.0), []
        for _ in range(3):
            trainer, figures = train(tiny, documents, trainer, limit)
            np.testing.assert_allclose(figures["limit"], limit)
            assert (figures["cost"] > limit) == rises
            assert (figures["lambda"] > 0) == rises
            found.append(float(trainer.pid.integral))
        assert (0 < found[0] < found[1] < found[2]) if rises else found == [0, 0, 0]


def test_the_multiplier_makes_the_policy_cheaper(tiny, documents):
    cost = {}
    for price in (0.0, 10.0):
        trainer = fresh(5.5)
        for _ in range(25):
            trainer = trainer._replace(pid=trainer.pid._replace(integral=jnp.float32(price)))
            trainer, figures = train(tiny, documents, trainer, 12.5 if price == 0 else 1.0)
        cost[price] = float(figures["cost"])
    assert cost[10.0] < 2 and cost[10.0] < cost[0.0] - 1, cost
