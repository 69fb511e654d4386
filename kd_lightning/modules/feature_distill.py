"""Distillation of features alone, without labels and without logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.cache.tensors import token_mask
from kd_lightning.errors import InputError
from kd_lightning.features.arrange import usual_layout
from kd_lightning.features.capture import capture, evaluating
from kd_lightning.features.channels import Layout, layout_of_layer
from kd_lightning.features.outputs import feature_of_output
from kd_lightning.features.pair import FeaturePair
from kd_lightning.features.pooling import How as Pooling
from kd_lightning.features.pooling import Pool
from kd_lightning.features.term import FeatureTerm
from kd_lightning.features.trace import check_rows
from kd_lightning.inputs import Inputs, call, map_inputs, rows_of, take_rows
from kd_lightning.losses.features import CosineLoss
from kd_lightning.modules._shared.checks import check_same_teacher, check_two_networks
from kd_lightning.modules._shared.feature_terms import Captured, FeatureTerms
from kd_lightning.modules._shared.loss_terms import LossTerm, SampleTerm
from kd_lightning.modules._shared.network_errors import explain_shapes
from kd_lightning.modules._shared.optimizers import build_optimizer, build_optimizers
from kd_lightning.modules._shared.representation_pass import RepresentationPass
from kd_lightning.modules._shared.stage_gradients import with_all_gradients
from kd_lightning.modules._shared.student_module import StudentModule
from kd_lightning.teachers.cache_fill import fill_caches
from kd_lightning.teachers.teacher import Teacher

_NO_TEACHER = "training needs the teachers; teachers=None is for test and predict alone"


class FeatureDistillModule(StudentModule):
    """Train a backbone on the features of one or several frozen teachers: without labels, and without logits.

    The objective is the sum of the feature terms. Labels are never used for training; any pictures will do.
    ``student.safetensors`` holds the backbone alone, which timm and torchvision load. A later run fine-tunes it with
    few labels: ``load_weights``, ``reset_classifier``, ``LayerwiseFinetuning``.

    Logs ``train/loss``, and of each term ``train/<name>`` (without its weight), ``<name>_weight`` and ``val/<name>``.
    ``val/loss`` is the sum of the terms that have a value in validation, with their whole weights, so that epochs of a
    warm-up compare. Validation and test also measure the student's features (the deepest layer that a term names, as
    one vector of each sample), on at most 4096 samples:

    - ``knn_accuracy`` and ``probe_accuracy``: accuracies of a vote of 20 neighbours, and of a linear probe, both by
      leaving out one sample. They need labels, which training does not see.
    - ``teacher_knn_accuracy``: the same vote by the teacher's features.
    - ``rankme``: the effective rank. Near 1, the backbone has collapsed.
    - ``neighbor_agreement``: the share of a sample's 20 nearest neighbours that are the teacher's, too.

    With several teachers, ``teacher_<k>_knn_accuracy`` and ``teacher_<k>_neighbor_agreement`` are those of teacher k.

    Args:
        student: The backbone. It is called as in :class:`SupervisedModule`, and may return what
            :func:`~kd_lightning.features.outputs.feature_of_output` takes. What no term reaches, such as a classifier,
            stays as it is; a line names it.
        teachers: A trained network or a :class:`Teacher` around it, or a list of several. None is for ``test`` and
            ``predict`` alone.
        features: Terms that compare layers of student and teacher, by name. With a list of teachers, a teacher's layer
            begins with its number: ``"0.blocks.11"``. Default: None, which means
            :class:`~kd_lightning.losses.features.CosineLoss` between the outputs, pooled where they are maps or tokens:
            a term ``global``, or ``global_<k>`` for each teacher of a list.
        **kwargs: ``optimizer``, ``lr_scheduler``, ``lr_interval`` and ``weight_decay_exclude_1d``, as of
            :class:`SupervisedModule`.

    Raises:
        InputError: If a layer does not exist, or its output is no feature; if no projector joins two shapes; if a
            student's feature has no gradient; if a teacher has options for logits (``classes``, ``cache_top_k``); if
            student and teacher share what training changes; if no term has a weight in an epoch; if there is no teacher
            in training; if a run is resumed with another teacher.
    """

    task: ClassVar[str] = "features"
    """What the student's outputs are: no logits."""

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | list[nn.Module] | None,
        features: dict[str, FeatureTerm] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        self.save_hyperparameters({"lr_interval": self.lr_interval})
        several = isinstance(teachers, list | tuple | nn.ModuleList)
        given: list[Any] = [] if teachers is None else [*teachers] if several else [teachers]  # type: ignore[misc]
        if several and not given:
            raise InputError("teachers must be a network, or a list of at least one, got an empty list")
        self.teachers = nn.ModuleList()
        for number, teacher in enumerate(given):
            name = self._name_of(number, several)
            check_two_networks(name, teacher, student)
            teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
            for option in ("classes", "cache_top_k"):
                if getattr(teacher, option) is not None:
                    raise InputError(f"{name}: {option} is for logits, but {type(self).__name__} learns from features")
            teacher.share_layers(student)
            teacher.needs_logits = False
            self.teachers.append(teacher)
        terms = FeatureTerms(_default_terms(len(given) if several else None) if features is None else features, several)
        if not terms:
            raise InputError("features must hold at least one term, got none")
        self._pools: dict[str, Pooling] = {
            pair.student: pair.pool or "mean" for term in terms.all.values() for pair in term.pairs
        }
        self._deepest_last: list[str] = []  # the student's layers, see layers_in_order()
        for number, layers in enumerate(terms.teacher_layers(len(given)) if given else ()):
            if not layers:
                raise InputError(f"{self._name_of(number, several)}: no term of features has a layer of it")
        self.features = terms if given else FeatureTerms(None, several)
        self._layouts: dict[tuple[str, str], Layout] = {}  # of networks' layers, see _layout_of()
        self._passes: dict[int, RepresentationPass] = {}  # by number of the data loader
        self._is_announced = False

    def _name_of(self, number: int, several: bool | None = None) -> str:
        several = self.features.several if several is None else several
        return f"teachers[{number}]" if several else "teachers"

    @property
    def feature_teachers(self) -> Sequence[nn.Module]:
        """The teachers, whose layers the terms compare with the student's."""
        if not len(self.teachers):
            raise InputError(_NO_TEACHER)
        return [*self.teachers]

    def forward(self, x: Inputs) -> Tensor:
        """Return the student's output, (B, C) or (B, ...)."""
        return feature_of_output(self._call_student(x), "the student")

    def _call_student(self, x: Inputs) -> Any:
        try:
            return self.guarded_call("student", self.student, x)
        except RuntimeError as error:
            explain_shapes(error, x)
            raise

    # Training.

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the feature terms that have a weight in this epoch."""
        with self.capture_features(batch) as captured:
            self._call_student(batch.x)
        terms = self.feature_losses(captured, batch)
        if not terms:
            raise InputError(f"features: no term has a weight in epoch {self.term_epoch}; lower begin_epoch of one")
        name, (weight, value) = next(iter(terms.items()))
        reached = self._reached([*terms])
        return terms | {name: SampleTerm(weight, with_all_gradients(self, value, lambda: reached))}

    def _reached(self, names: Sequence[str]) -> list[nn.Parameter]:
        """Return the parameters that the named terms train."""
        below = frozenset().union(*(self.features.parameters_below.get(name, frozenset()) for name in names))
        own = [p for name, p in self.student.named_parameters() if name in below]
        return [*own, *(p for name in names for p in self.features.all[name].parameters())]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Runs at the start of fit. Builds the optimiser of what the terms train, and the scheduler."""
        if not self.features.parameters_below:
            raise InputError("features: not built yet; use Trainer.fit, or call build_features(batch) before")
        return build_optimizers(self, build_optimizer(self, self._reached([*self.features.all])))

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, hashes the teachers' weights before a plugin casts them."""
        super().setup(stage)
        self._passes.clear()
        self._is_announced = False
        if stage == TrainerFn.FITTING:
            for teacher in self.feature_teachers:
                assert isinstance(teacher, Teacher)
                teacher.fingerprint(anew=True)

    def on_fit_start(self) -> None:
        """Runs at the start of fit. Fills the teachers' caches, and names what no term trains."""
        super().on_fit_start()
        fill_caches(self.teachers, self.trainer)
        reached = {id(p) for p in self._reached([*self.features.all])}
        rest = [name for name, p in self.student.named_parameters() if p.requires_grad and id(p) not in reached]
        if rest:
            more = f", and {len(rest) - 5} more" if len(rest) > 5 else ""
            rank_zero_info(f"student: no term reaches {', '.join(rest[:5])}{more}, so that they stay as they are")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Adds the teachers' fingerprints, not the teachers."""
        super().on_save_checkpoint(checkpoint)
        if len(self.teachers):
            checkpoint["teacher_fingerprints"] = [teacher.fingerprint() for teacher in self.teachers]  # type: ignore[operator]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. In a fit, refuses other teachers."""
        if not len(self.teachers):  # without them there are no terms
            state = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {key: value for key, value in state if not key.startswith("features.")}
        super().on_load_checkpoint(checkpoint)
        self.features.set_teacher_layers([*self.teachers])
        saved = checkpoint.get("teacher_fingerprints")
        if not self.is_fitting or not saved:
            return
        if len(saved) != len(self.teachers):
            raise InputError(
                f"teachers: the checkpoint was trained with {len(saved)} of them, got {len(self.teachers)}"
            )
        for number, (teacher, fingerprint) in enumerate(zip(self.teachers, saved, strict=True)):
            assert isinstance(teacher, Teacher)
            check_same_teacher(self._name_of(number), teacher, fingerprint)

    # Evaluation.

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Runs for each validation batch. Updates the means of the terms, and collects features."""
        self._evaluate(self.unpack(batch), dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Runs for each test batch. Collects features."""
        self._evaluate(self.unpack(batch), dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Runs for each batch of predict. Returns the student's output as one vector (B, C) of each sample."""
        batch = self.unpack(batch)
        return self.student_vector("", self(batch.x), batch)

    def evaluated_features(self) -> list[str]:
        """Return the names of the terms that a validation measures: in a fit, all that have a value there."""
        return [name for name, term in self.features.all.items() if self.is_fitting and not term.trains_only]

    def _evaluate(self, batch: Batch, loader: int) -> None:
        teachers, layer = [*self.teachers], self.layers_in_order(batch)[-1]
        if teachers and not self.features.is_built:  # no fit: terms are built from training inputs alone
            for teacher, paths in zip(self.teachers, self.features.teacher_layers(len(teachers)), strict=True):
                teacher.layers = dict.fromkeys(paths)  # type: ignore[assignment]
        capturing = self.features.capturing(self.student, teachers, batch, dict.fromkeys(self.features.all, 1.0))
        with capture(self.student, [layer]) as own, capturing if teachers else nullcontext(Captured()) as captured:
            self._call_student(batch.x)
        self.features.record(captured, batch, self.evaluated_features())
        if self.trainer.sanity_checking:  # too few samples
            return
        vectors = {}
        for number, name in enumerate(self._teacher_names()):
            vectors[name] = self.teacher_vector(number, captured.teacher, batch)
        collected = self._passes.setdefault(loader, RepresentationPass())
        vector = self.student_vector(layer, own[layer], batch)
        collected.add(batch, vector, vectors, self.global_rank, self.trainer.world_size)

    def _teacher_names(self) -> list[str]:
        return [f"teacher_{number}" if self.features.several else "teacher" for number in range(len(self.teachers))]

    def teacher_vector(self, number: int, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return a teacher's feature that a term compares with the deepest layer of the student, as vectors (B, C).

        Args:
            number: Number of the teacher.
            outputs: Outputs of teachers' layers, by their names in the terms.
            batch: The batch.
        """
        paths = {name: path for path, name in self.features.teacher_layers(len(self.teachers))[number].items()}
        pairs = [pair for term in self.features.all.values() for pair in term.pairs if pair.teacher in paths]
        order = self.layers_in_order(batch)
        pair: FeaturePair = max(pairs, key=lambda pair: (order.index(pair.student), pair.teacher))
        feature, teacher = outputs[pair.teacher], self.teachers[number]
        assert isinstance(teacher, Teacher)
        if feature.ndim < 3:  # it may be pooled already
            return feature.view(len(feature), -1)

        def run(network: nn.Module, x: Inputs) -> Any:
            return call(network, teacher.prepare(map_inputs(torch.clone, x)))  # it may change them

        where = f"teacher {number}", teacher.network, paths[pair.teacher]
        layout = self._layout_of(*where, feature, batch.teacher_x, run)
        mask = batch.position_mask if batch.teacher_inputs is None else token_mask(batch.teacher_x)
        return Pool(pair.pool or "mean", layout)(feature, mask)

    def layers_in_order(self, batch: Batch) -> list[str]:
        """Return the student's layers that the terms name, the deepest one last: by a pass of some samples."""
        if not self._deepest_last:
            x = take_rows(batch.x, slice(2), rows_of(batch.x))
            with evaluating(self.student), torch.no_grad(), capture(self.student, [*self._pools]) as outputs:
                self.call(self.student, x)
            check_rows("student", outputs, self._pools, rows_of(x))
            self._deepest_last = [*outputs]  # in the order of their calls
        return self._deepest_last

    def student_vector(self, layer: str, feature: Tensor, batch: Batch) -> Tensor:
        """Return an output of one of the student's layers as vectors (B, C)."""
        if feature.ndim < 3:
            return feature.view(len(feature), -1)
        layout = self._layout_of("student", self.student, layer, feature, batch.x, self.call)
        return Pool(self._pools.get(layer, "mean"), layout)(feature, batch.position_mask)

    def _layout_of(
        self, who: str, network: nn.Module, layer: str, feature: Tensor, x: Inputs, run: Callable[..., Any]
    ) -> Layout:
        if (who, layer) not in self._layouts:
            found = layout_of_layer(network, layer, x, run)
            self._layouts[who, layer] = found or usual_layout(feature.shape[1:])
        return self._layouts[who, layer]

    def on_validation_epoch_end(self) -> None:
        """Runs at the end of each validation. Logs the terms, their sum, and the figures of the features."""
        if values := self.log_feature_means():
            weights = {f"val/{name}": term.weight for name, term in self.features.all.items()}
            loss = sum(weight * values[chart] for chart, weight in weights.items() if chart in values)
            self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self._log_figures("val", "val")

    def on_test_epoch_end(self) -> None:
        """Runs at the end of the test. Logs the figures of the features."""
        transductive = getattr(getattr(self.trainer, "datamodule", None), "transductive", False)
        self._log_figures("test", "transductive/test" if transductive else "test")

    def _log_figures(self, stage: str, prefix: str) -> None:
        for number, collected in self._passes.items():
            figures = collected.compute(stage, self.trainer, announce=not self._is_announced)
            for name, value in self.trainer.strategy.broadcast(figures).items():
                bar = name in ("knn_accuracy", "neighbor_agreement")
                self.log(f"{prefix}/{name}" + (f"/{number}" if number else ""), value, prog_bar=bar, sync_dist=True)
        self._is_announced = self._is_announced or bool(self._passes)
        self._passes.clear()


def _default_terms(teachers: int | None) -> dict[str, FeatureTerm]:
    """Return a cosine term between the outputs: for a teacher alone (None), or for each one of a list."""
    if teachers is None:
        return {"global": FeatureTerm({"": ""}, CosineLoss(), pool="mean")}
    return {f"global_{k}": FeatureTerm({"": f"{k}."}, CosineLoss(), pool="mean") for k in range(teachers)}
