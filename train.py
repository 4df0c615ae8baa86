"""Train a DRT: to find needles in real text, or as a language model on a corpus.

    python train.py                                            needles, in minutes
    python train.py --seed 1 --n_layer 8 --n_group 2 --out runs/deep
    python train.py --init_from lm/ckpt.pt --data data/code    needles, with a language model's weights
    torchrun --nproc_per_node 8 train.py --preset pg19         a language model of the paper's size, on 8 GPUs

train() below is the loop. Contexts may start short (start_len). For needles they double when most answers are
right: retrieval is learned within minutes when there are few chunks to choose from, and carries over to many.

Writes to --out: ckpt.pt, and the one before it, ckpt.prev.pt; log.csv, one row a step; and the table it ends
with, as JSON. A run that was stopped goes on with --resume, exactly as if it had not been.
"""
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))          # where PYTHONSAFEPATH is set, too

import eval as evaluation
from tools import cli, exits, report
from tools.checkpoint import load_checkpoint, load_optimizer
from tools.reader import Reader
from tools.settings import setup


@dataclass
class TrainConfig:
    task: str = "needles"           # needles: find named values; text: model language; summaries: write them
    data: str = "stdlib"            # the text: stdlib, packages, or a folder that tools.prepare made
    start_len: int = 64             # tokens in a context at first (text: for 40% of the steps); 0: seq_len
    seq_len: int = 128              # tokens in a context (at last)
    batch_size: int = 64            # contexts in a batch, over all GPUs
    batch_tokens: int = 8192        # most tokens in a batch; of long contexts it has fewer, at least one
    micro_batch: int = 0            # contexts that a GPU takes at once, to save memory; 0: all
    steps: int = 750                # updates of the weights
    lr: float = 4e-3                # peak learning rate
    final_lr: float = 0.1           # where the cosine ends, as a share of the peak
    warmup: int = 50                # steps of linear warm-up
    weight_decay: float = 0.001     # on matrices only
    query_gain: float = 1.0         # of the norms of retrieval queries, at first: more makes sharper weights
    encoder_identity: bool = False  # the chunk encoder begins as the identity, and learns what to add
    encoder_lr: float = 1.0         # learning rate of the chunk encoder's layers, as a share of the others'
    seed: int = 0                   # of the initial weights and of the data
    fast: bool = True               # swap pieces for faster ones (fast/); false: the plain files alone
    compile: bool = False           # on a GPU, with fast: torch.compile each layer, which takes a minute
    dtype: str = "auto"             # to compute in; auto: bfloat16 or float16 on a GPU, float32 on a CPU
    validate_every: int = 25        # steps between looks at unseen text, after which the context may grow
    checkpoint_every: int = 500     # steps between checkpoints; one is always written at the end


# Settings by name; docs/ has their numbers. A flag overrides the preset, the preset the default.
LM = dict(task="text", n_layer=12, n_embd=768, n_head=12, chunk_size=64, window=512, top_k=8,
          seq_len=16380, start_len=0,                       # 260 chunks of 63
          batch_size=32, batch_tokens=2 ** 19, lr=2e-3, final_lr=0.2, compile=True, validate_every=250,
          # These are not the paper's: docs/pretraining.md.
          gumbel=False, encoder_identity=True, encoder_lr=0.1)
CODE = LM | dict(data="data/code", n_layer=8, n_embd=384, n_head=6, chunk_size=32, top_k=32, recency=True,
                 query_gain=8, start_len=992, seq_len=8060, batch_tokens=32240, steps=9000, warmup=100,
                 validate_every=400)
PRESETS = {
    "cpu": dict(n_encoder=1, anywhere=True, gumbel=False),
    "gpu": dict(n_layer=4, n_encoder=1, n_embd=128, n_head=8, chunk_size=64, window=64, top_k=8, n_needle=192,
                n_value=12, anywhere=True, start_len=512, seq_len=16384, batch_size=128, batch_tokens=65536,
                steps=3000, lr=2e-3, gumbel=False),
    "multihop": dict(needle="multihop", n_layer=8, n_group=2, n_encoder=1, top_k=8, n_needle=16, n_value=4,
                     start_len=80, seq_len=1024, batch_size=256, batch_tokens=32768, grow_at=0.45, steps=2000,
                     lr=1.5e-3, encoder_rope=False, gumbel=False),
    "code": CODE,
    "code-cpu": LM | dict(data="data/code-cpu", n_layer=4, n_encoder=1, n_embd=64, n_head=4, chunk_size=16,
                          window=32, top_k=8, recency=True, query_gain=8, start_len=240, seq_len=1980,
                          batch_size=8, batch_tokens=1980, steps=2400, lr=4e-3, warmup=100,
                          validate_every=400, compile=False),
    "books": CODE | dict(data="data/books", steps=4500),
    "pg19": LM | dict(data="data/pg19", micro_batch=4, steps=60000, warmup=1200, checkpoint_every=1000,
                      gumbel=True, gca_residual=False),     # these two as in the released code
}


