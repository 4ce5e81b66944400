"""Products of one graph whose kernels a GPU starts all at once.

The kernels of a product on a small batch are short, and the GPU waits while the host starts one after the other. Where
the clock shows that, they are recorded into a CUDA graph and replayed from then on, as long as autograd's graph serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvature.environment.device import CapturedCall, beside, gpu_memory, seconds_to_start
from curvature.environment.memory import HeldMemory
from curvature.environment.precision import tf32_in_use

__all__ = ["Replays", "agree"]

_FIRST = 4  # products that are left alone: a graph may serve for no more, and recording them costs as much as four
_HOST_SHARE = 0.7  # of a product's time, spent on starting kernels, from which replaying pays
_ROOM = 0.25  # of the free memory, which what is replayed may hold

Settings = tuple[bool, bool]


@dataclass
class _Seen:
    products: int = 0
    hopeless: bool = False
    call: CapturedCall | None = None
    settings: Settings = (False, False)


class Replays:
    """What is replayed of the products with one recorded batch.

    Args:
        device: a GPU.
        meter: counts the memory that the recorded batch holds.
    """

    def __init__(self, device: torch.device, meter: HeldMemory) -> None:
        self._device, self._meter = device, meter
        meter.outside = 0  # of what was recorded before
        self._recorded_beside: bool | None = None
        self._seen: WeakKeyDictionary[object, dict[tuple[int, ...], _Seen]] = WeakKeyDictionary()

    def run(
        self,
        record_anew: Callable[[AbstractContextManager[None]], bool],
        which: object,
        chosen: Sequence[int],
        product: Callable[[Tensor], Tensor],
        x: Tensor,
    ) -> Tensor:
        """Return product(x), replayed if that was found to pay.

        Args:
            record_anew: records the batch again, within a context, for backward passes run on the stream of their
                forward pass; says whether that can be.
            which: what is multiplied by; its products with the parameters `chosen` are all the same function.
            chosen: places of parameters.
            product: a function of the vector alone, which may be called at any time; it starts kernels, and looks at
                none of their results.
            x: (m,).
        """
        seen = self._seen.setdefault(which, {}).setdefault(tuple(chosen), _Seen())
        settings = (tf32_in_use(self._device), torch.are_deterministic_algorithms_enabled())
        if seen.call is not None and seen.settings == settings:
            return seen.call(x)
        seen.products += 1
        if seen.hopeless or seen.products <= _FIRST:
            return product(x)
        starting, whole, result = seconds_to_start(self._device, lambda: product(x))
        seen.hopeless = starting < _HOST_SHARE * whole or not self._has_room(x)
        if not seen.hopeless:
            seen.call, seen.settings = self._captured(record_anew, product, x, result), settings
            seen.hopeless = seen.call is None
        return result

    def _has_room(self, x: Tensor) -> bool:
        """Say whether what a product needs on its way, as much as its graph holds at most, may be kept."""
        needed = self._meter.held_bytes() + 4 * x.nbytes
        return needed < min(self._meter.room(), _ROOM * gpu_memory(self._device).free)

    def _captured(
        self,
        record_anew: Callable[[AbstractContextManager[None]], bool],
        product: Callable[[Tensor], Tensor],
        x: Tensor,
        expected: Tensor,
    ) -> CapturedCall | None:
        if self._recorded_beside is None:
            self._recorded_beside = record_anew(beside(self._device))
        call = CapturedCall.attempt(product, x) if self._recorded_beside else None
        if call is None or not agree(call(x), expected):
            return None
        self._meter.outside += call.num_bytes
        self._meter.grown()
        return call


def agree(found: Tensor, expected: Tensor) -> bool:
    """Say whether vectors are equal but for rounding; sums whose order the GPU chooses differ by that."""
    tolerance = torch.finfo(found.dtype).eps ** 0.5
    scale = expected.double().norm()
    return bool((found.double() - expected.double()).norm() <= tolerance * scale)
