"""A record: a file of measurements that says on what, with what, when and how they were made.

    record = Record.begin("accuracy", folder, "NVIDIA H100", settings={"steps": 30}, packages=("torch", "peft"))
    record.add("runs", {"method": "nf4", "seed": 0, ...})    # a row: one more in a list
    record.put("alone", "nf4", {"seconds_per_step": 0.3})    # a value that has a name

The file, `<what>-<device>.json`, is one JSON object: `schema`, `command`, `device`, `date`, `versions`, perhaps
`settings` and more of what holds for all of it; then the measurements by section. It is written after each addition,
in one step: whatever happens, the old file or the new one is there, whole.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from qlora_lab.errors import UserError

SCHEMA = 1  # records without a number are laid out like 1
ABOUT = ("command", "device", "date", "versions")  # what every record tells


class Record:
    """Made by `begin` or `read`.

    Args:
        path: its file; None for one that is kept in memory only.
        content: all that it holds, as JSON has it.
    """

    def __init__(self, path: pathlib.Path | None, content: dict):
        self.path, self.content = path, content

    @classmethod
    def begin(
        cls,
        what: str,
        folder: pathlib.Path | None,
        device: str,
        *,
        packages: Iterable[str],
        settings: dict | None = None,
        continue_from: pathlib.Path | None = None,
        **facts,
    ) -> Record:
        """A record that is still to be filled; nothing is written yet.

        Args:
            what: the experiment's name.
            folder: where the file goes; None writes none.
            packages: whose versions matter. Those that are not installed are left out.
            settings: what all rows have in common.
            continue_from: an earlier record, whose rows and dates are kept. See `take_over`.
            facts: more that holds for the whole record.

        Raises:
            UserError: the file is there already, and is not what is continued; or see `read` and `take_over`.
        """
        about = {
            "schema": SCHEMA,
            "command": f"python -m qlora_lab.experiments {what}",
            "device": device,
            "date": datetime.date.today().isoformat(),
            "versions": versions(packages),
            **({"settings": settings} if settings is not None else {}),
            **facts,
        }
        record = cls(folder and file_of(what, folder, device), about)
        if continue_from:
            record.take_over(cls.read(continue_from))
        if record.path and record.path.exists() and not (continue_from and record.path.samefile(continue_from)):
            raise UserError(f"{record.path} is there already, and would be lost: give another --output")
        return record

    @classmethod
    def read(cls, path: pathlib.Path) -> Record:
        """A record that was written before, with or without a schema number.

        Raises:
            UserError: no such file, no record, or one of a schema that is newer than this.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the record {path}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path} is no record, or a damaged one: {error}") from None
        missing = [name for name in ABOUT if name not in content] if isinstance(content, dict) else ABOUT
        if missing:
            raise UserError(f"{path} is no record: it does not tell its {missing[0]}")
        if (schema := content.get("schema", SCHEMA)) not in range(1, SCHEMA + 1):
            raise UserError(
                f"{path} has schema {schema}, and {SCHEMA} is the newest that is known here: update qlora_lab"
            )
        return cls(path, content)

    def take_over(self, earlier: Record) -> None:
        """Go on with an earlier record: all that it holds stays, its dates and versions beside today's.

        Raises:
            UserError: it was made on another device, or with other settings.
        """
        then, now = earlier.content, self.content
        if then["device"] != now["device"]:
            raise UserError(f"cannot continue {earlier.path}: it was made on {then['device']}, this is {now['device']}")
        settings = then.get("settings", {}), now.get("settings", {})
        for name in {**settings[0], **settings[1]}:
            before, here = (each.get(name) for each in settings)
            if before != here:
                raise UserError(f"cannot continue {earlier.path}: its {name} was {before}, now it is {here}")
        self.content = {**now, **then, "schema": SCHEMA, "command": now["command"]}
        self.content["date"] = _joined(then["date"], now["date"])
        packages = {**then["versions"], **now["versions"]}
        self.content["versions"] = {
            package: _joined(then["versions"].get(package, ""), now["versions"].get(package, ""))
            for package in packages
        }

    def rows(self, section: str, **having) -> list[dict]:
        """The rows of a section with these values."""
        rows = self.content.get(section, [])
        return [row for row in rows if all(row.get(name) == value for name, value in having.items())]

    def named(self, section: str) -> dict:
        """The values of a section by name."""
        return self.content.get(section, {})

    def add(self, section: str, row: dict, order: Callable[[dict], Any] | None = None) -> None:
        """One more row. order: what to sort the section's rows by; without it the new one is the last."""
        rows = [*self.content.get(section, []), row]
        self._write({**self.content, section: sorted(rows, key=order) if order else rows})

    def put(self, section: str, name: str, value) -> None:
        """A value by its name, in the place of an earlier one."""
        self._write({**self.content, section: {**self.content.get(section, {}), name: value}})

    def note(self, **facts) -> None:
        """More that holds for the whole record."""
        self._write({**self.content, **facts})

    def _write(self, content: dict) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f"{self.path.name}.part")
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path)
        self.content = content


def file_of(what: str, folder: pathlib.Path, device: str) -> pathlib.Path:
    return folder / f"{what}-{device.lower().replace(' ', '-')}.json"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _joined(then: str, now: str) -> str:
    """Both, with a comma between them, each once."""
    return ", ".join(dict.fromkeys(text for text in (*then.split(", "), *now.split(", ")) if text))
