"""Generation: the cache against reading anew, the chunks of a document while it is written, sampling, the command line."""

import json
import sys
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import CHUNK, CHUNKS, LLAMA, MODEL, NEOX, Tiny, build, make, run_episode, windows
from hypothesis import given
from hypothesis import strategies as st
from test_model import at, naive_model, random_slow
from tokenizers import models, pre_tokenizers

import data
import eval as evaluation
import model as lm
import rl

# --- 1. The cache -----------------------------------------------------------------------------------


def frozen_of(tiny: Tiny):
    return lm.join_blocks(tiny.model, tiny.lower, tiny.upper)


@pytest.mark.parametrize("kind", ["swiglu", "linear reconstruction", "lora", "neox", "neox lora", "llama", "llama lora"])
def test_reading_on_equals_reading_anew(kind):
    """Rows at places and with fast weights of their own, prefilled from windows that end in garbage."""
    tiny = build(kind)
    model, fast, slow, frozen = tiny.model, tiny.fast, random_slow(tiny.slow), frozen_of(tiny)
    weights = [slow["start"], tiny.weights]
    tokens, lengths, size = np.stack([tiny.tokens[:16], tiny.tokens[20:36]]), (3, 9), 16
    naive = [naive_model(model, tiny.params, row, fast, slow, w) for row, w in zip(tokens, weights, strict=True)]
    padded = [np.append(row[:n], np.full(12 - n, 7)).astype(np.int32) for row, n in zip(tokens, lengths, strict=True)]
    rows = [lm.prefill(model, fast, frozen, slow, w, p, n, size) for w, p, n in zip(weights, padded, lengths, strict=True)]
    logits, caches = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    weights = jax.tree.map(lambda *x: jnp.stack(x), *weights)
    for b in range(2):
        np.testing.assert_allclose(logits[b], naive[b][lengths[b] - 1], atol=1e-4)
    for position in np.asarray(lengths, np.int32) + np.arange(7)[:, None].astype(np.int32):
        logits, caches = lm.decode(model, fast, False, frozen, slow, weights, caches, tokens[range(2), position], position)
        for b in range(2):
            np.testing.assert_allclose(logits[b], naive[b][position[b]], atol=1e-4)


@pytest.mark.parametrize("kind", ["swiglu", "neox"])
def test_rows_may_share_their_fast_weights_or_have_none(kind):
    tiny = build(kind)
    model, fast, slow, frozen = tiny.model, tiny.fast, tiny.slow, frozen_of(tiny)
    for weights, learner in ((tiny.weights, (fast, slow, tiny.weights)), (None, ())):
        logits, cache = lm.prefill(model, fast, frozen, slow, weights, tiny.tokens[:8], 8, 16)
        caches = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
        logits, _ = lm.decode(model, fast, True, frozen, slow, weights, caches, tiny.tokens[8:10], np.int32([8, 8]))
        for b in range(2):
            row = np.append(tiny.tokens[:8], tiny.tokens[8 + b])
            np.testing.assert_allclose(logits[b], naive_model(model, tiny.params, row, *learner)[-1], atol=1e-4)


def test_bfloat16_reads_on_as_it_predicts(tiny):
    model = tiny.model._replace(dtype="bfloat16")
    frozen = lm.join_blocks(model, tiny.lower, tiny.upper)
    assert frozen["h"][0]["mlp"]["c_fc"]["weight"].dtype == frozen["head"][0].dtype == jnp.bfloat16
    again = lm.join_blocks(tiny.model, *lm.split_blocks(frozen, 1))  # float32, as a CPU decodes
    assert {x.dtype for x in jax.tree.leaves(again)} == {np.dtype("float32")} and "head" not in again
    scores = jax.jit(lm.forward, static_argnums=0)(model, tiny.params, tiny.tokens[:12])
    logits, caches = lm.prefill(model, tiny.fast, frozen, tiny.slow, None, tiny.tokens[:8], 8, 16)
    np.testing.assert_allclose(logits, scores[7], atol=0.03)
    caches = jax.tree.map(lambda x: x[None], caches)
    for n in range(8, 12):
        logits, caches = lm.decode(model, tiny.fast, True, frozen, tiny.slow, None, caches, tiny.tokens[n : n + 1], np.int32([n]))
        np.testing.assert_allclose(logits[0], scores[n], atol=0.03)


