"""What the tests of the short commands share."""

import zlib

import pytest
from PIL import Image


@pytest.fixture
def picture():
    """Writes a small picture of a colour, other for each path, and returns its path."""

    def make(path, size=(40, 36)):
        path.parent.mkdir(parents=True, exist_ok=True)
        number = zlib.crc32(str(path).encode())
        image = Image.new("RGB", size, (number % 256, 7 * number % 256, 13 * number % 256))
        image.putpixel((number % size[0], number % size[1]), (255, 255, 255))
        image.save(path)
        return path

    return make


@pytest.fixture
def class_folders(tmp_path, picture):
    """Writes class folders, and returns their folder."""

    def make(counts, name="photos"):
        for label, count in counts.items():
            (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture(tmp_path / name / label / f"{number}.png")
        return tmp_path / name

    return make
