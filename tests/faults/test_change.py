"""A resume with something changed: what decides the numbers is refused with both values, the rest is accepted and noted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aplantida_dist import __version__
from aplantida_dist.checkpoint import Checkpoint, newest_sound_checkpoint
from aplantida_dist.config_faults import FIELDS
from aplantida_dist.config_file import load_config
from aplantida_dist.data.classmap import load_class_map
from aplantida_dist.resumes import Resume, changes_within, note_resume, read_resumes
from aplantida_dist.run_folder import RunFolderError, changed_since, require_same_run
from aplantida_dist.seal import sealed, unsealed
from aplantida_dist.shards.writer import ShardLimits
from aplantida_dist.strict_yaml import show
from tests.faults.conftest import Fired
from tests.pictures import build, fill
from tests.ranks import Finished, command_on_ranks
from tests.runs import cut_back, rows_of, write_config

CONSTANT = ("schedule.kind=constant", "checkpoint.keep_last=100", "checkpoint.every_steps=1")
STOP = 7
"""In the middle of the second epoch of five steps."""


def train(config: Path, run_dir: Path, *arguments: str, world_size: int = 1) -> list[Finished]:
    command = ["--config", config, "--run-dir", run_dir, *CONSTANT, *arguments]
    return command_on_ranks(world_size, "aplantida_dist.train", command, run_dir.parent)


@pytest.fixture(scope="module")
def home(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml and a finished run `whole` of two epochs with a checkpoint each step."""
    folder = tmp_path_factory.mktemp("home")
    config = write_config(folder / "config.yaml", dataset_dir, epochs=2)
    (finished,) = train(config, folder / "whole")
    assert finished.code == 0, finished.stderr
    return folder


@pytest.fixture
def broken(home: Path, tmp_path: Path) -> Path:
    """The run as if it had died after step 7."""
    shutil.copytree(home / "whole", tmp_path / "run")
    cut_back(tmp_path / "run", step=STOP)
    return tmp_path / "run"


def noted_in(run_dir: Path) -> list[Mapping[str, Sequence[Any]]]:
    return [resume.changed for resume in read_resumes(run_dir / "resumes.jsonl")]


def resumed_in(run_dir: Path) -> list[Any]:
    """What each row of the history says of resumes, None where nothing."""
    return [json.loads(line).get("resumed") for line in (run_dir / "history.jsonl").read_text().splitlines()]


def test_a_resume_with_nothing_changed_leaves_no_trace_in_the_history(home: Path, broken: Path) -> None:
    """Law 5. That the run was resumed stands in resumes.jsonl, which is never cut."""
    for _ in range(2):
        cut_back(broken, step=STOP)
        (finished,) = train(home / "config.yaml", broken)
        assert finished.code == 0, finished.stderr
    assert json.dumps(rows_of(broken)) == json.dumps(rows_of(home / "whole"))
    assert resumed_in(broken) == [None, None]
    resumes = read_resumes(broken / "resumes.jsonl")
    assert [(resume.from_step, resume.changed) for resume in resumes] == [(STOP, {}), (STOP, {})]


