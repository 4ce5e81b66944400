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
# # Capacity and generalisation
#
# Counting parameters says that a network with a hundred parameters for each example must overfit. It does not. Here: the
# exact case, in which test error peaks where there are as many features as examples and falls again beyond; the same for
# networks on digits, a fifth of whose training labels are wrong; what curvature sees of it that counting does not, and
# what it does not see; how many examples a training can fit; labels that mean nothing; and what regularisers do.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from analysis import (
    double_descent,
    effective_dimension,
    effective_model_complexity,
    least_squares_risk,
    plot_contrast_ratios,
    plot_descent,
    plot_descent_curvature,
    plot_dimension_of,
    plot_fitting,
    plot_model_complexity,
    random_labels,
    regularization_by_curvature,
)
from analysis.generalization.descent.findings import findings
from analysis.tasks import load_task

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook with less of everything
task = load_task("digits-mlp")
objective = task.objective()


def panels(count, height=3.4):
    """Return axes side by side, or single ones of so many times the width."""
    return plt.subplots(1, int(count), figsize=(4.6 * count, height), layout="constrained")[1]


# %% [markdown]
# ## The exact case
#
# Least squares of least norm on isotropic inputs has its expected risk in closed form (Belkin, Hsu and Xu 2020): a pole
# where there are as many features as examples. Of 100 features that matter equally, the model sees the first $p$; the others
# are noise to it.

# %%
n, D = 40, 100
p = np.arange(1, D + 1)
risk = np.array([least_squares_risk(n, int(k), signal=k / D, missed=1 - k / D, noise=0.04) for k in p])
ax = panels(1)
ax.semilogy(p, risk)
ax.axvline(n, linestyle=":", color="gray")
ax.set(xlabel="features p", ylabel="expected excess risk", ylim=(0.2, 50), title="40 examples")
assert np.isinf(risk[n - 1])
assert risk[-1] < risk[: n - 2].min()  # the second descent ends below the first valley

# %% [markdown]
# Random Fourier features of digits, solved exactly. Given the features, the loss averaged over label noise is known in closed
# form (crosses); the peak is at as many features as examples, and so is that of the condition number of $JJ'$, since the
# smallest singular value that is not zero comes closest to it there.

# %%
repeats, samples = (4, 80) if FAST else (20, 200)
exact = double_descent(
    objective, model="random-features", samples=samples, repeats=repeats, test_data=task.test_data, generator=0
)
for ax, of in zip(panels(2), ("error", "loss"), strict=True):
    plot_descent(exact, of=of, ax=ax)
peak = exact.peak("test_loss")
condition = exact.values[np.argmax(exact.interval("condition")[0])]
print(f"peak at {peak.value:.0f} features of {samples} examples, {peak.standing:.0f} standard errors above both sides")
print(f"condition number peaks at {condition:.0f}")
for finding in findings(exact):
    if finding.question == "Does the closed form hold?":
        print(finding.answer)
assert peak.value == condition == samples
assert peak.standing > (1 if FAST else 5)

# %% [markdown]
# ## Networks
#
# The tanh network of `digits-mlp` at growing width, 200 digits, a fifth of their labels wrong, test labels clean. Each repeat
# has its own wrong labels, the same at every width. Widths near the interpolation threshold are added where it is found.

# %%
settings = {"test_data": task.test_data, "generator": 0, "processes": 1 if FAST else 2}
short = {"repeats": 2, "steps": 60, "samples": 60, "values": (2, 4, 8)} if FAST else {"samples": 200, "steps": 2500}
curve = double_descent(objective, vary="width", **short, **settings)
for ax, of in zip(panels(2), ("error", "loss"), strict=True):
    plot_descent(curve, of=of, ax=ax)
for finding in findings(curve):
    print(f"{finding.question}\n  {finding.answer}\n")
if not FAST:
    peak, threshold = curve.peak("test_loss"), curve.threshold
    assert peak.standing > 3
    assert threshold.lower / 1.6 <= peak.value <= 1.6 * threshold.upper

# %% [markdown]
# Curvature along the same curve. The number of parameters grows without end; the effective dimension turns where the labels
# begin to be fitted. The condition number of $JJ'$ has no peak there: as long as there are fewer parameters than outputs on the
# training data, ten for each example, it lies where float64 ends, since some pixels hardly vary; beyond, it falls. Under
# cross-entropy labels are fitted long before.

# %%
for ax, name in zip(panels(2), ("effective_dimension", "condition"), strict=True):
    plot_descent_curvature(curve, name, ax=ax)

