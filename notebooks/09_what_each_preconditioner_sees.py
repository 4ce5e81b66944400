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
# # What each preconditioner sees, layer by layer
#
# An optimizer divides the gradient by a matrix $P$: Newton by the curvature $G$ itself, Adam by a diagonal, Muon and
# Shampoo by matrices on one or both sides of a layer's weight, SOAP by a diagonal in Shampoo's eigenbasis, K-FAC and
# EKFAC by a Kronecker product that is measured for the purpose. What is left of a layer's curvature is the spectrum of
# $P^{-1/2} G P^{-1/2}$: flat for Newton, and the flatter the better. Here all of them look at the same point.

# %%
import os

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import analysis
from curvature import GGNOperator, Objective
from optimizers import EKFAC, KFAC

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook with fewer batches

torch.manual_seed(0)
x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x, y = x[:600].float() / 16, y[:600]
model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10))
loss = nn.CrossEntropyLoss()
adam = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(150):
    rows = torch.randperm(600)[:64]
    adam.zero_grad()
    loss(model(x[rows]), y[rows]).backward()
    adam.step()
print(f"training loss {loss(model(x), y).item():.2f}")
model.double()
x = x.double()
objective = Objective(model, loss, (x, y))

# %% [markdown]
# ## The curvature of each layer
#
# The Gauss-Newton block of a layer with $o$ outputs and $i$ inputs is a matrix over the entries of $[W\ b]$, $o(i+1)$ of
# them, here built in full. Its eigenvalues span many powers of ten: that is what a preconditioner is up against.


# %%
def rows_of(layer):
    """Order of the entries of [W b], row by row, in the parameters as they lie: the weight, then the bias."""
    o, i = layer.weight.shape
    return torch.cat([torch.arange(o * i).view(o, i), o * i + torch.arange(o)[:, None]], 1).reshape(-1)


layers = {name: module for name, module in model.named_children() if isinstance(module, nn.Linear)}
blocks = {}
for name, layer in layers.items():
    dense = GGNOperator(objective).restrict(f"{name}.*").to_dense()
    blocks[name] = dense[rows_of(layer)][:, rows_of(layer)]
    values = torch.linalg.eigvalsh(blocks[name])
    small = int((values < 1e-3 * values[-1]).sum())
    print(f"layer {name}: {len(values)} entries, largest eigenvalue {values[-1]:.2g}, {small} below a thousandth of it")

# %% [markdown]
# ## What the optimizers know
#
# K-FAC and EKFAC measure factors at this point with the exact root of the loss's Hessian (`fisher="type-2"`), at a
# learning rate of zero. The others see gradients of mini-batches only: their mean, their squares, and the sums of $GG'$
# and $G'G$ over batches.

# %%
measured = {}
for method in (KFAC, EKFAC):
    optimizer = method(model.parameters(), lr=0.0, loss=loss, fisher="type-2", factor_beta=0.5, damping_form="exact")
    for _ in range(3 if FAST else 12):
        optimizer.step(lambda: (model(x), y))
    measured[method] = {name: optimizer.state[layer.weight] for name, layer in layers.items()}

gradients = {name: [] for name in layers}
for _ in range(20 if FAST else 200):
    rows = torch.randperm(600)[:64]
    found = torch.autograd.grad(loss(model(x[rows]), y[rows]), list(model.parameters()))
    for k, name in enumerate(layers):
        gradients[name].append(torch.cat([found[2 * k], found[2 * k + 1][:, None]], 1))
gradients = {name: torch.stack(g) for name, g in gradients.items()}


