"""Odd surroundings: a run, a build, an evaluation and an analysis do the same in each of them."""

from __future__ import annotations

import datetime as datetimes
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.faults.conftest import Fired
from tests.pictures import fill
from tests.ranks import FORK, TIME_LIMIT_S, command_on_ranks, environment_of, free_port
from tests.runs import rows_of, write_config

ROOT = Path(__file__).parents[2]
ODD = "größe · 植物 'x' $HOME %s"
"""A name with spaces, quotes, signs of the shell and of formats, and letters of two alphabets."""
CLASSES = {"Crème brûlée": 9, "Ficus": 8, "植物": 9}


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's, one thread, CPU alone, with variables set, or taken out where None."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def run(
    *arguments: str | Path,
    changes: Mapping[str, str | None] | None = None,
    cwd: Path = ROOT,
    **options: Any,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the project in a process of its own; it must end with 0."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    finished = subprocess.run(
        [sys.executable, *arguments], env=environment(changes or {}), cwd=cwd, check=False, **options
    )
    told = [(stream or b"").decode("utf-8", "replace") for stream in (finished.stdout, finished.stderr)]
    assert finished.returncode == 0, "\n".join(told)
    assert "Traceback" not in told[1]
    return finished


def train(config: Path, run_dir: Path | str, *overrides: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return run("-m", "aplantida_dist.train", "--config", config, "--run-dir", run_dir, *overrides, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, the dataset of them, a config and a run, made in no odd surroundings, by forks of this process."""
    home = tmp_path_factory.mktemp("plain")
    first = 0
    for split in ("train", "val"):
        first = fill(home / "pictures" / split, CLASSES, first=first)
    building = ["--from-folder", home / "pictures", "--out", home / "dataset", "--workers", "0"]
    training = ["--config", write(home / "config.yaml", home / "dataset"), "--run-dir", home / "run"]
    for module, arguments in (("shards.build", building), ("aplantida_dist.train", training)):
        (finished,) = command_on_ranks(1, module, arguments, home)
        assert finished.code == 0, finished.stderr
    return home


def write(path: Path, dataset: Path) -> Path:
    return write_config(path, dataset, epochs=2, every_steps=1)


def assert_same_run(run_dir: Path, plain: Path, *, same_config: bool = True) -> None:
    """The rows apart from time, and the last weights; the config's digest too, where its paths are the same."""
    ours, theirs = rows_of(run_dir), rows_of(plain / "run")
    if not same_config:
        for row in (*ours, *theirs):
            del row["digests"]["config"]
    assert json.dumps(ours) == json.dumps(theirs)
    weights = [
        load_file(max((each / "checkpoints").glob("step_*")) / "model.safetensors") for each in (run_dir, plain / "run")
    ]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.fault(
    what="locale C, a terminal of ASCII, no HOME, umask 077, a path with spaces and non-ASCII, a run folder on a symlink, PYTHONHASHSEED random, another time zone",
    how="all at once: build, train, evaluate, analyze in processes of their own, from an empty folder",
    holds="the dataset byte for byte, rows and weights bit for bit those of plain surroundings; every file of the run is private",
)
def test_everything_odd_at_once(plain: Path, tmp_path: Path, fired: Fired) -> None:
    """The classes have names in two alphabets besides."""
    changes = {
        "LC_ALL": "C",
        "LANG": None,
        "HOME": None,
        "PYTHONHASHSEED": "random",
        "PYTHONIOENCODING": "ascii:strict",
        "TZ": "Pacific/Kiritimati",
        "XDG_CACHE_HOME": None,
        "XDG_CONFIG_HOME": None,
    }
    home = tmp_path / ODD
    (home / "far away").mkdir(parents=True)
    (home / "run").symlink_to(home / "far away", target_is_directory=True)
    told = {"changes": changes, "cwd": home, "umask": 0o077}
    seen = run("-c", "import locale, os; print(locale.setlocale(locale.LC_ALL, ''), 'HOME' in os.environ)", **told)
    assert seen.stdout.split() in ([b"C", b"False"], [b"C.UTF-8", b"False"])
    run(
        ROOT / "shards/build.py",
        "--from-folder",
        plain / "pictures",
        "--out",
        home / "data set",
        "--workers",
        "1",
        **told,
    )
    names = sorted(path.relative_to(plain / "dataset") for path in plain.glob("dataset/*/*"))
    assert names
    for name in names:
        assert (home / "data set" / name).read_bytes() == (plain / "dataset" / name).read_bytes()
    config = write(home / "config ü.yaml", home / "data set")
    train(config, "run", **told)
    assert_same_run(home / "far away", plain, same_config=False)
    files = [path for path in (home / "far away").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    options = [
        "--run",
        "run",
        "--data",
        "data set",
        "--split",
        "val",
        "--json",
        "out ü.json",
        "--predictions",
        "p.jsonl",
    ]
    evaluated = run("-m", "aplantida_dist.evaluate", *options, **told)
    assert b"\\xb7" in evaluated.stdout, "a middle dot as an escape; it used to end the command with a traceback"
    ours = json.loads((home / "out ü.json").read_bytes())["val"]
    assert ours["top1"] == max(row["val"]["top1"] for row in rows_of(plain / "run"))
    run("-m", "aplantida_dist.analyze", "run", "--out", "seite 植", **told)
    assert (home / "seite 植" / "report.html").stat().st_size > 1000
    run(ROOT / "shards/verify.py", "data set", **told)
    fired(f"{len(names)} files of the dataset, 2 rows and the weights equal")


SURROUNDINGS: dict[str, dict[str, str | None]] = {
    "locale C": {"LC_ALL": "C"},
    "locale C taken at its word": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a terminal of ASCII": {"PYTHONIOENCODING": "ascii"},
    "no HOME": {"HOME": None},
    "HOME that cannot be written": {"HOME": "/proc/nowhere"},
    "PYTHONHASHSEED random": {"PYTHONHASHSEED": "random"},
    "PYTHONHASHSEED 1": {"PYTHONHASHSEED": "1"},
    "time zone": {"TZ": "America/St_Johns"},
}


@pytest.mark.slow
@pytest.mark.fault(
    what="one odd thing alone in the environment",
    how="the command of the training, with W&B offline where it is about HOME, then evaluate and analyze",
    holds="rows and weights bit for bit those of plain surroundings",
)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_one_odd_variable(plain: Path, tmp_path: Path, name: str, fired: Fired) -> None:
    """Each for itself, so that none hides another."""
    told = {"changes": SURROUNDINGS[name]}
    overrides = ["report.wandb=offline"] if "HOME" in name else []
    train(plain / "config.yaml", tmp_path / "run", *overrides, **told)
    assert_same_run(tmp_path / "run", plain, same_config=not overrides)
    if overrides:
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    run(
        "-m",
        "aplantida_dist.evaluate",
        "--run",
        tmp_path / "run",
        "--data",
        plain / "dataset",
        "--split",
        "val",
        **told,
    )
    run("-m", "aplantida_dist.analyze", tmp_path / "run", **told)
    fired("2 rows equal")


@pytest.mark.fault(
    what="the reader of the output goes away",
    how="stdout and stderr are pipes that are closed before the first line",
    holds="the training goes on to its end: its record is in files",
)
@pytest.mark.slow
def test_a_training_outlives_its_readers(plain: Path, tmp_path: Path, fired: Fired) -> None:
    """As under `| head`, or where a terminal hangs up: the run used to end there with exit code 0."""
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    train(plain / "config.yaml", tmp_path / "run", stdout=writer, stderr=writer)
    os.close(writer)
    assert_same_run(tmp_path / "run", plain)
    fired("2 rows equal")


@pytest.mark.slow
@pytest.mark.fault(
    what="stdin, stdout and stderr closed, and a working folder that cannot be written",
    how="the command started with descriptors 0, 1 and 2 closed, in /proc/self",
    holds="no file of the run takes their numbers; rows and weights equal",
)
def test_closed_streams_and_a_read_only_folder(plain: Path, tmp_path: Path, fired: Fired) -> None:
    """As some supervisors start their services."""
    with pytest.raises(FileNotFoundError):
        Path("/proc/self/file").write_bytes(b"")
    shell = 'cd /proc/self && exec "$0" "$@" <&- >&- 2>&-'
    arguments = ["-m", "aplantida_dist.train", "--config", plain / "config.yaml", "--run-dir", tmp_path / "run"]
    finished = subprocess.run(["sh", "-c", shell, sys.executable, *arguments], env=environment({}), check=False)
    assert finished.returncode == 0
    assert_same_run(tmp_path / "run", plain)
    fired("2 rows equal")


def turn_back_clocks(module_arguments: Sequence[str], seen: Path) -> None:
    """Be a rank whose clock goes back by an hour each time that it is asked, and train."""
    os.environ.update(environment_of(0, 1, free_port()))
    true_time, asked = time.time, [0]

    def earlier() -> float:
        asked[0] += 1
        return true_time() - 3600.0 * asked[0]

    class Backwards(datetimes.datetime):
        @classmethod
        def now(cls, tz: datetimes.tzinfo | None = None) -> Backwards:  # type: ignore[override]
            return cls.fromtimestamp(earlier(), tz)

    time.time, datetimes.datetime = earlier, Backwards  # type: ignore[misc]
    for name, module in list(sys.modules.items()):
        if name.startswith("aplantida_dist") and hasattr(module, "datetime"):
            module.datetime = Backwards  # type: ignore[attr-defined]
    sys.argv = list(module_arguments)
    code: Any = 1
    try:
        runpy.run_module("aplantida_dist.train", run_name="__main__")
    except SystemExit as end:
        code = end.code
    seen.write_text(str(asked[0]))
    os._exit(int(code or 0))


@pytest.mark.fault(
    what="the clock is set back, again and again, while a run trains",
    how="time.time and datetime.now go back by an hour with every call, in the rank that trains",
    holds="rows and weights bit for bit those of an even clock, and speeds that are not negative",
)
def test_a_clock_that_goes_backwards(plain: Path, tmp_path: Path, fired: Fired) -> None:
    """Durations are measured by a clock that cannot be set."""
    arguments = ["train", "--config", str(plain / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    rank = FORK.Process(target=turn_back_clocks, args=(arguments, tmp_path / "asked"))
    rank.start()
    rank.join(TIME_LIMIT_S)
    assert rank.exitcode == 0
    assert_same_run(tmp_path / "run", plain)
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[1]["time_utc"] < rows[0]["time_utc"], "the clock did go back"
    assert all(row["train"]["images_per_s"] > 0 for row in rows)
    fired(f"{(tmp_path / 'asked').read_text()} hours back in 2 epochs")
