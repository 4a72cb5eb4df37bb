"""Reading documents with every method, statistics against loops, the verdict, the report, compared runs."""

import itertools
import json
from functools import partial

import jax
import numpy as np
import pytest
import scipy.stats
from conftest import CHUNK, CHUNKS, LIGHT, MODEL, make, make_windows, run_episode

import data
import eval as evaluation
import model as lm
import rl

COSTS, FLOPS = np.asarray(rl.NOMINAL), np.asarray([1.0, 1.5, 2.0, 4.0])
quiet = lambda items, name: items

# --- 1. Reading -------------------------------------------------------------------------------------

BUDGET, FRONTIER = 9.0, (7.0, 18.0)
ENV = rl.Env(np.float32(COSTS), np.float32(BUDGET))


def excerpt(seed: int, repo: str) -> data.Excerpt:
    """A document that is easy to learn from: the same few tokens again and again."""
    tokens = np.random.RandomState(seed).randint(0, 6, CHUNKS * CHUNK + 1).astype(np.int32)
    return data.Excerpt(repo, tokens, None, rl.text_features(tokens, CHUNK, np.eye(MODEL.vocab, 8)))


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


@pytest.fixture(scope="module")
def policies_and_found() -> tuple[list[rl.Calibrated], evaluation.Evaluation]:
    """Two random policies, calibrated on documents that are read as an episode reads them; what was found."""
    policies = [rl.init_policy(jax.random.key(seed)) for seed in range(2)]
    for i, policy in enumerate(policies):
        policy.net["actor"]["weight"] = 100 * policy.net["actor"]["weight"]
        steps = evaluation.read_validation(TINY.spec, WEIGHTS, ENV, policy, VALID, quiet)
        policies[i] = rl.calibrate(policy, steps)
        for n, text in enumerate(VALID):
            alone = episode(text, follow([1, 0, 1, 0, 1]))
            for name in ("action", "loss", "probed", "features_U"):
                close(getattr(steps, name)[n], getattr(alone, name), err_msg=name)
    found = evaluation.evaluate(TINY.spec, WEIGHTS, ENV, TEXTS, policies, FRONTIER, 3, quiet)
    return policies, found


def test_every_method_reads_as_an_episode_with_its_rule(policies_and_found):
    """The oracle follows what updates gave, unless a blind schedule did better."""
    policies, found = policies_and_found
    assert found.reads.keys() == evaluation.METHODS.keys() - {"ahead_threshold"}
    gates, pairs = [name for name in rl.GATES if name != "ahead_threshold"], []
    for n, text in enumerate(TEXTS):
        plans = evaluation.FIXED | rl.plan_schedules(COSTS, BUDGET, CHUNKS, (3, n))
        rules = {name: follow(plan) for name, plan in plans.items()}
        rules |= {name: rl.calibrated_rule(policies[0], name, ENV, CHUNKS) for name in gates}
        pairs += [(found.reads[name][n], n, episode(text, rule)) for name, rule in rules.items()]
        for budget, seed in itertools.product((BUDGET, *FRONTIER), range(2)):
            at = ENV._replace(budget=np.float32(budget))
            (read,) = [r for r in found.frontier[budget] if (r.document, r.seed) == (n, seed)]
            rule = rl.calibrated_rule(policies[seed], "policy", at, CHUNKS)
            pairs.append((read, n, episode(text, rule, budget)))
            assert COSTS[read.actions_T].sum() <= budget
        close(found.worth[n], episode(text, follow([1])).credit_T.sum(0))
        own = episode(text, follow(rl.plan_oracle(COSTS, BUDGET, found.worth[n]))).loss.mean()
        blind = [found.reads[name][n].losses_T.mean() for name in evaluation.BLIND]
        close(found.reads["oracle"][n].losses_T.mean(), min([float(own), *blind]))
    for read, n, steps in pairs:
        assert (read.document, read.repo, read.dropped) == (n, TEXTS[n].repo, 0) and read.seconds > 0
        np.testing.assert_array_equal(read.actions_T, steps.action)
        close(read.losses_T, steps.loss)
    assert found.reads["policy"] == found.frontier[BUDGET]
    for name, reads in found.reads.items():
        assert len(reads) == len(TEXTS) * (2 if name == "policy" else 1)
        assert name in evaluation.FIXED or all(COSTS[r.actions_T].sum() <= BUDGET for r in reads), name


