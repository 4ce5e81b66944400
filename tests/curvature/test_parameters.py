"""Names, order, selections and the flat vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import ParameterSpace
from curvature.errors import InputError, ParameterSelectionError
from tests.cases import BY_NAME


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv1d(1, 2, 2)
        self.conv2 = nn.Conv1d(2, 2, 2, bias=False)
        self.head = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


NAMES = (
    *("scale", "conv1.weight", "conv1.bias", "conv2.weight"),
    *("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"),
)
STARTS = dict(zip(NAMES, (0, 1, 5, 7, 15, 21, 24, 27), strict=True))


def test_flat_vector_follows_named_parameters() -> None:
    net = Net()
    space = ParameterSpace.from_model(net)
    assert space.names == NAMES
    assert space.num_params == 28
    flat = torch.arange(28.0)
    parts = space.to_dict(flat)
    assert {name: int(part.reshape(-1)[0]) for name, part in parts.items()} == STARTS
    assert torch.equal(parts["conv2.weight"], torch.arange(7.0, 15.0).view(2, 2, 2))
    assert torch.equal(space.to_flat(parts), flat)
    assert torch.equal(space.current(), torch.cat([p.detach().reshape(-1) for p in net.parameters()]))


def test_current_is_a_copy() -> None:
    net = Net()
    space = ParameterSpace.from_model(net)
    space.current().zero_()
    assert net.scale.item() == 1


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (lambda _: "conv*.weight", NAMES[1:4:2]),
        (lambda _: "conv1", NAMES[1:3]),
        (lambda _: "head", NAMES[4:]),
        (lambda _: ["head.2", "scale"], (NAMES[0], *NAMES[6:])),
        (lambda _: "(root)", NAMES[:1]),
        (lambda net: net.conv2, NAMES[3:4]),
        (lambda net: [net.conv2, net.head[0]], NAMES[3:6]),
        (lambda net: [net.conv2, "*.bias"], (NAMES[2], NAMES[3], NAMES[5], NAMES[7])),
        (lambda _: lambda name, tensor: tensor.ndim == 3 and "conv" in name, NAMES[1:4:2]),
        (lambda net: {"mine": net.conv2.weight}, ("mine",)),
    ],
)
def test_selection(select: Callable[[Net], Any], expected: tuple[str, ...]) -> None:
    net = Net()
    assert ParameterSpace.from_model(net, select(net)).names == expected


def test_blocks_are_modules_in_flat_order() -> None:
    space = ParameterSpace.from_model(Net())
    assert [(b.name, b.num_params) for b in space.blocks] == [
        *(("(root)", 1), ("conv1", 6), ("conv2", 8), ("head.0", 9), ("head.2", 4))
    ]
    covered = torch.cat([b.take(torch.arange(28)) for b in space.blocks])
    assert torch.equal(covered, torch.arange(28))


def test_block_takes_and_embeds() -> None:
    space = ParameterSpace.from_model(Net())
    block = space.block(["scale", "conv1.bias", "conv2"])
    places = [0, *range(5, 15)]
    assert block.slices == (slice(0, 1), slice(5, 15))
    flat = torch.randn(28, 2)
    assert torch.equal(block.take(flat), flat[places])
    embedded = block.embed(flat[places], 28)
    assert torch.equal(embedded[places], flat[places])
    assert int(embedded.count_nonzero()) == 2 * len(places)


def test_tied_weights_count_once_under_either_name() -> None:
    model = BY_NAME["tied weights"].model()
    space = ParameterSpace.from_model(model)
    assert "embedding.weight" in space.names
    assert "head.weight" not in space.names
    assert space.aliases == {"head.weight": "embedding.weight"}
    for selection in ("head.weight", "embedding.weight", "head"):
        assert ParameterSpace.from_model(model, selection).names == ("embedding.weight",)


def test_parametrised_tensors_belong_to_their_module() -> None:
    space = ParameterSpace.from_model(BY_NAME["weight norm"].model())
    assert [b.name for b in space.blocks] == ["0", "2"]
    assert space.num_params == sum(b.num_params for b in space.blocks)


def test_frozen_parameters_are_left_out_unless_selected() -> None:
    net = Net()
    net.conv1.requires_grad_(False)
    assert not any(name.startswith("conv1") for name in ParameterSpace.from_model(net).names)
    assert ParameterSpace.from_model(net, "conv1").names == NAMES[1:3]
    assert not net.conv1.weight.requires_grad


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_vectors_are_float32_or_wider(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert ParameterSpace.from_model(Net().to(dtype)).dtype == expected


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("conv3.weight", r"'conv3.weight' \(near: .*'conv\d.weight'"),
        ("haed.0", r"'haed.0' \(near: .*'head.0'"),
        (["scale", "nothing_like_it"], "no parameter matches 'nothing_like_it'"),
        ([], "globs, modules, parameters, a predicate"),
        (7, "globs, modules, parameters, a predicate"),
        ([7], "a selection holds globs, modules and parameters, got int"),
        (lambda _name, _tensor: False, "predicate selects none of the 8"),
        (nn.Linear(1, 1), "Linear .* not part of the model"),
    ],
)
def test_bad_selection(selection: Any, message: str) -> None:
    with pytest.raises(ParameterSelectionError, match=message):
        ParameterSpace.from_model(Net(), selection)


def test_module_without_parameters_cannot_be_selected() -> None:
    net = Net()
    with pytest.raises(ParameterSelectionError, match="Tanh holds none"):
        ParameterSpace.from_model(net, net.head[1])


def test_bad_vectors_and_dicts() -> None:
    space = ParameterSpace.from_model(Net())
    with pytest.raises(InputError, match=r"shape \(28,\), got \(27,\)"):
        space.to_dict(torch.zeros(27))
    named = space.to_dict(torch.zeros(28))
    with pytest.raises(InputError, match="'scale' is missing"):
        space.to_flat({name: t for name, t in named.items() if name != "scale"})
    with pytest.raises(InputError, match="'zzz' is unknown"):
        space.to_flat({**named, "zzz": torch.zeros(1)})
    with pytest.raises(InputError, match=r"'scale' has shape \(1,\), got \(2,\)"):
        space.to_flat({**named, "scale": torch.zeros(2)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.ones(2, requires_grad=True) * 2}, "non-leaf"),
        ({"w": torch.ones(2, dtype=torch.int64)}, "int64"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"w": torch.ones(2), "v": torch.ones(2, device="meta")}, "one device"),
    ],
)
def test_tensors_that_are_no_parameters(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParameterSpace(tensors)


def test_model_without_parameters() -> None:
    with pytest.raises(ParameterSelectionError, match="none that require a gradient"):
        ParameterSpace.from_model(Net().requires_grad_(False))
