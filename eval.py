"""What a policy must beat, and how it is measured.

Every method reads the same documents, from repositories that no training stage saw, under the same
hard budget; its loss on a chunk is always taken before it learns from that chunk.

    gain             loss(SKIP) - loss(method), the same parameters that never learn
    oracle recovery  gain(method) / gain(oracle)
    cost             `nominal` and `flops`, per chunk, SKIP = 1; seconds are measured

Intervals are 95 % bootstrap intervals over repositories: chunks of one document, and documents of
one repository, are not independent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import lax

import model as lm
import rl

FIXED = {"skip": 0, "update_1": 1, "update_2": 2, "update_4": 3}
LABELS = {
    "base": "base model, no adapters", "skip": "SKIP", "update_1": "UPDATE_1 everywhere", "update_2": "UPDATE_2 everywhere",
    "update_4": "UPDATE_4 everywhere", "every_n": "every n-th chunk", "front_loaded": "first chunks", "random": "random chunks",
    "loss_threshold": "where the loss is high", "policy": "learned policy", "oracle": "oracle (best chunks in hindsight)",
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


class Read(NamedTuple):
    """One document read by one method."""

    losses_T: np.ndarray
    actions_T: np.ndarray
    seconds: float  # whole document, frozen prefix included


class Tokens(NamedTuple):
    """A document as text: its tokens and what is computed from them alone."""

    repo: str
    tokens: np.ndarray
    text_TU: np.ndarray


def timed(function: Callable, *args) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


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


def run_rule(setup: Setup, document: rl.Document, rule: rl.Rule, key, credit: bool = False) -> rl.Step:
    return rl.run_episode(setup.model, setup.fast, setup.upper, setup.slow, setup.env, document, rule, key, credit=credit)


SHARES = (0.4, 0.5, 0.6, 0.7, 0.85, 1.0)  # of the chunks, that a gate or the policy would update without a budget


def calibrate(setup: Setup, documents: list[rl.Document], policy: rl.Policy) -> dict[str, float]:
    """Which of SHARES has the lowest loss on validation documents under the hard budget, as the
    threshold on the loss above which a gate updates, and as the price at which the policy's best
    actions are taken."""
    chunks, costs = documents[0].skip_T.shape[0], setup.env.costs_A
    action, _ = affordable_updates(costs, float(setup.env.budget), chunks)
    gate = lambda x: rl.make_rule(chunks, policy, feature="loss", threshold=x, action=action)
    best = lambda x: rl.make_rule(chunks, policy, price=x)
    loss = lambda rule: np.mean([run_rule(setup, d, rule, jax.random.key(0)).loss.mean() for d in documents])

    # Above this price the policy's best action is SKIP.
    plan = schedules(costs, float(setup.env.budget), chunks, 0)["every_n"]
    seen = [run_rule(setup, d, rl.make_rule(chunks, policy, plan=plan), jax.random.key(0)).features_U for d in documents]
    logits = rl.apply_policy(policy, jnp.concatenate(seen)).logits_A
    highest = ((logits[:, 1:] - logits[:, :1]) / (costs[1:] - costs[0])).max(1)
    found = {}
    for name, rule, values in (("loss_threshold", gate, np.concatenate([d.skip_T for d in documents])), ("policy_price", best, highest)):
        grid = [float(np.quantile(values, 1 - share)) - 1e-3 for share in SHARES]
        found[name] = min(grid, key=lambda x: loss(rule(x)))
    return found


# --- 2. The oracle ------------------------------------------------------------------------------


def oracle_plan(setup: Setup, document: rl.Document) -> np.ndarray:
    """The plan (T,) that spends the budget on the chunks which, when every chunk was learned from,
    gave most to the rest of the document. It has seen the whole document: a bound, not a method
    (`evaluate` takes the best of it and the blind schedules)."""
    chunks = document.skip_T.shape[0]
    action, count = affordable_updates(setup.env.costs_A, float(setup.env.budget), chunks)
    everywhere = rl.make_rule(chunks, rl.init_policy(jax.random.key(0)), plan=action, hard=False)
    steps = run_rule(setup, document, everywhere, jax.random.key(0), credit=True)
    best = np.argsort(-np.asarray(rl.rewards(steps.credit_T)), kind="stable")[:count]
    return np.where(np.isin(np.arange(chunks), best), action, 0)


# --- 3. Reading documents with every method -------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1))
def base_losses(model, fast, upper, windows: lm.Window):
    """The raw model, without adapters -> (T,)"""
    return lax.map(lambda w: lm.predict(model, fast, upper, {}, None, w).loss, windows)


@partial(jax.jit, static_argnums=(0, 1, 2))
def prefix_windows(model, fast, chunk: int, lower, upper, tokens) -> lm.Window:
    """The frozen prefix of a whole document."""
    return lm.windows(model, fast, lower, upper, tokens, chunk)


def prepare(setup: Setup, text: Tokens) -> tuple[rl.Document, rl.Step]:
    args = (setup.lower, setup.upper, setup.slow, setup.env, jnp.asarray(text.tokens), jnp.asarray(text.text_TU))
    return rl.prepare(setup.model, setup.fast, setup.chunk, *args)


def evaluate(
    setup: Setup,
    texts: list[Tokens],
    policy: rl.Policy,
    calibration: dict[str, float],
    seed: int,
    progress: Callable[[Iterable, str], Iterable],
) -> dict[str, list[Read]]:
    """Read every document with every method, in random order -> {method: [Read of each document]}"""
    budget, chunks = float(setup.env.budget), (len(texts[0].tokens) - 1) // setup.chunk
    action, _ = affordable_updates(setup.env.costs_A, budget, chunks)
    make = partial(rl.make_rule, chunks, policy)
    always = {name: make(plan=a, hard=False) for name, a in FIXED.items()}
    always["loss_threshold"] = make(feature="loss", threshold=calibration["loss_threshold"], action=action)
    always["policy"] = make(price=calibration["policy_price"])
    reads: dict[str, list[Read]] = {}
    prefix_seconds = 0.0
    for i, text in enumerate(progress(texts, "test documents")):
        document, _ = prepare(setup, text)
        plans = schedules(setup.env.costs_A, budget, chunks, (seed, i)) | {"oracle": oracle_plan(setup, document)}
        rules = always | {name: make(plan=plan) for name, plan in plans.items()}

        def read(name: str):  # -> (losses (T,), actions (T,))
            if name == "base":
                return base_losses(setup.model, setup.fast, setup.upper, document.windows), np.zeros(chunks, int)
            steps = run_rule(setup, document, rules[name], jax.random.key(seed))
            return steps.loss, steps.action

        if i == 0:  # compile before the first clock starts
            prefix = partial(prefix_windows, setup.model, setup.fast, setup.chunk, setup.lower, setup.upper, jnp.asarray(text.tokens))
            jax.block_until_ready((read("skip"), read("base"), prefix()))
            prefix_seconds = float(np.median([timed(prefix)[1] for _ in range(3)]))
        for name in np.random.default_rng((seed, i)).permutation(["base", *rules]).tolist():
            (losses, actions), seconds = timed(read, name)
            reads.setdefault(name, []).append(Read(np.asarray(losses), np.asarray(actions), seconds + prefix_seconds))
        reads["oracle"][-1] = min((reads[name][-1] for name in plans), key=lambda r: r.losses_T.mean())
    return reads


# --- 4. Statistics --------------------------------------------------------------------------------


def per_repository(repos: list[str], values: np.ndarray) -> np.ndarray:
    """Means of (documents,) values over each repository -> (repositories,)"""
    names = np.asarray(repos)
    return np.asarray([values[names == name].mean() for name in dict.fromkeys(repos)])


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 2
    ci = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return [float(ci.low), float(ci.high)]


def summarise(setup: Setup, texts: list[Tokens], reads: dict[str, list[Read]]) -> dict[str, dict[str, Any]]:
    """results.json's `methods`: means over repositories with their intervals, costs per chunk."""
    repos = [t.repo for t in texts]
    loss = {name: per_repository(repos, np.asarray([r.losses_T.mean() for r in rs])) for name, rs in reads.items()}
    oracle_gain = (loss["skip"] - loss["oracle"]).mean()
    methods = {}
    for name in (name for name in LABELS if name in reads):
        rs = reads[name]
        actions = np.stack([r.actions_T for r in rs])
        over_repos = lambda x: float(per_repository(repos, x).mean())
        gain = loss["skip"] - loss[name]
        methods[name] = {
            "loss": float(loss[name].mean()),
            "loss_ci": interval(loss[name]),
            "gain": float(gain.mean()),
            "gain_ci": interval(gain),
            "gain_over_base": float((loss["base"] - loss[name]).mean()),
            "cost_nominal": over_repos(np.asarray(rl.NOMINAL)[actions].mean(1)),
            "cost_flops": over_repos(setup.flops_A[actions].mean(1)),
            "seconds": over_repos(np.asarray([r.seconds for r in rs]) / actions.shape[1]),
            "update_rate": over_repos((actions > 0).mean(1)),
            "oracle_recovery": float(gain.mean() / oracle_gain) if oracle_gain > 0 else None,
        }
    return methods


