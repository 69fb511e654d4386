"""Which sample a row means after files were renamed, replaced, deleted and added."""

import time

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning.data.identity import Identities
from kd_lightning.data.row_samples import RowName, RowSamples


class Files:
    """Images with paths."""

    def __init__(self, *paths):
        self.paths = list(paths)

    def __len__(self):
        return len(self.paths)


def content(letter):
    """A content by a letter; ``a2`` is the second equal one."""
    return "".join(chr(ord("a") + digit) for digit in divmod(ord(letter[0]), 16)) * 8 + (
        f"#{letter[1:]}" if letter[1:] else ""
    )


def data(*parts):
    """Each part is a dict of path and letter, below ``/new/train`` and ``/new/pool``."""
    roots = ("/new/train", "/new/pool")
    images = [Files(*(f"{root}/{name}" for name in part)) for root, part in zip(roots, parts, strict=False)]
    return RowSamples(images, [Identities([*part], [content(c) for c in part.values()]) for part in parts])


def find(samples, *rows):
    """Of rows (index, path, letter)."""
    found = samples.find([RowName(index, path, content(letter) if letter else "") for index, path, letter in rows])
    return found.samples, found.moved, found.changed, found.several


NOW = {"cats/0.png": "a", "cats/1.png": "b", "dogs/0.png": "c", "dogs/1.png": "d"}


@pytest.mark.parametrize("root", ["/new/train/", "", "/old/root/"])
def test_nothing_has_changed(root):
    rows = [(number, f"{root}{path}", letter) for number, (path, letter) in enumerate(NOW.items())]
    assert find(data(NOW), *rows) == ([0, 1, 2, 3], [], [], [])
    assert find(data(NOW), *((number, path, "") for number, path, _ in rows)) == ([0, 1, 2, 3], [], [], [])
    if root != "/old/root/":  # a path alone is compared as a whole
        assert find(data(NOW), *((None, path, "") for _, path, _ in rows)) == ([0, 1, 2, 3], [], [], [])


def test_a_row_of_another_folder_is_no_match():
    """Though index and file name fit."""
    for path in ("cats/0.png", "/old/cats/0.png", "cats\\0.png"):
        assert find(data(NOW | {"dogs/2.png": "e"}), (2, path, ""))[0] == [0]
        rest = {name: letter for name, letter in NOW.items() if name != "cats/0.png"}
        assert find(data(rest), (1, path, "")) == ([None], [], [], [])


def test_a_row_of_a_deleted_folder_is_no_match():
    """Though its path ends like that of an image: it is known that the folders above are the same."""
    assert find(data(NOW | {"x/y/0.png": "e"}), (0, "/new/train/more/cats/0.png", ""))[0] == [None]
    assert find(data(NOW), (0, "/old/train/cats/0.png", "x"))[0] == [None]  # the content is another, too


def test_deleted_and_added():
    now = {"cats/00.png": "x", "cats/1.png": "b", "dogs/0.png": "c", "dogs/1.png": "d"}
    for letters in (True, False):
        rows = [(n, path, letter if letters else "") for n, (path, letter) in enumerate(NOW.items())]
        assert find(data(now), *rows) == ([None, 1, 2, 3], [], [], [])
    del now["cats/00.png"]
    assert find(data(now), *rows) == ([None, 0, 1, 2], [1, 2, 3], [], [])


def test_renamed():
    now = {"cats/0.png": "b", "cats/7.png": "a", "dogs/0.png": "c"}
    rows = [(0, "cats/0.png", "a"), (1, "cats/1.png", "b"), (2, "dogs/0.png", "c")]
    assert find(data(now), *rows) == ([1, 0, 2], [0, 1], [], [])


def test_saved_anew():
    """All contents are others; paths are the same."""
    now = {path: letter.upper() for path, letter in NOW.items()}
    rows = [(number, path, letter) for number, (path, letter) in enumerate(NOW.items())]
    assert find(data(now), *rows) == ([0, 1, 2, 3], [], [0, 1, 2, 3], [])


def test_numbered_anew():
    """A deleted file's name is that of the next one: its label must not go there."""
    now = {"cats/0.png": "a", "dogs/0.png": "c", "dogs/1.png": "e"}  # cats/1.png and dogs/1.png were deleted
    rows = [(1, "cats/1.png", "b"), (2, "dogs/1.png", "d"), (3, "dogs/2.png", "e")]
    assert find(data(now), *rows) == ([None, None, 2], [2], [], [])


