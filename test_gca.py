"""The kernels against the reference, and the reference against the paper's equations.

On a machine with a GPU the kernels run there; elsewhere Triton's interpreter runs them on the CPU.
"""
import math
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"            # before triton is imported

import gca as gca_module  # noqa: E402
from gca import flash_backward, flash_forward, gca, gca_reference, retrieved_by  # noqa: E402

needs_triton = pytest.mark.skipif(gca_module.triton is None, reason="triton is not installed")
# The interpreter does not do bfloat16 products.
LOW_PRECISION = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def inputs(B=2, Cq=3, Sq=16, Hq=2, Hkv=2, D=16, Ck=4, Sk=16, K=3, dtype=torch.float32, seed=None):
    """Fresh random inputs with empty slots, repeats, and one row of slots that is all empty."""
    if seed is not None:
        torch.manual_seed(seed)
    q = torch.randn(B, Cq, Sq, Hq, D)
    k, v = torch.randn(B, Ck, Sk, Hkv, D), torch.randn(B, Ck, Sk, Hkv, D)
    weights, indices = torch.rand(B, Cq, K), torch.randint(-1, Ck, (B, Cq, K))
    indices[0, 0] = -1
    indices[0, 1] = Ck - 1
    return *(x.to(DEVICE, dtype) for x in (q, k, v)), weights.to(DEVICE), indices.to(DEVICE)


