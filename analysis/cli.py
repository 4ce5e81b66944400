"""The command `curvature`, also as `python -m analysis.cli`."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from analysis.records.plan import setting
from analysis.registry import STUDIES
from analysis.run.options import command, errors_as_sentences, made
from analysis.run.signals import ends_as_interrupt, open_closed_streams

__all__ = ["app", "main"]


@dataclass(frozen=True, kw_only=True)
class _Output:
    """Where results go."""

    out: Path | None = setting(None, "The run folder. Default: a new one in runs.", flag="--out DIR")
    overwrite: bool = setting(False, "Replace an earlier run in --out.")
    as_json: bool = setting(False, "Print the results as JSON on stdout, and nothing else there.", flag="--json")


@dataclass(frozen=True, kw_only=True)
class _Resumed(_Output):
    resume: bool = setting(False, "Continue an interrupted run.")


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """What is compared."""

    what: tuple[str, ...] = setting(
        flag="RUN...", text="Run folders of one kind; or a task, with several of --checkpoint."
    )
    checkpoint: tuple[Path, ...] = setting(
        (), "Measure the task with these parameters; may be given several times.", flag="--checkpoint FILE"
    )
    of: str = setting("inspect", "What to measure at each checkpoint: inspect, sharpness, noise or another command.")
    level: float = setting(0.05, "Family-wise error level.")


_SUMMARIES = {kind: summary for kind, (_, summary) in STUDIES.items()}
_SUMMARIES["compare"] = (
    "Compare runs, or checkpoints of a task: which differences are real, and which are measurement noise."
)


class _Commands(TyperGroup):
    """The commands that have the options of plans, which are imported when one of them is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*_SUMMARIES, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command to be listed."""
        if cmd_name in _SUMMARIES:
            return TyperCommand(cmd_name, help=_SUMMARIES[cmd_name])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return a command to be run."""
        name, found, rest = super().resolve_command(ctx, args)
        if name in _SUMMARIES:
            found = _compare_command() if name == "compare" else _study_command(str(name))
        return name, found, rest


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    """Run the command line."""
    open_closed_streams()
    ends_as_interrupt()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            app(prog_name="curvature")
        else:
            from analysis.run.processes import of_torchrun

            with of_torchrun(sys.argv[1:]) as arguments:
                app(arguments, prog_name="curvature")
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


def _line() -> str:
    return shlex.join(["curvature", *sys.argv[1:]])


def _study_command(kind: str) -> TyperCommand:
    from analysis.registry import study
    from analysis.run.preparation import Request
    from curvature.errors import InputError

    found = study(kind)

    def run(given: dict[str, Any]) -> None:
        from analysis.run.delivery import Delivery
        from analysis.run.study import run_study
        from analysis.show.screen import Screen

        plan, request = made(found.plan, given), made(Request, given, command=_line())
        if request.checkpoint_key and not request.checkpoint and not {"to", "trajectory"} & given.keys():
            raise InputError("--checkpoint-key chooses within a checkpoint; name its file, or leave the key out.")
        screen, suffix = Screen(stderr=given["as_json"]), "" if kind == "inspect" else f"-{kind}"
        with Delivery(
            screen, **vars(made(output, given)), suffix=suffix, num_vectors=found.num_vectors(plan)
        ) as delivery:
            with screen:
                draft = delivery.draft if found.resumable else lambda: None
                record = run_study(found, request, plan, draft=draft, listener=screen)
            delivery.deliver(record)

    output = _Resumed if found.resumable else _Output
    return command(kind, _SUMMARIES[kind], (found.plan, Request, output), run)


def _compare_command() -> TyperCommand:
    from analysis.run.preparation import Request
    from curvature.errors import InputError

    def run(given: dict[str, Any]) -> None:
        from analysis.compare.study import compare_runs
        from analysis.registry import load_run, measure_checkpoints
        from analysis.run.delivery import Delivery
        from analysis.show.screen import Screen

        asked, screen = made(_Compared, given), Screen(stderr=given["as_json"])
        with Delivery(screen, **vars(made(_Output, given)), name="comparison") as delivery:
            if asked.checkpoint:
                if len(asked.what) > 1:
                    raise InputError(f"--checkpoint goes with one task, got {', '.join(asked.what)}.")
                request = made(Request, given, task=asked.what[0], checkpoint=None, command=_line())
                try:
                    with screen:
                        runs, folders = measure_checkpoints(
                            request, asked.checkpoint, asked.of, parent=Path("runs"), listener=screen
                        )
                except KeyboardInterrupt as stop:
                    raise type(stop)("checkpoints that were measured have their folders in runs.") from stop
            else:
                if "checkpoint_key" in given:
                    raise InputError("--checkpoint-key goes with --checkpoint, not with runs; leave it out.")
                folders = [Path(folder) for folder in asked.what]
                if len(folders) < 2:
                    raise InputError("give at least two run folders, or a task with at least two of --checkpoint.")
                runs = [load_run(folder) for folder in folders]
            delivery.deliver(compare_runs(runs, folders, level=asked.level, command=_line()))

    options = command("compare", _SUMMARIES["compare"], (_Compared, Request, _Output), run)
    options.params = [option for option in options.params if option.name != "task"]
    return options


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Write the report of a stored run again."""
    with errors_as_sentences():
        from analysis.registry import load_run
        from analysis.run.report import write_report
        from analysis.run.saving import add_report
        from analysis.show.terminal import print_results

        record = load_run(run)
        add_report(run, lambda folder: write_report(record, folder))
        print_results(f"report: {run / 'report.html'}")


if __name__ == "__main__":
    main()
