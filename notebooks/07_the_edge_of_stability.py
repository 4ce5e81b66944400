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
# # The edge of stability
#
# On a quadratic with curvature $\lambda$, gradient descent with learning rate $\eta$ multiplies the distance to the minimum by
# $1 - \eta\lambda$ in each step: it is stable for $\lambda < 2/\eta$, and diverges beyond. A network is no quadratic. Trained
# on all data at once, its sharpness (the largest eigenvalue of the Hessian) rises until it meets $2/\eta$, and then stays
# there (Cohen et al. 2021). Here: that regime for gradient descent, momentum and Adam, what happens to a step in it, and a
# catapult. All of it is measured by a `CurvatureTracker`, which any training loop can carry.

# %%
import os

import matplotlib.pyplot as plt
import torch

from analysis import CurvatureTracker, Phase, edge_of_stability, plot_stability
from analysis.tasks import load_task
from curvature import Objective, stability_limit

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook with fewer steps
QUANTITIES = ["sharpness", "preconditioned", "oscillation", "update", "critical"]


def train(make, steps, *, every=10, change=None):
    """Train on all data at once with a tracker; change the learning rate at a step, if asked to."""
    steps = 30 if FAST else steps
    task = load_task("digits-tanh")  # a tanh network of 9000 parameters, 500 digits, a squared loss
    x, y = task.train_data
    optimizer = make(task.model.parameters())
    objective = Objective(task.model, task.loss, task.train_data)
    tracker = CurvatureTracker(objective, optimizer, quantities=QUANTITIES, every=every, budget=None, generator=0)
    for step in range(steps):
        if change is not None and step == change[0]:
            optimizer.param_groups[0]["lr"] = change[1]
        optimizer.zero_grad()
        loss = task.loss(task.model(x), y)
        loss.backward()
        optimizer.step()
        tracker.step(loss)  # the only line that a loop needs
    return tracker.record


# %% [markdown]
# ## Gradient descent at three rates
#
# The rate decides where sharpness ends, not the network: each curve rises (progressive sharpening) to its own $2/\eta$, drawn
# as a line in its colour.

# %%
rates = {0.4: 1500, 0.6: 900, 0.8: 900}
descents = {lr: train(lambda params, lr=lr: torch.optim.SGD(params, lr=lr), steps) for lr, steps in rates.items()}
fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
for lr, record in descents.items():
    (line,) = ax.plot(record.steps, record.series("sharpness"), label=f"lr {lr}")
    ax.axhline(2 / lr, color=line.get_color(), linewidth=0.8, linestyle="--")
