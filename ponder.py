"""PonderTTT: a frozen code model learns while it reads, and a policy decides when.

    python ponder.py                  the whole method on this machine, offline, on the standard library
    python ponder.py --data FOLDER    the same on your own repositories; of one, which files it helps
    python ponder.py --stage eval     a quick evaluation, with the trained weights of assets/tiny

The method, for a document of chunks, each read after the one before:
    1. ttt      meta-learn the start W_0 and the step sizes of the fast weights, so that a few gradient steps
                on what was read lower the loss of what comes                              (`learn_start`)
    2. policy   learn for which chunks such steps are worth their cost, under a budget: a warm start by
                regression, then PPO with a PID-controlled multiplier                      (`learn_policies`)
    3. eval     read repositories that no stage saw with every method, at one budget     (`evaluate_methods`)
Each chunk is predicted, then decided about, then learned from. Equations are in model.py (learning) and
rl.py (deciding); this file has the settings, the stages as they run, and then the plumbing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import resource
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
import tyro
from jax.experimental import multihost_utils
from tqdm import tqdm

import data
import eval as evaluation
import model as lm
import rl
from data import ASSETS, UserError, require

# --- 1. Settings ------------------------------------------------------------------------------------

Stage = Literal["all", "ttt", "policy", "eval", "compare"]
Size = Literal["tiny", "125m", "350m", "1b", "xl"]
Group = Literal["confidence", "activation", "attention", "code", "history", "sequence", "ahead"]
Kind = Literal["swiglu", "linear", "lora"]
Objective = Literal["next_token", "reconstruction"]
Action = Literal["policy", "base", "skip", "update_1", "update_2", "update_4"]
Benchmark = Literal["completion", "humaneval", "mbpp", "mbpp-test", "classeval", "classeval-methods"]


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings. What is left out comes from --scale, or from the weights that are used."""

    stage: Stage = "all"  # What to run; all is ttt, policy and eval.
    scale: Size = "tiny"  # Base model and sizes: tiny runs on any laptop, the others on a GPU or TPU.
    base: str | None = None  # Folder or hub name of a GPT-2, GPT-NeoX or Llama-type model, not the scale's.
    out: Path | None = None  # The run's folder; left out: a new one under runs/.
    resume: bool = False  # Continue the run in --out, or the newest under runs/.
    weights: str | None = None  # A run's folder with trained weights to use, or none: train all of them here.
    seed: int = 0  # Of everything random.
    seeds: int = 1  # How many policies to train, from --seed on; the evaluation is over all of them.
    runs: tuple[Path, ...] = ()  # Of --stage compare: folders of finished runs, compared with the first.

    data: str | None = None  # stdlib, a folder, stack, stack-v2, hub:NAME[@REVISION], a .parquet or .jsonl.
    files: Literal["code", "all"] = "code"  # Of a folder: its code, or all that is text.
    subset: str | None = None  # Of a dataset: a configuration, or one of its folders, such as data/rust.
    text_column: str | None = None  # Of a dataset: the column with the text, if its name isn't a usual one.

    budget: float | None = None  # Cost of a document, SKIP = 1 a chunk; left out: half of UPDATE_1's.
    cost: Literal["nominal", "flops"] = "nominal"  # The budget's currency: 1, 3, 6, 12, or compiled FLOPs.
    frontier: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)  # Other budgets, as shares of UPDATE_1's.
    features: tuple[Group, ...] = rl.DEFAULT_GROUPS  # What the policy sees; ahead counts the text to come.

    fast: Kind | None = None  # What the fast weights are; left out: swiglu.
    fast_blocks: tuple[int, ...] = ()  # Blocks that carry them, -1 is the last; left out: the last quarter.
    hidden: int | None = None  # Width of a swiglu adapter, rank of a lora one.
    objective: Objective | None = None  # Their inner loss; left out: next_token.
    inner_optimizer: Literal["muon", "sgd"] | None = None  # Orthogonalised or clipped steps; left out: muon.
    momentum: float | None = None  # Of inner steps; left out: 0.3.

    chunks: int = 24  # Chunks of a document.
    chunk: int | None = None  # Tokens of a chunk.
    batch: int | None = None  # Documents of an outer step or PPO iteration, a multiple of the devices.
    train_documents: int | None = None  # Documents that policies are trained on.
    valid_documents: int = 6  # Documents that gates and policies are calibrated on.
    test_documents: int | None = None  # Documents of the evaluation, or a benchmark's problems.
    meta_steps: int | None = None  # Outer steps of meta-learning.
    iterations: int | None = None  # PPO iterations.

    dtype: Literal["float32", "bfloat16"] | None = None  # Of products; left out: what the hardware does fast.
    mesh_shape: str | None = None  # Devices as DATA,FSDP: documents over all, frozen blocks split over FSDP.
    hosts: str | None = None  # Several hosts: auto (TPU pods, Slurm) or HOST:PORT,COUNT,INDEX.
    check_devices: bool = False  # Check that these devices compute what one does: PASS, or a reason.

    generate: bool = False  # Write: continue --prompt, having learned from it and from --context.
    prompt: str | None = None  # The text to continue.
    context: Path | None = None  # A folder; its first --chunks chunks are learned from before the prompt.
    action: tuple[Action, ...] = ()  # Taken on every chunk; benchmarks compare several with the first.
    temperature: float | None = None  # 0: the most likely tokens. Left out: 0, or 0.8 for several --samples.
    max_new_tokens: int = 128  # Tokens written at most.
    samples: int = 1  # Texts for each prompt.
    benchmark: Benchmark | None = None  # Complete functions of --data, or solve a benchmark's problems.
    benchmark_file: Path | None = None  # The benchmark's own file, not the hub's.
    solutions: str | None = None  # Judge a file of {"task_id", "completion"} lines, or reference: its own.
    allow_code_execution: bool = False  # Needed to judge: answers are run, confined without a guarantee.


class Scale(NamedTuple):
    """What a --scale stands for, where no option says otherwise."""

    base: str
    chunk: int
    hidden: int  # width of a swiglu adapter
    rank: int  # of a lora one
    batch: int
    train_documents: int
    test_documents: int
    meta_steps: int
    iterations: int


SCALES = {
    "tiny": Scale(str(ASSETS / "tiny"), 256, 256, 16, 8, 120, 12, 100, 6),
    "125m": Scale("gpt2", 512, 768, 64, 8, 5000, 100, 2000, 625),
    "350m": Scale("gpt2-medium", 512, 1024, 128, 4, 10000, 100, 2000, 2500),
    "1b": Scale("gpt2-large", 512, 1280, 256, 2, 20000, 100, 2000, 10000),
    "xl": Scale("gpt2-xl", 512, 1600, 256, 2, 20000, 100, 2000, 10000),
}
QUICK, WHOLE = 6, 24  # test documents at tiny: of --stage eval alone, and of one's own repository
META_CHUNKS = 24  # of a document in meta-learning, at most
TEACHER_DOCUMENTS = 64  # read for the policy's warm start, at most


