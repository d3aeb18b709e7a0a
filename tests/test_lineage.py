"""Lineage: no split is evaluated in silence with weights that were trained on it, through any number of runs."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_histories import healthy_columns
from analysis_histories import rows_of as made_up_rows

from aplantida_dist.analysis.curves import best_epoch
from aplantida_dist.analysis.sources import read_sources
from aplantida_dist.analysis.table import best_line
from aplantida_dist.analysis.verdicts import judge
from aplantida_dist.checkpoint import load_checkpoint, point_to
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.manifest import identity_of
from aplantida_dist.errors import UserError
from aplantida_dist.evaluation import is_among
from aplantida_dist.history import History, HistoryError, make_row
from aplantida_dist.lineage import Descent, Lineage, descend
from aplantida_dist.origin import lineage_of_run
from tests.pictures import build, fill
from tests.ranks import command_on_ranks
from tests.runs import rows_of, write_config
from tests.test_bad_input import complaint, train_complaint
from tests.test_history import values

CLASSES = ("Acer", "Betula", "Cornus", "Daphne")
REGION = ("Betula", "Daphne", "Acer")


@dataclass(frozen=True)
class Grounds:
    """Photographs of a world and of a region in it; the region once split anew, once with the world's splits."""

    folder: Path
    whole: Path
    drawn_anew: Path
    kept: Path
    global_run: Path

    def config(self, dataset: Path, *, epochs: int = 2) -> Path:
        return write_config(self.folder / f"{dataset.name}_{epochs}.yaml", dataset, model="test_vit", epochs=epochs)


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> Grounds:
    """A finished global run, and regional datasets of the same photographs."""
    folder = tmp_path_factory.mktemp("lineage")
    fill(folder / "world", dict.fromkeys(CLASSES, 22))
    for name in REGION:
        shutil.copytree(folder / "world" / name, folder / "region" / name)
    build(folder / "world", folder / "whole", near_distance=None)
    build(folder / "region", folder / "drawn_anew", seed=2, near_distance=None)
    build(folder / "region", folder / "kept", seed=1, near_distance=None, keep_splits_of=folder / "whole")
    made = Grounds(folder, folder / "whole", folder / "drawn_anew", folder / "kept", folder / "runs" / "global")
    train(made, made.whole, made.global_run, epochs=1)
    return made


def train(
    grounds: Grounds, dataset: Path, run_dir: Path, *arguments: str | Path, epochs: int = 2, world_size: int = 1
) -> str:
    """Run the command; what its main process said."""
    command = ["--config", grounds.config(dataset, epochs=epochs), "--run-dir", run_dir, *arguments]
    finished = command_on_ranks(world_size, "aplantida_dist.train", command, grounds.folder)
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    return finished[0].stdout


def evaluate(
    grounds: Grounds, run: Path, dataset: Path, split: str, *, world_size: int = 1
) -> tuple[dict[str, Any], list[Any]]:
    """The command with --allow-leak: the metrics block and the predictions."""
    out = grounds.folder / "evaluated"
    arguments = ["--run", run, "--data", dataset, "--split", split, "--checkpoint", "last", "--allow-leak"]
    arguments += ["--json", out.with_suffix(".json"), "--predictions", out.with_suffix(".jsonl")]
    finished = command_on_ranks(world_size, "aplantida_dist.evaluate", arguments, grounds.folder)
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    return json.loads(out.with_suffix(".json").read_text())[split], [json.loads(line) for line in lines]


def keys_of(dataset: Path, split: str) -> set[str]:
    """The sample keys of a split, as plain tar names."""
    keys = set()
    for shard in (dataset / split).glob("*.tar"):
        with tarfile.open(shard) as tar:
            keys |= {name.partition(".")[0] for name in tar.getnames()}
    return keys


def seen_by(run: Path) -> set[int]:
    """The identities in a run's newest checkpoint, read without our code."""
    seen = np.load(max((run / "checkpoints").glob("step_*")) / "seen.npy")
    assert seen.dtype == np.dtype("<i8")
    assert (seen[1:] > seen[:-1]).all(), "ascending, each once"
    return set(seen.tolist())


def identities(keys: set[str]) -> set[int]:
    return {identity_of(key) for key in keys}


