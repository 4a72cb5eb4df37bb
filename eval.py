"""What a policy must beat, and how it is measured.

Every method reads the same documents, from repositories that no training stage saw, under the same
hard budget; its loss on a chunk is always taken before it learns from that chunk.

    gain             loss(SKIP) - loss(method), the same parameters that never learn
    oracle recovery  gain(method) / gain(oracle)
    cost             `nominal` and `flops`, per chunk, SKIP = 1; seconds are measured
    saving           1 - cost(policy) / cost(schedule) where the policy reaches the schedule's loss

Intervals are 95 % bootstrap intervals over repositories: chunks of one document, and documents of
one repository, are not independent.

Sections 1 to 8 are the evaluation, in the order in which it happens: schedules, oracle, calibration, reading,
statistics, plots, report, ablations. The others can each be read alone: 9 writes text, 10 judges code that
was written, 11 and 12 are the benchmarks, 13 measures speed. Each has its options at its beginning or beside
what they start; `main`, at the end, joins them.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import dataclasses
import gzip
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import operator
import os
import re
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import scipy  # scipy.stats is imported when it is first used
from jax import lax
from jax.experimental import multihost_utils
from tqdm import tqdm

import data
import model as lm
import rl

FIXED = {name.lower(): action for action, name in enumerate(rl.ACTIONS)}
GATES = {
    "loss_threshold": "loss", "entropy_threshold": "entropy", "gradient_threshold": "gradient_norm", "online_gate": "inner_loss",
    "ahead_threshold": "new_comes_again",
}  # fmt: skip
BLIND = ("every_n", "front_loaded", "random")
LABELS = {
    "base": "base model, no adapters", "skip": "SKIP", "update_1": "UPDATE_1 everywhere", "update_2": "UPDATE_2 everywhere",
    "update_4": "UPDATE_4 everywhere", "every_n": "every n-th chunk", "front_loaded": "first chunks", "random": "random chunks",
    "loss_threshold": "where the loss is high", "entropy_threshold": "where the entropy is high",
    "gradient_threshold": "where the gradient is large", "online_gate": "inner loss, online threshold",
    "ahead_threshold": "where new text comes again (looks ahead)", "policy": "learned policy",
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
        return self._replace(env=self.env._replace(budget=lm.place(self.mesh, np.float32(budget))))


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
    """(action, count): the cheapest action that could spend the whole budget if taken everywhere, and how many
    chunks can have it within the budget, the others the action below it."""
    costs = np.asarray(costs_A, float)
    action = next((a for a in range(1, len(costs)) if costs[a] * chunks >= budget * (1 - 1e-6)), len(costs) - 1)
    count = int((budget * (1 + 1e-6) - chunks * costs[action - 1]) / (costs[action] - costs[action - 1]))
    return action, min(max(count, 0), chunks)


def schedules(costs_A, budget: float, chunks: int, seed: int | tuple[int, int]) -> dict[str, np.ndarray]:
    """Plans (T,) that spend the budget without looking: evenly, at the front, at random."""
    action, count = affordable_updates(costs_A, budget, chunks)
    chosen = {
        "every_n": np.unique(np.arange(count) * chunks // max(count, 1)),
        "front_loaded": np.arange(count),
        "random": np.random.default_rng(seed).permutation(chunks)[:count],
    }
    return {name: np.where(np.isin(np.arange(chunks), places), action, action - 1) for name, places in chosen.items()}


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
    plan_NT = np.broadcast_to(np.asarray(rule.plan_T, np.int32), group.document.text_TU.shape[:2])
    rule = rule._replace(plan_T=())  # of several shapes, for each of which all would be compiled again
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
    return np.where(np.isin(np.arange(chunks), best), action, action - 1)


# --- 3. Calibration, on validation documents ------------------------------------------------------

Progress = Callable[[Iterable, str], Iterable]  # shows how far it is


class Judged(NamedTuple):
    """A trained policy and what was calibrated with it."""

    policy: rl.Policy
    calibration: dict[str, Any]


PACES = (1.0, 1.7, 3.0)  # how many times what is left for each chunk a gate tries to spend; above 1 the front gets more
DRIFTS = (0.05, 0.3)  # of the online gate: standard deviations of its signal for each UPDATE_1 over the budget


def read_probed(setup: Setup, group: Group, rule: rl.Rule) -> rl.Step:
    """Steps of a group's documents (N, T, ...), with what gates see; the rule's plan is (T,), or (N, T)."""
    plan_NT = np.broadcast_to(rule.plan_T, (group.count, rule.plan_T.shape[-1]))
    steps = run_rule(setup, group, rule._replace(plan_T=padded(plan_NT, setup.mesh.size)), jax.random.key(0), probe=True)
    return jax.tree.map(lambda x: x[: group.count], fetch(steps))


def calibrate(setup: Setup, texts: list[Tokens], policies: list[rl.Policy], progress: Progress) -> list[dict[str, Any]]:
    """What each policy, and along with the first the gates and the oracle, need to know, from validation documents
    alone: tables of prices and thresholds, which serve any budget, and what `settle` finds for the setup's. A gate that
    looks ahead is there where the first policy does. JSON."""
    costs, first, chunks = np.asarray(setup.env.costs_A), policies[0], (len(texts[0].tokens) - 1) // setup.chunk
    every_n = rl.make_rule(chunks, first, plan=schedules(costs, float(setup.env.budget), chunks, 0)["every_n"])
    read = [read_probed(setup, prepare(setup, some), every_n) for some in progress(grouped(setup, texts), "validation documents")]
    seen = jax.tree.map(lambda *x: np.concatenate(x), *read)
    signals = np.concatenate([seen.features_U, seen.probed], -1)
    found: list[dict[str, Any]] = []
    for policy in policies:
        logits = np.asarray(rl.apply_policy(policy, seen.features_U).logits_A)
        found.append({"policy": as_json(*(rl.price_table(logits, costs, action - 1, action) for action in range(1, len(costs))))})
    for name, seen_by in GATES.items():
        if seen_by not in rl.AHEAD or rl.looks_ahead(first):
            found[0][name] = as_json(rl.gate_table(signals[..., rl.SIGNALS.index(seen_by)], 1.0))
    found[0]["online_gate"]["unit"] = float(signals[..., rl.SIGNALS.index("inner_loss")].std() / (costs[1] - costs[0]))  # of its drift
    settled = settle(setup, texts, Judged(first, found[0]), progress)
    return [found[0] | {name: found[0].get(name, {}) | best for name, best in settled.items()}, *found[1:]]


def settle(setup: Setup, texts: list[Tokens], judged: Judged, progress: Progress) -> dict[str, dict[str, Any]]:
    """The pace or drift of each gate that is calibrated, and the oracle's horizon, with the lowest loss on validation
    documents under the setup's budget. Like `evaluate` it holds the activations of one group of documents at a time."""
    chunks, (policy, known) = (len(texts[0].tokens) - 1) // setup.chunk, judged
    options: dict[str, list[dict[str, Any]]] = {
        name: [{"pace": pace, "online": 0.0} for pace in PACES] for name in GATES if name in known and name != "online_gate"
    }
    options["online_gate"] = [{"pace": 1.0, "online": drift * known["online_gate"]["unit"]} for drift in DRIFTS]
    options["oracle"] = [{"horizon": horizon} for horizon in HORIZONS]
    tried = [(name, option) for name, some in options.items() for option in some]

    def rule(name: str, option: dict[str, Any], credit_NTT: np.ndarray) -> rl.Rule:
        if name == "oracle":
            plans = np.stack([oracle_plan(setup, credit_TT, **option) for credit_TT in credit_NTT])
            return rl.make_rule(chunks, policy, plan=0)._replace(plan_T=plans)
        return calibrated_rule(setup, chunks, name, known[name] | option, policy)

    read: list[list[np.ndarray]] = []
    for some in progress(grouped(setup, texts), "calibration"):
        group = prepare(setup, some)
        credit_NTT = credits_everywhere(setup, group)
        read.append([read_probed(setup, group, rule(*one, credit_NTT)).loss for one in tried])
        del group  # before the next is prepared: it may be the most that memory holds
    losses = [np.concatenate(x).mean(dtype=float) for x in zip(*read, strict=True)]
    best_first = [tried[i] for i in np.argsort(losses, kind="stable")]
    return {name: next(option for other, option in best_first if other == name) for name in options}


def as_json(*tables: rl.Table) -> dict[str, Any]:
    """The tables of one rule (of the policy, for each of its dearer actions), in six digits."""
    spend, threshold = ([[[float(f"{x:.6g}") for x in row] for row in table] for table in column] for column in zip(*tables, strict=True))
    return {"spend": spend, "threshold": threshold}


def calibrated_rule(setup: Setup, chunks: int, name: str, known: dict[str, Any], policy: rl.Policy) -> rl.Rule:
    """The gate `name`, or the policy, with what `calibrate` found, at the setup's budget: it takes the cheapest action
    that could spend the budget, or the one below it."""
    action, _ = affordable_updates(setup.env.costs_A, float(setup.env.budget), chunks)
    spend, threshold, costs = np.asarray(known["spend"]), np.asarray(known["threshold"]), np.asarray(setup.env.costs_A, float)
    if name == "policy":
        return rl.make_rule(chunks, policy, table=rl.Table(spend[action - 1], threshold[action - 1]), action=action, least=action - 1)
    table = rl.Table(costs[action - 1] - costs[0] + spend[0] * (costs[action] - costs[action - 1]), threshold[0])
    gate = partial(rl.make_rule, chunks, policy, signal=GATES[name], table=table)
    return gate(pace=known["pace"], online=known["online"], action=action, least=action - 1)


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
    return prefixes(setup, lm.place(setup.mesh, padded([t.tokens for t in texts], setup.mesh.size), lm.ROWS))


def prefixes(setup: Setup, tokens_N) -> lm.Window:
    """Of documents' tokens, one on each device."""
    return prefix_windows(setup.mesh, setup.model, setup.fast, setup.chunk, setup.lower, setup.upper, tokens_N)


def prepare(setup: Setup, texts: list[Tokens]) -> Group:
    """At most as many texts as there are devices, each ready to be read on one."""
    text_NTU = lm.place(setup.mesh, padded([t.text_TU for t in texts], setup.mesh.size), lm.ROWS)
    return Group(rl.Document(read_prefix(setup, texts), text_NTU), len(texts))


class Evaluation(NamedTuple):
    """All that was read, and what `analyse` needs beside it."""

    reads: dict[str, list[Read]]  # of each method, at the budget
    frontier: dict[float, dict[str, list[Read]]]  # of the policy, and where asked for of its rivals, at each budget
    credits: list[np.ndarray]  # (T,) of each document: what each update gave the rest, learning everywhere


def evaluate(
    setup: Setup,
    texts: list[Tokens],
    policies: list[Judged],
    budgets: list[float],
    compared: dict[float, dict[str, dict[str, Any]]],
    seed: int,
    progress: Progress,
) -> Evaluation:
    """Read every document with every method, in random order, as many at once as there are devices: the
    policy at its budget and at `budgets`, all others at its budget and at those of `compared`, with what `settle`
    found for each. Gates and the oracle are calibrated as for the first policy; `policies` differ in their seeds."""
    chunks = (len(texts[0].tokens) - 1) // setup.chunk
    main, (policy, calibration) = float(setup.env.budget), policies[0]
    known_at = lambda b, name: calibration[name] | compared.get(b, {}).get(name, {})
    make = partial(rl.make_rule, chunks, policy)
    rules: dict[tuple[str, float, int], rl.Rule] = {(name, main, 0): make(plan=a, hard=False) for name, a in FIXED.items()}
    for b in dict.fromkeys([main, *compared]):
        rules |= {
            (name, b, 0): calibrated_rule(setup.at(b), chunks, name, known_at(b, name), policy) for name in GATES if name in calibration
        }
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
            oracles = [oracle_plan(setup.at(b), credit_TT, **known_at(b, "oracle")) for credit_TT in credit_NTT]
            for name, plans in [*((name, [plan[name] for plan in blind]) for name in BLIND), ("oracle", oracles)]:
                todo[name, b, 0] = make(plan=0)._replace(plan_T=padded(plans, setup.mesh.size))

        def read(group: Group, key) -> tuple:  # losses (N, T) and, except for the base model, actions and dropped steps (N, T)
            name, b, _ = key
            if name == "base":
                return (base_losses(setup.mesh, setup.model, setup.fast, setup.upper, group.document.windows),)
            # Only the gates on the inner loss and its gradient pay, in seconds, for seeing them.
            probe = name in ("gradient_threshold", "online_gate")
            steps = run_rule(setup.at(b), group, todo[key], jax.random.key(seed), probe=probe)
            return steps.loss, steps.action, steps.dropped

        keys = [("base", main, 0), *todo]
        if not first:  # compile before the first clock starts
            jax.block_until_ready([read(group, (name, main, 0)) for name in ("base", "skip", "online_gate")])
            prefix_seconds = np.median([timed(read_prefix, setup, some)[1] for _ in range(3)], 0)
        for name, b, i in (keys[j] for j in np.random.default_rng((seed, first)).permutation(len(keys))):
            result, seconds_N = timed(read, group, (name, b, i))
            losses_NT, *taken = fetch(result)
            actions_NT, dropped_NT = taken or np.zeros((2, *losses_NT.shape), int)
            for n, text in enumerate(some):
                one = Read(
                    first + n, text.repo, losses_NT[n], actions_NT[n], float(seconds_N[n] + prefix_seconds[n]), i, int(dropped_NT[n].sum())
                )
                if b == main:
                    found.reads.setdefault(name, []).append(one)
                if name not in ("base", *FIXED):  # which have one cost
                    found.frontier.setdefault(b, {}).setdefault(name, []).append(one)
        for reads in (found.reads, *(reads for reads in found.frontier.values() if "oracle" in reads)):
            for n in range(first, len(found.credits)):
                reads["oracle"][n] = min((reads[name][n] for name in (*BLIND, "oracle")), key=lambda r: r.losses_T.mean())
        del group  # before the next is prepared
    return found


# --- 5. Statistics --------------------------------------------------------------------------------


def per_repository(reads: list[Read], values: Iterable[float]) -> np.ndarray:
    """Means of one value for each read over each repository, documents and seeds alike, in the order of
    their names -> (repositories,)"""
    names, values = np.asarray([r.repo for r in reads]), np.asarray(list(values), float)
    return np.asarray([values[names == name].mean() for name in np.unique(names)])


def losses(reads: list[Read]) -> np.ndarray:
    """Mean loss of each repository, nats per token -> (repositories,)"""
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
        agree = [(x == chosen[r.document]).mean() for r, x in zip(rs, learned, strict=True)]
        mixed = [r for r in rs if np.ptp(r.actions_T) > 0 and np.ptp(found.credits[r.document]) > 0]
        ranks = [scipy.stats.spearmanr(r.actions_T, found.credits[r.document]).statistic for r in mixed]
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
            "oracle_agreement": float(per_repository(rs, agree).mean()),
            "rank_correlation": float(per_repository(mixed, ranks).mean()) if mixed else None,
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


def compare_all(reads: dict[str, list[Read]]) -> dict[str, dict[str, Any]]:
    """The policy with each blind schedule and gate that was read."""
    return {name: compare(reads, "policy", name) for name in (*BLIND, *GATES) if name in reads}


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
            row["comparisons"] = compare_all(reads | {"skip": found.reads["skip"]})
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


def pareto_area(methods: dict[str, dict[str, Any]], points: list[dict[str, float]]) -> float | None:
    """Area under the policy's best gain at each nominal cost, between SKIP and UPDATE_1, as a share of UPDATE_1's gain
    throughout: 0.5 is what mixing both at random would have if gains added up. None if it gains nothing, or the policy
    was not read at UPDATE_1's cost and at one below it."""
    skip, full = methods["skip"], methods["update_1"]
    x = [skip["cost_nominal"], *(p["cost_nominal"] for p in points)]
    y = np.maximum.accumulate([0.0, *(skip["loss"] - p["loss"] for p in points)])
    grid = np.linspace(skip["cost_nominal"], full["cost_nominal"], 201)
    spanned = len(x) > 2 and max(x) > (1 - 1e-3) * full["cost_nominal"]
    return float(np.interp(grid, x, y).mean() / full["gain"]) if full["gain"] > 0 and spanned else None


def analyse(setup: Setup, found: Evaluation) -> dict[str, Any]:
    """All figures of results.json that are measured."""
    methods, points = summarise(setup, found), frontier(setup, found)
    reads, seeds = found.reads, sorted({r.seed for r in found.reads["policy"]})
    skip = losses(reads["skip"])
    return {
        "methods": methods,
        "comparisons": compare_all(reads),
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
    "gradient_threshold": "#E69F00", "online_gate": "#E69F00", "ahead_threshold": "#CC79A7", "policy": "#D55E00", "oracle": "#0072B2",
}  # fmt: skip
MARKERS = dict(zip(LABELS, "_o^sDvP*Xd<>ho*", strict=True))


