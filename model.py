"""A language model as a raw pytree, and the fast weights that learn while it reads.

    p(x)      frozen GPT-2, GPT-NeoX (Pythia) or Llama, weights under the checkpoint's own names
    W         fast weights: one small adapter in each of the last quarter of the blocks
    W <- W - eta_i * orthogonalise(grad_W inner_loss(W; chunk))   one inner step (`ttt_update`)

Dimensions, used as suffixes and in einsums:
    B rows   N documents   T chunks   C tokens per chunk   S positions of a window (2C: context and chunk)
    D model width   H heads of queries   G heads of keys and values   K head width   A = H K
    F hidden width   V vocabulary   L blocks   M fast blocks   Q positions read on from some place

Slow (frozen or meta-learned) and fast (per document) weights are separate arguments everywhere.
Every function is pure; `jit` is the caller's. Losses, softmax and norms are float32; matrix
products take their operands in `Model.dtype` and accumulate in float32.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Params = dict[str, Any]
QUERY_BLOCK = 128  # rows of attention scores held at once; where `start` is an int, later keys are left out
LOSS_ROWS = 256  # rows of logits that `language_loss` holds at once


class ModelError(Exception):
    """A checkpoint that can't be used; the message is one line that says what to do."""


class Names(NamedTuple):
    """What the checkpoints of an architecture call their weights; the pytree keeps these names, and has
    the blocks as a tuple under "h"."""

    prefix: str  # of all names but the head's; some checkpoints leave it out
    embed: str
    blocks: str
    norm_1: str  # before the attention
    attn: str
    qkv: tuple[str, ...]  # one product for queries, keys and values, or one for each
    out: str
    norm_2: str  # before the MLP
    mlp: str
    up: tuple[str, ...]  # the first goes through the activation, the second, if any, gates it
    down: str
    norm: str  # after the last block
    head: str
    positions: str = ""  # learned ones
    linear: bool = True  # products are torch.nn.Linear's, stored (out, in)
    by_head: bool = False  # the one product has each head's query, key and value side by side


NAMES = {
    "gpt2": Names(
        "transformer.", "wte", "h", "ln_1", "attn", ("c_attn",), "c_proj", "ln_2", "mlp", ("c_fc",), "c_proj", "ln_f", "lm_head",
        positions="wpe", linear=False,
    ),
    "gpt_neox": Names(
        "gpt_neox.", "embed_in", "layers", "input_layernorm", "attention", ("query_key_value",), "dense", "post_attention_layernorm",
        "mlp", ("dense_h_to_4h",), "dense_4h_to_h", "final_layer_norm", "embed_out", by_head=True,
    ),
    "llama": Names(
        "model.", "embed_tokens", "layers", "input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj",
        "post_attention_layernorm", "mlp", ("gate_proj", "up_proj"), "down_proj", "norm", "lm_head",
    ),
}  # fmt: skip


class Model(NamedTuple):
    """The frozen model's shape (hashable: a static argument of jitted functions)."""

    vocab: int
    positions: int
    width: int
    layers: int
    heads: int
    eps: float = 1e-5
    dtype: str = "float32"  # of matrix products' operands: float32 or bfloat16
    kind: str = "gpt2"  # whose names its weights have, in NAMES
    kv_heads: int = 0  # 0: as many as heads
    head_width: int = 0  # 0: width / heads
    hidden: int = 0  # of an MLP; 0: 4 width
    norm: str = "layer"  # or "rms"
    activation: str = "gelu_new"
    rotary: int = 0  # how many of a head's K dimensions turn with the position; 0: positions are learned
    theta: float = 10000.0  # their longest wavelength is about 2 pi theta
    parallel: bool = False  # attention and MLP read the same residual stream
    tied: bool = True  # the head is the embedding
    biases: tuple[str, ...] = ("norm", "qkv", "out", "mlp")  # which weights come with one

    @property
    def names(self) -> Names:
        return NAMES[self.kind]

    @property
    def G(self) -> int:
        return self.kv_heads or self.heads

    @property
    def K(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def F(self) -> int:
        return self.hidden or 4 * self.width


# --- 1. Matrix products, norm, attention ----------------------------------------------------


def transpose(x):
    """(..., m, n) -> (..., n, m), in memory too. XLA would fold a plain transpose into the product
    that follows, and its CPU backend then leaves the fast bfloat16 kernels (3-5 times slower)."""
    x = jnp.swapaxes(x, -1, -2)
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        x = lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))
    return x


with_own_gradients: Any = partial(jax.custom_vjp, nondiff_argnums=(2,))  # in the first two arguments


@with_own_gradients
def matmul(a, b, dtype):
    """a (..., m, k) @ b (..., k, n) or (k, n) -> float32 (..., m, n). Operands are rounded to
    `dtype`, forward and backward; can be differentiated any number of times."""
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _matmul_forward(a, b, dtype):
    like_a, like_b = a[:0], b[:0]  # empty: they only carry the operands' own types to the backward pass
    return matmul(a, b, dtype), (a.astype(dtype), b.astype(dtype), like_a, like_b)


def _matmul_backward(dtype, saved, g):
    a, b, like_a, like_b = saved
    g = g.astype(dtype)
    grad_a = matmul(g, transpose(b), dtype)
    if b.ndim == 2 and a.ndim > 2:  # a shared weight: sum over rows
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    return grad_a.astype(like_a.dtype), matmul(transpose(a), g, dtype).astype(like_b.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def frozen_matmul(x, w, w_t):
    """x (..., m) @ w (m, n), a frozen matrix kept both ways, with w_t its transpose -> float32 (..., n). Nothing is transposed,
    here or in the gradient, which is x's alone. Operands in w's dtype; can be differentiated any number of times."""
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def _frozen_forward(x, w, w_t):
    return frozen_matmul(x, w, w_t), (w, w_t, x[:0])


def _frozen_backward(saved, g):
    w, w_t, like_x = saved
    return frozen_matmul(g.astype(w.dtype), w_t, w).astype(like_x.dtype), None, None


frozen_matmul.defvjp(_frozen_forward, _frozen_backward)


def dense(p: Params, x, dtype):
    """A linear layer, p's weight (m, n) and its bias (n,) if it has one: (..., m) -> float32 (..., n)."""
    y = matmul(x, p["weight"], dtype)
    return y + p["bias"] if "bias" in p else y


def norm(model: Model, p: Params, x):
    """Layer norm (Ba et al. 2016), or the RMS norm (Zhang and Sennrich 2019), which leaves the mean alone."""
    if model.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + model.eps) * p["weight"]
    return x + p["bias"] if "bias" in p else x


