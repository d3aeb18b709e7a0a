"""Whole files for the fuzzers to damage: those of a real dataset, a real run and a real teacher, in a folder a reader."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from tests.fuzz_targets import NAMES
from tests.pictures import draw
from tests.ranks import command_on_ranks
from tests.runs import write_config
from tests.tars import pack, sample


def write_whole_files(folder: Path, *, dataset_dir: Path) -> Path:
    """Write the whole files of every reader into a folder of its name; trains a run of two epochs for that and asks it for soft labels."""
    run_dir = _finished_run(folder / "made", dataset_dir)
    train = dataset_dir / "train"
    tar, index = ((train / f"shard-000000.{suffix}").read_bytes() for suffix in ("tar", "idx"))
    checkpoint = max((run_dir / "checkpoints").glob("step_*"))
    position = (checkpoint / "position.json").read_bytes()
    long_config = Path(__file__).parents[1].joinpath("configs/teacher_global.yaml").read_bytes()
    foreign = pack(folder / "made/x.tar", [file for n in range(3) for file in sample("ü" * 120 + str(n), n)])
    wholes = {
        "config": [(folder / "made/config.yaml").read_bytes(), long_config],
        "manifest": [(train / "manifest.json").read_bytes()],
        "class_map": [(dataset_dir / "classes.json").read_bytes()],
        "history": [(run_dir / "history.jsonl").read_bytes()],
        "position": [position, _old_position(position)],
        "pointer": [(run_dir / "checkpoints/best.json").read_bytes()],
        "soft_labels": [(folder / "made/train.soft").read_bytes()],
        "jpeg": [draw(1, width=300, height=200)],
        "png": [draw(1, image_format="PNG"), _transparent_png()],
        "webp": [draw(1, image_format="WEBP")],
        "index": [index],
        "foreign_index": [b"".join(index[i : i + 20] + bytes(24) for i in range(0, len(index), 20))],
        "indexed_tar": [tar],
        "tar": [foreign.read_bytes()],
    }
    assert tuple(wholes) == NAMES
    for name, contents in wholes.items():
        (folder / name).mkdir()
        for number, content in enumerate(contents):
            (folder / name / str(number)).write_bytes(content)
    return folder


def _finished_run(folder: Path, dataset_dir: Path) -> Path:
    """A run of two epochs, and beside it what it says of its train split."""
    folder.mkdir()
    config = write_config(folder / "config.yaml", dataset_dir, epochs=2)
    asked = ["--run", folder / "run", "--data", dataset_dir, "--out", folder / "train.soft"]
    commands: list[tuple[str, list[Any]]] = [
        ("aplantida_dist.train", ["--config", config, "--run-dir", folder / "run"]),
        ("aplantida_dist.soft_labels", asked),
    ]
    for module, arguments in commands:
        (finished,) = command_on_ranks(1, module, arguments, folder)
        assert finished.code == 0, finished.stderr
    return folder / "run"


def _old_position(position: bytes) -> bytes:
    """One that bears no seal, so that what is damaged comes through to the checks behind it."""
    content = json.loads(position)
    content = {**content, "format": 2, "files": dict.fromkeys(content["files"], "0" * 64)}
    del content["digest"], content["history"]
    return json.dumps(content).encode()


def _transparent_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (30, 20), 3).save(
        buffer, "PNG", transparency=3, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", icc_profile=b"x" * 200
    )
    return buffer.getvalue()
