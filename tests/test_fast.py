"""Every fast piece of a model does what its plain twin does; apply() swaps them and says what is active."""
from types import SimpleNamespace

import pytest
import torch

import fast
import fast.loss
import fast.window
import model as plain
import train
from fast.window import band_blocks, one_query_attention, window_attention
from helpers import DEVICE, log_of, tiny
from model import DRT, DRTConfig, alibi_slopes, band_bias
from test_model import attention_by_hand
from tools.run import Objective

# ---------------------------------------------------------------- fast/window.py


@pytest.mark.parametrize("n, past, window, heads", [
    (50, 0, 16, (4, 4)), (50, 0, 5, (4, 2)), (50, 16, 16, (4, 2)), (33, 5, 16, (6, 3)), (16, 16, 16, (2, 1)),
    (300, 64, 64, (3, 1)), (1, 7, 16, (4, 4)), (400, 130, 130, (2, 2)), (530, 270, 270, (2, 2)),
    (200, 0, 300, (4, 2)), (150, 40, 300, (2, 2))])
def test_window_attention_is_softmax_over_the_window_with_alibi(n, past, window, heads):
    q, (k, v) = torch.randn(2, heads[0], n, 16), torch.randn(2, 2, heads[1], n + past, 16)
    slopes = alibi_slopes(heads[0])
    expected = attention_by_hand(q, k, v, window, slopes)
    arguments = [x.to(DEVICE) for x in (q, k, v)] + [window, slopes.to(DEVICE)]
    for function in (plain.window_attention, window_attention):
        torch.testing.assert_close(function(*arguments).cpu(), expected, atol=2e-5, rtol=1e-4)
    if past <= window:                                      # the last query alone, as in generation
        k, v = (x[:, :, -window - 1:] for x in arguments[1:3])
        bias = band_bias(1, window + 1, window, slopes)[:, 0].to(DEVICE)
        last = one_query_attention(arguments[0][:, :, -1:], k, v, bias)
        torch.testing.assert_close(last.cpu(), expected[:, :, -1:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("n, window, D, wanted", [
    (992, 1024, 64, "flex"), (8060, 512, 64, "flex"), (128, 128, 16, "flex"),
    (127, 1024, 64, "plain"), (8060, 127, 64, "plain"), (992, 1024, 8, "plain")])
def test_on_a_gpu_wide_windows_go_to_flex_attention_also_if_the_text_is_shorter(n, window, D, wanted,
                                                                                monkeypatch):
    monkeypatch.setattr(fast.window, "flex_window", lambda *_: "flex")
    monkeypatch.setattr(plain, "window_attention", lambda *_: "plain")
    q = SimpleNamespace(is_cuda=True, shape=(1, 2, n, D))
    assert window_attention(q, q, q, window, None) == wanted


@pytest.mark.skipif(DEVICE.type == "cpu", reason="on a CPU they are one function")
@pytest.mark.parametrize("n, window, heads, D, dtype", [
    (50, 16, (4, 2), 16, torch.float32), (200, 64, (2, 2), 16, torch.float32),
    (20, 64, (2, 1), 16, torch.float32), (300, 512, (2, 1), 16, torch.float32),
    (700, 260, (2, 2), 64, torch.bfloat16)])                # heads of 64: backward tiles of their own
def test_gradients_of_window_attention_are_those_of_its_twin(n, window, heads, D, dtype):
    shapes = [(2, h, n, D) for h in (heads[0], heads[1], heads[1])]
    given = [torch.randn(shape, device=DEVICE) for shape in (*shapes, shapes[0])]
    slopes, results = alibi_slopes(heads[0]).to(DEVICE), []
    for function, kind in ((window_attention, dtype), (plain.window_attention, torch.float32)):
        q, k, v, upstream = (x.to(dtype).to(kind) for x in given)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = function(*inputs, window, slopes)
        results.append([x.float() for x in (out, *torch.autograd.grad(out, inputs, upstream))])
    torch.testing.assert_close(*results, **(dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else
                                            dict(atol=0.06, rtol=0.02)))


@pytest.mark.parametrize("n, past, window", [(300, 0, 64), (400, 130, 130), (1000, 512, 512), (700, 513, 513),
                                             (600, 0, 255), (130, 70, 129), (992, 0, 1024), (500, 90, 600)])
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


# ---------------------------------------------------------------- fast/loss.py

def test_the_loss_in_blocks(monkeypatch):
    """Rows in several blocks, a vocabulary that is padded, labels that are missing: loss and gradients."""
    monkeypatch.setattr(fast.loss, "ROWS", 70)
    model = DRT(DRTConfig(vocab_size=301)).to(DEVICE).eval()
    tokens, targets = torch.randint(301, (2, 2, 100), device=DEVICE)
    targets[:, ::3] = -100
    results = []
    for cross_entropy in (plain.cross_entropy, fast.loss.cross_entropy):
        model.cross_entropy = cross_entropy
        loss = model(tokens, targets)[1]
        results.append((loss, *torch.autograd.grad(2 * loss, list(model.parameters()))))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, targets)[1], results[0][0].detach())


