"""Verifiers: functions that say how right an answer is, and hence what *score* and *accuracy* mean.

The score is what the verifier gives, accuracy the share of answers with a full one (1 or more).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from tutelage.errors import UserError

__all__ = ["Verifier", "load_verifier", "reasoning_gym_rows"]

Verifier = Callable[[str, Mapping[str, Any]], float]
"""From the answer's text and the row (all its columns) to a score: 1 (or more) is right, 0 is wrong, between them is part of a point."""


def load_verifier(name: str) -> Verifier:
    """Find a verifier by its name.

    Args:
        name: ``reasoning_gym:NAME``, for rows with that task's ``entry`` (see ``reasoning_gym_rows``); or
            ``module:function``, a function of the answer's text and the row that returns a number.

    Raises:
        UserError: it cannot be found, or reasoning-gym is not installed.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(
            f"'{name}' is not a verifier.", remedy="Write reasoning_gym:NAME or module:function.", field="verifier"
        )
    if module == "reasoning_gym":
        return _reasoning_gym_verifier(attribute)
    try:
        verifier = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(
            f"the verifier '{name}' cannot be imported: {type(error).__name__}: {error}.",
            remedy="Put its module on PYTHONPATH and check the function's name.",
            field="verifier",
        ) from error
    if not callable(verifier):
        raise UserError(f"'{name}' is not a function.", remedy="Name a function of (text, row).", field="verifier")
    return cast(Verifier, verifier)


def reasoning_gym_rows(task: str, rows: int, seed: int, **options: Any) -> list[dict[str, str]]:
    """Demonstrations of a reasoning-gym task, as plain text with the task's own solution as the answer.

    Args:
        task: the name of a task, such as ``chain_sum``.
        rows: how many.
        seed: of the task's generator.
        options: of the task's generator.

    Returns:
        rows with ``prompt``, ``completion`` and ``entry`` (what the verifier needs, as JSON text).

    Raises:
        UserError: no such task, options it does not know, or reasoning-gym is not installed.
    """
    gym = _reasoning_gym()
    try:
        data = gym.create_dataset(task, size=rows, seed=seed, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"reasoning-gym makes no task '{task}': {error}.", field="task") from error
    made = []
    for entry in data:
        answer = entry["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(
                f"the task '{task}' gives no written solution, so it has no demonstrations.",
                remedy="Choose a task with one, such as chain_sum.",
                field="task",
            )
        made.append(
            {
                "prompt": f"Question: {entry['question'].strip()}\nAnswer:",
                "completion": f" {answer.strip()}",
                "entry": json.dumps(entry, default=str),
            }
        )
    return made


def _reasoning_gym_verifier(task: str) -> Verifier:
    gym = _reasoning_gym()
    try:
        score = gym.get_score_answer_fn(task)
    except (KeyError, ValueError) as error:
        raise UserError(f"reasoning-gym knows no task '{task}'.", field="verifier") from error

    def verify(text: str, row: Mapping[str, Any]) -> float:
        if "entry" not in row:
            raise UserError(
                f"the verifier reasoning_gym:{task} needs a column 'entry' with the task's entry as JSON.",
                remedy="Make the data with tutelage.evaluation.verifiers.reasoning_gym_rows.",
                field="entry",
            )
        return float(score(text.strip(), json.loads(row["entry"])))

    return verify


def _reasoning_gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise UserError(
            "reasoning-gym is not installed.", remedy="Install it: pip install 'tutelage[tasks]'."
        ) from error
