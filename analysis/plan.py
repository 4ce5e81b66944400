"""What an inspection will cost, before it is paid: products from the plan, seconds from one timed product."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import psutil
import torch

from analysis.results import CostEstimate
from curvature.errors import InputError
from curvature.memory import available_memory
from curvature.objective import Objective
from curvature.operators import HessianOperator
from curvature.parameters import Block

__all__ = ["InspectionPlan", "estimate_cost", "peak_memory", "synchronize"]

ALL_ENTRIES, TOP, BOTTOM, DENSITY = "all entries", "largest eigenvalues", "smallest eigenvalues", "density and trace"
BLOCK_SHARE = 0.3
"""Cost of a product with one layer's block, in products with the whole: 0.01 (last layer) to 0.45 (first) measured."""
PATIENCE = 4
"""The eigensolver stops at so many times the products planned, and says which pairs did not converge."""
MEMORY_SHARE = 0.1
"""Of the free memory, for the eigensolver's basis."""


@dataclass(frozen=True, kw_only=True)
class InspectionPlan:
    """How many eigenpairs, probes and steps an inspection takes, for the whole Hessian and for each layer.

    A matrix with fewer columns than its estimates would take products is built entry by entry: cheaper, and exact.

    Raises:
        InputError: for values out of range.
    """

    k: int = 10
    """Largest eigenvalues to compute (all, if there are fewer), of the whole Hessian and of each layer."""
    num_bottom: int = 3
    """Smallest eigenvalues of the whole Hessian to compute (all, if there are fewer). Layers: one."""
    rtol: float = 1e-3
    """Residual of the largest eigenpairs, relative to the eigenvalue. Layers: ten, smallest: thirty times that."""
    num_probes: int = 4
    """Probes of the density and trace, for the whole Hessian and for each layer."""
    num_steps: int = 30
    """Lanczos steps for each probe of the whole Hessian. Layers: two fifths."""
    layers: bool = True
    """Whether each layer is inspected too."""

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("num_bottom", 1), ("num_probes", 2), ("num_steps", 4)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.rtol <= 0.1:
            raise InputError(f"rtol must lie in (0, 0.1], got {self.rtol}.")

    @property
    def layer_rtol(self) -> float:
        return min(0.1, 10 * self.rtol)

    @property
    def bottom_rtol(self) -> float:
        return min(0.1, 30 * self.rtol)

    @property
    def layer_steps(self) -> int:
        return max(4, 2 * self.num_steps // 5)

    def layer_blocks(self, objective: Objective) -> tuple[Block, ...]:
        """Return the blocks to inspect one by one; none where a single module owns all parameters."""
        blocks = objective.space.blocks
        return blocks if self.layers and len(blocks) > 1 else ()

    def matvecs(self, num_params: int) -> dict[str, int]:
        """Return the products of each stage for the whole Hessian of size n: n if it is built entry by entry."""
        sampled = {
            TOP: _top_matvecs(self.k),
            BOTTOM: _bottom_matvecs(self.num_bottom),
            DENSITY: self.num_probes * self.num_steps,
        }
        return sampled if num_params > sum(sampled.values()) else {ALL_ENTRIES: num_params}

    def layer_matvecs(self, num_params: int) -> dict[str, int]:
        """Return the same for one layer of n parameters."""
        sampled = {TOP: _top_matvecs(self.k), BOTTOM: _bottom_matvecs(1), DENSITY: self.num_probes * self.layer_steps}
        return sampled if num_params > sum(sampled.values()) else {ALL_ENTRIES: num_params}

    def total_matvecs(self, objective: Objective) -> tuple[int, int]:
        """Return the products with the whole Hessian and with all layers."""
        of_layers = (self.layer_matvecs(block.num_params) for block in self.layer_blocks(objective))
        return sum(self.matvecs(objective.num_params).values()), sum(sum(stages.values()) for stages in of_layers)


def _top_matvecs(k: int) -> int:
    """Return about how many products the k largest pairs of a trained network take; the truth depends on gaps."""
    return 10 + 2 * k


def _bottom_matvecs(k: int) -> int:
    """Return the same for the k smallest, which lie close together and far below the norm."""
    return 20 + 8 * k


def num_basis(n: int, k: int, itemsize: int, device: torch.device) -> int:
    """Return how many vectors the eigensolver holds for k pairs: 100, or what fits into a share of the free memory.

    Without restarts the smallest eigenvalues of a trained network take a third of the products; a hundred vectors do.
    """
    fits = int(MEMORY_SHARE * available_memory(device) / (n * itemsize))
    return min(n, max(2 * k + 1, 20, min(100, fits)))


def estimate_cost(objective: Objective, plan: InspectionPlan) -> CostEstimate:
    """Predict products, seconds and memory of an inspection. Cost: two products, the first of which builds the graphs.

    Raises:
        NonFiniteError: if the loss or gradient is not finite, so that there is nothing to plan.
    """
    H = HessianOperator(objective)
    n, device = objective.num_params, objective.device
    v = torch.full((n,), n**-0.5, dtype=objective.dtype, device=device)
    _ = H @ v
    synchronize(device)
    start = time.perf_counter()
    _ = H @ v
    synchronize(device)
    seconds = time.perf_counter() - start
    whole, of_layers = plan.total_matvecs(objective)
    basis = n if ALL_ENTRIES in plan.matvecs(n) else max(num_basis(n, plan.k, v.element_size(), device), plan.num_steps)
    vectors = basis + plan.k + plan.num_bottom + plan.num_probes
    return CostEstimate(
        num_matvecs=whole,
        num_layer_matvecs=of_layers,
        seconds_per_matvec=seconds,
        seconds=(whole + BLOCK_SHARE * of_layers) * seconds,
        peak_bytes=max(peak_memory(device), _current_memory(device) + vectors * n * v.element_size()),
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that clocks mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes ever in use: of torch on a CUDA device, else of the process since its start."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _current_memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)
