"""A traced JAX step is the step: its values, its derivatives, and a site for every parameter that matters."""

from __future__ import annotations

import functools

import numpy as np
import pytest

jax = pytest.importorskip("jax")
eqx = pytest.importorskip("equinox")

import jax.numpy as jnp  # noqa: E402

from kpflow_dyn._jax import transforms  # noqa: E402
from kpflow_dyn._jax.trace import trace  # noqa: E402
from kpflow_dyn.tracing._graph import Role, ancestors, run  # noqa: E402
from kpflow_dyn.tracing._sites import LookupSite, MatrixSite, OpaqueSite, ScaleSite  # noqa: E402
from kpflow_dyn.tracing._steps import analyse  # noqa: E402

INPUTS, UNITS, ROWS = 3, 4, 3


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape))


def of(**sizes):
    """Parameters of these shapes."""
    return {name: 0.5 * normal(*shape, seed=n + 1) for n, (name, shape) in enumerate(sizes.items())}


def of_module(module, call):
    """A step on the arrays of an equinox module, by their paths."""
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten_with_path(arrays)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]

    def step(parameters, x, z):
        return call(eqx.combine(jax.tree.unflatten(tree, [parameters[name] for name in names]), static), x, z)

    return step, dict(zip(names, (leaf for _, leaf in leaves), strict=True))


RNN = {"W": (UNITS, UNITS), "U": (UNITS, INPUTS), "b": (UNITS,)}
STEPS = {}


def register(**sizes):
    """Add a step with parameters of these shapes to the registry."""

    def to_registry(step):
        STEPS[step.__name__] = lambda: (step, of(**sizes))
        return step

    return to_registry


def register_module(build):
    """Add an equinox module and how it steps."""
    STEPS[build.__name__] = lambda: of_module(*build(jax.random.key(0)))
    return build


@register(**RNN)
def rows_times_transposed(p, x, z):
    return jnp.tanh(z @ p["W"].T + x @ p["U"].T + p["b"])


@register(**RNN)
def weights_times_columns(p, x, z):
    return 0.5 * z + 0.5 * jnp.tanh(p["W"] @ z + p["U"] @ x + p["b"])


@register(**RNN)
def relu_rnn(p, x, z):
    return jax.nn.relu(p["W"] @ z + p["U"] @ x + p["b"])


@register_module
def gru(key):
    return eqx.nn.GRUCell(INPUTS, UNITS, key=key), lambda cell, x, z: cell(x, z)


