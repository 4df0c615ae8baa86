"""The training step of a small batch as CUDA graphs: one launch forward, one backward, instead of hundreds.

A step of the preset `gpu` is hundreds of kernels, most a few microseconds long, which Python launches more
slowly than the GPU runs them. Batches keep their shape for hundreds of steps, so kernels are recorded once
and replayed. While the GPU works, Python draws the next batch.
"""
import gc
import os

import torch
import torch.distributed as dist
import torch.nn as nn

SMALL = 2 ** 25     # numbers in a batch's residual stream; with more, kernels take longer than their launches


def in_words(model, config):
    """What is done for the steps of a run with this TrainConfig; "" where it does not pay, or cannot be.

    Replaying overwrites gradients, so there are no micro-batches. GCA_CHECK_INDICES waits for the GPU, which
    recording forbids.
    """
    is_small = max(config.batch_tokens, config.seq_len) * model.config.n_embd <= SMALL
    pays = config.fast and model.embedding.weight.is_cuda and is_small
    can_be = not (config.micro_batch or dist.is_initialized() or os.environ.get("GCA_CHECK_INDICES") == "1")
    return "steps as CUDA graphs" if pays and can_be else ""


class GraphedObjective(nn.Module):
    """objective(*batch) -> loss and {name: number}, for one backward pass each, before the next call.

    Only for train.py's loop: results and gradients lie where the next call writes its own, and what changes
    about the model, other than its weights, is not seen.
    """

    def __init__(self, objective):
        super().__init__()
        self.objective, self.graphs = objective, {}         # by the shapes of a batch: the last ones alone

    def forward(self, *batch):
        kind = tuple(x.shape for x in batch)
        if kind not in self.graphs:
            self.graphs.clear()
            gc.collect()                                # a graph is part of a cycle, and holds its memory
            self.graphs[kind] = self.record(batch)
        return self.graphs[kind](*batch)

    def record(self, batch):
        """A function of batches of these shapes: the objective as two graphs."""
        device = batch[0].device
        autocast = device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        warn_of_streams = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if warn_of_streams:
            warn_of_streams(False)              # gradients wait for the recording's stream: that is meant
        # Recording draws noise: the generators' states come back. Autocast is inside, without backward.
        with torch.random.fork_rng([device]), torch.autocast(device.type, enabled=False):
            recorded = Recorded(self.objective, autocast)
            batch = tuple(x.clone() for x in batch)
            return torch.cuda.make_graphed_callables(recorded, batch, allow_unused_input=True)


class Recorded(nn.Module):
    """The objective with its autocast inside, which does not cache: graphs must cast the weights anew."""

    def __init__(self, objective, autocast):
        super().__init__()
        self.objective, self.autocast = objective, autocast

    def forward(self, *batch):
        with torch.autocast(*self.autocast, cache_enabled=False):
            value, numbers = self.objective(*batch)
        return value, {name: x.detach() for name, x in numbers.items()}
