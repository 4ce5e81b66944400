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
# # Sharpness and the landscape
#
# How sharp is a minimum, is it one, and what does the loss look like around it? Sharpness has many measures, and most of
# them change when the same network is written in another way. This notebook looks at which do, at the table for a trained
# network, at its conditioning, at the loss along its own eigenvectors and between checkpoints, and at what published
# relations come to in networks of this size.

# %%
import copy
import json
import os
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from scipy.stats import kendalltau
from torch import nn

from analysis import (
    Place,
    SharpnessPlan,
    bend_towards,
    critical_points,
    eigenvector_directions,
    load_task,
    loss_along,
    loss_along_path,
    loss_on_plane,
    measure_conditioning,
    measure_sharpness,
    plot_conditioning,
    plot_effective_dimension,
    plot_escape,
    plot_paths,
    plot_plane,
    plot_sharpness,
    plot_slice,
    random_direction,
)
from curvature import Objective

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook with smaller budgets


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def axes(width, height, columns=1):
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")[1]


# %% [markdown]
# ## What sharpness is not
#
# In a network of ReLUs the first layer may be multiplied by 5 and the next divided by 5: the same function, the same
# predictions, the same generalisation. Below, all measures before and after. What moves by a factor says something of how
# the network was written down, besides what it says of the minimum.

# %%
images, labels = load_task("digits-mlp").train_data
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).double()
small = (images[:200].double(), labels[:200])
optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
for _ in range(300):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(small[0]), small[1]).backward()
    optimizer.step()
twin = copy.deepcopy(net)
with torch.no_grad():
    for p in twin[1].parameters():
        p.mul_(5)
    twin[3].weight.div_(5)
print(f"largest difference between the outputs: {float((net(small[0]) - twin(small[0])).detach().abs().max()):.0e}")
either = [Objective(model, nn.CrossEntropyLoss(), small) for model in (net, twin)]
quick = ["trace", "sam", "worst_l2", "average", "keskar", "adaptive_trace", "asam", "adaptive_worst_l2", "fisher_rao"]
plan = SharpnessPlan(num_probes=4, num_steps=6, piece=50, measures=quick if FAST else None)
before, after = (measure_sharpness(o, plan, generator=generator()) for o in either)
plot_sharpness(after, reference=before, ax=axes(7, 1.2 + 0.27 * len(after.rows)))
ratios = after.ratios(before)
for row in before.rows:  # estimates agree like exact ones: they saw the same noise, stretched
    unmoved = row.name != "relative_flatness" or row.kind == "exact"
    assert not (row.rescaling_invariant and unmoved) or abs(ratios[row.name] - 1) < 1e-6, row.name
assert ratios["trace"] > 2

# %% [markdown]
# The same holds for pictures. A slice along a random direction of unit length sees another landscape; one whose filters
# have been given the norms of the network's filters sees the same.

# %%
steps = torch.linspace(-1, 1, 41)
for ax, scaling in zip(axes(8.5, 3.1, 2), ("raw", "filter"), strict=True):
    curves = []
    for objective, style, name in zip(either, ("-", "--"), ("as trained", "layers times 5, over 5"), strict=True):
        direction = random_direction(objective, scaling=scaling, generator=generator(1))
        curves.append(loss_along(objective, direction, steps).losses)
        ax.plot(steps, curves[-1], style, lw=1.8, label=name)
    change = float((curves[1] - curves[0]).abs().max() / curves[0].abs().max())
    print(f"{scaling:6} directions: the curve changes by {change:.0e}")
    assert (change < 1e-12) == (scaling == "filter")
    ax.set(title={"raw": "raw", "filter": "filter-normalised"}[scaling], xlabel="step", ylabel="loss")
    ax.legend(frameon=False)

# %% [markdown]
# ## The table
#
# For `digits-mlp`, 870 parameters. Marks are values in their own units, bars one standard error, arrows lower bounds:
# an ascent finds a high point, and there may be a higher one. No measure ranks models across settings; compare like with
# like, the invariant ones first.

