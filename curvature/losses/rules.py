"""What the toolkit knows about loss functions: how they normalise, and the matrices they define on the model's outputs.

A rule (`curvature.losses.recognised` finds that of a loss) answers these questions:

- `num_terms(outputs, targets)`: the denominator of a mean-reduced loss, i.e. by how much a batch counts in the whole;
- `term_weights(outputs, targets)`: the share of each loss term in that denominator;
- `output_hessian(outputs, targets)`: a function u -> H u with H the Hessian of the reduced loss in the outputs;
- `output_gradient(outputs, targets)`: the gradient of the reduced loss in the outputs;
- `sampled_fisher(outputs, targets, ...)`: u -> F u, an estimate of the Fisher matrix on the outputs from targets drawn
  by the model itself, for the losses that are negative log-likelihoods: a squared error is that of a normal
  distribution of variance 1/2 around the output, up to a constant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvature.autograd.backward import pull_back
from curvature.autograd.guards import refuse_undifferentiable
from curvature.errors import InputError

__all__ = [
    "AnyLoss",
    "BinaryCrossEntropyWithLogits",
    "CrossEntropy",
    "LossRule",
    "OutputMap",
    "SquaredError",
    "same_values",
]

OutputMap = Callable[[Tensor], Tensor]
"""u -> M u, with M a symmetric matrix on the outputs of a batch; u and M u have their shape."""


class LossRule(ABC):
    """How one loss function reduces and curves."""

    closed_form = True
    is_likelihood = True
    """Whether each target adds a weighted sum of negative log-likelihoods, known in closed form."""
    _writes: bool | None = None
    """Whether the loss writes into the outputs, which torch's own do not; None as long as that is not known."""

    def __init__(self, loss: Callable[..., Tensor], reduction: str = "mean", **settings: Any) -> None:
        if reduction not in ("mean", "sum", "batchmean"):
            raise InputError(f"the loss must return one number: reduction must be 'mean' or 'sum', got {reduction!r}.")
        self.loss = loss
        self.reduction = reduction
        self._settings = settings

    @property
    def settings(self) -> dict[str, Any]:
        """Class weights, ignored index and so on; a module's are read when they are used, since they may be changed."""
        return self._settings | {name: value for name, value in _attributes(self.loss).items() if name != "reduction"}

    def value(self, outputs: Any, targets: Any) -> Any:
        """Return what the loss function returns; one that writes into the outputs writes into a copy.

        Raises:
            InputError: if it writes into them now and did not before.
        """
        if self.closed_form or type(outputs) is not Tensor:
            return self.loss(outputs, targets)
        given = outputs if self._writes is False else outputs.clone()
        before, known = _version(given), self._writes
        value = self.loss(given, targets)
        wrote = _version(given) != before or (known is None and not same_values(given, outputs))
        self._writes = wrote or bool(known)
        if wrote and known is False:
            raise InputError(
                "the loss writes into the model's outputs (sub_, clamp_, /=), which it did not do before. Call again: "
                "it is given copies from now on."
            )
        return value

    @abstractmethod
    def term_weights(self, outputs: Tensor | None, targets: Any) -> Tensor:
        """Return the weight of each loss term, (N, ...): 0 for ignored targets, class weights where there are any."""

    def num_terms(self, outputs: Tensor | None, targets: Any) -> float:
        """Return what a mean over this batch divides by."""
        return float(self.term_weights(outputs, targets).sum(dtype=torch.float64))

    @abstractmethod
    def output_hessian(self, outputs: Tensor, targets: Any) -> OutputMap:
        """Return u -> H u, for u of the outputs' shape; H is symmetric, of the loss as reduced over this batch."""

    def output_gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return the gradient of the loss in the outputs, as reduced over this batch, in their shape and dtype."""
        z = outputs.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.value(z, targets), z)
        return gradient

    @abstractmethod
    def sampled_fisher(self, outputs: Tensor, targets: Any, num_samples: int, generator: torch.Generator) -> OutputMap:
        """Return u -> F u, F the mean of s s' over targets y drawn from p(y | outputs), s the gradient of -log p(y).

        Every target is drawn on its own and weighted by what it adds to the loss, as reduced over this batch: F is
        block-diagonal over targets, positive semi-definite, and on average the Fisher matrix on the outputs.
        """

    def sampled_gradient(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        """Return u of the outputs' shape with E[u] = 0 and E[u u'] = H, by targets drawn from p(y | outputs).

        With the targets' own weights J'u is one draw with E[(J'u)(J'u)'] = J' H J, by first derivatives only. Noise is
        independent between sites, so that no mean over a batch of squared gradients is needed.

        Raises:
            InputError: for losses that are not minus the logarithm of a probability known here.

        Reference: Liu, Li, Hall, Liang and Ma (2024), Sophia, Algorithm 2 (Gauss-Newton-Bartlett); Bartlett (1953).
        """
        raise InputError(
            f"targets can be sampled for cross-entropy, mean squared error and binary cross-entropy with logits, got "
            f"{self.loss!r}; use the Hessian for other losses."
        )

    def _scale(self, outputs: Tensor, targets: Any) -> float:
        return 1.0 if self.reduction == "sum" else 1.0 / self.num_terms(outputs, targets)


class SquaredError(LossRule):
    """sum_i w_i (z_i - y_i)^2, or that over sum_i w_i: H = 2 diag(w), or 2 diag(w) / sum_i w_i; w = 1 unless given."""

    def num_terms(self, outputs: Tensor | None, targets: Tensor) -> float:
        if self.settings.get("weight") is not None:
            return super().num_terms(outputs, targets)
        return float(
            targets.numel() if outputs is None else torch.broadcast_shapes(outputs.shape, targets.shape).numel()
        )

    def term_weights(self, outputs: Tensor | None, targets: Tensor) -> Tensor:
        shape = targets.shape if outputs is None else torch.broadcast_shapes(outputs.shape, targets.shape)
        weight = self.settings.get("weight")
        return torch.ones(shape, device=targets.device) if weight is None else weight.to(targets.device).expand(shape)

    def output_hessian(self, outputs: Tensor, targets: Tensor) -> OutputMap:
        diagonal = self.entry_curvatures(outputs, targets)
        return lambda u: diagonal * u

    def entry_curvatures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the diagonal of H, in a shape that broadcasts over the outputs; outputs may meet several targets."""
        if self.settings.get("weight") is None:
            repeats = torch.broadcast_shapes(outputs.shape, targets.shape).numel() / outputs.numel()
            wide = torch.promote_types(outputs.dtype, torch.float32)
            return torch.tensor(2.0 * repeats * self._scale(outputs, targets), dtype=wide)
        weights = self.term_weights(outputs, targets).to(torch.promote_types(outputs.dtype, torch.float32))
        return 2.0 * self._scale(outputs, targets) * weights.sum_to_size(outputs.shape)

    def sampled_fisher(
        self, outputs: Tensor, targets: Tensor, num_samples: int, generator: torch.Generator
    ) -> OutputMap:
        z = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        repeats = torch.broadcast_shapes(outputs.shape, targets.shape).numel() // outputs.numel()
        squares = torch.zeros_like(z)
        for _ in range(repeats * num_samples):  # y = z + e / sqrt(2) with e standard normal, so that s = -sqrt(2) e
            squares += torch.empty_like(z).normal_(generator=generator).square()
        diagonal = self.entry_curvatures(z, targets) * squares / (repeats * num_samples)
        return lambda u: diagonal * u.to(diagonal.dtype)

    def sampled_gradient(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        z = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return (noise * self.entry_curvatures(z, targets).to(z.device).sqrt()).to(outputs.dtype)


class CrossEntropy(LossRule):
    """Softmax cross-entropy over dimension 1 of (N, C, ...) logits, or dimension 0 of (C,).

    With t the target distribution after smoothing and w the class weights, a site's Hessian is a (diag p - p p') with
    p = softmax(z) and a = sum_c w_c t_c; sites with the ignored index have a = 0. The mean divides by the sum of the
    targets' class weights (class indices) or by the number of sites (class probabilities), as torch does.
    """

    def num_terms(self, outputs: Tensor | None, targets: Tensor) -> float:
        if targets.is_floating_point():
            return float(targets.numel() // targets.shape[_class_dim(targets)])
        return super().num_terms(outputs, targets)

    def term_weights(self, outputs: Tensor | None, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return torch.ones_like(targets.select(_class_dim(targets), 0))
        return _class_index_weights(targets, self.settings)

    def output_hessian(self, outputs: Tensor, targets: Tensor) -> OutputMap:
        dim = _class_dim(outputs)
        logits = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        p = logits.softmax(dim)
        scaled_p = p * (self._site_weights(logits, targets, dim) * self._scale(outputs, targets)).unsqueeze(dim)
        surest = p.argmax(dim, keepdim=True)

        def product(u: Tensor) -> Tensor:
            u = u.to(p.dtype)
            u = u - u.gather(dim, surest)  # changes nothing but rounding: no difference of numbers alike where p is 1
            return u.sub_((p * u).sum(dim, keepdim=True)).mul_(scaled_p)

        return product

    def sampled_fisher(
        self, outputs: Tensor, targets: Tensor, num_samples: int, generator: torch.Generator
    ) -> OutputMap:
        dim = _class_dim(outputs)
        logits = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        p = logits.softmax(dim)
        weights = (self._site_weights(logits, targets, dim) * self._scale(outputs, targets)).unsqueeze(dim)
        sites = p.movedim(dim, -1)
        rows = sites.reshape(-1, sites.shape[-1])
        y = torch.multinomial(rows, num_samples, replacement=True, generator=generator)
        drawn = torch.zeros_like(rows).scatter_add_(1, y, rows.new_full((), 1.0).expand(y.shape)) / num_samples
        q = drawn.view(sites.shape).movedim(-1, dim)  # share of each class among the draws

        def product(u: Tensor) -> Tensor:
            """Apply the mean of (e_y - p)(e_y - p)', which is diag q - q p' - p q' + p p'."""
            u = u.to(p.dtype)
            of_p, of_gap = ((r * u).sum(dim, keepdim=True) for r in (p, q - p))
            return weights * (q * (u - of_p) - p * of_gap)

        return product

    def sampled_gradient(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        dim = _class_dim(outputs)
        z = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        p = z.softmax(dim).movedim(dim, -1)
        rows = p.reshape(-1, p.shape[-1])
        y = torch.multinomial(rows, 1, generator=generator)
        noise = rows.scatter_add(1, y, -torch.ones_like(y, dtype=p.dtype)).view(p.shape).movedim(-1, dim)
        weights = self._site_weights(z, targets, dim) * self._scale(z, targets)
        return (noise * weights.unsqueeze(dim).sqrt()).to(outputs.dtype)

    def _site_weights(self, logits: Tensor, targets: Tensor, dim: int) -> Tensor:
        """Return a = sum_c w_c t_c at each site, in the shape of class-index targets."""
        classes = logits.shape[dim]
        weight = self.settings.get("weight")
        smoothing = self.settings.get("label_smoothing", 0.0)
        w = logits.new_ones(classes) if weight is None else weight.to(logits)
        if targets.is_floating_point():
            smoothed = (1 - smoothing) * targets.to(logits.dtype) + smoothing / classes
            return torch.tensordot(smoothed.movedim(dim, -1), w, dims=1)
        valid = targets != self.settings.get("ignore_index", -100)
        hard = w[targets.where(valid, 0)]
        return ((1 - smoothing) * hard + smoothing * w.mean()) * valid


class BinaryCrossEntropyWithLogits(LossRule):
    """Per entry -w (q y log s + (1 - y) log(1 - s)), s = sigmoid(z): H = diag(w s (1 - s) (q y + 1 - y))."""

    def num_terms(self, outputs: Tensor | None, targets: Tensor) -> float:
        return float(targets.numel())

    def term_weights(self, outputs: Tensor | None, targets: Tensor) -> Tensor:
        return torch.ones(targets.shape, device=targets.device)

    def output_hessian(self, outputs: Tensor, targets: Tensor) -> OutputMap:
        s, weights = self._probabilities_and_weights(outputs, targets)
        diagonal = s * (1 - s) * weights
        return lambda u: diagonal * u.to(diagonal.dtype)

    def sampled_fisher(
        self, outputs: Tensor, targets: Tensor, num_samples: int, generator: torch.Generator
    ) -> OutputMap:
        s, weights = self._probabilities_and_weights(outputs, targets)
        ones = torch.zeros_like(s)
        for _ in range(num_samples):
            ones += torch.bernoulli(s, generator=generator)
        q = ones / num_samples
        diagonal = (q * (1 - s).square() + (1 - q) * s.square()) * weights  # the mean of (y - s)^2
        return lambda u: diagonal * u.to(diagonal.dtype)

    def sampled_gradient(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        s, weights = self._probabilities_and_weights(outputs, targets)
        return ((s - torch.bernoulli(s, generator=generator)) * weights.sqrt()).to(outputs.dtype)

    def _probabilities_and_weights(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and, for every entry, what the reduced loss multiplies log-likelihoods by, w (q y + 1 - y)."""
        z = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        y = targets.to(z.dtype)
        pos_weight, weight = self.settings.get("pos_weight"), self.settings.get("weight")
        weights = 1 - y + y * (1.0 if pos_weight is None else pos_weight.to(z))
        weights = weights * (1.0 if weight is None else weight.to(z)) * self._scale(outputs, targets)
        return z.sigmoid(), weights


class AnyLoss(LossRule):
    """A loss nothing is known of: the Hessian in the outputs comes from double backward on the loss alone."""

    closed_form = False
    is_likelihood = False

    def term_weights(self, outputs: Tensor | None, targets: Any) -> Tensor:
        if not isinstance(targets, Tensor):
            raise InputError(
                f"cannot tell how many loss terms a batch with targets of type {type(targets).__name__} has; pass "
                "weight= to the objective."
            )
        if targets.ndim == 0:
            return torch.ones((), device=targets.device)
        if isinstance(self.loss, (nn.NLLLoss, nn.CrossEntropyLoss)) and not targets.is_floating_point():
            return _class_index_weights(targets, self.settings)
        if self.reduction != "batchmean" and isinstance(self.loss, nn.modules.loss._Loss):
            return torch.ones(targets.shape, device=targets.device)  # torch's other means divide by the entries
        if targets.is_floating_point():
            return torch.ones(targets.shape[0], device=targets.device)
        return (targets != -100).float()

    def output_hessian(self, outputs: Tensor, targets: Any) -> OutputMap:
        z = outputs.detach().requires_grad_()
        with torch.enable_grad():
            value = self.value(z, targets)
            refuse_undifferentiable([value])
            (g,) = pull_back([value], [z], create_graph=True) if value.requires_grad else (None,)
        if g is None or not g.requires_grad:  # piecewise linear in the outputs
            return torch.zeros_like

        def product(u: Tensor) -> Tensor:
            (Hu,) = pull_back([g], [z], [u.to(g.dtype)])
            return torch.zeros_like(u) if Hu is None else Hu

        return product

    def sampled_fisher(self, outputs: Tensor, targets: Any, num_samples: int, generator: torch.Generator) -> OutputMap:
        raise InputError(
            "targets can be drawn for torch's cross-entropy, mean squared error and binary cross-entropy with logits; "
            "of another loss it is not known which distribution it is the log-likelihood of."
        )


_SETTINGS = ("weight", "pos_weight", "ignore_index", "label_smoothing", "reduction")


def _attributes(loss: Any) -> dict[str, Any]:
    """Return the settings of one of torch's losses, or of a loss derived from them."""
    if not isinstance(loss, nn.modules.loss._Loss):
        return {}
    return {name: getattr(loss, name) for name in _SETTINGS if hasattr(loss, name)}


def _class_index_weights(targets: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return 1 for each target that is not ignored, or the weight of its class."""
    weight = settings.get("weight")
    valid = targets != settings.get("ignore_index", -100)
    if weight is None:
        return valid.float()
    return weight.to(targets.device)[targets.where(valid, 0)] * valid


def _class_dim(logits: Tensor) -> int:
    return 1 if logits.ndim > 1 else 0


def same_values(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors hold the same: writes to `.data`, or by NumPy, are not counted; True where none can be.

    That is within a transform of `torch.func`, or on the meta device.
    """
    with torch._C.DisableTorchFunction(), torch.no_grad():
        wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (a, b))
        if wrapped or a.is_meta:
            return True
        return a.shape == b.shape and (torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _version(t: Tensor) -> int:
    with torch._C.DisableTorchFunction():  # to look at a counter is not to look at the data
        return 0 if t.is_inference() else t._version
