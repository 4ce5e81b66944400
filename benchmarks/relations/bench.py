"""Published relations of curvature, sharpness and landscape, at a scale where a core measures them in minutes.

    python -m benchmarks.relations.bench [RELATION ...] [--seeds N]      rows to results/relations.json

Each row is one measurement of one seed; what a relation comes to over seeds is left to whoever reads the rows. Nothing
here is asserted but what is exact; README.md says what carried over to these networks and what did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analysis.alignment.class_structure import class_structure
from analysis.alignment.measure import gradient_alignment, overlap_over_time
from analysis.conditioning.measure import measure_conditioning
from analysis.landscape.directions import Scaling, random_direction
from analysis.landscape.measure import loss_along, loss_on_plane
from analysis.sharpness.measure import SharpnessPlan, measure_sharpness
from analysis.training.smoothness import gradient_smoothness
from benchmarks.common.suite import RESULTS as RESULTS_FOLDER
from benchmarks.common.suite import Row, Rows, command
from benchmarks.relations import networks
from curvature import GGNOperator, HessianOperator, Objective, eigsh
from curvature.linalg import frobenius_norm
from curvature.linop import Scaled, Sum

__all__ = ["RELATIONS", "main"]

RESULTS = RESULTS_FOLDER / "relations.json"
TOP = 10


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _objective(model: nn.Module, data: networks.Pair) -> Objective:
    return Objective(model, nn.CrossEntropyLoss(), data)


@torch.no_grad()
def _accuracy(model: nn.Module, data: networks.Pair) -> float:
    return float((model(data[0]).argmax(1) == data[1]).double().mean())


MARKS = (0, 50, 100, 200, 400, 800, 1600, 3200)


def training(seed: int, steps: Sequence[int] = MARKS) -> Iterator[Row]:
    """|H - G|_F / |H|_F, the top subspace and the gradient in it, at checkpoints of SGD with rate 0.1.

    Sagun et al. (2018), arXiv 1706.04454, and Papyan (2019) for the residual; Gur-Ari et al. (2018), arXiv 1812.04754.
    """
    data, model = networks.digits(), networks.classifier(seed)
    found, bases = [], []

    def measure(step: int) -> None:
        objective = _objective(model, data)
        H, G = HessianOperator(objective), GGNOperator(objective)
        residual = frobenius_norm(Sum(H, Scaled(G, -1.0)), num_matvecs=100, generator=generator(seed))
        whole = frobenius_norm(H, num_matvecs=100, generator=generator(seed + 1))
        ratio = float(residual.value / whole.value)
        parts = [float(f.stderr / f.value) for f in (residual, whole)]
        aligned = gradient_alignment(objective, TOP, generator=generator(seed))
        pairs = eigsh(objective, TOP + 1, rtol=1e-4, generator=generator(seed))
        bases.append(pairs.eigenvectors[:, :TOP])
        values = pairs.eigenvalues
        classes = class_structure(objective, top=bases[-1])
        found.append(
            {
                "step": step,
                "loss": float(objective.loss()),
                "residual": ratio,
                "residual_stderr": ratio * (parts[0] ** 2 + parts[1] ** 2) ** 0.5,
                "gradient_share": float(aligned.gradient.shares[-1]),
                "gradient_share_error": float(aligned.share_error[-1]),
                "ratio_after_classes": float(values[TOP - 1] / values[TOP]),
                "class_overlap": None if classes.overlap is None else classes.overlap.overlap,
                "class_share": classes.shares["class"],
            }
        )

    networks.train(model, data, steps=steps[-1], rate=0.1, batch=32, seed=seed, marks=steps, at_mark=measure)
    overlaps = overlap_over_time(bases)
    chance = TOP / bases[0].shape[0]
    for i, row in enumerate(found):
        yield {**row, "overlap_with_next": float(overlaps[i, i + 1]) if i + 1 < len(found) else None, "chance": chance}


def identity(seed: int, count: int = 120) -> Iterator[Row]:
    """The Gauss-Newton matrix of softmax cross-entropy as a sum over examples and classes: Papyan (2020).

    In float64; the sum is taken over explicit gradients of single logits, which no product of ours enters.
    """
    images, labels = networks.digits(count)
    model = networks.classifier(seed)
    networks.train(model, (images, labels), steps=300, rate=0.1, batch=20, seed=seed)
    model, images = model.double(), images.double()
    G = GGNOperator(_objective(model, (images, labels))).to_dense()
    params, total = list(model.parameters()), torch.zeros_like(G)
    for x in images:
        logits = model(x[None])[0]
        p = logits.softmax(0).detach()
        J = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(z, params, retain_graph=True)]) for z in logits]
        )
        towards = J - p @ J  # row c': J'(e_c' - p)
        total += towards.T @ (p[:, None] * towards) / len(images)
    yield {"relative_error": float((G - total).norm() / total.norm())}


def rescaling(seed: int) -> Iterator[Row]:
    """All measures of a ReLU network written anew: layers times 5 and over 5 (Dinh et al. 2017), units by 1/5 to 5."""
    images, labels = networks.digits(200)
    model = networks.relu(seed)
    networks.train(model, (images.double(), labels), steps=300, rate=0.1, batch=20, seed=seed)
    tables = []
    settings = SharpnessPlan(num_probes=4, num_steps=6, num_matvecs=1000, piece=50)
    for factor in (1.0, 5.0, 5.0 ** torch.linspace(-1, 1, 8, dtype=torch.float64)):
        other = networks.relu(seed)
        other.load_state_dict(model.state_dict())
        networks.rescale(other, factor)
        objective = _objective(other, (images.double(), labels))
        tables.append(measure_sharpness(objective, settings, generator=generator(seed)))
    for table, scales in zip(tables[1:], ("layers", "units"), strict=True):
        for name, ratio in table.ratios(tables[0]).items():
            row = tables[0][name]
            said = row.rescaling_invariant if scales == "layers" else row.unit_invariant
            yield {"scales": scales, "measure": name, "ratio": ratio, "said_invariant": said}


def directions(seed: int) -> Iterator[Row]:
    """The loss along a random direction of a ReLU network written in two ways, normalised or not: Li et al. (2018)."""
    images, labels = networks.digits(200)
    model = networks.relu(seed)
    networks.train(model, (images.double(), labels), steps=300, rate=0.1, batch=20, seed=seed)
    t = torch.linspace(-1, 1, 41)
    scalings: tuple[Scaling, ...] = ("filter", "layer", "unit", "raw")
    for scaling in scalings:
        curves = []
        for factor in (1.0, 5.0):
            networks.rescale(model, factor)
            objective = _objective(model, (images.double(), labels))
            d = random_direction(objective, scaling=scaling, generator=generator(seed))
            curves.append(loss_along(objective, d, t).losses)
            networks.rescale(model, 1 / factor)
        change = float((curves[1] - curves[0]).abs().max() / curves[0].abs().max())
        yield {"scaling": scaling, "steps": t.tolist(), "curves": [c.tolist() for c in curves], "change": change}


def skips(seed: int) -> Iterator[Row]:
    """A deep convolutional network with and without skips, trained alike: Li et al. (2018).

    Roughness at the end: filter-normalised rises (invariant to the scale of layers), and how negative the curvature is
    on the plane of two such directions, lambda_min / lambda_max of the Hessian in that plane by second differences.
    """
    data = networks.digits(600)
    for skip in (True, False):
        model = networks.residual(skip, seed)
        networks.train(model, data, steps=400, rate=0.05, batch=32, seed=seed)
        objective = _objective(model.eval(), data)
        g = generator(seed)
        first, second = (random_direction(objective, scaling="filter", generator=g) for _ in range(2))
        axis = torch.linspace(-1, 1, 21)
        plane = loss_on_plane(objective, first, second, axis, axis)
        names = ["top_eigenvalue", "adaptive_top_eigenvalue", "filter_average"]
        table = measure_sharpness(objective, measures=names, generator=generator(seed))
        yield {
            "skip": skip,
            "loss": plane.centre,
            "test_accuracy": _accuracy(model, networks.held_out()),
            **{name: table[name].value for name in names},
            "filter_average_stderr": table["filter_average"].stderr,
            "edge_rise": float(_edge(plane.losses).median()) - plane.centre,
            "concave_share": _concave_share(plane.losses),
            "plane": plane.losses.tolist(),
            "axis": axis.tolist(),
        }


def _edge(losses: Tensor) -> Tensor:
    return torch.cat([losses[0], losses[-1], losses[1:-1, 0], losses[1:-1, -1]])


def _concave_share(losses: Tensor) -> float:
    """Return the mean over the plane's inner points of |lambda_min| / |lambda_max|, where lambda_min < 0, else 0."""
    f = losses
    xx = f[1:-1, 2:] - 2 * f[1:-1, 1:-1] + f[1:-1, :-2]
    yy = f[2:, 1:-1] - 2 * f[1:-1, 1:-1] + f[:-2, 1:-1]
    xy = (f[2:, 2:] - f[2:, :-2] - f[:-2, 2:] + f[:-2, :-2]) / 4
    values = torch.linalg.eigvalsh(torch.stack([torch.stack([xx, xy], -1), torch.stack([xy, yy], -1)], -2))
    ratio = (-values[..., 0]).clamp(min=0) / values.abs().amax(-1).clamp(min=torch.finfo(f.dtype).tiny)
    return float(ratio.mean())