# --- 2. Sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.5)])
def test_tokens_are_drawn_from_the_nucleus(temperature, top_p):
    logits = np.float32([0.3, 2.0, -1.0, 1.5, 0.0, -9.0])
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    nucleus, mass = [], 0.0
    for i in np.argsort(-p):
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += p[i]
    expected = np.where(np.isin(np.arange(6), nucleus), p, 0) / mass
    rows = np.arange(4000)
    drawn = lm.sample(jax.random.key(0), rows, rows % 7, np.tile(logits, (4000, 1)), temperature, top_p)
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 4000, expected, atol=0.03)


def test_temperature_zero_takes_the_most_likely():
    logits = np.random.RandomState(0).standard_normal((5, 30)).astype(np.float32)
    np.testing.assert_array_equal(lm.sample(jax.random.key(0), np.arange(5), np.arange(5), logits, 0.0, 0.1), logits.argmax(-1))


# --- 3. Documents that are written ------------------------------------------------------------------------

WORDS = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w1"))
WORDS.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def words(seed: int, count: int) -> str:
    return " ".join(f"w{i}" for i in np.random.RandomState(seed).randint(2, 61, count))


def make_generator(tiny: Tiny) -> evaluation.Generator:
    env = rl.Env(jnp.asarray(rl.NOMINAL), jnp.float32(2.5))
    setup = evaluation.Setup(tiny.model, tiny.fast, CHUNK, tiny.lower, tiny.upper, tiny.slow, env, np.asarray(rl.NOMINAL), lm.make_mesh())
    policy = rl.init_policy(jax.random.key(5))
    actor = policy.net["actor"] | {"weight": 3 * jax.random.normal(jax.random.key(7), (64, 4))}
    policy = policy._replace(net=policy.net | {"actor": actor})
    spend = np.tile(np.arange(rl.POINTS), (3, 5, 1))
    known = {"spend": spend.tolist(), "threshold": np.linspace(0.5, -0.5, 5)[:, None].repeat(rl.POINTS, 1)[None].repeat(3, 0).tolist()}
    classes = np.eye(61, 8, dtype=np.float32)
    return evaluation.Generator(setup, tiny.model, frozen_of(tiny), WORDS, (0,), classes, evaluation.Judged(policy, {"policy": known}))


def generate(g, prompts, context=(), action="policy", seed=0, **options):
    tokens = [token for text in context for token in WORDS.encode(text).ids]
    return evaluation.generate(g, evaluation.begin(g, action, tokens, seed), prompts, **options)


learn_whole = jax.jit(lambda model, fast, *args: lm.read_chunk(model, fast, *args[:-1])[1](args[-1]), static_argnums=(0, 1))


def naive_generate(tiny: Tiny, text: str, new: int, actions: list[int], learn_own: bool, base: bool = False, context: int = 0) -> list[int]:
    """Greedy, without a cache: each token from its window alone, after learning from each complete chunk
    with the next of the actions (those that are generated only with `learn_own`). After the `context` chunks that are
    not of the prompt half of what was learned is forgotten."""
    model, fast, slow = tiny.model, tiny.fast, tiny.slow
    tokens, state, t, given = [0, *WORDS.encode(text).ids], lm.init_state(fast, slow), 0, len(WORDS.encode(text).ids)
    for _ in range(new):
        while (t + 1) * CHUNK < len(tokens):
            if actions and ((t + 1) * CHUNK <= given or learn_own):
                first, document = max(t + 1 - CHUNKS, 0), np.zeros(CHUNKS * CHUNK + 1, np.int32)  # of one length, compiled once
                read = tokens[first * CHUNK : (t + 1) * CHUNK + 1]
                document[: len(read)] = read
                window = at(windows(model, fast, tiny.lower, tiny.upper, document, CHUNK), t - first)
                state = learn_whole(model, fast, tiny.upper, slow, state, window, np.int32(actions.pop(0)))
            t += 1
            if t == context:
                half = jax.tree.map(lambda before, after: (before + after) / 2, slow["start"], state.weights)
                state = lm.init_state(fast, slow | {"start": half})
        window = tokens[max(t - 1, 0) * CHUNK :]
        padded = np.asarray(window + [0] * (2 * CHUNK - len(window)))  # of one size, which is compiled once
        scores = naive_model(model, tiny.params, padded, *(() if base else (fast, slow, state.weights)))
        tokens.append(int(scores[len(window) - 1].argmax()))
    return tokens[given + 1 :]


