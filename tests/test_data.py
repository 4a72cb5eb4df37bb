"""data.py: files, near-duplicates, splits and tokens."""

import gzip
import hashlib
import http.client
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import jax
import numpy as np
import pytest
import tokenizers
from conftest import PATHS
from hypothesis import given
from hypothesis import strategies as st

import data
import model as lm
import ponder

GPT2 = Path(data.__file__).parent.parent / "shared" / "data" / "gpt2-tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer((file.text for file in data.synthetic_source(3)), 300)


def write(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


# --- 1. Files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, why",
    [
        (b"x = 1\0\n", "binary"),
        (b"x = '\xff'\n", "not UTF-8"),
        ("x = 'é'".encode("latin-1"), "not UTF-8"),
        (b"", "empty"),
        (b" \n\t\r\n ", "empty"),
        (b"#" * (data.MAX_FILE_BYTES + 1), "larger than 1 MB"),
    ],
)
def test_bad_files_are_skipped_with_the_reason(tmp_path, content, why):
    (tmp_path / "a.py").write_bytes(content)
    assert data.read_source(tmp_path / "a.py") == (None, why)


def test_good_files_are_read(tmp_path):
    path = tmp_path / "a.py"
    largest = "#" * data.MAX_FILE_BYTES
    for content, text in (
        (b"x = 1\r\ny = 2\n", "x = 1\ny = 2\n"),
        ("π = '☃'".encode(), "π = '☃'"),
        (largest.encode(), largest),
    ):
        path.write_bytes(content)
        assert data.read_source(path) == (text, "")


def test_what_is_no_regular_file_is_skipped(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")  # reading it would wait for ever
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "gone.py")
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    for name in ("pipe.py", "folder.py", "nowhere.py", "loop.py", "absent.py"):
        assert data.read_source(tmp_path / name) == (None, "not a regular file"), name


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_skipped(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "a.py").chmod(0)
    assert data.read_source(tmp_path / "a.py") == (None, "unreadable")


def test_a_folder_is_walked_in_path_order_and_faults_are_counted(tmp_path):
    files = {"b/z.py": "z", "b/a.c": "a", "a.py": "1", "c.py": "2", "notes.txt": "no", "README": "no"}
    files |= {".git/x.py": "no", "b/tests/x.py": "no", "b/__pycache__/x.py": "no", "test/x.py": "no"}
    write(tmp_path, files | {"empty.py": "", "b/empty.js": "\n"})
    (tmp_path / "binary.py").write_bytes(b"\0")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # a loop of folders
    skipped = Counter()
    found = list(data.walk(tmp_path, skipped))
    assert found == ["a.py", "binary.py", "c.py", "empty.py", "b/a.c", "b/empty.js", "b/z.py"] and not skipped
    read = [(file.path, file.text) for file in data.folder_source(tmp_path, skipped)]
    assert sorted(read) == [("a.py", "1"), ("b/a.c", "a"), ("b/z.py", "z"), ("c.py", "2")]
    assert skipped == {"empty": 2, "binary": 1}


def repositories(root):
    return [(file.repo, file.path) for file in data.folder_source(root, Counter())]


def test_each_child_of_a_folder_is_a_repository(tmp_path):
    write(tmp_path, {"one/a.py": "1", "one/deep/b.py": "2", "two/a.py": "3", "loose.py": "4"})
    expected = [("loose", "loose.py"), ("one", "one/a.py"), ("one", "one/deep/b.py"), ("two", "two/a.py")]
    assert repositories(tmp_path) == expected


def test_a_folder_around_the_repositories_is_entered(tmp_path):
    write(tmp_path, {"src/code/one/a.py": "1", "src/code/two/a.py": "2", "src/notes.txt": "no"})
    assert repositories(tmp_path) == [("one", "src/code/one/a.py"), ("two", "src/code/two/a.py")]


def test_one_repository_in_a_folder_is_one_and_a_submodule_does_not_make_it_several(tmp_path):
    write(tmp_path, {"mine/pyproject.toml": "", "mine/one/a.py": "1", "mine/two/a.py": "2", "mine/other/b.py": "3", "mine/other/.git": "x"})
    assert {repo for repo, _ in repositories(tmp_path)} == {"mine"} == {repo for repo, _ in repositories(tmp_path / "mine")}
    assert data.one_repository(str(tmp_path / "mine"))


def test_a_single_file_is_a_repository(tmp_path):
    write(tmp_path, {"pkg/only.py": "1"})
    assert repositories(tmp_path) == [("only", "pkg/only.py")] and repositories(tmp_path / "pkg") == [("only", "only.py")]


def everything(root, skipped=None):
    return [(file.repo, file.path) for file in data.folder_source(root, Counter() if skipped is None else skipped, True)]


def test_everything_is_documents_tests_and_data_but_no_binaries_nor_what_others_wrote(tmp_path):
    files = ["LICENSE", "a.py", "data/table.csv", "docs/guide.md", "tests/test_a.py"]
    write(tmp_path, {f"{repo}/{name}": f"{repo} {name}" for repo in ("one", "two") for name in files})
    write(tmp_path, dict.fromkeys(["one/.git/x", "one/node_modules/x.js", "one/__pycache__/x.txt"], "no"))
    (tmp_path / "one" / "image.png").write_bytes(b"PNG\0")
    (tmp_path / "two" / "latin").write_bytes(b"\xff\xfe")
    skipped = Counter()
    found = everything(tmp_path, skipped)
    assert sorted(found) == [(repo, f"{repo}/{name}") for repo in ("one", "two") for name in files]
    assert skipped == {"binary": 1, "not UTF-8": 1}
    assert [path for _, path in repositories(tmp_path)] == ["one/a.py", "two/a.py"]
    assert {f.path for fs in data.load_repos(str(tmp_path), Counter(), True).values() for f in fs} == {path for _, path in found}


