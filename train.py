"""Train a DRT to find needles in real text, and show that it finds them in contexts 1000 times longer.

    python train.py                                            minutes, with sizes for the CPU or GPU it finds
    python train.py --seed 1 --n_layer 4 --n_group 2 --out out/deep

A plain loop: draw a batch, step, log. The context starts short and doubles whenever the answers are right:
retrieval is learned within minutes when there are few chunks to choose from, and then carries over to many.
Writes to --out: ckpt.pt; log.csv, one row a step; and niah.json, the table it ends with.
"""
import csv
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
from data import TRAINING, VALIDATION, NeedleTask, Parser, load_corpus, needle_batch
from model import DRT, DRTConfig, load_checkpoint, save_checkpoint


@dataclass
class TrainConfig:
    task: str = "niah"              # niah: find needles in a haystack
    needle: str = "multi"           # multi: up to n_needle needles in a context, all asked for; single: one
    n_needle: int = 3
    n_value: int = 6                # bytes in a needle's value
    straddle: bool = False          # True: needles lie anywhere; False: each inside one chunk
    data: str = "stdlib"            # the text they are hidden in: stdlib, or a folder that data.py made
    start_len: int = 64             # tokens in a context at first
    seq_len: int = 128              # tokens in a context at last
    grow_at: float = 0.9            # answer accuracy at which the context doubles
    batch_size: int = 64            # contexts in a batch, and at most ..
    batch_tokens: int = 8192        # .. this many tokens
    steps: int = 480
    lr: float = 4e-3                # peak learning rate
    warmup: int = 50                # steps of linear warm-up; then cosine to a tenth of the peak
    weight_decay: float = 0.001     # on matrices only
    lm_weight: float = 0.3          # of the language-model loss, beside the answers'
    seed: int = 0                   # of the initial weights and of the data
    checkpoint_every: int = 500     # steps between checkpoints; one is always written at the end


# Settings of known runs; README has their numbers. A flag overrides the preset, the preset the default.
PRESETS = {
    "cpu": dict(n_encoder=1),
    "gpu": dict(n_encoder=1, n_embd=128, n_head=8, chunk_size=64, window=64, top_k=8, n_needle=48, n_value=12,
                start_len=512, seq_len=16384, batch_size=128, batch_tokens=65536, steps=3000, lr=2e-3,
                gumbel=False),
}
FIELDS = [f for f in fields(TrainConfig) + fields(DRTConfig) if f.name != "vocab_size"]  # the corpus has that
LOG_EVERY = 25             # steps between reading the metrics back from the GPU, validating and maybe growing
METRICS = ("loss", "answer_loss", "lm_loss", "answer_accuracy", "grad_norm")
COLUMNS = ("step", *METRICS, "lr", "seq_len", "batch_size", "tokens_per_second", "val_accuracy")


# ---------------------------------------------------------------- settings

def make_parser():
    parser = Parser(allow_abbrev=False, description="Train a DRT to find needles in text, then measure it.")
    parser.add_argument("--preset", choices=PRESETS, help="settings of a known run; default: by the device")
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to; default: out")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its settings")
    helps = {}
    for field in FIELDS:
        values = {name: preset.get(field.name, field.default) for name, preset in PRESETS.items()}
        if len(set(values.values())) > 1:
            helps[field.name] = "default: " + ", ".join(f"{value} ({name})" for name, value in values.items())
    parser.add_fields(FIELDS, dict(task=["niah"], needle=["multi", "single"]), helps)
    return parser


def settings(args, device, saved):
    """All settings as one dict: the preset's or the saved run's, under the flags; ValueError if at odds."""
    given = {f.name: getattr(args, f.name) for f in FIELDS if getattr(args, f.name) is not None}
    if saved:
        for name, value in given.items():
            if name not in ("steps", "checkpoint_every") and value != saved["settings"][name]:
                raise ValueError(f"--resume: the run in {args.out} has --{name} {saved['settings'][name]}, "
                                 f"got {value}")
        return saved["settings"] | given
    preset = args.preset or ("gpu" if device.type == "cuda" else "cpu")
    return {f.name: f.default for f in FIELDS} | PRESETS[preset] | given


def check(config, task):
    """ValueError for training settings that cannot work."""
    for name in ("batch_size", "batch_tokens", "steps", "lr", "warmup", "checkpoint_every", "start_len",
                 "seq_len"):
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name} must be positive, got {getattr(config, name)}")
    if config.seed < 0:
        raise ValueError(f"--seed must not be negative, got {config.seed}")
    task.fit(config.seq_len)
    task.fit(min(config.start_len, config.seq_len))


# ---------------------------------------------------------------- one step

def learning_rate(step, config):
    warm = min(1, (step + 1) / config.warmup)
    return config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))


def make_optimizer(model, config):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def draw_batch(text, task, stream, length, batch_size, device):
    """tokens, next tokens and is_answer on the device; stream names the random numbers, as in data.py."""
    arrays = needle_batch(text, task.fit(length), np.random.default_rng(stream), batch_size, length)
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


