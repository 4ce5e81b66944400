"""What several commands take, and how they answer bad input."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.run.signals import Terminated
from curvature.errors import CurvatureError, InputError

if TYPE_CHECKING:
    from analysis.run.preparation import Request

__all__ = [
    "AsJson",
    "Checkpoint",
    "CheckpointKey",
    "Device",
    "MicroBatch",
    "NoCheck",
    "Out",
    "Overwrite",
    "Params",
    "Seed",
    "TaskName",
    "errors_as_sentences",
    "request_of",
]

TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help="A bundled name (digits-cnn, digits-mlp), file.py:function or package.module:function."
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Parameters to load into the model: a file of torch.save or safetensors, or a Hugging Face folder.",
    ),
]
CheckpointKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Which state dict of the checkpoint, if it holds several: state_dict_ema."),
]
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


def request_of(
    task: str,
    checkpoint: Path | None,
    checkpoint_key: str | None,
    params: list[str] | None,
    device: str | None,
    micro_batch: int | None,
    seed: int,
    no_check: bool,
    others: Sequence[Path] = (),
) -> Request:
    """Return the request that the options of a command make; `others` are checkpoints of other options.

    Raises:
        InputError: for a key without a checkpoint.
    """
    from analysis.run.preparation import Request

    if checkpoint_key is not None and checkpoint is None and not others:
        raise InputError("--checkpoint-key chooses within a checkpoint; name its file, or leave the key out.")
    return Request(
        task=task,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        params=params,
        device=device,
        micro_batch=micro_batch,
        seed=seed,
        check=not no_check,
        command=shlex.join(["curvature", *sys.argv[1:]]),
    )


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2, Ctrl-C into exit code 130, and SIGTERM into 143."""
    try:
        yield
    except CurvatureError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        typer.echo(f"stopped; {stop.args[0] if stop.args else 'nothing was written.'}", err=True)
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
