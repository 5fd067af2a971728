"""ODEs: the door for libraries that solve them, solved ODEs as recurrences of Runge-Kutta steps, and sensitivities.

A library is one object with the members of `Library`; `add_library` makes `kp.solve(problem, alg)` ask it for the
algorithms that it accepts. What it returns are the steps that it took; all the rest is done here, once for all
libraries: replaying the steps, checking them, reading the state in between, finding the trials that fail.
"""

from kpflow_dyn._problems.inputs import stops_of
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau, hermite
from kpflow_dyn.ode._libraries import Failed, Library, Options, Solved, add_library, rate_of, remove_library

__all__ = ["AcceptedSteps", "Failed", "Library", "Options", "Solved", "Tableau", "add_library", "hermite", "rate_of"]
__all__ += ["remove_library", "stops_of"]
