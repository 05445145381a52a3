"""What several verbs of the command line share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ParamsFile = Annotated[Path, typer.Argument(help="A file such as params/quickstart.yaml.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. train.lora.rank=16.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Version = Annotated[str, typer.Argument(help="A version number, or NAME@ALIAS, NAME/NUMBER.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="The registered model; needed when there are several.")
]
Because = Annotated[str, typer.Option("--because", help="Why; kept in the audit log.")]


def print_json(value: Any) -> None:
    """The one object of `--json`."""
    print(json.dumps(value, ensure_ascii=False))
