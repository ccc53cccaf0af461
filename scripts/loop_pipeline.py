"""The loop's round as a Kubeflow pipeline: compiles ``container/loop_pipeline.yaml``.

Runs in an environment of its own (``make pipeline``): kfp wants an older protobuf than vLLM's pins
have. Nothing of lcguard is imported, each step is its command line.
"""

# kfp reads annotations as types: they may not be postponed
import sys
from pathlib import Path

from kfp import compiler, dsl, kubernetes

OUT = Path(__file__).parents[1] / "container" / "loop_pipeline.yaml"
STATE = "/state"
IMAGE = "lcguard-proxy"
"""As ``container/compose.yaml`` builds it; replace it by the digest that you pushed."""


def container(step: str, round_name: str, *more: str) -> dsl.ContainerSpec:
    """``lcguard loop STEP`` on the deployment's state folder."""
    out = dsl.ConcatPlaceholder([f"{STATE}/rounds/", round_name])
    args = ["loop", step, "--dir", STATE, "--out", out, *more]
    return dsl.ContainerSpec(image=IMAGE, command=["lcguard"], args=args)


@dsl.container_component
def collect(round_name: str, config: str) -> dsl.ContainerSpec:
    return container("collect", round_name, "--config", config)


@dsl.container_component
def train(round_name: str, config: str) -> dsl.ContainerSpec:
    return container("train", round_name, "--config", config)


@dsl.container_component
def judge(round_name: str, config: str) -> dsl.ContainerSpec:
    return container("judge", round_name, "--config", config)


@dsl.container_component
def promote(round_name: str) -> dsl.ContainerSpec:
    return container("promote", round_name)


@dsl.pipeline(
    name="lcguard-loop",
    description="From a leak that canaries found to a retrained guard: one round.",
)
def loop(
    round_name: str,
    config: str = f"{STATE}/loop.yaml",
    volume: str = "lcguard-state",
    secret: str = "lcguard",
) -> None:
    """Steps share the volume with the server's state folder and the registry, which serving reads;
    what each has written is not written again, so a step that failed may be retried."""
    before = None
    for step in (collect, train, judge, promote):
        asked = {"round_name": round_name} | ({} if step is promote else {"config": config})
        task = step(**asked)
        task.set_caching_options(False)  # what it does is on the volume, not in its outputs
        kubernetes.mount_pvc(task, pvc_name=volume, mount_path=STATE)
        kubernetes.use_secret_as_env(
            task, secret_name=secret, secret_key_to_env={"key": "LCGUARD_KEY"}
        )
        if before is not None:
            task.after(before)
        before = task


def main(argv: list[str]) -> int:
    """Compiles to the path given, or in place."""
    compiler.Compiler().compile(loop, str(Path(argv[0]) if argv else OUT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
