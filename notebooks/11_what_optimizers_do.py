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
# # What optimizers do to a quadratic, a valley and a saddle
#
# Four losses whose shape is known, and an online problem that breaks Adam. In the valley and
# on the deep network every optimizer gets the best of a row of learning rates (where it has one), so that what differs is the method; on
# the saddle all have the rate .03, and on the quadratic those of the theory. `load_task` has all four; the commands take them by name.

# %%
import math
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

from analysis import load_task
from optimizers import COCOB, SLS, CubicNewton, Lion, SaddleFreeNewton, TrustRegionNewton, Yogi

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook with fewer steps
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
SGD, Adam = torch.optim.SGD, torch.optim.Adam


def run(name, make, steps):
    """Train a landscape on all of its data; return the losses and the points, one more than steps."""
    task = load_task(name).to(dtype=torch.float64)
    params = list(task.model.parameters())
    optimizer = make(params)
    inputs, targets = task.train_data
    losses, points = [], []

    def closure():
        return task.loss(task.model(inputs), targets)

    needs_closure = type(optimizer).__module__.startswith("optimizers")
    for _ in range(steps):
        points.append(torch.cat([p.detach().flatten() for p in params]))
        if needs_closure:
            losses.append(float(optimizer.step(closure)))
            continue
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    points.append(torch.cat([p.detach().flatten() for p in params]))
    losses.append(float(closure().detach()))
    return losses, torch.stack(points)


def best(name, make, rates, steps):
    """Return rate, losses and points of the rate with the lowest loss at the end."""
    found = [(lr, *run(name, lambda p, lr=lr: make(p, lr), steps)) for lr in rates]
    return min(found, key=lambda f: f[1][-1] if math.isfinite(f[1][-1]) else math.inf)


def grid(low, high, number):
    return [float(x) for x in torch.logspace(math.log10(low), math.log10(high), 4 if FAST else number)]


# %% [markdown]
# ## A quadratic: rates in closed form
#
# Eigenvalues from μ = 1 to L = 100, κ = 100. At their best rates gradient descent loses the factor (κ - 1)/(κ + 1) a step, the heavy
# ball (√κ - 1)/(√κ + 1), Nesterov's method with 1/L the factor 1 - 1/√κ (dashed). Adam works entry by entry, and the axes of this
# quadratic are turned: it lies in between. Lion's steps have one length, and it circles the minimum. SLS finds gradient descent's step by itself.

