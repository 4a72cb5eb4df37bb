"""What a policy must beat, and how it is measured; then writing, and the benchmarks.

Every method of METHODS reads the same documents, from repositories that no training stage saw, under the
same hard budget; its loss on a chunk is always taken before it learns from that chunk.

    gain             loss(SKIP) - loss(method), the same parameters that never learn
    oracle recovery  gain(method) / gain(oracle)
    cost             `nominal` and `flops`, per chunk, SKIP = 1; seconds are measured

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
import resource
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
from jax.experimental import multihost_utils
from tqdm import tqdm

import data
import model as lm
import rl
from data import Problem, UserError, require


# --- 1. The methods ---------------------------------------------------------------------------------
class Method(NamedTuple):
    """How a method is called and drawn; the colours (Okabe and Ito's) are told apart by the colour-blind."""

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
MORE = ("every_n", "front_loaded", "gradient_threshold", "online_gate")  # read with --all-methods alone
PAYS_PROBE = ("gradient_threshold", "online_gate")  # they see the gradient, and take the seconds for it


class Read(NamedTuple):
    """One document read by one method."""

    repo: str
    losses_T: np.ndarray
    actions_T: np.ndarray
    seconds: float  # the whole document, frozen prefix included; of several side by side each has its share
    dropped: int = 0  # inner steps that would not have been finite


class Evaluation(NamedTuple):
    """All that was read; each method's documents are in the same order."""

    reads: dict[str, list[Read]]  # by method, at the budget
    frontier: dict[float, list[Read]]  # of the policy, by budget


# --- 2. Reading documents with every method -----------------------------------------------------------
PLAN: dict[str, float] = {}  # the run's parts, in order, and the seconds that each was estimated to take


class Bar(tqdm):
    """A Bar shows how far a part of the run is, and how long the whole run will still take: the later parts
    as estimated, but at the pace of this one."""

    @property
    def format_dict(self) -> dict[str, Any]:
        found, part = super().format_dict, self.desc.partition(",")[0]
        done, elapsed = found["n"] - self.initial, found["elapsed"]
        if not done or part not in PLAN:
            return found | {"left": "?"}
        parts, whole = list(PLAN), elapsed * (found["total"] - self.initial) / done
        later = sum(PLAN[name] for name in parts[parts.index(part) + 1 :])
        return found | {"left": self.format_interval(whole - elapsed + later * whole / PLAN[part])}


def progress(iterable: Any, what: str, **options: Any) -> tqdm:
    """Make a bar that shows how far something is; only the first of several hosts shows it."""
    share = f", {PLAN[what] / sum(PLAN.values()):.0%} of the run" if what in PLAN else ""
    shape = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}, all done in {left}{postfix}"
    options |= {"mininterval": 1, "dynamic_ncols": True, "bar_format": shape}
    return Bar(iterable, what + share, disable=jax.process_index() > 0, **options)


def group_documents(spec: lm.Spec, excerpts: Sequence) -> list[list]:
    """Put documents into groups that are read at once, Spec.together on each device."""
    size = spec.mesh.size * spec.together
    return [list(excerpts[i : i + size]) for i in range(0, len(excerpts), size)]


def pad_rows(items: Sequence, size: int) -> np.ndarray:
    """Stack rows, and repeat the last up to `size`."""
    return np.stack([*items, *[items[-1]] * (size - len(items))])


def fetch(tree: Any) -> Any:
    """Bring arrays that lie on several devices, of several hosts too, to every host as NumPy's."""
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


@partial(jax.jit, static_argnums=0)
def run_prefixes(spec: lm.Spec, weights: lm.Weights, tokens_N) -> lm.Window:
    """Run the frozen prefix of whole documents, spread over the devices."""
    read = lambda weights, spec, tokens: lm.make_windows(spec, weights, tokens)
    device = lambda weights, _, tokens_N: lm.side_by_side(spec, partial(read, weights), tokens_N)
    return lm.on_devices(spec.mesh, device, weights, (), tokens_N)


def prepare(spec: lm.Spec, weights: lm.Weights, group: Sequence[data.Excerpt]) -> rl.Document:
    """Make a group of documents ready to be read, with a leading axis of as many as are read at once."""
    size = spec.mesh.size * spec.together
    rows = [pad_rows([getattr(x, name) for x in group], size) for name in ("tokens", "text_TU")]
    tokens_N, text_NTU = lm.place(spec.mesh, rows, lm.ROWS)
    return rl.Document(run_prefixes(spec, weights, tokens_N), text_NTU)


@partial(jax.jit, static_argnums=0, static_argnames=("credit", "probe"))
def run_episodes(spec, weights, env, rule, documents, key, credit=0, probe=False) -> rl.Step:
    """Read each document by one rule, `documents` with each one's own plan (N, T) -> steps (N, T, ...)."""

    def device(weights, shared, documents):
        env, rule, key = shared

        def read(spec, inputs):
            document, plan_T = inputs
            own = rule._replace(plan_T=plan_T)
            return rl.episode(spec, weights, env, document, own, key, credit, probe)

        return lm.side_by_side(spec, read, documents)

    return lm.on_devices(spec.mesh, device, weights, (env, rule, key), documents)


def run_rule(spec, weights, env: rl.Env, rule: rl.Rule, document: rl.Document, seed: int, **options):
    """Read a prepared group by one rule, whose plan is (T,), (N, T) or one action -> steps (N, T, ...)."""
    plan_NT = np.broadcast_to(np.asarray(rule.plan_T, np.int32), document.text_TU.shape[:2])
    rule = rule._replace(plan_T=())  # of several shapes, for each of which all would be compiled again
    key = jax.random.key(seed)
    return run_episodes(spec, weights, env, rule, (document, plan_NT), key, **options)


def base_weights(weights: lm.Weights) -> lm.Weights:
    """Make weights under which the fast weights add nothing and stay so: those of the base model."""
    return weights._replace(slow=jax.tree.map(jnp.zeros_like, weights.slow))


