"""What a policy must beat, and how it is measured; then writing, and the benchmarks.

Every method of METHODS reads the same documents, from repositories that no training stage saw, under the
same hard budget; its loss on a chunk is always taken before it learns from that chunk.

    gain             loss(SKIP) - loss(method), the same parameters that never learn
    oracle recovery  gain(method) / gain(oracle)
    cost             `nominal` and `flops`, per chunk, SKIP = 1; seconds are measured
    saving           1 - cost(policy) / cost(schedule), where the policy reaches the schedule's loss

Intervals are 95 % bootstrap intervals over repositories: chunks of one document, and documents of one
repository, are not independent.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import io
import json
import math
import os
import secrets
import select
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # scipy.stats is imported when it is first used
from jax import lax
from jax.experimental import multihost_utils
from tqdm import tqdm

import data
import model as lm
import rl
from data import Problem, UserError, require

# --- 1. The methods ---------------------------------------------------------------------------------


class Method(NamedTuple):
    """How a method is called and drawn; colours are Okabe and Ito's, which the colour-blind can tell
    apart."""

    label: str
    colour: str
    marker: str


METHODS = {
    "base": Method("base model, no adapters", "#999999", "_"),
    "skip": Method("SKIP", "#000000", "o"),
    "update_1": Method("UPDATE_1 everywhere", "#000000", "^"),
    "update_2": Method("UPDATE_2 everywhere", "#000000", "s"),
    "update_4": Method("UPDATE_4 everywhere", "#000000", "D"),
    "every_n": Method("every n-th chunk", "#56B4E9", "v"),
    "front_loaded": Method("first chunks", "#CC79A7", "P"),
    "random": Method("random chunks", "#F0E442", "*"),
    "loss_threshold": Method("where the loss is high", "#009E73", "X"),
    "entropy_threshold": Method("where the entropy is high", "#009E73", "d"),
    "gradient_threshold": Method("where the gradient is large", "#E69F00", "<"),
    "online_gate": Method("inner loss, online threshold", "#E69F00", ">"),
    "ahead_threshold": Method("where new text comes again (looks ahead)", "#CC79A7", "h"),
    "policy": Method("learned policy", "#D55E00", "o"),
    "oracle": Method("oracle (best chunks in hindsight)", "#0072B2", "*"),
}
FIXED = {name.lower(): action for action, name in enumerate(rl.ACTIONS)}  # one action everywhere
BLIND = ("every_n", "front_loaded", "random")
PAYS_PROBE = ("gradient_threshold", "online_gate")  # they see the gradient, and take the seconds for it
Progress = Callable[[Iterable, str], Iterable]  # shows how far it is


class Read(NamedTuple):
    """One document read by one method."""

    document: int  # its place among the documents
    repo: str
    losses_T: np.ndarray
    actions_T: np.ndarray
    seconds: float  # the whole document, frozen prefix included
    seed: int = 0  # place of the policy among the seeds
    dropped: int = 0  # inner steps that would not have been finite


Reads = dict[str, list[Read]]  # by method


class Evaluation(NamedTuple):
    """All that was read, and what is reported beside it."""

    reads: Reads  # at the budget
    frontier: dict[float, list[Read]]  # of the policy at each budget
    worth: list[np.ndarray]  # (T,) of each document: what each update gave the rest, learning everywhere


# --- 2. Reading documents with every method -----------------------------------------------------------


def group_documents(spec: lm.Spec, excerpts: Sequence) -> list[list]:
    """Documents in groups that are read at once, one on each device."""
    size = spec.mesh.size
    return [list(excerpts[i : i + size]) for i in range(0, len(excerpts), size)]


def pad_rows(items: Sequence, size: int) -> np.ndarray:
    """Rows stacked, the last repeated up to `size`."""
    return np.stack([*items, *[items[-1]] * (size - len(items))])


def fetch(tree: Any) -> Any:
    """Arrays that lie on several devices, of several hosts too, as NumPy's on every host."""
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


@partial(jax.jit, static_argnums=0)
def run_prefixes(spec: lm.Spec, weights: lm.Weights, tokens_N) -> lm.Window:
    """The frozen prefix of whole documents, spread over the devices."""
    device = lambda weights, _, tokens_N: lax.map(partial(lm.make_windows, spec, weights), tokens_N)
    return lm.on_devices(spec.mesh, device, weights, (), tokens_N)


def prepare(spec: lm.Spec, weights: lm.Weights, group: Sequence[data.Excerpt]) -> rl.Document:
    """A group of documents, ready to be read, with a leading axis of as many as there are devices."""
    rows = [pad_rows([getattr(x, name) for x in group], spec.mesh.size) for name in ("tokens", "text_TU")]
    tokens_N, text_NTU = lm.place(spec.mesh, rows, lm.ROWS)
    return rl.Document(run_prefixes(spec, weights, tokens_N), text_NTU)


@partial(jax.jit, static_argnums=0)
def base_losses(spec: lm.Spec, weights: lm.Weights, windows_N: lm.Window):
    """Losses (N, T) of the raw model, without adapters."""

    def device(weights, _, windows_N):
        loss = lambda window: lm.predict(spec, weights, None, window).loss
        return lax.map(lambda windows: lax.map(loss, windows), windows_N)

    return lm.on_devices(spec.mesh, device, weights, (), windows_N)


@partial(jax.jit, static_argnums=0, static_argnames=("credit", "probe"))
def run_episodes(
    spec, weights, env: rl.Env, rule: rl.Rule, documents, key, credit: int = 0, probe: bool = False
):
    """An episode of each document by one rule, `documents` with each one's own plan (N, T) -> steps (N, T,
    ...)."""

    def device(weights, shared, documents):
        env, rule, key = shared

        def read(inputs):
            document, plan_T = inputs
            own = rule._replace(plan_T=plan_T)
            return rl.episode(spec, weights, env, document, own, key, credit, probe)

        return lax.map(read, documents)

    return lm.on_devices(spec.mesh, device, weights, (env, rule, key), documents)


def run_rule(spec, weights, env: rl.Env, rule: rl.Rule, document: rl.Document, key, **options) -> rl.Step:
    """Read a prepared group by one rule, whose plan is (T,), (N, T) or one action -> steps (N, T, ...)."""
    plan_NT = np.broadcast_to(np.asarray(rule.plan_T, np.int32), document.text_TU.shape[:2])
    rule = rule._replace(plan_T=())  # of several shapes, for each of which all would be compiled again
    return run_episodes(spec, weights, env, rule, (document, plan_NT), key, **options)


def read_validation(spec, weights, env: rl.Env, policy: rl.Policy, excerpts, progress: Progress) -> rl.Step:
    """Steps (N, T, ...) of documents of which every second chunk was learned from, with all that gates
    see."""
    seen, every_second = [], np.arange(len(excerpts[0].text_TU)) % 2 == 0
    rule = rl.make_rule(rl.follow, policy, plan_T=every_second, hard=False)
    for group in progress(group_documents(spec, excerpts), "calibration"):
        document = prepare(spec, weights, group)
        steps = fetch(run_rule(spec, weights, env, rule, document, jax.random.key(0), probe=True))
        seen.append(jax.tree.map(lambda x: x[: len(group)], steps))
    return jax.tree.map(lambda *x: np.concatenate(x), *seen)


def measure_worth(spec, weights, env: rl.Env, policy: rl.Policy, document: rl.Document) -> np.ndarray:
    """What the update on each chunk took off the losses of all later ones, when every chunk was learned from
    -> (N, T)."""
    chunks = document.text_TU.shape[1]
    action, _ = rl.affordable_updates(env.costs_A, float(env.budget), chunks)
    everywhere = rl.make_rule(rl.follow, policy, plan_T=action, hard=False)
    steps = run_rule(spec, weights, env, everywhere, document, jax.random.key(0), credit=1)
    return fetch(steps.credit_T).sum(1)


def rules_for(env: rl.Env, policies: list[rl.Calibrated], budgets: Sequence[float], chunks: int) -> dict:
    """{(method, budget, seed): rule} of all methods that need not see a document first.
    Gates are calibrated as for the first policy; one that looks ahead is there where that policy does."""
    main, first = float(env.budget), policies[0]
    rules = {
        (name, main, 0): rl.make_rule(rl.follow, first.policy, plan_T=action, hard=False)
        for name, action in FIXED.items()
    }
    for name in rl.GATES:
        if name != "ahead_threshold" or rl.looks_ahead(first.policy):
            rules[name, main, 0] = rl.calibrated_rule(first, name, env, chunks)
    for budget in dict.fromkeys([main, *budgets]):
        for i, known in enumerate(policies):
            at = env._replace(budget=np.float32(budget))
            rules["policy", budget, i] = rl.calibrated_rule(known, "policy", at, chunks)
    return rules


