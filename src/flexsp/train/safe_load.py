"""Writing with digests, and reading what torch.distributed.checkpoint wrote as data: nothing in a file is executed.

torch reads tensors with `weights_only`, but unpickles the list of what there is (`.metadata`) and every value that is
no tensor without it, and a pickle may call anything. Here the list may name the classes that such lists are made of,
and no more; the values are read with `weights_only`. Files are compared with the digests that were written beside them,
and the list may name no file outside the folder.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flexsp.train.digests import STATE, check_digests, write_digests

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
PLAIN = re.compile(r"[A-Za-z0-9_]+\.distcp")
"""Names of files of tensors: no path leads out of the folder."""


class DigestWriter(_FileSystemWriter):
    """`FileSystemWriter` that writes the digests of a rank's files beside them, where it writes: not in the step."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future = super().write_data(plan, planner)
        names = {result.storage_data.relative_path for result in future.wait()}
        write_digests(Path(self.path), names, f"__{dist.get_rank()}")
        return future


class SafeReader(FileSystemReader):
    """`FileSystemReader` that takes from `.metadata` only what describes tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as stream:
            metadata = _Unpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f".metadata holds {type(metadata).__name__} instead of Metadata")
        for info in metadata.storage_data.values():
            if not isinstance(info, _StorageInfo) or not PLAIN.fullmatch(str(info.relative_path)):
                raise ValueError(
                    f".metadata names {getattr(info, 'relative_path', info)!r:.80}, no file of the checkpoint"
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Compares the digests of this rank's share of the files; torch tells all ranks what one raises here."""
        needed = {".metadata", STATE, *(info.relative_path for info in metadata.storage_data.values())}
        check_digests(Path(self.path), sorted(needed), dist.get_rank(), dist.get_world_size())
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)


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
