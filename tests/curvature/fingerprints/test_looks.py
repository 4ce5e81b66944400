"""What a look at the present point takes in: contents of tensors, and Python state behind the same objects."""

from __future__ import annotations

import importlib
import types
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import Objective
from curvature.fingerprints.contents import Contents
from curvature.fingerprints.digest import digest
from curvature.fingerprints.python_state import PythonState


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Sharp(Scaled):
    power = 2


BETA = {"kl": 1.0}
IN_METHOD, IN_STATIC, IN_CLASS, IN_PROPERTY = [1.0], [1.0], [1.0], [1.0]
NAMESPACE = types.ModuleType("namespace_of_ones_own")
NAMESPACE.scale = 1.0  # type: ignore[attr-defined]


class Constants:
    scale = 1.0


class Helped(Scaled):
    """Whose helpers read globals; forward names none of them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.fixed() * self.shared() * self.level

    def block(self, x: Tensor) -> Tensor:
        return self.net(x).square() * IN_METHOD[0]

    @staticmethod
    def fixed() -> float:
        return IN_STATIC[0]

    @classmethod
    def shared(cls) -> float:
        return IN_CLASS[0]

    @property
    def level(self) -> float:
        return IN_PROPERTY[0]


def stealthy_changes() -> dict[str, tuple[nn.Module, Any, Callable[[], object]]]:
    """What leaves the objects that a look meets first the same."""
    model: Any = Scaled()
    model.slotted, model.levels, model.names = Slotted(), [[1.0], {2.0}], deque([3.0])
    model.power, model.table, model.square = partial(pow, exp=2), torch.ones(3), nn.Parameter(torch.randn(4, 4))

    def keyed(z: Tensor, t: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * F.cross_entropy(z, t)

    def counted(z: Tensor, t: Tensor) -> Tensor:
        return factor * F.cross_entropy(z, t)

    factor = 1.0

    def recount() -> None:
        nonlocal factor
        factor = 2.0

    def transposed() -> None:
        model.square.data = model.square.data.T

    model.many, model.mixed = list(range(1000)), {i: [i] for i in range(1000)}
    model.words = {str(i): i for i in range(1000)}

    def spaced(z: Tensor, t: Tensor) -> Tensor:
        return NAMESPACE.scale * Constants.scale * F.cross_entropy(z, t)

    def twice(kept: list[float]) -> Callable[[], object]:
        return lambda: kept.__setitem__(0, 2 * kept[0])

    plain = F.cross_entropy
    return {
        "slot": (model, plain, lambda: setattr(model.slotted, "scale", 2.0)),
        "list in a list": (model, plain, lambda: model.levels[0].append(1.0)),
        "set in a list": (model, plain, lambda: model.levels[1].add(1.0)),
        "deque": (model, plain, lambda: model.names.append(1.0)),
        "tensor": (model, plain, lambda: model.table.numpy().fill(3.0)),
        "partial": (model, plain, lambda: model.power.keywords.update(exp=3)),
        "class": (model, plain, lambda: setattr(model, "__class__", Sharp)),
        "namespace": (model, plain, lambda: setattr(model, "__dict__", {**model.__dict__, "power": 3})),
        "namespace of an object": (model, plain, lambda: setattr(model.slotted, "scale", Slotted())),
        "attribute of a class": (Sharp(), plain, lambda: setattr(Sharp, "power", Sharp.power + 1)),
        "hook": (model, plain, lambda: model.register_forward_pre_hook(lambda *_: None)),
        "keyword": (model, keyed, lambda: setattr(keyed, "__kwdefaults__", {"scale": 2.0})),
        "cell": (model, counted, recount),
        "strides": (model, plain, transposed),
        "global of a method": (Helped(), plain, twice(IN_METHOD)),
        "global of a static method": (Helped(), plain, twice(IN_STATIC)),
        "global of a method of the class": (Helped(), plain, twice(IN_CLASS)),
        "global of a property": (Helped(), plain, twice(IN_PROPERTY)),
        "attribute of a Python module": (model, spaced, lambda: setattr(NAMESPACE, "scale", NAMESPACE.scale + 1)),
        "attribute of a class that is named": (model, spaced, lambda: setattr(Constants, "scale", Constants.scale + 1)),
        "number in a large list": (model, plain, lambda: model.many.__setitem__(501, -1)),
        "number in a large dict": (model, plain, lambda: model.words.update({"501": -1})),
        "large dict of lists": (model, plain, lambda: [kept.append(-1) for kept in model.mixed.values()]),
        "global": (model, lambda z, t: BETA["kl"] * F.cross_entropy(z, t), lambda: BETA.update(kl=BETA["kl"] + 1)),
    }


@pytest.mark.parametrize("name", stealthy_changes())
def test_a_short_look_sees_what_a_long_one_does(name: str) -> None:
    model, loss, change = stealthy_changes()[name]
    objective = Objective(model, loss, (torch.randn(5, 4), torch.randint(3, (5,))))
    freshness = objective.freshness
    before = freshness.look()
    assert freshness.look() is before
    change()
    after = freshness.look()
    assert after is not before
    assert freshness._changes(before, after)


def test_installed_packages_are_not_walked_and_others_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install --target` into the folder of one's own code leaves that code own; vendored code is read in part."""
    many = "\n".join(f"def f{i}():\n    return F{i}[0], f{i + 1}()\nF{i} = [0]" for i in range(3000))
    layer = "\nfrom torch import nn\nclass Layer(nn.Linear):\n    scale = [1.0]\n    def forward(self, x):\n"
    layer += "        return super().forward(x) * self.halved()\n"
    layer += "    def halved(self):\n        return LEVEL[0]\nLEVEL = [1.0]\n"
    layer += "".join(f"    \nLayer.g{i} = f{i}\n" for i in range(0, 3000, 2))
    for name, text in {"prec_installed": layer, "prec_own": layer}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "layers.py").write_text(many + text)
    (tmp_path / "prec_installed-1.0.dist-info").mkdir()
    (tmp_path / "prec_installed-1.0.dist-info" / "RECORD").write_text("prec_installed/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sizes = {}
    for name in ("prec_installed", "prec_own"):
        module = importlib.import_module(f"{name}.layers")
        own_layer = module.Layer(2, 2)
        before = PythonState(own_layer, {}, set())
        sizes[name] = len(before.entries)
        module.LEVEL[0] = 2.0
        seen = before.changes(PythonState(own_layer, {}, set()))
        assert bool(seen) == (name == "prec_own")
    assert sizes["prec_installed"] < 100 < sizes["prec_own"] < 6000  # of 12 000


@pytest.mark.parametrize("large", [list(range(2**20)), {i: object() for i in range(2**12)}], ids=["list", "dict"])
def test_looks_at_large_containers_are_short(large: Any) -> None:
    model: Any = Scaled()
    model.large = large
    state = PythonState(model, {}, set())
    assert len(state.entries) < 600
    assert not state.changes(PythonState(model, {}, set()))


# -- digests ----------------------------------------------------------------------------------------------------------


def test_digests_see_what_sums_and_parities_miss() -> None:
    x = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    nan = x.clone()
    nan[5] = torch.nan
    swapped, signs, late = x.clone(), x.clone(), nan.clone()
    swapped[[3, 7000]] = x[[7000, 3]]
    signs[:2] *= -1
    late[6] += 1e-6
    found = [digest([t]) for t in (x, nan, swapped, signs, late, x.double(), x[:-1])]
    assert len(set(found)) == len(found)
    assert digest([nan]) == digest([nan.clone()])


@pytest.mark.parametrize("joined", [2**25, 2**13])
def test_digests_of_tensors_that_are_joined_as_on_a_gpu(joined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvature.fingerprints.digest.is_gpu", lambda _: True)
    monkeypatch.setattr("curvature.fingerprints.digest._JOINED", joined)
    sizes = (10, 5000, 20000, 9000)
    tensors = [torch.randn(n) for n in sizes] + [torch.randn(n).bfloat16() for n in sizes]

    def swapped(words: Tensor) -> None:
        words[[0, 9]] = words[[9, 0]]

    found = digest(tensors)
    assert digest([t.clone() for t in tensors]) == found
    for i, t in enumerate(tensors):
        for change in (swapped, lambda words: words[2].bitwise_xor_(1)):
            others = [t.clone() for t in tensors]
            change(others[i].view(torch.int32 if t.dtype == torch.float32 else torch.int16))
            assert digest(others) != found


@pytest.mark.parametrize("most", [None, 640])
@pytest.mark.parametrize("room", [0, 3000, 2**20])  # digests; both; copies
def test_contents_stand_until_they_change(most: int | None, room: int) -> None:
    def replaced(p: Tensor) -> None:
        p.data = p.data.clone()
        p.data[0] += 1e-6

    def widened(p: Tensor) -> None:
        p.data = p.data.double()

    def turned(p: Tensor) -> None:
        p.data = p.data.view(100, 200).T.contiguous().view(200, 100)

    def transposed(p: Tensor) -> None:
        p.data = p.data.view(100, 200).T  # the same memory

    changes = [replaced, turned, lambda p: p.data.neg_(), lambda p: p.data.numpy().sort(axis=0), widened, transposed]
    parameters = [nn.Parameter(torch.randn(200, 100)), nn.Parameter(torch.randn(7))]
    integers = torch.arange(5, dtype=torch.int16)
    seen = [Contents([*parameters, integers], most, room=room)]
    for change in (*changes, lambda _: integers.numpy().fill(3)):
        assert seen[-1].stand()
        change(parameters[0])
        assert not seen[-1].stand()
        seen.append(Contents([*parameters, integers], most, room=room))
        assert seen[-1].found == Contents([*parameters, integers.clone()], most, room=room).found
    assert all(a.found != b.found for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(
    "t",
    [
        torch.empty(0),
        torch.tensor(True),
        torch.eye(3).to_sparse(),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(5, 7).T,
        torch.zeros(3).expand(4, 3),
        torch.randn(9).bfloat16(),
        torch.arange(10001),
        torch.randn(32, 4)[:, 0],
        torch.randn(32, 4)[:, 1:2],
        torch.randn(32)[::2],
    ],
    ids=[
        "empty",
        "bool",
        "sparse",
        "conjugated",
        "transposed",
        "expanded",
        "bfloat16",
        "long",
        "column",
        "(n, 1)",
        "2nd",
    ],
)
def test_digests_take_tensors_of_all_kinds(t: Tensor) -> None:
    assert digest([t]) == digest([t.clone()])
    if t.numel() and t.layout == torch.strided:
        assert digest([t]) != digest([t.clone().logical_not() if t.dtype == torch.bool else t.clone() + 1])


def test_columns_of_a_table_are_read_and_not_what_lies_between() -> None:
    table = torch.randn(20_000, 4)
    for column in (table[:, 2], table[:, 2:3]):
        for most in (None, 640):
            assert digest([column], most=most) == digest([column.contiguous()], most=most)
    x, y = table[:64, :3], table[:64, 3:]
    loss = Objective(nn.Linear(3, 1), nn.MSELoss(), (x, y)).loss()
    assert loss > 0
