"""Bad pictures and shards: by policy the run stops and names them, or they are void, counted, and the rest is exact."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.images import EvaluationTransform
from aplantida_dist.data.index import ShardError, read_member
from aplantida_dist.data.manifest import identity_of
from aplantida_dist.data.plan import Coordinates, StoredPlan
from aplantida_dist.data.stream import GREY, MicroBatches, Reading, StreamError, stream
from aplantida_dist.errors import UserError
from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals, compute
from aplantida_dist.shards.verify import verify_dataset
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from tests.bad_shards import Sample, blank, bomb, broken, copied, cut, flipped, half_grey
from tests.conftest import CLASSES
from tests.faults.conftest import Fired
from tests.laws import require_exact_resume, run_whole, train, weights_at
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, rows_of, write_config

Array = np.ndarray[Any, Any]
VOID = ("data.on_bad_sample=void",)
BAD = (("train", 0, 3), ("train", 3, 7), ("val", 0, 2))
STORED = EvaluationTransform(32, 0.9, "bicubic")


def refused(world_size: int, config: Path, run_dir: Path, *overrides: str) -> str:
    """Run the command on one rank; the one line with which it refuses."""
    (finished,) = command_on_ranks(
        world_size, "aplantida_dist.train", ["--config", config, "--run-dir", run_dir, *overrides], config.parent
    )
    assert finished.code == 2, finished.stdout
    (line,) = finished.stderr.splitlines()
    return line


def batches_of(dataset_dir: Path, *, voids: bool, size: int = 5, split: str = "train") -> list[Batch]:
    """A split in its stored order, read by a worker process."""
    opened = open_dataset(dataset_dir).open_split(split)
    plan = StoredPlan(opened.shard_sizes, size)
    micro_batches = MicroBatches(opened, plan, STORED, seed=0, voids_bad_samples=voids)
    slots = [Coordinates(0, 0, slot) for slot in plan.slots_of(0, 1)]
    return list(stream(micro_batches, slots, reading=Reading(1, 2, pin_memory=False)))


def ledger_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]


KINDS: dict[str, tuple[Callable[[bytes], bytes], bool, str]] = {
    "bit flipped": (flipped, False, "its crc32 differs"),
    "blank": (blank, False, "its crc32 differs"),
    "truncated": (cut, True, "does not decode"),
    "grey where cut": (half_grey, True, "even grey"),
    "bomb": (bomb, True, "does not decode: .*(60000 × 60000|limit of|exceeds)"),
}
"""How a picture is broken, whether the index is in the know, and what is said of it."""


@pytest.mark.fault(
    what="a bad picture in a shard: bit flipped, blank, truncated, half grey, bomb",
    how="bytes overwritten in the tar, with its digests or without",
    holds="`stop`: the error names shard, key and offset; `void`: the ledger does, and every other picture is what it was",
)
def test_every_kind_of_bad_picture_is_named(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """Read by a worker process, under both policies."""
    whole = batches_of(dataset_dir, voids=False)
    for number, (kind, (damage, smuggles, reason)) in enumerate(KINDS.items()):
        sample = Sample(copied(dataset_dir, tmp_path / str(number)), "train", 2, 4)
        (sample.smuggle if smuggles else sample.overwrite)(damage(sample.content))
        with pytest.raises(StreamError, match=reason) as stopped:
            batches_of(sample.dataset_dir, voids=False)
        for name in (str(sample.shard_path), sample.sample_key, f"offset {sample.offset}"):
            assert name in str(stopped.value), kind
        batches = batches_of(sample.dataset_dir, voids=True)
        (bad,) = [bad for batch in batches for bad in batch.bad]
        assert (bad.shard, bad.sample_key, bad.offset, bad.label) == (
            sample.shard_path.name,
            sample.sample_key,
            sample.offset,
            sample.label,
        )
        for batch, before in zip(batches, whole, strict=True):
            others = torch.ones(5, dtype=torch.bool)
            others[[bad.place for bad in batch.bad]] = False
            assert torch.equal(batch.identities, before.identities)
            for name in ("images", "labels", "weights"):
                assert torch.equal(getattr(batch, name)[others], getattr(before, name)[others])
    fired(f"{len(KINDS)} of {len(KINDS)} kinds under each policy")


def test_a_good_picture_stands_in_with_its_label_or_grey(dataset_dir: Path, tmp_path: Path) -> None:
    """BatchNorm and mixing see a picture of the micro-batch that fits its label; the identity stays that of the bad one."""
    dataset = copied(dataset_dir, tmp_path)
    bad = broken(dataset, *(("train", 0, member) for member in (0, 2, 5, 6, 7, 8, 9)))
    first, second = batches_of(dataset, voids=True)[:2]
    assert [sample.place for sample in first.bad] == [0, 2]
    assert torch.equal(first.images[0], first.images[1])
    assert torch.equal(first.images[2], first.images[1])
    assert first.labels[[0, 2]].tolist() == [int(first.labels[1])] * 2
    assert first.weights.tolist() == [0, 1, 0, 1, 1]
    assert first.bad_identities.tolist() == [identity_of(sample.sample_key) for sample in bad[:2]]
    assert (second.images == GREY).all()
    assert second.weights.sum() == 0


def gradient_of_first_step(config: Path, run_dir: Path) -> tuple[list[Array], float, tuple[int, int]]:
    """The gradient that the optimizer is given in step 1, and the step's loss and counts over all ranks."""
    job = compose(config, run_dir, [*VOID, "train.clip_norm=null"]).job
    given: list[Array] = []

    def keep(*_: Any) -> None:
        given.extend(
            parameter.grad.numpy().copy() for parameter in job.model.parameters() if parameter.grad is not None
        )

    job.optimizer.optimizer.register_step_pre_hook(keep)
    running = Running(Totals(job.num_classes, job.world.device))
    run_step(job, read_ahead(job, 0), running, 0)
    metrics = compute(job.world.sum_across_ranks(running.totals.vector))
    return given, metrics.loss, (metrics.num_samples, metrics.void_samples)


