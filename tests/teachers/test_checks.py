"""Each fault is planted and must be named; a healthy teacher must not be complained of."""

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy.stats import binomtest, entropy, sem
from scipy.stats import t as t_distribution
from torch import nn
from torchvision.transforms import v2

from kd_lightning.batch import Batch
from kd_lightning.data import Digits
from kd_lightning.errors import InputError
from kd_lightning.losses import DISTLoss, HardDistillationLoss, KDLoss, TTMLoss, WTTMLoss
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import DistillModule, PseudoLabelModule
from kd_lightning.pseudo_labels.selection.fixed_threshold import FixedThreshold
from kd_lightning.teachers.checks import (
    NORMALISATIONS,
    accuracy,
    class_order,
    eval_mode,
    normalisation,
    soft_targets,
)
from kd_lightning.teachers.findings import Finding, collect_logits, match_labels, with_teacher_name
from kd_lightning.teachers.teacher import Teacher
from kd_lightning.teachers.training_checks import gradients, labels

PARTS = Digits().load()
X, Y = PARTS.train.images.tensors[0], PARTS.train.targets
VAL = [Batch(x, y) for x, y in zip(PARTS.test.images.tensors[0].split(100), PARTS.test.targets.split(100), strict=True)]
TRUTH = PARTS.test.targets


@pytest.fixture(scope="module")
def plain(train_digits):
    """Trained on pixels in [0, 255]."""
    torch.manual_seed(0)
    return train_digits(DigitsCNN(16), lambda x: 255 * x)


def matched(network, batches=VAL, task="multiclass", y=TRUTH):
    teacher = network if isinstance(network, Teacher) else Teacher(network)
    return match_labels(collect_logits(teacher, batches, task), y, task)


class Wrapped(nn.Module):
    """A network whose outputs are changed."""

    def __init__(self, network, change):
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x):
        return self.change(self.network(x))


