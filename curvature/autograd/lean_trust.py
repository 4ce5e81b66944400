"""Whether lean layers may serve for products of a model: they are compared with autograd's own before they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LeanTrust"]

_NAMES = {"hvp": "Hessian", "ggnvp": "Gauss-Newton"}
_SMALL = 1e-2  # a parameter's part of a product is compared with itself, or with this share of the whole if smaller


class LeanTrust:
    """What is known of lean layers on one model.

    Attributes:
        revoked: True once a comparison failed or they raised; from then on layers are recorded as autograd has them.
        reason: why, if not for a difference.
        differences: product -> largest relative difference found.
    """

    def __init__(self) -> None:
        self.revoked = False
        self.reason = ""
        self.differences: dict[str, float] = {}
        self._seen: set[tuple[str, int]] = set()

    def covers(self, product: str, signature: int) -> bool:
        """Say whether the product was compared on layers of this signature: same calls, shapes and dtypes."""
        return (product, signature) in self._seen

    def compare(
        self, product: str, signature: int, lean: Tensor, reference: Tensor, sizes: Sequence[int], eps: float
    ) -> None:
        """Note the difference of two products with one vector; revoke the trust if it is beyond rounding.

        Args:
            product: "hvp" or "ggnvp".
            signature: of the layers.
            lean: (n,), overwritten.
            reference: (n,).
            sizes: of the parameters, whose parts are compared each on its own.
            eps: rounding error of the widest-spaced dtype.
        """
        apart = torch.stack(torch._foreach_norm(lean.sub_(reference).split(list(sizes))))
        lengths = torch.stack(torch._foreach_norm(reference.split(list(sizes))))
        floor = (_SMALL * reference.norm()).clamp_min(torch.finfo(reference.dtype).tiny)
        difference = float((apart / lengths.maximum(floor)).max())  # NaN if any part is
        self.differences[product] = max(difference, self.differences.get(product, 0.0))
        if difference <= max(1e-5, 10 * eps**0.5):  # not on NaN
            self._seen.add((product, signature))
        else:
            self.revoked = True

    def accept(self, other: LeanTrust) -> None:
        """Take over what comparisons elsewhere have shown."""
        self._seen |= other._seen
        for product, difference in other.differences.items():
            self.differences[product] = max(difference, self.differences.get(product, 0.0))

    def forget(self) -> None:
        """Compare anew before the next product: the model has changed."""
        self.differences.clear()
        self._seen.clear()

    def revoke(self, reason: str) -> None:
        """Use them no more."""
        self.revoked, self.reason = True, reason

    def notes(self) -> list[str]:
        """Return what a reader of the results should know."""
        if self.reason:
            return [f"Lean layers are not used: {self.reason}."]
        verdict = "are not used: they differ from" if self.revoked else "serve for products: they agree with"
        return [
            f"Lean layers {verdict} autograd on this model ({_NAMES[product]} product: {difference:.1e} relative)."
            for product, difference in self.differences.items()
        ]
