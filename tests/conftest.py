"""What the tests share: tiny random models with fast weights, a document for each, one whole run."""
# ruff: noqa: E402

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tolerances are those of float32 products
# Compiling takes longer than all that is computed: it is done quickly, and once for all processes.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib").startswith("0.10."):  # halves the time again; later versions don't know it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest
from hypothesis import settings

import model as lm
import rl

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")
LONG = ("model", "rl", "ponder", "devices", "generate", "eval", "benchmarks")  # test files


def pytest_collection_modifyitems(items) -> None:
    """Begin the files that take long first, so that the workers end together."""
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Forget each file's compiled programs: they have memory maps, and a process may have 65,530 of those."""
    yield
    jax.clear_caches()


# --- 1. Tiny models ---------------------------------------------------------------------------------
CHUNKS, CHUNK = 5, 8
MODEL = lm.Model(61, 2 * CHUNK, width=16, layers=4, heads=2, kv_heads=2, head_width=8, hidden=64)
NEOX = MODEL._replace(hidden=20, activation="gelu", rotary=4, theta=30.0, parallel=True, tied=False)
LLAMA = MODEL._replace(heads=4, head_width=6, hidden=20, norm="rms", activation="silu", gated=True)
LLAMA = LLAMA._replace(rotary=6, theta=30.0, biases=("qkv",))
SWIGLU, LINEAR, LORA = lm.Fast((2, 3), 12), lm.Fast((2, 3), 0, "linear"), lm.Fast((2, 3), 3, "lora")
KINDS = {"swiglu": SWIGLU, "swiglu reconstruction": SWIGLU._replace(objective="reconstruction")}
KINDS |= {"linear": LINEAR, "linear reconstruction": LINEAR._replace(objective="reconstruction")}
KINDS |= {"lora": LORA, "blocks apart, momentum": lm.Fast((1, 3), 12, momentum=0.6)}
KINDS |= {"last block": SWIGLU._replace(blocks=(3,)), "first block": SWIGLU._replace(blocks=(0, 2))}
KINDS |= {"lora in the last block": LORA._replace(blocks=(3,)), "neox": SWIGLU._replace(blocks=(1, 2))}
KINDS |= {"neox lora": LORA, "llama": SWIGLU, "llama lora": LORA}
KINDS |= {"llama linear": lm.Fast((1, 3), 0, "linear", "reconstruction")}
LIGHT = lm.Fast((3,), 12, optimizer="sgd")  # for what has nothing to do with how they learn: compiles soonest


class Tiny(NamedTuple):
    """A random model with fast weights, and a document for it."""

    spec: lm.Spec
    params: Any  # the whole model
    weights: lm.Weights  # the slow ones at their initial values, but for the step sizes
    w: Any  # fast weights that add something
    tokens: np.ndarray  # (T*C + 1,)
    windows: lm.Window


make_windows = jax.jit(lm.make_windows, static_argnums=0)  # compiled once for all tests
document_loss = jax.jit(lm.document_loss, static_argnums=0)
build = lambda kind: make({"neox": NEOX, "llama": LLAMA}.get(kind.split()[0], MODEL), KINDS[kind])
learn = jax.jit(lambda spec, *args: lm.read_chunk(spec, *args[:-1])[1](args[-1]), static_argnums=0)
run_episode = jax.jit(rl.episode, static_argnums=0, static_argnames=("credit", "probe"))


def random_params(model: lm.Model, seed: int):
    """Make parameters so large that every one of them matters, biases too."""
    rng = np.random.RandomState(seed)
    noise = lambda x: np.float32(0.2) * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(lambda x: x + noise(x), lm.init_params(jax.random.key(seed), model))


@cache
def make(model: lm.Model, fast: lm.Fast) -> Tiny:
    rng = np.random.RandomState(4)
    normal = lambda x: rng.standard_normal(x.shape).astype(np.float32)
    spec, params = lm.Spec(model, fast, CHUNK, lm.make_mesh()), random_params(model, 0)
    slow = lm.init_slow(jax.random.key(1), model, fast)
    slow |= {"log_step": jax.tree.map(lambda x: 0.3 * normal(x) - 1, slow["log_step"])}  # all different
    slow = jax.tree.map(np.float32, slow)  # none weakly typed: each jitted function compiles once
    w = jax.tree.map(lambda x: x + 0.3 * normal(x), slow["start"])
    weights = lm.split_weights(fast, params, slow)
    tokens = np.random.RandomState(3).randint(0, model.vocab, CHUNKS * CHUNK + 1).astype(np.int32)
    return Tiny(spec, params, weights, w, tokens, make_windows(spec, weights, tokens))


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    """Write files, by their paths in a folder, and return it."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# --- 2. One whole run of the command line, for all tests of it --------------------------------------
SIZES = "--chunk 16 --chunks 6 --batch 2 --train-documents 4 --valid-documents 2 --test-documents 5"
SIZES += " --meta-steps 2 --iterations 3 --all-methods"
SECRETS = {"HF_TOKEN": "hf_a-token-that-nothing-may-write-down", "SOME_PASSWORD": "nor-this-password"}


def made_up_code(repos: int) -> Iterator[tuple[str, str]]:
    """(path, text) of made-up modules: each repository has names of its own, so that reading it teaches."""
    rng = np.random.default_rng(0)
    syllables = ["ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "ve", "xo", "za"]
    for repo in range(repos):
        words = sorted({"".join(rng.choice(syllables, 3)) for _ in range(12)})
        for module in range(4):
            names = [rng.choice(words, 4, replace=False) for _ in range(60)]
            functions = [f"def {f}({x}, {y}):\n    {z} = {x} + {y}\n    return {z}\n" for f, x, y, z in names]
            yield f"made_up_{repo:03d}/module_{module}.py", "\n".join(functions)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A random GPT-2 with a tokenizer of its own."""
    from pretrain import save_gpt2, train_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("base"), train_tokenizer((x for _, x in made_up_code(4)), 400)
    model = MODEL._replace(vocab=tokenizer.get_vocab_size(), positions=32)
    save_gpt2(folder, model, lm.init_params(jax.random.key(0), model), np.float32)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def code(tmp_path_factory) -> Path:
    """A folder of 40 small repositories."""
    return write(tmp_path_factory.mktemp("code"), dict(made_up_code(40)))


@pytest.fixture(scope="session")
def arguments(base, code) -> list[str]:
    return ["--base", str(base), "--data", str(code), "--dtype", "float32", *SIZES.split()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, arguments) -> Path:
    """The folder of one whole run, as a user starts it, with secrets in the environment."""
    out = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, ROOT / "ponder.py", *arguments, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, env=os.environ | SECRETS)
    assert done.returncode == 0 and "report:" in done.stdout, done.stderr
    assert re.search(r"about \d+ minutes, and compiling: ttt ", done.stdout)
    assert re.search(r"policy, \d+% of the run 3/3 .* all done in \d\d:\d\d", done.stderr)
    return out
