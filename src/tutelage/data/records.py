"""Groups as JSON lines: what a stage records, and what ``tutelage sample`` writes and ``tutelage score`` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role

__all__ = ["group_from_record", "group_record", "read_groups"]


def group_record(group: Group, text: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """A group as a line that people can read: texts first, then what is known of each completion, then the tokens.

    Args:
        text: decodes token ids.
    """
    record: dict[str, Any] = {
        "row": group.row,
        "prompt": text(group.prompt_ids),
        "completions": [
            {
                "role": str(c.role),
                "text": text(c.token_ids),
                "finished": c.finished,
                **({"values": dict(c.values)} if c.values else {}),
                "token_ids": c.token_ids,
                **({"token_values": {name: list(v) for name, v in c.token_values.items()}} if c.token_values else {}),
            }
            for c in group.completions
        ],
        "prompt_ids": group.prompt_ids,
    }
    if group.teacher_prompt_ids is not None:
        record["teacher_prompt_ids"] = group.teacher_prompt_ids
    return record


def group_from_record(record: Mapping[str, Any]) -> Group:
    """The group of a line that ``group_record`` made.

    Raises:
        KeyError, TypeError, ValueError: it is no such line.
    """
    teacher = record.get("teacher_prompt_ids")
    return Group(
        prompt_ids=tuple(record["prompt_ids"]),
        completions=tuple(
            Completion(
                tuple(c["token_ids"]),
                Role(c["role"]),
                c["finished"],
                {name: tuple(numbers) for name, numbers in _known(c.get("token_values")).items()},
                _known(c.get("values")),
            )
            for c in record["completions"]
        ),
        row=record["row"],
        teacher_prompt_ids=None if teacher is None else tuple(teacher),
    )


def _known(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """A table of rows has a column for what only some of them know."""
    return {name: value for name, value in (values or {}).items() if value is not None}


def read_groups(path: Path) -> Iterator[Group]:
    """The groups of a file of ``group_record`` lines; a last line torn by a kill is left out.

    Raises:
        UserError: a whole line that is no group.
    """
    with path.open("rb") as file:  # as bytes: a torn line may end inside a character
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield group_from_record(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"is no prompt with its completions ({type(error).__name__}: {error}).",
                    remedy="Restore the file, or start the run anew in another folder.",
                    file=str(path),
                    row=number,
                ) from error
