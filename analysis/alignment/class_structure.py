"""Where the outliers of a classifier's spectrum come from: the Gauss-Newton matrix by means over classes.

With g_ic' = J_i'(e_c' - p_i) for example i and class c', softmax cross-entropy has exactly

    G = (1/N) sum_i sum_c' p_i(c') g_ic' g_ic''.

Means d_cc' over the examples of class c, weighted by p_i(c'), and d_c over c' != c split it without remainder into
sum_c w_c d_c d_c' (C outliers), the spread of d_cc' around d_c (at most C (C - 2) further directions of a minor bulk),
sum_c w_cc d_cc d_cc' and what varies within classes.

Reference: Papyan (2020), Traces of class/cross-class structure pervade deep learning spectra, arXiv 2008.11865.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analysis.alignment.measure import subspace_overlap
from analysis.alignment.results import ClassStructure, SubspaceOverlap
from curvature.arguments import checked
from curvature.engine.linearize import Linearization
from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.layerwise import exact_diagonal
from curvature.losses.rules import CrossEntropy
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors

__all__ = ["class_structure"]


@in_whole_vectors
@full_precision
@checked
def class_structure(objective: Objective, *, top: Tensor | None = None) -> ClassStructure:
    """Split the Gauss-Newton matrix of a classifier into class, cross-class, own-class and within-class terms.

    Exact up to rounding. Cost: a backward pass for each class of a batch and each class it may be taken for, at most
    C^2 a batch, and the exact diagonal of G for its trace. Memory: C^2 vectors.

    Args:
        objective: with `nn.CrossEntropyLoss` on class indices, without class weights or label smoothing; logits
            (N, C, ...), ignored targets count nothing.
        top: eigenvectors (n, k) of G or H, whose overlap with the span of the class term is wanted.

    Raises:
        InputError: for another loss or kind of targets.
    """
    rule = objective.rule
    if not isinstance(rule, CrossEntropy) or rule.settings.get("weight") is not None:
        raise InputError("class structure is that of nn.CrossEntropyLoss without class weights; got another loss.")
    if rule.settings.get("label_smoothing", 0.0) != 0:
        raise InputError("class structure needs targets of one class each, but label_smoothing is not 0.")
    num_pullbacks = 0

    def of_batch(lin: Linearization) -> Tensor:
        nonlocal num_pullbacks
        batch = lin.batch_outputs()
        logits, y = batch.outputs, batch.targets
        if not isinstance(y, Tensor) or y.is_floating_point():
            raise InputError("class structure needs class indices as targets, got probabilities.")
        dim = 1 if logits.ndim > 1 else 0
        C = logits.shape[dim]
        p = logits.to(objective.dtype).softmax(dim)
        scale = rule._scale(logits, y)
        sums = torch.zeros(C, C, objective.num_params + 1, dtype=objective.dtype, device=objective.device)
        if lin.weight == 0:
            return sums
        ignored = y == rule.settings.get("ignore_index", -100)
        for c in y[~ignored].unique().tolist():
            ours = (y == c) & ~ignored
            share = scale * p * ours.unsqueeze(dim)
            sums[c, :, -1] = share.movedim(dim, 0).reshape(C, -1).sum(dim=1)
            rows = []
            for taken in range(C):
                u = -p * share.select(dim, taken).unsqueeze(dim)
                u.select(dim, taken).add_(share.select(dim, taken))
                rows.append(u.reshape(-1))
            sums[c, :, :-1] = lin.vjp(torch.stack(rows))
            num_pullbacks += C
        return sums

    sums = objective.reduce(of_batch)
    W, moments = sums[..., -1], sums[..., :-1]
    count = len(W)
    own = torch.eye(count, dtype=torch.bool, device=W.device)
    others = W.masked_fill(own, 0).sum(dim=1)  # w_c
    tiny = torch.finfo(W.dtype).tiny
    pair_means = moments / W.clamp_min(tiny)[..., None]  # d_cc'
    class_means = moments.masked_fill(own[..., None], 0).sum(dim=1) / others.clamp_min(tiny)[:, None]
    class_factor = (others.sqrt()[:, None] * class_means).T
    cross = W.sqrt()[..., None] * (pair_means - class_means[:, None])
    trace = exact_diagonal(objective, "ggn").value.double().sum()
    gram = class_factor.double().T @ class_factor.double()
    return ClassStructure(
        num_classes=count,
        weights=W,
        class_factor=class_factor,
        cross_factor=cross[~own].T,
        own_factor=(W.sqrt()[..., None] * pair_means)[own].T,
        trace=float(trace),
        class_eigenvalues=torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).cpu(),
        overlap=None if top is None else _overlap(class_factor, top),
        num_pullbacks=num_pullbacks,
    )


def _overlap(factor: Tensor, top: Tensor) -> SubspaceOverlap | None:
    """Classes that are absent, or fitted to rounding, span nothing."""
    U, sizes, _ = torch.linalg.svd(factor.double(), full_matrices=False)
    kept = sizes > len(factor) * torch.finfo(factor.dtype).eps * sizes.max()
    return subspace_overlap(U[:, kept], top.to(U)) if bool(kept.any()) else None
