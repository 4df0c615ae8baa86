"""What a long training run needs around its loop: processes, signals, checkpoints, exact resume, log.csv.

train.py's loop calls the methods of Run. All that is random in training is a function of seed, step and rank.
So a checkpoint (tools/checkpoint.py) holds weights, optimizer, step and context length, and a resumed run
goes on as if it had not stopped.
"""
import csv
import errno
import fcntl
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fast import training
from fast.files import atomic_file
from gca import Mistake, require
from model import NO_LABEL
from tools import exits
from tools.checkpoint import save_checkpoint

LINE_EVERY = 30            # seconds between lines of progress in a log file
LOG_EVERY = 25             # steps between reading the metrics back from the GPU, which waits for it
BAD_STEPS = 10             # in a row, without a finite loss and gradient: the run ends
PEAK_FLOPS = dict(H100=989e12, H200=989e12, A100=312e12)    # dense bf16, by the vendor's data sheets


# ---------------------------------------------------------------- its folder

def prepare_folder(out, resume):
    """Make the folder of a run and lock it; a run that is there already is moved aside, unless it resumes.

    Returns what holds the lock. ValueError if another process writes there.
    """
    try:
        out.resolve()
    except RuntimeError as error:                       # before Python 3.13
        raise Mistake(f"--out: {out} is a link that leads to itself") from error
    require(not out.exists() or out.is_dir(), f"--out: {out} must be a folder, it is a file")
    if not resume and holds_run(out):
        folder, around_us = out.resolve(), [Path.cwd(), *Path.cwd().parents]            # where a link leads
        # Not while a run is writing there, or to a folder inside; and no two processes at a time.
        locks = [lock(path.parent) for path in {folder / ".lock", *folder.rglob(".lock")}]
        require(holds_run(out), f"--out: another run is writing to {out}")
        require(folder not in around_us, f"--out: {out} holds a run, and this is the current folder")
        number = next(i for i in range(1, 10 ** 9) if not folder.with_name(f"{folder.name}.{i}").exists())
        aside = folder.with_name(f"{folder.name}.{number}")
        try:
            folder.rename(aside)
        except OSError as error:
            raise Mistake(f"--out: {out} holds a run and cannot be moved aside ({error.strerror}): "
                          "give another folder, or move what it holds") from error
        for file in locks:
            file.close()
        exits.say(f"the run that was in {out} is now in {aside}")
    out.resolve().mkdir(parents=True, exist_ok=True)
    return lock(out)


def holds_run(out):
    return any((out / name).exists() for name in ("ckpt.pt", "log.csv"))


