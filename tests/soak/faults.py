"""The faults: what may happen to a run, when, and the marker by which each is known to have happened."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, get_args

from aplantida_dist.seeds import derive
from tests.disks import remount
from tests.soak.launcher import GRACE_S
from tests.soak.supervisor import Supervisor
from tests.wandb_beside import WandbBeside
from tests.wandb_server import Fault

Kind = Literal[
    "kill rank 0", "kill rank 1", "kill a worker", "kill the launcher's group", "SIGTERM to the launcher",
    "SIGUSR1 to all", "flip a bit", "truncate a file", "delete a file", "fill the disk", "unplug W&B",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
AT_START: tuple[Kind, ...] = ("kill rank 0", "kill rank 1", "kill the launcher's group")
"""These may come before the first step, too: a stop would end a process that does not listen yet, and leave no status."""
START_SHARE = 0.3
MARKER_WITHIN_S = 60.0
DISK_SIZE = "size=4G"
ROOM_BYTES = 200_000
"""Less than a checkpoint, more than a row."""
PAGE_BYTES = 4096
UNPLUGGED: tuple[Fault, ...] = ("reset", "500", "hang")


@dataclass(frozen=True)
class Planned:
    """A fault to come: as soon as the run stands at a step, or so many seconds after a start, and a moment more."""

    kind: Kind
    at_step: int
    after_start_s: float | None
    more_s: float


@dataclass(frozen=True)
class Scene:
    """What faults act on. `is_mounted`: the run lies on a disk of its own, which can be made too small."""

    supervisor: Supervisor
    wandb: WandbBeside
    disk: Path
    is_mounted: bool
    random: Random


def plan_faults(seed: int, *, number: int, total_steps: int, start_s: float) -> list[Planned]:
    """Faults at random moments, the kinds in turn from a deck that is shuffled anew each time it is used up."""
    random = Random(derive(seed, "faults"))
    steps = sorted(random.randrange(total_steps) for _ in range(number))
    planned = []
    for kind, step in zip(_deal(random, number), steps, strict=True):
        is_early = kind in AT_START and random.random() < START_SHARE
        planned.append(Planned(kind, step, random.uniform(0, start_s) if is_early else None, random.uniform(0, 0.5)))
    return planned


def _deal(random: Random, number: int) -> Iterator[Kind]:
    for _ in range(math.ceil(number / len(KINDS))):
        deck = list(KINDS)
        random.shuffle(deck)
        yield from deck[:number]
        number -= len(deck)


def fire(kind: Kind, scene: Scene) -> str | None:
    """Do it, and wait for what must follow; the marker, None where the run ended before it could be hit."""
    supervisor = scene.supervisor
    match kind:
        case "kill rank 0":
            return _kill_rank(0, scene)
        case "kill rank 1":
            return _kill_rank(1, scene)
        case "kill a worker":
            return _kill_worker(scene)
        case "kill the launcher's group":
            return _kill_group(supervisor)
        case "SIGTERM to the launcher":
            return _stop(signal.SIGTERM, [supervisor.pid], supervisor)
        case "SIGUSR1 to all":
            return _stop(signal.SIGUSR1, [supervisor.pid, *supervisor.tree().everyone], supervisor)
        case "flip a bit" | "truncate a file" | "delete a file":
            return _damage(kind, scene)
        case "fill the disk":
            return _fill_disk(scene)
        case "unplug W&B":
            return _unplug(scene)


def _kill_rank(rank: int, scene: Scene) -> str | None:
    supervisor = scene.supervisor
    supervisor.wait_until(
        lambda: len(supervisor.tree().ranks) > rank or not supervisor.is_running, limit_s=MARKER_WITHIN_S
    )
    ranks = supervisor.tree().ranks
    if len(ranks) <= rank:
        return None
    return _send(signal.SIGKILL, ranks[rank], rf"Signal 9 .*PID {ranks[rank]}\b", supervisor)


def _kill_worker(scene: Scene) -> str | None:
    supervisor = scene.supervisor
    workers = [pids[0] for pids in supervisor.tree().workers if pids]
    if not workers:
        return None
    pid = scene.random.choice(workers)
    return _send(signal.SIGKILL, pid, rf"DataLoader worker \(pid(?:\(s\))? {pid}\)[^\n]*", supervisor)


def _send(number: signal.Signals, pid: int, marker: str, supervisor: Supervisor) -> str | None:
    os.kill(pid, number)
    supervisor.wait_for_the_end()
    found = re.search(marker, supervisor.said())
    return found and found[0]


def _kill_group(supervisor: Supervisor) -> str | None:
    os.killpg(supervisor.pid, signal.SIGKILL)
    supervisor.wait_for_the_end()
    return "the launcher's code is -9" if supervisor.exit_code == -signal.SIGKILL else None


def _stop(number: signal.Signals, pids: list[int], supervisor: Supervisor) -> str | None:
    for pid in pids:
        os.kill(pid, number)
    supervisor.wait_for_the_end(limit_s=2 * GRACE_S)
    status = supervisor.status()
    if (status.get("phase"), status.get("signal")) != ("stopped", number.name):
        return None
    return f"status.json: stopped by {number.name}, checkpoint of step {status['checkpoint_step']}"


def _damage(kind: Literal["flip a bit", "truncate a file", "delete a file"], scene: Scene) -> str | None:
    """Between two attempts; the next one says that it falls back."""
    supervisor, random = scene.supervisor, scene.random
    _kill_group(supervisor)
    checkpoint = max(supervisor.run_dir.glob("checkpoints/step_*"))
    path = random.choice(sorted(checkpoint.iterdir()))
    content = bytearray(path.read_bytes())
    if kind == "delete a file":
        path.unlink()
    elif kind == "truncate a file":
        path.write_bytes(content[: random.randrange(len(content) - 1)])
    else:
        content[random.randrange(len(content) - 1)] ^= 1 << random.randrange(8)
        path.write_bytes(content)
    supervisor.start()
    marker = f"{checkpoint.name}[^\\n]*falling back to the checkpoint before it"
    if not supervisor.wait_until(lambda: re.search(marker, supervisor.said()) is not None, limit_s=MARKER_WITHIN_S):
        return None
    return f"{checkpoint.name}/{path.name}: falling back to the checkpoint before it"


def _fill_disk(scene: Scene) -> str | None:
    """Leave less room than the next checkpoint takes; where nothing can be mounted, forbid rank 0 files of its size."""
    supervisor = scene.supervisor
    if scene.is_mounted:
        used = shutil.disk_usage(scene.disk).used
        remount(scene.disk, f"size={-(-(used + ROOM_BYTES) // PAGE_BYTES) * PAGE_BYTES}")
    else:
        resource.prlimit(supervisor.tree().ranks[0], resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))
    has_ended = supervisor.wait_until(lambda: not supervisor.is_running, limit_s=MARKER_WITHIN_S)
    if has_ended:
        supervisor.wait_for_the_end()
    if scene.is_mounted:
        remount(scene.disk, DISK_SIZE)
    found = re.search(r"No space left on device[^;\n]*|File too large[^;\n]*", supervisor.said())
    return found[0] if found and has_ended else None


def _unplug(scene: Scene) -> str | None:
    """The run does not end of it."""
    before, fault = scene.wandb.num_failed(), scene.random.choice(UNPLUGGED)
    scene.wandb.fail(fault)
    scene.supervisor.wait_until(
        lambda: scene.wandb.num_failed() > before or not scene.supervisor.is_running, limit_s=MARKER_WITHIN_S
    )
    scene.supervisor.wait_until(lambda: False, limit_s=scene.random.uniform(0, 3))
    scene.wandb.fail("none")
    failed = scene.wandb.num_failed() - before
    return f"{failed} requests failed ({fault})" if failed else None


def wandb_run_id(run_dir: Path) -> str:
    """The W&B run of a run's newest checkpoint."""
    position = json.loads((max(run_dir.glob("checkpoints/step_*")) / "position.json").read_text())
    return str(position["wandb_run_id"])
