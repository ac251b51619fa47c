"""Files that appear whole or not at all, and are still there after a power cut. POSIX file systems."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def written_at_once(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name, or the place of the file of that name, once all of it is on the disk.

    Args:
        path: the name; its folder is made if missing.
        shared: several processes may write it at the same time, each all of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """A file of safetensors, written at once. None of the tensors may share memory with another.

    Raises:
        OSError: the disk is full, or another failure to write.
    """
    with written_at_once(path) as file:
        try:
            save_file(tensors, file.name, header)
        except SafetensorError as error:  # failures of the disk arrive as text: "... No space left (os error 28)"
            code = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(code[1]) if code else None, str(error), str(path)) from error
        written = Path(file.name)  # perhaps another file than the one that was opened
        written.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
        sync(written)


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a file of safetensors."""
    with safe_open(path, "pt") as file:
        return list(file.keys())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of safetensors, on the CPU, each in memory of its own.

    Own memory is aligned as elsewhere (results stay bitwise equal) and outlives the file. The file is opened anew for
    each, so that what was copied does not stay mapped, and all of it is not in memory twice.
    """

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
            return tensor

    return {name: read(name) for name in tensor_names(path)}


def sync(path: Path) -> None:
    """Waits until a file's data, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that only one process at a time can have. It goes with the process, however that ends.

    Raises:
        BlockingIOError: another process has it.
    """
    import fcntl  # only here: what else is in this module does without, where there is none

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
