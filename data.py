"""Real code as documents: files -> repositories -> splits -> tokens -> documents of chunks.

A *repository* is the unit that nothing may leak across: a package of the standard library, a folder's child,
a folder that is one itself, or the rows of a dataset that name it alike. A hash of its name says its split.
A *document* is a run of its tokens (its files in path order, each under its path) in T chunks of C tokens:

    tokens = [end, x_0, x_1, ..., x_{TC-1}]        chunk t is x_{tC} ... x_{(t+1)C - 1}
"""

import glob
import gzip
import hashlib
import json
import os
import re
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tqdm import tqdm

# --- 1. Types ---------------------------------------------------------------------------------------
ASSETS = Path(__file__).parent / "assets"


class UserError(Exception):
    """An error that the user can mend; its message is one line that says what to do."""


def require(condition: Any, message: str) -> None:
    """Raises: UserError with the message, unless the condition holds."""
    if not condition:
        raise UserError(message)


class Source(NamedTuple):
    """Where files come from."""

    name: str  # stdlib, a folder, stack, hub:NAME[@REVISION], or rows.jsonl (* matches several)
    everything: bool = False  # of a folder: documents, tests and data too, not code alone
    subset: str | None = None  # of a dataset: a configuration by name, or one of its folders if it has a "/"
    text_column: str | None = None  # of a dataset


STAND_IN = Source("stdlib")  # what is trained and calibrated on where the code is one repository


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
    text_TU: np.ndarray | None = None  # (T, U): features of each chunk's text, which rl.py computes


Files = Iterable[SourceFile]
Repos = dict[str, list[SourceFile]]

# --- 2. Files to repositories -----------------------------------------------------------------------
CODE = re.compile(  # names of files with code, but not the table of Python's build settings
    r"(?s)(?!_sysconfigdata).+\.(pyi?|cc?|h|[ch]pp|cs|go|java|[jt]sx?|kt|lua|php|pl|rb|rs|scala|sh|swift)"
)
NOT_OWN = {"site-packages", "dist-packages", "node_modules", "__pycache__"}  # folders of others' code
TESTS = {"test", "tests", "testing", "idle_test"}
ROOT_MARKS = (".git", ".hg", ".svn", "pyproject.toml", "setup.py", "package.json", "Cargo.toml", "go.mod")
ROWS = (".parquet", ".jsonl", ".jsonl.gz")  # suffixes of a dataset's files
MAX_SCRIPTS = 5  # files of code that a dataset's folder may have beside its rows
MAX_FILE_BYTES, MAX_REPO_BYTES, MAX_DEPTH = 1_000_000, 2_000_000, 64  # depth of folders within folders


def load_repositories(source: Source, cuts, tokenizer, chunk: int, skipped: Counter) -> Repos:
    """Read all of a folder, or of a dataset the first repositories that give the documents of `cuts`.
    What can't be used is counted in `skipped` by reason. A folder needs no cuts. Raises: UserError."""
    name = source.name
    dataset = bool(cuts) and is_dataset(name)  # without cuts, a folder is meant
    folder = not dataset and name != "stdlib"
    fits = (folder or not source.everything) and (dataset or not (source.subset or source.text_column))
    require(fits, f"--data {name}: --files all is for folders, --subset and --text-column are for datasets")
    root = Path(sysconfig.get_path("stdlib") if name == "stdlib" else os.path.expanduser(name))
    if dataset:
        skipped.update("script beside the rows" for _ in walk(root, Counter()) if name != "stack")
        repos = stream_dataset(source, cuts, tokenizer, chunk, skipped)
    else:
        require(root.is_dir(), f"--data {name}: no such folder; give one, stdlib, stack or hub:NAME")
        repos = read_folder(root, skipped, source.everything)
    why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "no file with a source suffix"
    use = "give --text-column, or " * dataset + "use more or fewer --chunks"
    require(repos, f"--data {name}: no source code found, or too little ({why}); {use}")
    # A file that is there again is read once: what is learned from the first would seem to pay on the second.
    once = lambda files: drop_near_copies(files, set(), skipped, "in its repository", COPY, grow=True)
    return drop_leaks({repo: list(once(files)) for repo, files in repos.items()}, skipped)