def read_validation(spec, weights, env: rl.Env, policy: rl.Policy, excerpts) -> rl.Step:
    """Read documents and learn from every second chunk -> steps (N, T, ...) with all that gates see."""
    seen, every_second = [], np.arange(len(excerpts[0].text_TU)) % 2 == 0
    rule = rl.make_rule(rl.follow, policy, plan_T=every_second, hard=False)
    for group in progress(group_documents(spec, excerpts), "calibration"):
        document = prepare(spec, weights, group)
        steps = fetch(run_rule(spec, weights, env, rule, document, 0, probe=True))
        seen.append(jax.tree.map(lambda x: x[: len(group)], steps))
    return jax.tree.map(lambda *x: np.concatenate(x), *seen)


def rules_for(env: rl.Env, known: rl.Calibrated, budgets: Sequence[float], chunks: int) -> dict:
    """Make the rules of all methods that need not see a document first -> {(method, budget): rule}.
    All are for the first budget; the policy is there for each. A gate looks ahead where the policy does."""
    main, rules = budgets[0], {}
    for name, action in FIXED.items():
        rules[name, main] = rl.make_rule(rl.follow, known.policy, plan_T=action, hard=False)
    for name in rl.GATES:
        if name != "ahead_threshold" or rl.looks_ahead(known.policy):
            rules[name, main] = rl.calibrated_rule(known, name, env, chunks)
    for budget in budgets:
        at = env._replace(budget=np.float32(budget))
        rules["policy", budget] = rl.calibrated_rule(known, "policy", at, chunks)
    return rules


def plan_documents(spec, weights, env: rl.Env, document: rl.Document, seeds: list) -> dict[str, np.ndarray]:
    """Plan a group of documents without looking, and in hindsight -> {method: plans (N, T)}.
    The oracle knows what the update on each chunk took off the losses of all later ones when every chunk was
    learned from."""
    costs_A, budget, chunks = env.costs_A, float(env.budget), document.text_TU.shape[1]
    action, _ = rl.affordable_updates(costs_A, budget, chunks)
    everywhere = rl.make_rule(rl.follow, rl.init_policy(jax.random.key(0)), plan_T=action, hard=False)
    steps = run_rule(spec, weights, env, everywhere, document, 0, credit=1)
    plans = []
    for seed, worth_T in zip(seeds, fetch(steps.credit_T).sum(1)):
        oracle = {"oracle": rl.plan_oracle(costs_A, budget, worth_T)}
        plans.append(rl.plan_schedules(costs_A, budget, chunks, seed) | oracle)
    return {name: pad_rows([plan[name] for plan in plans], len(document.text_TU)) for name in plans[0]}


def evaluate(spec, weights, env, excerpts, known, budgets, seed: int, names=tuple(METHODS)) -> Evaluation:
    """Read every document with the methods of these names, as many at once as there are devices, and print
    what they have gained so far. The policy, calibrated as `known`, is read at the budget of `env` and at
    `budgets`."""
    main, found = float(env.budget), Evaluation({}, {})
    rules = rules_for(env, known, list(dict.fromkeys([main, *budgets])), len(excerpts[0].text_TU))
    rules = {which: rule for which, rule in rules.items() if which[0] in names}
    groups, rng, hindsight = group_documents(spec, excerpts), np.random.default_rng(seed), "oracle" in names
    read_group(spec, weights, env, {}, groups[0][:1], [], rng)  # compiles before the first clock starts
    for group in progress(groups, "test documents"):
        first = len(found.reads.get("skip", ()))
        seeds = [(seed, first + n) for n in range(len(group))] if hindsight else []
        reads_of = read_group(spec, weights, env, rules, group, seeds, rng, names)
        for (name, budget), reads in reads_of.items():
            if budget == main:
                found.reads.setdefault(name, []).extend(reads)
            if name == "policy":
                found.frontier.setdefault(budget, []).extend(reads)
        tqdm.write(tell_gains(found.reads))
    for n in range(len(excerpts) if hindsight else 0):  # which also knows when a blind schedule was better
        candidates = [found.reads[name][n] for name in (*BLIND, "oracle") if name in found.reads]
        found.reads["oracle"][n] = min(candidates, key=lambda read: read.losses_T.mean())
    return found


def tell_gains(reads: dict[str, list[Read]]) -> str:
    """Say in one line what some methods have gained over SKIP so far, in nats per token."""
    loss = {name: np.mean([read.losses_T.mean() for read in some]) for name, some in reads.items()}
    names = [name for name in ("update_1", "random", "loss_threshold", "policy", "oracle") if name in loss]
    gains = ", ".join(f"{name} {loss['skip'] - loss[name]:+.3f}" for name in names)
    return f"{len(reads['skip'])} documents: SKIP {loss['skip']:.3f}; gains: {gains}"


