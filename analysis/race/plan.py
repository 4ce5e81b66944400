"""The settings of a race."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from analysis.race.kinds import GROUPS, Kind, kind_of, names_of
from analysis.race.schedules import SCHEDULES
from analysis.records.plan import Plan, setting
from analysis.run.pool import usable_cores
from analysis.sharpness.measure import SHARPNESS_MEASURES
from curvature.arguments import checked_fields
from curvature.errors import InputError

__all__ = ["Budget", "Entry", "RacePlan"]

Unit = Literal["steps", "seconds", "gradients"]
_UNITS: dict[str, Unit] = {"step": "steps", "s": "seconds", "second": "seconds", "sec": "seconds", "": "steps"}
_UNITS |= {"gradient": "gradients"}


@dataclass(frozen=True)
class Budget:
    """What each training may spend."""

    amount: float
    unit: Unit

    @classmethod
    def read(cls, text: str) -> Budget:
        """Return what a text like "300 steps", "20s" or "500 gradients" says.

        Raises:
            InputError: if it says something else.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)[\s_-]*([a-z]*?)s?\s*", text.lower())
        word = "" if match is None else match[2] or ("s" if text.strip().lower().endswith("s") else "")
        if match is None or word not in _UNITS or not float(match[1]) > 0:
            raise InputError(
                f"budget must be a number of steps, seconds or gradients, as in '300 steps' or '20s', got {text!r}."
            )
        amount, unit = float(match[1]), _UNITS[word]
        if unit == "steps" and amount != int(amount):
            raise InputError(f"budget must be a whole number of steps, got {text!r}.")
        return cls(amount, unit)

    def used(self, steps: int, seconds: float, gradients: float) -> float:
        """Return the share that was spent."""
        return {"steps": steps, "seconds": seconds, "gradients": gradients}[self.unit] / self.amount

    def part(self, share: float) -> Budget:
        """Return a share of it; at least a step."""
        amount = share * self.amount
        return Budget(max(1, round(amount)) if self.unit == "steps" else amount, self.unit)

    @property
    def steps(self) -> int | None:
        """Its number of steps; None where it is in something else."""
        return int(self.amount) if self.unit == "steps" else None


@dataclass(frozen=True)
class Entry:
    """An optimizer with a schedule, as it was asked for."""

    optimizer: str
    schedule: str
    lr: float | None
    """The rate that was given; None: to be found."""

    @property
    def name(self) -> str:
        """What it is called in the race."""
        rate = "" if self.lr is None else f"@{self.lr:g}"
        return f"{self.optimizer}{rate}" if self.schedule == "constant" else f"{self.optimizer}{rate}, {self.schedule}"

    @property
    def kind(self) -> Kind:
        """The optimizer."""
        return kind_of(self.optimizer)


@checked_fields
@dataclass(frozen=True, kw_only=True)
class RacePlan(Plan):
    """Who races, for how long, and how the outcome is judged."""

    optimizers: tuple[str, ...] = setting(
        ("momentum", "adamw", "soap", "kfac"),
        f"Optimizers, apart by commas; also groups ({', '.join(GROUPS)}), file.py:make, and adamw@0.001 for a "
        "rate that is given.",
        flag="--optimizers a,b,c",
    )
    budget: str = setting("300 steps", "Of each training: '300 steps', '20 seconds' or '500 gradients'.")
    seeds: int = setting(5, "Trainings of each, with initial weights and batches that all share.", least=1)
    tune: bool = setting(True, "Search each rate by successive halving. Else: usual rates.", flag="--tune/--no-tune")
    rates: int = setting(8, "Rates that a search begins with, a factor of 3.2 apart.", least=2, most=32)
    validation: float = setting(
        0.0,
        "Share of the training data held out, by which rates are chosen. Default: by the training loss.",
        least=0,
        below=1,
    )
    schedules: tuple[str, ...] = setting(
        ("constant",), f"Schedules of the rate, each a further entrant: {', '.join(SCHEDULES)}.", flag="--schedules a,b"
    )
    clip_norm: float | None = setting(None, "Clip gradients to this norm.", above=0)
    clip_value: float | None = setting(None, "Clip entries of gradients to this size.", above=0)
    batch_size: int | None = setting(
        None, "Train on batches of so many examples. Default: the batches of the task as they are.", least=1
    )
    weight_decay: float | None = setting(None, "Of all optimizers that have it. Default: each one's own.", least=0)
    start: Literal["auto", "fresh", "task"] = setting(
        "auto",
        "From parameters drawn by the seed, or those of the task and its checkpoint. auto: fresh where all are trained "
        "and modules can draw them.",
    )
    measures: tuple[str, ...] = setting(
        ("top_eigenvalue",),
        "Sharpness measures of each solution; may be given several times; 'none' for none.",
        flag="--measure NAME",
    )
    noise: bool = setting(True, "Measure the gradient noise of each solution.", flag="--noise/--no-noise")
    level: float = setting(0.05, "Family-wise error level of who is ahead.", above=0, below=1)
    workers: int | None = setting(None, "Trainings at a time, a core each. Default: one for each core.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "optimizers", _apart(self.optimizers))
        object.__setattr__(self, "schedules", _apart(self.schedules))
        if unknown := [name for name in self.schedules if name not in SCHEDULES]:
            raise InputError(f"schedules must be among {', '.join(SCHEDULES)}, got {', '.join(unknown)}.")
        if unknown := [name for name in self.measures if name not in (*SHARPNESS_MEASURES, "none")]:
            raise InputError(f"measures must be among {', '.join(SHARPNESS_MEASURES)}, got {', '.join(unknown)}.")
        _ = self.limit
        if not self.entries():
            raise InputError("a race needs optimizers; none of those asked for is installed.")

    @property
    def limit(self) -> Budget:
        """The budget."""
        return Budget.read(self.budget)

    def entries(self) -> tuple[Entry, ...]:
        """Return who races: every optimizer with every schedule; those without a rate have none.

        Raises:
            InputError: for an unknown optimizer, or a rate given to one that takes none.
        """
        found = []
        for given in names_of(self.optimizers):
            name, _, rate = given.partition("@")
            kind = kind_of(name)
            lr = _rate(given, rate) if rate else None
            if lr is not None and not kind.takes_rate:
                raise InputError(f"{name} takes no learning rate; leave {rate!r} out.")
            plain = kind.lr is None and lr is None
            found += [Entry(name, schedule, lr) for schedule in (("constant",) if plain else self.schedules)]
        return tuple(dict.fromkeys(found))

    def processes(self) -> int:
        """Return how many trainings run at a time."""
        return self.workers or usable_cores()

    def sharpness(self) -> tuple[str, ...]:
        """Return the measures to take."""
        return tuple(name for name in self.measures if name != "none")


def _apart(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return words that were given apart or with commas between them, each once."""
    return tuple(dict.fromkeys(word.strip() for text in given for word in text.split(",") if word.strip()))


def _rate(given: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"a rate is given as in adamw@0.001, got {given!r}.")
    return value
