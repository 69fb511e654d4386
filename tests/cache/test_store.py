import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import numpy as np
import pytest

from kd_lightning.cache.store import OutputCache, format_size
from kd_lightning.errors import InputError

ROWS, BYTES, CHUNK = 50, 12, 8
PARTS = {"teacher": "a", "seed": "0"}
TABLE = np.random.default_rng(0).integers(0, 256, (ROWS, BYTES), dtype=np.uint8)


def make(root, rows=ROWS, row_bytes=BYTES, chunk=CHUNK, **parts):
    return OutputCache(root, "Net", PARTS | parts, rows, row_bytes, chunk=chunk)


def fill(cache, table=TABLE):
    for number in cache.absent():
        cache.write(number, table[cache.rows_of(number)])
    return cache


def test_rows_come_back_in_any_order(tmp_path):
    cache = make(tmp_path)
    assert cache.absent() == [0, 1, 2, 3, 4, 5, 6]
    assert (cache.chunks, cache.size) == (7, ROWS * BYTES)
    numbers = np.array([49, 0, 7, 8, 0])
    np.testing.assert_array_equal(fill(cache).read(numbers), TABLE[numbers])
    assert cache.absent() == []
    np.testing.assert_array_equal(make(tmp_path).read(numbers), TABLE[numbers])


def test_a_later_run_fills_what_is_absent(tmp_path):
    cache = make(tmp_path)
    cache.write(6, TABLE[48:])
    cache.write(1, TABLE[8:16])
    later = make(tmp_path, chunk=5)  # the table has its own chunk size
    assert later.chunk == CHUNK
    assert later.absent() == [0, 2, 3, 4, 5]
    np.testing.assert_array_equal(fill(later).read(np.arange(ROWS)), TABLE)


@pytest.mark.parametrize("other", [{"teacher": "b"}, {"more": "x"}, {"rows": 49}, {"row_bytes": 13}])
def test_any_difference_makes_another(tmp_path, other):
    fill(make(tmp_path))
    another = make(tmp_path, **other)
    assert len(another.absent()) == another.chunks


def test_difference_from_the_most_similar_cache(tmp_path):
    cache = make(tmp_path)
    assert cache.difference() == ""
    make(tmp_path, teacher="c", seed="1", views="3")
    assert cache.difference() == "seed, teacher, views"
    make(tmp_path, seed="1")
    assert cache.difference() == "seed"
    OutputCache(tmp_path, "Other", PARTS, ROWS, BYTES, chunk=CHUNK)
    assert cache.difference() == "seed"


