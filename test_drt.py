"""The model, the needle task, training and evaluation: what each promises, on the GPU if there is one."""
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"    # as test_gca.py needs it, before either imports triton

import eval as evaluation  # noqa: I001
import model as model_module
import train as train_module
from data import NeedleTask, decode_bytes, encode_bytes, load_corpus, needle_batch
from inference import ChunkCache, Page, sample
from model import (
    DRT,
    DRTConfig,
    Grid,
    Memory,
    alibi_slopes,
    band_bias,
    banded_attention,
    dense_attention,
    load_checkpoint,
    one_query_attention,
    retrieve,
    save_checkpoint,
    window_attention,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = Path(__file__).parent
TEXT = 15                                   # text tokens in a chunk of the default configuration


def tiny(seed=0, **config):
    torch.manual_seed(seed)
    return DRT(DRTConfig(n_encoder=1, **config)).to(DEVICE).eval()


def random_tokens(*shape):
    return torch.randint(256, shape, device=DEVICE)


# ---------------------------------------------------------------- sliding-window attention

@pytest.mark.parametrize("n, past, window, heads", [
    (50, 0, 16, (4, 4)), (50, 16, 16, (4, 2)), (33, 5, 16, (6, 3)), (16, 16, 16, (2, 1)),
    (300, 64, 64, (3, 1)), (1, 7, 16, (4, 4)), (400, 0, 130, (4, 2)), (400, 130, 130, (2, 2))])
def test_window_attention_is_softmax_over_the_window_with_alibi(n, past, window, heads):
    torch.manual_seed(0)
    q = torch.randn(2, heads[0], n, 16)
    k, v = torch.randn(2, 2, heads[1], n + past, 16)
    slopes, out = alibi_slopes(heads[0]), torch.empty(2, heads[0], n, 16)
    for h in range(heads[0]):
        for i in range(n):
            seen = slice(max(0, past + i - window + 1), past + i + 1)
            keys, values = (x[:, h * heads[1] // heads[0], seen] for x in (k, v))
            distance = torch.arange(keys.shape[1] - 1, -1, -1)
            scores = (keys @ q[:, h, i, :, None]).squeeze(-1) / 4 - slopes[h] * distance
            out[:, h, i] = (scores.softmax(-1)[:, None] @ values).squeeze(1)
    arguments = [x.to(DEVICE) for x in (q, k, v)] + [window, slopes.to(DEVICE)]
    for function in (dense_attention, window_attention) + ((banded_attention,) if n > window else ()):
        torch.testing.assert_close(function(*arguments).cpu(), out, atol=2e-5, rtol=1e-4)
    if past <= window:                                      # the last query alone, as in generation
        k, v = (x[:, :, -window - 1:] for x in arguments[1:3])
        bias = band_bias(1, window + 1, window, slopes)[:, 0].to(DEVICE)
        last = one_query_attention(arguments[0][:, :, -1:], k, v, bias)
        torch.testing.assert_close(last.cpu(), out[:, :, -1:], atol=2e-5, rtol=1e-4)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0 ** -i for i in range(1, 9)]
    assert len(alibi_slopes(12)) == 12 and len(set(alibi_slopes(12).tolist())) == 12


# ---------------------------------------------------------------- retrieval

def test_a_chunk_retrieves_the_best_strictly_earlier_chunks():
    torch.manual_seed(0)
    query, landmarks = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    weights, indices = retrieve(query, [landmarks], 0, 3)
    for b in range(2):
        for t in range(9):
            scores = landmarks[b, :t] @ query[b, t] / math.sqrt(8)
            best = scores.topk(min(3, t))
            empty = 3 - min(3, t)
            assert indices[b, t].tolist() == best.indices.tolist() + [-1] * empty
            torch.testing.assert_close(weights[b, t], F.pad(best.values.softmax(0), (0, empty)))


def test_gumbel_noise_changes_the_choice_but_not_the_weights():
    torch.manual_seed(0)
    query, landmarks = torch.randn(1, 40, 8), torch.randn(1, 40, 8)
    _, quiet = retrieve(query, [landmarks], 0, 4)
    weights, indices = retrieve(query, [landmarks], 0, 4, gumbel=True)
    assert (indices[0, 5:] != quiet[0, 5:]).any()
    assert (indices < torch.arange(40)[:, None]).all()
    scores = (query @ landmarks.mT / math.sqrt(8)).gather(-1, indices.clamp(min=0))
    wanted = scores.masked_fill(indices < 0, -1e9).softmax(-1).masked_fill(indices < 0, 0)
    torch.testing.assert_close(weights, wanted)


def test_retrieval_in_blocks_is_one_big_retrieval(monkeypatch):
    """Also in several pages, and with the bundles that spare sorting all scores."""
    query, landmarks = torch.randn(2, 20, 8), torch.randn(2, 500, 8)
    scores = (query @ landmarks.mT / math.sqrt(8)).masked_fill(
        torch.arange(500) >= torch.arange(480, 500)[:, None], float("-inf"))
    best = scores.topk(4)
    monkeypatch.setattr(model_module, "MAX_SCORES", 40 * 100)
    monkeypatch.setattr(model_module, "BUNDLE", 3)
    weights, indices = retrieve(query, landmarks.split([170, 0, 310, 20], dim=1), 480, 4)
    assert torch.equal(indices, best.indices)
    torch.testing.assert_close(weights, best.values.softmax(-1))


@pytest.mark.parametrize("n", [1, 7, 191, 192, 193, 1000])
def test_top_finds_the_largest(n, monkeypatch):
    monkeypatch.setattr(model_module, "BUNDLE", 3)
    x = torch.randn(5, n).round(decimals=1)                                        # with ties
    torch.testing.assert_close(x.gather(-1, model_module.top(x, 8)).sort().values,
                               x.topk(min(8, n)).values.sort().values)


@pytest.mark.parametrize("n_group", [1, 2])
def test_what_a_landmark_retrieves_serves_the_next_chunk(n_group, monkeypatch):
    """Chunk u attends to what landmark u-1 retrieved among chunks 0..u-2; chunks 0 and 1 to nothing."""
    seen = []

    def spy(q, k, v, weights, indices, softmax_one):
        seen.append((weights, indices))
        return original(q, k, v, weights, indices, softmax_one)

    original = model_module.gca
    monkeypatch.setattr(model_module, "gca", spy)
    tiny(n_layer=4, n_group=n_group)(random_tokens(2, 8 * TEXT + 4))
    assert len(seen) == 2                                                          # one call an upper layer
    for weights, indices in seen:
        assert indices.shape == (2, 9, 4)
        for u in range(9):
            filled = min(4, max(0, u - 1))
            assert (indices[:, u] >= 0).sum() == 2 * filled and indices[:, u].max() < max(0, u - 1)
            total = weights[:, u].sum(-1)
            torch.testing.assert_close(total, torch.full_like(total, filled > 0))
    same = torch.equal(seen[0][1], seen[1][1])
    assert same == (n_group == 1)                                                  # a group retrieves once


@pytest.mark.parametrize("retriever", ["learned", "random"])
def test_the_answer_loss_trains_the_retriever(retriever):
    model = tiny(retriever=retriever).train()
    tokens, labels, at = (torch.from_numpy(x).to(DEVICE) for x in needle_batch(
        load_corpus("stdlib").train, NeedleTask(16, 3, 6), np.random.default_rng(0), 4, 128))
    model(tokens, torch.where(at, labels, -100))[1].backward()
    gradient = model.query_norms[0].weight.grad
    assert gradient.abs().max() > 0 if retriever == "learned" else gradient is None
    assert model.encoder.value.weight.grad.abs().max() > 0


# ---------------------------------------------------------------- the whole model

@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2), dict(n_group=0),
                                    dict(n_kv_head=2, window=5),
                                    dict(chunk_size=7, top_k=1, gca_residual=False, softmax_one=False)])
