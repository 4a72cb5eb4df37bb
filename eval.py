"""What a policy must beat, and how it is measured.

Every method reads the same documents, from repositories that no training stage saw, under the same
hard budget; its loss on a chunk is always taken before it learns from that chunk.

    gain             loss(SKIP) - loss(method), the same parameters that never learn
    oracle recovery  gain(method) / gain(oracle)
    cost             `nominal` and `flops`, per chunk, SKIP = 1; seconds are measured
    saving           1 - cost(policy) / cost(schedule) where the policy reaches the schedule's loss

Intervals are 95 % bootstrap intervals over repositories: chunks of one document, and documents of
one repository, are not independent.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import scipy  # scipy.stats is imported when it is first used
from jax import lax
from jax.experimental import multihost_utils

import model as lm
import rl

FIXED = {"skip": 0, "update_1": 1, "update_2": 2, "update_4": 3}
GATES = {"loss_threshold": "loss", "entropy_threshold": "entropy", "gradient_threshold": "gradient_norm", "online_gate": "inner_loss"}
BLIND = ("every_n", "front_loaded", "random")
LABELS = {
    "base": "base model, no adapters", "skip": "SKIP", "update_1": "UPDATE_1 everywhere", "update_2": "UPDATE_2 everywhere",
    "update_4": "UPDATE_4 everywhere", "every_n": "every n-th chunk", "front_loaded": "first chunks", "random": "random chunks",
    "loss_threshold": "where the loss is high", "entropy_threshold": "where the entropy is high",
    "gradient_threshold": "where the gradient is large", "online_gate": "inner loss, online threshold", "policy": "learned policy",
    "oracle": "oracle (best chunks in hindsight)",
}  # fmt: skip


class Setup(NamedTuple):
    """Everything that stays the same while documents are read."""

    model: lm.Model
    fast: lm.Fast
    chunk: int
    lower: Any
    upper: Any
    slow: Any
    env: rl.Env  # costs in the currency of the budget
    flops_A: np.ndarray  # relative to SKIP
    mesh: Any  # the devices that documents are spread over

    def at(self, budget: float) -> Setup:
        return self._replace(env=self.env._replace(budget=jnp.float32(budget)))


class Group(NamedTuple):
    """Documents that are read at once, one on each device of the mesh; the last is repeated where there
    are too few."""

    document: rl.Document  # leading axis N
    count: int  # without the repeated ones


class Read(NamedTuple):
    """One document read by one method."""

    document: int  # its place among the documents
    repo: str
    losses_T: np.ndarray
    actions_T: np.ndarray
    seconds: float  # whole document, frozen prefix included
    seed: int = 0  # of the policy
    dropped: int = 0  # inner steps that would not have been finite


class Tokens(NamedTuple):
    """A document as text: its tokens and what is computed from them alone."""

    repo: str
    tokens: np.ndarray
    text_TU: np.ndarray
    origin: np.ndarray | None = None  # (T*C,) of one's own repository: the file that each token after the first is from


def timed(function: Callable, *args) -> tuple[Any, np.ndarray]:
    """What a function returns, arrays with a document on each device, and the seconds (N,) each device took:
    nothing in reading makes one wait for another."""
    start = time.perf_counter()
    result = function(*args)
    shards = [x.addressable_shards for x in jax.tree.leaves(result)]
    places = [shard.index[0].start or 0 for shard in shards[0]]

    def wait(i: int) -> float:
        jax.block_until_ready([leaf[i].data for leaf in shards])
        return time.perf_counter() - start

    with ThreadPoolExecutor(len(places)) as pool:
        seconds = list(pool.map(wait, range(len(places))))
    places, seconds = (multihost_utils.process_allgather(np.asarray(x), tiled=True) for x in (places, seconds))
    return result, seconds[np.argsort(places)]


def fetch(tree: Any) -> Any:
    """Arrays that lie on several devices, of several hosts too, as NumPy's on every host."""
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


# --- 1. Schedules -------------------------------------------------------------------------------


def affordable_updates(costs_A, budget: float, chunks: int) -> tuple[int, int]:
    """(action, count): the cheapest action that could spend the whole budget if taken everywhere,
    and how many chunks can have it within the budget."""
    costs = np.asarray(costs_A, float)
    action = next((a for a in (1, 2, 3) if costs[a] * chunks >= budget * (1 - 1e-6)), 3)
    count = int((budget * (1 + 1e-6) - chunks * costs[0]) / (costs[action] - costs[0]))
    return action, min(max(count, 0), chunks)


def schedules(costs_A, budget: float, chunks: int, seed: int | tuple[int, int]) -> dict[str, np.ndarray]:
    """Plans (T,) that spend the budget without looking: evenly, at the front, at random."""
    action, count = affordable_updates(costs_A, budget, chunks)
    chosen = {
        "every_n": np.unique(np.arange(count) * chunks // max(count, 1)),
        "front_loaded": np.arange(count),
        "random": np.random.default_rng(seed).permutation(chunks)[:count],
    }
    return {name: np.where(np.isin(np.arange(chunks), places), action, 0) for name, places in chosen.items()}


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("credit", "probe"))
def read_group(mesh, model, fast, upper, slow, env, document: rl.Document, rule: rl.Rule, plan_NT, key, credit: int, probe: bool):
    """An episode on each device, by one rule, but each with its own plan -> steps (N, T, ...)."""

    def device(_, shared, documents):
        upper, slow, env, rule, key = shared
        read = lambda d: rl.episode(model, fast, upper, slow, env, d[0], rule._replace(plan_T=d[1]), key, credit, probe)
        return lax.map(read, documents)

    return lm.on_devices(mesh, device, {}, (upper, slow, env, rule, key), (document, plan_NT))


def run_rule(setup: Setup, group: Group, rule: rl.Rule, key, credit: int = 0, probe: bool = False) -> rl.Step:
    """Read a group; the rule's plan is (T,), or (N, T) with each document's own -> steps (N, T, ...), on their
    devices."""
    plan_NT = np.broadcast_to(rule.plan_T, group.document.text_TU.shape[:2])
    args = (setup.model, setup.fast, setup.upper, setup.slow, setup.env, group.document, rule, plan_NT, key)
    return read_group(setup.mesh, *args, credit=credit, probe=probe)


# --- 2. The oracle ------------------------------------------------------------------------------

HORIZONS = (1, 4, 8, 10_000)  # chunks that an oracle looks ahead; the last is the whole document


