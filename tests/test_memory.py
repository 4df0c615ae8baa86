"""A memory holds what was said, and nothing else: copies, modes, weights that change, random programs."""
import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

import fast
from fast.memory import Memory
from helpers import random_tokens, tiny

CLOSE = dict(atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_group", [0, 1])
@pytest.mark.parametrize("n, taken", [(1, 1), (20, 20), (20, 7)])
def test_a_memory_holds_all_that_was_yielded(n_group, n, taken):
    """Also if whoever asked has seen enough before the end."""
    model, prompt, more = tiny(n_group=n_group), random_tokens(2, 31), random_tokens(2, 40)
    memory, new = Memory(model, 2), []
    for token in fast.generate(model, prompt, n, temperature=0, memory=memory):
        new.append(token)
        if len(new) == taken:
            break
    text = torch.cat([prompt, torch.stack(new, dim=1)], dim=1)
    assert memory.length == text.shape[1] == 31 + taken
    expected = model(torch.cat([text, more], dim=1))[0][:, -40:]
    torch.testing.assert_close(fast.read(model, more, memory), expected, **CLOSE)


def test_a_sequence_that_has_ended_reads_padding():
    model, prompt, more = tiny(), random_tokens(3, 31), random_tokens(3, 30)
    free = torch.stack([*fast.generate(model, prompt, 12, temperature=0)], dim=1)
    stop, memory = free[0, 4].item(), Memory(model, 3)
    options = dict(temperature=0, stop=[stop], pad=7, memory=memory)
    given = torch.stack([*fast.generate(model, prompt, 12, **options)], dim=1)
    assert (given[0, 5:] == -1).all() and memory.length == 31 + given.shape[1]
    text = torch.cat([prompt, given.where(given >= 0, 7), more], dim=1)
    torch.testing.assert_close(fast.read(model, more, memory), model(text)[0][:, -30:], **CLOSE)


def train_a_step(model):
    model(random_tokens(1, 40), random_tokens(1, 40))[1].backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def train_what_is_not_frozen(model):
    """By a fused optimizer, whose changes torch does not count."""
    model.norm.requires_grad_(False)
    train_a_step(model)


@pytest.mark.parametrize("change", [
    train_a_step, train_what_is_not_frozen, lambda model: setattr(model.config, "softmax_one", False),
    lambda model: model.slopes.mul_(2), lambda model: model.load_state_dict(tiny(seed=1).state_dict()),
    lambda model: setattr(model.norm, "weight", torch.nn.Parameter(model.norm.weight * 2))])
def test_weights_that_change_under_a_memory_are_refused(change, tmp_path):
    model, tokens = tiny(), random_tokens(1, 50)
    memory = Memory(model)
    fast.read(model, tokens, memory)
    change(model)
    with pytest.raises(ValueError, match="have changed since it was begun"):
        fast.read(model, tokens, memory)
    with pytest.raises(ValueError, match="have changed since it was begun"):
        fast.generate(model, tokens, 5, memory=memory)
    with pytest.raises(ValueError, match="have changed since it was begun"):
        memory.save(tmp_path / "memory")
    assert memory.length == 50
    torch.testing.assert_close(fast.read(model, tokens, Memory(model)), model(tokens)[0], **CLOSE)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_memory_is_a_fork(copied):
    model, (first, other, more) = tiny(), random_tokens(3, 1, 40)
    memory = Memory(model)
    fast.read(model, first, memory)
    twin = copied(memory)
    fast.read(model, other, twin)
    expected = model(torch.cat([first, more], dim=1))[0][:, 40:]
    torch.testing.assert_close(fast.read(model, more, memory), expected, **CLOSE)
    expected = model(torch.cat([first, other, more], dim=1))[0][:, 80:]
    torch.testing.assert_close(fast.read(model, more, twin), expected, **CLOSE)
    with pytest.raises(TypeError, match=r"save\(path\) writes it, and fork\(\) copies it"):
        pickle.dumps(memory)


@pytest.mark.parametrize("first, then", [(True, False), (False, True), (True, True)])
def test_a_memory_is_read_on_in_whatever_mode(first, then, tmp_path):
    model, tokens = tiny(), random_tokens(1, 120)
    memory = Memory(model)
    with torch.inference_mode(first):
        fast.read(model, tokens[:, :50], memory)
        [*fast.generate(model, tokens[:, 50:51], 10, memory=memory.fork())]
    memory.save(tmp_path / "memory")
    with torch.inference_mode(then):
        for again in (memory.fork(), Memory.load(tmp_path / "memory", model), memory):
            logits = fast.read(model, tokens[:, 50:], again).clone()
    torch.testing.assert_close(logits, model(tokens)[0][:, 50:], **CLOSE)


def test_reading_nothing_is_said():
    model = tiny()
    with pytest.raises(ValueError, match="at least one for each sequence"):
        fast.read(model, random_tokens(1, 0), Memory(model))


def test_a_mask_of_another_kind_or_shape_is_refused():
    model, tokens = tiny(), random_tokens(2, 30)
    for at in (torch.ones_like(tokens), torch.ones_like(tokens[:, 1:], dtype=torch.bool), "first"):
        with pytest.raises(ValueError, match="at must be a bool mask"):
            fast.read(model, tokens, Memory(model, 2), at)


# ---------------------------------------------------------------- random programs

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import strategies as st  # noqa: E402

OPERATIONS = ["read", "read", "generate", "stop", "fork", "save", "weights", "inference"]


@pytest.mark.parametrize("part", range(4))
def test_random_programs_of_a_memory(part, tmp_path):
    """Whatever is done with a memory, its text read at once gives the same; or it is refused in words."""
    small = dict(n_embd=16, n_head=2, chunk_size=5, top_k=2, window=4)
    models = [tiny(**small, n_group=n_group) for n_group in (1, 0)]
    examples = int(os.environ.get("PROGRAMS", 500))
    operation = st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 9))

    @hypothesis.settings(max_examples=examples, derandomize="PROGRAMS" not in os.environ, deadline=None,
                         database=None, suppress_health_check=[*hypothesis.HealthCheck])
    @hypothesis.seed(part)
    @hypothesis.given(st.integers(0, 2 ** 31), st.sampled_from(models),
                      st.lists(operation, min_size=1, max_size=6))
    @torch.no_grad()
    def check(seed, model, program):
        torch.manual_seed(seed + part)
        memory, text = Memory(model), random_tokens(1, 0)
        for what, n in program:
            if what == "weights":
                model.norm.weight.neg_()
                if text.shape[1]:
                    with pytest.raises(ValueError, match="have changed"):
                        fast.read(model, random_tokens(1, n), memory)
                memory, text = Memory(model), random_tokens(1, 0)
            elif what == "fork":
                other, memory = memory, memory.fork()
                fast.read(model, random_tokens(1, n), other)
            elif what == "save":
                memory.save(tmp_path / "memory")
                memory = Memory.load(tmp_path / "memory", model)
            elif what in ("generate", "stop"):
                prompt = random_tokens(1, n)
                pad = (1 - text.shape[1] - n) % (model.config.chunk_size - 1)
                stop = [*range(0, 256, 3)] if what == "stop" else []
                new = [*fast.generate(model, prompt, n, temperature=1.0, stop=stop, memory=memory, pad=3)]
                text = torch.cat([text, F.pad(prompt, (pad, 0), value=3), torch.stack(new, dim=1)], dim=1)
            else:
                tokens = random_tokens(1, n)
                with torch.inference_mode(what == "inference"):
                    logits = fast.read(model, tokens, memory).clone()
                text = torch.cat([text, tokens], dim=1)
                torch.testing.assert_close(logits, model(text)[0][:, -n:], atol=2e-4, rtol=1e-3)
            assert memory.length == text.shape[1]
        more = random_tokens(1, 3)
        expected = model(torch.cat([text, more], dim=1))[0][:, -3:]
        torch.testing.assert_close(fast.read(model, more, memory), expected, atol=2e-4, rtol=1e-3)

    check()
