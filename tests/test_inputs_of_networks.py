"""Networks with several arguments, and with results that are mappings, dataclasses or tuples, against autograd."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from network_oracle import close, jacobian, linearized
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy

TRIALS, TOKENS, WIDTH, WORDS = 3, 4, 4, 6


class Record(OrderedDict):
    """What transformers gives: a dataclass that is a mapping as well, and has only what is not None."""

    def __post_init__(self) -> None:
        for part in fields(self):  # type: ignore[arg-type]
            if getattr(self, part.name) is not None:
                self[part.name] = getattr(self, part.name)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclass
class ModelOutput(Record):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Layer(nn.Module):
    """Gives its output in a tuple, with the scores of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))

    def forward(self, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mixed, scores = self.attention(h, h, h, key_padding_mask=mask == 0)
        return h + mixed + self.mlp(h), scores


class Transformer(nn.Module):
    """Called as those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(2 * TOKENS, WIDTH)
        self.layers, self.head = nn.ModuleList([Layer(), Layer()]), nn.Linear(WIDTH, WORDS)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None, use_cache: bool = True
    ) -> ModelOutput:
        assert use_cache is False
        places = torch.arange(input_ids.shape[1]) if positions is None else positions
        h = self.words(input_ids) + self.positions(places)
        states = [h]
        for layer in self.layers:
            h, _ = layer(h, attention_mask)
            states.append(h)
        return ModelOutput(logits=self.head(h), hidden_states=tuple(states))


@pytest.fixture(scope="module")
def net() -> Transformer:
    torch.manual_seed(0)
    return Transformer().double()


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    mask = torch.ones(TRIALS, TOKENS, dtype=torch.int64)
    mask[1, 2:] = 0
    ids = torch.as_tensor(rng.integers(0, WORDS, (TRIALS, TOKENS)))
    return {"input_ids": ids, "attention_mask": mask, "positions": None, "use_cache": False}


def test_a_part_of_the_result_by_its_name(net: Transformer, given: dict[str, Any]) -> None:
    flow = linearized(net, given, state="logits")
    assert flow.ntk.domain.shape == (TRIALS, TOKENS, WORDS)
    close(flow.solution.state, net(**given).logits.detach(), 1e-12)
    close(flow.J.dense(), jacobian(net, lambda call: call(**given).logits))


def test_a_part_that_is_on_the_way_to_another(net: Transformer, given: dict[str, Any]) -> None:
    """Parts of a result do not kick each other; outputs of modules do."""
    flow = linearized(net, given, state=["hidden_states.1", "logits"])
    assert flow.ntk.domain.shape == (TRIALS, TOKENS, WIDTH + WORDS)

    def both(call: Callable[..., ModelOutput]) -> Tensor:
        found = call(**given)
        return torch.cat([found.hidden_states[1], found.logits], -1)  # type: ignore[index, list-item]

    close(flow.J.dense(), jacobian(net, both))
    close(flow.P.dense(), np.eye(flow.P.domain.size))
    on_the_way = linearized(net, given, state=["layers.0", "logits"])
    J = to_numpy(on_the_way.J.dense())
    close(J, flow.J.dense())
    close((on_the_way.P @ on_the_way.K @ on_the_way.P.T).dense(), J @ J.T)
    assert float(abs(on_the_way.P.dense() - flow.P.dense()).max()) > 1e-3


@pytest.mark.parametrize(("name", "entry"), [("layers.0", 0), ("layers.0:1", 1), ("layers.0.attention:1", 1)])
def test_modules_that_give_tuples(net: Transformer, given: dict[str, Any], name: str, entry: int) -> None:
    flow = linearized(net, given, state=name)
    heard: list[Any] = []
    module = net.get_submodule(name.partition(":")[0])
    hook = module.register_forward_hook(lambda _module, _args, out: heard.append(out[entry]))

    def value(call: Callable[..., Any]) -> Tensor:
        call(**given)
        return heard[-1]

    close(flow.J.dense(), jacobian(net, value))
    hook.remove()


def test_arguments_by_their_place(net: Transformer, given: dict[str, Any]) -> None:
    by_name = linearized(net, given, state="logits")
    by_place = linearized(net, (given["input_ids"], given["attention_mask"], None, False), state="logits")
    close(by_place.J.dense(), by_name.J.dense(), 1e-12)


def test_arrays_that_all_trials_share(net: Transformer, given: dict[str, Any]) -> None:
    """By their length, or by name where this is also the number of trials."""
    backwards = torch.arange(TOKENS).flip(0)
    flow = linearized(net, given | {"positions": backwards}, state="logits")
    close(flow.J.dense(), jacobian(net, lambda call: call(**given | {"positions": backwards}).logits))
    square = {name: value[:, :TRIALS] if isinstance(value, Tensor) else value for name, value in given.items()}
    square["positions"] = backwards[:TRIALS]
    with pytest.raises(ValueError, match=r"first trial alone|influence each other"):
        kp.solve(kp.StaticProblem(net, square, state="logits"))
    flow = linearized(net, square, state="logits", shared=["positions"])
    close(flow.J.dense(), jacobian(net, lambda call: call(**square).logits))


class Masked(nn.Module):
    """Attention with a mask that is added to its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=mask)[0]