@pytest.fixture(scope="module")
def leaking_run(grounds: Grounds) -> Path:
    """The regional run on the split that was drawn anew, with --allow-leak."""
    run = grounds.folder / "runs" / "leaking"
    said = train(grounds, grounds.drawn_anew, run, f"model.init_from={grounds.global_run}", "--allow-leak")
    (run / "said").write_text(said)
    return run


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_regional_run_on_an_independently_drawn_split_is_refused(
    grounds: Grounds, tmp_path: Path, world_size: int
) -> None:
    """The first trainer's 89.9 %: one line with the right counts, before anything is written, on every number of ranks."""
    val = keys_of(grounds.drawn_anew, "val")
    leaked = val & keys_of(grounds.whole, "train")
    assert 0 < len(leaked) < len(val)
    said = train_complaint(
        grounds.config(grounds.drawn_anew), tmp_path, f"model.init_from={grounds.global_run}", world_size=world_size
    )
    checkpoint = next((grounds.global_run / "checkpoints").glob("step_*"))
    assert f"{len(leaked)} of {len(val)} photographs of val were trained on by {checkpoint} (init_from); " in said
    assert "--keep-splits" in said
    assert "--allow-leak" in said
    assert not (tmp_path / "run").exists()


def test_a_regional_run_that_keeps_the_global_splits_needs_no_flag(grounds: Grounds, tmp_path: Path) -> None:
    """The same photographs, the same ancestor, no leak; the rows know of no clean part."""
    said = train(grounds, grounds.kept, tmp_path / "run", f"model.init_from={grounds.global_run}")
    assert "warning" not in said
    for row in rows_of(tmp_path / "run"):
        assert not {"leaked_samples", "clean"} & row["val"].keys()
    assert seen_by(tmp_path / "run") == identities(keys_of(grounds.whole, "train"))


def test_an_allowed_leak_stands_in_every_row(grounds: Grounds, leaking_run: Path) -> None:
    """Whole and clean side by side; the clean part's numbers are those of the predictions for the samples that never were trained on."""
    val = keys_of(grounds.drawn_anew, "val")
    unseen = val - keys_of(grounds.whole, "train")
    rows = rows_of(leaking_run)
    for row in rows:
        assert row["val"]["num_samples"] == len(val)
        assert row["val"]["leaked_samples"] == len(val) - len(unseen)
        assert row["val"]["clean"]["num_samples"] == row["val"]["clean"]["expected_samples"] == len(unseen)
        assert int(row["val"]["clean"]["identity_digest"], 16) == sum(identities(unseen)) % 2**64
    metrics, lines = evaluate(grounds, leaking_run, grounds.drawn_anew, "val")
    assert metrics == rows[-1]["val"], "the command finds what training found"
    clean = [line for line in lines if line["key"] in unseen]
    assert metrics["clean"]["loss"] == pytest.approx(math.fsum(line["loss"] for line in clean) / len(clean), abs=1e-9)
    assert metrics["clean"]["top1"] == sum(line["top5"][0] == line["label"] for line in clean) / len(clean)
    recalls = [
        np.mean([line["top5"][0] == label for line in clean if line["label"] == label])
        for label in {line["label"] for line in clean}
    ]
    assert metrics["clean"]["macro_top1"] == pytest.approx(np.mean(recalls), abs=1e-12)
    columns = json.loads((leaking_run / "training_history.json").read_text())
    assert columns["val_clean_loss"] == [row["val"]["clean"]["loss"] for row in rows]
    assert columns["val_leaked_samples"] == [row["val"]["leaked_samples"] for row in rows]


def test_a_leak_is_on_the_screen_in_best_and_in_the_analysis(leaking_run: Path) -> None:
    """Best goes by the clean part, and nobody who looks can miss it."""
    said = (leaking_run / "said").read_text()
    rows = rows_of(leaking_run)
    leaked, clean = rows[0]["val"]["leaked_samples"], rows[0]["val"]["clean"]
    assert said.count("warning: ") == 1
    assert f"{leaked} of {rows[0]['val']['num_samples']} leaked, clean part of {clean['num_samples']}: loss " in said
    best = json.loads((leaking_run / "checkpoints" / "best.json").read_text())
    assert best["metric"] == "val.clean.top1"
    assert best["value"] == max(row["val"]["clean"]["top1"] for row in rows)
    for source in (leaking_run, leaking_run / "training_history.json"):
        (curves,) = read_sources([source])
        verdicts = {verdict.name: verdict for verdict in judge(curves)}
        assert verdicts["validation leaks"].severity == "warning"
        assert verdicts["validation leaks"].evidence.startswith(f"{leaked} val photographs had been trained on")
        assert "clean val" in best_line(curves)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_clean_part_is_the_same_on_any_number_of_ranks(
    grounds: Grounds, leaking_run: Path, world_size: int
) -> None:
    """Law 3, to the last bit."""
    alone, _ = evaluate(grounds, leaking_run, grounds.drawn_anew, "val")
    assert "clean" in alone
    together, _ = evaluate(grounds, leaking_run, grounds.drawn_anew, "val", world_size=world_size)
    assert together == alone


