"""data.py: hostile files, repositories, splits, near-copies, documents, functions, datasets that stream."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import write
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import Table, parquet

import data

TINY, CHUNK = data.ASSETS / "tiny", 8
TOKENIZER = data.load_tokenizer(TINY)
FILE = lambda text, path="a.py", repo="repo": data.SourceFile(repo, path, text)
PATHS = lambda repos: {repo: [file.path for file in files] for repo, files in repos.items()}
# Long lines, by which near-copies are known
lines = lambda word, numbers: "".join(f"{word}_{i} = compute_something({word}, {i})\n" for i in numbers)
json_lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()
# 60 repositories of one to four files, and the same as rows, not quite beside each other
COUNTS = [(i, j) for i in range(60) for j in range(1 + i % 4)]
FILES = [FILE(lines(f"word{i}_{j}", range(5 + 3 * j)), f"m{j}.py", f"repo{i}") for i, j in COUNTS]
REPOS = {file.repo: [other for other in FILES if other.repo == file.repo] for file in FILES}
ORDER = np.argsort(np.arange(150) + np.random.RandomState(0).uniform(0, 12, 150))
ROWS = [{"repo_name": FILES[i].repo, "path": FILES[i].path, "content": FILES[i].text} for i in ORDER]


def load(name, cuts=(), skipped=None, **options) -> data.Repos:
    source, skipped = data.Source(str(name), **options), Counter() if skipped is None else skipped
    return data.load_repositories(source, cuts, TOKENIZER, CHUNK, skipped)


# --- 1. Files and repositories ----------------------------------------------------------------------
def test_a_folder_is_walked_in_path_order_and_faults_are_counted(tmp_path):
    full, deep, skipped = "#" * data.MAX_FILE_BYTES, "b/" * data.MAX_DEPTH, Counter()
    files = {"b/a.c": "é\r\n", "a.py": "1", "c.py": "2", "empty.py": " \n\t", "huge.py": ""}
    files |= {f"{deep}z.py": full, "large.py": full + "#", "binary.py": "\0", "latin.py": b"x = '\xff'"}
    write(tmp_path, files)
    left = ".git/x.py b/tests/x.py b/__pycache__/x.py test/x.py notes.txt _sysconfigdata_x.py"
    write(tmp_path, dict.fromkeys([*left.split(" "), f"{deep}too/deep.py"], "no"))
    os.truncate(tmp_path / "huge.py", 2**40)  # holes
    os.mkfifo(tmp_path / "pipe.py")  # reading it would wait for ever
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # a loop of folders
    read = [(file.path, file.text) for own in data.read_folder(tmp_path, skipped).values() for file in own]
    assert read == [("a.py", "1"), ("c.py", "2"), ("b/a.c", "é\n"), (f"{deep}z.py", full)]
    assert skipped.pop("larger than 1 MB") == skipped.pop("not a regular file") == 2
    assert skipped == dict.fromkeys(["empty", "binary", "not UTF-8", "nested too deeply"], 1)
    everything = {file.path for own in data.read_folder(tmp_path, skipped, True).values() for file in own}
    more = {"b/tests/x.py", "test/x.py", "notes.txt", "_sysconfigdata_x.py"}  # but nothing of others
    assert everything == {path for path, _ in read} | more


HOSTILE = [b"a.py", b"new\nline.py", b"bad\xff.py", b"|`$.py", b"-rf.py", "ü☃.py".encode(), b"r\re.py"]
CONTENTS = [b"", b"x = 1\n", b"\0", b"\xff\xfe", b"# " + b"y" * 3000, "π = 3\n".encode() * 50]
CHILD = st.sampled_from([b"", b"sub", b"bad\xfe", b"n\nl", b"a/b/c"])


@given(st.dictionaries(st.sampled_from(HOSTILE), st.sampled_from(CONTENTS)), CHILD, st.booleans())
def test_any_folder_is_read_or_skipped_with_the_reason(files, child, marked):
    with tempfile.TemporaryDirectory() as name:
        root = Path(os.fsdecode(os.path.join(os.fsencode(name), child)))
        write(root, {os.fsdecode(file): content for file, content in files.items()})
        if marked:
            (Path(name) / ".git").mkdir()
        repos = data.read_folder(Path(name), skipped := Counter())
        assert sum(map(len, repos.values())) + skipped.total() == len(files)
        assert all(data.with_path(file).encode() for own in repos.values() for file in own)
        assert all(data.split_of(repo) in data.SPLITS for repo in repos)
        assert not marked or set(repos) <= {Path(name).name}


def test_what_an_ordinary_user_may_not_read_is_skipped():
    user, skipped = os.geteuid(), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), {"a.py": "x = 1"})
        folder.chmod(0o755)
        (folder / "a.py").chmod(0)
        (folder / "shut").mkdir(mode=0)
        os.seteuid(user or 65534)  # root may read everything
        try:
            assert data.read_folder(folder, skipped) == {} and skipped == {"unreadable": 2}
        finally:
            os.seteuid(user)


FOLDERS = {
    "one/a.py one/deep/b.py two/a.py loose.py": {"loose": 1, "one": 2, "two": 1},
    "src/code/one/a.py src/code/two/a.py src/notes.txt": {"one": 1, "two": 1},  # entered
    "mine/setup.py mine/one/a.py mine/two/a.py": {"mine": 3},
    "mine/.git/x mine/one/a.py mine/two/a.py mine/two/.git": {"mine": 2},  # two is a submodule
    "mine/go.mod mine/one/a.py mine/two/a.py mine/two/.hg/x": {"mine": 2},  # two is a clone inside
    "pkg/only.py": {"only": 1},
    "pkg/notes.txt": {},
}


@pytest.mark.parametrize("files, expected", FOLDERS.items())
def test_a_folder_is_one_repository_or_several(tmp_path, files, expected):
    write(tmp_path, {name: f"{name}" for name in files.split()})
    assert {repo: len(own) for repo, own in data.read_folder(tmp_path, Counter()).items()} == expected
    assert data.is_one_repository(str(tmp_path / "mine")) == ("mine" in expected)
    assert "mine" not in expected or set(data.read_folder(tmp_path / "mine", Counter())) == {"mine"}


DATASETS = ("d/a.jsonl d/d.py", "d/.git/x d/one/two/a.jsonl d/x.md", "d/train/a.parquet d/1.py d/2.py d/x.md")
FIXTURES = ("d/.git/x d/a.jsonl d/d.py", "d/a.py d/tests/a.jsonl", "d/a.py d/one/two/a.parquet")
FIXTURES += ("d/a.jsonl d/1.py d/2.py d/3.py d/4.py d/5.py d/6.py",)


@pytest.mark.parametrize("files", DATASETS + FIXTURES)
def test_rows_beside_little_code_are_a_dataset_and_fixtures_are_not(tmp_path, files):
    folder = str(write(tmp_path, dict.fromkeys(files.split(), "")) / "d")
    assert data.is_dataset(folder) == (files in DATASETS)
    assert data.is_one_repository(folder) == (".git" in files and files in FIXTURES)


def test_of_a_clone_what_git_tracks_is_read_and_nothing_of_its_configuration_runs(tmp_path):
    root = write(
        tmp_path / "mine", {"src/a.py": "x = 1\n", "build/a.py": "x = 1\n", ".gitignore": "build/\n"}
    )
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    write(root, {"draft.py": "y = 1\n", "inner/.git/HEAD": "", "inner/b.py": "z = 1\n"})
    subprocess.run(["git", "config", "core.fsmonitor", f"touch {tmp_path}/ran"], cwd=root, check=True)
    skipped = Counter()
    assert [file.path for file in data.read_folder(root, skipped)["mine"]] == ["src/a.py"]
    assert skipped == {"not under version control": 3} and not (tmp_path / "ran").exists()


def test_a_file_that_is_in_its_repository_again_is_read_once():
    again, skipped = FILE(ALPHA + "".join(lines("new", range(1))), "build/a.py"), Counter()
    files, why = [FILE(ALPHA), FILE(BETA, "b.py"), again], "in its repository"
    kept = data.drop_near_copies(files, set(), skipped, why, data.COPY, grow=True)
    assert [file.path for file in kept] == ["a.py", "b.py"]
    assert skipped == {"near-copy in its repository": 1}


def test_two_megabytes_are_read_and_everything_begins_at_a_file_that_the_name_draws(tmp_path, monkeypatch):
    names = [f"{i}.py" for i in range(7)]
    write(tmp_path, {f"repo{i}/{name}": f"x = {name}" for i in range(12) for name in names})
    starts = [paths[0][-4] for paths in PATHS(data.read_folder(tmp_path, Counter(), True)).values()]
    assert len(set(starts)) > 3
    monkeypatch.setattr(data, "MAX_REPO_BYTES", 20)  # the third file of 8 bytes reaches it
    for everything, firsts in (False, [0] * 12), (True, map(int, starts)):
        for first, paths in zip(firsts, PATHS(data.read_folder(tmp_path, Counter(), everything)).values()):
            assert [path[-4:] for path in paths] == (2 * names)[first : first + 3]  # and goes round


REFUSED = [
    ("stdlbi", {}, "--data stdlbi: no such folder; give one"),
    ("bad", {}, r"no source code found, or too little \(1 binary\); use more"),
    ("texts", {}, "no file with a source suffix"),
    ("stdlib", {"everything": True}, "--data stdlib: --files all is for folders"),
    ("stdlib", {"text_column": "text"}, "--text-column are for datasets"),
    ("bad", {"subset": "Python"}, "--subset and .* are for datasets"),
    ("body.jsonl", {}, r"\(1 without text among body, id\); give --text-column"),
    ("body.jsonl", {"text_column": "id"}, r"\(1 without text among body, id\); give --text-column"),
    ("short.jsonl", {}, "too little .* fewer --chunks"),
    ("empty.jsonl", {}, "check --data"),
    ("a.parquet", {}, "check --data, --subset and the connection, log in .*, or use --data FOLDER$"),
]


@pytest.mark.parametrize("name, options, message", REFUSED)
def test_a_source_that_does_not_fit_is_one_clear_error(tmp_path, monkeypatch, name, options, message):
    files = {"bad/a.py": b"\0", "texts/a.txt": "1", "empty.jsonl": "", "a.parquet": "not Parquet"}
    write(tmp_path, files | {"short.jsonl": '{"text": "x = 1"}', "body.jsonl": '{"body": "x", "id": 1}'})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match=message) as error:
        load(name, [data.Cut("train", 20, 1, 9), data.Cut("test", 20, 1, 9)], **options)
    assert "\n" not in str(error.value)


# --- 2. Splits and near-copies ----------------------------------------------------------------------
def test_splits_never_change():
    """If this fails, published splits have moved and trained weights have seen the test set."""
    found = [data.split_of(f"repository-{i}") for i in range(2000)]
    letters = "".join(split[1] for split in found)
    assert hashlib.sha256(letters.encode()).hexdigest()[:16] == "96de2589a411a430"
    assert [round(found.count(split) / 2000, 1) for split in data.SPLITS] == [0.6, 0.2, 0.2]
    assert list(map(data.split_of, ("argparse", "asyncio", "json"))) == ["valid", "train", "test"]


ALPHA, BETA, SHORT = lines("alpha", range(20)), lines("beta", range(20)), "import os\nreturn x\n\n"
COPIES = [  # texts of training, validation and test files, and how many of each are kept
    ([ALPHA], [ALPHA], [ALPHA, BETA], (1, 0, 1)),  # training has the say
    ([SHORT], [BETA], [BETA, ALPHA], (1, 1, 1)),  # then validation
    ([ALPHA], [ALPHA.replace("alpha_", "\t\talpha_")], [BETA], (1, 0, 1)),  # indented
    ([ALPHA], [lines("alpha", range(16, 36))], [], (1, 0, 0)),  # a fifth in common
    ([ALPHA], [lines("alpha", range(17, 37))], [], (1, 1, 0)),  # 15 %
    ([SHORT + ALPHA], [SHORT], [SHORT + BETA], (1, 1, 1)),  # short lines say nothing
]


@pytest.mark.parametrize("train, valid, test, kept", COPIES)
def test_near_copies_do_not_cross_splits(train, valid, test, kept):
    repos = {"json": test, "asyncio": train, "argparse": valid}  # names of these splits
    repos = {repo: [FILE(text, f"{i}.py", repo) for i, text in enumerate(own)] for repo, own in repos.items()}
    found = data.drop_leaks(repos, skipped := Counter())
    assert tuple(len(found.get(repo, ())) for repo in ("asyncio", "argparse", "json")) == kept
    assert all(found.values()) and skipped.total() == len(train + valid + test) - sum(kept)


def test_copies_of_what_was_trained_on_are_dropped_and_may_not_be_all(tmp_path, monkeypatch):
    write(tmp_path, {"mine/.git/x": "", "mine/a.py": ALPHA, "mine/b.py": BETA, "others/a.py": ALPHA})
    monkeypatch.setattr(data, "STAND_IN", data.Source(str(tmp_path / "others")))
    args = {"test": data.Cut("test", 2, 1, 999)}, TOKENIZER, CHUNK, 7, (skipped := Counter())
    found = data.load_documents(data.Source(str(tmp_path / "mine")), *args)["test"]
    read = TOKENIZER.decode(np.concatenate([document.tokens[1:] for document in found]))
    assert data.with_path(FILE(BETA, "b.py")).startswith(read) and len(found) > 9
    assert skipped == {"near-copy of what was trained on": 1}
    write(tmp_path, {"others/b.py": BETA})
    with pytest.raises(data.UserError, match="all 2 files are near-copies"):
        data.load_documents(data.Source(str(tmp_path / "mine")), *args)


# --- 3. Tokens and documents ------------------------------------------------------------------------
@given(st.lists(st.one_of(st.text(), st.just(f"a{data.END_OF_TEXT}b")), min_size=1, max_size=3))
def test_decode_undoes_encode_and_the_end_of_text_spelled_out_stays_text(texts):
    tokens = data.encode(TOKENIZER, texts)
    assert [TOKENIZER.decode(list(x), skip_special_tokens=False) for x in tokens] == texts
    assert all(x.dtype == np.int32 and TOKENIZER.token_to_id(data.END_OF_TEXT) not in x for x in tokens)


def test_both_layouts_of_a_tokenizer_are_the_same_and_others_are_one_clear_error(tmp_path):
    TOKENIZER.model.save(str(tmp_path))  # vocab.json and merges.txt
    other, text = data.load_tokenizer(tmp_path), Path(data.__file__).read_text() + "\r\n\t🤦🏽\u200d♂️ e\u0301"
    assert data.encode(other, [text])[0].tolist() == data.encode(TOKENIZER, [text])[0].tolist()
    texts = data.token_texts(other)
    assert texts == data.token_texts(TOKENIZER) and len(texts) == max(TOKENIZER.get_vocab().values()) + 1
    assert texts[TOKENIZER.token_to_id(data.END_OF_TEXT)] == ""
    for name, content in (("merges.txt", ""), ("vocab.json", "["), ("tokenizer.json", "{")):
        with pytest.raises(data.UserError, match=r"no tokenizer.json, or vocab.json and merges.txt \("):
            data.load_tokenizer(write(tmp_path / f"no {name}", {name: content}))


def test_truncation_padding_and_dropout_that_a_tokenizer_was_saved_with_are_off(tmp_path):
    other, texts = data.load_tokenizer(TINY), ["x = 1\n" * 300, "y"]
    other.enable_truncation(512)
    other.enable_padding(length=600, pad_token=data.END_OF_TEXT)
    other.model.dropout = 0.5
    other.save(str(tmp_path / "tokenizer.json"))
    found, expected = (data.encode(t, texts) for t in (data.load_tokenizer(tmp_path), TOKENIZER))
    assert [x.tolist() for x in found] == [x.tolist() for x in expected] and len(found[0]) > 600


def test_texts_end_with_the_end_of_text_or_what_the_config_says(tmp_path):
    other = type(TOKENIZER).from_str(TOKENIZER.to_str().replace(data.END_OF_TEXT, "</s>"))
    with pytest.raises(data.UserError, match="eos_token_id"):
        data.end_tokens(tmp_path, other)
    for known, ends in ((5, (5,)), ([7, 9], (7, 9)), (None, ()), ("x", ()), (10**6, ())):
        write(tmp_path, {"config.json": json.dumps({"eos_token_id": known})})
        assert data.end_tokens(tmp_path, TOKENIZER) == (TOKENIZER.token_to_id(data.END_OF_TEXT), *ends)
        assert not ends or data.end_tokens(tmp_path, other) == ends


def test_documents_are_runs_of_their_repository_in_the_order_of_rounds():
    assert data.with_path(FILE("x = 1\n\n\n", "r/a.py")) == "# r/a.py\nx = 1\n\n"
    cut, size, expected = data.Cut("train", 12, 3, 99), 12 * CHUNK, []
    for i in range(3):
        for name in sorted((name for name in REPOS if data.split_of(name) == "train"), key=data.by_name_hash):
            encoded = [TOKENIZER.encode(data.with_path(file)).ids for file in REPOS[name]]
            tokens = [token for own in encoded for token in own]
            if len(tokens) >= (i + 1) * size:
                expected.append((name, [7, *tokens[i * size : (i + 1) * size]]))
    found = data.cut_documents(REPOS, cut, TOKENIZER, CHUNK, 7)
    assert [(d.repo, d.tokens.tolist()) for d in found] == expected
    assert all(d.tokens.dtype == np.int32 for d in found)
    first = data.cut_documents(REPOS, cut._replace(limit=3), TOKENIZER, CHUNK, 7)
    assert [d.tokens.tolist() for d in first] == [d.tokens.tolist() for d in found[:3]]
    with pytest.raises(data.UserError, match=r"no test repository has the 8000000 tokens .* fewer --chunks"):
        data.cut_documents(REPOS, data.Cut("test", 10**6, 1, 5), TOKENIZER, CHUNK, 7)


def test_documents_of_one_repository_are_spread_over_it():
    files, size, cut = FILES[:9], 4 * CHUNK, data.Cut("test", 4, 1, 5)
    read = [token for file in files for token in TOKENIZER.encode(data.with_path(file)).ids]
    found, count = data.cut_repository(files, TOKENIZER, CHUNK, cut, 7), len(read) // size
    places = [0, *(round(i * (count - 1) / 4) for i in (1, 2, 3)), count - 1]
    assert [document.repo for document in found] == [f"repo0 {i + 1}/{count}" for i in places]
    for i, document in zip(places, found, strict=True):
        assert document.tokens.tolist() == [7, *read[i * size : (i + 1) * size]]
    assert len(data.cut_repository(files, TOKENIZER, CHUNK, cut._replace(limit=999), 7)) == count
    fewer = f"take --chunks {len(read) // (16 * CHUNK)} or fewer"
    for own, message in (files, fewer), (files[:1], "more code"):
        with pytest.raises(data.UserError, match=message):
            data.cut_repository(own, TOKENIZER, 8 * CHUNK, cut._replace(chunks=10**6), 7)


# --- 4. Functions to complete -----------------------------------------------------------------------
CODE = """import os
    def one(
        x, y
    ):
        if x:

            y = 1
        return (
            y)
    def short(self):
        return 1
