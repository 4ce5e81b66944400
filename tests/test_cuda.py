"""What only a GPU can show: the numbers are those of the CPU, nothing is left behind, memory stays in its bounds."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    JacobianOperator,
    MCFisherOperator,
    NTKOperator,
    Objective,
    layer_spectra,
    plan,
    solve,
    spectrum,
)
from curvature.engine import replays
from curvature.environment.device import CapturedCall, gpu_memory
from curvature.errors import CurvatureError
from curvature.layerwise import exact_diagonal, kronecker_factors
from curvature.linalg import (
    cg,
    cubic_subproblem,
    diagonal,
    eigsh,
    frobenius_norm,
    gltr,
    lobpcg,
    lsmr,
    matrix_function,
    minres,
    nystrom,
    randomized_eigh,
    spectral_density,
    spectral_norm,
    trace,
    trust_region,
)
from curvature.linop import SymmetricOperator
from curvature.objective.third_order import curvature_gradient
from curvature.per_example import gradient_moments, per_example_gradients
from tests.cases import BY_NAME, CASES, Case
from tests.checks import assert_close
from tests.matrices import spectra, with_spectrum

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's, at the first product of a thread
]

REPEATABLE = [case for case in CASES if "dropout" not in case.name]  # other devices draw other masks
SAME_SUM = 1e-9  # float64, other kernels


def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def there(case: Case, **settings: Any) -> Objective:
    """Return the objective with its model on the GPU and its batches on the CPU, as loaders have them."""
    return Objective(case.model().cuda(), case.loss.cuda(), case.ragged(), **settings)


def here(case: Case, **settings: Any) -> Objective:
    return Objective(case.model(), copy.deepcopy(case.loss).cpu(), case.ragged(), **settings)


def outcome(f: Callable[[Objective], Tensor], objective: Objective) -> Tensor | CurvatureError:
    """Return the value, or the refusal."""
    try:
        return f(objective)
    except CurvatureError as error:
        return error


def assert_same_outcome(case: Case, f: Callable[[Objective], Tensor], rtol: float = SAME_SUM) -> None:
    """Compare values, or the kinds of refusals, of the objective on the GPU and on the CPU."""
    on_gpu, on_cpu = there(case), here(case)
    with nothing_changes():
        actual = outcome(f, on_gpu)
    expected = outcome(f, on_cpu)
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        assert actual.is_cuda
        assert_close(actual.cpu(), expected, rtol)
    else:
        assert type(actual) is type(expected), f"{actual} there, {expected} here"


@contextlib.contextmanager
def nothing_changes() -> Iterator[None]:
    """Check that the GPU's random state and torch's settings for it are as before."""

    def state() -> tuple[Any, ...]:
        cuda = torch.backends.cuda
        flags = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
        numbers = (cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.enabled)
        return (torch.cuda.get_rng_state().tolist(), flags, numbers, torch.cuda.current_device())

    before = state()
    yield
    assert state() == before


# -- matrices of a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("case", REPEATABLE, ids=str)
def test_products_are_those_of_the_cpu(case: Case, operator: type[HessianOperator]) -> None:
    n = sum(p.numel() for p in case.model().parameters() if p.requires_grad)
    X = torch.randn(n, 3, dtype=torch.float64)
    for V in (X, X[:, 0]):
        assert_same_outcome(case, lambda o, V=V: operator(o) @ V.to(o.device))


@pytest.mark.parametrize("operator", [FisherOperator, GradientCovarianceOperator, JacobianOperator, NTKOperator])
@pytest.mark.parametrize("name", ["MLP ReLU", "MLP sigmoid, binary", "attention by hand", "BatchNorm eval"])
def test_further_matrices_are_those_of_the_cpu(name: str, operator: type[HessianOperator]) -> None:
    assert_same_outcome(BY_NAME[name], lambda o: operator(o).to_dense())


def test_a_sampled_fisher_has_the_fisher_as_its_mean() -> None:
    case = BY_NAME["MLP ReLU"]
    fisher = FisherOperator(here(case)).to_dense()
    sampled = MCFisherOperator(there(case), num_samples=4000, generator=generator()).to_dense().cpu()
    assert_close(sampled, fisher, rtol=0.1)


@pytest.mark.parametrize("name", ["MLP tanh", "BatchNorm train", "LSTM", "attention fused"])
def test_a_product_equals_the_derivative_of_the_gradient(name: str) -> None:
    there(BY_NAME[name]).check()


@pytest.mark.parametrize("case", REPEATABLE, ids=str)
def test_single_gradients_are_those_of_the_cpu(case: Case) -> None:
    def second_moment(objective: Objective) -> Tensor:
        return gradient_moments(objective).second_moment

    def rows(objective: Objective) -> Tensor:
        return torch.cat([rows for _, rows in per_example_gradients(objective)])

    assert_same_outcome(case, second_moment)
    assert_same_outcome(case, rows)


@pytest.mark.parametrize("name", ["MLP tanh", "LayerNorm", "BatchNorm train", "attention fused"])
def test_the_gradient_of_curvature_is_that_of_the_cpu(name: str) -> None:
    case = BY_NAME[name]
    v = torch.randn(sum(p.numel() for p in case.model().parameters()), dtype=torch.float64)
    assert_same_outcome(case, lambda o: curvature_gradient(o, v.to(o.device)), rtol=1e-8)


@pytest.mark.parametrize("route", ["auto", "vmap"])
@pytest.mark.parametrize("name", ["MLP sigmoid, binary", "MLP ReLU", "GroupNorm"])
def test_diagonals_and_kronecker_factors_are_those_of_the_cpu(name: str, route: Any) -> None:
    case = BY_NAME[name]
    for kind in ("ggn", "hessian"):
        way = route if kind == "ggn" else "auto"
        assert_same_outcome(case, lambda o, kind=kind, way=way: exact_diagonal(o, kind, route=way).value)

    def factors(objective: Objective) -> Tensor:
        found = kronecker_factors(objective)
        return torch.cat([f.flatten() for layer in found.layers.values() for f in (layer.A, layer.B)])

    assert_same_outcome(case, factors)


# -- what is kept follows the model -----------------------------------------------------------------------------------


def _fused_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.zero_grad()


def _through_data(model: nn.Module, x: Tensor, y: Tensor) -> None:
    del x, y
    for p in model.parameters():
        p.data.mul_(1.5)


def _signs(model: nn.Module, x: Tensor, y: Tensor) -> None:
    del x, y
    weight = next(model.parameters()).data
    weight[0, :2] = -weight[0, :2]


def _permutation(model: nn.Module, x: Tensor, y: Tensor) -> None:
    del x, y
    weight = next(model.parameters()).data
    weight.copy_(weight.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", [_fused_step, _through_data, _signs, _permutation])
def test_changed_weights_are_seen(change: Callable[[nn.Module, Tensor, Tensor], None], dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to("cuda", dtype)
    x, y = torch.randn(20, 6, device="cuda", dtype=dtype), torch.randint(3, (20,), device="cuda")
    H = HessianOperator(Objective(model, nn.CrossEntropyLoss(), (x, y)))
    v = torch.randn(H.shape[0], device="cuda", dtype=H.dtype)
    stale = H @ v
    change(model, x, y)
    fresh = HessianOperator(Objective(model, nn.CrossEntropyLoss(), (x, y))) @ v
    assert not torch.equal(fresh, stale)
    assert torch.equal(H @ v, fresh)


def test_dropout_masks_are_those_of_the_gpu_and_the_same_each_time() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double().cuda().train()
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(9, 6).double(), torch.randint(3, (9,))), seed=3)
    with nothing_changes():
        first = HessianOperator(objective).to_dense()
    torch.cuda.manual_seed(78)
    assert_close(HessianOperator(objective).to_dense(), first, 1e-12)
    assert_close(first, first.T, 1e-12)


def test_products_have_the_accuracy_of_float32() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
    batch = (torch.randn(512, 256).cuda(), torch.randint(10, (512,)).cuda())
    v = torch.randn(sum(p.numel() for p in model.parameters())).cuda()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        product = HessianOperator(Objective(model, nn.CrossEntropyLoss(), batch)) @ v
        rough = HessianOperator(Objective(model, nn.CrossEntropyLoss(), batch, allow_tf32=True)) @ v
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    model, batch = model.double(), (batch[0].double(), batch[1])
    exact = HessianOperator(Objective(model, nn.CrossEntropyLoss(), batch)) @ v.double()
    assert (product - exact).norm() <= 1e-5 * exact.norm()
    assert (product - exact).norm() < 0.1 * (rough - exact).norm()


# -- memory -----------------------------------------------------------------------------------------------------------


def _wide(rows: int = 4096) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 10))
    x, y = torch.randn(4 * rows, 64), torch.randint(10, (4 * rows,))
    return model.cuda(), list(zip(x.cuda().split(rows), y.cuda().split(rows), strict=True))


def _peak(f: Callable[[], Any]) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    return torch.cuda.max_memory_allocated() - start


def test_kept_graphs_stay_within_the_budget_and_are_given_back() -> None:
    model, batches = _wide()
    n = sum(p.numel() for p in model.parameters())
    v = torch.randn(n, device="cuda")

    def products(budget: int) -> Callable[[], None]:
        def run() -> None:
            H = HessianOperator(Objective(model, nn.CrossEntropyLoss(), batches, memory_budget=budget))
            for _ in range(4):
                H @ v

        return run

    products(1)()  # libraries make their workspaces
    before = torch.cuda.memory_allocated()
    one = _peak(products(1))
    for budget in (100 << 20, 300 << 20):
        assert _peak(products(budget)) <= budget + one
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_the_plan_is_near_the_measured_peak() -> None:
    model, batches = _wide(1024)
    objective = Objective(model, nn.CrossEntropyLoss(), batches)
    planned = plan(objective, ["top", "trace"], k=3)
    peak = _peak(lambda: spectrum(HessianOperator(objective), planned.plan, generator=generator()))
    weights = sum(4 * p.numel() for p in model.parameters())
    assert planned.peak_bytes is not None
    assert 0.5 * peak <= planned.peak_bytes <= 2 * peak + 2 * weights


# -- numerics on plain matrices ---------------------------------------------------------------------------------------

N = 60


def _matrix() -> tuple[Tensor, Tensor]:
    """Return a symmetric matrix on the GPU with known eigenvalues, ascending."""
    Q = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
    values = torch.cat([-torch.logspace(-3, -1, 10), torch.logspace(-4, 1, N - 10)]).double().sort().values
    return (Q @ values.diag() @ Q.T).cuda(), values.cuda()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("solver", [partial(eigsh, method="lanczos"), lobpcg])
def test_eigenpairs(solver: Callable[..., Any], k: int) -> None:
    A, values = _matrix()
    found = solver(A, k, rtol=1e-6, generator=generator())
    assert_close(found.eigenvalues, values.flip(0)[:k], 1e-5)
    assert found.eigenvectors.is_cuda


@pytest.mark.parametrize("basis_device", [None, "cpu"])
def test_repeated_eigenvalues_by_blocks(basis_device: str | None) -> None:
    A = with_spectrum(spectra(N)["repeated"]).cuda()
    settings: dict[str, Any] = {"rtol": 1e-6, "basis_device": basis_device, "block_size": 2}
    found = eigsh(A, 6, method="lanczos", generator=generator(), **settings)
    assert_close(found.eigenvalues, torch.linalg.eigvalsh(A).flip(0)[:6], 1e-6)
    assert found.eigenvectors.is_cuda


@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16])
def test_eigenpairs_with_the_basis_on_the_cpu(basis_dtype: torch.dtype) -> None:
    A, values = _matrix()
    settings: dict[str, Any] = {"basis_device": "cpu", "basis_dtype": basis_dtype, "num_basis": 30}
    found = eigsh(A, 4, method="lanczos", generator=generator(), **settings)
    assert_close(found.eigenvalues, values.flip(0)[:4], 1e-3)
    assert found.eigenvectors.is_cuda


@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++", "xtrace"])
def test_traces(method: str) -> None:
    A, values = _matrix()
    found = trace(A, method=method, num_matvecs=40, generator=generator())
    assert abs(float(found.value - values.sum())) <= 5 * float(found.stderr) + 1e-9


def test_estimates() -> None:
    A, values = _matrix()
    found = diagonal(A, num_matvecs=200, generator=generator())
    assert float(((found.value - A.diagonal()) / found.stderr.clamp_min(1e-12)).abs().mean()) < 2
    density = spectral_density(A, num_probes=8, num_steps=N, generator=generator())
    mean, stderr = density.expectation(lambda x: x)
    assert abs(float(mean - values.mean())) <= 5 * float(stderr)
    norm = frobenius_norm(A, num_matvecs=40, generator=generator())
    assert abs(float(norm.value - A.norm())) <= 5 * float(norm.stderr) + 1e-6
    bounds = spectral_norm(A, generator=generator())
    assert float(bounds.lower) <= float(values.abs().max()) * (1 + 1e-9)
    B = A @ A
    for low_rank in (nystrom(B, 20, generator=generator()), randomized_eigh(B, 20, generator=generator())):
        assert_close(low_rank.eigenvalues[:3], (values**2).sort(descending=True).values[:3], 1e-3)


def test_linear_systems_and_functions() -> None:
    A, _ = _matrix()
    B, b = A @ A + torch.eye(N, device="cuda", dtype=torch.float64), torch.randn(N, 2, device="cuda").double()
    x = torch.linalg.solve(B, b)
    for solver in (cg, minres, lsmr):
        assert_close(solver(B, b, rtol=1e-10).x, x, 1e-6)
    w, Q = torch.linalg.eigh(B)
    assert_close(matrix_function(B, b, torch.sqrt, rtol=1e-9).value, (Q * w.sqrt()) @ Q.T @ b, 1e-7)


def test_subproblems_are_those_of_the_cpu() -> None:
    A, _ = _matrix()
    g = torch.randn(N, dtype=torch.float64)
    for solver, setting in ((gltr, 0.5), (trust_region, 0.5), (cubic_subproblem, 2.0)):
        on_gpu, on_cpu = solver(A, g.cuda(), setting, rtol=1e-9), solver(A.cpu(), g, setting, rtol=1e-9)
        assert_close(on_gpu.step.cpu(), on_cpu.step, 1e-6)


# -- answers about a model --------------------------------------------------------------------------------------------


def test_spectra_of_a_model() -> None:
    case = BY_NAME["MLP GELU"]
    objective = there(case)
    H = HessianOperator(objective)
    w = torch.linalg.eigvalsh(HessianOperator(here(case)).to_dense())
    top = eigsh(objective, 3, rtol=1e-6, generator=generator())
    assert_close(top.eigenvalues.cpu(), w.flip(0)[:3], 1e-5)
    planned = plan(objective, ["top", "bottom", "trace", "density"], k=3)
    found = spectrum(H, planned.plan, generator=generator())
    assert abs(float(found.trace().value) - float(w.sum())) <= 5 * float(found.trace().stderr) + 1e-8
    for name, layer in layer_spectra(GGNOperator(objective), generator=generator()).items():
        block = torch.linalg.eigvalsh(GGNOperator(here(case)).restrict(f"{name}.*").to_dense())
        assert abs(float(layer.top.eigenvalues[0]) - float(block[-1])) <= 1e-2 * float(block[-1])


def test_solving_with_a_model() -> None:
    case = BY_NAME["MLP GELU"]
    G = GGNOperator(here(case)).to_dense()
    b = torch.randn(len(G), dtype=torch.float64)
    found = solve(there(case), b.cuda(), matrix="ggn", damping=0.1, rtol=1e-10)
    assert_close(found.x.cpu(), torch.linalg.solve(G + 0.1 * torch.eye(len(G), dtype=torch.float64), b), 1e-7)


def test_half_precision_and_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10)).cuda()
    batch = (torch.randn(128, 32, device="cuda"), torch.randint(10, (128,), device="cuda"))
    v = torch.randn(sum(p.numel() for p in model.parameters()), device="cuda")
    exact = HessianOperator(Objective(model, nn.CrossEntropyLoss(), batch)) @ v

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return model(batch[0]).float(), batch[1]

    mixed = HessianOperator(Objective(model, nn.CrossEntropyLoss(), batch, forward=forward)) @ v
    assert (mixed - exact).norm() <= 0.05 * exact.norm()
    half = HessianOperator(Objective(model.bfloat16(), nn.CrossEntropyLoss(), (batch[0].bfloat16(), batch[1])))
    assert ((half @ v) - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_of_the_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(64, 192), nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (z.unflatten(-1, (2, 32)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
            return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).mean(1))

    model = Attention().cuda()
    x, y = torch.randn(8, 16, 64, device="cuda"), torch.randint(5, (8,), device="cuda")
    v = torch.randn(sum(p.numel() for p in model.parameters()), device="cuda")
    exact = HessianOperator(Objective(copy.deepcopy(model).double(), nn.CrossEntropyLoss(), (x.double(), y)))
    expected = (exact @ v.double()).float()
    with nothing_changes():
        H = HessianOperator(Objective(model.to(dtype), nn.CrossEntropyLoss(), (x.to(dtype), y)))
        found = H @ v
    assert (found - expected).norm() <= (1e-4 if dtype == torch.float32 else 0.1) * expected.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_are_compiled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10)).cuda()
    batch = (torch.randn(128, 32, device="cuda"), torch.randint(10, (128,), device="cuda"))
    v = torch.randn(sum(p.numel() for p in model.parameters()), device="cuda")
    expected = HessianOperator(Objective(model, nn.CrossEntropyLoss(), batch)) @ v
    found = HessianOperator(Objective(torch.compile(model), nn.CrossEntropyLoss(), batch)) @ v
    assert_close(found, expected, 1e-4)


# -- replayed products ------------------------------------------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[CapturedCall | None]:
    """Have every product replayed that can be, from the second on; what came of each attempt."""
    found: list[CapturedCall | None] = []
    plain = CapturedCall.attempt

    def attempt(function: Callable[[Tensor], Tensor], x: Tensor) -> CapturedCall | None:
        found.append(plain(function, x))
        return found[-1]

    monkeypatch.setattr(replays, "_FIRST", 0)
    monkeypatch.setattr(replays, "_HOST_SHARE", 0.0)
    monkeypatch.setattr(CapturedCall, "attempt", attempt)
    return found


def _three_products(operator: Callable[..., SymmetricOperator], objective: Objective) -> Tensor:
    A = operator(objective, generator=0) if operator is MCFisherOperator else operator(objective)
    V = torch.randn(A.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.stack([A @ v for v in V.to(A.device, A.dtype).unbind(1)])


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, MCFisherOperator])
@pytest.mark.parametrize("case", REPEATABLE, ids=lambda case: case.name)
def test_replayed_products_are_those_of_the_cpu(
    case: Case, operator: type[HessianOperator], captured: list[CapturedCall | None]
) -> None:
    if operator is not MCFisherOperator:
        assert_same_outcome(case, partial(_three_products, operator))
        return
    objective = there(case)
    replayed = outcome(partial(_three_products, operator), objective)
    captured.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replays, "_FIRST", 1000)
        plain = outcome(partial(_three_products, operator), there(case))
    assert not captured
    assert isinstance(replayed, Tensor) == isinstance(plain, Tensor)
    if isinstance(plain, Tensor) and isinstance(replayed, Tensor):
        assert_close(replayed, plain, SAME_SUM)


def test_most_products_can_be_replayed(captured: list[CapturedCall | None]) -> None:
    for case in REPEATABLE:
        outcome(partial(_three_products, HessianOperator), there(case, keep_graphs=True))
    failed = sum(call is None for call in captured)
    assert len(captured) > len(REPEATABLE)
    assert failed <= 0.1 * len(captured)


def test_replayed_products_see_changed_weights_and_blocks(captured: list[CapturedCall | None]) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    twin = copy.deepcopy(model).cuda()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    A, B = (HessianOperator(Objective(m, nn.CrossEntropyLoss(), [(x, y)])) for m in (model, twin))
    for _ in range(2):
        for part in (lambda H: H, lambda H: H.restrict("0.*"), lambda H: H.restrict("2.weight")):
            for _ in range(3):
                v = torch.randn(part(A).shape[0], dtype=torch.float64)
                assert_close((part(B) @ v.cuda()).cpu(), part(A) @ v, SAME_SUM)
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.copy_(p.mul_(1.5))
    assert len(captured) == 6
    assert None not in captured


class _Looks(torch.autograd.Function):
    """A square whose backward pass reads a value of the GPU, which no CUDA graph can hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]  # torch leaves the arguments open
        (x,) = ctx.saved_tensors
        return 2 * x * g if float(g.detach().abs().sum()) >= 0 else g