def figure(*args, **kwargs):
    """matplotlib's subplots in the style of all plots -> (figure, axes)"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd"}
    plt.rcParams |= {"legend.frameon": False, "savefig.dpi": 150, "axes.axisbelow": True}
    return plt.subplots(*args, layout="constrained", **kwargs)


def save_figure(fig, path: Path) -> None:
    """A PNG, whole or not at all; closes the figure."""
    import io

    import matplotlib.pyplot as plt

    content = io.BytesIO()
    fig.savefig(content, format="png", facecolor="white")
    plt.close(fig)
    lm.write_atomic(path, content.getvalue())


def plot_pareto(path: Path, results: dict[str, Any]) -> None:
    """Gain over SKIP against cost, one panel for each currency, and that of all methods at the budget; with intervals
    over repositories. The oracle, which costs what the policy does, stands a little to its right."""
    methods = results["methods"]
    fig, (left, middle, right) = figure(1, 3, figsize=(12.5, 4.2))
    middle.sharey(left)

    def point(axis, name: str, x: float, y: float, along: str) -> None:
        gain, (low, high) = methods[name]["gain"], methods[name]["gain_ci"]
        axis.errorbar(
            x, y, fmt=MARKERS[name], color=COLOURS[name], label=LABELS[name], markersize=8, elinewidth=1.2, markeredgecolor="black",
            markeredgewidth=0.5, ecolor="#444444" if along == "xerr" else None, **{along: [[gain - low], [high - gain]]},
        )  # fmt: skip

    for axis, unit in ((left, "nominal"), (middle, "flops")):
        cost, best = {name: m[f"cost_{unit}"] for name, m in methods.items()}, best_methods(methods, unit)
        axis.plot([cost[n] for n in best], [methods[n]["gain"] for n in best], color="#bbbbbb", zorder=1, label="Pareto frontier")
        line = [(p[f"cost_{unit}"], methods["skip"]["loss"] - p["loss"]) for p in results["frontier"]]
        axis.plot(*zip(*line, strict=True), "--", color=COLOURS["policy"], linewidth=1.2, label="learned policy, other budgets")
        for name in (*FIXED, "policy"):
            point(axis, name, cost[name], methods[name]["gain"], "yerr")
        aside = 0.012 * max(cost.values())  # the policy costs as much: one interval would hide the other
        point(axis, "oracle", cost["oracle"] + aside, methods["oracle"]["gain"], "yerr")
        if unit == results["cost_model"]:
            axis.axvline(results["budget_per_chunk"], color="#D55E00", linestyle=":", linewidth=1, label="budget")
            axis.legend(*axis.get_legend_handles_labels(), loc="lower right", fontsize=8)
        axis.set_xlabel({"nominal": "nominal cost per chunk (SKIP = 1)", "flops": "FLOPs per chunk (SKIP = 1)"}[unit])
    left.set_ylabel("gain over SKIP (nats per token)")
    rest = sorted(methods.keys() - {*FIXED, "base"}, key=lambda name: methods[name]["gain"])
    for y, name in enumerate(rest):
        point(right, name, methods[name]["gain"], y, "xerr")
    right.set_yticks(range(len(rest)), [LABELS[name].split(" (")[0] for name in rest])
    right.set_xlabel("gain at the budget (nats per token)")
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
    axis.set_xlabel(f"chunk (means of {width} side by side)" if width > 1 else "chunk")
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
            label = "SKIP everywhere" if name == "skip" else LABELS[name]  # beside the action's colour
            bottom.plot(first[name, i].losses_T, style, color=COLOURS[name], label=label, linewidth=1.4)
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
    bottom.xaxis.get_major_locator().set_params(integer=True)
    save_figure(fig, path)


def by_file(texts: list[Tokens], reads: dict[str, list[Read]], chunk: int) -> list[dict[str, Any]]:
    """results.json's `by_file`: SKIP's mean loss per token and the gains over it in each file of which a chunk's worth
    was read, from the largest gain of the policy on. A chunk's gain counts alike for all of its tokens; a document's
    first chunk, before which nothing was learned, is left out."""
    skip, columns = {r.document: r.losses_T for r in reads["skip"]}, {}
    for name in ("skip", "update_1", "policy"):
        paths = np.concatenate([np.asarray(texts[r.document].origin)[chunk:] for r in reads[name]])
        values_T = (r.losses_T if name == "skip" else skip[r.document] - r.losses_T for r in reads[name])
        values = np.concatenate([np.repeat(x[1:], chunk) for x in values_T])
        files, place, tokens = np.unique(paths, return_inverse=True, return_counts=True)
        tokens = tokens * len(reads["skip"]) // len(reads[name])  # of several seeds each reads them
        columns[name] = (np.bincount(place, values) / np.bincount(place)).tolist()
    rows = zip(files.tolist(), tokens.tolist(), *columns.values(), strict=True)
    kept: list[dict[str, Any]] = [dict(zip(("file", "tokens", *columns), row, strict=True)) for row in rows if row[1] >= chunk]
    return sorted(kept, key=lambda row: -row["policy"])


def save_reads(path: Path, reads: dict[str, list[Read]]) -> None:
    """reads.safetensors: of each method, each field of its reads stacked; plots can be drawn from it again."""
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
        training = [row for row in ponder.read_metrics(out / "metrics.jsonl") if row["stage"] == "policy"]
        return draw(out, results, reads, training)
    except FileNotFoundError:
        raise ponder.UserError(f"--run {out}: no finished run; give a folder with results.json and reads.safetensors") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ponder.UserError(f"--run {out}: no finished run of this version ({error!r}); evaluate it again") from None


# --- 7. Report ------------------------------------------------------------------------------------


RANKED = 10  # repositories (of one's own, documents) from which on methods are said to be better or worse


def verdict(results: dict[str, Any]) -> str:
    """One sentence: what was found, whichever way it went."""
    policy, full = results["methods"]["policy"], results["methods"]["update_1"]
    where = f"On {results['repositories']} {results['unit']} {results['unseen']}"
    if full["gain_ci"][0] <= 0:
        found = f"gain {full['gain']:.3f} nats per token, interval {spell(full['gain_ci'])}"
        return f"{where}, learning from every chunk (UPDATE_1) did not reliably beat never learning: {found}."
    skip, count = results["methods"]["skip"]["loss"], results["repositories"]
    helped = f"learning from every chunk (UPDATE_1) lowered the loss by {full['gain'] / skip:.1%} ({skip:.3f} to {full['loss']:.3f})"
    kept = f"kept {policy['gain'] / full['gain']:.0%} of that ({policy['gain']:.3f} of {full['gain']:.3f} nats per token)"
    share = {unit: policy[f"cost_{unit}"] / full[f"cost_{unit}"] for unit in ("nominal", "flops")}
    cost = f"at {share['nominal']:.0%} of its nominal cost ({share['flops']:.0%} of its FLOPs)"
    rank = f"at the same budget it was {against(results['comparisons'])}" if count >= RANKED else f"{count} are too few to rank methods by"
    sees = ", which looks ahead in the text," if results.get("looks_ahead") else ""
    return f"{where}, {helped}; the learned policy{sees} {kept} {cost}; {rank}."


def against(comparisons: dict[str, dict[str, Any]]) -> str:
    """Which methods the policy beat, which beat it, and which can't be told apart."""
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not distinguishable from": []}
    for name, c in comparisons.items():
        word = "better than" if c["ci"][0] > 0 else "worse than" if c["ci"][1] < 0 else "not distinguishable from"
        by = "" if word.startswith("not") else f" ({c['difference']:+.3f} {spell(c['ci'])})"
        groups[word].append(f"'{LABELS[name]}'{by}")
    return "; ".join(f"{word} {', '.join(names)}" for word, names in groups.items() if names)


def spell(ci: list[float]) -> str:
    """An interval."""
    return f"[{ci[0]:.4f}, {ci[1]:.4f}]"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def table(methods: dict[str, dict[str, Any]]) -> str:
    """results.json's `methods` as a Markdown table."""
    head = ["method", "loss", "gain over SKIP [95 %]", "over base", "nominal cost", "FLOPs", "seconds per chunk", "updates"]
    rows = []
    for name, m in methods.items():
        recovery = "" if m["oracle_recovery"] is None else f"{m['oracle_recovery']:.2f}"
        gain = f"{m['gain']:+.4f} {spell(m['gain_ci'])}"
        costs = [f"{m['cost_nominal']:.2f}", f"{m['cost_flops']:.2f}", f"{m['seconds']:.4f}", f"{m['update_rate']:.0%}"]
        rank = "" if m["rank_correlation"] is None else f"{m['rank_correlation']:.2f}"
        rows.append([LABELS[name], f"{m['loss']:.4f}", gain, f"{m['gain_over_base']:+.4f}", *costs, recovery, rank])
    return markdown([*head, "oracle recovery", "rank correlation"], rows)


def savings_table(saved: dict[str, dict[str, dict[str, Any]]]) -> str:
    """results.json's `savings` as a Markdown table."""
    percent = lambda x: "not reached" if x is None else f"{x:.0%}"
    cell = lambda x, ci: percent(x) if x is None else f"{percent(x)} [{', '.join(map(percent, ci))}]"
    rows = []
    for name, by_currency in saved.items():
        for currency, x in by_currency.items():
            rows.append([LABELS[name], currency, cell(x["total"], x["total_ci"]), cell(x["learning"], x["learning_ci"])])
    return markdown(("at the loss of", "currency", "saved in all", "of learning's cost"), rows)


def budgets_table(points: list[dict[str, Any]]) -> str:
    """Gains of all methods at the budgets where all were read, and by how much the policy's is larger."""
    points = [p for p in points if "gains" in p]
    if len(points) < 2:
        return ""
    rows = []
    for name in points[0]["gains"]:
        difference = lambda p: f" ({p['comparisons'][name]['difference']:+.4f} {spell(p['comparisons'][name]['ci'])})"
        rows.append([LABELS[name], *(f"{p['gains'][name]:+.4f}" + (difference(p) if name in p["comparisons"] else "") for p in points)])
    head = ["gain at a budget per chunk of", *(f"{p['budget']:.3g}" for p in points)]
    return f"\nThe same at other budgets:\n\n{markdown(head, rows)}\n"


def files_table(rows: list[dict[str, Any]], there: int, most: int = 8) -> str:
    """The files where learning helped most, and least, of those that are there."""
    if not rows:
        return ""
    shown = [*rows[:most], *rows[max(len(rows) - most, most) :]]
    name = lambda path: "".join(c if c.isprintable() and c not in "|`" else "?" for c in path)
    share = lambda r, method: f"{r[method]:+.3f} ({r[method] / r['skip']:+.1%})"
    lines = [(f"`{name(r['file'])}`", f"{r['tokens']:,}", f"{r['skip']:.3f}", share(r, "policy"), share(r, "update_1")) for r in shown]
    text = markdown(("file", "tokens read", "SKIP's loss", "the policy's gain", "UPDATE_1's gain"), lines)
    kept = "" if len(shown) == len(rows) else f" The first {most} and the last {most} are shown; results.json has all."
    return (
        f"\n## Where learning helped most, and least\n\nIt helped {sum(r['update_1'] > 0 for r in rows)} of {len(rows)} files (UPDATE_1) "
        f"of which a chunk's worth was read after a document's first chunk; {there} are there (tests and what others wrote left out, "
        f"unless --files all). Means over a file's tokens, in nats; a chunk's gain counts alike for all "
        f"files in it, so that of a short file is mostly noise.{kept}\n\n{text}\n"
    )


REPORT = """# PonderTTT: {model} on {data}

{sentence}

{documents} documents of {chunks_per_document} chunks{source}; budget {budget:g} per document \
({budget_per_chunk:.3g} per chunk, {cost_model}); seeds of the policy: {seeds}. Gains are over SKIP, the same parameters that never \
learn; intervals are 95 % bootstrap intervals over {unit}; seconds include the frozen prefix, each document timed once, \
methods in random order. Oracle recovery is a method's gain over that of the best plan in hindsight at the budget (above 1 where a \
method spends more). Rank correlation is that of the steps taken on a chunk with what learning from it gave.
{files_table}
## All methods

{table}

How much lower the policy's loss is at the same budget, paired over {unit} (nats per token):

{paired}
{elsewhere}
## Cost and gain

![Gain over SKIP against cost](pareto.png)

What the policy saves where its frontier (other budgets, dashed) reaches the loss of a fixed schedule{area}:

{saved}

![Gain over SKIP along the document](position.png)

## What was decided

![Actions and losses of a few documents](timeline.png)
{training}
## What was run

{facts}
"""


def write_report(out: Path, results: dict[str, Any], trained: bool) -> str:
    """report.md: the verdict, the tables, the plots, what was run. -> the verdict"""
    sentence = verdict(results)
    paired = [
        f"- {LABELS[name]}: {c['difference']:+.4f} {spell(c['ci'])}, lower on {c['better_on']:.0%} of them, "
        f"Wilcoxon p {c['wilcoxon_p']:.2g}, d {c['cohens_d']:+.2f}"
        for name, c in results["comparisons"].items()
    ]
    area = results["pareto_area"]
    under = "; the area under the frontier between SKIP and UPDATE_1 is {:.2f} of what UPDATE_1's gain at no cost would be"
    parts = {
        "sentence": sentence,
        "area": "" if area is None else under.format(area),
        "source": f" from {results['repositories']} repositories" if results["unit"] == "repositories" else "",
        "table": table(results["methods"]),
        "saved": savings_table(results["savings"]),
        "paired": "\n".join(paired),
        "elsewhere": budgets_table(results["frontier"]),
        "files_table": files_table(results.get("by_file", []), results.get("own_files", 0)),
        "training": "\n## Training\n\n![Cost and multiplier over training](training.png)\n" if trained else "",
        "facts": "\n".join(f"- {fact}" for fact in results["facts"]),
    }
    text = REPORT.format(**{"model": results["scale"]} | results | parts)
    lm.write_atomic(out / "report.md", text.encode())
    return sentence


# --- 8. Ablations: python eval.py --ablate WHAT [options of ponder.py] ---------------------------------

# What each variant changes in ponder.py's settings; the first one is what the others are compared with.
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "features": {"all features": {}}
    | {f"without {group}": {"drop_features": (group,)} for group in rl.GROUPS if group != "ahead"}
    | {"and the text ahead": {"look_ahead": True}},
    "fast": {
        "swiglu": {}, "swiglu, reconstruction": {"objective": "reconstruction"}, "swiglu, width 64": {"hidden": 64},
        "swiglu, clipped SGD": {"inner_optimizer": "sgd"}, "swiglu, no momentum": {"momentum": 0.0}, "linear": {"fast": "linear"},
        "linear, reconstruction": {"fast": "linear", "objective": "reconstruction"}, "lora": {"fast": "lora"},
        "lora, rank 64": {"fast": "lora", "hidden": 64},
    },
    "placement": {
        "last two blocks": {"fast_blocks": (-2, -1)}, "last block": {"fast_blocks": (-1,)},
        "last four": {"fast_blocks": (-4, -3, -2, -1)}, "two further down": {"fast_blocks": (-5, -4)},
    },
    "steps": {"learned with all actions": {}} | {f"learned with {a}": {"meta_action": a} for a in rl.ACTIONS[1:]},
    "reward": {"credit for all chunks to come": {}, "gain on the next chunk": {"reward": "next_chunk"}},
    "budget": {f"{b:g} per chunk": {"budget": b} for b in (2.0, 1.25, 1.5, 2.5, 3.0, 4.5, 8.0)},
    "transfer": {
        "as trained": {}, "budget 1.5 per chunk": {"budget": 1.5}, "budget 2.5 per chunk": {"budget": 2.5},
        "12 chunks": {"chunks": 12}, "64 chunks": {"chunks": 64}, "chunks of 128 tokens": {"chunk": 128},
    },
}  # fmt: skip
LEARNED_ANEW = ("fast", "placement", "steps")  # their fast weights have to be meta-learned first


def ablate(what: str, also: tuple[Path, ...], base) -> Path:
    """One run of ponder.py for each variant, in folders of its own (those already there are kept), then
    ablation.json, ablation.md and ablation.png. For `transfer` the policy is only calibrated anew; to the
    repositories in the folders of `also` too. -> the folder

    Raises: UserError, and what a run raises."""
    import ponder

    if also and what != "transfer":
        raise ponder.UserError("--also is for --ablate transfer")
    if base.check_devices or base.stage not in ("all", "eval"):
        raise ponder.UserError("--ablate runs its variants whole; leave --stage and --check-devices out")
    if missing := [folder for folder in also if not folder.is_dir()]:
        raise ponder.UserError(f"--also {missing[0]}: no such folder; give folders of repositories")
    others = {f"repositories of {folder.resolve().name}": {"data": str(folder)} for folder in also}
    if len(others) < len(also):
        raise ponder.UserError("--also: its folders need names of their own, as their results are kept by name; rename one")
    out = base.out or Path("runs") / f"ablate-{what}"
    rows: dict[str, dict[str, Any]] = {}
    for name, change in (ABLATIONS[what] | others).items():
        folder = out / name.replace(" ", "-").replace(",", "")
        cfg = dataclasses.replace(
            base, **change, out=folder, fresh=base.fresh or what in LEARNED_ANEW, resume=(folder / "config.json").exists()
        )
        if "budget" in change:
            cfg = dataclasses.replace(cfg, budget=change["budget"] * cfg.chunks)
        if what in ("budget", "transfer"):
            cfg = dataclasses.replace(cfg, stage="eval", weights=base.weights or ponder.ASSETS / "tiny")  # whatever the chunk
        if (folder / "results.json").exists():
            ponder.refuse_other_settings(
                folder, ponder.settings(ponder.resolve(cfg, ponder.open_mesh(cfg).size)), {"stage", "pretrain_steps"}
            )
        else:
            print(f"--- {what}: {name}", flush=True)
            ponder.run(cfg)
            jax.clear_caches()  # each variant compiles programs of its own: a system maps only so many into one process
        rows[name] = json.loads((folder / "results.json").read_text())
    lm.write_atomic(out / "ablation.json", (json.dumps(rows, indent=2) + "\n").encode())
    lm.write_atomic(out / "ablation.md", f"# Ablation: {what}\n\n{ablation_table(rows)}\n\n![Gains](ablation.png)\n".encode())
    plot_ablation(out / "ablation.png", rows)
    return out


