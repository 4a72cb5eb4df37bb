"""Real code as documents: sources -> files -> tokens -> chunks, split by repository.

Sources are folders of code on this machine, or datasets that stream (The Stack, any of the Hugging
Face hub, Parquet and JSON lines here), of which as much is read as the documents asked for need.

A *repository* is the unit that nothing may leak across: a top-level package, a module or a
project folder, or all of a folder that is a repository itself; in a dataset what its repository
column says, or a row. A *document* is a run of consecutive tokens of one repository (its files in
path order, each under its path), cut into T chunks of C tokens:

    tokens = [EOT, x_0, x_1, ..., x_{TC-1}]        chunk t is x_{tC} ... x_{(t+1)C - 1}

Splits hash the repository's name, so a repository is in the same split on every machine.
This module needs no JAX.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib.metadata
import io
import json
import os
import re
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

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
VERSIONED = (".git", ".hg", ".svn")
MARKS = (*VERSIONED, "pyproject.toml", "setup.py", "setup.cfg", "package.json", "Cargo.toml", "go.mod")  # at a repository's root
MAX_DEPTH = 64  # of folders within folders
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Unlicense|0BSD|HPND|Zlib)\b", re.I)
COPYLEFT = re.compile(r"GPL|Mozilla|MPL|EPL|Eclipse|CDDL|EUPL|Proprietary|NVIDIA", re.I)
NAMES = ("stdlib", "packages", "pypi", "synthetic", "stack", "stack-v2")
NAMED = f"{', '.join(NAMES)}, hub:NAME"


class DataError(Exception):
    """Bad input from the user; the message is one line that says what to do."""


class SourceFile(NamedTuple):
    """A file's text and where it is from."""

    repo: str  # the unit of splitting
    path: str  # relative to the source's root, '/' separated
    text: str


class Cut(NamedTuple):
    """Which documents to cut (for `documents`): at most `limit` of a split, at most `per_repo` from one repository."""

    split: str
    chunks: int  # T
    per_repo: int
    limit: int


class Excerpt(NamedTuple):
    """A document's tokens."""

    repo: str
    tokens: np.ndarray  # int32, (T*C + 1,); tokens[0] is END_OF_TEXT
    origin: np.ndarray | None = None  # (T*C,) of one's own repository: the path of the file that each token after that is from


ASSETS = Path(__file__).parent / "assets"


