"""Products that do not go by autograd's own second derivatives are compared with those that do, before they serve."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.autograd.lean_trust import LeanTrust
from curvature.data.parts import small_part
from curvature.engine.chain import Chain
from curvature.engine.recording import NOT_OF_LAYERS, Recording

__all__ = ["VerifiedRecording"]


class VerifiedRecording(Recording):
    """A recording whose lean layers and chains are held against autograd on the model at hand."""

    _chain: Chain | None

    @property
    def num_lean_layers(self) -> int:
        """How many layers were recorded in their lean form, or lie in a chain."""
        return super().num_lean_layers + (0 if self._chain is None else self._chain.num_layers)

    def _signature(self) -> int:
        return hash((self._lean.signature(), None if self._chain is None else self._chain.signature()))

    def _calls(self) -> list[Any]:
        return [*self._lean.calls(), None if self._chain is None else self._chain.kind()]

    @property
    @abstractmethod
    def _is_built(self) -> bool:
        """Whether anything holds on to the graph of the recording."""

    @abstractmethod
    def _compared(self, product: Literal["hvp", "ggnvp"], v: Tensor) -> Tensor:
        """Return what is compared: a product with v (1, n)."""

    def _verify(self, product: Literal["hvp", "ggnvp"]) -> None:
        """Before lean layers of these shapes first serve for a product, compare it with autograd's own."""
        trust = self._trust
        if trust is None or self.num_lean_layers == 0 or trust.covers(product, self._signature()):
            return
        eps = max(torch.finfo(p.dtype).eps for p in self._params)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(1, self._space.num_params, generator=generator).to(self._space.device, self._space.dtype)
        if self._agrees_on_a_part(product, trust, v, eps):
            return
        given_up = not self._is_built  # one graph at a time, where nothing is built yet
        if given_up:
            del self._evaluation
            self._chain = None
        try:
            reference = self._by_autograd(product, self.batch, v)
        finally:
            if given_up:
                self._record()
        if self._trust is None or self.num_lean_layers == 0:
            return
        self._trust = None
        try:
            lean = self._compared(product, v)
        except Exception as error:
            if isinstance(error, NOT_OF_LAYERS):
                raise
            trust.revoke(f"they raised {type(error).__name__}")
        else:
            sizes = [p.numel() for p in self._params]
            trust.compare(product, self._signature(), lean[0], reference[0], sizes, eps)
        if trust.revoked:
            self._record_plainly()
        else:
            self._trust = trust

    def _by_autograd(self, product: Literal["hvp", "ggnvp"], batch: Any, v: Tensor) -> Tensor:
        plain = type(self)(self._evaluator, self._space, batch, self.index)
        plain.holds_gradient = False
        return plain._compared(product, v)

    def _agrees_on_a_part(self, product: Literal["hvp", "ggnvp"], trust: LeanTrust, v: Tensor, eps: float) -> bool:
        """Compare on a small part of the batch, if it can be cut: a layer's derivative does not depend on how many.

        Only agreement counts; whatever else comes of it, the whole batch decides.
        """
        rule = self._evaluator.rule
        if rule is None or not rule.closed_form:
            return False
        try:
            if (part := small_part(self.batch)) is None:
                return False
            lean = type(self)(self._evaluator, self._space, part, self.index, trust=LeanTrust())
            if lean.weight == 0 or lean._calls() != self._calls():
                return False
            lean._trust = None
            found = lean._compared(product, v)[0]
            del lean
            reference = self._by_autograd(product, part, v)[0]
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        sizes, of_part = [p.numel() for p in self._params], LeanTrust()
        of_part.compare(product, self._signature(), found, reference, sizes, eps)
        if of_part.revoked or not bool(reference.any()):
            return False
        trust.accept(of_part)
        return True
