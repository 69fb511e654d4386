"""logits_of and auxiliary_logits_of: outputs of many kinds of networks."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn

from kd_lightning import InputError
from kd_lightning.features.outputs import auxiliary_logits_of, describe_choice, logits_of

LOGITS, FEATURES, LOSS = torch.zeros(2, 3), torch.zeros(2, 8), torch.tensor(0.5)
Pair = namedtuple("Pair", "features logits")


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, FEATURES),
        [LOGITS, FEATURES],
        (LOSS, LOGITS),
        (LOSS, LOGITS, FEATURES),
        (LOGITS, None),
        (LOGITS, (FEATURES, FEATURES)),
        ([FEATURES], LOGITS),
        {"logits": LOGITS, "features": FEATURES},
        {"loss": LOSS, "prediction": LOGITS},
        OrderedDict(out=LOGITS, aux=FEATURES),
        Pair(FEATURES, LOGITS),
        Output(None, LOGITS),
        Output(LOSS, LOGITS),
    ],
)
def test_finds_the_logits(output):
    assert logits_of(output, "the student") is LOGITS


@pytest.mark.parametrize(
    ("output", "got"),
    [
        ({"a": LOGITS, "b": FEATURES}, r"got dict with a: a tensor \[2, 3\], b: a tensor \[2, 8\]"),
        (LOSS.item(), "got float"),
        (("a", None), "got tuple with 0: str, 1: NoneType"),
        ((LOSS,), r"got tuple with 0: a tensor \[\]"),
        ({}, "got dict"),
    ],
)
def test_refuses_the_rest(output, got):
    with pytest.raises(InputError, match=f"the student must return logits: .*{got}"):
        logits_of(output, "the student")


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (lambda: torchvision.models.googlenet(num_classes=3, aux_logits=True, init_weights=False), 2),
        (lambda: torchvision.models.inception_v3(num_classes=3, aux_logits=True, init_weights=False), 1),
    ],
    ids=["GoogLeNet", "Inception"],
)
def test_auxiliary_heads_of_torchvision(build, heads):
    with torch.device("meta"):
        output = build().train()(torch.zeros(2, 3, 299, 299))
    assert logits_of(output, "the student") is output.logits
    found = auxiliary_logits_of(output)
    assert [part.shape for part in found] == heads * [(2, 3)]
    assert all(part is not output.logits for part in found)


def test_a_choice_among_several_tensors_is_described():
    assert describe_choice((LOGITS, FEATURES)) == (
        "a tuple of tensors [2, 3], [2, 8]; the first is taken for the logits"
    )
    for output in (LOGITS, (LOGITS,), (LOSS, LOGITS), Pair(FEATURES, LOGITS), {"logits": LOGITS, "features": FEATURES}):
        assert not describe_choice(output)


def test_auxiliary_heads_of_segmentation_and_none():
    assert auxiliary_logits_of({"out": LOGITS, "aux": FEATURES}) == [FEATURES]
    assert auxiliary_logits_of((LOGITS, FEATURES)) == []
    assert auxiliary_logits_of(LOGITS) == []
    assert auxiliary_logits_of(nn.Identity()) == []
