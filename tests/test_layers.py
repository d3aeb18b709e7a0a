"""The walls of the house: no cycles, and each heavy library is imported where it is owned."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aplantida_dist"

LAYERS = [
    [
        "errors",
        "seeds",
        "signals",
        "schedule",
        "loss",
        "progress",
        "pace",
        "web_page",
        "credentials",
        "terminal",
        "data.frequency",
        "data.augment_ops",
        "data.shard_columns",
        "beat",
        "board",
        "processes",
        "device_clock",
        "data.work",
    ],
    ["watchdog", "verdict", "data.worker"],
    [
        "data.address",
        "files",
        "lock",
        "command",
        "world",
        "spreading",
        "yaml_words",
        "data.decode",
        "data.augment",
        "data.sampling",
        "objective",
    ],
    ["strict_yaml", "config_sections", "interruption", "seal", "data.cache", "data.pixels"],
    [
        "config",
        "history",
        "status",
        "resumes",
        "lineage",
        "data.bad_sample",
        "data.classmap",
        "data.index",
        "data.manifest",
        "data.plan",
        "data.images",
    ],
    [
        "config_faults",
        "data.batch",
        "data.dataset",
        "distillation",
        "mixing",
        "model",
        "optimizer",
        "execution",
        "ema",
        "wandb_report",
        "metrics",
        "bad_samples",
        "checkpoint",
        "long_tail",
        "other_classes",
    ],
    ["state", "report", "data.ahead", "data.hand_over"],
    ["config_file", "freezing", "data.stream", "run_folder", "record", "soft_label_file", "stopping"],
    ["debug", "ancestor", "nonfinite", "rewind", "voiding", "soft_label_parts", "soft_targets"],
    ["init_from", "teachers"],
    ["origin", "soft_objective"],
    ["evaluation", "recipe", "soft_labelling"],
    ["job"],
    ["step", "epoch"],
    ["trainer", "ground", "replay"],
    ["compose"],
    ["batch_size"],
    ["train", "evaluate", "soft_labels"],
]
"""From the ground up. A module imports only from layers below its own; leaves do not know each other."""

SIDE_HOUSES = ("analysis", "herbarium", "shards")
"""Whole packages beside the trainer: nothing in the layers imports them, and they import what things are, no more."""

OWNERS = {
    "accelerate": {"world"},
    "fsspec": {"data.address"},
    "aiohttp": {"data.address"},
    "wandb": {"wandb_report"},
    "timm": {"model", "optimizer", "execution", "ema"},
    "matplotlib": {"analysis.plots"},
    "braceexpand": {"shards.tar_urls"},
    "imagehash": {"shards.looks"},
    "httpx2": {"shards.download.web"},
    "tqdm": {"progress"},
    "yaml": {"strict_yaml"},
    "safetensors": {"checkpoint"},
    "simplejpeg": {"data.pixels"},
    "webdataset": set(),
    "torchvision": set(),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def own_imports(path: Path) -> set[str]:
    return {name.removeprefix("aplantida_dist.") for name in imports_of(path) if name.startswith("aplantida_dist.")}


def test_nothing_imports_its_own_layer_or_a_higher_one() -> None:
    """Data flows one way, and the picture has no arrow that runs back up."""
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    for name, level in height.items():
        for other in own_imports(modules()[name]):
            assert other in height, f"{name} imports {other}, which stands in no layer"
            assert height[other] < level, f"{name} (layer {level}) imports {other} (layer {height[other]})"


def test_every_module_has_its_place() -> None:
    """A new file is put into a layer, or into a house beside."""
    placed = {name for names in LAYERS for name in names} | {"", "data", "analyze"}
    for name in modules():
        assert name in placed or name.split(".")[0] in SIDE_HOUSES, f"{name} stands in no layer"


@pytest.mark.parametrize("house", SIDE_HOUSES)
def test_the_houses_beside_know_only_the_ground_floors(house: str) -> None:
    """Building, drawing and analysing need no trainer, and no torch."""
    ground = {name for names in LAYERS[:5] for name in names} - {
        "world",
        "watchdog",
        "device_clock",
        "beat",
        "board",
        "loss",
        "objective",
    } | {
        "config_file",
        "data.dataset",
    }
    for name, path in modules().items():
        if name.split(".")[0] == house:
            for other in own_imports(path):
                assert other.split(".")[0] == house or other in ground, f"{name} imports {other}"


def test_there_are_no_import_cycles() -> None:
    """In the whole package."""
    graph = {name: own_imports(path) & modules().keys() for name, path in modules().items()}
    while graph:
        free = [name for name, others in graph.items() if not others & graph.keys()]
        assert free, f"these import each other: {sorted(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("library", OWNERS)
def test_heavy_libraries_are_imported_by_their_owners_alone(library: str) -> None:
    """One file to read when a library changes."""
    importers = {
        name for name, path in modules().items() if library in {other.split(".")[0] for other in imports_of(path)}
    }
    assert importers == OWNERS[library]


def test_the_pure_parts_need_no_torch() -> None:
    """Planning, building, drawing and analysing start fast, on machines without it."""
    pure = [
        "data.plan",
        "config_file",
        "history",
        "shards.builder",
        "shards.verify",
        "herbarium.collection",
        "analysis.report",
    ]
    code = (
        "import sys\n"
        + "".join(f"import aplantida_dist.{name}\n" for name in pure)
        + "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
