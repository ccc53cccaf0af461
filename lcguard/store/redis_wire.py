"""What goes to a Redis server and back: names, values, two atomic steps, and what errors mean."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lcguard.manifest import Manifest, SegmentError
from lcguard.store.base import check_own, tensor_bytes

INDEX = "lcguard:index"
VALUE_BYTES = 512 * 2**20
"""The largest value a server takes (proto-max-bulk-len)."""
MANIFEST_BYTES = 2**20
"""No manifest is longer; what is was not written here, and is not read to its end."""
RETIRED = b"retired"
"""A manifest's value under which nothing may be put."""
_MAX_LAYERS = 4096
"""Of an unverified manifest, which may claim any number."""

# KEYS: manifest, chunks. ARGV: manifest's value, expiry in ms of Unix time or 0.
# 1: committed, also by an earlier try whose answer was lost; 0: handle taken; -1: chunks are gone.
COMMIT = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return 1 end
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return -1 end
end
if ARGV[2] == '0' then
  redis.call('SET', KEYS[1], ARGV[1], 'NX')
  for i = 2, #KEYS do redis.call('PERSIST', KEYS[i]) end
else
  redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PXAT', ARGV[2])
  for i = 2, #KEYS do redis.call('PEXPIREAT', KEYS[i], ARGV[2]) end
end
return 1
"""

# KEYS: one of its own. ARGV: a value, its life in ms. Whether it was written, read and deleted.
CHECK = """
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local same = redis.call('GET', KEYS[1]) == ARGV[1]
return (redis.call('UNLINK', KEYS[1]) == 1 and same) and 1 or 0
"""

# KEYS: manifest, chunks. ARGV: manifest's value. 1 where the manifest was this one.
REMOVE = """
local found = redis.call('GET', KEYS[1]) == ARGV[1]
if found then redis.call('UNLINK', KEYS[1]) end
for i = 2, #KEYS do redis.call('UNLINK', KEYS[i]) end
return found and 1 or 0
"""


def prefix(handle: str) -> str:
    """What the names of all values of a segment begin with."""
    # The braces make a cluster keep all of a segment on one node.
    return f"lcguard:{{{handle}}}:"


def manifest_key(handle: str) -> str:
    return f"{prefix(handle)}manifest"


def chunk_keys(manifest: Manifest, raw: bytes) -> list[str]:
    """Of the keys of every layer, then of the values."""
    start = f"{prefix(manifest.handle)}{raw[:32].decode()}"
    return [f"{start}:{kind}:{i}" for kind in "kv" for i in range(manifest.n_layers)]


def decode(raw: bytes, handle: str) -> Manifest:
    """The manifest in a manifest's value, not yet verified.

    Raises:
        SegmentError: other bytes, or the manifest of another handle.
    """
    if not re.fullmatch(rb"[0-9a-f]{32}\n", raw[:33]):
        raise SegmentError(f"{handle}: the manifest's value does not begin with a nonce")
    manifest = Manifest.decode(raw[33:])
    if manifest.n_layers > _MAX_LAYERS:
        raise SegmentError(f"{handle}: n_layers={manifest.n_layers}, at most {_MAX_LAYERS}")
    check_own(manifest, handle)
    return manifest


def chunk_bytes(manifest: Manifest) -> int:
    """Of the keys, or of the values, of one layer."""
    return tensor_bytes(manifest) // (2 * manifest.n_layers)


def layer_bytes(layer: Tensor) -> bytes:
    """Bit for bit, in row-major order."""
    flat = layer.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def fill(layer: Tensor, data: bytes) -> None:
    """Writes what ``layer_bytes`` gave into a contiguous tensor of the same size."""
    layer.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def explain(error: Exception, errors: Any, password: str) -> str:
    """One line for an error of the module ``errors`` (``redis.exceptions``), without secrets."""
    if isinstance(error, errors.OutOfMemoryError):
        return "is out of memory: raise its maxmemory, or sweep"
    if isinstance(error, errors.AuthenticationError):
        return "refuses the login: check user and password in the store's URL"
    if isinstance(error, errors.TimeoutError):
        return "did not answer in time: is it overloaded?"
    if isinstance(error, errors.ConnectionError):
        return "is not reachable: is it running, and are host and port right?"
    if isinstance(error, errors.ReadOnlyError):
        return "is a read-only replica: name its primary in the store's URL"
    text = " ".join(str(error).split())
    if password and password in text:
        text = type(error).__name__
    return f"refuses: {text[:120]}: check its configuration and this user's rights"
