"""The signed description that travels with a segment.

``hmac = HMAC-SHA256(deployment key, canonical JSON of every other field)``: whoever lacks the key
can neither alter a segment nor pass off one of another policy. The manifest holds sizes, digests
and names, never token ids or text.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from lcguard.canonical import canonical_hmac, canonical_json
from lcguard.custom_categories import CategoryName
from lcguard.rule import Rule

if TYPE_CHECKING:
    from torch import Tensor

_DOMAIN = b"lcguard manifest\0"
_SIDE_BY_SIDE_BYTES = 1 << 20


class SegmentError(ValueError):
    """A segment that must not be used. Names what was found and what was expected, in one line."""


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over the bytes of a tensor in row-major order, hexadecimal."""
    import torch  # here: what only reads manifests needs no torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _digests(keys: Tensor, values: Tensor) -> tuple[str, str]:
    """Of both, large ones side by side: hashing holds no lock. A pool of the moment, as the
    threads of one that stays would be missing in a forked process."""
    if keys.nbytes < _SIDE_BY_SIDE_BYTES:
        return tensor_digest(keys), tensor_digest(values)
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(tensor_digest, values)
        return tensor_digest(keys), other.result()


def utc_now() -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


Name = Annotated[str, Field(max_length=256, pattern=r"^[\x21-\x7e]*$")]
"""A short identifier without spaces, so that no text travels in it."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OptionalDigest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Count = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorDigests(_Frozen):
    """SHA-256 over the bytes of each tensor."""

    keys: Digest
    values: Digest

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> TensorDigests:
        of_keys, of_values = _digests(keys, values)
        return cls(keys=of_keys, values=of_values)

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Raises ``SegmentError`` unless the tensors have these digests."""
        both = _digests(keys, values)
        for name, found, said in zip(
            ("keys", "values"), both, (self.keys, self.values), strict=True
        ):
            if found != said:
                raise SegmentError(
                    f"{name}: SHA-256 is {found[:12]}, the manifest says {said[:12]}"
                )


class Lineage(_Frozen):
    """What restricts what is published on top of a segment (``lcguard.handoff.lineage``).

    Not shown to its audience."""

    forbid: tuple[CategoryName, ...]
    """What it was guarded against: its edge's rule and that of all it stands on."""
    derive: tuple[CategoryName, ...] = ()
    """Of these, whose derived value may pass."""
    origins: tuple[Name, ...]
    """Agents whose text it stands on, its source among them; sorted."""
    raw: bool = False
    """Its guard hides nothing, whatever the rule says."""
    custom: dict[CategoryName, Digest] = {}
    """Of the forbidden categories that the policy defined itself, the definitions that were looked
    for: one that has changed since was not guarded against."""

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As before there were own categories, where there is none."""
        out: dict[str, Any] = dump(self)
        if not self.custom:
            del out["custom"]
        return out

    @property
    def rule(self) -> Rule:
        return Rule(self.forbid, self.derive)


class Manifest(_Frozen):
    """Everything a receiver must know, or verify, about a segment.

    No field is computed from the raw segment but its size: a figure of it without the guard's
    noise, such as the share of what was withheld, tells whoever guesses the text that the guess is
    right. Digests are of the guarded tensors.
    """

    format_version: Literal[2] = 2
    model_id: Annotated[Name, Field(min_length=1)]
    revision: Name
    """Of the weights."""
    config_digest: Digest
    rope: dict[str, JsonValue]
    """``Rotary.describe()``."""
    n_tokens: Count
    n_layers: Count
    n_kv_heads: Count
    head_dim: Count
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    source_agent: Name
    edge: Name
    hop: Annotated[int, Field(ge=0)]
    """0 at the agent that read the text."""
    policy_digest: OptionalDigest
    """Empty where no policy was applied."""
    guard_digest: OptionalDigest
    """Empty where no guard was applied."""
    tensor_digests: TensorDigests
    draw: OptionalDigest = ""
    """Names the noise, by a secret of the deployment: segments of one draw tell together what the
    longest of them tells, other draws add up. Empty where there is no noise."""
    created_at: str
    """ISO 8601, UTC."""
    handle: Annotated[str, Field(pattern=r"^([A-Za-z0-9_-]{16,128})?$")] = ""
    """The name under which a store keeps it: signed, so that two segments cannot change places.
    Empty outside a store."""
    audience: Name = ""
    """The agent that may consume it; empty outside a store."""
    expires_at_s: Annotated[int, Field(ge=0)] = 0
    """Unix time after which the handle is dead; 0: never."""
    lineage: Lineage | None = None
    """None where nobody knows: then nothing is published on top of it."""
    hmac: OptionalDigest = ""
    """Empty until signed."""

    @field_validator("created_at")
    @classmethod
    def _utc(cls, text: str) -> str:
        if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", text):
            raise ValueError(f"created_at={text!r} is not YYYY-MM-DDTHH:MM:SS+00:00")
        datetime.fromisoformat(text)
        return text

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(L, H, T, D)`` of keys and of values."""
        return self.n_layers, self.n_kv_heads, self.n_tokens, self.head_dim

    def encode(self) -> bytes:
        """Canonical JSON: the only spelling that ``decode`` accepts."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """The manifest of ``encode``. Raises ``SegmentError`` for any other bytes."""
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "JSON"
            raise SegmentError(f"manifest: {where}: {first['msg']}") from None
        if manifest.encode() != data:
            raise SegmentError("manifest: its bytes are not the canonical JSON of its content")
        return manifest

    def sign(self, key: bytes) -> Manifest:
        """The same manifest with its HMAC under ``key``."""
        return self.model_copy(update={"hmac": self._mac(key)})

    def verify(self, key: bytes) -> None:
        """Raises ``SegmentError`` unless this manifest was signed with ``key``.

        The right HMAC is not shown: a message that held it would sign a forgery.
        """
        if not hmac.compare_digest(self.hmac, self._mac(key)):
            print_ = hashlib.sha256(b"lcguard key id\0" + key).hexdigest()[:8]
            raise SegmentError(
                f"manifest: HMAC {self.hmac[:12] or '(unsigned)'} was not made by this deployment's"
                f" key (fingerprint {print_}): another key, or altered"
            )

    def check(self, key: bytes, *expected: Mapping[str, object]) -> None:
        """Raises ``SegmentError`` unless ``key`` signed this and every expected field agrees.

        Costs no tensor bytes: a scheduler can call it before any tensor is read.

        Args:
            expected: manifest fields and the values that they must have; those of a model are
                ``lcguard.model_digest.model_fields``.
        """
        self.verify(key)
        for name, value in (item for fields in expected for item in fields.items()):
            if name not in type(self).model_fields:
                raise ValueError(f"expect[{name!r}] is no manifest field")
            found = getattr(self, name)
            if found != value:
                raise SegmentError(f"{name}: the segment has {found!r}, expected {value!r}")

    def _mac(self, key: bytes) -> str:
        rest = self.model_dump(mode="json", exclude={"hmac"})
        return canonical_hmac(key, _DOMAIN, rest)
