"""Data sets of Hugging Face `datasets`: folders that `save_to_disk` wrote, and sets by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from flexsp.data.encode import Encoder, choose_encoder
from flexsp.data.formats import BATCH_ROWS, PART_BYTES, Part, arrow_rows
from flexsp.data.options import DataOptions
from flexsp.data.rows import Row
from flexsp.data.sources import HUB, File, Piece, Stat, readable


class HubSet:
    """Rows of a data set, which `datasets` keeps as Arrow files."""

    def __init__(self, name: str, options: DataOptions) -> None:
        """`name`: `hf:NAME`, or a folder.

        Raises:
            ValueError: the package is missing, or it cannot load the set or its split.
        """
        self.name = name
        self.identity = f"{name if name.startswith(HUB) else os.path.abspath(name)} {options.subset} {options.split}"
        self._rows = _load(name, options)

    def files(self) -> list[File]:
        return [File(self.name, self.name)]

    def encoder(self, options: DataOptions, model_path: str) -> Encoder:
        return choose_encoder(options, self._rows.column_names, self.name, model_path)

    def stat(self, file: File) -> Stat:
        with readable(self.name):
            found = [os.stat(each["filename"]) for each in self._rows.cache_files]
        return len(self._rows), *(n for each in found for n in (each.st_size, each.st_mtime_ns, each.st_ctime_ns))

    def scan(self, file: File) -> list[Part]:
        num_rows = len(self._rows)
        each = max(1, PART_BYTES * num_rows // max(1, self._rows.data.nbytes))
        return [
            Part(_digest(self._rows[start : start + each]), start, min(start + each, num_rows), start)
            for start in range(0, num_rows, each)
        ]

    def pieces(self, scanned: Sequence[tuple[File, Stat, Sequence[Part]]]) -> list[Piece]:
        return [Piece(part.content, (file,), (part,), (stat,)) for file, stat, parts in scanned for part in parts]

    def read(self, piece: Piece, columns: Sequence[str]) -> Iterator[list[Row]]:
        (part,) = piece.parts
        rows = self._rows.select_columns([name for name in columns if name in self._rows.column_names])
        for start in range(part.start, part.stop, BATCH_ROWS):
            yield arrow_rows(rows[start : min(start + BATCH_ROWS, part.stop)])

    def describe(self, piece: Piece, row: int) -> str:
        return f"{self.name} row {piece.parts[0].first_row + row}"


def _load(name: str, options: DataOptions) -> Any:
    """The set with rows as Arrow tables."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: reading data sets needs datasets; pip install 'flexsp[datasets]'") from None
    try:
        if name.startswith(HUB):
            found = datasets.load_dataset(name.removeprefix(HUB), options.subset or None, split=options.split or None)
        else:
            found = datasets.load_from_disk(os.path.expanduser(name))
    except Exception as error:  # of the hub, of builders, of the file system
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: datasets cannot load it ({type(error).__name__}: {said}); correct data.source, data.subset or "
            f"data.split"
        ) from None
    if isinstance(found, dict):
        split = options.split or (next(iter(found)) if len(found) == 1 else "train")
        if split not in found:
            raise ValueError(f"{name}: data.split={options.split!r}: the splits are {', '.join(found)}; name one")
        return found[split].with_format("arrow")
    if options.split and not name.startswith(HUB):
        raise ValueError(f"{name}: data.split={options.split!r}: the folder holds one set without splits; leave it out")
    return found.with_format("arrow")


def _digest(table: Any) -> str:
    """Of the rows of an Arrow table, wherever they lie."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None).combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()
