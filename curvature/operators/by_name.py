"""The matrices of an objective by name: what `as_matrix` makes of an objective."""

from __future__ import annotations

from typing import get_args

from curvature.errors import InputError
from curvature.linop import LinearOperator, MatrixName, as_matrix
from curvature.objective.objective import Objective
from curvature.operators.empirical_fisher import EmpiricalFisherOperator
from curvature.operators.fisher import FisherOperator
from curvature.operators.ggn import GGNOperator
from curvature.operators.gradient_covariance import GradientCovarianceOperator
from curvature.operators.hessian import HessianOperator
from curvature.operators.ntk import NTKOperator

MATRICES: dict[MatrixName, type[LinearOperator]] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": FisherOperator,
    "empirical_fisher": EmpiricalFisherOperator,
    "gradient_covariance": GradientCovarianceOperator,
    "ntk": NTKOperator,
}


@as_matrix.register(Objective)
def _of_objective(objective: Objective, matrix: MatrixName = "hessian") -> LinearOperator:
    if matrix not in MATRICES:
        raise InputError(f"matrix must be one of {', '.join(get_args(MatrixName))}, got {matrix!r}.")
    make: type = MATRICES[matrix]
    return make(objective)
