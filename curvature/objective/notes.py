"""What a reader of results should know of an objective."""

from __future__ import annotations

from curvature.data.loaders import loader_notes
from curvature.objective.cancellation import cancellation_notes
from curvature.objective.interface import ObjectiveLike
from curvature.objective.product_noise import noise_notes

__all__ = ["notes_of"]


def notes_of(objective: ObjectiveLike) -> tuple[str, ...]:
    """Say which parameters are unused, what is kept, which route was taken."""
    notes = []
    used = objective.dependence.used
    if used and len(used) < len(objective._space.names):
        unused = [name for i, name in enumerate(objective._space.names) if i not in used]
        notes.append(f"The loss does not depend on {', '.join(unused)}: their rows and columns are zero.")
    if objective.num_batches is not None and len(objective.kept) > 0:
        num_kept, total = len(objective.kept), objective.num_batches
        which = "The graph of the batch is" if total == 1 else f"Graphs of {num_kept} of {total} batches are"
        which = f"Graphs of all {total} batches are" if 1 < total == num_kept else which
        notes.append(f"{which} kept between products ({objective.held_bytes / 2**20:.1f} MiB).")
    if any(lin.drew_random_numbers for lin in objective.kept):
        notes.append(
            "The model draws random numbers (dropout in train mode?): each batch has one fixed draw, set by its seed."
        )
    notes += loader_notes(objective.source.given)
    notes += [*objective.evaluator.notes(), *objective.trust.notes(), *noise_notes(objective)]
    return (*notes, *cancellation_notes(objective.freshness.measured()))
