"""How Sphinx builds the documentation. `make docs` writes it to docs/_build; README.md there says how it is tested."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("_ext")))

from openmm_bg.version import __version__

project = "openmm_bg"
author = "the authors of openmm_bg"
project_copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
    "mathml",
    "notebook",
    "names",
    "sidebar",
]
exclude_patterns = ["_build", "README.md"]

# Every name must lead somewhere, but for those of other projects: their inventories are on the network
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|openmm|openmmtools|mdtraj|concurrent)\..*")]

# Docstrings give types with shapes and units, which annotations cannot; so signatures stay short
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autoclass_content = "both"
autosummary_generate = True
autosummary_ignore_module_all = False
numpydoc_show_class_members = False
default_role = "literal"

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"openmm_bg {release}"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "native"
