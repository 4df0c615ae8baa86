"""What a DRT remembers of a text: windows, the chunk it is in, and every chunk's landmark, keys and values.

    memory = Memory(model)                          fast.read(model, tokens, memory) fills it, piece by piece
    memory = Memory(model, offload=True)            chunk keys and values in CPU memory, the rest on the GPU
    question = memory.fork()                        shares the past: many questions about one document
    memory.save(path); Memory.load(path, model)     read a long document once, ask it often

Of fixed size are each layer's window, the chunk being read, and what each group has retrieved for it. Only
the chunks grow: landmarks, and keys and values. GCA reads the K chunks retrieved and no others, so keys and
values can stay in CPU memory, whatever the length: K chunks travel to the GPU for each chunk that is read.
"""
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from fast.files import Damaged, atomic_file, load_saved
from fast.offload import ChunkCache, copy_stream, copying
from gca import require
from model import DRTConfig, band_bias

FORMAT = "DRT memory 1"
PINNED_BYTES = 2 ** 32      # of a page's keys, at most: torch rounds pinned memory up to the next power of 2


class Page:
    """Chunks side by side: landmarks (B, M, d), keys and values (B, M, S-1, Hkv, D); `used` are filled."""

    def __init__(self, tensors, used=0):
        self.tensors, self.used = list(tensors), used

    @classmethod
    def like(cls, tensors, room, offload):
        """An empty page with room for `room` chunks like these; offload: keys and values in pinned memory."""
        def empty(x, to_cpu):
            device, pin = ("cpu", torch.cuda.is_available()) if to_cpu else (x.device, False)
            return torch.empty(x.shape[0], room, *x.shape[2:], dtype=x.dtype, device=device, pin_memory=pin)

        return cls([empty(x, offload and i > 0) for i, x in enumerate(tensors)])

    def write(self, tensors):
        """Put these chunks behind those that are there; from GPU to CPU memory on the copy stream."""
        stop = self.used + tensors[0].shape[1]
        for page, new in zip(self.tensors, tensors, strict=True):
            if page.device == new.device:
                page[:, self.used:stop] = new
                continue
            with copying(new.device):
                for row, chunks in zip(page, new, strict=True):      # a row at a time: one stretch of memory
                    row[self.used:stop].copy_(chunks, non_blocking=True)
            if new.is_cuda:
                new.record_stream(copy_stream(new.device))
        self.used = stop

    def filled(self):
        """The chunks that are there: landmarks, keys and values."""
        return [x[:, :self.used] for x in self.tensors]