def evaluate(spec, weights, env, excerpts, policies, budgets, seed: int, progress: Progress) -> Evaluation:
    """Read every document with every method, in random order, as many at once as there are devices.
    The policies, which differ in their seeds, are read at the budget of `env` and at `budgets`."""
    chunks, main = len(excerpts[0].text_TU), float(env.budget)
    rules, found = rules_for(env, policies, budgets, chunks), Evaluation({}, {}, [])
    groups = group_documents(spec, excerpts)
    read_group(spec, weights, env, {}, groups[0][:1], 0, seed)  # compiles before the first clock starts
    for group in progress(groups, "test documents"):
        first = len(found.worth)
        reads, worth_NT = read_group(spec, weights, env, rules, group, first, seed)
        found.worth.extend(worth_NT)
        for (name, budget, _), some in reads.items():
            if budget == main:
                found.reads.setdefault(name, []).extend(some)
            if name == "policy":
                found.frontier.setdefault(budget, []).extend(some)
        for n in range(first, len(found.worth)):  # hindsight also knows when a blind schedule was better
            candidates = [found.reads[name][n] for name in (*BLIND, "oracle")]
            found.reads["oracle"][n] = min(candidates, key=lambda r: r.losses_T.mean())
    return found


def read_group(spec, weights, env, rules: dict, group, first: int, seed: int) -> tuple[dict, np.ndarray]:
    """Read a group of documents, the first of which has the place `first`, with every method
    -> ({(method, budget, seed): reads}, worth (N, T) of their updates)."""
    main, policy = float(env.budget), rl.init_policy(jax.random.key(0))
    document, prefix_seconds = time_call(prepare, spec, weights, group)
    worth_NT = measure_worth(spec, weights, env, policy, document)[: len(group)]
    todo, chunks = {("base", main, 0): None} | rules, worth_NT.shape[1]
    plans = [rl.plan_schedules(env.costs_A, main, chunks, (seed, first + n)) for n in range(len(group))]
    for plan, worth_T in zip(plans, worth_NT, strict=True):
        plan["oracle"] = rl.plan_oracle(env.costs_A, main, worth_T)
    for name in (*BLIND, "oracle"):
        own = pad_rows([plan[name] for plan in plans], spec.mesh.size)
        todo[name, main, 0] = rl.make_rule(rl.follow, policy)._replace(plan_T=own)

    def read(
        name: str, budget: float, rule: rl.Rule
    ):  # -> losses (N, T), and of most actions and dropped steps
        if name == "base":
            return (base_losses(spec, weights, document.windows),)
        at = env._replace(budget=lm.place(spec.mesh, np.float32(budget)))
        key = jax.random.key(seed)
        steps = run_rule(spec, weights, at, rule, document, key, probe=name in PAYS_PROBE)
        return steps.loss, steps.action, steps.dropped

    found: dict[tuple[str, float, int], list[Read]] = {}
    order = np.random.default_rng((seed, first)).permutation(len(todo))
    for name, budget, i in (list(todo)[j] for j in order):
        result, seconds = time_call(read, name, budget, todo[name, budget, i])
        losses_NT, *taken = fetch(result)
        actions_NT, dropped_NT = taken or np.zeros((2, *losses_NT.shape), int)
        for n, text in enumerate(group):
            figures = float(seconds + prefix_seconds), i, int(dropped_NT[n].sum())
            one = Read(first + n, text.repo, losses_NT[n], actions_NT[n], *figures)
            found.setdefault((name, budget, i), []).append(one)
    return found, worth_NT


def time_call(function: Callable, *args) -> tuple[Any, float]:
    """(what a function returns, the seconds until it is there)."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


# --- 3. Statistics ------------------------------------------------------------------------------------


def per_repository(reads: list[Read], values: Iterable[float]) -> np.ndarray:
    """Means of one value for each read over each repository, in the order of their names ->
    (repositories,)."""
    names, values = np.asarray([r.repo for r in reads]), np.asarray(list(values), float)
    return np.asarray([values[names == name].mean() for name in np.unique(names)])


def losses(reads: list[Read]) -> np.ndarray:
    """Mean loss of each repository, nats per token -> (repositories,)."""
    return per_repository(reads, (r.losses_T.mean() for r in reads))


def costs(flops_A: np.ndarray, reads: list[Read], currency: str) -> np.ndarray:
    """Cost per chunk of each repository in `nominal`, `flops` (SKIP = 1) or `seconds` -> (repositories,)."""
    if currency == "seconds":
        return per_repository(reads, (r.seconds / len(r.actions_T) for r in reads))
    table = np.asarray(rl.NOMINAL) if currency == "nominal" else flops_A
    return per_repository(reads, (table[r.actions_T].mean() for r in reads))


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 2
    rng = np.random.default_rng(0)
    ci = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=rng).confidence_interval
    return [float(ci.low), float(ci.high)]


def compare_pairs(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """How much higher ours are than theirs, unit by unit: the mean difference with its interval, on how many,
    the Wilcoxon test's p, Cohen's d."""
    values = ours - theirs
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return {
        "difference": float(values.mean()),
        "ci": interval(values),
        "better_on": float((values > 0).mean()),
        "wilcoxon_p": float(scipy.stats.wilcoxon(values).pvalue) if values.any() else 1.0,
        "cohens_d": float(values.mean() / deviation) if deviation > 0 else 0.0,
    }


def summarise(found: Evaluation, flops_A: np.ndarray) -> dict[str, dict[str, Any]]:
    """results.json's `methods`: means over repositories with their intervals, costs per chunk."""
    loss = {name: losses(rs) for name, rs in found.reads.items()}
    oracle_gain = (loss["skip"] - loss["oracle"]).mean()
    methods = {}
    for name in (name for name in METHODS if name in found.reads):
        rs, gain = found.reads[name], loss["skip"] - loss[name]
        mixed = [r for r in rs if np.ptp(r.actions_T) > 0 and np.ptp(found.worth[r.document]) > 0]
        ranks = [scipy.stats.spearmanr(r.actions_T, found.worth[r.document]).statistic for r in mixed]
        methods[name] = {
            "loss": float(loss[name].mean()),
            "loss_ci": interval(loss[name]),
            "gain": float(gain.mean()),
            "gain_ci": interval(gain),
            "gain_over_base": float((loss["base"] - loss[name]).mean()),
            **{f"cost_{unit}": float(costs(flops_A, rs, unit).mean()) for unit in ("nominal", "flops")},
            "seconds": float(costs(flops_A, rs, "seconds").mean()),
            "update_rate": float(per_repository(rs, ((r.actions_T > 0).mean() for r in rs)).mean()),
            "oracle_recovery": float(gain.mean() / oracle_gain) if oracle_gain > 0 else None,
            "rank_correlation": float(per_repository(mixed, ranks).mean()) if mixed else None,
        }
    return methods


def frontier_rows(found: Evaluation, flops_A: np.ndarray) -> list[dict[str, float]]:
    """results.json's `frontier`: the policy at each budget (per chunk), from the smallest on."""
    rows = []
    for budget, rs in sorted(found.frontier.items()):
        row = {"budget": budget / len(rs[0].actions_T), "loss": float(losses(rs).mean())}
        row |= {f"cost_{unit}": float(costs(flops_A, rs, unit).mean()) for unit in ("nominal", "flops")}
        rows.append(row | {"seconds": float(costs(flops_A, rs, "seconds").mean())})
    return rows


def cost_at(loss_P: np.ndarray, cost_P: np.ndarray, target: float) -> float:
    """The lowest cost at which a frontier, cheapest point first, reaches a loss; linear between its points,
    infinite if it never does."""
    best_P = np.minimum.accumulate(loss_P)
    if target < best_P[-1]:
        return float("inf")
    i = int(np.argmax(best_P <= target))
    if i == 0:
        return float(cost_P[0])
    return float(
        np.interp(best_P[i - 1] - target, [0, best_P[i - 1] - best_P[i]], [cost_P[i - 1], cost_P[i]])
    )


