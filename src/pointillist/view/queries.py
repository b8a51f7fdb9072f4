"""What pages ask of the index, as SQL with every value bound."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Self, TypeAlias
from urllib.parse import urlencode

from pointillist.view.run import ViewedRun

SqlValue: TypeAlias = str | int | float | None
"""What a column of the index holds."""
PAGE: Final = 50
SORTS: Final = {
    "newest": ("newest first", "step DESC, split DESC, file, start"),
    "oldest": ("oldest first", "step, split DESC, file, start"),
    "reward-high": ("highest reward", "reward DESC NULLS LAST, step DESC, start"),
    "reward-low": ("lowest reward", "reward NULLS LAST, step DESC, start"),
    "longest": ("longest", "tokens DESC, step DESC, start"),
    "shortest": ("shortest", "tokens, step DESC, start"),
    "advantage-high": ("highest advantage", "advantage DESC NULLS LAST, step DESC, start"),
    "advantage-low": ("lowest advantage", "advantage NULLS LAST, step DESC, start"),
}
OUTCOMES: Final = {
    "sent": "sent to the trainer",
    "zero_variance": "group without variance",
    "alone": "alone in its group",
    "failed": "failed",
    "evaluated": "evaluated",
}
FAULTS: Final = {"corrupt": "quarantined", "missing": "zeroed"}
COLUMNS: Final = (
    "id", "rollout_group", "split", "step", "env", "task", "reward", "advantage", "outcome", "error", "turns", "tokens",
    "sampled", "images", "picture",
)  # fmt: skip
_LARGEST: Final = 24
_LOST: Final = 50


@dataclass(frozen=True, slots=True)
class Filters:
    """What of a run's rollouts is shown, and in which order; as in the page's address."""

    split: str = ""
    step: str = ""
    env: str = ""
    outcome: str = ""
    fault: str = ""
    error: str = ""
    task: str = ""
    reward_min: str = ""
    reward_max: str = ""
    sort: str = "newest"
    page: int = 1

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Self:
        """From an address; a value that is not understood counts as absent."""
        texts = {name: query.get(name, "")[:200] for name in cls.__slots__ if name != "page"}
        for name in ("reward_min", "reward_max"):
            texts[name] = texts[name] if _number(texts[name]) is not None else ""
        texts["step"] = texts["step"] if texts["step"].isdecimal() and len(texts["step"]) < 16 else ""
        texts["sort"] = texts["sort"] if texts["sort"] in SORTS else "newest"
        page = query.get("page", "")
        return cls(**texts, page=max(1, int(page)) if page.isdecimal() and len(page) < 10 else 1)

    def at(self, page: int) -> str:
        """Query string of another page of the same."""
        changed = replace(self, page=page)
        values = {name: getattr(changed, name) for name in self.__slots__}
        return urlencode({name: value for name, value in values.items() if value not in ("", "newest")})

    def where(self, run: ViewedRun) -> tuple[str, list[SqlValue]]:
        """The SQL condition and its values."""
        tests: list[tuple[str, SqlValue]] = [
            (f"{name} = ?", getattr(self, name)) for name in ("split", "env", "outcome", "error") if getattr(self, name)
        ]
        if self.step:
            tests.append(("step = ?", int(self.step)))
        if self.task:
            tests.append(("instr(task, ?) > 0", self.task))
        if self.reward_min:
            tests.append(("reward >= ?", _number(self.reward_min)))
        if self.reward_max:
            tests.append(("reward <= ?", _number(self.reward_max)))
        if self.fault:
            ids = sorted({sample.rpartition(".")[0] for sample in run.faulty_samples(self.fault)})
            tests.append(("id IN (SELECT value FROM json_each(?))", json.dumps(ids)))
        return " AND ".join(test for test, _ in tests) or "1", [value for _, value in tests]


def rollouts(run: ViewedRun, filters: Filters) -> tuple[list[dict[str, SqlValue]], int]:
    """One page of rollouts, and how many there are in all."""
    where, values = filters.where(run)
    with run.index.reader() as db:
        (total,) = db.execute(f"SELECT count(*) FROM rollouts WHERE {where}", values).fetchone()  # noqa: S608
        rows = db.execute(
            f"SELECT {', '.join(COLUMNS)} FROM rollouts WHERE {where} ORDER BY {SORTS[filters.sort][1]} "  # noqa: S608
            "LIMIT ? OFFSET ?",
            [*values, PAGE, (filters.page - 1) * PAGE],
        ).fetchall()
    return [_named(row) for row in rows], total


def choices(run: ViewedRun) -> dict[str, list[str]]:
    """Environments and errors that occur."""
    with run.index.reader() as db:
        return {
            name: [value for (value,) in db.execute(query) if value]
            for name, query in (
                ("env", "SELECT DISTINCT env FROM rollouts ORDER BY env"),
                ("error", "SELECT DISTINCT error FROM rollouts WHERE error IS NOT NULL ORDER BY error"),
            )
        }


def group(run: ViewedRun, name: str, limit: int) -> list[str]:
    """Ids of a group's rollouts."""
    with run.index.reader() as db:
        rows = db.execute(
            "SELECT id FROM rollouts WHERE rollout_group = ? ORDER BY step, file, start LIMIT ?", (name, limit)
        ).fetchall()
    return [rollout_id for (rollout_id,) in rows]


