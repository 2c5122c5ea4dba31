"""Imports of the server that CPU runs are forked from, so that no run repeats them. Imports ``worker``, ``compat``.

It must not start threads, which do not survive a fork, nor touch CUDA.
"""

import sklearn.datasets  # noqa: F401
import torch

import stiefel.compare.worker.cost
import stiefel.compare.worker.main
import stiefel.compare.worker.quality  # noqa: F401
from stiefel.compat.geoopt import geoopt  # noqa: F401

torch.set_num_threads(1)  # a parallel operation here would start a thread pool
# Making any optimizer imports torch's compiler, which takes over a second.
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
