"""When to learn: the policy, its features, the episode, and PPO under a compute budget.

For every chunk t of a document, in this order (`episode`):

    predict   l_t = loss of chunk t under W_t          always before learning from chunk t
    decide    a_t ~ pi(a | features of what has been read, budget left)
    learn     W_{t+1} = STEPS[a_t] inner steps on chunk t

    reward    r_t = sum_{u>t} l_u(W_t) - l_u(W_{t+1})      what this update alone gave the chunks to come
    cost      c_t in units of SKIP's
    maximise  E[sum r]  subject to  E[sum c] <= budget

The rewards telescope: they add up to the gain over never learning, sum_t l_t(W_0) - l_t(W_t), and say
which update each part of it came from, so that no action is praised or blamed for what others did.
A SKIP earns exactly 0. (Training divides up the losses of every n-th chunk only: the same in expectation.)

PPO (Schulman et al. 2017) on (A_R - lambda A_C) / (1 + lambda), lambda from a PID controller on the
mean cost (Stooke et al. 2020, "Responsive Safety in RL by PID Lagrangian Methods").

Dimensions: N documents   T chunks   A actions   U features   Q points of a table   P prices tried
    C, D, H, G, K, M, S, V as in model.py
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy  # its parts are imported when they are first used
from jax import lax

import model as lm

ACTIONS = ("SKIP", "UPDATE_1", "UPDATE_2", "UPDATE_4")
LAST = len(ACTIONS) - 1
NOMINAL = (1.0, 3.0, 6.0, 12.0)  # a step is a forward and twice that for its backward; the first forward is the prediction's


class Document(NamedTuple):
    """A document ready to be read: everything that no decision changes."""

    windows: lm.Window  # leading axis T
    text_TU: Any  # (T, 16) features of the tokens alone


class Env(NamedTuple):
    """What the actions cost, and what may be spent."""

    costs_A: Any  # (4,) cost of each action, SKIP = 1
    budget: Any  # total cost allowed for one document


class Memory(NamedTuple):
    """What is carried from chunk to chunk, before chunk t."""

    state: lm.State  # W_t and what its optimiser keeps
    counts_A: Any  # how often each action was taken: the cost so far, without rounding errors that add up
    loss_average: Any  # exponential averages, 0.8 of the old value each chunk: of the losses, nats
    cost_average: Any  # and of the actions' costs
    past: Any = ()  # (T, ...) W_0 ... W_{t-1}, where updates are credited
    learned_T: Any = ()  # which of them were updated


def spent(env: Env, counts_A):
    """The cost so far (scalar), of counts (4,) of the actions taken."""
    return (counts_A * env.costs_A).sum()


# --- 1. Features --------------------------------------------------------------------------------

# What each is: `text_features` for CODE, SEQUENCE and AHEAD, `attention_features`, `features` for the rest.
CONFIDENCE = ("loss", "loss_spread", "entropy", "top_probability")
ACTIVATION = ("below_rms", "top_rms", "below_spread", "top_spread", "adapter_share", "topic_shift")
ATTENTION = ("attention_entropy", "attention_on_context", "attention_on_first", "attention_distance")
CODE = ("newline", "indentation", "identifier", "digit", "operator", "quote", "comment", "bracket")
HISTORY = ("loss_trend", "recent_cost", "budget_left", "document_left")
SEQUENCE = ("distinct", "new_tokens", "seen_bigrams", "seen_6grams", "unigram_surprisal", "compression")
AHEAD = ("comes_again", "new_comes_again")  # hidden unless asked for: they look at the text to come
GROUPS = {
    "confidence": CONFIDENCE, "activation": ACTIVATION, "attention": ATTENTION, "code": CODE, "history": HISTORY, "sequence": SEQUENCE,
    "ahead": AHEAD,
}  # fmt: skip
FEATURES = tuple(name for group in GROUPS.values() for name in group)
SIGNALS = FEATURES + ("gradient_norm", "inner_loss")  # what a gate can look at: these two as well
PROBES = 16  # logit rows and attention queries that features look at

CODE_PATTERNS = {
    "newline": r"\n",
    "indentation": r"^[ \t]{2,}$|\n[ \t]+$",
    "identifier": r"[A-Za-z_]",
    "digit": r"[0-9]",
    "operator": r"[-+*/%=<>!&|^~@:.,;]",
    "quote": r"[\"'`]",
    "comment": r"#|//|/\*|\*/|\"\"\"|'''",
    "bracket": r"[()\[\]{}]",
}


def token_classes(token_texts: list[str]) -> np.ndarray:
    """(V, 8) table: which kinds of code each token of the vocabulary contains (0 or 1)."""
    return np.asarray([[bool(re.search(CODE_PATTERNS[c], text)) for c in CODE] for text in token_texts], np.float32)


def ngrams(x: np.ndarray, n: int) -> list[bytes]:
    """All runs of n tokens in x (C,), in order."""
    return [x[i : i + n].tobytes() for i in range(len(x) - n + 1)]


def text_features(tokens: np.ndarray, chunk: int, classes: np.ndarray) -> np.ndarray:
    """Features of a document (T*C + 1,) that need its tokens alone -> float32 (T, 16): the 8 code
    and 6 sequence features of each chunk, in terms of this chunk and what came before it, and the 2 of `comes_again`.
    Code: the share of tokens of each class, from the table (V, 8) of `token_classes`. Sequence: distinct tokens and
    tokens new to the document, as shares of the chunk's; shares of its 2- and 6-grams seen in earlier chunks; mean
    surprisal, nats, under the counts of earlier tokens plus one; compressed size over raw size."""
    rows, counts = [], np.zeros(len(classes))
    seen: dict[int, set[bytes]] = {2: set(), 6: set()}
    for low in range(1, len(tokens), chunk):
        x = tokens[low : low + chunk]
        kinds, new = np.unique(x), counts[x] == 0
        surprisal = -np.log((counts[x] + 1) / (counts.sum() + len(counts))).mean()
        known = []
        for n, old in seen.items():
            grams = ngrams(x, n)
            known.append(sum(g in old for g in grams) / max(len(grams), 1))
            old.update(grams)
        raw = x.astype(np.uint32).tobytes()
        sequence = [len(kinds) / len(x), new.mean(), *known, surprisal, len(zlib.compress(raw)) / len(raw)]
        rows.append([*classes[x].mean(0), *sequence])
        np.add.at(counts, x, 1)
    return np.concatenate([np.asarray(rows), comes_again(tokens, chunk)], 1, dtype=np.float32)


def comes_again(tokens: np.ndarray, chunk: int) -> np.ndarray:
    """How often what stands in each chunk of a document (T*C + 1,) is met again later in it -> (T, 2): log(1 + n),
    n the number of later chunks with each of its distinct 3-grams, summed over these; and over those of them that no
    chunk before has."""
    grams = [set(ngrams(tokens[low : low + chunk], 3)) for low in range(1, len(tokens), chunk)]
    first: dict[bytes, int] = {}
    for t, own in enumerate(grams):
        for gram in own:
            first.setdefault(gram, t)
    later, rows = Counter(), []
    for t in reversed(range(len(grams))):
        rows.append((sum(later[g] for g in grams[t]), sum(later[g] for g in grams[t] if first[g] == t)))
        later.update(grams[t])
    return np.log1p(np.asarray(rows[::-1]))


def rms(x):
    """Root mean square of all entries (scalar)."""
    return jnp.sqrt((x * x).mean() + 1e-12)


def spread(x_CD):
    """1 - |mean row|^2 / mean |row|^2 of rows (C, D) (scalar): 0 when all rows agree, 1 when they have nothing in common."""
    mean = x_CD.mean(0)
    return 1 - (mean * mean).sum() / (x_CD * x_CD).sum(-1).mean()


def attention_features(reading: lm.Reading, start):
    """Of PROBES queries of the last block, means over these and the heads: entropy over log S, mass on the context
    chunk, mass on the first key, distance in chunks -> four scalars."""
    H, C, _ = reading.query_HCK.shape
    G, S, _ = reading.key_GSK.shape
    key_HSK = jnp.repeat(reading.key_GSK, H // G, 0)
    stride = max(C // PROBES, 1)
    query = reading.query_HCK[:, stride - 1 :: stride]
    position = start + jnp.arange(stride - 1, C, stride)[:, None]
    key = jnp.arange(S)
    scores = jnp.einsum("hqk,hsk->hqs", query, key_HSK) * query.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(key <= position, scores, -1e30))
    entropy = -(p * jnp.log(p + 1e-30)).sum(-1).mean() / np.log(S)
    return entropy, (p * (key < start)).sum(-1).mean(), p[..., 0].mean(), (p * (position - key)).sum(-1).mean() / C


def features(reading: lm.Reading, window: lm.Window, text_U, memory: Memory, env: Env, t, chunks):
    """The features of chunk t of `chunks`, which has just been read -> float32 (34,), named by FEATURES: 32 of what has
    been read, and the two of AHEAD.

    Confidence: mean and spread of the chunk's losses, nats; of PROBES of its rows the entropy, nats, and the
    largest probability. Activations: size (log rms) and `spread` of its rows below any fast weight and on top,
    size of what the adapters add over that on top, how far it is from the chunk before (1 - cosine). History: this loss against
    its running average, recent cost, the share of the chunks left that the budget left could learn from with
    UPDATE_1, and the share of the document left."""
    C = window.targets_C.shape[-1]
    log_p = jax.nn.log_softmax(reading.logits_CV[:: max(C // PROBES, 1)])
    p = jnp.exp(log_p)
    confidence = [reading.loss, reading.losses_C.std(), -(p * log_p).sum(-1).mean(), p.max(-1).mean()]
    below = lm.slice_rows(window.x_SD, window.start, C)
    center, context = below.mean(0), window.x_SD[:C].mean(0)
    cosine = (center * context).sum() / (jnp.linalg.norm(center) * jnp.linalg.norm(context) + 1e-12)
    activation = [jnp.log(rms(below)), jnp.log(rms(reading.top_CD)), spread(below), spread(reading.top_CD)]
    activation += [rms(reading.outputs_MCD) / rms(reading.top_CD), 1 - cosine]
    chunks_left = chunks - t
    affordable = (env.budget - spent(env, memory.counts_A)) / chunks_left - env.costs_A[0]
    affordable = affordable / (env.costs_A[1] - env.costs_A[0])
    trend = jnp.where(t == 0, 0.0, reading.loss - memory.loss_average)
    history = [trend, memory.cost_average, affordable, chunks_left / chunks]
    groups = [*confidence, *activation, *attention_features(reading, window.start), *text_U[:8], *history, *text_U[8:]]
    return jnp.stack([jnp.asarray(f, jnp.float32) for f in groups])


# --- 2. Policy ----------------------------------------------------------------------------------


class Normaliser(NamedTuple):
    """Running mean and variance of the features (Welford, merged batch by batch)."""

    count: Any  # chunks seen
    mean_U: Any
    var_U: Any
    keep_U: Any  # 0 for features that the policy is not to see


def init_normaliser(size: int) -> Normaliser:
    """Mean 0 and variance 1 of `size` features, with next to no weight against the first batch."""
    return Normaliser(jnp.float32(1e-4), jnp.zeros(size), jnp.ones(size), jnp.ones(size))


def update_normaliser(n: Normaliser, x_NU) -> Normaliser:
    """With a batch of features (N, U) merged in."""
    count, mean, var = x_NU.shape[0], x_NU.mean(0), x_NU.var(0)
    total, delta = n.count + count, mean - n.mean_U
    merged = (n.var_U * n.count + var * count + delta**2 * n.count * count / total) / total
    return n._replace(count=total, mean_U=n.mean_U + delta * count / total, var_U=merged)


class Policy(NamedTuple):
    """Weights of a two-layer tanh network with three heads, and its input's normaliser."""

    net: dict[str, Any]
    norm: Normaliser


