"""model.py against transformers, naive NumPy loops in float64, and finite differences."""

import json
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
from conftest import build, document_loss, windows

import model as lm

forward = jax.jit(lm.forward, static_argnums=0)

# --- 1. Weights in and out --------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "logits.npz"
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 23, "n_embd": 18, "n_layer": 3, "n_head": 3}
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 61, "max_position_embeddings": 23, "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 3, "intermediate_size": 50, "hidden_act": "gelu", "rotary_pct": 0.5, "rotary_emb_base": 100,
    "use_parallel_residual": True, "layer_norm_eps": 1e-4, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 61, "max_position_embeddings": 23, "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 50, "hidden_act": "silu", "rope_theta": 100.0,
    "rms_norm_eps": 1e-4, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {  # of each golden model
    "gpt2": GPT2,
    "gpt2 eps": GPT2 | {"vocab_size": 37, "n_positions": 11, "n_embd": 20, "n_layer": 1, "n_head": 5, "layer_norm_epsilon": 0.05},
    "gpt2 narrow": GPT2 | {"n_inner": 31, "activation_function": "gelu"},
    "pythia": NEOX,
    "neox in sequence": NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_fast", "tie_word_embeddings": True},
    "neox without biases": NEOX | {"attention_bias": False, "rotary_pct": 0.25},
    "llama": LLAMA,
    "llama wide heads": LLAMA | {"head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": False}
    | {"attention_bias": True, "mlp_bias": True},
    "qwen2": LLAMA | {"model_type": "qwen2", "num_key_value_heads": 6, "use_sliding_window": False},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
}  # fmt: skip


def random_weights(config: dict) -> dict[str, np.ndarray]:
    """Random weights under the names of `transformers`, without their prefix. RandomState, because
    NumPy promises never to change its stream."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        table = lm.name_table(lm.load_shape(Path(folder)))
    rng = np.random.RandomState(config["vocab_size"])
    center = lambda name, shape: float(len(shape) == 1 and name.endswith("weight"))
    return {name: (center(name, shape) + 0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in table.items()}


PREFIX = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # else "model."


def write_checkpoint(folder: Path, config: dict, weights: dict[str, np.ndarray], prefix: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    prefix = PREFIX.get(config["model_type"], "model.") if prefix is None else prefix
    arrays = {name if name in ("lm_head.weight", "embed_out.weight") else prefix + name: value for name, value in weights.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def golden_tokens(config: dict) -> np.ndarray:
    """As many as it has positions."""
    length = config.get("n_positions") or config["max_position_embeddings"]
    return np.random.RandomState(length).randint(0, config["vocab_size"], length).astype(np.int32)


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What transformers answers for a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    reference, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return reference.eval()(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()


def make_golden(folder: Path) -> None:
    """Writes GOLDEN anew. With torch: `PYTHONPATH=. python tests/test_model.py`."""
    golden = {}
    for name, config in CONFIGS.items():
        checkpoint = write_checkpoint(folder / name, config, random_weights(config))
        golden[name] = torch_logits(checkpoint, golden_tokens(config))
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_that_transformers_gave(tmp_path, name):
    config = CONFIGS[name]
    model, params = lm.load_model(write_checkpoint(tmp_path, config, random_weights(config)))
    tokens = golden_tokens(config)
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(forward(model, params, tokens), golden[name], atol=1e-4, rtol=1e-4)
        if name in ("gpt2", "pythia", "llama"):
            for length in (1, 7):
                np.testing.assert_allclose(forward(model, params, tokens[:length]), golden[name][:length], atol=1e-4, rtol=1e-4)


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch", reason="torch isn't installed, so only the golden logits are checked")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_that_transformers_gives(tmp_path, torch, name):
    """Of a checkpoint that it has written itself, in one file or in several, whole or in half precision."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CONFIGS[name]
    settings = {key: value for key, value in config.items() if key != "model_type"} | {"initializer_range": 0.3}
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).eval()
    for parameter in theirs.parameters():  # its biases and norms would start at 0 and 1
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    tokens = golden_tokens(config)
    for dtype, size in ((torch.float32, "1GB"), (torch.float32, "4KB"), (torch.bfloat16, "9KB"), (torch.float16, "1GB")):
        folder = tmp_path / f"{dtype}{size}"
        theirs.to(dtype).save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists() == (size != "1GB")
        ours = forward(*lm.load_model(folder), tokens)
        np.testing.assert_allclose(ours, torch_logits(folder, tokens), atol=1e-4, rtol=1e-4)


