"""What only a GPU can tell, measured by one command: `python -m tools.bench gpu --minutes 9 --out DIR`."""
