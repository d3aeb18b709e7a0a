"""Distillation: the student learns from teachers by class name, exactly, and nothing of it is silent."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from aplantida_dist.checkpoint import load_checkpoint
from aplantida_dist.config import ConfigError
from aplantida_dist.config_file import load_config
from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.distillation import Distillation, share_classes, soft_loss
from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals, compute
from aplantida_dist.objective import CrossEntropy, Targets
from aplantida_dist.step import run_step
from aplantida_dist.teachers import Teachers, resize
from aplantida_dist.trainer import read_ahead
from tests.pictures import build, draw, fill
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, cut_back, rows_of, write_config
from tests.test_bad_input import complaint, train_complaint

CPU = torch.device("cpu")
CLASSES = ("Acer", "Betula", "Cornus", "Daphne", "Euonymus")
REGION = ("Rosa", "Daphne", "Betula", "Acer")
"""Three shared classes, none of them where the others have it but Betula by chance; Rosa is the region's alone."""


def logits_of(seed: int, num_classes: int, *, batch: int = 7) -> Tensor:
    return 4 * torch.randn(batch, num_classes, generator=torch.Generator().manual_seed(seed))


def distillation(*teachers: Sequence[str], **settings: Any) -> Distillation:
    """Students of CLASSES under teachers of these class names."""
    shared = tuple(share_classes(ClassMap(tuple(names)), ClassMap(CLASSES), device=CPU) for names in teachers)
    values = {
        "temperature": 3.0,
        "soft_share": 0.7,
        "label_share": 0.3,
        "weights": (1 / len(teachers),) * len(teachers),
    }
    return Distillation(CrossEntropy(label_smoothing=0.0), shared, **{**values, **settings})


class Given(nn.Module):
    """A model whose logits are given, for timm's task."""

    num_classes, in_chans = len(CLASSES), 3
    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("temperature", [1.0, 3.0, 8.0])
def test_the_loss_and_its_gradient_are_those_of_timm(temperature: float) -> None:
    """With equal class maps, the mean of our losses is timm's LogitDistillationTask, to the last bits of fp32."""
    student, teacher, labels = logits_of(1, 5), logits_of(2, 5), torch.arange(7) % 5
    task = LogitDistillationTask(
        Given(student.clone()),
        Given(teacher),
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=0.7,
        task_loss_weight=0.3,
        temperature=temperature,
        device=CPU,
        verbose=False,
    )
    theirs = task(torch.zeros(7, 3, 2, 2), labels)["loss"]
    theirs.backward()
    ours = student.clone().requires_grad_()
    losses = distillation(CLASSES, temperature=temperature)(ours, Targets(labels, teacher_logits=(teacher,)))
    losses.mean().backward()
    assert losses.shape == (7,)
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-6)
    assert torch.allclose(ours.grad, task.trainable_module.logits.grad, rtol=1e-5, atol=1e-8)


def softmax(numbers: np.ndarray) -> np.ndarray:
    powers = np.exp(numbers - numbers.max())
    return powers / powers.sum()


def test_classes_are_matched_by_name_and_renormalised() -> None:
    """Against plain numpy: the KL over the shared classes alone, each found by its name in either head."""
    student, teacher = logits_of(1, 5), logits_of(2, 4)
    names = [name for name in CLASSES if name in REGION]
    losses = soft_loss(
        student, teacher, shared=share_classes(ClassMap(REGION), ClassMap(CLASSES), device=CPU), temperature=2
    )
    for ours, theirs, loss in zip(student.double().numpy(), teacher.double().numpy(), losses.tolist(), strict=True):
        p = softmax(np.array([theirs[REGION.index(name)] for name in names]) / 2)
        q = softmax(np.array([ours[CLASSES.index(name)] for name in names]) / 2)
        assert loss == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


def test_a_teacher_is_silent_about_classes_that_it_does_not_have() -> None:
    """The soft loss moves no logit of Cornus or Euonymus, and a sample of theirs has the label loss alone, at full weight."""
    student, teacher = logits_of(1, 5, batch=5).requires_grad_(), logits_of(2, 4, batch=5)
    labels = torch.arange(5)
    soft = distillation(REGION, label_share=0.0, soft_share=1.0)(student, Targets(labels, teacher_logits=(teacher,)))
    known = torch.tensor([name in REGION for name in CLASSES])
    soft[known].sum().backward()
    assert student.grad is not None
    assert (student.grad[:, ~known] == 0).all()
    assert (student.grad[known][:, known] != 0).all()
    losses = distillation(REGION)(student, Targets(labels, teacher_logits=(teacher,)))
    plain = CrossEntropy(label_smoothing=0.0)(student, Targets(labels))
    assert torch.allclose(losses[~known], plain[~known])
    assert not torch.isclose(losses[known], plain[known]).any()


