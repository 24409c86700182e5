"""Runnable recipes: `python -m recipes.<name> --help`. They import everything; nothing imports them."""
