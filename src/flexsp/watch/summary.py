"""A run in a dozen lines: what its rows of metrics.jsonl come to. Keys that a run does not write are left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from flexsp.plans import degrees_text

Rows = Mapping[int, Mapping[str, Any]]
"""The row that counts of each step."""

KEYS = {
    "step", "loss", "eval_loss", "tokens", "tokens_per_s", "tflops_per_s", "mfu", "micro_batches", "predicted_s",
    "micro_batch_s", "step_s", "plan_wait_s", "data_wait_s", "fallback", "skipped", "idle_share", "unused_share",
    "gather_share", "exchange_share", "peak_bytes", "predicted_peak_bytes", "communicators",
}  # fmt: skip
"""What a summary needs of a row."""
MOST_MIXES = 3


def summary(rows: Rows, steps: int) -> dict[str, Any]:
    """What the rows come to, as summary.json has it.

    Args:
        rows: of the steps done.
        steps: that the run is to have.
    """
    done = [rows[step] for step in sorted(rows)]
    found: dict[str, Any] = {"steps_done": len(done), "steps": steps}
    if not done:
        return found
    if values := _values(done, "loss"):
        found |= {"loss_first": values[0], "loss_last": values[-1]}
    if values := _values(done, "eval_loss"):
        found["eval_loss_last"] = values[-1]
    for key in ("tokens", "step_s", "plan_wait_s", "data_wait_s"):
        if values := _values(done, key):
            found[f"{key}_total" if key.endswith("_s") else key] = sum(values)
    for key in ("tokens_per_s", "tflops_per_s", "mfu"):
        if values := _values(done, key):
            found[f"{key}_median"] = median(values)
    ratios = [sum(row["micro_batch_s"]) / row["predicted_s"] for row in done if _predicted(row)]
    if ratios:
        found["measured_over_predicted_median"] = median(ratios)
    for key in ("idle_share", "unused_share", "gather_share", "exchange_share"):
        if (share := _weighted(done, key)) is not None:
            found[key] = share
    if values := _values(done, "fallback"):
        found["fallbacks"] = sum(1 for value in values if value)
    if skipped := _values(done, "skipped"):
        found["skipped"] = len(skipped)
    for key in ("peak_bytes", "predicted_peak_bytes", "communicators"):
        if values := _values(done, key):
            found[key] = max(values)
    found["mixes"] = mixes(done)
    return found


def mixes(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The degrees of micro-batches, the most frequent first, with how often they ran and their share of all."""
    shapes = Counter(f"<{degrees_text(degrees)}>" for row in rows for degrees in row.get("micro_batches", []))
    return [{"degrees": text, "count": n, "share": n / shapes.total()} for text, n in shapes.most_common()]


def lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary for people, as pairs of what and how much.

    Args:
        found: of `summary`, with `wall_s`, `checkpoint`, `folder` and `files` where they are known.
    """
    said = [("steps", _steps(found))]
    if "tokens" in found:
        said.append(("tokens", f"{found['tokens']:,}"))
    if "step_s_total" in found:
        wall = f"{duration(found['wall_s'])} since it was started; " if "wall_s" in found else ""
        said.append(("time", f"{wall}steps took {duration(found['step_s_total'])}"))
    if "loss_first" in found:
        evaluated = f", held out {found['eval_loss_last']:.3f}" if "eval_loss_last" in found else ""
        said.append(("loss", f"{found['loss_first']:.3f} -> {found['loss_last']:.3f}{evaluated}"))
    if "tokens_per_s_median" in found:
        said.append(("speed", _speed(found)))
    if "measured_over_predicted_median" in found:
        said.append(("measured / predicted", f"{found['measured_over_predicted_median']:.2f} of micro-batches, median"))
    if "idle_share" in found:
        said.append(("idle", f"{found['idle_share']:.1%} of rank-seconds{_unused(found)}"))
    if "exchange_share" in found:
        said.append(("exchange", f"{found['exchange_share']:.1%} of what ranks were busy"))
    waits = [f"plans {found['plan_wait_s_total']:.1f} s"] if "plan_wait_s_total" in found else []
    waits += [f"data {found['data_wait_s_total']:.1f} s"] if "data_wait_s_total" in found else []
    if waits:
        said.append(("waited for", ", ".join(waits)))
    if found.get("fallbacks"):
        said.append(("fallbacks", f"{found['fallbacks']:,} step{'s' * (found['fallbacks'] > 1)}"))
    if found.get("skipped"):
        said.append(("left out", f"{found['skipped']:,} of the steps: loss or gradients were not finite"))
    if "peak_bytes" in found:
        predicted = f", predicted {_gib(found['predicted_peak_bytes'])}" if "predicted_peak_bytes" in found else ""
        said.append(("memory", f"{_gib(found['peak_bytes'])} a rank at the most{predicted}"))
    if found.get("mixes"):
        said.append(("micro-batches", _mixes(found["mixes"])))
    if found.get("checkpoint"):
        said.append(("checkpoint", str(found["checkpoint"])))
    if found.get("folder"):
        said.append(("written", f"{found['folder']}: {', '.join(found.get('files', []))}"))
    return said


def duration(seconds: float) -> str:
    """`0:04` of minutes and seconds, `2:00:04` with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _values(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows if row.get(key) is not None]


def _predicted(row: Mapping[str, Any]) -> bool:
    return bool(row.get("predicted_s")) and "micro_batch_s" in row


def _weighted(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a share over the steps, each by its seconds; None where no row has it."""
    pairs = [(row[key], math.fsum(row["micro_batch_s"])) for row in rows if key in row and "micro_batch_s" in row]
    seconds = math.fsum(s for _, s in pairs)
    return math.fsum(share * s for share, s in pairs) / seconds if seconds > 0 else None


def _steps(found: Mapping[str, Any]) -> str:
    before = f", {found['steps_before']:,} of them before it was started again" if found.get("steps_before") else ""
    return f"{found['steps_done']:,} of {found['steps']:,}{before}"


def _speed(found: Mapping[str, Any]) -> str:
    text = f"{found['tokens_per_s_median']:,.0f} tokens/s"
    if "tflops_per_s_median" in found:
        text += f", {found['tflops_per_s_median']:.3g} TFLOP/s a rank"
    if "mfu_median" in found:
        text += f", MFU {found['mfu_median']:.1%}"
    return f"{text} (medians)"


def _unused(found: Mapping[str, Any]) -> str:
    parts = [f"ranks without tokens {found['unused_share']:.1%}"] if "unused_share" in found else []
    parts += [f"gathers beside {found['gather_share']:.1%}"] if "gather_share" in found else []
    return f" ({'; '.join(parts)})" if parts else ""


def _mixes(found: list[Mapping[str, Any]]) -> str:
    shown = ", ".join(f"{each['degrees']} {each['share']:.0%}" for each in found[:MOST_MIXES])
    more = len(found) - MOST_MIXES
    return f"{shown}, {more} other mixes" if more > 0 else shown


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
