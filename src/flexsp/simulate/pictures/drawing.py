"""Making a figure and writing it, the same for all pictures.

matplotlib is an extra: it is imported where it is needed, and figures are made without pyplot: no window, no global
state.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Colour = tuple[float, float, float, float]
"""Red, green, blue and opacity, from 0 to 1."""

SUFFIXES = (".png", ".svg", ".pdf")

DOTS_PER_INCH = 130
"""Of a PNG: 12 inches are 1560 pixels."""


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure of that many inches, whose panels, titles and legends make room for each other.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"{error}: a picture needs matplotlib; pip install 'flexsp[plot]'") from None
    return Figure(figsize=(width_in, height_in), layout="constrained")


def degree_colours(degrees: Iterable[int]) -> dict[int, Colour]:
    """A colour for each degree, the lower the darker, so that a grey print keeps their order.

    viridis is as dark to the eye as it is in grey; its last fifth is too light on white.
    """
    from matplotlib import colormaps

    ascending = sorted(set(degrees))
    scale = colormaps["viridis"]
    return {degree: scale(0.82 * index / max(1, len(ascending) - 1)) for index, degree in enumerate(ascending)}


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        new_figure(1, 1)
    except ValueError:
        return False
    return True


def check_suffix(path: str | Path) -> str:
    """The kind of picture that the suffix of `path` names: png, svg or pdf.

    Raises:
        ValueError: another suffix, or none.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: suffix={suffix!r} must be one of {', '.join(SUFFIXES)}; name the picture so")
    return suffix.lower()[1:]


def save(figure: Figure, path: str | Path) -> None:
    """Writes `figure` into a PNG, SVG or PDF file, as the suffix of `path` says; makes its folder where there is none.

    Raises:
        ValueError: another suffix, or `path` cannot be written.
    """
    picture = _bytes_of(figure, check_suffix(path))
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); give a path in a writable folder") from None


def as_data_uri(figure: Figure) -> str:
    """`figure` as a PNG inside a URI, so that a page of HTML can hold it: the `src` of an `img`."""
    return "data:image/png;base64," + base64.b64encode(_bytes_of(figure, "png")).decode("ascii")


def _bytes_of(figure: Figure, kind: str) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=DOTS_PER_INCH)
    return picture.getvalue()
