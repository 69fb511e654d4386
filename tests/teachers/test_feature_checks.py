"""What doctor finds out about teachers whose features are learned from."""

import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import v2
from transformers import Dinov2Config, Dinov2Model

from kd_lightning.teachers.feature_checks import channels, input_range, input_size, neighbors

VIT = {"img_size": 32, "num_classes": 0, "depth": 1, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("vit_tiny_patch16_224", **VIT)


class TestNeighbors:
    def test_good_and_useless_features(self):
        y = torch.arange(200) % 4
        good = neighbors(torch.eye(4)[y] + 0.1 * torch.randn(200, 4), y, "validation labels")
        assert (good.severity, good.text) == (
            "info",
            "k-NN accuracy of its features 100.0% of 200 validation labels (chance 25.0%)",
        )
        useless = neighbors(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), y, "labels")
        assert useless.severity == "warning"
        assert useless.hint.startswith("its features do not tell these classes apart")

    @pytest.mark.parametrize("y", [None, torch.full((200,), -100), torch.zeros(200, dtype=torch.long)])
    def test_without_labels(self, y):
        assert neighbors(torch.randn(200, 4), y, "labels").text.startswith("not checked")


class TestChannels:
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))

    def check(self, rows, **options):
        return channels("blocks.3", rows, **{"scale_matters": True} | options)

    def test_usual_ones(self):
        found = self.check(self.rows)
        assert (found.name, found.hint) == ("features of blocks.3", None)
        assert found.text.startswith("8 channels, 0 dead, standard deviations 0.9")

    def test_a_few_dead_ones_and_many(self):
        rows = self.rows.repeat(1, 2)
        rows[:, 3] = 5.0
        assert self.check(rows).hint is None
        assert ", 1 dead," in self.check(rows).text
        rows[:, 3:7] = 0.0
        assert self.check(rows).hint.startswith("many channels never change")

    def test_all_dead(self):
        found = self.check(torch.ones(300, 8))
        assert (found.severity, found.text) == ("error", "all 8 channels are constant over 300 rows")

    def test_one_channel_rules(self):
        rows = self.rows.clone()
        rows[:, 0] *= 30
        assert "ChannelStandardization" in self.check(rows).hint
        assert self.check(rows, scale_matters=False).hint is None

    def test_not_finite(self):
        rows = self.rows.clone()
        rows[5, 2] = float("inf")
        assert self.check(rows).severity == "error"
        assert self.check(rows).text == "not finite for 1 of 300 rows"


class TestInputs:
    def test_size(self, vit):
        assert input_size(vit, torch.rand(2, 3, 32, 32)).hint is None
        found = input_size(vit, torch.rand(2, 3, 16, 16))
        assert found.text == "[16, 16], the network was made for [32, 32]"
        assert "v2.Resize([32, 32])" in found.hint
        assert input_size(vit, torch.rand(2, 3, 64, 64)).hint is None
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
        dino = Dinov2Model(Dinov2Config(**sizes, image_size=28))
        assert "v2.Resize([28, 28])" in input_size(dino, torch.rand(2, 3, 14, 14)).hint
        assert input_size(nn.Conv2d(3, 4, 1), torch.rand(2, 3, 8, 8)).text.startswith("not checked")
        assert input_size(vit, {"x": torch.rand(2, 3)}).text.startswith("not checked")

    @pytest.mark.parametrize(
        ("transform", "is_right"),
        [
            (v2.Normalize([0.5] * 3, [0.5] * 3), True),
            (v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), False),
            (nn.Identity(), False),
            (v2.Lambda(lambda x: 255 * x), False),
        ],
    )
    def test_normalisation(self, vit, transform, is_right):
        """The network declares 0.5 and 0.5."""
        found = input_range(vit, transform(torch.rand(4, 3, 32, 32)))
        assert (found.hint is None) == is_right
        if not is_right:
            assert "v2.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])" in found.hint

    def test_normalisation_that_is_not_declared(self, vit):
        assert input_range(nn.Conv2d(3, 4, 1), torch.rand(2, 3, 8, 8)).text.startswith("not checked")
        assert input_range(vit, torch.rand(2, 1, 8, 8)).text.startswith("not checked")