@pytest.mark.parametrize("place", [0, 8 * BYTES, ROWS * BYTES - 1])
def test_a_flipped_bit_is_found(tmp_path, place):
    cache = fill(make(tmp_path))
    assert cache.damaged(range(7)) == []
    data = bytearray((cache.folder / "outputs").read_bytes())
    data[place] ^= 4
    (cache.folder / "outputs").write_bytes(data)
    again = make(tmp_path)
    assert again.damaged(range(7)) == [place // (CHUNK * BYTES)]
    again.drop(again.damaged(range(7)))
    np.testing.assert_array_equal(fill(again).read(np.arange(ROWS)), TABLE)


def test_a_chunk_in_anothers_place_is_found(tmp_path):
    cache = make(tmp_path)
    same = np.ones((ROWS, BYTES), np.uint8)  # two chunks of one content
    fill(cache, same)
    records = bytearray((cache.folder / "chunks").read_bytes())
    records[:16], records[16:32] = records[16:32], records[:16]
    (cache.folder / "chunks").write_bytes(records)
    assert cache.damaged(range(7)) == [0, 1]


@pytest.mark.parametrize("size", [0, 1, 20 * BYTES + 3])
def test_truncated_rows_are_found(tmp_path, size):
    cache = fill(make(tmp_path))
    os.truncate(cache.folder / "outputs", size)
    again = make(tmp_path)
    damaged = again.damaged(range(7))
    assert damaged == list(range(size // (CHUNK * BYTES), 7))
    again.drop(damaged)
    np.testing.assert_array_equal(fill(again).read(np.arange(ROWS)), TABLE)


@pytest.mark.parametrize("size", [0, 40, 1000])
def test_checksums_of_another_length_are_made_right(tmp_path, size):
    cache = fill(make(tmp_path))
    os.truncate(cache.folder / "chunks", size)
    again = make(tmp_path)
    again.drop(again.damaged(range(7)))
    assert set(again.absent()) == set(range(size // 16, 7)) if size < 112 else again.absent() == []
    np.testing.assert_array_equal(fill(again).read(np.arange(ROWS)), TABLE)


BROKEN = ["{", "", "null", "[]", "3", '{"parts": null, "chunk": 8}', '{"chunk": 0}', '{"chunk": [1]}', "\xff"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_damaged_header(tmp_path, text):
    folder = fill(make(tmp_path)).folder
    (folder / "cache.json").write_bytes(text.encode("latin-1"))
    other = make(tmp_path, seed="1")
    assert other.difference() == ""  # a damaged neighbour's does not matter
    with pytest.warns(UserWarning, match=r"cache\.json is damaged, so the whole cache is computed again"):
        again = make(tmp_path, chunk=5)
    assert len(again.absent()) == 10
    np.testing.assert_array_equal(fill(again).read(np.arange(ROWS)), TABLE)
    assert make(tmp_path).absent() == []


def test_a_whole_one_is_only_read(tmp_path):
    """It may lie where nobody can write, and somebody may hold its lock."""
    folder = fill(make(tmp_path)).folder
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.name != "lock"}
    with make(tmp_path).lock():
        again = make(tmp_path)
    assert (again.absent(), again.damaged(range(7))) == ([], [])
    np.testing.assert_array_equal(again.read(np.arange(ROWS)), TABLE)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cache: .*file.* cannot be used"):
        make(tmp_path / "file")


def test_no_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(ROWS * BYTES - 1))
    cache = make(tmp_path)
    cache.check_room(ROWS - 1)
    with pytest.raises(InputError, match=f"600 bytes of outputs do not fit into {tmp_path}, where 599 bytes are free"):
        cache.check_room(ROWS)


@pytest.mark.slow
def test_a_full_disk_leaves_the_chunk_absent(tmp_path):
    script = f"""
        import resource
        import numpy as np
        from pathlib import Path
        from kd_lightning.errors import InputError
        from kd_lightning.cache.store import OutputCache
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        cache = OutputCache(Path({str(tmp_path)!r}), "Net", {PARTS!r}, 50, 12, chunk=8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, -1))
        cache.write(0, np.ones((8, 12), np.uint8))
        for number in (1, 2, 5):
            try:
                cache.write(number, np.ones((8, 12), np.uint8))
            except InputError as error:
                print(number, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line[:8] for line in done] == ["2 cache:", "5 cache:"]
    assert "cannot be written" in done[0]
    cache = make(tmp_path)
    assert cache.absent() == [2, 3, 4, 5, 6]
    assert cache.damaged(range(7)) == []


def test_a_chunk_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="chunk 6 has 24 bytes, got 96"):
        make(tmp_path).write(6, TABLE[:8])


def test_killed_while_filling(tmp_path):
    """At 10 random moments or more, until something stands; then the table is the undisturbed one."""
    moments = random.Random(0)
    table = np.random.default_rng(1).integers(0, 256, (20000, 40), dtype=np.uint8)
    reached = []
    while len(reached) < 10 or not reached[-1]:  # beside other processes, a child may not begin within 30 ms
        child = os.fork()
        if not child:
            fill(make(tmp_path, rows=20000, row_bytes=40, chunk=40), table)
            os._exit(0)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cache = make(tmp_path, rows=20000, row_bytes=40, chunk=40)
        reached.append(500 - len(cache.absent()))
        assert cache.damaged(range(500)) == []
        assert len(reached) < 300, "no child has stored anything"
    assert reached == sorted(reached)
    np.testing.assert_array_equal(fill(cache, table).read(np.arange(20000)), table)


@pytest.mark.parametrize(("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (5 * 2**40, "5.0 TiB")])
def test_format_size(size, text):
    assert format_size(size) == text


NAMES = ["outputs", "chunks", "cache.json", "cache.new", "lock", "too_large"]


def refusing(action):
    with pytest.raises(InputError, match="cache: .* is a link, through which nothing is written") as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [ROWS * BYTES, 7 * 16, 3])
@pytest.mark.parametrize("is_new", [True, False])
def test_nothing_is_written_through_a_link(tmp_path, name, size, is_new):
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(size))
    before = victim.stat()
    cache = make(tmp_path / "cache")
    if is_new:
        for file in cache.folder.iterdir():
            file.unlink()
    else:
        cache.write(2, TABLE[16:24])
        (cache.folder / name).unlink(missing_ok=True)
    (cache.folder / name).symlink_to(victim)
    for action in (
        lambda: fill(make(tmp_path / "cache")),
        lambda: cache.write(0, TABLE[:8]),
        lambda: cache.drop([0]),
        cache.lock,
        cache.mark_too_large,
    ):
        assert str(cache.folder / name) in refusing(action)
    after = victim.stat()
    assert (victim.read_bytes(), after.st_mtime_ns, after.st_ino) == (bytes(size), before.st_mtime_ns, before.st_ino)


def test_a_link_to_nowhere_makes_no_file(tmp_path):
    cache = make(tmp_path)
    for name in NAMES:
        (cache.folder / name).unlink(missing_ok=True)
        (cache.folder / name).symlink_to(tmp_path / "victim")
        refusing(lambda: make(tmp_path))
        (cache.folder / name).unlink()
        assert not (tmp_path / "victim").exists()


def test_a_folder_that_is_a_link(tmp_path):
    (tmp_path / "victim").mkdir()
    folder = make(tmp_path / "cache").folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.symlink_to(tmp_path / "victim")
    assert str(folder) in refusing(lambda: make(tmp_path / "cache"))
    assert not [*(tmp_path / "victim").iterdir()]


def test_the_folder_of_all_caches_may_be_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "big")
    fill(make(tmp_path / "cache"))
    np.testing.assert_array_equal(make(tmp_path / "cache").read(np.arange(ROWS)), TABLE)


def test_a_whole_one_with_links_in_it_is_read(tmp_path):
    folder = fill(make(tmp_path / "cache")).folder
    for name in ("outputs", "chunks", "cache.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    np.testing.assert_array_equal(make(tmp_path / "cache").read(np.arange(ROWS)), TABLE)


def test_a_copy_maps_the_file_itself(tmp_path):
    """A worker process gets a copy."""
    cache = fill(make(tmp_path))
    cache.read(np.arange(3))
    sent = pickle.dumps(cache)
    assert len(sent) < 1500
    np.testing.assert_array_equal(pickle.loads(sent).read(np.arange(3)), TABLE[:3])


@pytest.mark.parametrize("is_short", [False, True])
def test_rows_that_are_gone(tmp_path, is_short):
    cache = fill(make(tmp_path))
    os.truncate(cache.folder / "outputs", 5) if is_short else (cache.folder / "outputs").unlink()
    with pytest.raises(InputError, match="cannot be read: .*; start a new fit"):
        cache.read(np.arange(3))


def test_values_that_are_too_large_are_noted(tmp_path):
    assert not make(tmp_path).too_large
    make(tmp_path).mark_too_large()
    make(tmp_path).mark_too_large()
    assert make(tmp_path).too_large