def gradient_by_hand(config: Path, run_dir: Path) -> tuple[list[Array], float]:
    """The gradient of the mean loss of the good samples of step 1, each forwarded alone."""
    job = compose(config, run_dir, [*VOID, "train.clip_norm=null"]).job
    model, batches = copy.deepcopy(job.world.unwrap(job.model)).train(), read_ahead(job, 0)
    losses = []
    for _ in range(job.plan.slots_per_step):
        batch = next(batches)
        for place in batch.weights.nonzero().flatten().tolist():
            logits = model(job.normalize(batch.images[place : place + 1]))
            losses.append(
                torch.nn.functional.cross_entropy(logits, batch.labels[place : place + 1], label_smoothing=0.1)
            )
    loss = torch.stack(losses).mean()
    loss.backward()
    return [parameter.grad.numpy() for parameter in model.parameters() if parameter.grad is not None], loss.item()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_gradient_is_that_of_the_samples_that_remain(dataset_dir: Path, tmp_path: Path, world_size: int) -> None:
    """Σ w·ℓ / Σ w over what remains of the step on all ranks, although no rank knows of the others' bad samples."""
    dataset = copied(dataset_dir, tmp_path)
    broken(dataset, *(("train", shard, member) for shard in range(5) for member in (0, 4, 8, 12)))
    config = write_config(tmp_path / "config.yaml", dataset)
    ((expected, loss),) = run_ranks(1, gradient_by_hand, config, tmp_path / "by_hand")
    ranks = run_ranks(world_size, gradient_of_first_step, config, tmp_path / "run")
    for given, told, (num_samples, void_samples) in ranks:
        assert void_samples > 0
        assert num_samples + void_samples == 16
        assert told == pytest.approx(loss, rel=1e-6)
        for ours, theirs in zip(given, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.fault(
    what="bad pictures in train and val under `void`",
    how="bits flipped in the tars; 1 and 2 ranks; cut back in mid-epoch and resumed, twice",
    holds="void in the rows, one ledger line each with shard, key and offset; ranks agree; the resume is exact to the bit",
)
def test_a_bad_picture_is_void_and_the_rest_is_exact(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """on_bad_sample=void: counted in each row, proven by the identities, in the ledger and on the screen, whatever the ranks or stops."""
    dataset = copied(dataset_dir, tmp_path)
    bad = broken(dataset, *BAD)
    config = write_config(tmp_path / "config.yaml", dataset, epochs=2)
    overrides = [*VOID, "data.bad_sample_budget=3", "ema.decay=0.9"]
    whole = run_whole(config, overrides)
    for row in rows_of(whole):
        assert (row["train"]["num_samples"], row["train"]["void_samples"]) == (67, 2)
        assert (row["val"]["num_samples"], row["val"]["void_samples"]) == (8, 1)
        assert row["val_ema"]["void_samples"] == 1
        assert row["train"]["identity_digest"] == open_dataset(dataset_dir).open_split("train").identity_digest
    entries = ledger_of(whole)
    told = {(entry["epoch"], entry["split"], entry["sample_key"], entry["offset"], entry["label"]) for entry in entries}
    expected = {(epoch, s.split, s.sample_key, s.offset, s.label) for epoch in (1, 2) for s in bad}
    assert (told, len(entries)) == (expected, 6)
    steps = [entry["step"] for entry in entries]
    assert steps == sorted(steps)
    for stop in (3, 5, 7):
        require_exact_resume(whole, config, overrides, stop=stop)
        assert ledger_of(whole.with_name(f"broken_{stop}")) == entries
    said = train(2, config, tmp_path / "two", *overrides)
    assert ledger_of(tmp_path / "two") == entries
    for ours, theirs in zip(rows_of(whole), rows_of(tmp_path / "two"), strict=True):
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-5)
        assert ours["train"]["void_samples"] == theirs["train"]["void_samples"]
    assert "epoch 2: train: 2 bad samples are void: train/shard-00000" in said
    assert f"epoch 2: val: 1 bad samples are void: val/shard-000000.tar 1; of {CLASSES[bad[2].label]} 1" in said
    fired("3 bad of 78; 3 resumes, 2 ranks: same ledger, same bits")


@pytest.mark.slow
@pytest.mark.fault(
    what="more bad pictures than the budget",
    how="bits flipped in four pictures, `data.bad_sample_budget=2`",
    holds="every rank stops, with counts by shard and class; with more budget the same command ends as a run that had it at once",
)
def test_beyond_the_budget_the_run_stops_and_may_go_on(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """The budget is of different samples: one that is bad in each of three epochs counts once; a resume keeps the count."""
    dataset = copied(dataset_dir, tmp_path)
    samples = broken(dataset, ("train", 0, 3), ("train", 0, 4), ("train", 3, 7), ("val", 0, 2))
    config = write_config(tmp_path / "config.yaml", dataset, epochs=3, every_steps=1)
    line = refused(1, config, tmp_path / "run", *VOID, "data.bad_sample_budget=2")
    assert "3 samples cannot be delivered, data.bad_sample_budget is 2: train/shard-000000.tar 2" in line
    assert CLASSES[samples[0].label] in line
    assert (tmp_path / "run" / "checkpoints" / "last.json").exists()
    again = refused(1, config, tmp_path / "run", *VOID, "data.bad_sample_budget=3")
    assert "4 samples cannot be delivered" in again
    assert "val/shard-000000.tar 1" in again
    train(1, config, tmp_path / "run", *VOID, "data.bad_sample_budget=4")
    train(1, config, tmp_path / "at_once", *VOID, "data.bad_sample_budget=4")
    assert ledger_of(tmp_path / "run") == ledger_of(tmp_path / "at_once")
    for ours, theirs in zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "at_once"), strict=True):
        assert (ours["train"], ours["val"]) == (theirs["train"], theirs["val"])
    assert same_weights(tmp_path / "run", tmp_path / "at_once", 15)
    fired("stopped at 3 and at 4 of 2 and 3; ended the same")


