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

import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
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
Benchmark = Literal["completion", "humaneval", "mbpp", "mbpp-test", "classeval"]


@dataclass(frozen=True)
class Config:
    """All settings. What is left out comes from --scale, or from the weights that are used."""

    stage: Literal["all", "ttt", "policy", "eval", "compare"] = "all"  # What to run; all: ttt, policy, eval.
    scale: Literal["tiny", "125m", "350m", "1b", "xl"] = "tiny"  # Base model and sizes; tiny: any laptop.
    base: str | None = None  # Folder or hub name of a GPT-2, GPT-NeoX or Llama-type model, not the scale's.
    out: Path | None = None  # The run's folder; left out: a new one under runs/.
    resume: bool = False  # Continue the run in --out, or the newest under runs/.
    quick: bool = False  # Every stage in minutes: few steps and documents, where no option says otherwise.
    weights: str | None = None  # A run's folder with trained weights to use, or none: train all of them here.
    seed: int = 0  # Of everything random.
    runs: tuple[Path, ...] = ()  # Of --stage compare: folders of finished runs, compared with the first.

    data: str | None = None  # stdlib, a folder, stack, hub:NAME[@REVISION], a .parquet or .jsonl.
    files: Literal["code", "all"] = "code"  # Of a folder: its code, or all that is text.
    subset: str | None = None  # Of a dataset: a configuration, or one of its folders, such as data/rust.
    text_column: str | None = None  # Of a dataset: the column with the text, if its name isn't a usual one.

    budget: float | None = None  # Cost of a document, SKIP = 1; left out: UPDATE_1 on half of its chunks.
    cost: Literal["nominal", "flops"] = "nominal"  # What actions cost: 1, 3, 6, 12, or compiled FLOPs.
    frontier: tuple[float, ...] = (0.25, 1.0)  # The policy's other budgets: 0 is all SKIP, 1 all UPDATE_1.
    all_methods: bool = False  # Evaluate two more schedules and two more gates.
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


# What a --scale stands for, in this order, where no option says otherwise. `rank` is the `hidden` of lora; a
# document of meta-learning has at most `meta_chunks`: its backward pass keeps W after four steps on each.
SIZES = ("base", "chunk", "hidden", "rank", "meta_chunks", "batch")
SIZES += ("train_documents", "test_documents", "meta_steps", "iterations")
SCALES = {
    "tiny": (str(ASSETS / "tiny"), 256, 256, 16, 24, 8, 64, 12, 100, 3),
    "125m": ("gpt2", 512, 768, 64, 24, 8, 5000, 100, 2000, 625),
    "350m": ("gpt2-medium", 512, 1024, 128, 24, 4, 10000, 100, 2000, 2500),
    "1b": ("gpt2-large", 512, 1280, 256, 16, 2, 20000, 100, 2000, 10000),
    "xl": ("gpt2-xl", 512, 1600, 256, 8, 2, 20000, 100, 2000, 10000),
}
QUICK = {"train_documents": 48, "test_documents": 8, "meta_steps": 20, "iterations": 3}


