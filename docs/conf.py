"""Sphinx settings of `make docs`: README, docs/, kernels/README.md and the pages of results; warnings are errors.

The pages are those that GitHub shows; their order on the site is that of the links in docs/README.md.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(((?!https?:)[^)#\s]+\.md)\)")

project = "vold"
author = "the vold authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "docs/README"
include_patterns = ["README.md", "*.md", "docs/*.md", "kernels/README.md", "benchmarks/results/*.md"]
html_theme = "furo"
html_title = "vold"
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
default_role = "code"
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
python_use_unqualified_type_names = True
suppress_warnings = ["misc.highlighting_failure"]  # excerpts of output between fences

TOCTREE = "\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n{pages}\n```\n"
PICTURE = re.compile(
    r'<picture>\s*<source media="[^"]*dark[^"]*" srcset="([^"]*)">\s*<img src="([^"]*)" alt="([^"]*)">\s*</picture>'
)
IMAGE = "```{{image}} {source}\n:alt: {alt}\n:class: {shown}\n```\n"
PARAMETER = re.compile(r"^(\*{0,2}\w+(?:, \w+)*)(?:: |  +)(?=\S)")


def pages_in_order(index: str) -> list[str]:
    """Document names of the pages that docs/README.md links, in its order, then the repository's own."""
    linked = [(ROOT / "docs" / link).resolve().relative_to(ROOT).with_suffix("") for link in LINK.findall(index)]
    return list(dict.fromkeys([*map(str, linked), "README", "CHANGELOG", "CONTRIBUTING", "SECURITY"]))


def add_toctree(app, docname: str, source: list[str]) -> None:
    """The index page gets the side bar's tree, which GitHub's view does without."""
    if docname == root_doc:
        pages = "\n" + "\n".join(f"/{page}" for page in pages_in_order(source[0]))
        source[0] += TOCTREE.format(caption="Pages", pages=pages)
        source[0] += TOCTREE.format(caption="Measured", pages=":glob:\n\n/benchmarks/results/*")


def pictures_by_scheme(app, docname: str, source: list[str]) -> None:
    """A `<picture>` with a dark version, which GitHub shows, as the theme's pair of images, copied to the site."""
    source[0] = PICTURE.sub(
        lambda found: (
            IMAGE.format(source=found[1], alt=found[3], shown="only-dark")
            + "\n"
            + IMAGE.format(source=found[2], alt=found[3], shown="only-light")
        ),
        source[0],
    )


def docstring_as_fields(app, what, name, obj, options, lines: list[str]) -> None:
    """Our docstrings as reStructuredText: `name: text` at the left becomes a field, other indentation is joined."""
    written: list[str] = []
    in_field = False
    for line in lines:
        if field := PARAMETER.match(line):
            written += ["", *(f":param {name}: {line[field.end() :]}" for name in field[1].split(", "))]
        elif in_field and line.startswith(" "):
            written.append(line)
        else:
            written += [""] * in_field + [line.lstrip()]
        in_field = bool(field) or (in_field and line.startswith(" "))
    lines[:] = [line.replace("|", r"\|") for line in written]


def setup(app) -> None:
    app.connect("source-read", add_toctree)
    app.connect("source-read", pictures_by_scheme)
    app.connect("autodoc-process-docstring", docstring_as_fields)
