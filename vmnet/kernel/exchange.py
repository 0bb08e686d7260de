"""Two files that trade places in one step, so that whatever was at either name can still be found at the other."""

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
"""linux/fs.h; renameat2(2)."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class NoExchange(Exception):
    """The file system cannot do it."""


def exchange(first: Path, second: Path) -> None:
    """Raises NoExchange, OSError (FileNotFoundError when either is not there)."""
    done = _LIBC.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if done == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise NoExchange(os.strerror(number))
    raise OSError(number, os.strerror(number), str(first))
