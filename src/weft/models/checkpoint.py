"""The safetensors files of a Hugging Face folder: which tensor lies where, and reading some of them by memory map."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from weft.errors import CheckpointError
from weft.models.keys import read_object

if TYPE_CHECKING:
    from weft.models.shard import Cut

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READABLE = ("F32", "BF16", "F16")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file's header says of one tensor; dtype in safetensors' own letters."""

    file: Path
    shape: Shape
    dtype: str


class Checkpoint:
    """The tensors of one folder. Opening reads the headers only; no file stays open or mapped between calls."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for files that are missing, cut short or not safetensors."""
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        files, self._index = _find_files(folder)
        for file in files:
            self._read_header(file)
        for name, file in self._index.items():
            if name not in self.entries:
                raise CheckpointError(f"{file} lacks the tensor {name}, which {INDEX_FILE} says it holds")

    def _read_header(self, path: Path) -> None:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                if name in self.entries:
                    raise CheckpointError(f"{path} and {self.entries[name].file} both hold the tensor {name}")
                view = file.get_slice(name)
                self.entries[name] = Entry(path, tuple(view.get_shape()), view.get_dtype())

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def check(
        self, shapes: Mapping[str, Shape], optional: Iterable[str] = (), readable: Collection[str] = READABLE
    ) -> None:
        """Raise CheckpointError unless the tensors are those of `shapes`, of readable dtypes.

        `optional` may be absent. The rotary frequencies that old Llama checkpoints carry are passed over: they follow
        from the config.
        """
        where = self.folder / (INDEX_FILE if self._index else SINGLE_FILE)
        allowed = set(optional)
        if missing := [name for name in shapes if name not in self.entries and name not in allowed]:
            raise CheckpointError(f"{where} lacks {_some(missing)}, which config.json asks for")
        extra = [name for name in self.entries if name not in shapes and not name.endswith(".rotary_emb.inv_freq")]
        if extra:
            file = self.entries[extra[0]].file
            raise CheckpointError(f"{file} holds {_some(extra)}, which the model in config.json has no place for")
        for name, shape in shapes.items():
            entry = self.entries.get(name)
            if entry is None:
                continue
            if entry.shape != shape:
                raise CheckpointError(
                    f"{entry.file}: {name} has the shape {list(entry.shape)}; config.json asks for {list(shape)}"
                )
            if entry.dtype not in readable:
                words = _list([*readable])
                raise CheckpointError(f"{entry.file}: {name} has the dtype {entry.dtype}; weft reads {words}")

    def take_part(self, name: str, cut: Cut) -> torch.Tensor:
        """A part of a tensor, in its stored dtype; no more of the file is read."""
        entry = self.entries[name]
        with opened(entry.file) as file:
            return cut.read(file.get_slice(name), entry.shape)

    def take(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The named tensors, in their stored dtype; views of mappings that go when the last tensor of a file goes."""
        files: dict[Path, list[str]] = {}
        for name in names:
            files.setdefault(self.entries[name].file, []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for path, held in files.items():
            with opened(path) as file:
                tensors |= {name: cast(torch.Tensor, file.get_tensor(name)) for name in held}
        return tensors


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped. Raises CheckpointError naming it when it is missing, unreadable or broken."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        where = f": it is a link to {path.readlink()}" if path.is_symlink() else ""
        raise CheckpointError(f"{path} is missing{where}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut short or not a safetensors file: {error}") from error


def _find_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """(the files, tensor name -> file as the index has it; empty for a single file)."""
    single = folder / SINGLE_FILE
    if single.exists() or single.is_symlink():
        return [single], {}
    if (folder / INDEX_FILE).exists():
        index = _read_index(folder / INDEX_FILE)
        files = sorted(set(index.values()))
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{file} is missing, though {INDEX_FILE} names it")
        return files, index
    wanted = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        raise CheckpointError(
            f"{folder} has {_some(pickles)} and {wanted}; weft reads safetensors only, since loading a pickle runs code"
        )
    if others := [name for name in names if name.endswith(".safetensors")]:
        raise CheckpointError(f"{folder} has {_some(others)}, but {wanted}")
    raise CheckpointError(f"{folder} has no weights: {wanted} is there")


def _read_index(path: Path) -> dict[str, Path]:
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path} has no weight_map of tensor names to files")
    for name, file in names.items():
        # A name only: an index must not reach outside its folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(
                f"{path}: weight_map names the file {file!r} for {name}; it must be a plain name such as a.safetensors"
            )
    return {name: path.parent / file for name, file in names.items()}


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 3
    return _list(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
