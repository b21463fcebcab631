"""Sphinx's settings of the site: make docs. What pages hold beside their text is in scripts/documentation.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "scripts", "tests")]

import documentation  # noqa: E402

import fobmaml  # noqa: E402

project, author, copyright = "fobmaml", "The fobmaml developers", "The fobmaml developers"
version = release = fobmaml.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["README.md"]
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "fobmaml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_search_summary = False  # it would be fetched, which a page opened from disk may not
html_copy_source = html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True}


def setup(app):
    documentation.connect(app)
