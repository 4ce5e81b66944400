"""Matrices of an objective, known through their products."""

from curvature.operators import by_name as by_name
from curvature.operators.block_diagonal import BlockDiagonalOperator as BlockDiagonalOperator
from curvature.operators.empirical_fisher import EmpiricalFisherOperator as EmpiricalFisherOperator
from curvature.operators.fisher import FisherOperator as FisherOperator
from curvature.operators.ggn import GGNOperator as GGNOperator
from curvature.operators.gradient_covariance import GradientCovarianceOperator as GradientCovarianceOperator
from curvature.operators.hessian import HessianOperator as HessianOperator
from curvature.operators.jacobian import JacobianOperator as JacobianOperator
from curvature.operators.mc_fisher import MCFisherOperator as MCFisherOperator
from curvature.operators.ntk import NTKOperator as NTKOperator
from curvature.operators.preconditioned import PreconditionedOperator as PreconditionedOperator
from curvature.operators.preconditioned import optimizer_preconditioner as optimizer_preconditioner
from curvature.operators.submatrix import SubmatrixOperator as SubmatrixOperator
