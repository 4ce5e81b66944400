"""The command `curvature`, also as `python -m analysis.cli`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvature.errors import CurvatureError, InputError

if TYPE_CHECKING:
    from analysis.preparation import Request
    from analysis.studies.study import Study

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

# -- what several commands take ---------------------------------------------------------------------------------------

TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help="A bundled name (digits-cnn, digits-mlp), file.py:function or package.module:function."
    ),
]
Checkpoint = Annotated[Path | None, typer.Option(metavar="FILE", help="Parameters to load into the model.")]
Params = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Only parameters or modules that match; may be given several times."),
]
Device = Annotated[
    str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: where the task has its model.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random numbers.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder. Default: a new one in runs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Skip the self-check of model, loss and data.")]
MicroBatch = Annotated[
    int | None, typer.Option(metavar="N", help="Cut batches into pieces of at most N examples, to save memory.")
]

# -- commands ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="curvature")
    except KeyboardInterrupt:  # before or after the command's own handler
        sys.exit(130)


@app.callback()
def curvature() -> None:
    """Second-order information about trained models."""


@app.command()
def inspect(
    task: TaskName,
    checkpoint: Checkpoint = None,
    params: Params = None,
    k: Annotated[int, typer.Option("--k", help="How many of the largest eigenvalues.")] = 10,
    rtol: Annotated[float, typer.Option(help="Residual of the largest eigenpairs, relative to the eigenvalue.")] = 1e-3,
    device: Device = None,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    no_layers: Annotated[bool, typer.Option("--no-layers", help="Inspect the whole only, not each layer.")] = False,
    coupling: Annotated[
        bool, typer.Option("--coupling", help="Measure how strongly layers act on each other, too.")
    ] = False,
    micro_batch: MicroBatch = None,
) -> None:
    """Inspect the curvature of a trained model: print a table, and write a run folder with a report."""
    with _errors_as_sentences():
        from analysis.plan import InspectionPlan
        from analysis.report import write_report
        from analysis.screen import Screen
        from analysis.store import check_destination, free_folder, save_run
        from analysis.workflow import run_inspection

        plan = InspectionPlan(k=k, rtol=rtol, layers=not no_layers, coupling=coupling)
        check_destination(out or free_folder(Path("runs"), "run"), overwrite=overwrite)
        screen = Screen(stderr=as_json)
        with screen:
            request = _request(task, checkpoint, params, device, micro_batch, seed, no_check)
            run = run_inspection(request, plan, listener=screen)
        folder = out or free_folder(Path("runs"), run.name)
        with screen.doing("writing the report"):
            save_run(run, folder, overwrite=overwrite, finish=write_report)
        if as_json:
            typer.echo(json.dumps(run.to_dict(), ensure_ascii=False, allow_nan=False))
        else:
            screen.show(run.inspection)
        screen.last_line(f"report: {folder / 'report.html'}")


@app.command()
def landscape(
    task: TaskName,
    directions: Annotated[
        str,
        typer.Option(help="random, eigenvectors, gradient, pca (of --trajectory) or path (of --to with --curve)."),
    ] = "auto",
    scaling: Annotated[str, typer.Option(help="Of random directions: filter, layer, raw or unit.")] = "filter",
    scale_biases: Annotated[
        bool, typer.Option("--scale-biases", help="Move biases and normalisation parameters, too.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Look at the way to this checkpoint, too.")
    ] = None,
    curve: Annotated[
        int, typer.Option(metavar="N", help="Spend N gradients on a curved way to --to that avoids high loss.")
    ] = 0,
    trajectory: Annotated[
        list[Path] | None,
        typer.Option(metavar="CHECKPOINT", help="A checkpoint of the training; in order of time, several times."),
    ] = None,
    points: Annotated[int, typer.Option(help="Points along each axis.")] = 31,
    radius: Annotated[
        float | None, typer.Option(metavar="R", help="Steps run from -R to R. Default: what shows the valley.")
    ] = None,
    plane: Annotated[bool, typer.Option("--plane/--line", help="Look at a plane, or along lines only.")] = True,
    checkpoint: Checkpoint = None,
    params: Params = None,
    device: Device = None,
    seed: Seed = 0,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a landscape that was interrupted.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    micro_batch: MicroBatch = None,
) -> None:
    """Look at the loss around a trained model: along directions, on a plane, on the way to another checkpoint."""
    with _errors_as_sentences():
        from analysis.landscape_plan import LandscapePlan
        from analysis.landscape_report import write_landscape_report
        from analysis.landscape_screen import LandscapeScreen
        from analysis.landscape_store import Draft, place_of_run
        from analysis.landscape_workflow import run_landscape
        from analysis.store import save_run

        plan = LandscapePlan(
            directions=directions,  # type: ignore[arg-type]  # checked there
            scaling=scaling,  # type: ignore[arg-type]  # likewise
            scale_vectors=scale_biases,
            points=points,
            radius=radius,
            plane=plane,
            curve=curve,
        )
        if out is not None:
            place_of_run("", out, resume=resume, overwrite=overwrite)
        places: list[tuple[Path, Draft]] = []

        def draft(name: str) -> Draft:
            places.append(place_of_run(name, out, resume=resume, overwrite=overwrite))
            return places[0][1]

        screen = LandscapeScreen(stderr=as_json)
        try:
            with screen:
                request = _request(task, checkpoint, params, device, micro_batch, seed, no_check)
                run = run_landscape(request, plan, to=to, trajectory=trajectory or (), draft=draft, listener=screen)
        except KeyboardInterrupt:
            for _, unfinished in places:
                unfinished.remove_if_empty()
            if not places or not places[0][1].exists:
                raise
            typer.echo(f"stopped; what was found is kept: go on with --resume --out {places[0][0]}", err=True)
            raise typer.Exit(130) from None
        except CurvatureError:
            for _, unfinished in places:
                unfinished.remove_if_empty()
            raise
        folder, unfinished = places[0]
        with screen.doing("writing the report"):
            save_run(run, folder, overwrite=overwrite, finish=write_landscape_report)
        unfinished.remove()
        if as_json:
            typer.echo(json.dumps(run.to_dict(), ensure_ascii=False, allow_nan=False))
        else:
            screen.show_landscape(run.landscape)
        screen.last_line(f"report: {folder / 'report.html'}")


@app.command()
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
    with _errors_as_sentences():
        from analysis.studies.sharpness import SHARPNESS, SharpnessPlan

        plan = SharpnessPlan(
            measures=tuple(measure) if measure else None,
            rho=rho,
            adaptive_rho=adaptive_rho,
            num_probes=num_probes,
            num_matvecs=num_matvecs,
            piece=piece,
        )
        request = _request(task, checkpoint, params, device, micro_batch, seed, no_check)
        _run_study(SHARPNESS, request, plan, out=out, overwrite=overwrite, as_json=as_json)


@app.command()
def conditioning(
    task: TaskName,
    matrix: Annotated[str, typer.Option(help="hessian or ggn.")] = "hessian",
    floor: Annotated[float, typer.Option(help="Leave out eigenvalues below this share of the largest.")] = 1e-6,
    block_diagonal: Annotated[
        bool, typer.Option("--block-diagonal", help="Try the layers' own blocks as a preconditioner, built in full.")
    ] = False,
    no_layers: Annotated[bool, typer.Option("--no-layers", help="Look at the whole only, not each layer.")] = False,
    checkpoint: Checkpoint = None,
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
    with _errors_as_sentences():
        from analysis.studies.conditioning import CONDITIONING, ConditioningPlan

        plan = ConditioningPlan(
            matrix=matrix,  # type: ignore[arg-type]  # checked there
            floor=floor,
            block_diagonal=block_diagonal,
            layers=not no_layers,
        )
        request = _request(task, checkpoint, params, device, micro_batch, seed, no_check)
        _run_study(CONDITIONING, request, plan, out=out, overwrite=overwrite, as_json=as_json)


@app.command()
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
    with _errors_as_sentences():
        from analysis.studies.critical import CRITICAL, CriticalPlan

        plan = CriticalPlan(
            significance=significance,
            gradient_tolerance=gradient_tolerance,
            flatness=flatness,
            symmetries=not no_symmetries,
        )
        request = _request(task, checkpoint, params, device, micro_batch, seed, no_check)
        _run_study(CRITICAL, request, plan, out=out, overwrite=overwrite, as_json=as_json)


@app.command()
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
    with _errors_as_sentences():
        from analysis.studies.noise import NOISE, NoisePlan

        plan = NoisePlan(batch_size=batch_size, lr=lr, curvature=curvature, damping=damping)
        request = _request(task, checkpoint, params, device, micro_batch, seed, no_check)
        _run_study(NOISE, request, plan, out=out, overwrite=overwrite, as_json=as_json)


@app.command()
def implicit(
    task: TaskName,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD.")],
    batch_size: Annotated[
        int | None, typer.Option(help="In examples. Default: the batches of the task as they are.")
    ] = None,
    momentum: Annotated[float, typer.Option(help="Heavy-ball momentum of SGD.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 0.0,
    k: Annotated[int, typer.Option("--k", help="How many of the sharpest directions to look against.")] = 3,
    no_directions: Annotated[
        bool, typer.Option("--no-directions", help="Only the penalties, not where they push.")
    ] = False,
    checkpoint: Checkpoint = None,
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
    with _errors_as_sentences():
        from analysis.studies.implicit import IMPLICIT, ImplicitPlan

        plan = ImplicitPlan(
            lr=lr,
            batch_size=batch_size,
            momentum=momentum,
            weight_decay=weight_decay,
            directions=not no_directions,
            k=k,
        )
        request = _request(task, checkpoint, params, device, micro_batch, seed, no_check)
        _run_study(IMPLICIT, request, plan, out=out, overwrite=overwrite, as_json=as_json)


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run folders of one kind; or a task, with several of --checkpoint."),
    ],
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Measure the task with these parameters; may be given several times."),
    ] = None,
    of: Annotated[
        str, typer.Option(help="What to measure of checkpoints: inspection, sharpness or noise.")
    ] = "inspection",
    level: Annotated[float, typer.Option(help="How likely any false alarm may be, over all numbers.")] = 0.05,
    params: Params = None,
    device: Device = None,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    micro_batch: MicroBatch = None,
) -> None:
    """Compare runs, or checkpoints of a task: which differences are real, and which are noise of measuring."""
    with _errors_as_sentences():
        from analysis.store import check_destination, free_folder, save_run
        from analysis.studies.checkpoints import measure_checkpoints, read_runs
        from analysis.studies.comparison import account_of_comparison, compare_runs
        from analysis.studies.registry import KINDS
        from analysis.studies.screen import StudyScreen

        check_destination(out or free_folder(Path("runs"), "run"), overwrite=overwrite)
        screen = StudyScreen(stderr=as_json)
        if checkpoint:
            if len(what) > 1:
                raise InputError(f"--checkpoint goes with one task, got {len(what)}: {', '.join(what)}.")
            request = _request(what[0], None, params, device, micro_batch, seed, no_check)
            with screen:
                runs, folders = measure_checkpoints(request, checkpoint, of, parent=Path("runs"), listener=screen)
        else:
            folders = [Path(folder) for folder in what]
            runs = read_runs(folders)
        command = shlex.join(["curvature", *sys.argv[1:]])
        run = compare_runs(runs, folders, level=level, command=command)
        folder = out or free_folder(Path("runs"), "comparison")
        with screen.doing("writing the report"):
            save_run(run, folder, overwrite=overwrite, finish=KINDS[run.kind].write_report)
        if as_json:
            typer.echo(json.dumps(run.to_dict(), ensure_ascii=False, allow_nan=False))
        else:
            screen.tell(run, account_of_comparison(run))
        screen.last_line(f"report: {folder / 'report.html'}")


# -- what they share --------------------------------------------------------------------------------------------------


def _request(
    task: str,
    checkpoint: Path | None,
    params: list[str] | None,
    device: str | None,
    micro_batch: int | None,
    seed: int,
    no_check: bool,
) -> Request:
    from analysis.preparation import Request

    return Request(
        task=task,
        checkpoint=checkpoint,
        params=params,
        device=device,
        micro_batch=micro_batch,
        seed=seed,
        check=not no_check,
        command=shlex.join(["curvature", *sys.argv[1:]]),
    )


def _run_study(
    study: Study[Any, Any], request: Request, plan: object, *, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Measure, write the run folder with its report, and print what it says."""
    from analysis.store import check_destination, free_folder, save_run
    from analysis.studies.registry import KINDS
    from analysis.studies.screen import StudyScreen
    from analysis.studies.study import run_study

    check_destination(out or free_folder(Path("runs"), "run"), overwrite=overwrite)
    screen = StudyScreen(stderr=as_json)
    with screen:
        run = run_study(study, request, plan, listener=screen)
    folder = out or free_folder(Path("runs"), f"{run.name}-{run.kind}")
    with screen.doing("writing the report"):
        save_run(run, folder, overwrite=overwrite, finish=KINDS[run.kind].write_report)
    if as_json:
        typer.echo(json.dumps(run.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        screen.tell(run, study.account(run))
    screen.last_line(f"report: {folder / 'report.html'}")


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Turn what a user can mend into one sentence on stderr and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except CurvatureError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was written.", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    main()
