"""Writing: against a loop without a cache, what is learned from a prompt, sampling, answers, completion."""

import json
from contextlib import nullcontext
from functools import partial

import jax
import numpy as np
import pytest
import tokenizers
from conftest import CHUNK, CHUNKS, LIGHT, LLAMA, MODEL, NEOX, Tiny, learn, make, make_windows, run_episode
from tokenizers import models, pre_tokenizers

import data
import eval as evaluation
import model as lm
import rl

WORDS = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w1"))
WORDS.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
ids = lambda text: WORDS.encode(text).ids
spell = lambda tokens: " ".join(f"w{i}" for i in tokens)
words = lambda seed, count: spell(np.random.RandomState(seed).randint(2, 60, count))
SGD = lm.Fast((2, 3), 3, optimizer="sgd")  # compiles faster
LORA, LINEAR = SGD._replace(kind="lora"), SGD._replace(kind="linear", objective="reconstruction")
CASES = [(MODEL, SGD._replace(momentum=0.5), "update_2"), (MODEL, LORA, "skip"), (LLAMA, LORA, "update_1")]
CASES += [(NEOX, LINEAR._replace(blocks=(1, 2)), "update_1"), (LLAMA, SGD, "base")]
END = 60  # the token that ends texts
same = partial(np.testing.assert_allclose, atol=1e-5)


def make_writer(tiny: Tiny) -> evaluation.Writer:
    """A writer with fast weights that add something from the start, and a policy that is far from uniform."""
    policy = rl.init_policy(jax.random.key(5))
    policy.net["actor"]["weight"] = 3 * jax.random.normal(jax.random.key(7), (64, 4))
    known = rl.Calibrated(policy, None, np.float32([np.linspace(-0.5, 0.5, 33)] * 3))
    smaller = jax.tree.map(lambda x: x - 2, tiny.weights.slow["log_step"])
    weights = tiny.weights._replace(slow=tiny.weights.slow | {"start": tiny.w, "log_step": smaller})
    env = rl.Env(np.float32(rl.NOMINAL), np.float32(2.5))
    return evaluation.Writer(tiny.spec, weights, env, WORDS, (END,), np.eye(61, 8, dtype=np.float32), known)


WRITER = make_writer(make(MODEL, LIGHT))


@partial(jax.jit, static_argnums=0)
def naive_logits(spec, weights, w, tokens_S, start):
    """Logits (C, V) of a window's rows from `start` on, all of it read anew."""
    x_SD, normed_SD = lm.run_prefix(spec, weights, tokens_S)
    return lm.predict(spec, weights, w, lm.Window(x_SD, tokens_S[:CHUNK], start, normed_SD)).logits_CV


def naive_w(writer, tokens, actions, context=0):
    """Fast weights after learning from complete chunks; of what `context` chunks taught half is kept."""
    document, slow = np.int32([*tokens, *[0] * 99][: CHUNKS * CHUNK + 1]), writer.weights.slow
    windows, state = make_windows(*writer[:2], document), lm.init_state(writer.spec.fast, slow)
    for t, action in enumerate(actions):
        state = learn(*writer[:2], state, jax.tree.map(lambda x: x[t], windows), np.int32(action))
        if t + 1 == context:
            slow = slow | {"start": jax.tree.map(lambda x, y: (x + y) / 2, slow["start"], state.w)}
            state = lm.init_state(writer.spec.fast, slow)
    return state.w