def ablation_table(rows: dict[str, dict[str, Any]]) -> str:
    """For each variant the gains of UPDATE_1 and the policy, how much lower the policy's loss is than that of random
    chunks, and both than the first variant's where the same text was read: the base model's losses tell."""
    columns = ("variant", "SKIP", "UPDATE_1's gain", "share of the loss", "policy's gain", "its cost", "of the oracle's gain")
    lines = []
    of = lambda r, method: np.asarray(r["per_repository"]["loss"][method])
    first = next(iter(rows.values()))
    for name, r in rows.items():
        skip, full, policy = (r["methods"][m] for m in ("skip", "update_1", "policy"))
        same = of(first, "base").shape == of(r, "base").shape and np.allclose(of(first, "base"), of(r, "base"), rtol=1e-3)
        leads = [of(first, m) - of(r, m) if same else np.zeros(1) for m in ("update_1", "policy")]
        against = [f"{x.mean():+.4f} {spell(interval(x))}" if np.ptp(x) else "" for x in leads]
        gains = [f"{m['gain']:+.4f} {spell(m['gain_ci'])}" for m in (full, policy)]
        share, random = f"{full['gain'] / skip['loss']:.1%}", r["comparisons"]["random"]
        recovery = "" if policy["oracle_recovery"] is None else f"{policy['oracle_recovery']:.2f}"
        measured = [f"{skip['loss']:.4f}", gains[0], share, gains[1], f"{policy['cost_nominal']:.2f}", recovery]
        lines.append([name, *measured, f"{random['difference']:+.4f} {spell(random['ci'])}", *against])
    return markdown((*columns, "against random chunks", "UPDATE_1 against the first's", "policy against the first's"), lines)


