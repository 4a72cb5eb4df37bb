"""When to learn: the policy, its features, the episode, and PPO under a compute budget.

For every chunk t of a document, in this order (`read_step`):

    predict   l_t = loss of chunk t under W_t          always before learning from chunk t
    decide    a_t ~ pi(a | features of what has been read, budget left)
    learn     W_{t+1} = W_t after STEPS[a_t] = 0, 1, 2 or 4 inner steps on chunk t

    reward    r_t = sum_{u>t} [l_u(W_t) - l_u(W_{t+1})]    what this update alone gave the chunks to come
    cost      c_t in units of SKIP's
    maximise  E[sum r]  subject to  E[sum c] <= budget

The rewards add up to the gain over never learning, sum_t [l_t(W_0) - l_t(W_t)], and say which update each
part of it came from: no action is praised or blamed for what others did, and a SKIP earns exactly 0.

PPO (Schulman et al. 2017) on (A_R - lambda A_C) / (1 + lambda), the advantages of reward and cost; a PID
controller on the mean cost sets lambda (Stooke et al. 2020, arXiv 2007.03964).

Dimensions, beside those of model.py: A actions (not H K)   U features   Q quantiles
"""

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
NOMINAL = (1.0, 3.0, 6.0, 12.0)  # forward passes: 3 a step, its backward is 2; the first forward is SKIP's


# --- 1. Types ---------------------------------------------------------------------------------------
class Document(NamedTuple):
    """A document ready to be read: everything that no decision changes, with a leading axis T."""

    windows: lm.Window
    text_TU: Any  # (T, 16) features of the tokens alone, of `text_features`


class Chunk(NamedTuple):
    """One chunk of a document, as a step of an episode reads it."""

    window: lm.Window
    text_U: Any
    t: Any  # its place, from 0
    chunks: Any  # T, of the whole document


class Env(NamedTuple):
    """What the actions cost, and what may be spent."""

    costs_A: Any  # (4,), SKIP = 1
    budget: Any  # total cost allowed for one document


class Memory(NamedTuple):
    """What is carried from chunk to chunk, before chunk t."""

    state: lm.State  # W_t and what its optimiser keeps
    counts_A: Any  # how often each action was taken: the cost so far, without rounding errors that add up
    loss_average: Any  # of the losses, nats: a running average with 0.8 of the old value each chunk
    cost_average: Any  # of the actions' costs, likewise


class Step(NamedTuple):
    """What one chunk of an episode leaves behind; stacked on T."""

    features_U: Any
    mask_A: Any  # actions that were allowed
    action: Any
    log_prob: Any  # of the action under the policy
    value: Any  # what the policy predicted, as in `Heads`
    cost_value: Any
    loss: Any  # nats per token, before learning
    cost: Any  # of the action
    dropped: Any  # inner steps of the action that would not have been finite, and were not taken
    probed: Any  # norm of the inner loss's gradient, inner loss; zeros unless asked for
    credit_T: Any = ()  # what the update on each earlier chunk took off this chunk's loss


class Normaliser(NamedTuple):
    """Running mean and variance of the features."""

    count: Any  # chunks seen
    mean_U: Any
    var_U: Any
    keep_U: Any  # 0 for features that the policy is not to see


class Policy(NamedTuple):
    """Weights of a two-layer tanh network with three heads, and its input's normaliser."""

    net: dict[str, Any]
    norm: Normaliser


class Heads(NamedTuple):
    """What the policy says of a chunk."""

    logits_A: Any
    value: Any  # predicted sum of rewards from this one on, discounted: at gamma 0 this one alone
    cost_value: Any  # of the costs above the budget per chunk, likewise


# --- 2. Features ------------------------------------------------------------------------------------
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
GROUPS = {
    "confidence": ("loss", "loss_spread", "entropy", "top_probability"),
    "activation": ("below_rms", "top_rms", "below_spread", "top_spread", "adapter_share", "topic_shift"),
    "attention": ("attention_entropy", "attention_on_context", "attention_on_first", "attention_distance"),
    "code": tuple(CODE_PATTERNS),
    "history": ("loss_trend", "recent_cost", "budget_left", "document_left"),
    "sequence": ("distinct", "new_tokens", "seen_bigrams", "seen_6grams", "unigram_surprisal", "compression"),
    "ahead": ("comes_again", "new_comes_again"),  # of the text to come: off unless asked for
}
DEFAULT_GROUPS = tuple(group for group in GROUPS if group != "ahead")
FEATURES = tuple(name for group in GROUPS.values() for name in group)
SIGNALS = (*FEATURES, "gradient_norm", "inner_loss")  # for gates; the last two are `Step.probed`
GLIMPSES = 16  # evenly spaced rows of logits, and queries of attention, that features look at


