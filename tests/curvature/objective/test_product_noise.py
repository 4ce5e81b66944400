"""Rounding of products: what they are said to err by and what is claimed on them, beside float64 of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import GGNOperator, HessianOperator, MCFisherOperator, NTKOperator, Objective, linalg, spectrum
from curvature.layerwise import exact_diagonal
from curvature.objective import product_noise
from curvature.results.estimates import Status

KINDS = ("bfloat16", "float16", "autocast", "autocast inside")


class Autocasting(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


def setup(kind: str) -> tuple[Objective, Tensor, Tensor, Callable[[], AbstractContextManager[Any]]]:
    """Return an objective, its Hessian and Gauss-Newton matrix in float64, and what to compute in."""
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    if kind in ("bfloat16", "float16"):
        dtype = getattr(torch, kind)
        net, x = net.to(dtype), x.to(dtype)
    exact = Objective(copy.deepcopy(net).double(), nn.CrossEntropyLoss(), (x.double(), y))
    model = Autocasting(net) if kind == "autocast inside" else net
    H, G = HessianOperator(exact).to_dense(), GGNOperator(exact).to_dense()

    def around() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast")

    return Objective(model, nn.CrossEntropyLoss(), (x, y)), H, G, around


@pytest.mark.parametrize("kind", KINDS)
def test_stated_noise_and_claims(kind: str) -> None:
    objective, H, G, around = setup(kind)
    name = "float16" if kind == "float16" else "bfloat16"
    for exact, operator in ((H, HessianOperator), (G, GGNOperator)):
        norm = float(torch.linalg.matrix_norm(exact, 2))
        with around():
            A = operator(objective)
            error = A.to_dense().double() - exact
            noise = A.product_noise
            true = float(error.norm() / exact.norm())
            assert true / 3 < noise < 3 * true
            assert (2 * A).product_noise == noise
            assert any(name in note and f"{noise:.1e}" in note for note in objective.notes)
            settings = [("lanczos", 0.3), ("lanczos", 10), ("lobpcg", 10), ("dense", 0.3), ("dense", 10)]
            for method, ratio in settings:
                rtol = ratio * noise
                pairs = linalg.eigsh(A, 2, rtol=rtol, method=method, generator=0)
                U, values = pairs.eigenvectors.double(), pairs.eigenvalues.double()
                residuals = (exact @ U - U * values).norm(dim=0)
                assert bool((residuals <= pairs.residual_norms).all())
                assert pairs.product_noise == noise
                assert bool((residuals <= rtol * values.abs())[pairs.converged].all())
                assert pairs.status is (Status.CONVERGED if ratio > 2 else Status.WITHIN_NOISE)
            trace = linalg.trace(A, num_matvecs=20, generator=0)
            low, high = trace.interval(0.99)
            assert low <= exact.trace() <= high
            assert trace.product_noise == noise
            b = exact[:, 0].float()
            for damping, ratio in ((0.05, 1), (2, 5)):
                solved = linalg.minres(A, b, damping=damping * norm, rtol=ratio * noise)
                x = solved.x.double()
                residual = float((b.double() - exact @ x - damping * norm * x).norm())
                assert residual <= float(solved.residual_norms)
                assert solved.status is (Status.CONVERGED if ratio > 2 else Status.WITHIN_NOISE)
            bounds = linalg.spectral_norm(A, generator=0)
            assert bounds.lower <= norm <= bounds.upper


def test_spectra_hold_the_noise() -> None:
    objective, H, _, _ = setup("bfloat16")
    exact = torch.linalg.eigvalsh(H)
    found = spectrum(objective, generator=0)
    noise = found.top.product_noise
    assert noise is not None
    assert found.top.status is Status.WITHIN_NOISE
    assert not bool(found.top.converged.any())
    U, values = found.top.eigenvectors.double(), found.top.eigenvalues.double()
    assert bool(((H @ U - U * values).norm(dim=0) <= found.top.residual_norms).all())
    low, high = found.trace().interval(0.99)
    assert low <= exact.sum() <= high


def test_what_cannot_be_repeated_in_float32_is_said() -> None:
    """A frozen base in bfloat16 under adapters in float32 counts; a model that refuses another dtype is told."""

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4).bfloat16().requires_grad_(False)
            self.adapter = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.adapter(self.base(x.bfloat16()).float())

    objective = Objective(Stubborn(), nn.CrossEntropyLoss(), (torch.randn(8, 4), torch.randint(3, (8,))))
    pairs = linalg.eigsh(objective, 1, rtol=1e-2, method="lanczos", generator=0)
    assert pairs.product_noise == 10 * 2**-7
    assert pairs.status is Status.WITHIN_NOISE
    assert any("could not be repeated in float32 (RuntimeError" in note for note in objective.notes)


def single(scale: float) -> tuple[Objective, Objective]:
    """Return an objective in float32, its first weights times a number, and its twin in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    with torch.no_grad():
        for p in net.parameters():
            p *= scale
    x, y = torch.randn(200, 4), torch.randint(3, (200,))
    exact = Objective(copy.deepcopy(net).double(), nn.CrossEntropyLoss(), (x.double(), y))
    return Objective(net, nn.CrossEntropyLoss(), (x, y)), exact


