"""What one step's batches say about the layers' factors: sums over columns, micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvature.autograd.backward import no_autocast, pull_back
from curvature.environment.precision import tf32_off
from curvature.errors import NonFiniteError
from curvature.per_example.capture import Capture
from optimizers.kronecker.factors import FactorSums, State
from optimizers.kronecker.layers import KFAC_RULES, Layer, layer_calls
from optimizers.kronecker.uncounted import Uncounted
from optimizers.shared.ranks import average_over_ranks

__all__ = ["Statistics"]


@dataclass
class Statistics:
    """Sums for the coming step.

    Attributes:
        params: all parameters that have factors if a layer uses them; layers name them by place.
        sums: of each layer, by the place of its main parameter.
        layers: those seen.
        reasons: place of a parameter -> why it has no factors.
        num_batches: measured.
        uncounted: what earlier steps found on uses that no factors hold.
    """

    params: Sequence[Tensor]
    uncounted: Uncounted
    sums: dict[int, FactorSums] = field(default_factory=dict)
    layers: dict[int, Layer] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    num_batches: int = 0

    def capture(self) -> Capture:
        """Return the mode under which the model is to run."""
        return Capture(self.params, KFAC_RULES)

    @torch.no_grad()
    def observe(
        self,
        capture: Capture,
        outputs: Tensor,
        columns: Iterable[tuple[Tensor, float]],
        *,
        weight: float,
        sharing: str,
        max_dims: Mapping[int, int],
        dtypes: Mapping[int, str],
        states: Callable[[int], State | None],
    ) -> None:
        """Add a batch.

        Args:
            capture: that saw the forward pass.
            outputs: of the model, with graph, which is kept.
            columns: vectors in the outputs, and what each counts.
            weight: of the batch in the step.
            sharing: "expand" or "reduce", see `LayerCall.rows`.
            max_dims: place of a parameter -> longest side of which all products are kept.
            dtypes: place of a parameter -> "float64" to work in it; else in that of the rows.
            states: place of a parameter -> bases to rotate to; None where squares are not asked for.
        """
        found: dict[int, FactorSums] = {}
        with tf32_off(), no_autocast(outputs.device):
            self.uncounted.look(capture, outputs, self.params)
            calls, reasons = layer_calls(capture, [p.shape for p in self.params], self.uncounted.reasons)
            for k, (column, share) in enumerate(columns):
                edges: Any = [call.use.edge for call in calls]
                deltas = pull_back([outputs], edges, [column.to(outputs.dtype)]) if edges else ()
                for call, delta in zip(calls, deltas, strict=True):
                    main = call.layer.main
                    rows = None if delta is None else call.rows(delta, self.params[main], sharing)
                    if rows is not None:
                        rows = rows.double() if dtypes[main] == "float64" else rows
                        sums = found.setdefault(main, FactorSums())
                        sums.add(call.kind, rows, weight * share, k == 0, max_dims[main], states(main))
                    elif delta is not None:
                        reasons |= dict.fromkeys(call.layer.members, f"{call.kind} mixes its examples")
        for call in calls:
            main = call.layer.main
            if main in found and main not in reasons:
                self.sums.setdefault(main, FactorSums()).join(found.pop(main))
                self.layers[main] = call.layer
        for main in [
            m for m, layer in self.layers.items() if not self.uncounted.reasons.keys().isdisjoint(layer.members)
        ]:
            del self.layers[main], self.sums[main]
        self.reasons = reasons
        self.num_batches += 1

    @property
    def structure(self) -> str:
        """Which layers and calls were measured, as ranks compare it."""
        return ", ".join(f"{main} ({', '.join(sorted(s.kinds))})" for main, s in sorted(self.sums.items()))

    def average(self, group: Any, share: float) -> None:
        """Average over ranks, which count by their share as far as gradients go."""
        order = sorted(self.sums)
        weighted, plain = [], []
        for main in order:
            sums = self.sums[main]
            for kind in sorted(sums.kinds):
                left, right, number = sums.kinds[kind]
                loss_left = sums.loss_left[kind]
                weighted += [left if loss_left else right]
                plain += [right if loss_left else left, number]
            weighted += [] if sums.squares is None else [sums.squares]
        weighted, plain = average_over_ranks(weighted, group, share), average_over_ranks(plain, group)
        for main in order:
            sums = self.sums[main]
            for kind in sorted(sums.kinds):
                one, other, number = weighted.pop(0), plain.pop(0), plain.pop(0)
                sums.kinds[kind] = [one, other, number] if sums.loss_left[kind] else [other, one, number]
            if sums.squares is not None:
                sums.squares = weighted.pop(0)

    def refuse_non_finite(self) -> None:
        """Refuse sums that are not finite. Waits for the device once.

        Raises:
            NonFiniteError: with the shape of the first parameter concerned.
        """
        totals = {
            i: torch.stack([t.sum() for kind in s.kinds.values() for t in kind]).sum() for i, s in self.sums.items()
        }
        if totals and not bool(torch.stack([t.to("cpu", torch.float64) for t in totals.values()]).isfinite().all()):
            wrong = next(i for i, t in totals.items() if not bool(t.isfinite()))
            raise NonFiniteError(
                f"the factors of a parameter of shape {tuple(self.params[wrong].shape)} are not finite: activations or "
                "gradients overflow. Nothing has moved. Skip the batch, lower lr, or use a wider dtype."
            )