def looks_ahead(policy: Policy) -> bool:
    """Whether it sees the features of the text to come."""
    return bool(policy.norm.keep_U[FEATURES.index(AHEAD[0])])


class Heads(NamedTuple):
    """What the policy says of a chunk."""

    logits_A: Any
    value: Any  # of the rewards to come, discounted: at gamma 0 of this action's
    cost_value: Any  # of the costs to come, above the limit, likewise


def init_policy(key, hidden: int = 64) -> Policy:
    """Orthogonal weights; gain sqrt(2) for hidden layers, 0.01 for the actor, 1 for the critics. What is ahead has no
    say at first."""
    sizes = {"hidden_1": (len(FEATURES) - len(AHEAD), hidden, 2**0.5), "hidden_2": (hidden, hidden, 2**0.5)}
    sizes |= {"actor": (hidden, len(ACTIONS), 0.01), "critic": (hidden, 1, 1.0), "cost_critic": (hidden, 1, 1.0)}
    net = {}
    for i, (name, (rows, columns, gain)) in enumerate(sizes.items()):
        weight = jax.nn.initializers.orthogonal(gain)(jax.random.fold_in(key, i), (rows, columns))
        net[name] = {"weight": weight, "bias": jnp.zeros(columns)}
    net["hidden_1"]["weight"] = jnp.pad(net["hidden_1"]["weight"], ((0, len(AHEAD)), (0, 0)))
    return Policy(net, init_normaliser(len(FEATURES)))


