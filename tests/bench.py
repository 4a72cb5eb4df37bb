"""Measure speed: beside PyTorch where it is installed, beside the FLOPs that are needed, and over length.

    python tests/bench.py                        all rows, on the shipped model: a Markdown table
    python tests/bench.py --scale 125m --only update mfu
    python tests/bench.py --only trace           how large the programs of 125m and xl are, without weights

Scales above tiny have random weights unless --base names a model: they are as fast as any. Seconds are
medians of calls taken in turn, in random order; on one core (taskset -c 0) they are this process's own.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(sys.path[0]) / "assets" / "tiny"))
import pretrain

import data
import eval as evaluation
import model as lm
import ponder
import rl

Part = Literal["prefill", "update", "decode", "mfu", "skip", "features", "growth", "cold", "first", "trace"]
SHAPES = {"125m": (768, 12, 12), "350m": (1024, 24, 16), "1b": (1280, 36, 20), "xl": (1600, 48, 25)}


@dataclasses.dataclass(frozen=True)
class Speed:
    """All settings."""

    only: tuple[Part, ...] = ()  # Which parts; left out: all; first is what cold runs.
    scale: ponder.Size | None = None  # Left out: tiny, and for trace 125m and xl.
    base: str | None = None  # Folder or hub name of a model, instead of the scale's.
    dtype: Literal["float32", "bfloat16"] | None = None  # Of products; left out: what the hardware does fast.
    chunk: int | None = None  # Tokens of a chunk.
    batch: int | None = None  # Windows of the prefill, documents of the meta-step.
    chunks: int = 24  # Chunks of a document.
    repeats: int = 15  # How often each is timed at most; fewer where it takes long, but three times.
    out: Path | None = None  # A folder for bench.json.


class Bench(NamedTuple):
    """What is measured: a model with its fast weights, on one device."""

    cfg: ponder.Config
    spec: lm.Spec
    weights: lm.Weights
    params: lm.Params  # all of the frozen model
    repeats: int


class Row(NamedTuple):
    """A line of the table."""

    what: str
    ours: str
    beside: str
    ratio: float | None = None  # beside another program: above 1 ours is faster
    wanted: str = ""
    difference: float | None = None  # of both programs' results, relative to the largest


def config_of(options: Speed, scale: ponder.Size) -> ponder.Config:
    """Make the settings of ponder.py that these options stand for. Raises: UserError."""
    sizes = {name: getattr(options, name) for name in ("base", "dtype", "chunk", "batch", "chunks")}
    return ponder.fill_in(ponder.Config(scale=scale, **sizes), 1)


def shape_of(cfg: ponder.Config) -> lm.Model:
    """The shape of the scale's GPT-2."""
    D, layers, heads = SHAPES.get(cfg.scale, (0, 0, 1))
    model = lm.Model(50257, 1024, D, layers, heads, heads, D // heads, 4 * D)
    return (model if D else pretrain.TINY)._replace(dtype=cfg.dtype)


def open_bench(cfg: ponder.Config, repeats: int, model: lm.Model | None = None, params: Any = None) -> Bench:
    """Open the model that is given, or else that of the settings, with fast weights that all get a gradient.
    Raises: UserError if two chunks don't fit the model, or it can't be read."""
    if model is None and (cfg.base or cfg.scale == "tiny"):
        model, params = lm.load_model(ponder.base_folder(cfg.base or ponder.SCALES["tiny"].base), cfg.dtype)
    elif model is None:
        params = lm.init_params(jax.random.key(0), model := shape_of(cfg))
    fits = 2 * cfg.chunk <= model.positions
    data.require(fits, f"--chunk {cfg.chunk}: two chunks must fit the model's {model.positions} positions")
    fast, mesh, key = ponder.fast_of_options(cfg, model), lm.make_mesh(), jax.random.key(1)
    slow = lm.init_slow(key, model, fast)
    slow["start"] = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), slow["start"])
    weights = lm.place_weights(mesh, lm.split_weights(fast, lm.freeze(model, params), slow))
    blocks = *weights.prefix["blocks"], *weights.suffix["blocks"]
    whole = weights.prefix | {"blocks": blocks}
    return Bench(cfg, lm.Spec(model, fast, cfg.chunk, mesh), weights, whole, repeats)