def savings(
    found: Evaluation, flops_A: np.ndarray, resamples: int = 2000
) -> dict[str, dict[str, dict[str, Any]]]:
    """results.json's `savings`: by how much cheaper than each fixed schedule the policy reaches its loss, in
    all (`total`) and in what is spent above SKIP (`learning`), with 95 % intervals from resampled
    repositories. None where the frontier does not reach the loss."""
    points = [found.reads["skip"], *(rs for _, rs in sorted(found.frontier.items()))]
    loss_PR = np.stack([losses(rs) for rs in points])
    size = loss_PR.shape[1]
    draws = np.random.default_rng(0).integers(0, size, (resamples, size))
    mean = lambda x: x[..., np.vstack([np.arange(size), draws])].mean(-1)  # over all, then over each resample
    finite = lambda x: float(x) if np.isfinite(x) else None
    loss_PN, saved = mean(loss_PR), {}
    for name in ("update_1", "update_2", "update_4"):
        target_N = mean(losses(found.reads[name]))
        for currency in ("nominal", "flops", "seconds"):
            cost_PN = mean(np.stack([costs(flops_A, rs, currency) for rs in points]))
            schedule_N = mean(costs(flops_A, found.reads[name], currency))
            columns = zip(loss_PN.T, cost_PN.T, target_N, strict=True)
            policy_N, row = np.asarray([cost_at(*column) for column in columns]), {}
            for part, free in (("total", 0.0), ("learning", cost_PN[0])):
                saved_N = 1 - (policy_N - free) / (schedule_N - free)
                low_high = np.quantile(saved_N[1:], [0.025, 0.975], method="inverted_cdf")
                row |= {part: finite(saved_N[0]), f"{part}_ci": [finite(x) for x in low_high]}
            saved.setdefault(name, {})[currency] = row
    return saved


def analyse(found: Evaluation, flops_A: np.ndarray) -> dict[str, Any]:
    """All figures of results.json that are measured."""
    reads = found.reads
    loss = {name: losses(rs) for name, rs in reads.items()}
    seeds = sorted({r.seed for r in reads["policy"]})
    of_seed = lambda i: losses([r for r in reads["policy"] if r.seed == i])
    rivals = [name for name in (*BLIND, *rl.GATES) if name in reads]
    return {
        "methods": summarise(found, flops_A),
        "comparisons": {name: compare_pairs(loss[name], loss["policy"]) for name in rivals},
        "frontier": frontier_rows(found, flops_A),
        "savings": savings(found, flops_A),
        "policy_gain_by_seed": [float((loss["skip"] - of_seed(i)).mean()) for i in seeds],
        "per_repository": {
            "names": np.unique([r.repo for r in reads["skip"]]).tolist(),
            "loss": {name: values.tolist() for name, values in loss.items()},
        },
    }


def gains_by_file(excerpts: Sequence[data.Excerpt], reads: Reads, chunk: int) -> list[dict[str, Any]]:
    """results.json's `by_file`, of one's own repository: SKIP's mean loss per token and the gains over it in
    each file of which a chunk's worth was read, the policy's largest first. A chunk's gain counts alike for
    all of its tokens; a document's first chunk, before which nothing was learned, is left out."""
    skip, columns = {r.document: r.losses_T for r in reads["skip"]}, {}
    for name in ("skip", "update_1", "policy"):
        paths = np.concatenate([np.asarray(excerpts[r.document].origin)[chunk:] for r in reads[name]])
        values_T = (r.losses_T if name == "skip" else skip[r.document] - r.losses_T for r in reads[name])
        values = np.concatenate([np.repeat(x[1:], chunk) for x in values_T])
        files, place, tokens = np.unique(paths, return_inverse=True, return_counts=True)
        tokens = tokens * len(reads["skip"]) // len(reads[name])  # of several seeds each reads them
        columns[name] = (np.bincount(place, values) / np.bincount(place)).tolist()
    rows = zip(files.tolist(), tokens.tolist(), *columns.values(), strict=True)
    kept = [dict(zip(("file", "tokens", *columns), row, strict=True)) for row in rows if row[1] >= chunk]
    return sorted(kept, key=lambda row: -row["policy"])


# --- 4. Report and plots ------------------------------------------------------------------------------

REPORT = """# PonderTTT: {model} on {data}

{verdict}

{documents} documents of {chunks_per_document} chunks{source}; budget {budget:g} per document
({budget_per_chunk:.3g} per chunk, {cost_model}); seeds of the policy: {seeds}. Gains are over SKIP, the same
parameters that never learn; intervals are 95 % bootstrap intervals over {unit}; seconds include the frozen
prefix. Oracle recovery is a method's gain over that of the best plan in hindsight at the budget. Rank
correlation is that of the steps taken on a chunk with what learning from it gave.
{by_file}
## All methods

{methods}

How much lower the policy's loss is at the same budget, paired over {unit} (nats per token):

{comparisons}

## Cost and gain

![Gain over SKIP against cost](pareto.png)

What the policy saves where its frontier (other budgets, dashed) reaches the loss of a fixed schedule:

{savings}

![Gain over SKIP along the document](position.png)

## What was decided

![Actions and losses of a few documents](timeline.png)
{training}
## What was run

{facts}
"""
RANKED = 10  # repositories (of one's own, documents) from which on methods are said to be better or worse


def write_report(out: Path, results: dict[str, Any], reads: Reads, training: list[dict[str, float]]) -> str:
    """Write report.md and its plots -> the verdict, one sentence."""
    plot_pareto(out / "pareto.png", results)
    plot_position(out / "position.png", reads)
    plot_timeline(out / "timeline.png", results["names"], reads)
    if training:
        plot_training(out / "training.png", training)
    paired = [
        (METHODS[name].label, f"{c['difference']:+.4f} {spell(c['ci'])}", f"{c['better_on']:.0%}")
        + (f"{c['wilcoxon_p']:.2g}", f"{c['cohens_d']:+.2f}")
        for name, c in results["comparisons"].items()
    ]
    parts = {
        "verdict": verdict(results),
        "methods": methods_table(results["methods"]),
        "comparisons": markdown(("than", "by [95 %]", "lower on", "Wilcoxon p", "Cohen's d"), paired),
        "savings": savings_table(results["savings"]),
        "by_file": files_table(results.get("by_file", [])),
        "source": f" of {results['repositories']} repositories" if results["unit"] == "repositories" else "",
        "training": "\n## Training\n\n![Cost and multiplier](training.png)\n" if training else "",
        "facts": "\n".join(f"- {fact}" for fact in results["facts"]),
    }
    data.write_atomic(out / "report.md", REPORT.format(**(results | parts)).encode())
    return parts["verdict"]


def verdict(results: dict[str, Any]) -> str:
    """One sentence: what was found, whichever way it went."""
    methods, count = results["methods"], results["repositories"]
    skip, policy, full = methods["skip"]["loss"], methods["policy"], methods["update_1"]
    where = f"On {count} {results['unit']} {results['unseen']}"
    if full["gain_ci"][0] <= 0:
        found = f"gain {full['gain']:.3f} nats per token, interval {spell(full['gain_ci'])}"
        return f"{where}, learning from every chunk (UPDATE_1) did not reliably beat never learning: {found}."
    helped = f"lowered the loss by {full['gain'] / skip:.1%} ({skip:.3f} to {full['loss']:.3f})"
    share = f"{policy['gain'] / full['gain']:.0%}"
    kept = f"{share} of that ({policy['gain']:.3f} of {full['gain']:.3f} nats per token)"
    nominal, flops = (policy[f"cost_{unit}"] / full[f"cost_{unit}"] for unit in ("nominal", "flops"))
    rank = f"{count} are too few to rank methods by"
    if count >= RANKED:
        rank = f"at the same budget it was {rank_rivals(results['comparisons'])}"
    ahead = ", which looks ahead in the text," if results["looks_ahead"] else ""
    return (
        f"{where}, learning from every chunk (UPDATE_1) {helped}; the learned policy{ahead} kept {kept} "
        f"at {nominal:.0%} of its nominal cost ({flops:.0%} of its FLOPs); {rank}."
    )


def rank_rivals(comparisons: dict[str, dict[str, Any]]) -> str:
    """Which methods the policy beat, which beat it, and which can't be told apart, in words."""
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not distinguishable from": []}
    for name, c in comparisons.items():
        low, high = c["ci"]
        word = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
        by = "" if word.startswith("not") else f" ({c['difference']:+.3f} {spell(c['ci'])})"
        groups[word].append(f"'{METHODS[name].label}'{by}")
    return "; ".join(f"{word} {', '.join(names)}" for word, names in groups.items() if names)


