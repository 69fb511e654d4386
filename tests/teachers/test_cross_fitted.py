"""CrossFittedTeacher: who teaches which sample, through fits. Network k outputs class k, so a leak shows."""

import json
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import TensorDataset

from kd_lightning import (
    Batch,
    CrossFittedTeacher,
    DatasetSource,
    Digits,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    ImageFolder,
    InputError,
    SemiSupervisedDataModule,
    Teacher,
    teach,
)
from kd_lightning.active.pool import find_teacher
from kd_lightning.data.transforms.mix import MixUp
from kd_lightning.models import DigitsCNN
from kd_lightning.report.examination import examine
from kd_lightning.teachers.cross_fit import CrossFit
from tests.teachers.cross_fits import constant, random, write_cross_fit

ALL = -1


def digits(size=90, order=None, **kwargs):
    """Some digits, in another order if one is given; two labels of each class."""
    images = Digits().load().train
    x, y = images.images.tensors[0][:size], images.targets[:size]
    x, y = (x, y) if order is None else (x[order], y[order])
    source = DatasetSource(TensorDataset(x, y), TensorDataset(x[:30] + 1, y[:30]))
    source.train_transform = Digits().train_transform
    return SemiSupervisedDataModule(source, **{"labeled": 2, "num_views": 2, "batch_size": 32, "val_size": 2} | kwargs)


@pytest.fixture
def three(tmp_path):
    """The file of three networks, and their folds."""
    return write_cross_fit(tmp_path / "teachers", digits(), [constant(number) for number in range(3)])


def who_teaches(trainer, module, data, **kwargs):
    """Fit, and return the teacher of each sample in each view: {(index, view): number, or ALL}, and how many came."""
    seen = {}

    def note(teacher, args, output):
        batch = args[0]
        if module.trainer.state.stage != "train":
            return
        for index, view, row in zip(batch.index.tolist(), batch.view.tolist(), output.softmax(dim=1), strict=True):
            number = int(row.argmax()) if row.max() > 0.99 else ALL
            if number == ALL:
                torch.testing.assert_close(row[:3], torch.full((3,), 1 / 3), rtol=1e-3, atol=1e-3)
            assert seen.setdefault((index, view), number) == number

    handle = module.teacher.register_forward_hook(note)
    seed_everything(3, verbose=False)
    trainer.fit(module, datamodule=data, **kwargs)
    handle.remove()
    return seen


def expected_by_content(data, before, folds):
    """The fold of each sample of the data, by its pixels; ``before`` holds the folds' samples."""
    pixels = {before.image(index).numpy().tobytes(): number for number, fold in enumerate(folds) for index in fold}
    return {index: pixels.get(data.image(index).numpy().tobytes(), ALL) for index in range(len(data.samples))}


def check(seen, expected, data):
    assert {index for index, _ in seen} == {*data.split.labeled, *data.unlabeled_indices()}
    assert {index: number for (index, _), number in seen.items()} == {i: expected[i] for i, _ in seen}
    assert {*seen.values()} == {ALL, 0, 1, 2}
    assert {index for (index, _), number in seen.items() if number != ALL} >= {*data.split.labeled} & {
        index for index, number in expected.items() if number != ALL
    }


def distill(file, **kwargs):
    torch.manual_seed(0)
    return DistillModule(DigitsCNN(width=2), CrossFittedTeacher(file, **kwargs))


