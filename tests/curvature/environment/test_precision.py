"""TF32 is off where curvature is computed, and what PyTorch was told about it is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn

from curvature import GGNOperator, HessianOperator, Objective
from curvature.engine import linearize
from curvature.environment.precision import tf32_in_use, tf32_off
from tests.cases import BY_NAME

CASE = BY_NAME["MLP GELU"]


def in_use() -> bool:
    return tf32_in_use(torch.device("cuda"))


def on_cpus() -> bool:
    return tf32_in_use(torch.device("cpu"))


def _read(setting: Callable[[], Any]) -> Any:
    try:
        return setting()
    except RuntimeError:
        return "raises"


def settings() -> dict[str, Any]:
    """All that the two interfaces say, their refusals included."""
    return {
        "matmul.allow_tf32": _read(lambda: cuda.matmul.allow_tf32),
        "cudnn.allow_tf32": _read(lambda: cudnn.allow_tf32),
        "matmul precision": _read(torch.get_float32_matmul_precision),
        "fp32_precision": torch.backends.fp32_precision,  # type: ignore[attr-defined]
        "matmul": cuda.matmul.fp32_precision,
        "cudnn": cudnn.fp32_precision,
        "conv": cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "rnn": cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        "on CPUs": torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        "conv on CPUs": torch.backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "cudnn.enabled": cudnn.enabled,
        "cudnn.benchmark": cudnn.benchmark,
    }


def defaults() -> None:
    torch.backends.fp32_precision = cuda.matmul.fp32_precision = cudnn.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "none"  # type: ignore[attr-defined]
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
    cudnn.allow_tf32 = True


DEFAULTS = settings()


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    defaults()
    assert settings() == DEFAULTS


def flags() -> None:
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = True


def off() -> None:
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = False


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def everywhere() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


def by_operation() -> None:
    cuda.matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]


def by_backend() -> None:
    cudnn.fp32_precision = "tf32"
    cuda.matmul.fp32_precision = "ieee"


def cpus() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "bf16"  # type: ignore[attr-defined]


WAYS = [lambda: None, flags, off, medium, everywhere, by_operation, by_backend, cpus]


@pytest.mark.parametrize("way", WAYS)
def test_settings_of_either_interface_are_put_back(way: Callable[[], None]) -> None:
    way()
    before = settings()
    with tf32_off():
        inside = settings()
        assert not in_use()
        assert not on_cpus()
        with tf32_off():
            assert settings() == inside
        assert settings() == inside
    assert settings() == before
    with pytest.raises(ZeroDivisionError), tf32_off():
        raise ZeroDivisionError
    assert settings() == before
    if before["matmul.allow_tf32"] != "raises":  # who used flags only finds flags that answer
        assert inside["matmul.allow_tf32"] is False


def test_a_setting_for_all_backends_still_reaches_those_that_followed_it() -> None:
    everywhere()
    with tf32_off():
        pass
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert not in_use()


class Noting(torch.autograd.Function):
    """The identity, whose backward notes whether TF32 is in use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[bool]) -> Tensor:
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        ctx.seen.append(in_use())
        return g.clone(), None


class Watching(nn.Module):
    """Notes in forward and in backward whether TF32 is in use."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.inside = CASE.model()
        self.fails = fails
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(in_use())
        if self.fails:
            raise ZeroDivisionError
        outputs: Tensor = Noting.apply(self.inside(x), self.seen)
        return outputs


def watched(*, fails: bool = False, **arguments: Any) -> tuple[Watching, Objective]:
    model = Watching(fails)
    return model, Objective(model, CASE.loss, CASE.data(), **arguments)


@pytest.fixture
def cuda_faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvature.engine.evaluation.is_gpu", lambda _: True)
    monkeypatch.setattr("curvature.engine.evaluation.tf32_in_use", lambda _: in_use())


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("cuda_faked")
def test_products_are_made_without_tf32(way: Callable[[], None], keep_graphs: bool) -> None:
    way()
    before = settings()
    model, objective = watched(keep_graphs=keep_graphs)
    v = torch.ones(objective.num_params, dtype=objective.dtype)
    for product in (HessianOperator(objective), GGNOperator(objective)):
        for _ in range(2):
            product @ v
            assert settings() == before
    assert len(model.seen) >= 4
    assert not any(model.seen)


@pytest.mark.usefixtures("cuda_faked")
def test_backward_passes_on_kept_graphs_are_made_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    flags()
    _, objective = watched()
    objective.trust.revoke("a chain has no backward pass")
    H, v = HessianOperator(objective), torch.ones(objective.num_params, dtype=objective.dtype)
    expected = H @ v
    seen: list[bool] = []
    original = linearize._pull_back

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(in_use())
        return original(*args, **kwargs)

    monkeypatch.setattr(linearize, "_pull_back", spy)
    torch.testing.assert_close(H @ v, expected, rtol=0, atol=0)
    assert seen == [False]
    assert in_use()


@pytest.mark.usefixtures("cuda_faked")
def test_settings_are_put_back_after_an_error() -> None:
    flags()
    before = settings()
    model, objective = watched(fails=True)
    with pytest.raises(ZeroDivisionError):
        objective.gradient()
    assert model.seen  # once with lean layers, and once without, which are not to blame
    assert not any(model.seen)
    assert settings() == before


@pytest.mark.usefixtures("cuda_faked")
def test_tf32_stays_in_use_where_it_is_asked_for_and_restricted_objectives_know() -> None:
    flags()
    model, objective = watched(allow_tf32=True)
    objective.gradient()
    objective.restrict("inside.0").gradient()
    assert len(model.seen) >= 2
    assert all(model.seen)


def test_on_a_cpu_the_settings_of_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError

    monkeypatch.setattr("curvature.engine.evaluation.tf32_off", refuse)
    model, objective = watched()
    HessianOperator(objective) @ torch.ones(objective.num_params, dtype=objective.dtype)
    assert all(model.seen)  # convolutions, by PyTorch's default


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("way", [medium, cpus, everywhere])
def test_on_a_cpu_products_are_made_without_bfloat16(
    way: Callable[[], None], keep_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    way()
    assert on_cpus()
    before, seen = settings(), list[bool]()
    model, objective = watched(keep_graphs=keep_graphs)
    model.register_forward_pre_hook(lambda *_: seen.append(on_cpus()))
    original = linearize._pull_back

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(on_cpus())
        return original(*args, **kwargs)

    monkeypatch.setattr(linearize, "_pull_back", spy)
    for product in (HessianOperator(objective), GGNOperator(objective)):
        for _ in range(2):
            product @ torch.ones(objective.num_params, dtype=objective.dtype)
    assert len(seen) > 4
    assert not any(seen)
    assert settings() == before


@pytest.mark.usefixtures("cuda_faked")
def test_recurrent_models_leave_the_other_flags_of_cudnn_alone() -> None:
    by_operation()  # conv and rnn differ: torch.backends.cudnn.flags refuses to read that
    before = settings()
    case = BY_NAME["LSTM"]
    seen: list[tuple[bool, bool]] = []
    model = case.model()
    model.register_forward_pre_hook(lambda *_: seen.append((cudnn.enabled, in_use())))
    Objective(model, case.loss, case.data()).gradient()
    assert seen == [(False, False)]
    assert settings() == before
