"""How fast a DRT reads and generates, by context length, beside a base LM and full attention.

Tokens are random: what they say makes no difference.
"""
import time
from dataclasses import fields, replace

import torch
import torch.nn.functional as F

import fast
from fast.generate import generate
from fast.memory import Memory
from fast.short import Graphs
from fast.stream import read, segment_length
from gca import require
from model import DRT, DRTConfig
from tools import cli, report
from tools.checkpoint import load_checkpoint

FULL_ATTENTION_LIMIT = 2 ** 18              # its reading time grows with the square of the length


def flags(parser):
    parser.add_argument("--lengths", type=cli.numbers, metavar="N,N,..",
                        default=[2 ** i for i in (12, 14, 16, 18, 20)],
                        help="tokens of context (4096 to 1048576)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to generate (%(default)s)")
    parser.add_argument("--compare", action="store_true", help="also a base LM and a full-attention model, "
                        "with two layers more")
    parser.add_argument("--ckpt", type=cli.checkpoint, help="checkpoint; default: random weights")
    cli.add_shared(parser, "offload dtype json seed device")
    cli.add_fields(parser.add_argument_group("model"), DRTConfig)


def run(args, device):
    names = [f.name for f in fields(DRTConfig) if getattr(args, f.name) is not None]
    if args.ckpt:
        require(not names, f"--{names and names[0]} must be left out with --ckpt, which says it")
        model, weights = load_checkpoint(args.ckpt, device)[0], f"weights of {args.ckpt}"
    else:
        config = DRTConfig(**{name: getattr(args, name) for name in names})
        model, weights = DRT(config).to(device).eval(), "random weights"
    dtype = cli.pick_dtype(args.dtype, device)
    print(f"{report.hardware(device)}; {weights}, {str(dtype)[6:]}; batch 1")
    model = fast.apply(model.to(dtype))
    fast.check(model)
    rows = [*speed(model, args.lengths, args.tokens, args.offload, args.compare, args.seed)]
    report.print_table(rows)
    return dict(vars(model.config), weights=weights), rows


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


class FullText:
    """For comparison: a text whose tokens attend to all before them. The base LM asks for no more of it."""

    def __init__(self, model, room):
        p, config = model.embedding.weight, model.config
        shape = 1, config.n_kv_head, room, config.n_embd // config.n_head
        self.cache = [(p.new_empty(shape), p.new_empty(shape)) for _ in range(config.n_layer)]
        self.length = 0                                         # tokens that are in the cache

    def attend(self, i):
        """Self-attention of layer i: all of a text that begins, or one more token."""
        (keys, values), length = self.cache[i], self.length

        def attend(q, k, v):
            stop = length + q.shape[2]
            keys[:, :, length:stop], values[:, :, length:stop] = k, v
            return F.scaled_dot_product_attention(q, keys[:, :, :stop], values[:, :, :stop],
                                                  is_causal=length == 0, enable_gqa=True)

        return attend


def time_full_attention(model, tokens, n_new, _):
    """The same; its decoding step is timed as a CUDA graph too, replayed at the same position."""
    device, n = tokens.device, tokens.shape[1]
    text, token = FullText(model, n + 1), tokens[:, :1]

    def read(tokens):
        return model.head(model.hidden(tokens, text)[:, -1])

    read(tokens[:, :64])
    synchronize(device)
    start = time.perf_counter()
    read(tokens)
    synchronize(device)
    seconds = time.perf_counter() - start
    text.length = n

    def step():
        return read(token)

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
    ms = 1000 * (time.perf_counter() - start) / n_new
    size = sum(x.nbytes for pair in text.cache for x in pair)
    return seconds, ms, dict(gpu=size, cpu=0) if device.type == "cuda" else dict(gpu=0, cpu=size), 0.0


@torch.no_grad()
def speed(model, lengths, n_new, offload, compare, seed):
    """Yield a row for each context length and model."""
    weight = model.embedding.weight
    models = [("DRT, offloaded" if offload else "DRT", model, time_drt)]
    if compare:
        base = replace(model.config, n_group=0, n_layer=model.config.n_layer + 2)
        models += [("base LM", DRT(base).to(weight.device, weight.dtype).eval(), time_drt),
                   ("full attention", DRT(base).to(weight.device, weight.dtype).eval(), time_full_attention)]
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
                cache_hits_percent=hit_rate, **report.peak_memory(weight.device))
