"""From the configuration to the sequences of a run."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from flexsp.data import Corpus, Overlong, Sequences, TokenStore, apply_context_limit, hold_out, open_corpus
from flexsp.data.held_out import Documents
from flexsp.data.options import SKIP
from flexsp.data.rows import NOT_BROKEN, Reason
from flexsp.data.sequences import without_unlabelled
from flexsp.parallel.control import PATIENCE
from flexsp.track import Track, silent
from flexsp.train.config import Config, DataConfig

log = logging.getLogger(__name__)


def open_on_all_ranks(config: Config, track: Track = silent) -> TokenStore:
    """The corpus, the same on every rank. A collective that lasts as long as tokenizing does.

    Args:
        config: of the run.
        track: shows how far it is.

    Raises:
        ValueError: on all ranks alike: what the first of them found wrong, or that they see different data.
    """
    # its own group: the ranks of one node may be ready hours before those of another
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    corpus, said = None, ("", "")
    try:
        corpus = open_corpus(
            config.data.source,
            config.data,
            model_path=config.model.path,
            track=track,
            patient=dist.get_rank() != 0,
        )
        said = corpus.fingerprint, ""
    except ValueError as error:
        said = "", str(error)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, said, group=patient)
    dist.destroy_process_group(patient)
    for _, error_text in every:
        if error_text:
            raise ValueError(error_text)
    other = [rank for rank, (fingerprint, _) in enumerate(every) if fingerprint != every[0][0]]
    if other:
        raise ValueError(
            f"data.source={config.data.source!r}: ranks {other} see other tokens than rank 0; give all nodes the same "
            f"files and the same tokenizer"
        )
    assert corpus is not None
    for reason, (count, first) in corpus.left_out.items():
        if reason != Reason.EMPTY:
            why = "nothing would be learnt from them" if reason in NOT_BROKEN else "data.on_broken='skip'"
            log.info("data: %d rows left out: %s (the first: %s); %s", count, reason, first, why)
    return corpus


def build_sequences(config: Config, corpus: Corpus, held_out: bool = False) -> Sequences:
    """The sequences of a corpus under the context limit; says what that touched.

    Args:
        config: of the run.
        corpus: the whole.
        held_out: those of the documents that are kept from training, instead of the others'.

    Raises:
        ValueError: nothing is left.
    """
    if config.data.held_out:
        corpus = hold_out(corpus, config.data.held_out, config.train.seed)[held_out]
    sequences, touched = apply_context_limit(corpus, config.data.max_length, Overlong(config.data.overlong))
    sequences, unlabelled = without_unlabelled(sequences)
    log.info(
        "data: %s: %d documents, %s tokens, the longest %s; %d empty ones left out",
        corpus.name, len(corpus.lengths), f"{int(corpus.lengths.sum()):,}", f"{int(corpus.lengths.max()):,}",
        corpus.num_empty,
    )  # fmt: skip
    fate = "dropped" if config.data.overlong == Overlong.DROP else "split, none of their tokens lost"
    log.info(
        "data: %d documents of %s tokens exceed max_length=%d: %s; %d sequences of %s tokens remain",
        touched.documents, f"{touched.tokens:,}", config.data.max_length, fate, len(sequences.lengths),
        f"{int(sequences.lengths.sum()):,}",
    )  # fmt: skip
    if unlabelled:
        what = "of one token, or pieces of split documents without a label"
        log.info("data: %d sequences left out, %s: nothing would be learnt from them", unlabelled, what)
    return sequences


def check_fit(model: PreTrainedModel, sequences: Sequences, data: DataConfig) -> Sequences:
    """The sequences that the model can take: all, or those within its vocabulary where broken rows are left out.

    Raises:
        ValueError: token ids beyond the vocabulary where that is an error, or positions beyond the model's.
    """
    config, max_length = model.config.get_text_config(), data.max_length
    sequences = _within_vocabulary(sequences, config.vocab_size, data)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"data.max_length={max_length} exceeds max_position_embeddings={positions} of the model; lower the one or "
            f"set model.config.max_position_embeddings"
        )
    return sequences


def _within_vocabulary(sequences: Sequences, vocab_size: int, data: DataConfig) -> Sequences:
    corpus = sequences.corpus
    largest = corpus.largest if isinstance(corpus, TokenStore | Documents) else None
    if largest is None or not (beyond := largest >= vocab_size).any():
        return sequences
    worst = int(largest.argmax())
    if data.on_broken != SKIP:
        raise ValueError(
            f"{corpus.describe(worst)}: token id {largest[worst]} is beyond vocab_size={vocab_size}, as are ids of "
            f"{beyond.sum()} of {len(beyond)} documents; tokenize for this model, set data.on_broken='skip' to leave "
            f"them out, or without model.path set model.config.vocab_size to at least {largest[worst] + 1}"
        )
    kept = ~beyond[sequences.documents]
    log.info(
        "data: %d documents left out: token ids beyond vocab_size=%d (the first: %s); data.on_broken='skip'",
        beyond.sum(), vocab_size, corpus.describe(int(beyond.argmax())),
    )  # fmt: skip
    if not kept.any():
        raise ValueError(f"{corpus.name}: no document is within vocab_size={vocab_size}; tokenize for this model")
    return Sequences(
        corpus=corpus,
        documents=sequences.documents[kept],
        offsets=sequences.offsets[kept],
        lengths=sequences.lengths[kept],
    )
