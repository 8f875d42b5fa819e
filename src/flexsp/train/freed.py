"""Memory that has been freed: handed back to the system, where malloc would keep it."""

from __future__ import annotations

import ctypes


def hand_back() -> None:
    """Hands the free pages of this process's heaps back to the system; nothing where the C library is not glibc.

    glibc keeps what is freed below a page that is still in use, and tensors up to 32 MiB come from its heaps. Writing a
    checkpoint frees a copy of the rank's weights and optimizer: kept, it is memory that nobody can use until the next
    one, and each next one finds it cut up a little more. Other threads run meanwhile, until they ask for memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
