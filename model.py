"""A frozen GPT-2, GPT-NeoX (Pythia) or Llama-type model, and the fast weights that learn while it reads.

    W         fast weights: one small adapter in each of the last quarter of the blocks, a bias of the logits
    W <- W - eta_i * orthogonalise(grad_W inner_loss(W; chunk))        one inner step (`inner_step`)

The model is cut at the lowest block with fast weights. The prefix, the blocks below it and mostly that block
without its adapter, gives the same whatever is learned, and runs once for each chunk; the suffix runs with W.

Dimensions, used as suffixes of names:
    B texts   N documents   T chunks   C tokens of a chunk   S positions of a window (2C: context and chunk)
    D width   H heads of queries   G heads of keys and values   K head width   A = H K   F hidden width
    V vocabulary   L blocks   M fast blocks   R rows of a window that are computed

Down to the plumbing (section 8) every function is pure. Norms, softmax and losses are float32; matrix
products (`matmul`, section 10) take their operands in `Model.dtype` and add up in float32.
"""

import ctypes
import json
import math
import os
import re
import sys
import zlib
from functools import partial, reduce
from itertools import count, repeat
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental import multihost_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import data
from data import UserError, require, write_atomic

Params = dict[str, Any]  # a pytree of arrays; `init_params` shows what a model's looks like
STEPS = (0, 1, 2, 4)  # inner steps of the actions SKIP, UPDATE_1, UPDATE_2, UPDATE_4


# --- 1. Types ---------------------------------------------------------------------------------------
class Model(NamedTuple):
    """The frozen model's shape."""

    vocab: int  # V
    positions: int  # S, at most
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G
    head_width: int  # K
    hidden: int  # F, of an MLP
    dtype: str = "float32"  # of matrix products' operands: float32 or bfloat16
    norm: str = "layer"  # or "rms"
    eps: float = 1e-5
    activation: str = "gelu_new"
    gated: bool = False  # the MLP has a gate beside `up`
    rotary: int = 0  # how many dimensions of a head turn with the position; 0: positions are learned
    theta: float = 10000.0  # their longest wavelength is about 2 pi theta
    parallel: bool = False  # attention and MLP read the same residual stream
    tied: bool = True  # the head is the embedding
    biases: tuple[str, ...] = ("norm", "qkv", "o", "mlp")  # the kinds of weights that come with one


class Fast(NamedTuple):
    """The fast weights: what they are, where they sit, how they learn."""

    blocks: tuple[int, ...]  # which of the model's blocks carry an adapter, from the lowest on
    hidden: int  # F: width of a swiglu adapter, rank of a lora one; linear has no use for it
    kind: str = "swiglu"  # or "linear", "lora"
    objective: str = "next_token"  # or "reconstruction"
    optimizer: str = "muon"  # or "sgd"
    momentum: float = 0.0  # 0.3 in ponder.py, unless an option says otherwise
    clip: float = 1.0  # sgd: largest global norm of an inner gradient


class Spec(NamedTuple):
    """All that is fixed before a program is compiled (hashable: a static argument)."""

    model: Model
    fast: Fast
    chunk: int  # C, tokens
    mesh: Mesh | None = None  # of devices: section 7
    unroll: bool = False  # no loops: a longer program, for which XLA counts all operations
    together: int = 1  # documents that a device reads side by side, at most


class Weights(NamedTuple):
    """All that is trained before a document is read."""

    prefix: Params  # embed, positions, norm, head, and the blocks below the lowest fast one, stacked
    suffix: Params  # the same, with the blocks from the lowest fast one on
    slow: Params  # the fast weights' start W_0 and step sizes, of `init_slow`


class State(NamedTuple):
    """What learning changes: each document has its own. Float32, whatever the products are in."""

    w: Params  # W: {"adapters": matrices with a leading M, "bias": (1, V) of the logits, for next_token}
    momentum: Params | tuple[()]  # the same for the running sum of gradients; () without momentum
    steps: Any  # inner steps taken so far


class Window(NamedTuple):
    """A chunk and its context above the prefix: all that the suffix needs."""

    x_SD: Any  # what the prefix leaves: the lowest fast block's output without its adapter, or its input
    targets_C: Any  # the chunk's tokens
    start: Any  # row of x_SD that predicts targets_C[0]: 0 for a document's first chunk, else C
    normed_SD: Any = None  # what that block's adapter reads, if the prefix runs the block


class Reading(NamedTuple):
    """What predicting one chunk leaves behind; the policy's features are made from it."""

    losses_C: Any  # next-token losses, nats
    logits_CV: Any
    top_CD: Any  # activations leaving the last block
    inputs_MCD: Any  # what each adapter read (lora: what the MLP above it did)
    outputs_MCD: Any  # what each adapter added (lora: to the values, G K wide)
    query_HCK: Any  # of the last block's attention
    key_GSK: Any  # likewise, of the whole window

    @property
    def loss(self):
        return self.losses_C.mean()


class BlockOutput(NamedTuple):
    """What one block computes for R rows of a window."""

    x_RD: Any  # its output
    normed_RD: Any  # what its MLP, and so an adapter beside that, reads
    query_HRK: Any = None
    cache: Any = None  # keys and values (G, S, K) of all rows
    added: Any = None  # what fast weights added: to the output (R, D), or, lora, to the values (S, G K)


# --- 2. The frozen model ----------------------------------------------------------------------------
ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=False), "silu": jax.nn.silu}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), jax.nn.gelu)  # by tanh
QUERY_ROWS = 1024  # rows of attention scores held at once


@partial(jax.jit, static_argnums=0)  # stands once in a program, however many blocks call it
def norm(model: Model, p: Params, x):
    """Apply layer norm (Ba et al. 2016) or RMS norm (Zhang and Sennrich 2019), which keeps the mean."""
    if model.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + model.eps) * p["weight"]
    return x + p["bias"] if "bias" in p else x


def dense(p: Params, x, dtype, out="float32"):
    """Apply a linear layer of weight (m, n) and perhaps bias (n,): (..., m) -> (..., n) of type `out`."""
    y = matmul(x, p["weight"], dtype, out)
    return y + p["bias"].astype(out) if "bias" in p else y


