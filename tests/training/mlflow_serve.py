"""Run by ``test_tracking.py`` in MLflow's own environment: its server, on SQLite and a folder.

Arguments: the folder, the port (0: a free one). Prints the port once it listens.
"""

import os
import sys

FOLDER, PORT = sys.argv[1:]
os.environ |= {  # as `mlflow server` hands them to its workers
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{FOLDER}/mlflow.db",
    "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
    "_MLFLOW_SERVER_ARTIFACT_DESTINATION": f"{FOLDER}/artifacts",
    "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
}

from mlflow.server import app  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402

server = make_server("127.0.0.1", int(PORT), app, threaded=True)
print(server.port, flush=True)
server.serve_forever()