def test_the_base_model_reads_without_fast_weights(policies_and_found):
    forward, reads = jax.jit(lm.forward, static_argnums=0), policies_and_found[1].reads["base"]
    for (read, text), t in itertools.product(zip(reads, TEXTS, strict=True), range(CHUNKS)):
        low, high = max(t - 1, 0) * CHUNK, (t + 1) * CHUNK
        logits = forward(MODEL, TINY.params, text.tokens[low:high])[-CHUNK:]
        of_targets = logits[np.arange(CHUNK), text.tokens[high - CHUNK + 1 : high + 1]]
        close(read.losses_T[t], (jax.nn.logsumexp(logits, -1) - of_targets).mean())
        assert read.actions_T[t] == 0


# --- 2. Statistics ----------------------------------------------------------------------------------
def read_of(repo, loss, action=0, document=0, seed=0, seconds=0.5) -> evaluation.Read:
    losses_T = np.asarray(loss, float)
    return evaluation.Read(document, repo, losses_T, np.broadcast_to(action, losses_T.shape), seconds, seed)


def test_repositories_count_once_however_many_documents_and_seeds_they_have():
    reads = [read_of("b", [1, 3], document=0), read_of("a", [5, 5], document=1)]
    reads += [read_of("a", [8, 8], document=1, seed=1), read_of("a", [2, 3], 1, document=2, seconds=2.5)]
    close(evaluation.losses(reads), [(5 + 8 + 2.5) / 3, 2.0])
    found = [evaluation.costs(FLOPS, reads, currency) for currency in ("nominal", "flops", "seconds")]
    close(found, [[5 / 3, 1], [3.5 / 3, 1], [3.5 / 2 / 3, 0.25]])


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
    mean = sum(differences) / 7
    ranks = [1 + sum(abs(y) < abs(x) for y in differences) for x in differences]
    sums = [abs(np.dot(ranks, signs)) for signs in itertools.product([-1, 1], repeat=7)]
    p = np.mean(np.asarray(sums) >= abs(np.dot(ranks, np.sign(differences))))
    expected = {"difference": mean, "better_on": sum(x > 0 for x in differences) / 7, "wilcoxon_p": p}
    expected |= {"cohens_d": mean / (sum((x - mean) ** 2 for x in differences) / 6) ** 0.5}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["ci"] == evaluation.interval(ours - theirs)
    same = evaluation.compare_pairs(ours, ours)
    assert [same[name] for name in expected] == [0, 0, 1, 0] and same["ci"] == [0, 0]


def test_summary_of_hand_made_losses():
    """Two documents of a, one of b; the policy learns from the better chunk of one, the worse of another."""
    some = lambda losses, *actions: [
        read_of("aab"[i], loss, np.asarray(actions[i]), i) for i, loss in enumerate(losses)
    ]
    skip, first = [[4, 4], [4, 2], [2, 2]], [1, 0]
    reads = {"skip": some(skip, 0, 0, 0), "base": some(np.asarray(skip) + 1, 0, 0, 0)}
    reads |= {"oracle": some([[3, 3], [3, 1], [1, 1]], first, first, first)}
    reads |= {"policy": some([[3, 3], [4, 2], [2, 2]], [1, 1], first, [0, 1])}
    worth = [np.asarray(x) for x in ([0.5, 0.1], [0.5, 0.0], [0.2, 0.1])]
    methods = evaluation.summarise(evaluation.Evaluation(reads, {}, worth), FLOPS)
    policy, expected = methods["policy"], {"loss": 2.5, "gain": 0.25, "gain_over_base": 1.25}
    expected |= {"oracle_recovery": 0.25, "update_rate": (0.75 + 0.5) / 2, "seconds": 0.25}
    expected |= {"cost_nominal": (2.5 + 2) / 2, "cost_flops": (1.375 + 1.25) / 2, "rank_correlation": 0.0}
    assert {name: policy[name] for name in expected} == pytest.approx(expected)
    assert methods["oracle"]["rank_correlation"] == pytest.approx(1)
    assert methods["skip"]["rank_correlation"] is None and methods["skip"]["gain_ci"] == [0.0, 0.0]


