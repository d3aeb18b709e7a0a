"""Stored soft labels: written once and exactly, found by the sample's own identity, never replaced by anything in silence."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.manifest import identity_digest, identity_of
from aplantida_dist.objective import CrossEntropy, Targets
from aplantida_dist.run_folder import resolve_checkpoint
from aplantida_dist.soft_label_file import (
    Preprocessing,
    SoftLabelError,
    SoftLabelFacts,
    open_soft_labels,
    write_soft_labels,
)
from aplantida_dist.soft_labelling import records_of
from aplantida_dist.soft_objective import soft_label_loss
from aplantida_dist.soft_targets import open_soft_targets
from tests.conftest import CLASSES
from tests.ranks import Finished, command_on_ranks, run_ranks
from tests.runs import cut_back, rows_of, write_config
from tests.test_resume import assert_same_run
from tests.test_training import losses_of_steps

NAMES = ("a", "b", "c", "d", "e")
KEYS = [f"key{number}" for number in range(7)]


@pytest.fixture(scope="module")
def teacher(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("teacher")
    config = write_config(folder / "config.yaml", dataset_dir, epochs=1)
    train(config, folder / "run", folder)
    return folder / "run"


@pytest.fixture(scope="module")
def soft(teacher: Path, dataset_dir: Path) -> Path:
    """Its soft labels of the train split: all classes."""
    path = teacher.parent / "all.soft"
    label(teacher, dataset_dir, path)
    return path


def train(config: Path, run_dir: Path, folder: Path, *overrides: str, code: int = 0) -> Finished:
    (finished,) = command_on_ranks(
        1, "aplantida_dist.train", ["--config", config, "--run-dir", run_dir, *overrides], folder
    )
    assert finished.code == code, finished.stderr
    return finished


def label(
    teacher: Path, dataset_dir: Path, path: Path, *arguments: str, world_size: int = 1, code: int = 0
) -> Finished:
    """Run the command; the first rank's output."""
    command = ["--run", teacher, "--data", dataset_dir, "--out", path, *arguments]
    ranks = command_on_ranks(world_size, "aplantida_dist.soft_labels", command, path.parent)
    assert {rank.code for rank in ranks} == {code}, ranks[0].stderr
    return ranks[0]


def store(
    path: Path,
    logits: torch.Tensor,
    *,
    keys: Sequence[str] = KEYS,
    names: Sequence[str] = NAMES,
    temperature: float = 2.0,
    num_kept: int = 3,
) -> Path:
    """Write a file of these logits ([samples, classes]), as the command does."""
    identities = torch.tensor([identity_of(key) for key in keys])
    facts = facts_of(identities.numpy(), names=names, temperature=temperature, num_kept=num_kept)
    records = records_of(logits, identities, torch.ones(len(keys)), facts=facts)
    write_soft_labels(path, facts, parts=[records[:2], records[2:]], seen=np.zeros(0, dtype=np.int64))
    return path


def facts_of(
    identities: NDArray[np.int64], *, names: Sequence[str], temperature: float = 2.0, num_kept: int
) -> SoftLabelFacts:
    return SoftLabelFacts(
        teacher_run="run",
        teacher_path="run/checkpoints/step_00000005",
        teacher_digest="0" * 64,
        lineage={"num_identities": 0, "ancestors": [], "unknown": []},
        class_names=tuple(names),
        temperature=temperature,
        num_kept=num_kept,
        split="train",
        manifest_digest="1" * 64,
        num_samples=len(identities),
        identity_digest=identity_digest(int(identities.sum())),
        preprocessing=Preprocessing(image_size=32, crop_fraction=0.95, interpolation="bicubic"),
        micro_batch_size=4,
        precision="fp32",
    )


def truncated(logits: torch.Tensor, *, temperature: float, num_kept: int) -> torch.Tensor:
    """What a file must come to mean, dense, in float64: the k largest as they are, the rest spread over the others."""
    probabilities = (logits.double() / temperature).softmax(1)
    top = probabilities.topk(num_kept).indices
    kept = torch.zeros_like(probabilities).scatter(1, top, 1.0).bool()
    rest = (probabilities * ~kept).sum(1, keepdim=True) / max(1, probabilities.shape[1] - num_kept)
    return torch.where(kept, probabilities, rest)


# the file


