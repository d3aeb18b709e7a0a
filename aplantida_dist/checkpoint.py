"""Checkpoints: a run's weights, optimizer and position in one folder that is complete or absent, and checked by digest."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aplantida_dist.errors import UserError
from aplantida_dist.files import (
    canonical_json,
    free_bytes,
    read_json,
    require_room,
    sha256_of_file,
    sync_folder,
    write_json,
)
from aplantida_dist.lineage import Lineage, lineage_from, require_lineage_facts
from aplantida_dist.seal import has_seal, sealed, unsealed
from aplantida_dist.spreading import laid_out_like

FORMAT = 3
READABLE_FORMATS = (1, 2, 3)
"""Format 1 had no lineage; 1 and 2 had no seal on position.json and knew nothing of the history."""
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
"""The EMA under the same names as the model; only where the run keeps one."""
OPTIMIZER_FILE = "optimizer.safetensors"
TOTALS_FILE = "totals.safetensors"
SEEN_FILE = "seen.npy"
"""The identities of the lineage: int64 [n], little-endian, ascending, in numpy's own format; 8 bytes a photograph."""
POSITION_FILE = "position.json"
_NEEDED_FILES = frozenset((MODEL_FILE, OPTIMIZER_FILE, TOTALS_FILE))
_FOLDER_NAME = re.compile(r"step_[0-9]{8,}")
EXTRA_BYTES = 2**20
"""Room asked for beside the tensors: headers of the files, position.json, and the next row of the history."""

Weights = Literal["raw", "ema"]
"""Which of a checkpoint's two sets of weights: those that the optimizer moves, or their average."""


class CheckpointError(UserError):
    """A checkpoint is absent, incomplete, changed, or does not fit what it is loaded into."""


def _hold_groups_and_scalars(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `pack_optimizer` gives beside the tensors."""
    groups = facts.get("groups")
    if not isinstance(facts.get("scalars"), dict) or not isinstance(groups, list):
        raise ValueError("expected the groups and the scalars of an optimizer")
    if not all(isinstance(group, dict) for group in groups):
        raise ValueError("a parameter group is no object")
    return facts


@dataclass(frozen=True)
class Position:
    """Where a run stands and what it stands on: position.json. `step` counts completed updates; all else follows from it.

    From train_s on it tells of the running epoch so far: the main process's seconds in it, the nanoseconds that all ranks spent
    and of them waited for data, the steps that the fp16 scaler skipped, and those left out because they were not finite; of
    these also the number in the whole run, which train.nonfinite_budget bounds.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    step: int
    epoch: int
    world_size: int
    digests: Mapping[str, str]
    law_fields: Mapping[str, Any]
    free_fields: Mapping[str, Any] | None
    """The rest of the config; None in an early checkpoint, so that what has changed of it since is not known."""
    code_version: str
    wandb_run_id: str
    optimizer: Annotated[Mapping[str, Any], AfterValidator(_hold_groups_and_scalars)]
    scaler: Mapping[str, Any]
    train_s: float
    spent_ns: int
    waited_ns: int
    skipped_steps: int
    nonfinite_steps: int
    nonfinite_steps_of_run: int
    lineage: Annotated[Mapping[str, Any], AfterValidator(require_lineage_facts)] | None
    """`Lineage.facts`, whose identities lie beside in seen.npy; None in a checkpoint of format 1, which recorded none."""
    train_counts: Sequence[int] | None
    """The train samples of each class index, so that an evaluation elsewhere knows many from few; None in an early checkpoint."""
    history: Sequence[str] | None
    """The sha256 of each line of history.jsonl so far, which is how a line that was edited since is found; None before format 3."""


_POSITIONS = TypeAdapter(Position)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files have been checked against their digests."""

    path: Path
    position: Position
    has_ema: bool

    def model_state(self, weights: Weights = "raw") -> dict[str, Tensor]:
        """The weights under timm's names, on the CPU. CheckpointError where the EMA is asked for and there is none."""
        if weights == "ema" and not self.has_ema:
            raise CheckpointError(f"{self.path}: holds no EMA: its run had ema.decay null; take the raw weights")
        return dict(load_file(self.path / (EMA_FILE if weights == "ema" else MODEL_FILE)))

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, as `save_checkpoint` was given them."""
        return dict(load_file(self.path / OPTIMIZER_FILE))

    def totals(self) -> Tensor:
        """The running epoch's totals over all ranks, int64; zeros at the end of an epoch."""
        totals: Tensor = load_file(self.path / TOTALS_FILE)["totals"]
        return totals

    @property
    def digest(self) -> str:
        """The sha256 of position.json, which holds the digests of all the other files."""
        return sha256_of_file(self.path / POSITION_FILE)

    def lineage(self) -> Lineage:
        """What the weights were trained on; a checkpoint of format 1 cannot tell and is itself the unknown."""
        if self.position.lineage is None:
            nobody = np.zeros(0, dtype=np.int64)
            return Lineage(nobody, unknown=(f"{self.path} (written before lineage was recorded)",))
        identities = np.load(self.path / SEEN_FILE, allow_pickle=False).astype(np.int64)
        return lineage_from(identities, self.position.lineage)


def save_checkpoint(
    checkpoints_dir: Path,
    *,
    position: Position,
    model_state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor] | None,
    optimizer_state: Mapping[str, Tensor],
    totals: Tensor,
    lineage: Lineage,
) -> Path:
    """Write a checkpoint beside its place, sync it, and move it there. For the main process.

    Raises CheckpointError, before anything is written where the room does not suffice; what was there is as it was.
    """
    stored = {MODEL_FILE: model_state, OPTIMIZER_FILE: optimizer_state, TOTALS_FILE: {"totals": totals}}
    stored |= {} if ema_state is None else {EMA_FILE: ema_state}
    path = checkpoints_dir / f"step_{position.step:08d}"
    beside = checkpoints_dir / f".{path.name}.{os.getpid()}.part"
    num_bytes = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors.values())
    num_bytes += lineage.identities.nbytes + EXTRA_BYTES
    try:
        for leftover in checkpoints_dir.glob(".step_*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        require_room(checkpoints_dir, num_bytes)
        beside.mkdir(parents=True)
        for name, tensors in stored.items():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, beside / name)
            _sync_file(beside / name)
        np.save(beside / SEEN_FILE, lineage.identities.astype("<i8"), allow_pickle=False)
        _sync_file(beside / SEEN_FILE)
        files = {name: sha256_of_file(beside / name) for name in (*stored, SEEN_FILE)}
        write_json(beside / POSITION_FILE, sealed({"format": FORMAT, **asdict(position), "files": files}))
        sync_folder(beside)
        before = checkpoints_dir / f".{path.name}.{os.getpid()}.before.part"
        if path.exists():  # one that a stopped run left while it evaluated
            os.replace(path, before)
        os.replace(beside, path)
        sync_folder(checkpoints_dir)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path}: the checkpoint could not be written: {reason} ({num_bytes:,} bytes needed, {free_bytes(path):,} bytes free); "
            "the checkpoints before it are whole: make room, or make the folder writable, and run the same command again"
        ) from error
    return path


