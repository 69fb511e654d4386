"""The loader against files written byte by byte, and against PIL where it is right."""

import io
import struct
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from kd_lightning import InputError
from kd_lightning.data.sources import image_loader
from kd_lightning.data.sources.image_loader import decode_image, load_image

RANDOM = np.random.default_rng(0)
COLORS = RANDOM.integers(0, 256, (6, 9, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(image_loader, "_warned", set())
    monkeypatch.setattr(image_loader, "_ranges", {})


def write_tiff(path, values, order="<", bits=None, photometric=1, orientation=1, size=None):
    """A TIFF of one grey channel, without compression."""
    height, width = size or values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    short, long = 3, 4
    tags = [
        (256, long, width),
        (257, long, height),
        (258, short, bits or values.dtype.itemsize * 8),
        (259, short, 1),
        (262, short, photometric),
        (273, long, 8 + 2 + 12 * 11 + 4),
        (274, short, orientation),
        (277, short, 1),
        (278, long, height),
        (279, long, len(data)),
        (339, short, kind),
    ]
    content = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, size_, value in tags:
        packed = struct.pack(order + "HH", value, 0) if size_ == short else struct.pack(order + "I", value)
        content += struct.pack(order + "HHI", tag, size_, 1) + packed
    path.write_bytes(content + bytes(4) + data)


def write_png(path, values, bits, exif=None):
    """A PNG of one grey channel."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    chunks += chunk(b"eXIf", exif) if exif else b""  # after the pixels
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b""))


def decoded(path):
    """The pixels of ``decode_image`` as an array (H, W, 3)."""
    pixels = decode_image(path)
    assert pixels.dtype == torch.uint8
    values = pixels.permute(1, 2, 0)
    assert values.is_contiguous()
    values += 0  # they can be written to, without a warning
    return values.numpy()


def grey(path):
    """The grey values of a picture, whose channels must be equal."""
    image = load_image(path)
    assert image.mode == "RGB"
    values = np.asarray(image)
    assert (decoded(path) == values).all()
    assert (values == values[..., :1]).all()
    return values[..., 0]


def linear(values, low, high):
    """Values scaled from a range to 0 ... 255, in float64."""
    return (values.astype(np.float64) - low) / (high - low) * 255


@pytest.mark.filterwarnings("ignore:.*have no usual range")
class TestGreysOfManyBits:
    FULL = np.array([[0, 1, 255, 256, 257], [4095, 32767, 32768, 65279, 65535]], np.uint16)

    def check(self, path, values, low, high):
        found = grey(path)
        assert np.abs(found - linear(values, low, high)).max() < 1
        assert found.flat[values.argmin()] == 0
        assert found.flat[values.argmax()] == 255

    def test_png_of_16_bits(self, tmp_path):
        write_png(path := tmp_path / "a.png", self.FULL, 16)
        self.check(path, self.FULL, 0, 65535)

    def test_eight_bits_stored_in_16_return(self, tmp_path):
        values = np.arange(256).reshape(16, 16).astype(np.uint16)
        for name, factor in {"repeated": 257, "shifted": 256}.items():
            write_png(path := tmp_path / f"{name}.png", values * factor, 16)
            assert (grey(path) == values).all()

    def test_16_bits_look_alike_in_each_format(self, tmp_path):
        values = RANDOM.integers(0, 65536, (6, 9)).astype(np.uint16)
        write_png(tmp_path / "a.png", values, 16)
        write_tiff(tmp_path / "b.tif", values)
        write_tiff(tmp_path / "c.tif", values, ">")
        write_tiff(tmp_path / "d.tif", (values.astype(int) - 32768).astype(np.int16))
        write_tiff(tmp_path / "e.tif", (values.astype(int) - 32768).astype(np.int16), ">")
        write_tiff(tmp_path / "f.tif", values.astype(np.uint32))
        write_tiff(tmp_path / "g.tif", values.astype(np.int32), ">")
        write_tiff(tmp_path / "h.tif", values.astype(np.uint32) * 65537)
        Image.fromarray(values).save(tmp_path / "i.tif", compression="tiff_lzw")
        write_tiff(tmp_path / "j.tif", 65535 - values, photometric=0)  # 0 is white
        (tmp_path / "k.pgm").write_bytes(b"P5 9 6 65535\n" + values.astype(">u2").tobytes())
        Image.fromarray(np.repeat(values[..., None] >> 8, 3, 2).astype(np.uint8)).save(tmp_path / "l.png")
        for path in sorted(tmp_path.iterdir()):
            assert (grey(path) == values >> 8).all(), path.name

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_signed_16_bits_have_one_range(self, tmp_path, order):
        values = np.array([[-32768, -1, 0], [1, 1000, 32767]], np.int16)
        write_tiff(path := tmp_path / "a.tif", values, order)
        self.check(path, values, -32768, 32767)
        write_tiff(path, np.array([[0, 32767]], np.int16), order)  # the same, whatever else the picture holds
        assert grey(path).tolist() == [[128, 255]]

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_signed_8_bits(self, tmp_path, order):
        values = np.array([[-128, -1, 0], [1, 100, 127]], np.int8)
        write_tiff(path := tmp_path / "a.tif", values, order)
        self.check(path, values, -128, 127)

    def test_tiff_of_12_bits(self, tmp_path):
        packed = np.array([[0x00, 0x00, 0x10, 0xFF, 0xF8, 0x00]], np.uint8)  # 0, 16, 4095, 2048
        write_tiff(path := tmp_path / "a.tif", packed, bits=12, size=(1, 4))
        assert grey(path).tolist() == [[0, 1, 255, 128]]

    def test_pgm_of_12_bits(self, tmp_path):
        (tmp_path / "a.pgm").write_bytes(b"P5 4 1 4095\n" + np.array([0, 16, 4095, 2048], ">u2").tobytes())
        assert grey(tmp_path / "a.pgm").tolist() == [[0, 1, 255, 128]]

    @pytest.mark.parametrize(
        ("values", "low", "high"),
        [
            (np.array([[0, 100, 255]], np.int32), 0, 255),
            (np.array([[0, 256, 65535]], np.int32), 0, 65535),
            (np.array([[-32768, 0, 32767]], np.int32), -32768, 32767),
            (np.array([[0, 2**30, 2**31 - 1]], np.int32), 0, 2**31 - 1),
            (np.array([[-(2**31), 0, 2**31 - 1]], np.int32), -(2**31), 2**31 - 1),
            (np.array([[0, 100, 255]], np.uint32), 0, 255),
            (np.array([[0, 2**31, 2**32 - 1]], np.uint32), 0, 2**32 - 1),  # PIL reads negative values
        ],
    )
    def test_32_bits(self, tmp_path, values, low, high):
        write_tiff(path := tmp_path / "a.tif", values)
        self.check(path, values, low, high)

    def test_unsigned_without_its_tag(self, tmp_path):
        values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
        write_tiff(path := tmp_path / "a.tif", values)
        content = path.read_bytes()
        place = content.index(struct.pack("<HHI", 339, 3, 1))
        path.write_bytes(content[:place] + struct.pack("<H", 60000) + content[place + 2 :])  # an unknown tag
        self.check(path, values, 0, 2**32 - 1)

    @pytest.mark.parametrize(
        ("values", "low", "high"),
        [
            ([0, 0.2, 1], 0, 1),
            ([-1, 0.2, 1], -1, 1),
            ([-0.5, 0.2, 1], -1, 1),
            ([0, 77.4, 255], 0, 255),
            ([0, 300, 65535], 0, 65535),
            ([-1000, 0, 3000], -1000, 3000),
            ([-2, 0.5, 3], -2, 3),
            ([1e6, 2e6, 1e38], 1e6, 1e38),
        ],
    )
    def test_floats(self, tmp_path, values, low, high):
        values = np.array([values], np.float32)
        write_tiff(path := tmp_path / "a.tif", values, ">")
        assert np.abs(grey(path) - linear(values, low, high).clip(0, 255)).max() <= 0.5 + 1e-3

    def test_floats_of_8_bits_return(self, tmp_path):
        values = np.arange(256).reshape(16, 16)
        for name, factor in {"one": 1 / 255, "bytes": 1, "many": 257}.items():
            write_tiff(path := tmp_path / f"{name}.tif", (values * factor).astype(np.float32))
            assert (grey(path) == values).all()

    def test_floats_beyond_the_range_by_a_little_are_clipped(self, tmp_path):
        write_tiff(path := tmp_path / "a.tif", np.array([[-0.05, 0, 0.5, 1, 1.05]], np.float32))
        assert grey(path).tolist() == [[0, 0, 128, 255, 255]]

    def test_floats_that_are_no_numbers(self, tmp_path):
        write_tiff(path := tmp_path / "a.tif", np.array([[np.nan, -np.inf, np.inf, 0.4]], np.float32))
        assert grey(path).tolist() == [[0, 0, 255, 102]]
        write_tiff(path, np.full((2, 2), np.nan, np.float32))
        assert grey(path).tolist() == [[0, 0], [0, 0]]
        write_tiff(path, np.full((2, 2), -5.0, np.float32))
        assert grey(path).tolist() == [[0, 0], [0, 0]]

    def test_poor_contrast_is_reported_once(self, tmp_path):
        write_png(dark := tmp_path / "dark.png", np.array([[0, 4000]], np.uint16), 16)  # 12 bits
        write_png(black := tmp_path / "black.png", np.zeros((2, 2), np.uint16), 16)
        write_tiff(strange := tmp_path / "strange.tif", np.array([[-7, 300]], np.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_image(black)
        with pytest.warns(UserWarning, match=r"dark.png: its values 0 ... 4000 fill less than 1/16.*loader"):
            load_image(dark)
        with pytest.warns(UserWarning, match=r"strange.tif: its values -7 ... 300 .*loader"):
            load_image(strange)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_image(dark), load_image(strange)

    @pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float32])
    def test_pictures_of_different_ranges_are_reported_once(self, tmp_path, dtype):
        write_tiff(bright := tmp_path / "bright.tif", np.array([[0, 60000]], dtype))
        write_tiff(dark := tmp_path / "dark.tif", np.array([[0, 200]], dtype))
        write_tiff(black := tmp_path / "black.tif", np.array([[0, 0]], dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_image(black), load_image(bright), load_image(black), load_image(bright)
        with pytest.warns(UserWarning, match=r"dark.tif .*0 ... 255,.*0 ... 200,.*bright.tif .*0 ... 65535;.*loader"):
            load_image(dark)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_image(dark), load_image(bright)


class TestAsPILConverts:
    def save(self, folder):
        image = Image.fromarray(COLORS)
        palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
        alpha = image.copy()
        alpha.putalpha(Image.fromarray(COLORS[..., 0]))
        image.save(folder / "rgb.png")
        image.save(folder / "rgb.jpg")
        image.save(folder / "rgb.bmp")
        image.save(folder / "rgb.ppm")
        image.save(folder / "rgb.webp")
        alpha.save(folder / "rgba.png")
        alpha.save(folder / "rgba.webp")
        alpha.save(folder / "rgba.tif")
        alpha.convert("LA").save(folder / "la.png")
        image.convert("L").save(folder / "l.png")
        image.convert("L").save(folder / "l.jpg")
        image.convert("1").save(folder / "1.png")
        image.convert("1").save(folder / "1.tif")
        palette.save(folder / "p.png")
        palette.save(folder / "p.gif")
        palette.save(folder / "one transparent.png", transparency=2)
        palette.save(folder / "many transparent.png", transparency=bytes([0, 100, 255]))
        image.save(folder / "rgb transparent.png", transparency=tuple(COLORS[0, 0].tolist()))
        image.convert("CMYK").save(folder / "cmyk.jpg")
        image.convert("CMYK").save(folder / "cmyk.tif")
        image.convert("YCbCr").save(folder / "ycbcr.tif")
        write_png(folder / "grey.png", COLORS[..., 0], 8)

    @pytest.mark.filterwarnings("ignore:Palette images with Transparency")
    def test_to_the_bit(self, tmp_path):
        self.save(tmp_path)
        modes = set()
        for path in sorted(tmp_path.iterdir()):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = load_image(path)
                assert (decoded(path) == np.asarray(found)).all(), path.name
            with Image.open(path) as image:
                modes.add(image.mode)
                assert (np.asarray(image.convert("RGB")) == np.asarray(found)).all(), path.name
            assert found.mode == "RGB"
        assert modes >= {"RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr"}


UPRIGHT = {  # by EXIF orientation: from the stored rows to the picture
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


class TestOrientation:
    @pytest.mark.parametrize("orientation", UPRIGHT)
    def test_each(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[274] = orientation
        image = Image.fromarray(COLORS)
        image.save(tmp_path / "a.png", exif=exif)
        image.save(tmp_path / "a.tif", exif=exif)
        image.save(tmp_path / "a.webp", exif=exif, lossless=True)
        image.save(tmp_path / "a.jpg", exif=exif)
        for path in sorted(tmp_path.iterdir()):
            stored = COLORS if path.suffix != ".jpg" else np.asarray(Image.open(path).convert("RGB"))
            assert (np.asarray(load_image(path)) == UPRIGHT[orientation](stored)).all(), path.suffix
            assert (decoded(path) == UPRIGHT[orientation](stored)).all(), path.suffix

    @pytest.mark.parametrize("orientation", UPRIGHT)
    def test_in_xmp(self, tmp_path, orientation):
        xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
        Image.fromarray(COLORS).save(path := tmp_path / "a.jpg", xmp=xmp)
        with Image.open(path) as image:
            stored = np.asarray(image.convert("RGB"))
        assert (np.asarray(load_image(path)) == UPRIGHT[orientation](stored)).all()
        assert (decoded(path) == UPRIGHT[orientation](stored)).all()

    @pytest.mark.parametrize("orientation", UPRIGHT)
    def test_of_many_bits(self, tmp_path, orientation):
        values = RANDOM.integers(0, 65536, (4, 7)).astype(np.uint16)
        exif = Image.Exif()
        exif[274] = orientation
        write_png(tmp_path / "a.png", values, 16, exif.tobytes()[6:])
        write_tiff(tmp_path / "b.tif", values, "<", orientation=orientation)
        write_tiff(tmp_path / "c.tif", values, ">", orientation=orientation)
        for path in sorted(tmp_path.iterdir()):
            assert (grey(path) == UPRIGHT[orientation](values >> 8)).all(), path.name

    @pytest.mark.parametrize(
        "exif", [b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff"]
    )
    def test_damaged_exif_is_no_error(self, tmp_path, exif):
        Image.fromarray(COLORS).save(path := tmp_path / "a.jpg", exif=exif)
        with Image.open(path) as image:
            assert (np.asarray(load_image(path)) == np.asarray(image.convert("RGB"))).all()
        assert (decoded(path) == np.asarray(load_image(path))).all()

    def test_unknown_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[274] = 9
        Image.fromarray(COLORS).save(path := tmp_path / "a.png", exif=exif)
        assert (np.asarray(load_image(path)) == COLORS).all()


def as_jpeg(values, **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", **options)
    return file.getvalue()


def outcome(load, path):
    """The pixels of a file (H, W, 3), or the message of its error."""
    try:
        return load(path)
    except InputError as error:
        return str(error)


def same(a, b):
    return type(a) is type(b) and (a == b if isinstance(a, str) else a.shape == b.shape and (a == b).all())


@pytest.fixture
def by_torchvision(monkeypatch):
    """A list to which each call of torchvision's decoder adds whether it succeeded."""
    found = []
    decode = image_loader._decode_jpeg

    def remember(content, image):
        pixels = decode(content, image)
        found.append(pixels is not None)
        return pixels

    monkeypatch.setattr(image_loader, "_decode_jpeg", remember)
    return found


class TestDecodeJpeg:
    PICTURE = np.kron(RANDOM.integers(0, 256, (12, 11, 3)), np.ones((5, 4, 1))).astype(np.uint8)
    NOISE = RANDOM.integers(0, 256, (32, 32, 3)).astype(np.uint8)

    def check(self, path, content, by_torchvision, most=0):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = decoded(path)
        assert by_torchvision.pop() is True
        assert np.abs(found.astype(int) - np.asarray(load_image(path))).max() <= most

    @pytest.mark.parametrize("subsampling", [0, 1, 2])
    @pytest.mark.parametrize("quality", [20, 75, 100])
    def test_colors(self, tmp_path, by_torchvision, quality, subsampling):
        for values in (self.PICTURE, self.NOISE, self.NOISE[:9, :17], self.NOISE[:1, :1]):
            content = as_jpeg(values, quality=quality, subsampling=subsampling)
            self.check(tmp_path / "a.jpg", content, by_torchvision)

    @pytest.mark.parametrize("options", [{"progressive": True}, {"keep_rgb": True}, {"restart_marker_blocks": 2}])
    def test_other_encodings(self, tmp_path, by_torchvision, options):
        self.check(tmp_path / "a.jpg", as_jpeg(self.PICTURE, **options), by_torchvision)

    @pytest.mark.parametrize(("subsampling", "factors", "most"), [(1, 0x12, 2), (2, 0x41, 0)])
    def test_rare_subsampling(self, tmp_path, by_torchvision, subsampling, factors, most):
        """4:4:0 and 4:1:1; libjpeg-turbo before 2.1 rounds 4:4:0 otherwise."""
        content = bytearray(as_jpeg(self.NOISE, subsampling=subsampling))
        content[content.index(b"\xff\xc0") + 11] = factors
        self.check(tmp_path / "a.jpg", bytes(content), by_torchvision, most)

    def test_grey(self, tmp_path, by_torchvision):
        self.check(tmp_path / "a.jpg", as_jpeg(self.PICTURE[..., 0]), by_torchvision)

    def test_bytes_behind_the_end(self, tmp_path, by_torchvision):
        self.check(tmp_path / "a.jpg", as_jpeg(self.PICTURE) + bytes(1000), by_torchvision)

    def test_first_of_several_pictures(self, tmp_path, by_torchvision):
        file = io.BytesIO()
        Image.fromarray(self.PICTURE).save(file, "MPO", save_all=True, append_images=[Image.fromarray(self.NOISE)])
        self.check(tmp_path / "a.jpg", file.getvalue(), by_torchvision)

    def test_cmyk_is_up_to_pil(self, tmp_path, by_torchvision):
        Image.fromarray(self.PICTURE).convert("CMYK").save(path := tmp_path / "a.jpg")
        assert (decoded(path) == np.asarray(load_image(path))).all()
        assert by_torchvision == []

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
    def test_a_part_of_a_file_is_an_error(self, tmp_path, options):
        content = as_jpeg(self.NOISE[:20, :20], **options)
        for size in [*range(0, len(content), 7), len(content) - 1]:
            (path := tmp_path / "a.jpg").write_bytes(content[:size])
            found = outcome(decoded, path)
            assert isinstance(found, str)
            assert found == outcome(load_image, path)
            assert "\n" not in found

    def test_a_part_of_a_file_that_pil_shall_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        content = as_jpeg(self.PICTURE)
        (path := tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
        assert (decoded(path) == np.asarray(load_image(path))).all()

    @pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 1}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}])
    def test_damaged_files_are_read_or_refused_as_by_pil(self, tmp_path, options, by_torchvision):
        content = as_jpeg(self.NOISE[:24, :24], **options)
        random = np.random.default_rng(1)
        refused = 0
        for number in range(200):
            damaged = bytearray(content)
            place = random.integers(len(content))
            damaged[place] = random.integers(256)
            if number % 2:
                del damaged[place : place + random.integers(1, 40)]
            (path := tmp_path / "a.jpg").write_bytes(damaged)
            found = outcome(decoded, path)
            refused += isinstance(found, str)
            assert same(found, outcome(lambda path: np.asarray(load_image(path)), path)), number
        assert 10 < refused < 190
        assert {*by_torchvision} == {True, False}

    def test_too_many_pixels_are_an_error(self, tmp_path, monkeypatch):
        (path := tmp_path / "a.jpg").write_bytes(as_jpeg(self.PICTURE))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(InputError, match=r"a.jpg cannot be read: DecompressionBombError"):
            decode_image(path)

    def test_without_the_decoder_of_torchvision(self, tmp_path, monkeypatch):
        (path := tmp_path / "a.jpg").write_bytes(as_jpeg(self.PICTURE))
        monkeypatch.setattr(torch.ops, "image", types.SimpleNamespace())
        assert (decoded(path) == np.asarray(load_image(path))).all()


