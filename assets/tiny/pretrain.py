"""Train the small base model that ships with this project: the tokenizer, and a tiny GPT-2 for Python.

    python assets/tiny/pretrain.py --out runs/pretrain [--packages-from SITE_PACKAGES] [--resume]

It reads the Python packages that are installed here under permissive licences, without near-copies of the
standard library, which the default run of ponder.py then reads as code that the model never saw.
"""

import dataclasses
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
import optax.contrib
import safetensors.numpy
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import data
import eval as evaluation
import model as lm
import ponder

TINY = lm.Model(8192, 512, width=256, layers=8, heads=4, kv_heads=4, head_width=64, hidden=1024)
WINDOWS, EVERY, LOSS_ROWS = 16, 100, 256  # of a step; steps between checkpoints; logits held at once
PERMISSIVE = r"(?i)\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Unlicense|0BSD|HPND|Zlib)\b"
COPYLEFT = r"(?i)GPL|Mozilla|MPL|EPL|Eclipse|CDDL|EUPL|Proprietary|NVIDIA"


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """All settings."""

    out: Path = Path("runs/pretrain")  # The run's folder; the model is in its folder model.
    steps: int = 2500  # Optimiser steps, each on 16 windows of 512 tokens.
    packages_from: tuple[Path, ...] = ()  # Further site-packages folders, beside those of this Python.
    dtype: Literal["float32", "bfloat16"] | None = None  # Of products; left out: what the hardware does fast.
    seed: int = 0  # Of the weights and the windows.
    resume: bool = False  # Continue the run in --out.


def read_packages(folders: Iterable[Path], skipped: Counter) -> Iterator[data.SourceFile]:
    """Yield the Python files, without tests, of the installed distributions with a permissive licence."""
    paths, seen = [path for path in [*sys.path, *map(str, folders)] if path and Path(path).is_dir()], set()
    name_of = lambda package: str(package.metadata["Name"]).lower().replace("_", "-")
    for package in sorted(distributions(path=paths), key=name_of):
        name, meta = name_of(package), package.metadata
        classifiers = [line for line in meta.get_all("Classifier") or [] if line.startswith("License")]
        licence = f"{meta.get('License-Expression')}; {str(meta.get('License'))[:100]}; {classifiers}"
        if name in seen or not re.search(PERMISSIVE, licence) or re.search(COPYLEFT, licence):
            continue
        seen.add(name)
        for file in sorted(package.files or [], key=str):
            code = file.suffix == ".py" and not (data.NOT_OWN | data.TESTS) & set(file.parts)
            if code and (text := data.read_text(Path(str(package.locate_file(file))), skipped)):
                yield data.SourceFile(name, file.as_posix(), text)