class TestAccuracy:
    def test_healthy(self, healthy, student):
        teacher, beginner = matched(healthy), matched(student)
        assert teacher.accuracy > 0.9
        finding = accuracy(teacher, beginner, "multiclass", "validation labels")
        assert finding.hint is None and finding.severity != "error"
        share = max(np.bincount(TRUTH.numpy())) / 600
        low, high = binomtest(int(teacher.correct.sum()), 600).proportion_ci(method="exact")
        assert f"of 600 validation labels right (95% interval {low:.1%} to {high:.1%}, " in finding.text
        assert f"chance {100 * share:.1f}%, present student" in finding.text
        assert finding.text.startswith(f"{100 * teacher.accuracy:.1f}%")

    def test_untrained(self, teacher):
        finding = accuracy(matched(teacher), None, "multiclass", "labels")
        assert finding.severity == "error" and "is it trained" in finding.hint

    def judged(self, right, n=600):
        """The severity for ten classes with n labels, so many of them right."""
        y = torch.arange(10).repeat(n // 10)
        wrong = (y + 1 + torch.arange(n) % 9) % 10  # spread evenly, so that only the number counts
        predicted = torch.where(torch.randperm(n, generator=torch.Generator().manual_seed(0)) < right, y, wrong)
        return accuracy(match_labels(F.one_hot(predicted).float(), y, "multiclass"), None, "multiclass", "labels")

    def test_three_standard_errors_above_chance(self):
        limit = round(600 * (0.1 + 3 * math.sqrt(0.09 / 600)))
        assert self.judged(limit - 1).severity == "warning" and "hardly better" in self.judged(limit - 1).hint
        assert self.judged(limit + 1).severity == "info"

    def test_an_error_needs_chance_in_the_interval(self):
        above = next(k for k in range(60, 99) if binomtest(k, 600).proportion_ci(method="exact").low > 0.1)
        assert self.judged(above - 1).severity == "error" and self.judged(above).severity == "warning"
        assert self.judged(0).severity == "error"  # below chance

    @pytest.mark.parametrize(
        ("right", "n", "severity", "few"),
        [
            (6, 60, "warning", True),  # at chance: surely poor, but perhaps better than chance
            (6, 90, "warning", True),
            (10, 100, "error", False),
            (30, 90, "info", False),  # above chance
            (3, 10, "warning", True),
            (7, 10, "info", False),
            (0, 10, "warning", True),
        ],
    )
    def test_few_labels_are_no_error(self, right, n, severity, few):
        finding = self.judged(right, n)
        assert finding.severity == severity
        assert (f"{n} labeled samples are too few to judge" in finding.text) == few
        assert f"of {n} labels right (95% interval" in finding.text

    def test_a_healthy_teacher_on_few_labels(self):
        """Ten classes, of which 4 labels are one: chance is not excluded, but there is no warning."""
        found = match_labels(torch.eye(10)[[1, 1, 1, 2]], torch.tensor([1, 1, 1, 2]), "multiclass")
        finding = accuracy(found, found, "multiclass", "labels")
        assert finding.severity == "info" and "4 labeled samples are too few" in finding.text

    def test_labels_of_one_sample_count_once(self):
        """Six labels of a sample are not six independent decisions."""
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(2, (120, 6), generator=generator).double()
        logits = torch.where(torch.rand(120, 6, generator=generator) < 0.7, y, 1 - y) - 0.5
        found = match_labels(logits, y, "multilabel")
        text = accuracy(found, None, "multilabel", "labels").text
        low, high = binomtest(round(found.accuracy * 120), 120).proportion_ci(method="exact")
        assert found.interval == pytest.approx((low, high), abs=0.005)
        assert "of 720 labels of 120 samples right" in text

    @pytest.mark.parametrize("task", ["multiclass", "binary"])
    def test_nothing_else_is_judged_on_few_labels(self, healthy, task):
        batches = [Batch(VAL[0].x[:99], TRUTH[:99])]
        logits = collect_logits(lambda b: healthy(b.x).roll(1, 1), batches, "multiclass")
        if task == "multiclass":
            found = match_labels(logits, TRUTH[:99], task)
        else:
            found = match_labels(-(TRUTH[:99, None] % 2 - 0.5), TRUTH[:99] % 2, task)
        assert found.accuracy < 0.2
        for finding in (
            class_order(found, task),
            normalisation(Teacher(healthy), batches, found, task, None)[0],
        ):
            assert finding.hint is None and "99 labeled samples are too few" in finding.text

    def test_labels_with_fractions(self):
        with pytest.raises(InputError, match="labels must be whole class numbers, got 1.7"):
            match_labels(torch.eye(3), torch.tensor([0.0, 1.7, torch.nan]), "multiclass")

    def test_a_constant_answer_is_an_error_however_often_right(self):
        y = torch.tensor([0] * 90 + [1] * 10)
        finding = accuracy(
            match_labels(torch.tensor([[1.0, 0.0]]).repeat(100, 1), y, "multiclass"), None, "multiclass", ""
        )
        assert finding.severity == "error" and "90.0%" in finding.text and "chance 90.0%" in finding.text

    def test_less_right_than_a_constant_but_knowing(self):
        """Finds all of a rare class, at the cost of false alarms: no error."""
        y = torch.tensor([0] * 900 + [1] * 100)
        predicted = torch.tensor([0] * 800 + [1] * 200)
        finding = accuracy(match_labels(F.one_hot(predicted).float(), y, "multiclass"), None, "multiclass", "labels")
        assert finding.hint is not None and finding.severity != "error"

    def test_few_labels_give_no_warning(self):
        found = match_labels(torch.eye(3), torch.tensor([1, 2, 0]), "multiclass")
        finding = accuracy(found, None, "multiclass", "labels")
        assert "too few" in finding.text and finding.severity != "error" and finding.hint is None

    def test_no_labels(self, healthy):
        for y in (None, torch.full_like(TRUTH, -100)):
            none = match_labels(collect_logits(Teacher(healthy), VAL, "multiclass"), y, "multiclass")
            finding = accuracy(none, None, "multiclass", "labels")
            assert finding.text == "not checked: there are no labels" and finding.severity != "error"
            assert class_order(none, "multiclass").hint is None
            assert normalisation(Teacher(healthy), VAL, none, "multiclass", None)[0].hint is None

    def test_hidden_labels_do_not_count(self, healthy):
        y = TRUTH.clone()
        y[::2] = -100
        assert len(matched(healthy, y=y).correct) == 300

    def test_a_better_student(self, healthy):
        flipped = Wrapped(healthy, lambda z: torch.where(torch.arange(len(z))[:, None] % 3 == 0, -z, z))
        finding = accuracy(matched(flipped), matched(healthy), "multiclass", "labels")
        assert "student is better" in finding.hint and finding.severity != "error"
        assert accuracy(matched(healthy), matched(healthy), "multiclass", "labels").hint is None

    def test_not_finite(self, healthy):
        broken = Wrapped(healthy, lambda z: torch.where(torch.arange(len(z))[:, None] == 0, torch.nan, z))
        finding = accuracy(matched(broken), None, "multiclass", "labels")
        assert finding.severity == "error" and "not finite for 6 of 600" in finding.text

    def test_labels_outside_the_classes(self, healthy):
        with pytest.raises(InputError, match=r"labels must be 0 ... 9, got 0 ... 10"):
            matched(healthy, y=TRUTH + (TRUTH == 9))

    def test_inputs_that_do_not_fit(self, healthy):
        with pytest.raises(InputError, match=r"inputs of shape \[2, 3, 8, 8\]"):
            collect_logits(Teacher(healthy), [Batch(torch.zeros(2, 3, 8, 8))], "multiclass")


class TestClassOrder:
    def test_healthy(self, healthy):
        assert class_order(matched(healthy), "multiclass").hint is None

    @pytest.mark.parametrize("swapped", [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 5, 4, 3, 6, 7, 8, 9], None])
    def test_named_so_that_it_can_be_pasted(self, healthy, swapped):
        swapped = swapped or torch.randperm(10, generator=torch.Generator().manual_seed(2)).tolist()
        network = Wrapped(healthy, lambda z: z[:, swapped])  # its output j stands for class swapped[j]
        finding = class_order(matched(network), "multiclass")
        assert finding.hint == f"Teacher(network, classes={swapped})"
        cured = eval(finding.hint, {"Teacher": Teacher, "network": network})
        assert matched(cured).accuracy == matched(healthy).accuracy
        assert f"to {100 * matched(healthy).accuracy:.1f}%" in finding.text

    def test_of_a_teacher_that_has_a_wrong_one(self, healthy):
        right, wrong = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
        network = Wrapped(healthy, lambda z: z[:, right])
        finding = class_order(matched(Teacher(network, classes=wrong)), "multiclass", wrong)
        assert finding.hint == f"Teacher(network, classes={right})"

    @pytest.mark.parametrize(("classes", "samples"), [(10, 40), (100, 200), (1000, 1000), (3, 600)])
    def test_chance_is_no_order(self, classes, samples):
        """Fitted to the same samples an order would raise the accuracy: many classes, few samples, a blind teacher."""
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(samples, classes, generator=generator)
            y = torch.randint(classes, (samples,), generator=generator)
            assert class_order(match_labels(logits, y, "multiclass"), "multiclass").hint is None

    def test_many_classes(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(100, (2000,), generator=generator)
        logits = 4 * F.one_hot(y, 100) + torch.randn(2000, 100, generator=generator)
        order = torch.randperm(100, generator=generator).tolist()
        assert class_order(match_labels(logits, y, "multiclass"), "multiclass").hint is None
        finding = class_order(match_labels(logits[:, order], y, "multiclass"), "multiclass")
        assert finding.hint == f"Teacher(network, classes={order})"

    def test_no_square_of_thousands_of_classes(self):
        y = torch.arange(200)
        finding = class_order(match_labels(torch.eye(200, 30_000), y, "multiclass"), "multiclass")
        assert "30000 classes" in finding.text and "at most 5000" in finding.text
        assert finding.hint is None

    def test_columns_of_labels(self):
        generator = torch.Generator().manual_seed(0)
        y = (torch.rand(500, 6, generator=generator) < 0.2).float()
        logits = 4 * y - 2 + torch.randn(500, 6, generator=generator)
        y[::7, 2] = torch.nan
        order = [2, 0, 1, 3, 5, 4]
        assert class_order(match_labels(logits, y, "multilabel"), "multilabel").hint is None
        assert accuracy(match_labels(logits, y, "multilabel"), None, "multilabel", "labels").hint is None
        permuted = match_labels(logits[:, order], y, "multilabel")
        finding = class_order(permuted, "multilabel")
        assert finding.hint == f"Teacher(network, classes={order})"

    @pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
    def test_binary(self, shape):
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(2, (200,), generator=generator)
        logits = (4 * y - 2 + torch.randn(200, generator=generator)).reshape(shape)
        teacher = nn.Linear(1, 1)
        nn.init.ones_(teacher.weight)
        nn.init.zeros_(teacher.bias)
        batches = [Batch(logits.reshape(-1, 1), y)]
        found = match_labels(collect_logits(Teacher(teacher), batches, "binary"), y, "binary")
        assert class_order(found, "binary").hint is None
        assert accuracy(found, None, "binary", "labels").hint is None
        teacher = nn.Linear(1, 1)
        nn.init.constant_(teacher.weight, -1)
        nn.init.zeros_(teacher.bias)
        swapped = match_labels(collect_logits(Teacher(teacher), batches, "binary"), y, "binary")
        finding = class_order(swapped, "binary")
        assert "swap 0 and 1" in finding.hint and f"{100 * found.accuracy:.1f}%" in finding.text
        assert accuracy(swapped, None, "binary", "labels").severity == "error"


class TestNormalisation:
    def run(self, teacher, batches, present=None):
        found = match_labels(collect_logits(teacher, batches, "multiclass"), TRUTH, "multiclass")
        return normalisation(teacher, batches, found, "multiclass", present)

    def test_not_in_question(self, healthy):
        finding, found = self.run(Teacher(healthy), VAL)
        assert finding.hint is None and found.accuracy == matched(healthy).accuracy

    def test_untrained(self, teacher):
        assert "none of the usual" in self.run(Teacher(teacher), VAL)[0].text

    @pytest.mark.parametrize("present", [None, ([0.0], [1 / 255]), ([0.3], [0.4]), ([0.1307], [0.3081])])
    def test_pixels_up_to_255(self, plain, present):
        mean, std = present or ([0.0], [1.0])
        batches = [Batch((batch.x - mean[0]) / std[0], batch.y) for batch in VAL]
        if present == ([0.0], [1 / 255]):
            assert self.run(Teacher(plain), batches)[0].text == "not checked: the teacher is good enough"
            return
        finding, cured = self.run(Teacher(plain), batches, present)
        assert "[0, 255]" in finding.text
        code, text = finding.hint.split("; in YAML preprocess: ")
        pasted = eval(code, {"Teacher": Teacher, "network": plain, "v2": v2})
        right = matched(Teacher(plain), [Batch(batch.x * 255) for batch in VAL]).accuracy
        assert right > 0.9
        assert matched(pasted, batches).accuracy == pytest.approx(right, abs=0.003)
        assert cured.accuracy == pytest.approx(right, abs=0.003)
        arguments = yaml.safe_load(text)
        assert arguments["class_path"] == "torchvision.transforms.v2.Normalize"
        assert v2.Normalize(**arguments["init_args"]).mean == pasted._hidden[0].mean

    @pytest.mark.parametrize("name", ["ImageNet's mean and std", "[-1, 1]"])
    def test_made_for_normalised_inputs_but_given_raw(self, name, train_digits):
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in NORMALISATIONS[name])
        torch.manual_seed(0)
        network = DigitsCNN(8)
        network[0] = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        train_digits(network, lambda x: (x.expand(-1, 3, -1, -1) - mean) / std)
        raw = [Batch(255 * batch.x.expand(-1, 3, -1, -1), batch.y) for batch in VAL]
        right = matched(network, [Batch((b.x / 255 - mean) / std) for b in raw]).accuracy
        assert right > 0.9
        finding, cured = self.run(Teacher(network), raw)
        pasted = eval(finding.hint.split("; in YAML")[0], {"Teacher": Teacher, "network": network, "v2": v2})
        # of several near each other it may name another that serves as well
        assert matched(pasted, raw).accuracy == pytest.approx(cured.accuracy, abs=0.003)
        assert cured.accuracy >= right - 0.01

    def test_a_preprocess_that_is_there_already_stays(self, plain):
        teacher = Teacher(plain, preprocess=nn.Identity())
        finding, _ = self.run(teacher, VAL)
        assert "before its present preprocess" in finding.hint

    def test_normalised_out_of_sight(self, plain):
        batches = [Batch(batch.x - 0.5, batch.y) for batch in VAL]
        assert "not checked" in self.run(Teacher(plain), batches)[0].text


