"""How often a GPU would be waited for: reads of values by the host, counted on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature import GGNOperator, HessianOperator, Objective
from curvature.fingerprints.contents import Contents
from curvature.linalg import eigsh

READS: Counter[str] = Counter()


class Scalars(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            READS["scalar"] += 1
        return func(*args, **(kwargs or {}))


def counting(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def read(*args: Any, **kwargs: Any) -> Any:
        READS[name] += 1
        return plain(*args, **kwargs)

    return read


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count copies to the host, and have tensors compared as on a GPU, by their digests."""
    for name in ("cpu", "tolist"):
        monkeypatch.setattr(Tensor, name, counting(name, getattr(Tensor, name)))
    monkeypatch.setitem(Contents.__init__.__kwdefaults__, "room", 0)
    with Scalars():
        yield


def fewest(work: Callable[[], object], repeats: int = 8) -> Counter[str]:
    """Return the fewest reads of several runs: as time goes by, a batch is evaluated once more."""
    counts = []
    for _ in range(repeats):
        READS.clear()
        work()
        counts.append(Counter(READS))
    return min(counts, key=lambda count: sum(count.values()))


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_a_product_reads_two_digests_and_whether_it_is_finite(operator: type[HessianOperator]) -> None:
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    data = (torch.randn(40, 6), torch.randint(3, (40,)))
    A = operator(Objective(model, nn.CrossEntropyLoss(), data, keep_graphs=True))
    v = torch.randn(A.shape[0])
    assert fewest(lambda: A @ v) == {"tolist": 2, "scalar": 1}  # of the parameters, and of the data


def test_a_step_of_lanczos_copies_its_coefficients_once() -> None:
    A = (torch.linspace(-1, 1, 400, dtype=torch.float64) ** 5).diag()
    found = eigsh(A, 4, method="lanczos", generator=0)
    assert found.num_matvecs <= READS["cpu"] <= 1.2 * found.num_matvecs  # some for random directions
