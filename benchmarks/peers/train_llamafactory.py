"""One epoch by LLaMA-Factory, in an environment that has it: python train_llamafactory.py JOB (see `steps`).

Its own packing with neat_packing, which keeps rows apart: with flash attention by their positions, else by a mask.
With flash attention it takes one pack a step, so the pack is as long as a step of the others.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main(job: Path) -> None:
    import llamafactory.train.sft.workflow as workflow
    from datasets import Dataset, DatasetDict
    from llamafactory.hparams import DataArguments
    from llamafactory.train.tuner import run_exp
    from steps import Steps, read_rows
    from transformers import AutoTokenizer
    from transformers.utils import is_flash_attn_2_available

    asked = json.loads((job / "settings.json").read_text())
    gpu = asked["device"] == "cuda"
    flash, liger = gpu and is_flash_attn_2_available(), gpu and find_spec("liger_kernel") is not None
    pack, batch = asked["pack_tokens"], asked["batch_size"]
    if flash:
        pack, batch = pack * batch, 1
    packs = packed(
        read_rows(job),
        AutoTokenizer.from_pretrained(asked["base"]),
        DataArguments(cutoff_len=pack, neat_packing=True),
    )
    DatasetDict({"train": Dataset.from_dict(packs)}).save_to_disk(str(job / "packs"))
    steps = Steps()

    class Counting(workflow.SFTDataCollatorWith4DAttentionMask):
        def __call__(self, features: list[dict[str, Any]]) -> Any:
            steps.tokens.append(sum(of > 0 for feature in features for of in feature["attention_mask"]))
            return super().__call__(features)

    workflow.SFTDataCollatorWith4DAttentionMask = Counting
    settings = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": asked["base"],
        "tokenized_path": str(job / "packs"),
        "dataset": "rows",  # asked for, and not read where there is a tokenized_path
        "template": "empty",
        "cutoff_len": pack,
        "neat_packing": True,
        "finetuning_type": "lora",
        "lora_rank": asked["rank"],
        "lora_alpha": asked["alpha"],
        "lora_dropout": asked["dropout"],
        "lora_target": "all",
        "flash_attn": "fa2" if flash else "sdpa",
        "enable_liger_kernel": liger,
        "disable_gradient_checkpointing": True,
        "bf16": asked["bfloat16"],
        "per_device_train_batch_size": batch,
        "learning_rate": asked["learning_rate"],
        "lr_scheduler_type": "linear",
        "num_train_epochs": 1,
        "optim": asked["optimizer"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not gpu,
        "output_dir": str(job / "adapter"),
    }
    run_exp(settings, [steps])
    how = f"neat packing to {pack}, {settings['flash_attn']}, {'Liger' if liger else 'no Liger'}"
    steps.write(job, ("llamafactory", "torch", "transformers"), how)


def packed(rows: dict[str, list[list[int]]], tokenizer: Any, settings: Any) -> dict[str, Any]:
    """LLaMA-Factory's packs of rows that are token ids already."""
    from llamafactory.data.processor import PackedSupervisedDatasetProcessor

    class Tokenized(PackedSupervisedDatasetProcessor):
        def _encode_data_example(self, prompt: Any, response: Any, **rest: Any) -> Any:
            return prompt[0], response[0]

    none = [None] * len(rows["input_ids"])
    return Tokenized(None, tokenizer, None, settings).preprocess_dataset(
        {
            "_prompt": [[ids] for ids in rows["input_ids"]],
            "_response": [[labels] for labels in rows["labels"]],
            **{f"_{name}": none for name in ("system", "tools", "images", "videos", "audios")},
        }
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
