"""Networks by name, and what they cost."""

import pytest
import torch

from kd_lightning.cli.short.costs import measure
from kd_lightning.cli.short.distill import CANDIDATES
from kd_lightning.cli.short.networks import find_network
from kd_lightning.errors import InputError
from kd_lightning.models import resnet8
from kd_lightning.runs.build import build


@pytest.mark.parametrize(
    ("name", "spec", "slug"),
    [
        ("resnet8", {"class_path": "kd_lightning.models.resnet8", "init_args": {"num_classes": 3}}, "resnet8"),
        (
            "kd_lightning.models.resnet20",
            {"class_path": "kd_lightning.models.resnet20", "init_args": {"num_classes": 3}},
            "resnet20",
        ),
        (
            "torchvision/squeezenet1_1",
            {"class_path": "torchvision.models.squeezenet1_1", "dict_kwargs": {"num_classes": 3}},
            "squeezenet1_1",
        ),
        (
            "resnet18",  # torchvision's, since this package has none of this name
            {"class_path": "torchvision.models.resnet18", "dict_kwargs": {"num_classes": 3}},
            "resnet18",
        ),
        (
            "timm/test_resnet",
            {"class_path": "timm.create_model", "dict_kwargs": {"model_name": "test_resnet", "num_classes": 3}},
            "test_resnet",
        ),
    ],
)
def test_names(name, spec, slug):
    network = find_network(name, "--student")
    assert network.spec(3) == spec and network.slug == slug
    built = build(torch.nn.Module, network.spec(3))
    assert built.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnt8", "have no network 'resnt8'; nearest: resnet8"),
        ("test_resnet", "nearest: timm/test_resnet"),
        ("timm/test_resnt", "--student: timm has no network 'test_resnt'; nearest: timm/test_resnet"),
        ("torchvision/resnt18", "--student: torchvision has no network 'resnt18'; nearest: torchvision/resnet18"),
        ("kd_lightning.models.resnt20", "nearest: kd_lightning.models.resnet20"),
        ("nowhere.Net", "nowhere has no Net, or cannot be imported"),
        ("hub/resnet18", "must be timm/NAME, torchvision/NAME or a class path, got 'hub/resnet18'"),
    ],
)
def test_names_that_do_not_exist(name, text):
    with pytest.raises(InputError) as error:
        find_network(name, "--student")
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_missing_extra_has_its_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match=r"--student: timm/test_resnet: timm is not installed: pip install 'kd-lightn"):
        find_network("timm/test_resnet", "--student")


def test_costs():
    network = find_network("resnet8", "--student")
    costs = measure(network.build(3), network, 3, 32)
    expected = resnet8(3)
    assert costs.parameters == sum(p.numel() for p in expected.parameters())
    tensors = [*expected.parameters(), *(b for b in expected.buffers() if b.is_floating_point())]
    assert costs.megabytes == pytest.approx(sum(4 * t.numel() for t in tensors) / 1e6, rel=1e-3)
    assert min(costs.latency, costs.forward, costs.step, costs.macs) > 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DigitsCNN", "--student: DigitsCNN does not take RGB pictures of 32x32 pixels"),
        ("UNet", "--student: UNet must give logits (B, 3), one for each class, got [1, 3, 32, 32]"),
        ("timm/vit_tiny_patch16_224", "RGB pictures of 32x32 pixels; it takes 224x224: --image-size 224; its error"),
    ],
)
def test_networks_that_do_not_fit(name, text):
    network = find_network(name, "--student")
    with pytest.raises(InputError) as error:
        measure(network.build(3), network, 3, 32)
    assert text in str(error.value)


def test_what_cannot_be_built():
    with pytest.raises(InputError, match="--student: Linear cannot be built: in_features"):
        find_network("Linear", "--student").build(3)


@pytest.mark.parametrize("name", [*CANDIDATES, "torchvision/swin_t"])
def test_candidates_and_networks_that_call_a_class_of_theirs(name):
    """ShuffleNet and Swin take the class of their blocks as an argument, with a default, and call it."""
    assert sum(p.numel() for p in find_network(name, "--student").build(3).parameters()) > 0
