"""Real code as documents: sources -> files -> tokens -> chunks, split by repository.

A *repository* is the unit that nothing may leak across: a top-level package, a module or a
project folder. A *document* is a run of consecutive tokens of one repository (its files in path
order, each under its path), cut into T chunks of C tokens:

    tokens = [EOT, x_0, x_1, ..., x_{TC-1}]        chunk t is x_{tC} ... x_{(t+1)C - 1}

Splits hash the repository's name, so a repository is in the same split on every machine.
This module needs no JAX.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import re
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
MAX_FILE_BYTES, MAX_REPO_BYTES = 1_000_000, 2_000_000
SPLITS = {"train": range(60), "valid": range(60, 80), "test": range(80, 100)}
SUFFIXES = {
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".java", ".js", ".jsx", ".ts", ".tsx"),
    *(".kt", ".lua", ".php", ".pl", ".rb", ".rs", ".scala", ".sh", ".swift"),
}
MEDIA = (".png", ".jpg", ".pdf", ".gz", ".zip", ".whl", ".so", ".npz", ".fits", ".ttf", ".mo")
NOT_OWN = {"site-packages", "dist-packages", "node_modules", "__pycache__"}
TESTS = {"test", "tests", "testing", "idle_test"}
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Unlicense|0BSD|HPND|Zlib)\b", re.I)
COPYLEFT = re.compile(r"GPL|Mozilla|MPL|EPL|Eclipse|CDDL|EUPL|Proprietary|NVIDIA", re.I)


class DataError(Exception):
    """Bad input from the user; the message is one line that says what to do."""


class SourceFile(NamedTuple):
    repo: str  # the unit of splitting
    path: str  # relative to the source's root, '/' separated
    text: str


class Document(NamedTuple):
    repo: str
    tokens: np.ndarray  # int32, (T*C + 1,); tokens[0] is END_OF_TEXT


ASSETS = Path(__file__).parent / "assets"


def cache_folder() -> Path:
    """The user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ponderttt"


# --- 1. Files -------------------------------------------------------------------------------


def by_name_hash(repo: str) -> str:
    return hashlib.sha256(f"order:{repo}".encode()).hexdigest()


def read_source(path: Path) -> tuple[str | None, str]:
    """The text of a source file, or (None, why it is skipped)."""
    try:
        if not path.is_file():
            return None, "not a regular file"
        if path.stat().st_size > MAX_FILE_BYTES:
            return None, "larger than 1 MB"
        raw = path.read_bytes()
    except OSError:
        return None, "unreadable"
    if b"\0" in raw:
        return None, "binary"
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    return (text, "") if text.strip() else (None, "empty")


