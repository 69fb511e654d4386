"""Contact sheets."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from kd_lightning.errors import InputError
from kd_lightning.runs.figures.contact_sheet import contact_sheet, write_contact_sheet


def drawn(image):
    """What a panel shows."""
    return np.asarray(contact_sheet([image], [""]).axes[0].images[0].get_array())


def near(pixels, expected):
    assert pixels.shape == np.shape(expected)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


GREY = [[0, 51], [102, 255]]
SHARES = [[0, 0.2], [0.4, 1]]


@pytest.mark.parametrize(
    "image",
    [
        torch.tensor(GREY, dtype=torch.uint8),
        torch.tensor([GREY], dtype=torch.uint8),
        torch.tensor(SHARES),
        torch.tensor(SHARES, dtype=torch.bfloat16).float(),
        torch.tensor(SHARES, requires_grad=True),
        np.array(SHARES),
        np.array(GREY, dtype=np.uint8)[..., None],
        Image.fromarray(np.array(GREY, dtype=np.uint8)),
        # ranges of their own: stretched
        torch.tensor(SHARES) * 6 - 3,
        torch.tensor(GREY),
        Image.fromarray(np.array(GREY, dtype=np.uint16) * 257),
        Image.fromarray(np.array(GREY, dtype=np.float32)),
        # neither grey nor RGB: the first channel
        torch.stack([torch.tensor(SHARES), torch.zeros(2, 2)]),
        torch.cat([torch.tensor([SHARES]), torch.zeros(6, 2, 2)]),
    ],
)
def test_grey(image):
    pixels = drawn(image)
    assert pixels.shape == (2, 2)
    np.testing.assert_allclose(pixels, SHARES, atol=2e-3)


def test_colors():
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(np.uint8) * 10  # (H, W, C)
    for channels in (3, 4):
        image = values[..., :channels]
        expected = image.astype(np.float64) / 255
        near(drawn(image), expected)
        near(drawn(torch.from_numpy(image.copy()).permute(2, 0, 1)), expected)
        near(drawn(np.ascontiguousarray(image.transpose(2, 0, 1)) / 255), expected)
        near(drawn(Image.fromarray(image)), expected)
    # of normalised values nobody knows what alpha is
    x = torch.from_numpy(values).permute(2, 0, 1).float() - 100
    near(drawn(x), values[..., :3].astype(np.float64) / 220)


def test_stretched_over_the_whole_image():
    """Channels keep their ratio; each image has its own range."""
    x = torch.zeros(3, 1, 2)
    x[0, 0, 0], x[1, 0, 1] = -2.0, 8.0
    near(drawn(x), [[[0, 0.2, 0.2], [0.2, 1, 0.2]]])
    sheet = contact_sheet([x, x / 10 + 0.2], ["a", "b"])
    near(np.asarray(sheet.axes[1].images[0].get_array()), [[[0, 0.2, 0.2], [0.2, 1, 0.2]]])


def test_values_that_are_none():
    nan, inf = float("nan"), float("inf")
    near(drawn(torch.tensor([[nan, 0.5, inf, 0.25]])), [[0.25, 0.5, 0.5, 0.25]])
    near(drawn(torch.tensor([[-1.0, nan, 1.0, -inf]])), [[0, 0, 1, 0]])
    near(drawn(torch.full((2, 2), nan)), np.zeros((2, 2)))
    near(drawn(torch.full((2, 2), 7.0)), np.zeros((2, 2)))
    near(drawn(torch.full((2, 2), 0.25)), np.full((2, 2), 0.25))
    near(drawn(torch.tensor([[True, False]])), [[1, 0]])


@pytest.mark.parametrize("mode", ["1", "P", "LA", "CMYK", "I", "YCbCr"])
def test_modes_of_pil(mode):
    """A white dot on black, in every mode."""
    image = Image.new("L", (4, 3))
    image.putpixel((3, 0), 255)
    pixels = drawn(image.convert(mode))
    pixels = pixels[..., :3].mean(axis=-1) if pixels.ndim == 3 else pixels
    expected = np.zeros((3, 4))
    expected[0, 3] = 1
    near(pixels, expected)


def test_sheet(tmp_path):
    """Sizes differ; every image has its caption; a last row is not filled up."""
    images = [torch.rand(1, 8, 8), torch.rand(3, 20, 5), Image.new("RGB", (3, 30)), torch.rand(2, 2)]
    captions = ["one", "cost: $5 or $6", "a class whose name is longer than its image is wide", "4\nfour"]
    sheet = contact_sheet(images, captions, columns=3, title="$ of all $")
    assert len(sheet.axes) == 4
    assert [axes.get_subplotspec().rowspan.start for axes in sheet.axes] == [0, 0, 0, 1]
    heads = [axes.get_title() for axes in sheet.axes]
    assert heads[:2] + heads[3:] == ["one", "cost: $5 or $6", "4"]
    assert [axes.get_xlabel() for axes in sheet.axes] == ["", "", "", "four"]
    assert " ".join(heads[2].split()) == captions[2] and max(map(len, heads[2].splitlines())) <= 22
    assert sheet.get_suptitle() == "$ of all $"
    sheet.savefig(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as file:
        assert file.size[0] == pytest.approx(3 * 175, abs=1)


@pytest.mark.parametrize("batch", [torch.rand(2, 1, 8, 8), np.random.default_rng(0).random((2, 8, 8, 3))])
def test_a_batch_in_one_tensor(batch):
    sheets = [contact_sheet(images, ["a", "b"]) for images in (batch, [*batch])]
    whole, one_by_one = ([np.asarray(axes.images[0].get_array()) for axes in sheet.axes] for sheet in sheets)
    assert np.array_equal(whole, one_by_one)


def test_captions_lie_within_their_columns():
    """Also those of the longest names, which are cut after four lines."""
    caption = f"given {'a_long_name_of_a_class' * 9}, looks like B\n{'a_' * 40}"
    sheet = contact_sheet([torch.rand(1, 8, 8)] * 4, [caption] * 4, columns=2, title="title")
    canvas = FigureCanvasAgg(sheet)
    canvas.draw()
    for axes in sheet.axes:
        texts = (axes.title, axes.xaxis.label)
        assert all(text.get_text().count("\n") <= 3 for text in texts) and "…" in axes.get_title()
    texts = [text for axes in sheet.axes for text in (axes.title, axes.xaxis.label)]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_wrong_input():
    x = torch.rand(1, 8, 8)
    for images, captions in (([], []), ([x], []), ([x], ["a", "b"])):
        with pytest.raises(InputError, match="at least one, each with a caption"):
            contact_sheet(images, captions)
    with pytest.raises(InputError, match="columns must be at least 1, got 0"):
        contact_sheet([x], ["a"], columns=0)
    with pytest.raises(InputError, match="got str"):
        contact_sheet(["x.png"], ["a"])
    for image in (np.full((8, 8), "a"), torch.rand(8, 8).to_sparse()):
        with pytest.raises(InputError, match="images must be PIL images, tensors or arrays of numbers, got .* of"):
            contact_sheet([image], ["a"])
    for shape in ((8,), (1, 1, 8, 8), (3, 0, 8)):
        with pytest.raises(InputError, match=r"\(H, W\) or \(C, H, W\), got \("):
            contact_sheet([torch.rand(shape)], ["a"])


class TestWriting:
    @pytest.mark.parametrize(
        "sample",
        [
            torch.rand(12),
            torch.rand(12).half(),
            torch.rand(3, 8, 8).to(torch.complex64),
            torch.rand(2, 3, 8, 8),
            torch.tensor(3),
            np.full((8, 8), 1j),
            "a text",
            {"image": torch.rand(1, 8, 8)},
            None,
        ],
    )
    def test_samples_that_are_no_pictures(self, tmp_path, capsys, sample):
        out = tmp_path / "sheet.png"
        out.write_text("of an earlier round")
        assert not write_contact_sheet(out, [sample, sample], ["a", "b"], "title")
        assert not out.exists()
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and "there is no contact sheet" in line

    @pytest.mark.parametrize(
        "sample",
        [
            torch.rand(8, 8).half(),
            torch.rand(1, 8, 8) > 0.5,
            torch.rand(5, 8, 8).bfloat16(),
            torch.rand(100, 6),  # a sequence
            *(Image.new(mode, (4, 3)) for mode in ("I;16", "F", "CMYK", "P", "RGBA", "RGBa", "LAB", "1")),
        ],
    )
    def test_pictures(self, tmp_path, capsys, sample):
        assert write_contact_sheet(tmp_path / "new" / "sheet.png", [sample, torch.rand(3, 5, 9)], ["a", "b"], "title")
        assert (tmp_path / "new" / "sheet.png").read_bytes().startswith(b"\x89PNG")
        assert capsys.readouterr().out == ""

    def test_mixed(self, tmp_path, capsys):
        samples = [torch.rand(12), torch.rand(1, 4, 4), torch.rand(12)]
        assert write_contact_sheet(tmp_path / "sheet.png", samples, ["a", "b", "c"], "title")
        assert "2 samples are left out" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [1, 2, 6])
def test_a_long_title_is_not_cut_off(columns):
    title = "Labels that are probably wrong: the 60 of 1234 with the lowest quality"
    sheet = contact_sheet([torch.rand(1, 8, 8)] * columns, ["a\nb"] * columns, title=title)
    sheet.draw_without_rendering()
    box = sheet._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= sheet.bbox.x1 and box.y1 <= sheet.bbox.y1
    assert box.y0 >= max(axes.get_tightbbox().y1 for axes in sheet.axes)
