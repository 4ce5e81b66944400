"""Does an optimizer keep the conventions of `torch.optim`? A battery of named checks for any class.

Each check stands for what torch tests of its own optimizers, or for what training loops, schedulers and checkpoints
take for granted. Running the battery takes a few seconds on a CPU. Called on all ranks of a process group, the check of
parameters in parts spreads them over these ranks; else it runs on one.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from curvature.data.random_states import RandomStates
from curvature.errors import InputError
from optimizers.checks.batches import BATCH_CHECKS
from optimizers.checks.battery import BASIC_CHECKS
from optimizers.checks.subject import NotApplicable, StepForm, Subject

__all__ = ["CHECKS", "CheckOutcome", "OptimizerReport", "check_optimizer"]

CHECKS = {**BASIC_CHECKS, **BATCH_CHECKS}
"""Every check by its name."""


@dataclass(frozen=True, kw_only=True)
class CheckOutcome:
    """What came of one check."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    reason: str = ""  # why it failed or was skipped; empty where it passed


@dataclass(frozen=True, kw_only=True)
class OptimizerReport:
    """What came of all checks of one optimizer."""

    optimizer: str
    outcomes: tuple[CheckOutcome, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed; skipped ones do not count."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckOutcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def __str__(self) -> str:
        counts = {s: sum(o.status == s for o in self.outcomes) for s in ("passed", "failed", "skipped")}
        lines = [f"{self.optimizer}: " + ", ".join(f"{count} {status}" for status, count in counts.items())]
        width = max(len(o.name) for o in self.outcomes)
        lines += [f"  {o.status:7} {o.name:{width}}  {o.reason}".rstrip() for o in self.outcomes]
        return "\n".join(lines)


def check_optimizer(
    optimizer: Callable[..., torch.optim.Optimizer],
    *,
    form: StepForm = "backward",
    settings: Mapping[str, Any] | None = None,
    skip: Mapping[str, str] | None = None,
    only: str | None = None,
) -> OptimizerReport:
    """Run every check on an optimizer and report what passed, failed and was skipped.

    Args:
        optimizer: a class, or anything called as `optimizer(params, **settings)`.
        form: how it takes a step: "backward" after `loss.backward()`, "graph" after
            `loss.backward(create_graph=True)`, "closure" with a closure that calls `zero_grad()` and `backward()`,
            "loss" with a closure that returns the loss, "outputs" with one that returns (outputs, targets).
        settings: passed at every construction, such as a learning rate under which a small quadratic decreases.
        skip: check name -> reason, for conventions that an optimizer is not meant to keep.
        only: run the checks whose names contain this.

    Raises:
        InputError: for names in `skip` that are no checks.

    Examples:
        >>> report = check_optimizer(torch.optim.SGD, settings={"lr": 0.05}, only="learning rate")
        >>> report.passed
        True
    """
    skip = dict(skip or {})
    if unknown := sorted(skip.keys() - CHECKS.keys()):
        raise InputError(f"skip names checks that do not exist: {unknown}; there are {', '.join(CHECKS)}.")
    name = getattr(optimizer, "__name__", repr(optimizer))
    subject = Subject(make=optimizer, form=form, settings=dict(settings or {}))
    outcomes = [
        CheckOutcome(name=check, status="skipped", reason=skip[check]) if check in skip else _outcome(check, subject)
        for check in CHECKS
        if only is None or only in check
    ]
    return OptimizerReport(optimizer=name, outcomes=tuple(outcomes))


def _outcome(check: str, subject: Subject) -> CheckOutcome:
    states = RandomStates()
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(states.restore)
            CHECKS[check](subject)
    except NotApplicable as reason:
        return CheckOutcome(name=check, status="skipped", reason=str(reason))
    except Exception as error:  # whatever an optimizer of others raises is the answer
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({where.name}, line {where.lineno})" if not isinstance(error, AssertionError) else ""
        first_line = (str(error).strip().splitlines() or [""])[0]
        return CheckOutcome(name=check, status="failed", reason=f"{type(error).__name__}: {first_line}{place}")
    return CheckOutcome(name=check, status="passed")
