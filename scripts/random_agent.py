"""A model of random weights in any of Qwen3's shapes, with a gate for it, for benchmarks of length.

python scripts/random_agent.py --out build/random                  # Qwen3-8B's shape: 16 GB
python scripts/random_agent.py --layers 2 --hidden 64 --out build/small

The nano agent's tokenizer and vocabulary, positions up to 131,072 tokens and a question. Speed does
not hang on what the weights are; nothing that such a model says means anything.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.nano.load import model_path
from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script
from lcguard.guards.base import KVShape, guard_class
from lcguard.guards.frozen import FrozenGuard

POSITIONS = 131_072 + 1024
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if min(args.layers, args.hidden, args.heads, args.kv_heads) < 1 or args.heads % args.kv_heads:
        raise ValueError(f"--heads {args.heads}: use a multiple of --kv-heads {args.kv_heads}")
    torch.manual_seed(0)
    model = args.out / "model"
    save_model(args, model)
    backend = load_backend(str(model))
    module = guard_class("gate").build(KVShape(*backend.source.shape), len(CATEGORIES), {})
    some = torch.randint(64, 512, (4, 64)).tolist()
    module.fit_statistics(backend.source.prefill(some))
    guard = FrozenGuard(module.cpu())
    guard = guard.with_card(model_id="random", model_digest=backend.digest)
    guard.save_pretrained(args.out / "gate")
    print(args.out)
    return 0


def save_model(args: argparse.Namespace, folder: Path) -> None:
    """Weights and tokenizer."""
    config = AutoConfig.from_pretrained(model_path())
    config.update(
        {
            "num_hidden_layers": args.layers,
            "layer_types": ["full_attention"] * args.layers,
            "hidden_size": args.hidden,
            "intermediate_size": 3 * args.hidden,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "head_dim": args.head_dim,
            "max_position_embeddings": POSITIONS,
        }
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    made.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(model_path() / name, folder / name)


if __name__ == "__main__":
    run_script(main)
