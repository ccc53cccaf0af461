"""Builds the connector's parts from a ``VllmConfig``."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from lcguard.cache import kv_shape
from lcguard.categories import CATEGORIES
from lcguard.guards import FrozenGuard, GuardModule, KVShape, guard_class
from lcguard.guards.frozen import GuardError, saved_class
from lcguard.handoff.gatekeeper import Gatekeeper
from lcguard.handoff.keys import deployment_key
from lcguard.handoff.plan import ModelFacts
from lcguard.model_digest import checkpoint_digest, config_digest
from lcguard.rope import Rotary
from lcguard.store import SegmentStore, StoreError, open_store
from lcguard.vllm.errors import StartError
from lcguard.vllm.settings import PLAIN, Settings, policy_of, read_settings
from lcguard.vllm.weights import loaded_folder


def settings_of(config: Any) -> Settings:
    """The connector's settings in a ``VllmConfig``. Raises ``StartError``."""
    return read_settings(config.kv_transfer_config.kv_connector_extra_config or {})


@lru_cache(maxsize=4)
def digest_of(folder: Path) -> str:
    """Digest of a folder's weights, which are read once. Raises ``ModelFolderError``."""
    return checkpoint_digest(folder)


def weights_digest(config: Any) -> str:
    """Digest of the weights that a ``VllmConfig`` loads. Raises ``StartError``."""
    try:
        model = config.model_config
        return digest_of(loaded_folder(config.load_config, str(model.model), model.revision))
    except ValueError as error:
        raise StartError(str(error)) from None


def _neutral(model: Any, placeholder: int) -> int:
    """The letter X, as where guards are measured: a model has read it, and copies it where it is
    asked for what it hides. After a padding token, which it never read, it says anything."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model)
    found = [] if tokenizer is None else tokenizer.encode("X", add_special_tokens=False)
    return int(found[-1]) if found else placeholder


def facts_of(config: Any, settings: Settings) -> ModelFacts:
    """The model's facts. Raises ``StartError`` for token ids outside its vocabulary."""
    model, text = config.model_config, config.model_config.hf_text_config
    served = model.served_model_name
    name = served[0] if isinstance(served, list) else served
    placeholder = settings.placeholder_id
    if placeholder is None:
        ends = getattr(text, "pad_token_id", None), getattr(text, "eos_token_id", None)
        found = next((i for i in ends if i is not None), 0)
        placeholder = int(found[0] if isinstance(found, list) else found)
    neutral = _neutral(model, placeholder) if settings.neutral_id is None else settings.neutral_id
    for key, value in (("placeholder_id", placeholder), ("neutral_id", neutral)):
        if not 0 <= value < model.get_vocab_size():
            raise StartError(
                f"{key}={value} is no token: the vocabulary has {model.get_vocab_size()}"
            )
    return ModelFacts(
        # a folder's name, not where it lies
        model_id="_".join(Path(str(name or model.model)).name.split()) or "model",
        revision=weights_digest(config),
        config_digest=config_digest(text),
        rope=Rotary.from_config(text).describe(),
        placeholder_id=placeholder,
        neutral_id=neutral,
        max_model_len=int(model.max_model_len),
    )


def store_of(settings: Settings, one_process: bool) -> SegmentStore:
    """Opens the store. Raises ``StartError`` for one that scheduler and workers would not share."""
    try:
        store = open_store(
            settings.store, max_bytes=settings.store_max_bytes, timeout_s=settings.store_timeout_s
        )
    except (StoreError, ValueError) as error:
        raise StartError(f"store {settings.store.split('@')[-1]!r}: {error}") from None
    if not store.shared and not one_process:
        raise StartError(
            f"store {settings.store!r} lives in one process, this engine has several: use "
            "file:///... or redis://..., or VLLM_ENABLE_V1_MULTIPROCESSING=0"
        )
    return store


def key_of() -> bytes:
    """The deployment key. Raises ``StartError`` without ``LCGUARD_KEY``."""
    try:
        return deployment_key()
    except ValueError as error:
        raise StartError(str(error)) from None


def guard_names(settings: Settings) -> list[str]:
    """Guards that an edge may name."""
    return sorted({*PLAIN, *settings.guards})


def guard_classes(settings: Settings) -> dict[str, type[GuardModule]]:
    """What kinds of guards the settings name. Raises ``StartError``."""
    try:
        return {n: saved_class(at) for n, at in settings.guards.items()}
    except GuardError as error:
        raise StartError(f"guards: {error}") from None


def guards_of(config: Any, settings: Settings, facts: ModelFacts) -> dict[str, FrozenGuard]:
    """All guards, each made for this model's weights. Raises ``StartError``."""
    shape = kv_shape(config.model_config.hf_text_config)
    out = {}
    for name in guard_names(settings):
        if name in settings.guards:
            out[name] = saved_guard_for(config, facts, name, settings.guards[name])
        else:
            module = guard_class(name).build(KVShape(*shape), len(CATEGORIES), {})
            out[name] = FrozenGuard(module)
    return out


def saved_guard_for(config: Any, facts: ModelFacts, name: str, path: str) -> FrozenGuard:
    """The guard that policies call ``name``, made for the engine's model. Raises ``StartError``."""
    return saved_guard(name, path, facts.revision, kv_shape(config.model_config.hf_text_config))


def saved_guard(
    name: str, path: str, model_digest: str | None, shape: tuple[int, int, int]
) -> FrozenGuard:
    """The guard that policies call ``name``, made for a model of this shape and these weights;
    None: they are not known yet. Raises ``StartError``."""
    try:
        guard = FrozenGuard.from_pretrained(path, model_digest=model_digest, shape=shape)
        _check_twin(guard.module)
    except ValueError as error:  # also a name that is not shipped
        raise StartError(f"guards.{name}: {error}") from None
    return guard


def _check_twin(module: GuardModule) -> None:
    """Raises ``GuardError`` for one that sends the KV of a prompt that the engine cannot make."""
    if not module.needs_twin:
        return
    if not module.finds_secrets:
        # the engine holds the raw prompt's KV alone: passed on as the twin, it leaks
        raise GuardError(
            f"{module.name!r} sends the KV of a prompt that only its publisher can make: name the "
            "built-in guard 'redact' instead"
        )
    if module.placeholder != "neutral":
        raise GuardError(
            f"its placeholder {module.placeholder!r} changes a segment's length, which vLLM keeps: "
            "save it with placeholder neutral, or use it on transformers"
        )


def gatekeeper_of(config: Any, one_process: bool) -> Gatekeeper:
    """The gatekeeper of an engine or of its front end. Raises ``StartError``."""
    settings = settings_of(config)
    classes = guard_classes(settings)
    finders = [n for n, cls in classes.items() if cls.finds_secrets]
    return Gatekeeper(
        facts_of(config, settings),
        policy_of(settings, ["redact", *finders]),
        guard_names(settings),
        store_of(settings, one_process),
        key_of(),
        proxy_only=settings.proxy_only,
        policy_guards=[n for n, cls in classes.items() if cls.reads_policy],
        finders=finders,
    )
