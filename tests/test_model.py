"""model.py against transformers, naive NumPy loops in float64, and finite differences."""

import argparse
import inspect
import json
import re
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
from conftest import CHUNK, KINDS, MODEL, Tiny, build, document_loss, make, make_windows

import data
import model as lm
from data import UserError
from eval import base_weights

forward = jax.jit(lm.forward, static_argnums=0)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Attention takes its queries a few at a time in all tests."""
    monkeypatch.setattr(lm, "QUERY_ROWS", 5)


# --- 1. Weights in ----------------------------------------------------------------------------------
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 23, "n_embd": 18, "n_layer": 3, "n_head": 3}
SIZES = {"vocab_size": 61, "max_position_embeddings": 23, "hidden_size": 24, "num_hidden_layers": 3}
SIZES |= {"intermediate_size": 50}
NEOX = SIZES | {"model_type": "gpt_neox", "num_attention_heads": 3, "hidden_act": "gelu", "rotary_pct": 0.5}
NEOX |= {"rotary_emb_base": 100, "use_parallel_residual": True, "layer_norm_eps": 1e-4}
NEOX |= {"tie_word_embeddings": False}
LLAMA = SIZES | {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2}
LLAMA |= {"hidden_act": "silu", "rope_theta": 100.0, "rms_norm_eps": 1e-4, "tie_word_embeddings": True}
SMALL = {"vocab_size": 37, "n_positions": 11, "n_embd": 20, "n_layer": 1, "n_head": 5}
IN_SEQUENCE = {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_fast"}
WIDE = {"head_dim": 10, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 6, "use_sliding_window": False}
CONFIGS = {  # of each golden model
    "gpt2": GPT2,
    "gpt2 eps": GPT2 | SMALL | {"layer_norm_epsilon": 0.05},
    "gpt2 narrow": GPT2 | {"n_inner": 31, "activation_function": "gelu"},
    "pythia": NEOX,
    "neox in sequence": NEOX | IN_SEQUENCE | {"tie_word_embeddings": True},
    "neox without biases": NEOX | {"attention_bias": False, "rotary_pct": 0.25},
    "llama": LLAMA,
    "llama wide heads": LLAMA | WIDE | {"tie_word_embeddings": False},
    "qwen2": LLAMA | QWEN2,
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
}
# Which weights of a model have no bias.
UNBIASED = {"neox without biases": r"attention\.", "llama wide heads": "norm", "qwen2": "norm|o_proj|mlp"}
UNBIASED |= {"llama": ".", "mistral": "."}
# How a family names its weights, with letters for their sizes, in the order in which the golden ones were
# drawn: prefix; what stands before the blocks; the head, if it is not tied; the blocks, and what each has.
NAMES = {
    "gpt2": ("transformer.", "wte=V,D wpe=S,D ln_f=D", "lm_head=V,D", "h"),
    "gpt_neox": ("gpt_neox.", "embed_in=V,D final_layer_norm=D", "embed_out=V,D", "layers"),
    "llama": ("model.", "embed_tokens=V,D norm=D", "lm_head=V,D", "layers"),
}
PARTS = {
    "gpt2": "ln_1=D ln_2=D attn.c_attn=D,3A attn.c_proj=A,D mlp.c_fc=D,F mlp.c_proj=F,D",
    "gpt_neox": "input_layernorm=D post_attention_layernorm=D attention.query_key_value=D,3A "
    "attention.dense=A,D mlp.dense_h_to_4h=D,F mlp.dense_4h_to_h=F,D",
    "llama": "input_layernorm=D post_attention_layernorm=D self_attn.q_proj=D,A self_attn.k_proj=D,G "
    "self_attn.v_proj=D,G self_attn.o_proj=A,D mlp.gate_proj=D,F mlp.up_proj=D,F mlp.down_proj=F,D",
}
HEADS = ("lm_head.weight", "embed_out.weight")


def random_weights(name: str) -> dict[str, np.ndarray]:
    """The weights of a golden model, by RandomState because NumPy promises never to change its stream."""
    config = CONFIGS[name]
    kind = config["model_type"] if config["model_type"] in NAMES else "llama"
    get = lambda *keys: next((config[key] for key in keys if key in config), 0)
    D, heads = get("n_embd", "hidden_size"), get("n_head", "num_attention_heads")
    K = get("head_dim") or D // heads
    sizes = {"V": config["vocab_size"], "S": get("n_positions"), "D": D, "A": heads * K, "3A": 3 * heads * K}
    sizes |= {"F": get("n_inner", "intermediate_size") or 4 * D, "G": get("num_key_value_heads") * K}
    _, first, head, blocks = NAMES[kind]
    table = first.split() + ([] if config.get("tie_word_embeddings", True) else [head])
    for i in range(get("n_layer", "num_hidden_layers")):
        table += [f"{blocks}.{i}.{part}" for part in PARTS[kind].split()]
    rng, weights = np.random.RandomState(config["vocab_size"]), {}
    for weight, letters in (entry.split("=") for entry in table):
        shape, words = [sizes[letter] for letter in letters.split(",")], letters in ("V,D", "S,D")
        drawn = rng.standard_normal(shape if words or kind == "gpt2" else shape[::-1])  # torch's (out, in)
        weights[f"{weight}.weight"] = np.float32((len(shape) == 1) + 0.3 * drawn)
        if not words and not re.search(UNBIASED.get(name, "^$"), weight):
            weights[f"{weight}.bias"] = np.float32(0.3 * rng.standard_normal(shape[-1]))
    return weights


def write_checkpoint(folder: Path, config: dict, weights: dict, prefixed: bool = True) -> Path:
    """Write config.json and model.safetensors."""
    (folder / "config.json").write_text(json.dumps(config))
    prefix = NAMES.get(config["model_type"], NAMES["llama"])[0] if prefixed else ""
    arrays = {name if name in HEADS else prefix + name: value for name, value in weights.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def golden_tokens(config: dict) -> np.ndarray:
    """As many random tokens as a model has positions."""
    length = config.get("n_positions") or config["max_position_embeddings"]
    return np.random.RandomState(length).randint(0, config["vocab_size"], length).astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_that_transformers_gave(tmp_path, name):
    config = CONFIGS[name]
    model, params = lm.load_model(write_checkpoint(tmp_path, config, random_weights(name)))
    with np.load(Path(__file__).parent / "golden" / "logits.npz") as golden:
        for length in (1, 7, None) if name in ("gpt2", "pythia", "llama") else (None,):
            ours = forward(model, params, golden_tokens(config)[:length])
            np.testing.assert_allclose(ours, golden[name][:length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_that_transformers_gives(tmp_path, name):
    """Of a checkpoint that it has written itself, in one file or in several, whole or in half precision."""
    torch = pytest.importorskip("torch", reason="without torch only the golden logits are checked")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CONFIGS[name]
    settings = {key: x for key, x in config.items() if key != "model_type"} | {"initializer_range": 0.3}
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).eval()
    for parameter in theirs.parameters():  # its biases and norms would start at 0 and 1
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    tokens = golden_tokens(config)
    for dtype, size in (("float32", "1GB"), ("float32", "4KB"), ("bfloat16", "9KB"), ("float16", "1GB")):
        folder = tmp_path / f"{dtype}{size}"
        theirs.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists() == (size != "1GB")
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = reloaded(torch.tensor(tokens[None].astype(np.int64))).logits[0].detach().numpy()
        np.testing.assert_allclose(forward(*lm.load_model(folder), tokens), expected, atol=1e-4, rtol=1e-4)


OLD = {  # constants that old checkpoints carry
    "gpt2": {"h.0.attn.bias": np.ones((1, 1, 23, 23), np.uint8), "h.1.attn.masked_bias": np.float32([-1e4])},
    "neox in sequence": {"layers.0.attention.bias": np.ones((1, 1, 23, 23), bool)},
    "llama": {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
}


@pytest.mark.parametrize("name", OLD)
def test_bare_names_a_tied_head_and_old_constants_are_accepted(tmp_path, name):
    config, weights = CONFIGS[name], random_weights(name)
    plain = lm.load_model(write_checkpoint(tmp_path, config, weights))
    more = weights | OLD[name] | {HEADS[name.startswith("neox")]: next(iter(weights.values()))}
    found = lm.load_model(write_checkpoint(tmp_path, config, more, prefixed=False))
    assert plain[0] == found[0]
    jax.tree.map(np.testing.assert_array_equal, plain[1], found[1])


@pytest.mark.parametrize("positions", [23, 9])
def test_a_sliding_window_bounds_the_positions(tmp_path, positions):
    mistral = {"model_type": "mistral", "sliding_window": 9 if positions == 9 else None}
    qwen2 = {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": positions == 9}
    for change in (mistral, qwen2):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
        assert lm.read_shape(tmp_path).positions == positions


FUSED, YARN = "layers.1.attention.query_key_value.weight", {"rope_type": "yarn", "factor": 8.0}
FILES = CONFIG, WEIGHTS = "config.json", "model.safetensors"
as_json = lambda base, **changes: lambda w: json.dumps(base | changes).encode()
FAULTS = {  # model, a weight or a file, what it becomes, message
    "missing": ("gpt2", "h.1.mlp.c_fc.bias", lambda w: None, r"1.mlp.up.bias: \(72,\) by .* none in"),
    "unknown": ("gpt2", "h.0.extra", lambda w: w["ln_f.bias"], r"0.extra: none by .* \(18,\) in"),
    "wrong shape": ("gpt2", "wpe.weight", lambda w: w["wpe.weight"][:-1], r"positions.* \(22, 18\) in"),
    "no heads": ("pythia", FUSED, lambda w: w[FUSED][1:], "query_key_value.*shape"),
    "untied head": ("gpt2", "lm_head.weight", lambda w: w["wte.weight"] + 1, "head.weight: none by"),
    "integers": ("gpt2", "wte.weight", lambda w: w["wte.weight"].astype(np.int8), "wte.weight is int8"),
    "no config": ("gpt2", CONFIG, lambda w: None, "config.json: no usable"),
    "no weights": ("gpt2", WEIGHTS, lambda w: None, "no model.safetensors.*run any code.*save_pretrained"),
    "empty": ("gpt2", WEIGHTS, lambda w: b"", "not a readable safetensors"),
    "other model": ("gpt2", CONFIG, as_json(GPT2, model_type="bloom"), "'bloom'.*gpt2, gpt_neox, llama"),
    "activation": ("gpt2", CONFIG, as_json(GPT2, activation_function="relu"), "'relu'"),
    "attention": ("gpt2", CONFIG, as_json(GPT2, scale_attn_by_inverse_layer_idx=True), "by_inverse"),
    "yarn": ("llama", CONFIG, as_json(LLAMA, rope_scaling=YARN), "rotary.*yarn"),
    "odd dimensions": ("pythia", CONFIG, as_json(NEOX, rotary_pct=0.4), "rotary"),
    "groups": ("llama", CONFIG, as_json(LLAMA, num_key_value_heads=4), "6 heads that share 4"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_not_be_loaded_is_one_clear_error(tmp_path, fault):
    name, what, damage, message = FAULTS[fault]
    weights = random_weights(name)
    damaged = damage(weights)
    if what not in FILES:
        weights = {n: x for n, x in (weights | {what: damaged}).items() if x is not None}
    path = write_checkpoint(tmp_path, CONFIGS[name], weights) / what
    if what in FILES:
        path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(UserError, match=message) as error:
        lm.load_model(tmp_path)
    assert "\n" not in str(error.value)


# --- 2. Pieces --------------------------------------------------------------------------------------
normal = lambda *shape, seed=0: np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
# A product of matrices, with a weight that rows share (in two axes), of matrices side by side.
SHAPES = [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 2, 3, 4), (4, 5)), ((2, 6, 3, 4), (2, 6, 4, 5))]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_matmul_gradients_are_those_of_jnp_matmul(shapes):
    a, b = normal(*shapes[0]), normal(*shapes[1], seed=1)
    loss = lambda multiply: lambda a, b: jnp.sin(multiply(a, b)).sum()
    second = lambda f: lambda a, b: sum((g**2).sum() for g in jax.grad(f, (0, 1))(a, b))
    ours, reference = loss(lambda a, b: lm.matmul(a, b, "float32")), loss(jnp.matmul)
    for f, g in ((ours, reference), (second(ours), second(reference))):
        both = jax.jit(lambda a, b, f=f, g=g: (jax.grad(f, (0, 1))(a, b), jax.grad(g, (0, 1))(a, b)))
        for mine, theirs in zip(*both(a, b), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)


def test_bfloat16_matmul_rounds_operands_and_accumulates_in_float32():
    a, b = normal(3, 400), normal(400, 5, seed=1)
    round_ = lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    ours = lm.matmul(a, b, "bfloat16")
    np.testing.assert_allclose(ours, round_(a) @ round_(b), rtol=1e-4, atol=1e-4)
    grads = jax.grad(lambda a, b: lm.matmul(a, b, "bfloat16").sum(), (0, 1))(a, b)
    assert all(g.dtype == jnp.float32 for g in (ours, *grads))
    np.testing.assert_allclose(grads[0], np.ones((3, 5)) @ round_(b).T, rtol=1e-4, atol=1e-4)


def test_losses_and_their_first_two_derivatives_are_those_of_log_softmax():
    x, targets = 3 * normal(2, 5, 7), np.random.RandomState(1).randint(0, 7, (2, 5))
    plain = lambda x: -jnp.take_along_axis(jax.nn.log_softmax(x), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(lm.token_losses(x, targets), plain(x), rtol=1e-5)
    weigh = lambda losses: lambda x: (losses(x) * np.arange(10).reshape(2, 5)).sum()
    curve = lambda f: lambda x: (jax.grad(f)(x) * normal(2, 5, 7, seed=2)).sum()
    ours, theirs = weigh(lambda x: lm.token_losses(x, targets)), weigh(plain)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(theirs)(x), atol=1e-5)
    np.testing.assert_allclose(jax.grad(curve(ours))(x), jax.grad(curve(theirs))(x), atol=1e-5)


def test_losses_in_bfloat16_are_near_those_in_float32():
    folder, found = data.ASSETS / "tiny", []
    tokens = np.asarray(data.encode(data.load_tokenizer(folder), [inspect.getsource(argparse)])[0], np.int32)
    for dtype in ("float32", "bfloat16"):
        model, params = lm.load_model(folder, dtype)
        fast = lm.Fast((6, 7), 256, momentum=0.3)
        slow, _ = lm.load_state(folder / "ttt.safetensors", lm.init_slow(jax.random.key(0), model, fast))
        weights = lm.split_weights(fast, params, slow)
        spec = lm.Spec(model, fast, 128)
        windows = make_windows(spec, weights, tokens[: 4 * 128 + 1])
        found.append([document_loss(spec, weights, windows, np.full(4, a, np.int32))[0] for a in (0, 1)])
    np.testing.assert_allclose(*found, atol=2e-3)
    assert found[0] != found[1]


def naive_attention(q, k, v):
    out, shared = np.zeros(q.shape), len(q) // len(k)
    for head, row in np.ndindex(q.shape[:2]):
        keys, values = (x[head // shared, : row + 1] for x in (k, v))
        weight = np.exp(keys @ q[head, row] / np.sqrt(q.shape[2]))
        out[head, row] = weight / weight.sum() @ values
    return out


def naive_norm(model, p, x):
    x = x - x.mean(-1, keepdims=True) if model.norm == "layer" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.eps) * p["weight"] + p.get("bias", 0)


def naive_rotate(model, x):
    """Heads (H, S, K) with their pairs of dimensions turned as complex numbers."""
    half, rest = model.rotary // 2, x[..., model.rotary :]
    angle = np.outer(np.arange(x.shape[1]), model.theta ** (-np.arange(half) / max(half, 1)))
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag, rest], -1)


at = lambda stacked, t: jax.tree.map(lambda x: x[t], stacked)
double = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def naive_adapter(slow, own, m, x):
    """What the m-th adapter beside an MLP adds, given its matrices and what it reads (D,)."""
    if "w0" in own:
        a = x @ own["w0"]
        return (a / (1 + np.exp(-a)) * (x @ own["w2"])) @ own["w1"]
    z = np.einsum("hk,hkj->hj", x.reshape(len(own["w"]), -1), own["w"]) + own["b"][:, 0]
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    return z.ravel() * slow["norm"]["weight"][m] + slow["norm"]["bias"][m]


NAIVE_ACTIVATIONS = {
    "gelu_new": lambda u: 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))),
    "gelu": lambda u: 0.5 * u * (1 + scipy.special.erf(u / np.sqrt(2))),
    "silu": lambda u: u / (1 + np.exp(-u)),
}


def naive_model(model, params, tokens, fast=None, slow=None, w=None):
    """The model with fast weights in some of its blocks, row by row in float64 -> logits (S, V)."""
    params, slow, w, K, S = double(params), double(slow), double(w), model.head_width, len(tokens)
    x = params["embed"]["weight"][tokens]
    if not model.rotary:
        x = x + params["positions"]["weight"][:S]
    affine = lambda p, x: x @ p["weight"] + p.get("bias", 0)
    for layer, p in enumerate(params["blocks"]):
        m = fast.blocks.index(layer) if fast and layer in fast.blocks else None
        own = None if m is None else at(w["adapters"], m)
        read = naive_norm(model, p["norm_1"], x)
        q, k, v = (affine(p["attn"][name], read) for name in "qkv")
        if own and "q_up" in own:
            q = q + read @ own["q_down"] @ own["q_up"]
            v = v + read @ own["v_down"] @ own["v_up"]
        heads = lambda t: np.stack([t[:, h * K : (h + 1) * K] for h in range(t.shape[1] // K)])
        q, k, v = naive_rotate(model, heads(q)), naive_rotate(model, heads(k)), heads(v)
        mixed = np.concatenate(naive_attention(q, k, v), -1)
        attended = x + affine(p["attn"]["o"], mixed)
        normed = naive_norm(model, p["norm_2"], x if model.parallel else attended)
        up = affine(p["mlp"]["up"], normed)
        act = NAIVE_ACTIVATIONS[model.activation]
        hidden = act(affine(p["mlp"]["gate"], normed)) * up if model.gated else act(up)
        x = attended + affine(p["mlp"]["down"], hidden)
        if own and "q_up" not in own:
            read = normed @ slow["project"]["query"][m] if "project" in slow else normed
            x = x + np.stack([naive_adapter(slow, own, m, row) for row in read])
    scores = naive_norm(model, params["norm"], x) @ params["embed" if model.tied else "head"]["weight"].T
    return scores + w["bias"] if fast and "bias" in w else scores


def naive_losses(tiny: Tiny, t: int, *fast_weights):
    """Losses of chunk t, read after chunk t-1 alone (the first: after nothing)."""
    low, high = max(t - 1, 0) * CHUNK, (t + 1) * CHUNK
    scores = naive_model(tiny.spec.model, tiny.params, tiny.tokens[low:high], *fast_weights)[-CHUNK:]
    target = scores[np.arange(CHUNK), tiny.tokens[high - CHUNK + 1 : high + 1]]
    return scipy.special.logsumexp(scores, -1) - target


# --- 3. Windows and predictions ---------------------------------------------------------------------
predict = jax.jit(lm.predict, static_argnums=0)
each = pytest.mark.parametrize("kind", ["swiglu reconstruction", "linear reconstruction", "lora"])


def with_random_slow(tiny: Tiny) -> lm.Weights:
    """Weights whose slow ones are away from their special initial values."""
    rng = np.random.RandomState(0)
    move = lambda x: x + np.float32(0.2) * rng.standard_normal(x.shape).astype(np.float32)
    return tiny.weights._replace(slow=jax.tree.map(move, tiny.weights.slow))


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_is_read_with_and_without_its_adapters(kind):
    tiny = build(kind)
    fast, model, w, weights = tiny.spec.fast, tiny.spec.model, tiny.w, with_random_slow(tiny)
    learned = weights._replace(slow=weights.slow | {"start": w})
    both = (base_weights(weights), (None, None, None)), (learned, (fast, weights.slow, w))
    for t, (own, naive) in product((0, 1, 4), both):
        reading = predict(tiny.spec, own, own.slow["start"], at(tiny.windows, t))
        expected = naive_losses(tiny, t, *naive)
        np.testing.assert_allclose(reading.losses_C, expected, atol=1e-4)
        np.testing.assert_allclose(reading.loss, expected.mean(), atol=1e-4)
    added = model.kv_heads * model.head_width if fast.kind == "lora" else model.width
    assert reading.inputs_MCD.shape == (len(fast.blocks), CHUNK, model.width)
    assert reading.outputs_MCD.shape == (len(fast.blocks), CHUNK, added)
    for part in w:  # each does something
        without = w | {part: jax.tree.map(jnp.zeros_like, w[part])}
        assert np.abs(expected - naive_losses(tiny, t, fast, weights.slow, without)).max() > 0.01
    if fast.kind != "linear":  # its norm has it add something from the start
        start = tiny.weights.slow["start"]
        assert not np.any(predict(tiny.spec, tiny.weights, start, at(tiny.windows, t)).outputs_MCD)


@each
def test_a_token_changes_no_loss_before_it(kind):
    """Bit for bit: not in its chunk, nor, with updates on, in one before."""
    tiny, actions = build(kind), np.int32([1, 3, 2, 1, 0])
    spec, weights, changes = tiny.spec, tiny.weights, np.eye(tiny.tokens.size, dtype=np.int32) * 7
    _, losses_T = document_loss(spec, weights, tiny.windows, actions)
    for place in range(1, tiny.tokens.size):
        t, i = divmod(place - 1, CHUNK)
        windows = make_windows(spec, weights, (tiny.tokens + changes[place]) % spec.model.vocab)
        before, after = (predict(spec, weights, tiny.w, at(x, t)) for x in (tiny.windows, windows))
        np.testing.assert_array_equal(before.logits_CV[: i + 1], after.logits_CV[: i + 1])
        np.testing.assert_array_equal(before.losses_C[:i], after.losses_C[:i])
        assert before.losses_C[i] != after.losses_C[i]
        if i in (0, CHUNK // 2, CHUNK - 1):
            _, changed_T = document_loss(spec, weights, windows, actions)
            np.testing.assert_array_equal(losses_T[:t], changed_T[:t])
            assert np.all(losses_T[t:] != changed_T[t:])  # through what was learned, even two chunks on


# --- 4. Inner gradients -----------------------------------------------------------------------------
def naive_reconstruction(slow, w, inputs):
    """1/2 |f_W(key) - value|^2 summed over width, averaged over blocks and rows, in float64."""
    slow, w, total = double(slow), double(w), []
    for m, row in np.ndindex(inputs.shape[:2]):
        key, value = (np.float64(inputs[m, row]) @ slow["project"][name][m] for name in ("key", "value"))
        error = naive_adapter(slow, at(w["adapters"], m), m, key) - value
        total.append(0.5 * error @ error)
    return np.mean(total)


def slope(f, tree, direction, eps):
    """Central difference of f along a direction of a pytree."""
    moved = lambda s: jax.tree.map(lambda x, d: np.asarray(x, np.float64) + s * d, tree, direction)
    return (f(moved(eps)) - f(moved(-eps))) / (2 * eps)


def dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((np.asarray(x, np.float64) * y).sum() for x, y in pairs)


def random_direction(name, tree, seed):
    """A direction in the tensors of a pytree that are under one name, 0 in all others."""
    rng, flat = np.random.RandomState(seed), lm.flatten(tree)
    inside = lambda n: n == name or n.startswith(f"{name}.")
    return lm.nest({n: rng.standard_normal(x.shape) * inside(n) for n, x in flat.items()})


@partial(jax.jit, static_argnums=0)
def inner_gradients(spec, weights, w, window, at_w):
    """The inner gradient at at_w taken afresh, and at w from the prediction's own forward pass."""
    _, gradient_of, first = lm.differentiate(spec, weights, w, window)
    return gradient_of(at_w), first()[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_inner_gradient_equals_finite_differences(kind):
    tiny = build(kind)
    fast, w, weights = tiny.spec.fast, tiny.w, with_random_slow(tiny)
    for t in (0, 2):
        loss = lambda w: naive_losses(tiny, t, fast, weights.slow, w).mean()
        if fast.objective == "reconstruction":  # of what the prediction read
            inputs = predict(tiny.spec, weights, w, at(tiny.windows, t)).inputs_MCD
            loss = lambda w: naive_reconstruction(weights.slow, w, inputs)
        afresh, first = inner_gradients(tiny.spec, weights, w, at(tiny.windows, t), w)
        for name in lm.flatten(w):
            direction = random_direction(name, w, t)
            expected = slope(loss, w, direction, 1e-5)
            for gradient in (afresh, first):
                np.testing.assert_allclose(dot(gradient, direction), expected, rtol=1e-3, atol=1e-4)


# --- 5. Inner steps ---------------------------------------------------------------------------------
def newton_schulz(gradient):
    """Muon's direction of matrices (..., m, n), by singular values: the iterations act on each alone."""
    left, values, right = np.linalg.svd(gradient, full_matrices=False)
    values = values / np.sqrt((values**2).sum(-1, keepdims=True))
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values[..., None, :]) @ right


