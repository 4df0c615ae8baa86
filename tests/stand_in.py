"""CUDA graphs where there is no GPU: operations are noted, and repeated."""
from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from helpers import DEVICE


class Outside:
    """A tensor that was there before the recording, which does not keep it alive: no graph does."""

    def __init__(self, x):
        self.storage = StorageWeakRef(x.untyped_storage())
        self.dtype, self.view = x.dtype, (x.storage_offset(), x.shape, x.stride())

    def tensor(self):
        assert not self.storage.expired(), "a graph reads memory that was given back"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


class Operations(TorchDispatchMode):
    """Notes every operation, as a graph that is recorded does."""

    def __init__(self, noted):
        super().__init__()
        self.noted, self.inside = noted, set()              # storages that were made in the recording

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        noted = tree_map(self.note, (args, kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = function(*args, **kwargs or {})
        made = {x.untyped_storage()._cdata for x in tree_leaves(result) if torch.is_tensor(x)} - given
        self.inside |= made
        self.noted.append((function, *noted, result))
        return result

    def note(self, x):
        is_outside = torch.is_tensor(x) and x.untyped_storage()._cdata not in self.inside
        return Outside(x) if is_outside else x


class StandIn:
    """For torch.cuda.CUDAGraph on a CPU: replay() repeats the operations, into the recording's tensors."""

    def __init__(self):
        self.noted = []

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def replay(self):
        for function, args, kwargs, result in self.noted:
            args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Outside) else x, (args, kwargs))
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                is_there = not torch.is_tensor(old) or old.data_ptr() == new.data_ptr()     # or a view
                if not is_there:
                    old.data.copy_(new)


@pytest.fixture
def cuda_graphs(monkeypatch):
    """CUDA graphs, or something that behaves like them."""
    if DEVICE.type == "cuda":
        return
    fork_rng = torch.random.fork_rng                        # training.py forks that of the GPU, too
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork_rng([]))
    monkeypatch.setattr(torch.cuda.graphs, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda.graphs, "graph", lambda graph, **_: Operations(graph.noted))
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    for name, stand_in in dict(CUDAGraph=StandIn, graph=torch.cuda.graphs.graph, synchronize=lambda: None,
                               Stream=lambda: None, stream=lambda _: nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
