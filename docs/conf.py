"""Sphinx configuration. `make docs` builds the site; it needs neither the network nor a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from batchnorm_cuda import __version__

project = "batchnorm_cuda"
author = "the batchnorm_cuda authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # MathJax in the site itself: formulas show without the network
]

# --- Markdown: the pages read the same on a forge, whose formulas are $...$ and ```math -----------
myst_enable_extensions = ["dollarmath", "deflist"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
# Formulas are full of \\ and & of their own; MyST would wrap them once more.
myst_update_mathjax = False

# --- Docstrings ---------------------------------------------------------------------------------
default_role = "code"  # docstrings quote names in single backticks
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of a dataclass as a list, not as entries of their own
napoleon_custom_sections = [("Shape", "returns_style")]
toc_object_entries_show_parents = "hide"

# Every reference must resolve, but for those to torch and Python: a build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing)\..*"),
    ("py:class", r"batchnorm_cuda\.(convert|fold)\.Model"),  # a type variable
]

# --- HTML ---------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"batchnorm_cuda {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
