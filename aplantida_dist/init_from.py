"""init_from: a model that begins with the weights of another run, every tensor accounted for and the head carried by class name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aplantida_dist.ancestor import Ancestor, InitError
from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.files import write_json
from aplantida_dist.lineage import Descent, Lineage
from aplantida_dist.model import MIN_SHARE, head_names, resized_position_embedding

INIT_FROM_FILE = "init_from.json"
NAMES_TOLD = 4


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


def begin_with(model: nn.Module, ancestor: Ancestor, *, class_map: ClassMap) -> Beginning:
    """Give a fresh model the ancestor's weights, its head by class name; what the ancestor lacks stays as it was initialised.

    Raises InitError, before the model is touched, where less than MIN_SHARE of the backbone would be the ancestor's.
    """
    ours, theirs = model.state_dict(), ancestor.state
    backbone = [name for name in ours if name not in head_names(model)]
    loaded = {name: theirs[name] for name in backbone if name in theirs and theirs[name].shape == ours[name].shape}
    resized = {
        name: fitted
        for name in backbone
        if name in theirs and name not in loaded
        if (fitted := resized_position_embedding(name, theirs[name], model)) is not None
    }
    reheaded = _carry_heads(ours, theirs, head_names(model), ancestor_map=ancestor.class_map, class_map=class_map)
    new = {**loaded, **resized}
    account = WeightAccount(
        loaded=tuple(loaded),
        resized=tuple(resized),
        reheaded=tuple(reheaded),
        new_head=tuple(name for name in head_names(model) if name not in reheaded),
        missing=tuple(name for name in backbone if name not in theirs),
        reshaped=tuple(name for name in backbone if name in theirs and name not in new),
        unexpected=tuple(name for name in theirs if name not in ours),
        share=sum(ours[name].numel() for name in new) / sum(ours[name].numel() for name in backbone),
        head=_compare_heads(ancestor.class_map, class_map, is_carried=bool(reheaded)),
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


def _compare_heads(ancestor_map: ClassMap | None, class_map: ClassMap, *, is_carried: bool) -> HeadAccount:
    """Which class names both heads have; none where the head could not be carried over."""
    if ancestor_map is None or not is_carried:
        return HeadAccount(
            shared=(), new=class_map.class_names, dropped=() if ancestor_map is None else ancestor_map.class_names
        )
    return HeadAccount(
        shared=class_map.shared_with(ancestor_map),
        new=class_map.missing_in(ancestor_map),
        dropped=ancestor_map.missing_in(class_map),
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
    shared = class_map.shared_with(ancestor_map)
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