def read_group(spec, weights, env, rules, group, seeds, rng, names=()) -> dict[tuple[str, float], list[Read]]:
    """Read a group of documents with every rule and, if there are seeds, those of the blind schedules and the
    oracle that have these names, in random order -> {(method, budget): reads}."""
    main, policy = float(env.budget), rl.init_policy(jax.random.key(0))
    document, prefix_seconds = time_call(prepare, spec, weights, group)
    never = rl.make_rule(rl.follow, policy, plan_T=0)
    todo = {("base", main): never} | rules  # the base model is one whose fast weights are 0
    plans = plan_documents(spec, weights, env, document, seeds) if seeds else {}
    for name in plans.keys() & set(names):
        todo[name, main] = rl.make_rule(rl.follow, policy)._replace(plan_T=plans[name])

    def read(name: str, budget: float) -> rl.Step:
        own = base_weights(weights) if name == "base" else weights
        at = env._replace(budget=lm.place(spec.mesh, np.float32(budget)))
        return run_rule(spec, own, at, todo[name, budget], document, 0, probe=name in PAYS_PROBE)

    found, order, beside = {}, list(todo), -(-len(group) // spec.mesh.size)
    for name, budget in (order[i] for i in rng.permutation(len(order))):
        steps, seconds = time_call(read, name, budget)
        loss, action, dropped = fetch((steps.loss, steps.action, steps.dropped))
        found[name, budget] = [
            Read(text.repo, loss[n], action[n], (seconds + prefix_seconds) / beside, int(dropped[n].sum()))
            for n, text in enumerate(group)
        ]
    return found


def time_call(function: Callable, *args) -> tuple[Any, float]:
    """Call a function -> (what it returns, the seconds until that is there)."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


# --- 3. Statistics ------------------------------------------------------------------------------------
def per_repository(reads: list[Read], value: Callable[[Read], Any]) -> np.ndarray:
    """Average a value of each read over each repository, in the order of their names -> (repositories,)."""
    names, values = np.asarray([read.repo for read in reads]), np.asarray([value(read) for read in reads])
    return np.asarray([values[names == name].mean() for name in np.unique(names)])


def interval(values: np.ndarray) -> list[float]:
    """Find the 95 % bootstrap interval of the mean."""
    if np.ptp(values) == 0:
        return [float(values[0])] * 2
    found = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return [float(end) for end in found.confidence_interval]


def compare_pairs(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Tell how much higher ours are than theirs, unit by unit, with interval and the Wilcoxon test's p."""
    values = ours - theirs
    p = float(scipy.stats.wilcoxon(values).pvalue) if values.any() else 1.0
    return {"difference": float(values.mean()), "ci": interval(values), "p": p}


def summarise(reads: list[Read], skip: np.ndarray, flops_A: np.ndarray) -> dict:
    """Compute means over repositories, of loss and gain over `skip` with intervals; costs are per chunk."""
    costs = {"nominal": np.asarray(rl.NOMINAL), "flops": flops_A, "updates": np.minimum(lm.STEPS, 1)}
    mean = lambda value: float(per_repository(reads, value).mean())
    loss = per_repository(reads, lambda read: read.losses_T.mean())
    row = {"loss": float(loss.mean()), "gain": float((skip - loss).mean()), "gain_ci": interval(skip - loss)}
    row |= {name: mean(lambda read: of_A[read.actions_T].mean()) for name, of_A in costs.items()}
    return row | {"seconds": mean(lambda read: read.seconds / len(read.actions_T))}


def analyse(found: Evaluation, flops_A: np.ndarray) -> dict:
    """Compute all figures of results.json that are measured."""
    loss = {name: per_repository(x, lambda read: read.losses_T.mean()) for name, x in found.reads.items()}
    summary = lambda reads: summarise(reads, loss["skip"], flops_A)
    methods = {name: summary(found.reads[name]) for name in METHODS if name in loss}
    most, frontier = methods["oracle"]["gain"], sorted(found.frontier.items())
    for row in methods.values():
        row["oracle_recovery"] = row["gain"] / most if most > 0 else None
    rivals = [name for name in (*BLIND, *rl.GATES) if name in loss]
    return {
        "methods": methods,
        "comparisons": {name: compare_pairs(loss[name], loss["policy"]) for name in rivals},
        "frontier": [{"budget": x / len(reads[0].actions_T)} | summary(reads) for x, reads in frontier],
        "names": sorted({read.repo for read in found.reads["skip"]}),
        "losses": {name: values.tolist() for name, values in loss.items()},  # of these repositories
    }


def paired_table(measured: dict[str, dict[str, dict[str, float]]], units: str) -> tuple[dict, str]:
    """Make one table for runs, actions and answers: {row: {measure: {unit: value}}} -> (summary, Markdown).
    It has means with intervals over units (`units` says what they are), and how much higher than the first
    row's they are, paired over the units that both have."""
    first, summary, rows = next(iter(measured.values())), {}, {}
    for name, found in measured.items():
        summary[name], rows[name] = {}, {units: max(map(len, found.values()))}
        for measure, values in found.items():
            mine = np.asarray(list(values.values()), float)
            row = {"mean": float(mine.mean()), "ci": interval(mine), "units": len(mine)}
            summary[name][measure], cell = row, f"{spell(row['mean'])} {spell(row['ci'])}"
            both = sorted(values.keys() & first.get(measure, {}).keys())
            if both and found is not first:
                columns = (np.asarray([x[unit] for unit in both]) for x in (values, first[measure]))
                row["change"] = change = compare_pairs(*columns)
                cell += f" ({change['difference']:+.4f} {spell(change['ci'])}, p {change['p']:.2g})"
            rows[name][f"{measure} [95 %] (above the first row's)"] = cell
    return summary, markdown(rows)


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Make a Markdown table of {row: {column: value}}, with the columns of the first row."""
    columns = list(next(iter(rows.values())))
    cells = [["", *columns], ["---"] * (1 + len(columns))]
    cells += [[name, *(spell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def spell(value: Any) -> str:
    """Spell a number, an interval or nothing out."""
    if isinstance(value, list):
        return f"[{', '.join(map(spell, value))}]"
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def compare_runs(folders: Sequence[Path]) -> str:
    """Make a table of finished runs: losses of SKIP, gains of UPDATE_1, the policy and others, over the
    repositories that they share with the first. Raises: UserError."""
    require(folders, "--stage compare needs --runs A B ...: folders of finished runs")
    measured = {}
    for folder in folders:
        try:
            found = json.loads((folder / "results.json").read_text())
            loss = {name: np.asarray(values) for name, values in found["losses"].items()}
            columns = {"SKIP's loss": loss["skip"]}
            for name in ("update_1", "policy", "random", "oracle"):
                columns[f"{name}'s gain"] = loss["skip"] - loss[name]
            measured[str(folder)] = {name: dict(zip(found["names"], x)) for name, x in columns.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no finished run ({type(error).__name__}); give folders that have results.json"
            raise UserError(f"--runs {folder}: {reason}") from None
    return paired_table(measured, "repositories")[1]


# --- 4. Report and plots ------------------------------------------------------------------------------
REPORT = """# PonderTTT: {model} on {data}

{verdict}

{documents} documents of {chunks} chunks; budget {budget:g} per document ({currency}). Gains are over SKIP,
the same parameters that never learn, in nats per token; intervals (ci) are 95 % bootstrap intervals over
{unit}; costs are per chunk, `updates` is the share of chunks learned from; seconds include the frozen prefix.
Oracle recovery is a method's gain over the oracle's.

{methods}

How much lower the policy's loss is at the same budget, paired over {unit} (p: Wilcoxon's test):