class DropoutAlways(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.2)


class Drifting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        self.mean += 0.1 * (x.mean() - self.mean)
        return x


class TestEvalMode:
    def test_healthy(self, healthy):
        finding = eval_mode(Teacher(healthy), VAL[0])
        assert finding.hint is None and finding.severity != "error"

    def test_bf16(self, healthy):
        teacher = Teacher(copy.deepcopy(healthy)).bfloat16()
        assert eval_mode(teacher, Batch(VAL[0].x.bfloat16())).hint is None

    def test_functional_dropout(self, healthy):
        finding = eval_mode(Teacher(nn.Sequential(healthy, DropoutAlways())), VAL[0])
        assert "different logits" in finding.text and "F.dropout" in finding.hint

    def test_batch_statistics(self, healthy):
        network = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), copy.deepcopy(healthy))
        finding = eval_mode(Teacher(network), VAL[0])
        assert "alone and in a batch" in finding.text and "0 with track_running_stats=False" in finding.hint

    def test_batch_statistics_of_single_values(self, healthy):
        network = nn.Sequential(copy.deepcopy(healthy), nn.BatchNorm1d(10, track_running_stats=False))
        finding = eval_mode(Teacher(network), VAL[0])
        assert "cannot compute an image alone" in finding.text and "1 with track_running_stats" in finding.hint

    def test_statistics_without_a_layer(self, healthy):
        finding = eval_mode(Teacher(Wrapped(healthy, lambda z: z - z.mean(dim=0))), VAL[0])
        assert "normalisation over the batch" in finding.hint

    def test_drifting_buffers(self, healthy):
        network = nn.Sequential(Drifting(), healthy)
        finding = eval_mode(Teacher(network), VAL[0])
        assert "changes its buffers 0.mean" in finding.text and finding.hint
        assert network[0].mean == 0  # put back

    def test_one_output(self):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
        assert eval_mode(Teacher(network), VAL[0]).hint is None


