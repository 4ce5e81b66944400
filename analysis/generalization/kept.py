"""Answers of jobs that survive whatever stops the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.run.draft import POINTS, Draft
from analysis.run.lines import append_line, read_lines
from analysis.run.pool import Pool, run_all, usable_cores
from analysis.show.listener import Progress
from curvature.errors import CurvatureError, InputError

__all__ = ["Kept"]


@dataclass(frozen=True)
class _Failure:
    why: str


class Kept:
    """What jobs have answered, in this call or an earlier one that was stopped.

    Args:
        draft: where it is kept, a line for each job; None keeps nothing beyond this process.

    Raises:
        InputError: if the draft cannot be read.
    """

    def __init__(self, draft: Draft | None) -> None:
        self._path = None if draft is None else draft.path / POINTS
        self._known: dict[str, Any] = {}
        if self._path is not None and self._path.is_file():
            try:
                lines = [json.loads(line) for line in read_lines(self._path, repair=True)]
                self._known = {line["job"]: line["answer"] for line in lines}
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise InputError(f"{self._path} cannot be read ({error}); begin again with --overwrite.") from error

    def answers(
        self,
        function: Callable[[Any, dict[str, Any]], Any],
        context: Any,
        jobs: Sequence[dict[str, Any]],
        *,
        processes: int | None,
        notes: list[str],
        progress: Progress | None = None,
        told: Callable[[Any], str] = lambda _: "",
        total: int = 0,
    ) -> list[Any]:
        """Return the answer of each job, in their order; those known are not computed again.

        Args:
            function: `f(context, job)`, whose answer JSON can hold.
            context: what all jobs share.
            jobs: plain values.
            processes: at most so many; None for one a core.
            notes: takes a sentence if all had to be done in one.
            progress: told after each job.
            told: what of an answer.
            total: jobs expected in all, if there will be more.
        """
        new = sum(json.dumps(job) not in self._known for job in jobs)
        done = len(self._known)
        total = max(total, done + new)
        wanted = max(1, min(processes or usable_cores(), new))

        def answer(job: dict[str, Any]) -> Any:
            try:
                return function(context, job)
            except CurvatureError as error:
                return _Failure(str(error))

        def lost(job: dict[str, Any], why: str) -> Any:
            return _Failure(f"the training of {job} was lost: {why}")

        def found(job: dict[str, Any], answer: Any) -> None:
            nonlocal done
            if isinstance(answer, _Failure):
                raise InputError(answer.why)
            key = json.dumps(job)
            self._known[key] = answer
            if self._path is not None and self._path.parent.is_dir():
                append_line(self._path, json.dumps({"job": key, "answer": answer}))
            done += 1
            if progress is not None:
                progress(f"training\n{told(answer)}", done, total)

        def all_of_them() -> Generator[list[dict[str, Any]], list[Any], list[Any]]:
            return (yield list(jobs))

        with Pool(answer, wanted, lost=lost) as pool:
            if pool.workers < wanted:
                notes.append(
                    "All was computed in one process: processes are forked on Linux, where there is no GPU, only."
                )
            (answers,) = run_all([all_of_them()], pool, known=lambda job: self._known.get(json.dumps(job)), found=found)
        return answers
