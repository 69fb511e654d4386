"""Features of a teacher's layers, computed live."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_lightning import InputError, Teacher
from kd_lightning.batch import Batch
from kd_lightning.features.pooling import Pool

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Returns what it is given to return, and counts the passes through its head."""

    def __init__(self, output=lambda logits, maps: logits):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1))
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(6, 7)
        self.output = output
        self.heads = 0

    def forward(self, x):
        maps = self.block(self.stem(x))
        self.heads += 1
        return self.output(self.head(maps.mean((2, 3))), maps)


def teacher(layers, **kwargs):
    torch.manual_seed(0)
    made = Teacher(Net(**kwargs))
    made.layers = layers
    return made


def test_outputs_of_layers_without_what_lies_above():
    one = teacher({"block": None, "stem": None})
    found = one.features(Batch(X))
    net = one.network
    assert [*found] == ["block", "stem"]
    assert torch.equal(found["stem"], net.stem(X))
    assert torch.equal(found["block"], net.block(net.stem(X)))
    assert not any(part.requires_grad or part.is_inference() for part in found.values())
    assert net.heads == 0
    assert teacher({}).features(Batch(X)) == {}


def test_pooled_outputs():
    one = teacher({"block": Pool("mean"), "head": Pool("mean")})
    found = one.features(Batch(X))
    maps = one.network.block(one.network.stem(X))
    torch.testing.assert_close(found["block"], maps.mean((2, 3)))
    assert torch.equal(found["head"], one.network(X))


def test_one_pass_gives_logits_and_features():
    one = teacher({"block": Pool("mean"), "": None})
    alone = one.features(Batch(X))
    before = one.network.heads
    with one.capturing(Batch(X)) as features:
        logits = one(Batch(X))
        assert features == {}
    assert one.network.heads == before + 1
    assert torch.equal(features[""], logits)
    assert torch.equal(features["block"], alone["block"])
    with one.capturing(Batch(X)) as features:
        pass  # no pass in the block, such as where logits are stored
    assert torch.equal(features[""], logits)
    one.layers = {}
    with one.capturing(Batch(X)) as features:
        one(Batch(X))
    assert features == {}


OUTPUTS = {
    "pooled": lambda logits, maps: {"last_hidden_state": maps, "pooler_output": logits},
    "an object": lambda logits, maps: SimpleNamespace(last_hidden_state=logits, pooler_output=None),
    "a tuple of one": lambda logits, maps: (logits, None, torch.zeros(2, dtype=torch.long)),
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_output_of_the_network(output):
    one = teacher({"": None}, output=output)
    assert torch.equal(
        one.features(Batch(X))[""], one.network.head(one.network.block(one.network.stem(X)).mean((2, 3)))
    )


@pytest.mark.parametrize(
    ("layers", "output", "message"),
    [
        ({"blocks": None}, None, "layer 'blocks': Net has none of that name; nearest: block"),
        ({"unused": None}, None, "the teacher's layer unused is never called in its forward pass"),
        ({"": None}, lambda logits, maps: (logits, maps), "Net must return a feature: .* got tuple with 0: a tensor"),
        ({"": None}, lambda logits, maps: "text", "Net must return a feature: .*; got str; or use"),
        ({"": None}, lambda logits, maps: logits.argmax(1), "layer '' must return floats, got torch.int64"),
        ({"": None}, lambda logits, maps: logits[:2], "must return a row for each of 5 samples"),
        ({"block": Pool("first")}, None, r"pool: first needs tokens, such as \(B, N, C\), got a map \[5, 6, 4, 4\]"),
    ],
)
def test_what_is_no_feature(layers, output, message):
    one = teacher(layers, **({"output": output} if output else {}))
    with pytest.raises(InputError, match=message) as error:
        one.features(Batch(X))
    assert "\n" not in str(error.value)


def test_padding_does_not_count_in_means():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, input_ids, attention_mask):
            return self.embed(input_ids)[:, 0]

    one = Teacher(Tokens())
    one.layers = {"embed": Pool("mean", "last")}
    ids, mask = torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    x = {"input_ids": ids, "attention_mask": mask}
    weight = one.network.embed.weight
    expected = torch.stack([weight[[1, 2]].mean(0), weight[[3, 4, 5]].mean(0)])
    for batch in (Batch(x), Batch(X[:2], teacher_inputs=x)):
        torch.testing.assert_close(one.features(batch)["embed"], expected)


def test_a_pass_that_ends_early_counts_for_the_fingerprint():
    """A counter that a pass changes is none of the teacher's identity, also where no pass reaches the output."""

    class Counts(Net):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    one = Teacher(Counts())
    one.layers = {"stem": None}
    before = one.fingerprint(anew=True)
    one.features(Batch(X))
    assert one.fingerprint(anew=True) == before
