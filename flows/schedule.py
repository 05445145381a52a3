"""Recurring retrains: a Prefect deployment of the retrain flow, served by this process until Ctrl-C."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from flows.servers import prefect_environment, prefect_server
from retuner.errors import Refused
from retuner.params_file import load
from retuner.runtime import Runtime


def schedule(
    params: Path, overrides: tuple[str, ...], cron: str, runtime: Runtime, say: Callable[[str], None]
) -> None:
    """Retrain whenever `cron` says so; a run that is due while another goes on is skipped.

    Uses the server that PREFECT_API_URL names, or starts our own on loopback. Errors: Refused for params or a cron
    expression that cannot be used; Unavailable when the server does not start.
    """
    load(params, overrides)
    _check_cron(cron)
    with ExitStack() as servers:
        if not os.environ.get("PREFECT_API_URL"):
            server = servers.enter_context(prefect_server(runtime))
            os.environ["PREFECT_API_URL"] = f"{server.url}/api"
            say(f"Prefect {server.url}")
        os.environ.update(prefect_environment(runtime))
        # Flow runs are started in other folders' processes.
        os.environ["RETUNER_HOME"] = str(runtime.home.absolute())
        from prefect import serve
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy

        from flows.retrain import retrain

        deployment = retrain.to_deployment(
            name=params.stem,
            cron=cron,
            parameters={"params": str(params), "overrides": list(overrides)},
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
            description=f"Retrain by {params}",
        )
        say(f"retraining by {params} at '{cron}' until Ctrl-C")
        say(f"at once, from another terminal: prefect deployment run 'retrain/{params.stem}'")
        serve(deployment, print_starting_message=False)


def _check_cron(cron: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError:
        raise Refused(
            f"--cron {cron!r} is no schedule",
            "five fields: minute, hour, day of month, month, day of week",
            "for Mondays at three: --cron '0 3 * * 1'",
        ) from None
