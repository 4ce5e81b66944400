"""All sharpness measures in one table, with errors, costs and caveats.

Reference: Andriushchenko, Croce, Mueller, Hein and Flammarion (2023), A modern look at the relationship between
sharpness and generalization, arXiv 2302.07011; Dinh, Pascanu, Bengio and Bengio (2017), Sharp minima can generalize for
deep nets, arXiv 1703.04933, for why invariance matters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from analysis.records.plan import from_plan
from analysis.run.cores import answers, one_core_each
from analysis.sharpness.catalogue import MEASURES, SharpnessPlan
from analysis.sharpness.computations import Found, masked_weights
from analysis.sharpness.results import SharpnessRow, SharpnessTable
from analysis.show.listener import Progress, stages
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.device import synchronize
from curvature.errors import InputError
from curvature.generators import spawn
from curvature.objective.memory_format import fast_layout
from curvature.objective.objective import Objective
from curvature.objective.pieces import in_fast_pieces
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import loss_at

__all__ = ["SHARPNESS_MEASURES", "SharpnessPlan", "measure_sharpness", "measures_for", "work_of"]

SHARPNESS_MEASURES: tuple[str, ...] = tuple(MEASURES)
"""Names of all measures."""


@in_whole_vectors
@from_plan(SharpnessPlan)
@full_precision
@checked
def measure_sharpness(
    objective: Objective, plan: SharpnessPlan, *, generator: torch.Generator, progress: Progress | None = None
) -> SharpnessTable:
    """Measure sharpness at the objective's point by several measures.

    Each measure draws from a stream of its own, so that a number does not depend on which others are asked for, and
    those of a small model are shared out among the cores. Of nominal 95 % intervals 92 to 96 % of the log-volume's and
    the PAC-Bayes measures' cover.

    Cost: see each row; with the default settings and all measures of a small network about 400 losses, 200 gradients
    and 300 products.

    Args:
        objective: the loss. Logit-normalised measures, Fisher-Rao and local volume need `loss=`.
        plan: settings; or pass them one by one. Without `measures` all that this objective allows.
        generator: source of all random numbers, on the objective's device.
        progress: told each measure before it is computed.

    Raises:
        InputError: for an unknown name, or one that the objective does not allow.
        NonFiniteError: if the loss overflows within the radius.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, nn.MSELoss(), (x, torch.zeros(2, 1)))  # of (w_1^2 + 4 w_2^2) / 2
        >>> names = ("top_eigenvalue", "trace")
        >>> table = measure_sharpness(objective, measures=names, generator=torch.Generator().manual_seed(0))
        >>> [(row.name, row.value, row.rescaling_invariant) for row in table.rows]
        [('top_eigenvalue', 4.0, False), ('trace', 5.0, False)]
    """
    measures = measures_for(objective, plan.measures)
    tell = stages(progress, len(measures))
    streams = dict(zip(MEASURES, spawn(generator, len(MEASURES)), strict=True))
    work = {name: work_of(name, objective, plan) for name in measures}
    cut = in_fast_pieces(objective) if any("products" in each for each in work.values()) else objective

    def measured(name: str) -> tuple[Found, float]:
        spec, start = MEASURES[name], time.perf_counter()
        if "products" in work[name]:
            found = spec.compute(cut, plan, streams[name])
        else:
            with fast_layout(objective):
                found = spec.compute(objective, plan, streams[name])
        synchronize(objective.device)
        return found, time.perf_counter() - start

    jobs = sorted(measures, key=lambda name: -_gradients_in(work[name]))  # what takes longest first
    rows = []
    with one_core_each(cut) as workers:
        share = answers(measured, jobs, workers, patience=0, begun=lambda name: tell(name.replace("_", " ")))
        for place, (found, seconds) in share:
            spec = MEASURES[jobs[place]]
            rows.append(
                SharpnessRow(
                    name=jobs[place],
                    value=found.value,
                    stderr=found.stderr,
                    dof=found.dof,
                    skewness=found.skewness,
                    kind="exact" if found.stderr == 0 else spec.kind,
                    unit=spec.unit,
                    formula=spec.formula,
                    source=spec.source,
                    rescaling_invariant=spec.invariant is not None,
                    unit_invariant=spec.invariant == "units",
                    num_matvecs=found.num_matvecs,
                    num_gradients=found.num_gradients,
                    num_losses=found.num_losses,
                    seconds=seconds,
                    details=found.details,
                )
            )
    loss = loss_at(objective, objective.space.current()).value
    rows.sort(key=lambda row: list(measures).index(row.name))
    left_out = tuple(name for name in MEASURES if plan.measures is None and name not in measures)
    return SharpnessTable(rows=tuple(rows), loss=loss, num_params=objective.num_params, left_out=left_out)


@checked
def measures_for(objective: Objective, measures: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names asked for, checked, or all that this objective allows.

    Raises:
        InputError: for an unknown or repeated name, or none.
    """
    if measures is None:
        names = [
            name
            for name, spec in MEASURES.items()
            if (objective.has_split or not spec.needs_split) and (objective.has_likelihood or not spec.needs_likelihood)
        ]
        if objective.has_split and not _of_outputs_alone(objective):
            names = [name for name in names if not MEASURES[name].needs_outputs]
        if masked_weights(objective) or all(t.ndim < 2 for t in objective.space.tensors.values()):
            names.remove("relative_flatness")
        if objective.process_group is not None:  # which ranks' pieces of data would be, is not defined
            names = [name for name in names if not name.endswith("m_sharpness")]
        return tuple(names)
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures or len(set(measures)) < len(measures):
        wrong = unknown or ("a repeated name" if measures else "none")
        raise InputError(f"measures must be distinct names out of {', '.join(MEASURES)}; got {wrong}.")
    return tuple(measures)


def _of_outputs_alone(objective: Objective) -> bool:
    """Say whether the loss depends on the parameters through the outputs alone, from the first batch."""
    try:
        for lin in objective.linearizations():
            lin.batch_outputs()
            break
    except InputError:
        return False
    return True


def work_of(name: str, objective: Objective, s: SharpnessPlan) -> dict[str, float]:
    """Return about how many products, gradients and losses away from the point a measure takes."""
    if "top_eigenvalue" in name:
        return {"products": 16.0}
    if "trace" in name or "frobenius" in name:
        return {"products": s.num_matvecs}
    if "worst" in name:
        return {"gradients": 0.8 * s.num_steps * s.num_restarts}
    if "average" in name:
        return {"losses": 2 * s.num_probes + 1}
    if "pac_bayes" in name:
        return {"losses": 8 * s.num_probes + 1}
    layers = sum(t.ndim >= 2 for t in objective.space.tensors.values())
    other: dict[str, dict[str, float]] = {
        "relative_flatness": {"products": layers * s.num_matvecs},
        "log_volume": {"products": 72.0},
        "keskar": {"gradients": 2.4 * s.box_iterations},
        "fisher_rao": {"products": 1.0},
    }
    return other.get(name, {} if "m_sharpness" in name else {"gradients": 1.0, "losses": 1.0})


def _gradients_in(work: dict[str, float]) -> float:
    """Return how many gradients' time work takes, about."""
    return 2 * work.get("products", 0.0) + work.get("gradients", 0.0) + work.get("losses", 0.0) / 3