def spell(ci: list[float]) -> str:
    """An interval in words."""
    return f"[{ci[0]:.4f}, {ci[1]:.4f}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def methods_table(methods: dict[str, dict[str, Any]]) -> str:
    """results.json's `methods` as a Markdown table."""
    head = [
        "method",
        "loss",
        "gain over SKIP [95 %]",
        "over base",
        "nominal cost",
        "FLOPs",
        "seconds per chunk",
    ]
    optional = lambda x: "" if x is None else f"{x:.2f}"
    rows = []
    for name, m in methods.items():
        row = [METHODS[name].label, f"{m['loss']:.4f}", f"{m['gain']:+.4f} {spell(m['gain_ci'])}"]
        row += [f"{m['gain_over_base']:+.4f}", f"{m['cost_nominal']:.2f}", f"{m['cost_flops']:.2f}"]
        row += [f"{m['seconds']:.4f}", f"{m['update_rate']:.0%}"]
        rows.append([*row, optional(m["oracle_recovery"]), optional(m["rank_correlation"])])
    return markdown([*head, "updates", "oracle recovery", "rank correlation"], rows)


def savings_table(saved: dict[str, dict[str, dict[str, Any]]]) -> str:
    """results.json's `savings` as a Markdown table."""
    percent = lambda x: "not reached" if x is None else f"{x:.0%}"
    cell = lambda x, ci: percent(x) if x is None else f"{percent(x)} [{', '.join(map(percent, ci))}]"
    rows = [
        [
            METHODS[name].label,
            currency,
            cell(x["total"], x["total_ci"]),
            cell(x["learning"], x["learning_ci"]),
        ]
        for name, by_currency in saved.items()
        for currency, x in by_currency.items()
    ]
    return markdown(("at the loss of", "currency", "saved in all", "of learning's cost"), rows)


def files_table(rows: list[dict[str, Any]], most: int = 8) -> str:
    """A section on the files of one's own repository where learning helped most, and least."""
    if not rows:
        return ""
    name = lambda path: "".join(c if c.isprintable() and c not in "|`" else "?" for c in path)
    share = lambda row, method: f"{row[method]:+.3f} ({row[method] / row['skip']:+.1%})"
    lines = [
        (
            f"`{name(r['file'])}`",
            f"{r['tokens']:,}",
            f"{r['skip']:.3f}",
            share(r, "policy"),
            share(r, "update_1"),
        )
        for r in [*rows[:most], *rows[max(len(rows) - most, most) :]]
    ]
    text = markdown(("file", "tokens read", "SKIP's loss", "the policy's gain", "UPDATE_1's gain"), lines)
    helped = sum(row["update_1"] > 0 for row in rows)
    return (
        f"\n## Where learning helped most, and least\n\nUPDATE_1 helped {helped} of {len(rows)} files of "
        "which a chunk's worth was read, a document's first chunk left out. Means over a file's tokens, "
        "nats; a chunk's gain counts alike for all files in it, so that of a short file is mostly noise.\n\n"
        f"{text}\n"
    )