{comparisons}

![Gain over SKIP against cost](pareto.png)

![Chunks learned from, and the gain over SKIP, along the document](document.png)
{training}
## What was run

{facts}
"""
RANKED = 10  # repositories (of one's own, documents) from which on methods are said to be better or worse


def write_report(out: Path, results: dict, found: Evaluation, training: list[dict]) -> str:
    """Write report.md and its plots -> the verdict, one sentence."""
    plot_pareto(out / "pareto.png", results)
    plot_document(out / "document.png", found.reads)
    if training:
        plot_training(out / "training.png", training)
    named = lambda rows: {METHODS[name].label: row for name, row in rows.items()}
    frontier = {f"learned policy, budget {row['budget']:.3g} a chunk": row for row in results["frontier"]}
    parts = {
        "verdict": verdict(results),
        "methods": markdown(named(results["methods"]) | frontier),
        "comparisons": markdown(named(results["comparisons"])),
        "training": "\n![Cost and multiplier in training](training.png)\n" if training else "",
        "facts": "\n".join(f"- {fact}" for fact in results["facts"]),
    }
    data.write_atomic(out / "report.md", REPORT.format(**results | parts).encode())
    return parts["verdict"]


def verdict(results: dict) -> str:
    """Say in one sentence what was found, whichever way it went."""
    count, methods = len(results["names"]), results["methods"]
    skip, full, policy = methods["skip"]["loss"], methods["update_1"], methods["policy"]
    said = f"On {count} {results['unit']} {results['unseen']}, learning from every chunk (UPDATE_1)"
    if full["gain_ci"][0] <= 0:
        gain = f"{full['gain']:.3f} {spell(full['gain_ci'])}"
        return f"{said} did not reliably beat never learning: gain {gain}."
    share = {name: policy[name] / full[name] for name in ("gain", "nominal", "flops")}
    said += f" lowered the loss by {full['gain'] / skip:.1%} ({skip:.3f} to {full['loss']:.3f}); the learned"
    said += " policy, which looks ahead in the text," if results["looks_ahead"] else " policy"
    said += f" kept {share['gain']:.0%} of that ({policy['gain']:.3f} nats per token)"
    said += f" at {share['nominal']:.0%} of its nominal cost ({share['flops']:.0%} of its FLOPs);"
    if count < RANKED:
        return f"{said} {count} are too few to rank methods by."
    groups = {"better than": [], "worse than": [], "not distinguishable from": []}
    for name, x in results["comparisons"].items():
        label, (low, high) = f"'{METHODS[name].label}'", x["ci"]
        word = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
        by = f" ({x['difference']:+.3f} {spell(x['ci'])})" if low > 0 or high < 0 else ""
        groups[word].append(label + by)
    ranks = [f"{word} {', '.join(labels)}" for word, labels in groups.items() if labels]
    return f"{said} at the same budget it was {'; '.join(ranks)}."


def plot(path: Path, panels: list[tuple[str, str, list[tuple]]]) -> None:
    """Draw panels side by side as a PNG: (x label, y label, curves (x, y, how they are drawn))."""
    from matplotlib.figure import Figure

    figure, content = Figure((6 * len(panels), 5), layout="constrained"), io.BytesIO()
    for axis, (xlabel, ylabel, curves) in zip(figure.subplots(1, len(panels)), panels):
        for x, y, style in curves:
            axis.errorbar(x, y, **style)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.grid(color="#dddddd")
        axis.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))  # above it
    figure.savefig(content, dpi=150)
    data.write_atomic(path, content.getvalue())


def style_of(name: str, line: str = "-") -> dict[str, str]:
    """Say how a method is drawn."""
    how = METHODS[name]
    return {"label": how.label, "color": how.colour, "marker": how.marker, "linestyle": line}


def plot_pareto(path: Path, results: dict) -> None:
    """Plot gain over SKIP, with intervals: against cost in two currencies, and at the budget."""
    methods, frontier, ylabel = results["methods"], results["frontier"], "gain over SKIP (nats per token)"
    at_budget = sorted(methods.keys() - {*FIXED, "base"}, key=lambda name: methods[name]["gain"])

    def point(name: str, x: float) -> tuple:
        gain, (low, high) = methods[name]["gain"], methods[name]["gain_ci"]
        return x, gain, style_of(name, "none") | {"yerr": [[gain - low], [high - gain]]}

    panels = []
    for unit in ("nominal", "flops"):
        curves = [point(name, methods[name][unit]) for name in (*FIXED, "policy", "oracle")]
        style = style_of("policy", "--") | {"label": "learned policy, other budgets"}
        curves.append(([x[unit] for x in frontier], [x["gain"] for x in frontier], style))
        panels.append((f"{unit} cost per chunk (SKIP = 1)", ylabel, curves))
    panels.append(("methods at the budget", ylabel, [point(name, x) for x, name in enumerate(at_budget)]))
    plot(path, panels)


def plot_document(path: Path, reads: dict[str, list[Read]]) -> None:
    """Plot the share of chunks learned from, and the gain, both so far along the document: means over all."""
    so_far = lambda values: np.mean(values, 0).cumsum() / np.arange(1, len(values[0]) + 1)
    losses = {name: so_far([read.losses_T for read in some]) for name, some in reads.items()}
    learned, gains = [], []
    for name in ("base", "update_1", "update_2", "update_4", "loss_threshold", "policy", "oracle"):
        learned_T = so_far([read.actions_T > 0 for read in reads[name]])
        chunks, style = range(1, len(learned_T) + 1), style_of(name)
        learned.append((chunks, learned_T, style))
        gains.append((chunks, losses["skip"] - losses[name], style))
    share = ("chunk", "chunks learned from, share so far", learned)
    plot(path, [share, ("chunk", "gain over SKIP so far (nats per token)", gains)])


def plot_training(path: Path, rows: list[dict[str, float]]) -> None:
    """Plot the cost against its limit, and the multiplier, over policy training."""
    curve = lambda name: ([row["step"] for row in rows], [row[name] for row in rows], {"label": name})
    costs = ("PPO iteration", "cost per chunk (SKIP = 1)", [curve("cost"), curve("limit")])
    plot(path, [costs, ("PPO iteration", "multiplier λ", [curve("lambda")])])


# --- 5. Writing ---------------------------------------------------------------------------------------
KEPT = 0.5  # of what a context taught, for a prompt: all of it is too much of the context's last files
ROWS_AT_ONCE = 8  # texts written side by side


class Writer(NamedTuple):
    """All that stays the same while texts are written."""

    spec: lm.Spec
    weights: lm.Weights
    env: rl.Env  # its budget is that of one chunk
    tokenizer: Any
    ends: tuple[int, ...]  # tokens that end a text; documents start with the first
    classes: np.ndarray  # (V, 8) kinds of code in each token
    known: rl.Calibrated | None  # the policy, for the action "policy"
    action: str = "skip"  # how texts are learned from: "policy" or one of FIXED
    seed: int = 0
    samples: int = 1  # of each prompt
    temperature: float = 0.0  # 0 takes the most likely token
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts to end before


class Row(NamedTuple):
    """A text on its way. Its document is an end of text, the context, the prompt and what was written, cut
    into chunks as when it is read."""

    tokens: list[int]  # the document so far
    memory: rl.Memory  # with the fast weights
    given: int = 1  # how many tokens were not written here
    actions: tuple[int, ...] = ()  # taken on its complete chunks
    text: str = ""  # what was written
    ended: bool = False


def take_action(writer: Writer, action: str) -> Writer:
    """Let a writer learn with "policy" or one of FIXED, or be the "base" model. Raises: UserError."""
    require(action in ("policy", "base", *FIXED), f"--action {action}: take policy, base, {', '.join(FIXED)}")
    there = writer.known or action != "policy"
    require(there, "there is no trained policy for these settings; take another --action")
    if action == "base":
        return writer._replace(action="skip", weights=base_weights(writer.weights))
    return writer._replace(action=action)


def begin(writer: Writer, context: Sequence[int] = ()) -> Row:
    """Learn from the tokens of a context, chunk by chunk as in an episode.
    What follows begins anew from W_0 + KEPT (W - W_0), as fine-tuned weights are averaged with those before
    (Wortsman et al., arXiv 2109.01903)."""
    fast, slow, mesh = writer.spec.fast, writer.weights.slow, writer.spec.mesh
    memory = lm.place(mesh, rl.init_memory(fast, slow))  # as `learn_chunk` returns it: compiled once
    row = learn_from(writer, Row([writer.ends[0]], memory), context)
    kept = jax.tree.map(lambda first, last: first + KEPT * (last - first), slow["start"], row.memory.state.w)
    state = lm.place(mesh, lm.init_state(fast, slow | {"start": kept}))
    return row._replace(memory=row.memory._replace(state=state))


def learn_from(writer: Writer, row: Row, tokens: Iterable[int]) -> Row:
    """Append tokens to a row and learn from the chunks that this completes; what is left over is less than a
    chunk, and is not learned from."""
    C, tokens = writer.spec.chunk, [*row.tokens, *map(int, tokens)]
    first, chunks = (row.given - 1) // C, (len(tokens) - 1) // C
    row = row._replace(tokens=tokens, given=len(tokens))
    if writer.action == "skip" or chunks == first:
        return row
    env = writer.env._replace(budget=np.float32(writer.env.budget * chunks))
    if writer.action == "policy":
        rule = rl.calibrated_rule(writer.known, "policy", env, chunks)
    else:
        always = {"plan_T": FIXED[writer.action], "hard": False}
        rule = rl.make_rule(rl.follow, rl.init_policy(jax.random.key(0)), **always)
    document = np.asarray(tokens[: chunks * C + 1], np.int32)
    text_TU = rl.text_features(document, C, writer.classes)
    padded = np.append(document, np.zeros(C, np.int32))  # the first chunk is the first half of its window
    for t in range(first, chunks):
        low, key = max(t - 1, 0) * C, jax.random.fold_in(jax.random.key(writer.seed), t)
        own = padded[low : low + 2 * C], document[t * C + 1 : (t + 1) * C + 1], text_TU[t]
        inputs = (*own, np.int32(t), np.int32(chunks))
        memory, action = learn_chunk(writer.spec, writer.weights, env, rule, row.memory, inputs, key)
        row = row._replace(memory=memory, actions=(*row.actions, int(action)))
    return row


@partial(jax.jit, static_argnums=0)
def learn_chunk(spec, weights, env: rl.Env, rule: rl.Rule, memory: rl.Memory, inputs, key):
    """Read one chunk and learn, as an episode does -> (memory, action). `inputs` are its window's tokens
    (S,), its own (C,), its text features, its place and how many chunks there will be."""
    tokens_S, targets_C, text_U, t, chunks = inputs
    x_SD, normed_SD = lm.run_prefix(spec, weights, tokens_S)
    window = lm.Window(x_SD, targets_C, jnp.where(t == 0, 0, spec.chunk), normed_SD)
    memory, step = rl.read_step(spec, weights, env, rule, memory, rl.Chunk(window, text_U, t, chunks), key)
    return memory, step.action


def write(writer: Writer, start: Row, prompts: Sequence[str], show=lambda text: None) -> Iterator[list[Row]]:
    """Continue each prompt writer.samples times, after learning from it as from the context. Yields: the rows
    of each prompt. show(text so far) is called for every piece."""
    rows, seeds = [], []
    for place, tokens in enumerate(data.encode(writer.tokenizer, prompts)):
        rows += [learn_from(writer, start, tokens)] * writer.samples
        seeds += [zlib.crc32(f"{j} {prompts[place]}".encode()) for j in range(writer.samples)]
        if len(rows) + writer.samples > ROWS_AT_ONCE or place + 1 == len(prompts):
            for low in range(0, len(rows), ROWS_AT_ONCE):
                some = slice(low, low + ROWS_AT_ONCE)
                rows[some] = write_rows(writer, rows[some], seeds[some], show)
            yield from (rows[i : i + writer.samples] for i in range(0, len(rows), writer.samples))
            rows, seeds = [], []


def write_rows(writer: Writer, rows: list[Row], seeds: list[int], show) -> list[Row]:
    """Write on rows side by side until each has ended. Fast weights stay as they are.
    A window of two chunks is read at once, with room left to write in; it moves on when that is full. What
    is drawn depends on the writer's seed and the row's own, not on the rows beside it."""
    spec, size = writer.spec, 2 * writer.spec.chunk
    if jax.default_backend() == "cpu":  # whose bfloat16 products are slow for single rows
        spec = spec._replace(model=spec.model._replace(dtype="float32"), unroll=True)
    room = min(math.ceil(writer.max_new_tokens / lm.PIECE) * lm.PIECE, writer.spec.chunk)
    w_B = jax.tree.map(lambda *x: jnp.stack(x), *(row.memory.state.w for row in rows))
    draw = lm.Draw(jax.random.key(writer.seed), np.uint32(seeds), None, np.float32(writer.temperature))
    while True:
        windows = [row.tokens[room - size :] for row in rows]
        lengths = np.int32([len(window) for window in windows])
        width = min(1 << int(max(lengths) - 1).bit_length(), size)  # a power of 2: few shapes
        padded = np.int32([window + [0] * (width - len(window)) for window in windows])
        logits_BV, caches_B = lm.prefill(spec, writer.weights, w_B, padded, lengths, size)
        for low in range(0, room, lm.PIECE):
            draw = draw._replace(number_B=np.int32([len(row.tokens) - row.given for row in rows]))
            args = spec, writer.weights, w_B, caches_B, logits_BV, lengths + low, draw
            piece_BP, caches_B, logits_BV = lm.write_piece(*args)
            for b, piece in enumerate(piece_BP.tolist()):
                if not rows[b].ended:
                    rows[b] = append_piece(writer, rows[b], piece[: room - low])
                    show(rows[b].text)
            if all(row.ended for row in rows):
                return rows


def append_piece(writer: Writer, row: Row, piece: list[int]) -> Row:
    """Append what was drawn to a row, up to where its text ends: by a token of `ends`, before a text of
    `stop`, or because it is long enough."""
    new = [*row.tokens[row.given :], *piece][: writer.max_new_tokens]
    length = next((i for i, token in enumerate(new) if token in writer.ends), len(new))
    before = row.tokens[max(row.given - 8, 0) : row.given]  # the text is what these become longer by
    decode = partial(writer.tokenizer.decode, skip_special_tokens=False)
    text = decode(before + new[:length])[len(decode(before)) :]
    stops = [text.find(stop) for stop in writer.stop if stop in text]
    ended = bool(stops) or length < len(new) or len(new) == writer.max_new_tokens
    tokens = row.tokens[: row.given] + new[: length + 1]
    return row._replace(tokens=tokens, text=text[: min(stops, default=None)], ended=ended)


def print_completions(writer: Writer, start: Row, prompt: str) -> None:
    """Continue one prompt on standard output, a single one as it is written; say on standard error what was
    learned from."""
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # which stands for half a letter
        if writer.samples == 1:
            print(text[shown:], end="", flush=True)
            shown = max(shown, len(text))

    (rows,) = write(writer, start, [prompt], show)
    for i, row in enumerate(rows):
        print(row.text[shown:] if writer.samples == 1 else f"--- {i + 1}\n{row.text}")
    taken = Counter(rl.ACTIONS[action] for action in rows[0].actions)
    learned = ", ".join(f"{n} {name}" for name, n in taken.items())
    print(f"learned from the context and the prompt: {learned or 'nothing'}", file=sys.stderr)


# --- 6. The judge -------------------------------------------------------------------------------------
# What an answer may have (bytes, files, processes), by the names of resource.RLIMIT_*.
LIMITS = {"AS": 1 << 30, "FSIZE": 1 << 24, "NOFILE": 256, "NPROC": 64, "CORE": 0}


class Verdict(NamedTuple):
    """A Verdict says how an answer fared and, in a few words, why."""

    result: str  # passed, failed, error, timeout, died, output too large
    detail: str = ""  # of passed: what this system left open to the answer


def judge_all(jobs: Iterable[tuple[Problem, str]], workers: int, seconds: int = 10) -> Iterator:
    """Judge answers, `workers` at once, each with its tests in a process of its own that is shut off and has
    that many seconds of CPU time, thrice that on the clock.

    It stops accidents, not answers written to forge a verdict. Yields: each job's place and its Verdict."""
    parts = (supervise, run_answer, confine, enter_namespaces, restrict_files)
    head = f"import contextlib, ctypes, json, os, resource, select, signal, struct, sys\nLIMITS = {LIMITS}"
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


