"""Reading documents with every method, statistics against loops, the verdict, the report, compared runs."""

import itertools
import json
from functools import partial

import jax
import numpy as np
import pytest
import scipy.stats
from conftest import CHUNK, CHUNKS, LIGHT, MODEL, build, document_loss, make, make_windows, run_episode, write

import data
import eval as evaluation
import model as lm
import rl

COSTS, FLOPS = np.asarray(rl.NOMINAL), np.asarray([1.0, 1.5, 2.0, 4.0])

# --- 1. Reading -------------------------------------------------------------------------------------
BUDGET, FRONTIER = 9.0, (7.0, 18.0)
ENV = rl.Env(np.float32(COSTS), np.float32(BUDGET))


def excerpt(seed: int, repo: str) -> data.Excerpt:
    """A document that is easy to learn from: the same few tokens again and again."""
    tokens = np.random.RandomState(seed).randint(0, 6, CHUNKS * CHUNK + 1).astype(np.int32)
    return data.Excerpt(repo, tokens, rl.text_features(tokens, CHUNK, np.eye(MODEL.vocab, 8)))


TEXTS = [excerpt(5 + i, repo) for i, repo in enumerate("aab")]
VALID = [excerpt(50 + i, "valid") for i in range(2)]
TINY = make(MODEL, LIGHT)
SMALLER = {"log_step": jax.tree.map(lambda x: x - 2, TINY.weights.slow["log_step"])}  # so that steps help
WEIGHTS = TINY.weights._replace(slow=TINY.weights.slow | SMALLER)


def episode(text: data.Excerpt, rule: rl.Rule, budget=BUDGET) -> rl.Step:
    """One document, read with `rl.episode` itself."""
    rule = rule._replace(plan_T=np.resize(rule.plan_T, CHUNKS))
    document = rl.Document(make_windows(TINY.spec, WEIGHTS, text.tokens), text.text_TU)
    args = ENV._replace(budget=np.float32(budget)), document, rule, jax.random.key(0)
    return run_episode(TINY.spec, WEIGHTS, *args, credit=1, probe=True)


follow = lambda plan_T: rl.make_rule(rl.follow, rl.init_policy(jax.random.key(0)), plan_T=plan_T, hard=False)
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module", params=[1, 2])
def known_and_found(request) -> tuple[rl.Calibrated, evaluation.Evaluation]:
    """A random policy, calibrated on documents that are read as an episode reads them, one after the other or
    two side by side; what was found."""
    spec = TINY.spec._replace(together=request.param)
    policy = rl.init_policy(jax.random.key(0))
    policy.net["actor"]["weight"] = 100 * policy.net["actor"]["weight"]
    steps = evaluation.read_validation(spec, WEIGHTS, ENV, policy, VALID)
    for n, text in enumerate(VALID):
        alone = episode(text, follow([1, 0, 1, 0, 1]))
        for name in ("action", "loss", "probed", "features_U"):
            close(getattr(steps, name)[n], getattr(alone, name), err_msg=name)
    known = rl.calibrate(policy, steps)
    return known, evaluation.evaluate(spec, WEIGHTS, ENV, TEXTS, known, FRONTIER, 3)


def test_every_method_reads_as_an_episode_with_its_rule(known_and_found):
    """The oracle follows what updates gave, unless a blind schedule did better."""
    known, found = known_and_found
    assert found.reads.keys() == evaluation.METHODS.keys() - {"ahead_threshold"}
    gates, pairs = [name for name in rl.GATES if name != "ahead_threshold"], []
    for n, text in enumerate(TEXTS):
        plans = evaluation.FIXED | rl.plan_schedules(COSTS, BUDGET, CHUNKS, (3, n))
        rules = {name: follow(plan) for name, plan in plans.items()}
        rules |= {name: rl.calibrated_rule(known, name, ENV, CHUNKS) for name in gates}
        pairs += [(found.reads[name][n], n, episode(text, rule)) for name, rule in rules.items()]
        for budget in (BUDGET, *FRONTIER):
            read, at = found.frontier[budget][n], ENV._replace(budget=np.float32(budget))
            pairs.append((read, n, episode(text, rl.calibrated_rule(known, "policy", at, CHUNKS), budget)))
            assert COSTS[read.actions_T].sum() <= budget
        worth_T = np.asarray(episode(text, follow([1])).credit_T.sum(0))
        own = episode(text, follow(rl.plan_oracle(COSTS, BUDGET, worth_T))).loss.mean()
        blind = [found.reads[name][n].losses_T.mean() for name in evaluation.BLIND]
        close(found.reads["oracle"][n].losses_T.mean(), min([float(own), *blind]))
    for read, n, steps in pairs:
        assert (read.repo, read.dropped) == (TEXTS[n].repo, 0) and read.seconds > 0
        np.testing.assert_array_equal(read.actions_T, steps.action)
        close(read.losses_T, steps.loss)
    assert found.reads["policy"] == found.frontier[BUDGET]
    for name, reads in found.reads.items():
        assert len(reads) == len(TEXTS)
        assert name in evaluation.FIXED or all(COSTS[r.actions_T].sum() <= BUDGET for r in reads), name