def test_evaluating_what_was_trained_on_is_refused(grounds: Grounds, leaking_run: Path, tmp_path: Path) -> None:
    """The run's own train split, and a split of another dataset that the ancestor was trained on; on two ranks said once."""
    num_train = len(keys_of(grounds.drawn_anew, "train"))
    arguments = ["--run", leaking_run, "--data", grounds.drawn_anew, "--split", "train"]
    said = complaint("aplantida_dist.evaluate", arguments, tmp_path, world_size=2)
    assert f"{num_train} of {num_train} photographs of train were trained on by {leaking_run}" in said
    assert "or what it began with" in said
    test = keys_of(grounds.drawn_anew, "test")
    leaked = test & keys_of(grounds.whole, "train")
    assert leaked
    said = complaint("aplantida_dist.evaluate", [*arguments[:-1], "test"], tmp_path)
    assert f"{len(leaked)} of {len(test)} photographs of test were trained on by " in said


def test_where_everything_leaks_there_is_no_clean_part(grounds: Grounds, leaking_run: Path) -> None:
    """Absent, not zero."""
    metrics, _ = evaluate(grounds, leaking_run, grounds.drawn_anew, "train")
    assert metrics["leaked_samples"] == metrics["num_samples"] == len(keys_of(grounds.drawn_anew, "train"))
    assert "clean" not in metrics


def test_lineage_goes_through_every_generation(grounds: Grounds, leaking_run: Path, tmp_path: Path) -> None:
    """global → regional → sub-regional: what the third has seen is the union, and the second alone does not hide the first."""
    train_keys = [keys_of(dataset, "train") for dataset in (grounds.whole, grounds.drawn_anew)]
    assert seen_by(grounds.global_run) == identities(train_keys[0])
    assert seen_by(leaking_run) == identities(train_keys[0] | train_keys[1])
    for name in ("Betula", "Cornus"):  # Cornus does not grow in the region: only the first generation has seen it
        shutil.copytree(grounds.folder / "world" / name, tmp_path / "sub" / name)
    fill(tmp_path / "sub", {"Rosa": 9}, first=9000)
    build(tmp_path / "sub", tmp_path / "dataset", seed=3, near_distance=None)
    val = keys_of(tmp_path / "dataset", "val")
    leaked = val & (train_keys[0] | train_keys[1])
    assert leaked - train_keys[1], "some of it must be known from the first generation alone"
    config = grounds.config(tmp_path / "dataset", epochs=1)
    said = train_complaint(config, tmp_path, f"model.init_from={leaking_run}")
    assert f"{len(leaked)} of {len(val)} photographs of val were trained on by {leaking_run}" in said
    assert "(init_from) or what it began with" in said
    train(grounds, tmp_path / "dataset", tmp_path / "third", f"model.init_from={leaking_run}", "--allow-leak", epochs=1)
    union = train_keys[0] | train_keys[1] | keys_of(tmp_path / "dataset", "train")
    assert seen_by(tmp_path / "third") == identities(union)
    checkpoint = load_checkpoint(next((tmp_path / "third" / "checkpoints").glob("step_*")))
    runs = [Path(ancestor.path).parents[1] for ancestor in checkpoint.lineage().ancestors]
    assert runs == [leaking_run, grounds.global_run]