SGD = lm.Fast((2, 3), 3, optimizer="sgd")  # compiles faster
CHEAP = SGD._replace(blocks=(3,), objective="reconstruction")
CASES = {
    "gpt2": (MODEL, SGD, "update_2", False),
    "gpt2 lora": (MODEL, SGD._replace(kind="lora"), "update_1", True),
    "gpt2 linear": (MODEL, CHEAP._replace(kind="linear"), "update_1", True),
    "neox": (NEOX, SGD._replace(blocks=(1, 2)), "skip", True),
    "llama": (LLAMA, SGD, "update_1", False),
    "llama lora": (LLAMA, SGD._replace(kind="lora"), "base", False),
}


@pytest.mark.parametrize("case", CASES)
def test_generating_equals_a_loop_without_a_cache(case):
    """Token for token, over chunk borders, from prompts with and without chunks to learn from, more of them
    than rows."""
    model, fast, action, learn_own = CASES[case]
    tiny, prompts, context = make(model, fast), [words(1, 3), words(2, 21), words(3, 15)], (words(4, 9),)
    found = generate(make_generator(tiny), prompts, context, action, max_new_tokens=21, batch=2, learn_own=learn_own)
    chosen = evaluation.FIXED.get(action, 0)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        expected = naive_generate(tiny, f"{context[0]} {prompt}", 21, [chosen] * 9 if chosen else [], learn_own, action == "base", 1)
        assert list(completion.tokens) == expected
        assert completion.text.split() == [f"w{i}" for i in expected] and completion.reason == "length"
        length = len(f"{context[0]} {prompt}".split())
        assert completion.actions == (chosen,) * ((length + 20 * learn_own) // CHUNK if chosen else 0)


def test_a_prompt_begins_anew_with_half_of_what_its_context_taught():
    tiny = make(MODEL, SGD._replace(momentum=0.5))
    g, tokens = make_generator(tiny), [0, *WORDS.encode(words(4, 3 * CHUNK + 1)).ids]
    state = lm.init_state(tiny.fast, tiny.slow)
    document = np.zeros(CHUNKS * CHUNK + 1, np.int32)
    document[: 3 * CHUNK + 1] = tokens[: 3 * CHUNK + 1]
    for t in range(3):
        window = at(windows(tiny.model, tiny.fast, tiny.lower, tiny.upper, document, CHUNK), t)
        state = learn_whole(tiny.model, tiny.fast, tiny.upper, tiny.slow, state, window, np.int32(1))
    begun = evaluation.begin(g, "update_1", tokens[1:]).row
    assert begun.actions == (1, 1, 1) and begun.chunk == 3 and begun.memory.counts_A.tolist() == [0, 3, 0, 0]
    assert begun.memory.state.steps == 0 and not any(np.any(x) for x in jax.tree.leaves(begun.memory.state.momentum))
    half = jax.tree.map(lambda before, after: (before + after) / 2, tiny.slow["start"], state.weights)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), begun.memory.state.weights, half)
    assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (half, state.weights)), strict=True)) > 1e-3


def test_the_policy_decides_as_in_an_episode():
    tiny = make(MODEL, CHEAP)
    g, text = make_generator(tiny), words(7, 5 * CHUNK + 3)
    ((completion,),) = generate(g, [text], max_new_tokens=5)
    tokens = np.asarray([0, *WORDS.encode(text).ids[: 5 * CHUNK]], np.int32)
    setup = g.setup.at(2.5 * 5)
    rule = evaluation.calibrated_rule(setup, 5, "policy", g.judged.calibration["policy"], g.judged.policy)
    frozen = setup.model, setup.fast
    document = rl.prepare(*frozen, CHUNK, setup.lower, setup.upper, tokens, rl.text_features(tokens, CHUNK, g.classes))
    steps = run_episode(*frozen, setup.upper, setup.slow, setup.env, document, rule, jax.random.key(0))
    assert completion.actions == tuple(steps.action.tolist()) and len(set(completion.actions)) > 1
    assert list(completion.tokens) == naive_generate(tiny, text, 5, steps.action.tolist(), False)


