"""Fixtures shared by the tests: one tiny random model with fast weights, and one document for it."""

import os
from functools import cache
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tolerances are those of float32 products; accelerators may round more

import jax
import numpy as np
import pytest
from hypothesis import settings

import model as lm

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")

CHUNKS, CHUNK = 5, 8
MODEL = lm.Model(vocab=61, positions=2 * CHUNK, width=16, layers=4, heads=2)


class Tiny(NamedTuple):
    model: lm.Model
    fast: lm.Fast
    params: Any
    lower: Any
    upper: Any
    slow: Any  # adapters add nothing at the start
    weights: Any  # fast weights that do add something
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


@cache
def build(objective: str) -> Tiny:
    fast = lm.Fast(blocks=2, hidden=12, objective=objective)
    params = random_params(MODEL, 0)
    lower, upper = lm.split_blocks(params, fast.blocks)
    slow = lm.init_slow(jax.random.key(1), MODEL, fast)
    steps = 0.3 * np.random.RandomState(4).standard_normal((3, 7)).astype(np.float32) - 1  # all different
    slow |= {"log_step": dict(zip(sorted(slow["start"]), steps, strict=True))}
    w1 = np.random.RandomState(2).standard_normal(slow["start"]["w1"].shape).astype(np.float32)
    tokens = random_document(MODEL.vocab, CHUNKS, CHUNK, 3)
    weights = slow["start"] | {"w1": 0.3 * w1}
    return Tiny(MODEL, fast, params, lower, upper, slow, weights, tokens, windows(MODEL, fast, lower, upper, tokens, CHUNK))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return build("next_token")


@pytest.fixture(scope="session", params=["next_token", "reconstruction"])
def tiny_each(request) -> Tiny:
    """The tiny model under each of the inner objectives."""
    return build(request.param)
