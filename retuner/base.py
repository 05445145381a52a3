"""The base model: from the hub at one commit, a folder, or the package registry, into one complete folder.

Loading is here too, so that every stage loads the same thing in the same way: local files, safetensors, and no
code that came with the weights.
"""

import fnmatch
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from retuner.artifacts import BaseFacts
from retuner.errors import Refused, Unavailable
from retuner.files import sha256_file
from retuner.observe import Observer
from retuner.params import BaseParams, HubBase, LocalBase, SmolLM2Base, TinyBase
from retuner.rendering import Renderer
from retuner.smollm2 import GGUF_SHA256, write_smollm2
from retuner.tiny_phi3 import write_json, write_tiny_phi3

KEPT = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*")
"""What of a model is taken: never *.bin (pickle) and never *.py."""
HUB_SAYS = {
    401: "it is not there, or not yours to read",
    403: "it is not yours to read",
    404: "it is not there",
}
HUB_SECONDS = 10
"""How long the hub may take to say what a repository holds."""


def base_identity(params: BaseParams) -> dict[str, Any]:
    """What names this base, cheaply: the bytes where they are here, else the pin. Errors: Unavailable, Refused."""
    match params:
        case SmolLM2Base():
            return {"source": "smollm2", "gguf_sha256": GGUF_SHA256}
        case TinyBase():
            return {"source": "tiny", "seed": params.seed}
        case HubBase():
            return {"source": "hub", "repo": params.repo, "commit": params.commit}
        case LocalBase():
            return {
                "source": "local",
                "files": {file.name: sha256_file(file) for file in _local_files(params)},
            }


def fetch_base(out: Path, params: BaseParams, observer: Observer) -> BaseFacts:
    """Write the model folder into `out`, and find out what it is without loading its weights.

    Errors: Unavailable when the source cannot be had, Refused when it is no base that can be trained here.
    """
    source: str = params.source
    match params:
        case SmolLM2Base():
            write_smollm2(out)
        case TinyBase():
            write_tiny_phi3(out, params.seed)
        case HubBase():
            source = f"{params.repo}@{params.commit}"
            _download(out, params, observer)
        case LocalBase():
            for file in _local_files(params):
                shutil.copyfile(file, out / file.name)
    _forget_remote_code(out)
    facts = _examine(out, source)
    observer.say(
        f"base: {source}, a {facts.architecture} of {facts.parameters:,} parameters; "
        f"it stops at {', '.join(map(str, facts.stop_token_ids))}"
    )
    return facts


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer and chat template of a model folder. Errors: Refused, in one line."""
    config = _read_json(folder / "config.json")
    from transformers import AutoTokenizer, __version__

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # loaders raise whatever they stumble over
        rope = config.get("rope_scaling") or {}
        if "su" in (rope.get("type"), rope.get("rope_type")):
            raise Refused(
                f"the tokenizer in {folder} cannot be loaded: its config.json has the rope type 'su' of April 2024",
                f"'longrope', as transformers {__version__} calls it",
                "take a commit of July 2024 or later",
            ) from error
        raise Refused(
            f"the tokenizer in {folder} cannot be loaded: {_one_line(error)}",
            f"tokenizer.json and tokenizer_config.json that transformers {__version__} reads",
            "save the tokenizer again with save_pretrained, or use another base",
        ) from error
    if not tokenizer.is_fast:
        raise Refused(
            f"the tokenizer in {folder} is a slow one", "a tokenizer.json", "save a fast tokenizer beside it"
        )
    if not tokenizer.chat_template:
        raise Refused(
            f"the tokenizer in {folder} has no chat template",
            "the base of an instruct model",
            "use an instruct model, or add a chat_template.jinja to a local copy",
        )
    return tokenizer


def load_model(
    folder: Path, dtype: str, attention: str, device: str, use_cache: bool = True, quantization: Any = None
) -> Any:
    """The model of a folder, in eval mode. `dtype` and `attention` are spelled as in TrainParams; `quantization` is
    a configuration of transformers.

    Errors: Refused when a weight is missing or has another shape, which transformers would only warn of and fill at
    random; Unavailable when the attention is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    packed = {"quantization_config": quantization, "device_map": {"": device}} if quantization else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **packed,
        )
    except ImportError as error:
        raise Unavailable(
            f"{attention} cannot be used: {_one_line(error)}",
            "its package installed",
            "set train.attention: sdpa",
        ) from error
    wrong = {kind: sorted(map(str, report.get(kind) or ())) for kind in ("missing_keys", "mismatched_keys")}
    if found := [
        f"{kind.replace('_', ' ')} {', '.join(names[:3])}" for kind, names in wrong.items() if names
    ]:
        raise Refused(
            f"the weights in {folder} do not fit their config.json: {'; '.join(found)}",
            "every weight, in its shape",
            "fetch the base again, or save it again with save_pretrained",
        )
    model.config.use_cache = use_cache
    return (model if quantization else model.to(device)).eval()


# --- sources


