"""`retuner params ...`: making params files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retuner.errors import Refused

if TYPE_CHECKING:  # `--help` and the other verbs do without it
    from retuner.tutorial import Translation

params_app = typer.Typer(help="Make a params file.", no_args_is_help=True)
WIDTH = 160
"""Of the table where there is no terminal to ask."""


@params_app.command("from-tutorial")
def from_tutorial(
    file: Annotated[Path, typer.Argument(help="A script, notebook, JSON or YAML with a training_config.")],
    to: Annotated[Path | None, typer.Option("--to", help="The params file to write.")] = None,
    leave_out: Annotated[bool, typer.Option("--leave-out", help="Go on without what is refused.")] = False,
    commit: Annotated[
        str | None, typer.Option(help="The base's commit on the hub, where FILE pins none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Translate a tutorial's dictionaries, reading them only: what each became, why, and what is refused."""
    from retuner.tutorial import translate
    from retuner.tutorial_source import read

    translation = translate(read(file), commit)
    refused = [] if leave_out else translation.refused
    written = to if to and not refused else None
    if written:
        _write(written, translation.text)
    if as_json:
        told = {"file": str(file), **translation.as_json(), "refused": len(translation.refused)}
        print(json.dumps({**told, "written": str(written) if written else None}, ensure_ascii=False))
        if refused:
            raise typer.Exit(2)
        return
    _show(translation)
    if refused:
        raise Refused(
            f"{len(refused)} of {len(translation.rows)} settings are refused: "
            + ", ".join(dict.fromkeys(row.name for row in refused)),
            "settings that mean something here",
            "mend them as the table says, or go on without them: --leave-out",
        )
    print(f"written: {written}" if written else "nothing is written without --to OUT.yaml")


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise Refused(
            f"{path} is there already, with something else in it", "a new file", "name another, or remove it"
        )
    path.write_text(text, encoding="utf-8")


def _show(translation: "Translation") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    table = Table()
    for title, widest in (
        ("theirs", 29),
        ("value", 22),
        ("place", 15),
        ("verdict", 7),
        ("here", 30),
        ("why", None),
    ):
        table.add_column(title, max_width=widest, overflow="fold")
    styles = {"kept": "green", "changed": "cyan", "refused": "red"}
    for row in translation.rows:
        why = "; ".join(part for part in (row.why, f"do: {row.do}" if row.do else "") if part)
        cells = (row.name, row.value, row.place, row.verdict, row.became or "-", why)
        styled = (Text(cell, styles[row.verdict] if index == 3 else "") for index, cell in enumerate(cells))
        table.add_row(*styled)
    console.print(table)
    if translation.added:
        console.print(
            f"silent there, so as their libraries do: {', '.join(translation.added)}", soft_wrap=True
        )
    counts = {verdict: sum(row.verdict == verdict for row in translation.rows) for verdict in styles}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
