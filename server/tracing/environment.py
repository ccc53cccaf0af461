"""Tracing as OpenTelemetry's own environment variables ask for it, and by no option of ours.

``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` turns it on;
``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``,
``OTEL_EXPORTER_OTLP_HEADERS`` and the others are read by the SDK itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcguard import __version__
from lcguard.server.tracing.spans import Traced, Tracing, Untraced

_ON = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOL = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTER = "OTEL_TRACES_EXPORTER"
_HTTP = "http/protobuf"


def asked_by(environment: Mapping[str, str]) -> str:
    """Which variable asks for traces; empty: none does, or another switches them off."""
    set_ = _set(environment)
    named = next((name for name in _ON if name in set_), "")
    exporter = set_.get(_EXPORTER, "otlp" if named else "none")
    if exporter == "none" or set_.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    return named or _EXPORTER


def open_tracing(environment: Mapping[str, str]) -> Tracing:
    """Spans for the collector that the environment names, or none.

    Raises ``ValueError`` for what cannot be served: the extra ``otel`` is missing, or another
    protocol or exporter is asked for.
    """
    asked, set_ = asked_by(environment), _set(environment)
    if not asked:
        return Untraced()
    exporter = set_.get(_EXPORTER, "otlp")
    if exporter != "otlp":
        raise ValueError(f"{_EXPORTER}={exporter!r}: write otlp, or none for no traces")
    protocol = next((set_[name] for name in _PROTOCOL if name in set_), _HTTP)
    if protocol != _HTTP:
        raise ValueError(f"{protocol!r} is no protocol for traces here: collectors take {_HTTP}")
    try:
        return Traced(_provider())
    except ImportError:
        raise ValueError(
            f"{asked} asks for traces: pip install 'lcguard[otel]', or set OTEL_SDK_DISABLED=true"
        ) from None


def _set(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that say something: an empty one is as good as none."""
    return {k: v.strip() for k, v in environment.items() if k.startswith("OTEL_") and v.strip()}


def _provider() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = {"service.version": __version__}
    if "service.name" not in OTELResourceDetector().detect().attributes:
        own["service.name"] = "lcguard"
    provider = TracerProvider(resource=Resource.create(own))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