def apply_policy(policy: Policy, x_U) -> Heads:
    """Raw features (..., 34) -> heads with logits (..., 4) and values (...)."""
    x = policy.norm.keep_U * jnp.clip((x_U - policy.norm.mean_U) / jnp.sqrt(policy.norm.var_U + 1e-6), -5, 5)
    layer = lambda name, x: x @ policy.net[name]["weight"] + policy.net[name]["bias"]
    x = jnp.tanh(layer("hidden_2", jnp.tanh(layer("hidden_1", x))))
    return Heads(layer("actor", x), layer("critic", x)[..., 0], layer("cost_critic", x)[..., 0])


# --- 3. The episode -----------------------------------------------------------------------------


class Table(NamedTuple):
    """What a threshold spends, at each place t of a document: cost above SKIP's per chunk, on average over
    the chunks from t to the end (T, Q), rising along Q, and the threshold that spent it on validation
    documents (T, Q), falling. One row, (1, Q), stands for all places."""

    spend_TQ: Any
    threshold_TQ: Any


class Rule(NamedTuple):
    """How actions are chosen (by `choose`). All rules have the same structure, so that one compiled program runs
    them all: `kind` 0 follows `plan_T`, 1 takes `action` where a signal exceeds a threshold and `least` elsewhere, 2
    samples from the policy, 3 takes the policy's best action from `least` to `action`, argmax(logits - price * cost).

    Thresholds and prices come from `table`: they are those with which the rest of the document would
    spend `pace` times what is left beyond `least`. With `online` > 0 they would spend the budget evenly, and are moved by
    that much for each unit of cost above it (the gate of arXiv 2601.00894)."""

    kind: Any
    plan_T: Any
    signal: Any  # index into SIGNALS
    table: Table
    pace: Any
    online: Any
    action: Any  # index into ACTIONS
    least: Any  # likewise
    policy: Policy
    hard: Any  # True: an action that would break the budget is replaced or masked