def rotate(model: Model, x_HSK, positions_S):
    """Turn dimensions i and i + n/2 of heads, n = `rotary`, by position * theta^(-2i/n) (Su et al. 2021)."""
    n, dtype, x_HSK = model.rotary, x_HSK.dtype, x_HSK.astype(jnp.float32)
    angle = positions_S[:, None] * (1 / np.float32(model.theta) ** (np.arange(0, n, 2, dtype=np.float32) / n))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b, rest = x_HSK[..., : n // 2], x_HSK[..., n // 2 : n], x_HSK[..., n:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(dtype)


def split_heads(x_SA, heads: int):
    """Take heads apart, (..., S, H K) -> (..., H, S, K)."""
    return jnp.swapaxes(x_SA.reshape(*x_SA.shape[:-1], heads, -1), -2, -3)


def merge_heads(x_HSK):
    """Lay heads side by side, (..., H, S, K) -> (..., S, H K)."""
    return lax.collapse(jnp.swapaxes(x_HSK, -2, -3), x_HSK.ndim - 2)


def slice_rows(x_SD, start, rows: int):
    """Take rows start ... start+rows-1 (start may be traced); x_SD itself if it has no more than these."""
    return x_SD if rows == x_SD.shape[-2] else lax.dynamic_slice_in_dim(x_SD, start, rows, -2)


def attention(q_HRK, k_GSK, v_GSK, start, dtype, frozen=False):
    """Attend causally from queries at positions start ... start+R-1 to keys at 0 ... S-1 -> (..., H, R, K).
    `start` may be traced. The h = H / G heads that read the same keys have their queries laid end to end. In
    a `frozen` block a GPU takes cuDNN's kernel, which keeps no scores and can't be differentiated twice."""
    (*groups, S, K), R = k_GSK.shape, q_HRK.shape[-2]
    if frozen and dtype == "bfloat16" and K % 8 == 0 and K <= 128 and jax.default_backend() == "gpu":
        rows_first = (jnp.swapaxes(x, -2, -3) for x in (q_HRK, k_GSK, v_GSK))
        mixed_SHK = jax.nn.dot_product_attention(*rows_first, is_causal=True, implementation="cudnn")
        return jnp.swapaxes(mixed_SHK, -2, -3)
    if R > QUERY_ROWS:  # a part after the other
        part = lambda low: attention(q_HRK[..., low : low + QUERY_ROWS, :], k_GSK, v_GSK, start + low, dtype)
        return jnp.concatenate([part(low) for low in range(0, R, QUERY_ROWS)], -2)
    q_GrK = (q_HRK * K**-0.5).reshape(*groups, -1, K)  # r = h R
    scores_GrS = matmul(q_GrK, transpose(k_GSK.astype(dtype)), dtype)
    row_RS, key_RS = (lax.broadcasted_iota(jnp.int32, (R, S), axis) for axis in (0, 1))
    visible_RS = key_RS <= start + row_RS
    visible_rS = visible_RS if q_GrK.shape[-2] == R else jnp.tile(visible_RS, (q_GrK.shape[-2] // R, 1))
    p_GrS = jax.nn.softmax(scores_GrS + jnp.where(visible_rS, 0.0, -1e30))
    return matmul(p_GrS, v_GSK, dtype, dtype).reshape(q_HRK.shape)


def mlp(model: Model, p: Params, x):
    """Run a block's MLP, (..., D) -> (..., D), without the residual."""
    act, dtype = ACTIVATIONS[model.activation], model.dtype
    read = lambda name: dense(p[name], x, dtype, dtype).astype(jnp.float32)
    hidden = act(read("gate")) * read("up") if model.gated else act(read("up"))
    return dense(p["down"], hidden, dtype)


def block(model: Model, p: Params, x_SD, start=0, rows=None, lora=None, cache=None, frozen=False):
    """Run one block for the `rows` positions from `start` on (left out: for all) of its input (..., S, D)
    -> BlockOutput. `lora` adapts its queries and values. If a `cache` has what came before, x_SD has just
    these rows. A `frozen` one is run whole, and no inner step is taken through it."""
    S, dtype, attn = x_SD.shape[-2], model.dtype, p["attn"]
    rows = S if rows is None else rows
    normed_SD = norm(model, p["norm_1"], x_SD).astype(dtype)
    own_RD, added = slice_rows(normed_SD, start, rows), None
    q = dense(attn["q"], own_RD, dtype, dtype)
    k = dense(attn["k"], normed_SD, dtype, dtype)
    v = dense(attn["v"], normed_SD, dtype, dtype)
    if lora is not None:
        low_rank = lambda x, name: matmul(matmul(x, lora[f"{name}_down"], dtype), lora[f"{name}_up"], dtype)
        q, added = (q + low_rank(own_RD, "q")).astype(dtype), low_rank(normed_SD, "v")
        v = (v + added).astype(dtype)
    q_HRK = split_heads(q, model.heads)
    k_GSK, v_GSK = split_heads(k, model.kv_heads), split_heads(v, model.kv_heads)
    if model.rotary:
        q_HRK = rotate(model, q_HRK, start + jnp.arange(rows))
        k_GSK = rotate(model, k_GSK, (0 if cache is None else start) + jnp.arange(S))
    if cache is not None:
        write = lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, -2)
        k_GSK, v_GSK = write(cache[0], k_GSK), write(cache[1], v_GSK)
    mixed_HRK = attention(q_HRK, k_GSK, v_GSK, start, dtype, frozen)
    x_RD = slice_rows(x_SD, start, rows)
    attended_RD = x_RD + dense(attn["o"], merge_heads(mixed_HRK), dtype)
    normed_RD = norm(model, p["norm_2"], x_RD if model.parallel else attended_RD).astype(dtype)
    out_RD = attended_RD + mlp(model, p["mlp"], normed_RD)
    return BlockOutput(out_RD, normed_RD, q_HRK, (k_GSK, v_GSK), added)


def stack_blocks(blocks: tuple[Params, ...]) -> Params:
    """Stack blocks on a leading axis L, so that a loop can run them."""
    return jax.tree.map(lambda *x: jnp.stack(x), *blocks)


def run_blocks(model: Model, blocks: Params, x_SD, gather=lambda p: p, unroll=False):
    """Run stacked frozen blocks one after the other, (..., S, D) -> (..., S, D).
    It is a loop, so that a program is no longer for more blocks; `gather` brings a block to this device."""
    step = lambda x_SD, p: (block(model, gather(p), x_SD, frozen=True).x_RD, None)
    return lax.scan(step, x_SD, blocks, unroll=unroll)[0]


def embed(model: Model, params: Params, tokens_S, start=0):
    """Embed token ids (..., S), the first at position `start` (may be traced) -> (..., S, D)."""
    x_SD = params["embed"]["weight"][tokens_S].astype(jnp.float32)
    return x_SD if model.rotary else x_SD + slice_rows(params["positions"]["weight"], start, x_SD.shape[-2])


def logits(model: Model, params: Params, x_SD, w: Params | None = None):
    """Compute next-token logits (..., S, V) of what leaves the last block; fast weights may add a bias."""
    x_SD = norm(model, params["norm"], x_SD)
    head_VD = params["embed" if model.tied else "head"]["weight"]
    head_DV = transpose(head_VD.astype(model.dtype))
    logits_SV = matmul(x_SD, head_DV, model.dtype, model.dtype).astype(jnp.float32)
    return logits_SV + w["bias"] if w is not None and "bias" in w else logits_SV


def forward(model: Model, params: Params, tokens_S, unroll=False):
    """Compute the frozen model's next-token logits (..., S, V) of token ids (..., S), S <= positions."""
    blocks, x_SD = stack_blocks(params["blocks"]), embed(model, params, tokens_S)
    return logits(model, params, run_blocks(model, blocks, x_SD, unroll=unroll))


@jax.custom_vjp
def token_losses(logits_SV, targets_S):
    """Compute the cross-entropy of targets (..., S) under logits (..., S, V) -> (..., S), nats.
    Its gradient, softmax - one_hot(target), comes from the logits: nothing else of their size is kept."""
    return token_losses_forward(logits_SV, targets_S)[0]


def token_losses_forward(logits_SV, targets_S):
    """Compute the losses, and save what the gradient needs."""
    total_S = jax.nn.logsumexp(logits_SV, -1)
    of_target = jnp.take_along_axis(logits_SV, targets_S[..., None], -1)[..., 0]
    return total_S - of_target, (logits_SV, targets_S, total_S)


def token_losses_backward(saved, g_S):
    """Compute the gradient of the logits."""
    logits_SV, targets_S, total_S = saved
    token_SV = lax.broadcasted_iota(jnp.int32, logits_SV.shape, logits_SV.ndim - 1)
    one_hot_SV = token_SV == targets_S[..., None]
    return g_S[..., None] * (jnp.exp(logits_SV - total_S[..., None]) - one_hot_SV), None


token_losses.defvjp(token_losses_forward, token_losses_backward)


# --- 3. Fast weights --------------------------------------------------------------------------------
# Step sizes before meta-learning, found by a scan on validation repositories: the first step's for each
# tensor of `init_slow`. While w1 or `up` is 0, as at the start, the matrices before it have no gradient.
STEP_SIZES = {
    "muon": {"w0": 0.12, "w1": 0.6, "w2": 0.12, "w": 0.15, "b": 0.15, "down": 0.12, "up": 0.6, "bias": 4.0},
    "sgd": {"w0": 1.0, "w1": 16.0, "w2": 1.0, "w": 1.0, "b": 1.0, "down": 1.0, "up": 16.0, "bias": 16.0},
}
SHARES = (1.0, 0.6, 0.6, 0.3, 0.3, 0.3, 0.3)  # of these sizes, for the 1 + 2 + 4 steps of UPDATE_1, 2 and 4
ANNEAL = 0.1  # step sizes fall as 1 / sqrt(1 + ANNEAL * steps taken)


def init_slow(key, model: Model, fast: Fast) -> Params:
    """Make the slow parameters before meta-learning: `start`, W_0, which adds nothing yet (linear: little);
    `log_step` (7,) a tensor; `log_anneal`; `project` to reconstruct, which lora can't. Raises: UserError."""
    possible = fast.kind != "lora" or fast.objective == "next_token"
    require(possible, "lora can't learn by reconstruction; take --objective next_token or --fast swiglu")
    M, D, F, H, K = len(fast.blocks), model.width, fast.hidden, model.heads, model.head_width
    keys, zeros = jax.random.split(key, 3), lambda *shape: jnp.zeros((M, *shape))
    normal = lambda i, *shape: jax.random.normal(keys[i], (M, *shape)) * shape[-2] ** -0.5
    if fast.kind == "swiglu":
        adapters = {"w0": normal(0, D, F), "w1": zeros(F, D), "w2": normal(1, D, F)}
    elif fast.kind == "linear":
        adapters = {"w": normal(0, H, D // H, D // H), "b": zeros(H, 1, D // H)}
    else:
        adapters = {"q_down": normal(0, D, F), "v_down": normal(1, D, F)}
        adapters |= {"q_up": zeros(F, H * K), "v_up": zeros(F, model.kv_heads * K)}
    slow = {"start": {"adapters": adapters}, "log_anneal": jnp.log(jnp.float32(ANNEAL))}
    if fast.objective == "next_token":
        slow["start"]["bias"] = jnp.zeros((1, model.vocab))
    else:
        eye, value = jnp.broadcast_to(jnp.eye(D), (M, D, D)), jax.random.orthogonal(keys[2], D, (M,)) * 0.1
        slow["project"] = {"key": eye, "value": value, "query": eye}
    if fast.kind == "linear":
        slow["norm"] = {"weight": jnp.full((M, D), 0.1), "bias": zeros(D)}
    size = lambda path: STEP_SIZES[fast.optimizer][path[-1].key.split("_")[-1]]
    log_steps = lambda path, _: jnp.log(size(path) * jnp.asarray(SHARES))
    return slow | {"log_step": jax.tree.map_with_path(log_steps, slow["start"])}


def init_state(fast: Fast, slow: Params) -> State:
    """Make the state that every document starts from: W_0, no momentum, no steps taken."""
    momentum = jax.tree.map(jnp.zeros_like, slow["start"]) if fast.momentum else ()
    return State(slow["start"], momentum, jnp.zeros_like(slow["log_anneal"]))


def learned_parts(spec: Spec, slow: Params, w: Params) -> Params:
    """Stack what the suffix's blocks have of adapters: a block without one has zeros, which add nothing."""
    norm, query = slow.get("norm", {}), slow.get("project", {}).get("query")
    own, low = {"adapter": w["adapters"], "norm": norm, "query": query}, spec.fast.blocks[0]
    at, count = np.asarray(spec.fast.blocks) - low, spec.model.layers - low
    if len(at) == count:
        return own
    return jax.tree.map(lambda x: jnp.zeros_like(x, shape=(count, *x.shape[1:])).at[at].set(x), own)


def adapter(own: Params, x_CD, dtype):
    """Apply the adapter beside a block's MLP to each row x, (C, D) -> (C, D).
    swiglu: w1 @ (silu(w0 @ x) * (w2 @ x)), the MLP of Shazeer 2020, as fast weights in LaCT (2505.23884).
    linear: norm(w @ x + b) by head, TTT-Linear (2407.04620, section 2.7) without its residual."""
    w = own["adapter"]
    if "w0" in w:
        gate, up = (matmul(x_CD, w[name], dtype, dtype).astype(jnp.float32) for name in ("w0", "w2"))
        return matmul(gate * lax.logistic(gate) * up, w["w1"], dtype)
    z = matmul(split_heads(x_CD, w["w"].shape[0]), w["w"], dtype) + w["b"]
    z = z - z.mean(-1, keepdims=True)
    z = z * lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-5)
    return merge_heads(z) * own["norm"]["weight"] + own["norm"]["bias"]


def add_adapter(own: Params, out: BlockOutput, dtype) -> BlockOutput:
    """Add what the adapter makes of the MLP's input; under `reconstruction`, of a query made from it."""
    x_RD = out.normed_RD if own["query"] is None else matmul(out.normed_RD, own["query"], dtype)
    added = adapter(own, x_RD, dtype)
    return out._replace(x_RD=out.x_RD + added, added=added)


def fast_block(spec: Spec, p: Params, own: Params | None, x_SD, start=0, rows=None, cache=None):
    """Run a block with its fast weights, `own` of `learned_parts`, if it has some -> BlockOutput."""
    lora = own["adapter"] if own is not None and spec.fast.kind == "lora" else None
    out = block(spec.model, p, x_SD, start, rows, lora, cache)
    return out if own is None or lora is not None else add_adapter(own, out, spec.model.dtype)


def run_prefix(spec: Spec, weights: Weights, inputs_S):
    """Run all that no fast weight changes on tokens (S,) -> `Window`'s (x_SD, normed_SD). That is the lowest
    fast block too, unless lora changes it, or it is the last, of which only the chunk's rows are run."""
    model, shared = spec.model, spec.mesh is not None and spec.mesh.shape["fsdp"] > 1
    gather = partial(jax.tree.map, lambda x: lax.all_gather(x, "fsdp", tiled=True) if shared else x)
    x_SD = embed(model, weights.prefix, inputs_S)
    x_SD = run_blocks(model, weights.prefix["blocks"], x_SD, gather, spec.unroll)
    if spec.fast.kind == "lora" or spec.fast.blocks[0] == model.layers - 1:
        return x_SD, None
    lowest = jax.tree.map(lambda x: x[0], weights.suffix["blocks"])
    return block(model, lowest, x_SD, frozen=True)[:2]


def make_windows(spec: Spec, weights: Weights, tokens) -> Window:
    """Cut a document (T*C + 1,) into its T windows, stacked, and run the prefix on each.
    Chunk t is read with chunk t-1 as context; chunk 0 is its window's first half, the second is unseen."""
    C = spec.chunk
    place = jnp.arange((tokens.shape[0] - 1) // C)
    inputs_TS = tokens[C * jnp.maximum(place - 1, 0)[:, None] + jnp.arange(2 * C)]
    x_TSD, normed_TSD = lax.map(partial(run_prefix, spec, weights), inputs_TS)
    return Window(x_TSD, tokens[1:].reshape(-1, C), jnp.where(place == 0, 0, C), normed_TSD)


def predict(spec: Spec, weights: Weights, w: Params, window: Window) -> Reading:
    """Read one chunk with fast weights `w`. For its context the last block computes keys and values alone."""
    model, low, C = spec.model, spec.fast.blocks[0], window.targets_C.shape[-1]
    suffix = weights.suffix["blocks"], learned_parts(spec, weights.slow, w)
    part = lambda at: jax.tree.map(lambda x: x[at], suffix)
    first, last, x_SD, seen = 0, model.layers - 1 - low, window.x_SD, []
    keep = lambda out: [slice_rows(x, window.start, C) for x in (out.normed_RD, out.added)]

    def step(x_SD, p_and_own):
        out = fast_block(spec, *p_and_own, x_SD)
        return out.x_RD, keep(out)

    if window.normed_SD is not None:  # the prefix has run the first block
        out = add_adapter(part(0)[1], BlockOutput(x_SD, window.normed_SD), model.dtype)
        first, x_SD = 1, out.x_RD
        seen.append(jax.tree.map(lambda x: x[None], keep(out)))
    if first < last:
        x_SD, kept = lax.scan(step, x_SD, part(slice(first, last)), unroll=spec.unroll)
        seen.append(kept)
    out = fast_block(spec, *part(last), x_SD, window.start, C)
    seen.append(jax.tree.map(lambda x: x[None], keep(out)))
    at = np.asarray(spec.fast.blocks) - low
    inputs_MCD, outputs_MCD = (jnp.concatenate(x)[at] for x in zip(*seen, strict=True))
    logits_CV = logits(model, weights.suffix, out.x_RD, w)
    found = token_losses(logits_CV, window.targets_C), logits_CV, out.x_RD, inputs_MCD, outputs_MCD
    return Reading(*found, out.query_HRK, out.cache[0])


# --- 4. Learning: inner loss, inner step, update, meta-loss -----------------------------------------
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's coefficients a, b, c
ITERATIONS = 3  # of Newton-Schulz; Muon takes 5, which measured no better here


def reconstruction_loss(slow: Params, w: Params, inputs_MCD, dtype):
    """Compute the self-supervised inner loss 1/2 |f_W(key) - value|^2, summed over width -> scalar.
    It is averaged over the chunk and the fast blocks (TTT-LM, arXiv 2407.04620, eq. 4)."""
    key, value = (matmul(inputs_MCD, slow["project"][name], dtype) for name in ("key", "value"))
    own = {"adapter": w["adapters"], "norm": slow.get("norm", {})}
    error = jax.vmap(partial(adapter, dtype=dtype))(own, key) - value
    return 0.5 * (error * error).sum(-1).mean()


def differentiate(spec: Spec, weights: Weights, w: Params, window: Window):
    """Predict one chunk and set up its inner loss -> (reading, gradient_of, first).
    gradient_of(w) is its gradient at any w; first() gives loss and gradient of the forward pass just made."""
    if spec.fast.objective == "reconstruction":
        reading = predict(spec, weights, w, window)
        loss_of = lambda w: reconstruction_loss(weights.slow, w, reading.inputs_MCD, spec.model.dtype)
        return reading, jax.grad(loss_of), lambda: jax.value_and_grad(loss_of)(w)

    def next_token_loss(w):
        reading = predict(spec, weights, w, window)
        return reading.loss, reading

    loss, pullback, reading = jax.vjp(next_token_loss, w, has_aux=True)
    gradient_of = lambda w: jax.grad(next_token_loss, has_aux=True)(w)[0]
    return reading, gradient_of, lambda: (loss, pullback(jnp.ones_like(loss))[0])


def orthogonalise(gradient: Params, dtype) -> Params:
    """Drive the singular values of all matrices (..., m, n) to 1, so that every direction is learned alike.
    Newton-Schulz iterations x <- a x + b (x x') x + c (x x')^2 x (Muon, Jordan et al. 2024), of all matrices
    of one shape side by side; those that are taller than wide are turned."""
    a, b, c = NEWTON_SCHULZ

    @jax.jit  # once in the program for its three calls
    def iterate(x):
        xx = matmul(x, transpose(x), dtype, dtype)
        return (a * x + matmul(b * xx + c * matmul(xx, xx, dtype, dtype), x, dtype)).astype(dtype)

    leaves, structure = jax.tree.flatten(gradient)
    wide = [transpose(g) if g.shape[-2] > g.shape[-1] else g for g in leaves]
    for shape in sorted({g.shape[-2:] for g in wide}):
        at = [i for i, g in enumerate(wide) if g.shape[-2:] == shape]
        x = jnp.concatenate([wide[i].reshape(-1, *shape) for i in at])
        square = (x * x).sum((-2, -1), keepdims=True)  # at 0, 1 / |g| would have an infinite derivative
        x = (x * lax.rsqrt(jnp.where(square > 0, square, jnp.inf))).astype(dtype)
        for _ in range(ITERATIONS):
            x = iterate(x)
        low = 0
        for i in at:
            high = low + wide[i].size // math.prod(shape)
            done, low = x[low:high].reshape(wide[i].shape).astype(jnp.float32), high
            leaves[i] = done if wide[i] is leaves[i] else transpose(done)
    return jax.tree.unflatten(structure, leaves)


def inner_step(spec: Spec, slow: Params, state: State, gradient: Params, i, wanted=True) -> State:
    """Take one inner step, W - eta_i / sqrt(1 + anneal * steps) * direction -> the state, the same if no step
    is wanted or W would not be finite. Each tensor has learned eta_i: for step j from 0 of k, i = k - 1 + j,
    as in SHARES. The direction is the gradient clipped (sgd), summed with momentum, orthogonalised (muon)."""
    fast, momentum = spec.fast, state.momentum
    if fast.optimizer == "sgd":
        size = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(gradient)) + 1e-12)
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, fast.clip / size), gradient)
    if fast.momentum:
        gradient = momentum = jax.tree.map(lambda m, g: fast.momentum * m + g, momentum, gradient)
    if fast.optimizer == "muon":
        gradient = orthogonalise(gradient, spec.model.dtype)
    fall = lax.rsqrt(1 + jnp.exp(slow["log_anneal"]) * state.steps)
    this = jnp.float32(jnp.arange(len(SHARES)) == i)
    move = lambda w, g, log_step: w - jnp.exp(jnp.vdot(log_step, this)) * fall * g
    w = jax.tree.map(move, state.w, gradient, slow["log_step"])
    taken = wanted & jnp.isfinite(jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, w)))
    return jax.tree.map(partial(jnp.where, taken), State(w, momentum, state.steps + 1), state)


