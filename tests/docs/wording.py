"""Finds phrases that CONTRIBUTING.md advises against. `make lint` runs it; single words are codespell's task."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".md", ".yml", ".toml", ".cu", ".cpp"}
SKIPPED = ("benchmarks/results/", "tests/docs/wording.py")
THINGS = "examples?|samples?|shots?|queries|images?|sheets?|letters?|files?|slacks?|tasks?|episodes?|one|two|three|hour"
PHRASES = {
    rf"\b({THINGS}|\d) an? (class|task|shot|step|batch|example|epoch|second)\b": "per class, per task, ...",
    r"\bso many\b": "the name of the number",
    r"\b(goes|going|go) on for ?ever\b|\bfor ever\b": "never ends",
    r"\bof the draw\b": "random seed",
    r"\bwhat(ever)? (comes|goes|came|stands)\b|\bwhatever they come\b": "a noun, such as input or result",
    r"\b(is|are|was|were) at hand\b|\bfor want of\b|\bwill do\b": "is available, lacks, is enough",
    r"\b(nothing|it) is (not )?checked\b": "what is validated, or nothing",
    r"\bof (one's|nobody's|somebody else's) own\b": "custom, another library's",
    r"\bgot [^.\n]{1,60}, wanted\b": "expected X, got Y",
    r"\bbe (it|they) (a|an|in|on|of)\b": "whether ... or ...",
    r"\bat (a )?right angles?\b": "orthogonal",
    r"\bsearch(es)? (has|have) failed\b|\bdoesn't tell\b|\bhard to defeat\b|\bheeds\b": "plain words for an algorithm",
}


def faults(text: str) -> list[str]:
    """The line, the phrase and the advice for each match; a phrase may be broken over two lines."""
    found = []
    for phrase, advice in PHRASES.items():
        for match in re.finditer(phrase.replace(" ", r"\s+(?:#\s+)?"), text, re.IGNORECASE):
            found.append(f"{text.count(chr(10), 0, match.start()) + 1}: '{match[0]}'; write: {advice}")
    return found


names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
paths = [name for name in names if Path(name).suffix in SUFFIXES and not name.startswith(SKIPPED)]
lines = [f"{name}:{fault}" for name in paths for fault in faults((ROOT / name).read_text(encoding="utf-8"))]
sys.exit("\n".join(lines) or 0)
