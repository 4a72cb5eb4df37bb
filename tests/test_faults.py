"""What can go wrong around the method: processes that die, disks that are full, numbers that are not finite, hostile
folders, two runs at once; and what a run must not write down."""

import ast
import contextlib
import dataclasses
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, SECRETS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ponder import call, losses_of, refused, results_of

import data
import eval as evaluation
import model as lm
import ponder
import rl


def same_learning(out: Path, finished: Path) -> None:
    """After --stage ttt alone."""
    assert (out / "ttt.safetensors").read_bytes() == (finished / "ttt.safetensors").read_bytes()
    assert ponder.read_metrics(out / "metrics.jsonl")[:4] == ponder.read_metrics(finished / "metrics.jsonl")[:4]
    assert not list(out.glob(".*")), "a temporary file was left"


@contextlib.contextmanager
def ordinary_user():
    """Root writes and reads everything, so that it has to stand back."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public():
    """A folder that every user reaches."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


# --- processes that die -------------------------------------------------------------------------

# Dies by SIGKILL in the middle of its n-th write.
DYING = """
import os, signal, sys
import model as lm
write, left = lm.write_atomic, int(sys.argv.pop(1))

def dying(path, content):
    global left
    left -= 1
    if not left:
        path.with_name(f".{path.name}.{os.getpid()}").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

lm.write_atomic = dying
import ponder
"""
SMALL = """
import data, ponder
data.packages_source, data.stdlib_source = lambda *_: data.synthetic_source(), lambda *_: iter(())
ponder.TINY, ponder.WINDOWS = {"vocab": 400, "positions": 16, "width": 16, "layers": 2, "heads": 2}, 8
"""


