"""What takes an objective or a matrix gives on two ranks that hold parts of a model what one process gives, or refuses.

A public function that is not in the table is an error: nothing is left to chance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import analysis
import curvature
import curvature.layerwise
import curvature.linalg
import curvature.per_example
import optimizers
from analysis.registry import STUDIES
from curvature import (
    BlockDiagonalOperator,
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    JacobianOperator,
    MCFisherOperator,
    NTKOperator,
    Objective,
    PreconditionedOperator,
    SubmatrixOperator,
)
from curvature.layerwise.diagonal_summary import summarise_diagonal
from curvature.linalg import ThickRestartLanczos
from curvature.sharding.tensors import in_parts, whole
from tests.analysis.test_api import SETTINGS
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

pytestmark = IN_TWO_PROCESSES
ROUTES = {"whole parameters": None, "module by module": 0}
TOLERANCE, FLOOR = 1e-6, 1e-3  # relative, of what is iterated to a tolerance of its own; and of sizes below: absolute
RTOL = 1e-4  # of solvers: ranks take the steps of one process, whether or not these have converged


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def objective(rank: int | None, budget: int | None = None) -> Objective:
    """Four batches of three examples: two on each of two ranks, or all in one process."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=g, dtype=torch.float64), torch.randint(0, 2, (12,), generator=g)
    data = list(zip(x.split(3), y.split(3), strict=True))
    if rank is None:
        return Objective(net(), nn.CrossEntropyLoss(), data)
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net())
    return Objective(model, nn.CrossEntropyLoss(), data[2 * rank : 2 * rank + 2], memory_budget=budget)


def hessian(o: Objective) -> HessianOperator:
    return HessianOperator(o)


