"""A parent that is gone before its child has asked to end with it: the child ends all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Fired
from tests.runs import write_config
from tests.soak.processes import below, living

TELLS = "import os, sys, time, aplantida_dist; print(os.getpid(), flush=True); "
ASKS = "time.sleep(1); from aplantida_dist.signals import end_with_the_parent; end_with_the_parent(); time.sleep(60)"
STARTS = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {TELLS + ASKS!r}]); sys.stdin.read()"
FORKS = f"{TELLS}\nif os.fork() == 0: print(os.getpid(), flush=True); {ASKS}\nsys.stdin.read()"
WITHIN_S = 60.0
"""Until they have loaded torch, on a busy machine, and ask; they hold nothing meanwhile."""


def wait_for_the_end_of(pids: list[int], *, limit_s: float) -> float:
    """The seconds until none of them lives."""
    started_s = time.monotonic()
    while alive := [pid for pid in pids if pid in living()]:
        if time.monotonic() - started_s > limit_s:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(alive)} of {len(pids)} live on after {limit_s:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - started_s


@pytest.mark.parametrize(("parent", "num_lines"), [(STARTS, 1), (FORKS, 2)], ids=["started", "forked"])
def test_a_child_that_has_lost_its_parent_ends(parent: str, num_lines: int) -> None:
    """The parent has ended by the time that the child asks; the kernel tells nobody of a death that is past."""
    command, pipe = [sys.executable, "-c", parent], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(num_lines)]
        process.stdin.close()
        assert process.wait() == 0
        wait_for_the_end_of(pids, limit_s=5.0)


@pytest.mark.parametrize("how", ["started", "forked"])
def test_a_child_whose_parent_lives_goes_on(how: str) -> None:
    """Whether it was started anew or forked."""
    ends = "from aplantida_dist.signals import end_with_the_parent; end_with_the_parent()"
    code = f"import os, aplantida_dist\nif os.fork() == 0: {ends}; os._exit(7)\nsys_code = os.wait()[1] >> 8\nos._exit(sys_code)"
    code = f"{ends}; import os; os._exit(7)" if how == "started" else code
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7


@pytest.mark.slow
@pytest.mark.fault(
    what="SIGKILL of the launcher's group while its ranks still load torch",
    how="torchrun over two ranks, killed a tenth of a second to two seconds after it started them",
    holds="both ranks end once they have loaded, before they meet; they waited for a launcher that was gone",
)
@pytest.mark.parametrize("after_s", [0.1, 0.5, 2.0])
def test_ranks_that_were_starting_end(after_s: float, dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["-m", "aplantida_dist.train", "--config", str(config), "--run-dir", str(tmp_path / "run")]
    with (tmp_path / "output").open("wb") as output:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        launcher = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    deadline_s = time.monotonic() + 60
    while len(ranks := [process.pid for process in below(launcher.pid, living())]) < 2:
        assert time.monotonic() < deadline_s, (tmp_path / "output").read_text()
        time.sleep(0.01)
    time.sleep(after_s)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    fired(f"gone after {wait_for_the_end_of(ranks, limit_s=WITHIN_S):.1f} s")
