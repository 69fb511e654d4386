import hashlib
import os
from pathlib import Path

import pytest

from kd_lightning.data import file_hashes
from kd_lightning.data.file_hashes import FileNotes, hash_file, hash_files, letters, number_of
from kd_lightning.data.identity import identify
from kd_lightning.data.sources.image_files import FlatFolder
from kd_lightning.errors import InputError

OLD = 1_700_000_000


@pytest.fixture(autouse=True)
def no_memory(monkeypatch):
    """As in a new process; files of this second are noted, too."""
    monkeypatch.setattr(file_hashes, "_hashes", {})
    monkeypatch.setattr(file_hashes, "_SETTLED", -3600.0)


@pytest.fixture
def paths(tmp_path):
    found = []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        path.write_bytes(bytes([number]) * 9)
        os.utime(path, (OLD, OLD))
        found.append(str(path))
    return found


@pytest.fixture
def read(monkeypatch):
    """The files that are read, in any order."""
    found = []
    plain = file_hashes._read_and_hash
    monkeypatch.setattr(file_hashes, "_read_and_hash", lambda path: found.append(Path(path).name) or plain(path))
    return found


def forget(monkeypatch):
    monkeypatch.setattr(file_hashes, "_hashes", {})


def no_sample(monkeypatch):
    monkeypatch.setattr(file_hashes, "_SAMPLE", (0, 0, 0))


def test_hash_of_the_bytes(paths):
    assert hash_file(paths[1]) == letters(hashlib.blake2b(bytes([1]) * 9, digest_size=8).hexdigest())
    assert number_of(hash_file(paths[1])) == int(hashlib.blake2b(bytes([1]) * 9, digest_size=8).hexdigest(), 16)


def test_an_unchanged_file_is_read_once(paths, read):
    first = hash_files(paths)
    assert hash_files(paths) == first
    assert len(read) == 5
    hash_file(paths[0], anew=True)
    assert len(read) == 6


def test_a_replaced_file_of_the_same_size_and_time_is_read_again(paths, tmp_path):
    before = hash_file(paths[0])
    other = tmp_path / "other"
    other.write_bytes(b"x" * 9)
    os.utime(other, (OLD, OLD))
    other.replace(paths[0])
    assert hash_file(paths[0]) != before


def test_a_missing_file(tmp_path):
    for action in (hash_file, lambda path: FileNotes(tmp_path / "notes").recall([path])):
        with pytest.raises(InputError, match=r"image .*none\.png cannot be read"):
            action(str(tmp_path / "none.png"))


def test_a_later_process_reads_only_what_has_changed(paths, tmp_path, monkeypatch, read):
    no_sample(monkeypatch)
    notes = FileNotes(tmp_path / "s" / "notes")
    notes.recall(paths)
    before = hash_files(paths)
    assert len(read) == 5
    forget(monkeypatch)
    Path(paths[2]).write_bytes(b"y" * 9)
    os.utime(paths[2], (OLD, OLD))  # the size and this time stay; the time of the change of the file's state does not
    added = tmp_path / "added.png"
    added.write_bytes(b"z")
    read.clear()
    notes.recall([*paths, str(added)])
    assert sorted(read) == ["2.png", "added.png"]
    after = hash_files([*paths, str(added)])
    assert len(read) == 2  # none again
    assert [a == b for a, b in zip(before, after, strict=False)] == [True, True, False, True, True]
    forget(monkeypatch)
    read.clear()
    notes.recall([*paths, str(added)])
    assert hash_files([*paths, str(added)]) == after
    assert read == []


def test_identities_come_from_the_notes(paths, tmp_path, monkeypatch, read):
    no_sample(monkeypatch)
    images = FlatFolder("unlabeled", str(tmp_path))
    before = identify(images)
    FileNotes(tmp_path / "s" / "notes").recall(images.paths)
    forget(monkeypatch)
    read.clear()
    FileNotes(tmp_path / "s" / "notes").recall(images.paths)
    assert identify(images) == before
    assert read == []


