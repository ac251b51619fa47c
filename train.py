"""Trains a Block-Recurrent Transformer on any text. `python train.py --help` says how."""

import sys

from block_recurrent_transformer_pytorch.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
