"""Train a DRT: to find needles in real text, or as a language model on a corpus.

    python train.py                                            needles, in minutes
    python train.py --seed 1 --n_layer 4 --n_group 2 --out out/deep
    python train.py --init_from lm/ckpt.pt --data data/code    needles, with a language model's weights
    torchrun --nproc_per_node 8 train.py --preset pg19         the paper's pre-training, on several GPUs

train() below is the loop. Contexts start short. For needles they double whenever the answers are right:
retrieval is learned within minutes when there are few chunks to choose from, and carries over to many.

Writes to --out: ckpt.pt, and the one before it, ckpt.prev.pt; log.csv, one row a step; and the table it ends
with, as JSON. A run that was stopped goes on with --resume, exactly as if it had not been.
"""
import math
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist

import eval as evaluation
import fast
from gca import require
from model import DRT, RETRIEVERS, DRTConfig
from tasks.needles import KINDS, PATHS, NeedleConfig
from tasks.summaries import SummaryConfig
from tasks.text import load_corpus, load_tokenizer
from tools import cli
from tools.checkpoint import (
    RUN_PARTS,
    check_first,
    check_space,
    load_checkpoint,
    load_optimizer,
    load_run,
    shapes,
)
from tools.run import Ranks, Run, flops_per_token, prepare_folder, seed_step


@dataclass
class TrainConfig:
    task: str = "needles"           # needles: find named values; text: model language; summaries: write them
    data: str = "stdlib"            # the text: stdlib, or a folder that tools.prepare made
    start_len: int = 64             # tokens in a context at first (text: for 40% of the steps); 0: seq_len
    seq_len: int = 128              # tokens in a context (at last)
    batch_size: int = 64            # contexts in a batch, over all GPUs
    batch_tokens: int = 8192        # most tokens in a batch: of long contexts it has fewer, at the least one
    micro_batch: int = 0            # contexts that a GPU takes at once, their gradients added up; 0: all
    steps: int = 600                # updates of the weights
    lr: float = 4e-3                # peak learning rate
    final_lr: float = 0.1           # where the cosine ends, as a share of the peak
    warmup: int = 50                # steps of linear warm-up
    weight_decay: float = 0.001     # on matrices only
    encoder_identity: bool = False  # the chunk encoder begins as the identity, and learns what to add
    encoder_lr: float = 1.0         # learning rate of the chunk encoder's layers, as a share of the others'
    seed: int = 0                   # of the initial weights and of the data
    fast: bool = True               # swap pieces for faster ones (fast/); false: the plain files alone
    compile: bool = False           # torch.compile each layer: most of a minute to start, then faster
    dtype: str = "auto"             # to compute in; auto: bfloat16 or float16 on a GPU, float32 on a CPU
    validate_every: int = 25        # steps between looks at unseen text, after which the context may grow
    checkpoint_every: int = 500     # steps between checkpoints; one is always written at the end


# Settings of known runs; docs/ has their numbers. A flag overrides the preset, the preset the default.
LM = dict(task="text", n_layer=12, n_embd=768, n_head=12, chunk_size=64, window=512, top_k=8, seq_len=16380,
          start_len=0, batch_size=32, batch_tokens=2 ** 19, lr=2e-3, final_lr=0.2, compile=True,
          validate_every=250, gca_residual=False,           # 16,380 tokens are 260 chunks of 63
          encoder_identity=True, encoder_lr=0.1)            # not in the paper: docs/pretraining.md
