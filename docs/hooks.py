"""Hooks of MkDocs: they execute the pages' Python blocks, cache their output in `.cache/docs`, and add the notebooks.

The key of a block consists of its code, the code of earlier blocks in its session, and everything else that its output
depends on: the package, `docs/figures.py`, the committed results, and the versions of other packages. Blocks that are
not in the cache are executed in parallel processes while MkDocs reads the pages.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cached_property, partial
from hashlib import sha256
from importlib.metadata import distributions
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from textwrap import dedent
from typing import Any

from markdown_exec import ExecutionError, base_format, code_block, formatters
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parents[1]))  # for calls of `mkdocs`; `python -m mkdocs` adds it itself
from docs.blocks import execute
from docs.notebooks import to_markdown

FILES = ("convexheads/**/*", "docs/*.py", "benchmarks/results/**/*.json")
PACKAGES = ("cvxpy", "cvxpylayers", "matplotlib", "numba", "numpy", "pillow", "qpth", "scikit-learn", "scipy", "torch")
"""Packages whose versions change the output of blocks."""
_BLOCK = re.compile(r'^( *)```python ([^\n]*exec="on"[^\n]*)\n(.*?)\n\1```$', re.DOTALL | re.MULTILINE)
_SESSION = re.compile(r'session="(.*?)"')


def fingerprint(root: Path) -> str:
    """A hash of everything that the output of a block depends on, except its code."""
    paths = {path for pattern in FILES for path in root.glob(pattern) if path.is_file()}
    found = sha256(sys.version.encode())
    for path in sorted(path for path in paths if "__pycache__" not in path.parts):
        found.update(f"{path.relative_to(root)}\0".encode() + sha256(path.read_bytes()).digest())
    for package in PACKAGES:
        found.update(next((each.version for each in distributions(name=package)), "").encode() + b"\0")
    return found.hexdigest()


OTHERS = ("torch._dynamo", "torch.optim", "matplotlib.figure", "numba", "scipy.stats", "sklearn.datasets")
"""Modules that most blocks import. If processes can be forked from a server, the server imports them once."""
MANY = 10
"""The server saves time if more than this number of sessions are executed."""


class Blocks:
    """The blocks of one build, and their output.

    Args:
        root: folder of `mkdocs.yml`.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / ".cache" / "docs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.version = fingerprint(root)
        self.sessions: defaultdict[str, list[str]] = defaultdict(list)
        self.running: dict[Path, tuple[list[Path], Future[tuple[list[str], str]]]] = {}
        self.used: set[Path] = set()
        self.page = ""  # the page that MkDocs is reading
        self.many = False  # whether more than MANY sessions are executed

    @cached_property
    def pool(self) -> ProcessPoolExecutor:
        """New processes, which import the current state of the package; `mkdocs serve` builds repeatedly."""
        os.environ["OMP_NUM_THREADS"] = "1"  # because there is one process per core
        context = get_context("spawn")
        if self.many and "forkserver" in get_all_start_methods():
            context = get_context("forkserver")
            context.set_forkserver_preload(list(OTHERS))
        return ProcessPoolExecutor(min(os.cpu_count() or 1, 4), mp_context=context)

    def path(self, codes: Sequence[str]) -> Path:
        """The file with the output of the last of a session's blocks."""
        return self.folder / (sha256("\0".join([self.version, *codes]).encode()).hexdigest() + ".txt")

    def paths(self, codes: Sequence[str]) -> list[Path]:
        """The files with the outputs of a session's blocks."""
        return [self.path(codes[: number + 1]) for number in range(len(codes))]

    def known(self, codes: Sequence[str]) -> bool:
        """Whether the outputs of all blocks of a session are in the cache."""
        return all(path.exists() for path in self.paths(codes))

    def start(self, codes: Sequence[str]) -> None:
        """Execute the blocks of a session, unless all outputs are in the cache."""
        if not self.known(codes):
            work = self.paths(codes), self.pool.submit(execute, codes)
            self.running.update(dict.fromkeys(work[0], work))

    def run(self, code: str, *, session: str = "", **_: Any) -> str:
        """The output of a block, in the interface of markdown-exec.

        Args:
            code: the source.
            session: name of the session, if it has one.

        Raises:
            ExecutionError: the block failed.
        """
        codes = self.sessions[session] if session else []
        codes.append(code)
        path = self.path(codes)
        self.used.add(path)
        if not path.exists():
            if path not in self.running:
                self.start(codes)
            paths, work = self.running[path]
            outputs, error = work.result()
            for each, output in zip(paths, outputs, strict=False):
                new = each.with_suffix(".new")
                new.write_text(output, encoding="utf-8")
                new.replace(each)
            if not path.exists():
                raise ExecutionError(code_block("python", f"A block of {self.page} failed.\n{error}"))
        return path.read_text(encoding="utf-8")

    def close(self, *, prune: bool) -> None:
        """End the processes and, with `prune`, delete outputs that this build did not use."""
        if "pool" in vars(self):
            self.pool.shutdown(cancel_futures=True)
        for path in self.folder.iterdir() if prune else ():
            if path not in self.used:
                path.unlink()


_blocks: Blocks


def on_config(config: MkDocsConfig) -> None:
    """Let markdown-exec go through the cache."""
    global _blocks
    _blocks = Blocks(Path(config.config_file_path).parent)
    formatters["python"] = partial(base_format, language="python", run=_blocks.run)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Start to execute the blocks of all pages, the longest code first, and let MkDocs read the pages in this order.

    Tutorials take most of the time, and no core should start one of them at the end. Pages without blocks come first:
    MkDocs reads them while the blocks are executed.
    """
    files = _add_notebooks(files, config)
    sessions: defaultdict[tuple[File, object], list[str]] = defaultdict(list)
    for file in files.documentation_pages():
        for _, options, code in _BLOCK.findall(file.content_string):
            session = _SESSION.search(options)
            sessions[file, session[1] if session else object()].append(dedent(code))
    lengths = {key: sum(map(len, codes)) for key, codes in sessions.items()}
    _blocks.many = sum(not _blocks.known(codes) for codes in sessions.values()) > MANY
    for key in sorted(sessions, key=lengths.__getitem__, reverse=True):
        _blocks.start(sessions[key])
    longest = {file: -lengths[file, session] for file, session in sorted(lengths, key=lengths.__getitem__)}
    return Files(sorted(files, key=lambda file: longest.get(file, -math.inf)))


def _add_notebooks(files: Files, config: MkDocsConfig) -> Files:
    """The files, and a page for each notebook; the notebook itself remains a file to download."""
    pages = [
        File.generated(
            config,
            file.src_uri.removesuffix(".ipynb") + ".md",
            content=to_markdown(file.content_string, file.src_uri, config.repo_url or ""),
        )
        for file in files
        if file.src_uri.endswith(".ipynb")
    ]
    return Files([*files, *pages])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Store the page for the message about a block that fails."""
    _blocks.page = page.file.src_uri


def on_post_build(config: MkDocsConfig) -> None:
    """Delete outdated outputs."""
    _blocks.close(prune=True)


def on_build_error(error: Exception) -> None:
    """Stop blocks that are still being executed."""
    _blocks.close(prune=False)