POINTS = 33  # of a table


def make_rule(
    chunks: int, policy: Policy, *, plan=None, signal="", table: Table | None = None, pace=1.0, online=0.0, action=LAST, least=0, hard=True
) -> Rule:
    """The rule for documents of that many chunks: a plan if `plan` is given, one action or (T,); a gate if `signal`
    is, with its table; the policy's best actions if only a table is; else the policy, sampled."""
    kind = 0 if plan is not None else 1 if signal else 2 if table is None else 3
    plan_T = jnp.broadcast_to(jnp.asarray(0 if plan is None else plan, jnp.int32), (chunks,))
    index = jnp.int32(SIGNALS.index(signal) if signal else 0)
    table = table or Table(np.arange(POINTS)[None], np.zeros((1, POINTS)))
    table = Table(*(jnp.broadcast_to(jnp.asarray(x, jnp.float32), (chunks, POINTS)) for x in table))
    numbers = jnp.float32(pace), jnp.float32(online), jnp.int32(action), jnp.int32(least)
    return Rule(jnp.int32(kind), plan_T, index, table, *numbers, policy, jnp.bool_(hard))


def gate_table(signal_N, extra_cost: float) -> Table:
    """The table of a gate on these values (N,) of its signal, whose action costs that much above SKIP: the
    same at all places, (1, Q)."""
    share = np.linspace(0, 1, POINTS)
    return Table(share[None] * extra_cost, np.quantile(signal_N, 1 - share)[None])


def price_table(logits_NTA, costs_A, least: int = 0, action: int = LAST) -> Table:
    """The table (T, Q) of a policy with these logits on validation documents that chooses from `least` to `action`,
    from the price at which it never takes more than the first to the one at which it always takes the last.
    A constant price buys what is worth most wherever it is; for each place the table says what that price
    still spends from there on."""
    logits_NTA, menu = np.asarray(logits_NTA, float)[..., least : action + 1], np.asarray(costs_A, float)[least : action + 1]
    low, high = np.triu_indices(len(menu), 1)
    turns = (logits_NTA[..., high] - logits_NTA[..., low]) / (menu[high] - menu[low])  # prices at which two actions are worth the same
    prices = np.quantile(turns, np.linspace(1, 0, 16 * POINTS))
    prices = np.concatenate([prices[:1] + 1e-3, prices, prices[-1:] - 1e-3])
    spend = [menu[np.argmax(logits_NTA - price * menu, -1)].mean(0) - costs_A[0] for price in prices]
    count = np.arange(len(spend[0]), 0, -1)  # of chunks from t on
    spend_TP = np.cumsum(np.asarray(spend).T[::-1], 0)[::-1] / count[:, None]
    wanted = spend_TP[:, :1] + (spend_TP[:, -1:] - spend_TP[:, :1]) * np.linspace(0, 1, POINTS) ** 2  # denser where budgets usually are
    keep = np.stack([np.searchsorted(*row) for row in zip(spend_TP, wanted - 1e-9, strict=True)])
    return Table(np.take_along_axis(spend_TP, keep, 1) + 1e-6 * np.arange(POINTS), prices[keep])


class Step(NamedTuple):
    """One chunk of an episode; stacked on T."""

    features_U: Any
    mask_A: Any  # actions that were allowed
    action: Any
    log_prob: Any
    value: Any
    cost_value: Any
    loss: Any  # nats per token, before learning
    cost: Any  # of the action
    dropped: Any  # of the action's inner steps those that would not have been finite, and were not taken
    probed: Any  # norm of the inner loss's gradient, inner loss; zeros unless asked for
    credit_T: Any = ()  # what the update on each earlier chunk took off this chunk's loss, times n


def allowed(env: Env, counts_A, t, chunks, least: Any = 0):
    """Actions (4,) after which the remaining chunks can still be read, with the action `least` on each. SKIP
    always is."""
    after = spent(env, counts_A) + env.costs_A + (chunks - 1 - t) * env.costs_A[least]
    return (after <= env.budget * (1 + 1e-6)).at[0].set(True)


def may_take(rule: Rule, env: Env, counts_A, t, chunks):
    """Actions (4,) that the rule has to choose from; a gate's leave enough for its least on the remaining chunks."""
    return allowed(env, counts_A, t, chunks, jnp.where(rule.kind == 1, rule.least, 0)) | ~rule.hard


