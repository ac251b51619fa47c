"""The documentation site, `make docs`. Sphinx, because it reads docstrings and checks references; myst-parser reads
the pages as they are, and furo shows them in light and dark, narrow and wide."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
init = (ROOT / "block_recurrent_transformer_pytorch" / "__init__.py").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT))
release = next(line.split('"')[1] for line in init.splitlines() if line.startswith("__version__"))

project = "Block-Recurrent Transformer"
copyright = "the block_recurrent_transformer_pytorch authors, MIT License"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
default_role = "code"  # a docstring's `name`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_param = False
