"""loralib's files into PEFT adapters and back, each held against loralib itself."""

import json
import pickle
import re
import warnings
from pathlib import Path

import loralib
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from retuner.errors import Refused
from retuner.lora_file import read_lora, write_lora
from retuner.loralib_file import check_settings, read_settings, read_state, write_state
from retuner.loralib_format import from_loralib, loralib_delta, to_loralib

R, ALPHA = 3, 12
PARTS = (True, False, True)
SETTINGS = {"alpha": ALPHA, "alpha_pattern": {}, "rank": R, "enable_lora": {"qkv": PARTS}, "bias": "none"}


def settings(**changed):
    return check_settings({**SETTINGS, **changed}, "settings")


class Net(nn.Module):
    """Every kind of layer that loralib has, on a picture and a word."""

    def __init__(self, embedding, linear, merged, turned, conv):
        super().__init__()
        self.word = embedding
        self.body = nn.Module()
        self.body.conv = conv
        self.body.qkv = merged
        self.body.out = linear
        self.body.turned = turned
        self.head = nn.Linear(7, 5)  # has no LoRA, but a bias

    def forward(self, word, picture):
        x = self.word(word) + self.body.conv(picture).flatten(1)
        return self.head(self.body.turned(self.body.out(torch.tanh(self.body.qkv(x)))))


def plain():
    torch.manual_seed(0)
    return Net(
        nn.Embedding(11, 8), nn.Linear(12, 6), nn.Linear(8, 12), Conv1D(7, 6), nn.Conv2d(3, 2, 3)
    ).eval()


def by_loralib(base, seed=1, r=R, alpha=ALPHA):
    """The same model with loralib's layers, as a training may have left them: A, B and biases moved."""
    net = Net(
        loralib.Embedding(11, 8, r=r, lora_alpha=alpha),
        loralib.Linear(12, 6, r=r, lora_alpha=alpha),
        loralib.MergedLinear(8, 12, r=r, lora_alpha=alpha, enable_lora=list(PARTS)),
        loralib.Linear(6, 7, r=r, lora_alpha=alpha, fan_in_fan_out=True),
        loralib.Conv2d(3, 2, 3, r=r, lora_alpha=alpha),
    )
    state = base.state_dict()
    for kind in ("weight", "bias"):  # loralib's convolution lies inside its layer
        state[f"body.conv.conv.{kind}"] = state.pop(f"body.conv.{kind}")
    lost = net.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys and all("lora_" in key for key in lost.missing_keys)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return net.train()


def inputs():
    torch.manual_seed(9)
    return torch.arange(11), torch.randn(11, 3, 4, 4)


def imported(folder: Path, state, base, asked):
    tensors, config = from_loralib(state, base, asked)
    folder.mkdir()
    write_lora(folder, tensors, config)
    return folder


