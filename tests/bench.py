"""Measure speed: beside PyTorch where it is installed, beside the FLOPs that are needed, and over length.

    python tests/bench.py                        all rows, on the shipped model: a Markdown table
    python tests/bench.py --only trace           how large the programs of 125m and xl are, from shapes alone

Scales above tiny have random weights unless --base names a model: they are as fast as any. Seconds are
medians of calls taken in turn, in random order; on one core (taskset -c 0) they are this process's own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

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

Part = Literal["prefill", "side", "update", "decode", "mfu", "skip", "features", "growth", "cold", "trace"]
Rows = Iterator[tuple[str, ...]]  # what, ours, beside, their ratio, the ratio wanted


@dataclass(frozen=True)
class Speed(ponder.Config):
    """The settings of ponder.py, and one more."""

    only: tuple[Part, ...] = ()  # Which parts; left out: all but trace, which goes alone.


# --- 1. What is measured, and how -------------------------------------------------------------------
WIDTHS = {"125m": (768, 12), "350m": (1024, 24), "1b": (1280, 36), "xl": (1600, 48)}  # and blocks, of GPT-2
SHAPES = {name: lm.Model(50257, 1024, D, L, D // 64, D // 64, 64, 4 * D) for name, (D, L) in WIDTHS.items()}
SHAPES |= {"tiny": pretrain.TINY}


def random_tokens(run: ponder.Run, *shape: int) -> np.ndarray:
    """Draw tokens: the same ones for the same shape."""
    return np.random.default_rng(0).integers(0, run.spec.model.vocab, shape, np.int32)


def second_window(run: ponder.Run, weights: lm.Weights) -> lm.Window:
    """Make the window of a random document's second chunk, which has its whole context."""
    C, tokens = run.spec.chunk, random_tokens(run, 2 * run.spec.chunk + 1)
    x_SD, normed_SD = lm.run_prefix(run.spec, weights, tokens[:-1])
    return lm.Window(x_SD, tokens[-C:], C, normed_SD)


def cores() -> int:
    """Count the cores that this process computes on; 0 on an accelerator."""
    return len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 0


