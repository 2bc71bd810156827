"""A teacher's log-probabilities over the texts of a run, for the arms that learn from them: what their store holds."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from kvgraft.align.predictions import share_vocabulary, vocabulary_size
from kvgraft.data.chat import template_fingerprint
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.errors import RecipeError
from kvgraft.identify import IdentifiedModel
from kvgraft.recipe import Recipe
from kvgraft.recipe.sections import ACROSS_VOCABULARIES
from kvgraft.store.fill import store_folder
from kvgraft.store.fill_logits import LogitStoreToFill
from kvgraft.store.format import text_fingerprint
from kvgraft.store.logits import LogitIdentity


def log_probs_to_fill(
    model: IdentifiedModel, examples: Sequence[Example], encoded: Sequence[EncodedText], max_length: int, recipe: Recipe
) -> LogitStoreToFill:
    """The logit store of ``model`` over ``examples``, which it reads as ``encoded``, cut to ``max_length`` tokens."""
    # Likelihoods of chunks need those of the text's own tokens alone.
    top_k = 0 if recipe.logit_loss.form == "chunk_likelihood" else recipe.logit_loss.top_k
    settings = recipe.store
    identity = LogitIdentity(
        model=model.fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        text=text_fingerprint(text.sample_key for text in encoded),
        max_length=max_length,
        vocabulary=vocabulary_size(model.tokenizer),
        top_k=top_k,
        temperature=recipe.logit_loss.temperature if top_k else 1.0,
        template=template_fingerprint(examples, model.tokenizer),
    )
    folder = store_folder(settings.path, f"{model.recipe.name}-logits", identity)
    return LogitStoreToFill(folder, identity, settings.shard_megabytes * 1_000_000, settings.verify)


def reads_one_vocabulary(
    recipe: Recipe, teacher: str, own: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> bool:
    """Whether the student (``own``) and ``teacher`` share a vocabulary.

    Raises:
        RecipeError: they do not, and the logit loss needs it.
    """
    shared = share_vocabulary(own, theirs)
    if not shared and recipe.logit_loss.form not in ACROSS_VOCABULARIES:
        own_ids, their_ids = own.get_vocab(), theirs.get_vocab()
        same = sum(their_ids.get(token) == index for token, index in own_ids.items())
        raise RecipeError(
            f"logit_loss.form {recipe.logit_loss.form} compares distributions over one vocabulary, and teacher "
            f"{teacher} has another tokenizer than the student: {same:,} of the student's {len(own_ids):,} tokens have "
            f"the same id in the teacher's {len(their_ids):,}. Give the student the teacher's tokenizer "
            "(student.tokenizer), or use logit_loss.form sorted_probability or chunk_likelihood"
        )
    return shared