# ---------------------------------------------------------------- the loop

def train(config, model, task, run, saved=None):
    """Draw a batch, forward, backward, step, log, look at unseen text, save. Returns the steps done.

    The model stays in training mode; without gradients, retrieval does not explore (WholeText in model.py).
    """
    ranks, device = run.ranks, run.ranks.device
    dtype = cli.pick_dtype(config.dtype, device)
    autocast = cli.autocast(device, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = make_optimizer(model, config)
    step, length = 0, task.lengths()[0]
    if saved:
        load_optimizer(optimizer, saved["optimizer"])
        scaler.load_state_dict(saved.get("scaler", {}) or scaler.state_dict())     # {}: it was not float16
        step, length = saved["step"], saved["length"]
    objective = ranks.objective(model, task.loss, config)       # task.loss(model, *batch), for all processes
    done = step >= config.steps
    with run.start(step):
        while not done:
            # A batch: tokens, labels (contexts, length), .. What is random depends on seed, step and rank.
            n_context = max(1, min(config.batch_size, config.batch_tokens // length))
            batch, shares = ranks.share(task.batch(step, length, n_context))
            noise = np.random.SeedSequence([config.seed, step, ranks.rank])     # of retrieval
            torch.manual_seed(int(noise.generate_state(1)[0]))

            # Forward and backward, for as many contexts at once as fit. Each label counts the same.
            size = config.micro_batch or len(batch[0])
            starts = range(0, len(batch[0]), size)
            metrics = {}                                                # the loss, and the task's METRICS
            for i in starts:
                objective.require_backward_grad_sync = i == starts[-1]  # DDP's: gradients travel once
                with autocast:
                    loss, numbers = objective(*(x[i:i + size] for x in batch))
                share = float(shares[i:i + size].sum())
                scaler.scale(loss * share).backward()
                for name, x in dict(loss=loss, **numbers).items():
                    metrics[name] = metrics.get(name, 0) + x.detach() * share

            # Update the weights. A step whose gradient is not finite changes nothing.
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("share", 1.0)             # old checkpoints have none
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            skipped = (~grad_norm.isfinite()).float()
            optimizer.found_inf = skipped           # fused AdamW looks at it, where scaler.step() would wait
            optimizer.step()
            scaler.update()
            optimizer.zero_grad()
            step += 1

            # Look at unseen text, log, save.
            done = step == config.steps or run.stopped()
            score = None
            if step % config.validate_every == 0 or step == config.steps:
                with autocast:
                    score = task.score(model, step, length, n_context)
            run.log(dict(step=step, lr=lr, seq_len=length, batch_size=n_context),
                    dict(metrics, grad_norm=grad_norm, skipped=skipped), score)
            length = task.next_length(length, step, score)
            if step % config.checkpoint_every == 0 or done:
                run.save(model, optimizer, step=step, length=length, tokenizer=task.corpus.tokenizer,
                         settings=task.settings | asdict(model.config), scaler=scaler.state_dict(),
                         contents=task.corpus.contents)
    return step


def learning_rate(step, config):
    """Linear warm-up, and a cosine to final_lr of the peak (Sec. 4)."""
    warm, share = min(1, (step + 1) / config.warmup), config.final_lr
    return config.lr * warm * (share + (1 - share) * (1 + math.cos(math.pi * step / config.steps)) / 2)


def make_optimizer(model, config):
    """AdamW with the paper's settings, but weight decay on matrices only; encoder layers may learn slower."""
    groups = {(share, is_matrix): dict(params=[], share=share, weight_decay=config.weight_decay * is_matrix)
              for share in (1.0, config.encoder_lr) for is_matrix in (True, False)}
    for name, p in model.named_parameters():
        share = config.encoder_lr if name.startswith("encoder.layers.") else 1.0
        groups[share, p.dim() >= 2]["params"].append(p)
    groups = [group for group in groups.values() if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


# ---------------------------------------------------------------- from the command line to the final table

@exits.program
def main(argv=None):
    config, model, task, run, saved = setup(TrainConfig, PRESETS, argv)
    step = train(config, model, task, run, saved)
    run.finish(step)                        # does not return if a signal stopped the run
    if run.first:
        final_table(run.out, task, run.ranks.device, config)


def final_table(out, task, device, config):
    """What the checkpoint can do, on the terminal and in niah.json, ppl.json or summaries.json."""
    model, saved = load_checkpoint(out / "ckpt.pt", device)
    exits.say(f"\n{out}/ckpt.pt and log.csv are written; now to {task.REPORT}, which eval.py can make again.")
    exits.say(f"{task.TITLE} ({report.hardware(device)}):")
    read = Reader(device, cli.pick_dtype(config.dtype, device), config.fast)
    rows = evaluation.measure(task, {out.absolute().name: model}, read)
    report.save_report(out / task.REPORT, saved["settings"] | task.measured_on(), device, rows)
    exits.say(f"{out}/{task.REPORT} is written.")


if __name__ == "__main__":
    main(sys.argv[1:])
