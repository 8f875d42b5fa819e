"""What follows from the answers of the ranks."""

from __future__ import annotations

import pytest

from flexsp.train.roll_call import Kind, Report, verdict


def answer(rank: int, kind: Kind, **said: object) -> Report:
    fields = {"step": 12, "phase": "forward and backward", "still_s": 1.0, **said}
    return Report(rank=rank, kind=kind.value, **fields)


NORMAL = answer(0, Kind.CLOSED, error="RuntimeError: Connection closed by peer")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([NORMAL], "step 12: ranks 1, 2 ended without a word (killed, or out of memory?); found by rank 0 (step 12, "
         "forward and backward)"),
        ([answer(0, Kind.LATE), answer(1, Kind.CLOSED)], "step 12: rank 2 gives no sign (stopped, or cut off?), last "
         "seen: rank 2 (step 11, asking for a stop); waited for by ranks 0, 1 (step 12, forward and backward)"),
        ([NORMAL, answer(1, Kind.CLOSED), answer(2, Kind.DONE, step=None, phase="saving the model")],
         "step 12: rank 2 had ended already; still at work: ranks 0, 1 (step 12, forward and backward)"),
        ([NORMAL, answer(1, Kind.CLOSED), answer(2, Kind.HERE, frame="a.py:3 all_reduce", waits=True)],
         "step 12, rank 0: RuntimeError: Connection closed by peer; the ranks: ranks 0, 1 (step 12, forward and "
         "backward); rank 2 (step 12, forward and backward, at a.py:3 all_reduce)"),
        ([answer(0, Kind.LATE), answer(1, Kind.HERE, frame="b.py:1 loop", still_s=31.4), answer(2, Kind.HERE,
         frame="a.py:3 all_reduce", waits=True)], "step 12: rank 1 (step 12, forward and backward, at b.py:1 loop) has "
         "not moved for 31 s; waited for by ranks 0, 2 (step 12, forward and backward)"),
    ],
    ids=["dead", "stopped", "done", "unclear", "loops"],
)  # fmt: skip
def test_what_follows_from_the_roll(found, said):
    seen = {2: answer(2, Kind.HERE, step=11, phase="asking for a stop")}
    assert verdict({each.rank: each for each in found}, seen, found[0], 3) == said
