"""From the command line to a run: flags, presets, and what is refused before the first step.

    config, model, task, run, saved = setup(TrainConfig, PRESETS, argv)

Of a new run, a flag overrides the model of --init_from, that the preset, and that a dataclass's default. A
run that goes on has its own settings; a flag overrides only those that MAY_CHANGE.
"""
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn as nn

import fast
from fast.files import saved_config
from gca import require
from model import DRT, RETRIEVERS, DRTConfig
from tasks import PAPER_NAMES, TASKS, task_class
from tasks.needles import KINDS, NeedleConfig
from tasks.summaries import SummaryConfig
from tasks.text import load_corpus, load_tokenizer
from tools import cli, exits
from tools.checkpoint import RUN_PARTS, check_first, check_space, load_checkpoint, load_run, shapes
from tools.run import Ranks, Run, flops_per_token, lock, prepare_folder

CHOICES = dict(task=[*TASKS, *PAPER_NAMES], needle=KINDS, retriever=RETRIEVERS, dtype=["auto", *cli.DTYPES])
RUN_FLAGS = "seed fast compile dtype validate_every checkpoint_every".split()
TASK_FLAGS = "task data".split()
MAY_CHANGE = "steps checkpoint_every micro_batch fast data".split()     # when a run resumes
LARGE = 10 ** 9
RANGES = dict(                          # name: (least, most); 1e-30 stands for "above 0"
    batch_size=(1, 10 ** 6), batch_tokens=(1, LARGE), steps=(1, LARGE), warmup=(1, LARGE), seq_len=(1, LARGE),
    validate_every=(1, LARGE), checkpoint_every=(1, LARGE), lr=(1e-30, 100), grow_at=(1e-30, 1),
    seed=(0, 2 ** 63 - 1), start_len=(0, LARGE), micro_batch=(0, 10 ** 6), final_lr=(0, 1),
    weight_decay=(0, 100), query_gain=(1e-30, 1000), encoder_lr=(0, 1), lm_weight=(0, 1000))


def setup(TrainConfig, presets, argv):
    """The settings of a run, its model, task and folder, and what it resumes from (or None).

    ValueError for whatever is at odds, before anything is written.
    """
    args = make_parser(TrainConfig, presets, argv).parse_args(argv)
    device = cli.pick_device(args.device)
    ranks = Ranks(device)
    require(not (args.resume and args.init_from), "--init_from must be left out with --resume")
    if args.resume and ranks.rank == 0 and (args.out / ".lock").exists():
        lock(args.out).close()                      # is a run at work there?
    saved = load_run(args.out, device) if args.resume else None
    first = load_checkpoint(args.init_from, device, RUN_PARTS)[1] if args.init_from else None
    preset = presets[args.preset or default_preset(device)]
    chosen = resumed(args, TrainConfig, saved) if saved else settings(args, TrainConfig, preset, first)
    check_ranges(chosen)
    corpus = load_corpus(chosen["data"])
    is_meant = not saved or args.data or saved.get("contents", "") in ("", corpus.contents)
    require(is_meant, f"--resume: {chosen['data']} holds other text than when the run in {args.out} began; "
            "prepare it as it was, or give --data to say that this is meant")
    require(not saved or corpus.tokenizer == saved["tokenizer"],
            f"--resume: the run in {args.out} has tokens of {saved and saved['tokenizer']}, "
            f"got {corpus.tokenizer} in {chosen['data']}")

    config = pick(TrainConfig, chosen)
    model_config = pick(DRTConfig, chosen, vocab_size=corpus.vocab_size)
    task = task_class(config.task)(chosen, corpus)
    check_batches(config, task, ranks.size, on_cpu=device.type == "cpu")
    require(not saved or saved_config(saved["config"]) == model_config and saved["length"] in task.lengths(),
            f"{args.out}/ckpt.pt is damaged: its settings are not those of its model")
    check_first(first, args.init_from, model_config, corpus.tokenizer)
    n_parameter = sum(shape.numel() for shape in shapes(model_config).values())
    check_space(args.out, n_parameter, 1 if saved else 3)       # the last, the one before, and a new one

    model = make_model(config, model_config, device, saved or first)
    n_matrix = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    run = Run(args.out, ranks, config.steps, task, flops_per_token(model_config, n_matrix, config.seq_len))
    if run.first:
        run.lock = prepare_folder(args.out, args.resume)        # held until the process ends
        exits.say(what_trains(model, config) if not saved or saved["step"] < config.steps else
                  f"The run in {args.out} has done its {config.steps} steps; more --steps would train it on.")
    return config, model, task, run, saved


def make_model(config, model_config, device, checkpoint):
    """A DRT with random weights, or those of a checkpoint; with fast/'s pieces, if they are wanted.

    ValueError if an edit of the plain files has not been made in its twin in fast/.
    """
    torch.manual_seed(config.seed)
    model = DRT(model_config).to(device).train()
    if model_config.n_group:
        for norm in model.query_norms:
            nn.init.constant_(norm.weight, config.query_gain)
        if config.encoder_identity:
            model.encoder.begin_as_identity()
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    if config.fast and device.type == "cuda":
        fast.apply(model)
        with cli.autocast(device, cli.pick_dtype(config.dtype, device)):
            fast.check(model)
    if config.fast:
        fast.apply(model, config.compile)
    return model


def what_trains(model, config):
    if not model.embedding.weight.is_cuda:
        return "Trained by the plain files: fast/ speeds up training on GPUs only."
    active = fast.describe(model, config)
    return f"Trained with pieces of fast/: {active}." if active else "Trained by the plain files."


# ---------------------------------------------------------------- flags

