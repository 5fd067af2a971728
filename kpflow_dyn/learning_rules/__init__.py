"""Learning rules as operators: what each does to the states where the loss has the gradient q = grad_S L.

A rule moves the states by -eta A q + O(eta^2). With J = P B V and K = B V V* B*,

    backpropagation through time    A = P K P* = J J*
    truncated after k steps         A = P K P_k*
    in the space of functions       A = P P*
    Gauss-Newton                    A = J (J* J + damping)^{-1} J*
    natural gradient                A = J (J* C* H C J + damping)^{-1} J*
    Shampoo, Muon                   A = J M^{-1} J*, with an M of the gradient that they see
    feedback alignment              A = J J_B* = P K P_B*
    weight mirrors                  the same, with B -> W from noise

Online rules have an influence matrix E_t = D_t E_{t-1} + B_t V_t that runs forward in time in the place of J:

    real-time recurrent learning    A = J E*, E = J
    SnAp-k                          A = J E*, entries of E that a parameter reaches within k steps
    UORO                            A = P K P_U*, E of rank one, J in the mean
    e-prop                          A = P K P_D*, D_t of each unit's own path
    RFLO                            A = P K P_D*, D_t a constant decay
    Duhamel's series                A = P K P_k*, P_k = sum_{j <= k} (P_0 (A - A_0))^j P_0 from a part A_0

`kp.alignment` compares them, and they are analysed as any other operator. With a metric M^{-1} = R R* of the flow, J R
stands for J, and V R for V.

Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, "The Global Empirical NTK" (arXiv 2605.08746).
"""

from kpflow_dyn.learning_rules._backpropagation import bptt, functional_gradient_descent, truncated_bptt
from kpflow_dyn.learning_rules._feedback import feedback_alignment, weight_mirror
from kpflow_dyn.learning_rules._influence import rtrl, snap, uoro
from kpflow_dyn.learning_rules._online import duhamel, eprop, rflo
from kpflow_dyn.learning_rules._rule import Rule
from kpflow_dyn.learning_rules._second_order import gauss_newton, natural_gradient
from kpflow_dyn.learning_rules._table import RuleTable, compare
from kpflow_dyn.learning_rules._training import train
from kpflow_dyn.learning_rules._updates import muon, shampoo

__all__ = [
    "Rule",
    "RuleTable",
    "bptt",
    "compare",
    "duhamel",
    "eprop",
    "feedback_alignment",
    "functional_gradient_descent",
    "gauss_newton",
    "muon",
    "natural_gradient",
    "rflo",
    "rtrl",
    "shampoo",
    "snap",
    "train",
    "truncated_bptt",
    "uoro",
    "weight_mirror",
]
