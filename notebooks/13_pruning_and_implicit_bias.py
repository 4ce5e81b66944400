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
# # Pruning, and which solution training finds
#
# Two sides of one question: networks have more weights than they need. Which can go, and does the curvature of the loss know? And
# of the many solutions that fit the data, why does training find simple ones? For the second there are small models with theorems;
# each is held against its own.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

import analysis
from analysis.tasks import load_task
from curvature import Objective, eigsh

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook on less
task = load_task("digits-mlp" if FAST else "digits-cnn")
objective = task.objective()
print(objective, f"loss {float(objective.loss()):.2g}")

# %% [markdown]
# ## Whose choice costs the least?
#
# Each method scores every weight once and removes the lowest. Magnitude looks at the weight alone. Optimal brain damage weighs it by
# the diagonal of the Gauss-Newton matrix. Brain surgeons (WoodFisher, Kronecker factors) use an inverse, and move the kept weights so
# that the quadratic model of the loss rises least. A fifth of the images took no part in the scores.

# %%
METHODS = ("random", "magnitude", "obd", "woodfisher", "kfac")
pruning = analysis.measure_pruning(
    objective, methods=METHODS, sparsities=(0.3, 0.5) if FAST else (0.1, 0.2, 0.3, 0.5, 0.7), generator=0
)
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
analysis.plot_pruning(pruning, ax=axes[0])
analysis.plot_pruning_predictions(pruning, most=0.5, ax=axes[1])
axes[1].get_legend().remove()

# %% [markdown]
# Left: without half of its weights the network of a brain surgeon loses about a hundredth of what magnitude or the diagonal lose.
# Dotted lines, on images that took no part, lie close by. Right: every mark is one tensor at one sparsity up to one half. The
# prediction g'd + ½ d'H d, with the exact Hessian product of the displacement d, ranks the true changes well. Its values are right as
# long as they are small; beyond a rise of about 10⁻³ the true one is larger, in the end by hundreds of times.

# %%
print(f"{'Spearman with the true change':32}" + "".join(f"{m:>12}" for m in METHODS))
for predictor in ("predicted", "own", "diagonal", "size"):
    ranks = [pruning.rank_correlation(m, predictor) for m in METHODS]
    print(f"{predictor:32}" + "".join(f"{r:12.3f}" for r in ranks))
half = {m: next(p for p in pruning.of(m, "all") if p.sparsity == 0.5) for m in METHODS}
for m, p in half.items():
    print(f"{m:12} half of all weights: predicted {p.predicted:.2g}, true {p.true:.2g} ± {p.true_stderr:.1g}")

# %% [markdown]
# `predicted` is the quadratic model with the exact Hessian; `own` the method's own matrix; `diagonal` and `size` know the removed
# weights only. Error bars are over the data.
#
# ## The linear term
#
# A trained network is rarely at a stationary point of the loss that is measured: weight decay holds it off. The predicted change must
# then contain g'd. To rank weights by it is another matter: the scores below choose weights whose slopes all point downhill, and the
# curvature between them makes the loss rise.

# %%
for linear in (False, True):
    scores = analysis.pruning_scores(objective, "obd", linear=linear)
    d, own = scores.removal(scores.pruned(0.3))
    change = analysis.loss_changes(objective, d[:, None])
    print(
        f"linear term in the scores: {linear!s:5}  g'd {float(change.linear):+.1e}  ½ d'H d {float(change.curvature):.1e}  "
        f"true {float(change.true):.1e}"
    )

# %% [markdown]
# ## A mask is a choice of parameters
#
# `sparse_model` makes the kept weights the parameters. Nothing that trains or measures can touch what was removed, and every analysis
# runs on the sub-network as on any model. Here, the sharpness of the network before and after.

# %%
scores = analysis.pruning_scores(objective, "magnitude")
small = analysis.sparse_model(task.model, scores.masks(scores.pruned(0.5)))
sub = Objective(small, nn.CrossEntropyLoss(), task.train_data)
for name, o in (("dense", objective), ("half", sub)):
    top = eigsh(o, 1, generator=0).eigenvalues[0]
    print(f"{name:6} {o.num_params:6} parameters, loss {float(o.loss()):.2g}, sharpness {float(top):.3g}")

# %% [markdown]
# ## Lottery tickets
#
# Train, remove the small weights, set the others back to where they began, train again. Beside it, masks that keep as many weights of
# each tensor, drawn at random. The digits are easy, this network has room to spare, and at 80 % nearly any mask will do. The difference shows
# further out.

