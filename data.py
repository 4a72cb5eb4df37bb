"""Real code as documents: files -> repositories -> splits -> tokens -> documents of chunks.

A *repository* is the unit that nothing may leak across: a package or module of the standard library, a child
of a folder, a folder that is one itself, or the rows of a dataset that name the same one. A *document* is a
run of tokens of one repository (its files in path order, each under its path), in T chunks of C tokens:

    tokens = [end, x_0, x_1, ..., x_{TC-1}]        chunk t is x_{tC} ... x_{(t+1)C - 1}

The split of a repository is a hash of its name, the same on every machine. This module needs no JAX.
"""

import ast
import gzip
import hashlib
import json
import os
import re
import sysconfig
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import chain, islice, repeat, takewhile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

# --- 1. Words ---------------------------------------------------------------------------------------

ASSETS = Path(__file__).parent / "assets"


class UserError(Exception):
    """An error that the user can mend; its message is one line that says what to do."""


def require(condition: Any, message: str) -> None:
    """Raises: UserError with the message, unless the condition holds."""
    if not condition:
        raise UserError(message)


class Source(NamedTuple):
    """Where files come from."""

    name: str  # stdlib, a folder, stack, stack-v2, hub:NAME[@REVISION], a file of ROWS or a folder of those
    everything: bool = False  # of a folder: documents, tests and data too, not code alone
    subset: str | None = None  # of a dataset: a configuration by name, or one of its folders if it has a "/"
    text_column: str | None = None  # of a dataset


class SourceFile(NamedTuple):
    """A file's text and where it is from."""

    repo: str
    path: str  # relative to the source's root, "/" separated
    text: str


class Cut(NamedTuple):
    """Which documents to cut: at most `limit` of a split, at most `per_repo` from one repository."""

    split: str  # train, valid or test
    chunks: int  # T
    per_repo: int
    limit: int


class Excerpt(NamedTuple):
    """A document's tokens."""

    repo: str
    tokens: np.ndarray  # int32, (T*C + 1,); tokens[0] is the token that ends a text
    origin: np.ndarray | None = None  # (T*C,) the path of the file that each later token is from, if known
    text_TU: np.ndarray | None = None  # (T, U) features of the text, filled in by ponder.py


Files = Sequence[SourceFile]
Repos = dict[str, list[SourceFile]]
Text = tuple[str | None, str]  # (a file's text, ""), or (None, why it is skipped)

# --- 2. Files to repositories -----------------------------------------------------------------------

CODE = re.compile(  # names of files with code, but not the table of Python's build settings
    r"(?s)(?!_sysconfigdata).+\.(pyi?|cc?|h|[ch]pp|cs|go|java|[jt]sx?|kt|lua|php|pl|rb|rs|scala|sh|swift)"
)
NOT_OWN = {"site-packages", "dist-packages", "node_modules", "__pycache__"}  # folders of what others wrote
TESTS = {"test", "tests", "testing", "idle_test"}
VERSIONED = (".git", ".hg", ".svn")
ROOT_MARKS = (*VERSIONED, "pyproject.toml", "setup.py", "setup.cfg", "package.json", "Cargo.toml", "go.mod")
STACK = {"stack": ("bigcode/the-stack-dedup", "data/python"), "stack-v2": ("bigcode/the-stack-v2", "Python")}
ROWS = (".parquet", ".jsonl", ".jsonl.gz")
MAX_FILE_BYTES, MAX_REPO_BYTES, MAX_DEPTH = 1_000_000, 2_000_000, 64  # depth of folders within folders


def load_repositories(
    source: Source, cuts: Sequence[Cut], tokenizer: Tokenizer | None, chunk: int, skipped: Counter
) -> Repos:
    """Read all of a folder, or of a dataset the first repositories that give the documents of `cuts`.

    A folder needs neither cuts nor tokenizer. What can't be used is counted in `skipped` by reason.
    Raises: UserError if there is no source code, or an option doesn't fit the source."""
    name, dataset = source.name, bool(cuts) and is_dataset(source.name)
    if source.everything and (dataset or name == "stdlib"):
        raise UserError(f"--files all: {name} has code alone; use --data with a folder of repositories")
    if dataset:
        return stream_dataset(source, cuts, tokenizer, chunk, skipped)
    if source.subset or source.text_column:
        raise UserError(f"--subset, --text-column: {name} is no dataset; leave them out, or use hub:NAME")
    root = Path(sysconfig.get_path("stdlib") if name == "stdlib" else os.path.expanduser(name))
    if not name or not os.path.isdir(root):
        raise UserError(f"--data {name}: no such folder; give one, a file of rows, stdlib, stack or hub:NAME")
    repos = read_folder(root, skipped, source.everything)
    if not repos:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "no file with a source suffix"
        raise UserError(f"--data {name}: no source code found ({why}); give a folder with UTF-8 source files")
    return drop_leaks(repos, skipped)


