"""How a program ends, and what it says: mistakes in one line, signals, streams that cannot be written to."""
import functools
import os
import signal
import sys
import threading
import traceback
from contextlib import contextmanager, suppress

import torch

from gca import Mistake

LOWER = ("to train, lower --batch_tokens, --micro_batch or the model's sizes; to read, lower --lengths, or "
         "use --offload where there is a GPU")


ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
          signal.SIGXCPU]                       # signals that ask a process to end


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
                end(128 + error.args[0], "terminated", os._exit)
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
                if terminated := behind(error, Terminated):
                    end(128 + terminated.args[0], "terminated", os._exit)
                if "can't allocate memory" not in str(error):
                    raise
                end(2, f"out of memory: {LOWER}")
            finally:
                try:
                    sys.stderr.flush()
                except (OSError, ValueError):           # or Python, as it exits, would end with 120
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return run


def behind(error, kind):
    """The error of this kind that was on its way when this one was raised, or None."""
    while error and not isinstance(error, kind):
        error = error.__context__
    return error


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


# ---------------------------------------------------------------- what it says

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