def rotate(model: Model, x_HSK, positions_S):
    """Rotary positions (Su et al. 2021) of the rows at positions (S,): the i-th and the (i + R/2)-th of a head's first R dimensions are
    a plane, which turns by position * theta^(-2i/R)."""
    R = model.rotary
    angle = positions_S[:, None] * (1 / np.float32(model.theta) ** (np.arange(0, R, 2, dtype=np.float32) / R))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b, rest = x_HSK[..., : R // 2], x_HSK[..., R // 2 : R], x_HSK[..., R:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attention(q_HQK, k_GSK, v_GSK, start, dtype):
    """Causal attention of queries at positions start ... start+Q-1 (start: int or traced scalar)
    over keys at 0 ... S-1 -> (..., H, Q, K). Leading batch axes are allowed. The R = H / G heads in a row that
    read the same keys and values have their queries laid end to end, so these needn't be repeated."""
    (H, Q, K), (G, S, _) = q_HQK.shape[-3:], k_GSK.shape[-3:]

    def read(q_RQK, k_SK, v_SK):
        out = []
        for low in range(0, Q, QUERY_BLOCK):
            high = min(low + QUERY_BLOCK, Q)
            seen = min(start + high, S) if isinstance(start, int) else S  # later keys are masked anyway
            q = (q_RQK[:, low:high] * K**-0.5).reshape(-1, K)
            scores = matmul(q, transpose(k_SK[:seen].astype(dtype)), dtype)
            visible = jnp.tile(jnp.arange(seen) <= start + jnp.arange(low, high)[:, None], (H // G, 1))
            mixed = matmul(jax.nn.softmax(jnp.where(visible, scores, -1e30)), v_SK[:seen], dtype)
            out.append(mixed.reshape(-1, high - low, K))
        return jnp.concatenate(out, 1)

    y = jax.vmap(read)(q_HQK.reshape(-1, H // G, Q, K), k_GSK.reshape(-1, S, K), v_GSK.reshape(-1, S, K))
    return y.reshape(q_HQK.shape)


# --- 2. The frozen model ----------------------------------------------------------------------

tanh_gelu = partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
    "gelu_new": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu, "gelu_fast": tanh_gelu, "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}  # fmt: skip


def split_heads(x_SD, heads: int):
    """(..., S, H K) -> (..., H, S, K)."""
    return jnp.swapaxes(x_SD.reshape(*x_SD.shape[:-1], heads, -1), -2, -3)


def slice_rows(x_SD, start, rows: int):
    """Rows start ... start+rows-1 of (..., S, D), start may be traced; x itself where it has only those rows already (in the
    last block, or reading on with a cache), whatever start is."""
    return x_SD if rows == x_SD.shape[-2] else lax.dynamic_slice_in_dim(x_SD, start, rows, -2)


class Cache(NamedTuple):
    """Keys and values of one block, by position; rows not read yet hold anything, and are masked."""

    key_GSK: Any
    value_GSK: Any


def attend(model: Model, p: Params, x_SD, start, rows: int, lora: Params | None = None, cache: Cache | None = None):
    """Residual attention of one block for the `rows` positions from `start` on, its queries and values
    adapted by `lora` -> ((..., rows, D), the rows' queries (..., H, rows, K), all keys and values, what
    lora added to the values). With a cache x_SD are those rows alone; what came before is in the cache."""
    names, S = model.names, x_SD.shape[-2]
    normed, added = norm(model, p[names.norm_1], x_SD), None
    qkv = [dense(p[names.attn][name], normed, model.dtype) for name in names.qkv]
    q, k, v = qkv if len(qkv) == 3 else jnp.split(qkv[0], 3, -1)
    q = slice_rows(q, start, rows)
    if lora is not None:
        low_rank = lambda name, x: matmul(matmul(x, lora[f"{name}_down"], model.dtype), lora[f"{name}_up"], model.dtype)
        q, added = q + low_rank("q", slice_rows(normed, start, rows)), low_rank("v", normed)
        v = v + added
    q_HQK, k_GSK, v_GSK = split_heads(q, model.heads), split_heads(k, model.G), split_heads(v, model.G)
    if model.rotary:
        first = 0 if cache is None else start
        q_HQK, k_GSK = rotate(model, q_HQK, start + jnp.arange(rows)), rotate(model, k_GSK, first + jnp.arange(S))
    kv = Cache(k_GSK, v_GSK)
    if cache is not None:
        kv = jax.tree.map(lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, -2), cache, kv)
    y = jnp.swapaxes(attention(q_HQK, kv.key_GSK, kv.value_GSK, start, model.dtype), -2, -3).reshape(*q.shape)
    x_SD = slice_rows(x_SD, start, rows) + dense(p[names.attn][names.out], y, model.dtype)
    return x_SD, q_HQK, kv, added


def mlp(model: Model, p: Params, x_SD):
    """A block's MLP, gated where `Names.up` has two: (..., S, D), normed -> (..., S, D), without the residual."""
    gate, *up = (dense(p[name], x_SD, model.dtype) for name in model.names.up)
    hidden = ACTIVATIONS[model.activation](gate)
    return dense(p[model.names.down], hidden * up[0] if up else hidden, model.dtype)


def fast_block(model: Model, p: Params, x_SD, start, rows: int, lora: Params | None = None, cache: Cache | None = None):
    """The part of one block that no adapter beside its MLP changes, for the `rows` positions from
    `start` on -> (its output without that adapter (..., rows, D), what the MLP and so the adapter read,
    likewise, and the rest as `attend` gives it: queries, keys and values, what lora added to the values)."""
    names = model.names
    x, query, kv, added = attend(model, p, x_SD, start, rows, lora, cache)
    normed = norm(model, p[names.norm_2], slice_rows(x_SD, start, rows) if model.parallel else x)
    return x + mlp(model, p[names.mlp], normed), normed, query, kv, added


def block(model: Model, p: Params, x_SD):
    """A frozen block on all its positions: (..., S, D) -> (..., S, D)."""
    return fast_block(model, p, x_SD, 0, x_SD.shape[-2])[0]


def largest_divisor(number: int, most: int) -> int:
    """Of those that are at most `most`."""
    return max(n for n in range(1, most + 1) if number % n == 0)


def run_blocks(model: Model, blocks: tuple[Params, ...] | Params, x_SD):
    """Frozen blocks one after the other: (..., S, D) -> (..., S, D). Where devices share them (`place_lower`) they are
    stacked on a leading L, and a loop fetches one at a time; else none is copied out of a stack."""
    if isinstance(blocks, tuple):
        for p in blocks:
            x_SD = block(model, p, x_SD)
        return x_SD
    gather = partial(jax.tree.map, lambda x: lax.all_gather(x, "fsdp", tiled=True))
    return lax.scan(lambda x, p: (block(model, gather(p), x), None), x_SD, blocks)[0]


def embed(model: Model, params: Params, tokens_S, start=0):
    """Token ids (..., S), the first at position `start` (may be traced) -> (..., S, D)."""
    x_SD = params[model.names.embed]["weight"][tokens_S]
    if not model.names.positions:
        return x_SD
    return x_SD + slice_rows(params[model.names.positions]["weight"], start, tokens_S.shape[-1])


def head(model: Model, params: Params):
    """The matrix (V, D) that makes logits."""
    return params[model.names.embed if model.tied else model.names.head]["weight"]


def logits(model: Model, params: Params, x_SD):
    """What leaves the last block (..., S, D) -> next-token logits (..., S, V), float32."""
    x_SD = norm(model, params[model.names.norm], x_SD)
    if "head" in params:
        return frozen_matmul(x_SD, *params["head"])
    return matmul(x_SD, transpose(head(model, params).astype(model.dtype)), model.dtype)


def forward(model: Model, params: Params, tokens_S):
    """Token ids (..., S), S <= positions -> next-token logits (..., S, V), float32."""
    return logits(model, params, run_blocks(model, params["h"], embed(model, params, tokens_S)))


def token_losses(logits_SV, targets_S):
    """Cross-entropy of each target (..., S) under logits (..., S, V) -> (..., S), nats."""
    return jax.nn.logsumexp(logits_SV, -1) - jnp.take_along_axis(logits_SV, targets_S[..., None], -1)[..., 0]


def language_loss(model: Model, params: Params, tokens_BS):
    """Mean next-token cross-entropy of windows (B, S+1), nats per token. Logits of all rows would be the largest array by far:
    they are made LOSS_ROWS at a time, or as many as leave no rest."""
    inputs_BS, targets_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
    x_BSD = run_blocks(model, params["h"], embed(model, params, inputs_BS))
    rows = largest_divisor(targets_BS.size, LOSS_ROWS)
    losses = lambda part: token_losses(logits(model, params, part[0]), part[1])
    return lax.map(losses, (x_BSD.reshape(-1, rows, x_BSD.shape[-1]), targets_BS.reshape(-1, rows))).mean()


# --- 3. Weights in and out --------------------------------------------------------------------

CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")  # of old checkpoints


def name_table(model: Model) -> dict[str, tuple[int, ...]]:
    """Every name of a checkpoint, without its prefix, and the shape it has there."""
    n, D, A, kv, F = model.names, model.width, model.heads * model.K, model.G * model.K, model.F

    def weight(name: str, shape: tuple[int, ...], role: str = "") -> dict[str, tuple[int, ...]]:
        turned = shape[::-1] if n.linear and len(shape) == 2 and role else shape
        return {f"{name}.weight": turned} | ({f"{name}.bias": shape[-1:]} if role in model.biases else {})

    table = weight(n.embed, (model.vocab, D))
    if n.positions:
        table |= weight(n.positions, (model.positions, D))
    table |= weight(n.norm, (D,), "norm")
    if not model.tied:
        table |= weight(n.head, (model.vocab, D))
    for i in range(model.layers):
        at = f"{n.blocks}.{i}"
        table |= weight(f"{at}.{n.norm_1}", (D,), "norm") | weight(f"{at}.{n.norm_2}", (D,), "norm")
        for name, size in zip(n.qkv, (A, kv, kv) if len(n.qkv) == 3 else (A + 2 * kv,), strict=True):
            table |= weight(f"{at}.{n.attn}.{name}", (D, size), "qkv")
        table |= weight(f"{at}.{n.attn}.{n.out}", (A, D), "out")
        for name in n.up:
            table |= weight(f"{at}.{n.mlp}.{name}", (D, F), "mlp")
        table |= weight(f"{at}.{n.mlp}.{n.down}", (F, D), "mlp")
    return table


def nest(flat: dict[str, Any]) -> Params:
    """{'a.b': x} -> {'a': {'b': x}}"""
    tree: Params = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': x}, 'h': (y,)} -> {'a.b': x, 'h.0': y}"""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, tuple):
            value = {str(i): x for i, x in enumerate(value)}
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def init_gpt2(key, model: Model) -> Params:
    """GPT-2's own initialisation (Radford et al. 2019): normal(0.02), residual projections scaled by 1/sqrt(2L)."""
    flat = {}
    for i, (name, shape) in enumerate(name_table(model).items()):
        if len(shape) == 1:
            flat[name] = jnp.full(shape, float(name.endswith("weight")), jnp.float32)
        else:
            scale = 0.02 / (2 * model.layers) ** 0.5 if name.endswith((f"{model.names.out}.weight", f"{model.names.down}.weight")) else 0.02
            flat[name] = scale * jax.random.normal(jax.random.fold_in(key, i), shape)
    return to_params(model, flat)


def to_params(model: Model, flat: dict[str, Any]) -> Params:
    """Weights under their checkpoint's names -> the pytree: float32, products (in, out). In NumPy: a
    model that needs several devices would not fit on the first of them."""
    n, rest, blocks = model.names, {}, [{} for _ in range(model.layers)]
    for name, value in flat.items():
        value = np.asarray(value, np.float32)
        if not name.startswith(f"{n.blocks}."):
            rest[name] = value
            continue
        i, name = name.removeprefix(f"{n.blocks}.").split(".", 1)
        if n.by_head and name.startswith(f"{n.attn}.{n.qkv[0]}."):
            value = np.swapaxes(value.reshape(model.heads, 3, model.K, -1), 0, 1).reshape(value.shape)
        blocks[int(i)][name] = np.ascontiguousarray(value.T) if n.linear and value.ndim == 2 else value
    return nest(rest) | {"h": tuple(map(nest, blocks))}


def freeze(model: Model, params: Params) -> Params:
    """Weights that are no longer trained: a block's matrices are rounded to `Model.dtype` once instead of in each product,
    which gives half the memory and the same results. If that is not float32 the head, by far the largest matrix, is added as
    products take it, both ways for `frozen_matmul`."""
    rounded = lambda x: x.astype(jnp.dtype(model.dtype), copy=False) if x.ndim == 2 else x
    frozen = {name: value for name, value in params.items() if name != "head"} | {"h": jax.tree.map(rounded, params["h"])}
    if model.dtype == "float32":
        return frozen
    w = rounded(head(model, params))
    return frozen | {"head": (w.T.copy(), w)}


def save_gpt2(folder: Path, model: Model, params: Params, dtype=jnp.bfloat16) -> None:
    """Write config.json and model.safetensors of a tied GPT-2 as `transformers` lays them out."""
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
    config |= {"vocab_size": model.vocab, "n_positions": model.positions, "n_ctx": model.positions, "n_embd": model.width}
    config |= {"n_layer": model.layers, "n_head": model.heads, "layer_norm_epsilon": model.eps, "tie_word_embeddings": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    arrays = {f"transformer.{name}": np.asarray(value.astype(dtype)) for name, value in flatten(params).items()}
    write_atomic(folder / "model.safetensors", safetensors.numpy.save(arrays, metadata={"format": "pt"}))


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of one file.

    Raises: ModelError if it is missing or damaged."""
    try:
        return safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); delete it or fetch it again") from None


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """All weights of model.safetensors, or of the files that model.safetensors.index.json names.

    Raises: ModelError."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        paths = [whole]
    elif index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [folder / shard for shard in shards]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not an index of safetensors files ({error!r}); fetch it again") from None
    elif pickles := sorted(path.name for path in folder.glob("*.bin")):
        convert = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        raise ModelError(
            f"{folder} has {pickles[0]} but no model.safetensors: a .bin is a pickle, which can run any code when it is read, so it is "
            f'not read here; if you trust it, convert it where torch is installed: python -c "{convert}"'
        )
    else:
        raise ModelError(f"{folder}: no model.safetensors; give a folder with it (pickles, .bin, are not read: they can run any code)")
    flat: dict[str, np.ndarray] = {}
    for path in paths:
        flat |= {name: value for name, value in read_safetensors(path).items() if not name.endswith(CONSTANTS)}
    for name, value in flat.items():
        if value.dtype.name not in ("float32", "bfloat16", "float16"):
            raise ModelError(f"{folder}: {name} is {value.dtype.name}; only float32, bfloat16 and float16 weights are supported")
    return flat


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration's rotary settings, under the names of `transformers` 5."""
    new = config.get("rope_parameters") or config.get("rope_scaling") or {}
    old = {"rope_theta": config.get("rope_theta", config.get("rotary_emb_base", 10000.0)), "rope_type": new.get("type", "default")}
    if config["model_type"] == "gpt_neox":
        old["partial_rotary_factor"] = config.get("rotary_pct", 0.25)
    return old | new


def gpt2_shape(config: dict[str, Any]) -> Model:
    """The shape in a GPT-2's config.json; this and the two below leave what is missing or wrong to `load_shape`."""
    return Model(
        *(config[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")),
        eps=config.get("layer_norm_epsilon", 1e-5),
        hidden=config.get("n_inner") or 0,
        activation=config.get("activation_function", "gelu_new"),
    )


SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")


def neox_shape(config: dict[str, Any]) -> Model:
    """The shape in a GPT-NeoX's (Pythia's) config.json."""
    model = Model(*(config[name] for name in SIZES), kind="gpt_neox", eps=config.get("layer_norm_eps", 1e-5))
    return model._replace(
        hidden=config["intermediate_size"],
        activation=config.get("hidden_act", "gelu"),
        rotary=int(model.K * rope(config)["partial_rotary_factor"]),
        theta=float(rope(config)["rope_theta"]),
        parallel=config.get("use_parallel_residual", True),
        tied=config.get("tie_word_embeddings", False),
        biases=("norm", "qkv", "out", "mlp") if config.get("attention_bias", True) else ("norm", "mlp"),
    )


def llama_shape(config: dict[str, Any]) -> Model:
    """The shape in a Llama's, Mistral's or Qwen2's config.json. Where keys further back than a sliding window
    would be left out, windows may be no longer than that."""
    model = Model(*(config[name] for name in SIZES), kind="llama", norm="rms", eps=config.get("rms_norm_eps", 1e-6))
    kind = config["model_type"]
    model = model._replace(head_width=config.get("head_dim") or 0, kv_heads=config.get("num_key_value_heads") or 0)
    biases = {"qkv": config.get("attention_bias", kind == "qwen2"), "out": config.get("attention_bias"), "mlp": config.get("mlp_bias")}
    sliding = config.get("use_sliding_window", kind == "mistral") and config.get("sliding_window", 4096)
    return model._replace(
        positions=min(model.positions, sliding or model.positions),
        hidden=config["intermediate_size"],
        activation=config.get("hidden_act", "silu"),
        rotary=model.K,
        theta=float(rope(config)["rope_theta"]),
        tied=config.get("tie_word_embeddings", False),
        biases=tuple(role for role, has in biases.items() if has),
    )


ARCHITECTURES = {"gpt2": gpt2_shape, "gpt_neox": neox_shape, "llama": llama_shape, "mistral": llama_shape, "qwen2": llama_shape}
FIXED_CONFIG = {  # what the forward above computes
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "quantization_config": None,
}  # fmt: skip


def load_shape(folder: Path) -> Model:
    """The model that config.json describes.

    Raises: ModelError, also where it asks for what this forward doesn't compute."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if (kind := config.get("model_type")) not in ARCHITECTURES:
            raise ModelError(f"{folder}: model_type is {kind!r}, and this loader reads {', '.join(ARCHITECTURES)}")
        model, rotary = ARCHITECTURES[kind](config), rope(config)
        sizes = [*model[:5], model.G, model.K, model.F]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ModelError(f"{path}: sizes must be positive whole numbers")
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json; give a folder with config.json and model.safetensors") from None
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror})") from None
    except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{path}: not a usable configuration ({error!r}); fetch it again") from None
    for name, expected in FIXED_CONFIG.items():
        if config.get(name, expected) != expected:
            raise ModelError(f"{folder}: {name} is {config[name]!r}, and only {expected!r} is supported")
    if model.activation not in ACTIVATIONS:
        raise ModelError(f"{folder}: the activation is {model.activation!r}, and only {', '.join(ACTIVATIONS)} are supported")
    if model.width % model.heads or model.heads % model.G:
        raise ModelError(f"{folder}: width {model.width} must be a multiple of the {model.heads} heads, these of the {model.G} of the keys")
    if model.rotary and rotary["rope_type"] != "default":
        raise ModelError(f"{folder}: rotary positions of type {rotary['rope_type']!r} are not supported, only plain ones")
    if model.rotary % 2 or not 0 <= model.rotary <= model.K or (kind != "gpt_neox" and rotary.get("partial_rotary_factor", 1) != 1):
        raise ModelError(f"{folder}: rotary positions of {model.rotary} of a head's {model.K} dimensions are not supported")
    return model


def load_model(folder: Path, dtype: str = "float32") -> tuple[Model, Params]:
    """A checkpoint of one of ARCHITECTURES from a local folder, as `transformers` lays it out, float32;
    `dtype` is that of the products (`Model.dtype`).

    Names may lack their prefix, and a tied head may be present; every shape is checked and nothing
    may be missing or left over.
    Raises: ModelError."""
    model = load_shape(folder)._replace(dtype=dtype)
    flat = {name.removeprefix(model.names.prefix): value for name, value in read_weights(folder).items()}
    table, embed, head = name_table(model), f"{model.names.embed}.weight", f"{model.names.head}.weight"
    tied = flat.pop(head, None) if model.tied else None
    if missing := sorted(table.keys() - flat.keys()):
        raise ModelError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    if unknown := sorted(flat.keys() - table.keys()):
        raise ModelError(f"{folder}: {len(unknown)} weights are not known to {model.kind}, first {unknown[0]}")
    for name, shape in table.items():
        if flat[name].shape != shape:
            raise ModelError(f"{folder}: {name} has shape {flat[name].shape}, the config says {shape}")
    if tied is not None and not np.array_equal(tied, flat[embed]):
        raise ModelError(f"{folder}: {head} differs from {embed}, and the config says that they are tied")
    return model, to_params(model, flat)


# --- 4. Fast weights --------------------------------------------------------------------------

STEPS = (0, 1, 2, 4)  # inner steps of the actions SKIP, UPDATE_1, UPDATE_2, UPDATE_4


class Fast(NamedTuple):
    """The fast weights: what they are, where they sit, how they learn (hashable: a static argument)."""

    blocks: tuple[int, ...]  # which of the model's blocks carry an adapter, from the lowest on
    hidden: int  # F: width of a swiglu adapter, rank of a lora one; linear has K x K matrices
    kind: str = "swiglu"  # or "linear", "lora"
    objective: str = "next_token"  # or "reconstruction"
    optimizer: str = "muon"  # or "sgd"
    momentum: float = 0.0
    clip: float = 1.0  # sgd: largest global norm of an inner gradient
    remat: bool = False  # the meta-gradient recomputes each inner step: slower, and one step's activations instead of all four's


class State(NamedTuple):
    """What learning changes: each document has its own. Float32, whatever the compute is in."""

    weights: Params  # {"adapters": matrices with a leading M, "bias": (1, V) of the logits}
    momentum: Params | tuple[()]  # the same for the running sum of gradients; () without momentum
    steps: Any  # inner steps taken so far


class Window(NamedTuple):
    """A chunk and its context above the frozen prefix: all that the fast part of the model needs."""

    x_SD: Any  # what the prefix leaves: the lowest fast block's output without its adapter, or its input
    targets_C: Any  # the chunk's tokens
    start: Any  # row of x_SD that predicts targets_C[0]: 0 for a document's first chunk, else C
    normed_SD: Any = None  # what that block's adapter reads, if the prefix runs the block


class Reading(NamedTuple):
    """What predicting one chunk leaves behind (the policy's features are made from it)."""

    losses_C: Any  # next-token losses, nats
    logits_CV: Any
    top_CD: Any  # activations leaving the last block
    inputs_MCD: Any  # what each adapter read (lora: what the MLP above it did)
    outputs_MCD: Any  # what each adapter added (lora: to the values, G K wide)
    query_HCK: Any  # of the last block's attention
    key_GSK: Any

    @property
    def loss(self):
        return self.losses_C.mean()


def split_blocks(params: Params, first: int) -> tuple[Params, Params]:
    """(frozen prefix, the blocks from `first` on), both with the embeddings' names."""
    rest = {name: value for name, value in params.items() if name != "h"}
    return rest | {"h": params["h"][:first]}, rest | {"h": params["h"][first:]}


# Before meta-learning, found by a scan on validation repositories: the first step's size for each
# tensor, of orthogonalised and of clipped gradients. Tensors behind a zero have no first gradient.
STEP_SIZES = {
    "muon": {"w0": 0.12, "w1": 0.6, "w2": 0.12, "w": 0.15, "b": 0.15, "down": 0.12, "up": 0.6, "bias": 4.0},
    "sgd": {"w0": 1.0, "w1": 16.0, "w2": 1.0, "w": 1.0, "b": 1.0, "down": 1.0, "up": 16.0, "bias": 16.0},
}
SHARES = (1.0, 0.6, 0.6, 0.3, 0.3, 0.3, 0.3)  # of it, for each step of UPDATE_1, UPDATE_2 and UPDATE_4
assert len(SHARES) == sum(STEPS)
assert all(k == 1 + sum(STEPS[:n]) for n, k in enumerate(STEPS) if n)  # so the k steps of an action have places k-1 to 2k-2 alone
ANNEAL = 0.1  # step sizes fall as 1 / sqrt(1 + ANNEAL * steps taken)


def init_slow(key, model: Model, fast: Fast) -> Params:
    """Meta-learned parameters of the fast layer: `start`, the fast weights' initial value W_0 (adds
    nothing, or for `linear` little); `log_step`, the logarithms of their step sizes, one for each
    tensor and each step of UPDATE_1, UPDATE_2 and UPDATE_4 (1 + 2 + 4 of them); `log_anneal`, of
    how fast these fall. `linear` adds its norm, `reconstruction` its projections.

    Raises: ModelError if lora is to reconstruct."""
    if fast.kind == "lora" and fast.objective == "reconstruction":
        raise ModelError("lora can't learn by reconstruction, it has no layer of its own; take next_token, or swiglu or linear")
    M, D, F, H = len(fast.blocks), model.width, fast.hidden, model.heads
    widths = {"q": H * model.K, "v": model.G * model.K}
    keys = jax.random.split(key, 3)
    normal = lambda k, *shape: jax.random.normal(k, (M, *shape)) * shape[-2] ** -0.5
    if fast.kind == "swiglu":
        adapters = {"w0": normal(keys[0], D, F), "w1": jnp.zeros((M, F, D)), "w2": normal(keys[1], D, F)}
    elif fast.kind == "linear":
        adapters = {"w": normal(keys[0], H, D // H, D // H), "b": jnp.zeros((M, H, 1, D // H))}
    else:
        adapters = {f"{x}_down": normal(k, D, F) for x, k in zip("qv", keys)} | {f"{x}_up": jnp.zeros((M, F, widths[x])) for x in "qv"}
    start: Params = {"adapters": adapters}
    if fast.objective == "next_token":
        start["bias"] = jnp.zeros((1, model.vocab))
    size = STEP_SIZES[fast.optimizer]
    log_steps = lambda name: jnp.log(size[name.split("_")[-1]] * jnp.asarray(SHARES))
    slow: Params = {"start": start, "log_anneal": jnp.log(jnp.float32(ANNEAL))}
    slow["log_step"] = {"adapters": {name: log_steps(name) for name in adapters}, "bias": log_steps("bias")}
    slow["log_step"] = {name: slow["log_step"][name] for name in start}
    if fast.kind == "linear":
        slow["norm"] = {"weight": jnp.full((M, D), 0.1), "bias": jnp.zeros((M, D))}
    if fast.objective == "reconstruction":
        eye = jnp.broadcast_to(jnp.eye(D), (M, D, D))
        value = jax.random.orthogonal(keys[2], D, (M,)) * 0.1
        slow["project"] = {"key": eye, "value": value, "query": eye}
    return slow


def init_state(fast: Fast, slow: Params) -> State:
    """The state that every document starts from: W_0, no momentum, no steps taken."""
    momentum = jax.tree.map(jnp.zeros_like, slow["start"]) if fast.momentum else ()
    return State(slow["start"], momentum, jnp.zeros_like(slow["log_anneal"]))


def swiglu(w: Params, x_CD, dtype):
    """One adapter, (C, D) -> (C, D): y = w1 @ (silu(w0 @ x) * (w2 @ x)), here with rows of x on the left.
    The gated MLP of Shazeer 2020 ("GLU Variants Improve Transformer"), as fast weights in LaCT (2505.23884)."""
    return matmul(jax.nn.silu(matmul(x_CD, w["w0"], dtype)) * matmul(x_CD, w["w2"], dtype), w["w1"], dtype)


def linear(w: Params, norm: Params, x_CD, dtype, eps: float = 1e-5):
    """TTT-Linear (arXiv 2407.04620, section 2.7) without its residual, for the block has one: (C, D) -> (C, D),
    y = norm(w @ x + b), head by head."""
    z = matmul(split_heads(x_CD, w["w"].shape[0]), w["w"], dtype) + w["b"]
    z = z - z.mean(-1, keepdims=True)
    z = z * lax.rsqrt((z * z).mean(-1, keepdims=True) + eps)
    return jnp.swapaxes(z, -2, -3).reshape(x_CD.shape) * norm["weight"] + norm["bias"]


def adapter(slow: Params, weights: Params, m: int, x_CD, dtype):
    """The m-th adapter beside an MLP: (C, D) -> (C, D)."""
    w = jax.tree.map(lambda leaf: leaf[m], weights["adapters"])
    if "norm" not in slow:
        return swiglu(w, x_CD, dtype)
    return linear(w, jax.tree.map(lambda leaf: leaf[m], slow["norm"]), x_CD, dtype)


def fast_place(fast: Fast, weights: Params | None, i: int) -> tuple[int | None, Params | None]:
    """(the i-th block's place m among the fast blocks or None, its lora's matrices or None)"""
    if weights is None or i not in fast.blocks:
        return None, None
    m = fast.blocks.index(i)
    return m, jax.tree.map(lambda leaf: leaf[m], weights["adapters"]) if fast.kind == "lora" else None


def beside_mlp(slow: Params, weights: Any, m: int, normed_CD, dtype):
    """What the m-th adapter adds to its block (C, D), given what the MLP reads; under `reconstruction` it reads
    a query made from that, as in TTT-LM."""
    read = matmul(normed_CD, slow["project"]["query"][m], dtype) if "project" in slow else normed_CD
    return adapter(slow, weights, m, read, dtype)


def caches_lowest(model: Model, fast: Fast) -> bool:
    """Whether the lowest fast block's own attention and MLP belong to the frozen prefix, be they parallel
    or not. Not under lora, which changes them; nor if it is the last block, which need run for the
    chunk's rows alone."""
    return fast.kind != "lora" and fast.blocks[0] < model.layers - 1


def prefix(model: Model, fast: Fast, lower: Params, upper: Params, inputs_S):
    """All that no fast weight changes: tokens (S,) -> Window's (x_SD, normed_SD)."""
    x = run_blocks(model, lower["h"], embed(model, lower, inputs_S))
    if not caches_lowest(model, fast):
        return x, None
    return fast_block(model, upper["h"][0], x, 0, x.shape[-2])[:2]


def windows(model: Model, fast: Fast, lower: Params, upper: Params, tokens, chunk: int) -> Window:
    """A document (T*C + 1,) -> its T windows, stacked. Chunk t is read with chunk t-1 as context;
    the first one is the first half of its window. The frozen prefix runs here, once per chunk."""
    chunks = (tokens.shape[0] - 1) // chunk
    start = jnp.where(jnp.arange(chunks) == 0, 0, chunk)
    offsets = jnp.maximum(jnp.arange(chunks) - 1, 0) * chunk
    inputs = tokens[offsets[:, None] + jnp.arange(2 * chunk)]
    x_TSD, normed_TSD = lax.map(partial(prefix, model, fast, lower, upper), inputs)
    return Window(x_TSD, tokens[1:].reshape(chunks, chunk), start, normed_TSD)


def predict(model: Model, fast: Fast, upper: Params, slow: Params, weights: Params | None, window: Window) -> Reading:
    """Read one chunk with the fast weights as they are, State.weights (None: without them, the base model).

    Only the chunk's own rows go through the last block; its context is needed there as keys and
    values alone."""
    C = window.targets_C.shape[-1]
    x, normed, query, key = window.x_SD, window.normed_SD, None, None
    inputs, outputs = [], []
    for i in range(fast.blocks[0], model.layers):
        m, lora = fast_place(fast, weights, i)
        if i > fast.blocks[0] or not caches_lowest(model, fast):
            start, rows = (window.start, C) if i == model.layers - 1 else (0, x.shape[-2])
            x, normed, query, (key, _), y = fast_block(model, upper["h"][i - fast.blocks[0]], x, start, rows, lora)
        if m is not None:
            if lora is None:
                y = beside_mlp(slow, weights, m, normed, model.dtype)
                x = x + y
            inputs.append(slice_rows(normed, window.start, C))
            outputs.append(slice_rows(y, window.start, C))
    scores = logits(model, upper, x)
    if weights is not None and "bias" in weights:
        scores = scores + weights["bias"]
    losses = token_losses(scores, window.targets_C)
    stack = lambda rows: jnp.stack(rows) if rows else None
    return Reading(losses, scores, x, stack(inputs), stack(outputs), query, key)


# --- 5. Learning: inner losses, inner steps, the meta-objective --------------------------------


def reconstruction_loss(slow: Params, weights: Params, inputs_MCD, dtype):
    """Self-supervised inner loss, 1/2 |f_W(key) - value|^2 summed over width, averaged over the
    chunk and the fast blocks (TTT-LM, arXiv 2407.04620, eq. 4) -> scalar."""
    key, value = (matmul(inputs_MCD, slow["project"][name], dtype) for name in ("key", "value"))
    error = jnp.stack([adapter(slow, weights, m, key[m], dtype) for m in range(len(key))]) - value
    return 0.5 * (error * error).sum(-1).mean()


def reconstruction_gradient(slow: Params, weights: Params, inputs_MCD, dtype) -> Params:
    """grad_W of `reconstruction_loss`, a pytree like `weights`. For swiglu written out: with a = k w0, b = k w2, h = silu(a) * b
    and e = (h w1 - v) / MC,   dw1 = h' e,   dw2 = k' (e w1' * silu(a)),   dw0 = k' (e w1' * b silu'(a))."""
    if "norm" in slow:
        return jax.grad(reconstruction_loss, 1)(slow, weights, inputs_MCD, dtype)
    w = weights["adapters"]
    k, v = (matmul(inputs_MCD, slow["project"][name], dtype) for name in ("key", "value"))
    a, b = matmul(k, w["w0"], dtype), matmul(k, w["w2"], dtype)
    sigma = jax.nn.sigmoid(a)
    h = a * sigma * b
    e = (matmul(h, w["w1"], dtype) - v) / (k.shape[0] * k.shape[1])
    back = matmul(e, transpose(w["w1"].astype(dtype)), dtype)
    k_t = transpose(k.astype(dtype))
    gradient = {
        "w0": matmul(k_t, back * b * sigma * (1 + a * (1 - sigma)), dtype),
        "w1": matmul(transpose(h.astype(dtype)), e, dtype),
        "w2": matmul(k_t, back * a * sigma, dtype),
    }
    return {"adapters": gradient}


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's coefficients a, b, c
ITERATIONS = 3  # of Newton-Schulz; Muon takes 5, which measured no better here


def orthogonalise(g, dtype):
    """Matrices (..., m, n) with their singular values driven towards 1 by Newton-Schulz iterations,
    x <- a x + b (x x') x + c (x x')^2 x (Muon, Jordan et al. 2024): every direction that the gradient has is
    learned alike."""
    square = (g * g).sum((-2, -1), keepdims=True)
    some = square > 0  # where there is no gradient this has no derivative either, not 1e10, which a meta-gradient would be full of
    x = g * jnp.where(some, lax.rsqrt(jnp.where(some, square, 1.0) + 1e-20), 0.0)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else transpose(x)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        xx = matmul(x, transpose(x.astype(dtype)), dtype)
        x = a * x + matmul(b * xx + c * matmul(xx, xx, dtype), x, dtype)
    return x if wide else transpose(x)


def inner_step(fast: Fast, slow: Params, state: State, gradient: Params, i: int, dtype) -> State:
    """W - eta_i / sqrt(1 + anneal * steps) * direction, i in 0 ... 6 the place among the learned step
    sizes (k - 1 + j for the j-th of k steps, j from 0). The direction is the gradient (with its global
    norm clipped for sgd), summed up with momentum if there is any, orthogonalised for muon. A step whose
    weights would not be finite is not taken: the old state stays, and the step does not count."""
    if fast.optimizer == "sgd":
        norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(gradient)) + 1e-12)
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, fast.clip / norm), gradient)
    momentum = state.momentum
    if fast.momentum:
        gradient = momentum = jax.tree.map(lambda m, g: fast.momentum * m + g, momentum, gradient)
    if fast.optimizer == "muon":
        gradient = jax.tree.map(partial(orthogonalise, dtype=dtype), gradient)
    fall = lax.rsqrt(1 + jnp.exp(slow["log_anneal"]) * state.steps)
    weights = jax.tree.map(lambda w, d, s: w - jnp.exp(jnp.asarray(s)[i]) * fall * d, state.weights, gradient, slow["log_step"])
    finite = jnp.isfinite(sum(w.sum() for w in jax.tree.leaves(weights)))
    return jax.tree.map(partial(jnp.where, finite), State(weights, momentum, state.steps + 1), state)


def ttt_update(fast: Fast, slow: Params, state: State, gradient_of, first, steps, dtype) -> State:
    """`steps` inner steps from `state`, one of STEPS, which may be traced: then each action goes on where the
    one before it stops, so that no step is compiled twice, and outside `vmap` none runs that isn't taken.
    gradient_of(w) is the inner loss's gradient at w, and first() the same at `state.weights`."""

    def step(j: int, state: State) -> State:
        gradient = gradient_of(state.weights) if j else first()
        return inner_step(fast, slow, state, gradient, steps - 1 + j, dtype)

    def go_on(j: int, state: State) -> State:
        take = lambda state: go_on(j + 1, (jax.checkpoint(partial(step, j)) if fast.remat else partial(step, j))(state))
        if isinstance(steps, int):
            return take(state) if j < steps else state
        if j in STEPS[:-1]:  # where an action may stop
            return lax.cond(j < steps, take, lambda state: state, state)
        return take(state) if j < STEPS[-1] else state

    return go_on(0, state)


def differentiate(model: Model, fast: Fast, upper: Params, slow: Params, weights: Params, window: Window):
    """Predict one chunk and set up its inner loss.

    Returns (reading, gradient_of, first): gradient_of(weights) is the inner loss's gradient, and
    first() its value at `weights`, for which `next_token` reuses the prediction's forward pass."""
    if fast.objective == "reconstruction":
        reading = predict(model, fast, upper, slow, weights, window)
        gradient_of = lambda w: reconstruction_gradient(slow, w, reading.inputs_MCD, model.dtype)
        return reading, gradient_of, lambda: gradient_of(weights)

    def loss_of(w):
        reading = predict(model, fast, upper, slow, w, window)
        return reading.loss, reading

    loss, pullback, reading = jax.vjp(loss_of, weights, has_aux=True)
    return reading, lambda w: jax.grad(loss_of, has_aux=True)(w)[0], lambda: pullback(jnp.ones_like(loss))[0]


def read_chunk(model: Model, fast: Fast, upper: Params, slow: Params, state: State, window: Window):
    """Predict one chunk, and be ready to learn from it.

    Returns (reading, learn, inner): learn(action) gives the state after the STEPS[action] inner steps
    of an action 0 ... 3 that may be traced. inner() gives the norm of the inner loss's gradient and the
    inner loss itself."""
    reading, gradient_of, first = differentiate(model, fast, upper, slow, state.weights, window)
    learn = lambda action: ttt_update(fast, slow, state, gradient_of, first, jnp.asarray(STEPS)[action], model.dtype)

    def inner():
        norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(first())))
        if fast.objective == "reconstruction":
            return norm, reconstruction_loss(slow, state.weights, reading.inputs_MCD, model.dtype)
        return norm, reading.loss

    return reading, learn, inner


def count_flops(model: Model, fast: Fast, chunk: int) -> tuple[float, ...]:
    """Floating-point operations of reading one chunk with SKIP, UPDATE_1, UPDATE_2 and UPDATE_4:
    2mnk for every matrix product that the compiled steps contain (a test compares with XLA's own
    count). A step's backward needs no gradient of frozen weights and stops at the lowest adapter."""
    C, S, D, V, F, M = chunk, 2 * chunk, model.width, model.vocab, fast.hidden, len(fast.blocks)
    A, kv = model.heads * model.K, model.G * model.K
    lowest, last = fast.blocks[0], model.layers - 1
    causal = sum(4 * (min(low + QUERY_BLOCK, S) - low) * min(low + QUERY_BLOCK, S) * A for low in range(0, S, QUERY_BLOCK))
    qkv, project, mlp_ = 2 * D * (A + 2 * kv), 2 * A * D, 2 * D * model.F * (len(model.names.up) + 1)  # for each row
    full = S * (qkv + project + mlp_) + causal
    rows = lambda i: C if i == last else S
    block_ = lambda i: full if i < last else S * qkv + 4 * C * S * A + C * (project + mlp_)
    cached = lowest + caches_lowest(model, fast)  # blocks in the prefix
    head, lower = 2 * C * D * V, cached * full

    if fast.kind == "lora":
        down = lambda i: (rows(i) + S) * 2 * D * F  # queries and values
        adapter_ = lambda i: down(i) + rows(i) * 2 * F * A + S * 2 * F * kv
        matrices = [(min(n, F), max(n, F), m) for n, m in ((D, 2 * M), (A, M), (kv, M))]
    elif fast.kind == "linear":
        K = D // model.heads
        adapter_, matrices = (lambda i: rows(i) * 2 * D * K), [(K, K, M * model.heads), (1, K, M * model.heads)]
    else:
        adapter_, matrices = (lambda i: rows(i) * 6 * D * F), [(min(D, F), max(D, F), 3 * M)]
    if fast.objective == "next_token":
        matrices.append((1, V, 1))
    # Newton-Schulz on every matrix, x x' of the short side
    direction = sum(n * ITERATIONS * (4 * a * a * b + 2 * a**3) for a, b, n in matrices) if fast.optimizer == "muon" else 0

    forward = head + sum(block_(i) for i in range(cached, last + 1)) + sum(map(adapter_, fast.blocks))
    if fast.objective == "reconstruction":
        forward += sum(2 * D * D * rows(i) for i in fast.blocks)  # the query projection
        per_row = 2 * 2 * D * F + 5 * 2 * D * F if fast.kind == "swiglu" else 6 * D * D // model.heads
        once, step = M * C * 4 * D * D, M * C * per_row + direction  # key and value; forward and gradient
        return lower + forward, *(lower + forward + k * (once + step) for k in STEPS[1:])
    # Of activations: 2 products where the forward has 1 in attention's scores and mixing, 1 elsewhere.
    above = lambda i: S * (qkv + project + mlp_) + 2 * causal if i < last else C * (mlp_ + project) + 8 * C * S * A + S * qkv
    if fast.kind == "lora":
        inside = above(lowest) - S * qkv  # down to the lowest queries and values, and no further
        if model.parallel:
            inside -= rows(lowest) * mlp_
        backward = head + inside + sum(above(i) for i in range(lowest + 1, last + 1))
        backward += sum(2 * adapter_(i) for i in fast.blocks) - down(lowest)
    else:
        saved = rows(lowest) * (4 * D * F if fast.kind == "swiglu" else 2 * D * D // model.heads)  # gradients of what the lowest reads
        backward = head + sum(above(i) for i in range(lowest + 1, last + 1)) + sum(2 * adapter_(i) for i in fast.blocks) - saved
    backward += direction
    return lower + forward, *(lower + forward + (k - 1) * forward + k * backward for k in STEPS[1:])


def document_loss(model: Model, fast: Fast, upper: Params, slow: Params, windows: Window, actions_T):
    """Outer (meta) objective: the mean loss of a document read with the given actions, each chunk
    predicted before it is learned from -> (loss, losses (T,)), nats per token. Differentiable in `slow` through the
    inner steps; activations are recomputed chunk by chunk in the backward pass."""

    @jax.checkpoint
    def step(state, chunk):
        window, action = chunk
        reading, learn, _ = read_chunk(model, fast, upper, slow, state, window)
        return learn(action), reading.loss

    _, losses_T = lax.scan(step, init_state(fast, slow), (windows, actions_T))
    return losses_T.mean(), losses_T


# --- 6. Generation ------------------------------------------------------------------------------


def join_blocks(model: Model, lower: Params, upper: Params) -> Params:
    """The frozen model as `read_on` takes it."""
    return freeze(model, upper | {"h": lower["h"] + upper["h"]})


def read_on(model: Model, fast: Fast, frozen: Params, slow: Params, weights: Params | None, caches, tokens_Q, start):
    """Read Q tokens at positions start ... start+Q-1 of a window with the fast weights as they are (None:
    without them), where `caches` (one for each block) have the positions before -> (what leaves the last
    block (Q, D), caches)."""
    x, after = embed(model, frozen, tokens_Q, start), []
    for i, (p, cache) in enumerate(zip(frozen["h"], caches, strict=True)):
        m, lora = fast_place(fast, weights, i)
        x, normed, _, cache, _ = fast_block(model, p, x, start, len(tokens_Q), lora, cache)
        if m is not None and lora is None:
            x = x + beside_mlp(slow, weights, m, normed, model.dtype)
        after.append(cache)
    return x, tuple(after)


def next_logits(model: Model, frozen: Params, weights: Params | None, x_1D):
    """Logits (V,) of the token after a row (1, D) that left the last block."""
    scores = logits(model, frozen, x_1D)
    return (scores + weights["bias"] if weights is not None and "bias" in weights else scores)[0]


@partial(jax.jit, static_argnums=(0, 1, 7))
def prefill(model: Model, fast: Fast, frozen: Params, slow: Params, weights: Params | None, tokens_Q, length, size: int):
    """Read the first `length` (traced) of the tokens (Q,), a window from its start -> (logits (V,) of the
    token after them, caches with room for `size` positions). What stands after them is written over
    before it is looked at."""
    empty = jnp.zeros((model.G, size, model.K), model.dtype)
    x_QD, caches = read_on(model, fast, frozen, slow, weights, (Cache(empty, empty),) * model.layers, tokens_Q, 0)
    return next_logits(model, frozen, weights, lax.dynamic_slice_in_dim(x_QD, length - 1, 1)), caches


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(6,))
def decode(model: Model, fast: Fast, alike: bool, frozen: Params, slow: Params, weights, caches_B, token_B, position_B):
    """Read one token of each of B rows, at a position of its own -> (logits (B, V), caches). Each row has
    fast weights of its own, or all the same where they are `alike`. What it costs depends on the
    caches' size alone, not on how much has been read or learned."""

    def row(weights, caches, token, position):
        x, caches = read_on(model, fast, frozen, slow, weights, caches, token[None], position)
        return next_logits(model, frozen, weights, x), caches

    return jax.vmap(row, (None if alike else 0, 0, 0, 0))(weights, caches_B, token_B, position_B)


@partial(jax.jit, donate_argnums=0)
def set_row(tree_B, b, row):
    """The rows with row b (traced) replaced."""
    return jax.tree.map(lambda old, new: old.at[b].set(new), tree_B, row)


@jax.jit
def sample(key, row_B, step_B, logits_BV, temperature, top_p):
    """The next token of each row (B,): the most likely one at temperature 0, else drawn from the most
    likely tokens that make up `top_p` of the probability (Holtzman et al. 2020) at that temperature.
    What is drawn depends on the key, the row and the step, not on the rows beside it."""

    def draw(row, step, logits_V):
        order = jnp.argsort(-logits_V)
        p = jax.nn.softmax(logits_V[order] / temperature)
        kept = jnp.where(jnp.cumsum(p) - p < top_p, p, 0)  # those before it make up less than top_p
        return order[jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), step), jnp.log(kept))]

    drawn = lambda: jax.vmap(draw)(row_B, step_B, logits_BV)
    return lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits_BV, -1))


