"""Pages and messages use the field's terms: phrases that readers did not understand do not come back."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

UNCLEAR = {
    r"\bby lot\b": "at random",
    r"\byardsticks?\b": "reference, baseline",
    r"\bdear\b": "expensive",
    r"\bstarv(e|es|ing)\b": "captures least",
    r"\bhears?\b|\bheard\b": "is called, gets",
    r"\bstrangers?\b": "unknown",
    r"\bcarried along\b": "stored and subtracted",
    r"\bcarry an offset\b": "cannot be re-initialized without changing the model",
    r"\bgo(es)? on (with|from|at|where)\b|\bcommand goes on\b": "continues",
    r"\bhas(ve)? room for\b|\brank with room\b": "at a sufficiently high rank",
    r"\brooms? (on|of|down)\b": "package",
    r"\bwhat is trained\b": "trainable parameters",
    r"\bwhat there is\b|\bwhat is there\b|\ball there is\b": "name the thing",
    r"\bthat there (is|are)\b": "that exists",
    r"\ball that remains?\b": "the remaining examples",
    r"\bit was made for\b": "its purpose",
    r"\bwhat was found\b": "the results",
    r"\b(can see|sees?) of the gradient\b|\bsees of\b": "captures of the gradient",
    r"\b(adapters?|LoRA|it|they) can(not)? follow\b": "captures",
    r"\bcan(not)? be told from\b": "is not significantly different from",
    r"\breads? gradients\b": "needs gradients",
    r"\bgive batches\b": "pass `batches`",
    r"\bmakes? up for\b": "is subtracted from",
    r"\bis no (PeftModel|plain|valid|run|folder|tangora|adapter|text|option|finished)\b": "is not a ...",
    r"\bleave it out\b|\bleave one (of them )?out\b": "omit it",
    r"\bmake (it|the \w+|an? \w+) anew\b|\bbegin anew\b": "create a new one",
    r"\bthe time was over\b": "--max-hours is too small",
    r"\bgive more hours\b": "--max-hours is too small",
    r"\blook beside\b": "cannot be combined with",
    r"\bnothing but\b": "only",
    r"\bstands? there twice\b": "occurs twice",
    r"\bwhat (that|this|it) loses\b|\bwhat that lost\b": "relative error of the truncation",
    r"\bof the (weight|factor|rank)s?['’]s? size\b": "of the shape of the weight",
    r"\basks? for much\b|\bmuch to (remember|be remembered)\b": "memorisation task",
    r"\buntouched base\b": "original base",
    r"\bnobody\b|\beverybody\b|\bsomebody\b": "name the thing",
}
"""Phrases that a first reading does not understand, and what to write instead."""


def written(path: Path) -> Iterator[str]:
    """Yield the texts of a page, without code, or those of a module: docstrings, messages and parts of f-strings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def unclear(text: str) -> list[str]:
    """Return the unclear phrases of a text, each with its replacement."""
    text = " ".join(text.split())
    found = ((re.search(phrase, text, re.IGNORECASE), better) for phrase, better in UNCLEAR.items())
    return [
        f"...{text[max(match.start() - 30, 0) : match.end() + 30]}... (write: {better})"
        for match, better in found
        if match is not None
    ]


def test_a_phrase_is_found_across_lines():
    assert len(unclear("Each image has one of ten classes by\nlot.")) == 1
    assert unclear("Each image has one of ten classes at random.") == []


def test_pages_and_messages_have_no_unclear_phrases():
    found = {
        f"{path.relative_to(ROOT)}: {phrase}"
        for path in [*PAGES, *SOURCES]
        for text in written(path)
        for phrase in unclear(text)
    }
    assert not found, "\n".join(sorted(found))
