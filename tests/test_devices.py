"""Meshes of several devices, and several processes, compute what one device does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, random_params

import data
import model as lm
import ponder
import rl

MODEL, FAST = lm.Model(31, 8, 16, 2, 2, 2, 8, 64), lm.Fast((1,), 4, optimizer="sgd")
CHUNK, CHUNKS, DOCUMENTS = 4, 3, 8
MESHES = ("8,1", "4,2", "2,4", "1,1,8", "2,1,2")  # the third number: documents side by side on a device
TOLERANCE = 1e-5  # of the largest: devices add up in another order, and another program rounds elsewhere


def compute(out: Path, *meshes: str) -> None:
    """On each mesh: a meta-gradient, one more from the first mesh's checkpoint, and a rollout."""
    rng, found, checkpoint = np.random.default_rng(0), {}, out / "state.safetensors"
    weights = lm.split_weights(FAST, random_params(MODEL, 0), lm.init_slow(jax.random.key(1), MODEL, FAST))
    tokens = rng.integers(0, MODEL.vocab, (DOCUMENTS, CHUNKS * CHUNK + 1), np.int32)
    actions = ponder.random_actions(rng, DOCUMENTS, CHUNKS)
    text = rng.random((DOCUMENTS, CHUNKS, 16), np.float32)
    policy = rl.init_policy(jax.random.key(2))
    policy.net["actor"]["weight"] = 100 * policy.net["actor"]["weight"]
    env = rl.Env(np.float32(rl.NOMINAL), np.float32(2 * CHUNKS))
    gradient = jax.jit(ponder.meta_gradient, static_argnums=0)
    for shape in meshes:
        rows, fsdp, *together = map(int, shape.split(","))
        mesh = lm.open_mesh(f"{rows},{fsdp}")
        spec, placed = lm.Spec(MODEL, FAST, CHUNK, mesh), lm.place_weights(mesh, weights)
        spec = spec._replace(together=sum(together) or 1)
        whole = jax.tree.leaves(placed.prefix["blocks"])[0]
        assert whole.addressable_shards[0].data.size * mesh.shape["fsdp"] == whole.size
        acted, seen = lm.place(mesh, ((tokens, actions), (tokens, text)), lm.ROWS)
        loss, grads = gradient(spec, placed, acted)
        if not checkpoint.exists():
            lm.save_state(checkpoint, jax.tree.map(lambda s, g: s - 0.05 * g, placed.slow, grads))
        slow, _ = lm.load_state(checkpoint, weights.slow)
        resumed = gradient(spec, placed._replace(slow=lm.place(mesh, slow)), acted)
        steps, rewards = rl.rollout(spec, placed, env, seen, policy, jax.random.key(3), credit=1)
        results = {"loss": loss, "gradient": grads, "resumed": dict(enumerate(resumed)), "rewards": rewards}
        results |= {"action": steps.action, "losses": steps.loss, "features": steps.features_U}
        found |= {f"{shape} {name}": np.asarray(x) for name, x in lm.flatten(results).items()}
    if jax.process_index() == 0:
        np.savez(out / "found.npz", **found)


def start(devices: int, *command: object) -> subprocess.Popen:
    """A process with that many virtual devices."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, all that it said)."""
    try:
        said, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    return process.returncode, said


def same(found: dict[str, np.ndarray], shape: str) -> None:
    """What a mesh gives is what one device gives."""
    for name in (name.removeprefix("1,1 ") for name in found if name.startswith("1,1 ")):
        ours, theirs = found[f"{shape} {name}"], found[f"1,1 {name}"]
        np.testing.assert_allclose(ours, theirs, 0, TOLERANCE * np.abs(theirs).max(), err_msg=name)


@pytest.fixture(scope="module")
def devices(tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("devices")
    code, said = finish(start(8, __file__, "alone", out, "1,1", *MESHES))
    assert code == 0, said
    return dict(np.load(out / "found.npz"))


@pytest.mark.parametrize("shape", MESHES)
def test_devices_and_documents_side_by_side_compute_what_one_does_alone(devices, shape):
    same(devices, shape)
    assert len({tuple(row) for row in devices["1,1 action"]}) > 1 and np.any(devices["1,1 rewards"])


def test_two_processes_compute_what_one_device_does(devices, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [start(4, __file__, f"{address},2,{i}", tmp_path, "4,2") for i in range(2)]
    for code, said in map(finish, both):
        assert code == 0, said
    alone = {name: x for name, x in devices.items() if name.startswith("1,1 ")}
    same(alone | dict(np.load(tmp_path / "found.npz")), "4,2")


QUICK = ("--check-devices", "--dtype", "float32")
BROKEN = """import ponder; real = ponder.meta_gradient
ponder.meta_gradient = lambda spec, *args: (real(spec, *args)[0] * (1 + (spec.mesh.size > 1)), {})
ponder.main()"""


def test_check_devices_passes_or_fails_with_a_reason():
    both = start(8, ROOT / "ponder.py", *QUICK, "--mesh-shape", "4,2"), start(2, "-c", BROKEN, *QUICK)
    (code, said), (broken, why) = map(finish, both)
    assert code == 0 and "'data': 4, 'fsdp': 2" in said and said.rstrip().endswith("PASS"), said
    assert broken == 2 and "from one device's" in why and "PASS" not in why and "Traceback" not in why


@pytest.mark.parametrize("name", ["cuda", "nonsense"])
def test_platforms_that_are_not_there_are_refused(name):
    command, env = [sys.executable, ROOT / "ponder.py", *QUICK], os.environ | {"JAX_PLATFORMS": name}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and line.startswith(f"ponder.py: JAX_PLATFORMS={name}: ") and "unset" in line


def test_what_devices_can_not_share_is_refused_and_a_batch_left_out_suits_them():
    with pytest.raises(data.UserError, match="multiple of the 3 devices"):
        ponder.fill_in(ponder.Config(batch=8), 3)
    assert ponder.fill_in(ponder.Config(), 3).batch == 9
    with pytest.raises(data.UserError, match="can't be split 3 ways"):
        mesh = jax.sharding.AbstractMesh((1, 3), lm.AXES)
        lm.place_weights(mesh, lm.Weights({"blocks": {"norm_1": {"weight": np.zeros((2, 16))}}}, {}, {}))


if __name__ == "__main__":
    hosts, folder, *shapes = sys.argv[1:]
    if hosts != "alone":
        lm.join_hosts(hosts)
    compute(Path(folder), *shapes)
