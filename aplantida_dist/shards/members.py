"""The members of a tar, listed down to its end mark; a tar that is not whole is never taken for a short one."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TarMembers:
    """The members of a tar in its order, and where it stops being one; `fault` is None for a tar that is whole."""

    members: tuple[tarfile.TarInfo, ...]
    fault: str | None


def read_tar_members(path: Path) -> TarMembers:
    """List the members of a shard, down to its end mark.

    tarfile and webdataset take a damaged header, or a cut between two members, for the end and say nothing; so what follows
    the last member must be two empty blocks at least and nothing else.
    """
    members: list[tarfile.TarInfo] = []
    end, fault = 0, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                members.append(member)
                end = member.offset_data + member.size + -member.size % tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError) as error:
        fault = f"is no tar from byte {end} on: {error}"
    return TarMembers(tuple(members), fault or _fault_of_end(path, end))


def _fault_of_end(path: Path, end: int) -> str | None:
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
        while not rest.strip(b"\0") and (more := file.read(1 << 20)):
            rest = rest[-tarfile.BLOCKSIZE :] + more
    if rest.strip(b"\0"):
        return f"holds no tar header at byte {end}; what follows cannot be read"
    if len(rest) < 2 * tarfile.BLOCKSIZE:
        return f"is cut at byte {end}: the end mark of the tar is missing"
    return None
