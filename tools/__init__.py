"""Commands around a training run, each `python -m tools.<name>`."""
