"""gca() as a PyTorch operation like any other, and what it says when it is called in a wrong way."""
import math
from functools import partial

import pytest
import torch
import torch.utils.checkpoint

import fast  # noqa: F401 (it adds a backend)
import gca as gca_module
from gca import flash_backward, flash_forward, gca, gca_reference
from test_gca import DEVICE, assert_matches, inputs, kernel, needs_triton, with_gradients


class Layer(torch.nn.Module):
    """Makes queries, keys and values of its input, whose chunks retrieve those before them."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(32, 96)
        self.indices = torch.tensor([[[-1, -1], [0, -1], [1, 0]]], device=DEVICE)

    def forward(self, x):                                                    # (1, 3, Sq, 32)
        q, k, v = self.projection(x).unflatten(-1, (3, 2, 16)).unbind(-3)
        weights = torch.sigmoid(x.float().mean((2, 3)))[..., None].expand(-1, -1, 2)
        return x + kernel(q, k, v, weights, self.indices).flatten(-2)


def gradients(function, layer, x):
    return torch.autograd.grad(function(x).float().square().sum(), (x, *layer.parameters()))


@needs_triton
def test_works_in_compile_checkpointing_and_ddp(tmp_path):
    layer, x = Layer().to(DEVICE), torch.randn(1, 3, 4, 32, device=DEVICE, requires_grad=True)
    expected = gradients(layer, layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    torch.testing.assert_close(gradients(compiled, layer, x), expected)
    checkpointed = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
    torch.testing.assert_close(gradients(checkpointed, layer, x), expected)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(layer)(x).float().square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(tuple(p.grad for p in layer.parameters()), expected[1:])


@needs_triton
def test_registered_as_a_pytorch_op():
    q, k, v, weights, indices = inputs(B=1, Cq=2, Sq=2, Sk=3, K=2)
    leaves = [x.requires_grad_() for x in (q, k, v, weights)]
    torch.library.opcheck(flash_forward, (*leaves, indices, True, 0.25))
    detached = [x.detach() for x in (q, *leaves)]
    torch.library.opcheck(flash_backward, (*detached, indices, True, 0.25))
    dq, = torch.autograd.grad(kernel(*leaves, indices).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


@needs_triton
@pytest.mark.parametrize("major, rows, keys, D, dtype, warps", [
    (9, 32, 31, 64, torch.bfloat16, 1), (10, 1, 16, 16, torch.float16, 1), (8, 32, 31, 64, torch.bfloat16, 4),
    (9, 33, 31, 64, torch.bfloat16, 4), (9, 32, 33, 64, torch.bfloat16, 4),
    (9, 32, 31, 128, torch.float16, 4), (9, 32, 31, 64, torch.float32, 8)])
def test_one_warp_for_small_tiles_where_registers_suffice(major, rows, keys, D, dtype, warps, monkeypatch):
    monkeypatch.setattr(gca_module, "gpu", lambda device: (major, 2 ** 18))
    q, k = (torch.empty(1, 1, n, 2, D, dtype=dtype) for n in (rows, keys))
    assert gca_module.launch_options(q, k, True)["num_warps"] == warps


@needs_triton
def test_autocast_computes_in_its_dtype():
    q, k, v, weights, indices = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = kernel(q, k.bfloat16(), v, weights, indices)
    assert torch.equal(out, kernel(q.bfloat16(), k.bfloat16(), v.bfloat16(), weights, indices))


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
    ("weights", broken(weights=lambda x: x[..., :0], indices=lambda x: x[..., :0])),           # K = 0
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
@pytest.mark.parametrize("tensors", [inputs(D=24), inputs(Sk=129), inputs(dtype=torch.float64)])
def test_what_the_kernel_does_not_take_is_said(tensors):
    with pytest.raises(ValueError, match="^q, k and v for backend 'triton' must be"):
        kernel(*tensors)
    assert gca(*tensors).shape == tensors[0].shape                                # the reference takes it


def test_a_machine_that_cannot_run_the_kernel_is_told_so(monkeypatch):
    tensors = [x.cpu() for x in inputs()]
    for name, value in (("INTERPRET", False), ("triton", None)):
        monkeypatch.setattr(gca_module, name, value)
        with pytest.raises(RuntimeError, match=r"needs Triton \(Linux: pip install triton\) and a GPU"):
            kernel(*tensors)
    assert torch.equal(gca(*tensors), gca_reference(*tensors))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "fast"])
def test_forward_mode_derivatives_are_refused(backend):
    q, *others = inputs()
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda q: gca(q, *others, backend=backend), (q,), (q,))
    wanted = torch.func.jvp(lambda q: gca(q, *others, backend="reference"), (q,), (q,))[1]
    assert wanted.abs().max() > 0


@needs_triton
@pytest.mark.parametrize("where, bad", [("q", math.nan), ("k", math.inf), ("v", math.nan),
                                        ("weights", math.inf)])
def test_a_nan_or_inf_stays_with_those_who_share_its_rows(where, bad):
    q, k, v, weights, _ = inputs(B=1, Cq=3, Ck=4, K=2)
    indices = torch.tensor([[[0, 1], [1, 2], [-1, 3]]], device=DEVICE)
    q[0, 0, 0, 0, 0] = 1                                            # times inf is a score of inf, not -inf
    dict(q=q[:, 0], k=k[:, 0], v=v[:, 0], weights=weights[:, 0])[where].view(-1)[0] = bad
    out, dq, dk, dv, dw = with_gradients(kernel, q, k, v, weights, indices, True, torch.ones_like(q))
    assert not out[0, 0].isfinite().all() and not dq[0, 0].isfinite().all()
    assert all(x[0, 1:].isfinite().all() for x in (out, dq, dw))
    assert all(x[0, 2:].isfinite().all() for x in (dk, dv))


@needs_triton
def test_a_gpu_without_room_for_the_tiles_takes_fewer_rows_or_the_reference(monkeypatch):
    q, k, v, weights, indices = inputs(Sq=64, Sk=64, D=64)
    for dtype, device, rows in ((torch.float32, (7, 64), 32), (torch.float32, (8, 163), 32),
                                (torch.float32, (8, 99), 16), (torch.float16, (7, 64), 32),
                                (torch.float16, (8, 99), 64), (torch.float32, (8, 48), 0)):
        monkeypatch.setattr(gca_module, "gpu", lambda _, device=device: (device[0], device[1] * 1024))
        tensors = [x.to(dtype) for x in (q, k, v)]
        assert gca_module.tile_rows(*tensors[:2]) == rows
        if rows:
            assert_matches(kernel, (*tensors, weights, indices))
    large = torch.empty(1, 1, 128, 1, 256, dtype=torch.float16, device="meta")
    for device, rows in (((9, 227), 16), ((12, 99), 0)):                                    # H100, RTX 50
        monkeypatch.setattr(gca_module, "gpu", lambda _, device=device: (device[0], device[1] * 1024))
        assert gca_module.tile_rows(large, large) == rows


def test_nothing_gives_nothing():
    q, k, v, weights, indices = inputs()
    assert kernel(*(x[:0] for x in (q, k, v, weights, indices))).shape == (0, 3, 16, 2, 16)
    assert (kernel(q, k[:, :0], v[:, :0], weights, indices * 0 - 1) == 0).all()