def test_the_loss_in_blocks_is_right_or_refuses():
    """Gradients of the weight alone; no second derivatives; no targets that torch's own loss refuses."""
    hidden = torch.randn(1, 9, 64, device=DEVICE, requires_grad=True)
    weight = torch.randn(100, 64, device=DEVICE, requires_grad=True)
    targets = torch.arange(9, device=DEVICE)[None]
    results = [torch.autograd.grad(function(hidden.detach(), weight, targets), weight)
               for function in (plain.cross_entropy, fast.loss.cross_entropy)]
    torch.testing.assert_close(*results)
    far, many = torch.ones(1, 1, 2, device=DEVICE), torch.ones(5000, 2, device=DEVICE)
    many[:fast.loss.BLOCK] = float("-inf")                  # all logits that a program holds at first
    losses = [function(far, many, targets[:, :1] + 4999)
              for function in (plain.cross_entropy, fast.loss.cross_entropy)]
    torch.testing.assert_close(*losses)
    loss = fast.loss.cross_entropy(hidden, weight, targets)
    gradient, = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
    for wrong in (-1, 100, 127, -7):
        if DEVICE.type == "cpu":                            # on a GPU this ends the process, as torch's does
            with pytest.raises(RuntimeError, match="out of bounds"):
                fast.loss.cross_entropy(hidden, weight, targets * 0 + wrong)


# ---------------------------------------------------------------- fast.apply

def test_apply_swaps_what_its_table_says():
    model = tiny()
    assert fast.describe(model) == ""
    assert fast.apply(model) is model
    if DEVICE.type == "cuda":
        assert "kernels" in fast.describe(model)
    else:
        assert fast.describe(model) == ""
    fast.swap(model)
    assert model.gca is fast.gca.gca and model.cross_entropy is plain.cross_entropy
    large = tiny(vocab_size=5000)
    fast.swap(large)
    assert large.cross_entropy is fast.loss.cross_entropy and "loss in blocks" in fast.describe(large)
    wide = tiny(window=128)
    fast.swap(wide)
    assert wide.window_attention is fast.window.window_attention and "flex" in fast.describe(wide)
    assert fast.describe(tiny(n_group=0)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_as_cuda_graphs_have_the_loss_and_gradients_of_plain_steps(dtype, cuda_graphs):
    """Shapes that come again after others, weights that change, noise; and autocast's cache is not kept."""
    model = tiny(gumbel=True).to(DEVICE).train()
    plain_step = Objective(model, lambda model, tokens, targets: (
        model(tokens, targets)[1], dict(mean=tokens.float().mean())))
    graphed_step = fast.training.GraphedObjective(plain_step)
    for shape in ((2, 130), (1, 200), (2, 130), (1, 20), (1, 200)):
        batch, results = torch.randint(model.config.vocab_size, (2, *shape), device=DEVICE), []
        for step in (plain_step, graphed_step):
            torch.manual_seed(1)
            model.zero_grad()
            caches = step is graphed_step
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32, cache_enabled=caches):
                loss, numbers = step(*batch)
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([x.detach().clone() for x in (loss, numbers["mean"], *gradients)])
            del loss                                    # no recording beside a backward pass that may come
        for x, y in zip(*results, strict=True):
            assert (x - y).norm() <= 1e-5 * y.norm() + 1e-7
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        assert len(graphed_step.graphs) == 1


@pytest.mark.parametrize("task", ["needles", "text"])
def test_fast_true_and_false_train_alike(task, tmp_path, no_table, monkeypatch):
    """The same losses over 8 steps in float32, with every piece swapped by force where there is no GPU."""
    monkeypatch.setattr(fast, "apply", lambda model, compile=False: fast.swap(model))
    monkeypatch.setattr(fast.loss, "LARGE_VOCABULARY", 0)
    flags = ["--preset", "cpu", "--task", task, "--steps", "8", "--batch_size", "2", "--window", "20",
             "--device", DEVICE.type]
    losses = []
    for use_fast in ("true", "false"):
        train.main([*flags, "--fast", use_fast, "--out", str(tmp_path / use_fast)])
        losses.append([float(row["loss"]) for row in log_of(tmp_path / use_fast)])
    tolerance = 1e-5 if DEVICE.type == "cpu" else 0.02                             # bfloat16 there
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