def test_masks_may_be_infinite() -> None:
    torch.manual_seed(4)
    net, x = Masked().double(), torch.randn(2, TOKENS, WIDTH).double()
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64)
    flow = linearized(net, (x, causal), state="")
    close(flow.J.dense(), jacobian(net, lambda call: call(x, causal)))
    with pytest.raises(ValueError, match="x holds NaN or inf"):
        kp.StaticProblem(net, x / 0)


def test_remade_with_other_arguments(net: Transformer, given: dict[str, Any]) -> None:
    problem = kp.StaticProblem(net, given, state="logits")
    other = problem.remake(x=given | {"input_ids": given["input_ids"].flip(0)})
    assert other.state == ("logits",) and other.data.shape == (TRIALS, TOKENS)
    close(kp.solve(other).state[0, 0], net(**other.x).logits[0, 0].detach(), 1e-12)
    assert "input_ids" in repr(problem)


def test_names_that_are_not_there(net: Transformer, given: dict[str, Any]) -> None:
    wrong: list[tuple[str | Sequence[str], str]] = [
        ("logitz", r"unknown modules \['logitz'\]; the network has words, .*; and what it gives has logits, hidden"),
        ("", r"gave ModelOutput with several arrays; name one of them in state: logits, hidden_states"),
        (":head", r"what the network gives has no 'head'; it has logits, hidden_states"),
        ("layers.0:5", r"what the module 'layers\.0' gives has no '5'; it has 0, 1"),
        ("layers.7:0", r"unknown modules \['layers\.7:0'\]"),
    ]
    for state, words in wrong:
        with pytest.raises(ValueError, match=words):
            kp.solve(kp.StaticProblem(net, given, state=state))


def test_arguments_that_do_not_fit(net: Transformer, given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="x is dict, expected a torch tensor or a jax array"):
        kp.StaticProblem(net, {"use_cache": False})
    with pytest.raises(TypeError, match=r"x is list, expected .*or a tuple or dict of arguments"):
        kp.StaticProblem(net, [given["input_ids"], given["attention_mask"]])
    with pytest.raises(ValueError, match=r"different numbers of trials, .*'attention_mask'\]\": 2"):
        kp.StaticProblem(net, given | {"attention_mask": given["attention_mask"][:2]}, shared=())
    with pytest.raises(ValueError, match=r"shared names \['place'\], expected some of the arguments \['input_ids'"):
        kp.StaticProblem(net, given, shared=["place"])
    with pytest.raises(ValueError, match=r"x\['bias'\] holds NaN"):
        kp.StaticProblem(net, given | {"bias": torch.full((TRIALS,), torch.nan)})
    with pytest.raises(TypeError, match=r"x\['attention_mask'\] is numpy.ndarray, expected a torch tensor"):
        kp.StaticProblem(net, given | {"attention_mask": np.ones((TRIALS, TOKENS))})
    with pytest.raises(ValueError, match=r"failed on x\['input_ids'\] \[3, 4\], x\['extra'\] \[3\]"):
        kp.solve(
            kp.StaticProblem(
                net, {"input_ids": given["input_ids"], "extra": torch.ones(TRIALS).double()}, state="logits"
            )
        )