def ttt_update(spec: Spec, slow: Params, state: State, gradient_of, first, steps) -> State:
    """Take `steps` inner steps (one of STEPS, may be traced) with what `differentiate` gave -> the state.
    No step runs that no document takes (`change_if`, section 5): a SKIP costs one branch. `first` saves a
    forward pass; if it is None all steps are alike, which is the shortest program to differentiate."""

    def go_on(state: State, j):
        take = lambda state: inner_step(spec, slow, state, gradient_of(state.w), steps - 1 + j, j < steps)
        state = change_if(j < steps, jax.checkpoint(take), state)
        return jax.tree.map(partial(checkpoint_name, name="state"), state), None

    take_from = lambda j, state: lax.scan(go_on, state, jnp.arange(j, STEPS[-1]))[0]
    if first is None:
        return take_from(0, state)
    take_first = lambda state: inner_step(spec, slow, state, first()[1], steps - 1, steps > 0)
    update = lambda state: change_if(steps > 1, partial(take_from, 1), take_first(state))
    return change_if(steps > 0, update, state)


def read_chunk(spec: Spec, weights: Weights, state: State, window: Window):
    """Predict one chunk, and be ready to learn from it -> (reading, learn, inner). learn(action) gives the
    state after an action, which may be traced; inner() the norm of the inner gradient, and the inner loss."""
    reading, gradient_of, first = differentiate(spec, weights, state.w, window)
    update = partial(ttt_update, spec, weights.slow, state, gradient_of, first)
    learn = lambda action: update(jnp.asarray(STEPS)[action])

    def inner():
        loss, gradient = first()
        return jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(gradient))), loss

    return reading, learn, inner