class Run(NamedTuple):
    """What the stages share."""

    cfg: Config
    out: Path
    spec: lm.Spec
    weights: lm.Weights
    env: rl.Env
    flops_A: np.ndarray  # of the actions on a chunk, relative to SKIP
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
    learned = "none" if cfg.stage == "ttt" else f"learned in this run, {cfg.iterations} iterations"
    facts = [
        f"fast weights: {trained}",
        f"policy: {trained if policy else learned}",
        f"budget of a document: {float(run.env.budget):.6g} {cfg.cost}",
        f"files skipped: {', '.join(f'{n} {why}' for why, n in skipped.items() if n) or 'none'}",
    ]
    title = f"PonderTTT: {cfg.base or cfg.scale} on {cfg.data}; run folder {run.out}"
    plan = plan_run(run)
    parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in plan.items())
    whole = f"about {sum(plan.values()) / 60:.0f} minutes, and compiling: {parts}"
    print("\n  ".join([title, *facts, whole]), flush=True)

    if cfg.stage == "all" and run.trained and (run.trained / "policy.safetensors").exists():
        texts, names = run.texts["test"][:2], ("skip", "update_1", "policy")
        print("A first look, with the policy that is there; then one is trained on this data:")
        look = (run.spec, run.weights, run.env, texts, load_policy(run), (), cfg.seed, names)
        evaluation.evaluate(*look)
    evaluation.PLAN.update(plan)  # from here on each bar says when all is done
    if not run.trained:
        run = run._replace(weights=run.weights._replace(slow=learn_start(run)))
    meta = lm.learner(run.spec.fast, run.weights.suffix)
    lm.save_state(run.out / "ttt.safetensors", run.weights.slow, **meta)
    if cfg.stage in ("all", "policy"):
        policy = learn_policy(run)
    if cfg.stage != "ttt":
        read = (run.spec, run.weights, run.env, policy, run.texts["valid"])
        known = rl.calibrate(policy, evaluation.read_validation(*read))
        lm.save_state(run.out / "policy.safetensors", known)
    if cfg.stage in ("all", "eval"):
        print(evaluate_methods(run, known, facts))
        print(f"report: {run.out / 'report.md'}")


# --- 3. Stage ttt: meta-learn how to learn ----------------------------------------------------------
META_RATE, STEP_RATE = 2e-3, 2e-2  # Adam's, for W_0 and for the logarithms of the step sizes
META_COST = 3  # an outer step costs as much as so many readings of its documents with the same actions
VALIDATE_EVERY = 20  # outer steps


