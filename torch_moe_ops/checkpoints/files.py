"""name -> tensor: the safetensors files of a checkpoint, mapped into memory and read one tensor or expert at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..meta_kernels._check import refuse

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors under `path`: one .safetensors file, or a directory of them, with or without an index.

    Opening reads names alone. Files are opened when a tensor of theirs is first read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        self._file_of = self._find_tensors()

    def names(self, prefix: str = "") -> list[str]:
        """The names that begin with `prefix`, sorted."""
        return sorted(name for name in self._file_of if name.startswith(prefix))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        with self._named_errors(name):
            return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or its element `index` along the first dimension."""
        with self._named_errors(name):
            return self._open(self._file_of[name]).get_tensor(name) if index is None else self._slice(name)[index]

    def _slice(self, name: str) -> Any:  # noqa: ANN401  (safetensors has no public type for it)
        return self._open(self._file_of[name]).get_slice(name)

    def _find_tensors(self) -> dict[str, str]:
        index = self.path / INDEX
        if index.is_file():
            try:
                file_of = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                refuse("Checkpoint", str(index), "JSON with a weight_map", f"{type(error).__name__}: {error}")
            for file in set(file_of.values()):
                if Path(file).is_absolute() or ".." in Path(file).parts:
                    refuse("Checkpoint", str(index), "files of its directory", file)
            return file_of
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            refuse("Checkpoint", "path", "a .safetensors file or a directory with some", self.path)
        file_of = {}
        for file in files:
            for name in self._open(file.name).keys():
                if name in file_of:
                    refuse("Checkpoint", name, "a tensor in one file", f"{file_of[name]} and {file.name}")
                file_of[name] = file.name
        return file_of

    def _open(self, file_name: str) -> Any:  # noqa: ANN401
        if file_name not in self._files:
            from safetensors import SafetensorError, safe_open  # here: the ops do without it

            folder = self.path.parent if self.path.is_file() else self.path
            if not (folder / file_name).is_file():
                refuse("Checkpoint", "path", f"the file {file_name}, which the index names", "none")
            try:
                self._files[file_name] = safe_open(folder / file_name, framework="pt")
            except SafetensorError as error:  # cut short, or a pointer of Git LFS
                refuse("Checkpoint", str(folder / file_name), "a complete safetensors file", error)
        return self._files[file_name]

    @contextmanager
    def _named_errors(self, name: str) -> Iterator[None]:
        from safetensors import SafetensorError

        if name not in self:
            refuse("Checkpoint", "name", f"a tensor of {self.path}", name)
        try:
            yield
        except SafetensorError as error:
            refuse("Checkpoint", f"{self._file_of[name]}: {name}", "a tensor, which the index names", error)
