"""assets/fetch.py: repositories from where pip is told to look, as whole folders or one clear error."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "assets" / "fetch.py"
KEPT = {"setup.py": b"import os; os.mkdir(os.environ['RAN'])", "docs/b.md": b"b", "large.txt": bytes(10**6)}
LEFT_OUT = {"c.png": b"image", "larger.txt": bytes(10**6 + 1), "../../up.py": b"x", "../../../up.py": b"x"}
LEFT_OUT |= {"docs/": b"", "link.py": b""}  # what is empty is a link
FAULTS = [("1.0", "", "arrived damaged"), ("1.0", "index/thing", "unpacked"), ("2.0", "", "finds no source")]


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """Make an index of thing and zipped 1.0, the only one that pip knows; return where thing's archive is."""
    monkeypatch.chdir(tmp_path)
    paths = Path("index/thing/thing-1.0.tar.gz"), Path("index/zipped/zipped-1.0.zip")
    for path in paths:
        path.parent.mkdir(parents=True)
    with tarfile.open(paths[0], "w:gz") as tar, zipfile.ZipFile(paths[1], "w") as zipped:
        for name, content in (KEPT | LEFT_OUT).items():
            member, info = tarfile.TarInfo(f"thing-1.0/{name}"), zipfile.ZipInfo(f"thing-1.0/{name}")
            member.size, member.type = len(content), tarfile.REGTYPE if content else tarfile.SYMTYPE
            info.external_attr = 0 if content else 0o120777 << 16  # the mode of a symbolic link
            tar.addfile(member, io.BytesIO(content))
            zipped.writestr(info, content)
    for path in paths:
        checksum, name = hashlib.sha256(path.read_bytes()).hexdigest(), path.parent.name
        names = f"{name}-1.0-py3-none-any.whl", path.name.replace("1.0", "11.0"), path.name
        page = "".join(f"<a href={listed}#sha256={checksum}>{listed}</a>" for listed in names)
        path.with_name("index.html").write_text(page)
    return paths[0]


def start(version="1.0", only=("thing", "zipped"), find_links="") -> subprocess.Popen:
    Path("list.txt").write_text(f"another==3.0\nthing=={version}\nzipped==1.0\n")
    env = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"file://{os.getcwd()}/index"}
    env |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": find_links, "RAN": os.path.abspath("ran")}
    command = [sys.executable, SCRIPT, "out", "--list", "list.txt", "--only", *only]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_what_is_of_use_becomes_a_folder_and_nothing_runs(archive):
    assert start().wait(100) == 0
    found = {path.as_posix(): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert found == {f"out/{to}/{name}": KEPT[name] for to in ("thing", "zipped") for name in KEPT}
    assert sorted(os.listdir("out")) == ["thing", "zipped"] and len(os.listdir()) == 3
    archive.unlink()
    assert start().wait(100) == 0  # what is there is not fetched again


@pytest.mark.parametrize("version, find_links, message", FAULTS)
def test_what_cannot_be_had_is_one_clear_error(archive, version, find_links, message):
    archive.write_bytes(archive.read_bytes()[:-900])
    error = (run := start(version, find_links=find_links)).communicate(timeout=100)[1]
    assert (run.returncode, os.listdir("out")) == (2, ["zipped"])
    assert message in error.splitlines()[-1] and "Traceback" not in error


def test_ctrl_c_leaves_nothing_unfinished(archive):
    archive.unlink()
    os.mkfifo(archive)
    run = start(only=["thing"])
    with archive.open("wb"):  # opens when a worker reads it
        assert len(os.listdir("out")) == 1
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=100)[1].endswith("the same command goes on\n")
    assert run.returncode == 1 and not os.listdir("out")