def test_a_file_holds_the_teacher_s_probabilities_under_the_samples_own_keys(
    teacher: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """Equal to the predictions that `evaluate` writes, key by key; any reader of safetensors opens it."""
    told = label(teacher, dataset_dir, tmp_path / "t.soft", "--temperature", "1", "--top", "5")
    assert "which was trained on 69 of these samples" in told.stdout
    arguments = ["--run", teacher, "--data", dataset_dir, "--split", "train", "--allow-leak"]
    arguments += ["--predictions", tmp_path / "p"]
    command_on_ranks(1, "aplantida_dist.evaluate", arguments, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "p").read_text().splitlines()]
    file = open_soft_labels(tmp_path / "t.soft")
    stored = file.look_up(np.array([identity_of(line["key"]) for line in lines]))
    assert stored.is_there.all()
    assert stored.class_indices.tolist() == [line["top5"] for line in lines]
    told_probabilities = np.array([line["top5_probabilities"] for line in lines])
    assert stored.probabilities == pytest.approx(told_probabilities, rel=2**-10)
    assert stored.probabilities.sum(1) + stored.rest == pytest.approx(1, abs=2**-9)
    arrays = load_file(tmp_path / "t.soft")
    assert (np.diff(arrays["identities"]) > 0).all()
    assert np.array_equal(arrays["probabilities"], file.arrays["probabilities"])
    assert file.facts.class_names == CLASSES
    assert file.facts.teacher_digest == resolve_checkpoint(teacher, "best").digest
    assert file.facts.preprocessing.augmented is False