def cache_folder() -> Path:
    """The user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ponderttt"


# --- 1. Files -------------------------------------------------------------------------------


def by_name_hash(name: str) -> str:
    """A key to sort or draw names by, of repositories, files or functions: the same on every machine."""
    return hashlib.sha256(f"order:{name}".encode()).hexdigest()


def read_source(path: Path) -> tuple[str | None, str]:
    """(the text of a source file, ''), or (None, why it is skipped)."""
    try:
        if not path.is_file():
            return None, "not a regular file"
        if path.stat().st_size > MAX_FILE_BYTES:
            return None, "larger than 1 MB"
        raw = path.read_bytes()
    except OSError:
        return None, "unreadable"
    return decode(raw)


def decode(raw: bytes, encoding: str = "utf-8") -> tuple[str | None, str]:
    """(the text of a file's content, ''), or (None, why it is skipped)."""
    if len(raw) > MAX_FILE_BYTES:
        return None, "larger than 1 MB"
    if b"\0" in raw:
        return None, "binary"
    try:
        text = raw.decode(encoding).replace("\r\n", "\n")
    except (UnicodeDecodeError, LookupError):
        return None, "not UTF-8" if encoding == "utf-8" else "not in its encoding"
    return (text, "") if text.strip() else (None, "empty")


def counted(read: tuple[str | None, str], skipped: Counter) -> str | None:
    """The text of what `read_source`, `decode` or `content` gave; None is counted under its reason."""
    text, why = read
    if text is None:
        skipped[why] += 1
    return text


def walk(root: Path, skipped: Counter, everything: bool = False) -> Iterator[str]:
    """Relative path of every source file under `root`, in path order; with `everything` of every file,
    tests too. Symbolic links to folders are not followed, so a loop of them is harmless."""
    leave_out = NOT_OWN if everything else NOT_OWN | TESTS
    for folder, folders, names in os.walk(root, onerror=lambda _: skipped.update(["unreadable"])):
        folders[:] = sorted(f for f in folders if f not in leave_out and not f.startswith(".") and readable_name(f, skipped))
        if folders and len(Path(folder).relative_to(root).parts) >= MAX_DEPTH:
            skipped["nested too deeply"] += len(folders)
            folders.clear()
        for name in sorted(names):
            path = Path(folder, name)
            if (everything or path.suffix in SUFFIXES) and readable_name(name, skipped):
                yield path.relative_to(root).as_posix()


def readable_name(name: str, skipped: Counter) -> bool:
    """Whether a file's name is text; one that is not UTF-8 can be in no document."""
    try:
        name.encode()
    except UnicodeEncodeError:
        skipped["name not UTF-8"] += 1
        return False
    return True


def is_repository(folder: Path) -> bool:
    """Whether a folder is one repository rather than a folder of them: it has what repositories have at their
    root, and no child folder is under version control of its own (a submodule has a file there, no folder)."""
    own = lambda child: any((child / mark).is_dir() for mark in VERSIONED)
    try:
        return any((folder / mark).exists() for mark in MARKS) and not any(map(own, folder.iterdir()))
    except OSError:
        return False


def one_repository(data: str) -> bool:
    """Whether `data` names a folder that is one repository."""
    return bool(data) and data not in NAMES and is_repository(Path(os.path.expanduser(data)))


def folder_source(root: Path, skipped: Counter, everything: bool = False) -> Iterator[SourceFile]:
    """Files of a folder, 2 MB of each repository at most. If it is not one itself, each child folder and each
    loose file is a repository; a folder that holds only one folder with source is entered first. With `everything` a
    repository is read as it is: licences, documents, tests, data and foreign languages among the
    code, from a file on that a hash of its name draws."""
    paths = list(walk(root, skipped, everything))
    prefix = ""
    while not (whole := is_repository(root / prefix)) and len(heads := {path[len(prefix) :].split("/")[0] for path in paths}) == 1:
        head = heads.pop()
        if all(path == prefix + head for path in paths):
            break
        prefix += head + "/"
    repos: dict[str, list[str]] = {}
    for path in paths:
        name = (root / prefix).resolve().name if whole else path[len(prefix) :].split("/")[0].removesuffix(".py")
        repos.setdefault(name, []).append(path)
    for repo, own in repos.items():
        first, size = int(by_name_hash(repo), 16) % len(own) if everything else 0, 0
        for path in own[first:] + own[:first]:
            if size >= MAX_REPO_BYTES:
                break
            if (text := counted(read_source(root / path), skipped)) is not None:
                size += len(text.encode())
                yield SourceFile(repo, path, text)


def stdlib_source(skipped: Counter) -> Iterator[SourceFile]:
    """The running Python's standard library, without its tests and the table of its build settings;
    a repository is a top-level package or module."""
    files = folder_source(Path(sysconfig.get_path("stdlib")), skipped)
    return (file for file in files if not file.repo.startswith("_sysconfigdata"))


def licence(dist: importlib.metadata.Distribution) -> str:
    """What a distribution says of its licence, in one line."""
    meta: Any = dist.metadata
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
            if file.suffix != ".py" or (NOT_OWN | TESTS) & set(file.parts):
                continue
            if (text := counted(read_source(Path(str(dist.locate_file(file)))), skipped)) is not None:
                yield SourceFile(name, file.as_posix(), text)


def pypi_folder(cache: Path) -> Path:
    """The source distributions listed in assets/repositories.txt, real repositories under their names,
    unpacked from PyPI (560 MB, once) without archives, media and files above 1 MB.

    Raises: DataError (`fetch_repository`)."""
    folder = cache / "repositories"
    wanted = [line.split("==") for line in (ASSETS / "repositories.txt").read_text().split()]
    missing = [(name, version) for name, version in wanted if not (folder / name).is_dir()]
    with ThreadPoolExecutor(8) as pool:
        for _ in tqdm(pool.map(lambda pair: fetch_repository(folder, *pair), missing), "repositories", len(missing), disable=not missing):
            pass
    return folder


def fetch_repository(folder: Path, name: str, version: str) -> None:
    """Unpack a source distribution of PyPI into folder/name, whole or not at all.

    Raises: DataError if it can't be had, or is damaged."""
    index = urllib.request.Request(f"https://pypi.org/simple/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(index, timeout=60) as answer:
            archive = next(f for f in json.load(answer)["files"] if f["filename"].endswith(f"-{version}.tar.gz"))
        with urllib.request.urlopen(archive["url"], timeout=300) as answer:
            content = answer.read()
    except (OSError, ValueError, StopIteration, http.client.HTTPException) as error:
        raise DataError(f"--data pypi: {name} {version} can't be had from PyPI ({error!r}); connect, or use --data FOLDER") from None
    if hashlib.sha256(content).hexdigest() != archive["hashes"]["sha256"]:
        raise DataError(f"--data pypi: {name} {version} arrived damaged; run again")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        try:
            unpack(content, temporary)
        except (tarfile.TarError, zlib.error, EOFError) as error:
            raise DataError(f"--data pypi: the archive of {name} {version} can't be unpacked ({error}); use --data FOLDER") from None
        os.replace(temporary, folder / name)
        os.mkdir(temporary)  # for the context manager to remove


def unpack(archive: bytes, folder: str) -> None:
    """A source distribution's files, without its outer folder, links, media and files above 1 MB."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            parts = Path(member.name).parts[1:]
            wanted = parts and ".." not in parts and not member.name.endswith(MEDIA)
            if wanted and member.size <= MAX_FILE_BYTES and member.isfile() and (content := tar.extractfile(member)):
                path = Path(folder, *parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())


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

    Raises: DataError if `data` is none of these, or has code alone and `everything` is wanted."""
    if data == "pypi":
        return folder_source(pypi_folder(cache_folder()), skipped, everything)
    code_alone = {"stdlib": stdlib_source, "packages": packages_source, "synthetic": lambda _: synthetic_source()}
    if data in code_alone:
        if everything:
            raise DataError(f"--files all: {data} has code alone; add --data pypi, or --data with a folder of repositories")
        return code_alone[data](skipped)
    root = Path(os.path.expanduser(data))
    if not data or not os.path.isdir(root):
        what = "not a folder" if data and os.path.exists(root) else "no such folder"
        raise DataError(f"--data {data}: {what}; give a folder of source code, a .parquet or .jsonl file, or one of {NAMED}")
    return folder_source(root, skipped, everything)


# --- 2. Datasets that stream ------------------------------------------------------------------

STACK = {"stack": "bigcode/the-stack-dedup", "stack-v2": "bigcode/the-stack-v2"}
CONTENT = "https://softwareheritage.s3.amazonaws.com/content/"  # of The Stack v2's blobs, gzipped, for everyone
ROWS = (".parquet", ".jsonl", ".jsonl.gz")
TEXT = ("content", "text", "code", "whole_func_string")  # columns by the names that the common datasets of code give them
REPO = ("max_stars_repo_name", "repo_name", "repository_name", "repo")
PATH = ("max_stars_repo_path", "path", "func_path_in_repository", "file_path")
WINDOW = 10_000  # rows after which a repository is not waited for any longer
MAX_ROWS = 20_000_000  # read of a dataset that does not have the documents asked for
NO_ROWS = "it has no rows there; check --subset, --data-dir and --dataset-split"
RETRIES = (1, 4, 16)  # seconds to wait before asking for a blob again


class Selection(NamedTuple):
    """Which part of a dataset to read; None is what is usual."""

    text_column: str | None = None
    subset: str | None = None  # a configuration by name
    data_dir: str | None = None
    dataset_split: str | None = None


class Listed(NamedTuple):
    """A file in a row: its text, or the name of it at Software Heritage."""

    path: str
    text: str | None
    blob: str = ""
    encoding: str = "utf-8"
    size: int = 0  # bytes


def streams(data: str) -> bool:
    """Whether `data` is a dataset: of the hub, a file of rows, or a folder of those without source code."""
    root = Path(os.path.expanduser(data))
    if data in STACK or data.startswith("hub:") or (root.is_file() and root.name.endswith(ROWS)):
        return True
    return bool(data) and root.is_dir() and not any(walk(root, Counter())) and any(p.name.endswith(ROWS) for p in root.rglob("*"))


def open_rows(data: str, selection: Selection) -> Iterator[dict[str, Any]]:
    """The rows of a dataset in its own order, streamed.

    Raises: DataError, with the `fault`, while they are read."""
    import datasets
    import huggingface_hub

    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity(library.logging.CRITICAL)  # what is wrong is said once, below
    name, part = os.path.expanduser(data), selection._asdict()
    split = part["dataset_split"] or "train"
    options: dict[str, Any] = {"name": part["subset"], "data_dir": part["data_dir"]}
    if data in STACK or data.startswith("hub:"):
        name, _, revision = STACK.get(data, data.removeprefix("hub:")).partition("@")
        options["revision"] = revision or None
        if not any(options[key] for key in ("name", "data_dir")):
            options |= {"stack": {"data_dir": "data/python"}, "stack-v2": {"name": "Python"}}.get(data, {})
    elif os.path.isfile(name):
        options, split = {"data_files": name}, "train"
        name = "parquet" if name.endswith(".parquet") else "json"
    try:
        yield from datasets.load_dataset(name, split=split, streaming=True, **options)
    except Exception as error:  # the libraries below raise many kinds
        raise DataError(f"--data {data}: {fault(name, error)}; or read code of your own: --data FOLDER") from None


def fault(name: str, error: BaseException) -> str:
    """What is wrong with the dataset `name`, and what to do."""
    text, kinds, cause = " ".join(str(error).split())[:300], "", error
    while cause is not None:
        kinds, cause = f"{kinds} {type(cause).__name__}", cause.__cause__ or cause.__context__
    page = f"https://huggingface.co/datasets/{name}"
    if "gated dataset" in text or "GatedRepo" in kinds:
        return (
            f"the dataset is gated; accept its terms at {page} and log in (hf auth login, earlier huggingface-cli login, or HF_TOKEN=...)"
        )
    if "scripts are no longer supported" in text or "trust_remote_code" in text:
        return "it is read by code of its own, which is never run here; take a copy in Parquet or JSON lines"
    if "exist on the Hub" in text or "RepositoryNotFound" in kinds or "HFValidation" in kinds:
        return f"no such dataset, or a private one; check {page}, and log in (hf auth login, or HF_TOKEN=...) if it is private"
    if "onfig name" in text or "BuilderConfig" in text:
        return f"--subset has to be one of its configurations ({text})"
    if "Bad split" in text or "Unknown split" in text:
        return f"--dataset-split has to be one of its splits ({text})"
    if isinstance(error, (ConnectionError, TimeoutError)) or re.search("Connect|Offline|Timeout|LocalEntryNotFound", kinds + text):
        return f"the Hugging Face hub can't be reached ({text}); connect (and unset HF_HUB_OFFLINE)"
    if re.search("StopIteration|EmptyDataset|DataFilesNotFound|any data file|BatchSize must be greater", kinds + text):
        return NO_ROWS
    return f"can't be read ({type(error).__name__}: {text})"


def text_column(data: str, row: dict[str, Any], wanted: str | None) -> str:
    """The column with the text, '' if the row names contents at Software Heritage instead.

    Raises: DataError if there is none."""
    has = f"its columns are {', '.join(row)}"
    if wanted and wanted not in row:
        raise DataError(f"--text-column {wanted}: {data} has no such column; {has}")
    found = wanted or next((name for name in TEXT if name in row), "")
    if not found and "blob_id" not in row and "files" not in row:
        raise DataError(f"--data {data}: no column known to hold text; give --text-column ({has})")
    if found and not isinstance(row[found], str | None):
        raise DataError(f"--text-column {found}: {data} holds {type(row[found]).__name__} there, not text; {has}")
    return found


def row_files(row: dict[str, Any], column: str) -> tuple[str | None, list[Listed]]:
    """(repository or None, files) of a row: one file, or in The Stack v2's train-ids all of a repository."""
    named = lambda r, names: next((str(r[name]) for name in names if r.get(name)), "")

    def listed(r: dict[str, Any]) -> Listed:
        text = (r[column] or "") if column else None
        size = len(text.encode(errors="replace")) if text is not None else r.get("length_bytes") or 0
        return Listed(named(r, PATH).lstrip("/"), text, r.get("blob_id") or "", r.get("src_encoding") or "utf-8", size)

    rows = row["files"] if not column and "files" in row else [row]
    own = [listed(r) for r in rows if not (r.get("is_vendor") or r.get("is_generated"))]
    return named(row, REPO) or None, own


def repositories(data: str, selection: Selection, wanted: Callable[[str], bool]) -> Iterator[tuple[str, list[Listed]]]:
    """(repository, its files in path order), in the order in which repositories are complete: 2 MB are there,
    or none of the last WINDOW rows was theirs. Nothing is held but what such a window has of `wanted`
    repositories. When one is complete depends on its own rows and their places alone.

    Raises: DataError if there are no rows, none with text, or they can't be read."""
    waiting: dict[str, tuple[int, int, list[Listed]]] = {}  # repository: its latest row, bytes, files; longest unseen first
    in_order = lambda files: sorted(files, key=lambda file: file.path)
    column = None
    rows = islice(open_rows(data, selection), MAX_ROWS)
    for place, row in enumerate(tqdm(rows, "dataset", unit=" rows", disable=None)):
        column = text_column(data, row, selection.text_column) if column is None else column
        while waiting and next(iter(waiting.values()))[0] < place - WINDOW:
            gone = next(iter(waiting))
            yield gone, in_order(waiting.pop(gone)[2])
        repo, files = row_files(row, column)
        whole = repo is None or (not column and "files" in row)
        repo = repo or hashlib.sha256(repr(files).encode(errors="replace")).hexdigest()[:16]
        if not files or not wanted(repo):
            continue
        _, size, before = waiting.pop(repo, (0, 0, []))
        size += sum(file.size for file in files)
        if whole or size >= MAX_REPO_BYTES:
            yield repo, in_order(before + files)
        else:
            before.extend(files)
            waiting[repo] = (place, size, before)
    if column is None:
        raise DataError(f"--data {data}: {NO_ROWS}; or read code of your own: --data FOLDER")
    for repo, (_, _, files) in waiting.items():
        yield repo, in_order(files)


def content(file: Listed) -> tuple[str | None, str]:
    """(the text of a file, fetched if need be, ''), or (None, why it is skipped).

    Raises: DataError if Software Heritage can't be reached."""
    if file.text is not None:
        return decode(file.text.encode(errors="replace"))
    if file.size > MAX_FILE_BYTES:
        return None, "larger than 1 MB"
    error: Exception | None = None
    for wait in (0, *RETRIES):
        time.sleep(wait)
        try:
            with urllib.request.urlopen(CONTENT + urllib.parse.quote(file.blob, safe=""), timeout=60) as answer:
                return decode(gzip.GzipFile(fileobj=answer).read(MAX_FILE_BYTES + 1), file.encoding)
        except (gzip.BadGzipFile, zlib.error):
            return None, "damaged"
        except urllib.error.HTTPError as answer:
            if answer.code in (403, 404):
                return None, "not at Software Heritage"
            error = answer
        except (OSError, EOFError, http.client.HTTPException) as broken:
            error = broken
    raise DataError(f"--data stack-v2: Software Heritage can't be reached ({error}); connect, or read code of your own: --data FOLDER")


# --- 3. Splits and near-copies ----------------------------------------------------------------

LEAK = 0.15  # the share of a file's long lines that makes it a near-copy
SAME = 0.5  # of one in its own repository, whose files have a licence and imports in common


def split_of(repo: str) -> str:
    """'train', 'valid' or 'test': 60, 20 and 20 % of all names, by a hash that never changes."""
    bucket = int.from_bytes(hashlib.sha256(f"v1:{repo}".encode()).digest()[:8], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def long_lines(files: Iterable[SourceFile]) -> set[int]:
    """Hashes of these files' lines of 30 characters or more, without their indentation."""
    return {hash(line) for file in files for raw in file.text.splitlines() if len(line := raw.strip()) >= 30}


def near_copy(lines: set[int], known: set[int], share: float = LEAK) -> bool:
    """Whether a file with these long lines is a near-copy of files that have the known ones."""
    return len(lines & known) > share * len(lines)


def deduplicate(files: Iterator[SourceFile], held_out: Iterator[SourceFile], skipped: Counter) -> Iterator[SourceFile]:
    """Drop files that share 15 % of their long lines with `held_out` (backports, vendored copies
    of what will be tested on), or half of them with the files kept before."""
    forbidden = long_lines(held_out)
    kept: set[int] = set()
    for file in files:
        lines = long_lines([file])
        if near_copy(lines, forbidden):
            skipped["near-duplicate of held-out code"] += 1
        elif near_copy(lines, kept, SAME):
            skipped["near-duplicate"] += 1
        else:
            kept |= lines
            yield file


def drop_leaks(repos: dict[str, list[SourceFile]], skipped: Counter) -> dict[str, list[SourceFile]]:
    """Without the files of validation and test repositories that are near-copies of training files,
    nor the test files that are near-copies of validation files."""
    seen: set[int] = set()
    kept: dict[str, list[SourceFile]] = {}
    for split in SPLITS:
        names = [name for name in repos if split_of(name) == split]
        lines = {file: long_lines([file]) for name in names for file in repos[name]}
        leaks = {file for file, own in lines.items() if near_copy(own, seen)}
        skipped["near-copy across splits"] += len(leaks)
        kept |= {name: [file for file in repos[name] if file not in leaks] for name in names}
        seen.update(*lines.values())
    return {name: kept[name] for name in repos if kept[name]}


def without_copies(files: Sequence[SourceFile], others: Iterable[SourceFile], skipped: Counter) -> list[SourceFile]:
    """The files that are no near-copies of any of the others.

    Raises: DataError if all are."""
    known = long_lines(others)
    kept = [file for file in files if not near_copy(long_lines([file]), known)]
    skipped["near-copy of what was trained on"] += len(files) - len(kept)
    if files and not kept:
        raise DataError(f"each of the repository's files ({len(files)}) is a near-copy of code that was trained on; take other code")
    return kept


# --- 4. Tokens --------------------------------------------------------------------------------


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
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def end_tokens(folder: Path, tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text, END_OF_TEXT and config.json's eos_token_id. Documents start with the first.

    Raises: DataError if there is none."""
    try:
        known = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        known = None
    ends = [tokenizer.token_to_id(END_OF_TEXT), *(known if isinstance(known, list) else [known])]
    usable = dict.fromkeys(end for end in ends if isinstance(end, int) and tokenizer.id_to_token(end) is not None)
    if not usable:
        raise DataError(f"{folder}: its tokenizer has no {END_OF_TEXT} and its config.json no usable eos_token_id, to start documents with")
    return tuple(usable)


def largest_id(tokenizer: tokenizers.Tokenizer) -> int:
    """The largest of its token ids, which may have gaps."""
    return max(tokenizer.get_vocab().values())


def token_texts(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The text of every token id, '' for those that are no text."""
    return [tokenizer.decode([i], skip_special_tokens=True) for i in range(largest_id(tokenizer) + 1)]


def train_tokenizer(texts: Iterator[str], vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of at most `vocab` tokens, as in GPT-2 (Radford et al. 2019, section 2.2)."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 tokens of each text; special tokens spelled out in the text stay text."""
    tokenizer.encode_special_tokens = True
    return [np.asarray(e.ids, np.int32) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def with_path(file: SourceFile) -> str:
    """A file's text under its path, if it has one."""
    return (f"# {file.path}\n" if file.path else "") + f"{file.text.rstrip()}\n\n"


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


# --- 5. Repositories --------------------------------------------------------------------------


class Need(NamedTuple):
    """For which documents a stream is read."""

    cuts: Sequence[Cut]
    tokenizer: tokenizers.Tokenizer
    chunk: int


def most_tokens(file: Listed) -> int:
    """No more tokens than these are in a file under its path: each has a byte of UTF-8, of which other
    encodings' bytes make three at most."""
    if file.text is None and not file.size:
        return MAX_FILE_BYTES  # unknown
    utf8 = file.text is not None or file.encoding.lower() in ("utf-8", "ascii", "us-ascii")
    return file.size * (1 if utf8 else 3) + len(with_path(SourceFile("", file.path, "")).encode())


def stream_repos(data: str, skipped: Counter, selection: Selection, need: Need) -> dict[str, list[SourceFile]]:
    """The first repositories of a dataset that give the documents needed, no more of each than they take.

    Raises: DataError if no repository is long enough, or as `repositories` and `content` do."""
    repos: dict[str, list[SourceFile]] = {}
    tokens_of: dict[SourceFile, int] = {}
    gives = lambda cut, tokens: min(cut.per_repo, tokens // (cut.chunks * need.chunk))  # documents

    def still_wanted(repos: dict[str, list[SourceFile]]) -> list[int]:
        """Of each cut, how many documents these don't give."""
        long = [(split_of(repo), sum(tokens_of[file] for file in files)) for repo, files in repos.items()]
        return [cut.limit - sum(gives(cut, tokens) for split, tokens in long if split == cut.split) for cut in need.cuts]

    lines: dict[str, set[int]] = {split: set() for split in SPLITS}
    left = still_wanted({})
    missing = lambda repo: [i for i, cut in enumerate(need.cuts) if left[i] > 0 and cut.split == split_of(repo)]
    wanted = lambda repo: repo not in repos and bool(missing(repo))
    seen, longest = 0, 0
    with ThreadPoolExecutor(16) as pool:
        for repo, listed in repositories(data, selection, wanted):
            if not wanted(repo):
                continue
            sizes = {i: need.cuts[i].chunks * need.chunk for i in missing(repo)}
            seen += 1
            if sum(map(most_tokens, listed)) < min(sizes.values()):
                continue  # before anything is fetched
            enough = max(size * need.cuts[i].per_repo for i, size in sizes.items())
            elsewhere = [lines[split] for split in SPLITS if split != split_of(repo)]
            own = first_files(repo, listed, enough, need.tokenizer, pool, skipped, elsewhere)
            tokens = sum(own.values())
            longest = max(longest, tokens)
            if tokens >= min(sizes.values()):
                repos[repo] = list(own)
                tokens_of |= own
                lines[split_of(repo)] |= long_lines(own)
            for i in sizes:
                left[i] -= gives(need.cuts[i], tokens)
            if max(left) <= 0 and max(left := still_wanted(drop_leaks(repos, Counter()))) <= 0:
                break
    if not repos:
        least = min(cut.chunks for cut in need.cuts) * need.chunk
        known = f", the longest has {longest}" if longest else ""
        raise DataError(
            f"--data {data}: none of its {seen} repositories has the {least} tokens of a document{known} "
            f"(skipped: {dict(skipped)}); use shorter documents (--chunks) or another dataset"
        )
    return drop_leaks(repos, skipped)


def first_files(
    repo: str,
    listed: list[Listed],
    enough: int,
    tokenizer: tokenizers.Tokenizer,
    pool: ThreadPoolExecutor,
    skipped: Counter,
    elsewhere: list[set[int]],
) -> dict[SourceFile, int]:
    """The first files that have `enough` tokens together, or all of them, with the tokens of each; without
    near-copies of what has the long lines known `elsewhere`."""
    files: dict[SourceFile, int] = {}
    for i in range(0, len(listed), 32):
        batch = listed[i : i + 32]
        texts = [counted(read, skipped) for read in pool.map(content, batch)]
        read = [SourceFile(repo, file.path, text) for file, text in zip(batch, texts) if text is not None]
        for file, own in zip(read, encode(tokenizer, [with_path(file) for file in read])):
            if sum(files.values()) >= enough:
                break
            lines = long_lines([file])
            if near_copy(lines, set().union(*(lines & known for known in elsewhere))):
                skipped["near-copy across splits"] += 1
            else:
                files[file] = len(own)
        if sum(files.values()) >= enough:
            break
    return files


def load_repos(
    name: str, skipped: Counter, everything: bool = False, selection: Selection | None = None, need: Need | None = None
) -> dict[str, list[SourceFile]]:
    """All files of a source by repository, or of a dataset those that give the documents needed. Several hosts
    read the same, so that a batch has the same documents however many they are; each puts its part of it on its devices.

    Raises: DataError if there is no source code in it, or options don't fit it."""
    selection = selection or Selection()
    if need and streams(name):
        if everything:
            raise DataError(f"--files all: {name} has the files that its rows have; leave --files out")
        return stream_repos(name, skipped, selection, need)
    if given := [key for key, value in selection._asdict().items() if value is not None]:
        raise DataError(
            f"--{given[0].replace('_', '-')}: {name} is no dataset; leave it out, or use --data hub:NAME or a .parquet or .jsonl file"
        )
    repos: dict[str, list[SourceFile]] = {}
    for file in open_source(name, skipped, everything):
        repos.setdefault(file.repo, []).append(file)
    if not repos:
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common()) or "no file with a source suffix"
        raise DataError(f"{name}: no source code found ({why}); give a folder with UTF-8 source files")
    return drop_leaks(repos, skipped)


# --- 6. Documents -----------------------------------------------------------------------------


def documents(
    repos: dict[str, list[SourceFile]],
    split: str,
    tokenizer: tokenizers.Tokenizer,
    chunk: int,
    chunks: int,
    per_repo: int,
    limit: int,
    end: int | None = None,
) -> list[Excerpt]:
    """At most `limit` documents of `split`, no more than `per_repo` from one repository: the first
    run of T*C tokens of every repository (in an order that depends on names alone), then the
    second of each, and so on. What is left over at a repository's end is dropped. Each starts with the
    token `end`, END_OF_TEXT if left out.

    Raises: DataError if no repository of the split is long enough, or the tokenizer lacks END_OF_TEXT."""
    size, end = chunk * chunks, tokenizer.token_to_id(END_OF_TEXT) if end is None else end
    if end is None:
        raise DataError(f"the tokenizer has no {END_OF_TEXT}, which starts every document; use GPT-2's or another that has it")
    runs: list[list[Excerpt]] = [[] for _ in range(per_repo)]
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
            runs[i].append(Excerpt(name, np.append(end, tokens[i * size : (i + 1) * size]).astype(np.int32)))
    found = [document for run in runs for document in run][:limit]
    if not found:
        raise DataError(
            f"no repository of the {split} split has the {size} tokens of a document ({len(names)} of {len(repos)} repositories are in "
            f"that split, the longest has {longest} tokens); use more code or shorter documents (--chunks). One repository alone "
            "is read if --data is its own folder, with a .git, pyproject.toml or the like at its root (git init makes one)"
        )
    return found


def own_documents(
    files: Sequence[SourceFile], tokenizer: tokenizers.Tokenizer, chunk: int, chunks: int, limit: int, end: int
) -> list[Excerpt]:
    """At most `limit` documents of one repository, spread evenly over it, that know which file each token is
    from. They are called after it and their place in it.

    Raises: DataError if it has fewer than two."""
    size = chunk * chunks
    encoded = encode(tokenizer, [with_path(file) for file in files])
    tokens = np.concatenate([np.zeros(0, np.int32), *encoded])
    paths = np.asarray([file.path for file in files], object)  # a text array would have the longest path at each token
    origin = np.repeat(paths, [len(own) for own in encoded])
    count = len(tokens) // size
    if count < 2:
        fits = len(tokens) // (2 * chunk)
        hint = f"take --chunks {fits} or fewer" if fits > 1 else "take more code, or a folder of repositories"
        raise DataError(f"the repository has {len(tokens)} tokens, and two documents of {chunks} chunks need {2 * size}; {hint}")
    places = np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int))
    part = lambda i: slice(i * size, (i + 1) * size)
    return [Excerpt(f"{files[0].repo} {i + 1}/{count}", np.append(end, tokens[part(i)]).astype(np.int32), origin[part(i)]) for i in places]


# --- 7. Functions to complete -----------------------------------------------------------------


class Function(NamedTuple):
    """A function of a file that was not learned from."""

    name: str  # file and line
    before: str  # the file under its path, down to a line in the middle of the function
    rest: str  # of the function, from the end of that line on


# The end of a function's head, in any language that ends it with : or { and indents what follows
NOT_A_HEAD = (
    r"if|elif|elsif|elseif|else|unless|for|foreach|while|until|switch|match|case|when|with|using|lock|synchronized|try|catch|except"
    r"|finally|class|return|async[ \t]+(?:for|with)"
)
HEAD = re.compile(rf"[ \t}}]*+(?!(?:{NOT_A_HEAD})\b)(?=[^#\s]).*\)[^()]*[:{{]\s*$")


def functions(file: SourceFile) -> list[Function]:
    """The functions of a file whose bodies have four lines or more, cut at the line in their middle."""
    lines, found = file.text.splitlines(keepends=True), []
    depth = lambda line: len(line) - len(line.lstrip())
    for i in (i for i, line in enumerate(lines) if HEAD.match(line)):
        outside = (j for j in range(i + 1, len(lines)) if lines[j].strip() and depth(lines[j]) <= depth(lines[i]))
        end = next(outside, len(lines))
        body = [j for j in range(i + 1, end) if lines[j].strip()]
        if len(body) >= 4:
            middle = body[len(body) // 2]
            before = f"# {file.path}\n" + "".join(lines[:middle]).rstrip()
            found.append(Function(f"{file.path}:{i + 1}", before, "\n" + "".join(lines[middle : body[-1] + 1])))
    return found


def hold_out(files: Sequence[SourceFile], most: int) -> tuple[list[SourceFile], list[Function]]:
    """A fifth of a repository's files, chosen by a hash of their paths, give at most that many functions (again
    by a hash); the other files are for learning. What is a near-copy of one of those gives none."""
    order = sorted(files, key=lambda file: by_name_hash(file.path))
    held, kept = order[: len(order) // 5], set(order[len(order) // 5 :])
    learned = [file for file in files if file in kept]
    known = long_lines(learned)
    unseen = (file for file in held if not near_copy(long_lines([file]), known, SAME))
    found = sorted((f for file in unseen for f in functions(file)), key=lambda f: by_name_hash(f.name))
    return learned, found[:most]
