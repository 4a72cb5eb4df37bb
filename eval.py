"""What a policy must beat, and how it is measured; then writing, and the benchmarks.

Every method of METHODS reads the same documents, from repositories that no training stage saw, all but the
fixed actions under the same hard budget; its loss on a chunk is taken before it learns from that.

    gain             loss(SKIP) - loss(method): SKIP has the same parameters and never learns
    oracle recovery  gain(method) / gain(oracle)
    cost             `nominal` and `flops`, per chunk, SKIP = 1; seconds are measured

Intervals are 95 % bootstrap intervals over repositories, whose documents are not independent.
Suffixes of names stand for dimensions: see model.py and, for A actions and U features, rl.py.
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
BLIND = ("every_n", "front_loaded", "random")  # planned without looking: `rl.plan_schedules`
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
PLAN: dict[str, float] = {}  # ponder.py's estimate: the run's parts, in order, and the seconds of each


class Bar(tqdm):
    """A Bar shows how far a part of the run is, and how long the whole run will still take: the later parts
    as estimated, but at the pace of this one."""

    @property
    def format_dict(self) -> dict[str, Any]:
        found, part, parts = super().format_dict, self.desc.partition(",")[0], list(PLAN)
        if part not in PLAN:
            return found | {"left": "?"}
        done, elapsed, whole = found["n"] - self.initial, found["elapsed"], PLAN[part]
        if done > 1:  # the first took compiling too
            whole = elapsed * (found["total"] - self.initial) / done
        later = sum(PLAN[name] for name in parts[parts.index(part) + 1 :]) * whole / PLAN[part]
        return found | {"left": self.format_interval(max(whole - elapsed, 0) + later)}


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
    """Read `documents`, which are (rl.Document, plans (N, T)), by one rule -> steps (N, T, ...)."""

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
    """Make weights whose fast weights add nothing: the base model's, if no update is taken."""
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
    All are for the first budget, the policy's for each. The gate looking ahead needs a policy that does."""
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
    for seed, worth_T in zip(seeds, fetch(steps.credit_T).sum(1)):  # (N, chunks read, chunks learned from)
        oracle = {"oracle": rl.plan_oracle(costs_A, budget, worth_T)}
        plans.append(rl.plan_schedules(costs_A, budget, chunks, seed) | oracle)
    return {name: pad_rows([plan[name] for plan in plans], len(document.text_TU)) for name in plans[0]}


def evaluate(spec, weights, env, excerpts, known, budgets, seed: int, names=tuple(METHODS)) -> Evaluation:
    """Read every document with the methods of these names, and print what they have gained so far. The
    policy, calibrated as `known`, is read at `env`'s budget and at `budgets`; `seed`: of plans and order."""
    main, found = float(env.budget), Evaluation({}, {})
    rules = rules_for(env, known, list(dict.fromkeys([main, *budgets])), len(excerpts[0].text_TU))
    rules = {which: rule for which, rule in rules.items() if which[0] in names}
    groups, rng, hindsight = group_documents(spec, excerpts), np.random.default_rng(seed), "oracle" in names
    read_group(spec, weights, env, {}, groups[0][:1], [], rng)  # compiles before the first clock starts
    for group in progress(groups, "test documents"):
        first = len(found.reads.get("skip", ()))
        seeds = [(seed, first + n) for n in range(len(group))] if hindsight else []
        found_now = read_group(spec, weights, env, rules, group, seeds, rng, names)
        for (name, budget), reads in found_now.items():
            if budget == main:
                found.reads.setdefault(name, []).extend(reads)
            if name == "policy":
                found.frontier.setdefault(budget, []).extend(reads)
        tqdm.write(tell_gains(found.reads))
    for n in range(len(excerpts) if hindsight else 0):  # the oracle also takes a better blind plan
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
    """Read a group of documents, in random order, with the base model, every rule and, if there are seeds,
    the plans of `plan_documents` that have these names -> {(method, budget): reads}."""
    main, policy = float(env.budget), rl.init_policy(jax.random.key(0))
    document, prefix_seconds = time_call(prepare, spec, weights, group)
    never = rl.make_rule(rl.follow, policy, plan_T=0)
    todo = {("base", main): never} | rules  # the base model is one whose fast weights are 0
    plans = plan_documents(spec, weights, env, document, seeds) if seeds else {}
    for name, plan_NT in plans.items():
        if name in names:
            todo[name, main] = rl.make_rule(rl.follow, policy)._replace(plan_T=plan_NT)

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
    """Average a value of the reads of each repository; these are in order of their names."""
    names = np.asarray([read.repo for read in reads])
    values = np.asarray([value(read) for read in reads], float)
    return np.asarray([values[names == name].mean() for name in np.unique(names)])