class TestSoftTargets:
    def test_entropy(self):
        logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 3
        p = np.exp(logits.double().numpy() / 2)
        expected = np.mean(entropy(p, axis=1)) / math.log(7)
        finding = soft_targets(logits, KDLoss(temperature=2.0), "multiclass")
        each = entropy(p, axis=1) / math.log(7)
        low, high = t_distribution.interval(0.95, 49, loc=each.mean(), scale=sem(each))
        assert finding.text == (
            f"entropy {expected:.1%} of the largest possible (95% interval {low:.1%} to {high:.1%}, 50 samples), at "
            "temperature 2"
        )
        assert finding.hint is None

    def test_few_samples(self):
        flat = torch.zeros(9, 4)
        assert soft_targets(flat, KDLoss(), "multiclass").hint is None
        assert "9 samples are too few" in soft_targets(flat, KDLoss(), "multiclass").text
        assert soft_targets(flat[:1], KDLoss(), "multiclass").hint is None
        assert "lower" in soft_targets(torch.zeros(10, 4), KDLoss(), "multiclass").hint

    def test_a_mean_that_is_uncertain(self):
        """Nearly uniform on average, but for a few samples."""
        logits = torch.zeros(40, 4)
        logits[:2, 0] = 3.0
        finding = soft_targets(logits, nn.Identity(), "multiclass")
        assert finding.hint is None
        assert soft_targets(logits[2:], nn.Identity(), "multiclass").hint is not None

    def test_bernoulli(self):
        p = np.array([[0.5, 0.9], [0.2, 0.99]])
        expected = np.mean(-p * np.log2(p) - (1 - p) * np.log2(1 - p))
        logits = torch.from_numpy(np.log(p / (1 - p)))
        for task in ("multilabel", "binary"):
            text = soft_targets(logits, KDLoss(1.0, task=task), task).text
            assert f"{100 * expected:.1f}%" in text

    def test_standardised_first(self):
        logits = 1000 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
        assert "raise" in soft_targets(logits, KDLoss(1.0), "multiclass").hint
        assert soft_targets(logits, KDLoss(1.0, standardize=True), "multiclass").hint is None

    @pytest.mark.parametrize(
        ("temperature", "advice"), [(0.01, "raise the temperature"), (1000, "lower the temperature"), (4, None)]
    )
    def test_advice(self, healthy, temperature, advice):
        logits = matched(healthy).logits
        for loss in (KDLoss(temperature), DISTLoss(temperature=temperature)):
            finding = soft_targets(logits, loss, "multiclass")
            assert finding.hint is None if advice is None else advice in finding.hint
            assert finding.severity != "error"

    def test_advice_names_what_the_loss_has(self):
        logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
        for loss in (TTMLoss(1.0), WTTMLoss(1.0)):
            assert "lower the exponent" in soft_targets(1000 * logits, loss, "multiclass").hint
            assert "raise the exponent" in soft_targets(0.001 * logits, loss, "multiclass").hint
        finding = soft_targets(1000 * logits, HardDistillationLoss(), "multiclass")
        assert finding.hint is None and finding.text == "not checked: the loss compares with the teacher's decision"

    @pytest.mark.parametrize(("share", "advice"), [(0.008, "raise"), (0.012, None), (0.994, None), (0.996, "lower")])
    def test_thresholds(self, share, advice):
        """Two classes, the logit found by bisection in the entropy."""
        low, high = 0.0, 30.0
        for _ in range(100):
            middle = (low + high) / 2
            p = 1 / (1 + math.exp(-middle))
            low, high = (middle, high) if entropy([p, 1 - p], base=2) > share else (low, middle)
        logits = torch.tensor([[low, 0.0]], dtype=torch.float64).repeat(10, 1)
        hint = soft_targets(logits, nn.Identity(), "multiclass").hint
        assert hint is None if advice is None else advice in hint

    def test_extreme_logits_and_nan(self):
        assert "0.0%" in soft_targets(torch.tensor([[1e30, 0.0, -1e30]]), nn.Identity(), "multiclass").text
        assert "not finite" in soft_targets(torch.full((2, 3), torch.nan), nn.Identity(), "multiclass").text


