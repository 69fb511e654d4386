"""Knowledge distillation and learning from few labels with PyTorch Lightning."""

from kd_lightning.active.loop import ActiveLearningLoop
from kd_lightning.batch import Batch
from kd_lightning.callbacks import (
    ActivationCalibration,
    BaselineMonitor,
    CompileNetworks,
    LayerwiseFinetuning,
    PredictionWriter,
    PseudoLabelRefresh,
    QuantizedWeightHistograms,
    SeedEveryStep,
    SoftWeightAnnealing,
    StudentWriter,
)
from kd_lightning.data import (
    ClassSubset,
    CoarseLabels,
    DatasetSource,
    Digits,
    FakeData,
    ImageFolder,
    PairNoise,
    RotatedClasses,
    SemiSupervisedDataModule,
    SymmetricNoise,
    TorchvisionDataset,
    TransitionNoise,
)
from kd_lightning.errors import InputError
from kd_lightning.features.heads import reset_classifier
from kd_lightning.modules import (
    ApprenticeModule,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    PseudoLabelModule,
    SupervisedModule,
)
from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
from kd_lightning.runs.weights import load_weights
from kd_lightning.teachers.teacher import Teacher

__all__ = [
    "ActivationCalibration",
    "ActiveLearningLoop",
    "ApprenticeModule",
    "BaselineMonitor",
    "Batch",
    "ClassSubset",
    "CoTeachingModule",
    "CoarseLabels",
    "CompileNetworks",
    "DatasetSource",
    "Digits",
    "DistillModule",
    "EnsembleDistillModule",
    "FakeData",
    "GraphPseudoLabels",
    "HintModule",
    "ImageFolder",
    "InputError",
    "LayerwiseFinetuning",
    "PairNoise",
    "PredictionWriter",
    "PseudoLabelModule",
    "PseudoLabelRefresh",
    "QuantizedWeightHistograms",
    "RotatedClasses",
    "SeedEveryStep",
    "SemiSupervisedDataModule",
    "SoftWeightAnnealing",
    "StudentWriter",
    "SupervisedModule",
    "SymmetricNoise",
    "Teacher",
    "TorchvisionDataset",
    "TransitionNoise",
    "load_weights",
    "reset_classifier",
]
