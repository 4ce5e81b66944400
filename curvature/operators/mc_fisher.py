"""The Fisher matrix of an objective, estimated from targets that the model draws."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from curvature.arguments import checked
from curvature.engine.linearize import Linearization
from curvature.engine.output_metrics import SampledFisher
from curvature.errors import InputError
from curvature.generators import AnyGenerator, spawn
from curvature.objective.objective import Objective
from curvature.operators._objective_operator import (
    MetricOperator,
    check_fixed_order,
    check_likelihood,
    check_order_kept,
)
from curvature.operators.fisher import FisherOperator
from curvature.parameters import Block

_WHY = "drawn targets belong to places in the data"


class MCFisherOperator(MetricOperator):
    """F^ = sum_t c_t J_t' (1/S sum_s s_ts s_ts') J_t / W, s_ts the gradient of -log p(y_ts | z_t), y_ts ~ p(y | z_t).

    An unbiased estimate of `FisherOperator`, with its sum, weights and distributions: S targets are drawn for every one
    in the data, also within a sequence. The generator fixes them at construction, so that this is one symmetric,
    positive semi-definite matrix; where the parameters move, draws follow the model under the same random numbers.

    Standard errors of the entries fall as 1 / sqrt(S). `FisherOperator` is exact at the same cost a product; the
    estimate serves as a factor (rank at most S times the targets), for comparisons and to study Monte Carlo noise.

    Cost of one product: that of `GGNOperator`; the draws are made once a batch (once a product for graphs that are not
    kept) and held as their frequencies, one number an output.

    Args:
        objective: one with cross-entropy, squared error or binary cross-entropy with logits, over data in fixed order.
        num_samples: S, draws a target.
        generator: where the draws come from, or a seed; one number is taken of it. Draws differ between kinds of
            device. With a `process_group` the ranks pass generators in the same state and draw differently nonetheless.
        block: restricts the matrix to some parameters; see `restrict`.

    Raises:
        InputError: for another loss, or fewer samples than one.
        DataError: if the loader shuffles.

    Reference: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature.

    Examples:
        >>> import torch
        >>> from curvature import MCFisherOperator, Objective
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> data = (torch.ones(1, 1), torch.zeros(1, 2))
        >>> generator = torch.Generator().manual_seed(0)
        >>> A = MCFisherOperator(Objective(model, torch.nn.MSELoss(), data), num_samples=10_000, generator=generator)
        >>> A.to_dense().round(decimals=1)  # the exact one: (2 / 2) I
        tensor([[1., 0.],
                [0., 1.]])
    """

    @checked
    def __init__(
        self, objective: Objective, *, num_samples: int = 1, generator: AnyGenerator, block: Block | None = None
    ) -> None:
        check_likelihood(objective, "the Fisher matrix")
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}.")
        check_fixed_order(objective, _WHY)
        seed = spawn(generator, 1)[0].initial_seed()
        rank = 0 if objective.process_group is None else dist.get_rank(objective.process_group)
        super().__init__(objective, SampledFisher(num_samples, seed, rank), block)
        self.num_samples = num_samples

    @property
    def product_noise(self) -> float:
        """That of the Fisher matrix, since in another dtype other targets would be drawn."""
        return FisherOperator(self.objective, self.block).product_noise

    def _of_batch(self, lin: Linearization, X: Tensor, block: Block | None) -> Tensor:
        check_order_kept(self.objective, _WHY)
        return super()._of_batch(lin, X, block)
