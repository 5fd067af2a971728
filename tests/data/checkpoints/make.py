"""Writes a small checkpoint of each kind with the package that it is of, and what that package makes of its inputs.

    pip install torch lightning sb3-contrib flax orbax-checkpoint equinox tensorflow keras PsychRNN
    KERAS_BACKEND=tensorflow python make.py torch lightning sb3 flax orbax equinox psychrnn keras

Beside each file NAME stands NAME.expected.npz: inputs x [trial, time, input], states [trial, time, unit] and outputs
[trial, time, out] of the package's own forward pass.
"""

import argparse
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TRIALS, TIMES, INPUTS, UNITS, OUTPUTS = 3, 5, 2, 4, 3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((TRIALS, TIMES, INPUTS)).astype("float32")


def keep(name, states, outputs=None, x=X):
    more = {} if outputs is None else {"outputs": np.asarray(outputs)}
    np.savez_compressed(HERE / f"{name}.expected.npz", x=x, states=np.asarray(states), **more)


def of_torch():
    import torch
    from torch import nn

    global Net

    class Net(nn.Module):
        def __init__(self, kind=nn.GRU, **options):
            super().__init__()
            self.rnn = kind(INPUTS, UNITS, batch_first=True, **options)
            self.fc = nn.Linear(UNITS, OUTPUTS)

        def forward(self, x):
            return self.fc(self.rnn(x)[0])

    @torch.no_grad()
    def done(name, net, x=torch.from_numpy(X)):  # noqa: B008
        keep(name, net.rnn(x)[0], net(x))

    torch.manual_seed(0)
    net = Net()
    torch.save(net.state_dict(), HERE / "old_format.pt", _use_new_zipfile_serialization=False)
    done("old_format.pt", net)
    net = Net(nn.LSTM)
    adam = torch.optim.Adam(net.parameters())
    net(torch.from_numpy(X)).sum().backward()
    adam.step()
    whole = {"epoch": 3, "model": net.state_dict(), "optimizer": adam.state_dict(), "args": argparse.Namespace(lr=1e-3)}
    torch.save(whole, HERE / "nested.pt")
    done("nested.pt", net)
    net = Net(nn.RNN, nonlinearity="relu")
    torch.save(torch.compile(nn.DataParallel(net)).state_dict(), HERE / "compiled.pth")
    done("compiled.pth", net)
    average = torch.optim.swa_utils.AveragedModel(net)
    torch.save({"net": net.state_dict(), "ema": average.state_dict()}, HERE / "ema.pt")
    done("ema.pt", net)
    torch.save(net, HERE / "whole_module.pt")
    done("whole_module.pt", net)
    net = Net()
    torch.jit.script(net).save(HERE / "scripted.pt")
    done("scripted.pt", net)
    net = Net().double()
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    (HERE / "arrays.pkl").write_bytes(pickle.dumps(arrays))
    np.savez(HERE / "arrays.npz", **arrays)
    done("arrays.pkl", net, torch.from_numpy(X).double())
    done("arrays.npz", net, torch.from_numpy(X).double())
    torch.save({"rnn": net.rnn.state_dict(), "fc": net.fc.state_dict()}, HERE / "parts.pt")
    done("parts.pt", net, torch.from_numpy(X).double())


class Config:
    width = UNITS


def of_lightning():
    import lightning
    import torch
    from torch import nn

    class Lit(lightning.LightningModule):
        def __init__(self, config, lr=1e-3):
            super().__init__()
            self.save_hyperparameters()
            self.rnn, self.fc = nn.GRU(INPUTS, UNITS, batch_first=True), nn.Linear(UNITS, OUTPUTS)

        def training_step(self, batch, _):
            return (self.fc(self.rnn(batch[0])[0]) ** 2).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    torch.manual_seed(1)
    lit, x = Lit(Config()), torch.from_numpy(X)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(lit, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=TRIALS))
    trainer.save_checkpoint(HERE / "lightning.ckpt")
    with torch.no_grad():
        states = lit.rnn(x)[0]
        keep("lightning.ckpt", states, lit.fc(states))


