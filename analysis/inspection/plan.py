"""What an inspection will cost, before it is paid: products from the plan, seconds from timed products."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from analysis.inspection.parts import parts_of
from analysis.records.plan import Plan, setting
from analysis.run.cores import one_core_each
from analysis.run.study import Price
from analysis.show.wording import count, duration, memory
from curvature.arguments import checked_fields
from curvature.environment.cost import current_memory, median_seconds, peak_memory, timed
from curvature.errors import InputError
from curvature.layerwise import num_columns
from curvature.layerwise.blocks import pays
from curvature.objective.objective import Objective
from curvature.operators.hessian import HessianOperator
from curvature.parameters import Block
from curvature.spectra.spectrum_plan import SpectrumPlan

__all__ = [
    "COUPLING",
    "COUPLING_PROBES",
    "DIAGONAL",
    "DIAGONAL_MATVECS",
    "LAYERS",
    "MOST_COLUMNS",
    "WHOLE",
    "InspectionPlan",
]

WHOLE, LAYERS, COUPLING = "the whole Hessian", "layer by layer", "coupling of layers"
DIAGONAL = "the diagonal"
COUPLING_PROBES = 8
DIAGONAL_MATVECS = 24
"""Products that an estimate of the diagonal takes, where it cannot be had exactly."""
_PATIENCE = 1  # so many times the planned products again at each end: at most three times the price, the search aside
MOST_COLUMNS = 1000
"""Columns that an exact diagonal may take, about a gradient each; beyond them an estimate is the better bargain."""


@checked_fields
@dataclass(frozen=True, kw_only=True)
class InspectionPlan(Plan):
    """How many eigenpairs, probes and steps an inspection takes, for the whole Hessian and for each layer.

    A matrix with fewer columns than its estimates would take products is built entry by entry: cheaper, and exact.

    Raises:
        InputError: for values out of range.
    """

    k: int = setting(10, "Number of largest eigenvalues (all, if there are fewer); one for each layer.", least=1)
    num_bottom: int = setting(3, "Number of smallest eigenvalues; one for each layer.", least=1)
    rtol: float = setting(
        1e-3,
        "Relative residual of the largest eigenpairs; ten times that for layers, thirty times for the smallest.",
        above=0,
        most=0.1,
    )
    num_probes: int = setting(4, "Random probes, for the whole model and for each layer.", least=2)
    num_steps: int = setting(
        24,
        "Block Lanczos steps on the whole model, two fifths of that on layers; more where eigenpairs need them.",
        least=4,
    )
    layers: bool = setting(True, "Also inspect each layer.")
    most_layers: int = setting(
        16,
        "Layers to inspect one by one. Of more, the modules that hold them are inspected, such as transformer blocks, "
        "and eigenvalues are those of the planned products.",
        least=1,
    )
    coupling: bool = setting(False, "Also measure the coupling between layers.")

    @property
    def whole(self) -> SpectrumPlan:
        """The plan of the whole Hessian."""
        return SpectrumPlan(
            k=self.k,
            num_bottom=self.num_bottom,
            rtol=self.rtol,
            num_probes=self.num_probes,
            num_steps=self.num_steps,
            num_deflated=self.k,
            patience=_PATIENCE,
        )

    def layer(self, objective: Objective) -> SpectrumPlan:
        """Return the plan of each layer: of many layers, pairs are those of the planned products, as far as they come.

        To continue them, and to look for pairs that were missed, takes more products than all else, one at a time.
        """
        few = len(objective.space.blocks) <= self.most_layers
        return SpectrumPlan(
            patience=_PATIENCE if few else 0,
            confidence=0.99 if few else None,
            k=1,
            num_bottom=1,
            rtol=min(0.1, 10 * self.rtol),
            num_probes=self.num_probes,
            num_steps=max(4, 2 * self.num_steps // 5),
            num_deflated=self.k,
        )

    def layer_blocks(self, objective: Objective) -> tuple[Block, ...]:
        """Return the blocks to inspect one by one; none where a single module owns all parameters."""
        blocks = parts_of(objective, self.most_layers) if self.layers else ()
        return blocks if len(blocks) > 1 else ()

    def left_out(self, objective: Objective) -> str:
        """Return, in words, what is not done because the layers are many; nothing where they are few."""
        layers = len(objective.space.blocks)
        if not self.layers or layers <= self.most_layers:
            return ""
        parts = len(self.layer_blocks(objective))
        taken = f", taken in {count(parts)} parts," if parts < layers else ""
        return f"; the eigenvalues of {count(layers)} layers{taken} are not continued (--most-layers {layers} does it)"

    def total_matvecs(self, objective: Objective) -> tuple[int, int]:
        """Return the products with the whole Hessian and with all layers."""
        of_layers = self._layer_matvecs(objective, self.layer_blocks(objective))
        n = objective.num_params
        whole = self.whole.num_matvecs(n) + self.whole.num_search(n)
        return whole + self.coupling_matvecs(objective) + self.diagonal_matvecs(objective), of_layers

    def _layer_matvecs(self, objective: Objective, blocks: tuple[Block, ...]) -> int:
        layer = self.layer(objective)
        return sum(layer.num_matvecs(block.num_params) + layer.num_search(block.num_params) for block in blocks)

    def coupling_matvecs(self, objective: Objective) -> int:
        """Return the products with the whole Hessian that the coupling of layers takes."""
        blocks = objective.space.blocks
        if not self.coupling or len(blocks) < 2:
            return 0
        return sum(min(block.num_params, COUPLING_PROBES) for block in blocks)

    def diagonal_matvecs(self, objective: Objective) -> int:
        """Return the products that the diagonal takes: none where columns give it exactly."""
        if not self.layers or _columns(objective) is not None:
            return 0
        return min(objective.num_params, DIAGONAL_MATVECS)

    def price(self, objective: Objective) -> Price:
        """Return products, seconds and memory, from a few products that are timed; the first builds the graphs.

        Raises:
            NonFiniteError: if the loss or gradient is not finite, so that there is nothing to plan.
            InputError: if the vectors do not fit into memory.
        """
        H = HessianOperator(objective)
        n, device = objective.num_params, objective.device
        blocks = self.layer_blocks(objective)
        held, where, on_bases = 0, "", 0.0
        for plan, sizes in ((self.whole, [n]), (self.layer(objective), [block.num_params for block in blocks])):
            if sizes:  # refused before anything takes long
                plan.check_memory(H, sizes, place := plan.place(H, sizes))
                bases, others = plan.parts_of_bytes(H, sizes)
                held = max(held, others + (0 if place == "disk" else bases))
                where = f" and {memory(bases)} on disk" if place == "disk" else where
                on_bases += plan.seconds_of_bases(H, sizes, place, objective.num_batches or 0)
        v = torch.full((n, min(self.num_probes, n)), n**-0.5, dtype=objective.dtype, device=device)
        with one_core_each(objective) as cores:
            _ = H @ v[:, :1]
            columns = _columns(objective) if self.layers else None
            multiplied = tuple(block for block in blocks if columns is None or not pays(block, columns))
            cores = min(cores, objective.num_batches or 1)
            each = median_seconds(lambda: H @ v, device, objective.ranks) / v.shape[1] / cores
            layers = _layer_seconds(H, multiplied, self) / cores if multiplied else 0.0
        held += objective.held_bytes if cores > 1 else 0
        whole, of_layers = self.total_matvecs(objective)
        total = whole * each + on_bases + layers
        if self.layers:
            total += (columns or 0) * each / 2  # one a gradient, and a product is about two
        most = memory(max(peak_memory(device), current_memory(device) + held))
        products = f"{count(whole)} Hessian products"
        if multiplied:
            products += f" and {count(self._layer_matvecs(objective, multiplied))} with single layers"
        text = f"about {products} at {duration(each)} a product, up to {most}{where}{self.left_out(objective)}"
        return Price(text, total, whole + of_layers, "products")


def _columns(objective: Objective) -> int | None:
    """Return how many columns the exact diagonal takes; None if it is not to be had so or too dear. Found once."""
    objective.freshness.point()
    known = objective.freshness.measured()
    if "columns of the diagonal" not in known:
        try:
            columns = num_columns(objective, "hessian")
        except InputError:
            columns = MOST_COLUMNS + 1
        known = objective.freshness.measured()  # of the walk that this took
        known["columns of the diagonal"] = columns if columns <= MOST_COLUMNS else None
    found: int | None = known["columns of the diagonal"]
    return found


def _layer_seconds(H: HessianOperator, blocks: tuple[Block, ...], plan: InspectionPlan) -> float:
    """Return what the products with all layers will take, from one with a column for each."""
    columns = [torch.ones(block.num_params, 1, dtype=H.dtype, device=H.device) for block in blocks]
    _, seconds = timed(lambda: H.products(columns, blocks), H.device)
    layer, sizes = plan.layer(H.objective), [block.num_params for block in blocks]
    walks = max(map(layer.num_matvecs, sizes))
    return (walks + sum(map(layer.num_search, sizes)) / len(sizes)) * seconds  # pairs are continued one by one
