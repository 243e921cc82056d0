"""The install lines of the documentation work in a checkout and name extras that there are."""

from __future__ import annotations

import re
import shlex

from installing import ROOT, project
from packaging.requirements import Requirement

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINE = re.compile(r"`(pip install [^`…]+)`|^(pip install .+)$", re.MULTILINE)


def test_lines_name_extras_of_the_checkout_or_other_packages() -> None:
    extras, seen = set(project()["optional-dependencies"]), set()
    for page in PAGES:
        for found in LINE.findall(page.read_text(encoding="utf-8")):
            for word in shlex.split("".join(found), comments=True)[2:]:
                if word.startswith("."):
                    named = set(word[1:].strip("[]").split(",")) - {""}
                    assert named <= extras, (page, word)
                    seen |= named
                elif not word.startswith("-"):
                    assert Requirement(word).name != "convexheads", (page, word)  # is on no index yet
    assert {"bench", "learn2learn"} <= seen
