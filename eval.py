"""Measure a trained DRT.

    python eval.py niah --ckpt out/ckpt.pt --lengths 128,131072     needle accuracy by context length
    python eval.py ppl --ckpt drt/ckpt.pt base/ckpt.pt              perplexity by context length
    python eval.py speed --lengths 16384,1048576                    reading and generating, by context length
    python eval.py sample --prompt 'import os' --tokens 200         continue a text
    python eval.py plot drt.json base.json --out niah.png           pictures of what --json wrote
"""
import codecs
import json
import math
import platform
import resource
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import EVALUATION, NeedleTask, Parser, load_corpus, load_tokenizer, needle_batch
from model import DRT, RETRIEVERS, DRTConfig, Memory, load_checkpoint


def pick_device(name):
    """'auto' is the GPU if there is one. ValueError for a GPU that there is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name) if name in ("cpu", "cuda") else None
    if device is None or device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device must be auto, cpu, or cuda on a machine with a GPU, got {name!r}")
    return device


def hardware(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(rows):
    """Rows are dicts with the same keys; the keys are the header."""
    def text(x):
        if isinstance(x, str):
            return x
        return f"{x:,}" if isinstance(x, int) else f"{x:,.0f}" if x >= 1000 else f"{x:.2f}"

    table = [list(rows[0])] + [[text(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def save_json(path, settings, device, rows):
    report = dict(settings=settings, hardware=hardware(device), rows=rows)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


# ---------------------------------------------------------------- needles in a haystack (Sec. 4)

def niah_length(model, text, task, length, questions, seed, device):
    """One row of the table: accuracy over `questions` questions in contexts of `length` tokens.

    Every token is predicted greedily from the true tokens before it, so all tokens of an answer are right
    exactly when greedy generation would have produced that answer.
    """
    task = task.fit(length)
    rng = np.random.default_rng([EVALUATION, seed, length])
    questions = questions or default_questions(length, task.n_needle, device)
    contexts = -(-questions // task.n_needle)
    batch = max(1, min(contexts, model.segment(1) // length))
    hits, seconds = [], 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(0, contexts, batch):
        tokens, answers, at = map(torch.from_numpy, needle_batch(text, task, rng, batch, length))
        tokens, at = tokens.to(device), at.to(device)
        if i == 0 and device.type == "cuda":                    # compile before the clock runs
            with torch.autocast("cuda", torch.bfloat16):
                warm_up(model, tokens)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model.read(tokens, Memory(model, batch, capacity=length), at)
        hits.append(logits.argmax(-1).cpu() == answers[at.cpu()])                  # .cpu() waits for the GPU
        seconds += time.perf_counter() - start
    hits = torch.cat(hits).view(-1, task.n_value)[:questions].double()
    return dict(length=length, questions=len(hits), needles=task.n_needle,
                token_accuracy=100 * hits.mean().item(), exact_match=100 * hits.all(1).double().mean().item(),
                seconds=seconds, tokens_per_second=-(-contexts // batch) * batch * length / seconds,
                **peak_memory(device))


def warm_up(model, tokens):
    """Compile what reading these tokens takes: whole segments, and the last one."""
    size = model.segment(len(tokens))
    model.read(tokens[:, :min(2, tokens.shape[1] // size) * size + tokens.shape[1] % size],
               Memory(model, len(tokens)), "last")
    synchronize(tokens.device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def default_questions(length, n_needle, device):
    """As many as 240 where contexts are short, as few as 32 where they are long: seconds, not hours."""
    affordable = 2 ** (26 if device.type == "cuda" else 19) // length * n_needle
    return max(32, min(240, affordable))


def lengths_from(training_length):
    """Context lengths from the training length to 1024 times it."""
    return [training_length * 4 ** i for i in range(6)]


def peak_memory(device):
    gpu = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else 0.0
    return dict(peak_gpu_gib=gpu, peak_cpu_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)


def niah(model, corpus, task, lengths, questions, seed, device):
    """Needle accuracy by context length, on validation text: prints the table and returns its rows."""
    model.eval()
    rows = [niah_length(model, corpus.val, task, length, questions, seed, device)
            for length in tqdm(lengths, leave=False)]
    print_table(rows)
    return rows


# ---------------------------------------------------------------- perplexity by context length

SCORED = 256                # tokens scored at each place


def documents(text, separator):
    """Starts and lengths of the documents in a text."""
    ends = np.append(np.flatnonzero(text == separator), len(text))
    starts = np.append(0, ends[:-1] + 1)
    return starts, ends - starts


def places(starts, sizes, longest, n_place, rng):
    """Places (n_place,) that have `longest` tokens of their own document before them, and SCORED after."""
    room = sizes - longest - SCORED + 1                         # places in each document
    if room.max() < 1:
        raise ValueError(f"--lengths must be at most {max(0, sizes.max() - SCORED)}: no document has "
                         f"{longest} tokens of context and the {SCORED} that are scored")
    room = room.clip(min=0)
    drawn = np.sort(rng.integers(room.sum(), size=n_place))
    document = np.searchsorted(room.cumsum(), drawn, side="right")
    return starts[document] + longest + drawn - (room.cumsum() - room)[document]


@torch.no_grad()
def scored_loss(model, text, where, length, device):
    """Summed cross-entropy of the SCORED tokens at each place, after `length` tokens of context."""
    batch, total = max(1, min(16, model.segment(1) // length)), 0.0
    for some in np.split(where, range(batch, len(where), batch)):
        x = np.stack([text[i - length:i + SCORED] for i in some]).astype(np.int64)
        x = torch.from_numpy(x).to(device)
        at = torch.zeros_like(x[:, 1:], dtype=torch.bool)
        at[:, -SCORED:] = True
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model.read(x[:, :-1], Memory(model, len(x), capacity=length + SCORED), at)
        total += F.cross_entropy(logits.float(), x[:, -SCORED:].flatten(), reduction="sum").item()
    return total


def perplexity(models, corpus, lengths, n_place, seed, device, split=None):
    """Perplexity by context length: the same tokens are scored after `length` tokens of context each time.

    models {name: DRT}; split "val" or "test", default: test where there is one. Prints the table and returns
    its rows.
    """
    text = corpus.val if split == "val" or corpus.test is None else corpus.test
    n_place = n_place or (64 if device.type == "cuda" else 8)
    tokenizer = load_tokenizer(corpus.tokenizer)
    rng = np.random.default_rng([EVALUATION, seed])
    starts, sizes = documents(text, tokenizer.separator)
    lengths = lengths or [2 ** i for i in range(10, 17) if 2 ** i + SCORED <= sizes.max()] or [1]
    where = places(starts, sizes, max(lengths), n_place, rng)
    n_byte = sum(len(tokenizer.decode_bytes(text[i:i + SCORED].tolist())) for i in where)
    rows = []
    for name, model in models.items():
        model.eval()
        for length in tqdm(lengths, name, leave=False):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            total = scored_loss(model, text, where, length, device)
            seconds = time.perf_counter() - start
            loss = total / (len(where) * SCORED)
            rows.append(dict(model=name, length=length, scored=len(where) * SCORED, loss=loss,
                             perplexity=math.exp(min(loss, 700)), bits_per_byte=total / math.log(2) / n_byte,
                             tokens_per_second=len(where) * (length + SCORED) / seconds,
                             **peak_memory(device)))
    print_table(rows)
    return rows


# ---------------------------------------------------------------- speed and memory

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


def time_drt(model, tokens, n_new, offload):
    """Seconds to read the tokens; milliseconds for each of n_new generated ones; bytes of the memory."""
    device, text = tokens.device, model.config.chunk_size - 1
    warm_up(model, tokens)
    memory = Memory(model, offload=offload, capacity=tokens.shape[1] + n_new + 4 * text)
    start = time.perf_counter()
    model.read(tokens, memory, "last")
    synchronize(device)
    seconds = time.perf_counter() - start
    new = model.generate(tokens[:, :1], n_new + 2 * text, memory=memory)
    for _ in range(2 * text):                                   # two chunks, to compile and record the graph
        next(new)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_new):
        next(new)
    synchronize(device)
    hit_rate = 100 * memory.cache.hit_rate if memory.cache else 0.0
    return seconds, 1000 * (time.perf_counter() - start) / n_new, memory.nbytes, hit_rate


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


FULL_ATTENTION_LIMIT = 2 ** 18              # its reading time grows with the square of the length


@torch.no_grad()
def speed(model, lengths, n_new, offload, compare, seed, device):
    """One row a context length and model, of random tokens: what tokens say makes no difference to speed."""
    models = [("DRT, offloaded" if offload else "DRT", model, time_drt)]
    if compare:
        base = replace(model.config, n_group=0, n_layer=model.config.n_layer + 2)
        dtype = model.embedding.weight.dtype
        models += [("base LM", DRT(base).to(device, dtype).eval(), time_drt),
                   ("full attention", FullAttention(base).to(device, dtype).eval(), time_full_attention)]
    rows, generator = [], torch.Generator(device).manual_seed(seed)
    least = min(*lengths, FULL_ATTENTION_LIMIT)
    for _, subject, timed in models:                            # once untimed: what is loaded on first use
        timed(subject, torch.zeros(1, least, dtype=torch.long, device=device), n_new, offload)
    for length in lengths:
        tokens = torch.randint(model.config.vocab_size, (1, length), device=device, generator=generator)
        for name, subject, timed in models:
            if timed is time_full_attention and length > FULL_ATTENTION_LIMIT:
                continue
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds, ms, size, hit_rate = timed(subject, tokens, n_new, offload)
            rows.append(dict(
                model=name, parameters=sum(p.numel() for p in subject.parameters()), length=length,
                read_seconds=seconds, read_tokens_per_second=length / seconds, ms_per_new_token=ms,
                memory_gpu_gib=size["gpu"] / 2 ** 30, memory_cpu_gib=size["cpu"] / 2 ** 30,
                cache_hits_percent=hit_rate, **peak_memory(device)))
    print_table(rows)
    return rows


# ---------------------------------------------------------------- samples

def continue_text(model, text, tokenizer, n_new, how, offload, device):
    """Write a continuation of the text to the terminal, token by token, as it comes."""
    tokenizer = load_tokenizer(tokenizer)
    tokens = torch.from_numpy(np.array(tokenizer.encode(text), np.int64)).to(device)
    decoder, pad = codecs.getincrementaldecoder("utf-8")("backslashreplace"), int(tokenizer.encode("\n")[0])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for token in model.generate(tokens[None], n_new, *how, pad=pad, offload=offload):
            print(decoder.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))


# ---------------------------------------------------------------- pictures

def plot(reports, path):
    """What --json wrote, by context length: a curve for each file of niah, for each model of the others."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("plot needs matplotlib: pip install matplotlib") from error
    tables = {report.stem: json.loads(report.read_text())["rows"] for report in reports}
    if "token_accuracy" in next(iter(tables.values()))[0]:
        panels, curves = dict(token_accuracy="answer tokens right, %"), tables
    else:
        panels, curves = dict(read_tokens_per_second="tokens read per second", peak_gpu_gib="GPU memory, GiB",
                              ms_per_new_token="ms per new token"), {}
        if "perplexity" in next(iter(tables.values()))[0]:
            panels = dict(perplexity="perplexity")
        for row in (row for rows in tables.values() for row in rows):
            curves.setdefault(row["model"], []).append(row)
    figure, axes = plt.subplots(1, len(panels), figsize=(8, 3.6) if len(panels) == 1 else (11, 3.4),
                                layout="constrained", squeeze=False)
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        for name, rows in curves.items():
            axis.plot([row["length"] for row in rows], [row[key] for row in rows], "o-", label=name)
        axis.set(xscale="log", xlabel="tokens of context", ylabel=label)
        if key == "token_accuracy":
            axis.set(ylim=(-3, 103))
        elif key != "perplexity":
            axis.set(yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- command line

def make_parser():
    parser = Parser(description="Measure a trained DRT.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    niah = commands.add_parser("niah", description="Needle accuracy by context length, on unseen text.")
    niah.add_argument("--lengths", type=lengths, default=None, help="tokens of context, separated by commas; "
                      "default: the training length times 1, 4, 16, .. 1024")
    niah.add_argument("--questions", type=int, default=None, help="questions at each length; default: "
                      "240, and fewer, at least 32, in long contexts")
    ppl = commands.add_parser("ppl", description="Perplexity of unseen text by context length: "
                              "the same tokens, after more or less context.")
    ppl.add_argument("--ckpt", type=Path, nargs="+", default=[Path("out/ckpt.pt")],
                     help="checkpoints, side by side; default: out/ckpt.pt")
    ppl.add_argument("--lengths", type=lengths, default=None, help="tokens of context, separated by commas; "
                     "default: 1024, 2048, .. 65536")
    ppl.add_argument("--places", type=int, default=None,
                     help=f"at each, {SCORED} tokens are scored; default: 64 on a GPU, 8 on a CPU")
    ppl.add_argument("--data", default=None, help="a corpus of the same tokenizer; default: training's")
    ppl.add_argument("--split", choices=["val", "test"], default=None, help="default: test, if there is one")
    ppl.add_argument("--retriever", choices=RETRIEVERS, default=None,
                     help="read other chunks than in training; default: the checkpoint's")
    speed = commands.add_parser("speed", description="Time and memory of reading and of generating, by "
                                "context length, on random tokens; without --ckpt with random weights.")
    speed.add_argument("--lengths", type=lengths, default=[2 ** i for i in (12, 14, 16, 18, 20)],
                       help="tokens of context, separated by commas (4096 to 1048576)")
    speed.add_argument("--tokens", type=int, default=512, help="tokens to generate (%(default)s)")
    speed.add_argument("--compare", action="store_true", help="also a base LM and a full-attention model, "
                       "with two layers more")
    speed.add_fields(fields(DRTConfig))
    sample = commands.add_parser("sample", description="Continue a text.")
    text = sample.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text")
    text.add_argument("--file", type=Path, help="a file that holds it, of any length")
    sample.add_argument("--tokens", type=int, default=200, help="how many to add (%(default)s)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (%(default)s)")
    sample.add_argument("--sample_top_k", type=int, default=None, help="among the k likeliest tokens")
    sample.add_argument("--sample_top_p", type=float, default=None, help="among the likeliest that hold p")
    for command in (speed, sample):
        command.add_argument("--offload", action="store_true", help="keep chunks in CPU memory")
    for command in (niah, ppl, speed, sample):
        if command is not ppl:
            command.add_argument("--ckpt", type=Path, default=None, help="checkpoint; default: "
                                 + ("random weights" if command is speed else "out/ckpt.pt"))
        command.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
        command.add_argument("--device", default="auto", help="cpu or cuda; default: cuda if there is a GPU")
        if command is not sample:
            command.add_argument("--json", type=Path, help="write settings, hardware and rows here")
    plot = commands.add_parser("plot", description="Draw what niah or speed --json wrote (needs matplotlib).")
    plot.add_argument("reports", type=Path, nargs="+", help="the files: a curve for each, or for each model")
    plot.add_argument("--out", type=Path, default=Path("niah.png"), help="the picture (%(default)s)")
    return parser


def lengths(text):
    values = [int(x.replace("_", "")) for x in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def check(args):
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}")
    for name in ("questions", "tokens", "places"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if getattr(args, "json", None) and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json: no folder {args.json.parent} to write {args.json.name} to")


def main(argv):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "plot":
            return plot(args.reports, args.out)
        check(args)
        device = pick_device(args.device)
        torch.manual_seed(args.seed)
        settings, rows = dict(niah=run_niah, ppl=run_ppl, speed=run_speed,
                              sample=run_sample)[args.command](args, device)
    except (ValueError, KeyError, OSError) as error:
        parser.error(error)
    if rows and args.json:
        save_json(args.json, settings, device, rows)


def run_niah(args, device):
    model, saved = load_checkpoint(args.ckpt or Path("out/ckpt.pt"), device)
    settings = saved["settings"]
    if settings["task"] != "niah":
        raise ValueError(f"--ckpt must be of a run with --task niah, got --task {settings['task']}")
    n_needle = 1 if settings["needle"] == "single" else settings["n_needle"]
    task = NeedleTask(settings["chunk_size"], n_needle, settings["n_value"], settings["straddle"])
    args.lengths = args.lengths or lengths_from(settings["seq_len"])
    for length in args.lengths:
        task.fit(length)
    corpus = load_corpus(settings["data"])
    return settings, niah(model, corpus, task, args.lengths, args.questions, args.seed, device)


def run_ppl(args, device):
    models, settings, corpus = {}, {}, None
    for path in args.ckpt:
        model, saved = load_checkpoint(path, device)
        corpus = corpus or load_corpus(args.data or saved["settings"]["data"])
        if (corpus.tokenizer, corpus.vocab_size) != (saved["tokenizer"], model.config.vocab_size):
            raise ValueError(f"--data must have {path}'s tokenizer {saved['tokenizer']} and vocabulary "
                             f"{model.config.vocab_size}, got {corpus.tokenizer} and {corpus.vocab_size}")
        name = path.absolute().parent.name
        model.config.retriever = args.retriever or model.config.retriever
        models[name], settings[name] = model, saved["settings"] | dict(retriever=model.config.retriever)
    if args.split == "test" and corpus.test is None:
        raise ValueError("--split must be val: the corpus has no test split")
    return settings, perplexity(models, corpus, args.lengths, args.places, args.seed, device, args.split)


def run_speed(args, device):
    given = {f.name: getattr(args, f.name) for f in fields(DRTConfig) if getattr(args, f.name) is not None}
    if args.ckpt and given:
        raise ValueError(f"--{next(iter(given))} must be left out with --ckpt, which says it")
    if args.ckpt:
        model, weights = load_checkpoint(args.ckpt, device)[0], f"weights of {args.ckpt}"
    else:
        model, weights = DRT(DRTConfig(**given)).to(device), "random weights"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"{hardware(device)}; {weights}, {str(dtype)[6:]}; batch 1")
    model = model.to(dtype).eval()
    rows = speed(model, args.lengths, args.tokens, args.offload, args.compare, args.seed, device)
    return dict(vars(model.config), weights=weights), rows


def run_sample(args, device):
    model, saved = load_checkpoint(args.ckpt or Path("out/ckpt.pt"), device)
    text = args.file.read_text() if args.file else args.prompt
    if not text:
        raise ValueError(f"{'--file' if args.file else '--prompt'} must hold some text, got none")
    how = args.temperature, args.sample_top_k, args.sample_top_p
    continue_text(model.eval(), text, saved["tokenizer"], args.tokens, how, args.offload, device)
    return saved["settings"], None


if __name__ == "__main__":
    main(sys.argv[1:])