def plot_ablation(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Gains of UPDATE_1 and of the policy for each variant, with intervals over repositories."""
    fig, axis = figure(figsize=(8, 1.2 + 0.45 * len(rows)))
    y = np.arange(len(rows))
    for name, shift in (("update_1", -0.15), ("policy", 0.15)):
        ms = [r["methods"][name] for r in rows.values()]
        gain, ci = np.asarray([m["gain"] for m in ms]), np.asarray([m["gain_ci"] for m in ms]).T
        axis.errorbar(gain, y + shift, xerr=np.abs(ci - gain), fmt=MARKERS[name], color=COLOURS[name], label=LABELS[name], markersize=7)
    axis.set_yticks(y, list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("gain over SKIP (nats per token)")
    fig.legend(loc="outside upper center", ncols=2, fontsize=9)
    save_figure(fig, path)


# --- 9. Generation: python eval.py --generate --prompt TEXT --------------------------------------------


class Generator(NamedTuple):
    """Everything that stays the same while text is generated."""

    setup: Setup  # its budget is for one chunk
    model: lm.Model  # as it decodes: float32 on CPUs, whose bfloat16 products are slow for single rows
    frozen: Any  # its weights, of lm.join_blocks
    tokenizer: Any
    ends: tuple[int, ...]  # tokens that end a text; documents start with the first
    classes: np.ndarray  # (V, 8) kinds of code in each token
    judged: Judged | None  # the policy, for the action "policy"


class Row(NamedTuple):
    """A text on its way. Its document is an end of text, the context, the prompt and what has been
    generated, cut into chunks as when it is read; each token is predicted from its chunk and the one before."""

    tokens: list[int]  # the document so far
    given: int  # how many of them were not generated
    chunk: int  # place of the chunk that is being written
    memory: rl.Memory  # with the fast weights
    actions: tuple[int, ...] = ()  # taken on the chunks that were learned from
    request: int = 0  # prompt * samples + sample


class Start(NamedTuple):
    """What all prompts go on from: the context, read and learned from with one action."""

    row: Row
    rule: rl.Rule | None  # None: nothing is learned
    base: bool  # without fast weights
    seed: int


class Slot(NamedTuple):
    """What a row has on the device; all rows' are stacked."""

    logits_V: Any  # of its next token
    caches: Any
    weights: Any  # () if all rows have the same


class Completion(NamedTuple):
    """What was written after a prompt."""

    text: str  # without the prompt
    tokens: tuple[int, ...]  # all that were generated
    actions: tuple[int, ...]  # indices into rl.ACTIONS, of the chunks that learning was decided on
    reason: str  # why it ends: "stop", "end" (of text) or "length"


@partial(jax.jit, static_argnums=(0, 1))
def learn_chunk(model, fast, lower, upper, slow, env, rule, memory, t, chunks, inputs_S, targets_C, text_U, key) -> tuple[rl.Memory, Any]:
    """Read chunk t of a document and learn, as rl.episode does -> (memory, action)"""
    x_SD, normed_SD = lm.prefix(model, fast, lower, upper, inputs_S)
    window = lm.Window(x_SD, targets_C, jnp.where(t == 0, 0, targets_C.shape[0]), normed_SD)
    reading, learn, _ = lm.read_chunk(model, fast, upper, slow, memory.state, window)
    *_, action, _ = rl.decide(rule, reading, window, text_U, jnp.zeros(2), memory, env, t, chunks, jax.random.fold_in(key, t))
    return rl.remember(env, memory, t, reading.loss, action, learn(action)), action


def learn(g: Generator, start: Start, row: Row, chunks: int) -> Row:
    """The row after reading its chunks up to the last complete one, of `chunks` that there will be in all;
    without a rule nothing is learned, and nothing need be read."""
    C, last = g.setup.chunk, (len(row.tokens) - 1) // g.setup.chunk
    if start.rule is None or row.chunk == last:
        return row._replace(chunk=last)
    setup, memory, actions = g.setup.at(float(g.setup.env.budget) * chunks), row.memory, row.actions
    document = np.asarray(row.tokens[: last * C + 1], np.int32)
    text_TU = rl.text_features(document, C, g.classes)
    padded = np.append(document, np.zeros(C, np.int32))  # the first chunk is the first half of its window
    frozen = setup.model, setup.fast, setup.lower, setup.upper, setup.slow, setup.env
    for t in range(row.chunk, last):
        low = max(t - 1, 0) * C
        seen = padded[low : low + 2 * C], document[t * C + 1 : (t + 1) * C + 1], text_TU[t]
        memory, action = learn_chunk(*frozen, start.rule, memory, np.int32(t), np.int32(chunks), *seen, jax.random.key(start.seed))
        actions = *actions, int(action)
    return row._replace(chunk=last, memory=memory, actions=actions)


KEPT = 0.5  # of what was learned from a context, for a prompt that is another text: all of it is too much of the last files


def begin(g: Generator, action: str, context: Iterable[int] = (), seed: int = 0) -> Start:
    """Learn from the tokens of a context, chunk by chunk as in an episode, with the action "policy" or one of
    FIXED ("base": there are no fast weights at all). What follows begins anew from W_0 + KEPT (W - W_0), as fine-tuned
    weights are averaged with those before (Wortsman et al., arXiv 2109.01903).

    Raises: ModelError for an action that there is no policy or schedule for."""
    memory = lm.place(g.setup.mesh, rl.init_memory(g.setup.fast, g.setup.slow))  # as `learn_chunk` returns it: compiled once
    row = Row([g.ends[0], *map(int, context)], 0, 0, memory)
    start = Start(row, rule_of(g, action), action == "base", seed)
    row = learn(g, start, row, (len(row.tokens) - 1) // g.setup.chunk)
    kept = jax.tree.map(lambda first, last: first + KEPT * (last - first), g.setup.slow["start"], row.memory.state.weights)
    state = lm.place(g.setup.mesh, lm.init_state(g.setup.fast, g.setup.slow | {"start": kept}))
    return start._replace(row=row._replace(memory=row.memory._replace(state=state)))


def fill(g: Generator, row: Row, size: int, weights: Any) -> tuple[Any, Any]:
    """Read the row's window from its start: the chunk before, and this one so far -> (logits (V,), caches of
    that size)"""
    window = row.tokens[max(row.chunk - 1, 0) * g.setup.chunk :]
    padded = np.zeros(min(size, max(1 << (len(window) - 1).bit_length(), 16)), np.int32)  # few lengths, each is compiled
    padded[: len(window)] = window
    return lm.prefill(g.model, g.setup.fast, g.frozen, g.setup.slow, weights, padded, len(window), size)


def written(g: Generator, row: Row) -> str:
    """What has been generated, as text: what the last tokens before it become longer by."""
    before, after = row.tokens[max(row.given - 8, 0) : row.given], row.tokens[row.given :]
    decode = partial(g.tokenizer.decode, skip_special_tokens=False)
    return decode(before + [token for token in after if token not in g.ends])[len(decode(before)) :]


def rule_of(g: Generator, action: str) -> rl.Rule | None:
    """The rule that takes the action on every chunk, or the policy's at the budget; None where nothing is learned.

    Raises: ModelError for an action that is not known, or a policy that is not there."""
    if action in ("base", "skip"):
        return None
    if action == "policy":
        if g.judged is None or not g.judged.calibration:
            raise lm.ModelError("there is no trained policy for these settings; take another action")
        known = g.judged.calibration["policy"]
        chunks = len(known["spend"][0])  # of the documents that it was calibrated on
        return calibrated_rule(g.setup.at(float(g.setup.env.budget) * chunks), chunks, "policy", known, g.judged.policy)
    if action not in FIXED:
        raise lm.ModelError(f"no action {action!r}; take policy, base, {', '.join(FIXED)}")
    return rl.make_rule(1, rl.init_policy(jax.random.key(0)), plan=FIXED[action], hard=False)


def finish(g: Generator, row: Row, stop: tuple[str, ...], max_new_tokens: int) -> Completion | None:
    """The completion, if the row's last token ended it."""
    text, new = written(g, row), tuple(row.tokens[row.given :])
    if places := [text.find(s) for s in stop if s in text]:
        return Completion(text[: min(places)], new, row.actions, "stop")
    if new[-1] in g.ends or len(new) >= max_new_tokens:
        return Completion(text, new, row.actions, "end" if new[-1] in g.ends else "length")
    return None


def open_prompt(g: Generator, start: Start, prompt: str, more: int = 0) -> Row:
    """The row after learning from the prompt too, as long as it is complete chunks, of a document that gets
    `more` tokens."""
    tokens = start.row.tokens + data.encode(g.tokenizer, [prompt])[0].tolist()
    return learn(g, start, start.row._replace(tokens=tokens, given=len(tokens)), (len(tokens) - 1 + more) // g.setup.chunk)


def generate(
    g: Generator,
    start: Start,
    prompts: list[str],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: tuple[str, ...] = (),
    max_new_tokens: int = 128,
    batch: int = 8,
    learn_own: bool = False,
    begun: Sequence[Row] | None = None,
    show: Callable[[Row], None] = lambda row: None,
) -> list[list[Completion]]:
    """Continue each prompt `samples` times -> the completions of each prompt.

    The fast weights go on learning from the prompt as they did from the context; what is left over at the
    end is less than a chunk and not learned from. A chunk that is finished while generating becomes the
    context of the next; it is not learned from either (SKIP), unless `learn_own`. `begun` has the prompts' rows
    of `open_prompt`, if they are there already.

    Temperature 0 takes the most likely token; else tokens are drawn from the `top_p` nucleus, by the
    seed, the prompt and the sample's number, whatever the `batch` of rows decoded side by side. A text
    ends before a sequence of `stop`, at an end of text, or after `max_new_tokens`. show(row) is called
    for every new token but the last."""
    setup, C, own = g.setup, g.setup.chunk, max_new_tokens if learn_own else 0
    weights_of = lambda row: None if start.base else row.memory.state.weights
    begun = begun or [open_prompt(g, start, prompt, own) for prompt in prompts]
    alike = start.rule is None or (not own and all(row.chunk == start.row.chunk for row in begun))
    longest = max((len(row.tokens) - max(row.chunk - 1, 0) * C for row in begun), default=1)
    size = min(2 * C, -(-(longest + max_new_tokens) // 64) * 64)  # of the caches
    slot_of = lambda row: Slot(*fill(g, row, size, weights_of(row)), () if alike else weights_of(row))
    drawn_by = np.asarray([zlib.crc32(f"{j} {prompt}".encode()) for prompt in prompts for j in range(samples)], np.uint32)

    waiting, done = list(range(len(prompts) * samples)), {}
    rows: list[Row | None] = [None] * min(batch, len(waiting))
    opened: Any = None  # the last prompt's row and slot, which all its samples start from
    slots: Any = None  # all rows'
    turned: set[int] = set()  # rows whose window has moved, or whose fast weights have learned
    while waiting or any(rows):
        for b in range(len(rows)):
            if rows[b] is None and waiting:
                request = waiting.pop(0)
                if request % samples == 0:
                    opened = begun[request // samples], slot_of(begun[request // samples])
                rows[b], slot = opened[0]._replace(request=request), opened[1]
                slots = jax.tree.map(lambda x: jnp.stack([x] * len(rows)), slot) if slots is None else lm.set_row(slots, b, slot)
            elif b in turned:
                slots = lm.set_row(slots, b, slot_of(rows[b]))

        requests, steps = np.asarray([(row.request, len(row.tokens) - row.given) if row else (0, 0) for row in rows]).T
        drawn = jax.random.key(start.seed), drawn_by[requests], steps, slots.logits_V, np.float32(temperature), np.float32(top_p)
        next_B = np.asarray(lm.sample(*drawn))
        turned = set()
        for b, row in enumerate(rows):
            if row is None:
                continue
            row = row._replace(tokens=[*row.tokens, int(next_B[b])])
            if completion := finish(g, row, stop, max_new_tokens):
                done[row.request], rows[b] = completion, None
                continue
            show(row)
            chunks = (row.given - 1 + own) // C
            rows[b] = after = learn(g, start if own else start._replace(rule=None), row, chunks)
            if after.chunk > row.chunk and (row.chunk > 0 or (own and start.rule is not None)):
                turned.add(b)
        going = [row is not None and b not in turned for b, row in enumerate(rows)]
        if any(going):
            places = [len(row.tokens) - 1 - max(row.chunk - 1, 0) * C if row and on else 0 for row, on in zip(rows, going, strict=True)]
            weights = weights_of(start.row) if alike else slots.weights
            args = g.frozen, setup.slow, weights, slots.caches, next_B, np.asarray(places, np.int32)
            logits, caches = lm.decode(g.model, setup.fast, alike, *args)
            slots = Slot(logits, caches, slots.weights)
    return [[done[i * samples + j] for j in range(samples)] for i in range(len(prompts))]


@dataclasses.dataclass(frozen=True)
class Writing:
    """Of --generate, and of --benchmark where answers are generated."""

    generate: bool = False
    """Continue --prompt with a model that learns from it, and from --context, before it writes. Model, fast weights and
    policy are those of the options below, the policy of --weights or the shipped one."""
    prompt: str | None = None
    """The text to continue."""
    context: Path | None = None
    """A folder, a repository say, of which the first --chunks chunks are read before the prompt."""
    action: tuple[Literal["policy", "base", "skip", "update_1", "update_2", "update_4"], ...] = ()
    """What is done about each complete chunk before the last: the policy's choice, or always the same; 'base'
    has no fast weights. Benchmarks take several, and compare them with the first. Left out: policy for --generate; skip,
    update_1 and policy for --benchmark completion."""
    learn_own: bool = False
    """Learn from what is generated too, whenever it fills a chunk; else those chunks are SKIPs."""
    temperature: float | None = None
    """0 takes the most likely token. Left out: 0, and 0.8 with several --samples."""
    top_p: float = 1.0
    """Draw from the most likely tokens that make up this share of the probability."""
    max_new_tokens: int = 128
    """Tokens of a completion at most."""
    samples: int = 1
    """Completions of each prompt."""
    stop: tuple[str, ...] = ()
    """Texts to end before; benchmarks have their own."""
    rows: int = 8
    """Completions that are written side by side."""


def open_generation(options: Writing, cfg) -> tuple[Generator, list[int], dict[str, Any]]:
    """The generator, the tokens of the context, and how to generate.

    Raises: UserError, DataError, ModelError."""
    import ponder

    temperature = (0.8 if options.samples > 1 else 0.0) if options.temperature is None else options.temperature
    if min(options.max_new_tokens, options.samples, options.rows) < 1 or not 0 <= temperature < np.inf or not 0 < options.top_p <= 1:
        raise ponder.UserError(
            "--max-new-tokens, --samples and --rows must be at least 1, --temperature at least 0, --top-p above 0 and at most 1"
        )
    if "" in options.stop:
        raise ponder.UserError("--stop: an empty text stops everything; leave it out")
    if options.context is not None and not options.context.is_dir():
        raise ponder.UserError(f"--context {options.context}: no such folder")
    if options.samples > 1 and not temperature:
        raise ponder.UserError("--samples: at --temperature 0 all would be the same; take 0.2 or more")
    cfg = ponder.resolve(dataclasses.replace(cfg, stage="eval"))
    g, files = ponder.open_generator(cfg), []
    if options.context is not None:
        files = [file for repo in data.load_repos(str(options.context), Counter(), cfg.files == "all").values() for file in repo]
    how = {name: getattr(options, name) for name in ("samples", "top_p", "max_new_tokens", "learn_own")}
    return g, first_chunks(g, files, cfg.chunks), how | {"batch": options.rows, "temperature": temperature}


def first_chunks(g: Generator, files: list[data.SourceFile], chunks: int) -> list[int]:
    """The first tokens of some files, as many as fill that many chunks, if there are."""
    found: list[int] = []
    for file in files:
        if len(found) >= chunks * g.setup.chunk:
            break
        found += data.encode(g.tokenizer, [data.with_path(file)])[0].tolist()
    return found[: chunks * g.setup.chunk]


def run_generate(options: Writing, cfg) -> None:
    """Completions on standard output, one alone as it is written; what was done on standard error."""
    import ponder

    if options.prompt is None or len(options.action) > 1:
        raise ponder.UserError("--generate needs --prompt TEXT, and one --action at most")
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise ponder.UserError("--prompt: not UTF-8; give text") from None
    g, context, settings = open_generation(options, cfg)
    shown, started = 0, time.perf_counter()

    def show(row: Row) -> None:
        nonlocal shown
        if options.samples == 1:
            text = written(g, row)
            hold = max(map(len, options.stop), default=1) - 1
            safe = text[: max(len(text) - hold, 0)].rstrip("\N{REPLACEMENT CHARACTER}")  # half a letter, or half a stop sequence
            print(safe[shown:], end="", flush=True)
            shown = max(shown, len(safe))

    start = begin(g, *(options.action or ("policy",)), context, cfg.seed)
    (completions,) = generate(g, start, [options.prompt], stop=options.stop, show=show, **settings)
    seconds = time.perf_counter() - started
    if options.samples == 1:
        print(completions[0].text[shown:], flush=True)
    else:
        print("\n".join(f"--- {i + 1}\n{c.text}" for i, c in enumerate(completions)))
    taken = Counter(rl.ACTIONS[a] for a in completions[0].actions)
    nothing = "nothing was to be learned" if start.rule is None else "nothing to learn from"
    learned = ", ".join(f"{n} {name}" for name, n in taken.items()) or nothing
    print(f"{learned}; {sum(len(c.tokens) for c in completions)} tokens, {seconds:.1f} s", file=sys.stderr)


# --- 10. The judge: tests in one interpreter, the answer in another ---------------------------------

WARNING = (
    "this runs code that a model wrote. It runs apart from its tests, confined as far as this system allows: "
    "that limits damage, it is not a security boundary. Add --allow-code-execution to go on, best in a container or a virtual machine"
)


PATIENCE = 3  # wall-clock seconds that an answer has for each second of CPU time it is allowed


class BenchmarkError(Exception):
    """Bad input of a benchmark; the message is one line that says what to do."""


class Peer:
    """One end of the pipe between tests and answer. Builtin values cross as JSON; containers as copies that
    every message brings up to date (only one end runs at a time, so both see the same); anything else as
    the number of an object that stays where it is. Nothing is unpickled or evaluated: a result that
    compares equal to a literal is one, rebuilt at this end."""

    CONTAINERS = ("builtins.list", "builtins.dict", "builtins.set", "collections.deque", "collections.Counter",
                  "collections.OrderedDict", "collections.defaultdict")  # fmt: skip
    VALUES: ClassVar = {  # type: what makes it again, from what
        "builtins.bytes": ("builtins.bytes.fromhex", lambda x: [x.hex()]),
        "builtins.complex": ("builtins.complex", lambda x: [x.real, x.imag]),
        "builtins.range": ("builtins.range", lambda x: [x.start, x.stop, x.step]),
        "datetime.datetime": ("datetime.datetime.fromisoformat", lambda x: [x.isoformat()]),
        "datetime.date": ("datetime.date.fromisoformat", lambda x: [x.isoformat()]),
        "datetime.time": ("datetime.time.fromisoformat", lambda x: [x.isoformat()]),
        "datetime.timedelta": ("datetime.timedelta", lambda x: [x.days, x.seconds, x.microseconds]),
        "decimal.Decimal": ("decimal.Decimal", lambda x: [str(x)]),
        "fractions.Fraction": ("fractions.Fraction", lambda x: [str(x)]),
        "numpy.ndarray": ("numpy.array", lambda x: [x.tolist(), x.dtype.str]),
    }
    PLAIN: ClassVar = {  # of their subclasses the value, whatever these say it is
        int: int.__int__, float: float.__float__, str: str.__str__, bytes: bytes.__bytes__, tuple: lambda x: (*tuple.__iter__(x),),
    }  # fmt: skip

    def __init__(self, receive: Callable[[], bytes], write: Callable[[bytes], Any], perform: Callable, first: int):
        self.receive, self.write, self.perform, self.next = receive, write, perform, first  # numbers: even here, odd there
        self.objects: dict[int, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Containers that crossed so far are no longer kept the same."""
        self.shared: dict[int, Any] = {}
        self.numbers = {id(x): n for n, x in self.objects.items()}

    def number(self, x, kept: dict[int, Any]) -> int:
        if id(x) not in self.numbers:
            self.numbers[id(x)], kept[self.next] = self.next, x
            self.next += 2
        return self.numbers[id(x)]

    def resolve(self, path: str) -> Any:
        module, _, name = path.partition(".")
        return operator.attrgetter(name)(importlib.import_module(module))

    def encode(self, x):
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        if x is None or type(x) in (bool, float, str):
            return x
        if type(x) is int:
            return x if abs(x) < 1 << 63 else ["int", hex(x)]
        if type(x) in (tuple, frozenset):
            return [type(x).__name__, [self.encode(item) for item in x]]
        if type(x) is Remote:
            return ["object", x._number]
        if kind in self.CONTAINERS:
            return ["shared", self.number(x, self.shared)]
        if kind in self.VALUES:
            return [kind, self.VALUES[kind][1](x)]
        if isinstance(x, type) and getattr(builtins, x.__name__, None) is x:
            return ["type", x.__name__]
        if kind.startswith("numpy.") and getattr(x, "shape", None) == ():
            return self.encode(x.item())
        plain = next((plain for base, plain in self.PLAIN.items() if isinstance(x, base)), None)
        return self.encode(plain(x)) if plain else ["object", self.number(x, self.objects)]

    def decode(self, x) -> Any:
        if not isinstance(x, list):
            return x
        tag, body = x
        if tag == "int":
            return int(body, 16)
        if tag in ("tuple", "frozenset"):
            return {"tuple": tuple, "frozenset": frozenset}[tag](map(self.decode, body))
        if tag == "object":
            return self.objects[body] if body in self.objects else Remote(self, body)
        if tag == "shared":
            return self.shared[body]
        if tag == "type" and isinstance(getattr(builtins, body), type):
            return getattr(builtins, body)
        return self.resolve(self.VALUES[tag][0])(*body)

    def contents(self) -> dict[int, list]:
        """All that is in the shared containers, and in those that they bring along."""
        found: dict[int, list] = {}
        while len(found) < len(self.shared):
            for n, x in [(n, x) for n, x in self.shared.items() if n not in found]:
                items = list(x.items() if isinstance(x, dict) else x)
                found[n] = [f"{type(x).__module__}.{type(x).__qualname__}", [self.encode(item) for item in items]]
        return found

    def update(self, contents: dict[str, list]) -> None:
        for n, (kind, _) in contents.items():
            if int(n) not in self.shared:
                made = self.resolve(self.CONTAINERS[self.CONTAINERS.index(kind)])()
                self.shared[int(n)], self.numbers[id(made)] = made, int(n)
        before = self.contents()
        for n, x in [(n, self.shared[int(n)]) for n, new in contents.items() if repr(new) != repr(before[int(n)])]:
            items = [self.decode(item) for item in contents[n][1]]
            x.clear()
            x.update(dict(items)) if isinstance(x, dict) else x.update(items) if isinstance(x, set) else x.extend(items)

    def send(self, **message) -> None:
        self.write(json.dumps(message | {"shared": self.contents()}).encode() + b"\n")

    def ask(self, do: str, *args, **kwargs) -> Any:
        """Have the other end do something; do what it asks for meanwhile."""
        self.send(do=do, args=self.encode(args), kwargs=self.encode(tuple(kwargs.items())))
        return self.wait()

    def wait(self) -> Any:
        while True:
            message = json.loads(self.receive())
            self.update(message["shared"])
            if "do" in message:
                self.serve(message)
            elif "raises" in message:
                found = (getattr(builtins, name, None) for name in message["raises"])
                kind = next((c for c in found if isinstance(c, type) and issubclass(c, BaseException)), Exception)
                try:
                    error = kind(*message["text"])
                except TypeError:  # made of something else than text
                    error = next(c for c in kind.__mro__[1:] if c in (ValueError, Exception))(*message["text"])
                raise error
            else:
                return self.decode(message["value"])

    def serve(self, message) -> None:
        try:
            args, kwargs = self.decode(message["args"]), dict(self.decode(message["kwargs"]))
            self.send(value=self.encode(self.perform(message["do"], *args, **kwargs)))
        except BaseException as error:
            kinds = [c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c]
            self.send(raises=kinds, text=[str(x)[:1000] for x in error.args])


class Remote:
    """An object at the other end. It equals no literal, whatever it says itself."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    forward = lambda do: lambda self, *args, **kwargs: self._peer.ask(do, self, *args, **kwargs)
    __call__, __getattr__, __setattr__, __delattr__ = map(forward, ("call", "getattr", "setattr", "delattr"))
    __len__, __iter__, __next__, __bool__, __str__ = map(forward, ("len", "iter", "next", "bool", "str"))
    __getitem__, __setitem__, __delitem__ = map(forward, ("getitem", "setitem", "delitem"))
    del forward

    def __eq__(self, other) -> bool:
        return type(other) is Remote and (self._number == other._number or self._peer.ask("eq", self, other) is True)

    def __hash__(self) -> int:
        return self._number


def confine(folder: str, seconds: int, on: bool = True) -> list[str]:
    """Close this process off for good: files (Landlock), system calls (seccomp), capabilities, limits. Root becomes
    nobody where one of the first two is missing. -> what this system leaves open"""
    import resource
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong)
    libc.prctl(38, 1, None, 0, 0)  # PR_SET_NO_NEW_PRIVS

    # Landlock: only the folder can be written; only it, Python and the system's libraries can be read. Nothing can be made
    # in the folder but files and folders: the tests, which are not closed off, may open what they find there.
    version = libc.syscall(444, None, 0, 1) if on else -1
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    wanted = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]  # TCP and signals too
    rules = libc.syscall(444, wanted, len(wanted), 0) if version > 0 else -1
    readable = [sys.prefix, sys.base_prefix, *sys.path, "/usr", "/lib", "/lib64", "/nix/store"]
    readable += ["/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"]
    for path, allowed in {**dict.fromkeys(readable, 13), "/dev/null": 6, folder: rights & ~0x1E40}.items():
        if rules >= 0 and os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            libc.syscall(445, rules, 1, struct.pack("=Qi", allowed if os.path.isdir(path) else allowed & 7, fd), 0)
            os.close(fd)
    files = rules >= 0 and libc.syscall(446, rules, 0) == 0

    # seccomp: no new processes (threads are fine), programs, sockets, signals, links, rights, debugging, shared memory, and
    # nothing of another process's. Of the calls since Linux 5.1, numbered alike everywhere, there are but two.
    calls = {  # x86-64, arm64
        "fork": (57,), "vfork": (58,), "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198), "kill": (62, 129),
        "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
        "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "prlimit64": (302, 261),
        "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
        "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "chmod": (90,), "fchmod": (91, 52), "fchmodat": (268, 53),
        "chown": (92,), "fchown": (93, 55), "lchown": (94,), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
        "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
        "truncate": (76, 45), "utimensat": (280, 88), "utime": (132,), "utimes": (235,), "futimesat": (261,),
        "link": (86,), "linkat": (265, 37), "symlink": (88,), "symlinkat": (266, 36), "unshare": (272, 97), "setns": (308, 268),
        "mount": (165, 40), "bpf": (321, 280), "perf_event_open": (298, 241), "add_key": (248, 217), "keyctl": (250, 219),
        "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
        "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
        "mq_open": (240, 180), "mq_unlink": (241, 181), "userfaultfd": (323, 282), "prctl": (157, 167),
    }  # fmt: skip
    arguments = {  # the second argument that each may not have
        "fcntl": ((72, 25), (8, 10, 15, 1024)),  # its signals to whom it names: F_SETOWN, F_SETSIG, F_SETOWN_EX; F_SETLEASE
        "ioctl": ((16, 29), (0x8901, 0x8902)),  # the same: FIOSETOWN, SIOCSPGRP
        "socketpair": ((53, 199), (2, 0x802, 0x80002, 0x80802)),  # SOCK_DGRAM reaches sockets by their name
    }
    machines = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
    column, architecture, clone = machines.get(os.uname().machine, (0, 0, 0))
    filtered = on and clone > 0 and libc.prctl(21, 0, None, 0, 0) == 0  # PR_GET_SECCOMP
    op = lambda code, k, yes=0, no=0: struct.pack("HBBI", code, yes, no, k)
    number, deny, missing, allow = op(0x20, 0), op(6, 0x50001), op(6, 0x50026), op(6, 0x7FFF0000)  # EPERM, ENOSYS
    code = op(0x20, 4) + op(0x15, architecture, 1, 0) + op(6, 0x80000000) + number + op(0x35, 0x40000000, 0, 1) + deny
    code += op(0x35, 424, 0, 4) + op(0x15, 436, 2) + op(0x15, 439, 1) + missing + allow  # close_range, faccessat2
    code += b"".join(op(0x15, numbers[column], 0, 1) + deny for numbers in calls.values() if column < len(numbers))
    for numbers, values in arguments.values():
        code += op(0x15, numbers[column], 0, len(values) + 3) + op(0x20, 24)
        code += b"".join(op(0x15, value, i) for i, value in zip(range(len(values) - 1, 0, -1), values))
        code += op(0x15, values[-1], 0, 1) + deny + number
    code += op(0x15, clone, 0, 3) + op(0x20, 16) + op(0x45, 0x10000, 1, 0) + deny + allow  # threads; clone3 hides its flags
    buffer = ctypes.create_string_buffer(code)

    if os.getuid() == 0 and not (files and filtered):
        os.chown(folder, 65534, 65534)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    libc.prctl(1, signal.SIGKILL, None, 0, 0)  # PR_SET_PDEATHSIG: not without its judge
    limits = {"AS": 1 << 30, "CPU": seconds, "FSIZE": 1 << 24, "NOFILE": 64, "CORE": 0}
    for name, value in (limits | {"NPROC": 4096 if filtered else 1}).items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    filtered = filtered and libc.prctl(22, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)), 0, 0) == 0
    return [what for what, closed in (("files", files), ("network and signals", filtered)) if not closed]


def write_all(fd: int, data: bytes) -> None:
    """os.write, until nothing is left."""
    while data:
        data = data[os.write(fd, data) :]


def remove(folder: str) -> None:
    """Remove a folder, even if what was left in it is closed to its owner or deeper than Python goes."""
    import shutil
    import subprocess

    try:
        if os.path.lexists(folder):
            shutil.rmtree(folder)
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)


def work(requests: int, replies: int, parent: int, folder: str, seconds: int, on: bool) -> None:
    """The worker: run the answer, do what the tests ask for."""
    left_open = confine(folder, seconds, on)
    if os.getppid() != parent:
        os._exit(1)
    answer = sys.modules["answer"] = type(sys)("answer")
    lines = os.fdopen(requests, "rb")

    def perform(do: str, *args, **kwargs):
        if do == "load":
            return exec(compile(args[0], "answer.py", "exec", dont_inherit=True), vars(answer))
        if do == "name" and args[0] not in vars(answer):
            raise NameError(f"name '{args[0]}' is not defined")
        if do == "name":
            return vars(answer)[args[0]]
        return peer.forget() if do == "forget" else (getattr(builtins, do, None) or getattr(operator, do))(*args, **kwargs)

    peer = Peer(lambda: lines.readline() or os._exit(0), lambda data: write_all(replies, data), perform, first=1)
    peer.send(value=peer.encode(tuple(left_open)))
    peer.wait()


def preside() -> None:
    """The judge: start a worker, run the tests against it, write a verdict to where this began."""
    import resource
    import shutil  # noqa: F401  before a signal can interrupt another import: `remove` needs it

    task, prctl = json.load(sys.stdin), ctypes.CDLL(None).prctl
    folder = task["folder"]

    def leave(*_):
        """Whoever started this is gone, or wants it gone, and may say so many times."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        remove(folder)
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != task["parent"]:
        return
    os.mkdir(folder, 0o700)
    os.chdir(folder)
    # Results may be large, and a loop in C over one of them hears no signal.
    for kind, value in ((resource.RLIMIT_AS, 1 << 31), (resource.RLIMIT_CPU, PATIENCE * task["seconds"] + 3)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    os.umask(0)  # the worker may be nobody
    verdict, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no other process of this user may look into this one
    requests, replies, printed = os.pipe(), os.pipe(), os.pipe()
    inherited = [(null, 0), (printed[1], 1), (printed[1], 2), (requests[0], 100), (replies[1], 101)]
    start = f"{task['program']}\nwork(100, 101, {os.getpid()}, {folder!r}, {task['seconds']}, {task['confined']})"
    worker = os.posix_spawn(
        sys.executable, [sys.executable, "-I", "-c", start], os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, *pair) for pair in inherited], setsid=True,
    )  # fmt: skip
    for fd in (requests[0], replies[1], printed[1]):
        os.close(fd)

    def finish(result: str, detail: str = ""):
        """Whatever the tests would catch, this ends them."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a killed process's threads die one by one, each sends it
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.kill(worker, signal.SIGKILL)
        _, status, used = os.wait4(worker, 0)
        if result == "died" and os.WIFSIGNALED(status):
            result = "timeout" if used.ru_utime + used.ru_stime > task["seconds"] - 0.5 else result
            detail = signal.Signals(os.WTERMSIG(status)).name
        if result == "abandoned":
            remove(folder)
        else:
            write_all(verdict, json.dumps([result, detail[:2000]]).encode())
        os._exit(0)

    signal.signal(signal.SIGALRM, lambda *_: finish("timeout"))
    signal.signal(signal.SIGTERM, lambda *_: finish("abandoned"))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * task["seconds"])
    if os.getppid() != task["parent"]:
        finish("abandoned")
    unread, output = bytearray(), 0
    poll = select.poll()
    for fd in (replies[0], printed[0]):
        poll.register(fd, select.POLLIN)

    def receive() -> bytes:
        nonlocal output
        while (end := unread.find(b"\n")) < 0:
            for fd, _ in poll.poll():
                data = os.read(fd, 1 << 20)
                if fd == replies[0]:
                    if not data:
                        finish("died")
                    unread.extend(data)
                else:
                    output += len(data)
                    if not data:
                        poll.unregister(fd)
            if len(unread) > 1 << 24 or output > 1 << 20:
                finish("output too large")
        line = bytes(unread[:end])
        del unread[: end + 1]
        return line

    def perform(do: str, target, *args, **kwargs):
        if do != "call" or not any(target is x for x in peer.objects.values()):
            raise AttributeError("objects of the tests can only be called")
        return target(*args, **kwargs)

    def write(data: bytes) -> None:
        try:
            write_all(requests[1], data)
        except BrokenPipeError:
            finish("died")

    peer = Peer(receive, write, perform, first=0)
    try:
        left_open = peer.wait()
        run = lambda source, name: exec(compile(source, name, "exec", dont_inherit=True), names)
        names: dict[str, Any] = {"__name__": "tests", "__file__": folder + "/tests.py"}
        run(task["setup"], "setup")
        peer.ask("load", task["answer"])
        names |= {name: peer.ask("name", name) for name in task["names"]}
        run(task["tests"], "tests")
        if task["cases"]:
            import unittest

            result: Any = unittest.TestResult()
            result.startTest = lambda test, start=result.startTest: (peer.ask("forget"), peer.forget(), start(test))
            result.failfast = True
            unittest.TestSuite(unittest.defaultTestLoader.loadTestsFromTestCase(names[c]) for c in task["cases"]).run(result)
            for kind, found in (("failed", result.failures), ("error", result.errors)):
                if found:
                    finish(kind, f"{found[0][0]}: {found[0][1].strip().splitlines()[-1]}")
            if not result.testsRun or not result.wasSuccessful():
                finish("error", "no test ran")
        finish("passed", ", ".join(left_open))
    except AssertionError as error:
        finish("failed", f"AssertionError: {error}")
    except BaseException as error:
        finish("error", f"{type(error).__name__}: {error}")


class Problem(NamedTuple):
    """A task of a benchmark, as one text to go on from, and how a continuation is judged."""

    task_id: str
    prompt: str  # what a model is given
    stop: tuple[str, ...]  # where its continuation ends
    reference: str  # the benchmark's own continuation
    before: str  # of a continuation, to make a program of it
    setup: str  # trusted code that the tests need
    names: tuple[str, ...]  # of the program that the tests use
    tests: str
    cases: tuple[str, ...] = ()  # classes of unittest in them; left out: plain statements


class Verdict(NamedTuple):
    """On one answer."""

    result: str  # passed, failed, error, timeout, died, output too large
    detail: str = ""


@cache
def judge_program() -> str:
    """What judge and worker run: the parts above, without the rest of this file."""
    modules = "builtins, ctypes, importlib, json, operator, os, select, signal, sys"
    head = f"from __future__ import annotations\nimport {modules}\nPATIENCE = {PATIENCE}\n"
    return head + "\n".join(map(inspect.getsource, (Peer, Remote, confine, write_all, remove, work, preside)))


def judge(problem: Problem, completion: str, seconds: int = 10, confined: bool = True, running: set | None = None) -> Verdict:
    """Run an answer against its problem's tests in interpreters of their own, in a temporary folder."""
    task = {"program": judge_program(), "answer": problem.before + completion, "parent": os.getpid()}
    task |= {"seconds": seconds, "confined": confined, **{k: getattr(problem, k) for k in ("setup", "names", "tests", "cases")}}
    running = set() if running is None else running
    folder = os.path.join(tempfile.gettempdir(), f"judge-{secrets.token_hex(8)}")  # which the judge makes
    task["folder"] = folder
    environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1"} | {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{judge_program()}\npreside()"], cwd="/", env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        running.add(process)
        try:
            out, _ = process.communicate(json.dumps(task).encode(), timeout=PATIENCE * seconds + 3)
            return Verdict(*json.loads(out)) if out else Verdict("died", "the judge too")
        except subprocess.TimeoutExpired:  # the tests hang where no signal is handled
            return Verdict("timeout", "in the tests")
        finally:
            process.kill()
            process.communicate()
            running.discard(process)
    finally:
        remove(folder)


