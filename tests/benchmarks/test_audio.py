"""The figures of the audio recipe: what counts as the same pitch, and which frames count."""

import importlib

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def audio(root):
    """The script, which lies in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        return importlib.import_module("audio")


def test_shares_of_equal_pitches(audio):
    found = audio.within(torch.tensor([0.0, 24, -26, 49, -51, 1180, -2390, 600]))
    assert found == {"50 cents": 50.0, "25 cents": 25.0, "chroma": 75.0}


def logits_at(cents, confidence):
    """Logits whose decoded pitch and confidence are these."""
    rows = (
        importlib.import_module("pitch").pitch_targets(torch.tensor(cents)).double()
        * torch.tensor(confidence).double()[:, None]
    )
    return torch.logit(rows, eps=1e-9).float()


def test_frames_count_where_the_teacher_is_confident(audio, tmp_path, monkeypatch):
    teacher = logits_at([3000.0, 4000, 5000, 6000], [0.9, 0.9, 0.9, 0.2])
    student = logits_at([3010.0, 4000, 6200, 3000], [0.9, 0.3, 0.9, 0.2])
    pitch = audio.Pitch(tmp_path)
    monkeypatch.setattr(pitch, "outputs", lambda capacity, part: {"full": teacher}[capacity])
    found = pitch.compare(student, "test")
    assert found["50 cents"] == pytest.approx(200 / 3)
    assert found["chroma"] == pytest.approx(100)  # an octave above
    assert found["voicing"] == 75.0
    q, p = (logits.double().sigmoid() for logits in (student, teacher))
    by_hand = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert found["kl"] == pytest.approx(1000 * float(by_hand), rel=1e-3)
    save_file({"cents": torch.tensor([3000.0, 4000, 5000, 6000])}, tmp_path / "voices.safetensors")
    assert pitch.compare(student, "voices")["50 cents"] == 50.0  # every voice counts


def test_outputs_are_computed_anew_for_other_frames(audio, tmp_path, monkeypatch):
    pitch, capacities = audio.Pitch(tmp_path), []

    def crepe(capacity):
        capacities.append(capacity)
        torch.manual_seed(0)
        return audio.Crepe(1).eval()

    monkeypatch.setattr(pitch, "crepe", crepe)
    for seed, computed in ((0, 1), (0, 1), (1, 2)):
        frames = torch.randn(2, 1024, generator=torch.Generator().manual_seed(seed))
        save_file({"frames": frames, "cents": torch.zeros(2)}, tmp_path / "val.safetensors")
        torch.testing.assert_close(pitch.outputs("tiny", "val"), audio.logits_of(crepe("own"), frames))
        assert capacities.count("tiny") == computed
