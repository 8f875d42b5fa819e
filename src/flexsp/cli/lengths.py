"""`flexsp lengths`: how long the sequences are, and where the tokens and the attention's work lie."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from flexsp import jsonfields as jf
from flexsp.cli.lengths_tables import show_distributions, show_excess, show_head, show_summary
from flexsp.distributions import Excess, Summary, excess, find, lengths_of, names, summarise
from flexsp.distributions.source import is_distribution
from flexsp.lengths import parse_tokens
from flexsp.simulate.pictures.drawing import check_suffix, save
from flexsp.simulate.pictures.lengths import draw

LENGTHS_HELP = "one integer a line, a .npy, .jsonl or .parquet file, or - for standard input"
COLUMN_HELP = "of a .jsonl or .parquet file: lengths, or lists of token ids (default: input_ids, else length)"
FORMAT = "flexsp-lengths/1"
COUNT, SEED = 100_000, 0


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "lengths", help="show how long sequences are, or list known distributions", description=__doc__
    )
    known = f"{LENGTHS_HELP}; or a distribution: {', '.join(names())}"
    parser.add_argument("lengths", metavar="LENGTHS", nargs="?", help=known)
    parser.add_argument("--list", action="store_true", help="list the distributions, and where each comes from")
    parser.add_argument("--column", metavar="NAME", help=COLUMN_HELP)
    parser.add_argument("--max-length", metavar="TOKENS", help="say what is longer than this, e.g. 192K")
    parser.add_argument(
        "--count", type=int, metavar="N", help=f"how many lengths to draw from a distribution (default: {COUNT:,})"
    )
    parser.add_argument("--seed", type=int, metavar="N", help=f"of the draw (default: {SEED})")
    parser.add_argument("--json", metavar="FILE", help="where to save the figures")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the lengths into FILE, named .png, .svg or .pdf (needs 'flexsp[plot]')"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    console = Console(markup=False)
    name: str | None = arguments.lengths
    if arguments.list:
        if name is not None:
            raise ValueError(f"--list takes no LENGTHS={name!r}; leave one of the two out")
        show_distributions([find(each) for each in names()], console)
        return 0
    if name is None:
        raise ValueError("there are no LENGTHS; give a file or a distribution, or --list to see those that there are")
    drawn = is_distribution(name)
    if not drawn:
        for flag in ("count", "seed"):
            if (value := getattr(arguments, flag)) is not None:
                raise ValueError(f"--{flag}={value} is for a distribution; {name} is read whole; leave it out")
    if arguments.plot is not None:
        check_suffix(arguments.plot)  # before a large file is read
    limit = None if arguments.max_length is None else parse_tokens(arguments.max_length, "--max-length")
    seed = SEED if arguments.seed is None else arguments.seed
    count = COUNT if arguments.count is None else arguments.count
    lengths = lengths_of(name, column=arguments.column, count=count, seed=seed)
    summary = summarise(lengths)
    over = None if limit is None else excess(lengths, limit)
    distribution = find(name) if drawn else None
    if arguments.plot is not None:
        title = name if distribution is None else f"{name} ({distribution.kind})"
        save(draw(lengths, title, limit), arguments.plot)
    if arguments.json is not None:
        document = to_json(name, summary, over)
        if distribution is not None:
            document["drawn"] = {"seed": seed, "kind": distribution.kind, "unit": distribution.unit}
        jf.write_object(arguments.json, document)
    show_head(name, distribution, seed, summary, console)
    show_summary(summary, console)
    if over is not None:
        show_excess(over, summary, console)
    return 0


def to_json(name: str, summary: Summary, over: Excess | None) -> dict[str, Any]:
    """The flexsp-lengths/1 document: tokens and squared tokens by band, and the quantiles by level."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "lengths": name,
        "sequences": summary.num_sequences,
        "tokens": summary.num_tokens,
        "squared_tokens": summary.squared_tokens,
        "mean_tokens": summary.mean_tokens,
        "quantiles_tokens": {f"{level:g}": tokens for level, tokens in summary.quantiles.items()},
        "bands": [
            {
                "above_tokens": band.above_tokens,
                "upto_tokens": band.upto_tokens,
                "sequences": band.num_sequences,
                "tokens": band.num_tokens,
                "squared_tokens": band.squared_tokens,
            }
            for band in summary.bands
        ],
    }
    if over is not None:
        document["over_max_length"] = {
            "max_length": over.max_length,
            "sequences": over.num_sequences,
            "tokens": over.num_tokens,
            "tokens_beyond": over.tokens_beyond,
        }
    return document