def naive_steps(fast, slow, state, gradient_of, first, steps):
    """State after some inner steps, in float64; first() gives the gradient of the first."""
    flat = lambda tree: {name: np.asarray(x, np.float64) for name, x in lm.flatten(tree).items()}
    w, momentum, taken = flat(state.w), state.momentum and flat(state.momentum), float(state.steps)
    rates = flat(slow["log_step"])
    for j, place in enumerate(range(steps - 1, 2 * steps - 1)):  # of the step sizes
        gradient = flat(gradient_of(lm.nest(w)) if j else first())
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            if fast.optimizer == "sgd" and norm > fast.clip:
                g = g * fast.clip / norm
            if fast.momentum:
                g = momentum[name] = fast.momentum * momentum[name] + g
            direction = newton_schulz(g) if fast.optimizer == "muon" else g
            fall = 1 / np.sqrt(1 + np.exp(float(slow["log_anneal"])) * taken)
            w[name] = w[name] - np.exp(rates[name][place]) * fall * direction
        taken += 1
    return lm.State(lm.nest(w), momentum and lm.nest(momentum), taken)


LEARNERS = [lm.Fast((0,), 2, optimizer="sgd", clip=clip) for clip in (0.5, 3.0, 1e9)]
LEARNERS += [LEARNERS[0]._replace(momentum=0.7), lm.Fast((0,), 2), lm.Fast((0,), 2, momentum=0.9)]


