"""Measure a trained DRT: one command, a table, and with --json a report.

    python eval.py niah --ckpt out/ckpt.pt --lengths 128,131072     needle accuracy by context length
    python eval.py ppl --ckpt drt/ckpt.pt base/ckpt.pt              perplexity by length, --by document
    python eval.py summarize --ckpt drt/ckpt.pt base/ckpt.pt        summaries of documents, and their ROUGE
    python eval.py sample --prompt 'import os' --tokens 200         continue a text
    python eval.py inspect --file gca.py --html page.html           what is retrieved (tools/trace.py)
    python eval.py speed --lengths 16384,1048576                    reading and generating (fast/speed.py)
    python eval.py plot drt.json base.json --out niah.png           pictures of --json, or of runs' log.csv

The tables are the tasks' (tasks/). Each command has its flags directly above what it runs.
"""
import codecs
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))          # also with PYTHONSAFEPATH

import fast
from fast import speed
from gca import Mistake, require
from model import RETRIEVERS, DRTConfig
from tasks import PAPER_NAMES
from tasks.needles import KINDS, NeedleConfig, Needles
from tasks.summaries import Summaries, SummaryConfig, rouge_scorer
from tasks.text import Text, load_corpus, load_tokenizer
from tools import cli, exits, plot, report, trace
from tools.checkpoint import RUN_PARTS, check_corpus, load_checkpoint
from tools.reader import Reader


def measure(task, models, read, lengths=None, n=None, seed=0, **options):
    """The task's table of each model {name: DRT}, printed and returned, with time and memory of each row.

    n: questions or places at each length, or documents; default: the task's.
    """
    rows = []
    exits.say("\n".join(sorted({read.prepare(model) for model in models.values()})))
    try:
        with cli.autocast(read.device, read.dtype):                         # also what a task computes itself
            for name, model in models.items():
                read.reset()
                table, numbers = task.measure(model, read, lengths, n, seed, **options), read.numbers()
                for row in tqdm(table, name, leave=False, unit="row", disable=None):    # only on a terminal
                    numbers = read.numbers() if read.tokens else numbers        # rows read together share
                    rows.append(dict(model=name) | row | numbers)
                    if not sys.stderr.isatty():                             # no bar: a line in the log
                        first = exits.visible(str(next(iter(row.values()))))
                        exits.say(f"{name}: {first} measured, {read.seconds:.0f} s", sys.stderr)
                    read.reset()
    finally:                                            # also if memory or patience did not last to the end
        if rows:
            report.print_table(rows)
    return rows


def load_all(args, device):
    """{name: (path, DRT, settings)} of the checkpoints in --ckpt, and the corpus to measure them on."""
    names, loaded, corpus = plot.run_names(args.ckpt), {}, None
    for path in args.ckpt:
        model, saved = load_checkpoint(path, device, RUN_PARTS)
        corpus = corpus or load_corpus(args.data or saved["settings"]["data"])
        check_corpus(corpus, saved, path, args.data)
        loaded[names[path]] = path, model, saved["settings"]
    return loaded, corpus


# ---------------------------------------------------------------- needles

def niah_flags(parser):
    parser.add_argument("--lengths", type=cli.numbers, metavar="N,N,..", help="tokens of context; default: "
                        "the training length times 1, 4, 16, .. 1024")
    parser.add_argument("--questions", type=int, help="questions at each length; default: "
                        "240, and fewer, at least 32, in long contexts")
    parser.add_argument("--needle", choices=KINDS, help="another kind than in training")
    parser.add_argument("--n_needle", type=cli.numbers, metavar="N,N,..",
                        help="needles in a context (or pairs), a table for each; default: training's")
    parser.add_argument("--anywhere", type=cli.boolean, metavar="{true,false}",
                        help="needles across chunk borders, too; default: as in training")
    parser.add_argument("--generate", action="store_true",
                        help="also write the answers, each token from those that the model wrote itself")
    parser.add_argument("--retriever", choices=RETRIEVERS, help="read other chunks than in training")
    parser.add_argument("--data", help="the haystack: stdlib, packages (more text), or a folder; default: "
                        "training's")
    cli.add_shared(parser, "ckpt fast dtype json seed device")


