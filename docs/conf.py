"""Sphinx settings: furo, built-in extensions, matplotlib's plot directive, one local extension; no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import dynakern

project = "dynakern"
author = "The dynakern developers"
copyright = "2026, the dynakern developers"
version = release = dynakern.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "matplotlib.sphinxext.plot_directive",
    "results",
]
html_theme = "furo"
html_title = "dynakern"
html_static_path = []
exclude_patterns = ["_build", "_generated", "_ext", "results"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
plot_include_source = True
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 110)]
