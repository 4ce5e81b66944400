"""What each method of pruning predicts of the loss, and what the loss does, layer by layer and for all together.

References: LeCun, Denker and Solla (1990); Hassibi and Stork (1993); Singh and Alistarh (2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from analysis.generalization.pruning.removal import held, loss_changes, true_changes
from analysis.generalization.pruning.results import ALL, EACH, PruningPoint, PruningRecord
from analysis.generalization.pruning.scores import (
    LARGEST_DENSE,
    METHODS,
    PruningScores,
    curvature_diagonal,
    pruning_scores,
)
from analysis.generalization.pruning.tickets import lottery_tickets
from analysis.records.plan import Plan, from_plan, setting
from analysis.run.preparation import in_groups
from analysis.show.listener import Progress
from curvature.arguments import checked, checked_fields
from curvature.data.parts import num_examples, take
from curvature.environment.autocast import full_precision
from curvature.errors import CurvatureError, InputError
from curvature.generators import spawn
from curvature.layerwise.diagonal import num_columns
from curvature.objective.objective import Objective

__all__ = ["PruningPlan", "measure_pruning"]

_USUAL = ("random", "magnitude", "obd", "woodfisher", "kfac", "obs", "obs-greedy")
_COLUMNS = 8  # displacements at a time
_MOST_EXACT, _SAMPLES = 128, 16  # columns of the Gauss-Newton matrix an example; beyond, samples


@checked_fields
@dataclass(frozen=True, kw_only=True)
class PruningPlan(Plan):
    """How to prune, and what to train again."""

    methods: tuple[str, ...] = setting(
        (),
        f"Who chooses the weights; may be given several times: {', '.join(METHODS)}. Default: {', '.join(_USUAL)}, "
        "those that serve.",
        flag="--method NAME",
    )
    sparsities: tuple[float, ...] = setting(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.8),
        "Share of the weights to remove; may be given several times.",
        flag="--sparsity SHARE",
    )
    matrix: Literal["ggn", "hessian"] = setting("ggn", "Matrix of obd and obs.")
    damping: float | None = setting(
        None, "Added to matrices that are inverted. Default: 0.01 times their mean diagonal entry.", least=0
    )
    block_size: int = setting(128, "Of woodfisher: weights in a block.", least=1)
    held_out: float = setting(
        0.2,
        "Share of the data (of the batches, where there are several) that takes no part in the scores, for changes "
        "held out and tickets.",
        least=0,
        below=1,
    )
    tickets: int = setting(
        0,
        "Train lottery tickets with so many seeds, at the sparsities from a half on, iterative at all, or the largest.",
        least=0,
    )
    steps: int = setting(300, "Steps of each of these trainings.", least=1)
    rewind: int = setting(0, "Steps after the beginning that tickets are rewound to.", least=0)
    iterative: bool = setting(
        False, "Prune each sparsity of tickets from the trained ticket of the one before; give a ladder of them."
    )
    lr: float = setting(0.1, "Learning rate of these trainings, SGD with momentum 0.9.", above=0)
    batch_size: int = setting(64, "Batch size of these trainings.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.methods) - METHODS.keys()):
            raise InputError(f"methods must be among {', '.join(METHODS)}, got {', '.join(unknown)}.")
        if len(set(self.methods)) < len(self.methods):
            raise InputError("methods must be distinct.")
        if not self.sparsities or not all(0 < s <= 1 for s in self.sparsities):
            raise InputError(f"sparsities must lie above 0 and be at most 1, got {self.sparsities}.")
        if self.tickets and not self.rewind < self.steps:
            raise InputError(f"rewind must lie below steps, {self.steps}; got {self.rewind}.")
        if self.tickets and not self.held_out:
            raise InputError("tickets are judged on data held out; give held_out, such as 0.2.")

    def ladder(self) -> list[float]:
        """Return the sparsities of tickets."""
        least = 0.0 if self.iterative else 0.5
        return sorted({s for s in self.sparsities if least <= s < 1}) or [min(0.9, max(self.sparsities))]

    def wanted(self, num_params: int) -> tuple[str, ...]:
        """Return the methods to try, of an objective with so many parameters."""
        return self.methods or tuple(m for m in _USUAL if not m.startswith("obs") or num_params <= LARGEST_DENSE // 2)


@from_plan(PruningPlan)
@full_precision
@checked
def measure_pruning(
    objective: Objective, plan: PruningPlan, *, generator: torch.Generator, progress: Progress | None = None
) -> PruningRecord:
    """Remove weights by several methods, and compare what the loss does with what was predicted.

    A share of the data is held out. On the rest each method scores all weights once; its lowest are removed from one
    tensor at a time, from all tensors by one ranking, and the same share from each; brain surgeons move the others,
    biases included. Weights that may be removed are entries of tensors of two dimensions or more, and sparsity counts
    these.

    Cost: for each method, tensor and sparsity a Hessian product, a loss, and one on held-out data; scores as
    `pruning_scores` says; tickets as `lottery_tickets`.

    Args:
        objective: the loss at the trained point; it stays as it is. Its data are held in memory.
        plan: settings; or pass them one by one.
        generator: draws random scores, data held out and seeds; a generator on the objective's device, or a seed.
        progress: told after each method and layer.

    Raises:
        InputError: for settings out of range, a method asked for that does not serve, or data that cannot be parted.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> objective = Objective(model, nn.MSELoss(), (x, x.sum(1, keepdim=True)))
        >>> found = measure_pruning(objective, methods=("obd",), sparsities=(0.5,), held_out=0.0, generator=0)
        >>> [(p.layer, p.num_pruned, p.predicted, p.true) for p in found.points][:2]  # of (1 + 4) / 4
        [('weight', 2, 1.25, 1.25), ('all', 2, 1.25, 1.25)]
    """
    streams = spawn(generator, 4)
    notes, points, dampings = list[str](), list[PruningPoint](), dict[str, float]()
    objective.source.confirm()  # which shows whether a loader shuffles
    if objective.shuffles:
        notes.append("The loader shuffles: its batches were drawn once, and another run draws others.")
    ours, theirs = _parted(held(objective), plan.held_out, streams[0])
    scale = 1.0
    if theirs is not None and ours.is_sum:
        scale = _num_examples(ours) / _num_examples(theirs)
        notes.append("The loss is a sum: held-out losses and changes are scaled to as many examples as the others.")
    samples = _samples(ours)
    if samples:
        notes.append(
            f"Gauss-Newton diagonals and factors are from {samples} samples: exact ones would take too many columns."
        )
    diagonal = _diagonal(ours, samples, streams[3])
    methods, layers = plan.wanted(objective.num_params), dict[str, int]()
    seed = streams[1].initial_seed()
    done, total = (
        0,
        len(methods) * (2 + sum(t.ndim >= 2 for t in objective.space.tensors.values())) + bool(plan.tickets),
    )
    for method in methods:
        try:
            scores = pruning_scores(
                ours,
                method,  # type: ignore[arg-type]  # the plan has checked it
                matrix=plan.matrix,
                damping=plan.damping,
                block_size=plan.block_size,
                mc_samples=samples,
                generator=seed % 2**62,
            )
        except CurvatureError as error:
            if plan.methods or method == "magnitude":
                raise
            notes.append(f"{method} was left out: {error}")
            continue
        if scores.damping:
            dampings[method] = scores.damping
        layers = {name: math.prod(shape) for name, (_, shape) in scores.tensors.items()}
        for layer in (*layers, ALL, EACH):
            if progress is not None:
                progress(f"{method}, {layer}", done, total)
            points += _points(scores, layer, sorted(set(plan.sparsities)), ours, theirs, diagonal, scale)
            done += 1
    tickets = None
    if plan.tickets:
        assert theirs is not None
        tickets = lottery_tickets(
            ours.replace(micro_batch=None),
            theirs.settings["data"],
            sparsities=plan.ladder(),
            num_seeds=plan.tickets,
            steps=plan.steps,
            rewind=plan.rewind,
            iterative=plan.iterative,
            lr=plan.lr,
            batch_size=plan.batch_size if len(ours.settings["data"]) == 1 else None,
            generator=streams[2],
            progress=progress,
        )
    if not any(math.isfinite(p.predicted_stderr) for p in points):
        notes.append("The data are one batch whose examples are coupled, or few: changes have no error over the data.")
    return PruningRecord(
        points=tuple(points),
        layers=layers,
        loss=float(ours.loss()),
        held_out_loss=math.nan if theirs is None else scale * float(theirs.loss()),
        num_params=objective.num_params,
        dampings=dampings,
        tickets=tickets,
        notes=tuple(notes),
    )


def _points(
    scores: PruningScores,
    layer: str,
    sparsities: list[float],
    ours: Objective,
    theirs: Objective | None,
    diagonal: Tensor | None,
    scale: float,
) -> Iterator[PruningPoint]:
    squares = scores.weights.double().square() / 2
    only = None if layer in (ALL, EACH) else layer
    chosen = [scores.pruned(s, only=only, scope="uniform" if layer == EACH else "global") for s in sparsities]
    for start in range(0, len(chosen), _COLUMNS):
        some = chosen[start : start + _COLUMNS]
        removals = [scores.removal(pruned) for pruned in some]
        D = torch.stack([d for d, _ in removals], dim=1)
        here = loss_changes(ours, D)
        unknown = torch.full((len(some),), torch.nan)
        held_out, held_out_stderr = (unknown, unknown) if theirs is None else true_changes(theirs, D)
        for k, pruned in enumerate(some):
            yield PruningPoint(
                method=scores.method,
                layer=layer,
                sparsity=sparsities[start + k],
                num_pruned=int(pruned.sum()),
                linear=float(here.linear[k]),
                curvature=float(here.curvature[k]),
                predicted_stderr=float(here.predicted_stderr[k]),
                own=removals[k][1],
                diagonal=math.nan if diagonal is None else float((squares * diagonal.double())[pruned].sum()),
                size=float(squares[pruned].sum()),
                true=float(here.true[k]),
                true_stderr=float(here.true_stderr[k]),
                held_out=scale * float(held_out[k]),
                held_out_stderr=scale * float(held_out_stderr[k]),
            )


def _samples(objective: Objective) -> int:
    """Return how many samples stand for the columns of the Gauss-Newton matrix; 0 where these are few enough."""
    try:
        return 0 if num_columns(objective, "ggn") <= _MOST_EXACT else _SAMPLES
    except CurvatureError:  # without rules every example takes its own columns
        return _SAMPLES


def _diagonal(objective: Objective, samples: int, generator: torch.Generator) -> Tensor | None:
    try:
        return curvature_diagonal(objective, "ggn", samples, generator)
    except CurvatureError:
        return None


def _parted(objective: Objective, share: float, generator: torch.Generator) -> tuple[Objective, Objective | None]:
    """Return the objective on some of its data, and on the others; both in groups where examples can be told apart."""
    whole = list(objective.replace(micro_batch=None).batches())
    if share == 0:
        return in_groups(objective), None
    if len(whole) == 1:
        count = num_examples(whole[0])
        order = torch.randperm(count, generator=generator, device=generator.device).tolist()
        cut = count - round(share * count)
        pieces = [take(whole[0], sorted(rows), count) for rows in (order[:cut], order[cut:]) if rows]
        parts = [[piece] for piece in pieces]
    else:
        count = round(share * len(whole))
        chosen = {(i + 1) * len(whole) // count - 1 for i in range(count)}
        parts = [[batch for i, batch in enumerate(whole) if (i in chosen) is out] for out in (False, True)]
    if len(parts) < 2 or not all(parts):
        raise InputError(f"a share of {share:g} of these data is no example or batch, or all of them; give held_out=0.")
    ours, theirs = (in_groups(objective.replace(data=part, micro_batch=None)) for part in parts)
    return ours, theirs


def _num_examples(objective: Objective) -> int:
    return sum(num_examples(batch) for batch in objective.settings["data"])