class Run(NamedTuple):
    """What the stages share."""

    cfg: Config
    out: Path
    spec: lm.Spec
    weights: lm.Weights
    env: rl.Env
    flops_A: np.ndarray  # of the actions, relative to SKIP
    tokenizer: Any
    ends: tuple[int, ...]  # tokens that end a text
    texts: dict[str, list[data.Excerpt]]  # what the stages read: meta, meta_valid, train, valid, test
    trained: Path | None  # where the trained fast weights are from; None: this run


# --- 2. The stages as they run ----------------------------------------------------------------------


def run_stages(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Meta-learn, train policies, evaluate: what --stage asks for."""
    started, skipped = time.perf_counter(), Counter()
    cfg = fill_in(cfg, mesh.size)
    out = choose_folder(cfg)
    run = open_run(cfg, out, mesh, skipped)
    policies = load_policies(run) if cfg.stage == "eval" else []
    run = run._replace(out=claim_folder(cfg, out))
    facts = describe(run, skipped)
    print(
        "\n  ".join([f"PonderTTT: {cfg.base or cfg.scale} on {cfg.data}; run folder {run.out}", *facts]),
        flush=True,
    )

    if not run.trained:
        run = run._replace(weights=run.weights._replace(slow=learn_start(run)))
    elif run.trained != run.out:  # a run's folder is whole, for --weights
        save_state(run.out / "ttt.safetensors", run.weights.slow, **learner(run.spec, run.weights))
    if cfg.stage in ("all", "policy"):
        policies = learn_policies(run)
    if cfg.stage in ("all", "eval"):
        print(evaluate_methods(run, policies, facts, started))
        print(f"report: {run.out / 'report.md'}")


# --- 3. Stage ttt: meta-learn how to learn ----------------------------------------------------------

META_RATE, STEP_RATE = 2e-3, 2e-2  # Adam's, for W_0 and for the logarithms of the step sizes


def learn_start(run: Run) -> Any:
    """Meta-learn W_0 and the step sizes through the unrolled inner steps -> slow parameters."""
    cfg, spec, weights = run.cfg, run.spec, run.weights
    state, step = (weights.slow, meta_optimizer(cfg.meta_steps).init(weights.slow)), 0
    checkpoint = run.out / "ttt_state.safetensors"
    if cfg.resume and checkpoint.exists():
        state, meta = load_state(checkpoint, state)
        step = meta["step"]
    slow, opt_state = lm.place(spec.mesh, state)
    log, documents = Log(run.out, "ttt", step), np.stack([x.tokens for x in run.texts["meta"]])
    groups = evaluation.group_documents(spec, run.texts["meta_valid"])
    tokens_of = lambda group: evaluation.pad_rows([x.tokens for x in group], spec.mesh.size)
    place = partial(lm.place, spec.mesh, spec=lm.ROWS)
    valid = [(evaluation.run_prefixes(spec, weights, place(tokens_of(g))), len(g)) for g in groups]
    bar = progress(total=cfg.meta_steps, initial=step, desc="ttt", unit="step")
    while True:
        if step % 20 == 0 or step == cfg.meta_steps:
            learned = weights._replace(slow=slow)
            losses = {
                name: valid_loss(spec, learned, valid, action) for name, action in evaluation.FIXED.items()
            }
            if not log.rows or "valid_skip" not in log.rows[-1]:  # a checkpoint's step has its line already
                log.add(step, {f"valid_{name}": loss for name, loss in losses.items()})
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
            save_state(checkpoint, (slow, opt_state), step=step)
        if step >= cfg.meta_steps:
            break
        rng = np.random.default_rng((cfg.seed, 1, step))
        rows = rng.choice(len(documents), cfg.batch, replace=len(documents) < cfg.batch)
        actions = random_actions(rng, cfg.batch, documents.shape[1] // cfg.chunk)
        batch = place((documents[rows], actions))
        slow, opt_state, loss, norm = meta_step(spec, cfg.meta_steps, weights, slow, opt_state, batch)
        step += 1
        log.add(step, {"loss": loss, "gradient_norm": norm, "dropped": opt_state.total_notfinite})
        bar.update()
    bar.close()
    save_state(run.out / "ttt.safetensors", slow, **learner(spec, weights))
    return slow


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def meta_step(spec: lm.Spec, steps: int, weights: lm.Weights, slow, opt_state, batch):
    """One outer step of `steps` -> (slow parameters, state of the optimiser, loss, norm of the gradient)."""
    loss, grads = meta_gradient(spec, weights._replace(slow=slow), batch)
    updates, opt_state = meta_optimizer(steps).update(grads, opt_state, slow)
    return optax.apply_updates(slow, updates), opt_state, loss, optax.tree.norm(grads)


def meta_gradient(spec: lm.Spec, weights: lm.Weights, batch):
    """The mean loss of a batch of documents, tokens (B, T*C + 1) read with actions (B, T), and its gradient
    in `weights.slow`; both whole on every device."""

    def read(weights, inputs):
        tokens, actions = inputs
        windows = lm.make_windows(spec, weights, tokens)
        objective = lambda slow: lm.document_loss(spec, weights._replace(slow=slow), windows, actions)[0]
        return jax.value_and_grad(objective)(weights.slow)

    def device(weights, _, batch):
        found = jax.lax.map(partial(read, weights), batch)
        return jax.lax.pmean(jax.tree.map(lambda x: x.mean(0), found), lm.AXES)

    return lm.on_devices(spec.mesh, device, weights, (), batch, lm.WHOLE)


def meta_optimizer(steps: int) -> optax.GradientTransformation:
    """Adam; a step whose gradient is not finite is dropped, and counted in `total_notfinite`."""
    adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, max(steps, 1), alpha=0.05), b2=0.99)
    kind = lambda name: "steps" if name == "log_step" else "weights"
    label = lambda slow: {name: jax.tree.map(lambda _: kind(name), x) for name, x in slow.items()}
    both = optax.multi_transform({"steps": adam(STEP_RATE), "weights": adam(META_RATE)}, label)
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), both), 2**30)


def random_actions(rng: np.random.Generator, documents: int, chunks: int) -> np.ndarray:
    """Actions (documents, chunks), each document with a mix of its own: from one action nearly everywhere, as
    in the fixed schedules, to all of them alike."""
    mixes = rng.dirichlet(np.full(len(rl.ACTIONS), 0.5), documents)
    return np.stack([rng.choice(len(rl.ACTIONS), chunks, p=mix) for mix in mixes]).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def fixed_loss(spec: lm.Spec, weights: lm.Weights, windows_N, action):
    """Mean losses (N,), nats per token, of documents, one on each device, under one action for all chunks."""

    def device(weights, action, windows_N):
        actions = jnp.broadcast_to(action, windows_N.targets_C.shape[1])
        return jax.lax.map(lambda windows: lm.document_loss(spec, weights, windows, actions)[0], windows_N)

    return lm.on_devices(spec.mesh, device, weights, action, windows_N)


def valid_loss(spec: lm.Spec, weights: lm.Weights, groups: list[tuple[lm.Window, int]], action: int) -> float:
    """Mean of `fixed_loss` over groups of documents, each with its size: the last group is filled up."""
    found = [evaluation.fetch(fixed_loss(spec, weights, x, np.int32(action)))[:count] for x, count in groups]
    return float(np.concatenate(found).mean())


# --- 4. Stage policy: learn when to learn -----------------------------------------------------------


def learn_policies(run: Run) -> list[rl.Calibrated]:
    """Train a policy for each seed, then calibrate them on validation documents.
    What the warm starts learn from is read once for all seeds."""
    cfg, lessons, policies = run.cfg, None, []
    for i in range(cfg.seeds):
        if lessons is None and not (
            cfg.resume and (run.out / f"{policy_name(i)}_state.safetensors").exists()
        ):
            blind, places = new_trainer(run, 0).policy, range(0, teacher_documents(cfg), cfg.batch)
            bar = progress(places, "warm start", unit="batch")
            seen = [read_batch(run, place, blind, (cfg.seed, 4, place)) for place in bar]
            lessons = jax.tree.map(lambda *x: jnp.concatenate(x), *seen)
        policies.append(train_policy(run, i, lessons))
    found = calibrate_policies(run, policies)
    for i, known in enumerate(found):
        save_state(run.out / f"{policy_name(i)}.safetensors", known, terms=terms(cfg))
    return found


def train_policy(run: Run, i: int, lessons: Any) -> rl.Policy:
    """Train the i-th seed's policy: a warm start (a checkpoint to resume needs none), then PPO under the
    budget."""
    cfg, env, ppo = run.cfg, run.env, ppo_of(run.cfg)
    key, trainer = jax.random.fold_in(jax.random.key(cfg.seed + i), 3), new_trainer(run, i)
    checkpoint = run.out / f"{policy_name(i)}_state.safetensors"
    if cfg.resume and checkpoint.exists():
        trainer = lm.place(run.spec.mesh, load_state(checkpoint, trainer)[0])
    else:
        steps, rewards = lessons
        trainer, error = rl.teach(ppo, steps, rewards, trainer, key)
        figures = {"unexplained": error, "gain": rewards.mean(), "cost": steps.cost.mean()}
        Log(run.out, f"{policy_name(i)}_warm_start", -1).add(0, figures)
        save_state(checkpoint, trainer)
    log = Log(run.out, policy_name(i), int(trainer.iteration))
    bar = progress(
        total=cfg.iterations, initial=int(trainer.iteration), desc=policy_name(i), unit="iteration"
    )
    while (step := int(trainer.iteration)) < cfg.iterations:
        place = -(-teacher_documents(cfg) // cfg.batch) * cfg.batch + (i * cfg.iterations + step) * cfg.batch
        steps, rewards = read_batch(run, place, trainer.policy, (cfg.seed, 3, i, step))
        own_key = jax.random.fold_in(key, 1 + step)
        trainer, figures = rl.train_iteration(ppo, env, steps, rewards, trainer, own_key)
        figures = {k: float(v) for k, v in figures.items()} | {
            "dropped_documents": float(cfg.batch - len(rewards))
        }
        log.add(step + 1, figures)
        save_state(checkpoint, trainer)
        bar.set_postfix({k: f"{figures[k]:.3f}" for k in ("loss", "gain", "cost", "lambda")})
        bar.update()
    bar.close()
    return trainer.policy


def read_batch(run: Run, place: int, policy: rl.Policy, seed: tuple[int, ...]) -> tuple[rl.Step, Any]:
    """Roll the policy out on the --batch training documents from `place` on -> (steps, rewards).
    Each document is read before any is read again. Those in which learning ran away are left out: one would
    make the whole batch NaN. Raises: UserError if none is left."""
    cfg, texts = run.cfg, run.texts["train"]
    order = lambda epoch: np.random.default_rng((cfg.seed, 2, epoch)).permutation(len(texts))
    chosen = [texts[order(p // len(texts))[p % len(texts)]] for p in range(place, place + cfg.batch)]
    arrays = np.stack([x.tokens for x in chosen]), np.stack([x.text_TU for x in chosen])
    documents = lm.place(run.spec.mesh, arrays, lm.ROWS)
    key = jax.random.key(int(np.random.default_rng(seed).integers(2**31)))
    steps, rewards = rl.rollout(
        run.spec, run.weights, run.env, documents, policy, key, credit=ppo_of(cfg).credit
    )
    keep = np.isfinite(np.asarray(rewards)).all(1) & np.isfinite(np.asarray(steps.features_U)).all((1, 2))
    require(
        keep.any(),
        "no loss of a batch was finite: the fast weights ran away; learn them anew: --weights none",
    )
    return (steps, rewards) if keep.all() else jax.tree.map(lambda x: x[keep], (steps, rewards))


def ppo_of(cfg: Config) -> rl.Ppo:
    """The hyperparameters of PPO: rewards come from eight chunks of each document, whatever its length."""
    return rl.Ppo(credit=max(cfg.chunks // 8, 1))


def new_trainer(run: Run, i: int) -> rl.Trainer:
    """The i-th seed's trainer before any training, on the mesh."""
    key = jax.random.fold_in(jax.random.key(run.cfg.seed + i), 2)
    trainer = rl.init_trainer(key, ppo_of(run.cfg), run.env, run.cfg.chunks, run.cfg.features)
    return lm.place(run.spec.mesh, trainer)


def teacher_documents(cfg: Config) -> int:
    """How many documents the warm start reads, in whole batches."""
    return min(TEACHER_DOCUMENTS, cfg.train_documents)


def policy_name(i: int) -> str:
    """What the i-th seed's files and metrics are called."""
    return f"policy_{i}" if i else "policy"


def calibrate_policies(run: Run, policies: list[rl.Policy]) -> list[rl.Calibrated]:
    """Policies with the quantiles of scores on validation documents; the budget has no part in them."""
    read = (run.spec, run.weights, run.env, policies[0], run.texts["valid"], progress)
    steps = evaluation.read_validation(*read)
    return [rl.calibrate(policy, steps) for policy in policies]


def load_policies(run: Run) -> list[rl.Calibrated]:
    """The policies that belong to the fast weights, calibrated anew if that was on other documents.
    Raises: UserError if there is none, or one is damaged."""
    missing = "--stage eval: no trained policy for these settings; run the other stages first"
    require(run.trained and (run.trained / "policy.safetensors").exists(), missing)
    like = rl.calibrate(rl.init_policy(jax.random.key(0)), empty_steps())
    found: list[tuple[rl.Calibrated, dict[str, Any]]] = []
    while (path := run.trained / f"{policy_name(len(found))}.safetensors").exists():
        found.append(load_state(path, like))
    if all(meta["terms"] == terms(run.cfg) for _, meta in found):
        return [known for known, _ in found]
    return calibrate_policies(run, [known.policy for known, _ in found])


def empty_steps() -> rl.Step:
    """Steps of one chunk, of zeros: for the shapes of what is calibrated."""
    zeros = {name: np.zeros((1, 1)) for name in rl.Step._fields}
    return rl.Step(
        **(zeros | {"features_U": np.zeros((1, 1, len(rl.FEATURES))), "probed": np.zeros((1, 1, 2))})
    )


def terms(cfg: Config) -> str:
    """What policies are calibrated on, in words: saved with them, and compared."""
    part = "".join(
        f", {x}" for x in (cfg.subset, cfg.text_column, cfg.files if cfg.files == "all" else "") if x
    )
    shape = f"{cfg.chunks} chunks of {cfg.chunk} tokens"
    return f"{cfg.valid_documents} documents of {shape} of {training_data(cfg)}{part}"


# --- 5. Stage eval ----------------------------------------------------------------------------------


def evaluate_methods(run: Run, policies: list[rl.Calibrated], facts: list[str], started: float) -> str:
    """Read the test documents with every method: results.json, report.md, plots -> the verdict, one
    sentence."""
    cfg, texts, costs = run.cfg, run.texts["test"], np.asarray(run.env.costs_A, float)
    budgets = [float(np.float32(cfg.chunks * (costs[0] + s * (costs[1] - costs[0])))) for s in cfg.frontier]
    found = evaluation.evaluate(run.spec, run.weights, run.env, texts, policies, budgets, cfg.seed, progress)
    own, budget = data.is_one_repository(cfg.data), float(run.env.budget)
    known = cfg.scale == "tiny" and cfg.base is None and cfg.data == "stdlib"
    results = {
        "scale": cfg.scale,
        "model": cfg.base or cfg.scale,
        "data": cfg.data,
        "chunks_per_document": cfg.chunks,
        "documents": len(texts),
        "repositories": len({x.repo for x in texts}),
        "unit": f"documents of {Path(cfg.data).expanduser().resolve().name}" if own else "repositories",
        "unseen": "that no stage saw"
        if known
        else "that no stage here saw (what the base model read is not known)",
        "budget": budget,
        "budget_per_chunk": budget / cfg.chunks,
        "cost_model": cfg.cost,
        "seeds": len(policies),
        "names": [x.repo for x in texts],
        "looks_ahead": rl.looks_ahead(policies[0].policy),
        "by_file": evaluation.gains_by_file(texts, found.reads, cfg.chunk) if own else [],
    } | evaluation.analyse(found, run.flops_A)
    if jax.process_index():
        return ""
    training = [row for row in read_metrics(run.out / "metrics.jsonl") if row["stage"] == "policy"]
    results["facts"] = [*facts, *measured_facts(run, results["methods"], found.reads, training, started)]
    data.write_atomic(run.out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    return evaluation.write_report(run.out, results, found.reads, training)


def describe(run: Run, skipped: Counter) -> list[str]:
    """What is used in this run, a line each."""
    cfg = run.cfg
    start = (
        os.path.relpath(run.trained) if run.trained else f"meta-learned in this run, {cfg.meta_steps} steps"
    )
    left_out = ", ".join(f"{n} {why}" for why, n in skipped.most_common() if n) or "none"
    facts = [f"fast weights' start and step sizes: {start}"]
    if cfg.stage != "ttt":
        trained = f"trained in this run, {cfg.iterations} iterations"
        policy = os.path.relpath(run.trained) if cfg.stage == "eval" and run.trained else trained
        budget = f"{float(run.env.budget):.6g} {cfg.cost} a document"
        facts.append(f"policy: {policy}; budget {budget}; calibrated on {terms(cfg)}")
    return [*facts, f"files skipped: {left_out}"]


def measured_facts(run: Run, methods, reads, training, started: float) -> list[str]:
    """Facts of the report that are known after the evaluation."""
    share = lambda name, key: methods[name][key] / methods["update_4"][key]
    speed = "{} takes {:.3f} of UPDATE_4's seconds and {:.3f} of its FLOPs".format
    facts = [speed(name, share(name, "seconds"), share(name, "cost_flops")) for name in ("skip", "policy")]
    if late := training[-(len(training) // 2 + 1) :]:
        over = np.mean([row["cost"] for row in late]) / late[-1]["limit"] - 1
        facts.append(f"training cost over the last {len(late)} iterations: {over:+.1%} of the budget")
    ratios = ", ".join(f"{action} {x:.2f}" for action, x in zip(rl.ACTIONS, run.flops_A, strict=True))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )
    rows = read_metrics(run.out / "metrics.jsonl")
    last = {row["stage"]: int(row["dropped"]) for row in rows if "dropped" in row}  # they count up
    documents = int(sum(row.get("dropped_documents", 0) for row in rows))
    inner, outer = sum(read.dropped for some in reads.values() for read in some), sum(last.values())
    seconds = time.perf_counter() - started
    devices = (
        f"{run.spec.mesh.size} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {run.cfg.dtype}"
    )
    return [
        *facts,
        f"FLOPs relative to SKIP: {ratios}",
        f"jax {jax.__version__} on {devices}",
        f"Python {sys.version.split()[0]}, {seconds:.0f} s, peak memory {memory:.2f} GB",
        f"not finite and dropped: {inner} inner, {outer} outer and PPO steps, {documents} documents",
    ]


# --- 6. Writing and benchmarks ----------------------------------------------------------------------


def write_text(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Continue --prompt (--generate), or answer and judge a benchmark."""
    if cfg.benchmark and cfg.benchmark != "completion":
        require(cfg.allow_code_execution, JUDGE_WARNING)
        given = bool(cfg.solutions) + bool(cfg.action)
        require(
            given == 1,
            "--benchmark needs one of --action (write the answers) and --solutions (judge given ones)",
        )
        problems = data.load_problems(cfg.benchmark, cfg.benchmark_file)[: cfg.test_documents]
    require(cfg.benchmark or cfg.prompt is not None, "--generate needs --prompt TEXT")
    require(cfg.context is None or cfg.context.is_dir(), f"--context {cfg.context}: no such folder")
    cfg = fill_in(dataclasses.replace(cfg, stage="eval"), 1)
    out = claim_folder(cfg, choose_folder(cfg)) if cfg.benchmark else Path()
    if cfg.solutions:
        evaluation.copy_solutions(problems, cfg.solutions, out / "answers.jsonl")
    else:
        writer, how = open_writer(dataclasses.replace(cfg, resume=False), mesh)
        source = data.Source(str(cfg.context), cfg.files == "all")
        repos = data.load_repositories(source, (), None, 0, Counter()) if cfg.context else {}
        files = [file for repo in repos.values() for file in repo]
        context = evaluation.first_tokens(writer, files, cfg.chunks)
        if cfg.generate:
            start = evaluation.begin(writer, *(cfg.action or ("policy",))[:1], context)
            evaluation.print_completions(writer, start, cfg.prompt, how)
            return
        if cfg.benchmark == "completion":
            tasks = evaluation.completion_tasks(
                writer, completion_repositories(cfg, writer), cfg.chunks, cfg.test_documents
            )
            print(evaluation.run_completion(writer, tasks, cfg.action or ("skip", "update_1", "policy"), out))
            return
        evaluation.write_answers(writer, problems, cfg.action, context, how, out / "answers.jsonl")
    print(f"isolation: {evaluation.isolation()}", flush=True)
    print(evaluation.judge_answers(problems, out))


JUDGE_WARNING = (
    "this runs code that a model wrote, confined as far as this system allows: that limits damage, it is no "
    "security boundary. Add --allow-code-execution to go on, best in a container or a virtual machine"
)


def open_writer(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[evaluation.Writer, evaluation.How]:
    """The model with its trained weights and policy, and how texts are written. Raises: UserError."""
    temperature = (0.8 if cfg.samples > 1 else 0.0) if cfg.temperature is None else cfg.temperature
    require(temperature or cfg.samples == 1, "--samples: at --temperature 0 all would be the same")
    run = open_run(cfg, Path(), mesh, Counter(), read=False)
    if not run.trained:
        print("note: no trained fast weights for these settings; untrained ones will learn", file=sys.stderr)
    known = None
    if run.trained and (path := run.trained / "policy.safetensors").exists():
        known, _ = load_state(path, rl.calibrate(rl.init_policy(jax.random.key(0)), empty_steps()))
    classes = rl.token_classes(data.token_texts(run.tokenizer))
    per_chunk = float(run.env.budget) / cfg.chunks
    budget, text = (run.env.costs_A, per_chunk), (run.tokenizer, run.ends, classes)
    writer = evaluation.Writer(run.spec, run.weights, *budget, *text, known, cfg.seed)
    return writer, evaluation.How(cfg.samples, temperature, cfg.max_new_tokens)


def completion_repositories(cfg: Config, writer: evaluation.Writer) -> data.Repos:
    """The repositories whose functions are completed: one's own, or those of the test split."""
    half_more = -(-3 * cfg.chunks // 2)  # of a dataset: a fifth is held out
    cuts = [data.Cut("test", half_more, 1, cfg.test_documents)]
    repos = data.load_repositories(source_of(cfg, cfg.data), cuts, writer.tokenizer, cfg.chunk, Counter())
    test = {name: files for name, files in repos.items() if data.split_of(name) == "test"}
    return repos if len(repos) == 1 else test


# ======================================== plumbing ==================================================

# --- 7. Settings filled in, weights and documents ---------------------------------------------------


def fill_in(cfg: Config, devices: int) -> Config:
    """The settings with what was left out filled in. Raises: UserError if one is out of range."""
    scale, own = SCALES[cfg.scale], data.is_one_repository(cfg.data or "")
    if own and cfg.stage == "all" and cfg.scale == "tiny" and cfg.weights is None and cfg.base is None:
        cfg = dataclasses.replace(cfg, stage="eval")
    if cfg.scale == "tiny" and cfg.stage == "eval" and cfg.test_documents is None:
        cfg = dataclasses.replace(cfg, test_documents=WHOLE if own else QUICK)
    names = ("chunk", "batch", "train_documents", "test_documents", "meta_steps", "iterations")
    sizes = {name: getattr(scale, name) for name in names if getattr(cfg, name) is None}
    if "batch" in sizes:
        sizes["batch"] += -sizes["batch"] % devices
    source = cfg.data or ("stdlib" if cfg.scale == "tiny" else "stack")
    cfg = dataclasses.replace(cfg, dtype=cfg.dtype or native_dtype(), data=source, **sizes)
    least = {"chunks": 2, "seeds": 1, "valid_documents": 1, "samples": 1, "max_new_tokens": 1, "seed": 0}
    least |= dict.fromkeys(names, 1) | {"meta_steps": 0, "iterations": 0, "hidden": 1}
    for name, low in least.items():
        value = getattr(cfg, name)
        fits = value is None or low <= value < 2**31
        require(fits, f"--{name.replace('_', '-')} {value}: must be {low} to 2,147,483,647")
    require(
        cfg.seed + cfg.seeds < 2**31, f"--seed {cfg.seed}: must be below 2,147,483,648, with --seeds added"
    )
    require(all(0 <= share <= 1000 for share in cfg.frontier), "--frontier: shares must be 0 to 1000")
    require(cfg.momentum is None or 0 <= cfg.momentum < 1, "--momentum must be at least 0 and below 1")
    require(cfg.temperature is None or 0 <= cfg.temperature < 100, "--temperature must be 0 to 100")
    require(cfg.batch % devices == 0, f"--batch {cfg.batch}: must be a multiple of the {devices} devices")
    return cfg


def native_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 where matrix units take it (about twice as fast), float32 elsewhere."""
    cpu = Path("/proc/cpuinfo")
    amx = cpu.exists() and "amx_bf16" in cpu.read_text()
    return "bfloat16" if jax.default_backend() != "cpu" or amx else "float32"


def open_run(cfg: Config, out: Path, mesh, skipped: Counter, read: bool = True) -> Run:
    """Load the model, its weights and (with `read`) the documents; all that can be wrong with the input shows
    here. Raises: UserError."""
    folder = base_folder(cfg.base or SCALES[cfg.scale].base)
    model, params = lm.load_model(folder, cfg.dtype)
    tokenizer = data.load_tokenizer(folder)
    ends, largest = data.end_tokens(folder, tokenizer), data.largest_id(tokenizer)
    require(
        largest < model.vocab, f"{folder}: its tokenizer has {largest + 1} tokens and the model {model.vocab}"
    )
    fits = 2 * cfg.chunk <= model.positions
    require(fits, f"--chunk {cfg.chunk}: two chunks must fit the model's {model.positions} positions")
    trained, fast = choose_weights(cfg, out, model, base_digest(params))
    spec = lm.Spec(model, fast, cfg.chunk, mesh)
    slow = lm.init_slow(jax.random.key(cfg.seed), model, fast)
    if trained:
        slow, _ = load_state(trained / "ttt.safetensors", slow)
    weights = lm.split_weights(fast, lm.freeze(model, params), slow)
    flops = lm.count_flops(spec, weights)
    env = open_env(cfg, np.asarray(rl.NOMINAL) if cfg.cost == "nominal" else flops / flops[0])
    weights, env = lm.place_weights(mesh, weights), lm.place(mesh, env)
    run = Run(cfg, out, spec, weights, env, flops / flops[0], tokenizer, ends, {}, trained)
    if read:
        run.texts.update(read_texts(run, skipped))
        check_hosts([x.tokens for some in run.texts.values() for x in some], params)
    return run


def open_env(cfg: Config, costs: np.ndarray) -> rl.Env:
    """What actions cost and may cost. Raises: UserError if the budget doesn't even pay for reading."""
    least, middle, most = (
        cfg.chunks * costs[0],
        cfg.chunks * (costs[0] + costs[1]) / 2,
        cfg.chunks * costs[-1],
    )
    budget = middle if cfg.budget is None else cfg.budget
    why = f"reading a document costs {least:g}; {middle:g} pays for half of UPDATE_1's learning too"
    require(least <= budget < 1e30, f"--budget {budget:g}: {why}")
    if budget >= most:
        print(
            f"note: --budget {budget:g} can't bind: UPDATE_4 on every chunk costs {most:.4g}", file=sys.stderr
        )
    return rl.Env(np.asarray(costs, np.float32), np.float32(budget))


LEARNER = {  # a setting of Fast: the option, and what it is where none is given
    "kind": ("fast", "swiglu"),
    "objective": ("objective", "next_token"),
    "optimizer": ("inner_optimizer", "muon"),
    "momentum": ("momentum", 0.3),
}


def fast_of_options(cfg: Config, model: lm.Model) -> lm.Fast:
    """What learns, by the options. Raises: UserError if the model lacks one of --fast-blocks."""
    blocks = {block + model.layers if block < 0 else block for block in cfg.fast_blocks}
    blocks = blocks or set(range(model.layers - max(model.layers // 4, 1), model.layers))
    there = min(blocks) >= 0 and max(blocks) < model.layers
    require(there, f"--fast-blocks {' '.join(map(str, cfg.fast_blocks))}: blocks are 0 to {model.layers - 1}")
    fields = {
        field: default if (x := getattr(cfg, name)) is None else x
        for field, (name, default) in LEARNER.items()
    }
    scale = SCALES[cfg.scale]
    hidden = cfg.hidden or (scale.rank if fields["kind"] == "lora" else scale.hidden)
    return lm.Fast(tuple(sorted(blocks)), hidden, remat=model.width >= 1024, **fields)


def choose_weights(cfg: Config, out: Path, model: lm.Model, base: int) -> tuple[Path | None, lm.Fast]:
    """Where trained fast weights are, if anywhere, and what learns: weights bring their own settings along.
    A resumed run has its own; else they are those of --weights, or of assets/ where they fit the options.
    Raises: UserError if those of --weights don't fit."""
    wanted, folder = fast_of_options(cfg, model), None
    if cfg.resume and (out / "ttt.safetensors").exists():
        folder = out
    elif (
        cfg.stage == "ttt"
        or (cfg.resume and (out / "ttt_state.safetensors").exists())
        or cfg.weights == "none"
    ):
        return None, wanted
    elif cfg.weights or (cfg.scale == "tiny" and cfg.base is None):
        folder = Path(cfg.weights or ASSETS / "tiny").expanduser()
    if folder is None:
        return None, wanted
    path = folder / "ttt.safetensors"
    require(
        path.exists(),
        f"--weights {folder}: no trained fast weights; give a run's folder, or none to train them",
    )
    meta = read_meta(path)
    require("fast" in meta, f"{path}: not trained fast weights; give the folder that they are in")
    blocks, *rest = meta["fast"].items()
    fast = lm.Fast(**(dict(rest) | {blocks[0]: tuple(blocks[1])}))
    given = {"blocks": cfg.fast_blocks, "hidden": cfg.hidden, "kind": cfg.fast, "objective": cfg.objective}
    given |= {"optimizer": cfg.inner_optimizer, "momentum": cfg.momentum}
    other = [
        name
        for name, x in given.items()
        if x not in (None, ()) and getattr(fast, name) != getattr(wanted, name)
    ]
    other += ["base"] if meta["base"] != base else []
    if other and (cfg.weights or folder == out):
        raise UserError(
            f"--weights {folder}: trained with another {', '.join(other)}; leave that out, or train anew"
        )
    fits = not other and (cfg.weights or folder == out or cfg.chunk == SCALES[cfg.scale].chunk)
    return (folder, fast) if fits else (None, wanted)


def base_digest(params: lm.Params) -> int:
    """A checksum of the base model's last norm, by which trained weights know it."""
    return zlib.crc32(np.asarray(params["norm"]["weight"], np.float32).tobytes())


def learner(spec: lm.Spec, weights: lm.Weights) -> dict[str, Any]:
    """What trained fast weights belong to: saved with them."""
    return {"fast": spec.fast._asdict(), "base": base_digest(weights.suffix)}


def base_folder(name: str) -> Path:
    """A local folder as it is, a hub name downloaded (cached by huggingface_hub). Raises: UserError."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    require(
        not local,
        f"--base {name}: no such folder; it needs config.json, model.safetensors and tokenizer.json",
    )
    import huggingface_hub

    patterns = [
        "config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "*.txt",
        "vocab.json",
    ]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"--base {name}: not a local folder, and the hub did not give it ({reason}); check the name and "
            "the connection, log in (hf auth login) if it is gated, or give a folder that holds it"
        ) from None


def source_of(cfg: Config, name: str) -> data.Source:
    """The code to read under a name of --data."""
    own = data.is_one_repository(name)
    return data.Source(name, cfg.files == "all" and not own, cfg.subset, cfg.text_column)


def training_data(cfg: Config) -> str:
    """The source of all documents but the evaluation's: one repository can't be split into some to train on
    and others that no stage saw."""
    return "stdlib" if data.is_one_repository(cfg.data) else cfg.data


def read_texts(run: Run, skipped: Counter) -> dict[str, list[data.Excerpt]]:
    """The documents that the stages to come will read. Raises: UserError."""
    cfg, meta_chunks = run.cfg, min(run.cfg.chunks, META_CHUNKS)
    cuts = {}
    if not run.trained:
        cuts |= {
            "meta": data.Cut("train", meta_chunks, 8, 400),
            "meta_valid": data.Cut("valid", meta_chunks, 1, 4),
        }
    if cfg.stage in ("all", "policy"):
        cuts["train"] = data.Cut("train", cfg.chunks, 4, cfg.train_documents)
    if cfg.stage != "ttt":
        cuts["valid"] = data.Cut("valid", cfg.chunks, 1, cfg.valid_documents)
    if cfg.stage in ("all", "eval"):
        cuts["test"] = data.Cut("test", cfg.chunks, 1, cfg.test_documents)
    source = source_of(cfg, training_data(cfg))
    repos = data.load_repositories(source, list(cuts.values()), run.tokenizer, cfg.chunk, skipped)
    classes, texts, end = rl.token_classes(data.token_texts(run.tokenizer)), {}, run.ends[0]
    for name, cut in cuts.items():
        if name == "test" and data.is_one_repository(cfg.data):
            (own,) = data.load_repositories(source_of(cfg, cfg.data), (), None, 0, skipped).values()
            own = data.drop_copies(own, (file for repo in repos.values() for file in repo), skipped)
            found = data.cut_repository(own, run.tokenizer, cfg.chunk, cut, end)
        else:
            found = data.cut_documents(repos, cut, run.tokenizer, cfg.chunk, end)
        features = lambda x: rl.text_features(x.tokens, cfg.chunk, classes)
        texts[name] = [x._replace(text_TU=features(x)) for x in found]
    enough = "test" not in texts or len({x.repo for x in texts["test"]}) > 1
    require(
        enough,
        "intervals need two test documents of two repositories; use more code, more --test-documents "
        "or fewer --chunks",
    )
    return texts


# --- 8. The run's folder and its checkpoints --------------------------------------------------------

FREE = {"stage", "test_documents", "runs", "action"}  # settings that may change between a run's parts
MACHINE = {"out", "resume", "mesh_shape", "hosts", "check_devices"}  # and those that no result depends on


def settings_of(cfg: Config) -> dict[str, Any]:
    """What config.json holds; paths within this checkout as from there, so that it can be moved."""
    home = ASSETS.parent
    relative = lambda path: str(path.relative_to(home) if path.is_relative_to(home) else path)
    kept = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in MACHINE}
    return json.loads(json.dumps(kept, default=relative))


def choose_folder(cfg: Config) -> Path:
    """The run's folder; nothing is written yet. Raises: UserError if it holds another run, or none to
    resume."""
    runs, out = Path("runs"), cfg.out
    if not out and cfg.resume:
        old = sorted(runs.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        require(old, "--resume: there is no run under runs/ yet; give --out, or leave --resume out")
        out = old[-1].parent
    elif not out:
        taken = [int(path.name) for path in runs.glob("*") if path.name.isdigit()]
        out = runs / f"{max(taken, default=0) + 1:03d}"
    there = (out / "config.json").exists()
    require(
        there or not cfg.resume, f"--resume: there is no run in {out}; leave --resume out, or give its folder"
    )
    require(
        cfg.resume or not there,
        f"{out} already holds a run; continue it with --resume, or choose another --out",
    )
    if there and (out / "config.json").stat().st_size:  # an empty one is of a run killed at its very start
        try:
            before = dict(json.loads((out / "config.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{out}/config.json is damaged; choose another --out") from None
        now = settings_of(cfg)
        changed = [
            f"{name}: {before.get(name)}" for name in now.keys() - FREE if now[name] != before.get(name)
        ]
        said = ", ".join(sorted(changed))
        same = f"{out} was run with other settings ({said}); repeat them, or choose another --out"
        require(not changed, same)
    return out


def claim_folder(cfg: Config, out: Path) -> Path:
    """Make the run's folder and write config.json, which for a fresh run must not be there yet -> the folder.
    Of several hosts the first does. Raises: UserError if it can't be written, or another run was faster."""
    if jax.process_index() == 0:
        try:
            while not (cfg.out or cfg.resume) and out.exists():  # another process has just taken the number
                out = choose_folder(cfg)
            out.mkdir(parents=True, exist_ok=bool(cfg.out or cfg.resume))
            if not cfg.resume:
                open(out / "config.json", "x").close()
            for left in out.glob(".*.*.[0-9]*"):  # half-written files of a run that was killed
                left.unlink()
            data.write_atomic(out / "config.json", (json.dumps(settings_of(cfg), indent=2) + "\n").encode())
        except FileExistsError:
            raise UserError(f"{out}: another run has just begun there; choose another --out") from None
        except OSError as error:
            raise UserError(
                f"--out {out}: can't write there ({error.strerror}); choose another folder"
            ) from None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("folder")
        require(
            (out / "config.json").exists(), f"--out {out}: not seen by every host; put it on a shared disk"
        )
    return out


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a run that was killed may have left half of one. Raises:
    UserError."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        if all(row.keys() >= {"stage", "step"} for row in rows):
            return rows
    except ValueError:
        pass
    raise UserError(f"{path} is damaged; delete it, and the figures so far are lost")


class Log:
    """metrics.jsonl, a line for each step: opening it for a stage drops that stage's lines after `step`,
    which a resumed run writes again. Only the first of several hosts writes."""

    def __init__(self, out: Path, stage: str, step: int):
        self.path, self.stage, self.rows = out / "metrics.jsonl", stage, []
        if jax.process_index() == 0:
            kept = [row for row in read_metrics(self.path) if row["stage"] != stage or row["step"] <= step]
            data.write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
            self.rows = [row for row in kept if row["stage"] == stage]

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """Write one step's figures."""
        row = {"stage": self.stage, "step": step} | {name: float(x) for name, x in figures.items()}
        self.rows.append(row)
        if jax.process_index() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


def save_state(path: Path, state: Any, **meta: Any) -> None:
    """Write a checkpoint, any pytree of arrays that are whole on every device, with `meta` (JSON) said of it.
    Of several hosts the first does, and none goes on before it is there."""
    multihost_utils.sync_global_devices(f"before {path.name}")
    if jax.process_index() == 0:
        leaves = {name: np.asarray(x, order="C") for name, x in lm.flatten(state).items()}
        header = {"ponderttt": json.dumps(meta | {"checksum": checksum(leaves)})}
        data.write_atomic(path, safetensors.numpy.save(leaves, metadata=header))
    multihost_utils.sync_global_devices(f"after {path.name}")


def load_state(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The pytree saved at `path`, in the structure of `like`, and what was said of it.
    Raises: UserError if the file is damaged or belongs to other settings."""
    arrays, meta = lm.read_safetensors(path), read_meta(path)
    require(
        checksum(arrays) == meta.get("checksum"),
        f"{path}: damaged (its checksum differs); delete it and run again",
    )
    wanted = lm.flatten(like)
    shapes = lambda named: {name: np.shape(x) for name, x in named.items()}
    require(
        shapes(arrays) == shapes(wanted),
        f"{path}: belongs to other settings; choose another --out or --weights",
    )
    leaves = [jnp.asarray(arrays[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), meta


def checksum(leaves: dict[str, np.ndarray]) -> int:
    """A checksum of named arrays."""
    return reduce(lambda crc, name: zlib.crc32(leaves[name].tobytes(), crc), sorted(leaves), 0)


def read_meta(path: Path) -> dict[str, Any]:
    """What was said of a checkpoint. Raises: UserError if it is damaged."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return json.loads((file.metadata() or {})["ponderttt"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        raise UserError(
            f"{path}: not a checkpoint of this program, or damaged; delete it and run again"
        ) from None


def progress(iterable=None, desc: str = "", **options):
    """tqdm's bar, shown by the first of several hosts alone."""
    return tqdm(
        iterable, desc=desc, mininterval=1, dynamic_ncols=True, disable=jax.process_index() > 0, **options
    )


# --- 9. Devices and hosts, the command line ---------------------------------------------------------


def join_hosts(cfg: Config) -> None:
    """Let this process find the others, before JAX looks for devices; only the first one speaks. Raises:
    UserError."""
    if cfg.hosts is None or jax.distributed.is_initialized():
        return
    try:
        given = {}
        if cfg.hosts != "auto":
            address, count, index = cfg.hosts.split(",")
            int(address.rpartition(":")[2])  # without a port JAX ends with a traceback, or none
            given = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--hosts {cfg.hosts}: give auto or HOST:PORT,COUNT,INDEX; hosts didn't meet ({reason})"
        ) from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def open_mesh(cfg: Config) -> jax.sharding.Mesh:
    """The mesh of --mesh-shape, or of all devices. Raises: UserError if there are no such devices."""
    there = jax.device_count()
    try:
        data_, fsdp = map(int, cfg.mesh_shape.split(",")) if cfg.mesh_shape else (there, 1)
    except ValueError:
        raise UserError(f"--mesh-shape {cfg.mesh_shape}: give two numbers, DATA,FSDP, such as 4,2") from None
    size = data_ * fsdp
    fits = min(data_, fsdp) > 0 and size <= there and (size == there or jax.process_count() == 1)
    require(fits, f"--mesh-shape {cfg.mesh_shape}: {data_} x {fsdp} devices, and there are {there}")
    return lm.make_mesh(data_, fsdp)


def check_hosts(tokens: list[np.ndarray], params: lm.Params) -> None:
    """Raises: UserError unless every host reads the same documents with the same model."""
    if jax.process_count() == 1:
        return
    mine = reduce(lambda crc, x: zlib.crc32(x.tobytes(), crc), tokens, base_digest(params))
    seen = multihost_utils.process_allgather(np.asarray([mine], np.uint32), tiled=True)
    require(
        len(set(seen.tolist())) == 1,
        "hosts read different documents or models; give all the same --data and --base",
    )


TOLERANCE = {
    "float32": 1e-4,
    "bfloat16": 0.02,
}  # of gradients, of the largest: devices add up in another order


def check_devices(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Check that these devices compute what one does, with the learner of these settings; prints as it goes.
    Raises: UserError with the first thing that is wrong."""
    shape = f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} of {jax.devices()[0].device_kind}"
    print(f"mesh: {shape}, {jax.process_count()} processes")
    spread = lambda x: lm.place(mesh, x, lm.ROWS)
    add = lambda x: jax.lax.psum(x.sum(), lm.AXES)
    total = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=lm.ROWS, out_specs=lm.WHOLE))
    found, expected = int(total(spread(np.arange(mesh.size)))), mesh.size * (mesh.size - 1) // 2
    require(
        found == expected,
        f"the devices' numbers add up to {found} instead of {expected}: collectives are broken",
    )
    print("collectives: right")

    dtype, width = cfg.dtype or native_dtype(), 16 * mesh.shape["fsdp"]
    model = lm.Model(97, 16, width, 2, 2, 2, width // 2, 4 * width, dtype)
    fast = fast_of_options(dataclasses.replace(cfg, hidden=8, fast_blocks=(1,)), model)
    params, rng = lm.init_params(jax.random.key(0), model), np.random.default_rng(0)
    weights = lm.split_weights(fast, params, lm.init_slow(jax.random.key(1), model, fast))
    batch = rng.integers(0, model.vocab, (mesh.size, 3 * 8 + 1), np.int32), random_actions(rng, mesh.size, 3)
    gradient = jax.jit(meta_gradient, static_argnums=0)
    one = lm.make_mesh(devices=jax.local_devices())
    ours = gradient(lm.Spec(model, fast, 8, mesh), lm.place_weights(mesh, weights), spread(batch))
    alone = gradient(lm.Spec(model, fast, 8, one), lm.place_weights(one, weights), lm.place(one, batch))
    error = lambda x, y: float(
        np.abs(np.asarray(x) - np.asarray(y)).max() / (np.abs(np.asarray(y)).max() + 1e-12)
    )
    worst = max(jax.tree.leaves(jax.tree.map(error, ours, alone)))
    require(worst < TOLERANCE[dtype], f"loss or meta-gradient are off by {worst:.1e} from one device's")
    print(f"loss and meta-gradient, {dtype}: as on one device (largest difference {worst:.1e})\nPASS")


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: BaseException) -> str | None:
    """What went wrong and what to do, in one line; None if it is a fault of the program."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; lower --chunk, --chunks, --batch or --hidden, or take a smaller --scale"
    if isinstance(error, jax.errors.JaxRuntimeError):
        said = f"another host stopped, and its own output says why ({str(error).splitlines()[0][:200]})"
        return said if jax.distributed.is_initialized() else None
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error}; free some space, and the same command with --resume continues"
    return str(error) if isinstance(error, (UserError, OSError)) else None


def keep_memory() -> None:
    """Have the C library keep what is freed: on a CPU each call of a program takes its memory anew, and
    clearing its pages is up to a quarter of an UPDATE_1's time. Of a GPU's memory take nine tenths, unless
    told otherwise."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-3, 1 << 27)  # M_MMAP_THRESHOLD: up to this size memory is the heap's,
        libc.mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD: of which so much may lie idle at its end
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; both at once are refused
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")


def run(cfg: Config) -> None:
    """Do what the settings ask for."""
    if cfg.stage == "compare":
        require(len(cfg.runs) > 0, "--stage compare needs --runs A B ...: folders of finished runs")
        print(evaluation.compare_runs(cfg.runs))
        return
    join_hosts(cfg)
    mesh = open_mesh(cfg)
    if cfg.check_devices:
        check_devices(cfg, mesh)
    elif cfg.generate or cfg.benchmark:
        write_text(cfg, lm.make_mesh())
    else:
        run_stages(cfg, mesh)


def launch(job: Callable[[], None]) -> None:
    """Run a job with a persistent compilation cache; what the user can mend ends in one line and exit code
    2."""
    keep_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(data.cache_folder())
    jax.config.update("jax_compilation_cache_dir", cache)
    try:
        job()
    except (UserError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if (text := explain(error)) is None:
            raise
        leave(2, text)
    except KeyboardInterrupt:
        leave(130, "stopped; the same command with --resume continues, once its run folder was named")


def leave(code: int, text: str) -> None:
    """Say why, and end. One of several hosts leaves at once: an orderly exit would wait for the others."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # the message has a line of its own
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """The command line."""
    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    cfg = tyro.cli(Config, description=__doc__, config=style)
    launch(lambda: run(cfg))


if __name__ == "__main__":
    main()
