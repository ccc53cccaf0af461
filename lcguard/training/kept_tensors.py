"""Tensors that took long to compute, on disk: a job that was ended goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lcguard.atomic_file import replace_file
from lcguard.canonical import canonical_digest


class KeptTensors:
    """One file for each key, a JSON value that says what they were computed from.

    Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, of: object = None) -> None:
        """``of``: a part of every key, such as the model's digest."""
        self._folder, self._of = folder, of
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: object) -> Mapping[str, Tensor] | None:
        """None where nothing, or half a file of another program, is there."""
        if self._folder is None:
            return None
        try:
            return load_file(self._file(key))
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, key: object, tensors: Mapping[str, Tensor]) -> None:
        """Raises ``OSError`` where the disk is full."""
        if self._folder is not None:
            data = save({name: t.contiguous() for name, t in tensors.items()})
            replace_file(self._file(key), data)

    def _file(self, key: object) -> Path:
        assert self._folder is not None
        return self._folder / f"{canonical_digest([self._of, key])[:32]}.safetensors"