def read_folder(root: Path, skipped: Counter, everything: bool = False) -> Repos:
    """Read the first 2 MB of each repository; of `everything` from a file that a hash of its name draws."""
    repos: Repos = {}
    for repo, paths in group_paths(root, list(walk(root, skipped, everything))).items():
        first, size = int(by_name_hash(repo), 16) % len(paths) if everything else 0, 0
        paths = paths[first:] + paths[:first]
        for file in keep_texts(repo, paths, (read_text(root / path) for path in paths), skipped):
            repos.setdefault(repo, []).append(file)
            size += len(file.text.encode())
            if size >= MAX_REPO_BYTES:
                break
    return repos


def keep_texts(repo: str, paths: list[str], texts: Iterable[Text], skipped: Counter) -> Iterator[SourceFile]:
    """Yield the files that could be read, and count the others by reason."""
    for path, (text, why) in zip(paths, texts):
        if text is None:
            skipped[why] += 1
        else:
            yield SourceFile(repo, path, text)


def walk(root: Path, skipped: Counter, everything: bool = False) -> Iterator[str]:
    """Yield the relative path of every source file (with `everything`, of every file) in path order."""
    leave_out = NOT_OWN if everything else NOT_OWN | TESTS
    for folder, folders, names in os.walk(root, onerror=lambda _: skipped.update(["unreadable"])):
        folders[:] = sorted(name for name in folders if name not in leave_out and name[0] != ".")
        if folders and len(Path(folder).relative_to(root).parts) >= MAX_DEPTH:
            skipped["nested too deeply"] += len(folders)
            folders.clear()
        for name in sorted(name for name in names if everything or CODE.fullmatch(name)):
            path = Path(folder, name).relative_to(root).as_posix()
            if path.encode(errors="ignore").decode() == path:
                yield path
            else:
                skipped["name not UTF-8"] += 1


def group_paths(root: Path, paths: Sequence[str]) -> dict[str, list[str]]:
    """Group paths by repository: `root`, or each child of it, or of the only folder in it that has files."""
    top, depth = root, 0
    while not (whole := is_one_repository(top)):
        children = {path.split("/")[depth] for path in paths}
        if len(children) != 1 or not (top / min(children)).is_dir():
            break
        top, depth = top / children.pop(), depth + 1
    repos: dict[str, list[str]] = {}
    for path in paths:
        child = path.split("/")[depth].removesuffix(".py")
        repos.setdefault(top.resolve().name if whole else child, []).append(path)
    return repos


def is_one_repository(name: str | Path) -> bool:
    """Tell whether --data names a folder that is one repository: marked so, and no child of it versioned."""
    folder = Path(os.path.expanduser(name))
    try:
        apart = any((child / mark).is_dir() for child in folder.iterdir() for mark in VERSIONED)
        marked = any((folder / mark).exists() for mark in ROOT_MARKS)
    except OSError:
        return False
    return marked and not apart and name not in ("", "stdlib", *STACK)


def read_text(path: Path) -> Text:
    """Read a source file."""
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return decode(file.read(MAX_FILE_BYTES + 1))
        return None, "not a regular file"
    except OSError:
        return None, "unreadable"


def decode(raw: bytes, encoding: str = "utf-8") -> Text:
    """Decode a file's content, with line ends as on Unix."""
    if len(raw) > MAX_FILE_BYTES:
        return None, "larger than 1 MB"
    if b"\0" in raw:
        return None, "binary"
    try:
        text = raw.decode(encoding).replace("\r\n", "\n")
    except (ValueError, LookupError):
        return None, f"not {encoding.upper()}"
    return (text, "") if text.strip() else (None, "empty")


# --- 3. Splits and near-copies ----------------------------------------------------------------------

