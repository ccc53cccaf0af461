"""Training in two processes, which divide every batch, ends in the weights of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcguard.commands.train import TrainRun, run_training
from lcguard.config import dump_config, load_config
from lcguard.training.shards import ALONE, Shards
from lcguard.training.trainer import Trainer
from tests.matrix import GUARDS
from tests.paths import ROOT

DATA = {"seed": 5000, "train_records": 60, "test_records": 8}
COMMON = {"steps": 4, "questions": 2, "checkpoint_every": 2, "leak_ramp": 2, "warmup": 1}
DECODER = {"width": 16}
RUNS: dict[str, dict[str, Any]] = {
    # 7 records: shards of unequal size
    "gate": {
        "guard": "gate",
        "options": GUARDS["gate"],
        "batch": 7,
        "tail_weight": 0.3,
        "tail_share": 0.3,
        "label_steps": 1,
        "label_weight": 0.5,
        "open_weight": 0.5,
        "ema": 0.5,
    },
    # what is off by default
    "options": {
        "guard": "gate",
        "options": GUARDS["gate"],
        "batch": 7,
        "teacher": "twin",
        "uncertain_nats": 0.1,
        "rare_strength": 0.5,
        "trace_weight": 0.2,
        "trace_noise": 0.5,
        "category_weight": 0.1,
        "rollback_every": 2,
        "schedule": [{"share": 0.5, "lr": 0.001}, {"share": 0.5, "average": True, "noise": 0.2}],
    },
    # everything that reads other rows: paths on top of each other, attackers, twins
    "residual": {
        "guard": "residual",
        "options": GUARDS["residual"],
        "batch": 6,
        "path_hops": 2,
        "merge_rate": 0.5,
        "pair_weight": 0.0,
        "twin_weight": 0.1,
        "adversary": {"count": 1, "weight": 0.5, "options": DECODER},
    },
}


class Killed(Exception):
    pass


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "guard").glob("*.safetensors")
    return load_file(file)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two take up a run that was killed half-way, in one process."""
    plan = tmp_path / "run.yaml"
    plan.write_text(json.dumps({"data": DATA, "train": COMMON | RUNS[name]}))
    run = load_config(TrainRun, plan)
    run_training(run, tmp_path / "one", "test")

    step = Trainer.step

    def killed_at_two(self: Trainer, at: int) -> dict[str, float]:
        if at == 2:
            raise Killed
        return step(self, at)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", killed_at_two)
        with pytest.raises(Killed):
            run_training(run, tmp_path / "two", "test")

    # what accelerate launch starts for several GPUs; for several CPU processes it wants MPI
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launch, "scripts/train_guard.py", str(plan), "--out", tmp_path / "two"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training and") == 1  # one process speaks
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert (tmp_path / "two" / "config.yaml").read_text() == dump_config(run)
    assert not (tmp_path / "two" / "checkpoint.safetensors").exists()
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5, nan_ok=True)


def test_shards_divide_a_batch() -> None:
    class Second(Shards):
        count, index = 2, 1  # type: ignore[assignment]

    assert Second().rows(5) == [1, 3]
    assert Second().rows(5, index=0) == [0, 2, 4]
    assert Second().rows(3, hops=2) == [1, 4]
    assert ALONE.rows(3, hops=2) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="a batch of 1 for 2 processes: raise batch"):
        Second().rows(1)
