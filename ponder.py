"""PonderTTT: a frozen code model learns while it reads, and a policy decides when.

    python ponder.py                  the whole method on this machine, offline, on the standard library
    python ponder.py --data FOLDER    the same on your own repositories; of one alone, what learning does for its files
    python ponder.py --stage eval     a quick evaluation, with the trained weights of assets/tiny

Stages: `pretrain` makes the small base model, `ttt` meta-learns how its fast weights learn, `policy`
trains when they learn, `eval` measures it all on repositories that no stage saw. Equations are in
model.py (learning) and rl.py (deciding); this file has the settings, the files and the loops.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import resource
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
import tyro
from jax.experimental import multihost_utils
from tqdm import tqdm

import data
import eval as evaluation
import model as lm
import rl

ASSETS = data.ASSETS


class UserError(Exception):
    """Bad input; the message is one line that says what to do."""


# --- 1. Settings ------------------------------------------------------------------------------


class Scale(NamedTuple):
    """What a --scale stands for, where no option says otherwise."""

    base: str  # a local folder or a hub name
    chunk: int  # C, tokens
    hidden: int  # width of a swiglu adapter
    rank: int  # of a lora one
    batch: int  # documents of an outer step or a PPO iteration
    train_documents: int  # of the policy stage
    test_documents: int
    meta_steps: int
    iterations: int  # of PPO


SCALES = {
    "tiny": Scale(str(ASSETS / "tiny"), 256, 256, 16, 8, 120, 12, 100, 6),
    "125m": Scale("gpt2", 512, 768, 64, 8, 5000, 100, 2000, 625),
    "350m": Scale("gpt2-medium", 512, 1024, 128, 4, 10000, 100, 2000, 2500),
    "1b": Scale("gpt2-large", 512, 1280, 256, 2, 20000, 100, 2000, 10000),
    "xl": Scale("gpt2-xl", 512, 1600, 256, 2, 20000, 100, 2000, 10000),
}


QUICK = 6  # test documents of --stage eval at tiny
WHOLE = 24  # and of one's own repository: all of it, unless it is large


@dataclasses.dataclass(frozen=True)
class Run:
    """What to run and where it is kept."""

    stage: Literal["all", "pretrain", "ttt", "policy", "eval"] = "all"
    """What to run; 'all' is ttt, policy and eval."""
    scale: Literal["tiny", "125m", "350m", "1b", "xl"] = "tiny"
    """Base model and sizes: tiny runs on any laptop, the others on a GPU or TPU."""
    base: str | None = None
    """A folder or hub name of a GPT-2, GPT-NeoX (Pythia) or Llama-type checkpoint, instead of the scale's."""
    out: Path | None = None
    """The run's folder; a new one under runs/ if left out."""
    resume: bool = False
    """Continue the run in --out (or the newest under runs/)."""
    weights: Path | None = None
    """A run's folder to take trained fast weights from (--stage eval: its policy too; --stage ttt: to go on from)."""
    fresh: bool = False
    """Train everything here; take no trained fast weights from assets/."""
    seed: int = 0
    """Seed of everything random."""
    seeds: int = 1
    """How many policies to train, from this seed on; the evaluation is over all of them."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where code comes from."""

    data: str | None = None
    """'stdlib' (this Python's own library), 'packages' (those installed), 'pypi' (186 repositories, fetched once),
    'synthetic', or a local folder: one repository of your own, or one whose child folders are repositories; or a
    dataset, streamed: 'stack' (The Stack, deduplicated), 'stack-v2', 'hub:NAME' or 'hub:NAME@REVISION' of the
    Hugging Face hub, a .parquet, .jsonl or .jsonl.gz file, or a folder of those. Left out: stdlib at tiny, stack at
    the other scales."""
    files: Literal["code", "all"] = "code"
    """Of pypi or a folder: its code, or repositories as they are (licences, documents, tests, data among it)."""
    text_column: str | None = None
    """Of a dataset: the column with the text. Left out: content, text, code or whole_func_string."""
    subset: str | None = None
    """Of a dataset: its configuration; of stack-v2 the language, Python if left out."""
    data_dir: str | None = None
    """Of a dataset: its folder; of stack that of the language, data/python if left out."""
    dataset_split: str | None = None
    """Of a dataset: which of its own splits to read, train if left out. Repositories are split anew."""
    packages_from: tuple[Path, ...] = ()
    """Stage pretrain: more site-packages folders to read, besides this Python's."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What learning may cost, and what the policy sees and earns."""

    budget: float | None = None
    """Total cost allowed for one document, SKIP = 1 per chunk. Left out: halfway between never
    learning and UPDATE_1 on every chunk."""
    cost: Literal["nominal", "flops"] = "nominal"
    """The budget's currency: nominal (1, 3, 6, 12) or the FLOPs of the compiled steps."""
    frontier: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    """Other budgets to evaluate the policy at, as shares of what UPDATE_1 on every chunk costs above SKIP."""
    compare: tuple[float, ...] = ()
    """Those at which all other methods are evaluated too."""
    reward: Literal["credit", "next_chunk"] = "credit"
    """What an action earns: what it gave all chunks to come, or the next chunk's gain."""
    drop_features: tuple[Literal["confidence", "activation", "attention", "code", "history", "sequence"], ...] = ()
    """Groups of features that the policy does not see."""
    look_ahead: bool = False
    """Let the policy see how much of a chunk's text comes again later in the document: only for text that is there
    as a whole, as a repository on disk. What is predicted is still predicted before it is learned from."""


@dataclasses.dataclass(frozen=True)
class Learner:
    """What the fast weights are and how they learn."""

    fast: Literal["swiglu", "linear", "lora"] = "swiglu"
    """What the fast weights are: small MLPs, TTT-Linear, or low-rank changes to queries and values."""
    fast_blocks: tuple[int, ...] = ()
    """Which blocks carry them, counted from 0, or from the end: -1 is the last. Left out: the last quarter."""
    hidden: int | None = None
    """Width of a swiglu adapter, rank of a lora one."""
    objective: Literal["next_token", "reconstruction"] = "next_token"
    """The fast weights' own loss."""
    inner_optimizer: Literal["muon", "sgd"] = "muon"
    """The fast weights' own optimiser: orthogonalised or clipped gradients."""
    momentum: float = 0.3
    """Its momentum, 0 to below 1."""
    meta_action: Literal["random", "SKIP", "UPDATE_1", "UPDATE_2", "UPDATE_4"] = "random"
    """Stage ttt: the action taken on every chunk while meta-learning."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is read and trained; what is left out comes from --scale."""

    chunks: int = 24
    """Chunks of a document."""
    chunk: int | None = None
    """Tokens of a chunk."""
    batch: int | None = None
    """Documents of an outer step or a PPO iteration, a multiple of the devices. Left out: the scale's, rounded up to one."""
    train_documents: int | None = None
    """Documents that the policy is trained on."""
    valid_documents: int = 6
    """Documents that gates, policies and oracle are calibrated on."""
    test_documents: int | None = None
    """Documents of the evaluation, at most --per-repository of one repository; --stage eval alone reads 6 at
    tiny."""
    per_repository: int = 1
    """Test documents taken from one repository at most."""
    meta_steps: int | None = None
    """Outer steps of meta-learning."""
    meta_chunks: int = 24
    """Chunks of a document in meta-learning."""
    teacher_documents: int = 64
    """Documents read blindly for the policy's warm start, in whole batches."""
    iterations: int | None = None
    """PPO iterations."""
    pretrain_steps: int = 2500
    """Steps of pretraining, 8,192 tokens each."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What it runs on."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Of matrix products' operands, sums are float32. Left out: bfloat16 where the hardware multiplies
    it (GPU, TPU, CPUs with AMX), float32 elsewhere. Accelerators round float32 operands too, as JAX's default has it."""
    mesh_shape: str | None = None
    """Devices as data,fsdp: documents are spread over all of them, the frozen blocks are split over fsdp.
    Left out: all on data."""
    distributed: bool = False
    """Several hosts that find each other (TPU pods, Slurm); the same command on each, --out on a shared disk."""
    coordinator: str | None = None
    """Several hosts: HOST:PORT of the first one; with --processes and --process-id."""
    processes: int | None = None
    """Several hosts: how many processes there are."""
    process_id: int | None = None
    """Several hosts: which of them this one is, counted from 0."""
    check_devices: bool = False
    """Run nothing, but check the devices: mesh, layout, collectives, loss and gradient of the learner that is asked for
    against one device. Ends with PASS or with what is wrong."""


OPTIONS = (Run, Data, Budget, Learner, Sizes, Devices)  # as --help groups them


@dataclasses.dataclass(frozen=True)
class Config(Devices, Sizes, Learner, Budget, Data, Run):
    """All settings, flat; `resolve` fills in what is left out."""

    if TYPE_CHECKING:  # filled in
        data: Any = None
        chunk: Any = None
        batch: Any = None
        train_documents: Any = None
        test_documents: Any = None
        meta_steps: Any = None
        iterations: Any = None
        dtype: Any = None


