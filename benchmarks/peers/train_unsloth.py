"""One epoch by Unsloth, in an environment that has it: python train_unsloth.py JOB (see `steps`).

As its documentation advises: FastLanguageModel, get_peft_model and TRL's trainer with packing, which on a GPU keeps
rows apart. Without one Unsloth turns packing off and pads.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(job: Path) -> None:
    from unsloth import FastLanguageModel  # isort: skip  # it changes the libraries below as they are imported
    import torch
    from datasets import Dataset
    from steps import Steps, read_rows
    from trl import SFTConfig, SFTTrainer

    asked = json.loads((job / "settings.json").read_text())
    model, tokenizer = FastLanguageModel.from_pretrained(
        asked["base"],
        max_seq_length=asked["pack_tokens"],
        dtype=torch.bfloat16 if asked["bfloat16"] else torch.float32,
        load_in_4bit=False,
        use_gradient_checkpointing=False,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=asked["rank"],
        target_modules=asked["targets"],
        lora_alpha=asked["alpha"],
        lora_dropout=asked["dropout"],
        bias="none",
        use_gradient_checkpointing=False,
        max_seq_length=asked["pack_tokens"],
    )
    steps = Steps()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(read_rows(job)),
        callbacks=[steps],
        args=SFTConfig(
            output_dir=str(job / "trainer"),
            max_length=asked["pack_tokens"],
            packing=True,
            per_device_train_batch_size=asked["batch_size"],
            gradient_checkpointing=False,
            learning_rate=asked["learning_rate"],
            lr_scheduler_type="linear",
            num_train_epochs=1,
            optim=asked["optimizer"],
            bf16=asked["bfloat16"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    train_step = trainer.training_step

    def counting(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        mask = inputs.get("attention_mask")
        steps.tokens.append(inputs["input_ids"].numel() if mask is None else mask.sum())
        return train_step(model, inputs, *rest)

    trainer.training_step = counting
    trainer.train()
    trainer.model.save_pretrained(str(job / "adapter"))
    how = f"packing to {asked['pack_tokens']}" if trainer.args.packing else "padded: no packing without a GPU"
    steps.write(job, ("unsloth", "torch", "transformers", "trl"), how)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