@pytest.mark.fault(
    what="a resume with another number of ranks, dataset folder, workers, prefetch, report, logging, budgets, code version",
    how="all of them at once, from the middle of an epoch, then again with nothing changed after a checkpoint",
    holds="accepted; each is told, and noted with both values in the row of that epoch and in resumes.jsonl",
)
def test_what_decides_no_number_is_accepted_and_noted(
    home: Path, broken: Path, dataset_dir: Path, tmp_path: Path, fired: Fired
) -> None:
    """The samples are the same; the note outlives a kill after the next checkpoint."""
    shutil.copytree(dataset_dir, tmp_path / "moved")
    for path in broken.glob("checkpoints/step_*/position.json"):
        content = unsealed(json.loads(path.read_text()))
        assert content is not None
        path.write_text(json.dumps(sealed({**content, "code_version": "0.0.1"})))
    # Each key once beside the ranks and the version: free fields of every section that has some.
    changed: dict[str, tuple[Any, Any]] = {
        "world_size": (1, 2),
        "code_version": ("0.0.1", __version__),
        "data.dataset": (str(dataset_dir), str(tmp_path / "moved")),
        "data.num_workers": (0, 1),
        "data.prefetch_micro_batches": (FIELDS["data.prefetch_micro_batches"].default, 3),
        "train.timeout_s": (FIELDS["train.timeout_s"].default, 77),
        "train.log_every_steps": (3, 2),
        "train.on_nonfinite": (FIELDS["train.on_nonfinite"].default, "skip"),
        "checkpoint.keep_last": (100, 90),
        "report.name": (None, "elsewhere"),
    }
    overrides = [f"{name}={now}" for name, (_, now) in changed.items() if "." in name]
    finished = train(home / "config.yaml", broken, *overrides, world_size=2)
    assert [rank.code for rank in finished] == [0, 0], finished[0].stderr
    for name, (old, new) in changed.items():
        assert f"{name} was {show(old)}, is {show(new)}" in finished[0].stdout
    note = {name: list(values) for name, values in changed.items()}
    assert noted_in(broken) == [note]
    assert resumed_in(broken) == [None, {str(STOP): note}]
    before, rows = rows_of(home / "whole"), rows_of(broken)
    assert json.dumps(rows[0]) == json.dumps(before[0])
    assert rows[1].keys() == before[1].keys()
    assert rows[1]["train"]["identity_digest"] == before[1]["train"]["identity_digest"]
    assert rows[1]["train"]["loss"] == pytest.approx(before[1]["train"]["loss"], rel=1e-4)
    # Killed after a checkpoint that the changed run wrote: the plain resume that follows keeps the note in the row.
    cut_back(broken, step=STOP + 2)
    finished = train(home / "config.yaml", broken, *overrides, world_size=2)
    assert [rank.code for rank in finished] == [0, 0], finished[0].stderr
    assert noted_in(broken) == [note, {}]
    assert resumed_in(broken) == [None, {str(STOP): note}]
    fired(f"{len(changed)} of {len(changed)} noted")


def test_more_epochs_are_accepted_and_noted(home: Path, tmp_path: Path) -> None:
    """A finished run goes on; the rows that it has stay as they are."""
    shutil.copytree(home / "whole", tmp_path / "run")
    (finished,) = train(home / "config.yaml", tmp_path / "run", "train.epochs=3", "evaluation.every_epochs=3")
    assert finished.code == 0, finished.stderr
    assert rows_of(tmp_path / "run")[:2] == rows_of(home / "whole")
    assert resumed_in(tmp_path / "run")[2] == {"10": {"train.epochs": [2, 3], "evaluation.every_epochs": [1, 3]}}


@pytest.mark.fault(
    what="a resume with another seed, batch size, model, precision, picture size, dataset or class map",
    how="the command with each of them, on a run that stopped in mid-epoch",
    holds="refused in one line that names each with both values; the run folder is as it was",
)
def test_what_decides_the_numbers_is_refused(home: Path, broken: Path, tmp_path: Path, fired: Fired) -> None:
    """At once, two of them in one line."""
    before = (broken / "config.yaml").read_bytes(), (broken / "history.jsonl").read_bytes()
    samples = build_samples(tmp_path)
    refusals = {
        ("seed=4", "train.global_batch_size=32"): ["seed was 3, is 4", "train.global_batch_size was 16, is 32"],
        ("train.micro_batch_size=8",): ["train.micro_batch_size was 4, is 8"],
        ("model.name=test_resnet",): ['model.name was "test_convnext", is "test_resnet"'],
        ("train.precision=bf16",): ['train.precision was "fp32", is "bf16"'],
        ("data.image_size=40",): ["data.image_size was 32, is 40"],
        (f"data.dataset={samples['other_pictures']}",): ["train_manifest was ", "another dataset or --max-samples"],
        (f"data.dataset={samples['other_classes']}",): ["the first difference is class 5: 'Ficus' against 'Quercus'"],
        ("--max-samples=20",): ["train_manifest was "],
    }
    for changed, named in refusals.items():
        (refused,) = train(home / "config.yaml", broken, *changed)
        assert refused.code == 2, (changed, refused.stdout)
        assert refused.stderr.count("\n") == 1
        for text in named:
            assert text in refused.stderr, (changed, refused.stderr)
    assert ((broken / "config.yaml").read_bytes(), (broken / "history.jsonl").read_bytes()) == before
    assert not (broken / "resumes.jsonl").exists()
    fired(f"{len(refusals)} of {len(refusals)} refused")