@pytest.mark.parametrize("fast", LEARNERS, ids=lambda f: f"{f.optimizer} {f.clip} {f.momentum}")
def test_ttt_update_equals_a_loop(fast):
    """With steps that are known or traced, the first of them along a gradient that no other has."""
    make = lambda seed: {"a": normal(2, 3, 4, seed=seed), "b": normal(1, 5, 2, seed=seed + 1)}
    log_step = {"a": normal(7, seed=2) - 2, "b": normal(7, seed=3) - 3}
    slow, spec = {"log_step": log_step, "log_anneal": np.float32(-0.7)}, lm.Spec(MODEL, fast, CHUNK)
    state, first = lm.State(make(0), make(6) if fast.momentum else (), np.float32(3)), lambda: make(8)
    gradient_of = lambda w: {"a": 1.5 * w["a"] + normal(2, 3, 4, seed=5), "b": w["b"] ** 2 - w["a"].sum()}
    update = lambda state, steps: lm.ttt_update(spec, slow, state, gradient_of, lambda: (0, first()), steps)
    traced = jax.jit(update)
    for steps in lm.STEPS:
        expected = naive_steps(fast, slow, state, gradient_of, first, steps)
        for ours in (update(state, steps), traced(state, np.int32(steps))):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), (*ours,), (*expected,))
    gradient = make(8) | {"b": np.full((1, 5, 2), np.float32(np.nan))}  # such a step is not taken
    jax.tree.map(np.testing.assert_array_equal, lm.inner_step(spec, slow, state, gradient, 0), state)


