"""Gradients of a recipe's first training steps; run as a module it saves them, in as many processes as launched."""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from kvgraft.distill.arms import build_arm, training_arguments, training_batches
from kvgraft.distill.trainer import KVTrainer
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.run import arm_data


class KeepGradients(TrainerCallback):
    """Keeps every parameter's gradient just before each optimizer step, unclipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def gradients(recipe: Recipe, output: Path, arm: str = "kv") -> tuple[list[dict[str, Tensor]], KVTrainer]:
    data = arm_data(prepare(recipe))
    keep = KeepGradients()
    trainer = KVTrainer(
        build_arm(recipe, arm, data),
        training_arguments(recipe, output),
        training_batches(recipe, data.train_set(arm, recipe.seed), data.collator),
        data.held_out_set(arm),
        data.tokenizer,
        data_collator=data.collator,
        callbacks=[keep],
        projector_learning_rate=recipe.training.projector_learning_rate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return keep.steps, trainer


if __name__ == "__main__":
    recipe_path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    steps, trainer = gradients(load_recipe(recipe_path), folder / "checkpoints")
    if trainer.is_world_process_zero():
        torch.save(
            {
                "steps": [{name.removeprefix("module."): grad for name, grad in step.items()} for step in steps],
                "log": trainer.state.log_history,
                "processes": trainer.accelerator.num_processes,
            },
            folder / "gradients.pt",
        )
    # A process that leaves while another still talks to it takes that one down with an abort.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
