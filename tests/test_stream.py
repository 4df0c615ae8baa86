"""Reading without end, memory and generation (fast/): in pieces, forked, saved and loaded, as DRT.forward."""
import math
import types

import numpy as np
import pytest
import torch

import fast
import fast.short as short
import fast.stream as stream
from fast.generate import sample
from fast.memory import Memory, Page
from fast.offload import ChunkCache
from fast.stream import Grid
from helpers import DEVICE, TEXT, random_tokens, tiny
from model import retrieval_scores, retrieve
from tools.checkpoint import save_checkpoint

OFFLOAD = [False, True] if DEVICE.type == "cuda" else [False]
CLOSE = dict(atol=1e-4, rtol=0)


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2, n_kv_head=1),
                                    dict(n_group=0, window=5),
                                    dict(n_layer=4, n_group=2, recency=True),
                                    dict(gca_residual=False, softmax_one=False, retriever="last")])
@pytest.mark.parametrize("pieces", [[203], [1] * 203, [7, 8, 1, 44, 60, 83]])
def test_reading_in_pieces_is_forward(config, pieces, monkeypatch):
    monkeypatch.setitem(stream.SEGMENT, DEVICE.type, 100 * 2 * 64)
    model, tokens = tiny(**config), random_tokens(2, 203)
    memory = Memory(model, batch_size=2)
    logits = torch.cat([fast.read(model, piece, memory) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens)[0], **CLOSE)
    assert memory.length == 203


def test_read_gives_only_the_wanted_logits(monkeypatch):
    monkeypatch.setitem(stream.SEGMENT, DEVICE.type, 100 * 2 * 64)
    model, tokens = tiny(), random_tokens(2, 120)
    at = torch.rand(2, 120, device=DEVICE) < 0.2
    expected = model(tokens)[0]
    torch.testing.assert_close(fast.read(model, tokens, Memory(model, 2), at), expected[at], **CLOSE)
    torch.testing.assert_close(fast.read(model, tokens, Memory(model, 2), "last"), expected[:, -1], **CLOSE)


def test_reading_and_generating_never_explore():
    model, tokens = tiny(gumbel=True).train(), random_tokens(1, 200)
    logits = [fast.read(model, tokens, Memory(model)) for _ in range(2)]
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0], model.eval()(tokens)[0], **CLOSE)


@pytest.mark.parametrize("offload", OFFLOAD)
@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2, n_kv_head=1), dict(n_group=0)])
def test_reading_goes_on_after_fork_save_and_load(config, offload, tmp_path):
    model, tokens, other = tiny(**config, encoder_rope=False), random_tokens(2, 203), random_tokens(2, 60)
    expected, memory = model(tokens)[0][:, 100:], Memory(model, 2, offload)
    fast.read(model, tokens[:, :100], memory)
    fork = memory.fork()
    fast.read(model, other, fork)                                  # the fork goes elsewhere, in its own pages
    memory.save(tmp_path / "memory")
    state = torch.load(tmp_path / "memory", weights_only=True)
    del state["config"]["recency"], state["config"]["encoder_rope"]    # a file from before there were such
    torch.save(state, tmp_path / "memory")
    loaded = Memory.load(tmp_path / "memory", model, offload)
    for copy in (memory, loaded, loaded.fork()):
        again = copy.fork()
        logits = [fast.read(model, piece, copy) for piece in tokens[:, 100:].split([1, 40, 62], dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)
        torch.testing.assert_close(fast.read(model, tokens[:, 100:], again), expected, **CLOSE)
    expected = model(torch.cat([tokens[:, :100], other, tokens[:, 100:]], dim=1))[0][:, 160:]
    torch.testing.assert_close(fast.read(model, tokens[:, 100:], fork), expected, **CLOSE)


@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2, n_kv_head=1)])
@pytest.mark.parametrize("pieces", [[403], [1] * 403, [7, 100, 1, 1, 1, 93, 200]])
def test_reading_through_the_cache_is_forward(config, pieces):
    """Also where there is no GPU: a memory with a cache keeps its chunks in pages that never move."""
    model, tokens = tiny(**config), random_tokens(2, 403)
    memory = Memory(model, 2)
    memory.cache = ChunkCache(model.config.n_group)
    logits = torch.cat([fast.read(model, piece, memory) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens)[0], **CLOSE)
    assert len(memory.pages) == {1: 1, 403: 6, 7: 3}[len(pieces)]
    assert len(pieces) == 1 or memory.cache.hit_rate > 0


