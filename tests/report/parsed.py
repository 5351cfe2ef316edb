"""A report as its tests see it: nested elements, tags, text and scripts, and that it asks for nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

_VOID = {"meta", "br", "line", "circle", "rect", "polyline", "polygon", "input"}


class Page(HTMLParser):
    """Collects tags, text and scripts, and checks that elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def of(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        """The attributes of every element of a tag, or of those whose class begins so."""
        return [attributes for name, attributes in self.tags if name == tag
                and (attributes.get("class") or "").startswith(style)]  # fmt: skip

    def is_self_contained(self) -> None:
        """No element, attribute or script could ask for something from outside, and the page's policy forbids it too."""
        assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in self.tags}
        for _, attributes in self.tags:
            assert not {"src", "href", "srcset", "action"} & attributes.keys()
            assert not [name for name in attributes if name.startswith("on")]
        (policy,) = [str(each["content"]) for each in self.of("meta") if each.get("http-equiv")]
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src ")
        allowed = re.findall(r"'sha256-([^']+)'", policy)
        assert allowed == [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in self.scripts]


def parsed(text: str) -> Page:
    """The page; every element is closed."""
    page = Page()
    page.feed(text)
    assert page.open == []
    return page