def run_niah(args, device):
    model, saved = load_checkpoint(args.ckpt, device, RUN_PARTS)
    model.config.retriever = args.retriever or model.config.retriever
    given = dict(needle=args.needle, anywhere=args.anywhere, data=args.data,
                 n_needle=args.n_needle and max(args.n_needle))
    settings = vars(NeedleConfig()) | saved["settings"] | vars(model.config)
    settings |= {name: value for name, value in given.items() if value is not None}
    name = settings.get("task")
    require(PAPER_NAMES.get(name, name) == "needles",
            f"--ckpt must be of a run with --task needles, got --task {name}")
    cli.check_types(settings, [NeedleConfig, DRTConfig], args.ckpt)
    require(model.config.n_group or not args.retriever,
            f"--retriever: {args.ckpt} must be of a DRT: a base LM retrieves nothing")
    require(not args.n_needle or settings["needle"] != "single",
            "--n_needle must be left out with --needle single: its contexts have one needle")
    corpus = load_corpus(settings["data"])
    check_corpus(corpus, saved, args.ckpt, args.data)
    try:
        task = Needles(settings, corpus)
    except Mistake as error:
        raise Mistake(f"--needle {settings['needle']} must fit the model of {args.ckpt}: {error}") from error
    for length in args.lengths or [settings["seq_len"]]:
        task.check(length, "--lengths")
        room = task.haystack.questions_in(length, 10 ** 9)
        most = max(args.n_needle or [0])
        require(most <= room, f"--n_needle must be at most {room} in {length} tokens (and with as many "
                f"questions), got {most}")
    read = Reader(device, cli.pick_dtype(args.dtype, device), args.fast)
    name = plot.run_names([args.ckpt])[args.ckpt] + f", {args.retriever}" * bool(args.retriever)
    rows = measure(task, {name: model}, read, args.lengths, args.questions, args.seed,
                   n_needles=args.n_needle, write=args.generate)
    return settings | task.measured_on(), rows


# ---------------------------------------------------------------- perplexity

def ppl_flags(parser):
    parser.add_argument("--by", choices=["length", "document", "copy"], default="length",
                        help="a row for each length of the context; for each document, with the ratio to "
                        "the first model's perplexity, 95%% of bootstraps (low, high), and in how many it is "
                        "lower; or for tokens by how far back the 4-gram that ends in them was last seen: in "
                        "the window, in twice the window, beyond (%(default)s)")
    parser.add_argument("--lengths", type=cli.numbers, metavar="N,N,..", help="tokens of context; default: "
                        "64, 256, .. as half of the documents have; by document and copy the training length")
    parser.add_argument("--places", type=int, help="places where tokens are scored: 64 on a GPU, 8 on a CPU; "
                        "by document and copy, windows of each document: 16 and 2")
    parser.add_argument("--retriever", nargs="+", choices=[*RETRIEVERS, "oracle"],
                        help="read other chunks than in training, or each of several kinds; oracle: those "
                        "that the coming chunk copies from; default: the checkpoint's")
    cli.add_shared(parser, "ckpts data split fast dtype json seed device")


def run_ppl(args, device):
    models, settings, (loaded, corpus) = {}, {}, load_all(args, device)
    for run, (path, model, trained) in loaded.items():
        is_drt = model.config.n_group > 0
        require(is_drt or not args.retriever or len(args.ckpt) > 1,
                f"--retriever: {path} must be of a DRT: a base LM retrieves nothing")
        for retriever in args.retriever if args.retriever and is_drt else [model.config.retriever]:
            name = run + f", {retriever}" * (is_drt and len(args.retriever or []) > 1)
            models[name] = copy.copy(model)                                 # the same weights
            models[name].config = copy.copy(model.config)
            models[name].config.retriever = retriever
            settings[name] = trained | dict(retriever=retriever)
    require(args.split != "test" or corpus.test is not None,
            "--split must be val: the corpus has no test split")
    window = min(model.config.window for model in models.values())
    task, options = Text(next(iter(settings.values())), corpus), dict(split=args.split)
    if args.by != "length":
        options |= dict(by=args.by, first={}) | (dict(window=window) if args.by == "copy" else {})
    _, lengths, _ = task.plan(args.by, args.lengths, args.places, args.seed, args.split)    # is there text?
    require(args.by != "copy" or lengths[0] > 2 * window,
            f"--lengths must be more than two windows of {window} with --by copy, got {lengths[0]}")
    read = Reader(device, cli.pick_dtype(args.dtype, device), args.fast)
    rows = measure(task, models, read, args.lengths, args.places, args.seed, **options)
    measured = task.measured_on(args.split)
    if measured["left_out"]:
        left_out = ", ".join(measured["left_out"][:8]) + ", .." * (len(measured["left_out"]) > 8)
        exits.say(f"{len(measured['documents'])} documents measured; left out: {exits.visible(left_out)}")
    return {name: settings[name] | measured for name in models}, rows