def interval(values: np.ndarray) -> list[float]:
    """Find the 95 % bootstrap interval of the mean."""
    if np.ptp(values) == 0:
        return [values[0]] * 2
    found = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return list(found.confidence_interval)


def compare_pairs(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Tell how much higher ours are than theirs, pair by pair, with Wilcoxon's p."""
    values = ours - theirs
    p = scipy.stats.wilcoxon(values).pvalue if values.any() else 1.0
    return {"difference": values.mean(), "ci": interval(values), "p": p}


def summarise(reads: list[Read], skip: np.ndarray, flops_A: np.ndarray) -> dict:
    """Compute the means over repositories; `skip` has SKIP's losses by repository, costs are per chunk."""
    costs = {"nominal": np.asarray(rl.NOMINAL), "flops": flops_A, "updates": np.minimum(lm.STEPS, 1)}
    mean = lambda value: per_repository(reads, value).mean()
    loss = per_repository(reads, lambda read: read.losses_T.mean())
    row = {name: mean(lambda read: of_A[read.actions_T].mean()) for name, of_A in costs.items()}
    row["seconds"] = mean(lambda read: read.seconds / len(read.actions_T))
    return {"loss": loss.mean(), "gain": (skip - loss).mean(), "gain_ci": interval(skip - loss)} | row


def analyse(found: Evaluation, flops_A: np.ndarray) -> dict:
    """Compute what is measured for results.json."""
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


def paired_table(measured: dict[str, dict], units: str) -> tuple[dict, str]:
    """Average {row: {measure: {unit: value}}} over units, and compare each row with the first over the units
    that both have -> (summary, Markdown)."""
    first, summary, rows = next(iter(measured.values())), {}, {}
    for name, found in measured.items():
        summary[name], rows[name] = {}, {units: max(map(len, found.values()))}
        for measure, values in found.items():
            mine = np.asarray(list(values.values()), float)
            row = {"mean": mine.mean(), "ci": interval(mine), "units": len(mine)}
            cell = f"{spell(row['mean'])} {spell(row['ci'])}"
            both = sorted(values.keys() & first.get(measure, {}).keys())
            if both and found is not first:
                columns = (np.asarray([x[unit] for unit in both]) for x in (values, first[measure]))
                row["change"] = change = compare_pairs(*columns)
                cell += f" ({change['difference']:+.4f} {spell(change['ci'])}, p {change['p']:.2g})"
            summary[name][measure] = row
            rows[name][f"{measure} [95 %] (above the first row's)"] = cell
    return summary, markdown(rows)


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Make a Markdown table of {row: {column: value}}; the first row has all columns."""
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
    """Make a table of finished runs, paired with the first. Raises: UserError."""
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
ABOUT = """{documents} documents of {chunks} chunks; budget {budget:g} per document ({currency}). Gains are
over SKIP, in nats per token, with 95 % bootstrap intervals (ci) over {unit}; costs are per chunk, `updates`
is the share of chunks learned from, `oracle_recovery` that of the oracle's gain."""
RANKED = 10  # fewest repositories, or documents of one, that methods are ranked by
GAIN = "gain over SKIP (nats per token)"


def write_report(out: Path, results: dict, reads: dict[str, list[Read]]) -> str:
    """Write report.md and its plots -> the verdict."""
    plot_pareto(out / "pareto.png", results)
    plot_document(out / "document.png", reads)
    named = lambda rows: {METHODS[name].label: row for name, row in rows.items()}
    frontier = {f"learned policy, budget {row['budget']:.3g} a chunk": row for row in results["frontier"]}
    paragraphs = [
        f"# PonderTTT: {results['model']} on {results['data']}",
        verdict(results),
        ABOUT.format(**results),
        markdown(named(results["methods"]) | frontier),
        "How much lower the policy's loss is at the same budget, paired (p: Wilcoxon's test):",
        markdown(named(results["comparisons"])),
        "![Gain over SKIP against cost](pareto.png)",
        "![Chunks learned from, and the gain over SKIP, along the document](document.png)",
        "## What was run",
        "\n".join(f"- {fact}" for fact in results["facts"]),
    ]
    data.write_atomic(out / "report.md", ("\n\n".join(paragraphs) + "\n").encode())
    return paragraphs[1]


def verdict(results: dict) -> str:
    """Say in one sentence what was found, whichever way it went."""
    count, methods = len(results["names"]), results["methods"]
    skip, full, policy = methods["skip"]["loss"], methods["update_1"], methods["policy"]
    said = f"On {count} {results['unit']} {results['unseen']}, learning from every chunk (UPDATE_1)"
    if full["gain_ci"][0] <= 0:
        said += f" did not reliably beat never learning: gain {full['gain']:.3f}"
        return f"{said} {spell(full['gain_ci'])}."
    share = {name: policy[name] / full[name] for name in ("gain", "nominal", "flops")}
    said += f" lowered the loss by {full['gain'] / skip:.1%} ({skip:.3f} to {full['loss']:.3f});"
    said += " the learned policy" + ", which looks ahead in the text," * results["looks_ahead"]
    said += f" kept {share['gain']:.0%} of that ({policy['gain']:.3f} nats per token)"
    said += f" at {share['nominal']:.0%} of its nominal cost ({share['flops']:.0%} of its FLOPs);"
    if count < RANKED:
        return f"{said} {count} are too few to rank methods by."
    groups = {"better than": [], "worse than": [], "not distinguishable from": []}
    for name, x in results["comparisons"].items():
        low, high = x["ci"]
        word = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
        by = f" ({x['difference']:+.3f} {spell(x['ci'])})" if low > 0 or high < 0 else ""
        groups[word].append(f"'{METHODS[name].label}'{by}")
    ranks = [f"{word} {', '.join(labels)}" for word, labels in groups.items() if labels]
    return f"{said} at the same budget it was {'; '.join(ranks)}."


def plot(path: Path, panels: list[tuple]) -> None:
    """Draw panels (x label, y label, curves (method, x, y, options of `errorbar`))."""
    from matplotlib.figure import Figure

    figure, content = Figure((6 * len(panels), 5), layout="constrained"), io.BytesIO()
    for axis, (xlabel, ylabel, curves) in zip(figure.subplots(1, len(panels)), panels):
        for name, x, y, style in curves:
            label, colour, marker = METHODS[name]
            axis.errorbar(x, y, **{"label": label, "color": colour, "marker": marker} | style)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(color="#dddddd")
        axis.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))  # above it
    figure.savefig(content, dpi=150)
    data.write_atomic(path, content.getvalue())


