"""How a degree splits into heads x context: ranks that trade heads (Ulysses), times a ring that passes keys around."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from transformers import PreTrainedConfig

from flexsp.parallel.widths import attention_widths
from flexsp.profile import Layout


def heads_of(config: PreTrainedConfig) -> int:
    """What Ulysses ranks must divide: the attention heads, or where they differ by layer what divides all of them."""
    return math.gcd(*(each.heads for each in attention_widths(config)))


def powers_of_two(most: int) -> list[int]:
    """The degrees that plans use unless told otherwise: they place best."""
    return [1 << power for power in range(most.bit_length())]


def layouts_of(config: PreTrainedConfig, degree: int) -> list[Layout]:
    """Every layout that serves a degree, the one with the most Ulysses first: its ranks must divide the heads."""
    heads = heads_of(config)
    return [
        Layout(ulysses=ulysses, ring=degree // ulysses)
        for ulysses in range(degree, 0, -1)
        if degree % ulysses == 0 and heads % ulysses == 0
    ]


def default_layouts(config: PreTrainedConfig, degrees: Iterable[int]) -> dict[int, Layout]:
    """Layouts for the degrees that Ulysses alone cannot serve: as much of it as the heads allow, and a ring."""
    first = {degree: layouts_of(config, degree)[0] for degree in degrees}
    return {degree: layout for degree, layout in first.items() if layout.ring > 1}


def check_degrees(
    degrees: Iterable[int], config: PreTrainedConfig, world_size: int, layouts: Mapping[int, Layout]
) -> None:
    """Refuses a degree that the ranks, or its layout that the model's heads, cannot serve.

    Args:
        degrees: to be used.
        config: of the model.
        world_size: ranks.
        layouts: by degree; one that is not here is Ulysses alone.

    Raises:
        ValueError: names the degree and a layout that would work.
    """
    heads = heads_of(config)
    for degree in degrees:
        if not 1 <= degree <= world_size:
            raise ValueError(
                f"sp_degree={degree} is not between 1 and world_size={world_size}; use more ranks, or lower degrees"
            )
        layout = layouts.get(degree) or Layout(ulysses=degree, ring=1)
        if layout.ulysses * layout.ring != degree:
            raise ValueError(
                f"layouts: ulysses={layout.ulysses} x ring={layout.ring} is not sp_degree={degree}; correct one"
            )
        if heads % layout.ulysses:
            works = layouts_of(config, degree)[0]
            raise ValueError(
                f"sp_degree={degree} with ulysses={layout.ulysses} cannot be served with num_attention_heads={heads}, "
                f"which it must divide; give it a layout, e.g. ulysses={works.ulysses} x ring={works.ring}"
            )
