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
# # The curvature of a transformer
#
# A transformer is made of unlike parts: tables of words, attention, two-layer networks, normalisation, a classifier behind
# it all. This notebook asks where its curvature lies, how far the parts are coupled, and what the frequencies of words have
# to do with it: on `text-gpt`, a bundled GPT with 53 000 parameters, and on MiniLM, a pretrained one with 22 million.

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from analysis import load_task
from curvature import HessianOperator, Objective, SpectrumPlan, layer_spectra, plan, spectrum
from curvature.layerwise import exact_diagonal

FAST = os.environ.get("NOTEBOOK_FAST") == "1"  # the tests run this notebook on fewer texts and probes


def axes(width, height, columns=1):
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")[1]


# %% [markdown]
# ## The network and the price
#
# It predicts the next of 231 words in sentences that a grammar draws; here on a part of its training texts.

# %%
task = load_task("text-gpt")
words, following = (t[: 24 if FAST else 128] for t in task.train_data)
objective = Objective(task.model, nn.CrossEntropyLoss(), (words, following))
H = HessianOperator(objective)
print(f"{objective.num_params} parameters, {words.numel()} words, loss {float(objective.loss()):.3f}")
print(f"its whole spectrum would take {plan(H, ['top', 'trace', 'density']).num_matvecs} products")

# %% [markdown]
# ## Layer by layer
#
# The diagonal block of each part: its trace, and its largest eigenvalue. All parts are multiplied in the
# same walks over the data.

# %%
groups = {"words": "words.*", "places": "places.*"}
for i in range(3):
    groups |= {f"attention {i + 1}": f"blocks.{i}.attention.*", f"MLP {i + 1}": f"blocks.{i}.mlp.*"}
groups |= {"norms": ["*norm1.*", "*norm2.*", "norm.*"], "head": "head.*"}
blocks = [objective.space.block(selection, task.model) for selection in groups.values()]
few = SpectrumPlan(k=1, num_bottom=0, num_probes=2 if FAST else 8, num_steps=2 if FAST else 6, confidence=None)
found = dict(zip(groups, layer_spectra(H, few, blocks=blocks, generator=0).values(), strict=True))
whole = spectrum(H, few, generator=0)

# %%
names, colours = list(found), ["C0" if "attention" in name else "C1" if "MLP" in name else "C2" for name in found]
traces = [found[name].trace() for name in names]
left, right = axes(8.5, 3.2, 2)
for ax, values, errors, title in (
    (left, [float(t.value) for t in traces], [float(t.stderr) for t in traces], "trace"),
    (right, [float(found[n].top.eigenvalues[0]) for n in names], None, "largest eigenvalue"),
):
    ax.barh(names[::-1], values[::-1], xerr=None if errors is None else errors[::-1], color=colours[::-1])
    ax.set(title=title)
total, parts = whole.trace(), sum(float(t.value) for t in traces)
print(f"trace {float(total.value):.1f} +- {float(total.stderr):.1f}, and the parts' together {parts:.1f}")
steepest = max(float(each.top.eigenvalues[0]) for each in found.values())
print(f"largest eigenvalue {float(whole.top.eigenvalues[0]):.2f}, of a part at most {steepest:.2f}")
error = sum(float(t.stderr) ** 2 for t in traces) ** 0.5
assert abs(parts - float(total.value)) < 6 * (error**2 + float(total.stderr) ** 2) ** 0.5 + 1e-6
assert float(whole.top.eigenvalues[0]) > 0.98 * steepest

# %% [markdown]
# ## How far the parts are coupled
#
# Optimizers like K-FAC and Shampoo act on each part alone: they take the blocks off the diagonal for zero. Their size is
# estimated with random signs $z$ in one part at a time: $\mathbb{E}\,\|(Hz)_A\|^2 = \|H_{AB}\|_F^2$. On the right each block
# is divided by the geometric mean of the two diagonal ones; a block-diagonal matrix would show a black square with a white
# diagonal.

