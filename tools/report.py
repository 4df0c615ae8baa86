"""Tables on the terminal, and reports as JSON: what was measured, and on what."""
import json
import platform
import resource
import subprocess
from pathlib import Path

import numpy as np
import torch

from fast.files import atomic_file
from gca import triton
from tools.exits import say, visible


def hardware(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def peak_memory(device):
    gpu = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else 0.0
    return dict(peak_gpu_gib=gpu, peak_cpu_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)


def print_table(rows):
    """Rows are dicts with the same keys; the keys are the header. GPU memory only where there is a GPU."""
    def text(x):
        if isinstance(x, str):
            return visible(x)
        if isinstance(x, int):
            return f"{x:,}"
        return f"{x:.4g}" if x >= 1e12 else f"{x:,.0f}" if x >= 1000 else f"{x:.2f}"

    names = [name for name in rows[0] if name != "peak_gpu_gib" or any(row[name] for row in rows)]
    table = [names] + [[text(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        say("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def save_report(path, settings, device, rows):
    """Write what was measured, and on what, as JSON; whole, or not at all."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                    triton=triton and triton.__version__)
    report = dict(settings=settings, hardware=hardware(device), versions=versions, commit=commit(), rows=rows)
    with atomic_file(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())


def commit():
    """The commit of this checkout, with a + if files have changed since; None outside of a checkout."""
    line = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:                        # without locks: killed, git would leave one in the checkout
        done = subprocess.run(line, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
        head, *others = done.stdout.splitlines()                        # "# branch.oid ..", and changed files
        return head.split()[2][:12] + "+" * any(not line.startswith("#") for line in others)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