@pytest.mark.parametrize("ending", ["gif", "png", "tif", "webp"])
def test_first_of_several_pictures(tmp_path, ending):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    first.save(path := tmp_path / f"a.{ending}", save_all=True, append_images=[second])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert (decoded(path) == np.asarray(load_image(path))).all()
    red, green, blue = np.asarray(load_image(path)).mean((0, 1))
    assert red > 240 and green < 10 and blue < 10


@pytest.mark.parametrize("load", [load_image, decode_image])
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp", "webp", "gif", "ppm"])
def test_damaged_files_are_named(tmp_path, ending, load):
    big = RANDOM.integers(0, 256, (60, 60, 3)).astype(np.uint8)
    Image.fromarray(big).save(path := tmp_path / f"a.{ending}")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no picture"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"image .*a.{ending} cannot be read: ") as error:
            load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_image, decode_image])
def test_a_name_of_two_lines_is_named_in_one(tmp_path, load):
    (path := tmp_path / "a\nb.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"a\\nb.png cannot be read") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_image, decode_image])
def test_missing_files_and_folders_are_named(tmp_path, load):
    for name in ("gone.png", "folder.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=f"image .*{name} cannot be read: "):
            load(tmp_path / name)


@pytest.mark.parametrize("load", [load_image, decode_image])
@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("content", ["whole", "cut"])
def test_files_are_closed(tmp_path, monkeypatch, content, ending, load):
    Image.fromarray(COLORS).save(path := tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[: None if content == "whole" else 60])
    opened = []
    open_ = Path.open

    def remember(self, *args):
        opened.append(open_(self, *args))
        return opened[-1]

    monkeypatch.setattr(Path, "open", remember)
    try:
        load(str(path))
    except InputError:
        assert content == "cut"
    assert [file.closed for file in opened] == [True]


def test_a_second_reader_does_not_turn_a_picture_again(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2), (9, 8, 7)).save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert image.size == (2, 4)
    assert ImageOps.exif_transpose(image).size == (2, 4)
