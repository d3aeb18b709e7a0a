"""Randomness as a function of coordinates: a seed and a name of what is drawn give a number, nothing else does."""

from __future__ import annotations

from hashlib import blake2b


def derive(seed: int, *coordinates: int | str) -> int:
    """Return the 63-bit integer that belongs to these coordinates.

    The same on every machine and Python: a keyed digest of the canonical text, so `derive(0, "augment", 3, 17)` never
    depends on what was drawn before. Unequal coordinates give unequal texts (each one is tagged and length-prefixed).
    """
    text = "".join(f"{'s' if isinstance(part, str) else 'i'}{len(str(part))}:{part}" for part in (seed, *coordinates))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
