"""The targets of the fuzzers: the readers by name, each with what it is fed, which is made of whole files, and what becomes of that."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aplantida_dist.errors import UserError
from tests import fuzz

CORPUS = Path(__file__).with_name("corpus")
"""What was ever found: a folder a reader."""
NAMES = (
    "config", "manifest", "class_map", "history", "position", "pointer", "soft_labels", "jpeg", "png", "webp", "index", "foreign_index",
    "indexed_tar", "tar",
)  # fmt: skip
MAX_INPUT_MEMORY_BYTES = 400 * 2**20
"""By which one input may grow the process: a picture's header may claim 100 megapixels, of 3 bytes each, and is read as no more."""

Inputs = st.SearchStrategy[bytes]


def reader_of(name: str, whole_files: Path) -> fuzz.Reader:
    """The reader of this name; an index has the whole tar behind it, and a tar the whole index."""
    readers: dict[str, fuzz.Reader] = {
        "config": fuzz.read_config, "manifest": fuzz.read_manifest, "class_map": fuzz.read_class_map, "history": fuzz.read_rows,
        "position": fuzz.read_position, "pointer": fuzz.read_pointer, "soft_labels": fuzz.read_soft_labels, "tar": fuzz.read_tar,
    }  # fmt: skip
    match name:
        case "jpeg" | "png" | "webp":
            return fuzz.read_picture
        case "index" | "foreign_index":
            return fuzz.index_reader(_wholes(whole_files, "indexed_tar")[0], is_foreign=name == "foreign_index")
        case "indexed_tar":
            return fuzz.indexed_tar_reader(_wholes(whole_files, "index")[0])
        case _:
            return readers[name]


def inputs_of(name: str, whole_files: Path) -> Inputs:
    """What a reader is fed: accidents to its whole files and, where it reads more than a format's bytes, anything at all."""
    wholes = _wholes(whole_files, name)
    match name:
        case "manifest" | "class_map" | "position" | "pointer":
            return st.one_of(*(fuzz.anything(whole, is_json=True) for whole in wholes))
        case "history":
            line = wholes[0].splitlines()[0]
            return st.one_of(fuzz.anything(wholes[0]), fuzz.damaged_json(line).map(lambda text: text + b"\n"))
        case "soft_labels":
            return st.one_of(fuzz.anything(wholes[0]), _odd_headers(wholes[0]))
        case "jpeg" | "png" | "indexed_tar":
            return st.one_of(*map(fuzz.damaged_bytes, wholes))
        case _:
            return st.one_of(*map(fuzz.anything, wholes))


def outcome(reader: fuzz.Reader, content: bytes, folder: Path) -> str:
    """`read` or `refused`; whatever else a reader raises comes out of here so that it fails the test."""
    try:
        reader(content, folder)
    except UserError:
        return "refused"
    return "read"


def fuzzed(reader: fuzz.Reader, inputs: Inputs, folder: Path, *, max_examples: int) -> dict[str, int]:
    """Feed a reader so many inputs, the same ones every time; how many were read and how many refused, and the most memory of one.

    An input that breaks the reader is named by hypothesis. What hypothesis itself gathers over the inputs is not counted.
    """
    told = {"read": 0, "refused": 0, "most_memory_bytes": 0}

    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def feed(content: bytes) -> None:
        before = _forget_peak_memory()
        told[outcome(reader, content, folder)] += 1
        told["most_memory_bytes"] = max(told["most_memory_bytes"], _memory_bytes("VmHWM") - before)

    feed()
    return told


def _forget_peak_memory() -> int:
    """Let the process's peak of memory begin anew from what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_bytes("VmRSS")


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _wholes(whole_files: Path, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((whole_files / name).iterdir())]


def _odd_headers(whole: bytes) -> Inputs:
    """Soft labels whose header is sound JSON of its length and states nonsense."""
    end = 8 + int.from_bytes(whole[:8], "little")
    headers = fuzz.damaged_json(whole[8:end])
    return headers.map(lambda text: len(text).to_bytes(8, "little") + text + whole[end:])


def careless(content: bytes, folder: Path) -> None:
    """A reader that lets one kind of accident through: what is nested too deep."""
    try:
        json.loads(content)
    except ValueError as error:
        raise UserError("no JSON") from error
