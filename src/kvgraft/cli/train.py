"""``kvgraft train``: the main job."""

from __future__ import annotations

from pathlib import Path

from kvgraft.cli.shared import Output, Overrides, Overwrite, RecipePath, Resume, app, console, recipe_at, resumable


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Do everything RECIPE says: store the teachers' KV, train every arm, compare them, write a run folder.

    Several processes: accelerate launch --multi_gpu --num_processes 2 -m kvgraft train RECIPE, on CPUs too.
    """
    loaded = recipe_at(recipe, overrides)
    from kvgraft.errors import ResultError
    from kvgraft.processes import process_state
    from kvgraft.report.layers import layer_tables
    from kvgraft.report.tables import cost_table, result_table
    from kvgraft.run import run

    folder = output or Path("runs") / loaded.name
    with resumable("train", recipe, overrides, folder):
        result = run(loaded, folder, resume=resume, overwrite=overwrite)
    if process_state().is_main_process:
        console.print(result_table(result), cost_table(result), *layer_tables(result), sep="\n")
        console.print(f"everything is in {folder}: results.md, curves.png, experiment.yaml, students", soft_wrap=True)
        # Not in the other processes: a launcher ends this one, which writes the results, once another has failed.
        diverged = ", ".join(arm.arm for arm in result.arms if arm.has_diverged)
        if diverged:
            raise ResultError(
                f"{diverged} diverged: the student's held-out loss after training is no finite number. Try a lower "
                "training.learning_rate or more training.warmup_steps, with another --output"
            )
