"""A batch: one micro-batch of the plan with its pixels, as the stream yields it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aplantida_dist.data.bad_sample import BadSample
from aplantida_dist.data.plan import Coordinates
from aplantida_dist.data.work import Work


@dataclass(frozen=True)
class Batch:
    """One micro-batch: images uint8 [b, 3, h, w]; labels int64 [b]; weights float32 [b]; identities int64 [b]; keys [b].

    Padding has weight 0, and so have the samples of `bad`: their identities are their own, picture and label those of the first good
    sample of the micro-batch (so that BatchNorm and mixing see nothing strange), or grey. `metadata` is what KEY.json holds, where
    it was asked for. `work` is what it took to make it. `failure` is the text of an error that a worker met; such a batch never leaves the stream.
    """

    at: Coordinates
    images: Tensor
    labels: Tensor
    weights: Tensor
    identities: Tensor
    sample_keys: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...] = ()
    bad: tuple[BadSample, ...] = ()
    work: Work = field(default_factory=Work)
    failure: str | None = None

    @property
    def bad_identities(self) -> Tensor:
        """Who the bad samples are: int64 [len(bad)], where the batch is."""
        return self.identities[[sample.place for sample in self.bad]]

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's pinning thread where there is a GPU."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Copy to the device; from pinned memory the copy runs beside the host."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, move: Any) -> Batch:
        return replace(
            self,
            images=move(self.images),
            labels=move(self.labels),
            weights=move(self.weights),
            identities=move(self.identities),
        )