def document_loss(spec: Spec, weights: Weights, windows: Window, actions_T):
    """Compute the meta-loss, a document's mean loss when read with these actions -> (loss, losses (T,)).
    The backward pass keeps the state after each inner step, and computes all else again."""

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("state"))
    def step(state, inputs):
        window, steps = inputs
        window = window._replace(start=largest(window.start))  # one for all: section 5
        reading, gradient_of, _ = differentiate(spec, weights, state.w, window)
        return ttt_update(spec, weights.slow, state, gradient_of, None, steps), reading.loss

    steps_T = jnp.asarray(STEPS)[actions_T]
    _, losses_T = lax.scan(step, init_state(spec.fast, weights.slow), (windows, steps_T))
    return losses_T.mean(), losses_T


def count_flops(spec: Spec, weights: Weights) -> np.ndarray:
    """Count the floating-point operations of reading one chunk with each action (4,), as XLA does."""

    def read(weights: Weights, tokens, steps: int):
        x_SD, normed_SD = run_prefix(spec, weights, tokens[:-1])
        window = Window(x_SD, tokens[-spec.chunk :], jnp.int32(spec.chunk), normed_SD)
        state = init_state(spec.fast, weights.slow)
        reading, gradient_of, first = differentiate(spec, weights, state.w, window)
        for i in range(steps):
            gradient = gradient_of(state.w) if i else first()[1]
            state = inner_step(spec, weights.slow, state, gradient, i)
        return reading.loss, state

    # Of a GPU's kernel XLA counts nothing, and of a loop one turn.
    spec = spec._replace(model=spec.model._replace(dtype="float32"), unroll=True)
    tokens = np.zeros(2 * spec.chunk + 1, np.int32)
    skip, once, twice = (operations(partial(read, steps=k), weights, tokens) for k in range(3))
    return np.asarray([skip if k == 0 else once + (k - 1) * (twice - once) for k in STEPS])


