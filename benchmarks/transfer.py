"""Transfer from the digits 0 to 4 to 5 to 9, for benchmarks/weak_labels.py."""

from functools import partial

from few_labels import make_digits
from torchvision.transforms import InterpolationMode
from training import measure, train

from kd_lightning import ClassSubset, Digits, LayerwiseFinetuning, RotatedClasses, SupervisedModule, reset_classifier
from kd_lightning.data.transforms import RandomAffine
from kd_lightning.models import DigitsCNN

STEPS = 400
SETTINGS = {
    "from scratch": {"origin": None, "lr": 0.003},
    "0 to 4, all layers alike": {"origin": "0 to 4", "lr": 0.01},
    "0 to 4, rotated, lower rates below": {
        "origin": "0 to 4, rotated",
        "lr": 0.01,
        "frozen_epochs": 0,
        "lr_decay": 0.5,
    },
}


def strong_moves():
    """Shifts, rotations, scales and shears, twice as strong as the usual ones."""
    ranges = {"degrees": 25, "translate": (0.125, 0.125), "scale": (0.8, 1.25), "shear": 15}
    return RandomAffine(**ranges, interpolation=InterpolationMode.BILINEAR)


class Transfer:
    """Transfer from the digits 0 to 4, with all labels, to 5 to 9, with 2 labels per class."""

    def __init__(self, seed, val_size=0):
        self.seed = seed
        self.val_size = val_size
        self._first = {}

    def first(self, origin):
        """Weights of a network of the first digits, and the number of its classes."""
        if origin not in self._first:
            source, classes, steps, data = ClassSubset(Digits(), [0, 1, 2, 3, 4]), 5, STEPS, {}
            if origin == "0 to 4, rotated":
                source, classes, steps, data = RotatedClasses(source), 20, 1000, {"train_transform": strong_moves()}
            images = make_digits(val_size=0, seed=self.seed, batch_size=64, **data)
            images.source = source
            make = partial(DigitsCNN, 32, num_classes=classes)
            module = train(steps, self.seed, make, SupervisedModule, images, lr=0.005)
            self._first[origin] = module.student.state_dict(), classes
        return self._first[origin]

    def fit(self, origin, lr=0.01, **callback):
        """Accuracy on the new digits, from weights that were trained on the first ones, or from scratch."""
        data = make_digits(
            labeled=2,
            unlabeled="none",
            val_size=self.val_size,
            seed=self.seed,
            batch_size=32,
            views_per_epoch=64,
        )
        data.source = ClassSubset(Digits(), [5, 6, 7, 8, 9])

        weights, classes = self.first(origin) if origin else (None, 5)

        def make():
            student = DigitsCNN(32, num_classes=classes)
            if weights is None:
                return student
            student.load_state_dict(weights)
            return reset_classifier(student, 5)

        callbacks = [LayerwiseFinetuning(**callback)] if callback else []
        return measure(train(STEPS, self.seed, make, SupervisedModule, data, callbacks, lr), data)

    def plan(self):
        """Every method: {name: function that trains, and returns the accuracy}."""
        return {name: partial(self.fit, **setting) for name, setting in SETTINGS.items()}