def loaded(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return PeftModel.from_pretrained(base, str(folder)).eval()


def difference(one, other):
    with torch.no_grad():
        return (one(*inputs()) - other(*inputs())).abs().max().item()


# --- there


@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_imported_model_computes_what_loralib_computes(tmp_path, bias):
    theirs = by_loralib(plain())
    if bias == "all":
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter))
    state = loralib.lora_state_dict(theirs, bias)
    ours = loaded(plain(), imported(tmp_path / "a", state, plain(), settings(bias=bias)))
    assert difference(ours, theirs) < 1e-5
    assert difference(plain(), theirs) > 0.1
    assert difference(ours, theirs.eval()) < 1e-5, "merged"


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_back_gives_the_same_bytes(tmp_path, bias, dtype):
    theirs = by_loralib(plain()).to(dtype)
    save_file(loralib.lora_state_dict(theirs, bias), tmp_path / "theirs.safetensors")
    state = read_state(tmp_path / "theirs.safetensors")
    folder = imported(tmp_path / "peft", state, plain(), settings(bias=bias))
    back, said = to_loralib(read_lora(folder), plain(), {"qkv": PARTS})
    write_state(tmp_path, back, said)
    ours = (tmp_path / "lora_state_dict.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()
    assert said == settings(bias=bias) == read_settings(tmp_path / "loralib.yaml")


def test_what_is_exported_loads_into_loralib_and_computes_the_same(tmp_path):
    adapted = get_peft_model(
        plain(),
        LoraConfig(
            r=4,
            lora_alpha=10,
            target_modules=["word", "qkv", "out"],
            init_lora_weights=False,
            use_rslora=True,
        ),
    ).eval()
    adapted.save_pretrained(tmp_path)
    state, said = to_loralib(read_lora(tmp_path), plain(), {})
    assert said.alpha == pytest.approx(10 * 4**0.5) and said.rank == 4  # rsLoRA's scale, as LoRA's
    theirs = Net(
        loralib.Embedding(11, 8, r=4, lora_alpha=said.alpha),
        loralib.Linear(12, 6, r=4, lora_alpha=said.alpha),
        loralib.Linear(8, 12, r=4, lora_alpha=said.alpha),
        Conv1D(7, 6),
        nn.Conv2d(3, 2, 3),
    ).train()
    theirs.load_state_dict(plain().state_dict(), strict=False)
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    assert difference(theirs, adapted) < 1e-5


def test_lora_only_takes_the_biases_of_the_adapted_layers(tmp_path):
    theirs = by_loralib(plain())
    theirs.body.conv = plain().body.conv
    with torch.no_grad():
        theirs.body.out.bias.add_(1.0)
    state = loralib.lora_state_dict(theirs, "lora_only")
    assert sorted(name for name in state if name.endswith("bias")) == [
        "body.out.bias",
        "body.qkv.bias",
        "body.turned.bias",
    ]
    asked = settings(bias="lora_only")
    folder = imported(tmp_path / "a", state, plain(), asked)
    assert difference(loaded(plain(), folder), theirs) < 1e-5
    back, said = to_loralib(read_lora(folder), plain(), {"qkv": PARTS})
    assert back.keys() == state.keys() and all(back[name].equal(state[name]) for name in state)
    assert said == asked


def test_layers_of_several_ranks_and_alphas_keep_them(tmp_path):
    base = plain()
    theirs = by_loralib(base)
    theirs.body.out = loralib.Linear(12, 6, r=5, lora_alpha=2)
    theirs.body.out.load_state_dict(base.body.out.state_dict(), strict=False)
    nn.init.normal_(theirs.body.out.lora_B)
    asked = settings(rank=None, alpha_pattern={"out": 2})
    folder = imported(tmp_path / "a", loralib.lora_state_dict(theirs), plain(), asked)
    assert difference(loaded(plain(), folder), theirs) < 1e-5
    back, said = to_loralib(read_lora(folder), plain(), {"qkv": PARTS})
    assert back["body.out.lora_B"].equal(theirs.body.out.lora_B)
    assert said.alpha == ALPHA and said.alpha_pattern == {"body.out": 2}


def test_the_formulas_are_those_by_which_loralib_merges():
    base, theirs = plain(), by_loralib(plain())
    theirs.eval()  # merges
    merged = {name.replace(".conv.conv", ".conv"): value for name, value in theirs.state_dict().items()}
    for path in ("word", "body.conv", "body.qkv", "body.out", "body.turned"):
        module, theirs_module = base.get_submodule(path), theirs.get_submodule(path)
        parts = PARTS if path == "body.qkv" else None
        with torch.no_grad():
            delta = loralib_delta(theirs_module.lora_A, theirs_module.lora_B, module, parts, ALPHA)
        assert torch.allclose(module.weight + delta, merged[f"{path}.weight"], atol=1e-6), path


@pytest.mark.parametrize("first", [True, False])
def test_only_exactly_the_layers_of_the_file_are_adapted(tmp_path, first):
    """Two layers have one name; the file has one of them."""

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.deep = nn.Module()
            self.deep.proj = nn.Linear(4, 4)

    name = "proj" if first else "deep.proj"
    state = {f"{name}.lora_A": torch.ones(2, 4), f"{name}.lora_B": torch.ones(4, 2)}
    folder = imported(tmp_path / "a", state, Twins(), settings(rank=2, enable_lora={}))
    adapted = loaded(Twins(), folder)
    assert [n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")] == [name]


# --- files


def test_a_file_by_torch_save_is_read_like_safetensors(tmp_path):
    state = loralib.lora_state_dict(by_loralib(plain()), "all")
    torch.save(state, tmp_path / "state.pt")
    read = read_state(tmp_path / "state.pt")
    assert read.keys() == state.keys() and all(read[name].equal(state[name]) for name in state)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    with Path("state.pt").open("wb") as file:
        if legacy:
            pickle.dump({"lora_A": Bomb()}, file)
        else:
            torch.save({"lora_A": Bomb()}, file)
    with pytest.raises(Refused, match="not a file of tensors alone"):
        read_state(Path("state.pt"))
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "content, says",
    [(b"", "not a file of tensors"), (b"\x10\0\0\0\0\0\0\0{}", "not whole"), (None, "cannot be read")],
)
def test_a_broken_file_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "state").write_bytes(content)
    with pytest.raises(Refused, match=says):
        read_state(tmp_path / "state")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    state = loralib.lora_state_dict(by_loralib(plain()))
    state["body.out.lora_B"][0, 0] = float("nan")
    save_file(state, tmp_path / "state")
    with pytest.raises(Refused, match=r"not finite, in body\.out\.lora_B"):
        read_state(tmp_path / "state")