def test_causality(config):
    model, tokens = tiny(**config), random_tokens(1, 100)
    logits, _ = model(tokens)
    for t in (0, 14, 15, 37, 99):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 256
        difference = (model(changed)[0] - logits).abs().amax(-1)[0]
        assert difference[:t].sum() == 0 and difference[t] > 0


def test_a_far_token_is_read_through_retrieval_alone():
    """With a window of 16, a token changes what comes 100 tokens later in the DRT and not in the base LM."""
    tokens = random_tokens(1, 160)
    changed = tokens.clone()
    changed[0, 3:9] = random_tokens(6)
    for config, reached in ((dict(top_k=16), True), (dict(n_group=0), False)):
        model = tiny(**config)
        difference = (model(changed)[0] - model(tokens)[0]).abs()[0, 110:]
        assert (difference.max() > 0) == reached


@pytest.mark.parametrize("T", [1, 14, 15, 16, 47])
def test_landmarks_have_no_logits_and_no_loss(T):
    model, tokens = tiny(), random_tokens(2, T)
    targets = random_tokens(2, T)
    targets[:, ::3] = -100
    logits, loss = model(tokens, targets)
    assert logits.shape == (2, T, 256)
    if T > 1:
        torch.testing.assert_close(loss, F.cross_entropy(logits[targets >= 0], targets[targets >= 0]))
    at = torch.rand(2, T, device=DEVICE) < 0.5
    torch.testing.assert_close(model(tokens, at=at)[0], logits[at])


