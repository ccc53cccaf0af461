"""KVSegment: what crosses a hop. Un-rotated keys and values of a token range, with a manifest.

    segment = KVSegment.from_cache(cache, config, model_id="m", source_agent="a", edge="a>b")
    segment.save(folder, deployment_key())
    received = KVSegment.load(folder, deployment_key(), config=config, expect_guard=digest)
    cache = received.to_cache(config, suffix_tokens=64)

Loading verifies signature, model, rotation, expected fields and tensor digests before anything of
the segment is used. Whoever can write to the folder *after* verification can still change mapped
bytes: give ``load`` ``copy=True`` where the store is not trusted for that long.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig

from lcguard.cache import cache_to_kv, check_supported, check_window, kv_to_cache
from lcguard.manifest import (
    Lineage,
    Manifest,
    SegmentError,
    TensorDigests,
    utc_now,
)
from lcguard.model_digest import config_digest, model_fields
from lcguard.protocols import KVBatch
from lcguard.rope import Rotary
from lcguard.segment_folder import map_tensors, read_manifest, write_folder


@dataclass(frozen=True, eq=False)
class KVSegment:
    """Position-free KV of T tokens of one agent's context."""

    keys: Tensor
    """``[L, H, T, D]``, after the key norm and before rotation."""
    values: Tensor
    """``[L, H, T, D]``."""
    manifest: Manifest

    def __post_init__(self) -> None:
        expected = (self.manifest.shape, self.manifest.dtype)
        for name, tensor in (("keys", self.keys), ("values", self.values)):
            found = (tuple(tensor.shape), _dtype_name(tensor))
            if found != expected:
                raise SegmentError(f"{name}: found {found}, the manifest says {expected}")

    @classmethod
    def create(
        cls,
        keys: Tensor,
        values: Tensor,
        config: PretrainedConfig,
        *,
        model_id: str,
        revision: str = "",
        source_agent: str = "",
        edge: str = "",
        hop: int = 0,
        policy_digest: str = "",
        guard_digest: str = "",
        draw: str = "",
        handle: str = "",
        audience: str = "",
        expires_at_s: int = 0,
        lineage: Lineage | None = None,
    ) -> KVSegment:
        """A segment of un-rotated ``keys`` and ``values [L, H, T, D]`` of the model of ``config``.

        Raises:
            UnsupportedModelError: see ``check_supported``.
            ValueError: a field the manifest refuses.
        """
        check_supported(config)
        n_layers, n_heads, n_tokens, dim = keys.shape
        manifest = Manifest(
            model_id=model_id,
            revision=revision,
            config_digest=config_digest(config),
            rope=Rotary.from_config(config).describe(),
            n_tokens=n_tokens,
            n_layers=n_layers,
            n_kv_heads=n_heads,
            head_dim=dim,
            dtype=_dtype_name(keys),  # type: ignore[arg-type]  # pydantic checks the literal
            source_agent=source_agent,
            edge=edge,
            hop=hop,
            policy_digest=policy_digest,
            guard_digest=guard_digest,
            draw=draw,
            tensor_digests=TensorDigests.of(keys, values),
            created_at=utc_now(),
            handle=handle,
            audience=audience,
            expires_at_s=expires_at_s,
            lineage=lineage,
        )
        return cls(keys, values, manifest)

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        config: PretrainedConfig,
        *,
        row: int = 0,
        offset: int = 0,
        start: int = 0,
        stop: int | None = None,
        **fields: Any,
    ) -> KVSegment:
        """Entries ``start .. stop`` of record ``row``; entry 0 sits at position ``offset``.

        Un-rotates the whole batch: for many records call ``cache_to_kv`` once, then ``create``.
        ``fields`` are those of ``create``.

        Raises:
            UnsupportedModelError: see ``check_supported``, ``check_window`` and ``cache_to_kv``.
        """
        check_supported(config)
        # Later tokens were read through the window: no full-attention receiver would agree.
        check_window(config, cache.get_seq_length() if stop is None else stop)
        kv = cache_to_kv(cache, Rotary.from_config(config), offset, start=start, stop=stop)
        return cls.create(kv.keys[row], kv.values[row], config, **fields)

    def kv(self) -> KVBatch:
        """The segment as a batch of one record, for guards and attacks."""
        valid = torch.ones(1, self.manifest.n_tokens, dtype=torch.bool, device=self.keys.device)
        return KVBatch(self.keys[None], self.values[None], valid)

    def rewrite(self, keys: Tensor, values: Tensor, **changes: Any) -> KVSegment:
        """The same segment after a guard: new tensors, digests and time; unsigned.

        ``changes`` are manifest fields, such as ``guard_digest`` and ``policy_digest``.
        """
        computed = {"tensor_digests", "created_at", "hmac"}
        if unknown := set(changes) - (set(Manifest.model_fields) - computed):
            raise ValueError(f"{sorted(unknown)} cannot be changed: give other manifest fields")
        fields = dict(self.manifest) | {
            **changes,
            "tensor_digests": TensorDigests.of(keys, values),
            "created_at": utc_now(),
            "hmac": "",
        }
        return KVSegment(keys, values, Manifest(**fields))

    def sign(self, key: bytes) -> KVSegment:
        """The segment with a manifest signed with the deployment's ``key``."""
        return replace(self, manifest=self.manifest.sign(key))

    def to_cache(
        self, config: PretrainedConfig, offset: int = 0, suffix_tokens: int = 0
    ) -> DynamicCache:
        """A cache of one record with this segment at ``offset``; see ``segments_to_cache``."""
        return segments_to_cache([self], config, offset, suffix_tokens)

    def verify(
        self,
        key: bytes,
        *,
        config: PretrainedConfig | None = None,
        expect: Mapping[str, object] | None = None,
    ) -> None:
        """Raises ``SegmentError`` unless ``Manifest.check`` passes and the tensors are signed."""
        self.manifest.check(key, expect or {}, model_fields(config) if config else {})
        self.manifest.tensor_digests.check(self.keys, self.values)

    def save(self, folder: str | os.PathLike[str], key: bytes) -> KVSegment:
        """Signs and writes the segment to ``folder``, which must not exist. Returns it signed.

        Raises:
            SegmentError: the folder exists, or the tensors changed since the segment was made.
            OSError: the disk refuses; nothing is left behind.
        """
        signed = self.sign(key)
        signed.manifest.tensor_digests.check(self.keys, self.values)
        write_folder(Path(folder), self.keys, self.values, signed.manifest)
        return signed

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        key: bytes,
        *,
        config: PretrainedConfig | None = None,
        expect_model_digest: str | None = None,
        expect_guard: str | None = None,
        expect_policy: str | None = None,
        expect: Mapping[str, object] | None = None,
        copy: bool = False,
    ) -> KVSegment:
        """Reads and verifies a segment before anything of it is used.

        Args:
            config: the receiver's model; or give its ``expect_model_digest`` (``config_digest``).
            expect_guard, expect_policy: digests that must be in the manifest; None = any.
            expect: further manifest fields, such as ``{"model_id": ..., "edge": ...}``.
            copy: reads into memory before verifying, instead of mapping the file.

        Raises:
            SegmentError: a missing, truncated or altered file, another key or any mismatch.
            ValueError: neither ``config`` nor ``expect_model_digest``.
        """
        if config is None and expect_model_digest is None:
            raise ValueError("config and expect_model_digest are both None: give one of them")
        named = {
            "config_digest": expect_model_digest,
            "guard_digest": expect_guard,
            "policy_digest": expect_policy,
        }
        wanted = {k: v for k, v in named.items() if v is not None} | dict(expect or {})
        manifest = read_manifest(Path(folder))
        manifest.check(key, wanted, model_fields(config) if config else {})
        keys, values = map_tensors(Path(folder))
        if copy:
            keys, values = keys.clone(), values.clone()
        segment = cls(keys, values, manifest)
        manifest.tensor_digests.check(keys, values)
        return segment


