"""What all command lines share: flags from dataclasses, files and texts that they name, devices."""
import argparse
import functools
import inspect
import itertools
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from gca import Mistake, require
from tools import exits


class Parser(argparse.ArgumentParser):
    """A user's mistake ends in one line, `error: ..`, and exit status 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        exits.end(2, message)


def add_fields(parser, config, names=None, choices=None, defaults=None, leave_out=()):
    """A flag for each field of a dataclass, None where it is not given; the comment beside it is the help.

    names: of the fields, default: all; choices, defaults: by name, where they are not the field's own.
    """
    comments = comments_of(config)
    for field in fields(config):
        if field.name in leave_out or names and field.name not in names:
            continue
        kind = boolean if type(field.default) is bool else type(field.default)
        default = (defaults or {}).get(field.name, field.default)
        help = f"{comments[field.name]} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=kind, metavar="{true,false}" if kind is boolean else None,
                            choices=(choices or {}).get(field.name), help=help)


def add_command(commands, name, description):
    """A parser for one more command, which the help of all commands describes too."""
    return commands.add_parser(name, description=description, help=description.replace("%", "%%"))


@functools.lru_cache
def comments_of(config):
    """{field: the comment beside it} of a dataclass."""
    comments = {}
    for line in inspect.getsource(config).splitlines():
        code, _, comment = line.partition("  # ")
        comments[code.partition(":")[0].strip()] = comment
    return comments


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def folder(text):
    """A folder to write to, as a flag's type; not the current one, as a shell's empty variable is."""
    if Path(text).absolute() == Path.cwd():
        raise argparse.ArgumentTypeError(f"must be another folder than the current folder, got {text!r}")
    return Path(text)


def numbers(text):
    """Numbers separated by commas, as a flag's type."""
    values = [*map(int, text.split(","))]
    if not 1 <= min(values) <= max(values) <= 10 ** 10:
        raise ValueError
    return values


def checkpoint(text):
    """The path of a checkpoint, or of the folder of its run, as a flag's type."""
    return Path(text, "ckpt.pt") if Path(text).is_dir() else Path(text)


SHARED = dict(
    ckpt=dict(type=checkpoint, default=Path("out/ckpt.pt"), help="default: out/ckpt.pt"),
    ckpts=dict(type=checkpoint, nargs="+", default=[Path("out/ckpt.pt")],
               help="checkpoints, side by side; default: out/ckpt.pt"),
    data=dict(help="a corpus of the same tokenizer; default: training's"),
    split=dict(choices=["val", "test"], help="default: test, if there is one"),
    fast=dict(type=boolean, default=True, metavar="{true,false}",
              help="read in segments, with faster pieces (fast/); false: by the plain files"),
    offload=dict(action="store_true", help="keep chunks in CPU memory"),
    dtype=dict(default="auto", choices=["auto", "float32", "bfloat16", "float16"],
               help="to compute in (auto: bfloat16 or float16 on a GPU, float32 on a CPU)"),
    json=dict(type=Path, help="write settings, hardware and rows here"),
    seed=dict(type=int, default=0, help="of all that is random (%(default)s)"),
    device=dict(default="auto", help="cpu or cuda; default: cuda if there is a GPU"))


def add_shared(parser, names):
    """Flags that several commands have in common."""
    for name in names.split():
        parser.add_argument("--ckpt" if name == "ckpts" else f"--{name}", **SHARED[name])


def add_text(parser):
    """Flags for a text, as given_text() reads it; returns their group."""
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text")
    text.add_argument("--file", type=Path, help="a file that holds it, of any length; "
                      "a line break at its end is a part of it")
    return text


def check_writable(flag, path):
    """ValueError if no file can be written at this path (None: no file): found before the work, not after."""
    if not path:
        return
    folder = path.absolute().parent
    require(folder.is_dir(), f"{flag}: no folder {path.parent} to write {path.name} to")
    require(path.is_file() or not path.exists(), f"{flag}: {path} must be a file, it is a folder or a device")
    require(os.access(folder, os.W_OK), f"{flag}: no permission to write to {folder}")


def check_arguments(args):
    """ValueError for numbers out of their ranges and files that cannot be written, found before the work."""
    require(0 <= getattr(args, "seed", 0) < 2 ** 63, "--seed must be in 0 .. 2 ** 63 - 1, got {}",
            getattr(args, "seed", 0))
    for name in ("questions", "tokens", "places", "documents"):
        value = getattr(args, name, None)
        require(value is None or 1 <= value <= 10 ** 6, f"--{name} must be in 1 .. 1000000, got {value}")
    read = [getattr(args, "file", None), *np.atleast_1d(getattr(args, "ckpt", None))]
    for name in ("json", "html", "out"):
        path = getattr(args, name, None)
        check_writable(f"--{name}", path)
        require(not path or path.resolve() not in [file.resolve() for file in read if file],
                f"--{name}: {path} would be overwritten")


def given_text(args):
    """What --file or --prompt holds; ValueError if that is nothing, or not UTF-8."""
    try:
        if args.file:
            text = args.file.read_bytes().decode()
        else:                           # a shell's UTF-8, whatever Python takes the locale to be
            is_odd = any("\ud800" <= c <= "\udfff" for c in args.prompt)
            text = os.fsencode(args.prompt).decode() if is_odd else args.prompt
    except OSError as error:
        raise Mistake(f"--file: {args.file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise Mistake(f"{args.file or '--prompt'} must be UTF-8 text: {where}") from None
    require(text, f"{'--file' if args.file else '--prompt'} must hold some text, got none")
    return text


def check_types(values, configs, path, leave_out=()):
    """ValueError unless values, read from path, has the fields of these dataclasses, of their types."""
    for field in itertools.chain(*map(fields, configs)):
        if field.name in leave_out:
            continue
        kind = type(field.default)
        value = values.get(field.name)
        fits = isinstance(value, kind) or kind is float and type(value) is int
        require(fits and (kind is bool or type(value) is not bool),
                f"{path} must have a setting {field.name} of type {kind.__name__}, got {value!r}")


def pick_device(name):
    """'auto' is the GPU if there is one. ValueError for a GPU that there is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name) if name in ("cpu", "cuda") else None
    require(device and (device.type == "cpu" or torch.cuda.is_available()),
            f"--device must be auto, cpu, or cuda on a machine with a GPU, got {name!r}")
    return device


DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)


def pick_dtype(name, device):
    """'auto' is bfloat16 on a GPU that has it, float16 on one that has not, and float32 on a CPU."""
    if name != "auto":
        require(name in DTYPES, f"--dtype must be auto or one of {', '.join(DTYPES)}, got {name}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    exits.say_once("this GPU has no bfloat16: it computes in float16, and trains with a gradient scaler")
    return torch.float16


def autocast(device, dtype):
    """Compute in dtype; float32 is no autocast."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
