"""Experiments that anyone can repeat: `python -m evidence`."""
