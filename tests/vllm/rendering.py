"""vLLM's own rendering of requests, without an engine, by templates such as real models have."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lcguard.agents.nano.load import model_path
from lcguard.commands.live_servers import Running, free_port
from tests.small_tokenizers import tokenizer

# As Llama 3's and Qwen's: tool calls as JSON and item by item, thoughts, and refusals.
CALLS = """{%- if tools %}<s>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</s>{% endif %}
{%- for m in messages %}
{%- if m.role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role ' ~ m.role) }}{% endif %}
{%- if m.role == 'system' and not loop.first and not tools %}
{{- raise_exception('System message must be at the beginning.') }}{% endif %}<s>{{ m.role }}
{%- if m.name %} name={{ m.name }}{% endif %}
{%- if m.reasoning_content %}
<think>{{ m.reasoning_content }}</think>{% endif %}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{%- for key, value in call.function.arguments | items %}
<parameter={{ key }}>{{ value if value is string else value | tojson }}{% endfor %}</call>
{%- endfor %}</s>
{%- endfor %}
{%- if add_generation_prompt %}<s>assistant
{% endif %}"""

# As Mistral's and of models that take images: parts of contents, and turns that must alternate.
PARTS = """{%- set ns = namespace(last='') %}
{%- for m in messages %}
{%- if m.role == ns.last and m.role == 'user' %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}{% set ns.last = m.role %}<s>{{ m.role }}:
{%- if m.content is string %} {{ m.content }}{% else %}
{%- for part in m.content %} {{ part.text | trim }}{% endfor %}{% endif %}
{%- for call in m.tool_calls or [] %} [CALL] {{ call | tojson }}{% endfor %}</s>
{%- endfor %}
{%- if add_generation_prompt %}<s>assistant:{% endif %}"""

TEMPLATES = {"calls": CALLS, "parts": PARTS}


def model_folder(folder: Path, kind: str, template: str) -> Path:
    """A model that can be rendered for: nano's configuration, no weights."""
    tokenizer(kind).save_pretrained(folder)
    shutil.copy(model_path() / "config.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    return folder


@contextmanager
def rendering(model: Path, log: Path) -> Iterator[Running]:
    """A server of vLLM's that renders and tokenizes requests and computes nothing."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.launchers.render.entry",
        "--model",
        str(model),
        "--served-model-name",
        "nano",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-uvicorn-access-log",
        "--max-model-len",
        "8192",
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    ]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
        )
    running = Running(process, f"http://127.0.0.1:{port}", log)
    try:
        running.wait("/health")
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