def cores() -> int:
    """Count the cores that this process computes on; 0 on an accelerator."""
    return len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 0


def measure(repeats: int, runs: dict[str, Callable[[], Any]], patience: float = 60) -> dict[str, float]:
    """Time functions in turn, after one call of each -> median seconds by name."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    jax.block_until_ready([run() for run in runs.values()])
    clock = time.process_time if cores() == 1 else time.perf_counter
    started, rng = clock(), np.random.default_rng(0)
    while len(samples[min(runs)]) < (repeats if clock() - started < patience else min(repeats, 3)):
        for name in rng.permutation(list(runs)):
            start = clock()
            jax.block_until_ready(runs[name]())
            samples[name].append(clock() - start)
    return {name: float(np.median(x)) for name, x in samples.items()}


def random_documents(b: Bench, count: int, chunks: int) -> tuple[Any, Any]:
    """Tokens (N, T*C + 1) and text features (N, T, 16), of noise, on the device."""
    tokens = random_tokens(b, count, chunks * b.spec.chunk + 1)
    text = np.random.default_rng(1).random((count, chunks, 16), np.float32)
    return lm.place(b.spec.mesh, (tokens, text))


def random_tokens(b: Bench, *shape: int) -> np.ndarray:
    """Draw tokens: the same ones for the same shape."""
    return np.random.default_rng(0).integers(0, b.spec.model.vocab, shape, np.int32)


def second_window(b: Bench) -> lm.Window:
    """Make the window of a random document's second chunk, which has its whole context."""
    tokens = random_tokens(b, 2 * b.spec.chunk + 1)
    windows = jax.jit(lm.make_windows, static_argnums=0)(b.spec, b.weights, tokens)
    return jax.tree.map(lambda x: x[1], windows)


def count_flops(function: Callable, *args) -> float:
    """Count a function's floating-point operations, as XLA does."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def beside_torch(b: Bench, what: str, work: float, ours, make, error, kinds=("eager", "compiled")):
    """Rows of `work` per second, ours and PyTorch's: make(compile) gives its function, and error(our result,
    its result) how far they are apart."""
    if importlib.util.find_spec("torch") is None:
        return [Row(what, "", "PyTorch is not installed")]
    import torch

    torch.set_num_threads(max(cores(), 1))
    torch.set_float32_matmul_precision("highest" if cores() else "high")  # JAX too takes TF32 there
    runs, errors, rows = {"ours": ours}, {}, []
    for kind in kinds:
        try:
            run = make(torch.compile if kind == "compiled" else lambda function: function)
            errors[kind], runs[kind] = error(ours(), run()), run
        except Exception as problem:  # of many kinds: its compiler needs one for C++, say
            rows.append(Row(f"{what}, PyTorch {kind}", "", f"fails: {type(problem).__name__}"))
    seconds = measure(b.repeats, runs)
    for kind, apart in errors.items():
        both, ratio = [f"{work / seconds[x]:.4g}" for x in ("ours", kind)], seconds[kind] / seconds["ours"]
        rows.append(Row(f"{what}, PyTorch {kind}", *both, ratio, "at least 1", apart))
    return rows


def torch_device() -> str:
    """PyTorch's name of the kind of device that JAX computes on."""
    return "cpu" if cores() else "cuda"


