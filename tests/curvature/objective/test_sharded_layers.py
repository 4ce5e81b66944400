"""Layers of real models in parts: fused attention, checkpointed blocks, ties across units, frozen parts, buffers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from curvature import GGNOperator, HessianOperator, Objective
from curvature.objective.module_graph import Call
from curvature.sharding.tensors import in_parts, whole
from tests.checks import BATCHING_TOLERANCE, assert_close
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

pytestmark = IN_TWO_PROCESSES


class Block(nn.Module):
    """Attention and a perceptron of widths that two ranks do not divide."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down, self.inside = nn.Linear(6, 13), nn.Linear(13, 6), inside

    def body(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 3)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.body, x, use_reentrant=False) if self.inside else self.body(x)


class Texts(nn.Module):
    """A head tied to the table, two blocks, and buffers."""

    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        self.table, self.places, self.checkpointed = nn.Embedding(7, 6), nn.Embedding(4, 6), checkpointed
        self.blocks = nn.ModuleList([Block(checkpointed == "inside") for _ in range(2)])
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1])) + self.shift.to(self.table.weight.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed == "outside" else block(x)
        found: Tensor = self.head(self.last(x)).flatten(0, 1)
        return found


class Around(nn.Module):
    """A layer of torch's own between a table and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(7, 6), layer, nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.layer(self.table(tokens))
        logits: Tensor = self.head(found[0] if isinstance(found, tuple) else found)
        return logits.flatten(0, 1)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x).tanh()


class OneByOne(nn.Module):
    """Calls a linear layer on vectors, on blocks and by name, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.stack([self.up(v) for v in self.table(tokens).flatten(0, 1)]).tanh()
        found: Tensor = self.down(input=x + self.up(torch.ones(1, 6, dtype=x.dtype)))
        return found


def frozen(model: nn.Module, names: Callable[[str], bool]) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(not names(name))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": Texts,
    "checkpointed blocks": lambda: Texts("outside"),
    "checkpoints inside of units": lambda: Texts("inside"),
    "a frozen block": lambda: frozen(Texts(), lambda name: name.startswith("blocks.0")),
    "frozen parameters inside of units": lambda: frozen(Texts(), lambda name: name.endswith("bias")),
    "a vector at a time": OneByOne,
    "a frozen table, tied": lambda: frozen(Texts(), lambda name: name.startswith("table")),
    "torch's own layer": lambda: Around(nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True)),
    "a recurrent layer": lambda: Around(nn.GRU(6, 6, batch_first=True)),
    "batch normalisation": lambda: Around(Normalised()),
    "batch normalisation, by running statistics": lambda: Around(Normalised()).eval(),
}
CAST = ("attention", "a recurrent layer", "torch's own layer")


def model(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().double()


def batches(places: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 7, (2, 6, 4), generator=generator)
    return [(x[i : i + 2], y[i : i + 2].flatten()) for i in places]


def values(o: Objective) -> dict[str, Tensor]:
    X = torch.randn(o.num_params, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S, products = in_parts(X, o.sharding, 0), (HessianOperator(o), GGNOperator(o))
    found = {"loss": o.loss(), "gradient": o.gradient(), **{type(A).__name__: A @ S for A in products}}
    return {name: whole(value) for name, value in found.items()}


def sharded(name: str, rank: int, budget: int | None, policy: Any = None) -> Objective:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    found = model(name)
    cast: dict[str, Any] = (
        {} if policy is None else {"mp_policy": MixedPrecisionPolicy(policy, output_dtype=torch.float64)}
    )
    units = dict(found.named_children())
    for unit in units.get("blocks", [units.get("layer", units.get("up"))]):
        if policy is None:
            fully_shard(unit)
    data: Any = batches([0] if rank == 0 else [2, 4])
    return Objective(fully_shard(found, **cast), nn.CrossEntropyLoss(), data, memory_budget=budget)


def narrow(network: nn.Module, batch: Any) -> Any:
    single = {name: p.float() for name, p in network.named_parameters()}
    return torch.func.functional_call(network, single, (batch[0],)).double(), batch[1]


def runs_a_product(_: int) -> dict[str, int]:
    """Return how often modules run in a product with a batch: in the first pass, and again."""
    from torch.distributed.fsdp import fully_shard

    found, run = {}, Call.run

    def counting(call: Call, *args: Any) -> Any:
        counted[0] += 1
        return run(call, *args)

    for name, layers in {
        "linear": [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3, bias=False)],
        "others": [nn.LayerNorm(6), nn.Tanh(), nn.Bilinear(6, 6, 3)],
    }.items():
        torch.manual_seed(0)
        network: Any = nn.Sequential(*layers[:2], Twice(layers[2]) if name == "others" else layers[2]).double()
        data = (torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3)
        o = Objective(fully_shard(network), nn.CrossEntropyLoss(), data, memory_budget=0)
        H, v, counted = HessianOperator(o), o.gradient(), [0]
        Call.run = counting  # type: ignore[method-assign] # for a while
        try:
            H @ v
        finally:
            Call.run = run  # type: ignore[method-assign] # as it was
        found[name] = counted[0]
    return found


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x)


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        found: dict[Any, Any] = {"runs": runs_a_product(rank)}
        for name in MODELS:
            for budget in (None, 0):
                found[name, budget] = values(sharded(name, rank, budget))
        for name in CAST:
            for budget in (None, 0):
                o = sharded(name, rank, budget, torch.float32)
                found[f"{name}, cast", budget] = {"gradient": whole(o.gradient())}
        torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("layers")
    in_two_processes(work, str(folder))
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_ranks_equal_one_process(ranks: list[dict[Any, Any]], name: str) -> None:
    alone = values(Objective(model(name), nn.CrossEntropyLoss(), batches([0, 2, 4])))
    for rank in ranks:
        for budget in (None, 0):
            for what, value in rank[name, budget].items():
                assert_close(value, alone[what], BATCHING_TOLERANCE)


def test_linear_layers_run_once_a_product(ranks: list[dict[Any, Any]]) -> None:
    assert [rank["runs"] for rank in ranks] == [{"linear": 2, "others": 2 * 4}] * 2


@pytest.mark.parametrize("name", CAST)
def test_models_cast_to_a_narrower_dtype_are_those_of_one_process(ranks: list[dict[Any, Any]], name: str) -> None:
    """Their own loss is compared in the precision that they compute in."""
    alone = Objective(model(name), nn.CrossEntropyLoss(), batches([0, 2, 4]), forward=narrow).gradient()
    for rank in ranks:
        for budget in (None, 0):
            assert_close(rank[f"{name}, cast", budget]["gradient"], alone, 1e-5)
