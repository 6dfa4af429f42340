"""The minimiser of a small quadratic model in a box: the Newton step of the dual, offline and on-policy."""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import lsq_linear

REGULARISATION = 1e-6


def box_newton_step(gradient: np.ndarray, hessian: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """argmin_d gᵀd + ½ dᵀHd subject to low <= d <= high.

    With H = LLᵀ this is the bounded least-squares problem min ‖Lᵀd + L⁻¹g‖², solved exactly by
    active sets. H gets REGULARISATION times its mean diagonal, so a cost that does not vary leaves
    the problem solvable (its step then goes to the bound the gradient points at).

    Args:
        gradient: [m] float64.
        hessian: [m, m] float64, symmetric positive semidefinite.
        low, high: [m] float64, low <= high.

    Returns:
        [m] float64.
    """
    m = len(gradient)
    ridge = REGULARISATION * max(float(np.trace(hessian)) / m, REGULARISATION)
    factor = np.linalg.cholesky(hessian + ridge * np.eye(m))
    step = low.astype(np.float64, copy=True)
    free = high > low
    if not free.any():
        return step
    target = -solve_triangular(factor, gradient, lower=True) - factor.T[:, ~free] @ low[~free]
    step[free] = lsq_linear(factor.T[:, free], target, bounds=(low[free], high[free]), method="bvls", tol=1e-14).x
    return np.clip(step, low, high)