def operations(function, *args) -> float:
    """Count a function's floating-point operations, as XLA does: for CPUs, before it compiles."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


# --- 5. Documents side by side ----------------------------------------------------------------------
# An accelerator is busy only with several documents at once, a CPU with one. They are read in step, each with
# its own fast weights (`vmap`), and each decides for itself: what one of them needs is computed for all.
SIDE_BY_SIDE = 8  # documents at most


def fit_documents(spec: Spec, slow: Params, chunks: int) -> int:
    """Find how many documents of so many chunks fit a device's memory side by side; on a CPU it is 1.
    Meta-learning takes most: weights and momentum after each step of each chunk, and arrays of logits."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    fast = sum(x.size for x in jax.tree.leaves(slow["start"]))
    one = 8 * fast * STEPS[-1] * chunks + 32 * spec.chunk * spec.model.vocab  # bytes
    return int(np.clip(memory * 0.8 // one, 1, SIDE_BY_SIDE))


def beside(spec: Spec, count: int) -> int:
    """Find how many of `count` documents are read side by side: a divisor, so that no place stays empty."""
    return max(n for n in range(1, spec.together + 1) if count % n == 0)


@custom_vmap
def largest(x):
    """Give x, of documents side by side the largest: a branch or a slice's start has to be one value."""
    return x


largest.def_vmap(lambda count, batched, x: (x.max(0) if batched[0] else x, False))


def side_by_side(spec: Spec, function, documents: Any) -> Any:
    """Run function(spec, document) on N stacked documents, Spec.together of them at a time -> all results."""
    count = len(jax.tree.leaves(documents)[0])
    together = beside(spec, count)
    run = partial(function, spec._replace(together=together))
    if 1 < together == count:
        return jax.vmap(run)(documents)
    return lax.map(run, documents, batch_size=together if together > 1 else None)


def change_if(wanted, change, x: Any) -> Any:
    """Return change(x) if it is wanted, else x. Of documents side by side one that wants it has it computed
    for all: change(x) then has to be x where it is not wanted."""
    return lax.cond(largest(wanted), change, lambda x: x, x)


# --- 6. Writing -------------------------------------------------------------------------------------
PIECE = 16  # tokens that are written before Python looks at them


def cut_blocks(blocks: Params) -> tuple[Params, ...]:
    """Take stacked blocks apart. A CPU copies what it cuts from a stack, as slowly as it computes: for every
    token, in a loop over blocks."""
    return tuple(jax.tree.map(lambda x: x[i], blocks) for i in range(len(jax.tree.leaves(blocks)[0])))


def for_writing(spec: Spec, weights: Weights) -> tuple[Spec, Weights]:
    """Choose how a backend writes: a CPU without loops over blocks, and in float32, as its bfloat16 products
    are slow for single rows."""
    if jax.default_backend() != "cpu":
        return spec, weights
    spec = spec._replace(model=spec.model._replace(dtype="float32"), unroll=True)
    parts = (part | {"blocks": cut_blocks(part["blocks"])} for part in weights[:2])
    return spec, Weights(*parts, weights.slow)


def run_cached(spec: Spec, blocks: Params, own: Params | None, x_RD, start, caches):
    """Run blocks on rows from `start` on, after those in their caches -> (x_RD, caches). They are stacked, or
    with Spec.unroll tuples."""

    def step(x_RD, inputs):
        p, own, cache = inputs
        out = fast_block(spec, p, own, x_RD, start, cache=cache)
        return out.x_RD, out.cache

    if not spec.unroll:
        return lax.scan(step, x_RD, (blocks, own, caches))
    after = []
    for inputs in zip(blocks, own or repeat(None), caches):
        x_RD, cache = step(x_RD, inputs)
        after.append(cache)
    return x_RD, tuple(after)


def read_on(spec: Spec, weights: Weights, own: Params, w: Params, caches, tokens_R, start, last=0):
    """Read tokens at positions start ... start+R-1 of a window, after those in caches of prefix and suffix
    -> (logits (V,) of what follows the `last` of them, caches). Cache rows not read yet may hold anything."""
    x_RD = embed(spec.model, weights.prefix, tokens_R, start)
    x_RD, below = run_cached(spec, weights.prefix["blocks"], None, x_RD, start, caches[0])
    x_RD, above = run_cached(spec, weights.suffix["blocks"], own, x_RD, start, caches[1])
    return logits(spec.model, weights.suffix, slice_rows(x_RD, last, 1), w)[0], (below, above)


def read_rows(spec: Spec, weights: Weights, w: Params):
    """Make a function that reads on in B rows, read(caches, tokens, start, last). Fast weights w are each
    row's own, with a leading B, or the same for all; adapters are collected once for all tokens."""

    def collect(w):
        own = learned_parts(spec, weights.slow, w)
        return cut_blocks(own) if spec.unroll else own

    first = lambda tree: jax.tree.leaves(tree)[0]
    alike = first(w).ndim == first(weights.slow["start"]).ndim
    own, axis = (collect(w), None) if alike else (jax.vmap(collect)(w), 0)
    read = partial(read_on, spec, weights)
    return lambda *rows: jax.vmap(read, (axis, axis) + (0,) * len(rows))(own, w, *rows)


@partial(jax.jit, static_argnums=(0, 5))
def prefill(spec: Spec, weights: Weights, w_B: Params, tokens_BS, lengths_B, size: int):
    """Read the first lengths_B tokens of B windows -> (logits (B, V) of what follows, caches (B, ...)).
    Each row has its own fast weights, or all the same; each cache has room for `size` positions."""
    model, low = spec.model, spec.fast.blocks[0]
    shape = model.kv_heads, size, model.head_width
    empty = lambda *n: (jnp.zeros((len(lengths_B), *n, *shape), model.dtype),) * 2
    caches_B = [(empty(),) * n if spec.unroll else empty(n) for n in (low, model.layers - low)]
    return read_rows(spec, weights, w_B)(caches_B, tokens_BS, jnp.zeros_like(lengths_B), lengths_B - 1)


class Draw(NamedTuple):
    """How tokens are drawn: by key, row and number alone, whatever stands beside a row."""

    key: Any
    row_B: Any  # a number for each row
    number_B: Any  # of the next token in its text
    temperature: Any  # 0: the most likely token


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def write_piece(spec: Spec, weights: Weights, w_B: Params, caches_B, logits_BV, places_B, draw: Draw):
    """Write PIECE tokens of B rows side by side -> (tokens (B, PIECE), caches, logits (B, V) of the next).
    places_B are the positions of their next tokens. The cost depends on the caches' size alone."""
    read = read_rows(spec, weights, w_B)

    def sample(logits_V, row, number):
        own = jax.random.fold_in(jax.random.fold_in(draw.key, row), number)
        drawn = lambda: jax.random.categorical(own, logits_V / draw.temperature)
        return lax.cond(draw.temperature > 0, drawn, lambda: jnp.argmax(logits_V))

    def step(carry, i):
        logits_BV, caches_B = carry
        token_B = jax.vmap(sample)(logits_BV, draw.row_B, draw.number_B + i)
        return read(caches_B, token_B[:, None], places_B + i), token_B

    (logits_BV, caches_B), tokens = lax.scan(step, (logits_BV, caches_B), jnp.arange(PIECE))
    return tokens.T, caches_B, logits_BV


# --- 7. The mesh ------------------------------------------------------------------------------------
# A mesh of `data` x `fsdp` devices. Documents are spread over all. The prefix's blocks are split over `fsdp`,
# and gathered one by one, by all devices at once. Each decides how often the suffix runs, and has it whole.
AXES = ("data", "fsdp")
ROWS = PartitionSpec(AXES)  # documents
WHOLE = PartitionSpec()  # the same on every device
SPLIT = PartitionSpec(None, "fsdp")  # stacked blocks, on the axis after L


def make_mesh(data: int = 1, fsdp: int = 1, devices=None) -> Mesh:
    """Make a mesh of the first data x fsdp of the devices (left out: of all)."""
    return jax.make_mesh((data, fsdp), AXES, (AxisType.Auto,) * 2, devices=devices)


def place(mesh: Mesh, tree: Any, layout: PartitionSpec = WHOLE) -> Any:
    """Put host values, the same in every process, on the mesh, in one layout for all leaves."""
    sharding = NamedSharding(mesh, layout)
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(lambda x: put(np.asarray(x)), tree)


def place_weights(mesh: Mesh, weights: Weights) -> Weights:
    """Put all weights on the mesh, and only once the embeddings that prefix and suffix share.
    Raises: UserError if the prefix's blocks can't be split evenly on the axis after L."""
    fsdp, below = mesh.shape["fsdp"], weights.prefix["blocks"]
    odd = next((name for name, x in flatten(below).items() if x.shape[1] % fsdp), None)
    require(not odd, f"the model's {odd} can't be split {fsdp} ways; choose another fsdp in --mesh-shape")
    prefix = place(mesh, weights.prefix | {"blocks": ()}) | {"blocks": place(mesh, below, SPLIT)}
    suffix = prefix | {"blocks": place(mesh, weights.suffix["blocks"])}
    return Weights(prefix, suffix, place(mesh, weights.slow))


def on_devices(mesh: Mesh, function, weights: Weights, shared: Any, documents: Any, out: Any = ROWS) -> Any:
    """Run function(weights, shared, documents) on every device with its part of the N documents -> what it
    returns, stacked on N (`out` ROWS), or the same everywhere after a `lax.pmean` over AXES (`out` WHOLE)."""

    def device(weights, shared, documents):
        # Marked as each device's own: the gradient in them is then one device's, not summed up unseen.
        suffix, slow, shared = lax.pcast((weights.suffix, weights.slow, shared), AXES, to="varying")
        return function(weights._replace(suffix=suffix, slow=slow), shared, documents)

    prefix = dict.fromkeys(weights.prefix, WHOLE) | {"blocks": SPLIT}
    specs = Weights(prefix, WHOLE, WHOLE), WHOLE, ROWS
    return jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=out)(weights, shared, documents)


# ======================================== plumbing ==================================================
# --- 8. Weights in, and checkpoints -----------------------------------------------------------------
def init_params(key, model: Model) -> Params:
    """Initialise a model as GPT-2 was: normal(0.02), products into the residual stream by 1/sqrt(2L) less."""
    D, A, kv, F = model.width, model.heads * model.head_width, model.kv_heads * model.head_width, model.hidden
    number, residual = count(), (2 * model.layers) ** -0.5

    def weight(role: str, *shape: int, scale: float = 1.0) -> Params:
        normal = 0.02 * scale * jax.random.normal(jax.random.fold_in(key, next(number)), shape)
        made = {"weight": jnp.ones(shape) if role == "norm" else normal}
        if role in model.biases:
            made["bias"] = jnp.zeros(shape[-1])
            next(number)  # a bias has its number too
        return made

    params = {"embed": weight("", model.vocab, D), "blocks": ()}
    params |= {} if model.rotary else {"positions": weight("", model.positions, D)}
    params |= {} if model.tied else {"head": weight("", model.vocab, D)}
    for _ in range(model.layers):
        norms = {"norm_1": weight("norm", D), "norm_2": weight("norm", D)}
        attn = {"q": weight("qkv", D, A), "k": weight("qkv", D, kv), "v": weight("qkv", D, kv)}
        attn |= {"o": weight("o", A, D, scale=residual)}
        mlp = {"up": weight("mlp", D, F), "down": weight("mlp", F, D, scale=residual)}
        mlp |= {"gate": weight("mlp", D, F)} if model.gated else {}
        params["blocks"] += (norms | {"attn": attn, "mlp": mlp},)
    return params | {"norm": weight("norm", D)}


FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2")


def find_model(name: str) -> Path:
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


def load_model(folder: Path, dtype: str = "float32") -> tuple[Model, Params]:
    """Load a checkpoint of one of FAMILIES, in NumPy; `dtype` is that of products, and so of matrices.
    Raises: UserError unless all weights are there, of the right shapes, and no others."""
    model = read_shape(folder)._replace(dtype=dtype)
    found = read_weights(folder, model)
    if model.tied and np.array_equal(found.get("head.weight", ()), found.get("embed.weight")):
        del found["head.weight"]
    wanted = flatten(jax.eval_shape(partial(init_params, model=model), jax.random.key(0)))
    for name in sorted(wanted | found):
        have, want = (str(flat[name].shape) if name in flat else "none" for flat in (found, wanted))
        require(have == want, f"{folder}: shape of {name}: {want} by its config.json, {have} in its weights")
    return model, nest(found)


def read_config(folder: Path) -> Any:
    """Read config.json, in the names that `transformers` gives settings. Raises: UserError."""
    from transformers import AutoConfig, logging  # takes seconds

    logging.set_verbosity_error()  # it would warn of tokens that don't matter here
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}/config.json: no usable configuration ({reason}); fetch it again") from None
    kind = config.model_type
    require(kind in FAMILIES, f"{folder}: {kind!r} is none of {', '.join(FAMILIES)}")
    return config