@pytest.mark.parametrize("kind", ["swiglu", "linear reconstruction", "lora"])
def test_the_base_model_reads_without_fast_weights(kind):
    tiny, forward = build(kind), jax.jit(lm.forward, static_argnums=0)
    slow = jax.tree.map(lambda x: x + np.float32(0.1), tiny.weights.slow)
    weights = evaluation.base_weights(tiny.weights._replace(slow=slow))
    windows = make_windows(tiny.spec, weights, tiny.tokens)
    _, losses_T = document_loss(tiny.spec, weights, windows, np.zeros(CHUNKS, np.int32))
    for t in range(CHUNKS):
        low, high = max(t - 1, 0) * CHUNK, (t + 1) * CHUNK
        logits = forward(MODEL, tiny.params, tiny.tokens[low:high])[-CHUNK:]
        of_targets = logits[np.arange(CHUNK), tiny.tokens[high - CHUNK + 1 : high + 1]]
        close(losses_T[t], (jax.nn.logsumexp(logits, -1) - of_targets).mean())


# --- 2. Statistics ----------------------------------------------------------------------------------
def read_of(repo, loss, action=0, seconds=0.5) -> evaluation.Read:
    losses_T = np.asarray(loss, float)
    return evaluation.Read(repo, losses_T, np.broadcast_to(action, losses_T.shape), seconds)


def test_repositories_count_once_however_many_documents_they_have():
    reads = [read_of("b", [1, 3]), read_of("a", [5, 5]), read_of("a", [8, 8]), read_of("a", [2, 3], 1, 2.5)]
    close(evaluation.per_repository(reads, lambda read: read.losses_T.mean()), [(5 + 8 + 2.5) / 3, 2.0])
    found = evaluation.summarise(reads, np.asarray([6.0, 3.0]), FLOPS)
    expected = {"loss": 43 / 12, "gain": 11 / 12, "nominal": 4 / 3, "flops": 13 / 12, "updates": 1 / 6}
    expected |= {"seconds": (3.5 / 2 / 3 + 0.25) / 2, "gain_ci": evaluation.interval(np.asarray([5 / 6, 1]))}
    assert {name: pytest.approx(x) for name, x in expected.items()} == found


def test_interval_is_close_to_students_for_normal_data():
    x = np.random.default_rng(0).normal(1.0, 2.0, 200)
    low, high = scipy.stats.t.interval(0.95, 199, x.mean(), scipy.stats.sem(x))
    assert evaluation.interval(x) == pytest.approx([low, high], abs=0.05)
    assert evaluation.interval(np.ones(5)) == evaluation.interval(np.ones(1)) == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(4))
def test_paired_statistics_equal_loops(seed):
    """Wilcoxon's p is the share of all choices of signs whose rank sum is as far from zero."""
    ours, theirs = np.random.RandomState(seed).normal([[1], [0]], 1, (2, 7))
    found, differences = evaluation.compare_pairs(ours, theirs), [a - b for a, b in zip(ours, theirs)]
    ranks = [1 + sum(abs(y) < abs(x) for y in differences) for x in differences]
    sums = [abs(np.dot(ranks, signs)) for signs in itertools.product([-1, 1], repeat=7)]
    p = np.mean(np.asarray(sums) >= abs(np.dot(ranks, np.sign(differences))))
    ci = evaluation.interval(ours - theirs)
    assert found == {"difference": pytest.approx(sum(differences) / 7), "p": pytest.approx(p), "ci": ci}
    assert evaluation.compare_pairs(ours, ours) == {"difference": 0, "p": 1, "ci": [0, 0]}


def hand_made(full_loss) -> evaluation.Evaluation:
    """SKIP loses 4 everywhere, the policy 3 with half of UPDATE_1's updates and 2 with all of them."""
    of = lambda i, loss, actions, seconds=0.75: read_of(f"repo{i}", [loss] * 2, np.asarray(actions), seconds)
    four = lambda *args: [of(i, *args) for i in range(4)]
    reads = {"base": four(4.5, [0, 0]), "skip": four(4.0, [0, 0], 0.5)}
    reads |= {f"update_{n}": four(full_loss, [a, a], n) for a, n in ((1, 1), (2, 2), (3, 4))}
    reads |= dict.fromkeys((*evaluation.BLIND, *rl.GATES), four(3.5, [1, 0]))
    reads |= {"policy": four(3.0, [0, 1]), "oracle": four(2.9, [1, 0])}
    return evaluation.Evaluation(reads, {6.0: four(2.0, [1, 1], 1.5), 4.0: four(3.0, [0, 1])})


def test_all_figures_are_numbers_that_json_can_hold():
    figures = evaluation.analyse(hand_made(3.0), FLOPS)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    for name in (*evaluation.BLIND, *rl.GATES):
        assert figures["comparisons"][name]["difference"] == pytest.approx(0.5)
    assert figures["methods"]["policy"]["oracle_recovery"] == pytest.approx(1 / 1.1)
    rows = [[x[name] for name in ("budget", "loss", "gain", "nominal", "flops")] for x in figures["frontier"]]
    close(rows, [[2.0, 3.0, 1.0, 2.0, 1.25], [3.0, 2.0, 2.0, 3.0, 1.5]])
    assert figures["names"] == [f"repo{i}" for i in range(4)] and figures["losses"]["base"] == [4.5] * 4


