"""Measure a trained DRT: one command, a table, and with --json a report.

    python eval.py niah --ckpt out/ckpt.pt --lengths 128,131072     needle accuracy by context length
    python eval.py niah --lengths 512,8192 --depths 10              the same by length and depth of the needle
    python eval.py ppl --ckpt drt/ckpt.pt base/ckpt.pt              perplexity by context length
    python eval.py speed --lengths 16384,1048576                    reading and generating, by context length
    python eval.py summarize --ckpt drt/ckpt.pt base/ckpt.pt        summaries of documents, and their ROUGE
    python eval.py sample --prompt 'import os' --tokens 200         continue a text
    python eval.py inspect --file gca.py --html page.html           what is retrieved, as a page
    python eval.py plot drt.json base.json --out niah.png           pictures of what --json wrote
"""
import codecs
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fast
from fast.speed import speed
from gca import require
from model import DRT, RETRIEVERS, DRTConfig
from tasks.needles import KINDS, NeedleConfig, Needles
from tasks.summaries import Summaries, SummaryConfig, rouge_scorer
from tasks.text import N_SCORED, Text, load_corpus, load_tokenizer
from tools import cli
from tools.checkpoint import RUN_PARTS, load_checkpoint
from tools.inspect import inspect, visible
from tools.plot import plot, run_names
from tools.reader import Reader, peak_memory

TASKS = {"needles": Needles, "text": Text, "summaries": Summaries}
TASKS |= {"niah": Needles, "lm": Text}                                      # the paper's names


# ---------------------------------------------------------------- measuring

def measure(task, models, read, lengths=None, n=None, seed=0, **options):
    """The task's table of each model {name: DRT}, printed and returned, with time and memory of each row.

    n: questions or places at each length; default: the task's.
    """
    rows, words = [], {read.pieces(model): None for model in models.values()}
    print("fast:", "; ".join(words), flush=True)
    try:
        for name, model in models.items():
            read.reset()
            table = task.measure(model, read, lengths, n, seed, **options)
            for row in tqdm(table, name, leave=False, unit="row", disable=None):       # only on a terminal
                rows.append(dict(model=name) | row | read.numbers())
                if not sys.stderr.isatty():                                 # no bar: a line in the log
                    first = next(iter(row.values()))
                    print(f"{name}: {first} measured, {read.seconds:.0f} s", file=sys.stderr)
                read.reset()
    finally:                                            # also if memory or patience did not last to the end
        if rows:
            cli.print_table(rows)
    return rows


# ---------------------------------------------------------------- the commands

def run_niah(args, device):
    model, saved = load_checkpoint(args.ckpt, device, RUN_PARTS)
    given = dict(needle=args.needle, n_needle=args.n_needle, data=args.data)
    settings = vars(NeedleConfig()) | saved["settings"] | vars(model.config)
    settings |= {name: value for name, value in given.items() if value is not None}
    require(TASKS.get(settings.get("task")) is Needles,
            f"--ckpt must be of a run with --task needles, got --task {settings.get('task')}")
    cli.check_types(settings, [NeedleConfig, DRTConfig], args.ckpt)
    corpus = load_corpus(settings["data"])
    check_tokenizer(corpus, saved, args.ckpt)
    task = Needles(settings, corpus)
    for length in args.lengths or [settings["seq_len"]]:
        task.check(length, "--lengths")
    reader = Reader(device, cli.pick_dtype(args.dtype, device), args.fast)
    names = run_names([args.ckpt])
    rows = measure(task, {names[args.ckpt]: model}, reader, args.lengths, args.questions, args.seed,
                   n_depth=args.depths)
    if args.depths:
        cli.print_grid(rows)
    return settings | task.measured_on(), rows


def run_ppl(args, device):
    models, settings, corpus = {}, {}, None
    for path in args.ckpt:
        model, saved = load_checkpoint(path, device, RUN_PARTS)
        corpus = corpus or load_corpus(args.data or saved["settings"]["data"])
        check_tokenizer(corpus, saved, path)
        model.config.retriever = args.retriever or model.config.retriever
        models[path], settings[path] = model, saved["settings"] | dict(retriever=model.config.retriever)
    require(args.split != "test" or corpus.test is not None,
            "--split must be val: the corpus has no test split")
    names = run_names(args.ckpt)
    task = Text(saved["settings"], corpus)
    task.places_to_score(args.lengths, args.places, args.seed, args.split)
    reader = Reader(device, cli.pick_dtype(args.dtype, device), args.fast)
    rows = measure(task, {names[path]: models[path] for path in models}, reader, args.lengths, args.places,
                   args.seed, split=args.split)
    return {names[path]: settings[path] | task.measured_on(args.split) for path in models}, rows


