"""The scenarios, each a program of its own: ``python -m loadtest.scenarios.NAME [--short] [--out FILE]``."""
