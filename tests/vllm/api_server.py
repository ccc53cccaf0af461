"""vLLM's own OpenAI server, as tests ask it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import HFBackend
from tests.docs.blocks import block
from tests.engine import KEY


def environment() -> dict[str, str]:
    return os.environ | {
        "LCGUARD_KEY": KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


@dataclass
class Server:
    client: Any
    url: str
    store: Path
    agent: HFBackend
    process: subprocess.Popen[bytes]

    def ask(self, prompt: Any, handoff: Any = None, **more: Any) -> Any:
        body = {"kv_transfer_params": {"lcguard": handoff}} if handoff is not None else {}
        options = {"max_tokens": 12, "temperature": 0} | more
        return self.client.completions.create(
            model="nano", prompt=prompt, extra_body=body, **options
        )

    def publish(self, ids: Any, audience: str) -> dict[str, Any]:
        handoff = {"publish": {"source": "intake", "audience": audience}}
        answer = self.ask(list(ids), handoff)
        return answer.kv_transfer_params["lcguard"]  # type: ignore[no-any-return]


def consume(made: dict[str, Any], agent: str = "") -> dict[str, Any]:
    segment = {"handle": made["handle"], "grant": made["grant"]}
    return {"consume": {"agent": agent or made["audience"], "segments": [segment]}}


def documented_edges() -> list[dict[str, Any]]:
    """Of the policy that docs/vllm.md starts this server with."""
    code = block("docs/vllm.md", "vllm.entrypoints.openai.api_server")
    (config,) = re.findall(r"--kv-transfer-config '(.*?)'\n", code, re.S)
    edges = json.loads(config)["kv_connector_extra_config"]["policy"]["edges"]
    return list(edges)
