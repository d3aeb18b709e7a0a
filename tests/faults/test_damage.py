"""Damage on disk: what a checkpoint, a pointer or the history has lost or gained since it was written, and how the run goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aplantida_dist.checkpoint import load_checkpoint
from aplantida_dist.errors import UserError
from aplantida_dist.seal import sealed
from tests.ranks import Finished, command_on_ranks
from tests.runs import rows_of, write_config

Fired = Callable[[str], None]
EPOCHS = 4
STEPS = (5, 10, 15, 20)
FILES = ("model.safetensors", "optimizer.safetensors", "totals.safetensors", "seen.npy", "position.json", "ema.safetensors")  # fmt: skip
FLIPS_PER_FILE = 40


@pytest.fixture(scope="module")
def config(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "config.yaml", dataset_dir, epochs=EPOCHS)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken run: four epochs, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    finished = train(config, folder / "run")
    assert finished.code == 0, finished.stderr
    return folder / "run"


def train(config: Path, run_dir: Path, *arguments: str) -> Finished:
    command = ["--config", config, "--run-dir", run_dir, "checkpoint.keep_last=100", "ema.decay=0.9", *arguments]
    return command_on_ranks(1, "aplantida_dist.train", command, run_dir.parent)[0]


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def checkpoint_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def assert_ends_as_the_unbroken_run(config: Path, run_dir: Path, whole: Path, *arguments: str, start: int) -> str:
    """The same command goes on from `start` and ends with the same history and weights, bit for bit; what it said on stderr."""
    finished = train(config, run_dir, *arguments)
    assert finished.code == 0, finished.stderr
    assert f"going on from step {start}" in finished.stdout
    assert json.dumps(rows_of(run_dir)) == json.dumps(rows_of(whole))
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(checkpoint_of(run, STEPS[-1]) / name) for run in (run_dir, whole))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    for pointer in ("last", "best"):
        ours_at, theirs_at = (json.loads((run / "checkpoints" / f"{pointer}.json").read_text()) for run in (run_dir, whole))  # fmt: skip
        assert {**ours_at, "digest": ""} == {**theirs_at, "digest": ""}
        named = run_dir / "checkpoints" / ours_at["checkpoint"]
        assert load_checkpoint(named).digest == ours_at["digest"]
    return finished.stderr


def damages_of(content: bytes) -> Iterator[tuple[str, bytes]]:
    """What may become of a file: cut at four places, a bit flipped at many."""
    for length in (0, 1, len(content) // 2, len(content) - 1):
        yield f"cut to {length} bytes", content[:length]
    for place in sorted({round(i * (len(content) - 1) / FLIPS_PER_FILE) for i in range(FLIPS_PER_FILE + 1)}):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        yield f"bit {place % 8} of byte {place} flipped", bytes(flipped)


@pytest.mark.fault(
    what="a file of a checkpoint truncated, bit-flipped, deleted, or replaced by that of another run",
    how="each file × cut at 0, 1, half, all but 1 bytes; 41 flipped bits; gone; another run's",
    holds="none is loaded, each is named with its path",
)
def test_no_damaged_file_of_a_checkpoint_is_loaded(run_dir: Path, fired: Fired) -> None:
    """Each is refused by digest, by a line that names the checkpoint and, but for what no longer is JSON, the file."""
    folder, other = checkpoint_of(run_dir, 20), checkpoint_of(run_dir, 15)
    num_refused = 0
    for name in FILES:
        path = folder / name
        content = path.read_bytes()
        replaced = [("another's", (other / name).read_bytes())] if name != "seen.npy" else []
        for what, damaged in (*damages_of(content), *replaced):
            if name == "position.json" and what == "another's":
                continue  # is sound by itself, and is refused for the files beside it
            path.write_bytes(damaged)
            if damaged in (content, content.rstrip(b"\n")):  # the end of the last line alone is no damage to JSON
                continue
            with pytest.raises(UserError, match=folder.name):
                load_checkpoint(folder)
            num_refused += 1
        path.unlink()
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            load_checkpoint(folder)
        num_refused += 1
        path.write_bytes(content)
    shutil.copy(other / "position.json", folder)
    with pytest.raises(UserError, match="has changed since it was written"):
        load_checkpoint(folder)
    assert num_refused >= len(FILES) * FLIPS_PER_FILE
    fired(f"{num_refused + 1} of {num_refused + 1} refused")


def odd_positions(position: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """position.json with each field in turn gone or of another type, and with one more."""
    for name in position:
        yield f"without {name}", {key: value for key, value in position.items() if key != name}
        for odd in (None, -1, "x", [], {}, [None], {"": None}, True, 1.5):
            if type(odd) is not type(position[name]) or not odd:
                yield f"{name} = {odd!r}", {**position, name: odd}
    yield "one more field", {**position, "more": 1}
    yield "a list", [position]


@pytest.mark.fault(
    what="position.json with a field that is gone or of another type",
    how="each field × nine odd values, sealed anew or not",
    holds="refused by the seal; with a new seal refused by type or read as valid, never a traceback",
)
def test_an_odd_position_is_refused(run_dir: Path, fired: Fired) -> None:
    """The seal finds each; and what somebody sealed again, or wrote before there were seals, meets the types."""
    folder = checkpoint_of(run_dir, 20)
    position = json.loads((folder / "position.json").read_text())
    unsealed_position = {key: value for key, value in position.items() if key != "digest"}
    num_refused = num_read = 0
    for what, odd in odd_positions(unsealed_position):
        old = {**odd, "format": 2} if isinstance(odd, dict) and odd.get("format") == 3 else odd
        for content in (odd, sealed(odd) if isinstance(odd, dict) else odd, old):
            (folder / "position.json").write_text(json.dumps(content))
            try:
                load_checkpoint(folder)
                num_read += 1
                assert content is not odd, f"{what}: an unsealed position of format 3 was read"
            except UserError:
                num_refused += 1
    assert num_refused > 200
    fired(f"{num_refused} refused, {num_read} valid")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "lose", "another's"])
@pytest.mark.fault(
    what="the newest two checkpoints damaged",
    how="the same command again",
    holds="each is named, the one before is taken, and the end is the unbroken run's, bit for bit",
)
def test_a_run_with_damaged_checkpoints_ends_as_the_unbroken_one(
    config: Path, whole: Path, run_dir: Path, name: str, damage: str, fired: Fired
) -> None:
    """Twice: the second time the checkpoint that the first resume wrote is damaged too."""
    for _ in range(2):
        for step in (15, 20):
            spoil(checkpoint_of(run_dir, step) / name, damage, other=checkpoint_of(run_dir, 5) / name)
        said = assert_ends_as_the_unbroken_run(config, run_dir, whole, start=10)
        assert said.count("falling back to the checkpoint before it") == 2
        assert (run_dir / "checkpoints/aside/step_00000020").is_dir()
    fired("2 of 2 resumes end alike")


def test_one_damaged_checkpoint(config: Path, whole: Path, run_dir: Path) -> None:
    """The quick one of the sweep above."""
    spoil(checkpoint_of(run_dir, 20) / "position.json", "flip", other=checkpoint_of(run_dir, 5) / "position.json")
    said = assert_ends_as_the_unbroken_run(config, run_dir, whole, start=15)
    assert "position.json has changed since it was written" in said


def spoil(path: Path, damage: str, *, other: Path) -> None:
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "flip":
            place = content.index(b'"step": ') + 8 if path.suffix == ".json" else len(content) - 3
            content[place] ^= 1
            path.write_bytes(content)
        case "lose":
            path.unlink()
        case _ if path.name == "seen.npy":  # is the same in every checkpoint of a run
            path.write_bytes(np.zeros(3, dtype="<i8").tobytes())
        case _ if path.name == "totals.safetensors":  # is zero between epochs, in every checkpoint
            save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)
        case _:
            shutil.copy(other, path)


POINTERS = {
    "gone": None, "empty": b"", "cut": b'{"checkpoint": "step_0000', "a list": b"[]", "of nothing": b'{"checkpoint": "step_00000099", "digest": "0"}',
    "leading out": b'{"checkpoint": "../../elsewhere", "digest": "0"}', "of another digest": b'{"checkpoint": "step_00000010", "digest": "0"}',
    "of other types": b'{"checkpoint": 3, "digest": null}',
}  # fmt: skip


@pytest.mark.parametrize("content", POINTERS.values(), ids=POINTERS)
@pytest.mark.fault(
    what="last.json and best.json gone, cut, or naming what is not there",
    how="asked for by name, then the same command again",
    holds="refused by name; the resume ends as the unbroken run and makes both true again",
)
def test_a_damaged_pointer_is_refused_and_mended(
    config: Path, whole: Path, run_dir: Path, content: bytes | None, fired: Fired
) -> None:
    """Whoever asks for `best` gets the best or an error; the training needs neither file and writes both."""
    for pointer in ("last", "best"):
        path = run_dir / "checkpoints" / f"{pointer}.json"
        path.unlink() if content is None else path.write_bytes(content)
    refused = train(config, run_dir, "--resume", "best")
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "best.json" in refused.stderr or "step_00000099" in refused.stderr
    assert_ends_as_the_unbroken_run(config, run_dir, whole, start=20)
    fired("both true again")


def lines_of(run_dir: Path) -> list[bytes]:
    return (run_dir / "history.jsonl").read_bytes().splitlines(keepends=True)


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "another loss": lambda line: json.dumps(lower_loss(json.loads(line))).encode() + b"\n",
    "one more blank": lambda line: line.replace(b": ", b":  ", 1),
    "a digit": lambda line: line.replace(b'"learning_rate": 0.', b'"learning_rate": 1.', 1),
    "gone": lambda line: b"",
    "twice": lambda line: line + line,
    "a newer schema": lambda line: line.replace(b'"schema": 1', b'"schema": 2', 1),
    "no JSON": lambda line: b"x" + line,
    "no text": lambda line: b"\xff" + line,
    "a NaN": lambda line: line.replace(b'"top5": 0', b'"top5": NaN, "more": 0', 1),
}


def lower_loss(row: dict[str, Any]) -> dict[str, Any]:
    row["val"]["loss"] /= 2
    return row


@pytest.mark.fault(
    what="a line of the history edited, doubled, taken out, or of a newer schema",
    how="each line × nine edits, most of them valid rows",
    holds="refused with its number; with the line restored the run goes on",
)
@pytest.mark.parametrize(
    "numbers", [(EPOCHS,), pytest.param((1, 2, 3), marks=pytest.mark.slow)], ids=["last", "others"]
)
def test_an_edited_line_of_the_history_is_refused_with_its_number(
    config: Path, whole: Path, run_dir: Path, fired: Fired, numbers: tuple[int, ...]
) -> None:
    """A row that is valid and not the one that was written is the worst: it lies in the record."""
    history, lines = run_dir / "history.jsonl", lines_of(run_dir)
    before = {path.name for path in (run_dir / "checkpoints").iterdir()}
    num_refused = 0
    for number in numbers:
        for what, edit in EDITS.items():
            edited = [edit(line) if n == number else line for n, line in enumerate(lines, start=1)]
            if edited == lines:
                continue
            history.write_bytes(b"".join(edited))
            refused = train(config, run_dir)
            assert (refused.code, refused.stderr.count("\n")) == (2, 1), (what, number, refused.stderr)
            expected = number + (what == "twice")
            assert f"history.jsonl: line {expected} " in refused.stderr, (what, number, refused.stderr)
            num_refused += 1
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == before
    history.write_bytes(b"".join(lines))
    assert_ends_as_the_unbroken_run(config, run_dir, whole, start=20)
    fired(f"{num_refused} of {num_refused} refused")


@pytest.mark.fault(
    what="the last line of the history cut, which the newest checkpoint does not know",
    how="cut at 0, 1, 200, all but 2 and all but 1 of its bytes, after the checkpoint of the epoch before",
    holds="dropped and repeated from the checkpoint; the end is the unbroken run's",
)
@pytest.mark.parametrize("cut", [200, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (0, 1, -2, -1))], ids=str)
def test_a_cut_last_line_is_repeated_from_the_checkpoint(
    config: Path, whole: Path, run_dir: Path, fired: Fired, cut: int
) -> None:
    """As if the power had failed between the row and its checkpoint."""
    shutil.rmtree(checkpoint_of(run_dir, 20))
    lines = lines_of(run_dir)
    assert len(lines[-1]) > 400
    (run_dir / "history.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    assert_ends_as_the_unbroken_run(config, run_dir, whole, start=15)
    fired("ends alike")


@pytest.mark.fault(
    what="the last line of the history cut although the newest checkpoint knows it",
    how="half of it gone; then the epoch repeated from the checkpoint before by --resume",
    holds="refused with its number; repeated, the end is the unbroken run's and the later checkpoint lies aside",
)
def test_a_cut_line_that_a_checkpoint_knows_is_refused(config: Path, whole: Path, run_dir: Path, fired: Fired) -> None:
    """Also the whole history lost is refused, where it once began anew in silence."""
    history, content = run_dir / "history.jsonl", (run_dir / "history.jsonl").read_bytes()
    history.unlink()
    refused = train(config, run_dir)
    assert (refused.code, "line 1 is missing or cut" in refused.stderr) == (2, True)
    history.write_bytes(content[:-100])
    refused = train(config, run_dir)
    assert (refused.code, "line 4 is missing or cut" in refused.stderr) == (2, True)
    assert_ends_as_the_unbroken_run(config, run_dir, whole, "--resume", "step_00000015", start=15)
    assert os.listdir(run_dir / "checkpoints/aside") == ["step_00000020"]
    fired("refused, then repeated")


@pytest.mark.fault(
    what="a history that runs ahead of the checkpoint, and checkpoints ahead of the one that is named",
    how="--resume step_00000005 in a finished run",
    holds="rows and checkpoints beyond are put aside with a word, and the end is the unbroken run's",
)
def test_what_lies_beyond_the_checkpoint_is_kept_aside(config: Path, whole: Path, run_dir: Path, fired: Fired) -> None:
    """A later checkpoint left in its place would win the next resume, whose rows are gone."""
    cut = lines_of(run_dir)[1:]
    said = assert_ends_as_the_unbroken_run(config, run_dir, whole, "--resume", "step_00000005", start=5)
    assert "3 rows of the history lie beyond the checkpoint of step 5" in said
    assert (run_dir / "history.cut.jsonl").read_bytes() == b"".join(cut)
    assert sorted(os.listdir(run_dir / "checkpoints/aside")) == [f"step_{step:08d}" for step in STEPS[1:]]
    fired("3 rows and 3 checkpoints aside")