def train_step(model, optimizer, batch, config):
    """One optimizer step on the answers' loss plus a little of the language model's; METRICS as a tensor."""
    tokens, labels, is_answer = batch
    at = None if config.lm_weight else is_answer
    token_loss, hit = predict(model, tokens, labels, at)
    answer = is_answer.flatten() if at is None else torch.ones_like(hit)
    answer_loss, lm_loss = mean_where(token_loss, answer), mean_where(token_loss, ~answer)
    loss = answer_loss + config.lm_weight * lm_loss
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return torch.stack([loss, answer_loss, lm_loss, mean_where(hit, answer), norm]).detach()


@torch.no_grad()
def validate(model, batch):
    """Answer accuracy on unseen text."""
    model.eval()
    _, hit = predict(model, *batch)
    model.train()
    return hit.float().mean().item()


# ---------------------------------------------------------------- the loop

def train(config, model_config, corpus, task, device, out, saved):
    """Train from scratch or from a saved state; returns the model. One row a step goes to out/log.csv."""
    torch.manual_seed(config.seed)
    model = DRT(model_config).to(device).train()
    optimizer = make_optimizer(model, config)
    step, length = 0, min(config.start_len, config.seq_len)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, length = saved["step"], saved["length"]
        torch.set_rng_state(saved["rng"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"].cpu())

    def save():
        save_checkpoint(out / "ckpt.pt", model, optimizer=optimizer.state_dict(), step=step, length=length,
                        settings=asdict(config) | asdict(model_config), rng=torch.get_rng_state(),
                        cuda_rng=torch.cuda.get_rng_state() if device.type == "cuda" else None)

    metrics, rows, since = [], [], time.perf_counter()
    with open_log(out / "log.csv", step) as file, tqdm(total=config.steps, initial=step, unit="step") as bar:
        log = csv.DictWriter(file, COLUMNS)
        while step < config.steps:
            batch_size = max(1, min(config.batch_size, config.batch_tokens // length))
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = draw_batch(corpus.train, task, (TRAINING, config.seed, step), length, batch_size, device)
            metrics.append(train_step(model, optimizer, batch, config))
            step += 1
            rows.append(dict(step=step, lr=lr, seq_len=length, batch_size=batch_size))
            if step % LOG_EVERY == 0 or step == config.steps:
                values = torch.stack(metrics).tolist()                     # the only wait for the GPU
                seen = sum(row["seq_len"] * row["batch_size"] for row in rows)
                speed = seen / (time.perf_counter() - since)
                for row, value in zip(rows, values, strict=True):
                    row.update(zip(METRICS, value, strict=True), tokens_per_second=speed)
                stream = VALIDATION, config.seed, step
                unseen = draw_batch(corpus.val, task, stream, length, batch_size, device)
                rows[-1]["val_accuracy"] = accuracy = validate(model, unseen)
                log.writerows(rows)
                file.flush()
                bar.set_postfix_str(f"loss {values[-1][0]:.3f}, answers {accuracy:.1%} at {length} tokens, "
                                    f"{speed:,.0f} tokens/s")
                if accuracy >= config.grow_at:
                    length = min(2 * length, config.seq_len)
                metrics, rows, since = [], [], time.perf_counter()
            bar.update()
            if step % config.checkpoint_every == 0 or step == config.steps:
                save()
    return model


def open_log(path, step):
    """log.csv, ready for the row after `step`; rows that a resumed run will write again are dropped."""
    kept = path.read_text().splitlines()[1:step + 1] if step else []
    file = open(path, "w", newline="")
    file.writelines(line + "\n" for line in [",".join(COLUMNS), *kept])
    return file


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        device = evaluation.pick_device(args.device)
        saved = load_checkpoint(args.out / "ckpt.pt", device)[1] if args.resume else None
        chosen = settings(args, device, saved)
        corpus = load_corpus(chosen["data"])
        if corpus.tokenizer != "bytes":
            raise ValueError(f"--data must be prepared with --tokenizer bytes for --task niah, "
                             f"got {corpus.tokenizer} in {chosen['data']}")
        config = TrainConfig(**{f.name: chosen[f.name] for f in fields(TrainConfig)})
        names = [f.name for f in fields(DRTConfig) if f.name != "vocab_size"]
        model_config = DRTConfig(vocab_size=corpus.vocab_size, **{name: chosen[name] for name in names})
        n_needle = 1 if config.needle == "single" else config.n_needle
        task = NeedleTask(model_config.chunk_size, n_needle, config.n_value, config.straddle)
        check(config, task)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(error)
    model = train(config, model_config, corpus, task, device, args.out, saved)
    print(f"\nNeedles in contexts of up to 1024 times the training length ({evaluation.hardware(device)}):")
    rows = evaluation.niah(model, corpus, task, evaluation.lengths_from(config.seq_len), None, 0, device)
    evaluation.save_json(args.out / "niah.json", chosen, device, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
