"""Files that are whole or not there: how memories, checkpoints, corpora and reports are written and read."""
import errno
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from gca import Mistake, require
from model import DRTConfig


class Damaged(Mistake):
    """A file that is not what it should be, as opposed to one that cannot be read."""


@contextmanager
def atomic_file(path):
    """A binary file to write to. It appears at path whole; a kill or a full disk leaves what was there."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError) and isinstance(error, RuntimeError):
            error = error.__context__                   # torch.save's own words hide that the disk is full
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)
        raise error from None


def load_saved(path, what, parts):
    """The dict that torch.save wrote to path, checked, on the CPU.

    what: the kind of file, in words; parts: {name: type} that it must hold. The file's own checksums are
    compared, so a flipped bit is found. Damaged if it is anything else; OSError if it cannot be read.
    """
    with open(path, "rb"):                              # no permission, say: such causes speak for themselves
        pass
    try:
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, "a checksum differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, kind in parts.items():
            require(isinstance(state[name], kind), f"{name} must be {kind}, got {type(state[name])}")
    except Exception as error:                          # whatever a foreign or damaged file makes torch raise
        leads_astray = isinstance(error, OSError) and error.errno == errno.EINVAL       # to before its start
        if isinstance(error, (OSError, MemoryError)) and not leads_astray:
            raise
        raise Damaged(f"{path} is damaged or not {what}") from error
    return state


def saved_config(values):
    """The DRTConfig in a file. What an old one lacks has its default, or what was so before."""
    return DRTConfig(**dict(encoder_rope=False) | values)