def test_everything_starts_at_a_file_that_the_name_draws(tmp_path):
    names = [f"{i}.txt" for i in range(7)]
    repos = [f"repo{i}" for i in range(12)]
    write(tmp_path, {f"{repo}/{name}": name for repo in repos for name in names})
    found, firsts = everything(tmp_path), set()
    assert found == everything(tmp_path)
    for repo in repos:
        own = [path.split("/")[1] for name, path in found if name == repo]
        first = int(own[0][0])
        assert own == names[first:] + names[:first]  # in path order, round once
        firsts.add(first)
    assert len(firsts) > 3
    write(tmp_path, {f"{repo}/{i}.py": "x" for repo in repos for i in range(7)})
    code = [path for _, path in repositories(tmp_path)]
    assert code == sorted(code)  # code alone starts where the repository does


@pytest.mark.parametrize("all_files", [False, True])
def test_two_megabytes_of_each_repository_are_read(tmp_path, monkeypatch, all_files):
    monkeypatch.setattr(data, "MAX_REPO_BYTES", 25)
    write(tmp_path, {f"{repo}/{i}.py": f"x = 10000{i}" for repo in ("one", "two") for i in range(5)} | {"small/a.py": "y = 1"})
    skipped = Counter()
    sizes = Counter(file.repo for file in data.folder_source(tmp_path, skipped, all_files))
    assert sizes == {"one": 3, "two": 3, "small": 1}  # 10 bytes each: the third is the first to reach the limit
    write(tmp_path, {f"foreign/{i}.py": "x = 'жжжжжжжжжж'" for i in range(5)})
    assert Counter(file.repo for file in data.folder_source(tmp_path, skipped, all_files))["foreign"] == 1  # 16 characters in 26 bytes
    assert not skipped


@pytest.mark.parametrize("source", ["stdlib", "packages", "synthetic"])
def test_everything_needs_repositories(source):
    with pytest.raises(data.DataError, match=f"--files all: {source} has code alone"):
        data.open_source(source, Counter(), True)


def test_an_empty_folder_has_no_files(tmp_path):
    assert repositories(tmp_path) == []


def test_open_source_reads_a_folder_or_says_that_there_is_none(tmp_path):
    write(tmp_path, {"one/a.py": "1", "two/a.py": "2"})
    skipped = Counter()
    assert [file.repo for file in data.open_source(str(tmp_path), skipped)] == ["one", "two"]
    for missing in (str(tmp_path / "gone"), str(tmp_path / "one" / "a.py"), "stdlbi"):
        with pytest.raises(data.DataError, match=r"(no such|not a) folder") as error:
            data.open_source(missing, skipped)
        assert "\n" not in str(error.value) and missing in str(error.value)


def test_the_standard_library_is_read_by_module_without_its_tests():
    files = list(islice(data.open_source("stdlib", Counter()), 400))
    assert {"argparse", "ast"} <= {file.repo for file in files}
    asyncio = {file.path for file in files if file.repo == "asyncio"}
    assert "asyncio/tasks.py" in asyncio and len(asyncio) > 10
    assert not any("/test/" in f"/{file.path}" or "site-packages" in file.path for file in files)


def test_packages_under_a_permissive_licence_alone_are_read(tmp_path, monkeypatch):
    licences = {
        "Good_One": "MIT License",
        "second": "Apache-2.0",
        "copyleft": "GPL-3.0",
        "both": "MIT AND LGPL-2.1",
        "none": "",
    }
    names = ("b.py", "a.py", "tests/t.py", "data.bin")
    for name, terms in licences.items():
        record = "\n".join(f"{name}/{path},," for path in (*names, "gone.py", "empty.py"))
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: {terms}\n"
        write(tmp_path, {f"{name}-1.0.dist-info/METADATA": metadata, f"{name}-1.0.dist-info/RECORD": record})
        write(tmp_path, {f"{name}/{path}": "x = 1" for path in names} | {f"{name}/empty.py": ""})
    monkeypatch.setattr(data.sys, "path", [])
    skipped = Counter()
    files = {file.path: file.repo for file in data.packages_source(skipped, [str(tmp_path)])}
    expected = {"Good_One/a.py": "good-one", "Good_One/b.py": "good-one", "second/a.py": "second", "second/b.py": "second"}
    assert files == expected and list(files) == list(expected)
    skipped.pop("not a regular file", None)  # Python 3.12 leaves files that are gone out of dist.files itself
    assert skipped == {"empty": 2}


@pytest.fixture
def pypi(monkeypatch) -> dict[str, bytes]:
    """PyPI with one source distribution; url -> content."""
    files = {"a.py": b"x = 1", "docs/b.md": b"text", "c.png": b"image", "large.txt": b"0" * (data.MAX_FILE_BYTES + 1), "../up.py": b"x"}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"thing-1.0/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
        link = tarfile.TarInfo("thing-1.0/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "a.py"
        tar.addfile(link)
    archive = {"filename": "thing-1.0.tar.gz", "url": "archive", "hashes": {"sha256": hashlib.sha256(content.getvalue()).hexdigest()}}
    others = [archive | {"filename": name} for name in ("thing-1.0-py3-none-any.whl", "thing-11.0.tar.gz")]
    answers = {"index": json.dumps({"files": [*others, archive]}).encode(), "archive": content.getvalue()}
    answer = lambda url, timeout: io.BytesIO(answers[url if isinstance(url, str) else "index"])
    monkeypatch.setattr(data.urllib.request, "urlopen", answer)
    return answers


def test_a_source_distribution_is_unpacked_without_media_links_and_large_files(pypi, tmp_path):
    data.fetch_repository(tmp_path, "thing", "1.0")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == ["thing/a.py", "thing/docs/b.md"]
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


@pytest.mark.parametrize(
    "fault, message",
    [
        ("damaged", "arrived damaged"),
        ("absent", "can't be had"),
        ("offline", "can't be had"),
        ("no archive", "can't be unpacked"),
        ("cut", "can't be had"),
    ],
)
def test_a_source_distribution_that_does_not_arrive_is_one_clear_error(pypi, tmp_path, monkeypatch, fault, message):
    if fault == "damaged":
        pypi["archive"] = pypi["archive"][:-1]
    if fault == "no archive":
        pypi["archive"] = b"<html>"
        index = json.loads(pypi["index"])
        index["files"][-1]["hashes"]["sha256"] = hashlib.sha256(b"<html>").hexdigest()
        pypi["index"] = json.dumps(index).encode()
    if fault in ("offline", "cut"):
        raised = OSError("no network") if fault == "offline" else http.client.IncompleteRead(b"")
        monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(raised))
    with pytest.raises(data.DataError, match=message) as error:
        data.fetch_repository(tmp_path, "thing", "2.0" if fault == "absent" else "1.0")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_synthetic_source_is_deterministic_and_repositories_differ():
    first, again, other = (list(data.synthetic_source(5, seed)) for seed in (0, 0, 1))
    assert first == again and first != other
    assert len({file.repo for file in first}) == 5 and len({file.text for file in first}) == len(first)


