"""The bundled tasks are what they state; whatever is wrong with a reference or checkpoint is said in one sentence."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from analysis.tasks import BUNDLED, Task, load_task
from analysis.tasks.bundled import Recipe
from analysis.tasks.checkpoint import load_checkpoint, save_checkpoint
from analysis.tasks.digits import _table, load_digits
from analysis.tasks.text import CONTEXT, VOCABULARY, load_text
from analysis.tasks.train import train
from curvature import HessianOperator, Objective
from curvature.errors import CheckpointError, CurvatureError, TaskError

# -- the bundled tasks ------------------------------------------------------------------------------------------------


def accuracy(model: nn.Module, data: Any) -> float:
    inputs, labels = data
    with torch.no_grad():
        return float((model(inputs).argmax(dim=1) == labels).double().mean())


def test_split_is_stratified_complete_and_disjoint() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    (train_x, train_y), (test_x, test_y) = load_digits()
    assert train_x.shape == (1442, 1, 8, 8)
    assert test_x.shape == (355, 1, 8, 8)
    assert 0 <= train_x.min() < train_x.max() == 1
    all_y = torch.as_tensor(sklearn_datasets.load_digits().target)
    for c in range(10):
        assert int((test_y == c).sum()) == int((all_y == c).sum()) // 5
        assert int((test_y == c).sum() + (train_y == c).sum()) == int((all_y == c).sum())
    seen = torch.cat([train_x, test_x]).flatten(1)
    everything = torch.as_tensor(sklearn_datasets.load_digits().data / 16, dtype=torch.float32)
    torch.testing.assert_close(seen.sort(dim=0).values, everything.sort(dim=0).values, rtol=0, atol=0)


@pytest.mark.parametrize("name", BUNDLED)
def test_checkpoint_states_the_truth(name: str) -> None:
    task = load_task(name)
    assert not task.model.training
    assert task.checkpoint is not None
    assert task.checkpoint.stat().st_size < 2**20
    stated = task.metadata
    assert (stated["num_train"], stated["num_test"]) == (len(task.train_data[1]), len(task.test_data[1]))
    assert stated["num_params"] == sum(p.numel() for p in task.model.parameters())
    assert accuracy(task.model, task.train_data) == pytest.approx(stated["train_accuracy"], abs=1e-9)
    assert accuracy(task.model, task.test_data) == pytest.approx(stated["test_accuracy"], abs=1 / 355 + 1e-9)
    loss, gradient = task.to(dtype=torch.float64).objective().loss_and_gradient()
    assert float(loss) == pytest.approx(stated["train_loss"], rel=1e-3)
    assert float(gradient.norm()) == pytest.approx(stated["train_gradient_norm"], rel=1e-2)


def test_cnn_is_trained_to_convergence() -> None:
    stated = load_task("digits-cnn").metadata
    assert stated["train_accuracy"] == 1
    assert stated["test_accuracy"] >= 0.98
    assert stated["train_loss"] < 1e-3
    assert stated["train_gradient_norm"] < 5e-3


def test_mlp_is_a_minimum_of_its_regularised_loss() -> None:
    task = load_task("digits-mlp").to(dtype=torch.float64)
    objective = task.objective()
    decay = task.metadata["recipe"]["weight_decay"]
    theta = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    assert (objective.gradient() + decay * theta).norm() < 1e-5  # float32 parameters: 1e-7 of |H| |theta|
    smallest = torch.linalg.eigvalsh(HessianOperator(objective).to_dense())[0]
    assert smallest > -decay


def test_training_is_reproducible_and_learns(tmp_path: Path) -> None:
    recipe = Recipe(
        epochs=3,
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        batch_size=64,
        frozen_epochs=1,
        frozen_learning_rate=0.01,
    )
    results = [train("digits-cnn", tmp_path / f"{i}.pt", recipe=recipe) for i in range(2)]
    assert results[0] == results[1]
    assert results[0]["test_accuracy"] > 0.9
    assert load_task("digits-cnn", tmp_path / "0.pt").metadata == results[0]


def test_loading_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    load_task("digits-mlp")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("there", [None, ModuleType("sklearn")])
def test_without_scikit_learn_the_error_says_what_to_install(
    there: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not installed, or something of that name that holds no data and says nothing of itself."""
    monkeypatch.setitem(sys.modules, "sklearn", there)
    for name in [name for name in sys.modules if name.startswith("sklearn.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(TaskError, match=r"which does not import .*; pip install 'torch-curvature\[tasks\]'"):
        load_task("digits-cnn")


def test_digits_are_those_of_the_file_and_scikit_learn_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that loads them is spared a second; where the file is missing they come through the import."""
    code = "import sys, analysis.tasks.digits as d; d.load_digits(); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    of_file = _table()
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert np.array_equal(of_file, _table())


# -- a user's own task ------------------------------------------------------------------------------------------------

USER_FILE = """
    import torch
    from torch import nn
    from helper import WIDTH
    from analysis.tasks import Task
    from curvature import Objective

    data = (torch.randn(6, WIDTH), torch.randn(6, 2))

    def task():
        return Task(name="mine", model=nn.Linear(WIDTH, 2), loss=nn.MSELoss(), train_data=data)

    def objective(seed=0):
        return Objective(nn.Linear(WIDTH, 2), nn.MSELoss(), data)

    def needs_argument(width):
        return objective()

    def fails():
        return {}["absent"]

    def leaves():
        raise SystemExit(3)

    def returns_model():
        return nn.Linear(2, 2)

    number = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WIDTH = 3\n")
    path = tmp_path / "my_task.py"
    path.write_text(textwrap.dedent(USER_FILE))
    return path


@pytest.fixture(autouse=True)
def imports_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("helper", "my_task", "needs"):
        monkeypatch.setitem(sys.modules, name, None)  # so that it is taken out again at the end
        monkeypatch.delitem(sys.modules, name)


def test_function_in_a_file_that_returns_a_task(user_file: Path) -> None:
    path_before = list(sys.path)
    task = load_task(f"{user_file}:task")
    assert task.name == "mine"
    assert task.objective(params="weight").num_params == 6
    assert sys.path == path_before


def test_a_file_is_read_again_however_soon_it_was_changed(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python keeps of a compiled file is told from another only by size and second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert load_task(f"{user_file}:task").name == "mine"
    text, times = user_file.read_text(), user_file.stat()
    user_file.write_text(text.replace('"mine"', '"ours"'))
    os.utime(user_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_task(f"{user_file}:task").name == "ours"


def test_function_in_a_module_of_the_present_folder(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_file.parent)
    assert load_task("my_task:task").name == "mine"


def test_ready_objective_is_passed_on_and_restricted(user_file: Path) -> None:
    task = load_task(f"{user_file}:objective")
    whole = task.objective(params=None)
    assert isinstance(whole, Objective)
    assert whole.num_params == 8
    assert task.objective(params="bias").num_params == 2
    with pytest.raises(TaskError, match="micro_batch cannot be set from outside"):
        task.objective(micro_batch=2)
    with pytest.raises(TaskError, match="move its model and data"):
        task.to(dtype=torch.float64)


def test_checkpoint_goes_into_a_users_model(user_file: Path, tmp_path: Path) -> None:
    state = {"weight": torch.full((2, 3), 0.5), "bias": torch.zeros(2)}
    torch.save(state, tmp_path / "own.pt")
    task = load_task(f"{user_file}:objective", tmp_path / "own.pt")
    assert task.checkpoint == tmp_path / "own.pt"
    assert torch.equal(task.objective(params="weight").space.tensors["weight"], state["weight"])


def test_moved_copy_leaves_the_task_alone() -> None:
    task = load_task("digits-mlp")
    double = task.to(dtype=torch.float64)
    assert double.train_data[0].dtype == next(double.model.parameters()).dtype == torch.float64
    assert double.train_data[1].dtype == torch.int64
    assert next(task.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("digit-cnn", r"no bundled task is called 'digit-cnn' \(did you mean digits-cnn or digits-tanh\?\)"),
        (
            "zebra",
            r"no bundled task is called 'zebra'; give digits-cnn, digits-mlp, text-gpt, digits-tanh, "
            "mnist1d-mlp, quadratic, rosenbrock, monkey-saddle, deep-linear, file.py:function",
        ),
        ("my_task.py", "no bundled task is called 'my_task.py'"),
        (":task", "names no function"),
        ("my_task.py:", "names no function"),
        ("my_task.py:not a name", "names no function"),
        ("absent.py:task", "there is no file absent.py"),
        ("absent_package.module:task", "there is no module absent_package.module: absent_package is not found"),
        ("my_task.absent:task", "there is no module my_task.absent"),
        ("my_task.py:tusk", r"has no function 'tusk' \(did you mean task"),
        ("my_task.py:number", "'number' in my_task.py is a int, not a function"),
        ("my_task.py:needs_argument", "must be callable without arguments, but: missing a required argument: 'width'"),
        ("my_task.py:fails", r"my_task.py:fails failed: KeyError: 'absent' at .*my_task.py:20; fix it there"),
        ("my_task.py:leaves", "failed: SystemExit: 3"),
        ("my_task.py:returns_model", "returned a Linear; return a curvature.Objective or an analysis.tasks.Task"),
        ("raises.py:task", r"raises.py does not import: ZeroDivisionError: division by zero at .*raises.py:1"),
        ("syntax.py:task", r"syntax.py does not import: SyntaxError: .* at .*syntax.py:1"),
        ("needs.py:task", "needs.py does not import: No module named 'absent_dependency'; install what it needs"),
        ("needs:task", "needs does not import: No module named 'absent_dependency'; install what it needs"),
        ("exits.py:task", "exits.py does not import: SystemExit"),
    ],
)
def test_bad_reference(reference: str, message: str, user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_file.parent)
    Path("raises.py").write_text("1 / 0\n")
    Path("syntax.py").write_text("def task(:\n")
    Path("needs.py").write_text("import absent_dependency\n")
    Path("exits.py").write_text("import sys\nsys.exit()\n")
    with pytest.raises(TaskError, match=message) as caught:
        load_task(reference)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_task_without_data_is_refused() -> None:
    with pytest.raises(TaskError, match="needs loss= and train_data="):
        Task(name="empty", model=nn.Linear(1, 1))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.mark.parametrize("key", ["", "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_usual_forms_of_checkpoints_load(key: str, prefix: str, tmp_path: Path) -> None:
    source, target = tiny(), tiny()
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "c.pt")
    load_checkpoint(tmp_path / "c.pt", target)
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_metadata_come_back(tmp_path: Path) -> None:
    stated = {"loss": math.pi, "recipe": {"epochs": 3}}
    save_checkpoint(tmp_path / "c.pt", tiny(), stated)
    assert load_checkpoint(tmp_path / "c.pt", tiny()).metadata == stated


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot be read as plain tensors"),
        (b"\x00" * 300, "cannot be read as plain tensors"),
        (Path, "holds a type, not a state dict"),
        ([1, 2], "holds a list, not a state dict"),
        ({}, "no state dict"),
        ({"epoch": 3, "weights": 4}, "holds epoch, weights but no state dict"),
        ({"0.weight": torch.ones(3, 2)}, r"does not fit the model: it lacks 0.bias, 1.weight, 1.bias"),
        ({**tiny().state_dict(), "2.weight": torch.ones(1)}, r"it adds 2.weight; use"),
        (
            nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)).state_dict(),
            r"0.weight of shape \(4, 2\) instead of \(3, 2\)",
        ),
        ({f"layer{i}": torch.ones(1) for i in range(9)}, "adds layer0, layer1, layer2 and 6 more"),
    ],
)
def test_bad_checkpoint(stored: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    if isinstance(stored, bytes):
        path.write_bytes(stored)
    elif stored is not None:
        torch.save(stored, path)
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, model)
    assert isinstance(caught.value, CurvatureError)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        load_task("digits-mlp", tmp_path)


def test_texts_are_the_same_everywhere() -> None:
    (words, following), (test_words, _) = load_text()
    assert words.shape == following.shape == (768, CONTEXT)
    assert torch.equal(words[:, 1:], following[:, :-1])
    assert hashlib.sha256(torch.cat([words, test_words]).numpy().tobytes()).hexdigest()[:16] == "766d2c70cb244309"
    sentence = [VOCABULARY[i] for i in words[0]]
    assert sentence[:4] == ["it (plural)", "verb 3.3 (plural)", "the (plural)", "noun 3.0 (plural)"]


def test_the_gpt_knows_more_of_the_next_word_than_its_frequency() -> None:
    task = load_task("text-gpt")
    (_, y), (x_test, y_test) = load_text()
    frequencies = torch.bincount(y.flatten(), minlength=len(VOCABULARY)) + 1.0
    with torch.no_grad():
        found = float(nn.functional.cross_entropy(task.model(x_test), y_test))
    assert found < float(-(frequencies / frequencies.sum()).log()[y_test].mean()) - 1.0