def _local_files(params: LocalBase) -> list[Path]:
    folder = Path(params.path).expanduser()
    if not folder.is_dir():
        raise Unavailable(
            f"{folder} is not a folder", "a folder written by save_pretrained", "correct base.path"
        )
    files = sorted(file for file in folder.iterdir() if file.is_file() and _is_kept(file.name))
    _need_safetensors(str(folder), [file.name for file in files])
    return files


def _is_kept(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in KEPT)


def _need_safetensors(where: str, names: list[str]) -> None:
    if not any(name.endswith(".safetensors") for name in names):
        raise Refused(
            f"{where} holds no safetensors",
            "model.safetensors; a pytorch_model.bin is a pickle, which can run code",
            "save the model again with save_pretrained(safe_serialization=True)",
        )


def _download(out: Path, params: HubBase, observer: Observer) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, XetDownloadError

    pin = f"{params.repo}@{params.commit}"
    # False, not None: no token that some earlier login left on this machine is used.
    token = os.environ.get("HF_TOKEN") or False
    try:
        # One request first, which fails at once where snapshot_download would try again and again.
        info = HfApi(token=token).model_info(
            params.repo, revision=params.commit, timeout=HUB_SECONDS, files_metadata=True
        )
        files = [
            file for file in info.siblings or () if "/" not in file.rfilename and _is_kept(file.rfilename)
        ]
        _need_safetensors(pin, [file.rfilename for file in files])
        observer.say(f"base: fetching {pin}, {sum(file.size or 0 for file in files) / 1e9:,.1f} GB")
        names = [file.rfilename for file in files]
        snapshot_download(
            params.repo, revision=params.commit, local_dir=out, allow_patterns=names, token=token
        )
    except (HTTPError, XetDownloadError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        else:
            reason = HUB_SAYS.get(status) or _one_line(error)
        raise Unavailable(
            f"{pin} cannot be fetched from the hub: {reason}",
            "the hub within reach, and the repository at that commit",
            "check base.repo, base.commit and the network; set HF_TOKEN for a gated model; "
            "or copy the model here and set base.source: local",
        ) from error
    shutil.rmtree(out / ".cache", ignore_errors=True)


# --- what came


def _forget_remote_code(out: Path) -> None:
    """Drop `auto_map`, which points to Python files that are not here, so that transformers' own classes are used."""
    for name in ("config.json", "tokenizer_config.json"):
        if (out / name).exists() and "auto_map" in (settings := _read_json(out / name)):
            del settings["auto_map"]
            write_json(out / name, settings)


def _examine(out: Path, source: str) -> BaseFacts:
    config = _read_json(out / "config.json")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Refused(
            f"{source} is a model of the type {config.get('model_type')!r}",
            "a causal language model that transformers knows, such as phi3",
            "use another base",
        )
    tokenizer = load_tokenizer(out)
    renderer = Renderer(tokenizer)
    renderer.check(
        [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    )
    if (rows := config.get("vocab_size")) and rows <= max(tokenizer.get_vocab().values()):
        raise Refused(
            f"{source} has an embedding of {rows:,} rows for a tokenizer of {len(tokenizer):,} tokens",
            "a row for every token",
            "use the tokenizer that belongs to the weights",
        )
    generation = out / "generation_config.json"
    if not generation.exists():
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(generation, {key: config[key] for key in special if config.get(key) is not None})
    stops = {
        renderer.stop_id,
        *_ids(config.get("eos_token_id")),
        *_ids(_read_json(generation).get("eos_token_id")),
    }
    weights = sorted(out.glob("*.safetensors"))
    return BaseFacts(
        source=source,
        architecture=(
            config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
        )[0],
        parameters=_count_parameters(out, weights),
        weights_sha256=_sha256("".join(f"{sha256_file(file)}  {file.name}\n" for file in weights)),
        tokenizer_sha256=_tokenizer_sha256(tokenizer),
        template_sha256=_sha256(tokenizer.get_chat_template()),
        stop_token_ids=tuple(sorted(stops)),
    )


def _count_parameters(out: Path, weights: list[Path]) -> int:
    """From the headers alone, which also say when a file is cut short. Errors: Refused."""
    from safetensors import SafetensorError, safe_open

    index = out / "model.safetensors.index.json"
    if index.exists():
        absent = sorted(set(_read_json(index)["weight_map"].values()) - {file.name for file in weights})
        if absent:
            raise Refused(
                f"the base lacks {', '.join(absent)}", "every file that its index names", "fetch it again"
            )
    count = 0
    for file in weights:
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
                count += sum(math.prod(shape) for shape in shapes)
        except SafetensorError as error:
            raise Refused(
                f"{file.name} is not a whole safetensors file: {_one_line(error)}",
                "whole files",
                "fetch the base again",
            ) from error
    return count


def _tokenizer_sha256(tokenizer: Any) -> str:
    """Of the tokenizer as loaded, because what its files mean depends on the config.json beside them."""
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _sha256(tokenizer.backend_tokenizer.to_str() + json.dumps(named, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(
            f"{path} cannot be read: {_one_line(error)}", "a model folder", "fetch the base again"
        ) from error
    if not isinstance(value, dict):
        raise Refused(f"{path} holds no JSON object", "a model folder", "fetch the base again")
    return value


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