def credits_everywhere(setup: Setup, group: Group) -> np.ndarray:
    """(N, T, T): what the update on chunk t took off the loss of chunk u, [n, u, t], when every chunk was
    learned from."""
    chunks = group.document.text_TU.shape[1]
    action, _ = affordable_updates(setup.env.costs_A, float(setup.env.budget), chunks)
    everywhere = rl.make_rule(chunks, rl.init_policy(jax.random.key(0)), plan=action, hard=False)
    return fetch(run_rule(setup, group, everywhere, jax.random.key(0), credit=1).credit_T)[: group.count]


def oracle_plan(setup: Setup, credit_TT: np.ndarray, horizon: int) -> np.ndarray:
    """The plan (T,) that spends the budget on the chunks which gave most to the next `horizon` ones.
    It has seen the whole document: a bound, not a method (`evaluate` takes the best of it and the
    blind schedules)."""
    chunks = len(credit_TT)
    action, count = affordable_updates(setup.env.costs_A, float(setup.env.budget), chunks)
    ahead = np.subtract.outer(np.arange(chunks), np.arange(chunks))
    value = np.where((ahead > 0) & (ahead <= horizon), credit_TT, 0).sum(0)
    best = np.argsort(-value, kind="stable")[:count]
    return np.where(np.isin(np.arange(chunks), best), action, 0)


# --- 3. Calibration, on validation documents ------------------------------------------------------

PACES = (1.0, 1.7, 3.0)  # how many times what is left for each chunk a gate tries to spend; above 1 the front gets more
DRIFTS = (0.05, 0.3)  # of the online gate: standard deviations of its signal for each UPDATE_1 over the budget


def read_all(setup: Setup, groups: list[Group], rule: rl.Rule) -> rl.Step:
    """Steps of all documents (N, T, ...), with what gates see; the rule's plan is (T,), or (N, T)."""
    plan_NT = np.broadcast_to(rule.plan_T, (sum(g.count for g in groups), rule.plan_T.shape[-1]))
    found, first = [], 0
    for group in groups:
        own = rule._replace(plan_T=padded(plan_NT[first : first + group.count], setup.mesh.size))
        steps = fetch(run_rule(setup, group, own, jax.random.key(0), probe=True))
        found.append(jax.tree.map(lambda x: x[: group.count], steps))
        first += group.count
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


def calibrate(setup: Setup, groups: list[Group], policy: rl.Policy, others: bool = True) -> dict[str, Any]:
    """What the policy, and with `others` the gates and the oracle, need to know, from validation documents
    alone: tables of prices and thresholds, and for each rule the option with the lowest loss under the hard
    budget: a gate's pace or drift, the actions that the policy may take, the oracle's horizon. The tables
    serve any budget. JSON."""
    chunks, costs = groups[0].document.text_TU.shape[1], np.asarray(setup.env.costs_A)
    plan = rl.make_rule(chunks, policy, plan=schedules(costs, float(setup.env.budget), chunks, 0)["every_n"])
    seen = read_all(setup, groups, plan)
    features = seen.features_U
    signals = np.concatenate([features, seen.probed], -1)
    loss = lambda rule: float(read_all(setup, groups, rule).loss.mean(dtype=float))

    logits = np.asarray(rl.apply_policy(policy, features).logits_A)
    found = {"policy": as_json(*(rl.price_table(logits[..., : largest + 1], costs[: largest + 1]) for largest in (1, 2, 3)))}
    for name, signal in GATES.items() if others else ():
        found[name] = as_json(rl.gate_table(signals[..., rl.SIGNALS.index(signal)], 1.0))
    for name, known in found.items():
        if name == "policy":
            options = [{"all_actions": every} for every in (False, True)]
        elif name == "online_gate":
            unit = float(signals[..., rl.SIGNALS.index("inner_loss")].std() / (costs[1] - costs[0]))
            options = [{"online": drift * unit} for drift in DRIFTS]
        else:
            options = [{"pace": pace} for pace in PACES]
        found[name] = min((known | option for option in options), key=lambda c: loss(calibrated_rule(setup, chunks, name, c, policy)))
    if not others:
        return found
    credits = np.concatenate([credits_everywhere(setup, group) for group in groups])
    ahead = lambda h: plan._replace(plan_T=np.stack([oracle_plan(setup, credit_TT, h) for credit_TT in credits]))
    return found | {"oracle": {"horizon": min(HORIZONS, key=lambda h: loss(ahead(h)))}}


def as_json(*tables: rl.Table) -> dict[str, Any]:
    """Tables for one rule, one for each of its dearest actions, in six digits."""
    spend, threshold = ([[[float(f"{x:.6g}") for x in row] for row in table] for table in column] for column in zip(*tables, strict=True))
    return {"spend": spend, "threshold": threshold, "pace": 1.0, "online": 0.0}


def calibrated_rule(setup: Setup, chunks: int, name: str, known: dict[str, Any], policy: rl.Policy) -> rl.Rule:
    """The gate `name`, or the policy, with what `calibrate` found, at the setup's budget. Gates have one
    action, the cheapest that could spend the budget; the policy all up to that, or simply all."""
    action, _ = affordable_updates(setup.env.costs_A, float(setup.env.budget), chunks)
    spend, threshold = np.asarray(known["spend"]), np.asarray(known["threshold"])
    if name == "policy":
        action = 3 if known["all_actions"] else action
        table = rl.Table(spend[action - 1], threshold[action - 1])
    else:
        table = rl.Table(spend[0] * float(setup.env.costs_A[action] - setup.env.costs_A[0]), threshold[0])
    signal = GATES.get(name, "")
    return rl.make_rule(chunks, policy, signal=signal, table=table, pace=known["pace"], online=known["online"], action=action)


# --- 4. Reading documents with every method -------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1, 2))
def base_losses(mesh, model, fast, upper, windows_N: lm.Window):
    """The raw model, without adapters -> (N, T)"""
    read = lambda upper, windows: lax.map(lambda w: lm.predict(model, fast, upper, {}, None, w).loss, windows)
    device = lambda _, upper, windows: lax.map(partial(read, upper), windows)
    return lm.on_devices(mesh, device, {}, upper, windows_N)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def prefix_windows(mesh, model, fast, chunk: int, lower, upper, tokens_N) -> lm.Window:
    """The frozen prefix of whole documents, one on each device."""
    device = lambda lower, upper, documents: lax.map(lambda x: lm.windows(model, fast, lower, upper, x, chunk), documents)
    return lm.on_devices(mesh, device, lower, upper, tokens_N)


