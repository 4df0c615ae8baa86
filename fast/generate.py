"""Generation at a constant cost per token: a DRT driven from above, by way of its memory (stream.py).

    for tokens in generate(model, prompts, 100): ..     (B,) at a time

Inside a chunk nothing is retrieved, so on a GPU each token there is one CUDA graph (GraphedStep).
"""
import torch
import torch.nn.functional as F

from fast import short
from fast.launch import own_workspaces
from fast.memory import Memory
from fast.stream import read, read_segment
from gca import require


def generate(model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), pad=None,
             memory=None, offload=False):
    """Yield the tokens that follow each prompt, (B,) at a time; -1 for a sequence that has ended.

    prompt          (B, n) tokens, or a list of B prompts of different lengths
    temperature     0: always the likeliest token; otherwise torch.manual_seed makes it repeatable
    top_k, top_p    sample among the k likeliest; among the likeliest that hold top_p of the probability
    stop            tokens that end a sequence (they are yielded); until all have ended it reads `pad`
    memory          what was read before the prompt. Afterwards it holds prompt and answer, up to the last
                    token that was yielded: fork() to keep what it was
    offload         as in Memory, where memory is None

    A prompt is padded on the left, with token `pad`, so that its last token opens a chunk. All of a question
    then lies in chunks whose landmarks have retrieved when the first new token is predicted. pad: default a
    newline of the tokenizer, for a model from a checkpoint; otherwise 0. Raises ValueError, which names the
    argument, before anything is generated.
    """
    pad = getattr(model, "newline", 0) if pad is None else pad
    device = model.embedding.weight.device
    prompts, stop = [torch.as_tensor(row, device=device) for row in prompt], [*stop]
    check_generation(prompts, model.config.vocab_size, max_new_tokens, temperature, top_k, top_p, stop, pad)
    batches = as_batches(model, [row.long() for row in prompts], max_new_tokens, pad, memory, offload)
    return generate_batches(model, batches, max_new_tokens, (temperature, top_k, top_p), stop, pad,
                            reads_last=memory is not None)


def check_generation(prompts, vocab_size, max_new_tokens, temperature, top_k, top_p, stop, pad):
    require(prompts and all(row.dim() == 1 and len(row) and not row.is_floating_point() for row in prompts),
            "prompt must be (B, n) tokens, or a list of sequences, none of them empty")
    ids = torch.cat([*prompts, torch.tensor([pad, *stop], device=prompts[0].device)])
    wrong = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    require(not wrong, f"prompt, stop and pad must be token ids in [0, {vocab_size}), got {wrong[:1]}")
    require(max_new_tokens >= 0, f"max_new_tokens must be at least 0, got {max_new_tokens}")
    require(0 <= temperature < float("inf"), f"temperature must be at least 0, got {temperature}")
    require(top_k is None or top_k >= 1, f"top_k must be at least 1, got {top_k}")
    require(top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p}")


def as_batches(model, prompts, max_new_tokens, pad, memory, offload):
    """Pad prompts so that the last token of each opens a chunk, and put those of one length side by side.

    Returns for each batch: which prompts they are, their tokens (B, n), and a memory to read them into.
    """
    n_text, n_before = model.config.chunk_size - 1, memory.length if memory else 0
    by_length = {}
    for i, row in enumerate(prompts):
        row = F.pad(row, ((1 - n_before - len(row)) % n_text, 0), value=pad)
        by_length.setdefault(len(row), []).append((i, row))
    require(not memory or len(by_length) == 1,
            "prompt: those that continue one memory must have the same length, in chunks")
    batches = []
    for batch in by_length.values():
        numbers, rows = [i for i, _ in batch], torch.stack([row for _, row in batch])
        batch_memory = memory or Memory(model, len(rows), offload)
        batch_memory.check(model, rows, max_new_tokens)
        batches.append((numbers, rows, batch_memory))
    return batches


