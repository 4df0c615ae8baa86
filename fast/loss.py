"""Cross-entropy without ever holding all logits: the twin of model.py's cross_entropy.

With GPT-2's vocabulary, the logits of 65,536 tokens take 13 GB in float32. Here one block of rows after the
other is multiplied, and its losses and gradients are taken while its logits exist.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

ROWS = 8192                         # positions whose logits are held at once
NO_LABEL = -100
LARGE_VOCABULARY = 4096             # of fewer tokens, all logits are few: blocks would be more launches


def in_words(model):
    return "loss in blocks" if model.config.vocab_size >= LARGE_VOCABULARY else ""


def cross_entropy(hidden, weight, targets):
    """Mean cross-entropy of hidden @ weight.T: hidden (B, T, d), targets (B, T), -100 = no label.

    Differentiable once. Raises RuntimeError for targets outside of the vocabulary, as torch's own does.
    """
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten())


def loss_and_gradient(logits, labels, vocab_size):
    """Cross-entropies (n,), 0 where there is no label, and their gradient in the logits (n, padded)."""
    column, has_label = torch.arange(logits.shape[1], device=logits.device), labels != NO_LABEL
    dtype, logits = logits.dtype, logits.float().masked_fill(column >= vocab_size, float("-inf"))
    total = logits.logsumexp(1, keepdim=True)
    picked = logits[:, :vocab_size].gather(1, labels.where(has_label, 0)[:, None])
    gradient = (logits - total).exp() - (column == labels[:, None]).float()
    return (total - picked)[:, 0] * has_label, (gradient * has_label[:, None]).to(dtype)


compiled_loss_and_gradient = lru_cache(lambda: torch.compile(loss_and_gradient, dynamic=False))


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
            step = compiled_loss_and_gradient() if x.is_cuda else loss_and_gradient
            total = torch.zeros((), device=x.device)
            for i in range(0, len(x), ROWS):
                rows = x[i:i + ROWS].to(dtype)
                losses, dlogits = step(rows @ padded.T, labels[i:i + ROWS], vocab_size)
                total += losses.sum()
                if any(ctx.needs_input_grad):                       # not in validation
                    torch.mm(dlogits, padded, out=dx[i:i + ROWS])
                    dweight += dlogits.T @ rows
        count = (labels != NO_LABEL).sum().clamp(min=1)
        ctx.save_for_backward(x, weight, dx, dweight[:vocab_size], count)
        return total / count

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