def test_settings_that_lack_or_misspell_something_are_refused_all_at_once(tmp_path):
    (tmp_path / "loralib.yaml").write_text("alpha: -1\nenable_lora: {qkv: yes please}\nbias: some\n")
    with pytest.raises(Refused) as refused:
        read_settings(tmp_path / "loralib.yaml")
    for word in ("alpha:", "alpha_pattern:", "rank:", "enable_lora.qkv:", "bias:"):
        assert f"- {word}" in str(refused.value)


# --- hazards


@pytest.mark.parametrize(
    "prefix, advice", [("module.", "take 'module' off the names"), ("x.module.", "take 'x.module' off")]
)
def test_a_wrong_prefix_is_refused_and_the_right_one_named(prefix, advice):
    state = {f"{prefix}{name}": value for name, value in loralib.lora_state_dict(by_loralib(plain())).items()}
    with pytest.raises(Refused, match=r"the base has no layer .*, and 4 more") as refused:
        from_loralib(state, plain(), settings())
    assert advice in refused.value.do and "strict=False" in refused.value.expected


def test_a_prefix_that_is_missing_is_named_too():
    state = {"out.lora_A": torch.zeros(3, 12), "out.lora_B": torch.zeros(6, 3)}
    with pytest.raises(Refused) as refused:
        from_loralib(state, plain(), settings(enable_lora={}))
    assert "body.out" in refused.value.do


def test_a_whole_state_dict_is_refused_because_it_may_be_merged():
    theirs = by_loralib(plain()).eval()
    with pytest.raises(Refused, match="whole state_dict") as refused:
        from_loralib(theirs.state_dict(), plain(), settings(bias="all"))
    assert "train()" in refused.value.do


def change(name, value):
    def changed(state):
        state[name] = value(state[name]) if callable(value) else value

    return changed