def padded(items, size: int) -> np.ndarray:
    """Stacked, the last repeated up to `size`."""
    return np.stack([*items, *[items[-1]] * (size - len(items))])


def grouped(setup: Setup, texts: list) -> list[list]:
    """As many at once as there are devices."""
    return [texts[i : i + setup.mesh.size] for i in range(0, len(texts), setup.mesh.size)]


def read_prefix(setup: Setup, texts: list) -> lm.Window:
    """Of at most as many texts as there are devices."""
    tokens_N = lm.place(setup.mesh, padded([t.tokens for t in texts], setup.mesh.size), lm.ROWS)
    return prefix_windows(setup.mesh, setup.model, setup.fast, setup.chunk, setup.lower, setup.upper, tokens_N)


def prepare(setup: Setup, texts: list[Tokens]) -> Group:
    """At most as many texts as there are devices, each ready to be read on one."""
    text_NTU = lm.place(setup.mesh, padded([t.text_TU for t in texts], setup.mesh.size), lm.ROWS)
    return Group(rl.Document(read_prefix(setup, texts), text_NTU), len(texts))


class Judged(NamedTuple):
    """A trained policy and what was calibrated with it."""

    policy: rl.Policy
    calibration: dict[str, Any]


class Evaluation(NamedTuple):
    reads: dict[str, list[Read]]  # of each method, at the budget
    frontier: dict[float, dict[str, list[Read]]]  # of the policy, and where asked for of its rivals, at each budget
    credits: list[np.ndarray]  # (T,) of each document: what each update gave the rest, learning everywhere


def evaluate(
    setup: Setup,
    texts: list[Tokens],
    policies: list[Judged],
    budgets: list[float],
    compared: list[float],
    seed: int,
    progress: Callable[[Iterable, str], Iterable],
) -> Evaluation:
    """Read every document with every method, in random order, as many at once as there are devices: the
    policy at its budget and at `budgets`, all others at its budget and at those of `compared`. Gates and
    the oracle are calibrated as for the first policy; `policies` differ in their seeds."""
    chunks = (len(texts[0].tokens) - 1) // setup.chunk
    main, (policy, calibration) = float(setup.env.budget), policies[0]
    make = partial(rl.make_rule, chunks, policy)
    rules: dict[tuple[str, float, int], rl.Rule] = {(name, main, 0): make(plan=a, hard=False) for name, a in FIXED.items()}
    for b in dict.fromkeys([main, *compared]):
        rules |= {(name, b, 0): calibrated_rule(setup.at(b), chunks, name, calibration[name], policy) for name in GATES}
    for b in dict.fromkeys([main, *budgets, *compared]):
        for i, (own, known) in enumerate(policies):
            rules["policy", b, i] = calibrated_rule(setup.at(b), chunks, "policy", known["policy"], own)
    found = Evaluation({}, {}, [])
    prefix_seconds = np.zeros(setup.mesh.size)
    for some in progress(grouped(setup, texts), "test documents"):
        first, group = len(found.credits), prepare(setup, some)
        credit_NTT = credits_everywhere(setup, group)
        found.credits.extend(map(rl.rewards, credit_NTT))
        todo = dict(rules)
        for b in dict.fromkeys([main, *compared]):
            blind = [schedules(setup.env.costs_A, b, chunks, (seed, first + n)) for n in range(len(some))]
            oracles = [oracle_plan(setup.at(b), credit_TT, calibration["oracle"]["horizon"]) for credit_TT in credit_NTT]
            for name, plans in [*((name, [plan[name] for plan in blind]) for name in BLIND), ("oracle", oracles)]:
                todo[name, b, 0] = make(plan=0)._replace(plan_T=padded(plans, setup.mesh.size))

        def read(key) -> tuple:  # losses (N, T) and, except for the base model, actions and dropped steps (N, T)
            name, b, _ = key
            if name == "base":
                return (base_losses(setup.mesh, setup.model, setup.fast, setup.upper, group.document.windows),)
            # Only the gates on the inner loss and its gradient pay, in seconds, for seeing them.
            probe = name in ("gradient_threshold", "online_gate")
            steps = run_rule(setup.at(b), group, todo[key], jax.random.key(seed), probe=probe)
            return steps.loss, steps.action, steps.dropped

        keys = [("base", main, 0), *todo]
        if not first:  # compile before the first clock starts
            jax.block_until_ready([read((name, main, 0)) for name in ("base", "skip", "online_gate")])
            prefix_seconds = np.median([timed(read_prefix, setup, some)[1] for _ in range(3)], 0)
        for name, b, i in (keys[j] for j in np.random.default_rng((seed, first)).permutation(len(keys))):
            result, seconds_N = timed(read, (name, b, i))
            losses_NT, *taken = fetch(result)
            actions_NT, dropped_NT = taken or np.zeros((2, *losses_NT.shape), int)
            for n, text in enumerate(some):
                one = Read(
                    first + n, text.repo, losses_NT[n], actions_NT[n], float(seconds_N[n] + prefix_seconds[n]), i, int(dropped_NT[n].sum())
                )
                if b == main:
                    found.reads.setdefault(name, []).append(one)
                if b != main or name not in ("base", *FIXED):
                    found.frontier.setdefault(b, {}).setdefault(name, []).append(one)
        for reads in (found.reads, *(reads for reads in found.frontier.values() if "oracle" in reads)):
            for n in range(first, len(found.credits)):
                reads["oracle"][n] = min((reads[name][n] for name in (*BLIND, "oracle")), key=lambda r: r.losses_T.mean())
    return found


# --- 5. Statistics --------------------------------------------------------------------------------


def per_repository(reads: list[Read], values: Iterable[float]) -> np.ndarray:
    """Means of one value for each read over each repository, documents and seeds alike, in the order of
    their names -> (repositories,)"""
    names, values = np.asarray([r.repo for r in reads]), np.asarray(list(values), float)
    return np.asarray([values[names == name].mean() for name in np.unique(names)])


def losses(reads: list[Read]) -> np.ndarray:
    return per_repository(reads, (r.losses_T.mean() for r in reads))


def costs(setup: Setup, reads: list[Read], currency: str) -> np.ndarray:
    """Cost per chunk of each repository in `nominal`, `flops` (SKIP = 1) or `seconds`."""
    if currency == "seconds":
        return per_repository(reads, (r.seconds / len(r.actions_T) for r in reads))
    table = np.asarray(rl.NOMINAL) if currency == "nominal" else setup.flops_A
    return per_repository(reads, (table[r.actions_T].mean() for r in reads))


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 2
    ci = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return [float(ci.low), float(ci.high)]


