"""How fast is text tokenized into a store, and how fast is a store opened that is there?

    python benchmarks/data.py [--output FILE.json]

Trains a byte-level BPE of 8,192 entries on a part of the Python standard library, writes the library's files as rows
of a JSONL file, and builds a token store of them in the rank itself, with one thread and with the tokenizer's own, and
in two workers. Then a store of a million short rows is built and opened. Times are the least of `ROUNDS`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flexsp import jsonfields
from flexsp.data import DataOptions, open_corpus
from flexsp.data.formats import PART_BYTES

ROUNDS = 1
ROWS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "data.json"))
    output = Path(parser.parse_args().output)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text_bytes = write_text(folder)
        rows = [
            {"what": what, **built(folder / "text.jsonl", folder, text_bytes, **options)}
            for what, options in {
                "python-stdlib as bytes": {},
                "BPE, the rank itself, one thread": {"tokenizer": str(folder / "bpe"), "threads": False},
                "BPE, the rank itself": {"tokenizer": str(folder / "bpe")},
                "BPE, 2 workers": {"tokenizer": str(folder / "bpe"), "workers": 2},
            }.items()
        ]
        million = million_rows(folder)
    document = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores", "date": str(datetime.date.today()),
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__,
                     "transformers": transformers.__version__},
        "text_bytes": text_bytes, "part_bytes": PART_BYTES, "rounds": ROUNDS,
        "load_average_at_the_end": os.getloadavg()[0], "tokenizing": rows, "a_million_rows": million,
    }  # fmt: skip
    jsonfields.write_object(output, document)


def write_text(folder: Path) -> int:
    """The library as rows, twice so that there are several shards, and the tokenizer; returns bytes of text."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            texts.append(path.read_bytes().decode("utf-8", errors="replace"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::10], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "bpe")
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for copy in range(2):
            for text in texts:
                file.write(json.dumps({"text": f"{copy} {text}"}) + "\n")
    return sum(len(text.encode()) + 2 for text in texts) * 2


def built(path: Path, folder: Path, text_bytes: int, threads: bool = True, **options: object) -> dict[str, float]:
    """Seconds to build and to open the store of a source."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
    source = str(path) if options else "python-stdlib"
    build_s, open_s = [], []
    for _ in range(ROUNDS):
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        chosen = DataOptions(cache_dir=str(cache), **options)  # type: ignore[arg-type]
        began = time.perf_counter()
        corpus = open_corpus(source, chosen)
        build_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        open_corpus(source, chosen)
        open_s.append(time.perf_counter() - began)
    print(options, f"{min(build_s):.1f} s, opened in {min(open_s):.3f} s", flush=True)
    size = text_bytes if options else int(corpus.lengths.sum())
    return {
        "documents": len(corpus.lengths), "tokens": int(corpus.lengths.sum()), "build_s": min(build_s),
        "mb_per_s": size / 1e6 / min(build_s), "open_s": min(open_s), "store_bytes": stored_bytes(cache),
    }  # fmt: skip


def million_rows(folder: Path) -> dict[str, float]:
    """Seconds to build and open a store of many rows, and to read documents of it at random."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(2.5, 0.8, ROWS).astype(int) + 1, 2000)
    tokens = draw.integers(0, 32_000, int(lengths.sum())).tolist()
    ends = np.cumsum(lengths).tolist()
    with open(folder / "ids.jsonl", "w", encoding="utf-8") as file:
        for start, end in zip([0, *ends], ends, strict=False):
            file.write(json.dumps({"input_ids": tokens[start:end]}) + "\n")
    options = DataOptions(cache_dir=str(folder / "million"))
    began = time.perf_counter()
    corpus = open_corpus(str(folder / "ids.jsonl"), options)
    build_s = time.perf_counter() - began
    open_s = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        corpus = open_corpus(str(folder / "ids.jsonl"), options)
        open_s.append(time.perf_counter() - began)
    wanted = draw.integers(0, ROWS, 10_000).tolist()
    began = time.perf_counter()
    for document in wanted:
        corpus.read(document, 0, int(corpus.lengths[document]))
    read_s = (time.perf_counter() - began) / len(wanted)
    return {
        "documents": ROWS, "tokens": int(lengths.sum()), "file_bytes": (folder / "ids.jsonl").stat().st_size,
        "store_bytes": stored_bytes(folder / "million"), "shards": len(list((folder / "million/shards").glob("*/*"))),
        "build_s": build_s, "open_s": min(open_s), "read_a_document_s": read_s,
    }  # fmt: skip


def stored_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "shards").rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
