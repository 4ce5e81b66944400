"""Digests in config.json, by which a run whose files were changed or mixed up after it was written is found out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis.run.folder import ARRAYS, CONFIG, RESULTS

__all__ = ["broken_seal", "sealed"]


def sealed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a configuration with the digests of itself and of the numbers beside it."""
    return {**config, "sha256": _digests(config, lambda name: folder / name)}


def broken_seal(config: dict[str, Any], place: Callable[[str], Path]) -> str | None:
    """Return which file is not the one that was written; None if all are, or if the run has no digests, as once."""
    if "sha256" not in config:
        return None
    written, found = config["sha256"], _digests(config, place)
    if not isinstance(written, dict):
        return CONFIG
    return next((name for name, digest in found.items() if written.get(name) != digest), None)


def _digests(config: dict[str, Any], place: Callable[[str], Path]) -> dict[str, str]:
    own = json.dumps({key: value for key, value in config.items() if key != "sha256"}, sort_keys=True)
    contents = {CONFIG: own.encode(), **{name: place(name).read_bytes() for name in (RESULTS, ARRAYS)}}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
