"""Turns the notebooks of the documentation into pages, with the outputs that were committed; nothing is executed."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

_COLAB = "https://colab.research.google.com/github/"
_CODE = re.compile(r"\x1b\[[0-9;]*m")  # colors of a terminal


def to_markdown(text: str, name: str, repository: str = "") -> str:
    """The Markdown of a page: title, links to the notebook, cells, and their outputs.

    Args:
        text: the notebook, as JSON.
        name: path of the notebook within the documentation.
        repository: address of the repository on GitHub, if it is known; then the page links to Colab.
    """
    cells = [_cell(each) for each in json.loads(text)["cells"]]
    title, _, rest = cells[0].partition("\n")
    links = [f"[Download the notebook]({PurePosixPath(name).name}){{ .md-button download }}"]
    if repository:
        address = _COLAB + "/".join(repository.rstrip("/").removesuffix(".git").split("/")[-2:])
        links.insert(0, f"[Open in Colab]({address}/blob/main/docs/{name}){{ .md-button }}")
    return "\n\n".join([title, " ".join(links), rest.strip(), *cells[1:]])


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return re.sub(r"\]\(([^)#:]+)\.ipynb", r"](\1.md", source)
    return "\n\n".join([f"````python\n{source}\n````", *filter(None, map(_output, cell["outputs"]))])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        encoded = "".join(data["image/png"]).strip().replace("/", "%2F")  # "//" looks like an address
        return f'<img class="output" alt="The picture that the cell draws" src="data:image/png;base64,{encoded}">'
    text = _CODE.sub("", "".join(output.get("text", data.get("text/plain", "")))).rstrip()
    return f"````text\n{text}\n````" if text else ""
