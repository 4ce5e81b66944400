from __future__ import annotations

from pathlib import Path

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvature.errors import InputError, NonFiniteError, NotConvergedError
from curvature.linalg import ThickRestartLanczos
from curvature.linalg.base import places
from curvature.linalg.base.validate import checked_once
from curvature.linalg.krylov import _krylov_space, _rounded_space
from curvature.linop import Counting, LinearOperator, to_scipy
from curvature.results.estimates import Status
from tests.matrices import F64, generator, orthogonal, spectra, true_residuals, twenty_spectra, wanted, with_spectrum
from tests.matrices import lanczos_pairs as eigsh
from tests.memory_meter import PeakBytes

N = 120


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("name", spectra(N))
def test_it_agrees_with_a_dense_solver(name: str, which: str) -> None:
    A = with_spectrum(spectra(48)[name])
    scale = float(torch.linalg.matrix_norm(A, 2))
    # a null space inside the spectrum is no breakdown: its six copies take a block of six
    block_size = 6 if name == "many null" else 1
    pairs = eigsh(
        A,
        6,
        which=which,  # type: ignore[arg-type]
        rtol=1e-8,
        atol=1e-12 * scale,
        generator=generator(),
        num_basis=48 if name == "exponential" else 30,  # its low end, 1e-8 of the top, is out of reach of restarts
        block_size=block_size,
    )
    assert pairs.status is Status.CONVERGED
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 6, which), rtol=0, atol=1e-8 * max(scale, 1e-3))
    torch.testing.assert_close(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(6, dtype=F64), rtol=0, atol=1e-12)
    # residuals are true, and there are no ghosts: n copies of an eigenvalue are n orthogonal eigenvectors
    assert bool((true_residuals(A, pairs) <= 1.01 * pairs.residual_norms + 1e-13 * scale).all())


@pytest.mark.parametrize("name", ["multiple of the identity", "zero", "rank one", "step", "many null"])
def test_repeated_eigenvalues_come_as_often_as_they_are_there(name: str) -> None:
    A = with_spectrum(spectra(40)[name])
    pairs = eigsh(A, 25, rtol=1e-8, generator=generator())
    assert pairs.status is Status.CONVERGED
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 25, "LA"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
@pytest.mark.parametrize("n", [8, 30])
def test_small_matrices_full_of_equal_eigenvalues_miss_none(n: int, which: str) -> None:
    for seed in range(15):
        A = with_spectrum(torch.randint(-2, 3, (n,), generator=generator(seed)).to(F64), seed)
        pairs = eigsh(A, 3, which=which, rtol=1e-8, atol=1e-8, generator=generator(seed))  # type: ignore[arg-type]
        torch.testing.assert_close(pairs.eigenvalues, wanted(A, 3, which), rtol=0, atol=1e-6)


