"""Cross-entropy without ever holding all logits: the twin of model.py's cross_entropy.

With GPT-2's vocabulary, the logits of 65,536 tokens take 13 GB in float32. Here one block of rows after the
other is multiplied, and its losses and gradients are taken while its logits exist.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from gca import jit, triton
from model import NO_LABEL

if triton:
    import triton.language as tl

ROWS = 8192                         # positions whose logits are held at once
BLOCK = 2048                        # logits that a program of loss_kernel holds at once
LARGE_VOCABULARY = 4096             # with fewer tokens, all logits fit: blocks would only add launches


def in_words(model):
    """What is faster about this model's loss; "" where it is not, and stays as it is."""
    return "loss in blocks" if model.config.vocab_size >= LARGE_VOCABULARY else ""


def cross_entropy(hidden, weight, targets):
    """Mean cross-entropy of hidden @ weight.T: hidden (B, T, d), targets (B, T) or NO_LABEL.

    Differentiable once. RuntimeError for targets outside of the vocabulary, like torch's own.
    """
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten())


@jit
def loss_kernel(Logits, Labels, Losses, n_column, vocab_size, NO_LABEL: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: its loss, 0 without a label; its gradient takes the place of its logits.

    The second loop reads the row from the L2 cache.
    """
    row = tl.program_id(0)
    label = tl.load(Labels + row)
    Logits += row.to(tl.int64) * n_column
    picked = tl.load(Logits + label, mask=(label >= 0) & (label < vocab_size), other=0.0).to(tl.float32)
    peak, total = float("-inf"), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_column, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(Logits + column, mask=column < n_column, other=0.0).to(tl.float32)
        x = tl.where(column < vocab_size, x, float("-inf"))
        before, peak = peak, tl.maximum(peak, tl.max(x, 0))
        shift = tl.where(peak == float("-inf"), 0.0, peak)                      # so far nothing but -inf
        total = total * tl.exp(before - shift) + tl.exp(x - shift)
    log_total = peak + tl.log(tl.sum(total, 0))
    tl.store(Losses + row, tl.where(label == NO_LABEL, 0.0, log_total - picked))
    for start in range(0, n_column, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(Logits + column, mask=column < n_column, other=0.0).to(tl.float32)
        x = tl.where(column < vocab_size, x, float("-inf"))
        gradient = tl.exp(x - log_total) - tl.where(column == label, 1.0, 0.0)
        gradient = tl.where(label == NO_LABEL, 0.0, gradient)
        tl.store(Logits + column, gradient.to(Logits.dtype.element_ty), mask=column < n_column)


class LinearCrossEntropy(torch.autograd.Function):
    """x (n, d), weight (vocab_size, d), labels (n,).

    The gradients are computed on the way, so no product is computed twice. The vocabulary is padded to a
    multiple of 64: GPT-2's 50,257 is odd, and matrix products of odd sizes take four times as long.
    """

    @staticmethod
    def forward(ctx, x, weight, labels):
        device, vocab_size = x.device.type, len(weight)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            padded = F.pad(weight.to(dtype), (0, 0, 0, -vocab_size % 64))
            dx, dweight = torch.empty_like(x, dtype=dtype), torch.zeros_like(padded, dtype=torch.float32)
            losses, labels = torch.empty(len(x), device=x.device), labels.contiguous()
            for i in range(0, len(x), ROWS):
                rows = x[i:i + ROWS].to(dtype)
                logits = rows @ padded.T
                loss_kernel[(len(rows),)](logits, labels[i:], losses[i:], logits.shape[1], vocab_size,
                                          NO_LABEL=NO_LABEL, BLOCK=BLOCK, num_warps=4)
                if any(ctx.needs_input_grad):
                    torch.mm(logits, padded, out=dx[i:i + ROWS])    # logits are their gradient now
                    dweight += logits.T @ rows
        has_label = labels != NO_LABEL
        in_vocabulary = ~has_label | (labels >= 0) & (labels < vocab_size)
        torch._assert_async(in_vocabulary.all(), "targets are out of bounds of the vocabulary")     # no wait
        count = has_label.sum()                             # of none, the mean is nan, as torch's
        ctx.save_for_backward(x, weight, dx, dweight[:vocab_size], count)
        return losses.sum() / count

    @staticmethod
    def backward(ctx, upstream):
        x, weight, dx, dweight, count = ctx.saved_tensors
        return *Once.apply(dx * (upstream / count), dweight * (upstream / count), x, weight), None


class Once(torch.autograd.Function):
    """Passes two gradients on. They depend on x and weight, but cannot be differentiated again."""

    @staticmethod
    def forward(ctx, dx, dweight, x, weight):
        return dx, dweight

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the loss in blocks is differentiable once; for second derivatives use "
                           "model.cross_entropy of model.py (train.py --fast false)")
