"""Networks of transformers, from a folder as it would lie in the hub's cache."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from kd_lightning import InputError
from kd_lightning.models import from_pretrained
from kd_lightning.runs.build import build

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
NETWORKS = {
    "transformers.Dinov2Model": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "transformers.SiglipVisionModel": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=32)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_of_a_config(kind, tmp_path):
    network = NETWORKS[kind]().eval()
    network.save_pretrained(tmp_path)
    config = {"class_path": "kd_lightning.models.from_pretrained", "init_args": {"model": kind, "name": str(tmp_path)}}
    built = build(nn.Module, config).eval()
    assert type(built) is type(network)
    x = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(built(x).pooler_output, network(x).pooler_output)


def test_the_class_may_be_that_of_the_weights(tmp_path):
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(tmp_path)
    assert type(from_pretrained(AutoModel, str(tmp_path))) is Dinov2Model


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match=r"^model must be a class of transformers with from_pretrained, got Linear$"):
        from_pretrained(nn.Linear, "facebook/dinov2-small")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^name: \S+ cannot be loaded as Dinov2Model: ") as found:
        from_pretrained(Dinov2Model, str(tmp_path / "empty"))
    assert "\n" not in str(found.value)