# %%
signs = torch.Generator().manual_seed(0)
norms = torch.zeros(len(blocks), len(blocks))
for j, block in enumerate(blocks):
    z = torch.randint(0, 2, (block.num_params, 2 if FAST else 12), generator=signs) * 2.0 - 1.0
    Hz = H @ block.embed(z, objective.num_params)
    for i, other in enumerate(blocks):
        norms[i, j] = other.take(Hz).square().sum(0).mean().sqrt()
scale = norms.diag().sqrt()
inside = float(norms.diag().square().sum() / norms.square().sum())
for ax, values, title in zip(
    axes(9.5, 4.2, 2), (norms, norms / scale[:, None] / scale), ("Frobenius norm of blocks", "relative"), strict=True
):
    image = ax.imshow(values.numpy(), cmap="magma", norm="log" if title != "relative" else None)
    ax.set(title=title, xticks=range(len(names)), yticks=range(len(names)), yticklabels=names)
    ax.set_xticklabels(names, rotation=90)
    plt.colorbar(image, ax=ax, shrink=0.8)
print(f"{100 * inside:.0f} % of the squared Frobenius norm lies in the diagonal blocks")
assert float((norms - norms.T).norm() / norms.norm()) < 0.3  # estimates of equal numbers from either side
assert 0.1 < inside < 0.9

# %% [markdown]
# ## Frequent words are steep
#
# The rows of the head belong to words. The Gauss-Newton matrix of a row is a mean over all places of $p_k (1 - p_k) h h'$,
# so a word's curvature goes with how often it is expected: over orders of magnitude, in one matrix. That is a common account
# of why gradient descent is slow on language where Adam is not (Kunstner et al. 2024, arXiv:2402.19449).

# %%
samples = 2 if FAST else 16
diagonal = exact_diagonal(objective, "ggn-mc", mc_samples=samples, generator=torch.Generator().manual_seed(0)).value
of_head = objective.space.block("head.*", task.model).take(diagonal).view(task.model.head.weight.shape).mean(1)
of_words = objective.space.block("words.*", task.model).take(diagonal).view(task.model.words.weight.shape).mean(1)
ax = axes(4.6, 3.4)
for rows, given, label in ((of_head, following, "row of the head"), (of_words, words, "row of the table of words")):
    count = torch.bincount(given.flatten(), minlength=len(rows)).float()
    seen = (count > 0) & (rows > 0)
    logs = torch.stack([count[seen].log(), rows[seen].log()])
    slope = float(torch.cov(logs)[0, 1] / logs[0].var())
    ax.loglog(count[seen], rows[seen], ".", label=f"{label}: slope {slope:.2f}")
    print(f"{label}: correlation of the logarithms {float(torch.corrcoef(logs)[0, 1]):.2f}, slope {slope:.2f}")
    assert float(torch.corrcoef(logs)[0, 1]) > 0.6
ax.set(xlabel="how often the word occurs", ylabel="mean of the GGN's diagonal")
ax.legend(frameon=False)

# %% [markdown]
# ## A pretrained one
#
# MiniLM's table of words has half of its 22.6 million parameters. `python -m benchmarks.pretrained.bench --layers` measured
# the traces of its parts from 16 shared products, on the similarity of 24 pairs of sentences, for which it was trained, on
# others. The last layers have negative traces: this is no minimum on these sentences, and it is least one there.

# %%
stored = json.loads(Path("benchmarks/results/pretrained_layers.json").read_text())
rows = [row for row in stored if row["model"] == "minilm"][::-1]
ax = axes(6.5, 3.6)
ax.barh(
    [row["part"] for row in rows],
    [row["trace"] for row in rows],
    xerr=[row["trace_stderr"] for row in rows],
    color=["C0" if "attention" in row["part"] else "C1" if "MLP" in row["part"] else "C2" for row in rows],
)
ax.set(xlabel="trace of the part's block of the Hessian, one standard error")
last = [row for row in rows if row["part"] in ("attention 5", "MLP 5", "attention 6", "MLP 6")]
assert all(row["trace"] < -3 * row["trace_stderr"] for row in last)
