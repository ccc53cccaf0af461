"""An MLflow server, by the few calls of its REST API that a run's figures need.

Without MLflow's own package: it wants other versions than vLLM is pinned with, tries an address
where nobody answers for minutes, and reports its use to its makers. The API is that of every
server since MLflow 2.0.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

TIMEOUT_S = 10.0
TOKEN, USER, PASSWORD = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
"""Environment variables, as MLflow's own client has them."""


class MlflowError(ValueError):
    """The server cannot be reached, or refuses."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code
        """MLflow's own, such as ``RESOURCE_DOES_NOT_EXIST``."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: credentials are for the address that was given."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class MlflowServer:
    """Raises ``ValueError`` for an address that is none of a server."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if parts.username or parts.password:  # not said again: it would stand in logs
            raise ValueError(
                f"--mlflow: give the address without credentials, which are taken from {USER} and "
                f"{PASSWORD}, or from {TOKEN}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"--mlflow {uri!r} is not a server's address: give one such as "
                "http://127.0.0.1:5000, where `mlflow server` serves a local store"
            )
        self.uri = uri.rstrip("/")
        self._open = urllib.request.build_opener(_Stay).open

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """``api/2.0/mlflow/PATH``. Raises ``MlflowError``."""
        return self._answer("GET", f"api/2.0/mlflow/{path}?{urlencode(query)}")

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """As ``get``."""
        return self._answer("POST", f"api/2.0/mlflow/{path}", json.dumps(body).encode())

    def put_artefact(self, path: str, data: bytes) -> None:
        """Through the server, as ``mlflow-artifacts:/PATH`` names it. Raises ``MlflowError``."""
        self._answer("PUT", f"api/2.0/mlflow-artifacts/artifacts/{quote(path)}", data)

    def _answer(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | _authorization()
        request = urllib.request.Request(
            f"{self.uri}/{path}", data=body, headers=headers, method=method
        )
        try:
            with self._open(request, timeout=TIMEOUT_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", None) or error
            raise MlflowError(
                f"MLflow server {self.uri} cannot be reached ({why}): start it, or leave --mlflow "
                "out"
            ) from None
        try:
            found = json.loads(text or b"{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise MlflowError(f"{self.uri} does not answer as an MLflow server does")
        return found

    def _refused(self, error: urllib.error.HTTPError) -> MlflowError:
        try:
            said = json.loads(error.read())
            code, why = str(said["error_code"]), " ".join(str(said["message"]).split())
        except (OSError, HTTPException, ValueError, KeyError, TypeError):
            code, why = "", error.reason
        return MlflowError(f"MLflow server {self.uri} answers {error.code}: {why[:200]}", code)


def _authorization() -> dict[str, str]:
    """As MLflow's client: a token, or name and password."""
    if token := os.environ.get(TOKEN):
        return {"Authorization": f"Bearer {token}"}
    user, password = os.environ.get(USER), os.environ.get(PASSWORD)
    if user and password:
        both = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {"Authorization": f"Basic {both}"}
    return {}
