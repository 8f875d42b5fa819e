"""Whether the other ranks live: each counts its ticks on the board, and who is asked to stop looks once who still does.

beat/RANK   a counter: its ticks
looks       a counter: who raises it to 1 looks
"""

from __future__ import annotations

import time

from flexsp.train.board import Board


class Beats:
    """Those of all ranks, and this one's."""

    def __init__(self, board: Board, rank: int, world_size: int, wait_s: float) -> None:
        """
        Args:
            board: of the ranks.
            rank: this one.
            world_size: how many there are.
            wait_s: how long a rank must not have beaten to be silent.
        """
        self._board, self._rank, self._wait_s = board, rank, wait_s
        self._others = [other for other in range(world_size) if other != rank]
        self._before: tuple[float, dict[int, int | None]] | None = None
        """Where a request to stop has come: when, and the others' beats then."""

    def beat(self) -> None:
        """A tick of this rank."""
        self._board.add(f"beat/{self._rank}", 1)

    def has_stopped(self) -> bool:
        """Whether a rank has ended or stopped since this was first asked, and has not said so.

        Asked at each tick once SIGTERM has come, in a step: torchrun sends it where a rank has died. For collectives
        that notice nothing, NCCL's, and for steps that compute for long. One rank looks; the others, and one that looks
        and finds nobody missing, go on to the end of the step.
        """
        if self._before is None:
            looks = self._board.add("looks", 1) == 1
            self._before = time.monotonic(), self._count() if looks else {}
        began, before = self._before
        if not before or time.monotonic() < began + self._wait_s:
            return False
        self._before = began, {}
        silent = [rank for rank, beats in self._count().items() if beats == before[rank]]
        return any(self._board.read(f"found/{rank}") is None for rank in silent) and self._board.is_there

    def _count(self) -> dict[int, int | None]:
        return {rank: self._board.add(f"beat/{rank}", 0) for rank in self._others}
