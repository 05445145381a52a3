"""`retuner export` and `retuner import`: adapters in the shapes that other programs load, and back."""

import json
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

from retuner.errors import Refused
from retuner.runtime import Runtime, load_runtime

import_app = typer.Typer(help="Adapters of other programs, as folders that PEFT loads.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
EnableLora = Annotated[
    list[str] | None,
    typer.Option("--enable-lora", metavar="LAYER=1,0,1", help="A MergedLinear of loralib, and its parts."),
]


def export(
    version: Annotated[
        str, typer.Argument(help="A version's number, an alias, its run's id; with --base an adapter folder.")
    ],
    to: Annotated[str, typer.Option("--to", help="merged, split (for vLLM), loralib or gguf.")],
    out: Annotated[Path | None, typer.Option(help="A new folder; below the home if unset.")] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="PARAMS", help="The params file whose base the folder is for.")
    ] = None,
    enable_lora: EnableLora = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The registered model; needed when there are several.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in another shape, with a certificate that it still does the same."""
    from flows.console import Terminal
    from retuner.export import SHAPES
    from retuner.export import export as write_export

    if to not in SHAPES:
        raise Refused(f"--to {to}", f"one of {', '.join(SHAPES)}")
    parts = _parts(enable_lora)
    if parts and to != "loralib":
        raise Refused(f"--enable-lora with --to {to}", "--to loralib: only loralib has a MergedLinear")
    runtime = load_runtime()
    terminal = Terminal()
    runtime.home.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=runtime.home, prefix="export-") as work:
            source = _source(runtime, version, model, base, Path(work), terminal)
            place = out or runtime.home / "exports" / f"{source.name.replace(' version ', '-')}-{to}"
            certificate = write_export(source, to, place, runtime.device, terminal, parts)
    finally:
        terminal.close()
    if as_json:
        print(json.dumps({"folder": str(place), **certificate}, ensure_ascii=False))
        return
    for line in _told(certificate, place):
        print(line)


@import_app.command("loralib")
def import_loralib(
    file: Annotated[Path, typer.Argument(help="A lora_state_dict: safetensors, or by torch.save.")],
    base: Annotated[Path, typer.Option(metavar="PARAMS", help="The params file whose base it is for.")],
    to: Annotated[Path, typer.Option("--to", help="The new adapter folder.")],
    alpha: Annotated[float | None, typer.Option(help="lora_alpha of its layers.")] = None,
    rank: Annotated[int | None, typer.Option(help="r of its layers, to be checked.")] = None,
    enable_lora: EnableLora = None,
    bias: Annotated[str, typer.Option(help="none, all or lora_only, as it was saved.")] = "none",
    settings: Annotated[
        Path | None, typer.Option(help="A YAML file that says all this, as an export to loralib writes it.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A file by Microsoft's loralib, as an adapter folder for PEFT, `retuner export` and everything else."""
    from flows.console import Terminal
    from retuner.export import publish, refuse_existing
    from retuner.export_source import base_of
    from retuner.files import sha256_file
    from retuner.lora import WEIGHTS
    from retuner.lora_file import write_lora
    from retuner.loralib_file import check_settings, read_settings, read_state
    from retuner.loralib_format import from_loralib
    from retuner.params_file import load
    from retuner.skeleton import empty_model

    given: dict[str, Any] = {"alpha": alpha, "rank": rank, "enable_lora": _parts(enable_lora), "bias": bias}
    if (alpha is None) == (settings is None):
        raise Refused(
            "--alpha and --settings" if settings else "neither --alpha nor --settings",
            "one of them: the file does not say what alpha was",
        )
    asked = (
        read_settings(settings) if settings else check_settings({**given, "alpha_pattern": {}}, "--alpha ...")
    )
    refuse_existing(to)
    state = read_state(file)
    runtime = load_runtime()
    terminal = Terminal()
    try:
        stands_on = base_of(load(base).base, runtime, terminal)
    finally:
        terminal.close()
    tensors, config = from_loralib(state, empty_model(stands_on.path), asked)
    to.parent.mkdir(parents=True, exist_ok=True)
    draft = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir()
        write_lora(draft, tensors, {**config, "base_model_name_or_path": stands_on.facts.source})
        publish(draft, to)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    layers = sum(name.endswith(".lora_A") for name in state)
    sha256 = sha256_file(to / WEIGHTS)
    if as_json:
        told = {"folder": str(to), "layers": layers, "adapter_sha256": sha256, "base": stands_on.facts.source}
        print(json.dumps(told))
    else:
        print(
            f"{to}: {layers} layers of {file.name} as a PEFT adapter on {stands_on.facts.source}, sha256 {sha256}"
        )


def _source(
    runtime: Runtime, version: str, model: str | None, base: Path | None, work: Path, terminal: Any
) -> Any:
    from flows.versions import model_named, version_named
    from retuner.export_source import base_of, source_of_folder, source_of_version

    if base is not None:
        from retuner.params_file import load

        params = load(base)
        return source_of_folder(Path(version), params, base_of(params.base, runtime, terminal))
    name = model_named(runtime, model)
    return source_of_version(runtime, name, version_named(runtime, name, version), work)


def _parts(asked: list[str] | None) -> dict[str, tuple[bool, ...]]:
    """`qkv_proj=1,0,1` and so on. Errors: Refused."""
    parts = {}
    for text in asked or ():
        layer, equals, flags = text.partition("=")
        each = flags.split(",")
        if not layer or not equals or not set(each) <= {"0", "1"}:
            raise Refused(
                f"--enable-lora {text}", "LAYER=1,0,1: the layer's name, and 1 for each enabled part"
            )
        parts[layer] = tuple(flag == "1" for flag in each)
    return parts


def _told(certificate: dict[str, Any], place: Path) -> list[str]:
    parity = certificate["parity"]
    parted = parity["parted_where_nearly_tied"]
    return [
        f"{place}: {certificate['source']['name']} as {certificate['shape']}",
        f"logits within {parity['max_abs_logit_difference']:.2g} of base and adapter at {parity['positions']} "
        f"positions (the largest is {parity['largest_logit']:.3g}; {parity['allowed_logit_difference']:.2g} allowed)",
        f"{parity['equal_texts']} of {parity['prompts']} texts equal"
        + (f", {parted} part where two tokens were nearly tied" if parted else "")
        + f"; prompts: {parity['prompts_from']}",
    ]