def measure(runs: dict[str, Callable[[], Any]], repeats: int = 9) -> dict[str, float]:
    """Time functions in turn, after one call of each -> median seconds by name."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    jax.block_until_ready([run() for run in runs.values()])
    clock = time.process_time if cores() == 1 else time.perf_counter
    for name in np.random.default_rng(0).permuted([list(runs)] * repeats, axis=1).flat:
        start = clock()
        jax.block_until_ready(runs[name]())
        samples[name].append(clock() - start)
    return {name: float(np.median(x)) for name, x in samples.items()}


# --- 2. Beside PyTorch ------------------------------------------------------------------------------
def beside_torch(what: str, work: float, ours, make, kinds=("eager", "compiled")) -> Rows:
    """Rows of `work` per second, ours and that of the function that make(compile) gives."""
    for kind in kinds:
        try:
            import torch

            torch.set_num_threads(max(cores(), 1))
            torch.set_float32_matmul_precision("highest" if cores() else "high")  # JAX too takes TF32 there
            theirs = make(torch.compile if kind == "compiled" else lambda function: function)
            seconds = measure({"ours": ours, "theirs": theirs})
        except Exception as problem:  # of many kinds: it isn't installed, or no compiler for C++ is
            yield f"{what}, PyTorch {kind}", "", f"fails: {type(problem).__name__}", "", ""
            continue
        mine, other = seconds.values()
        speeds = f"{work / mine:.4g}", f"{work / other:.4g}", f"{other / mine:.3g}"
        yield f"{what}, PyTorch {kind}", *speeds, "at least 1"


def torch_model(run: ponder.Run, dtype: str) -> Any:
    """Load the same model into `transformers`."""
    import torch
    import transformers

    folder, dtype = lm.find_model(run.cfg.base), getattr(torch, dtype)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return net.to("cpu" if cores() else "cuda").eval()


def make_prefill(run: ponder.Run) -> tuple[Callable, np.ndarray, lm.Params]:
    """Our loss of a batch of windows, as a function; these; and the two parts of the frozen model as one."""
    prefix, tokens = run.weights.prefix, random_tokens(run, run.cfg.batch, 2 * run.spec.chunk + 1)
    both = prefix["blocks"], run.weights.suffix["blocks"]
    whole = jax.tree.map(lambda *x: np.concatenate(x), *both)
    params = prefix | {"blocks": lm.cut_blocks(whole)}
    losses = lambda model, params, x: lm.token_losses(lm.forward(model, params, x[:, :-1]), x[:, 1:])
    loss = jax.jit(partial(pretrain.language_loss if cores() else losses, run.spec.model))
    return lambda: loss(params, tokens), tokens, params


def bench_prefill(run: ponder.Run) -> Rows:
    """The loss of a batch of windows."""
    ours, tokens, _ = make_prefill(run)

    def make(wrap):
        import torch

        net = torch_model(run, run.spec.model.dtype)
        x, net = torch.tensor(tokens, dtype=torch.long, device=net.device), wrap(net)

        @torch.no_grad()
        def loss():
            logits = net(x[:, :-1], use_cache=False).logits.float().flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten()).item()

        return loss

    what = f"tokens/s, prefill and loss of {len(tokens)} x {2 * run.spec.chunk} tokens"
    return beside_torch(what, tokens[:, 1:].size, ours, make)


def bench_side(run: ponder.Run) -> Rows:
    """A window's prefix, and SKIP and UPDATE_1 of a chunk above it, of documents side by side."""
    spec, weights, C = run.spec, run.weights, run.spec.chunk
    wanted = {("prefix", 8): "at most 0.6", ("UPDATE_1", 8): "at most 1.0"}

    def skip(weights, window):
        return lm.predict(spec, weights, weights.slow["start"], window).loss

    def learn(weights, window):
        return update(run, weights, lm.init_state(spec.fast, weights.slow), window)

    for count in (1, 8):
        tokens = random_tokens(run, count, 2 * C + 1)
        prefix = jax.jit(jax.vmap(partial(lm.run_prefix, spec), (None, 0)))
        x_BSD, normed_BSD = prefix(weights, tokens[:, :-1])
        windows = lm.Window(x_BSD, tokens[:, -C:], C, normed_BSD)
        axes = None, lm.Window(0, 0, None, 0)
        runs = {"prefix": partial(prefix, weights, tokens[:, :-1])}
        for name, function in (("SKIP", skip), ("UPDATE_1", learn)):
            runs[name] = partial(jax.jit(jax.vmap(function, axes)), weights, windows)
        for name, seconds in measure(runs).items():
            what = f"milliseconds a document, {name}, {count} side by side"
            yield what, f"{1e3 * seconds / count:.3g}", "", "", wanted.get((name, count), "")


def bench_update(run: ponder.Run) -> Rows:
    """UPDATE_1 on one chunk; both programs have the frozen prefix's activations."""
    for kind in ("swiglu", "lora"):
        own = ponder.open_run(replace(run.cfg, fast=kind), Path(), run.spec.mesh)
        yield from beside_torch(f"steps/s, UPDATE_1 of a chunk, {kind}", 1, *update_pair(own))


def update(run: ponder.Run, weights: lm.Weights, state: lm.State, window: lm.Window):
    """Our UPDATE_1 on one chunk -> (loss, state)."""
    reading, _, first = lm.differentiate(run.spec, weights, state.w, window)
    return reading.loss, lm.inner_step(run.spec, weights.slow, state, first()[1], 0)


def update_pair(run: ponder.Run) -> tuple[Callable, Callable]:
    """Our UPDATE_1, a document's first, and the maker of PyTorch's."""
    window, step = jax.jit(partial(second_window, run))(run.weights), jax.jit(partial(update, run))
    state = lm.init_state(run.spec.fast, run.weights.slow)
    return lambda: step(run.weights, state, window), partial(torch_step, run, window)


