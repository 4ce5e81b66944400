"""Answers of jobs that survive whatever stops the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from analysis.generalization.workers import usable_cores, work
from analysis.run.draft import POINTS, Draft
from analysis.run.lines import append_line, read_lines
from analysis.show.listener import Progress
from curvature.errors import InputError

__all__ = ["Kept"]


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
        function: str,
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
            function: "package.module:name" of `f(context, job)`.
            context: what all jobs share.
            jobs: plain values.
            processes: at most so many; None for one a core.
            notes: takes a sentence if all had to be done in one.
            progress: told after each job.
            told: what of an answer.
            total: jobs expected in all, if there will be more.
        """
        new = [job for job in jobs if json.dumps(job) not in self._known]
        done = len(self._known)
        total = max(total, done + len(new))
        for index, answer in work(function, context, new, processes or usable_cores(), notes):
            key = json.dumps(new[index])
            self._known[key] = answer
            if self._path is not None and self._path.parent.is_dir():
                append_line(self._path, json.dumps({"job": key, "answer": answer}))
            done += 1
            if progress is not None:
                progress(f"training\n{told(answer)}", done, total)
        return [self._known[json.dumps(job)] for job in jobs]
