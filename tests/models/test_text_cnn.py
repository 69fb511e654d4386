"""A small network for texts."""

import pytest
import torch
import torch.nn.functional as F

from kd_lightning.models import TextCNN


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TextCNN(num_classes=3, vocab_size=20, dim=4, channels=5, widths=(1, 3), dropout=0.5).eval()


def by_hand(network, tokens):
    """Logits of one text: windows one after the other, in float64."""
    words = network.words.weight[tokens].double()
    features = []
    for convolution in network.convolutions:
        width = convolution.kernel_size[0]
        longer = torch.cat([words, words.new_zeros(width - 1, words.shape[1])])
        windows = [longer[first : first + width].T for first in range(len(tokens))]
        found = [(window * convolution.weight.double()).sum(dim=(1, 2)) for window in windows]
        features.append((torch.stack(found) + convolution.bias.double()).relu().amax(dim=0))
    return F.linear(torch.cat(features), network.head.weight.double(), network.head.bias.double())


@pytest.mark.parametrize("length", [1, 2, 7])
def test_each_token_begins_a_window(network, length):
    tokens = torch.arange(3, 3 + length)
    assert torch.allclose(network(tokens[None])[0].double(), by_hand(network, tokens), atol=1e-6)


@pytest.mark.parametrize("token", [0, 9])
def test_padding_changes_nothing(network, token):
    """Whatever token it is made of, and also where the bias alone would be the maximum."""
    for convolution in network.convolutions:
        torch.nn.init.constant_(convolution.bias, 3.0)
    texts = [torch.tensor([4, 5]), torch.tensor([7, 8, 1, 2, 3, 6])]
    ids = torch.full((2, 11), token)
    mask = torch.zeros(2, 11, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    logits = network(ids, mask)
    assert torch.allclose(logits.double(), torch.stack([by_hand(network, text) for text in texts]), atol=1e-6)
    assert torch.allclose(network(ids[:, :6], mask[:, :6]), logits, atol=1e-6)


def test_a_text_without_tokens_has_the_logits_of_no_features(network):
    ids = torch.full((1, 4), 3)
    assert torch.equal(network(ids, torch.zeros_like(ids)), network.head.bias[None])


def test_default_size():
    """Of a twentieth of all-MiniLM-L6-v2 and less."""
    assert sum(parameter.numel() for parameter in TextCNN(num_classes=3).parameters()) < 22_713_216 / 20