def test_muon_of_no_gradient_has_no_gradient():
    total = lambda g: lm.orthogonalise(g, "float32").sum()
    assert not np.any(jax.jit(jax.grad(total))(np.zeros((2, 4, 9), np.float32)))  # 1e10 is finite too


# --- 6. The outer objective -------------------------------------------------------------------------
learn = jax.jit(lambda spec, *args: lm.read_chunk(spec, *args[:-1])[1](args[-1]), static_argnums=0)


@each
def test_a_document_is_predicted_before_it_is_learned_from(kind):
    tiny, actions, single = build(kind), np.int32([1, 3, 2, 0, 1]), partial(jax.tree.map, jnp.float32)
    spec, weights = tiny.spec, with_random_slow(tiny)
    state, losses = lm.init_state(spec.fast, weights.slow), []
    for t, action in enumerate(actions):
        window = at(tiny.windows, t)
        losses.append(predict(spec, weights, state.w, window).loss)
        after = learn(spec, weights, state, window, action)
        gradient_of = lambda w: inner_gradients(spec, weights, state.w, window, single(w))[0]
        first = lambda: gradient_of(state.w)
        expected = naive_steps(spec.fast, weights.slow, state, gradient_of, first, lm.STEPS[action])
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), (*after,), (*expected,))
        same = jax.tree.leaves(jax.tree.map(np.array_equal, after, state))
        assert all(same) if action == 0 else not any(same)  # SKIP: not one bit
        state = after
    loss, losses_T = document_loss(spec, weights, tiny.windows, actions)
    np.testing.assert_allclose(losses_T, losses, atol=1e-4)
    np.testing.assert_allclose(loss, np.mean(losses), atol=1e-4)


