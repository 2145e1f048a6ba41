"""Files are written whole, flushed, and found damaged when they are: halos/files.py and halos/manifest.py."""

import json
import os

import pytest

from halos import files, manifest
from halos.errors import UserError


def events_of(monkeypatch) -> list[tuple[str, str]]:
    """Record fsync and rename in their order, with the base name of what they are called on."""
    events = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def recorded_fsync(descriptor):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    for name, own in (("replace", replace), ("rename", rename)):

        def recorded(source, target, own=own):
            events.append(("rename", f"{os.path.basename(source)} {os.path.basename(target)}"))
            own(source, target)

        monkeypatch.setattr(os, name, recorded)
    return events


def test_a_file_is_flushed_before_its_rename_and_its_directory_after(tmp_path, monkeypatch):
    """Files were renamed without fsync: after a power cut the new name could have held no bytes."""
    events = events_of(monkeypatch)
    with files.finished(str(tmp_path / "a")) as unfinished, open(unfinished, "w") as file:
        file.write("whole")
    assert events == [("fsync", ".a.unfinished"), ("rename", ".a.unfinished a"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a").read_text() == "whole" and os.listdir(tmp_path) == ["a"]


def test_a_directory_is_flushed_with_its_files_before_it_is_renamed(tmp_path, monkeypatch):
    for name in ("new", "LATEST"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text(name)
    events = events_of(monkeypatch)
    files.replace_directory(str(tmp_path / "new"), str(tmp_path / "LATEST"))
    assert events == [
        *[("fsync", name) for name in ("new", "file", "sub")],
        ("rename", "LATEST LATEST.old"),
        ("rename", "new LATEST"),
        ("fsync", tmp_path.name),
    ]
    assert os.listdir(tmp_path) == ["LATEST"] and (tmp_path / "LATEST/sub/file").read_text() == "new"


@pytest.fixture
def directory(tmp_path, monkeypatch) -> str:
    """A complete directory with an empty file, a file of one block, and one of three blocks, in a subdirectory."""
    monkeypatch.setattr(manifest, "BLOCK", 1000)
    monkeypatch.setattr(manifest, "CHUNK", 300)
    (tmp_path / "sub").mkdir()
    for name, size in (("empty", 0), ("one", 1000), ("sub/three", 2001)):
        (tmp_path / name).write_bytes(os.urandom(size))
    manifest.write(str(tmp_path))
    return str(tmp_path)


def test_a_whole_directory_passes(directory):
    with open(os.path.join(directory, manifest.NAME)) as file:
        entries = json.load(file)["files"]
    assert {name: (e["size"], len(e["crc32"])) for name, e in entries.items()} == {
        "empty": (0, 0),
        "one": (1000, 1),
        "sub/three": (2001, 3),
    }
    manifest.check(directory)
    with open(os.path.join(directory, "eval.json"), "w") as file:  # files that come later do no harm
        file.write("{}")
    manifest.write(directory)  # again, over the old one
    manifest.check(directory)


@pytest.mark.parametrize("position", [0, 999, 1000, 1999, 2000])
def test_every_flipped_bit_is_found(directory, position):
    path = os.path.join(directory, "sub/three")
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(manifest.Damaged, match="sub/three is not what was written: its checksum differs"):
        manifest.check(directory)
    manifest.check(directory, lambda name: name != "sub/three")  # a file that is not needed is not read


@pytest.mark.parametrize("name", ["one", "sub/three"])
def test_a_truncated_and_a_missing_file_are_named(directory, name):
    path = os.path.join(directory, name)
    size = os.path.getsize(path)
    os.truncate(path, size - 1)
    with pytest.raises(manifest.Damaged, match=rf"{name} has \S+ bytes, and {size:,} were written"):
        manifest.check(directory)
    os.remove(path)
    with pytest.raises(manifest.Damaged, match=f"{name} is missing"):
        manifest.check(directory)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"block": 0, "files": {}}', '{"block": 9, "files": {"a": {"size": 1}}}']
)
def test_a_damaged_manifest_is_named(directory, content):
    with open(os.path.join(directory, manifest.NAME), "w") as file:
        file.write(content)
    with pytest.raises(UserError, match="manifest.json is damaged"):
        manifest.check(directory)


def test_a_directory_without_a_manifest_is_incomplete(directory):
    assert manifest.is_complete(directory)
    os.remove(os.path.join(directory, manifest.NAME))
    assert not manifest.is_complete(directory)
    with pytest.raises(manifest.Damaged, match="is incomplete: it has no manifest.json"):
        manifest.check(directory)
