"""EKFAC: K-FAC with measured eigenvalues.

Reference: George, Laurent, Bouthillier, Ballas and Vincent (2018), Fast approximate natural gradient descent in a
Kronecker-factored eigenbasis.
"""

from __future__ import annotations

from optimizers.kronecker.kfac import KFAC

__all__ = ["EKFAC"]


class EKFAC(KFAC):
    """K-FAC whose eigenvalues are measured: exact second moments of the gradient in the factors' eigenbases.

    With Q_L, Q_R the eigenvectors of the factors of `KFAC`, refreshed every `refresh_every` steps,

        S = EMA of sum_t (Q_L' l_t)^2 (Q_R' r_t)^2'         D = Q_L [ (Q_L' M Q_R) / (S + damping) ] Q_R'

    S starts at a refresh from the product of the factors' eigenvalues. It is the best diagonal in that basis, where
    positions count as examples; everything else is as in `KFAC`.

    Cost beside K-FAC's: two rotations of all rows and a product of their squares, T (o^2 + i^2 + o i) multiplications,
    on steps with statistics; eigenvectors, about ten times an inverse, at a refresh. Ranks do not share that work out:
    each needs the bases for its own rows.

    Rounding turns eigenvectors by itself over the gap between their eigenvalues. In float32 models in parts and one
    process so come apart by 3e-6 within five steps; by less than 1e-6 with `factor_dtype="float64"`, for twice the time
    of what is done with factors.

    Args:
        params, lr, ...: as of `KFAC`; `damping_form` has no meaning here.

    Raises:
        InputError, CheckFailedError, NonFiniteError: as `KFAC`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = EKFAC(model.parameters(), loss=torch.nn.MSELoss(), fisher="type-2")
        >>> loss = optimizer.step(lambda: (model(torch.ones(4, 3)), torch.zeros(4, 2)))
    """

    _corrects_eigenvalues = True
