"""Evaluating a model's loss as the twice differentiable function it is, and leaving no trace.

`Evaluator.session()` is the only place where global or model state is touched, and it puts everything back, also after
an error: attention runs under the math kernel (the fused kernels have no second derivative), the random state is
seeded by batch so that dropout is one fixed mask, buffers are swapped for copies so that batch normalisation in train
mode updates those, parameters that were not chosen do not record gradients, compiled models run eagerly, float32 is not
rounded to TF32 on GPUs,
autocast is as around the product but keeps no cast weights. One thread at a time: much of this belongs to the process.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_modules

from curvature.autograd.guards import refuse_reentrant
from curvature.autograd.lazy_logits import HeadInBlocks, LazyLogits
from curvature.autograd.lean import LeanLayers
from curvature.data.random_states import RandomStates
from curvature.data.tensors import ordinary, tensors_in
from curvature.engine.advice import advice_on_inputs, advice_on_loss, advice_on_outputs, first_line
from curvature.engine.messages import NoMessages, has_other_ranks, refuse_synchronised
from curvature.engine.stand_ins import StandIns, here
from curvature.environment.autocast import as_around
from curvature.environment.device import is_gpu
from curvature.environment.lock import one_at_a_time
from curvature.environment.precision import tf32_in_use, tf32_off
from curvature.errors import DataError, InputError, NonFiniteError
from curvature.losses.rules import LossRule
from curvature.losses.weights import WeightsOfBatches

__all__ = ["Evaluation", "Evaluator"]

_REQUIRES_GRAD, _HOOKS = operator.attrgetter("requires_grad"), operator.attrgetter("_backward_hooks")

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Evaluation:
    """One batch's loss, with its graph."""

    loss: Tensor
    """(), as the loss function reduces it."""
    weight: float
    """The batch's share of the whole is weight / sum of weights."""
    outputs: Tensor | None
    """What the model returned; None where forward returns the loss itself."""
    targets: Any
    drew_random_numbers: bool
    in_blocks: bool
    """Whether the logits of the head were computed in blocks."""

    @property
    def shown(self) -> Tensor | None:
        """The outputs, detached, or what goes into a head that works in blocks; None if they are no tensor."""
        outputs = self.outputs.h if isinstance(self.outputs, LazyLogits) else self.outputs
        return outputs.detach() if isinstance(outputs, Tensor) else None


