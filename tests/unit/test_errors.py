"""One error tree, with fields: drawn in docs/errors.md, and no code reads an error's text back.

`python -m tests.unit.test_errors` draws the tree into the page anew.
"""

import ast
import builtins
import copy
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointillist.base.http_errors import as_request_error, error_body
from pointillist.errors import (
    ConfigError,
    ContextLengthError,
    FieldError,
    ImageError,
    InferenceError,
    MissingImageError,
    PointillistError,
    RequestError,
    SourceError,
    StorageError,
    shown,
)
from tests.helpers.files import ROOT

SOURCE = ROOT / "src"
PAGE = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- tree: made by tests/unit/test_errors.py -->\n", "<!-- end of tree -->\n"


@dataclass(frozen=True, slots=True)
class Class:
    """A class of the source."""

    path: Path
    bases: list[str]
    says: str
    """First line of its docstring."""
    own: dict[str, object]
    """Constants that its body sets."""


def _classes() -> dict[str, Class]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
                says = (ast.get_docstring(node) or "").partition("\n\n")[0]
                found[node.name] = Class(path.relative_to(SOURCE), bases, says, dict(_constants(node)))
    return found


def _constants(node: ast.ClassDef) -> list[tuple[str, object]]:
    assigned = [each for each in node.body if isinstance(each, ast.AnnAssign | ast.Assign)]
    named = [(each.target if isinstance(each, ast.AnnAssign) else each.targets[0], each.value) for each in assigned]
    return [(ast.unparse(target), value.value) for target, value in named if isinstance(value, ast.Constant)]


def _builtin_exceptions() -> set[str]:
    return {
        name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
    }


def test_every_exception_of_ours_stands_in_the_tree() -> None:
    classes, builtin = _classes(), _builtin_exceptions()

    def roots(name: str) -> set[str]:
        if name == PointillistError.__name__ or name not in classes:
            return {name}
        return set().union(*(roots(base) for base in classes[name].bases))

    outside = [
        f"{found.path}: {name}"
        for name, found in classes.items()
        if found.bases and name != PointillistError.__name__
        and roots(name) & builtin and PointillistError.__name__ not in roots(name)
    ]  # fmt: skip
    assert outside == []
    assert sum(PointillistError.__name__ in roots(name) for name in classes) > 15


# The page ------------------------------------------------------------------------------------------------------------


def tree() -> str:
    """The table of the page: a row a public class, below its parent, with what `retryable` and `fault` it has."""
    classes = _classes()
    lines = ["| error | raised for | whose fault | retryable |", "| --- | --- | --- | --- |"]

    def draw(name: str, depth: int, fault: object, retryable: object) -> None:
        found = classes[name]
        fault, retryable = found.own.get("fault", fault), found.own.get("retryable", retryable)
        if not name.startswith("_"):
            where = "" if found.path.name == "errors.py" else f" (`{found.path}`)"
            says = " ".join(found.says.split()).replace("|", "\\|")
            cells = [f"{'&emsp;' * depth}`{name}`{where}", says, str(fault), "yes" if retryable else "no"]
            lines.append(f"| {' | '.join(cells)} |")
        for child, each in classes.items():
            if name in each.bases:
                draw(child, depth + 1, fault, retryable)

    draw(PointillistError.__name__, 0, "system", False)
    return "\n".join(lines) + "\n"


def test_the_page_draws_the_tree() -> None:
    page = PAGE.read_text()
    assert page.split(BEGIN)[1].split(END)[0] == tree(), "run python -m tests.unit.test_errors"
    for child in PointillistError.__subclasses__():
        if child.__module__ == PointillistError.__module__:
            assert f"| {'&emsp;'}`{child.__name__}`" in page
            assert f"| {child.fault} | {'yes' if child.retryable else 'no'} |" in page


# No text is read back ------------------------------------------------------------------------------------------------

OF_LIBRARIES = {
    # msgspec's errors have no fields: where in a body they are stands in their text only.
    "pointillist/inference/protocol.py": {"_malformed"},
}
"""Functions that must read the text of another library's error."""
READERS = {
    "partition",
    "rpartition",
    "split",
    "rsplit",
    "splitlines",
    "startswith",
    "endswith",
    "find",
    "index",
    "match",
}
READERS |= {"search", "fullmatch", "findall"}


