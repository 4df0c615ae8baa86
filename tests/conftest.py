"""Runs that many tests look at; and Triton's interpreter where there is no GPU."""
import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:             # as many processes as cores: a thread for each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # before anything imports triton

from helpers import TEXT_FLAGS, TINY_FLAGS, command  # noqa: E402
from stand_in import cuda_graphs  # noqa: E402, F401


@pytest.fixture(scope="session")
def needle_run(tmp_path_factory):
    """The folder of a needle run of 20 steps, and what it printed."""
    out = tmp_path_factory.mktemp("needles")
    flags = *TINY_FLAGS, "--n_value", 1, "--n_needle", 8, "--steps", 20, "--seq_len", 64
    return out, command("train.py", "--out", out, *flags).stdout


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """The folder of a language-model run of 40 steps."""
    out = tmp_path_factory.mktemp("text")
    assert "bits_per_byte" in command("train.py", "--out", out, *TEXT_FLAGS).stdout
    return out