def torch_model(b: Bench, dtype: str) -> Any:
    """Load the same model into `transformers`."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        if b.spec.model.rotary:
            folder = ponder.base_folder(b.cfg.base)
        else:
            pretrain.save_gpt2(Path(folder), b.spec.model, b.params, np.float32)
        net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return net.to(torch_device()).eval()


def bench_prefill(b: Bench) -> list[Row]:
    """The loss of a batch of windows."""
    tokens = random_tokens(b, b.cfg.batch, 2 * b.spec.chunk + 1)
    loss = jax.jit(partial(lm.language_loss, b.spec.model))

    def make(wrap):
        import torch

        net = wrap(torch_model(b, b.spec.model.dtype))
        x = torch.tensor(tokens, dtype=torch.long, device=torch_device())

        @torch.no_grad()
        def run():
            logits = net(x[:, :-1], use_cache=False).logits.float().flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten()).item()

        return run

    what = f"tokens/s, prefill and loss of {len(tokens)} x {2 * b.spec.chunk} tokens"
    error = lambda ours, theirs: abs(float(ours) / theirs - 1)
    return beside_torch(b, what, tokens[:, 1:].size, lambda: loss(b.params, tokens), make, error)


def bench_update(b: Bench) -> list[Row]:
    """UPDATE_1 on one chunk; both programs have the frozen prefix's activations."""
    rows = []
    for kind in ("swiglu", "lora"):
        own = open_bench(dataclasses.replace(b.cfg, fast=kind), b.repeats, b.spec.model, b.params)
        rows += beside_torch(own, f"steps/s, UPDATE_1 of a chunk, {kind}", 1, *update_pair(own))
    return rows


def update_pair(b: Bench) -> tuple[Callable, Callable, Callable]:
    """Our UPDATE_1, the maker of PyTorch's, and how far apart are the change in the weights and the loss."""
    window, state = second_window(b), lm.init_state(b.spec.fast, b.weights.slow)
    if b.spec.fast.momentum:
        state = state._replace(momentum=state.w)  # as if steps had been taken, so that it counts

    @jax.jit
    def step(weights, state, window):
        reading, _, first = lm.differentiate(b.spec, weights, state.w, window)
        return reading.loss, lm.inner_step(b.spec, weights.slow, state, first(), 0).w

    def error(ours, theirs) -> float:
        apart = [abs(float(ours[0]) / theirs[0] - 1)]
        for name, old in lm.flatten(state.w).items():
            mine = np.asarray(lm.flatten(ours[1])[name] - old)
            other = theirs[1][name].float().cpu().numpy() - np.asarray(old)
            apart.append(np.abs(mine - other).max() / np.abs(mine).max())
        return float(max(apart))

    return lambda: step(b.weights, state, window), partial(torch_step, b, state, window), error


