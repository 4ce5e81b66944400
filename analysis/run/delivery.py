"""What becomes of a run of the command: its folder is reserved before the work, then written, and it is printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import typer

from analysis.run.reservation import Place, check_destination, free_folder, reserve, reserve_free
from analysis.run.saving import save_run
from analysis.run.store import Record
from analysis.show.screen import Screen
from analysis.show.terminal import print_results
from analysis.tasks import Task
from curvature.errors import WriteError
from curvature.objective.objective import Objective

__all__ = ["Delivery"]

RUNS = Path("runs")


class Delivery:
    """The place of one run, reserved at the latest when its task is there; as a context, it is given up at the end.

    Args:
        screen: where the measurement is told about.
        out: the folder asked for; None for a new one in `runs`.
        overwrite: an earlier run in it may be replaced.
        as_json: print the results as JSON, and nothing else on standard output.
        name: of a new folder; None for that of the task.
        suffix: of the name of a new folder.
        num_vectors: how many vectors as long as the parameters the run will hold.
    """

    def __init__(
        self,
        screen: Screen,
        out: Path | None,
        *,
        overwrite: bool,
        as_json: bool,
        name: str | None = None,
        suffix: str = "",
        num_vectors: int = 0,
    ) -> None:
        self._screen, self._as_json, self._suffix, self._num_vectors = screen, as_json, suffix, num_vectors
        self.place: Place | None = None
        if out is not None:
            self.place = reserve(out, overwrite=overwrite)
        elif name is not None:
            self.place = reserve_free(RUNS, name + suffix)
        else:
            check_destination(free_folder(RUNS, "run"))
        screen.when_loaded = self._loaded

    def __enter__(self) -> Delivery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.place is not None:
            self.place.release()

    def _loaded(self, task: Task, objective: Objective) -> None:
        if self.place is None:
            self.place = reserve_free(RUNS, task.name + self._suffix)
        self.place.check_room(self._num_vectors * objective.num_params * objective.dtype.itemsize)

    def deliver(self, run: Record, write_report: Callable[[Path], object], show: Callable[[], object]) -> None:
        """Write a run with its report, and print it; it is printed, too, where it cannot be written.

        Raises:
            WriteError: if something could not be written, after all else is done.
        """
        place = self.place or reserve_free(RUNS, run.name + self._suffix)
        deliver(self._screen, place, run, write_report, show, as_json=self._as_json)


def deliver(
    screen: Screen,
    place: Place,
    run: Record,
    write_report: Callable[[Path], object],
    show: Callable[[], object],
    *,
    as_json: bool,
) -> None:
    """Write a run with its report to a reserved place, and print it; see `Delivery.deliver`."""
    trouble, report = None, place.shown / "report.html"
    try:
        with screen.doing("writing the report"):
            save_run(run, place, finish=write_report)
    except WriteError as error:
        trouble = error
    if as_json and (failure := print_results(run.to_json())):
        where = place.shown if trouble is None else trouble.folder
        trouble = trouble or WriteError(f"standard output took no results ({failure}); they are in {where}.", where)
    elif not as_json:
        show()
    if trouble is not None:
        raise trouble
    screen.last_line(f"report: {report}")
    failure = screen.output.failure
    if isinstance(failure, BrokenPipeError):  # whoever read has seen enough
        typer.echo(f"report: {report}", err=True)
    elif failure is not None and not as_json:
        raise WriteError(f"standard output took no more ({failure}); the run is in {place.shown}.", place.shown)