@pytest.mark.parametrize("scale", [1, 6, 10])
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_float32_is_measured_against_float64(scale: float, operator: Any) -> None:
    objective, twin = single(scale)
    A, exact = operator(objective), operator(twin).to_dense()
    true = float((A.to_dense().double() - exact).norm() / exact.norm())
    assert true / 3 < A.product_noise < 3 * true
    for ratio in (0.01, 1e4):
        pairs = linalg.eigsh(A, 3, rtol=ratio * A.product_noise, method="lanczos", generator=0)
        U, values = pairs.eigenvectors.double(), pairs.eigenvalues.double()
        residuals = (exact @ U - U * values).norm(dim=0)
        assert bool((residuals <= pairs.residual_norms).all())
        assert pairs.product_noise == A.product_noise
        assert pairs.status is (Status.CONVERGED if ratio > 1 else Status.WITHIN_NOISE)
    assert any("against float64" in note for note in objective.notes)
    assert operator(twin).product_noise == 0
    assert linalg.eigsh(twin, 1, method="lanczos", generator=0).product_noise is None
    assert not any("float64" in note for note in twin.notes)


def test_masks_that_go_by_the_dtype_are_no_rounding() -> None:
    """A model in float64 draws other random numbers than in float32."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.last(nn.functional.dropout(h + torch.randn_like(h), 0.5, self.training))

    torch.manual_seed(0)
    objective = Objective(Noisy(), nn.CrossEntropyLoss(), (torch.randn(40, 4), torch.randint(3, (40,))))
    for operator in (HessianOperator, GGNOperator):
        assert 0 < operator(objective).product_noise < 1e-5
    with torch.random.fork_rng():
        drawn = MCFisherOperator(objective, num_samples=1, generator=0)
        assert 0 < drawn.product_noise < 1e-5


def test_a_batch_that_cannot_be_cut_is_taken_whole() -> None:
    class OfOneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) != 1000:
                raise ValueError("1000 examples are wanted")
            return self.linear(x).tanh()

    torch.manual_seed(0)
    objective = Objective(OfOneSize(), nn.CrossEntropyLoss(), (torch.randn(1000, 4), torch.randint(3, (1000,))))
    assert 0 < HessianOperator(objective).product_noise < 1e-6
    assert any("against float64" in note for note in objective.notes)


@pytest.mark.parametrize(("width", "examples"), [(100, 64), (2**15, 8), (2**20, 2)])
def test_few_large_examples_are_repeated(width: int, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of them, at least 64 or as many as hold 2^18 numbers: their graphs in float64 take memory."""
    seen: list[int] = []
    real = product_noise._error
    monkeypatch.setattr(product_noise, "_error", lambda o, b, *rest: seen.append(len(b[0])) or real(o, b, *rest))
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 3), nn.Tanh())
    x, y = torch.randn(16 if width > 100 else 200, width), torch.randint(3, (16 if width > 100 else 200,))
    assert HessianOperator(Objective(model, nn.CrossEntropyLoss(), (x, y))).product_noise < 1e-5
    assert seen == [examples]


