"""Fetch the repositories that the results are measured on: source distributions, of which nothing is run.

pip's own code finds and downloads each file, so the user's indexes, mirrors, find-links, proxies, passwords
and certificates hold. `pip download` itself runs a package's build to learn its metadata, and pip has no
public way to stop before that. So `download` calls pip's internals, in worker processes of their own.
"""

import hashlib
import io
import logging
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from signal import SIG_IGN, SIGINT, signal
from stat import S_ISLNK
from tempfile import TemporaryDirectory
from typing import Annotated

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import ASSETS, MAX_FILE_BYTES, UserError

MEDIA = (".png", ".jpg", ".pdf", ".gz", ".zip", ".whl", ".so", ".npz", ".fits", ".ttf", ".mo")
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="to put them in")]
Listed = Annotated[Path, tyro.conf.arg(name="list", help="a file with a line NAME==VERSION for each")]
Only = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help="of the list, to fetch no others")]


def fetch_repositories(folder: Folder, listed: Listed = ASSETS / "repositories.txt", only: Only = ()) -> None:
    """Unpack each listed source distribution into FOLDER/NAME, without media, links and files above 1 MB.

    What is there is not fetched again. Read them with `python ponder.py --data FOLDER --files all`."""
    versions = read_list(listed)
    if unknown := [name for name in only if name not in versions]:
        raise UserError(f"--only {unknown[0]}: not in {listed}; give names that are in it")
    missing = {name: versions[name] for name in only or versions if not (folder / name).is_dir()}
    folder.mkdir(parents=True, exist_ok=True)
    workers = get_context("spawn").Pool(min(4, len(missing)) or 1, signal, (SIGINT, SIG_IGN))
    with TemporaryDirectory(dir=folder, prefix=".") as unfinished, workers:  # Ctrl-C ends both
        answers = workers.imap_unordered(partial(fetch, folder, Path(unfinished)), missing.items())
        faults = filter(None, tqdm(answers, "repositories", len(missing)))
        failures = list(islice(faults, 12))  # where so many fail, all do
    if failures:
        raise UserError(f"{failures[0]}; {len(failures)} failed, and the same command tries them again")


def read_list(listed: Path) -> dict[str, str]:
    """Read the version of each name. Raises: UserError if a line is something else, OSError."""
    lines = listed.read_text(errors="replace").split()
    if wrong := [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!+]+", line)]:
        raise UserError(f"--list {listed}: {wrong[0]} is not NAME==VERSION; correct that line")
    return dict(line.split("==") for line in lines)


def fetch(folder: Path, unfinished: Path, pair: tuple[str, str]) -> str:
    """Put a source distribution into its folder, whole or not at all; return why it failed, or ""."""
    name, version = pair
    try:
        unpack(*download(name, version), unfinished / name)
        (unfinished / name).rename(folder / name)
    except (Exception, SystemExit) as error:  # pip's internals and damaged archives raise what they like
        fault = f"can't be fetched and unpacked ({error!r}); connect, or use a current pip"
        return f"{name} {version}: {error if isinstance(error, UserError) else fault}"
    return ""


def download(name: str, version: str) -> tuple[str, bytes]:
    """Return the file name and the content of a source distribution. Raises: UserError, what pip raises."""
    from pip._internal.commands import create_command
    from pip._vendor.packaging.specifiers import SpecifierSet

    logging.basicConfig(stream=(log := io.StringIO()), level=logging.DEBUG, format="%(message)s", force=True)
    command = create_command("download")
    options = command.parse_args(["--no-binary=:all:", "--no-cache-dir", "--no-input"])[0]
    with command._build_session(options) as session:
        finder = command._build_package_finder(options, session, ignore_requires_python=True)
        best = finder.find_best_candidate(name, SpecifierSet(f"=={version}")).best_candidate
        if best is None:
            why = "; ".join(re.findall("Could not fetch URL.*", log.getvalue())) or "only others are listed"
            raise UserError(f"pip finds no source distribution ({why}); connect, or check `pip config list`")
        link = best.link
        answer = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"})
        answer.raise_for_status()
    if link.hash_name and hashlib.new(link.hash_name, answer.content).hexdigest() != link.hash:
        raise UserError(f"{link.filename} arrived damaged: its {link.hash_name} differs; fetch it again")
    return link.filename, answer.content


def unpack(filename: str, archive: bytes, folder: Path) -> None:
    """Unpack an archive without its outer folder, links, media, large files and what would lie outside."""
    folder.mkdir()
    for name, content in list_files(filename, io.BytesIO(archive)):
        path = folder.joinpath(*PurePosixPath(name).parts[1:]).resolve()
        if folder.resolve() in path.parents and not name.endswith(MEDIA):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def list_files(filename: str, archive: io.BytesIO) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each file in an archive that is neither a link nor large."""
    if filename.endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                plain = not info.is_dir() and not S_ISLNK(info.external_attr >> 16)
                if plain and info.file_size <= MAX_FILE_BYTES:
                    yield info.filename, zipped.read(info)
    else:
        with tarfile.open(fileobj=archive) as tar:
            for member in tar:
                if member.isfile() and member.size <= MAX_FILE_BYTES:
                    yield member.name, tar.extractfile(member).read()


if __name__ == "__main__":
    try:
        tyro.cli(fetch_repositories)
    except (UserError, OSError) as error:
        hint = "; give another FOLDER or --list" if isinstance(error, OSError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
