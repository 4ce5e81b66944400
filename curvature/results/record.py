"""What all results share: plain values, data frames, figures, a short repr, and an error for those who want one."""

from __future__ import annotations

import functools
import html
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from typing_extensions import Self

from curvature.errors import InputError, NotConvergedError

__all__ = ["Result", "to_plain"]

_LINES, _WIDTH, _SHOWN = 12, 100, 5  # of a repr: lines, characters of a line, entries of a tensor


class Result:
    """Base of all results, which are frozen dataclasses (`repr=False`) of detached tensors and numbers."""

    _large: ClassVar[tuple[str, ...]] = ()  # fields of n or more entries
    _curves: ClassVar[tuple[str, ...]] = ()  # tensors of hundreds, which figures and data frames are for
    _also: ClassVar[tuple[str, ...]] = ()  # properties that `to_dict` has, too
    _figure: ClassVar[str] = ""  # the function of `analysis` that draws it

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """Return the fields as plain Python values that JSON can hold; numbers that are not finite as None.

        Fields of n or more entries, and curves, come with `arrays=True` only, here and in results within this one.
        """
        return {**to_plain(self, arrays=arrays), **to_plain(self._properties(), arrays=arrays)}

    def to_frame(self) -> Any:
        """Return a `pandas.DataFrame`: a row for each entry of the vectors of one length, else one row of numbers.

        A result that is a table, of layers or of methods, has a row for each of these instead. A number with its errors
        fills a column for each of them.

        Raises:
            InputError: without pandas.
        """
        try:
            import pandas as pd
        except ImportError:
            raise InputError("to_frame needs pandas, which is not installed: pip install pandas.") from None
        items = [(name, value) for name, value in self._items() if name not in self._large]
        vectors = {name: value for name, value in items if isinstance(value, Tensor) and value.ndim == 1}
        if vectors:
            length = len(next(iter(vectors.values())))
            return pd.DataFrame({name: _entries(value) for name, value in vectors.items() if len(value) == length})
        tables = [value for _, value in items if isinstance(value, tuple) and value and is_dataclass(value[0])]
        return pd.DataFrame([_row(row) for row in tables[0]] if len(tables) == 1 else [_row(self)])

    def plot(self, **settings: Any) -> Any:
        """Draw the result with matplotlib and return the axes.

        Args:
            settings: those of the function that draws it, `ax=` among them; the error for a wrong one names it.

        Raises:
            InputError: if this kind of result has no figure.
        """
        if not self._figure:
            parts = [name for name, value in self._items() if isinstance(value, Result) and value._figure]
            advice = (
                f"its {' and its '.join(parts)} can be drawn" if parts else "draw its fields, or those of to_frame()"
            )
            raise InputError(f"a {type(self).__name__} has no figure of its own; {advice}.")
        # The one place here that knows of `analysis`, which draws: by name, where somebody wants a figure.
        return getattr(importlib.import_module("analysis"), self._figure)(self, **settings)

    def raise_if_failed(self) -> Self:
        """Return self if what was asked for was reached, else raise `NotConvergedError` that carries self."""
        status = getattr(self, "status", None)
        if status is None or status.ok:
            return self
        raise NotConvergedError(f"{self._outcome()}: {status.value}.", self)

    def _outcome(self) -> str:
        """Say how far a run that fell short has come."""
        return f"after {getattr(self, 'num_matvecs', 0)} products"

    def _items(self) -> list[tuple[str, Any]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]

    def _properties(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._also}

    def _told(self) -> list[tuple[str, Any]]:
        """Return names and values of what is shown."""
        return [*self._items(), *self._properties().items()]

    def _lines(self) -> list[tuple[str, str]]:
        """Return names and short texts of what is shown."""
        told = [(name, _short(value)) for name, value in self._told() if _tells(value)]
        if len(told) > _LINES - 1:
            names = ", ".join(name for name, _ in told[_LINES - 2 :])
            told = [*told[: _LINES - 2], ("...", names)]
        return told

    def _brief(self) -> str:
        """Return it in one line, as a part of another result."""
        return ", ".join([type(self).__name__, *(f"{name} {text}" for name, text in self._lines()[:2])])

    def __repr__(self) -> str:
        lines = self._lines()
        width = max((len(name) for name, _ in lines), default=0)
        return "\n".join(
            [type(self).__name__, *(f"  {name:{width}}  {text}"[:_WIDTH].rstrip() for name, text in lines)]
        )

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(text)}</td></tr>" for n, text in self._lines())
        return f"<table><caption>{html.escape(type(self).__name__)}</caption>{rows}</table>"


def _tells(value: Any) -> bool:
    return not (value is None or value in ("", ()) or (isinstance(value, float) and math.isnan(value)))


def _finite_or_none(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else None


def to_plain(value: Any, *, arrays: bool = False, number: Callable[[float], Any] = _finite_or_none) -> Any:
    """Return a result, or what stands in one, as nested dicts and lists: enums by name, what JSON knows not as text.

    Args:
        value: a result, a dataclass, or a value in one.
        arrays: with the fields of n or more entries.
        number: what stands for a number; by default None for one that is not finite.
    """
    again = functools.partial(to_plain, arrays=arrays, number=number)
    if isinstance(value, Tensor):
        return again(value.detach().cpu().tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        return again(value.tolist())
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return [again(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): again(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        large, curves = (() if arrays else getattr(value, name, ()) for name in ("_large", "_curves"))
        found = [(f.name, getattr(value, f.name)) for f in fields(value) if f.name not in large]
        return {name: again(part) for name, part in found if name not in curves or not isinstance(part, Tensor)}
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _entries(vector: Tensor) -> list[Any]:
    entries: list[Any] = vector.detach().cpu().tolist()
    return entries


def _row(result: Any) -> dict[str, Any]:
    """Return the numbers and words of a result as a row of a table; an error's column is named for its number."""
    row: dict[str, Any] = {}
    for field in fields(result):
        value = getattr(result, field.name)
        told = vars(value) if isinstance(value, Result) else {}
        if {"value", "stderr"} <= set(told):
            errors = {f"{field.name}_{name}": told[name] for name in ("stderr", "data_stderr") if name in told}
            row |= {field.name: told["value"], **errors}
        else:
            row[field.name] = value
    scalars = {name: value.item() if _is_scalar(value) else value for name, value in row.items()}
    return {
        name: to_plain(value, number=float)
        for name, value in scalars.items()
        if not isinstance(value, (Tensor, list, tuple, Mapping)) and not is_dataclass(value)
    }


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _short(value: Any) -> str:
    """Return a value in one line."""
    if isinstance(value, Tensor):
        if value.ndim > 1:
            return f"{tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, {value.device}"
        entries = value.detach().flatten()[:_SHOWN].cpu().tolist()
        text = ", ".join(str(x) if isinstance(x, bool) else f"{x:.5g}" for x in entries)
        more = f", ... ({len(value)} in all)" if value.ndim and len(value) > _SHOWN else ""
        return f"[{text}{more}]" if value.ndim else text
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, Result):
        return value._brief()
    if isinstance(value, (tuple, list, dict)) and not all(isinstance(x, (str, int, float)) for x in value):
        return f"{len(value)} x {type(next(iter(value))).__name__}"
    return " ".join(repr(value).split())
