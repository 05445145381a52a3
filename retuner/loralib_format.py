"""loralib's layers as PEFT's and back: Microsoft's own LoRA (Hu et al. 2021; microsoft/LoRA, loralib 0.1.2).

For a layer of rank r, with s = alpha / r in all of them:

    Linear        A (r, in)       B (out, r)        W += s·B·A
    Embedding     A (r, rows)     B (width, r)      W += s·(B·A)ᵀ
    MergedLinear  A (r·E, in)     B (E·out/n, r)    the output has n equal parts, E of them enabled; the g-th of these
                                                    has rows g·r.. of A and g·out/n.. of B to itself
    Conv2d        A (r·k, in·k)   B (out·k, r·k)    W += s·(B·A) read row by row as (out, in, k, k); groups 1

In PEFT a MergedLinear is a Linear of rank r·E whose B is zero but for a block a part, and alpha is alpha·E. Of a
Conv2d, row o·k+p of B·A holds the numbers p·in·k.. of output o. So it is a convolution of rank r·k², whose A has k
copies of loralib's down a diagonal, whose B is loralib's read as (out, k·r·k), and whose alpha is alpha·k².
"""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from retuner.errors import Refused
from retuner.lora_file import PREFIX, LoraFile, exactly, refuse_beyond_lora, target_names
from retuner.loralib_names import bias_names, biases_in, ends_in, kind_of_layer, layer_pairs, longest_fit
from retuner.strict import Positive, Strict

Alpha = Annotated[float, Field(gt=0)]
Parts = Annotated[tuple[bool, ...], Field(min_length=1)]


class LoralibSettings(Strict):
    """What a `lora_state_dict` does not say of itself. Names are those of layers, or the ends of their paths.

    `fan_in_fan_out` is not among them: it says how the base's weight lies, which the base knows; A and B lie alike.
    """

    alpha: Alpha
    alpha_pattern: dict[str, Alpha]
    """Other alphas for some layers; the longest name that fits counts."""
    rank: Positive | None
    """Every layer's r, where it is to be checked; it follows from the shapes."""
    enable_lora: dict[str, Parts]
    """The layers that were MergedLinear, and which of their parts were enabled."""
    bias: Literal["none", "all", "lora_only"]


