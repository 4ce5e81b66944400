"""From dataclasses of settings to the options of a command, and how a command answers bad input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from analysis.records.plan import choices
from analysis.run.signals import Terminated

__all__ = ["command", "errors_as_sentences", "made"]

T = TypeVar("T")


def command(name: str, summary: str, settings: tuple[type, ...], run: Callable[[dict[str, Any]], None]) -> TyperCommand:
    """Return a command whose options are the fields of dataclasses that `setting` made; the first of a name counts.

    Args:
        name: of the command.
        summary: its help.
        settings: the dataclasses, in the order of their options.
        run: called with what was given, by name; what was left out is not among it.
    """

    def call(**given: Any) -> None:
        with errors_as_sentences():
            run({key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if v is not None and v != []})

    options = {f.name: _option(cls, f) for cls in reversed(settings) for f in fields(cls) if "text" in f.metadata}
    order = dict.fromkeys(f.name for cls in settings for f in fields(cls) if f.name in options)
    call.__signature__ = inspect.Signature([options[key] for key in order])  # type: ignore[attr-defined]  # typer reads it
    call.__annotations__ = {key: options[key].annotation for key in order}
    call.__doc__ = summary
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(call)
    made_of_it = typer.main.get_command(app)
    assert isinstance(made_of_it, TyperCommand)
    return made_of_it


def made(cls: type[T], given: dict[str, Any], **others: Any) -> T:
    """Return a dataclass with those of its fields that were given."""
    return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given} | others)  # type: ignore[arg-type]  # a plan


def _option(cls: type, f: Field[Any]) -> inspect.Parameter:
    words = (f.metadata["flag"] or "").split()
    names = [word for word in words if word.startswith("--")]
    about: dict[str, Any] = {"help": f.metadata["text"]}
    about["metavar"] = next((word for word in words if word not in names), None)
    if allowed := choices(cls, f.name):
        about["metavar"] = "|".join(allowed)
    if f.default is False and not names:
        names = [f"--{f.name.replace('_', '-')}"]
    make = typer.Option if names or not words else typer.Argument
    hint = _kind(get_type_hints(cls)[f.name])
    empty = inspect.Parameter.empty
    default = empty if f.default is MISSING else None if f.default == () else f.default
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, make(*names, **about)]
    )


def _kind(hint: Any) -> Any:
    """Return a type as the command line knows it."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) is UnionType:
        return _kind(get_args(hint)[0]) | None
    return list[get_args(hint)[0]] if get_origin(hint) is tuple else hint  # type: ignore[misc]  # made at run time


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Turn errors of use into one sentence and exit code 2, Ctrl-C into exit code 130, and SIGTERM into 143."""
    from curvature.errors import CurvatureError

    try:
        yield
    except CurvatureError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        typer.echo(f"stopped; {stop.args[0] if stop.args else 'nothing was written.'}", err=True)
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