def plot_pareto(path: Path, results: dict) -> None:
    """Plot the gain over SKIP against cost in two currencies, and at the budget."""
    methods, frontier, panels = results["methods"], results["frontier"], []

    def point(name: str, x: float) -> tuple:
        gain, (low, high) = methods[name]["gain"], methods[name]["gain_ci"]
        return name, x, gain, {"yerr": [[gain - low], [high - gain]], "linestyle": "none"}

    for unit in ("nominal", "flops"):
        curves = [point(name, methods[name][unit]) for name in (*FIXED, "policy", "oracle")]
        other = {"label": "learned policy, other budgets", "linestyle": "--"}
        curves.append(("policy", [x[unit] for x in frontier], [x["gain"] for x in frontier], other))
        panels.append((f"{unit} cost per chunk (SKIP = 1)", GAIN, curves))
    names = sorted(methods.keys() - {*FIXED, "base"}, key=lambda name: methods[name]["gain"])
    panels.append(
        ("methods at the budget, in order of gain", GAIN, [point(name, x) for x, name in enumerate(names)])
    )
    plot(path, panels)


def plot_document(path: Path, reads: dict[str, list[Read]]) -> None:
    """Plot the share of chunks learned from, and the gain, along the document."""
    so_far = lambda values: np.mean(values, 0).cumsum() / np.arange(1, len(values[0]) + 1)
    losses = {name: so_far([read.losses_T for read in some]) for name, some in reads.items()}
    chunks, learned, gains = range(1, len(losses["skip"]) + 1), [], []
    for name in ("base", "update_1", "update_2", "update_4", "loss_threshold", "policy", "oracle"):
        learned.append((name, chunks, so_far([read.actions_T > 0 for read in reads[name]]), {}))
        gains.append((name, chunks, losses["skip"] - losses[name], {}))
    plot(path, [("chunk", "chunks learned from, share so far", learned), ("chunk", f"{GAIN} so far", gains)])


