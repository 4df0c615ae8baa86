"""How fast a DRT reads and generates, by context length.

Tokens are random: what they say makes no difference.
"""
import time
from dataclasses import fields

import torch

import fast
from fast.generate import generate
from fast.memory import Memory
from fast.short import Graphs
from fast.stream import read, segment_length
from gca import require
from model import DRT, DRTConfig
from tools import cli, report
from tools.checkpoint import load_checkpoint


def flags(parser):
    parser.add_argument("--lengths", type=cli.numbers, metavar="N,N,..",
                        default=[2 ** i for i in (12, 14, 16, 18, 20)],
                        help="tokens of context (4096 to 1048576)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to generate (%(default)s)")
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
    rows = [*speed(model, args.lengths, args.tokens, args.offload, args.seed)]
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


@torch.no_grad()
def speed(model, lengths, n_new, offload, seed):
    """Yield a row for each context length."""
    device, vocab_size = model.embedding.weight.device, model.config.vocab_size
    name = "base LM" if not model.config.n_group else "DRT, offloaded" if offload else "DRT"
    n_parameter = sum(p.numel() for p in model.parameters())
    generator = torch.Generator(device).manual_seed(seed)
    untimed = torch.zeros(1, min(lengths), dtype=torch.long, device=device)
    time_drt(model, untimed, n_new, offload)                    # what is loaded on first use
    for length in lengths:
        tokens = torch.randint(vocab_size, (1, length), device=device, generator=generator)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, ms, size, hit_rate = time_drt(model, tokens, n_new, offload)
        yield dict(
            model=name, parameters=n_parameter, length=length,
            read_seconds=seconds, read_tokens_per_second=length / seconds, ms_per_new_token=ms,
            memory_gpu_gib=size["gpu"] / 2 ** 30, memory_cpu_gib=size["cpu"] / 2 ** 30,
            cache_hits_percent=hit_rate, **report.peak_memory(device))