class TestWhoTeaches:
    @pytest.mark.parametrize("cache", [False, True])
    @pytest.mark.parametrize(
        ("trainer", "options"),
        [({}, {}), ({"precision": "bf16-mixed"}, {"views_per_epoch": 2}), ({}, {"labeled_batch_size": 8})],
    )
    def test_each_labeled_sample_has_its_own(self, quiet_trainer, three, tmp_path, cache, trainer, options):
        file, folds = three
        data = digits(**options)
        options = {"cache": tmp_path / "cache"} if cache else {}
        for _ in range(1 + cache):  # the second fit finds the cache filled
            seen = who_teaches(quiet_trainer(**trainer), distill(file, **options), data)
            check(seen, expected_by_content(data, digits(), folds), data)

    @pytest.mark.parametrize("cache", [False, True])
    def test_in_another_order_with_other_labels(self, quiet_trainer, three, tmp_path, cache):
        """A cache that was filled in the first order is of no use in the second one."""
        file, folds = three
        order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
        options = {"cache": tmp_path / "cache"} if cache else {}
        for data in (digits(), digits(order=order, labeled=1, seed=5)):
            seen = who_teaches(quiet_trainer(), distill(file, **options), data)
            before = digits()
            before.setup("fit")
            check(seen, expected_by_content(data, before, folds), data)

    @pytest.mark.parametrize("cache", [False, True])
    def test_after_a_resume(self, quiet_trainer, three, tmp_path, cache):
        file, folds = three
        options = {"cache": tmp_path / "cache"} if cache else {}
        saves = ModelCheckpoint(tmp_path, "mid", every_n_train_steps=3)
        first = quiet_trainer(max_epochs=1, callbacks=[saves], enable_checkpointing=True)
        who_teaches(first, distill(file, **options), digits())
        data, mid = digits(), {"ckpt_path": tmp_path / "mid.ckpt", "weights_only": True}
        seen = who_teaches(quiet_trainer(max_epochs=2), distill(file, **options), data, **mid)
        check(seen, expected_by_content(data, digits(), folds), data)

    def test_a_cache_of_other_folds_is_not_read(self, quiet_trainer, three, tmp_path):
        """The same networks and data, but each network has another fold."""
        _, folds = three
        swapped = write_cross_fit(
            tmp_path / "swapped", digits(), [constant(n) for n in range(3)], folds[1:] + folds[:1]
        )
        for file, own in (three, swapped):
            data = digits()
            seen = who_teaches(quiet_trainer(), distill(file, cache=tmp_path / "cache"), data)
            check(seen, expected_by_content(data, digits(), own), data)

    def test_validation_and_test(self, quiet_trainer, three):
        """Validation samples that another split has trained on have their network, and test samples have all."""
        file, folds = three
        module, data = distill(file), digits(seed=4)
        data.setup("fit")
        module.teacher.find_samples(data, "train")
        expected = expected_by_content(data, digits(), folds)
        val = torch.tensor(data.split.val)
        assert {*(found := module.teacher.folds_of(Batch(val, index=val))).tolist()} > {ALL}
        assert found.tolist() == [expected[index] for index in val.tolist()]
        seen = []
        module.teacher.register_forward_hook(lambda t, args, out: seen.append(out.softmax(dim=1).amax(dim=1)))
        quiet_trainer().validate(module, datamodule=data, verbose=False)
        assert (torch.cat(seen) > 0.99).tolist() == [number != ALL for number in found.tolist()]
        seen.clear()
        quiet_trainer().test(module, datamodule=data, verbose=False)
        assert torch.cat(seen).max() < 0.34  # index 0 ... 29 of the test part are other samples

    def test_an_ensemble(self, quiet_trainer, three):
        file, folds = three
        torch.manual_seed(0)
        module = EnsembleDistillModule(DigitsCNN(width=2), [CrossFittedTeacher(file), Teacher(constant(5))])
        data, seen = digits(), {}

        def note(ensemble, args, logits):
            if module.trainer.state.stage == "train":
                seen.update(zip(args[0].index.tolist(), logits[0].argmax(dim=1).tolist(), strict=True))
                assert (logits[1].argmax(dim=1) == 5).all()

        module.ensemble.register_forward_hook(note)
        quiet_trainer().fit(module, datamodule=data)
        assert all(seen[index] == number for number, fold in enumerate(folds) for index in fold)