# --- 5. Writing ---------------------------------------------------------------------------------------
KEPT = 0.5  # of what a context taught; all would be too much of its last files
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
    action: str = "skip"  # "policy" or one of FIXED
    seed: int = 0
    samples: int = 1  # of each prompt
    temperature: float = 0.0  # 0: the most likely token
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts to end before


class Row(NamedTuple):
    """A text on its way."""

    tokens: list[int]  # an end of text, the context, the prompt and what was written
    memory: rl.Memory  # with the fast weights
    given: int = 1  # how many tokens come before those written here
    actions: tuple[int, ...] = ()  # taken on its complete chunks
    text: str = ""  # what was written
    ended: bool = False


def take_action(writer: Writer, action: str) -> Writer:
    """Let a writer learn by an action, or be the "base" model. Raises: UserError."""
    there = action in ("base", *FIXED) or (action == "policy" and writer.known)
    require(there, f"--action {action}: take base, {', '.join(FIXED)} or, once trained, policy")
    if action == "base":
        return writer._replace(action="skip", weights=base_weights(writer.weights))
    return writer._replace(action=action)


def begin(writer: Writer, context: Sequence[int] = ()) -> Row:
    """Learn from the tokens of a context; then begin anew from W_0 + KEPT (W - W_0), as fine-tuned weights
    are averaged with those before (Wortsman et al., arXiv 2109.01903)."""
    fast, slow, mesh = writer.spec.fast, writer.weights.slow, writer.spec.mesh
    memory = lm.place(mesh, rl.init_memory(fast, slow))  # as `learn_chunk` returns it: compiled once
    row = learn_from(writer, Row([writer.ends[0]], memory), context)
    kept = jax.tree.map(lambda first, last: first + KEPT * (last - first), slow["start"], row.memory.state.w)
    state = lm.place(mesh, lm.init_state(fast, slow | {"start": kept}))
    return row._replace(memory=row.memory._replace(state=state))


def learn_from(writer: Writer, row: Row, tokens: Iterable[int]) -> Row:
    """Append tokens to a row and learn, as in an episode, from the chunks that they complete."""
    C, tokens = writer.spec.chunk, [*row.tokens, *map(int, tokens)]
    first, chunks = (row.given - 1) // C, (len(tokens) - 1) // C
    row = row._replace(tokens=tokens, given=len(tokens))
    if writer.action == "skip" or chunks == first:
        return row
    env = writer.env._replace(budget=np.float32(writer.env.budget * chunks))
    if writer.action == "policy":
        rule = rl.calibrated_rule(writer.known, "policy", env, chunks)
    else:
        policy = rl.init_policy(jax.random.key(0))
        rule = rl.make_rule(rl.follow, policy, plan_T=FIXED[writer.action], hard=False)
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
    """Read a chunk and learn, as an episode does -> (memory, action)."""
    tokens_S, targets_C, text_U, t, chunks = inputs
    x_SD, normed_SD = lm.run_prefix(spec, weights, tokens_S)
    window = lm.Window(x_SD, targets_C, jnp.where(t == 0, 0, spec.chunk), normed_SD)
    memory, step = rl.read_step(spec, weights, env, rule, memory, rl.Chunk(window, text_U, t, chunks), key)
    return memory, step.action


