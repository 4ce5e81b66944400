"""What users hand in: sparse, empty and inference tensors, arrays, operations without a second derivative."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature import GGNOperator, HessianOperator, Objective, layer_spectra
from curvature.errors import CheckFailedError, InputError
from curvature.layerwise import exact_diagonal
from curvature.per_example import per_example_gradients
from tests.checks import assert_close
from tests.references import dense_hessian, flat_gradient


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = normal(8, 4), torch.arange(8) % 3
ADJACENCY = (normal(8, 8, seed=1) * (normal(8, 8, seed=2) > 0.5)).to_sparse_coo()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that they are in beta state
    ROWS = ADJACENCY.to_sparse_csr()


def differences(loss: Callable[[], Tensor], params: list[Tensor], h: float = 1e-5) -> Tensor:
    """The Hessian by central differences of gradients."""
    columns = []
    for p in params:
        for i in range(p.numel()):
            found = []
            for step in (h, -h):
                p.data.view(-1)[i] += step
                grads = torch.autograd.grad(loss(), params, allow_unused=True, materialize_grads=True)
                found.append(torch.cat([g.to_dense().reshape(-1) for g in grads]))
                p.data.view(-1)[i] -= step
            columns.append((found[0] - found[1]) / (2 * h))
    return torch.stack(columns, 1)


class Model(nn.Module):
    """A model around one operation."""

    def __init__(self, operation: Callable[[Model, Any], Tensor], adjacency: Tensor | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
            self.table = nn.Parameter(normal(7, 4, seed=3))
        self.operation = operation
        if adjacency is not None:
            self.register_buffer("adjacency", adjacency)

    def forward(self, x: Any) -> Tensor:
        return self.b(torch.tanh(self.operation(self, x)))


class Loader:
    def __iter__(self) -> Iterator[Any]:
        yield (X, ADJACENCY), Y


def flash(m: Model, x: Tensor) -> Tensor:
    q = m.a(x)[None, None]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, q, q)[0, 0]


def bags(mode: str, **settings: Any) -> Callable[[Model, Any], Tensor]:
    return lambda m, x: m.a(F.embedding_bag(x, m.table, mode=mode, **settings))


TOKENS = torch.randint(0, 7, (8, 3), generator=torch.Generator().manual_seed(4))
STARTS = torch.tensor([0, 3, 3, 7, 10, 14, 15, 20])
CASES: dict[str, tuple[Model, Any]] = {
    "COO buffer": (Model(lambda m, x: torch.sparse.mm(m.adjacency, m.a(x)), ADJACENCY), (X, Y)),
    "CSR buffer": (Model(lambda m, x: torch.sparse.mm(m.adjacency, m.a(x)), ROWS), (X, Y)),
    "sparse batches": (Model(lambda m, x: torch.sparse.mm(x[1], m.a(x[0]))), Loader()),
    "sparse gradients": (Model(lambda m, x: m.a(F.embedding(x, m.table, sparse=True).sum(1))), (TOKENS, Y)),
    "bags": (Model(bags("sum")), (TOKENS, Y)),
    "mean bags, padding": (Model(bags("mean", padding_idx=2)), (TOKENS, Y)),
    "ragged bags": (Model(bags("mean", offsets=STARTS)), (TOKENS.reshape(-1), Y)),
    "weighted bags": (Model(bags("sum", per_sample_weights=normal(8, 3))), (TOKENS, Y)),
    "cdist": (Model(lambda m, x: torch.cdist(m.a(x), F.pad(m.table, (0, 1)), p=2.0)[:, :5]), (X, Y)),
    "forced flash attention": (Model(flash), (X, Y)),
    "inference batch": (Model(lambda m, x: m.a(x)), (X, Y)),
    "arrays": (Model(lambda m, x: m.a(x)), (X.numpy()[::-1].copy()[::-1], Y.numpy())),
}


@pytest.mark.parametrize("settings", [{}, {"mode": "sum"}, {"mode": "mean", "offsets": STARTS}])
def test_gradients_that_embeddings_scale_by_frequency_are_not_scaled(settings: Any) -> None:
    """Scaled, they are the derivative of nothing, and their own is not symmetric."""
    tokens = TOKENS.reshape(-1) if "offsets" in settings else TOKENS

    def model(scaled: bool) -> Model:
        if settings:
            return Model(bags(**settings, scale_grad_by_freq=scaled))
        return Model(lambda m, x: m.a(F.embedding(x, m.table, scale_grad_by_freq=scaled).sum(1)))

    apart, plain = model(True), model(False)
    plain.load_state_dict(apart.state_dict())
    found, expected = (Objective(m, nn.CrossEntropyLoss(), (tokens, Y)) for m in (apart, plain))
    assert_close(found.gradient(), expected.gradient())
    H = HessianOperator(found).to_dense()
    assert_close(H, HessianOperator(expected).to_dense())
    assert_close(H, H.T)


@pytest.mark.parametrize("name", CASES)
def test_hessian(name: str) -> None:
    model, data = CASES[name]
    inputs, targets = next(iter(data)) if isinstance(data, Loader) else data
    if name == "inference batch":
        with torch.inference_mode():
            data = (X * 1.0, Y * 1)
    inputs = torch.tensor(np.array(inputs)) if isinstance(inputs, np.ndarray) else inputs
    expected = differences(lambda: F.cross_entropy(model(inputs), torch.as_tensor(targets)), list(model.parameters()))
    objective = Objective(model, nn.CrossEntropyLoss(), data)
    for _ in range(2):
        assert_close(HessianOperator(objective).to_dense(), expected, 1e-6)
    assert objective.check().passed


class Prompted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.net = nn.Parameter(torch.zeros(0, 5)), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.prompt.sum()


def test_empty_parameters() -> None:
    model = Prompted()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y))
    H = differences(lambda: F.cross_entropy(model(X), Y), list(model.parameters()))
    assert_close(exact_diagonal(objective, "hessian").value, H.diag(), 1e-6)
    found = layer_spectra(HessianOperator(objective), generator=torch.Generator().manual_seed(0))
    assert list(found) == ["net"]


def out_of_place() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("model", "says"), [(lambda: nn.LazyLinear(3), "run the model once"), (out_of_place, "inference_mode")]
)
def test_parameters_without_a_gradient_of_their_own(model: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Objective(model(), nn.CrossEntropyLoss(), (X, Y))


def ctc(z: Tensor, t: Tensor) -> Tensor:
    lengths = torch.full((2,), 10), torch.full((2,), 3)
    return F.ctc_loss(z.log_softmax(-1), t, *lengths)


@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
def test_no_second_derivative(matrix: type[HessianOperator | GGNOperator]) -> None:
    objective = Objective(nn.Linear(4, 5).double(), ctc, (normal(10, 2, 4), torch.ones(2, 3, dtype=torch.int64)))
    with pytest.raises(CheckFailedError, match="ctc_loss"):
        matrix(objective) @ torch.ones(objective.num_params, dtype=torch.float64)
    assert bool(objective.gradient().isfinite().all())  # as the message says


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.net(x)}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x + y)


SENTENCES: dict[str, tuple[nn.Module, Any, Any, str, Any]] = {
    "dictionary": (
        *(Dictionary(), nn.CrossEntropyLoss(), (X, Y), r"\['logits'\]"),
        lambda model, batch: (model(batch[0])["logits"], batch[1]),
    ),
    "several inputs": (
        *(Two(), nn.CrossEntropyLoss(), ((X, X), Y), r"model\(\*batch\[0\]\)"),
        lambda model, batch: (model(*batch[0]), batch[1]),
    ),
    "integers": (
        *(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), ((X * 9).long(), Y), r"x.to\(torch.float64\)"),
        lambda model, batch: (model(batch[0].to(torch.float64)), batch[1]),
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_remedy_works(name: str) -> None:
    model, loss, data, says, forward = SENTENCES[name]
    with pytest.raises(InputError, match=says):
        Objective(model, loss, [data]).loss()
    assert bool(Objective(model, loss, [data], forward=forward).loss().isfinite())


def test_a_dictionary_of_losses() -> None:
    model = nn.Linear(4, 3).double()
    losses: Any = lambda z, y: {"a": z.mean(), "b": F.cross_entropy(z, y)}  # noqa: E731
    with pytest.raises(InputError, match=r"'a', 'b'; return their sum, sum\(losses.values\(\)\)"):
        Objective(model, losses, (X, Y)).loss()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_single_gradients_of_sparse_batches(layout: torch.layout) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double().relu(), torch.arange(6) % 3
    objective = Objective(model, nn.CrossEntropyLoss(), (x.to_sparse(layout=layout), y))
    params = list(model.parameters())
    rows = [flat_gradient(F.cross_entropy(model(x[i]), y[i]), params) for i in range(6)]
    found = torch.cat([g for _, g in per_example_gradients(objective)])
    assert_close(found, torch.stack(rows), 1e-10)


def test_complex_losses_and_sparse_parameters_are_refused() -> None:
    model, batch = nn.Linear(4, 3), (torch.ones(6, 4), torch.ones(6, 3))
    with pytest.raises(InputError, match=r"real tensor with one entry, got torch.complex64; take its real part"):
        Objective(model, lambda z, y: ((z - 1j * y) ** 2).mean(), batch).loss()
    model.weight = nn.Parameter(torch.eye(3, 4).to_sparse())
    with pytest.raises(InputError, match=r"layout torch.sparse_coo"):
        Objective(model, nn.MSELoss(), batch)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_followed_like_others() -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    scripted = torch.jit.script(copy.deepcopy(plain))
    data = torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    H = HessianOperator(Objective(scripted, nn.CrossEntropyLoss(), data))
    for _ in range(2):
        expected = dense_hessian(lambda: nn.CrossEntropyLoss()(plain(data[0]), data[1]), list(plain.parameters()))
        assert_close(H.to_dense(), expected, 1e-10)
        for model in (plain, scripted):
            next(iter(model.parameters())).data.mul_(2)  # which no counter of versions sees