def token_classes(token_texts: list[str]) -> np.ndarray:
    """Tell which kinds of code each token of the vocabulary contains (0 or 1) -> (V, 8)."""
    kinds = [[bool(re.search(CODE_PATTERNS[name], text)) for name in GROUPS["code"]] for text in token_texts]
    return np.asarray(kinds, np.float32)


def ngrams(x: np.ndarray, n: int) -> list[bytes]:
    """List all runs of n tokens in x (C,), in order."""
    return [x[i : i + n].tobytes() for i in range(len(x) - n + 1)]


def text_features(tokens: np.ndarray, chunk: int, classes: np.ndarray) -> np.ndarray:
    """Compute the features of a document (T*C + 1,) that need its tokens alone -> float32 (T, 16).
    Code: the share of a chunk's tokens in each class, of the table (V, 8) of `token_classes`. Sequence: the
    shares of its tokens that are distinct and that are new to the document, of its 2- and 6-grams that an
    earlier chunk has; mean surprisal, nats, under the counts of earlier tokens plus one; compressed size over
    raw size. Ahead: `count_again`."""
    rows, counts = [], np.zeros(len(classes))
    seen: dict[int, set[bytes]] = {2: set(), 6: set()}
    for low in range(1, len(tokens), chunk):
        x = tokens[low : low + chunk]
        distinct, new = len(np.unique(x)) / len(x), (counts[x] == 0).mean()
        surprisal = -np.log((counts[x] + 1) / (counts.sum() + len(counts))).mean()
        known = []
        for n, old in seen.items():
            grams = ngrams(x, n)
            known.append(sum(gram in old for gram in grams) / max(len(grams), 1))
            old.update(grams)
        compression = len(zlib.compress(x.astype(np.uint32).tobytes())) / (4 * len(x))
        rows.append([*classes[x].mean(0), distinct, new, *known, surprisal, compression])
        np.add.at(counts, x, 1)
    return np.concatenate([np.asarray(rows), count_again(tokens, chunk)], 1, dtype=np.float32)


def count_again(tokens: np.ndarray, chunk: int) -> np.ndarray:
    """Count how often the 3-grams of each chunk of a document (T*C + 1,) come again -> (T, 2), log(1 + n).
    n is the number of later chunks that have a 3-gram, summed over all 3-grams of the chunk, and over those
    that no earlier chunk has."""
    grams = [set(ngrams(tokens[low : low + chunk], 3)) for low in range(1, len(tokens), chunk)]
    first: dict[bytes, int] = {}
    for t in reversed(range(len(grams))):
        first |= dict.fromkeys(grams[t], t)
    later, rows = Counter(), []
    for t in reversed(range(len(grams))):
        rows.append([sum(later[g] for g in grams[t]), sum(later[g] for g in grams[t] if first[g] == t)])
        later.update(grams[t])
    return np.log1p(np.asarray(rows[::-1]))