def choose(rule: Rule, signals, heads: Heads, mask_A, env: Env, memory: Memory, t, chunks, key):
    """The rule's action on chunk t, given the values of SIGNALS and of the heads -> (action, its log-probability
    under the policy). One that is not allowed
    becomes the largest allowed below it. Where the document has not as many chunks as the rule, its place
    in it counts."""
    costs_A = env.costs_A
    left = (env.budget - spent(env, memory.counts_A)) / (chunks - t) - costs_A[0]
    base = costs_A[rule.least] - costs_A[0]
    spend = jnp.where(rule.online > 0, env.budget / chunks - costs_A[0], base + rule.pace * (left - base))
    drift = rule.online * (spent(env, memory.counts_A) - t * env.budget / chunks)
    place = t * len(rule.plan_T) // chunks
    table = Table(*(x[place] for x in rule.table))
    # With enough left for every chunk all are learned from, whatever was seen on validation.
    threshold = jnp.where(spend >= table.spend_TQ[-1] - 1e-3 * cost_unit(env), -jnp.inf, jnp.interp(spend, *table) + drift)
    logits_A = jnp.where(mask_A, heads.logits_A, -1e9)
    sampled = jax.random.categorical(key, logits_A)
    gated = jnp.where(signals[rule.signal] > threshold, rule.action, rule.least)
    affordable = jnp.where(jnp.isinf(threshold), costs_A, logits_A - threshold * costs_A)
    actions, lasting_A = jnp.arange(len(ACTIONS)), allowed(env, memory.counts_A, t, chunks, rule.least)
    best = jnp.argmax(jnp.where(lasting_A & (rule.least <= actions) & (actions <= rule.action), affordable, -jnp.inf))
    wanted = jnp.stack([rule.plan_T[place], gated, sampled, best])[rule.kind]
    action = jnp.max(jnp.where(mask_A & (actions <= wanted), actions, 0))
    return action, jax.nn.log_softmax(logits_A)[action]


def credits(loss_of, loss, past, learned_T):
    """What the update on each chunk took off this chunk's loss (T,), nats: the loss with the weights before it,
    loss_of(weights) of Memory.past, minus the loss with those after it, from the newest, whose loss after it
    is `loss`, back. Only for updates that were taken; 0 elsewhere."""

    def one(after, update):
        weights, learned = update
        before = lax.cond(learned, loss_of, lambda _: after, weights)
        return before, before - after

    return lax.scan(one, loss, (past, learned_T), reverse=True)[1]


def decide(rule: Rule, reading: lm.Reading, window: lm.Window, text_U, probed, memory: Memory, env: Env, t, chunks, key):
    """What is done about a chunk that has just been read -> (features, allowed actions, the policy's heads,
    action, its log-probability under the policy)"""
    x_U = features(reading, window, text_U, memory, env, t, chunks)
    heads = apply_policy(rule.policy, x_U)
    mask_A = may_take(rule, env, memory.counts_A, t, chunks)
    return x_U, mask_A, heads, *choose(rule, jnp.append(x_U, probed), heads, mask_A, env, memory, t, chunks, key)


def remember(env: Env, memory: Memory, t, loss, action, state: lm.State) -> Memory:
    """The memory after chunk t, on which `action` was taken, which led to `state`."""
    average = lambda old, new: jnp.where(t == 0, new, 0.8 * old + 0.2 * new)
    averages = average(memory.loss_average, loss), average(memory.cost_average, env.costs_A[action])
    return Memory(state, memory.counts_A.at[action].add(1), *averages, memory.past, memory.learned_T)


def init_memory(fast: lm.Fast, slow) -> Memory:
    """The memory before the first chunk: W_0, nothing spent."""
    state = lm.init_state(fast, slow)
    zeros = partial(jnp.zeros_like, state.steps)  # like one that is each device's own, as all this will be
    return Memory(state, zeros(shape=len(ACTIONS)), zeros(), zeros())


