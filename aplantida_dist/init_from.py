"""init_from: a model that begins with the weights of another run, every tensor accounted for and the head carried by class name."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aplantida_dist.checkpoint import POSITION_FILE, Checkpoint, CheckpointError, load_checkpoint
from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap, load_class_map
from aplantida_dist.errors import UserError
from aplantida_dist.files import sha256_of_file, write_json
from aplantida_dist.lineage import Descent, Lineage
from aplantida_dist.model import head_names, resized_position_embedding
from aplantida_dist.run_folder import checkpoints_dir, resolve_checkpoint

INIT_FROM_FILE = "init_from.json"
MIN_SHARE = 0.9
"""Share of the backbone's parameters that the ancestor must give; below it the two are different models."""
STATE_KEY, CLASSES_KEY = "model_state_dict", "class_names"
"""What a .pt holds: the weights by timm's names and, if the head is to be carried over, the class names in the head's order."""
NAMES_TOLD = 4


class InitError(UserError):
    """What model.init_from names is not there, is no model of ours, or does not fit this one."""


@dataclass(frozen=True)
class Ancestor:
    """Weights to begin with: where they lie, who they are, what their head speaks (None: nobody recorded it), what they saw."""

    descent: Descent
    state: Mapping[str, Tensor]
    class_map: ClassMap | None
    lineage: Lineage