@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2, n_kv_head=1),
                                    dict(n_group=0, window=5)])
@pytest.mark.parametrize("pieces", [[203], [1] * 203, [7, 8, 1, 44, 60, 83]])
def test_reading_in_pieces_is_forward(config, pieces, monkeypatch):
    monkeypatch.setitem(model_module.SEGMENT, DEVICE.type, 100 * 2 * 64)
    model, tokens = tiny(**config), random_tokens(2, 203)
    memory = Memory(model, batch_size=2)
    logits = torch.cat([model.read(piece, memory) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens)[0], atol=1e-4, rtol=0)
    assert memory.length == 203


def test_read_gives_only_the_wanted_logits(monkeypatch):
    monkeypatch.setitem(model_module.SEGMENT, DEVICE.type, 100 * 2 * 64)
    model, tokens = tiny(), random_tokens(2, 120)
    at = torch.rand(2, 120, device=DEVICE) < 0.2
    logits = model.read(tokens, Memory(model, 2), at)
    torch.testing.assert_close(logits, model(tokens, at=at)[0], atol=1e-4, rtol=0)
    last = model.read(tokens, Memory(model, 2), "last")
    torch.testing.assert_close(last, model(tokens)[0][:, -1], atol=1e-4, rtol=0)


# ---------------------------------------------------------------- memory and generation

OFFLOAD = [False, True] if DEVICE.type == "cuda" else [False]


@pytest.mark.parametrize("offload", OFFLOAD)
@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2, n_kv_head=1), dict(n_group=0)])
def test_reading_goes_on_after_fork_save_and_load(config, offload, tmp_path):
    model, tokens, other = tiny(**config), random_tokens(2, 203), random_tokens(2, 60)
    wanted, memory = model(tokens)[0], Memory(model, 2, offload)
    model.read(tokens[:, :100], memory)
    fork = memory.fork()
    model.read(other, fork)                                        # the fork goes elsewhere, in its own pages
    memory.save(tmp_path / "memory")
    loaded = Memory.load(tmp_path / "memory", model, offload)
    for some in (memory, loaded, loaded.fork()):
        again = some.fork()
        logits = [model.read(piece, some) for piece in tokens[:, 100:].split([1, 40, 62], dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), wanted[:, 100:], atol=1e-4, rtol=0)
        logits = model.read(tokens[:, 100:], again)
        torch.testing.assert_close(logits, wanted[:, 100:], atol=1e-4, rtol=0)
    wanted = model(torch.cat([tokens[:, :100], other, tokens[:, 100:]], dim=1))[0][:, 160:]
    torch.testing.assert_close(model.read(tokens[:, 100:], fork), wanted, atol=1e-4, rtol=0)


def test_nbytes_says_what_grows():
    model = tiny()
    memory, sizes = Memory(model, capacity=3000), []
    for piece in random_tokens(1, 300).split(100, dim=1):
        model.read(piece, memory)
        sizes.append(sum(memory.nbytes.values()))
    chunks = 3000 // TEXT * (64 + 2 * TEXT * 64) * 4               # l_c, and TEXT rows of k and v, float32
    assert all(chunks < size < chunks + 30000 for size in sizes)
    assert memory.nbytes["gpu" if DEVICE.type == "cpu" else "cpu"] == 0


