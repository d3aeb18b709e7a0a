"""The run folder: where a run's files lie, whether it may begin there, and from which checkpoint it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from aplantida_dist.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    named_by,
    newest_sound_checkpoint,
)
from aplantida_dist.config import changes
from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap, load_class_map
from aplantida_dist.errors import UserError
from aplantida_dist.files import write_whole
from aplantida_dist.history import HISTORY_FILE
from aplantida_dist.lock import take_lock
from aplantida_dist.strict_yaml import show

CONFIG_FILE = "config.yaml"
LOCK_FILE = "run.lock"
"""Names the process that trains here now."""


class RunFolderError(UserError):
    """A run folder cannot be written, or holds another run than the one that is asked for."""


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def prepare_run_folder(run_dir: Path, *, config_yaml: str, class_map: ClassMap) -> None:
    """Make the folder and write what the run is before it begins. For the main process."""
    try:
        checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{run_dir}: the run folder cannot be made: {error.strerror}; choose another with --run-dir"
        ) from error
    write_whole(run_dir / CONFIG_FILE, config_yaml.encode())
    class_map.save(run_dir / CLASSES_FILE)


def find_checkpoint(run_dir: Path, resume: str, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from: `auto` the newest that is whole, if any; `never` none; otherwise the one named.

    A name is `last`, `best`, or a folder below the run's checkpoints/.
    """
    folder = checkpoints_dir(run_dir)
    if resume == "never":
        if (run_dir / HISTORY_FILE).exists() or any(folder.glob("step_*")):
            raise RunFolderError(
                f"{run_dir}: holds a run already and --resume is never; choose another --run-dir or --resume auto"
            )
        return None
    if resume == "auto":
        return newest_sound_checkpoint(folder, warn=warn)
    checkpoint = resolve_checkpoint(run_dir, resume)
    if checkpoint.path.resolve().parent != folder.resolve():
        raise RunFolderError(
            f"--resume {resume}: is not one of the checkpoints of {run_dir}; a run goes on in its own folder: "
            f"give --run-dir {checkpoint.path.parent.parent}"
        )
    return checkpoint


def resolve_checkpoint(run_dir: Path, name: str) -> Checkpoint:
    """The checkpoint that `best`, `last`, a folder's name below checkpoints/, or a path names, checked."""
    folder = checkpoints_dir(run_dir)
    if name in ("best", "last"):
        pointer = named_by(folder, name)
        if pointer is None:
            raise CheckpointError(
                f"{folder}: no {name}.json, so there is no {name} checkpoint yet; train first, or name a folder"
            )
        checkpoint = load_checkpoint(pointer.path)
        if checkpoint.digest != pointer.digest:
            raise CheckpointError(
                f"{folder / name}.json: was written for another checkpoint than now lies in {pointer.path} (the digest of its "
                f"position.json differs); name the folder itself, or run the training command again, which mends {name}.json"
            )
        return checkpoint
    return load_checkpoint(folder / name if (folder / name).is_dir() else Path(name))


def require_same_run(
    checkpoint: Checkpoint,
    *,
    run_dir: Path,
    class_map: ClassMap,
    digests: Mapping[str, str],
    law_fields: Mapping[str, Any],
    law_defaults: Mapping[str, Any],
) -> None:
    """Raise RunFolderError unless the checkpoint's run and this one obey the same law; it names each field and both values.

    A field that the checkpoint lacks is younger than it, and counts as its default.
    """
    load_class_map(run_dir / CLASSES_FILE).require_same(class_map, ours=str(run_dir), theirs="the dataset")
    # As the checkpoint holds them: JSON has no tuples.
    now, before = json.loads(json.dumps(law_fields)), json.loads(json.dumps(law_defaults))
    changed = [
        f"{change.name} was {show(change.old)}, is {show(change.new)}"
        for change in changes({**before, **checkpoint.position.law_fields}, now)
    ]
    for name in checkpoint.position.digests.keys() & digests.keys() & {"train_manifest", "val_manifest"}:
        old, new = checkpoint.position.digests[name], digests[name]
        if old != new:
            changed.append(f"{name} was {_short(old)}, is {_short(new)} (another dataset or --max-samples)")
    old, new = (str(found.get("soft_labels", "none")) for found in (checkpoint.position.digests, digests))
    if old != new:
        changed.append(f"soft_labels was {_short(old)}, is {_short(new)} (other files)")
    old, new = (str(found.get("teachers", "none")) for found in (checkpoint.position.digests, digests))
    if old != new:
        changed.append(
            f"teachers was {_short(old)}, is {_short(new)} (other checkpoints, or their order; teachers.json names those of this run)"
        )
    if changed:
        raise RunFolderError(
            f"{checkpoint.path}: cannot go on, because what decides the numbers has changed: {'; '.join(changed)}; "
            "restore it, or begin a new run with another --run-dir"
        )


def changed_since(
    checkpoint: Checkpoint,
    *,
    world_size: int,
    code_version: str,
    free_fields: Mapping[str, Any],
    free_defaults: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """What a resumed run does otherwise and may: by name, the value when the checkpoint was written and the one now."""
    position = checkpoint.position
    before = {"world_size": position.world_size, "code_version": position.code_version}
    now = {"world_size": world_size, "code_version": code_version}
    if position.free_fields is not None:
        before |= json.loads(json.dumps({**free_defaults, **position.free_fields}))
        now |= json.loads(json.dumps(free_fields))
    return {change.name: [change.old, change.new] for change in changes(before, now)}


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run folder, which is made where there is none: one run at a time writes there. For the main process.

    LockError where another holds it. Nothing is left of a folder that was made for a run that did not begin.
    """
    is_new = not run_dir.exists()
    with ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if is_new:
                held.callback(_remove_empty, run_dir)
            lock = held.enter_context(
                take_lock(
                    run_dir / LOCK_FILE,
                    doing="trains in this run folder",
                    remedy="wait until it has ended, stop it, or choose another --run-dir",
                )
            )
        except OSError as error:
            raise RunFolderError(
                f"{run_dir}: the run folder cannot be made or locked: {error.strerror}; choose another with --run-dir"
            ) from error
        if lock.left is not None:
            print(
                f"{run_dir}: {lock.left} ended without a word while it trained here; going on in its place", flush=True
            )
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _short(digest: str) -> str:
    """The head of a sha256, and what a limited split adds to it."""
    return digest[:12] + digest[64:]