@pytest.mark.parametrize(("files", "expected"), [(5, 5), (64, 64), (100, 64), (6500, 65), (9000, 70)])
def test_size_of_the_sample(files, expected, monkeypatch, tmp_path):
    """Of files that do not exist: what the system returns is replaced."""
    assert file_hashes._SAMPLE == (0.01, 64, 2000)
    monkeypatch.setattr(file_hashes, "_SAMPLE", (0.01, 64, 70))
    state = file_hashes.FileState(1, 2, 3, 4)
    monkeypatch.setattr(file_hashes, "_state_of", lambda path: state)
    hashed = []
    monkeypatch.setattr(file_hashes, "hash_files", lambda p, anew=False: [hashed.append(x) or "a" * 16 for x in p])
    notes = FileNotes(tmp_path / "notes")
    paths = [f"/{number}" for number in range(files)]
    noted = file_hashes._rows(paths, [state] * files)
    noted.sort(order="path")
    monkeypatch.setattr(notes, "_read", lambda: noted)
    notes.recall(paths)
    first = {*hashed}
    assert len(hashed) == len(first) == expected
    hashed.clear()
    notes.recall(paths)
    assert files == expected or {*hashed} != first  # another one in each fit


def test_a_hidden_change_in_the_sample_makes_all_files_read(paths, tmp_path, monkeypatch, read):
    notes = FileNotes(tmp_path / "notes")
    notes.recall(paths)
    rows = notes._read().copy()
    rows["content"] ^= 1  # as if all had been replaced in their exact state
    notes.file.write_bytes(file_hashes._checksum(rows.tobytes()) + rows.tobytes())
    forget(monkeypatch)
    monkeypatch.setattr(file_hashes, "_SAMPLE", (0, 1, 1))
    read.clear()
    with pytest.warns(UserWarning, match=r"has another content, but the same size and times .* all files are read"):
        notes.recall(paths)
    assert len(read) == 6  # one twice
    right = hash_files(paths)
    assert right == [letters(hashlib.blake2b(bytes([n]) * 9, digest_size=8).hexdigest()) for n in range(5)]
    forget(monkeypatch)
    no_sample(monkeypatch)
    notes.recall(paths)
    assert hash_files(paths) == right  # the notes are right again


def test_a_file_that_has_just_changed_is_not_noted(paths, tmp_path, monkeypatch, read):
    """A second change within the resolution of the system's times would not be seen."""
    monkeypatch.setattr(file_hashes, "_SETTLED", 2.0)
    os.utime(paths[0])
    notes = FileNotes(tmp_path / "notes")
    notes.recall(paths[:1])
    assert not notes.file.exists()


@pytest.mark.parametrize("damage", [b"", b"short", None, "flip"])
def test_damaged_notes_do_not_count(damage, paths, tmp_path, monkeypatch, read):
    no_sample(monkeypatch)
    notes = FileNotes(tmp_path / "notes")
    notes.recall(paths)
    before = hash_files(paths)
    data = bytearray(notes.file.read_bytes())
    data[60] ^= 4
    notes.file.write_bytes({None: data[:-1], "flip": data}.get(damage, damage))
    forget(monkeypatch)
    read.clear()
    notes.recall(paths)
    assert len(read) == 5
    assert hash_files(paths) == before
    forget(monkeypatch)
    read.clear()
    notes.recall(paths)
    assert read == []  # they are written again


def test_notes_of_several_data_sets(paths, tmp_path, monkeypatch, read):
    no_sample(monkeypatch)
    notes = FileNotes(tmp_path / "notes")
    notes.recall(paths[:2])
    notes.recall(paths[2:])
    forget(monkeypatch)
    read.clear()
    notes.recall(paths)
    assert read == []


def test_notes_that_cannot_be_written(paths, tmp_path):
    (tmp_path / "file").touch()
    FileNotes(tmp_path / "file" / "notes").recall(paths)  # a file is where the folder should be
    assert len({*hash_files(paths)}) == 5


def test_without_the_right_to_write(paths, tmp_path):
    FileNotes(tmp_path / "s" / "notes").recall(paths, write=False)
    assert not (tmp_path / "s").exists()
