"""Attention kernels behind one interface, chosen by what they can compute."""

from flexsp.parallel.kernels.choose import KERNELS, choose
from flexsp.parallel.kernels.kernel import Block, Kernel, Need, Scores, wide_dtype

__all__ = ["KERNELS", "Block", "Kernel", "Need", "Scores", "choose", "wide_dtype"]
