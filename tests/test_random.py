"""Random cases: what must hold for all inputs, on inputs that nobody thought of.

CASES=25 python -m pytest tests/test_random.py tries 25 times as many, others each time.
"""
import os
from functools import partial

import numpy as np
import pytest
import torch

import fast
import fast.stream as stream
import train
from fast.memory import Memory
from helpers import random_tokens, tiny
from model import DRTConfig, retrieval_scores, retrieve
from tasks.haystack import NAME, Haystack, random_starts
from tasks.needles import NeedleConfig
from tasks.text import window_batch
from test_gca import assert_matches, inputs, kernel, needs_triton
from tools import settings
from tools.checkpoint import shapes

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import strategies as st  # noqa: E402


def cases(number, **strategies):
    """Run a test on this many random cases."""
    options = hypothesis.settings(
        max_examples=number * int(os.environ.get("CASES", 1)), derandomize="CASES" not in os.environ,
        deadline=None, database=None, suppress_health_check=[*hypothesis.HealthCheck])
    return lambda test: options(hypothesis.given(**strategies)(test))


numbers, SEEDS = st.integers, st.integers(0, 2 ** 31)


@needs_triton
@cases(40, seed=SEEDS, B=numbers(1, 2), Cq=numbers(1, 3), Sq=numbers(1, 20), heads=numbers(1, 2),
       group=numbers(1, 2), Ck=numbers(1, 4), Sk=numbers(1, 20), K=numbers(1, 4), softmax_one=st.booleans(),
       backend=st.sampled_from(["triton", "fast"]))
def test_kernels(seed, B, Cq, Sq, heads, group, Ck, Sk, K, softmax_one, backend):
    torch.manual_seed(seed)
    tensors = inputs(B=B, Cq=Cq, Sq=Sq, Hq=heads * group, Hkv=heads, Ck=Ck, Sk=Sk, K=K)
    assert_matches(lambda *x: kernel(*x, backend=backend), tensors, softmax_one, tolerance=1e-5)


@cases(120, seed=SEEDS, B=numbers(1, 3), C=numbers(1, 60), K=numbers(1, 9), split=numbers(0, 60),
       ties=st.booleans())
def test_retrieval_in_blocks(seed, B, C, K, split, ties):
    """Also among equal scores: whole numbers have many, and no rounding."""
    torch.manual_seed(seed)
    query, landmarks = torch.randn(2, B, C, 4)
    if ties:
        query, landmarks = query.round(), landmarks.round()
    split = min(split, C)
    pages = [x for x in landmarks.split([split, C - split], dim=1) if x.shape[1]]
    chunk = torch.arange(C)
    weights, indices = stream.retrieve(partial(retrieval_scores, query), range(C), pages, K)
    wanted_weights, wanted = retrieve(retrieval_scores(query, landmarks, chunk, chunk), K)
    if ties:
        assert torch.equal(indices, wanted)
    torch.testing.assert_close(weights, wanted_weights, atol=1e-5, rtol=1e-4)


@cases(100, seed=SEEDS, n_group=numbers(0, 2), n_encoder=numbers(1, 2), top_k=numbers(1, 5),
       chunk_size=numbers(2, 12), window=numbers(1, 20), kv=st.sampled_from([1, 2]), B=numbers(1, 3),
       pieces=st.lists(numbers(1, 40), min_size=1, max_size=6), fork=st.booleans())
def test_reading_in_pieces(seed, n_group, n_encoder, top_k, chunk_size, window, kv, B, pieces, fork):
    model = tiny(seed, n_layer=4, n_group=n_group, n_encoder=n_encoder, top_k=top_k, chunk_size=chunk_size,
                 window=window, n_kv_head=kv, n_head=2, n_embd=16)
    tokens, memory, logits = random_tokens(B, sum(pieces)), Memory(model, B), []
    for piece in tokens.split(pieces, dim=1):
        if fork:
            other, memory = memory, memory.fork()
            fast.read(model, random_tokens(B, 5), other)
        logits.append(fast.read(model, piece, memory))
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens)[0], atol=1e-4, rtol=0)


