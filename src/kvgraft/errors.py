"""Errors a user can act on: each names the thing, what was given, what was expected and what to do."""


class KVGraftError(ValueError):
    """Base of every error that kvgraft raises on purpose; the command line prints it without a traceback."""


class RecipeError(KVGraftError):
    """A recipe that cannot be run as written."""


class ModelError(KVGraftError):
    """A model or tokenizer that cannot be found, loaded or captured."""


class DataError(KVGraftError):
    """Text that is missing, empty or in no form we know."""


class AlignmentError(KVGraftError):
    """Two tokenizations or two layer stacks that cannot be matched."""


class ProjectorError(KVGraftError):
    """A projector asked for a teacher, a width or a shape it was not built for."""


class StoreError(KVGraftError):
    """A KV store that is damaged, incomplete, or was made from something else."""


class GraftError(KVGraftError):
    """A cache that cannot be made for a student, or not from what was given."""


class ResultError(KVGraftError):
    """A result that is missing, damaged, of a newer version, or cannot be set beside another."""


class TrainingInterruptedError(KVGraftError):
    """Training was stopped on request and left a checkpoint."""


class ReportError(KVGraftError):
    """A report that cannot be made from what it was given."""