AGAIN = lm.Fast((3,), 12, momentum=0.6)


@pytest.mark.parametrize("fast", [KINDS["linear reconstruction"], AGAIN], ids=["linear", "momentum"])
def test_the_meta_gradient_equals_finite_differences(fast, monkeypatch):
    """Through the inner steps, for the initial weights, the step sizes, their fall, norms and projections."""
    tiny, actions = make(MODEL, fast), np.int32([2, 2, 0, 2, 0])
    weights = with_random_slow(tiny)

    def loss(slow):
        moved = weights._replace(slow=jax.tree.map(jnp.float32, slow))
        return np.asarray(document_loss(tiny.spec, moved, tiny.windows, actions)[1], np.float64).mean()

    # UPDATE_1 and UPDATE_4 would multiply the time to compile, and go through the same loop as UPDATE_2.
    monkeypatch.setattr(lm, "STEPS", (0, 0, 2))
    of_slow = lambda slow: lm.document_loss(tiny.spec, weights._replace(slow=slow), tiny.windows, actions)
    gradient = jax.jit(jax.grad(of_slow, has_aux=True))(weights.slow)[0]
    monkeypatch.undo()
    for name in weights.slow:
        assert all(np.any(g) for g in jax.tree.leaves(gradient[name])), name
        for seed in range(2):
            direction = random_direction(name, weights.slow, seed)
            size = np.sqrt(dot(direction, direction))
            found, expected = dot(gradient, direction), slope(loss, weights.slow, direction, 1e-2 / size)
            np.testing.assert_allclose(found / size, expected / size, rtol=0.03, atol=2e-5, err_msg=name)


