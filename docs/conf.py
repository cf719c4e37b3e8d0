"""Sphinx: Markdown pages, and the API page from docstrings. Build with ``make docs``."""

import inspect
import re

import revprop

project = "revprop"
author = project_copyright = "the revprop authors"
version = release = revprop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings use single backticks for code, too
myst_heading_anchors = 3
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"revprop {version}"
html_show_sphinx = html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # a method that only implements is described once, where it is abstract
napoleon_use_ivar = True  # attributes as a list of fields, so that a dataclass's are not described twice

SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:")


def tidy(app, what, name, obj, options, lines):
    """Docstrings are plain text: several entries may share a line, and ``|a|`` or ``a*`` are no markup."""
    names = [*_parameters(obj), *(vars(obj) if inspect.isclass(obj) else ())]
    entry = re.compile(rf"(?<=[.;]) (?=(?:\w+Error|{'|'.join(map(re.escape, names)) or '-'}): )")
    section, tidied = "", []
    for line in map(_escape, lines):
        if line.strip() and not line.startswith(" "):
            section = line if line in SECTIONS else ""
        elif section in SECTIONS[:3] and line.startswith("     "):
            line = f"{tidied.pop()} {line.strip()}"
        if section == "Returns:" or what in ("property", "attribute", "data"):
            line = line.replace(": ", " -- ")  # no type in front of the colon
        tidied.append(line)
        if section in SECTIONS[:3] and line.startswith(" "):
            parts = entry.split(tidied.pop().strip())
            tidied += [
                f"    {key}: {text}"
                for part in parts
                for keys, _, text in [part.rstrip(";").partition(": ")]
                for key in keys.split(", ")
            ]
    lines[:] = tidied


def _parameters(obj):
    try:
        return inspect.signature(obj).parameters
    except (TypeError, ValueError):
        return ()


def _escape(line):
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split(r"(``.*?``)", line)
    return "".join(part if part.startswith("``") else re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts)


def setup(app):
    app.connect("autodoc-process-docstring", tidy, priority=400)  # before napoleon reads the sections