def test_several_teachers_are_weighed_among_those_that_know_the_label() -> None:
    """The weighted mean of their KLs; where one does not know the label, the other's alone."""
    student, first, second = logits_of(1, 5, batch=5), logits_of(2, 5, batch=5), logits_of(3, 4, batch=5)
    labels, only_soft = torch.arange(5), {"soft_share": 1.0, "label_share": 0.0}
    one, other = (
        distillation(names, **only_soft)(student, Targets(labels, teacher_logits=(logits,)))
        for names, logits in ((CLASSES, first), (REGION, second))
    )
    both = distillation(CLASSES, REGION, weights=(0.25, 0.75), **only_soft)(
        student, Targets(labels, teacher_logits=(first, second))
    )
    for label, name in enumerate(CLASSES):
        expected = 0.25 * one[label] + 0.75 * other[label] if name in REGION else one[label]
        assert both[label].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_that_of_float32(dtype: torch.dtype) -> None:
    """Half-precision logits are cast before anything is computed."""
    student, teacher, labels = logits_of(1, 5).to(dtype), logits_of(2, 5).to(dtype), torch.arange(7) % 5
    losses = distillation(CLASSES)(student, Targets(labels, teacher_logits=(teacher,)))
    exact = distillation(CLASSES)(student.double(), Targets(labels, teacher_logits=(teacher.double(),)))
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), exact, rtol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [17, 36, 96])
def test_pictures_are_resized_as_pil_does(side: int, interpolation: str) -> None:
    """Smaller with antialiasing, or larger: within two roundings of PIL's; of the same size, untouched; never beyond a byte."""
    noise = np.array(Image.open(io.BytesIO(draw(5, width=36, height=36))))
    pale = (noise // 2 + 64).astype(
        np.uint8
    )  # PIL clips between its two passes, which this keeps out of the comparison
    resized = resize(torch.from_numpy(pale).permute(2, 0, 1)[None], side=side, interpolation=interpolation)
    expected = Image.fromarray(pale).resize((side, side), getattr(Image.Resampling, interpolation.upper()))
    difference = resized[0].permute(1, 2, 0).numpy() - np.array(expected, dtype=np.float32)
    assert np.abs(difference).max() <= (0 if side == 36 else 1.5)
    extreme = resize(torch.from_numpy(noise).permute(2, 0, 1)[None], side=side, interpolation=interpolation)
    assert extreme.min() >= 0
    assert extreme.max() <= 255


@dataclass(frozen=True)
class Chain:
    """Two datasets, of which the region's keeps the splits of the world's, and two finished teachers."""

    folder: Path
    world: Path
    region: Path
    teachers: tuple[Path, Path]

    def config(self, *, epochs: int = 2, every_steps: int | str = "null") -> Path:
        return write_config(
            self.folder / f"student_{epochs}_{every_steps}.yaml", self.world, epochs=epochs, every_steps=every_steps
        )

    @property
    def both(self) -> str:
        return f"distillation.teachers=[{','.join(map(str, self.teachers))}]"


def train(config: Path, run_dir: Path, *arguments: str | Path, world_size: int = 1) -> str:
    """Run the command; what its main process said."""
    command = ["--config", config, "--run-dir", run_dir, *arguments]
    folder = run_dir.parent
    folder.mkdir(exist_ok=True, parents=True)
    finished = command_on_ranks(world_size, "aplantida_dist.train", command, folder)
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    return finished[0].stdout


