"""Checkpoints: reading them without running code, and fitting them into a model or saying why they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.tasks.checkpoint_files import files_of, read_tensors, sha256_of
from analysis.tasks.checkpoint_search import find_state, some
from curvature.errors import CheckpointError

__all__ = ["Checkpoint", "load_checkpoint", "read_checkpoint", "read_state", "save_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a model as a file holds it."""

    state: dict[str, Tensor]
    """By the model's names, on the CPU, as they were stored."""
    metadata: dict[str, Any]
    """What stands beside it under "metadata"."""
    record: dict[str, str]
    """File name, SHA-256 of what was read, the key it stood under, and the dtypes if the model has others."""


def save_checkpoint(path: Path, model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write the state of a model and plain metadata, in a form that `torch.load(weights_only=True)` reads."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "metadata": dict(metadata)}, path)


def load_checkpoint(path: Path | str, model: nn.Module, *, key: str | None = None) -> Checkpoint:
    """Load a checkpoint into a model, in place; all or nothing.

    Args:
        path: a file or folder, as for `read_checkpoint`.
        model: what it is loaded into.
        key: which state dict of the file, if it holds several.

    Raises:
        CheckpointError: if it is missing, unreadable or does not fit; the message names keys and shapes.
    """
    checkpoint = read_checkpoint(path, model, key=key)
    if bare := [name for name, tensor in _tensors_of(model).items() if tensor.is_meta]:
        raise CheckpointError(
            f"the model holds no values for {some(bare)} (device meta); build it on a device, such as the CPU."
        )
    before = {name: tensor.clone() for name, tensor in _tensors_of(model).items()}
    try:
        model.load_state_dict({**model.state_dict(), **checkpoint.state})
    except Exception as error:  # of hooks that the model's modules have
        with torch.no_grad():
            for name, tensor in _tensors_of(model).items():
                tensor.copy_(before[name])
        raise CheckpointError(
            f"the checkpoint {path} cannot be loaded by {type(model).__name__}.load_state_dict: "
            f"{' '.join(str(error).split()).rstrip('.')}; fix it there."
        ) from error
    return checkpoint


def read_state(path: Path | str, model: nn.Module, *, key: str | None = None) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint that fits a model, on the CPU; the model is left as it is.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    return read_checkpoint(path, model, key=key).state


def read_checkpoint(path: Path | str, model: nn.Module, *, key: str | None = None) -> Checkpoint:
    """Read a checkpoint that fits a model; the model is left as it is, and nothing in the file is executed.

    It is a file of `torch.save` or `.safetensors`, a folder of Hugging Face or the index of its shards. The state
    dict, or the module, may stand under any keys; its names may have a prefix that all share (`module.`, `model.`).

    Args:
        path: the file or folder.
        model: what it has to fit: all names, and all shapes.
        key: which state dict of the file, if it holds several that fit, or one beside other modules: its keys and
            prefix, joined by dots, such as "state_dict_ema" or "state_dict.student"; "." for the file as a whole.

    Raises:
        CheckpointError: if it is missing or unreadable; holds no state dict that fits, or several that differ; or holds
            parameters that are not finite, or of another kind than the model's (complex, integer, quantised, nested).
    """
    path = Path(path)
    wanted = _tensors_of(model)
    ties = _ties(wanted)
    files = files_of(path)
    stored = read_tensors(files)
    try:
        found = find_state(stored, wanted, ties, key, path)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = {
            name: _checked(name, found.tensors[name], wanted[name], name in parameters, path) for name in found.tensors
        }
        _check_ties(state, ties, path)
    except (RecursionError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # of odd tensors
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the checkpoint {path} holds tensors that cannot be read ({type(error).__name__}); save plain ones."
        ) from error
    record = {"file": path.name, "sha256": sha256_of(files)}
    if found.key:
        record["key"] = found.key
    kinds = [(str(state[name].dtype), str(wanted[name].dtype)) for name in parameters if name in state]
    if casts := sorted({f"{one} read as {other}".replace("torch.", "") for one, other in kinds if one != other}):
        record["dtype"] = ", ".join(casts)
    metadata = stored.get("metadata") if isinstance(stored, Mapping) else None
    return Checkpoint(state, dict(metadata) if isinstance(metadata, Mapping) else {}, record)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if lazy := [name for name, value in state.items() if nn.parameter.is_lazy(value)]:
        raise CheckpointError(
            f"the model has no shape yet for {some(lazy)}; run a batch through it before it is loaded."
        )
    return state


def _checked(name: str, stored: Tensor, ours: Tensor, is_parameter: bool, path: Path) -> Tensor:
    """Return a stored tensor in the ordinary layout, or say why the model cannot hold it."""
    what = f"the checkpoint {path} holds {some([name])}"
    if stored.is_quantized:
        raise CheckpointError(f"{what} quantised; save the model before it is quantised, or its dequantised tensors.")
    if stored.is_meta:
        raise CheckpointError(f"{what} without values (device meta); save the model after its values were loaded.")
    if type(stored) not in (Tensor, nn.Parameter, nn.Buffer):
        raise CheckpointError(f"{what} as {type(stored).__name__}; save it as an ordinary, whole tensor.")
    plain = stored.detach() if stored.layout == torch.strided else stored.detach().to_dense()
    if _kind(plain) != _kind(ours) and not (_kind(plain) == "real" and _kind(ours) == "complex"):
        raise CheckpointError(
            f"{what} in {plain.dtype}, and the model has it in {ours.dtype}: {_kind(plain)} instead of {_kind(ours)} "
            "numbers. Save it as the model has it, or build the model with that dtype."
        )
    if is_parameter and not bool(torch.isfinite(plain.to(ours.dtype)).all()):
        if bool(torch.isfinite(plain if plain.is_complex() else plain.double()).all()):
            raise CheckpointError(f"{what} with values too large for {ours.dtype}; build the model in {plain.dtype}.")
        raise CheckpointError(f"{what} with values that are not finite; use one from before the training diverged.")
    return plain


def _ties(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each tensor that has several."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            groups.setdefault((tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _check_ties(state: Mapping[str, Tensor], ties: list[list[str]], path: Path) -> None:
    for first, *others in ties:
        if odd := [name for name in others if not torch.equal(state[name], state[first])]:
            raise CheckpointError(
                f"the checkpoint {path} holds different values for {first} and {odd[0]}, which are one tensor in the "
                "model; untie them in the model, or use the checkpoint of this architecture."
            )


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "real" if tensor.is_floating_point() else "integer"
