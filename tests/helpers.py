"""What several test files use."""
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from model import DRT, DRTConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parent.parent
TEXT = 15                                   # text tokens in a chunk of the default configuration
TINY_FLAGS = f"""--preset cpu --n_embd 16 --n_head 1 --top_k 2 --batch_size 4 --warmup 2
                 --device {DEVICE.type}""".split()
TEXT_FLAGS = [*TINY_FLAGS, *"""--task text --gumbel true --seq_len 100 --steps 40 --checkpoint_every 7
                               --validate_every 20""".split()]


def tiny(seed=0, **config):
    """A small model, ready to read."""
    torch.manual_seed(seed)
    model = DRT(DRTConfig(**dict(n_encoder=1) | config)).to(DEVICE).eval()
    if model.config.recency:
        model.decay.data = torch.linspace(0.4, 0.8, config.get("n_group", 1)).to(DEVICE)        # begins at 0
    return model


def random_tokens(*shape):
    return torch.randint(256, shape, device=DEVICE)


def command(*arguments, status=0):
    """Run `python ARGUMENTS` in the repository; it must end with this exit status."""
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done


def trained(out, *flags):
    """Train in this process; the rows of its log."""
    train.main(["--out", str(out), *map(str, flags)])
    return log_of(out)


def log_of(folder):
    """The rows of its log.csv, less what depends on the machine's speed."""
    speed = ("tokens_per_second", "mfu", "gpu_gib")
    return [{name: x for name, x in row.items() if name not in speed}
            for row in csv.DictReader(open(folder / "log.csv"))]


def refused(capsys, main, *arguments):
    """What main() says of a user's mistake: its last line is `error: ..`, and the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.splitlines()[-1].startswith("error: ")
    return error