def test_what_is_drawn_does_not_depend_on_the_batch():
    g, prompts = make_generator(make(MODEL, CHEAP)), [words(1, 3), words(2, 10)]
    draw = partial(generate, g, prompts, action="update_1", samples=3, temperature=1.0, top_p=0.9, max_new_tokens=12)
    first = draw(batch=1, seed=3)
    assert [len(completions) for completions in first] == [3, 3]
    assert first == draw(batch=4, seed=3)
    texts = [c.text for completions in first for c in completions]
    assert len(set(texts)) == 6
    assert [c.text for completions in draw(seed=4) for c in completions] != texts


def test_a_text_ends_where_it_is_told_to():
    g, prompt = make_generator(make(MODEL, CHEAP)), words(2, 10)
    write = lambda g=g, **options: generate(g, [prompt], action="skip", max_new_tokens=20, **options)[0][0]
    whole = write()
    parts = whole.text.split()
    stopped = write(stop=(f"{parts[7]} ", f"{parts[4]} {parts[5]}"))
    assert stopped.text == whole.text[: min(whole.text.find(f"{parts[7]} "), whole.text.find(f"{parts[4]} {parts[5]}"))]
    assert stopped.reason == "stop" and whole.tokens[: len(stopped.tokens)] == stopped.tokens
    end = whole.tokens[6]
    ended = write(g._replace(ends=(0, end)))
    assert ended.reason == "end" and ended.tokens == whole.tokens[: whole.tokens.index(end) + 1]
    assert ended.text.split() == parts[: whole.tokens.index(end)]
    assert generate(g, []) == []


def test_a_step_costs_the_same_however_much_was_learned():
    """No shape that a step is compiled for grows with the document, and learning is compiled once."""
    g = make_generator(make(MODEL, CHEAP))
    sizes, before = [], evaluation.learn_chunk._cache_size()
    for length in (3 * CHUNK, 6 * CHUNK, 12 * CHUNK):
        generate(g, [words(5, length)], action="update_1", max_new_tokens=12)
        sizes.append((lm.decode._cache_size(), evaluation.learn_chunk._cache_size()))
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0][1] <= before + 1


def test_unknown_actions_and_missing_policies_are_refused():
    g = make_generator(make(MODEL, CHEAP))
    uncalibrated = g._replace(judged=g.judged._replace(calibration={}))
    for generator, action in ((g, "update_3"), (g._replace(judged=None), "policy"), (uncalibrated, "policy")):
        with pytest.raises(lm.ModelError, match="action"):
            evaluation.begin(generator, action)


# --- 4. Repository completion -------------------------------------------------------------------------------

CODE = """import os

class A(B):
    def one(
        self, x, y
    ):
        if x:
            y = 1
        return (
            y)

    def short(self):
        return 1

async def two() -> dict[str, int]:
    a = 1

    b = 2
    c = 3
    d = 4
function f(a) {
  let x = 1;
  if (a) {
    x = 2; y = 3; }
  return x;
}
"""


def test_functions_are_cut_in_their_middle():
    found = data.functions(data.SourceFile("repo", "m.py", CODE))
    assert [f.name for f in found] == ["m.py:6", "m.py:15", "m.py:21"]
    assert [f.rest for f in found] == [
        "\n        return (\n            y)\n",
        "\n    c = 3\n    d = 4\n",
        "\n    x = 2; y = 3; }\n  return x;\n",
    ]
    for f in found:
        assert f.before.startswith("# m.py\nimport os") and f"# m.py\n{CODE}".startswith(f.before + f.rest)


@pytest.mark.parametrize(
    "head, is_function",
    [
        ("} else if (x) {", False), ("} catch (Exception e) {", False), ("synchronized (this) {", False), ("foreach ($a as $b) {", False),
        ("async with a(b):", False), ("elseif (x) {", False), ("async function f(a) {", True), ("} function f(a) {", True),
        ("if_any(a, function (b) {", True), ("static int next(void) {", True),
    ],
)  # fmt: skip
def test_what_branches_or_repeats_is_no_function(head, is_function):
    text = head + "\n" + "    x = 1\n" * 6
    assert bool(data.functions(data.SourceFile("repo", "m", text))) == is_function


def test_functions_to_complete_are_of_files_that_are_not_learned_from():
    files = [data.SourceFile("repo", f"{i}.py", CODE.replace("two", f"two{i}")) for i in range(12)]
    learned, held = data.hold_out(files, 4)
    assert len(learned) == 10 and len(held) == 4
    assert not {f.path for f in learned} & {f.name.partition(":")[0] for f in held}
    assert data.hold_out(files[::-1], 4)[1] == held
    assert data.hold_out(files[:4], 4)[1] == []
    copy = next(f for f in files if f not in learned)
    same, fewer = data.hold_out([f._replace(text=copy.text) if f == learned[0] else f for f in files], 99)
    assert [f.path for f in same] == [f.path for f in learned]  # what has a copy among these is not asked for
    assert {f.name.partition(":")[0] for f in fewer} == {f.path for f in files if f not in learned} - {copy.path}


