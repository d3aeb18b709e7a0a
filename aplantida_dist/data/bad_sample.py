"""Bad samples: those that a plan names and that cannot be delivered, each with who it is, where it lies and why."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class BadSample(BaseModel):
    """A sample whose shard and key are known, while its picture has changed or does not decode.

    slot and place: where in the plan it stands; offset: of its picture's bytes in the shard; label: its own class index.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    split: str
    slot: int
    place: int
    shard: str
    sample_key: str
    offset: int
    label: int
    reason: str