def test_a_failed_read_leaves_the_memory_as_it_was(monkeypatch):
    model, tokens = tiny(n_layer=4, n_group=2), random_tokens(1, 150)
    for capacity in (None, 150):
        memory, calls = Memory(model, capacity=capacity), []
        model.read(tokens[:, :70], memory)

        def fail(*arguments, original=model_module.attend, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return original(*arguments)

        monkeypatch.setattr(model_module, "attend", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.read(tokens[:, 70:], memory)
        monkeypatch.undo()
        assert memory.length == 70 and memory.chunks == 4
        torch.testing.assert_close(model.read(tokens[:, 70:], memory), model(tokens)[0][:, 70:], atol=1e-4,
                                   rtol=0)


def test_memory_mistakes(tmp_path):
    model, tokens = tiny(), random_tokens(1, 50)
    memory = Memory(model, capacity=70)
    model.read(tokens, memory)
    for message, mistake in (
            ("capacity of 70: it holds 50, and 50 more", lambda: model.read(tokens, memory)),
            ("made for another model", lambda: tiny().read(tokens, memory)),
            ("tokens must be 1 sequences", lambda: model.read(random_tokens(2, 5), memory)),
            ("capacity must be at least 1", lambda: Memory(model, capacity=0)),
            ("no memory file", lambda: Memory.load(tmp_path / "none", model))):
        with pytest.raises(ValueError, match=message):
            mistake()
    assert memory.length == 50
    memory.save(tmp_path / "memory")
    with pytest.raises(ValueError, match="must be a memory of this model"):
        Memory.load(tmp_path / "memory", tiny(seed=1))
    with pytest.raises(ValueError, match="capacity must be at least the 50 tokens"):
        Memory.load(tmp_path / "memory", model, capacity=49)
    whole = (tmp_path / "memory").read_bytes()
    save_checkpoint(tmp_path / "foreign", model)
    (tmp_path / "cut").write_bytes(whole[:len(whole) // 2])
    for name in ("foreign", "cut"):
        with pytest.raises(ValueError, match=f"{name} is damaged or not a memory"):
            Memory.load(tmp_path / name, model)
    if DEVICE.type == "cpu":
        with pytest.warns(UserWarning, match="offload changes nothing"):
            Memory(model, offload=True)


def test_cache_holds_the_chunks_that_were_asked_for():
    """Random requests of two sequences, over two pages: the slots hold the chunks wanted."""
    rng, cache = np.random.default_rng(0), ChunkCache()
    stored = [torch.randn(2, 90, *shape) for shape in ((3,), (2, 1, 4), (2, 1, 4))]
    pin = DEVICE.type == "cuda"
    pages = [Page([x[:, part].contiguous().pin_memory() if pin else x[:, part] for x in stored], used)
             for part, used in ((slice(0, 40), 40), (slice(40, 90), 50))]
    for _ in range(30):
        indices = torch.from_numpy(rng.integers(-1, rng.choice([10, 90]), (2, 3, 4))).to(DEVICE)
        slots = cache.fetch(pages, indices)
        torch.cuda.synchronize() if pin else None
        assert torch.equal(slots < 0, indices < 0)
        for b in range(2):
            mask = indices[b] >= 0
            for cached, wanted in ((cache.k, stored[1]), (cache.v, stored[2])):
                assert torch.equal(cached[0, slots[b][mask]].cpu(), wanted[b, indices[b][mask].cpu()])
    assert 0.1 < cache.hit_rate < 0.9
    misses = cache.wanted - cache.hits
    cache.fetch(pages, indices)                                    # again: all of them are there
    assert cache.wanted - cache.hits == misses


@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2, n_kv_head=1)])
@pytest.mark.parametrize("pieces", [[403], [1] * 403, [7, 100, 1, 1, 1, 93, 200]])
def test_reading_through_the_cache_is_forward(config, pieces):
    """Also where there is no GPU: a memory with a cache keeps its chunks in pages that never move."""
    model, tokens = tiny(**config), random_tokens(2, 403)
    memory = Memory(model, 2)
    memory.cache = ChunkCache(model.config.n_group)
    logits = torch.cat([model.read(piece, memory) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens)[0], atol=1e-4, rtol=0)
    assert len(memory.pages) == {1: 1, 403: 6, 7: 3}[len(pieces)]
    assert len(pieces) == 1 or memory.cache.hit_rate > 0


@pytest.mark.parametrize("offload", OFFLOAD)
@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2), dict(n_group=0)])
def test_generation_is_the_likeliest_continuation(config, offload):
    """Greedy, for prompts of different lengths, after a document or not: as forward would have it."""
    model, document = tiny(**config), random_tokens(1, 77)
    prompts = [random_tokens(n)[:n] for n in (1, 16, 40, 46, 17)]
    new = torch.stack(list(model.generate(prompts, 20, temperature=0, pad=7, offload=offload)), dim=1)
    assert new.shape == (5, 20)
    for prompt, answer in zip(prompts, new, strict=True):
        text = torch.cat([torch.full(((1 - len(prompt)) % TEXT,), 7, device=DEVICE), prompt, answer])
        assert len(text) % TEXT == 21 % TEXT
        assert torch.equal(model(text[None])[0][0, -21:-1].argmax(-1), answer)
    memory = Memory(model, offload=offload)
    model.read(document, memory)
    for prompt in prompts[1:3]:
        answer = torch.cat(list(model.generate(prompt[None], 20, temperature=0, memory=memory.fork())))
        pad = torch.zeros((1 - 77 - len(prompt)) % TEXT, dtype=torch.long, device=DEVICE)
        text = torch.cat([document[0], pad, prompt, answer])
        assert torch.equal(model(text[None])[0][0, -21:-1].argmax(-1), answer)