def batch_size(seed: int) -> Iterator[Row]:
    """Sharpness where SGD of several batch sizes ends, at equal rates and 60 epochs: Keskar et al. (2017)."""
    yield from _batch_sizes(seed, epochs=60)


def batch_size_equal_steps(seed: int) -> Iterator[Row]:
    """The same after 3000 steps of each, which end at more nearly equal losses."""
    yield from _batch_sizes(seed, steps=3000)


def _batch_sizes(seed: int, *, epochs: int = 0, steps: int = 0) -> Iterator[Row]:
    data, held_out = networks.digits(), networks.held_out()
    names = ["top_eigenvalue", "trace", "adaptive_top_eigenvalue", "adaptive_trace", "keskar", "normalised_average"]
    for batch in (8, 16, 32, 64, 128, 256):
        model, count = networks.classifier(seed), steps or epochs * (len(data[1]) // batch)
        networks.train(model, data, steps=count, rate=0.1, batch=batch, seed=seed)
        objective = _objective(model, data)
        table = measure_sharpness(objective, measures=names, generator=generator(seed))
        yield {
            "batch": batch,
            "steps": count,
            "loss": table.loss,
            "test_accuracy": _accuracy(model, held_out),
            **{name: table[name].value for name in names},
            **{f"{name}_stderr": table[name].stderr for name in names if table[name].kind == "estimate"},
        }


def normalisation(seed: int) -> Iterator[Row]:
    """Conditioning of a deep network with and without batch normalisation (train mode): Santurkar et al. (2018).

    Beside it what they measure: along one step of the gradient, how far loss and gradient move (their figure 4).
    """
    images, labels = networks.digits(500)
    for norm in (True, False):
        model = networks.deep(norm, seed).train()
        for step in (0, 300):
            if step:
                networks.train(model, (images, labels), steps=step, rate=0.1, batch=50, seed=seed)
            objective = _objective(model, (images, labels))
            found = measure_conditioning(objective, matrix="ggn", jacobi=True, generator=generator(seed))
            way = gradient_smoothness(objective, lr=0.1)
            whole = found.whole
            yield {
                "norm": norm,
                "step": step,
                "loss": float(objective.loss()),
                "largest": whole.largest.value,
                "condition": whole.condition.value,
                "condition_stderr": whole.condition.stderr,
                "effective_rank": whole.effective_rank.value,
                "stable_rank": whole.stable_rank.value,
                "layer_spread": found.layer_spread,
                "jacobi_gain": found.gains["jacobi"],
                "loss_range": way.loss_high - way.loss_low,
                "smoothness": way.effective_smoothness,
            }


RELATIONS: dict[str, Callable[[int], Iterator[Row]]] = {
    "training": training,
    "identity": identity,
    "rescaling": rescaling,
    "directions": directions,
    "skips": skips,
    "batch_size": batch_size,
    "batch_size_equal_steps": batch_size_equal_steps,
    "normalisation": normalisation,
}


def main() -> None:
    """Measure the relations asked for and put their rows in place of the old ones."""
    parser = command("relations", __doc__)
    parser.add_argument("relations", nargs="*", choices=[*RELATIONS, []])
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    names = a.relations or RELATIONS
    with Rows(a.out, ("relation",), len(names)) as rows:
        for name in names:
            rows.begin(name)
            found = [(seed, row) for seed in range(a.seeds) for row in RELATIONS[name](seed)]
            shown = [(name, seed, *(f"{k}={_short(v)}" for k, v in row.items())) for seed, row in found]
            said = "\n".join(" ".join(map(str, line)) for line in shown)
            rows.add(*({"relation": name, "seed": seed, **row} for seed, row in found), said=said)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "..." if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
