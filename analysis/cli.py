"""The command `curvature`, also as `python -m analysis.cli`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from analysis import commands
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
from analysis.run.signals import ends_as_interrupt, open_closed_streams
from curvature.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    """Run the command line."""
    open_closed_streams()
    ends_as_interrupt()
    try:
        app(prog_name="curvature")
    except KeyboardInterrupt:  # before or after the command's own handler
        sys.exit(130)


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"curvature {version('torch-curvature')}")
        except PackageNotFoundError:
            typer.echo("curvature, of a checkout that is not installed")
        raise typer.Exit


@app.callback()
def curvature(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Second-order information about trained models."""
    del version


@app.command()
def inspect(
    task: TaskName,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
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
    with errors_as_sentences():
        from analysis.inspection.plan import InspectionPlan
        from analysis.inspection.report import write_report
        from analysis.inspection.screen import show_inspection
        from analysis.inspection.study import run_inspection
        from analysis.run.delivery import Delivery
        from analysis.show.screen import Screen

        plan = InspectionPlan(k=k, rtol=rtol, layers=not no_layers, coupling=coupling)
        screen = Screen(stderr=as_json)
        vectors = plan.k + plan.num_bottom
        with Delivery(screen, out, overwrite=overwrite, as_json=as_json, num_vectors=vectors) as delivery:
            with screen:
                request = request_of(task, checkpoint, checkpoint_key, params, device, micro_batch, seed, no_check)
                run = run_inspection(request, plan, listener=screen)
            delivery.deliver(run, write_report, lambda: show_inspection(screen, run.inspection))


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
    checkpoint_key: CheckpointKey = None,
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
    with errors_as_sentences():
        from analysis.landscape.plan import LandscapePlan
        from analysis.landscape.report import write_landscape_report
        from analysis.landscape.screen import show_landscape
        from analysis.landscape.store import LandscapePlace
        from analysis.landscape.study import run_landscape
        from analysis.run.delivery import deliver
        from analysis.show.screen import Screen

        plan = LandscapePlan(
            directions=directions,  # type: ignore[arg-type]  # checked there
            scaling=scaling,  # type: ignore[arg-type]  # likewise
            scale_vectors=scale_biases,
            points=points,
            radius=radius,
            plane=plane,
            curve=curve,
        )
        screen = Screen(stderr=as_json)
        with LandscapePlace(out, resume=resume, overwrite=overwrite) as place:
            with screen:
                request = request_of(
                    task,
                    checkpoint,
                    checkpoint_key,
                    params,
                    device,
                    micro_batch,
                    seed,
                    no_check,
                    [*([to] if to else []), *(trajectory or ())],
                )
                run = run_landscape(
                    request, plan, to=to, trajectory=trajectory or (), draft=place.draft, listener=screen
                )
            deliver(
                screen,
                place.reserved,
                run,
                write_landscape_report,
                lambda: show_landscape(screen, run.landscape),
                as_json=as_json,
            )


for study in (commands.sharpness, commands.conditioning, commands.critical, commands.noise, commands.implicit):
    app.command()(study)


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
    checkpoint_key: CheckpointKey = None,
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
    with errors_as_sentences():
        from analysis.compare.study import account_of_comparison, compare_runs
        from analysis.registry import KINDS, measure_checkpoints, read_runs
        from analysis.run.delivery import Delivery
        from analysis.show.screen import Screen
        from analysis.show.study_screen import show_study

        screen = Screen(stderr=as_json)
        with Delivery(screen, out, overwrite=overwrite, as_json=as_json, name="comparison") as delivery:
            if checkpoint:
                if len(what) > 1:
                    raise InputError(f"--checkpoint goes with one task, got {len(what)}: {', '.join(what)}.")
                request = request_of(
                    what[0], None, checkpoint_key, params, device, micro_batch, seed, no_check, checkpoint
                )
                try:
                    with screen:
                        runs, folders = measure_checkpoints(
                            request, checkpoint, of, parent=Path("runs"), listener=screen
                        )
                except KeyboardInterrupt as stop:
                    raise type(stop)("checkpoints that were measured have their folders in runs.") from stop
            else:
                if checkpoint_key is not None:
                    raise InputError("--checkpoint-key goes with --checkpoint, not with runs; leave it out.")
                folders = [Path(folder) for folder in what]
                runs = read_runs(folders)
            command = shlex.join(["curvature", *sys.argv[1:]])
            run = compare_runs(runs, folders, level=level, command=command)
            delivery.deliver(
                run, KINDS[run.kind].write_report, lambda: show_study(screen, account_of_comparison(run), None)
            )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Write the report of a run that is there, anew or because it is missing."""
    with errors_as_sentences():
        from analysis.registry import KINDS, load_any
        from analysis.run.store import add_report, kind_of
        from analysis.show.terminal import print_results

        load_any(run)
        add_report(run, KINDS[kind_of(run)].write_report)
        print_results(f"report: {run / 'report.html'}")


if __name__ == "__main__":
    main()
