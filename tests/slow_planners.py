"""Planners that misbehave, for the loader's tests; each is named by `slow_planners:function`."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import flexsp


def slow(lengths, profile):
    """Takes 0.3 s."""
    time.sleep(0.3)
    return flexsp.plan(lengths, profile)


def stalls(lengths, profile):
    """Never answers."""
    time.sleep(10_000)


def tells_in_a_folder_and_stalls(lengths, profile, path):
    """Makes a file first whose name is its process id."""
    open(os.path.join(path, str(os.getpid())), "w").close()
    time.sleep(10_000)


def tells_and_stalls(lengths, profile, path):
    """Writes its process id first."""
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(10_000)


_planned = [0]


def _third() -> bool:
    """Whether this is the third batch of this process."""
    _planned[0] += 1
    return _planned[0] == 3


def dies_at_the_third(lengths, profile):
    return os._exit(3) if _third() else flexsp.plan(lengths, profile)


def raises_at_the_third(lengths, profile):
    return raises(lengths, profile) if _third() else flexsp.plan(lengths, profile)


def stalls_at_the_third(lengths, profile):
    return stalls(lengths, profile) if _third() else flexsp.plan(lengths, profile)


def illegal_at_the_third(lengths, profile):
    return illegal(lengths, profile) if _third() else flexsp.plan(lengths, profile)


def prints_in_c(lengths, profile):
    """Writes to the descriptor that the protocol began on."""
    os.write(1, b"a library's banner\n")
    return flexsp.plan(lengths, profile)


def noisy(lengths, profile):
    """Prints, which must not disturb."""
    print("planning")
    return flexsp.plan(lengths, profile)


def raises(lengths, profile):
    raise ArithmeticError("no plan today")


def dies(lengths, profile):
    os._exit(3)


def exits(lengths, profile):
    raise SystemExit(3)


def nothing(lengths, profile):
    return None


def boasts(lengths, profile):
    """Claims a bound that no plan reaches, and writes where it must not."""
    return replace(flexsp.plan(lengths, profile), lower_bound_s=1e9)


def writes(lengths, profile):
    lengths[0] = 1
    return flexsp.plan(lengths, profile)


def illegal(lengths, profile):
    """Forgets the last sequence."""
    made = flexsp.plan(lengths[:-1], profile)
    return replace(made, lengths_sha256=None, predicted_s=None)


def latin1(lengths, profile):
    """Writes more to stderr than a pipe holds, in another encoding, as a native library may."""
    os.write(2, b"r\xe9sum\xe9\n" + b"x" * 200_000 + b"\n")
    return flexsp.plan(lengths, profile)


def latin1_and_dies(lengths, profile):
    os.write(2, b"x" * 2_000_000 + b"\nr\xe9sum\xe9\n")
    os._exit(3)


def nan_at_the_third(lengths, profile):
    made = flexsp.plan(lengths, profile)
    return replace(made, predicted_s=float("nan")) if _third() else made
