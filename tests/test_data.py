"""data.py: files, near-duplicates, splits and tokens."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import data


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
    files = {"a.py": b"x = 1", "docs/b.md": b"text", "c.png": b"image", "large.txt": b"0" * (data.MAX_FILE_BYTES + 1)}
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


@pytest.mark.parametrize("fault, message", [("damaged", "arrived damaged"), ("absent", "can't be had"), ("offline", "can't be had")])
def test_a_source_distribution_that_does_not_arrive_is_one_clear_error(pypi, tmp_path, monkeypatch, fault, message):
    if fault == "damaged":
        pypi["archive"] = pypi["archive"][:-1]
    if fault == "offline":
        monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(data.DataError, match=message) as error:
        data.fetch_repository(tmp_path, "thing", "2.0" if fault == "absent" else "1.0")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_synthetic_source_is_deterministic_and_repositories_differ():
    first, again, other = (list(data.synthetic_source(5, seed)) for seed in (0, 0, 1))
    assert first == again and first != other
    assert len({file.repo for file in first}) == 5 and len({file.text for file in first}) == len(first)


# --- 2. Near-duplicates -------------------------------------------------------------------------


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


# --- 3. Splits ----------------------------------------------------------------------------------


def test_splits_never_change():
    """If this fails, published splits have moved and trained weights have seen the test set."""
    names = ["argparse", "asyncio", "json", "email", "numpy", "synthetic_000", "a", "é"]
    assert [data.split_of(name) for name in names] == ["valid", "train", "test", "train", "train", "train", "valid", "train"]


def test_splits_are_60_20_20():
    counts = Counter(data.split_of(f"repository-{i}") for i in range(5000))
    assert counts.keys() == {"train", "valid", "test"}
    for split, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        assert abs(counts[split] / 5000 - share) < 0.02


# --- 4. Tokens ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer((file.text for file in data.synthetic_source(3)), 300)


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


def test_documents_start_with_the_end_of_text_or_what_the_config_says(tmp_path, tokenizer):
    other = data.train_tokenizer(iter(["text"]), 300)
    other = tokenizers.Tokenizer.from_str(other.to_str().replace(data.END_OF_TEXT, "</s>"))
    config = lambda end: (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    assert data.end_token(tmp_path, tokenizer) == tokenizer.token_to_id(data.END_OF_TEXT)
    for end, expected in ((0, 0), ([7, 9], 7)):
        config(end)
        assert data.end_token(tmp_path, other) == expected
    for end in (None, [], "x", 999):
        config(end)
        with pytest.raises(data.DataError, match="eos_token_id"):
            data.end_token(tmp_path, other)
    (tmp_path / "config.json").unlink()
    with pytest.raises(data.DataError, match="eos_token_id"):
        data.end_token(tmp_path, other)
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


def test_near_copies_do_not_cross_splits():
    names = {split: next(f"repo{i}" for i in range(99) if data.split_of(f"repo{i}") == split) for split in data.SPLITS}
    lines = lambda word: "".join(f"{word}_{i} = compute_something_long({word}, {i})\n" for i in range(20))
    file = lambda split, name, text: data.SourceFile(names[split], name, text)
    repos = {
        names["test"]: [file("test", "copy.py", lines("alpha")), file("test", "own.py", lines("beta"))],
        names["train"]: [file("train", "a.py", lines("alpha"))],
        names["valid"]: [file("valid", "copy.py", lines("alpha"))],
    }
    skipped = Counter()
    kept = data.drop_leaks(repos, skipped)
    assert {name: [f.path for f in files] for name, files in kept.items()} == {names["test"]: ["own.py"], names["train"]: ["a.py"]}
    assert skipped["near-copy across splits"] == 2
