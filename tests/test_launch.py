"""What launch/ promises: files that accelerate reads, scripts that a POSIX shell reads, and as many ranks as they say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from aplantida_dist.signals import STOPPED_CODE

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"

PROBE = """\
import json, os, sys
from pathlib import Path
import torch
from accelerate import Accelerator
accelerator = Accelerator()
seen = {"world_size": os.environ.get("WORLD_SIZE", "1"), "num_processes": accelerator.num_processes, "arguments": sys.argv[1:]}
seen |= {"precision": accelerator.mixed_precision, "sum": int(accelerator.reduce(torch.tensor(accelerator.process_index + 1)))}
seen |= {"backend": torch.distributed.get_backend() if accelerator.num_processes > 1 else None}
Path(os.environ["PROBE_DIR"], f"{accelerator.process_index}.json").write_text(json.dumps(seen))
accelerator.end_training()
"""

SRUN = """\
#!/bin/sh
# Slurm's srun, on one machine: the command once for each node, at the same time.
shift
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This process's environment with the probe in place of the trainer."""
    (folder / "probe_of_ranks.py").write_text(PROBE)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_", "SLURM_"))
    }
    return kept | {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "MODULE": "probe_of_ranks",
        "PROBE_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def launch(script: str, folder: Path, **more: str) -> list[dict[str, object]]:
    """Run a script of launch/ from the root, check that every rank got its arguments, and return what else each saw."""
    arguments = ["--config", "configs/demo.yaml", "train.epochs=2", "report.name='two words'"]
    command = ["sh", f"launch/{script}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(folder, **more), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert [rank["arguments"] for rank in ranks] == [arguments] * len(ranks)
    return [{name: seen for name, seen in rank.items() if name != "arguments"} for rank in ranks]


def add_command(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(path: Path) -> None:
    """accelerate's own loader knows every key; precision is left to the config; each file has its script."""
    loaded = load_config_from_file(str(path))
    assert isinstance(loaded, ClusterConfig)
    assert loaded.mixed_precision == "no"
    assert loaded.num_processes % loaded.num_machines == 0
    assert f'"$here/{path.name}"' in path.with_suffix(".sh").read_text()


@pytest.mark.parametrize("path", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name)
def test_a_shell_reads_each_script(path: Path) -> None:
    """Each script is POSIX sh, and the page on launching tells of it."""
    done = subprocess.run(["sh", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text().startswith("#!/bin/sh\n# ")


def test_the_page_shows_every_file() -> None:
    """launch/README.md names each configuration and a command for each script that launches ranks."""
    page = (LAUNCH / "README.md").read_text()
    for path in [*LAUNCH.glob("*.yaml"), *(path for path in LAUNCH.glob("several_nodes.*") if path.suffix != ".yaml")]:
        assert path.name in page
        assert f"launch/{path.stem}.sh " in page


TWO_RANKS = {"world_size": "2", "num_processes": 2, "precision": "no", "sum": 3, "backend": "gloo"}


def test_two_ranks_on_cpu_are_one_world(tmp_path: Path) -> None:
    """The script starts two gloo ranks that see each other, and passes its arguments on unchanged."""
    assert launch("cpu_two_ranks.sh", tmp_path) == [TWO_RANKS, TWO_RANKS]


@pytest.mark.slow
def test_two_nodes_under_slurm_are_one_world(tmp_path: Path) -> None:
    """The batch script starts one launcher a node, whose ranks meet at the first node."""
    add_command(tmp_path, "srun", SRUN)
    add_command(tmp_path, "scontrol", "#!/bin/sh\necho 127.0.0.1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "NUM_GPUS": "1", "MAIN_PORT": port}
    ranks = launch("several_nodes.sbatch", tmp_path, ACCELERATE_USE_CPU="true", **slurm)
    assert ranks == [TWO_RANKS, TWO_RANKS]


def test_a_node_without_gpus_says_so(tmp_path: Path) -> None:
    """one_node.sh does not start zero processes."""
    env = environment(tmp_path, NUM_GPUS="0")
    done = subprocess.run(["sh", "launch/one_node.sh"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: no GPU here; use launch/cpu_two_ranks.sh\n")


STATUS = '{{\n  "phase": "{phase}",\n  "signal": "{signal}"\n}}\n'


@pytest.mark.parametrize(
    ("phase", "signal", "requeued"),
    [("stopped", "SIGUSR1", True), ("stopped", "SIGTERM", False), ("failed", "", False)],
)
def test_slurm_requeues_what_was_stopped_ahead_of_the_time_limit(
    tmp_path: Path, phase: str, signal: str, requeued: bool
) -> None:
    """The batch script reads status.json, since the launcher's code says nothing; a job that was cancelled stays so."""
    add_command(tmp_path, "srun", "#!/bin/sh\nexit 1\n")
    add_command(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\necho 127.0.0.1\n')
    run_dir = tmp_path / "two words"
    run_dir.mkdir()
    (run_dir / "status.json").write_text(STATUS.format(phase=phase, signal=signal))
    env = environment(tmp_path, SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="17")
    command = ["sh", "launch/several_nodes.sbatch", "--config", "configs/demo.yaml", "--run-dir", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert ("requeue 17" in (tmp_path / "asked").read_text()) == requeued, done.stderr


def test_was_stopped_finds_the_run_as_the_trainer_does(tmp_path: Path) -> None:
    """With --run-dir in either form, and without it by the config's name; a run that never began was not stopped."""
    run_dir = tmp_path / "runs" / "demo"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text(STATUS.format(phase="stopped", signal="SIGTERM"))
    script = ["sh", str(LAUNCH / "was_stopped.sh")]
    for arguments in (["--run-dir", "runs/demo"], ["--run-dir=runs/demo"], ["--config", "x/demo.yaml", "a.b=c"]):
        done = subprocess.run([*script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "SIGTERM\n", "")
    done = subprocess.run(
        [*script, "--config", "other.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_the_pod_outlives_its_ranks() -> None:
    """The manifest names a script that exists and the code that it ends with, and gives more time than the launcher does."""
    job = yaml.safe_load((LAUNCH / "kubernetes" / "job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    script = (ROOT / pod["containers"][0]["command"][1]).read_text()
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED_CODE]}}
    assert f"exit {STOPPED_CODE}" in script
    assert int(script.partition("PET_SHUTDOWN_TIMEOUT=")[2].split()[0]) < pod["terminationGracePeriodSeconds"]