def frontier(methods: dict[str, dict[str, Any]], unit: str) -> list[str]:
    """The methods that no other one beats at its cost or less (the oracle, no method, left out),
    from the cheapest on."""
    cost = lambda name: (methods[name][f"cost_{unit}"], -methods[name]["gain"])
    best: list[str] = []
    for name in sorted((n for n in methods if n not in ("oracle", "base")), key=cost):
        if not best or methods[name]["gain"] > methods[best[-1]]["gain"]:
            best.append(name)
    return best


def compare(texts: list[Tokens], reads: dict[str, list[Read]], method: str, other: str) -> dict[str, Any]:
    """Paired over repositories: how much lower `method`'s loss is than `other`'s, with its interval."""
    repos = [t.repo for t in texts]
    difference = np.asarray([o.losses_T.mean() - m.losses_T.mean() for m, o in zip(reads[method], reads[other], strict=True)])
    values = per_repository(repos, difference)
    return {"difference": float(values.mean()), "ci": interval(values), "better_on": float((values > 0).mean())}


# --- 5. Plots -------------------------------------------------------------------------------------

# Okabe and Ito's colour-blind-safe palette.
COLOURS = {
    "base": "#999999", "skip": "#000000", "update_1": "#000000", "update_2": "#000000", "update_4": "#000000", "every_n": "#56B4E9",
    "front_loaded": "#CC79A7", "random": "#F0E442", "loss_threshold": "#009E73", "policy": "#D55E00", "oracle": "#0072B2",
}  # fmt: skip
MARKERS = dict(zip(LABELS, "_o^sDvP*Xo*", strict=True))


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