def test_transformers_reads_what_we_save(tmp_path, torch):
    folder = write_checkpoint(tmp_path / "written", GPT2, random_weights(GPT2))
    model, params = lm.load_model(folder)
    lm.save_gpt2(tmp_path / "saved", model, params, jnp.float32)
    tokens = golden_tokens(GPT2)[:19]
    np.testing.assert_allclose(torch_logits(tmp_path / "saved", tokens), torch_logits(folder, tokens), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama"])
def test_names_may_lack_their_prefix(tmp_path, name):
    config, weights = CONFIGS[name], random_weights(CONFIGS[name])
    plain = lm.load_model(write_checkpoint(tmp_path / "plain", config, weights))
    bare = lm.load_model(write_checkpoint(tmp_path / "bare", config, weights, prefix=""))
    jax.tree.map(np.testing.assert_array_equal, plain[1], bare[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_saved_checkpoint_loads_as_it_was(tmp_path, tiny, dtype):
    lm.save_gpt2(tmp_path / "new" / "folder", tiny.model, tiny.params, dtype)
    model, params = lm.load_model(tmp_path / "new" / "folder")
    assert model == tiny.model
    jax.tree.map(lambda ours, before: np.testing.assert_array_equal(ours, before.astype(dtype).astype(jnp.float32)),
                 params, tiny.params)  # fmt: skip


def test_weights_are_on_no_device_until_they_are_placed(tmp_path, tiny):
    """Whole, and in float32, they may not fit one; rounded on the host they are what a device would make of them."""
    lm.save_gpt2(tmp_path, tiny.model, tiny.params, jnp.float32)
    model, params = lm.load_model(tmp_path, "bfloat16")
    rounded = lm.freeze(model, params)
    assert {type(x) for x in jax.tree.leaves(lm.split_blocks(rounded, 1))} == {np.ndarray}
    for before, after in zip(jax.tree.leaves(params["h"]), jax.tree.leaves(rounded["h"]), strict=True):
        np.testing.assert_array_equal(after, before if before.ndim == 1 else jnp.asarray(before).astype(jnp.bfloat16))


OLD = {  # constants that old checkpoints carry
    "gpt2": {"h.0.attn.bias": np.ones((1, 1, 23, 23), np.uint8), "h.1.attn.masked_bias": np.float32([-1e4])},
    "neox in sequence": {
        "layers.0.attention.bias": np.ones((1, 1, 23, 23), bool),
        "layers.0.attention.masked_bias": np.float32([-1e4]),
        "layers.2.attention.rotary_emb.inv_freq": np.ones(4, np.float32),
    },
    "llama": {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
}


@pytest.mark.parametrize("name", OLD)
def test_a_tied_head_and_old_constants_are_accepted(tmp_path, name):
    config, weights = CONFIGS[name], random_weights(CONFIGS[name])
    embed, head = {"gpt2": ("wte", "lm_head"), "gpt_neox": ("embed_in", "embed_out"), "llama": ("embed_tokens", "lm_head")}[
        config["model_type"]
    ]
    plain = lm.load_model(write_checkpoint(tmp_path / "plain", config, weights))
    more = weights | OLD[name] | {f"{head}.weight": weights[f"{embed}.weight"]}
    more = lm.load_model(write_checkpoint(tmp_path / "more", config, more))
    assert plain[0] == more[0]
    jax.tree.map(np.testing.assert_array_equal, plain[1], more[1])


def test_a_sliding_window_bounds_the_positions(tmp_path):
    sliding = {"model_type": "qwen2", "sliding_window": 9}
    shapes = []
    for change in (
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": 9},
        sliding,
        sliding | {"use_sliding_window": True},
    ):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
        shapes.append(lm.load_shape(tmp_path))
    assert [shape.positions for shape in shapes] == [23, 9, 23, 9]
    assert [shape.biases for shape in shapes] == [(), (), ("qkv",), ("qkv",)]


def change(weights: dict, name: str, value) -> dict:
    return {n: v for n, v in (weights | {name: value}).items() if v is not None}


FAULTY_WEIGHTS = {
    "missing": ("gpt2", lambda w: change(w, "h.1.mlp.c_fc.bias", None), "missing.*h.1.mlp.c_fc.bias"),
    "unknown": ("gpt2", lambda w: change(w, "h.0.extra", w["ln_f.bias"]), "not known to gpt2.*h.0.extra"),
    "block too many": ("gpt2", lambda w: change(w, "h.3.ln_1.bias", w["ln_f.bias"]), "not known to gpt2.*h.3.ln_1.bias"),
    "wrong shape": ("gpt2", lambda w: change(w, "wpe.weight", w["wpe.weight"][:-1]), "wpe.weight has shape.*22, 18"),
    "transposed": ("gpt2", lambda w: change(w, "h.2.mlp.c_fc.weight", w["h.2.mlp.c_fc.weight"].T.copy()), "c_fc.weight has shape"),
    "untied head": ("gpt2", lambda w: change(w, "lm_head.weight", w["wte.weight"] + 1), "lm_head.weight differs"),
    "integers": ("gpt2", lambda w: change(w, "wte.weight", w["wte.weight"].astype(np.int8)), "wte.weight is int8"),
    "no head": ("pythia", lambda w: change(w, "embed_out.weight", None), "missing.*embed_out.weight"),
    "a bias": ("llama", lambda w: change(w, "layers.0.mlp.up_proj.bias", w["norm.weight"]), "not known to llama.*up_proj.bias"),
    "keys of every head": ("llama", lambda w: change(w, "layers.1.self_attn.k_proj.weight", w["layers.1.self_attn.q_proj.weight"]),
                           "k_proj.weight has shape.*24, 24"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY_WEIGHTS)
def test_faulty_weights_are_one_clear_error(tmp_path, fault):
    name, damage, message = FAULTY_WEIGHTS[fault]
    write_checkpoint(tmp_path, CONFIGS[name], damage(random_weights(CONFIGS[name])))
    with pytest.raises(lm.ModelError, match=message) as error:
        lm.load_model(tmp_path)
    assert "\n" not in str(error.value)


def rewrite(name: str, edit):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(edit((folder / name).read_bytes()))

    return damage


def config_with(**changes):
    return rewrite("config.json", lambda old: json.dumps(json.loads(old) | changes).encode())


FAULTY_FILES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors; give a folder with it"),
    "cut off": (rewrite("model.safetensors", lambda old: old[: len(old) // 2]), "not a readable safetensors file"),
    "empty": (rewrite("model.safetensors", lambda _: b""), "not a readable safetensors file"),
    "garbage": (rewrite("model.safetensors", lambda _: b"\xff" * 999), "not a readable safetensors file"),
    "broken config": (rewrite("config.json", lambda old: old[:-9]), "config.json: not a usable configuration"),
    "binary config": (rewrite("config.json", lambda _: b"\xff\xfe\x00"), "config.json"),
    "config of the wrong kind": (rewrite("config.json", lambda _: b"[1, 2]"), "config.json"),
    "config lacks a key": (
        rewrite("config.json", lambda old: json.dumps({k: v for k, v in json.loads(old).items() if k != "n_head"}).encode()),
        "config.json: not a usable configuration.*n_head",
    ),
    "other model": (config_with(model_type="bloom"), "model_type is 'bloom'.*gpt2, gpt_neox, llama"),
    "other activation": (config_with(activation_function="relu"), "'relu'.*gelu_new"),
    "other attention": (config_with(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    "quantised": (config_with(quantization_config={"bits": 4}), "quantization_config"),
    "heads don't divide the width": (config_with(n_head=4), "head"),
    "no layer": (config_with(n_layer=0), "sizes"),
    "a size in words": (config_with(n_embd="18"), "config.json"),
    "rotary positions for longer windows": (config_with(**LLAMA, rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
    "the same as transformers 5 says it": (
        config_with(**LLAMA, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}), "'llama3'",
    ),
    "rotary positions of part of llama's heads": (config_with(**LLAMA, rope_parameters={"partial_rotary_factor": 0.5}), "rotary"),
    "an odd number of rotary dimensions": (config_with(**NEOX | {"rotary_pct": 0.4}), "rotary"),
    "groups don't divide the heads": (config_with(**LLAMA | {"num_key_value_heads": 4}), "heads"),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle.*run any code.*save_pretrained",
    ),
    "broken index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"), "index.json: not an index",
    ),
    "missing shard": (
        lambda folder: (folder / "model.safetensors").rename(folder / "x").parent.joinpath("model.safetensors.index.json").write_text(
            '{"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}'
        ),
        "model-00001-of-00002.safetensors: no such file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY_FILES)
def test_faulty_files_are_one_clear_error(tmp_path, fault):
    damage, message = FAULTY_FILES[fault]
    damage(write_checkpoint(tmp_path, GPT2, random_weights(GPT2)))
    with pytest.raises(lm.ModelError, match=message) as error:
        lm.load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    lm.write_atomic(path, b"old")
    with pytest.raises(TypeError):
        lm.write_atomic(path, "not bytes")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


# --- 2. Pieces ----------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


PRODUCTS = {
    "plain": ((3, 4), (4, 5)),
    "shared weight": ((2, 3, 4), (4, 5)),
    "shared weight, two axes": ((2, 2, 3, 4), (4, 5)),
    "batched": ((2, 6, 3, 4), (2, 6, 4, 5)),
}


@pytest.mark.parametrize("shapes", PRODUCTS.values(), ids=PRODUCTS)
def test_matmul_gradients_are_those_of_jnp_matmul(shapes):
    a, b = normal(*shapes[0]), normal(*shapes[1], seed=1)
    loss = lambda product: lambda a, b: jnp.sin(product(a, b)).sum()
    second = lambda f: lambda a, b: sum((g**2).sum() for g in jax.grad(f, (0, 1))(a, b))  # needs the gradient's gradient
    ours, reference = loss(lambda a, b: lm.matmul(a, b, "float32")), loss(jnp.matmul)
    for f, g in ((ours, reference), (second(ours), second(reference))):
        both = jax.jit(lambda a, b, f=f, g=g: (jax.grad(f, (0, 1))(a, b), jax.grad(g, (0, 1))(a, b)))
        for mine, theirs in zip(*both(a, b), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)


def test_bfloat16_matmul_rounds_operands_and_accumulates_in_float32():
    a, b = normal(3, 400), normal(400, 5, seed=1)
    round_ = lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    product = lm.matmul(a, b, "bfloat16")
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, round_(a) @ round_(b), rtol=1e-4, atol=1e-4)
    grads = jax.grad(lambda a, b: lm.matmul(a, b, "bfloat16").sum(), (0, 1))(a, b)
    assert all(g.dtype == jnp.float32 for g in grads)
    np.testing.assert_allclose(grads[0], np.ones((3, 5)) @ round_(b).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_kept_both_ways_gives_what_a_product_with_it_gives(dtype):
    x, w = normal(3, 40), jnp.asarray(normal(40, 5, seed=1)).astype(dtype)
    loss = lambda product: lambda x: jnp.sin(product(x)).sum()
    second = lambda f: lambda x: (jax.grad(f)(x) ** 2).sum()  # needs the gradient's gradient
    ours, reference = loss(lambda x: lm.frozen_matmul(x, w, w.T)), loss(lambda x: lm.matmul(x, w, dtype))
    for f, g in ((ours, reference), (jax.grad(ours), jax.grad(reference)), (jax.grad(second(ours)), jax.grad(second(reference)))):
        mine, theirs = jax.jit(f)(x), jax.jit(g)(x)
        assert mine.dtype == theirs.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["swiglu", "neox", "llama"])
def test_frozen_weights_predict_and_learn_as_those_they_were_made_from(kind):
    model, fast, params, _, _, slow, weights, tokens, _ = build(kind)
    model = model._replace(dtype="bfloat16")

    def learn(params):
        lower, upper = lm.split_blocks(params, fast.blocks[0])
        window = at(windows(model, fast, lower, upper, tokens, C), 1)
        reading, gradient_of, _ = lm.differentiate(model, fast, upper, slow, weights, window)
        return reading.losses_C, gradient_of(weights)

    frozen = lm.freeze(model, params)
    assert frozen["head"][0].shape == frozen["head"][1].shape[::-1] == (model.width, model.vocab)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), jax.jit(learn)(frozen), jax.jit(learn)(params))


def naive_attention(q, k, v, start):
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    for head in range(q.shape[0]):
        group = head // (len(q) // len(k))
        for row in range(q.shape[1]):
            seen = start + row + 1
            weight = np.exp(k[group, :seen].astype(np.float64) @ q[head, row] / np.sqrt(q.shape[2]))
            out[head, row] = weight / weight.sum() @ v[group, :seen]
    return out


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("start, rows, query_block", [(0, 13, 4), (0, 6, 128), (5, 8, 4), (12, 1, 128)])
def test_attention_equals_a_loop(monkeypatch, start, rows, query_block, heads):
    monkeypatch.setattr(lm, "QUERY_BLOCK", query_block)
    q, k, v = normal(heads, rows, 6), normal(2, 13, 6, seed=1), normal(2, 13, 6, seed=2)
    expected = naive_attention(q, k, v, start)
    fixed = jax.jit(lambda q, k, v: lm.attention(q, k, v, start, "float32"))
    np.testing.assert_allclose(fixed(q, k, v), expected, atol=1e-5)
    traced = jax.jit(lambda q, k, v, start: lm.attention(q, k, v, start, "float32"))
    np.testing.assert_allclose(traced(q, k, v, start), expected, atol=1e-5)
    batched = fixed(np.stack([q, -q]), np.stack([k, k]), np.stack([v, v]))
    np.testing.assert_allclose(batched, [expected, naive_attention(-q, k, v, start)], atol=1e-5)


def test_attention_with_large_scores_stays_finite():
    q, v = 1e4 * normal(1, 5, 4), normal(1, 5, 4, seed=1)
    assert np.isfinite(lm.attention(q, q, v, 0, "float32")).all()


def naive_norm(model, p, x):
    out = []
    for row in np.asarray(x, np.float64).reshape(-1, x.shape[-1]):
        row = row - row.mean() if model.norm == "layer" else row
        out.append(row / np.sqrt((row**2).mean() + model.eps) * p["weight"] + p.get("bias", 0))
    return np.reshape(out, x.shape)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_equals_numpy(tiny, kind):
    model, x = tiny.model._replace(norm=kind, eps=1e-2), 3 + normal(2, 5, 7, seed=2)
    for p in ({"weight": normal(7), "bias": normal(7, seed=1)}, {"weight": normal(7)}):
        np.testing.assert_allclose(lm.norm(model, p, x), naive_norm(model, p, x), atol=1e-5)


def naive_rotate(model, x, position):
    """Of one head's (K,): pairs of dimensions as complex numbers, turned."""
    R, x = model.rotary, np.array(x, np.float64)
    for i in range(R // 2):
        turned = (x[i] + 1j * x[i + R // 2]) * np.exp(1j * position * model.theta ** (-2 * i / R))
        x[i], x[i + R // 2] = turned.real, turned.imag
    return x


@pytest.mark.parametrize("rotary", [8, 2])
def test_rotate_turns_complex_numbers(tiny, rotary):
    model, x = tiny.model._replace(rotary=rotary, theta=50.0), normal(3, 5, 8)
    expected = [[naive_rotate(model, x[h, s], 4 + s) for s in range(5)] for h in range(3)]
    np.testing.assert_allclose(lm.rotate(model, x, 4 + np.arange(5)), expected, atol=1e-5)


def at(stacked, t):
    return jax.tree.map(lambda x: x[t], stacked)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def naive_adapter(slow, w, m, x):
    """What the m-th adapter beside an MLP adds, given its weights and what it reads (D,)."""
    if "w0" in w:
        a = x @ w["w0"]
        return (a / (1 + np.exp(-a)) * (x @ w["w2"])) @ w["w1"]
    K, out = w["w"].shape[-1], []
    for h in range(len(w["w"])):
        z = x[h * K : (h + 1) * K] @ w["w"][h] + w["b"][h, 0]
        out.append((z - z.mean()) / np.sqrt(z.var() + 1e-5))
    return np.concatenate(out) * slow["norm"]["weight"][m] + slow["norm"]["bias"][m]


NAIVE_ACTIVATIONS = {
    "gelu_new": lambda u: 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))),
    "gelu": lambda u: 0.5 * u * (1 + scipy.special.erf(u / np.sqrt(2))),
    "silu": lambda u: u / (1 + np.exp(-u)),
}


def naive_model(model, params, tokens, fast=None, slow=None, weights=None):
    """The model with fast weights in some of its blocks, position by position in float64 -> logits (S, V)."""
    params, K, S, names = double(params), model.K, len(tokens), model.names
    slow, weights = double(slow), double(weights)
    x = params[names.embed]["weight"][tokens]
    if names.positions:
        x = x + params[names.positions]["weight"][:S]
    affine = lambda p, x: x @ p["weight"] + p.get("bias", 0)
    for layer in range(model.layers):
        p = params["h"][layer]
        m = fast.blocks.index(layer) if fast and layer in fast.blocks else None
        w = None if m is None else at(weights["adapters"], m)
        read = naive_norm(model, p[names.norm_1], x)
        qkv = np.concatenate([affine(p[names.attn][name], read) for name in names.qkv], -1)
        q, k, v = np.split(qkv, [model.heads * K, (model.heads + model.G) * K], -1)
        if w and "q_up" in w:
            q, v = q + read @ w["q_down"] @ w["q_up"], v + read @ w["v_down"] @ w["v_up"]
        heads = lambda t: np.stack([t[:, h * K : (h + 1) * K] for h in range(t.shape[1] // K)])
        turned = lambda t: np.stack([[naive_rotate(model, head[s], s) for s in range(S)] for head in heads(t)])
        attended = x + affine(p[names.attn][names.out], np.concatenate(naive_attention(turned(q), turned(k), heads(v), 0), -1))
        normed = naive_norm(model, p[names.norm_2], x if model.parallel else attended)
        u = [affine(p[names.mlp][name], normed) for name in names.up]
        hidden = NAIVE_ACTIVATIONS[model.activation](u[0]) * (u[1] if len(u) == 2 else 1)
        x = attended + affine(p[names.mlp][names.down], hidden)
        if w and "q_up" not in w:
            read = normed @ slow["project"]["query"][m] if "project" in slow else normed
            x = x + np.stack([naive_adapter(slow, w, m, row) for row in read])
    scores = naive_norm(model, params[names.norm], x) @ params[names.embed if model.tied else names.head]["weight"].T
    return scores + weights["bias"] if fast and "bias" in weights else scores


def naive_losses(model, params, tokens, t, chunk, *fast_weights):
    """Losses of chunk t, read after chunk t-1 alone (the first: after nothing)."""
    low = max(t - 1, 0) * chunk
    scores = naive_model(model, params, tokens[low : (t + 1) * chunk], *fast_weights)[-chunk:]
    targets = tokens[t * chunk + 1 : (t + 1) * chunk + 1]
    return np.asarray([np.log(np.exp(row).sum()) - row[target] for row, target in zip(scores, targets, strict=True)])


@pytest.mark.parametrize("kind", ["swiglu", "neox", "llama"])
def test_forward_and_language_loss_equal_the_loop(kind, monkeypatch):
    """The loss of all rows at once, and of a few at a time."""
    tiny = build(kind)
    rows = np.stack([tiny.tokens[:14], tiny.tokens[20:34]])
    ours = forward(tiny.model, tiny.params, rows[:, :-1])
    expected = [naive_model(tiny.model, tiny.params, row[:-1]) for row in rows]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    losses = [np.log(np.exp(expected[b][s]).sum()) - expected[b][s][rows[b][s + 1]] for b in range(2) for s in range(13)]
    mean = jax.value_and_grad(lambda params: lm.language_loss(tiny.model, params, rows))
    whole = jax.jit(mean)(tiny.params)
    np.testing.assert_allclose(whole[0], np.mean(losses), rtol=1e-5)
    monkeypatch.setattr(lm, "LOSS_ROWS", 5)  # of 26 rows two at a time then
    parts = jax.jit(lambda params: mean(params))(tiny.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), parts, whole)


# --- 3. Windows and predictions -----------------------------------------------------------------

predict = jax.jit(lm.predict, static_argnums=(0, 1))
C = 8
CHUNKS = range(5)


def test_a_chunk_is_read_as_the_full_forward_reads_its_window(tiny_read):
    """From the cached prefix, and through adapters that add nothing yet."""
    model, fast, params, _, upper, slow, *_, tokens, stacked = tiny_read
    starts = (None, slow["start"]) if fast.kind != "linear" else (None,)  # its norm has it add something from the start
    for t in CHUNKS:
        low = max(t - 1, 0) * C
        scores = forward(model, params, tokens[low : low + 2 * C])
        rows = slice(0, C) if t == 0 else slice(C, 2 * C)
        expected = lm.token_losses(scores[rows], tokens[t * C + 1 : (t + 1) * C + 1])
        for weights in starts:
            reading = predict(model, fast, upper, slow, weights, at(stacked, t))
            np.testing.assert_allclose(reading.logits_CV, scores[rows], atol=1e-4)
            np.testing.assert_allclose(reading.losses_C, expected, atol=1e-4)
            assert weights is None or not np.any(reading.outputs_MCD)


def test_a_chunk_is_read_through_its_adapters(tiny_read):
    model, fast, params, _, upper, slow, weights, tokens, stacked = tiny_read
    slow = random_slow(slow)
    for t in (0, 1, 4):
        reading = predict(model, fast, upper, slow, weights, at(stacked, t))
        expected = naive_losses(model, params, tokens, t, C, fast, slow, weights)
        np.testing.assert_allclose(reading.losses_C, expected, atol=1e-4)
        np.testing.assert_allclose(reading.loss, expected.mean(), atol=1e-4)
        for part in weights:  # each does something
            without = weights | {part: jax.tree.map(jnp.zeros_like, weights[part])}
            assert np.abs(expected - naive_losses(model, params, tokens, t, C, fast, slow, without)).max() > 0.01
        assert reading.inputs_MCD.shape == (len(fast.blocks), C, model.width)
        assert reading.outputs_MCD.shape == (len(fast.blocks), C, model.G * model.K if fast.kind == "lora" else model.width)


def test_a_document_of_one_chunk_can_be_read(tiny):
    stacked = windows(tiny.model, tiny.fast, tiny.lower, tiny.upper, tiny.tokens[: C + 1], C)
    reading = predict(tiny.model, tiny.fast, tiny.upper, tiny.slow, None, at(stacked, 0))
    np.testing.assert_allclose(reading.losses_C, naive_losses(tiny.model, tiny.params, tiny.tokens, 0, C), atol=1e-4)


@pytest.mark.parametrize("t", [0, 3])
def test_a_token_changes_nothing_before_it_in_its_chunk(tiny_each, t):
    model, fast, _, lower, upper, slow, weights, tokens, stacked = tiny_each
    before = predict(model, fast, upper, slow, weights, at(stacked, t))
    for i in range(C):
        changed = tokens.copy()
        changed[t * C + 1 + i] = (changed[t * C + 1 + i] + 7) % model.vocab
        after = predict(model, fast, upper, slow, weights, at(windows(model, fast, lower, upper, changed, C), t))
        np.testing.assert_array_equal(before.logits_CV[: i + 1], after.logits_CV[: i + 1])
        np.testing.assert_array_equal(before.losses_C[:i], after.losses_C[:i])
        assert before.losses_C[i] != after.losses_C[i]


def test_a_chunk_changes_no_loss_before_it(tiny_each):
    """Bit for bit, with updates on."""
    model, fast, _, lower, upper, slow, _, tokens, stacked = tiny_each
    actions = np.int32([1, 3, 2, 1, 0])
    _, before = document_loss(model, fast, upper, slow, stacked, actions)
    for s in CHUNKS:
        for i in (0, C // 2, C - 1):
            changed = tokens.copy()
            changed[s * C + 1 + i] = (changed[s * C + 1 + i] + 7) % model.vocab
            _, after = document_loss(model, fast, upper, slow, windows(model, fast, lower, upper, changed, C), actions)
            np.testing.assert_array_equal(before[:s], after[:s])
            assert np.all(before[s:] != after[s:])  # the rest hears of it: through what was learned, two chunks on


# --- 4. Inner gradients -------------------------------------------------------------------------


def random_slow(slow, seed=0):
    """Slow parameters away from their special initial values."""
    rng = np.random.RandomState(seed)
    return jax.tree.map(lambda x: x + np.float32(0.2) * rng.standard_normal(x.shape).astype(np.float32), slow)


def naive_reconstruction(slow, weights, inputs):
    """1/2 |f_W(key) - value|^2 summed over width, averaged over blocks and rows, in float64."""
    slow, weights, total = double(slow), double(weights), []
    for m in range(len(inputs)):
        for x in np.asarray(inputs[m], np.float64):
            key, value = (x @ slow["project"][name][m] for name in ("key", "value"))
            total.append(0.5 * ((naive_adapter(slow, at(weights["adapters"], m), m, key) - value) ** 2).sum())
    return np.mean(total)


def slope(f, weights, direction, eps):
    """Central difference of f along a direction of the pytree of weights."""
    moved = lambda s: jax.tree.map(lambda w, d: np.asarray(w, np.float64) + s * d, weights, direction)
    return (f(moved(eps)) - f(moved(-eps))) / (2 * eps)


def random_direction(tree, seed):
    rng = np.random.RandomState(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape), tree)


def dot(a, b):
    return sum((np.asarray(x, np.float64) * y).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def only(name, tree):
    """The pytree with zeros in all tensors but those under one name."""
    inside = lambda n: n == name or n.startswith(f"{name}.")
    return lm.nest({n: x if inside(n) else np.zeros_like(x) for n, x in lm.flatten(tree).items()})


@pytest.mark.parametrize("kind", ["swiglu reconstruction", "linear reconstruction"])
def test_reconstruction_gradient_is_the_gradient(kind):
    _, fast, *_, slow, weights, _, _ = build(kind)
    slow, inputs = random_slow(slow), normal(len(fast.blocks), 6, 16, seed=4)
    both = jax.jit(lambda *args: (lm.reconstruction_loss(*args, "float32"), lm.reconstruction_gradient(*args, "float32")))
    loss, ours = both(slow, weights, inputs)
    np.testing.assert_allclose(loss, naive_reconstruction(slow, weights, inputs), rtol=1e-5)
    assert jax.tree.structure(ours) == jax.tree.structure(weights)
    for name in lm.flatten(weights):
        for seed in range(3):
            direction = only(name, random_direction(weights, seed))
            difference = slope(lambda w: naive_reconstruction(slow, w, inputs), weights, direction, 1e-5)
            np.testing.assert_allclose(dot(ours, direction), difference, rtol=1e-3, atol=1e-4)


def test_reconstruction_is_meta_learned_in_bfloat16():
    """XLA turned transposed gradients into products that its CPU backend refuses to run in bfloat16."""
    w = {"adapters": {name: normal(2, 16, 16, seed=i) / 4 for i, name in enumerate(("w0", "w1", "w2"))}}
    slow = {"project": {name: normal(2, 16, 16, seed=i) / 4 for i, name in enumerate(("key", "value"), 3)}}
    size = lambda w, x, dtype: sum((g * g).sum() for g in jax.tree.leaves(lm.reconstruction_gradient(slow, w, x, dtype)))
    found, wanted = (jax.jit(jax.grad(partial(size, dtype=dtype)))(w, normal(2, 16, 16)) for dtype in ("bfloat16", "float32"))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(x - y).max() < 0.05 * jnp.abs(y).max()


@partial(jax.jit, static_argnums=(0, 1))
def inner_gradients(model, fast, upper, slow, weights, window):
    """The inner gradient taken afresh, and from the prediction's own forward pass."""
    _, gradient_of, first = lm.differentiate(model, fast, upper, slow, weights, window)
    return gradient_of(weights), first()


@pytest.mark.parametrize("kind", ["swiglu", "linear", "lora", "blocks apart, momentum", "neox", "neox lora", "llama", "llama lora"])
def test_next_token_gradient_equals_finite_differences(kind):
    model, fast, params, _, upper, slow, weights, tokens, stacked = build(kind)
    for t in (0, 2):
        loss = lambda w: naive_losses(model, params, tokens, t, C, fast, slow, w).mean()
        for gradient in inner_gradients(model, fast, upper, slow, weights, at(stacked, t)):
            for name in lm.flatten(weights):
                direction = only(name, random_direction(weights, t))
                expected = slope(loss, weights, direction, 1e-5)
                np.testing.assert_allclose(dot(gradient, direction), expected, rtol=1e-3, atol=1e-5)


def test_lora_has_no_layer_that_could_reconstruct(tiny):
    with pytest.raises(lm.ModelError, match="lora can't learn by reconstruction"):
        lm.init_slow(jax.random.key(0), tiny.model, lm.Fast((2,), 3, "lora", "reconstruction"))


# --- 5. Inner steps -----------------------------------------------------------------------------

PLACES = {0: [], 1: [0], 2: [1, 2], 4: [3, 4, 5, 6]}  # of each action's steps among the seven step sizes


def newton_schulz(gradient):
    """Muon's direction of matrices (..., m, n), by the singular values: the iterations act on each alone."""
    left, values, right = np.linalg.svd(gradient, full_matrices=False)
    values = values / np.sqrt((values**2).sum(-1, keepdims=True))
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values[..., None, :]) @ right


def naive_steps(fast, slow, state, gradient_of, steps):
    """State after some inner steps, in float64."""
    double = lambda tree: {name: np.asarray(x, np.float64) for name, x in lm.flatten(tree).items()}
    weights, momentum, taken = double(state.weights), state.momentum and double(state.momentum), float(state.steps)
    rates = double(slow["log_step"])
    for place in PLACES[steps]:
        gradient = double(gradient_of(lm.nest(weights)))
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            if fast.optimizer == "sgd" and norm > fast.clip:
                g = g * fast.clip / norm
            if fast.momentum:
                g = momentum[name] = fast.momentum * momentum[name] + g
            direction = newton_schulz(g) if fast.optimizer == "muon" else g
            fall = 1 / np.sqrt(1 + np.exp(float(slow["log_anneal"])) * taken)
            weights[name] = weights[name] - np.exp(rates[name][place]) * fall * direction
        taken += 1
    return lm.State(lm.nest(weights), momentum and lm.nest(momentum), taken)


def assert_close(ours, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tuple(ours), tuple(expected))


SGD = lm.Fast((0,), 2, optimizer="sgd")
LEARNERS = {
    "clip 0.5": SGD._replace(clip=0.5),
    "clip 3": SGD._replace(clip=3.0),
    "no clip": SGD._replace(clip=1e9),
    "muon": lm.Fast((0,), 2),
    "clip and momentum": SGD._replace(clip=0.5, momentum=0.7),
    "muon with momentum": lm.Fast((0,), 2, momentum=0.9),
}


@pytest.mark.parametrize("fast", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_ttt_update_equals_a_loop(steps, fast):
    weights = {"a": normal(2, 3, 4), "b": normal(1, 5, 2, seed=1)}
    slow = {"log_step": {"a": normal(7, seed=2) - 2, "b": normal(7, seed=3) - 3}, "log_anneal": np.float32(-0.7)}
    momentum = {"a": normal(2, 3, 4, seed=6), "b": normal(1, 5, 2, seed=7)} if fast.momentum else ()
    state = lm.State(weights, momentum, np.float32(3))
    gradient_of = lambda w: {"a": 1.5 * w["a"] + normal(2, 3, 4, seed=5), "b": w["b"] ** 2 - w["a"].sum()}
    ours = lm.ttt_update(fast, slow, state, gradient_of, lambda: gradient_of(weights), steps, "float32")
    assert_close(ours, naive_steps(fast, slow, state, gradient_of, steps), rtol=1e-3, atol=1e-4)
    assert ours.steps == 3 + steps


def test_steps_shrink_as_more_are_taken():
    slow = {"log_step": {"a": np.zeros(7, np.float32)}, "log_anneal": np.log(np.float32(0.5))}
    state, gradient = lm.State({"a": np.zeros(1, np.float32)}, (), np.float32(0)), {"a": np.float32([1.0])}
    sizes = []
    for _ in range(7):
        after = lm.inner_step(SGD, slow, state, gradient, 0, "float32")
        sizes.append(float((state.weights["a"] - after.weights["a"])[0]))
        state = after
    np.testing.assert_allclose(sizes, [(1 + 0.5 * n) ** -0.5 for n in range(7)], rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 9), (9, 4)])
def test_muon_learns_every_direction_alike(shape):
    gradient = normal(*shape) * 1e-3
    direction = lambda g: lm.orthogonalise(g, "float32")
    both = jax.jit(lambda g: (direction(g), jax.grad(lambda g: direction(g).sum())(g)))
    ours, _ = both(gradient)
    np.testing.assert_allclose(ours, newton_schulz(gradient.astype(np.float64)), atol=1e-3)
    spread = lambda x: np.ptp(np.log(np.linalg.svd(x, compute_uv=False)), -1).mean()
    assert spread(ours) < spread(gradient) / 2
    nothing, slope = both(np.zeros(shape, np.float32))
    assert not np.any(nothing) and not np.any(slope)  # 1e10 is finite too


NO_ANNEAL = np.float32(-1e9)


def test_the_clip_is_of_the_norm_over_all_tensors():
    weights = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    gradient = {"a": np.float32([3.0]), "b": np.float32([4.0])}
    slow = {"log_step": {name: np.zeros(7, np.float32) for name in weights}, "log_anneal": NO_ANNEAL}
    after = lm.inner_step(SGD, slow, lm.State(weights, (), 0), gradient, 0, "float32").weights
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-0.6, -0.8], rtol=1e-5)


def test_the_first_gradient_is_used_for_the_first_step_only():
    state = lm.State({"a": np.zeros(1, np.float32)}, (), 0)
    slow = {"log_step": {"a": np.zeros(7, np.float32)}, "log_anneal": NO_ANNEAL}
    constant = lambda x: {"a": np.float32([x])}
    fast = SGD._replace(clip=1e9)
    after = lm.ttt_update(fast, slow, state, lambda _: constant(1), lambda: constant(10), 4, "float32")
    np.testing.assert_allclose(after.weights["a"], [-13.0])


learn = jax.jit(lambda model, fast, *args: lm.read_chunk(model, fast, *args[:-1])[1](args[-1]), static_argnums=(0, 1))


def test_an_action_is_its_number_of_inner_steps(tiny_each):
    model, fast, _, _, upper, slow, weights, _, stacked = tiny_each
    slow, window = random_slow(slow), at(stacked, 2)
    momentum = jax.tree.map(lambda x: 0.1 * x, weights) if fast.momentum else ()
    state = lm.State(weights, momentum, jnp.float32(5))
    gradient_of = lambda w: inner_gradients(model, fast, upper, slow, jax.tree.map(jnp.float32, w), window)[0]
    if fast.objective == "reconstruction":
        inputs = predict(model, fast, upper, slow, weights, window).inputs_MCD  # of the prediction, for all steps
        gradient_of = lambda w: lm.reconstruction_gradient(slow, jax.tree.map(jnp.float32, w), inputs, "float32")
    for action in range(4):
        after = learn(model, fast, upper, slow, state, window, np.int32(action))
        assert_close(after, naive_steps(fast, slow, state, gradient_of, (0, 1, 2, 4)[action]), atol=2e-4)
        same = jax.tree.map(np.array_equal, after, state)
        assert all(jax.tree.leaves(same)) if action == 0 else not any(jax.tree.leaves(same))  # SKIP: not one bit


def test_the_inner_loss_and_its_gradient_can_be_seen(tiny_each):
    model, fast, _, _, upper, slow, weights, _, stacked = tiny_each
    slow, window, state = random_slow(slow), at(stacked, 2), lm.init_state(fast, slow)._replace(weights=weights)
    look = jax.jit(lambda *args: lm.read_chunk(model, fast, *args)[2]())
    norm, loss = look(upper, slow, state, window)
    gradient = inner_gradients(model, fast, upper, slow, weights, window)[0]
    np.testing.assert_allclose(norm, np.sqrt(dot(gradient, gradient)), rtol=1e-4)
    reading = predict(model, fast, upper, slow, weights, window)
    expected = reading.loss if fast.objective == "next_token" else naive_reconstruction(slow, weights, reading.inputs_MCD)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


# --- 6. The outer objective ---------------------------------------------------------------------

ACTIONS = np.int32([1, 3, 2, 0, 1])


def test_document_loss_predicts_before_it_learns(tiny_each):
    model, fast, _, _, upper, slow, _, _, stacked = tiny_each
    state, losses = lm.init_state(fast, slow), []
    for t, action in enumerate(ACTIONS):
        losses.append(predict(model, fast, upper, slow, state.weights, at(stacked, t)).loss)
        state = learn(model, fast, upper, slow, state, at(stacked, t), action)
    assert state.steps == 1 + 4 + 2 + 0 + 1
    loss, losses_T = document_loss(model, fast, upper, slow, stacked, ACTIONS)
    np.testing.assert_allclose(losses_T, losses, atol=1e-4)
    np.testing.assert_allclose(loss, np.mean(losses), atol=1e-4)


def test_the_meta_gradient_equals_finite_differences(meta_gradient):
    """Through the inner steps, for the initial weights, the step sizes, their fall, norms and projections."""
    slow, gradient, loss = meta_gradient
    for name in slow:
        assert all(np.any(g) for g in jax.tree.leaves(gradient[name])), name
        for seed in range(2):
            direction = only(name, random_direction(slow, seed))
            size = np.sqrt(dot(direction, direction))
            expected = slope(loss, slow, direction, 1e-2 / size) / size
            np.testing.assert_allclose(dot(gradient, direction) / size, expected, rtol=0.03, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module", params=["linear reconstruction", "blocks apart, momentum"])
def meta_gradient(request):
    """(slow, the gradient of document_loss in it, document_loss as a function of it). UPDATE_1 and
    UPDATE_4 are left out: they would multiply the time to compile, and go through the same loop as UPDATE_2."""
    model, fast, _, _, upper, slow, _, _, stacked = build(request.param)
    slow, actions = random_slow(slow), np.int32([2, 2, 0, 2, 0])

    def loss(slow):
        slow = jax.tree.map(jnp.float32, slow)
        return np.asarray(document_loss(model, fast, upper, slow, stacked, actions)[1], np.float64).mean()

    gradient_of = jax.jit(jax.grad(lm.document_loss, 3, has_aux=True), static_argnums=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "STEPS", (0, 0, 2))
        gradient, _ = gradient_of(model, fast, upper, slow, stacked, actions)
    return slow, gradient, loss


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_golden(Path(folder))