# --- 7. Devices -------------------------------------------------------------------------------
#
# A mesh of `data` x `fsdp` devices. Documents are spread over all of them; the blocks of the frozen
# prefix are split over `fsdp` and gathered one at a time, as they run. A collective must be reached by
# every device alike: the prefix is, chunk after chunk. What learns is not, each device decides for its
# own document, so the blocks above the lowest fast weight lie whole on every device.

AXES = ("data", "fsdp")
ROWS = PartitionSpec(AXES)  # documents
WHOLE = PartitionSpec()  # the same on every device


def make_mesh(data: int = 1, fsdp: int = 1, devices=None) -> Mesh:
    """The first data x fsdp of the devices (all, if left out) as a mesh with those axes."""
    return jax.make_mesh((data, fsdp), AXES, (AxisType.Auto,) * 2, devices=(devices or jax.devices())[: data * fsdp])


def place(mesh: Mesh, tree: Any, spec: PartitionSpec = WHOLE) -> Any:
    """Host values, the same in every process, as arrays on the mesh, laid out by one spec for all leaves; each process
    copies its devices' part alone."""
    sharding = NamedSharding(mesh, spec)

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def lower_specs(lower: Params) -> Params:
    """How `place_lower` lays the frozen prefix out."""
    shared = lower and not isinstance(lower["h"], tuple)
    return {name: PartitionSpec(None, "fsdp") if name == "h" and shared else WHOLE for name in lower}