def read_shape(folder: Path) -> Model:
    """Describe the model of a config.json. Raises: UserError where this forward would not compute it."""
    config = read_config(folder)
    first = lambda *names: next((x for name in names if (x := getattr(config, name, None)) is not None), None)
    kind, rope = config.model_type, first("rope_parameters") or {}
    gpt2, neox = kind == "gpt2", kind == "gpt_neox"
    llama = not gpt2 and not neox
    attn, mlp = gpt2 or first("attention_bias"), not llama or first("mlp_bias")
    biases = {"norm": not llama, "qkv": attn or kind == "qwen2", "o": attn, "mlp": mlp}
    width, heads, positions = config.hidden_size, config.num_attention_heads, config.max_position_embeddings
    head_width, turning = first("head_dim") or width // heads, rope.get("partial_rotary_factor", 1.0)
    model = Model(
        vocab=config.vocab_size,
        positions=min(positions, first("sliding_window") or positions),
        width=width,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        head_width=head_width,
        hidden=first("intermediate_size", "n_inner") or 4 * width,
        norm="rms" if llama else "layer",
        eps=first("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"),
        activation=first("activation_function", "hidden_act"),
        gated=llama,
        rotary=int(head_width * turning) if rope else 0,
        theta=float(rope.get("rope_theta", 10000.0)),
        parallel=neox and config.use_parallel_residual,
        tied=config.tie_word_embeddings,
        biases=tuple(role for role, has in biases.items() if has),
    )
    plain = rope.get("rope_type", "default") == "default" and (turning == 1 or neox)
    supported = {
        f"activation {model.activation!r}": model.activation in ACTIVATIONS,
        f"{heads} heads that share {model.kv_heads} of keys": heads % model.kv_heads == 0,
        f"rotary positions {rope}": plain and model.rotary % 2 == 0 and 0 <= model.rotary <= head_width,
        "scale_attn_weights false": first("scale_attn_weights") in (None, True),
        "scale_attn_by_inverse_layer_idx": not first("scale_attn_by_inverse_layer_idx"),
    }
    for what, holds in supported.items():
        require(holds, f"{folder}: its config.json asks for {what}, which is not supported")
    return model