def run_summarize(args, device):
    """ROUGE of generated summaries, and a few of them beside the true ones."""
    require(rouge_scorer(), "summaries are scored by the package rouge-score: pip install rouge-score")
    models, reports, corpus, examples = {}, {}, None, {}
    names = run_names(args.ckpt)
    for path in args.ckpt:
        model, saved = load_checkpoint(path, device, RUN_PARTS)
        corpus = corpus or load_corpus(args.data or saved["settings"]["data"])
        check_tokenizer(corpus, saved, path)
        models[names[path]] = model
        reports[names[path]] = vars(SummaryConfig()) | saved["settings"]
    reader, rows = Reader(device, cli.pick_dtype(args.dtype, device)), []
    for name, model in models.items():
        task = Summaries(reports[name], corpus)
        rows += measure(task, {name: model}, reader, None, args.documents, args.seed, split=args.split)
        reports[name] |= task.measured_on(args.split)
        examples[name] = task.examples
    for i, (kind, lead, references, _) in enumerate(next(iter(examples.values()))):
        print(f"\n{kind}  {visible(lead)[:100]}\n  true: {visible(references[0])[:300]}")
        for name in models:
            print(f"  {name}: {visible(examples[name][i][-1])[:300]}")
    return reports, rows


def check_tokenizer(corpus, saved, path):
    found, wanted = (corpus.tokenizer, corpus.vocab_size), (saved["tokenizer"], saved["config"]["vocab_size"])
    require(found == wanted, f"--data must have {path}'s tokenizer {wanted[0]} and vocabulary {wanted[1]}, "
            f"got {found[0]} and {found[1]} in {corpus.name}")


def run_speed(args, device):
    given = {f.name: getattr(args, f.name) for f in fields(DRTConfig) if getattr(args, f.name) is not None}
    if args.ckpt:
        require(not given, f"--{next(iter(given), None)} must be left out with --ckpt, which says it")
        model, weights = load_checkpoint(args.ckpt, device)[0], f"weights of {args.ckpt}"
    else:
        model, weights = DRT(DRTConfig(**given)).to(device).eval(), "random weights"
    dtype = cli.pick_dtype(args.dtype, device)
    print(f"{cli.hardware(device)}; {weights}, {str(dtype)[6:]}; batch 1")
    model, peaks = model.to(dtype), lambda: peak_memory(device)
    rows = list(speed(model, args.lengths, args.tokens, args.offload, args.compare, args.seed, peaks))
    cli.print_table(rows)
    return dict(vars(model.config), weights=weights), rows