def of_sb3():
    import torch
    from sb3_contrib import RecurrentPPO

    policy = {"lstm_hidden_size": UNITS, "net_arch": []}
    model = RecurrentPPO("MlpLstmPolicy", "Pendulum-v1", n_steps=8, batch_size=8, policy_kwargs=policy, seed=0)
    model.learn(8)
    model.save(HERE / "recurrent_ppo.zip")
    with zipfile.ZipFile(HERE / "recurrent_ppo.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "system_info.txt"}
    with zipfile.ZipFile(HERE / "recurrent_ppo.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    x = RNG.standard_normal((TRIALS, TIMES, 3)).astype("float32")
    with torch.no_grad():
        states = model.policy.lstm_actor(torch.from_numpy(x).swapaxes(0, 1))[0].swapaxes(0, 1)
        keep("recurrent_ppo.zip", states, model.policy.action_net(states), x)


def moved(tree):
    """The weights away from where they start, so that no bias is zero."""
    import jax

    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    new = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, new)


def of_flax():
    import flax.linen as linen
    import jax
    import optax
    from flax import nnx, serialization

    class Net(linen.Module):
        cell: type

        @linen.compact
        def __call__(self, x):
            states = linen.RNN(self.cell(UNITS))(x)
            return states, linen.Dense(OUTPUTS)(states)

    for kind in (linen.GRUCell, linen.LSTMCell, linen.OptimizedLSTMCell, linen.SimpleCell):
        net, name = Net(kind), f"linen_{kind.__name__}.msgpack"
        params = moved(net.init(jax.random.key(0), X)["params"])
        whole = {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": 3}
        (HERE / name).write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(whole)))
        keep(name, *net.apply({"params": params}, X))
    for kind in (nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell):
        net, name = nnx_net(kind), f"nnx_{kind.__name__}.msgpack"
        pure = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
        (HERE / name).write_bytes(serialization.msgpack_serialize(pure))
        keep(name, *net(X))


def nnx_net(kind):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(kind(INPUTS, UNITS, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(UNITS, OUTPUTS, rngs=rngs)

        def __call__(self, x):
            states = self.rnn(x)
            return states, self.head(states)

    net = Net(nnx.Rngs(0))
    nnx.update(net, moved(nnx.state(net, nnx.Param)))
    return net


def of_orbax():
    import orbax.checkpoint as orbax
    from flax import nnx

    net = nnx_net(nnx.GRUCell)
    with orbax.StandardCheckpointer() as saver:
        saver.save(HERE / "orbax_nnx", nnx.state(net), force=True)
    keep("orbax_nnx", *net(X))
    with orbax.CheckpointManager(HERE / "orbax_steps") as manager:
        for step in (2, 10):
            params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
            manager.save(step, args=orbax.args.StandardSave({"params": params, "step": step}))
    keep("orbax_steps", *net(X))


def of_equinox():
    import equinox
    import jax

    cell = equinox.nn.GRUCell(INPUTS, UNITS, key=jax.random.key(3))
    equinox.tree_serialise_leaves(HERE / "cell.eqx", cell)
    with (HERE / "cell_behind_options.eqx").open("wb") as file:
        file.write(b'{"units": 4}\n')
        equinox.tree_serialise_leaves(file, cell)
    (HERE / "equinox.pkl").write_bytes(pickle.dumps({"cell": cell}))
    states, state = [], np.zeros((TRIALS, UNITS), "float32")
    for x_t in X.swapaxes(0, 1):
        state = jax.vmap(cell)(x_t, state)
        states.append(state)
    for name in ("cell.eqx", "cell_behind_options.eqx", "equinox.pkl"):
        keep(name, np.stack(states, 1))


def of_psychrnn():
    from psychrnn.backend.models.basic import Basic

    connected = (RNG.random((UNITS, UNITS)) > 0.3).astype(float)
    networks = {"dale": {"dale_ratio": 0.75}, "plain": {}, "sparse": {"rec_connectivity": connected, "autapses": False}}
    sizes = {"N_in": INPUTS, "N_rec": UNITS, "N_out": OUTPUTS, "N_steps": TIMES, "N_batch": TRIALS}
    for name, options in networks.items():
        net = Basic({"name": name, "dt": 10, "tau": 50, "rec_noise": 0.0} | sizes | options)
        net.build()
        net.save(HERE / f"psychrnn_{name}.npz")
        outputs, states = net.test(X)
        keep(f"psychrnn_{name}.npz", states, outputs)
        net.destruct()


def of_keras():
    import keras

    files = {"GRU": "gru.keras", "LSTM": "lstm.h5", "SimpleRNN": "simple.weights.h5"}
    for kind, name in files.items():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((TIMES, INPUTS))
        states = getattr(keras.layers, kind)(UNITS, return_sequences=True)(inputs)
        model = keras.Model(inputs, [states, keras.layers.Dense(OUTPUTS)(states)])
        model.set_weights([weight + 0.1 * RNG.standard_normal(weight.shape) for weight in model.get_weights()])
        save = model.save_weights if "weights" in name else model.save
        save(HERE / f"keras_{name}")
        keep(f"keras_{name}", *[np.asarray(found) for found in model(X)])


for package in sys.argv[1:]:
    globals()[f"of_{package}"]()
for path in HERE.rglob("commit_success.txt"):  # it says where orbax wrote
    path.unlink()