def segments_to_cache(
    segments: Sequence[KVSegment],
    config: PretrainedConfig,
    offset: int = 0,
    suffix_tokens: int = 0,
) -> DynamicCache:
    """One cache, one record: the segments one behind the other, the first at ``offset``.

    Each segment was read without the others: the receiver attends to all, they do not to each
    other.

    Args:
        suffix_tokens: tokens the receiver will add, for the check of sliding windows.

    Raises:
        SegmentError: a segment of another model than ``config`` or than the first.
        UnsupportedModelError: see ``check_supported`` and ``check_window``.
    """
    if not segments:
        raise ValueError("no segments: give at least one")
    digest, first = config_digest(config), segments[0].manifest
    for index, segment in enumerate(segments):
        found = segment.manifest
        if found.config_digest != digest:
            raise SegmentError(
                f"segment {index}: config_digest {found.config_digest[:12]} of {found.model_id}, "
                f"the receiver's is {digest[:12]}"
            )
        for name in ("model_id", "revision", "dtype"):
            if getattr(found, name) != getattr(first, name):
                raise SegmentError(
                    f"segment {index}: {name}={getattr(found, name)!r}, "
                    f"segment 0 has {getattr(first, name)!r}"
                )
    parts = [segment.kv() for segment in segments]
    kv = KVBatch(
        torch.cat([part.keys for part in parts], -2),
        torch.cat([part.values for part in parts], -2),
        torch.cat([part.valid for part in parts], -1),
    )
    return kv_to_cache(kv, Rotary.from_config(config), config, offset, suffix_tokens)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
