"""Layers with a lean second derivative.

Autograd's own second derivatives of convolutions, batch and layer normalisation and smooth activations are right but
wasteful: they recompute, on every product, factors that depend on the point only. While `LeanLayers` is active these
layers are recorded as functions whose second derivative is written out, with all such factors computed once:

- convolution: products and transposed products by the dedicated kernels, no more of them than are asked for;
- batch normalisation in eval mode: folded into the weights of the convolution that it follows, so that it costs nothing
  per entry; elsewhere, an affine map;
- layer normalisation: the closed form of its second derivative;
- attention: the closed form of its second derivative, the products of matrices that it takes summed where they are;
- smooth activations: f' and f'' stored;
- rectified linear units beside such layers: no second derivative, in place of zeros;
- means over small windows side by side, beside such layers on a CPU: a matrix product, which takes a fraction of the
  time of torch's loop;
- batch normalisation by statistics of the batch, in closures of optimizers on the CPU: its closed form. It is compared
  with autograd where it is called first, and again for other shapes, since nobody compares whole products there.

They hold second derivatives and no third. The objective compares them with autograd on the model at hand before it
trusts them (`Objective.notes` says what came of it), and where they fail in any way the model is recorded without.

Some layers are recorded in elementary operations because torch's own derivatives of them are wrong: weight
normalisation always, the other normalisations (`curvature.autograd.composed`) where third derivatives are asked for. A
model that differentiates itself in its forward pass asks for them too: that is seen here, and it is recorded anew.

Hooks that the forward pass registers on tensors may clip, scale or turn gradients; they act where the forward pass
differentiates itself and nowhere else, as those of parameters and modules: what is differentiated is the loss. Closures
of optimizers keep them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from curvature.autograd.backward import refuse_checkpointing
from curvature.autograd.batch_statistics import BatchNorm, agrees_with_autograd
from curvature.autograd.composed import NORMALISATIONS, differentiated_by_transform, weight_norm
from curvature.autograd.guards import refuse_undifferentiable
from curvature.autograd.lean_functions import Activation, Attention, AveragePool, Convolution, Normalise, Relu
from curvature.autograd.substitutes import OF_LOSS, SUBSTITUTES
from curvature.errors import CheckFailedError

__all__ = ["LeanLayers", "MustRecordAnewError"]

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_POOLED = 64  # entries of an image that a row of windows covers, at most: a matrix for more holds too many zeros
# tanh and sigmoid are left to autograd, whose own second derivatives of them are cheaper than three stored factors
_ACTIVATIONS = {F.gelu, F.silu, F.mish, F.softplus, F.elu, F.selu, F.celu, F.logsigmoid, torch.selu, torch.celu}
_ACTIVATIONS |= {torch._C._nn.gelu, torch._C._nn.silu, torch._C._nn.softplus}


_DIFFERENTIATIONS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


class MustRecordAnewError(CheckFailedError):
    """The forward pass turns out to differentiate what was recorded for two derivatives only."""


class LeanLayers(TorchFunctionMode):
    """While active, records eligible layers in their lean form.

    Attributes:
        num_replaced: how many layers were.
        must_record_anew: the forward pass differentiates itself with a graph, and holds layers recorded for less.
        forward_differentiates: it does so, whatever it holds.
        saw_hooks: whether something recorded its graph through hooks, as activation checkpointing does: then parts of
            the model run again in every backward pass.

    Args:
        corrections_only: leave layers as autograd has them, except for those it gets wrong.
        third_order: record them for derivatives of any order; implies `corrections_only`.
        as_trained: keep what acts on gradients and not on the loss: hooks on tensors, embeddings that scale. With
            `corrections_only`, batch normalisation by statistics of the batch is lean all the same.
    """

    def __init__(self, *, corrections_only: bool = False, third_order: bool = False, as_trained: bool = False) -> None:
        super().__init__()
        self.num_replaced = 0
        self.saw_hooks = self.must_record_anew = self.forward_differentiates = False
        self._corrections_only = corrections_only
        self._third_order = third_order
        self._as_trained, self._substitutes = as_trained, SUBSTITUTES if as_trained else OF_LOSS
        self._left_normalisations = self._differentiating = False
        self._rules = _RULES
        if corrections_only or third_order:
            self._rules = _OF_STATISTICS if as_trained and not third_order else {}
        self._replaced: list[Any] = []
        self._convolutions = WeakTensorKeyDictionary()  # output -> its version, and what it is made of

    def alike(self) -> LeanLayers:
        """Return layers that record as these do, with nothing recorded."""
        settings = {"corrections_only": self._corrections_only, "third_order": self._third_order}
        return LeanLayers(**settings, as_trained=self._as_trained)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.saw_hooks = self.saw_hooks or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if func in _DIFFERENTIATIONS:
            if kwargs.get("create_graph"):
                self._prepare_for_differentiation(args[0])
            outer, self._differentiating = self._differentiating, True
            try:
                return func(*args, **kwargs)  # parts that checkpointing runs again inside are out of reach
            except RuntimeError as error:
                refuse_checkpointing(error)
                raise
            finally:
                self._differentiating = outer
        elif func is Tensor.register_hook and not self._as_trained and not args[0].is_leaf:
            return self._hook(*args, **kwargs)
        elif func is torch._weight_norm:
            return weight_norm(*args, **kwargs)
        elif func in NORMALISATIONS and torch.is_grad_enabled():
            if self._third_order or differentiated_by_transform():
                result = NORMALISATIONS[func](func, *args, **kwargs)
                return func(*args, **kwargs) if result is None else result
            self._left_normalisations = True
        if func in self._rules and torch.is_grad_enabled() and _eligible(args):
            result = self._rules[func](self, func, *args, **kwargs)
            if result is not None:
                self.num_replaced += 1
                self._replaced.append((func, *map(_kind, (*args, *kwargs.items()))))
                return result
        return self._substitutes.get(func, func)(*args, **kwargs)

    def signature(self) -> int:
        """Return a number that is equal for recordings that replaced the same calls on tensors of the same kind."""
        return hash(tuple(self._replaced))

    def calls(self) -> list[Any]:
        """Return the functions whose calls were replaced, in their order."""
        return [func for func, *_ in self._replaced]

    def _hook(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        return tensor.register_hook(lambda g: hook(g) if self._differentiating else None)

    def _prepare_for_differentiation(self, outputs: Any) -> None:
        """The forward pass differentiates with a graph, so that its loss holds derivatives beyond the second."""
        self.forward_differentiates = True
        if not self._third_order:
            if self.num_replaced or self._left_normalisations:
                self.must_record_anew = True
                raise MustRecordAnewError(
                    "the model differentiates in its forward pass, which it did not do when it was first evaluated; "
                    "build a new objective."
                )
            self._third_order, self._rules = True, {}
        refuse_undifferentiable(outputs if isinstance(outputs, (tuple, list)) else [outputs], "higher")

    # -- one rule a layer: the lean result, or None to leave the call as it is -----------------------------------------

    def _convolution(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        d = _CONVOLUTIONS[func]
        if input.ndim != d + 2 or isinstance(padding, str):
            return None
        geometry = (_tuple(stride, d), _tuple(padding, d), _tuple(dilation, d), False, (0,) * d, groups)
        output = Convolution.apply(input, _beneath(weight), _beneath(bias), geometry)
        self._convolutions[output] = (output._version, input, weight, bias, geometry)
        return output

    def _batch_norm(
        self,
        func: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        if training or running_mean is None or running_var is None:
            return None
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale
        shift = shift if bias is None else shift + bias
        scale, shift = scale.to(input.dtype), shift.to(input.dtype)
        found = self._convolutions.get(input)
        if found is not None and found[0] == input._version:  # not overwritten in place since
            _, x, w, b, geometry = found
            w = w * scale.view(-1, *(1,) * (w.ndim - 1))
            return Convolution.apply(x, w, shift if b is None else shift + scale * b, geometry)
        shape = (1, -1, *(1,) * (input.ndim - 2))
        return input * scale.view(shape) + shift.view(shape)

    def _batch_statistics(
        self,
        func: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        if not training or weight is None or bias is None or not _is_plain(input) or not input.is_cpu:
            return None
        alike = input.dtype == weight.dtype == bias.dtype and input.ndim > 1 and input.requires_grad
        if not alike or input.numel() <= input.shape[1] or self.saw_hooks:  # checkpoints run it again, without us
            return None
        kind = (_kind(input), eps)
        if kind not in _AGREES:
            _AGREES[kind] = agrees_with_autograd(input, weight, bias, eps)
        if not _AGREES[kind]:
            return None
        return BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)

    def _layer_norm(
        self,
        func: Any,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor | None:
        affine = [part for part in (weight, bias) if part is not None]
        if not _is_plain(input) or any(part.dtype != input.dtype for part in affine) or (weight is None and affine):
            return None
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        return Normalise.apply(input, _beneath(weight), _beneath(bias), shape, eps)

    def _attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        inputs = (query, key, value)
        alike = len({(x.dtype, x.shape[:-2]) for x in inputs}) == 1 and query.shape[-1] == key.shape[-1]
        if not alike or not all(map(_is_plain, inputs)) or not any(x.requires_grad for x in inputs):
            return None
        if dropout_p or (is_causal and attn_mask is not None):
            return None
        mask = attn_mask
        if is_causal:
            mask = query.new_full((query.shape[-2], key.shape[-2]), -math.inf).triu(1)
        elif mask is not None and mask.dtype == torch.bool:
            mask = query.new_zeros(mask.shape).masked_fill(mask.logical_not(), -math.inf)
        if mask is not None and (mask.requires_grad or mask.dtype != query.dtype):
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output: Tensor = Attention.apply(*inputs, scale, mask)[0]
        return output

    def _relu(self, func: Any, input: Tensor, inplace: bool = False) -> Tensor | None:
        if inplace or not input.requires_grad or not self.num_replaced:  # alone not worth a comparison with autograd
            return None
        return Relu.apply(input)

    def _average_pool(
        self,
        func: Any,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor | None:
        kernel = _tuple(kernel_size, 2)
        if not self.num_replaced or not input.is_cpu or not input.is_contiguous() or divisor_override is not None:
            return None
        if any(_tuple(padding, 2)) or (stride is not None and _tuple(stride, 2) not in ((), kernel)):
            return None
        (rows, columns), (height, width) = kernel, input.shape[-2:]
        if not _is_plain(input) or height % rows or width % columns or rows * width > _POOLED:
            return None
        of_a_row = torch.eye(width // columns, dtype=input.dtype).repeat_interleave(columns, 0)
        return AveragePool.apply(input, of_a_row.repeat(rows, 1) / (rows * columns), rows)

    def _activation(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if kwargs.get("inplace") or args[1:2] == (True,) or not input.requires_grad:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
        output: Tensor = Activation.apply(input, lambda x: func(x, *args, **kwargs))[0]
        return output


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys(_CONVOLUTIONS, LeanLayers._convolution),
    **dict.fromkeys(_ACTIVATIONS, LeanLayers._activation),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), LeanLayers._relu),
    F.avg_pool2d: LeanLayers._average_pool,
    F.batch_norm: LeanLayers._batch_norm,
    F.layer_norm: LeanLayers._layer_norm,
    F.scaled_dot_product_attention: LeanLayers._attention,
}


_OF_STATISTICS: dict[Any, Callable[..., Tensor | None]] = {F.batch_norm: LeanLayers._batch_statistics}
_AGREES: dict[Any, bool] = {}
"""Kind of input -> whether the closed form of batch normalisation agreed with autograd on the first of them."""


def _eligible(args: Sequence[Any]) -> bool:
    """Real floating tensors, outside autocast (which would cast behind our back), transforms and forward mode."""
    x = args[0] if args else None
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and not torch.is_autocast_enabled(x.device.type)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def _beneath(t: Tensor | None) -> Tensor | None:
    """Return a view of a parameter: its node says whether a backward pass will run it, that of a leaf raises an error.

    Raising takes 60 microseconds, a hundredth of a product for a few layers.
    """
    return t if t is None or not t.is_leaf or not t.requires_grad else t.view_as(t)


def _is_plain(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and not x.is_nested


def _kind(argument: Any) -> Any:
    """Return what the code that serves an argument may depend on, hashable: of a tensor all but its values."""
    if isinstance(argument, Tensor):
        return (argument.shape, argument.stride(), argument.dtype, argument.device, argument.requires_grad)
    if isinstance(argument, (tuple, list)):
        return tuple(map(_kind, argument))
    return argument if isinstance(argument, (bool, int, float, str)) else type(argument)


def _tuple(value: int | Iterable[int], length: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * length if len(values) == 1 else values
