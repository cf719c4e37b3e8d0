"""One self-contained HTML page: nothing in it is fetched from anywhere, so it can be mailed, archived and printed."""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from revprop.report.figures import figure_to_svg
from revprop.report.tables import Table
from revprop.runs import write_atomically


@dataclass(frozen=True)
class Section:
    """One section of a page.

    Args:
        heading: its heading, which the table of contents repeats.
        text: plain text; an empty line starts a new paragraph.
        tables: shown below the figures.
        figures: shown below the text; the label of each (`figure.set_label`) says what it shows.
        reading: how to read the tables and figures, set apart from the text.

    Example:
        >>> Section("Results", "First.\\n\\nSecond.").paragraphs
        ['First.', 'Second.']
    """

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    reading: str = ""

    @property
    def paragraphs(self) -> list[str]:
        """The text, cut at empty lines."""
        return _paragraphs(self.text)


@dataclass(frozen=True)
class _Image:
    address: str
    alternative: str
    width: int


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a page of text, tables and figures as one HTML file that needs no other.

    The same arguments give the same bytes. A reader of the file, or a kill, meets the old page or the whole new one.

    Args:
        path: the file to write; its folder is made if need be.
        title: the title of the page.
        lead: what the page shows and what came out, first thing; plain text, an empty line starts a new paragraph.
        sections: its sections, at least one.

    Returns:
        The path.

    Raises:
        ValueError: there is no section, or a figure has no label to stand in for it.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_page(Path(folder) / "page.html", "Digits", "All is well.", [Section("Results", "None.")])
        ...     "<h1>Digits</h1>" in page.read_text(encoding="utf-8")
        True
    """
    if not sections:
        raise ValueError(f"the page {title!r} has no section: there is nothing to show")
    template = importlib.resources.files("revprop.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.from_string(template).render(
        title=title,
        lead=_paragraphs(lead),
        parts=[
            {
                "name": _name_of(number, section.heading),
                "section": section,
                "images": [_image_of(figure) for figure in section.figures],
            }
            for number, section in enumerate(sections, start=1)
        ],
    )
    write_atomically(path, text)
    return path


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _name_of(number: int, heading: str) -> str:
    # The number keeps two sections with one heading apart.
    return f"{number}-{re.sub(r'[^a-z0-9]+', '-', heading.lower()).strip('-')}".rstrip("-")


def _image_of(figure: Figure) -> _Image:
    # As an image of its own, not as an element of the page: ids inside two figures may then be the same.
    svg = figure_to_svg(figure)
    address = "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")
    return _Image(address, str(figure.get_label()).strip(), round(96 * figure.get_figwidth()))
