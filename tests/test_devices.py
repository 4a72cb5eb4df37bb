"""Several devices, and several processes, compute what one does. The tests read what `compute` left, run in
processes of their own, since the number of devices is fixed once JAX has started."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import data
import model as lm
import ponder
import rl

ROOT = Path(ponder.__file__).parent
MODEL, FAST = lm.Model(vocab=31, positions=8, width=16, layers=2, heads=2), lm.Fast((1,), 4, objective="reconstruction", optimizer="sgd")
CHUNK, CHUNKS, DOCUMENTS = 4, 3, 8
TOLERANCE = 1e-5  # of the largest: devices add up in another order, and another program rounds elsewhere


def compute(out: Path, meshes: list[str]) -> None:
    """On each mesh: loss and meta-gradient, a step down it, its checkpoint, and from the checkpoint that the mesh
    before wrote the same again; then a rollout. The first host writes it all to `out`."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), lm.init_gpt2(jax.random.key(0), MODEL))
    lower, upper = lm.split_blocks(params, FAST.blocks[0])
    slow = lm.init_slow(jax.random.key(1), MODEL, FAST)
    tokens = rng.integers(0, MODEL.vocab, (DOCUMENTS, CHUNKS * CHUNK + 1), np.int32)
    actions, text = ponder.random_actions(rng, DOCUMENTS, CHUNKS), rng.random((DOCUMENTS, CHUNKS, 16), np.float32)
    gradient_of = jax.jit(ponder.meta_gradient, static_argnums=(0, 1, 2, 3))
    policy = rl.init_policy(jax.random.key(2))
    policy.net["actor"]["weight"] = 100 * policy.net["actor"]["weight"]
    env, found = rl.Env(np.float32(rl.NOMINAL), np.float32(2 * CHUNKS)), {}
    for i, shape in enumerate(meshes):
        mesh = ponder.open_mesh(ponder.Config(mesh_shape=shape))
        frozen = lm.place_lower(mesh, lower), lm.place(mesh, upper)
        documents = lm.place(mesh, (tokens, actions, text), lm.ROWS)
        read = lambda slow: gradient_of(mesh, MODEL, FAST, CHUNK, *frozen, lm.place(mesh, slow), *documents[:2])
        loss, grads = read(slow)
        scale = 0.05 / max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
        ponder.save_state(out / f"{i}.safetensors", jax.tree.map(lambda s, g: s - scale * g, slow, grads))
        resumed = read(ponder.load_state(out / f"{max(i - 1, 0)}.safetensors", slow)[0])
        for name, x in lm.flatten({"gradient": {"loss": loss, "of": grads}, "resumed": {"loss": resumed[0], "of": resumed[1]}}).items():
            found[f"{shape} {name}"] = np.asarray(x)
        args = *frozen, lm.place(mesh, slow), env, documents[0], documents[2], policy, jax.random.key(3)
        steps, rewards = rl.rollout(mesh, MODEL, FAST, 1, CHUNK, *args)
        for name in ("loss", "action", "log_prob", "features_U"):
            found[f"{shape} rollout.{name}"] = np.asarray(getattr(steps, name))
        found[f"{shape} rollout.rewards"] = np.asarray(rewards)
    if jax.process_index() == 0:
        np.savez(out / "found.npz", **found)