def lock(out):
    try:
        file = open(out / ".lock", "w")
    except FileNotFoundError:                   # another process has just moved the folder
        raise Mistake(f"--out: another run is writing to {out}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:                    # any other: a file system that has no locks
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise Mistake(f"--out: another run is writing to {out}") from None
    return file


# ---------------------------------------------------------------- several processes

class Ranks:
    """What torchrun says of this process: number `rank` of `size`. Without it, the only one."""

    def __init__(self, device):
        rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        is_group = rank is not None or size is not None
        if is_group:
            require(rank and size and rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
                    and (size == "1" or {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}),
                    "RANK and WORLD_SIZE must be torchrun's: start several processes with torchrun")
        self.rank, self.size = int(rank or 0), int(size or 1)
        self.device = device
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            with exits.default_signals():                 # it waits in C++ for the others
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def mean(self, x):
        """The mean over all processes, in place; every one of them must call it."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def share(self, batch):
        """This process's rows of a batch (numpy arrays), as tensors on the device.

        And each row's share of all labels, times the number of processes, over which gradients are averaged.
        """
        n = len(batch[0]) // self.size
        rows = slice(self.rank * n, (self.rank + 1) * n)
        n_label = (batch[1] != NO_LABEL).sum(1)
        shares = n_label[rows] / max(1, n_label.sum()) * self.size
        tensors = [torch.from_numpy(x[rows]) for x in batch]
        if self.device.type == "cuda":
            tensors = [x.pin_memory() for x in tensors]         # from there, the copy waits for nothing
        return [x.to(self.device, non_blocking=True) for x in tensors], shares

    def objective(self, model, loss, config):
        """A function that computes loss(model, *batch), with gradients averaged over all processes."""
        if training.in_words(model, config):
            return training.GraphedObjective(Objective(model, loss))
        if self.size > 1:
            find_unused = model.config.retriever != "learned"
            return DistributedDataParallel(Objective(model, loss), find_unused_parameters=find_unused)
        return partial(loss, model)


class Objective(nn.Module):
    """Model and loss in one, which is what DistributedDataParallel wraps."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch):
        return self.loss(self.model, *batch)


# ---------------------------------------------------------------- a run

class Run:
    """The folder of a run and what is written there; the signals that stop it; the progress bar."""

    def __init__(self, out, ranks, n_step, task, flops_per_token):
        self.out, self.ranks, self.n_step, self.flops_per_token = out, ranks, n_step, flops_per_token
        self.first = ranks.rank == 0            # the process that writes
        self.columns = ("step", "loss", *task.METRICS, "grad_norm", "skipped", "lr", "seq_len", "batch_size",
                        "tokens_per_second", "mfu", "gpu_gib", *task.SCORES)
        self.rows, self.bad, self.signal = [], 0, None

    def start(self, step):
        """Open log.csv for the row after `step` and catch signals; use as a context."""
        path = self.out / "log.csv"
        self.file = open_log(path, self.columns, step) if self.first else open(os.devnull, "w")
        self.catching = exits.signals(self.catch)
        self.catching.__enter__()
        self.table = csv.DictWriter(self.file, self.columns, lineterminator="\n")
        self.in_lines = not sys.stderr.isatty()         # in a log file: a line now and then, instead of a bar
        self.bar = tqdm(total=self.n_step, initial=step, unit="step", disable=not self.first,
                        file=open(os.devnull, "w") if self.in_lines else exits.BestEffort(sys.stderr))
        self.since = self.last_line = time.perf_counter()
        return self

    def catch(self, number):
        self.signal = signal.Signals(number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.catching.__exit__(None, None, None)
        self.bar.close()
        self.file.close()

    def stopped(self):
        """Whether a signal came, to any of the processes: all of them stop, or none."""
        if self.ranks.size == 1:
            return self.signal is not None
        return self.ranks.mean(torch.tensor(float(self.signal is not None))).item() > 0

    def log(self, row, metrics, scores):
        """A row of log.csv: numbers, and metrics as tensors, which are not waited for yet.

        Rows are written together, now and then; scores (None, or a dict) go with the last one.
        """
        self.rows.append(row | metrics)
        self.bar.update()
        if scores or row["step"] % LOG_EVERY == 0:
            self.flush(scores or {})

    def flush(self, scores):
        """Wait for the metrics of all rows so far, and write them: means over all processes."""
        if not self.rows:
            return
        names = [name for name, x in self.rows[0].items() if torch.is_tensor(x)]
        values = torch.stack([torch.stack([row[name] for name in names]) for row in self.rows])
        values = self.ranks.mean(values).tolist()
        n_token = sum(row["seq_len"] * row["batch_size"] for row in self.rows)
        speed = n_token / (time.perf_counter() - self.since)
        cuda = self.ranks.device.type == "cuda"
        gpu_gib = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else None
        lost, mfu = 0, utilization(self.ranks.device, speed / self.ranks.size * self.flops_per_token)
        for row, numbers in zip(self.rows, values, strict=True):
            row.update(zip(names, numbers, strict=True))
            row.update(tokens_per_second=speed, mfu=mfu, gpu_gib=gpu_gib)
            self.bad = self.bad + 1 if row["skipped"] else 0
            lost = row["step"] if self.bad == BAD_STEPS else lost
        self.rows[-1].update(scores)
        self.show(self.rows[-1], scores)
        try:
            self.table.writerows(self.rows)
            self.file.flush()
        except OSError as error:                        # a full disk
            error.filename = str(self.out / "log.csv")
            raise
        self.rows, self.since = [], time.perf_counter()
        require(not lost, f"loss or gradient were not finite in {BAD_STEPS} steps in a row, up to step "
                f"{lost}; none of them changed the model: try a lower --lr")

    def show(self, row, scores):
        news = [f"contexts of {row['seq_len']}, loss {row['loss']:.3f}"]
        news += [f"{name} {value:.3f}" for name, value in scores.items()]
        news.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        if row["mfu"]:
            news.append(f"{row['mfu']:.0f}% MFU, {row['gpu_gib']:.0f} GiB")
        self.bar.set_postfix_str(", ".join(news), refresh=False)
        now, is_last = time.perf_counter(), row["step"] == self.n_step
        if self.first and self.in_lines and (is_last or now >= self.last_line + LINE_EVERY):
            exits.say(self.bar, sys.stderr)
            self.last_line = now

    def save(self, model, optimizer, **state):
        """A checkpoint, by the first process. Weights that are not finite never replace a good one."""
        self.flush({})
        finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
        require(finite, f"the weights are not finite after step {state['step']}: the checkpoint before it "
                "stays; try a lower --lr")
        if self.first:
            save_checkpoint(self.out / "ckpt.pt", model, optimizer=optimizer.state_dict(), **state)

    def finish(self, step):
        """After the loop: leave the group of processes, and the program if a signal stopped the run."""
        if self.ranks.size > 1:
            dist.destroy_process_group()
        if step < self.n_step or self.signal:                   # it may come after the last step
            name = self.signal.name if self.signal else "a signal to another process"
            exits.say(f"\nStopped by {name} after step {step}; go on with --resume --out {self.out}")
            sys.exit(128 + (self.signal or signal.SIGTERM))


def open_log(path, columns, step):
    """log.csv, ready for the row after `step`; rows that a resumed run will write again are dropped."""
    text = path.read_text(encoding="utf-8", errors="replace") if step and path.exists() else ""
    header, *lines = text.splitlines() or [""]
    require(header == ",".join(columns) or not header.startswith("step,"),
            f"--resume: {path} must have the columns that train.py writes now, and another version wrote it: "
            "train anew, or rename it to go on without its rows")
    kept = []
    for line in lines[:step]:
        cells = line.split(",")
        if len(cells) != len(columns) or cells[0] != str(len(kept) + 1):
            break                               # cut, or not ours: what follows is left out, too
        kept.append(line)
    if len(kept) < step:
        exits.say(f"{path} has {len(kept)} of the {step} rows before this step; it goes on without "
                  "the others")
    with atomic_file(path) as file:
        file.write("".join(line + "\n" for line in [",".join(columns), *kept]).encode())
    return open(path, "a", newline="")


# ---------------------------------------------------------------- how fast

def flops_per_token(config, n_matrix, seq_len):
    """Of training: 6 for each weight of a matrix, and attention's: 12 d for each key that a token sees."""
    keys = config.n_layer * min(config.window, seq_len)
    if config.n_group:
        keys += config.n_layer // 2 * config.top_k * config.chunk_size + config.n_encoder * config.chunk_size
    return 6 * n_matrix + 12 * config.n_embd * keys


def utilization(device, flops):
    """Model FLOPs utilization in percent, or None where the peak is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((100 * flops / peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)