def point_to(checkpoints_dir: Path, pointer: str, checkpoint: Path, **facts: Any) -> None:
    """Make last.json or best.json name a checkpoint, with the digest of its position.json and what else is to be known."""
    content = {"checkpoint": checkpoint.name, "digest": sha256_of_file(checkpoint / POSITION_FILE), **facts}
    write_json(checkpoints_dir / f"{pointer}.json", content)


@dataclass(frozen=True)
class Pointer:
    """What last.json or best.json says: the checkpoint's folder, and the digest that its position.json had."""

    path: Path
    digest: str


def named_by(checkpoints_dir: Path, pointer: str) -> Pointer | None:
    """The checkpoint that last.json or best.json names; None where there is no such file."""
    path = checkpoints_dir / f"{pointer}.json"
    if not path.exists():
        return None
    content = read_json(
        path,
        what="pointer to a checkpoint",
        remedy=f"delete it, or name the checkpoint's folder instead of {pointer!r}",
    )
    match content:
        case {"checkpoint": str(name), "digest": str(digest)} if _FOLDER_NAME.fullmatch(name):
            return Pointer(checkpoints_dir / name, digest)
    raise CheckpointError(f"{path}: names no checkpoint with its digest; delete it, or name the checkpoint's folder")


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and check every file against its digest; CheckpointError names what is wrong."""
    fields, files = _read_position(path)
    for name, expected in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing; choose another checkpoint")
        if sha256_of_file(path / name) != expected:
            raise CheckpointError(
                f"{path}: {name} has changed since it was written (its sha256 differs); choose another checkpoint"
            )
    older = {
        "free_fields": None,
        "lineage": None,
        "nonfinite_steps": 0,
        "nonfinite_steps_of_run": 0,
        "train_counts": None,
        "history": None,
    }
    try:
        position = _POSITIONS.validate_json(canonical_json(older | fields), strict=True)
    except (ValidationError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{path}: {POSITION_FILE} is damaged: {reason}; choose another checkpoint") from None
    return Checkpoint(path, position, has_ema=EMA_FILE in files)


def _read_position(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of position.json and the digests of the other files, once format and seal are checked."""
    content = read_json(path / POSITION_FILE, what="checkpoint", remedy="choose a folder below checkpoints/")
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is not int or found not in READABLE_FORMATS:  # True is no format
        raise CheckpointError(
            f"{path}: format {found}, this program reads formats 1 to {FORMAT}; use the version that wrote it"
        )
    if found >= 3 or has_seal(content):
        rest = unsealed(content)
        if rest is None:
            raise CheckpointError(
                f"{path}: {POSITION_FILE} has changed since it was written (its digest differs); choose another checkpoint"
            )
        content = rest
    files = content.get("files")
    if not isinstance(files, dict) or not (_NEEDED_FILES <= files.keys() <= _NEEDED_FILES | {EMA_FILE, SEEN_FILE}):
        raise CheckpointError(
            f"{path}: {POSITION_FILE} does not list the checkpoint's files; choose another checkpoint"
        )
    return {name: value for name, value in content.items() if name not in ("format", "files")}, files