def with_gradients(function, q, k, v, weights, indices, softmax_one, upstream):
    """Output and the four gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weights)]
    out = function(*leaves, indices, softmax_one)
    return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def kernel(*args):
    return gca(*args, backend="triton")


def assert_matches(tensors, softmax_one=True, tolerance=1e-5):
    """The kernel's output and gradients are the float64 reference's, to a relative error of `tolerance`."""
    *floats, indices = tensors
    upstream = torch.randn_like(floats[0])
    got = with_gradients(kernel, *floats, indices, softmax_one, upstream)
    wanted = with_gradients(gca_reference, *(x.double() for x in floats), indices, softmax_one, upstream)
    for name, x, y in zip(("out", "dq", "dk", "dv", "dweights"), got, wanted, strict=True):
        assert x.shape == y.shape and x.isfinite().all(), name
        error = (x.double() - y).norm().item()
        size = y.norm().item()
        assert error <= tolerance * size + 1e-7, f"{name}: error {error:.1e} of {size:.1e}"


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
    (1, 1, 1, 1, 1, 16), (7, 63, 5, 2, 1, 32), (63, 7, 1, 4, 2, 16), (64, 64, 5, 2, 2, 64),
    (65, 1, 5, 2, 1, 16), (7, 64, 5, 3, 3, 128), (64, 63, 1, 2, 2, 16), (1, 100, 5, 6, 2, 32)])
def test_kernel_matches_reference(Sq, Sk, K, Hq, Hkv, D, softmax_one):
    assert_matches(inputs(Sq=Sq, Sk=Sk, K=K, Hq=Hq, Hkv=Hkv, D=D), softmax_one)


@needs_triton
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("D, Sk", [(16, 63), (64, 64), (128, 17)])
def test_kernel_in_low_precision_is_right_to_rounding(dtype, D, Sk):
    assert_matches(inputs(Sq=33, Sk=Sk, D=D, dtype=dtype), tolerance=2 * torch.finfo(dtype).eps)


@pytest.mark.skipif(DEVICE == "cpu", reason="too slow in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D, Sk", [(16, 128), (64, 128), (128, 128), (256, 64), (256, 128)])
def test_kernel_with_the_largest_tiles(dtype, D, Sk):
    tensors = inputs(Sq=100, Sk=Sk, D=D, dtype=dtype)
    if dtype == torch.float32 and (D, Sk) == (256, 128):
        with pytest.raises(ValueError, match="backend 'triton'"):
            kernel(*tensors)
    else:
        assert_matches(tensors, tolerance=1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@needs_triton
@pytest.mark.parametrize("indices", ["all empty", "one chunk for all", "repeated"])
def test_kernel_on_extreme_retrieval(indices, monkeypatch):
    monkeypatch.setattr(gca_module, "SEGMENT", 4)       # lists of popular chunks are split over programs
    q, k, v, weights, chosen = inputs(B=1, Cq=7, K=5, Hq=4)
    patterns = {"all empty": chosen * 0 - 1, "one chunk for all": chosen * 0 + 2, "repeated": chosen % 2}
    chosen = patterns[indices]
    assert_matches((q, k, v, weights, chosen))


@needs_triton
def test_kernel_takes_non_contiguous_inputs():
    q, k, v, weights, indices = inputs(Sq=7, Sk=7)
    q, k = q.transpose(2, 3).contiguous().transpose(2, 3), k.flip(1)[:, :, :5]
    v = torch.cat([v, v], dim=-1)[:, :, :5, :, ::2]
    weights, indices = weights.mT.contiguous().mT, indices.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in (q, k, v, weights, indices))
    assert_matches((q, k, v, weights, indices))


@needs_triton
def test_kernel_survives_large_scores():
    q, k, v, weights, indices = inputs()
    q[..., 0] = k[..., 0] = 200                         # scores of 1e4, whose differences still matter
    assert_matches((q, k, v, weights, indices), tolerance=1e-2)


@needs_triton
def test_nan_in_a_chunk_reaches_only_who_retrieved_it():
    q, k, v, weights, _ = inputs(B=1, Cq=3, Ck=3, K=2)
    k[0, 0, 3, 0, 0] = math.nan
    out = kernel(q, k, v, weights, torch.tensor([[[0, 1], [1, 2], [-1, 2]]], device=DEVICE))
    assert out[0, 0, :, 0].isnan().all() and out[0, 1:].isfinite().all() and out[0, 0, :, 1].isfinite().all()


@needs_triton
def test_backward_is_bitwise_deterministic(monkeypatch):
    monkeypatch.setattr(gca_module, "SEGMENT", 4)
    q, k, v, weights, indices = inputs(B=1, Cq=9, Ck=2, K=4)
    runs = [flash_backward(q, q, k, v, weights, indices, True, 0.25) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@needs_triton
def test_empty_slots_get_zero_gradient():
    q, k, v, weights, indices = inputs()
    *_, dw = with_gradients(kernel, q, k, v, weights, indices, True, torch.ones_like(q))
    assert (dw[indices < 0] == 0).all() and (dw[indices >= 0] != 0).all()


@needs_triton
def test_registered_as_a_pytorch_op():
    q, k, v, weights, indices = inputs(B=1, Cq=2, Sq=2, Sk=3, K=2)
    leaves = [x.requires_grad_() for x in (q, k, v, weights)]
    torch.library.opcheck(flash_forward, (*leaves, indices, True, 0.25))


def test_lists_of_who_retrieved_each_chunk(monkeypatch):
    monkeypatch.setattr(gca_module, "SEGMENT", 2)
    pairs, offsets, first_item, item_chunk = retrieved_by(torch.tensor([[[2, 0], [-1, 2], [2, 2]]]), 4)
    assert offsets.tolist() == [[0, 1, 1, 5, 5]] and pairs.tolist() == [[1, 0, 3, 4, 5, 2]]
    assert first_item.tolist() == [[0, 1, 2, 4, 5]]                     # chunk 2 has four pairs: two items
    assert item_chunk.tolist() == [[0, 1, 2, 2, 3, 4, 4]]               # 4 = item not used


# ---------------------------------------------------------------- what the user gets wrong

def broken(**change):
    arguments = dict(zip(("q", "k", "v", "weights", "indices"), inputs(B=1), strict=True))
    return arguments | {name: function(arguments[name]) for name, function in change.items()}


@pytest.mark.parametrize("name, arguments", [
    ("q", broken(q=lambda x: x[0])),
    ("k", broken(k=lambda x: x[..., :8])),
    ("k", broken(k=lambda x: x.double())),
    ("k", broken(q=lambda x: x[:, :, :, :1].repeat(1, 1, 1, 3, 1))),              # 2 heads do not divide 3
    ("v", broken(v=lambda x: x[:, :, :5])),
    ("weights", broken(weights=lambda x: x[:, :2])),
    ("indices", broken(weights=lambda x: x[..., :2])),                            # K differs
    ("weights", broken(weights=lambda x: x.half())),
    ("indices", broken(indices=lambda x: x.float())),
    ("indices", broken(indices=lambda x: x[:, :2])),
    ("v", broken(v=lambda x: x.to("meta"))),
    ("backend", broken() | dict(backend="cuda")),
])
def test_wrong_arguments_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        gca(**arguments)


@pytest.mark.parametrize("index", [-2, 4])
def test_indices_out_of_range_are_found_on_the_cpu(index):
    arguments = {name: x.cpu() for name, x in broken(indices=lambda x: x.clone().fill_(index)).items()}
    with pytest.raises(ValueError, match=f"^indices must be in .*got {index}"):
        gca(**arguments)


@needs_triton
def test_an_empty_batch_gives_an_empty_output():
    assert kernel(*(x[:0] for x in inputs())).shape == (0, 3, 16, 2, 16)