def is_dataset(name: str) -> bool:
    """Tell if --data names a dataset: of the hub, a file of ROWS, or a folder of them with little code."""
    if name == "stack" or name.startswith("hub:") or name.lower().endswith(ROWS):
        return True
    root = Path(os.path.expanduser(name))
    scripts = list(islice(walk(root, Counter()), MAX_SCRIPTS + 1))
    if name in ("", "stdlib") or len(scripts) > MAX_SCRIPTS or (scripts and has_mark(root)):
        return False
    places = [path.relative_to(root).parts for path in root.rglob("*") if path.name.endswith(ROWS)]
    return any(not scripts or (len(place) <= 2 and place[0] not in TESTS) for place in places)


def is_one_repository(name: str) -> bool:
    """Tell whether --data names a folder that is one repository, whatever others lie in it."""
    return name not in ("", "stdlib") and not is_dataset(name) and has_mark(Path(os.path.expanduser(name)))


def has_mark(folder: Path) -> bool:
    """Tell whether something in a folder says that it is a repository."""
    return any(os.path.exists(folder / mark) for mark in ROOT_MARKS)


def read_folder(root: Path, skipped: Counter, everything: bool = False) -> Repos:
    """Read 2 MB of each repository from its first file on, with `everything` from one that its hash draws."""
    repos: Repos = {}
    for repo, paths in group_paths(root, list(walk(root, skipped, everything))).items():
        first, size = everything * int(by_name_hash(repo), 16) % len(paths), 0
        for path in paths[first:] + paths[:first]:
            if size < MAX_REPO_BYTES and (text := read_text(root / path, skipped)):
                repos.setdefault(repo, []).append(SourceFile(repo, path, text))
                size += len(text.encode())
    return repos


def by_name_hash(name: str) -> str:
    """Return a key to sort or draw repositories, files and functions by, the same on every machine."""
    return hashlib.sha256(f"order:{name}".encode()).hexdigest()


def walk(root: Path, skipped: Counter, everything: bool = False) -> Iterator[str]:
    """Yield in path order the relative paths of source files or `everything`; of a clone, what git tracks."""
    leave_out, tracked = NOT_OWN if everything else NOT_OWN | TESTS, {}
    for folder, folders, names in os.walk(root, onerror=lambda _: skipped.update(["unreadable"])):
        tracked[folder] = tracked.get(os.path.dirname(folder)) or tracked_files(folder)
        folders[:] = sorted(name for name in folders if name not in leave_out and name[0] != ".")
        place = Path(folder).relative_to(root)
        if folders and len(place.parts) >= MAX_DEPTH:
            skipped["nested too deeply"] += len(folders)
            folders.clear()
        for name in sorted(name for name in names if everything or CODE.fullmatch(name)):
            path = (place / name).as_posix()
            if tracked[folder] and os.path.join(folder, name) not in tracked[folder]:
                skipped["not under version control"] += 1
            elif path.encode(errors="ignore").decode() == path:  # all of it is UTF-8
                yield path
            else:
                skipped["name not UTF-8"] += 1


