"""A command line of your own: LightningCLI with your own module. ``python own_cli.py fit --config own_cli.yaml``."""

from lightning.pytorch.cli import LightningCLI
from torchmetrics.classification import MulticlassAccuracy

from kd_lightning import DistillModule, SemiSupervisedDataModule, StudentWriter


class TopTwoModule(DistillModule):
    """Distillation whose validation also measures how often the label is among the two likeliest classes."""

    def configure_metrics(self):
        """Return the metrics of validation and test, by name."""
        return {
            "accuracy": MulticlassAccuracy(10, average="micro"),
            "top_two": MulticlassAccuracy(10, average="micro", top_k=2),
        }


class OwnCLI(LightningCLI):
    """LightningCLI whose module and data share one seed, and which leaves ``student.safetensors``."""

    def add_arguments_to_parser(self, parser):
        """Add what is the same in all of our runs."""
        parser.add_lightning_class_args(StudentWriter, "student_file")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.set_defaults({"trainer.default_root_dir": "runs/own_cli"})


if __name__ == "__main__":
    OwnCLI(TopTwoModule, SemiSupervisedDataModule, seed_everything_default=0)