def torch_step(run: ponder.Run, window: lm.Window, wrap: Callable) -> Callable[[], Any]:
    """The same UPDATE_1 as model.py has it, of a GPT-2 with swiglu adapters or lora in its last blocks, by
    next_token and muon, on a window with its whole context -> a function that gives (loss, new W)."""
    import torch
    import torch.nn.functional as F

    model, C, slow, device = run.spec.model, run.spec.chunk, run.weights.slow, "cpu" if cores() else "cuda"
    put = lambda x: torch.tensor(np.asarray(x, np.float32), device=device)
    frozen = lambda x: put(x).to(getattr(torch, model.dtype)) if x.ndim == 2 else put(x)
    suffix, last = run.weights.suffix, model.layers - 1 - run.spec.fast.blocks[0]
    blocks = [jax.tree.map(lambda x: frozen(x[m]), suffix["blocks"]) for m in range(last + 1)]
    final, head = jax.tree.map(put, suffix["norm"]), frozen(suffix["embed"]["weight"])
    start = {name: put(x) for name, x in lm.flatten(slow["start"]).items()}
    sizes = [float(jnp.exp(x[0])) for x in jax.tree.leaves(slow["log_step"])]
    x_SD, normed_SD = put(window.x_SD), None if window.normed_SD is None else put(window.normed_SD)
    targets = torch.tensor(np.asarray(window.targets_C), dtype=torch.long, device=device)
    visible = torch.ones(C, 2 * C, dtype=torch.bool, device=device).tril(C)
    norm = lambda p, x: F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], model.eps)
    dense = lambda p, x: torch.addmm(p["bias"], x, p["weight"])
    heads = lambda x: x.unflatten(-1, (model.heads, -1)).transpose(0, 1)[None]

    def block(p, x, own, rows, mask):
        normed, attn = norm(p["norm_1"], x), p["attn"]
        q, k, v = dense(attn["q"], normed[rows]), dense(attn["k"], normed), dense(attn["v"], normed)
        if "q_up" in own:
            q = q + normed[rows] @ own["q_down"] @ own["q_up"]
            v = v + normed @ own["v_down"] @ own["v_up"]
        mixed = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **mask)
        x = x[rows] + dense(attn["o"], mixed[0].transpose(0, 1).flatten(1))
        normed = norm(p["norm_2"], x)
        return x + dense(p["mlp"]["down"], F.gelu(dense(p["mlp"]["up"], normed), approximate="tanh")), normed

    def loss_of(w):
        x, normed = x_SD, normed_SD
        for m, p in enumerate(blocks):
            own = {name.removeprefix("adapters."): w[name][m] for name in w if name != "bias"}
            rows, mask = slice(C if m == last else 0, None), {"is_causal": True}
            if m or normed is None:  # else the prefix has run it
                x, normed = block(p, x, own, rows, {"attn_mask": visible} if m == last else mask)
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
        return {name: w[name] - size * direction(g) for name, size, g in zip(w, sizes, gradients)}

    loss_of, learn = wrap(loss_of), wrap(learn)

    def step():
        w = {name: x.detach().requires_grad_() for name, x in start.items()}
        with torch.autocast(device, torch.bfloat16, enabled=model.dtype == "bfloat16"):
            loss = loss_of(w)
            gradients = torch.autograd.grad(loss, list(w.values()))
            with torch.no_grad():
                new = learn(w, gradients)
        return loss.item(), new  # which waits for the device

    return step


def bench_decode(run: ponder.Run) -> Rows:
    """The most likely tokens after a prompt, beside generate() of `transformers`."""
    for count in (1, 8):
        new, *both = decode_pair(run, count)
        yield from beside_torch(f"tokens/s, generation of {count} x {new}", count * new, *both, ("eager",))