def start(program: str, *arguments: object) -> int:
    """The exit code of a program that ends with ponder.main()."""
    command = [sys.executable, "-c", f"{program}\nponder.main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def killed_at_write(number: int, *arguments: object, program: str = "") -> None:
    assert start(DYING + program, number, *arguments) == -signal.SIGKILL


def test_a_run_killed_while_writing_a_checkpoint_resumes_to_the_same_result(finished, arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    killed_at_write(4, *arguments, "--out", out)  # config.json, metrics.jsonl, ttt_state twice
    assert list(out.glob(".ttt_state*")) and not (out / "ttt.safetensors").exists()
    refused(call(monkeypatch, capsys, *arguments, "--out", out), "already holds a run", "--resume")
    assert call(monkeypatch, capsys, *arguments, "--out", out, "--resume", "--stage", "ttt")[0] == 0
    same_learning(out, finished)


@pytest.mark.slow
def test_pretraining_killed_in_every_write_ends_in_the_same_model(tmp_path):
    """In that of the tokenizer, tokens, figures, three checkpoints, the model's settings and its weights, each after
    what a start writes before: config.json, from the fourth on metrics.jsonl and one checkpoint more, if it gets there."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = ("--stage", "pretrain", "--dtype", "float32", "--pretrain-steps", 250, "--out")
    assert start(SMALL, *options, whole) == 0
    for i, number in enumerate((2, 3, 4, 3, 4, 4, 4, 4)):
        killed_at_write(number, *options, out, *["--resume"] * bool(i), program=SMALL)
    assert start(SMALL, *options, out, "--resume") == 0
    for name in ("model/model.safetensors", "model/config.json", "model/tokenizer.json", "metrics.jsonl", "pretrain.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def left_by(out: Path) -> tuple[dict[str, bytes], dict[str, list[float]]]:
    """What a run leaves but for plots and what has seconds in it; hidden files, as half-written ones are, too."""
    timed = ("results.json", "report.md", "reads.safetensors", "run.lock")
    files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file() and p.suffix != ".png" and p.name not in timed}
    return {name: p.read_bytes() for name, p in files.items()}, losses_of(out) if (out / "results.json").exists() else {}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "ttt", "policy", "eval"])
def test_twenty_kills_at_random_moments_of_a_stage_change_nothing(stage, finished, arguments, tmp_path):
    """Runs of a stage, each killed again and again, --resume after each, until twenty kills have hit them."""
    options = ["--pretrain-steps", "250", "--dtype", "float32"] if stage == "pretrain" else [*arguments]
    options += ["--weights", str(finished)] * (stage in ("policy", "eval"))
    program = SMALL if stage == "pretrain" else "import ponder"
    command = [sys.executable, "-c", f"{program}\nponder.main()", "--stage", stage, *options]
    assert start(program, *command[3:], "--out", tmp_path / "whole") == 0
    started, expected = time.monotonic(), left_by(tmp_path / "whole")
    assert start(program, *command[3:], "--out", tmp_path / "again") == 0  # with all compiled
    seconds, rng, kills, runs = time.monotonic() - started, random.Random(stage), 0, 0
    while kills < 20:
        out, runs, code = tmp_path / f"run{runs}", runs + 1, None
        while code != 0:
            resume = ["--resume"] * (out / "config.json").exists()
            process = subprocess.Popen([*command, "--out", str(out), *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.3, 1.0) * seconds if kills < 20 else None)
            if process.poll() is None:
                process.kill()
                kills += (out / "config.json").exists()
            error = process.communicate()[1]
            code = process.returncode
            assert code in (0, -signal.SIGKILL), error
        assert left_by(out) == expected


# --- disks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def little_room(disk: Path):
    """A small disk that is nearly full, until what is given is called; where mounting one takes root, no file may grow
    beyond what would fit on it."""
    room, (soft, hard) = 2**14, resource.getrlimit(resource.RLIMIT_FSIZE)
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode == 0
    try:
        if mounted:
            (disk / "filler").write_bytes(bytes(2**20 - room))
            yield (disk / "filler").unlink
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_clear_line_and_the_run_goes_on_later(finished, arguments, tmp_path, monkeypatch, capsys):
    with little_room(tmp_path / "disk") as make_room:
        out, ttt = tmp_path / "disk" / "run", ["--stage", "ttt"]
        refused(call(monkeypatch, capsys, *arguments, *ttt, "--out", out), "free some space", "--resume")
        make_room()
        assert call(monkeypatch, capsys, *arguments, *ttt, "--out", out, "--resume")[0] == 0
        same_learning(out, finished)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    ponder.save_state(tmp_path / "state.safetensors", {"a": np.zeros(3)})
    before = (tmp_path / "state.safetensors").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        ponder.save_state(tmp_path / "state.safetensors", {"a": np.ones(3)})
    assert "free some space" in ponder.explain(error.value)
    assert (tmp_path / "state.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_can_only_be_read_is_one_clear_line(public):
    cfg = ponder.resolve(ponder.Config(data="synthetic"))
    public.chmod(0o555)
    with ordinary_user(), pytest.raises(ponder.UserError, match=r"--out .*can't write there.*another folder"), ponder.claimed(cfg, public):
        pass


# --- two runs at once ---------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(finished, arguments, monkeypatch, capsys):
    again = [*arguments, "--out", finished, "--resume", "--stage", "eval"]
    before = (finished / "report.md").read_bytes()
    with open(finished / "run.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(call(monkeypatch, capsys, *again), "another process", "choose another --out")
    assert (finished / "report.md").read_bytes() == before


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, found = ponder.Config(), []
    ready = threading.Barrier(8)

    def start():
        out = ponder.choose_folder(cfg)
        ready.wait()
        found.append(ponder.make_folder(cfg, out))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [Path("runs", f"{i:03d}") for i in range(1, 9)] and all(out.is_dir() for out in found)


# --- numbers that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("fast", [lm.Fast((0,), 4), lm.Fast((0,), 4, optimizer="sgd", momentum=0.5)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_inner_step_that_is_not_finite_is_not_taken(fast, bad):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    weights, gradient = ({"a": normal(4, 3), "b": normal(1, 5)} for _ in range(2))
    slow = {"log_step": {name: np.zeros(7, np.float32) for name in weights}, "log_anneal": np.float32(0)}
    momentum = jax.tree.map(np.zeros_like, weights) if fast.momentum else ()
    state = lm.State(weights, momentum, np.float32(3))
    taken = lm.inner_step(fast, slow, state, gradient, 0, "float32")
    assert taken.steps == 4 and all(np.any(taken.weights[name] != weights[name]) for name in weights)
    gradient["b"][0, 2] = bad
    jax.tree.map(np.testing.assert_array_equal, lm.inner_step(fast, slow, state, gradient, 0, "float32"), state)


def test_a_document_whose_steps_are_not_finite_is_read_like_skip_and_they_are_counted(finished, arguments, tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights"
    weights.mkdir()
    for path in finished.glob("*.safetensors"):
        (weights / path.name).write_bytes(path.read_bytes())
    flat = lm.read_safetensors(weights / "ttt.safetensors")
    steps = {name: np.full_like(value, 100.0) if "log_step" in name else value for name, value in flat.items()}
    ponder.write_state(weights / "ttt.safetensors", unflatten(steps))
    out = tmp_path / "run"
    assert call(monkeypatch, capsys, *arguments, "--stage", "eval", "--weights", weights, "--out", out)[0] == 0
    losses = losses_of(out)
    assert losses["update_1"] == losses["update_4"] == losses["skip"]
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert results["pareto_area"] is None and "the area under" not in (out / "report.md").read_text()
    (line,) = (line for line in (out / "report.md").read_text().splitlines() if "dropped because not finite" in line)
    assert int(line.split(":")[1].split()[0]) >= 5 * 6 * (1 + 2 + 4)
    (line,) = (line for line in (finished / "report.md").read_text().splitlines() if "dropped because not finite" in line)
    assert line.endswith("0 inner steps of the evaluation, 0 outer steps, 0 steps and 0 documents of PPO")


def unflatten(flat: dict) -> dict:
    """{"['a']['b']": x} -> {'a': {'b': x}}"""
    return lm.nest({".".join(part.strip("'") for part in name[1:-1].split("][")): value for name, value in flat.items()})


OPTIMIZERS = {"ttt": ponder.meta_optimizer(9), "ppo": rl.optimizer(rl.Ppo()), "pretrain": ponder.pretrain_optimizer(9)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_outer_step_that_is_not_finite_is_dropped_and_counted(optimizer):
    rng = np.random.default_rng(0)
    shapes = {"start": (2, 3, 3), "log_step": (7,)}
    draw = lambda: {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    params, first, second = draw(), draw(), draw()
    bad = first | {"log_step": first["log_step"].at[3].set(jnp.nan)}

    def train(*gradients):
        now, state = params, optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        return now, state

    (wanted, _), (found, state) = train(first, second), train(first, bad, second)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert state.total_notfinite == 1


def test_documents_that_ran_away_are_left_out_of_a_batch():
    rng = np.random.default_rng(0)
    features, reward = rng.standard_normal((4, 3, len(rl.FEATURES))), rng.standard_normal((4, 3))
    steps = rl.Step(*[np.arange(12.0).reshape(4, 3)] * len(rl.Step._fields))._replace(features_U=features, credit_T=())
    assert ponder.finite_documents(steps, reward)[1] is reward
    features[1, 2, 5], reward[3, 0] = np.nan, np.inf
    kept, rewards = ponder.finite_documents(steps, reward)
    np.testing.assert_array_equal(rewards, reward[[0, 2]])
    np.testing.assert_array_equal(kept.loss, steps.loss[[0, 2]])
    reward[:] = np.nan
    with pytest.raises(ponder.UserError, match="--fresh"):
        ponder.finite_documents(steps, reward)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [lambda: jnp.zeros(1 << 50).block_until_ready(), lambda: np.ones(1 << 58)], ids=["device", "host"])
def test_too_little_memory_is_one_clear_line(job, capsys):
    with pytest.raises(SystemExit) as stop:
        ponder.launch(job)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "out of memory; lower --chunk" in err and "Traceback" not in err and err.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback():
    def job():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        ponder.launch(job)


# --- settings -----------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.integers(-2, 40))
FLOATS = st.floats()
PATHS = st.text("ab/~.:@ \0é☃\n", max_size=300)  # few letters: all of Unicode take long to set up
SHARES = st.lists(FLOATS, max_size=3).map(tuple)
OPTIONAL = ("chunk", "batch", "train_documents", "test_documents", "meta_steps", "iterations", "hidden")
REQUIRED = ("seed", "seeds", "chunks", "valid_documents", "per_repository", "meta_chunks", "teacher_documents", "pretrain_steps")
FIELDS = {
    "stage": st.sampled_from(["all", "pretrain", "ttt", "policy", "eval"]),
    "scale": st.sampled_from(list(ponder.SCALES)),
    "data": st.none() | PATHS,
    "base": st.none() | PATHS,
    "weights": st.none() | PATHS.map(Path),
    "fast": st.sampled_from(["swiglu", "linear", "lora"]),
    "fast_blocks": st.lists(NUMBERS, max_size=3).map(tuple),
    "momentum": FLOATS,
    "budget": st.none() | FLOATS,
    "frontier": SHARES,
    "compare": SHARES,
    "meta_action": st.sampled_from(["random", *rl.ACTIONS]),
    "fresh": st.booleans(),
    "resume": st.booleans(),
    **dict.fromkeys(REQUIRED, NUMBERS),
    **dict.fromkeys(OPTIONAL, st.none() | NUMBERS),
}


@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_settings_are_refused_in_one_line_or_valid(values):
    try:
        cfg = ponder.resolve(ponder.Config(**values))
    except ponder.UserError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert min(cfg.chunk, cfg.batch, cfg.train_documents, cfg.test_documents, cfg.valid_documents, cfg.seeds) >= 1 and cfg.chunks >= 2
    assert cfg.data and cfg.dtype and 0 <= cfg.momentum < 1 and all(0 <= share < np.inf for share in (*cfg.frontier, *cfg.compare))
    assert cfg.seed >= 0 and cfg.seed + cfg.seeds < 2**31


WORDS = ["--chunks", "--chunk", "--stage", "--frontier", "--seed", "--resume", "--no", "--budget", "-1", "x", "3", "nan", "eval", ""]


@settings(max_examples=15)
@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_any_command_line_is_settings_or_one_line(words):
    try:
        assert isinstance(ponder.parse(words), ponder.Config)
    except ponder.UserError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("main", [ponder.main, evaluation.main], ids=["ponder.py", "eval.py"])
def test_help_is_grouped_and_a_wrong_option_suggests_the_right_one(main, monkeypatch, capsys):
    def say(*words) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 * (words != ("--help",))
        return capsys.readouterr()

    text, _ = say("--help")
    assert "--no-resume" not in text and "None" not in text
    assert all(f"{group.__name__} options" in text for group in ponder.OPTIONS)
    _, err = say("--chunkz", "3")
    assert "--chunkz" in err and "Perhaps you meant" in err and "--chunks" in err and err.count("\n") == 1


def test_the_readme_shows_all_options_and_no_others():
    text = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^│ (--[a-z][a-z-]*)", text, re.M))
    groups = (*ponder.OPTIONS, evaluation.Reports, evaluation.Writing, evaluation.Benchmarks, evaluation.Speed)
    assert shown == {f"--{f.name.replace('_', '-')}" for group in groups for f in dataclasses.fields(group)}


def test_the_help_of_an_option_is_the_string_below_it():
    told = [field.type.__metadata__[0] for field in dataclasses.fields(ponder.with_help(ponder.Run))]
    names = [field.name for field in dataclasses.fields(ponder.Run)]
    assert told[names.index("resume")].help == "Continue the run in --out (or the newest under runs/)."
    assert told[names.index("seed")].help_behavior_hint("0") == "(default: 0)"
    assert told[names.index("out")].help_behavior_hint("None") == ""


def test_help_does_without_the_statistics(tmp_path):
    code = "import sys, eval, ponder; sys.exit('scipy.stats' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- hostile folders ----------------------------------------------------------------------------

FOLDERS = [b"", b"sub", b"bad\xfe", b"n\nl", b"a/b/c"]
NAMES = [b"a.py", b"new\nline.py", b"bad\xff.py", b"|`$.py", b"-rf.py", "ü☃.py".encode(), b"sp ace.py", b"r\re.py"]
CONTENTS = [b"", b"x = 1\n", b"\0", b"\xff\xfe", b"# " + b"y" * 3000, "π = 3\n".encode() * 50]


@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(CONTENTS)), st.sampled_from(FOLDERS), st.booleans())
def test_any_folder_is_read_or_skipped_with_the_reason(files, folder, marked):
    with tempfile.TemporaryDirectory() as name:
        root = os.fsencode(name)
        os.makedirs(os.path.join(root, folder), exist_ok=True)
        for file, content in files.items():
            Path(os.fsdecode(os.path.join(root, folder, file))).write_bytes(content)
        if marked:
            (Path(name) / ".git").mkdir()
        skipped: Counter = Counter()
        read = list(data.folder_source(Path(name), skipped))
        texts = [data.with_path(file).encode() for file in read]  # of which tokens are made
        assert all(texts) and all(data.split_of(file.repo) in data.SPLITS for file in read)
        assert len(read) + skipped.total() == (len(files) if folder != b"bad\xfe" else 1)
        assert not marked or {file.repo for file in read} <= {Path(name).name}


@pytest.fixture
def bottomless():
    """Folders nested deeper than Python recurses; its own removal, and pytest's, would too."""
    folder, here = Path(tempfile.mkdtemp()), os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(here)
        yield folder
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", folder], check=True)


def test_folders_nested_without_end_and_huge_files_are_skipped(bottomless):
    (bottomless / "a.py").write_text("x = 1\n")
    with open(bottomless / "huge.py", "wb") as file:
        file.truncate(2**40)  # holes
    (bottomless / "loop").symlink_to(bottomless)
    skipped: Counter = Counter()
    assert [file.path for file in data.folder_source(bottomless, skipped)] == ["a.py"]
    assert skipped == {"nested too deeply": 1, "larger than 1 MB": 1}


def test_what_an_ordinary_user_may_not_read_is_skipped(public):
    (public / "a.py").write_text("x = 1\n")
    (public / "a.py").chmod(0)
    (public / "shut").mkdir(mode=0)
    skipped: Counter = Counter()
    with ordinary_user():
        assert list(data.folder_source(public, skipped)) == []
    assert skipped == {"unreadable": 2}


# --- one repository of one's own ------------------------------------------------------------------


def test_a_folder_with_the_marks_of_a_repository_is_one(tmp_path):
    for name in ("one/a.py", "two/b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")
    repos = lambda: {file.repo for file in data.folder_source(tmp_path, Counter())}
    assert repos() == {"one", "two"} and not data.one_repository(str(tmp_path))
    (tmp_path / "pyproject.toml").write_text("")
    assert repos() == {tmp_path.name} and data.one_repository(str(tmp_path))
    (tmp_path / "two" / ".git").mkdir()
    assert repos() == {"one", "two"} and not data.one_repository(str(tmp_path))


@pytest.fixture
def own(tmp_path) -> Path:
    folder = tmp_path / "own"
    (folder / ".git").mkdir(parents=True)
    for i, file in enumerate(data.synthetic_source(3, seed=7)):
        (folder / f"module_{i}.py").write_text(file.text)
    return folder


def test_own_documents_are_spread_over_the_repository_and_know_their_files(own, base):
    tokenizer = data.load_tokenizer(base)
    files = list(data.folder_source(own, Counter()))
    chunk, chunks = 32, 4
    found = data.own_documents(files, tokenizer, chunk, chunks, 5, 0)
    tokens = [data.encode(tokenizer, [data.with_path(file)])[0] for file in files]
    count = sum(map(len, tokens)) // (chunk * chunks)
    assert len(found) == 5 and found[0].repo == f"own 1/{count}" and found[-1].repo == f"own {count}/{count}"
    whole, origin = np.concatenate(tokens), [file.path for file, own in zip(files, tokens, strict=True) for _ in own]
    for document in found:
        i = int(document.repo.split()[1].split("/")[0]) - 1
        part = slice(i * chunk * chunks, (i + 1) * chunk * chunks)
        np.testing.assert_array_equal(document.tokens, [0, *whole[part]])
        assert document.origin.tolist() == origin[part]
    with pytest.raises(data.DataError, match=rf"take --chunks {len(whole) // (2 * 512)} or fewer"):
        data.own_documents(files, tokenizer, 512, 10**6, 5, 0)
    known = [data.SourceFile("own", "a.py", "".join(f"a_long_line_of_a_file_that_was_trained_on = {i}\n" for i in range(9)))]
    with pytest.raises(data.DataError, match=r"files \(1\) is a near-copy"):
        data.without_copies(known, known, Counter())
    with pytest.raises(data.DataError, match="take more code"):
        data.own_documents([], tokenizer, 8, 4, 5, 0)


def test_gains_of_files_are_those_of_their_tokens():
    """Two documents of three chunks of four tokens, two seeds. File b is in a first chunk alone, d has less than a chunk."""
    origins = [np.asarray(list("aaaaaaaaaacc")), np.asarray(list("bbbbcccccddd"))]
    texts = [evaluation.Tokens(f"own {i}", np.zeros(13, int), np.zeros(0), origin) for i, origin in enumerate(origins)]
    read = lambda i, losses, seed=0: evaluation.Read(i, f"own {i}", np.asarray(losses, float), np.zeros(3, int), 0.0, seed)
    reads = {"skip": [read(0, [7, 5, 5]), read(1, [7, 5, 4])], "update_1": [read(0, [7, 5, 3]), read(1, [6, 4, 1])]}
    reads["policy"] = [read(i, losses, seed) for seed in range(2) for i, losses in enumerate([[7, 5, 4 - seed], [7, 5, 4]])]
    a, c = evaluation.by_file(texts, reads, 4)
    assert a == {"file": "a", "tokens": 6, "skip": 5, "update_1": pytest.approx(2 * 2 / 6), "policy": pytest.approx(1.5 * 2 / 6)}
    loss, gain = (2 * 5 + 4 * 5 + 4) / 7, (2 * 2 + 4 * 1 + 3) / 7
    assert c == {
        "file": "c",
        "tokens": 7,
        "skip": pytest.approx(loss),
        "update_1": pytest.approx(gain),
        "policy": pytest.approx(1.5 * 2 / 7),
    }


def test_one_repository_ends_in_a_report_that_names_its_files(finished, arguments, own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "stdlib_source", lambda _: data.synthetic_source())
    out = tmp_path / "run"
    assert call(monkeypatch, capsys, *arguments, "--data", own, "--weights", finished, "--out", out)[0] == 0
    results, report = results_of(out), (out / "report.md").read_text()
    assert results["unit"] == "documents of the one repository own" and len(results["by_file"]) >= 2
    assert "intervals over documents of the one repository own" in report and "On 5 documents of the one repository own" in report
    section = report.split("## Where learning helped most, and least")[1]
    assert all(f"`{row['file']}`" in section for row in (results["by_file"][0], results["by_file"][-1]))
    assert "of stdlib" in report  # what it was calibrated on


# --- what a run leaves ----------------------------------------------------------------------------


def test_a_report_is_drawn_anew_from_a_runs_files(finished, tmp_path, monkeypatch, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".md", ".png")}
    for name in kept:
        (out / name).unlink()
    monkeypatch.setattr(evaluation, "evaluate", None)  # nothing is computed
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", str(out)])
    evaluation.main()
    assert capsys.readouterr().out.startswith("On 5 repositories")
    assert (out / "report.md").read_bytes() == kept["report.md"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in kept if name.endswith("png"))
    old = json.loads((out / "results.json").read_text())
    old.pop("savings")
    for i, content in enumerate((old, [])):
        shutil.copytree(out, tmp_path / f"old{i}")
        (tmp_path / f"old{i}" / "results.json").write_text(json.dumps(content))
    for arguments in (["--run", str(tmp_path)], ["--run", str(tmp_path / "old0")], ["--run", str(tmp_path / "old1")], []):
        monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            evaluation.main()
        assert stop.value.code == 2 and "--run" in capsys.readouterr().err


def test_no_file_of_a_run_holds_what_the_environment_does(finished):
    for path in finished.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in (*SECRETS, *SECRETS.values(), os.environ["PATH"])), path


def test_nothing_is_loaded_that_could_run_code():
    for path in ROOT.glob("*.py"):
        imported, passed = set(), []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                passed.append(ast.unparse(node.value))
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "np.load"), (path, node.lineno)
        assert not imported & {"pickle", "joblib", "dill", "shelve", "marshal"}, path
        assert "torch" not in imported or path.name == "eval.py", path  # whose bench is beside it
        assert set(passed) <= {"False"}, path