def walk(root: Path, skipped: Counter, everything: bool = False) -> Iterator[str]:
    """Relative path of every source file under `root`, in path order; with `everything` of every file,
    tests too. Symbolic links to folders are not followed, so a loop of them is harmless."""
    leave_out = NOT_OWN if everything else NOT_OWN | TESTS
    for folder, folders, names in os.walk(root, onerror=lambda _: skipped.update(["unreadable"])):
        folders[:] = sorted(f for f in folders if f not in leave_out and not f.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if everything or path.suffix in SUFFIXES:
                yield path.relative_to(root).as_posix()


def folder_source(root: Path, skipped: Counter, everything: bool = False) -> Iterator[SourceFile]:
    """Files of a folder, 2 MB of each repository at most. Each child folder and each loose file is a
    repository; a folder that holds only one folder with source is entered first. With `everything` a
    repository is read as it is: licences, documents, tests, data and foreign languages among the
    code, from a file on that a hash of its name draws."""
    paths = list(walk(root, skipped, everything))
    prefix = ""
    while len(heads := {path[len(prefix) :].split("/")[0] for path in paths}) == 1:
        head = heads.pop()
        if all(path == prefix + head for path in paths):
            break
        prefix += head + "/"
    repos: dict[str, list[str]] = {}
    for path in paths:
        repos.setdefault(path[len(prefix) :].split("/")[0].removesuffix(".py"), []).append(path)
    for repo, own in repos.items():
        first, size = int(by_name_hash(repo), 16) % len(own) if everything else 0, 0
        for path in own[first:] + own[:first]:
            if size >= MAX_REPO_BYTES:
                break
            text, why = read_source(root / path)
            if text is None:
                skipped[why] += 1
            else:
                size += len(text)
                yield SourceFile(repo, path, text)


def stdlib_source(skipped: Counter) -> Iterator[SourceFile]:
    """The running Python's standard library, without its tests and the table of its build settings;
    a repository is a top-level package or module."""
    files = folder_source(Path(sysconfig.get_path("stdlib")), skipped)
    return (file for file in files if not file.repo.startswith("_sysconfigdata"))


def licence(dist: importlib.metadata.Distribution) -> str:
    meta = dist.metadata
    classifiers = [c for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    return "; ".join([meta.get("License-Expression") or "", (meta.get("License") or "")[:100], *classifiers])


def packages_source(skipped: Counter, folders: Sequence[str] = ()) -> Iterator[SourceFile]:
    """Python files of the installed distributions under a permissive licence (MIT, BSD, Apache,
    ...), each distribution a repository. `folders` adds site-packages folders to sys.path's."""
    seen = set()
    paths = [p for p in [*sys.path, *folders] if p and Path(p).is_dir()]
    for dist in sorted(importlib.metadata.distributions(path=paths), key=lambda d: str(d.metadata["Name"]).lower()):
        name, terms = str(dist.metadata["Name"]).lower().replace("_", "-"), licence(dist)
        if name in seen or not PERMISSIVE.search(terms) or COPYLEFT.search(terms):
            continue
        seen.add(name)
        for file in sorted(dist.files or [], key=str):
            if file.suffix == ".py" and not (NOT_OWN | TESTS) & set(file.parts):
                text, why = read_source(Path(str(dist.locate_file(file))))
                if text is None:
                    skipped[why] += 1
                else:
                    yield SourceFile(name, file.as_posix(), text)


def pypi_folder(cache: Path) -> Path:
    """The source distributions listed in assets/repositories.txt, real repositories under their names,
    unpacked from PyPI (560 MB, once) without archives, media and files above 1 MB.

    Raises: DataError if PyPI can't be reached."""
    folder = cache / "repositories"
    wanted = [line.split("==") for line in (ASSETS / "repositories.txt").read_text().split()]
    missing = [(name, version) for name, version in wanted if not (folder / name).is_dir()]
    with ThreadPoolExecutor(8) as pool:
        for _ in tqdm(pool.map(lambda pair: fetch_repository(folder, *pair), missing), "repositories", len(missing), disable=not missing):
            pass
    return folder


def fetch_repository(folder: Path, name: str, version: str) -> None:
    index = urllib.request.Request(f"https://pypi.org/simple/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(index, timeout=60) as answer:
            archive = next(f for f in json.load(answer)["files"] if f["filename"].endswith(f"-{version}.tar.gz"))
        with urllib.request.urlopen(archive["url"], timeout=300) as answer:
            content = answer.read()
    except (OSError, ValueError, StopIteration) as error:
        raise DataError(f"--data pypi: {name} {version} can't be had from PyPI ({error!r}); connect, or use --data FOLDER") from None
    if hashlib.sha256(content).hexdigest() != archive["hashes"]["sha256"]:
        raise DataError(f"--data pypi: {name} {version} arrived damaged; run again")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                parts = Path(member.name).parts[1:]
                if member.isfile() and member.size <= MAX_FILE_BYTES and parts and not member.name.endswith(MEDIA):
                    member.name = str(Path(*parts))
                    tar.extract(member, temporary, filter="data")
        os.replace(temporary, folder / name)
        os.mkdir(temporary)  # for the context manager to remove


def synthetic_source(repos: int = 40, seed: int = 0) -> Iterator[SourceFile]:
    """Made-up modules for smoke tests: each repository has its own vocabulary of names, so that
    reading it teaches something."""
    rng = np.random.default_rng(seed)
    syllables = ["ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "ve", "xo", "za"]
    for repo in range(repos):
        words = sorted({"".join(rng.choice(syllables, 3)) for _ in range(12)})
        for module in range(4):
            lines = []
            for _ in range(60):
                name, left, right, result = rng.choice(words, 4, replace=False)
                lines += [f"def {name}({left}, {right}):", f"    {result} = {left} + {right}", f"    return {result}", ""]
            yield SourceFile(f"synthetic_{repo:03d}", f"synthetic_{repo:03d}/module_{module}.py", "\n".join(lines))


def open_source(data: str, skipped: Counter, everything: bool = False) -> Iterator[SourceFile]:
    """The files of `stdlib`, `packages`, `synthetic`, `pypi` or a local folder; of these two `everything`
    takes more than the code.

    Raises: DataError if `data` is none of these."""
    if data == "pypi":
        return folder_source(pypi_folder(cache_folder()), skipped, everything)
    if everything and data in ("stdlib", "packages", "synthetic"):
        raise DataError(f"--files all: {data} has code alone; add --data pypi, or --data with a folder of repositories")
    if data in ("stdlib", "packages", "synthetic"):
        return {"stdlib": stdlib_source, "packages": packages_source, "synthetic": lambda _: synthetic_source()}[data](skipped)
    root = Path(os.path.expanduser(data))
    if not data or not os.path.isdir(root):
        what = "not a folder" if data and os.path.exists(root) else "no such folder"
        raise DataError(f"--data {data}: {what}; give a folder of source code, or one of stdlib, packages, pypi, synthetic")
    return folder_source(root, skipped, everything)


# --- 2. Near-duplicates -----------------------------------------------------------------------

LEAK = 0.15  # the share of a file's long lines that makes it a near-copy


def long_lines(text: str) -> set[int]:
    return {hash(line) for raw in text.splitlines() if len(line := raw.strip()) >= 30}


def deduplicate(files: Iterator[SourceFile], held_out: Iterator[SourceFile], skipped: Counter) -> Iterator[SourceFile]:
    """Drop files that share 15 % of their long lines with `held_out` (backports, vendored copies
    of what will be tested on), or half of them with the files kept before."""
    forbidden = set().union(*(long_lines(f.text) for f in held_out))
    kept: set[int] = set()
    for file in files:
        lines = long_lines(file.text)
        if len(lines & forbidden) > LEAK * len(lines):
            skipped["near-duplicate of held-out code"] += 1
        elif len(lines & kept) > 0.5 * len(lines):
            skipped["near-duplicate"] += 1
        else:
            kept |= lines
            yield file


# --- 3. Splits --------------------------------------------------------------------------------


def split_of(repo: str) -> str:
    """'train', 'valid' or 'test': 60, 20 and 20 % of all names, by a hash that never changes."""
    bucket = int.from_bytes(hashlib.sha256(f"v1:{repo}".encode()).digest()[:8], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def drop_leaks(repos: dict[str, list[SourceFile]], skipped: Counter) -> dict[str, list[SourceFile]]:
    """Without the files of validation and test repositories that are near-copies of training files,
    nor the test files that are near-copies of validation files."""
    seen: set[int] = set()
    kept: dict[str, list[SourceFile]] = {}
    for split in SPLITS:
        names = [name for name in repos if split_of(name) == split]
        lines = {file: long_lines(file.text) for name in names for file in repos[name]}
        leaks = {file for file, own in lines.items() if len(own & seen) > LEAK * len(own)}
        skipped["near-copy across splits"] += len(leaks)
        kept |= {name: [file for file in repos[name] if file not in leaks] for name in names}
        seen.update(*lines.values())
    return {name: kept[name] for name in repos if kept[name]}


# --- 4. Tokens --------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str], vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE as in GPT-2 (Radford et al. 2019, section 2.2)."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def with_path(file: SourceFile) -> str:
    return f"# {file.path}\n{file.text.rstrip()}\n\n"


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 tokens of each text; special tokens spelled out in the text stay text."""
    tokenizer.encode_special_tokens = True
    return [np.asarray(e.ids, np.int32) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def pretraining_tokens(
    folders: Sequence[str], vocab: int, skipped: Counter
) -> tuple[tokenizers.Tokenizer, dict[str, list[np.ndarray]], dict[str, int]]:
    """Installed packages without near-duplicates of the standard library, tokenised.

    Returns the tokenizer (trained on the train split), {split: [tokens of each repository]} for
    'train' and 'valid', and the bytes of text in each split."""
    texts: dict[str, dict[str, list[str]]] = {"train": {}, "valid": {}, "test": {}}
    for file in deduplicate(packages_source(skipped, folders), stdlib_source(skipped), skipped):
        texts[split_of(file.repo)].setdefault(file.repo, []).append(with_path(file))
    # Every fourth file is plenty for 8k merges.
    tokenizer = train_tokenizer((text for repo in texts["train"].values() for text in repo[::4]), vocab)
    end = np.asarray([tokenizer.token_to_id(END_OF_TEXT)], np.int32)
    tokens = {
        split: [np.concatenate([end, *encode(tokenizer, repo)]).astype(np.uint16) for repo in texts[split].values()]
        for split in ("train", "valid")
    }
    return tokenizer, tokens, {split: sum(len(t.encode()) for repo in texts[split].values() for t in repo) for split in tokens}


# --- 5. Documents -----------------------------------------------------------------------------


def documents(
    repos: dict[str, list[SourceFile]],
    split: str,
    tokenizer: tokenizers.Tokenizer,
    chunk: int,
    chunks: int,
    per_repo: int,
    limit: int,
    end: int | None = None,
) -> list[Document]:
    """At most `limit` documents of `split`, no more than `per_repo` from one repository: the first
    run of T*C tokens of every repository (in an order that depends on names alone), then the
    second of each, and so on. What is left over at a repository's end is dropped. Each starts with the
    token `end`, END_OF_TEXT if left out.

    Raises: DataError if no repository of the split is long enough."""
    size, end = chunk * chunks, tokenizer.token_to_id(END_OF_TEXT) if end is None else end
    if end is None:
        raise DataError(f"the tokenizer has no {END_OF_TEXT}, which starts every document; use GPT-2's or another that has it")
    runs: list[list[Document]] = [[] for _ in range(per_repo)]
    names = sorted((name for name in repos if split_of(name) == split), key=by_name_hash)
    longest = 0
    for name in names:
        if len(runs[0]) >= limit:
            break
        tokens = np.zeros(0, np.int32)
        for file in repos[name]:
            if len(tokens) >= size * per_repo:
                break
            tokens = np.concatenate([tokens, *encode(tokenizer, [with_path(file)])])
        longest = max(longest, len(tokens))
        for i in range(min(per_repo, len(tokens) // size)):
            runs[i].append(Document(name, np.append(end, tokens[i * size : (i + 1) * size]).astype(np.int32)))
    found = [document for run in runs for document in run][:limit]
    if not found:
        raise DataError(
            f"no repository of the {split} split has the {size} tokens of a document ({len(names)} of {len(repos)} repositories are in "
            f"that split, the longest has {longest} tokens); use more code (--data) or shorter documents (--chunks)"
        )
    return found


def load_repos(name: str, skipped: Counter, everything: bool = False) -> dict[str, list[SourceFile]]:
    """All files of a source, by repository.

    Raises: DataError if there is no source code in it."""
    repos: dict[str, list[SourceFile]] = {}
    for file in open_source(name, skipped, everything):
        repos.setdefault(file.repo, []).append(file)
    if not repos:
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common()) or "no file with a source suffix"
        raise DataError(f"--data {name}: no source code found ({why}); give a folder with UTF-8 source files")
    return drop_leaks(repos, skipped)


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, or GPT-2's vocab.json and merges.txt, from a local folder.

    Raises: DataError."""
    try:
        if (folder / "tokenizer.json").exists():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{folder}: no readable tokenizer ({error}); it needs tokenizer.json, or vocab.json and merges.txt") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def end_token(folder: Path, tokenizer: tokenizers.Tokenizer) -> int:
    """The token that starts documents: END_OF_TEXT, or config.json's eos_token_id (of several the first).

    Raises: DataError if there is neither."""
    if (end := tokenizer.token_to_id(END_OF_TEXT)) is not None:
        return end
    try:
        end = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        end = None
    end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int) or tokenizer.id_to_token(end) is None:
        raise DataError(f"{folder}: its tokenizer has no {END_OF_TEXT} and its config.json no usable eos_token_id, to start documents with")
    return end


def token_texts(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The text of every token id, '' for those that are no text."""
    return [tokenizer.decode([i], skip_special_tokens=True) for i in range(tokenizer.get_vocab_size())]