def new_figure(*args, **options):
    """matplotlib's subplots in the style of all plots -> (figure, axes)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "savefig.dpi": 150,
    }
    plt.rcParams |= {"grid.color": "#dddddd", "legend.frameon": False, "axes.axisbelow": True}
    return plt.subplots(*args, layout="constrained", **options)


def save_figure(figure, path: Path) -> None:
    """Write a PNG, whole or not at all, and close the figure."""
    import matplotlib.pyplot as plt

    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="white")
    plt.close(figure)
    data.write_atomic(path, content.getvalue())


def plot_pareto(path: Path, results: dict[str, Any]) -> None:
    """Gain over SKIP against cost in two currencies, and of all methods at the budget, with intervals."""
    methods, skip = results["methods"], results["methods"]["skip"]["loss"]
    figure, (left, middle, right) = new_figure(1, 3, figsize=(12.5, 4.2))
    middle.sharey(left)

    def point(axis, name: str, x: float, y: float, along: str) -> None:
        m, how = methods[name], METHODS[name]
        error = [[m["gain"] - m["gain_ci"][0]], [m["gain_ci"][1] - m["gain"]]]
        style = {"fmt": how.marker, "color": how.colour, "label": how.label, "markeredgecolor": "black"}
        axis.errorbar(x, y, markersize=8, markeredgewidth=0.5, elinewidth=1.2, **style, **{along: error})

    for axis, unit in ((left, "nominal"), (middle, "flops")):
        line = [(p[f"cost_{unit}"], skip - p["loss"]) for p in results["frontier"]]
        label = "learned policy, other budgets"
        axis.plot(*zip(*line, strict=True), "--", color=METHODS["policy"].colour, linewidth=1.2, label=label)
        for name in (*FIXED, "policy", "oracle"):
            point(axis, name, methods[name][f"cost_{unit}"], methods[name]["gain"], "yerr")
        axis.set_xlabel(f"{unit} cost per chunk (SKIP = 1)")
    left.set_ylabel("gain over SKIP (nats per token)")
    left.legend(loc="lower right", fontsize=8)
    rest = sorted(methods.keys() - {*FIXED, "base"}, key=lambda name: methods[name]["gain"])
    for y, name in enumerate(rest):
        point(right, name, methods[name]["gain"], y, "xerr")
    right.set_yticks(range(len(rest)), [METHODS[name].label.split(" (")[0] for name in rest])
    right.set_xlabel("gain at the budget (nats per token)")
    save_figure(figure, path)


def plot_position(path: Path, reads: Reads) -> None:
    """Gain over SKIP along the document: mean over documents, smoothed over an eighth of it."""
    figure, axis = new_figure(figsize=(7, 4.2))
    mean = lambda name: np.mean([r.losses_T for r in reads[name]], 0)
    skip = mean("skip")
    width = max(len(skip) // 8, 1)
    smooth = lambda x: np.convolve(x, np.ones(width) / width, "valid")
    styles = {"update_1": "-", "update_2": "--", "update_4": ":", "policy": "-", "every_n": "-", "base": "-"}
    for name, style in styles.items():
        how = METHODS[name]
        axis.plot(
            smooth(np.arange(len(skip))), smooth(skip - mean(name)), style, color=how.colour, label=how.label
        )
    axis.set_xlabel(f"chunk (means of {width} side by side)")
    axis.set_ylabel("gain over SKIP (nats per token)")
    figure.legend(loc="outside right center", fontsize=9)
    save_figure(figure, path)


def plot_timeline(path: Path, names: list[str], reads: Reads, count: int = 3) -> None:
    """What methods did on a few documents, and the losses it led to."""
    rows, shown = ("every_n", "loss_threshold", "policy", "oracle"), range(min(count, len(names)))
    first = {(name, r.document): r for name, rs in reads.items() for r in reversed(rs)}  # of the first seed
    figure, axes = new_figure(2, len(shown), figsize=(4.2 * len(shown) + 1.6, 5), sharex="col", squeeze=False)
    for i in shown:
        top, bottom = axes[:, i]
        grid = np.stack([first[name, i].actions_T for name in rows])
        top.imshow(
            grid, aspect="auto", cmap="Blues", vmin=0, vmax=len(rl.ACTIONS) - 1, interpolation="nearest"
        )
        labels = [METHODS[name].label.split(" (")[0] for name in rows]
        top.set_yticks(range(len(rows)), labels if i == 0 else [""] * len(rows))
        top.grid(False)
        top.set_title(names[i].replace("$", r"\$"), fontsize=10)
        for name, style in (("skip", ":"), ("update_1", "--"), ("policy", "-")):
            how = METHODS[name]
            bottom.plot(first[name, i].losses_T, style, color=how.colour, label=how.label, linewidth=1.4)
        bottom.set_xlabel("chunk (above: the darker, the more steps)")
    axes[1, 0].set_ylabel("loss (nats per token)")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save_figure(figure, path)


def plot_training(path: Path, rows: list[dict[str, float]]) -> None:
    """The cost against its limit, and the multiplier, over policy training."""
    figure, (top, bottom) = new_figure(2, 1, figsize=(7, 5), sharex=True)
    steps = [row["step"] for row in rows]
    top.plot(steps, [row["cost"] for row in rows], color="#0072B2", label="mean cost of the rollouts")
    top.plot(steps, [row["limit"] for row in rows], ":", color="#D55E00", label="budget")
    top.set_ylabel("cost per chunk (SKIP = 1)")
    top.legend()
    bottom.plot(steps, [row["lambda"] for row in rows], color="#000000")
    bottom.set_ylabel("multiplier λ")
    bottom.set_xlabel("PPO iteration")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def paired_table(measured: dict[str, dict[str, dict[str, float]]], units: str) -> tuple[dict[str, Any], str]:
    """One table for runs, actions and answers: {row: {measure: {unit: value}}} -> (summary, Markdown).
    Means with intervals over units (`units` says what they are), and how much higher than the first row's
    they are, paired over the units that both have."""
    first, summary, lines = next(iter(measured.values())), {}, []
    for name, found in measured.items():
        row: dict[str, Any] = {}
        cells = []
        for measure, values in found.items():
            mine = np.asarray(list(values.values()), float)
            row[measure] = {"mean": float(mine.mean()), "ci": interval(mine), "units": len(mine)}
            cells.append(f"{mine.mean():.4f} {spell(row[measure]['ci'])}")
            both = sorted(values.keys() & first.get(measure, {}).keys()) if found is not first else []
            if both:
                columns = (np.asarray([x[unit] for unit in both]) for x in (values, first[measure]))
                row[measure]["change"] = change = compare_pairs(*columns)
                cells[-1] += (
                    f" ({change['difference']:+.4f} {spell(change['ci'])}, p {change['wilcoxon_p']:.2g})"
                )
        summary[name] = row
        lines.append([name, str(max(row[measure]["units"] for measure in row)), *cells])
    head = ["", units, *(f"{measure} [95 %] (above the first row's)" for measure in first)]
    return summary, markdown(head, lines)


def compare_runs(folders: Sequence[Path]) -> str:
    """A table of finished runs: losses of SKIP, gains of UPDATE_1 and the policy, over the repositories that
    they share with the first. Raises: UserError."""
    measured = {}
    for folder in folders:
        try:
            found = json.loads((folder / "results.json").read_text())["per_repository"]
            loss = {name: np.asarray(values) for name, values in found["loss"].items()}
            values = {"SKIP's loss": loss["skip"]}
            values |= {
                f"{name}'s gain": loss["skip"] - loss[name]
                for name in ("update_1", "policy", "random", "oracle")
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no finished run ({type(error).__name__}); give folders that have results.json"
            raise UserError(f"--runs {folder}: {reason}") from None
        pairs = {measure: dict(zip(found["names"], x.tolist(), strict=True)) for measure, x in values.items()}
        measured[str(folder)] = pairs
    return paired_table(measured, "repositories")[1]


# --- 5. Writing ---------------------------------------------------------------------------------------

KEPT = 0.5  # of what a context taught, for a prompt: all of it is too much of the context's last files
ROWS_AT_ONCE = 8  # texts written side by side


class Writer(NamedTuple):
    """All that stays the same while text is written."""

    spec: lm.Spec
    weights: lm.Weights
    costs_A: Any
    per_chunk: float  # the budget of a chunk
    tokenizer: Any
    ends: tuple[int, ...]  # tokens that end a text; documents start with the first
    classes: np.ndarray  # (V, 8) kinds of code in each token
    known: rl.Calibrated | None  # the policy, for the action "policy"
    seed: int = 0


class Row(NamedTuple):
    """A text on its way. Its document is an end of text, the context, the prompt and what was written, cut
    into chunks as when it is read; each token is predicted from its chunk and the one before."""

    tokens: list[int]  # the document so far
    given: int  # how many of them were not written here
    chunk: int  # how many chunks were learned from
    memory: rl.Memory  # with the fast weights
    actions: tuple[int, ...] = ()  # taken on the chunks that were learned from


class Start(NamedTuple):
    """What all prompts go on from: the context, read and learned from with one action."""

    row: Row
    action: str


class How(NamedTuple):
    """How texts are written."""

    samples: int = 1  # of each prompt
    temperature: float = 0.0  # 0 takes the most likely token
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts to end before


class Completion(NamedTuple):
    """What was written after a prompt."""

    text: str
    tokens: tuple[int, ...]
    actions: tuple[int, ...]  # indices into rl.ACTIONS, of the chunks that learning was decided on
    reason: str  # why it ends: "stop", "end" (of text) or "length"


@partial(jax.jit, static_argnums=0)
def learn_chunk(spec, weights, env: rl.Env, rule: rl.Rule, memory: rl.Memory, inputs, key):
    """Read one chunk and learn, as an episode does -> (memory, action). `inputs` are its window's tokens
    (S,), its own (C,), its text features, its place and how many chunks there will be."""
    tokens_S, targets_C, text_U, t, chunks = inputs
    x_SD, normed_SD = lm.run_prefix(spec, weights, tokens_S)
    window = lm.Window(x_SD, targets_C, jnp.where(t == 0, 0, spec.chunk), normed_SD)
    memory, step = rl.read_step(spec, weights, env, rule, memory, rl.Chunk(window, text_U, t, chunks), key)
    return memory, step.action


def writing_rule(writer: Writer, action: str, env: rl.Env, chunks: int) -> rl.Rule | None:
    """The rule of an action, "policy" or one of FIXED; None where nothing is learned. Raises: UserError."""
    if action in ("base", "skip"):
        return None
    if action == "policy":
        require(writer.known, "there is no trained policy for these settings; take another --action")
        return rl.calibrated_rule(writer.known, "policy", env, chunks)
    return rl.make_rule(rl.follow, rl.init_policy(jax.random.key(0)), plan_T=FIXED[action], hard=False)


def learn_row(writer: Writer, action: str, row: Row) -> Row:
    """The row after reading all of its complete chunks with an action; without learning nothing need be
    read."""
    C, chunks = writer.spec.chunk, (len(row.tokens) - 1) // writer.spec.chunk
    env = rl.Env(writer.costs_A, np.float32(writer.per_chunk * chunks))
    rule = writing_rule(writer, action, env, chunks) if chunks > row.chunk else None
    if rule is None:
        return row._replace(chunk=chunks)
    document, memory, actions = np.asarray(row.tokens[: chunks * C + 1], np.int32), row.memory, row.actions
    text_TU = rl.text_features(document, C, writer.classes)
    padded = np.append(document, np.zeros(C, np.int32))  # the first chunk is the first half of its window
    for t in range(row.chunk, chunks):
        low, key = max(t - 1, 0) * C, jax.random.fold_in(jax.random.key(writer.seed), t)
        tokens = padded[low : low + 2 * C], document[t * C + 1 : (t + 1) * C + 1]
        inputs = (*tokens, text_TU[t], np.int32(t), np.int32(chunks))
        memory, action_taken = learn_chunk(writer.spec, writer.weights, env, rule, memory, inputs, key)
        actions = *actions, int(action_taken)
    return row._replace(chunk=chunks, memory=memory, actions=actions)


def begin(writer: Writer, action: str, context: Sequence[int] = ()) -> Start:
    """Learn from the tokens of a context, chunk by chunk as in an episode, with "policy" or one of FIXED;
    "base" has no fast weights at all. What follows begins anew from W_0 + KEPT (W - W_0), as fine-tuned
    weights are averaged with those before (Wortsman et al., arXiv 2109.01903). Raises: UserError."""
    require(action in ("policy", "base", *FIXED), f"--action {action}: take policy, base, {', '.join(FIXED)}")
    writing_rule(writer, action, rl.Env(writer.costs_A, np.float32(writer.per_chunk)), 1)
    fast, slow = writer.spec.fast, writer.weights.slow
    memory = lm.place(
        writer.spec.mesh, rl.init_memory(fast, slow)
    )  # as `learn_chunk` returns it: compiled once
    row = learn_row(writer, action, Row([writer.ends[0], *map(int, context)], 0, 0, memory))
    kept = jax.tree.map(lambda first, last: first + KEPT * (last - first), slow["start"], row.memory.state.w)
    state = lm.place(writer.spec.mesh, lm.init_state(fast, slow | {"start": kept}))
    return Start(row._replace(memory=row.memory._replace(state=state)), action)


def open_prompt(writer: Writer, start: Start, prompt: str) -> Row:
    """The row after learning from the prompt too, as long as it is complete chunks."""
    tokens = start.row.tokens + data.encode(writer.tokenizer, [prompt])[0].tolist()
    return learn_row(writer, start.action, start.row._replace(tokens=tokens, given=len(tokens)))


def window_of(writer: Writer, row: Row) -> tuple[int, int]:
    """(first, last) place of the tokens that can be written before the row's window has to move on.
    A window begins with the chunk before the next token's, and ends with that token's own chunk."""
    C, chunk = writer.spec.chunk, (len(row.tokens) - 1) // writer.spec.chunk
    return max(chunk - 1, 0) * C, (max(chunk, 1) + 1) * C


def written_text(writer: Writer, row: Row) -> str:
    """What was written, as text: by how much the last tokens before it become longer."""
    before, after = row.tokens[max(row.given - 8, 0) : row.given], row.tokens[row.given :]
    decode = partial(writer.tokenizer.decode, skip_special_tokens=False)
    return decode(before + [token for token in after if token not in writer.ends])[len(decode(before)) :]


def finish_row(writer: Writer, row: Row, how: How) -> Completion | None:
    """The completion, if the row's last token ended it."""
    text, new = written_text(writer, row), tuple(row.tokens[row.given :])
    if places := [text.find(stop) for stop in how.stop if stop in text]:
        return Completion(text[: min(places)], new, row.actions, "stop")
    if new[-1] in writer.ends or len(new) >= how.max_new_tokens:
        return Completion(text, new, row.actions, "end" if new[-1] in writer.ends else "length")
    return None


