"""Measures what a trained model's memory carries. `python evaluate.py --help` says how."""

import sys

from block_recurrent_transformer_pytorch.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