@torch.inference_mode(False)        # so that a memory can be read on in whatever mode
@torch.no_grad()
def generate_batches(model, batches, max_new_tokens, sampling, stop, pad, reads_last):
    """The loop of generate(): batches from as_batches; sampling: temperature, top_k, top_p.

    reads_last: each new token is read before it is yielded, also the last one, which nobody else needs read.
    """
    device, n_text = model.embedding.weight.device, model.config.chunk_size - 1
    for _, tokens, memory in batches:
        require((memory.length + tokens.shape[1] - 1) % n_text == 0,
                "memory must stay as it was when generate() was called, until that begins: fork() it")
    stop, steps = torch.tensor(stop, device=device), [GraphedStep(model) for _ in batches]
    numbers = [i for batch_numbers, _, _ in batches for i in batch_numbers]
    order = torch.tensor(numbers, device=device).argsort()
    ended = [torch.full((len(tokens),), False, device=device) for _, tokens, _ in batches]
    newest = [tokens for _, tokens, _ in batches]                       # what each batch has to read next

    def read_newest():
        logits = []
        for tokens, step, (_, _, memory) in zip(newest, steps, batches, strict=True):
            fits = tokens.shape[1] == 1 and step.fits(memory)
            logits.append(step(tokens, memory) if fits else read(model, tokens, memory, "last"))
        return logits

    logits = read_newest() if max_new_tokens or reads_last else []
    for n in range(max_new_tokens):
        yielded = []
        for i, scores in enumerate(logits):
            new = sample(scores, *sampling)
            yielded.append(new.masked_fill(ended[i], -1))
            newest[i] = new.masked_fill(ended[i], pad)[:, None]
            ended[i] |= torch.isin(new, stop)
        is_last = n + 1 == max_new_tokens or bool(len(stop)) and bool(torch.cat(ended).all())
        if reads_last:
            logits = read_newest()
        yield torch.cat(yielded)[order]
        if is_last:
            return
        if not reads_last:
            logits = read_newest()


def sample(logits, temperature, top_k=None, top_p=None):
    """Draw one token for each row of logits (B, vocab_size) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.max(-1, keepdim=True).values) / max(temperature, 1e-6)    # finite, however cold
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = (p.cumsum(-1) - p >= top_p).scatter(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(beyond, float("-inf"))
    return logits.softmax(-1).multinomial(1)[:, 0]


class GraphedStep:
    """Reading one token inside a chunk, as a CUDA graph: one launch instead of hundreds.

    It runs read_segment on a memory of its own, whose tensors keep their places: the windows move on inside
    the graph, and what the groups have retrieved is copied in when a new chunk begins.
    """

    def __init__(self, model):
        self.model, self.graph = model, None

    def fits(self, memory):
        """A GPU, full windows, and a token that does not complete its chunk: nothing changes its shape."""
        config, n_text = self.model.config, self.model.config.chunk_size - 1
        return (memory.device.type in short.DEVICES and memory.window[0] is not None
                and memory.window[0][0].shape[2] == config.window
                and (not config.n_group or memory.length % n_text < n_text - 1 and memory.chunks))

    def __call__(self, token, memory):
        """token (B, 1) -> logits (B, vocab_size), as read() would give."""
        served = [memory.serve(g, indices) for g, (_, indices) in enumerate(memory.serving)]
        addresses = [(k.data_ptr(), v.data_ptr()) for pages, _, _ in served for k, v, _ in pages]
        if self.graph is None or addresses != self.addresses:   # pages have moved since it was recorded
            self.addresses = addresses
            self.record(memory, served)
        if memory.window[0] is not self.window[0]:              # a new chunk
            for mine, (k, v) in zip(self.window, memory.window, strict=True):
                mine[0].copy_(k)
                mine[1].copy_(v)
            for g, (_, indices, ready) in enumerate(served):
                self.weights[g].copy_(memory.serving[g][0])
                self.indices[g].copy_(indices)
                if ready:
                    ready.wait()
        self.token.copy_(token)
        self.graph.replay()
        memory.length, memory.window = memory.length + 1, list(self.window)
        if self.unfinished is not None:
            memory.unfinished = torch.cat([memory.unfinished, self.unfinished], dim=1)
        return self.logits

    def record(self, memory, served):
        self.token = torch.zeros(memory.batch_size, 1, dtype=torch.long, device=memory.device)
        self.window = [(k.clone(), v.clone()) for k, v in memory.window]
        self.weights = [weights.clone() for weights, _ in memory.serving]
        self.indices = [indices.clone() for _, indices, _ in served]
        mine = memory.twin()
        mine.serving = list(zip(self.weights, self.indices, strict=True))
        mine.serve = lambda g, indices: (served[g][0], self.indices[g], None)

        def run():
            mine.window, mine.unfinished, mine.length = list(self.window), None, memory.length
            self.logits = self.model.head(read_segment(self.model, self.token, mine)[:, -1])
            for (k, v), (new_k, new_v) in zip(self.window, mine.window, strict=True):
                k.copy_(new_k)
                v.copy_(new_v)
            self.unfinished = mine.unfinished

        self.graph = torch.cuda.CUDAGraph()
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"),
                            cache_enabled=False):               # cached casts would not outlive the context
            run()                                               # compile and choose algorithms
            with own_workspaces(), torch.cuda.graph(self.graph):
                run()