class TestGradients:
    def make(self, teacher, student, **kwargs):
        module = DistillModule(student, teacher, **kwargs)
        return gradients(module.losses(Batch(X[:64], Y[:64])), student)

    def test_healthy(self, healthy, student):
        finding = self.make(healthy, student, soft_weight=0.5)
        assert finding.hint is None and finding.severity != "error"
        # independent: each term's gradient by backward
        norms = []
        for name in ("hard", "soft"):
            student.zero_grad()
            loss = F.cross_entropy(student(X[:64]), Y[:64])
            if name == "soft":
                with torch.no_grad():
                    target = (healthy(X[:64]) / 4).softmax(1)
                loss = 16 * F.kl_div((student(X[:64]) / 4).log_softmax(1), target, reduction="batchmean")
            (0.5 * loss).backward()
            norms.append(torch.cat([p.grad.flatten() for p in student.parameters()]).norm().item())
        found = [float(number) for number in re.findall(r"(?:hard|soft) ([\d.e+-]+) \(", finding.text)]
        assert found == pytest.approx(norms, rel=0.01)
        assert float(re.search(r"; \w+ ([\d.]+) times", finding.text)[1]) == pytest.approx(
            max(norms) / min(norms), rel=0.01
        )

    @pytest.mark.parametrize(
        ("kwargs", "weak"),
        [({"soft_weight": 1e-6}, "soft"), ({"soft_weight": 1 - 1e-6}, "hard"), ({"scale": 1e6}, "hard")],
    )
    def test_negligible(self, healthy, student, kwargs, weak):
        loss = KDLoss()
        if scale := kwargs.pop("scale", None):
            loss.register_forward_hook(lambda module, inputs, value: scale * value)
        finding = self.make(healthy, student, soft_loss=loss, **kwargs)
        assert finding.hint.startswith(f"{weak} is negligible") and finding.severity != "error"

    def test_a_weight_of_zero_is_meant_so(self, healthy, student):
        assert self.make(healthy, student, soft_weight=1.0).hint is None
        assert self.make(healthy, student, soft_weight=0.0).hint is None

    def test_a_loss_without_gradient(self, healthy, student):
        class Constant(nn.Module):
            def forward(self, student, teacher, target):
                return torch.ones(())

        assert self.make(healthy, student, soft_loss=Constant()).hint.startswith("soft has no gradient")

    def test_no_labels_in_the_batch(self, healthy, student):
        terms = DistillModule(student, healthy).losses(Batch(X[:8], torch.full((8,), -100)))
        assert gradients(terms, student, labeled=False).hint is None

    def test_no_pseudo_label_is_accepted_yet(self, student):
        """A new student is seldom sure: this is no fault. Without the name, a term without gradient stays a warning."""
        module = PseudoLabelModule(student, selection=FixedThreshold(1.0))
        y = torch.cat((Y[:4], torch.full((4,), -100)))
        terms = module.losses(Batch(X[:8], y, x_strong=X[:8]))
        assert float(terms["unsupervised"].value) == 0
        finding = gradients(terms, student, of_pseudo_labels=("unsupervised",))
        assert finding.hint is None and finding.severity == "info"
        assert finding.text.endswith("; no pseudo-label of this batch is accepted yet")
        assert gradients(terms, student).hint.startswith("unsupervised has no gradient")

    def test_zero(self, healthy, student):
        dead = nn.Sequential(student, nn.Linear(10, 10))
        for p in dead.parameters():
            nn.init.constant_(p, 0.0)
        dead[1].weight.requires_grad_(False)
        dead[1].bias.requires_grad_(False)
        finding = self.make(healthy, dead)
        assert finding.severity == "error" and "no gradient" in finding.hint
        detached = Wrapped(DigitsCNN(4), lambda z: z.detach().requires_grad_())
        assert self.make(healthy, detached).severity == "error"
        assert self.make(healthy, DigitsCNN(4).requires_grad_(False)).severity == "error"

    def test_not_finite(self, healthy, student):
        nn.init.constant_(student[-1].bias, torch.nan)
        finding = self.make(healthy, student)
        assert finding.severity == "error" and "not finite" in finding.hint


