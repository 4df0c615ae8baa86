"""Measure a trained DRT.

    python eval.py niah --ckpt out/ckpt.pt --lengths 128,131072     needle accuracy by context length
    python eval.py plot drt.json base.json --out niah.png           .. as a picture, from niah's --json
"""
import json
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import EVALUATION, NeedleTask, Parser, load_corpus, needle_batch
from model import Memory, load_checkpoint


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
    with torch.autocast("cuda", torch.bfloat16):
        model.read(tokens[:, :min(2, tokens.shape[1] // size) * size + tokens.shape[1] % size],
                   Memory(model, len(tokens)), "last")
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


def plot(reports, path):
    """Token accuracy by context length, a curve for each file that niah --json wrote."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("plot needs matplotlib: pip install matplotlib") from error
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for report in reports:
        rows = json.loads(report.read_text())["rows"]
        x, y = [row["length"] for row in rows], [row["token_accuracy"] for row in rows]
        axes.plot(x, y, "o-", label=report.stem)
    axes.set(xscale="log", ylim=(-3, 103), xlabel="tokens of context", ylabel="answer tokens right, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- command line

def make_parser():
    parser = Parser(description="Measure a trained DRT.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    niah = commands.add_parser("niah", description="Needle accuracy by context length, on unseen text.")
    niah.add_argument("--ckpt", type=Path, default=Path("out/ckpt.pt"), help="checkpoint (%(default)s)")
    niah.add_argument("--lengths", type=lengths, default=None, help="tokens of context, separated by commas; "
                      "default: the training length times 1, 4, 16, .. 1024")
    niah.add_argument("--questions", type=int, default=None, help="questions at each length; default: "
                      "240, and fewer, at least 32, in long contexts")
    niah.add_argument("--seed", type=int, default=0, help="of needles, places and text (%(default)s)")
    niah.add_argument("--device", default="auto", help="cpu or cuda; default: cuda where there is a GPU")
    niah.add_argument("--json", type=Path, default=None, help="write settings, hardware and rows here")
    plot = commands.add_parser("plot", description="Draw the results of `niah --json` (needs matplotlib).")
    plot.add_argument("reports", type=Path, nargs="+", help="files that niah --json wrote: a curve for each")
    plot.add_argument("--out", type=Path, default=Path("niah.png"), help="the picture (%(default)s)")
    return parser


def lengths(text):
    return [int(x.replace("_", "")) for x in text.split(",")]


def main(argv):
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command == "plot":
        try:
            return plot(args.reports, args.out)
        except (ValueError, KeyError, OSError) as error:
            parser.error(error)
    try:
        device = pick_device(args.device)
        model, saved = load_checkpoint(args.ckpt, device)
        settings = saved["settings"]
        n_needle = 1 if settings["needle"] == "single" else settings["n_needle"]
        task = NeedleTask(settings["chunk_size"], n_needle, settings["n_value"], settings["straddle"])
        args.lengths = args.lengths or lengths_from(settings["seq_len"])
        if args.seed < 0:
            raise ValueError(f"--seed must not be negative, got {args.seed}")
        if args.questions is not None and args.questions < 1:
            raise ValueError(f"--questions must be at least 1, got {args.questions}")
        if args.json and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json: no folder {args.json.parent} to write {args.json.name} to")
        for length in args.lengths:
            task.fit(length)
        corpus = load_corpus(settings["data"])
    except (ValueError, OSError) as error:
        parser.error(error)
    rows = niah(model, corpus, task, args.lengths, args.questions, args.seed, device)
    if args.json:
        save_json(args.json, settings, device, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
