"""The kernel that serves a need: the first, in order of speed where both serve, that does not refuse."""

from __future__ import annotations

from functools import lru_cache

from flexsp.parallel.kernels.flash import FLASH
from flexsp.parallel.kernels.flex import FLEX
from flexsp.parallel.kernels.kernel import Kernel, Need
from flexsp.parallel.kernels.math import MATH
from flexsp.parallel.kernels.sdpa import SDPA
from flexsp.parallel.kernels.varlen import VARLEN

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (VARLEN, FLASH, FLEX, SDPA, MATH)}
"""By name, in the order in which they are tried."""


@lru_cache(maxsize=256)
def choose(need: Need, name: str | None = None) -> Kernel:
    """The kernel for a layer; the same need gives the same kernel, from a cache.

    Args:
        need: what is to be computed.
        name: this kernel and no other.

    Raises:
        ValueError: there is no kernel of that name, it refuses, or all refuse.
    """
    if name is not None:
        if name not in KERNELS:
            raise ValueError(f"kernel={name!r} is unknown; choose one of {', '.join(KERNELS)}")
        reason = KERNELS[name].refuses(need)
        if reason is not None:
            raise ValueError(f"kernel={name!r} cannot serve: {reason}; name another, or none to have one chosen")
        return KERNELS[name]
    reasons = []
    for kernel in KERNELS.values():
        reason = kernel.refuses(need)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise ValueError(
        f"dropout={need.dropout}, softcap={need.softcap}, window={need.window}: no attention kernel computes this "
        f"({'; '.join(reasons)}); train without attention dropout"
    )