def weights_of(run_dir: Path) -> dict[str, np.ndarray]:
    return load_file(max((run_dir / "checkpoints").glob("step_*")) / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Two commands of the chain: the global teacher, and the regional one that begins with it, at another image size."""
    folder = tmp_path_factory.mktemp("chain")
    first = fill(folder / "world_pictures", dict.fromkeys(CLASSES, 12))
    for name in REGION[1:]:
        shutil.copytree(folder / "world_pictures" / name, folder / "region_pictures" / name)
    fill(folder / "region_pictures", {REGION[0]: 12}, first=first)
    build(folder / "world_pictures", folder / "world", near_distance=None)
    build(folder / "region_pictures", folder / "region", near_distance=None, keep_splits_of=folder / "world")
    runs = folder / "runs" / "global", folder / "runs" / "regional"
    train(
        write_config(folder / "global.yaml", folder / "world", model="test_vit", epochs=2),
        runs[0],
        "model.kwargs.drop_rate=0.2",
    )
    regional = write_config(folder / "regional.yaml", folder / "region", model="test_vit", epochs=1)
    train(regional, runs[1], f"model.init_from={runs[0]}", "data.image_size=48")
    return Chain(folder, folder / "world", folder / "region", runs)


def test_a_student_of_both_teachers(chain: Chain, tmp_path: Path) -> None:
    """The third command: who taught, what they know and had seen stands on the screen, in teachers.json, rows and checkpoint."""
    said = train(chain.config(), tmp_path / "student", chain.both)
    checkpoints = [json.loads((run / "checkpoints" / "best.json").read_text()) for run in chain.teachers]
    paths = [
        str(run / "checkpoints" / best["checkpoint"]) for run, best in zip(chain.teachers, checkpoints, strict=True)
    ]
    train_split = open_dataset(chain.world).open_split("train")
    counts = train_split.manifest.counts_of_classes(len(CLASSES))
    known = sum(count for name, count in zip(sorted(CLASSES), counts, strict=True) if name in REGION)
    assert (
        f"teacher {paths[0]} ({checkpoints[0]['digest'][:12]}), weight 0.5: test_vit at 32 px · knows 5 of 5 classes"
        in said
    )
    share = f"{known} of {train_split.num_samples} train samples ({100 * known / train_split.num_samples:.1f} %)"
    assert f"48 px, resized from the student's 32 · knows 3 of 5 classes, the labels of {share}" in said
    told = json.loads((tmp_path / "student" / "teachers.json").read_text())["teachers"]
    assert [(teacher["path"], teacher["digest"]) for teacher in told] == [
        (path, best["digest"]) for path, best in zip(paths, checkpoints, strict=True)
    ]
    assert (told[1]["class_share"], told[1]["sample_share"]) == (0.6, known / train_split.num_samples)
    assert (told[1]["student_only"], told[1]["teacher_only"]) == (["Cornus", "Euonymus"], ["Rosa"])
    rows = rows_of(tmp_path / "student")
    assert len({row["digests"]["teachers"] for row in rows}) == 1
    lineage = load_checkpoint(max((tmp_path / "student" / "checkpoints").glob("step_*"))).lineage()
    assert [ancestor.path for ancestor in lineage.ancestors] == paths
    region_split = open_dataset(chain.region).open_split("train")
    union = np.union1d(train_split.identities, region_split.identities)
    assert len(union) > train_split.num_samples
    assert np.array_equal(lineage.identities, union)


def looks(config: Path, run_dir: Path, teachers: str) -> list[bool]:
    """Of each teacher, whether two looks at the same pictures are the same, and without gradient."""
    job = compose(config, run_dir, [teachers]).job
    job.model.train()
    images = next(read_ahead(job, 0)).images
    pairs = zip(job.teachers.look_at(images), job.teachers.look_at(images), strict=True)
    return [torch.equal(first, second) and not first.requires_grad for first, second in pairs]


def test_teachers_are_in_evaluation_mode(chain: Chain, tmp_path: Path) -> None:
    """Though one of them was trained with dropout."""
    assert run_ranks(1, looks, chain.config(), tmp_path / "run", chain.both) == [[True, True]]


def test_teachers_that_have_no_say_change_no_bit(chain: Chain, tmp_path: Path) -> None:
    """soft_share 0 and label_share 1 train as no teacher does, with dropout: looking draws nothing and disturbs nothing."""
    overrides = ["model.name=test_resnet", "model.kwargs.drop_rate=0.2"]
    silent = [chain.both, "distillation.soft_share=0.0", "distillation.label_share=1.0"]
    train(chain.config(), tmp_path / "alone", *overrides)
    train(chain.config(), tmp_path / "silent", *overrides, *silent)
    assert same_weights(tmp_path / "alone", tmp_path / "silent")
    for ours, theirs in zip(rows_of(tmp_path / "alone"), rows_of(tmp_path / "silent"), strict=True):
        assert (ours["train"], ours["val"]) == (theirs["train"], theirs["val"])


def first_losses(config: Path, folder: Path, *settings: Sequence[str]) -> list[list[float]]:
    """For each list of overrides, the mean loss of the first two steps over all ranks."""
    found = []
    for number, overrides in enumerate(settings):
        job = compose(config, folder / str(number), overrides).job
        job.model.train()
        running, losses, batches = Running(Totals(job.num_classes, job.world.device)), [], read_ahead(job, 0)
        for step in range(2):
            run_step(job, batches, running, step)
            losses.append(compute(job.world.sum_across_ranks(running.totals.vector)).loss)
            running.reset()
        found.append(losses)
    return found


KEYS = {
    "temperature": ["distillation.temperature=1.0"],
    "soft_share": ["distillation.soft_share=0.2"],
    "label_share": ["distillation.label_share=0.9"],
    "teacher_weights": ["distillation.teacher_weights=[1.0,3.0]"],
    "label objective": ["loss.label_smoothing=0.4"],
}


def test_each_key_acts_from_the_first_loss_on(chain: Chain, tmp_path: Path) -> None:
    """Every setting gives another loss in the first step; so do one teacher, the other, and none; weights that are equal do not."""
    settings = {name: [chain.both, *overrides] for name, overrides in KEYS.items()}
    settings |= {"both": [chain.both], "none": []}
    settings |= {run.name: [f"distillation.teachers=[{run}]"] for run in chain.teachers}
    settings["alike"] = [chain.both, "distillation.teacher_weights=[2.0,2.0]"]
    (losses,) = run_ranks(1, first_losses, chain.config(), tmp_path, *settings.values())
    found = {name: first for name, (first, _) in zip(settings, losses, strict=True)}
    assert found.pop("alike") == found["both"]
    assert len(set(found.values())) == len(found), found


def test_ranks_do_not_change_what_is_distilled(chain: Chain, tmp_path: Path) -> None:
    """1, 2 and 3 ranks: the losses agree to 1e-5, every rank has the same teachers; precision is the teachers' too."""
    exact: list[float] = []
    for world_size in (1, 2, 3):
        settings = [[chain.both, f"train.precision={precision}"] for precision in ("fp32", "bf16")]
        (fp32,) = run_ranks(world_size, first_losses, chain.config(), tmp_path / f"fp32_{world_size}", settings[0])[0]
        exact = exact or fp32
        assert fp32 == pytest.approx(exact, rel=1e-5)
    (bf16,) = run_ranks(2, first_losses, chain.config(), tmp_path / "bf16", settings[1])[0]
    assert bf16 == pytest.approx(exact, rel=1e-2)
    assert bf16 != exact


@pytest.mark.slow
def test_a_resume_is_exact_and_the_teachers_may_have_moved(chain: Chain, tmp_path: Path) -> None:
    """Stopped in mid-epoch, its teachers moved elsewhere: the same history and weights. Evaluating needs no teacher."""
    config = chain.config(epochs=2, every_steps=1)
    keep = ["checkpoint.keep_last=100", "model.kwargs.drop_rate=0.1"]
    train(config, tmp_path / "whole", chain.both, *keep)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step=4)
    moved = [shutil.copytree(run, tmp_path / "moved" / run.name) for run in chain.teachers]
    said = train(config, tmp_path / "broken", f"distillation.teachers=[{moved[0]},{moved[1]}]", *keep)
    assert "going on from step 4" in said
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    rows = [rows_of(tmp_path / name) for name in ("whole", "broken")]
    assert [(row["train"], row["val"]) for row in rows[0]] == [(row["train"], row["val"]) for row in rows[1]]
    shutil.rmtree(tmp_path / "moved")
    arguments = ["--run", tmp_path / "broken", "--data", chain.world, "--split", "test"]
    assert command_on_ranks(1, "aplantida_dist.evaluate", arguments, tmp_path)[0].code == 0