def test_cost_at_is_where_the_frontier_first_reaches_a_loss():
    """The third point is worse than the second, and costs more: nothing there is worth its cost."""
    points = np.asarray([[4.0, 3.0, 3.5, 2.0], [1.0, 2.0, 4.0, 5.0]])
    found = [evaluation.cost_at(*points, target) for target in (5.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.9)]
    assert found == pytest.approx([1.0, 1.0, 1.5, 2.0, 4.5, 5.0, np.inf])


def hand_made(full_loss) -> evaluation.Evaluation:
    """SKIP loses 4 everywhere, the policy 3 with half of UPDATE_1's updates and 2 with all of them."""
    four = lambda loss, actions, seconds=0.75: [
        read_of(f"repo{i}", [loss, loss], np.asarray(actions), i, 0, seconds) for i in range(4)
    ]
    reads = {"base": four(4.5, [0, 0]), "skip": four(4.0, [0, 0], 0.5)}
    reads |= {f"update_{n}": four(full_loss, [a, a], n) for a, n in ((1, 1), (2, 2), (3, 4))}
    reads |= dict.fromkeys((*evaluation.BLIND, *rl.GATES), four(3.5, [1, 0]))
    reads |= {"policy": four(3.0, [0, 1]), "oracle": four(2.9, [1, 0])}
    frontier = {6.0: four(2.0, [1, 1], 1.5), 4.0: four(3.0, [0, 1])}
    return evaluation.Evaluation(reads, frontier, [np.asarray([0.1, 0.2])] * 4)


def test_savings_of_a_hand_made_frontier():
    saved = evaluation.savings(hand_made(3.0), FLOPS, resamples=20)
    for name, nominal, flops in (("update_1", 3, 1.5), ("update_2", 6, 2), ("update_4", 12, 4)):
        for currency, ours, theirs in (("nominal", 2, nominal), ("flops", 1.25, flops)):
            row, total, learning = saved[name][currency], 1 - ours / theirs, 1 - (ours - 1) / (theirs - 1)
            found = [row["total"], *row["total_ci"], row["learning"], *row["learning_ci"]]
            assert found == pytest.approx([total] * 3 + [learning] * 3), (name, currency)
    saved = evaluation.savings(hand_made(1.9), FLOPS, resamples=20)  # which it does not reach
    assert list(saved["update_1"]["nominal"].values()) == [None, [None, None]] * 2
    assert evaluation.savings_table(saved).count("not reached") == 2 * 9
    # Repositories are resampled: on three of four the policy reaches UPDATE_1's loss at half its cost above
    # SKIP, on one with all; mean losses are 4, 3.25 and 2 at costs 1, 2 and 3.
    found = hand_made(3.0)
    found.frontier[4.0][0] = read_of("repo0", [4, 4], np.asarray([0, 1]), 0)
    row = evaluation.savings(found, FLOPS)["update_1"]["nominal"]
    assert row["learning"] == pytest.approx(1 - 1.2 / 2)
    assert row["learning_ci"][0] < row["learning"] < row["learning_ci"][1] == pytest.approx(0.5)


def test_all_figures_are_numbers_that_json_can_hold():
    found = hand_made(3.0)
    found.reads["policy"] += [r._replace(losses_T=r.losses_T - 0.5, seed=1) for r in found.reads["policy"]]
    figures = evaluation.analyse(found, FLOPS)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["policy_gain_by_seed"] == pytest.approx([1.0, 1.5])
    for name in (*evaluation.BLIND, *rl.GATES):
        assert figures["comparisons"][name]["difference"] == pytest.approx(0.75)
    rows = [list(row.values()) for row in figures["frontier"]]  # budget, loss, nominal, FLOPs, seconds
    close(rows, [[2.0, 3.0, 2.0, 1.25, 0.375], [3.0, 2.0, 3.0, 1.5, 0.75]])


def test_gains_by_file_are_means_over_tokens_after_the_first_chunk():
    """Chunks of two tokens; of v and w less than a chunk is left, and of two seeds tokens count once."""
    texts = [data.Excerpt("own 1/1", np.zeros(9, np.int32), np.asarray([*"wwxwyyvx"], object))]
    one = lambda *loss, seed=0: read_of("own 1/1", loss, seed=seed)
    reads = {"skip": [one(9, 4, 5, 6)], "update_1": [one(0, 3, 6, 6)]}
    reads |= {"policy": [one(0, 3, 3, 6), one(0, 4, 2, 5, seed=1)]}
    rows = [("y", 2, 5.0, -1.0, 2.5), ("x", 2, 5.0, 0.5, 0.5)]
    expected = [dict(zip(("file", "tokens", "skip", "update_1", "policy"), row)) for row in rows]
    assert evaluation.gains_by_file(texts, reads, 2) == expected


