"""What must outlive a loss of power."""

from __future__ import annotations

import errno
import os
from pathlib import Path

CANNOT = (errno.EINVAL, errno.ENOTSUP)
"""What file systems say that have no such thing, for folders above all."""


def sync(path: Path) -> None:
    """Returns once a file, or the names in a folder, will outlive a power loss, where the file system can tell."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    finally:
        os.close(opened)