PRESETS = {
    "cpu": dict(n_encoder=1),
    "gpu": dict(n_encoder=1, n_embd=128, n_head=8, chunk_size=64, window=64, top_k=8, n_needle=48, n_value=12,
                start_len=512, seq_len=16384, batch_size=128, batch_tokens=65536, steps=3000, lr=2e-3,
                gumbel=False),
    "multihop": dict(needle="multihop", n_layer=8, n_encoder=1, top_k=8, n_needle=2, n_value=4, start_len=80,
                     seq_len=1024, batch_size=256, batch_tokens=32768, steps=2000, lr=3e-3),
    "code": LM | dict(data="data/code", n_layer=8, n_embd=384, n_head=6, top_k=16, gca_residual=True,
                      gumbel=False, recency=True, start_len=1008, seq_len=8064, batch_size=32,
                      batch_tokens=32256, steps=4800, warmup=100, validate_every=400),
    "code-cpu": LM | dict(data="data/code-cpu", n_layer=4, n_encoder=1, n_embd=64, n_head=4, chunk_size=32,
                          window=32, top_k=4, gca_residual=True, gumbel=False, recency=True,
                          seq_len=1984, batch_size=1, batch_tokens=1984, steps=2400, lr=4e-3, warmup=100,
                          validate_every=400, compile=False),
    "books": LM | dict(data="data/books", n_layer=8, n_encoder=0, n_embd=384, n_head=6, window=64,
                       gca_residual=True, gumbel=False, start_len=1008, seq_len=8064, batch_size=64,
                       batch_tokens=64512, steps=3000, warmup=100, validate_every=100),
    "pg19": LM | dict(data="data/pg19", micro_batch=4, steps=60000, warmup=1200, checkpoint_every=1000),
}


# ---------------------------------------------------------------- the loop

