"""The OpenAPI document: the generating routes by hand, because they are plain ASGI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from lcguard.server.gateway.contract_fields import FIELDS, PATHS
from lcguard.server.gateway.handoff_field import CONSUME_HEADER, FIELD, PUBLISH_HEADER, HandoffField

_ERRORS = {
    400: "A field that is unknown, refused or malformed; the message names it and the fix.",
    401: "No key, or none that is valid now.",
    403: "The key, the policy, a budget or a closed edge forbids it.",
    404: "No such segment or model.",
    408: "The body came too slowly.",
    409: "A segment is damaged.",
    413: "The body or the request is too large.",
    415: "Not JSON.",
    429: "Too many requests; see Retry-After.",
    502: "vLLM cannot be reached, broke off, or stored something else than was ordered.",
    503: "Not ready, or nobody can tell whether it may happen; see Retry-After.",
    504: "vLLM was silent for too long.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_REQUIRED = {"chat": ["messages"], "completions": ["prompt"], "responses": ["input"]}


def openapi(app: FastAPI) -> dict[str, Any]:
    """The document of all routes."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        parts = made.setdefault("components", {})
        schemas = parts.setdefault("schemas", {})
        schema = HandoffField.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas["HandoffField"], schemas["Error"] = schema, _ERROR
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for endpoint, path in PATHS.items():
            made["paths"][path] = {"post": _generating(endpoint)}
        for path, item in made["paths"].items():
            for operation in item.values():
                _finish(operation, open_to_all=path in ("/livez", "/readyz", "/metrics"))
        app.openapi_schema = made
    return app.openapi_schema


def _generating(endpoint: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {name: {} for name in FIELDS[endpoint]}
    properties |= {
        "model": {"type": ["string", "null"]},
        "max_output_tokens" if endpoint == "responses" else "max_tokens": {
            "type": ["integer", "null"],
            "minimum": 0,
        },
        "stream": {"type": ["boolean", "null"]},
        FIELD: {"$ref": "#/components/schemas/HandoffField"},
    }
    if endpoint == "chat":
        properties["messages"] = {"type": "array", "items": {"type": "object"}}
    elif endpoint == "responses":
        properties["input"] = {"type": ["string", "array"]}
    else:
        properties["prompt"] = {"type": ["string", "array"]}
    headers = (
        (PUBLISH_HEADER, "Audience, or several with commas between; stands for lcguard.publish."),
        (CONSUME_HEADER, "Handles with commas between; stands for lcguard.consume."),
    )
    return {
        "tags": ["openai"],
        "operationId": f"create_{endpoint}",
        "summary": "As OpenAI's, with a handoff in the field lcguard.",
        "parameters": [
            {
                "name": n,
                "in": "header",
                "required": False,
                "description": d,
                "schema": {"type": "string"},
            }
            for n, d in headers
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": _REQUIRED[endpoint],
                        "properties": properties,
                        "additionalProperties": False,
                    }
                }
            },
        },
        "responses": {
            "200": {
                "description": "vLLM's answer; `lcguard` in it says what was applied.",
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            }
        },
    }


def _finish(operation: dict[str, Any], open_to_all: bool) -> None:
    """Errors and keys, the same everywhere."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers = operation["responses"]
    answers.pop("422", None)  # bad parameters are 400 here
    if not open_to_all:
        operation["security"] = [{"key": []}]
        for status, text in _ERRORS.items():
            answers.setdefault(str(status), {"description": text, "content": content})
