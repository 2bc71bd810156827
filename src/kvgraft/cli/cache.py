"""``kvgraft cache``: keep the teachers' KV."""

from __future__ import annotations

from kvgraft.cli.shared import Overrides, RecipePath, app, console, recipe_at


@app.command()
def cache(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Run RECIPE's teachers once and keep their KV on disk. What is there already is not done again.

    Several processes: accelerate launch --multi_gpu --num_processes 2 -m kvgraft cache RECIPE, on CPUs too.
    """
    loaded = recipe_at(recipe, overrides)
    from kvgraft.errors import RecipeError
    from kvgraft.plan import require_workable
    from kvgraft.prepare import prepare
    from kvgraft.prepare_logits import prepare_logits
    from kvgraft.processes import process_state
    from kvgraft.report.tables import dropped_text
    from kvgraft.store.reader import KVStore

    if loaded.kv_loss.source == "online":
        raise RecipeError(
            "kv_loss.source is online, which keeps no KV; leave it out (or --set kv_loss.source=store) to make a store"
        )
    require_workable(loaded)
    prepared = prepare(loaded)
    for teacher in prepared.teachers if process_state().is_main_process else ():
        store, speed = teacher.store, teacher.report.tokens_per_second
        assert isinstance(store, KVStore)
        done = f"captured at {speed:,.0f} tokens per second" if speed else "was there already"
        console.print(
            f"{teacher.recipe.name}: KV of {store.num_tokens:,} tokens, "
            f"{store.total_bytes / 1e6:,.1f} MB, {done}: {store.folder}",
            soft_wrap=True,
        )
        console.print(
            f"  {teacher.alignment.coverage:.2%} of the student's tokens have one of this teacher's, "
            f"{teacher.alignment.mean_span:.2f} on average; without: {dropped_text(teacher.alignment.dropped)}",
            soft_wrap=True,
        )
    logits = prepare_logits(prepared) if loaded.logit_loss.source == "store" else None
    for source in logits.train if logits else []:
        assert source.store is not None
        console.print(
            f"{source.name}: log-probabilities of {source.store.num_tokens:,} tokens, "
            f"{source.store.total_bytes / 1e6:,.1f} MB, {source.store.distribution_bytes_per_token} bytes a token for "
            f"the {source.store.identity.top_k} most likely and the rest: {source.store.folder}",
            soft_wrap=True,
        )