@dataclass
class Evaluator:
    """A model, a loss and how batches are fed.

    Attributes:
        model: the user's module; never copied.
        rule: the loss, or None where `forward` returns the scalar loss.
        forward: (model, batch) -> (outputs, targets), or -> loss where `rule` is None.
        weight: batch -> how much it counts, or None for the number of loss terms.
        parameters: the leaf tensors the loss is a function of.
        seed: what the random state is set to before batch i is `seed + i`.
        allow_tf32: whether float32 may be rounded to TF32 where PyTorch's settings say so.
        forward_differentiates: whether an evaluation was seen to hold derivatives (a PINN, a gradient penalty); None
            before the first.
        head: returns the weight of the last linear layer, whose logits are computed in blocks where they are large.
        head_in_use: whether logits were large, and all evaluations could do with blocks of them.
        head_refusal: why one could not; "" while nothing speaks against blocks.
        stand_ins: makes the context in which tensors that can be differentiated stand in the model in place of its own;
            None where its own can.
        batch_weights: tests whether a custom loss divides by what its batches are counted by; None does not.
        between_ranks: whether the forward pass may send anything to other ranks, as those of models in parts do.
    """

    model: nn.Module
    rule: LossRule | None
    forward: Forward | None
    weight: Callable[[Any], float] | None
    parameters: Sequence[Tensor]
    seed: int
    allow_tf32: bool = False
    forward_differentiates: bool | None = None
    head: Callable[[], Any] | None = None
    head_in_use: bool = False
    head_refusal: str = ""
    stand_ins: Callable[[], AbstractContextManager[None]] | None = None
    batch_weights: WeightsOfBatches | None = field(default_factory=WeightsOfBatches)
    between_ranks: bool = False

    def __post_init__(self) -> None:
        # walked for every product, so the tree of modules is taken to stand as it is
        self._modules = list(self.model.modules())
        self._synchronised = [m for m in self._modules if isinstance(m, nn.SyncBatchNorm)]
        self._looked_for_checkpoints = self._looked_for_messages = False
        self._keeps_float32 = not self.allow_tf32

    def forget(self) -> None:
        """Drop what evaluations have shown: model, loss or data have changed."""
        self.forward_differentiates = None
        self.head_in_use, self.head_refusal = False, ""
        self.batch_weights = None if self.batch_weights is None else WeightsOfBatches()
        self.__post_init__()

    # -- state --------------------------------------------------------------------------------------------------------

    def corrected_layers(self) -> LeanLayers:
        """Return layers as autograd has them, right to the order that this model needs, to enter a session with."""
        return LeanLayers(corrections_only=True, third_order=self.forward_differentiates is not False)

    def copy_buffers(self) -> StandIns:
        with one_at_a_time:  # in another thread, copies may be installed
            return StandIns((m._buffers for m in self._modules), lambda buffer: ordinary(here(buffer)))

    @contextlib.contextmanager
    def with_new_leaves(self) -> Iterator[Evaluator]:
        """Put leaves that no graph has seen yet, on the same memory, in the place of the parameters.

        A leaf's end of every graph stays on the stream on which its first one was recorded.
        """
        leaves = [p.detach().requires_grad_() for p in self.parameters]
        by_id = {id(p): leaf for p, leaf in zip(self.parameters, leaves, strict=True)}
        with one_at_a_time:
            stores = (m._parameters for m in self.model.modules())
            with StandIns(stores, lambda p: by_id.get(id(p), p)).installed():
                yield replace(self, parameters=leaves)

    @contextlib.contextmanager
    def session(self, buffers: StandIns, lean: LeanLayers, *, fused_attention: bool = False) -> Iterator[None]:
        """Make the model safe to evaluate and differentiate twice, with its layers as `lean` has them; restore it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_at_a_time)
            stack.enter_context(as_around())
            stack.enter_context(torch.inference_mode(False))  # records gradients, too
            if self.stand_ins is not None:
                stack.enter_context(self.stand_ins())
            if not fused_attention:  # which has first derivatives only
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_attention_fastpath_off())
            stack.enter_context(_requires_grad_only(self.parameters, self.model.parameters()))
            stack.enter_context(buffers.installed())
            stack.enter_context(_unhooked(self.parameters, self._modules))
            if is_gpu(self.parameters[0].device) and any(isinstance(m, nn.RNNBase) for m in self._modules):
                stack.enter_context(_cudnn_off())  # its RNNs have no second derivative
            if self._keeps_float32 and tf32_in_use(self.parameters[0].device):
                stack.enter_context(tf32_off())
            stack.enter_context(lean)
            yield

    def backward_session(self) -> AbstractContextManager[Any]:
        """Do the same for a backward pass alone, in which nothing of the model runs again."""
        rounds = self._keeps_float32 and tf32_in_use(self.parameters[0].device)
        plain = all(map(_REQUIRES_GRAD, self.parameters)) and not any(map(_HOOKS, self.parameters))
        if plain and not rounds and not torch.is_inference_mode_enabled():
            return one_at_a_time
        return self._restored_for_backward(tf32_off() if rounds else contextlib.nullcontext())

    @contextlib.contextmanager
    def _restored_for_backward(self, precision: AbstractContextManager[None]) -> Iterator[None]:
        recording, unhooked = _requires_grad_only(self.parameters, ()), _unhooked(self.parameters, ())
        with one_at_a_time, torch.inference_mode(False), recording, unhooked, precision:
            yield

    # -- evaluation (inside a session) --------------------------------------------------------------------------------

    def head_in_blocks(self, least: int | None = None) -> HeadInBlocks | None:
        """Return what makes logits lazy, to evaluate with; None where there is no head or it was refused."""
        weight = None if self.head is None or self.head_refusal else self.head()
        return HeadInBlocks(weight, least) if isinstance(weight, Tensor) else None

    def notes(self) -> list[str]:
        """Return what a reader of the results should know of the head."""
        if self.head_in_use:
            return ["The last layer and its cross-entropy work in blocks of rows; the logits are never whole."]
        return [f"The logits are held whole: {self.head_refusal}."] if self.head_refusal else []

    def evaluate(self, batch: Any, index: int, blocks: HeadInBlocks | None = None) -> Evaluation:
        """Run the model on one batch, under random numbers fixed by the batch's place.

        Raises:
            InputError: if forward or loss return something else than agreed.
            NonFiniteError: if the loss is NaN or infinite; the message names the batch and the first culprit.
        """
        device = self.parameters[0].device
        with _seeded(self.seed + index, device) as drew, blocks or contextlib.nullcontext(), self._own_data():
            outputs, targets, loss = self._loss(batch)
            drew_random_numbers = drew()
        with _past_modes(loss, outputs, targets) if self.weight is None else contextlib.nullcontext():
            if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
                raise InputError(
                    f"the loss of a batch must be a real tensor with one entry, got {advice_on_loss(loss)}"
                )
            if not self._looked_for_checkpoints and loss.requires_grad:
                refuse_reentrant(loss)
                self._looked_for_checkpoints = True
            weight = self._weight(batch, outputs, targets)
            if weight != 0 and not math.isfinite(loss.item()):
                raise NonFiniteError(f"the loss is {loss.item()} on batch {index}: {self._culprit(batch, outputs)}")
            if self.rule is not None and self.weight is None and self.batch_weights is not None:
                self.batch_weights.see(self.rule, outputs, targets, index)
            scalar = loss.reshape(()) if loss.ndim else loss
        return Evaluation(scalar, weight, outputs, targets, drew_random_numbers, blocks is not None and blocks.in_use)

    @contextlib.contextmanager
    def _own_data(self) -> Iterator[None]:
        """Refuse a forward pass that looks at other ranks' batches; what was seen not to is not watched again."""
        refuse_synchronised(self._synchronised)
        watched = not (self.between_ranks or self._looked_for_messages) and has_other_ranks()
        with NoMessages() if watched else contextlib.nullcontext():
            yield
        self._looked_for_messages = True

    def _loss(self, batch: Any) -> tuple[Any, Any, Any]:
        if self.rule is None:
            assert self.forward is not None
            return None, None, self.forward(self.model, batch)
        if self.forward is None:
            try:
                inputs, targets = [batch] if isinstance(batch, (Mapping, str)) else batch  # two keys are no pair
            except (TypeError, ValueError):
                raise DataError(
                    f"a batch must be a pair (inputs, targets), got {_describe(batch)}; pass forward= to say how such "
                    "a batch is fed."
                ) from None
            try:
                outputs = self.model(inputs)
            except (RuntimeError, TypeError, ValueError) as error:
                if (advice := advice_on_inputs(inputs, self.parameters, error)) is None:
                    raise
                raise InputError(f"{advice} (the model says: {first_line(error)})") from error
        else:
            returned = self.forward(self.model, batch)
            if not isinstance(returned, (tuple, list)) or len(returned) != 2:
                raise InputError(
                    f"forward(model, batch) must return (outputs, targets), got {_describe(returned)}; "
                    "a forward that returns the loss itself goes with loss=None."
                )
            outputs, targets = returned
        try:
            return outputs, targets, self.rule.value(outputs, targets)
        except (TypeError, AttributeError) as error:
            if (advice := advice_on_outputs(outputs, targets, self.forward is None)) is None:
                raise
            raise InputError(f"{advice} (the loss says: {first_line(error)})") from error

    def _weight(self, batch: Any, outputs: Any, targets: Any) -> float:
        if self.weight is not None:
            weight = float(self.weight(batch))
            if not 0 <= weight < float("inf"):
                raise InputError(f"weight(batch) must be finite and not negative, got {weight}.")
            return weight
        if self.rule is None:
            return float(_leading_size(batch))
        if self.rule.reduction == "sum":
            return 1.0
        return self.rule.num_terms(outputs if isinstance(outputs, Tensor) else None, targets)

    def _culprit(self, batch: Any, outputs: Any) -> str:
        for name, tensor in self.model.named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                return f"the parameter {name!r} holds values that are not finite."
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
                return f"the buffer {name!r} holds values that are not finite (an attention mask of -inf is fine)."
        for leaf in tensors_in(batch):
            if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                return "the batch itself holds values that are not finite; clean the data."
        if isinstance(outputs, Tensor) and not bool(torch.isfinite(outputs).all()):
            return "parameters and data are finite but the model's outputs are not: they overflow; use a wider dtype."
        return "parameters, data and outputs are finite; the loss function itself overflows or divides by zero."