def test_count_flops_is_near_a_count_by_hand():
    """Two operations for each multiplication of the main products, on 2C rows (the last block: on C)."""
    D, F, V, C, hidden = 128, 512, 1024, 32, 64
    model = lm.Model(V, 2 * C, width=D, layers=3, heads=2, kv_heads=2, head_width=64, hidden=F)
    fast, key = lm.Fast((1, 2), hidden, optimizer="sgd"), jax.random.key(0)
    weights = lm.split_weights(fast, lm.init_params(key, model), lm.init_slow(key, model, fast))
    S, matrices = 2 * C, 2 * D * D + 2 * D * F  # for a query, its output and the MLP
    whole_block = 2 * S * (matrices + 2 * D * D) + 4 * S * S * D
    last_block = 2 * C * matrices + 2 * S * 2 * D * D + 4 * C * S * D
    adapters, head = 2 * (S + C) * 3 * D * hidden, 2 * C * D * V
    forward = 2 * whole_block + last_block + adapters + head
    # Back to the lowest adapter: through frozen products once, through attention and adapters twice.
    backward = last_block + 4 * C * S * D + head + 2 * adapters - 2 * S * 2 * D * hidden
    again = last_block + adapters + head + backward
    expected = [forward, forward + backward, forward + backward + again, forward + backward + 3 * again]
    np.testing.assert_allclose(lm.count_flops(lm.Spec(model, fast, C), weights), expected, rtol=0.05)


