"""Guarded KV handoff inside stock vLLM. Importing this package imports no vLLM.

LCGuardConnector    lcguard.vllm.connector: what vLLM loads
GuardedLLM          lcguard.vllm.llm: publish and consume from Python
"""

CONNECTOR = "LCGuardConnector"
TESTED_VERSIONS = ("0.32.0",)
"""Versions of vLLM whose connector interface this package was run against."""
READ_VERSIONS = ("0.33.0",)
"""Versions whose interface was read and recorded (``scripts/record_vllm.py``), and that were not
run: refused unless ``untested_vllm`` names them."""