@dataclass(frozen=True)
class HeadAccount:
    """Class names: in both heads, in ours alone (their rows are new), in the ancestor's alone (their rows are gone)."""

    shared: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class WeightAccount:
    """Where every tensor went, by name.

    Each of the model's is in one of loaded, resized, reheaded, new_head, missing, reshaped; the first three are the ancestor's
    values. Each of the ancestor's is in one of loaded, resized, reheaded, new_head, reshaped, unexpected. `share` is that of the
    backbone's values which are the ancestor's.
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    reheaded: tuple[str, ...]
    new_head: tuple[str, ...]
    missing: tuple[str, ...]
    reshaped: tuple[str, ...]
    unexpected: tuple[str, ...]
    share: float
    head: HeadAccount


@dataclass(frozen=True)
class Beginning:
    """What model.init_from gave a run: from whom, what those weights saw, and where each of them went."""

    descent: Descent
    lineage: Lineage
    account: WeightAccount


def open_ancestor(path: Path) -> Ancestor:
    """Read what model.init_from names: a run folder (its best checkpoint), a checkpoint's folder, or the first trainer's .pt.

    Raises InitError, CheckpointError, ClassMapError.
    """
    try:
        if path.is_file():
            return _open_pt(path)
        if (path / POSITION_FILE).is_file():
            return _open_checkpoint(load_checkpoint(path))
        if checkpoints_dir(path).is_dir():
            return _open_checkpoint(resolve_checkpoint(path, "best"))
    except CheckpointError as error:
        raise InitError(f"model.init_from: {error}") from error
    found = "no run and no checkpoint in this folder" if path.is_dir() else "nothing is here"
    raise InitError(
        f"model.init_from: {path}: {found}; name a run folder, a folder below its checkpoints/, or a .pt with {STATE_KEY!r}"
    )


def begin_with(model: nn.Module, ancestor: Ancestor, *, class_map: ClassMap) -> Beginning:
    """Give a fresh model the ancestor's weights, its head by class name; what the ancestor lacks stays as it was initialised.

    Raises InitError, before the model is touched, where less than MIN_SHARE of the backbone would be the ancestor's.
    """
    ours, theirs = model.state_dict(), ancestor.state
    heads = head_names(model)
    new: dict[str, Tensor] = {}
    resized: list[str] = []
    for name in [name for name in ours if name in theirs and name not in heads]:
        if theirs[name].shape == ours[name].shape:
            new[name] = theirs[name]
        elif (fitted := resized_position_embedding(name, theirs[name], model)) is not None:
            new[name] = fitted
            resized.append(name)
    head = _compare_heads(ancestor.class_map, class_map)
    reheaded = _carry_heads(ours, theirs, heads, ancestor_map=ancestor.class_map, class_map=class_map)
    backbone = [name for name in ours if name not in heads]
    covered = sum(ours[name].numel() for name in new)
    account = WeightAccount(
        loaded=tuple(name for name in backbone if name in new and name not in resized),
        resized=tuple(resized),
        reheaded=tuple(reheaded),
        new_head=tuple(name for name in heads if name not in reheaded),
        missing=tuple(name for name in backbone if name not in theirs),
        reshaped=tuple(name for name in backbone if name in theirs and name not in new),
        unexpected=tuple(name for name in theirs if name not in ours),
        share=covered / sum(ours[name].numel() for name in backbone),
        head=head if reheaded else HeadAccount((), class_map.class_names, head.shared + head.dropped),
    )
    _require_enough(account, ancestor)
    model.load_state_dict({**ours, **new, **reheaded})
    return Beginning(ancestor.descent, ancestor.lineage, account)


def write_beginning(run_dir: Path, beginning: Beginning) -> None:
    """Write init_from.json into the run folder: whose weights, what they had seen, where each went. For the main process."""
    content = {
        **asdict(beginning.descent),
        "lineage": beginning.lineage.facts(),
        "min_share": MIN_SHARE,
        **asdict(beginning.account),
    }
    write_json(run_dir / INIT_FROM_FILE, content)


def account_lines(account: WeightAccount, ancestor: Descent) -> list[str]:
    """The account for the screen."""
    return [
        f"init_from {ancestor.path} ({ancestor.digest[:12]}): {100 * account.share:.2f} % of the backbone · "
        f"{_counted('loaded', account.loaded, few=False)} · {_counted('resized', account.resized)} · "
        f"{_counted('re-headed', account.reheaded)} · {_counted('head new', account.new_head)} · "
        f"{_counted('missing', account.missing)} · {_counted('of another shape', account.reshaped)} · "
        f"{_counted('unexpected', account.unexpected)}",
        f"classes: {_counted('carried over by name', account.head.shared, few=False)} · {_counted('new', account.head.new)} · "
        f"{_counted('dropped', account.head.dropped)}",
    ]


def _open_checkpoint(checkpoint: Checkpoint) -> Ancestor:
    """A checkpoint with the class map of its run, which must be the one that it was trained with."""
    classes_path = checkpoint.path.parent.parent / CLASSES_FILE
    class_map = load_class_map(classes_path) if classes_path.is_file() else None
    recorded = checkpoint.position.digests.get("class_map")
    if class_map is not None and class_map.digest != recorded:
        raise InitError(
            f"model.init_from: {classes_path} is not the class map of {checkpoint.path} (its digest is {class_map.digest[:12]}, "
            f"the checkpoint's {str(recorded)[:12]}); put the run's own classes.json there"
        )
    return Ancestor(
        Descent(str(checkpoint.path), checkpoint.digest), checkpoint.model_state(), class_map, checkpoint.lineage()
    )


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


def _compare_heads(ancestor_map: ClassMap | None, class_map: ClassMap) -> HeadAccount:
    theirs = ancestor_map.index_of if ancestor_map else {}
    return HeadAccount(
        shared=tuple(name for name in class_map.class_names if name in theirs),
        new=tuple(name for name in class_map.class_names if name not in theirs),
        dropped=tuple(name for name in theirs if name not in class_map.index_of),
    )


def _carry_heads(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    heads: tuple[str, ...],
    *,
    ancestor_map: ClassMap | None,
    class_map: ClassMap,
) -> dict[str, Tensor]:
    """The head's tensors ([classes, …]) with the rows of shared classes from the ancestor; all of them, or none where one does not fit.

    Without the ancestor's class names a row means nothing, so that a head of the same shape is not taken either.
    """
    if ancestor_map is None:
        return {}
    shared = [name for name in class_map.class_names if name in ancestor_map.index_of]
    rows = torch.tensor([class_map.index_of[name] for name in shared], dtype=torch.int64)
    ancestor_rows = torch.tensor([ancestor_map.index_of[name] for name in shared], dtype=torch.int64)
    carried: dict[str, Tensor] = {}
    for name in heads:
        if name not in theirs or theirs[name].shape != (ancestor_map.num_classes, *ours[name].shape[1:]):
            return {}
        carried[name] = ours[name].clone()
        carried[name][rows] = theirs[name][ancestor_rows].to(ours[name].dtype)
    return carried


def _require_enough(account: WeightAccount, ancestor: Ancestor) -> None:
    taken = (*account.loaded, *account.resized, *account.reheaded)
    broken = [name for name in taken if not ancestor.state[name].isfinite().all()]
    if broken:
        raise InitError(
            f"model.init_from: {ancestor.descent.path}: {_counted('tensors hold NaN or Inf', broken)}; name a sound checkpoint"
        )
    if account.share < MIN_SHARE:
        raise InitError(
            f"model.init_from: {ancestor.descent.path} gives {100 * account.share:.1f} % of the backbone's parameters, expected at "
            f"least {100 * MIN_SHARE:.0f} %: {_counted('missing', account.missing)}, "
            f"{_counted('of another shape', account.reshaped)}, {_counted('unexpected', account.unexpected)}; "
            "give model.name and model.kwargs of the ancestor"
        )


def _counted(what: str, names: tuple[str, ...] | list[str], *, few: bool = True) -> str:
    """A count and what it counts, with the first names of a few."""
    if not few or not names:
        return f"{len(names)} {what}"
    more = ", …" if len(names) > NAMES_TOLD else ""
    return f"{len(names)} {what} ({', '.join(names[:NAMES_TOLD])}{more})"