def write(writer: Writer, start: Row, prompts: Sequence[str], show=lambda rows: None) -> Iterator[list[Row]]:
    """Learn from each prompt, and continue it; `show` sees the rows after every piece of text. Yields: each
    prompt's `Writer.samples` rows."""

    def begin_rows():
        for prompt, tokens in zip(prompts, data.encode(writer.tokenizer, prompts)):
            row = learn_from(writer, start, tokens)
            yield from ((row, zlib.crc32(f"{j} {prompt}".encode())) for j in range(writer.samples))

    waiting, written, parts = begin_rows(), [], lm.for_writing(writer.spec, writer.weights)
    while some := list(islice(waiting, ROWS_AT_ONCE)):
        written += write_rows(writer, parts, *zip(*some), show)
        while len(written) >= writer.samples:
            yield written[: writer.samples]
            del written[: writer.samples]


def write_rows(writer: Writer, parts, rows: Sequence[Row], seeds: Sequence[int], show) -> list[Row]:
    """Write on rows side by side until all have ended, in windows of two chunks that move on when full, with
    `parts` of `lm.for_writing`. What is drawn depends on the writer's seed and the row's own alone."""
    (spec, weights), size = parts, 2 * writer.spec.chunk
    room = min(math.ceil(writer.max_new_tokens / lm.PIECE) * lm.PIECE, writer.spec.chunk)  # to write in
    learned = [row.memory.state.w for row in rows]
    alike = all(w is learned[0] for w in learned)  # samples of one prompt, or nothing was learned from any
    w_B = learned[0] if alike else jax.tree.map(lambda *x: jnp.stack(x), *learned)
    draw = lm.Draw(jax.random.key(writer.seed), np.uint32(seeds), None, np.float32(writer.temperature))
    while True:
        windows = [row.tokens[room - size :] for row in rows]
        lengths = np.int32([len(window) for window in windows])
        width = min(1 << int(max(lengths) - 1).bit_length(), size)  # a power of 2: few programs
        padded = np.int32([window + [0] * (width - len(window)) for window in windows])
        logits_BV, caches_B = lm.prefill(spec, weights, w_B, padded, lengths, size)
        for low in range(0, room, lm.PIECE):
            draw = draw._replace(number_B=np.int32([len(row.tokens) - row.given for row in rows]))
            args = spec, weights, w_B, caches_B, logits_BV, lengths + low, draw
            piece_BP, caches_B, logits_BV = lm.write_piece(*args)  # P = PIECE
            pieces = [piece[: room - low] for piece in piece_BP.tolist()]
            rows = [row if row.ended else append_piece(writer, row, x) for row, x in zip(rows, pieces)]
            show(rows)
            if all(row.ended for row in rows):
                return rows


def append_piece(writer: Writer, row: Row, piece: list[int]) -> Row:
    """Append what was drawn to a row, up to where its text ends."""
    new = [*row.tokens[row.given :], *piece][: writer.max_new_tokens]
    length = next((i for i, token in enumerate(new) if token in writer.ends), len(new))
    before = row.tokens[max(row.given - 8, 0) : row.given]  # decoded with it, then cut off
    decode = partial(writer.tokenizer.decode, skip_special_tokens=False)
    text = decode(before + new[:length])[len(decode(before)) :]
    stops = [text.find(stop) for stop in writer.stop if stop in text]
    ended = bool(stops) or length < len(new) or len(new) == writer.max_new_tokens
    tokens = row.tokens[: row.given] + new[: length + 1]
    return row._replace(tokens=tokens, text=text[: min(stops, default=None)], ended=ended)


