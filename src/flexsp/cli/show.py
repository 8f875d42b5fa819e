"""`flexsp show`: where the crossovers of a profile lie, or how a run went, as tables and as a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from flexsp.cli.show_run import is_run, show_run
from flexsp.lengths import length_text, parse_tokens
from flexsp.profile import Profile
from flexsp.simulate.crossovers import (
    Cost,
    cost,
    crossovers,
    formula_over_table,
    least_cost,
    policies,
    powers_of_four,
)
from flexsp.simulate.pictures.profile import save_figure

MOST_COLUMNS = 7
"""Lengths side by side in a table, so that it stays within the 80 columns of a pipe."""


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "show", help="show where the degrees of a profile cross, or how a run went", description=__doc__
    )
    parser.add_argument("profile", metavar="PROFILE|RUN", help="a flexsp-profile/1 file, or the folder of a run")
    parser.add_argument(
        "--lengths",
        metavar="1K,4K,...",
        help="lengths of the tables (default: powers of 4 from 1K to the longest held)",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw it into FILE, named .png, .svg or .pdf (needs 'flexsp[plot]')"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if is_run(arguments.profile):
        if arguments.lengths is not None:
            raise ValueError(
                f"--lengths={arguments.lengths} is for profiles, and {arguments.profile} is a run; drop it"
            )
        return show_run(arguments.profile, arguments.plot)
    profile = Profile.load(arguments.profile)
    lengths: Sequence[int] = powers_of_four(profile)
    if arguments.lengths is not None:
        lengths = sorted({parse_tokens(text.strip(), "--lengths") for text in arguments.lengths.split(",")})
    if arguments.plot is not None:
        save_figure(profile, arguments.plot)
    console = Console(markup=False)
    _show_head(profile, console)
    _show_crossovers(profile, lengths, console)
    _show_costs(profile, lengths, console)
    _show_tables(profile, console)
    _show_provenance(profile.provenance, console)
    return 0


def _show_head(profile: Profile, console: Console) -> None:
    nodes = -(-profile.num_devices // profile.devices_per_node)
    source, device, date = (profile.provenance.get(key) for key in ("source", "device", "date"))
    _say(console, " ".join(profile.name.split()))
    facts = [
        f"{profile.num_devices} {'device' if profile.num_devices == 1 else 'devices'} on {nodes} "
        f"{'node' if nodes == 1 else 'nodes'}",
        "source not stated" if source is None else f"source: {_text(source)}",
        *([] if date is None else [_text(date)]),
    ]
    _say(console, "; ".join(facts))
    if device is not None:
        _say(console, _text(device))


def _show_crossovers(profile: Profile, lengths: Sequence[int], console: Console) -> None:
    """One table for each policy: what degrees hold, from where they pay and are needed, and the exchange's share."""
    exceeded = False
    for policy in policies(profile):
        shown = _some_held(profile, lengths, policy)
        _say(console, "\none sequence alone in a group of each degree" + _under(policy, profile))
        shares = (f"exchange\nat {length_text(tokens)}" for tokens in shown)
        columns = ("degree", "holds\ntokens", "pays in\ntime from", "needed by\nmemory from", *shares)
        table = _table(columns)
        for found in crossovers(profile, policy):
            lowest = found.sp_degree == profile.sp_degrees[0]
            first = found.pays_from_tokens
            beyond = first is not None and first > max(1, found.capacity_tokens)
            exceeded = exceeded or (beyond and not lowest)
            costs = [cost(profile, found.sp_degree, tokens, policy) for tokens in shown]
            table.add_row(
                profile.degree_text(found.sp_degree),
                f"{found.capacity_tokens:,}",
                "" if lowest else f"({first:,})" if beyond else _from(first),
                "" if lowest else _from(found.needed_from_tokens),
                *("-" if each is None else f"{each.exchange_share:.0%}" for each in costs),
            )
        console.print(table)
    _say(console, "pays in time from: tokens from which on it is sooner than every lower degree")
    if exceeded:
        _say(console, "  (n): longer than the degree holds")
    _say(console, "needed by memory from: tokens from which on no lower degree has the memory")
    _say(console, "exchange: its share of the group's time; -: does not fit")
    if profile.tables:
        _say(console, "all of it by the formula, though measured tables are there; see below")
    if any(layout.ring > 1 for layout in profile.layouts.values()):
        _say(console, "degree (ulysses x ring): how it splits where it is not Ulysses alone")