# %%
kappa, L = 100.0, 100.0
root = math.sqrt(kappa)
STEPS = 60 if FAST else 300
methods = {
    "gradient descent": lambda p: SGD(p, lr=2 / (L + 1)),
    "heavy ball": lambda p: SGD(p, lr=4 / (math.sqrt(L) + 1) ** 2, momentum=((root - 1) / (root + 1)) ** 2),
    "Nesterov": lambda p: SGD(p, lr=1 / L, momentum=(root - 1) / (root + 1), nesterov=True),
    "SLS": SLS,
}
theory = [(kappa - 1) / (kappa + 1), (root - 1) / (root + 1), 1 - 1 / root]
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
measured = {}
for color, (name, make) in zip(COLORS, methods.items(), strict=False):
    distances = run("quadratic", make, STEPS)[1].norm(dim=1)
    axes[0].plot(distances, color=color, label=name)
    measured[name] = float((distances[-1] / distances[STEPS // 2]) ** (2 / STEPS))
for color, rate in zip(COLORS, theory, strict=False):
    axes[0].plot([math.sqrt(10) * rate**t for t in range(STEPS)], color=color, linestyle="--", linewidth=0.8)
for color, (name, make) in zip(COLORS[4:], {"Adam": Adam, "Lion": Lion}.items(), strict=False):
    lr, _, points = best("quadratic", lambda p, lr, make=make: make(p, lr=lr), grid(1e-3, 1, 8), STEPS)
    axes[0].plot(points.norm(dim=1), color=color, label=f"{name}, lr = {lr:.2g}")
axes[0].set(yscale="log", xlabel="step", ylabel="distance from the minimum", ylim=(1e-14, 30))
axes[0].legend(fontsize=8)

h = torch.logspace(0, 2, 200)
lr, beta = 4 / (math.sqrt(L) + 1) ** 2, ((root - 1) / (root + 1)) ** 2
radius = []
for x in h:
    a = 1 + beta - lr * float(x)
    radius.append(max(abs(z) for z in torch.linalg.eigvals(torch.tensor([[a, -beta], [1.0, 0.0]]))))
axes[1].plot(h, (1 - 2 / (L + 1) * h).abs(), color=COLORS[0], label="gradient descent")
axes[1].plot(h, radius, color=COLORS[1], label="heavy ball")
axes[1].set(xscale="log", xlabel="eigenvalue", ylabel="factor a step along its eigenvector")
axes[1].legend(fontsize=8)
for (name, value), rate in zip(measured.items(), [*theory, None], strict=True):
    print(f"{name:17} a step: {value:.4f}" + ("" if rate is None else f", theory {rate:.4f}"))

# %% [markdown]
# Gradient descent is fast along the middle of the spectrum and slow at both ends; the heavy ball has one rate for all eigenvalues.
#
# ## Where Adam ends at the wrong end
#
# Reddi, Kale and Kumar (2018), theorem 1: on [-1, 1] the loss is 4 x at each third step and -x at the others, so that the mean slope
# is 2/3 and x = -1 is best. The large gradient comes seldom, and Adam, whose average forgets fast (β₂ = 1/17, β₁ = 0), divides it by its
# own size, while the small ones keep pushing the other way. AMSGrad keeps the largest average it has seen. Yogi's falls by
# (1 - β₂) g² a step only, too slowly to forget. Rates fall as 0.1/√t.

# %%
ROUNDS = 600 if FAST else 3_000


def online(make):
    x = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer, path = make([x]), []
    rates = [group["lr"] for group in optimizer.param_groups]
    big, small = torch.tensor(4.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    for t in range(ROUNDS):
        optimizer.param_groups[0]["lr"] = rates[0] / math.sqrt(t + 1)
        x.grad = (big if t % 3 == 0 else small).clone()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        if t % 3 == 2:
            path.append((t, float(x.detach())))
    return path


settings = {"lr": 0.1, "betas": (0.0, 1 / 17), "eps": 0.0}
online_methods = {
    "Adam": lambda p: Adam(p, **settings),
    "AMSGrad": lambda p: Adam(p, amsgrad=True, **settings),
    "Yogi": lambda p: Yogi(p, **settings),
}
figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ends = {}
for color, (name, make) in zip(COLORS, online_methods.items(), strict=False):
    path = online(make)
    ends[name] = path[-1][1]
    ax.plot(*zip(*path, strict=True), color=color, label=name)
ax.axhline(-1, color="#8A8A8A", linewidth=0.8)
ax.set(xlabel="step", ylabel="x", ylim=(-1.1, 1.1))
ax.legend(fontsize=8)
print({name: round(end, 2) for name, end in ends.items()})

# %% [markdown]
# ## A valley
#
# Rosenbrock's function from (-1.2, 1): the floor is nearly flat, the walls have 2500 times its curvature. First-order methods fall to
# the floor at once, and crawl or hop along it; a Newton step sees the floor. COCOB's bets are too small here: it stays at the start.

# %%
STEPS = 60 if FAST else 400
rows = {
    "gradient descent": (lambda p, lr: SGD(p, lr=lr), grid(1e-4, 1e-2, 9)),
    "momentum 0.9": (lambda p, lr: SGD(p, lr=lr, momentum=0.9), grid(1e-5, 1e-2, 10)),
    "Adam": (lambda p, lr: Adam(p, lr=lr), grid(1e-3, 1, 10)),
    "SLS": (lambda p, lr: SLS(p, max_step=lr), [10.0]),
    "COCOB": (lambda p, lr: COCOB(p, lr=lr), [1.0]),
    "trust-region Newton": (lambda p, lr: TrustRegionNewton(p, lr=lr), [1.0]),
}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
X, Y = torch.meshgrid(torch.linspace(-1.7, 1.6, 300), torch.linspace(-0.6, 1.9, 300), indexing="xy")
axes[0].contour(X, Y, (100 * (Y - X**2) ** 2 + (1 - X) ** 2 + 0.1).log(), levels=18, colors="0.85", linewidths=0.8)
valley = {}
for color, (name, (make, rates)) in zip(COLORS, rows.items(), strict=False):
    lr, losses, points = best("rosenbrock", make, rates, STEPS)
    valley[name] = losses[-1]
    label = name if len(rates) == 1 else f"{name}, lr = {lr:.2g}"
    axes[0].plot(*points.T, color=color, linewidth=1.1, marker="o", markersize=1.8, label=label)
    axes[1].plot([max(x, 1e-16) for x in losses], color=color)
axes[0].plot(1, 1, "k*", markersize=10)
axes[0].set(xlim=(-1.7, 1.6), ylim=(-0.6, 1.9), xlabel="x", ylabel="y")
axes[0].legend(fontsize=7, loc="upper center", ncols=2)
axes[1].set(yscale="log", xlabel="step", ylabel="loss")

# %% [markdown]
# A step is not a step: one of SLS costs two to four evaluations more, one of Newton's a gradient and a few products. `curvature race`
# counts them.
#
# ## A saddle without curvature
#
# A monkey saddle, with minima around it. The start lies on a ridge, a thousandth beside its top: gradient descent runs down the ridge
# into the saddle, where gradient and Hessian vanish, and leaves it as slowly as it came. Momentum carries on. Methods that
# divide by the size of gradients (Adam, Lion) enlarge the small component that leads out.

# %%
STEPS = 60 if FAST else 250
rows = {
    "gradient descent": lambda p: SGD(p, lr=0.03),
    "momentum 0.9": lambda p: SGD(p, lr=0.03, momentum=0.9),
    "Adam": lambda p: Adam(p, lr=0.03),
    "Lion": lambda p: Lion(p, lr=0.03),
    "saddle-free Newton": SaddleFreeNewton,
    "cubic Newton": CubicNewton,
}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
X, Y = torch.meshgrid(torch.linspace(-3.6, 2.4, 300), torch.linspace(-3.2, 3.2, 300), indexing="xy")
Z = X**3 - 3 * X * Y**2 + (X**2 + Y**2) ** 2 / 4
axes[0].contour(X, Y, Z, levels=[-6.5, -5, -3, -1, -0.2, 0, 0.2, 1, 3, 8, 20], colors="0.85", linewidths=0.8)
saddle = {}
for color, (name, make) in zip(COLORS, rows.items(), strict=False):
    losses, points = run("monkey-saddle", make, STEPS)
    saddle[name] = losses
    axes[0].plot(*points.T, color=color, linewidth=1.1, marker="o", markersize=1.8, label=name)
    axes[1].plot([x + 6.75 for x in losses], color=color, label=name)
axes[0].set(xlim=(-3.6, 2.4), ylim=(-3.2, 3.2), xlabel="x", ylabel="y", aspect="equal")
axes[1].set(xlabel="step", ylabel="loss above the minimum")
axes[1].legend(fontsize=8)

# %% [markdown]
# ## Plateaus: a deep linear network
#
# Three linear layers learn a matrix with singular values 4, 2, 1, 1/2. Near zero all directions are flat to third order. The network
# learns one singular value after the other; in between the loss rests at half the sum of squares of what is left (dashed), near a
# saddle each time.

# %%
STEPS = 80 if FAST else 600
rows = {
    "gradient descent": (lambda p, lr: SGD(p, lr=lr), grid(0.003, 0.3, 7)),
    "momentum 0.9": (lambda p, lr: SGD(p, lr=lr, momentum=0.9), grid(0.001, 0.1, 7)),
    "Adam": (lambda p, lr: Adam(p, lr=lr), grid(0.001, 0.1, 7)),
    "Lion": (lambda p, lr: Lion(p, lr=lr), grid(0.0003, 0.03, 7)),
    "SLS": (lambda p, lr: SLS(p, max_step=lr), [10.0]),
    "COCOB": (lambda p, lr: COCOB(p, lr=lr), [1.0]),
}
figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for rest in ((4, 2, 1, 0.5), (2, 1, 0.5), (1, 0.5), (0.5,)):
    ax.axhline(sum(s * s for s in rest) / 2, color="#8A8A8A", linewidth=0.8, linestyle="--")
plateau = {}
for color, (name, (make, rates)) in zip(COLORS, rows.items(), strict=False):
    lr, losses, _ = best("deep-linear", make, rates, STEPS)
    plateau[name] = losses[-1]
    ax.plot([max(x, 1e-8) for x in losses], color=color, label=name if len(rates) == 1 else f"{name}, lr = {lr:.2g}")
ax.set(yscale="log", xlabel="step", ylabel="loss", ylim=(1e-8, 30))
ax.legend(fontsize=8)

# %%
if not FAST:  # what the text says
    for (name, value), rate in zip(measured.items(), theory, strict=False):
        assert abs(value - rate) < 0.01 * rate, name
    assert ends["Adam"] > 0.9
    assert max(ends["AMSGrad"], ends["Yogi"]) < -0.9
    assert valley["trust-region Newton"] < 1e-12 < valley["gradient descent"]
    assert saddle["Adam"][60] < -5 < saddle["gradient descent"][60]