def test_a_failed_read_leaves_the_memory_as_it_was(monkeypatch):
    model, tokens = tiny(n_layer=4, n_group=2), random_tokens(1, 150)
    for capacity in (None, 150):
        memory, calls = Memory(model, capacity=capacity), []
        fast.read(model, tokens[:, :70], memory)

        def fail(*arguments, original=stream.gca_of_pages, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return original(*arguments)

        monkeypatch.setattr(stream, "gca_of_pages", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fast.read(model, tokens[:, 70:], memory)
        monkeypatch.undo()
        assert memory.length == 70 and memory.chunks == 4
        logits = fast.read(model, tokens[:, 70:], memory)
        torch.testing.assert_close(logits, model(tokens)[0][:, 70:], **CLOSE)


@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2, n_kv_head=1), dict(n_group=0)])
def test_short_texts_as_cuda_graphs_are_read_as_ever(config, cuda_graphs, monkeypatch):
    """Other words and weights than when it was recorded; and every memory is one to read on from."""
    monkeypatch.setattr(short, "DEVICES", [DEVICE.type])
    model, read = tiny(**config), []
    graphs = fast.Graphs(model)
    for i in range(6):
        if i == 3:
            model.embedding.weight.data.mul_(1.05)
        tokens, mask = random_tokens(2, 130), torch.rand(2, 130, device=DEVICE) < 0.3
        logits, memory = model(tokens)[0], Memory(model, 2)
        at, expected = [(None, logits), ("last", logits[:, -1]), (mask, logits[mask])][i % 3]
        torch.testing.assert_close(fast.read(model, tokens, memory, at, graphs), expected, **CLOSE)
        read.append((tokens, memory))
    assert len(graphs.recorded) == 1
    fast.read(model, random_tokens(2, 99), Memory(model, 2), "last", graphs)
    assert len(graphs.recorded) == 1                        # a shape that came once
    for tokens, memory in read[3:]:                         # with the weights of now
        other = random_tokens(2, 50)
        expected = model(torch.cat([tokens, other], dim=1))[0][:, 130:]
        torch.testing.assert_close(fast.read(model, other, memory), expected, **CLOSE)
    other = tiny(**config)
    with pytest.raises(ValueError, match="graphs must be this model's own"):
        fast.read(other, tokens, Memory(other, 2), None, graphs)


# ---------------------------------------------------------------- retrieval in blocks

def test_retrieval_in_blocks_is_model_pys_retrieval(monkeypatch):
    """Also in several pages, and with the bundles that spare sorting all scores."""
    query, landmarks = torch.randint(-9, 10, (2, 2, 500, 16)).float()              # exact scores, with ties
    chunk = torch.arange(500)
    expected = [x[:, 480:] for x in retrieve(retrieval_scores(query, landmarks, chunk, chunk), 4)]
    monkeypatch.setattr(stream, "MAX_SCORES", 40 * 100)
    monkeypatch.setattr(stream, "BUNDLE", 3)
    pages = landmarks.split([170, 0, 310, 20], dim=1)

    def score(block, t, c):
        return retrieval_scores(query[:, t], block, t, c)

    weights, indices = stream.retrieve(score, range(480, 500), pages, 4)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(weights, expected[0])
    for retriever in ("last", "random"):
        _, indices = stream.retrieve(score, range(3), [landmarks], 2, retriever)
        assert indices[0].tolist() in ([[-1, -1], [0, -1], [1, 0]], [[-1, -1], [0, -1], [0, 1]])


@pytest.mark.parametrize("n", [1, 7, 191, 192, 193, 1000])
def test_largest_finds_the_largest(n, monkeypatch):
    monkeypatch.setattr(stream, "BUNDLE", 3)
    x = torch.randn(5, n).round(decimals=1)                                        # with ties
    torch.testing.assert_close(x.gather(-1, stream.largest(x, 8)).sort().values,
                               x.topk(min(8, n)).values.sort().values)


def test_largest_never_chooses_padding(monkeypatch):
    """Whichever of equal numbers topk prefers: here the last."""
    def last_of_equals(x, k):
        order = x.flip(-1).sort(stable=True, dim=-1, descending=True)
        return torch.return_types.topk((order.values[..., :k], x.shape[-1] - 1 - order.indices[..., :k]))

    monkeypatch.setattr(stream, "BUNDLE", 3)
    monkeypatch.setattr(torch.Tensor, "topk", last_of_equals)
    assert stream.largest(torch.full((2, 193), float("-inf")), 8).max() < 193


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_as_exact_as_queries_and_landmarks(dtype):
    query, landmarks = (torch.randn(2, n, 64, device=DEVICE, dtype=dtype) for n in (5, 300))
    expected = query.double() @ landmarks.double().mT
    scores = retrieval_scores(query, landmarks, None, None) * 8
    torch.testing.assert_close(scores.double(), expected, **CLOSE)


