"""From what a user types to a task: bundled names, `file.py:function`, `package.module:function`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

import torch
from torch import nn

from analysis.tasks.bundled import BUNDLED
from analysis.tasks.checkpoint import Checkpoint, load_checkpoint
from analysis.tasks.digits import UNTRAINED, half_squared_error, untrained_tanh
from analysis.tasks.landscapes import LANDSCAPES
from analysis.tasks.mnist1d import MNIST1D, mnist1d_task
from analysis.tasks.task import Task
from curvature import Objective
from curvature.errors import TaskError

__all__ = ["function_of", "load_task"]


def load_task(reference: str, checkpoint: Path | str | None = None, *, checkpoint_key: str | None = None) -> Task:
    """Return the task that a reference names.

    Args:
        reference: a bundled name (`digits-cnn`, `digits-mlp`, `text-gpt`; to be trained: `digits-tanh`, `mnist1d-mlp`,
            and the landscapes `quadratic`, `rosenbrock`, `monkey-saddle`, `deep-linear`), or `file.py:function` or
            `package.module:function`, a function without arguments that returns a `Task` or a `curvature.Objective`. It
            is executed.
        checkpoint: parameters to load into its model, instead of the bundled ones or on top of the function's: a file
            or folder, as `analysis.tasks.checkpoint.read_checkpoint` reads it.
        checkpoint_key: which of its state dicts, if it holds several.

    Raises:
        TaskError: if the name is unknown, the module does not import, or the function is missing, fails or returns
            something else.
        CheckpointError: if the checkpoint is missing, unreadable or does not fit.
    """
    if reference in BUNDLED:
        return _bundled(reference, checkpoint, checkpoint_key)
    untrained = {UNTRAINED: _untrained, MNIST1D: mnist1d_task, **LANDSCAPES}.get(reference)
    task = _of_function(reference) if untrained is None else untrained()
    if checkpoint is None:
        return task
    return _loaded(task, Path(checkpoint), load_checkpoint(checkpoint, task.model, key=checkpoint_key))


def function_of(reference: str) -> Callable[..., Any]:
    """Return what "file.py:function" or "package.module:function" names, which is executed as far as imports go.

    Raises:
        TaskError: if it does not import, or the function is missing.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise TaskError(f"{reference!r} names no function; write file.py:function or package.module:function.")
    return _named(_module(place), name, place)


def _of_function(reference: str) -> Task:
    place, colon, function_name = reference.rpartition(":")
    if not colon:
        known = (*BUNDLED, UNTRAINED, MNIST1D, *LANDSCAPES)
        raise TaskError(
            f"no bundled task is called {reference!r}{_nearest(reference, known)}; give {', '.join(known)}, "
            "file.py:function or package.module:function."
        )
    if not place or not function_name.isidentifier():
        raise TaskError(f"{reference!r} names no function; write file.py:function or package.module:function.")
    return _as_task(_call(_function(_module(place), function_name, place), reference), reference)


def _untrained() -> Task:
    model, data = untrained_tanh()
    return Task(
        name=UNTRAINED,
        description="A 64-64-64-10 tanh network before training, with a squared loss on 500 handwritten digits.",
        model=model,
        loss=half_squared_error,
        train_data=data,
    )


def _loaded(task: Task, path: Path, checkpoint: Checkpoint) -> Task:
    return replace(task, checkpoint=path, metadata=checkpoint.metadata, checkpoint_record=checkpoint.record)


def _bundled(name: str, checkpoint: Path | str | None, key: str | None) -> Task:
    bundled = BUNDLED[name]
    train_data, test_data = bundled.load_data()
    with torch.random.fork_rng(devices=[]):  # the initialisation that the checkpoint overwrites draws random numbers
        model = bundled.make_model().eval()
    path = bundled.checkpoint if checkpoint is None else Path(checkpoint)
    read = load_checkpoint(path, model, key=None if checkpoint is None else key)
    task = Task(
        name=name,
        description=bundled.description,
        model=model,
        loss=nn.CrossEntropyLoss(),
        train_data=train_data,
        test_data=test_data,
    )
    return _loaded(task, path, read)


def _module(place: str) -> ModuleType:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise TaskError(
            f"there is no file {place}; give the path of a Python file that exists, relative to {Path.cwd()}."
        )
    try:
        return _import_file(Path(place)) if is_file else _import_module(place)
    except ModuleNotFoundError as error:
        if not is_file and error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise TaskError(
                f"there is no module {place}: {error.name} is not found; install it, run from the folder it lies in, "
                "or give file.py:function."
            ) from error
        raise TaskError(f"{place} does not import: {error}; install what it needs.") from error
    except (Exception, SystemExit) as error:
        raise TaskError(f"{place} does not import: {_what_and_where(error)}; fix it there.") from error


class _AsItStands(SourceFileLoader):
    """Compiles a file each time: what is kept of it would also serve for a file of its size of the same second."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.stem, str(path.resolve()))

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _import_file(path: Path) -> ModuleType:
    """Import a file under its own name, with its folder on the path as `python file.py` has it."""
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve(), loader=_AsItStands(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module  # dataclasses and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        if before is not None:
            sys.modules[path.stem] = before
        raise
    finally:
        sys.path.pop(0)
    return module


def _import_module(name: str) -> ModuleType:
    """Import a module, from the present folder too, as `python -m` does."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _named(module: ModuleType, name: str, place: str) -> Callable[..., Any]:
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    function = getattr(module, name, None)
    if function is None:
        raise TaskError(
            f"{place} has no function {name!r}{_nearest(name, functions)}; give the name of one that is there."
        )
    if not callable(function):
        raise TaskError(f"{name!r} in {place} is a {type(function).__name__}, not a function; give one.")
    return cast("Callable[..., Any]", function)


def _function(module: ModuleType, name: str, place: str) -> Callable[[], Any]:
    function = _named(module, name, place)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise TaskError(
            f"{place}:{name} must be callable without arguments, but: {error}; give its arguments defaults."
        ) from error
    except ValueError:  # a callable without a signature, such as some written in C: calling it is the only test
        pass
    return function


def _call(function: Callable[[], Any], reference: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise TaskError(f"{reference} failed: {_what_and_where(error)}; fix it there.") from error


def _as_task(returned: Any, reference: str) -> Task:
    if isinstance(returned, Task):
        return returned
    if isinstance(returned, Objective):
        return Task(name=reference, model=returned.model, prepared=returned)
    raise TaskError(
        f"{reference} returned a {type(returned).__name__}; return a curvature.Objective or an analysis.tasks.Task."
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _what_and_where(error: BaseException) -> str:
    """One line: the error, and the innermost place outside installed packages it came from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} at {error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in (__file__,)]
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith("<")]
    where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    message = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}{': ' + message if message else ''}{where}"
