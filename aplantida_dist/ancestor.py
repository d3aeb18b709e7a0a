"""The ancestor: the weights that model.init_from names, with what is known of their head and of what they were trained on."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aplantida_dist.checkpoint import POSITION_FILE, Checkpoint, CheckpointError, Weights, load_checkpoint
from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap, load_class_map
from aplantida_dist.errors import UserError
from aplantida_dist.files import sha256_of_file
from aplantida_dist.lineage import Descent, Lineage
from aplantida_dist.run_folder import checkpoints_dir, resolve_checkpoint

STATE_KEY, CLASSES_KEY = "model_state_dict", "class_names"
"""What a .pt holds: the weights by timm's names and, if the head is to be carried over, the class names in the head's order."""


class InitError(UserError):
    """What model.init_from names is not there, is no model of ours, or does not fit this one."""


@dataclass(frozen=True)
class Ancestor:
    """Weights to begin with: where they lie, who they are, what their head speaks (None: nobody recorded it), what they saw."""

    descent: Descent
    state: Mapping[str, Tensor]
    class_map: ClassMap | None
    lineage: Lineage


def open_ancestor(path: Path, *, weights: Weights = "raw") -> Ancestor:
    """Read what model.init_from names: a run folder (its best checkpoint), a checkpoint's folder, or the first trainer's .pt.

    `weights` says which of a checkpoint's two sets; a .pt has one. Raises InitError, CheckpointError, ClassMapError.
    """
    try:
        if path.is_file():
            if weights == "ema":
                raise InitError(
                    f"model.init_from_ema: {path}: a .pt holds one set of weights, expected a checkpoint with an EMA; set it to false"
                )
            return _open_pt(path)
        checkpoint = checkpoint_at(path)
        if checkpoint is not None:
            return Ancestor(
                Descent(str(checkpoint.path), checkpoint.digest),
                checkpoint.model_state(weights),
                class_map_of(checkpoint),
                checkpoint.lineage(),
            )
    except CheckpointError as error:
        raise InitError(f"model.init_from: {error}") from error
    raise InitError(
        f"model.init_from: {path}: {what_is_at(path)}; name a run folder, a folder below its checkpoints/, or a .pt with {STATE_KEY!r}"
    )


def checkpoint_at(path: Path) -> Checkpoint | None:
    """The best checkpoint of a run folder, or the checkpoint whose folder this is, checked; None where there is neither."""
    if (path / POSITION_FILE).is_file():
        return load_checkpoint(path)
    return resolve_checkpoint(path, "best") if checkpoints_dir(path).is_dir() else None


def what_is_at(path: Path) -> str:
    """What stands where a run or a checkpoint was looked for in vain."""
    if path.is_file():
        return "a file"
    return "no run and no checkpoint in this folder" if path.is_dir() else "nothing is here"


def class_map_of(checkpoint: Checkpoint) -> ClassMap | None:
    """The class map of a checkpoint's run, which must be the one that it was trained with; None where there is none beside it."""
    classes_path = checkpoint.path.parent.parent / CLASSES_FILE
    class_map = load_class_map(classes_path) if classes_path.is_file() else None
    recorded = checkpoint.position.digests.get("class_map")
    if class_map is not None and class_map.digest != recorded:
        raise CheckpointError(
            f"{classes_path} is not the class map of {checkpoint.path} (its digest is {class_map.digest[:12]}, "
            f"the checkpoint's {str(recorded)[:12]}); put the run's own classes.json there"
        )
    return class_map


def _open_pt(path: Path) -> Ancestor:
    """The first trainer's file, read without running what a pickle may hold."""
    expected = (
        f"expected torch.save({{{STATE_KEY!r}: model.state_dict(), {CLASSES_KEY!r}: [names in the head's order]}})"
    )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own text runs over a dozen lines and advises to switch the protection off.
        raise InitError(
            f"model.init_from: {path}: is no file of torch.save, or holds more than tensors and plain values (numpy's too), which is "
            f"not unpickled because that can run code; {expected}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InitError(
            f"model.init_from: {path}: is cut, or no file of torch.save ({type(error).__name__}); {expected}"
        ) from error
    state = content.get(STATE_KEY) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InitError(f"model.init_from: {path}: holds no weights under {STATE_KEY!r}, {expected}")
    names = content.get(CLASSES_KEY)
    if names is not None and not _are_class_names(names):
        raise InitError(f"model.init_from: {path}: {CLASSES_KEY!r} is not a list of distinct names, {expected}")
    return Ancestor(
        Descent(str(path), sha256_of_file(path)),
        # What DDP and torch.compile put before each name is no part of it.
        {str(name).removeprefix("_orig_mod.").removeprefix("module."): tensor for name, tensor in state.items()},
        ClassMap(tuple(names)) if names else None,
        Lineage(np.zeros(0, dtype=np.int64), unknown=(str(path),)),
    )


def _are_class_names(names: Any) -> bool:
    return (
        isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names) > 0
    )