CHECKPOINT_NAMES = {  # our name of a weight: what it is called in these families' checkpoints
    "embed": "wte embed_in embed_tokens",
    "positions": "wpe",
    "norm_1": "ln_1 input_layernorm",
    "norm_2": "ln_2 post_attention_layernorm",
    "attn.qkv": "attn.c_attn attention.query_key_value",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "attn.c_proj attention.dense self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.c_fc mlp.dense_h_to_4h mlp.up_proj",
    "mlp.down": "mlp.c_proj mlp.dense_4h_to_h mlp.down_proj",
    "norm": "ln_f final_layer_norm norm",
    "head": "lm_head embed_out",
}
OUR_NAMES = {theirs: ours for ours, names in CHECKPOINT_NAMES.items() for theirs in names.split()}
NAME = re.compile(r"(?s)(?:transformer\.|gpt_neox\.|model\.)?(?:(h|layers)\.(\d+)\.)?(.*?)(\.weight|\.bias)?")
CONSTANTS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq")  # of old checkpoints


def read_weights(folder: Path, model: Model) -> dict[str, np.ndarray]:
    """Read model.safetensors, or its parts model-*.safetensors, under our names: matrices (in, out), in
    `Model.dtype`, those of queries, keys and values apart. Raises: UserError."""
    whole, found = folder / "model.safetensors", {}
    paths = [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors"))
    advice = "a pickle (.bin) can run any code; if you trust it, make one with transformers' save_pretrained"
    require(paths, f"{folder}: no model.safetensors; {advice}")
    for full, x in (pair for path in paths for pair in load_state(path)[0].items()):
        if full.endswith(CONSTANTS):
            continue
        stack, number, name, leaf = NAME.fullmatch(full).groups("")
        ours = (f"blocks.{number}." if stack else "") + OUR_NAMES.get(name, name)
        fused, by_head = ours.endswith(".qkv"), name == "attention.query_key_value"
        fits = not fused or x.shape[0 if by_head else -1] == 3 * model.heads * model.head_width
        fits = fits and x.dtype.name in ("float32", "bfloat16", "float16")
        require(fits, f"{full} is {x.dtype.name} of shape {x.shape}, which does not fit its config.json")
        x = np.asarray(x, jnp.dtype(model.dtype if x.ndim == 2 else "float32"))  # now, not in each product
        if by_head:  # each head's query, key and value stand side by side
            x = np.swapaxes(x.reshape(model.heads, 3, model.head_width, -1), 0, 1).reshape(x.shape)
        if stack == "layers" and x.ndim == 2:  # torch.nn.Linear stores (out, in), GPT-2 does not
            x = x.T
        parts = zip("qkv", np.split(x, 3, -1)) if fused else [("", x)]
        found |= {f"{ours.removesuffix('qkv')}{part}{leaf}": np.ascontiguousarray(y) for part, y in parts}
    return found


def nest(flat: dict[str, Any]) -> Params:
    """Make a pytree of named leaves: {'a.b': x, 'blocks.0.c': y} -> {'a': {'b': x}, 'blocks': ({'c': y},)}"""
    tree: Params = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[leaf] = value
    if "blocks" in tree:
        tree["blocks"] = tuple(tree["blocks"][str(i)] for i in range(len(tree["blocks"])))
    return tree


def flatten(tree: Params) -> dict[str, Any]:
    """Name the leaves of any pytree, as `nest` takes them."""
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def split_weights(fast: Fast, params: Params, slow: Params) -> Weights:
    """Stack the blocks, and cut them at the lowest fast one. Both parts have embeddings, norm and head."""
    low, blocks = fast.blocks[0], stack_blocks(params["blocks"])
    parts = (jax.tree.map(lambda x: x[at], blocks) for at in (slice(low), slice(low, None)))
    return Weights(*(params | {"blocks": part} for part in parts), slow)


def save_state(path: Path, state: Any, **meta: Any) -> None:
    """Write a pytree of arrays, whole on every device, and `meta` (JSON) about it. Hosts wait for that."""
    multihost_utils.sync_global_devices(f"before {path.name}")
    arrays = {name: np.asarray(x, order="C") for name, x in flatten(state).items()}
    write_atomic(path, safetensors.numpy.save(arrays, metadata={"ponderttt": json.dumps(meta)}))
    multihost_utils.sync_global_devices(f"after {path.name}")


def load_state(path: Path, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Load the pytree saved at `path`, in the structure of `like`, and its `meta`; without `like`
    the arrays by name. Raises: UserError if the file is damaged or belongs to other settings."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            meta, names = json.loads((file.metadata() or {}).get("ponderttt", "{}")), file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); replace or delete it") from None
    if like is None:
        return arrays, meta
    wanted, shapes = flatten(like), partial(jax.tree.map, np.shape)
    fits = shapes(arrays) == shapes(wanted)
    require(fits, f"{path}: belongs to other settings; choose another --out or --weights")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]), meta