def supervise() -> None:
    """Have an answer run, find its verdict, end all that it started, remove its folder, print the verdict."""
    task = json.loads(sys.stdin.readline())
    os.mkdir(task["folder"], 0o700)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans below become its children
    (verdict, report), printed = os.pipe(), os.memfd_create("printed")
    child = os.fork()
    os.setpgid(child, child)  # by both, as either may come first
    if not child:
        for fd, standard in (os.open(os.devnull, os.O_RDONLY), 0), (printed, 1), (printed, 2):
            os.dup2(fd, standard)
        run_answer(task, os.fdopen(report, "wb", 0))
    os.close(report)
    ready, _, _ = select.select([verdict, 0], [], [], 3 * task["seconds"])  # 0 ends if nobody waits any more
    found = os.read(verdict, 4096) if verdict in ready else b'["timeout", "on the clock"]'
    if not found:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # 152 is 128 + SIGXCPU
        found = b'["timeout", "of CPU time"]' if code == 152 else b'["died", "exit code %d"]' % code
    if os.fstat(printed).st_size >= LIMITS["FSIZE"]:
        found = b'["output too large"]'
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        while children := file.read().split():
            for process in children:
                os.killpg(os.getpgid(int(process)), signal.SIGKILL)
            os.wait()
            file.seek(0)
    os.spawnlp(os.P_WAIT, "sh", "sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', task["folder"])
    os.write(1, found)


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
        os.setgid(user)
        os.setuid(user)
        kept = struct.pack("6I", 4, 4, 4, 0, 0, 0)  # CAP_DAC_READ_SEARCH: Python may be in root's home
    libc.capset(header, kept) == 0 or libc.capset(header, bytes(24))
    libc.prctl(47, 2, 2, 0, 0)  # PR_CAP_AMBIENT_RAISE: programs that it starts keep it too
    for name, limit in (LIMITS | {"CPU": seconds}).items():
        with contextlib.suppress(ValueError):  # there is a lower one
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + 1))
    left = {"network": not apart, "signals": not (apart or root or version > 5), "disk space": not fixed}
    left |= {"reading": version < 1, "writing": not fixed and version < 1, "chmod": not (fixed or root)}
    return ", ".join(filter(left.get, left))


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
        fixed = libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 6, size) == 0  # MS_NOSUID, MS_NODEV
    return apart, fixed


