"""Fuzz: whatever bytes stand where a file of ours is expected, the reader reads them or raises the typed error, within a bound of memory.

`make test` tries 200 inputs a reader, the same ones every time; `-m slow` tries 20,000. What was ever found stands in tests/corpus/,
a folder a reader, and is read in every run.
"""

from __future__ import annotations

import io
import json
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from aplantida_dist.errors import UserError
from tests import fuzz
from tests.pictures import draw
from tests.ranks import command_on_ranks
from tests.runs import write_config
from tests.tars import pack, sample

CORPUS = Path(__file__).with_name("corpus")
QUICK, LONG = 200, 20_000
MAX_MEMORY_BYTES = 192 * 2**20
"""Of Python's own allocations for one input; the largest input is 0.5 MB. Headers of soft labels may take 64 MiB."""
MAX_RESIDENT_BYTES = 600 * 2**20
"""By which the process may grow while pictures of up to 0.1 megapixels are damaged: a header may claim up to 100 megapixels."""

Target = tuple[fuzz.Reader, st.SearchStrategy[bytes]]
NAMES = (
    "config", "manifest", "class_map", "history", "position", "pointer", "soft_labels", "jpeg", "png", "webp", "index", "foreign_index",
    "indexed_tar", "tar",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder / "config.yaml", dataset_dir, epochs=2)
    command = ["--config", config, "--run-dir", folder / "run"]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", command, folder)
    assert finished.code == 0, finished.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def soft_label_path(run_dir: Path, dataset_dir: Path) -> Path:
    """What that run says of its train split."""
    path = run_dir.parent / "train.soft"
    command = ["--run", run_dir, "--data", dataset_dir, "--out", path]
    (finished,) = command_on_ranks(1, "aplantida_dist.soft_labels", command, path.parent)
    assert finished.code == 0, finished.stderr
    return path


@pytest.fixture(scope="module")
def targets(
    dataset_dir: Path, run_dir: Path, soft_label_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Target]:
    """Each reader with what it is fed, made of the files of a real dataset, a real run and a real teacher."""
    train = dataset_dir / "train"
    checkpoint = max((run_dir / "checkpoints").glob("step_*"))
    tar, index = ((train / f"shard-000000.{suffix}").read_bytes() for suffix in ("tar", "idx"))
    foreign = pack(
        tmp_path_factory.mktemp("tars") / "x.tar", [file for n in range(3) for file in sample("ü" * 120 + str(n), n)]
    ).read_bytes()
    long_config = Path(__file__).parents[1].joinpath("configs/teacher_global.yaml").read_bytes()
    config = write_config(tmp_path_factory.mktemp("config") / "config.yaml", dataset_dir).read_bytes()
    foreign_index = b"".join(index[i : i + 20] + bytes(24) for i in range(0, len(index), 20))
    return {
        "config": (fuzz.read_config, st.one_of(fuzz.anything(config), fuzz.anything(long_config))),
        "manifest": (fuzz.read_manifest, fuzz.anything((train / "manifest.json").read_bytes(), is_json=True)),
        "class_map": (fuzz.read_class_map, fuzz.anything((dataset_dir / "classes.json").read_bytes(), is_json=True)),
        "history": (fuzz.read_rows, _history(run_dir)),
        "position": (fuzz.read_position, st.one_of(_position(checkpoint), _position(checkpoint, is_old=True))),
        "pointer": (fuzz.read_pointer, fuzz.anything((run_dir / "checkpoints/best.json").read_bytes(), is_json=True)),
        "soft_labels": (fuzz.read_soft_labels, _soft_labels(soft_label_path.read_bytes())),
        "jpeg": (fuzz.read_picture, fuzz.damaged_bytes(draw(1, width=300, height=200))),
        "png": (fuzz.read_picture, st.one_of(fuzz.damaged_bytes(draw(1, image_format="PNG")), fuzz.damaged_bytes(_transparent_png()))),
        "webp": (fuzz.read_picture, fuzz.anything(draw(1, image_format="WEBP"))),
        "index": (fuzz.index_reader(tar, is_foreign=False), fuzz.anything(index)),
        "foreign_index": (fuzz.index_reader(tar, is_foreign=True), fuzz.anything(foreign_index)),
        "indexed_tar": (fuzz.indexed_tar_reader(index), fuzz.damaged_bytes(tar)),
        "tar": (fuzz.read_tar, fuzz.anything(foreign)),
    }  # fmt: skip


