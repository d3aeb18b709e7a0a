"""Kills: whoever dies at whatever moment, the same command again ends as the unbroken run does. And mutants, which must not."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

import aplantida_dist
import aplantida_dist.compose
from aplantida_dist.checkpoint import load_checkpoint
from tests.faults.conftest import Fired
from tests.faults.forked import ForkedRun, start
from tests.faults.launched import LaunchedRun, launch
from tests.runs import write_config
from tests.test_resume import assert_same_run

GONE_WITHIN_S = 15.0
KILLS_A_VICTIM = 20
EPOCHS = 4
OVERRIDES = ("model.kwargs.drop_rate=0.1", "report.wandb=offline")

Victim = str
Run = ForkedRun | LaunchedRun
VICTIMS = ("rank 0", "rank 1", "a loader worker", "all ranks at once", "the launcher's group")
MOMENTS = ("start-up", "a step", "writing a checkpoint", "a history row", "evaluating", "W&B's finish", "any time")
SKIPS_AT_MOST = {"a step": 10, "writing a checkpoint": 10, "a history row": 3, "evaluating": 3, "W&B's finish": 0}
"""Moments of a kind that are let pass at most, of those that a run has."""


@dataclass(frozen=True)
class Command:
    """The command that is repeated: its config, its run folder, what its ranks run it with."""

    config: Path
    run_dir: Path
    world_size: int = 2
    before: Callable[[int], None] | None = None
    is_launched: bool = False

    def start(self) -> Run:
        arguments = ["--config", self.config, "--run-dir", self.run_dir, *OVERRIDES]
        if self.is_launched:
            return launch(self.world_size, arguments, self.config.parent / "output")
        return start(self.world_size, arguments, self.config.parent, self.before)

    def finish(self) -> None:
        """Run it to its end."""
        run = self.start()
        run.wait_until_gone(200)
        assert set(run.codes()) == {0}, run.said()


@pytest.fixture(scope="module")
def whole(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "config.yaml", dataset_dir, epochs=EPOCHS, every_steps=1, num_workers=1)
    command = Command(config, folder / "run")
    command.finish()
    return command


def wait_for(moment: str, run: Run, run_dir: Path, chance: random.Random) -> None:
    """Return at a moment of its kind, as the files of the run show it; which one of many is up to chance."""
    started_s, since_s = time.monotonic(), time.time()
    if moment == "start-up":
        time.sleep(chance.uniform(0.0, run.start_up_s))
        return
    if moment == "any time":
        time.sleep(chance.uniform(0.0, run.start_up_s + 5.0))
        return
    skip = chance.randint(0, SKIPS_AT_MOST[moment])
    size = -1
    while run.is_alive() and time.monotonic() - started_s < 60:
        if moment == "writing a checkpoint":
            seen = any(is_newer(path, since_s) for path in run_dir.glob("checkpoints/.step_*.part"))
        elif moment == "a history row":
            history = run_dir / "history.jsonl"
            now = history.stat().st_size if history.exists() else 0
            seen, size = 0 <= size < now, now
        else:
            seen = (
                is_newer(run_dir / "status.json", since_s)
                and phase_of(run_dir)
                == {"evaluating": "evaluating", "W&B's finish": "done", "a step": "saving"}[moment]
            )
        if seen and skip == 0:
            # A step follows the checkpoint before it.
            time.sleep(chance.uniform(0.0, 0.2) if moment in ("a step", "W&B's finish") else 0.0)
            return
        skip -= seen
        time.sleep(0.0005)


def is_newer(path: Path, since_s: float) -> bool:
    """Whether a file was written since a time, and not left by a run that was killed before."""
    try:
        return path.stat().st_mtime > since_s
    except FileNotFoundError:
        return False


def phase_of(run_dir: Path) -> str:
    try:
        return str(json.loads((run_dir / "status.json").read_text())["phase"])
    except FileNotFoundError:
        return ""


def strike(victim: Victim, run: Run) -> bool:
    """SIGKILL the victim; returns whether it was alive to be killed."""
    if not run.is_alive():
        return False
    if isinstance(run, LaunchedRun):
        os.killpg(run.launcher.pid, signal.SIGKILL)
        return True
    if victim == "a loader worker":
        pids = run.workers(1)
    elif victim == "all ranks at once":
        pids = [rank.pid or 0 for rank in run.ranks]
    else:
        pids = [run.ranks[int(victim.removeprefix("rank "))].pid or 0]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)


def require_whole(run_dir: Path) -> None:
    """What lies in a run folder after a kill is whole: every checkpoint, every line of the history, every JSON file."""
    for folder in run_dir.glob("checkpoints/step_*"):
        load_checkpoint(folder)
    for path in [*run_dir.glob("*.json"), *run_dir.glob("checkpoints/*.json")]:
        json.loads(path.read_text())


def kill_and_resume(command: Command, victim: Victim, *, kills: int, seed: int) -> tuple[int, int, float]:
    """Kill, resume, kill, resume, to the end, from an empty folder each time; returns kills that fired, runs and the slowest ending (s)."""
    chance, moments = random.Random(seed), itertools.cycle(MOMENTS)
    fired = runs = 0
    slowest_s = 0.0
    whole = command.run_dir.with_name("whole")
    while fired < kills:
        shutil.rmtree(command.run_dir, ignore_errors=True)
        for _ in range(2):
            moment = next(moments)
            run = command.start()
            wait_for(moment, run, command.run_dir, chance)
            was_alive = strike(victim, run)
            if moment in ("start-up", "any time"):
                # Ranks that have not met know nothing of each other; their launcher does.
                run.ask_to_stop()
            ended_s = run.wait_until_gone(GONE_WITHIN_S if was_alive else 60)
            # A worker that had delivered its last batch is missed by nobody, nor is a rank that was done.
            if was_alive and any(run.codes()):
                slowest_s = max(slowest_s, ended_s)
                fired += 1
            require_whole(command.run_dir)
        command.finish()
        assert_same_run(whole, command.run_dir)
        runs += 1
    return fired, runs, slowest_s


def prepared(whole: Command, folder: Path) -> Command:
    """The command in a folder of its own, with the unbroken run beside."""
    shutil.copy(whole.config, folder / "config.yaml")
    shutil.copytree(whole.run_dir, folder / "whole", symlinks=True)
    return Command(folder / "config.yaml", folder / "run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.fault(
    what="SIGKILL at twenty moments",
    how="of a rank, a worker, all ranks, the group of `accelerate launch`: at start-up, in a step, while a checkpoint or a row is written, in evaluation, "
    "in W&B's finish, at any time",
    holds="all gone within 15 s, every file whole; killed twice and resumed twice, history and weights equal the unbroken run's bit for bit",
)
def test_killed_at_twenty_moments(whole: Command, tmp_path: Path, fired: Fired, victim: Victim) -> None:
    """Two kills a run, each at a kind of moment in turn; the moments are drawn with a seed."""
    command = replace(prepared(whole, tmp_path), is_launched=victim == "the launcher's group")
    kills, runs, slowest_s = kill_and_resume(command, victim, kills=KILLS_A_VICTIM, seed=VICTIMS.index(victim))
    fired(f"{kills} kills, {runs} of {runs} runs equal, slowest end {slowest_s:.1f} s ({victim})")


@pytest.mark.fault(
    what="SIGKILL, twice",
    how="of rank 1, while a checkpoint is written and in a step",
    holds="all gone within 15 s; history and weights equal the unbroken run's bit for bit",
)
def test_killed_twice(whole: Command, tmp_path: Path, fired: Fired) -> None:
    """A quick one of the twenty."""
    command, chance, slowest_s = prepared(whole, tmp_path), random.Random(0), 0.0
    for moment in ("writing a checkpoint", "a step"):
        run = command.start()
        wait_for(moment, run, command.run_dir, chance)
        assert strike("rank 1", run)
        slowest_s = max(slowest_s, run.wait_until_gone(GONE_WITHIN_S))
        assert run.codes()[1] == -signal.SIGKILL
        require_whole(command.run_dir)
    command.finish()
    assert_same_run(tmp_path / "whole", command.run_dir)
    fired(f"2 kills, slowest end {slowest_s:.1f} s")


@dataclass(frozen=True)
class Mutant:
    """A line of the package, and what stands in its place."""

    path: str
    line: str
    instead: str


MUTANTS = {
    "generators not restored": Mutant(
        "step.py", 'seed_device(job.world.device, derive(job.seed, "slot", step, slot))', "pass"
    ),
    "totals not restored": Mutant("compose.py", "running.totals.merge(checkpoint.totals())", "pass"),
    "optimizer not restored": Mutant(
        "compose.py", "unpack_optimizer(world.unwrap(model), optimizer.optimizer, checkpoint)", "pass"
    ),
    "history not cut back": Mutant("rewind.py", "history.cut_after(recorded_step)", "0"),
    "one step too many": Mutant("ground.py", "self.checkpoint.position.step", "self.checkpoint.position.step + 1"),
}


def use_package(folder: Path, rank: int) -> None:
    """Have this rank import the package from a folder, as if it had never seen another."""
    for name in [name for name in sys.modules if name.split(".")[0] == "aplantida_dist"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    aplantida_dist.__path__[:] = []


def mutated(mutant: Mutant, folder: Path) -> Path:
    """A copy of the package with one line changed; returns the folder to import it from."""
    package = folder / "mutant" / "aplantida_dist"
    shutil.copytree(Path(aplantida_dist.__file__).parent, package)
    text = (package / mutant.path).read_text()
    assert text.count(mutant.line) == 1, f"{mutant.path} has no single {mutant.line!r} any more"
    (package / mutant.path).write_text(text.replace(mutant.line, mutant.instead))
    return package.parent


def survives(command: Command) -> bool:
    """Whether a package passes: stopped twice, once in mid-epoch and once at a row beyond its checkpoint, and resumed."""
    try:
        command.finish()
        whole = command.run_dir.with_name("whole")
        command.run_dir.rename(whole)
        shutil.copytree(whole, command.run_dir, symlinks=True)
        for stop in (7, 13):
            for folder in command.run_dir.glob("checkpoints/step_*"):
                if int(folder.name.removeprefix("step_")) > stop:
                    shutil.rmtree(folder)
            command.finish()
            assert_same_run(whole, command.run_dir)
    except AssertionError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *MUTANTS])
@pytest.mark.fault(
    what="a mutant",
    how="one line of a copy of the package left out or changed",
    holds="the comparison of a resumed run with the unbroken one fails; of the package as it is, it does not",
)
def test_mutants_are_caught(dataset_dir: Path, tmp_path: Path, fired: Fired, name: str | None) -> None:
    """What the kill tests compare can fail."""
    nothing = Mutant("compose.py", "running.totals.merge(", "running.totals.merge(")
    package = mutated(nothing if name is None else MUTANTS[name], tmp_path)
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=EPOCHS, every_steps=1)
    config.write_text(config.read_text().replace("every_steps: 1", "every_steps: 1\n  keep_last: 100"))
    command = Command(config, tmp_path / "run", world_size=1, before=partial(use_package, package))
    assert survives(command) == (name is None)
    fired("passes, as it should" if name is None else f"{name}: caught")


@pytest.mark.slow
@pytest.mark.fault(
    what="a mutant",
    how="checkpoints written under their own name, without the rename; killed as soon as one is seen",
    holds="a checkpoint that is not whole is found after the kill",
)
def test_a_missing_rename_is_caught(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """What looks for half a checkpoint can find one."""
    beside = 'beside = checkpoints_dir / f".{path.name}.{os.getpid()}.part"'
    package = mutated(Mutant("checkpoint.py", beside, "beside = path"), tmp_path)
    text = (package / "aplantida_dist" / "checkpoint.py").read_text()
    rename = re.compile(r"        if path\.exists\(\):.*?os\.replace\(beside, path\)\n", re.DOTALL)
    assert len(rename.findall(text)) == 1
    (package / "aplantida_dist" / "checkpoint.py").write_text(rename.sub("", text))
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=EPOCHS, every_steps=1)
    command = Command(config, tmp_path / "run", world_size=1, before=partial(use_package, package))
    for _ in range(5):
        shutil.rmtree(command.run_dir, ignore_errors=True)
        run = command.start()
        while run.is_alive() and not any(command.run_dir.glob("checkpoints/step_*")):
            time.sleep(0.0005)
        assert strike("rank 0", run)
        run.wait_until_gone(GONE_WITHIN_S)
        try:
            require_whole(command.run_dir)
        except aplantida_dist.errors.UserError:
            fired("caught: half a checkpoint found")
            return
    pytest.fail("the rename was left out and nobody noticed")
