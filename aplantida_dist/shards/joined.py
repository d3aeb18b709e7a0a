"""Several sources as one: their records one after the other, under names that stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aplantida_dist.data.manifest import SPLITS
from aplantida_dist.errors import UserError
from aplantida_dist.shards.source import MetadataUse, Source


class SourcesError(UserError):
    """Sources that do not make one dataset."""


def joined(sources: Sequence[Source]) -> Source:
    """One source of one or more, in their order: of equal pictures in one split that of the first source stays.

    With several, a record is named SOURCE:NAME; sources of one name become `name`, `name#2`, and so on. Raises SourcesError
    where some of them decide the splits and others do not, or where a tar stands in two of them.
    """
    if len(sources) == 1:
        return sources[0]
    _require_one_kind(sources)
    sources = [_renamed(source, name) for source, name in zip(sources, _distinct_names(sources), strict=True)]
    tars = [tar for source in sources for tar in source.tars]
    if len({tar.path for tar in tars}) != len(tars):
        raise SourcesError(f"{' and '.join(source.name for source in sources)}: hold the same tar; name each tar once")
    return Source(
        name=" + ".join(source.name for source in sources),
        picture_paths=tuple(path for source in sources for path in source.picture_paths),
        counted=" and ".join(dict.fromkeys(source.counted for source in sources)),
        records=tuple(record for source in sources for record in source.records),
        outside=tuple(left_out for source in sources for left_out in source.outside),
        splits=tuple(split for split in SPLITS if any(split in source.splits for source in sources)),
        class_names=tuple(sorted({name for source in sources for name in source.class_names})),
        metadata=_metadata_of(sources),
        tars=tuple(tars),
    )


def _require_one_kind(sources: Sequence[Source]) -> None:
    deciding = [source.name for source in sources if source.splits]
    others = [source.name for source in sources if not source.splits]
    if deciding and others:
        raise SourcesError(
            f"{', '.join(deciding)} state the split of each picture and {', '.join(others)} do not; "
            "give sources that all state it, or that all leave it to the builder"
        )


def _distinct_names(sources: Sequence[Source]) -> list[str]:
    names: list[str] = []
    for source in sources:
        number = 1 + sum(earlier.name == source.name for earlier in sources[: len(names)])
        names.append(source.name if number == 1 else f"{source.name}#{number}")
    return names


def _renamed(source: Source, name: str) -> Source:
    """The source under another name, and its records under that name: of FILE:LINE the file is the name already."""

    def full(inside: str) -> str:
        return f"{name}:{inside.removeprefix(f'{source.name}:')}"

    return replace(
        source,
        name=name,
        records=tuple(replace(record, source=full(record.source)) for record in source.records),
        outside=tuple(replace(left_out, source=full(left_out.source)) for left_out in source.outside),
        metadata=source.metadata
        and replace(
            source.metadata, unmatched=tuple((number, full(path)) for number, path in source.metadata.unmatched)
        ),
    )


def _metadata_of(sources: Sequence[Source]) -> MetadataUse | None:
    uses = [source.metadata for source in sources if source.metadata is not None]
    if not uses:
        return None
    return MetadataUse(
        num_lines=sum(use.num_lines for use in uses),
        unmatched=tuple(line for use in uses for line in use.unmatched),
        num_files_without_line=sum(use.num_files_without_line for use in uses),
    )
