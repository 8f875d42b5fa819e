"""How a command ends that ranks run: in one line for all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable


def say_as(command: str) -> Callable[[str, int], None]:
    """Prints a line of `flexsp COMMAND`, given with the status to end with: on standard error unless all is well."""

    def say(text: str, status: int) -> None:
        print(f"flexsp {command}: {text}", file=sys.stderr if status else sys.stdout, flush=True)

    return say
