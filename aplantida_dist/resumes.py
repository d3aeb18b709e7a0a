"""The resumes of a run: resumes.jsonl, a line each time that it went on, with what had changed since the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aplantida_dist.errors import UserError
from aplantida_dist.files import canonical_json, write_whole

RESUMES_FILE = "resumes.jsonl"

Changes = Mapping[str, list[Any]]
"""What has changed by name, such as `world_size` or `data.num_workers`: the value before, and the one after."""


class Resume(BaseModel):
    """One resume: who went on, from which completed step, and what differs from the run that wrote the checkpoint."""

    model_config = ConfigDict(extra="allow", frozen=True)

    from_step: int = Field(ge=0)
    time_utc: str
    host: str
    pid: int
    changed: Changes


def note_resume(run_dir: Path, resume: Resume) -> tuple[Resume, ...]:
    """Add a resume to the file, whole or not at all; returns all of the run's, oldest first. For the main process.

    The file is never cut, other than the history: it tells of resumes that came to nothing, too.
    """
    path = run_dir / RESUMES_FILE
    resumes = (*read_resumes(path), resume)
    write_whole(path, b"".join(canonical_json(each.model_dump(mode="json")) + b"\n" for each in resumes))
    return resumes


def read_resumes(path: Path) -> tuple[Resume, ...]:
    """The resumes that a file holds, oldest first; none where there is no file. UserError names a line that is not one."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    resumes = []
    for number, line in enumerate(lines, start=1):
        try:
            resumes.append(Resume.model_validate_json(line))
        except ValidationError as error:
            raise UserError(
                f"{path}: line {number} is not a resume: {error.errors()[0]['msg']}; restore the file, or move it away"
            ) from None
    return tuple(resumes)


def changes_within(resumes: Sequence[Resume], *, first_step: int, end_step: int) -> dict[str, Changes]:
    """What changed in the course of the steps from `first_step` up to `end_step`, by the step from which it holds.

    A resume undoes the ones before it that went on from the same step or a later one: what those did is not in the run.
    """
    standing: list[Resume] = []
    for resume in resumes:
        standing = [*(each for each in standing if each.from_step < resume.from_step), resume]
    return {
        str(each.from_step): each.changed
        for each in standing
        if each.changed and first_step <= each.from_step < end_step
    }
