"""An adapter as GGUF, as llama.cpp loads it beside a GGUF of the base (`--lora adapter.gguf`).

llama.cpp multiplies B·A of a tensor by alpha / rank, with one alpha for the file and the rank of that tensor's B. Where
layers have other alphas (or rsLoRA's), their B takes up the difference. Names are those of gguf's own tensor map.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from retuner.errors import Refused
from retuner.lora_file import read_lora, refuse_beyond_lora
from retuner.skeleton import empty_model

FILE = "adapter.gguf"
INSTEAD = "export it --to merged, and convert that with llama.cpp's convert_hf_to_gguf.py"
EMBEDDING = "token_embd"


def write_gguf(out: Path, base: Path, adapter: Path, name: str) -> None:
    """Errors: Refused for a base that is no Phi-3, and for what llama.cpp's adapters cannot hold."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys

    lora, model = read_lora(adapter), empty_model(base)
    refuse_beyond_lora(lora, "a GGUF adapter")
    if model.config.model_type != "phi3":
        raise Refused(
            f"the base is of the type {model.config.model_type}",
            "phi3, whose tensors lie in GGUF as they do here; Llama's q and k, for one, do not",
            INSTEAD,
        )
    names = _gguf_names(model)
    alpha = Counter(layer.alpha for layer in lora.layers.values()).most_common(1)[0][0]
    writer = GGUFWriter(out / FILE, MODEL_ARCH_NAMES[MODEL_ARCH.PHI3])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for path, layer in lora.layers.items():
        target = names.get(path)
        if target is None or (target == EMBEDDING and model.config.tie_word_embeddings):
            raise Refused(
                f"the adapter is on {path}, which llama.cpp adapts otherwise or not at all",
                "layers that GGUF names, and no embedding that is the head too",
                INSTEAD,
            )
        a, b = layer.a.float(), layer.b.float() * (layer.alpha / alpha)
        if target == EMBEDDING:
            a = a.T  # llama.cpp looks tokens up in its rows
        writer.add_tensor(f"{target}.weight.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{target}.weight.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_deltas(file: Path, model: Any) -> dict[str, Any]:
    """What llama.cpp would add to the weights of `model`, by the file alone. Errors: Refused."""
    import torch
    from gguf import GGUFReader, Keys
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    said = {key: field.contents() for key, field in reader.fields.items()}
    if (said.get("general.type"), said.get(Keys.Adapter.TYPE)) != ("adapter", "lora"):
        raise Refused(f"{file.name} is no LoRA adapter", "general.type adapter, adapter.type lora")
    tensors = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    paths = {target: path for path, target in _gguf_names(model).items()}
    deltas = {}
    for name, b in tensors.items():
        if not name.endswith(".weight.lora_b"):
            continue
        target = name.removesuffix(".weight.lora_b")
        a = tensors[f"{target}.weight.lora_a"]
        product = a @ b.T if target == EMBEDDING else b @ a
        deltas[paths[target]] = product * (said[Keys.Adapter.LORA_ALPHA] / b.shape[1])
    return deltas


def _gguf_names(model: Any) -> dict[str, str]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.PHI3, model.config.num_hidden_layers)
    return {name: found for name, _ in model.named_modules() if name and (found := known.get_name(name))}
