"""From a task's name to a complete inspection: load, check, estimate, measure, and write down what it all rested on."""

from __future__ import annotations

from dataclasses import asdict

import torch

from analysis.inspection import inspect_model
from analysis.plan import InspectionPlan, estimate_cost
from analysis.preparation import Listener, Request, load, prepare
from analysis.results import CostEstimate
from analysis.store import Run

__all__ = ["InspectionListener", "run_inspection"]


class InspectionListener(Listener):
    """Told how an inspection gets on; this one keeps it to itself."""

    def estimated(self, estimate: CostEstimate) -> None:
        """It is known what the inspection will cost."""


def run_inspection(request: Request, plan: InspectionPlan, *, listener: InspectionListener | None = None) -> Run:
    """Inspect the model of a task and return the results with all that produced them. Nothing is written.

    Args:
        request: which model, on what.
        plan: how many eigenvalues, probes and steps.
        listener: told about progress.

    Raises:
        CurvatureError: whatever stands in the way, with the remedy.
    """
    listener = listener or InspectionListener()
    ready = prepare(*load(request, listener), request, listener)
    objective = ready.objective
    with listener.doing("timing one product"):
        estimate = estimate_cost(objective, plan)
    listener.estimated(estimate)
    inspection = inspect_model(
        objective,
        k=plan.k,
        num_bottom=plan.num_bottom,
        rtol=plan.rtol,
        num_probes=plan.num_probes,
        num_steps=plan.num_steps,
        layers=plan.layers,
        coupling=plan.coupling,
        generator=torch.Generator(device=objective.device).manual_seed(request.seed),
        progress=listener.advanced,
    )
    settings = {**request.settings, **asdict(plan)}
    return Run(**ready.record(request), settings=settings, estimate=estimate, inspection=inspection)
