"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from safetensors import SafetensorError

from qlora_lab.errors import CANNOT_WRITE, UserError


@contextlib.contextmanager
def new_folder(target: pathlib.Path, nbytes: int) -> Iterator[pathlib.Path]:
    """Give a folder beside `target` to write into, which takes its name when all is written.

    If anything goes wrong, Ctrl-C included, it is removed. What a killed process left there is removed by the next one.

    Args:
        nbytes: that will be written, about; there must be room for them.

    Raises:
        UserError: the target exists, its folder cannot be written, or the disk is too full, before or while writing.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} is there already: name a folder that is not, nothing is overwritten")
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target.parent).free) < nbytes:
            raise UserError(
                f"the disk of {target.parent} is too full: {nbytes / 1e6:,.1f} MB are to be written, and "
                f"{free / 1e6:,.1f} MB are free"
            )
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        for file in filter(pathlib.Path.is_file, part.rglob("*")):  # on the disk before the rename makes it visible
            with open(file, "r+b") as handle:  # Windows flushes only files opened for writing
                os.fsync(handle.fileno())
        part.rename(target)
    except SafetensorError as error:  # damaged files are reported where they are read, so this is a failed write
        raise UserError(f"cannot write {target}: {error}; nothing is left of it") from error
    except OSError as error:
        if error.errno is None:  # NumPy's, which writes the tensors of a GGUF file: "20480 requested and 5904 written"
            why = f"not all bytes were taken ({error}), so the disk seems to be full"
        elif error.errno in CANNOT_WRITE:
            why = os.strerror(error.errno)
        else:
            raise
        raise UserError(f"cannot write {target}: {why}; nothing is left of it") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