def _history(run_dir: Path) -> st.SearchStrategy[bytes]:
    whole = (run_dir / "history.jsonl").read_bytes()
    line = whole.splitlines()[0]
    return st.one_of(fuzz.anything(whole), fuzz.damaged_json(line).map(lambda text: text + b"\n"))


def _position(checkpoint: Path, *, is_old: bool = False) -> st.SearchStrategy[bytes]:
    """An old one bears no seal, so that what is damaged comes through to the checks behind it."""
    content = json.loads((checkpoint / "position.json").read_bytes())
    if is_old:
        content = {**content, "format": 2, "files": dict.fromkeys(content["files"], "0" * 64)}
        del content["digest"], content["history"]
    return fuzz.anything(json.dumps(content).encode(), is_json=True)


def _soft_labels(whole: bytes) -> st.SearchStrategy[bytes]:
    """Also files whose header is sound JSON of its length and states nonsense."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = fuzz.damaged_json(whole[8:end])
    return st.one_of(
        fuzz.anything(whole), header.map(lambda text: len(text).to_bytes(8, "little") + text + whole[end:])
    )


def _transparent_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (30, 20), 3).save(
        buffer, "PNG", transparency=3, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", icc_profile=b"x" * 200
    )
    return buffer.getvalue()


def outcome(reader: fuzz.Reader, content: bytes, folder: Path) -> str:
    """`read` or `refused`; whatever else a reader raises comes out of here so that it fails the test."""
    try:
        reader(content, folder)
    except UserError:
        return "refused"
    return "read"


def fuzzed(name: str, target: Target, folder: Path, *, max_examples: int) -> dict[str, int]:
    """Feed a reader so many inputs; how many were read and how many refused. An input that breaks it is named by hypothesis."""
    reader, inputs = target
    counts = {"read": 0, "refused": 0}

    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def feed(content: bytes) -> None:
        counts[outcome(reader, content, folder)] += 1

    feed()
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_reads_or_refuses(targets: dict[str, Target], tmp_path: Path, name: str) -> None:
    """200 inputs each, the same every time, and never more memory than a bound."""
    before = _peak_resident_bytes()
    tracemalloc.start()
    try:
        counts = fuzzed(name, targets[name], tmp_path, max_examples=QUICK)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counts["refused"] > QUICK // 10, "nothing that is damaged came through"
    assert peak_bytes < MAX_MEMORY_BYTES
    assert _peak_resident_bytes() - before < MAX_RESIDENT_BYTES


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_every_reader_reads_or_refuses_for_long(targets: dict[str, Target], tmp_path: Path, name: str) -> None:
    """20,000 inputs each."""
    before = _peak_resident_bytes()
    counts = fuzzed(name, targets[name], tmp_path, max_examples=LONG)
    grown_bytes = _peak_resident_bytes() - before
    print(
        f"\n{name}: {sum(counts.values()):,} inputs, {counts['refused']:,} refused, {grown_bytes / 2**20:.0f} MiB more at the peak"
    )
    assert grown_bytes < MAX_RESIDENT_BYTES


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_stays_found(targets: dict[str, Target], tmp_path: Path, path: Path) -> None:
    """Every input that ever broke a reader is read, or refused by the typed error."""
    reader, _ = targets[path.parent.name]
    outcome(reader, path.read_bytes(), tmp_path)


def test_the_fuzz_can_fail(tmp_path: Path) -> None:
    """A reader that lets one kind of accident through is found within the quick number of inputs."""

    def careless(content: bytes, folder: Path) -> None:
        try:
            json.loads(content)
        except ValueError as error:
            raise UserError("no JSON") from error

    target: tuple[Callable[[bytes, Path], None], st.SearchStrategy[bytes]] = (careless, fuzz.damaged_bytes(b'{"a": 1}'))
    with pytest.raises(RecursionError):
        fuzzed("careless", target, tmp_path, max_examples=QUICK)
