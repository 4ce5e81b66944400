"""Several processes of torchrun: who gets which data, who speaks and writes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from analysis.run.processes import of_torchrun, share
from analysis.tasks import Task
from curvature.errors import InputError


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda **_: None)


def task(data: Any) -> Task:
    return Task(name="some", model=nn.Linear(1, 1), loss=nn.MSELoss(), train_data=data)


@pytest.mark.usefixtures("second_of_two")
def test_ranks_share_out_what_a_task_gives_to_all() -> None:
    x = torch.arange(5.0)[:, None]
    assert share(task((x, x)))["data"][0].flatten().tolist() == [2, 3, 4]
    batches = [(x[i : i + 1], x[i : i + 1]) for i in range(5)]
    assert [float(b[0]) for b in share(task(batches))["data"]] == [1, 3]
    with pytest.raises(InputError, match="process_group"):
        share(task(torch.utils.data.DataLoader(list(x))))
    ready = task((x, x)).objective()
    assert share(replace(task((x, x)), prepared=ready)) == {}


def test_one_process_has_all_data() -> None:
    assert share(task((torch.ones(2, 1), torch.ones(2, 1)))) == {}


def test_the_second_rank_writes_where_nobody_looks_and_says_nothing() -> None:
    second = """
import os, torch.distributed as dist
from analysis.run.processes import of_torchrun

dist.init_process_group = dist.destroy_process_group = lambda **_: None
dist.get_rank = lambda: 1
kept = os.dup(1)
with of_torchrun(["inspect", "digits-mlp", "--out", "here"]) as arguments:
    print("said", flush=True)
    os.system("echo said; echo said >&2")
os.write(kept, " ".join(arguments[-2:]).encode())
"""
    ran = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, check=True)
    assert "said" not in ran.stdout + ran.stderr
    assert ran.stdout.startswith("--out ")
    assert ran.stdout.endswith("run")


@pytest.mark.usefixtures("second_of_two")
def test_a_run_of_several_is_not_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), of_torchrun(["inspect", "digits-mlp", "--resume"]):
        pass
    assert "--resume" in capsys.readouterr().err