# %%
def power(matrix, exponent):
    """Return a power of a positive semi-definite matrix, its eigenvalues raised to 1e-6 of the largest."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(1e-6 * float(values[-1])) ** exponent @ vectors.T


def preconditioners(name):
    """Return P of every method for one layer, as a matrix over the entries of [W b] row by row."""
    G = gradients[name]
    o, i = G.shape[1:]
    L, R = (G @ G.mT).mean(0), (G.mT @ G).mean(0)
    QL, QR = (torch.linalg.eigh(factor).eigenvectors for factor in (L, R))
    Q = torch.kron(QL.contiguous(), QR.contiguous())
    M = G.mean(0)
    kfac, ekfac = measured[KFAC][name], measured[EKFAC][name]
    E = torch.kron(ekfac["left_basis"][0], ekfac["right_basis"][0])
    return {
        "gradient descent": torch.eye(o * i, dtype=G.dtype),
        "Adam": torch.diag(G.square().mean(0).sqrt().reshape(-1)),
        "Muon": torch.kron(power(M @ M.T, 0.5), torch.eye(i, dtype=G.dtype)),
        "Shampoo": torch.kron(power(L, 0.25), power(R, 0.25)),
        "SOAP": Q @ torch.diag((QL.T @ G @ QR).square().mean(0).sqrt().reshape(-1)) @ Q.T,
        "K-FAC": torch.kron(kfac["left"][0], kfac["right"][0]),
        "EKFAC": E @ torch.diag(ekfac["spread"].reshape(-1)) @ E.T,
        "Newton": blocks[name],
    }


def spectrum_under(P, G, share=1e-4):
    """Return the eigenvalues of P^-1/2 G P^-1/2 over the largest, P damped by a share of its largest eigenvalue."""
    values, vectors = torch.linalg.eigh((P + P.T) / 2)
    root = vectors * (values.clamp_min(0) + share * values[-1]).rsqrt() @ vectors.T
    seen = torch.linalg.eigvalsh(root @ G @ root).flip(0).clamp_min(0)
    return seen / seen[0]


def effective_rank(spectrum):
    """exp of the entropy: how many directions a step with one rate for all moves at a comparable speed."""
    p = spectrum / spectrum.sum()
    return float(torch.exp(-(p * p.clamp_min(1e-30).log()).sum()))


spectra, ranks = {}, {}
for name in layers:
    found = preconditioners(name)
    spectra[name] = {method: spectrum_under(P, blocks[name]) for method, P in found.items()}
    ranks[name] = {method: effective_rank(spectrum) for method, spectrum in spectra[name].items()}
print(f"{'effective rank':18}" + "".join(f"layer {name} of {len(blocks[name]):4}   " for name in layers))
for method in found:
    print(f"{method:18}" + "".join(f"{ranks[name][method]:12.0f}        " for name in layers))

# %% [markdown]
# ## Before and after
#
# Each curve is a layer's curvature under one method, largest first. A method that brings more of them near the top moves
# more directions at the same speed. Muon's matrix comes from the mean gradient alone: it makes all directions of that
# gradient equally fast, which is another aim, and its spectrum is no flatter than that of gradient descent. The gap of
# K-FAC to Newton is what its Kronecker product misses, and the gap of SOAP to K-FAC what squares of gradients of
# mini-batches do not tell about curvature.

# %%
names = ["0.6", "tab:orange", "tab:brown", "tab:green", "tab:olive", "tab:blue", "tab:purple", "k"]
colors = dict(zip(found, names, strict=True))
figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, constrained_layout=True)
for ax, name in zip(axes, layers, strict=True):
    for method, spectrum in spectra[name].items():
        places = torch.arange(1, len(spectrum) + 1) / len(spectrum)
        ax.plot(places.numpy(), spectrum.clamp_min(1e-9).numpy(), color=colors[method], label=method, linewidth=1.6)
    ax.set(yscale="log", ylim=(1e-6, 1.5), xlim=(0, 1), xlabel="share of the directions")
    ax.set_title(f"layer {name}: {len(blocks[name])} entries")
axes[0].set_ylabel("eigenvalue over the largest")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
plt.show()

# %%
for name in layers:
    of = ranks[name]
    assert of["Newton"] > of["EKFAC"] > 2 * of["Adam"], of
    assert of["K-FAC"] > 2 * max(of["gradient descent"], of["Adam"], of["Muon"]), of

# %% [markdown]
# ## How good is the Kronecker product?
#
# K-FAC's error against the true block, next to that of a diagonal and of EKFAC, which has the same eigenvectors and
# better eigenvalues. The error is in the Frobenius norm, relative to the block's. Next to it the last layer in pictures.

# %%
for name, G in blocks.items():
    P = preconditioners(name)
    errors = {
        "diagonal": torch.diag(G.diagonal()),
        "K-FAC": P["K-FAC"],
        "EKFAC": P["EKFAC"],
    }
    said = ", ".join(f"{method} {float((A - G).norm() / G.norm()):.2f}" for method, A in errors.items())
    print(f"layer {name}: {said}")
    assert (P["EKFAC"] - G).norm() <= (P["K-FAC"] - G).norm() < (errors["diagonal"] - G).norm()

last = list(layers)[-1]
P, G = preconditioners(last), blocks[last]
figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), constrained_layout=True)
scale = float(G.abs().quantile(0.995))
titles = ("Gauss-Newton block", "K-FAC", "difference")
for ax, picture, title in zip(axes, (G, P["K-FAC"], P["K-FAC"] - G), titles, strict=True):
    image = ax.imshow(picture.numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale)
    ax.set(title=title, xticks=range(0, len(G), 13), yticks=range(0, len(G), 13), xticklabels=[], yticklabels=[])
axes[0].set_ylabel(f"entries of layer {last}, an output each 13")
figure.colorbar(image, ax=axes, shrink=0.8)
plt.show()

# %% [markdown]
# ## Without building blocks
#
# For networks whose layers are too large, the same question is answered from products: `measure_conditioning` with
# `kfac=True`, or `curvature conditioning TASK --kfac`, looks at each layer's block under every preconditioner.

# %%
found = analysis.measure_conditioning(
    objective, matrix="ggn", kfac=True, optimizers={"adam": adam}, num_probes=2, num_steps=20, generator=0
)
print(f"{'effective rank':18}" + "".join(f"layer {c.name:8}" for c in found.layers))
for method, conditions in (("none", found.layers), *found.layers_under.items()):
    print(f"{method:18}" + "".join(f"{c.effective_rank.value:<14.0f}" for c in conditions))
for plain, kfac in zip(found.layers, found.layers_under["kfac"], strict=True):
    assert kfac.effective_rank.value > 2 * plain.effective_rank.value
