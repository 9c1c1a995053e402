"""The file of a comparison: JSON lines, only ever appended to, one whole line at a time.

The first line is a header: the model and the settings that make figures comparable. Every process of a job writes a file of
its own (``results.jsonl``, ``results.part1.jsonl``, ...); reading merges them. A line that was cut off by a kill is dropped
when its process starts again, and ignored by readers.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FORMAT = "fastode-compare-1"

Record = dict[str, Any]


class Results:
    """The file of one process, open for appending; ``header`` must fit what is there.

    Raises ``ValueError`` where the file holds results of another model, of other settings, or no results at all.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any], *, rank: int = 0) -> None:
        self.main = check_path(path)
        self.path = part_of(self.main, rank)
        self.header = clean({"kind": "header", "format": FORMAT, **header})
        for other in parts(self.main):
            found, _ = _read_one(other)
            if found is not None:
                agree(found, self.header, other)
        self.main.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.records: list[Record] = []
        whole = _drop_torn(self._file)
        if whole == 0:
            self._write(self.header)
        else:
            _, self.records = _read_one(self.path)

    def append(self, record: Mapping[str, Any]) -> Record:
        """One line, in one write, on the disk when this returns."""
        made = clean(record)
        self._write(made)
        self.records.append(made)
        return made

    def all(self) -> list[Record]:
        """The records of all processes so far; own ones first."""
        found = list(self.records)
        for other in parts(self.main):
            if other != self.path:
                found += _read_one(other)[1]
        return found

    def close(self) -> None:
        os.close(self._file)

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        written = os.write(self._file, line)
        if written != len(line):  # a full disk: take the torn line back, so that the file stays whole
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(f"out: {self.path} could not be written, the disk is full")
        os.fsync(self._file)


def read(path: str | os.PathLike[str]) -> tuple[Record, list[Record]]:
    """Header and records of all parts. Raises ``FileNotFoundError``, or ``ValueError`` for foreign or damaged files."""
    main = check_path(path)
    if not parts(main):
        raise FileNotFoundError(f"results: {main} does not exist")
    header: Record | None = None
    records: list[Record] = []
    for part in parts(main):
        found, lines = _read_one(part)
        if found is None:
            continue
        if header is not None:
            agree(found, header, part)
        header = header or found
        records += lines
    if header is None:
        raise ValueError(f"results: {main} has no header; it is empty or was cut off at once")
    return header, records


def cases(records: list[Record]) -> list[Record]:
    """The finished cases, the first of each, in the order of the file."""
    found: dict[str, Record] = {}
    for record in records:
        if record["kind"] == "case":
            found.setdefault(record["case"], record)
    return list(found.values())


def parts(path: Path) -> list[Path]:
    """The files of all processes, that of process 0 first."""
    pattern = re.compile(re.escape(path.stem) + r"\.part(\d+)" + re.escape(path.suffix))
    found = [(int(m[1]), p) for p in path.parent.glob("*" + path.suffix) if (m := pattern.fullmatch(p.name))]
    return [p for p in (path, *(p for _, p in sorted(found))) if p.exists()]


def part_of(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.stem}.part{rank}{path.suffix}")


def check_path(path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix != ".jsonl":
        raise ValueError(f"out: must end in .jsonl, got {str(path)!r}")
    return Path(path)


def agree(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise ``ValueError`` unless two headers are of one model and of the same settings."""
    if found.get("format") != wanted.get("format"):
        raise ValueError(f"out: {path} has format {found.get('format')!r}, this is {wanted.get('format')!r}")
    for group, what in (("model", "of another model"), ("settings", "of other settings")):
        one, other = found.get(group, {}), wanted.get(group, {})
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                raise ValueError(
                    f"out: {path} holds results {what}: {key} is {_short(one.get(key))} there and "
                    f"{_short(other.get(key))} here; give another file"
                )


def clean(value: Any) -> Any:
    """As JSON has it: NaN and Inf are null, tuples are lists."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _read_one(path: Path) -> tuple[Record | None, list[Record]]:
    lines = list(_whole_lines(path))
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            assert isinstance(record, dict) and isinstance(record["kind"], str)
        except (ValueError, KeyError, AssertionError) as error:
            raise ValueError(f"results: {path} is damaged at line {number}, or no file of a comparison") from error
        records.append(record)
    if records and records[0]["kind"] != "header":
        raise ValueError(f"results: {path} has no header; it is no file of a comparison")
    return (records[0], records[1:]) if records else (None, [])


def _whole_lines(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield from data[: data.rfind(b"\n") + 1].splitlines()


def _drop_torn(file: int) -> int:
    """Cut off what follows the last whole line; returns the length left."""
    size = os.fstat(file).st_size
    data = os.pread(file, size, 0)
    whole = data.rfind(b"\n") + 1
    if whole < size:
        os.ftruncate(file, whole)
    return whole


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
