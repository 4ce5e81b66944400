"""The command `curvature`, also as `python -m analysis.cli`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from curvature.errors import CurvatureError

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


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
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK", help="A bundled name (digits-cnn, digits-mlp), file.py:function or package.module:function."
        ),
    ],
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="Parameters to load into the model.")] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only parameters or modules that match; may be given several times."),
    ] = None,
    k: Annotated[int, typer.Option("--k", help="How many of the largest eigenvalues.")] = 10,
    rtol: Annotated[float, typer.Option(help="Residual of the largest eigenpairs, relative to the eigenvalue.")] = 1e-3,
    device: Annotated[
        str | None,
        typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: where the task has its model."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random probes.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder. Default: runs/TASK-n.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the self-check of model, loss and data.")] = False,
    no_layers: Annotated[bool, typer.Option("--no-layers", help="Inspect the whole only, not each layer.")] = False,
    coupling: Annotated[
        bool, typer.Option("--coupling", help="Measure how strongly layers act on each other, too.")
    ] = False,
    micro_batch: Annotated[
        int | None, typer.Option(metavar="N", help="Cut batches into pieces of at most N examples, to save memory.")
    ] = None,
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
            run = run_inspection(
                task,
                plan,
                checkpoint=checkpoint,
                params=params,
                device=device,
                micro_batch=micro_batch,
                seed=seed,
                check=not no_check,
                command=shlex.join(["curvature", *sys.argv[1:]]),
                listener=screen,
            )
        folder = out or free_folder(Path("runs"), run.name)
        with screen.doing("writing the report"):
            save_run(run, folder, overwrite=overwrite, finish=write_report)
        if as_json:
            typer.echo(json.dumps(run.to_dict(), ensure_ascii=False, allow_nan=False))
        else:
            screen.show(run.inspection)
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