STYLE = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)  # of --help: no --no-resume, no {None}|INT


def parse(arguments: list[str] | None = None) -> Config:
    """The command line's settings, or --help.

    Raises: UserError."""
    return flat(read_options(OPTIONS, __doc__, arguments))


def flat(groups: list[Any]) -> Config:
    """Settings given in groups, as one."""
    return Config(**{name: value for group in groups for name, value in vars(group).items()})


def read_options(groups: tuple[type, ...], description: str | None, arguments: list[str] | None = None) -> list[Any]:
    """The command line's options, an instance of each group, or --help.

    Raises: UserError, with what tyro says is wrong, in one line instead of its box."""
    told = lambda group: Annotated[group, tyro.conf.OmitArgPrefixes, tyro.conf.arg(help=group.__doc__)]
    fields = [(group.__name__, told(group), dataclasses.field(default=group())) for group in map(with_help, groups)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            chosen = tyro.cli(dataclasses.make_dataclass("Arguments", fields), args=arguments, description=description, config=STYLE)
    except SystemExit as stop:
        if not stop.code:
            raise
        _, *lines = (line.strip("│╭╮╰╯─ ") for line in said.getvalue().splitlines())
        parts = [" ".join(part) for rule, part in itertools.groupby(lines, lambda line: not line.strip("-")) if not rule]
        raise UserError("; ".join(part.rstrip(".") for part in parts)) from None
    return [group(**vars(getattr(chosen, group.__name__))) for group in groups]


def with_help(group: type) -> type:
    """A group of options for tyro, which shows the string below each one. It would find those itself, but with their
    line breaks, in a second (it reads the whole file for each group), and name None as a default."""
    (body,) = (node.body for node in classes_of(group.__module__) if node.name == group.__name__)
    pairs = [(field, text) for field, text in itertools.pairwise(body) if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)]
    texts = {ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split()) for field, text in pairs}
    types, default = get_type_hints(group), lambda value: "" if value in ("None", "False", "") else f"(default: {value})"
    told = lambda name: Annotated[types[name], tyro.conf.arg(help=texts[name], help_behavior_hint=default)]
    fields = [(f.name, told(f.name), dataclasses.field(default=f.default)) for f in dataclasses.fields(group)]
    return dataclasses.make_dataclass(group.__name__, fields, namespace={"__doc__": group.__doc__}, frozen=True)


@cache
def classes_of(module: str) -> list[ast.ClassDef]:
    """The classes in a module's source."""
    return [node for node in ast.parse(inspect.getsource(sys.modules[module])).body if isinstance(node, ast.ClassDef)]


def native_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 where matrix units take it (about twice as fast), float32 elsewhere."""
    cpu = Path("/proc/cpuinfo")
    amx = cpu.exists() and "amx_bf16" in cpu.read_text()
    return "bfloat16" if jax.default_backend() != "cpu" or amx else "float32"


def resolve(cfg: Config, devices: int = 1) -> Config:
    """The configuration with all that was left out filled in, for training on that many devices. It takes settings as
    they were given: a second time, --meta-steps would look like the user's.

    Raises: UserError if a setting is out of range, or two contradict each other."""
    if (cfg.meta_action != "random" or cfg.meta_steps is not None) and cfg.stage in ("all", "policy") and ships(cfg) and not cfg.resume:
        raise UserError(
            "--meta-action and --meta-steps train new fast weights, and assets/ has trained ones; add --fresh, or use --stage ttt"
        )
    scale = SCALES[cfg.scale]
    trained = given_weights(cfg)
    if cfg.stage == "all" and data.one_repository(cfg.data or "") and trained and (trained / "policy.safetensors").exists():
        cfg = dataclasses.replace(cfg, stage="eval")
    if cfg.stage == "eval" and cfg.scale == "tiny" and cfg.test_documents is None:
        cfg = dataclasses.replace(cfg, test_documents=WHOLE if data.one_repository(cfg.data or "") else QUICK)
    if cfg.stage == "eval" and not cfg.resume and (cfg.drop_features or cfg.look_ahead or cfg.reward != "credit"):
        raise UserError(
            "--drop-features, --look-ahead and --reward are of a policy's training, and this evaluates a trained one; "
            "train one with --stage policy"
        )
    sizes = {name: size for name, size in scale._asdict().items() if name not in ("base", "hidden") and getattr(cfg, name, 0) is None}
    if "batch" in sizes:
        sizes["batch"] += -sizes["batch"] % devices  # the same number for each
    source = cfg.data or ("stdlib" if cfg.scale == "tiny" else "stack")
    cfg = dataclasses.replace(cfg, dtype=cfg.dtype or native_dtype(), data=source, **sizes)
    least = {"iterations": 0, "chunks": 2, "meta_chunks": 2, "meta_steps": 0, "seed": 0}
    for name in ("chunks", "meta_chunks", "chunk", "batch", "train_documents", "valid_documents", "test_documents", "per_repository",
                 "meta_steps", "teacher_documents", "iterations", "pretrain_steps", "seed", "seeds"):  # fmt: skip
        if getattr(cfg, name) < least.get(name, 1):
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least {least.get(name, 1)}")
    if cfg.hidden is not None and cfg.hidden < 1:
        raise UserError(f"--hidden {cfg.hidden}: must be at least 1")
    if cfg.seed + cfg.seeds >= 2**31:
        raise UserError(f"--seed {cfg.seed}: must be below 2,147,483,648, with --seeds added")
    for name in ("frontier", "compare"):
        if not all(0 <= share <= 1000 for share in getattr(cfg, name)):
            raise UserError(f"--{name} {' '.join(map(str, getattr(cfg, name)))}: shares must be 0 to 1000")
    if not 0 <= cfg.momentum < 1:
        raise UserError(f"--momentum {cfg.momentum:g}: must be at least 0 and below 1")
    return cfg


# --- 2. Devices and hosts -----------------------------------------------------------------------


def join_hosts(cfg: Config) -> None:
    """Let this process find the others, before JAX looks for devices. Only the first one speaks.

    Raises: UserError if the options don't go together or the hosts don't meet."""
    given = (cfg.coordinator, cfg.processes, cfg.process_id)
    if (not cfg.distributed and given == (None, None, None)) or jax.distributed.is_initialized():
        return
    if not cfg.distributed and None in given:
        raise UserError("--coordinator, --processes and --process-id belong together; or give --distributed alone (TPU pods, Slurm)")
    if cfg.processes is not None and cfg.process_id is not None and not 0 <= cfg.process_id < cfg.processes:
        raise UserError(f"--process-id {cfg.process_id}: of {cfg.processes} processes it is 0 to {cfg.processes - 1}")
    if cfg.coordinator is not None:
        if not re.fullmatch(r"\S+:\d+", cfg.coordinator):
            raise UserError(f"--coordinator {cfg.coordinator}: give HOST:PORT, the first host's, such as 10.0.0.1:1234")
        print(f"waiting for {cfg.processes} processes at {cfg.coordinator}", file=sys.stderr)
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the hosts did not find each other ({str(error).splitlines()[0]}); check --coordinator and --processes") from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def on_first_host(function: Callable[[], Path]) -> Path:
    """What function() gives on the first host, on every host.

    Raises: UserError on every host, if function() does."""
    if jax.process_count() == 1:
        return function()
    answer = np.zeros(4096, np.uint8)
    if jax.process_index() == 0:
        try:
            text = f"+{function()}"
        except UserError as error:
            text = f"-{error}"
        answer[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    text = multihost_utils.broadcast_one_to_all(answer).tobytes().rstrip(b"\0").decode()
    if text[0] == "-":
        raise UserError(text[1:])
    return Path(text[1:])


def open_mesh(cfg: Config) -> jax.sharding.Mesh:
    """The mesh of --mesh-shape, or of all devices.

    Raises: UserError if there are no such devices."""
    there = jax.device_count()
    try:
        data_, fsdp = map(int, cfg.mesh_shape.split(",")) if cfg.mesh_shape else (there, 1)
    except ValueError:
        raise UserError(f"--mesh-shape {cfg.mesh_shape}: give two numbers, data,fsdp, such as 4,2") from None
    size = data_ * fsdp
    if min(data_, fsdp) < 1 or size > there or (size < there and jax.process_count() > 1):
        raise UserError(f"--mesh-shape {cfg.mesh_shape}: {data_} x {fsdp} devices, and there are {there}")
    if size < there:
        print(f"note: --mesh-shape {cfg.mesh_shape} leaves {there - size} of {there} devices idle", file=sys.stderr)
    return lm.make_mesh(data_, fsdp)


def spread_evenly(mesh: jax.sharding.Mesh, count: int, what: str) -> None:
    """Raises: UserError unless that many of `what` can be spread evenly over the devices."""
    if count % mesh.size:
        raise UserError(f"{what} can't be spread evenly over {mesh.size} devices; take a multiple of that, or a smaller --mesh-shape")


# --- 3. The run's folder ------------------------------------------------------------------------


def choose_folder(cfg: Config) -> Path:
    """The run's folder; nothing is written yet.

    Raises: UserError if it holds another run, or there is none to resume."""
    runs = Path("runs")
    if cfg.out:
        out = cfg.out
    elif cfg.resume:
        old = sorted(runs.glob("*/config.json"), key=lambda p: p.stat().st_mtime)
        if not old:
            raise UserError("--resume: there is no run under runs/ yet; give --out, or leave --resume out")
        out = old[-1].parent
    else:
        taken = [int(p.name) for p in runs.glob("*") if p.name.isdigit()] if runs.is_dir() else []
        out = runs / f"{max(taken, default=0) + 1:03d}"
    there = (out / "config.json").exists()
    if cfg.resume and not there:
        raise UserError(f"--resume: there is no run in {out}; leave --resume out, or give the folder of one")
    if there and not cfg.resume:
        raise UserError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    if there:
        refuse_other_settings(out, settings(cfg), {"stage", "pretrain_steps", "test_documents"})  # may change between a run's parts
    return out


def refuse_other_settings(out: Path, now: dict[str, Any], free: set[str]) -> None:
    """Raises: UserError if the config.json of `out` has other settings than `now`, but for those that are free."""
    try:
        before = dict(json.loads((out / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{out}/config.json is damaged or gone; choose another --out") from None
    if changed := [f"{k}: {before.get(k)}" for k in now if k not in free and now[k] != before.get(k)]:
        raise UserError(f"{out} was run with other settings ({', '.join(changed)}); repeat them, or choose another --out")


MACHINE = ("mesh_shape", "distributed", "coordinator", "processes", "process_id", "check_devices")  # settings that no result depends on


def settings(*options: Any) -> dict[str, Any]:
    """What config.json holds: all of these options that the result depends on; paths within this checkout as from there, so
    that it can be moved."""
    left_out = ("out", "resume", *MACHINE)
    every = {k: v for group in options for k, v in dataclasses.asdict(group).items() if k not in left_out}
    home = ASSETS.parent
    return json.loads(json.dumps(every, default=lambda path: str(path.relative_to(home) if path.is_relative_to(home) else path)))


@contextlib.contextmanager
def claimed(cfg: Config, out: Path) -> Iterator[Path]:
    """The run's folder, for this run alone until it ends or dies; another one, if a numbered folder was taken
    since it was chosen.

    Raises: UserError if it is another process's, another run's, not writable, or not seen by every host."""
    with contextlib.ExitStack() as held:

        def write() -> Path:
            try:
                own = make_folder(cfg, out)
                lock(held.enter_context(open(own / "run.lock", "a")), own)
                choose_folder(dataclasses.replace(cfg, out=own))  # what was there before the lock was had
                for left in own.glob(".*.*.[0-9]*"):  # half-written files of a run that was killed
                    left.unlink()
                lm.write_atomic(own / "config.json", (json.dumps(settings(cfg), indent=2) + "\n").encode())
            except OSError as error:
                raise UserError(f"--out {out}: can't write there ({error.strerror}); choose another folder") from None
            return own

        own = on_first_host(write)
        check_shared(own)
        yield own


def make_folder(cfg: Config, out: Path) -> Path:
    """Make the run's folder, or the next numbered one if another process has just made that -> the folder.

    Raises: OSError if it can't be made, UserError as `choose_folder` does."""
    while True:
        try:
            out.mkdir(parents=True, exist_ok=bool(cfg.out or cfg.resume))
            return out
        except FileExistsError:
            if cfg.out or cfg.resume:  # a file
                raise
            out = choose_folder(cfg)