def naive_write(writer, w, tokens: list[int], new: int) -> list[int]:
    """Greedy: each token from all that the window has, which moves on when the room in it is used up."""
    tokens, written = list(tokens), []
    room = min(-(-new // lm.PIECE) * lm.PIECE, CHUNK)
    while len(written) < new and END not in written:
        if len(written) % room == 0:
            low = max(len(tokens) - (2 * CHUNK - room), 0)
        window = np.asarray((tokens[low:] + [0] * 2 * CHUNK)[: 2 * CHUNK], np.int32)
        last, start = len(tokens) - 1 - low, CHUNK * (len(tokens) - low > CHUNK)
        written.append(int(naive_logits(*writer[:2], w, window, start)[last - start].argmax()))
        tokens.append(written[-1])
    return written


@pytest.mark.parametrize("model, fast, action", CASES)
def test_writing_equals_a_loop_without_a_cache(model, fast, action):
    """Over several windows, from prompts with and without chunks to learn from, after half of a context."""
    writer, context = make_writer(make(model, fast))._replace(max_new_tokens=21), ids(words(4, 9))
    prompts = [words(1, 3), words(2, 21)]
    writer, chosen = evaluation.take_action(writer, action), evaluation.FIXED.get(action, 0)
    start = evaluation.begin(writer, context)
    for prompt, (row,) in zip(prompts, evaluation.write(writer, start, prompts), strict=True):
        tokens = [END, *context, *ids(prompt)]
        learned = (chosen,) * ((len(tokens) - 1) // CHUNK if chosen else 0)
        w = naive_w(writer, tokens, learned, context=1)
        jax.tree.map(same, row.memory.state.w, w)
        expected = naive_write(writer, w, tokens, 21)
        assert (row.tokens[row.given :], row.actions) == (expected, learned)
        assert row.text.split() == spell(x for x in expected if x != END).split()


def test_the_policy_decides_as_in_an_episode():
    tokens, writer = [END, *ids(words(7, CHUNKS * CHUNK))], evaluation.take_action(WRITER, "policy")
    row = evaluation.begin(writer)
    found, tokens = evaluation.learn_from(writer, row, tokens[1:]), np.int32(tokens)
    env, windows = rl.Env(WRITER.env.costs_A, np.float32(2.5 * CHUNKS)), make_windows(*WRITER[:2], tokens)
    document = rl.Document(windows, rl.text_features(tokens, CHUNK, WRITER.classes))
    rule = rl.calibrated_rule(WRITER.known, "policy", env, CHUNKS)
    steps = run_episode(*WRITER[:2], env, document, rule, jax.random.key(0))
    assert found.actions == tuple(steps.action.tolist()) and len(set(found.actions)) > 1
    jax.tree.map(same, found.memory.state.w, naive_w(WRITER, tokens, found.actions))
    for known, action in ((WRITER.known, "update_3"), (None, "policy")):
        with pytest.raises(data.UserError, match="--action"):
            evaluation.take_action(WRITER._replace(known=known), action)


def test_what_is_drawn_depends_on_prompt_and_sample_alone(monkeypatch):
    writer = evaluation.take_action(WRITER, "update_1")._replace(temperature=1.0, max_new_tokens=12)
    start, prompts = evaluation.begin(writer), [words(2, 10), words(1, 3), words(3, 10)]

    def draw(prompts, samples, **other):
        found = evaluation.write(writer._replace(samples=samples, **other), start, prompts)
        return [[row.text for row in written] for written in found]

    three, several = draw(prompts, 1), draw(prompts[:1], 3)
    assert several[0][:1] == three[0] and len({*several[0], *three[1], *three[2]}) == 5
    assert draw(prompts[:1], 3, seed=4) != several
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 1)
    assert draw(prompts, 1) == three and draw(prompts[:1], 3) == several


def test_a_text_ends_where_it_is_told_to():
    writer, shown = WRITER._replace(max_new_tokens=20), []
    start, prompts, show = evaluation.begin(writer), [words(2, 10)], lambda rows: shown.append(rows[0].text)
    write = lambda **options: next(evaluation.write(writer._replace(**options), start, prompts, show))[0]
    row = write()
    whole, parts, new = row.text, row.text.split(), row.tokens[row.given :]
    assert len(parts) == 20 and shown and all(whole.startswith(text) for text in shown)
    stops = f"{parts[7]} ", f"{parts[4]} {parts[5]}"
    assert write(stop=stops).text == whole[: min(map(whole.find, stops))]
    row = write(ends=(END, new[6]))
    assert row.tokens[row.given :] == new[: new.index(new[6]) + 1]
    assert row.text.split() == parts[: new.index(new[6])] and [*evaluation.write(writer, start, [])] == []


def test_completion_goes_on_where_it_was_and_pairs_actions(monkeypatch, tmp_path):
    """Each function of a single repository counts, several repositories count once each."""
    calls, path, context = [], tmp_path / "answers.jsonl", ids(words(3, 2 * CHUNK))
    functions = lambda repo: [data.Problem(repo + x, x, (), "\n w9 w8\nw7", "", "") for x in ("w1", "w2")]
    tasks = {repo: (context, functions(repo)) for repo in "rs"}

    def complete(writer, start, prompts):
        calls.append((writer.action, start.actions))
        exact = lambda prompt: writer.action == "update_1" or prompt == "w2"
        return [
            [start._replace(text="w9  w8 \nw1" if exact(prompt) else "\n w9 w8 w7")] for prompt in prompts
        ]

    monkeypatch.setattr(evaluation, "write", complete)
    run = lambda tasks: evaluation.run_completion(WRITER, tasks, ("skip", "update_1"), tmp_path)
    table, lines = run(tasks), path.read_bytes()
    assert calls == [("skip", ()), ("update_1", (1, 1))] * 2
    exact = json.loads((tmp_path / "benchmark.json").read_text())["update_1"]["exact"]
    assert (exact["units"], exact["mean"], exact["change"]["difference"]) == (2, 1, 0.5)
    path.write_bytes(lines[:-9])  # the last line was cut off
    assert run(tasks) == table and len(calls) == 5 and path.read_bytes() == lines
    assert "| functions |" in run({"r": tasks["r"]})


def test_answers_that_are_there_are_not_made_again(monkeypatch, tmp_path):
    problems = [data.Problem(f"MBPP/{i}", words(i, 3), (" w9 ",), f"w{i}", "", "") for i in range(3)]
    path, asked, write = tmp_path / "a.jsonl", [], evaluation.write
    writer = WRITER._replace(samples=2, temperature=1.0, max_new_tokens=3)
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(evaluation, "write", lambda *args: asked.extend(args[2]) or write(*args))
    evaluation.write_answers(writer, problems[:2], ["skip"], [], path)
    evaluation.write_answers(writer, problems, ["skip", "base"], [], path)
    rows = data.read_lines(path)
    assert [row["task_id"] for row in rows] == [p.task_id for p in problems] * 2 and len(asked) == 6
    own = writer._replace(stop=(" w9 ",))
    (written,) = write(own, evaluation.begin(own), [problems[2].prompt])
    assert rows[2] == {"task_id": "MBPP/2", "action": "skip", "completions": [row.text for row in written]}


def test_given_answers_are_taken_once(tmp_path):
    problems, given = [data.Problem("MBPP/1", *["", (), "reference", "", ""])], tmp_path / "given"
    two = '{"task_id": 1, "completion": "a"}\n\n{"task_id": "MBPP/1", "completion": "b"}'
    for text, message in (two, ""), ("", "no answers in it"), ("[]", "not lines of"), (two, ""):
        given.write_text(text)
        with pytest.raises(data.UserError, match=message) if message else nullcontext():
            data.copy_solutions(problems, str(given), tmp_path / "a.jsonl")
        assert [row["completions"] for row in data.read_lines(tmp_path / "a.jsonl")] == [["a", "b"]]
    data.copy_solutions(problems, "reference", tmp_path / "a.jsonl")
    assert [row["completions"] for row in data.read_lines(tmp_path / "a.jsonl")] == [["reference"]]