def start(devices: int, *command: object) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, seconds: float = 900) -> tuple[int, str, str]:
    """Its exit code, output and errors."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


# Fewer inner steps compile faster, and devices have nothing to do with how many there are.
WORKER = """import json, pathlib, sys, test_devices as t
t.lm.STEPS = (0, 1, 1, 2)
t.ponder.join_hosts(t.ponder.Config(**json.loads(sys.argv[3])))
t.compute(pathlib.Path(sys.argv[1]), sys.argv[2].split())"""


@pytest.fixture(scope="module")
def devices(tmp_path_factory) -> dict[str, np.ndarray]:
    """What eight fake devices computed together, and one alone."""
    out = tmp_path_factory.mktemp("devices")
    code, _, err = finish(start(8, "-c", WORKER, out, "1,1 4,2", "{}"))
    assert code == 0, err
    return dict(np.load(out / "found.npz"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> dict[str, np.ndarray]:
    """What two processes with two fake devices each computed."""
    out, hosts = tmp_path_factory.mktemp("processes"), {"coordinator": f"localhost:{free_port()}", "processes": 2}
    both = [start(2, "-c", WORKER, out, "2,2", json.dumps(hosts | {"process_id": i})) for i in range(2)]
    for code, _, err in map(finish, both):
        assert code == 0, err
    return dict(np.load(out / "found.npz"))


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], shape: str, part: str) -> None:
    wanted = {name.removeprefix("1,1 "): x for name, x in expected.items() if name.startswith(f"1,1 {part}")}
    assert wanted
    for name, x in wanted.items():
        if name == "rollout.action":
            np.testing.assert_array_equal(found[f"{shape} {name}"], x)
        np.testing.assert_allclose(found[f"{shape} {name}"], x, rtol=0, atol=TOLERANCE * np.abs(x).max(), err_msg=name)


@pytest.mark.parametrize("part", ["gradient", "resumed", "rollout"])
def test_eight_devices_compute_what_one_does(devices, part):
    """`resumed`: from a checkpoint that one device wrote."""
    same(devices, devices, "4,2", part)


@pytest.mark.parametrize("part", ["gradient", "resumed", "rollout"])
def test_two_processes_compute_what_one_device_does(devices, processes, part):
    same(processes, devices, "2,2", part)


def test_what_is_compared_is_not_trivial(devices):
    assert len(np.unique(devices["1,1 rollout.action"])) > 2 and np.ptp(devices["1,1 rollout.rewards"]) > 1e-3
    moved = [np.abs(x).max() for name, x in devices.items() if name.startswith("1,1 gradient.of")]
    assert len(moved) > 5 and min(moved) > 0
    assert devices["1,1 resumed.loss"] < devices["1,1 gradient.loss"]


# --- the command line ---


def check(devices: int, *arguments: object) -> tuple[int, str, str]:
    return finish(start(devices, ROOT / "ponder.py", "--check-devices", *arguments))


def test_check_devices_passes():
    learner = ("--objective", "reconstruction", "--inner-optimizer", "sgd", "--dtype", "float32")  # compiles fastest
    code, out, err = check(8, "--mesh-shape", "4,2", *learner)
    assert code == 0 and out.splitlines()[-1] == "PASS", err
    assert "data 4 x fsdp 2" in out and "of swiglu, reconstruction, sgd, float32: as on one device" in out


@pytest.mark.parametrize("shape, reason", [("3,3", "there are 8"), ("0,2", "there are 8"), ("4", "give two numbers")])
def test_a_mesh_that_does_not_fit_is_refused_with_a_reason(shape, reason, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ponder.UserError, match=f"--mesh-shape {shape}: .*{reason}"):
        ponder.open_mesh(ponder.Config(mesh_shape=shape))


def test_check_devices_fails_with_a_reason_and_exit_code_2():
    code, out, err = check(2, "--mesh-shape", "4,2")
    assert code == 2 and "PASS" not in out
    assert [line for line in err.splitlines() if line.startswith("ponder.py:")] == [
        "ponder.py: --mesh-shape 4,2: 4 x 2 devices, and there are 2"
    ]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"coordinator": "localhost:1"}, "belong together"),
        ({"processes": 2, "process_id": 1}, "belong together"),
        ({"coordinator": "localhost:1", "processes": 2, "process_id": 2}, "0 to 1"),
        ({"coordinator": "localhost", "processes": 2, "process_id": 1}, "give HOST:PORT"),
    ],
)
def test_half_a_set_of_host_options_is_refused(change, words):
    with pytest.raises(ponder.UserError, match=words):
        ponder.join_hosts(ponder.Config(**change))


def test_hosts_that_read_different_text_or_models_are_refused(monkeypatch):
    told = []

    def gather(mine, tiled):
        told.append(mine)
        return np.concatenate(told)

    monkeypatch.setattr(ponder.multihost_utils, "process_allgather", gather)

    def host(tokens, bias):
        setup = SimpleNamespace(model=SimpleNamespace(names=SimpleNamespace(norm="ln_f")), upper={"ln_f": {"bias": np.float32([bias])}})
        ponder.check_same(SimpleNamespace(texts={"train": [SimpleNamespace(tokens=np.int32(tokens))]}, setup=setup))

    host([1, 2], 3)
    host([1, 2], 3)
    for other in (([1, 4], 3), ([1, 2], 4)):
        with pytest.raises(ponder.UserError, match="different documents or models"):
            host(*other)
        told.pop()


def test_a_host_that_another_left_says_so_in_one_line(monkeypatch):
    left = jax.errors.JaxRuntimeError("UNAVAILABLE: connection closed\nand much more")
    assert ponder.explain(left) is None
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert "another host stopped" in (text := ponder.explain(left)) and "connection closed" in text and "\n" not in text


def test_batches_that_devices_cannot_share_are_refused():
    mesh = SimpleNamespace(size=3)
    ponder.spread_evenly(mesh, 6, "--batch 6")
    with pytest.raises(ponder.UserError, match=r"--batch 8 .* 3 devices"):
        ponder.spread_evenly(mesh, 8, "--batch 8")


@pytest.mark.parametrize(
    ("change", "devices", "batch"), [({}, 8, 8), ({}, 3, 9), ({"scale": "xl"}, 1, 2), ({"scale": "xl"}, 8, 8), ({"batch": 8}, 3, 8)]
)
def test_a_batch_that_is_left_out_suits_the_devices(change, devices, batch):
    assert ponder.resolve(ponder.Config(**change), devices).batch == batch


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "0.9"), ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5"), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "")]
)
def test_a_share_of_memory_that_was_asked_for_is_left_alone(given, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    ponder.keep_memory()
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION", "") == expected


def test_shared_blocks_are_split_and_those_that_cannot_be_are_refused():
    stacked = {"wte": {"weight": np.zeros((5, 7))}, "h": {"ln": {"bias": np.zeros((2, 6))}}}
    assert lm.lower_specs(stacked) == {"wte": lm.WHOLE, "h": jax.sharding.PartitionSpec(None, "fsdp")}
    lower = {"wte": {"weight": np.zeros((5, 7))}, "h": ({"c_fc": {"weight": np.zeros((6, 5))}, "ln": {"bias": np.zeros(6)}},) * 2}
    with pytest.raises(lm.ModelError, match=r"c_fc.weight can't be split 4 ways"):
        lm.place_lower(SimpleNamespace(shape={"fsdp": 4}), lower)


@pytest.mark.slow
def test_two_processes_run_the_whole_job_as_one_does(tmp_path):
    """Every stage, with evaluation groups that don't fill the mesh; both processes end, one writes."""
    tokenizer = data.train_tokenizer((f.text for f in data.synthetic_source(4)), 400)
    model = lm.Model(tokenizer.get_vocab_size(), 32, 16, 4, 2)
    lm.save_gpt2(tmp_path / "base", model, lm.init_gpt2(jax.random.key(0), model))
    (tmp_path / "base" / "tokenizer.json").write_text(tokenizer.to_str())
    sizes = "--data synthetic --dtype float32 --objective reconstruction --inner-optimizer sgd --chunk 16 --chunks 6 --batch 4"
    sizes += " --train-documents 4 --test-documents 5 --meta-steps 2 --meta-chunks 3 --iterations 2 --teacher-documents 4"
    job = [ROOT / "ponder.py", "--base", tmp_path / "base", *sizes.split()]
    alone, shared = tmp_path / "one", tmp_path / "two"
    code, _, err = finish(start(1, *job, "--out", alone))
    assert code == 0, err
    hosts = ["--coordinator", f"localhost:{free_port()}", "--processes", 2, "--mesh-shape", "2,2", "--out", shared]
    for i, (code, out, err) in enumerate(map(finish, [start(2, *job, *hosts, "--process-id", i) for i in range(2)])):
        assert code == 0, err
        assert ("report:" in out) == (i == 0)
    assert sorted(p.name for p in shared.iterdir()) == sorted(p.name for p in alone.iterdir())
    for name in ("ttt.safetensors", "policy.safetensors"):
        one, two = (lm.read_safetensors(folder / name) for folder in (alone, shared))
        for leaf, x in one.items():
            np.testing.assert_allclose(two[leaf], x, atol=1e-3, err_msg=leaf)  # Adam steps along the sign of what rounding left
    one, two = (json.loads((folder / "results.json").read_text())["methods"] for folder in (alone, shared))
    for name, method in one.items():
        assert two[name]["loss"] == pytest.approx(method["loss"], abs=1e-3), name
        assert two[name]["seconds"] > 0
