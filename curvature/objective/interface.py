"""What the parts of an objective see of it, so that none of them imports the class that is made of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from curvature.autograd.lean_trust import LeanTrust
from curvature.data.batches import DataSource
from curvature.engine.evaluation import Evaluator
from curvature.engine.kept_graphs import KeptGraphs
from curvature.engine.linearize import Linearization
from curvature.objective.coupling import Cuts
from curvature.objective.dependence import Dependence
from curvature.objective.ranks import Compared, Point
from curvature.parameters import ParameterSpace

__all__ = ["ObjectiveLike", "Watch"]


class Watch(Point, Protocol):
    """What a check asks of `curvature.objective.freshness.Freshness`."""

    def check_kept(self) -> None: ...

    def point(self) -> object: ...

    def measured(self) -> dict[Hashable, Any]: ...


class ObjectiveLike(Compared, Protocol):
    """An objective; `curvature.Objective` says what its members mean."""

    evaluator: Evaluator
    source: DataSource
    kept: KeptGraphs
    trust: LeanTrust
    cuts: Cuts
    dependence: Dependence
    _space: ParameterSpace
    _total_weight: float | None

    @property
    def freshness(self) -> Watch: ...

    @property
    def held_bytes(self) -> int: ...

    @property
    def may_keep_graphs(self) -> bool: ...

    @property
    def keeps_all_graphs(self) -> bool: ...

    @property
    def num_params(self) -> int: ...

    @property
    def num_batches(self) -> int | None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def closed_form_loss(self) -> bool: ...

    def batches(self) -> Iterator[Any]: ...

    def linearise(self, batch: Any, index: int = 0) -> Linearization: ...

    def loss(self) -> Tensor: ...

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]: ...

    def mean(self, parts: Iterable[tuple[float, Tensor]], vectors: Sequence[Tensor] = ()) -> Tensor: ...

    def replace(self, **changes: Any) -> ObjectiveLike: ...

    def release(self) -> None: ...
