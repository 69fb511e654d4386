"""Descriptions of evaluation transforms against the transforms that they describe."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchvision import datasets
from torchvision import transforms as v1
from torchvision.models import ResNet50_Weights, ViT_B_16_Weights
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.data.preprocessing import describe_data, describe_preprocessing, transform_of
from kd_lightning.data.sources.class_subset import ClassSubset
from kd_lightning.data.sources.dataset_source import DatasetSource
from kd_lightning.data.sources.digits import Digits
from kd_lightning.data.sources.image_folder import ImageFolder
from kd_lightning.data.sources.image_loader import load_image
from kd_lightning.data.transforms import (
    RGB,
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    Resize,
    photo_transforms,
    segmentation_transforms,
    small_image_transforms,
    to_float,
)
from kd_lightning.data.transforms.draws import Draws

SIZES = [(32, 32), (31, 47), (200, 67), (5, 300), (1, 1), (224, 225)]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def picture(size, mode="RGB", seed=0):
    """Random colours that change slowly and quickly."""
    random = np.random.default_rng(seed)
    height, width = size
    coarse = random.integers(0, 256, (height // 9 + 1, width // 9 + 1, 4)).repeat(9, 0).repeat(9, 1)[:height, :width]
    pixels = (coarse // 2 + random.integers(0, 128, (height, width, 4))).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def rebuilt(transform, shape):
    found = describe_preprocessing(transform, shape)
    assert found is not None
    return transform_of(json.loads(json.dumps(found)))


OWN = {
    "photos": (photo_transforms(64)[1], (3, 64, 64)),
    "wide photos": (photo_transforms((48, 64))[1], (3, 48, 64)),
    "masks": (segmentation_transforms((40, 30))[1], (3, 40, 30)),
    "chain in a chain": (Compose([Compose([RGB(), Resize(20)]), CenterCrop(20), Normalize(MEAN, STD)]), (3, 20, 20)),
    "torchvision's in ours": (
        Compose([RGB(), v2.Resize((9, 9)), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]),
        (3, 9, 9),
    ),
}
FIXED = {
    "small": (small_image_transforms(MEAN, STD, 32, flip=True)[1], (3, 32, 32)),
    "grey": (small_image_transforms([0.2860], [0.3530], 28, flip=False)[1], (1, 28, 28)),
    "one number for all": (Normalize([0.5], [0.5]), (3, 16, 16)),
    "digits": (Digits().eval_transform, (1, 8, 8)),
    "fake": (to_float(), (3, 32, 32)),
}
BICUBIC = v2.InterpolationMode.BICUBIC
TENSORS = {
    "usual": [v2.Resize(73), v2.CenterCrop(64), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)],
    "no antialias": [v2.Resize(64, antialias=False), v2.CenterCrop(64), v2.ToDtype(torch.float32, scale=True)],
    "floats first": [v2.ToDtype(torch.float32, scale=True), v2.Resize([64, 64]), v2.Normalize(MEAN, STD)],
    "bicubic": [v2.Resize([73], BICUBIC), v2.CenterCrop([64]), v2.ToDtype(torch.float32, scale=True)],
    "nearest": [v2.Resize((64, 64), v2.InterpolationMode.NEAREST), v2.ToDtype(torch.float32, scale=True)],
    "not scaled": [
        v2.Resize(64),
        v2.CenterCrop((64, 64)),
        v2.ToDtype(torch.float32),
        v2.Normalize([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    ],
}
PICTURES = {
    "v1": v1.Compose([v1.Resize(73), v1.CenterCrop(64), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
    "late tensors": v2.Compose([v2.Resize((64, 64)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "weights": ResNet50_Weights.IMAGENET1K_V2.transforms(),
    "bicubic weights": ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms(),
}


class TestRebuilt:
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize("name", OWN)
    def test_equals_a_recipe_to_the_bit(self, name, mode):
        transform, shape = OWN[name]
        again = rebuilt(transform, shape)
        for size in SIZES:
            image = picture(size, mode)
            assert again(image).shape == shape
            torch.testing.assert_close(
                again(image), transform(image), rtol=1e-6, atol=1e-6 if "torchvision" in name else 0
            )

    @pytest.mark.parametrize("name", FIXED)
    def test_equals_a_recipe_without_a_resize(self, name):
        transform, shape = FIXED[name]
        image = picture(shape[1:], "L" if shape[0] == 1 else "RGB")
        assert torch.equal(rebuilt(transform, shape)(image), transform(image))
        pixels = v2.functional.pil_to_tensor(image)
        assert torch.equal(rebuilt(transform, shape)(pixels / 255), transform(pixels / 255))
        wide = pixels.to(torch.uint16) * 257  # as 16 bits
        assert torch.equal(rebuilt(transform, shape)(wide), transform(wide))

    @pytest.mark.parametrize("name", TENSORS)
    def test_equals_a_chain_of_torchvision_on_tensors(self, name):
        transform = v2.Compose([v2.ToImage(), *TENSORS[name], v2.ToPureTensor()])
        again = rebuilt(transform, (3, 64, 64))
        for size in SIZES:
            image = picture(size)
            torch.testing.assert_close(again(image), transform(image), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", PICTURES)
    def test_equals_a_chain_that_resizes_by_pillow(self, name):
        transform = PICTURES[name]
        again = rebuilt(transform, tuple(transform(picture((9, 9))).shape))
        for size in SIZES:
            image = picture(size)
            torch.testing.assert_close(again(image), transform(image), rtol=1e-6, atol=1e-6)

    def test_is_the_same_for_a_batch_a_list_and_one_picture(self):
        transform, shape = OWN["photos"]
        again = rebuilt(transform, shape)
        images = [v2.functional.pil_to_tensor(picture((50, 70), seed=seed)) for seed in range(3)]
        alone = torch.stack([again(image) for image in images])
        assert torch.equal(again(torch.stack(images)), alone)
        assert torch.equal(again(images), alone)
        mixed = [*images, v2.functional.pil_to_tensor(picture((90, 20), "L"))]
        rows = torch.arange(4)
        assert torch.equal(again(mixed, Draws(0, rows, rows)), torch.stack([again(image) for image in mixed]))
        pillow = rebuilt(PICTURES["v1"], (3, 64, 64))
        assert torch.equal(pillow(torch.stack(images)), torch.stack([pillow(image) for image in images]))

    @pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "CMYK", "I;16"])
    def test_equals_the_transform_on_files_of_any_kind(self, tmp_path, kind):
        if kind == "I;16":
            image = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (40, 60)).astype(np.uint16))
        else:
            image = picture((40, 60), "RGB" if kind == "CMYK" else "RGBA").convert(kind)
        file = tmp_path / ("picture.tiff" if kind == "CMYK" else "picture.png")
        image.save(file)
        transform, shape = OWN["photos"]
        assert torch.equal(rebuilt(transform, shape)(load_image(file)), transform(load_image(file)))

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_drops_transparency(self, mode):
        again, image = rebuilt(*OWN["photos"]), picture((40, 60), mode)
        assert torch.equal(again(image), again(image.convert("RGB")))

    def test_makes_colours_grey_as_pillow_does(self):
        again = rebuilt(*FIXED["fake"][:1], (1, 32, 32))
        image = picture((32, 32))
        assert torch.equal(again(image), again(image.convert("L")))
        pixels = v2.functional.pil_to_tensor(image) / 255
        assert (again(pixels) - again(image)).abs().max() <= 0.5 / 255 + 1e-6

    @pytest.mark.parametrize("wrong", [{}, {"color": "BGR"}, {"layout": "NHWC"}, {"resize": {"size": 3}}, {"scale": 2}])
    def test_refuses_another_description(self, wrong):
        found = describe_preprocessing(*OWN["photos"])
        with pytest.raises(InputError, match="preprocessing must be"):
            transform_of(found | wrong if wrong else {})


class TestDescription:
    def test_is_json_that_names_each_step(self):
        assert describe_preprocessing(*OWN["wide photos"]) == {
            "color": "RGB",
            "resize": {
                "size": [54, 73],
                "fit": "cover",
                "interpolation": "bilinear",
                "antialias": True,
                "rounded": True,
                "library": "torch",
            },
            "crop": [48, 64],
            "scale": 1 / 255,
            "mean": MEAN,
            "std": STD,
            "layout": "NCHW",
            "dtype": "float32",
            "size": [48, 64],
        }

    @pytest.mark.parametrize(
        ("transform", "shape"),
        [
            (None, (3, 8, 8)),
            (nn.Conv2d(3, 3, 1), (3, 8, 8)),
            (v2.Compose([v2.ToImage(), v2.GaussianBlur(3), v2.ToDtype(torch.float32, scale=True)]), (3, 8, 8)),
            (Compose([RandomHorizontalFlip(), to_float()]), (3, 8, 8)),
            (v2.Compose([v2.ToImage(), v2.Grayscale(), v2.ToDtype(torch.float32, scale=True)]), (1, 8, 8)),
            (v2.Compose([v2.ToImage(), v2.ToDtype(torch.float16, scale=True)]), (3, 8, 8)),
            (v2.Compose([v2.ToImage(), v2.Resize((8, 8))]), (3, 8, 8)),  # bytes
            (Compose([Resize((9, 9)), to_float()]), (3, 8, 8)),  # another size
            (Compose([CenterCrop(20), Resize(8), CenterCrop(8), to_float()]), (3, 8, 8)),
            (Compose([Normalize(MEAN, STD), CenterCrop(8)]), (3, 8, 8)),
            (Compose([Normalize(MEAN, STD), Normalize(MEAN, STD)]), (3, 8, 8)),
            (Compose([v2.Resize(8, max_size=9), CenterCrop(8), to_float()]), (3, 8, 8)),
            (Compose([RGB(), to_float()]), (1, 8, 8)),
            (to_float(), (12, 8, 8)),
            (to_float(), (16,)),
            (to_float(), (1, 3, 8, 8)),
        ],
    )
    def test_is_none_for_another_transform(self, transform, shape):
        assert describe_preprocessing(transform, shape) is None

    def test_is_none_for_a_class_of_ones_own(self):
        class MyResize(v2.Resize):
            pass

        class MyCompose(Compose):
            pass

        assert describe_preprocessing(v2.Compose([v2.ToImage(), MyResize((8, 8)), to_float()]), (3, 8, 8)) is None
        assert describe_preprocessing(MyCompose([to_float()]), (3, 8, 8)) is None


class TestDescribeData:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in "ab":
            (tmp_path / name).mkdir()
            picture((9, 9)).save(tmp_path / name / "one.png")
        return tmp_path

    def describe(self, source, shape=(3, 8, 8), transform=None):
        return describe_data(SimpleNamespace(source=source, eval_transform=transform or source.eval_transform), shape)

    def test_of_sources(self, folder):
        photos = ImageFolder(folder, image_size=8)
        expected = describe_preprocessing(photos.eval_transform, (3, 8, 8))
        assert expected is not None
        assert self.describe(photos) == self.describe(ClassSubset(photos, [0])) == expected
        assert self.describe(Digits(), [1, 8, 8]) is not None
        images = TensorDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
        assert self.describe(DatasetSource(images)) is not None

    def test_none_for_another_loader_or_transform(self, folder):
        assert self.describe(ImageFolder(folder, image_size=8, loader=Image.open)) is None
        assert self.describe(ClassSubset(ImageFolder(folder, image_size=8, loader=Image.open), [0])) is None
        theirs = datasets.ImageFolder(folder)  # with torchvision's loader, which turns no picture
        assert self.describe(DatasetSource(theirs)) is None
        assert self.describe(DatasetSource(Subset(theirs, [0, 1]))) is None
        theirs = datasets.ImageFolder(folder, transform=v1.ToTensor(), loader=load_image)
        assert self.describe(DatasetSource(theirs), transform=Normalize(MEAN, STD)) is None

    @pytest.mark.parametrize("shape", [None, {"input_ids": [5]}, [[3, 8, 8], [2]], []])
    def test_none_for_what_is_no_picture(self, folder, shape):
        assert self.describe(ImageFolder(folder, image_size=8), shape) is None
        assert describe_data(None, shape) is None
