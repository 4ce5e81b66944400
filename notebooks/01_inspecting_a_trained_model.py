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
# # Inspecting a trained model
#
# A network has been trained. Its loss is low, its gradient is small. What does the loss look like around the point where
# training stopped: how sharp is it, in how many directions, is it a minimum at all, and which layers decide that?
#
# All of this is in one matrix, the Hessian $H$ of the loss, which is far too large to be written down but can be
# multiplied by a vector at the price of about two gradients. This notebook goes from that product to the spectrum. It
# works on two networks that ship with the toolkit and were trained on scikit-learn's handwritten digits: `digits-mlp`,
# so small that its Hessian *can* be written down, which lets us hold every estimate to the truth; and `digits-cnn`,
# where the truth is out of reach and error bars have to do.

# %%
import os

import matplotlib.pyplot as plt
import torch

from analysis import load_task, plot_spectral_density
from curvature import GGNOperator, HessianOperator, Objective
from curvature.linalg import eigsh, spectral_density, trace

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook with fewer probes and images


def generator(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## The objective
#
# An `Objective` is a model, a loss and data, seen as one function of the parameters. `check()` verifies once, on this very
# model, what everything later takes for granted.

# %%
task = load_task("digits-mlp")
objective = task.objective()
report = objective.check()
print(objective)
print("\n".join(report.messages))

# %%
loss, gradient = objective.loss_and_gradient()
print(f"loss {loss:.4f}, gradient norm {gradient.norm():.1e}, {objective.total_weight:.0f} examples")

# %% [markdown]
# ## Hessian-vector products
#
# `HessianOperator(objective)` is the matrix, known through `@`. Here it is small enough to be spelled out, by multiplying
# the identity.

# %%
H = HessianOperator(objective)
dense = H.to_dense()
exact = torch.linalg.eigvalsh(dense.double()).flip(0)  # descending, as results have it
asymmetry = ((dense - dense.T).norm() / dense.norm()).item()
print(f"{H.shape[0]} x {H.shape[1]}, asymmetry {asymmetry:.1e}, lambda_max {exact[0]:.4f}, lambda_min {exact[-1]:.4f}")
assert asymmetry < 1e-5

# %% [markdown]
# The sharpest direction is real: along it the loss is the parabola that $\lambda_{\max}$ predicts, for as long as the
# quadratic model holds. Parameters are moved by hand and put back.

# %%
top = eigsh(H, 10, rtol=1e-3, generator=generator(0)).raise_if_failed()
u = top.eigenvectors[:, 0]
sharpness = top.eigenvalues[0].item()


def loss_along(direction, steps):
    original = [p.detach().clone() for p in objective.space.tensors.values()]
    losses = []
    with torch.no_grad():
        for t in steps:
            moved = objective.space.to_dict(t * direction)
            for p, p0, d in zip(objective.space.tensors.values(), original, moved.values(), strict=True):
                p.copy_(p0 + d)
            losses.append(objective.loss().item())
        for p, p0 in zip(objective.space.tensors.values(), original, strict=True):
            p.copy_(p0)
    return torch.tensor(losses)


t = torch.linspace(-0.15, 0.15, 61)
along = loss_along(u, t)
parabola = loss + t * (gradient @ u) + 0.5 * sharpness * t**2
fig, ax = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
ax.plot(t, along, label="loss")
ax.plot(t, parabola, "--", label=r"$L + t\,g^\top u + \frac{1}{2}\lambda_{\max} t^2$")
ax.set(xlabel="step t along the top eigenvector", ylabel="loss")
ax.legend()
small = t.abs() <= 0.02
curvature_error = ((along - parabola)[small].abs().max() / (along[small].max() - along[small].min())).item()
print(f"within |t| <= 0.02 the parabola is off by {100 * curvature_error:.1f} % of the rise")
assert curvature_error < 0.1

# %% [markdown]
# ## The top of the spectrum
#
# `eigsh` is a restarted Lanczos method. Every eigenvalue comes with its residual $\|Hu - \lambda u\|$: an exact eigenvalue
# lies within that distance. Held against the dense matrix:

# %%
print(f"{'lambda':>10} {'residual':>10} {'exact':>10}")
for value, residual, truth in zip(top.eigenvalues, top.residual_norms, exact, strict=False):
    print(f"{value:10.4f} {residual:10.1e} {truth:10.4f}")
print(f"{top.num_matvecs} products for {len(top.eigenvalues)} pairs")
rounding = 1e-5 * exact[0]
assert torch.all((top.eigenvalues - exact[:10]).abs() <= top.residual_norms + rounding)
assert top.num_matvecs < 100

# %% [markdown]
# Is this point a minimum? The other end of the spectrum says how negative the most negative curvature is.

# %%
bottom = eigsh(H, 3, which="SA", rtol=1e-2, generator=generator(1)).raise_if_failed()
print(
    "smallest eigenvalues",
    [f"{v:.4f} +- {r:.0e}" for v, r in zip(bottom.eigenvalues, bottom.residual_norms, strict=True)],
)
assert abs(bottom.eigenvalues[-1] - exact[-1]) <= bottom.residual_norms[-1] + rounding

# %% [markdown]
# ## Trace and density
#
# The trace is the mean of $z^\top H z$ over random sign vectors $z$. Its standard error is as important as its value: here
# is the estimate after more and more probes, with the exact trace as a line. Two thirds of such bars should cover it.

# %%
num_probes = 40 if FAST else 400
estimate = trace(H, method="hutchinson", num_matvecs=num_probes, generator=generator(2))
counts = torch.arange(5, num_probes + 1, 5)
means = torch.stack([estimate.samples[:k].mean() for k in counts])
bars = torch.stack([estimate.samples[:k].std() / k**0.5 for k in counts])
fig, ax = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
ax.fill_between(counts, means - bars, means + bars, alpha=0.3, label="one standard error")
ax.plot(counts, means, label="estimate")
ax.axhline(exact.sum(), color="k", lw=1, label="exact trace")
ax.set(xlabel="probes (products)", ylabel="tr H")
ax.legend()
z = ((estimate.value - exact.sum()) / estimate.stderr).item()
print(f"tr H = {estimate.value:.3f} +- {estimate.stderr:.3f}; exact {exact.sum():.3f}, {z:+.1f} standard errors away")
assert abs(z) < 4

# %% [markdown]
# The density of all eigenvalues takes a few Lanczos runs. The outliers found above are put in exactly and the runs are
# left with the bulk. On the left the density, each eigenvalue a small bump; on the right the number of eigenvalues above
# a threshold, as the runs have it and as it is.

# %%
density = spectral_density(H, num_probes=4 if FAST else 10, num_steps=40, generator=generator(3), deflate=top)
thresholds = torch.logspace(-3.5, 0.5, 100, dtype=torch.float64)
above = torch.stack([870 * (density.weights * (density.nodes > t)).sum(dim=1) for t in thresholds])
truth = torch.stack([(exact > t).sum() for t in thresholds])
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
plot_spectral_density(density, ax=left)
right.loglog(thresholds, truth, color="k", lw=1, label="exact")
right.loglog(thresholds, above.mean(dim=1), "--", label=f"{density.num_matvecs} products")
right.set(xlabel="threshold", ylabel="eigenvalues above it", ylim=(0.7, 900))
right.legend()
mean_eigenvalue, mean_stderr = density.expectation(lambda x: x)
print(f"mean eigenvalue {mean_eigenvalue:.5f} +- {mean_stderr:.5f}; exact {exact.mean():.5f}")
assert abs(mean_eigenvalue - exact.mean()) < 4 * mean_stderr + 1e-6
assert (above.mean(dim=1) - truth).abs().max() < 0.1 * 870

# %% [markdown]
# ## Hessian and Gauss-Newton matrix
#
# $H$ is the Gauss-Newton matrix $G = J^\top L J$, which cannot be negative, plus the curvature of the model itself weighted
# by the residuals. At a well-fitted point the second part is small: $G$ explains nearly all of $H$.

# %%
G = GGNOperator(objective).to_dense()
distance = ((dense - G).norm() / dense.norm()).item()
print(f"|H - G| / |H| = {distance:.3f}; smallest eigenvalue of G {torch.linalg.eigvalsh(G.double())[0]:.1e}")
assert distance < 0.35

# %% [markdown]
# ## A network whose Hessian cannot be written down
#
# The same calls on `digits-cnn`. Its Hessian has 209 million entries; the spectrum takes a few hundred products. Layers are
# diagonal blocks of the same operator, at a fraction of the price.

# %%
cnn_task = load_task("digits-cnn")
images, digits = cnn_task.train_data
count = 180 if FAST else len(images)
cnn = Objective(cnn_task.model, cnn_task.loss, (images[:count], digits[:count]))
C = HessianOperator(cnn)
cnn_top = eigsh(C, 5 if FAST else 10, rtol=1e-2 if FAST else 1e-3, generator=generator(4)).raise_if_failed()
cnn_density = spectral_density(
    C, num_probes=2 if FAST else 5, num_steps=20 if FAST else 50, generator=generator(5), deflate=cnn_top
)
fig, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
plot_spectral_density(cnn_density, ax=ax)
print(f"{cnn.num_params} parameters, sharpness {cnn_top.eigenvalues[0]:.4f} +- {cnn_top.residual_norms[0]:.0e}")

# %%
layers = []
for block in cnn.space.blocks:
    pair = eigsh(C.restrict(block), 1, rtol=1e-2, generator=generator(6))
    layers.append(
        (block.name, block.num_params, pair.eigenvalues[0].item(), pair.residual_norms[0].item(), pair.num_matvecs)
    )
print(f"{'layer':<12} {'parameters':>10} {'sharpness':>10} {'residual':>9} {'products':>9}")
for name, size, value, residual, products in layers:
    print(f"{name:<12} {size:>10} {value:>10.4f} {residual:>9.0e} {products:>9}")
# a diagonal block cannot be sharper than the whole matrix
assert (
    max(value for _, _, value, _, _ in layers)
    <= cnn_top.eigenvalues[0].item() * 1.001 + cnn_top.residual_norms[0].item()
)

# %% [markdown]
# ## What sharpness means for training
#
# Plain gradient descent is stable along a direction of curvature $\lambda$ as long as its step is below $2/\lambda$. A step
# just below and one just above $2/\lambda_{\max}$, started a hair away from the trained point along the sharpest direction:

# %%
limit = 2 / cnn_top.eigenvalues[0].item()
C_u = cnn_top.eigenvectors[:, 0]
for factor in (0.9, 1.1):
    x = torch.tensor(1.0)
    path = [x.item()]
    for _ in range(20):  # the component along u under gradient descent on the quadratic model: x <- (1 - eta u'Cu) x
        x = x - factor * limit * (C_u @ (C @ (x * C_u)))
        path.append(x.item())
    print(f"step {factor * limit:.3f} = {factor} * 2 / lambda_max: |x| goes 1 -> {abs(path[-1]):.3f} in 20 steps")
    assert (abs(path[-1]) < 1) == (factor < 1)
