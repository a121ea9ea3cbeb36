"""A compile worker: reads jobs as JSON lines from standard input, answers JSON lines.

    python -m jspeed.planner.worker PARENT

A job is `{"config": ..., "target": ..., "gpus": ..., "gpus_per_host": ...}`; the answer is
`{"result": ...}` with the plan's JSON, in which `"live_bytes": true` in the job has the memory over
the step stand too, or `{"error": ..., "expected": ...}`, where `expected` tells
an error that jspeed raised on purpose from any other. The first line is `{"ready": true}`.
`PARENT` is the process that started it, with which it ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Handler = Callable[[Mapping[str, Any]], Any]
"""Does one job; what it returns is the answer's `result`, ready for JSON."""

_WATCH_SECONDS = 0.5


def serve(prepare: Callable[[], Handler]) -> None:
    """Answers jobs until standard input ends; a handler's exception is an answer, not the end.

    Args:
      prepare: imports what the jobs need and returns their handler. What it and the handler print
        goes to standard error, since standard output is for answers.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with(int(sys.argv[1]))

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    handler = prepare()
    answer({"ready": True})
    for line in sys.stdin:
        answer(_done(handler, json.loads(line)))


def _done(handler: Handler, job: Mapping[str, Any]) -> Mapping[str, Any]:
    from jspeed.core.errors import JspeedError

    try:
        return {"result": handler(job)}
    except JspeedError as error:
        return {"error": str(error), "expected": True}
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().split("\n")[0]
        return {"error": f"{type(error).__name__}: {first}", "expected": False}


def _end_with(parent: int) -> None:
    """Ends this process, whatever it does, soon after its parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _plan_handler() -> Handler:
    from jspeed.config import load_config
    from jspeed.planner.cluster import Cluster
    from jspeed.planner.plan import make_plan
    from jspeed.planner.targets import load_target

    def handle(job: Mapping[str, Any]) -> Any:
        cluster = Cluster(load_target(job["target"]), job["gpus"], job["gpus_per_host"])
        plan = make_plan(load_config(job["config"]), cluster)
        result = plan.to_json()
        if job.get("live_bytes"):
            result["live_bytes"] = plan.live().to_json()
        return result

    return handle


if __name__ == "__main__":
    serve(_plan_handler)