def run_sample(args, device):
    """Write a continuation of the text to the terminal, token by token, as it comes."""
    model, saved = load_checkpoint(args.ckpt, device, RUN_PARTS)
    text = cli.given_text(args)
    tokenizer = load_tokenizer(saved["tokenizer"])
    tokens = torch.from_numpy(np.array(tokenizer.encode(text), np.int64)).to(device)
    sampling = args.temperature, args.sample_top_k, args.sample_top_p
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    with cli.autocast(device, cli.pick_dtype(args.dtype, device)):
        for token in fast.generate(model, tokens[None], args.tokens, *sampling, offload=args.offload):
            print(decoder.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return saved["settings"], None


def run_inspect(args, device):
    """Show what one chunk retrieved, and write the page of all of them."""
    text = None if args.needles is not None else cli.given_text(args)
    chosen = args.needles, args.questions, args.seed, args.chunk, args.html, args.best
    return inspect(args.ckpt, device, text, *chosen), None


# ---------------------------------------------------------------- command line

def make_parser():
    parser = cli.Parser(description="Measure a trained DRT.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    niah, ppl, write, speed = add_measurements(commands)
    sample, look = add_looks(commands)
    add_plot(commands)
    for command in (ppl, write):
        command.add_argument("--ckpt", type=Path, nargs="+", default=[Path("out/ckpt.pt")],
                             help="checkpoints, side by side; default: out/ckpt.pt")
        command.add_argument("--data", help="a corpus of the same tokenizer; default: training's")
        command.add_argument("--split", choices=["val", "test"], help="default: test, if there is one")
    for command in (niah, ppl):
        command.add_argument("--fast", type=cli.boolean, default=True,
                             help="read in segments, with faster pieces (fast/); false: by the plain files")
    for command in (speed, sample):
        command.add_argument("--offload", action="store_true", help="keep chunks in CPU memory")
    for command in (niah, sample, look):
        command.add_argument("--ckpt", type=Path, default=Path("out/ckpt.pt"), help="default: out/ckpt.pt")
    speed.add_argument("--ckpt", type=Path, help="checkpoint; default: random weights")
    for command in (niah, ppl, write, speed, sample, look):
        command.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
        command.add_argument("--device", default="auto", help="cpu or cuda; default: cuda if there is a GPU")
        if command not in (sample, look):
            command.add_argument("--json", type=Path, help="write settings, hardware and rows here")
    for command in (niah, ppl, write, speed, sample):
        command.add_argument("--dtype", default="auto", choices=["auto", *cli.DTYPES], help="to compute in "
                             "(auto: bfloat16 or float16 on a GPU, float32 on a CPU)")
    return parser


def add_measurements(commands):
    """The commands that end with a table."""
    niah = cli.add_command(commands, "niah", "Needle accuracy by context length, on unseen text.")
    niah.add_argument("--lengths", type=lengths, help="tokens of context, separated by commas; "
                      "default: the training length times 1, 4, 16, .. 1024")
    niah.add_argument("--questions", type=int, help="questions at each length; default: "
                      "240, and fewer, at least 32, in long contexts")
    niah.add_argument("--needle", choices=KINDS, help="another kind than in training")
    niah.add_argument("--n_needle", type=int,
                      help="needles in a context (multihop: chains); default: training's")
    niah.add_argument("--depths", type=int, help="one needle, at so many depths of each context")
    niah.add_argument("--data", help="the haystack: stdlib or a folder; default: training's")
    ppl = cli.add_command(commands, "ppl", "Perplexity of unseen text by context length: "
                          "the same tokens, after more or less context.")
    ppl.add_argument("--lengths", type=lengths, help="tokens of context, separated by commas; "
                     "default: 64, 256, .. 65536")
    ppl.add_argument("--places", type=int,
                     help=f"at each, {N_SCORED} tokens are scored; default: 64 on a GPU, 8 on a CPU")
    ppl.add_argument("--retriever", choices=RETRIEVERS,
                     help="read other chunks than in training; default: the checkpoint's")
    write = cli.add_command(commands, "summarize", "ROUGE of summaries that it writes for unseen "
                            "documents (needs rouge-score), and a few examples.")
    write.add_argument("--documents", type=int, help="of each kind; default: 400 on a GPU, 20 on a CPU")
    speed = cli.add_command(commands, "speed", "Time and memory of reading and of generating, by "
                            "context length, on random tokens; without --ckpt with random weights.")
    speed.add_argument("--lengths", type=lengths, default=[2 ** i for i in (12, 14, 16, 18, 20)],
                       help="tokens of context, separated by commas (4096 to 1048576)")
    speed.add_argument("--tokens", type=int, default=512, help="tokens to generate (%(default)s)")
    speed.add_argument("--compare", action="store_true", help="also a base LM and a full-attention model, "
                       "with two layers more")
    speed.add_fields(DRTConfig)
    return niah, ppl, write, speed


def add_looks(commands):
    """The commands that show a text."""
    sample = cli.add_command(commands, "sample", "Continue a text.")
    text = sample.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text")
    text.add_argument("--file", type=Path, help="a file that holds it, of any length")
    sample.add_argument("--tokens", type=int, default=200, help="how many to add (%(default)s)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (%(default)s)")
    sample.add_argument("--sample_top_k", type=int, help="among the k likeliest tokens")
    sample.add_argument("--sample_top_p", type=float, help="among the likeliest that hold p")
    look = cli.add_command(commands, "inspect", "What is retrieved for a chunk of a text.")
    text = look.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text")
    text.add_argument("--file", type=Path, help="a file that holds it")
    text.add_argument("--needles", type=int, help="a text of so many tokens with needles and questions")
    look.add_argument("--questions", type=int, default=1, help="with --needles: at least (%(default)s)")
    look.add_argument("--chunk", type=int, help="its number; default: the last, or the last question")
    look.add_argument("--best", type=int,
                      help="compare, for so many chunks, what was retrieved with what would have helped most")
    look.add_argument("--html", type=Path, help="write a page of all chunks to this file")
    return sample, look


def add_plot(commands):
    plot = cli.add_command(commands, "plot", "Draw what --json wrote (needs matplotlib).")
    plot.add_argument("reports", type=Path, nargs="+", help="the files: a curve for each, or for each model")
    plot.add_argument("--out", type=Path, default=Path("niah.png"), help="the picture (%(default)s)")


def lengths(text):
    values = [int(x.replace("_", "")) for x in text.split(",")]
    if not 1 <= min(values) <= max(values) <= 10 ** 10:
        raise ValueError
    return values


@cli.program
def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.command == "plot":
        cli.check_writable("--out", args.out)
        return plot(args.reports, args.out)
    require(0 <= args.seed < 2 ** 63, f"--seed must be in 0 .. 2 ** 63 - 1, got {args.seed}")
    for name in ("questions", "tokens", "places", "depths", "documents", "best"):
        value = getattr(args, name, None)
        require(value is None or 1 <= value <= 10 ** 6, f"--{name} must be in 1 .. 1000000, got {value}")
    read = [getattr(args, "file", None), *np.atleast_1d(getattr(args, "ckpt", None))]
    for flag in ("json", "html"):
        path = getattr(args, flag, None)
        cli.check_writable(f"--{flag}", path)
        require(not path or path.resolve() not in [file.resolve() for file in read if file],
                f"--{flag}: {path} would be overwritten")
    device = cli.pick_device(args.device)
    torch.manual_seed(args.seed)
    commands = dict(niah=run_niah, ppl=run_ppl, summarize=run_summarize, speed=run_speed, sample=run_sample,
                    inspect=run_inspect)
    run = commands[args.command]
    settings, rows = run(args, device)
    if rows and args.json:
        cli.save_report(args.json, settings, device, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
