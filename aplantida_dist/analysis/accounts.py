"""What only our own history can tell: whether every sample was read, what the numbers were measured on, who waited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from aplantida_dist.analysis.curves import Curves, finite, measured_losses
from aplantida_dist.analysis.verdict import Verdict
from aplantida_dist.analysis.wording import count_text, list_text, percent_text
from aplantida_dist.history import Row, SplitMetrics

WAITING = 0.2
"""Share of the time spent waiting for data from which on the loader, and not the device, sets the pace."""

STARVING = 0.5
"""From here on more than half of the paid time is lost."""

VOID = 0.01
"""Share of void samples that no longer leaves the metrics alone."""


def coverage(curves: Curves) -> Verdict | None:
    """Every row counts what the manifest expects (the history refuses others) and the same samples in every epoch."""
    if not curves.rows:
        return None
    for split, metrics in _evaluated(curves.rows).items():
        # Where classes are sampled, each epoch draws others.
        full = [(row, m) for row, m in metrics if m.void_samples == 0 and not getattr(m, "distinct_samples", None)]
        for row, m in full[1:]:
            if m.identity_digest != full[0][1].identity_digest and _manifest(row, split) == _manifest(
                full[0][0], split
            ):
                return Verdict(
                    "error",
                    "epochs read different samples",
                    f"{split} identity digest is {full[0][1].identity_digest} in epoch {full[0][0].epoch} and {m.identity_digest} in "
                    f"epoch {row.epoch}, of one manifest.",
                    "Some samples were read twice and others never: the counts agree and the identities do not.",
                    "Verify the dataset with `python shards/verify.py`, and report this: the plan promises each sample once.",
                )
    told = [
        f"{split} {metrics[-1][1].expected_samples:,} samples × {count_text(len(metrics), 'epoch')}"
        for split, metrics in _evaluated(curves.rows).items()
        if metrics
    ]
    return Verdict(
        "good",
        "every sample accounted for",
        f"{'; '.join(told)}; identity digest {curves.rows[-1].train.identity_digest} for train.",
        "In every row the samples counted and the void ones are those that the manifest expects.",
    )


def leak(curves: Curves) -> Verdict | None:
    """Validation photographs that the weights had been trained on."""
    counts = finite(curves.leaked)
    if not counts:
        return None
    last = max(counts)
    whole, clean = curves.val.top1[last], finite(curves.clean.top1).get(last)
    told = f"{percent_text(clean)} on the others" if clean is not None else "and there are no others"
    return Verdict(
        "warning",
        "validation leaks",
        f"{count_text(int(counts[last]), 'val photograph')} had been trained on, by this run or the weights that it began with; val top-1 "
        f"in epoch {curves.epochs[last]} is {percent_text(whole)} on all of them, {told}.",
        "What was learnt by heart is no forecast of unseen plants. The best epoch and every comparison here go by the clean part.",
        "Build the dataset so that it keeps the splits of the one before it (`shards/build.py --from-dataset`, or --keep-splits), and train again.",
    )


def void_samples(curves: Curves) -> Verdict | None:
    """Samples that were read and could not be counted."""
    voided = [
        (m.void_samples / m.expected_samples, split, row.epoch, m)
        for split, metrics in _evaluated(curves.rows).items()
        for row, m in metrics
        if m.void_samples
    ]
    if not voided:
        return None
    share, split, epoch, worst = max(voided, key=lambda entry: entry[0])
    return Verdict(
        "warning" if share > VOID else "note",
        "void samples",
        f"{worst.void_samples:,} of {worst.expected_samples:,} {split} samples were void in epoch {epoch} "
        f"({percent_text(share)}), the most of {count_text(len(voided), 'entry', 'entries')}.",
        "They did not decode or had no finite loss: they weigh nothing in loss, accuracy and gradient.",
        "Verify the dataset with `python shards/verify.py` and rebuild it without them.",
    )


def changed_ground(curves: Curves) -> Verdict | None:
    """Config, class map or data that changed within one history."""
    kinds: dict[str, Callable[[Row], str | None]] = {
        "config": lambda row: row.digests.config,
        "class map": lambda row: row.digests.class_map,
        "train manifest": lambda row: row.digests.train_manifest,
        "val manifest": lambda row: row.digests.val_manifest,
    }
    changed = [kind for kind, of in kinds.items() if len({of(row) for row in curves.rows} - {None}) > 1]
    if not changed:
        return None
    return Verdict(
        "warning",
        "changed in mid-run",
        f"{list_text(changed)}: more than one digest in the {len(curves.rows)} rows.",
        "Epochs before and after the change were measured on different ground; their difference is not learning alone.",
        "Compare only epochs of one digest, or start a new run folder for what changed.",
    )


_REMEDIES = {
    "decoding": "Use more loader workers where cores are free, or smaller pictures (`shards/build.py --max-side`).",
    "disk": "Put the shards on a faster disk, or set data.cache_dir to a folder on one.",
    "bursts": "The loaders are fast enough and late all the same: raise data.prefetch_micro_batches.",
}


def input_bound(curves: Curves) -> Verdict | None:
    """A large part of the time spent waiting for data. The first epoch is left out where there are others: caches fill."""
    waits = list(finite(curves.wait_fraction).values())
    if not waits:
        return None
    share = median(waits[1:] or waits)
    if share < WAITING:
        return None
    told = [row.train for row in curves.rows if row.train.bound_by in _REMEDIES]
    last = told[-1] if told else None
    reading = f", {percent_text(last.read_fraction)} of the loaders' own time was reading" if last else ""
    return Verdict(
        "warning" if share >= STARVING else "note",
        "waiting for data",
        f"{percent_text(share)} of the time was spent waiting for the next batch (median over the epochs){reading}.",
        "The loader sets the pace and the device idles; a faster device would not help.",
        _REMEDIES[last.bound_by]
        if last and last.bound_by
        else "Use more loader workers, shards on a local disk, or smaller pictures.",
    )


def no_validation(curves: Curves) -> Verdict | None:
    """No epoch was evaluated."""
    if measured_losses(curves.val) or finite(curves.val.top1):
        return None
    return Verdict(
        "note",
        "no validation",
        "No epoch holds validation metrics.",
        "Whether the model generalises cannot be told from this history.",
        "Evaluate a val split at least every few epochs.",
    )


def different_ground(runs: Sequence[Curves]) -> Verdict | None:
    """Several runs that were not validated on the same samples and classes."""
    last = [curves.rows[-1].digests for curves in runs if curves.rows]
    if len({(digests.val_manifest, digests.class_map) for digests in last}) <= 1:
        return None
    return Verdict(
        "warning",
        "runs were validated on different data",
        f"{count_text(len(last), 'run')} hold {len({d.val_manifest for d in last})} val manifests and "
        f"{len({d.class_map for d in last})} class maps.",
        "Their accuracies are answers to different questions; a higher one is not a better model.",
        "Evaluate the checkpoints on one test split with `aplantida_dist.evaluate` and compare those numbers.",
    )


def _evaluated(rows: Sequence[Row]) -> dict[str, list[tuple[Row, SplitMetrics]]]:
    return {
        "train": [(row, row.train) for row in rows],
        "val": [(row, row.val) for row in rows if row.val is not None],
        "val_ema": [(row, row.val_ema) for row in rows if row.val_ema is not None],
    }


def _manifest(row: Row, split: str) -> str | None:
    return row.digests.train_manifest if split == "train" else row.digests.val_manifest
