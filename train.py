"""Train a DRT: to find needles in real text, or as a language model on a corpus.

    python train.py                                            needles, in minutes
    python train.py --seed 1 --n_layer 4 --n_group 2 --out out/deep
    torchrun --nproc_per_node 8 train.py --preset pg19         the paper's pre-training, on several GPUs

A plain loop: draw a batch, step, log. The context starts short, and for needles doubles whenever the answers
are right: retrieval is learned within minutes when there are few chunks to choose from, and then carries over
to many. Everything random is a pure function of seed, step and rank, so a run that was stopped, at whatever
moment, goes on with --resume exactly as if it had not been.

Writes to --out: ckpt.pt, and the one before it, ckpt.prev.pt; log.csv, one row a step; and the table it ends
with, niah.json or ppl.json.
"""
import csv
import math
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
from data import (
    TRAINING,
    VALIDATION,
    NeedleTask,
    Parser,
    load_corpus,
    load_tokenizer,
    needle_batch,
    window_batch,
)
from model import DRT, DRTConfig, load_checkpoint, save_checkpoint


@dataclass
class TrainConfig:
    task: str = "niah"              # niah: find needles in a haystack; lm: language modelling
    needle: str = "multi"           # multi: up to n_needle needles in a context, all asked for; single: one
    n_needle: int = 3
    n_value: int = 6                # bytes in a needle's value
    straddle: bool = False          # True: needles lie anywhere; False: each inside one chunk
    data: str = "stdlib"            # the text: stdlib, or a folder that data.py made
    start_len: int = 64             # tokens in a context at first (lm: for 40% of the steps); 0: seq_len
    seq_len: int = 128              # tokens in a context (at last)
    grow_at: float = 0.9            # niah: answer accuracy at which the context doubles
    batch_size: int = 64            # contexts in a batch, of all GPUs together, and at most ..
    batch_tokens: int = 8192        # .. this many tokens
    micro_batch: int = 0            # contexts that a GPU takes at once, their gradients added up; 0: all
    steps: int = 480
    lr: float = 4e-3                # peak learning rate
    final_lr: float = 0.1           # where the cosine ends, as a share of the peak
    warmup: int = 50                # steps of linear warm-up
    weight_decay: float = 0.001     # on matrices only
    lm_weight: float = 0.3          # niah: of the language-model loss, beside the answers'
    seed: int = 0                   # of the initial weights and of the data
    compile: bool = False           # torch.compile each layer: most of a minute to start, then faster
    validate_every: int = 25        # steps between looks at unseen text, after which the context may grow
    checkpoint_every: int = 500     # steps between checkpoints; one is always written at the end


# Settings of known runs; README has their numbers. A flag overrides the preset, the preset the default.
LM = dict(task="lm", n_layer=12, n_embd=768, n_head=12, chunk_size=64, window=512, top_k=8, seq_len=16380,
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
FIELDS = [f for f in fields(TrainConfig) + fields(DRTConfig) if f.name != "vocab_size"]  # the corpus has that
SHORT = 0.4                # lm: share of the steps that have contexts of start_len tokens
LOG_EVERY = 25             # steps between reading the metrics back from the GPU
VALIDATION_SEQUENCES = 16  # lm: always the same
BAD_STEPS = 10             # in a row, without a finite loss and gradient: the run ends
METRICS = ("loss", "answer_loss", "lm_loss", "answer_accuracy", "grad_norm", "skipped")
COLUMNS = ("step", *METRICS, "lr", "seq_len", "batch_size", "tokens_per_second", "mfu", "gpu_gib", "val_loss",
           "val_accuracy")
PEAK_FLOPS = dict(H100=989e12, H200=989e12, A100=312e12)    # dense bf16, by the vendor's data sheets


# ---------------------------------------------------------------- settings

def make_parser():
    parser = Parser(allow_abbrev=False, description="Train a DRT, then measure it.")
    parser.add_argument("--preset", choices=PRESETS, help="settings of a known run; default: by the device")
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to; default: out")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its settings")
    helps = {}
    for field in FIELDS:
        values = {name: preset.get(field.name, field.default) for name, preset in PRESETS.items()}
        if len(set(values.values())) > 1:
            helps[field.name] = "default: " + ", ".join(f"{value} ({name})" for name, value in values.items())
    parser.add_fields(FIELDS, dict(task=["niah", "lm"], needle=["multi", "single"]), helps)
    return parser


