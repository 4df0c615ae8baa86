"""The kernels against the reference, and the reference against the paper's equations.

On a machine with a GPU the kernels run there; elsewhere Triton's interpreter runs them on the CPU.
"""
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"            # before triton is imported

import gca as gca_module  # noqa: E402
from gca import flash_backward, flash_forward, gca, gca_reference, retrieved_by, work_items  # noqa: E402

needs_triton = pytest.mark.skipif(gca_module.triton is None, reason="triton is not installed")
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
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
    indices[0, 1:2] = Ck - 1
    return *(x.to(DEVICE, dtype) for x in (q, k, v)), weights.to(DEVICE), indices.to(DEVICE)


@pytest.fixture(params=["triton", "hopper"] if HOPPER else ["triton"])
def sizes(request, monkeypatch):
    """Arguments of inputs() for the kernels of gca.py, or of hopper.py; work is split as if it were large."""
    for name, value in dict(SEGMENT=4, LARGE=1, n_parts=lambda *_: 1).items():
        monkeypatch.setattr(gca_module, name, value)
    return {} if request.param == "triton" else dict(Sq=40, Sk=50, D=32, dtype=torch.bfloat16)


def with_gradients(function, q, k, v, weights, indices, softmax_one, upstream):
    """Output and the four gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weights)]
    out = function(*leaves, indices, softmax_one)
    return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def kernel(*args):
    return gca(*args, backend="triton")


def assert_matches(tensors, softmax_one=True, tolerance=0):
    """The kernel's output and gradients are the float64 reference's, to 2e-6 or the rounding of the dtype."""
    *floats, indices = tensors
    dtype = floats[0].dtype
    tolerance = max(tolerance, 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    upstream = torch.randn_like(floats[0])
    got = with_gradients(kernel, *floats, indices, softmax_one, upstream)
    wanted = with_gradients(gca_reference, *(x.double() for x in floats), indices, softmax_one, upstream)
    for name, x, y in zip(("out", "dq", "dk", "dv", "dweights"), got, wanted, strict=True):
        assert x.shape == y.shape and x.isfinite().all(), name
        error = (x.double() - y).norm().item()
        size = y.norm().item()
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
    (1, 1, 1, 1, 1, 16), (7, 63, 5, 2, 1, 32), (63, 7, 1, 4, 2, 16), (64, 64, 5, 2, 2, 64),
    (65, 1, 5, 2, 1, 16), (7, 64, 5, 3, 3, 128), (64, 63, 1, 2, 2, 16), (1, 100, 5, 6, 2, 32)])
def test_kernel_matches_reference(Sq, Sk, K, Hq, Hkv, D, softmax_one):
    assert_matches(inputs(Sq=Sq, Sk=Sk, K=K, Hq=Hq, Hkv=Hkv, D=D), softmax_one)


@needs_triton
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("D, Sk", [(16, 63), (64, 64), (128, 17)])
def test_low_precision_adds_little_to_the_error_of_rounding_the_inputs(dtype, D, Sk):
    *floats, indices = inputs(Sq=33, Sk=Sk, D=D, dtype=torch.float64, seed=0)       # dV at 17 keys: near 1.5
    floats[3] = floats[3].double()
    rounded = [x.to(dtype) for x in floats[:3]] + [floats[3].float()]
    upstream = torch.randn_like(rounded[0])
    exact = with_gradients(gca_reference, *floats, indices, True, upstream)
    best = with_gradients(gca_reference, *(x.double() for x in rounded), indices, True, upstream)
    ours = with_gradients(kernel, *rounded, indices, True, upstream)
    for name, x, y, z in zip(("out", "dq", "dk", "dv", "dweights"), ours, best, exact, strict=True):
        assert (x.double() - z).norm() <= 1.5 * (y - z).norm(), name


@pytest.mark.skipif(DEVICE == "cpu", reason="too slow in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D, Sk", [(16, 128), (64, 128), (128, 128), (256, 64), (256, 128)])
def test_kernel_with_the_largest_tiles(dtype, D, Sk):
    tensors = inputs(Sq=100, Sk=Sk, D=D, dtype=dtype)
    if dtype == torch.float32 and (D, Sk) == (256, 128):
        with pytest.raises(ValueError, match="backend 'triton'"):
            kernel(*tensors)
    else:
        assert_matches(tensors)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("softmax_one", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("Sq, Sk, K, Hq, Hkv, D, size", [
    (33, 33, 1, 2, 1, 16, 1), (64, 64, 9, 2, 2, 64, 1), (100, 63, 5, 4, 2, 32, 1), (64, 40, 2, 6, 3, 64, 1),
    (64, 64, 3, 2, 2, 32, 40)])                     # size 40: scores of thousands
def test_hopper_kernels_are_as_exact_as_tritons(Sq, Sk, K, Hq, Hkv, D, size, dtype, softmax_one, monkeypatch):
    for name, value in dict(n_parts=lambda *_: 1, SEGMENT=4, LARGE=1).items():
        monkeypatch.setattr(gca_module, name, value)
    q, k, *floats, indices = inputs(Sq=Sq, Sk=Sk, K=K, Hq=Hq, Hkv=Hkv, D=D, dtype=dtype)
    floats = q * size, k * size, *floats
    upstream = torch.randn_like(q)
    exact = with_gradients(gca_reference, *(x.double() for x in floats), indices, softmax_one, upstream)
    hopper = with_gradients(kernel, *floats, indices, softmax_one, upstream)
    monkeypatch.setattr(gca_module, "hopper", None)
    triton = with_gradients(kernel, *floats, indices, softmax_one, upstream)
    assert not all(torch.equal(x, y) for x, y in zip(hopper, triton, strict=True))     # two different kernels
    for name, x, y, z in zip(("out", "dq", "dk", "dv", "dweights"), hopper, triton, exact, strict=True):
        ours, theirs = (x - z).norm(), (y - z).norm()
        bound = 1.25 if size == 1 else 2            # log-sum-exps of thousands have few digits in float32
        assert ours <= bound * theirs + 1e-6 * z.norm(), f"{name}: error {ours:.1e}, Triton's {theirs:.1e}"


@needs_triton
@pytest.mark.parametrize("indices", ["all empty", "one chunk a sequence", "repeated", "skewed"])
def test_kernel_on_extreme_retrieval(indices, sizes):
    q, k, v, weights, chosen = inputs(B=2, Cq=7, Ck=18, K=5, Hq=4, **sizes)
    popular = torch.tensor([2, 1], device=DEVICE)[:, None, None]
    patterns = {"all empty": chosen * 0 - 1, "repeated": chosen % 2, "skewed": chosen * (chosen % 3 == 0),
                "one chunk a sequence": chosen * 0 + popular}
    chosen = patterns[indices]
    assert_matches((q, k, v, weights, chosen))


@needs_triton
@pytest.mark.parametrize("Hq, Hkv", [(4, 2), (6, 3), (4, 1)])
def test_backward_in_halves_of_the_heads(Hq, Hkv, sizes):
    assert_matches(inputs(Hq=Hq, Hkv=Hkv, **sizes))


@needs_triton
def test_kernel_takes_non_contiguous_inputs():
    q, k, v, weights, indices = inputs(Sq=7, Sk=7)
    q, k = q.transpose(2, 3).contiguous().transpose(2, 3), k.flip(1)[:, :, :5]
    v = torch.cat([v, v], dim=-1)[:, :, :5, :, ::2]
    weights, indices = weights.mT.contiguous().mT, indices.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in (q, k, v, weights, indices))
    assert_matches((q, k, v, weights, indices))


@needs_triton
def test_slots_dealt_out_over_programs_give_the_same_output(monkeypatch):
    tensors = inputs(Cq=2, Sq=5, K=7)
    for n_part in (1, 2, 3, 7):
        monkeypatch.setattr(gca_module, "n_parts", lambda *_, n_part=n_part: n_part)
        assert_matches(tensors)


@needs_triton
def test_kernel_survives_large_scores():
    q, k, v, weights, indices = inputs()
    q[..., 0] = k[..., 0] = 200                         # scores of 1e4, whose differences still matter
    assert_matches((q, k, v, weights, indices), tolerance=1e-2)


@needs_triton
def test_weights_of_zero_and_one(sizes):
    q, k, v, weights, indices = inputs(**sizes)
    assert_matches((q, k, v, (weights > 0.5).float(), indices))


@needs_triton
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "weights"])
def test_a_nan_or_inf_stays_with_those_who_share_its_rows(where, bad, sizes):
    q, k, v, weights, _ = inputs(B=1, Cq=3, Ck=4, K=2, **sizes)
    indices = torch.tensor([[[0, 1], [1, 2], [-1, 3]]], device=DEVICE)
    dict(q=q[:, 0], k=k[:, 0], v=v[:, 0], weights=weights[:, 0])[where].view(-1)[0] = bad
    out, dq, dk, dv, dw = with_gradients(kernel, q, k, v, weights, indices, True, torch.ones_like(q))
    assert not out[0, 0].isfinite().all() and not dq[0, 0].isfinite().all()
    assert all(x[0, 1:].isfinite().all() for x in (out, dq, dw))
    assert all(x[0, 2:].isfinite().all() for x in (dk, dv))


@needs_triton
@pytest.mark.parametrize("skew", [False, True])
def test_backward_is_bitwise_deterministic(skew, sizes):
    q, k, v, weights, indices = inputs(B=1, Cq=9, Ck=2, K=4, **sizes)
    indices = indices * 0 if skew else indices
    runs = [flash_backward(q, q, k, v, weights, indices, True, 0.25) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@needs_triton
def test_empty_slots_get_zero_gradient(sizes):
    q, k, v, weights, indices = inputs(**sizes)
    *_, dw = with_gradients(kernel, q, k, v, weights, indices, True, torch.ones_like(q))
    assert (dw[indices < 0] == 0).all() and (dw[indices >= 0] != 0).all()


HOPPER_SOURCES = """
import hopper, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