def attention_features(reading: lm.Reading, start):
    """Tell where GLIMPSES queries of the last block look; the chunk is at `start` of the S keys -> means over
    these and the heads: entropy over log S, mass on the context and on the first key, distance in chunks."""
    H, C, K = reading.query_HCK.shape
    G, S, _ = reading.key_GSK.shape
    stride = max(C // GLIMPSES, 1)
    query, key_HSK = reading.query_HCK[:, stride - 1 :: stride], jnp.repeat(reading.key_GSK, H // G, 0)
    query, key_HSK = query.astype(jnp.float32), key_HSK.astype(jnp.float32)
    position, key = start + jnp.arange(stride - 1, C, stride)[:, None], jnp.arange(S)
    scores = jnp.einsum("hqk,hsk->hqs", query, key_HSK) * K**-0.5
    p = jax.nn.softmax(jnp.where(key <= position, scores, -1e30))
    entropy = -(p * jnp.log(p + 1e-30)).sum(-1).mean() / np.log(S)
    on_context, distance = (p * (key < start)).sum(-1).mean(), (p * (position - key)).sum(-1).mean() / C
    return entropy, on_context, p[..., 0].mean(), distance


def features(reading: lm.Reading, chunk: Chunk, memory: Memory, env: Env):
    """Compute the features of a chunk that was just read -> float32 (34,), FEATURES: 32 and the 2 of `ahead`.
    Confidence: mean and spread of its losses, nats; of GLIMPSES rows the entropy, nats, and the largest
    probability. Activation: of its rows below any fast weight and on top, size (log rms) and spread (from 0,
    all are one, to 1, nothing in common); size of what the adapters add over that on top; 1 - cosine with the
    chunk before. History: this loss against its running average, recent cost, the share of the chunks left
    that the budget left could learn from with UPDATE_1, the share of the document left."""
    window, C = chunk.window, chunk.window.targets_C.shape[-1]
    log_p = jax.nn.log_softmax(reading.logits_CV[:: max(C // GLIMPSES, 1)])
    p = jnp.exp(log_p)
    confidence = reading.loss, reading.losses_C.std(), -(p * log_p).sum(-1).mean(), p.max(-1).mean()
    rms = lambda x: jnp.sqrt((x * x).mean() + 1e-12)
    spread = lambda x_CD: 1 - (x_CD.mean(0) ** 2).sum() / (x_CD * x_CD).sum(-1).mean()
    below, top = lm.slice_rows(window.x_SD, window.start, C), reading.top_CD
    center, context = below.mean(0), window.x_SD[:C].mean(0)
    cosine = (center * context).sum() / (jnp.linalg.norm(center) * jnp.linalg.norm(context) + 1e-12)
    added = rms(reading.outputs_MCD) / rms(top)
    activation = jnp.log(rms(below)), jnp.log(rms(top)), spread(below), spread(top), added, 1 - cosine
    chunks_left = chunk.chunks - chunk.t
    budget_left = env.budget - (memory.counts_A * env.costs_A).sum()
    affordable = (budget_left / chunks_left - env.costs_A[0]) / (env.costs_A[1] - env.costs_A[0])
    trend = jnp.where(chunk.t == 0, 0.0, reading.loss - memory.loss_average)
    history = trend, memory.cost_average, affordable, chunks_left / chunk.chunks
    attention, text_U = attention_features(reading, window.start), chunk.text_U
    values = (*confidence, *activation, *attention, *text_U[:8], *history, *text_U[8:])
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in values])


# --- 3. The policy ----------------------------------------------------------------------------------
def init_policy(key, groups: tuple[str, ...] = DEFAULT_GROUPS, hidden: int = 64) -> Policy:
    """Make an untrained policy that sees these groups of features, with orthogonal weights."""
    layers = {"hidden_1": (len(FEATURES), hidden, 2**0.5), "hidden_2": (hidden, hidden, 2**0.5)}
    layers |= {"actor": (hidden, len(ACTIONS), 0.01), "critic": (hidden, 1, 1), "cost_critic": (hidden, 1, 1)}
    net = {}
    for i, (name, (rows, columns, gain)) in enumerate(layers.items()):
        weight = jax.nn.initializers.orthogonal(gain)(jax.random.fold_in(key, i), (rows, columns))
        net[name] = {"weight": weight, "bias": jnp.zeros(columns)}
    keep_U = jnp.asarray([float(any(name in GROUPS[group] for group in groups)) for name in FEATURES])
    return Policy(net, Normaliser(jnp.float32(1e-4), jnp.zeros_like(keep_U), jnp.ones_like(keep_U), keep_U))


def update_normaliser(n: Normaliser, x_NU) -> Normaliser:
    """Merge a batch of features (N, U) into the normaliser (Welford's method, batch by batch)."""
    count, mean, var = x_NU.shape[0], x_NU.mean(0), x_NU.var(0)
    total, delta = n.count + count, mean - n.mean_U
    merged = (n.var_U * n.count + var * count + delta**2 * n.count * count / total) / total
    return n._replace(count=total, mean_U=n.mean_U + delta * count / total, var_U=merged)


def apply_policy(policy: Policy, x_U) -> Heads:
    """Run the policy on raw features (..., 34) -> heads with logits (..., 4) and values (...)."""
    norm, net = policy.norm, policy.net
    x = norm.keep_U * jnp.clip((x_U - norm.mean_U) / jnp.sqrt(norm.var_U + 1e-6), -5, 5)
    layer = lambda name, x: x @ net[name]["weight"] + net[name]["bias"]
    x = jnp.tanh(layer("hidden_2", jnp.tanh(layer("hidden_1", x))))
    return Heads(layer("actor", x), layer("critic", x)[..., 0], layer("cost_critic", x)[..., 0])


def looks_ahead(policy: Policy) -> bool:
    """Tell whether a policy sees the features of the text to come."""
    return bool(policy.norm.keep_U[FEATURES.index(GROUPS["ahead"][0])])


# --- 4. Rules: how an action is chosen --------------------------------------------------------------
# Each gate learns where its signal is high; the online one is that of arXiv 2601.00894.
GATES = {"loss_threshold": "loss", "entropy_threshold": "entropy", "gradient_threshold": "gradient_norm"}
GATES |= {"online_gate": "inner_loss", "ahead_threshold": "new_comes_again"}
DRIFT = 0.3  # standard deviations that the online gate's threshold rises for each UPDATE_1 over the even pace
QUANTILES = np.linspace(0, 1, 33)  # of scores on validation documents: of a signal, or of a preference
PACE = 1.7  # of gates and policy: how much faster than evenly they try to spend, as early updates help longer


class Rule(NamedTuple):
    """How actions are chosen: one structure for all rules, so that one compiled program runs them all."""

    kind: Any  # place in RULES
    policy: Policy
    plan_T: Any = np.zeros(1, np.int32)  # follow: the action on each chunk
    signal: Any = np.int32(0)  # gate: place in SIGNALS
    scores_Q: Any = np.zeros(len(QUANTILES), np.float32)  # gate, price: validation scores
    drift: Any = np.float32(0)  # online gate: rise of its threshold for each unit of cost above the even pace
    low: Any = np.int32(0)  # gate, price: the action where the score is low
    high: Any = np.int32(0)  # and where it is high, the next dearer one
    hard: Any = np.bool_(True)  # an action that would break the budget becomes the largest allowed below it


# Each of these four gives an action, from the values of SIGNALS, the policy's logits (4,) of actions that are
# allowed, the score above which `high` is taken, and the chunk's place in the plan.
def follow(rule: Rule, signals, logits_A, threshold, place, key):
    """Take the plan's action."""
    return rule.plan_T[place]


def gate(rule: Rule, signals, logits_A, threshold, place, key):
    """Take `high` where a signal is high."""
    return jnp.where(signals[rule.signal] > threshold, rule.high, rule.low)


def sample(rule: Rule, signals, logits_A, threshold, place, key):
    """Draw an action from the policy."""
    return jax.random.categorical(key, logits_A)


def price(rule: Rule, signals, logits_A, threshold, place, key):
    """Take `high` where the policy prefers it to `low` by more than a price, the threshold."""
    return jnp.where(logits_A[rule.high] - logits_A[rule.low] > threshold, rule.high, rule.low)


RULES = (follow, gate, sample, price)


def make_rule(function, policy: Policy, **fields) -> Rule:
    """Make the rule that chooses by one of RULES, with NumPy fields of the same types whichever it is."""
    like = Rule._field_defaults
    typed = {name: np.array(x, like[name].dtype, ndmin=like[name].ndim) for name, x in fields.items()}
    return Rule(np.int32(RULES.index(function)), policy, **typed)


def choose(rule: Rule, signals, heads: Heads, chunk: Chunk, memory: Memory, env: Env, key):
    """Choose the action on a chunk -> (action, its log-probability under the policy, actions allowed (4,)).
    Allowed are SKIP and what leaves enough for `low` on all later chunks. For gate and price, the budget left
    pays for `high` on a share of the chunks left; the threshold is what PACE times that share of the
    validation scores exceeds, -inf where that is all. An online gate's share is the whole budget's, without
    PACE, and its threshold rises with spending above the even pace. A plan of another length is stretched."""
    costs_A, spent, even = env.costs_A, (memory.counts_A * env.costs_A).sum(), env.budget / chunk.chunks
    after_A = spent + costs_A + (chunk.chunks - 1 - chunk.t) * costs_A[rule.low]
    mask_A = ((after_A <= env.budget * (1 + 1e-6)) | ~rule.hard).at[0].set(True)
    logits_A = jnp.where(mask_A, heads.logits_A, -1e9)
    online = rule.drift > 0
    per_chunk = jnp.where(online, even, (env.budget - spent) / (chunk.chunks - chunk.t))
    share = (per_chunk - costs_A[rule.low]) / jnp.maximum(costs_A[rule.high] - costs_A[rule.low], 1e-6)
    share = jnp.where(online, share, PACE * share)
    threshold = jnp.interp(1 - share, QUANTILES, rule.scores_Q) + rule.drift * (spent - chunk.t * even)
    threshold = jnp.where(share > 1 - 1e-3, -jnp.inf, threshold)
    place = chunk.t * len(rule.plan_T) // chunk.chunks
    wanted = lax.switch(rule.kind, RULES, rule, signals, logits_A, threshold, place, key)
    actions = jnp.arange(len(ACTIONS))
    action = jnp.max(jnp.where(mask_A & (actions <= wanted), actions, 0))
    return action, jax.nn.log_softmax(logits_A)[action], mask_A


def affordable_updates(costs_A, budget: float, chunks: int) -> tuple[int, int]:
    """Find the cheapest action that could spend the whole budget if taken everywhere -> (action, count).
    `count` chunks can have it within the budget, if the others have the action below it."""
    costs = np.asarray(costs_A, float)
    action = 1 + int((costs[1:-1] * chunks < budget * (1 - 1e-6)).sum())
    count = int((budget * (1 + 1e-6) - chunks * costs[action - 1]) / (costs[action] - costs[action - 1]))
    return action, min(max(count, 0), chunks)


def plan_schedules(costs_A, budget: float, chunks: int, seed) -> dict[str, np.ndarray]:
    """Make the plans (T,) that spend the budget without looking: evenly, at the front, at random."""
    action, count = affordable_updates(costs_A, budget, chunks)
    chosen = {
        "every_n": np.arange(count) * chunks // max(count, 1),
        "front_loaded": np.arange(count),
        "random": np.random.default_rng(seed).permutation(chunks)[:count],
    }
    return {name: np.where(np.isin(np.arange(chunks), at), action, action - 1) for name, at in chosen.items()}


def plan_oracle(costs_A, budget: float, worth_T: np.ndarray) -> np.ndarray:
    """Make the plan (T,) that spends the budget where it is worth most: a bound, not a method.
    worth_T is what each chunk's update gave all later chunks when every chunk was learned from."""
    action, count = affordable_updates(costs_A, budget, len(worth_T))
    rank_T = np.argsort(np.argsort(-worth_T, kind="stable"))
    return np.where(rank_T < count, action, action - 1)


class Calibrated(NamedTuple):
    """A policy, and the quantiles of validation scores that gates and policy choose by."""

    policy: Policy
    signals_SQ: Any  # of each of SIGNALS (S)
    prefers_AQ: Any  # of the policy's logits of UPDATE_1, 2, 4 over those of the action below (A is 3)


def calibrate(policy: Policy, steps: Step) -> Calibrated:
    """Calibrate gates and policy on validation documents that were read with probes, steps (N, T)."""
    signals = np.concatenate([steps.features_U, steps.probed], -1).reshape(-1, len(SIGNALS))
    prefers = np.diff(np.asarray(apply_policy(policy, steps.features_U).logits_A), axis=-1)
    quantiles = lambda x_NS: np.quantile(x_NS, QUANTILES, 0).T.astype(np.float32)
    return Calibrated(policy, quantiles(signals), quantiles(prefers.reshape(-1, len(ACTIONS) - 1)))


def calibrated_rule(known: Calibrated, name: str, env: Env, chunks: int) -> Rule:
    """Make the gate `name`, or the policy, at the budget of `env` for a document of that many chunks."""
    high, _ = affordable_updates(env.costs_A, float(env.budget), chunks)
    pair = {"low": high - 1, "high": high}
    if name == "policy":
        return make_rule(price, known.policy, scores_Q=known.prefers_AQ[high - 1], **pair)
    signal = SIGNALS.index(GATES[name])
    scores_Q = np.asarray(known.signals_SQ[signal])
    drift = DRIFT * scores_Q.std() / (env.costs_A[1] - env.costs_A[0]) if name == "online_gate" else 0.0
    return make_rule(gate, known.policy, signal=signal, scores_Q=scores_Q, drift=drift, **pair)


# --- 5. The episode ---------------------------------------------------------------------------------
def init_memory(fast: lm.Fast, slow) -> Memory:
    """Make the memory before the first chunk: W_0, nothing spent."""
    state = lm.init_state(fast, slow)
    zeros = partial(jnp.zeros_like, state.steps)  # on a mesh each device's own, as jnp.zeros would not be
    return Memory(state, zeros(shape=len(ACTIONS)), zeros(), zeros())


def read_step(
    spec: lm.Spec, weights: lm.Weights, env: Env, rule: Rule, memory: Memory, chunk: Chunk, key, probe=False
) -> tuple[Memory, Step]:
    """Predict one chunk, decide, learn -> (memory after it, what it leaves behind).
    With `probe` gates see the inner loss and the norm of its gradient, which the cost leaves out."""
    reading, learn, inner = lm.read_chunk(spec, weights, memory.state, chunk.window)
    probed = jnp.stack(inner()) if probe else jnp.zeros(2)
    x_U = features(reading, chunk, memory, env)
    heads = apply_policy(rule.policy, x_U)
    action, log_prob, mask_A = choose(rule, jnp.append(x_U, probed), heads, chunk, memory, env, key)
    state, cost = learn(action), env.costs_A[action]
    dropped = jnp.asarray(lm.STEPS, jnp.float32)[action] - (state.steps - memory.state.steps)
    average = lambda old, new: jnp.where(chunk.t == 0, new, 0.8 * old + 0.2 * new)
    averages = average(memory.loss_average, reading.loss), average(memory.cost_average, cost)
    after = Memory(state, memory.counts_A.at[action].add(1), *averages)
    return after, Step(x_U, mask_A, action, log_prob, *heads[1:], reading.loss, cost, dropped, probed)


def credit_updates(loss_of, loss, past, learned_T):
    """Find what the update on each chunk took off this chunk's loss -> (T,), nats; 0 where none was taken.
    It is loss_of(weights before it, of `past`) - loss_of(weights after it). From the newest back, the loss
    after an update is that before the next, and after the newest it is `loss`."""

    def one(after, update):
        w, learned = update
        before = lm.change_if(learned, lambda after: jnp.where(learned, loss_of(w), after), after)
        return before, before - after

    return lax.scan(one, loss, (past, learned_T), reverse=True)[1]


def episode(
    spec: lm.Spec, weights: lm.Weights, env: Env, document: Document, rule: Rule, key, credit=0, probe=False
) -> Step:
    """Read one document chunk by chunk -> steps, stacked on T.
    With `credit` n > 0 the losses of every n-th chunk, from a random one on, are divided among the updates
    before it, times n: in expectation what dividing all of them gives."""
    T = len(document.text_TU)
    number = lm.largest(jax.random.randint(jax.random.fold_in(key, T), (), 0, 2**30))
    phase = number % max(credit, 1)  # one for all documents side by side

    def read(carry, inputs):
        (memory, past, learned_T), (window, text_U, t) = carry, inputs
        chunk = Chunk(window._replace(start=lm.largest(window.start)), text_U, t, T)
        if credit:  # W_t is written before the others are read, or XLA would copy all of them
            past = jax.tree.map(lambda old, new: old.at[chunk.t].set(new), past, memory.state.w)
        own_key = jax.random.fold_in(key, chunk.t)
        memory, step = read_step(spec, weights, env, rule, memory, chunk, own_key, probe)
        if credit:
            loss_of = lambda w: lm.predict(spec, weights, w, chunk.window).loss
            divide = lambda: credit * credit_updates(loss_of, step.loss, past, learned_T)
            nothing = lambda: jnp.zeros_like(step.loss, shape=T)
            step = step._replace(credit_T=lax.cond(chunk.t % credit == phase, divide, nothing))
            learned_T = learned_T.at[chunk.t].set(step.action > 0)
        return (memory, past, learned_T), step

    memory, past, learned_T = init_memory(spec.fast, weights.slow), (), ()
    if credit:  # W_0 ... W_t, and which chunks before t were learned from
        past = jax.tree.map(lambda w: jnp.zeros_like(w, shape=(T, *w.shape)), memory.state.w)
        learned_T = jnp.zeros_like(memory.state.steps, shape=T, dtype=bool)
    return lax.scan(read, (memory, past, learned_T), (*document, jnp.arange(T)))[1]


@partial(jax.jit, static_argnums=(0,), static_argnames=("credit",))
def rollout(spec: lm.Spec, weights: lm.Weights, env: Env, documents, policy: Policy, key, credit: int):
    """Read N documents with sampled actions, the budget not enforced -> (steps, rewards (N, T)).
    `documents` are tokens (N, T*C + 1) and their text features, spread over the mesh; what comes back is
    whole on every device. A reward is the sum of what an update took off all later losses."""

    def read(weights, env, rule, spec, inputs):
        tokens, text_TU, key = inputs
        document = Document(lm.make_windows(spec, weights, tokens), text_TU)
        steps = episode(spec, weights, env, document, rule, key, credit)
        return steps._replace(credit_T=()), steps.credit_T.sum(0)

    device = lambda weights, shared, inputs: lm.side_by_side(spec, partial(read, weights, *shared), inputs)
    rule, keys = make_rule(sample, policy, hard=False), jax.random.split(key, len(documents[0]))
    found = lm.on_devices(spec.mesh, device, weights, (env, rule), (*documents, keys))
    return lax.with_sharding_constraint(found, jax.NamedSharding(spec.mesh, lm.WHOLE))


# --- 6. Advantages and the multiplier ---------------------------------------------------------------
def gae(reward_T, value_T, gamma: float, lam: float):
    """Estimate advantages (T,), with nothing to come after the last chunk (Schulman et al. 2016, eq. 16)."""

    def back(carry, inputs):
        (advantage, next_value), (reward, value) = carry, inputs
        advantage = reward + gamma * next_value - value + gamma * lam * advantage
        return (advantage, value), advantage

    return lax.scan(back, (0.0, 0.0), (reward_T, value_T), reverse=True)[1]


def cost_unit(env: Env):
    """Compute half of what UPDATE_1 costs above SKIP, which is 1 of nominal cost.
    The multiplier prices costs in this unit, so that its gains mean the same in every currency."""
    return (env.costs_A[1] - env.costs_A[0]) / 2


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


class Pid(NamedTuple):
    """State of the multiplier's controller, in units of `cost_unit`."""

    integral: Any
    proportional: Any
    past: Any  # (delay,) smoothed costs, oldest first
    multiplier: Any  # lambda


def pid_update(gains: PidGains, pid: Pid, cost, limit) -> Pid:
    """Take one step of a positional PID on the mean undiscounted cost (Stooke et al. 2020, algorithm 2).
    Error and cost are smoothed; the derivative acts on the smoothed cost, only when it rises."""
    delta = cost - limit
    integral = jnp.clip(pid.integral + gains.ki * delta, 0, gains.integral_max)
    proportional = gains.alpha_p * pid.proportional + (1 - gains.alpha_p) * delta
    smooth = gains.alpha_d * pid.past[-1] + (1 - gains.alpha_d) * cost
    derivative = jnp.maximum(0, smooth - pid.past[0])
    multiplier = jnp.clip(gains.kp * proportional + integral + gains.kd * derivative, 0, gains.max)
    return Pid(integral, proportional, jnp.append(pid.past[1:], smooth), multiplier)


# --- 7. PPO -----------------------------------------------------------------------------------------
class Ppo(NamedTuple):
    """Hyperparameters of PPO and its warm start (hashable: a static argument)."""

    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 2e-3
    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    credit: int = 3  # rewards are taken from every 3rd chunk's loss, as in `episode`
    gamma: float = 0.0  # a reward spans all later chunks; that later updates then gain less is left out
    gae_lambda: float = 0.95  # of no effect where gamma is 0
    gradient_clip: float = 0.5
    teach_steps: int = 300  # Adam steps of the warm start, each on 256 chunks
    teach_rate: float = 5e-4
    gains: PidGains = PidGains()


class Batch(NamedTuple):
    """Steps of all documents of an iteration, flattened: leading axis N * T."""

    steps: Step
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
    """Make Adam; a step whose gradient is not finite is dropped, and counted in `total_notfinite`."""
    adam = optax.chain(optax.clip_by_global_norm(ppo.gradient_clip), optax.adam(ppo.learning_rate, eps=1e-5))
    return optax.apply_if_finite(adam, 2**30)


def logits_on_budget(costs_A, limit: float) -> np.ndarray:
    """Find the logits (4,) of the distribution of largest entropy that costs at most `limit` on average.
    They are -beta (cost - SKIP's): beta is a price, 0 where the uniform distribution is cheap enough."""
    costs = np.asarray(costs_A, float)
    mean_cost = lambda beta: scipy.special.softmax(-beta * costs) @ costs
    highest = 50.0 / (costs[1] - costs[0])  # hardly anything but SKIP is left
    limit = np.clip(limit, mean_cost(highest), mean_cost(0.0))
    beta = scipy.optimize.brentq(lambda beta: mean_cost(beta) - limit, 0.0, highest)
    return -beta * (costs - costs[0])


def init_trainer(key, ppo: Ppo, env: Env, chunks: int, groups: tuple[str, ...] = DEFAULT_GROUPS) -> Trainer:
    """Make a trainer whose policy spends the budget from the start. The cost of a uniform one, driven down by
    the multiplier, would overshoot (measured: 27 of 40 iterations below the budget)."""
    limit, policy = float(env.budget) / chunks, init_policy(key, groups)
    policy.net["actor"]["bias"] = jnp.asarray(logits_on_budget(env.costs_A, limit), jnp.float32)
    cost = jnp.full(ppo.gains.delay, limit / cost_unit(env), jnp.float32)
    pid = Pid(jnp.float32(0), jnp.float32(0), cost, jnp.float32(0))  # at rest, as if it had always cost this
    return Trainer(policy, optimizer(ppo).init(policy.net), pid, jnp.int32(0))


def make_batch(ppo: Ppo, steps: Step, reward_NT, limit, multiplier) -> Batch:
    """Compute advantages of steps (N, T) document by document, and flatten them.
    Costs are in units of `cost_unit` and count from `limit`, the budget per chunk, so that the cost critic's
    targets are near zero. A_R is standardised, A_C only centred: its scale is what lambda prices."""
    advantages = jax.vmap(partial(gae, gamma=ppo.gamma, lam=ppo.gae_lambda))
    gain, cost = advantages(reward_NT, steps.value), advantages(steps.cost - limit, steps.cost_value)
    standard = (gain - gain.mean()) / (gain.std() + 1e-8)
    advantage = (standard - multiplier * (cost - cost.mean())) / (1 + multiplier)
    batch = Batch(steps, advantage, gain + steps.value, cost + steps.cost_value)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def ppo_loss(net, ppo: Ppo, norm: Normaliser, batch: Batch):
    """Compute PPO's loss (Schulman et al. 2017, eq. 7 and 9), with two critics -> (loss, entropy)."""
    steps, heads = batch.steps, apply_policy(Policy(net, norm), batch.steps.features_U)
    log_p = jax.nn.log_softmax(jnp.where(steps.mask_A, heads.logits_A, -1e9))
    ratio = jnp.exp(jnp.take_along_axis(log_p, steps.action[:, None], -1)[:, 0] - steps.log_prob)
    clipped = jnp.clip(ratio, 1 - ppo.clip, 1 + ppo.clip)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    errors = (heads.value - batch.value_target) ** 2 + (heads.cost_value - batch.cost_target) ** 2
    entropy = -(jnp.exp(log_p) * jnp.where(steps.mask_A, log_p, 0.0)).sum(-1).mean()
    return -surrogate + ppo.value_weight * errors.mean() - ppo.entropy_weight * entropy, entropy


def descend(adam: optax.GradientTransformation, loss_fn, carry, part):
    """Take one step of Adam on a part of a batch: loss_fn(net, part) gives (loss, figure)."""
    net, state = carry
    (_, figure), grads = jax.value_and_grad(loss_fn, has_aux=True)(net, part)
    updates, state = adam.update(grads, state, net)
    return (optax.apply_updates(net, updates), state), figure


def improve(ppo: Ppo, trainer: Trainer, batch: Batch, key) -> tuple[Trainer, Any]:
    """Take epochs of minibatch Adam steps on one batch -> (trainer, mean entropy)."""
    size, policy = batch.steps.action.size, trainer.policy
    count = min(ppo.minibatches, size)
    order = lambda k: jax.random.permutation(k, size)[: size - size % count]
    rows = jax.vmap(order)(jax.random.split(key, ppo.epochs)).reshape(ppo.epochs * count, -1)
    step = partial(descend, optimizer(ppo), lambda net, part: ppo_loss(net, ppo, policy.norm, part))
    parts = jax.tree.map(lambda x: x[rows], batch)
    (net, state), entropy = lax.scan(step, (policy.net, trainer.optimizer), parts)
    return trainer._replace(policy=policy._replace(net=net), optimizer=state), entropy.mean()


@partial(jax.jit, static_argnums=0)
def train_iteration(ppo: Ppo, env: Env, steps: Step, reward_NT, trainer: Trainer, key):
    """Learn from one rollout, steps and rewards (N, T): PID, advantages, epochs -> (trainer, {name: scalar}).
    The features' normaliser learns last: what the rollout sampled with is what the epochs train."""
    cost, limit, unit = steps.cost.mean(), env.budget / steps.cost.shape[1], cost_unit(env)
    pid = pid_update(ppo.gains, trainer.pid, cost / unit, limit / unit)
    batch = make_batch(ppo, steps._replace(cost=steps.cost / unit), reward_NT, limit / unit, pid.multiplier)
    trainer, entropy = improve(ppo, trainer._replace(pid=pid), batch, key)
    norm = update_normaliser(trainer.policy.norm, batch.steps.features_U)
    trainer = trainer._replace(policy=trainer.policy._replace(norm=norm), iteration=trainer.iteration + 1)
    rates = (steps.action[..., None] == jnp.arange(len(ACTIONS))).mean((0, 1))
    figures = {"loss": steps.loss.mean(), "gain": reward_NT.mean(), "cost": cost, "limit": limit}
    figures |= {"lambda": pid.multiplier, "entropy": entropy, "dropped": trainer.optimizer.total_notfinite}
    return trainer, figures | {f"rate_{name}": rates[i] for i, name in enumerate(ACTIONS)}


# --- 8. Warm start ----------------------------------------------------------------------------------
@partial(jax.jit, static_argnums=0)
def teach(ppo: Ppo, steps: Step, reward_NT, trainer: Trainer, key) -> tuple[Trainer, Any]:
    """Regress what each action gave, in rollouts (N, T) of the first policy, on the features.
    Afterwards an action's logit above SKIP's is that prediction, in units of the updates' root mean square,
    less the price of its cost that the first policy's biases hold; PPO goes on from there.
    -> (trainer, error of the prediction, as a share of what it would be without one)"""
    norm = update_normaliser(trainer.policy.norm, steps.features_U.reshape(-1, len(FEATURES)))
    x, action, reward = (v.reshape(-1, *v.shape[2:]) for v in (steps.features_U, steps.action, reward_NT))
    scale = jnp.sqrt((reward**2).sum() / jnp.maximum((action > 0).sum(), 1)) + 1e-8
    actor = trainer.policy.net["actor"]
    net = trainer.policy.net | {"actor": actor | {"bias": jnp.zeros_like(actor["bias"])}}

    def loss_fn(net, part):
        x, action, reward = part
        heads = apply_policy(Policy(net, norm), x)
        given_A = heads.logits_A - heads.logits_A[:, :1]
        given = jnp.take_along_axis(given_A, action[:, None], -1)[:, 0]
        error = ((given - reward / scale) ** 2).mean()
        return error + ppo.value_weight * ((heads.value - reward) ** 2).mean(), error

    adam = optax.adamw(ppo.teach_rate, weight_decay=1.0)
    rows = jax.random.randint(key, (ppo.teach_steps, min(256, len(x))), 0, len(x))
    parts = x[rows], action[rows], reward[rows]
    (net, _), errors = lax.scan(partial(descend, adam, loss_fn), (net, adam.init(net)), parts)
    net["actor"]["bias"] = net["actor"]["bias"] + actor["bias"]
    share = errors[-100:].mean() / (((reward / scale) ** 2).mean() + 1e-8)
    return trainer._replace(policy=Policy(net, norm)), share
