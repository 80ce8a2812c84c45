"""How Sphinx makes the documentation: ``make docs``."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "criupy"
copyright = "the authors of criupy"  # noqa: A001 - the name that Sphinx reads
release = importlib.metadata.version("criupy")

extensions = [
    *("myst_parser", "sphinx.ext.autodoc"),
    *("command_options", "public_names", "rpc_options", "state_tables"),  # in _ext
]
exclude_patterns = ["_ext"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "criupy"
html_static_path = ["_static"]
html_css_files = ["criupy.css"]
default_role = "code"
add_module_names = False
python_maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
#: Names that say more than what they stand for.
autodoc_type_aliases = {name: name for name in ("Directory", "FeatureName", "StrPath")}
autodoc_preserve_defaults = True
nitpicky = True
# What is documented elsewhere or not at all: the standard library, trio, type variables, CRIU's messages.
nitpick_ignore_regex = [
    ("py:.*", r"(?!criupy).*"),
    ("py:.*", r"criupy\..*\.(D|P|T|_Message|_schema_pb2\.\w+)"),
    ("py:.*", r"criupy\.testing\.(_keeper_linux\.\w+|criu_linux\.Source)"),  # what harnesses hand on
]

man_pages = [
    ("commands/criupy", "criupy", "look at machines and checkpoints", "", 1),
    ("commands/criupy-lazy-pages", "criupy-lazy-pages", "serve the memory of a lazy restore", "", 1),
    ("commands/criupy-page-server", "criupy-page-server", "give out, relay or receive memory", "", 1),
]
man_show_urls = False
