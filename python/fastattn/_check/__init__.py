"""What stands behind ``python -m fastattn``: `info`, `check` and `tune`, each a module of its own."""
