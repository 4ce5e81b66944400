"""What becomes of a run of the command: its folder is reserved before the work, then written, and it is printed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

import typer

from analysis.run.draft import Draft
from analysis.run.folder import UNFINISHED
from analysis.run.report import write_report
from analysis.run.reservation import Place, reserve, reserve_free, stem_of
from analysis.run.saving import save_run
from analysis.run.study import StudyRun
from analysis.show.screen import Screen, show_report
from analysis.show.terminal import print_results
from analysis.tasks import Task
from curvature.errors import InputError, WriteError
from curvature.objective.objective import Objective

__all__ = ["Delivery"]

RUNS = Path("runs")


class Delivery:
    """The place of one run, reserved at the latest when its task is there; as a context, it is given up at the end.

    Args:
        screen: where the measurement is told about.
        out: the folder asked for; None for a new one in `runs`.
        overwrite: an earlier run in it, or what was begun there, may be given up.
        as_json: print the results as JSON, and nothing else on standard output.
        resume: go on with what was begun in it; without `out` in the first folder of that name that is unfinished.
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
        resume: bool = False,
        name: str | None = None,
        suffix: str = "",
        num_vectors: int = 0,
    ) -> None:
        self._screen, self._as_json, self._resume = screen, as_json, resume
        self._suffix, self._num_vectors = suffix, num_vectors
        self.place: Place | None = None
        if out is not None:
            self.place = reserve(out, overwrite=overwrite, resume=resume)
        elif name is not None:
            self.place = reserve_free(RUNS, name + suffix)
        else:
            reserve_free(RUNS, "run").release()  # refused before any work
        screen.when_loaded = self._loaded

    def __enter__(self) -> Delivery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.place is None:
            return
        draft, shown = self.draft(), self.place.shown
        if error is None or isinstance(error, WriteError) or (isinstance(error, KeyboardInterrupt) and error.args):
            draft.remove()  # the numbers are written
        draft.remove_if_empty()
        self.place.release()
        if isinstance(error, KeyboardInterrupt) and draft.exists:
            raise type(error)(f"what was found is kept: go on with --resume --out {shown}") from error

    def draft(self) -> Draft:
        """Return where a resumable study keeps what it finds, once there is a place."""
        assert self.place is not None
        return Draft(self.place.folder / UNFINISHED)

    def _loaded(self, task: Task, objective: Objective) -> None:
        stem = task.name + self._suffix
        if self.place is None and self._resume:
            self.place = _unfinished(stem)
        if self.place is None:
            self.place = reserve_free(RUNS, stem)
        self.place.check_room(self._num_vectors * objective.num_params * objective.dtype.itemsize)

    def deliver(self, run: StudyRun) -> None:
        """Write a run with its report, and print it; it is printed, too, where it cannot be written.

        Raises:
            WriteError: if something could not be written, after all else is done.
        """
        screen, place = self._screen, self.place or reserve_free(RUNS, run.name + self._suffix)
        trouble, page = None, place.shown / "report.html"
        try:
            with screen.doing("writing the report"):
                save_run(run, place, finish=lambda folder: write_report(run, folder))
        except WriteError as error:
            trouble = error
        if self._as_json and (failure := print_results(run.to_json())):
            where = place.shown if trouble is None else trouble.folder
            trouble = trouble or WriteError(f"standard output took no results ({failure}); they are in {where}.", where)
        elif not self._as_json:
            show_report(screen, run.report(), None if run.cost is None else run.cost.seconds)
        if trouble is not None:
            raise trouble
        screen.last_line(f"report: {page}")
        failure = screen.output.failure
        if isinstance(failure, BrokenPipeError):  # whoever read has seen enough
            typer.echo(f"report: {page}", err=True)
        elif failure is not None and not self._as_json:
            raise WriteError(f"standard output took no more ({failure}); the run is in {place.shown}.", place.shown)


def _unfinished(stem: str) -> Place | None:
    """Reserve the first folder of that name that was begun, not finished, and is not being written now."""
    base = stem_of(stem)
    numbers = [path.parent.name.removeprefix(f"{base}-") for path in RUNS.glob(f"*/{UNFINISHED}")]
    for number in sorted(int(n) for n in numbers if n.isdigit()):
        with contextlib.suppress(InputError):
            return reserve(RUNS / f"{base}-{number}", resume=True)
    return None