def write_rows(
    writer: Writer, rows: list[Row], how: How, seeds: list[int], show=lambda text: None
) -> list[Completion]:
    """Write on rows side by side, a piece at a time, until each has ended. Fast weights stay as they are.
    What is drawn depends on the writer's seed and the row's own, not on the rows beside it."""
    base, C = rows[0].memory is None, writer.spec.chunk
    alike = all(row.memory is rows[0].memory for row in rows)
    size = 2 * C
    w_of = lambda row: None if base else row.memory.state.w
    w = w_of(rows[0]) if alike else jax.tree.map(lambda *x: jnp.stack(x), *map(w_of, rows))
    spec = writer.spec
    if jax.default_backend() == "cpu":  # whose bfloat16 products are slow for single rows
        spec = spec._replace(model=spec.model._replace(dtype="float32"))
    done: list[Completion | None] = [None] * len(rows)
    slots, stale = None, set(range(len(rows)))  # rows whose window has moved
    while not all(done):
        for b in sorted(stale):
            low, _ = window_of(writer, rows[b])
            window = rows[b].tokens[low:]
            padded = np.zeros(
                min(size, max(1 << (len(window) - 1).bit_length(), 16)), np.int32
            )  # few lengths
            padded[: len(window)] = window
            slot = lm.prefill(spec, writer.weights, w_of(rows[b]), padded, len(window), size)
            slots = (
                jax.tree.map(lambda x: jnp.stack([x] * len(rows)), slot)
                if slots is None
                else set_row(slots, b, slot)
            )
        stale, (logits_BV, caches_B) = set(), slots
        places = [len(row.tokens) - window_of(writer, row)[0] for row in rows]
        numbers = [len(row.tokens) - row.given for row in rows]
        draw = lm.Draw(
            jax.random.key(writer.seed), np.uint32(seeds), np.int32(numbers), np.float32(how.temperature)
        )
        args = spec, alike, writer.weights, w, caches_B, logits_BV, np.int32(places), draw
        piece_BP, caches_B, logits_BV = lm.write_piece(*args)
        slots = logits_BV, caches_B
        for b, piece in enumerate(np.asarray(piece_BP).tolist()):
            _, last = window_of(writer, rows[b])
            for token in piece[: last + 1 - len(rows[b].tokens)] if done[b] is None else ():
                rows[b] = rows[b]._replace(tokens=[*rows[b].tokens, token])
                if completion := finish_row(writer, rows[b], how):
                    done[b] = completion
                    break
            if done[b] is None:
                show(written_text(writer, rows[b]))
                if len(rows[b].tokens) > last:
                    stale.add(b)
    return done


@partial(jax.jit, donate_argnums=0)
def set_row(tree_B, b, row):
    """The rows with row b (traced) replaced."""
    return jax.tree.map(lambda old, new: old.at[b].set(new), tree_B, row)


def write(
    writer: Writer, start: Start, prompts: Sequence[str], how: How, show=lambda text: None
) -> list[list[Completion]]:
    """Continue each prompt how.samples times -> the completions of each prompt.
    The fast weights go on learning from the prompt as they did from the context; what is left over at its end
    is less than a chunk and not learned from, nor is what is written. show(text so far) is called for every
    piece."""
    base = start.action == "base"
    opened = [open_prompt(writer, start, prompt) for prompt in prompts]
    opened = [row._replace(memory=None) if base else row for row in opened]
    requests = [(i, j) for i in range(len(prompts)) for j in range(how.samples)]
    found: list[list[Completion]] = [[] for _ in prompts]
    for low in range(0, len(requests), ROWS_AT_ONCE):
        group = requests[low : low + ROWS_AT_ONCE]
        seeds = [zlib.crc32(f"{j} {prompts[i]}".encode()) for i, j in group]
        for (i, _), completion in zip(
            group, write_rows(writer, [opened[i] for i, _ in group], how, seeds, show), strict=True
        ):
            found[i].append(completion)
    return found


def first_tokens(writer: Writer, files: Iterable[data.SourceFile], chunks: int) -> list[int]:
    """The first tokens of some files, as many as fill that many chunks, if there are."""
    found: list[int] = []
    for file in files:
        if len(found) >= chunks * writer.spec.chunk:
            break
        found += data.encode(writer.tokenizer, [data.with_path(file)])[0].tolist()
    return found[: chunks * writer.spec.chunk]


def print_completions(writer: Writer, start: Start, prompt: str, how: How) -> None:
    """Continue one prompt on standard output, one sample as it is written; what was learned on standard
    error."""
    shown, started = 0, time.perf_counter()

    def show(text: str) -> None:
        nonlocal shown
        safe = text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a letter
        if how.samples == 1 and len(safe) > shown:
            print(safe[shown:], end="", flush=True)
            shown = len(safe)

    (completions,) = write(writer, start, [prompt], how, show)
    if how.samples == 1:
        print(completions[0].text[shown:], flush=True)
    else:
        print("\n".join(f"--- {i + 1}\n{c.text}" for i, c in enumerate(completions)))
    taken = Counter(rl.ACTIONS[a] for a in completions[0].actions)
    learned = ", ".join(f"{n} {name}" for name, n in taken.items()) or "nothing was learned from"
    count, seconds = sum(len(c.tokens) for c in completions), time.perf_counter() - started
    print(f"{learned}; {count} tokens, {seconds:.1f} s", file=sys.stderr)


# --- 6. The judge -------------------------------------------------------------------------------------

# Of setrlimit: Linux's number for the resource, and how many bytes, files or processes an answer may have.
LIMITS = {"AS": (9, 1 << 30), "FSIZE": (1, 1 << 24), "NOFILE": (7, 256), "NPROC": (6, 64), "CORE": (4, 0)}


class Verdict(NamedTuple):
    """A Verdict says how an answer fared and, in a few words, why."""

    result: str  # passed, failed, error, timeout, died, output too large
    detail: str = ""  # of passed: what this system left open to the answer


def enter_namespaces(libc, folder: str) -> tuple[bool, bool]:
    """Part from other processes and the network, then from writable disks; return which of the two worked."""
    uid, gid = os.getuid(), os.getgid()
    apart = libc.unshare(0x68020000 | (0x10000000 if uid else 0)) == 0  # CLONE_NEWPID, NET, IPC, NS; USER
    for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)  # refused where there is no new user namespace
    read_only, size = struct.pack("4Q", 1, 0, 1 << 18, 0), b"size=64m,nr_inodes=8192,mode=1777"
    fixed = apart and libc.syscall(442, -100, b"/", 0x8000, read_only, 32) == 0  # mount_setattr, recursive
    for path in ("/dev/shm", folder) if fixed else ():
        fixed = libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 6, size) == 0
    return apart, fixed


