"""Writing with digests, and reading what torch.distributed.checkpoint wrote as data: nothing in a file is executed.

torch reads tensors with `weights_only`, but unpickles the list of what there is (`.metadata`) and every value that is
no tensor without it, and a pickle may call anything. Here the list may name the classes that such lists are made of,
each by its name, and no more; the values are read with `weights_only`. Files are compared with the digests that were
written beside them, and the list may name no file outside the folder.

What is wrong with the files is `Damaged`. Whatever else a rank meets, memory that runs out or a disk that does not
answer, says nothing about them and passes through.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flexsp.disk import sync
from flexsp.train.digests import MISSING, STATE, Damaged, check_digests, write_digests

METADATA = "torch.distributed.checkpoint.metadata"
NAMES = {
    (METADATA, "Metadata"),
    (METADATA, "MetadataIndex"),
    (METADATA, "TensorStorageMetadata"),
    (METADATA, "BytesStorageMetadata"),
    (METADATA, "ChunkStorageMetadata"),
    (METADATA, "TensorProperties"),
    (METADATA, "StorageMeta"),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
}
"""All that a list is made of, beside torch's dtypes and layouts."""
PLAIN = re.compile(r"[A-Za-z0-9_]+\.distcp")
"""Names of files of tensors: no path leads out of the folder."""
UNREADABLE = ("PytorchStreamReader", "Invalid magic number", "unexpected EOF", "storage has wrong", "Expected hmac")
"""What torch says in a RuntimeError of bytes that are no tensor."""


class DigestWriter(_FileSystemWriter):
    """`FileSystemWriter` that writes the digests of a rank's files beside them, and names the whole.

    It does so where it writes, not in the step: what must lie on the disk before a name says so is waited for here.
    """

    def __init__(self, part: Path, final: Path, logs: Iterable[Path] = ()) -> None:
        """
        Args:
            part: the folder that is written to; state.json is there.
            final: its name once it is whole.
            logs: files outside of it whose rows so far must lie on the disk before it has that name, if they are there.
        """
        super().__init__(part)
        self._part, self._final, self._logs = part, final, logs

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future = super().write_data(plan, planner)
        names = {result.storage_data.relative_path for result in future.wait()}
        write_digests(self._part, names, f"__{dist.get_rank()}")
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, once all have written."""
        super().finish(metadata, results)
        sync(self._part / STATE)
        write_digests(self._part, (".metadata", STATE), "state")
        for log in filter(Path.exists, self._logs):
            sync(log)
            sync(log.parent)
        sync(self._part)
        os.replace(self._part, self._final)
        sync(self._final.parent)


class SafeReader(FileSystemReader):
    """`FileSystemReader` that takes from `.metadata` only what describes tensors."""

    def __init__(self, path: str | Path, checked: bool = False) -> None:
        """
        Args:
            path: the checkpoint's folder.
            checked: whether its digests have been compared already; reading all of it takes as long as loading.
        """
        super().__init__(path)
        self._checked = checked
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read once: torch would say its own words where it meets what is wrong."""
        if self._metadata is None:
            self._metadata = self._read_metadata()
        return self._metadata

    def _read_metadata(self) -> Metadata:
        try:
            with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as stream:
                metadata = _Unpickler(stream).load()
        except OSError as error:
            raise _of_file(error, ".metadata") from None
        except Exception as error:  # of a pickle's own kinds; MemoryError too, where a wrong length asks for it
            raise Damaged(f".metadata: {type(error).__name__}: {error}") from None
        if not isinstance(metadata, Metadata):
            raise Damaged(f".metadata holds {type(metadata).__name__} instead of Metadata")
        for part in (metadata.state_dict_metadata, metadata.storage_data):
            if not isinstance(part, dict):
                raise Damaged(f".metadata holds {type(part).__name__} instead of a dict of tensors")
        for info in metadata.storage_data.values():
            if not isinstance(info, _StorageInfo) or not PLAIN.fullmatch(str(info.relative_path)):
                raise Damaged(
                    f".metadata names {getattr(info, 'relative_path', info)!r:.80}, no file of the checkpoint"
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Compares the digests of this rank's share of the files; torch tells all ranks what one raises here."""
        if not self._checked:
            self.check(metadata)
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def check(self, metadata: Metadata) -> None:
        """Compares the digests of this rank's share of the files.

        Raises:
            Damaged: a file has changed, is missing or has no digest.
            OSError: the disk of this rank does not answer.
        """
        needed = {".metadata", STATE, *(info.relative_path for info in metadata.storage_data.values())}
        check_digests(Path(self.path), sorted(needed), dist.get_rank(), dist.get_world_size())

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except OSError as error:
            raise _of_file(error, Path(str(error.filename or self.path)).name) from None
        except (MemoryError, Damaged):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in UNREADABLE):
                raise  # of the device, or of memory
            raise Damaged(f"{type(error).__name__}: {error}") from None


class SafeLoadPlanner(DefaultLoadPlanner):
    """`DefaultLoadPlanner` that reads values which are no tensors, learning rates say, with `weights_only`."""

    def create_local_plan(self) -> LoadPlan:
        try:
            return super().create_local_plan()
        except MemoryError:
            raise
        except Exception as error:  # of many kinds, all of them about names and shapes: nothing has been read yet
            raise Damaged(f"{type(error).__name__}: {error}") from None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        plain = io.BytesIO()
        torch.save(loaded, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _of_file(error: OSError, name: str) -> Exception:
    """A file that is not there or no file is damage; a disk that does not answer is not."""
    return Damaged(f"{name}: {error.strerror}") if isinstance(error, MISSING) else error


def _memory_format(kind: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 pickle a member of an enumeration by, `getattr`, for the only one that is here."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"getattr of {kind!r} has no place in a checkpoint's list of tensors")
    return _MEM_FORMAT_ENCODING[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if (module, name) in NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's list of tensors")