def neighbours(run: ViewedRun, rollout_id: str) -> tuple[str | None, str | None]:
    """Ids of the rollouts before and after one in its file."""
    with run.index.reader() as db:
        row = db.execute("SELECT file, start FROM rollouts WHERE id = ? LIMIT 1", (rollout_id,)).fetchone()
        if row is None:
            return None, None
        before = db.execute("SELECT id FROM rollouts WHERE file = ? AND start < ? ORDER BY start DESC LIMIT 1", row)
        after = db.execute("SELECT id FROM rollouts WHERE file = ? AND start > ? ORDER BY start LIMIT 1", row)
        return _first(before), _first(after)


def outcomes(run: ViewedRun) -> dict[str, int]:
    """How many rollouts had which outcome."""
    with run.index.reader() as db:
        return dict(db.execute("SELECT outcome, count(*) FROM rollouts GROUP BY outcome ORDER BY 2 DESC").fetchall())


def best_of_last_step(run: ViewedRun) -> str | None:
    """Id of the training rollout with the highest reward in the newest step; an evaluation's if there is none."""
    with run.index.reader() as db:
        return _first(
            db.execute("SELECT id FROM rollouts ORDER BY split DESC, step DESC, reward DESC NULLS LAST, start LIMIT 1")
        )


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What a store holds, against what its run refers to."""

    images: int
    num_bytes: int
    references: int
    distinct: int
    saved: int
    """Bytes that the references would take beyond the store's if each were a copy."""
    largest: list[tuple[str, int]]
    corrupt: list[tuple[str, int]]
    corrupt_count: int
    missing: list[tuple[str, int, str]]
    """Hash, references, and a file of rollouts that has one."""
    missing_count: int
    others: list[tuple[str, str]]
    """Files that are no stored images: name and condition."""


def store_facts(run: ViewedRun) -> StoreFacts:
    """Counts and lists for the store's page."""
    with run.index.reader() as db:
        images, num_bytes = db.execute(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM pictures WHERE sha256 IS NOT NULL"
        ).fetchone()
        references, distinct, saved, missing_count = db.execute(
            "SELECT coalesce(sum(used), 0), count(*), coalesce(sum((used - 1) * bytes), 0), "
            "coalesce(sum(bytes IS NULL), 0) FROM (SELECT sha256, sum(count) AS used FROM uses GROUP BY 1) LEFT JOIN "
            "(SELECT sha256, max(bytes) AS bytes FROM pictures WHERE sha256 IS NOT NULL GROUP BY 1) USING (sha256)"
        ).fetchone()
        missing = db.execute(
            "SELECT sha256, sum(count), min(name) FROM uses JOIN files USING (file) "
            "WHERE sha256 NOT IN (SELECT sha256 FROM pictures WHERE sha256 IS NOT NULL) GROUP BY 1 LIMIT ?",
            (min(_LOST, missing_count),),
        ).fetchall()
        return StoreFacts(
            images, num_bytes, references, distinct, saved,
            db.execute("SELECT name, bytes FROM pictures WHERE condition = 'good' ORDER BY bytes DESC LIMIT ?",
                       (_LARGEST,)).fetchall(),
            db.execute("SELECT name, bytes FROM pictures WHERE condition = 'corrupt' LIMIT ?", (_LOST,)).fetchall(),
            _count(db, "SELECT count(*) FROM pictures WHERE condition = 'corrupt'"),
            missing, missing_count,
            db.execute("SELECT name, condition FROM pictures WHERE sha256 IS NULL LIMIT ?", (_LOST,)).fetchall(),
        )  # fmt: skip


def _count(db: sqlite3.Connection, query: str) -> int:
    return int(db.execute(query).fetchone()[0])


def _first(cursor: sqlite3.Cursor) -> str | None:
    row = cursor.fetchone()
    return str(row[0]) if row is not None else None


def _named(row: tuple[SqlValue, ...]) -> dict[str, SqlValue]:
    return dict(zip(COLUMNS, row, strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