def test_a_resume_must_allow_the_leak_again(grounds: Grounds, leaking_run: Path, tmp_path: Path) -> None:
    """The same command goes on exactly; without the flag it stops, and it knows the leak from the checkpoint alone."""
    shutil.copytree(leaking_run, tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").glob("step_*")))
    init_from = f"model.init_from={grounds.global_run}"
    said = train_complaint(grounds.config(grounds.drawn_anew), tmp_path, init_from)
    assert f"{rows_of(leaking_run)[0]['val']['leaked_samples']} of " in said
    said = train(grounds, grounds.drawn_anew, tmp_path / "run", init_from, "--allow-leak")
    assert "going on from step" in said
    assert rows_of(tmp_path / "run") == rows_of(leaking_run)
    assert seen_by(tmp_path / "run") == seen_by(leaking_run)


def test_a_photograph_in_train_and_in_val_is_a_leak_without_any_ancestor(grounds: Grounds, tmp_path: Path) -> None:
    """A dataset that somebody else put together: val is the train split once more."""
    shutil.copytree(grounds.kept, tmp_path / "dataset")
    shutil.rmtree(tmp_path / "dataset" / "val")
    shutil.copytree(tmp_path / "dataset" / "train", tmp_path / "dataset" / "val")
    num = len(keys_of(grounds.kept, "train"))
    said = train_complaint(grounds.config(tmp_path / "dataset"), tmp_path)
    assert f"{num} of {num} photographs of val were trained on in this run's own train split" in said
    train(grounds, tmp_path / "dataset", tmp_path / "run", "--allow-leak")
    assert all("clean" not in row["val"] for row in rows_of(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints" / "best.json").exists(), "there is no honest best"


def test_a_limited_run_has_seen_what_it_read(grounds: Grounds, tmp_path: Path) -> None:
    """--max-samples: those, and no others."""
    train(grounds, grounds.whole, tmp_path / "run", "--max-samples", "10", epochs=1)
    split = open_dataset(grounds.whole).open_split("train", max_samples=10)
    assert len(seen_by(tmp_path / "run")) == 10
    assert seen_by(tmp_path / "run") == identities(set(split.sample_keys(0)[:10]))


def old_checkpoint(run: Path, folder: Path) -> Path:
    """A run folder as it was written before lineage: format 1, no seen.npy."""
    copy = shutil.copytree(run, folder)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        (checkpoint / "seen.npy").unlink()
        position = json.loads((checkpoint / "position.json").read_text())
        del position["lineage"], position["files"]["seen.npy"], position["law_fields"]["model.init_from"]
        del position["history"], position["digest"]
        (checkpoint / "position.json").write_text(json.dumps({**position, "format": 1}))
        point_to(copy / "checkpoints", "best", checkpoint)
    return copy


@pytest.mark.parametrize("kind", ["a .pt", "format 1"])
def test_an_unknown_lineage_is_said_and_handed_down(grounds: Grounds, tmp_path: Path, kind: str) -> None:
    """Never taken for clean: on the screen once, in init_from.json, in the checkpoint and in what descends from it."""
    if kind == "a .pt":
        model = load_checkpoint(next((grounds.global_run / "checkpoints").glob("step_*"))).model_state()
        torch.save({"model_state_dict": model}, tmp_path / "first.pt")
        ancestor, name = tmp_path / "first.pt", str(tmp_path / "first.pt")
    else:
        ancestor, name = old_checkpoint(grounds.global_run, tmp_path / "old"), "written before lineage was recorded"
    said = train(grounds, grounds.drawn_anew, tmp_path / "run", f"model.init_from={ancestor}", epochs=1)
    assert said.count("the lineage is not known whole") == said.count("warning: ") == 1
    assert name in said
    assert name in json.loads((tmp_path / "run" / "init_from.json").read_text())["lineage"]["unknown"][0]
    checkpoint = load_checkpoint(next((tmp_path / "run" / "checkpoints").glob("step_*")))
    assert name in checkpoint.lineage().unknown[0]
    assert seen_by(tmp_path / "run") == identities(keys_of(grounds.drawn_anew, "train"))
    child = train(grounds, grounds.drawn_anew, tmp_path / "child", f"model.init_from={tmp_path / 'run'}", epochs=1)
    assert name in child


def test_a_run_from_before_lineage_goes_on_and_records_it(grounds: Grounds, tmp_path: Path) -> None:
    """It began with nothing, so its train split is all that it has seen."""
    run = old_checkpoint(grounds.global_run, tmp_path / "run")
    train(grounds, grounds.whole, run, epochs=2)
    assert seen_by(run) == seen_by(grounds.global_run)
    assert load_checkpoint(max((run / "checkpoints").glob("step_*"))).lineage().unknown == ()


def test_pretrained_weights_are_an_unknown_lineage(grounds: Grounds) -> None:
    """Nobody knows what timm's weights were trained on."""
    split = open_dataset(grounds.whole).open_split("train")
    lineage = lineage_of_run(split, None, None, "vit_base_patch16_384", [])
    assert lineage.unknown == ("timm's pretrained weights of vit_base_patch16_384",)
    assert set(lineage.identities.tolist()) == identities(keys_of(grounds.whole, "train"))


def test_a_changed_lineage_is_found(grounds: Grounds, tmp_path: Path) -> None:
    """seen.npy stands under the checkpoint's digests, like its other files."""
    checkpoint = shutil.copytree(next((grounds.global_run / "checkpoints").glob("step_*")), tmp_path / "checkpoint")
    np.save(checkpoint / "seen.npy", np.zeros(0, dtype="<i8"))
    with pytest.raises(UserError, match=r"seen\.npy has changed since it was written"):
        load_checkpoint(checkpoint)


def test_shards_of_other_samples_are_found(grounds: Grounds, tmp_path: Path) -> None:
    """The identities in the headers, where no file tells them, must be the manifest's, or a leak would be looked for among the wrong ones."""
    shutil.copytree(grounds.whole, tmp_path / "dataset", ignore=shutil.ignore_patterns("identities.bin"))
    shard = tmp_path / "dataset" / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        member = next(member for member in tar.getmembers() if member.name.endswith(".jpg"))
    letter = content[member.offset]
    content[member.offset] = other = ord("0") if letter != ord("0") else ord("1")
    # The header's checksum: six octal digits, a sum over its bytes.
    total = int(content[member.offset + 148 : member.offset + 154], 8) - letter + other
    content[member.offset + 148 : member.offset + 154] = f"{total:06o}".encode()
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"identity digest [0-9a-f]{16}, the manifest says"):
        _ = open_dataset(tmp_path / "dataset").open_split("train").identities


def test_descent_is_a_union_and_forgets_nothing() -> None:
    """Of any number of parents (teachers, too), against Python's own sets."""
    draw = np.random.default_rng(5)
    for _ in range(50):
        sets = [set(draw.integers(-9, 9, draw.integers(0, 8)).tolist()) for _ in range(int(draw.integers(1, 5)))]
        parents = [
            (
                Descent(f"run {i}", "d"),
                Lineage(np.array(sorted(seen), dtype=np.int64), (Descent("first", "f"),), (f"unknown {i}", "x")),
            )
            for i, seen in enumerate(sets[1:])
        ]
        child = descend(np.array([*sets[0], *sets[0]], dtype=np.int64), parents, unknown=["x"])
        assert child.identities.tolist() == sorted(set().union(*sets))
        assert child.unknown == ("x", *(f"unknown {i}" for i in range(len(parents))))
        assert set(child.ancestors) == {descent for descent, _ in parents} | (
            {Descent("first", "f")} if parents else set()
        )
        asked = draw.integers(-12, 12, 20)
        assert child.among(asked).tolist() == sorted(x for x in asked.tolist() if x in child.identities)
        if len(child.identities):
            found = is_among(torch.from_numpy(asked), torch.from_numpy(child.identities))
            assert found.tolist() == [x in child.identities for x in asked.tolist()]


@pytest.mark.parametrize(
    ("leaked", "clean", "is_refused"),
    [
        (None, None, False),
        (100, None, False),
        (40, 60, False),
        (40, None, True),
        (None, 60, True),
        (40, 50, True),
        (0, None, True),
    ],
)
def test_a_row_whose_parts_are_not_the_whole_is_refused(
    leaked: int | None, clean: int | None, is_refused: bool
) -> None:
    """Leaked and clean samples are all of them; no clean part where nothing or everything has leaked."""
    whole = values()["val"]
    part = None if clean is None else {**whole, "num_samples": clean, "expected_samples": clean}
    val = {**whole, "leaked_samples": leaked, "clean": part}
    if is_refused:
        with pytest.raises(HistoryError, match="val"):
            make_row(**values(val=val))
    else:
        assert make_row(**values(val=val)).to_json()["val"].get("leaked_samples") == leaked


def test_best_is_judged_by_the_clean_part(tmp_path: Path) -> None:
    """The whole rises where the clean part falls: the earlier row is best, in the history and in the analysis."""
    columns = healthy_columns(epochs=2, num_classes=10)
    changes = {
        epoch: {
            "val.leaked_samples": 17000,
            "val.clean": {
                **made_up_rows(columns)[0].val.model_dump(exclude_none=True),
                "num_samples": 40,
                "expected_samples": 40,
                "top1": top1,
            },
        }
        for epoch, top1 in ((1, 0.15), (2, 0.05))
    }
    history = History(tmp_path)
    for row in made_up_rows(columns, changes=changes):
        history.append(row)
    assert history.rows[1].metric("val.top1") > history.rows[0].metric("val.top1")
    assert history.best("val.top1", "max") is history.rows[0]
    best = best_epoch(read_sources([tmp_path])[0])
    assert best is not None
    assert (best.index, best.metric, best.value) == (0, "clean val top-1", 0.15)