def test_other_teachers_are_refused_on_resume(chain: Chain, tmp_path: Path) -> None:
    """Another checkpoint at the same path, another order, none at all, or another setting."""
    config, teacher = chain.config(epochs=1, every_steps=1), tmp_path / "teacher"
    shutil.copytree(chain.teachers[0], teacher)
    alone = f"distillation.teachers=[{teacher}]"
    train(config, tmp_path / "run", alone, "checkpoint.keep_last=100")
    cut_back(tmp_path / "run", step=2)
    said = train_complaint(config, tmp_path, alone, "distillation.temperature=2.0")
    assert "distillation.temperature was 3.0, is 2.0" in said
    assert "teachers was " in (said := train_complaint(config, tmp_path))
    assert ", is none (" in said
    assert "teachers was " in train_complaint(config, tmp_path, chain.both)
    shutil.rmtree(teacher)
    shutil.copytree(chain.teachers[1], teacher)
    said = train_complaint(config, tmp_path, alone)
    assert "cannot go on, because what decides the numbers has changed: teachers was " in said
    assert "teachers.json names those of this run" in said


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_teacher_that_was_trained_on_val_is_a_leak(chain: Chain, tmp_path: Path, world_size: int) -> None:
    """The student's splits were drawn anew: the line names the teacher; allowed, every row has its clean part."""
    build(chain.folder / "world_pictures", tmp_path / "drawn_anew", seed=5, near_distance=None)
    val = open_dataset(tmp_path / "drawn_anew").open_split("val").identities
    leaked = np.isin(val, open_dataset(chain.world).open_split("train").identities)
    assert 0 < leaked.sum() < len(val)
    config = write_config(tmp_path / "config.yaml", tmp_path / "drawn_anew", epochs=1)
    teacher = chain.teachers[0]
    said = train_complaint(config, tmp_path, f"distillation.teachers=[{teacher}]", world_size=world_size)
    assert f"{leaked.sum()} of {len(val)} photographs of val were trained on by {teacher}/checkpoints/step_" in said
    assert "(a teacher); use a dataset that keeps the splits" in said
    allowed = [f"distillation.teachers=[{teacher}]", "--allow-leak"]
    train(config, tmp_path / "run", *allowed, world_size=world_size)
    assert [row["val"]["leaked_samples"] for row in rows_of(tmp_path / "run")] == [leaked.sum()]