# --- 2. Datasets that stream --------------------------------------------------------------------

CUTS = [data.Cut("train", 3, 2, 6), data.Cut("valid", 3, 1, 2), data.Cut("test", 3, 1, 2)]
CHUNK = 8


def stack_rows(repos=40, files=3) -> list[dict]:
    """Rows with The Stack's columns, three files of a repository not quite beside each other."""
    synthetic = {}
    for file in data.synthetic_source(repos):
        synthetic.setdefault(file.repo, []).append(file)
    rows = [(name, f) for name, own in synthetic.items() for f in own[:files]]
    shuffled = [rows[i] for i in np.argsort(np.arange(len(rows)) + np.random.RandomState(0).uniform(0, 12, len(rows)))]
    columns = lambda name, f: {"max_stars_repo_path": f.path, "max_stars_repo_name": f"someone/{name}", "content": f.text}
    return [columns(name, f) | {"hexsha": f"{i:040x}", "lang": "Python", "size": len(f.text)} for i, (name, f) in enumerate(shuffled)]


def parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(name, tokenizer, skipped=None, selection=None, cuts=None):
    need = data.Need(cuts or CUTS, tokenizer, CHUNK)
    return data.load_repos(str(name), Counter() if skipped is None else skipped, False, selection, need)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return stack_rows()


def test_rows_become_repositories_with_their_files_in_path_order(tmp_path, tokenizer, rows):
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    whole = {}
    for row in rows:
        whole.setdefault(row["max_stars_repo_name"], {})[row["max_stars_repo_path"]] = row["content"]
    found = read(tmp_path / "a.parquet", tokenizer)
    assert {"train", "valid", "test"} == {data.split_of(repo) for repo in found}
    for repo, files in found.items():
        # a document's worth of its first files, whatever order the rows had
        assert [(f.path, f.text) for f in files] == sorted(whole[repo].items())[: len(files)]
    for cut in CUTS:
        assert len(data.documents(found, tokenizer=tokenizer, chunk=CHUNK, **cut._asdict())) == cut.limit


def test_every_format_holds_the_same_repositories(tmp_path, tokenizer, rows):
    """A file of rows, and folders as the hub lays them out: shards in a folder, beside them a card."""
    lines = json_lines(rows)
    layouts = {
        "one": {"a.parquet": parquet(rows)},
        "two": {"a.jsonl": lines},
        "three": {"a.jsonl.gz": gzip.compress(lines)},
        "four": {"data/train-00000-of-00002.parquet": parquet(rows[:50]), "data/train-00001-of-00002.parquet": parquet(rows[50:])},
    }
    found = []
    for folder, files in layouts.items():
        for name, content in (files | {"README.md": b"# A dataset"}).items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(content)
        found.append(read(tmp_path / folder, tokenizer))
        if len(files) == 1:
            found.append(read(tmp_path / folder / next(iter(files)), tokenizer))
    assert all(repos == found[0] and list(repos) == list(found[0]) for repos in found[1:])


def test_a_folder_with_source_code_is_no_dataset(tmp_path):
    write(tmp_path, {"repo/a.py": "x = 1", "repo/tests/cases.jsonl": "{}", "rows/a.jsonl": "{}"})
    assert not data.streams(str(tmp_path)) and data.streams(str(tmp_path / "rows")) and data.streams("stack") and data.streams("hub:a/b")


def test_no_more_is_read_than_the_documents_need(tmp_path, tokenizer, rows, monkeypatch):
    count = 0

    def endless(name, selection):
        nonlocal count
        while True:
            row = rows[count % len(rows)]
            yield row | {"max_stars_repo_name": f"{row['max_stars_repo_name']}/{count // len(rows)}"}
            count += 1

    monkeypatch.setattr(data, "open_rows", endless)
    monkeypatch.setattr(data, "WINDOW", 20)
    found = read("stack", tokenizer)
    assert len(found) <= sum(cut.limit for cut in CUTS) and count < 200


def test_documents_lost_to_near_copies_are_made_up_for(tmp_path, tokenizer, rows):
    """A file that repositories of all splits have leaves some of them without a document."""
    common = "".join(f"common_{i} = compute_something_long(common, {i})\n" for i in range(20))
    names = dict.fromkeys(row["max_stars_repo_name"] for row in rows)
    copies = [rows[0] | {"max_stars_repo_name": name, "max_stars_repo_path": "a.py", "content": common} for name in names]
    (tmp_path / "a.jsonl").write_bytes(
        json_lines([row for name, copy in zip(names, copies) for row in (copy, *(r for r in rows if r["max_stars_repo_name"] == name))])
    )
    found = read(tmp_path / "a.jsonl", tokenizer)
    for cut in CUTS:
        assert len(data.documents(found, tokenizer=tokenizer, chunk=CHUNK, **cut._asdict())) == cut.limit