def same_weights(one: Path, other: Path, step: int) -> bool:
    ours, theirs = weights_at(one, step), weights_at(other, step)
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_two_ranks_stop_together_beyond_the_budget(dataset_dir: Path, tmp_path: Path) -> None:
    """Neither waits for the other, and one of them tells it."""
    dataset = copied(dataset_dir, tmp_path)
    broken(dataset, ("train", 0, 3), ("train", 3, 7))
    config = write_config(tmp_path / "config.yaml", dataset)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", *VOID, "data.bad_sample_budget=1"]
    ranks = command_on_ranks(2, "aplantida_dist.train", arguments, tmp_path)
    assert [rank.code for rank in ranks] == [2, 2]
    assert "2 samples cannot be delivered, data.bad_sample_budget is 1" in ranks[0].stderr
    assert ranks[1].stderr == ""


@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "val"])
def test_a_run_that_stopped_may_go_on_by_voiding(dataset_dir: Path, tmp_path: Path, split: str) -> None:
    """`stop` names the picture, in an evaluation too; the policy is free to change, for the same numbers."""
    dataset = copied(dataset_dir, tmp_path)
    (sample,) = broken(dataset, (split, 0, 3))
    config = write_config(tmp_path / "config.yaml", dataset, epochs=1, every_steps=1)
    line = refused(1, config, tmp_path / "run")
    for name in (str(sample.shard_path), sample.sample_key, f"offset {sample.offset}"):
        assert name in line
    train(1, config, tmp_path / "run", *VOID)
    train(1, config, tmp_path / "at_once", *VOID)
    assert rows_of(tmp_path / "run")[0][split]["void_samples"] == 1
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "at_once")
    assert same_weights(tmp_path / "run", tmp_path / "at_once", 5)