@register_module
def lstm(key):
    cell = eqx.nn.LSTMCell(INPUTS, UNITS // 2, key=key)
    return cell, lambda cell, x, z: jnp.concatenate(cell(x, tuple(jnp.split(z, 2))))


@register(gate=(UNITS, INPUTS + UNITS + 2), candidate=(UNITS, INPUTS + UNITS + 2), constant=(2,))
def concatenating(p, x, z):
    v = jnp.concatenate([x, z, p["constant"]])
    gate = jax.nn.sigmoid(p["gate"] @ v)
    return gate * z + (1 - gate) * jnp.tanh(p["candidate"] @ v)


@register(m=(UNITS, 2), n=(UNITS, 2), U=(UNITS, INPUTS))
def low_rank(p, x, z):
    return jnp.tanh((p["m"] @ p["n"].T) @ z / UNITS + p["U"] @ x)


@register(W=(UNITS, UNITS), b=(UNITS,), U=(UNITS, INPUTS))
def tied(p, x, z):
    return jnp.tanh(p["W"] @ jnp.tanh(p["W"] @ z + p["b"]) + p["U"] @ x) @ p["W"]


@register(W=(UNITS, UNITS), table=(5, UNITS))
def embedding(p, x, z):
    return jnp.tanh(p["W"] @ z + p["table"][jnp.clip(jnp.abs(x[0]).astype(int), 0, 4)])


@register(W=(UNITS, UNITS), table=(5, UNITS))
def taken_embedding(p, x, z):
    return jnp.tanh(p["W"] @ z + jnp.take(p["table"], jnp.abs(x[:2]).astype(int), axis=0).sum(0))


@register_module
def convolution(key):
    layers = {"conv": eqx.nn.Conv1d(1, 1, 3, padding=1, key=key), "U": eqx.nn.Linear(INPUTS, UNITS, key=key)}
    return layers, lambda layer, x, z: jnp.tanh(layer["conv"](z[None])[0] + layer["U"](x))


@register_module
def layer_norm(key):
    layers = {"norm": eqx.nn.LayerNorm(UNITS), "W": eqx.nn.Linear(UNITS, UNITS, key=key)}
    return layers, lambda layer, x, z: jnp.tanh(layer["W"](layer["norm"](z)) + x.sum())


@register(q=(UNITS, UNITS), k=(UNITS, UNITS), U=(UNITS, INPUTS), sharpness=())
def attention(p, x, z):
    q, k, v = (p["q"] @ z).reshape(2, 2), (p["k"] @ z).reshape(2, 2), z.reshape(2, 2)
    weights = jax.nn.softmax(jnp.exp(p["sharpness"]) * q @ k.T)
    return jnp.tanh((weights @ v).reshape(UNITS) + p["U"] @ x)


@register(**RNN, w=(UNITS,))
def scan_with_weights(p, x, z):
    def body(carry, x):
        carry = jnp.tanh(p["W"] @ carry + x * p["w"])
        return carry, carry.sum()

    z, sums = jax.lax.scan(body, z, x, reverse=True)
    return z + p["U"] @ sums + p["b"]


@register(W=(UNITS, UNITS))
def loop_with_weights(p, x, z):
    return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(p["W"] @ c + i * x[0]), z)


@register(W=(UNITS, UNITS), U=(UNITS, INPUTS))
def scan_without_weights(p, x, z):
    def body(carry, v):
        return 0.5 * carry + jnp.sin(v), carry * v

    z, products = jax.lax.scan(body, z[0], p["W"] @ z)
    return jnp.tanh(z + products + p["U"] @ x)


@register(W=(UNITS, UNITS), a=(UNITS,))
def scan_for_a_weight(p, x, z):
    _, decays = jax.lax.scan(lambda c, a: (c * a, c + a), 1.0, p["a"])
    return jnp.tanh(p["W"] @ (decays * z)) + x.sum()


@register(**RNN)
def nested_jit(p, x, z):
    @jax.jit
    def affine(p, x, z):
        return jax.jit(jnp.matmul)(p["W"], z) + jax.checkpoint(jnp.matmul)(p["U"], x) + p["b"]

    return jnp.tanh(affine(p, x, z))


@jax.custom_jvp
def affine(w, z, b):
    return w @ z + b


@affine.defjvp
def _affine_tangent(primals, tangents):
    (w, z, b), (dw, dz, db) = primals, tangents
    return affine(w, z, b), dw @ z + w @ dz + db


@register(**RNN)
def custom_with_weights(p, x, z):
    return jnp.tanh(affine(p["W"], z, p["b"]) + p["U"] @ x)


@jax.custom_jvp
def spike(w, z):
    return (w @ z > 0.0).astype(z.dtype)


@spike.defjvp
def _spike_tangent(primals, tangents):
    (w, z), (dw, dz) = primals, tangents
    return spike(w, z), (dw @ z + w @ dz) / (1 + jnp.square(w @ z))


@register(**RNN)
def surrogate_with_weights(p, x, z):
    return spike(p["W"], jnp.tanh(z)) + p["U"] @ x + p["b"]


@register(tau=(UNITS,), W=(UNITS, UNITS), theta=(UNITS,))
def pointwise_custom(p, x, z):
    v = jnp.logaddexp(p["theta"], z) + jax.nn.softplus(z) + jax.nn.silu(z) + jax.nn.gelu(z)
    return z * jax.nn.sigmoid(p["tau"]) + p["W"] @ v + x.sum()