def newest_sound_checkpoint(checkpoints_dir: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint of the largest step that is whole; every broken newer one is named to `warn`. None where there is none.

    Raises CheckpointError where checkpoints exist and none is whole: to start again in silence would lose the run.
    """
    folders = sorted(checkpoints_dir.glob("step_*"), reverse=True)
    faults = []
    for folder in folders:
        try:
            return load_checkpoint(folder)
        except UserError as error:
            faults.append(str(error))
            warn(f"{error}; falling back to the checkpoint before it")
    if faults:
        raise CheckpointError(
            f"{checkpoints_dir}: none of the {len(faults)} checkpoints is whole; the newest: {faults[0]}; start a new run folder"
        )
    return None


def retain(checkpoints_dir: Path, *, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best, and what crashed writers left."""
    best = named_by(checkpoints_dir, "best")
    newest = set(sorted(checkpoints_dir.glob("step_*"))[-keep_last:])
    for folder in checkpoints_dir.glob("step_*"):
        if folder not in newest and (best is None or folder != best.path):
            # Under its own name a kill would leave half of it.
            os.replace(folder, checkpoints_dir / f".{folder.name}.{os.getpid()}.part")
    for leftover in checkpoints_dir.glob(".step_*.part"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_model_state(model: nn.Module, checkpoint: Checkpoint, weights: Weights = "raw") -> None:
    """Give a model the checkpoint's weights, all of them; CheckpointError names those that do not fit."""
    state = checkpoint.model_state(weights)
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    reshaped = [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape]
    if missing or unexpected or reshaped:
        raise CheckpointError(
            f"{checkpoint.path}: the weights do not fit the model: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(reshaped)} of another shape, such as {(missing + unexpected + sorted(reshaped))[0]}; use the config that it was trained with"
        )
    model.load_state_dict({name: laid_out_like(expected[name], tensor) for name, tensor in state.items()})


def pack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors, keyed `parameter name/state name`, and what is JSON (no pickle).

    The second part holds `groups` (each parameter group's settings, some of which count steps) and `scalars`. A tensor of a group,
    such as LAMB's count of steps, is keyed `group number//setting name`. A setting that is neither, such as a dtype, is the config's to make again.
    """
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            place = tensors if isinstance(value, Tensor) else scalars
            place[f"{names[index]}/{key}"] = value
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(state["param_groups"]):
        tensors |= {f"{number}//{key}": value for key, value in group.items() if isinstance(value, Tensor)}
        groups.append({key: value for key, value in group.items() if key != "params" and _is_plain(value)})
    return tensors, json.loads(canonical_json({"groups": groups, "scalars": scalars}))


def unpack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Give an optimizer the state that `pack_optimizer` took; CheckpointError where the parameters are not the same."""
    names = _parameter_names(model, optimizer)
    indices = {name: index for index, name in enumerate(names)}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    settings: dict[str, dict[str, Tensor]] = {}
    packed = {**checkpoint.optimizer_state(), **checkpoint.position.optimizer["scalars"]}
    for place, value in packed.items():
        name, _, key = place.rpartition("/")
        if name.endswith("/"):
            settings.setdefault(name.removesuffix("/"), {})[key] = value
            continue
        if name not in indices:
            raise CheckpointError(
                f"{checkpoint.path}: the optimizer knows {name}, the model does not; use the config that it was trained with"
            )
        state.setdefault(indices[name], {})[key] = _laid_out_like(parameters[name], value)
    current = optimizer.state_dict()
    groups = checkpoint.position.optimizer["groups"]
    if len(groups) != len(current["param_groups"]):
        raise CheckpointError(
            f"{checkpoint.path}: {len(groups)} parameter groups, the optimizer has {len(current['param_groups'])}; use the config that it was trained with"
        )
    for number, (ours, theirs) in enumerate(zip(current["param_groups"], groups, strict=True)):
        # JSON has no tuples, and optimizers such as AdamW keep their betas in one.
        ours.update({key: tuple(value) if isinstance(ours.get(key), tuple) else value for key, value in theirs.items()})
        ours.update(settings.get(str(number), {}))
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The name of each parameter at the place where the optimizer's state_dict numbers it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _is_plain(value: Any) -> bool:
    """Whether JSON holds it, a tuple as a list."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _laid_out_like(parameter: nn.Parameter, value: Any) -> Any:
    """State of the parameter's shape in the parameter's memory format and spread as it is: files keep values alone, and the order of a sum follows the format."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return laid_out_like(
        parameter, torch.empty_strided(value.shape, parameter.stride(), dtype=value.dtype).copy_(value)
    )


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
