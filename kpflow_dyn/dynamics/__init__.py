"""Fixed points, Lyapunov exponents and the dimension of states: what a study of recurrent dynamics asks first.

With z_t = Phi(z_{t-1}, x_t) and A_t = D_z Phi, or z' = f(t, z, x) and A the derivative of a step of its solver,

    fixed_points            Phi(z, x) = z, or f(z, x) = 0, and the states that move slowly
    lyapunov_spectrum       lim 1/t log |A_t ... A_1 v|, from QR factorisations along the states
    finite_time_exponents   1/t log s_i(A_t ... A_1), s_i the singular values
    step_jacobians          A_t itself, where the network is small
    pca, participation_ratio    the covariance of the states
"""

from kpflow_dyn.dynamics._components import PCA, participation_ratio, pca
from kpflow_dyn.dynamics._exponents import FiniteTimeExponents, Lyapunov, finite_time_exponents, lyapunov_spectrum
from kpflow_dyn.dynamics._finding import fixed_points
from kpflow_dyn.dynamics._jacobians import step_jacobians
from kpflow_dyn.dynamics._points import FixedPoints

__all__ = ["PCA", "FiniteTimeExponents", "FixedPoints", "Lyapunov", "finite_time_exponents", "fixed_points"]
__all__ += ["lyapunov_spectrum", "participation_ratio", "pca", "step_jacobians"]