def train(config, model, task, run, saved):
    """Draw a batch, forward, backward, step, log, look at unseen text, save. Returns the steps done.

    objective(*batch) is task.loss(model, *batch), whose gradients are averaged over the processes.
    """
    ranks, device = run.ranks, run.ranks.device
    optimizer = make_optimizer(model, config)
    step, length = 0, task.lengths()[0]
    if saved:
        load_optimizer(optimizer, saved["optimizer"])
        step, length = saved["step"], saved["length"]
    objective = ranks.objective(model, task.loss, config)
    dtype = cli.pick_dtype(config.dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    done, stopped = step >= config.steps, False
    with run.start(step):
        while not (done or stopped):
            n_context = contexts_in_batch(config, length)
            batch = ranks.share(task.batch(step, length, n_context))    # tokens, labels, .. (context, length)
            size = config.micro_batch or len(batch[0])
            starts = range(0, len(batch[0]), size)
            seed_step(config.seed, step, ranks.rank)                    # the noise of retrieval is repeatable
            metrics = 0
            for i in starts:
                objective.require_backward_grad_sync = i == starts[-1]  # gradients travel once
                micro_batch = [x[i:i + size] for x in batch]
                with cli.autocast(device, dtype):
                    loss, numbers = objective(*micro_batch)
                scaler.scale(loss / len(starts)).backward()
                metrics = metrics + torch.stack([loss, *numbers]).detach() / len(starts)
            metrics = ranks.mean(metrics)                               # the loss and the task's METRICS

            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("share", 1.0)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            skipped = (~(grad_norm + metrics[0]).isfinite()).float()
            optimizer.found_inf = skipped                               # tells the fused step to do nothing
            optimizer.step()
            scaler.update()
            optimizer.zero_grad()
            step += 1

            run.record(torch.cat([metrics, torch.stack([grad_norm.detach(), skipped])]), step,
                       lr=lr, seq_len=length, batch_size=n_context)
            done = step == config.steps
            stopped = run.stopped()
            score = None
            if step % config.validate_every == 0 or done:
                with cli.autocast(device, dtype):
                    score = task.score(model, step, length, n_context)
            run.write(step, score)
            length = task.next_length(length, step, score)
            if step % config.checkpoint_every == 0 or done or stopped:
                run.save(model, optimizer, step=step, length=length, tokenizer=task.corpus.tokenizer,
                         settings=task.settings | asdict(model.config))
    return step


def contexts_in_batch(config, length):
    return max(1, min(config.batch_size, config.batch_tokens // length))


def learning_rate(step, config):
    """Linear warm-up, and a cosine to final_lr of the peak (Sec. 4)."""
    warm, share = min(1, (step + 1) / config.warmup), config.final_lr
    return config.lr * warm * (share + (1 - share) * (1 + math.cos(math.pi * step / config.steps)) / 2)


def make_optimizer(model, config):
    """AdamW as the paper has it, with weight decay on matrices only; encoder layers may learn slower."""
    kinds = {(1.0, True): [], (1.0, False): []}             # (share of lr, is a matrix): its parameters
    for name, p in model.named_parameters():
        share = config.encoder_lr if name.startswith("encoder.layers.") else 1.0
        kinds.setdefault((share, p.dim() >= 2), []).append(p)
    groups = [dict(params=params, share=share, weight_decay=config.weight_decay if is_matrix else 0.0)
              for (share, is_matrix), params in kinds.items()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


# ---------------------------------------------------------------- settings

FIELDS = [*fields(TrainConfig), *fields(NeedleConfig), *fields(SummaryConfig)]
FIELDS += [field for field in fields(DRTConfig) if field.name != "vocab_size"]          # the corpus has that


def make_parser():
    parser = cli.Parser(description="Train a DRT, then measure it.")
    parser.add_argument("--preset", choices=PRESETS, help="settings of a known run; default: by the device")
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to; default: out")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its settings")
    parser.add_argument("--init_from", type=Path, help="begin with the model of this checkpoint")
    defaults = {}
    for field in FIELDS:
        values = {name: preset.get(field.name, field.default) for name, preset in PRESETS.items()}
        if len(set(values.values())) > 1:
            defaults[field.name] = ", ".join(f"{name} {value}" for name, value in values.items())
    choices = dict(task=[*evaluation.TASKS], needle=KINDS, path=PATHS, retriever=RETRIEVERS,
                   dtype=["auto", *cli.DTYPES])
    parser.add_fields(TrainConfig, NeedleConfig, SummaryConfig, DRTConfig, choices=choices, defaults=defaults,
                      leave_out=["vocab_size"])                         # the corpus has that
    return parser


def settings(args, device, saved, first=None):
    """All settings as one dict: the preset's or the saved run's, under the flags; ValueError if at odds.

    first: the checkpoint of --init_from; the model's settings are its own.
    """
    given = {f.name: getattr(args, f.name) for f in FIELDS if getattr(args, f.name) is not None}
    defaults = {f.name: f.default for f in FIELDS}
    if not saved:
        preset = args.preset or ("gpu" if device.type == "cuda" else "cpu")
        model = asdict(DRTConfig(**first["config"])) if first else {}
        model.pop("vocab_size", None)                                           # the corpus has that
        if first:
            require(not given.get("encoder_identity"), "--encoder_identity must be left out with --init_from")
            model["encoder_identity"] = False
        return defaults | PRESETS[preset] | model | given
    for name, value in given.items():
        before = saved["settings"].get(name, defaults[name])
        require(name in ("steps", "checkpoint_every", "micro_batch", "fast") or value == before,
                f"--resume: the run in {args.out} has --{name} {before}, got {value}")
    chosen = defaults | saved["settings"] | given
    configs = [TrainConfig, NeedleConfig, SummaryConfig, DRTConfig]
    cli.check_types(chosen, configs, f"{args.out}/ckpt.pt", ["vocab_size"])
    require(chosen["steps"] >= saved["step"],
            f"--steps must be at least the {saved['step']} of the run in {args.out}, got {chosen['steps']}")
    return chosen


def pick(config_class, chosen, **others):
    """A config of this class, by the names of its fields."""
    names = [f.name for f in fields(config_class) if f.name not in others]
    return config_class(**{name: chosen[name] for name in names}, **others)


POSITIVE = dict(batch_size=10 ** 6, batch_tokens=10 ** 9, steps=10 ** 9, lr=100, warmup=10 ** 9, grow_at=1,
                validate_every=10 ** 9, checkpoint_every=10 ** 9, seq_len=10 ** 9)          # and at most this
NOT_NEGATIVE = dict(seed=2 ** 63 - 1, start_len=10 ** 9, micro_batch=10 ** 6, final_lr=1, weight_decay=100,
                    encoder_lr=1, lm_weight=1000)


def check_ranges(chosen):
    """ValueError for a number out of its range; nan and inf are in none."""
    for name, most in POSITIVE.items():
        require(chosen[name] > 0, f"--{name} must be positive, got {chosen[name]}")
        require(chosen[name] <= most, f"--{name} must be at most {most}, got {chosen[name]}")
    for name, most in NOT_NEGATIVE.items():
        require(chosen[name] >= 0, f"--{name} must not be negative, got {chosen[name]}")
        require(chosen[name] <= most, f"--{name} must be at most {most}, got {chosen[name]}")


def check(config, task, n_rank):
    """ValueError for training settings that do not fit the task or the processes."""
    for length in task.lengths():
        n_context, micro_batch = contexts_in_batch(config, length), config.micro_batch or 1
        require(n_rank == 1 or length >= task.settings["chunk_size"] - 1, "--seq_len and --start_len must be "
                f"at least a chunk, {task.settings['chunk_size'] - 1}, with several processes, got {length}")
        why = ", all that --batch_tokens allows" if n_context < config.batch_size else ""
        require(n_context % (n_rank * micro_batch) == 0,
                f"--batch_size must be a multiple of {n_rank} processes times --micro_batch {micro_batch}, "
                f"got {n_context} at {length} tokens{why}")
        task.check(length)
    load_tokenizer(task.corpus.tokenizer)


# ---------------------------------------------------------------- from the command line to the final table

@cli.program
def main(argv=None):
    args = make_parser().parse_args(argv)
    device = cli.pick_device(args.device)
    ranks = Ranks(device)
    saved = load_run(args.out, device) if args.resume else None
    require(not (args.resume and args.init_from), "--init_from must be left out with --resume")
    first = load_checkpoint(args.init_from, device, RUN_PARTS)[1] if args.init_from else None
    chosen = settings(args, device, saved, first)
    check_ranges(chosen)
    corpus = load_corpus(chosen["data"])
    require(not saved or corpus.tokenizer == saved["tokenizer"],
            f"--resume: the run in {args.out} has tokens of {saved and saved['tokenizer']}, "
            f"got {corpus.tokenizer} in {chosen['data']}")
    config = pick(TrainConfig, chosen)
    model_config = pick(DRTConfig, chosen, vocab_size=corpus.vocab_size)
    require(config.task in evaluation.TASKS, f"--task must be a task, got {config.task}")
    task = evaluation.TASKS[config.task](chosen, corpus)
    check(config, task, ranks.size)
    require(not saved or DRTConfig(**saved["config"]) == model_config and saved["length"] in task.lengths(),
            f"{args.out}/ckpt.pt is damaged: its settings are not those of its model")
    check_first(first, args.init_from, model_config, corpus.tokenizer)
    check_space(args.out, sum(shape.numel() for shape in shapes(model_config).values()))

    torch.manual_seed(config.seed)
    model = DRT(model_config).to(device).train()
    if config.encoder_identity and model_config.n_group:
        model.encoder.begin_as_identity()
    if saved or first:
        model.load_state_dict((saved or first)["model"])
    if config.fast:
        fast.apply(model, config.compile)
    n_matrix = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    run = Run(args.out, ranks, config.steps, task, flops_per_token(model_config, n_matrix, config.seq_len))
    if ranks.rank == 0:
        lock = prepare_folder(args.out, args.resume)
        print("fast:", fast.describe(model, config) or "nothing swapped, the plain files train", flush=True)
    step = train(config, model, task, run, saved)
    if ranks.size > 1:
        dist.destroy_process_group()
    if step < config.steps or run.signal:                       # it may come after the last step
        name = run.signal.name if run.signal else "a signal to another process"
        print(f"\nStopped by {name} after step {step}; go on with --resume --out {args.out}", flush=True)
        sys.exit(128 + (run.signal or signal.SIGTERM))
    if ranks.rank == 0:
        final_table(args.out, task, device, config)
        lock.close()


def final_table(out, task, device, config):
    """What the checkpoint can do, on the terminal and in niah.json, ppl.json or summaries.json."""
    model, saved = load_checkpoint(out / "ckpt.pt", device)
    print(f"\n{out}/ckpt.pt and log.csv are written; now to {task.REPORT}, which eval.py can make again.")
    print(f"{task.TITLE} ({cli.hardware(device)}):")
    read = evaluation.Reader(device, cli.pick_dtype(config.dtype, device), config.fast)
    rows = evaluation.measure(task, {out.absolute().name: model}, read)
    cli.save_report(out / task.REPORT, saved["settings"] | task.measured_on(), device, rows)
    print(f"{out}/{task.REPORT} is written.")


if __name__ == "__main__":
    main(sys.argv[1:])