class TestOutputs:
    @pytest.fixture
    def teacher(self, tmp_path):
        file, folds = write_cross_fit(tmp_path / "teachers", digits(), [random(seed) for seed in range(3)])
        teacher = CrossFittedTeacher(file)
        data = digits()
        data.setup("fit")
        teacher.find_samples(data, "train")
        return teacher, folds, data.unlabeled_indices()

    def test_log_probabilities_and_their_mean(self, teacher):
        teacher, folds, unlabeled = teacher
        index = torch.tensor([unlabeled[0], folds[2][0], folds[0][1], unlabeled[1], folds[2][1], ALL])
        x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(4))
        each = torch.stack([network(x).double().softmax(dim=1) for network in teacher.network]).detach()
        expected = each[[0, 2, 0, 0, 2, 0], range(6)]
        expected[[0, 3, 5]] = each[:, [0, 3, 5]].mean(dim=0)  # padding (-1) is in no fold
        found = teacher(Batch(x, index=index))
        torch.testing.assert_close(found.double(), expected.log(), rtol=1e-4, atol=1e-5)
        for rows in ([1, 4], [0, 3], [2], []):
            part = teacher(Batch(x[rows], index=index[rows]))
            torch.testing.assert_close(part.double(), expected[rows].log(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("task", ["binary", "multilabel", "regression"])
    def test_other_tasks(self, teacher, task):
        teacher, folds, unlabeled = teacher
        teacher.cross_fit = replace(teacher.cross_fit, task=task)
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
        each = torch.stack([network(x).double() for network in teacher.network]).detach()
        mean = each[:, 1].mean(dim=0) if task == "regression" else torch.logit(each[:, 1].sigmoid().mean(dim=0))
        found = teacher(Batch(x, index=torch.tensor([folds[1][0], unlabeled[0]])))
        torch.testing.assert_close(found.double(), torch.stack([each[1, 0], mean]), rtol=1e-4, atol=1e-5)

    def test_dense(self, teacher):
        """Folds are those of samples, and classes lie in another dimension."""
        teacher, folds, unlabeled = teacher
        teacher.class_dim = 1
        for number, network in enumerate(teacher.network):
            network.forward = lambda x, number=number: torch.stack([x * (number + 1), -x], dim=1)
        x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(4))
        each = torch.stack([network(x).softmax(dim=1) for network in teacher.network])
        found = teacher(Batch(x, index=torch.tensor([folds[1][0], unlabeled[0]])))
        torch.testing.assert_close(found, torch.stack([each[1, 0], each[:, 1].mean(dim=0)]).log())

    def test_is_frozen_and_moves(self, teacher):
        teacher = teacher[0]
        assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
        assert not teacher.state_dict() and not [*teacher.parameters()]
        assert {p.dtype for p in teacher.double().network.parameters()} == {torch.float64}


class TestFingerprint:
    def test_a_run_is_not_resumed_with_other_folds_or_networks(self, quiet_trainer, three, tmp_path):
        file, folds = three
        saves = ModelCheckpoint(tmp_path, "mid", every_n_train_steps=3)
        first = quiet_trainer(max_epochs=1, callbacks=[saves], enable_checkpointing=True)
        first.fit(distill(file), datamodule=digits())
        networks = [constant(number) for number in range(3)]
        others = {
            "folds": write_cross_fit(tmp_path / "folds", digits(), networks, folds[1:] + folds[:1])[0],
            "networks": write_cross_fit(tmp_path / "networks", digits(), [*networks[:2], random(1)], folds)[0],
            "fewer": write_cross_fit(tmp_path / "fewer", digits(), networks, [fold[:-1] for fold in folds])[0],
        }
        resume = {"ckpt_path": tmp_path / "mid.ckpt", "weights_only": True}
        for other in others.values():
            with pytest.raises(InputError, match="teacher: the checkpoint was trained with another teacher"):
                quiet_trainer(max_epochs=2).fit(distill(other), datamodule=digits(), **resume)
        shutil.copytree(file.parent, tmp_path / "moved")
        quiet_trainer(max_epochs=2).fit(distill(tmp_path / "moved/crossfit.json"), datamodule=digits(), **resume)

    def test_names_of_files_and_order_in_a_fold_do_not_count(self, three, tmp_path):
        file, folds = three
        networks = [constant(number) for number in range(3)]
        same, _ = write_cross_fit(tmp_path / "same", digits(), networks, [fold[::-1] for fold in folds])
        assert CrossFittedTeacher(same).fingerprint() == CrossFittedTeacher(file).fingerprint()


@pytest.fixture
def pictures(tmp_path):
    """Small pictures of two classes in a folder, and the file of two networks with their folds."""
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        folder = tmp_path / "pictures" / "train" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    return tmp_path / "pictures"


def folder_data(root, **kwargs):
    source = ImageFolder(str(root / "train"), image_size=8)
    return SemiSupervisedDataModule(source, **{"batch_size": 8, "val_size": 2, "num_views": 1} | kwargs)


class TestFiles:
    @pytest.fixture
    def file(self, pictures, tmp_path):
        return write_cross_fit(tmp_path / "teachers", folder_data(pictures), [constant(0), constant(1)])[0]

    def folds(self, file, data):
        data.setup("fit")
        teacher = CrossFittedTeacher(file)
        teacher.find_samples(data, "train")
        index = torch.arange(len(data.samples))
        paths, found = map(data.path, index.tolist()), teacher.folds_of(Batch(index, index=index)).tolist()
        return dict(zip(map(Path, paths), found, strict=True))

    def test_renamed_and_reordered(self, pictures, file):
        before = {path.read_bytes(): fold for path, fold in self.folds(file, folder_data(pictures)).items()}
        for number, path in enumerate(sorted((pictures / "train").rglob("*.png"))):
            path.rename(path.with_name(f"{99 - number}_renamed.png"))
        now = {path.read_bytes(): fold for path, fold in self.folds(file, folder_data(pictures)).items()}
        assert now == before and {*now.values()} == {ALL, 0, 1}

    def test_a_copy_has_the_network_of_its_content(self, pictures, file):
        before = self.folds(file, folder_data(pictures))
        path, fold = next((path, fold) for path, fold in before.items() if fold == 1)
        shutil.copy(path, path.with_name("00_copy.png"))
        assert self.folds(file, folder_data(pictures, val_size=0.2))[path.with_name("00_copy.png")] == fold

    @pytest.mark.parametrize("change", ["edit", "delete", "rename and edit"])
    def test_a_sample_that_is_lost_is_refused(self, pictures, file, change):
        path = next(path for path, fold in self.folds(file, folder_data(pictures)).items() if fold == 1)
        Image.new("L", (8, 8), 7).save(path)
        if change == "delete":
            path.unlink()
        elif change == "rename and edit":
            path.rename(path.with_name("new.png"))
        with pytest.raises(InputError, match=r"1 of 16 samples that the teachers were trained on are not among"):
            self.folds(file, folder_data(pictures))

    def test_other_classes_are_refused(self, pictures, file):
        cross_fit = CrossFit.load(file)
        replace(cross_fit, class_names=["dog", "cat"]).save(file)
        with pytest.raises(InputError, match="the teachers' classes are dog, cat, got data of cat, dog"):
            self.folds(file, folder_data(pictures))
        data = folder_data(pictures)
        data.setup("fit")
        CrossFittedTeacher(file, classes=[1, 0]).find_samples(data, "train")

    def test_damage(self, file):
        content = json.loads(file.read_text())
        with pytest.raises(InputError, match=r"path must be the file crossfit.json .* nowhere.json does not exist"):
            CrossFittedTeacher("nowhere.json")
        with pytest.raises(InputError, match=r"path must be the file crossfit.json .* is a folder"):
            CrossFittedTeacher(file.parent)
        content["folds"][0]["contents"], content["folds"][1]["contents"] = (
            content["folds"][1]["contents"],
            content["folds"][0]["contents"],
        )
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match="it was changed after it was written"):
            CrossFittedTeacher(file)
        file.write_text("{}")
        with pytest.raises(InputError, match=r"is no crossfit.json: 'hash'"):
            CrossFittedTeacher(file)

    def test_one_content_in_two_folds_is_refused(self, file):
        cross_fit = CrossFit.load(file)
        first, second = cross_fit.folds
        second = replace(second, paths=[*second.paths, "copy"], contents=[*second.contents, first.contents[0]])
        with pytest.raises(InputError, match=r"folds 0 and 1 have samples of one content \(copy\)"):
            replace(cross_fit, folds=[first, second]).save(file)

    def test_changed_weights_are_refused(self, file):
        shutil.copy(file.parent / "fold_0/student.safetensors", file.parent / "fold_1/student.safetensors")
        with pytest.raises(InputError, match="the weights of fold 1 .* are missing or were changed since"):
            CrossFittedTeacher(file)