# %%
task = load_task("digits-mlp")
objective = task.objective()
names = ["top_eigenvalue", "trace", "adaptive_trace", "sam", "average", "fisher_rao"] if FAST else None
table = measure_sharpness(objective, measures=names, generator=generator())
ax = plot_sharpness(table, ax=axes(7, 1.2 + 0.27 * len(table.rows)))

# %% [markdown]
# ## Conditioning
#
# Hessians of networks are singular, so the condition number runs over the eigenvalues beyond a stated share of the
# largest, and says mostly what that share is; ranks, and what preconditioners change, say more.

# %%
found = measure_conditioning(objective, num_steps=15 if FAST else 30, generator=generator())
plot_conditioning(found, ax=axes(7, 2.8))
print(f"effective rank {found.whole.effective_rank.value:.0f} +- {found.whole.effective_rank.stderr:.0f}, ", end="")
print(f"stable rank {found.whole.stable_rank.value:.1f}, of {found.whole.num_params}")
print(f"gradient descent is stable up to a rate of {found.max_stable_lr:.2g}")
assert found.whole.stable_rank.value < found.whole.effective_rank.value < found.whole.num_params

# %%
ax = plot_effective_dimension(found, ax=axes(6.5, 3.2))

# %% [markdown]
# ## Is it a minimum?
#
# `digits-mlp` was brought to a point where the gradient of the loss with weight decay vanishes. Of that loss it is a
# minimum, as far as the smallest eigenvalue found can say. Of the plain loss it is a saddle: the gradient, what the decay
# held against, is no larger than the noise of 1442 examples explains, and the smallest eigenvalues are negative. They are
# a few ten thousandths of the largest; the line along the lowest falls by two per cent of the loss and no more.

# %%
model = copy.deepcopy(task.model).double()
data = (images.double(), labels)
decay = 1e-3


def penalised(model, batch):
    penalty = sum(p.square().sum() for p in model.parameters())
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + decay / 2 * penalty


decayed = Objective(model, None, data, forward=penalised)
points = {}
for name, o, tolerance in (
    ("with decay", decayed, 1e-5),
    ("plain", Objective(model, nn.CrossEntropyLoss(), data), 1e-5),
):
    budget = {"num_steps": 20 if FAST else 40, "symmetries": False, "flatness": 1e-4}
    points[name] = critical_points(o, gradient_tolerance=tolerance, generator=generator(), **budget)
    point = points[name]
    print(f"{name}: {point.kind} ({point.why}); |g| = {point.gradient_norm:.1e}, lowest {point.lowest.value:.2e}")
for ax, (name, point) in zip(axes(9.5, 3.4, 2), points.items(), strict=True):
    plot_escape(point, ax=ax)
    ax.text(0.98, 0.94, name, transform=ax.transAxes, ha="right", va="top", fontweight="bold")
assert points["with decay"].kind.startswith("minimum")
assert points["plain"].lowest.value < -3 * points["plain"].lowest.stderr
assert points["plain"].kind == "saddle"

# %% [markdown]
# ## Along the eigenvectors
#
# The quadratic model is exact at the centre. How far does it hold? Not far: along the sharpest direction up to a few
# hundredths of a step, where the loss has risen by less than a quarter, and a random filter-normalised
# direction, thirteen times as long, is no different. Third derivatives are that large.

# %%
(first, second), _ = eigenvector_directions(objective, 2, generator=generator())
flat = random_direction(objective, scaling="filter", generator=generator(2), name="random, filter-normalised")
steps = torch.linspace(-1, 1, 61)
for ax, direction in zip(axes(10, 3.6, 2), (first, flat), strict=True):
    line = loss_along(objective, direction, steps)
    plot_slice(line, ax=ax)
    radius = line.quadratic_radius()
    rise = float(line.model(torch.tensor([radius, -radius]).double()).mean()) - line.centre
    print(f"{direction.name}: curvature {line.curvature:.3g}, model within 10 % up to {radius:.2g}, ", end="")
    print(f"where the loss of {line.centre:.3g} has risen by {rise:.2g}")
    assert 0.005 < radius < 0.5