def restrict_files(libc, folders: list[str]) -> int:
    """Give up all files but some folders' and, to read, Python's; return Landlock's version, 0 for none."""
    version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset
    every, size = (1 << min(12 + version, 15)) - 1, 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(444, struct.pack("3Q", every, 3, 3), size, 0)  # of files; of TCP; of signals
    readable = [sys.prefix, sys.base_prefix, *sys.path, "/usr", "/lib", "/lib64", "/nix/store"]
    readable += [f"/etc/{name}" for name in ("ld.so.cache", "localtime", "mime.types", "passwd", "hosts")]
    # Rights: 1 to run, 2 to write, 4 to read a file; 8 to list a folder; 16 and up to change what is in it.
    rights = dict.fromkeys(readable, 13) | {"/dev/null": 6, "/dev/urandom": 4} | dict.fromkeys(folders, every)
    for path in filter(os.path.exists, rights):
        fd = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights[path] & (every if os.path.isdir(path) else 7), fd)
        libc.syscall(445, rules, 1, rule, 0)  # landlock_add_rule
        os.close(fd)
    return version if libc.syscall(446, rules, 0) == 0 else 0  # landlock_restrict_self


def isolation() -> str:
    """Say in one line what this system closes off from answers, or raise UserError if it can't judge any."""
    trial = Problem("trial", "", (), "", "", "import decimal\nopen('file', 'w').close()"), ""
    linux, advice = sys.platform.startswith("linux"), "judge them on another system"
    result, left = next(judge_all([trial], 1))[1] if linux else ("no Linux", sys.platform)
    require(result == "passed", f"answers can't be judged here ({result}: {left}); {advice}")
    return f"answers get limits, no network, no files or processes but their own; open here: {left or 'none'}"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Compute 1 - C(n - c, k) / C(n, k), the chance that one of k answers passes (Chen et al. 2021)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