def test_what_cannot_teach_says_why(chain: Chain, tmp_path: Path) -> None:
    """No run, a file, a lone checkpoint, another class map; each is one line that names the key."""
    (tmp_path / "weights.pt").write_bytes(b"")
    (checkpoint, *_) = (chain.teachers[0] / "checkpoints").glob("step_*")
    shutil.copytree(checkpoint, tmp_path / "a" / "b" / "alone")
    fill(tmp_path / "other", {"Quercus": 6, "Tilia": 6, "Acer": 6}, first=5000)
    build(tmp_path / "other", tmp_path / "other_dataset", near_distance=None)
    other = write_config(tmp_path / "other.yaml", tmp_path / "other_dataset")
    for config, name, found in (
        (chain.config(), tmp_path / "absent", "nothing is here; name a run folder or a folder below its checkpoints/"),
        (chain.config(), tmp_path / "weights.pt", "a file; name a run folder"),
        (chain.config(), tmp_path / "a" / "b" / "alone", "classes.json is missing"),
        (other, chain.teachers[0], "knows 1 of the student's 3 classes and the labels of "),
    ):
        said = train_complaint(config, tmp_path, f"distillation.teachers=[{name}]")
        assert said.startswith("error: distillation.teachers: ")
        assert found in said


def test_settings_that_do_not_fit_are_refused(chain: Chain, tmp_path: Path) -> None:
    """Weights that are not one a teacher, nothing to learn from, and settings that no teacher makes act."""
    with pytest.raises(ConfigError, match=r"teacher_weights: found \[1.0\], expected one number for each of the 2"):
        load_config(chain.config(), [chain.both, "distillation.teacher_weights=[1.0]"])
    with pytest.raises(
        ConfigError, match=r"label_share: found 0\.0, expected above 0 where distillation\.soft_share is 0"
    ):
        load_config(chain.config(), ["distillation.soft_share=0.0", "distillation.label_share=0.0"])
    said = complaint(
        "aplantida_dist.train",
        ["--config", chain.config(), "--run-dir", tmp_path / "run", "distillation.temperature=2.0"],
        tmp_path,
    )
    assert "distillation.temperature: is set to 2.0, but nothing reads it under this config" in said


def test_the_shipped_student_has_the_originals_settings_and_runs_small_without_its_teachers(
    dataset_dir: Path, tmp_path: Path
) -> None:
    """alpha 0.7, beta 0.3, T 3.0, two teachers; --debug drops them and says so."""
    path = Path(__file__).parent.parent / "configs" / "student.yaml"
    settings = load_config(path).distillation
    assert (settings.soft_share, settings.label_share, settings.temperature) == (0.7, 0.3, 3.0)
    assert settings.teachers == ("runs/teacher_global", "runs/teacher_regional")
    said = train(
        path,
        tmp_path / "run",
        "--debug",
        f"data.dataset={dataset_dir}",
        "data.image_size=32",
        "train.epochs=2",
        "--max-samples",
        "20",
    )
    assert '--debug: distillation.teachers = [] (was ["runs/teacher_global", "runs/teacher_regional"])' in said
    assert not (tmp_path / "run" / "teachers.json").exists()


def test_without_teachers_nothing_is_looked_at() -> None:
    """No logits, and no call on the pictures."""
    assert Teachers(()).look_at(torch.zeros(1)) == ()
