"""Implicit bias on the data of a task: what `curvature bias` does.

The inputs and targets of a task, seen by linear models whose training has a theorem: deep ones learn one direction
after the other, and complete a matrix at low rank; diagonal ones end at a sparse or a smooth solution, by the size of
their start; and noise on the labels takes SGD to where the loss is flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from analysis.generalization.implicit_bias.data import LinearData, linear_data
from analysis.generalization.implicit_bias.deep_linear import learning_time, train_deep_linear
from analysis.generalization.implicit_bias.diagonal_linear import diagonal_linear_flow
from analysis.generalization.implicit_bias.label_noise import label_noise_descent, settled
from analysis.generalization.implicit_bias.results import DeepLinearRun, DiagonalRun, ImplicitBias, LabelNoiseRun
from analysis.records.plan import Plan, from_plan, setting
from analysis.show.listener import Progress
from curvature.arguments import checked_fields
from curvature.errors import InputError, NotConvergedError
from curvature.objective.objective import Objective

__all__ = ["ImplicitBiasPlan", "data_of", "implicit_bias", "times_of"]

_LEARNT = 0.1  # of the largest singular value: those above are learnt in the time there is
_START = 0.7  # v of all weights under label noise


@checked_fields
@dataclass(frozen=True, kw_only=True)
class ImplicitBiasPlan(Plan):
    """Which linear models are trained on the data of a task."""

    inputs: int = setting(64, "Inputs that are taken, those that vary most.", least=2)
    depths: tuple[int, ...] = setting(
        (1, 2, 3), "Numbers of layers of the deep linear networks; may be given several times.", flag="--depth N"
    )
    scale: float = setting(1e-3, "Singular values at their start, over the largest to be learnt.", above=0, most=0.1)
    rank: int = setting(2, "Rank of the matrix to be completed, made of examples and inputs.", least=1)
    hidden: float = setting(0.3, "Share of its entries that training does not see.", above=0, below=1)
    examples: int | None = setting(
        None,
        "Examples of the diagonal networks; label noise takes half of them. Default: half as many as inputs.",
        least=1,
    )
    teacher: int = setting(3, "Inputs that their targets depend on, drawn by the seed.", least=1)
    starts: int = setting(9, "Sizes of their start, ...", least=2)
    smallest: float = setting(1e-6, "... from this one ...", above=0)
    largest: float = setting(1e2, "... to this one.", above=0)
    noise: float = setting(0.7, "Noise on the labels.", above=0)
    steps: int = setting(40_000, "Steps of SGD with it.", least=100)
    lr: float | None = setting(None, "Its learning rate. Default: a quarter of the largest stable one.", above=0)
    repeats: int = setting(5, "Seeds of the noise.", least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths or len(set(self.depths)) < len(self.depths) or not all(1 <= n <= 8 for n in self.depths):
            raise InputError(f"depths must be different numbers from 1 to 8, got {self.depths}.")
        if not self.smallest < self.largest:
            raise InputError(f"smallest must be below largest, got {self.smallest:g} and {self.largest:g}.")


@from_plan(ImplicitBiasPlan)
def implicit_bias(
    objective: Objective, plan: ImplicitBiasPlan, *, generator: torch.Generator, progress: Progress | None = None
) -> ImplicitBias:
    """Train linear models on the data of a task, and hold the solutions they find against their theorems.

    - Deep linear networks learn the correlation of targets and whitened inputs: their singular values over time beside
      the closed form for a balanced start (Saxe et al. 2014).
    - The same networks complete a matrix of low rank, made of inputs, of which they see some entries: error on the
      hidden ones, effective rank, and the rates of the singular values beside those of Arora et al. (2019).
    - Diagonal networks b = u^2 - v^2 fit a few examples, whose targets a teacher with few weights has made, from small
      to large starts: distance to the solutions of least l1 and l2 norm, and to that of Woodworth et al. (2020).
    - SGD on b = v^2 with noise on the labels: tr H beside the flow of Li, Wang and Arora (2022), and the
      flattest solution.

    All is computed in float64 on the CPU, wherever the objective is; its model has no part in it.

    Cost: half a minute, for any model.

    Args:
        objective: whose data are pairs of inputs, floating-point numbers, and targets: class numbers (N,), or numbers.
        plan: settings; or pass them one by one.
        generator: of what is drawn, or a seed.
        progress: told after each training.

    Raises:
        InputError: for settings out of range, other data, or inputs or targets that do not vary.

    Examples:
        >>> from torch import nn
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(50, 8, generator=g)
        >>> objective = Objective(nn.Linear(8, 2), nn.MSELoss(), (x, x @ torch.randn(8, 2, generator=g)))
        >>> found = implicit_bias(objective, depths=(2,), starts=2, steps=1000, generator=0)
        >>> found.deep[0].deviation < 0.01, found.diagonal[-1].distance(found.diagonal[-1].least_l2) < 1e-3
        (True, True)
    """
    seed = generator.initial_seed() % 2**40
    data = data_of(objective, plan, seed)
    notes, done, total = list(data.notes), 0, 2 * len(plan.depths) + plan.starts + plan.repeats

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(what, done, total)

    deep, completed = list[DeepLinearRun](), list[DeepLinearRun]()
    for depth in plan.depths:
        times = times_of(data, plan, depth)
        deep.append(train_deep_linear(data.correlation, depth=depth, scale=plan.scale, time=times[0], generator=seed))
        tell(f"{depth} layers")
        completed.append(
            train_deep_linear(
                data.matrix,
                depth=depth,
                scale=plan.scale,
                time=times[1],
                observed=data.observed,
                aligned=False,
                generator=seed,
            )
        )
        tell(f"{depth} layers, hidden entries")
    targets, diagonal = data.X @ data.teacher, list[DiagonalRun]()
    exponents = math.log10(plan.smallest), math.log10(plan.largest)
    for alpha in torch.logspace(*exponents, plan.starts, dtype=torch.float64).tolist():
        try:
            diagonal.append(diagonal_linear_flow(data.X, targets, alpha))
        except (InputError, NotConvergedError) as error:
            notes.append(f"The start {alpha:.2g} was left out: {error}")
        tell(f"start {alpha:.1e}")
    if not diagonal:
        raise InputError(f"no diagonal network could be trained: {notes[-1]}")
    return ImplicitBias(
        deep=tuple(deep),
        completed=tuple(completed),
        diagonal=tuple(diagonal),
        noisy=_disturbed(data, plan, seed, notes, tell),
        scale=plan.scale,
        rank=int(torch.linalg.matrix_rank(data.matrix)),
        hidden=1 - float(data.observed.double().mean()),
        teacher=data.teacher,
        num_examples=len(data.X),
        noise=plan.noise,
        notes=tuple(notes),
    )


def times_of(data: LinearData, plan: ImplicitBiasPlan, depth: int) -> tuple[float, float]:
    """Return how long a network of so many layers is trained on the correlation, and on the matrix."""
    s = torch.linalg.svdvals(data.correlation)
    whole = learning_time(s[s >= _LEARNT], plan.scale, depth)
    s = torch.linalg.svdvals(data.matrix)
    return whole, 2 * learning_time(s[s >= _LEARNT], plan.scale, depth) / float(data.observed.double().mean())


def data_of(objective: Objective, plan: ImplicitBiasPlan, seed: int) -> LinearData:
    """Return what is trained on, with a note where the objective is elsewhere."""
    if objective.process_group is not None:
        raise InputError("this trains in one process; give an objective without process_group.")
    data = linear_data(
        objective,
        seed,
        inputs=plan.inputs,
        wanted=plan.examples,
        teacher=plan.teacher,
        rank=plan.rank,
        hidden=plan.hidden,
    )
    if objective.device.type == "cpu":
        return data
    return replace(
        data, notes=(*data.notes, "Linear models are trained on the CPU, in float64; the device had no part.")
    )


def _disturbed(
    data: LinearData, plan: ImplicitBiasPlan, seed: int, notes: list[str], tell: Callable[[str], None]
) -> tuple[LabelNoiseRun, ...]:
    """Return SGD with label noise on the first examples, as many as leave it room to move."""
    runs = list[LabelNoiseRun]()

    def left_out(error: Exception) -> tuple[LabelNoiseRun, ...]:
        notes.append(f"Label noise was left out: {error}")
        for _ in range(plan.repeats - len(runs)):
            tell("label noise")
        return ()

    n = max(1, min(len(data.X) // 2, data.X.shape[1] - 1))
    while True:
        X, y = data.X[:n], data.X[:n] @ data.teacher
        try:
            v = settled(X, y, _START)
            break
        except (InputError, NotConvergedError) as error:
            if n == 1:
                return left_out(error)
            n //= 2
    largest = 4 * float((X.square() @ v.square()).max())  # curvature of an example's loss
    lr = plan.lr or 0.5 / largest
    for r in range(plan.repeats):
        try:
            found = label_noise_descent(
                X, y, noise=plan.noise, lr=lr, steps=plan.steps, start=_START, generator=seed + r
            )
        except (InputError, NotConvergedError) as error:
            return left_out(error)
        runs.append(found)
        tell(f"label noise, seed {r + 1}")
    return tuple(runs)