def torch_step(b: Bench, state: lm.State, window: lm.Window, wrap: Callable) -> Callable[[], Any]:
    """UPDATE_1 of a GPT-2 with swiglu adapters or lora, by next_token and muon, as model.py has it, on a
    window with its whole context -> a function that gives (loss, new weights by name)."""
    import torch
    import torch.nn.functional as F

    model, fast, C, w_0 = b.spec.model, b.spec.fast, b.spec.chunk, lm.flatten(state.w)
    put = lambda x: torch.tensor(np.asarray(x, np.float32), device=torch_device())
    frozen = lambda x: put(x).to(getattr(torch, model.dtype)) if x.ndim == 2 else put(x)
    suffix = [jax.tree.map(frozen, p) for p in b.weights.suffix["blocks"]]
    final, head = jax.tree.map(put, b.weights.suffix["norm"]), frozen(b.weights.suffix["embed"]["weight"])
    start = {name: put(x) for name, x in w_0.items()}
    momentum = [fast.momentum * put(x) for x in jax.tree.leaves(state.momentum)] or [0.0] * len(w_0)
    fall = jax.lax.rsqrt(1 + jnp.exp(b.weights.slow["log_anneal"]) * state.steps)
    sizes = [float(jnp.exp(x[0]) * fall) for x in jax.tree.leaves(b.weights.slow["log_step"])]
    x_SD, normed_SD = put(window.x_SD), None if window.normed_SD is None else put(window.normed_SD)
    targets = torch.tensor(np.asarray(window.targets_C), dtype=torch.long, device=torch_device())
    visible = torch.ones(C, 2 * C, dtype=torch.bool, device=torch_device()).tril(C)
    norm = lambda p, x: F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], model.eps)
    dense = lambda p, x: torch.addmm(p["bias"], x, p["weight"])
    heads = lambda x: x.unflatten(-1, (model.heads, -1)).transpose(0, 1)[None]

    def block(p, x, last, lora):
        rows, normed, attn = slice(C, None) if last else slice(None), norm(p["norm_1"], x), p["attn"]
        q, k, v = dense(attn["q"], normed[rows]), dense(attn["k"], normed), dense(attn["v"], normed)
        if lora:
            q = q + normed[rows] @ lora["q_down"] @ lora["q_up"]
            v = v + normed @ lora["v_down"] @ lora["v_up"]
        mask = {"attn_mask": visible} if last else {"is_causal": True}
        mixed = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **mask)
        x = x[rows] + dense(attn["o"], mixed[0].transpose(0, 1).flatten(1))
        normed = norm(p["norm_2"], x)
        hidden = F.gelu(dense(p["mlp"]["up"], normed), approximate="tanh")
        return x + dense(p["mlp"]["down"], hidden), normed

    def loss_of(w):
        x, normed = x_SD, normed_SD
        for i, p in enumerate(suffix, fast.blocks[0]):
            m = fast.blocks.index(i) if i in fast.blocks else None
            own = {} if m is None else {name[9:]: w[name][m] for name in w if name != "bias"}
            if i > fast.blocks[0] or normed is None:
                x, normed = block(p, x, i == model.layers - 1, own if fast.kind == "lora" else {})
            if "w0" in own:
                x = x + (F.silu(normed @ own["w0"]) * (normed @ own["w2"])) @ own["w1"]
        return F.cross_entropy((F.linear(norm(final, x), head) + w["bias"]).float(), targets)

    def direction(g):
        x, (p, q, r) = g * torch.rsqrt((g * g).sum((-2, -1), keepdim=True) + 1e-20), lm.NEWTON_SCHULZ
        x = x.mT if (tall := x.shape[-2] > x.shape[-1]) else x
        for _ in range(lm.ITERATIONS):
            xx = x @ x.mT
            x = p * x + (q * xx + r * (xx @ xx)) @ x
        return x.mT if tall else x

    def learn(w, gradients):
        moves = [size * direction(m + g) for size, m, g in zip(sizes, momentum, gradients)]
        return {name: w[name] - move for name, move in zip(w, moves)}

    loss_of, learn = wrap(loss_of), wrap(learn)

    def run():
        w = {name: x.detach().requires_grad_() for name, x in start.items()}
        with torch.autocast(torch_device(), torch.bfloat16, enabled=model.dtype == "bfloat16"):
            loss = loss_of(w)
            gradients = torch.autograd.grad(loss, list(w.values()))
            with torch.no_grad():
                new = learn(w, gradients)
        return loss.item(), new  # which waits for the device

    return run