def test_a_block_finds_a_pair_of_equal_eigenvalues_without_breakdown() -> None:
    A = with_spectrum(torch.cat([torch.tensor([2.0, 2.0], dtype=F64), torch.linspace(0, 1, N - 2, dtype=F64)]))
    pairs = eigsh(A, 3, rtol=1e-6, generator=generator(), block_size=2)
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([2.0, 2.0, 1.0], dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["flat", "polynomial", "indefinite", "outliers over a bulk"])
def test_every_reported_residual_is_true_at_loose_tolerance(name: str, block_size: int) -> None:
    A = with_spectrum(spectra(N)[name])
    pairs = eigsh(A, 5, rtol=1e-2, generator=generator(3), block_size=block_size)
    torch.testing.assert_close(pairs.residual_norms, true_residuals(A, pairs), rtol=1e-6, atol=1e-12)
    nearest = (torch.linalg.eigvalsh(A)[:, None] - pairs.eigenvalues).abs().min(dim=0).values
    assert bool((nearest <= pairs.residual_norms + 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_operators(dtype: torch.dtype) -> None:
    A = with_spectrum(spectra(N)["outliers over a bulk"]).to(dtype)
    rtol = 1e-3 if dtype is torch.float32 else 3e-2
    pairs = eigsh(A, 3, rtol=rtol, generator=generator(), certify=True)
    assert pairs.eigenvalues.dtype == torch.float32
    assert pairs.status is Status.CONVERGED
    exact = wanted(A, 3, "LA").float()
    assert bool(((pairs.eigenvalues - exact).abs() <= 2 * rtol * exact).all())


def test_certified_residuals_cost_k_products_more_and_change_nothing_in_float64() -> None:
    A = with_spectrum(spectra(N)["slow exponential"])
    plain = eigsh(A, 4, generator=generator())  # one product checks all residuals at once
    counted = Counting(A)
    certified = eigsh(counted, 4, generator=generator(), certify=True)
    assert certified.num_matvecs == counted.num_matvecs == plain.num_matvecs - 1 + 4
    torch.testing.assert_close(certified.residual_norms, plain.residual_norms, rtol=1e-6, atol=1e-12)


class Rounding(Counting):
    """Products that err by a share of the matrix's norm in a direction that the vector decides, as long sums do."""

    def __init__(self, A: Tensor, share: float) -> None:
        super().__init__(A)
        self.size = share * float(torch.linalg.matrix_norm(A, 2))

    def _matmat(self, X: Tensor) -> Tensor:
        seeds = [int(x.double().abs().sum() * 1e12) for x in X.T]
        noise = torch.stack([torch.randn(len(X), generator=generator(s % 2**31)) for s in seeds], dim=1)
        return super()._matmat(X) + (self.size * X.norm(dim=0) * noise / noise.norm(dim=0)).to(X)


@pytest.mark.parametrize("share", [1e-6, 3e-6, 8e-6, 1e-4])
@pytest.mark.parametrize("name", ["outliers over a bulk", "slow exponential"])
def test_rounding_beyond_the_recurrence_is_in_the_residuals_and_few_pairs_are_multiplied(
    name: str, share: float
) -> None:
    """One product says how large it is; pairs that may miss their tolerance are multiplied, all where it is more."""
    A = with_spectrum(spectra(N)[name]).float()
    noisy = Rounding(A, share)
    pairs = eigsh(noisy, 6, rtol=1e-3, generator=generator())
    steps = eigsh(Rounding(A, share), 6, rtol=1e-3, generator=generator(), certify=True).num_matvecs - 6
    assert pairs.num_matvecs == noisy.num_matvecs
    multiplied = pairs.num_matvecs - steps - 1
    exact = true_residuals(A.double(), pairs)
    size = noisy.size
    assert bool((pairs.residual_norms.double() + 1.2 * size >= exact).all())
    scale = float(torch.linalg.matrix_norm(A, 2))
    if share <= 8e-6:
        assert multiplied < 6
    else:
        assert multiplied == 6
        assert bool((pairs.residual_norms >= 0.5 * size).all())
    if share == 8e-6:  # above what counts as rounding: pairs that were not multiplied hold it
        assert bool((pairs.residual_norms >= 1e-6 * scale).all())
    tolerance = 1e-3 * pairs.eigenvalues.abs()
    assert bool((pairs.residual_norms <= tolerance)[pairs.converged].all())


def test_which_pairs_are_looked_at_again() -> None:
    norms, tolerance = torch.tensor([1e-9, 8e-4, 9.9e-4]), torch.tensor([1e-2, 1e-3, 1e-3])
    for gap, rounding, added, again in (
        (1e-5, 1e-5, 0.0, [False, False, False]),  # rounding
        (6e-5, 1e-5, 5e-5, [False, False, True]),  # somewhat more
        (1e-3, 1e-5, 0.0, [True, True, True]),  # something else
        (9e-6, 1e-9, 9e-6, [False, False, False]),  # nothing beside the tolerance
    ):
        found, wrong = checked_once(norms, gap, tolerance, rounding)
        torch.testing.assert_close(found, norms + added, rtol=0, atol=1e-8)
        assert wrong.tolist() == again


@pytest.mark.parametrize(("k", "which", "rtol"), [(1, "LA", 1e-3), (10, "LA", 1e-3), (10, "LA", 1e-6), (5, "LM", 1e-3)])
def test_it_needs_no_more_products_than_arpack(k: int, which: str, rtol: float) -> None:
    size, n = max(2 * k + 1, 20), 200
    ours: list[int] = []
    arpack: list[int] = []
    certified: list[int] = []
    for seed, (name, eigenvalues) in enumerate(twenty_spectra(n).items()):
        A, v0 = with_spectrum(eigenvalues, seed), torch.randn(n, generator=generator(seed), dtype=F64)
        settings = {"which": which, "rtol": rtol, "num_basis": size, "v0": v0}
        pairs = eigsh(A, k, generator=generator(), confidence=None, **settings)  # type: ignore[arg-type]
        assert pairs.status is Status.CONVERGED, name
        certified.append(eigsh(A, k, generator=generator(), **settings).num_matvecs)  # type: ignore[arg-type]
        counted = Counting(A)
        scipy.sparse.linalg.eigsh(to_scipy(counted), k, which=which, tol=rtol, ncv=size, v0=v0.numpy())
        ours.append(pairs.num_matvecs)
        arpack.append(counted.num_matvecs)
        assert ours[-1] <= 1.1 * arpack[-1] + 2, f"{name}: {ours[-1]} products against ARPACK's {arpack[-1]}"
    assert sum(ours) <= sum(arpack), f"{sum(ours)} products against ARPACK's {sum(arpack)}"
    most = 1.3 if which == "LM" else 1.2  # an indefinite spectrum has two ends, with a chain each
    assert sum(certified) <= most * sum(arpack), f"{sum(certified)} certified products against {sum(arpack)}"


def test_a_warm_start_with_the_answer_costs_little_more_than_looking_at_it() -> None:
    A = with_spectrum(spectra(N)["outliers over a bulk"])
    cold = eigsh(A, 3, rtol=1e-6, generator=generator())
    warm = eigsh(A, 3, rtol=1e-3, generator=generator(), v0=cold.eigenvectors, confidence=None)
    assert warm.num_matvecs <= 4 < cold.num_matvecs
    near = A + 1e-3 * with_spectrum(spectra(N)["indefinite"], seed=5)
    tracked = eigsh(near, 3, rtol=1e-3, generator=generator(), v0=cold.eigenvectors)
    assert tracked.num_matvecs < eigsh(near, 3, rtol=1e-3, generator=generator()).num_matvecs
    torch.testing.assert_close(tracked.eigenvalues, wanted(near, 3, "LA"), rtol=1e-4, atol=0)


def test_the_budget_is_kept_and_the_partial_result_says_so() -> None:
    A = Counting(with_spectrum(spectra(N)["flat"]))
    pairs = eigsh(A, 5, rtol=1e-10, generator=generator(), max_matvecs=30)
    assert pairs.num_matvecs == A.num_matvecs == 30
    assert pairs.status is Status.MAX_MATVECS
    assert not bool(pairs.converged.all())
    with pytest.raises(
        NotConvergedError, match=r"of 5 eigenpairs converged in 30 products: .*raise max_matvecs"
    ) as caught:
        pairs.raise_if_failed()
    assert caught.value.result is pairs


def test_small_matrices_and_full_spectra() -> None:
    one = eigsh(torch.tensor([[-3.0]]), 1, generator=generator(), confidence=None)
    assert one.eigenvalues.item() == -3.0
    assert one.num_matvecs == 1
    A = with_spectrum(torch.linspace(-1, 1, 12, dtype=F64))
    full = eigsh(A, 12, rtol=1e-10, generator=generator())
    torch.testing.assert_close(full.eigenvalues, torch.linspace(1, -1, 12, dtype=F64), rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_numbers_and_the_callback_sees_every_product() -> None:
    A = with_spectrum(spectra(N)["indefinite"])
    seen: list[int] = []
    first = eigsh(A, 4, generator=generator(5), callback=lambda done, _: seen.append(done))
    second = eigsh(A, 4, generator=generator(5))
    torch.testing.assert_close(first.eigenvectors, second.eigenvectors, rtol=0, atol=0)
    assert seen == list(range(1, first.num_matvecs))  # the last product checks residuals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be in \[1, 120\], got 0"),
        ({"k": 121}, r"k must be in \[1, 120\], got 121"),
        ({"which": "XX"}, "which must be one of LA, SA, LM, BE, got 'XX'"),
        ({"which": "BE", "k": 1}, "k must be at least 2"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"atol": -1.0}, "atol not negative"),
        ({"max_matvecs": 0}, "max_matvecs must be at least 1, got 0"),
        ({"num_basis": 4}, r"num_basis must be at least 5, more than k \+ block_size .*, got 4"),
        ({"block_size": 0}, r"block_size must be in \[1, 120\]"),
        ({"v0": torch.ones(7)}, r"v0 must be a vector \(120,\) or a block"),
        ({"v0": torch.zeros(N)}, "v0 must be finite, not zero"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"k": 3, "generator": generator(), **arguments}
    with pytest.raises(InputError, match=message):
        eigsh(with_spectrum(spectra(N)["flat"]), **settings)  # type: ignore[arg-type]


def test_products_that_are_not_finite_are_named() -> None:
    A = torch.full((5, 5), torch.inf)
    with pytest.raises(NonFiniteError, match="product 1"):
        eigsh(A, 1, generator=generator())


# -- deflation, saved runs, where the basis lives ---------------------------------------------------------------


def test_known_pairs_are_left_out_and_the_next_ones_found() -> None:
    A = with_spectrum(spectra(N)["slow exponential"])
    top = eigsh(A, 4, rtol=1e-8, generator=generator())
    for deflate in (top, top.eigenvectors):
        counted = Counting(A)
        rest = eigsh(counted, 3, rtol=1e-6, generator=generator(1), deflate=deflate)
        assert rest.status is Status.CONVERGED
        assert rest.num_matvecs == counted.num_matvecs
        torch.testing.assert_close(rest.eigenvalues, wanted(A, 7, "LA")[4:], rtol=1e-10, atol=0)
        assert (top.eigenvectors.T @ rest.eigenvectors).abs().max() < 1e-12
        torch.testing.assert_close(rest.residual_norms, true_residuals(A, rest), rtol=1e-5, atol=1e-12)


def test_what_deflated_vectors_lack_in_accuracy_shows_in_the_residuals() -> None:
    A = with_spectrum(spectra(N)["slow exponential"])
    rough = eigsh(A, 4, rtol=1e-2, generator=generator())
    rest = eigsh(A, 3, rtol=1e-6, generator=generator(1), deflate=rough)
    assert rest.status is Status.DEFLATION_INEXACT
    assert not bool(rest.converged.all())
    torch.testing.assert_close(rest.residual_norms, true_residuals(A, rest), rtol=1e-6, atol=1e-12)


def test_all_but_the_deflated_directions_can_be_asked_for() -> None:
    A = with_spectrum(torch.linspace(-1, 1, 12, dtype=F64))
    vectors = torch.linalg.eigh(A)[1]
    rest = eigsh(A, 9, rtol=1e-10, generator=generator(), deflate=vectors[:, :3])
    torch.testing.assert_close(rest.eigenvalues, torch.linspace(-1, 1, 12, dtype=F64)[3:].flip(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["flat", "indefinite", "many null"])
@pytest.mark.parametrize("block_size", [1, 3])
def test_a_saved_run_takes_the_same_steps(name: str, block_size: int, tmp_path: Path) -> None:
    A = with_spectrum(spectra(N)[name])

    def solver(seed: int) -> ThickRestartLanczos:
        return ThickRestartLanczos(A, 6, rtol=1e-6, generator=generator(seed), block_size=block_size, which="BE")

    whole = solver(0).run()
    first = solver(0)
    partial = first.run(max_matvecs=45)
    assert partial.status is Status.MAX_MATVECS
    torch.save(first.state_dict(), tmp_path / "run.pt")
    second = solver(99)
    second.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True))
    resumed = second.run()
    assert whole.num_matvecs == resumed.num_matvecs == first.run().num_matvecs > 45
    torch.testing.assert_close(resumed.eigenvectors, whole.eigenvectors, rtol=0, atol=0)
    torch.testing.assert_close(resumed.residual_norms, whole.residual_norms, rtol=0, atol=0)


def test_a_state_of_another_problem_is_refused() -> None:
    state = ThickRestartLanczos(torch.eye(30), 2, generator=generator()).state_dict()
    with pytest.raises(InputError, match="make the solver with the arguments of the one that was saved"):
        ThickRestartLanczos(torch.eye(31), 2, generator=generator()).load_state_dict(state)


@pytest.mark.parametrize(
    ("deflate", "message"),
    [
        (torch.ones(N, 2, dtype=F64), r"deflate must hold orthonormal columns; make them so with torch.linalg.qr"),
        (torch.ones(3, 1, dtype=F64), r"deflate must hold fewer than 120 columns of length 120, got shape \(3, 1\)"),
        (torch.eye(N, dtype=F64)[:, :119], r"k must be in \[1, 1\], got 2"),
    ],
)
def test_bad_deflation(deflate: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        eigsh(with_spectrum(spectra(N)["flat"]), 2, generator=generator(), deflate=deflate)


# -- a basis in fewer bits ----------------------------------------------------------------------------------------

NARROW = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("basis_dtype", NARROW)
@pytest.mark.parametrize("name", spectra(N))
def test_a_rounded_basis_reports_true_residuals_and_reaches_what_its_rounding_allows(
    name: str, basis_dtype: torch.dtype
) -> None:
    A = with_spectrum(spectra(N)[name])
    eps, scale = torch.finfo(basis_dtype).eps, float(torch.linalg.matrix_norm(A, 2))
    counted = Counting(A)
    pairs = eigsh(counted, 6, rtol=1e-12, generator=generator(), basis_dtype=basis_dtype)
    assert pairs.num_matvecs == counted.num_matvecs <= 250  # it does not try for ever
    torch.testing.assert_close(pairs.residual_norms, true_residuals(A, pairs), rtol=1e-9, atol=1e-14 * scale)
    torch.testing.assert_close(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(6, dtype=F64), rtol=0, atol=1e-13)
    assert bool((pairs.residual_norms <= eps * scale).all())
    assert (pairs.status is Status.CONVERGED) == bool(pairs.converged.all())
    assert pairs.status in (Status.CONVERGED, Status.STAGNATED)
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 6, "LA"), rtol=0, atol=eps * scale)


