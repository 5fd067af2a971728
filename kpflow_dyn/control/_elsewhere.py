"""What python-control calls its functions, and what stands for them here.

One table: the errors of `kpflow_dyn.control.name` read it, and docs/guides/controller.md shows it.
"""

from __future__ import annotations

from kpflow_dyn._elsewhere import Rows, stands_for

THROUGH = "`ct.{name}(system.to_control(), ...)`"

ROWS: Rows = (
    (("ss", "StateSpace", "tf2ss", "tf", "TransferFunction", "ss2tf", "zpk"),
     "`control.LTI(A, B, C, D, dt)`, `control.LTI(tf)` of a transfer function; `.to_control()`"),
    (("linearize",),
     "`control.linearize_lti` of a model at rest, `control.linearize_ltv` along trajectories"),
    (("lqr", "dlqr", "lqe", "dlqe"),
     "the same, with N (NN for filters) and `integral_action=`"),
    (("gram",),
     'the same, `gram(sys, "c" / "o" / "cf" / "of")`, in discrete time too. numpy reads the result as that array; '
     "`.W`, `.eigenvalues`, `.directions` are labelled. `t=` sets a horizon. It also takes a solution"),
    (("ctrb", "obsv", "hsvd", "minreal", "balred"),
     "the same; `hsvd` in discrete time too"),
    (("minimal_realization", "balanced_reduction", "model_reduction"),
     "`control.minreal`, `control.balred`"),
    (("frequency_response", "freqresp", "bode", "bode_plot", "singular_values_response", "singular_values_plot"),
     "`control.frequency_response(sys, omega)`, `.plot()`; `.singular_values`"),
    (("stability_margins", "disk_margins"),
     "the same"),
    (("margin",),
     "`control.stability_margins(L)`, which has these numbers as `.gain` and `.phase`, and their frequencies"),
    (("poles", "pole", "pole_zero_map", "pole_zero_plot", "pzmap", "damp"),
     "`LTI.poles` (an array), `LTI.plot()`"),
    (("flatsys", "optimal", "solve_ocp"),
     "training a policy is `kp.train`, `kp.gradient_flow`; `control.tvlqr` and `control.adjoint` along a trajectory"),
    (("input_output_response", "NonlinearIOSystem", "nlsys"),
     "`kp.solve` of a model"),
    (("step_response", "impulse_response", "forced_response", "initial_response", "step_info"),
     f"`kp.solve` of a model; of a linear system {THROUGH}"),
    (("nyquist", "nyquist_plot", "nyquist_response", "nichols", "gangof4", "root_locus", "zeros", "dcgain", "c2d",
      "sample_system", "feedback", "series", "parallel", "append", "connect", "interconnect", "system_norm", "norm",
      "h2syn", "hinfsyn", "evalfr"),
     THROUGH),
    (("place", "acker", "place_varga", "care", "dare", "lyap", "dlyap"),
     "`ct.{name}(...)` of the matrices `system.A`, `system.B`"),
)  # fmt: skip
"""The names of python-control, and what stands for them."""


def advice_on(name: str) -> str:
    """What stands for a name of python-control here, as a clause; "" where it is none that is known."""
    here = stands_for(name, ROWS)
    return here and f"{here} (ct is python-control)"


def table() -> str:
    """The table in Markdown."""
    rows = [("python-control", "here"), ("---", "---")]
    rows += [(", ".join(f"`{name}`" for name in names), here.format(name="name")) for names, here in ROWS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
