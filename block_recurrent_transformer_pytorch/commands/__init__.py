"""The programs train, evaluate and generate. Nothing in the package imports them."""