def text_readers(source: str) -> list[tuple[str, int]]:
    """Function and line of each place that reads an exception's text: compares it, looks for something in it, cuts it.

    A text is `str(error)`, `repr(error)`, `error.args[...]` or `error.message` of a name that is an exception, or a
    name that one of them is assigned to.
    """
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST, function: str, errors: frozenset[str], texts: frozenset[str]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function, texts = node.name, frozenset()
            annotated = [each for each in ast.walk(node.args) if isinstance(each, ast.arg) and each.annotation]
            errors |= {each.arg for each in annotated if each.annotation and _is_error(ast.unparse(each.annotation))}
        if isinstance(node, ast.ExceptHandler) and node.name:
            errors |= {node.name}

        def is_text(part: ast.AST) -> bool:
            match part:
                case ast.Call(func=ast.Name(id="str" | "repr"), args=[ast.Name(id=name)]):
                    return name in errors
                case ast.Subscript(value=ast.Attribute(value=ast.Name(id=name), attr="args")):
                    return name in errors
                case ast.Attribute(value=ast.Name(id=name), attr="message"):
                    return name in errors
                case ast.Call(func=ast.Attribute(value=value, attr="lower" | "strip" | "casefold" | "upper")):
                    return is_text(value)
                case ast.Name(id=name):
                    return name in texts
            return False

        match node:
            case ast.Compare(left=left, comparators=rights) if any(map(is_text, (left, *rights))):
                found.append((function, node.lineno))
            case ast.Call(func=ast.Attribute(value=value, attr=attr), args=arguments) if attr in READERS:
                if is_text(value) or any(map(is_text, arguments)):
                    found.append((function, node.lineno))
        children = list(ast.iter_child_nodes(node))
        for child in children:
            visit(child, function, errors, texts)
            if isinstance(child, ast.Assign) and is_text(child.value):
                texts |= {ast.unparse(target) for target in child.targets}

    visit(ast.parse(source), "", frozenset(), frozenset())
    return found


def _is_error(annotation: str) -> bool:
    return any(part.strip().rpartition(".")[2].endswith(("Error", "Exception")) for part in annotation.split("|"))


def test_no_code_reads_an_errors_text() -> None:
    reading: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if found := text_readers(path.read_text()):
            reading[str(path.relative_to(SOURCE))] = {function for function, _ in found}
    assert reading == OF_LIBRARIES


@pytest.mark.parametrize(
    "fault",
    [
        "try: f()\nexcept OSError as error:\n    x = 'corrupt' in str(error)",
        "try: f()\nexcept OSError as error:\n    x = 'null' in str(error).lower()",
        "try: f()\nexcept OSError as error:\n    x = ref.hash in error.args[0]",
        "try: f()\nexcept ValueError as error:\n    g(str(error).partition(' ')[0])",
        "def f(error: Exception):\n    message = str(error)\n    return message.partition(']')",
        "def f(error: RefError | None):\n    return error.message == 'x'",
        "def f(error: BaseException):\n    return re.match('image', str(error))",
    ],
)
def test_the_walk_finds_what_it_looks_for(fault: str) -> None:
    assert len(text_readers(fault)) == 1
    assert text_readers("try: f()\nexcept OSError as error:\n    raise X(f'no: {error}', str(error)) from None") == []


# Fields --------------------------------------------------------------------------------------------------------------


def test_a_text_is_made_of_the_fields() -> None:
    error = ImageError("image is animated", sha256="a" * 64)
    there = error.at(where="photo.gif").at(where="messages[2]", image_index=1, uri="file:///a", sha256="b" * 64)
    assert str(there) == "messages[2]: photo.gif: image[1]: image is animated"
    assert (there.image_index, there.uri, there.sha256, there.message) == (
        1,
        "file:///a",
        "a" * 64,
        "image is animated",
    )
    assert str(there.at(image_index=5)) == str(there)  # what is known stays
    assert str(error) == "image is animated"  # one error may be that of several images
    assert type(there) is ImageError


def test_errors_keep_their_fields_on_their_way() -> None:
    for error in (
        SourceError("no", where="messages[0]", retryable=True),
        RequestError("n is 0", status=404, type="odd", param="n", code="c"),
        MissingImageError("gone", image_index=3, uri="file:///a"),
    ):
        for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))
    caught = None
    try:
        raise ImageError("x")
    except ImageError as error:
        caught = error.at(image_index=0)
        assert caught.__traceback__ is error.__traceback__


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (SourceError("x"), 400, "messages", "invalid_image"),
        (ImageError("x", param="messages[1]"), 400, "messages[1]", "invalid_image"),
        (ContextLengthError("x"), 400, "messages", "context_length_exceeded"),
        (InferenceError("x"), 502, None, "inference_failed"),
        (StorageError("x"), 503, None, "storage_unavailable"),
        (ConfigError("x"), 500, None, "internal_error"),
        (RequestError("x", status=409), 409, None, None),
        (KeyError("a secret"), 500, None, "internal_error"),
    ],
)
def test_a_status_follows_from_whose_fault_it_is(
    error: Exception, status: int, param: str | None, code: str | None
) -> None:
    told = as_request_error(error, "messages")
    assert (told.status, told.param, told.code) == (status, param, code)
    assert "secret" not in str(told)
    assert error_body(told, "openai")["error"] == {
        "message": str(told), "param": param, "code": code,
        "type": "api_error" if status >= 500 else "invalid_request_error",
    }  # fmt: skip


def test_statuses_say_whether_to_ask_again() -> None:
    assert [RequestError("x", status=status).retryable for status in (400, 404, 408, 429, 500, 503)] == [
        False, False, True, True, False, True,
    ]  # fmt: skip
    assert [RequestError("x", status=status).fault for status in (400, 499, 500)] == ["request", "request", "server"]
    assert isinstance(FieldError("x", param="n"), ValueError)


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists), st.integers(200, 6000))
def test_anything_is_shown_shortly(value: object, digits: int) -> None:
    assert shown(10**digits).startswith("an integer of ")
    assert len(shown(value)) < 1000
    assert len(shown(value, 8)) < 100


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + tree() + END + rest.split(END)[1])