def test_grid():
    grid = Grid(4, before=5, n=8)                  # chunks of 3 + landmark; the 6th token is row 2 of chunk 1
    assert (grid.first, grid.offset, grid.whole, grid.chunks, grid.length) == (1, 2, 3, 4, 11)
    x = torch.arange(1.0, 9, device=DEVICE).view(1, 8, 1).expand(-1, -1, 64)
    model = tiny(chunk_size=4)
    model.landmark.data.fill_(0)
    piece = stream.Piece(model, 8, types.SimpleNamespace(length=5))
    positions = piece.insert_landmarks(x)
    assert positions[0, :, 0].tolist() == [1, 0, 2, 3, 4, 0, 5, 6, 7, 0, 8]
    assert grid.landmarks(positions).shape == (1, 3, 64) and not grid.landmarks(positions).any()
    assert torch.equal(piece.remove_landmarks(positions), x)
    assert torch.equal(grid.to_stream(grid.to_chunks(positions)), positions)


# ---------------------------------------------------------------- memory

def test_nbytes_says_what_grows():
    model = tiny()
    memory, sizes = Memory(model, capacity=3000), []
    for piece in random_tokens(1, 300).split(100, dim=1):
        fast.read(model, piece, memory)
        sizes.append(sum(memory.nbytes.values()))
    chunks = 3000 // TEXT * (64 + 2 * TEXT * 64) * 4               # l_c, and TEXT rows of k and v, float32
    assert all(chunks < size < chunks + 30000 for size in sizes)
    assert memory.nbytes["gpu" if DEVICE.type == "cpu" else "cpu"] == 0


def test_memory_mistakes(tmp_path):
    model, tokens = tiny(), random_tokens(1, 50)
    memory = Memory(model, capacity=70)
    fast.read(model, tokens, memory)
    for message, mistake in (
            ("capacity of 70: it holds 50, and 50 more", lambda: fast.read(model, tokens, memory)),
            ("made for another model", lambda: fast.read(tiny(), tokens, memory)),
            ("holds 50, and 26 more", lambda: fast.generate(model, [[1]], 15, memory=memory)),     # 11 padded
            ("tokens must be 1 sequences", lambda: fast.read(model, random_tokens(2, 5), memory)),
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


@pytest.mark.parametrize("n_group", [1, 2, 3])
def test_cache_holds_the_chunks_that_were_asked_for(n_group):
    """Random requests of two sequences, over two pages: all groups' slots hold what they want, at once."""
    rng, cache = np.random.default_rng(0), ChunkCache(n_group)
    stored = [torch.randn(2, 90, *shape) for shape in ((3,), (2, 1, 4), (2, 1, 4))]
    pin = DEVICE.type == "cuda"
    pages = [Page([x[:, part].contiguous().pin_memory() if pin else x[:, part] for x in stored], used)
             for part, used in ((slice(0, 40), 40), (slice(40, 90), 50))]
    for turn in range(30):
        size = 2, 1 + turn // 3, 4                                  # a cache that was large enough is not
        asked = [torch.from_numpy(rng.integers(-1, rng.choice([10, 90]), size)).to(DEVICE)
                 for _ in range(n_group)]
        served = [(indices, cache.fetch(pages, indices), cache.k, cache.v) for indices in asked]
        torch.cuda.synchronize() if pin else None
        for indices, slots, *caches in served:
            assert torch.equal(slots < 0, indices < 0)
            for b in range(2):
                mask = indices[b] >= 0
                for cached, expected in zip(caches, stored[1:], strict=True):
                    assert torch.equal(cached[0, slots[b][mask]].cpu(), expected[b, indices[b][mask].cpu()])
    assert 0.1 < cache.hit_rate < 0.9
    misses = cache.wanted - cache.hits
    cache.fetch(pages, asked[-1])                                  # again: all of them are there
    assert cache.wanted - cache.hits == misses


# ---------------------------------------------------------------- generation

@pytest.mark.parametrize("offload", OFFLOAD)
@pytest.mark.parametrize("config", [dict(), dict(n_layer=4, n_group=2), dict(n_group=0)])
def test_generation_is_the_likeliest_continuation(config, offload):
    """Greedy, for prompts of different lengths, after a document or not: as forward would have it."""
    model, document = tiny(**config), random_tokens(1, 77)
    prompts = [random_tokens(n)[:n] for n in (1, 16, 40, 46, 17)]
    new = torch.stack(list(fast.generate(model, prompts, 20, temperature=0, pad=7, offload=offload)), dim=1)
    assert new.shape == (5, 20)
    for prompt, answer in zip(prompts, new, strict=True):
        text = torch.cat([torch.full(((1 - len(prompt)) % TEXT,), 7, device=DEVICE), prompt, answer])
        assert len(text) % TEXT == 21 % TEXT
        assert torch.equal(model(text[None])[0][0, -21:-1].argmax(-1), answer)
    memory = Memory(model, offload=offload)
    fast.read(model, document, memory)
    for prompt in prompts[1:3]:
        fork = memory.fork()
        answer = torch.cat(list(fast.generate(model, prompt[None], 20, temperature=0, memory=fork)))
        pad = torch.zeros((1 - 77 - len(prompt)) % TEXT, dtype=torch.long, device=DEVICE)
        text = torch.cat([document[0], pad, prompt, answer])
        assert torch.equal(model(text[None])[0][0, -21:-1].argmax(-1), answer)


@pytest.mark.parametrize("config", [
    dict(retriever="last", top_k=1), dict(n_layer=4, n_group=2), dict(n_group=0)])
def test_steps_as_cuda_graphs_write_as_ever(config, cuda_graphs, monkeypatch):
    """Into a fork, too, whose page of its own gets more chunks after the graph was recorded."""
    monkeypatch.setattr(short, "DEVICES", [DEVICE.type])
    model, document, prompt = tiny(**config), random_tokens(1, 77), random_tokens(1, 11)
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(graph), replay(graph)))
    memory = Memory(model)
    fast.read(model, document, memory)
    for into in (memory.fork(), memory):
        answer = torch.stack([*fast.generate(model, prompt, 150, temperature=0, memory=into)], dim=1)
        pad = torch.zeros(1, (1 - 77 - 11) % TEXT, dtype=torch.long, device=DEVICE)
        text = torch.cat([document, pad, prompt, answer], dim=1)
        assert torch.equal(model(text)[0][:, -151:-1].argmax(-1), answer) and len({*answer[0].tolist()}) > 4
    assert len(replayed) > 250 and len({*replayed}) < 12


