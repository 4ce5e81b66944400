"""The Python of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvature.adapters import hugging_face

README = Path(__file__).parents[1] / "README.md"


def test_examples_of_the_readme_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    n = sum(p.numel() for p in model.parameters())
    names: dict[str, Any] = {"model": model, "loader": [(x[:25], y[:25]), (x[25:], y[25:])], "x": x, "y": y}
    names |= {"v": torch.randn(n), "loss_function": nn.CrossEntropyLoss(), "torch": torch, "nn": nn}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    own_batches = [block for block in blocks if "**batch" in block]
    assert len(own_batches) == 1
    for block in blocks:
        if block not in own_batches:
            exec(compile(block, str(README), "exec"), names)
    assert names["loss"] == names["loss"].detach()
    assert float(names["moments"].noise_scale) > 0


def test_the_adapter_it_names_is_there() -> None:
    assert "hugging_face.causal_lm_objective" in README.read_text(encoding="utf-8")
    assert callable(hugging_face.causal_lm_objective)
