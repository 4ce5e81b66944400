# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A loss spike, before and after
#
# A small convolutional network learns the digits with Adam, at a learning rate that is high but not absurd. The loss falls, and
# then, now and again, it jumps. Here: what a tracker saw in the steps before, which layer it was, and what helps. Nothing of this
# is a forecast: `benchmarks/tracking` says how well each signal warns, and none does so reliably.

# %%
import math
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

from analysis import CurvatureTracker, loss_spikes
from analysis.tasks.digits import load_digits
from curvature import Objective

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook with fewer steps
STEPS = 30 if FAST else 260
(IMAGES, LABELS), _ = load_digits()
PROBE = (IMAGES[-128:], LABELS[-128:])


def network():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def train(lr, seed=3, clip=math.inf):
    """Train with batches of 32, and read the preconditioned sharpness on a fixed probe at every step."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999))
    objective = Objective(model, nn.CrossEntropyLoss(), PROBE)
    tracker = CurvatureTracker(objective, optimizer, quantities=["preconditioned"], budget=None, generator=0)
    for _ in range(STEPS):
        rows = torch.randint(len(IMAGES) - 128, (32,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IMAGES[rows]), LABELS[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        tracker.step(loss)
    return tracker.record


# %% [markdown]
# ## Where it spikes
#
# A spike is a loss on the probe that exceeds the median of the 20 readings before by an absolute amount, here 0.3.

# %%
record = train(lr=0.02)
spikes = loss_spikes(record, floor=0.3)
for s in spikes:
    warned = "no warning" if s.lead is None else f"updates unusually long {s.lead} steps before"
    crossed = "never above its threshold" if s.crossed is None else f"above its threshold from step {s.crossed}"
    print(
        f"step {s.step}: +{s.rise:.2f} to {s.loss:.2f}; {warned}; sharpness {crossed}; layer {s.layer} ({s.layer_share:.0%})"
    )

# %% [markdown]
# ## Before and after
#
# The loss, the length of the update over its median, and the preconditioned sharpness over 38 / lr, the threshold of Adam. Lines
# mark where spikes begin.


# %%
def draw(record, marks, axes):
    steps = record.steps
    update = record.series("update_norm")
    relative = [float(update[i] / update[max(0, i - 20) : i].median()) if i else math.nan for i in range(len(update))]
    for ax, values, label in zip(
        axes,
        (record.series("loss"), relative, record.series("stability")),
        ("loss on the probe", "update over its median", "sharpness over threshold"),
        strict=True,
    ):
        ax.plot(steps, values, linewidth=1.2)
        for s in marks:
            ax.axvline(s.step, color="#D55E00", linewidth=0.9, linestyle="--")
        ax.set_ylabel(label)
        ax.set_yscale("log")
    axes[1].axhline(1, color="#8A8A8A", linewidth=0.9)
    axes[2].axhline(1, color="#8A8A8A", linewidth=0.9)
    axes[-1].set_xlabel("step")


figure, axes = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
draw(record, spikes, axes)

# %% [markdown]
# ## What helps
#
# The same with gradients clipped at a norm of 1, and at a fifth of the rate, two seeds each: a single run proves nothing, and two
# prove little.

# %%
WAYS = {"as above": {"lr": 0.02}, "clipped at 1": {"lr": 0.02, "clip": 1.0}, "a fifth of the rate": {"lr": 0.004}}
found = {}
for name, settings in WAYS.items():
    records = [train(seed=seed, **settings) for seed in ((3,) if FAST else (2, 3))]
    found[name] = [len(loss_spikes(r, floor=0.3)) for r in records]
    losses = [float(r.series("loss")[-20:].median()) for r in records]
    print(f"{name:20} spikes {found[name]}, loss at the end {', '.join(f'{x:.2f}' for x in losses)}")

# %%
if not FAST:  # what the text says
    assert spikes
    assert sum(found["a fifth of the rate"]) < sum(found["as above"])