def lock(file: Any, out: Path) -> Any:
    """Hold a file's lock until it is closed, as the system does when the process ends, however it ends. -> the file

    Raises: UserError if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another process is at work on this run; wait until it ends, or choose another --out") from None
    return file


def check_shared(out: Path) -> None:
    """Raises: UserError unless every host sees the run's folder."""
    if not multihost_utils.process_allgather(np.asarray([(out / "config.json").exists()]), tiled=True).all():
        raise UserError(f"--out {out}: not every host sees what the first one wrote there; put it on a disk that they share")


def check_same(work: Workspace) -> None:
    """Raises: UserError unless every host reads the same documents with the same model."""
    seen = [x.tokens for texts in work.texts.values() for x in texts] + jax.tree.leaves(work.setup.upper[work.setup.model.names.norm])
    digest = reduce(lambda before, x: zlib.crc32(np.asarray(x).tobytes(), before), seen, 0)
    if len(set(multihost_utils.process_allgather(np.asarray([digest], np.uint32), tiled=True).tolist())) > 1:
        raise UserError("the hosts read different documents or models; give all of them the same --data, --base and Python")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a run that was killed may have left half of one.

    Raises: UserError if one is not JSON."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        if all(row.keys() >= {"stage", "step"} for row in rows):
            return rows
    except ValueError:
        pass
    raise UserError(f"{path} is damaged; delete it, and the figures so far are lost")


class Log:
    """metrics.jsonl: one line for each step. Opening it for a stage drops that stage's lines from
    `step` on, which a resumed run writes again. Only the first of several hosts writes.

    Raises: UserError if what is there is damaged."""

    def __init__(self, out: Path, stage: str, step: int):
        self.path, self.stage, self.rows = out / "metrics.jsonl", stage, []
        if jax.process_index():
            return
        kept = [r for r in read_metrics(self.path) if r["stage"] != stage or r["step"] <= step]
        lm.write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self.rows = [r for r in kept if r["stage"] == stage]

    def add(self, step: int, figures: dict[str, Any]) -> None:
        row = {"stage": self.stage, "step": step} | {k: float(v) for k, v in figures.items()}
        self.rows.append(row)
        if jax.process_index() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


def digest(leaves: dict[str, np.ndarray]) -> str:
    """A checksum of named arrays, in the order of their names."""
    return hashlib.blake2b(b"".join(leaves[k].tobytes() for k in sorted(leaves)), digest_size=16).hexdigest()


def save_state(path: Path, state: Any, **meta: Any) -> None:
    """Write a checkpoint, with `meta` (JSON) said of it. Of several hosts the first does, once none can still ask
    for the old one, and none goes on before the new one is there."""
    multihost_utils.sync_global_devices(f"before {path.name}")
    if jax.process_index() == 0:
        write_state(path, state, **meta)
    multihost_utils.sync_global_devices(f"after {path.name}")


def write_state(path: Path, state: Any, **meta: Any) -> None:
    """Any pytree of arrays, whole on every device, as safetensors with a checksum: the same file from any mesh."""
    leaves = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}
    header = {"ponderttt": json.dumps({"digest": digest(leaves), "meta": meta})}  # one key: safetensors writes several in any order
    lm.write_atomic(path, safetensors.numpy.save(leaves, metadata=header))