@pytest.mark.parametrize(
    ("basis_dtype", "rtol"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-6)]
)
@pytest.mark.parametrize(("which", "block_size"), [("LA", 1), ("LM", 3), ("BE", 2)])
def test_a_rounded_basis_converges_to_tolerances_above_its_rounding(
    basis_dtype: torch.dtype, rtol: float, which: str, block_size: int
) -> None:
    A = with_spectrum(spectra(N)["indefinite"])
    settings = {"which": which, "rtol": rtol, "block_size": block_size}
    wide = eigsh(A, 6, generator=generator(), **settings)  # type: ignore[arg-type]
    pairs = eigsh(A, 6, generator=generator(), basis_dtype=basis_dtype, **settings)  # type: ignore[arg-type]
    assert pairs.status is Status.CONVERGED
    assert bool((true_residuals(A, pairs) <= rtol * pairs.eigenvalues.abs()).all())
    assert pairs.num_matvecs <= 1.2 * wide.num_matvecs + 6 + block_size  # six for the certificate
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 6, which), rtol=0, atol=rtol)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_basis_has_the_dtype_asked_for_and_the_result_that_of_the_work(dtype: torch.dtype) -> None:
    A = with_spectrum(spectra(N)["outliers over a bulk"]).to(dtype)
    solver = ThickRestartLanczos(A, 3, rtol=3e-2, generator=generator(), basis_dtype=torch.bfloat16)
    assert solver.space.rows.dtype is torch.bfloat16
    assert solver.space.rows.nbytes <= 2 * N * (solver.size + 1 + 4)
    pairs = solver.run()
    assert solver.space.rows.dtype is torch.bfloat16
    assert pairs.eigenvectors.dtype is torch.promote_types(dtype, torch.float32)
    assert pairs.status is Status.CONVERGED


