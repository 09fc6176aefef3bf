"""Reads the pickled parts of a checkpoint with a list of what they may name; torch unpickles them without one.

A pickle may name any function of any module, and reading it calls that function. These are the three places where
torch and upstream read one: the table of contents (``.metadata``), every value that is no tensor, and inside of those
the data position of each rank.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torchtitan.experiments.lighthouse.errors import Refused

_METADATA = "torch.distributed.checkpoint.metadata"

#: What a table of contents names beside torch's dtypes: classes of plain fields, whose construction does nothing.
TABLE_OF_CONTENTS = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (_METADATA, "TensorProperties"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


class Unsafe(Refused):
    """A checkpoint names something that no checkpoint needs."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str, allowed: set[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(data))
        self._where, self._allowed = where, allowed

    def find_class(self, module: str, name: str) -> Any:
        # Only these exact names: a dotted one would reach into a class, or into another module.
        if (module, name) in self._allowed:
            return super().find_class(module, name)
        if self._allowed and module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise Unsafe(
            f"{self._where} names {module}.{name}, which no checkpoint needs: loading it could run a program, so it "
            "was not loaded. Use only checkpoints whose origin you trust (docs/reliability.md)"
        )


def unpickle(data: bytes, where: str, allowed: set[tuple[str, str]] | None = None) -> Any:
    """What ``data`` holds, as ``pickle.loads`` gives it.

    Args:
        where: for the error.
        allowed: module and name of what it may name (default: nothing, so numbers, text, lists and the like).

    Raises:
        Unsafe: if it names something else.
        Exception: of many kinds, for damaged data.
    """
    return _Unpickler(data, where, allowed or set()).load()


class AllowListReader(FileSystemReader):
    """torch's reader, the table of contents excepted."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self._get_metadata_path(kwargs.get("rank")))
        metadata = unpickle(file.read_bytes(), str(file), TABLE_OF_CONTENTS)
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{file} holds no table of contents")
        meta = getattr(metadata, "storage_meta", None) or StorageMeta()  # older versions of torch had none
        meta.load_id = self.load_id
        metadata.storage_meta = meta
        return metadata


class AllowListPlanner(DefaultLoadPlanner):
    """torch's planner, the values that are no tensors excepted."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise Unsafe(
                f"{name} in the checkpoint is no plain data: loading it could run a program, so it was not loaded. Use "
                "only checkpoints whose origin you trust (docs/reliability.md)"
            ) from error
        if name.startswith("dataloader.") and isinstance(plain, bytes):
            # Upstream unpickles it once more.
            plain = pickle.dumps(unpickle(plain, f"{name} in the checkpoint"))
        # What the parent reads, without a list, are our bytes.
        ours = io.BytesIO()
        torch.save(plain, ours)
        ours.seek(0)
        super().load_bytes(read_item, ours)
