"""Fixtures shared by the tests: one tiny random model with fast weights, and one document for it."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tolerances are those of float32 products; accelerators may round more

# Compiling takes longer than all that is computed: it is done quickly, and once for all workers and the processes
# that they start. What is kept for the next time is found by a hash of the program, as in a user's runs.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1",
    # Halves it again, and is not known to later versions.
    "--xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib").startswith("0.10.") else "",
]).strip()  # fmt: skip
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest
from hypothesis import settings

import data
import model as lm
import rl

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")


def pytest_collection_modifyitems(items) -> None:
    """Files that take long are begun first, those with whole runs apart, so that the workers end together."""
    long = ["test_faults", "test_model", "test_rl", "test_ponder", "test_devices", "test_generate", "test_eval", "test_benchmarks"]
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


CHUNKS, CHUNK = 5, 8
MODEL = lm.Model(vocab=61, positions=2 * CHUNK, width=16, layers=4, heads=2)
NEOX = MODEL._replace(kind="gpt_neox", hidden=20, activation="gelu", rotary=4, theta=30.0, parallel=True, tied=False)
LLAMA = MODEL._replace(
    kind="llama", heads=4, kv_heads=2, head_width=6, hidden=20, norm="rms", activation="silu", rotary=6, theta=30.0, biases=("qkv",)
)
KINDS = {
    "swiglu": lm.Fast((2, 3), 12),
    "swiglu reconstruction": lm.Fast((2, 3), 12, objective="reconstruction"),
    "linear": lm.Fast((2, 3), 0, "linear"),
    "linear reconstruction": lm.Fast((2, 3), 0, "linear", "reconstruction"),
    "lora": lm.Fast((2, 3), 3, "lora"),
    "blocks apart, momentum": lm.Fast((1, 3), 12, momentum=0.6),
    "last block": lm.Fast((3,), 12),
    "first block": lm.Fast((0, 2), 12),
    "lora in the last block": lm.Fast((3,), 3, "lora"),
    "neox": lm.Fast((1, 2), 12),
    "neox lora": lm.Fast((2, 3), 3, "lora"),
    "llama": lm.Fast((2, 3), 12),
    "llama linear": lm.Fast((1, 3), 0, "linear", "reconstruction"),
    "llama lora": lm.Fast((2, 3), 3, "lora"),
}
LIGHT = lm.Fast((3,), 12, optimizer="sgd")  # for what has nothing to do with how they learn: compiles soonest
# Those whose learning is compiled and run as a whole, which takes long; all kinds' gradients are checked one by one.
LEARNED = ("swiglu reconstruction", "linear reconstruction", "lora")


class Tiny(NamedTuple):
    model: lm.Model
    fast: lm.Fast
    params: Any
    lower: Any
    upper: Any
    slow: Any  # at their initial values, but for the step sizes
    weights: Any  # fast weights that add something
    tokens: np.ndarray  # a document, (T*C + 1,)
    windows: lm.Window


def random_params(model: lm.Model, seed: int):
    """Parameters large enough that every one of them matters (biases too)."""
    rng = np.random.RandomState(seed)
    params = lm.init_gpt2(jax.random.key(seed), model)
    return jax.tree.map(lambda x: x + np.float32(0.2) * rng.standard_normal(x.shape).astype(np.float32), params)


def random_document(vocab: int, chunks: int, chunk: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, vocab, chunks * chunk + 1).astype(np.int32)


# Compiled once for all tests.
windows = jax.jit(lm.windows, static_argnums=(0, 1, 5))
document_loss = jax.jit(lm.document_loss, static_argnums=(0, 1))
run_episode = jax.jit(rl.episode, static_argnums=(0, 1), static_argnames=("credit", "probe"))


def build(kind: str) -> Tiny:
    return make({"neox": NEOX, "llama": LLAMA}.get(kind.split()[0], MODEL), KINDS[kind])


@cache
def make(model: lm.Model, fast: lm.Fast) -> Tiny:
    rng = np.random.RandomState(4)
    normal = lambda x: rng.standard_normal(x.shape).astype(np.float32)
    params = random_params(model, 0)
    lower, upper = lm.split_blocks(params, fast.blocks[0])
    slow = lm.init_slow(jax.random.key(1), model, fast)
    slow |= {"log_step": jax.tree.map(lambda x: 0.3 * normal(x) - 1, slow["log_step"])}  # all different
    slow = jax.tree.map(np.float32, slow)  # none weakly typed: each jitted function compiles once
    weights = jax.tree.map(lambda x: x + 0.3 * normal(x), slow["start"])
    tokens = random_document(model.vocab, CHUNKS, CHUNK, 3)
    return Tiny(model, fast, params, lower, upper, slow, weights, tokens, windows(model, fast, lower, upper, tokens, CHUNK))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each file's compiled programs go with it: they have several memory maps each, and a system allows 65,530 a process."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return build("swiglu")


@pytest.fixture(scope="session", params=LEARNED)
def tiny_each(request) -> Tiny:
    """The tiny model with different kinds of fast weights."""
    return build(request.param)


@pytest.fixture(scope="session", params=KINDS)
def tiny_read(request) -> Tiny:
    """And with all kinds, in other blocks too."""
    return build(request.param)


@pytest.fixture
def copies() -> Callable[..., dict[str, list[data.SourceFile]]]:
    """A repository of each split with the files given, words that make up their text by their names."""
    names = {split: next(f"repo{i}" for i in range(99) if data.split_of(f"repo{i}") == split) for split in data.SPLITS}
    lines = lambda word, count: "".join(f"{word}_{i} = compute_something_long({word}, {i})\n" for i in range(count))
    text = lambda words: "".join(lines(word, count) for word, count in words.items())
    return lambda **splits: {
        names[split]: [data.SourceFile(names[split], name, text(words)) for name, words in files.items()] for split, files in splits.items()
    }


PATHS = lambda repos: {data.split_of(repo): [file.path for file in files] for repo, files in repos.items()}


# --- one whole run of the command line, for all tests of it ---

ROOT = Path(lm.__file__).parent
SIZES = "--chunk 16 --chunks 6 --batch 2 --train-documents 4 --test-documents 5 --meta-steps 2"
SIZES += " --meta-chunks 3 --iterations 3 --seeds 2 --teacher-documents 4"
SECRETS = {"HF_TOKEN": "hf_a-token-that-nothing-may-write-down", "SOME_PASSWORD": "a-password-that-nothing-may-write-down"}


def made_once(tmp_path_factory, name: str, make: Callable[[Path], Any]) -> Path:
    """A folder that one worker makes, and all read."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / name
    with open(folder.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:
            make(folder)
            lock.write("made")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A random GPT-2 with a tokenizer of its own."""

    def make(folder: Path) -> None:
        tokenizer = data.train_tokenizer((f.text for f in data.synthetic_source(4)), 400)
        model = lm.Model(tokenizer.get_vocab_size(), 32, 16, 4, 2)
        lm.save_gpt2(folder, model, lm.init_gpt2(jax.random.key(0), model))
        (folder / "tokenizer.json").write_text(tokenizer.to_str())

    return made_once(tmp_path_factory, "base", make)


@pytest.fixture(scope="session")
def arguments(base) -> list[str]:
    return ["--base", str(base), "--data", "synthetic", "--dtype", "float32", *SIZES.split()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, arguments) -> Path:
    """One whole run, as a user starts it, with secrets in the environment."""

    def make(out: Path) -> None:
        command = [sys.executable, ROOT / "ponder.py", *arguments, "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, env=os.environ | SECRETS)
        assert done.returncode == 0, done.stderr
        assert "report:" in done.stdout

    return made_once(tmp_path_factory, "finished", make)
