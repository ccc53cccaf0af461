"""The loop's round as a Kubeflow pipeline: compiles ``container/loop_pipeline.yaml``.

Runs in an environment of its own (``make pipeline``): kfp wants an older protobuf than vLLM's pins
have. Nothing of lcguard is imported, each step is its command line: the same pipeline runs in a
cluster's containers and, where ``lcguard`` is on PATH, under kfp's local runner.
"""

# kfp reads annotations as types: they may not be postponed
import sys
from pathlib import Path

from kfp import compiler, dsl, kubernetes

OUT = Path(__file__).parents[1] / "container" / "loop_pipeline.yaml"
STATE = "/state"
IMAGE = "lcguard-loop"
"""``container/Dockerfile``, target ``loop``; replace it by the digest that you pushed."""
STEPS = ("collect", "train", "judge", "promote")


# The image has kfp already, so that a pod needs no package index.
@dsl.component(base_image=IMAGE, install_kfp_package=False)
def loop_step(step: str, state: str, round_name: str, config: str) -> str:
    """``lcguard loop STEP`` on the deployment's state folder: the last line that it says."""
    import os
    import subprocess
    import sys

    words = ["lcguard", "loop", step, "--dir", state]
    words += ["--out", os.path.join(state, "rounds", round_name)]
    if config and step != "promote":
        words += ["--config", os.path.join(state, config)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        print(f"lcguard loop {step} ended with exit code {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout.strip().rpartition("\n")[2]


@dsl.pipeline(
    name="lcguard-loop",
    description="From a leak that canaries found to a retrained guard: one round.",
)
def loop(
    round_name: str,
    config: str = "loop.yaml",
    state: str = STATE,
    volume: str = "lcguard-state",
    secret: str = "lcguard",
) -> str:
    """Steps share the volume with the server's state folder and the registry, which serving reads;
    what each has written is not written again, so a step that failed may be retried. The pipeline's
    output is what became of the round."""
    before = None
    for step in STEPS:
        task = loop_step(step=step, state=state, round_name=round_name, config=config)
        task.set_display_name(step)
        task.set_caching_options(False)  # what it does is on the volume, not in its outputs
        kubernetes.mount_pvc(task, pvc_name=volume, mount_path=STATE)
        kubernetes.use_secret_as_env(
            task, secret_name=secret, secret_key_to_env={"key": "LCGUARD_KEY"}
        )
        if before is not None:
            task.after(before)
        before = task
    assert before is not None
    return before.output


def main(argv: list[str]) -> int:
    """Compiles to the path given, or in place."""
    compiler.Compiler().compile(loop, str(Path(argv[0]) if argv else OUT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