def decode_pair(run: ponder.Run, count: int) -> tuple[int, Callable, Callable]:
    """How many tokens are written in each of `count` rows, our function and the maker of PyTorch's."""
    size, new = 2 * run.spec.chunk, max(run.spec.chunk // 2 // lm.PIECE, 1) * lm.PIECE
    (spec, weights), length = lm.for_writing(run.spec, run.weights), min(16, size - new)
    prompts, fixed = random_tokens(run, count, length), (spec, weights, weights.slow["start"])

    def ours():
        places, found = np.full(count, length, np.int32), []
        logits_BV, caches_B = lm.prefill(*fixed, prompts, places, size)
        for _ in range(0, new, lm.PIECE):
            draw = lm.Draw(jax.random.key(0), places, places, np.float32(0))
            piece, caches_B, logits_BV = lm.write_piece(*fixed, caches_B, logits_BV, places, draw)
            places = places + lm.PIECE
            found.append(np.asarray(piece))
        return np.concatenate(found, 1)

    def make(_):
        import torch

        net = torch_model(run, spec.model.dtype)
        x = torch.tensor(prompts, dtype=torch.long, device=net.device)
        net.generation_config.eos_token_id = None  # go on
        options = {"attention_mask": torch.ones_like(x), "max_new_tokens": new, "do_sample": False}
        return lambda: net.generate(x, pad_token_id=0, **options)[:, length:].cpu().numpy()

    return new, ours, make


# --- 3. Beside the FLOPs that are needed ------------------------------------------------------------
def bench_mfu(run: ponder.Run) -> Rows:
    """The FLOPs that are needed, none that is computed again, over the speed of a large product."""
    spec, B, T, n = run.spec, run.cfg.batch, run.cfg.chunks, 2048 if cores() else 8192
    square, product = jnp.ones((n, n), run.cfg.dtype), jax.jit(partial(lm.matmul, dtype=run.cfg.dtype))
    documents = random_tokens(run, B, T * spec.chunk + 1), np.ones((B, T), np.int32)
    batch, gradient = lm.place(spec.mesh, documents), jax.jit(ponder.meta_gradient, static_argnums=0)
    prefill, windows, params = make_prefill(run)
    runs = {"prefill": prefill, "the meta-gradient": lambda: gradient(spec, run.weights, batch)}
    seconds = measure(runs | {"peak": lambda: product(square, square)})
    plain = spec.model._replace(dtype="float32")
    once = lm.operations(partial(lm.forward, plain, unroll=True), params, windows[0, :-1])
    peak = 2 * n**3 / seconds["peak"] / 1e12
    for name, flops in zip(runs, (B * once, B * T * count_meta_flops(run))):
        mine = flops / seconds[name] / 1e12
        yield f"TFLOP/s, {name}, and of a product", f"{mine:.4g}", f"{peak:.4g}", f"{mine / peak:.3g}", ""


def count_meta_flops(run: ponder.Run) -> float:
    """Count a chunk's FLOPs in the meta-gradient: forward, one inner step, and backward through both."""

    run = run._replace(spec=run.spec._replace(unroll=True))  # of a loop XLA counts one turn

    def both(weights):
        window, state = second_window(run, weights), lm.init_state(run.spec.fast, weights.slow)
        read = lambda slow, state: update(run, weights._replace(slow=slow), state, window)
        result, back = jax.vjp(read, weights.slow, state)
        return back(result)

    return lm.operations(both, run.weights)


def make_reader(run: ponder.Run, function, plan, count: int, chunks: int) -> Callable[[], rl.Step]:
    """Make a function that reads random documents by a rule, frozen prefix included."""
    policy = rl.init_trainer(jax.random.key(0), rl.Ppo(), run.env, chunks).policy  # untrained
    rule = rl.make_rule(function, policy, plan_T=plan, hard=function is rl.sample)
    tokens = random_tokens(run, count, chunks * run.spec.chunk + 1)
    tokens, texts = lm.place(run.spec.mesh, (tokens, np.zeros((count, chunks, 16), np.float32)))

    def read():
        document = rl.Document(evaluation.run_prefixes(run.spec, run.weights, tokens), texts)
        return evaluation.run_rule(run.spec, run.weights, run.env, rule, document, 0)

    return read


def bench_skip(run: ponder.Run) -> Rows:
    """Whether what is not learned is not computed: seconds beside FLOPs, both as shares of UPDATE_4's."""
    rules = {"UPDATE_4": (rl.follow, 3), "SKIP": (rl.follow, 0), "a policy": (rl.sample, 0)}
    for count in (1, 4):
        runs = {name: make_reader(run, *rule, count, run.cfg.chunks) for name, rule in rules.items()}
        seconds = measure(runs)
        for name in ("SKIP", "a policy"):
            flops = float(run.flops_A[np.asarray(runs[name]().action)].mean() / run.flops_A[3])
            share = seconds[name] / seconds["UPDATE_4"]
            what = f"{name} against UPDATE_4, {count} document(s) of {run.cfg.chunks} chunks"
            texts = f"{share:.3f} of its seconds", f"{flops:.3f} of its FLOPs"
            yield what, *texts, f"{share / flops:.3g}", "0.9 to 1.1"


def bench_features(run: ponder.Run) -> Rows:
    """What the features and the policy add to a SKIP."""
    memory, policy = rl.init_memory(run.spec.fast, run.weights.slow), rl.init_policy(jax.random.key(0))

    def look(weights):
        window = second_window(run, weights)
        reading = lm.predict(run.spec, weights, weights.slow["start"], window)
        chunk = rl.Chunk(window, jnp.zeros(16), 1, 2)
        return reading, rl.apply_policy(policy, rl.features(reading, chunk, memory, run.env))

    skip = lm.count_flops(run.spec, run.weights)[0]
    more = lm.operations(look, run.weights) - skip
    texts = f"{more:.3g} FLOPs", f"{skip:.3g} FLOPs, a SKIP", f"{more / skip:.3g}"
    yield "features and policy", *texts, "below 0.01"


# --- 4. Over length, from the start, and how large the programs are ---------------------------------
def bench_growth(run: ponder.Run) -> Rows:
    """Whether a chunk takes as long at the end of a long document as at that of a short one."""
    seconds = measure({str(n): make_reader(run, rl.follow, np.arange(n) % 2, 1, n) for n in (16, 256)})
    short, long = seconds["16"] / 16, seconds["256"] / 256
    what = "seconds for a chunk of a document of 256 chunks, and of 16"
    yield what, f"{long:.4g}", f"{short:.4g}", f"{long / short:.3g}", "at most 1.1"


def bench_cold(run: ponder.Run) -> Rows:
    """From the start of the process to its first meta-step, without and with what was compiled before."""
    seconds, script = [], Path(__file__).resolve().parent.parent / "ponder.py"
    command = [sys.executable, script, "--stage", "ttt", "--base", run.cfg.base, "--scale", run.cfg.scale]
    command += ["--data", run.cfg.data, "--meta-steps", "1", "--batch", str(run.cfg.batch)]
    with tempfile.TemporaryDirectory() as cache:
        for number in "12":
            start, own = time.perf_counter(), {"JAX_COMPILATION_CACHE_DIR": cache}
            out = Path(cache) / f"run {number}"
            process = subprocess.Popen([*command, "--out", out], env=os.environ | own, stdout=subprocess.PIPE)
            steps = lambda: [row["step"] for row in data.read_lines(out / "metrics.jsonl")]
            while process.poll() is None and not any(steps()):
                time.sleep(0.1)
            seconds.append(time.perf_counter() - start)
            process.kill()
            process.wait()
    what, (first, second) = "process start to first meta-step: second run, and first", seconds
    yield what, f"{second:.3g} s", f"{first:.3g} s", f"{second / first:.3g}", ""


def trace_programs(cfg: ponder.Config) -> Iterator[tuple[str, int, float]]:
    """Trace the programs of a scale from shapes alone -> (name, lines of StableHLO, seconds) of each."""
    model, N, T, S = SHAPES[cfg.scale]._replace(dtype=cfg.dtype), cfg.batch, cfg.chunks, 2 * cfg.chunk
    fast, key = ponder.choose_fast(cfg, None, model, {}), jax.random.key(0)
    spec, zeros = lm.Spec(model, fast, cfg.chunk, lm.make_mesh()), lambda *shape: np.zeros(shape, np.int32)
    spec = spec._replace(together=N)  # as where they fit

    def make_weights():
        params = lm.init_params(key, model)
        params = jax.tree.map(lambda x: x.astype(model.dtype) if x.ndim == 2 else x, params)
        return lm.split_weights(fast, params, lm.init_slow(key, model, fast))

    weights = jax.eval_shape(make_weights)
    w_B = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype), weights.slow["start"])
    read, draw = (weights, w_B, zeros(8, S), zeros(8)), lm.Draw(key, zeros(8), zeros(8), np.float32(0))
    logits_BV, caches_B = jax.eval_shape(lambda *read: lm.prefill(spec, *read, S), *read)
    tokens, texts, plan = zeros(N, T * cfg.chunk + 1), np.zeros((N, T, 16), np.float32), zeros(N, T)
    document = rl.Document(jax.eval_shape(partial(evaluation.run_prefixes, spec), weights, tokens), texts)
    env, policy = rl.Env(np.float32(rl.NOMINAL), np.float32(2 * T)), rl.init_policy(key)
    rule = rl.make_rule(rl.sample, policy)._replace(plan_T=())
    opt_state = jax.eval_shape(ponder.meta_optimizer(100).init, weights.slow)
    jobs = {
        "prefill": (lm.prefill.lower, *read, S),
        "write_piece": (lm.write_piece.lower, weights, w_B, caches_B, logits_BV, zeros(8), draw),
        "evaluation": (evaluation.run_episodes.lower, weights, env, rule, (document, plan), key),
        "rollout": (partial(rl.rollout.lower, credit=3), weights, env, (tokens, texts), policy, key),
        "meta_step": (ponder.meta_step.lower, 100, weights, weights.slow, opt_state, (tokens, plan)),
    }
    for name, (lower, *args) in jobs.items():
        start, lines = time.perf_counter(), lower(spec, *args).as_text().count("\n")
        yield name, lines, time.perf_counter() - start


