import multiprocessing
import os
import pickle
import signal
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kd_lightning.cache import pictures
from kd_lightning.cache.pictures import PictureStore
from kd_lightning.errors import InputError

SHAPES = [(4, 5, 3), (1, 1, 3), (1, 5000, 3), (7, 3, 1), (5000, 1, 3)]
CONTENTS = [(number * 0x9E3779B97F4A7C15) % 2**64 for number in range(1, 41)]


def picture(content):
    shape = SHAPES[content % len(SHAPES)]
    return np.random.default_rng(content).integers(0, 256, shape, dtype=np.uint8)


def make(root, **parts):
    return PictureStore(root, {"side": "4"} | parts)


def numbers(contents):
    return np.array(contents, np.uint64)


def fill(store, contents=CONTENTS, decode=picture, **options):
    store.check_room(0)
    store.fill(store.missing(numbers(contents)).tolist(), decode, **options)
    return store


def check(store, contents=CONTENTS):
    assert len(store.missing(numbers(contents))) == 0
    table = store.table(numbers(contents))
    for number, content in enumerate(contents):
        np.testing.assert_array_equal(table.read(number), picture(content))


def refuse(content):
    raise AssertionError(f"{content} is decoded again")


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_pictures_of_any_shape_come_back(tmp_path):
    store = make(tmp_path)
    assert sorted(store.missing(numbers(CONTENTS + CONTENTS)).tolist()) == sorted(CONTENTS)  # each once
    check(fill(store))
    check(make(tmp_path))
    assert (len(make(tmp_path).missing(numbers([]))), len(make(tmp_path).table(numbers([])))) == (0, 0)


def test_only_what_is_absent_is_decoded(tmp_path):
    fill(make(tmp_path), CONTENTS[:30])
    decoded = []
    store = fill(make(tmp_path), decode=lambda content: decoded.append(content) or picture(content))
    assert sorted(decoded) == sorted(CONTENTS[30:])
    check(store)
    fill(make(tmp_path), decode=refuse)


def test_any_difference_makes_another(tmp_path):
    fill(make(tmp_path))
    assert len(make(tmp_path, loader="x").missing(numbers(CONTENTS))) == 40


def test_a_returned_picture_is_a_copy(tmp_path):
    store = fill(make(tmp_path))
    table = store.table(numbers(CONTENTS))
    table.read(0)[:] = 0
    np.testing.assert_array_equal(table.read(0), picture(CONTENTS[0]))


def test_a_table_is_mapped_anew_in_another_process(tmp_path):
    table = fill(make(tmp_path)).table(numbers(CONTENTS))
    table.read(3)
    again = pickle.loads(pickle.dumps(table))
    assert again._maps == {}
    np.testing.assert_array_equal(again.read(3), picture(CONTENTS[3]))


def test_several_threads(tmp_path):
    check(fill(make(tmp_path), threads=3))


def test_progress(tmp_path):
    absent = []
    fill(make(tmp_path), report=absent.append)
    assert absent == sorted(absent, reverse=True)
    assert absent[-1] == 0


@pytest.mark.parametrize("place", [0, 1234, -1])
def test_a_flipped_bit_of_a_picture_is_found_when_it_is_read(tmp_path, place):
    store = fill(make(tmp_path))
    (file,) = store.folder.glob("*.pixels")
    flip(file, place)
    table = make(tmp_path)
    table.refresh()
    table = table.table(numbers(CONTENTS))
    failed = []
    for number, content in enumerate(CONTENTS):
        try:
            np.testing.assert_array_equal(table.read(number), picture(content))
        except InputError as error:
            failed.append(str(error))
    assert len(failed) == 1
    assert "\n" not in failed[0]
    assert f"{file} is damaged: a picture does not match its checksum; delete this file" in failed[0]
    file.unlink()  # as the message states
    check(fill(make(tmp_path)))


def test_a_picture_in_anothers_place_is_found(tmp_path):
    one = {content: np.full((2, 2, 3), 7, np.uint8) for content in CONTENTS}  # equal pixels
    store = fill(make(tmp_path), decode=one.__getitem__)
    table = store.table(numbers(CONTENTS))
    table.places["offset"] = table.places["offset"][::-1]
    np.testing.assert_array_equal(table.read(0), one[CONTENTS[0]])  # equal pixels are as good
    table.places["content"] = table.places["content"][::-1]
    with pytest.raises(InputError, match="does not match its checksum"):
        table.read(0)


