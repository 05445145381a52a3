"""FSDP2: the base and the adapter in parts, one in each process, put together layer by layer as they are needed.

accelerate shards on GPUs. On a CPU it would take the settings and, without a word, train by DDP instead; told that it
may, it shards there as well, which is how this is tested.

Checkpoints are those of one process: adapter_model.safetensors and an optimizer.pt of whole tensors.
"""

from pathlib import Path
from typing import Any

from retuner.errors import Refused
from retuner.lora import WEIGHTS, load_weights
from retuner.targets import Targets
from retuner.train_params import SftParams

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
SETTINGS = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}


def refuse_what_cannot_be_sharded(params: SftParams, targets: Targets) -> None:
    """Errors: Refused."""
    wrong = {
        f"lora.targets {', '.join(targets.names)}, as parts of fused layers,": bool(targets.parts),
        "quantization": params.quantization is not None,
        "stop_early": params.stop_early is not None,
        f"kernels {params.kernels}": params.kernels != "torch",
        f"lora.init {params.lora.init}": params.lora.init != "default",
        "lora.modules_to_save": bool(params.lora.modules_to_save),
        f"lora.bias {params.lora.bias}": params.lora.bias != "none",
        f"optimizer {params.optimizer}": params.optimizer not in ("adamw_torch", "adamw_torch_fused", "sgd"),
    }
    if found := [f"train.{name}" for name, asked in wrong.items() if asked]:
        raise Refused(
            f"{', '.join(found)} and a base in parts (fsdp) do not go together",
            "a plain LoRA on a base that is not quantised",
            "set RETUNER_STRATEGY or --strategy to ddp",
        )


def is_sharded(model: Any) -> bool:
    """Whether this process has but parts of it."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in model.parameters())


def sharding(trainer_class: type) -> type:
    """A Trainer class whose model is in parts while it trains. When `train` returns, what learned is whole again."""
    import torch
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import state_dict as whole

    class Sharding(trainer_class):  # type: ignore[misc,valid-type]
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if self.accelerator.distributed_type != DistributedType.FSDP:
                state = self.accelerator.state
                state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
                if state.mixed_precision != "no":
                    state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
                state.distributed_type = DistributedType.FSDP
                self.is_fsdp_enabled = True

        def train(self, *args, **kwargs):
            done = super().train(*args, **kwargs)
            for name, weight in self._what_learns().items():
                place, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(place), leaf, torch.nn.Parameter(weight.full_tensor()))
            return done

        def _what_learns(self):
            return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

        def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
            if resume_from_checkpoint:
                load_weights(self.model, load_file(Path(resume_from_checkpoint) / WEIGHTS))
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            """Done above, before the model was in parts."""

        def save_model(self, output_dir=None, _internal_call=False):
            weights = {name: weight.full_tensor().cpu() for name, weight in self._what_learns().items()}
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)

        def _save_optimizer_and_scheduler(self, output_dir):
            options = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
            named = whole.get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
            if self.args.should_save:
                names = self._names_by_number()
                # Of sgd there is none.
                numbered = {
                    number: named["state"][name]
                    for number, name in enumerate(names)
                    if name in named["state"]
                }
                groups = self.optimizer.optimizer.state_dict()["param_groups"]
                torch.save({"state": numbered, "param_groups": groups}, Path(output_dir) / OPTIMIZER)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is None:
                return
            read = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
            if not read["state"]:  # In which torch's function looks for a device.
                self.optimizer.optimizer.load_state_dict(read)
                return
            names = self._names_by_number()
            named = {
                "state": {names[number]: state for number, state in read["state"].items()},
                "param_groups": [
                    {**group, "params": [names[number] for number in group["params"]]}
                    for group in read["param_groups"]
                ],
            }
            options = whole.StateDictOptions(full_state_dict=True)
            whole.set_optimizer_state_dict(self.model, self.optimizer.optimizer, named, options=options)

        def _names_by_number(self):
            """Of what learns, as an optimizer numbers it."""
            names = {id(weight): name for name, weight in self._what_learns().items()}
            groups = self.optimizer.optimizer.param_groups
            return [names[id(weight)] for group in groups for weight in group["params"]]

    return Sharding
