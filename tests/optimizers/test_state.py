"""A run goes on bit for bit from whatever it was saved, copied or pickled to; scalers see what they must."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.errors import CheckFailedError, InputError
from optimizers import AdaHessian
from tests.optimizers.problems import Problem, mlp, train

SAME = {"rtol": 0, "atol": 0}
SETTINGS: dict[str, Any] = {"lr": 0.05, "update_every": 3, "weight_decay": 0.01, "num_probes": 2, "seed": 5}


def through_file(optimizer: AdaHessian, fresh: AdaHessian) -> AdaHessian:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def through_memory(optimizer: AdaHessian, fresh: AdaHessian) -> AdaHessian:
    fresh.load_state_dict(optimizer.state_dict())
    return fresh


def through_checkpoint(optimizer: AdaHessian, fresh: AdaHessian, model: nn.Module, twin: nn.Module) -> AdaHessian:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    set_optimizer_state_dict(twin, fresh, get_optimizer_state_dict(model, optimizer))
    return fresh


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "stale": "repeat"}, {**SETTINGS, "capturable": True}])
@pytest.mark.parametrize("way", [through_file, through_memory, through_checkpoint])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resumed_run_repeats_bit_for_bit(way: Callable[..., AdaHessian], settings: dict[str, Any], dtype: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(12, 3, dtype=dtype), torch.randint(0, 3, (12,))

    def loss_of(m: nn.Module) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(m(x).float(), y)

    optimizer = AdaHessian(model.parameters(), **settings)
    train(optimizer, loss_of(model), 4)
    torch.randn(3)  # the global stream plays no part
    twin = copy.deepcopy(model)
    fresh = AdaHessian(twin.parameters(), lr=9.0)
    extra = (model, twin) if way is through_checkpoint else ()
    resumed = way(optimizer, fresh, *extra)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert resumed.state[q][key].dtype == value.dtype
            torch.testing.assert_close(resumed.state[q][key], value, **SAME)
    resumed.curvature = optimizer.curvature  # an argument, as the learning rate of the first construction
    train(optimizer, loss_of(model), 5)
    train(resumed, loss_of(twin), 5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **SAME)


def test_what_is_loaded_is_not_shared() -> None:
    problem, twin = mlp(), mlp()
    optimizer = AdaHessian(problem.params)
    train(optimizer, problem.closure, 2)
    saved = optimizer.state_dict()
    fork = AdaHessian(twin.params)
    fork.load_state_dict(saved)
    before = saved["state"][0]["exp_avg"].clone()
    train(fork, twin.closure, 2)
    torch.testing.assert_close(optimizer.state[problem.params[0]]["exp_avg"], before, **SAME)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole(how: str) -> None:
    torch.manual_seed(0)
    problem = mlp()
    optimizer = AdaHessian(
        problem.params, lr=0.05, curvature="gauss-newton-bartlett", num_probes=3, loss=F.cross_entropy, update_every=2
    )
    train(optimizer, problem.pair, 3)
    whole = (problem.model, optimizer)
    model, twin = copy.deepcopy(whole) if how == "deepcopy" else pickle.loads(pickle.dumps(whole))
    assert (twin.curvature, twin.loss, twin.check_finite) == (optimizer.curvature, optimizer.loss, True)
    other = Problem(model, problem.x, problem.y)
    assert train(optimizer, problem.pair, 4) == train(twin, other.pair, 4)
    torch.testing.assert_close(problem.flat(), other.flat(), **SAME)


def test_states_of_older_versions_are_completed() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params)
    train(optimizer, problem.closure, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("foreach", "maximize", "capturable", "seed", "update_every"):
        del saved["param_groups"][0][key]
    for state in saved["state"].values():
        state["step"] = float(state["step"])
        state["hessian_step"] = float(state["hessian_step"])
    fresh = AdaHessian(problem.params)
    fresh.load_state_dict(saved)
    train(fresh, problem.closure, 2)
    assert float(fresh.state[problem.params[0]]["step"]) == 4


def test_hooks_fire_once_and_in_order() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    optimizer.step(problem.closure)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saving", "loaded"]


def test_a_forgotten_accumulation_is_dropped_by_zero_grad() -> None:
    problem, twin = mlp(), mlp()
    ours, theirs = AdaHessian(problem.params, lr=0.05), AdaHessian(twin.params, lr=0.05)
    ours.accumulate(problem.part(slice(0, 3)))
    ours.zero_grad()
    ours.accumulate(problem.closure)
    ours.step()
    theirs.step(twin.closure)
    torch.testing.assert_close(problem.flat(), twin.flat(), **SAME)


def test_compiled_steps_run() -> None:
    problem, twin = mlp(), mlp()
    ours, theirs = AdaHessian(problem.params, lr=0.05), AdaHessian(twin.params, lr=0.05)
    compiled = torch.compile(ours.step, backend="eager")
    for _ in range(2):
        compiled(problem.closure)
        theirs.step(twin.closure)
    torch.testing.assert_close(problem.flat(), twin.flat(), rtol=1e-5, atol=1e-6)  # counters are traced as float32


def test_compiled_models_run_eagerly_when_curvature_is_due() -> None:
    problem, twin = mlp(), mlp()
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        calls.append(len(graph.graph.nodes))
        return graph.forward

    fast = torch.compile(problem.model, backend=backend)
    ours, theirs = AdaHessian(problem.params, lr=0.05, update_every=3), AdaHessian(twin.params, lr=0.05, update_every=3)
    ours.step(lambda: F.cross_entropy(fast(problem.x), problem.y))
    assert calls == []
    ours.step(lambda: F.cross_entropy(fast(problem.x), problem.y))
    assert len(calls) == 1
    train(theirs, twin.closure, 2)
    torch.testing.assert_close(problem.flat(), twin.flat(), rtol=1e-9, atol=1e-12)


def test_compiled_graphs_have_no_second_derivative() -> None:
    """The loss of a compiled model, handed over in place of a closure, is refused; steps without curvature take it."""
    problem = mlp()
    fast = torch.compile(problem.model, backend="aot_eager")
    optimizer = AdaHessian(problem.params, lr=0.05, update_every=2)
    with pytest.raises(CheckFailedError, match="compiled model has no second derivative: hand step"):
        optimizer.accumulate(F.cross_entropy(fast(problem.x), problem.y))
    optimizer.zero_grad()
    optimizer.step(lambda: F.cross_entropy(fast(problem.x), problem.y))
    optimizer.zero_grad()
    optimizer.accumulate(F.cross_entropy(fast(problem.x), problem.y))
    optimizer.step()
    assert float(optimizer.state[problem.params[0]]["hessian_step"]) == 1


# -- gradient scaling -------------------------------------------------------------------------------------------------


def with_accumulate(problem: Problem, optimizer: AdaHessian, scaler: torch.amp.GradScaler) -> None:
    optimizer.accumulate(problem.closure, scaler=scaler)


def with_clipping(problem: Problem, optimizer: AdaHessian, scaler: torch.amp.GradScaler) -> None:
    optimizer.accumulate(problem.closure, scaler=scaler)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(problem.params, 1e3)


def with_classic(problem: Problem, optimizer: AdaHessian, scaler: torch.amp.GradScaler) -> None:
    scaler.scale(problem.closure()).backward(create_graph=optimizer.curvature_due)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("form", [with_accumulate, with_clipping, with_classic])
@pytest.mark.parametrize("every", [1, 2])
def test_scaled_steps_are_those_without_scaler(form: Callable[..., None], every: int) -> None:
    problem, twin = mlp(), mlp()
    ours, theirs = (AdaHessian(p.params, lr=0.05, update_every=every) for p in (problem, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for _ in range(4):
        ours.zero_grad()
        form(problem, ours, scaler)
        scaler.step(ours)
        scaler.update()
        theirs.step(twin.closure)
        torch.testing.assert_close(problem.flat(), twin.flat(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("overflow", ["gradient", "curvature"])
def test_overflow_skips_the_step_and_lowers_the_scale(overflow: str) -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = AdaHessian([w], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    size = 1e38 if overflow == "gradient" else 1e32
    power = 2 if overflow == "gradient" else 300

    def closure() -> Tensor:  # second derivatives are 300 times the first: only they overflow
        return size * (w**power).sum() if overflow == "gradient" else size * ((w**power).sum() / power)

    optimizer.accumulate(closure, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    torch.testing.assert_close(w.detach(), torch.ones(2), **SAME)
    assert optimizer.param_groups[0]["num_steps"] == 0
    optimizer.zero_grad()
    optimizer.accumulate(lambda: (w**2).sum(), scaler=scaler)
    scaler.step(optimizer)
    assert float(w.detach()[0]) == pytest.approx(0.9, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_unscaled_classic_gradients_are_refused() -> None:
    problem = mlp()
    optimizer, scaler = AdaHessian(problem.params), torch.amp.GradScaler("cpu")
    scaler.scale(problem.closure()).backward(create_graph=True)
    scaler.unscale_(optimizer)
    with pytest.raises(CheckFailedError, match=r"optimizer.accumulate\(loss, scaler=scaler\)"):
        scaler.step(optimizer)


def test_a_scaler_cannot_step_with_a_closure() -> None:
    problem = mlp()
    optimizer, scaler = AdaHessian(problem.params), torch.amp.GradScaler("cpu")
    optimizer.accumulate(problem.closure, scaler=scaler)
    with pytest.raises(InputError, match=r"accumulate\(closure, scaler=scaler\)"):
        scaler.step(optimizer, problem.closure)