def test_labels():
    y = torch.tensor([0, -100, 2, 2])
    text = "3 of 4 samples labeled, 2 of 3 classes"
    assert labels(y, 4, 3, "multiclass", "samples", taught=True, expected=3).severity == "info"
    for some in (y, None):
        wrong = labels(some, 4, 3, "multiclass", "samples", taught=True, expected=10)
        assert wrong.severity == "error" and "3 outputs, but must have 10" in wrong.hint
    assert labels(y, 4, 3, "multiclass", "samples", taught=True).text == text
    none = labels(None, 4, 3, "multiclass", "samples", taught=False)
    assert none.severity == "error" and none.text == "0 of 4 samples labeled"
    assert labels(torch.full((4,), -100), 4, 3, "multiclass", "samples", taught=True).severity == "info"
    many = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    assert labels(many, 2, 2, "multilabel", "samples", taught=True).text == "1 of 2 samples labeled"


def test_severity_follows_from_the_hint():
    assert Finding("teacher", "good").severity == "info"
    assert Finding("teacher", "poor", "train it").severity == "warning"
    assert Finding("teacher", "bad", "train it", "error").severity == "error"
    assert with_teacher_name(Finding("teacher", "bad", "train it", "error"), "teachers[1]") == Finding(
        "teachers[1]", "bad", "train it", "error"
    )
    assert with_teacher_name(Finding("eval mode", "good"), "teachers[1]").name == "teachers[1], eval mode"