class _Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        squares: Tensor = _Looks.apply(x)
        return squares


def test_what_cannot_be_captured_goes_on_without_and_leaves_the_gpu_in_order(
    captured: list[CapturedCall | None],
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), _Squared(), nn.Linear(6, 2)).double()
    twin = copy.deepcopy(model).cuda()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    A, B = (HessianOperator(Objective(m, nn.MSELoss(), [(x, y)])) for m in (model, twin))
    with nothing_changes():
        for _ in range(4):
            v = torch.randn(A.shape[0], dtype=torch.float64)
            assert_close((B @ v.cuda()).cpu(), A @ v, SAME_SUM)
    assert captured == [None]
    assert torch.isfinite(torch.randn(1000, device="cuda")).all()  # the generator draws
    torch.cuda.synchronize()


def test_memory_of_replayed_products_counts(captured: list[CapturedCall | None]) -> None:
    model, data = _wide()
    objective = Objective(model.cuda(), nn.CrossEntropyLoss(), data)
    H = HessianOperator(objective)
    v = torch.randn(H.shape[0], device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    H @ v
    held = [objective.kept.held_bytes for _ in range(3) if (H @ v) is not None]
    assert captured
    assert captured[0] is not None
    assert held[-1] >= captured[0].num_bytes > 0
    device, free = objective.device, gpu_memory(objective.device).free
    captured.clear()
    del H, objective
    gc.collect()
    torch.cuda.empty_cache()
    assert gpu_memory(device).free > free
