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
MESHES = ("8,1", "4,2", "2,4")
TOLERANCE = 1e-5  # of the largest: devices add up in another order, and another program rounds elsewhere


def compute(out: Path, meshes: list[str]) -> None:
    """On each mesh loss and meta-gradient, a checkpoint of it read back, and a rollout."""
    rng, found = np.random.default_rng(0), {}
    weights = lm.split_weights(FAST, random_params(MODEL, 0), lm.init_slow(jax.random.key(1), MODEL, FAST))
    tokens = rng.integers(0, MODEL.vocab, (DOCUMENTS, CHUNKS * CHUNK + 1), np.int32)
    actions, text = (
        ponder.random_actions(rng, DOCUMENTS, CHUNKS),
        rng.random((DOCUMENTS, CHUNKS, 16), np.float32),
    )
    policy = rl.init_policy(jax.random.key(2))
    policy.net["actor"]["weight"] = 100 * policy.net["actor"]["weight"]
    env = rl.Env(np.float32(rl.NOMINAL), np.float32(2 * CHUNKS))
    for shape in meshes:
        mesh = ponder.open_mesh(ponder.Config(mesh_shape=shape))
        spec, placed = lm.Spec(MODEL, FAST, CHUNK, mesh), lm.place_weights(mesh, weights)
        documents = lm.place(mesh, (tokens, actions, text), lm.ROWS)
        loss, grads = jax.jit(ponder.meta_gradient, static_argnums=0)(spec, placed, documents[:2])
        ponder.save_state(out / "state.safetensors", grads)
        read_back, _ = ponder.load_state(out / "state.safetensors", weights.slow)
        args = spec, placed, env, (documents[0], documents[2]), policy, jax.random.key(3)
        steps, rewards = rl.rollout(*args, credit=1)
        results = {"loss": loss, "gradient": read_back, "rewards": rewards, "action": steps.action}
        results |= {"losses": steps.loss, "features": steps.features_U}
        found |= {f"{shape} {name}": np.asarray(x) for name, x in lm.flatten(results).items()}
    if jax.process_index() == 0:
        np.savez(out / "found.npz", **found)


def start(devices: int, *command: object) -> subprocess.Popen:
    """A process with that many virtual devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, all that it said)."""
    try:
        out, err = process.communicate(timeout=900)
    finally:
        process.kill()
    return process.returncode, out + err


def same(found: dict[str, np.ndarray], shape: str) -> None:
    """What a mesh gives is what one device gives."""
    for name in (name.removeprefix("1,1 ") for name in found if name.startswith("1,1 ")):
        ours, theirs = found[f"{shape} {name}"], found[f"1,1 {name}"]
        np.testing.assert_allclose(
            ours, theirs, atol=TOLERANCE * np.abs(theirs).max(), err_msg=f"{shape} {name}"
        )


@pytest.fixture(scope="module")
def devices(tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("devices")
    code, said = finish(start(8, __file__, out, "1,1", *MESHES))
    assert code == 0, said
    with np.load(out / "found.npz") as found:
        return dict(found)


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_compute_what_one_does(devices, shape):
    same(devices, shape)
    assert len({tuple(row) for row in devices["1,1 action"]}) > 1 and np.any(devices["1,1 rewards"])


def test_two_processes_compute_what_one_device_does(devices, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [start(4, __file__, tmp_path, "4,2", f"--hosts={address},2,{i}") for i in range(2)]
    for code, said in map(finish, both):
        assert code == 0, said
    with np.load(tmp_path / "found.npz") as found:
        same({name: x for name, x in devices.items() if name.startswith("1,1 ")} | dict(found), "4,2")


def test_check_devices_passes_on_eight():
    code, said = finish(
        start(8, ROOT / "ponder.py", "--check-devices", "--mesh-shape", "4,2", "--fast", "lora")
    )
    assert code == 0 and "data 4 x fsdp 2" in said and said.rstrip().endswith("PASS"), said


def test_check_devices_fails_with_a_reason():
    broken = "import ponder, jax.numpy as jnp; real = ponder.meta_gradient\n"
    broken += (
        "ponder.meta_gradient = lambda spec, *args: (real(spec, *args)[0] * (1 + (spec.mesh.size > 1)), {})\n"
    )
    broken += "ponder.main()"
    code, said = finish(start(2, "-c", broken, "--check-devices"))
    assert code == 2 and "from one device's" in said and "PASS" not in said and "Traceback" not in said


def test_a_batch_that_devices_can_not_share_is_refused_and_one_left_out_suits_them():
    with pytest.raises(data.UserError, match="multiple of the 3 devices"):
        ponder.fill_in(ponder.Config(batch=8), 3)
    assert ponder.fill_in(ponder.Config(), 3).batch == 9


def test_blocks_that_can_not_be_split_are_refused():
    mesh = jax.sharding.AbstractMesh((1, 3), lm.AXES)
    prefix = {"blocks": ({"norm_1": {"weight": np.zeros(16)}},)}
    with pytest.raises(data.UserError, match="can't be split 3 ways"):
        lm.place_prefix(mesh, prefix)


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    hosts = [word.removeprefix("--hosts=") for word in rest if word.startswith("--hosts=")]
    ponder.join_hosts(ponder.Config(hosts=hosts[0] if hosts else None))
    compute(Path(folder), [word for word in rest if not word.startswith("--")])
