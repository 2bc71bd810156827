"""Teachers' KV on disk: a cost paid once."""