def build_samples(folder: Path) -> dict[str, Path]:
    """Two other datasets: the same classes with other pictures, and as many classes of which one is another."""
    names = ["Acer campestre", "Betula pendula", "Cornus mas", "Daphne mezereum", "Euonymus"]
    for kind, last in (("other_pictures", "Ficus"), ("other_classes", "Quercus")):
        fill(folder / f"{kind}_pictures", dict.fromkeys([*names, last], 6), first=7000)
        build(folder / f"{kind}_pictures", folder / kind, limits=ShardLimits(num_samples=13))
    return {kind: folder / kind for kind in ("other_pictures", "other_classes")}


def changed_in(checkpoint: Checkpoint, kind: str, name: str, value: Any) -> Checkpoint:
    """The checkpoint as if it had been written with another value of a config's key."""
    fields = {**getattr(checkpoint.position, kind), name: value}
    return dataclasses.replace(checkpoint, position=dataclasses.replace(checkpoint.position, **{kind: fields}))


@pytest.mark.parametrize("name", FIELDS)
def test_every_key_of_the_config_is_refused_or_noted(home: Path, name: str) -> None:
    """None is forgotten, none is both; both values are named."""
    config = load_config(home / "config.yaml", list(CONSTANT))
    class_map = load_class_map(home / "whole" / "classes.json")
    checkpoint = newest_sound_checkpoint(home / "whole" / "checkpoints", warn=pytest.fail)
    assert checkpoint is not None
    law, free = config.law_fields(), config.free_fields()
    assert (name in law) != (name in free)
    checkpoint = changed_in(checkpoint, "law_fields" if name in law else "free_fields", name, "another")

    def require() -> None:
        require_same_run(
            checkpoint,
            run_dir=home / "whole",
            class_map=class_map,
            digests=checkpoint.position.digests,
            law_fields=law,
            law_defaults=config.law_defaults(),
        )

    changed = changed_since(
        checkpoint, world_size=1, code_version=__version__, free_fields=free, free_defaults=config.free_defaults()
    )
    now = json.loads(json.dumps({**law, **free}[name]))
    if name in law:
        with pytest.raises(RunFolderError) as refused:
            require()
        assert f"{name} was another, is {show(now)}" in str(refused.value).replace('"another"', "another")
        assert changed == {}
    else:
        require()
        assert changed == {name: ["another", now]}


def resume(from_step: int, **changed: list[int]) -> Resume:
    return Resume(from_step=from_step, time_utc="", host="", pid=1, changed=changed)


def test_a_note_stands_while_what_it_tells_of_is_in_the_run(tmp_path: Path) -> None:
    """A resume from the same step or an earlier one undoes those before it; each epoch tells of its own steps."""
    four, two = resume(7, world_size=[1, 4]), resume(7, world_size=[1, 2])
    assert changes_within([four, two], first_step=5, end_step=10) == {"7": {"world_size": [1, 2]}}
    assert changes_within([four, resume(7)], first_step=5, end_step=10) == {}
    assert changes_within([four, resume(6)], first_step=5, end_step=10) == {}
    assert changes_within([four, resume(9)], first_step=5, end_step=10) == {"7": {"world_size": [1, 4]}}
    assert changes_within([four], first_step=0, end_step=7) == {}
    assert changes_within([four], first_step=8, end_step=10) == {}
    for each in (four, two):
        resumes = note_resume(tmp_path, each)
    assert resumes == read_resumes(tmp_path / "resumes.jsonl") == (four, two)
