"""Checkpoints load exactly in the forms that frameworks write, or are refused in a sentence; none runs code."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import random
import zipfile
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from analysis.cli import app
from analysis.critical.measure import CriticalPlan
from analysis.critical.study import STUDY as CRITICAL
from analysis.run.preparation import Request
from analysis.run.study import run_study
from analysis.tasks.checkpoint import load_checkpoint
from curvature.errors import CheckpointError


class Net(nn.Module):
    """Parameters, a buffer that is stored, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()


class Runs:
    """Would make a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("RAN", "w"))


def named(prefix: str, state: Any) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def values(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


NET = Net()
STATE = dict(NET.state_dict())
OTHER = {name: 2 * tensor for name, tensor in STATE.items()}

FORMS: list[
    tuple[str, Any, str | None, str | None]
] = [  # name, what is stored, key that is asked for, key in the record
    ("a module", NET, None, None),
    ("a module in DataParallel", nn.DataParallel(copy.deepcopy(NET)), None, "module"),
    ("a module under a key", {"model": NET, "epoch": 3}, None, "model"),
    ("net", {"net": STATE}, None, "net"),
    (
        "nested",
        {"trainer": {"models": [named("module.model._orig_mod.", STATE)]}},
        None,
        "trainer.models.0.module.model",
    ),
    (
        "Lightning",
        {"state_dict": named("model.", STATE), "hyper_parameters": argparse.Namespace(at=defaultdict(list, {1: [2]}))},
        None,
        "state_dict.model",
    ),
    ("Lightning with a criterion", {**named("model.", STATE), "criterion.weight": torch.ones(3)}, "model", "model"),
    ("an average", torch.optim.swa_utils.AveragedModel(NET).state_dict(), None, "module"),
    ("compiled inside", {name.replace("body.", "body._orig_mod."): t for name, t in STATE.items()}, None, None),
    (
        "with the optimizer",
        {"model": STATE, "optimizer": torch.optim.Adam(NET.parameters()).state_dict()},
        None,
        "model",
    ),
    ("beside other values", {**STATE, "epoch": 3}, None, None),
    ("an average by its key", {"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema", "state_dict_ema"),
    ("the same twice", {"state_dict": STATE, "model": STATE}, None, "state_dict"),
    ("the whole file", {**STATE, "ema": OTHER}, ".", None),
    ("a student", {**named("student.", STATE), **named("teacher.", OTHER)}, "student", "student"),
    ("double precision", {n: t.double() if t.is_floating_point() else t for n, t in STATE.items()}, None, None),
    ("sparse", {n: t.to_sparse() if t.ndim == 2 else t for n, t in STATE.items()}, None, None),
]


@pytest.mark.parametrize(("stored", "key", "told"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_forms_that_frameworks_write(stored: Any, key: str | None, told: str | None, tmp_path: Path) -> None:
    torch.save(stored, tmp_path / "c.pt")
    target = Net()
    found = load_checkpoint(tmp_path / "c.pt", target, key=key)
    assert found.record.get("key") == told
    for (name, ours), theirs in zip(target.state_dict().items(), STATE.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_model_with_a_prefix_of_its_own(prefix: str, tmp_path: Path) -> None:
    torch.save(named(prefix, STATE), tmp_path / "c.pt")
    target = Wrapped()
    load_checkpoint(tmp_path / "c.pt", target)
    for ours, theirs in zip(values(target), STATE.values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["embedding.weight", "module.head.weight"])
def test_tied_weights_may_be_stored_once(name: str, tmp_path: Path) -> None:
    torch.save({name: torch.arange(12.0).reshape(4, 3)}, tmp_path / "c.pt")
    target = Tied()
    load_checkpoint(tmp_path / "c.pt", target)
    assert torch.equal(target.head.weight, torch.arange(12.0).reshape(4, 3))


def test_hugging_face_folders(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    save_file(STATE, tmp_path / "whole" / "model.safetensors")
    names = list(STATE)
    torch.save({name: STATE[name] for name in names[:3]}, tmp_path / "parts" / "1.bin")
    torch.save({name: STATE[name] for name in names[3:]}, tmp_path / "parts" / "2.bin")
    index = tmp_path / "parts" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{1 + (i >= 3)}.bin" for i, name in enumerate(names)}}))
    digests = set()
    for path in (tmp_path / "whole", tmp_path / "whole" / "model.safetensors", tmp_path / "parts", index):
        target = Net()
        digests.add(load_checkpoint(path, target).record["sha256"])
        assert all(torch.equal(a, b) for a, b in zip(values(target), STATE.values(), strict=True))
    assert len(digests) == 2
    (tmp_path / "parts" / "2.bin").unlink()
    with pytest.raises(CheckpointError, match=r"names 2.bin, which is not beside it"):
        load_checkpoint(tmp_path / "parts", Net())
    index.write_text('{"weight_map": {"a": "../c.bin"}}')
    with pytest.raises(CheckpointError, match="which is not beside it"):
        load_checkpoint(tmp_path / "parts", Net())


def changed(**odd: Any) -> dict[str, Any]:
    return {**STATE, **{name.replace("_", "."): value for name, value in odd.items()}}


HEAD = STATE["head.weight"]
REFUSED: list[tuple[Any, str | None, str]] = [
    (
        {"state_dict": STATE, "state_dict_ema": OTHER},
        None,
        "several .* state_dict, state_dict_ema; choose one with --ch",
    ),
    ({"state_dict": STATE}, "stat_dict", "no state dict under the key 'stat_dict'; give one of state_dict"),
    (
        {**named("model.", STATE), "loss.weight": HEAD},
        None,
        "as a part, model, beside loss.weight; choose it with --ch.* model",
    ),
    ({**named("a.", STATE), **named("b.", OTHER)}, None, "as a part, a, b, beside"),
    (
        {name.replace("head.w", "haed.w"): t for name, t in STATE.items()},
        None,
        r"lacks head.weight .*\(is haed.weight its",
    ),
    ({"state": {}, "param_groups": []}, None, "the state of an optimizer"),
    (changed(head_weight=HEAD * (1 + 2j)), None, "head.weight in torch.complex64, .* complex instead of real"),
    (changed(head_weight=HEAD.long()), None, "head.weight in torch.int64, .* integer instead of real"),
    (changed(head_weight=HEAD.bool()), None, "integer instead of real"),
    (changed(head_weight=HEAD * float("nan")), None, "head.weight with values that are not finite"),
    (changed(head_weight=HEAD.double() * 1e300), None, "head.weight with values too large for torch.float32; build"),
    (changed(head_weight=HEAD.to("meta")), None, r"head.weight without values \(device meta\)"),
    (changed(head_weight=HEAD[0]), None, r"head.weight of shape \(3,\) instead of \(2, 3\)"),
    ({**STATE, 5: torch.zeros(1)}, None, "it adds 5"),
    ({0: torch.zeros(2)}, None, "holds 0 but no state dict"),
    ({b"x": torch.zeros(2)}, None, "but no state dict"),
    ({"module." * 3000: torch.zeros(2)}, None, "does not fit the model"),
    ({**STATE, "a\nb\x1b[31m": torch.zeros(2)}, None, r"adds a\\nb\\x1b\[31m"),
    (torch.zeros(3), None, "holds a Tensor, not a state dict"),
    ({"metadata": Runs()}, None, "holds metadata but no state dict"),
]


@pytest.mark.parametrize(("stored", "key", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_in_a_sentence(
    stored: Any, key: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(stored, "c.pt")
    target = Net()
    before = values(target)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint("c.pt", target, key=key)
    assert str(caught.value).isprintable()
    assert all(torch.equal(a, b) for a, b in zip(values(target), before, strict=True))
    assert not Path("RAN").exists()


def test_models_that_cannot_be_loaded_into(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"no values for weight, bias \(device meta\)"):
        load_checkpoint(tmp_path / "c.pt", nn.Linear(2, 2, device="meta"))
    with pytest.raises(CheckpointError, match="no shape yet for weight, bias; run a batch"):
        load_checkpoint(tmp_path / "c.pt", nn.LazyLinear(2))
    torch.save({"embedding.weight": torch.ones(4, 3), "head.weight": torch.zeros(4, 3)}, tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match=r"different values for embedding.weight and head.weight, which are one"):
        load_checkpoint(tmp_path / "t.pt", Tied())

    class Picky(nn.Linear):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            super()._load_from_state_dict(*arguments)
            raise RuntimeError("not today")

    picky = Picky(2, 2)
    before = values(picky)
    with pytest.raises(CheckpointError, match=r"cannot be loaded by Picky.load_state_dict: not today; fix it there"):
        load_checkpoint(tmp_path / "c.pt", picky)
    assert all(torch.equal(a, b) for a, b in zip(values(picky), before, strict=True))


def test_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("raw").write_bytes(pickle.dumps(Runs()))
    torch.save(Runs(), "legacy", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": STATE, "metadata": {"a": Runs()}}, "inside")
    for name in ("raw", "legacy"):
        with pytest.raises(CheckpointError):
            load_checkpoint(name, Net())
    load_checkpoint("inside", Net())
    assert sorted(str(path) for path in Path().iterdir()) == ["inside", "legacy", "raw"]


def test_damaged_files_are_refused_or_exact(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "metadata": {"a": [1, 2.0, "x"]}}, tmp_path / "good")
    with zipfile.ZipFile(tmp_path / "good") as file:
        contents = {name: file.read(name) for name in file.namelist()}
    rng, path, outcomes = random.Random(0), tmp_path / "bad", set()
    for _ in range(150):
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name, content in contents.items():
                damaged = bytearray(content)
                if name.endswith("data.pkl"):
                    place = rng.randrange(len(damaged))
                    if rng.random() < 0.6:
                        damaged[place] = rng.randrange(256)
                    else:
                        del damaged[place : place + rng.choice((1, 5, 10_000))]
                file.writestr(name, bytes(damaged))
        path.write_bytes(buffer.getvalue())
        target = Net()
        before = values(target)
        try:
            load_checkpoint(path, target)
            outcomes.add("loaded")
        except CheckpointError:
            outcomes.add("refused")
            assert all(torch.equal(a, b) for a, b in zip(values(target), before, strict=True))
    assert outcomes == {"loaded", "refused"}
    for length in (0, 1, 100, 600):
        path.write_bytes((tmp_path / "good").read_bytes()[:length])
        with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
            load_checkpoint(path, Net())


def test_odd_metadata_reach_the_record(tmp_path: Path) -> None:
    from analysis.tasks.bundled import BUNDLED

    state = torch.load(BUNDLED["digits-mlp"].checkpoint, weights_only=True)["state_dict"]
    odd: dict[Any, Any] = {"a": {1, 2}, "b": b"x", "c": 1j, 3: torch.zeros(2), "d": "\ud800", "e": 10**500}
    odd["itself"] = odd
    torch.save({"ema": {"state": state}, "metadata": odd}, tmp_path / "c.pt")
    request = Request(task="digits-mlp", checkpoint=tmp_path / "c.pt", checkpoint_key="ema.state", check=False)
    run = run_study(CRITICAL, request, CriticalPlan())
    text = json.dumps(run.to_dict(), allow_nan=False)
    assert json.loads(text.encode("utf-8"))["checkpoint"]["key"] == run.settings["checkpoint_key"] == "ema.state"
    assert run.metadata["3"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["critical", "digits-mlp", "--checkpoint-key", "ema"], "chooses within a checkpoint; name its file"),
        (["compare", "a", "b", "--checkpoint-key", "ema"], "--checkpoint-key goes with --checkpoint, not with runs"),
        (
            ["landscape", "digits-mlp", "--to", "c.pt", "--checkpoint-key", "emu"],
            "under the key 'emu'; give one of ema",
        ),
        (["critical", "digits-mlp", "--checkpoint", "c.pt"], "several state dicts that fit and differ: model, ema"),
    ],
)
def test_keys_on_the_command_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from analysis.tasks.bundled import BUNDLED

    monkeypatch.chdir(tmp_path)
    state = torch.load(BUNDLED["digits-mlp"].checkpoint, weights_only=True)["state_dict"]
    torch.save({"model": {name: tensor + 1 for name, tensor in state.items()}, "ema": state}, "c.pt")
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 2
    assert message in answer.stderr


def test_version() -> None:
    answer = CliRunner().invoke(app, ["--version"])
    assert (answer.exit_code, answer.stdout.split()[0]) == (0, "curvature")