# --- 7. Writing -------------------------------------------------------------------------------------
ROOM = 48  # positions of a cache


def write_pieces(tiny: Tiny, weights: lm.Weights, w_B, prompts, draw: lm.Draw, pieces: int):
    """(tokens, logits of the first, logits of the next) after prompts in windows that end in garbage."""
    places_B, tokens_BS = np.int32([len(prompt) for prompt in prompts]), np.full((2, 12), 7, np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    first_BV, caches_B = lm.prefill(tiny.spec, weights, w_B, tokens_BS, places_B, ROOM)
    next_BV, written = first_BV, []
    for i in range(pieces):
        args = caches_B, next_BV, places_B + i * lm.PIECE, draw
        piece, caches_B, next_BV = lm.write_piece(tiny.spec, weights, w_B, *args)
        written.append(piece)
    return np.concatenate(written, 1), first_BV, next_BV


@pytest.mark.parametrize("kind", ["swiglu", "linear reconstruction", "lora", "neox", "llama", "llama lora"])
def test_writing_equals_reading_anew(kind):
    """Greedily, two pieces, of rows at their own places and with fast weights of their own."""
    tiny = build(kind)
    tiny = make(tiny.spec.model._replace(positions=ROOM), tiny.spec.fast)
    weights, prompts = with_random_slow(tiny), (tiny.tokens[:3], tiny.tokens[20:29])
    w_B = jax.tree.map(lambda *x: jnp.stack(x), weights.slow["start"], tiny.w)
    greedy = lm.Draw(jax.random.key(0), np.arange(2), np.zeros(2, np.int32), np.float32(0))
    spec, own = lm.for_writing(tiny.spec, weights) if "lora" in kind else (tiny.spec, weights)  # on a CPU
    drawn, before, after = write_pieces(tiny._replace(spec=spec), own, w_B, prompts, greedy, 2)
    for b, written in enumerate(drawn):
        text = np.append(prompts[b], written).astype(np.int32)
        scores = naive_model(tiny.spec.model, tiny.params, text, tiny.spec.fast, weights.slow, at(w_B, b))
        scores = scores[len(prompts[b]) - 1 :]
        np.testing.assert_array_equal(written, scores[:-1].argmax(-1))
        np.testing.assert_allclose(before[b], scores[0], atol=1e-4)
        np.testing.assert_allclose(after[b], scores[-1], atol=1e-4)


def test_what_is_drawn_depends_on_key_row_and_number_alone():
    """By the base model; what stands beside a row has no part in it."""
    tiny = make(MODEL._replace(positions=ROOM), KINDS["swiglu"])
    prompts, base = (tiny.tokens[:3], tiny.tokens[20:29]), base_weights(tiny.weights)
    w_B = jax.tree.map(lambda x: jnp.stack([x, x]), base.slow["start"])
    draw = lm.Draw(jax.random.key(0), np.int32([4, 9]), np.int32([3, 3]), np.float32(0.7))
    drawn, *_ = write_pieces(tiny, base, w_B, prompts, draw, 1)
    for b, row in enumerate((4, 9)):  # the draws one by one, from logits read anew
        text = np.append(prompts[b], drawn[b]).astype(np.int32)
        scores = forward(tiny.spec.model, tiny.params, text)[len(prompts[b]) - 1 : -1]
        for i, logits in enumerate(scores):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), row), 3 + i)
            assert drawn[b, i] == jax.random.categorical(key, logits / np.float32(0.7))