def learn_start(run: Run) -> Any:
    """Meta-learn W_0 and the step sizes through the unrolled inner steps -> both, the slow parameters."""
    cfg, spec, weights, checkpoint = run.cfg, run.spec, run.weights, run.out / "ttt_state.safetensors"
    state, step = (weights.slow, meta_optimizer(cfg.meta_steps).init(weights.slow)), 0
    if cfg.resume and checkpoint.exists():
        state, meta = lm.load_state(checkpoint, state)
        step = meta["step"]
    slow, opt_state = lm.place(spec.mesh, state)
    documents = np.stack([x.tokens for x in run.texts["meta"]])
    bar = evaluation.progress(None, "ttt", total=cfg.meta_steps, initial=step)
    log = data.Log(run.out, "ttt", step)
    while True:
        if step % VALIDATE_EVERY == 0 or step == cfg.meta_steps:
            losses = validate(run, slow)
            if not log.rows or "valid_skip" not in log.rows[-1]:  # if resumed, the line is there
                log.add(step, losses)
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
            lm.save_state(checkpoint, (slow, opt_state), step=step)
        if step >= cfg.meta_steps:
            bar.close()
            return slow
        rng = np.random.default_rng((cfg.seed, 1, step))
        rows = rng.choice(len(documents), cfg.batch, replace=len(documents) < cfg.batch)
        beside = lm.beside(spec, cfg.batch // spec.mesh.size)  # act alike: a step of one is computed for all
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
    in `state[0][0].total_notfinite`."""
    decay = optax.cosine_decay_schedule(-1.0, max(steps, 1), alpha=0.05)  # -1: downhill
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
            losses.append(evaluation.fetch(steps.loss)[: len(group)])  # without copies that fill the last
        found[f"valid_{name}"] = float(np.concatenate(losses).mean())
    return found


# --- 4. Stage policy: learn when to learn -----------------------------------------------------------
def learn_policy(run: Run) -> rl.Policy:
    """Train a policy: a warm start by regression on random actions, then PPO under the budget."""
    cfg, ppo, key = run.cfg, rl.Ppo(credit=credit_every(run.cfg)), jax.random.key(run.cfg.seed)
    trainer = rl.init_trainer(jax.random.fold_in(key, 2), ppo, run.env, cfg.chunks, cfg.features)
    trainer, key = lm.place(run.spec.mesh, trainer), jax.random.fold_in(key, 3)
    checkpoint, read = run.out / "policy_state.safetensors", partial(read_batch, run, ppo)
    warm = range(0, teacher_documents(cfg), cfg.batch)
    if cfg.resume and checkpoint.exists():
        trainer = lm.place(run.spec.mesh, lm.load_state(checkpoint, trainer)[0])
    else:
        lessons = [read(place, trainer.policy, 4, place) for place in evaluation.progress(warm, "warm start")]
        steps, rewards = jax.tree.map(lambda *x: jnp.concatenate(x), *lessons)
        trainer, error = rl.teach(ppo, steps, rewards, trainer, key)
        figures = {"unexplained": error, "gain": rewards.mean(), "cost": steps.cost.mean()}
        data.Log(run.out, "warm_start", -1).add(0, figures)
        lm.save_state(checkpoint, trainer)
    first = int(trainer.iteration)
    bar = evaluation.progress(None, "policy", total=cfg.iterations, initial=first)
    log = data.Log(run.out, "policy", first)
    for step in range(first, cfg.iterations):
        steps, rewards = read((len(warm) + step) * cfg.batch, trainer.policy, 3, 0, step)
        own_key = jax.random.fold_in(key, 1 + step)
        trainer, figures = rl.train_iteration(ppo, run.env, steps, rewards, trainer, own_key)
        log.add(step + 1, figures | {"dropped_documents": cfg.batch - len(rewards)})
        lm.save_state(checkpoint, trainer)
        bar.set_postfix({name: f"{log.rows[-1][name]:.3f}" for name in ("loss", "gain", "cost", "lambda")})
        bar.update()
    bar.close()
    return trainer.policy


def teacher_documents(cfg: Config) -> int:
    """Say how many documents the policy's warm start reads: at most 64, and half of the train documents."""
    return min(64, -(-cfg.train_documents // 2))


def credit_every(cfg: Config) -> int:
    """Say of which chunks the loss is credited to the updates before it: of every n-th -> n."""
    return max(cfg.chunks // 8, 1)


def read_batch(run: Run, ppo: rl.Ppo, place: int, policy: rl.Policy, *seed: int) -> tuple[rl.Step, Any]:
    """Roll the policy out on the --batch training documents from `place` on -> (steps, rewards). Places go on
    through one shuffle of all after another; --seed and `seed` draw the actions. Documents in which learning
    ran away are left out: one would make the whole batch NaN. Raises: UserError if none is left."""
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
    what = run.spec, run.weights, run.env, texts, known, budgets, cfg.seed, chosen_methods(cfg)
    found = evaluation.evaluate(*what)
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
    dropped = sum(read.dropped for reads in found.reads.values() for read in reads)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss is in bytes there, else in KiB
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    results["facts"] = [
        *facts,
        f"FLOPs relative to SKIP: {', '.join(f'{x:.2f}' for x in run.flops_A)}",
        f"{run.spec.mesh.size} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {cfg.dtype}",
        f"jax {jax.__version__}; evaluated in {time.perf_counter() - started:.0f} s; up to {memory:.2f} GB",
        f"inner steps that were not finite, and not taken: {dropped}",
    ]
    if jax.process_index():  # the first host writes
        return ""
    data.write_atomic(run.out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    return evaluation.write_report(run.out, results, found.reads)


def chosen_methods(cfg: Config) -> list[str]:
    """List the methods to evaluate."""
    return [name for name in evaluation.METHODS if cfg.all_methods or name not in evaluation.MORE]


# --- 6. How long it will take -----------------------------------------------------------------------
def plan_run(run: Run) -> dict[str, float]:
    """Estimate how long the parts of a run will take -> {part: seconds}, compiling apart.
    Reading one document with SKIP is timed; a part takes as many such `readings` as its FLOPs make up."""
    cfg, texts, update_1, all_four = run.cfg, run.texts, run.flops_A[1], run.flops_A.sum()
    group = evaluation.group_documents(run.spec, [*texts.values()][-1])[0]
    never = rl.make_rule(rl.follow, rl.init_policy(jax.random.key(0)), plan_T=0)
    for _ in range(2):  # the first time compiles
        document, below = evaluation.time_call(evaluation.prepare, run.spec, run.weights, group)
        args = run.spec, run.weights, run.env, never, document, 0
        _, above = evaluation.time_call(evaluation.run_rule, *args)
    share = below / (below + above)  # of the prefix, which runs once for all methods
    credit = cfg.chunks / 2 * (1 - share)  # each chunk again under all W before it: T / 2, on average
    sampled, readings = update_1 + credit / credit_every(cfg), {}  # sampled: with actions of the policy
    if "meta" in texts:
        checks = (cfg.meta_steps // VALIDATE_EVERY + 1) * len(texts["meta_valid"]) * all_four
        readings["ttt"] = cfg.meta_steps * cfg.batch * META_COST * all_four / 4 + checks
    if "train" in texts:
        readings["warm start"] = teacher_documents(cfg) * sampled
        readings["policy"] = cfg.iterations * cfg.batch * sampled
    if "valid" in texts:
        readings["calibration"] = len(texts["valid"]) * update_1
    if "test" in texts:
        count = len(chosen_methods(cfg)) + len(cfg.frontier)
        methods = all_four + (count - 4) * update_1 - (count - 1) * share  # one prefix for all
        readings["test documents"] = len(texts["test"]) * (methods + credit)
    seconds = (below + above) / len(document.text_TU)
    return {name: x * seconds for name, x in readings.items()}


# --- 7. Writing and benchmarks ----------------------------------------------------------------------
def continue_prompt(cfg: Config) -> None:
    """Continue --prompt, having learned from --context and from the prompt. Raises: UserError."""
    require(cfg.prompt is not None, "--generate needs --prompt TEXT")
    writer, context = open_writer(cfg)
    writer = evaluation.take_action(writer, (*cfg.action, "policy")[0])
    shown = 0

    def show(rows: list[evaluation.Row]) -> None:  # a single text as it is written
        nonlocal shown
        text = rows[0].text if rows[0].ended else rows[0].text.rstrip("\N{REPLACEMENT CHARACTER}")
        if cfg.samples == 1:
            print(text[shown:], end="", flush=True)
            shown = max(shown, len(text))

    (rows,) = evaluation.write(writer, evaluation.begin(writer, context), [cfg.prompt], show)
    for i, row in enumerate(rows):
        print("" if len(rows) == 1 else f"--- {i + 1}\n{row.text}")
    taken = Counter(rl.ACTIONS[action] for action in rows[0].actions)
    learned = ", ".join(f"{n} {name}" for name, n in taken.items())
    print(f"learned from the context and the prompt: {learned or 'nothing'}", file=sys.stderr)


def complete_functions(cfg: Config) -> None:
    """Complete functions of --data, having learned from its other files. Raises: UserError."""
    out, (writer, _) = choose_folder(cfg), open_writer(cfg)
    cuts = [data.Cut("test", 2 * cfg.chunks, 1, cfg.test_documents)]  # a part of each is held out
    repos = data.load_repositories(source_of(cfg), cuts, writer.tokenizer, cfg.chunk, Counter())
    tasks = data.completion_tasks(repos, writer.tokenizer, cfg.chunk, cfg.chunks, cfg.test_documents)
    actions = cfg.action or ("skip", "update_1", "policy")
    print(evaluation.run_completion(writer, tasks, actions, claim_folder(cfg, out)))


def solve_problems(cfg: Config) -> None:
    """Answer a benchmark's problems, or take the answers of --solutions, and judge them by running them."""
    risk = "this runs code that a model wrote, confined with no guarantee, best in a container"
    require(cfg.allow_code_execution, f"{risk}: add --allow-code-execution to go on")
    one = bool(cfg.solutions) != bool(cfg.action)
    require(one, "--benchmark needs --action (write answers) or --solutions (judge given ones)")
    problems = data.load_problems(cfg.benchmark, cfg.benchmark_file)[: cfg.test_documents]
    out = choose_folder(cfg)
    if cfg.solutions:
        out = claim_folder(cfg, out)
        data.copy_solutions(problems, cfg.solutions, out / "answers.jsonl")
    else:
        writer, context = open_writer(cfg)
        out = claim_folder(cfg, out)
        evaluation.write_answers(writer, problems, cfg.action, context, out / "answers.jsonl")
    print(f"isolation: {evaluation.isolation()}", flush=True)
    print(evaluation.judge_answers(problems, out))


def open_writer(cfg: Config) -> tuple[evaluation.Writer, list[int]]:
    """Load the model with what was trained -> (a writer, the tokens of --context). Raises: UserError."""
    run = open_run(replace(cfg, resume=False), Path(), lm.make_mesh())
    if not run.trained:
        print("note: no trained fast weights for these settings; untrained ones will learn", file=sys.stderr)
    there = run.trained and (run.trained / "policy.safetensors").exists()
    env = run.env._replace(budget=run.env.budget / cfg.chunks)  # of one chunk
    text = run.tokenizer, run.ends, rl.token_classes(data.token_texts(run.tokenizer))
    writer = evaluation.Writer(run.spec, run.weights, env, *text, load_policy(run) if there else None)
    options = {"samples": cfg.samples, "temperature": cfg.temperature, "max_new_tokens": cfg.max_new_tokens}
    writer = writer._replace(seed=cfg.seed, **options)
    source = data.Source(str(cfg.context), cfg.files == "all")
    repos = data.load_repositories(source, (), None, 0, Counter()) if cfg.context else {}
    files = [file for repo in repos.values() for file in repo]
    _, context = data.read_tokens(files, writer.tokenizer, cfg.chunks * cfg.chunk)
    return writer, context[: cfg.chunks * cfg.chunk]


# ======================================== plumbing ==================================================
# --- 8. Settings filled in, weights and documents ---------------------------------------------------
USUAL = {scale: dict(zip(SIZES, sizes)) for scale, sizes in SCALES.items()}
MOST = 2**31 - 1  # of any number; the least is 1. But for these:
RANGES = dict.fromkeys(("seed", "meta_steps", "iterations"), (0, MOST)) | {"chunks": (2, MOST)}
RANGES |= {"momentum": (0, 0.999), "temperature": (0, 100), "budget": (1, 1e30)}
BRIEF, WHOLE = 6, 24  # test documents at tiny: of --stage eval alone, and of one's own repository


def fill_in(cfg: Config, devices: int) -> Config:
    """Fill in the settings that were left out. Raises: UserError if one is out of range."""
    own, tiny = data.is_one_repository(cfg.data or ""), cfg.scale == "tiny"
    if own and tiny and cfg.stage == "all" and cfg.weights is None and cfg.base is None:
        cfg = replace(cfg, stage="eval")
    usual = USUAL[cfg.scale] | {"dtype": lm.native_dtype(), "data": "stdlib" if tiny else "stack"}
    usual["batch"] += -usual["batch"] % devices  # rounded up
    if tiny and cfg.stage == "eval":
        usual["test_documents"] = WHOLE if own else BRIEF
    usual |= QUICK if cfg.quick else {}
    if cfg.benchmark not in (None, "completion"):
        usual["test_documents"] = None  # all problems
    usual["temperature"] = 0.8 if cfg.samples > 1 else 0.0
    later = "base", "hidden", "rank", "meta_chunks"  # looked up where they are used
    left_out = [name for name in usual if name not in later and getattr(cfg, name) is None]
    cfg = replace(cfg, **{name: usual[name] for name in left_out})
    for name, value in vars(cfg).items():
        low, high = RANGES.get(name, (1, MOST))
        fits = type(value) not in (int, float) or low <= value <= high
        require(fits, f"--{name.replace('_', '-')} {value}: must be {low} to {high:,}")
    require(all(0 <= share <= 1000 for share in cfg.frontier), "--frontier: shares must be 0 to 1000")
    require(cfg.batch % devices == 0, f"--batch {cfg.batch}: must be a multiple of the {devices} devices")
    require(cfg.temperature or cfg.samples == 1, "--samples: at --temperature 0 all would be the same")
    require(cfg.context is None or cfg.context.is_dir(), f"--context {cfg.context}: no such folder")
    return cfg


def open_run(cfg: Config, out: Path, mesh: jax.sharding.Mesh, skipped: Counter | None = None) -> Run:
    """Load the model, its weights and, where `skipped` counts what is left out, the documents.
    All that can be wrong with the input shows here. Raises: UserError."""
    folder = lm.find_model(cfg.base or USUAL[cfg.scale]["base"])
    model, params = lm.load_model(folder, cfg.dtype)
    tokenizer = data.load_tokenizer(folder)
    ends, known = data.end_tokens(folder, tokenizer), max(tokenizer.get_vocab().values()) < model.vocab
    require(known, f"{folder}: its tokenizer has tokens that its model lacks")
    fits = 2 * cfg.chunk <= model.positions
    require(fits, f"--chunk {cfg.chunk}: two chunks must fit the model's {model.positions} positions")
    trained = find_weights(cfg, out)
    fast = choose_fast(cfg, trained, model, params)
    spec = lm.Spec(model, fast, cfg.chunk, mesh)
    slow = lm.init_slow(jax.random.key(cfg.seed), model, fast)
    spec = spec._replace(together=lm.fit_documents(spec, slow, meta_chunks(cfg)))
    if trained:
        slow, _ = lm.load_state(trained / "ttt.safetensors", slow)
    weights = lm.split_weights(fast, params, slow)
    flops_A = lm.count_flops(spec, weights)
    flops_A = flops_A / flops_A[0]
    costs_A = np.asarray(rl.NOMINAL if cfg.cost == "nominal" else flops_A, np.float32)
    least, middle = cfg.chunks * costs_A[0], cfg.chunks * (costs_A[0] + costs_A[1]) / 2
    budget = np.float32(middle if cfg.budget is None else cfg.budget)
    why = f"reading a document costs {least:g}; {middle:g} pays for half of UPDATE_1's learning too"
    require(least <= budget, f"--budget {budget:g}: {why}")
    weights, env = lm.place_weights(mesh, weights), lm.place(mesh, rl.Env(costs_A, budget))
    run = Run(cfg, out, spec, weights, env, flops_A, tokenizer, ends, {}, trained)
    if skipped is not None:
        run.texts.update(read_texts(run, skipped))
    return run


def meta_chunks(cfg: Config) -> int:
    """Say how many chunks a document of meta-learning has."""
    return min(cfg.chunks, USUAL[cfg.scale]["meta_chunks"])


FAST_OPTIONS = {"fast": "kind", "hidden": "hidden", "objective": "objective", "inner_optimizer": "optimizer"}
FAST_OPTIONS |= {"momentum": "momentum", "fast_blocks": "blocks"}  # options, and what they are called in Fast


def find_weights(cfg: Config, out: Path) -> Path | None:
    """Find the folder of trained fast weights: a resumed run's own, that of --weights, or assets/tiny where
    no option asks for others; None: they are to be trained."""
    if cfg.resume and (out / "ttt.safetensors").exists():
        return out
    training = cfg.stage == "ttt" or (cfg.resume and (out / "ttt_state.safetensors").exists())
    if training or cfg.weights == "none":
        return None
    other = cfg.base or cfg.scale != "tiny" or cfg.chunk != USUAL["tiny"]["chunk"]
    other = other or any(getattr(cfg, name) not in (None, ()) for name in FAST_OPTIONS)
    return None if other and not cfg.weights else Path(cfg.weights or ASSETS / "tiny").expanduser()


def choose_fast(cfg: Config, trained: Path | None, model: lm.Model, params: lm.Params) -> lm.Fast:
    """Say what learns: what the options ask for, or what trained weights bring along.
    Raises: UserError if the two contradict each other, or the weights belong to another model."""
    asked = {field: x for name, field in FAST_OPTIONS.items() if (x := getattr(cfg, name)) not in (None, ())}
    there = all(-model.layers <= block < model.layers for block in cfg.fast_blocks)
    require(there, f"--fast-blocks {cfg.fast_blocks}: blocks are 0 to {model.layers - 1}")
    if cfg.fast_blocks:
        asked["blocks"] = tuple(sorted({block % model.layers for block in cfg.fast_blocks}))
    if trained is None:
        first, size = model.layers - max(model.layers // 4, 1), "rank" if cfg.fast == "lora" else "hidden"
        usual = {"blocks": tuple(range(first, model.layers)), "momentum": 0.3}
        return lm.Fast(**(usual | {"hidden": USUAL[cfg.scale][size]} | asked))
    return lm.trained_fast(trained / "ttt.safetensors", asked, params)


def load_policy(run: Run) -> rl.Calibrated:
    """Load the policy that belongs to the fast weights. Raises: UserError if there is none."""
    missing = "no trained policy for these settings; run the other stages first"
    require(run.trained and (run.trained / "policy.safetensors").exists(), missing)
    quantiles = lambda rows: np.zeros((rows, len(rl.QUANTILES)), np.float32)  # 3: as in `Calibrated`
    like = rl.Calibrated(rl.init_policy(jax.random.key(0)), quantiles(len(rl.SIGNALS)), quantiles(3))
    return lm.load_state(run.trained / "policy.safetensors", like)[0]


def source_of(cfg: Config) -> data.Source:
    """Say where the code comes from; of one repository always the code alone."""
    everything = cfg.files == "all" and not data.is_one_repository(cfg.data)
    return data.Source(cfg.data, everything, cfg.subset, cfg.text_column)


def read_texts(run: Run, skipped: Counter) -> dict[str, list[data.Excerpt]]:
    """Read the documents of the stages to come. Raises: UserError."""
    cfg, short = run.cfg, meta_chunks(run.cfg)
    cuts = {
        "meta": data.Cut("train", short, per_repo=8, limit=400 * (not run.trained)),
        "meta_valid": data.Cut("valid", short, 1, 4 * (not run.trained)),
        "train": data.Cut("train", cfg.chunks, 4, cfg.train_documents * (cfg.stage in ("all", "policy"))),
        "valid": data.Cut("valid", cfg.chunks, 1, cfg.valid_documents * (cfg.stage != "ttt")),
        "test": data.Cut("test", cfg.chunks, 1, cfg.test_documents * (cfg.stage in ("all", "eval"))),
    }
    cuts = {name: cut for name, cut in cuts.items() if cut.limit}
    texts = data.load_documents(source_of(cfg), cuts, run.tokenizer, cfg.chunk, run.ends[0], skipped)
    classes = rl.token_classes(data.token_texts(run.tokenizer))
    add_features = lambda x: x._replace(text_TU=rl.text_features(x.tokens, cfg.chunk, classes))
    return {name: list(map(add_features, found)) for name, found in texts.items()}


# --- 9. The run's folder ----------------------------------------------------------------------------
# Settings on which no result depends, or that may change between a run's parts
FREE = {"out", "resume", "mesh_shape", "hosts", "stage", "test_documents", "runs", "action"}


def choose_folder(cfg: Config) -> Path:
    """Choose the run's folder: --out, or under runs/ the newest for --resume, else the next number. Nothing
    is written yet. Raises: UserError if it holds a run to keep, or no run of these settings to resume."""
    runs = Path("runs")
    require(cfg.out or jax.process_count() == 1, "several hosts need --out, a folder that all of them see")
    old = sorted(runs.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    taken = [int(path.name) for path in runs.glob("*") if path.name.isdigit()]
    new = runs / f"{max(taken, default=0) + 1:03d}"
    out = cfg.out or (old[-1].parent if cfg.resume and old else new)
    path = out / "config.json"
    if not cfg.resume:
        require(not path.exists(), f"{out} already holds a run; give --resume, or choose another --out")
        return out
    require(path.exists(), f"--resume: there is no run in {out}; give its folder, or leave --resume out")
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} is damaged; choose another --out") from None
    now = json.loads(json.dumps(asdict(cfg), default=str))
    changed = [name for name in sorted(now.keys() - FREE) if now[name] != before.get(name)]
    said = ", ".join(f"{name}: {before.get(name)}" for name in changed)
    require(not said, f"{out} was run with other settings ({said}); repeat them, or choose another --out")
    return out


def claim_folder(cfg: Config, out: Path) -> Path:
    """Make the chosen folder, or the next if another process has just taken its number, and write config.json
    -> the folder. Raises: UserError if it can't be written."""
    given, settings = bool(cfg.out or cfg.resume), json.dumps(asdict(cfg), indent=2, default=str)
    try:
        while not given and out.exists():
            out = choose_folder(cfg)
        out.mkdir(parents=True, exist_ok=given)
        data.write_atomic(out / "config.json", f"{settings}\n".encode())
    except OSError as error:
        raise UserError(f"--out {out}: can't write there ({error.strerror}); choose another") from None
    multihost_utils.sync_global_devices("folder")
    require((out / "config.json").exists(), f"--out {out}: not every host sees it; put it on a shared disk")
    return out


# --- 10. The command line ---------------------------------------------------------------------------
def launch(job: Callable[[], None]) -> None:
    """Run a job with a persistent compilation cache; what the user can mend ends in one line and exit code
    2. One of several hosts leaves at once: an orderly exit would wait for the others."""
    lm.keep_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ponderttt")
    jax.config.update("jax_compilation_cache_dir", jax.config.jax_compilation_cache_dir or cache)
    code, several = 2, jax.distributed.is_initialized
    try:
        return job()
    except UserError as error:
        text = str(error)
    except OSError as error:
        text = f"{error}; once that is mended, the same command with --resume continues"
    except KeyboardInterrupt:
        code, text = 130, "stopped; the same command with --resume continues, once its run folder was named"
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        text = "out of memory; lower --chunk, --chunks, --batch or --hidden, or take a smaller --scale"
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            if not several():
                raise  # a fault of the program
            text = f"another host stopped, and its own output says why ({str(error).splitlines()[0][:200]})"
    print(f"\n{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    return os._exit(code) if several() else sys.exit(code)


def find_devices() -> None:
    """Let JAX find its devices, and beside them a CPU, which counts FLOPs. Raises: UserError if those that
    JAX_PLATFORMS names are not there."""
    asked, reason = jax.config.jax_platforms, "there is no such device"
    more = asked and "cpu" not in asked.split(",")
    jax.config.update("jax_platforms", f"{asked},cpu" if more else asked)
    try:
        found = jax.devices()[0].platform != "cpu" or not more
    except RuntimeError as error:
        found, reason = False, " ".join(str(error).split())[:150]
    require(found, f"JAX_PLATFORMS={asked}: {reason}; unset it, or install JAX for that device")


def work(cfg: Config) -> None:
    """Do what the settings ask for."""
    if cfg.stage == "compare":
        print(evaluation.compare_runs(cfg.runs))
        return
    if cfg.hosts:
        lm.join_hosts(cfg.hosts)
    find_devices()
    mesh = lm.open_mesh(cfg.mesh_shape)
    if cfg.check_devices:
        lm.check_devices(mesh, cfg.dtype or lm.native_dtype(), meta_gradient)
    elif cfg.generate or cfg.benchmark:
        write = {None: continue_prompt, "completion": complete_functions}.get(cfg.benchmark, solve_problems)
        write(fill_in(replace(cfg, stage="eval"), 1))
    else:
        run_stages(cfg, mesh)


def main() -> None:
    """Run the command line."""
    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    cfg = tyro.cli(Config, description=__doc__, config=style)
    launch(partial(work, cfg))


if __name__ == "__main__":
    main()
