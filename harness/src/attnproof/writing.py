"""Files that a user named: written whole or not at all, and in the place of nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCEPTED = "accepted is a file, regular or new"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def unwritable(path: Path) -> str | None:
    """Why no file can be written there, as far as can be told beforehand; None when one can.

    A link to a regular file, or to where none is yet, counts as what it leads to.
    """
    if not os.path.isdir(path.parent):
        return f"there is no folder {path.parent}"
    place = os.path.realpath(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(place)):
            return f"leads to {place}, where there is no folder"
        return None if os.access(os.path.dirname(place), os.W_OK) else "may not be written"
    except OSError as error:
        return f"{error.strerror}; {ACCEPTED}"
    if not stat.S_ISREG(mode):
        return f"is {KINDS.get(stat.S_IFMT(mode), 'no file')}; {ACCEPTED}"
    if not os.path.isfile(place):  # removed while open, and reached through its descriptor
        return f"is an open file without a name; {ACCEPTED}"
    if not (os.access(place, os.W_OK) and os.access(os.path.dirname(place), os.W_OK)):
        return "may not be written"
    return None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, where links lead; OSError when it cannot be written."""
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The same for content that is written in the block, to the path that this gives."""
    if why := unwritable(path):
        raise OSError(None, why)
    place = Path(os.path.realpath(path))
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)  # of a process of the same number that was killed
    try:
        yield part
        os.replace(part, place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
