"""The same results, faster. gca.py, model.py and tasks/ never import this package: it works from outside.

    model = apply(model)                    swaps pieces of a model that exists, by the table below
    memory = Memory(model)                  what reading leaves behind (memory.py)
    logits = read(model, tokens, memory)    reads on, instead of reading everything again (stream.py)
    for tokens in generate(model, ..): ..   generates, at a nearly constant cost per token (generate.py)

    gca.py, hopper.py, launch.py    the kernels          window.py, loss.py    the table's other twins
    training.py                     steps as CUDA graphs, which tools/run.py asks for in train.py's loop
    short.py                        Graphs: short texts as CUDA graphs, which read() replays
    bench.py, speed.py              what is timed        files.py              whole files, or none

Each fast piece has a test that it does what its plain twin does. A piece is swapped only where that pays.
"""
import warnings

from fast import gca, loss, training, window
from fast.generate import generate
from fast.memory import Memory
from fast.short import Graphs
from fast.stream import read
from model import DRT, CrossAttention, SelfAttention

__all__ = ["Graphs", "Memory", "apply", "describe", "generate", "read"]

TABLE = [
    # plain piece                           fast twin                   in words; "" where it does not pay
    (CrossAttention, "gca",                 gca.gca,                    gca.in_words),
    (SelfAttention,  "window_attention",    window.window_attention,    window.in_words),
    (DRT,            "cross_entropy",       loss.cross_entropy,         loss.in_words),
]


def apply(model, compile=False):
    """Swap pieces of a model on a GPU for faster ones with the same results; returns the model.

    On a CPU the plain pieces are as fast, and stay. compile: also torch.compile each layer, which takes most
    of a minute and makes steps faster.
    """
    if not model.embedding.weight.is_cuda:
        return model
    swap(model)
    if compile:
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        for layer in [*model.layers, *([model.encoder] if model.config.n_group else [])]:
            layer.compile(dynamic=False)
    return model


def swap(model):
    for kind, attribute, twin, in_words in TABLE:
        for module in model.modules():
            if isinstance(module, kind) and in_words(model):
                setattr(module, attribute, twin)


def describe(model, config=None):
    """What of the table is active in the model, in words, or "": for the line that says what runs.

    config: a TrainConfig, for a model that is to be trained: also whether its steps are CUDA graphs.
    """
    active = [training.in_words(model, config)] if config else []
    for kind, attribute, twin, in_words in TABLE:
        if any(isinstance(module, kind) and getattr(module, attribute) is twin for module in model.modules()):
            active.append(in_words(model))
    return ", ".join(filter(None, active))
