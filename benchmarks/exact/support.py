"""Write docs/backpack_support.md: what BackPACK computes right, alone and through `curvature.layerwise`.

`python -m benchmarks.exact.support`. Every layer is crossed with a few losses, every loss with one model, in float64,
against dense matrices by autograd; errors are |found - dense| / |dense|.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backpack
import torch
from backpack import extensions
from rich.progress import track
from torch import Tensor, nn

from curvature import Objective
from curvature.errors import InputError
from curvature.layerwise import backpack_per_example, exact_diagonal
from tests.curvature.layerwise.exact_cases import (
    LAYERS,
    LOSSES,
    Layer,
    Loss,
    dense_jacobian,
    ggn,
    hessian,
    targets,
    twice_cross_entropy,
)

__all__ = ["alone", "main", "table", "through_us"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "backpack_support.md"
QUANTITIES = ("Gauss-Newton diagonal", "Hessian diagonal", "per-example gradients", "per-example norms")
CROSSED = ("cross-entropy", "cross-entropy, class weights", "mean squared error", "binary cross-entropy, 3 outputs")
RIGHT = 1e-8


def reference(quantity: str, model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return a quantity from dense matrices or a loop over examples; per-example ones of what each adds to the loss."""
    if quantity == "Gauss-Newton diagonal":
        return ggn(model, loss, x, y).diagonal()
    if quantity == "Hessian diagonal":
        return hessian(model, loss, x, y).diagonal()
    params: list[Tensor] = list(model.parameters())
    outputs = model(x)
    leaf = outputs.detach().requires_grad_()
    (added,) = torch.autograd.grad(loss(leaf, y), leaf)
    rows = torch.stack([dense_jacobian((outputs[i] * added[i]).sum(), params)[0] for i in range(len(x))])
    return rows if quantity == "per-example gradients" else rows.norm(dim=1)


def alone(quantity: str, model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return what BackPACK computes with its own rules, called as its documentation has it."""
    make: Callable[[], Any] = {
        "Gauss-Newton diagonal": extensions.DiagGGNExact,
        "Hessian diagonal": extensions.DiagHessian,
        "per-example gradients": extensions.BatchGrad,
        "per-example norms": extensions.BatchL2Grad,
    }[quantity]
    extension = make()
    extended = backpack.extend(model)
    criterion: Callable[..., Tensor] = backpack.extend(loss) if isinstance(loss, nn.Module) else loss
    if loss is twice_cross_entropy:  # the module is extended, the factor in front of it is not seen
        inner = backpack.extend(nn.CrossEntropyLoss())
        criterion = lambda z, y: 2 * inner(z, y)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with backpack.backpack(extension):
            criterion(extended(x), y).backward()
    found = [getattr(p, extension.savefield) for p in model.parameters()]
    if quantity == "per-example norms":
        return torch.stack(found).sum(0).sqrt()
    return torch.cat([f.reshape(len(x), -1) if "per-example" in quantity else f.reshape(-1) for f in found], dim=-1)


def through_us(quantity: str, model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return what `curvature.layerwise` makes of it with BackPACK alone, an error where it does not use it."""
    objective = Objective(model, loss, (x, y))
    if "diagonal" in quantity:
        kind: Any = "ggn" if quantity.startswith("Gauss") else "hessian"
        return exact_diagonal(objective, kind, route="backpack").values
    found = backpack_per_example(objective, ["grad", "norms"])
    value = found.grad if quantity == "per-example gradients" else found.norms
    assert value is not None
    return found.weights[:, None] * value if value.ndim == 2 else found.weights * value


def error(compute: Callable[..., Tensor], quantity: str, layer: Layer, loss: Loss) -> float | str:
    """Return the relative error, or the first line of why there is none."""
    expected = reference(quantity, layer.model(loss.outputs), loss.build(), layer.inputs(), targets(loss)).detach()
    try:
        found = compute(quantity, layer.model(loss.outputs), loss.build(), layer.inputs(), targets(loss)).detach()
    except InputError as refusal:
        return str(refusal).removeprefix("BackPACK is not to be used here: ").split(". ")[0]
    except Exception as failure:
        return f"{type(failure).__name__}"
    if found.shape != expected.shape:
        return "another shape"
    return float((found - expected).norm() / expected.norm())


def cell(errors: list[float | str]) -> str:
    """Return the largest error, or why there is none."""
    refusals = [e for e in errors if isinstance(e, str)]
    numbers = [e for e in errors if not isinstance(e, str)]
    if refusals:
        return refusals[0]
    worst = max(numbers)
    return f"{worst:.0e}" if worst < RIGHT else f"**wrong: {worst:.0%}**"


def table(
    rows: list[tuple[str, list[tuple[Layer, Loss]]]], title: str, compute: Callable[..., Tensor], *, quiet: bool = False
) -> str:
    """Return a markdown table of rows of cases by quantity."""
    lines = [f"| {title} | {' | '.join(QUANTITIES)} |", "|---" * (1 + len(QUANTITIES)) + "|"]
    for name, cases in track(rows, title, disable=quiet):
        cells = [cell([error(compute, q, layer, loss) for layer, loss in cases]) for q in QUANTITIES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the document."""
    plain_net = next(layer for layer in LAYERS if layer.name == "Flatten")
    crossed = [loss for loss in LOSSES if loss.name in CROSSED]
    plain = [loss for loss in LOSSES if loss.name == "cross-entropy"]
    by_layer = [(layer.name, [(layer, loss) for loss in crossed]) for layer in LAYERS]
    by_layer_alone = [(layer.name, [(layer, loss) for loss in plain]) for layer in LAYERS]
    by_loss = [(loss.name, [(plain_net, loss)]) for loss in LOSSES]
    DOCUMENT.write_text(
        f"""# What BackPACK is used for

Made by `python -m benchmarks.exact.support` with torch {torch.__version__} and BackPACK 1.7.1. Every entry is the
relative error against dense matrices in float64, the largest over the losses of a row, or the reason why
`curvature.layerwise` does not use BackPACK there; with `route="auto"`, diagonals then come from autograd.

## Through `curvature.layerwise`, by layer

Crossed with {", ".join(CROSSED[:-1])} and {CROSSED[-1]}.

{table(by_layer, "layer", through_us)}

## Through `curvature.layerwise`, by loss

Behind a convolution and two linear layers with tanh. The loss Hessian's root is the toolkit's own, so that losses
BackPACK does not know serve, too.

{table(by_loss, "loss", through_us)}

## BackPACK alone, by loss

Called as its documentation has it, on the same model: what would be silently wrong, or fails.

{table(by_loss, "loss", alone)}

## BackPACK alone, by layer

Under cross-entropy, torch's default dtype being float32 and the model float64. Rows of activations use one module
twice, which fails alone with an AttributeError and is straightened out above.

{table(by_layer_alone, "layer", alone)}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
