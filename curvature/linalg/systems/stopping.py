"""When to stop an iteration that is only a means: rules on the values of the quadratic model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from curvature.arguments import checked_fields
from curvature.errors import InputError


@checked_fields
@dataclass(frozen=True, kw_only=True)
class RelativeProgress:
    """Stop once the last w steps improved the model by less than w rtol of all, w = max(min_steps, share i).

    With phi_i the model's value after i steps: i > w, phi_i < 0 and (phi_i - phi_(i-w)) / phi_i < w rtol. Values are
    those of phi = x'(A + damping I) x / 2 - b'x, zero at x = 0; a start x0 counts as the first of them.

    Reference: Martens (2010), Deep learning via Hessian-free optimization, section 4.4.

    Examples:
        >>> rule = RelativeProgress(min_steps=2, rtol=1e-2)
        >>> rule([0.0, -1.0, -1.5]), rule([0.0, -1.0, -1.5, -1.501, -1.502])
        (False, True)
    """

    rtol: float = 5e-4
    """Improvement a step, relative to all, below which to stop."""
    min_steps: int = 10
    """Steps that are looked back over, at least."""
    share: float = 0.1
    """Steps that are looked back over, of those done."""

    def __post_init__(self) -> None:
        if not self.rtol > 0 or self.min_steps < 1 or not 0 <= self.share < 1:
            raise InputError(
                "rtol must be positive, min_steps at least 1 and share in [0, 1), got "
                f"{self.rtol}, {self.min_steps} and {self.share}."
            )

    def __call__(self, model_history: Sequence[float]) -> bool:
        """Return whether to stop after `len(model_history) - 1` steps."""
        i = len(model_history) - 1
        window = max(self.min_steps, int(self.share * i))
        if i <= window:
            return False
        now, then = model_history[i], model_history[i - window]
        return now < 0 and now - then > window * self.rtol * now
