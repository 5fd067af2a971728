import subprocess
import sys

import numpy as np
import pytest
import torch

from kpflow_dyn.models import CTRNNCell, LowRankRNNCell

PHI = {"tanh": np.tanh, "relu": lambda h: np.maximum(h, 0)}


def random_cell(kind, **options):
    """A float64 cell whose bias and time constants are not at their starting values."""
    torch.manual_seed(1)
    cell = kind(3, 7, **options).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return cell


def numbers(cell):
    return {name: tensor.detach().numpy() for name, tensor in cell.state_dict().items()}


def draw(trials=5):
    torch.manual_seed(2)
    return torch.randn(trials, 3).double(), torch.randn(trials, 7).double()


def expected(weight, leak, p, x, h, phi):
    x, h = x.numpy(), h.numpy()
    return (1 - leak) * h + leak * (phi(h) @ weight.T + x @ p["U"].T + p["b"])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_ctrnn_is_its_equation(nonlinearity):
    cell, (x, h) = random_cell(CTRNNCell, alpha=0.1, nonlinearity=nonlinearity), draw()
    p = numbers(cell)
    np.testing.assert_allclose(cell(x, h).detach(), expected(p["W"], 0.1, p, x, h, PHI[nonlinearity]), rtol=1e-13)


@pytest.mark.parametrize("kind", [CTRNNCell, LowRankRNNCell])
def test_learnt_time_constants_act_unit_by_unit(kind):
    cell, (x, h) = random_cell(kind, alpha=0.2, learn_alpha=True), draw()
    p = numbers(cell)
    weight = p["W"] if kind is CTRNNCell else p["m"] @ p["n"].T / 7
    leak = 1 / (1 + np.exp(-p["alpha_logit"]))
    assert np.ptp(leak) > 0.05
    np.testing.assert_allclose(cell(x, h).detach(), expected(weight, leak, p, x, h, np.tanh), rtol=1e-13)


def test_low_rank_is_a_ctrnn_with_that_weight():
    low, full, (x, h) = random_cell(LowRankRNNCell, rank=2), random_cell(CTRNNCell), draw()
    with torch.no_grad():
        full.W.copy_(low.m @ low.n.T / 7)
        full.U.copy_(low.U)
        full.b.copy_(low.b)
    torch.testing.assert_close(low(x, h), full(x, h), rtol=1e-13, atol=1e-14)
    assert torch.linalg.matrix_rank(full.W) == 2


def test_fixed_leak_is_saved_but_not_learnt():
    fixed, learnt = CTRNNCell(3, 7, alpha=0.3), CTRNNCell(3, 7, alpha=0.3, learn_alpha=True)
    assert "alpha" in fixed.state_dict() and "alpha" not in dict(fixed.named_parameters())
    assert "alpha" not in learnt.state_dict()
    torch.testing.assert_close(torch.sigmoid(learnt.alpha_logit), torch.full((7,), 0.3))


def test_leak_is_exact_in_float64_and_keeps_float32_states():
    cell = CTRNNCell(3, 7, alpha=0.1)
    assert cell(torch.zeros(2, 3), torch.zeros(2, 7)).dtype == torch.float32
    assert cell.double().alpha.item() == 0.1


def test_gain_is_the_spectral_radius():
    torch.manual_seed(0)
    radius = torch.linalg.eigvals(CTRNNCell(1, 400, gain=1.5).W).abs().max().item()
    assert radius == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "0 < alpha <= 1, got 0"),
        ({"alpha": 1.5}, "take a smaller dt"),
        ({"alpha": 1.0, "learn_alpha": True}, "cannot start at 1"),
        ({"nonlinearity": "sin"}, r"one of \['relu', 'tanh'\], got 'sin'"),
    ],
)
@pytest.mark.parametrize("kind", [CTRNNCell, LowRankRNNCell])
def test_bad_options_are_explained(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(3, 7, **options)


@pytest.mark.parametrize("rank", [0, 8])
def test_rank_must_fit(rank):
    with pytest.raises(ValueError, match=f"between 1 and hidden_size = 7, got {rank}"):
        LowRankRNNCell(3, 7, rank=rank)


def test_models_can_be_imported_without_torch():
    code = "import sys; sys.modules['torch'] = None; import kpflow_dyn.models as m; print(m.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "CTRNNCell" in done.stdout