def test_any_number_of_ranks_writes_the_same_bytes(
    teacher: Path, soft: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """1, 2, 3 ranks, and 1 with workers."""
    for world_size, overrides in ((2, []), (3, []), (1, ["data.num_workers=2"])):
        path = tmp_path / f"{world_size}.soft"
        label(teacher, dataset_dir, path, *overrides, world_size=world_size)
        assert path.read_bytes() == soft.read_bytes()
        assert not path.with_name(f"{path.name}.partial").exists()


def test_a_broken_off_command_goes_on_without_reading_what_it_has(
    teacher: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """It dies in its second part; with the pictures of the first destroyed it ends with the bytes of the unbroken one."""
    one_a_slot = "evaluation.micro_batch_size=1"
    label(teacher, dataset_dir, tmp_path / "whole.soft", one_a_slot)
    copy, path, folder = tmp_path / "data", tmp_path / "t.soft", tmp_path / "t.soft.partial"
    shutil.copytree(dataset_dir, copy)
    with_ruined(copy, shard_index=5)
    label(teacher, copy, path, one_a_slot, code=2)
    assert [part.name for part in sorted(folder.glob("part-*"))] == ["part-000000.bin"]
    said = label(teacher, copy, path, one_a_slot, "--top", "2", code=2).stderr
    assert "parts of other soft labels (num_kept differ)" in said
    shutil.copy(dataset_dir / "train" / "shard-000005.tar", copy / "train" / "shard-000005.tar")
    with_ruined(copy, shard_index=0)
    label(teacher, copy, path, one_a_slot, world_size=2)
    assert path.read_bytes() == (tmp_path / "whole.soft").read_bytes()
    assert label(teacher, copy, path, one_a_slot).stderr == "", "a finished file is left as it is"
    said = label(teacher, copy, path, one_a_slot, "--temperature", "2", code=2).stderr
    assert "holds other soft labels already" in said


def with_ruined(dataset: Path, *, shard_index: int) -> None:
    """Flip a byte in the last picture of a train shard."""
    split = open_dataset(dataset).open_split("train")
    place = int(split.read_index(shard_index)["offset"][-1]) + 100
    content = bytearray(split.shard_path(shard_index).read_bytes())
    content[place] ^= 0xFF
    split.shard_path(shard_index).write_bytes(content)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Each byte of a file, one after the other: an error of one line, never other soft labels."""
    path = store(tmp_path / "t.soft", torch.randn(7, 5))
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x01]) + content[place + 1 :])
        with pytest.raises(SoftLabelError, match=r"t\.soft: [^\n]*write it again"):
            open_soft_labels(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 100])
def test_what_is_no_file_of_soft_labels_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    """Also an absent one, and one that was cut."""
    path = tmp_path / "t.soft"
    with pytest.raises(SoftLabelError, match="no soft labels can be read here: No such file"):
        open_soft_labels(path)
    path.write_bytes(content)
    with pytest.raises(SoftLabelError, match="is no file of soft labels"):
        open_soft_labels(path)
    whole = store(path, torch.randn(7, 5)).read_bytes()
    for changed in (whole[:-1], whole + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(SoftLabelError, match=f"has {len(changed)} bytes, expected {len(whole)}"):
            open_soft_labels(path)


def test_samples_that_are_not_the_split_s_are_not_written(tmp_path: Path) -> None:
    """One left out, and one key twice."""
    with pytest.raises(SoftLabelError, match="two samples of the split have one key"):
        store(tmp_path / "t.soft", torch.randn(7, 5), keys=[*KEYS[:-1], KEYS[0]])
    identities = np.array([identity_of(key) for key in KEYS])
    facts = facts_of(identities, names=NAMES, num_kept=3)
    few = np.zeros(6, dtype=facts.record_dtype)
    with pytest.raises(SoftLabelError, match="6 samples with the identity digest"):
        write_soft_labels(tmp_path / "t.soft", facts, parts=[few], seen=np.zeros(0, dtype=np.int64))


def test_memory_holds_the_identities_and_not_the_probabilities(tmp_path: Path) -> None:
    """200,000 samples × 32 of 70,000 classes, 41 MB on disk: what is allocated is some int64 a sample, and the class names."""
    num_samples = 200_000
    identities = np.random.default_rng(0).permutation(num_samples).astype(np.int64)
    facts = facts_of(identities, names=[f"class {number}" for number in range(70_000)], num_kept=32)
    records = np.memmap(tmp_path / "records", facts.record_dtype, "w+", shape=(num_samples,))
    records["identity"] = identities
    records["class_indices"] = (identities[:, None] + np.arange(32)) % 70_000
    parts = [records[first : first + 1000] for first in range(0, num_samples, 1000)]
    tracemalloc.start()
    write_soft_labels(tmp_path / "t.soft", facts, parts=parts, seen=np.zeros(0, dtype=np.int64))
    _, written_peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    file = open_soft_labels(tmp_path / "t.soft")
    _, opened_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / "t.soft").stat().st_size
    assert size > 40_000_000
    assert max(written_peak, opened_peak) < size / 2
    assert file.look_up(np.array([65_000, 7])).class_indices[:, 0].tolist() == [65_000, 7]


# the objective


def targets_of(keys: Sequence[str], labels: Sequence[int]) -> Targets:
    return Targets(torch.tensor(labels), identities=torch.tensor([identity_of(key) for key in keys]))


@pytest.mark.parametrize("num_kept", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_files_combine_as_computed_by_hand(tmp_path: Path, num_kept: int, dtype: torch.dtype) -> None:
    """0.75 and 0.25 of two teachers, one with its classes in another order: the loss is the formula's, sample by sample."""
    generator = torch.Generator().manual_seed(num_kept)
    ours, theirs = (2 * torch.randn(7, 5, generator=generator) for _ in range(2))
    order = [3, 0, 4, 1, 2]
    files = [
        store(tmp_path / "ours", ours, num_kept=num_kept),
        store(tmp_path / "theirs", theirs[:, order], names=[NAMES[place] for place in order], num_kept=num_kept),
    ]
    soft_targets = open_soft_targets(files, weights=(3.0, 1.0), class_map=ClassMap(NAMES))
    taught = sum(
        weight * truncated(logits, temperature=2.0, num_kept=num_kept)
        for weight, logits in ((0.75, ours), (0.25, theirs))
    )
    loss = soft_label_loss(
        soft_targets,
        label_objective=CrossEntropy(0.1),
        soft_share=0.7,
        label_share=0.3,
        device=torch.device("cpu"),
    )
    rows = [4, 0, 6, 4]
    targets = targets_of([KEYS[row] for row in rows], [1, 2, 0, 4])
    logits = torch.randn(4, 5, generator=generator).to(dtype).requires_grad_()
    losses = loss(logits, targets)
    assert losses.dtype == torch.float32
    log_student = (logits.double() / 2.0).log_softmax(1)
    expected = 0.7 * 4.0 * (taught[rows] * (taught[rows].log() - log_student)).sum(1)
    expected += 0.3 * CrossEntropy(0.1)(logits.double(), targets)
    assert losses.tolist() == pytest.approx(expected.tolist(), abs=2e-3)


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(tmp_path: Path) -> None:
    """The divergence is 0 where the two are equal, with no gradient, and above 0 elsewhere; T² scales it."""
    logits = torch.randn(7, 5)
    path = store(tmp_path / "t.soft", logits, num_kept=5)
    soft_targets = open_soft_targets([path], weights=None, class_map=ClassMap(NAMES))
    loss = soft_label_loss(
        soft_targets, label_objective=CrossEntropy(0.0), soft_share=1.0, label_share=0.0, device=torch.device("cpu")
    )
    student = logits.clone().requires_grad_()
    losses = loss(student, targets_of(KEYS, [0] * 7))
    losses.sum().backward()
    assert losses.abs().max() < 1e-5
    assert student.grad is not None
    assert student.grad.abs().max() < 2e-3
    assert (loss(logits.flip(1), targets_of(KEYS, [0] * 7)) > 1e-3).all()


def test_other_classes_are_told_by_name_and_their_share_is_reported(tmp_path: Path) -> None:
    """The student lacks two of the teacher's classes and has one that it does not: the shared ones sum to 1 again."""
    logits = torch.tensor([[4.0, 1.0, 2.0, 0.0, 3.0]]).log()[:, [0, 1, 2, 4]]
    path = store(tmp_path / "t.soft", logits, keys=KEYS[:1], names=("a", "b", "c", "x"), temperature=1.0, num_kept=2)
    soft_targets = open_soft_targets([path], weights=None, class_map=ClassMap(("c", "new", "a")))
    loss = soft_label_loss(
        soft_targets, label_objective=CrossEntropy(0.0), soft_share=1.0, label_share=0.0, device=torch.device("cpu")
    )
    taught = loss.taught_distribution(targets_of(KEYS[:1], [0]).identities, device=torch.device("cpu"))
    # Of 10 parts a has 4 and x 3; b and c share the 3 that remain.
    assert taught.tolist() == [pytest.approx([1.5 / 5.5, 0.0, 4 / 5.5], abs=1e-3)]
    (target,) = soft_targets.targets(np.array([identity_of(KEYS[0])]))
    assert target.mass.tolist() == pytest.approx([0.55], abs=1e-3)


def test_teachers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """No class in common; two temperatures; a teacher whose probability lies elsewhere does not count as a soft label."""
    one = store(tmp_path / "one", torch.randn(7, 5))
    other = store(tmp_path / "other", torch.randn(7, 5), temperature=3.0)
    with pytest.raises(SoftLabelError, match=r"softened at temperature 3, .*one at 2; .*one temperature"):
        open_soft_targets([one, other], weights=None, class_map=ClassMap(NAMES))
    with pytest.raises(SoftLabelError, match="knows none of our 2 classes"):
        open_soft_targets([one], weights=None, class_map=ClassMap(("y", "z")))
    sure = store(tmp_path / "sure", torch.tensor([[50.0, 0, 0, 0, 0]] * 7))
    identities = np.array([identity_of(key) for key in KEYS])
    for names, is_there in ((("b", "c"), False), (("a", "b"), True)):
        (target,) = open_soft_targets([sure], weights=None, class_map=ClassMap(names)).targets(identities)
        assert (target.is_there == is_there).all()


def test_a_sample_that_one_file_lacks_has_the_label_s_loss_alone(tmp_path: Path) -> None:
    """Never a one-hot in the soft part, and nothing of the other teacher alone."""
    whole, part = (
        store(tmp_path / "whole", torch.randn(7, 5)),
        store(tmp_path / "part", torch.randn(6, 5), keys=KEYS[:6]),
    )
    soft_targets = open_soft_targets([whole, part], weights=None, class_map=ClassMap(NAMES))
    loss = soft_label_loss(
        soft_targets, label_objective=CrossEntropy(0.0), soft_share=0.7, label_share=0.3, device=torch.device("cpu")
    )
    logits, targets = torch.randn(2, 5), targets_of([KEYS[6], KEYS[0]], [1, 1])
    label_losses = 0.3 * CrossEntropy(0.0)(logits, targets)
    missing, found = (loss(logits, targets) - label_losses).tolist()
    assert missing == 0.0
    assert found > 0.0


# in training


@pytest.mark.slow
def test_ranks_do_not_change_the_training_and_the_files_act(soft: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """1 and 2 ranks: the same samples, losses equal to 1e-5; shares 0 and 1 are plain training, and 0.7 and 0.3 are not."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=4)
    files = f"soft_labels.files=[{soft}]"
    one, two = (run_ranks(size, losses_of_steps, config, tmp_path / str(size), [files]) for size in (1, 2))
    assert two[0]["losses"] == pytest.approx(one[0]["losses"], rel=1e-5)
    shares = ["soft_labels.soft_share=0.0", "soft_labels.label_share=1.0"]
    (plain,) = run_ranks(1, losses_of_steps, config, tmp_path / "plain", [])
    (off,) = run_ranks(1, losses_of_steps, config, tmp_path / "off", [files, *shares])
    assert off["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert plain["keys"] == off["keys"] == one[0]["keys"]
    assert abs(one[0]["losses"][0] - plain["losses"][0]) > 0.1


def test_a_resumed_student_is_the_unbroken_one_and_its_files_may_not_change(
    teacher: Path, soft: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """Cut back into the middle of an epoch; the files may move, but not be others."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2, every_steps=1)
    overrides = ["checkpoint.keep_last=100"]
    train(config, tmp_path / "whole", tmp_path, f"soft_labels.files=[{soft}]", *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step=7)
    other, moved = tmp_path / "other.soft", tmp_path / "moved.soft"
    label(teacher, dataset_dir, other, "--top", "2")
    for files, now in (
        (f"[{other}]", open_soft_targets([other], weights=None, class_map=ClassMap(CLASSES)).digest),
        ("[]", "none"),
    ):
        said = train(config, tmp_path / "broken", tmp_path, f"soft_labels.files={files}", *overrides, code=2).stderr
        assert f", is {now[:12]} (other files)" in said
    shutil.copy(soft, moved)
    train(config, tmp_path / "broken", tmp_path, f"soft_labels.files=[{moved}]", *overrides)
    for row in (rows := [*rows_of(tmp_path / "whole"), *rows_of(tmp_path / "broken")]):
        del row["digests"]["config"]
    assert rows[:2] == rows[2:]
    train(config, tmp_path / "again", tmp_path, f"soft_labels.files=[{soft}]", *overrides)
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_a_missing_soft_label_is_an_error_or_counted(teacher: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """The file of the val split for train: every key missing, told with the first ones before a step; within a budget each row counts."""
    config, path = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1), tmp_path / "val.soft"
    label(teacher, dataset_dir, path, "--split", "val")
    files = f"soft_labels.files=[{path}]"
    said = train(config, tmp_path / "run", tmp_path, files, "soft_labels.missing_budget=68", code=2).stderr
    first_key = open_dataset(dataset_dir).open_split("train").sample_keys(0)[0]
    assert f"69 of 69 train samples have no soft label ({first_key}, " in said
    assert "missing_budget allows 68" in said
    assert not (tmp_path / "run").exists()
    train(config, tmp_path / "run", tmp_path, files, "soft_labels.missing_budget=69", "soft_labels.label_share=1.0")
    train(config, tmp_path / "plain", tmp_path)
    (row,), (plain,) = rows_of(tmp_path / "run"), rows_of(tmp_path / "plain")
    assert row["train"].pop("missing_soft_labels") == 69
    assert row["train"] == plain["train"], "without a soft label there is the label's loss, and nothing else"


def test_keys_that_nothing_reads_or_that_do_not_fit_are_refused(soft: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """Shares without files; two weights for one file."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    said = train(config, tmp_path / "run", tmp_path, "soft_labels.soft_share=0.5", code=2).stderr
    assert "soft_labels.soft_share: is set to 0.5, but nothing reads it" in said
    overrides = [f"soft_labels.files=[{soft}]", "soft_labels.weights=[1.0, 2.0]"]
    said = train(config, tmp_path / "run", tmp_path, *overrides, code=2).stderr
    assert "soft_labels.weights: found [1.0, 2.0], expected one number for each of the 1 soft_labels.files" in said


def test_what_a_teacher_has_seen_its_student_has(teacher: Path, soft: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """The lineage travels in the file, without the teacher's run; a val split that the teacher was trained on is a leak."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    train(config, tmp_path / "run", tmp_path, f"soft_labels.files=[{soft}]")
    lineage = resolve_checkpoint(tmp_path / "run", "last").lineage()
    best = resolve_checkpoint(teacher, "best")
    assert [(ancestor.path, ancestor.digest) for ancestor in lineage.ancestors] == [(str(best.path), best.digest)]
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    shutil.copy(dataset_dir / "classes.json", swapped)
    for split, other in (("val", "train"), ("train", "val")):
        shutil.copytree(dataset_dir / other, swapped / split)
    path = tmp_path / "swapped.soft"
    label(teacher, swapped, path)
    other_config = write_config(tmp_path / "other.yaml", swapped, epochs=1)
    said = train(other_config, tmp_path / "leak", tmp_path, f"soft_labels.files=[{path}]", code=2).stderr
    assert f"69 of 69 photographs of val were trained on by {best.path} (a teacher)" in said