function one_with_a_long_name(a) {
  let x = 1;
  if (a) {
    x = 2; y = 3; }
  return x;
}
"""


def test_functions_are_cut_in_their_middle_and_what_branches_is_none():
    found = list(data.find_functions(FILE(CODE, "m.py")))
    rests = "\n        return (\n            y)\n", "\n    x = 2; y = 3; }\n  return x;\n"
    assert [(f.name, f.rest) for f in found] == [("m.py:4", rests[0]), ("m.py:12", rests[1])]
    assert all(f"# m.py\n{CODE}".startswith(f.before + f.rest) for f in found)
    heads = ["} else if (x) {", "} catch (Exception e) {", "foreach ($a as $b) {", "async with a(b):"]
    functions = ["async def f(a):", "} function f(a) {", "if_any(a, function (b) {", "static int f(void) {"]
    files = {head: FILE(head + "\n" + "    x = 1\n" * 6) for head in heads + functions}
    assert [head for head, file in files.items() if list(data.find_functions(file))] == functions


def test_functions_to_complete_are_of_files_that_are_not_learned_from():
    files = [FILE(CODE.replace("one", f"one{i}"), f"{i}.py") for i in range(12)]
    learned, held = data.hold_out(files, 4)
    others, paths = set(files) - set(learned), lambda held: {f.name.partition(":")[0] for f in held}
    assert len(others) == 2 and len(held) == 4 and paths(held) <= {f.path for f in others}
    assert data.hold_out(files[::-1], 4)[1] == held and data.hold_out(files[:4], 4)[1] == []
    copy = others.pop()
    changed = [f._replace(text=copy.text) if f == learned[0] else f for f in files]
    assert paths(data.hold_out(changed, 99)[1]) == {f.path for f in others}  # none of the copied file


# --- 5. Datasets that stream ------------------------------------------------------------------------
CUTS = [data.Cut("train", 16, 2, 6), data.Cut("valid", 16, 1, 2), data.Cut("test", 16, 1, 2)]
ALL = [cut._replace(limit=1000) for cut in CUTS]


def as_parquet(rows: list[dict]) -> bytes:
    parquet.write_table(Table.from_pylist(rows), out := io.BytesIO())
    return out.getvalue()


def test_every_format_gives_the_documents_asked_for_and_no_more(tmp_path):
    """Files of rows, several at once, and a folder as the hub lays them out: shards, beside them a card."""
    text, half = json_lines(ROWS), {i: as_parquet(ROWS[75 * i : 75 * i + 75]) for i in (0, 1)}
    write(tmp_path, {"a.parquet": as_parquet(ROWS), "a.jsonl": text, "a.jsonl.gz": gzip.compress(text)})
    write(tmp_path, {"hub/data/train-0.parquet": half[0], "hub/data/train-1.parquet": half[1]})
    write(tmp_path, {"hub/README.md": "# A dataset", "hub/hub.py": "x = 1\n" * 999, "B [1].JSONL": text})
    names = ("a.parquet", "a.jsonl", "a.jsonl.gz", "B [1].JSONL", "hub/data/*.parquet", "hub")
    found = [load(tmp_path / name, CUTS, skipped := Counter()) for name in names]
    assert skipped.pop("script beside the rows") == 1
    first, *others = [*found, load(f"hub:{tmp_path}/hub", CUTS)]
    assert all(found == first and list(found) == list(first) for found in others)
    assert Counter(map(data.split_of, first)) == {"train": 3, "valid": 2, "test": 2}
    for repo, files in first.items():  # the first files in path order, as few as hold the documents
        whole = sorted((row["path"], row["content"]) for row in ROWS if row["repo_name"] == repo)
        assert [(file.path, file.text) for file in files] == whole[: len(files)]
        most = 16 * CHUNK * (2 if data.split_of(repo) == "train" else 1)
        assert sum(map(len, data.encode(TOKENIZER, [data.with_path(file) for file in files[:-1]]))) < most
    assert all(len(data.cut_documents(first, cut, TOKENIZER, CHUNK, 0)) == cut.limit for cut in CUTS)
    assert len(load(tmp_path / "a.jsonl", ALL)) == 45


def test_rows_are_put_together_in_windows_and_no_more_is_read_than_needed(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 4)
    row = lambda repo, path: {"repo_name": repo, "path": path, "content": lines(repo + path, range(5))}
    rows = iter([row(*pair) for pair in ("a2", "b1", "a1", "c1", "c2", "a3")])
    monkeypatch.setattr(data, "open_rows", lambda _: rows)
    found = data.stream_repositories(data.Source("stack"), Counter())
    found = [(repo, [file.path for file in files]) for repo, files in found]
    assert found == [("a", ["1", "2"]), ("b", ["1"]), ("c", ["1"]), ("c", ["2"]), ("a", ["3"])]
    read = []
    endless = (read.append(i) or row(f"repo{i // 3}", str(i)) for i in range(10**9))
    monkeypatch.setattr(data, "open_rows", lambda _: endless)
    assert len(load("stack", CUTS)) <= 10 and len(read) < 200


def test_documents_lost_to_near_copies_are_made_up_for(tmp_path):
    """A file that repositories of all splits have leaves some of them without a document."""
    common = lines("common", range(9))
    copies = [row | {"path": "a.py", "content": common} for row in ROWS if row["path"] == "m0.py"]
    write(tmp_path, {"a.jsonl": json_lines(copies + ROWS)})
    found = load(tmp_path / "a.jsonl", CUTS, skipped := Counter())
    holders = {data.split_of(file.repo) for own in found.values() for file in own if file.text == common}
    assert len(holders) == 1 and skipped["near-copy across splits"] > 3
    assert all(len(data.cut_documents(found, cut, TOKENIZER, CHUNK, 0)) == cut.limit for cut in CUTS)


def test_bad_rows_are_skipped_with_the_reason_and_a_nameless_row_is_a_repository(tmp_path):
    texts, skipped = [lines(f"text_{i}", range(9)) for i in range(30)], Counter()
    bad = [None, "", "\0", "x" * (data.MAX_FILE_BYTES + 1), 123, [1], {"a": 1}, True]
    write(tmp_path, {"a.jsonl": json_lines([{"prose": text} for text in bad + texts])})
    found = load(tmp_path / "a.jsonl", ALL, skipped, text_column="prose")
    assert len(found) == 30 and sorted(own[0].text for own in found.values()) == sorted(texts)
    assert all(data.with_path(own[0]).startswith("text_") for own in found.values())
    assert +skipped == {"without text among prose": 5, "empty": 1, "binary": 1, "larger than 1 MB": 1}


OPENED = [
    ("stack", None, {"path": "bigcode/the-stack-dedup", "revision": None, "data_dir": "data/python"}),
    ("stack", "data/rust", {"path": "bigcode/the-stack-dedup", "revision": None, "data_dir": "data/rust"}),
    ("hub:any/lines", None, {"path": "any/lines", "revision": None}),
    ("hub:any/lines@v1", "two", {"path": "any/lines", "revision": "v1", "name": "two"}),
    ("a@b.jsonl.gz", None, {"path": "json", "data_files": "a@b.jsonl.gz"}),
    ("a/*.parquet", None, {"path": "parquet", "data_files": "a/*.parquet"}),
]


@pytest.mark.parametrize("name, subset, called", OPENED)
def test_a_dataset_is_opened_by_its_name_and_part(monkeypatch, name, subset, called):
    source, splits, calls = data.Source(name, subset=subset), {"test": ["a"], "train": ["b"]}, []
    called_with = lambda path, **options: calls.append({"path": path, **options}) or splits
    monkeypatch.setattr("datasets.load_dataset", called_with)
    assert list(data.open_rows(source)) == ["b"]
    del splits["train"]
    assert list(data.open_rows(source)) == ["a"]
    assert calls == [called | {"streaming": True}] * 2


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    data.write_atomic(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        data.write_atomic(tmp_path / "a", "not bytes")
    assert (tmp_path / "a").read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(data.UserError, match="a is damaged; delete it"):
        data.read_lines(write(tmp_path, {"a": "[1]\n"}) / "a")