# --- 6. The judge -------------------------------------------------------------------------------------
LIMITS = {"AS": 1 << 30, "FSIZE": 1 << 24, "NOFILE": 256, "NPROC": 64, "CORE": 0}  # of resource.RLIMIT_*


class Verdict(NamedTuple):
    """How an answer fared and why."""

    result: str  # passed, failed, error, timeout, died, output too large
    detail: str = ""  # of passed: what this system left open to the answer


def judge_all(jobs: Iterable[tuple[Problem, str]], workers: int, seconds: int = 10) -> Iterator:
    """Judge answers, `workers` at once, each in a process of its own with so many seconds of CPU time, thrice
    that on the clock. Yields: each job's place and its Verdict."""
    parts = (supervise, run_answer, confine, enter_namespaces, restrict_files)  # the process's program
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
                folder = f"{tempfile.gettempdir()}/judge-{secrets.token_hex(8)}"
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
    """Have an answer run, end all that it started, remove its folder and print the verdict."""
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
    """Run an answer and then its tests in one namespace, and report how that ended."""
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
    """Shut this process off as far as possible, go on in a child's child; return what stays open."""
    libc, root, user = ctypes.CDLL(None), os.getuid() == 0, 61184 + os.getpid() % 4096
    apart = enter_namespaces(libc, folder)
    for _ in range(2):  # the first child is the new namespace's init, which ignores some signals
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the parent
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(code if code >= 0 else 128 - code)
    os.chdir(folder)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    version = restrict_files(libc, [folder, "/dev/shm"] if apart else [folder])
    header, kept = struct.pack("2I", 0x20080522, 0), bytes(24)  # for capset: no capabilities
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
    spaces = ["network", "processes", "disk space", "file modes"]  # which namespaces close
    return ", ".join(spaces * (not apart) + ["files"] * (not version))


def enter_namespaces(libc, folder: str) -> bool:
    """Part from other processes, the network and writable disks; return whether all of it worked."""
    uid, gid = os.getuid(), os.getgid()
    apart = libc.unshare(0x68020000 | (0x10000000 if uid else 0)) == 0  # CLONE_NEWPID, NET, IPC, NS; USER
    for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)  # refused where there is no new user namespace
    read_only, size = struct.pack("4Q", 1, 0, 1 << 18, 0), b"size=64m,nr_inodes=8192,mode=1777"
    apart = apart and libc.syscall(442, -100, b"/", 0x8000, read_only, 32) == 0  # mount_setattr, recursive
    for path in ("/dev/shm", folder) if apart else ():
        apart = libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 6, size) == 0  # MS_NOSUID, MS_NODEV
    return apart


def restrict_files(libc, folders: list[str]) -> int:
    """Give up files but some folders' and Python's; return Landlock's version, 0 for none."""
    version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset
    every = (1 << min(12 + version, 15)) - 1  # rights on files; then TCP, and signals
    rules = libc.syscall(444, struct.pack("3Q", every, 3 * (version > 3), 3 * (version > 5)), 24, 0)
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
    """Say what is closed off from answers. Raises: UserError if none can be judged."""
    trial = Problem("trial", "", (), "", "", "import decimal\nopen('file', 'w').close()"), ""
    require(sys.platform.startswith("linux"), "answers can't be judged here: take Linux")
    _, (result, left) = next(judge_all([trial], 1))
    require(result == "passed", f"answers can't be judged here ({result}: {left}); take another system")
    return f"answers get limits, no network, no files or processes but their own; open here: {left or 'none'}"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Compute 1 - C(n - c, k) / C(n, k), the chance that one of k answers passes (Chen et al. 2021)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


# --- 7. Benchmarks ------------------------------------------------------------------------------------
LINE = 48  # tokens that are written, to hold the next line of a function