def episode(
    model: lm.Model, fast: lm.Fast, upper, slow, env: Env, document: Document, rule: Rule, key, credit: int = 0, probe: bool = False
) -> Step:
    """Read one document: predict, decide, learn -> steps, stacked on T. With `credit` n > 0 the losses of every n-th chunk
    (from a random one on) are divided among the updates before it; with `probe` gates see the inner
    loss and the norm of its gradient, on every chunk and at no charge. Not for `vmap`, under which
    every branch of every decision would run; `lax.map` over documents instead."""
    chunks = document.windows.targets_C.shape[0]
    phase = jax.random.randint(jax.random.fold_in(key, chunks), (), 0, max(credit, 1))

    def step(memory: Memory, inputs):
        t, window, text_U = inputs
        reading, learn, inner = lm.read_chunk(model, fast, upper, slow, memory.state, window)
        probed = jnp.stack(inner()) if probe else jnp.zeros(2)
        given = rule, reading, window, text_U, probed, memory, env, t, chunks, jax.random.fold_in(key, t)
        x_U, mask_A, heads, action, log_prob = decide(*given)
        cost, loss = env.costs_A[action], reading.loss
        credit_T, past, learned_T = (), (), ()
        if credit:
            loss_of = lambda weights: lm.predict(model, fast, upper, slow, weights, window).loss
            # Written before it is read, though this chunk's row has no say yet: the other way round all of it is copied first.
            past = jax.tree.map(lambda old, new: old.at[t].set(new), memory.past, memory.state.weights)
            divide = lambda: credit * credits(loss_of, loss, past, memory.learned_T)
            credit_T = lax.cond(t % credit == phase, divide, lambda: jnp.zeros_like(loss, shape=chunks))
            learned_T = memory.learned_T.at[t].set(action > 0)
        state = learn(action)
        dropped = jnp.asarray(lm.STEPS, jnp.float32)[action] - (state.steps - memory.state.steps)
        memory = remember(env, memory, t, loss, action, state)._replace(past=past, learned_T=learned_T)
        return memory, Step(x_U, mask_A, action, log_prob, heads.value, heads.cost_value, loss, cost, dropped, probed, credit_T)

    start = init_memory(fast, slow)
    if credit:
        empty = lambda w: jnp.zeros_like(w, shape=(chunks, *w.shape))
        learned_T = jnp.zeros_like(start.state.steps, shape=chunks, dtype=bool)
        start = start._replace(past=jax.tree.map(empty, start.state.weights), learned_T=learned_T)
    return lax.scan(step, start, (jnp.arange(chunks), document.windows, document.text_TU))[1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def prepare(model: lm.Model, fast: lm.Fast, chunk: int, lower, upper, tokens, text_TU) -> Document:
    """Tokens (T*C + 1,) and their text features -> the document. The frozen prefix runs here, once for
    all that will be done with it."""
    return Document(lm.windows(model, fast, lower, upper, tokens, chunk), text_TU)


# --- 4. Returns and the multiplier ----------------------------------------------------------------


def rewards(credit_TT):
    """What each action gave the chunks to come (T,), nats, from credit_TT[u, t], the part of chunk u."""
    return credit_TT.sum(0)


def next_gains(skip_T, loss_T):
    """The other reward, r_t = l0_{t+1} - l_{t+1}: the gain on the next chunk, whoever it is due to."""
    return jnp.append((skip_T - loss_T)[1:], 0.0)


def gae(reward_T, value_T, gamma: float, lam: float):
    """Generalised advantage estimates (T,) of one finished document, after which nothing is worth anything
    (Schulman et al. 2016, eq. 16)."""

    def back(advantage, inputs):
        reward, value, next_value = inputs
        advantage = reward + gamma * next_value - value + gamma * lam * advantage
        return advantage, advantage

    next_T = jnp.append(value_T[1:], 0.0)
    return lax.scan(back, jnp.float32(0), (reward_T, value_T, next_T), reverse=True)[1]


def cost_unit(env: Env):
    """Half of what UPDATE_1 costs above SKIP: 1 of nominal cost, less where a step takes fewer FLOPs than that counts. The
    multiplier prices costs in this unit, so its gains mean the same in every currency."""
    return (env.costs_A[1] - env.costs_A[0]) / 2


class Pid(NamedTuple):
    """State of the multiplier's controller, in units of `cost_unit`."""

    integral: Any
    proportional: Any
    cost: Any  # smoothed cost
    past: Any  # (delay,) its earlier values, oldest first
    multiplier: Any  # lambda


class PidGains(NamedTuple):
    """The controller's gains and limits (hashable), for mean costs per chunk in units of `cost_unit`."""

    kp: float = 0.5
    ki: float = 0.1
    kd: float = 0.1
    alpha_p: float = 0.5  # of the old value in the smoothed error
    alpha_d: float = 0.9  # and in the smoothed cost
    delay: int = 5  # iterations over which the derivative is taken
    integral_max: float = 10.0
    max: float = 10.0  # of the multiplier


def init_pid(gains: PidGains, cost) -> Pid:
    """A controller at rest, as if the cost had always been this."""
    cost = jnp.float32(cost)
    return Pid(jnp.float32(0), jnp.float32(0), cost, jnp.full(gains.delay, cost), jnp.float32(0))


def pid_update(gains: PidGains, pid: Pid, cost, limit) -> Pid:
    """Positional PID on the mean undiscounted cost per chunk (Stooke et al. 2020, algorithm 2), with the error
    and the cost smoothed: the derivative acts on the smoothed cost, only when it rises."""
    delta = cost - limit
    integral = jnp.clip(pid.integral + gains.ki * delta, 0, gains.integral_max)
    proportional = gains.alpha_p * pid.proportional + (1 - gains.alpha_p) * delta
    smooth = gains.alpha_d * pid.cost + (1 - gains.alpha_d) * cost
    derivative = jnp.maximum(0, smooth - pid.past[0])
    multiplier = jnp.clip(gains.kp * proportional + integral + gains.kd * derivative, 0, gains.max)
    return Pid(integral, proportional, smooth, jnp.append(pid.past[1:], smooth), multiplier)


# --- 5. PPO ---------------------------------------------------------------------------------------


class Ppo(NamedTuple):
    """Hyperparameters of PPO and its warm start (hashable: a static argument)."""

    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 2e-3
    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    credit: int = 3  # reward an action with its own part of the gain, taken on every 3rd chunk; 0: with the next chunk's gain
    gamma: float = 0.0  # a credit holds all later chunks; that an update also lowers what later ones can earn is left out
    gae_lambda: float = 0.95  # of no effect where gamma is 0
    gradient_clip: float = 0.5
    teach_steps: int = 300  # Adam steps of the warm start, each on 256 chunks
    teach_rate: float = 5e-4
    gains: PidGains = PidGains()


class Batch(NamedTuple):
    """Steps of all documents of an iteration, flattened: leading axis N T."""

    features_U: Any
    mask_A: Any
    action: Any
    log_prob: Any
    advantage: Any  # (A_R - lambda A_C) / (1 + lambda)
    value_target: Any
    cost_target: Any


class Trainer(NamedTuple):
    """Everything that training changes: the whole checkpoint of the policy stage."""

    policy: Policy
    optimizer: Any
    pid: Pid
    iteration: Any


def optimizer(ppo: Ppo) -> optax.GradientTransformation:
    """Adam; a step whose gradient is not finite is dropped, and counted in `total_notfinite`."""
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(ppo.gradient_clip), optax.adam(ppo.learning_rate, eps=1e-5)), 2**30)


