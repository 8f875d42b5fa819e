"""Reading what torch.distributed.checkpoint wrote as data: nothing in a file is executed.

torch reads tensors with `weights_only`, but unpickles the list of what there is (`.metadata`) and every value that is
no tensor without it, and a pickle may call anything. Here the list may name the classes that such lists are made of,
and no more; the values are read with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
}
"""Beside the classes of `MODULES`, and torch's dtypes."""


class SafeReader(FileSystemReader):
    """`FileSystemReader` that takes from `.metadata` only what describes tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as stream:
            metadata = _Unpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f".metadata holds {type(metadata).__name__} instead of Metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """`DefaultLoadPlanner` that reads values which are no tensors, learning rates say, with `weights_only`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        plain = io.BytesIO()
        torch.save(loaded, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _memory_format(kind: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 pickle a member of an enumeration by, `getattr`, for the only one that is here."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"getattr of {kind!r} has no place in a checkpoint's list of tensors")
    return _MEM_FORMAT_ENCODING[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        found = super().find_class(module, name) if module in MODULES or (module, name) in NAMES else None
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            found = getattr(torch, name)
        if found is None or (module in MODULES and not isinstance(found, type) and (module, name) not in NAMES):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's list of tensors")
        return found
