"""The battery of torch's conventions: ours keep all of them, and each check can fail."""

from __future__ import annotations

import pytest
import torch

from curvature.errors import InputError
from optimizers.checks.check import check_optimizer
from tests.optimizers.torch_battery import FAULTY, SUBJECTS

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


@pytest.mark.parametrize("name", SUBJECTS)
def test_conventions(name: str) -> None:
    subject = SUBJECTS[name]
    report = check_optimizer(subject.make, form=subject.form, settings=subject.settings, skip=subject.skip)
    assert report.passed, str(report)
    assert sum(outcome.status == "passed" for outcome in report.outcomes) >= 28 - len(subject.skip)


@pytest.mark.parametrize("fault", FAULTY)
def test_faults_are_found(fault: str) -> None:
    optimizer, check = FAULTY[fault]
    assert check_optimizer(torch.optim.SGD, settings={"lr": 1e-3 if "batch" in check else 0.01}, only=check).passed
    report = check_optimizer(optimizer, settings={"lr": 0.01}, only=check)
    assert len(report.failures) == 1, str(report)
    assert report.failures[0].reason


def test_curvature_optimizers_say_what_a_plain_backward_lacks() -> None:
    from optimizers import AdaHessian

    report = check_optimizer(AdaHessian, form="backward", only="decreases")
    assert "CheckFailedError: curvature is due" in report.failures[0].reason


def test_skips_carry_their_reason() -> None:
    report = check_optimizer(torch.optim.SGD, settings={"lr": 0.01}, skip={"maximize": "not meant to"}, only="maximize")
    assert (report.outcomes[0].status, report.outcomes[0].reason) == ("skipped", "not meant to")
    assert "1 skipped" in str(report)
    assert "not meant to" in str(report)


def test_unknown_checks_are_named() -> None:
    with pytest.raises(InputError, match="do not exist"):
        check_optimizer(torch.optim.SGD, skip={"everything": "tired"})