def vectors(o: Objective, k: int = 2) -> Tensor:
    X = torch.randn(o.num_params, k, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return in_parts(X, o.sharding, 0)


def vector(o: Objective) -> Tensor:
    return vectors(o)[:, 0]


def plain(o: Objective) -> Tensor:
    return whole(vector(o))


def damped(o: Objective) -> Any:
    """A positive definite matrix."""
    return GGNOperator(o)


def solver(o: Objective) -> Any:
    return ThickRestartLanczos(o, 2, rtol=RTOL, generator=0, confidence=None).run()


def direction(o: Objective, seed: int = 0) -> Any:
    return analysis.random_direction(o, scaling="unit", generator=seed)


def places(o: Objective) -> tuple[Any, Any]:
    here = analysis.present_place(o)
    return here, dataclasses.replace(here, vector=here.vector + 0.1 * plain(o), name="there")


def read(o: Objective) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(net().state_dict(), f"{folder}/place.pt")
        return analysis.read_place(o, Path(folder) / "place.pt").vector


def along_path(o: Objective) -> Any:
    return analysis.loss_along_path(o, *places(o), torch.linspace(0, 1, 3))


def on_plane(o: Objective) -> Any:
    steps = torch.tensor([-0.1, 0.0, 0.1])
    return analysis.loss_on_plane(o, direction(o), direction(o, 1), steps, steps)


def estimated_diagonals(o: Objective) -> Any:
    """What `layer_diagonals` gives where the diagonal is not known exactly."""
    found = curvature.linalg.diagonal(o, method="hutchinson", num_matvecs=4, keep_samples=False, generator=G)
    return summarise_diagonal(found, o.space).rows


PLAN = curvature.SpectrumPlan(k=2, num_bottom=1, num_probes=2, num_steps=8, num_groups=0)
ALL_ENTRIES = curvature.SpectrumPlan(k=2, num_probes=4, num_steps=8)  # as many columns as the matrix has


def step_of(method: str, **settings: Any) -> Callable[[Objective], Tensor]:
    """Return what takes two steps with an optimizer, and returns the parameters."""

    def call(o: Objective) -> Tensor:
        kind, model = getattr(optimizers, method), o.model
        given: Any = o.settings["data"]
        data = tuple(torch.cat([batch[i] for batch in given]) for i in range(2))

        def loss() -> Any:
            outputs = model(data[0])
            return (outputs, data[1]) if takes_outputs else nn.functional.cross_entropy(outputs, data[1])

        takes_outputs = settings.get("loss") is not None
        optimizer = kind(model.parameters(), **settings) if o.shards is None else None
        if optimizer is None:
            optimizer = optimizers.Sharded(model, kind, **settings)
        for _ in range(2):
            optimizer.step(loss)
        return torch.cat(
            [(p.full_tensor() if hasattr(p, "full_tensor") else p).reshape(-1) for p in model.parameters()]
        )

    return call


def measured(kind: str, o: Objective) -> Any:
    run = analysis.measure(kind, o, generator=3, check=False, **SETTINGS.get(kind, {}))
    return run.to_dict()[run.result]


# -- the table --------------------------------------------------------------------------------------------------------

V, G = vector, 0
CALLS: dict[str, Callable[[Objective], Any]] = {
    # operators: a product
    "HessianOperator": lambda o: HessianOperator(o) @ vectors(o),
    "GGNOperator": lambda o: GGNOperator(o) @ vectors(o),
    "FisherOperator": lambda o: FisherOperator(o) @ vectors(o),
    "EmpiricalFisherOperator": lambda o: EmpiricalFisherOperator(o) @ vectors(o),
    "GradientCovarianceOperator": lambda o: GradientCovarianceOperator(o) @ vectors(o),
    "MCFisherOperator": lambda o: MCFisherOperator(o, num_samples=1, generator=G) @ vectors(o),
    "JacobianOperator": lambda o: JacobianOperator(o).T @ (JacobianOperator(o) @ vector(o)),
    "NTKOperator": lambda o: NTKOperator(o) @ torch.ones(24, dtype=torch.float64),
    "BlockDiagonalOperator": lambda o: BlockDiagonalOperator(hessian(o)) @ vectors(o),
    "PreconditionedOperator": lambda o: PreconditionedOperator(hessian(o), vector(o).abs() + 1) @ vector(o),
    "all entries of a PreconditionedOperator": lambda o: curvature.spectrum(
        PreconditionedOperator(hessian(o), vector(o).abs() + 1), ALL_ENTRIES, generator=G
    ),
    "SubmatrixOperator": lambda o: (
        SubmatrixOperator(hessian(o), o.space.block("0.*"), o.space.block("2.*")) @ o.space.block("2.*").take(vector(o))
    ),
    "optimizer_divisor": lambda o: curvature.optimizer_divisor(
        torch.optim.Adam(o.model.parameters()), o.space, missing="identity"
    ),
    # curvature and its numerics
    "eigsh": lambda o: curvature.eigsh(o, 2, rtol=RTOL, generator=G),
    "ThickRestartLanczos": solver,
    "lobpcg": lambda o: curvature.linalg.lobpcg(o, 2, rtol=RTOL, generator=G),
    "layer_spectra": lambda o: curvature.layer_spectra(o, PLAN, generator=G),
    "spectrum": lambda o: curvature.spectrum(o, PLAN, generator=G),
    "plan": lambda o: curvature.plan(o, "trace").num_matvecs,
    "solve": lambda o: curvature.solve(o, o.gradient(), matrix="ggn", damping=0.1, rtol=RTOL).x,
    "cg": lambda o: curvature.linalg.cg(damped(o), vectors(o), damping=0.1, rtol=RTOL).x,
    "minres": lambda o: curvature.linalg.minres(hessian(o), vectors(o), rtol=RTOL).x,
    "lsmr": lambda o: curvature.linalg.lsmr(hessian(o), vector(o), damping=0.1, rtol=RTOL).x,
    "gltr": lambda o: curvature.linalg.gltr(o, o.gradient(), 0.1, rtol=RTOL).step,
    "trust_region": lambda o: curvature.linalg.trust_region(o, o.gradient(), 0.1, rtol=RTOL).step,
    "cubic_subproblem": lambda o: curvature.linalg.cubic_subproblem(o, o.gradient(), 1.0, rtol=RTOL).step,
    "lanczos": lambda o: curvature.linalg.lanczos(o, vector(o), num_steps=4),
    "lanczos_runs": lambda o: curvature.linalg.lanczos_runs(o, vectors(o), num_steps=4),
    "matrix_function": lambda o: curvature.linalg.matrix_function(damped(o), vectors(o), "sqrt", damping=0.1).value,
    "diagonal": lambda o: curvature.linalg.diagonal(o, num_matvecs=6, generator=G),
    "trace": lambda o: curvature.linalg.trace(o, num_matvecs=6, generator=G),
    "frobenius_norm": lambda o: curvature.linalg.frobenius_norm(o, num_matvecs=6, generator=G),
    "spectral_norm": lambda o: curvature.linalg.spectral_norm(o, generator=G),
    "spectral_density": lambda o: curvature.linalg.spectral_density(o, num_probes=2, num_steps=5, generator=G),
    "nystrom": lambda o: curvature.linalg.nystrom(damped(o), 5, generator=G).eigenvalues,
    "randomized_eigh": lambda o: curvature.linalg.randomized_eigh(o, 3, oversampling=4, generator=G).eigenvalues,
    "as_matrix": lambda o: curvature.linalg.as_matrix(o) @ vector(o),
    # single examples, layer by layer
    "gradient_norms": lambda o: curvature.per_example.gradient_norms(o).layer_traces,
    "gradient_moments": lambda o: curvature.per_example.gradient_moments(o).variance,
    "gradient_dots": lambda o: curvature.per_example.gradient_dots(o).dots,
    "per_example_gradients": lambda o: sum(len(i) for i, _ in curvature.per_example.per_example_gradients(o)),
    "exact_diagonal": lambda o: curvature.layerwise.exact_diagonal(o).value,
    "kronecker_factors": lambda o: curvature.layerwise.kronecker_factors(o).matvec(plain(o)),
    "num_columns": lambda o: curvature.layerwise.num_columns(o),
    # analyses, by function
    "adam_correction": lambda o: analysis.adam_correction(o, lr=0.1),
    "backward_error": lambda o: analysis.backward_error(o, lrs=[0.1]),
    "bend_towards": lambda o: analysis.bend_towards(o, *places(o), num_gradients=2, generator=G),
    "class_structure": analysis.class_structure,
    "critical_sharpness": lambda o: analysis.critical_sharpness(o, -o.gradient(), lr=0.1),
    "custom_direction": lambda o: analysis.custom_direction(o, vector(o), name="mine"),
    "direction_to": lambda o: analysis.direction_to(o, o.space.current() + vector(o)),
    "eigenvector_directions": lambda o: [
        d.vector.square() for d in analysis.eigenvector_directions(o, 1, rtol=1e-9, generator=G)[0]
    ],
    "gradient_alignment": lambda o: analysis.gradient_alignment(o, 2, generator=G),
    "gradient_direction": analysis.gradient_direction,
    "gradient_noise": analysis.gradient_noise,
    "curvature_noise": lambda o: analysis.curvature_noise(o, num_probes=4, damping=0.1, rtol=1e-9, generator=G),
    "gradient_smoothness": lambda o: analysis.gradient_smoothness(o, lr=0.1),
    "layer_coupling": lambda o: analysis.layer_coupling(o, num_probes=2, generator=G),
    "layer_diagonals": lambda o: analysis.layer_diagonals(o, num_matvecs=4, generator=G),
    "layer_jacobians": lambda o: analysis.layer_jacobians(o, num_probes=500, generator=G),
    "look_around": lambda o: analysis.look_around(o, points=5, generator=G),
    "loss_along": lambda o: analysis.loss_along(o, direction(o), torch.tensor([-0.1, 0.0, 0.1])),
    "loss_along_path": along_path,
    "loss_changes": lambda o: analysis.loss_changes(o, 0.1 * plain(o)[:, None]),
    "loss_on_plane": on_plane,
    "penalty_gradients": analysis.penalty_gradients,
    "present_place": analysis.present_place,
    "read_place": read,
    "pruning_scores": lambda o: analysis.pruning_scores(o, generator=G),
    "random_direction": lambda o: analysis.random_direction(o, generator=G),
    "rescaling_symmetries": analysis.rescaling_symmetries,
    "trajectory_directions": lambda o: analysis.trajectory_directions(o, [plain(o) * k for k in (1, 2, 4)])[1],
    "lottery_tickets": lambda o: analysis.lottery_tickets(
        o, o.settings["data"][:1], num_seeds=1, steps=2, batch_size=None, generator=G
    ),
    "CurvatureTracker": lambda o: analysis.CurvatureTracker(o, generator=G),
    "dense_model": lambda o: analysis.dense_model(o.model),
    "sparse_model": lambda o: analysis.sparse_model(o.model, {"0.weight": torch.ones(3, 3, dtype=torch.bool).triu()}),
    "masks_of": lambda o: analysis.masks_of(o.model),
    # optimizers
    "minimize": lambda o: optimizers.minimize(o, method="trust-region").x,
    "AdaHessian": step_of("AdaHessian", lr=0.05),
    "ESGD": step_of("ESGD", lr=0.05),
    "Sophia": step_of("Sophia", lr=0.05, curvature="hessian-diagonal"),
    "SASSHA": step_of("SASSHA", lr=0.05, update_every=1),
    "NewtonCG": step_of("NewtonCG", rtol=1e-12, stop=None, keep=None),
    "TrustRegionNewton": step_of("TrustRegionNewton", rtol=1e-12),
    "CubicNewton": step_of("CubicNewton", rtol=1e-12),
    "SaddleFreeNewton": step_of("SaddleFreeNewton"),
    "SketchyNewton": step_of("SketchyNewton"),
    "LevenbergMarquardt": step_of("LevenbergMarquardt"),
    "NaturalGradient": step_of("NaturalGradient", rtol=1e-12, loss=nn.functional.cross_entropy),
    "GaussNewton": step_of("GaussNewton", loss=nn.functional.cross_entropy),
    "KFAC": step_of("KFAC", loss=nn.functional.cross_entropy, fisher="type-2"),
    "EKFAC": step_of("EKFAC", loss=nn.functional.cross_entropy, fisher="type-2"),
    "SSBroyden": step_of("SSBroyden"),
    "Lion": step_of("Lion"),
    "Yogi": step_of("Yogi"),
    "COCOB": step_of("COCOB"),
    "SLS": step_of("SLS"),
    **{f"measure {kind}": lambda o, kind=kind: measured(kind, o) for kind in STUDIES},
}


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Return what a result holds, by its path: tensors and numbers."""
    if isinstance(value, Tensor):
        return {path: whole(value).detach().double().cpu()}
    if isinstance(value, (bool, str, type(None))):
        return {path: value} if not isinstance(value, str) or len(value) < 30 else {}
    if isinstance(value, (int, float)):
        return {path: torch.tensor(float(value), dtype=torch.float64)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {}
    found: dict[str, Any] = {}
    for name, item in items:
        if name not in ("seconds", "peak_bytes", "cost", "notes"):
            found |= numbers(item, f"{path}.{name}")
    return found


def outcome(call: Callable[[Objective], Any], o: Objective) -> Any:
    try:
        return numbers(call(o))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# -- what comes out ---------------------------------------------------------------------------------------------------

ONE_PROCESS = "this trains in one process"
WHOLE_ONLY = "needs whole parameters"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("JacobianOperator", "NTKOperator"), "the ranks of a process_group hold different ones"),
    "gradient_dots": "inner products of examples on different ranks are not computed",
    "kronecker_factors": "lies in parts on several ranks",
    **dict.fromkeys(("backward_error", "penalty_gradients", "measure implicit"), "must lie on one rank"),
    "loss_changes": "measured in one process",
    "pruning_scores": "pruning works in one process",
    **dict.fromkeys(("lottery_tickets", "dense_model"), "lies in parts on several ranks"),
    "sparse_model": "prune before sharding",
    "CurvatureTracker": "does not follow models whose parameters lie in parts",
    "minimize": "optimizers.Sharded",
    "LevenbergMarquardt": "residuals are solved for on one rank",
    "measure track": ONE_PROCESS,
    "measure prune": "give held_out=0",
    "measure race": "trains in processes of its own",
    **{f"measure {kind}": ONE_PROCESS for kind in ("lr", "descent", "complexity", "labels", "regularize", "bias")},
}
"""What is refused on either route, and by which words."""

BY_MODULE = {
    *[
        "EmpiricalFisherOperator",
        "GradientCovarianceOperator",
        "plan",
        "gradient_norms",
        "gradient_moments",
        "per_example_gradients",
        "exact_diagonal",
        "num_columns",
        "adam_correction",
        "bend_towards",
        "class_structure",
        "critical_sharpness",
        "custom_direction",
        "direction_to",
        "eigenvector_directions",
        "gradient_alignment",
        "gradient_direction",
        "gradient_noise",
        "curvature_noise",
        "gradient_smoothness",
        "layer_jacobians",
        "look_around",
        "loss_along",
        "loss_along_path",
        "loss_on_plane",
        "present_place",
        "read_place",
        "random_direction",
        "rescaling_symmetries",
        "trajectory_directions",
    ],
    "measure landscape",
    "measure sharpness",
    "measure critical",
    "measure noise",
}
"""What is refused module by module only, as it needs whole parameters."""

APART = {"per_example_gradients": "each rank has its own examples", "MCFisherOperator": "ranks draw for themselves"}
"""What is not one number over all data, by design; tests of their own hold what it is."""
ERRORS_OVER_DATA = r"data_(stderr|dof)|data_errors|groups|(^|low_rank)\.data\."  # need batches that one process sees
OTHERWISE: dict[str, str] = {
    "layer_spectra": "eigenvectors",  # of eigenvalues that are zero
    "class_structure": "num_pullbacks",  # of this rank
    **dict.fromkeys(("look_around", "measure landscape"), "num_batches"),
    "measure inspect": ERRORS_OVER_DATA,
    "measure dimension": ERRORS_OVER_DATA + r"|matrices\.2",  # the kernel pairs examples of all ranks
    "measure critical": "p_value|noise_dimension",  # a bound, without inner products of all examples
}
"""What of a result is another, as documented."""
ALONE: dict[tuple[str, str], Callable[[Objective], Any]] = {
    ("layer_diagonals", "module by module"): lambda o: {"exact": False, "rows": estimated_diagonals(o)},
}
"""What one process computes otherwise, so that it is told what to do: the exact diagonal needs whole parameters."""
LOOSE = {"layer_jacobians": 0.1, "GaussNewton": 1e-3}  # 500 random vectors each; conjugate gradients to a tolerance


def differences(name: str, mine: dict[str, Any], alone: dict[str, Any]) -> list[str]:
    """Return the paths at which a rank has something else than one process."""
    left_out = re.compile(OTHERWISE[name]) if name in OTHERWISE else None
    found = []
    for path, there in alone.items():
        here = mine.get(path)
        if left_out is not None and left_out.search(path):
            continue
        if isinstance(there, Tensor) and isinstance(here, Tensor) and here.shape == there.shape:
            if path.endswith("eigenvectors"):
                here = here * (here * there).sum(dim=0).sign()  # theirs is arbitrary
            scale = float(there.nan_to_num().abs().max()) if there.numel() else 0.0
            gap = (here - there).nan_to_num(0.0, 0.0, 0.0).abs()
            same = bool((gap <= LOOSE.get(name, TOLERANCE) * max(scale, FLOOR)).all())
            if same and torch.equal(here.isfinite(), there.isfinite()):
                continue
        elif not isinstance(there, Tensor) and here == there:
            continue
        found.append(f"{path}: {here!s:.80} for {there!s:.80}")
    return found


def work(rank: int, folder: str) -> None:

    with process_group(rank, folder):
        found = {
            route: {name: outcome(call, objective(rank, budget)) for name, call in CALLS.items()}
            for route, budget in ROUTES.items()
        }
        torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parts")
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CALLS)
def test_it_is_what_one_process_gives_or_refused_in_one_sentence(
    ranks: list[dict[str, Any]], name: str, route: str
) -> None:
    by_module = ROUTES[route] == 0
    refusal = REFUSED.get(name, WHOLE_ONLY if by_module and name in BY_MODULE else None)
    if refusal is not None and by_module:
        refusal += f"|{WHOLE_ONLY}"
    for rank in ranks:
        mine = rank[route][name]
        if refusal is not None:
            assert isinstance(mine, str), "an answer"
            assert re.match("InputError: ", mine), mine
            assert re.search(refusal, mine), mine
            continue
        assert not isinstance(mine, str), mine
        if name not in APART:
            alone = outcome(ALONE.get((name, route), CALLS[name]), objective(None))
            assert not isinstance(alone, str), alone
            assert not (found := differences(name, mine, alone)), found


def test_all_that_takes_an_objective_or_a_matrix_is_in_the_table() -> None:
    public: list[tuple[ModuleType, tuple[str, ...]]] = [
        (analysis, ("objective", "model")),
        (curvature, ("objective", "A", "optimizer")),
        (curvature.linalg, ("A",)),
        (curvature.per_example, ("objective",)),
        (curvature.layerwise, ("objective",)),
        (optimizers, ("objective",)),
    ]
    missing = []
    for module, firsts in public:
        for name in module.__all__:
            made = getattr(module, name)
            if not callable(made) or (isinstance(made, type) and issubclass(made, BaseException)):
                continue
            with contextlib.suppress(ValueError):
                parameters = list(inspect.signature(made).parameters)
                if parameters and parameters[0] in firsts and name not in CALLS and name not in ELSEWHERE:
                    missing.append(name)
    assert not missing


ELSEWHERE = {
    **dict.fromkeys(("inspect", "inspect_model", "measure_noise", "measure_conditioning"), "measure"),
    **dict.fromkeys(("measure_pruning", "measure_sharpness", "critical_points", "implicit_bias"), "measure"),
    **dict.fromkeys(("implicit_regularization", "critical_learning_rate", "track_training"), "measure"),
    **dict.fromkeys(("double_descent", "race_optimizers", "random_labels"), "measure"),
    **dict.fromkeys(("effective_dimension", "effective_model_complexity"), "measure"),
    "regularization_by_curvature": "measure",
    **dict.fromkeys(("lightning_callback", "hugging_face_callback"), "CurvatureTracker"),
    "stability_limit": "is no function of the model",
}
"""What another call of the table covers."""
