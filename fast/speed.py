"""How fast a DRT reads and generates, by context length, beside a base LM and full attention.

eval.py speed calls speed(), on random tokens: what they say makes no difference.
"""
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from fast.generate import generate
from fast.memory import Memory
from fast.short import Graphs
from fast.stream import read, segment_length
from model import DRT

FULL_ATTENTION_LIMIT = 2 ** 18              # its reading time grows with the square of the length


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def warm_up(model, tokens, graphs=None):
    """Compile what reading these tokens takes: whole segments, and the last one; record a short text."""
    size = segment_length(model, len(tokens))
    n = min(2, tokens.shape[1] // size) * size + tokens.shape[1] % size
    for _ in range(2 if graphs else 1):
        read(model, tokens[:, :n], Memory(model, len(tokens)), "last", graphs)
    synchronize(tokens.device)


def time_drt(model, tokens, n_new, offload):
    """Seconds to read the tokens; milliseconds for each of n_new generated ones; bytes of the memory."""
    device, n_text, graphs = tokens.device, model.config.chunk_size - 1, Graphs(model)
    warm_up(model, tokens, graphs)
    memory = Memory(model, offload=offload, capacity=tokens.shape[1] + n_new + 4 * n_text)
    start = time.perf_counter()
    read(model, tokens, memory, "last", graphs)
    synchronize(device)
    seconds = time.perf_counter() - start
    new = generate(model, tokens[:, :1], n_new + 2 * n_text, memory=memory)
    for _ in range(2 * n_text):                                 # two chunks, to compile and record the graph
        next(new)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_new):
        next(new)
    synchronize(device)
    hit_rate = 100 * memory.cache.hit_rate if memory.cache else 0.0
    return seconds, 1000 * (time.perf_counter() - start) / n_new, memory.nbytes, hit_rate


class FullAttention(DRT):
    """For comparison: the base LM with plain causal attention to everything, in a cache of a fixed size."""

    def read(self, tokens, cache, length):
        """tokens (B, n) at positions length .. length+n-1, n = 1 unless length is 0: last token's logits."""
        stop, x = length + tokens.shape[1], self.embedding(tokens)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            q, keys[:, :, length:stop], values[:, :, length:stop] = layer.attention.heads(layer.norm1(x))
            out = F.scaled_dot_product_attention(q, keys[:, :, :stop], values[:, :, :stop],
                                                 is_causal=length == 0, enable_gqa=True)
            x = x + layer.attention.out(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.norm2(x))
        return self.head(self.norm(x[:, -1]))

    def cache(self, batch_size, room):
        p, config = self.embedding.weight, self.config
        shape = batch_size, config.n_kv_head, room, config.n_embd // config.n_head
        return [(p.new_empty(shape), p.new_empty(shape)) for _ in range(config.n_layer)]


def time_full_attention(model, tokens, n_new, _):
    """The same; its decoding step is timed as a CUDA graph too, replayed at the same position."""
    device, n = tokens.device, tokens.shape[1]
    cache, token = model.cache(1, n + 1), tokens[:, :1]
    model.read(tokens[:, :64], cache, 0)
    synchronize(device)
    start = time.perf_counter()
    model.read(tokens, cache, 0)
    synchronize(device)
    seconds = time.perf_counter() - start

    def step():
        return model.read(token, cache, n)

    step()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_new):
        step()
    synchronize(device)
    ms, size = 1000 * (time.perf_counter() - start) / n_new, sum(x.nbytes for pair in cache for x in pair)
    return seconds, ms, dict(gpu=size, cpu=0) if device.type == "cuda" else dict(gpu=0, cpu=size), 0.0


@torch.no_grad()
def speed(model, lengths, n_new, offload, compare, seed, peak_memory):
    """Yield a row for each context length and model; peak_memory(): the row's last columns, once it ran."""
    weight = model.embedding.weight
    models = [("DRT, offloaded" if offload else "DRT", model, time_drt)]
    if compare:
        base = replace(model.config, n_group=0, n_layer=model.config.n_layer + 2)
        models += [("base LM", DRT(base).to(weight.device, weight.dtype).eval(), time_drt),
                   ("full attention", FullAttention(base).to(weight.device, weight.dtype).eval(),
                    time_full_attention)]
    generator = torch.Generator(weight.device).manual_seed(seed)
    least = min(*lengths, FULL_ATTENTION_LIMIT)
    for _, subject, timed in models:                            # once untimed: what is loaded on first use
        timed(subject, torch.zeros(1, least, dtype=torch.long, device=weight.device), n_new, offload)
    for length in lengths:
        shape = 1, length
        tokens = torch.randint(model.config.vocab_size, shape, device=weight.device, generator=generator)
        for name, subject, timed in models:
            if timed is time_full_attention and length > FULL_ATTENTION_LIMIT:
                continue
            if weight.is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds, ms, size, hit_rate = timed(subject, tokens, n_new, offload)
            yield dict(
                model=name, parameters=sum(p.numel() for p in subject.parameters()), length=length,
                read_seconds=seconds, read_tokens_per_second=length / seconds, ms_per_new_token=ms,
                memory_gpu_gib=size["gpu"] / 2 ** 30, memory_cpu_gib=size["cpu"] / 2 ** 30,
                cache_hits_percent=hit_rate, **peak_memory())
