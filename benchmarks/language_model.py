"""Two GPT-2s of characters: the small one alone, and taught by one 12 times larger.

Run: python benchmarks/text.py --packages DIR --prepare data/mails                 (see there; a minute)
     python -m kd_lightning fit --config configs/text_causal_lm_teacher.yaml       (the teacher; 3 minutes)
     python benchmarks/language_model.py --settings [--store FILE] [--processes 2] (selects the settings; 4 minutes)
     python benchmarks/language_model.py [--seeds 3] [--store FILE] [--processes 2]      (4 minutes)

The text is that of benchmarks/text.py's mails, in pieces of 64 characters. The teacher has seen all training pieces,
the student 8000 of them, three times. The figure is the mean negative log likelihood of a character, in nats, over the
pieces of the test mails; the settings are selected on those of the validation mails. A seed sets the initial
weights; the order is the same for all, since the teacher's outputs are cached. Differences are paired by seed.
"""

import itertools
from functools import partial
from pathlib import Path

import torch
import yaml
from mails import Characters, content_hash
from torch import nn
from training import Fits, in_parallel, interval, make_parser, quiet, spread, train, versions

from kd_lightning import DatasetSource, DistillModule, SemiSupervisedDataModule, SupervisedModule, Teacher
from kd_lightning.losses import KDLoss
from kd_lightning.runs.build import build

CONFIG = Path(__file__).parent.parent / "configs/text_causal_lm.yaml"
WEIGHTS = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["teacher"]["init_args"]["network"]["init_args"][
    "path"
]
STEPS = 1500  # three epochs of 8000 pieces, 16 a step


@torch.no_grad()
def nats(network, pieces):
    """The mean negative log likelihood of a character, given those before it in its piece."""
    network.eval()
    total = 0.0
    for ids in pieces.ids.split(64):
        logits = network(ids).logits[:, :-1]
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / pieces.ids[:, 1:].numel()


def network_of(role):
    """The config's student or teacher."""
    node = yaml.safe_load(CONFIG.read_text())["model"]["init_args"][role]
    return build(nn.Module, node["init_args"]["network"] if role == "teacher" else node)


def fit(folder, seed, part, lr, temperature=None, soft_weight=None):
    """Train from a seed, distilled where there is a temperature, and measure on a part."""
    parts = Characters(folder, "train", 8000), Characters(folder, part)
    cached = {} if temperature is None else {"num_views": 1}
    source = DatasetSource(*parts, dense=True)
    data = SemiSupervisedDataModule(source, val_size=0, batch_size=16, seed=0, **cached)
    method = SupervisedModule
    if temperature is not None:
        teacher = Teacher(network_of("teacher"), cache=f"{folder}/outputs", cache_top_k=16)
        method = partial(DistillModule, teacher=teacher, soft_loss=KDLoss(temperature), soft_weight=soft_weight)
    method = partial(method, class_dim=-1, causal=True)
    return nats(train(STEPS, seed, partial(network_of, "student"), method, data, lr=lr).student, parts[1])


GRID = {
    "alone": {"lr": (0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01)},  # as many tries
    "distilled": {"lr": (0.003, 0.01), "temperature": (1.0, 2.0), "soft_weight": (0.5, 0.9)},
}
# The best setting of each.
METHODS = {"alone": {"lr": 0.006}, "distilled": {"lr": 0.003, "temperature": 1.0, "soft_weight": 0.9}}
SETTING_SEED = 100


def run(fits, folder, part, case):
    """The figure of one seed, method and setting."""
    seed, method, setting = case
    files = [f"{folder}/train.npz", f"{folder}/{part}.npz", *([WEIGHTS] if method == "distilled" else [])]
    key = [seed, part, method, setting, content_hash(CONFIG, *files)]
    return fits.get(key, partial(fit, folder, seed, part, **setting))


def settings(fits, folder, processes):
    """Print the table of all settings, on pieces of the validation mails."""
    cases = [
        (SETTING_SEED, method, dict(zip(grid, values, strict=True)))
        for method, grid in GRID.items()
        for values in itertools.product(*grid.values())
    ]
    print("| | setting | nats a character |\n|---|---|---|")
    found = in_parallel(partial(run, fits, folder, "val"), cases, processes)
    for (_, method, setting), value in zip(cases, found, strict=True):
        print(f"| {method} | {', '.join(f'{name} {value}' for name, value in setting.items())} | {value:.4f} |")


def compare(fits, folder, seeds, processes):
    """Print the table of test figures, and of the paired differences."""
    cases = [(seed, method, setting) for seed in range(seeds) for method, setting in METHODS.items()]
    found = in_parallel(partial(run, fits, folder, "test"), cases, processes)
    values = {name: [v for (_, method, _), v in zip(cases, found, strict=True) if method == name] for name in METHODS}
    teacher = network_of("teacher")
    print("| | weights | nats a character, test | over alone |\n|---|---|---|---|")
    sizes = [sum(p.numel() for p in network.parameters()) for network in (teacher, network_of("student"))]
    print(f"| teacher | {sizes[0]:,} | {nats(teacher, Characters(folder, 'test')):.4f} | |")
    for method, own in values.items():
        gain = interval(own, values["alone"], digits=4) if method != "alone" else ""
        print(f"| {method} | {sizes[1]:,} | {spread(own, digits=4)} | {gain} |")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--folder", default="data/mails", help="folder of the mails; default: data/mails")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", action="store_true", help="select the settings, on validation mails")
    options = parser.parse_args()
    quiet()
    fits = Fits(options.store)
    if options.settings:
        settings(fits, options.folder, options.processes)
    else:
        compare(fits, options.folder, options.seeds, options.processes)
    print(versions("transformers"))