def test_what_is_not_repeated_in_float64_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large a model, and one that goes back to float32 by itself."""
    unknown = 100 * 2**-23

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gelu(self.linear(x).float())

    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    for model, dtype in ((Casting(), torch.float32), (Casting().double(), torch.float64)):
        casting = Objective(model, nn.CrossEntropyLoss(), (x.to(dtype), y))
        assert HessianOperator(casting).product_noise == unknown
        assert any("(the model casts to it by itself)" in note for note in casting.notes)

    monkeypatch.setattr(product_noise, "_MOST", 1000)
    objective, _ = single(1)
    assert linalg.eigsh(objective, 1, rtol=1e-2, method="lanczos", generator=0).product_noise == unknown
    assert any("could not be repeated in float64 (copies take" in note for note in objective.notes)


def test_notes_name_the_largest_error_of_many_blocks() -> None:
    objective, _ = single(1)
    blocks = [HessianOperator(objective, block) for block in objective.space.blocks]
    largest = max(A.product_noise for A in blocks)
    assert HessianOperator(objective).product_noise > 0
    said, of_whole = (note for note in objective.notes if "err by" in note)
    assert "blocks" not in of_whole
    assert f"{largest:.1e}" in said
    assert f"of {len(blocks)} blocks" in said


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "inv": torch.reciprocal,
    "sqrt": torch.sqrt,
    "invsqrt": torch.rsqrt,
    "log": torch.log,
    "exp": torch.exp,
}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_diagonals_steps_and_kernels_hold_the_noise(kind: str) -> None:
    """Their errors, beside float64 of the weights, lie within what they state; less than that is never claimed."""
    objective, H, G, around = setup(kind)
    norm = float(torch.linalg.matrix_norm(G, 2))
    with around():
        A, B = GGNOperator(objective), HessianOperator(objective)
        noise = A.product_noise
        v, damping = torch.randn(len(G), generator=torch.Generator().manual_seed(1)), 0.1 * norm
        eigenvalues, U = torch.linalg.eigh(G)
        for name, f in FUNCTIONS.items():
            found = linalg.matrix_function(A, v, name, damping=damping, lower=damping)  # type: ignore[arg-type]
            exact = U @ (f(eigenvalues.clamp_min(0) + damping) * (U.T @ v.double()))
            assert float((found.value.double() - exact).norm()) <= float(found.errors) <= float(found.bounds)
            assert found.status is Status.WITHIN_NOISE
            assert found.product_noise == noise
        loose = linalg.matrix_function(A, v, "exp", rtol=0.5)
        assert loose.status is Status.CONVERGED
        assert linalg.matrix_function(A, v, "inv", damping=noise * norm, rtol=0.5).errors.isinf()

        for method, budget in (("hutchinson", 40), ("xdiag", 40), ("auto", len(G))):
            for keep in (False, True):
                settings: Any = {"method": method, "num_matvecs": budget, "keep_samples": keep}
                diagonal = linalg.diagonal(B, generator=0, **settings)
                off = (diagonal.value.double() - H.diagonal()).abs()
                assert bool((off <= 4 * diagonal.stderr).all())
                assert float(diagonal.stderr.norm()) > 0.2 * B.product_noise * float(H.diagonal().norm())
                assert diagonal.product_noise == B.product_noise
        assert linalg.diagonal(B, rtol=1e-6, max_matvecs=1000, generator=0).status is Status.WITHIN_NOISE

        if kind != "autocast":  # exact diagonals are computed in full precision
            for exact, of, which in ((H, B, "hessian"), (G, A, "ggn")):
                found = exact_diagonal(objective, which)  # type: ignore[arg-type]
                assert bool(((found.value.double() - exact.diagonal()).abs() <= 4 * found.stderr).all())
                assert found.product_noise == of.product_noise

        g = objective.gradient()
        for radius in (1e-2, 1e3):
            for step in (linalg.gltr(A, g, radius), linalg.trust_region(A, g, radius)):
                s = step.step.double()
                residual = float((g.double() + G @ s + step.multiplier * s).norm())
                assert residual <= step.residual_norm + 1e-6 * float(g.norm())
                assert step.product_noise == noise
                assert step.status is not Status.CONVERGED
        kernel = NTKOperator(objective)
        assert 0 < kernel.product_noise < 0.1
        assert linalg.trace(kernel, num_matvecs=20, generator=0).product_noise == kernel.product_noise
        assert any("NTKOperator" in note for note in objective.notes)
        if kind != "autocast":  # it computes in full precision
            (said,) = (message for message in objective.check().messages if "of their size" in message)
            assert "the Hessian" in said


@pytest.mark.parametrize("kind", ["bfloat16", "autocast inside"])
def test_densities_and_what_follows_from_them_hold_the_noise(kind: str) -> None:
    objective, H, G, _ = setup(kind)
    A = GGNOperator(objective)
    exact = torch.linalg.eigvalsh(G).clamp_min(0)
    n = len(exact)
    density = linalg.spectral_density(A, num_probes=n, num_steps=n, probes=torch.eye(n), block_size=n, generator=0)
    z = (density.grid[:, None] - exact) / density.sigma
    truth = torch.exp(-0.5 * z.square()).sum(dim=1) / (n * density.sigma * (2 * torch.pi) ** 0.5)
    assert density.product_noise == A.product_noise
    assert density.rule is not None
    off = (density.density - truth).abs()
    assert bool((off <= density.rule + 1e-3 * truth.max()).all())
    damping = 0.1 * float(exact.max())
    for found, value in (
        (linalg.logdet(density, damping=damping), torch.log(exact + damping).sum()),
        (linalg.effective_dimension(density, damping), (exact / (exact + damping)).sum()),
        (linalg.moments(density, [1]), exact.mean()),
        (linalg.spectral_sum(density, torch.square), exact.square().sum()),
    ):
        assert float((found.value - value).abs()) <= 2 * float(found.stderr)
        assert found.product_noise == A.product_noise
    places = torch.tensor([n // 3, n - 4, n - 1])
    share, truth = linalg.cdf(density, exact[places]), (places + 1.0) / n
    assert bool((share.lower - 1e-4 <= truth).all())
    assert bool((share.upper + 1e-4 >= truth).all())
    found = spectrum(objective, generator=0)
    assert found.density.product_noise == HessianOperator(objective).product_noise
    of_square = found.spectral_sum(torch.square)
    low, high = of_square.interval(0.99)
    assert low <= float(H.square().sum()) <= high
    assert float(of_square.rule) >= found.density.product_noise * float(H.square().sum()) * 0.5