def test_a_memory_stays_as_it_was_until_generation_begins():
    model, tokens = tiny(), random_tokens(1, 50)
    memory = Memory(model)
    fast.read(model, tokens, memory)
    first, second = (fast.generate(model, tokens[:, :9], 7, memory=memory) for _ in range(2))
    assert len([*first]) == 7
    with pytest.raises(ValueError, match="memory must stay as it was"):
        next(second)
    before = memory.length
    assert [*fast.generate(model, tokens[:, :9], 0, memory=memory)] == []       # reads the prompt alone
    assert memory.length >= before + 9


@pytest.mark.parametrize("begun", [True, False])
def test_a_memory_keeps_its_precision(begun):
    model, tokens = tiny(), random_tokens(1, 50)
    memory = Memory(model)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=begun):
        fast.read(model, tokens, memory)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not begun), \
            pytest.raises(ValueError, match="memory must be read on in torch"):
        fast.read(model, tokens, memory)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=begun):
        assert fast.read(model, tokens, memory, "last").isfinite().all() and memory.length == 100


def test_stop_tokens_end_a_sequence():
    model, prompts = tiny(), random_tokens(3, 20)
    new = torch.stack(list(fast.generate(model, prompts, 30, temperature=0)), dim=1)
    stop = new[0, 5].item()
    cut = torch.stack(list(fast.generate(model, prompts, 30, temperature=0, stop=[stop])), dim=1)
    for row, whole in zip(cut, new, strict=True):
        ends = (whole == stop).nonzero().flatten().tolist()
        n = min(ends[0] + 1 if ends else 30, len(row))
        assert torch.equal(row[:n], whole[:n]) and (row[n:] == -1).all()


def test_sampling():
    torch.manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = p.log().repeat(4000, 1)

    def near(expected, **options):
        frequencies = torch.bincount(sample(logits, **options), minlength=4) / 4000
        torch.testing.assert_close(frequencies, torch.tensor(expected), atol=0.04, rtol=0)

    near([1.0, 0.0, 0.0, 0.0], temperature=0)
    near(p.tolist(), temperature=1.0)
    near((p ** 2 / (p ** 2).sum()).tolist(), temperature=0.5)
    near([4 / 7, 3 / 7, 0.0, 0.0], temperature=1.0, top_k=2)
    near([4 / 7, 3 / 7, 0.0, 0.0], temperature=1.0, top_p=0.69)
    near([4 / 9, 3 / 9, 2 / 9, 0.0], temperature=1.0, top_p=0.71)


@pytest.mark.parametrize("change, message", [
    (dict(prompt=[]), "prompt must be"), (dict(prompt=[[]]), "none of them empty"),
    (dict(prompt=[[3, 256]]), r"must be token ids in \[0, 256\), got \[256\]"),
    (dict(stop=[-2]), r"got \[-2\]"), (dict(temperature=-1), "temperature must be at least 0"),
    (dict(temperature=math.nan), "temperature must"),
    (dict(top_k=0), "top_k must be at least 1"), (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5")])
def test_generation_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        fast.generate(tiny(), **dict(prompt=[[1, 2]], max_new_tokens=3) | change)