def iqm(values: np.ndarray) -> float:
    """Interquartile mean (Agarwal et al. 2021)."""
    return float(scipy.stats.trim_mean(values, 0.25, axis=None))


def summarise(setup: Setup, found: Evaluation) -> dict[str, dict[str, Any]]:
    """results.json's `methods`: means over repositories with their intervals, costs per chunk."""
    reads = found.reads
    loss = {name: losses(rs) for name, rs in reads.items()}
    oracle_gain = (loss["skip"] - loss["oracle"]).mean()
    chosen = {r.document: r.actions_T > 0 for r in reads["oracle"]}
    methods = {}
    for name in (name for name in LABELS if name in reads):
        rs = reads[name]
        gain = loss["skip"] - loss[name]
        learned = [r.actions_T > 0 for r in rs]
        mixed = [(r.actions_T, found.credits[r.document]) for r in rs if np.ptp(r.actions_T) > 0 and np.ptp(found.credits[r.document]) > 0]
        methods[name] = {
            "loss": float(loss[name].mean()),
            "loss_ci": interval(loss[name]),
            "gain": float(gain.mean()),
            "gain_ci": interval(gain),
            "gain_iqm": iqm(gain),
            "gain_over_base": float((loss["base"] - loss[name]).mean()),
            **{f"cost_{unit}": float(costs(setup, rs, unit).mean()) for unit in ("nominal", "flops")},
            "seconds": float(costs(setup, rs, "seconds").mean()),
            "update_rate": float(per_repository(rs, (x.mean() for x in learned)).mean()),
            "oracle_recovery": float(gain.mean() / oracle_gain) if oracle_gain > 0 else None,
            "oracle_agreement": float(np.mean([(x == chosen[r.document]).mean() for r, x in zip(rs, learned, strict=True)])),
            "rank_correlation": float(np.mean([scipy.stats.spearmanr(*pair).statistic for pair in mixed])) if mixed else None,
        }
    return methods


def best_methods(methods: dict[str, dict[str, Any]], unit: str) -> list[str]:
    """The methods that no other one beats at its cost or less (the oracle, no method, left out),
    from the cheapest on."""
    cost = lambda name: (methods[name][f"cost_{unit}"], -methods[name]["gain"])
    best: list[str] = []
    for name in sorted((n for n in methods if n not in ("oracle", "base")), key=cost):
        if not best or methods[name]["gain"] > methods[best[-1]]["gain"]:
            best.append(name)
    return best


def compare(reads: dict[str, list[Read]], method: str, other: str) -> dict[str, Any]:
    """How much lower `method`'s loss is than `other`'s, paired over repositories: mean and its interval,
    tests, effect sizes. The probability of improvement and Cliff's delta compare gains over SKIP of
    any two repositories."""
    skip, ours, theirs = (losses(reads[name]) for name in ("skip", method, other))
    values = theirs - ours
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    improvement = scipy.stats.mannwhitneyu(skip - ours, skip - theirs).statistic / len(values) ** 2
    return {
        "difference": float(values.mean()),
        "ci": interval(values),
        "iqm": iqm(values),
        "better_on": float((values > 0).mean()),
        "wilcoxon_p": float(scipy.stats.wilcoxon(values).pvalue) if spread > 0 else 1.0,
        "t_p": float(scipy.stats.ttest_1samp(values, 0).pvalue) if spread > 0 else 1.0,
        "cohens_d": float(values.mean() / spread) if spread > 0 else 0.0,
        "cliffs_delta": float(2 * improvement - 1),
        "probability_of_improvement": float(improvement),
    }


def frontier(setup: Setup, found: Evaluation) -> list[dict[str, Any]]:
    """results.json's `frontier`: the policy at each budget (per chunk), from the smallest on; where its rivals
    were read too, their gains and by how much lower its loss is."""
    rows = []
    for budget, reads in sorted(found.frontier.items()):
        rs = reads["policy"]
        row: dict[str, Any] = {"budget": budget / len(rs[0].actions_T), "loss": float(losses(rs).mean())}
        row |= {f"cost_{unit}": float(costs(setup, rs, unit).mean()) for unit in ("nominal", "flops")}
        row["seconds"] = float(costs(setup, rs, "seconds").mean())
        if "random" in reads:
            skip = losses(found.reads["skip"])
            row["gains"] = {name: float((skip - losses(reads[name])).mean()) for name in LABELS if name in reads}
            row["comparisons"] = {name: compare(reads | {"skip": found.reads["skip"]}, "policy", name) for name in (*BLIND, *GATES)}
        rows.append(row)
    return rows


def cost_at(loss_P: np.ndarray, cost_P: np.ndarray, target: float) -> float:
    """The lowest cost at which a frontier, cheapest point first, reaches a loss; between its points
    linearly; infinite if it never does."""
    best_P = np.minimum.accumulate(loss_P)
    if target < best_P[-1]:
        return float("inf")
    i = int(np.argmax(best_P <= target))
    if i == 0:
        return float(cost_P[0])
    return float(np.interp(best_P[i - 1] - target, [0, best_P[i - 1] - best_P[i]], [cost_P[i - 1], cost_P[i]]))


def savings(setup: Setup, found: Evaluation, resamples: int = 2000) -> dict[str, dict[str, dict[str, Any]]]:
    """results.json's `savings`: by how much cheaper than each fixed schedule the policy reaches its loss,
    in all (`total`) and in what is spent above SKIP (`learning`), with 95 % intervals from resampled
    repositories. None where the frontier does not reach the loss."""
    points = [found.reads["skip"], *(reads["policy"] for _, reads in sorted(found.frontier.items()))]
    loss_PR = np.stack([losses(rs) for rs in points])
    size = loss_PR.shape[1]
    draws = np.random.default_rng(0).integers(0, size, (resamples, size))
    mean = lambda x: x[..., np.vstack([np.arange(size), draws])].mean(-1)  # over all repositories, then over each resample
    finite = lambda x: float(x) if np.isfinite(x) else None
    loss_PN = mean(loss_PR)
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for name in ("update_1", "update_2", "update_4"):
        target_N = mean(losses(found.reads[name]))
        for currency in ("nominal", "flops", "seconds"):
            cost_PN = mean(np.stack([costs(setup, rs, currency) for rs in points]))
            schedule_N = mean(costs(setup, found.reads[name], currency))
            policy_N = np.asarray([cost_at(*column) for column in zip(loss_PN.T, cost_PN.T, target_N, strict=True)])
            row: dict[str, Any] = {}
            for part, free in (("total", 0.0), ("learning", cost_PN[0])):
                saved_N = 1 - (policy_N - free) / (schedule_N - free)
                low_high = np.quantile(saved_N[1:], [0.025, 0.975], method="inverted_cdf")
                row |= {part: finite(saved_N[0]), f"{part}_ci": [finite(x) for x in low_high]}
            out.setdefault(name, {})[currency] = row
    return out