SPLITS = {"train": range(60), "valid": range(60, 80), "test": range(80, 100)}  # percent of all names
LEAK = 0.15  # the share of a file's long lines that makes it a near-copy of code in other repositories
SAME = 0.5  # and of code in its own, whose files have a licence and imports in common


def split_of(repo: str) -> str:
    """Return the split of a repository, by a hash that never changes."""
    bucket = int.from_bytes(hashlib.sha256(f"v1:{repo}".encode()).digest()[:8], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def by_name_hash(name: str) -> str:
    """Return a key to sort or draw repositories, files and functions by, the same on every machine."""
    return hashlib.sha256(f"order:{name}".encode()).hexdigest()


def long_lines(files: Iterable[SourceFile]) -> set[int]:
    """Return hashes of these files' lines of 30 characters or more, without their indentation."""
    lines = (line.strip() for file in files for line in file.text.splitlines())
    return {hash(line) for line in lines if len(line) >= 30}


def near_copy(lines: set[int], known: set[int], share: float = LEAK) -> bool:
    """Tell whether a file with these long lines is a near-copy of files that have the known ones."""
    return len(lines & known) > share * len(lines)


def drop_leaks(repos: Repos, skipped: Counter) -> Repos:
    """Drop validation files that are near-copies of training files, and test files that are of either."""
    known: set[int] = set()  # lines of the splits before
    kept: Repos = {}
    for split in SPLITS:
        lines = {
            file: long_lines([file]) for repo in repos if split_of(repo) == split for file in repos[repo]
        }
        for file, own in lines.items():
            if near_copy(own, known):
                skipped["near-copy across splits"] += 1
            else:
                kept.setdefault(file.repo, []).append(file)
        known.update(*lines.values())
    return {repo: kept[repo] for repo in repos if repo in kept}


def drop_copies(files: Files, others: Iterable[SourceFile], skipped: Counter) -> list[SourceFile]:
    """Drop near-copies of what a model was trained on. Raises: UserError if nothing is left."""
    known = long_lines(others)
    kept = [file for file in files if not near_copy(long_lines([file]), known)]
    skipped["near-copy of what was trained on"] += len(files) - len(kept)
    if files and not kept:
        raise UserError(f"all {len(files)} files are near-copies of what was trained on; take other code")
    return kept


# --- 4. Tokens and documents ------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load tokenizer.json, or GPT-2's vocab.json and merges.txt. Raises: UserError if neither is readable."""
    try:
        if (folder / "tokenizer.json").exists():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises bare Exception
        need = "tokenizer.json, or vocab.json and merges.txt"
        raise UserError(f"{folder}: no readable tokenizer ({error}); it needs {need}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end a text; the first starts documents. Raises: UserError if there is none."""
    config = folder / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id") if config.is_file() else None
    ends = [tokenizer.token_to_id(END_OF_TEXT), *(known if isinstance(known, list) else [known])]
    usable = [end for end in ends if isinstance(end, int) and tokenizer.id_to_token(end) is not None]
    if not usable:
        raise UserError(f"{folder}: no token ends a text; add {END_OF_TEXT}, or eos_token_id in config.json")
    return tuple(dict.fromkeys(usable))


def largest_id(tokenizer: Tokenizer) -> int:
    """Return the largest token id; there may be gaps below it."""
    return max(tokenizer.get_vocab().values())


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token id, "" for those that are no text."""
    return [tokenizer.decode([i], skip_special_tokens=True) for i in range(largest_id(tokenizer) + 1)]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode each text as int32 tokens; special tokens spelled out in a text stay text."""
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.asarray(text.ids, np.int32) for text in encoded]


def with_path(file: SourceFile) -> str:
    """Return a file's text under its path, if it has one."""
    return (f"# {file.path}\n" if file.path else "") + f"{file.text.rstrip()}\n\n"


def cut_documents(repos: Repos, cut: Cut, tokenizer: Tokenizer, chunk: int, end: int) -> list[Excerpt]:
    """Cut a split's documents: the first T*C tokens of each repository, then the second of each, and so on.

    The order of repositories depends on their names alone. Raises: UserError if none is long enough."""
    size, longest = chunk * cut.chunks, 0
    runs: list[list[Excerpt]] = [[] for _ in range(cut.per_repo)]  # runs[i]: the i-th document of each
    for name in sorted((name for name in repos if split_of(name) == cut.split), key=by_name_hash):
        tokens = np.zeros(0, np.int32)
        for file in repos[name]:
            if len(tokens) < size * cut.per_repo:
                tokens = np.concatenate([tokens, *encode(tokenizer, [with_path(file)])])
        longest = max(longest, len(tokens))
        for i, run in enumerate(runs[: len(tokens) // size]):
            run.append(Excerpt(name, np.append(np.int32(end), tokens[i * size : (i + 1) * size])))
        if len(runs[0]) >= cut.limit:
            break
    if not runs[0]:
        why = f"no {cut.split} repository has the {size} tokens of a document, the longest has {longest}"
        use = "take more code or fewer --chunks; a folder with a .git (git init) is read as one repository"
        raise UserError(f"{why}; {use}")
    return [document for run in runs for document in run][: cut.limit]


def cut_repository(files: Files, tokenizer: Tokenizer, chunk: int, cut: Cut, end: int) -> list[Excerpt]:
    """Cut documents of one repository, spread evenly over it. Raises: UserError if it has fewer than two."""
    size = chunk * cut.chunks
    encoded = encode(tokenizer, [with_path(file) for file in files])
    tokens = np.concatenate([np.zeros(0, np.int32), *encoded])
    origin = np.repeat(np.asarray([file.path for file in files], object), [len(own) for own in encoded])
    count = len(tokens) // size
    if count < 2:
        fits = len(tokens) // (2 * chunk)
        use = f"take --chunks {fits} or fewer" if fits > 1 else "take more code, or a folder of repositories"
        raise UserError(f"the repository has {len(tokens)} tokens, and two documents need {2 * size}; {use}")
    documents = []
    for i in np.unique(np.linspace(0, count - 1, min(cut.limit, count)).round().astype(int)):
        part, name = slice(i * size, (i + 1) * size), f"{files[0].repo} {i + 1}/{count}"
        documents.append(Excerpt(name, np.append(np.int32(end), tokens[part]), origin[part]))
    return documents


# --- 5. Functions and problems to complete ----------------------------------------------------------

# A function's head, in any language that ends it with : or { and indents what follows
NOT_A_HEAD = (
    "if|elif|elsif|elseif|else|unless|for|foreach|while|until|switch|match|case|when|with|using|lock|"
    "synchronized|"
    r"try|catch|except|finally|class|return|async[ \t]+(?:for|with)"
)
HEAD = re.compile(rf"[ \t}}]*+(?!(?:{NOT_A_HEAD})\b)(?=[^#\s]).*\)[^()]*[:{{]\s*$")


class Function(NamedTuple):
    """A function of a file that was not learned from."""

    name: str  # file and line
    before: str  # the file under its path, down to a line in the middle of the function
    rest: str  # of the function, from the end of that line on


def find_functions(file: SourceFile) -> list[Function]:
    """Find the functions of a file whose bodies have four lines or more, and cut each at its middle line."""
    lines, blank, found = file.text.splitlines(keepends=True), float("inf"), []
    depth = [len(line) - len(line.lstrip()) if line.strip() else blank for line in lines]
    for head in (i for i, line in enumerate(lines) if HEAD.match(line)):
        inside = takewhile(lambda i: depth[i] > depth[head], range(head + 1, len(lines)))
        body = [i for i in inside if depth[i] < blank]
        if len(body) >= 4:
            middle = body[len(body) // 2]
            before = f"# {file.path}\n" + "".join(lines[:middle]).rstrip()
            rest = "\n" + "".join(lines[middle : body[-1] + 1])
            found.append(Function(f"{file.path}:{head + 1}", before, rest))
    return found


def hold_out(files: Files, most: int) -> tuple[list[SourceFile], list[Function]]:
    """Split a repository into the files to learn from and at most `most` functions of the others.

    A hash of its path holds a fifth of the files out; near-copies of files to learn from give no function."""
    order = sorted(files, key=lambda file: by_name_hash(file.path))
    held, kept = order[: len(order) // 5], set(order[len(order) // 5 :])
    learned = [file for file in files if file in kept]
    known = long_lines(learned)
    unseen = [file for file in held if not near_copy(long_lines([file]), known, SAME)]
    functions = [function for file in unseen for function in find_functions(file)]
    return learned, sorted(functions, key=lambda function: by_name_hash(function.name))[:most]


# --- 6. Problems ----------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A Problem is one task of a benchmark: a text to continue, and the tests that the result must pass."""

    task_id: str
    prompt: str  # what a model is given
    stop: tuple[str, ...]  # texts that end its continuation
    reference: str  # the benchmark's own continuation
    before: str  # text put before a continuation to make a program of it
    tests: str  # program text that runs after it, in the same namespace
    cases: tuple[str, ...] = ()  # unittest classes to run then; empty where the tests are plain statements


def humaneval(rows: list[dict[str, Any]]) -> list[Problem]:
    """Make problems of functions to complete (Chen et al. 2021, whose stop texts these are)."""
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    problems = []
    for row in rows:
        prompt, tests = row["prompt"], f"{row['test']}\ncheck({row['entry_point']})"
        problems.append(Problem(row["task_id"], prompt, stop, row["canonical_solution"], prompt, tests))
    return problems


def mbpp(rows: list[dict[str, Any]]) -> list[Problem]:
    """Make problems of all MBPP tasks, each asked after the solved tasks 2 to 4 (Austin et al. 2021)."""
    problems, examples = [], ""
    for row in sorted(rows, key=lambda row: row["task_id"]):
        task, shown, code = row["task_id"], "\n".join(row["test_list"]), row["code"].replace("\r\n", "\n")
        question = f"You are an expert Python programmer, and here is your task: {row['text']}"
        question += f" Your code should pass these tests:\n\n{shown}\n[BEGIN]\n".replace("\r\n", "\n")
        tests = f"{row['test_setup_code']}\n{shown}".replace("\r\n", "\n")
        problems.append(Problem(f"MBPP/{task}", question, ("[DONE]",), code, "", tests))
        examples += f"{question}{code}\n[DONE]\n\n" if 2 <= task <= 4 else ""
    return [problem._replace(prompt=examples + problem.prompt) for problem in problems]


def mbpp_test(rows: list[dict[str, Any]]) -> list[Problem]:
    """Make problems of MBPP's test split, tasks 11 to 510, which papers report."""
    return [problem for problem in mbpp(rows) if 11 <= int(problem.task_id.removeprefix("MBPP/")) <= 510]


def classeval(rows: list[dict[str, Any]]) -> list[Problem]:
    """Make problems of whole classes, each to be written from its skeleton (Du et al. 2023)."""
    stop, problems = ("\n# ", "\nif __name__", "\nprint"), []
    for row in rows:
        imports, name, code = "\n".join(row["import_statement"]), row["class_name"], row["solution_code"]
        skeleton = f"# {name}, to be completed\n{row['skeleton'].rstrip()}"
        prompt = f"{skeleton}\n\n\n# {name}, complete\n{imports}\n\n\n"
        cases = tuple(case.strip() for case in row["test_classes"])
        problems.append(Problem(row["task_id"], prompt, stop, code, f"{imports}\n\n\n", row["test"], cases))
    return problems


def classeval_methods(rows: list[dict[str, Any]]) -> list[Problem]:
    """Make a problem of each method of ClassEval, to be written after the rest of its class."""
    stop, problems = ("\n    def", "\n    @", "\nclass", "\ndef", "\n#", "\nif", "\nprint"), []
    for row, whole in zip(rows, classeval(rows)):
        lines = whole.reference.splitlines(keepends=True)
        classes = [node for node in ast.parse(whole.reference).body if isinstance(node, ast.ClassDef)]
        body = next(node.body for node in classes if node.name == row["class_name"])
        methods = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        for method in row["methods_info"]:
            node = methods[method["method_name"]]
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            inside = node.body[0].lineno - 1
            rest = "".join(lines[:start] + lines[node.end_lineno :]).rstrip()
            text = re.split('["“”]{3}', method["method_description"])[1]
            prompt = f'{whole.before}{rest}\n\n{"".join(lines[start:inside])}        """{text}"""\n'
            reference = "".join(lines[inside : node.end_lineno])
            task, cases = f"{row['task_id']}.{node.name}", (method["test_class"],)
            problems.append(Problem(task, prompt, stop, reference, prompt, whole.tests, cases))
    return problems


BENCHMARKS: dict[str, tuple[str, str | None, Callable]] = {  # name: the hub's dataset, its subset, the parser
    "humaneval": ("openai/openai_humaneval", None, humaneval),
    "mbpp": ("google-research-datasets/mbpp", "full", mbpp),
    "mbpp-test": ("google-research-datasets/mbpp", "full", mbpp_test),
    "classeval": ("FudanSELab/ClassEval", None, classeval),
    "classeval-methods": ("FudanSELab/ClassEval", None, classeval_methods),
}


def load_problems(name: str, path: Path | None = None) -> list[Problem]:
    """Load a benchmark's problems from its file (.json, .jsonl, .jsonl.gz), or else from the hub.

    Raises: UserError if it can't be read or has another format."""
    hub, subset, parse = BENCHMARKS[name]
    source, advice = path or hub, "download it and pass --benchmark-file"
    try:
        if path is None:
            import datasets

            rows = [row for split in datasets.load_dataset(hub, subset).values() for row in split]
        else:
            advice = "pass the benchmark's own file"
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                text = file.read()
            lines = [line for line in text.split("\n") if line.strip()]
            rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in lines]
        if not rows:
            raise ValueError("nothing in it")
    except Exception as error:  # whatever the network, the hub, the cache or the file may raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{source}: not readable ({reason}); {advice}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of old escapes in the benchmarks' programs
            return parse(rows)
    except (LookupError, TypeError, ValueError, AttributeError, SyntaxError, StopIteration) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{source}: not the format of {name} ({reason}); {advice}") from error


# ======== plumbing: datasets that stream, files =====================================================

TEXT = ("content", "text", "code", "whole_func_string")  # columns, as the common datasets of code call them
REPO = ("max_stars_repo_name", "repo_name", "repository_name", "repo")
PATH = ("max_stars_repo_path", "path", "func_path_in_repository", "file_path")
WINDOW = 10_000  # rows that are read before they are put together by repository
CONTENT = "https://softwareheritage.s3.amazonaws.com/content/"  # The Stack v2's files, gzipped, for everyone
RETRIES = (1, 4, 16)  # seconds to wait before asking there again
ADVICE = {  # what an error says: what to do about it
    "gated|exist on the Hub": "accept its terms at {page} and log in (hf auth login or HF_TOKEN=...)",
    "Couldn't reach|Connect|Timeout": "connect to the Hugging Face hub (and unset HF_HUB_OFFLINE)",
    "": "check --data and --subset",
}


def is_dataset(name: str) -> bool:
    """Tell whether --data names a dataset: of the hub, a file of ROWS, or a folder of those alone."""
    root = Path(os.path.expanduser(name))
    if os.path.isdir(root) and name not in ("", *STACK):
        return not any(walk(root, Counter())) and any(path.name.endswith(ROWS) for path in root.rglob("*"))
    return name in STACK or name.startswith("hub:") or (name.endswith(ROWS) and os.path.isfile(root))


def stream_dataset(
    source: Source, cuts: Sequence[Cut], tokenizer: Tokenizer, chunk: int, skipped: Counter
) -> Repos:
    """Read the first repositories that give the documents of `cuts`. Raises: UserError if there is none."""
    repos: Repos = {}
    lines: dict[str, set[int]] = {split: set() for split in SPLITS}
    size = {cut: cut.chunks * chunk for cut in cuts}  # tokens of a document
    missing, longest = {cut: cut.limit for cut in cuts}, 0  # documents, tokens
    with ThreadPoolExecutor(16) as pool:
        for repo, column, rows in group_rows(source):
            wanted = [cut for cut in cuts if missing[cut] > 0 and cut.split == split_of(repo)]
            least = min((size[cut] for cut in wanted), default=0)
            if not wanted or repo in repos or sum(row.get("length_bytes") or least for row in rows) < least:
                continue  # not needed, or too short, which is known before its files are fetched
            batches = (rows[i : i + 32] for i in range(0, len(rows), 32))
            texts = chain.from_iterable(pool.map(fetch_text, batch, repeat(column)) for batch in batches)
            paths = [first_value(row, PATH).lstrip("/") for row in rows]
            elsewhere = [lines[split] for split in SPLITS if split != split_of(repo)]
            own, tokens = [], 0
            for file in keep_texts(repo, paths, texts, skipped):
                new = long_lines([file])
                if near_copy(new, set().union(*(new & known for known in elsewhere))):
                    skipped["near-copy across splits"] += 1
                    continue
                own.append(file)
                tokens += len(encode(tokenizer, [with_path(file)])[0])
                if tokens >= max(size[cut] * cut.per_repo for cut in wanted):
                    break
            longest = max(longest, tokens)
            if tokens >= least:
                repos[repo] = own
                lines[split_of(repo)] |= long_lines(own)
            for cut in wanted:
                missing[cut] -= min(cut.per_repo, tokens // size[cut])
            if max(missing.values()) <= 0:
                break
    if not repos:
        why = f"the longest repository has {longest} tokens, no document's (skipped: {dict(skipped)})"
        raise UserError(f"--data {source.name}: {why}; use fewer --chunks or another dataset")
    return drop_leaks(repos, skipped)


def group_rows(source: Source) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield (repository, column of the text, rows in path order) of every WINDOW rows of a dataset."""
    rows = iter(tqdm(open_rows(source), "dataset", unit=" rows", disable=None))
    for window in iter(lambda: list(islice(rows, WINDOW)), []):
        column, repos = find_text_column(source, window[0]), {}
        for row in window:
            files = [row] if column or "files" not in row else row["files"]  # or in The Stack v2's train-ids
            own = [file for file in files if not (file.get("is_vendor") or file.get("is_generated"))]
            whole = hashlib.sha256(repr(row).encode(errors="replace")).hexdigest()[:16]
            repos.setdefault(first_value(row, REPO) or whole, []).extend(own)
        for repo, files in repos.items():
            yield repo, column, sorted(files, key=lambda file: first_value(file, PATH))


def first_value(row: dict[str, Any], columns: Sequence[str]) -> str:
    """Return what the first of these columns that isn't empty holds, or ""."""
    return next((str(row[column]) for column in columns if row.get(column)), "")


def find_text_column(source: Source, row: dict[str, Any]) -> str:
    """Return the column with the text, "" if rows point to Software Heritage. Raises: UserError."""
    column = source.text_column or next((name for name in TEXT if name in row), "")
    if not isinstance(row.get(column, 0), str | None) and (column or not {"blob_id", "files"} & set(row)):
        raise UserError(f"--data {source.name}: no text there; give --text-column, one of {', '.join(row)}")
    return column


def fetch_text(row: dict[str, Any], column: str) -> Text:
    """Decode a row's text, from Software Heritage if column is "". Raises: UserError if that is down."""
    if column:
        return decode((row[column] or "").encode(errors="replace"))
    if (row.get("length_bytes") or 0) > MAX_FILE_BYTES:
        return None, "larger than 1 MB"
    for wait in (0, *RETRIES):
        time.sleep(wait)
        try:
            with urlopen(CONTENT + quote(row["blob_id"], safe=""), timeout=60) as answer:
                raw = gzip.GzipFile(fileobj=answer).read(MAX_FILE_BYTES + 1)
            return decode(raw, row.get("src_encoding") or "utf-8")
        except (gzip.BadGzipFile, zlib.error):
            return None, "damaged"
        except (OSError, EOFError, HTTPException) as error:
            if getattr(error, "code", None) in (403, 404):
                return None, "not at Software Heritage"
            why = str(error)
    raise UserError(f"Software Heritage can't be reached ({why}); connect, or use --data FOLDER")


def open_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Stream the rows of a dataset's split "train", or else of its first. Raises: UserError."""
    import datasets
    import huggingface_hub

    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity(library.logging.CRITICAL)  # what is wrong is said once, below
    name, subset = STACK.get(source.name, (os.path.expanduser(source.name), None))
    subset = source.subset or subset
    options = {"data_dir" if "/" in subset else "name": subset} if subset else {}
    if name.startswith("hub:"):
        name, _, options["revision"] = name.removeprefix("hub:").partition("@")
    elif os.path.isfile(name):
        name, options["data_files"] = "parquet" if name.endswith(".parquet") else "json", name
    try:
        splits = datasets.load_dataset(name, streaming=True, **options)
        yield from splits["train"] if "train" in splits else next(iter(splits.values()))
    except Exception as error:  # the libraries below raise many kinds
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        advice = next(advice for pattern, advice in ADVICE.items() if re.search(pattern, said))
        advice = advice.format(page=f"https://huggingface.co/datasets/{name}")
        raise UserError(f"--data {source.name}: {said}; {advice}, or use --data FOLDER") from None


def cache_folder() -> Path:
    """Return the user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ponderttt"


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
