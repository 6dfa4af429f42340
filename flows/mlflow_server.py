"""MLflow's server behind the guard.

    python -m flows.mlflow_server server --port 5000

`mlflow server` starts uvicorn as another process; that one is given this module's own way in.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from flows.page_guard import guard_uvicorn

COMMAND = [sys.executable, "-m", "flows.mlflow_server"]


def main() -> None:
    """Run `mlflow` with these arguments, or `uvicorn` where that is the first."""
    if sys.argv[1:2] == ["uvicorn"]:
        guard_uvicorn()
        sys.argv = sys.argv[1:]
        runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)
        return
    import mlflow.server

    made = mlflow.server._build_uvicorn_command

    def guarded_command(*args: Any, **kwargs: Any) -> list[str]:
        command: list[str] = made(*args, **kwargs)
        return [*COMMAND, *command[command.index("uvicorn") :]]

    mlflow.server._build_uvicorn_command = guarded_command
    runpy.run_module("mlflow", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
