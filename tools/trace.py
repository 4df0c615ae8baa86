"""What a DRT retrieves: for each chunk of a text the chunks it attended to, and which tokens that helped.

    python eval.py inspect ..                   for one chunk, and as a page

    trace = Trace(model, tokens, decode)        one text, read once with retrieval and once without
    trace.show(chunk)                           what one chunk retrieved, on the terminal
    trace.page(path)                            all of it, as one HTML file
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fast.files import atomic_file
from gca import require
from model import DRTConfig, WholeText, retrieve
from tasks import EVALUATION
from tasks.needles import NeedleConfig, Needles
from tasks.text import load_corpus, load_tokenizer
from tools import cli, exits
from tools.checkpoint import RUN_PARTS, check_corpus, load_checkpoint

MOST = 2 ** 13              # chunks: scores of all pairs of them are held at once
LEVELS = 4                  # shades, in each direction, of what retrieval did to a token's loss
NATS = 2.0                  # the loss difference that the last shade stands for


def flags(parser):
    text = cli.add_text(parser)
    text.add_argument("--needles", type=int, help="a text of so many tokens with needles and questions")
    parser.add_argument("--questions", type=int, help="with --needles: at least so many (1)")
    parser.add_argument("--chunk", type=int, help="its number; default: the last, or the last question")
    parser.add_argument("--data", help="with --needles, the haystack; default: training's")
    parser.add_argument("--html", type=Path, help="write a page of all chunks to this file")
    cli.add_shared(parser, "ckpt seed device")


def run(args, device):
    """Show what a chunk of a text retrieved, and write the page; returns the run's settings."""
    for name in ("questions", "data"):
        require(args.needles or getattr(args, name) is None, f"--{name} must be left out without --needles")
    text = cli.given_text(args) if args.needles is None else None
    model, saved = load_checkpoint(args.ckpt, device, RUN_PARTS)
    if text is not None:
        tokenizer = load_tokenizer(saved["tokenizer"])
        ids = torch.from_numpy(np.array(tokenizer.encode(text), np.int64)).to(device)
        check_size(model, len(ids), args.chunk)
        trace, title = Trace(model, ids, tokenizer.decode_bytes), "What it retrieves"
        chunk = trace.n_chunk - 1
    else:
        check_size(model, args.needles, args.chunk)
        settings = vars(NeedleConfig()) | saved["settings"] | vars(model.config)
        cli.check_types(settings, [NeedleConfig, DRTConfig], args.ckpt, ["vocab_size"])
        corpus = load_corpus(args.data or settings["data"])
        check_corpus(corpus, saved, args.ckpt, args.data)
        task = Needles(settings, corpus)
        task.check(args.needles, "--needles")
        traces = [*needle_traces(model, task, args.needles, args.questions or 1, args.seed)]
        trace, pairs = traces[0]
        title, chunk = f"{args.needles:,} tokens with needles", pairs[-1][0]
        hits, n = sum(first_of_all(*x) for x in traces), sum(len(pairs) for _, pairs in traces)
        exits.say(f"{hits} of {n} questions retrieved a chunk of their needle before all others")
    chunk = chunk if args.chunk is None else args.chunk
    if args.html:
        trace.page(args.html, title, chunk)
    trace.show(chunk)
    trace.show_landmarks(chunks_in_window(model))
    if args.html:
        print(f"{args.html} is written.")
    return saved["settings"], None