def pareto_area(methods: dict[str, dict[str, Any]], points: list[dict[str, float]]) -> float:
    """Area under the policy's best gain at each nominal cost, between SKIP and UPDATE_1, as a share of
    UPDATE_1's gain throughout: 0.5 is what mixing SKIP and UPDATE_1 at random would have if gains added up."""
    skip, full = methods["skip"], methods["update_1"]
    x = [skip["cost_nominal"], *(p["cost_nominal"] for p in points)]
    y = np.maximum.accumulate([0.0, *(skip["loss"] - p["loss"] for p in points)])
    grid = np.linspace(skip["cost_nominal"], full["cost_nominal"], 201)
    return float(np.interp(grid, x, y).mean() / full["gain"])


def analyse(setup: Setup, found: Evaluation) -> dict[str, Any]:
    """All figures of results.json that are measured."""
    methods, points = summarise(setup, found), frontier(setup, found)
    reads, seeds = found.reads, sorted({r.seed for r in found.reads["policy"]})
    skip = losses(reads["skip"])
    return {
        "methods": methods,
        "comparisons": {name: compare(reads, "policy", name) for name in (*BLIND, *GATES)},
        "frontier": points,
        "savings": savings(setup, found),
        "pareto_area": pareto_area(methods, points),
        "policy_gain_by_seed": [float((skip - losses([r for r in reads["policy"] if r.seed == i])).mean()) for i in seeds],
        "per_repository": {
            "names": np.unique([r.repo for r in reads["skip"]]).tolist(),
            "loss": {name: losses(rs).tolist() for name, rs in reads.items()},
        },
    }


# --- 6. Plots -------------------------------------------------------------------------------------

# Okabe and Ito's colour-blind-safe palette.
COLOURS = {
    "base": "#999999", "skip": "#000000", "update_1": "#000000", "update_2": "#000000", "update_4": "#000000", "every_n": "#56B4E9",
    "front_loaded": "#CC79A7", "random": "#F0E442", "loss_threshold": "#009E73", "entropy_threshold": "#009E73",
    "gradient_threshold": "#E69F00", "online_gate": "#E69F00", "policy": "#D55E00", "oracle": "#0072B2",
}  # fmt: skip
MARKERS = dict(zip(LABELS, "_o^sDvP*Xd<>o*", strict=True))


