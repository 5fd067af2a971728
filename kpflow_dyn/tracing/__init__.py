"""What a traced model is made of, found by small passes from frozen data to frozen data.

    real_graph    pairs of real values in the place of complex ones, so that the others know of none
    dependences   what each value depends on: constants, weights, data, or what moves (the state, learning)
    find_uses     each operation on data with a weight among its operands: a matrix, a scale or an opaque one
    find_copies   which elements of its operands each view, split or concatenation copies
    number_weights    the number of each weight, parameters first

and for a step, whose weights may meet in sums element by element,

    number_elements   the number of each element of each value
    follow_sums       the uses that meet in nothing but sums
    number_kicks      where a change of the weights enters the step
    sites_of_step     the weight sites

Anyone may say what an operation of their own does: see `add_rule`.
"""

from kpflow_dyn.tracing._graph import Role
from kpflow_dyn.tracing._rules import add_rule

__all__ = ["Role", "add_rule"]
