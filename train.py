"""Train a DRT: to find needles in real text, or as a language model on a corpus.

    python train.py                                            needles, in minutes
    python train.py --seed 1 --n_layer 4 --n_group 2 --out out/deep
    torchrun --nproc_per_node 8 train.py --preset pg19         the paper's pre-training, on several GPUs

train() below is the loop. Contexts start short. For needles they double whenever the answers are right:
retrieval is learned within minutes when there are few chunks to choose from, and carries over to many.

Writes to --out: ckpt.pt, and the one before it, ckpt.prev.pt; log.csv, one row a step; and the table it ends
with, niah.json or ppl.json. A run that was stopped goes on with --resume, exactly as if it had not been.
"""
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist

import eval as evaluation
import fast
from gca import require
from model import DRT, DRTConfig
from tasks.needles import NeedleConfig
from tasks.text import load_corpus, load_tokenizer
from tools import cli
from tools.run import Ranks, Run, check_space, flops_per_token, load_checkpoint, load_saved, seed_step


@dataclass
class TrainConfig:
    task: str = "needles"           # needles: find them in a haystack; text: language modelling
    data: str = "stdlib"            # the text: stdlib, or a folder that tools.prepare made
    start_len: int = 64             # tokens in a context at first (text: for 40% of the steps); 0: seq_len
    seq_len: int = 128              # tokens in a context (at last)
    batch_size: int = 64            # contexts in a batch, of all GPUs together, and at most ..
    batch_tokens: int = 8192        # .. this many tokens
    micro_batch: int = 0            # contexts that a GPU takes at once, their gradients added up; 0: all
    steps: int = 480
    lr: float = 4e-3                # peak learning rate
    final_lr: float = 0.1           # where the cosine ends, as a share of the peak
    warmup: int = 50                # steps of linear warm-up
    weight_decay: float = 0.001     # on matrices only
    seed: int = 0                   # of the initial weights and of the data
    fast: bool = True               # swap pieces for faster ones (fast/); false: the plain files alone
    compile: bool = False           # torch.compile each layer: most of a minute to start, then faster
    validate_every: int = 25        # steps between looks at unseen text, after which the context may grow
    checkpoint_every: int = 500     # steps between checkpoints; one is always written at the end


# Settings of known runs; docs/ has their numbers. A flag overrides the preset, the preset the default.
LM = dict(task="text", n_layer=12, n_embd=768, n_head=12, chunk_size=64, window=512, top_k=8, seq_len=16380,
          start_len=0, batch_size=32, batch_tokens=2 ** 19, lr=2e-3, final_lr=0.2, compile=True,
          validate_every=250, gca_residual=False)
PRESETS = {
    "cpu": dict(n_encoder=1),
    "gpu": dict(n_encoder=1, n_embd=128, n_head=8, chunk_size=64, window=64, top_k=8, n_needle=48, n_value=12,
                start_len=512, seq_len=16384, batch_size=128, batch_tokens=65536, steps=3000, lr=2e-3,
                gumbel=False),
    "pg19": LM | dict(data="data/pg19", micro_batch=4, steps=60000, warmup=1200, checkpoint_every=1000),
    "books": LM | dict(data="data/books", n_layer=8, n_encoder=0, n_embd=384, n_head=6, window=64,
                       gca_residual=True, gumbel=False, start_len=1008, seq_len=8064, batch_size=64,
                       batch_tokens=64512, steps=3000, warmup=100, validate_every=100),
}


# ---------------------------------------------------------------- the loop

def train(config, model, task, run, saved):
    """Draw a batch, forward, backward, step, log, look at unseen text, save. Returns the steps done."""
    ranks, device = run.ranks, run.ranks.device
    optimizer = make_optimizer(model, config)
    step, length = 0, task.lengths()[0]
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        step, length = saved["step"], saved["length"]
    objective = ranks.objective(model, task.loss, find_unused=model.config.retriever != "learned")
    done, stopped = step == config.steps, False
    with run.start(step):
        while not (done or stopped):
            n_context = contexts_in_batch(config, length)
            batch = ranks.share(task.batch(step, length, n_context))    # tokens, labels, .. (context, length)
            micro_batches = list(zip(*(x.split(config.micro_batch or n_context) for x in batch), strict=True))
            seed_step(config.seed, step, ranks.rank)                    # of retrieval's noise
            metrics = 0
            for i, micro_batch in enumerate(micro_batches):
                objective.require_backward_grad_sync = i == len(micro_batches) - 1     # gradients travel once
                with autocast(device):
                    loss, numbers = objective(*micro_batch)
                (loss / len(micro_batches)).backward()
                metrics = metrics + torch.stack([loss, *numbers]).detach() / len(micro_batches)
            metrics = ranks.mean(metrics)

            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            skipped = (~(grad_norm + metrics[0]).isfinite()).float()
            optimizer.found_inf = skipped                               # tells the fused step to do nothing
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            run.record(torch.cat([metrics, torch.stack([grad_norm.detach(), skipped])]), step,
                       lr=lr, seq_len=length, batch_size=n_context)
            done, stopped, score = step == config.steps, run.stopped(), None
            if step % config.validate_every == 0 or done:
                with autocast(device):
                    score = task.score(model, step, length, n_context)
                run.flush(**score)
            length = task.next_length(length, step, score)
            if step % config.checkpoint_every == 0 or done or stopped:
                run.save(model, optimizer, step=step, length=length, tokenizer=task.corpus.tokenizer,
                         settings=task.settings | asdict(model.config))
    return step


