"""The benches of building compare equals: every writer writes every picture, and a build's memory is its own."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from pictures import fill

from bench.build import (  # fmt: skip
    TIMES,
    Files,
    bench_build,
    list_files,
    with_sync,
    write_ours,
    write_second_pass,
    write_shard_writer,
    write_tar,
)
from bench.memory import make_records, measure

WRITERS = [
    write_ours,
    write_second_pass,
    write_tar,
    write_shard_writer,
    partial(with_sync, write_tar),
    partial(with_sync, write_shard_writer),
]


def images_in(folder: Path) -> Counter[bytes]:
    """How often each picture stands in the tars below a folder."""
    images: Counter[bytes] = Counter()
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            images.update(tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg"))  # type: ignore[union-attr]
    return images


@pytest.mark.parametrize("write", WRITERS)
def test_every_writer_writes_every_picture(tmp_path: Path, write: Callable[[Files, Path], None]) -> None:
    """The same bytes as often as they are listed: nothing is linked, skipped or written twice."""
    fill(tmp_path / "pictures", {"oak": 3, "yew": 2})
    files = list_files(tmp_path / "pictures")
    (tmp_path / "out").mkdir()
    write(files, tmp_path / "out")
    expected = {path.read_bytes(): TIMES for path in (tmp_path / "pictures").rglob("*.jpg")}
    assert images_in(tmp_path / "out") == expected
    assert files.num_bytes == TIMES * sum(map(len, expected))


def test_the_bench_of_building_tells_both_ways(tmp_path: Path) -> None:
    """Beside the synced and the bare tar and ShardWriter, in bytes and in samples, and nothing is left."""
    fill(tmp_path / "pictures", {"oak": 2})
    findings = bench_build(tmp_path / "pictures", cache_dir=tmp_path / "cache", repeats=1)
    assert {finding.peer_name for finding in findings} == {
        "tar, then sync",
        "tar, not synced",
        "ShardWriter, then sync",
    }
    assert {finding.unit for finding in findings} == {"MB/s", "samples/s"}
    assert list((tmp_path / "cache").iterdir()) == []


def test_memory_is_measured_of_the_build_alone(tmp_path: Path) -> None:
    """No two pictures are alike, all become samples, and the peaks are those of a process without torch."""
    (tmp_path / "records").mkdir()
    records_path = make_records(tmp_path / "records", num_records=40)
    assert len({path.read_bytes() for path in tmp_path.rglob("*.png")}) == 40
    peaks = measure(records_path, tmp_path / "set")
    assert (tmp_path / "set" / "report.md").read_text().count("40 records = 40 samples written + 0 left out") == 1
    assert 10 < peaks.listed <= peaks.built < 200
    assert 10 < peaks.worker < 200