def test_stop_tokens_end_a_sequence():
    model, prompts = tiny(), random_tokens(3, 20)
    new = torch.stack(list(model.generate(prompts, 30, temperature=0)), dim=1)
    stop = new[0, 5].item()
    cut = torch.stack(list(model.generate(prompts, 30, temperature=0, stop=[stop])), dim=1)
    for row, whole in zip(cut, new, strict=True):
        ends = (whole == stop).nonzero().flatten().tolist()
        n = min(ends[0] + 1 if ends else 30, len(row))
        assert torch.equal(row[:n], whole[:n]) and (row[n:] == -1).all()


def test_sampling():
    torch.manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = p.log().repeat(4000, 1)

    def frequencies(**how):
        return torch.bincount(sample(logits, **how), minlength=4) / 4000

    def near(wanted, **how):
        torch.testing.assert_close(frequencies(**how), torch.tensor(wanted), atol=0.04, rtol=0)

    near([1.0, 0.0, 0.0, 0.0], temperature=0)
    near(p.tolist(), temperature=1.0)
    near((p ** 2 / (p ** 2).sum()).tolist(), temperature=0.5)
    near([4 / 7, 3 / 7, 0.0, 0.0], temperature=1.0, top_k=2)
    near([4 / 7, 3 / 7, 0.0, 0.0], temperature=1.0, top_p=0.69)
    near([4 / 9, 3 / 9, 2 / 9, 0.0], temperature=1.0, top_p=0.71)


