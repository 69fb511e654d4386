"""The true pitch of sounds is true, its estimates are near it, and labels and outputs mean the same pitch."""

import importlib
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def pitch(root):
    """The script, which lies in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        return importlib.import_module("pitch")


def test_a_label_row_decodes_to_its_pitch(pitch):
    """Of every pitch but those at the ends, whose 9 neighbours are cut off: to a cent."""
    cents = torch.linspace(2200, 9000, 500)
    rows = pitch.pitch_targets(cents)
    assert rows.shape == (500, 360)
    best = pitch.BINS[rows.argmax(dim=1)]
    assert float((best - cents).abs().max()) <= 10.001
    decoded, confidence = pitch.decode_pitch(torch.logit(rows.double(), eps=1e-12))
    assert float((decoded - cents).abs().max()) < 1
    torch.testing.assert_close(confidence.float(), rows.amax(dim=1))


def test_the_bins_are_those_of_the_paper(pitch):
    """From C1, 32.70 Hz, to B7, 1975.5 Hz, of the paper: the published code has 31.70 Hz and 2005.5 Hz."""
    hertz = 10 * 2 ** (pitch.BINS / 1200)
    assert hertz[0].item() == pytest.approx(31.70, abs=0.005)
    assert hertz[-1].item() == pytest.approx(2005.5, abs=0.05)
    assert pitch.to_cents(440.0) == pytest.approx(1200 * math.log2(44))


def test_a_missing_pitch_is_a_row_of_zeros(pitch):
    assert not pitch.pitch_targets(torch.tensor([float("nan")])).any()


def test_the_decoded_pitch_is_the_weighted_mean_of_nine(pitch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 360, generator=generator)
    logits[0, 0], logits[1, 359] = 9, 9  # the window is cut off at both ends
    decoded, confidence = pitch.decode_pitch(logits)
    for row, cents, sure in zip(logits, decoded, confidence, strict=True):
        probabilities = [1 / (1 + math.exp(-value)) for value in row.tolist()]
        best = probabilities.index(max(probabilities))
        window = range(max(0, best - 4), min(360, best + 5))
        total = sum(probabilities[place] for place in window)
        mean = sum(probabilities[place] * (1997.3794084376191 + 20 * place) for place in window) / total
        assert cents.item() == pytest.approx(mean, rel=1e-6)
        assert sure.item() == pytest.approx(max(probabilities), rel=1e-6)


@pytest.mark.parametrize("hertz", [61.0, 110.0, 233.1, 440.0, 777.7])
def test_yin_finds_the_pitch_of_tones(pitch, hertz):
    time = np.arange(1024) / 16000
    tones = np.stack(
        [np.sin(2 * np.pi * hertz * time), sum(np.sin(2 * np.pi * hertz * n * time) / n for n in (1, 2, 3))]
    )
    assert pitch.yin(tones) == pytest.approx(pitch.to_cents(hertz), abs=10)


def test_yin_finds_none_in_noise_and_silence(pitch):
    noise = np.random.default_rng(0).normal(size=(50, 1024))
    assert np.isnan(pitch.yin(noise)).mean() > 0.9
    assert np.isnan(pitch.yin(np.zeros((2, 1024)))).all()


def test_yin_differences_are_those_of_the_paper(pitch):
    """The normalised difference, by its definition: the estimate is the dip that a loop finds."""
    frame = pitch.voices(1, np.random.default_rng(3))[0].astype(float)
    lags = int(16000 / 50) + 2
    width = 1024 - lags
    difference = [sum((frame[0, j] - frame[0, j + lag]) ** 2 for j in range(width)) for lag in range(lags)]
    normal = [1.0] + [difference[lag] * lag / sum(difference[1 : lag + 1]) for lag in range(1, lags)]
    dip = next(n for n in range(16, lags - 1) if normal[n] < 0.15 and normal[n - 1] >= normal[n] < normal[n + 1])
    (cents,) = pitch.yin(frame)
    assert abs(16000 / (10 * 2 ** (cents / 1200)) - dip) <= 1


@pytest.mark.parametrize("make", ["harmonic_sounds", "voices"])
def test_sounds_have_the_pitch_that_they_claim(pitch, make):
    frames, cents = getattr(pitch, make)(60, np.random.default_rng(1))
    assert frames.shape == (60, 1024)
    assert frames.dtype == np.float32
    np.testing.assert_allclose(frames.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(frames.std(axis=1, ddof=1), 1, rtol=1e-4)
    found = pitch.yin(frames)
    clear = ~np.isnan(found)
    error = np.abs(found - cents)[clear]
    assert clear.mean() > 0.6
    assert np.median(error) < 15
    assert (error < 50).mean() > 0.8
    assert np.ptp(cents) > 1200
    again, same = getattr(pitch, make)(60, np.random.default_rng(1))
    assert np.array_equal(again, frames)
    assert np.array_equal(same, cents)


def test_a_harmonic_sound_has_its_pitch_at_the_middle(pitch):
    """Most frames glide, so that the middle of the first half has another pitch than that of the second."""
    frames, cents = pitch.harmonic_sounds(400, np.random.default_rng(2))
    first, second = pitch.yin(frames[:, :768]), pitch.yin(frames[:, -768:])
    clear = (np.abs(first - cents) < 150) & (np.abs(second - cents) < 150)
    assert clear.sum() > 150
    assert np.std((second - first)[clear]) > 20
    assert abs(np.mean((first + second)[clear] / 2 - cents[clear])) < 3


def test_quiet_frames_are_left_out(pitch):
    sound = np.zeros(16000)
    assert len(pitch.loud_frames(sound)) == 0
    assert len(pitch.loud_frames(sound[:100])) == 0
    sound[8000:12000] = np.sin(np.arange(4000))
    frames = pitch.loud_frames(sound)
    assert 4000 / 160 <= len(frames) < 5100 / 160
    assert all(frame.any() for frame in frames)


def test_frames_hide_or_show_their_labels(pitch, tmp_path):
    cents = torch.tensor([4000.0, float("nan")])
    save_file({"frames": torch.randn(2, 1024), "cents": cents}, tmp_path / "some.safetensors")
    hidden = pitch.Frames(str(tmp_path / "some.safetensors"))
    assert len(hidden) == 2
    assert hidden.targets.isnan().all()
    shown = pitch.Frames(str(tmp_path / "some.safetensors"), labels=True)
    assert torch.equal(shown.targets, pitch.pitch_targets(cents))
    frame, label = shown[1]
    assert frame.shape == (1024,)
    assert not label.any()


def test_no_language_is_in_two_parts(pitch):
    assert not {*pitch.VAL} & {*pitch.TEST}
    assert len({*pitch.VAL, *pitch.TEST}) == len(pitch.VAL + pitch.TEST)
