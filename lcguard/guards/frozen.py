"""A guard as it is applied: weights that no longer change, and a card that says what they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lcguard.atomic_file import replaced_folder
from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardError as GuardError
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.passage import Passage, StartedTokens, Tokens
from lcguard.guards.shipped import CARD, guard_folder
from lcguard.model_digest import add_tensor
from lcguard.nearest import unknown
from lcguard.noise import new_noise_key
from lcguard.protocols import Guarded, KVBatch, Mask
from lcguard.records import mask_of
from lcguard.rule import Rule

WEIGHTS = "guard.safetensors"
FORMAT = 1


class Card(BaseModel):
    """What a guard is, for which model, and what was measured of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    guard: str
    options: dict[str, Any]
    shape: tuple[int, int, int]
    """(L, H, D) of the model's KV."""
    categories: tuple[str, ...] = CATEGORIES
    model_id: str = ""
    model_digest: str = ""
    """Digest of the base model's weights: a guard serves one revision."""
    claim: str = ""
    against: str = "the receiving agent, who knows these weights and fits fresh attackers"
    certificate: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    weights_sha256: str = ""


class FrozenGuard:
    """Implements ``protocols.Guard``. Never trains; noise is a function of the keys alone."""

    def __init__(self, module: GuardModule, card: Card | None = None) -> None:
        self.module = module.eval().requires_grad_(False)
        self.name = module.name
        self.needs_twin = module.needs_twin
        self.keeps_later = module.keeps_later
        self.placeholder: str = module.placeholder
        self.card = card or Card(
            guard=module.name,
            options=module.options(),
            shape=(*module.shape,),
            claim=module.claim,
        )

    @property
    def digest(self) -> str:
        """Identifies guard, options, model and weights in a segment's manifest."""
        same = self.card.model_dump(
            include={"format", "guard", "options", "shape", "categories", "model_digest"},
            mode="json",
        )
        same["weights"] = weights_digest(self.module)
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    def marks(self, kv: KVBatch, mask: Mask) -> Tensor | None:
        """See ``GuardModule.marks``."""
        return self.module.marks(kv, mask)

    def _modules(self) -> Iterator[GuardModule]:
        return (m for m in self.module.modules() if isinstance(m, GuardModule))

    def is_noisy(self, forbids: bool) -> bool:
        """Whether two draws of a segment differ; ``forbids``: whether its policy hides anything."""
        return any(m.config.noise > 0 and (forbids or not m.reads_policy) for m in self._modules())

    @property
    def keeps_tokens(self) -> bool:
        """Whether each row of what is sent is one token's: not where tokens change places."""
        return not any(m.locks for m in self._modules())

    def opened(self, kv: KVBatch) -> KVBatch:
        """What an entitled audience reads: a guard for the wire alone is undone with its key."""
        return self.module.unlock(kv)

    @torch.no_grad()
    def __call__(
        self,
        kv: KVBatch,
        mask: Mask | None = None,
        *,
        forbid: Sequence[str] | None = None,
        derive: Sequence[str] = (),
        keys: Sequence[bytes] | None = None,
        twin: KVBatch | None = None,
    ) -> Guarded:
        """Rewrites a batch of segments.

        Args:
            mask: what is forbidden of each segment; or give ``forbid`` and ``derive`` for all.
            forbid: categories to hide; None hides all of them.
            derive: forbidden categories whose derived value (a band) may pass.
            keys: where noise comes from, one a segment; a fresh secret one each where None.
            twin: for guards with ``needs_twin``, KV of the text without what is forbidden.

        Raises ``GuardError`` for KV of another shape, unknown categories, a missing twin or output
        that is not finite: a failed guard never lets raw KV through.
        """
        if mask is None:
            mask = _same_mask(len(kv), CATEGORIES if forbid is None else forbid, derive)
        elif forbid is not None or derive:
            raise GuardError("mask and forbid both say what to hide: give one")
        self._check(_shape(kv), len(kv), mask)
        if self.needs_twin:
            if twin is None:
                raise self._no_twin()
            if len(twin) != len(kv):
                raise GuardError(f"{len(twin)} twins for {len(kv)} segments")
            if _shape(twin) != _shape(kv):
                raise GuardError(
                    f"twin of shape {tuple(twin.keys.shape)} is not KV of the model that made "
                    f"{tuple(kv.keys.shape)}"
                )
            try:
                kv = self.module.start(kv, twin)
            except ValueError as error:
                raise GuardError(str(error)) from error
        if keys is None:
            keys = [new_noise_key() for _ in range(len(kv))]
        out, rewrite = self.module(kv, mask, keys)
        if not bool(torch.isfinite(out.keys).all() and torch.isfinite(out.values).all()):
            raise GuardError(f"guard {self.name!r} gave values that are not finite; withheld")
        return Guarded(out, rewrite.withheld)

    def passage(
        self,
        tokens: Tokens,
        mask: Mask,
        *,
        twin: Tokens | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Passage:
        """The way of one segment through the guard, some tokens at a time, to KV of ``dtype``.

        Raises as a call does, and the passage too.
        """
        if type(self).__call__ is not FrozenGuard.__call__:
            raise GuardError(f"guard {self.name!r} has a call of its own: override passage too")
        self._check(tokens.shape, 1, mask)
        if self.needs_twin:
            if twin is None:
                raise self._no_twin()
            tokens = StartedTokens(self.module, tokens, twin)
        return Passage(self.module, tokens, mask, dtype)

    def _check(self, shape: tuple[int, int, int], n: int, mask: Mask) -> None:
        """Raises ``GuardError`` for ``n`` segments of another shape, or a mask that does not fit
        them."""
        if shape != tuple(self.module.shape):
            raise GuardError(
                f"guard {self.name!r} is for KV of (layers, heads, dim) "
                f"{tuple(self.module.shape)}, the segment has {shape}; "
                "load the guard made for this model"
            )
        if mask.forbid.shape != (n, self.module.n_categories):
            raise GuardError(
                f"mask of shape {tuple(mask.forbid.shape)} does not fit {n} segments and "
                f"{self.module.n_categories} categories"
            )

    def _no_twin(self) -> GuardError:
        return GuardError(f"guard {self.name!r} sends the twin's KV; prefill it and pass twin=...")

    def with_card(self, **changes: Any) -> FrozenGuard:
        """The same guard with changed card entries."""
        return FrozenGuard(self.module, self.card.model_copy(update=changes))

    def with_options(self, **options: Any) -> FrozenGuard:
        """The same weights with another ``placeholder``: of a saved guard the only choice that
        leaves true what its card says.

        Raises ``GuardError`` for another option, and for a guard without placeholders.
        """
        known = self.module.options()
        if wrong := sorted(k for k in options if k != "placeholder" or k not in known):
            what = "its placeholder" if "placeholder" in known else "nothing"
            raise GuardError(
                f"guard {self.name!r} is loaded with its own options, of which {what} can be "
                f"chosen: leave out {', '.join(wrong)}"
            )
        changed = self.card.model_copy(update={"options": known | options})
        module = _build(changed)
        module.load_state_dict(self.module.state_dict())
        return FrozenGuard(module, changed)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes card and weights atomically; an existing guard folder is replaced whole."""
        target = Path(folder).resolve()
        if target.exists() and not _replaceable(target):
            raise GuardError(f"{target.name} exists and is no guard's folder; give a new one")
        with replaced_folder(target) as part:
            state = {k: v.detach().cpu().contiguous() for k, v in self.module.state_dict().items()}
            (part / WEIGHTS).write_bytes(save(state))
            card = self.card.model_copy(
                update={"weights_sha256": hashlib.sha256((part / WEIGHTS).read_bytes()).hexdigest()}
            )
            (part / CARD).write_text(card.model_dump_json(indent=1) + "\n")
            part.chmod(0o755)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        model_digest: str | None = None,
        shape: tuple[int, int, int] | None = None,
        revision: str | None = None,
    ) -> FrozenGuard:
        """Loads a folder, a shipped guard (``nano:gate``) or a Hugging Face repository.

        Raises ``GuardError`` in one line for a missing, damaged or foreign guard.
        """
        folder = _find(str(name_or_path), revision)
        card = _read_card(folder)
        if card.format != FORMAT:
            raise GuardError(f"{folder.name} has format {card.format}, this release reads {FORMAT}")
        if model_digest is not None and card.model_digest != model_digest:
            raise GuardError(
                f"guard {card.guard!r} in {folder.name} was made for model weights "
                f"{card.model_digest[:12] or 'unknown'}, this model has {model_digest[:12]}; "
                "train a guard for this model and revision"
            )
        if shape is not None and tuple(shape) != card.shape:
            raise GuardError(
                f"guard {card.guard!r} is for KV shape {card.shape}, the model has {tuple(shape)}"
            )
        if card.categories != CATEGORIES:
            raise GuardError(
                f"guard {card.guard!r} knows categories {card.categories}, this release has "
                f"{CATEGORIES}; train it again"
            )
        module = _build(card)
        try:
            raw = (folder / WEIGHTS).read_bytes()
            digest = hashlib.sha256(raw).hexdigest()
            if digest != card.weights_sha256:
                raise GuardError(
                    f"{folder.name}/{WEIGHTS} has sha256 {digest[:12]}, its card says "
                    f"{card.weights_sha256[:12]}; the file was altered or cut"
                )
            module.load_state_dict(load(raw))
        except (OSError, SafetensorError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise GuardError(f"{folder.name}/{WEIGHTS} cannot be used: {first}") from error
        return cls(module, card)


def read_card(name_or_path: str | os.PathLike[str]) -> Card:
    """The card alone of what ``from_pretrained`` loads. Raises ``GuardError``."""
    return _read_card(_find(str(name_or_path), None))


def _shape(kv: KVBatch) -> tuple[int, int, int]:
    """``(L, H, D)``."""
    _, layers, heads, _, dim = kv.keys.shape
    return layers, heads, dim


def _same_mask(n: int, forbid: Sequence[str], derive: Sequence[str]) -> Mask:
    for name in (*forbid, *derive):
        if name not in CATEGORIES:
            raise GuardError(unknown("category", name, CATEGORIES))
    rule = Rule(Rule.hiding(forbid).forbid, Rule.hiding(derive).forbid)
    return mask_of([rule] * n)


def saved_class(name_or_path: str | os.PathLike[str]) -> type[GuardModule]:
    """What kind of guard is saved there, by its card alone. Raises ``GuardError``."""
    card = read_card(name_or_path)
    try:
        return guard_class(card.guard)
    except ValueError as error:
        raise GuardError(f"{CARD}: {error}") from error


def finders(guards: Mapping[str, str]) -> frozenset[str]:
    """Names of guards that leave out what they are told: ``redact``, and those of ``guards`` (name
    to folder, repository or ``MODEL:NAME``) that look for secrets. Raises ``GuardError``."""
    return frozenset({"redact", *(n for n, at in guards.items() if saved_class(at).finds_secrets)})


def _build(card: Card) -> GuardModule:
    try:
        cls = guard_class(card.guard)
        return cls.build(KVShape(*card.shape), len(card.categories), card.options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise GuardError(f"{CARD}: {str(error).splitlines()[0]}") from error


def _replaceable(target: Path) -> bool:
    """A guard's folder or an empty one; anything else is not ours to delete."""
    return target.is_dir() and ((target / CARD).is_file() or not any(target.iterdir()))


def _read_card(folder: Path) -> Card:
    try:
        return Card.model_validate_json((folder / CARD).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise GuardError(f"{folder.name} has no readable {CARD}; give a guard's folder") from error
    except ValidationError as error:
        e = error.errors()[0]
        where = ".".join(map(str, e["loc"]))
        raise GuardError(f"{folder.name}/{CARD}: {where}: {e['msg']}") from error


def _find(name: str, revision: str | None) -> Path:
    folder = Path(guard_folder(name))
    if folder.is_dir():
        return folder
    # a repository is OWNER/NAME: nothing else is worth asking the hub for
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise GuardError(f"guard {name!r} is not a folder; give a guard's folder or repository")
    return _download(name, revision)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[CARD, WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0]
        raise GuardError(
            f"guard {repo!r} is no folder here, and as a hub repository: {first}"
        ) from error


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over the names and bytes of all tensors of a module."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        add_tensor(sha, name, tensor)
    return sha.hexdigest()