@cases(100, length=numbers(0, 200), at=numbers(0, 10 ** 9), cut=st.booleans(), bit=numbers(0, 7))
def test_memory_files(length, at, cut, bit, tmp_path):
    """Cut anywhere, or with any one bit flipped: refused in words, or what was saved comes back."""
    model, path = tiny(n_embd=16, n_head=1), tmp_path / "memory"
    memory, tokens = Memory(model), random_tokens(1, length + 1)
    if length:
        fast.read(model, tokens[:, :length], memory)
    memory.save(path)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] ^= 1 << bit
    path.write_bytes(data[:at] if cut else data)
    try:
        loaded = Memory.load(path, model)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        expected, got = (fast.read(model, tokens[:, length:], x) for x in (memory, loaded))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@cases(600, seed=SEEDS, length=numbers(30, 400), chunk_size=numbers(12, 40), n_needle=numbers(1, 9),
       n_value=numbers(1, 9), anywhere=st.booleans())
def test_needles(seed, length, chunk_size, n_needle, n_value, anywhere):
    """Every question has one needle of its name before it, and is followed by its value."""
    hypothesis.assume(chunk_size >= NAME + n_value + 4)
    n_needle = min(n_needle, (length - 1 - n_value) // (2 * (chunk_size - 1)))
    hypothesis.assume(n_needle >= 1)
    text, rng = np.full(1000, ord("."), np.uint8), np.random.default_rng(seed)
    x, y, at = Haystack(chunk_size - 1, n_value, anywhere=anywhere).batch(text, rng, 2, length, n_needle)
    assert x.shape == y.shape == (2, length) and (x[:, 1:] == y[:, :-1]).all()
    values = np.take_along_axis(y, at, 1).reshape(2, n_needle, n_value)
    for row, answers in zip(x, values, strict=True):
        context = bytes(row.tolist())
        asked = [context[i + 2:i + 2 + NAME] for i in range(length) if context[i:i + 2] == b"|?"]
        assert len(set(asked)) == n_needle
        for name, answer in zip(asked, answers.tolist(), strict=True):
            needle = b"|" + name + b":" + bytes(answer) + b"|"
            assert context.count(needle) == 1 and len(set(answer)) == n_value
            assert context.index(needle) < context.index(b"|?" + name)
            assert anywhere or (context.index(needle) % (chunk_size - 1) + len(needle)) <= chunk_size - 1


@cases(300, seed=SEEDS, rows=numbers(1, 5), n=numbers(1, 8), room=numbers(0, 50), size=numbers(1, 9))
def test_stretches_do_not_overlap(seed, rows, n, room, size):
    starts = np.sort(random_starts(np.random.default_rng(seed), rows, n, room + n * size, size), axis=1)
    assert starts.min() >= 0 and starts.max() + size <= room + n * size
    assert (np.diff(starts) >= size).all()


@cases(300, n_token=numbers(2, 300), length=numbers(1, 60), batch=numbers(1, 7), seed=numbers(0, 9))
def test_windows(n_token, length, batch, seed):
    """An epoch reads every window once, whatever the batches."""
    hypothesis.assume(n_token > length)
    text, n = np.arange(n_token), (n_token - 1) // length
    starts = [int(x[0]) for first in range(0, 2 * n, batch)
              for x in window_batch(text, seed, first, batch, length)[0]][:2 * n]
    for epoch in (starts[:n], starts[n:]):
        assert sorted(epoch) == [i * length for i in range(n)]


FLAGS = [*settings.default_settings(train.TrainConfig)]
VALUES = "0 1 2 3 7 16 64 100 0.5 1e9 nan -1 true false x inf 9999999999 learned last needles text".split()


@cases(500, flags=st.dictionaries(st.sampled_from(FLAGS), st.sampled_from([*VALUES, ""]), max_size=4))
def test_command_lines(flags):
    """Whatever is given: settings that a model can be made of, or one line."""
    line = [x for name, value in flags.items() for x in (f"--{name}", value)]
    try:
        args = settings.make_parser(train.TrainConfig, train.PRESETS).parse_args(["--preset", "cpu", *line])
        chosen = settings.settings(args, train.TrainConfig, train.PRESETS["cpu"])
        settings.check_ranges(chosen)
        config = settings.pick(DRTConfig, chosen, vocab_size=256)
        settings.pick(NeedleConfig, chosen)
    except SystemExit as stop:
        assert stop.code == 2
    except ValueError as error:
        assert any(name in str(error) for name in flags) and "\n" not in str(error)
    else:
        assert shapes(config)