def load_state(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The pytree saved at `path`, in the structure of `like`, and what was said of it.

    Raises: ModelError if the file is damaged or belongs to another configuration."""
    arrays = lm.read_safetensors(path)
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads((file.metadata() or {}).get("ponderttt", "{}"))
    if digest(arrays) != header.get("digest"):
        raise lm.ModelError(f"{path}: its checksum does not match its content; delete it and run again")
    wanted = jax.tree_util.tree_leaves_with_path(like)
    names = [jax.tree_util.keystr(k) for k, _ in wanted]
    if set(names) != set(arrays) or any(arrays[n].shape != np.shape(v) for n, (_, v) in zip(names, wanted, strict=True)):
        raise lm.ModelError(f"{path}: belongs to another configuration; choose another --out")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[n]) for n in names]), header["meta"]


def progress(iterable=None, desc: str = "", **kwargs):
    """tqdm's bar, shown by the first of several hosts alone."""
    return tqdm(iterable, desc=desc, mininterval=1, dynamic_ncols=True, disable=jax.process_index() > 0, **kwargs)


# --- 4. Model and data --------------------------------------------------------------------------


def base_folder(name: str) -> Path:
    """A local folder as it is, a hub name downloaded (cached by huggingface_hub).

    Raises: UserError if neither has the model."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--base {name}: no such folder; it needs config.json, model.safetensors and tokenizer.json")
    import huggingface_hub

    try:
        patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds
        unreachable = "the hub can't be reached (connect, and unset HF_HUB_OFFLINE), and its cache does not have it"
        whys = {
            "LocalEntryNotFoundError": unreachable,
            "OfflineModeIsEnabled": unreachable,
            "GatedRepoError": f"gated; accept its terms at https://huggingface.co/{name} and log in (hf auth login, or HF_TOKEN=...)",
            "RepositoryNotFoundError": "no such model on the hub, or a private one (log in with hf auth login, or HF_TOKEN=...)",
        }
        why = whys.get(type(error).__name__, f"the hub did not give it ({type(error).__name__})")
        raise UserError(f"--base {name}: not a local folder, and {why}; or give a folder that holds it") from None


class Workspace(NamedTuple):
    """What the stages share."""

    cfg: Config
    out: Path
    budget: float  # total cost of one document, SKIP = 1
    setup: evaluation.Setup  # with the slow parameters as they are so far
    tokenizer: Any
    classes: np.ndarray  # (V, 8) kinds of code in each token
    repos: dict[str, list[data.SourceFile]]
    texts: dict[str, list]  # what the stages will read: meta, meta_valid (Excerpts), train, valid, test (Tokens)
    skipped: Counter  # files, by the reason
    own_files: int = 0  # of one's own repository, if that is what the evaluation reads


def open_setup(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[evaluation.Setup, float, Any, tuple[int, ...]]:
    """Load the model -> (setup with untrained slow parameters, nothing of it placed yet and the frozen weights in
    NumPy, its budget, tokenizer, tokens that end a text).

    Raises: UserError, DataError, ModelError."""
    folder = base_folder(cfg.base or SCALES[cfg.scale].base)
    model, params = lm.load_model(folder, cfg.dtype)
    tokenizer = data.load_tokenizer(folder)
    if (largest := data.largest_id(tokenizer)) >= model.vocab:
        raise UserError(f"{folder}: its tokenizer has {largest + 1} tokens and the model {model.vocab}; they don't belong together")
    if 2 * cfg.chunk > model.positions:
        raise UserError(f"--chunk {cfg.chunk}: two chunks must fit the model's {model.positions} positions")
    fast = fast_weights(cfg, model)
    lower, upper = lm.split_blocks(lm.freeze(model, params), fast.blocks[0])
    slow = lm.init_slow(jax.random.key(cfg.seed), model, fast)
    flops = np.asarray(lm.count_flops(model, fast, cfg.chunk))
    costs = np.asarray(rl.NOMINAL) if cfg.cost == "nominal" else flops / flops[0]
    least, default, most = cfg.chunks * costs[0], cfg.chunks * (costs[0] + costs[1]) / 2, cfg.chunks * costs[-1]
    budget = default if cfg.budget is None else cfg.budget
    if not least <= budget < 1e30:  # finite in float32 too
        raise UserError(
            f"--budget {budget:g}: it is for a whole document, of which reading {cfg.chunks} chunks without learning already costs "
            f"{least:g}; give a number from that on ({default:g} is half of UPDATE_1's learning)"
        )
    if budget >= most:
        print(f"note: --budget {budget:g} can't bind: UPDATE_4 on every chunk costs {most:.4g}", file=sys.stderr)
    env = rl.Env(jnp.asarray(costs, jnp.float32), jnp.float32(budget))
    setup = evaluation.Setup(model, fast, cfg.chunk, lower, upper, slow, env, flops / flops[0], mesh)
    return setup, budget, tokenizer, data.end_tokens(folder, tokenizer)


def place_frozen(setup: evaluation.Setup) -> evaluation.Setup:
    """With the frozen weights laid out on the mesh, the embeddings once."""
    lower = lm.place_lower(setup.mesh, setup.lower)
    return setup._replace(lower=lower, upper=lower | {"h": lm.place(setup.mesh, setup.upper["h"])})


def open_workspace(cfg: Config, out: Path, mesh: jax.sharding.Mesh) -> Workspace:
    """Load the model and the documents; all that can be wrong with the input shows here.

    Raises: UserError, DataError, ModelError."""
    setup, budget, tokenizer, (end, *_) = open_setup(cfg, mesh)
    skipped: Counter = Counter()
    cuts = document_cuts(cfg, out)
    selection = data.Selection(cfg.text_column, cfg.subset, cfg.data_dir, cfg.dataset_split)
    need = data.Need(list(cuts.values()), tokenizer, cfg.chunk)
    own = data.one_repository(cfg.data)
    repos = data.load_repos(training_data(cfg), skipped, cfg.files == "all" and not own, selection, need)
    slow, env = lm.place(mesh, (setup.slow, setup.env))
    setup = place_frozen(setup)._replace(slow=slow, env=env)
    classes = rl.token_classes(data.token_texts(tokenizer))
    work = Workspace(cfg, out, budget, setup, tokenizer, classes, repos, {}, skipped)
    for name, cut in cuts.items():
        if name == "test" and own:
            (files,) = data.load_repos(cfg.data, skipped, cfg.files == "all").values()
            work = work._replace(own_files=len(files))
            files = data.without_copies(files, (file for repo in repos.values() for file in repo), skipped)
            work.texts[name] = [read_text(work, d) for d in data.own_documents(files, tokenizer, cfg.chunk, cfg.chunks, cut.limit, end)]
            continue
        found = data.documents(repos, tokenizer=tokenizer, chunk=cfg.chunk, end=end, **cut._asdict())
        work.texts[name] = found if name in ("meta", "meta_valid") else [read_text(work, d) for d in found]
    if "test" in cuts and len({t.repo for t in work.texts["test"]}) < 2:
        what = "--test-documents 1 is one document" if own else "only one repository of the test split is long enough"
        raise UserError(f"{what}, and intervals need two; use more code, more --test-documents or fewer --chunks")
    return work


def training_data(cfg: Config) -> str:
    """The source of all documents but those of the evaluation: --data, unless that is one repository, which
    can't be split into some to train on and others that no stage saw."""
    return "stdlib" if data.one_repository(cfg.data) else cfg.data


def document_cuts(cfg: Config, out: Path) -> dict[str, data.Cut]:
    """The documents that the stages to come will read, by their names in Workspace.texts."""
    cuts = {}
    if cfg.stage == "ttt" or (cfg.stage in ("all", "policy") and not weights_folder(cfg, out)):
        cuts |= {"meta": data.Cut("train", cfg.meta_chunks, 8, 400), "meta_valid": data.Cut("valid", cfg.meta_chunks, 1, 4)}
    if cfg.stage in ("all", "policy"):
        cuts["train"] = data.Cut("train", cfg.chunks, 4, cfg.train_documents)
    if cfg.stage in ("all", "policy", "eval"):
        cuts["valid"] = data.Cut("valid", cfg.chunks, 1, cfg.valid_documents)
    if cfg.stage in ("all", "eval"):
        cuts["test"] = data.Cut("test", cfg.chunks, cfg.per_repository, cfg.test_documents)
    return cuts


REMAT_WIDTH = 1024  # of models whose meta-gradient is short of memory


def fast_weights(cfg: Config, model: lm.Model) -> lm.Fast:
    """What learns, by these settings, in this model.

    Raises: UserError if it lacks one of --fast-blocks."""
    given = {block + model.layers if block < 0 else block for block in cfg.fast_blocks}
    blocks = tuple(sorted(given)) or tuple(range(model.layers - max(model.layers // 4, 1), model.layers))
    if blocks[0] < 0 or blocks[-1] >= model.layers:
        raise UserError(f"--fast-blocks {' '.join(map(str, cfg.fast_blocks))}: the model's blocks are 0 to {model.layers - 1}")
    scale = SCALES[cfg.scale]
    hidden = cfg.hidden or (scale.rank if cfg.fast == "lora" else scale.hidden)
    return lm.Fast(blocks, hidden, cfg.fast, cfg.objective, cfg.inner_optimizer, cfg.momentum, remat=model.width >= REMAT_WIDTH)


def read_text(work: Workspace, excerpt: data.Excerpt) -> evaluation.Tokens:
    """A document with its text features, as the policy's stages and the evaluation read it."""
    text_TU = rl.text_features(excerpt.tokens, work.cfg.chunk, work.classes)
    return evaluation.Tokens(excerpt.repo, excerpt.tokens, text_TU, excerpt.origin)


LEARNER = ("objective", "fast", "fast_blocks", "hidden", "inner_optimizer", "momentum")


def ships(cfg: Config) -> bool:
    """Whether there are trained weights in assets/ and they fit these settings, resolved or not."""
    fits = (
        cfg.scale == "tiny"
        and cfg.base is None
        and cfg.chunk in (None, SCALES["tiny"].chunk)
        and all(getattr(cfg, name) == getattr(Config, name) for name in LEARNER)
    )
    return fits and not cfg.fresh and (ASSETS / "tiny" / "ttt.safetensors").exists()


def given_weights(cfg: Config) -> Path | None:
    """Where trained fast weights are before anything is trained: in --weights, in assets/, or nowhere."""
    return cfg.weights or (ASSETS / "tiny" if ships(cfg) else None)


def weights_folder(cfg: Config, out: Path) -> Path | None:
    """Where trained fast weights are: in the run that is resumed, or nowhere yet where it was stopped while it trained
    them, or as they were given."""
    if cfg.resume and (out / "ttt.safetensors").exists():
        return out
    if cfg.resume and (out / "ttt_state.safetensors").exists():
        return None
    return given_weights(cfg)


def learner(setup: evaluation.Setup) -> dict[str, Any]:
    """What trained fast weights belong to that their names and shapes don't tell: saved with them, and compared. The
    base model is known by its last norm."""
    fast, last = setup.fast, setup.upper[setup.model.names.norm]["weight"]
    base = digest({"norm": np.asarray(last, np.float32)})
    return {"base": base, "fast_blocks": list(fast.blocks), "inner_optimizer": fast.optimizer, "momentum": fast.momentum}


def load_slow(setup: evaluation.Setup, folder: Path) -> Any:
    """The trained slow parameters in `folder`, on the mesh.

    Raises: UserError if there are none or they are another learner's, ModelError if they are damaged or of other shapes."""
    if not (folder / "ttt.safetensors").exists():
        raise UserError(f"--weights {folder}: it has no trained fast weights; give the folder of a run of --stage ttt, policy or all")
    slow, meta = load_state(folder / "ttt.safetensors", setup.slow)
    trained = meta.get("learner", {})
    if other := [f"--{name.replace('_', '-')}" for name, value in learner(setup).items() if trained.get(name, value) != value]:
        raise UserError(f"--weights {folder}: trained with another {', '.join(other)}; give it as it was, or other weights")
    return lm.place(setup.mesh, slow)


def open_generator(cfg: Config) -> evaluation.Generator:
    """For eval.generate, of a resolved configuration: the model with the trained fast weights and the first
    policy of --weights or assets/, or, where there are none, with fast weights as they are before training
    and no policy.

    Raises: UserError, DataError, ModelError."""
    setup, budget, tokenizer, ends = open_setup(cfg, lm.make_mesh())
    setup = place_frozen(setup)
    folder, judged = given_weights(cfg), None
    if folder is None:
        print("note: no trained fast weights for these settings; untrained ones will learn (--weights takes a run's)", file=sys.stderr)
    else:
        setup = setup._replace(slow=load_slow(setup, folder))
        if (folder / "policy.safetensors").exists():
            policy, meta = load_state(folder / "policy.safetensors", rl.init_policy(jax.random.key(0)))
            judged = evaluation.Judged(policy, meta["calibration"] if meta.get("cost") == cfg.cost else {})
    model = setup.model._replace(dtype="float32") if jax.default_backend() == "cpu" else setup.model
    frozen, classes = lm.join_blocks(model, setup.lower, setup.upper), rl.token_classes(data.token_texts(tokenizer))
    return evaluation.Generator(setup.at(budget / cfg.chunks), model, frozen, tokenizer, ends, classes, judged)


def policy_name(i: int) -> str:
    """What the i-th seed's files and metrics are called."""
    return f"policy_{i}" if i else "policy"


def terms(work: Workspace) -> str:
    """What a policy is calibrated for, in words: saved with it, compared, and printed."""
    cfg = work.cfg
    kind = "repositories of " if cfg.files == "all" and not data.one_repository(cfg.data) else ""
    part = "".join(f", {p}" for p in (cfg.subset, cfg.data_dir, cfg.dataset_split, cfg.text_column) if p)
    text = f"{cfg.chunks} chunks of {cfg.chunk} tokens of {kind}{training_data(cfg)}{part}"
    return f"a budget of {work.budget:.6g} {cfg.cost} on {text}, with {cfg.valid_documents} documents"


def load_policies(work: Workspace, folder: Path | None) -> list[evaluation.Judged]:
    """The policies that belong to the fast weights in `folder`, calibrated anew if that was for another
    budget or other documents.

    Raises: UserError if there is none, ModelError if one is damaged."""
    if folder is None or not (folder / "policy.safetensors").exists():
        raise UserError("--stage eval: no trained weights for these settings; run the other stages first, or leave --stage out")
    policies: list[evaluation.Judged] = []
    while (path := folder / f"{policy_name(len(policies))}.safetensors").exists():
        policy, meta = load_state(path, rl.init_policy(jax.random.key(0)))
        known = meta["calibration"] if meta["terms"] == terms(work) else {}
        policies.append(evaluation.Judged(policy, known))
    return policies


def calibrated(work: Workspace, policies: list[rl.Policy]) -> list[evaluation.Judged]:
    """With what validation documents say of them; gates and oracle along with the first."""
    return list(map(evaluation.Judged, policies, evaluation.calibrate(work.setup, work.texts["valid"], policies, progress)))


# --- 5. Stage ttt: meta-learn how to learn --------------------------------------------------------

META_RATE, STEP_RATE = 2e-3, 2e-2  # Adam's, for W_0 and for the logarithms of the step sizes


def meta_optimizer(steps: int) -> optax.GradientTransformation:
    """Adam; a step whose gradient is not finite is dropped, and counted in `total_notfinite`."""
    decay = lambda rate: optax.cosine_decay_schedule(rate, max(steps, 1), alpha=0.05)
    rates: dict[Any, Any] = {"steps": optax.adam(decay(STEP_RATE), b2=0.99), "weights": optax.adam(decay(META_RATE), b2=0.99)}
    label = lambda slow: {k: jax.tree.map(lambda _: "steps" if k == "log_step" else "weights", v) for k, v in slow.items()}
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(rates, label)), 2**30)


def meta_gradient(mesh, model, fast, chunk, lower, upper, slow, tokens_BN, actions_BT):
    """Of a batch of documents spread over the mesh, each read with its own actions -> (loss, gradients in
    `slow`), whole on every device."""

    def row(lower, shared, inputs):
        (upper, slow), (tokens, actions) = shared, inputs
        windows = lm.windows(model, fast, lower, upper, tokens, chunk)
        objective = lambda s: lm.document_loss(model, fast, upper, s, windows, actions)
        (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(slow)
        return loss, grads

    def device(lower, shared, documents):
        found = jax.lax.map(partial(row, lower, shared), documents)
        return jax.lax.pmean(jax.tree.map(lambda x: x.mean(0), found), lm.AXES)

    return lm.on_devices(mesh, device, lower, (upper, slow), (tokens_BN, actions_BT), lm.WHOLE)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=(7, 8))
def meta_step(mesh, model, fast, chunk, steps, lower, upper, slow, opt_state, tokens_BN, actions_BT):
    """One outer step of `steps` -> (slow parameters, state of the optimiser, loss, norm of the gradient)."""
    loss, grads = meta_gradient(mesh, model, fast, chunk, lower, upper, slow, tokens_BN, actions_BT)
    updates, opt_state = meta_optimizer(steps).update(grads, opt_state, slow)
    return optax.apply_updates(slow, updates), opt_state, loss, optax.tree.norm(grads)


def random_actions(rng: np.random.Generator, documents: int, chunks: int) -> np.ndarray:
    """Actions (documents, chunks), each document with a mix of its own: from one action nearly
    everywhere, as in the fixed schedules, to all of them alike."""
    mixes = rng.dirichlet(np.full(len(rl.ACTIONS), 0.5), documents)
    return np.stack([rng.choice(len(rl.ACTIONS), chunks, p=mix) for mix in mixes])


def stage_ttt(work: Workspace) -> dict[str, Any]:
    """Meta-learn W_0 and the step sizes through the unrolled inner steps -> slow parameters."""
    cfg, setup = work.cfg, work.setup
    slow = load_slow(setup, cfg.weights) if cfg.weights else setup.slow
    opt_state, step = meta_optimizer(cfg.meta_steps).init(slow), 0
    checkpoint = work.out / "ttt_state.safetensors"
    if cfg.resume and checkpoint.exists():
        (slow, opt_state), meta = load_state(checkpoint, (slow, opt_state))
        step = meta["step"]
    slow, opt_state = lm.place(setup.mesh, (slow, opt_state))
    log = Log(work.out, "ttt", step)
    documents = np.stack([t.tokens for t in work.texts["meta"]])
    valid = [(evaluation.read_prefix(setup, texts), len(texts)) for texts in evaluation.grouped(setup, work.texts["meta_valid"])]
    bar = progress(total=cfg.meta_steps, initial=step, desc="ttt", unit="step")
    while True:
        if step % 20 == 0 or step == cfg.meta_steps:
            losses = {name: valid_loss(setup, slow, valid, a) for name, a in evaluation.FIXED.items()}
            if not log.rows or "valid_skip" not in log.rows[-1]:  # a checkpoint's step has its line already
                log.add(step, {f"valid_{name}": loss for name, loss in losses.items()})
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
            save_state(checkpoint, (slow, opt_state), step=step)
        if step >= cfg.meta_steps:
            break
        rng = np.random.default_rng((cfg.seed, 1, step))
        rows = rng.choice(len(documents), cfg.batch, replace=len(documents) < cfg.batch)
        shape = (cfg.batch, cfg.meta_chunks)
        actions = random_actions(rng, *shape) if cfg.meta_action == "random" else np.full(shape, rl.ACTIONS.index(cfg.meta_action))
        slow, opt_state, loss, norm = meta_step(
            setup.mesh, setup.model, setup.fast, setup.chunk, cfg.meta_steps, setup.lower, setup.upper, slow, opt_state,
            *lm.place(setup.mesh, (documents[rows], actions.astype(np.int32)), lm.ROWS),
        )  # fmt: skip
        step += 1
        log.add(step, {"loss": loss, "gradient_norm": norm, "dropped": opt_state.total_notfinite})
        bar.update()
    bar.close()
    save_state(work.out / "ttt.safetensors", slow, steps=cfg.meta_steps, learner=learner(setup))
    return slow


@partial(jax.jit, static_argnums=(0, 1, 2))
def fixed_loss(mesh, model, fast, upper, slow, windows_N, action):
    """Mean losses (N,), nats per token, of documents, one on each device, under one action for all chunks."""

    def device(_, shared, windows_N):
        upper, slow, action = shared
        actions = jnp.broadcast_to(action, windows_N.targets_C.shape[1])
        return jax.lax.map(lambda windows: lm.document_loss(model, fast, upper, slow, windows, actions)[0], windows_N)

    return lm.on_devices(mesh, device, {}, (upper, slow, action), windows_N)


def valid_loss(setup: evaluation.Setup, slow, groups: list[tuple[lm.Window, int]], action: int) -> float:
    """Mean of `fixed_loss` over groups of documents, each with its size: the last group is filled up."""
    loss_of = lambda windows: fixed_loss(setup.mesh, setup.model, setup.fast, setup.upper, slow, windows, np.int32(action))
    return float(np.mean(np.concatenate([evaluation.fetch(loss_of(windows))[:count] for windows, count in groups])))


# --- 6. Stage policy: learn when to learn ---------------------------------------------------------


def stage_policy(work: Workspace) -> tuple[list[evaluation.Judged], list[dict[str, float]]]:
    """For each seed a warm start and PPO under the budget, then calibration -> (policies, training metrics
    of the first). What the warm starts learn from is read once for all seeds."""
    cfg, policies, rows = work.cfg, [], []
    lessons: Any = None
    for i in range(cfg.seeds):
        if lessons is None and not (cfg.resume and (work.out / f"{policy_name(i)}_state.safetensors").exists()):
            blind = new_trainer(work, 0).policy
            places = progress(teacher_places(cfg), "warm start", unit="batch")
            seen = [read_batch(work, place, blind, (cfg.seed, 4, place)) for place in places]
            lessons = jax.tree.map(lambda *x: jnp.concatenate(x), *seen)
        policy, metrics = train_policy(work, i, lessons)
        policies.append(policy)
        rows.append(metrics)
    judged = calibrated(work, policies)
    for i, (policy, calibration) in enumerate(judged):
        path = work.out / f"{policy_name(i)}.safetensors"
        save_state(path, policy, iterations=cfg.iterations, terms=terms(work), cost=cfg.cost, calibration=calibration)
    return judged, rows[0]


def ppo_of(cfg: Config) -> rl.Ppo:
    """The hyperparameters of PPO: rewards come from eight chunks of each document, whatever its length."""
    return rl.Ppo(credit=max(cfg.chunks // 8, 1) if cfg.reward == "credit" else 0)


def new_trainer(work: Workspace, i: int) -> rl.Trainer:
    """The i-th seed's trainer before any training, on the mesh."""
    cfg = work.cfg
    key = jax.random.fold_in(jax.random.key(cfg.seed + i), 2)
    trainer = rl.init_trainer(key, ppo_of(cfg), work.setup.env, cfg.chunks, cfg.drop_features, cfg.look_ahead)
    return lm.place(work.setup.mesh, trainer)


def teacher_places(cfg: Config) -> range:
    """Where the warm start's batches begin; those of PPO come after them."""
    return range(0, cfg.teacher_documents, cfg.batch)


def read_batch(work: Workspace, place: int, policy: rl.Policy, seed: tuple[int, ...]) -> tuple[rl.Step, Any]:
    """The --batch training documents from `place` on, in an order that reads each before any is read again
    -> (steps, rewards)."""
    cfg, setup, texts = work.cfg, work.setup, work.texts["train"]
    order = lambda epoch: np.random.default_rng((cfg.seed, 2, epoch)).permutation(len(texts))
    chosen = [texts[order(p // len(texts))[p % len(texts)]] for p in range(place, place + cfg.batch)]
    documents = lm.place(setup.mesh, (np.stack([t.tokens for t in chosen]), np.stack([t.text_TU for t in chosen])), lm.ROWS)
    frozen = (setup.model, setup.fast, ppo_of(cfg).credit, setup.chunk, setup.lower, setup.upper, setup.slow, setup.env)
    key = jax.random.key(int(np.random.default_rng(seed).integers(2**31)))
    return finite_documents(*rl.rollout(setup.mesh, *frozen, *documents, policy, key))


def finite_documents(steps: rl.Step, reward_NT: Any) -> tuple[rl.Step, Any]:
    """Without the documents in which learning ran away: one would make the whole batch NaN.

    Raises: UserError if none is left."""
    keep = np.isfinite(np.asarray(reward_NT)).all(1) & np.isfinite(np.asarray(steps.features_U)).all((1, 2))
    if keep.all():
        return steps, reward_NT
    if not keep.any():
        raise UserError("the loss was not finite in any document of a batch: the fast weights ran away; learn them anew with --fresh")
    return jax.tree.map(lambda x: x[keep], (steps, reward_NT))


def train_policy(work: Workspace, i: int, lessons: Any) -> tuple[rl.Policy, list[dict[str, float]]]:
    """Warm start (a checkpoint to resume needs none), then PPO, for the i-th seed -> (policy, metrics)."""
    cfg, env, ppo = work.cfg, work.setup.env, ppo_of(work.cfg)
    key, trainer = jax.random.fold_in(jax.random.key(cfg.seed + i), 3), new_trainer(work, i)
    checkpoint = work.out / f"{policy_name(i)}_state.safetensors"
    if cfg.resume and checkpoint.exists():
        trainer = lm.place(work.setup.mesh, load_state(checkpoint, trainer)[0])
    else:
        steps, rewards = lessons
        trainer, error = rl.teach(ppo, steps, rewards, trainer, key)
        figures = {"unexplained": error, "gain": rewards.mean(), "cost": steps.cost.mean()}
        Log(work.out, f"{policy_name(i)}_warm_start", -1).add(0, figures)
        save_state(checkpoint, trainer)
    log = Log(work.out, policy_name(i), int(trainer.iteration))
    bar = progress(total=cfg.iterations, initial=int(trainer.iteration), desc=policy_name(i), unit="iteration")
    while (step := int(trainer.iteration)) < cfg.iterations:
        place = (len(teacher_places(cfg)) + i * cfg.iterations + step) * cfg.batch
        steps, rewards = read_batch(work, place, trainer.policy, (cfg.seed, 3, i, step))
        trainer, figures = rl.train_iteration(ppo, env, steps, rewards, trainer, jax.random.fold_in(key, 1 + step))
        figures = {k: float(v) for k, v in figures.items()} | {"dropped_documents": float(cfg.batch - len(rewards))}
        log.add(step + 1, figures)
        save_state(checkpoint, trainer)
        bar.set_postfix({k: f"{figures[k]:.3f}" for k in ("loss", "gain", "cost", "lambda")})
        bar.update()
    bar.close()
    return trainer.policy, log.rows


# --- 7. Stage eval --------------------------------------------------------------------------------


def stage_eval(
    work: Workspace, policies: list[evaluation.Judged], training: list[dict[str, float]], facts: list[str], started: float
) -> str:
    """Every method on the test repositories: results.json, report.md, plots -> the verdict."""
    cfg, setup, texts = work.cfg, work.setup, work.texts["test"]
    costs = np.asarray(setup.env.costs_A, float)
    budgets, compared = (
        [float(np.float32(cfg.chunks * (costs[0] + s * (costs[1] - costs[0])))) for s in shares] for shares in (cfg.frontier, cfg.compare)
    )  # as the budget is kept, which may be among them
    settle = lambda b: evaluation.settle(setup.at(b), work.texts["valid"], policies[0], progress)
    settled = {b: settle(b) for b in compared if b != float(setup.env.budget)}
    found = evaluation.evaluate(setup, texts, policies, budgets, settled, cfg.seed, progress)
    tables = ("spend", "threshold", "unit")
    chosen = {name: {k: v for k, v in known.items() if k not in tables} for name, known in policies[0].calibration.items()}
    known = cfg.scale == "tiny" and cfg.base is None and cfg.data in ("stdlib", "packages", "pypi", "synthetic")
    about = {
        "scale": cfg.scale, "model": cfg.base or cfg.scale, "data": cfg.data, "files": cfg.files,
        "chunks_per_document": cfg.chunks, "documents": len(texts),
        "repositories": len({t.repo for t in texts}), "budget": work.budget, "budget_per_chunk": work.budget / cfg.chunks,
        "cost_model": cfg.cost, "seeds": len(policies), "calibration": chosen, "settled": {f"{b:g}": s for b, s in settled.items()},
        "unseen": "that no stage saw" if known else "that no stage here saw (what the base model read is not known)",
        "unit": "repositories", "names": [t.repo for t in texts],
        "looks_ahead": rl.looks_ahead(policies[0].policy),
    }  # fmt: skip
    if data.one_repository(cfg.data):
        about["unit"] = f"documents of the one repository {Path(cfg.data).expanduser().resolve().name}"
        about["by_file"] = evaluation.by_file(texts, found.reads, cfg.chunk)
        about["own_files"] = work.own_files
    results = about | evaluation.analyse(setup, found)
    if jax.process_index():
        return ""
    ratios = ", ".join(f"{a} {x:.2f}" for a, x in zip(rl.ACTIONS, setup.flops_A, strict=True))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    share = lambda name, key: results["methods"][name][key] / results["methods"]["update_4"][key]
    speed = "{} takes {:.3f} of UPDATE_4's seconds and {:.3f} of its FLOPs".format
    facts = [*facts, *(speed(name, share(name, "seconds"), share(name, "cost_flops")) for name in ("skip", "policy"))]
    if training:
        late = training[-(len(training) // 2 + 1) :]
        cost, limit = np.mean([r["cost"] for r in late]), late[-1]["limit"]
        facts.append(f"training cost over the last {len(late)} iterations: {cost:.3f} per chunk, {cost / limit - 1:+.1%} of the budget")
    facts = [
        *facts,
        f"FLOPs relative to SKIP: {ratios}",
        f"jax {jax.__version__} on {setup.mesh.size} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {cfg.dtype}",
        f"Python {sys.version.split()[0]}, {time.perf_counter() - started:.0f} s in all, peak memory {memory:.2f} GB",
        dropped_steps(work.out, found.reads),
    ]
    evaluation.save_reads(work.out / "reads.safetensors", found.reads)
    lm.write_atomic(work.out / "results.json", (json.dumps(results | {"facts": facts}, indent=2) + "\n").encode())
    return evaluation.draw(work.out, results | {"facts": facts}, found.reads, training)


def dropped_steps(out: Path, reads: dict[str, list[evaluation.Read]]) -> str:
    """How many steps of each kind were dropped because they were not finite, in this run's whole history."""
    rows = read_metrics(out / "metrics.jsonl")
    last = {row["stage"]: int(row["dropped"]) for row in rows if "dropped" in row}  # they count up
    documents = int(sum(row.get("dropped_documents", 0) for row in rows))
    inner = sum(r.dropped for rs in reads.values() for r in rs)
    ppo = sum(count for stage, count in last.items() if stage.startswith("policy"))
    return (
        f"dropped because not finite: {inner} inner steps of the evaluation, {last.get('ttt', 0)} outer steps, {ppo} steps and "
        f"{documents} documents of PPO"
    )


# --- 8. Stage pretrain: the small base model ------------------------------------------------------

TINY: dict[str, Any] = {"vocab": 8192, "positions": 512, "width": 256, "layers": 8, "heads": 4}
WINDOWS, MICRO = 16, 8  # of a step, and of one gradient


def pretrain_optimizer(steps: int) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the blocks' matrices, Adam for the rest; the step size warms
    up, stays, and falls to zero over the last eighth, so that a run can be ended at any time by
    resuming it with fewer steps. A step whose gradient is not finite is dropped."""

    def schedule(peak):
        decay, warmup = steps // 8, min(100, steps // 4)
        parts = [optax.linear_schedule(0, peak, warmup), optax.constant_schedule(peak), optax.linear_schedule(peak, 0, decay)]
        return optax.join_schedules(parts, [warmup, steps - decay])

    def dimensions(params):
        matrix = optax.contrib.MuonDimensionNumbers(0, 1)
        is_matrix = lambda path, x: matrix if path[0].key == "h" and x.ndim == 2 else None
        return jax.tree_util.tree_map_with_path(is_matrix, params)

    muon = optax.contrib.muon(
        schedule(0.025), weight_decay=0.01, adam_b2=0.95, adam_learning_rate=schedule(2e-3),
        muon_weight_dimension_numbers=dimensions,
    )  # fmt: skip
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), muon), 2**30)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def pretrain_step(mesh, model, optimizer_steps, params, opt_state, windows):
    """One step on windows spread over the mesh, every device with the whole model -> (params, state of the
    optimiser, loss)."""

    def device(_, params, windows):
        def accumulate(carry, micro):
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(partial(lm.language_loss, model))(params, micro)), None

        micros = windows.reshape(-1, min(MICRO, len(windows)), windows.shape[-1])
        zeros = jnp.zeros_like(params["ln_f"]["bias"], shape=()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(accumulate, zeros, micros)
        return jax.lax.pmean(jax.tree.map(lambda x: x / len(micros), total), lm.AXES)

    loss, grads = lm.on_devices(mesh, device, {}, params, windows, lm.WHOLE)
    updates, opt_state = pretrain_optimizer(optimizer_steps).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def sample_windows(tokens: np.ndarray, first: np.ndarray, power: float, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """(rows, length) windows: a package with probability proportional to its size ** power, then a
    place in it. `first` has the place of each package's first token."""
    size = np.diff(np.append(first, len(tokens)))
    package = rng.choice(len(first), rows, p=size**power / (size**power).sum())
    start = first[package] + rng.integers(0, np.maximum(size[package] - length, 1))
    return np.stack([tokens[s : s + length] for s in np.minimum(start, len(tokens) - length)]).astype(np.int32)


def stage_pretrain(cfg: Config, out: Path, mesh: jax.sharding.Mesh) -> None:
    """Train the tiny GPT-2 and its tokenizer on installed packages -> out/model/."""
    corpus = out / "tokens.safetensors"
    if jax.process_index() == 0 and not (corpus.exists() and (out / "model" / "tokenizer.json").exists()):
        skipped: Counter = Counter()
        tokenizer, tokens, size = data.pretraining_tokens([str(p) for p in cfg.packages_from], TINY["vocab"], skipped)
        (out / "model").mkdir(exist_ok=True)
        lm.write_atomic(out / "model" / "tokenizer.json", tokenizer.to_str().encode())
        write_state(corpus, {s: np.concatenate(t) for s, t in tokens.items()} | {"valid_bytes": np.asarray(size["valid"])})
        counts = {s: f"{len(t)} packages, {sum(map(len, t)):,} tokens, {size[s]:,} bytes" for s, t in tokens.items()}
        print(f"corpus: {counts}; skipped {dict(skipped)}")
    multihost_utils.sync_global_devices(corpus.name)
    tokens = lm.read_safetensors(corpus)
    train, valid, valid_bytes = (tokens[f"['{name}']"] for name in ("train", "valid", "valid_bytes"))
    bits_per_byte = len(valid) / int(valid_bytes) / np.log(2)  # for each nat per token
    model = lm.Model(**TINY, dtype=cfg.dtype)
    params = lm.init_gpt2(jax.random.key(cfg.seed), model)
    opt_state, step = pretrain_optimizer(cfg.pretrain_steps).init(params), 0
    checkpoint = out / "pretrain.safetensors"
    if cfg.resume and checkpoint.exists():
        (params, opt_state), meta = load_state(checkpoint, (params, opt_state))
        step = meta["step"]
    params, opt_state = lm.place(mesh, (params, opt_state))
    log = Log(out, "pretrain", step)
    loss_of = jax.jit(partial(lm.language_loss, model))
    end = data.load_tokenizer(out / "model").token_to_id(data.END_OF_TEXT)
    train_first, valid_first = (np.flatnonzero(split == end) for split in (train, valid))
    valid_windows = sample_windows(valid, valid_first, 1.0, np.random.default_rng(1234), 128, model.positions + 1)
    valid_windows = valid_windows.reshape(-1, MICRO, model.positions + 1)
    bar = progress(total=cfg.pretrain_steps, initial=step, desc="pretrain", unit="step")
    losses: list[float] = []
    while step < cfg.pretrain_steps:
        # The root of the size: a few large packages would otherwise be half of what the model ever sees.
        windows = sample_windows(train, train_first, 0.5, np.random.default_rng((cfg.seed, step)), WINDOWS, model.positions + 1)
        windows = lm.place(mesh, windows, lm.ROWS)
        params, opt_state, loss = pretrain_step(mesh, model, cfg.pretrain_steps, params, opt_state, windows)
        losses.append(float(loss))
        step += 1
        bar.update()
        if step % 100 == 0 or step == cfg.pretrain_steps:
            held_out = float(np.mean([loss_of(params, w) for w in valid_windows]))
            figures = {"tokens": step * WINDOWS * model.positions, "loss": np.mean(losses), "dropped": opt_state.total_notfinite}
            log.add(step, figures | {"valid_loss": held_out, "valid_bits_per_byte": held_out * bits_per_byte})
            bar.set_postfix(loss=f"{np.mean(losses):.3f}", valid=f"{held_out:.3f}")
            losses.clear()  # none from before the checkpoint, which a resumed run does not have
            save_state(checkpoint, (params, opt_state), step=step)
    bar.close()
    if jax.process_index() == 0:
        lm.save_gpt2(out / "model", model, params)


# --- 9. --check-devices ---------------------------------------------------------------------------

CHECK_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}  # of gradients, relative to the largest: devices add up in another order


def check_devices(cfg: Config) -> None:
    """Whether this machine, or these machines, compute what one device does, with the learner and dtype of these
    settings; prints as it goes.

    Raises: UserError with the first thing that is wrong."""
    mesh = open_mesh(cfg)
    kinds = ", ".join(sorted({d.device_kind for d in mesh.devices.flat}))
    print(f"mesh: data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} of {mesh.size} devices ({kinds}), {jax.process_count()} processes")
    spread = lambda x: lm.place(mesh, x, lm.ROWS)

    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x.sum(), lm.AXES), mesh=mesh, in_specs=lm.ROWS, out_specs=lm.WHOLE))
    if (found := int(total(spread(np.arange(mesh.size))))) != (expected := mesh.size * (mesh.size - 1) // 2):
        raise UserError(f"the devices' numbers add up to {found} instead of {expected}: collectives between devices are broken")
    hosts = multihost_utils.process_allgather(np.asarray([jax.process_index()]), tiled=True)
    if hosts.tolist() != list(range(jax.process_count())):
        raise UserError(f"hosts gathered as {hosts.tolist()}: collectives between hosts are broken")
    print("collectives: right")

    dtype, chunk, chunks = cfg.dtype or native_dtype(), 8, 3
    model = lm.Model(vocab=97, positions=16, width=16 * mesh.shape["fsdp"], layers=2, heads=2, dtype=dtype)
    fast = lm.Fast((1,), 8, cfg.fast, cfg.objective, cfg.inner_optimizer, cfg.momentum)
    lower, upper = lm.split_blocks(lm.init_gpt2(jax.random.key(0), model), 1)
    slow = lm.init_slow(jax.random.key(1), model, fast)
    rng = np.random.default_rng(0)
    documents = rng.integers(0, model.vocab, (mesh.size, chunks * chunk + 1), np.int32), random_actions(rng, mesh.size, chunks)
    split = lm.place_lower(mesh, lower)
    if mesh.shape["fsdp"] > 1:
        for name, x in lm.flatten(split["h"]).items():
            whole, parts = lm.flatten(lower["h"][0])[name][None], x.addressable_shards
            if any(part.data.size * mesh.shape["fsdp"] != x.size or np.any(part.data != whole[part.index]) for part in parts):
                raise UserError(f"{name} is not split over fsdp as it should be")
        print("frozen blocks: split over fsdp")

    gradient = jax.jit(meta_gradient, static_argnums=(0, 1, 2, 3))
    one = lm.make_mesh(devices=jax.local_devices())
    loss, grads = gradient(mesh, model, fast, chunk, split, lm.place(mesh, upper), lm.place(mesh, slow), *map(spread, documents))
    alone, wanted = gradient(one, model, fast, chunk, *lm.place(one, (lower, upper, slow)), *lm.place(one, documents))
    error = lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max() / (np.abs(np.asarray(y)).max() + 1e-12))
    worst = max(jax.tree.leaves(jax.tree.map(error, (loss, grads), (alone, wanted))))
    if not worst < CHECK_TOLERANCE[dtype]:
        raise UserError(f"loss or meta-gradient are off by {worst:.1e} from one device's: the devices compute differently")
    learner = f"{fast.kind}, {fast.objective}, {fast.optimizer}, {dtype}"
    print(f"loss and meta-gradient of {learner}: as on one device (largest difference {worst:.1e})")
    print("PASS")


# --- 10. The job ----------------------------------------------------------------------------------


def run(cfg: Config) -> None:
    """Do what was asked for, from settings as they were given; `launch` explains what it raises."""
    started = time.perf_counter()
    join_hosts(cfg)
    if cfg.check_devices:
        check_devices(cfg)
        return
    mesh = open_mesh(cfg)
    cfg = resolve(cfg, mesh.size)
    out = on_first_host(lambda: choose_folder(cfg))
    if cfg.stage == "pretrain":
        spread_evenly(mesh, WINDOWS, f"the {WINDOWS} windows of a step")
        with claimed(cfg, out) as out:
            stage_pretrain(cfg, out, mesh)
        return
    if cfg.stage != "eval":
        spread_evenly(mesh, cfg.batch, f"--batch {cfg.batch}")
    work = open_workspace(cfg, out, mesh)
    if jax.process_count() > 1:
        check_same(work)
    folder = None if cfg.stage == "ttt" else weights_folder(cfg, out)
    slow = load_slow(work.setup, folder) if folder else None
    policies = load_policies(work, folder) if cfg.stage == "eval" else []
    with claimed(cfg, out) as out:
        run_stages(work._replace(out=out), folder, slow, policies, started)


def run_stages(work: Workspace, folder: Path | None, slow: Any, policies: list[evaluation.Judged], started: float) -> None:
    """The stages from ttt on, with what was loaded of trained weights from `folder`."""
    cfg, out = work.cfg, work.out
    training: list[dict[str, float]] = []
    own = f"one repository, and {len(work.repos)} of {training_data(cfg)} for validation" if data.one_repository(cfg.data) else ""
    print(f"PonderTTT: {cfg.base or cfg.scale} on {cfg.data} ({own or f'{len(work.repos)} repositories'}); run folder {out}")
    own_start = not folder or (folder == out and (out / "ttt_state.safetensors").exists())
    source = None if own_start else given_weights(cfg)  # of a resumed run too
    learned = os.path.relpath(source) if source else f"meta-learned in this run, {cfg.meta_steps} steps"
    facts = [f"fast weights' start and step sizes: {learned}"]
    if cfg.stage != "ttt":
        decided = os.path.relpath(folder) if folder and policies else f"trained in this run, {cfg.iterations} iterations"
        facts.append(f"policy: {decided}; calibrated for {terms(work)}")
    facts.append(f"files skipped: {', '.join(f'{n} {why}' for why, n in work.skipped.most_common() if n) or 'none'}")
    print("\n".join(f"  {fact}" for fact in facts))

    if slow is None:
        slow = stage_ttt(work)
    elif cfg.stage in ("all", "policy") and folder != out:  # a run's folder is whole, for --weights
        save_state(out / "ttt.safetensors", slow, learner=learner(work.setup))
    work = work._replace(setup=work.setup._replace(slow=slow))
    if cfg.stage in ("all", "policy"):
        policies, training = stage_policy(work)
    if cfg.stage in ("all", "eval"):
        if not all(p.calibration for p in policies):
            policies = calibrated(work, [p.policy for p in policies])
        print(stage_eval(work, policies, training, facts, started))
        print(f"report: {out / 'report.md'}")


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: Exception) -> str | None:
    """What went wrong and what to do, in one line; None if it is a fault of the program."""
    if isinstance(error, MemoryError) or (isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        return "out of memory; lower --chunk, --chunks, --meta-chunks or --hidden, or take a smaller --scale"
    if isinstance(error, jax.errors.JaxRuntimeError):
        if not jax.distributed.is_initialized():
            return None
        return f"another host stopped, and its own output says why ({str(error).splitlines()[0][:200]})"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error}; free some space, and the same command with --resume continues"
    return str(error)


def keep_memory() -> None:
    """Have the C library keep what is freed. On a CPU each call of a program takes its temporary memory anew; where that
    goes back to the system in between, clearing its pages is a sixth to a quarter of an UPDATE_1's time. Of a GPU's memory
    take nine tenths, unless the environment says otherwise: JAX's own three quarters may be too few for `xl`."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-3, 1 << 27)  # M_MMAP_THRESHOLD: up to this size memory is the heap's,
        libc.mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD: of which so much may lie idle at its end
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; both at once are refused
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")


def launch(job: Callable[[], None]) -> None:
    """Run a job with a persistent compilation cache; what the user can mend ends in one line and exit code 2."""
    keep_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(data.cache_folder()))
    name = Path(sys.argv[0]).name
    try:
        job()
    except (UserError, data.DataError, lm.ModelError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if (text := explain(error)) is None:
            raise
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # the message has a line of its own
        print(f"{name}: {text}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command with --resume continues, once its run folder was named", file=sys.stderr)
        leave(130)


def leave(code: int) -> None:
    """One of several hosts leaves at once: an orderly exit waits for the others, who wait for this one."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """The command line."""
    launch(lambda: run(parse()))


if __name__ == "__main__":
    main()
