"""CUDA graphs where there is no GPU: operations are noted, and repeated."""
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import DEVICE


class Operations(TorchDispatchMode):
    """Notes every operation, as a graph that is recorded does."""

    def __init__(self, noted):
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.noted.append((function, args, kwargs or {}, result))
        return result


class StandIn:
    """For torch.cuda.CUDAGraph on a CPU: replay() repeats the operations, into the recording's tensors."""

    def __init__(self):
        self.noted = []

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def replay(self):
        for function, args, kwargs, result in self.noted:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                is_view = torch.is_tensor(old) and old.data_ptr() == new.data_ptr()
                if torch.is_tensor(old) and not is_view:
                    old.data.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs, or something that behaves like them."""
    if DEVICE.type == "cuda":
        return
    fork_rng = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork_rng([]))
    monkeypatch.setattr(torch.cuda.graphs, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda.graphs, "graph", lambda graph, pool=None: Operations(graph.noted))
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    for name, stand_in in dict(CUDAGraph=StandIn, graph=torch.cuda.graphs.graph, synchronize=lambda: None,
                               Stream=lambda: None, stream=lambda _: nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