def test_a_repository_waits_for_its_window_and_no_longer(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 3)
    row = lambda repo, path: {"content": f"{repo} {path}", "repo_name": repo, "path": path}
    order = [("a", "2"), ("b", "1"), ("a", "1"), ("c", "1"), ("c", "2"), ("c", "3"), ("c", "4"), ("b", "2"), ("a", "3")]
    monkeypatch.setattr(data, "open_rows", lambda *_: (row(*x) for x in order))
    closed = lambda wanted: [(repo, [f.path for f in files]) for repo, files in data.repositories("stack", data.Selection(), wanted)]
    assert closed(lambda _: True) == [("b", ["1"]), ("a", ["1", "2"]), ("c", ["1", "2", "3", "4"]), ("b", ["2"]), ("a", ["3"])]
    assert closed(lambda repo: repo == "b") == [("b", ["1"]), ("b", ["2"])]  # the same, whatever else is wanted
    monkeypatch.setattr(data, "MAX_REPO_BYTES", 9)
    assert closed(lambda repo: repo == "c") == [("c", ["1", "2", "3"]), ("c", ["4"])]


def test_near_copies_do_not_cross_splits_in_a_stream(tmp_path, tokenizer, copies):
    """Whichever came first stays, but what a much larger training file holds goes, and the next repository is read."""
    alpha, beta = {"alpha": 20}, {"beta": 20}
    repos = copies(
        test={"a.py": alpha, "b.py": beta}, train={"a.py": alpha, "all.py": {"beta": 20, "gamma": 200}},
        valid={"a.py": alpha, "c.py": {"delta": 90}},
    )  # fmt: skip
    test, train, valid = repos
    later = next(name for i in range(99) if data.split_of(name := f"later{i}") == "test")
    repos |= {later: copies(test={"d.py": {"epsilon": 90}})[test]}
    rows = [{"repo_name": repo, "path": file.path, "text": file.text} for repo, files in repos.items() for file in files]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    skipped = Counter()
    found = read(tmp_path / "a.jsonl", tokenizer, skipped, cuts=[data.Cut(split, 150, 1, 1) for split in data.SPLITS])
    paths = {repo: [file.path for file in files] for repo, files in found.items()}
    assert paths == {test: ["a.py"], train: ["all.py"], valid: ["c.py"], later: ["d.py"]} and skipped["near-copy across splits"] == 3


def test_a_row_without_repository_is_a_document_of_its_own(tmp_path, tokenizer):
    texts = [f"text number {i} " * 40 for i in range(30)]
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"id": i, "prose": text} for i, text in enumerate(texts)]))
    found = read(tmp_path / "a.jsonl", tokenizer, selection=data.Selection(text_column="prose"))
    assert {f.text for files in found.values() for f in files} <= set(texts) and len(found) == 7  # 3 x 2 documents, 2, 2
    assert data.with_path(next(iter(found.values()))[0]).startswith("text number")


def test_bad_rows_are_skipped_with_the_reason(tmp_path, tokenizer, rows):
    bad = [None, "", "\0", "x" * (data.MAX_FILE_BYTES + 1)]
    columns = lambda i, text: {"content": text, "max_stars_repo_path": f"bad{i}.py"}
    rows = [rows[0] | columns(i, text) for i, text in enumerate(bad)] + rows
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    skipped = Counter()
    read(tmp_path / "a.jsonl", tokenizer, skipped, cuts=[cut._replace(limit=1000) for cut in CUTS])
    assert skipped == {"empty": 2, "binary": 1, "larger than 1 MB": 1, "near-copy across splits": 0}


