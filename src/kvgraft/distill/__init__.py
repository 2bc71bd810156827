"""Training a student beside its teachers' KV: losses, objectives, the batch, and the Trainer."""