# --- 3. Report --------------------------------------------------------------------------------------
def results_of(found: evaluation.Evaluation) -> dict:
    """results.json of hand-made reads."""
    results = {"model": "tiny", "data": "stdlib", "documents": 4, "repositories": 12, "unit": "repositories"}
    results |= {"unseen": "held out", "chunks_per_document": 2, "budget": 4.0, "budget_per_chunk": 2.0}
    results |= {"cost_model": "nominal", "seeds": 1, "names": [f"repo{i}" for i in range(4)]}
    return results | {"looks_ahead": False, "facts": ["a fact"]} | evaluation.analyse(found, FLOPS)


def test_verdict_says_it_whichever_way_it_went():
    results = results_of(hand_made(3.0))
    sentence = evaluation.verdict(results)
    for part in ("12 repositories held out", "25.0% (4.000 to 3.000)", "100% of that", "67% of its nominal"):
        assert part in sentence
    assert sentence.endswith(f"; at the same budget it was {evaluation.rank_rivals(results['comparisons'])}.")
    assert "policy, which looks ahead in the text," in evaluation.verdict(results | {"looks_ahead": True})
    few = evaluation.verdict(results | {"repositories": 9})
    assert "better than" not in few and "9 are too few to rank methods by" in few
    results["methods"]["update_1"]["gain_ci"] = [-0.1, 0.3]
    assert "did not reliably beat never learning" in evaluation.verdict(results)
    cis = {"random": [0.1, 0.3], "every_n": [-0.3, -0.1], "front_loaded": [-0.1, 0.3], "oracle": [0.1, 0.5]}
    said = evaluation.rank_rivals({name: {"difference": np.mean(ci), "ci": ci} for name, ci in cis.items()})
    random, every_n, first, oracle = (f"'{evaluation.METHODS[name].label}'" for name in cis)
    better = f"better than {random} (+0.200 [0.1000, 0.3000]), {oracle} (+0.300 [0.1000, 0.5000])"
    worse = f"worse than {every_n} (-0.200 [-0.3000, -0.1000])"
    assert said == f"{better}; {worse}; not distinguishable from {first}"


def test_the_report_and_its_plots_are_written(tmp_path):
    found = hand_made(3.0)
    files = [{"file": "a|b`\n.py", "tokens": 9, "skip": 4.0, "update_1": 0.5, "policy": 1.0}]
    training = [{"step": i, "cost": 3.0, "limit": 2.0, "lambda": 0.1 * i} for i in range(3)]
    results = results_of(found) | {"by_file": files}
    verdict = evaluation.write_report(tmp_path, results, found.reads, training)
    text = (tmp_path / "report.md").read_text()
    assert verdict == evaluation.verdict(results) and verdict in text and "- a fact" in text
    assert not any(word in text for word in ("nan", "None", "inf]", " inf "))
    assert all(f"| {evaluation.METHODS[name].label} |" in text for name in found.reads)
    assert "| `a?b??.py` | 9 | 4.000 | +1.000 (+25.0%) | +0.500 (+12.5%) |" in text
    for name in ("pareto.png", "position.png", "timeline.png", "training.png"):
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
        found = {"names": list(names), "loss": {name: x.tolist() for name, x in loss.items()}}
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"per_repository": found}))
    lines = evaluation.compare_runs(folders).splitlines()
    assert len(lines) == 4 and "policy's gain [95 %]" in lines[0]
    assert "(-1.0000 [-1.0000, -1.0000], p 0.5)" in lines[3]  # SKIP's loss, of b and c
    assert lines[3].count("0.5000 [0.5000, 0.5000] (+0.2500 [0.2500, 0.2500], p 0.5)") == 4
    (folders[1] / "results.json").write_text("[]")
    for folder in (folders[1], tmp_path / "three"):
        with pytest.raises(data.UserError, match=rf"^--runs {folder}: no finished run .* results.json$"):
            evaluation.compare_runs([folders[0], folder])