def logits_on_budget(costs_A, limit: float) -> np.ndarray:
    """Logits (4,) of the distribution of largest entropy whose mean cost is `limit`, p ~ exp(-beta
    cost); of the uniform one where that costs less."""
    costs = np.asarray(costs_A, float)
    excess = lambda beta: scipy.special.softmax(-beta * costs) @ costs - limit
    low, high = 0.0, 50.0 / (costs[1] - costs[0])
    beta = low if excess(low) <= 0 else high if excess(high) >= 0 else scipy.optimize.brentq(excess, low, high)
    return -beta * (costs - costs[0])


def init_trainer(key, ppo: Ppo, env: Env, chunks: int, drop: tuple[str, ...] = (), look_ahead: bool = False) -> Trainer:
    """A policy that starts on the budget: from a uniform one, the multiplier would first have to
    drive the cost down, and overshoots (measured: 27 of 40 iterations below the budget). It does not see
    the feature groups of `drop`, nor what is ahead unless told to."""
    limit = float(env.budget) / chunks
    policy = init_policy(key)
    policy.net["actor"]["bias"] = jnp.asarray(logits_on_budget(env.costs_A, limit), jnp.float32)
    dropped = {name for group in (*drop, *([] if look_ahead else ["ahead"])) for name in GROUPS[group]}
    keep_U = jnp.asarray([float(name not in dropped) for name in FEATURES])
    policy = policy._replace(norm=policy.norm._replace(keep_U=keep_U))
    return Trainer(policy, optimizer(ppo).init(policy.net), init_pid(ppo.gains, limit / cost_unit(env)), jnp.int32(0))


def ppo_loss(net, ppo: Ppo, norm: Normaliser, batch: Batch):
    """Clipped surrogate (Schulman et al. 2017, eq. 7) + value and cost-value errors - entropy -> (loss, entropy)."""
    heads = apply_policy(Policy(net, norm), batch.features_U)
    log_p = jax.nn.log_softmax(jnp.where(batch.mask_A, heads.logits_A, -1e9))
    ratio = jnp.exp(jnp.take_along_axis(log_p, batch.action[:, None], -1)[:, 0] - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - ppo.clip, 1 + ppo.clip)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    value_error = ((heads.value - batch.value_target) ** 2).mean()
    cost_error = ((heads.cost_value - batch.cost_target) ** 2).mean()
    entropy = -(jnp.exp(log_p) * jnp.where(batch.mask_A, log_p, 0.0)).sum(-1).mean()
    loss = -surrogate + ppo.value_weight * (value_error + cost_error) - ppo.entropy_weight * entropy
    return loss, entropy


def make_batch(ppo: Ppo, steps: Step, reward_NT, limit, multiplier) -> Batch:
    """Advantages of steps (N, T) document by document, then flattened; `limit` is the budget per chunk, and
    costs are in units of `cost_unit`. A_R is standardised, A_C only centred: its scale is what the multiplier
    prices. Costs count from the limit, which keeps the cost critic's targets near zero."""
    advantages = jax.vmap(partial(gae, gamma=ppo.gamma, lam=ppo.gae_lambda))
    reward_adv, cost_adv = advantages(reward_NT, steps.value), advantages(steps.cost - limit, steps.cost_value)
    standard = (reward_adv - reward_adv.mean()) / (reward_adv.std() + 1e-8)
    advantage = (standard - multiplier * (cost_adv - cost_adv.mean())) / (1 + multiplier)
    fields = (steps.features_U, steps.mask_A, steps.action, steps.log_prob, advantage)
    fields += (reward_adv + steps.value, cost_adv + steps.cost_value)
    return Batch(*(x.reshape(-1, *x.shape[2:]) for x in fields))


