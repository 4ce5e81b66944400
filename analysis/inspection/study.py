"""From a task's name to a complete inspection: load, check, estimate, measure, and write down what it all rested on."""

from __future__ import annotations

from dataclasses import asdict

import torch

from analysis.inspection.measure import inspect_model
from analysis.inspection.plan import InspectionPlan, estimate_cost
from analysis.inspection.record import Run
from analysis.run.meter import CostEstimate
from analysis.run.preparation import Request, load, prepare
from analysis.show.listener import Listener
from analysis.show.wording import count, duration, memory

__all__ = ["run_inspection"]


def run_inspection(request: Request, plan: InspectionPlan, *, listener: Listener | None = None) -> Run:
    """Inspect the model of a task and return the results with all that produced them. Nothing is written.

    Args:
        request: which model, on what.
        plan: how many eigenvalues, probes and steps.
        listener: told about progress.

    Raises:
        CurvatureError: whatever stands in the way, with the remedy.
    """
    listener = listener or Listener()
    ready = prepare(*load(request, listener), request, listener)
    objective = ready.objective
    with listener.doing("timing one product"):
        estimate = estimate_cost(objective, plan)
    listener.priced(_in_words(estimate), estimate.num_matvecs + estimate.num_layer_matvecs, "products")
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


def _in_words(estimate: CostEstimate) -> str:
    products = f"{count(estimate.num_matvecs)} Hessian products"
    if estimate.num_layer_matvecs:
        products += f" and {count(estimate.num_layer_matvecs)} with single layers"
    return (
        f"estimate: about {products}, {duration(estimate.seconds)} at {duration(estimate.seconds_per_matvec)} a "
        f"product, up to {memory(estimate.peak_bytes)}"
    )