class TestRefused:
    def test_mixed_rows(self, three, quiet_trainer):
        with pytest.raises(InputError, match="mix: a mixed row is of two samples"):
            quiet_trainer().fit(distill(three[0]), datamodule=digits(mix=MixUp(0.3)))

    def test_batches_without_samples(self, three, quiet_trainer, loader):
        teacher = CrossFittedTeacher(three[0])
        for batch in (torch.zeros(2, 1, 8, 8), Batch(torch.zeros(2, 1, 8, 8), index=torch.arange(2))):
            with pytest.raises(InputError, match="a batch with the index of its samples is needed"):
                teacher(batch)
        with pytest.raises(InputError, match="a batch with the index of its samples is needed"):
            quiet_trainer().fit(distill(three[0]), loader())

    def test_a_sample_that_the_data_do_not_have(self, three):
        teacher, data = CrossFittedTeacher(three[0]), digits()
        data.setup("fit")
        teacher.find_samples(data, "train")
        with pytest.raises(InputError, match="a batch has sample 90, but the data have 90"):
            teacher(Batch(torch.zeros(1, 1, 8, 8), index=torch.tensor([90])))
        mixed = Batch(torch.zeros(1, 1, 8, 8), index=torch.tensor([0]), partner=torch.tensor([1]))
        with pytest.raises(InputError, match="a mixed row is of two samples"):
            teacher(mixed)

    def test_features(self, three, quiet_trainer):
        module = HintModule(DigitsCNN(width=2), CrossFittedTeacher(three[0]), {"5": "5"}, 1)
        with pytest.raises(InputError, match="CrossFittedTeacher has no features"):
            quiet_trainer(max_epochs=2).fit(module, datamodule=digits())

    def test_use_vmap(self, three, quiet_trainer):
        teachers = [CrossFittedTeacher(three[0]), CrossFittedTeacher(three[0], preprocess=torch.nn.Identity())]
        module = EnsembleDistillModule(DigitsCNN(width=2), teachers, use_vmap=True)
        with pytest.raises(InputError, match="without use_vmap"):
            quiet_trainer().fit(module, datamodule=digits())

    def test_teach(self, three):
        class Own(LightningModule):
            def __init__(self):
                super().__init__()
                self.net = DigitsCNN(width=2)

            def training_step(self, batch, batch_idx):
                return self.net(batch).sum()

        module = teach(Own(), CrossFittedTeacher(three[0]))
        with pytest.raises(InputError, match="use DistillModule"):
            module.training_step(torch.zeros(1, 1, 8, 8), 0)


