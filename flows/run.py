"""`retuner run`: served from the store when all is there, else a Prefect flow."""

import os
from pathlib import Path
from typing import Any

from flows.cached import cached_version
from flows.receipts import is_still_asked, keep_receipt, question_of
from flows.servers import prefect_environment, running_prefect
from flows.summary import summarise
from retuner import tracking
from retuner.errors import Unavailable
from retuner.params_file import load
from retuner.runtime import Runtime
from tasks.context import open_context

HEALTH_SECONDS = 3.0


def prefect_server(runtime: Runtime) -> str | None:
    """The API of the server that records flow runs: the one that is configured, or our own if it is up."""
    return os.environ.get("PREFECT_API_URL") or running_prefect(runtime)


def run_pipeline(params: Path, overrides: tuple[str, ...], runtime: Runtime) -> dict[str, Any]:
    """Errors: Refused and Unavailable before any model loads where that is possible."""
    asked = load(params, overrides)
    question = question_of(params, overrides)
    context = open_context(asked, runtime)
    tracking.check_reachable(runtime)
    api = prefect_server(runtime)
    if api is None and cached_version(context):
        summary = summarise(context.store, context.records, runtime)
    else:
        if api:
            _check_prefect(api)
            os.environ["PREFECT_API_URL"] = api
        summary = _run_flow(params, overrides, runtime)
    # The bytes of a local base are not part of the question that a receipt answers. And where a file of it was
    # edited while the run went on, nobody knows which of the two this is the answer to.
    if context.params.base.source != "local" and is_still_asked(question, params, overrides):
        stages = {stage["name"]: stage["fingerprint"] for stage in summary["stages"]}
        keep_receipt(question, runtime, context.dataset, stages)
    return summary


def _run_flow(params: Path, overrides: tuple[str, ...], runtime: Runtime) -> dict[str, Any]:
    for name, value in prefect_environment(runtime).items():
        os.environ.setdefault(name, value)
    from flows.retrain import retrain

    return retrain(str(params), list(overrides), return_state=True).result()


def _check_prefect(api: str) -> None:
    import httpx

    try:
        # Any answer will do: whether credentials are right is for the client, which has them.
        httpx.get(f"{api.rstrip('/')}/health", timeout=HEALTH_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(
            f"the Prefect server at {api} does not answer ({error})",
            "the server that PREFECT_API_URL names",
            "start it, or unset PREFECT_API_URL to run with the embedded one",
        ) from None
