"""What all results share: plain values, data frames, a short repr, and an error for those who want one."""

from __future__ import annotations

import html
import math
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from curvature.errors import InputError, NotConvergedError

_LINES, _WIDTH, _SHOWN = 12, 100, 5  # of a repr: lines, characters of a line, entries of a tensor


class Result:
    """Base of all results, which are frozen dataclasses (`repr=False`) of detached tensors and numbers."""

    _large: tuple[str, ...] = ()  # fields of n or more entries

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """Return the fields as plain Python values; fields of n or more entries only with `arrays=True`."""
        return {name: _plain(value) for name, value in self._items() if arrays or name not in self._large}

    def to_frame(self) -> Any:
        """Return a `pandas.DataFrame`: a row for each entry of the vectors of one length, else one row of numbers.

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
            return pd.DataFrame({name: _plain(value) for name, value in vectors.items() if len(value) == length})
        plain = ((name, _plain(value)) for name, value in items)
        return pd.DataFrame([{name: value for name, value in plain if not isinstance(value, (list, dict))}])

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

    def _lines(self) -> list[tuple[str, str]]:
        """Return names and short texts of what is shown."""
        told = [(name, _short(value)) for name, value in self._items() if _tells(value)]
        if len(told) > _LINES - 1:
            names = ", ".join(name for name, _ in told[_LINES - 2 :])
            told = [*told[: _LINES - 2], ("...", names)]
        return told

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


def _plain(value: Any) -> Any:
    """Tensors as (nested) lists and numbers, enums and dtypes by name: what JSON can hold."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Result):
        return value.to_dict(arrays=True)
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


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
        return ", ".join([type(value).__name__, *(f"{name} {text}" for name, text in value._lines()[:2])])
    if isinstance(value, (tuple, list, dict)) and not all(isinstance(x, (str, int, float)) for x in value):
        return f"{len(value)} x {type(next(iter(value))).__name__}"
    return " ".join(repr(value).split())
