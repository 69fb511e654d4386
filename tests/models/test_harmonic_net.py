"""The small pitch network: its spectrum against a sum by hand, its channels, and what is deployed."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd_lightning import InputError
from kd_lightning.models import HarmonicNet

BINS = [10 * 2 ** ((1997.3794084376191 + 20 * number) / 1200) for number in range(360)]  # Hz


def test_parameters():
    for width in (1, 16):
        convolutions = 10 * width * 5 + width * width * 9 + width * width * 5 + width * 5 + 1
        norms = 2 * 10 + 3 * 2 * width
        network = HarmonicNet(width)
        assert sum(p.numel() for p in network.parameters()) == convolutions + norms + (2 * width + 1) * width + 360


def test_channels_are_the_power_at_each_harmonic():
    """Against a sum in float64 at the exact frequencies: harmonics are rounded to 20 cents, which moves them by 10."""
    network, x = HarmonicNet(1), torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    found = network.spectrum(x)[:, network.places] * network.exists
    assert found.shape == (2, 10, 360)
    time = (torch.arange(1024, dtype=torch.float64) - 512) / 16000
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(1024, dtype=torch.float64) / 1024)
    for channel, harmonic in enumerate((1 / 3, 1 / 2, 1, 2, 3, 4, 5, 6, 7, 8)):
        for pitch in (0, 100, 250, 359):
            hertz = BINS[pitch] * harmonic
            if hertz > 8000:
                assert not found[:, channel, pitch].any()
                continue
            hertz = BINS[0] * 2 ** (round(60 * math.log2(hertz / BINS[0])) / 60)
            wave = torch.exp(2j * math.pi * hertz * time) * window / 1024
            power = (x.double() * wave).sum(dim=1).abs().square()
            torch.testing.assert_close(found[:, channel, pitch].double(), (power + 1e-6).log(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("pitch", [120, 200, 300])
def test_a_tone_is_loudest_at_its_pitch(pitch):
    network = HarmonicNet(1)
    tone = torch.sin(2 * math.pi * BINS[pitch] * torch.arange(1024) / 16000).unsqueeze(0)
    channels = (network.spectrum(tone)[:, network.places] * network.exists)[0]
    assert abs(int(channels[2].argmax()) - pitch) <= 1
    assert abs(int(channels[3].argmax()) - (pitch - 60)) <= 1  # the second harmonic of the octave below


def test_the_spectrum_is_not_deployed():
    network, other, x = HarmonicNet(4).eval(), HarmonicNet(4).eval(), torch.randn(3, 1024)
    assert {*network.state_dict()}.isdisjoint({"waves", "places", "exists"})
    assert not torch.equal(network(x), other(x))
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(x), other(x))


def test_a_step_reaches_every_parameter():
    torch.manual_seed(0)
    network, x, y = HarmonicNet(4), torch.randn(16, 1024), torch.rand(16, 360)
    loss = F.binary_cross_entropy_with_logits(network(x), y)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in network.parameters())
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert F.binary_cross_entropy_with_logits(network(x), y) < loss


def test_silence_has_finite_logits():
    assert HarmonicNet(2).eval()(torch.zeros(2, 1024)).isfinite().all()


def test_other_widths_and_inputs_are_refused():
    with pytest.raises(InputError, match=r"^width must be at least 1, got 0$"):
        HarmonicNet(0)
    with pytest.raises(InputError, match=r"^inputs must be \(B, 1024\), got \[2, 1000\]$"):
        HarmonicNet(1)(torch.zeros(2, 1000))