@register(W=(UNITS, 2, 2), A=(2, 2, 2), w=(UNITS,), v=(UNITS,), U=(INPUTS, UNITS))
def einsums(p, x, z):
    out = jnp.einsum("uij,ij->u", p["W"], z.reshape(2, 2)) + jnp.einsum("u,u->u", p["w"], z)
    out += jnp.einsum("bij,bj->ib", p["A"], z.reshape(2, 2)).reshape(UNITS) + jnp.einsum("i,iu->u", x, p["U"])
    return jnp.tanh(out + jnp.einsum("i,u,j->u", x, p["v"], z))


@register(W=(2, UNITS, 3, 2), B=(3, 2, 2))
def batched_products(p, x, z):
    blocks = jnp.einsum("ab,k->kab", z.reshape(2, 2), x)
    mixed = jnp.einsum("kab,kbc->ack", blocks, p["B"])
    return jnp.tanh(jnp.einsum("aukc,ack->u", p["W"], mixed)) + jnp.einsum("kab,kba->k", blocks, p["B"]).sum()


@register(V=(UNITS, UNITS), g=(UNITS,), U=(UNITS, INPUTS))
def weight_norm(p, x, z):
    weight = p["g"][:, None] * p["V"] / jnp.linalg.norm(p["V"], axis=1, keepdims=True)
    return jnp.tanh(weight @ z + p["U"] @ x)


@register_module
def mapped_over_tokens(key):
    layers = {"token": eqx.nn.Linear(2, 2, key=key), "U": eqx.nn.Linear(INPUTS, UNITS, key=key)}
    return layers, lambda layer, x, z: jnp.tanh(jax.vmap(layer["token"])(z.reshape(2, 2)).T.ravel() + layer["U"](x))


@register_module
def mapped_attention(key):
    attend = eqx.nn.MultiheadAttention(2, 2, key=key)
    return attend, lambda attend, x, z: z + attend(*[z.reshape(2, 2)] * 3).ravel() + x.sum()


@register(W=(UNITS, UNITS), v=(2,), b=(UNITS,))
def moving_elements(p, x, z):
    padded = jnp.pad(z[1:], (0, 1), constant_values=1.0) + jnp.roll(z, 1) + z[::-1] + jnp.tile(z[:2], 2)
    picked = z[jnp.array([1, 0, 2, 3])] + jnp.take(z, jnp.array([3, 3, 9, 0]), mode="fill", fill_value=1.0)
    updated = z.at[1:3].set(p["v"]).at[0].set(x[0]) + jax.lax.dynamic_update_slice(z, p["v"], (1,))
    stacked = jnp.stack([1.0, z[0], p["v"][0], x[1]]) + jnp.stack([z, p["b"]])[0]
    return jnp.tanh(p["W"] @ padded + picked + updated + stacked)


@register(W=(UNITS, UNITS), a=(UNITS,))
def branches(p, x, z):
    gate = jax.lax.cond(x[0] > 0, jnp.tanh, jnp.sin, z) * jax.lax.cond(x[1] > 0, jnp.multiply, jnp.add, p["a"], z)
    return jnp.where(z > 0, p["W"] @ gate, jax.lax.stop_gradient(z)) + jnp.diag(p["W"])


@register(W=(UNITS, UNITS), U=(UNITS, INPUTS))
def several_results(p, x, z):
    values, order = jax.lax.top_k(p["W"] @ z, UNITS)
    smallest, _ = jnp.sort(z), jax.lax.top_k(z, 1)
    return jnp.tanh(values * smallest + order + p["U"] @ jax.lax.optimization_barrier((x, z))[0])


@register(W=(UNITS, UNITS), b=(UNITS,))
def noisy(p, x, z):
    jax.debug.print("z = {}", z)
    return jnp.tanh(p["W"] @ z + p["b"]) + 0.1 * jax.random.normal(jax.random.key(0), (UNITS,)) + x.mean()


@register(W=(UNITS, UNITS), unused=(2, 2))
def without_input(p, x, z):
    return p["W"] @ jnp.asarray(np.eye(UNITS)[::-1]) @ z


