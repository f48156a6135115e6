"""The file after --config: YAML fields with the text that stands in the file, and what of them may not run unasked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tutelage.errors import UserError

__all__ = ["FileField", "read_fields", "refuse_unasked_code"]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which 1e-6 is a text, with the numbers of YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True, slots=True)
class FileField:
    """A field of the file.

    Attributes:
        value: as YAML reads it.
        text: what stands in the file, of a scalar; of a list, that of its members, None where one is no scalar.
        line: where, counted from 1.
    """

    value: Any
    text: str | list[str | None] | None
    line: int


def read_fields(path: str) -> dict[str, FileField]:
    """The fields of a file by name, without those that are null.

    Raises:
        UserError: it cannot be read, is no mapping, or names a field twice.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        return dict(_fields(loader, loader.get_single_node(), path))
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}.", file=path, remedy="Check the path after --config.", field="config"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"not YAML: {getattr(error, 'problem', None) or error}.",
            file=path,
            row=mark and mark.line + 1,
            remedy="Write lines of 'name: value'.",
        ) from error


def _fields(loader: _Loader, node: Any, path: str) -> Iterator[tuple[str, FileField]]:
    if not isinstance(node, yaml.MappingNode):
        raise UserError("holds no fields.", file=path, remedy="Write lines of 'name: value'.")
    names = [str(loader.construct_object(key, deep=True)) for key, _ in node.value]  # before anchors bring more
    for (key, _), name in zip(node.value, names, strict=True):
        if names.count(name) > 1:
            line = key.start_mark.line + 1
            raise UserError("stands in the file twice.", file=path, row=line, field=name, remedy="Take one out.")
    loader.flatten_mapping(node)
    for key, value in node.value:
        found = loader.construct_object(value, deep=True)
        if found is not None:
            text = [_text(each) for each in value.value] if isinstance(value, yaml.SequenceNode) else _text(value)
            name = str(loader.construct_object(key, deep=True))
            yield name, FileField(found, text, value.start_mark.line + 1)


def _text(node: Any) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) else None


def refuse_unasked_code(path: str, fields: dict[str, FileField], args: Sequence[str]) -> None:
    """A file that someone wrote may be read by anyone: code that it names runs only if the command line names it too.

    Args:
        fields: of the file at ``path``.
        args: the command line, without the file.

    Raises:
        UserError: a function to import, or a model's own code, that only the file asks for.
    """
    given = {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in args if arg.startswith("--")}
    for name in ("verifier", "retention_verifier", "reward_features", "trust_remote_code"):
        if name not in fields or name in given:
            continue
        found = fields[name]
        if name == "trust_remote_code":
            asked = str(found.text).lower() not in ("false", "f", "no", "n", "0", "off")
        else:
            asked = any(
                ":" in part and not part.strip().startswith(("reasoning_gym:", "tutelage."))
                for part in str(found.text).split(",")
            )
        if asked:
            option = f"--{name}" if name == "trust_remote_code" else f"--{name} {found.text}"
            raise UserError(
                "asks for code to be run, which a file alone may not do.",
                file=path,
                row=found.line,
                field=name,
                remedy=f"If you trust it, say so on the command line: {option}.",
            )