def restrict_files(libc, folders: list[str]) -> int:
    """Give up all files but some folders' and, to read, Python's; return Landlock's version, 0 for none."""
    version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset
    every, size = (1 << min(12 + version, 15)) - 1, 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(444, struct.pack("3Q", every, 3, 3), size, 0)  # of files; of TCP; of signals
    readable = [sys.prefix, sys.base_prefix, *sys.path, "/usr", "/lib", "/lib64", "/nix/store"]
    readable += [f"/etc/{name}" for name in ("ld.so.cache", "localtime", "mime.types", "passwd", "hosts")]
    rights = dict.fromkeys(readable, 13) | {"/dev/null": 6, "/dev/urandom": 4} | dict.fromkeys(folders, every)
    for path in filter(os.path.exists, rights):
        fd = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights[path] & (every if os.path.isdir(path) else 7), fd)
        libc.syscall(445, rules, 1, rule, 0)  # landlock_add_rule
        os.close(fd)
    return version if libc.syscall(446, rules, 0) == 0 else 0  # landlock_restrict_self


def confine(folder: str, seconds: int) -> str:
    """Shut this process off as far as the system can, go on in a child's child; return what stays open."""
    libc, root, user = ctypes.CDLL(None), os.getuid() == 0, 61184 + os.getpid() % 4096
    apart, fixed = enter_namespaces(libc, folder)
    for _ in range(2):  # the first child is the new namespace's init, which ignores some signals
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the parent
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(code if code >= 0 else 128 - code)
    os.chdir(folder)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    version = restrict_files(libc, [folder, "/dev/shm"] if fixed else [folder])
    header, kept = struct.pack("2I", 0x20080522, 0), bytes(24)  # of capset: no capabilities
    if root:  # become a user who owns nothing but the folder
        os.chown(folder, user, user)
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        kept = struct.pack("6I", 4, 4, 4, 0, 0, 0)  # CAP_DAC_READ_SEARCH: Python may be in root's home
    libc.capset(header, kept) == 0 or libc.capset(header, bytes(24))
    libc.prctl(47, 2, 2, 0, 0)  # PR_CAP_AMBIENT_RAISE: programs that it starts keep it too
    for number, limit in [*LIMITS.values(), (0, seconds)]:  # RLIMIT_CPU; refused where there are lower ones
        libc.setrlimit(number, struct.pack("2Q", limit, limit + 1))
    left = {"network": not apart, "signals": not (apart or root or version > 5), "disk space": not fixed}
    left |= {"reading": version < 1, "writing": not fixed and version < 1, "chmod": not (fixed or root)}
    return ", ".join(filter(left.get, left))


def run_answer(task: dict, report) -> None:
    """Run an answer and then its tests in one namespace, and report a verdict once they come to their end."""
    try:
        result, detail = "passed", confine(task["folder"], task["seconds"])
        os.register_at_fork(after_in_child=report.close)  # copies that the answer makes of it don't report
        names = vars(sys.modules.setdefault("answer", type(sys)("answer")))
        names["__file__"] = f"{task['folder']}/answer.py"
        for part in ("answer", "tests"):
            exec(compile(task[part], f"{part}.py", "exec", dont_inherit=True), names)
    except BaseException as error:
        if report.closed:
            raise
        result = "failed" if isinstance(error, AssertionError) else "error"
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    report.write(json.dumps([result, detail]).encode())
    os._exit(0)


def supervise() -> None:
    """Have an answer run, find its verdict, end all that it started, remove its folder, print the verdict."""
    task = json.loads(sys.stdin.readline())
    os.mkdir(task["folder"], 0o700)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans below become its children
    (verdict, writer), printed, null = os.pipe(), os.memfd_create("printed"), os.open(os.devnull, os.O_RDONLY)
    child = os.fork()
    os.setpgid(child, child)  # by both, as either may come first
    if not child:
        for fd, standard in (null, 0), (printed, 1), (printed, 2):
            os.dup2(fd, standard)
        run_answer(task, os.fdopen(writer, "wb", 0))
    os.close(writer)
    ready, _, _ = select.select([verdict, 0], [], [], 3 * task["seconds"])  # 0 ends if nobody waits any more
    found = os.read(verdict, 4096) if verdict in ready else b'["timeout", "on the clock"]'
    if not found:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # 152 is 128 + SIGXCPU
        found = b'["timeout", "of CPU time"]' if code == 152 else b'["died", "exit code %d"]' % code
    if os.fstat(printed).st_size >= LIMITS["FSIZE"][1]:
        found = b'["output too large"]'
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        while children := file.read().split():
            for process in children:
                os.killpg(os.getpgid(int(process)), signal.SIGKILL)
            os.wait()
            file.seek(0)
    os.spawnlp(os.P_WAIT, "sh", "sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', task["folder"])
    os.write(1, found)


def judge_all(jobs: Iterable[tuple[Problem, str]], workers: int, seconds: int = 10) -> Iterator:
    """Judge answers, `workers` at once, each with its tests in a process of its own that is shut off.

    It stops accidents, not answers written to forge a verdict. Yields: each job's place and its Verdict."""
    parts = (enter_namespaces, restrict_files, confine, run_answer, supervise)
    head = f"import contextlib, ctypes, json, os, select, signal, struct, sys\nLIMITS = {LIMITS}"
    command = [sys.executable, "-I", "-c", "\n".join([head, *map(inspect.getsource, parts), "supervise()"])]
    run_case = "\nimport unittest; unittest.defaultTestLoader.loadTestsFromTestCase({}).debug()"
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "OPENBLAS_CORETYPE")}
    env |= {"USER": "nobody", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    options = {"start_new_session": True, "stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "bufsize": 0}
    waiting, running = enumerate(jobs), {}
    try:
        while True:
            for place, (problem, completion) in islice(waiting, workers - len(running)):
                folder = os.path.join(tempfile.gettempdir(), f"judge-{secrets.token_hex(8)}")
                task = {"folder": folder, "seconds": seconds, "answer": problem.before + completion}
                task["tests"] = problem.tests + "".join(map(run_case.format, problem.cases))
                process = Popen(command, env=env | {"HOME": folder, "TMPDIR": folder}, **options)
                running[process.stdout] = place, process
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(task).encode() + b"\n")
            if not running:
                return
            for output in wait(list(running)):
                place, process = running.pop(output)
                with process:
                    found = output.read() or b'["died", "and its judge too"]'
                yield place, Verdict(*json.loads(found))
    finally:
        for _, process in running.values():
            process.stdin.close()
            process.wait()


def judge(problem: Problem, completion: str, seconds: int = 10) -> Verdict:
    """Judge one answer, which has that many seconds of CPU time, and thrice that on the clock."""
    return next(judge_all([(problem, completion)], 1, seconds))[1]


def isolation() -> str:
    """Say in one line what this system closes off from answers, or raise UserError if it can't judge any."""
    trial = Problem("trial", "", (), "", "", "import decimal\nopen('file', 'w').close()")
    result, left = judge(trial, "") if sys.platform.startswith("linux") else ("no Linux", sys.platform)
    if result != "passed":
        raise UserError(f"answers can't be judged here ({result}: {left}); judge them on another system")
    return f"answers get limits, no network, no files or processes but their own; open here: {left or 'none'}"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Compute 1 - C(n - c, k) / C(n, k), the chance that one of k answers passes (Chen et al. 2021)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


# --- 7. Benchmarks ------------------------------------------------------------------------------------

FUNCTIONS, BEFORE, LINE = 8, 16, 48  # at most: of a repository; chunks before a function; tokens of a line


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The lines of answers.jsonl; one that was cut off is removed. Raises: UserError if it is damaged."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        data.write_atomic(path, whole)
    try:
        rows = [json.loads(line) for line in whole.decode().splitlines()]
        if all(row.keys() >= {"task_id", "action"} for row in rows):
            return rows
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is damaged; choose another --out")


def append_answer(path: Path, row: dict[str, Any]) -> None:
    """Add a line in one write, so that a run that is stopped leaves whole lines."""
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())


