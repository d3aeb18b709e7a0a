"""The proof's table: means, spreads and differences are those of the evaluations, and seeds are never mixed up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

from aplantida_dist.config import changes, flat
from aplantida_dist.config_file import load_config
from bench.proof import ProofError, read_results, to_markdown

ROOT = Path(__file__).parents[1]
MACRO = {"plain": {0: 0.50, 1: 0.55, 2: 0.48}, "balanced": {0: 0.61, 1: 0.64, 2: 0.60}}


def write(folder: Path, scores: dict[str, dict[int, float]] = MACRO) -> Path:
    folder.mkdir(exist_ok=True)
    for recipe, by_seed in scores.items():
        for seed, score in by_seed.items():
            block = {"loss": 1.0, "top1": 0.5, "macro_top1": score, "num_samples": 9}
            (folder / f"{recipe}.seed_{seed}.json").write_text(json.dumps({"test": block}))
    return folder


def test_the_table_is_that_of_the_evaluations(tmp_path: Path) -> None:
    """Mean ± standard deviation over seeds, in percent, the baseline first; differences pair each seed with its own."""
    table = to_markdown(read_results(write(tmp_path)), against="plain", metrics=["macro_top1"])
    head, rule, baseline, other = table.splitlines()
    assert head == "| seeds 0, 1, 2 | macro_top1 | difference |"
    assert rule == "|---|--:|--:|"
    plain, balanced = (list(MACRO[name].values()) for name in ("plain", "balanced"))
    differences = [100 * (ours - theirs) for ours, theirs in zip(balanced, plain, strict=True)]
    assert baseline == f"| plain | {100 * mean(plain):.1f} ± {100 * stdev(plain):.1f} |  |"
    assert other == (
        f"| balanced | {100 * mean(balanced):.1f} ± {100 * stdev(balanced):.1f} | "
        f"+{mean(differences):.1f} ± {stdev(differences):.1f} |"
    )


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    """It is not zero, it is unknown."""
    scores = {"plain": {4: 0.5}, "balanced": {4: 0.4}}
    table = to_markdown(read_results(write(tmp_path, scores)), against="plain", metrics=["macro_top1"])
    assert table.splitlines()[2:] == ["| plain | 50.0 |  |", "| balanced | 40.0 | -10.0 |"]


@pytest.mark.parametrize("order", ["read", "reversed"])
def test_seeds_are_paired_by_number(tmp_path: Path, order: str) -> None:
    """Whatever the order of the files: seed 10 stands behind seed 9, for both sides of a difference."""
    scores = {"plain": {9: 0.1, 10: 0.9}, "balanced": {9: 0.2, 10: 1.0}}
    results = read_results(write(tmp_path, scores))
    table = to_markdown(results if order == "read" else results[::-1], against="plain", metrics=["macro_top1"])
    assert table.splitlines()[-1].endswith("| +10.0 ± 0.0 |")


def test_what_makes_no_table_is_an_error(tmp_path: Path) -> None:
    """Other seeds, an unknown recipe or metric, a file that is no evaluation, an empty folder."""
    with pytest.raises(ProofError, match="holds no results"):
        read_results(tmp_path)
    results = read_results(write(tmp_path))
    with pytest.raises(ProofError, match="no such recipe; there are balanced, plain"):
        to_markdown(results, against="other", metrics=["macro_top1"])
    with pytest.raises(ProofError, match="balanced, seed 0: holds no 'few_top1'; choose among loss, top1, macro_top1"):
        to_markdown(results, against="balanced", metrics=["few_top1"])
    (tmp_path / "plain.seed_2.json").unlink()
    with pytest.raises(ProofError, match=r"plain has the seeds \[0, 1\], balanced \[0, 1, 2\]"):
        read_results(tmp_path)
    (tmp_path / "plain.seed_2.json").write_text("[]")
    with pytest.raises(ProofError, match="expected the metrics of one split"):
        read_results(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(ProofError, match="is not named"):
        read_results(tmp_path)


def test_the_command_prints_it_or_says_what_is_wrong(tmp_path: Path) -> None:
    """Exit code 2 and one line for a folder without results."""

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bench.proof", folder, "--against", "plain", "--metrics", "macro_top1"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    good, bad = run(write(tmp_path / "a")), run(tmp_path / "b")
    assert (good.returncode, good.stdout.count("\n")) == (0, 4), good.stderr
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)


def test_the_recipes_of_the_long_tail_differ_in_the_long_tail_alone() -> None:
    """Everything but loss and sampling is the baseline's, so that a row shows its recipe and nothing else."""
    folder = ROOT / "configs" / "proof" / "long_tail"
    baseline = flat(load_config(folder / "cross_entropy.yaml").to_dict())
    recipes = sorted(folder.glob("*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        changed = {change.name for change in changes(baseline, flat(load_config(path).to_dict()))}
        assert changed <= {"loss.logit_adjustment", "data.sampling_exponent"}, path
        assert bool(changed) == (path.stem != "cross_entropy")


PROBE = """\
#!/bin/sh
# In place of python: notes what it was called with, and leaves the file that --json names.
echo "$@" >> calls
while [ $# -gt 0 ]; do
    if [ "$1" = --json ]; then echo '{"test": {"top1": 0.5, "macro_top1": 0.5}}' > "$2"; fi
    if [ "$1" = --run-dir ]; then mkdir -p "$2"; fi
    shift
done
"""


def calls_of(folder: Path, *arguments: str) -> list[list[str]]:
    """What the harness runs, in order, in a folder with nothing but the configs; `folder` keeps what it left."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "python").write_text(PROBE)
    (folder / "bin" / "python").chmod(0o755)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "calls").write_text("")
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "LAUNCH": "python -m aplantida_dist.train",
        "SEEDS": "3 4",
    }
    said = subprocess.run(
        ["sh", ROOT / "launch" / "proof.sh", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def test_the_chain_trains_and_evaluates_each_on_its_own_dataset(tmp_path: Path) -> None:
    """For every seed alike: students see the whole, the global teacher is measured on the region it never trained on alone."""
    calls = calls_of(tmp_path, "chain", "mine", "shards/mine", "shards/mine_region", "train.epochs=2")
    trained, evaluated = (
        [call for call in calls if call[:2] == ["-m", f"aplantida_dist.{name}"]] for name in ("train", "evaluate")
    )
    for seed in ("3", "4"):
        runs = {name: f"runs/proof/mine/{name}.seed_{seed}" for name in ("teacher_global", "teacher_regional")}
        mine = {call[5].split("/")[-1].split(".")[0]: call for call in trained if f"seed={seed}" in call}
        datasets = {name: next(word for word in call if word.startswith("data.dataset")) for name, call in mine.items()}
        assert datasets.pop("teacher_regional") == "data.dataset=shards/mine_region"
        assert datasets == dict.fromkeys(
            ("teacher_global", "student_distilled", "student_labels"), "data.dataset=shards/mine"
        )
        assert f"model.init_from={runs['teacher_global']}" in mine["teacher_regional"]
        assert (
            f"distillation.teachers=[{runs['teacher_global']},{runs['teacher_regional']}]" in mine["student_distilled"]
        )
        assert all("train.epochs=2" in call for call in mine.values())
        only_taught = [word for word in mine["student_distilled"] if word not in mine["student_labels"]]
        assert len(only_taught) == 2, "the run folder and the teachers"
        for call in (call for call in evaluated if f"seed_{seed}.json" in " ".join(call)):
            folder = call[call.index("--json") + 1].split("/")[-2]
            on_region = folder.endswith("_on_region")
            assert call[call.index("--data") + 1] == ("shards/mine_region" if on_region else "shards/mine")
            assert ("--other-classes" in call) == (on_region and runs["teacher_regional"] not in call)
    assert len(trained) == 8
    assert len(evaluated) == 16


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    """The same command again prints the tables; an evaluation that is lost is the only one that is repeated."""
    (tmp_path / "shards" / "proof_tail").mkdir(parents=True)
    first = calls_of(tmp_path, "long_tail")
    results = tmp_path / "runs" / "proof" / "long_tail" / "test"
    assert {path.name.split(".")[0] for path in results.iterdir()} == {
        "cross_entropy_post_hoc",
        *(path.stem for path in (ROOT / "configs" / "proof" / "long_tail").glob("*.yaml")),
    }
    (results / "cross_entropy.seed_4.json").unlink()
    again = calls_of(tmp_path, "long_tail")
    assert [call for call in first if call in again] == again
    assert [call[1] for call in again] == ["aplantida_dist.evaluate", "bench.proof"]


@pytest.mark.parametrize("arguments", [[], ["other"], ["chain", "name"], ["chain", "name", "dataset"]])
def test_the_harness_says_how_it_is_called(arguments: list[str]) -> None:
    """Before it draws or trains anything."""
    said = subprocess.run(["sh", "launch/proof.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert said.stderr.startswith("error: ")
