"""Networks from checkpoint files: what training code leaves in, a network with its weights and its readout out.

files: which kind of file, and the tree of tensors in it; nothing that the file names is made or called
names: the tensors by name, those of other libraries under the names of torch
networks, cells: the recurrent network that the names make up, and its readout
modules: a module of the user's own, filled
"""

from kpflow_dyn._checkpoint.loading import Checkpoint, load_checkpoint
from kpflow_dyn._problems.parameters import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint"]