def _show_costs(profile: Profile, lengths: Sequence[int], console: Console) -> None:
    """Time and price of a token, by degree and length."""
    letters = {policy: chr(ord("a") + index) for index, policy in enumerate(policies(profile)[1:])}
    costs = {(d, s): least_cost(profile, d, s) for d in profile.sp_degrees for s in lengths}
    used = {each.policy for each in costs.values() if each is not None and each.policy is not None}
    measured = any(each is not None and each.table_token_s is not None for each in costs.values())

    def cell(each: Cost | None, price: bool) -> str:
        if each is None:
            return "-"
        value = _microseconds(each.token_device_s if price else each.best_token_s)
        if measured:
            value += " " if each.table_token_s is None else "*"
        return f"{value} {letters[each.policy]}" if each.policy is not None else f"{value}  " if used else value

    for title, price in (
        ("\ntime: microseconds a token, by length", False),
        ("price: device-microseconds a token, the time of all devices of the group", True),
    ):
        _say(console, title)
        for some in _chunks(lengths):
            table = _table(("degree", *(length_text(tokens) for tokens in some)))
            for degree in profile.sp_degrees:
                table.add_row(str(degree), *(cell(costs[degree, tokens], price) for tokens in some))
            console.print(table)
    named = [f"{letters[policy]}: under {policy}" for policy in policies(profile)[1:] if policy in used]
    _say(console, "; ".join(["-: does not fit" + (" under any policy" if letters else ""), *named]))
    if measured:
        _say(console, "*: by the measured table of the degree; the others by the formula")


def _show_tables(profile: Profile, console: Console) -> None:
    """How far the formula is off from the measured tables, where the profile has any."""
    degrees = [degree for degree in profile.sp_degrees if degree in profile.tables]
    if degrees:
        _say(console, "\nmeasured tables, of rows full of sequences of one length: what the formula says over them")
    for degree in degrees:
        ratios = formula_over_table(profile, degree)
        said = (f"x{ratio:.2f} at {length_text(tokens)}" for tokens, ratio in ratios.items())
        _say(console, f"  degree {profile.degree_text(degree)}: {', '.join(said)}")


def _show_provenance(provenance: Mapping[str, Any], console: Console) -> None:
    """What the profile says of its fit, its correction, each field and what was assumed; nothing where it does not."""
    if fit := provenance.get("fit"):
        pairs = fit.items() if isinstance(fit, Mapping) else [("", fit)]
        _say(console, "fit: " + ", ".join(f"{key} {_text(value)}".strip() for key, value in pairs))
    if correction := provenance.get("correction"):
        pairs = correction.items() if isinstance(correction, Mapping) else [("", correction)]
        _say(
            console, "corrected while training: " + ", ".join(f"{key} {_ratio(value)}".strip() for key, value in pairs)
        )
    if started_from := provenance.get("started_from_sha256"):  # as the run that learned it writes (train.learn)
        _say(console, f"learned from another profile, of sha256 {_text(started_from)}")
    if fields := provenance.get("fields"):
        _say(console, "where the numbers come from")
        table = _table(("field", "from"), justify="left")
        for key, value in fields.items() if isinstance(fields, Mapping) else [("", fields)]:
            table.add_row(Text(key), Text(_text(value)))
        console.print(table)
    if assumptions := provenance.get("assumptions"):
        for assumption in assumptions if isinstance(assumptions, list) else [assumptions]:
            _say(console, f"assumed: {_text(assumption)}")


def _table(columns: Sequence[str], justify: JustifyMethod = "right") -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify=justify, overflow="fold")
    return table


def _chunks(lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    for begin in range(0, len(lengths), MOST_COLUMNS):
        yield lengths[begin : begin + MOST_COLUMNS]


def _under(policy: str | None, profile: Profile) -> str:
    if policy is None:
        return ""
    return f", under {policy} (compute x {profile.memory.policies[policy].compute_factor:.3g})"


def _some_held(profile: Profile, lengths: Sequence[int], policy: str | None) -> list[int]:
    """The first, the middle and the last of the lengths that some degree holds under `policy`."""
    longest = max(profile.capacity_tokens(degree, policy) for degree in profile.sp_degrees)
    held = [tokens for tokens in lengths if tokens <= longest] or lengths[:1]
    return sorted({held[0], held[len(held) // 2], held[-1]})


def _from(tokens: int | None) -> str:
    return "never" if tokens is None else "always" if tokens == 1 else f"{tokens:,}"


def _microseconds(seconds: float) -> str:
    """Three digits, or whole microseconds, so that a column can be compared by eye."""
    value = seconds * 1e6
    if not 1 <= value < 1e7:
        return f"{value:.3g}"
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def _ratio(value: Any) -> str:
    return f"x{value:.2f}" if isinstance(value, int | float) else _text(value)


def _text(value: Any) -> str:
    """A value of the provenance on one line, whatever it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join((value if isinstance(value, str) else json.dumps(value)).split())


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