def plot_pareto(path: Path, methods: dict[str, dict[str, Any]], budget_per_chunk: float, currency: str) -> None:
    """Gain over SKIP against cost, with intervals over repositories; one panel for each currency."""
    fig, axes = figure(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, unit in zip(axes, ("nominal", "flops"), strict=True):
        cost = {name: m[f"cost_{unit}"] for name, m in methods.items()}
        best = frontier(methods, unit)
        axis.plot([cost[n] for n in best], [methods[n]["gain"] for n in best], color="#bbbbbb", zorder=1, label="Pareto frontier")
        for name, m in methods.items():
            errors = [[m["gain"] - m["gain_ci"][0]], [m["gain_ci"][1] - m["gain"]]]
            axis.errorbar(
                cost[name], m["gain"], errors, fmt=MARKERS[name], color=COLOURS[name], label=LABELS[name], markersize=8,
                elinewidth=1, markeredgecolor="black", markeredgewidth=0.5,
            )  # fmt: skip
        if unit == currency:
            axis.axvline(budget_per_chunk, color="#D55E00", linestyle=":", linewidth=1, label="budget")
        axis.set_xlabel({"nominal": "nominal cost per chunk (SKIP = 1)", "flops": "FLOPs per chunk (SKIP = 1)"}[unit])
    axes[0].set_ylabel("gain over SKIP (nats per token)")
    handles, labels = axes[0 if currency == "nominal" else 1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right center", fontsize=9)
    save_figure(fig, path)


def plot_timeline(path: Path, texts: list[Tokens], reads: dict[str, list[Read]], count: int = 3) -> None:
    """What each method did on a few documents, and the losses it led to."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = [n for n in ("every_n", "loss_threshold", "policy", "oracle") if n in reads]
    shown = list(range(min(count, len(texts))))
    fig, axes = figure(2, len(shown), figsize=(4.2 * len(shown) + 1.6, 5.2), height_ratios=[1, 1.6], sharex="col", squeeze=False)
    colours = ["#f0f0f0", "#56B4E9", "#0072B2", "#08306b"]
    for column, i in enumerate(shown):
        grid = np.stack([reads[name][i].actions_T for name in rows])
        top, bottom = axes[:, column]
        edges = np.arange(grid.shape[1] + 1) - 0.5
        top.pcolormesh(edges, np.arange(len(rows) + 1), grid, cmap=ListedColormap(colours), vmin=0, vmax=3, edgecolors="white", linewidth=1)
        top.set_yticks(np.arange(len(rows)) + 0.5, [LABELS[n].split(" (")[0] for n in rows] if column == 0 else [""] * len(rows))
        top.invert_yaxis()
        top.grid(False)
        top.set_title(texts[i].repo, fontsize=10)
        for name, style in (("skip", ":"), ("update_1", "--"), ("policy", "-")):
            bottom.plot(reads[name][i].losses_T, style, color=COLOURS[name], label=LABELS[name], linewidth=1.4)
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


# --- 6. Report ------------------------------------------------------------------------------------


def verdict(results: dict[str, Any], comparisons: dict[str, dict[str, Any]]) -> str:
    """One sentence: what was found, whichever way it went."""
    policy, full = results["methods"]["policy"], results["methods"]["update_1"]
    where = f"On {results['repositories']} repositories {results['unseen']}"
    if full["gain_ci"][0] <= 0:
        found = f"gain {full['gain']:.3f} nats per token, interval {spell(full['gain_ci'])}"
        return f"{where}, learning from every chunk (UPDATE_1) did not reliably beat never learning: {found}."
    kept = (
        f"kept {policy['gain'] / full['gain']:.0%} of UPDATE_1's gain over SKIP ({policy['gain']:.3f} of {full['gain']:.3f} nats per token)"
    )
    share = {unit: policy[f"cost_{unit}"] / full[f"cost_{unit}"] for unit in ("nominal", "flops")}
    cost = f"at {share['nominal']:.0%} of its nominal cost ({share['flops']:.0%} of its FLOPs)"
    return f"{where}, the learned policy {kept} {cost}; at the same budget it was {'; '.join(map(against, comparisons.items()))}."


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
)


def table(methods: dict[str, dict[str, Any]]) -> str:
    """results.json's `methods` as a Markdown table."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for name in LABELS:
        m = methods[name]
        recovery = "" if m["oracle_recovery"] is None else f"{m['oracle_recovery']:.2f}"
        gain = f"{m['gain']:+.4f} {spell(m['gain_ci'])}"
        costs = [f"{m['cost_nominal']:.2f}", f"{m['cost_flops']:.2f}", f"{m['seconds']:.4f}", f"{m['update_rate']:.0%}"]
        rows.append([LABELS[name], f"{m['loss']:.4f}", gain, f"{m['gain_over_base']:+.4f}", *costs, recovery])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


REPORT = """# PonderTTT: {scale} on {data}

{sentence}

{documents} documents of {chunks_per_document} chunks from {repositories} repositories; budget {budget:g} per document \
({budget_per_chunk:.3g} per chunk, {cost_model}). Gains are over SKIP, the same parameters that never learn; intervals are \
95 % bootstrap intervals over repositories; seconds include the frozen prefix, each document timed once, methods in random order.

{table}

How much lower the policy's loss is at the same budget, paired over repositories (nats per token):

{paired}

## Cost and gain

![Gain over SKIP against cost](pareto.png)

## What was decided

![Actions and losses of a few documents](timeline.png)
{training}
## What was run

{facts}
"""


def write_report(out: Path, results: dict[str, Any], comparisons: dict[str, dict[str, Any]], facts: list[str], trained: bool) -> str:
    """report.md: the verdict, the table, the plots, what was run. -> the verdict"""
    sentence = verdict(results, comparisons)
    paired = [
        f"- {LABELS[name]}: {c['difference']:+.4f} {spell(c['ci'])}, lower on {c['better_on']:.0%} of the repositories"
        for name, c in comparisons.items()
    ]
    text = REPORT.format(
        **results,
        sentence=sentence,
        table=table(results["methods"]),
        paired="\n".join(paired),
        training="\n## Training\n\n![Cost and multiplier over training](training.png)\n" if trained else "",
        facts="\n".join(f"- {fact}" for fact in facts),
    )
    lm.write_atomic(out / "report.md", text.encode())
    return sentence