class Crossing(nn.Module):
    """Attention of one sequence to another, with a start that has its trials behind its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate = nn.MultiheadAttention(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: tuple[Tensor, Tensor], keep: Tensor) -> dict[str, Any]:
        q, k = (part.transpose(0, 1) for part in pair)
        y = self.attention(q, k, k)[0].transpose(0, 1)
        return {"y": torch.where(keep[..., None], torch.tanh(self.gate(y)), y), "note": "done", "nothing": None}


def test_nested_arguments_booleans_and_a_mapping_with_one_array() -> None:
    torch.manual_seed(1)
    net = Crossing().double()
    pair = torch.randn(TRIALS, TOKENS, WIDTH).double(), torch.randn(TRIALS, 2, WIDTH).double()
    keep = torch.rand(TRIALS, TOKENS) > 0.5
    flow = linearized(net, {"pair": pair, "keep": keep}, state="")
    close(flow.J.dense(), jacobian(net, lambda call: call(pair, keep)["y"]))


@pytest.mark.parametrize("batch_first", [True, False])
def test_own_layers_with_a_start_or_other_keys(batch_first: bool) -> None:
    """Trials come first in all arguments, whatever torch's own layers say."""
    torch.manual_seed(2)
    x, z = torch.randn(TRIALS, TOKENS, WIDTH).double(), torch.randn(TRIALS, 2, 5).double()
    net = nn.LSTM(WIDTH, 5, num_layers=2, batch_first=batch_first).double()
    swapped = (lambda a: a) if batch_first else (lambda a: a.transpose(0, 1))
    start = z.transpose(0, 1).contiguous(), z.transpose(0, 1).contiguous() / 2

    def output(call: Callable[..., Any]) -> Tensor:
        return swapped(call(swapped(x), start)[0])

    flow = linearized(net, (x, (z, z / 2)), state="")
    close(flow.J.dense(), jacobian(net, output))
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first).double()
    keys = torch.randn(TRIALS, 3, WIDTH).double()
    flow = linearized(attention, {"query": x, "key": keys, "value": keys}, state="")
    close(flow.J.dense(), jacobian(attention, lambda call: swapped(call(swapped(x), swapped(keys), swapped(keys))[0])))


def test_the_last_state_of_a_layer() -> None:
    """(y, (h, c)) of torch's own: h has its layers in front."""
    torch.manual_seed(3)
    net, x = nn.LSTM(WIDTH, 5, batch_first=True).double(), torch.randn(TRIALS, TOKENS, WIDTH).double()
    flow = linearized(net, x, state=":1.1")
    close(flow.J.dense(), jacobian(net, lambda call: call(x)[1][1].transpose(0, 1)))


def test_regularizers_of_a_named_output(net: Transformer, given: dict[str, Any]) -> None:
    problem = kp.StaticProblem(net, given, state="logits")
    trace = kp.regularizers.trace(problem, probes=None)
    assert trace.item() == pytest.approx(kp.trace(linearized(net, given, state="logits").ntk).value)


# JAX