def place_lower(mesh: Mesh, lower: Params) -> Params:
    """The frozen prefix on the mesh: whole on every device, or, where fsdp is several, its blocks stacked and each leaf
    split on the axis after L.

    Raises: ModelError if an axis can't be split evenly."""
    if (fsdp := mesh.shape["fsdp"]) > 1 and lower["h"]:
        if odd := [name for name, x in flatten(lower["h"][0]).items() if x.shape[0] % fsdp]:
            raise ModelError(f"the model's {odd[0]} can't be split {fsdp} ways; choose another fsdp in --mesh-shape")
        lower = lower | {"h": jax.tree.map(lambda *x: np.stack(x), *lower["h"])}
    return {name: place(mesh, lower[name], spec) for name, spec in lower_specs(lower).items()}


def on_devices(mesh: Mesh, function, lower: Params, shared: Any, documents: Any, out: Any = ROWS) -> Any:
    """function(lower, shared, documents) on every device with its part of the documents (leading axis N, a
    multiple of the devices) -> what it returns, laid out by `out`: ROWS stacks it on N; WHOLE is for what
    `lax.pmean` over AXES made the same everywhere. Where no prefix is needed `lower` is {}."""

    def device(lower, shared, documents):
        # Marked as each device's own: the gradient in `shared` is then one device's, not summed up unseen.
        return function(lower, lax.pcast(shared, AXES, to="varying"), documents)

    specs = (lower_specs(lower), WHOLE, ROWS)
    return jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=out)(lower, shared, documents)


def everywhere(mesh: Mesh, tree: Any) -> Any:
    """The same, whole on every device (inside `jit`)."""
    return lax.with_sharding_constraint(tree, NamedSharding(mesh, WHOLE))
