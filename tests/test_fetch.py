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
from conftest import write

SCRIPT = Path(__file__).parent.parent / "assets" / "fetch.py"
KEPT = {"setup.py": b"import os; os.mkdir(os.environ['RAN'])", "docs/b.md": b"b", "large.txt": bytes(10**6)}
LEFT_OUT = {"c.png": b"image", "larger.txt": bytes(10**6 + 1), "../../up.py": b"x", "../../../up.py": b"x"}
FAULTS = [("1.0", "", "arrived damaged"), ("1.0", "index/thing", "unpacked"), ("2.0", "", "finds no source")]
FILES = {f"thing-1.0/{name}": content for name, content in (KEPT | LEFT_OUT).items()}


def make_archive(suffix: str) -> bytes:
    """Make a source distribution of FILES and a link."""
    archive = io.BytesIO()
    if suffix == ".zip":
        link = zipfile.ZipInfo("thing-1.0/link.py")
        link.external_attr = 0o120777 << 16  # the mode of a symbolic link
        with zipfile.ZipFile(archive, "w") as zipped:
            for name, content in {**FILES, link: b"setup.py", "thing-1.0/docs/": b""}.items():
                zipped.writestr(name, content)
    else:
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for name, content in {**FILES, "thing-1.0/link.py": b""}.items():
                member = tarfile.TarInfo(name)
                member.size, member.type = len(content), tarfile.REGTYPE if content else tarfile.SYMTYPE
                tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


@pytest.fixture
def archive(request, tmp_path, monkeypatch) -> Path:
    """Make an index of thing 1.0, the only one that pip knows; return where its archive is."""
    suffix = getattr(request, "param", ".tar.gz")
    names = ["thing-1.0-py3-none-any.whl", f"thing-11.0{suffix}", f"thing-1.0{suffix}"]
    checksum = hashlib.sha256(content := make_archive(suffix)).hexdigest()
    page = "".join(f"<a href={name}#sha256={checksum}>{name}</a>" for name in names)
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "index" / "thing", {"index.html": page, names[-1]: content}) / names[-1]


def start(version: str = "1.0", **pip: str) -> subprocess.Popen:
    Path("list.txt").write_text(f"another==3.0\nthing=={version}\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"file://{os.getcwd()}/index"}
    command = [sys.executable, SCRIPT, "out", "--list", "list.txt", "--only", "thing"]
    env |= {"RAN": os.path.abspath("ran"), **pip}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("archive", [".tar.gz", ".zip"], indirect=True)
def test_what_is_of_use_becomes_a_folder_and_nothing_runs(archive):
    assert start().wait(100) == 0
    found = {path.as_posix(): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert found == {f"out/thing/{name}": content for name, content in KEPT.items()}
    assert os.listdir("out") == ["thing"] and sorted(os.listdir()) == ["index", "list.txt", "out"]
    archive.unlink()
    assert start().wait(100) == 0  # what is there is not fetched again


@pytest.mark.parametrize("version, find_links, message", FAULTS)
def test_what_cannot_be_had_is_one_clear_error(archive, version, find_links, message):
    archive.write_bytes(archive.read_bytes()[:-900])
    error = (run := start(version, PIP_FIND_LINKS=find_links)).communicate(timeout=100)[1]
    assert (run.returncode, os.listdir("out")) == (2, [])
    assert message in error.splitlines()[-1] and "Traceback" not in error


def test_ctrl_c_leaves_nothing_unfinished(archive):
    archive.unlink()
    os.mkfifo(archive)
    run = start()
    with archive.open("wb"):  # opens when a worker reads it
        assert len(os.listdir("out")) == 1
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=100)[1].endswith("the same command goes on\n")
    assert run.returncode == 1 and not os.listdir("out")
