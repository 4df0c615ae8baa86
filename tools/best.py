"""Whether other chunks would have helped more than those retrieved: `eval.py inspect --best`.

Each chunk beyond the window is read alone, with all of the weight, and the loss of the tokens that read it is
compared with what it was. So this says, afterwards, which choice would have been the best.
"""
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fast


@torch.no_grad()
def losses_alone(model, tokens, chunk, candidates):
    """Mean losses of a chunk's next tokens: (n,), reading each candidate chunk (n,) alone; and as it is."""
    n_text, G, K = model.config.chunk_size - 1, model.config.n_group, model.config.top_k
    start, stop = chunk * n_text, (chunk + 1) * n_text
    memory = fast.Memory(model)
    fast.read(model, tokens[None, :start], memory, "last")
    weights = torch.zeros(1, 1, K, device=tokens.device)
    weights[..., 0] = 1                                     # one chunk has all of the weight

    def loss(serving):
        fork = memory.fork()
        fork.serving = serving or fork.serving              # what the chunk to come will attend to
        logits = fast.read(model, tokens[None, start:stop], fork)[0]
        return F.cross_entropy(logits.float(), tokens[start + 1:stop + 1])

    indices = torch.full((len(candidates), 1, 1, K), -1, device=tokens.device)
    indices[..., 0] = candidates[:, None, None]
    return torch.stack([loss([(weights, index)] * G) for index in indices]), loss(None)


def show_best(trace, model, near, n):
    """Print what the best chunk beyond the window would give n chunks in the second half of the text.

    trace: tools/inspect.py's, of a text that passed check_size(); near: how many chunks the window touches.
    """
    tokens = torch.tensor(trace.tokens, device=model.embedding.weight.device)
    last = (len(tokens) - 1) // trace.n_text - 1            # the last chunk whose next tokens are all known
    first, rows = max(last // 2, near + 2), []
    chunks = np.linspace(first, last, min(n, last - first + 1)).round().astype(int).tolist()
    for chunk in tqdm(chunks, leave=False, unit="chunk", disable=None):         # only on a terminal
        candidates = torch.arange(chunk - near, device=tokens.device)
        alone, as_it_is = losses_alone(model, tokens, chunk, candidates)
        chosen = {index for group in range(len(trace.indices)) for index, *_ in trace.best(group, chunk)}
        is_chosen = int(alone.argmin()) in chosen
        by_chance = sum(index < len(candidates) for index in chosen) / len(candidates)
        rows.append([as_it_is, alone.mean(), alone.min(), is_chosen, by_chance])
    as_it_is, mean, best, hit, chance = torch.tensor(rows).mean(0).tolist()
    print(f"mean loss of {len(rows)} chunks: {as_it_is:.3f} with all that they retrieved. If each read one "
          f"chunk alone from beyond the window: {mean:.3f} on average, {best:.3f} with the best one. It had "
          f"retrieved that one in {100 * hit:.0f}% of the cases (by chance in {100 * chance:.0f}%)")