def make_parser(TrainConfig, presets, argv=()):
    """A flag for each setting. --help shows the defaults of the preset that argv names."""
    before = cli.Parser(add_help=False)
    before.add_argument("--preset", nargs="?")
    name = before.parse_known_args(argv)[0].preset
    name = name if name in presets else default_preset(cli.pick_device("auto"))
    parser = cli.Parser(
        prog="train.py", usage="python train.py [--preset NAME] [--FLAG VALUE ..]",
        description=f"Train a DRT, then measure it. Defaults below are those of --preset {name}.")
    run, task, optimization, model = map(
        parser.add_argument_group, ("run", "data and task", "optimization", "model"))
    run.add_argument("--preset", choices=presets, help="settings of a known run; default: cpu or gpu")
    run.add_argument("--device", default="auto", help="cpu or cuda; default: cuda where there is a GPU")
    run.add_argument("--out", type=cli.folder, default=Path("out"), help="folder to write to; default: out")
    run.add_argument("--resume", action="store_true", help="continue the run in --out with its settings")
    run.add_argument("--init_from", type=cli.checkpoint, help="begin with the model of this checkpoint")
    others = [f.name for f in fields(TrainConfig) if f.name not in RUN_FLAGS + TASK_FLAGS]
    for group, config, flags in (
            (run, TrainConfig, RUN_FLAGS), (task, TrainConfig, TASK_FLAGS), (task, NeedleConfig, None),
            (task, SummaryConfig, None), (optimization, TrainConfig, others), (model, DRTConfig, None)):
        cli.add_fields(group, config, flags, CHOICES, presets[name], leave_out=["vocab_size"])
    return parser


def default_preset(device):
    return "gpu" if device.type == "cuda" else "cpu"


# ---------------------------------------------------------------- layers

def default_settings(TrainConfig):
    configs = TrainConfig, NeedleConfig, SummaryConfig, DRTConfig
    return {f.name: f.default for config in configs for f in fields(config) if f.name != "vocab_size"}


def settings(args, TrainConfig, preset, first=None):
    """All settings of a new run by name: its flags over the preset's.

    first: the checkpoint of --init_from; the model's settings are its own.
    """
    defaults, model = default_settings(TrainConfig), {}
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    if first:
        begins = dict(query_gain=1.0, encoder_identity=False)           # how new weights would begin
        for name in begins:
            require(not given.get(name), f"--{name} must be left out with --init_from")
        model = asdict(saved_config(first["config"])) | begins
        del model["vocab_size"]                                         # the corpus has that
    return defaults | preset | model | given


def resumed(args, TrainConfig, saved):
    """All settings of a run that goes on: those that it had. ValueError for a flag that would change them."""
    defaults = default_settings(TrainConfig)
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    had = defaults | dict(encoder_rope=saved_config(saved["config"]).encoder_rope) | saved["settings"]
    for name, value in given.items():
        require(name in MAY_CHANGE or PAPER_NAMES.get(value, value) == PAPER_NAMES.get(had[name], had[name]),
                f"--resume: the run in {args.out} has --{name} {had[name]}, got {value}")
    chosen = had | given
    configs = TrainConfig, NeedleConfig, SummaryConfig, DRTConfig
    cli.check_types(chosen, configs, f"{args.out}/ckpt.pt", ["vocab_size"])
    for name in ("task", "dtype"):
        require(chosen[name] in CHOICES[name],
                f"{args.out}/ckpt.pt must have a known {name}, got {chosen[name]}")
    require(chosen["steps"] >= saved["step"],
            f"--steps must be at least the {saved['step']} of the run in {args.out}, got {chosen['steps']}")
    return chosen


def pick(config_class, chosen, **others):
    """A config of this class, by the names of its fields."""
    names = [f.name for f in fields(config_class) if f.name not in others]
    return config_class(**{name: chosen[name] for name in names}, **others)


# ---------------------------------------------------------------- what is refused

def check_ranges(chosen):
    """ValueError for a number out of its range; nan and inf are in none."""
    for name, (least, most) in RANGES.items():
        if least == 0:
            require(chosen[name] >= 0, f"--{name} must not be negative, got {chosen[name]}")
        require(chosen[name] >= least, f"--{name} must be positive, got {chosen[name]}")
        require(chosen[name] <= most, f"--{name} must be at most {most}, got {chosen[name]}")


def check_batches(config, task, n_rank, on_cpu=False):
    """ValueError for batches that do not fit the task, the processes or a CPU's memory."""
    for length in task.lengths():
        n_context = max(1, min(config.batch_size, config.batch_tokens // length))
        micro_batch, n_text = config.micro_batch or 1, task.settings["chunk_size"] - 1
        require(n_rank == 1 or length >= n_text, "--seq_len and --start_len must be at least a chunk, "
                f"{n_text}, with several processes, got {length}")
        why = ", all that --batch_tokens allows" if n_context < config.batch_size else ""
        require(n_context % (n_rank * micro_batch) == 0,
                f"--batch_size must be a multiple of {n_rank} processes times --micro_batch {micro_batch}, "
                f"got {n_context} at {length} tokens{why}")
        task.check(length)
        if on_cpu:
            check_memory(config.micro_batch or n_context, length, task.corpus.vocab_size)
    load_tokenizer(task.corpus.tokenizer)


def check_memory(n_context, length, vocab_size):
    """ValueError where memory cannot hold the logits of so many contexts: the system would kill the run."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    needed = 3 * 4 * n_context * length * vocab_size / 2 ** 30          # they, their softmax and gradient
    require(needed < room, "--batch_tokens must be lower, or --micro_batch 1 be given: on a CPU, the logits "
            f"of {n_context} contexts of {length} tokens take {needed:,.0f} GiB, and there are {room:,.0f}")
