"""Run by ``test_loop_pipeline.py`` in kfp's own environment: the pipeline under its local runner.

Arguments: the pipeline's script, the state folder, the round's name, where outputs go. Prints the
pipeline's outputs as JSON, on the last line.
"""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location

from kfp import local

SCRIPT, STATE, ROUND, OUT = sys.argv[1:]
spec = spec_from_file_location("loop_pipeline", SCRIPT)
assert spec is not None
assert spec.loader is not None
made = module_from_spec(spec)
spec.loader.exec_module(made)
local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=OUT)
task = made.loop(round_name=ROUND, state=STATE)
print(json.dumps(task.outputs))