def test_no_step_holds_a_second_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that an operation returns has a few rows of the basis, not all."""
    monkeypatch.setattr(_rounded_space, "COLUMNS", 64)
    n, size = 4096, 20
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype is torch.float32:
                sizes.append(result.untyped_storage().nbytes())
            return result

    class Diagonal(LinearOperator):
        def _matmat(self, X: Tensor) -> Tensor:
            return torch.linspace(0, 1, n)[:, None] ** 8 * X

    A = Diagonal((n, n), torch.float32, "cpu")
    solver = ThickRestartLanczos(A, 2, generator=generator(), basis_dtype=torch.bfloat16, num_basis=size)
    with Largest():
        pairs = solver.run(max_matvecs=60)
    assert pairs.num_matvecs > size + 10  # it restarted
    assert max(sizes) <= 4 * n * 2  # the pairs of the result


@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16])
def test_no_more_vectors_than_the_basis_and_a_few_are_held(
    basis_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, size = 1 << 16, 8
    for module, name in ((places, "_SPARE_BYTES"), (_krylov_space, "_SMALL")):
        monkeypatch.setattr(module, name, 0)  # as for vectors that are large
    monkeypatch.setattr(_krylov_space, "_COLUMNS", n // 64)
    monkeypatch.setattr(_rounded_space, "COLUMNS", n // 64)

    class Diagonal(LinearOperator):
        def _matmat(self, X: Tensor) -> Tensor:
            return d[:, None] * X

    d = torch.linspace(0, 1, n)
    d[:6] += torch.tensor([8.0, 7.0, 5.0, 2.0, 1.0, 1.0])
    A = Diagonal((n, n), torch.float32, "cpu")
    with PeakBytes() as meter:  # the search for missed pairs and the check of the result included
        pairs = eigsh(A, 3, rtol=0.02, generator=generator(), num_basis=size, basis_dtype=basis_dtype)
    assert pairs.num_matvecs > size + 3
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([8.0, 7.0, 5.0]), rtol=1e-3, atol=0)
    assert pairs.status in (Status.CONVERGED, Status.UNCERTIFIED)  # five steps of a chain do not always show it
    assert meter.peak <= 1.2 * (size + 4) * 4 * n


def test_float16_holds_vectors_whose_entries_lie_below_its_range() -> None:
    n = 1 << 16
    d = torch.zeros(n)
    d[:2] = torch.tensor([2.0, 1.0])

    class Flat(LinearOperator):
        """2 u u' + w w' for u = 1 / sqrt(n), w with every other sign turned."""

        def _matmat(self, X: Tensor) -> Tensor:
            u = torch.full((n,), n**-0.5)
            w = u * torch.tensor([1.0, -1.0]).repeat(n // 2)
            return 2 * u[:, None] * (u @ X) + w[:, None] * (w @ X)

    pairs = eigsh(
        Flat((n, n), torch.float32, "cpu"), 2, rtol=3e-3, generator=generator(), basis_dtype=torch.float16, num_basis=8
    )
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([2.0, 1.0]), rtol=1e-5, atol=0)
    assert pairs.status is Status.CONVERGED


@pytest.mark.parametrize("basis_dtype", NARROW)
@pytest.mark.parametrize("deflated", [0, 3])
def test_a_saved_run_with_a_rounded_basis_takes_the_same_steps(
    basis_dtype: torch.dtype, deflated: int, tmp_path: Path
) -> None:
    A = with_spectrum(spectra(N)["flat"])
    known = torch.linalg.eigh(A)[1][:, N - deflated :]

    def solver(seed: int) -> ThickRestartLanczos:
        return ThickRestartLanczos(
            A, 4, rtol=1e-9, generator=generator(seed), basis_dtype=basis_dtype, deflate=known, block_size=2
        )

    first = solver(0)
    whole = solver(0).run()
    assert first.run(max_matvecs=40).status is Status.MAX_MATVECS
    torch.save(first.state_dict(), tmp_path / "run.pt")
    second = solver(99)
    second.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True))
    resumed = second.run()
    assert resumed.num_matvecs == whole.num_matvecs > 44
    torch.testing.assert_close(resumed.eigenvectors, whole.eigenvectors, rtol=0, atol=0)
    torch.testing.assert_close(resumed.residual_norms, true_residuals(A, resumed), rtol=1e-9, atol=1e-13)


def test_with_a_rounded_basis_the_answer_is_orthogonal_to_what_was_deflated_and_blame_is_given_rightly() -> None:
    A = with_spectrum(spectra(N)["slow exponential"])
    settings = {"generator": generator(1), "basis_dtype": torch.bfloat16}
    exact = torch.linalg.eigh(A)[1][:, -4:]
    rest = eigsh(A, 3, rtol=2e-2, deflate=exact, **settings)  # type: ignore[arg-type]
    assert rest.status is Status.CONVERGED
    assert (exact.T @ rest.eigenvectors).abs().max() < 1e-13
    torch.testing.assert_close(rest.eigenvalues, wanted(A, 7, "LA")[4:], rtol=1e-3, atol=0)
    assert eigsh(A, 3, rtol=1e-6, deflate=exact, **settings).status is Status.STAGNATED  # type: ignore[arg-type]
    rough = torch.linalg.qr(exact + 0.2 * orthogonal(N, seed=7)[:, :4])[0]
    rest = eigsh(A, 3, rtol=2e-2, deflate=rough, **settings)  # type: ignore[arg-type]
    assert rest.status is Status.DEFLATION_INEXACT
    torch.testing.assert_close(rest.residual_norms, true_residuals(A, rest), rtol=1e-9, atol=0)


def test_a_state_of_another_basis_dtype_is_refused() -> None:
    A = torch.eye(30)
    state = ThickRestartLanczos(A, 2, generator=generator(), basis_dtype=torch.bfloat16).state_dict()
    with pytest.raises(InputError, match=r"directions of torch.bfloat16, .* of torch.float32, .* make the solver with"):
        ThickRestartLanczos(A, 2, generator=generator()).load_state_dict(state)


@pytest.mark.parametrize(
    ("dtype", "basis_dtype", "got"),
    [
        (torch.float32, F64, "float64"),
        (torch.bfloat16, F64, "float64"),
        (F64, torch.int8, "int8"),
        (F64, torch.complex64, "complex64"),
        (F64, torch.float8_e4m3fn, "float8_e4m3fn"),
    ],
)
def test_a_basis_that_cannot_be_held_is_refused(dtype: torch.dtype, basis_dtype: torch.dtype, got: str) -> None:
    with pytest.raises(InputError, match=rf"basis_dtype must be one of torch.bfloat16, .* got torch.{got}"):
        eigsh(torch.eye(30, dtype=dtype), 2, generator=generator(), basis_dtype=basis_dtype)


def test_products_that_are_not_finite_are_named_with_a_rounded_basis_too() -> None:
    with pytest.raises(NonFiniteError, match="product 1"):
        eigsh(torch.full((5, 5), torch.inf), 1, generator=generator(), basis_dtype=torch.bfloat16)
