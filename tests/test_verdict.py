"""The verdict: right about what bounds a run, in numbers and in three runs that are slow each in their own way."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aplantida_dist.data.work import Work
from aplantida_dist.processes import usable_cores
from aplantida_dist.shards.writer import ShardLimits
from aplantida_dist.verdict import READING, WAITING, Bound, Machine, RankTimes, Verdict, judge, times_in_row
from tests.pictures import build, draw, put
from tests.ranks import Finished, run_module, run_ranks
from tests.runs import write_config

MANY_CORES = Machine(num_cores=16, num_ranks=1, threads_a_rank=1)


def times_of(*, waiting: float, decoding_per_s: float, reading: float = 0.05, device: float | None = None) -> RankTimes:
    """A rank of 100 s whose loaders make so many images a second each, of whose work so much is reading."""
    work = Work(num_images=1000, working_ns=round(1e12 / decoding_per_s), reading_ns=0, read_bytes=100_000_000)
    work = Work(work.num_images, work.working_ns, round(reading * work.working_ns), work.read_bytes)
    device_ns = None if device is None else round(device * 1e11)
    return RankTimes(10**11, round(waiting * 1e11), device_ns, work)


def verdict_of(*ranks: RankTimes, images_per_s: float, num_workers: int, machine: Machine = MANY_CORES) -> Verdict:
    found = judge(ranks, images_per_s=images_per_s, num_workers=num_workers, machine=machine)
    assert found is not None
    return found


def test_the_line_of_an_input_that_is_too_slow() -> None:
    """The share, both speeds, and the workers that bring the one up to the other."""
    found = verdict_of(times_of(waiting=0.41, decoding_per_s=305), images_per_s=607.7, num_workers=2)
    assert found.line == (
        "input-bound: 41 % of step time waiting; 2 workers decode 610 images/s, the model takes 1,030/s: "
        "raise data.num_workers to 4"
    )


@pytest.mark.parametrize("num_cores", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 7])
def test_no_advice_asks_for_more_than_the_machine_has(num_cores: int, num_ranks: int, num_workers: int) -> None:
    """The workers of all ranks and the ranks themselves never outnumber the cores; where none is left the pictures are the way."""
    machine = Machine(num_cores, num_ranks, threads_a_rank=1)
    rank = times_of(waiting=0.6, decoding_per_s=100)
    images_per_s = num_ranks * 0.4 * 100 * (num_workers + 1.5)
    line = verdict_of(*[rank] * num_ranks, images_per_s=images_per_s, num_workers=num_workers, machine=machine).line
    raised = re.search(r"raise data.num_workers to (\d+)", line)
    if raised:
        assert num_workers < int(raised[1]) <= num_workers + 2
        assert num_ranks * (int(raised[1]) + 1) <= num_cores
    if raised is None or num_ranks * (num_workers + 3) > num_cores:
        assert "--max-side" in line


@pytest.mark.parametrize(
    ("rank", "images_per_s", "num_workers", "bound_by", "told"),
    [
        (times_of(waiting=WAITING - 0.01, decoding_per_s=600), 900, 2, "model", "nothing to change"),
        (times_of(waiting=WAITING, decoding_per_s=450), 820, 2, "decoding", "2 workers decode 900 images/s"),
        (times_of(waiting=0.0, decoding_per_s=600), 900, 2, "model", "2 workers could deliver 1,200 images/s"),
        (times_of(waiting=0.5, decoding_per_s=100), 50, 0, "decoding", "the rank's own process decodes 100 images/s"),
        (times_of(waiting=0.5, decoding_per_s=100, reading=READING), 100, 1, "disk", "a faster disk"),
        (times_of(waiting=0.5, decoding_per_s=100, reading=0.8), 100, 1, "disk", "1 worker, reading 80 % of the time at 12.5 MB/s,"),
        (times_of(waiting=0.5, decoding_per_s=100, reading=0.8), 50, 0, "disk", "raise data.num_workers to read ahead"),
        (times_of(waiting=0.3, decoding_per_s=600), 700, 2, "bursts", "data.prefetch_micro_batches"),
        (times_of(waiting=0.3, decoding_per_s=600, device=0.97), 700, 2, "model", "30 % of step time waiting, the GPU at work 97 %"),
        (times_of(waiting=0.3, decoding_per_s=300, device=0.6), 600, 2, "decoding", "the model takes 857/s"),
        (times_of(waiting=0.02, decoding_per_s=600, device=0.4), 700, 2, "host", "model.compile"),
        (times_of(waiting=0.02, decoding_per_s=600, device=0.9), 700, 2, "model", "nothing to change"),
    ],
)  # fmt: skip
def test_what_bounds_a_run(rank: RankTimes, images_per_s: float, num_workers: int, bound_by: Bound, told: str) -> None:
    """At the thresholds, without workers, and on a GPU, where a wait behind which the device works costs nothing."""
    found = verdict_of(rank, images_per_s=images_per_s, num_workers=num_workers)
    assert found.bound_by == bound_by, found.line
    assert told in found.line
    assert "\n" not in found.line


def test_the_rank_that_waits_most_is_judged_and_named() -> None:
    """The others wait for it in every step, so that a mean over all ranks would hide it."""
    good, bad = times_of(waiting=0.0, decoding_per_s=500), times_of(waiting=0.5, decoding_per_s=100, reading=0.9)
    found = verdict_of(good, good, bad, good, images_per_s=400, num_workers=1)
    assert (found.bound_by, found.rank) == ("disk", 2)
    assert "50 % of step time waiting on rank 2 of 4; 1 worker" in found.line
    assert "the model takes 200/s" in found.line
    row = times_in_row([good, good, bad, good], found)
    assert row["bound_by"] == "disk"
    assert row["host_fraction"] == pytest.approx(0.875)
    assert "device_fraction" not in row


def test_nothing_is_said_where_nothing_was_measured() -> None:
    """As of an epoch whose last step was before the resume."""
    nothing = RankTimes(0, 0, None, Work())
    assert judge([nothing], images_per_s=10.0, num_workers=2, machine=MANY_CORES) is None


def test_a_row_tells_where_the_time_of_a_gpu_went() -> None:
    """Wait, host and device fill the time, or overlap."""
    rank = times_of(waiting=0.3, decoding_per_s=100, reading=0.25, device=0.5)
    row = times_in_row([rank, rank], verdict_of(rank, rank, images_per_s=100, num_workers=3))
    assert (row["device_fraction"], row["host_fraction"]) == (pytest.approx(0.5), pytest.approx(0.2))
    assert (row["read_fraction"], row["loader_images_per_s"]) == (pytest.approx(0.25), pytest.approx(600))


def test_the_cores_are_those_of_this_process() -> None:
    """Not those of the machine: a launcher or a container may have given it fewer."""
    given = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(given)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, given)
    assert 1 <= usable_cores() <= len(given)


@pytest.fixture(scope="module")
def large_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 PNG of 1,600 × 1,440, which take many times longer to decode than a tiny model to learn from."""
    folder, dataset = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("datasets") / "large"
    for number in range(18):
        split = "train" if number < 16 else "val"
        picture = Image.open(io.BytesIO(draw(number))).resize((1600, 1440), Image.Resampling.NEAREST)
        path = put(folder / split / "AB"[number % 2] / f"{number}.png", b"")
        picture.save(path, compress_level=1)
    build(folder, dataset, limits=ShardLimits(num_samples=6))
    return dataset


