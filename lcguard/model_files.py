"""Which files of a model folder are the model, and whether they are what they seem.

A folder may hold more than one model's weights: an adapter's, Mistral's own format, other
precisions. The weights are those that transformers loads; ``lcguard.vllm.weights`` sees to it that
vLLM loads no others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_JSON = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    INDEX,
)
_TEXT = ("merges.txt", "vocab.txt", "chat_template.jinja")
_BINARY = ("tokenizer.model", SINGLE)
_OTHER = "transformers_weights"
_POINTER = b"version https://git-lfs.github.com/spec/"
_SAVE = "save the model as safetensors with transformers' save_pretrained"

AS_TRANSFORMERS = {"load_format": "hf", "config_format": "hf"}
"""vLLM's options for folders that hold Mistral's own format besides: it prefers that one."""


class ModelFolderError(ValueError):
    """A folder whose model cannot be loaded; the message is one line with the file and the fix."""


def check_readable(folder: Path) -> None:
    """Looks at every file that a model is loaded from, before an engine starts on it.

    Raises ``ModelFolderError`` as ``check_texts`` and ``weight_files``, and for weights cut off.
    """
    check_texts(folder)
    stored_tensors(weight_files(folder))


def check_texts(folder: Path) -> None:
    """Raises ``ModelFolderError`` for a configuration that is missing, and for a text file that is
    a pointer of Git LFS, cut off or not UTF-8."""
    if not (folder / CONFIG).exists():
        weight_files(folder)  # says it where there are only others
        raise ModelFolderError(f"{folder} has no {CONFIG}: give a model's folder")
    for name in (*_JSON, *_TEXT, *_BINARY):
        _refuse_pointer(folder / name)
        if name in _JSON and (folder / name).exists():
            read_json(folder / name)
        if name in _TEXT and (folder / name).exists():
            _read(folder / name)


def check_weights(folder: Path) -> None:
    """Raises ``ModelFolderError`` for weights that no guard can be made for: packed (GPTQ, AWQ,
    ...), in no safetensors file, missing or cut off, or with an adapter beside them."""
    files = weight_files(folder)
    refuse_packed(read_json(folder / CONFIG), str(folder))
    if (folder / "adapter_config.json").exists():
        raise ModelFolderError(
            f"{folder} has an adapter beside the weights (adapter_config.json), which changes the "
            "KV: merge it into the weights, or move it away"
        )
    stored_tensors(files)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the model is loaded from, sorted: what transformers takes.

    Raises ``ModelFolderError`` where there are none, where one is missing, and where the
    configuration names others.
    """
    other = read_json(folder / CONFIG).get(_OTHER) if (folder / CONFIG).exists() else None
    if other not in (None, SINGLE, INDEX):
        raise ModelFolderError(
            f"{folder / CONFIG}: {_OTHER} = {other!r} is read by transformers alone: name the file "
            f"{SINGLE}"
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
            raise ModelFolderError(f"{folder / INDEX} has no weight_map: download it again")
        files = [folder / name for name in sorted(set(shards.values()))]
        missing = next((f for f in files if f.parent != folder or not f.is_file()), None)
        if missing is not None:
            raise ModelFolderError(f"{missing} is missing, {INDEX} names it: download it")
        return files
    for suffix, what in ((".gguf", "GGUF"), (".bin", "PyTorch"), (".pt", "PyTorch")):
        found = sorted(folder.glob(f"*{suffix}"))
        if found:
            raise ModelFolderError(f"{folder} has {what} weights alone ({found[0].name}): {_SAVE}")
    raise ModelFolderError(f"{folder} has no safetensors weights ({SINGLE} or {INDEX}): {_SAVE}")


def stored_tensors(files: list[Path]) -> dict[str, Path]:
    """Name of every tensor -> its file. Raises ``ModelFolderError`` for a damaged file, and for a
    tensor that stands in two: which one is loaded would be anybody's guess."""
    out: dict[str, Path] = {}
    for path in files:
        _refuse_pointer(path)
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(
                f"{path} is cut off or damaged ({_first_line(error)}): download it again"
            ) from None
        twice = next((name for name in names if name in out), None)
        if twice is not None:
            raise ModelFolderError(f"{twice} stands in {out[twice].name} and in {path}: keep one")
        out.update(dict.fromkeys(names, path))
    return out


def refuse_packed(config: dict[str, Any], name: str) -> None:
    """Raises ``ModelFolderError`` for a configuration with quantised weights."""
    packed = config.get("quantization_config")
    if packed is None:
        return
    method = packed.get("quant_method") if isinstance(packed, dict) else None
    raise ModelFolderError(
        f"{name} has packed weights (quant_method {method or 'unknown'}): guards are made on the "
        "model's own weights, so give the checkpoint that is not quantised"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``ModelFolderError`` where the file holds none."""
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFolderError):
            raise
        raise ModelFolderError(
            f"{path} is cut off or damaged ({error}): download it again"
        ) from None
    if not isinstance(found, dict):
        raise ModelFolderError(f"{path} is no JSON object: download it again")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelFolderError(
            f"{path} is not UTF-8 text (byte {error.start}): download it again"
        ) from None


def _refuse_pointer(path: Path) -> None:
    """A clone without Git LFS has a few lines of text in place of every large file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return
    if start == _POINTER:
        raise ModelFolderError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull`")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