def main(options: Speed) -> None:
    """Measure what is asked for, and print each row when it is there."""
    if options.only == ("trace",):
        for scale in ("125m", "xl"):
            for name, lines, seconds in trace_programs(ponder.fill_in(replace(options, scale=scale), 1)):
                print(f"trace {name} {scale} {lines} {seconds:.1f}", flush=True)
        return
    cfg, parts = ponder.fill_in(options, 1), options.only or get_args(Part)[:-1]
    print(f"{cfg.scale} in {cfg.dtype}, {jax.devices()[0].device_kind}, {cores()} cores\n")
    print("| what | ours | beside | ratio | wanted |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as made:
        if not cfg.base and cfg.scale != "tiny":
            model = SHAPES[cfg.scale]
            pretrain.save_gpt2(Path(made), model, lm.init_params(jax.random.key(0), model), np.float32)
            shutil.copy(data.ASSETS / "tiny" / "tokenizer.json", made)  # has no part in this
        cfg = replace(cfg, base=cfg.base or (str(data.ASSETS / "tiny") if cfg.scale == "tiny" else made))
        run = ponder.open_run(cfg, Path(), lm.make_mesh())
        for name in parts:
            for row in globals()[f"bench_{name}"](run):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    options = tyro.cli(Speed, description=__doc__)
    ponder.launch(lambda: main(options))
