"""How signals come back through depth: the Jacobian of a network's outputs with respect to each layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from analysis.training.untouched import untouched
from curvature.arguments import checked
from curvature.data.tensors import move_batch
from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors

__all__ = ["jacobian_norms", "layer_jacobians"]


@in_whole_vectors
@checked
def layer_jacobians(objective: Objective, *, num_probes: int = 8, generator: AnyGenerator) -> dict[str, float]:
    """Return |d outputs / d layer|_F of each layer that holds parameters, per row of the outputs.

    The norm of the Jacobian of the outputs z with respect to what a layer puts out, (|J|_F^2 / rows of z)^1/2, by
    E |J' v|^2 = |J|_F^2 with normal v: how much louder or fainter errors are by the time they arrive there. Where they
    vanish or explode with depth, gradients do. With He's initialisation they keep their size through ReLU layers of
    one width; with weights of variance 1 / width they shrink by 2^1/2 a layer.

    The relative standard error is about (2 / (rows x num_probes))^1/2 where rows are alike. Cost: a forward pass and
    `num_probes` backward passes.

    Args:
        objective: with `loss(outputs, targets)`, and a tensor as outputs.
        num_probes: number of v.
        generator: source of random numbers, on the objective's device, or a seed.

    Raises:
        InputError: for an objective without outputs, or arguments out of range.

    Reference: Glorot and Bengio (2010); Saxe, McClelland and Ganguli (2014), arXiv 1312.6120; He, Zhang, Ren and Sun
    (2015), arXiv 1502.01852.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     for layer in model:
        ...         _ = layer.weight.copy_(3 * torch.eye(2))
        >>> objective = Objective(model, nn.MSELoss(), (torch.ones(500, 2), torch.zeros(500, 2)))
        >>> {name: round(norm) for name, norm in layer_jacobians(objective, generator=0).items()}  # |3 I|_F, |I|_F
        {'0': 4, '1': 1}
    """
    if num_probes < 1:
        raise InputError(f"num_probes must be at least 1, got {num_probes}.")
    with untouched(objective, evaluation_mode=False):
        return jacobian_norms(objective, None, num_probes, as_generator(generator, objective.device))


def jacobian_norms(
    objective: Objective, batches: list[Any] | None, num_probes: int, generator: torch.Generator
) -> dict[str, float]:
    """Return the norms on the objective's data or other batches, leaving traces in buffers and random states."""
    if objective.settings["loss"] is None:
        raise InputError(
            "Jacobians need outputs: give the objective loss= and a forward that returns (outputs, targets)."
        )
    modules = dict(objective.model.named_modules())
    layers = {block.name: modules[block.name] for block in objective.space.blocks if block.name in modules}
    squares, rows = dict.fromkeys(layers, 0.0), 0
    for batch in objective.batches() if batches is None else batches:
        seen: list[tuple[str, Tensor]] = []
        hooks = [module.register_forward_hook(_recorder(name, seen)) for name, module in layers.items()]
        try:
            with torch.enable_grad():
                outputs = _outputs(objective, move_batch(batch, objective.device))
        finally:
            for hook in hooks:
                hook.remove()
        rows += outputs.shape[0]
        places = [tensor for _, tensor in seen]
        for _ in range(num_probes if places else 0):
            v = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
            found = torch.autograd.grad(outputs, places, v, retain_graph=True, allow_unused=True)
            for (name, _), part in zip(seen, found, strict=True):
                squares[name] += 0.0 if part is None else float(part.double().square().sum()) / num_probes
    sums = torch.tensor([float(square) for square in squares.values()], dtype=torch.float64)
    if objective.ranks is not None and batches is None:
        sums, total = objective.ranks.sum(sums, rows)
        rows = int(total)
    return {name: math.sqrt(square / max(rows, 1)) for name, square in zip(squares, sums.tolist(), strict=True)}


def _recorder(name: str, seen: list[tuple[str, Tensor]]) -> Any:
    def record(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        seen.append((name, output))
        return output.clone()  # what follows may work in place

    return record


def _outputs(objective: Objective, batch: Any) -> Tensor:
    forward = objective.settings["forward"]
    outputs = objective.model(batch[0]) if forward is None else forward(objective.model, batch)[0]
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise InputError(f"Jacobians need a tensor of outputs, got {type(outputs).__name__}; let forward return one.")
    return outputs
