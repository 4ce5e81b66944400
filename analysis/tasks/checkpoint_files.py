"""Files of weights as nested dicts of tensors: torch.save, safetensors and Hugging Face folders; no code in them runs.

Pickles are read by torch's `weights_only=True`. Classes that it does not allow (a whole module, the settings that
Lightning stores) are not imported: objects without behaviour stand in for them, and keep their attributes only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvature.errors import CheckpointError

__all__ = ["StandIn", "files_of", "read_tensors", "sha256_of"]

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What a Hugging Face folder holds, in the order of preference."""
_INDEX = ".index.json"
_SAVE = "write it with torch.save(model.state_dict(), path)"


class StandIn:
    """An object whose class was not imported. `attributes` holds what was stored of it."""

    attributes: Any = None

    def __new__(cls, *args: object, **options: object) -> StandIn:
        del args, options
        return object.__new__(cls)

    def __init__(self, *args: object, **options: object) -> None:
        del args, options

    def __setstate__(self, state: object) -> None:
        self.attributes = state


def files_of(path: Path) -> list[Path]:
    """Return the files that hold the weights: the path itself, or those of a Hugging Face folder or sharded index.

    Raises:
        CheckpointError: if there are none.
    """
    with _as_checkpoint_error(path):
        if path.is_dir():
            found = [path / name for name in WEIGHTS if (path / name).is_file()]
            if not found:
                raise CheckpointError(f"the checkpoint {path} is a folder {_without_weights(path)}")
            path = found[0]
        elif not path.is_file():
            what = "is no regular file" if os.path.lexists(path) else "does not exist"
            raise CheckpointError(
                f"the checkpoint {path} {what}; give a file written by torch.save(model.state_dict(), path)."
            )
    return [path, *_shards(path)] if path.name.endswith(_INDEX) else [path]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of(files: list[Path]) -> str:
    """Return the SHA-256 of a file, or that of the digests of several, one after the other, in hexadecimal."""
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


def read_tensors(files: list[Path]) -> Any:
    """Return what the files of `files_of` hold, on the CPU: usually nested dicts.

    Raises:
        CheckpointError: if one cannot be read.
    """
    if not files[0].name.endswith(_INDEX):
        return _read(files[0])
    whole: dict[Any, Any] = {}
    for path in files[1:]:
        part = _read(path)
        if not isinstance(part, Mapping):
            raise CheckpointError(f"the checkpoint {path} holds a {type(part).__name__}, not a part of a state dict.")
        whole |= part
    return whole


def _without_weights(folder: Path) -> str:
    if (folder / ".metadata").is_file():
        return (
            "of torch.distributed.checkpoint; make one file of it by `python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE` and give that."
        )
    return f"without {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}; give one of these folders, or a file."


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint {index} is no index of files ({type(error).__name__}); its weight_map names them."
        ) from error
    missing = outside or [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"the checkpoint {index} names {missing[0] if missing else 'no files'}, which is not beside it; get all of "
            "its files."
        )
    return [index.parent / name for name in names]


def _read(path: Path) -> Any:
    with _as_checkpoint_error(path):
        with path.open("rb") as file:
            start = file.read(64)
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return _read_safetensors(path)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"the checkpoint {path} is a pointer to a file kept by git-lfs; run `git lfs pull`.")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            unknown = _unknown_classes(path)
            if not unknown:
                raise
        standing_in: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (_empty_dict if name == "collections.defaultdict" else StandIn, name) for name in unknown
        ]
        with torch.serialization.safe_globals(standing_in):
            return torch.load(path, map_location="cpu", weights_only=True)


def _unknown_classes(path: Path) -> list[str]:
    """Return the full names of what a pickle refers to and torch does not allow; empty if that cannot be told."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever a damaged file leads to
        return []


def _empty_dict(*args: object) -> dict[Any, Any]:
    del args
    return {}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"the checkpoint {path} is read by the package safetensors ({error}); pip install safetensors."
        ) from error
    return dict(load_file(path))


@contextlib.contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """Say in a sentence what readers of files raise: of a damaged file, any exception."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())  # torch's own advice comes first, and what went wrong last
        text = said.rpartition("WeightsUnpickler error: ")[2].partition(". ")[0][:120]
        reason = f"{type(error).__name__}{': ' + text if text.isprintable() and text else ''}".rstrip(".")
        raise CheckpointError(f"the checkpoint {path} cannot be read as plain tensors ({reason}); {_SAVE}.") from error