def write_answers(writer: Writer, problems, actions: Sequence[str], context: list[int], path: Path) -> None:
    """Have every action answer every problem; what is in answers.jsonl is not made again."""
    done = {(row["action"], row["task_id"]) for row in data.read_lines(path)}
    for action in actions:
        if asked := [p for p in problems if (action, p.task_id) not in done]:
            own = take_action(writer._replace(stop=problems[0].stop), action)
            answers = write(own, begin(own, context), [p.prompt for p in asked])
            for p, rows in zip(asked, tqdm(answers, f"answering, {action}", len(asked), leave=False)):
                texts = [row.text for row in rows]
                data.append_line(path, {"task_id": p.task_id, "action": action, "completions": texts})


def judge_answers(problems, out: Path) -> str:
    """Judge answers.jsonl into verdicts.jsonl -> a table of pass rates."""
    by_id, path = {p.task_id: p for p in problems}, out / "verdicts.jsonl"
    rows = [row for row in data.read_lines(out / "answers.jsonl") if row["task_id"] in by_id]
    require(rows, f"{out}: no answers to judge")
    jobs = [(by_id[row["task_id"]], text) for row in rows for text in row["completions"]]
    judging = tqdm(judge_all(jobs, os.cpu_count() or 1), "judging", len(jobs))
    judged, counts, measured = (verdict for _, verdict in sorted(judging)), Counter(), {}
    path.unlink(missing_ok=True)
    for row in rows:
        task, action = row["task_id"], row["action"]
        verdicts = list(islice(judged, len(row["completions"])))
        data.append_line(path, {"task_id": task, "action": action, "verdicts": verdicts})
        results = [verdict.result for verdict in verdicts]
        counts.update(results)
        for k in (k for k in (1, 10, 100) if k <= len(results)):
            rates = measured.setdefault(action, {}).setdefault(f"pass@{k}", {})
            rates[task] = pass_at_k(len(results), results.count("passed"), k)
    told = ", ".join(f"{n} {result}" for result, n in counts.most_common())
    return save_table(out, measured, "problems", f"{told}; see {path.name}")


def save_table(out: Path, measured: dict, units: str, told: str) -> str:
    """Write benchmark.json and benchmark.md -> the table and what is told."""
    summary, table = paired_table(measured, units)
    data.write_atomic(out / "benchmark.json", (json.dumps(summary, indent=2) + "\n").encode())
    data.write_atomic(out / "benchmark.md", f"# {out.name}\n\n{table}\n\n{told}\n".encode())
    return f"{table}\n{told}"


def run_completion(writer: Writer, tasks: dict[str, tuple], actions: Sequence[str], out: Path) -> str:
    """Learn from each repository's tokens and write its functions' next lines -> a table over repositories
    or, of a single one, over functions."""
    path, writer = out / "answers.jsonl", writer._replace(max_new_tokens=LINE, samples=1)
    for context, functions in tqdm(tasks.values(), "repositories"):
        write_answers(writer, functions, actions, context, path)
    lines = {(row["action"], row["task_id"]): row["completions"][0] for row in data.read_lines(path)}
    measured = {action: {"exact": {}, "similarity": {}} for action in actions}
    for action, found in measured.items():
        for repo, (_, functions) in tasks.items():
            near = {p.task_id: compare_lines(lines[action, p.task_id], p.reference) for p in functions}
            if len(tasks) > 1:
                near = {repo: np.mean(list(near.values()), 0)}
            for unit in near:
                found["exact"][unit], found["similarity"][unit] = near[unit]
    units = "repositories" if len(tasks) > 1 else "functions"
    return save_table(out, measured, units, "similarity: Python's difflib")


def compare_lines(ours: str, theirs: str) -> tuple[float, float]:
    """Compare the first lines of two texts -> (same but for spaces, similarity)."""
    ours, theirs = (text.strip().partition("\n")[0].strip() for text in (ours, theirs))
    exact = float(ours.split() == theirs.split())
    return exact, SequenceMatcher(None, ours, theirs, autojunk=False).ratio()


if __name__ == "__main__":  # `python eval.py ...` is `python ponder.py ...`
    sys.modules["eval"] = sys.modules["__main__"]  # so that this file is run once
    import ponder

    ponder.main()
