"""What stands behind ``python -m fastattn``: `info`, `check` and `bench`, each a module of its own."""
