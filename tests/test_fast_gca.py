"""The kernels of fast/gca.py and fast/hopper.py: the same results as the plain ones, and as the reference.

Lists are cut into pieces and heads into halves here even where inputs are small, so that all code runs.
"""
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fast.gca as fast_gca
from fast.gca import fast_backward, fast_forward, retrieved_by, work_items
from gca import chunk_numbers, gca, gca_reference
from helpers import ROOT
from test_gca import DEVICE, NAMES, assert_matches, inputs, needs_triton, with_gradients

pytestmark = needs_triton
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
fast_kernel = partial(gca, backend="fast")


@pytest.fixture(params=["triton", "hopper"] if HOPPER else ["triton"])
def sizes(request, monkeypatch):
    """Arguments of inputs() for the kernels of fast/gca.py, or of hopper.py; work is split as if large."""
    for name, value in dict(SEGMENT=4, LARGE=1, n_parts=lambda *_: 1).items():
        monkeypatch.setattr(fast_gca, name, value)
    return {} if request.param == "triton" else dict(Sq=40, Sk=50, D=32, dtype=torch.bfloat16)


# ---------------------------------------------------------------- twins

@pytest.mark.parametrize("softmax_one", [True, False])
@pytest.mark.parametrize("Sq, Sk, K, Hq, Hkv, D", [
    (7, 63, 3, 2, 1, 32), (63, 7, 1, 4, 2, 16), (7, 17, 3, 1, 1, 128)])
def test_fast_kernels_match_the_reference(Sq, Sk, K, Hq, Hkv, D, softmax_one, sizes):
    if sizes:                                                   # those of hopper.py take other sizes
        Sq, Sk, D = 40 + Sq % 20, 50, min(D, 64)
    tensors = inputs(**sizes | dict(Sq=Sq, Sk=Sk, K=K, Hq=Hq, Hkv=Hkv, D=D))
    assert_matches(fast_kernel, tensors, softmax_one)


@pytest.mark.parametrize("pattern", ["all empty", "one chunk a sequence", "repeated", "skewed"])
def test_extreme_retrieval(pattern, sizes):
    q, k, v, weights, indices = inputs(B=2, Cq=5, Ck=17, K=4, **sizes)
    popular = torch.tensor([2, 1], device=DEVICE)[:, None, None]
    indices = {"all empty": indices * 0 - 1, "repeated": indices % 2, "skewed": indices * (indices % 3 == 0),
               "one chunk a sequence": indices * 0 + popular}[pattern]
    assert_matches(fast_kernel, (q, k, v, weights, indices))


@pytest.mark.parametrize("Hq, Hkv", [(4, 2), (6, 3), (4, 1)])
def test_backward_in_halves_of_the_heads(Hq, Hkv, sizes):
    assert_matches(fast_kernel, inputs(Hq=Hq, Hkv=Hkv, **sizes))


def test_tensors_with_gaps():
    """Heads that are slices, sequences with chunks between them, an address that is no multiple of 16."""
    q, k, v, weights, indices = inputs(Sq=7, Sk=7, Hq=4, Hkv=4)
    wide = torch.cat([k, v], dim=3)
    k, v = wide[:, :, :, :4], wide[:, :, :, 4:]
    assert fast_gca.without_large_gaps(k) is k                                     # read in place
    assert_matches(fast_kernel, (q, k, v, weights, indices))
    flat = torch.empty(q.numel() + 1, device=DEVICE)[1:].view(q.shape).copy_(q)
    long = torch.cat([k, k], dim=1)[:, :4]
    weights, indices = weights.mT.contiguous().mT, indices.mT.contiguous().mT
    assert_matches(fast_kernel, (flat, long, v.flip(1), weights, indices))


def test_slots_shared_by_programs_give_the_same_output(monkeypatch):
    tensors = inputs(Cq=2, Sq=5, K=7)
    for n_part in (1, 2, 3, 7):
        monkeypatch.setattr(fast_gca, "n_parts", lambda *_, n_part=n_part: n_part)
        assert_matches(fast_kernel, tensors)


@pytest.mark.parametrize("where, bad", [("q", math.nan), ("k", math.inf), ("v", math.nan),
                                        ("weights", math.inf)])
def test_a_nan_or_inf_stays_with_those_who_share_its_rows(where, bad, sizes):
    q, k, v, weights, _ = inputs(B=1, Cq=3, Ck=4, K=2, **sizes)
    indices = torch.tensor([[[0, 1], [1, 2], [-1, 3]]], device=DEVICE)
    q[0, 0, 0, 0, 0] = 1                                            # times inf is a score of inf, not -inf
    dict(q=q[:, 0], k=k[:, 0], v=v[:, 0], weights=weights[:, 0])[where].view(-1)[0] = bad
    out, dq, dk, dv, dw = with_gradients(fast_kernel, q, k, v, weights, indices, True, torch.ones_like(q))
    assert not out[0, 0].isfinite().all() and not dq[0, 0].isfinite().all()
    assert all(x[0, 1:].isfinite().all() for x in (out, dq, dw))
    assert all(x[0, 2:].isfinite().all() for x in (dk, dv))


