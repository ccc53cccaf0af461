"""Checkpoints as safetensors and JSON: exact resume after a kill, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn


def save_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    meta: dict[str, Any] | None = None,
) -> None:
    """Writes one file atomically: module weights, optimiser state, JSON metadata.

    Raises ``OSError`` where the disk is full; the checkpoint before stays.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{k}": v for k, v in module.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"opt/{i}/{index}/{k}": torch.as_tensor(v) for k, v in state.items()}
    # tied weights share memory, which safetensors refuses; a checkpoint may hold them twice
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # one name: a killed process leaves no more than one
    try:
        part.write_bytes(save(tensors, metadata={"meta": json.dumps(meta or {})}))
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata alone. Raises ``ValueError`` for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get("meta", "{}")))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path.name} cannot be read ({error}); delete it") from error


def load_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> dict[str, Any]:
    """Restores in place and returns the metadata.

    Raises ``ValueError`` for a file that is damaged or belongs to other modules.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path.name} cannot be read ({error}); delete it") from error
    meta = read_meta(path)
    for name, module in modules.items():
        prefix = f"module/{name}/"
        state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"checkpoint {path.name} does not fit module {name!r}: {reason}"
            ) from error
    for i, optimizer in enumerate(optimizers):
        state_dict = optimizer.state_dict()
        state_dict["state"] = _optimizer_state(tensors, f"opt/{i}/")
        optimizer.load_state_dict(state_dict)
    return meta


def _optimizer_state(tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key[len(prefix) :].split("/", 1)
            state.setdefault(int(index), {})[name] = value
    return state