def contexts_in_batch(config, length):
    return max(1, min(config.batch_size, config.batch_tokens // length))


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def learning_rate(step, config):
    """Linear warm-up, and a cosine to final_lr of the peak (Sec. 4)."""
    warm, share = min(1, (step + 1) / config.warmup), config.final_lr
    return config.lr * warm * (share + (1 - share) * (1 + math.cos(math.pi * step / config.steps)) / 2)


def make_optimizer(model, config):
    """AdamW as the paper has it; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


# ---------------------------------------------------------------- settings

FIELDS = [*fields(TrainConfig), *fields(NeedleConfig)]
FIELDS += [field for field in fields(DRTConfig) if field.name != "vocab_size"]          # the corpus has that


def make_parser():
    parser = cli.Parser(description="Train a DRT, then measure it.")
    parser.add_argument("--preset", choices=PRESETS, help="settings of a known run; default: by the device")
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to; default: out")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its settings")
    helps = {}
    for field in FIELDS:
        values = {name: preset.get(field.name, field.default) for name, preset in PRESETS.items()}
        if len(set(values.values())) > 1:
            helps[field.name] = "default: " + ", ".join(f"{value} ({name})" for name, value in values.items())
    choices = dict(task=[*evaluation.TASKS], needle=["multi", "single"])
    parser.add_fields(FIELDS, choices, helps)
    return parser


def settings(args, device, saved):
    """All settings as one dict: the preset's or the saved run's, under the flags; ValueError if at odds."""
    given = {f.name: getattr(args, f.name) for f in FIELDS if getattr(args, f.name) is not None}
    defaults = {f.name: f.default for f in FIELDS}
    if not saved:
        preset = args.preset or ("gpu" if device.type == "cuda" else "cpu")
        return defaults | PRESETS[preset] | given
    for name, value in given.items():
        before = saved["settings"].get(name, defaults[name])
        require(name in ("steps", "checkpoint_every", "micro_batch", "fast") or value == before,
                f"--resume: the run in {args.out} has --{name} {before}, got {value}")
    return defaults | saved["settings"] | given


def pick(config_class, chosen, **others):
    """A config of this class, by the names of its fields."""
    names = [f.name for f in fields(config_class) if f.name not in others]
    return config_class(**{name: chosen[name] for name in names}, **others)


def check(config, task, n_rank):
    """ValueError for training settings that cannot work."""
    for name in ("batch_size", "batch_tokens", "steps", "lr", "warmup", "validate_every", "checkpoint_every",
                 "seq_len"):
        value = getattr(config, name)
        require(value > 0, f"--{name} must be positive, got {value}")
    for name in ("seed", "start_len", "micro_batch", "final_lr", "weight_decay"):
        value = getattr(config, name)
        require(value >= 0, f"--{name} must not be negative, got {value}")
    for length in task.lengths():
        n_context, micro_batch = contexts_in_batch(config, length), config.micro_batch or 1
        require(n_context % (n_rank * micro_batch) == 0,
                f"--batch_size must be a multiple of {n_rank} processes times --micro_batch {micro_batch}, "
                f"got {n_context} at {length} tokens")
        task.check(length)
    load_tokenizer(task.corpus.tokenizer)


# ---------------------------------------------------------------- from the command line to the final table

def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with cli.mistakes_in_one_line(parser):
        device = cli.pick_device(args.device)
        ranks = Ranks(device)
        saved = load_saved(args.out, device) if args.resume else None
        chosen = settings(args, device, saved)
        corpus = load_corpus(chosen["data"])
        require(not saved or corpus.tokenizer == saved["tokenizer"],
                f"--resume: the run in {args.out} has tokens of {saved and saved['tokenizer']}, "
                f"got {corpus.tokenizer} in {chosen['data']}")
        config = pick(TrainConfig, chosen)
        model_config = pick(DRTConfig, chosen, vocab_size=corpus.vocab_size)
        task = evaluation.TASKS[config.task](chosen, corpus)
        check(config, task, ranks.size)

        torch.manual_seed(config.seed)
        model = DRT(model_config).to(device).train()
        if saved:
            model.load_state_dict(saved["model"])
        check_space(args.out, sum(p.numel() for p in model.parameters()))
        args.out.mkdir(parents=True, exist_ok=True)
        if config.fast:
            fast.apply(model, config.compile)
        if ranks.rank == 0:
            print("fast:", fast.describe(model) or "nothing swapped, the plain files train", flush=True)
        n_matrix = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
        flops = flops_per_token(model_config, n_matrix, config.seq_len)
        run = Run(args.out, ranks, config.steps, task, flops)
        step = train(config, model, task, run, saved)
    if ranks.size > 1:
        dist.destroy_process_group()
    if ranks.rank == 0:
        if step < config.steps:
            signal = (run.signals or ["a signal to another process"])[0]
            return print(f"\nStopped by {signal} after step {step}; go on with --resume --out {args.out}")
        final_table(args.out, task, device, config.fast)


def final_table(out, task, device, use_fast):
    """What the checkpoint can do, on the terminal and in niah.json or ppl.json."""
    model, saved = load_checkpoint(out / "ckpt.pt", device)
    print(f"\n{task.TITLE} ({cli.hardware(device)}):")
    rows = evaluation.measure(task, {out.absolute().name: model}, evaluation.Reader(device, use_fast))
    cli.save_report(out / task.REPORT, saved["settings"], device, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
