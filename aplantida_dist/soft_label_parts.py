"""The parts of a soft label file that is being written: what a killed command leaves, and goes on from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.files import write_json, write_whole
from aplantida_dist.soft_label_file import SoftLabelError, SoftLabelFacts

SLOTS_PER_PART = 64
_FACTS_FILE = "facts.json"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class SoftLabelParts:
    """The folder beside a file in the making: its facts, and parts of SLOTS_PER_PART slots each, in the stored order.

    A part is its records and their sha256; it is there whole or not at all. For the main process.
    """

    folder: Path
    facts: SoftLabelFacts

    @property
    def part_samples(self) -> int:
        return SLOTS_PER_PART * self.facts.micro_batch_size

    @property
    def num_parts(self) -> int:
        return -(-self.facts.num_samples // self.part_samples)

    def begin(self) -> int:
        """Make the folder, or find it; returns how many parts from the first on are there already.

        SoftLabelError where they are parts of another file.
        """
        now = json.loads(self.facts.model_dump_json())
        facts_path = self.folder / _FACTS_FILE
        if facts_path.is_file():
            before = json.loads(facts_path.read_bytes())
            changed = [name for name in now if before.get(name) != now[name]]
            if changed:
                raise SoftLabelError(
                    f"{self.folder}: holds parts of other soft labels ({', '.join(changed)} differ); go on with the command "
                    "that began them, or delete the folder"
                )
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SoftLabelError(
                    f"{self.folder}: cannot be made: {error.strerror}; choose another --out"
                ) from error
            write_json(facts_path, now)
        return next((part for part in range(self.num_parts) if self._content(part) is None), self.num_parts)

    def write(self, part: int, records: Sequence[NDArray[Any]]) -> None:
        """Write a part, synced to disk: the records of its slots, in order."""
        content = np.concatenate(records).tobytes()
        write_whole(self._path(part), content + hashlib.sha256(content).digest())

    def read(self) -> list[NDArray[Any]]:
        """All parts, as arrays over the files, which hold no memory of their own."""
        return [
            np.memmap(self._path(part), self.facts.record_dtype, "r", shape=(self._size(part),))
            for part in range(self.num_parts)
        ]

    def remove(self) -> None:
        """Delete the folder: the file is written."""
        shutil.rmtree(self.folder)

    def _content(self, part: int) -> bytes | None:
        """The records of a part as bytes; None where it is absent, cut or changed, so that it is made again."""
        try:
            content = self._path(part).read_bytes()
        except FileNotFoundError:
            return None
        records, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        is_whole = len(records) == self._size(part) * self.facts.record_dtype.itemsize
        return records if is_whole and hashlib.sha256(records).digest() == digest else None

    def _size(self, part: int) -> int:
        """The samples of a part; the last one may hold fewer."""
        return min(self.part_samples, self.facts.num_samples - part * self.part_samples)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.bin"