def settings(args, device, saved):
    """All settings as one dict: the preset's or the saved run's, under the flags; ValueError if at odds."""
    given = {f.name: getattr(args, f.name) for f in FIELDS if getattr(args, f.name) is not None}
    if saved:
        for name, value in given.items():
            if name not in ("steps", "checkpoint_every", "micro_batch") and value != saved["settings"][name]:
                raise ValueError(f"--resume: the run in {args.out} has --{name} {saved['settings'][name]}, "
                                 f"got {value}")
        return saved["settings"] | given
    preset = args.preset or ("gpu" if device.type == "cuda" else "cpu")
    return {f.name: f.default for f in FIELDS} | PRESETS[preset] | given


def lengths(config):
    """Every context length of the run, and how many contexts a batch of it has."""
    length = min(config.start_len or config.seq_len, config.seq_len)
    while True:
        yield length, max(1, min(config.batch_size, config.batch_tokens // length))
        if length == config.seq_len:
            return
        length = config.seq_len if config.task == "lm" else min(2 * length, config.seq_len)


def check(config, task, corpus, ranks):
    """ValueError for training settings that cannot work."""
    for name in ("batch_size", "batch_tokens", "steps", "lr", "warmup", "validate_every", "checkpoint_every",
                 "seq_len"):
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name} must be positive, got {getattr(config, name)}")
    for name in ("seed", "start_len", "micro_batch", "final_lr", "weight_decay"):
        if getattr(config, name) < 0:
            raise ValueError(f"--{name} must not be negative, got {getattr(config, name)}")
    for length, batch_size in lengths(config):
        if batch_size % (ranks * (config.micro_batch or 1)):
            raise ValueError(f"--batch_size must be a multiple of {ranks} processes times --micro_batch "
                             f"{config.micro_batch or 1}, got {batch_size} at {length} tokens")
        if config.task == "lm":
            for split in (corpus.train, corpus.val):
                window_batch(split, 0, 0, 1, length)
        else:
            task.fit(length)
    load_tokenizer(corpus.tokenizer)
    if config.task == "niah" and corpus.tokenizer != "bytes":
        raise ValueError(f"--data must be prepared with --tokenizer bytes for --task niah, "
                         f"got {corpus.tokenizer} in {config.data}")


def check_space(out, n_parameters):
    """ValueError where there is no room for three checkpoints: the last, the one before, and a new one."""
    wanted, folder = 3 * 12 * n_parameters, out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ValueError(f"--out: {out} must have {wanted / 1e9:.1f} GB free for checkpoints, "
                         f"it has {free / 1e9:.1f}")


# ---------------------------------------------------------------- one process of several

class Ranks:
    """What torchrun says of this process: number `rank` of `size`. Without it, the only one."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def mean(self, x):
        """The mean over all processes, in place; every one of them must call it."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x


@contextmanager
def signals():
    """A list that SIGINT and SIGTERM append their names to, instead of ending the program."""
    caught = []
    old = {number: signal.signal(number, lambda number, _: caught.append(signal.Signals(number).name))
           for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- one step

def learning_rate(step, config):
    warm, share = min(1, (step + 1) / config.warmup), config.final_lr
    return config.lr * warm * (share + (1 - share) * (1 + math.cos(math.pi * step / config.steps)) / 2)


def make_optimizer(model, config):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def draw_batch(text, task, stream, length, batch_size, device):
    """tokens, next tokens and is_answer on the device; stream names the random numbers, as in data.py."""
    arrays = needle_batch(text, task.fit(length), np.random.default_rng(stream), batch_size, length)
    return [torch.from_numpy(x).to(device, non_blocking=True) for x in arrays]


def draw_windows(text, seed, first, batch_size, length, config, vocab_size, device):
    """tokens and next tokens of the corpus on the device; sequences number first, first + 1, .."""
    arrays = window_batch(text, seed, first, batch_size, length)
    if (largest := max(x.max() for x in arrays)) >= vocab_size:
        raise ValueError(f"{config.data} must hold tokens below its vocabulary's {vocab_size}, got {largest}")
    return [torch.from_numpy(x).to(device, non_blocking=True) for x in arrays]


def predict(model, tokens, labels, at=None):
    """Cross-entropy and hits, (number,) each, at the marked positions or at all; no logits elsewhere."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits, _ = model(tokens, at=at)
    labels = labels.flatten() if at is None else labels[at]
    logits = logits.flatten(0, -2).float()
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels


def mean_where(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)           # x[mask].mean() without waiting for the GPU


class Objective(nn.Module):
    """Model and loss in one, which is what DistributedDataParallel wraps: batch -> loss, four METRICS."""

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, tokens, labels, is_answer=None):
        if is_answer is None:
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
                loss = self.model.loss(tokens, labels)
            nothing = torch.full_like(loss, math.nan)
            return loss, torch.stack([loss, nothing, loss, nothing]).detach()
        at = None if self.config.lm_weight else is_answer       # answers, and a little of all other text
        token_loss, hit = predict(self.model, tokens, labels, at)
        answer = is_answer.flatten() if at is None else torch.ones_like(hit)
        answer_loss, lm_loss = mean_where(token_loss, answer), mean_where(token_loss, ~answer)
        loss = answer_loss + self.config.lm_weight * lm_loss
        return loss, torch.stack([loss, answer_loss, lm_loss, mean_where(hit, answer)]).detach()


def train_step(objective, optimizer, batch, ranks):
    """One optimizer step on this process's share of the batch, a micro-batch at a time; METRICS as a tensor.

    Where loss or gradient are not finite, nothing is changed (and nothing waits to find out).
    """
    micro_batches = list(zip(*(x.split(objective_of(objective).config.micro_batch or len(x)) for x in batch),
                             strict=True))
    optimizer.zero_grad()
    metrics = 0
    for i, micro_batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last or ranks.size == 1 else objective.no_sync():     # gradients travel once
            loss, values = objective(*micro_batch)
            (loss / len(micro_batches)).backward()
        metrics = metrics + values / len(micro_batches)
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    metrics = ranks.mean(metrics)
    skipped = (~(norm + metrics[0]).isfinite()).float()
    optimizer.found_inf = skipped                               # the fused step's own way to do nothing
    optimizer.step()
    return torch.cat([metrics, torch.stack([norm, skipped])]).detach()


def objective_of(objective):
    return objective.module if isinstance(objective, DistributedDataParallel) else objective


@torch.no_grad()
def validate(model, batch):
    """Accuracy of the answers in a batch of unseen text."""
    model.eval()
    _, hit = predict(model, *batch)
    model.train()
    return hit.float().mean()


@torch.no_grad()
def validation_loss(objective, batch, size):
    """Loss of a batch of unseen text, `size` sequences at a time."""
    objective.eval()
    losses = [objective(*some)[0] for some in zip(*(x.split(size) for x in batch), strict=True)]
    objective.train()
    return torch.stack(losses).mean()


# ---------------------------------------------------------------- how fast

def flops_per_token(model, config):
    """Of training: 6 for each weight of a matrix, and attention's: 12 d for each key that a token sees."""
    c = model.config
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    keys = c.n_layer * min(c.window, config.seq_len)
    if c.n_group:
        keys += c.n_layer // 2 * c.top_k * c.chunk_size + c.n_encoder * c.chunk_size
    return 6 * matrices + 12 * c.n_embd * keys


def utilization(device, flops):
    """Model FLOPs utilization in percent, or None where the peak is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((100 * flops / peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)


# ---------------------------------------------------------------- the loop

class Run:
    """A training run: what the loop carries from step to step, and what a checkpoint holds."""

    def __init__(self, config, model_config, corpus, task, device, out, saved, ranks):
        self.config, self.corpus, self.task, self.ranks = config, corpus, task, ranks
        self.device, self.out = device, out
        torch.manual_seed(config.seed)
        self.model = DRT(model_config).to(device).train()
        self.optimizer = make_optimizer(self.model, config)
        self.step, self.length = 0, next(lengths(config))[0]
        if saved:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.length = saved["step"], saved["length"]
        if config.compile and device.type == "cuda":
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            for layer in self.model.layers:
                layer.compile(dynamic=False)
            if model_config.n_group:
                self.model.encoder.compile(dynamic=False)
        self.objective = Objective(self.model, config)
        if ranks.size > 1:
            unused = model_config.retriever != "learned"
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=unused)
        self.flops = flops_per_token(self.model, config)
        self.metrics, self.rows, self.bad, self.since = [], [], 0, time.perf_counter()

    @property
    def batch_size(self):
        return max(1, min(self.config.batch_size, self.config.batch_tokens // self.length))

    def batch(self):
        """This process's share of the step's batch."""
        config, share = self.config, self.batch_size // self.ranks.size
        first = self.ranks.rank * share
        if config.task == "lm":
            return draw_windows(self.corpus.train, config.seed, self.step * self.batch_size + first, share,
                                self.length, config, self.corpus.vocab_size, self.device)
        stream = TRAINING, config.seed, self.step
        batch = draw_batch(self.corpus.train, self.task, stream, self.length, self.batch_size, self.device)
        return [x[first:first + share] for x in batch]

    def advance(self):
        """One step."""
        if self.config.task == "lm" and self.step >= SHORT * self.config.steps:
            self.length = self.config.seq_len
        lr = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seed = np.random.SeedSequence([self.config.seed, self.step, self.ranks.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))                            # of retrieval's noise
        self.metrics.append(train_step(self.objective, self.optimizer, self.batch(), self.ranks))
        self.step += 1
        self.rows.append(dict(step=self.step, lr=lr, seq_len=self.length, batch_size=self.batch_size))

    def measure(self):
        """Read the metrics of the steps since the last call into their rows: the only wait for the GPU."""
        values = torch.stack(self.metrics).tolist()
        seen = sum(row["seq_len"] * row["batch_size"] for row in self.rows)
        speed = seen / (time.perf_counter() - self.since)
        mfu = utilization(self.device, speed / self.ranks.size * self.flops)
        memory = torch.cuda.max_memory_allocated() / 2 ** 30 if self.device.type == "cuda" else None
        for row, value in zip(self.rows, values, strict=True):
            numbers = {name: x for name, x in zip(METRICS, value, strict=True) if not math.isnan(x)}
            row.update(numbers, tokens_per_second=speed, mfu=mfu, gpu_gib=memory)
            self.bad = self.bad + 1 if row["skipped"] else 0
            if self.bad == BAD_STEPS:
                raise ValueError(f"loss or gradient were not finite in {BAD_STEPS} steps in a row, up to "
                                 f"step {row['step']}; none of them changed the model: try a lower --lr")

    def look_at_unseen_text(self):
        """Validation, into the last row; the context grows when the answers are right."""
        config, row = self.config, self.rows[-1]
        if config.task == "lm":
            batch = draw_windows(self.corpus.val, 0, 0, VALIDATION_SEQUENCES, config.seq_len, config,
                                 self.corpus.vocab_size, self.device)
            *_, (_, size) = lengths(config)                     # as many as a batch of this length has
            size = config.micro_batch or size // self.ranks.size
            row["val_loss"] = validation_loss(objective_of(self.objective), batch, size).item()
            return
        stream = VALIDATION, config.seed, self.step
        unseen = draw_batch(self.corpus.val, self.task, stream, self.length, self.batch_size, self.device)
        row["val_accuracy"] = accuracy = self.ranks.mean(validate(self.model, unseen)).item()
        if accuracy >= config.grow_at:
            self.length = min(2 * self.length, config.seq_len)

    def write_rows(self, log, bar):
        row = self.rows[-1]
        news = [f"loss {row.get('loss', math.nan):.3f}"]
        if "val_accuracy" in row:
            news.append(f"answers {row['val_accuracy']:.1%} at {row['seq_len']} tokens")
        if "val_loss" in row:
            news.append(f"validation {row['val_loss']:.3f}")
        news.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        if row["mfu"]:
            news.append(f"{row['mfu']:.0f}% MFU, {row['gpu_gib']:.0f} GiB")
        bar.set_postfix_str(", ".join(news))
        log.writerows(self.rows)

    def save(self):
        save_checkpoint(self.out / "ckpt.pt", self.model, optimizer=self.optimizer.state_dict(),
                        step=self.step, length=self.length, tokenizer=self.corpus.tokenizer,
                        settings=asdict(self.config) | asdict(self.model.config))

    def train(self):
        """The loop; returns the name of the signal that ended it early, or None."""
        config, first = self.config, self.ranks.rank == 0
        with signals() as caught, open_log(self.out / "log.csv", self.step, first) as file, \
                tqdm(total=config.steps, initial=self.step, unit="step", disable=not first) as bar:
            log = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            self.since = time.perf_counter()
            while self.step < config.steps:
                self.advance()
                bar.update()
                stop = self.ranks.mean(torch.tensor(float(bool(caught)))).item() > 0     # all stop, or none
                look = self.step % config.validate_every == 0 or self.step == config.steps
                save = self.step % config.checkpoint_every == 0 or self.step == config.steps or stop
                if look or save or self.step % LOG_EVERY == 0:
                    self.measure()
                    if look:
                        self.look_at_unseen_text()
                    if first:
                        self.write_rows(log, bar)
                        file.flush()
                    self.metrics, self.rows, self.since = [], [], time.perf_counter()
                if save and first:
                    self.save()
                if stop:
                    return (caught or ["a signal to another process"])[0]


def open_log(path, step, first):
    """log.csv, ready for the row after `step`; rows that a resumed run will write again are dropped."""
    if not first:
        return open(os.devnull, "w")
    kept = path.read_text().splitlines()[1:step + 1] if step else []
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in [",".join(COLUMNS), *kept]))
    os.replace(partial, path)
    return open(path, "a", newline="")


def load_saved(out, device):
    """The state of the run in out; ValueError if it is damaged, which says so if there is one before it."""
    try:
        return load_checkpoint(out / "ckpt.pt", device)[1]
    except ValueError as error:
        try:
            step = load_checkpoint(out / "ckpt.prev.pt", device)[1]["step"]
        except ValueError:
            raise error from None
        raise ValueError(f"{error}; the checkpoint before it is whole: "
                         f"mv {out}/ckpt.prev.pt {out}/ckpt.pt, then --resume from step {step}") from None


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        device = evaluation.pick_device(args.device)
        ranks = Ranks(device)
        saved = load_saved(args.out, device) if args.resume else None
        chosen = settings(args, device, saved)
        corpus = load_corpus(chosen["data"])
        if saved and corpus.tokenizer != saved["tokenizer"]:
            raise ValueError(f"--resume: the run in {args.out} has tokens of {saved['tokenizer']}, "
                             f"got {corpus.tokenizer} in {chosen['data']}")
        config = TrainConfig(**{f.name: chosen[f.name] for f in fields(TrainConfig)})
        names = [f.name for f in fields(DRTConfig) if f.name != "vocab_size"]
        model_config = DRTConfig(vocab_size=corpus.vocab_size, **{name: chosen[name] for name in names})
        n_needle = 1 if config.needle == "single" else config.n_needle
        task = NeedleTask(model_config.chunk_size, n_needle, config.n_value, config.straddle)
        check(config, task, corpus, ranks.size)
        run = Run(config, model_config, corpus, task, device, args.out, saved, ranks)
        check_space(args.out, sum(p.numel() for p in run.model.parameters()))
        args.out.mkdir(parents=True, exist_ok=True)
        stopped_by = run.train()
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)):
            sys.exit(2)                                         # the first process says why
        parser.error(error)
    if ranks.size > 1:
        dist.destroy_process_group()
    if ranks.rank:
        return
    if stopped_by:
        return print(f"\nStopped by {stopped_by} after step {run.step}; go on with --resume --out {args.out}")
    final_table(args.out, config, corpus, task, device)


def final_table(out, config, corpus, task, device):
    """What the checkpoint can do, on the terminal and in niah.json or ppl.json."""
    (model, saved), hardware = load_checkpoint(out / "ckpt.pt", device), evaluation.hardware(device)
    if config.task == "lm":
        print(f"\nPerplexity of unseen text by context length ({hardware}):")
        rows = evaluation.perplexity({out.absolute().name: model}, corpus, None, None, 0, device)
        return evaluation.save_json(out / "ppl.json", saved["settings"], device, rows)
    print(f"\nNeedles in contexts of up to 1024 times the training length ({hardware}):")
    rows = evaluation.niah(model, corpus, task, evaluation.lengths_from(config.seq_len), None, 0, device)
    evaluation.save_json(out / "niah.json", saved["settings"], device, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