def train_with_slow_reads(seconds: float, arguments: list[str], outputs: list[tuple[Path, Path]]) -> int:
    """The command, in a process whose every read of a sample takes as long as on a disk that answers late."""
    read = os.pread

    def read_slowly(descriptor: int, length: int, offset: int) -> bytes:
        time.sleep(seconds)
        return read(descriptor, length, offset)

    if seconds:
        os.pread = read_slowly
    return run_module("aplantida_dist.train", arguments, outputs)


def train(
    dataset: Path, folder: Path, *overrides: str, num_ranks: int = 1, seconds_a_read: float = 0.0, **config: Any
) -> tuple[dict[str, Any], str]:
    """The train block of an epoch's row, and the line of the screen that says what bounds the run."""
    path = write_config(folder / "config.yaml", dataset, epochs=1, **config)
    command = [*map(str, ("--config", path, "--run-dir", folder / "run")), "schedule.warmup_epochs=0", *overrides]
    outputs = [(folder / f"stdout_{rank}", folder / f"stderr_{rank}") for rank in range(num_ranks)]
    codes = run_ranks(num_ranks, train_with_slow_reads, seconds_a_read, command, outputs)
    ranks = [Finished(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, outputs, strict=True)]
    assert codes == [0] * num_ranks, ranks[0].stderr
    (line,) = [line for line in ranks[0].stdout.splitlines() if "-bound: " in line]
    (row,) = [json.loads(text)["train"] for text in (folder / "run" / "history.jsonl").read_text().splitlines()]
    assert row["host_fraction"] == pytest.approx(1.0 - row["wait_fraction"])
    assert "device_fraction" not in row
    assert f": {100 * row['wait_fraction']:.0f} % of step time waiting" in line or num_ranks > 1
    return row, line


def test_a_run_with_slow_decoding_is_input_bound(large_pictures: Path, tmp_path: Path) -> None:
    """Large pictures, a tiny model; what a core more would do, or that there is none."""
    row, line = train(large_pictures, tmp_path, model="test_resnet", num_workers=1)
    assert row["bound_by"] == "decoding", line
    assert row["wait_fraction"] > 0.2
    assert row["read_fraction"] < 0.2
    told = r"1 worker decodes [\d,]+ images/s, the model takes [\d,]+/s: .*(raise data.num_workers to \d+|--max-side).*"
    assert re.fullmatch(rf"input-bound: \d+ % of step time waiting; {told}", line)


def test_a_run_with_a_slow_model_is_model_bound(dataset_dir: Path, tmp_path: Path) -> None:
    """Tiny pictures, which the rank decodes on the way, and a model that computes for long."""
    _, line = train(dataset_dir, tmp_path, "data.image_size=192", num_workers=0)
    assert line.startswith("model-bound: ")
    assert line.endswith("nothing to change")


@pytest.mark.parametrize(
    ("num_ranks", "where"), [(1, "waiting;"), pytest.param(2, "waiting on rank [01] of 2;", marks=pytest.mark.slow)]
)
def test_a_run_with_a_slow_disk_is_disk_bound(dataset_dir: Path, tmp_path: Path, num_ranks: int, where: str) -> None:
    """The same pictures, and every read takes 30 ms."""
    row, line = train(dataset_dir, tmp_path, num_ranks=num_ranks, seconds_a_read=0.03, num_workers=1)
    assert row["bound_by"] == "disk", line
    assert row["read_fraction"] > 0.8
    assert re.match(rf"disk-bound: \d+ % of step time {where} 1 worker, reading \d+ % of the time at 0.\d MB/s", line)
    assert "data.cache_dir" in line