@pytest.mark.parametrize(
    "content, selection, message",
    [
        (json_lines([{"body": "x", "id": 1}]), data.Selection(), r"--text-column \(its columns are body, id\)"),
        (json_lines([{"body": "x", "id": 1}]), data.Selection("txt"), "no such column; its columns are body, id"),
        (json_lines([{"body": "x", "id": 1}]), data.Selection("id"), "holds int there, not text"),
        (json_lines([{"text": "x = 1"}]), data.Selection(), "none of its 1 repositories has the 24 tokens of a document"),
        (b"", data.Selection(), "it has no rows"),
        (b"not JSON\n", data.Selection(), "can't be read"),
    ],
)
def test_a_bad_file_of_rows_is_one_clear_error(tmp_path, tokenizer, content, selection, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(data.DataError, match=message) as error:
        read(tmp_path / "a.jsonl", tokenizer, selection=selection)
    assert "\n" not in str(error.value)


def test_an_empty_parquet_file_is_one_clear_error(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(data.DataError, match="it has no rows"):
        read(tmp_path / "a.parquet", tokenizer)


def test_options_of_datasets_need_one(tokenizer):
    with pytest.raises(data.DataError, match="--text-column: stdlib is no dataset"):
        read("stdlib", tokenizer, selection=data.Selection("text"))
    with pytest.raises(data.DataError, match="leave --files out"):
        data.load_repos("stack", Counter(), True, None, data.Need(CUTS, tokenizer, CHUNK))


class Server(http.server.BaseHTTPRequestHandler):
    """Software Heritage's object store and the Hugging Face hub, as far as they are needed. `repos` has for each
    dataset its files, or the answer (status, X-Error-Code); `blobs` contents, or statuses to answer with first."""

    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict] = {}
    blobs: ClassVar[dict] = {}

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        self.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "content":
            blob = self.blobs.get(parts[1], [403])
            first = blob.pop(0) if isinstance(blob, list) and len(blob) > 1 else blob[0] if isinstance(blob, list) else blob
            return self.answer(first) if isinstance(first, int) else self.answer(200, first)
        api = parts[0] == "api"
        kind, owner, name, verb, _, *path = [*parts[api:], *[""] * 5]
        path = "/".join(path).rstrip("/")
        repo = self.repos.get(f"{owner}/{name}", (404, "RepoNotFound"))
        if kind != "datasets":
            return self.answer(404)
        if isinstance(repo, tuple):
            return self.answer(repo[0], X_Error_Code=repo[1])
        folders = {str(f) for file in repo for f in Path(file).parents if str(f) != "."}
        file = lambda p: {"type": "file", "path": p, "size": len(repo[p]), "oid": hashlib.sha1(repo[p]).hexdigest()}
        entry = lambda p: file(p) if p in repo else {"type": "directory", "path": p, "oid": "b" * 40}
        if api and verb in ("", "revision"):
            return self.answer(200, json.dumps({"id": f"{owner}/{name}", "sha": "a" * 40, "siblings": []}).encode())
        if api and verb == "tree" and (not path or path in folders):
            under = [p for p in sorted([*repo, *folders]) if p.startswith(path and path + "/")]
            deep = "recursive=true" in self.path.lower()
            return self.answer(200, json.dumps([entry(p) for p in under if deep or str(Path(p).parent) == (path or ".")]).encode())
        if api and verb == "paths-info":
            return self.answer(200, json.dumps([entry(p) for p in self.asked["paths"] if p in repo or p in folders]).encode())
        if api or path not in repo:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body, headers = repo[path], {"ETag": f'"{file(path)["oid"]}"', "X_Repo_Commit": "a" * 40}
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            part = body[int(start) : int(end or len(body)) + 1]
            return self.answer(206, part, Content_Range=f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}", **headers)
        return self.answer(200, body, **headers)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def blobs_of(rows) -> tuple[list[dict], dict[str, bytes]]:
    """The rows with The Stack v2's columns, and what they point to."""
    pointed, contents = [], {}
    for row in rows:
        encoding = "ISO-8859-1" if len(pointed) % 2 else "UTF-8"
        raw = f"# é\n{row['content']}".encode(encoding)
        blob = hashlib.sha1(raw).hexdigest()
        contents[blob] = gzip.compress(raw)
        names = {"repo_name": row["max_stars_repo_name"], "path": f"/{row['max_stars_repo_path']}", "language": "Python"}
        pointed.append({"blob_id": blob, "src_encoding": encoding, "length_bytes": len(raw), "is_vendor": False, **names})
    return pointed, contents


@pytest.fixture
def heritage(server, monkeypatch):
    monkeypatch.setattr(data, "CONTENT", f"{server}/content/")
    monkeypatch.setattr(data, "RETRIES", (0, 0))
    monkeypatch.setattr(Server, "blobs", {})


def test_contents_come_from_software_heritage(heritage, tmp_path, tokenizer, rows):
    pointed, Server.blobs = blobs_of(rows)
    (tmp_path / "a.parquet").write_bytes(parquet(pointed))
    (tmp_path / "b.parquet").write_bytes(parquet([row | {"content": f"# é\n{row['content']}"} for row in rows]))
    v2 = read(tmp_path / "a.parquet", tokenizer)
    assert v2 == read(tmp_path / "b.parquet", tokenizer) and all("é" in f.text for files in v2.values() for f in files)


def test_rows_that_are_whole_repositories_are_read(heritage, tmp_path, tokenizer, rows):
    """As in bigcode/the-stack-v2-train-smol-ids."""
    pointed, Server.blobs = blobs_of(rows)
    repos = {}
    for row in pointed:
        repos.setdefault(row["repo_name"], []).append({k: v for k, v in row.items() if k != "repo_name"})
    vendored = pointed[0] | {"blob_id": "0" * 40, "is_vendor": True}
    (tmp_path / "a.parquet").write_bytes(parquet([{"repo_name": name, "files": [vendored, *files]} for name, files in repos.items()]))
    (tmp_path / "b.parquet").write_bytes(parquet(pointed))
    cuts = [cut._replace(limit=1000) for cut in CUTS]
    skipped = Counter()
    assert read(tmp_path / "a.parquet", tokenizer, skipped, cuts=cuts) == read(tmp_path / "b.parquet", tokenizer, cuts=cuts)
    assert not skipped["not at Software Heritage"]


def test_what_is_surely_too_short_is_not_fetched(heritage, tmp_path, tokenizer, rows):
    pointed, Server.blobs = blobs_of(rows)
    short = [row | {"blob_id": f"{i:040x}", "length_bytes": 3, "repo_name": f"short/{i}", "path": "a"} for i, row in enumerate(pointed)]
    (tmp_path / "a.parquet").write_bytes(parquet(short + pointed))
    (tmp_path / "b.parquet").write_bytes(parquet([row | {"length_bytes": None} for row in short] + pointed))
    (tmp_path / "c.parquet").write_bytes(parquet(pointed))
    known, unknown = Counter(), Counter()
    alone = read(tmp_path / "c.parquet", tokenizer)
    assert alone == read(tmp_path / "a.parquet", tokenizer, known) == read(tmp_path / "b.parquet", tokenizer, unknown)
    assert not known["not at Software Heritage"] and unknown["not at Software Heritage"] > 10


@given(st.text(), st.sampled_from(["utf-8", "utf-16", "latin-1", "cp1252"]))
def test_no_file_has_more_tokens_than_bytes(tokenizer, text, encoding):
    raw = text.encode(encoding, "ignore")
    file = data.SourceFile("", "a/é.py", raw.decode(encoding))
    (tokens,) = data.encode(tokenizer, [data.with_path(file)])
    assert len(tokens) <= data.most_tokens(data.Listed(file.path, None, "0", encoding, len(raw)))


def test_what_software_heritage_does_not_give_is_skipped_and_what_it_gives_later_is_not(heritage, monkeypatch):
    text = "x = 'é'"
    Server.blobs = {
        "busy": [503, 500, gzip.compress(text.encode())], "plain": b"x = 1", "latin": gzip.compress(text.encode("latin-1")),
        "bomb": gzip.compress(b"0" * 10_000_000), "cut": [gzip.compress(text.encode())[:-9], gzip.compress(text.encode())],
        "odd": gzip.compress(b"x"),
    }  # fmt: skip
    get = lambda blob, encoding="utf-8", size=0: data.content(data.Listed("a.py", None, blob, encoding, size))
    assert get("busy") == (text, "") and get("cut") == (text, "") and get("latin", "ISO-8859-1") == (text, "")
    assert [get(blob)[1] for blob in ("gone", "plain", "latin", "bomb")] == [
        "not at Software Heritage", "damaged", "not UTF-8", "larger than 1 MB"]  # fmt: skip
    assert get("odd", "no such encoding") == (None, "not in its encoding") and get("busy", size=10**7) == (None, "larger than 1 MB")
    Server.blobs["down"] = [503]
    with pytest.raises(data.DataError, match=r"can't be reached.*503.*--data FOLDER"):
        get("down")
    monkeypatch.setattr(data, "CONTENT", "http://127.0.0.1:9/")
    with pytest.raises(data.DataError, match=r"can't be reached.*refused.*--data FOLDER"):
        get("busy")


READ_ALL = """
import json, sys, data
tokenizer = data.train_tokenizer(iter(["x = 1"]), 257)
for name, *selection in json.loads(sys.argv[1]):
    need = data.Need([data.Cut("train", 3, 1, 5)], tokenizer, 8)
    try:
        repos = data.load_repos(name, data.Counter(), False, data.Selection(*selection), need)
        print(json.dumps(sorted(f"{f.repo} {f.path}" for files in repos.values() for f in files)))
    except data.DataError as error:
        print(json.dumps(str(error)))
"""


def read_apart(wanted: list, folder: Path, **environment) -> list:
    """What a process of its own makes of datasets, since the libraries read their settings when imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(folder), **environment}
    command = [sys.executable, "-c", READ_ALL, json.dumps(wanted)]
    done = subprocess.run(command, env=env, cwd=Path(data.__file__).parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_datasets_of_the_hub_stream_or_say_what_is_wrong(server, tmp_path, rows, monkeypatch):
    card = b"---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl\n---\n"
    train = [row for row in rows if data.split_of(row["max_stars_repo_name"]) == "train"]
    repos = {
        "bigcode/the-stack-dedup": {"README.md": b"# The Stack", "data/c/data-0.parquet": parquet(rows[:1]),
                                    "data/python/data-0.parquet": parquet(train[:9]), "data/python/data-1.parquet": parquet(train[9:])},
        "any/lines": {"train.jsonl": json_lines(train), "test.jsonl": json_lines(train[:9])},
        "any/two": {"README.md": card, "one.jsonl": json_lines(train), "two.jsonl": json_lines(train)},
        "any/script": {"script.py": b"import os"}, "any/empty": {"README.md": b"# Nothing"},
        "any/gated": (401, "GatedRepo"), "any/asked": (403, "GatedRepo"), "any/private": (401, "RepoNotFound"),
    }  # fmt: skip
    monkeypatch.setattr(Server, "repos", repos)
    wanted = {
        ("stack",): 5, ("hub:any/lines",): 5, ("hub:any/lines", None, None, None, "test"): 4, ("hub:any/two", None, "two"): 5,
        ("hub:any/gated",): r"is gated; accept its terms at https://huggingface.co/datasets/any/gated and log in \(.*HF_TOKEN",
        ("hub:any/asked",): "is gated; accept its terms at", ("hub:any/private",): "no such dataset, or a private one",
        ("hub:any/absent",): "no such dataset", ("hub:any/script",): "never run", ("hub:any/empty",): "no rows there",
        ("hub:any/two",): r"--subset has to be one of .*\['one', 'two'\]", ("hub:any/two", None, "six"): r"--subset .*\['one', 'two'\]",
        ("hub:any/lines", None, None, None, "valid"): r"--dataset-split .*'test'", ("stack", None, None, "data/cobol"): "no rows there",
        ("hub:any/lines", "body"): "no such column; its columns are max_stars_repo_path",
    }  # fmt: skip
    answers = read_apart(list(wanted), tmp_path, HF_ENDPOINT=server)
    local = {f"{row['max_stars_repo_name']} {row['max_stars_repo_path']}" for row in train}
    for (what, message), answer in zip(wanted.items(), answers, strict=True):
        if isinstance(message, int):
            assert isinstance(answer, list) and len(answer) == message and set(answer) <= local, (what, answer)
        else:
            assert isinstance(answer, str) and "\n" not in answer, (what, answer)
            assert re.search(message, answer), (what, answer)
            assert "--data FOLDER" in answer or "columns" in answer


def test_without_a_network_one_line_names_the_local_way(tmp_path):
    for answer in read_apart([("stack",), ("stack-v2",), ("hub:any/thing",)], tmp_path, HF_HUB_OFFLINE="1"):
        assert "hub can't be reached" in answer and "--data FOLDER" in answer and "\n" not in answer


# --- 3. Near-duplicates -------------------------------------------------------------------------


def module(lines, name="a") -> data.SourceFile:
    return data.SourceFile(name, f"{name}.py", "\n".join(f"    the_value_of_line_number_{i} = compute({i})" for i in lines))


def kept(files, held_out=()):
    skipped = Counter()
    return [file.repo for file in data.deduplicate(iter(files), iter(held_out), skipped)], skipped


def test_copies_of_held_out_code_are_dropped():
    files = [module(range(100), "copy"), module([*range(20), *range(200, 280)], "a fifth"), module(range(300, 400), "distinct")]
    assert kept(files, [module(range(50)), module(range(50, 100))]) == (["distinct"], {"near-duplicate of held-out code": 2})


def test_copies_of_earlier_files_are_dropped():
    files = [module(range(100), "first"), module(range(100), "copy")]
    files += [module(range(40, 140), "60 %"), module(range(60, 160), "40 %")]
    assert kept(files) == (["first", "40 %"], {"near-duplicate": 2})


def test_a_little_in_common_is_no_copy():
    licence = [data.SourceFile(name, name, "# Licensed under the same long line of text\n" * 3 + module(lines).text)
               for name, lines in (("one", range(30)), ("two", range(50, 80)))]  # fmt: skip
    assert kept(licence)[0] == ["one", "two"]
    assert kept(licence[1:], licence[:1])[0] == ["two"]


def test_short_lines_and_indentation_say_nothing():
    short = [data.SourceFile(name, name, "import os\nreturn x\n\n") for name in ("one", "two")]
    assert kept(short, short)[0] == ["one", "two"]
    indented = module(range(9))._replace(text=module(range(9)).text.replace("    ", "\t\t"))
    assert kept([module(range(9)), indented])[0] == ["a"] and kept([module(range(9)), indented])[1] == {"near-duplicate": 1}


# --- 4. Splits ----------------------------------------------------------------------------------


def test_splits_never_change():
    """If this fails, published splits have moved and trained weights have seen the test set."""
    names = ["argparse", "asyncio", "json", "email", "numpy", "synthetic_000", "a", "é"]
    assert [data.split_of(name) for name in names] == ["valid", "train", "test", "train", "train", "train", "valid", "train"]


def test_splits_are_60_20_20():
    counts = Counter(data.split_of(f"repository-{i}") for i in range(5000))
    assert counts.keys() == {"train", "valid", "test"}
    for split, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        assert abs(counts[split] / 5000 - share) < 0.02


# --- 5. Tokens ----------------------------------------------------------------------------------


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_decode_undoes_encode(tokenizer, texts):
    tokens = data.encode(tokenizer, texts)
    assert [tokenizer.decode(list(x), skip_special_tokens=False) for x in tokens] == texts
    assert all(x.dtype == "int32" and x.ndim == 1 for x in tokens)


@given(st.text(max_size=5), st.text(max_size=5))
def test_the_end_of_text_spelled_out_stays_text(tokenizer, before, after):
    text = before + data.END_OF_TEXT + after
    (tokens,) = data.encode(tokenizer, [text])
    assert tokenizer.token_to_id(data.END_OF_TEXT) not in tokens
    assert tokenizer.decode(list(tokens)) == text


def test_the_tokenizer_is_deterministic_and_has_its_vocabulary(tokenizer):
    again = data.train_tokenizer((file.text for file in data.synthetic_source(3)), 300)
    assert again.to_str() == data.train_tokenizer((file.text for file in data.synthetic_source(3)), 300).to_str()
    assert again.get_vocab_size() == 300 and again.token_to_id(data.END_OF_TEXT) is not None
    text = next(data.synthetic_source()).text
    assert len(data.encode(again, [text])[0]) < 0.9 * len(text)  # merges were learned


def test_ids_of_a_tokenizer_may_have_gaps():
    sparse = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 5}, unk_token="a"))
    assert data.largest_id(sparse) == 5 and data.token_texts(sparse) == ["a", "b", "", "", "", "c"]


@pytest.fixture(scope="module")
def gpt2():
    """transformers' own tokenizer from GPT-2's files, and ours from those files and from its tokenizer.json."""
    if not GPT2.is_dir():
        pytest.skip(f"GPT-2's vocab.json and merges.txt are not in {GPT2}")
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2TokenizerFast.from_pretrained(str(GPT2)), data.load_tokenizer(GPT2)


PIECES = ["def f(x):\n", "    ", "\t", "\r\n", " ", "  \n\n", "self.x_1+=0xFF", "'don't'", "é☃日本", "\u00a0\u3000", "\ufeff", "\0", "🤦🏽",
          "\u200d♂️", "e\u0301",
          "<|endoftext|>", "<|end", "#!/", "123456", "==>", "\u017f'LL've"]  # fmt: skip


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_ids_are_those_of_transformers(gpt2, text):
    theirs, ours = gpt2
    (ids,) = data.encode(ours, [text])
    assert ids.tolist() == theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.decode(ids.tolist(), skip_special_tokens=False) == text


def test_both_layouts_of_a_tokenizer_are_the_same(gpt2, tmp_path):
    theirs, ours = gpt2
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "merges.txt").exists()
    other = data.load_tokenizer(tmp_path)
    source = Path(data.__file__).read_text() + "".join(PIECES)
    assert data.encode(other, [source])[0].tolist() == data.encode(ours, [source])[0].tolist()
    assert other.token_to_id(data.END_OF_TEXT) == ours.token_to_id(data.END_OF_TEXT) == 50256
    assert data.token_texts(other) == data.token_texts(ours) and data.token_texts(ours)[50256] == ""


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{"}, {"vocab.json": "{}"}, {"vocab.json": "[", "merges.txt": ""}])
def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path, files):
    with pytest.raises(data.DataError, match=r"no readable tokenizer .*tokenizer.json, or vocab.json and merges.txt") as error:
        data.load_tokenizer(write(tmp_path, files))
    assert "\n" not in str(error.value)


def test_documents_start_with_the_end_of_text_or_what_the_config_says(tmp_path, tokenizer):
    other = data.train_tokenizer(iter(["text"]), 300)
    other = tokenizers.Tokenizer.from_str(other.to_str().replace(data.END_OF_TEXT, "</s>"))
    config = lambda end: (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    end_of_text = tokenizer.token_to_id(data.END_OF_TEXT)
    assert data.end_tokens(tmp_path, tokenizer) == (end_of_text,)
    for end, expected in ((5, (5,)), ([7, 9], (7, 9))):
        config(end)
        assert data.end_tokens(tmp_path, other) == expected
        assert data.end_tokens(tmp_path, tokenizer) == (end_of_text, *expected)
    for end in (None, [], "x", 999):
        config(end)
        with pytest.raises(data.DataError, match="eos_token_id"):
            data.end_tokens(tmp_path, other)
    (tmp_path / "config.json").unlink()
    with pytest.raises(data.DataError, match="eos_token_id"):
        data.end_tokens(tmp_path, other)
    repos = {"repo": [data.SourceFile("repo", "a.py", "x = 1\n" * 99)]}
    (document,) = data.documents(repos, data.split_of("repo"), other, 8, 2, 1, 1, end=5)
    assert document.tokens[0] == 5 and len(document.tokens) == 17


def test_a_file_is_read_under_its_path():
    assert data.with_path(data.SourceFile("r", "r/a.py", "x = 1\n\n\n")) == "# r/a.py\nx = 1\n\n"


# --- documents ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic():
    repos = data.load_repos("synthetic", Counter())
    return repos, data.train_tokenizer((f.text for f in repos["synthetic_000"]), 300)


def test_documents_are_the_tokens_of_their_repository_in_order(synthetic):
    repos, tokenizer = synthetic
    found = data.documents(repos, "train", tokenizer, chunk=8, chunks=5, per_repo=2, limit=30)
    first = [d.repo for d in found].index(found[0].repo, 1)  # its second run comes after the first of every other repository
    assert first == len({d.repo for d in found})
    whole = np.concatenate(data.encode(tokenizer, [data.with_path(f) for f in repos[found[0].repo]]))
    for document, start in ((found[0], 0), (found[first], 40)):
        assert document.tokens[0] == tokenizer.token_to_id(data.END_OF_TEXT) and document.tokens.dtype == np.int32
        assert document.tokens[1:].tolist() == whole[start : start + 40].tolist()


def test_documents_of_different_splits_share_no_repository(synthetic):
    repos, tokenizer = synthetic
    cut = lambda split: {d.repo for d in data.documents(repos, split, tokenizer, 8, 5, 2, 100)}
    train, valid, test = map(cut, ("train", "valid", "test"))
    assert train and valid and test and not (train & valid or train & test or valid & test)
    assert all(data.split_of(repo) == "test" for repo in test)


def test_a_limit_takes_the_same_first_documents(synthetic):
    repos, tokenizer = synthetic
    cut = lambda limit: [(d.repo, d.tokens.tolist()) for d in data.documents(repos, "train", tokenizer, 8, 5, 1, limit)]
    assert cut(3) == cut(100)[:3]


def test_too_short_repositories_are_one_clear_error(synthetic):
    with pytest.raises(data.DataError, match="--chunks"):
        data.documents(*synthetic[:1], "test", synthetic[1], 8, 10**6, 1, 5)


def test_near_copies_do_not_cross_splits(copies):
    alpha, skipped = {"alpha": 20}, Counter()
    repos = copies(test={"copy.py": alpha, "own.py": {"beta": 20}}, train={"a.py": alpha}, valid={"copy.py": alpha})
    assert PATHS(data.drop_leaks(repos, skipped)) == {"test": ["own.py"], "train": ["a.py"]}
    assert skipped["near-copy across splits"] == 2


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, base, rank, batch, documents",
    [
        ("125m", "gpt2", 64, 8, 5_000),
        ("350m", "gpt2-medium", 128, 4, 10_000),
        ("1b", "gpt2-large", 256, 2, 20_000),
        ("xl", "gpt2-xl", 256, 2, 20_000),
    ],
)
def test_scales_have_their_sizes_and_read_the_stack(name, base, rank, batch, documents):
    cfg = ponder.resolve(ponder.Config(scale=name, fast="lora"))
    assert (ponder.SCALES[name].base, cfg.batch, cfg.train_documents, cfg.data) == (base, batch, documents, "stack")
    model = lm.Model(50257, 1024, 64, 12, 2)
    assert ponder.fast_weights(cfg, model).hidden == rank and 2 * cfg.chunk <= model.positions
    assert cfg.iterations * cfg.batch == documents  # each document once


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, tokenizer) -> Path:
    """A cache of the hub, offline, with a random model under the name gpt2: snapshots of links to blobs."""
    pytest.importorskip("huggingface_hub.constants")  # imported, so that it can be patched
    source, repo = tmp_path / "source", tmp_path / "hub" / "models--gpt2"
    model = lm.Model(tokenizer.get_vocab_size(), 64, 16, 4, 2)
    lm.save_gpt2(source, model, lm.init_gpt2(jax.random.key(0), model), np.float32)
    tokenizer.model.save(str(source))
    write(repo, {"refs/main": "c" * 40})
    snapshot = repo / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in source.iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_scale_opens_its_model_from_the_hub_cache_and_rows_from_a_file(hub_cache, tmp_path, rows):
    (tmp_path / "rows.parquet").write_bytes(parquet(rows))
    sizes = {"chunk": 8, "chunks": 3, "meta_chunks": 3, "train_documents": 6, "test_documents": 3}
    cfg = ponder.resolve(ponder.Config(scale="125m", fast="lora", data=str(tmp_path / "rows.parquet"), **sizes))
    work = ponder.open_workspace(cfg, tmp_path / "run", ponder.open_mesh(cfg))
    assert ponder.base_folder("gpt2") == hub_cache and work.setup.model.width == 16 and work.setup.fast.hidden == 64
    assert len(work.texts["train"]) == 6 and len(work.texts["test"]) == 3 and len(work.texts["meta_valid"]) == 4
    assert all(len(text.tokens) == 3 * 8 + 1 and text.tokens.max() < work.setup.model.vocab for text in work.texts["train"])
    with pytest.raises(ponder.UserError, match=r"gpt2-medium: .* the hub can't be reached .*give a folder"):
        ponder.base_folder("gpt2-medium")
