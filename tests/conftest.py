from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from fault_runs import folder, launcher  # noqa: F401  fixtures
from rank_pool import RankPool


def pytest_configure() -> None:
    """Where there are GPUs, tests of kernels run there; processes that tests start are CPU ranks, four of them say."""
    if torch.cuda.is_available():
        torch.cuda.init()  # this process has seen them
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start ranks are `alone`; others that are say so themselves."""
    for item in items:
        if {"ranks", "broken_ranks", "launcher"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """`ranks(4)` is a pool of four gloo ranks, kept for the whole session."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, tmp_path_factory.mktemp("ranks"))
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture
def broken_ranks(ranks: Callable[[int], RankPool]) -> Iterator[Callable[[int], RankPool]]:
    """Ranks that a test breaks: the next test gets new ones."""
    used: list[RankPool] = []

    def pool(world_size: int) -> RankPool:
        used.append(ranks(world_size))
        return used[-1]

    yield pool
    for each in used:
        each.close()
