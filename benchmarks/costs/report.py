"""From rows to the costs in docs/questions.md: every cell of a table there that is headed with a cost is made here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["EXCUSED", "TEMPLATES", "told", "with_costs"]

TEMPLATES = {
    # How sharp, how curved
    "How sharp is the minimum?": "{top}",
    "The k largest eigenvalues?": "10 of them: {top 10}; `lobpcg` {lobpcg 10}",
    "The smallest? (in descending order: the smallest is the last)": "{smallest}",
    "The largest in size, between bounds?": "{norm}",
    "The whole spectrum?": "{spectrum}; with layers {inspect}",
    "Only the density, how much lies below x, a quantile?": "{density}; the rest none",
    "Its trace?": "to 5 %: {trace 5 %}; to 1 %: {trace 1 %}",
    "Its Frobenius norm, its moments?": "{frobenius}; moments of a density: none",
    "Its diagonal?": "{diagonal}",
    "The exact diagonal, Kronecker factors?": (
        "Gauss-Newton {exact GGN diagonal}, Hessian {exact Hessian diagonal}; factors {factors}"
    ),
    "log det, effective dimension, tr f(H)?": "{GGN spectrum}",
    "f(H) times a vector?": "{function}",
    "A low-rank part, and what it leaves out?": "{nystrom}, {randomized}; of a spectrum none",
    "How sharp by any published measure?": "{sharpness}",
    "What may be rescaled without changing the function?": "{symmetries}",
    "How sharp along a direction, on a plane, around?": "{along} a point",
    # Layers
    "Which layer is sharpest?": "{layers} a layer",
    "Which layers are ill-conditioned?": "{conditioning}",
    "What would a preconditioner gain?": "{gains}",
    "How are layers coupled?": "{coupling} a layer",
    "Whose diagonal is large?": "{layer diagonals}",
    "Do errors vanish or explode with depth?": "{jacobians}",
    "How much of the curvature is between classes?": "{classes}",
    "Which layers carry the noise?": "{noise}",
    # The point
    "Minimum, saddle, plateau?": "{critical}",
    "Does the gradient lie in the sharpest directions?": "{alignment}",
    "How flat is the path between them?": "{path} a point; bent, 10 to 100 gradients more, as given",
    # Fewer weights
    "How does the loss rise if these go?": "scores {scores}, changes {removal}",
    "The same analyses of a sub-network?": "a gradient of it, with its objective: {sub-network}",
    "Is there a winning ticket?": "{tickets}, for 2 seeds of 40 steps on 64 examples; 4 trainings a seed",
    # Capacity and generalization
    "Is there double descent, and where? Does a wider network, a longer training, more data generalise better?": (
        "{descent}, for 2 times 3 trainings of 50 steps; usually 5 times 12 of 4000"
    ),
    "How many examples can this training fit, and is it over- or under-parametrised?": (
        "{complexity}, for 50 steps, 200 examples and 3 seeds; usually 10 to 20 trainings of five networks"
    ),
    "How many directions do the data determine?": "{dimension}, for the three matrices",
    # Which of many solutions
    "All of these, on a task's data?": "{bias}",
    # Training
    "Largest stable learning rate, here, with SGD?": "{top}",
    "... with Adam and its kind?": "{preconditioned top}",
    "Which rate breaks a training, and which is best?": "{lr}, for 40 steps; 15 to 25 short trainings",
    "Which optimizer is ahead here, and is that chance?": (
        "{race}, for two optimizers and 20 steps on 128 examples; for each a search of 6 and 5 trainings"
    ),
    "How far can this step go?": "{critical sharpness}: one gradient, at most 6 forward passes",
    "How smooth is the loss along the gradient?": "{smoothness}",
    "How large a batch is useful?": "{noise}",
    "Is gradient noise aligned with curvature, are its tails heavy?": "{curvature noise}; none",
    "What does SGD add to the loss?": "{implicit}",
    "Train with that penalty?": "{penalty} a batch",
    "Would a second-order step help?": "{solve}",
    "... a system or subproblem of my own?": (
        "`cg` {cg}, `minres` {minres}, `lsmr` {lsmr}, `trust_region` {trust region}, `gltr` {gltr}, cubic {cubic}"
    ),
    # Single examples
    "How long is the gradient of each example?": "{example norms}",
    "Mean, variance and noise of the gradients of examples?": "{example moments}",
    "Which examples have like gradients?": "{example dots}",
    "The gradients themselves?": "{example gradients}",
    # Size
    "Does a product fit into my GPU's memory? How long will it take?": "{plan}",
    # Optimizers
    "matrices, mini-batches": "{adamw}",
    "few steps, each of which may cost": "{step of gauss-newton}",
    "mini-batches, any network": (
        "`AdaHessian` {sgd: adahessian}, every 10th step {sgd: adahessian-10}; `Sophia`, `ESGD` "
        "{sgd: sophia-h|sophia-g|esgd}, `SASSHA` {sgd: sassha}"
    ),
    "flat minima": "{step of sam|asam}",
    "no rate to tune": "`SLS` {sgd: our-sls}, `COCOB` {sgd: our-cocob}, `LearnedOptimizer` {sgd: learned}",
    "first-order, as compared with": "{sgd: our-lion|our-yogi}; AdamW {sgd: adamw}",
    "no backward pass": "`ForwardGradient` {sgd: forward-gradient} a direction; feedback {sgd: direct-feedback}",
    "sums of squares, PINNs": "{step of levenberg-marquardt}",
    "PINNs, thousands of iterations": "{step of ss-broyden} an iteration",
    "full batch, smooth": (
        "`NewtonCG` {step of newton-cg}, `TrustRegionNewton` {step of trust-region}, `SketchyNewton` "
        "{step of sketchy-newton}"
    ),
    "saddles": "`SaddleFreeNewton` {step of saddle-free}, `CubicNewton` {step of cubic-newton}",
    "natural gradient, small networks": "{step of natural-gradient}",
    "minimise to convergence": "{step of newton-cg} a step",
    # Matrices and parts
    "Hessian, Gauss-Newton: [which?](concepts/which_matrix.md)": "{kept: hessian}, {kept: ggn}, graph kept",
    "Fisher, drawn, empirical": "{Fisher product}, {drawn Fisher product}, {empirical Fisher product}",
    "noise, Jacobian, kernel": "{covariance product}, {Jacobian product}, {kernel product}",
}
"""By the first cell of the row. {names} of calls stand for what their rows have, {a|b} for the range of several; of
optimizers in steps of SGD. {sgd: a|b} and {adamw} are of the rows of the suites optimizers and matrices, {kept: matrix}
of the suite products."""
EXCUSED = {
    "Which weights can go, and what would it cost?": "half a minute, most of it no pass of the network",
    "Can it fit labels that mean nothing, and what gives that away?": "trainings: the price is told before they begin",
    "What do regularisers do to sharpness, noise and effective dimension?": "likewise",
    "Is this run at the edge of stability?": "products a reading: benchmarks/tracking",
    "How far apart are two spectra?": "of densities that are there",
    "Do these checkpoints differ?": "of runs that are there",
    "... of least squares, exactly?": "no gradients: singular value decompositions",
    "Does depth lead to low rank?": "seconds, and no network of one's own",
    "Does a small start lead to a sparse solution?": "likewise",
    "Does label noise lead to flat solutions?": "likewise",
    "... in Hugging Face's, Lightning's loops?": "as the row above",
    "Did the loss spike, and did anything warn?": "of a record that is there",
    "Does the theory of that hold here?": "an epoch a rate: as long as the data",
    "My model is sharded over ranks: what do I change?": "collectives, which have no gradients; docs/benchmarks.md",
    "... and how much will a cluster take?": "from sizes alone",
    "is my own optimizer sound?": "seconds, on problems of its own",
    "of a part, of parts, preconditioned; your own": "those of what they are made of",
    "Krylov spaces themselves": "as many products as steps",
    "probes and substreams": "no product",
    "parameters by name": "no product",
    "read and write": "no product",
}
"""Rows whose cost is no measured number of gradients, and why."""
SHORT, MARK = "digits-mlp", "†"
"""Its gradient takes a millisecond; calls on it take mostly what is no arithmetic: the page has the other networks."""
_MATRIX = {"KFAC, every 10th", "EKFAC, every 10th", "soap-steady", "shampoo-steady"}
Rows = Sequence[dict[str, Any]]


def told(names: str, rows: Rows) -> str:
    """Return the cost of a call, or the range of several: "23 to 57 gradients (13 to 31 products)"."""
    first, *others = names.split("|")
    prefix = first[: first.rindex(" ") + 1] if others else ""
    wanted = {first, *(prefix + other for other in others)}
    found = [row for row in rows if row["call"] in wanted and not row.get("failure")]
    if missing := wanted - {row["call"] for row in found}:
        raise ValueError(f"nothing was measured of {', '.join(sorted(missing))}")
    long = [row for row in found if row["net"] != SHORT]
    on = "" if {row["call"] for row in long} == wanted else MARK
    found = found if on else long
    if first.startswith("step of "):
        sgd = {row["net"]: row["gradients"] for row in rows if row["call"] == "step of sgd"}
        return f"{_range([row['gradients'] / sgd[row['net']] for row in found], 'step')} of SGD{on}"
    said = _range([row["gradients"] for row in found], "gradient") + on
    if products := [row["products"] for row in found if row["products"] is not None]:
        said += f" ({_range(products, 'product')})"
    return said


def _range(values: Sequence[float], unit: str) -> str:
    low, high = (_figure(value) for value in (min(values), max(values)))
    return f"{low if low == high else f'{low} to {high}'} {unit}{'' if high == '1' else 's'}"


def _figure(value: float) -> str:
    if value >= 10_000:
        return f"{float(f'{value:.2g}'):,.0f}".replace(",", " ")
    return f"{float(f'{value:.2g}'):g}"


def _steps(rows: Rows, field: str, methods: set[str], unit: str) -> str:
    """Return the range of what a step costs in steps of a first-order method, by the rows of another suite."""
    values = [row[field] for row in rows if row.get(field) and row["method"] in methods]
    return f"{_range(values, 'step')} of {unit}"


def with_costs(text: str, costs: Rows, optimizers: Rows, matrices: Rows, products: Rows) -> str:
    """Return the page with the cells of its costs as the rows have them."""

    def figure(match: re.Match[str]) -> str:
        kind, _, names = match[1].partition(": ")
        if kind == "adamw":
            return _steps([*matrices, *optimizers], "adamw_steps", _MATRIX, "AdamW")
        if kind == "sgd":
            return _steps(optimizers, "sgd_steps", set(names.split("|")), "SGD")
        if kind == "kept":
            found = [row for row in products if row["operator"] == names and row["method"] == "kept"]
            return _range([row["gradients"] for row in found], "gradient")
        return told(match[1], costs)

    lines = text.split("\n")
    for i, cells, place in _cells(lines):
        if (template := TEMPLATES.get(cells[0])) is not None:
            lines[i] = _put(lines[i], place, re.sub(r"\{([^}]+)\}", figure, template))
    return "\n".join(lines)


def _cells(lines: Sequence[str]) -> Iterator[tuple[int, list[str], int]]:
    """Yield each row of a table that has costs: its line, its cells, and which of them is the cost."""
    place = -1
    for i, line in enumerate(lines):
        cells = [cell.strip() for cell in _split(line)[1:-1]]
        if not cells:
            place = -1
        elif place < 0:
            place = next((k for k, cell in enumerate(cells) if "cost" in cell), -1)
        elif place >= 0 and not set(line) <= set("|-: "):
            yield i, cells, place


def _split(line: str) -> list[str]:
    """Return what stands between the bars of a line; bars within code, and escaped ones, are none."""
    parts, depth, part = [], False, ""
    for before, char in zip(" " + line, line, strict=False):
        depth ^= char == "`"
        if char == "|" and not depth and before != "\\":
            parts.append(part)
            part = ""
        else:
            part += char
    return [*parts, part] if line.startswith("|") else []


def _put(line: str, place: int, cell: str) -> str:
    parts = _split(line)
    parts[place + 1] = f" {cell} "
    return "|".join(parts)
