"""Transfer from the digits 0 to 4 to 5 to 9, for benchmarks/weak_labels.py."""

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
        digits = ClassSubset(Digits(), [0, 1, 2, 3, 4])
        rotated = RotatedClasses(digits)
        self.weights = {"0 to 4": self.pretrain(digits, 5, STEPS)}
        self.weights["0 to 4, rotated"] = self.pretrain(rotated, 20, 1000, train_transform=strong_moves())

    def pretrain(self, source, classes, steps, **data):
        """Weights of a network of the first digits, and the number of its classes."""
        images = make_digits(val_size=0, seed=self.seed, batch_size=64, **data)
        images.source = source

        def make(**options):
            return SupervisedModule(DigitsCNN(32, num_classes=classes), **options)

        return train(steps, self.seed, make, images, lr=0.005).student.state_dict(), classes

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

        def make(**options):
            weights, classes = self.weights[origin] if origin else (None, 5)
            student = DigitsCNN(32, num_classes=classes)
            if weights is not None:
                student.load_state_dict(weights)
                student = reset_classifier(student, 5)
            return SupervisedModule(student, **options)

        callbacks = [LayerwiseFinetuning(**callback)] if callback else []
        return measure(train(STEPS, self.seed, make, data, callbacks, lr=lr), data)

    def all(self):
        """Run every method: {name: accuracy}."""
        return {name: self.fit(**setting) for name, setting in SETTINGS.items()}