def drop_near_copies(files: Iterable[data.SourceFile], skipped: Counter) -> Iterator[data.SourceFile]:
    """Drop files that share 15 % of their long lines with the standard library, or half with those kept."""
    standard = data.read_folder(Path(sysconfig.get_path("stdlib")), Counter())
    forbidden, kept = data.long_lines(file for own in standard.values() for file in own), set()
    for file in files:
        lines = data.long_lines([file])
        near_copy = lambda known, share: len(lines & known) > share * len(lines)
        if near_copy(forbidden, data.LEAK) or near_copy(kept, data.SAME):
            skipped["near-copy"] += 1
        else:
            kept |= lines
            yield file


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab` tokens, as in GPT-2 (Radford et al. 2019, section 2.2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"vocab_size": vocab, "special_tokens": [data.END_OF_TEXT], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def open_corpus(cfg: Pretrain) -> dict[str, np.ndarray]:
    """Read the run's tokens, or make them first: packages one after the other, each behind an end of text
    -> {"train", "valid", "valid_bytes": of its text}. Raises: UserError if there are too few packages."""
    path, folder, skipped = cfg.out / "corpus.safetensors", cfg.out / "model", Counter()
    if path.exists():
        return lm.load_state(path)[0]
    texts: dict[str, dict[str, list[str]]] = {split: {} for split in data.SPLITS}
    for file in drop_near_copies(read_packages(cfg.packages_from, skipped), skipped):
        texts[data.split_of(file.repo)].setdefault(file.repo, []).append(data.with_path(file))
    trained_on = (x for own in texts["train"].values() for x in own[::4])  # plenty for 8,192 tokens
    tokenizer = train_tokenizer(trained_on, TINY.vocab)
    found = {"valid_bytes": np.asarray(sum(len(x.encode()) for own in texts["valid"].values() for x in own))}
    for split in ("train", "valid"):
        packages = [x for own in texts[split].values() for x in ([0], *data.encode(tokenizer, own))]
        found[split] = np.concatenate([[], *packages]).astype(np.uint16)
        enough = len(found[split]) > TINY.positions + 1
        data.require(enough, f"too few packages to {split} on; give more with --packages-from SITE_PACKAGES")
        print(f"{split}: {len(texts[split])} packages, {len(found[split]):,} tokens", flush=True)
    print(f"files skipped: {dict(skipped)}", flush=True)
    folder.mkdir(exist_ok=True)
    data.write_atomic(folder / "tokenizer.json", tokenizer.to_str().encode())
    lm.save_state(path, found)
    return found


def sample_windows(tokens: np.ndarray, power: float, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw windows (count, positions + 1): a package in proportion to its size ** power, a place in it."""
    length, first = TINY.positions + 1, np.flatnonzero(tokens == 0)  # the end of text is token 0
    size = np.diff(np.append(first, len(tokens)))
    package = rng.choice(len(first), count, p=size**power / (size**power).sum())
    start = first[package] + rng.integers(0, np.maximum(size[package] - length, 1))
    place = np.minimum(start, len(tokens) - length)[:, None] + np.arange(length)
    return tokens[place].astype(np.int32)


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """Make Muon (Jordan et al. 2024) for the blocks' matrices, Adam for the rest; drop what is not finite.
    The step size warms up, stays, and falls to zero over the last eighth of the steps."""

    def schedule(peak: float):
        warmup, decay = min(100, steps // 4), steps // 8
        rise, fall = optax.linear_schedule(0, peak, warmup), optax.linear_schedule(peak, 0, decay)
        return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, steps - decay])

    def dimensions(params):
        matrix = optax.contrib.MuonDimensionNumbers(0, 1)
        is_matrix = lambda path, x: matrix if path[0].key == "blocks" and x.ndim == 2 else None
        return jax.tree_util.tree_map_with_path(is_matrix, params)

    options = {"weight_decay": 0.01, "adam_b2": 0.95, "muon_weight_dimension_numbers": dimensions}
    muon = optax.contrib.muon(schedule(0.025), adam_learning_rate=schedule(2e-3), **options)
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), muon), 2**30)


def language_loss(model: lm.Model, params: lm.Params, tokens_BS):
    """Compute the mean next-token cross-entropy of windows (B, S+1), nats, a few rows of logits at a time."""
    targets_BS = tokens_BS[:, 1:]
    x_BSD = lm.embed(model, params, tokens_BS[:, :-1])
    x_BSD = lm.run_blocks(model, lm.stack_blocks(params["blocks"]), x_BSD)
    rows = max(n for n in range(1, LOSS_ROWS + 1) if targets_BS.size % n == 0)
    parts = x_BSD.reshape(-1, rows, model.width), targets_BS.reshape(-1, rows)
    return jax.lax.map(lambda p: lm.token_losses(lm.logits(model, params, p[0]), p[1]), parts).mean()


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def pretrain_step(model: lm.Model, steps: int, params, opt_state, windows):
    """Take one step of `steps`, on windows (count, positions + 1) -> (params, optimiser state, loss)."""
    loss, gradient = jax.value_and_grad(partial(language_loss, model))(params, windows)
    updates, opt_state = make_optimizer(steps).update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def pretrain(cfg: Pretrain) -> None:
    """Train the tokenizer and the model -> OUT/model. Raises: UserError."""
    ponder.claim_folder(cfg, ponder.choose_folder(cfg))
    corpus, model = open_corpus(cfg), TINY._replace(dtype=cfg.dtype or lm.native_dtype())
    params, done = lm.init_params(jax.random.key(cfg.seed), model), 0
    state, checkpoint = (params, make_optimizer(cfg.steps).init(params)), cfg.out / "pretrain.safetensors"
    if cfg.resume and checkpoint.exists():
        state, meta = lm.load_state(checkpoint, state)
        done = meta["step"]
    (params, opt_state), log, losses = state, data.Log(cfg.out, "pretrain", done), []
    valid = sample_windows(corpus["valid"], 1.0, np.random.default_rng(1234), 128)
    loss_of = jax.jit(partial(language_loss, model))
    bar = evaluation.progress(range(done + 1, cfg.steps + 1), "pretrain", total=cfg.steps, initial=done)
    for step in bar:
        # The root of the size: a few large packages would otherwise be half of what the model ever sees.
        windows = sample_windows(corpus["train"], 0.5, np.random.default_rng((cfg.seed, step - 1)), WINDOWS)
        params, opt_state, loss = pretrain_step(model, cfg.steps, params, opt_state, windows)
        losses.append(float(loss))
        if step % EVERY == 0 or step == cfg.steps:
            held_out = float(np.mean([loss_of(params, x) for x in np.split(valid, 16)]))
            bits = held_out / np.log(2) * len(corpus["valid"]) / int(corpus["valid_bytes"])
            figures = {"loss": np.mean(losses), "valid_loss": held_out, "valid_bits_per_byte": bits}
            log.add(step, figures | {"dropped": opt_state.total_notfinite})
            bar.set_postfix(loss=f"{np.mean(losses):.3f}", valid=f"{held_out:.3f}")
            losses.clear()  # none from before the checkpoint, which a resumed run does not have
            lm.save_state(checkpoint, (params, opt_state), step=step)
    save_gpt2(cfg.out / "model", model, params)


def save_gpt2(folder: Path, model: lm.Model, params: lm.Params, dtype="bfloat16") -> None:
    """Write config.json and model.safetensors of a GPT-2 as `transformers` lays them out."""
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
    config |= {"vocab_size": model.vocab, "n_positions": model.positions, "n_ctx": model.positions}
    config |= {"n_embd": model.width, "n_layer": model.layers, "n_head": model.heads, "bos_token_id": 0}
    config |= {"layer_norm_epsilon": model.eps, "tie_word_embeddings": True, "eos_token_id": 0}
    flat, theirs = lm.flatten(params), {}
    for name, x in flat.items():
        number, part, leaf = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        if part == "attn.q":  # GPT-2 has queries, keys and values side by side
            part, qkv = "attn.qkv", [flat[f"blocks.{number}.attn.{one}.{leaf}"] for one in "qkv"]
            x = np.concatenate(qkv, -1)
        if part not in ("attn.k", "attn.v"):
            block, called = f"h.{number}." if number else "", lm.CHECKPOINT_NAMES[part].split()[0]
            theirs[f"transformer.{block}{called}.{leaf}"] = np.asarray(x).astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    data.write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    data.write_atomic(folder / "model.safetensors", safetensors.numpy.save(theirs, metadata={"format": "pt"}))


if __name__ == "__main__":
    options = tyro.cli(Pretrain, description=__doc__)
    ponder.launch(lambda: pretrain(options))