def descriptor(name, dtype):
    tile = [1, 1, 64, 16]
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


@needs_triton
def test_hopper_kernels_compile_on_any_machine():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", HOPPER_SOURCES], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@needs_triton
def test_lists_of_who_retrieved_each_chunk():
    pairs, offsets = retrieved_by(torch.tensor([[[2, 0], [-1, 2], [2, 2]]], device=DEVICE), 4)
    assert offsets.tolist() == [[0, 1, 1, 5, 5]] and pairs[0, :5].tolist() == [1, 0, 3, 4, 5]


@needs_triton
@pytest.mark.parametrize("SEGMENT", [1, 3, 16])
def test_work_items_are_later_pieces_then_the_chunks_by_length(monkeypatch, SEGMENT):
    monkeypatch.setattr(gca_module, "SEGMENT", SEGMENT)
    popularity = torch.tensor([1, 0.2, 0, 0.1, 0.1, 0.4, 0.1, 0.1])
    indices = torch.multinomial(popularity, 90, replacement=True).view(3, 10, 3)
    indices[1, -4:] = -1
    pairs, offsets = retrieved_by(indices.to(DEVICE), 8)
    for items, places in zip(work_items(pairs, offsets).tolist(), offsets.tolist(), strict=True):
        lists = [range(*pair) for pair in zip(places[:-1], places[1:], strict=True)]
        starts = {start: chunk for chunk, places in enumerate(lists) for start in places[SEGMENT::SEGMENT]}
        later, n_piece = {start // SEGMENT - 1: chunk for start, chunk in starts.items()}, 29 // SEGMENT
        assert len(later) == len(starts)
        assert items[:n_piece] == [later.get(i, 8) for i in range(n_piece)]
        assert items[n_piece:] == sorted(range(8), key=lambda chunk: -len(lists[chunk]))


# ---------------------------------------------------------------- a PyTorch operation like any other

class Layer(torch.nn.Module):
    """Makes queries, keys and values of its input, whose chunks retrieve those before them."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(32, 96)
        self.indices = torch.tensor([[[-1, -1], [0, -1], [1, 0]]], device=DEVICE)

    def forward(self, x):                                                    # (1, 3, Sq, 32)
        q, k, v = self.projection(x).unflatten(-1, (3, 2, 16)).unbind(-3)
        weights = torch.sigmoid(x.float().mean((2, 3)))[..., None].expand(-1, -1, 2)
        return x + gca(q, k, v, weights, self.indices, backend="triton").flatten(-2)


def layer_and_input():
    torch.manual_seed(0)
    return Layer().to(DEVICE), torch.randn(1, 3, 4, 32, device=DEVICE, requires_grad=True)


def gradients(function, layer, x):
    return torch.autograd.grad(function(x).float().square().sum(), (x, *layer.parameters()))


@needs_triton
def test_registered_as_a_pytorch_op():
    q, k, v, weights, indices = inputs(B=1, Cq=2, Sq=2, Sk=3, K=2)
    leaves = [x.requires_grad_() for x in (q, k, v, weights)]
    torch.library.opcheck(flash_forward, (*leaves, indices, True, 0.25))
    detached = [x.detach() for x in (q, *leaves)]
    torch.library.opcheck(flash_backward, (*detached, indices, True, 0.25))


@needs_triton
def test_compiles_without_a_graph_break():
    layer, x = layer_and_input()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    torch.testing.assert_close(gradients(compiled, layer, x), gradients(layer, layer, x))


@needs_triton
def test_activation_checkpointing():
    layer, x = layer_and_input()
    checkpointed = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
    torch.testing.assert_close(gradients(checkpointed, layer, x), gradients(layer, layer, x))


@needs_triton
def test_autocast_computes_in_its_dtype():
    q, k, v, weights, indices = inputs()
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    with torch.autocast(DEVICE, dtype):
        out = kernel(q, k.to(dtype), v, weights, indices)
    assert torch.equal(out, kernel(q.to(dtype), k.to(dtype), v.to(dtype), weights, indices))


@needs_triton
def test_distributed_data_parallel(tmp_path):
    layer, x = layer_and_input()
    alone = gradients(layer, layer, x)[1:]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(layer)(x).float().square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(tuple(p.grad for p in layer.parameters()), alone)


@needs_triton
def test_a_second_derivative_is_refused_clearly():
    q, k, v, weights, indices = inputs()
    out = kernel(q.requires_grad_(), k, v, weights, indices)
    dq, = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


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
    ("scale", broken() | dict(scale=-1.0)),
    ("k", broken(k=lambda x: x[:, :, :0], v=lambda x: x[:, :, :0])),              # chunks without keys
    ("indices", broken(weights=lambda x: x[..., :0], indices=lambda x: x[..., :0])),           # K = 0
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


@needs_triton
@pytest.mark.parametrize("tensors", [inputs(D=24), inputs(Sk=129), inputs(dtype=torch.float64)])
def test_what_the_kernel_does_not_take_is_said(tensors):
    with pytest.raises(ValueError, match="^q, k and v for backend 'triton' must be"):
        kernel(*tensors)
    assert gca(*tensors).shape == tensors[0].shape                                # the reference takes it


def test_a_machine_that_cannot_run_the_kernel_is_told_so(monkeypatch):
    tensors = [x.cpu() for x in inputs()]
    monkeypatch.setattr(gca_module, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="needs a GPU" if gca_module.triton else "needs triton"):
        kernel(*tensors)
    monkeypatch.setattr(gca_module, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        kernel(*tensors)
    assert torch.equal(gca(*tensors), gca_reference(*tensors))


@needs_triton
def test_no_chunks_give_zeros():
    q, k, v, weights, indices = inputs()
    assert (kernel(q, k[:, :0], v[:, :0], weights, indices * 0 - 1) == 0).all()


def python_gca(*flags):
    return subprocess.run([sys.executable, "gca.py", *flags], cwd=Path(__file__).parent, text=True,
                          capture_output=True, timeout=300)


@pytest.mark.skipif(DEVICE == "cuda", reason="with a GPU it times everything, for minutes")
def test_python_gca_checks_the_kernels():
    """Without a GPU: the errors, and a sentence that there is nothing to time."""
    done = python_gca()
    if gca_module.triton:
        errors = done.stdout.splitlines()[0].split(": ")[1].split()
        assert len(errors) == 5 and max(map(float, errors)) < 2e-6
    assert "othing to" in done.stdout and done.returncode == 0, done.stderr


def test_python_gca_names_a_folder_that_is_missing():
    done = python_gca("--json", "nowhere/gca.json")
    assert done.returncode == 2 and done.stderr == "error: --json: no folder nowhere to write gca.json to\n"