def test_doctor_has_the_out_of_fold_accuracy(three):
    file, _ = three
    replace(CrossFit.load(file), right=16).save(file)
    found = {finding.name: finding for finding in examine(distill(file), digits())}
    text = found["cross-fitting"].text
    assert text.startswith("3 networks; out-of-fold accuracy 80.0% of 20 labels (95% interval 56.3% to 94.3%)")
    assert text.endswith("20 of 90 samples have a network of their own, the others the mean of all")
    assert "teacher" in found


def test_query_finds_the_samples(three):
    """After a test, whose samples have the same numbers."""
    file, folds = three
    module, data = distill(file), digits()
    data.setup("fit")
    module.teacher.find_samples(data, "test")
    index = torch.tensor(folds[2])
    found = find_teacher(module, data)(Batch(torch.zeros(len(index), 1, 8, 8), index=index))
    assert (found.argmax(dim=1) == 2).all()


SCRIPT = textwrap.dedent("""
    import torch
    from lightning.pytorch import Trainer
    from tests.teachers.test_cross_fitted import digits, distill

    data, module, seen = digits(), distill("teachers/crossfit.json", cache="cache"), {}

    def note(teacher, args, output):
        for index, row in zip(args[0].index.tolist(), output.softmax(dim=1), strict=True):
            seen[index] = int(row.argmax()) if row.max() > 0.99 else -1

    module.teacher.register_forward_hook(note)
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", limit_val_batches=0, **options)
    trainer.fit(module, datamodule=data)
    torch.save(seen, f"seen_{trainer.global_rank}.pt")
""")


@pytest.mark.dist
def test_two_processes(three, tmp_path, monkeypatch, processes):
    """Each fills and reads its part of one cache."""
    monkeypatch.chdir(tmp_path)
    Path("fit.py").write_text(SCRIPT)
    processes.run_ranks(["fit.py"])
    first, second = (torch.load(f"seen_{rank}.pt") for rank in range(2))
    data = digits()
    data.setup("fit")
    expected = expected_by_content(data, digits(), three[1])
    assert first.keys() | second.keys() == {*data.split.labeled, *data.unlabeled_indices()}
    assert all(expected[index] == number for seen in (first, second) for index, number in seen.items())
