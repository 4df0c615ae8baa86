"""Where the time of a training step goes: `python -m tools.profiler --preset pg19`.

One micro-batch of random tokens forward and backward, as train.py runs it, and a step of the optimizer.
Kernels are sorted by their names, matrix products by their shapes.
"""
import sys
from dataclasses import fields
from functools import partial

import torch

import fast
from gca import require
from model import DRT, DRTConfig
from tasks.text import Text
from tools import cli, exits, report
from tools.run import Ranks
from train import PRESETS, TrainConfig, make_optimizer

KINDS = [                           # what the names of kernels contain; the first that fits counts
    ("windows (flex_attention)", ("flex_attention",)),
    ("GCA", ("forward_kernel", "backward_q_kernel", "backward_kv_kernel", "retrieved_by", "items_kernel",
             "add_pieces")),
    ("SDPA: the encoder, windows under 128", ("flash", "fmha", "sdpa", "cudnn")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "splitK", "cublas")),
    ("loss in blocks", ("loss_kernel",)),
    ("sort, gather, scatter", ("sort", "Sort", "scan", "Scan", "gather", "scatter")),
    ("fused arithmetic", ("triton_",)),
    ("other", ("",)),
]


def flags():
    parser = cli.Parser(description="Where the time of a training step goes.")
    parser.add_argument("--preset", choices=PRESETS, default="pg19")
    parser.add_argument("--kernels", type=int, default=0, help="also list so many kernels by name")
    cli.add_fields(parser.add_argument_group("model"), DRTConfig)
    return parser


def settings(args):
    """The preset's model and training, with flags for the model."""
    preset = PRESETS[args.preset]
    shape = dict(vocab_size=50257) | {f.name: preset[f.name] for f in fields(DRTConfig) if f.name in preset}
    shape |= {f.name: getattr(args, f.name) for f in fields(DRTConfig) if getattr(args, f.name) is not None}
    names = [f.name for f in fields(TrainConfig)]
    return DRTConfig(**shape), TrainConfig(**{name: preset[name] for name in names if name in preset})


def micro_batch(model, config, device):
    """A function that does one micro-batch, and how many tokens that has."""
    n = config.micro_batch or min(config.batch_size, max(1, config.batch_tokens // config.seq_len))
    tokens, targets = torch.randint(model.config.vocab_size, (2, n, config.seq_len), device=device)
    objective = Ranks(device).objective(model, partial(Text.loss, None), config)

    def run():
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = objective(tokens, targets)
        loss.backward()

    return run, n * config.seq_len


def milliseconds(run, n=10):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(n):
        run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / n


def by_kind(run, n=5):
    """{kind: milliseconds of the GPU}, {kernel: the same}, and {shape of a product: (ms, TFLOP)}."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        for _ in range(n):
            run()
        torch.cuda.synchronize()
    kinds, kernels, products = {}, {}, {}
    for event in profile.key_averages(group_by_input_shape=True):
        ms = event.self_device_time_total / 1000 / n
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.key.startswith("##"):
            kind = next(kind for kind, parts in KINDS if any(part in event.key for part in parts))
            kinds[kind] = kinds.get(kind, 0) + ms
            kernels[event.key] = kernels.get(event.key, 0) + ms
        elif event.key in ("aten::mm", "aten::bmm") and ms > 0:
            a, b = event.input_shapes[:2]
            products[str((a, b))] = ms, 2e-12 * torch.Size(a).numel() * b[-1] * event.count / n
    return kinds, kernels, products


@exits.program
def main(argv=None):
    args = flags().parse_args(argv)
    require(args.kernels >= 0, f"--kernels must be at least 0, got {args.kernels}")
    shape, config = settings(args)
    require(torch.cuda.is_available(), "tools.profiler needs a GPU")
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = fast.apply(DRT(shape).to(device), compile=config.compile)
    optimizer = make_optimizer(model, config)
    run, n_token = micro_batch(model, config, device)

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for _ in range(3):
        run()
        update()
    wall, step = milliseconds(run), milliseconds(update)
    kinds, kernels, products = by_kind(run)
    n_parameter = sum(p.numel() for p in model.parameters())
    print(f"{report.hardware(device)}; {n_parameter:,} parameters, {n_token:,} tokens; "
          + fast.describe(model, config))
    rows = [dict(kind=kind, ms=ms, percent=100 * ms / wall) for kind, ms in kinds.items()]
    rows.sort(key=lambda row: -row["ms"])
    rows += [dict(kind="gaps", ms=wall - sum(kinds.values()), percent=100 - 100 * sum(kinds.values()) / wall),
             dict(kind="forward and backward", ms=wall, percent=100.0),
             dict(kind="optimizer, once a step", ms=step, percent=100 * step / wall)]
    report.print_table(rows)
    print(f"{1000 * n_token / wall:,.0f} tokens a second without the optimizer")
    for name, (ms, tflop) in sorted(products.items(), key=lambda item: -item[1][0])[:args.kernels]:
        print(f"{ms:8.2f} ms {1000 * tflop / ms:6.0f} TFLOP/s  {name}")
    for name, ms in sorted(kernels.items(), key=lambda item: -item[1])[:args.kernels]:
        print(f"{ms:8.2f} ms  {name[:110]}")


if __name__ == "__main__":
    main(sys.argv[1:])