# --- 3. Report --------------------------------------------------------------------------------------
def results_of(found: evaluation.Evaluation) -> dict:
    """results.json of hand-made reads."""
    results = {"model": "tiny", "data": "stdlib", "documents": 4, "chunks": 2, "unit": "repositories"}
    results |= {"unseen": "held out", "budget": 4.0, "currency": "nominal", "facts": ["a fact"]}
    return results | {"looks_ahead": False} | evaluation.analyse(found, FLOPS)


def test_verdict_says_it_whichever_way_it_went():
    results = results_of(hand_made(3.0))
    few = evaluation.verdict(results)
    for part in ("4 repositories held out", "25.0% (4.000 to 3.000)", "100% of that", "67% of its nominal"):
        assert part in few
    assert "better than" not in few and few.endswith("; 4 are too few to rank methods by.")
    assert "policy, which looks ahead in the text," in evaluation.verdict(results | {"looks_ahead": True})
    cis = {"random": [0.1, 0.3], "every_n": [-0.3, -0.1], "front_loaded": [-0.1, 0.3], "oracle": [0.1, 0.5]}
    pairs = {name: {"difference": np.mean(ci), "ci": ci} for name, ci in cis.items()}
    said = evaluation.verdict(results | {"names": list("abcdefghij"), "comparisons": pairs})
    random, every_n, first, oracle = (f"'{evaluation.METHODS[name].label}'" for name in cis)
    better = f"better than {random} (+0.200 [0.1000, 0.3000]), {oracle} (+0.300 [0.1000, 0.5000])"
    worse = f"worse than {every_n} (-0.200 [-0.3000, -0.1000])"
    assert said.endswith(f"; at the same budget it was {better}; {worse}; not distinguishable from {first}.")
    results["methods"]["update_1"]["gain_ci"] = [-0.1, 0.3]
    assert "did not reliably beat never learning" in evaluation.verdict(results)


def test_the_report_and_its_plots_are_written(tmp_path):
    found = hand_made(3.0)
    results = results_of(found)
    verdict = evaluation.write_report(tmp_path, results, found.reads)
    text = (tmp_path / "report.md").read_text()
    assert verdict == evaluation.verdict(results) and verdict in text and "- a fact" in text
    assert not any(word in text for word in ("nan", "None", "inf]", " inf "))
    assert all(f"| {evaluation.METHODS[name].label} |" in text for name in found.reads)
    for name in ("pareto.png", "document.png"):
        assert f"({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# --- 4. Runs compared -------------------------------------------------------------------------------
def test_rows_are_paired_with_the_first_over_the_units_that_both_have():
    first = {"loss": {"c": 6.0, "a": 1.0, "b": 2.0}, "exact": {"a": 0.0, "b": 1.0}}
    second = {"loss": {"a": 0.5, "d": 9.0, "b": 1.75}, "exact": {"d": 1.0}}
    summary, table = evaluation.paired_table({"skip": first, "update_1": second}, "repositories")
    loss, exact = summary["update_1"]["loss"], summary["update_1"]["exact"]
    ci = evaluation.interval(np.asarray([6.0, 1, 2]))
    assert summary["skip"]["loss"] == {"mean": 3.0, "ci": ci, "units": 3}
    assert (loss["mean"], loss["units"]) == (3.75, 3) and "change" not in exact
    assert loss["change"] == evaluation.compare_pairs(np.asarray([0.5, 1.75]), np.asarray([1.0, 2.0]))
    assert "\n| update_1 | 3 | 3.7500 [" in table and "(-0.3750 [-0.5000, -0.2500], p 0.5)" in table


def test_runs_are_compared_over_the_repositories_that_they_share(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, names, gain in zip(folders, ("abc", "bcd"), (0.25, 0.5)):
        loss = {"skip": np.asarray([2.0, 3.0, 4.0])}
        loss |= dict.fromkeys(("update_1", "policy", "random", "oracle"), loss["skip"] - gain)
        found = {"names": list(names), "losses": {name: x.tolist() for name, x in loss.items()}}
        write(folder, {"results.json": json.dumps(found)})
    lines = evaluation.compare_runs(folders).splitlines()
    assert len(lines) == 4 and "policy's gain [95 %]" in lines[0]
    assert "(-1.0000 [-1.0000, -1.0000], p 0.5)" in lines[3]  # SKIP's loss, of b and c
    assert lines[3].count("0.5000 [0.5000, 0.5000] (+0.2500 [0.2500, 0.2500], p 0.5)") == 4
    (folders[1] / "results.json").write_text("[]")
    for folder in (folders[1], tmp_path / "three"):
        with pytest.raises(data.UserError, match=rf"^--runs {folder}: no finished run .* results.json$"):
            evaluation.compare_runs([folders[0], folder])