def test_a_picture_of_another_shape_is_found(tmp_path):
    table = fill(make(tmp_path)).table(numbers(CONTENTS))
    number = next(n for n, content in enumerate(CONTENTS) if picture(content).shape == (4, 5, 3))
    table.places["height"][number], table.places["width"][number] = 5, 4
    with pytest.raises(InputError, match="does not match its checksum"):
        table.read(number)


@pytest.mark.parametrize("ending", ["pixels", "records"])
@pytest.mark.parametrize("part", [0, 0.3, 0.999])
def test_a_truncated_file_is_completed_by_the_next_fit(tmp_path, ending, part):
    (file,) = fill(make(tmp_path)).folder.glob(f"*.{ending}")
    os.truncate(file, int(file.stat().st_size * part))
    store = make(tmp_path)
    assert 0 < len(store.missing(numbers(CONTENTS))) <= 40
    check(fill(store))


def test_a_file_that_is_truncated_while_it_is_mapped(tmp_path):
    """Reading beyond the end of a mapped file would end the process without a message."""
    store = fill(make(tmp_path))
    table = store.table(numbers(CONTENTS))
    table.read(0)
    (file,) = store.folder.glob("*.pixels")
    os.truncate(file, 0)
    with pytest.raises(InputError, match=r"is damaged: it is too short"):
        table.read(0)


def test_a_file_that_is_gone(tmp_path):
    store = fill(make(tmp_path))
    table = store.table(numbers(CONTENTS))
    (file,) = store.folder.glob("*.pixels")
    file.unlink()
    with pytest.raises(InputError, match="No such file"):
        table.read(0)
    assert len(make(tmp_path).missing(numbers(CONTENTS))) == 40


@pytest.mark.parametrize("place", [0, 9, 30, 43])
def test_a_damaged_record_counts_for_nothing(tmp_path, place):
    (file,) = fill(make(tmp_path)).folder.glob("*.records")
    flip(file, 44 * 3 + place)
    store = make(tmp_path)
    assert len(store.missing(numbers(CONTENTS))) == 1
    check(fill(store))


def test_a_record_that_is_being_written_is_read_when_it_is_whole(tmp_path):
    (file,) = fill(make(tmp_path)).folder.glob("*.records")
    data = file.read_bytes()
    file.write_bytes(data[: 44 * 5 + 20])
    store = make(tmp_path)
    assert len(store.refresh()) == 5
    file.write_bytes(data)
    assert len(store.refresh()) == 35
    check(store)


MANY = [(number * 0x9E3779B97F4A7C15) % 2**64 for number in range(1, 601)]


def fill_slowly(root, log, begin):
    """What a process does: fill the store, and write a line for each picture that it decodes."""
    pictures._HELD = 3
    begin.wait()
    with log.open("w", buffering=1) as file:

        def decode(content):
            time.sleep(0.001)
            file.write(f"{content}\n")
            return picture(content)

        fill(make(root), MANY, decode)


def start(root, log, begin=None):
    """Start a process, and return it when it decodes."""
    context = multiprocessing.get_context("fork")  # which imports nothing
    process = context.Process(target=fill_slowly, args=(root, log, begin or context.Barrier(1)))
    process.start()
    return process


def wait_for(log, lines=1):
    while not log.exists() or log.read_text().count("\n") < lines:
        time.sleep(0.002)


@pytest.mark.parametrize("lines", [1, 30, 200, 500])
def test_killed_at_any_time_and_completed(tmp_path, lines):
    process = start(tmp_path / "s", tmp_path / "log")
    wait_for(tmp_path / "log", lines)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    missing = make(tmp_path / "s").missing(numbers(MANY)).tolist()
    assert 0 < len(missing) <= 600
    check(fill(make(tmp_path / "s"), MANY), MANY)


def test_killed_while_it_writes(tmp_path, monkeypatch):
    """Pictures are on disk, and a part of a record."""
    store = make(tmp_path)
    store.check_room(0)
    writer = pictures._Writer(store.folder)
    for content in CONTENTS[:3]:
        writer.add(content, picture(content))
    record = b"".join(writer.records)[:70]
    writer.pixels.with_suffix(".records").write_bytes(record)
    assert len(make(tmp_path).missing(numbers(CONTENTS))) == 39
    check(fill(make(tmp_path)))