# %%
axis = torch.linspace(-1, 1, 13 if FAST else 41)
plane = loss_on_plane(objective, first, second, axis, axis)
pair = axes(9, 4.3, 2)
plot_plane(plane, ax=pair[0])
plot_plane(plane, show="model", ax=pair[1])
assert torch.allclose(plane.model()[len(axis) // 2, len(axis) // 2], torch.tensor(plane.centre, dtype=torch.float64))

# %% [markdown]
# ## Between two solutions
#
# Two networks from different starts: on the straight way between them the loss is high, along a curve through one
# trained point it is low. Minima are not separate basins, at least not along lines.

# %%
torch.manual_seed(5)
other = load_task("digits-mlp").model
for layer in other:
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
for _ in range(60 if FAST else 300):
    optimizer.zero_grad()
    nn.functional.cross_entropy(other(images), labels).backward()
    optimizer.step()
theta = torch.cat([p.detach().flatten() for p in other.parameters()])
ends = Place(name="bundled", vector=objective.space.current()), Place(name="another start", vector=theta)
count = 30 if FAST else 400
bend = bend_towards(objective, *ends, num_gradients=count, generator=generator())
positions = torch.linspace(0, 1, 21)
paths = [
    loss_along_path(objective, *ends, positions),
    loss_along_path(objective, *ends, positions, bend=bend, num_gradients=count),
]
plot_paths(paths, ax=axes(6.5, 3.4))
print(f"barrier: straight {paths[0].barrier:.2f}, curved {paths[1].barrier:.3f}")
assert paths[1].barrier < (1 if FAST else 0.3) * paths[0].barrier

# %% [markdown]
# ## Published relations, at this size
#
# `benchmarks/relations/bench.py` measures them over three seeds; these are its stored rows. Bars and bands run from the
# smallest to the largest seed.

# %%
rows = json.loads(Path("benchmarks/results/relations.json").read_text())


def select(relation, **fixed):
    return [r for r in rows if r["relation"] == relation and all(r[key] == value for key, value in fixed.items())]


def over_seeds(chosen, x, y):
    """Return x, and the median, smallest and largest y over seeds."""
    at = sorted({row[x] for row in chosen})
    groups = [[row[y] for row in chosen if row[x] == value] for value in at]
    return at, [statistics.median(g) for g in groups], [min(g) for g in groups], [max(g) for g in groups]


def band(ax, chosen, x, y, colour, label, style="o-"):
    at, middle, low, high = over_seeds([row for row in chosen if row[y] is not None], x, y)
    ax.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
    ax.plot(at, middle, style, color=colour, ms=4, label=label)


left, right = axes(10, 3.6, 2)
training = select("training")
band(left, training, "step", "residual", "C0", r"$|H - G|_F\, /\, |H|_F$")
left.axhline(0.35, color="0.6", lw=1, ls=":")
left.set(xlabel="step of SGD", ylabel="share", ylim=(0, 1), title="what Gauss-Newton leaves out")
left.legend(frameon=False)
band(right, training, "step", "overlap_with_next", "C0", "top 10 eigenvectors with those at the next mark")
band(right, training, "step", "gradient_share", "C3", "share of the gradient in them", "s--")
right.axhline(training[0]["chance"], color="0.6", lw=1, ls=":", label="chance")
right.set(xlabel="step of SGD", ylim=(0, 1.45), title="the top subspace")
right.set_yticks([0, 0.25, 0.5, 0.75, 1])
right.legend(frameon=False, fontsize=8, loc="upper left")
for ax in (left, right):
    ax.set_xscale("symlog", linthresh=50, linscale=0.5)
    ax.set_xlim(-5, 4000)
    ax.set_xticks([0, 50, 100, 200, 400, 800, 1600, 3200], ["0", "50", "100", "200", "400", "800", "1600", "3200"])
    ax.minorticks_off()
for seed in {row["seed"] for row in training}:
    start, *_, end = sorted(select("training", seed=seed), key=lambda row: row["step"])
    assert end["residual"] + 4 * end["residual_stderr"] < 0.35 < start["residual"] - 4 * start["residual_stderr"]

# %% [markdown]
# The Hessian becomes the Gauss-Newton matrix, and the top subspace stays. The gradient lies in it late in training here,
# hardly in between; in other small networks it does not, so that this is reported, not relied on.
#
# Batch size and sharpness depend on what is held equal.

# %%
pair = axes(10, 3.6, 2)
for ax, relation, title in zip(
    pair, ("batch_size", "batch_size_equal_steps"), ("equal epochs", "equal steps"), strict=True
):
    chosen = select(relation)
    for y, colour, style, label in (
        ("top_eigenvalue", "#0072B2", "o-", r"$\lambda_{\max}(H)$"),
        ("adaptive_top_eigenvalue", "#009E73", "s--", r"$\lambda_{\max}(|\theta|\,H\,|\theta|)$"),
        ("loss", "#D55E00", "^:", "loss"),
    ):
        band(ax, chosen, "batch", y, colour, label, style)
        tau = kendalltau([row["batch"] for row in chosen], [row[y] for row in chosen])
        print(f"{title}: batch size and {y:23} tau {tau.statistic:+.2f}, p = {tau.pvalue:.1g}")
    ax.set_xscale("log")
    ax.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
    ax.minorticks_off()
    ax.set_yscale("log")
    ax.set(xlabel="batch size", title=title, ylim=(3e-3, 10))
legend = pair[0].legend(frameon=False)

# %% [markdown]
# At equal epochs large batches end less trained, at a higher loss, and with cross-entropy that alone is a higher
# curvature. At equal steps all end at about one loss, and the relation of Keskar et al. is there: from batches of 8 to
# batches of 256 the largest eigenvalue rises one and a half times, though the loss is slightly lower. The one that
# rescaling cannot move shows nothing of it. The p-values take runs for independent, though those of one seed share their
# start.
#
# Skips and normalisation layers, last: the loss of a network of 17 convolutions on a filter-normalised plane, with skips
# and without, and a network of 7 linear layers with and without batch normalisation. Both of each are trained alike, and
# end at different losses. Without skips or normalisation the curvature is larger, and without skips more of the plane
# is concave; a unit away from the minimum it is the network with skips whose loss has risen more.

# %%
from matplotlib.colors import LogNorm

pair = axes(9, 3.8, 2)
for ax, skip in zip(pair, (True, False), strict=True):
    (row,) = select("skips", skip=skip, seed=0)
    picture = ax.contourf(row["axis"], row["axis"], row["plane"], levels=[10 ** (k / 4) for k in range(-12, 13)],
                          norm=LogNorm(1e-3, 1e3), cmap="cividis", extend="both")  # fmt: skip
    ax.set(title=("with skips" if skip else "without") + f", loss {row['loss']:.2g}", aspect="equal",
           xlabel="first direction")  # fmt: skip
pair[0].set_ylabel("second direction")
plt.colorbar(picture, ax=pair, label="loss", ticks=[1e-3, 1e-2, 1e-1, 1, 10, 100, 1000])
for key in ("loss", "test_accuracy", "adaptive_top_eigenvalue", "edge_rise", "concave_share"):
    values = {skip: [row[key] for row in select("skips", skip=skip)] for skip in (True, False)}
    print(f"{key:24}", *(f"{'with' if s else 'without':8}" + " ".join(f"{v:8.3g}" for v in values[s]) for s in values))
for step in (0, 300):
    for key in ("largest", "effective_rank", "layer_spread", "smoothness", "loss_range", "loss"):
        both = [[row[key] for row in select("normalisation", step=step, norm=norm)] for norm in (True, False)]
        print(f"step {step:3} {key:16} normalised " + " ".join(f"{v:8.3g}" for v in both[0]), end="")
        print("   without " + " ".join(f"{v:8.3g}" for v in both[1]))
