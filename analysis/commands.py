"""The commands of studies: their options, their plans, and what happens from there to the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.run.options import (
    AsJson,
    Checkpoint,
    CheckpointKey,
    Device,
    MicroBatch,
    NoCheck,
    Out,
    Overwrite,
    Params,
    Seed,
    TaskName,
    errors_as_sentences,
    request_of,
)

if TYPE_CHECKING:
    from analysis.run.preparation import Request
    from analysis.run.study import Study

__all__ = ["conditioning", "critical", "implicit", "noise", "sharpness"]


def sharpness(
    task: TaskName,
    measure: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this measure; may be given several times.")
    ] = None,
    rho: Annotated[float, typer.Option(help="Length of a perturbation.")] = 0.05,
    adaptive_rho: Annotated[float, typer.Option(help="The same, relative to the parameters.")] = 0.5,
    num_probes: Annotated[int, typer.Option(help="Pairs of noise for averages.")] = 16,
    num_matvecs: Annotated[int, typer.Option(help="Products for a trace or a norm.")] = 32,
    piece: Annotated[int, typer.Option(help="Examples of a piece of m-sharpness.")] = 32,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    params: Params = None,
    device: Device = None,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    micro_batch: MicroBatch = None,
) -> None:
    """Measure sharpness by all measures that people compare, with what each is invariant to."""
    with errors_as_sentences():
        from analysis.sharpness.study import SHARPNESS, SharpnessPlan

        plan = SharpnessPlan(
            measures=tuple(measure) if measure else None,
            rho=rho,
            adaptive_rho=adaptive_rho,
            num_probes=num_probes,
            num_matvecs=num_matvecs,
            piece=piece,
        )
        request = request_of(task, checkpoint, checkpoint_key, params, device, micro_batch, seed, no_check)
        _run(SHARPNESS, request, plan, out=out, overwrite=overwrite, as_json=as_json)


def conditioning(
    task: TaskName,
    matrix: Annotated[str, typer.Option(help="hessian or ggn.")] = "hessian",
    floor: Annotated[float, typer.Option(help="Leave out eigenvalues below this share of the largest.")] = 1e-6,
    block_diagonal: Annotated[
        bool, typer.Option("--block-diagonal", help="Try the layers' own blocks as a preconditioner, built in full.")
    ] = False,
    no_layers: Annotated[bool, typer.Option("--no-layers", help="Look at the whole only, not each layer.")] = False,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    params: Params = None,
    device: Device = None,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    micro_batch: MicroBatch = None,
) -> None:
    """Measure how ill-conditioned a loss is, layer by layer, and what preconditioners would gain."""
    with errors_as_sentences():
        from analysis.conditioning.study import CONDITIONING, ConditioningPlan

        plan = ConditioningPlan(
            matrix=matrix,  # type: ignore[arg-type]  # checked there
            floor=floor,
            block_diagonal=block_diagonal,
            layers=not no_layers,
        )
        request = request_of(task, checkpoint, checkpoint_key, params, device, micro_batch, seed, no_check)
        _run(CONDITIONING, request, plan, out=out, overwrite=overwrite, as_json=as_json)


def critical(
    task: TaskName,
    significance: Annotated[float, typer.Option(help="p-value below which the gradient counts as not zero.")] = 0.01,
    gradient_tolerance: Annotated[
        float | None, typer.Option(help="Length up to which the gradient counts as zero. Default: rounding.")
    ] = None,
    flatness: Annotated[
        float, typer.Option(help="Share of the largest eigenvalue within which one counts as zero.")
    ] = 1e-3,
    no_symmetries: Annotated[bool, typer.Option("--no-symmetries", help="Do not try scales of layers.")] = False,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    params: Params = None,
    device: Device = None,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    micro_batch: MicroBatch = None,
) -> None:
    """Judge whether a point is a minimum, a saddle, a plateau or none of them, and where the loss falls."""
    with errors_as_sentences():
        from analysis.critical.study import CRITICAL, CriticalPlan

        plan = CriticalPlan(
            significance=significance,
            gradient_tolerance=gradient_tolerance,
            flatness=flatness,
            symmetries=not no_symmetries,
        )
        request = request_of(task, checkpoint, checkpoint_key, params, device, micro_batch, seed, no_check)
        _run(CRITICAL, request, plan, out=out, overwrite=overwrite, as_json=as_json)


def noise(
    task: TaskName,
    batch_size: Annotated[int | None, typer.Option(help="Batch size of the training, to judge it.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the training, to judge its steps.")] = None,
    curvature: Annotated[
        bool, typer.Option("--curvature/--no-curvature", help="Look at how noise lies against curvature, too.")
    ] = True,
    damping: Annotated[
        float | None, typer.Option(help="Solve for the Takeuchi criterion with this much on the diagonal, too.")
    ] = None,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    params: Params = None,
    device: Device = None,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    micro_batch: MicroBatch = None,
) -> None:
    """Measure the noise of stochastic gradients: noise scale, critical batch size, which layers carry it."""
    with errors_as_sentences():
        from analysis.noise.study import NOISE, NoisePlan

        plan = NoisePlan(batch_size=batch_size, lr=lr, curvature=curvature, damping=damping)
        request = request_of(task, checkpoint, checkpoint_key, params, device, micro_batch, seed, no_check)
        _run(NOISE, request, plan, out=out, overwrite=overwrite, as_json=as_json)


def implicit(
    task: TaskName,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD.")],
    batch_size: Annotated[
        int | None, typer.Option(help="In examples. Default: the batches of the task as they are.")
    ] = None,
    drop_last: Annotated[
        bool, typer.Option("--drop-last", help="An epoch leaves out the examples that fill no batch.")
    ] = False,
    momentum: Annotated[float, typer.Option(help="Heavy-ball momentum of SGD.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 0.0,
    k: Annotated[int, typer.Option("--k", help="How many of the sharpest directions to look against.")] = 3,
    no_directions: Annotated[
        bool, typer.Option("--no-directions", help="Only the penalties, not where they push.")
    ] = False,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    params: Params = None,
    device: Device = None,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    micro_batch: MicroBatch = None,
) -> None:
    """Measure what SGD adds to the loss: the penalties on the gradient and on its variance over batches."""
    with errors_as_sentences():
        from analysis.implicit.study import IMPLICIT, ImplicitPlan

        plan = ImplicitPlan(
            lr=lr,
            batch_size=batch_size,
            drop_last=drop_last,
            momentum=momentum,
            weight_decay=weight_decay,
            directions=not no_directions,
            k=k,
        )
        request = request_of(task, checkpoint, checkpoint_key, params, device, micro_batch, seed, no_check)
        _run(IMPLICIT, request, plan, out=out, overwrite=overwrite, as_json=as_json)


def _run(
    study: Study[Any, Any], request: Request, plan: object, *, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Measure, write the run folder with its report, and print what it says."""
    from analysis.registry import KINDS
    from analysis.run.delivery import Delivery
    from analysis.run.study import run_study
    from analysis.show.screen import Screen
    from analysis.show.study_screen import show_study

    screen, kind = Screen(stderr=as_json), study.record.kind
    with Delivery(screen, out, overwrite=overwrite, as_json=as_json, suffix=f"-{kind}") as delivery:
        with screen:
            run = run_study(study, request, plan, listener=screen)
        seconds = None if run.cost is None else run.cost.seconds
        delivery.deliver(run, KINDS[kind].write_report, lambda: show_study(screen, study.account(run), seconds))
