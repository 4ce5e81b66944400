"""Whether estimates by perturbed activities are unbiased for a model: looked at once for each batch size and structure.

Two things are needed. Parameters must act through the outputs of the layers that hold them: then other values of theirs
have the same effect whether they are there all the time or only while their own layers run. With derivatives for each
example, row i of a layer's output must act on row i of the model's outputs alone: then a tangent in some rows of
all layers leaves the others' outputs without one, exactly. Rows are told apart by the bits of their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from curvature.errors import InputError
from optimizers.without_backprop.activities import Call, around_layers, perturbed

__all__ = ["bits_of", "refuse_mixed_rows", "refuse_other_rows", "refuse_uncounted"]

Given = Callable[[], Tensor]  # evaluates the closure and returns the outputs or the loss

_INSTEAD = "return the loss instead of (outputs, targets)."


def bits_of(count: int) -> int:
    """Return the number of bits that tell so many rows apart."""
    return max(0, count - 1).bit_length()


def refuse_other_rows(calls: Sequence[Call], count: int) -> None:
    """Refuse layers whose outputs do not begin with the examples, by their size."""
    for call in calls:
        if call.direction.shape[:1] != (count,):
            raise InputError(
                f"a layer returns {tuple(call.direction.shape)} for {count} examples, so that its rows are none: "
                + _INSTEAD
            )


def refuse_mixed_rows(
    given: Given,
    layers: Sequence[nn.Module],
    params: Sequence[Tensor],
    count: int,
    bits: int,
    draw: Callable[[Tensor], Tensor],
) -> bool:
    """Refuse layers whose rows act on outputs of other examples; return whether everything was finite.

    Cost: two passes in forward mode for each bit.
    """
    finite = True
    for bit in range(bits):
        for value in (0, 1):
            chosen = (torch.arange(count) >> bit) & 1 == value

            def some_rows(like: Tensor, chosen: Tensor = chosen) -> Tensor:
                _refuse_another_batch((count,), like.shape[:1])
                return draw(like) * chosen.to(like).view(-1, *[1] * (like.ndim - 1))

            with forward_ad.dual_level(), perturbed(layers, params, some_rows):
                tangent = forward_ad.unpack_dual(given()).tangent
            if tangent is None:
                continue
            finite &= bool(tangent.isfinite().all())
            if finite and bool(tangent[~chosen.to(tangent.device)].any()):
                raise InputError(
                    f"the first dimension of what some layer returns has the size of the batch, {count}, and is not "
                    "the examples, or examples see each other: one row acts on the outputs of others (positions "
                    "looked up once for all examples, reparametrised weights, rows in another order). " + _INSTEAD
                )
    return finite


def refuse_uncounted(
    given: Given, layers: Sequence[nn.Module], named: Sequence[tuple[str, Tensor]], shifts: Sequence[Tensor]
) -> bool:
    """Refuse parameters that act otherwise than through their layers; return whether everything was finite.

    Args:
        given: evaluates the closure and returns its outputs or loss.
        layers: that hold the parameters.
        named: names and parameters.
        shifts: random numbers in the parameters' shapes.

    Cost: three forward passes. Memory: two copies of the parameters.
    """
    pairs = list(zip((p for _, p in named), shifts, strict=True))
    verdict = _differ(given, layers, pairs)
    if verdict:
        name = next((name for (name, _), pair in zip(named, pairs, strict=True) if _differ(given, layers, [pair])), "")
        raise InputError(
            f"{name or 'a parameter'} is also used outside of the forward pass of the layer that holds it (a tied head "
            "by F.linear, a penalty on weights), where its activities are not perturbed: call a module that holds it "
            "there, e.g. an nn.Linear with the same weight, or leave activities_of out."
        )
    return verdict is not None


def _differ(given: Given, layers: Sequence[nn.Module], pairs: Sequence[tuple[Tensor, Tensor]]) -> bool | None:
    """Return whether other values of these parameters act where their layers do not run; None if it is not finite."""
    params = [p for p, _ in pairs]
    before, shifted = {id(p): p.clone() for p in params}, {}
    for p, v in pairs:
        size = p.norm() / max(1, p.numel()) ** 0.5
        shifted[id(p)] = p + 0.1 * torch.where(size == 0, torch.ones_like(size), size) * v

    def begin(own: list[Tensor]) -> None:
        for p in own:
            p.copy_(shifted[id(p)])

    def end(_: nn.Module, own: list[Tensor], still: set[int], output: Any) -> Any:
        for p in own:
            if id(p) not in still:
                p.copy_(before[id(p)])
        return output

    try:
        with around_layers(layers, params, begin, end):
            through_layers, again = given(), given()
        begin(params)
        whole = given()
    finally:
        for p in params:
            p.copy_(before[id(p)])
    for t in (again, whole):
        _refuse_another_batch(through_layers.shape, t.shape)
    wide = torch.promote_types(whole.dtype, torch.float32)
    noise, gap = ((t.to(wide) - through_layers.to(wide)).norm() for t in (again, whole))
    if not bool(gap.isfinite()):
        return None
    return bool(gap > torch.maximum(10 * noise, 4 * torch.finfo(whole.dtype).eps * whole.to(wide).norm()))


def _refuse_another_batch(first: Sequence[int], later: Sequence[int]) -> None:
    if tuple(first) != tuple(later):
        raise InputError(
            f"the closure gave {tuple(first)} and then {tuple(later)}: it is evaluated several times, and must take "
            "its batch from outside, so that it is the same each time."
        )
