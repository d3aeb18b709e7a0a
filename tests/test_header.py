"""The headers of tar members are those of the standard library, to the last byte."""

from __future__ import annotations

import random
import tarfile

import pytest

from aplantida_dist.shards.header import MEMBER_MODE, ustar_header


def of_the_library(name: str, num_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = num_bytes, MEMBER_MODE
    return member.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("length", range(1, 101))
def test_a_header_is_that_of_tarfile(length: int) -> None:
    """For names of every length that its field holds, and sizes of every number of digits that USTAR can state."""
    drawn = random.Random(length)
    for digits in range(34):
        name = "".join(drawn.choices([chr(code) for code in range(33, 127)], k=length))
        num_bytes = drawn.randrange(2**digits)
        assert ustar_header(name, num_bytes) == of_the_library(name, num_bytes)


@pytest.mark.parametrize("name", ["a" * 100, "a" * 99 + "/", "b" * 60 + "/" + "c" * 60, "blüte.jpg", "folder/"])
def test_names_that_do_not_fit_their_field_go_the_library_s_way(name: str) -> None:
    """Long names are divided over two fields, others than ASCII are UTF-8."""
    assert ustar_header(name, 7) == of_the_library(name, 7)


@pytest.mark.parametrize(("name", "num_bytes"), [("a" * 101, 1), ("a", 8**11)])
def test_what_ustar_cannot_hold_is_refused(name: str, num_bytes: int) -> None:
    """A name that cannot be divided and a member of 8 GiB are errors, not other names and sizes."""
    with pytest.raises(ValueError, match=r"name is too long|overflow"):
        ustar_header(name, num_bytes)
