"""The guided fuzz: atheris follows which lines of a reader an input reaches, and makes the next ones of those that reach new ones.

    python -m tests.guided_fuzz config WHOLE_FILES FOUND -runs=20000 -rss_limit_mb=1536

reads the corpus and the whole files of a reader, writes into FOUND what breaks it, and ends with another code than 0 then. What follows
FOUND is libFuzzer's. Whatever the reader raises but the typed error breaks it, and so does an input of more memory or time than allowed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["aplantida_dist", "yaml", "PIL", "pydantic", "tarfile", "safetensors"]):
    from tests import fuzz_targets

PLANTED = "planted"
"""The name of a reader with a bug behind two comparisons, to show that it is found."""


@atheris.instrument_func
def planted(content: bytes, folder: Path) -> None:
    """Breaks on a file whose two words are right, which no accident makes."""
    if content[:4] == b"RIFF" and content[4:8] == b"CRYX":
        raise IndexError("planted")


def main() -> None:
    """Fuzz one reader until libFuzzer's budget is spent; ends the process."""
    name, whole_files, found, *options = sys.argv[1:]
    reader = planted if name == PLANTED else fuzz_targets.reader_of(name, Path(whole_files))
    seeds = [str(path) for path in (Path(whole_files) / name, fuzz_targets.CORPUS / name) if path.is_dir()]
    with TemporaryDirectory() as folder:

        def feed(content: bytes) -> None:
            fuzz_targets.outcome(reader, content, Path(folder))

        # libFuzzer adds what it learns to the first folder; the seeds stay as they are.
        learned = Path(folder) / "learned"
        learned.mkdir()
        atheris.Setup([sys.argv[0], str(learned), *seeds, f"-artifact_prefix={found}/", *options], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