def from_loralib(
    state: Mapping[str, Any], model: Any, settings: LoralibSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A `lora_state_dict` as the tensors and the configuration of a PEFT adapter on `model`, whose weights
    are not read.

    Errors: Refused for what `model` has no place for, and for shapes that contradict it or the settings.
    """
    from peft import LoraConfig

    modules = dict(model.named_modules())
    pairs = layer_pairs(state, modules)
    for where, asked in (("enable_lora", settings.enable_lora), ("alpha_pattern", settings.alpha_pattern)):
        if unknown := sorted(name for name in asked if not any(ends_in(path, name) for path in pairs)):
            raise Refused(
                f"{where} names {', '.join(unknown)}, and the file has no such layer",
                f"names of its layers, such as {', '.join(sorted(pairs)[:3])}, or the ends of them",
                f"correct {where}",
            )
    biases = biases_in(state, modules, pairs, settings.bias)

    tensors, ranks, alphas = {}, {}, {}
    for path, (a, b) in pairs.items():
        parts = longest_fit(settings.enable_lora, path)
        rank, times, peft_a, peft_b = _layer_in(path, a, b, modules[path], parts)
        if settings.rank not in (None, rank):
            raise Refused(
                f"{path} has r = {rank} by its shapes, A {tuple(a.shape)} and B {tuple(b.shape)}",
                f"r = {settings.rank}, as given",
                "correct the rank, or leave it out; name the layers that were MergedLinear in enable_lora",
            )
        ranks[path] = rank * times
        alphas[path] = (longest_fit(settings.alpha_pattern, path) or settings.alpha) * times
        form = "embedding_{}" if kind_of_layer(modules[path]) == "Embedding" else "{}.weight"
        tensors[f"{PREFIX}{path}.lora_{form.format('A')}"] = peft_a
        tensors[f"{PREFIX}{path}.lora_{form.format('B')}"] = peft_b
    for path, value in biases.items():
        tensors[f"{PREFIX}{path}.{'base_layer.bias' if path in pairs else 'bias'}"] = value

    common_rank, common_alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    config = LoraConfig(
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        r=common_rank,
        lora_alpha=common_alpha,
        target_modules=target_names(pairs, (path for path in modules if kind_of_layer(modules[path]))),
        rank_pattern={exactly(path): value for path, value in ranks.items() if value != common_rank},
        alpha_pattern={exactly(path): value for path, value in alphas.items() if value != common_alpha},
        bias=settings.bias,
        fan_in_fan_out=any(kind_of_layer(modules[path]) == "Conv1D" for path in pairs),
        inference_mode=True,
    )
    return tensors, config.to_dict()


def to_loralib(
    lora: LoraFile, model: Any, enable_lora: Mapping[str, tuple[bool, ...]]
) -> tuple[dict[str, Any], LoralibSettings]:
    """A PEFT adapter as a `lora_state_dict` and what to say beside it. rsLoRA becomes LoRA with alpha·√rank.

    A layer that `enable_lora` names becomes a MergedLinear, any other linear one a Linear.
    Errors: Refused for what loralib has no layer for, and for a B that is not zero between its blocks.
    """
    refuse_beyond_lora(lora, "loralib", biases=True)
    modules = dict(model.named_modules())
    if unknown := sorted(
        name for name in enable_lora if not any(ends_in(path, name) for path in lora.layers)
    ):
        raise Refused(
            f"enable_lora names {', '.join(unknown)}, which the adapter is not on",
            f"some of {', '.join(sorted({path.rpartition('.')[2] for path in lora.layers}))}",
            "correct enable_lora",
        )
    state: dict[str, Any] = {}
    ranks, alphas = {}, {}
    for path, layer in lora.layers.items():
        if path not in modules:
            raise Refused(f"the adapter is on {path}, which the base does not have", "the adapter's own base")
        parts = longest_fit(enable_lora, path)
        times, a, b = _layer_out(path, layer.a, layer.b, modules[path], parts)
        state |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
        ranks[path], alphas[path] = layer.rank // times, layer.alpha / times
    names = bias_names(modules, lora.layers, lora.config["bias"])
    state |= {name: lora.biases[path] for name, path in names.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    settings = LoralibSettings(
        alpha=alpha,
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
        rank=next(iter(ranks.values())) if len(set(ranks.values())) == 1 else None,
        enable_lora=dict(enable_lora),
        bias=lora.config["bias"],
    )
    return {name: tensor.contiguous() for name, tensor in state.items()}, settings


def loralib_delta(a: Any, b: Any, module: Any, parts: tuple[bool, ...] | None, alpha: float) -> Any:
    """What loralib adds to the module's weight, in the weight's shape, by the formulas above and nothing else."""
    import torch

    if parts is not None:
        size = _sizes(module)[1] // len(parts)
        groups = torch.nn.functional.conv1d(a[None], b[:, :, None], groups=sum(parts))[0].split(size)
        waiting = iter(groups)
        whole = torch.cat([next(waiting) if on else torch.zeros(size, a.shape[1]) for on in parts])
        return (whole.T if kind_of_layer(module) == "Conv1D" else whole) * (alpha / b.shape[1])
    match kind_of_layer(module):
        case "Conv2d":
            return (b @ a).view(module.weight.shape) * (alpha * module.kernel_size[0] / b.shape[1])
        case "Embedding" | "Conv1D":
            return (b @ a).T * (alpha / b.shape[1])
    return (b @ a) * (alpha / b.shape[1])


def parts_of(settings: LoralibSettings, path: str) -> tuple[bool, ...] | None:
    """Which parts of this layer are enabled; None where it is no MergedLinear."""
    return longest_fit(settings.enable_lora, path)


def alpha_of(settings: LoralibSettings, path: str) -> float:
    return longest_fit(settings.alpha_pattern, path) or settings.alpha


# --- one layer


def _layer_in(
    path: str, a: Any, b: Any, module: Any, parts: tuple[bool, ...] | None
) -> tuple[int, int, Any, Any]:
    """r, what PEFT's rank is a multiple of it by, and PEFT's A and B. Errors: Refused."""
    import torch

    kind = kind_of_layer(module)
    if kind == "Conv2d":
        k = _kernel(path, module)
        r = b.shape[1] // k
        _fit(
            path,
            a,
            b,
            (r * k, module.in_channels * k),
            (module.out_channels * k, r * k),
            f"Conv2d of {k}×{k}",
        )
        diagonal = torch.block_diag(*[a] * k)
        return (
            r,
            k * k,
            diagonal.view(-1, module.in_channels, k, k),
            b.reshape(module.out_channels, -1, 1, 1),
        )
    inputs, outputs = _sizes(module)
    if parts is None:
        r = a.shape[0]
        if kind != "Embedding" and (tuple(a.shape), tuple(b.shape)) != ((r, inputs), (outputs, r)):
            _perhaps_merged(path, a, b, inputs, outputs)
        _fit(path, a, b, (r, inputs), (outputs, r), kind)
        return r, 1, a, b
    size, enabled = _part(path, kind, outputs, parts)
    r = b.shape[1]
    what = f"MergedLinear with {enabled} of {len(parts)} parts enabled"
    _fit(path, a, b, (r * enabled, inputs), (size * enabled, r), what)
    whole = b.new_zeros(outputs, r * enabled)
    for group, part in enumerate(part for part, on in enumerate(parts) if on):
        block = b[group * size : (group + 1) * size]
        whole[part * size : (part + 1) * size, group * r : (group + 1) * r] = block
    return r, enabled, a, whole


def _layer_out(
    path: str, a: Any, b: Any, module: Any, parts: tuple[bool, ...] | None
) -> tuple[int, Any, Any]:
    """What loralib's r is PEFT's rank divided by, and loralib's A and B. Errors: Refused."""
    import torch

    kind = kind_of_layer(module)
    if kind == "Conv2d":
        k = _kernel(path, module)
        first = a.reshape(a.shape[0], -1)[: a.shape[0] // k, : module.in_channels * k]
        if a.shape[0] % (k * k) or not torch.block_diag(*[first] * k).view_as(a).equal(a):
            raise Refused(
                f"A of {path} is not {k} copies of one matrix down a diagonal",
                "a convolution that came from loralib, whose Conv2d cannot say more",
                "export it --to merged",
            )
        return k * k, first, b.reshape(module.out_channels * k, -1)
    if not kind:
        raise Refused(f"the adapter is on {path}, a {type(module).__name__}", "a layer that loralib has")
    if parts is None:
        return 1, a, b
    size, enabled = _part(path, kind, _sizes(module)[1], parts)
    if a.shape[0] % enabled:
        raise Refused(
            f"{path} has rank {a.shape[0]}, which {enabled} enabled parts cannot share equally",
            "a rank that is a multiple of the parts",
            "leave the layer out of enable_lora: as a Linear loralib can have it",
        )
    r = a.shape[0] // enabled
    rest, blocks = b.clone(), []
    for group, part in enumerate(part for part, on in enumerate(parts) if on):
        rows, columns = slice(part * size, (part + 1) * size), slice(group * r, (group + 1) * r)
        blocks.append(b[rows, columns])
        rest[rows, columns] = 0
    if bool(rest.any()):
        raise Refused(
            f"B of {path} is not zero between its blocks, so it is no MergedLinear with enable_lora "
            f"{', '.join(str(on).lower() for on in parts)}",
            "a B in which each enabled part has columns to itself, as an import or parts such as qkv_proj.q give it",
            "leave the layer out of enable_lora: as a Linear loralib can have it",
        )
    return enabled, a, torch.cat(blocks)


def _perhaps_merged(path: str, a: Any, b: Any, inputs: int, outputs: int) -> None:
    """Errors: Refused when shapes that do not fit a Linear could be a MergedLinear's."""
    r = b.shape[1]
    if a.shape[1] == inputs and r and a.shape[0] % r == 0 and (enabled := a.shape[0] // r):
        size = b.shape[0] // enabled
        if size and b.shape[0] % enabled == 0 and outputs % size == 0:
            example = ",".join("1" if n < enabled else "0" for n in range(outputs // size))
            raise Refused(
                f"{path} has A {tuple(a.shape)} and B {tuple(b.shape)}: not a Linear's, but what a MergedLinear of "
                f"r = {r} with {enabled} of {outputs // size} parts enabled has",
                "which of the parts were enabled; the file does not say",
                f"name it in enable_lora, such as --enable-lora {path.rpartition('.')[2]}={example}",
            )


def _part(path: str, kind: str, outputs: int, parts: tuple[bool, ...]) -> tuple[int, int]:
    """Rows of a part, and how many parts are enabled."""
    if kind not in ("Linear", "Conv1D") or outputs % len(parts) or not any(parts):
        raise Refused(
            f"enable_lora gives {path} {len(parts)} parts, {sum(parts)} of them enabled",
            f"a linear layer whose {outputs} outputs these divide, with a part enabled",
            "correct enable_lora",
        )
    return outputs // len(parts), sum(parts)


def _fit(path: str, a: Any, b: Any, a_shape: tuple[int, ...], b_shape: tuple[int, ...], what: str) -> None:
    if (tuple(a.shape), tuple(b.shape)) != (a_shape, b_shape) or 0 in a_shape:
        raise Refused(
            f"{path} has A {tuple(a.shape)} and B {tuple(b.shape)}, which do not fit a {what}",
            f"such as A {a_shape} and B {b_shape}",
            "give the base and the settings it was trained with",
        )


def _kernel(path: str, module: Any) -> int:
    k = module.kernel_size[0]
    if module.groups != 1 or module.kernel_size != (k, k):
        raise Refused(
            f"{path} is a convolution of {module.groups} groups with a kernel of {module.kernel_size}",
            "one group and a square kernel: loralib's A and B say nothing else",
        )
    return k


def _sizes(module: Any) -> tuple[int, int]:
    """What A and what B is long by: inputs and outputs; of an embedding, rows and width."""
    rows, columns = module.weight.shape
    return (columns, rows) if kind_of_layer(module) == "Linear" else (rows, columns)