@pytest.mark.slow
def test_void_changes_nothing_where_nothing_is_bad(dataset_dir: Path, tmp_path: Path) -> None:
    """The same bits, on two ranks too, and no ledger."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_resnet", epochs=1)
    for name, overrides in {"stop": (), "void": VOID}.items():
        train(2, config, tmp_path / name, *overrides)
    assert same_weights(tmp_path / "stop", tmp_path / "void", 5)
    assert rows_of(tmp_path / "stop")[0]["train"] == rows_of(tmp_path / "void")[0]["train"]
    assert not (tmp_path / "void" / "bad_samples.jsonl").exists()


def test_a_whole_step_may_be_void(dataset_dir: Path, tmp_path: Path) -> None:
    """Of a dataset whose pictures are all bad but one, most steps have no gradient: nothing divides by zero."""
    dataset = copied(dataset_dir, tmp_path)
    places = [("train", shard, member) for shard in range(6) for member in range(13 if shard < 5 else 4)]
    broken(dataset, *places[1:])
    config = write_config(tmp_path / "config.yaml", dataset, epochs=1)
    train(1, config, tmp_path / "run", *VOID, "data.bad_sample_budget=100", "train.log_every_steps=10")
    (row,) = rows_of(tmp_path / "run")
    assert (row["train"]["num_samples"], row["train"]["void_samples"]) == (1, 68)


@pytest.mark.slow
def test_spread_parameters_void_alike(dataset_dir: Path, tmp_path: Path) -> None:
    """FSDP2: the same rows as DDP on two ranks, losses to 1e-5."""
    dataset = copied(dataset_dir, tmp_path)
    broken(dataset, *BAD)
    config = write_config(tmp_path / "config.yaml", dataset, model="test_vit", epochs=1)
    for name in ("ddp", "fsdp"):
        train(2, config, tmp_path / name, *VOID, f"train.parallel={name}")
    (ours,), (theirs,) = rows_of(tmp_path / "ddp"), rows_of(tmp_path / "fsdp")
    assert ours["train"]["void_samples"] == theirs["train"]["void_samples"] == 2
    assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-5)
    assert ledger_of(tmp_path / "ddp") == ledger_of(tmp_path / "fsdp")


def test_an_evaluation_voids_within_the_budget(dataset_dir: Path, tmp_path: Path) -> None:
    """`aplantida_dist.evaluate` counts as the history does; a bad sample has no prediction; beyond the budget nothing is written."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    train(1, config, tmp_path / "run")
    dataset = copied(dataset_dir, tmp_path)
    samples = broken(dataset, ("test", 0, 1), ("test", 0, 4))

    def evaluate(name: str, *overrides: str) -> Any:
        files = ["--json", tmp_path / f"{name}.json", "--predictions", tmp_path / f"{name}.jsonl"]
        arguments: Sequence[Any] = ["--run", tmp_path / "run", "--data", dataset, *files, *overrides]
        return command_on_ranks(1, "aplantida_dist.evaluate", arguments, tmp_path)[0]

    stopped = evaluate("stop")
    assert (stopped.code, samples[0].sample_key in stopped.stderr) == (2, True)
    beyond = evaluate("beyond", *VOID, "data.bad_sample_budget=1")
    assert (beyond.code, "2 samples cannot be delivered" in beyond.stderr) == (2, True)
    done = evaluate("void", *VOID)
    assert "2 bad samples are void: test/shard-000000.tar 2" in done.stdout
    block = json.loads((tmp_path / "void.json").read_text())["test"]
    assert (block["num_samples"], block["void_samples"]) == (7, 2)
    keys = [json.loads(line)["key"] for line in (tmp_path / "void.jsonl").read_text().splitlines()]
    assert len(keys) == 7
    assert not {sample.sample_key for sample in samples} & set(keys)
    assert not list(tmp_path.glob("stop.json*")) + list(tmp_path.glob("beyond.json*"))


