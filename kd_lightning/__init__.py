"""Knowledge distillation and learning from few labels with PyTorch Lightning. Public names are loaded when used."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_lightning.active.loop import ActiveLearningLoop
    from kd_lightning.batch import Batch
    from kd_lightning.callbacks import (
        ActivationCalibration,
        BaselineMonitor,
        CompileNetworks,
        EvaluationWriter,
        ExactResume,
        GradientBalance,
        LayerwiseFinetuning,
        PredictionWriter,
        PseudoLabelRefresh,
        QuantizedWeightHistograms,
        SeedEveryStep,
        SoftWeightAnnealing,
        StudentWriter,
    )
    from kd_lightning.cli.short.distill import distill
    from kd_lightning.cli.short.label import label
    from kd_lightning.data import (
        ClassSubset,
        CoarseLabels,
        DatasetSource,
        DigitAngles,
        DigitProperties,
        Digits,
        FakeData,
        HuggingFaceSource,
        HuggingFaceStream,
        ImageFolder,
        ImageMaskFolder,
        ImageTable,
        PairNoise,
        RotatedClasses,
        SemiSupervisedDataModule,
        StreamDataModule,
        SymmetricNoise,
        TextSource,
        TorchvisionDataset,
        TransitionNoise,
    )
    from kd_lightning.errors import InputError
    from kd_lightning.features.heads import reset_classifier
    from kd_lightning.features.simkd import SimKDStudent
    from kd_lightning.features.term import FeatureTerm
    from kd_lightning.modules import (
        ABCModule,
        ApprenticeModule,
        CoTeachingModule,
        DistillationTokenModule,
        DistillModule,
        EnsembleDistillModule,
        FeatureDistillModule,
        HintModule,
        PseudoLabelModule,
        SimKDModule,
        SupervisedModule,
    )
    from kd_lightning.modules.teaching import teach
    from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
    from kd_lightning.pseudo_labels.selection import (
        AdaMatch,
        DistributionAlignment,
        FixedThreshold,
        FlexMatch,
        FreeMatch,
        LabelThresholds,
        OpenSetFilter,
        Selection,
        Sharpen,
        SoftMatch,
        TopKPerClass,
        UncertaintyThreshold,
    )
    from kd_lightning.runs.run import Run
    from kd_lightning.runs.weights import load_weights
    from kd_lightning.schedules import ChainedSchedule, SequentialSchedule
    from kd_lightning.teachers.cross_fitted import CrossFittedTeacher
    from kd_lightning.teachers.teacher import Teacher

    __version__: str

__all__ = [
    "ABCModule",
    "ActivationCalibration",
    "ActiveLearningLoop",
    "AdaMatch",
    "ApprenticeModule",
    "BaselineMonitor",
    "Batch",
    "ChainedSchedule",
    "ClassSubset",
    "CoTeachingModule",
    "CoarseLabels",
    "CompileNetworks",
    "CrossFittedTeacher",
    "DatasetSource",
    "DigitAngles",
    "DigitProperties",
    "Digits",
    "DistillModule",
    "DistillationTokenModule",
    "DistributionAlignment",
    "EnsembleDistillModule",
    "EvaluationWriter",
    "ExactResume",
    "FakeData",
    "FeatureDistillModule",
    "FeatureTerm",
    "FixedThreshold",
    "FlexMatch",
    "FreeMatch",
    "GradientBalance",
    "GraphPseudoLabels",
    "HintModule",
    "HuggingFaceSource",
    "HuggingFaceStream",
    "ImageFolder",
    "ImageMaskFolder",
    "ImageTable",
    "InputError",
    "LabelThresholds",
    "LayerwiseFinetuning",
    "OpenSetFilter",
    "PairNoise",
    "PredictionWriter",
    "PseudoLabelModule",
    "PseudoLabelRefresh",
    "QuantizedWeightHistograms",
    "RotatedClasses",
    "Run",
    "SeedEveryStep",
    "Selection",
    "SemiSupervisedDataModule",
    "SequentialSchedule",
    "Sharpen",
    "SimKDModule",
    "SimKDStudent",
    "SoftMatch",
    "SoftWeightAnnealing",
    "StreamDataModule",
    "StudentWriter",
    "SupervisedModule",
    "SymmetricNoise",
    "Teacher",
    "TextSource",
    "TopKPerClass",
    "TorchvisionDataset",
    "TransitionNoise",
    "UncertaintyThreshold",
    "distill",
    "label",
    "load_weights",
    "reset_classifier",
    "teach",
]

_HOMES = {
    "ABCModule": "modules",
    "ActivationCalibration": "callbacks",
    "ActiveLearningLoop": "active.loop",
    "AdaMatch": "pseudo_labels.selection",
    "ApprenticeModule": "modules",
    "BaselineMonitor": "callbacks",
    "Batch": "batch",
    "ChainedSchedule": "schedules",
    "ClassSubset": "data",
    "CoTeachingModule": "modules",
    "CoarseLabels": "data",
    "CompileNetworks": "callbacks",
    "CrossFittedTeacher": "teachers.cross_fitted",
    "DatasetSource": "data",
    "DigitAngles": "data",
    "DigitProperties": "data",
    "Digits": "data",
    "DistillModule": "modules",
    "DistillationTokenModule": "modules",
    "DistributionAlignment": "pseudo_labels.selection",
    "EnsembleDistillModule": "modules",
    "EvaluationWriter": "callbacks",
    "ExactResume": "callbacks",
    "FakeData": "data",
    "FeatureDistillModule": "modules",
    "FeatureTerm": "features.term",
    "FixedThreshold": "pseudo_labels.selection",
    "FlexMatch": "pseudo_labels.selection",
    "FreeMatch": "pseudo_labels.selection",
    "GradientBalance": "callbacks",
    "GraphPseudoLabels": "pseudo_labels.graph_labels",
    "HintModule": "modules",
    "HuggingFaceSource": "data",
    "HuggingFaceStream": "data",
    "ImageFolder": "data",
    "ImageMaskFolder": "data",
    "ImageTable": "data",
    "InputError": "errors",
    "LabelThresholds": "pseudo_labels.selection",
    "LayerwiseFinetuning": "callbacks",
    "OpenSetFilter": "pseudo_labels.selection",
    "PairNoise": "data",
    "PredictionWriter": "callbacks",
    "PseudoLabelModule": "modules",
    "PseudoLabelRefresh": "callbacks",
    "QuantizedWeightHistograms": "callbacks",
    "RotatedClasses": "data",
    "Run": "runs.run",
    "SeedEveryStep": "callbacks",
    "Selection": "pseudo_labels.selection",
    "SemiSupervisedDataModule": "data",
    "SequentialSchedule": "schedules",
    "Sharpen": "pseudo_labels.selection",
    "SimKDModule": "modules",
    "SimKDStudent": "features.simkd",
    "SoftMatch": "pseudo_labels.selection",
    "SoftWeightAnnealing": "callbacks",
    "StreamDataModule": "data",
    "StudentWriter": "callbacks",
    "SupervisedModule": "modules",
    "SymmetricNoise": "data",
    "Teacher": "teachers.teacher",
    "TextSource": "data",
    "TopKPerClass": "pseudo_labels.selection",
    "TorchvisionDataset": "data",
    "TransitionNoise": "data",
    "UncertaintyThreshold": "pseudo_labels.selection",
    "distill": "cli.short.distill",
    "label": "cli.short.label",
    "load_weights": "runs.weights",
    "reset_classifier": "features.heads",
    "teach": "modules.teaching",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    """Load a public name or a module of this package at its first use."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import version

        return version("kd-lightning")
    module = f"{__name__}.{name}"
    if not name.startswith("_"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