@register(U=(UNITS, INPUTS))
def without_state(p, x, z):
    return p["U"] @ x


@functools.cache
def traced(name):
    """The step, its parameters, rows of inputs and states, and the graph."""
    step, parameters = STEPS[name]()
    x, z = 2 * normal(ROWS, INPUTS), normal(ROWS, UNITS)
    return step, parameters, x, z, trace(step, parameters, x[0], z[0])


def as_function(graph):
    """The graph as a function of (parameters, x, z)."""
    (x_node,), (z_node,) = ([n for n in graph.nodes if n.role is role] for role in (Role.INPUT, Role.STATE))

    def step(parameters, x, z):
        given = {node: parameters[name] for node, name in graph.parameters.items()}
        return run(graph.nodes, graph.values | given | {x_node: x, z_node: z})[graph.output]

    return step


@functools.cache
def analysed(name):
    return analyse_graph(traced(name)[-1])


def analyse_graph(graph):
    return analyse(graph, set(graph.parameters.values()), transforms)


def assert_close(found, expected, tol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@functools.partial(jax.jit, static_argnums=0)
def evaluated(step, *at):
    """The step of one row and of all rows; its derivatives in forward and in reverse mode, along some directions."""
    on_rows, (parameters, x, z) = jax.vmap(step, (None, 0, 0)), at
    value, tangent = jax.jvp(on_rows, at, jax.tree.map(jnp.cos, at))
    return (step(parameters, x[0], z[0]), value), (tangent, jax.vjp(on_rows, *at)[1](jnp.sin(z)))


@pytest.mark.parametrize("name", STEPS)
def test_the_graph_is_the_step(name):
    step, *at, graph = traced(name)
    assert graph.output.shape == (UNITS,)
    assert set(graph.parameters.values()) == set(at[0])
    assert [n.role for n in graph.nodes if n.role in (Role.INPUT, Role.STATE)] == [Role.INPUT, Role.STATE]
    found, expected = evaluated(as_function(graph), *at), evaluated(step, *at)
    for part, tol in enumerate((1e-14, 1e-13)):
        assert_close(found[part], expected[part], tol)


@pytest.mark.parametrize("name", STEPS)
def test_every_parameter_that_matters_has_a_site(name):
    step, parameters, x, z, graph = traced(name)
    structure = analysed(name)
    numbers = np.unique(np.concatenate([site.entries.ravel() for site in structure.sites]))
    names = [graph.parameters[node] for node in structure.parameters]

    def derived(parameters):
        given = {node: parameters[name] for node, name in graph.parameters.items()}
        env = run([n for n in graph.nodes if n in ancestors(structure.computed)], graph.values | given)
        return jnp.concatenate([part.ravel() for node in structure.computed for part in jax.tree.leaves(env[node])])

    def moved_by(jacobian):
        """[output, parameter]"""
        return np.concatenate([jacobian[n].reshape(-1, parameters[n].size) for n in names], 1) != 0

    size = sum(parameters[n].size for n in names)
    found = np.isin(np.arange(size), numbers)
    if structure.computed:
        found |= moved_by(jax.jit(jax.jacrev(derived))(parameters))[numbers[numbers >= size] - size].any(0)
    jacobian = jax.jit(jax.jacrev(lambda p: jax.vmap(step, (None, 0, 0))(p, x, z)))(parameters)
    assert found[moved_by(jacobian).any(0)].all()


@pytest.mark.parametrize("name", STEPS)
def test_roles_keep_their_promise(name):
    graph = traced(name)[-1]
    for node in graph.nodes:
        if node.role is Role.PRODUCT:
            left, right = node.args
            assert len(left.shape) == len(right.shape) in (2, 3)
            assert node.shape == (*left.shape[:-1], right.shape[-1])
        if node.role in (Role.POINTWISE, Role.ADD):
            assert np.broadcast_shapes(node.shape, *(o.shape for o in node.operands)) == node.shape


@pytest.mark.parametrize(
    "name", ["rows_times_transposed", "weights_times_columns", "relu_rnn", "nested_jit", "custom_with_weights"]
)
def test_a_network_with_a_bias_is_one_site(name):
    (site,) = analysed(name).sites
    assert isinstance(site, MatrixSite)
    assert sorted(pieces(site)) == ["INPUT", "STATE", "ones"]
    assert site.entries.shape == (UNITS + INPUTS + 1, UNITS)


def pieces(site):
    """Where the variables of a site with one block come from."""
    (block,) = site.blocks
    for term in block:
        node = None if term is None else term.use.operand
        while node is not None and node.role is Role.MOVE:
            (node,) = node.operands
        yield "ones" if node is None else node.role.name


def test_gates_that_see_the_same_share_a_site():
    assert [sorted(pieces(site)) for site in analysed("lstm").sites] == [["INPUT", "STATE", "ones"]]
    gates, *candidate = analysed("gru").sites
    assert (sorted(pieces(gates)), gates.kicks.size) == (["INPUT", "STATE", "ones"], 2 * UNITS)
    assert sorted(sorted(pieces(site)) for site in candidate) == [["INPUT", "ones"], ["STATE", "ones"]]


@pytest.mark.parametrize(
    ("name", "parameter", "kind"),
    [
        ("low_rank", "m, n", MatrixSite),
        ("weight_norm", "V, g", MatrixSite),
        ("embedding", "table", LookupSite),
        ("taken_embedding", "table", LookupSite),
        ("convolution", "conv.weight", MatrixSite),
        ("attention", "sharpness", ScaleSite),
        ("pointwise_custom", "theta", ScaleSite),
        ("surrogate_with_weights", "W", OpaqueSite),
        ("einsums", "w", ScaleSite),
        ("branches", "a", OpaqueSite),
        ("scan_for_a_weight", "a", ScaleSite),
        ("scan_with_weights", "W", MatrixSite),
    ],
)
def test_the_kind_of_a_site(name, parameter, kind):
    assert {type(site) for site in analysed(name).sites if parameter in site.name.split(" + ")} == {kind}


def names_and_roles(name):
    return [(node.name.rpartition("_")[0], node.role) for node in traced(name)[-1].nodes]


def test_scans_are_unrolled_only_where_weights_meet_data():
    assert ("scan", Role.OTHER) not in names_and_roles("scan_with_weights")
    assert sum(role is Role.PRODUCT for _, role in names_and_roles("loop_with_weights")) == 3
    assert ("scan", Role.OTHER) in names_and_roles("scan_without_weights")
    assert ("scan", Role.OTHER) in names_and_roles("scan_for_a_weight")


def test_roles_of_custom_and_stopped_operations():
    assert ("custom_jvp_call", Role.POINTWISE) in names_and_roles("relu_rnn")
    assert ("custom_jvp_call", Role.OTHER) in names_and_roles("surrogate_with_weights")
    assert "custom_jvp_call" not in dict(names_and_roles("custom_with_weights"))
    assert ("stop_gradient", Role.STOP) in names_and_roles("branches")
    assert "debug_print" not in dict(names_and_roles("noisy"))


def test_the_custom_derivative_is_used():
    step, x, z = lambda p, x, z: jax.nn.relu(p["w"] * z), jnp.zeros(1), jnp.zeros(UNITS)
    graph = as_function(trace(step, of(w=(UNITS,)), x, z))
    assert_close(jax.jacobian(graph, 2)(of(w=(UNITS,)), x, z), jnp.zeros((UNITS, UNITS)), 0)


def test_a_custom_reverse_mode_is_transposed_for_forward_mode():
    @jax.custom_vjp
    def spike(w, v, shift):
        return (w @ v > shift).astype(v.dtype)

    def backward(saved, cotangent):
        w, v = saved
        cotangent = cotangent / (1 + jnp.square(w @ v))
        return jnp.outer(cotangent, v), w.T @ cotangent, None

    spike.defvjp(lambda w, v, shift: (spike(w, v, shift), (w, v)), backward)
    step, parameters, x, z = lambda p, x, z: spike(p["W"], z, 0) + x, of(W=(UNITS, UNITS)), normal(UNITS), normal(UNITS)
    graph = trace(step, parameters, x, z)
    forward, reverse = (mode(as_function(graph), (0, 2))(parameters, x, z) for mode in (jax.jacfwd, jax.jacrev))
    assert_close(forward, reverse, 1e-14)
    assert_close(reverse, jax.jacrev(step, (0, 2))(parameters, x, z), 1e-14)
    assert np.abs(forward[1]).max() > 0
    assert [type(site) for site in analyse_graph(graph).sites] == [OpaqueSite]


@pytest.mark.parametrize(
    ("move", "numbers"),
    [
        (lambda z: jnp.pad(z[1:3], (1, 1), constant_values=2.0), [0, 2, 3, 0]),
        (lambda z: jnp.take(z, jnp.array([7, 0, 2, 2]), mode="fill", fill_value=3.0), [0, 1, 3, 3]),
        (lambda z: z.at[1].set(5.0), [1, 0, 3, 4]),
        (lambda z: z.at[jnp.array([0, 9])].set(z[2:], mode="drop"), [3, 2, 3, 4]),
        (lambda z: jnp.stack([z[1], 1.0, z[0], 2.0]), [2, 0, 1, 0]),
        (lambda z: jnp.concatenate(jnp.split(z, [1, 3])[::-1]), [4, 2, 3, 1]),
        (lambda z: jax.lax.dynamic_update_slice(z, z[:2], (2,)), [1, 2, 1, 2]),
        (lambda z: z.reshape(2, 2).T.ravel().astype(z.dtype), [1, 3, 2, 4]),
        (lambda z: jax.vmap(lambda i: z[i])(jnp.array([3, -1, 0, 1])), [4, 4, 1, 2]),
    ],
)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_moves_take_the_numbers_of_elements(move, numbers, dtype):
    """0 is the number of what is no element of z."""
    graph = trace(lambda p, x, z: move(z), {}, jnp.zeros(1), normal(UNITS))
    state = next(node for node in graph.nodes if node.role is Role.STATE)
    moved = {node for node in graph.nodes if state in ancestors([node])}
    assert {node.role for node in moved} == {Role.STATE, Role.MOVE}
    env = run([node for node in graph.nodes if node not in moved], dict(graph.values))
    env = {node: jnp.zeros(node.shape, dtype) if node.floating else value for node, value in env.items()}
    found = run(graph.nodes, env | {state: jnp.arange(1, UNITS + 1, dtype=dtype)})[graph.output]
    assert found.dtype == dtype
    assert found.tolist() == numbers


def test_single_precision_and_small_integers():
    with jax.enable_x64(False):
        step, parameters = STEPS["moving_elements"]()
        graph = trace(step, parameters, normal(INPUTS), normal(UNITS))
        assert_close(
            as_function(graph)(parameters, normal(INPUTS), normal(UNITS)),
            step(parameters, normal(INPUTS), normal(UNITS)),
            1e-6,
        )
        assert analyse_graph(graph).sites


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda p, x, z: (z, z), "must return the next state, float64"),
        (lambda p, x, z: z[:2], "must return the next state"),
        (lambda p, x, z: z.astype(jnp.float32), "keep its dtype"),
        (lambda p, x, z: None, "must return the next state"),
        (lambda p, x, z: z if x[0] > 0 else -z, "without Python branches.*jnp.where"),
        (lambda p, x, z: z[z > 0], "bool.4.; it must be a function"),
        (lambda p, x, z: z + np.sin(z), "without numpy"),
        (lambda p, x, z: jax.pure_callback(np.sin, z, z), "side effects .pure_callback"),
        (lambda p, x, z: jax.jit(lambda z: jax.experimental.io_callback(np.sin, z, z))(z), "side effects .io_callback"),
    ],
)
def test_what_cannot_be_traced_says_why(step, message):
    with pytest.raises(ValueError, match=message):
        trace(step, of(w=(UNITS,)), normal(INPUTS), normal(UNITS))