# %% [markdown]
# ## Where effective dimension tracks the test loss, and where it does not
#
# The same networks trained on the squared error. There, curvature does not carry $p(1-p)$, and does not vanish as labels are
# fitted: the effective dimension rises with width while the test loss falls from its peak.

# %%
short = short if FAST else {**short, "repeats": 3, "values": (4, 8, 16, 23, 32, 45, 64, 91)}
squared = double_descent(objective, vary="width", loss="squared", **short, **settings)


def beyond(found):
    """Return effective dimension and test loss from the peak of the loss on, and their rank correlation."""
    start = int(np.argmax(found.interval("test_loss")[0]))
    dimension, loss = (found.interval(name)[0][start:] for name in ("effective_dimension", "test_loss"))
    return dimension, loss, stats.spearmanr(dimension, loss).statistic if len(loss) > 2 else np.nan


for ax, found, name in zip(panels(2), (curve, squared), ("cross-entropy", "squared error"), strict=True):
    dimension, loss, rank = beyond(found)
    ax.loglog(dimension, loss, "o-")
    ax.set(xlabel="effective dimension, alpha = 1", ylabel="test loss", title=f"{name}: rank correlation {rank:.2f}")
    print(
        f"{name}: effective dimension {dimension[0]:.0f} to {dimension[-1]:.0f}, test loss {loss[0]:.2f} to {loss[-1]:.2f}"
    )
if not FAST:
    assert beyond(curve)[2] > 0.7
    assert beyond(squared)[0][-1] > beyond(squared)[0][0]

# %% [markdown]
# One trained network over all regularisers: Gauss-Newton matrix, Hessian, and the kernel of its outputs, in which the loss has no
# part. The gap between the first and the last is confidence.

# %%
found = effective_dimension(objective, generator=0, **({"steps": 10, "points": 5} if FAST else {}))
ax = plot_dimension_of(found, ax=panels(1, 3.6))
for m in found.matrices:
    print(f"{m.matrix:8} {found.at(1.0, m.matrix):6.0f} directions beside alpha = 1, {m.num_matvecs} products")

# %% [markdown]
# ## How many examples can it fit?
#
# The effective model complexity of a training procedure is the largest number of examples that it fits (Nakkiran et al. 2019), to a
# training error of 5 % here, wrong labels included. It depends on the steps as much as on the network.

# %%
lengths = (30, 60) if FAST else (200, 800)
few = {"repeats": 3, "resolution": 2.0} if FAST else {"repeats": 4, "resolution": 1.2}
for steps in lengths:
    emc = effective_model_complexity(objective, steps=steps, samples=300, **few, **settings)
    plot_model_complexity(emc, ax=panels(1.5, 3.0))
    print(f"{steps} steps: {emc.value:.0f} examples ({emc.lower:.0f} to {emc.upper:.0f}); with 300 it is {emc.regime}")

# %% [markdown]
# ## Labels that mean nothing
#
# A network of twenty parameters for each example fits them all: true labels, shuffled ones, random ones, pixels without
# order. Measured at the same training loss, what tells them apart is how far the parameters went, how sharp it is there, and how
# noisy the gradients are.

# %%
short = {"repeats": 2, "steps": 40, "samples": 40} if FAST else {"samples": 200, "steps": 1500}
labels = random_labels(objective, **short, **settings)
plot_fitting(labels, ax=panels(1.5, 3.2))
plot_contrast_ratios(labels, ax=panels(1.5, 3.8))
for condition in labels.conditions:
    print(
        f"{condition:16} test error {labels.mean('test_error', condition).value:.2f}, "
        f"steps to the target {labels.mean('steps', condition).value:.0f}, sharpness {labels.mean('sharpness', condition):.2g}"
    )
if not FAST:
    assert labels.ratio("steps", "random labels").lower > 1
    assert labels.ratio("distance", "random labels").lower > 1
    assert labels.mean("test_error", "random labels").value > 0.8

# %% [markdown]
# ## Regularisers, by what they do to curvature
#
# Six of them against none, with the same seeds, on 200 digits with true labels. Flatter is not better here, and much of the
# difference in curvature is one in training loss.

# %%
short = {"repeats": 2, "steps": 30, "samples": 40} if FAST else {"samples": 200, "steps": 800}
regularised = regularization_by_curvature(objective, **short, **settings)
plot_contrast_ratios(regularised, ax=panels(1.5, 4.8))
for condition in regularised.conditions[1:]:
    off = regularised.difference("test_error", condition)
    print(f"{condition:16} test error {100 * off.value:+.1f} ± {100 * off.stderr:.1f} points against none")