def test_processes_that_fill_at_once_decode_each_picture_once(tmp_path):
    begin = multiprocessing.get_context("fork").Barrier(2)
    processes = [start(tmp_path / "s", tmp_path / f"log{number}", begin) for number in range(2)]
    for process in processes:
        process.join()
    decoded = [[*map(int, (tmp_path / f"log{number}").read_text().split())] for number in range(2)]
    assert min(map(len, decoded)) > 100
    assert sorted(decoded[0] + decoded[1]) == sorted(MANY)
    store = make(tmp_path / "s")
    check(store, MANY)
    assert len([*store.folder.glob("*.records")]) == 2


def test_a_process_that_dies_lets_the_others_complete(tmp_path):
    begin = multiprocessing.get_context("fork").Barrier(2)
    first, second = (start(tmp_path / "s", tmp_path / f"log{number}", begin) for number in range(2))
    wait_for(tmp_path / "log0", 50)
    first.kill()
    first.join()
    second.join()
    assert second.exitcode == 0
    check(make(tmp_path / "s"), MANY)


def test_waiting_for_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_PATIENCE", 0.05)
    said = []
    monkeypatch.setattr(pictures, "rank_zero_info", said.append)
    other = make(tmp_path)
    other.check_room(0)
    (other.folder / "locks").mkdir()
    content = CONTENTS[0]
    lock = other._lock(content >> 56)
    lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: fill(make(tmp_path), [content], refuse))
        while not said:
            time.sleep(0.01)
        with pictures._Writer(other.folder) as writer:
            writer.add(content, picture(content))
        lock.release()
        check(waiting.result(), [content])
    assert said == [f"decoded: another process is decoding into {other.folder}; waiting for it"]


def test_a_picture_that_cannot_be_decoded(tmp_path):
    """Those that were decoded before stay in the store."""
    count = 0

    def decode(content):
        nonlocal count
        count += 1
        if count == 20:
            raise InputError("image x.png cannot be read")
        return picture(content)

    with pytest.raises(InputError, match=r"image x\.png cannot be read"):
        fill(make(tmp_path), decode=decode)
    assert len(make(tmp_path).missing(numbers(CONTENTS))) == 21
    check(fill(make(tmp_path)))


def test_records_are_written_while_a_share_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_PENDING", 1)
    monkeypatch.setattr(pictures, "_SHARES", 1)
    seen = []
    fill(make(tmp_path), decode=lambda content: seen.append(len(make(tmp_path).refresh())) or picture(content))
    assert max(seen) >= 24  # eight at a time


def test_no_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(2047))
    with pytest.raises(InputError, match=r"decoded: 2\.0 KiB of pictures do not fit .* 2\.0 KiB are free; set another"):
        make(tmp_path).check_room(2048)
    assert make(tmp_path).check_room(2047) == 2047


def test_a_disk_that_is_full_while_it_is_written(tmp_path, monkeypatch):
    store = make(tmp_path)

    def no_space(self, content, picture):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pictures._Writer, "add", no_space)
        with pytest.raises(
            InputError, match="decoded: .* cannot be used: .*No space left on device; set another folder"
        ):
            fill(store)
    check(fill(make(tmp_path)))  # its locks are free


@pytest.mark.parametrize("name", ["", "locks", "x.pixels", "locks/3"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    store = fill(make(tmp_path / "s"))
    target = tmp_path / "target"
    if name in ("", "locks"):
        (store.folder / name).rename(target)
    else:
        target.write_bytes(b"precious")
        (store.folder / name).unlink(missing_ok=True)
    (store.folder / name).symlink_to(target)
    check(make(tmp_path / "s"))  # it can be read
    for action in (lambda s: s.check_room(0), lambda s: s.fill([1], picture)):
        with pytest.raises(InputError, match="is a link, through which nothing is written"):
            action(make(tmp_path / "s"))
    assert target.is_dir() or target.read_bytes() == b"precious"


def test_the_folder_of_all_stores_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "s").symlink_to(tmp_path / "real")
    check(fill(make(tmp_path / "s")))


def test_a_complete_store_is_only_read(tmp_path):
    folder = fill(make(tmp_path)).folder
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    check(make(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="decoded: .*file.* cannot be used"):
        make(tmp_path / "file").check_room(0)