@contextlib.contextmanager
def _attention_fastpath_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _cudnn_off() -> Iterator[None]:
    """Switch cuDNN off; `torch.backends.cudnn.flags` would set its other flags to their defaults, TF32 among them."""
    before = torch.backends.cudnn.enabled
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


@contextlib.contextmanager
def _requires_grad_only(chosen: Sequence[Tensor], others: Iterable[Tensor]) -> Iterator[None]:
    """Let exactly the chosen tensors record gradients."""
    wanted = {id(t) for t in chosen}
    changed: list[Tensor] = [t for t in chosen if not t.requires_grad]
    changed += [t for t in others if id(t) not in wanted and t.requires_grad and t.is_leaf]
    for t in changed:
        t.requires_grad_(not t.requires_grad)
    try:
        yield
    finally:
        for t in changed:
            t.requires_grad_(not t.requires_grad)


@contextlib.contextmanager
def _unhooked(parameters: Iterable[Tensor], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave out hooks on gradients, which may clip or scale them: what is differentiated is the loss."""
    hooks: list[Any] = [p._backward_hooks for p in parameters]
    hooks += [torch_modules._global_backward_hooks, torch_modules._global_backward_pre_hooks]
    for module in modules:
        hooks += [module._backward_hooks, module._backward_pre_hooks]
    left_out = [(store, dict(store)) for store in hooks if store]
    for store, _ in left_out:
        store.clear()
    try:
        yield
    finally:
        for store, earlier in left_out:
            store.update(earlier | store)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Seed all generators and restore them; yields a function that says whether random numbers were drawn since."""
    before = RandomStates([device])
    try:
        seeded = before.seed(seed)
        yield lambda: not seeded.same_as(RandomStates([device]))
    finally:
        before.restore()


def _past_modes(*values: Any) -> AbstractContextManager[Any]:
    """Leave modes that watch a model out of other arithmetic, unless tensors have ways of their own."""
    plain = all(type(t) is Tensor for value in values for t in tensors_in(value))
    return torch._C.DisableTorchFunction() if plain else contextlib.nullcontext()


def _leading_size(batch: Any) -> int:
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        raise InputError(
            "a batch with 'labels' whose loss the model computes itself counts by its unmasked tokens, which only the "
            "model's author knows: pass weight=, or see curvature.adapters.hugging_face."
        )
    sized = [t for t in tensors_in(batch) if t.ndim > 0]
    if not sized:
        raise InputError(f"cannot tell how much a batch of type {type(batch).__name__} counts; pass weight=.")
    return sized[0].shape[0]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