@given(st.text("abc ", max_size=12), st.text("abc ", max_size=12))
def test_edit_similarity_is_levenshteins(a, b):
    @cache
    def distance(i, j):
        if min(i, j) == 0:
            return max(i, j)
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert evaluation.edit_similarity(a, b) == pytest.approx(1 - distance(len(a), len(b)) / max(len(a), len(b), 1))


@pytest.mark.parametrize("action", ["base", "skip", "update_1"])
def test_completion_measures_the_rest_and_the_next_line(monkeypatch, action):
    """After learning from the repository, and from so much of the file before the function."""
    monkeypatch.setattr(evaluation, "BEFORE", 2)
    tiny = make(MODEL, CHEAP)
    g = make_generator(tiny)
    start = evaluation.begin(g, action, WORDS.encode(words(3, 2 * CHUNK + 2)).ids)
    held = [data.Function("a:1", words(4, 4), words(5, 3)), data.Function("b:2", words(6, 20), words(7, 2))]
    for f, found in zip(held, evaluation.complete(g, start, held, {"batch": 2}), strict=True):
        before = " ".join(f.before.split()[-2 * CHUNK :])
        row = evaluation.open_prompt(g, start, before)
        tokens = np.asarray([*start.row.tokens, *WORDS.encode(before).ids, *WORDS.encode(f.rest).ids][-2 * CHUNK - 1 :])
        given = () if action == "base" else (tiny.fast, tiny.slow, row.memory.state.weights)
        scores = naive_model(tiny.model, tiny.params, tokens[:-1], *given)
        losses = jax.nn.logsumexp(scores, -1) - scores[np.arange(len(scores)), tokens[1:]]
        n = len(f.rest.split())
        assert found["loss"] == pytest.approx(float(losses[-n:].mean()), abs=1e-4)
        assert found["function"] == f.name and found["expected"] == f.rest
        assert found["similarity"] == evaluation.edit_similarity(found["written"], f.rest)
        ((alone,),) = evaluation.generate(g, start, [before], max_new_tokens=evaluation.LINE)
        assert found["written"] == alone.text.strip()
        assert found["actions"] == ((1,) * ((len(before.split()) + 2) // CHUNK) if action == "update_1" else ())
    assert len(start.row.actions) == 2 * (action == "update_1")


def test_completion_goes_on_and_compares_with_the_first_action(base, monkeypatch, capsys, tmp_path):
    for i in range(10):
        (tmp_path / "repo").mkdir(exist_ok=True)
        (tmp_path / "repo" / f"m{i}.py").write_text(CODE.replace("two", f"two{i}"))
    (tmp_path / "repo" / "setup.py").write_text("")
    small = ("--base", base, "--chunk", 16, "--chunks", 4, "--dtype", "float32")
    arguments = ("--benchmark", "completion", "--data", tmp_path / "repo", *small, "--out", tmp_path / "out")
    code, out, _ = call(monkeypatch, capsys, *arguments, "--action", "skip", "update_1")
    assert code == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["skip", "update_1"] and [row[-2] for row in rows[2:]] == ["0.00", "3.00"]
    summary = json.loads((tmp_path / "out" / "completion.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "out" / "completion.jsonl").read_text().splitlines()]
    losses = {r["action"]: np.asarray([f["loss"] for f in r["functions"]]) for r in records}
    assert summary["update_1"]["loss"]["change"] == pytest.approx((losses["update_1"] - losses["skip"]).mean())
    code, _, err = call(monkeypatch, capsys, *arguments, "--action", "skip")
    assert code == 2 and "add --resume" in err
    assert call(monkeypatch, capsys, *arguments, "--action", "skip", "--resume")[1] == "\n".join(out.splitlines()) + "\n"
    code, _, err = call(monkeypatch, capsys, *arguments, "--action", "skip", "--resume", "--seed", 1)
    assert code == 2 and "was run with other settings (seed: 0)" in err
    code, _, err = call(monkeypatch, capsys, *arguments, "--reference")
    assert code == 2 and "leave --reference" in err


def test_completion_of_a_dataset_reads_its_test_repositories(base, monkeypatch, capsys, tmp_path):
    names = [name for i in range(99) if data.split_of(name := f"repo{i}") == "test"][:3]
    rows = [{"repo_name": name, "path": f"{name}_{i}.py", "text": CODE.replace("two", f"{name}_{i}")} for name in names for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ("--base", base, "--chunk", 16, "--chunks", 90, "--test-documents", 2, "--dtype", "float32", "--action", "skip")
    code, _, err = call(monkeypatch, capsys, "--benchmark", "completion", "--data", tmp_path / "a.jsonl", *small, "--out", tmp_path / "out")
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "out" / "completion.jsonl").read_text().splitlines()]
    assert len(records) == 2 and {r["repository"] for r in records} <= set(names) and all(r["functions"] for r in records)


def test_actions_are_compared_on_the_repositories_that_both_have():
    record = lambda action, repo, loss: {"action": action, "repository": repo, "cost": 0.0, "seconds": 0.0,
                                         "functions": [{"function": "f", "loss": loss, "exact": 0.0, "similarity": 0.0}]}  # fmt: skip
    records = [record("skip", repo, loss) for repo, loss in (("c", 6.0), ("a", 1.0), ("b", 2.0))] + [record("update_1", "a", 0.9)]
    summary = evaluation.summarise_completion(records)
    assert summary["skip"]["loss"]["mean"] == 3.0 and summary["update_1"]["loss"]["change"] == pytest.approx(-0.1)
    assert (summary["skip"]["units"], summary["update_1"]["units"]) == (3, 1)


# --- 5. The command line ----------------------------------------------------------------------------------


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    code = 0
    try:
        evaluation.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_command_line_writes_what_generate_returns(base, monkeypatch, capsys, tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "a.py").write_text("def fib(n):\n    return n\n" * 80)
    shared = ("--generate", "--prompt", "def fib(n):", "--context", tmp_path, "--max-new-tokens", 12, "--dtype", "float32")
    code, out, err = call(monkeypatch, capsys, *shared, "--chunks", 2, "--action", "update_1")
    assert code == 0 and "2 UPDATE_1" in err and "12 tokens" in err
    assert out.startswith("\n    return n\n")
    small = ("--base", base, "--chunk", 16, "--action", "skip")
    code, several, err = call(monkeypatch, capsys, *shared, *small, "--samples", 2)
    assert code == 0 and Counter(several.split("\n"))["--- 2"] == 1 and "24 tokens" in err and "nothing was to be learned" in err
    assert call(monkeypatch, capsys, *shared, *small, "--samples", 2, "--temperature", 0.8)[1] == several


def test_no_part_of_a_stop_is_shown_before_it_is_complete(base, monkeypatch, capsys):
    """Also while the text is shorter than the stop."""
    arguments = ("--generate", "--prompt", "def fib(n):", "--base", base, "--chunk", 16, "--action", "skip", "--dtype", "float32")
    code, text, _ = call(monkeypatch, capsys, *arguments, "--max-new-tokens", 12)
    assert code == 0 and len(text) > 12
    assert call(monkeypatch, capsys, *arguments, "--max-new-tokens", 12, "--stop", text[:-1])[:2] == (0, "\n")
    assert call(monkeypatch, capsys, *arguments, "--max-new-tokens", 12, "--stop", text[:-1] + "more")[:2] == (0, text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--prompt"),
        (("--prompt", "x", "--action", "skip", "policy"), "one --action"),
        (("--prompt", "x", "--samples", 2, "--temperature", 0), "--temperature 0"),
        (("--prompt", "x", "--temperature", "nan"), "--temperature"),
        (("--prompt", "x", "--stop", ""), "--stop"),
        (("--prompt", "\udcff"), "--prompt: not UTF-8"),
        (("--prompt", "x", "--max-new-tokens", 0), "--max-new-tokens"),
        (("--prompt", "x", "--top-p", 0), "--top-p"),
        (("--prompt", "x", "--context", "no/such/folder"), "no such folder"),
        (("--prompt", "x", "--fast", "lora", "--max-new-tokens", 1), "no trained policy"),
        (("--prompt", "x", "--cost", "flops"), "no trained policy"),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, capsys, arguments, message):
    code, _, err = call(monkeypatch, capsys, "--generate", *arguments)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err
