"""What the noise of stochastic gradients is found to be: frozen records, from which all batch sizes follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from analysis.records.measured import Measured
from curvature.errors import InputError
from curvature.results.record import Result

__all__ = ["CurvatureNoise", "GradientNoise", "NoiseScale"]


@dataclass(frozen=True, kw_only=True, repr=False)
class NoiseScale(Result):
    """A ratio of noise to signal, the batch size at which both are equal, with its interval (Fieller)."""

    value: float
    """The ratio of unbiased estimates, in examples; negative where the mean gradient is below its noise."""
    lower: float
    """Lower end of the confidence interval, in examples."""
    upper: float
    """Upper end, in examples; infinite where the signal cannot be told from zero."""
    confidence: float
    """Confidence level of the interval; 0 to 1."""


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientNoise(Result):
    """Moments of the gradients of single examples, and what follows for every batch size B.

    Of the N examples the i-th has the share p_i, the gradient g_i, and g = sum_i p_i g_i. The data are taken as a
    sample: S and G are covariance and mean of the population's gradients, N stands for 1 / sum p_i^2.
    """

    _figure = "plot_batch_sizes"
    _large = ("layer_gsnr",)

    num_examples: int
    """How many examples were seen."""
    effective_examples: float
    """N = 1 / sum_i p_i^2, the number of examples where all count alike."""
    loss: float
    """C; units of loss, as for all losses below."""
    mean_squared_norm: float
    """|g|^2; (loss / parameter)^2, as for all squares below."""
    trace: Measured
    """Tr S without bias, with one standard error over other data. Its 95 % interval covers 93 to 97 % where squares of
    gradients have a variance, 85 to 92 % where they have none, which `notes` tell of in nine cases of ten and more."""
    squared_norm: Measured
    """|G|^2 without bias, |g|^2 - tr S / N, which may be negative; with one standard error."""
    noise_scale: NoiseScale
    """B_simple = tr S / |G|^2 (McCandlish et al. 2018)."""
    tail: float = math.inf
    """Hill's exponent of the largest |g_i - g|^2: at most about 2 where they have no variance that a sample could tell
    of, and intervals are too short."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
    parallel_variance: float
    """Variance of g_i'g, with the factor N / (N - 1); (loss / parameter)^4."""
    orthogonal_variance: float
    """Mean square of what g_i has at right angles to g, with the factor N / (N - 1)."""
    mean_example_squared_norm: float
    """sum_i p_i |g_i|^2."""
    layers: tuple[str, ...]
    """Names of the L modules that own parameters."""
    layer_traces: Tensor
    """(L,), tr S of each layer, without bias."""
    layer_squared_norms: Tensor
    """(L,), |G|^2 of each layer, without bias."""
    layer_gsnr: Tensor
    """(L,), mean over a layer's entries of g_j^2 / S_jj (Liu et al. 2020); NaN where none has noise."""
    gsnr: float
    """The same over all entries."""
    evidence: float
    """1 - mean_j N g_j^2 / S_jj (Mahsereci et al. 2017, eq. 7): above 0, g is what sampling noise alone would make it,
    and training on these data may stop."""
    seconds: float
    """Wall clock."""

    @property
    def layer_noise_scales(self) -> Tensor:
        """(L,), tr S / |G|^2 of each layer, in examples; negative where the mean is below its noise."""
        return self.layer_traces / self.layer_squared_norms

    @property
    def diversity(self) -> float:
        """sum_i |g_i|^2 / |sum_i g_i|^2; batches up to N times this cost no progress (Yin et al. 2018)."""
        return _ratio(self.mean_example_squared_norm, self.effective_examples * self.mean_squared_norm)

    def norm_test(self, batch_size: float) -> float:
        """Return the smallest theta with E |g_B - g|^2 <= theta^2 |g|^2 at this batch size (Byrd et al. 2012)."""
        return math.sqrt(_ratio(self.trace.value, _size(batch_size) * self.mean_squared_norm))

    def inner_product_test(self, batch_size: float) -> float:
        """Return the smallest theta with Var(g_B'g) <= theta^2 |g|^4 (Bollapragada, Byrd, Nocedal 2018, eq. 2.6)."""
        return math.sqrt(_ratio(self.parallel_variance, _size(batch_size) * self.mean_squared_norm**2))

    def orthogonality_test(self, batch_size: float) -> float:
        """Return the smallest nu with E |g_B across g|^2 <= nu^2 |g|^2 (Bollapragada et al. 2018, eq. 3.3)."""
        return math.sqrt(_ratio(self.orthogonal_variance, _size(batch_size) * self.mean_squared_norm))

    def tested_batch_size(self, *, theta: float = 0.9, nu: float = 5.84) -> float:
        """Return the smallest batch size that passes inner-product and orthogonality test; defaults are the paper's."""
        if theta <= 0 or nu <= 0:
            raise InputError(f"theta and nu must be positive, got {theta} and {nu}.")
        return max((self.inner_product_test(1) / theta) ** 2, (self.orthogonality_test(1) / nu) ** 2)

    def cabs(self, lr: float) -> float:
        """Return the batch size lr tr S / C that keeps noise and loss in step (Balles, Romero, Hennig 2017, eq. 22).

        For plain SGD and losses whose minimum is near 0; NaN for a loss that is not positive.
        """
        return lr * self.trace.value / self.loss if self.loss > 0 else math.nan

    def efficiency(self, batch_size: float) -> float:
        """Return the share 1 / (1 + B_simple / B) of the full gradient's progress that a step at B makes; 0 to 1.

        0 where |G|^2 cannot be told from zero (its estimate is not positive).
        """
        if self.squared_norm.value <= 0:
            return 0.0
        return 1 / (1 + self.noise_scale.value / _size(batch_size))

    def generalization_ratio(self, num_examples: float | None = None) -> float:
        """Return E(decrease on other data) / E(decrease on the data) of a step: |G|^2 / (|G|^2 + tr S / n).

        Reference: Liu et al. (2020), Understanding why neural networks generalize well through GSNR of parameters.

        Args:
            num_examples: n, the examples that the gradient is of. Default: N.
        """
        n = self.effective_examples if num_examples is None else _size(num_examples)
        return _ratio(self.squared_norm.value, self.squared_norm.value + self.trace.value / n)

    def temperature(self, lr: float, batch_size: float) -> float:
        """Return lr / B, which the noise of small steps depends on (Jastrzebski et al. 2017); parameter^2 / loss."""
        return lr / _size(batch_size)


