"""Runs that many tests look at; and Triton's interpreter where there is no GPU."""
import fcntl
import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:             # as many processes as cores: a thread for each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # before anything imports triton

import train  # noqa: E402
from helpers import TEXT_FLAGS, TINY_FLAGS, command  # noqa: E402
from stand_in import cuda_graphs  # noqa: E402, F401


@pytest.fixture
def no_table(monkeypatch):
    """Training ends without its table."""
    monkeypatch.setattr(train, "final_table", lambda *_: None)


@pytest.fixture(scope="session")
def needle_run(request, tmp_path_factory):
    """The folder of a needle run of 20 steps, and what it printed. To be read only."""
    flags = *TINY_FLAGS, "--n_value", 1, "--n_needle", 8, "--steps", 20, "--seq_len", 64
    return run_once(request, tmp_path_factory, "needles", flags)


@pytest.fixture(scope="session")
def text_run(request, tmp_path_factory):
    """The folder of a language-model run of 40 steps. To be read only."""
    out, printed = run_once(request, tmp_path_factory, "text", TEXT_FLAGS)
    assert "bits_per_byte" in printed
    return out


def run_once(request, tmp_path_factory, name, flags):
    """A run for all of xdist's workers: the first one that needs it trains it, the others wait."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):      # this is one of several workers: what they have in common
        folder = folder.parent
    out, printed = folder / name, folder / f"{name}.txt"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            text = command("train.py", "--out", out, *flags).stdout
            printed.write_text(text, encoding="utf-8")
    return out, printed.read_text(encoding="utf-8")