# %%
tickets = analysis.lottery_tickets(
    task.objective(),
    task.test_data,
    sparsities=(0.8,) if FAST else (0.8, 0.9, 0.95),
    num_seeds=2 if FAST else 5,
    steps=40 if FAST else 120,
    kinds=("random",),
    generator=0,
)
for row in tickets.rows[1:]:
    difference = tickets.difference(row.kind, row.sparsity)
    low, high = difference.interval()
    print(
        f"{row.kind:7} {row.sparsity:.0%}: accuracy less dense {difference.value:+.4f}, 95 % from {low:+.4f} to {high:+.4f}"
    )
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
ax = analysis.plot_tickets(tickets, ax=ax)

# %% [markdown]
# ## Depth: one singular value after the other
#
# A product of matrices, trained from a small start, learns the large singular values of its target first, each along a sigmoid that
# Saxe et al. (2014) have in closed form. The deeper, the sharper the steps: for a while the product has low rank.

# %%
g = torch.Generator().manual_seed(0)
U, V = (torch.linalg.qr(torch.randn(n, 4, generator=g, dtype=torch.float64)).Q for n in (8, 6))
target = U @ torch.diag(torch.tensor([3.0, 2.0, 1.2, 0.6], dtype=torch.float64)) @ V.T
runs = [analysis.train_deep_linear(target, depth=depth, scale=1e-2) for depth in (1, 2, 3)]
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for run, ax in zip(runs, axes, strict=True):
    analysis.plot_deep_linear(run, ax=ax)
    print(f"{run.depth} layers: at most {run.deviation:.2%} from the closed form")

# %% [markdown]
# Where only some entries of a matrix are seen, this decides what the others become: depth completes a matrix of rank one, a single
# layer leaves zeros.

# %%
low_rank = 2 * U[:, :1] @ V[:, :1].T
seen = torch.rand(low_rank.shape, generator=g) < 0.7
for depth in (1, 2):
    run = analysis.train_deep_linear(low_rank, depth=depth, scale=1e-3, observed=seen, time=40.0, aligned=False)
    hidden = float((run.product - low_rank)[~seen].norm() / low_rank[~seen].norm())
    print(f"{depth} layers: error on hidden entries {hidden:.1%}, effective rank {float(run.effective_rank[-1]):.2f}")

# %% [markdown]
# ## The size of the start: sparse or smooth
#
# A linear model with weights u² - v², trained from u = v = α, ends at the solution that minimises a potential between the l1 and the
# l2 norm (Woodworth et al. 2020). Small starts find the sparse solution, large ones that of least squares.

# %%
X = torch.randn(20, 40, generator=g, dtype=torch.float64)
truth = torch.zeros(40, dtype=torch.float64)
truth[:2] = torch.tensor([1.0, -0.7])
starts = [
    analysis.diagonal_linear_flow(X, X @ truth, alpha) for alpha in torch.logspace(-5, 2, 8 if FAST else 22).tolist()
]
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
ax = analysis.plot_diagonal_linear(starts, ax=ax)
print(f"smallest start: {starts[0].distance(starts[0].least_l1):.1e} from the solution of least l1 norm")
print(f"largest start:  {starts[-1].distance(starts[-1].least_l2):.1e} from the solution of least l2 norm")

# %% [markdown]
# ## Label noise: to where it is flat
#
# SGD whose labels are disturbed at every step does not stay at the solution it has found. It drifts along the solutions to where the
# trace of the Hessian is smallest, which for weights v² is a sparse solution. The flow is that of Li, Wang and Arora (2022).
#
# `curvature bias TASK` shows all of these on the inputs and targets of a task.

# %%
X = torch.randn(10, 30, generator=g, dtype=torch.float64)
truth = torch.zeros(30, dtype=torch.float64)
truth[:2] = torch.tensor([1.0, 0.7])
noisy = analysis.label_noise_descent(X, X @ truth, noise=0.7, steps=20_000 if FAST else 80_000, start=0.7, generator=0)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
analysis.plot_label_noise(noisy, ax=axes[0])
for values, mark, label in (
    (noisy.start, "s", "without noise"),
    (noisy.solution, "o", "with label noise"),
    (noisy.expected, "_", "flattest solution"),
):
    axes[1].plot(values, mark, label=label, markersize=5)
axes[1].set(xlabel="entry", ylabel="weight")
axes[1].legend(frameon=False)
off = float(((noisy.trace - noisy.expected_trace) / noisy.expected_trace).abs().mean())
print(f"tr H is {off:.0%} off the flow, on average")

# %%
assert all(run.deviation < 0.01 for run in runs)  # what the text says
assert starts[0].distance(starts[0].least_l1) < 1e-3
assert starts[-1].distance(starts[-1].least_l2) < 1e-3
assert off < 0.15
if not FAST:
    assert min(pruning.rank_correlation(m) for m in METHODS) > 0.95
    assert max(half["kfac"].true, half["woodfisher"].true) < 0.05 * min(half["magnitude"].true, half["obd"].true)