def read_while(dataset_dir: Path, act: Callable[[Path], None], *, shard_index: int, voids: bool) -> list[Batch]:
    """Read train in its stored order in this process; `act` is done to a shard while the first one is being read."""
    split = open_dataset(dataset_dir).open_split("train")
    micro_batches = MicroBatches(split, StoredPlan(split.shard_sizes, 5), STORED, seed=0, voids_bad_samples=voids)
    batches = []
    for slot in range(14):
        batch = micro_batches[Coordinates(0, 0, slot)]
        if batch.failure is not None:
            raise StreamError(batch.failure)
        batches.append(batch)
        if slot == 0:
            act(split.shard_path(shard_index))
    return batches


@pytest.mark.fault(
    what="a shard that is missing, cut or replaced while training",
    how="unlinked, truncated in place, overwritten by another shard, before and after it was opened",
    holds="an open shard that is unlinked or replaced is read on, exactly; all else stops under `void` too, naming shard and offset",
)
@pytest.mark.parametrize("voids", [False, True], ids=["stop", "void"])
def test_a_shard_that_goes_away_stops_or_is_read_on(
    dataset_dir: Path, tmp_path: Path, fired: Fired, voids: bool
) -> None:
    """A whole shard is never void."""

    def replace_by_another(path: Path) -> None:
        shutil.copy(path.with_name("shard-000005.tar"), path.with_name("other"))
        os.replace(path.with_name("other"), path)

    def truncate(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 3)

    faults: list[tuple[str, Callable[[Path], None], int, str]] = [
        ("missing", Path.unlink, 2, r"shard-000002\.tar: the shard cannot be opened: No such file"),
        ("replaced", replace_by_another, 2, r"shard-000002\.tar: the shard has \d+ bytes, the manifest says \d+: it was cut or repl"),
        ("cut", truncate, 2, r"shard-000002\.tar: the shard has \d+ bytes, the manifest says"),
        ("cut while open", truncate, 0, r"shard-000000\.tar: ends inside the sample at offset \d+: .* the shard is cut short"),
    ]  # fmt: skip
    for number, (_, act, shard_index, text) in enumerate(faults):
        with pytest.raises(StreamError, match=text):
            read_while(copied(dataset_dir, tmp_path / str(number)), act, shard_index=shard_index, voids=voids)
    whole = batches_of(dataset_dir, voids=voids)
    for act in (Path.unlink, replace_by_another):
        dataset = copied(dataset_dir, tmp_path / act.__name__)
        for ours, theirs in zip(read_while(dataset, act, shard_index=0, voids=voids), whole, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert ours.bad == ()
    fired(f"{len(faults)} named, 2 read on")


def test_a_shard_that_is_not_there_at_the_start_is_refused(dataset_dir: Path, tmp_path: Path) -> None:
    """Under both policies, before a step is taken."""
    dataset = copied(dataset_dir, tmp_path)
    config = write_config(tmp_path / "config.yaml", dataset)
    (dataset / "train" / "shard-000001.tar").unlink()
    for overrides in ((), VOID):
        assert "shard-000001.tar: the shard is not there" in refused(1, config, tmp_path / "run", *overrides)


def test_a_sample_that_cannot_say_who_it_is_stops(dataset_dir: Path, tmp_path: Path) -> None:
    """A flipped bit in its tar header: without its key coverage cannot be proven, so it is never void."""
    dataset = copied(dataset_dir, tmp_path)
    sample = Sample(dataset, "train", 1, 6)
    with sample.shard_path.open("r+b") as file:
        file.seek(sample.offset - 512)
        file.write(b"\x7f")
    with pytest.raises(StreamError, match=rf"shard-000001\.tar: no tar header before offset {sample.offset}"):
        batches_of(dataset, voids=True)


def test_a_read_error_is_told_with_its_place(dataset_dir: Path) -> None:
    """What a failing disk raises, here that of a folder opened as a file."""
    descriptor = os.open(dataset_dir, os.O_RDONLY)
    try:
        entry = open_dataset(dataset_dir).open_split("train").read_index(0)[0]
        with pytest.raises(ShardError, match=r"set: cannot be read at offset \d+: Is a directory"):
            read_member(descriptor, entry, shard_path=Path("set"))
    finally:
        os.close(descriptor)


@pytest.mark.fault(
    what="a wrong label in a shard",
    how="another class index written into KEY.cls of the tar, and into the index",
    holds="training goes by the index, whose sha256 the manifest holds: a changed one is refused at the start; `shards/verify.py` names the KEY.cls",
)
def test_a_wrong_label_is_never_learnt(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """KEY.cls is for other readers; ours is the index."""
    dataset = copied(dataset_dir, tmp_path)
    sample = Sample(dataset, "train", 1, 6)
    content, name = sample.shard_path.read_bytes(), f"{sample.sample_key}.cls".encode()
    place = content.index(name) + 512
    assert content[place : place + 1] == str(sample.label).encode()
    other = str((sample.label + 1) % len(CLASSES)).encode()
    sample.shard_path.write_bytes(content[:place] + other + content[place + 1 :])
    for ours, theirs in zip(batches_of(dataset, voids=True), batches_of(dataset_dir, voids=True), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
    damages = [str(damage) for damage in verify_dataset(dataset).damages]
    assert any(sample.sample_key in damage for damage in damages), damages
    index = np.fromfile(sample.index_path, dtype=np.uint8)
    index[-4] ^= 1
    index.tofile(sample.index_path)
    with pytest.raises(UserError, match=r"shard-000001\.idx: the index has changed"):
        batches_of(dataset, voids=True)
    fired("both refused or without effect")


def test_a_ledger_that_was_cut_or_edited(dataset_dir: Path, tmp_path: Path) -> None:
    """A last line that a crash cut is written again; any other bad line is refused by its number."""
    dataset = copied(dataset_dir, tmp_path)
    broken(dataset, *BAD)
    config = write_config(tmp_path / "config.yaml", dataset, epochs=2)
    train(1, config, tmp_path / "run", *VOID, "train.epochs=1")
    path = tmp_path / "run" / "bad_samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"split": "tra')
    train(1, config, tmp_path / "run", *VOID, "train.epochs=1")
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"offset":', b'"offzet":', 1))
    assert "bad_samples.jsonl: line 1 is no entry of the ledger" in refused(1, config, tmp_path / "run", *VOID)
