"""docs/contract.md lists every refusal of the contract with its text: made from the source, and compared here.

`python -m tests.unit.test_refusals` writes the list into the page anew.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "contract.md"
BEGIN, END = "<!-- refusals: made by tests/unit/test_refusals.py -->\n", "<!-- end of refusals -->\n"
ERRORS = {
    "RefError", "CorruptImageError", "MissingImageError", "AssetError",
    "TransportError", "ImageError", "SourceError", "LayoutError", "RenderError",
    "HistoryError", "UnsupportedContentError",
}  # fmt: skip
HELPERS = {"invalid": "400 invalid_mm_image_ref"}
FILES = [
    "images/sources.py",
    "images/decode.py",
    "images/structure.py",
    "images/store.py",
    "images/remote.py",
    "assets/client.py",
    "refs/descriptor.py",
    "refs/wire.py",
    "refs/mm_refs.py",
    "families/qwen_vl.py",
    "families/kimi_k25.py",
    "families/gemma3.py",
    "families/base.py",
    "pixels/reader.py",
    "render/raw.py",
    "inference/features.py",
    "inference/prompt.py",
    "sessions/history.py",
    "sessions/session.py",
    "transport/types.py",
]


def text_of(node: ast.expr) -> str | None:
    """A message with `...` for what is filled in; None if it is another error's text handed on."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None else left + (right if right is not None else "...")
    return None


def refusals() -> list[tuple[str, str, str]]:
    """File, error and text of every refusal, in the order of the source."""
    rows = []
    for name in FILES:
        tree = ast.parse((ROOT / "src" / "pointillist" / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                error = node.exc.func.id
                if error in ERRORS or error in HELPERS:
                    text = text_of(node.exc.args[0])
                    if text is not None and text.strip(". :") != "":
                        rows.append((name, HELPERS.get(error, error), " ".join(text.split()), node.lineno))
    rows.sort(key=lambda row: (FILES.index(row[0]), row[3]))
    return [row[:3] for row in rows]


def table() -> str:
    lines = ["| where | error | text |", "| --- | --- | --- |"]
    lines += [f"| `{where}` | {error} | {text.replace('|', chr(92) + '|')} |" for where, error, text in refusals()]
    return "\n".join(lines) + "\n"


def test_the_page_lists_every_refusal() -> None:
    page = PAGE.read_text()
    assert page.split(BEGIN)[1].split(END)[0] == table(), "run python -m tests.unit.test_refusals"


def test_the_list_is_not_empty_by_mistake() -> None:
    rows = refusals()
    assert len(rows) > 60
    assert {row[0] for row in rows} == set(FILES)


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