def chunks_in_window(model):
    """How many chunks before its own a token can see at least a part of, at most."""
    return -(-model.config.window // model.config.chunk_size)


def check_size(model, n_token, chunk):
    """ValueError for a text or a chunk that cannot be shown, before it is read."""
    require(model.config.n_group, "--ckpt must be of a DRT: a base LM (--n_group 0) retrieves nothing")
    n_text = model.config.chunk_size - 1
    most = MOST * n_text
    require(1 <= n_token <= most, f"the text must have 1 to {most:,} tokens, got {n_token:,}")
    n_chunk = -(-n_token // n_text)
    require(chunk is None or 0 <= chunk < n_chunk, f"--chunk must be in 0 .. {n_chunk - 1}, got {chunk}")


class Trace:
    """What reading a text retrieved.

    weights, indices, scores    (G, C, K): of the chunks that chunk c attended to; index -1: an empty slot
    gain                        (T,) nats that retrieval took off the loss of each token; the first has none
    """

    def __init__(self, model, tokens, decode):
        """tokens (T,) on the model's device, that pass check_size(); decode: token ids -> bytes."""
        self.n_text, self.tokens, self.decode = model.config.chunk_size - 1, tokens.tolist(), decode
        self.n_chunk = -(-len(tokens) // self.n_text)
        config, found = model.config, []        # of each group: weights, indices, scores

        def watch(scores):
            weights, indices = retrieve(scores, config.top_k, config.retriever)
            found.append([weights, indices, scores.gather(-1, indices.clamp(min=0))])
            return weights, indices

        def withhold(scores):
            weights, indices = retrieve(scores, config.top_k, config.retriever)
            return weights * 0, indices * 0 - 1

        text = WholeText(model, len(tokens), watch)
        with_retrieval = losses(model, tokens, text)
        without = losses(model, tokens, WholeText(model, len(tokens), withhold))
        self.landmarks = text.landmarks[0].float().cpu()                        # (complete chunks, d)
        weights, indices, scores = (torch.cat(x).cpu() for x in zip(*found, strict=True))
        self.weights, self.scores = self.served(weights, 0), self.served(scores, 0)
        self.indices = self.served(indices, -1)
        self.gain = F.pad(without - with_retrieval, (1, 0)).cpu()

    def served(self, x, empty):                 # what landmark t found, in the row of chunk t + 1
        return F.pad(x, (0, 0, 1, 0), value=empty)[:, :self.n_chunk]

    def text(self, chunk):
        """A chunk's text; what is not UTF-8 as \\x.."""
        ids = self.tokens[chunk * self.n_text:(chunk + 1) * self.n_text]
        return self.decode(ids).decode(errors="backslashreplace")

    def best(self, group, chunk):
        """[(index, weight, score)] of what a chunk retrieved, the heaviest first."""
        columns = (x[group, chunk].tolist() for x in (self.indices, self.weights, self.scores))
        slots = [slot for slot in zip(*columns, strict=True) if slot[0] >= 0]
        return sorted(slots, key=lambda slot: -slot[1])

    def show(self, chunk):
        """Print a chunk and what it retrieved: weight as a bar and a number, score, distance, text."""
        start = chunk * self.n_text
        text = exits.visible(self.text(chunk))
        print(f"chunk {chunk} of 0 .. {self.n_chunk - 1}, from token {start:,}: {text}")
        if chunk:
            print(f"the chunk before it, whose landmark searched: {exits.visible(self.text(chunk - 1))}")
        for group in range(len(self.indices)):
            print(f"retrieved by group {group + 1}:" if len(self.indices) > 1 else "retrieved:")
            for index, weight, score in self.best(group, chunk):
                distance = (chunk - index) * self.n_text
                print(f"  {'█' * round(20 * weight):20} {weight:5.3f}  score {score:7.2f}  chunk {index:5}  "
                      f"{distance:9,} tokens before  {exits.visible(self.text(index))}")
            if not self.best(group, chunk):
                print("  nothing: there is no chunk before the one that searched")
        gain = self.gain[start:start + self.n_text].sum()
        print(f"{gain:+.2f} nats gained on this chunk, over reading all of the text without retrieval")

    def show_landmarks(self, near):
        """Print how alike landmarks are, over how many chunks weights spread, and where these chunks are."""
        n, K = len(self.landmarks), self.indices.shape[2]
        full = (self.indices >= 0).all(2)                                       # (G, C) with K chunks each
        if n < 2 or not full.any():
            return
        unit = F.normalize(self.landmarks, dim=1)
        cosine = (unit.sum(0).square().sum() - n) / (n * (n - 1))               # mean over all pairs
        weights, indices = self.weights[full], self.indices[full]               # (chunks, K)
        spread = (-(weights * weights.clamp(min=1e-9).log()).sum(1)).exp().mean()
        distance = torch.arange(self.n_chunk).expand(len(full), -1)[full][:, None] - indices
        far = (distance > near).float().mean()              # near: chunks_in_window()
        counts = indices.flatten().bincount(minlength=n).sort(descending=True).values
        popular = counts[:max(1, n // 10)].sum() / counts.sum()
        print(f"landmarks: mean cosine {cosine:.3f}; in the mean {K} chunks weigh as {spread:.1f} equal "
              f"ones would; {100 * far:.0f}% of them lie beyond the window; the most popular tenth of all "
              f"chunks has {100 * popular:.0f}% of the retrievals")

    def page(self, path, title, chosen):
        """Write one self-contained HTML page: chunks, what each retrieved, and whom it helped."""
        chunks = []
        for c in range(self.n_chunk):
            found = [[[index, round(weight, 3), round(score, 2)] for index, weight, score in self.best(g, c)]
                     for g in range(len(self.indices))]
            chunks.append([self.runs(c), found])
        data = dict(title=title, chosen=chosen, tokensPerChunk=self.n_text, chunks=chunks)
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag can end the script
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        with atomic_file(path) as file:
            file.write(page.replace("DATA", text, 1).encode())

    def runs(self, chunk):
        """[[text, shade]] of a chunk: neighbours that gained alike are one, and so is a character's bytes."""
        start, runs = chunk * self.n_text, []
        gains = self.gain[start:start + self.n_text]
        shades = (gains / NATS * LEVELS).round().clamp(-LEVELS, LEVELS).int().tolist()
        for token, shade in zip(self.tokens[start:start + self.n_text], shades, strict=True):
            inside = runs and goes_on(self.decode(runs[-1][0][-1:]), self.decode([token]))
            if runs and (inside or runs[-1][1] == shade):
                runs[-1][0].append(token)
            else:
                runs.append([[token], shade])
        return [[self.decode(ids).decode(errors="backslashreplace"), shade] for ids, shade in runs]


def goes_on(before, after):             # whether a UTF-8 character that began in one is not over in the other
    return before[-1:] >= b"\x80" and b"\x80" <= after[:1] < b"\xc0"


@torch.no_grad()
def losses(model, tokens, text):
    """The loss of each token but the first (T - 1,), as this WholeText reads them."""
    hidden = model.hidden(tokens[None], text)[0, :-1]
    pieces = zip(hidden.split(4096), tokens[1:].split(4096), strict=True)
    return torch.cat([F.cross_entropy(model.head(x).float(), y, reduction="none") for x, y in pieces])


def needle_traces(model, task, length, n_question, seed):
    """(trace, [(question, its needles)]) of contexts with n_question questions in all: numbers of chunks.

    The question is the chunk that opens with its colon, for which the chunk before it has retrieved.
    """
    haystack = task.haystack
    n, n_text = haystack.questions_in(length, task.n_needle), haystack.n_text
    n_name, alphabet = haystack.n_name, haystack.alphabet
    decode = load_tokenizer(task.corpus.tokenizer).decode_bytes
    rng = np.random.default_rng([EVALUATION, seed, length])
    for _ in range(-(-n_question // n)):
        tokens = haystack.batch(task.corpus.val, rng, 1, length, n)[0][0]
        pairs = []
        for question in haystack.chunks_after_questions(length, n).tolist():
            asked, needles = tokens[question * n_text - n_name:question * n_text], []
            for name in np.split(asked, np.flatnonzero(asked == alphabet.ask)):         # one, or a ?d
                begins = [alphabet.bar, *name[name != alphabet.ask], alphabet.colon]    # |name:
                found = (np.lib.stride_tricks.sliding_window_view(tokens, len(begins)) == begins).all(1)
                for i in np.flatnonzero(found).tolist():
                    needles += range(i // n_text, (i + haystack.needle_length - 1) // n_text + 1)
            pairs.append((question, needles))
        yield Trace(model, torch.from_numpy(tokens).to(model.embedding.weight.device), decode), pairs


def first_of_all(trace, pairs):
    """Of how many questions a needle's chunk was the heaviest of those retrieved, in any group."""
    groups = range(len(trace.indices))
    return sum(any(index in needles for g in groups for index, *_ in trace.best(g, chunk)[:1])
               for chunk, needles in pairs)