class Memory:
    """All that reading leaves behind, for batch_size sequences that are read side by side.

    offload    keys and values of the chunks in pinned CPU memory; it changes nothing without a GPU
    capacity   tokens of room, taken at once; reading more is an error. None: room doubles when it runs out
    """

    def __init__(self, model, batch_size=1, offload=False, capacity=None):
        config = model.config
        require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
        require(capacity is None or capacity >= 1, f"capacity must be at least 1, got {capacity}")
        self.model, self.batch_size, self.capacity = model, batch_size, capacity
        self.state = State(model)                               # of the weights that wrote this memory
        self.device = model.embedding.weight.device
        if offload and self.device.type != "cuda":
            warnings.warn("offload changes nothing: the model is on the CPU", stacklevel=2)
        self.cache = ChunkCache(config.n_group) if offload and self.device.type == "cuda" else None
        self.length = 0                                         # text tokens read so far
        self.window = [None] * config.n_layer                   # each layer's (k, v) of the last W positions
        self.bias = band_bias(1, config.window + 1, config.window, model.slopes)[:, 0]  # of a single query
        self.unfinished = None                                  # (B, <S, d) of the lower decoder, last chunk
        no_slot = torch.zeros(batch_size, 1, config.top_k, device=self.device)
        self.serving = [(no_slot, no_slot.long() - 1)] * config.n_group   # weights, indices: for that chunk
        self.served = {}                                        # what serve() returned last, for each group
        self.pages = []                                         # the chunks, in order
        self.is_own = False                                     # the last page is this memory's alone

    @property
    def chunks(self):
        return sum(page.used for page in self.pages)

    def landmarks(self):
        """Every chunk's l_c, as a list of (B, M, d)."""
        return [page.tensors[0][:, :page.used] for page in self.pages]

    def append(self, *tensors):
        """Store whole chunks, none only at first: their landmarks, keys and values, (B, C, ...) each."""
        n_new = tensors[0].shape[1]
        if not (self.is_own and self.pages[-1].used + n_new <= self.pages[-1].tensors[0].shape[1]):
            self.open_page(tensors, n_new)
        self.pages[-1].write(tensors)

    def open_page(self, tensors, n_new):
        """A new last page, so that reading n chunks takes O(n) time in all.

        On the model's device, the chunks of an outgrown page move to one of twice the size: GCA is then one
        call. Pages in CPU memory stay where they are, and get company. Of pages shared with other memories,
        small ones at the end are copied: so a conversation of many forks has few pages.
        """
        moved, total = [], self.chunks
        if self.is_own and not self.cache:
            moved = [self.pages.pop()]
            n_new += moved[0].used
        while not self.is_own and self.pages and self.pages[-1].used <= n_new:
            moved.insert(0, self.pages.pop())
            n_new += moved[0].used
        room = 2 * n_new
        if self.capacity and not self.pages:
            room = max(n_new, self.capacity // (self.model.config.chunk_size - 1))
        if self.cache:
            room = max(n_new, min(max(room, total), PINNED_BYTES // tensors[1][:, :1].nbytes if n_new else 0))
        new = Page.like(tensors, room, self.cache is not None)
        if moved and self.cache and self.device.type == "cuda":
            copy_stream(self.device).synchronize()              # chunks may still be on their way
        for page in moved:
            new.write(page.filled())
        self.pages, self.is_own = [*self.pages, new], True

    def serve(self, g, indices):
        """Where GCA finds the chunks that group g retrieved, indices (B, n, K).

        Returns pages of (k, v, chunks used), the indices as they count there, and a CUDA event to wait for,
        or None.
        """
        if not self.cache:
            return [(*page.tensors[1:], page.used) for page in self.pages], indices, None
        known, generation, served = self.served.get(g, (None, None, None))
        if known is not indices or generation != self.cache.generation:        # not the same as a token ago
            slots = self.cache.fetch(self.pages, indices)
            event = copy_stream(self.device).record_event() if self.device.type == "cuda" else None
            served = [(self.cache.k, self.cache.v, self.cache.k.shape[1])], slots, event
            self.served[g] = indices, self.cache.generation, served
        return served

    def check(self, model, tokens, n_new=0):
        """ValueError if the model cannot read these tokens, and n_new that it writes, into this memory."""
        weight = model.embedding.weight
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        require(self.model is model, "memory must be this model's own; it was made for another model")
        self.check_weights()
        require(tokens.dim() == 2 and tokens.numel(),
                f"tokens must be (B, n), at least one for each sequence, got {(*tokens.shape,)}")
        require(self.device == device, f"memory must be on the model's device {device}, got {self.device}")
        require(len(tokens) == self.batch_size,
                f"tokens must be {self.batch_size} sequences, as the memory, got {len(tokens)}")
        begun = self.pages[0].tensors[1].dtype if self.pages else dtype
        require(begun == dtype, f"memory must be read on in {begun}, in which it was begun (torch.autocast "
                f"sets that), got {dtype}")
        n_more = tokens.shape[1] + n_new
        require(not self.capacity or self.length + n_more <= self.capacity,
                f"tokens must fit the memory's capacity of {self.capacity}: it holds {self.length}, "
                f"and {n_more} more were to be read")

    def check_weights(self):
        require(self.state.now() == self.state.before, "memory must be of the model's weights and settings: "
                "they have changed since it was begun; read the text again")

    def fork(self):
        """A memory that goes its own way from here. The chunks read so far are shared, not copied.

        This memory goes on writing behind the chunks of its last page. The fork does not look there, and
        opens a page of its own.
        """
        other = self.twin()
        other.window = [kv and tuple(x.clone() for x in kv) for kv in self.window]
        other.serving, other.served, other.is_own = list(self.serving), {}, False
        other.pages = [Page(page.tensors, page.used) for page in self.pages]
        other.cache = ChunkCache(self.cache.n_group) if self.cache else None
        return other

    __copy__ = fork                             # copies of it that share windows would spoil each other

    def __deepcopy__(self, _):
        return self.fork()

    def __reduce__(self):
        raise TypeError("a memory cannot be pickled: save(path) writes it, and fork() copies it")

    def twin(self):                             # another object with the same parts
        other = object.__new__(Memory)
        vars(other).update(vars(self))
        return other

    def snapshot(self):
        """What restore() needs to undo a read that failed."""
        state = dict(vars(self), window=list(self.window), serving=list(self.serving), pages=list(self.pages))
        return state, [page.used for page in self.pages]

    def restore(self, snapshot):
        state, used = snapshot
        vars(self).update(state)
        for page, n in zip(self.pages, used, strict=True):
            page.used = n
        if self.cache:
            self.cache.forget()

    @property
    def nbytes(self):
        """Bytes allocated by place, room for more chunks included: dict(gpu=.., cpu=..)."""
        tensors = [x for pair in (*self.window, *self.serving) if pair for x in pair]
        tensors += [x for page in self.pages for x in page.tensors]
        if self.unfinished is not None:
            tensors.append(self.unfinished)
        if self.cache:
            tensors += [x for x in vars(self.cache).values() if torch.is_tensor(x)]
        size = dict(gpu=0, cpu=0)
        for x in tensors:
            size["gpu" if x.is_cuda else "cpu"] += x.numel() * x.element_size()
        return size

    def save(self, path):
        """Write everything to a file, atomically. Memory.load reads it, for the same model, on any device."""
        self.check_weights()
        if self.device.type == "cuda":
            torch.cuda.synchronize()                            # chunks may still be on their way
        chunks = [torch.cat([x.cpu() for x in parts], dim=1)
                  for parts in zip(*(page.filled() for page in self.pages), strict=True)]
        state = dict(format=FORMAT, config=asdict(self.model.config), weights=fingerprint(self.model),
                     batch_size=self.batch_size, length=self.length, window=self.window,
                     unfinished=self.unfinished, serving=self.serving, chunks=chunks)
        with atomic_file(path) as file:
            torch.save(state, file)

    @classmethod
    def load(cls, path, model, offload=False, capacity=None):
        """The memory in a file that save() wrote; ValueError if it is none, damaged, or another model's."""
        require(Path(path).is_file(), f"no memory file at {path}")
        state = load_saved(path, "a memory that Memory.save wrote", PARTS)
        require(state["format"] == FORMAT, f"{path} has format {state['format']!r}, and must have {FORMAT!r}")
        config = asdict(DRTConfig()) | dict(encoder_rope=False) | state["config"]       # an old file's, too
        require(config == asdict(model.config) and state["weights"] == fingerprint(model),
                f"{path} must be a memory of this model; another model's weights wrote it")
        if not holds_its_length(state, model.config):
            raise Damaged(f"{path} is damaged: its tensors are not those of {state['length']} tokens")
        memory = cls(model, state["batch_size"], offload, capacity)
        memory.length = state["length"]
        require(not capacity or memory.length <= capacity,
                f"capacity must be at least the {memory.length} tokens in {path}, got {capacity}")

        def to_device(pair):
            return tuple(x.to(memory.device) for x in pair) if pair else None

        memory.window = [to_device(pair) for pair in state["window"]]
        memory.serving = [to_device(pair) for pair in state["serving"]]
        if state["unfinished"] is not None:
            memory.unfinished = state["unfinished"].to(memory.device)
        if state["chunks"]:
            landmarks, *keys_values = state["chunks"]
            device = "cpu" if memory.cache else memory.device
            memory.append(landmarks.to(memory.device), *(x.to(device) for x in keys_values))
        return memory


PARTS = dict(format=str, config=dict, weights=int, batch_size=int, length=int, window=list,
             unfinished=(torch.Tensor, type(None)), serving=list, chunks=list)          # of a file


def holds_its_length(state, config):
    """Whether the tensors of a file have the shapes that reading so many tokens leaves behind."""
    B, length, n_text = state["batch_size"], state["length"], config.chunk_size - 1
    n_chunk = length // n_text if config.n_group else 0
    n_position, D = length + n_chunk, config.n_embd // config.n_head
    kv = B, config.n_kv_head, min(config.window, n_position), D
    stored = B, n_chunk, n_text, config.n_kv_head, D
    slots = [(B, 1, config.top_k)] * 2
    shapes = dict(window=[[kv] * 2 if length else None] * config.n_layer, serving=[slots] * config.n_group,
                  unfinished=(B, length % n_text, config.n_embd) if config.n_group and length else None,
                  chunks=[(B, n_chunk, config.n_embd), stored, stored] if config.n_group and length else [])

    def shapes_of(x):
        if isinstance(x, list | tuple):
            return [shapes_of(y) for y in x]
        return tuple(x.shape) if torch.is_tensor(x) else x

    return B >= 1 and length >= 0 and all(shapes_of(state[name]) == shape for name, shape in shapes.items())


class State:
    """Of a model's weights and settings: whether they are what they were.

    torch counts a tensor's changes, but not those by a fused optimizer: hence one number of each, too. That
    waits for the GPU, once for each call of read().
    """

    def __init__(self, model):
        self.model = model
        self.first = [x.detach()[(0,) * x.dim()] for x in (*model.parameters(), *model.buffers())]  # views
        self.before = self.now()

    def now(self):
        tensors = [*self.model.parameters(), *self.model.buffers()]
        versions = [0 if x.is_inference() else x._version for x in tensors]
        numbers = torch.stack(self.first).nan_to_num().tolist()
        return versions, [x.data_ptr() for x in tensors], numbers, dict(vars(self.model.config))


def fingerprint(model):
    """A number that two models share if all their weights are the same, and hardly otherwise."""
    number = 0
    for p in model.parameters():
        number = zlib.crc32(p.detach().float().cpu().contiguous().numpy(), number)
    return number
