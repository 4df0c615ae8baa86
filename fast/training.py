"""The training step of a small model as CUDA graphs: one launch forward, one backward, instead of hundreds.

A step of the preset `gpu` is 420 kernels, most of them a few microseconds long, which Python launches more
slowly than the GPU runs them. Batches keep their shape for hundreds of steps, so kernels are recorded once
and replayed. While the GPU works, Python draws the next batch.
"""
import torch
import torch.nn as nn

from model import DRT

MOST = 2            # shapes kept at a time: as contexts grow, the graphs of shorter ones are given up
SMALL_WIDTH = 256   # of wider models, kernels take longer than their launches


def in_words(model):
    return "steps as CUDA graphs" if model.training and model.config.n_embd <= SMALL_WIDTH else ""


def hidden(model, tokens):
    """DRT.hidden: replayed in training on a GPU, otherwise as it is."""
    grads_are_empty = model.embedding.weight.grad is None       # the graph writes gradients, and adds nothing
    if not (tokens.is_cuda and model.training and torch.is_grad_enabled() and grads_are_empty):
        return DRT.hidden(model, tokens)
    graphs, kind = vars(model).setdefault("graphs", {}), (tokens.shape, torch.is_autocast_enabled("cuda"))
    if kind not in graphs:
        if len(graphs) >= MOST:
            graphs.clear()
        graphs[kind] = record(model, tokens)
    return graphs[kind](tokens)


def record(model, tokens):
    """A function of tokens of this shape, differentiable once: the model's hidden() as two graphs."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)     # it waits, as it should
    with (torch.random.fork_rng([tokens.device]),                       # recording draws noise, too
          torch.autocast("cuda", dtype, enabled, cache_enabled=False)):  # cached casts would not be repeated
        return torch.cuda.make_graphed_callables(Hidden(model), (tokens.clone(),), allow_unused_input=True)


class Hidden(nn.Module):
    """DRT.hidden as a module, which make_graphed_callables wants."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return DRT.hidden(self.model, tokens)
