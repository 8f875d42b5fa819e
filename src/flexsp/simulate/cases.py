"""What is simulated: a corpus's global batches, on a number of devices, under a context limit."""

from __future__ import annotations

from dataclasses import dataclass

from flexsp.batches import Overlong, Touched, global_batch, limit_lengths
from flexsp.lengths import LengthArray
from flexsp.planner.static import static_degree
from flexsp.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Global batches, and what they run on."""

    corpus: str
    profile: Profile
    """As planners see it: under one activation policy, or without any."""
    whole: Profile
    """The same with all its policies: what plans are judged by, a file's too."""
    policy: str | None
    """The policy of `whole` that all of `profile` is under; named in every micro-batch of the plans."""
    lengths: LengthArray
    """(n,) tokens of the corpus's sequences, after the context limit."""
    max_length: int
    """The context limit in tokens: what the baseline must hold."""
    static_sp_degree: int
    """The baseline's degree."""
    batch_size: int
    seed: int | None
    """Of the order of the data, which is that of `flexsp train`; None: the lengths are one batch as they are."""
    touched: Touched
    """What the context limit did to the corpus."""

    def batch(self, step: int) -> LengthArray:
        """(batch_size,) tokens of the sequences of a step."""
        if self.seed is None:
            return self.lengths
        return self.lengths[global_batch(len(self.lengths), self.batch_size, self.seed, step)]


def make_case(
    corpus: str,
    lengths: LengthArray,
    profile: Profile,
    *,
    batch_size: int | None,
    max_length: int | None = None,
    overlong: Overlong = Overlong.ERROR,
    seed: int = 0,
    static_sp_degree: int | None = None,
    policy: str | None = None,
    whole: Profile | None = None,
) -> Case:
    """The case of a corpus of documents of (n,) `lengths` tokens.

    Args:
        corpus: what to call it.
        lengths: tokens of each document.
        profile: the model and the cluster, as planners see them.
        batch_size: sequences of a global batch; None: all of `lengths` are one batch, in their order.
        max_length: the context limit in tokens; None: the longest sequence.
        overlong: what to do with longer ones.
        seed: of the order of the data.
        static_sp_degree: the baseline's degree; None: the least that holds the context limit.
        policy: the policy that `profile` is under; see `flexsp.planner.policies.under_policy`.
        whole: the profile with its policies; None: `profile` is that.

    Raises:
        ValueError: the limit refuses a document or leaves none, no degree holds it, or there are fewer sequences than a
            batch has.
    """
    limit = max_length or int(lengths.max())
    slices, touched = limit_lengths(lengths, limit, overlong, corpus, lambda index: f"{corpus}[{index}]")
    if batch_size is not None and batch_size > len(slices.lengths):
        raise ValueError(
            f"batch_size={batch_size} is above the {len(slices.lengths)} sequences of {corpus}; lower it or give more "
            f"lengths"
        )
    return Case(
        corpus=corpus,
        profile=profile,
        whole=whole or profile,
        policy=policy,
        lengths=slices.lengths,
        max_length=limit,
        static_sp_degree=_baseline_degree(profile, limit, static_sp_degree),
        batch_size=batch_size or len(slices.lengths),
        seed=None if batch_size is None else seed,
        touched=touched,
    )


def _baseline_degree(profile: Profile, max_length: int, asked: int | None) -> int:
    if asked is None:
        return static_degree(profile, max_length)
    if asked not in profile.sp_degrees:
        raise ValueError(f"sp_degree={asked} must be one of sp_degrees={list(profile.sp_degrees)}; choose one of them")
    if (capacity := profile.capacity_tokens(asked)) < max_length:
        raise ValueError(
            f"sp_degree={asked} holds {capacity} tokens, below the context limit of {max_length}; choose a higher "
            f"degree or lower the limit"
        )
    return asked