@dataclass(frozen=True, kw_only=True, repr=False)
class CurvatureNoise(Result):
    """How the covariance Sigma of single examples' gradients lies against the Hessian H, from random probes."""

    trace_h_sigma: Measured
    """Tr(H Sigma), with its error over probes; loss^3 / parameter^4."""
    curvature_along_gradient: float
    """g'H g; loss^3 / parameter^4."""
    mean_squared_norm: float
    """|g|^2; (loss / parameter)^2."""
    trace_h: Measured
    """Tr H; loss / parameter^2."""
    trace_sigma: Measured
    """Tr Sigma; (loss / parameter)^2."""
    noise_scale: NoiseScale
    """B_noise = tr(H S) / G'H G, the critical batch size (McCandlish et al. 2018, eq. 2.8), both without bias: G'H G as
    g'H g - tr(H S) / N. Its interval has the error of tr(H S) over probes and that of G'H G over data; H is taken as
    that of these data. NaN where tr(H S) is not positive."""
    cosine: float
    """Tr(H Sigma) / (|H|_F |Sigma|_F): 1 where noise is proportional to curvature, 0 where they do not meet."""
    anisotropy: float
    """n tr(H Sigma) / (tr H tr Sigma): how much more curvature the noise meets than isotropic noise of its size would
    (Zhu et al. 2019)."""
    takeuchi: Measured | None
    """Tr((G + damping I)^-1 Sigma) / N, the expected gap between test and training loss (Takeuchi 1976), G the
    Gauss-Newton matrix; loss. None if not asked for."""
    damping: float
    """What was added to G's diagonal; loss / parameter^2."""
    num_matvecs: int
    """Products with H, Sigma and G together."""

    def best_lr(self, batch_size: float) -> float:
        """Return e_max / (1 + B_noise / B), e_max = |g|^2 / g'H g: the step of most expected progress (eq. 2.6).

        NaN where the expected loss has no minimum along the step: g'H g + tr(H Sigma) / B is not positive.
        """
        bend = self.curvature_along_gradient + self.trace_h_sigma.value / _size(batch_size)
        return self.mean_squared_norm / bend if bend > 0 else math.nan

    def expected_change(self, lr: float, batch_size: float) -> float:
        """Return E dC = -lr |g|^2 + lr^2 / 2 (g'H g + tr(H Sigma) / B) of one step, to second order (eq. 2.5)."""
        bend = self.curvature_along_gradient + self.trace_h_sigma.value / _size(batch_size)
        return -lr * self.mean_squared_norm + lr**2 / 2 * bend


def _size(batch_size: float) -> float:
    if not batch_size > 0:
        raise InputError(f"a number of examples must be positive, got {batch_size}.")
    return batch_size


def _ratio(a: float, b: float) -> float:
    """Return a / b; infinite for b = 0, NaN for 0 / 0."""
    if b == 0:
        return math.nan if a == 0 else math.copysign(math.inf, a)
    return a / b
