"""What all command lines share: flags from dataclasses, mistakes in one line, tables and reports."""
import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from gca import triton


class Parser(argparse.ArgumentParser):
    """A user's mistake ends in one line, `error: ..`, and exit status 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        sys.stdout.flush()
        self.exit(2, f"error: {message}\n")

    def add_fields(self, fields, choices=None, helps=None):
        """A flag for each field of a dataclass, None where it is not given."""
        for field in fields:
            kind = boolean if type(field.default) is bool else type(field.default)
            self.add_argument(f"--{field.name}", type=kind, choices=(choices or {}).get(field.name),
                              help=(helps or {}).get(field.name, f"default: {field.default}"))


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


@contextmanager
def mistakes_in_one_line(parser):
    """What runs in here may raise ValueError or OSError for a user's mistake."""
    try:
        yield
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)):
            sys.exit(2)                                         # the first process of a group says why
        parser.error(error)


def pick_device(name):
    """'auto' is the GPU if there is one. ValueError for a GPU that there is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name) if name in ("cpu", "cuda") else None
    if device is None or device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device must be auto, cpu, or cuda on a machine with a GPU, got {name!r}")
    return device


def hardware(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(rows):
    """Rows are dicts with the same keys; the keys are the header."""
    def text(x):
        if isinstance(x, str):
            return x
        return f"{x:,}" if isinstance(x, int) else f"{x:,.0f}" if x >= 1000 else f"{x:.2f}"

    table = [list(rows[0])] + [[text(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def check_folder(flag, path):
    """ValueError if there is no folder to write this file to; None is no file."""
    if path and not path.absolute().parent.is_dir():
        raise ValueError(f"{flag}: no folder {path.parent} to write {path.name} to")


def save_report(path, settings, device, rows):
    """Write what was measured, and on what, as JSON."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                    triton=triton and triton.__version__)
    report = dict(settings=settings, hardware=hardware(device), versions=versions, commit=commit(), rows=rows)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def commit():
    """The commit of this checkout, with a + if files have changed since; None outside of a checkout."""
    here = Path(__file__).parent
    try:
        line = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(line, cwd=here, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