def improve(ppo: Ppo, trainer: Trainer, batch: Batch, key) -> tuple[Trainer, Any]:
    """Epochs of minibatch Adam steps on one batch -> (trainer, mean entropy)."""
    size = batch.action.shape[0]
    count = min(ppo.minibatches, size)
    used = size - size % count

    def minibatch(carry, index):
        net, state = carry
        part = jax.tree.map(lambda x: x[index], batch)
        (_, entropy), grads = jax.value_and_grad(ppo_loss, has_aux=True)(net, ppo, trainer.policy.norm, part)
        updates, state = optimizer(ppo).update(grads, state)
        return (optax.apply_updates(net, updates), state), entropy

    orders = jax.vmap(lambda k: jax.random.permutation(k, size)[:used])(jax.random.split(key, ppo.epochs))
    carry = (trainer.policy.net, trainer.optimizer)
    (net, state), entropy = lax.scan(minibatch, carry, orders.reshape(ppo.epochs * count, -1))
    return trainer._replace(policy=trainer.policy._replace(net=net), optimizer=state), entropy.mean()


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def rollout(
    mesh, model: lm.Model, fast: lm.Fast, credit: int, chunk: int, lower, upper, slow, env: Env, tokens_N, text_NTU, policy: Policy, key
):
    """Read N documents, tokens (N, T*C + 1) and their text features, spread over the mesh, with actions
    sampled from the policy, the budget not enforced -> (steps, rewards (N, T)), whole on every device."""
    total, chunks = text_NTU.shape[:2]

    def read(lower, shared, inputs):
        (upper, slow, env, policy), (tokens, text_TU, k) = shared, inputs
        document = prepare(model, fast, chunk, lower, upper, tokens, text_TU)
        steps = episode(model, fast, upper, slow, env, document, make_rule(chunks, policy, hard=False), k, credit)
        if credit:
            return steps._replace(credit_T=()), rewards(steps.credit_T)
        skip = episode(model, fast, upper, slow, env, document, make_rule(chunks, policy, plan=0), k)
        return steps, next_gains(skip.loss, steps.loss)

    device = lambda lower, shared, documents: lax.map(partial(read, lower, shared), documents)
    documents = (tokens_N, text_NTU, jax.random.split(key, total))
    return lm.everywhere(mesh, lm.on_devices(mesh, device, lower, (upper, slow, env, policy), documents))


@partial(jax.jit, static_argnums=0)
def train_iteration(ppo: Ppo, env: Env, steps: Step, reward_NT, trainer: Trainer, key):
    """PID -> GAE -> epochs on one rollout, steps and rewards (N, T). The same key and trainer give the same
    result. The features' normaliser learns last: what the rollout sampled with is what the epochs train.

    Returns (trainer, {name: scalar})."""
    cost, limit, unit = steps.cost.mean(), env.budget / steps.cost.shape[1], cost_unit(env)
    pid = pid_update(ppo.gains, trainer.pid, cost / unit, limit / unit)
    batch = make_batch(ppo, steps._replace(cost=steps.cost / unit), reward_NT, limit / unit, pid.multiplier)
    trainer, entropy = improve(ppo, trainer._replace(pid=pid), batch, key)
    norm = update_normaliser(trainer.policy.norm, batch.features_U)
    trainer = trainer._replace(policy=trainer.policy._replace(norm=norm), iteration=trainer.iteration + 1)
    rates = (steps.action[..., None] == jnp.arange(len(ACTIONS))).mean((0, 1))
    figures = {"loss": steps.loss.mean(), "gain": reward_NT.mean(), "cost": cost, "limit": limit}
    figures |= {"lambda": pid.multiplier, "entropy": entropy, "dropped": trainer.optimizer.total_notfinite}
    return trainer, figures | {f"rate_{name}": rates[i] for i, name in enumerate(ACTIONS)}


# --- 6. Warm start --------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def teach(ppo: Ppo, steps: Step, reward_NT, trainer: Trainer, key) -> tuple[Trainer, Any]:
    """Regress what each action gave, in rollouts of the policy that spends the budget blindly, on the
    features: afterwards logits - SKIP's logit are that prediction, in units of the rewards' root mean square, less a
    price per cost. So argmax(logits - price * cost) is the best decision that the prediction allows, and PPO
    goes on from there. -> (trainer, error of that prediction, as a share of what it would be without one)"""
    norm = update_normaliser(trainer.policy.norm, steps.features_U.reshape(-1, len(FEATURES)))
    x, action, reward = (v.reshape(-1, *v.shape[2:]) for v in (steps.features_U, steps.action, reward_NT))
    rewarded = (action > 0) | (not ppo.credit)  # a SKIP is credited nothing
    scale = jnp.sqrt((reward**2).sum() / jnp.maximum(rewarded.sum(), 1)) + 1e-8
    blind_A = trainer.policy.net["actor"]["bias"]
    net = trainer.policy.net | {"actor": trainer.policy.net["actor"] | {"bias": jnp.zeros_like(blind_A)}}
    adam = optax.adamw(ppo.teach_rate, weight_decay=1.0)

    def loss_fn(net, x, action, reward):
        heads = apply_policy(Policy(net, norm), x)
        skip = heads.logits_A[:, :1] if ppo.credit else 0.0  # a SKIP has its share of the next chunk's gain
        given = jnp.take_along_axis(heads.logits_A - skip, action[:, None], -1)[:, 0]
        error = ((given - reward / scale) ** 2).mean()
        return error + ppo.value_weight * ((heads.value - reward) ** 2).mean(), error

    def step(carry, k) -> Any:
        net, state = carry
        rows = jax.random.randint(k, (min(256, len(x)),), 0, len(x))
        (_, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(net, x[rows], action[rows], reward[rows])
        updates, state = adam.update(grads, state, net)
        return (optax.apply_updates(net, updates), state), error

    carry: Any = net, adam.init(net)
    (net, _), errors = lax.scan(step, carry, jax.random.split(key, ppo.teach_steps))
    net["actor"]["bias"] = net["actor"]["bias"] + blind_A
    return trainer._replace(policy=Policy(net, norm)), errors[-100:].mean() / (((reward / scale) ** 2).mean() + 1e-8)