def write_answers(
    writer: Writer, problems, actions: Sequence[str], context: list[int], how: How, path: Path
) -> None:
    """Have every action answer every problem; what is in answers.jsonl is not made again."""
    done = {(row["action"], row["task_id"]) for row in read_answers(path)}
    for action in actions:
        asked = [p for p in problems if (action, p.task_id) not in done]
        if not asked:
            continue
        start, size = begin(writer, action, context), max(ROWS_AT_ONCE // how.samples, 1)
        for low in tqdm(range(0, len(asked), size), f"answering, {action}"):
            some = asked[low : low + size]
            found = write(writer, start, [p.prompt for p in some], how._replace(stop=problems[0].stop))
            for p, completions in zip(some, found, strict=True):
                texts = [c.text for c in completions]
                append_answer(path, {"task_id": p.task_id, "action": action, "completions": texts})


def copy_solutions(problems, source: str, path: Path) -> None:
    """Put given answers into answers.jsonl: the references, or lines of {"task_id", "completion"} of which
    several for one task are its samples. Raises: UserError."""
    texts: dict[str, list[str]] = (
        {p.task_id: [p.reference] for p in problems} if source == "reference" else {}
    )
    known = {p.task_id: p.task_id for p in problems} | {
        p.task_id.removeprefix("MBPP/"): p.task_id for p in problems
    }
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines() if source != "reference" else []
        for row in map(json.loads, filter(str.strip, lines)):
            texts.setdefault(known[str(row["task_id"])], []).append(row["completion"] + "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        form = '{"task_id": one of the benchmark\'s, "completion": text}'
        raise UserError(f"--solutions {source}: not lines of {form} ({error!r})") from None
    require(texts, f"--solutions {source}: no answers in it")
    before = {row["task_id"]: row["completions"] for row in read_answers(path)}
    changed = any(texts.get(task) != completions for task, completions in before.items())
    require(not changed, f"{path} is of other answers; choose another --out")
    for task, completions in texts.items():
        if task not in before:
            append_answer(path, {"task_id": task, "action": source, "completions": completions})


def judge_answers(problems, out: Path) -> str:
    """Judge answers.jsonl into verdicts.jsonl (what is there is not judged again) -> a table of pass
    rates."""
    by_id, verdicts = {p.task_id: p for p in problems}, read_answers(out / "verdicts.jsonl")
    answers = [row for row in read_answers(out / "answers.jsonl") if row["task_id"] in by_id]
    done = {(row["action"], row["task_id"]) for row in verdicts}
    todo = [row for row in answers if (row["action"], row["task_id"]) not in done]
    jobs = [(row, text) for row in todo for text in row["completions"]]
    found: dict[int, dict[int, Verdict]] = {}
    pairs = [(by_id[row["task_id"]], text) for row, text in jobs]
    for i, given in tqdm(judge_all(pairs, os.cpu_count() or 1), "judging", len(pairs)):
        row = jobs[i][0]
        mine = found.setdefault(id(row), {})
        mine[i] = given
        if len(mine) == len(row["completions"]):
            results, details = zip(*(mine[j] for j in sorted(mine)), strict=True)
            verdicts.append({"task_id": row["task_id"], "action": row["action"], "results": results})
            append_answer(out / "verdicts.jsonl", verdicts[-1] | {"details": details})
            for result, detail in dict.fromkeys(zip(results, details, strict=True)):
                if result != "passed":
                    tqdm.write(
                        f"{row['task_id']}: {result} {ascii(detail)[1:-1]}"
                    )  # an answer may have chosen it
    verdicts = [row for row in verdicts if row["task_id"] in by_id]
    require(verdicts, f"{out}: no answers to judge")
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for row in verdicts:
        n, passed = len(row["results"]), list(row["results"]).count("passed")
        for k in (k for k in (1, 10, 100) if k <= n):
            rates = measured.setdefault(row["action"], {}).setdefault(f"pass@{k}", {})
            rates[row["task_id"]] = pass_at_k(n, passed, k)
    counts = Counter(result for row in verdicts for result in row["results"])
    told = ", ".join(f"{n} {result}" for result, n in counts.most_common())
    return save_table(out, measured, "problems", told)


def save_table(out: Path, measured: dict[str, Any], units: str, told: str) -> str:
    """Write benchmark.json and benchmark.md -> the table and what is told below it."""
    summary, table = paired_table(measured, units)
    data.write_atomic(out / "benchmark.json", (json.dumps(summary, indent=2) + "\n").encode())
    data.write_atomic(out / "benchmark.md", f"# {out.name}\n\n{table}\n\n{told}\n".encode())
    return f"{table}\n{told}"


@partial(jax.jit, static_argnums=0)
def window_losses(spec, weights, w, inputs_S, targets_C):
    """Losses (C,) of the last tokens of a window under some fast weights."""
    x_SD, normed_SD = lm.run_prefix(spec, weights, inputs_S)
    return lm.predict(spec, weights, w, lm.Window(x_SD, targets_C, jnp.int32(spec.chunk), normed_SD)).losses_C


def complete_functions(writer: Writer, start: Start, held: list[data.Function]) -> list[dict[str, Any]]:
    """Have each function's second half read and its next line written, after the file before it, learned from
    as any prompt is -> for each its loss, whether the line is exact, its similarity."""
    C, found = writer.spec.chunk, []
    tokens_of = lambda text: data.encode(writer.tokenizer, [text])[0].tolist()
    first_line = lambda text: text.strip().partition("\n")[0].strip()
    decode = partial(writer.tokenizer.decode, skip_special_tokens=False)
    prompts = [decode(tokens_of(f.before)[-BEFORE * C :]) for f in held]
    written = write(writer, start, prompts, How(max_new_tokens=LINE))
    for f, prompt, (completion,) in zip(held, prompts, written, strict=True):
        row, rest = open_prompt(writer, start, prompt), tokens_of(f.rest)[:C]
        window = np.asarray(([writer.ends[0]] * (2 * C) + row.tokens + rest)[-2 * C - 1 :], np.int32)
        w = None if start.action == "base" else row.memory.state.w
        own = window_losses(writer.spec, writer.weights, w, window[:-1], window[-C:])[-len(rest) :]
        ours, theirs = first_line(completion.text), first_line(f.rest)
        similarity = SequenceMatcher(None, ours, theirs, autojunk=False).ratio()
        figures = {
            "loss": float(own.mean()),
            "exact": float(ours.split() == theirs.split()),
            "similarity": similarity,
        }
        found.append({"function": f.name, **figures, "written": ours, "expected": theirs})
    return found


def run_completion(writer: Writer, tasks: dict[str, tuple], actions: Sequence[str], out: Path) -> str:
    """Learn from four fifths of the files of each repository, complete functions of the others -> the table.
    `tasks` has (context tokens, functions) by repository; what is in answers.jsonl is not made again."""
    path = out / "answers.jsonl"
    done = {(row["action"], row["task_id"]) for row in read_answers(path)}
    for name, (context, held) in tqdm(tasks.items(), "repositories"):
        for action in (a for a in actions if (a, name) not in done):
            start = begin(writer, action, context)
            taken = Counter(rl.ACTIONS[a] for a in start.row.actions)
            row = {"task_id": name, "action": action, "learned": taken}
            append_answer(path, row | {"functions": complete_functions(writer, start, held)})
    rows = [row for row in read_answers(path) if row["task_id"] in tasks]
    alone, measured = len(tasks) == 1, {}
    for row in sorted(
        rows, key=lambda row: actions.index(row["action"]) if row["action"] in actions else len(actions)
    ):
        for measure in ("loss", "exact", "similarity"):
            values = measured.setdefault(row["action"], {}).setdefault(measure, {})
            if alone:
                values |= {f["function"]: f[measure] for f in row["functions"]}
            else:
                values[row["task_id"]] = float(np.mean([f[measure] for f in row["functions"]]))
    told = "Loss of a function's second half; its next line written exactly; similarity by Python's difflib."
    return save_table(out, measured, "functions" if alone else "repositories", told)


def completion_tasks(writer: Writer, repos: data.Repos, chunks: int, limit: int) -> dict[str, tuple]:
    """The tokens to learn from and the functions to complete of at most `limit` repositories.
    Raises: UserError if none is large enough."""
    found, most = {}, FUNCTIONS * (8 if len(repos) == 1 else 1)
    for name in sorted(repos, key=data.by_name_hash):
        if len(found) < limit:
            files, held = data.hold_out(repos[name], most)
            context = first_tokens(writer, files, chunks)
            if held and len(context) >= 2 * writer.spec.chunk:
                found[name] = context, held
    require(
        found,
        "no repository to complete: one needs five files, a function and two chunks of code; check --data",
    )
    return found


if __name__ == "__main__":  # `python eval.py ...` is `python ponder.py ...`
    sys.modules["eval"] = sys.modules["__main__"]  # so that this file is run once
    import ponder

    ponder.main()
