"""Writes text with a trained model. `python generate.py --help` says how."""

import sys

from block_recurrent_transformer_pytorch.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