class JaxLayer(eqx.Module):
    W: eqx.nn.Linear
    V: eqx.nn.Linear

    def __call__(self, h: jax.Array, mask: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = jax.nn.softmax(jnp.where(mask[None] > 0, h @ h.T, -1e9))
        return h + jnp.tanh(jax.vmap(self.W)(scores @ h)) + jax.vmap(self.V)(h), {"scores": scores}


class JaxTransformer(eqx.Module):
    words: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    layers: list[JaxLayer]
    head: eqx.nn.Linear

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, positions: Any = None, use_cache: bool = True
    ) -> dict[str, Any]:
        assert use_cache is False
        places = jnp.arange(input_ids.shape[0]) if positions is None else positions
        h = jax.vmap(self.words)(input_ids) + jax.vmap(self.positions)(places)
        states = [h]
        for layer in self.layers:
            h, _ = layer(h, attention_mask)
            states.append(h)
        return {"logits": jax.vmap(self.head)(h), "hidden_states": states, "loss": None}


@pytest.fixture(scope="module")
def jax_net(x64: None) -> JaxTransformer:
    keys = jax.random.split(jax.random.key(0), 7)
    layers = [JaxLayer(eqx.nn.Linear(WIDTH, WIDTH, key=keys[0]), eqx.nn.Linear(WIDTH, WIDTH, key=keys[1]))]
    words, places = eqx.nn.Embedding(WORDS, WIDTH, key=keys[4]), eqx.nn.Embedding(2 * TOKENS, WIDTH, key=keys[5])
    return JaxTransformer(words, places, layers, eqx.nn.Linear(WIDTH, WORDS, key=keys[6]))


@pytest.fixture(scope="module")
def jax_given(given: dict[str, Any], x64: None) -> dict[str, Any]:
    return {name: jnp.asarray(to_numpy(v)) if isinstance(v, Tensor) else v for name, v in given.items()}


def jax_jacobian(net: Any, output: Callable[[Any], jax.Array]) -> jax.Array:
    arrays, rest = eqx.partition(net, eqx.is_inexact_array)
    found = jax.jacrev(lambda arrays: output(eqx.combine(arrays, rest)).ravel())(arrays)
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(found)], 1)


def in_order_of_tree(flow: kp.Flow) -> np.ndarray:
    """J with the parameters in the order of the leaves."""
    from kpflow_dyn._jax.checks import floating_leaves

    columns = dict(zip(flow.parameters, np.split(to_numpy(flow.J.dense()), sizes(flow), axis=1), strict=True))
    return np.concatenate([columns[name] for name in floating_leaves(flow.solution.problem.net)], 1)


def sizes(flow: kp.Flow) -> list[int]:
    return np.cumsum([value.size for value in flow.parameters.values()])[:-1].tolist()


@pytest.mark.parametrize("state", [["hidden_states.1", "logits"], ["layers[0]", "logits"]])
def test_the_same_in_jax(jax_net: JaxTransformer, jax_given: dict[str, Any], state: list[str]) -> None:
    flow = linearized(jax_net, jax_given, state=state)

    def both(net: JaxTransformer, *row: jax.Array) -> jax.Array:
        found = net(*row, use_cache=False)
        return jnp.concatenate([found["hidden_states"][1], found["logits"]], -1)

    ids, mask = jax_given["input_ids"], jax_given["attention_mask"]
    close(in_order_of_tree(flow), jax_jacobian(jax_net, lambda net: jax.vmap(lambda *row: both(net, *row))(ids, mask)))
    apart = float(abs(flow.P.dense() - np.eye(flow.P.domain.size)).max())
    assert apart == 0 if "hidden" in state[0] else apart > 1e-3


def test_a_part_of_what_a_part_gives_in_jax(jax_net: JaxTransformer, jax_given: dict[str, Any]) -> None:
    solution = kp.solve(kp.StaticProblem(jax_net, jax_given, state="layers[0]:1.scores"))
    assert solution.state.shape == (TRIALS, TOKENS, TOKENS) and not solution.untraced
    close(solution.state.sum(-1), np.ones((TRIALS, TOKENS)), 1e-12)


