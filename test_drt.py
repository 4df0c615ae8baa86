"""The model, its memory and its generation: what each promises, on the GPU if there is one."""
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"    # as test_gca.py needs it, before either imports triton

import model as model_module
from data import NeedleTask, load_corpus, needle_batch
from inference import ChunkCache, Page, sample
from model import (
    DRT,
    DRTConfig,
    Grid,
    Memory,
    alibi_slopes,
    band_bias,
    band_blocks,
    banded_attention,
    dense_attention,
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
    (300, 64, 64, (3, 1)), (1, 7, 16, (4, 4)), (400, 0, 130, (4, 2)), (400, 130, 130, (2, 2)),
    (530, 270, 270, (2, 2))])
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


@pytest.mark.parametrize("n, past, window", [(300, 0, 64), (400, 130, 130), (1000, 512, 512), (700, 513, 513),
                                             (600, 0, 255), (130, 70, 129)])
def test_blocks_cover_the_band_once(n, past, window):
    """What flex_attention reads on a GPU: masked blocks as far as the band goes, whole blocks all of it."""
    m, blocks = n + past, band_blocks(n, n + past, window, torch.device("cpu"))
    distance = torch.arange(past, m)[:, None] - torch.arange(m)
    band, times_read = (distance >= 0) & (distance < window), torch.zeros(n, m, dtype=torch.int)
    for counts, lists, whole in ((blocks.kv_num_blocks, blocks.kv_indices, False),
                                 (blocks.full_kv_num_blocks, blocks.full_kv_indices, True)):
        for row in range(0 if counts is None else counts.shape[-1]):
            for block in lists[0, 0, row, :counts[0, 0, row]].tolist():
                tile = slice(128 * row, 128 * row + 128), slice(128 * block, 128 * block + 128)
                times_read[tile] += 1 if whole else band[tile].int()
    assert torch.equal(times_read, band.int())
    assert (blocks.full_kv_num_blocks is None) == (window < 255)


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


def test_gumbel_noise_chooses_by_the_softmax_of_the_scores():
    """Gumbel-max: with one slot, a chunk is chosen as often as the softmax says."""
    torch.manual_seed(0)
    query, landmarks = torch.randn(1, 1, 64).expand(20000, 1, 64), torch.randn(1, 4, 64).expand(20000, 4, 64)
    _, indices = retrieve(query, [landmarks], 4, 1, gumbel=True)
    wanted = (landmarks[0] @ query[0, 0] / 8).softmax(0)
    torch.testing.assert_close(indices.flatten().bincount(minlength=4) / 20000, wanted, atol=0.02, rtol=0)


def test_other_retrievers_choose_without_scores(monkeypatch):
    """The last K chunks, or K random ones, whatever the landmarks say; all weigh the same."""
    monkeypatch.setattr(model_module, "MAX_SCORES", 200)                           # several blocks
    query, landmarks = torch.randn(1, 300, 8), torch.randn(1, 300, 8)
    for retriever in ("last", "random"):
        weights, indices = retrieve(query, [landmarks], 0, 3, gumbel=True, retriever=retriever)
        assert indices[0, :2].tolist() == [[-1, -1, -1], [0, -1, -1]]
        assert (weights[0, 3:] == 1 / 3).all() and (indices < torch.arange(300)[:, None]).all()
        age = torch.arange(300)[100:, None] - indices[0, 100:]
        if retriever == "last":
            assert (age == torch.tensor([1, 2, 3])).all()
        else:
            assert 80 < age.double().mean() < 120                                  # of 1 .. 100 to 300


@pytest.mark.parametrize("n", [1, 7, 191, 192, 193, 1000])
def test_top_finds_the_largest(n, monkeypatch):
    monkeypatch.setattr(model_module, "BUNDLE", 3)
    x = torch.randn(5, n).round(decimals=1)                                        # with ties
    torch.testing.assert_close(x.gather(-1, model_module.top(x, 8)).sort().values,
                               x.topk(min(8, n)).values.sort().values)


def test_top_never_chooses_padding(monkeypatch):
    """Whichever of equal numbers topk prefers: here the last."""
    def last_of_equals(x, k):
        order = x.flip(-1).sort(stable=True, dim=-1, descending=True)
        return torch.return_types.topk((order.values[..., :k], x.shape[-1] - 1 - order.indices[..., :k]))

    monkeypatch.setattr(model_module, "BUNDLE", 3)
    monkeypatch.setattr(torch.Tensor, "topk", last_of_equals)
    assert model_module.top(torch.full((2, 193), float("-inf")), 8).max() < 193


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_as_exact_as_queries_and_landmarks(dtype):
    query, landmarks = (torch.randn(2, n, 64, device=DEVICE, dtype=dtype) for n in (5, 300))
    wanted = query.double() @ landmarks.double().mT
    scores = model_module.inner_products(query, landmarks)
    torch.testing.assert_close(scores.double(), wanted, atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("retriever", ["learned", "random", "last"])
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
