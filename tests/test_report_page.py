"""Maps, images and the page: that they show what they were given, and fetch nothing from elsewhere."""

import base64
import html.parser
import io
import itertools
import re
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from revprop.report import (
    Section,
    Table,
    deviation_bars,
    discrepancy_maps,
    figure_to_png_uri,
    figure_to_svg,
    write_page,
)


def test_maps_are_drawn_by_magnitude_on_one_scale_per_layer():
    first = np.zeros((3, 4, 5))
    first[2, 1, 1] = -7.0
    figure = discrepancy_maps({"conv1": first, "fc1": np.linspace(0, 2, 6), "flat": np.zeros((1, 2, 2))}, "Digit 3")
    images = [axes.get_images()[0] for axes in figure.axes if axes.get_images()]
    assert len(images) == 3 + 1 + 1
    np.testing.assert_array_equal([image.get_array() for image in images[:3]], np.abs(first))
    assert [image.get_clim() for image in images] == [(0, 7), (0, 7), (0, 7), (0, 2), (0, 1)]
    assert images[3].get_array().shape == (1, 6)
    assert figure.get_label() == (
        "Digit 3: |recorded - wanted| by channel and position, for conv1 (3 channels), fc1 (6 units), flat (1 channel)."
    )


def test_at_most_sixteen_channels_are_drawn_and_it_says_so():
    maps = np.arange(40.0)[:, None, None] * np.ones((40, 3, 3))
    figure = discrepancy_maps({"conv1": maps}, "T")
    images = [axes.get_images()[0] for axes in figure.axes if axes.get_images()]
    assert [image.get_array()[0, 0] for image in images] == list(range(16))
    assert {image.get_clim() for image in images} == {(0, 39)}
    assert any("16 of 40 channels" in text.get_text() for text in figure.texts)


def test_maps_do_not_overlap_nor_leave_the_figure():
    sizes = {"a": (3, 32, 32), "b": (20, 6, 6), "wide": (2, 3, 300), "tall": (9, 300, 3), "v": (128,), "s": (7, 5)}
    figure = discrepancy_maps({name: np.ones(size) for name, size in sizes.items()}, "T")
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1 and box.y1 <= 1 for box in boxes)
    for one, other in itertools.combinations(boxes, 2):
        assert one.x1 <= other.x0 or other.x1 <= one.x0 or one.y1 <= other.y0 or other.y1 <= one.y0


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({}, "no layer to draw"),
        ({"conv1": np.ones((2, 3, 4, 5))}, r"conv1 has shape \(2, 3, 4, 5\)"),
        ({"conv1": np.ones(0)}, r"conv1 has shape \(0,\)"),
        ({"conv1": [1.0, np.nan]}, "conv1 has values that are not finite"),
    ],
)
def test_maps_that_cannot_be_drawn_are_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        discrepancy_maps(maps, "T")


def test_svg_says_what_it_shows_and_fetches_nothing():
    figure = discrepancy_maps({"a<b": np.ones((2, 3, 3))}, 'Digit "3" \\1 & more')
    svg = figure_to_svg(figure)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == figure.get_label()
    assert root.find("{http://www.w3.org/2000/svg}title").text == figure.get_label()
    assert not re.search(r"(href|src)\s*=\s*[\"'](?!#|data:)|url\((?!#)|<metadata|<!DOCTYPE|<\?xml", svg)
    again = discrepancy_maps({"a<b": np.ones((2, 3, 3))}, 'Digit "3" \\1 & more')
    assert figure_to_svg(again) == svg


def test_a_figure_that_does_not_say_what_it_shows_is_refused():
    with pytest.raises(ValueError, match="set_label"):
        figure_to_svg(Figure())


def test_the_png_address_holds_the_image():
    address = figure_to_png_uri(Figure(figsize=(2, 1)), dots_per_inch=50)
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    assert matplotlib.image.imread(io.BytesIO(base64.b64decode(content))).shape == (50, 100, 4)


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page_arguments():
    table = Table("Deviations", ["layer", "deviation"], [["conv1", 0.25], ["fc1", 0.125]])
    bars = deviation_bars([{"layer": "conv1", "deviation": 0.25}, {"layer": "fc1", "deviation": 0.125}])
    maps = {"conv1": np.ones((20, 4, 4)), "fc1": np.ones(10)}
    return {
        "title": "Features & <labels>",
        "lead": "First thing.\n\nSecond thing,\nin two lines.",
        "sections": [
            Section("Diagnosis", "Some text.", [table], [discrepancy_maps(maps, "3"), bars]),
            Section("Results", tables=[table, table], figures=[bars], reading="Up is better."),
            Section("Results", "<script>alert(1)</script>"),
        ],
    }


def test_the_page_is_complete_and_fetches_nothing(tmp_path, page_arguments):
    path = tmp_path / "new" / "page.html"
    assert write_page(path, **page_arguments) == path
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"https?://|@import|url\(", text)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "Features & <labels>" in page.text
    assert "Second thing, in two lines." in page.text
    assert "<script>alert(1)</script>" in page.text
    assert page.text.count("How to read this.") == 1
    assert "Up is better." in page.text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert list(path.parent.iterdir()) == [path]


def test_the_contents_lead_to_every_section(tmp_path, page_arguments):
    page = Page(write_page(tmp_path / "page.html", **page_arguments).read_text(encoding="utf-8"))
    names = [attributes["id"] for attributes in page.all("section")]
    assert names == ["1-diagnosis", "2-results", "3-results"]
    assert [attributes["href"] for attributes in page.all("a")] == [f"#{name}" for name in names]


def test_figures_are_embedded_with_their_alternative_texts(tmp_path, page_arguments):
    page = Page(write_page(tmp_path / "page.html", **page_arguments).read_text(encoding="utf-8"))
    figures = [figure for section in page_arguments["sections"] for figure in section.figures]
    images = page.all("img")
    assert [image["alt"] for image in images] == [figure.get_label() for figure in figures]
    for image in images:
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(content)).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_arguments_give_the_same_page_and_replace_the_old_one(tmp_path, page_arguments):
    path = tmp_path / "page.html"
    first = write_page(path, **page_arguments).read_bytes()
    assert write_page(path, **page_arguments).read_bytes() == first
    assert write_page(path, "Other", "", [Section("One")]).read_bytes() != first


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = write_page(tmp_path / "page.html", "Old", "", [Section("One")])
    old = path.read_bytes()
    with pytest.raises(ValueError, match="no section"):
        write_page(path, "New", "", [])
    with pytest.raises(ValueError, match="set_label"):
        write_page(path, "New", "", [Section("One", figures=[Figure()])])
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
