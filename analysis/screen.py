"""What the command shows on a terminal: what it is about to cost, how far it has come, and the tables at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from analysis import wording
from analysis.measured import Measured
from analysis.results import CostEstimate, Inspection
from analysis.tasks import Task
from analysis.terminal import Output
from analysis.workflow import InspectionListener
from curvature.objective import Objective

__all__ = ["Screen", "new_table"]

_PLAIN_WIDTH = 132  # of files and pipes, which have no width of their own


class Screen(InspectionListener):
    """A console that listens to an inspection; as a context, it takes the progress bar away at the end.

    Args:
        stderr: write there instead of to stdout, which is then left to the results.
    """

    unit = "products"
    """What the progress bar counts."""

    def __init__(self, *, stderr: bool) -> None:
        self.output = output = Output(stderr=stderr)
        width = None if output.isatty() else _PLAIN_WIDTH
        self._console = Console(file=output, highlight=False, markup=False, emoji=False, width=width)  # type: ignore[arg-type]
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{self.unit}, left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._bar = self._progress.add_task("starting", total=None, visible=False)

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def loaded(self, task: Task, objective: Objective) -> None:
        self._console.print(f"{task.name}: {task.description}" if task.description else task.name)
        size = f"{wording.count(objective.num_params)} parameters in {len(objective.space.names)} tensors"
        self._console.print(f"{size}, {str(objective.dtype).removeprefix('torch.')} on {objective.device}")

    def doing(self, what: str) -> AbstractContextManager[object]:
        self._progress.stop()  # of an earlier measurement: one display at a time
        return self._console.status(what)

    def estimated(self, estimate: CostEstimate) -> None:
        products = f"{wording.count(estimate.num_matvecs)} Hessian products"
        if estimate.num_layer_matvecs:
            products += f" and {wording.count(estimate.num_layer_matvecs)} with single layers"
        self._console.print(
            f"estimate: about {products}, {wording.duration(estimate.seconds)} at "
            f"{wording.duration(estimate.seconds_per_matvec)} a product, up to {wording.memory(estimate.peak_bytes)}"
        )
        self.begin(estimate.num_matvecs + estimate.num_layer_matvecs)

    def begin(self, total: int) -> None:
        """Show the bar, of so many products or points."""
        self._progress.update(self._bar, total=total, visible=True)
        self._progress.start()

    def say(self, what: str | Table) -> None:
        """Print a line or a table."""
        self._console.print(what)

    def advanced(self, stage: str, done: int, planned: int) -> None:
        self._progress.update(self._bar, description=stage, completed=done, total=planned)

    def show(self, inspection: Inspection) -> None:
        """Print all numbers with their uncertainties, the whole first and then layer by layer."""
        self._console.print(_key_numbers(inspection))
        self._console.print(_extreme_eigenvalues(inspection))
        if inspection.layers:
            self._console.print(_layers(inspection))
        cost = inspection.cost
        layers = f" and {wording.count(cost.num_layer_matvecs)} with single layers" if cost.num_layer_matvecs else ""
        self._console.print(
            f"spent: {wording.count(cost.num_matvecs)} Hessian products{layers}, {wording.duration(cost.seconds)}, "
            f"{wording.memory(cost.peak_bytes)}"
        )

    def last_line(self, text: str) -> None:
        """Print a line that is never wrapped, so that it can be read by programs."""
        self._console.print(text, soft_wrap=True)


def new_table(title: str, *columns: str) -> Table:
    """Return a table of the kind all commands print: names to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _key_numbers(inspection: Inspection) -> Table:
    table = new_table("\nCurvature", "", "value ± uncertainty", "other data", "")
    table.columns[3].justify = "left"
    rows = (
        ("loss", wording.number(inspection.loss), "", f"mean over {wording.count(inspection.total_weight)} terms"),
        ("gradient norm", wording.number(inspection.gradient_norm), "", "zero at a stationary point"),
        ("largest eigenvalue", *_both(inspection.sharpness), "sharpness λ"),
        ("smallest eigenvalue", *_both(inspection.lowest), "negative: no minimum"),
        ("trace", *_both(inspection.total_curvature), "sum of all eigenvalues"),
        *_exact_trace(inspection),
        ("effective condition number", *_both(inspection.effective_condition), "λ / mean of |λ|"),
        (
            "negative-curvature share",
            wording.share(inspection.negative_share),
            wording.over_data(inspection.negative_share, percent=True),
            "of the sum of |λ|",
        ),
        ("largest stable step", *_both(inspection.max_stable_lr), "2 / λ, plain gradient descent"),
    )
    for row in rows:
        table.add_row(*row)
    if inspection.data is not None:
        table.caption = (
            f"other data: one standard error over data of the same size, from {inspection.data.num_groups} groups"
        )
        table.caption_justify = "left"
    return table


def _exact_trace(inspection: Inspection) -> list[tuple[str, str, str, str]]:
    if inspection.diagonal is None or not inspection.diagonal.exact or inspection.exact:
        return []
    return [("trace, exactly", wording.number(inspection.diagonal.trace, 5), "", "from every entry of the diagonal")]


def _both(measured: Measured) -> tuple[str, str]:
    return wording.quantity(measured), wording.over_data(measured)


def _extreme_eigenvalues(inspection: Inspection) -> Table:
    table = new_table("\nEigenvalues", "rank", "eigenvalue", "residual", "")
    for rank, value, residual, converged in inspection.extreme_eigenvalues():
        row = (wording.count(rank), wording.number(value, 5), wording.number(residual, 2))
        table.add_row(*row, "" if converged else "not converged")
    return table


def _layers(inspection: Inspection) -> Table:
    columns = ("layer", "parameters", "gradient", "largest λ", "smallest λ", "trace", "condition", "negative")
    table = new_table("\nLayers", *columns)
    for layer in inspection.layers:
        table.add_row(
            layer.name + ("" if layer.converged else " (not converged)"),
            wording.count(layer.num_params),
            wording.number(layer.gradient_norm, 3),
            wording.quantity(Measured(value=layer.top, stderr=layer.top_residual)),
            wording.quantity(Measured(value=layer.bottom, stderr=layer.bottom_residual)),
            wording.quantity(layer.trace),
            wording.quantity(layer.effective_condition),
            wording.share(layer.negative_share),
        )
    return table
