"""The memory of a build beside the number of its records: the peak of two builds, and what a million records will take."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from aplantida_dist.pace import with_pace
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.jsonl import read_jsonl
from aplantida_dist.shards.writer import ShardLimits
from bench.finding import Finding, Goal, alone
from bench.peak import peak_mib

MILLION = 1_000_000
NUM_CLASSES = 7120
FILES_A_FOLDER = 1000
NUM_WORKERS = 2
MAIN_GOAL, WORKER_GOAL = Goal("at most", 4096.0), Goal("at most", 1024.0)


@dataclass(frozen=True)
class Peaks:
    """The most memory that was resident, in MiB: of the main process when it had listed and when it had built, of a worker."""

    listed: float
    built: float
    worker: float


def make_records(folder: Path, *, num_records: int) -> Path:
    """Draw as many small pictures, no two alike, and the records of them; returns records.jsonl."""
    records_path = folder / "records.jsonl"
    with records_path.open("w", encoding="utf-8") as file:
        for number in with_pace(range(num_records), total=num_records, doing="drawing"):
            image_path = f"{number // FILES_A_FOLDER:04d}/{number:09d}.png"
            (folder / image_path).parent.mkdir(exist_ok=True)
            (folder / image_path).write_bytes(_draw(number))
            file.write(json.dumps(_record(number, image_path)) + "\n")
    return records_path


def _draw(number: int) -> bytes:
    """About 600 bytes: 8 × 8 random squares of 8 × 8 pixels."""
    squares = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(squares.repeat(8, axis=0).repeat(8, axis=1)).save(buffer, "PNG")
    return buffer.getvalue()


def _record(number: int, image_path: str) -> dict[str, object]:
    """As long as the records that the project trains on."""
    return {
        "plant_id": number,
        "latin_name": f"Plantago species {number % NUM_CLASSES:04d}",
        "common_name": "a plantain",
        "image_url": f"https://example.org/observations/photos/{number:09d}/original.png",
        "image_path": image_path,
        "image_source": "iNaturalist",
        "license": "CC-BY-NC 4.0",
        "attribution": "(c) Ada Lovelace, some rights reserved (CC BY-NC)",
        "region": "EU_SW",
        "country": "Spain",
    }


def measure(records_path: Path, dataset_dir: Path) -> Peaks:
    """Build in a process of its own, which imports no more than a build does: its peak is then the build's alone."""
    command = [sys.executable, "-m", "bench.memory", str(records_path), str(dataset_dir)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Peaks(**json.loads(done.stdout))


def _build_and_print_peaks(records_path: Path, dataset_dir: Path) -> None:
    worker_peaks: list[float] = []
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch_workers, args=(worker_peaks, is_over))
    source = read_jsonl(records_path, records_path.parent)
    listed = peak_mib("self")
    watcher.start()
    options = BuildOptions(seed=0, limits=ShardLimits(), num_workers=NUM_WORKERS, replace=False, near_distance=2)
    build_dataset(source, dataset_dir, options=options)
    is_over.set()
    watcher.join()
    print(json.dumps(asdict(Peaks(listed, peak_mib("self"), max(worker_peaks)))))


def _watch_workers(peaks: list[float], is_over: threading.Event) -> None:
    while not is_over.wait(0.1):
        for worker in multiprocessing.active_children():
            # It may have ended since it was listed.
            with suppress(FileNotFoundError, ProcessLookupError):
                peaks.append(peak_mib(str(worker.pid)))


def bench_memory(cache_dir: Path, *, num_records: int) -> list[Finding]:
    """Build `num_records` and half of them; what grows by the record is drawn out to a million."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    peaks = []
    for count in (num_records // 2, num_records):
        folder = Path(tempfile.mkdtemp(dir=cache_dir))
        try:
            (folder / "records").mkdir()
            records_path = make_records(folder / "records", num_records=count)
            peaks.append(measure(records_path, folder / "dataset"))
        finally:
            shutil.rmtree(folder)
    half, whole = peaks
    scale = (MILLION - num_records) / (num_records - num_records // 2)
    rows = [
        ("main process, records listed", half.listed, whole.listed, MAIN_GOAL),
        ("main process, dataset built", half.built, whole.built, MAIN_GOAL),
        ("worker", half.worker, whole.worker, WORKER_GOAL),
    ]
    findings = []
    for what, at_half, at_whole, goal in rows:
        findings.append(alone(f"memory: {what}, {num_records:,} records", "MiB", [at_whole], goal=goal))
        drawn_out = at_whole + scale * (at_whole - at_half)
        findings.append(alone(f"memory: {what}, drawn out to {MILLION:,}", "MiB", [drawn_out], goal=goal))
    return findings


if __name__ == "__main__":
    _build_and_print_peaks(*map(Path, sys.argv[1:]))