class Sum(nn.Module):
    """Of two inputs; may be random, or depend on the batch."""

    def __init__(self, change=lambda z: z):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.change = nn.Linear(4, 3), change

    def forward(self, a, b):
        return self.change(self.layer(a * b))


@pytest.mark.parametrize("form", [dict, lambda x: tuple(x.values())])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda z: z, "the same in two passes, alone and in a batch"),
        (lambda z: F.dropout(z, 0.5), "two passes give different logits"),
        (lambda z: z - z.mean(dim=0), "differ alone and in a batch"),
    ],
)
def test_eval_mode_of_several_inputs(form, change, text):
    batch = Batch(form({"a": torch.rand(9, 4), "b": torch.rand(9, 1)}))
    assert text in eval_mode(Teacher(Sum(change)), batch).text


def test_normalisation_is_for_the_students_own_images(plain):
    """Of inputs of its own, or of several tensors, it is not known how they were normalised."""
    teacher = Teacher(plain)
    labeled = [Batch(batch.x, batch.y, teacher_inputs=batch.x) for batch in VAL]
    finding, _ = normalisation(teacher, labeled, matched(teacher, labeled), "multiclass", None)
    assert finding.text == "not checked: the batches have inputs of their own for the teacher" and finding.hint is None
    assert normalisation(teacher, VAL, matched(teacher), "multiclass", None)[0].hint is not None
    named = [Batch({"x": batch.x}, batch.y) for batch in VAL]
    finding, _ = normalisation(teacher, named, matched(teacher, named), "multiclass", None)
    assert "not checked: inputs are neither plain pixels" in finding.text