# --- 7. Benchmarks ------------------------------------------------------------------------------------
FUNCTIONS, BEFORE, LINE = 8, 16, 48  # at most: of a repository; chunks before one; tokens of a line


def write_answers(writer: Writer, problems, actions: Sequence[str], context: list[int], path: Path) -> None:
    """Have every action answer every problem; what is in answers.jsonl is not made again."""
    done = {(row["action"], row["task_id"]) for row in data.read_lines(path)}
    for action in actions:
        own = take_action(writer._replace(stop=problems[0].stop), action)
        asked = [p for p in problems if (action, p.task_id) not in done]
        answers = write(own, begin(own, context), [p.prompt for p in asked])
        for p, rows in zip(asked, tqdm(answers, f"answering, {action}", len(asked))):
            texts = [row.text for row in rows]
            data.append_line(path, {"task_id": p.task_id, "action": action, "completions": texts})


def copy_solutions(problems, source: str, path: Path) -> None:
    """Put given answers into answers.jsonl: the references, or lines of {"task_id", "completion"} of which
    several for one task are its samples. Raises: UserError."""
    known = {alias: p.task_id for p in problems for alias in (p.task_id, p.task_id.removeprefix("MBPP/"))}
    rows, texts = [{"task_id": p.task_id, "completion": p.reference} for p in problems], {}
    try:
        if source != "reference":
            rows = map(json.loads, filter(str.strip, Path(source).read_text(encoding="utf-8").split("\n")))
        for row in rows:
            texts.setdefault(known[str(row["task_id"])], []).append("" + row["completion"])  # text alone
    except (OSError, ValueError, KeyError, TypeError) as error:
        form = '{"task_id": one of the benchmark\'s, "completion": text}'
        raise UserError(f"--solutions {source}: not lines of {form} ({error!r})") from None
    require(texts, f"--solutions {source}: no answers in it")
    path.unlink(missing_ok=True)
    for task, completions in texts.items():
        data.append_line(path, {"task_id": task, "action": source, "completions": completions})


