"""The pickled files of a checkpoint, read without ever running what somebody put into them.

``.metadata`` is a pickle of a few classes of torch, and torch's own reader would call anything that
it names. Here only these classes can be named. ``common.pt`` and single objects are files of
torch.save, which torch reads safely when it is told to.
"""

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mmlm.checkpoint.patient import UnreachableFileError, read_patiently
from mmlm.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # of a name that is in a table of torch
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
"""What the metadata of torch and megatron-core consists of, beside dtypes."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which the metadata of a checkpoint has no use for"
            )
        return super().find_class(module, name)


def read_metadata_file(file: Path) -> Metadata:
    """Read the ``.metadata`` of a checkpoint.

    Raises:
        CheckpointError: when it is damaged, or names anything but what it consists of.
        UnreachableFileError: when it cannot be read for a reason that is not its own.
    """
    try:
        content = read_patiently(Path.read_bytes, file)
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    except UnreachableFileError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{file}: damaged, or not from a checkpoint: {error}") from error
    return metadata


def refuse_code(file: Path | str, content: bytes | None = None) -> None:
    """Make sure that a file of torch.save holds tensors and plain values, no code.

    Args:
        file: the file, or what to call it.
        content: what is in it; None to read the file.

    Raises:
        CheckpointError: when it is damaged or would run something.
        UnreachableFileError: when it cannot be read for a reason that is not its own.
    """

    def load(source: Path | BinaryIO) -> None:
        torch.load(source, map_location="cpu", weights_only=True)

    try:
        if content is None:
            read_patiently(load, Path(file))
        else:
            load(io.BytesIO(content))
    except UnreachableFileError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().splitlines() or [""]
        # torch's text goes on with how to switch the check off
        unsafe = [line.strip() for line in reason if "Unsupported" in line or "GLOBAL" in line]
        raise CheckpointError(
            f"{file}: damaged, or it holds something else than tensors and plain values: "
            f"{(unsafe or reason)[0]}"
        ) from error