def figure(*args, **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd"}
    plt.rcParams |= {"legend.frameon": False, "savefig.dpi": 150, "axes.axisbelow": True}
    return plt.subplots(*args, layout="constrained", **kwargs)


def save_figure(fig, path: Path) -> None:
    import io

    import matplotlib.pyplot as plt

    content = io.BytesIO()
    fig.savefig(content, format="png", facecolor="white")
    plt.close(fig)
    lm.write_atomic(path, content.getvalue())


def plot_pareto(path: Path, results: dict[str, Any]) -> None:
    """Gain over SKIP against cost, with intervals over repositories; one panel for each currency."""
    methods = results["methods"]
    fig, axes = figure(1, 2, figsize=(11, 4.8), sharey=True)
    for axis, unit in zip(axes, ("nominal", "flops"), strict=True):
        cost = {name: m[f"cost_{unit}"] for name, m in methods.items()}
        best = best_methods(methods, unit)
        axis.plot([cost[n] for n in best], [methods[n]["gain"] for n in best], color="#bbbbbb", zorder=1, label="Pareto frontier")
        line = [(p[f"cost_{unit}"], methods["skip"]["loss"] - p["loss"]) for p in results["frontier"]]
        axis.plot(*zip(*line, strict=True), "--", color=COLOURS["policy"], linewidth=1.2, label="learned policy, other budgets")
        for name, m in methods.items():
            errors = [[m["gain"] - m["gain_ci"][0]], [m["gain_ci"][1] - m["gain"]]]
            axis.errorbar(
                cost[name], m["gain"], errors, fmt=MARKERS[name], color=COLOURS[name], label=LABELS[name], markersize=8,
                elinewidth=1, markeredgecolor="black", markeredgewidth=0.5,
            )  # fmt: skip
        if unit == results["cost_model"]:
            axis.axvline(results["budget_per_chunk"], color="#D55E00", linestyle=":", linewidth=1, label="budget")
        axis.set_xlabel({"nominal": "nominal cost per chunk (SKIP = 1)", "flops": "FLOPs per chunk (SKIP = 1)"}[unit])
    axes[0].set_ylabel("gain over SKIP (nats per token)")
    handles, labels = axes[0 if results["cost_model"] == "nominal" else 1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right center", fontsize=9)
    save_figure(fig, path)


def plot_position(path: Path, reads: dict[str, list[Read]]) -> None:
    """Gain over SKIP along the document: mean over documents, smoothed over an eighth of it."""
    fig, axis = figure(figsize=(7, 4.2))
    mean = lambda name: np.mean([r.losses_T for r in reads[name]], 0)
    skip = mean("skip")
    width = max(len(skip) // 8, 1)
    smooth = lambda x: np.convolve(x, np.ones(width) / width, "valid")
    x = smooth(np.arange(len(skip)))
    for name, style in (("update_1", "-"), ("update_2", "--"), ("update_4", ":"), ("policy", "-"), ("every_n", "-"), ("base", "-")):
        axis.plot(x, smooth(skip - mean(name)), style, color=COLOURS[name], label=LABELS[name], linewidth=1.6)
    axis.set_xlabel("chunk")
    axis.set_ylabel("gain over SKIP (nats per token)")
    fig.legend(loc="outside right center", fontsize=9)
    save_figure(fig, path)


def plot_timeline(path: Path, names: list[str], reads: dict[str, list[Read]], count: int = 3) -> None:
    """What each method did on a few documents, and the losses it led to."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = ["every_n", "loss_threshold", "policy", "oracle"]
    first = {(name, r.document): r for name, rs in reads.items() for r in reversed(rs)}  # of several seeds the first
    shown = list(range(min(count, len(names))))
    fig, axes = figure(2, len(shown), figsize=(4.2 * len(shown) + 1.6, 5.2), height_ratios=[1, 1.6], sharex="col", squeeze=False)
    colours = ["#f0f0f0", "#56B4E9", "#0072B2", "#08306b"]
    for column, i in enumerate(shown):
        grid = np.stack([first[name, i].actions_T for name in rows])
        top, bottom = axes[:, column]
        edges = np.arange(grid.shape[1] + 1) - 0.5
        top.pcolormesh(edges, np.arange(len(rows) + 1), grid, cmap=ListedColormap(colours), vmin=0, vmax=3, edgecolors="white", linewidth=1)
        top.set_yticks(np.arange(len(rows)) + 0.5, [LABELS[n].split(" (")[0] for n in rows] if column == 0 else [""] * len(rows))
        top.invert_yaxis()
        top.grid(False)
        top.set_title(names[i].replace("$", r"\$"), fontsize=10)
        for name, style in (("skip", ":"), ("update_1", "--"), ("policy", "-")):
            bottom.plot(first[name, i].losses_T, style, color=COLOURS[name], label=LABELS[name], linewidth=1.4)
        bottom.set_xlabel("chunk")
    axes[1, 0].set_ylabel("loss (nats per token)")
    patches = [Patch(facecolor=c, edgecolor="#999999", label=a) for c, a in zip(colours, rl.ACTIONS, strict=True)]
    fig.legend(handles=[*patches, *axes[1, 0].get_legend_handles_labels()[0]], loc="outside right center", fontsize=9)
    save_figure(fig, path)


def plot_training(path: Path, rows: list[dict[str, float]]) -> None:
    """The multiplier, and the cost against its limit, over policy training."""
    fig, (top, bottom) = figure(2, 1, figsize=(7, 5), sharex=True)
    x = [r["step"] for r in rows]
    top.plot(x, [r["cost"] for r in rows], color="#0072B2", label="mean cost of the rollouts")
    top.plot(x, [r["limit"] for r in rows], ":", color="#D55E00", label="budget")
    top.set_ylabel("cost per chunk (SKIP = 1)")
    top.legend()
    bottom.plot(x, [r["lambda"] for r in rows], color="#000000")
    bottom.set_ylabel("multiplier λ")
    bottom.set_xlabel("PPO iteration")
    save_figure(fig, path)


def by_file(texts: list[Tokens], reads: dict[str, list[Read]], chunk: int) -> list[dict[str, Any]]:
    """results.json's `by_file`: mean gain over SKIP per token in each file of which a chunk's worth was read, from
    the largest of the policy's on. A chunk's gain counts alike for all of its tokens."""
    skip, gains = {r.document: r.losses_T for r in reads["skip"]}, {}
    for name in ("update_1", "policy"):
        paths = np.concatenate([texts[r.document].origin for r in reads[name]])
        gain = np.concatenate([np.repeat(skip[r.document] - r.losses_T, chunk) for r in reads[name]])
        files, place, tokens = np.unique(paths, return_inverse=True, return_counts=True)
        tokens = tokens * len(reads["skip"]) // len(reads[name])  # of several seeds each reads them
        gains[name] = np.bincount(place, gain) / np.bincount(place)
    rows = zip(files.tolist(), tokens.tolist(), gains["update_1"].tolist(), gains["policy"].tolist(), strict=True)
    kept = [dict(zip(("file", "tokens", "update_1", "policy"), row, strict=True)) for row in rows if row[1] >= chunk]
    return sorted(kept, key=lambda row: -row["policy"])


def save_reads(path: Path, reads: dict[str, list[Read]]) -> None:
    fields = [field for field in Read._fields if field != "repo"]
    arrays = {f"{name}.{field}": np.asarray([getattr(r, field) for r in rs]) for name, rs in reads.items() for field in fields}
    lm.write_atomic(path, safetensors.numpy.save(arrays))


def load_reads(path: Path, repos: list[str]) -> dict[str, list[Read]]:
    """What `save_reads` wrote; `repos` are those of the documents.

    Raises: ModelError."""
    columns = lm.nest(lm.read_safetensors(path))
    rows = lambda c: [dict(zip(c, values, strict=True)) for values in zip(*c.values(), strict=True)]
    of = lambda row: Read(repo=repos[row["document"]], **{k: v if np.ndim(v) else v.item() for k, v in row.items()})
    return {name: [of(row) for row in rows(column)] for name, column in columns.items()}


def draw(out: Path, results: dict[str, Any], reads: dict[str, list[Read]], training: list[dict[str, float]]) -> str:
    """report.md and its plots -> the verdict"""
    plot_pareto(out / "pareto.png", results)
    plot_position(out / "position.png", reads)
    plot_timeline(out / "timeline.png", results["names"], reads)
    if training:
        plot_training(out / "training.png", training)
    return write_report(out, results, bool(training))


def redraw(out: Path) -> str:
    """Report and plots of a finished run, from its files -> the verdict

    Raises: UserError, ModelError."""
    import ponder

    try:
        results = json.loads((out / "results.json").read_text())
        reads = load_reads(out / "reads.safetensors", results["names"])
    except (OSError, ValueError, KeyError) as error:
        raise ponder.UserError(f"--run {out}: no finished run of this version ({error!r}); give a folder with results.json") from None
    training = [row for row in ponder.read_metrics(out / "metrics.jsonl") if row["stage"] == "policy"]
    return draw(out, results, reads, training)


# --- 7. Report ------------------------------------------------------------------------------------


def verdict(results: dict[str, Any]) -> str:
    """One sentence: what was found, whichever way it went."""
    policy, full = results["methods"]["policy"], results["methods"]["update_1"]
    where = f"On {results['repositories']} {results['unit']} {results['unseen']}"
    if full["gain_ci"][0] <= 0:
        found = f"gain {full['gain']:.3f} nats per token, interval {spell(full['gain_ci'])}"
        return f"{where}, learning from every chunk (UPDATE_1) did not reliably beat never learning: {found}."
    kept = (
        f"kept {policy['gain'] / full['gain']:.0%} of UPDATE_1's gain over SKIP ({policy['gain']:.3f} of {full['gain']:.3f} nats per token)"
    )
    share = {unit: policy[f"cost_{unit}"] / full[f"cost_{unit}"] for unit in ("nominal", "flops")}
    cost = f"at {share['nominal']:.0%} of its nominal cost ({share['flops']:.0%} of its FLOPs)"
    return (
        f"{where}, the learned policy {kept} {cost}; at the same budget it was {'; '.join(map(against, results['comparisons'].items()))}."
    )


def against(item: tuple[str, dict[str, Any]]) -> str:
    name, c = item
    word = "better than" if c["ci"][0] > 0 else "worse than" if c["ci"][1] < 0 else "not distinguishable from"
    return f"{word} '{LABELS[name]}' ({c['difference']:+.4f} {spell(c['ci'])})"


def spell(ci: list[float]) -> str:
    return f"[{ci[0]:.4f}, {ci[1]:.4f}]"


COLUMNS = (
    "method",
    "loss",
    "gain over SKIP [95 %]",
    "over base",
    "nominal cost",
    "FLOPs",
    "seconds per chunk",
    "updates",
    "oracle recovery",
    "rank correlation",
)


def table(methods: dict[str, dict[str, Any]]) -> str:
    """results.json's `methods` as a Markdown table."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for name in LABELS:
        m = methods[name]
        recovery = "" if m["oracle_recovery"] is None else f"{m['oracle_recovery']:.2f}"
        gain = f"{m['gain']:+.4f} {spell(m['gain_ci'])}"
        costs = [f"{m['cost_nominal']:.2f}", f"{m['cost_flops']:.2f}", f"{m['seconds']:.4f}", f"{m['update_rate']:.0%}"]
        rank = "" if m["rank_correlation"] is None else f"{m['rank_correlation']:.2f}"
        rows.append([LABELS[name], f"{m['loss']:.4f}", gain, f"{m['gain_over_base']:+.4f}", *costs, recovery, rank])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def savings_table(saved: dict[str, dict[str, dict[str, Any]]]) -> str:
    """results.json's `savings` as a Markdown table."""
    percent = lambda x: "not reached" if x is None else f"{x:.0%}"
    cell = lambda x, ci: percent(x) if x is None else f"{percent(x)} [{', '.join(map(percent, ci))}]"
    rows = [("at the loss of", "currency", "saved in all", "of learning's cost"), ["---"] * 4]
    for name, by_currency in saved.items():
        for currency, x in by_currency.items():
            rows.append([LABELS[name], currency, cell(x["total"], x["total_ci"]), cell(x["learning"], x["learning_ci"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def budgets_table(points: list[dict[str, Any]]) -> str:
    """Gains of all methods at the budgets where all were read, and by how much the policy's is larger."""
    points = [p for p in points if "gains" in p]
    if len(points) < 2:
        return ""
    rows = [["gain at a budget per chunk of", *(f"{p['budget']:.3g}" for p in points)], ["---"] * (1 + len(points))]
    for name in points[0]["gains"]:
        difference = lambda p: f" ({p['comparisons'][name]['difference']:+.4f} {spell(p['comparisons'][name]['ci'])})"
        rows.append([LABELS[name], *(f"{p['gains'][name]:+.4f}" + (difference(p) if name in p["comparisons"] else "") for p in points)])
    return "\nThe same at other budgets:\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def files_table(rows: list[dict[str, Any]], most: int = 8) -> str:
    """The files where learning helped most, and least."""
    if not rows:
        return ""
    shown = [*rows[:most], *rows[max(len(rows) - most, most) :]]
    name = lambda path: "".join(c if c.isprintable() and c not in "|`" else "?" for c in path)
    lines = [("file", "tokens read", "the policy's gain", "UPDATE_1's gain"), ["---"] * 4]
    lines += [(f"`{name(r['file'])}`", f"{r['tokens']:,}", f"{r['policy']:+.3f}", f"{r['update_1']:+.3f}") for r in shown]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    kept = "" if len(shown) == len(rows) else f" The first {most} and the last {most} of {len(rows)}; results.json has all."
    return (
        "\n## Where learning helped most, and least\n\nMean gain over SKIP (nats per token) of the tokens of each file of which a "
        "chunk's worth was read; a chunk's gain counts alike for all files in it, and a document's first chunk can't gain, nothing "
        f"was learned before it.{kept}\n\n{text}\n"
    )


REPORT = """# PonderTTT: {scale} on {data}

{sentence}

{documents} documents of {chunks_per_document} chunks{source}; budget {budget:g} per document \
({budget_per_chunk:.3g} per chunk, {cost_model}); {seeds} seed(s) of the policy. Gains are over SKIP, the same parameters that never \
learn; intervals are 95 % bootstrap intervals over {unit}; seconds include the frozen prefix, each document timed once, \
methods in random order. Rank correlation is that of the steps taken on a chunk with what learning from it gave.

{table}

How much lower the policy's loss is at the same budget, paired over {unit} (nats per token):

{paired}
{elsewhere}
## Cost and gain

![Gain over SKIP against cost](pareto.png)

What the policy saves where its frontier (other budgets, dashed) reaches the loss of a fixed schedule; the area under the frontier \
between SKIP and UPDATE_1 is {pareto_area:.2f} of what UPDATE_1's gain at no cost would be:

{saved}

![Gain over SKIP along the document](position.png)

## What was decided

![Actions and losses of a few documents](timeline.png)
{training}{files_table}
## What was run

{facts}
"""


def write_report(out: Path, results: dict[str, Any], trained: bool) -> str:
    """report.md: the verdict, the tables, the plots, what was run. -> the verdict"""
    sentence = verdict(results)
    paired = [
        f"- {LABELS[name]}: {c['difference']:+.4f} {spell(c['ci'])}, lower on {c['better_on']:.0%} of the repositories, "
        f"Wilcoxon p {c['wilcoxon_p']:.2g}, d {c['cohens_d']:+.2f}"
        for name, c in results["comparisons"].items()
    ]
    filled = {
        "sentence": sentence,
        "source": f" from {results['repositories']} repositories" if results["unit"] == "repositories" else "",
        "table": table(results["methods"]),
        "saved": savings_table(results["savings"]),
        "paired": "\n".join(paired),
        "elsewhere": budgets_table(results["frontier"]),
        "files_table": files_table(results.get("by_file", [])),
        "training": "\n## Training\n\n![Cost and multiplier over training](training.png)\n" if trained else "",
        "facts": "\n".join(f"- {fact}" for fact in results["facts"]),
    }
    lm.write_atomic(out / "report.md", REPORT.format(**results | filled).encode())
    return sentence


# --- 8. Ablations: python eval.py --ablate WHAT [options of ponder.py] ---------------------------------

# What each variant changes in ponder.py's settings; the first one is what the others are compared with.
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "features": {"all features": {}} | {f"without {group}": {"drop_features": (group,)} for group in rl.GROUPS},
    "fast": {
        "swiglu": {}, "swiglu, reconstruction": {"objective": "reconstruction"}, "swiglu, width 64": {"hidden": 64},
        "swiglu, clipped SGD": {"inner_optimizer": "sgd"}, "swiglu, momentum 0.5": {"momentum": 0.5}, "linear": {"fast": "linear"},
        "linear, reconstruction": {"fast": "linear", "objective": "reconstruction"}, "lora": {"fast": "lora"},
        "lora, rank 64": {"fast": "lora", "hidden": 64},
    },
    "placement": {
        "last two blocks": {"fast_blocks": (6, 7)}, "last block": {"fast_blocks": (7,)}, "last four": {"fast_blocks": (4, 5, 6, 7)},
        "middle two": {"fast_blocks": (3, 4)}, "every second": {"fast_blocks": (1, 3, 5, 7)},
    },
    "steps": {"learned with all actions": {}} | {f"learned with {a}": {"action": a} for a in rl.ACTIONS[1:]},
    "reward": {"credit for all chunks to come": {}, "gain on the next chunk": {"reward": "next_chunk"}},
    "budget": {f"{b:g} per chunk": {"budget": b} for b in (2.0, 1.25, 1.5, 2.5, 3.0, 4.5, 8.0)},
    "transfer": {
        "as trained": {}, "budget 1.5 per chunk": {"budget": 1.5}, "budget 2.5 per chunk": {"budget": 2.5},
        "12 chunks": {"chunks": 12}, "64 chunks": {"chunks": 64}, "chunks of 128 tokens": {"chunk": 128},
    },
}  # fmt: skip
LEARNED_ANEW = ("fast", "placement", "steps")  # their fast weights have to be meta-learned first


def ablate(what: str, base) -> Path:
    """One run of ponder.py for each variant, in folders of its own (those already there are kept), then
    ablation.json, ablation.md and ablation.png. For `transfer` the policy is only calibrated anew.
    -> the folder"""
    import ponder

    out = base.out or Path("runs") / f"ablate-{what}"
    rows: dict[str, dict[str, Any]] = {}
    for name, change in ABLATIONS[what].items():
        folder = out / name.replace(" ", "-").replace(",", "")
        cfg = dataclasses.replace(
            base, **change, out=folder, fresh=base.fresh or what in LEARNED_ANEW, resume=(folder / "config.json").exists()
        )
        if "budget" in change:
            cfg = dataclasses.replace(cfg, budget=change["budget"] * cfg.chunks)
        if what in ("budget", "transfer"):
            cfg = dataclasses.replace(cfg, stage="eval", weights=base.weights or ponder.ASSETS / "tiny")  # whatever the chunk
        if not (folder / "results.json").exists():
            print(f"--- {what}: {name}", flush=True)
            ponder.run(cfg)
        rows[name] = json.loads((folder / "results.json").read_text())
    lm.write_atomic(out / "ablation.json", (json.dumps(rows, indent=2) + "\n").encode())
    lm.write_atomic(out / "ablation.md", f"# Ablation: {what}\n\n{ablation_table(rows)}\n\n![Gains](ablation.png)\n".encode())
    plot_ablation(out / "ablation.png", rows)
    return out


def ablation_table(rows: dict[str, dict[str, Any]]) -> str:
    """Gains of UPDATE_1 and the policy for each variant, and how much lower the policy's loss is than the
    first variant's, paired over the repositories that both read."""
    lines = [("variant", "SKIP", "UPDATE_1's gain", "share of the loss", "policy's gain", "its cost", "against the first"), ["---"] * 7]
    of = lambda r: dict(zip(r["per_repository"]["names"], r["per_repository"]["loss"]["policy"], strict=True))
    first = of(next(iter(rows.values())))
    for name, r in rows.items():
        skip, full, policy = (r["methods"][m] for m in ("skip", "update_1", "policy"))
        values = np.asarray([first[repo] - loss for repo, loss in of(r).items() if repo in first])
        against = f"{values.mean():+.4f} {spell(interval(values))}" if len(values) and np.ptp(values) else ""
        gains = [f"{m['gain']:+.4f} {spell(m['gain_ci'])}" for m in (full, policy)]
        share = f"{full['gain'] / skip['loss']:.1%}"
        lines.append([name, f"{skip['loss']:.4f}", gains[0], share, gains[1], f"{policy['cost_nominal']:.2f}", against])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_ablation(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    fig, axis = figure(figsize=(8, 1.2 + 0.45 * len(rows)))
    y = np.arange(len(rows))
    for name, shift in (("update_1", -0.15), ("policy", 0.15)):
        ms = [r["methods"][name] for r in rows.values()]
        gain, ci = np.asarray([m["gain"] for m in ms]), np.asarray([m["gain_ci"] for m in ms]).T
        axis.errorbar(gain, y + shift, xerr=np.abs(ci - gain), fmt=MARKERS[name], color=COLOURS[name], label=LABELS[name], markersize=7)
    axis.set_yticks(y, list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("gain over SKIP (nats per token)")
    fig.legend(loc="outside upper center", ncols=2, fontsize=9)
    save_figure(fig, path)


def main() -> None:
    import tyro

    import ponder

    settings = (tyro.conf.OmitArgPrefixes[ponder.Config], dataclasses.field(default=ponder.Config()))
    optional = lambda name, kind: (name, kind | None, dataclasses.field(default=None))
    fields = [optional("ablate", Literal[tuple(ABLATIONS)]), optional("run", Path), ("config", *settings)]
    arguments = dataclasses.make_dataclass("Arguments", fields)
    description = (
        "Vary one part of the method (--ablate): a run of ponder.py for each variant, with its options, and a table of them all. "
        "Or draw the report and plots of a finished run anew, from its files (--run)."
    )

    def job() -> None:
        chosen = tyro.cli(arguments, description=description, config=ponder.STYLE)
        if (chosen.ablate is None) == (chosen.run is None):
            raise ponder.UserError("say what to do: --ablate WHAT or --run FOLDER, one of the two (--help lists them)")
        if chosen.run:
            print(redraw(chosen.run))
            return
        print(f"report: {ablate(chosen.ablate, chosen.config) / 'ablation.md'}")

    ponder.launch(job)


if __name__ == "__main__":
    main()
