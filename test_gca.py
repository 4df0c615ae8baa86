"""The kernels of gca.py against the reference, and the reference against the paper's equations.

On a machine with a GPU the kernels run there; elsewhere Triton's interpreter runs them on the CPU.
tests/test_gca_op.py tests gca() as a PyTorch operation, tests/test_fast_gca.py the kernels of fast/.
"""
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"            # before triton is imported

import gca as gca_module  # noqa: E402
from gca import flash_backward, gca, gca_reference, retrieved_by  # noqa: E402

needs_triton = pytest.mark.skipif(gca_module.triton is None, reason="triton is not installed")
kernel = partial(gca, backend="triton")
NAMES = "out", "dq", "dk", "dv", "dweights"


@needs_triton
def test_the_kernel_and_the_reference_agree():
    """Two query chunks with two slots each, one of them empty: output and the four gradients."""
    q = torch.randn(1, 2, 5, 2, 16, device=DEVICE, requires_grad=True)          # (B, Cq, Sq, Hq, D)
    k = torch.randn(1, 3, 7, 2, 16, device=DEVICE, requires_grad=True)          # (B, Ck, Sk, Hkv, D)
    v = torch.randn(1, 3, 7, 2, 16, device=DEVICE, requires_grad=True)
    weights = torch.rand(1, 2, 2, device=DEVICE, requires_grad=True)            # (B, Cq, K)
    indices = torch.tensor([[[0, -1], [2, 1]]], device=DEVICE)
    results = {}
    for backend in ("triton", "reference"):
        out = gca(q, k, v, weights, indices, backend=backend)
        results[backend] = out, *torch.autograd.grad(out.square().sum(), (q, k, v, weights))
    torch.testing.assert_close(results["triton"], results["reference"], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- inputs, and how results are compared

def inputs(B=2, Cq=3, Sq=16, Hq=2, Hkv=2, D=16, Ck=4, Sk=16, K=3, dtype=torch.float32):
    """Fresh random inputs with empty slots, repeats, and one query chunk whose slots are all empty."""
    q, k, v = torch.randn(B, Cq, Sq, Hq, D), torch.randn(B, Ck, Sk, Hkv, D), torch.randn(B, Ck, Sk, Hkv, D)
    weights, indices = torch.rand(B, Cq, K), torch.randint(-1, Ck, (B, Cq, K))
    indices[0, 0] = -1
    indices[0, 1:2] = Ck - 1
    return *(x.to(DEVICE, dtype) for x in (q, k, v)), weights.to(DEVICE), indices.to(DEVICE)


def with_gradients(function, q, k, v, weights, indices, softmax_one, upstream):
    """Output and the four gradients, in the order of NAMES."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weights)]
    out = function(*leaves, indices, softmax_one)
    return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def assert_matches(function, tensors, softmax_one=True, tolerance=0):
    """Output and gradients are those of the reference in float64, to 2e-6 or the rounding of the dtype."""
    *floats, indices = tensors
    dtype = floats[0].dtype
    tolerance = max(tolerance, 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    upstream = torch.randn_like(floats[0])
    results = with_gradients(function, *floats, indices, softmax_one, upstream)
    doubles = [x.double() for x in floats]
    expected = with_gradients(gca_reference, *doubles, indices, softmax_one, upstream)
    for name, x, y in zip(NAMES, results, expected, strict=True):
        assert x.shape == y.shape and x.isfinite().all(), name
        error, size = (x.double() - y).norm().item(), y.norm().item()
        if name == "dweights":          # sums of upstream * o, which may cancel: measured by their terms
            size = max(size, (upstream.double().norm() * expected[0].square().mean().sqrt()).item())
        assert error <= tolerance * size + 1e-6, f"{name}: error {error:.1e} of {size:.1e}"


# ---------------------------------------------------------------- the reference

@pytest.mark.parametrize("softmax_one", [True, False])
def test_reference_is_the_papers_two_stages(softmax_one):
    q, k, v, weights, indices = (x.cpu() for x in inputs(Hq=4, Hkv=2, Sq=3, Sk=5, dtype=torch.float64))
    out = torch.zeros_like(q)
    for b, c, x, h in torch.cartesian_prod(*map(torch.arange, q.shape[:4])).tolist():
        for w, i in zip(weights[b, c].tolist(), indices[b, c].tolist(), strict=True):
            if i >= 0:
                numerators = torch.exp(k[b, i, :, h // 2] @ q[b, c, x, h] / math.sqrt(q.shape[-1]))
                o = numerators @ v[b, i, :, h // 2] / (softmax_one + numerators.sum())
                out[b, c, x, h] += w * o
    torch.testing.assert_close(gca_reference(q, k, v, weights, indices, softmax_one), out)


@pytest.mark.parametrize("softmax_one", [True, False])
def test_gradcheck_of_the_reference(softmax_one):
    q, k, v, weights, indices = (x.cpu() for x in inputs(Hq=2, Hkv=1, Sq=2, Sk=3, D=4, dtype=torch.float64))
    leaves = [x.double().requires_grad_() for x in (q, k, v, weights)]
    assert torch.autograd.gradcheck(lambda *x: gca_reference(*x, indices, softmax_one), leaves)


# ---------------------------------------------------------------- the kernels

@needs_triton
@pytest.mark.parametrize("softmax_one", [True, False])
@pytest.mark.parametrize("Sq, Sk, K, Hq, Hkv, D", [
    (1, 1, 1, 1, 1, 16),            # one of everything
    (7, 63, 5, 2, 1, 32),           # a chunk of 64 less its landmark; two heads share keys
    (63, 7, 1, 4, 2, 16),           # almost a whole block of rows, few keys
    (64, 64, 5, 2, 2, 64),          # whole tiles: nothing is filled up
    (65, 1, 5, 2, 1, 16),           # one row more than a block
    (7, 64, 5, 3, 3, 128),          # heads that are no power of two, wide ones
    (1, 100, 5, 6, 2, 32)])         # one row, as in generation; keys that fill no tile
def test_kernel_matches_reference(Sq, Sk, K, Hq, Hkv, D, softmax_one):
    assert_matches(kernel, inputs(Sq=Sq, Sk=Sk, K=K, Hq=Hq, Hkv=Hkv, D=D), softmax_one)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D, Sk", [(16, 63), (64, 64), (128, 17)])
def test_low_precision_adds_little_to_the_error_of_rounding_the_inputs(dtype, D, Sk):
    *floats, indices = inputs(Sq=33, Sk=Sk, D=D, dtype=torch.float64)
    floats[3] = floats[3].double()
    rounded = [x.to(dtype) for x in floats[:3]] + [floats[3].float()]
    upstream = torch.randn_like(rounded[0])
    exact = with_gradients(gca_reference, *floats, indices, True, upstream)
    best = with_gradients(gca_reference, *(x.double() for x in rounded), indices, True, upstream)
    results = with_gradients(kernel, *rounded, indices, True, upstream)
    for name, x, y, z in zip(NAMES, results, best, exact, strict=True):
        assert (x.double() - z).norm() <= 2 * (y - z).norm(), name


@needs_triton
@pytest.mark.parametrize("pattern", ["all empty", "one chunk", "repeated", "skewed"])
def test_kernel_on_extreme_retrieval(pattern):
    *floats, indices = inputs(Cq=5, Ck=9, K=4)
    indices = {"all empty": indices * 0 - 1, "one chunk": indices * 0 + 2, "repeated": indices % 2,
               "skewed": indices * (indices % 3 == 0)}[pattern]
    assert_matches(kernel, (*floats, indices))


@needs_triton
def test_kernel_takes_non_contiguous_inputs():
    q, k, v, weights, indices = inputs(Sq=7, Sk=7)
    q, k = q.transpose(2, 3).contiguous().transpose(2, 3), k.flip(1)[:, :, :5]
    v = torch.cat([v, v], dim=-1)[:, :, :5, :, ::2]
    weights, indices = weights.mT.contiguous().mT, indices.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in (q, k, v, weights, indices))
    assert_matches(kernel, (q, k, v, weights, indices))


@needs_triton
def test_kernel_survives_large_scores_and_weights_of_zero_and_one():
    q, k, v, weights, indices = inputs()
    q[..., 0] = k[..., 0] = 200                         # scores of 1e4, whose differences still matter
    assert_matches(kernel, (q, k, v, (weights > 0.5).float(), indices), tolerance=1e-2)


@needs_triton
def test_backward_is_deterministic_and_gives_empty_slots_nothing():
    q, k, v, weights, indices = inputs(Cq=9, Ck=2, K=4)
    first, again = (flash_backward(q, q, k, v, weights, indices, True, 0.25) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert (first[3][indices < 0] == 0).all() and (first[3][indices >= 0] != 0).all()


def test_lists_of_who_retrieved_each_chunk():
    pairs, offsets = retrieved_by(torch.tensor([[[2, 0], [-1, 2]], [[2, 2], [1, 3]]]), 4)
    assert offsets.tolist() == [1, 2, 3, 7, 8] and pairs[1:].tolist() == [1, 6, 0, 3, 4, 5, 7]


@needs_triton
def test_python_gca_checks_the_kernels():
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "gca.py"], cwd=here, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    errors = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(errors) == 5 and max(errors) < 2e-6