@pytest.mark.parametrize("change, message", [
    (dict(prompt=[]), "prompt must be"), (dict(prompt=[[]]), "none of them empty"),
    (dict(prompt=[[3, 256]]), r"must be token ids in \[0, 256\), got 256"), (dict(stop=[-2]), "got -2"),
    (dict(temperature=-1), "temperature must be at least 0"), (dict(top_k=0), "top_k must be at least 1"),
    (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5")])
def test_generation_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(**dict(prompt=[[1, 2]], max_new_tokens=3) | change)


# ---------------------------------------------------------------- chunks and configurations

def test_grid():
    grid = Grid(4, before=5, n=8)                  # chunks of 3 + landmark; the 6th token is row 2 of chunk 1
    assert (grid.first, grid.offset, grid.whole, grid.chunks, grid.length) == (1, 2, 3, 4, 11)
    x = torch.arange(1.0, 9).view(1, 8, 1)
    stream = grid.insert_landmarks(x, torch.tensor([0.0]))
    assert stream.flatten().tolist() == [1, 0, 2, 3, 4, 0, 5, 6, 7, 0, 8]
    assert grid.landmarks(stream).shape == (1, 3, 1) and not grid.landmarks(stream).any()
    assert torch.equal(grid.text(stream), x) and torch.equal(grid.to_stream(grid.to_chunks(stream)), stream)


@pytest.mark.parametrize("config", [dict(n_embd=65), dict(top_k=0), dict(chunk_size=1), dict(n_kv_head=3),
                                    dict(n_layer=3), dict(n_group=2, n_layer=2), dict(retriever="best"),
                                    dict(window=0)])
def test_impossible_configurations(config):
    with pytest.raises(ValueError, match=f"{next(reversed(config))} must be"):
        DRTConfig(**config)


# ---------------------------------------------------------------- data

def test_byte_tokenizer():
    assert decode_bytes(encode_bytes("naïve")) == "naïve" and len(encode_bytes("naïve")) == 6


def test_stdlib_splits_share_no_file():
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 4 * len(corpus.val) > 4e6
    text, train = corpus.val.tobytes(), corpus.train.tobytes()
    samples = [text[i:i + 200] for i in range(0, len(text), len(text) // 50)]
    assert sum(sample in train for sample in samples) < len(samples) / 4       # library files copy each other


@pytest.mark.parametrize("straddle", [False, True])
@pytest.mark.parametrize("length, chunk_size, n_needle", [(128, 16, 3), (131, 20, 3), (1000, 32, 9)])
def test_needles_and_questions_are_where_they_should_be(straddle, length, chunk_size, n_needle):
    text = np.full(5000, ord("."), np.uint8)
    task, S = NeedleTask(chunk_size, n_needle, 6, straddle), chunk_size - 1
    tokens, labels, is_answer = needle_batch(text, task.fit(length), np.random.default_rng(0), 20, length)
    assert tokens.shape == labels.shape == is_answer.shape == (20, length)
    assert (is_answer.sum(1) == n_needle * 6).all() and (labels[:, :-1] == tokens[:, 1:]).all()
    for row, label, answer in zip(tokens, labels, is_answer, strict=True):
        context, wanted = row.astype(np.uint8).tobytes(), label[answer].astype(np.uint8).tobytes()
        firsts = np.flatnonzero(answer)[::6]                                       # positions of the colons
        assert (firsts % S == 0).all() and (np.diff(firsts) == S).all()
        for i, first in enumerate(firsts):
            name, value = context[first - 4:first], wanted[6 * i:6 * i + 6]
            assert context[first - 6:first] == b"|?" + name and len(set(value)) == 6 and min(value) >= 128
            place = context.index(b"|" + name + b":" + value + b"|")       # exactly one, before all questions
            assert place + task.needle_length <= (firsts[0] // S - 1) * S and context.count(b"|" + name) == 1
            assert straddle or place // S == (place + task.needle_length - 1) // S


def test_batches_are_a_function_of_their_stream():
    text, task = load_corpus("stdlib").val, NeedleTask(16, 3, 6)
    draw = [needle_batch(text, task, np.random.default_rng(stream), 4, 128)[0]
            for stream in ((1, 0, 5), (1, 0, 5), (3, 0, 5))]
    assert (draw[0] == draw[1]).all() and (draw[0] != draw[2]).any()


def documents(folder, **texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_folder_of_text_becomes_a_corpus(tmp_path):
    texts = {f"book{i}": f"Book {i}, naïve. " * 200 for i in range(9)}
    folder = documents(tmp_path / "books", **texts, latin=b"caf\xe9", binary=b"a\0b")
    out = tmp_path / "corpus"
    line = "data.py", "text", folder, "--out", out, "--tokenizer", "bytes"
    command(*line)
    corpus, meta = load_corpus(out), json.loads((out / "meta.json").read_text())
    assert corpus.vocab_size == 256 and corpus.tokenizer == "bytes"
    found = [decode_bytes(np.array(tokens, np.uint8)) for tokens in (corpus.train, corpus.val)]
    assert sorted((found[0] + found[1]).split("\0")) == sorted(["", *texts.values()])
    assert sum(split["skipped"] for split in meta["splits"].values()) == 2 and len(found[1]) < len(found[0])
    written = (out / "train.bin").stat().st_mtime_ns
    command(*line)                                                                 # nothing to do
    assert (out / "train.bin").stat().st_mtime_ns == written
    assert json.loads((out / "meta.json").read_text()) == meta
    command(*line, "--errors", "replace")
    assert json.loads((out / "meta.json").read_text())["splits"]["train"]["skipped"] == 1
    text, task = load_corpus(out).train, NeedleTask(16, 3, 6)
    tokens, _, _ = needle_batch(text, task, np.random.default_rng(0), 4, 128)
    assert tokens.shape == (4, 128) and tokens.max() < 256
    (out / "val.bin").write_bytes(b"xx")
    with pytest.raises(ValueError, match="val.bin must hold the"):
        load_corpus(out)


def test_own_splits_are_kept(tmp_path):
    folder = tmp_path / "books"
    for split in ("train", "val", "test"):
        documents(folder / split, one=f"the {split} text")
    command("data.py", "text", folder, "--out", tmp_path / "out", "--tokenizer", "bytes")
    for split in ("train", "val", "test"):
        written = (tmp_path / "out" / f"{split}.bin").read_bytes()
        assert written.decode("utf-16-le") == f"the {split} text\0"


def test_gpt2_tokens(tmp_path):
    folder = documents(tmp_path / "books", a="Hello world", b="Hello again")
    done = subprocess.run([sys.executable, "data.py", "text", folder, "--out", tmp_path / "out"], cwd=HERE,
                          capture_output=True, text=True, timeout=300)
    if "set TIKTOKEN_CACHE_DIR" in done.stderr:
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
        pytest.skip("the GPT-2 tokenizer can be neither downloaded nor found: set TIKTOKEN_CACHE_DIR")
    corpus = load_corpus(tmp_path / "out")
    assert corpus.vocab_size == 50257 and corpus.tokenizer == "gpt2"
    assert sorted([corpus.train.tolist(), corpus.val.tolist()]) == [[15496, 757, 50256], [15496, 995, 50256]]
    error = command("train.py", "--data", tmp_path / "out", "--out", tmp_path / "run", status=2).stderr
    assert "must be prepared with --tokenizer bytes" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("texts, message", [
    (dict(), "must hold at least two .txt files"), (dict(one="x"), "got 1"),
    (dict(one=b"\xff", two=b"\xfe"), "must hold UTF-8 text")])
def test_preparation_mistakes_get_one_line(texts, message, tmp_path):
    (tmp_path / "books").mkdir()
    folder = documents(tmp_path / "books", **texts)
    line = "data.py", "text", folder, "--out", tmp_path / "out", "--tokenizer", "bytes"
    error = command(*line, status=2).stderr
    assert message in error and error.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("out/*"))


# ---------------------------------------------------------------- learning

def test_a_tiny_model_learns_to_retrieve():
    """From chance (1 in 128) to above 90% of answer tokens; without retrieval the answers cannot be known."""
    config = train_module.TrainConfig(steps=220)
    corpus, task = load_corpus("stdlib"), NeedleTask(16, 1, 6)
    torch.manual_seed(0)
    model = DRT(DRTConfig(n_encoder=1)).to(DEVICE).train()
    optimizer, objective = train_module.make_optimizer(model, config), train_module.Objective(model, config)
    unseen = train_module.draw_batch(corpus.val, task, (2, 0), 64, 64, DEVICE)
    assert train_module.validate(model, unseen).item() < 0.05
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = train_module.learning_rate(step, config)
        batch = train_module.draw_batch(corpus.train, task, (1, 0, step), 64, 64, DEVICE)
        train_module.train_step(objective, optimizer, batch, train_module.Ranks(DEVICE))
    assert train_module.validate(model, unseen).item() > 0.9


# ---------------------------------------------------------------- command lines

SMALL = f"""--n_embd 16 --n_head 1 --top_k 2 --steps 20 --batch_size 4 --n_value 1 --warmup 2
            --device {DEVICE.type}""".split()


def command(*arguments, status=0):
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a 20-step training run."""
    out = tmp_path_factory.mktemp("run")
    done = command("train.py", "--preset", "cpu", "--out", out, *SMALL)
    assert "131,072" in done.stdout                                           # 1024 times the training length
    return out


@pytest.mark.parametrize("program", ["train.py", "eval.py", "data.py"])
def test_help(program):
    assert "usage" in command(program, "--help").stdout


def test_training_writes_checkpoint_and_log(run):
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    for row in rows:                            # learning itself has a test of its own
        loss, answer, lm = (float(row[name]) for name in ("loss", "answer_loss", "lm_loss"))
        assert loss == pytest.approx(answer + 0.3 * lm) and 0 < lm < 20 and 0 < answer < 20
        assert row["seq_len"] == "64" and row["batch_size"] == "4"
    assert 0 <= float(rows[-1]["val_accuracy"]) <= 1
    assert sorted(path.name for path in run.iterdir()) == ["ckpt.pt", "log.csv", "niah.json"]
    model, saved = load_checkpoint(run / "ckpt.pt", DEVICE)
    assert model.config.n_embd == 16 and saved["step"] == 20


def test_eval_niah(run):
    out = run.parent / "niah.json"
    done = command("eval.py", "niah", "--ckpt", run / "ckpt.pt", "--lengths", "128,1000", "--questions", 8,
                   "--json", out, "--device", DEVICE.type)
    rows = json.loads(out.read_text())["rows"]
    assert "1,000" in done.stdout and [row["length"] for row in rows] == [128, 1000]
    assert {"length", "questions", "token_accuracy", "exact_match", "seconds", "tokens_per_second",
            "peak_gpu_gib"} <= set(rows[0]) and rows[0]["questions"] == 8


def test_eval_speed(tmp_path):
    out = tmp_path / "speed.json"
    done = command("eval.py", "speed", "--lengths", "50,1000", "--tokens", 20, "--compare", "--json", out,
                   "--n_embd", 32, "--offload", "--device", DEVICE.type)
    rows = json.loads(out.read_text())["rows"]
    assert "random weights" in done.stdout and [row["length"] for row in rows] == [50] * 3 + [1000] * 3
    assert len({row["model"] for row in rows}) == 3
    assert all(row["read_seconds"] > 0 and row["ms_per_new_token"] > 0 for row in rows)
    error = command("eval.py", "speed", "--n_embd", 65, "--n_head", 4, status=2).stderr
    assert error == "error: n_embd must be a multiple of n_head, got 65 and 4\n"


def test_full_attention_reads_and_decodes_alike():
    model = evaluation.FullAttention(DRTConfig(n_group=0, n_layer=3)).to(DEVICE)
    tokens, cache = random_tokens(1, 40), model.cache(1, 40)
    with torch.no_grad():
        whole = model.read(tokens, model.cache(1, 40), 0)
        model.read(tokens[:, :39], cache, 0)
        torch.testing.assert_close(model.read(tokens[:, 39:], cache, 39), whole, atol=1e-4, rtol=0)


def test_eval_sample(run, tmp_path):
    (tmp_path / "text").write_text("import os\n" * 50)
    line = ["eval.py", "sample", "--ckpt", run / "ckpt.pt", "--tokens", 30, "--device", DEVICE.type]
    first, again = (command(*line, "--file", tmp_path / "text", "--seed", 3).stdout for _ in range(2))
    assert first == again and len(first) > 20
    error = command(*line, "--prompt", "", status=2).stderr
    assert error == "error: --prompt must hold some text, got none\n"
    assert "temperature must be at least 0" in command(*line, "--prompt", "x", "--temperature", -1,
                                                       status=2).stderr


def test_resume_continues_as_if_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module.evaluation, "niah", lambda *_: [])
    flags = ["--preset", "cpu", *SMALL, "--steps", "40"]
    train_module.main([*flags, "--out", str(tmp_path / "whole"), "--checkpoint_every", "20"])
    monkeypatch.setattr(train_module, "train_step", stop_after(30, train_module.train_step))
    with pytest.raises(KeyboardInterrupt):
        train_module.main([*flags, "--out", str(tmp_path / "cut"), "--checkpoint_every", "20"])
    monkeypatch.undo()
    monkeypatch.setattr(train_module.evaluation, "niah", lambda *_: [])
    train_module.main(["--resume", "--out", str(tmp_path / "cut"), "--device", DEVICE.type])
    whole, cut = (list(csv.DictReader(open(tmp_path / name / "log.csv"))) for name in ("whole", "cut"))
    for row in whole + cut:
        del row["tokens_per_second"]
    if DEVICE.type == "cpu":
        assert whole == cut
    assert len(cut) == 40


def stop_after(steps, function):
    calls = []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return function(*arguments)
    return wrapped


@pytest.mark.parametrize("flags, message", [
    ("--n_embd 65 --n_head 4", "n_embd must be a multiple of n_head, got 65 and 4"),
    ("--top_k 0", "top_k must be at least 1, got 0"),
    ("--chunk_size 1", "chunk_size must be at least 2, got 1"),
    ("--chunk_size 12", "chunk_size must be at least 14 to hold a needle with a value of 6 bytes, got 12"),
    ("--seq_len 30", "seq_len must be at least 37 for a needle and its question in chunks of 16, got 30"),
    ("--data nowhere", "--data must be 'stdlib' or a folder that `python data.py text` made, got 'nowhere'"),
    ("--steps x", "argument --steps: invalid int value: 'x'"),
    ("--softmax_one maybe", "argument --softmax_one: must be true or false, got 'maybe'"),
    ("--steps 0", "--steps must be positive, got 0"),
    ("--seed -1", "--seed must not be negative, got -1"),
    ("--colour red", "unrecognized arguments: --colour red"),
    ("--resume", "no checkpoint at"),
] + ([] if torch.cuda.is_available() else [("--device cuda", "--device must be auto, cpu, or cuda on a")]))
def test_training_mistakes_get_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_module.main(["--preset", "cpu", "--out", str(tmp_path / "new"), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        train_module.main(["--preset", "cpu", "--out", str(tmp_path / "file")])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "file" in error and (tmp_path / "file").read_text() == "mine"


def test_resume_names_the_flag_that_differs(run):
    line = "train.py", "--resume", "--out", run, "--n_embd", 32, "--device", DEVICE.type
    error = command(*line, status=2).stderr
    assert error == f"error: --resume: the run in {run} has --n_embd 16, got 32\n"


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "foreign"])
def test_bad_checkpoints_get_one_line(kind, run, tmp_path):
    path = tmp_path / "bad.pt"
    if kind == "text":
        path.write_text("hello")
    elif kind == "cut":
        path.write_bytes((run / "ckpt.pt").read_bytes()[:20000])
    elif kind == "foreign":
        torch.save(dict(weights=torch.zeros(3)), path)
    error = command("eval.py", "niah", "--ckpt", path, "--device", "cpu", status=2).stderr
    assert error.startswith("error: ") and str(path) in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--lengths", "20"], ["--lengths", "many"], ["--questions", "0"],
                                   ["--size", "3"], ["--json", "nowhere/x.json"]])
def test_evaluation_mistakes_get_one_line(flags, run):
    line = "eval.py", "niah", "--ckpt", run / "ckpt.pt", "--device", DEVICE.type, *flags
    error = command(*line, status=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1


def test_checkpoints_are_replaced_whole(tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "ckpt.pt"
    save_checkpoint(path, model, step=1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save_checkpoint(path, model, step=2)
    assert load_checkpoint(path, DEVICE)[1]["step"] == 1
