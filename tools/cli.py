"""What all command lines share: mistakes in one line, signals, flags from dataclasses, devices."""
import argparse
import functools
import inspect
import itertools
import os
import signal
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from gca import Mistake, require

# ---------------------------------------------------------------- how a program ends

LOWER = ("to train, lower --batch_tokens, --micro_batch or the model's sizes; to read, lower --lengths, or "
         "use --offload where there is a GPU")


ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
          if hasattr(signal, name)]             # signals that ask a process to end


class Terminated(BaseException):
    """A signal other than Ctrl-C asked the process to end; its number."""


def program(main):
    """Wrap main(argv): a user's mistake, a signal or a full machine ends in one line, not in a traceback.

    Exit status: 2 for mistakes and for what the machine cannot do, 128 + number after a signal (130 after
    Ctrl-C, 143 after SIGTERM). A second signal ends the program at once.
    """
    @functools.wraps(main)
    def run(argv=None):
        UNSAID.clear()
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:              # closed by whoever started the program
                setattr(sys, name, open(os.devnull, "w"))
            if hasattr(getattr(sys, name), "reconfigure"):                  # not in a notebook
                getattr(sys, name).reconfigure(errors="backslashreplace")   # of a terminal that lacks letters
        with signals(raise_signal):
            try:
                result = main(argv)
                sys.stdout.flush()
                for error in UNSAID:
                    raise error
                return result
            except KeyboardInterrupt:
                end(130, "interrupted", os._exit)       # at once: no waiting for threads and workers
            except Terminated as error:
                end(128 + (error.args or [signal.SIGTERM])[0], "terminated", os._exit)
            except BrokenPipeError:                     # `| head` has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                sys.exit(141)
            except torch.OutOfMemoryError as error:
                end(2, f"{str(error).split('. ')[0]}: {LOWER}")
            except MemoryError as error:
                end(2, f"out of memory ({error}): {LOWER}")
            except OSError as error:
                name = f"{error.filename}: " if error.filename else ""
                end(2, f"{name}{error.strerror or error}")
            except Mistake as error:
                end(2, str(error))
            except ValueError as error:                 # of a library, or a bug: with its place
                frame = traceback.extract_tb(error.__traceback__)[-1]
                end(2, f"{error} ({type(error).__name__} in {frame.filename}, line {frame.lineno})")
            except RuntimeError as error:
                if behind(error, KeyboardInterrupt):    # it came while a lock changed hands: that fails first
                    end(130, "interrupted", os._exit)
                if behind(error, Terminated):
                    end(143, "terminated", os._exit)
                if "can't allocate memory" not in str(error):
                    raise
                end(2, f"out of memory: {LOWER}")
    return run


def behind(error, kind):
    """Whether an error was raised while one of this kind was on its way."""
    while error and not isinstance(error, kind):
        error = error.__context__
    return error is not None


def end(status, message, leave=sys.exit):
    """Say why on stderr, in one line, and leave. Every process of a group says its own reason."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    who = f"process {rank} of {size}: " if rank != "0" else ""
    line = f"error: {who}{message}".replace("\n", " ")
    try:
        sys.stdout.flush()
    except (OSError, ValueError):                       # or Python would complain once more, as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    say(line.encode(errors="backslashreplace").decode(), sys.stderr)
    leave(status)


@contextmanager
def signals(handler):
    """Signals that ask to end call handler(number) in here; the second one ends the program at once.

    Not in a thread, where Python has no signals; and nohup's SIGHUP stays ignored.
    """
    seen = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [number for number in ENDING if in_main_thread
               and (number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN)]

    def handle(number, _):
        if seen:
            os._exit(128 + number)
        seen.append(number)
        handler(number)

    old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, previous in old.items():            # after one signal, another may end what is left to do
            signal.signal(number, signal.SIG_DFL if seen else previous)


@contextmanager
def default_signals():
    """A signal ends the process at once in here, also while it waits outside of Python."""
    old = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def raise_signal(number):
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


# ---------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """A user's mistake ends in one line, `error: ..`, and exit status 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        end(2, message)


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
    values = [int(x.replace("_", "")) for x in text.split(",")]
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
    text.add_argument("--file", type=Path, help="a file that holds it, of any length")
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
    say_once("this GPU has no bfloat16: it computes in float16, and trains with a gradient scaler")
    return torch.float16


UNSAID = []                 # errors of stdout, raised when the work is done


def say(text, file=None):
    """Print a line. Where that fails (a closed pipe, a full disk), the work goes on and is saved."""
    try:
        print(text, file=file, flush=True)
    except (OSError, ValueError) as error:
        UNSAID.extend([error] * (file is None and not UNSAID))


say_once = functools.lru_cache(say)


class BestEffort:
    """A stream for a progress bar: what cannot be written is lost and stops nothing.

    An error inside tqdm would leave its lock locked, and the next bar of another thread waiting for it.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


def visible(text):                      # one line, and nothing that a terminal would obey
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def autocast(device, dtype):
    """Compute in dtype; float32 is no autocast."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