def learner(fast: Fast, params: Params) -> dict[str, Any]:
    """Say what trained fast weights belong to, for their file: settings, checksum of the base's last norm."""
    return {"fast": fast._asdict(), "base": zlib.crc32(np.asarray(params["norm"]["weight"], "f4").tobytes())}


def trained_fast(path: Path, asked: dict[str, Any], params: Params) -> Fast:
    """Read from saved fast weights what they are and how they learn. Raises: UserError if there are none, if
    fields of Fast are asked to be others, or if they were trained with another base."""
    meta = load_state(path)[1] if path.exists() else {}
    require("fast" in meta, f"{path}: no trained fast weights; give another run's folder, or --weights none")
    fast = Fast(**meta["fast"] | {"blocks": tuple(meta["fast"]["blocks"])})
    ours, theirs = asked | {"base": learner(fast, params)["base"]}, meta | fast._asdict()
    other = ", ".join(name for name, x in ours.items() if x != theirs[name])
    advice = "leave that out, or train anew with --weights none"
    require(not other, f"--weights {path.parent}: trained with another {other}; {advice}")
    return fast


# --- 9. Hosts and devices ---------------------------------------------------------------------------
def join_hosts(hosts: str) -> None:
    """Find the other hosts, before JAX looks for devices; one alone speaks and writes. Raises: UserError."""
    try:
        if hosts == "auto":
            jax.distributed.initialize()
        else:
            address, count, index = hosts.split(",")
            int(address.rpartition(":")[2])  # without a port JAX ends with a traceback, or none
            jax.distributed.initialize(address, int(count), int(index))
    except (RuntimeError, ValueError) as error:
        form, reason = "give auto or HOST:PORT,COUNT,INDEX", str(error).splitlines()[0][:200]
        raise UserError(f"--hosts {hosts}: {form}; hosts didn't meet ({reason})") from None
    if jax.process_index():
        data.WRITES, sys.stdout = False, open(os.devnull, "w")  # noqa: SIM115


def open_mesh(shape: str | None = None) -> Mesh:
    """Make the mesh of --mesh-shape, or of all devices. Raises: UserError if there are no such devices."""
    there = jax.device_count()
    try:
        rows, fsdp = map(int, shape.split(",")) if shape else (there, 1)
    except ValueError:
        raise UserError(f"--mesh-shape {shape}: give two numbers, DATA,FSDP, such as 4,2") from None
    least = there if jax.process_count() > 1 else 1  # several hosts use all their devices
    fits = min(rows, fsdp) > 0 and least <= rows * fsdp <= there
    require(fits, f"--mesh-shape {shape}: {rows} x {fsdp} devices, and there are {there}")
    return make_mesh(rows, fsdp)


def check_devices(mesh: Mesh, dtype: str, meta_gradient) -> None:
    """Check that meta_gradient(spec, weights, batch) of a small model is one device's. Raises: UserError."""
    fsdp, kind = mesh.shape["fsdp"], jax.devices()[0].device_kind
    print(f"mesh: {dict(mesh.shape)} of {kind}, {jax.process_count()} processes", flush=True)
    model, fast = Model(97, 16, 16 * fsdp, 2, 2, 2, 8 * fsdp, 64 * fsdp, dtype), Fast((1,), 8)
    params, slow = init_params(jax.random.key(0), model), init_slow(jax.random.key(1), model, fast)
    weights, rng = split_weights(fast, params, slow), np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab, (mesh.size, 3 * 8 + 1), np.int32)
    batch = tokens, rng.integers(0, len(STEPS), (mesh.size, 3), np.int32)

    def compute(mesh):
        placed = place_weights(mesh, weights), place(mesh, batch, ROWS)
        return jax.device_get(jax.jit(meta_gradient, static_argnums=0)(Spec(model, fast, 8, mesh), *placed))

    error = lambda ours, one: np.abs(ours - one).max() / (np.abs(one).max() + 1e-12)
    errors = jax.tree.map(error, compute(mesh), compute(make_mesh(devices=jax.local_devices())))
    worst, tolerance = np.max(jax.tree.leaves(errors)), {"float32": 1e-4, "bfloat16": 0.02}[dtype]
    require(worst < tolerance, f"loss or meta-gradient are off by {worst:.1e} from one device's")
    print(f"loss and meta-gradient, {dtype}: as on one device (largest difference {worst:.1e})\nPASS")


def native_dtype() -> str:
    """Choose bfloat16 where matrix units take it (about twice as fast), float32 elsewhere."""
    cpu = Path("/proc/cpuinfo")
    amx = cpu.exists() and "amx_bf16" in cpu.read_text()
    return "bfloat16" if jax.default_backend() != "cpu" or amx else "float32"


def keep_memory() -> None:
    """Have the C library keep what is freed: on a CPU each call of a program takes its memory anew, and
    clearing its pages is up to a quarter of an UPDATE_1's time. Of a GPU's memory take nine tenths."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-3, 1 << 27)  # M_MMAP_THRESHOLD: up to this size memory is the heap's,
        libc.mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD: of which so much may lie idle at its end
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; both at once are refused
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")


# --- 10. Numerics -----------------------------------------------------------------------------------
def transpose(x):
    """Swap the last two axes, in memory too: XLA would fold a plain transpose into the product that follows,
    and its CPU backend then leaves the fast bfloat16 kernels (3-5 times slower)."""
    x = jnp.swapaxes(x, -1, -2)
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        x = lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))
    return x


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(a, b, dtype, out="float32"):
    """Multiply a (..., m, k) by b (..., k, n) or (k, n) -> (..., m, n) of type `out`, added up in float32.
    Operands are rounded to `dtype`, forward and backward. Can be differentiated any number of times."""
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.dtype(out))


def matmul_forward(a, b, dtype, out):
    """Multiply, and save the operands, with empty arrays that tell the types they had before rounding."""
    return matmul(a, b, dtype, out), (a.astype(dtype), b.astype(dtype), a[:0], b[:0])


def matmul_backward(dtype, out, saved, g):
    """Compute the gradients of a and b."""
    a, b, like_a, like_b = saved
    g = g.astype(dtype)
    grad_a = matmul(g, transpose(b), dtype, like_a.dtype.name)
    if b.ndim == 2 and a.ndim > 2:  # a shared weight: sum over rows
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    return grad_a, matmul(transpose(a), g, dtype, like_b.dtype.name)


matmul.defvjp(matmul_forward, matmul_backward)