# ---------------------------------------------------------------- summaries

def summarize_flags(parser):
    parser.add_argument("--documents", type=int, help="of each kind; default: 400 on a GPU, 20 on a CPU")
    cli.add_shared(parser, "ckpts data split dtype json seed device")


def run_summarize(args, device):
    """ROUGE of generated summaries, and a few of them beside the true ones."""
    require(rouge_scorer(), "summaries are scored by the package rouge-score: pip install rouge-score")
    loaded, corpus = load_all(args, device)
    reports, examples, rows = {}, {}, []
    read = Reader(device, cli.pick_dtype(args.dtype, device))
    for name, (_, model, trained) in loaded.items():
        reports[name] = vars(SummaryConfig()) | trained
        task = Summaries(reports[name], corpus)
        rows += measure(task, {name: model}, read, None, args.documents, args.seed, split=args.split)
        reports[name] |= task.measured_on(args.split)
        examples[name] = task.examples
    for i, (kind, lead, references, _) in enumerate(next(iter(examples.values()))):
        exits.say(f"\n{kind}  {exits.visible(lead)[:100]}\n  true: {exits.visible(references[0])[:300]}")
        for name in examples:
            exits.say(f"  {name}: {exits.visible(examples[name][i][-1])[:300]}")
    return reports, rows


# ---------------------------------------------------------------- a text

def sample_flags(parser):
    cli.add_text(parser)
    parser.add_argument("--tokens", type=int, default=200, help="how many to add (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (%(default)s)")
    parser.add_argument("--sample_top_k", type=int, help="among the k likeliest tokens")
    parser.add_argument("--sample_top_p", type=float, help="among the likeliest that hold p")
    cli.add_shared(parser, "ckpt offload dtype seed device")


def run_sample(args, device):
    """Write a continuation of the text to the terminal, token by token, as it comes."""
    model, saved = load_checkpoint(args.ckpt, device, RUN_PARTS)
    text = cli.given_text(args)
    tokenizer = load_tokenizer(saved["tokenizer"])
    tokens = torch.from_numpy(np.array(tokenizer.encode(text), np.int64))[None].to(device)
    sampling = args.temperature, args.sample_top_k, args.sample_top_p
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    with cli.autocast(device, cli.pick_dtype(args.dtype, device)):
        fast.check(fast.apply(model))
        for token in fast.generate(model, tokens, args.tokens, *sampling, offload=args.offload):
            print(decoder.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return saved["settings"], None


# ---------------------------------------------------------------- command line

COMMANDS = dict(                    # its flags; what it runs: args, device -> settings, rows; in words
    niah=(niah_flags, run_niah, "Needle accuracy by context length, on unseen text."),
    ppl=(ppl_flags, run_ppl, "Perplexity of unseen text: by length of the context, by document, or by "
                             "distance of the copy."),
    summarize=(summarize_flags, run_summarize, "ROUGE of summaries that it writes for unseen documents "
                                               "(needs rouge-score), and a few examples."),
    sample=(sample_flags, run_sample, "Continue a text."),
    inspect=(trace.flags, trace.run, "What is retrieved for a chunk of a text."),
    speed=(speed.flags, speed.run, "Time and memory of reading and of generating, by context length, on "
                                   "random tokens; without --ckpt with random weights."),
    plot=(plot.flags, plot.run, "Draw what --json wrote, or log.csv (needs matplotlib)."))


@exits.program
def main(argv=None):
    parser = cli.Parser(description="Measure a trained DRT.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    for name, (add_flags, _, words) in COMMANDS.items():
        add_flags(cli.add_command(commands, name, words))
    args = parser.parse_args(argv)
    cli.check_arguments(args)
    device = cli.pick_device(getattr(args, "device", "cpu"))
    torch.manual_seed(getattr(args, "seed", 0))
    settings, rows = COMMANDS[args.command][1](args, device)
    if rows and args.json:
        report.save_report(args.json, settings, device, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
