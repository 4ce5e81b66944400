"""Checkpoints: reading them without running code, and fitting them into a model or saying why they do not."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvature.errors import CheckpointError

__all__ = ["load_checkpoint", "read_state", "save_checkpoint"]

STATE_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
SHOWN = 3


def save_checkpoint(path: Path, model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write the state of a model and plain metadata, in a form that `torch.load(weights_only=True)` reads."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "metadata": dict(metadata)}, path)


def load_checkpoint(path: Path | str, model: nn.Module) -> dict[str, Any]:
    """Load a checkpoint into a model, in place; all or nothing.

    The file holds a state dict, or a dict with one under "state_dict", "model_state_dict" or "model". It is read with
    `weights_only=True`, so nothing in it is executed.

    Returns:
        The metadata stored with it, empty if there are none.

    Raises:
        CheckpointError: if the file is missing, unreadable or does not fit; the message names keys and shapes.
    """
    path = Path(path)
    stored = _read(path)
    state = _unwrapped(_state_dict(stored, path))
    _check_fit(state, model, path)
    model.load_state_dict(state)
    metadata = stored.get("metadata", {})
    return dict(metadata) if isinstance(metadata, Mapping) else {}


def read_state(path: Path | str, model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint that fits a model, on the CPU; the model is left as it is.

    Raises:
        CheckpointError: if the file is missing, unreadable or does not fit; the message names keys and shapes.
    """
    path = Path(path)
    state = _unwrapped(_state_dict(_read(path), path))
    _check_fit(state, model, path)
    return state


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"the checkpoint {path} {what}; give a file written by torch.save(model.state_dict(), path)."
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read as plain tensors ({type(error).__name__}); "
            "write it with torch.save(model.state_dict(), path)."
        ) from error
    if not isinstance(stored, Mapping):
        kind = type(stored).__name__
        raise CheckpointError(f"the checkpoint {path} holds a {kind}, not a state dict; save model.state_dict().")
    return stored


def _state_dict(stored: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    candidates = [stored, *(stored[key] for key in STATE_KEYS if isinstance(stored.get(key), Mapping))]
    for candidate in candidates:
        if candidate and all(isinstance(value, Tensor) for value in candidate.values()):
            return dict(candidate)
    raise CheckpointError(
        f"the checkpoint {path} holds {_some(list(stored))} but no state dict, neither at the top nor under "
        f"{' or '.join(STATE_KEYS)}; save model.state_dict()."
    )


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the names of wrappers, nested ones too."""
    for prefix in WRAPPER_PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def _check_fit(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state]
    surplus = [name for name in state if name not in wanted]
    reshaped = [
        f"{name} of shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [
        f"{what} {_some(names)}" for what, names in (("lacks", missing), ("adds", surplus), ("has", reshaped)) if names
    ]
    if faults:
        raise CheckpointError(
            f"the checkpoint {path} does not fit the model {type(model).__name__}: it {' and '.join(faults)}; "
            "use the checkpoint of this architecture."
        )


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
