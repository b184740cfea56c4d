"""What the documents at the root link to is there, in the checkout and in the source distribution."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# setuptools takes these by itself.
ALWAYS = {"README.md", "LICENSE", "pyproject.toml", "MANIFEST.in"}


@pytest.mark.parametrize("document", ["README.md", "FAQ.md"])
def test_every_link_leads_somewhere_in_the_distribution_too(document: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", (ROOT / document).read_text())
    assert links
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    carried = ALWAYS | {name for line in lines if line and line[0] in ("include", "graft") for name in line[1:]}
    for link in links:
        assert (ROOT / link).exists(), link
        assert Path(link).parts[0] in carried, link