def bench_decode(b: Bench) -> list[Row]:
    """The most likely tokens after a prompt, beside generate() of `transformers`."""
    new, size, rows = max(b.spec.chunk // 2 // lm.PIECE, 1) * lm.PIECE, 2 * b.spec.chunk, []
    length = min(16, size - new)
    model = b.spec.model._replace(dtype="float32") if cores() else b.spec.model  # as eval.write_rows has it
    spec, same = b.spec._replace(model=model), new if cores() else 1  # tokens that must be the same

    def ours(prompts):
        slots = [lm.prefill(spec, b.weights, None, prompt, np.int32(length), size) for prompt in prompts]
        (logits_BV, caches_B), found = jax.tree.map(lambda *x: jnp.stack(x), *slots), []
        numbers = np.arange(len(prompts), dtype=np.uint32)
        for written in range(0, new, lm.PIECE):
            place = np.full(len(prompts), length + written, np.int32)
            draw = lm.Draw(jax.random.key(0), numbers, place - length, np.float32(0))
            args = spec, True, b.weights, None, caches_B, logits_BV, place, draw
            piece, caches_B, logits_BV = lm.write_piece(*args)
            found.append(np.asarray(piece))
        return np.concatenate(found, 1)

    def make(prompts, _):
        import torch

        net, x = torch_model(b, model.dtype), torch.tensor(prompts, dtype=torch.long, device=torch_device())
        net.generation_config.eos_token_id = None  # go on
        options = {"attention_mask": torch.ones_like(x), "max_new_tokens": new, "do_sample": False}
        return lambda: net.generate(x, pad_token_id=0, **options)[:, length:].cpu().numpy()

    error = lambda a, b: float((a[:, :same] != b[:, :same]).mean())
    for count in (1, 8):
        prompts, what = random_tokens(b, count, length), f"tokens/s, generation of {count} x {new}"
        both = partial(ours, prompts), partial(make, prompts)
        rows += beside_torch(b, what, count * new, *both, error, ("eager",))
    return rows


def bench_mfu(b: Bench) -> list[Row]:
    """The FLOPs that are needed, none that is computed again, over the speed of a large product."""
    spec, cfg, model, n = b.spec, b.cfg, b.spec.model, 2048 if cores() else 8192
    square, product = jnp.ones((n, n), cfg.dtype), jax.jit(partial(lm.matmul, dtype=cfg.dtype))
    actions = np.ones((cfg.batch, cfg.chunks), np.int32)
    batch = lm.place(spec.mesh, (random_tokens(b, cfg.batch, cfg.chunks * spec.chunk + 1), actions))
    carry = jax.tree.map(jnp.array, [b.weights.slow, ponder.meta_optimizer(100).init(b.weights.slow)])

    def learn():  # the step takes over what it is given
        carry[0], carry[1], loss, _ = ponder.meta_step(spec, 100, b.weights, *carry, batch)
        return loss

    S, loss = 2 * spec.chunk, jax.jit(partial(lm.language_loss, model))
    windows = random_tokens(b, cfg.batch, S + 1)
    runs = {"prefill": lambda: loss(b.params, windows), "the meta-step with UPDATE_1": learn}
    seconds = measure(b.repeats, runs | {"peak": lambda: product(square, square)})
    matrices = model.vocab * model.width
    matrices += sum(x.size for x in jax.tree.leaves(b.params["blocks"]) if x.ndim == 2)
    attention = 2 * model.layers * S * model.heads * model.head_width  # the half that is seen
    work = cfg.batch * S * (2 * matrices + attention), actions.size * count_meta_flops(b)
    speed, peak, rows = lambda x: f"{x / 1e12:.4g} TFLOP/s", 2 * n**3 / seconds["peak"], []
    for name, flops in zip(runs, work):
        mine = flops / seconds[name]
        rows.append(Row(f"share of the peak, {name}", speed(mine), f"{speed(peak)}, a product", mine / peak))
    return rows


def count_meta_flops(b: Bench) -> float:
    """Count a chunk's FLOPs in the meta-step: forward, one inner step, and backward through both."""
    spec = b.spec._replace(fast=b.spec.fast._replace(remat=False))
    args = b.weights, b.weights.slow, lm.init_state(spec.fast, b.weights.slow), second_window(b)

    def read(weights, slow, state, window):
        reading, _, first = lm.differentiate(spec, weights._replace(slow=slow), state.w, window)
        return reading.loss, lm.inner_step(spec, slow, state, first(), 0)

    def both(weights, slow, state, window):
        result, back = jax.vjp(lambda slow, state: read(weights, slow, state, window), slow, state)
        return back(result)

    above = count_flops(lambda weights, _, state, x: lm.predict(spec, weights, state.w, x).loss, *args)
    return lm.count_flops(spec, b.weights)[0] - above + count_flops(both, *args)


def read_documents(b: Bench, rule: rl.Rule, documents: tuple[Any, Any], chunks: int) -> rl.Step:
    """Read documents by one rule with twice SKIP's cost, frozen prefix included."""
    env = rl.Env(jnp.asarray(rl.NOMINAL, jnp.float32), jnp.float32(2 * chunks))
    document = rl.Document(evaluation.run_prefixes(b.spec, b.weights, documents[0]), documents[1])
    return evaluation.run_rule(b.spec, b.weights, env, rule, document, jax.random.key(0))


def bench_skip(b: Bench) -> list[Row]:
    """Whether what is not learned is not computed: seconds beside FLOPs, both as shares of UPDATE_4's."""
    chunks, rows, flops_A = b.cfg.chunks, [], lm.count_flops(b.spec, b.weights)
    env = rl.Env(np.asarray(rl.NOMINAL, np.float32), np.float32(2 * chunks))
    policy = rl.init_trainer(jax.random.key(0), rl.Ppo(), env, chunks).policy
    fixed = lambda action: rl.make_rule(rl.follow, policy, plan_T=action, hard=False)
    rules = {"UPDATE_4": fixed(3), "SKIP": fixed(0), "a policy": rl.make_rule(rl.sample, policy)}
    for count in (1, 4):
        documents = random_documents(b, count, chunks)
        runs = {name: partial(read_documents, b, rule, documents, chunks) for name, rule in rules.items()}
        seconds = measure(b.repeats, runs)
        for name in ("SKIP", "a policy"):
            flops = float(flops_A[np.asarray(runs[name]().action)].mean() / flops_A[3])
            share = seconds[name] / seconds["UPDATE_4"]
            what = f"{name} against UPDATE_4, {count} document(s) of {chunks} chunks"
            texts = f"{share:.3f} of its seconds", f"{flops:.3f} of its FLOPs"
            rows.append(Row(what, *texts, share / flops, "0.9 to 1.1"))
    return rows


def bench_features(b: Bench) -> list[Row]:
    """What the features and the policy add to a SKIP."""
    memory, policy = rl.init_memory(b.spec.fast, b.weights.slow), rl.init_policy(jax.random.key(0))
    env = rl.Env(jnp.asarray(rl.NOMINAL, jnp.float32), jnp.float32(4))
    chunk = rl.Chunk(second_window(b), random_documents(b, 1, 2)[1][0, 1], 1, 2)
    read = lambda weights, window: lm.predict(b.spec, weights, weights.slow["start"], window)
    look = lambda reading, chunk: rl.apply_policy(policy, rl.features(reading, chunk, memory, env))
    more = count_flops(look, jax.eval_shape(read, b.weights, chunk.window), chunk)
    skip = lm.count_flops(b.spec, b.weights)[0]
    texts = f"{more:.3g} FLOPs", f"{skip:.3g} FLOPs, a SKIP"
    return [Row("features and policy", *texts, more / skip, "below 0.01")]


def bench_growth(b: Bench) -> list[Row]:
    """Whether a chunk takes as long at the end of a long document as at that of a short one."""
    (few, many), policy, runs = (16, 256), rl.init_policy(jax.random.key(0)), {}
    for n in (few, many):
        rule = rl.make_rule(rl.follow, policy, plan_T=np.arange(n) % 2, hard=False)
        runs[str(n)] = partial(read_documents, b, rule, random_documents(b, 1, n), n)
    seconds = measure(b.repeats, runs)
    short, long = seconds[str(few)] / few, seconds[str(many)] / many
    what = f"seconds for a chunk of a document of {many} chunks, and of {few}"
    return [Row(what, f"{long:.4g}", f"{short:.4g}", long / short, "at most 1.1")]


def bench_cold(b: Bench) -> list[Row]:
    """From the start of the process to its first UPDATE_1, without and with what was compiled before."""
    options = {name: getattr(b.cfg, name) for name in ("scale", "base", "dtype", "chunk")}
    given = [text for name, x in options.items() if x is not None for text in (f"--{name}", str(x))]
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            start, own = time.perf_counter(), {"JAX_COMPILATION_CACHE_DIR": cache}
            command = [sys.executable, __file__, "--only", "first", *given]
            subprocess.run(command, env=os.environ | own, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    what, texts = "process start to first UPDATE_1: second run, and first", [f"{x:.3g} s" for x in seconds]
    return [Row(what, texts[1], texts[0], seconds[1] / seconds[0])]


def bench_first(b: Bench) -> list[Row]:
    """One UPDATE_1, for `bench_cold`."""
    rule = rl.make_rule(rl.follow, rl.init_policy(jax.random.key(0)), plan_T=1, hard=False)
    jax.block_until_ready(read_documents(b, rule, random_documents(b, 1, 2), 2))
    return []


def trace_programs(cfg: ponder.Config) -> Iterator[tuple[str, int, float]]:
    """Trace the programs of a scale from shapes alone -> (name, lines of StableHLO, seconds) of each."""
    model, N, T, S = shape_of(cfg), cfg.batch, cfg.chunks, 2 * cfg.chunk
    fast, key = ponder.fast_of_options(cfg, model), jax.random.key(0)
    spec = lm.Spec(model, fast, cfg.chunk, lm.make_mesh())
    array, ints = jax.ShapeDtypeStruct, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    def make_weights(key):
        params = lm.freeze(model, lm.init_params(key, model))
        return lm.split_weights(fast, params, lm.init_slow(key, model, fast))

    weights = jax.eval_shape(make_weights, key)
    policy, w, slow = rl.init_policy(key), weights.slow["start"], weights.slow
    env = rl.Env(np.asarray(rl.NOMINAL, np.float32), np.float32(2 * T))
    rule = rl.make_rule(rl.sample, policy)._replace(plan_T=())
    opt_state = jax.eval_shape(ponder.meta_optimizer(100).init, slow)
    tokens, text = ints(N, T * cfg.chunk + 1), array((N, T, 16), jnp.float32)
    windows = jax.eval_shape(partial(evaluation.run_prefixes, spec), weights, tokens)
    prefilled = jax.eval_shape(lambda *args: lm.prefill(spec, *args, S), weights, w, ints(S), ints())
    logits_BV, caches_B = jax.tree.map(lambda x: array((8, *x.shape), x.dtype), prefilled)
    draw = lm.Draw(key, array((8,), jnp.uint32), ints(8), array((), jnp.float32))
    read = rl.Document(windows, text), ints(N, T)
    jobs = {
        "prefill": (lm.prefill, weights, w, ints(S), ints(), S),
        "write_piece": (lm.write_piece, True, weights, w, caches_B, logits_BV, ints(8), draw),
        "evaluation": (evaluation.run_episodes, weights, env, rule, read, key),
        "rollout": (rl.rollout, weights, env, (tokens, text), policy, key),
        "meta_step": (ponder.meta_step, 100, weights, slow, opt_state, (tokens, ints(N, T))),
    }
    for name, (function, *args) in jobs.items():
        start, options = time.perf_counter(), {"credit": 3} if name == "rollout" else {}
        lowered, seconds = function.lower(spec, *args, **options), time.perf_counter() - start
        yield name, lowered.as_text().count("\n"), seconds


def table(rows: list[Row]) -> str:
    """Write rows as a Markdown table."""
    number = lambda x: "" if x is None else f"{x:.3g}"
    lines = [(*row[:3], number(row.ratio), row.wanted, number(row.difference)) for row in rows]
    return evaluation.markdown(("what", "ours", "beside", "ratio", "wanted", "difference"), lines)


def run(options: Speed) -> None:
    """Measure what is asked for, and print it."""
    data.require(options.repeats >= 1, f"--repeats {options.repeats}: must be at least 1")
    if "trace" in options.only:
        for scale in [options.scale] if options.scale else ["125m", "xl"]:
            for name, lines, seconds in trace_programs(config_of(options, scale)):
                print(f"trace {name} {scale} {lines} {seconds:.1f}", flush=True)
    wanted = [name for name in options.only or get_args(Part)[:-2] if name != "trace"]
    if not wanted:
        return
    b, rows = open_bench(config_of(options, options.scale or "tiny"), options.repeats), []
    for name in wanted:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        rows += globals()[f"bench_{name}"](b)
    model, device = b.spec.model, f"{jax.devices()[0].device_kind}, {cores()} cores"
    shape = f"{model.layers} blocks of {model.width}, {model.dtype}, chunks of {b.spec.chunk}"
    print(f"{device}; jax {jax.__version__}; {shape}\n\n{table(rows)}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"device": device, "model": shape, "rows": [row._asdict() for row in rows]}
        data.write_atomic(options.out / "bench.json", (json.dumps(content) + "\n").encode())


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    options = tyro.cli(Speed, description=__doc__, config=style)
    ponder.launch(lambda: run(options))