ax.set(xlabel="step", ylabel="sharpness", title="Sharpness rises to 2 / lr and stays")
ax.legend(frameon=False)
for lr, record in descents.items():
    late = record.series("stability")[2 * len(record.readings) // 3 :]
    print(
        f"lr {lr}: sharpness in the last third is {late.mean():.3f} times 2 / lr, {late.min():.2f} to {late.max():.2f}"
    )
    assert FAST or 0.97 < late.mean() < 1.12

# %% [markdown]
# The loss does not explode above the threshold: along the sharpest direction the iterate swings from side to side, the gradient
# there changes its sign in every step (`oscillation`, about $-1$), and the third derivative turns the swing into a force against
# sharpness. The gradient alone therefore no longer says what a step does to the loss; gradient and curvature together still do,
# roughly.

# %%
record = descents[0.6]
found = edge_of_stability(record)
print(f"arrival at step {found.arrival}; {found.share_above:.0%} of all steps above the threshold")
print(f"gradient along the sharpest direction, after a step over before: {found.oscillation:.2f}")
before = [r for r in record.readings if found.arrival is None or r.step < found.arrival]
after = [r for r in record.readings if found.arrival is not None and r.step > found.arrival + 200]
for name, readings in (("before", before), ("at the edge", after)):
    if readings:
        off = torch.tensor([[r.linear_change - r.change, r.quadratic_change - r.change] for r in readings]).abs()
        size = torch.tensor([r.change for r in readings]).abs().median()
        print(
            f"{name}: linear prediction off by {off[:, 0].median() / size:.2g} of the change, quadratic by {off[:, 1].median() / size:.2g}"
        )
assert FAST or -1.3 < found.oscillation < -0.8

# %% [markdown]
# ## Momentum and Adam have edges of their own
#
# With momentum $\beta$ the threshold is $(2+2\beta)/\eta$, with Nesterov's $(2+2\beta)/((1+2\beta)\eta)$. Adam divides by $P$,
# which follows the gradients; what counts is the largest eigenvalue of $P^{-1}H$, the preconditioned sharpness, against
# $(2+2\beta_1)/((1-\beta_1)\eta)$: $38/\eta$ at $\beta_1 = 0.9$. Over its own threshold every one of them arrives at 1.

# %%
makers = {
    "heavy ball 0.9": (lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9), 1000),
    "Nesterov 0.9": (lambda params: torch.optim.SGD(params, lr=0.15, momentum=0.9, nesterov=True), 1000),
    "Adam": (lambda params: torch.optim.Adam(params, lr=1e-3, betas=(0.9, 0.99)), 900),
}
fig, axes = plt.subplots(3, 1, figsize=(8, 9), layout="constrained")
for ax, (name, (make, steps)) in zip(axes, makers.items(), strict=True):
    record = train(make, steps)
    plot_stability(record, ax=ax)
    limit = stability_limit(make([torch.zeros(1)]))
    ax.text(0.99, 0.05, f"{name}: threshold {limit:.3g} / lr", transform=ax.transAxes, ha="right")
    late = record.series("stability")[2 * len(record.readings) // 3 :]
    print(f"{name}: {late.mean():.3f} times its threshold in the last third")
    assert FAST or 0.9 < late.mean() < 1.1

# %% [markdown]
# The dashed line is the critical sharpness of each step, $2/\eta_c$ with $\eta_c$ the rate at which this very update would have
# left the loss where it was, from at most six forward passes (times $\eta/2$, so that 1 means: any longer and the loss rises). For
# gradient descent it follows sharpness at the edge. For Adam it stays far below the preconditioned sharpness until the edge is
# reached: most of an update does not lie along the sharpest direction. The two answer different questions.
#
# ## A catapult
#
# A rate that is raised in mid-training leaves the network far above its new threshold. The loss shoots up, and comes back at a
# place that is flatter: the steps threw the network there (Lewkowycz et al. 2020).

# %%
record = train(lambda params: torch.optim.SGD(params, lr=0.4), 500, every=2, change=(350, 0.7))
phases = edge_of_stability(record).phases
fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
top.semilogy(record.steps, record.series("train_loss"))
top.set(ylabel="loss", title="The learning rate goes from 0.4 to 0.7 at step 350")
bottom.plot(record.steps, record.series("sharpness"), label="sharpness")
bottom.plot(record.steps, record.series("threshold"), linestyle="--", label="2 / lr")
flung = [s for s, phase in zip(record.steps, phases, strict=True) if phase is Phase.CATAPULT]
if flung:
    for ax in (top, bottom):
        ax.axvspan(flung[0], flung[-1], alpha=0.15)
bottom.set(xlabel="step", ylabel="sharpness", xlim=(250 if not FAST else None, None))
bottom.legend(frameon=False)
if not FAST:
    around = [r for r in record.readings if r.step >= 340]
    print(f"loss {around[0].loss:.3f} -> at most {max(r.highest_loss for r in around):.3f} -> {around[-1].loss:.3f}")
    print(f"sharpness {around[0].sharpness:.2f} -> {around[-1].sharpness:.2f}, threshold {around[-1].threshold:.2f}")
    assert flung
    assert flung[0] == 350
    assert max(r.highest_loss for r in around) > 3 * around[0].loss
    assert around[-1].sharpness < 0.85 * around[0].sharpness
