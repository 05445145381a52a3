"""A plan for several processes, made by a process of its own.

Whoever has measured on a GPU keeps some of its memory, and may be the only one that a GPU lets in: the one that plans
is gone when those begin that train.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from retuner.artifacts import Base, Chats
from retuner.errors import RetunerError, from_spelled
from retuner.feasible import device_of, refuse_what_cannot_be_shared
from retuner.helper_process import HelperProcess
from retuner.plan import Plan
from retuner.planner import make_plan
from retuner.train_params import DpoParams, SftParams


def plan_aside(
    chats: Chats,
    base: Base,
    params: SftParams | DpoParams,
    device: str,
    speeds: Path,
    processes: int,
    strategy: str,
) -> Plan:
    """As `retuner.planner.make_plan`."""
    if processes == 1:
        return make_plan(chats, base, params, device, speeds)
    refuse_what_cannot_be_shared(params, base.path, device_of(device), processes, strategy)
    asked = {
        "chats": chats.model_dump(mode="json"),
        "base": base.model_dump(mode="json"),
        "params": params.model_dump(mode="json"),
        "rest": [device, str(speeds.absolute()), processes, strategy],
    }
    helper = HelperProcess(__name__)
    try:
        helper.tell(asked)
        answer = helper.answer()
    except BaseException:
        helper.kill()
        raise
    finally:
        helper.end()
    if answer is None:  # What ended it ends a plan made here too, and is seen; else there is a plan.
        return make_plan(chats, base, params, device, speeds, processes, strategy)
    if "error" in answer:
        raise from_spelled(answer["error"])
    return Plan(**answer["plan"])


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # Whatever a library prints is no answer.
        asked = json.loads(sys.stdin.readline())
        chats, base = Chats(**asked["chats"]), Base(**asked["base"])
        params = SftParams.model_validate_json(json.dumps(asked["params"]))
        device, speeds, processes, strategy = asked["rest"]
        try:
            plan = make_plan(chats, base, params, device, Path(speeds), processes, strategy)
            answer = {"plan": asdict(plan)}
        except RetunerError as error:
            answer = {"error": error.spelled()}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