@pytest.mark.parametrize("skew", [False, True])
def test_backward_is_deterministic_and_gives_empty_slots_nothing(skew, sizes):
    q, k, v, weights, indices = inputs(Cq=9, Ck=2, K=4, **sizes)
    indices = indices.clamp(max=0) if skew else indices
    first, again = (fast_backward(q, q, k, v, weights, indices, True, 0.25) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert (first[3][indices < 0] == 0).all() and (first[3][indices >= 0] != 0).all()


def test_registered_as_a_pytorch_op():
    q, k, v, weights, indices = inputs(B=1, Cq=2, Sq=2, Sk=3, K=2)
    leaves = [x.requires_grad_() for x in (q, k, v, weights)]
    torch.library.opcheck(fast_forward, (*leaves, indices, True, 0.25))
    detached = [x.detach() for x in (q, *leaves)]
    torch.library.opcheck(fast_backward, (*detached, indices, True, 0.25))
    out = fast_kernel(*leaves, indices)
    out += 1                                                                       # it is no view
    dq, = torch.autograd.grad(fast_kernel(*leaves, indices).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_what_traces_a_call_meets_the_op():
    """Calls that nothing watches go around torch's registry; all others must not."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs(B=1, Cq=2, Sq=2, Sk=3, K=2)]
        assert fast_gca.op(*fakes, True, 0.25).shape == fakes[0].shape


def test_what_is_launched_twice_is_not_compiled_for_the_first_sizes():
    """Kernels are kept by their sizes: other sizes, odd addresses and other dtypes come in between."""
    for sizes in (dict(Cq=2), dict(Cq=3), dict(Cq=2, D=32), dict(Cq=2, dtype=torch.float16), dict(Cq=2)):
        *floats, indices = inputs(B=1, Sq=5, K=4, **sizes)
        assert_matches(fast_kernel, (*floats, indices.int() if "D" in sizes else indices))
        odd = torch.cat([indices[:, :1, :1].flatten(), indices.flatten()])[1:].view(indices.shape)
        assert_matches(fast_kernel, (*floats, odd))


# ---------------------------------------------------------------- the list of work

def test_lists_of_who_retrieved_each_chunk():
    indices = torch.tensor([[[2, 0], [-1, 2], [2, 2]], [[3, -1], [-1, 1], [0, 0]]], device=DEVICE)
    pairs, offsets, numbers = retrieved_by(indices, 4)
    assert offsets.tolist() == [[0, 1, 1, 5, 5], [0, 2, 3, 3, 4]]
    assert pairs[0, :5].tolist() == [1, 0, 3, 4, 5] and pairs[1, :4].tolist() == [4, 5, 3, 0]
    assert torch.equal(numbers.view_as(indices), chunk_numbers(indices, 4).int())


@pytest.mark.parametrize("SEGMENT", [1, 3, 16])
def test_work_items_are_later_pieces_then_the_chunks_by_length(monkeypatch, SEGMENT):
    monkeypatch.setattr(fast_gca, "SEGMENT", SEGMENT)
    popularity = torch.tensor([1, 0.2, 0, 0.1, 0.1, 0.4, 0.1, 0.1])
    indices = torch.multinomial(popularity, 90, replacement=True).view(3, 10, 3)
    indices[1, -4:] = -1
    pairs, offsets, _ = retrieved_by(indices.to(DEVICE), 8)
    for items, places in zip(work_items(pairs, offsets).tolist(), offsets.tolist(), strict=True):
        lists = [range(*pair) for pair in zip(places[:-1], places[1:], strict=True)]
        starts = {start: chunk for chunk, places in enumerate(lists) for start in places[SEGMENT::SEGMENT]}
        later, n_piece = {start // SEGMENT - 1: chunk for start, chunk in starts.items()}, 29 // SEGMENT
        assert len(later) == len(starts)
        assert items[:n_piece] == [later.get(i, 8) for i in range(n_piece)]
        assert items[n_piece:] == sorted(range(8), key=lambda chunk: -len(lists[chunk]))


# ---------------------------------------------------------------- on a GPU

@pytest.mark.skipif(DEVICE == "cpu", reason="too slow in the interpreter")
@pytest.mark.parametrize("backend", ["triton", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D, Sk", [(16, 128), (64, 128), (128, 128), (256, 64), (256, 128)])
def test_kernels_with_the_largest_tiles(dtype, D, Sk, backend, monkeypatch):
    monkeypatch.setattr(fast_gca, "SEGMENT", 4)
    tensors = inputs(Sq=100, Sk=Sk, D=D, dtype=dtype)
    if dtype == torch.float32 and (D, Sk) == (256, 128):
        with pytest.raises(ValueError, match=f"backend '{backend}'"):
            gca(*tensors, backend=backend)
    else:
        assert_matches(partial(gca, backend=backend), tensors)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("softmax_one", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("Sq, Sk, K, Hq, Hkv, D, factor", [
    (33, 33, 1, 2, 1, 16, 1), (64, 64, 9, 2, 2, 64, 1), (100, 63, 5, 4, 2, 32, 1), (64, 40, 2, 6, 3, 64, 1),
    (64, 64, 9, 4, 2, 128, 1), (100, 40, 2, 4, 1, 128, 1), (63, 64, 5, 3, 1, 128, 1),
    (64, 64, 3, 2, 2, 32, 40)])                     # factor 40: scores of thousands
def test_hopper_kernels_are_as_exact_as_tritons(Sq, Sk, K, Hq, Hkv, D, factor, dtype, softmax_one,
                                                monkeypatch):
    for name, value in dict(n_parts=lambda *_: 1, SEGMENT=4, LARGE=1).items():
        monkeypatch.setattr(fast_gca, name, value)
    q, k, *floats, indices = inputs(Sq=Sq, Sk=Sk, K=K, Hq=Hq, Hkv=Hkv, D=D, dtype=dtype)
    floats = q * factor, k * factor, *floats
    upstream = torch.randn_like(q)
    exact = with_gradients(gca_reference, *(x.double() for x in floats), indices, softmax_one, upstream)
    calls = []
    for name in ("forward", "backward"):
        function = getattr(fast_gca.hopper, name)
        monkeypatch.setattr(fast_gca.hopper, name, lambda *args, name=name, function=function:
                            calls.append(name) or function(*args))
    hopper = with_gradients(fast_kernel, *floats, indices, softmax_one, upstream)
    assert set(calls) == ({"forward", "backward"} if D == 128 and Hq // Hkv % 2 == 0 else {"backward"})
    monkeypatch.setattr(fast_gca, "hopper", None)
    triton = with_gradients(fast_kernel, *floats, indices, softmax_one, upstream)
    for name, x, y, z in zip(NAMES, hopper, triton, exact, strict=True):
        ours, theirs = (x - z).norm(), (y - z).norm()
        bound = 1.25 if factor == 1 else 2          # log-sum-exps of thousands have few digits in float32
        size = max(z.norm(), upstream.norm() * exact[0].square().mean().sqrt())     # of terms that may cancel
        assert ours <= bound * theirs + 1e-6 * size, f"{name}: error {ours:.1e}, Triton's {theirs:.1e}"


# ---------------------------------------------------------------- for GPUs that are not here

COMPILED = """
import sys
sys.path.insert(0, "tests")
import compiled, torch
sys.exit(compiled.main({targets}, [torch.{dtype}], [{D}], [{n_key}]))
"""


@needs_triton
@pytest.mark.parametrize("targets, dtype, D, n_key", [
    ([86, 120], "float32", 64, 64), ([75, 86], "float32", 128, 128)])
def test_tiles_fit_into_the_shared_memory_of_other_gpus(targets, dtype, D, n_key):
    """A few of the many that `python tests/compiled.py` compiles."""
    done = compiling(COMPILED.format(targets=targets, dtype=dtype, D=D, n_key=n_key))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def compiling(source):
    """Run a program that compiles kernels, which the interpreter would not do."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", source], env=env, cwd=ROOT,
                          capture_output=True, text=True)


HOPPER_SOURCES = """
import triton
from fast import hopper
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

def descriptor(name, dtype):
    tile = [1, 64, 16]
    return f"tensordesc<{name}{tile},{gl.NVMMASharedLayout.get_default_for(tile, dtype)!r}>"

tiles = dict.fromkeys("Q K V Out DO DQ DK DV".split(), descriptor("bf16", gl.bfloat16))
pieces = dict.fromkeys(["PieceK", "PieceV"], descriptor("fp32", gl.float32))
pointers = dict(W="*fp32", Index="*i64", Stats="*fp32", Pairs="*i32", Offsets="*i32", Items="*i32",
                scale="fp32")
constants = dict(GROUP=2, D=16, ROWS=64, KEYS=64, ONE=False, SLOTS=8, BLOCKS=2, SEGMENT=64)
for kernel in (hopper.forward_kernel, hopper.backward_q_kernel, hopper.backward_kv_kernel):
    names = kernel.arg_names
    types = tiles | pieces | pointers | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    values = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    triton.compile(GluonASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32))
"""


def test_hopper_kernels_compile_on_any_machine():
    done = compiling(HOPPER_SOURCES)
    assert done.returncode == 0, done.stderr[-2000:]
