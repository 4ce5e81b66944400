"""Models and losses that look at other ranks' batches are refused on every rank before any of them waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from curvature import HessianOperator, Objective, eigsh
from curvature.errors import DataError
from curvature.per_example import gradient_moments
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

pytestmark = IN_TWO_PROCESSES


class JoinedNorm(nn.Module):
    """Batch normalisation by the statistics of all ranks' batches, as it is written for CPUs; in train mode only."""

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            return h
        count = h.new_tensor([float(len(h))])
        *sums, total = all_reduce(torch.cat([h.sum(0), h.square().sum(0), count])).tensor_split([5, 10])
        mean, square = (s / total for s in sums)
        return (h - mean) / (square - mean**2 + 1e-5).sqrt()


def net(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(12) % 3


def gathered_contrast(z: Tensor, _: Tensor) -> Tensor:
    """A contrastive loss over the embeddings of all ranks, the others' without gradient."""
    every = [torch.empty_like(z) for _ in range(2)]
    dist.all_gather(every, z.detach())
    return nn.functional.cross_entropy(z @ torch.cat([z, *every]).T, torch.arange(len(z)))


def talks_in_train_mode(_: int, part: Any) -> None:
    model = net(JoinedNorm()).eval()
    objective = Objective(model, nn.CrossEntropyLoss(), part, process_group=dist.group.WORLD)
    objective.loss()
    model.train()
    objective.loss()


def of(model: Callable[[], nn.Module], loss: Any = None, *, group: bool = True) -> Callable[[int, Any], Objective]:
    return lambda _, part: Objective(
        model(), loss or nn.CrossEntropyLoss(), part, process_group=dist.group.WORLD if group else None
    )


def split_norm() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(net(nn.BatchNorm1d(5).double()))


def plain() -> nn.Module:
    return net(nn.Identity())


TALKING: dict[str, tuple[str, Callable[[int, Any], object]]] = {
    "gradient": ("allreduce", lambda r, d: of(lambda: net(JoinedNorm()))(r, d).gradient()),
    "single gradients": ("allreduce", lambda r, d: gradient_moments(of(lambda: net(JoinedNorm()))(r, d))),
    "eigenpairs": ("allreduce", lambda r, d: eigsh(of(lambda: net(JoinedNorm()))(r, d), 1, generator=0)),
    "each for itself": ("allreduce", lambda r, d: of(lambda: net(JoinedNorm()), group=False)(r, d).loss()),
    "turned on later": ("allreduce", talks_in_train_mode),
    "rank 0 without data": ("allreduce", lambda r, d: of(lambda: net(JoinedNorm()))(r, d if r else []).loss()),
    "the loss": ("allgather", lambda r, d: of(plain, gathered_contrast)(r, d).loss()),
    "SyncBatchNorm": ("SyncBatchNorm in train mode", lambda r, d: of(split_norm)(r, d).loss()),
    "SyncBatchNorm, one rank without data": (
        "SyncBatchNorm in train mode",
        lambda r, d: of(split_norm)(r, d if r else []).loss(),
    ),
}


def work(rank: int, folder: str) -> None:
    x, y = data()
    parts = [(x[:8], y[:8])], [(x[8:10], y[8:10]), (x[10:], y[10:])]
    said = {}
    with process_group(rank, folder):
        for name, (_, call) in TALKING.items():
            try:
                call(rank, parts[rank])
                said[name] = "nothing"
            except Exception as error:
                said[name] = f"{type(error).__name__}: {error}"
        objective = of(lambda: split_norm().eval())(rank, parts[rank])
        A = HessianOperator(objective)
        found = A @ torch.eye(A.shape[0], dtype=torch.float64)
    torch.save({"said": said, "SyncBatchNorm in eval mode": found}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("between")
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", TALKING)
def test_a_rank_whose_loss_depends_on_other_ranks_batches_is_refused(ranks: list[dict[str, Any]], name: str) -> None:
    said = [found["said"][name] for found in ranks]
    assert any(text.startswith("InputError") for text in said)
    for text in said:
        assert TALKING[name][0] in text


def test_sync_batch_norm_in_eval_mode_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    x, y = data()
    model = net(nn.BatchNorm1d(5).double()).eval()
    named = dict(model.named_parameters())

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        given = {n: part.view_as(p) for (n, p), part in zip(named.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, given, x), y)

    expected = torch.autograd.functional.hessian(loss, nn.utils.parameters_to_vector(named.values()).detach())
    for found in ranks:
        torch.testing.assert_close(found["SyncBatchNorm in eval mode"], expected)


def test_sync_batch_norm_on_one_process_is_batch_norm() -> None:
    pairs = [
        Objective(model, nn.CrossEntropyLoss(), data()) for model in (split_norm(), net(nn.BatchNorm1d(5).double()))
    ]
    v = torch.ones(pairs[0].num_params, dtype=torch.float64)
    torch.testing.assert_close(*(HessianOperator(objective) @ v for objective in pairs))
    with pytest.raises(DataError, match=r"model\.eval\(\)"):
        gradient_moments(pairs[0])