def judge_answers(problems, out: Path) -> str:
    """Judge answers.jsonl into verdicts.jsonl -> a table of pass rates."""
    by_id, path = {p.task_id: p for p in problems}, out / "verdicts.jsonl"
    rows = [row for row in data.read_lines(out / "answers.jsonl") if row["task_id"] in by_id]
    require(rows, f"{out}: no answers to judge")
    jobs = [(by_id[row["task_id"]], text) for row in rows for text in row["completions"]]
    judging = tqdm(judge_all(jobs, os.cpu_count() or 1), "judging", len(jobs))
    verdicts = [verdict for _, verdict in sorted(judging)]
    counts, measured, judged = Counter(verdict.result for verdict in verdicts), {}, iter(verdicts)
    path.unlink(missing_ok=True)
    for row in rows:
        task, action = row["task_id"], row["action"]
        mine = list(islice(judged, len(row["completions"])))
        data.append_line(path, {"task_id": task, "action": action, "verdicts": mine})
        passed = [verdict.result for verdict in mine].count("passed")
        for k in (k for k in (1, 10, 100) if k <= len(mine)):
            rates = measured.setdefault(action, {}).setdefault(f"pass@{k}", {})
            rates[task] = pass_at_k(len(mine), passed, k)
        for result, detail in dict.fromkeys(verdict for verdict in mine if verdict.result != "passed"):
            print(f"{task}: {result} {ascii(detail)[1:-1]}")  # an answer may have chosen it
    return save_table(out, measured, "problems", ", ".join(f"{n} {x}" for x, n in counts.most_common()))


def save_table(out: Path, measured: dict, units: str, told: str) -> str:
    """Write benchmark.json and benchmark.md -> the table and what is told below it."""
    summary, table = paired_table(measured, units)
    data.write_atomic(out / "benchmark.json", (json.dumps(summary, indent=2) + "\n").encode())
    data.write_atomic(out / "benchmark.md", f"# {out.name}\n\n{table}\n\n{told}\n".encode())
    return f"{table}\n{told}"


def completion_tasks(writer: Writer, repos: data.Repos, chunks: int, limit: int) -> dict[str, tuple]:
    """Find the tokens to learn from and the functions to complete of at most `limit` repositories.
    Raises: UserError if none is large enough."""
    found, alone, C = {}, len(repos) == 1, writer.spec.chunk
    for name in sorted(repos, key=data.by_name_hash):
        if len(found) < limit and (alone or data.split_of(name) == "test"):
            files, held = data.hold_out(repos[name], 8 * FUNCTIONS if alone else FUNCTIONS)
            _, tokens = data.read_tokens(files, writer.tokenizer, chunks * C)
            if held and len(tokens) >= 2 * C:
                found[name] = tokens[: chunks * C], held
    need = "one needs five files, a function and two chunks of code; check --data"
    require(found, f"no repository to complete: {need}")
    return found


def run_completion(writer: Writer, tasks: dict[str, tuple], actions: Sequence[str], out: Path) -> str:
    """Learn from four fifths of the files of each repository, complete functions of the others -> the table.
    `tasks` has (context tokens, functions) by repository; what is in answers.jsonl is not made again."""
    path, units = out / "answers.jsonl", "repositories" if len(tasks) > 1 else "functions"
    done = {(row["action"], row["task_id"]) for row in data.read_lines(path)}
    for name, (context, held) in tqdm(tasks.items(), "repositories"):
        for action in actions:
            if (action, name) not in done:
                own = take_action(writer, action)
                found = complete_functions(own, begin(own, context), held)
                data.append_line(path, {"task_id": name, "action": action, "functions": found})
    measured = {action: {"loss": {}, "exact": {}, "similarity": {}} for action in actions}
    for row in data.read_lines(path):
        if row["task_id"] in tasks and row["action"] in actions:
            for measure, values in measured[row["action"]].items():
                found = {f["function"]: f[measure] for f in row["functions"]}
                mean = {row["task_id"]: float(np.mean(list(found.values())))}
                values |= mean if units == "repositories" else found
    told = "Loss of a function's second half; its next line written exactly; similarity by Python's difflib."
    return save_table(out, measured, units, told)


def complete_functions(writer: Writer, start: Row, held: list[data.Function]) -> list[dict]:
    """Have each function's second half read and its next line written, after the file before it, learned from
    as any prompt is -> for each its loss, whether the line is exact, its similarity."""
    C, found, writer = writer.spec.chunk, [], writer._replace(max_new_tokens=LINE, samples=1)
    before, rest = (data.encode(writer.tokenizer, texts) for texts in zip(*[f[1:] for f in held]))
    prompts = [writer.tokenizer.decode(x[-BEFORE * C :].tolist(), skip_special_tokens=False) for x in before]
    for f, (row,), tokens in zip(held, write(writer, start, prompts), rest):
        document = [writer.ends[0]] * (2 * C) + row.tokens[: row.given] + tokens[:C].tolist()
        window = np.int32(document[-2 * C - 1 :])
        losses_C = window_losses(writer.spec, writer.weights, row.memory.state.w, window)
        ours, theirs = (text.strip().partition("\n")[0].strip() for text in (row.text, f.rest))
        figures = {
            "loss": float(losses_C[-len(tokens[:C]) :].mean()),
            "exact": float(ours.split() == theirs.split()),
            "similarity": SequenceMatcher(None, ours, theirs, autojunk=False).ratio(),
        }
        found.append({"function": f.name} | figures)
    return found


@partial(jax.jit, static_argnums=0)
def window_losses(spec, weights, w, tokens_S):
    """Compute the losses (C,) of the last tokens of a window under some fast weights."""
    x_SD, normed_SD = lm.run_prefix(spec, weights, tokens_S[:-1])
    window = lm.Window(x_SD, tokens_S[-spec.chunk :], jnp.int32(spec.chunk), normed_SD)
    return lm.predict(spec, weights, w, window).losses_C


if __name__ == "__main__":  # `python eval.py ...` is `python ponder.py ...`
    sys.modules["eval"] = sys.modules["__main__"]  # so that this file is run once
    import ponder

    ponder.main()