@cache  # a folder is walked several times in a run
def tracked_files(folder: str) -> set[str]:
    """Find the files that git tracks in a folder; none where there is no git or no clone. Nothing runs that
    the folder's own configuration names."""
    command = ["git", "-c", "core.fsmonitor=", "ls-files", "-z"]
    if not os.path.exists(os.path.join(folder, ".git")):
        return set()
    try:
        said = subprocess.run(command, cwd=folder, capture_output=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {os.path.join(folder, os.fsdecode(name)) for name in said.split(b"\0") if name}


def group_paths(root: Path, paths: list[str]) -> dict[str, list[str]]:
    """Group paths by repository: a marked folder around all, or each child of the innermost around all."""
    inner = Path(os.path.commonpath([os.path.dirname(path) for path in paths] or [""]))
    around = [root / folder for folder in (*reversed(inner.parents), inner)]  # outermost first
    whole = next((folder.resolve().name for folder in around if has_mark(folder)), None)
    repos = {}
    for path in paths:
        child = path.split("/")[len(inner.parts)]
        repos.setdefault(whole or child.removesuffix(".py"), []).append(path)
    return repos


def read_text(path: Path, skipped: Counter) -> str:
    """Read a source file; what is no text gives "" and is counted by reason."""
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return decode(file.read(MAX_FILE_BYTES + 1), skipped)
        skipped["not a regular file"] += 1
    except OSError:
        skipped["unreadable"] += 1
    return ""


def decode(raw: bytes, skipped: Counter) -> str:
    """Decode a file's content, with line ends as on Unix; what is no text gives "" and is counted."""
    try:
        text, why = raw.decode().replace("\r\n", "\n"), "empty"
    except UnicodeDecodeError:
        text, why = "", "not UTF-8"
    if len(raw) > MAX_FILE_BYTES:
        why = "larger than 1 MB"
    elif b"\0" in raw:
        why = "binary"
    elif text.strip():
        return text
    skipped[why] += 1
    return ""


# --- 3. Splits and near-copies ----------------------------------------------------------------------
SPLITS = {"train": range(60), "valid": range(60, 80), "test": range(80, 100)}  # percent of all names
LEAK = 0.15  # the share of a file's long lines that makes it a near-copy of code in other repositories
COPY = 0.9  # and of files before it in its own, as in a folder of builds


def split_of(repo: str) -> str:
    """Return the split of a repository, by a hash that never changes."""
    bucket = int.from_bytes(hashlib.sha256(f"v1:{repo}".encode()).digest()[:8], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def long_lines(files: Iterable[SourceFile]) -> set[int]:
    """Return hashes of these files' lines of 30 characters or more, without their indentation."""
    lines = (line.strip() for file in files for line in file.text.splitlines())
    return {hash(line) for line in lines if len(line) >= 30}


def drop_near_copies(files: Files, known, skipped, why="across splits", share=LEAK, grow=False) -> Files:
    """Yield the files of whose long lines no more than a share are `known`, and count the other files.
    If known is to `grow`, each file's lines are known to those after it."""
    for file in files:
        lines = long_lines([file])
        if len(lines & known) <= share * len(lines):
            yield file
        else:
            skipped[f"near-copy {why}"] += 1
        if grow:
            known |= lines


def drop_leaks(repos: Repos, skipped: Counter) -> Repos:
    """Drop validation files that are near-copies of training files, and test files that are of either."""
    kept, known = {}, set()  # files, and the long lines of the splits before
    for split in SPLITS:
        own = {repo: files for repo, files in repos.items() if split_of(repo) == split}
        kept |= {repo: list(drop_near_copies(files, known, skipped)) for repo, files in own.items()}
        known |= long_lines(chain(*own.values()))
    return {repo: kept[repo] for repo in repos if kept[repo]}


# --- 4. Tokens and documents ------------------------------------------------------------------------
END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load tokenizer.json, or GPT-2's vocab.json and merges.txt. Raises: UserError if neither is readable."""
    whole, *parts = (str(folder / name) for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if os.path.exists(whole):
            tokenizer = Tokenizer.from_file(whole)
        else:
            tokenizer = Tokenizer.from_str(ByteLevelBPETokenizer.from_file(*parts).to_str())
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: no tokenizer.json, or vocab.json and merges.txt ({error})") from None
    tokenizer.no_truncation()  # as fine-tuning may have left them on
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end a text; the first starts documents. Raises: UserError if there is none."""
    config = folder / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id") if config.is_file() else None
    ends = [tokenizer.token_to_id(END_OF_TEXT), *(known if isinstance(known, list) else [known])]
    usable = [end for end in ends if isinstance(end, int) and tokenizer.id_to_token(end) is not None]
    require(usable, f"{folder}: no token ends a text; add {END_OF_TEXT}, or eos_token_id in config.json")
    return tuple(dict.fromkeys(usable))


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token id, "" for those that are no text or missing."""
    return tokenizer.decode_batch([[i] for i in range(max(tokenizer.get_vocab().values()) + 1)])


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode each text as int32 tokens; special tokens spelled out in a text stay text."""
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.asarray(text.ids, np.int32) for text in encoded]


def with_path(file: SourceFile) -> str:
    """Return a file's text under its path, if it has one."""
    return (f"# {file.path}\n" if file.path else "") + f"{file.text.rstrip()}\n\n"


def read_tokens(files: Files, tokenizer: Tokenizer, most: int) -> tuple[list[SourceFile], np.ndarray]:
    """Read files until they have `most` tokens -> (these files, their tokens)."""
    read, tokens = [], np.zeros(0, np.int32)
    for file in files:
        read.append(file)
        tokens = np.append(tokens, encode(tokenizer, [with_path(file)])[0])
        if len(tokens) >= most:
            break
    return read, tokens


def cut_documents(repos: Repos, cut: Cut, tokenizer: Tokenizer, chunk: int, end: int) -> list[Excerpt]:
    """Cut a split's documents: the first T*C tokens of each repository, then the second of each, and so on.
    The order of repositories depends on their names alone. Raises: UserError if none is long enough."""
    size, longest = chunk * cut.chunks, 0
    runs = [[] for _ in range(cut.per_repo)]  # runs[i]: the i-th document of each
    for name in sorted((name for name in repos if split_of(name) == cut.split), key=by_name_hash):
        _, tokens = read_tokens(repos[name], tokenizer, size * cut.per_repo)
        longest = max(longest, len(tokens))
        for i, run in enumerate(runs[: len(tokens) // size]):
            run.append(Excerpt(name, np.append(np.int32(end), tokens[i * size : (i + 1) * size])))
        if len(runs[0]) >= cut.limit:
            break
    why = f"no {cut.split} repository has the {size} tokens of a document, the longest has {longest}"
    require(runs[0], f"{why}; take more code, fewer --chunks, or `git init` what is one repository")
    return [document for run in runs for document in run][: cut.limit]


def cut_repository(files: list[SourceFile], tokenizer, chunk: int, cut: Cut, end: int) -> list[Excerpt]:
    """Cut documents evenly from one repository, each named as one itself. Raises: UserError below two."""
    size, tokens = chunk * cut.chunks, np.concatenate(encode(tokenizer, list(map(with_path, files))))
    count, fits = len(tokens) // size, len(tokens) // (2 * chunk)
    use = f"take --chunks {fits} or fewer" if fits > 1 else "take more code, or a folder of repositories"
    require(count > 1, f"the repository has {len(tokens)} tokens, two documents need {2 * size}; {use}")
    places = np.linspace(0, count - 1, min(cut.limit, count)).round().astype(int)
    parts = [np.append(np.int32(end), tokens[i * size : (i + 1) * size]) for i in places]
    return [Excerpt(f"{files[0].repo} {i + 1}/{count}", part) for i, part in zip(places, parts)]


def load_documents(source: Source, cuts: dict[str, Cut], tokenizer, chunk: int, end: int, skipped: Counter):
    """Read the documents of named cuts -> {name: Excerpts}. A source that is one repository gives those of
    "test" alone, since no stage may have seen it; STAND_IN gives all others. Raises: UserError."""
    own = is_one_repository(source.name)
    others = {name: cut for name, cut in cuts.items() if not own or name != "test"}
    repos = load_repositories(STAND_IN if own else source, list(others.values()), tokenizer, chunk, skipped)
    found = {name: cut_documents(repos, cut, tokenizer, chunk, end) for name, cut in others.items()}
    if own and "test" in cuts:
        (files,) = load_repositories(source, (), None, 0, skipped).values()
        known = long_lines(chain(*repos.values()))
        new = list(drop_near_copies(files, known, skipped, "of what was trained on"))
        require(new, f"all {len(files)} files are near-copies of what was trained on; take other code")
        found["test"] = cut_repository(new, tokenizer, chunk, cuts["test"], end)
    enough = "test" not in found or len({x.repo for x in found["test"]}) > 1
    advice = "use more code, more --test-documents or fewer --chunks"
    require(enough, f"intervals need two test documents of two repositories; {advice}")
    return found


# --- 5. Functions and problems ----------------------------------------------------------------------
# A function's head ends with : or { in any language, and what follows is indented.
NOT_A_HEAD = "if|elif|elsif|elseif|else|unless|for|foreach|while|until|switch|match|case|when|with|using|lock"
NOT_A_HEAD += r"|synchronized|try|catch|except|finally|class|return|async[ \t]+(?:for|with)"
HEAD = re.compile(rf"[ \t}}]*+(?!(?:{NOT_A_HEAD})\b)(?=[^#\s]).*\)[^()]*[:{{]\s*$")
SAME = 0.5  # as LEAK, but of files of one repository, which have a licence and imports in common
FUNCTIONS, BEFORE = 8, 12_000  # most to complete in a repository; most characters shown before one


class Function(NamedTuple):
    """A function of a file that was not learned from."""

    name: str  # file and line
    before: str  # the file under its path, down to a line in the middle of the function
    rest: str  # of the function, from the end of that line on


def find_functions(file: SourceFile) -> Iterator[Function]:
    """Yield the functions of a file whose bodies have four lines or more, each cut at its middle line."""
    lines, blank = file.text.splitlines(keepends=True), float("inf")
    depth = [len(line) - len(line.lstrip()) if line.strip() else blank for line in lines]
    for head in (i for i, line in enumerate(lines) if HEAD.match(line)):
        inside = takewhile(lambda i: depth[i] > depth[head], range(head + 1, len(lines)))
        body = [i for i in inside if depth[i] < blank]
        if len(body) >= 4:
            middle = body[len(body) // 2]
            before = f"# {file.path}\n" + "".join(lines[:middle]).rstrip()
            rest = "\n" + "".join(lines[middle : body[-1] + 1])
            yield Function(f"{file.path}:{head + 1}", before, rest)


def hold_out(files: list[SourceFile], most: int) -> tuple[list[SourceFile], list[Function]]:
    """Split a repository into four fifths of its files to learn from, and `most` functions of the others."""
    held = set(sorted(files, key=lambda file: by_name_hash(file.path))[: len(files) // 5])
    learned = [file for file in files if file not in held]
    unseen = drop_near_copies(held, long_lines(learned), Counter(), share=SAME)  # copies are seen
    functions = chain(*map(find_functions, unseen))
    return learned, sorted(functions, key=lambda function: by_name_hash(function.name))[:most]


class Problem(NamedTuple):
    """One task of a benchmark: a text to continue, and the tests that the result must pass."""

    task_id: str
    prompt: str  # what a model is given
    stop: tuple[str, ...]  # texts that end its continuation
    reference: str  # the benchmark's own continuation
    before: str  # text put before a continuation to make a program of it
    tests: str  # program text that runs after it, in the same namespace
    cases: tuple[str, ...] = ()  # unittest classes to run then; empty where the tests are plain statements


def completion_tasks(
    repos: Repos, tokenizer: Tokenizer, chunk: int, chunks: int, limit: int
) -> dict[str, tuple]:
    """Find (tokens to learn from, functions to complete) in at most `limit` test repositories, or in the only
    one. Raises: UserError if none is large enough."""
    found, alone = {}, len(repos) == 1
    for name in sorted(repos, key=by_name_hash):
        if len(found) < limit and (alone or split_of(name) == "test"):
            files, held = hold_out(repos[name], 8 * FUNCTIONS if alone else FUNCTIONS)
            _, tokens = read_tokens(files, tokenizer, chunks * chunk)
            if held and len(tokens) >= 2 * chunk:
                tasks = [Problem(f"{name}/{f.name}", f.before[-BEFORE:], (), f.rest, "", "") for f in held]
                found[name] = tokens[: chunks * chunk], tasks
    need = "one needs five files, a function and two chunks of code; check --data"
    require(found, f"no repository to complete: {need}")
    return found


def humaneval(rows: list[dict]) -> Iterator[Problem]:
    """Make problems of functions to complete (Chen et al. 2021, whose stop texts these are)."""
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    for row in rows:
        prompt, tests = row["prompt"], f"{row['test']}\ncheck({row['entry_point']})"
        yield Problem(row["task_id"], prompt, stop, row["canonical_solution"], prompt, tests)


def mbpp(rows: list[dict], tasks: range = range(975)) -> Iterator[Problem]:
    """Make problems of some of MBPP's tasks, each after the solved tasks 2 to 4 (Austin et al. 2021)."""
    examples, problems = "", {}
    for row in sorted(rows, key=lambda row: row["task_id"]):
        shown = "\n".join(row["test_list"])
        question = f"You are an expert Python programmer, and here is your task: {row['text']}"
        question += f" Your code should pass these tests:\n\n{shown}\n[BEGIN]\n"
        texts = question, row["code"], f"{row['test_setup_code']}\n{shown}"
        question, code, tests = (text.replace("\r\n", "\n") for text in texts)
        problems[row["task_id"]] = Problem(f"MBPP/{row['task_id']}", question, ("[DONE]",), code, "", tests)
        examples += f"{question}{code}\n[DONE]\n\n" if 2 <= row["task_id"] <= 4 else ""
    return (p._replace(prompt=examples + p.prompt) for task, p in problems.items() if task in tasks)


def classeval(rows: list[dict]) -> Iterator[Problem]:
    """Make problems of whole classes, each to be written from its skeleton (Du et al. 2023)."""
    stop = ("\n# ", "\nif __name__", "\nprint")
    for row in rows:
        name, before = row["class_name"], "\n".join(row["import_statement"]) + "\n\n\n"
        prompt = f"# {name}, to be completed\n{row['skeleton'].rstrip()}\n\n\n# {name}, complete\n{before}"
        cases = tuple(case.strip() for case in row["test_classes"])
        yield Problem(row["task_id"], prompt, stop, row["solution_code"], before, row["test"], cases)


BENCHMARKS: dict[str, tuple[str, str | None, Callable]] = {  # name: the hub's dataset, its subset, the parser
    "humaneval": ("openai/openai_humaneval", None, humaneval),
    "mbpp": ("google-research-datasets/mbpp", "full", mbpp),
    "mbpp-test": ("google-research-datasets/mbpp", "full", lambda rows: mbpp(rows, range(11, 511))),
    "classeval": ("FudanSELab/ClassEval", None, classeval),
}


def load_problems(name: str, path: Path | None = None) -> list[Problem]:
    """Load a benchmark's problems from its file (.json, .jsonl, .jsonl.gz), or the hub. Raises: UserError."""
    hub, subset, parse = BENCHMARKS[name]
    try:
        if path is None:
            import datasets

            rows = [row for split in datasets.load_dataset(hub, subset).values() for row in split]
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                listed = path.suffix == ".json"
                rows = json.load(file) if listed else [json.loads(line) for line in file if line.strip()]
        problems, why = list(parse(rows)), "it is empty"
    except Exception as error:  # whatever the network, the hub, the cache or the file may raise
        problems, why = [], f"{type(error).__name__}: {error}".partition("\n")[0]
    require(problems, f"{path or hub}: not readable as {name} ({why}); pass its own file as --benchmark-file")
    return problems


def copy_solutions(problems: list[Problem], source: str, path: Path) -> None:
    """Write answers.jsonl: of `source` "reference" the references, else that file's {"task_id", "completion"}
    a line, of which several for one task are its samples. Raises: UserError."""
    known = {alias: p.task_id for p in problems for alias in (p.task_id, p.task_id.removeprefix("MBPP/"))}
    texts = {p.task_id: [p.reference] for p in problems} if source == "reference" else {}
    try:
        lines = Path(source).read_text(encoding="utf-8").split("\n") if not texts else ()
        for row in map(json.loads, filter(str.strip, lines)):
            texts.setdefault(known[str(row["task_id"])], []).append("" + row["completion"])  # or TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        form = '{"task_id": one of the benchmark\'s, "completion": text}'
        raise UserError(f"--solutions {source}: not lines of {form} ({error!r})") from None
    require(texts, f"--solutions {source}: no answers in it")
    path.unlink(missing_ok=True)
    for task, completions in texts.items():
        append_line(path, {"task_id": task, "action": source, "completions": completions})


# ======================================== plumbing ==================================================
# --- 6. Datasets that stream ------------------------------------------------------------------------
TEXT = ("content", "text", "code", "whole_func_string")  # columns, as the common datasets of code call them
REPO = ("max_stars_repo_name", "repo_name", "repository_name", "repo")
PATH = ("max_stars_repo_path", "path", "func_path_in_repository", "file_path")
WINDOW = 10_000  # rows that are read before they are put together by repository


def stream_dataset(source: Source, cuts, tokenizer, chunk: int, skipped: Counter) -> Repos:
    """Read the first repositories that give the documents of `cuts`. Raises: UserError."""
    repos, missing = {}, {cut: cut.limit for cut in cuts}
    elsewhere = {split: set() for split in SPLITS}  # by split, the long lines in all others
    for repo, files in stream_repositories(source, skipped):
        split = split_of(repo)
        wanted = {cut: chunk * cut.chunks for cut in cuts if cut.split == split and missing[cut] > 0}
        if wanted and repo not in repos:
            most = max(cut.per_repo * length for cut, length in wanted.items())
            own, tokens = read_tokens(drop_near_copies(files, elsewhere[split], skipped), tokenizer, most)
            if len(tokens) >= min(wanted.values()):
                repos[repo] = own
                for other in SPLITS.keys() - {split}:
                    elsewhere[other] |= long_lines(own)
            for cut, length in wanted.items():
                missing[cut] -= min(cut.per_repo, len(tokens) // length)
        if max(missing.values()) <= 0 or (not repos and skipped.total() >= WINDOW):
            break  # enough is read, or it is hopeless, such as the wrong column
    return repos


def stream_repositories(source: Source, skipped: Counter) -> Iterator[tuple[str, Files]]:
    """Yield (name, files in path order) of each repository in every WINDOW rows; a row is a file."""
    columns = (source.text_column,) if source.text_column else TEXT
    rows = iter(tqdm(open_rows(source), "dataset", unit=" rows", disable=None))
    while window := list(islice(rows, WINDOW)):
        repos = {}
        for row in window:
            nameless = hashlib.sha256(repr(row).encode()).hexdigest()[:16]
            repo = next((str(row[column]) for column in REPO if row.get(column)), nameless)
            path = next((str(row[column]) for column in PATH if row.get(column)), "")
            text = next((row[column] for column in columns if isinstance(row.get(column), str)), None)
            files = repos.setdefault(repo, [])
            if text is None:
                skipped[f"without text among {', '.join(row)}"] += 1
            elif text := decode(text.encode(errors="replace"), skipped):
                files.append(SourceFile(repo, path, text))
        for repo, files in repos.items():
            yield repo, sorted(files, key=lambda file: file.path)


def open_rows(source: Source) -> Iterator[dict]:
    """Stream the rows of a dataset's split "train", or else of its first. Raises: UserError."""
    import datasets
    import huggingface_hub

    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity(library.logging.CRITICAL)  # the error below says it
    name, subset = os.path.expanduser(source.name), source.subset
    if name == "stack":
        name, subset = "hub:bigcode/the-stack-dedup", subset or "data/python"
    options = {"data_dir" if "/" in subset else "name": subset} if subset else {}
    if name.startswith("hub:"):
        name, _, revision = name.removeprefix("hub:").partition("@")
        options["revision"] = revision or None
    elif name.lower().endswith(ROWS):
        options["data_files"] = glob.escape(name) if os.path.exists(name) else name
        name = "parquet" if name.lower().endswith(".parquet") else "json"
    name += "/." * os.path.isdir(name)  # a folder with a script of its own name would be refused
    try:
        splits = datasets.load_dataset(name, streaming=True, **options)
        yield from splits["train"] if "train" in splits else next(iter(splits.values()))
    except Exception as error:  # the libraries below raise many kinds
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        use = "check --data, --subset and the connection, log in (hf auth login) if it is gated"
        raise UserError(f"--data {source.name}: {said}; {use}, or use --data FOLDER") from None


# --- 7. Files ---------------------------------------------------------------------------------------
WRITES = True  # of several hosts the first alone does: `join_hosts` in model.py


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename, so that a reader never sees half a file."""
    if not WRITES:
        return
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict]:
    """Read a .jsonl file, if it is there, and remove a cut-off line. Raises: UserError if damaged."""
    whole, end, cut_off = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    if cut_off:
        write_atomic(path, whole + end)
    try:
        return [dict(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; delete it, and what it holds is lost") from None


def append_line(path: Path, row: dict) -> None:
    """Add a line in one write, so that a run that is stopped leaves whole lines but for the last."""
    if WRITES:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(row) + "\n").encode())


class Log:
    """A Log is metrics.jsonl without the stage's lines after `step`, which a resumed run writes again."""

    def __init__(self, out: Path, stage: str, step: int):
        self.path, self.stage = out / "metrics.jsonl", stage
        kept = [row for row in read_lines(self.path) if row["stage"] != stage or row["step"] <= step]
        self.rows = [row for row in kept if row["stage"] == stage]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """Write one step's figures."""
        self.rows.append({"stage": self.stage, "step": step} | {k: float(x) for k, x in figures.items()})
        append_line(self.path, self.rows[-1])
