"""PonderTTT: a frozen code model learns while it reads, and a policy decides when.

    python ponder.py                  the whole method on this machine, offline, on the standard library
    python ponder.py --data FOLDER    the same on your own repositories
    python ponder.py --stage eval     a quick evaluation, with the trained weights of assets/tiny

The method, for a document of chunks, each read after the one before:
    1. ttt      meta-learn the start W_0 and the step sizes of the fast weights, so that a few gradient steps
                on what was read lower the loss of what comes                              (`learn_start`)
    2. policy   learn for which chunks such steps are worth their cost, under a budget: a warm start by
                regression, then PPO with a PID-controlled multiplier                      (`learn_policy`)
    3. eval     read repositories that no stage saw with every method, at one budget     (`evaluate_methods`)
Each chunk is predicted, then decided about, then learned from. Equations are in model.py (learning) and
rl.py (deciding); this file has the settings, the stages as they run, and then the plumbing.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
import tyro
from jax.experimental import multihost_utils

import data
import eval as evaluation
import model as lm
import rl
from data import ASSETS, UserError, require

# --- 1. Settings ------------------------------------------------------------------------------------
Group = Literal["confidence", "activation", "attention", "code", "history", "sequence", "ahead"]
Action = Literal["policy", "base", "skip", "update_1", "update_2", "update_4"]
Benchmark = Literal["completion", "humaneval", "mbpp", "mbpp-test", "classeval", "classeval-methods"]


@dataclass(frozen=True)
class Config:
    """All settings. What is left out comes from --scale, or from the weights that are used."""

    stage: Literal["all", "ttt", "policy", "eval", "compare"] = "all"  # What to run; all: ttt, policy, eval.
    scale: Literal["tiny", "125m", "350m", "1b", "xl"] = "tiny"  # Base model and sizes; tiny: any laptop.
    base: str | None = None  # Folder or hub name of a GPT-2, GPT-NeoX or Llama-type model, not the scale's.
    out: Path | None = None  # The run's folder; left out: a new one under runs/.
    resume: bool = False  # Continue the run in --out, or the newest under runs/.
    weights: str | None = None  # A run's folder with trained weights to use, or none: train all of them here.
    seed: int = 0  # Of everything random.
    runs: tuple[Path, ...] = ()  # Of --stage compare: folders of finished runs, compared with the first.

    data: str | None = None  # stdlib, a folder, stack, stack-v2, hub:NAME[@REVISION], a .parquet or .jsonl.
    files: Literal["code", "all"] = "code"  # Of a folder: its code, or all that is text.
    subset: str | None = None  # Of a dataset: a configuration, or one of its folders, such as data/rust.
    text_column: str | None = None  # Of a dataset: the column with the text, if its name isn't a usual one.

    budget: float | None = None  # Cost of a document, SKIP = 1 a chunk; left out: half of UPDATE_1's.
    cost: Literal["nominal", "flops"] = "nominal"  # The budget's currency: 1, 3, 6, 12, or compiled FLOPs.
    frontier: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)  # Other budgets, as shares of UPDATE_1's.
    features: tuple[Group, ...] = rl.DEFAULT_GROUPS  # What the policy sees; ahead counts the text to come.

    fast: Literal["swiglu", "linear", "lora"] | None = None  # The fast weights; left out: swiglu.
    fast_blocks: tuple[int, ...] = ()  # Blocks that carry them, -1 is the last; left out: the last quarter.
    hidden: int | None = None  # Width of a swiglu adapter, rank of a lora one.
    objective: Literal["next_token", "reconstruction"] | None = None  # Inner loss; left out: next_token.
    inner_optimizer: Literal["muon", "sgd"] | None = None  # Orthogonalised or clipped steps; left out: muon.
    momentum: float | None = None  # Of inner steps; left out: 0.3.

    chunks: int = 24  # Chunks of a document.
    chunk: int | None = None  # Tokens of a chunk.
    batch: int | None = None  # Documents of an outer step or PPO iteration, a multiple of the devices.
    train_documents: int | None = None  # Documents that the policy is trained on.
    valid_documents: int = 6  # Documents that gates and policy are calibrated on.
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


# What a --scale stands for, where no option says otherwise; lora adapters have the rank for their width. The
# backward pass of meta-learning keeps four states for each of the meta_chunks that a document has at most.
SIZES = ("base", "chunk", "hidden", "rank", "meta_chunks", "batch")
SIZES += ("train_documents", "test_documents", "meta_steps", "iterations")
SCALES = {
    "tiny": (str(ASSETS / "tiny"), 256, 256, 16, 24, 8, 120, 12, 100, 6),
    "125m": ("gpt2", 512, 768, 64, 24, 8, 5000, 100, 2000, 625),
    "350m": ("gpt2-medium", 512, 1024, 128, 24, 4, 10000, 100, 2000, 2500),
    "1b": ("gpt2-large", 512, 1280, 256, 16, 2, 20000, 100, 2000, 10000),
    "xl": ("gpt2-xl", 512, 1600, 256, 8, 2, 20000, 100, 2000, 10000),
}
QUICK, WHOLE = 6, 24  # test documents at tiny: of --stage eval alone, and of one's own repository
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
    """Meta-learn, train the policy, evaluate: what --stage asks for."""
    cfg, skipped = fill_in(cfg, mesh.size), Counter()
    run = open_run(cfg, choose_folder(cfg), mesh, skipped)
    policy = load_policy(run).policy if cfg.stage == "eval" else None
    run = run._replace(out=claim_folder(cfg, run.out))
    trained = os.path.relpath(run.trained) if run.trained else f"learned in this run, {cfg.meta_steps} steps"
    facts = [
        f"fast weights: {trained}",
        f"policy: {trained if policy else f'learned in this run, {cfg.iterations} iterations'}",
        f"budget of a document: {float(run.env.budget):.6g} {cfg.cost}",
        f"files skipped: {', '.join(f'{n} {why}' for why, n in skipped.items() if n) or 'none'}",
    ]
    title = f"PonderTTT: {cfg.base or cfg.scale} on {cfg.data}; run folder {run.out}"
    print("\n  ".join([title, *facts]), flush=True)

    if cfg.stage == "all" and run.trained and (run.trained / "policy.safetensors").exists():
        texts, names = run.texts["test"][:2], ("skip", "update_1", "policy")
        print("A first look, with the policy that is there; then one is trained on this data:")
        look = (run.spec, run.weights, run.env, texts, load_policy(run), (), cfg.seed, names)
        evaluation.evaluate(*look)
    if not run.trained:
        run = run._replace(weights=run.weights._replace(slow=learn_start(run)))
    save_state(run.out / "ttt.safetensors", run.weights.slow, **learner(run.spec.fast, run.weights.suffix))
    if cfg.stage in ("all", "policy"):
        policy = learn_policy(run)
    if cfg.stage != "ttt":
        read = (run.spec, run.weights, run.env, policy, run.texts["valid"])
        known = rl.calibrate(policy, evaluation.read_validation(*read))
        save_state(run.out / "policy.safetensors", known)
    if cfg.stage in ("all", "eval"):
        print(evaluate_methods(run, known, facts))
        print(f"report: {run.out / 'report.md'}")


# --- 3. Stage ttt: meta-learn how to learn ----------------------------------------------------------
META_RATE, STEP_RATE = 2e-3, 2e-2  # Adam's, for W_0 and for the logarithms of the step sizes


def learn_start(run: Run) -> Any:
    """Meta-learn W_0 and the step sizes through the unrolled inner steps -> slow parameters."""
    cfg, spec, weights, checkpoint = run.cfg, run.spec, run.weights, run.out / "ttt_state.safetensors"
    state, step = (weights.slow, meta_optimizer(cfg.meta_steps).init(weights.slow)), 0
    if cfg.resume and checkpoint.exists():
        state, meta = load_state(checkpoint, state)
        step = meta["step"]
    slow, opt_state = lm.place(spec.mesh, state)
    documents = np.stack([x.tokens for x in run.texts["meta"]])
    log, bar = Log(run.out, "ttt", step), evaluation.progress(None, "ttt", total=cfg.meta_steps, initial=step)
    while True:
        if step % 20 == 0 or step == cfg.meta_steps:
            losses = validate(run, slow)
            if not log.rows or "valid_skip" not in log.rows[-1]:  # a checkpoint's step has its line already
                log.add(step, losses)
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
            save_state(checkpoint, (slow, opt_state), step=step)
        if step >= cfg.meta_steps:
            bar.close()
            return slow
        rng = np.random.default_rng((cfg.seed, 1, step))
        rows = rng.choice(len(documents), cfg.batch, replace=len(documents) < cfg.batch)
        beside = lm.beside(
            spec, cfg.batch // spec.mesh.size
        )  # these act alike: a step for one is one for all
        actions = random_actions(rng, cfg.batch // beside, documents.shape[1] // cfg.chunk).repeat(beside, 0)
        batch = lm.place(spec.mesh, (documents[rows], actions), lm.ROWS)
        slow, opt_state, loss, norm = meta_step(spec, cfg.meta_steps, weights, slow, opt_state, batch)
        step += 1
        log.add(step, {"loss": loss, "gradient_norm": norm, "dropped": opt_state[0][0].total_notfinite})
        bar.update()


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def meta_step(spec: lm.Spec, steps: int, weights: lm.Weights, slow, opt_state, batch):
    """Take one outer step of `steps` -> (slow parameters, optimiser's state, loss, norm of the gradient)."""
    loss, grads = meta_gradient(spec, weights._replace(slow=slow), batch)
    updates, opt_state = meta_optimizer(steps).update(grads, opt_state, slow)
    norm = jnp.linalg.norm(jax.flatten_util.ravel_pytree(grads)[0])
    return optax.apply_updates(slow, updates), opt_state, loss, norm


def meta_gradient(spec: lm.Spec, weights: lm.Weights, batch):
    """Compute the mean loss of a batch of documents, tokens (B, T*C + 1) read with actions (B, T), and its
    gradient in `weights.slow`; both whole on every device."""

    def read(weights, spec, inputs):
        tokens, actions = inputs
        windows = lm.make_windows(spec, weights, tokens)
        objective = lambda slow: lm.document_loss(spec, weights._replace(slow=slow), windows, actions)[0]
        return jax.value_and_grad(objective)(weights.slow)

    def device(weights, _, batch):
        found = lm.side_by_side(spec, partial(read, weights), batch)
        return jax.lax.pmean(jax.tree.map(lambda x: x.mean(0), found), lm.AXES)

    return lm.on_devices(spec.mesh, device, weights, (), batch, lm.WHOLE)


def meta_optimizer(steps: int) -> optax.GradientTransformation:
    """Make Adam, on all parameters as one vector; a step whose gradient is not finite is dropped, and counted
    in `total_notfinite` of its first state's first."""
    decay = optax.cosine_decay_schedule(-1.0, max(steps, 1), alpha=0.05)
    rate = lambda path: STEP_RATE if path[0].key == "log_step" else META_RATE
    scale = lambda slow, _: jax.tree_util.tree_map_with_path(lambda path, x: rate(path) * x, slow)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
    adam = optax.chain(optax.apply_if_finite(adam, 2**30), optax.scale_by_schedule(decay))
    return optax.chain(optax.flatten(adam), optax.stateless(scale))


def random_actions(rng: np.random.Generator, documents: int, chunks: int) -> np.ndarray:
    """Draw actions (documents, chunks), each document with a mix of its own: from one action nearly
    everywhere, as in the fixed schedules, to all of them alike."""
    mixes = rng.dirichlet(np.full(len(rl.ACTIONS), 0.5), documents)
    return np.stack([rng.choice(len(rl.ACTIONS), chunks, p=mix) for mix in mixes]).astype(np.int32)


def validate(run: Run, slow: Any) -> dict[str, float]:
    """Read the validation documents with each action on every chunk -> the mean losses, nats per token."""
    weights, policy, found = run.weights._replace(slow=slow), rl.init_policy(jax.random.key(0)), {}
    for name, action in evaluation.FIXED.items():
        rule, losses = rl.make_rule(rl.follow, policy, plan_T=action, hard=False), []
        for group in evaluation.group_documents(run.spec, run.texts["meta_valid"]):
            document = evaluation.prepare(run.spec, weights, group)
            steps = evaluation.run_rule(run.spec, weights, run.env, rule, document, 0)
            losses.append(evaluation.fetch(steps.loss)[: len(group)])  # the last group is filled up
        found[f"valid_{name}"] = float(np.concatenate(losses).mean())
    return found


# --- 4. Stage policy: learn when to learn -----------------------------------------------------------
def learn_policy(run: Run) -> rl.Policy:
    """Train a policy: a warm start by regression on random actions, then PPO under the budget."""
    cfg, ppo, key = run.cfg, rl.Ppo(credit=max(run.cfg.chunks // 8, 1)), jax.random.key(run.cfg.seed)
    trainer = rl.init_trainer(jax.random.fold_in(key, 2), ppo, run.env, cfg.chunks, cfg.features)
    trainer, key = lm.place(run.spec.mesh, trainer), jax.random.fold_in(key, 3)
    checkpoint, read = run.out / "policy_state.safetensors", partial(read_batch, run, ppo)
    warm = range(0, min(TEACHER_DOCUMENTS, cfg.train_documents), cfg.batch)
    if cfg.resume and checkpoint.exists():
        trainer = lm.place(run.spec.mesh, load_state(checkpoint, trainer)[0])
    else:
        lessons = [read(place, trainer.policy, 4, place) for place in evaluation.progress(warm, "warm start")]
        steps, rewards = jax.tree.map(lambda *x: jnp.concatenate(x), *lessons)
        trainer, error = rl.teach(ppo, steps, rewards, trainer, key)
        figures = {"unexplained": error, "gain": rewards.mean(), "cost": steps.cost.mean()}
        Log(run.out, "warm_start", -1).add(0, figures)
        save_state(checkpoint, trainer)
    first = int(trainer.iteration)
    bar = evaluation.progress(None, "policy", total=cfg.iterations, initial=first)
    log = Log(run.out, "policy", first)
    for step in range(first, cfg.iterations):
        steps, rewards = read((len(warm) + step) * cfg.batch, trainer.policy, 3, 0, step)
        own_key = jax.random.fold_in(key, 1 + step)
        trainer, figures = rl.train_iteration(ppo, run.env, steps, rewards, trainer, own_key)
        log.add(step + 1, figures | {"dropped_documents": cfg.batch - len(rewards)})
        save_state(checkpoint, trainer)
        bar.set_postfix({name: f"{log.rows[-1][name]:.3f}" for name in ("loss", "gain", "cost", "lambda")})
        bar.update()
    bar.close()
    return trainer.policy


def read_batch(run: Run, ppo: rl.Ppo, place: int, policy: rl.Policy, *seed: int) -> tuple[rl.Step, Any]:
    """Roll the policy out on the --batch training documents from `place` on -> (steps, rewards).
    Each document is read before any is read again. Those in which learning ran away are left out: one would
    make the whole batch NaN. Raises: UserError if none is left."""
    cfg, texts = run.cfg, run.texts["train"]
    order = lambda epoch: np.random.default_rng((cfg.seed, 2, epoch)).permutation(len(texts))
    chosen = [texts[order(p // len(texts))[p % len(texts)]] for p in range(place, place + cfg.batch)]
    arrays = np.stack([x.tokens for x in chosen]), np.stack([x.text_TU for x in chosen])
    documents = lm.place(run.spec.mesh, arrays, lm.ROWS)
    key = jax.random.key(int(np.random.default_rng((cfg.seed, *seed)).integers(2**31)))
    steps, rewards = rl.rollout(run.spec, run.weights, run.env, documents, policy, key, credit=ppo.credit)
    keep = np.isfinite(np.asarray(rewards)).all(1) & np.isfinite(np.asarray(steps.features_U)).all((1, 2))
    require(keep.any(), "no loss of a batch was finite: learn the fast weights anew, with --weights none")
    return (steps, rewards) if keep.all() else jax.tree.map(lambda x: x[keep], (steps, rewards))


# --- 5. Stage eval ----------------------------------------------------------------------------------
def evaluate_methods(run: Run, known: rl.Calibrated, facts: list[str]) -> str:
    """Read the test documents with every method: results.json, report.md, plots -> the verdict."""
    cfg, texts, costs = run.cfg, run.texts["test"], np.asarray(run.env.costs_A, float)
    budgets = [float(np.float32(cfg.chunks * (costs[0] + s * (costs[1] - costs[0])))) for s in cfg.frontier]
    started = time.perf_counter()
    found = evaluation.evaluate(run.spec, run.weights, run.env, texts, known, budgets, cfg.seed)
    own, new = data.is_one_repository(cfg.data), cfg.scale == "tiny" and not cfg.base and cfg.data == "stdlib"
    results = {
        "model": cfg.base or cfg.scale,
        "data": cfg.data,
        "documents": len(texts),
        "chunks": cfg.chunks,
        "unit": "documents of one repository" if own else "repositories",
        "unseen": "that no stage saw" if new else "that no stage here saw (the base model may have)",
        "budget": float(run.env.budget),
        "currency": cfg.cost,
        "looks_ahead": rl.looks_ahead(known.policy),
    } | evaluation.analyse(found, run.flops_A)
    training = [row for row in data.read_lines(run.out / "metrics.jsonl") if row["stage"] == "policy"]
    dropped = sum(read.dropped for reads in found.reads.values() for read in reads)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )
    results["facts"] = [
        *facts,
        f"FLOPs relative to SKIP: {', '.join(f'{x:.2f}' for x in run.flops_A)}",
        f"{run.spec.mesh.size} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {cfg.dtype}",
        f"jax {jax.__version__}; evaluated in {time.perf_counter() - started:.0f} s; up to {memory:.2f} GB",
        f"inner steps that were not finite, and not taken: {dropped}",
    ]
    if jax.process_index():
        return ""
    data.write_atomic(run.out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    return evaluation.write_report(run.out, results, found, training)


# --- 6. Writing and benchmarks ----------------------------------------------------------------------
def write_text(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Continue --prompt, or answer and judge a benchmark."""
    require(cfg.benchmark or cfg.prompt is not None, "--generate needs --prompt TEXT")
    if code := cfg.benchmark not in (None, "completion"):
        warning = "this runs code that a model wrote, confined as far as the system allows, with no guarantee"
        advice = "add --allow-code-execution to go on, best in a container or a virtual machine"
        require(cfg.allow_code_execution, f"{warning}: {advice}")
        one = bool(cfg.solutions) != bool(cfg.action)
        require(one, "--benchmark needs --action (write answers) or --solutions (judge given ones)")
        problems = data.load_problems(cfg.benchmark, cfg.benchmark_file)[: cfg.test_documents]
    cfg = fill_in(replace(cfg, stage="eval"), 1)
    out = claim_folder(cfg, choose_folder(cfg)) if cfg.benchmark else Path()
    if cfg.solutions:
        evaluation.copy_solutions(problems, cfg.solutions, out / "answers.jsonl")
    else:
        writer = open_writer(cfg, mesh)
        repos = {}
        if cfg.context:
            source = data.Source(str(cfg.context), cfg.files == "all")
            repos = data.load_repositories(source, (), None, 0, Counter())
        files = [file for repo in repos.values() for file in repo]
        _, context = data.read_tokens(files, writer.tokenizer, cfg.chunks * cfg.chunk)
        context = context[: cfg.chunks * cfg.chunk]
    if cfg.benchmark is None:
        writer = evaluation.take_action(writer, (*cfg.action, "policy")[0])
        evaluation.print_completions(writer, evaluation.begin(writer, context), cfg.prompt)
    elif cfg.benchmark == "completion":
        cuts = [data.Cut("test", 2 * cfg.chunks, 1, cfg.test_documents)]  # a part of each is held out
        repos = data.load_repositories(source_of(cfg, True), cuts, writer.tokenizer, cfg.chunk, Counter())
        tasks = evaluation.completion_tasks(writer, repos, cfg.chunks, cfg.test_documents)
        print(evaluation.run_completion(writer, tasks, cfg.action or ("skip", "update_1", "policy"), out))
    elif not cfg.solutions:
        evaluation.write_answers(writer, problems, cfg.action, context, out / "answers.jsonl")
    if code:
        print(f"isolation: {evaluation.isolation()}", flush=True)
        print(evaluation.judge_answers(problems, out))


def open_writer(cfg: Config, mesh: jax.sharding.Mesh) -> evaluation.Writer:
    """Load the model with its trained weights and policy, to write. Raises: UserError."""
    temperature = (0.8 if cfg.samples > 1 else 0.0) if cfg.temperature is None else cfg.temperature
    require(temperature or cfg.samples == 1, "--samples: at --temperature 0 all would be the same")
    run = open_run(replace(cfg, resume=False), Path(), mesh)
    if not run.trained:
        print("note: no trained fast weights for these settings; untrained ones will learn", file=sys.stderr)
    there = run.trained and (run.trained / "policy.safetensors").exists()
    env = run.env._replace(budget=run.env.budget / cfg.chunks)
    text = run.tokenizer, run.ends, rl.token_classes(data.token_texts(run.tokenizer))
    writer = evaluation.Writer(run.spec, run.weights, env, *text, load_policy(run) if there else None)
    options = {"samples": cfg.samples, "temperature": temperature, "max_new_tokens": cfg.max_new_tokens}
    return writer._replace(seed=cfg.seed, **options)


# ======================================== plumbing ==================================================
# --- 7. Settings filled in, weights and documents ---------------------------------------------------
def fill_in(cfg: Config, devices: int) -> Config:
    """Fill in the settings that were left out. Raises: UserError if one is out of range."""
    own = data.is_one_repository(cfg.data or "")
    if own and cfg.stage == "all" and cfg.scale == "tiny" and cfg.weights is None and cfg.base is None:
        cfg = replace(cfg, stage="eval")
    if cfg.scale == "tiny" and cfg.stage == "eval" and cfg.test_documents is None:
        cfg = replace(cfg, test_documents=WHOLE if own else QUICK)
    names = ("chunk", "batch", "train_documents", "test_documents", "meta_steps", "iterations")
    scale = dict(zip(SIZES, SCALES[cfg.scale]))
    sizes = {name: scale[name] for name in names if getattr(cfg, name) is None}
    if "batch" in sizes:
        sizes["batch"] += -sizes["batch"] % devices
    source = cfg.data or ("stdlib" if cfg.scale == "tiny" else "stack")
    cfg = replace(cfg, dtype=cfg.dtype or native_dtype(), data=source, **sizes)
    least = {"chunks": 2, "seed": 0} | dict.fromkeys((*names, "samples", "max_new_tokens"), 1)
    least |= {"valid_documents": 1, "hidden": 1, "meta_steps": 0, "iterations": 0}
    for name, low in least.items():
        value = getattr(cfg, name)
        fits = value is None or low <= value < 2**31
        require(fits, f"--{name.replace('_', '-')} {value}: must be {low} to 2,147,483,647")
    require(all(0 <= share <= 1000 for share in cfg.frontier), "--frontier: shares must be 0 to 1000")
    require(cfg.momentum is None or 0 <= cfg.momentum < 1, "--momentum must be at least 0 and below 1")
    require(cfg.temperature is None or 0 <= cfg.temperature < 100, "--temperature must be 0 to 100")
    require(cfg.batch % devices == 0, f"--batch {cfg.batch}: must be a multiple of the {devices} devices")
    require(cfg.context is None or cfg.context.is_dir(), f"--context {cfg.context}: no such folder")
    return cfg


def native_dtype() -> Literal["float32", "bfloat16"]:
    """Choose bfloat16 where matrix units take it (about twice as fast), float32 elsewhere."""
    cpu = Path("/proc/cpuinfo")
    amx = cpu.exists() and "amx_bf16" in cpu.read_text()
    return "bfloat16" if jax.default_backend() != "cpu" or amx else "float32"


def open_run(cfg: Config, out: Path, mesh: jax.sharding.Mesh, skipped: Counter | None = None) -> Run:
    """Load the model, its weights and, where `skipped` counts what is left out, the documents.
    All that can be wrong with the input shows here. Raises: UserError."""
    folder = base_folder(cfg.base or SCALES[cfg.scale][0])
    model, params = lm.load_model(folder, cfg.dtype)
    tokenizer = data.load_tokenizer(folder)
    ends, largest = data.end_tokens(folder, tokenizer), data.largest_id(tokenizer)
    require(largest < model.vocab, f"{folder}: its tokenizer has tokens that its model lacks")
    fits = 2 * cfg.chunk <= model.positions
    require(fits, f"--chunk {cfg.chunk}: two chunks must fit the model's {model.positions} positions")
    trained = find_weights(cfg, out)
    fast = choose_fast(cfg, trained, model, params)
    spec = lm.Spec(model, fast, cfg.chunk, mesh)
    slow = lm.init_slow(jax.random.key(cfg.seed), model, fast)
    spec = spec._replace(together=lm.fit_documents(spec, slow, meta_chunks(cfg)))
    if trained:
        slow, _ = load_state(trained / "ttt.safetensors", slow)
    weights = lm.split_weights(fast, lm.freeze(model, params), slow)
    flops = lm.count_flops(spec, weights)
    costs = np.asarray(rl.NOMINAL if cfg.cost == "nominal" else flops / flops[0], np.float32)
    least, middle = cfg.chunks * costs[0], cfg.chunks * (costs[0] + costs[1]) / 2
    budget = np.float32(middle if cfg.budget is None else cfg.budget)
    why = f"reading a document costs {least:g}; {middle:g} pays for half of UPDATE_1's learning too"
    require(least <= budget < 1e30, f"--budget {budget:g}: {why}")
    weights, env = lm.place_weights(mesh, weights), lm.place(mesh, rl.Env(costs, budget))
    run = Run(cfg, out, spec, weights, env, flops / flops[0], tokenizer, ends, {}, trained)
    if skipped is not None:
        run.texts.update(read_texts(run, skipped))
    return run


LEARNER = {"fast": "kind", "hidden": "hidden", "objective": "objective", "inner_optimizer": "optimizer"}
LEARNER |= {"momentum": "momentum", "fast_blocks": "blocks"}  # options, and what they are called in Fast


def find_weights(cfg: Config, out: Path) -> Path | None:
    """Find the folder of trained fast weights: a resumed run's own, that of --weights, or assets/ where no
    option asks for others; None: they are to be trained."""
    if cfg.resume and (out / "ttt.safetensors").exists():
        return out
    half = cfg.resume and (out / "ttt_state.safetensors").exists()
    other = cfg.base or cfg.scale != "tiny" or cfg.chunk != dict(zip(SIZES, SCALES["tiny"]))["chunk"]
    other = other or any(getattr(cfg, name) not in (None, ()) for name in LEARNER)
    if half or cfg.stage == "ttt" or cfg.weights == "none" or (other and not cfg.weights):
        return None
    return Path(cfg.weights or ASSETS / "tiny").expanduser()


def choose_fast(cfg: Config, trained: Path | None, model: lm.Model, params: lm.Params) -> lm.Fast:
    """Say what learns: what the options ask for, or what trained weights bring along.
    Raises: UserError if the two contradict each other, or the weights belong to another model."""
    given = {field: x for name, field in LEARNER.items() if (x := getattr(cfg, name)) not in (None, ())}
    there = all(-model.layers <= block < model.layers for block in cfg.fast_blocks)
    require(there, f"--fast-blocks {cfg.fast_blocks}: blocks are 0 to {model.layers - 1}")
    if cfg.fast_blocks:
        given["blocks"] = tuple(sorted({block % model.layers for block in cfg.fast_blocks}))
    if trained is None:
        scale, first = dict(zip(SIZES, SCALES[cfg.scale])), model.layers - max(model.layers // 4, 1)
        usual = {"blocks": tuple(range(first, model.layers)), "momentum": 0.3}
        usual["hidden"] = scale["rank" if cfg.fast == "lora" else "hidden"]
        return lm.Fast(**(usual | given))
    path, advice = trained / "ttt.safetensors", "give a run's folder, or none to train them"
    require(path.exists(), f"--weights {trained}: no trained fast weights; {advice}")
    meta = load_state(path)[1]
    require("fast" in meta, f"{path}: not trained fast weights; {advice}")
    fast = lm.Fast(**(meta["fast"] | {"blocks": tuple(meta["fast"]["blocks"])}))
    other = [field for field, x in given.items() if x != getattr(fast, field)]
    other += ["base"] if meta["base"] != learner(fast, params)["base"] else []
    said = f"--weights {trained}: trained with another {', '.join(other)}"
    require(not other, f"{said}; leave that out, or train anew with --weights none")
    return fast


def learner(fast: lm.Fast, params: lm.Params) -> dict[str, Any]:
    """Say what trained fast weights belong to, saved with them: settings, and the base by its last norm."""
    return {"fast": fast._asdict(), "base": zlib.crc32(np.asarray(params["norm"]["weight"], "f4").tobytes())}


def load_policy(run: Run) -> rl.Calibrated:
    """Load the policy that belongs to the fast weights. Raises: UserError if there is none."""
    missing = "no trained policy for these settings; run the other stages first"
    require(run.trained and (run.trained / "policy.safetensors").exists(), missing)
    quantiles = lambda rows: np.zeros((rows, len(rl.QUANTILES)), np.float32)
    like = rl.Calibrated(rl.init_policy(jax.random.key(0)), quantiles(len(rl.SIGNALS)), quantiles(3))
    return load_state(run.trained / "policy.safetensors", like)[0]


def base_folder(name: str) -> Path:
    """Find a local folder as it is, a hub name downloaded (cached by huggingface_hub). Raises: UserError."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    import huggingface_hub

    files = ["config.json", "model*.safetensors*", "tokenizer.json", "vocab.json", "merges.txt"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub raises many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        advice = "check the name and the connection, log in (hf auth login) if it is gated, or give a folder"
        raise UserError(f"--base {name}: no folder, nor does the hub give it ({reason}); {advice}") from None


def source_of(cfg: Config, held_out: bool) -> data.Source:
    """Say which code to evaluate on, or to train and calibrate on: one repository can't be split into some to
    train on and others that no stage saw, so the standard library stands in for it."""
    own = data.is_one_repository(cfg.data)
    name = "stdlib" if own and not held_out else cfg.data
    return data.Source(name, cfg.files == "all" and not own, cfg.subset, cfg.text_column)


def meta_chunks(cfg: Config) -> int:
    """Say how many chunks a document of meta-learning has."""
    return min(cfg.chunks, dict(zip(SIZES, SCALES[cfg.scale]))["meta_chunks"])


def read_texts(run: Run, skipped: Counter) -> dict[str, list[data.Excerpt]]:
    """Read the documents of the stages to come. Raises: UserError."""
    cfg = run.cfg
    cuts = {
        "meta": data.Cut("train", meta_chunks(cfg), 8, 400 * (not run.trained)),
        "meta_valid": data.Cut("valid", meta_chunks(cfg), 1, 4 * (not run.trained)),
        "train": data.Cut("train", cfg.chunks, 4, cfg.train_documents * (cfg.stage in ("all", "policy"))),
        "valid": data.Cut("valid", cfg.chunks, 1, cfg.valid_documents * (cfg.stage != "ttt")),
        "test": data.Cut("test", cfg.chunks, 1, cfg.test_documents * (cfg.stage in ("all", "eval"))),
    }
    cuts = {name: cut for name, cut in cuts.items() if cut.limit}
    source, end = source_of(cfg, False), run.ends[0]
    repos = data.load_repositories(source, list(cuts.values()), run.tokenizer, cfg.chunk, skipped)
    classes, texts = rl.token_classes(data.token_texts(run.tokenizer)), {}
    for name, cut in cuts.items():
        if name == "test" and data.is_one_repository(cfg.data):
            (own,) = data.load_repositories(source_of(cfg, True), (), None, 0, skipped).values()
            own = data.drop_copies(own, (file for repo in repos.values() for file in repo), skipped)
            found = data.cut_repository(own, run.tokenizer, cfg.chunk, cut, end)
        else:
            found = data.cut_documents(repos, cut, run.tokenizer, cfg.chunk, end)
        features = lambda x: rl.text_features(x.tokens, cfg.chunk, classes)
        texts[name] = [x._replace(text_TU=features(x)) for x in found]
    enough = "test" not in texts or len({x.repo for x in texts["test"]}) > 1
    advice = "use more code, more --test-documents or fewer --chunks"
    require(enough, f"intervals need two test documents of two repositories; {advice}")
    return texts


# --- 8. The run's folder and its checkpoints --------------------------------------------------------
# Settings on which no result depends, or that may change between a run's parts
FREE = {"out", "resume", "mesh_shape", "hosts", "stage", "test_documents", "runs", "action"}


def settings_of(cfg: Config) -> dict[str, Any]:
    """Make what config.json holds."""
    return json.loads(json.dumps(asdict(cfg), default=str))


def choose_folder(cfg: Config) -> Path:
    """Choose the run's folder; nothing is written yet. Raises: UserError if it holds another run, or none to
    resume."""
    runs, out = Path("runs"), cfg.out
    if not out and cfg.resume:
        old = sorted(runs.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        require(old, "--resume: there is no run under runs/ yet; give --out, or leave --resume out")
        out = old[-1].parent
    elif not out:
        taken = [int(path.name) for path in runs.glob("*") if path.name.isdigit()]
        out = runs / f"{max(taken, default=0) + 1:03d}"
    path, now = out / "config.json", settings_of(cfg)
    if not cfg.resume:
        require(not path.exists(), f"{out} already holds a run; give --resume, or choose another --out")
        return out
    require(path.exists(), f"--resume: there is no run in {out}; leave --resume out, or give its folder")
    try:
        before = json.loads(path.read_text())
        changed = sorted(name for name in now.keys() - FREE if now[name] != before.get(name))
        said = ", ".join(f"{name}: {before.get(name)}" for name in changed)
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged; choose another --out") from None
    require(not changed, f"{out} was run with other settings ({said}); repeat them, or choose another --out")
    return out


def claim_folder(cfg: Config, out: Path) -> Path:
    """Make the run's folder and write config.json -> the folder. Of several hosts the first does.
    Raises: UserError if it can't be written."""
    if jax.process_index() == 0:
        try:
            while not (cfg.out or cfg.resume) and out.exists():  # another process has just taken the number
                out = choose_folder(cfg)
            out.mkdir(parents=True, exist_ok=bool(cfg.out or cfg.resume))
            for left in out.glob(".*.*.[0-9]*"):  # half-written files of a run that was killed
                left.unlink()
            data.write_atomic(out / "config.json", (json.dumps(settings_of(cfg), indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"--out {out}: can't write there ({error.strerror}); choose another") from None
    multihost_utils.sync_global_devices("folder")
    shared = (out / "config.json").exists()
    require(shared, f"--out {out}: not seen by every host; put it on a shared disk")
    return out


class Log:
    """metrics.jsonl, a line for each step: opening it for a stage drops that stage's lines after `step`,
    which a resumed run writes again. Only the first of several hosts writes."""

    def __init__(self, out: Path, stage: str, step: int):
        self.path, self.stage = out / "metrics.jsonl", stage
        stays = lambda row: row["stage"] != stage or row["step"] <= step
        kept = list(filter(stays, data.read_lines(self.path)))
        self.rows = [row for row in kept if row["stage"] == stage]
        if jax.process_index() == 0:
            data.write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """Write one step's figures."""
        self.rows.append({"stage": self.stage, "step": step} | {k: float(x) for k, x in figures.items()})
        if jax.process_index() == 0:
            data.append_line(self.path, self.rows[-1])


def checksum(arrays: dict[str, np.ndarray]) -> int:
    """Compute a checksum of named arrays."""
    return reduce(lambda crc, name: zlib.crc32(arrays[name].tobytes(), crc), sorted(arrays), 0)


def save_state(path: Path, state: Any, **meta: Any) -> None:
    """Write a checkpoint, any pytree of arrays that are whole on every device, with `meta` (JSON) said of it.
    Of several hosts the first does, and none goes on before it is there."""
    multihost_utils.sync_global_devices(f"before {path.name}")
    if jax.process_index() == 0:
        arrays = {name: np.asarray(x, order="C") for name, x in lm.flatten(state).items()}
        header = {"ponderttt": json.dumps(meta | {"checksum": checksum(arrays)})}
        data.write_atomic(path, safetensors.numpy.save(arrays, metadata=header))
    multihost_utils.sync_global_devices(f"after {path.name}")


def load_state(path: Path, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Load the pytree saved at `path`, in the structure of `like`, and what was said of it.
    Raises: UserError if the file is damaged or belongs to other settings."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            meta, names = json.loads(file.metadata()["ponderttt"]), file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        arrays, meta = {}, {}
    whole = checksum(arrays) == meta.get("checksum")
    require(whole, f"{path}: damaged, or not a checkpoint of this program; delete it and run again")
    if like is None:
        return arrays, meta
    wanted, shape_of = lm.flatten(like), partial(jax.tree.map, np.shape)
    fits = shape_of(arrays) == shape_of(wanted)
    require(fits, f"{path}: belongs to other settings; choose another --out or --weights")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]), meta


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
        reason, form = str(error).splitlines()[0][:200], "give auto or HOST:PORT,COUNT,INDEX"
        raise UserError(f"--hosts {cfg.hosts}: {form}; hosts didn't meet ({reason})") from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def open_mesh(cfg: Config) -> jax.sharding.Mesh:
    """Make the mesh of --mesh-shape, or of all devices. Raises: UserError if there are no such devices."""
    there = jax.device_count()
    try:
        rows, fsdp = map(int, cfg.mesh_shape.split(",")) if cfg.mesh_shape else (there, 1)
    except ValueError:
        raise UserError(f"--mesh-shape {cfg.mesh_shape}: give two numbers, DATA,FSDP, such as 4,2") from None
    fits = min(rows, fsdp) > 0 and rows * fsdp <= there
    fits = fits and (rows * fsdp == there or jax.process_count() == 1)
    require(fits, f"--mesh-shape {cfg.mesh_shape}: {rows} x {fsdp} devices, and there are {there}")
    return lm.make_mesh(rows, fsdp)


def check_devices(mesh: jax.sharding.Mesh, dtype: str) -> None:
    """Check that these devices compute the meta-gradient that one does, of a small random model.
    Raises: UserError if they don't."""
    shape = f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} of {jax.devices()[0].device_kind}"
    print(f"mesh: {shape}, {jax.process_count()} processes", flush=True)
    width, rng = 16 * mesh.shape["fsdp"], np.random.default_rng(0)
    model, fast = lm.Model(97, 16, width, 2, 2, 2, width // 2, 4 * width, dtype), lm.Fast((1,), 8)
    slow = lm.init_slow(jax.random.key(1), model, fast)
    weights = lm.split_weights(fast, lm.init_params(jax.random.key(0), model), slow)
    batch = rng.integers(0, model.vocab, (mesh.size, 3 * 8 + 1), np.int32), random_actions(rng, mesh.size, 3)
    gradient, found = jax.jit(meta_gradient, static_argnums=0), []
    for some in (mesh, lm.make_mesh(devices=jax.local_devices())):
        placed = lm.place_weights(some, weights), lm.place(some, batch, lm.ROWS)
        found.append(gradient(lm.Spec(model, fast, 8, some), *placed))
    error = lambda x, y: float(np.abs(np.asarray(x) - y).max() / (np.abs(y).max() + 1e-12))
    worst = max(jax.tree.leaves(jax.tree.map(error, found[0], jax.tree.map(np.asarray, found[1]))))
    tolerance = {"float32": 1e-4, "bfloat16": 0.02}[dtype]  # devices add up in another order
    require(worst < tolerance, f"loss or meta-gradient are off by {worst:.1e} from one device's")
    print(f"loss and meta-gradient, {dtype}: as on one device (largest difference {worst:.1e})\nPASS")


def keep_memory() -> None:
    """Have the C library keep what is freed: on a CPU each call of a program takes its memory anew, and
    clearing its pages is up to a quarter of an UPDATE_1's time. Of a GPU's memory take nine tenths."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-3, 1 << 27)  # M_MMAP_THRESHOLD: up to this size memory is the heap's,
        libc.mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD: of which so much may lie idle at its end
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; both at once are refused
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")


def launch(job: Callable[[], None]) -> None:
    """Run a job with a persistent compilation cache; what the user can mend ends in one line and exit code
    2. One of several hosts leaves at once: an orderly exit would wait for the others."""
    keep_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(data.cache_folder())
    jax.config.update("jax_compilation_cache_dir", cache)
    try:
        return job()
    except UserError as error:
        code, text = 2, str(error)
    except OSError as error:
        code, text = 2, f"{error}; once that is mended, the same command with --resume continues"
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        code, text = (
            2,
            "out of memory; lower --chunk, --chunks, --batch or --hidden, or take a smaller --scale",
        )
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            if not jax.distributed.is_initialized():
                raise  # a fault of the program
            text = f"another host stopped, and its own output says why ({str(error).splitlines()[0][:200]})"
    except KeyboardInterrupt:
        code, text = 130, "stopped; the same command with --resume continues, once its run folder was named"
    print(f"\n{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    return os._exit(code) if jax.distributed.is_initialized() else sys.exit(code)


def main() -> None:
    """Do what the command line asks for."""
    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    cfg = tyro.cli(Config, description=__doc__, config=style)

    def run() -> None:
        if cfg.stage == "compare":
            require(cfg.runs, "--stage compare needs --runs A B ...: folders of finished runs")
            return print(evaluation.compare_runs(cfg.runs))
        join_hosts(cfg)
        mesh = open_mesh(cfg)
        if cfg.check_devices:
            return check_devices(mesh, cfg.dtype or native_dtype())
        if cfg.generate or cfg.benchmark:
            return write_text(cfg, lm.make_mesh())
        return run_stages(cfg, mesh)

    launch(run)


if __name__ == "__main__":
    main()
