"""A billion samples at start-up: time and memory of opening a split, of its digest, of jumping to a step, and of one shard's index."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.index import INDEX_DTYPE
from aplantida_dist.data.manifest import MANIFEST_FILE, MANIFEST_VERSION
from aplantida_dist.data.plan import Coordinates, TrainPlan
from bench.finding import Finding, Goal, alone
from bench.peak import peak_mib

NUM_CLASSES = 7120
SHARD_SAMPLES = 10_000
SHARD_BYTES = 10**9
MEMORY_GOAL = Goal("at most", 1024.0)


@dataclass(frozen=True)
class Start:
    """The start of a process that reads the split: CPU seconds of each part, and the most memory of all of them above what Python and its
    libraries take."""

    open_s: float
    digest_s: float
    jump_s: float
    index_s: float
    memory_mib: float


def make_dataset(dataset_dir: Path, *, num_shards: int, classes_a_shard: int) -> None:
    """Write a train split whose shards are holes in the disk; the first has an index, and that is of real rows."""
    class_map = ClassMap(tuple(f"Plantago species {number:04d}" for number in range(NUM_CLASSES)))
    split_dir = dataset_dir / "train"
    split_dir.mkdir(parents=True)
    class_map.save(dataset_dir / CLASSES_FILE)
    rows = np.zeros(SHARD_SAMPLES, dtype=INDEX_DTYPE)
    rows["offset"], rows["length"] = 1024 + 100_000 * np.arange(SHARD_SAMPLES), 90_000
    rows["label"] = np.arange(SHARD_SAMPLES) % classes_a_shard
    (split_dir / "shard-000000.idx").write_bytes(rows.tobytes())
    index_sha256 = hashlib.sha256(rows.tobytes()).hexdigest()
    totals = np.zeros(NUM_CLASSES, dtype=np.int64)
    with (split_dir / MANIFEST_FILE).open("w") as file:
        shards = _shards(num_shards, classes_a_shard=classes_a_shard, index_sha256=index_sha256)
        file.write('{"shards": [')
        for number, shard in enumerate(shards):
            file.write(("," if number else "") + json.dumps(shard))
            for label, count in shard["class_counts"].items():
                totals[int(label)] += count
            with (split_dir / shard["name"]).open("wb") as tar:
                tar.truncate(SHARD_BYTES)
        rest = {
            "version": MANIFEST_VERSION,
            "split": "train",
            "class_map_digest": class_map.digest,
            "num_samples": SHARD_SAMPLES * num_shards,
            "identity_digest": "0" * 16,
            "class_counts": {str(label): count for label, count in enumerate(totals.tolist()) if count},
        }
        file.write("], " + json.dumps(rest)[1:] + "\n")


def _shards(num_shards: int, *, classes_a_shard: int, index_sha256: str) -> Iterator[dict[str, Any]]:
    share, rest = divmod(SHARD_SAMPLES, classes_a_shard)
    for number in range(num_shards):
        first = 7 * number
        yield {
            "name": f"shard-{number:06d}.tar",
            "num_samples": SHARD_SAMPLES,
            "bytes": SHARD_BYTES,
            "sha256": hashlib.sha256(b"%d" % number).hexdigest(),
            "index_sha256": index_sha256,
            "class_counts": {
                str((first + place) % NUM_CLASSES): share + (place < rest) for place in range(classes_a_shard)
            },
        }


def start(dataset_dir: Path) -> Start:
    """Start in a process of its own, which imports no more than reading does: its peak is then that of the start alone."""
    done = subprocess.run([sys.executable, "-m", "bench.scale", str(dataset_dir)], stdout=subprocess.PIPE, check=True)
    return Start(**json.loads(done.stdout))


def _start_and_print(dataset_dir: Path) -> None:
    bare_mib = peak_mib("self")
    marks_s = [time.process_time()]
    split = open_dataset(dataset_dir).open_split("train")
    marks_s.append(time.process_time())
    assert split.digest
    marks_s.append(time.process_time())
    plan = TrainPlan(split.shard_sizes, 0, 4096, 64, 2**18)
    plan.micro_batch(Coordinates(1, plan.steps_per_epoch // 2, 17))
    marks_s.append(time.process_time())
    split.read_index(0)
    marks_s.append(time.process_time())
    open_s, digest_s, jump_s, index_s = np.diff(marks_s).tolist()
    found = Start(open_s, digest_s, jump_s, index_s, memory_mib=peak_mib("self") - bare_mib)
    print(json.dumps(asdict(found)))


def bench_scale(cache_dir: Path, *, num_shards: int, classes_a_shard: int) -> list[Finding]:
    """Write such a dataset (its manifest alone takes room), start on it once, and delete it."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    dataset_dir = Path(tempfile.mkdtemp(dir=cache_dir))
    try:
        make_dataset(dataset_dir, num_shards=num_shards, classes_a_shard=classes_a_shard)
        manifest_mb = (dataset_dir / "train" / MANIFEST_FILE).stat().st_size / 1e6
        found = start(dataset_dir)
    finally:
        shutil.rmtree(dataset_dir)
    what = f"scale: {num_shards:,} shards of {SHARD_SAMPLES:,}, {classes_a_shard} classes each"
    return [
        alone(f"{what}: manifest", "MB", [manifest_mb], goal=Goal("at most", 1024.0)),
        alone(f"{what}: open the split, every shard looked at", "CPU s", [found.open_s], goal=Goal("at most", 60.0)),
        alone(f"{what}: its digest", "CPU s", [found.digest_s], goal=Goal("at most", 60.0)),
        alone(f"{what}: plan, jump to the middle", "CPU ms", [1e3 * found.jump_s], goal=Goal("at most", 100.0)),
        alone(f"{what}: index of a shard", "CPU ms", [1e3 * found.index_s], goal=Goal("at most", 10.0)),
        alone(f"{what}: peak memory of all that", "MiB", [found.memory_mib], goal=MEMORY_GOAL),
    ]


if __name__ == "__main__":
    _start_and_print(Path(sys.argv[1]))
