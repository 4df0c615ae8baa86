"""model.py: what the DRT promises, on the GPU if there is one."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_module
from helpers import DEVICE, TEXT, random_tokens, tiny
from model import DRTConfig, WholeText, alibi_slopes, retrieval_scores, retrieve, window_attention
from tasks.haystack import Haystack
from tasks.text import load_corpus

# ---------------------------------------------------------------- sliding-window attention


def attention_by_hand(q, k, v, window, slopes):
    """Softmax over the window with ALiBi, one query at a time; q (B, H, n, D) are the last of m positions."""
    (_, H, n, D), past = q.shape, k.shape[2] - q.shape[2]
    out = torch.empty_like(q)
    for h in range(H):
        for i in range(n):
            window_of_i = slice(max(0, past + i - window + 1), past + i + 1)
            keys, values = (x[:, h * k.shape[1] // H, window_of_i] for x in (k, v))
            distance = torch.arange(keys.shape[1] - 1, -1, -1)
            scores = (keys @ q[:, h, i, :, None]).squeeze(-1) * D ** -0.5 - slopes[h] * distance
            out[:, h, i] = (scores.softmax(-1)[:, None] @ values).squeeze(1)
    return out


@pytest.mark.parametrize("n, window, heads", [(50, 16, (4, 2)), (16, 16, (2, 1)), (3, 16, (4, 4)),
                                              (130, 64, (3, 1)), (48, 16, (6, 3)), (5, 1, (2, 2))])
def test_window_attention_is_softmax_over_the_window_with_alibi(n, window, heads):
    q, (k, v) = torch.randn(2, heads[0], n, 16), torch.randn(2, 2, heads[1], n, 16)
    slopes = alibi_slopes(heads[0])
    out = window_attention(*(x.to(DEVICE) for x in (q, k, v)), window, slopes.to(DEVICE))
    torch.testing.assert_close(out.cpu(), attention_by_hand(q, k, v, window, slopes), atol=2e-5, rtol=1e-4)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0 ** -i for i in range(1, 9)]
    assert len(alibi_slopes(12)) == 12 and len(set(alibi_slopes(12).tolist())) == 12


# ---------------------------------------------------------------- retrieval

def scores_of(query, landmarks, **recency):
    """Of all chunks of a text by all: (B, C, C)."""
    chunk = torch.arange(query.shape[1])
    return retrieval_scores(query, landmarks, chunk, chunk, **recency)


def test_a_chunk_retrieves_the_best_strictly_earlier_chunks():
    query, landmarks = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    weights, indices = retrieve(scores_of(query, landmarks), 3)
    for b in range(2):
        for t in range(9):
            scores = landmarks[b, :t] @ query[b, t] / math.sqrt(8)
            best = scores.topk(min(3, t))
            empty = 3 - min(3, t)
            assert indices[b, t].tolist() == best.indices.tolist() + [-1] * empty
            torch.testing.assert_close(weights[b, t], F.pad(best.values.softmax(0), (0, empty)))


def test_gumbel_noise_changes_the_choice_but_not_the_weights():
    query, landmarks = torch.randn(1, 40, 8), torch.randn(1, 40, 8)
    _, quiet = retrieve(scores_of(query, landmarks), 4)
    weights, indices = retrieve(scores_of(query, landmarks), 4, explore=True)
    assert (indices[0, 5:] != quiet[0, 5:]).any()
    assert (indices < torch.arange(40)[:, None]).all()
    scores = (query @ landmarks.mT / math.sqrt(8)).gather(-1, indices.clamp(min=0))
    expected = scores.masked_fill(indices < 0, -1e9).softmax(-1).masked_fill(indices < 0, 0)
    torch.testing.assert_close(weights, expected)


def test_gumbel_noise_chooses_by_the_softmax_of_the_scores():
    """Gumbel-max: with one slot, a chunk is chosen as often as the softmax says."""
    torch.manual_seed(0)
    query, landmarks = torch.randn(5, 64), torch.randn(5, 64)
    _, indices = retrieve(scores_of(query[None], landmarks[None]).expand(20000, 5, 5), 1, explore=True)
    expected = (landmarks[:4] @ query[4] / 8).softmax(0)
    torch.testing.assert_close(indices[:, 4, 0].bincount(minlength=4) / 20000, expected, atol=0.02, rtol=0)


def test_recency_lowers_scores_by_the_log_of_the_distance_beyond_the_window():
    query, landmarks = torch.randn(1, 40, 8), torch.randn(1, 40, 8)
    decay = torch.tensor(0.5, requires_grad=True)
    weights, indices = retrieve(scores_of(query, landmarks, decay=decay, window_chunks=4), 3)
    scores = query[0, 30] @ landmarks[0, :30].T / math.sqrt(8)
    scores -= 0.5 * torch.tensor([math.log(max(1, (30 - c) / 4)) for c in range(30)])
    best = scores.topk(3)
    assert indices[0, 30].tolist() == best.indices.tolist()
    torch.testing.assert_close(weights[0, 30], best.values.softmax(0))
    (weights * torch.randn_like(weights)).sum().backward()
    assert decay.grad != 0
    model = tiny(recency=True, window=50, n_layer=4, n_group=2)                 # 3 whole chunks of 16
    query, landmarks = query.to(DEVICE), landmarks.to(DEVICE)
    t, c = torch.tensor([30], device=DEVICE), torch.tensor([29, 27, 3], device=DEVICE)
    by_group = model.scores(1, query[:, 30:31], landmarks[:, c], t, c)[0, 0]
    by_hand = landmarks[0, c] @ query[0, 30] / math.sqrt(8) - model.decay[1] * (
        torch.tensor([3, 3, 27], device=DEVICE) / 3).log()
    torch.testing.assert_close(by_group, by_hand)
    far = model(tokens := random_tokens(1, 400))[0]
    torch.nn.init.zeros_(model.decay)
    without = tiny(window=50, n_layer=4, n_group=2)
    assert torch.equal(model(tokens)[0], without(tokens)[0]) and not torch.equal(far, without(tokens)[0])


def test_other_retrievers_choose_without_scores():
    """The last K chunks, or K random ones, whatever the landmarks say; all weigh the same."""
    query, landmarks = torch.randn(1, 300, 8), torch.randn(1, 300, 8)
    for retriever in ("last", "random"):
        weights, indices = retrieve(scores_of(query, landmarks), 3, retriever, explore=True)
        assert indices[0, :2].tolist() == [[-1, -1, -1], [0, -1, -1]]
        assert (weights[0, 3:] == 1 / 3).all() and (indices < torch.arange(300)[:, None]).all()
        age = torch.arange(300)[100:, None] - indices[0, 100:]
        if retriever == "last":
            assert (age == torch.tensor([1, 2, 3])).all()
        else:
            assert 80 < age.double().mean() < 120                                  # of 1 .. 100 to 300


def test_an_encoder_that_begins_as_the_identity():
    """It adds nothing to what it normalizes, and its layers have a gradient."""
    model = tiny(n_encoder=2)
    model.encoder.begin_as_identity()
    encoder, x = model.encoder, torch.randn(2, 3, 16, 64, device=DEVICE)
    landmarks, k, v = encoder(x)
    wanted = encoder.norm_out(encoder.norm_in(x))
    torch.testing.assert_close(landmarks, wanted[:, :, -1])
    torch.testing.assert_close(k.flatten(3), encoder.key(wanted[:, :, :-1]))
    (landmarks.sum() + k.square().sum() + v.square().sum()).backward()
    for layer in encoder.layers:
        assert min(p.grad.norm() for p in (layer.attention.out.weight, layer.mlp.down.weight)) > 0


@pytest.mark.parametrize("n_group", [1, 2])
def test_what_a_landmark_retrieves_serves_the_next_chunk(n_group):
    """Chunk u attends to what landmark u-1 retrieved among chunks 0..u-2; chunks 0 and 1 to nothing."""
    seen = []

    def spy(q, k, v, weights, indices, softmax_one):
        seen.append((weights, indices))
        return model_module.gca(q, k, v, weights, indices, softmax_one)

    model = tiny(n_layer=4, n_group=n_group)
    model.gca = spy
    model(random_tokens(2, 8 * TEXT + 4))
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
    tokens, labels, at = (torch.from_numpy(x).to(DEVICE) for x in Haystack(15, 6).batch(
        load_corpus("stdlib").train, np.random.default_rng(0), 4, 128, 3))
    model(tokens, torch.full_like(labels, -100).scatter(1, at, labels.gather(1, at)))[1].backward()
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
        expected = F.cross_entropy(logits[targets >= 0], targets[targets >= 0])
        torch.testing.assert_close(loss, expected)


def test_landmarks_are_inserted_and_removed():
    model, x = tiny(chunk_size=4), torch.randn(2, 8, 64, device=DEVICE)           # chunks of 3 + landmark
    whole = WholeText(model, 8)
    stream = whole.insert_landmarks(x)
    text = [0, 1, 2, 4, 5, 6, 8, 9]
    assert stream.shape == (2, 10, 64) and torch.equal(stream[:, text], x)
    assert torch.equal(stream[:, [3, 7]], model.landmark.expand(2, 2, -1))
    assert torch.equal(whole.remove_landmarks(stream), x)
    assert torch.equal(whole.complete_chunks(stream), stream[:, :8].unflatten(1, (2, 4)))


def test_generation_is_the_likeliest_continuation_and_never_explores():
    model, prompt = tiny(gumbel=True).train(), random_tokens(2, 70)
    tokens = torch.cat([prompt, torch.stack(list(model.generate(prompt, 20, temperature=0)), dim=1)], dim=1)
    assert torch.equal(model.eval()(tokens)[0][:, 69:-1].argmax(-1), tokens[:, 70:])
    torch.manual_seed(0)
    first = torch.stack(list(model.generate(prompt, 5)))
    torch.manual_seed(0)
    assert torch.equal(first, torch.stack(list(model.generate(prompt, 5)))) and first.shape == (5, 2)


@pytest.mark.parametrize("config", [dict(n_embd=65), dict(top_k=0), dict(chunk_size=1), dict(n_kv_head=3),
                                    dict(n_layer=3), dict(n_group=2, n_layer=2), dict(retriever="best"),
                                    dict(window=0)])
def test_impossible_configurations(config):
    with pytest.raises(ValueError, match=f"{next(reversed(config))} must be"):
        DRTConfig(**config)