@pytest.mark.parametrize(
    "spoil, asked, says",
    [
        (lambda s: None, {"rank": 4}, r"has r = 3 by its shapes"),
        (lambda s: None, {"enable_lora": {}}, r"what a MergedLinear of r = 3 with 2 of 3 parts"),
        (
            lambda s: None,
            {"enable_lora": {"qkv": (True, True, True)}},
            "do not fit a MergedLinear with 3 of 3",
        ),
        (lambda s: None, {"enable_lora": {"qkv": (True,) * 5}}, "5 parts"),
        (lambda s: None, {"enable_lora": {"qkv": PARTS, "nowhere": PARTS}}, "enable_lora names nowhere"),
        (lambda s: None, {"alpha_pattern": {"nowhere": 1}}, "alpha_pattern names nowhere"),
        (lambda s: None, {"bias": "all"}, r"lacks body\.conv\.conv\.bias, against bias all"),
        (lambda s: None, {"bias": "lora_only"}, "Conv2d with a bias"),
        (change("head.bias", torch.zeros(5)), {}, r"has head\.bias, against bias none"),
        (change("head.extra", torch.zeros(5)), {}, r"has head\.extra"),
        (change("body.out.lora_A", lambda a: a[:, 1:]), {}, r"body\.out has A \(3, 11\)"),
        (change("body.out.lora_B", lambda b: b[:, :2]), {}, r"body\.out has A \(3, 12\) and B \(6, 2\)"),
        (change("body.conv.lora_B", lambda b: b[:, 1:]), {}, r"body\.conv has A"),
        (change("word.lora_A", lambda a: a.T), {}, "word has A"),
        (change("body.out.lora_A", lambda a: a[0]), {}, "a matrix of floats"),
        (change("body.out.lora_A", lambda a: a.int()), {}, "a matrix of floats"),
        (lambda s: s.pop("word.lora_B"), {}, "word has only one of"),
        (dict.clear, {}, "no lora_A and lora_B"),
    ],
)
def test_what_does_not_fit_the_base_or_the_settings_is_refused(spoil, asked, says):
    state = loralib.lora_state_dict(by_loralib(plain()))
    spoil(state)
    with pytest.raises(Refused) as refused:
        from_loralib(state, plain(), settings(**asked))
    assert re.search(says, f"{refused.value}"), str(refused.value)


def test_grouped_convolutions_are_refused():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

    layer = loralib.Conv2d(4, 4, 3, groups=2, r=R)
    state = {f"conv.{name}": value for name, value in loralib.lora_state_dict(layer).items()}
    with pytest.raises(Refused, match="2 groups"):
        from_loralib(state, Grouped(), settings(enable_lora={}))


@pytest.mark.parametrize(
    "lora, parts, says",
    [
        ({"use_dora": True}, {}, "DoRA's magnitudes"),
        ({"modules_to_save": ["head"]}, {}, r"whole modules \(head\)"),
        ({"lora_bias": True}, {}, r"lora_B\.bias"),
        ({}, {"qkv": PARTS}, "not zero between its blocks"),
        ({"r": 3}, {"qkv": PARTS}, "2 enabled parts cannot share"),
        ({}, {"head": PARTS}, "enable_lora names head"),
        ({"target_modules": ["conv"], "r": 18}, {}, "copies of one matrix"),
    ],
)
def test_an_adapter_that_loralib_cannot_hold_is_refused(tmp_path, lora, parts, says):
    config = LoraConfig(**{"r": 4, "target_modules": ["qkv", "out"], "init_lora_weights": False, **lora})
    get_peft_model(plain(), config).save_pretrained(tmp_path)
    with pytest.raises(Refused, match=says):
        to_loralib(read_lora(tmp_path), plain(), parts)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    get_peft_model(plain(), LoraConfig(r=2, target_modules=["out"])).save_pretrained(tmp_path)
    other = plain()
    del other.body.out
    with pytest.raises(Refused, match=r"body\.out, which the base does not have"):
        to_loralib(read_lora(tmp_path), other, {})


def test_an_import_gives_the_same_bytes_every_time(tmp_path):
    state = loralib.lora_state_dict(by_loralib(plain()))
    one, other = (imported(tmp_path / name, state, plain(), settings()) for name in "ab")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert load_file(one / "adapter_model.safetensors").keys()
    assert json.loads((one / "adapter_config.json").read_text())["peft_type"] == "LORA"