def test_equal_contents():
    """Path decides; each sample is found once."""
    now = {"cats/0.png": "a", "cats/1.png": "a2", "dogs/0.png": "a3"}
    rows = [(0, "cats/0.png", "a"), (1, "cats/1.png", "a2"), (2, "dogs/0.png", "a3")]
    assert find(data(now), *rows)[0] == [0, 1, 2]
    assert find(data(now), *reversed(rows))[0] == [2, 1, 0]
    assert find(data({"cats/1.png": "a", "dogs/0.png": "a2"}), *rows)[0] == [None, 0, 1]
    assert find(data({"cats/9.png": "a", "dogs/0.png": "a2"}), *rows)[0] == [0, None, 1]


def test_two_parts():
    """Each counts its equal contents by itself."""
    train, pool = {"0.png": "a", "1.png": "b"}, {"0.png": "a", "2.png": "c"}
    samples = data(train, pool)
    for number, (root, path, letter) in enumerate(
        [("train", "0.png", "a"), ("train", "1.png", "b"), ("pool", "0.png", "a"), ("pool", "2.png", "c")]
    ):
        assert find(samples, (number, f"/new/{root}/{path}", letter))[0] == [number]
        assert find(samples, (number, path, letter))[0] == [number]
        assert find(samples, (None, f"{root}/{path}", ""))[0] == [number]
    assert find(samples, (None, "0.png", "")) == ([None], [], [], [0])
    # a row of the training part is no image of the pool, which has its index and name now
    assert find(data({"cats/0.png": "a"}, pool), (1, "/old/train/cats/2.png", ""))[0] == [None]


@pytest.mark.parametrize("name", ["cafe\u0301/\u00fc.png", "caf\u00e9/u\u0308.png", "caf\u00e9\\\u00fc.png"])
def test_unicode_and_backslashes(name):
    for mine in ("cafe\u0301/u\u0308.png", "caf\u00e9/\u00fc.png"):
        samples = RowSamples([Files("/new/x/0.png", f"/new/{mine}")])
        assert find(samples, (None, name, ""))[0] == [1]
        assert find(samples, (1, f"C:\\old\\{name}", ""))[0] == [1]


class TestWithoutFiles:
    VALUES = torch.arange(6.0).reshape(6, 1)

    def rows(self):
        names = RowSamples([TensorDataset(self.VALUES)])._contents
        return [RowName(number, "", name) for number, name in enumerate(names)]

    def test_other_order(self):
        order = torch.tensor([3, 0, 5, 1, 2])
        found = RowSamples([TensorDataset(self.VALUES[order])]).find(self.rows())
        assert found.samples == [1, 3, 4, 0, None, 2]

    def test_equal_values(self):
        samples = RowSamples([TensorDataset(torch.zeros(4, 1))])
        rows = [RowName(number, "", name) for number, name in enumerate(samples._contents)]
        assert samples.find(rows).samples == [0, 1, 2, 3]
        assert samples.find([RowName(number + 1, "", row.content) for number, row in enumerate(rows)]).samples == [
            0,
            1,
            2,
            3,
        ]

    def test_index_alone(self):
        samples = RowSamples([TensorDataset(self.VALUES)])
        assert samples.find([RowName(2), RowName(9), RowName(3, "", "a text")]).samples == [2, None, 3]
        assert samples.find([RowName(2, "", content("z"))]).samples == [None]  # no value has this hash

    def test_contents_are_read_for_rows_that_have_one(self, monkeypatch):
        monkeypatch.setattr("kd_lightning.data.row_samples.identify", None)
        assert RowSamples([Files("/x/a.png", "/x/b.png")]).find([RowName(None, "b.png")]).samples == [1]


def test_many_copies_are_quick():
    """20,000 renamed files of one content, such as blank pictures."""
    names = [f"c{number % 10}/{number}.png" for number in range(20_000)]
    samples = data(dict.fromkeys(names, "a"))
    start = time.process_time()
    found = find(samples, *((None, f"/old/{name}x", "a") for name in names))[0]
    assert time.process_time() - start < 5
    assert sorted(found) == [*range(20_000)]


def test_rows_of_one_name_mean_one_sample():
    assert find(data(NOW), (1, "cats/1.png", "b"), (1, "cats/1.png", "b"), (None, "cats/1.png", ""))[0] == [1, 1, 1]


def test_a_renamed_file_whose_copy_is_elsewhere():
    """A row of dogs/0.png follows it, and does not go to the copy in cats."""
    now = {"cats/0.png": "a", "dogs/9.png": "a2"}
    for path in ("dogs/0.png", "/new/train/dogs/0.png", "/old/dogs/0.png"):
        assert find(data(now), (1, path, "a2"))[0] == [1]
        assert find(data(now), (1, path, "a"))[0] == [1]
    assert find(data(now), (0, "cats/7.png", "a"))[0] == [0]
    assert find(data({"cats/0.png": "a"}, {"9.png": "a"}), (1, "/new/pool/1.png", "a"))[0] == [1]
