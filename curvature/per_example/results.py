"""What per-example gradients say: norms, inner products, moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvature.parameters import Block
from curvature.results.record import Result

__all__ = ["GradientMoments", "GradientNorms"]


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientNorms(Result):
    """Norms, and if asked for inner products, of the gradients g_i of single examples.

    Example i counts w_i loss terms (targets that are not ignored, class weights included; with `weight=` its share of
    what its batch counts), p_i = w_i / sum_j w_j, and l_i is the mean loss over its terms. g_i is the gradient of l_i;
    of a summed loss, of l_i times the number of all terms. Either way the objective's gradient is g = sum_i p_i g_i. An
    example without terms has weight 0 and gradient 0. Covariances are Sigma = sum_i p_i (g_i - g)(g_i - g)'.

    Over ranks of a process group, `mean`, `loss` and all traces are those of all data, what has an entry for each
    example is of this rank's examples.
    """

    _large: ClassVar[tuple[str, ...]] = ("mean", "dots", "second_moment")

    mean: Tensor
    """(n,), the objective's gradient; units of loss / parameter."""
    loss: float
    """The objective's value; units of loss."""
    weights: Tensor
    """(N,), float64: w_i, in loss terms."""
    squared_norms: Tensor | None
    """(N,), |g_i|^2; units of (loss / parameter)^2, as for all squares below. None if not asked for."""
    layers: tuple[str, ...]
    """Names of the L modules that own parameters, in the order of the parameters."""
    layer_squared_norms: Tensor | None
    """(L, N), |g_i|^2 over the parameters of each layer."""
    layer_mean_squared_norms: Tensor
    """(L,), |g|^2 over the parameters of each layer."""
    layer_traces: Tensor
    """(L,), tr Sigma over the parameters of each layer."""
    sum_squared_shares: float
    """sum_i p_i^2 over all data: 1 / N where all examples count alike."""
    routes: dict[str, str]
    """By parameter, how its gradients were had: "ghost" (norms without gradients), "factorised" (written out a few at a
    time), "indexed" (embeddings), "direct" (small ones), "vmap" or "loop" with the reason, "single" (batches of one
    example), "unused"."""
    along_mean: Tensor | None = None
    """(N,), g_i'g; None unless asked for."""
    dots: Tensor | None = None
    """(N, N), g_i' g_j; None unless asked for."""
    num_examples: int
    """N, of this rank."""
    num_backwards: float
    """Backward passes through the data."""
    seconds: float
    """Wall clock."""

    @property
    def trace(self) -> Tensor:
        """Tr Sigma, ()."""
        return self.layer_traces.sum()

    @property
    def mean_squared_norm(self) -> Tensor:
        """|g|^2, ()."""
        return self.layer_mean_squared_norms.sum()

    @property
    def unbiased_factor(self) -> float:
        """1 / (1 - sum p_i^2), N / (N - 1) where all count alike: the population's covariance is this times Sigma.

        For examples drawn independently whose gradients have one covariance whatever they count. Infinite for N = 1.
        """
        rest = 1 - self.sum_squared_shares
        return 1 / rest if rest > 1e-12 else float("inf")

    @property
    def unbiased_trace(self) -> Tensor:
        """The trace of the population's covariance, estimated without bias, (); NaN for a single example."""
        return self.trace * self.unbiased_factor if self.unbiased_factor < float("inf") else self.trace * torch.nan

    @property
    def unbiased_mean_squared_norm(self) -> Tensor:
        """|E g|^2 estimated without bias, (): |g|^2 - sum p_i^2 tr Sigma; may be negative. NaN for a single example."""
        return self.mean_squared_norm - self.sum_squared_shares * self.unbiased_trace

    @property
    def noise_scale(self) -> Tensor:
        """The simple noise scale tr Sigma / |g|^2 of these data, (), in examples (McCandlish et al., 2018, eq. 2.9)."""
        return self.trace / self.mean_squared_norm


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientMoments(GradientNorms):
    """The first two moments of the gradients of single examples, entry by entry."""

    _large = (*GradientNorms._large, "blocks")

    second_moment: Tensor
    """(n,), sum_i p_i g_i^2, entrywise."""
    blocks: tuple[Block, ...]
    """The layers' places in vectors (n,)."""

    @property
    def variance(self) -> Tensor:
        """(n,), diag Sigma = sum_i p_i g_i^2 - g^2; times `unbiased_factor`, the population's.

        As a difference it carries a rounding error of about the dtype's epsilon times `second_moment`; where that takes
        it below zero it is zero.
        """
        return (self.second_moment - self.mean.square()).clamp_min(0)

    @property
    def gsnr(self) -> Tensor:
        """(n,), g_j^2 / variance_j, the gradient signal-to-noise ratio (Liu et al., 2020); 0 where the gradient is 0.

        Infinite where all examples have one and the same gradient other than 0.
        """
        return torch.where(self.mean == 0, 0.0, self.mean.square() / self.variance)

    @property
    def layer_gsnr(self) -> Tensor:
        """(L,), mean of `gsnr` over the entries of a layer whose variance is not 0; NaN if there is none."""
        gsnr, noisy = self.gsnr, self.variance > 0
        return torch.stack([block.take(gsnr)[block.take(noisy)].mean() for block in self.blocks])
