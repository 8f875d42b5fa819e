"""What is simulated for docs/paper.md: models, context limits, corpora and sizes of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paper_claims as claims

from flexsp.batches import Overlong
from flexsp.distributions import lengths_of
from flexsp.lengths import LengthArray
from flexsp.profile import Profile
from flexsp.simulate.cases import Case, make_case

PROFILES = Path(__file__).parents[1] / "examples" / "profiles"
CORPORA = ("github", "commoncrawl", "wikipedia")
SWEPT = "commoncrawl"
"""The corpus of the paper's case study, scaling and ablation."""
K = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is simulated."""

    models: tuple[str, ...] = ("7b", "13b", "30b")
    contexts_k: tuple[int, ...] = (192, 384)
    batch_size: int = claims.BATCH_SIZE
    iterations: int = claims.ITERATIONS
    sweep_iterations: int = 30
    """Batches of each point of the scaling on up to 64 devices."""
    large_iterations: int = 6
    """The same on more devices, where batches are larger."""
    devices: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    devices_context_k: int = 128
    sweep_contexts_k: tuple[int, ...] = (64, 128, 192, 256, 384, 512)
    milp_batches: int = 3
    milp_limit_s: float = 8.0
    """For all MILPs of one batch."""
    drawn: int = 100_000
    """Lengths drawn from a named distribution."""
    seed: int = 0


QUICK = Settings(
    models=("7b",), batch_size=24, iterations=2, sweep_iterations=1, large_iterations=1, devices=(32, 128),
    sweep_contexts_k=(64, 512), milp_batches=1, milp_limit_s=0.5, drawn=2000,
)  # fmt: skip
"""Shows that everything runs; its figures mean nothing."""


def corpora(lengths: str | None, settings: Settings) -> dict[str, LengthArray]:
    """Lengths (tokens) by corpus: of the file `lengths`, else drawn from the distributions of the paper's corpora.

    Raises:
        ValueError: the file cannot be read.
    """
    texts = {Path(lengths).stem: lengths} if lengths else {name: name for name in CORPORA}
    return {
        name: lengths_of(text, column=None, count=settings.drawn, seed=settings.seed) for name, text in texts.items()
    }


def swept(names: Mapping[str, LengthArray]) -> str:
    """The corpus of case study, scaling and ablation."""
    return SWEPT if SWEPT in names else next(iter(names))


def model_profile(model: str, context_k: int) -> Profile:
    """The published profile of a model at a context limit.

    Published are 192K and 384K. They differ in model states alone, by the learned positions, whose number is the
    limit: between and beyond, model states follow that line, as they do in the published solver.
    """
    at_192, at_384 = (Profile.load(PROFILES / f"gpt-{model}-64xa100{suffix}.json") for suffix in ("", "-384k"))
    low, high = at_192.memory.model_state_bytes, at_384.memory.model_state_bytes
    states = low + (high - low) * (context_k - 192) / (384 - 192)
    name = f"gpt-{model} on 64 x A100-40GB, context up to {context_k}K"
    return replace(at_192, name=name, memory=replace(at_192.memory, model_state_bytes=states))


def with_fewer_activations(profile: Profile) -> Profile:
    """GPT-7B as the published solver plans it on 16 GPUs; seconds stay, as they do there."""
    memory = replace(profile.memory, activation_bytes_per_token=claims.ACTIVATION_BYTES_16)
    return replace(profile, name=f"{profile.name}, fewer activations", memory=memory)


def case_of(
    corpus: str,
    lengths: LengthArray,
    profile: Profile,
    context_k: int,
    settings: Settings,
    batch_size: int | None = None,
) -> Case:
    """Global batches as in the paper: sequences above the limit are left out.

    Raises:
        ValueError: no degree holds the limit, or the corpus is smaller than a batch.
    """
    return make_case(
        corpus,
        lengths,
        profile,
        batch_size=batch_size or settings.batch_size,
        max_length=context_k * K,
        overlong=Overlong.DROP,
        seed=settings.seed,
    )


def describe(lengths: LengthArray) -> dict[str, float]:
    """What of a corpus decides about the gain."""
    return {
        "sequences": len(lengths),
        "median_tokens": float(np.median(lengths)),
        "mean_tokens": float(lengths.mean()),
        "below_8k": float((lengths < 8 * K).mean()),
        "above_32k": float((lengths > 32 * K).mean()),
        "longest_tokens": int(lengths.max()),
    }
