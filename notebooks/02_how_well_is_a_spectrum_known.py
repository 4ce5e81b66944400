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
# # How well is a spectrum known?
#
# Two runs of a tool on the same network disagree about its sharpness. Was the solver sloppy, or were the data others? A
# number from a spectrum can be off in three ways: the eigensolver stopped early (*residual*), random probes stand in for a
# trace (*probes*), and the data are a sample themselves (*data*). This notebook takes all three from one set of products,
# and holds each to the truth on `digits-mlp`, whose Hessian can be written down.

# %%
import os

import matplotlib.pyplot as plt
import torch

from analysis.tasks import load_task
from curvature import HessianOperator, Objective, SpectrumPlan, eigsh, plan, spectrum
from curvature.linalg import effective_dimension, spectral_density, wasserstein

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook with fewer groups and repetitions


def generator(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## One plan, many quantities
#
# `plan` says what the quantities cost together before anything is spent. They share their products, so the density brings
# the trace and the norms along, and the eigenpairs come out of the same Krylov space.

# %%
task = load_task("digits-mlp")
inputs, targets = (t[: 364 if FAST else None] for t in task.train_data)
objective = Objective(task.model, task.loss, (inputs, targets), micro_batch=91)  # 16 groups of images
H = HessianOperator(objective)
for quantities in (["trace"], ["trace", "density"], ["trace", "density", "top", "bottom", "logdet"]):
    planned = plan(H, quantities)
    print(f"{planned.num_matvecs:4} products, {1e3 * planned.seconds:6.0f} ms: {', '.join(quantities)}")

# %%
found = spectrum(H, SpectrumPlan(k=10, num_bottom=3), generator=generator(0))
exact = torch.linalg.eigvalsh(H.to_dense().double()).flip(0)
trace, norm = found.trace(), found.frobenius_norm()
dampings = torch.tensor([1e-2, 1e-1, 1.0], dtype=torch.float64)
dimension = effective_dimension(found.density, dampings)
print(f"{found.num_matvecs} products, {found.seconds:.2f} s")
print(f"lambda_max {found.top.eigenvalues[0]:.4f} +- {found.top.residual_norms[0]:.0e}; exact {exact[0]:.4f}")
print(f"trace {trace.value:.2f} +- {trace.stderr:.2f}; exact {exact.sum():.2f}")
print(f"|H|_F {norm.value:.4f} +- {norm.stderr:.4f}; exact {exact.norm():.4f}")
print("effective dimension", [f"{v:.1f} +- {s:.1f}" for v, s in zip(dimension.value, dimension.stderr, strict=True)])
print("              exact", [f"{(exact / (exact + damping)).sum():.1f}" for damping in dampings])
assert torch.allclose(found.top.eigenvalues.double(), exact[:10], rtol=1e-4)
assert abs(trace.value - exact.sum()) < 4 * trace.stderr
assert wasserstein(found.density, exact) < 0.1 * exact.abs().mean()

# %% [markdown]
# ## Known eigenvalues leave little to chance
#
# The variance of a probe is twice the sum of squared eigenvalues, and a handful of outliers holds nearly all of that. Taken
# out of the probes and put back exactly, they leave a density that is far closer to the truth for the same products.

# %%
budgets = (60, 120) if FAST else (60, 120, 240, 480)
repetitions = 2 if FAST else 12
plain, deflated = [], []
for budget in budgets:
    distances = [[], []]
    for seed in range(repetitions):
        density = spectral_density(H, num_probes=budget // 30, num_steps=30, generator=generator(seed))
        distances[0].append(wasserstein(density, exact))
        same = spectrum(H, SpectrumPlan(k=10, num_bottom=0, num_probes=max(2, budget // 30)), generator=generator(seed))
        distances[1].append(wasserstein(same.density, exact))
    plain.append(torch.stack(distances[0]).mean())
    deflated.append(torch.stack(distances[1]).mean())
fig, ax = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
ax.loglog(budgets, plain, "o-", label="Lanczos quadrature")
ax.loglog(budgets, deflated, "s-", label="one block Krylov space")
ax.set(xlabel="products", ylabel="distance to the exact spectrum")
ax.set_xticks(budgets, [str(budget) for budget in budgets])
ax.minorticks_off()
ax.legend()
ratio = plain[1] / deflated[1]
print(f"at 120 products the distance is {ratio:.1f} times smaller")
assert ratio > 2

# %% [markdown]
# ## Other data
#
# While the products of the batches are added up, each is projected on the Krylov basis. So one can ask what the spectrum
# had been without a group of images, and the jackknife turns the answers into an error bar, for no
# product more. The bootstrap, which computes the whole Hessian anew for every resampled data set, says what it should be.

# %%
repeats = 2 if FAST else 40
tops = []
for seed in range(repeats):
    chosen = torch.randint(len(targets), (len(targets),), generator=generator(seed))
    resampled = Objective(task.model, task.loss, (inputs[chosen], targets[chosen]))
    tops.append(torch.linalg.eigvalsh(HessianOperator(resampled).to_dense().double()).flip(0)[:10])
bootstrap = torch.stack(tops)
jackknife = found.top_data_stderr()
residual = found.top.residual_norms.double()
print(f"{'lambda':>8} {'residual':>9} {'other data':>10} {'bootstrap':>10}")
rows = zip(found.top.eigenvalues, residual, jackknife, bootstrap.std(dim=0), strict=True)
for value, r, j, b in rows:
    print(f"{value:8.4f} {r:9.0e} {j:10.3f} {b:10.3f}")
assert (residual < 1e-2 * jackknife).all()
ratio = (jackknife.norm() / bootstrap.std(dim=0).norm()).item()
print(f"all ten together: jackknife / bootstrap = {ratio:.2f}; sixteen groups know an error bar to a fifth or so")
assert FAST or 0.6 < ratio < 1.6

# %%
fig, ax = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
ranks = torch.arange(1, 11)
values = found.top.eigenvalues
ax.errorbar(ranks, values, jackknife, fmt="o", capsize=3, label="one standard error over the data")
ax.plot(ranks[:, None] + 0.25, bootstrap.T, "k.", ms=2, alpha=0.4)
ax.plot([], [], "k.", ms=2, label="resampled data sets")
ax.set(xlabel="rank", ylabel="eigenvalue")
ax.legend()

# %% [markdown]
# The solver knows the sharpness to five digits, the data to one. Comparing sharpness between two checkpoints makes sense on
# the *same* data; a third digit of a sharpness on its own means nothing.
#
# ## Only the largest
#
# Where nothing but the largest pairs is wanted, `eigsh` chooses the method and says why.

# %%
pairs = eigsh(objective, 3, generator=generator(1))
print(pairs.method)
print(f"{pairs.num_matvecs} products: {[f'{v:.4f}' for v in pairs.eigenvalues]}")
bias = eigsh(objective.restrict("*.bias"), 3, generator=generator(1))
print(bias.method)
assert torch.allclose(pairs.eigenvalues.double(), exact[:3], rtol=1e-3)

# %% [markdown]
# A start from eigenvectors of a nearby matrix, as along training, needs a fraction of the products:

# %%
moved = 0.002 * torch.randn(objective.num_params, generator=generator(2))
with torch.no_grad():
    for p, step in zip(objective.space.tensors.values(), objective.space.to_dict(moved).values(), strict=True):
        p.add_(step)
warm = eigsh(objective, 3, v0=pairs.eigenvectors, generator=generator(3))
cold = eigsh(objective, 3, generator=generator(3))
print(f"after a step of training: {warm.num_matvecs} products warm, {cold.num_matvecs} cold")
assert warm.num_matvecs < cold.num_matvecs
assert torch.allclose(warm.eigenvalues, cold.eigenvalues, rtol=1e-3)