def judge_all(jobs: Iterable[tuple[Problem, str]], workers: int, seconds: int) -> Iterator[tuple[int, Verdict]]:
    """Verdicts as they come, with the place of their job. Stopping early leaves nothing behind."""
    running: set[subprocess.Popen] = set()
    judge_program()  # once, before there are threads: they can't parse at the same time
    pool, futures = ThreadPoolExecutor(workers), {}
    try:
        futures = {pool.submit(judge, *job, seconds, running=running): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(f.done() for f in futures):
            for process in list(running):
                process.terminate()
            time.sleep(0.05)


# --- 11. Benchmarks: python eval.py --benchmark NAME ----------------------------------------------

HANDED_OVER = ("PIL", "xml")  # modules whose objects ClassEval's tests hand to the answer: the tests use them at its end
MBPP_SHOTS = (2, 3, 4)  # the tasks that Austin et al. (2021) show as examples


class Benchmark(NamedTuple):
    """Where a benchmark's rows are, and what makes problems of them."""

    hub: str
    subset: str | None
    problems: Callable[[list[dict[str, Any]]], list[Problem]]  # from its rows


def names_in(code: str, defined: bool) -> set[str]:
    """The names that a program defines at its top level, or that it uses."""
    tree = ast.parse(code)
    if not defined:
        return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    named = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return named | {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}


def what_tests_use(code: str, tests: str) -> tuple[str, tuple[str, ...]]:
    """The imports of a reference that its tests use too, and the names in it that they do."""
    used = names_in(tests, defined=False)
    imports = [n for n in ast.parse(code).body if isinstance(n, ast.Import | ast.ImportFrom)]
    needed = [n for n in imports if any((a.asname or a.name) in used for a in n.names)]
    there = [n for n in needed if (n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name).partition(".")[0] in HANDED_OVER]
    names = names_in(code, defined=True) | {a.asname or a.name for n in there for a in n.names}
    return "\n".join(ast.unparse(n) for n in needed if n not in there), tuple(sorted(names & used))


def humaneval(rows: list[dict[str, Any]]) -> list[Problem]:
    """Functions to be completed, with the stop sequences of Chen et al. (2021)."""
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    made = []
    for r in rows:
        prompt, tests = r["prompt"], f"{r['test']}\ncheck({r['entry_point']})"
        made.append(Problem(r["task_id"], prompt, stop, r["canonical_solution"], prompt, prompt, (r["entry_point"],), tests))
    return made


def mbpp(rows: list[dict[str, Any]]) -> list[Problem]:
    """All rows, three of which are the examples in every prompt (they belong to neither test nor training)."""
    lines = lambda text: text.replace("\r\n", "\n")
    ask = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n[BEGIN]\n"
    task = lambda r: ask.format(r["text"], "\n".join(map(lines, r["test_list"])))
    rows = sorted(rows, key=lambda r: r["task_id"])
    examples = "".join(f"{task(r)}{lines(r['code'])}\n[DONE]\n\n" for r in rows if r["task_id"] in MBPP_SHOTS)
    made = []
    for r in rows:
        code, tests = lines(r["code"]), "\n".join(map(lines, [r["test_setup_code"], *r["test_list"]]))
        imports, names = what_tests_use(code, tests)
        made.append(Problem(f"MBPP/{r['task_id']}", examples + task(r), ("[DONE]",), code, "", imports, names, tests))
    return made


def mbpp_test(rows: list[dict[str, Any]]) -> list[Problem]:
    """The test split, tasks 11 to 510: what papers report."""
    return [p for p in mbpp(rows) if 11 <= int(p.task_id.removeprefix("MBPP/")) <= 510]


def classeval(rows: list[dict[str, Any]]) -> list[Problem]:
    """Whole classes, each from its skeleton."""
    made = []
    for r in rows:
        imports, code, name = "\n".join(r["import_statement"]) + "\n\n\n", r["solution_code"], r["class_name"]
        prompt = f"# {name}, to be completed\n{r['skeleton'].rstrip()}\n\n\n# {name}, complete\n{imports}"
        stop = ("\n# ", "\nif __name__", "\nprint")
        setup, names = what_tests_use(imports + code, r["test"])
        cases = tuple(c.strip() for c in r["test_classes"])
        made.append(Problem(r["task_id"], prompt, stop, code, imports, setup, names, r["test"], cases))
    return made


def classeval_methods(rows: list[dict[str, Any]]) -> list[Problem]:
    """One method at a time, after the rest of its class."""
    made = []
    for r, whole in zip(rows, classeval(rows)):
        code = r["solution_code"]
        lines = code.splitlines(keepends=True)
        body = next(n for n in ast.parse(code).body if isinstance(n, ast.ClassDef) and n.name == r["class_name"]).body
        found = {n.name: n for n in body if isinstance(n, ast.FunctionDef)}
        for m in r["methods_info"]:
            own = found[m["method_name"]]
            start, inside = min([own.lineno, *(d.lineno for d in own.decorator_list)]) - 1, own.body[0].lineno - 1
            rest = "".join(lines[:start] + lines[own.end_lineno :]).rstrip()
            text = re.split('["“”]{3}', m["method_description"])[1]
            before = f'{whole.before}{rest}\n\n{"".join(lines[start:inside])}        """{text}"""\n'
            reference = "".join(lines[inside : own.end_lineno])
            stop = ("\n    def", "\n    @", "\nclass", "\ndef", "\n#", "\nif", "\nprint")
            made.append(Problem(f"{r['task_id']}.{m['method_name']}", before, stop, reference, before, *whole[5:8], (m["test_class"],)))
    return made


BENCHMARKS = {
    "humaneval": Benchmark("openai/openai_humaneval", None, humaneval),
    "mbpp": Benchmark("google-research-datasets/mbpp", "full", mbpp),
    "mbpp-test": Benchmark("google-research-datasets/mbpp", "full", mbpp_test),
    "classeval": Benchmark("FudanSELab/ClassEval", None, classeval),
    "classeval-methods": Benchmark("FudanSELab/ClassEval", None, classeval_methods),
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A JSON array, or JSON lines, gzipped if so named.

    Raises: BenchmarkError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            text = file.read()
        return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise BenchmarkError(f"{path}: not readable as JSON lines or a JSON array ({error})") from error


def load_problems(name: str, path: Path | None) -> list[Problem]:
    """A benchmark from a file, or else from the hub.

    Raises: BenchmarkError."""
    if path is None:
        import datasets

        try:
            splits = datasets.load_dataset(BENCHMARKS[name].hub, BENCHMARKS[name].subset)
        except Exception as error:  # whatever the network, the hub or the cache may raise
            reason = str(error).strip().partition("\n")[0]
            raise BenchmarkError(f"{BENCHMARKS[name].hub} can't be had ({reason}); download it and pass --benchmark-file") from error
        rows: Any = [row for split in splits.values() for row in split]
    else:
        rows = read_rows(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of old escapes in the benchmarks' programs
            return BENCHMARKS[name].problems(rows)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, SyntaxError, StopIteration) as error:
        raise BenchmarkError(f"{path or name}: not the format of {name} ({type(error).__name__}: {error})") from error


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that one of k answers passes, drawn without replacement from `samples` of which `passed` do:
    1 - C(n - c, k) / C(n, k), as a product (Chen et al. 2021)."""
    if samples - passed < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(samples - passed + 1, samples + 1)))


def pass_rates(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Each problem's pass@k, in the order of their ids, for every k that its samples allow."""
    counts = [(len(r["results"]), r["results"].count("passed")) for r in sorted(records, key=lambda r: r["task_id"])]
    most = min(n for n, _ in counts)
    return {f"pass@{k}": np.asarray([pass_at_k(n, c, k) for n, c in counts]) for k in (1, 10, 100) if k <= most}


def summarise_benchmark(records: list[dict[str, Any]]) -> dict[str, Any]:
    """benchmark.json: of each action pass@k with intervals over problems, the results counted, and how much
    higher than the first action's it is, paired over the problems that both answered."""
    by_action: dict[str, dict[str, dict[str, Any]]] = {}
    for r in records:
        by_action.setdefault(r["action"], {})[r["task_id"]] = r
    first, out = next(iter(by_action.values())), {}
    for action, found in by_action.items():
        rates = pass_rates(list(found.values()))
        results = Counter(x for r in found.values() for x in r["results"])
        row: dict[str, Any] = {"problems": len(found), "results": dict(results)}
        row |= {k: {"mean": float(x.mean()), "ci": interval(x)} for k, x in rates.items()}
        both = [t for t in found if t in first]
        if found is not first and both:
            ours, theirs = (pass_rates([side[t] for t in both]) for side in (found, first))
            for k in (k for k in ours if k in theirs):
                change = ours[k] - theirs[k]
                p = float(scipy.stats.wilcoxon(change).pvalue) if change.any() else 1.0
                row[k] |= {"change": float(change.mean()), "change_ci": interval(change), "wilcoxon_p": p}
        out[action] = row
    return out


def benchmark_table(summary: dict[str, Any]) -> str:
    """benchmark.json as a Markdown table."""
    lines = []
    for action, row in summary.items():
        results = ", ".join(f"{n} {name}" for name, n in sorted(row["results"].items(), key=lambda x: -x[1]))
        for k in (k for k in row if k.startswith("pass@")):
            x = row[k]
            change = [f"{x['change']:+.4f} {spell(x['change_ci'])}", f"{x['wilcoxon_p']:.2g}"] if "change" in x else ["", ""]
            lines.append([action, str(row["problems"]), k, f"{x['mean']:.4f} {spell(x['ci'])}", *change, results])
    return markdown(("action", "problems", "", "pass rate [95 %]", "above the first action [95 %]", "Wilcoxon p", "results"), lines)


def read_finished(path: Path, key: str) -> list[dict[str, Any]]:
    """What a run that was stopped has written, of which each line has an action and `key`; a last line that was cut off
    is removed.

    Raises: BenchmarkError if it is damaged."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        lm.write_atomic(path, whole)
    rows = read_rows(path)
    if not all(isinstance(row, dict) and row.keys() >= {key, "action"} for row in rows):
        raise BenchmarkError(f"{path} is damaged; choose another --out")
    return rows


def in_order(records: list[dict[str, Any]], actions: Sequence[str]) -> list[dict[str, Any]]:
    """Those of the asked actions first: the first of these is what the others are compared with."""
    return sorted(records, key=lambda r: actions.index(r["action"]) if r["action"] in actions else len(actions))


def read_records(path: Path, problems: list[Problem]) -> list[dict[str, Any]]:
    """What an earlier run has written of these problems."""
    wanted = {p.task_id for p in problems}
    return [r for r in read_finished(path, "task_id") if r["task_id"] in wanted]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """One line in one write, so that a run that is stopped leaves whole lines."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        write_all(fd, (json.dumps(record) + "\n").encode())
    finally:
        os.close(fd)


def judge_answers(answers: list[tuple[Problem, list[str]]], action: str, path: Path, workers: int, seconds: int) -> list[dict[str, Any]]:
    """Judge all answers to some problems; each problem's record is written once its last verdict is in.
    -> the records"""
    jobs = [(i, completion) for i, (_, completions) in enumerate(answers) for completion in completions]
    found: dict[int, dict[int, Verdict]] = {i: {} for i, _ in jobs}  # of each problem, by job
    written = []
    for job, verdict in judge_all([(answers[i][0], completion) for i, completion in jobs], workers, seconds):
        i = jobs[job][0]
        found[i][job] = verdict
        problem, completions = answers[i]
        if len(found[i]) == len(completions):
            results, details = zip(*(found[i][j] for j in sorted(found[i])))
            record = {"task_id": problem.task_id, "action": action, "results": results, "details": details, "completions": completions}
            append_record(path, record)
            written.append(record)
    return written


def answer_benchmark(
    problems: list[Problem],
    actions: dict[str, Callable[[list[Problem]], list[list[str]]]],
    batch: int,
    path: Path,
    workers: int,
    seconds: int,
) -> list[dict[str, Any]]:
    """Have every action answer every problem, batch by batch, and judge its samples; problems whose record is
    there already are left out. -> all records"""
    records = read_records(path, problems)
    done = {(r["action"], r["task_id"]) for r in records}
    for i in tqdm(range(0, len(problems), batch), "answering", unit="batch", disable=len(problems) <= batch):
        for action, answer in actions.items():
            asked = [p for p in problems[i : i + batch] if (action, p.task_id) not in done]
            if asked:
                records += judge_answers(list(zip(asked, answer(asked), strict=True)), action, path, workers, seconds)
    return records


def read_solutions(path: Path, problems: list[Problem]) -> list[tuple[Problem, list[str]]]:
    """Answers from lines of {"task_id", "completion"}; more than one for a task are its samples.

    Raises: BenchmarkError."""
    by_id = {p.task_id: p for p in problems} | {p.task_id.removeprefix("MBPP/"): p for p in problems}
    answers: dict[str, list[str]] = {}
    for i, row in enumerate(read_rows(path), 1):
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str) or str(row.get("task_id")) not in by_id:
            raise BenchmarkError(f'{path}, line {i}: not {{"task_id": one of the benchmark\'s, "completion": text}}')
        answers.setdefault(by_id[str(row["task_id"])].task_id, []).append(row["completion"])
    if not answers:
        raise BenchmarkError(f'{path}: no answers in it; give lines of {{"task_id", "completion"}}')
    return [(by_id[task], completions) for task, completions in answers.items()]


@dataclasses.dataclass(frozen=True)
class Benchmarks:
    """Of --benchmark."""

    benchmark: Literal["completion", "humaneval", "mbpp", "mbpp-test", "classeval", "classeval-methods"] | None = None
    """completion: learn from four fifths of the files of each test repository of --data, complete functions of
    the others; nothing is run. Or judge answers to HumanEval (164 problems), MBPP (all 974, or its test split of
    500), ClassEval (100 classes, or their 410 methods one by one), generated with --action. The folder is --out;
    --resume goes on in it."""
    benchmark_file: Path | None = None
    """The benchmark's own file (.json, .jsonl, .jsonl.gz), instead of the hub."""
    reference: bool = False
    """Judge the benchmark's own solutions."""
    solutions: Path | None = None
    """Judge these answers: JSON lines of task_id and completion."""
    problems: int | None = None
    """Take the first ones only, this many. Left out: all."""
    allow_code_execution: bool = False
    """Needed, as answers are run: confined, but without a security boundary."""
    workers: int = os.cpu_count() or 1
    """Answers judged at once."""
    judge_seconds: int = 10
    """CPU time that one answer has, start and tests included; three times as much on the clock."""


def isolation() -> str:
    """What this system's judge closes off, from a trial.

    Raises: BenchmarkError if answers can't be judged here."""
    trial = Problem("trial", "", (), "", "", "", (), "")
    verdict = judge(trial, "import decimal", 5)
    if verdict.result != "passed":
        raise BenchmarkError(f"answers can't be judged here: {verdict.result} {verdict.detail}")
    files = "FILES ARE OPEN" if "files" in verdict.detail else "no files but Python's and a temporary folder"
    calls = "NETWORK AND SIGNALS ARE OPEN" if "network" in verdict.detail else "no network, processes or signals"
    return f"{files}; {calls}; limits of memory, CPU time and file size"


def benchmark_folder(cfg, name: str, file: str, *options: Any) -> tuple[Path, Any]:
    """Where a benchmark's results go, and in config.json what they are of -> (folder, its lock, as long as that is kept).

    Raises: BenchmarkError if --resume and what is there don't belong together, UserError if that is of other settings, or
    another process is at work on it."""
    import ponder

    out = cfg.out or next(p for i in itertools.count(1) if not (p := Path("runs") / f"{name}-{i}").exists())
    if cfg.resume != (out / file).exists():
        wrong = "not there; leave --resume out" if cfg.resume else "there already; add --resume, or choose another --out"
        raise BenchmarkError(f"{out / file} is {wrong}")
    settings = ponder.settings(cfg, *options)
    if cfg.resume:  # with more problems, repositories or actions, if wanted
        ponder.refuse_other_settings(out, settings, {"stage", "problems", "test_documents", "action", "rows", "workers"})
    out.mkdir(parents=True, exist_ok=True)
    held = ponder.lock(open(out / "run.lock", "a"), out)  # noqa: SIM115  its caller keeps it
    lm.write_atomic(out / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
    return out, held


def run_benchmark(options: Benchmarks, generation: Writing, cfg) -> str:
    """Judge generated answers, the references, or a file's. -> the verdict, one line; of completion its table

    Raises: BenchmarkError, and what generation raises."""
    assert options.benchmark
    if options.benchmark == "completion":
        if options.reference or options.solutions or options.problems or options.benchmark_file:
            raise BenchmarkError("completion judges no answers: leave --reference, --solutions, --problems and --benchmark-file out")
        return run_completion(options, generation, cfg)
    if not sys.platform.startswith("linux"):
        raise BenchmarkError("answers can only be judged on Linux, which can confine them")
    if not options.allow_code_execution:
        raise BenchmarkError(WARNING)
    given = options.reference + (options.solutions is not None) + bool(generation.action)
    if given != 1:
        raise BenchmarkError("--benchmark needs one of --action (generate the answers), --reference and --solutions FILE")
    if min(options.workers, options.judge_seconds) < 1 or (options.problems is not None and options.problems < 1):
        raise BenchmarkError("--workers, --judge-seconds and --problems must be at least 1")
    problems = load_problems(options.benchmark, options.benchmark_file)[: options.problems]
    what = "reference" if options.reference else "solutions" if options.solutions else "-".join(generation.action)
    out, _held = benchmark_folder(cfg, f"{options.benchmark}-{what}", "answers.jsonl", options, generation)
    path, judging = out / "answers.jsonl", (out / "answers.jsonl", options.workers, options.judge_seconds)
    records = read_records(path, problems)
    if generation.action:
        g, context, settings = open_generation(generation, cfg)
        print(f"isolation: {isolation()}", flush=True)
        actions = {a: partial(answer, g, begin(g, a, context, cfg.seed), settings) for a in generation.action}
        records = answer_benchmark(problems, actions, max(1, generation.rows // generation.samples), *judging)
    else:
        answers = read_solutions(options.solutions, problems) if options.solutions else [(p, [p.reference]) for p in problems]
        done, texts = {r["task_id"] for r in records}, {p.task_id: completions for p, completions in answers}
        if any(r["completions"] != texts.get(r["task_id"]) for r in records):
            raise BenchmarkError(f"{path} is of other answers than {options.solutions or 'the references'}; choose another --out")
        if len(answers) < len(problems):
            print(f"{len(problems) - len(answers)} of {len(problems)} problems have no answer, and do not count")
        print(f"isolation: {isolation()}", flush=True)
        records += judge_answers([a for a in answers if a[0].task_id not in done], what, *judging)
        place = {p.task_id: i for i, p in enumerate(problems)}
        for r in sorted(records, key=lambda r: place[r["task_id"]]):
            for result, detail in dict.fromkeys(zip(r["results"], r["details"])):
                if result != "passed":
                    print(f"{r['task_id']}: {result} {ascii(detail)[1:-1]}".strip())  # an answer may have chosen it
    if records:
        summary = summarise_benchmark(in_order(records, generation.action))
        table = benchmark_table(summary)
        lm.write_atomic(out / "benchmark.json", (json.dumps(summary, indent=2) + "\n").encode())
        lm.write_atomic(out / "benchmark.md", f"# {options.benchmark}\n\n{table}\n".encode())
        if generation.action:
            print(table)
    results = [x for r in records for x in r["results"]]
    return f"passed {results.count('passed')} of {len(results)}"


def answer(g: Generator, start: Start, settings: dict[str, Any], problems: list[Problem]) -> list[list[str]]:
    """The samples of each problem."""
    found = generate(g, start, [p.prompt for p in problems], stop=problems[0].stop, **settings)
    return [[completion.text for completion in completions] for completions in found]


# --- 12. Repository completion: python eval.py --benchmark completion [--data FOLDER] -----------------

FUNCTIONS, BEFORE, LINE = 8, 16, 48  # of a repository; chunks of the file before a function; tokens of a line; at most
MEASURES = {"loss": "loss of the function's second half", "exact": "next line exact", "similarity": "edit similarity"}


def edit_similarity(a: str, b: str) -> float:
    """1 - (Levenshtein distance / length of the longer one)."""
    row = np.arange(len(b) + 1)
    for i, letter in enumerate(a, 1):
        changed = np.append(i, np.minimum(row[:-1] + [letter != other for other in b], row[1:] + 1))
        row = np.minimum.accumulate(changed - np.arange(len(b) + 1)) + np.arange(len(b) + 1)  # insertions
    return 1.0 - float(row[-1]) / max(len(a), len(b), 1)


@partial(jax.jit, static_argnums=(0, 1))
def window_losses(model, fast, lower, upper, slow, weights, inputs_S, targets_C):
    """Losses (C,) of the last tokens of a window under some fast weights."""
    x_SD, normed_SD = lm.prefix(model, fast, lower, upper, inputs_S)
    window = lm.Window(x_SD, targets_C, jnp.int32(targets_C.shape[0]), normed_SD)
    return lm.predict(model, fast, upper, slow, weights, window).losses_C


def complete(g: Generator, start: Start, held: list[data.Function], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Have each function's rest read, and its next line written, after the file before it, learned from as any prompt
    is. -> MEASURES, the lines and the actions of each"""
    s, C = g.setup, g.setup.chunk
    tokens = lambda text: data.encode(g.tokenizer, [text])[0].tolist()
    prompts = [g.tokenizer.decode(tokens(f.before)[-BEFORE * C :], skip_special_tokens=False) for f in held]
    settings = settings | {"max_new_tokens": LINE}
    begun = [open_prompt(g, start, prompt, LINE if settings.get("learn_own") else 0) for prompt in prompts]
    written, found = generate(g, start, prompts, begun=begun, **settings), []
    first_line = lambda text: text.strip().partition("\n")[0].strip()
    for f, row, (completion,) in zip(held, begun, written, strict=True):
        rest = tokens(f.rest)[:C]
        window = np.asarray(([g.ends[0]] * (2 * C) + row.tokens + rest)[-2 * C - 1 :], np.int32)
        weights = None if start.base else row.memory.state.weights
        losses = window_losses(s.model, s.fast, s.lower, s.upper, s.slow, weights, window[:-1], window[-C:])
        ours, theirs = first_line(completion.text), first_line(f.rest)
        figures = {"loss": float(losses[-len(rest) :].mean()), "exact": float(ours == theirs), "similarity": edit_similarity(ours, theirs)}
        own = row.actions[len(start.row.actions) :]
        found.append({"function": f.name, **figures, "written": ours, "expected": theirs, "actions": own})
    return found


def run_completion(benchmark: Benchmarks, options: Writing, cfg) -> str:
    """Learn from four fifths of the files of each test repository, complete functions of the others, which are
    learned from too, down to the function: completion.jsonl, completion.json and completion.md. -> the table

    Raises: BenchmarkError, UserError, DataError, ModelError."""
    import ponder

    if options.context is not None or options.samples > 1:
        raise BenchmarkError("--context and --samples are not for completion, where each repository is its own context; leave them out")
    actions = options.action or ("skip", "update_1", "policy")
    g, _, settings = open_generation(options, cfg)
    out, _held = benchmark_folder(cfg, "completion", "completion.jsonl", benchmark, options)
    cfg = ponder.resolve(dataclasses.replace(cfg, stage="eval"))
    path = out / "completion.jsonl"
    records = read_finished(path, "repository")
    done = {(r["action"], r["repository"]) for r in records}
    tasks = completion_tasks(g, cfg)
    for action in actions:  # compiles, before the first clock starts
        begin(g, action, next(iter(tasks.values()))[0][: 2 * g.setup.chunk], cfg.seed)
    for name, (context, held) in tqdm(tasks.items(), "repositories"):
        for action in (a for a in actions if (a, name) not in done):
            started = time.perf_counter()
            start = begin(g, action, context, cfg.seed)
            jax.block_until_ready(start.row.memory)
            seconds, chunks = time.perf_counter() - started, len(context) // g.setup.chunk
            found = complete(g, start, held, settings)
            taken = [a for actions in (start.row.actions, *(f["actions"] for f in found)) for a in actions]
            cost = float(np.asarray(rl.NOMINAL)[taken].mean()) if taken else 0.0  # then nothing is read
            figures = {"action": action, "repository": name, "chunks": chunks, "cost": cost, "seconds": seconds / max(chunks, 1)}
            records.append(figures | {"functions": found})
            append_record(path, records[-1])
    summary = summarise_completion(in_order([r for r in records if r["repository"] in tasks], actions))
    table = completion_table(summary)
    lm.write_atomic(out / "completion.json", (json.dumps(summary, indent=2) + "\n").encode())
    lm.write_atomic(out / "completion.md", f"# Repository completion, {cfg.data}\n\n{table}\n".encode())
    return table


def completion_tasks(g: Generator, cfg) -> dict[str, tuple[list[int], list[data.Function]]]:
    """By repository the tokens to learn from and the functions to complete: of one's own repository, or else of
    those of the test split, as many as --test-documents; a folder that has none of these is taken for one repository.

    Raises: DataError if none is large enough."""
    # Of a dataset half as much again as is learned from: a fifth is held out.
    need = data.Need([data.Cut("test", -(-3 * cfg.chunks // 2), 1, cfg.test_documents)], g.tokenizer, g.setup.chunk)
    selection = data.Selection(cfg.text_column, cfg.subset, cfg.data_dir, cfg.dataset_split)
    repos = data.load_repos(cfg.data, Counter(), cfg.files == "all", selection, need)

    def large_enough(repos: dict[str, list[data.SourceFile]], own: bool) -> dict[str, tuple[list[int], list[data.Function]]]:
        found = {}
        for name in sorted(repos, key=data.by_name_hash):
            if len(found) < cfg.test_documents and (own or data.split_of(name) == "test"):
                files, held = data.hold_out(repos[name], FUNCTIONS * (8 if own else 1))
                context = first_chunks(g, files, cfg.chunks)
                if held and len(context) >= 2 * g.setup.chunk:
                    found[name] = context, held
        return found

    own, folder = data.one_repository(cfg.data), Path(cfg.data).expanduser()
    found = large_enough(repos, own)
    if not found and not own and folder.is_dir():
        found = large_enough({folder.resolve().name: [file for name in sorted(repos) for file in repos[name]]}, True)
    if not found:
        raise data.DataError(f"--data {cfg.data}: no repository to complete: one needs five files, a function and two chunks of code")
    return found


def summarise_completion(records: list[dict[str, Any]]) -> dict[str, Any]:
    """completion.json: of each action the mean of each measure with intervals over repositories (or over the functions of
    one's own), and how much higher than the first action's it is, paired over those that both have."""
    alone = len({r["repository"] for r in records}) == 1
    by_action = {action: [r for r in records if r["action"] == action] for action in dict.fromkeys(r["action"] for r in records)}

    def measured(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        if alone:
            return {f["function"]: f for f in rows[0]["functions"]}
        return {r["repository"]: {k: float(np.mean([f[k] for f in r["functions"]])) for k in MEASURES} for r in rows}

    first, out = measured(next(iter(by_action.values()))), {}
    for action, rows in by_action.items():
        found = measured(rows)
        values = {k: np.asarray([found[unit][k] for unit in sorted(found)]) for k in MEASURES}
        row: dict[str, Any] = {k: {"mean": float(x.mean()), "ci": interval(x)} for k, x in values.items()}
        row |= {k: float(np.mean([r[k] for r in rows])) for k in ("cost", "seconds")} | {"units": len(found)}
        both = found.keys() & first.keys()
        for k in MEASURES if out and both else ():
            change = np.asarray([found[unit][k] - first[unit][k] for unit in sorted(both)])
            row[k] |= {"change": float(change.mean()), "change_ci": interval(change)}
        out[action] = row
    return out


def completion_table(summary: dict[str, Any]) -> str:
    """completion.json as a Markdown table."""
    lines = []
    for action, row in summary.items():
        cells = []
        for x in (row[k] for k in MEASURES):
            change = f" ({x['change']:+.3f} {spell(x['change_ci'])})" if "change" in x else f" {spell(x['ci'])}"
            cells.append(f"{x['mean']:.3f}{change}")
        lines.append([action, str(row["units"]), *cells, f"{row['cost']:.2f}", f"{row['seconds']:.3f}"])
    return markdown(("action", "of", *MEASURES.values(), "nominal cost", "seconds per chunk"), lines)


# --- 13. Speed: python eval.py --bench [options of ponder.py] -------------------------------------------


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of --bench."""

    bench: bool = False
    """Measure speed: bench.json and bench.md in --out. Sizes come from --scale, --base, --dtype, --chunk, --chunks, --batch and
    --meta-chunks; without --base the scales above tiny have random weights, which are as fast as any. Where other programs
    run too pin it to one core (taskset -c 0): its seconds are then those of its own work."""
    only: tuple[Literal["cold", "prefill", "update", "decode", "mfu", "skip", "features", "ppo", "growth"], ...] = ()
    """Which rows; all if left out."""
    repeats: int = 15
    """How often each is timed, at most; fewer where it takes minutes, but three times at least."""
    longest: int = 1024
    """Chunks of the longest document; a PPO iteration has 256, or as many as this."""


SHAPES = {"125m": (768, 12, 12), "350m": (1024, 24, 16), "1b": (1280, 36, 20), "xl": (1600, 48, 25)}  # GPT-2's width, blocks, heads
TORCH = ("PyTorch", "torch.compile")
AGREE = {"float32": 1e-3, "bfloat16": 0.2}  # largest difference from what PyTorch computes, relative to the largest value


class Bench(NamedTuple):
    """What is measured: a model with its fast weights, on one device."""

    options: Speed
    cfg: Any
    setup: Setup
    params: Any


def cores() -> int:
    """That this process computes on; 0 on an accelerator."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return mine if jax.default_backend() == "cpu" else 0


def measure(bench: Bench, runs: dict[str, Callable[[], Any]], patience: float = 30) -> tuple[dict[str, float], dict[str, Any]]:
    """Time functions in turn, in an order that changes, after one call of each -> (median seconds, all samples). On one core
    the seconds are those that this process computed, elsewhere the wall's."""
    samples: dict[str, Any] = {name: {"wall": [], "cpu": []} for name in runs}
    jax.block_until_ready([run() for run in runs.values()])
    clock = time.process_time if cores() == 1 else time.perf_counter
    started, rng = clock(), np.random.default_rng(0)
    for i in range(bench.options.repeats):
        if i >= 3 and clock() - started > patience:
            break
        for name in rng.permutation(list(runs)):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(runs[name]())
            samples[name]["wall"].append(time.perf_counter() - wall)
            samples[name]["cpu"].append(time.process_time() - cpu)
    return {name: float(np.median(s["cpu" if cores() == 1 else "wall"])) for name, s in samples.items()}, samples


def open_bench(options: Speed, cfg, model: lm.Model | None = None, params: Any = None) -> Bench:
    """The model that is given, or else that of --base or the scale, with fast weights that no gradient is zero of.

    Raises: UserError if two chunks don't fit the model, ModelError if it can't be read."""
    import ponder

    if model is None and (cfg.base or cfg.scale == "tiny"):
        model, params = lm.load_model(ponder.base_folder(cfg.base or ponder.SCALES["tiny"].base), cfg.dtype)
    elif model is None:
        model = lm.Model(50257, 1024, *SHAPES[cfg.scale], dtype=cfg.dtype)
        params = lm.init_gpt2(jax.random.key(0), model)
    if 2 * cfg.chunk > model.positions:
        raise ponder.UserError(f"--chunk {cfg.chunk}: two chunks must fit the model's {model.positions} positions")
    fast, mesh, key = ponder.fast_weights(cfg, model), lm.make_mesh(), jax.random.key(1)
    slow = lm.init_slow(key, model, fast)
    slow["start"] = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), slow["start"])  # so that no gradient is zero
    flops = np.asarray(lm.count_flops(model, fast, cfg.chunk))
    env = rl.Env(jnp.asarray(rl.NOMINAL, jnp.float32), jnp.float32(2 * cfg.chunks))
    params = lm.freeze(model, params)
    params, slow, env = lm.place(mesh, (params, slow, env))
    lower, upper = lm.split_blocks(params, fast.blocks[0])
    return Bench(options, cfg, Setup(model, fast, cfg.chunk, lower, upper, slow, env, flops / flops[0], mesh), params)


def random_tokens(bench: Bench, *shape: int) -> np.ndarray:
    """The same ones for the same shape."""
    return np.random.default_rng(0).integers(0, bench.setup.model.vocab, shape, np.int32)


def random_documents(bench: Bench, count: int, chunks: int) -> tuple[Any, Any]:
    """Tokens (N, T*C + 1) and text features (N, T, 16), of noise, on the devices."""
    text = np.random.default_rng(1).random((count, chunks, len(rl.CODE) + len(rl.SEQUENCE) + len(rl.AHEAD)), np.float32)
    return lm.place(bench.setup.mesh, (random_tokens(bench, count, chunks * bench.cfg.chunk + 1), text))


def row(what: str, ours: str, theirs: str, ratio: float | None, bar: str, met: bool | None, samples: Any, **more) -> dict[str, Any]:
    """Of the table; `met` is None where the bar is for another machine."""
    return {"what": what, "ours": ours, "theirs": theirs, "ratio": ratio, "bar": bar, "met": met, "samples": samples} | more


def beside_torch(
    bench: Bench, what: str, unit: str, work: float, ours: Callable, make: Callable, error: Callable, native: bool, names: Any = TORCH
) -> list:
    """Rows of `work` per second, ours and PyTorch's, eager and compiled: make(compile) gives its function, error(our result,
    its result) how far apart they are. With `native` the bar holds in bfloat16 on an accelerator and in float32 on a CPU."""
    bar, dtype = ("1x", "float32") if cores() else ("1.5x", "bfloat16")
    if importlib.util.find_spec("torch") is None:
        return [row(what, "", "PyTorch is not installed", None, bar, None, {})]
    import torch

    torch.set_num_threads(max(cores(), 1))
    torch.set_float32_matmul_precision("highest" if cores() else "high")  # JAX too takes TF32 where there is that
    runs, errors, rows = {"ours": ours}, {}, []
    for name in names:
        try:
            run = make(torch.compile if name == "torch.compile" else lambda f: f)
            errors[name], runs[name] = error(ours(), run()), run
        except Exception as problem:  # of many kinds: the compiler needs a C++ compiler, for one
            rows.append(row(f"{what}, {name}", "", f"does not run ({type(problem).__name__})", None, bar, None, {}))
    seconds, samples = measure(bench, runs)
    for name, off in errors.items():
        ratio, both = seconds[name] / seconds["ours"], {n: samples[n] for n in ("ours", name)}
        met = ratio >= float(bar[:-1]) and off <= AGREE[bench.cfg.dtype] if not native or bench.cfg.dtype == dtype else None
        amounts = [f"{work / seconds[n]:.4g} {unit}" for n in both]
        rows.append(row(f"{what}, {name}", amounts[0], amounts[1], ratio, bar, met, both, difference=off))
    return rows


def bench_prefill(bench: Bench) -> list[dict]:
    """The loss of a batch of windows, beside `transformers`."""
    s, tokens = bench.setup, random_tokens(bench, bench.cfg.batch, 2 * bench.cfg.chunk + 1)
    loss = jax.jit(partial(lm.language_loss, s.model))

    def make(wrap):
        import torch

        net, x = wrap(torch_model(bench, s.model.dtype)), torch.tensor(tokens, dtype=torch.long, device=torch_device())

        @torch.no_grad()
        def run():
            found = net(x[:, :-1], use_cache=False).logits
            return torch.nn.functional.cross_entropy(found.float().flatten(0, 1), x[:, 1:].flatten()).item()

        return run

    error = lambda a, b: abs(float(a) - b) / b
    what = f"prefill and loss of {len(tokens)} x {2 * bench.cfg.chunk} tokens"
    return beside_torch(bench, what, "tokens/s", tokens[:, 1:].size, lambda: loss(bench.params, tokens), make, error, True)


def torch_model(bench: Bench, dtype: str) -> Any:
    """The same model, of `transformers`."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        if bench.setup.model.kind == "gpt2":
            lm.save_gpt2(Path(folder), bench.setup.model, bench.params, jnp.float32)
        else:
            folder = bench.cfg.base
        net: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return net.to(torch_device()).eval()


def torch_device() -> str:
    """PyTorch's name of the kind of device that JAX computes on."""
    return "cpu" if cores() else "cuda"


def bench_update(bench: Bench) -> list[dict]:
    """UPDATE_1 on one chunk, beside the same in PyTorch; both have the frozen prefix's activations."""
    rows, fast = [], bench.setup.fast
    if (bench.setup.model.kind, fast.objective, fast.optimizer) != ("gpt2", "next_token", "muon"):
        return [row("UPDATE_1 of a chunk", "", "in PyTorch only for GPT-2, next_token and muon", None, "1.5x", None, {})]
    for kind in ("swiglu", "lora"):
        hidden = bench.cfg.hidden if kind == bench.cfg.fast else None
        b = open_bench(bench.options, dataclasses.replace(bench.cfg, fast=kind, hidden=hidden), bench.setup.model, bench.params)
        rows += beside_torch(b, f"UPDATE_1 of a chunk, {kind}", "steps/s", 1, *update_pair(b), False)
    return rows


def update_pair(bench: Bench) -> tuple[Callable, Callable, Callable]:
    """Our step, a maker of PyTorch's, and how far the two are apart, of the change in the weights and of the loss."""
    s, window = bench.setup, jax.tree.map(lambda x: x[0, 1], prefixes(bench.setup, random_documents(bench, 1, 2)[0]))
    state = lm.init_state(s.fast, s.slow)
    if s.fast.momentum:
        state = state._replace(momentum=state.weights)  # as if steps had been taken, so that it counts

    @jax.jit
    def step(upper, slow, state, window):
        reading, gradient_of, first = lm.differentiate(s.model, s.fast, upper, slow, state.weights, window)
        return reading.loss, lm.ttt_update(s.fast, slow, state, gradient_of, first, 1, s.model.dtype)

    def error(a, b):
        apart = [abs(float(a[0]) - b[0]) / b[0]]
        for name, old in lm.flatten(state.weights).items():
            ours, theirs = np.asarray(lm.flatten(a[1].weights)[name] - old), b[1][name].float().cpu().numpy() - old
            apart.append(np.abs(ours - theirs).max() / np.abs(ours).max())
        return float(max(apart))

    return lambda: step(s.upper, s.slow, state, window), partial(torch_step, s, state, window), error


def torch_step(s: Setup, state: lm.State, window: lm.Window, wrap: Callable) -> Callable[[], Any]:
    """UPDATE_1 of GPT-2 with a swiglu adapter or lora, by next_token and muon, as model.py has it, on a window with its
    whole context -> a function that gives (loss, new weights)."""
    import torch
    import torch.nn.functional as F

    model, fast, first, C, K = s.model, s.fast, s.fast.blocks[0], s.chunk, s.model.K
    put = lambda x: torch.tensor(np.asarray(x, np.float32), device=torch_device())
    frozen = lambda x: put(x).to(getattr(torch, model.dtype)) if x.ndim == 2 else put(x)
    blocks = [jax.tree.map(frozen, p) for p in s.upper["h"]]
    final, head = jax.tree.map(put, s.upper["ln_f"]), frozen(s.upper["wte"]["weight"])
    start, momentum = ({k: put(x) for k, x in lm.flatten(x or {}).items()} for x in (state.weights, state.momentum))
    cached = lm.caches_lowest(model, fast)
    fall = float(jax.lax.rsqrt(1 + jnp.exp(s.slow["log_anneal"]) * state.steps))
    sizes = {k: float(jnp.exp(x[0])) * fall for k, x in lm.flatten(s.slow["log_step"]).items()}
    x_SD, normed_SD = put(window.x_SD), put(window.normed_SD) if cached else None
    targets = torch.tensor(np.asarray(window.targets_C), dtype=torch.long, device=torch_device())
    visible = torch.ones(C, 2 * C, dtype=torch.bool, device=torch_device()).tril(C)
    norm = lambda p, x: F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], model.eps)
    dense = lambda p, x: torch.addmm(p["bias"], x, p["weight"])
    heads = lambda x: x.unflatten(-1, (-1, K)).transpose(0, 1)[None]

    def block(p, x, last, w, m):
        rows, normed = slice(C, None) if last else slice(None), norm(p["ln_1"], x)
        q, k, v = dense(p["attn"]["c_attn"], normed).chunk(3, -1)
        q = q[rows]
        if fast.kind == "lora" and m is not None:
            low_rank = lambda x, n: x @ w[f"adapters.{n}_down"][m] @ w[f"adapters.{n}_up"][m]
            q, v = q + low_rank(normed[rows], "q"), v + low_rank(normed, "v")
        y = F.scaled_dot_product_attention(*map(heads, (q, k, v)), attn_mask=visible if last else None, is_causal=not last)
        x = x[rows] + dense(p["attn"]["c_proj"], y[0].transpose(0, 1).flatten(1))
        normed = norm(p["ln_2"], x)
        return x + dense(p["mlp"]["c_proj"], F.gelu(dense(p["mlp"]["c_fc"], normed), approximate="tanh")), normed

    def loss_of(w):
        x, normed = x_SD, normed_SD
        for i in range(first, model.layers):
            m = fast.blocks.index(i) if i in fast.blocks else None
            if i > first or not cached:
                x, normed = block(blocks[i - first], x, i == model.layers - 1, w, m)
            if fast.kind == "swiglu" and m is not None:
                w0, w1, w2 = (w[f"adapters.w{j}"][m] for j in range(3))
                x = x + (F.silu(normed @ w0) * (normed @ w2)) @ w1
        return F.cross_entropy((F.linear(norm(final, x), head) + w["bias"]).float(), targets)

    def direction(g):
        x = g * torch.rsqrt((g * g).sum((-2, -1), keepdim=True) + 1e-20)
        wide, (a, b, c) = x.shape[-2] <= x.shape[-1], lm.NEWTON_SCHULZ
        x = x if wide else x.mT
        for _ in range(lm.ITERATIONS):
            xx = x @ x.mT
            x = a * x + (b * xx + c * (xx @ xx)) @ x
        return x if wide else x.mT

    def learn(w, momentum, gradients):
        summed = {k: fast.momentum * momentum[k] + g if momentum else g for k, g in zip(w, gradients, strict=True)}
        return {k: w[k] - sizes[k] * direction(g) for k, g in summed.items()}, summed

    loss_of, learn = wrap(loss_of), wrap(learn)

    def run():
        w = {k: x.detach().requires_grad_() for k, x in start.items()}
        with torch.autocast(torch_device(), torch.bfloat16, enabled=model.dtype == "bfloat16"):
            loss = loss_of(w)
            gradients = torch.autograd.grad(loss, list(w.values()))
            with torch.no_grad():
                new, _ = learn(w, momentum, gradients)
        return loss.item(), new  # which waits for the device

    return run


def bench_decode(bench: Bench) -> list[dict]:
    """The most likely tokens after a prompt, by key-value cache, beside `transformers`; and whether a token takes as long
    after many chunks were learned from as after one."""
    s, new = bench.setup, bench.cfg.chunk // 2
    model = s.model._replace(dtype="float32") if cores() else s.model  # as ponder.open_generator has it
    frozen, greedy = lm.join_blocks(model, s.lower, s.upper), (np.float32(0), np.float32(1))
    size = min(-(-(min(16, new) + new) // 64) * 64, 2 * bench.cfg.chunk)  # of the caches, as generate() takes it

    def ours(prompts, weights, n):
        slots = [lm.prefill(model, s.fast, frozen, s.slow, weights, p, len(p), size) for p in prompts]
        (logits, caches), rows, found = jax.tree.map(lambda *x: jnp.stack(x), *slots), np.arange(len(prompts), dtype=np.uint32), []
        for i in range(n):
            found.append(np.asarray(lm.sample(jax.random.key(0), rows, rows, logits, *greedy)))
            places = np.full(len(prompts), prompts.shape[1] + i, np.int32)
            logits, caches = lm.decode(model, s.fast, True, frozen, s.slow, weights, caches, found[-1], places)
        return np.stack(found, 1)

    def make(prompts, _):
        import torch

        net, x = torch_model(bench, model.dtype), torch.tensor(prompts, dtype=torch.long, device=torch_device())
        net.generation_config.eos_token_id = None  # go on
        options = {"attention_mask": torch.ones_like(x), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return lambda: net.generate(x, **options)[:, x.shape[1] :].cpu().numpy()

    rows, same = [], new if cores() else 1  # tokens compared: in bfloat16 one that is as likely as another ends the likeness
    error = lambda a, b: float((a[:, :same] != b[:, :same]).mean())
    for count in (1, 8):
        prompts = random_tokens(bench, count, min(16, new))
        what = f"generation of {count} x {new} tokens"
        work, base = count * new, partial(ours, prompts, None, new)
        rows += beside_torch(bench, what, "tokens/s", work, base, partial(make, prompts), error, False, ("PyTorch",))

    few, many = 1, min(64, bench.options.longest)
    g = Generator(s, model, frozen, None, (0,), np.zeros((model.vocab, len(rl.CODE)), np.float32), None)
    learned = lambda n: begin(g, "update_1", random_tokens(bench, n * s.chunk)).row.memory.state.weights
    runs = {f"{n} learned": partial(ours, random_tokens(bench, 1, min(16, new)), learned(n), new) for n in (few, many)}
    seconds, samples = measure(bench, runs)
    short, long = seconds.values()
    ms = lambda x: f"{1e3 * x / new:.4g} ms"
    what, ratio = f"time of a token after {many} chunks learned, and after {few}", long / short
    return [*rows, row(what, ms(long), ms(short), ratio, "at most 1.1", ratio <= 1.1, samples)]


def bench_mfu(bench: Bench) -> list[dict]:
    """Utilisation of the matrix units: the products that a model needs, none that is computed again, over what the
    largest product here reaches."""
    import ponder

    s, cfg, model = bench.setup, bench.cfg, bench.setup.model
    runs = {}
    for n in (512, 1024, 2048) if cores() else (4096, 8192):
        square = jax.random.normal(jax.random.key(n), (n, n)).astype(cfg.dtype)
        runs[f"{n}"] = partial(jax.jit(partial(lm.matmul, dtype=cfg.dtype)), square, square)
    actions = ponder.random_actions(np.random.default_rng(0), cfg.batch, cfg.meta_chunks).astype(np.int32)
    documents = random_documents(bench, cfg.batch, cfg.meta_chunks)[0], lm.place(s.mesh, actions)
    carry = jax.tree.map(jnp.array, [s.slow, ponder.meta_optimizer(100).init(s.slow)])  # the step takes them over

    def learn():
        frozen = (s.mesh, model, s.fast, s.chunk, 100, s.lower, s.upper)
        carry[0], carry[1], loss, _ = ponder.meta_step(*frozen, *carry, *documents)
        return loss

    windows = random_tokens(bench, cfg.batch, 2 * s.chunk + 1)
    runs["prefill"] = partial(jax.jit(partial(lm.language_loss, model)), bench.params, windows)
    seconds, samples = measure(bench, runs | {"meta-training": learn})
    peak, S = max(2 * int(n) ** 3 / seconds[n] for n in runs if n.isdigit()), 2 * s.chunk
    matrices = sum(x.size for x in jax.tree.leaves(bench.params["h"]) if x.ndim == 2) + model.vocab * model.width
    work = {"prefill": cfg.batch * S * (2 * matrices + 2 * model.layers * S * model.heads * model.K)}  # of attention the half that is seen
    per_action = [meta_flops(s, steps) for steps in lm.STEPS]
    work["meta-training"] = sum(per_action[a] for a in actions.ravel())
    rows = []
    for name, least in {"prefill": 0.55, "meta-training": 0.4}.items():
        share = work[name] / seconds[name] / peak
        met = share >= least if not cores() and cfg.scale == "125m" and cfg.dtype == "bfloat16" else None
        speeds = (f"{work[name] / seconds[name] / 1e12:.4g} TFLOP/s", f"{peak / 1e12:.4g} TFLOP/s, the largest product")
        used = {n: x for n, x in samples.items() if n == name or n.isdigit()}
        rows.append(row(f"model FLOPs utilisation, {name}", *speeds, share, f"{least:.0%} at 125m on an H100", met, used, flops=work[name]))
    return rows


def counted_flops(function: Callable, *args) -> float:
    """As XLA counts them."""
    counted: Any = jax.jit(function).lower(*args).cost_analysis()
    return counted["flops"]


def meta_flops(s: Setup, steps: int) -> float:
    """Of one chunk in meta-training: forward, `steps` inner steps, and backward through them, as XLA counts them."""
    s = s._replace(fast=s.fast._replace(remat=False))  # what is computed again does not count
    window = jax.eval_shape(lambda x: jax.tree.map(lambda x: x[0, 1], prefixes(s, x)), np.zeros((1, 2 * s.chunk + 1), np.int32))

    def read(slow, state, upper, window):
        reading, gradient_of, first = lm.differentiate(s.model, s.fast, upper, slow, state.weights, window)
        return reading.loss, lm.ttt_update(s.fast, slow, state, gradient_of, first, steps, s.model.dtype)

    def both(slow, state, upper, window):
        result, back = jax.vjp(lambda slow, state: read(slow, state, upper, window), slow, state)
        return back(result)

    count = lambda f: counted_flops(f, s.slow, lm.init_state(s.fast, s.slow), s.upper, window)
    prefix = lm.count_flops(s.model, s.fast, s.chunk)[0] - count(lambda *args: read(*args)[0])
    return prefix + count(both)


def read_documents(s: Setup, rule: rl.Rule, documents: tuple[Any, Any]) -> rl.Step:
    """All on one device, one after the other, frozen prefix included."""
    return run_rule(s, Group(rl.Document(prefixes(s, documents[0]), documents[1]), len(documents[0])), rule, jax.random.key(0))


def bench_skip(bench: Bench) -> list[dict]:
    """Whether what is not learned is not computed: seconds beside FLOPs, both as shares of UPDATE_4's."""
    s, chunks, rows = bench.setup, min(bench.cfg.chunks, bench.options.longest), []
    s = s.at(2.0 * chunks)
    policy = rl.init_trainer(jax.random.key(0), rl.Ppo(), s.env, chunks).policy
    make = partial(rl.make_rule, chunks, policy)
    rules = {"UPDATE_4": make(plan=3, hard=False), "SKIP": make(plan=0), "a policy at a budget of 2": make()}
    for count in (1, 4):
        documents = random_documents(bench, count, chunks)
        seconds, samples = measure(bench, {name: partial(read_documents, s, rule, documents) for name, rule in rules.items()})
        for name in list(rules)[1:]:
            flops = float(s.flops_A[np.asarray(read_documents(s, rules[name], documents).action)].mean() / s.flops_A[3])
            share = seconds[name] / seconds["UPDATE_4"]
            both = {n: samples[n] for n in (name, "UPDATE_4")}
            what, met = f"{name} against UPDATE_4, {count} document(s) of {chunks} chunks", abs(share / flops - 1) <= 0.1
            rows.append(row(what, f"{share:.3f} of its seconds", f"{flops:.3f} of its FLOPs", share / flops, "within 10 %", met, both))
    return rows


def bench_features(bench: Bench) -> list[dict]:
    """What the 32 features and the policy add to a SKIP step."""
    s, (tokens, text) = bench.setup, random_documents(bench, 1, 2)
    window = jax.tree.map(lambda x: x[0, 1], prefixes(s, tokens))
    memory = rl.Memory(lm.init_state(s.fast, s.slow), jnp.zeros(4), jnp.float32(0), jnp.float32(0))
    policy = rl.init_policy(jax.random.key(0))
    read = lambda upper, slow, window: lm.predict(s.model, s.fast, upper, slow, slow["start"], window)
    look = lambda reading, window, text_U: rl.apply_policy(policy, rl.features(reading, window, text_U, memory, s.env, 1, 2))
    both = lambda upper, slow, window, text_U: ((reading := read(upper, slow, window)).loss, look(reading, window, text_U))
    args, flops = (s.upper, s.slow, window), lm.count_flops(s.model, s.fast, s.chunk)[0]
    share = counted_flops(look, jax.eval_shape(read, *args), window, text[0, 1]) / flops
    known, classes = np.asarray(tokens[0]), np.zeros((s.model.vocab, len(rl.CODE)), np.float32)
    runs = {
        "prefix": partial(jax.jit(partial(lm.prefix, s.model, s.fast)), s.lower, s.upper, tokens[0, : 2 * s.chunk]),
        "predict": partial(jax.jit(lambda *args: read(*args).loss), *args),
        "with features": partial(jax.jit(both), *args, text[0, 1]),
        "text": partial(rl.text_features, known, s.chunk, classes),
    }
    seconds, samples = measure(bench, runs)
    skip, more = seconds["prefix"] + seconds["predict"], seconds["with features"] - seconds["predict"]
    ms = lambda x: f"{1e3 * x:.3g} ms"
    step, text_seconds, below = f"{ms(skip)}, a SKIP step", seconds["text"] / 2, "below 1 % on an accelerator"
    return [
        row("features and policy, FLOPs", f"{share * flops:.3g}", f"{flops:.3g}, a SKIP step", share, "below 1 %", share < 0.01, {}),
        row("features and policy, time", ms(more), step, more / skip, below, None if cores() else more < 0.01 * skip, samples),
        row("text features on the host, time per chunk", ms(text_seconds), step, text_seconds / skip, "", None, {}),
    ]


def bench_ppo(bench: Bench) -> list[dict]:
    """A PPO iteration that keeps what the frozen prefix and the rollout found, beside one that runs the model again for every
    epoch, and one that also runs all its blocks for every prediction and every inner step."""
    s, chunks = bench.setup, min(16, bench.options.longest)
    count = max(min(256, bench.options.longest) // chunks, 1)
    s, ppo = s.at(2.0 * chunks), rl.Ppo(credit=2)
    tokens, text = random_documents(bench, count, chunks)
    trainer, keys = rl.init_trainer(jax.random.key(0), ppo, s.env, chunks), jax.random.split(jax.random.key(1), count)
    predict = lm.predict

    def run_all(model, fast, upper, slow, weights, window):
        inputs, _ = lax.optimization_barrier((window.normed_SD, lax.stop_gradient(weights)))  # else XLA does it but once
        x_SD, normed_SD = lm.prefix(model, fast, upper["lower"], upper, inputs)
        return predict(model, fast, upper, slow, weights, window._replace(x_SD=x_SD, normed_SD=normed_SD))

    def read(upper, rule, whole, credit, inputs):
        tokens, text_TU, key, plan_T = inputs
        document = rl.prepare(s.model, s.fast, s.chunk, upper["lower"], upper, tokens, text_TU)
        if whole:
            at = jnp.maximum(jnp.arange(chunks) - 1, 0)[:, None] * s.chunk + jnp.arange(2 * s.chunk)
            document = document._replace(windows=document.windows._replace(normed_SD=tokens[at]))
        return rl.episode(s.model, s.fast, upper, s.slow, s.env, document, rule._replace(plan_T=plan_T), key, credit)

    @partial(jax.jit, static_argnums=(2, 3))
    def read_all(upper, rule, whole, credit, plan_NT):
        with mock.patch.object(lm, "predict", run_all if whole else predict):  # while this is traced
            return lax.map(partial(read, upper, rule, whole, credit), (tokens, text, keys, plan_NT))

    def iterate(name: str, epochs_again: int, whole: bool):
        upper, rule = s.upper | {"lower": s.lower}, rl.make_rule(chunks, trainer.policy, hard=False)
        if whole:
            steps = read_all(upper, rule, whole, ppo.credit, jnp.zeros((count, chunks), jnp.int32))
            steps, reward_NT = steps._replace(credit_T=()), jax.vmap(rl.rewards)(steps.credit_T)
        else:
            frozen = (s.mesh, s.model, s.fast, ppo.credit, s.chunk, s.lower, s.upper, s.slow, s.env)
            steps, reward_NT = rl.rollout(*frozen, tokens, text, trainer.policy, jax.random.key(1))
        for _ in range(epochs_again):
            steps = read_all(upper, rule._replace(kind=jnp.int32(0)), whole, 0, steps.action)
        found[name] = lm.flatten(rl.train_iteration(ppo, s.env, steps, reward_NT, trainer, jax.random.key(2))[0].policy.net)
        return found[name]

    whats = {"ours": (0, False), "each epoch": (ppo.epochs, False), "everything": (ppo.epochs, True)}
    found, rows = {}, []
    seconds, samples = measure(bench, {name: partial(iterate, name, *what) for name, what in whats.items()})
    for name, bar in {"everything": "5x", "each epoch": ""}.items():
        off = max(float(jnp.abs(x - found["ours"][k]).max()) for k, x in found[name].items())
        ratio, both = seconds[name] / seconds["ours"], {n: samples[n] for n in ("ours", name)}
        what = f"PPO iteration of {count * chunks} chunks, {name} run again"
        times = (f"{seconds['ours']:.3g} s", f"{seconds[name]:.3g} s")
        rows.append(row(what, *times, ratio, bar, ratio >= 5 and off < 1e-3 if bar else None, both, difference=off))
    return rows


def bench_growth(bench: Bench) -> list[dict]:
    """Whether a chunk takes as long, and reading as much memory, at the end of a long document as of a short one."""
    s, lengths = bench.setup, [n for n in (16, 64, 256, 1024) if n <= bench.options.longest]
    documents = {n: random_documents(bench, 1, n) for n in lengths}
    rule = {n: rl.make_rule(n, rl.init_policy(jax.random.key(0)), plan=np.arange(n) % 2, hard=False) for n in lengths}
    runs = {str(n): partial(read_documents, s, rule[n], documents[n]) for n in lengths}
    seconds, samples = measure(bench, runs, patience=100)
    each = [seconds[str(n)] / n for n in lengths]

    def memory(n: int) -> Any:
        document, key = rl.Document(prefixes(s, documents[n][0]), documents[n][1]), jax.random.key(0)
        args = (s.mesh, s.model, s.fast, s.upper, s.slow, s.env, document, rule[n], rule[n].plan_T[None], key)
        return read_group.lower(*args, credit=0, probe=False).compile().memory_analysis()

    short, long = (memory(n) for n in (lengths[0], lengths[-1]))
    grown = (long.argument_size_in_bytes - short.argument_size_in_bytes) / max(lengths[-1] - lengths[0], 1)
    time_ratio, memory_ratio = each[-1] / each[0], long.temp_size_in_bytes / short.temp_size_in_bytes
    ends = f"a document of {lengths[-1]} chunks, and of {lengths[0]}"
    mb = lambda x: f"{x / 2**20:.4g} MiB"
    return [
        row(f"seconds per chunk of {ends}", f"{each[-1]:.4g}", f"{each[0]:.4g}", time_ratio, "at most 1.1", time_ratio <= 1.1, samples),
        row(f"working memory of reading {ends} (beside its activations below the fast weights, {mb(grown)} per chunk)",
            mb(long.temp_size_in_bytes), mb(short.temp_size_in_bytes), memory_ratio, "at most 1.1", memory_ratio <= 1.1, {}),
    ]  # fmt: skip


def bench_cold(bench: Bench) -> list[dict]:
    """From the start of the process to the end of a first UPDATE_1, without and with what was compiled the first time."""
    import ponder

    cfg = bench.cfg
    base = cfg.base and str(ponder.base_folder(cfg.base))
    settings = f"scale={cfg.scale!r}, base={base!r}, dtype={cfg.dtype!r}, chunk={cfg.chunk}"
    code = f"import eval, ponder; ponder.launch(lambda: eval.first_step(ponder.Config({settings})))"
    samples: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    for _ in range(min(bench.options.repeats, 3)):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).parent)}
            for times in samples.values():
                start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, "-c", code], env=environment, check=True)
                after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
                work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                times.append({"wall": wall, "cpu": work})
    unit = "cpu" if cores() == 1 else "wall"
    first, second = (float(np.median([x[unit] for x in times])) for times in samples.values())
    what = "process start to first UPDATE_1: second run, and first"
    return [row(what, f"{second:.3g} s", f"{first:.3g} s", first / second, "", None, samples)]


def first_step(cfg) -> None:
    """What a process does until its first UPDATE_1, for `bench_cold`."""
    bench = open_bench(Speed(), cfg)
    everywhere = rl.make_rule(2, rl.init_policy(jax.random.key(0)), plan=1, hard=False)
    jax.block_until_ready(read_documents(bench.setup, everywhere, random_documents(bench, 1, 2)))


BENCHES = {
    "cold": bench_cold, "prefill": bench_prefill, "update": bench_update, "decode": bench_decode, "mfu": bench_mfu, "skip": bench_skip,
    "features": bench_features, "ppo": bench_ppo, "growth": bench_growth,
}  # fmt: skip


def bench(options: Speed, cfg) -> str:
    """bench.json with every sample and bench.md -> the table."""
    import ponder

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch and other processes need memory too
    out, cfg = cfg.out or Path("runs") / "bench", ponder.resolve(cfg)
    if options.repeats < 1 or options.longest < 16:
        raise ponder.UserError("--repeats must be at least 1, --longest at least 16")
    b, rows = open_bench(options, cfg), []
    m, seconds = b.setup.model, "this process's seconds, on one core" if cores() == 1 else "seconds of the wall"
    versions = " and ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "torch") if importlib.util.find_spec(n))
    facts = {
        "device": f"{jax.devices()[0].device_kind}{f', {cores()} core(s)' if cores() else ''}", "versions": versions, "seconds": seconds,
        "model": f"{cfg.scale}: {m.kind}, {m.layers} blocks of {m.width}, {m.dtype}, chunks of {cfg.chunk}; random fast weights and tokens",
        "compared": "medians, taken in turn; PyTorch with the same weights, precision, batch, inner optimiser and cached prefix",
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name in options.only or BENCHES:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        rows += BENCHES[name](b)
        lm.write_atomic(out / "bench.json", (json.dumps({"facts": facts, "rows": rows}) + "\n").encode())
    text = "\n".join([*(f"- {k}: {v}" for k, v in facts.items()), "", bench_table(rows)])
    lm.write_atomic(out / "bench.md", f"# Speed\n\n{text}\n".encode())
    return text


def bench_table(rows: list[dict]) -> str:
    """bench.json's rows as a Markdown table."""
    met = {None: "not measured here", True: "yes", False: "no"}
    lines = []
    for r in rows:
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.3g}"
        lines.append([r["what"], r["ours"], r["theirs"], ratio, r["bar"], met[r["met"]] if r["bar"] else ""])
    return markdown(("what", "ours", "theirs", "ratio", "bar", "met"), lines)


DESCRIPTION = """What is there to do with trained weights, and with finished runs:

    python eval.py --run RUN                  draw its report anew
    python eval.py --ablate WHAT              vary one part of the method
    python eval.py --generate --prompt TEXT   continue a text
    python eval.py --benchmark NAME           complete repositories, or judge answers to a benchmark
    python eval.py --bench                    measure speed

Model, data, budget and sizes are chosen with the options of ponder.py, which are below."""


@dataclasses.dataclass(frozen=True)
class Reports:
    """Of runs of ponder.py."""

    run: Path | None = None
    """Draw the report and plots of this finished run anew, from its files."""
    ablate: Literal["features", "fast", "placement", "steps", "reward", "budget", "transfer"] | None = None
    """Vary one part of the method: a run of ponder.py for each variant, with the options below, and a table of them all."""
    also: tuple[Path, ...] = ()
    """Of --ablate transfer: folders of repositories to take the policy to as well, of other languages, say."""


def main() -> None:
    """The command line: one job, with the options of ponder.py beside its own."""
    import ponder

    def job() -> None:
        kinds = (Reports, Writing, Benchmarks, Speed)
        found = ponder.read_options((*kinds, *ponder.OPTIONS), DESCRIPTION)
        (report, generation, judging, speed), cfg = found[:4], ponder.flat(found[4:])
        if cfg.distributed or cfg.coordinator or cfg.processes or cfg.process_id or (cfg.mesh_shape and not report.ablate):
            raise ponder.UserError("eval.py runs on one host, and only --ablate on a mesh; leave the options of devices out")
        jobs = {
            "--run FOLDER": (report.run, lambda: redraw(report.run)),
            "--ablate WHAT": (report.ablate, lambda: f"report: {ablate(report.ablate, report.also, cfg) / 'ablation.md'}"),
            "--generate": (generation.generate, lambda: run_generate(generation, cfg)),
            "--benchmark NAME": (judging.benchmark, lambda: run_benchmark(judging, generation, cfg)),
            "--bench": (speed.bench, lambda: bench(speed, cfg)),
        }
        asked = [run for wanted, run in jobs.values() if wanted]
        if len(asked) != 1:
            raise ponder.UserError(f"say what to do: one of {', '.join(jobs)}, and one alone (--help lists them)")
        try:
            if text := asked[0]():
                print(text)
        except BenchmarkError as error:
            raise ponder.UserError(str(error)) from error

    ponder.launch(job)


if __name__ == "__main__":
    main()