def test_what_trials_share_in_jax(jax_net: JaxTransformer, jax_given: dict[str, Any]) -> None:
    places = jnp.arange(TOKENS)[::-1]
    solution = kp.solve(kp.StaticProblem(jax_net, jax_given | {"positions": places}, state="logits"))
    ids, mask = jax_given["input_ids"], jax_given["attention_mask"]
    each = jax.vmap(lambda ids, mask: jax_net(ids, mask, places, False)["logits"])(ids, mask)
    close(solution.state, each, 1e-12)


def test_in_jax_a_length_that_does_not_tell_is_refused(x64: None) -> None:
    """Two trials of two tokens: are the two numbers one for each trial, or for each token?"""

    class Scaled(eqx.Module):
        W: jax.Array

        def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
            return x @ self.W * scale

    net, x = Scaled(jnp.eye(2)), jnp.ones((2, 2))
    with pytest.raises(ValueError, match=r"x\[1\] \[2\] has as many rows as there are trials, but the network takes"):
        kp.solve(kp.StaticProblem(net, (x, jnp.asarray([1.0, 3.0]))))
    by_trial = kp.solve(kp.StaticProblem(net, (x, jnp.asarray([1.0, 3.0])), "", shared=()))
    of_all = kp.solve(kp.StaticProblem(net, (x, jnp.asarray([1.0, 3.0])), "", shared=(1,)))
    close(by_trial.state, np.array([[1.0, 1.0], [3.0, 3.0]]))
    close(of_all.state, np.array([[1.0, 3.0], [1.0, 3.0]]))


def test_errors_in_jax(jax_net: JaxTransformer, jax_given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^unknown modules \['head2'\]; .*and what it gives has logits, hidden_st"):
        kp.solve(kp.StaticProblem(jax_net, jax_given, state="head2"))
    with pytest.raises(ValueError, match=r"^the network gave dict with several arrays"):
        kp.solve(kp.StaticProblem(jax_net, jax_given, state=""))


class OnGraph(nn.Module):
    """Messages along the edges but loops, which are found by their values, and one from each node to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.own = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        start, end = edges[:, edges[0] != edges[1]]
        return torch.tanh(self.own(x).index_add(0, end, self.message(x)[start]))


def test_edges_of_one_graph_are_fixed() -> None:
    torch.manual_seed(0)
    net, x = OnGraph().double(), torch.randn(4, WIDTH, dtype=torch.float64)
    edges = torch.tensor([[0, 1, 2, 2, 3], [1, 1, 0, 3, 3]])
    for given in ((x, edges), {"x": x, "edges": edges}):
        flow = linearized(net, given, axes=("node", "unit"))
        assert [site.kind for site in flow.sites].count("matrix") == 2
        expected = jacobian(net, lambda call: call(x, edges))
        close(flow.J.dense(), expected)
        close((flow.P @ flow.K @ flow.P.T).dense(), expected @ expected.T)


def test_one_sequence_of_tokens_is_what_the_network_reads() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    tokens = torch.randint(WORDS, (TOKENS,))
    flow = linearized(net, tokens, axes=("time", "unit"))
    close(flow.J.dense(), jacobian(net, lambda call: call(tokens)))


@pytest.mark.parametrize(
    ("change", "kind"), [(lambda y: y.argmax(-1), "int64"), (lambda y: y > 0, "bool"), (Tensor.to_sparse, "sparse_coo")]
)
def test_values_without_derivatives_are_no_states(change: Callable[[Tensor], Tensor], kind: str) -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return change(super().forward(x))

    with pytest.raises(ValueError, match=f"the network gives {kind} values, expected dense ones of floating point"):
        kp.solve(kp.StaticProblem(Net(2, 3), torch.randn(4, 2), state=""))


def test_in_jax_integers_are_no_states() -> None:
    net = jax.tree_util.Partial(lambda w, x: jnp.argmax(w @ x), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"the state would be the output int\d+, expected floats"):
        kp.solve(kp.StaticProblem(net, jnp.ones((4, 2)), state=""))
