"""Numbers as people read them: the terminal and the reports take them from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from analysis.records.measured import Bounded, Measured

__all__ = [
    "about",
    "between",
    "carriers",
    "count",
    "duration",
    "memory",
    "number",
    "over_data",
    "power_of_ten",
    "quantity",
    "share",
    "sparkline",
    "subscript",
    "value_and_error",
]

MINUS = "\u2212"
TIMES = "\u00d7"
THIN = "\u202f"  # thin and unbreakable: between thousands, before a per cent sign

BARS = "▁▂▃▄▅▆▇█"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_NEGLIGIBLE = 5e-5  # an uncertainty below this share of the value is not shown: four digits are printed


# -- numbers ----------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 4) -> str:
    """Return a value with so many significant digits, in powers of ten where plain digits would be long."""
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -4 <= exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace(",", THIN).replace("-", MINUS)
    return f"{_fixed(value / 10.0**exponent, digits - 1)} {TIMES} {power_of_ten(exponent)}"


def quantity(measured: Measured, digits: int = 4) -> str:
    """Return "value ± uncertainty", the uncertainty to two digits and the value to the same place."""
    if isinstance(measured, Bounded):
        return between(measured)
    value, stderr = measured.value, measured.stderr
    if not (math.isfinite(value) and math.isfinite(stderr)) or abs(stderr) <= _NEGLIGIBLE * abs(value):
        return number(value, digits)
    place = math.floor(math.log10(float(f"{stderr:.1e}"))) - 1  # of the uncertainty's second digit
    exponent = math.floor(math.log10(max(abs(value), stderr)))
    if -4 <= exponent < 6 and place >= -8:
        decimals = max(0, -place)
        return f"{_fixed(round(value, -place), decimals)} ± {_fixed(round(stderr, -place), decimals)}"
    scale, decimals = 10.0**exponent, max(0, exponent - place)
    return f"({_fixed(value / scale, decimals)} ± {_fixed(stderr / scale, decimals)}) {TIMES} {power_of_ten(exponent)}"


def between(bounded: Bounded) -> str:
    """Return "lower to upper", to two digits; the number itself where its bounds agree."""
    low, high = bounded.lower, bounded.upper
    if not (math.isfinite(low) and math.isfinite(high)) or high - low <= _NEGLIGIBLE * abs(bounded.value):
        return number(bounded.value)
    ends = (about(low), about(high)) if about(low) != about(high) else (number(low), number(high))
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def value_and_error(measured: Measured, *, percent: bool = False) -> tuple[str, str]:
    """Return the value and its uncertainty apart, each readable on its own, for where they stand on two lines."""
    if isinstance(measured, Bounded):
        return between(measured), ""
    scale, unit = (100.0, f"{THIN}%") if percent else (1.0, "")
    value, stderr = scale * measured.value, scale * measured.stderr
    if not math.isfinite(value):
        return number(value), ""
    if abs(stderr) <= _NEGLIGIBLE * abs(value):
        return number(value) + unit, f"± {number(stderr, 2)}{unit}" if abs(stderr) > 1e-8 * abs(value) else "exact"
    digits = 1 + math.floor(math.log10(max(abs(value), stderr))) - math.floor(math.log10(stderr))
    return number(value, min(6, digits + 1) if abs(value) > stderr else 2) + unit, f"± {number(stderr, 2)}{unit}"


def over_data(measured: Measured, *, percent: bool = False) -> str:
    """Return how far other data of the same size would move a value; nothing where that is not known."""
    if not math.isfinite(measured.data_stderr):
        return ""
    return f"± {number(100 * measured.data_stderr, 2)}{THIN}%" if percent else f"± {number(measured.data_stderr, 2)}"


def count(value: float) -> str:
    """Return a whole number with its thousands set apart (others with four digits)."""
    return _fixed(value, 0) if value == round(value) else number(value)


def about(value: float) -> str:
    """Return a number of things that is not known exactly: to two digits, without decimals from a hundred on."""
    if not math.isfinite(value) or abs(value) >= 1e6 or abs(value) < 100:
        return number(value, 2)
    return count(round(float(f"{value:.2g}")))


def share(measured: Measured) -> str:
    """Return a share of 1 in per cent, with its uncertainty."""
    if not math.isfinite(measured.value):
        return "undefined"
    if max(abs(measured.value), measured.stderr) < 5e-6:
        return f"0{THIN}%"
    percent = Measured(value=100 * measured.value, stderr=100 * measured.stderr)
    text = quantity(percent, digits=3)
    return (f"({text})" if "±" in text else text) + f"{THIN}%"


def carriers(names: Sequence[str], parts: Sequence[float], of: str) -> str:
    """Return which of several hold the most of something, the largest first, until four fifths are reached."""
    total, held, named = sum(parts), 0.0, []
    if not total > 0:
        return f"None: there is no {of.removeprefix('the ')}."
    for part, name in sorted(zip(parts, names, strict=True), reverse=True):
        named.append((name, part / total))
        held += part / total
        if held > 0.8:
            break
    if len(named) == 1:
        return f"{named[0][0]} carries {100 * held:.0f}{THIN}% of {of}."
    listed = ", ".join(f"{name} ({100 * part:.0f}{THIN}%)" for name, part in named)
    return f"{listed} together carry {100 * held:.0f}{THIN}% of {of}."


def sparkline(values: Sequence[float]) -> str:
    """Return numbers as a line of bars from the smallest to the largest, with a blank for what is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def power_of_ten(exponent: int) -> str:
    """Return 10 to a power, with superscripts."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def subscript(index: int) -> str:
    """Return a whole number as a subscript."""
    return str(index).translate(_SUBSCRIPTS)


def duration(seconds: float) -> str:
    """Return a time in the unit that fits."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def memory(num_bytes: float) -> str:
    """Return a size in MiB or GiB."""
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def prose(value: Any) -> str:
    """Return a plain value of a configuration as text: nested ones as "name value, name value"."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {prose(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(prose(item) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace(",", THIN).replace("-", MINUS)
