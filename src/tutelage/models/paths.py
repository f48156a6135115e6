"""Which folder is meant by a name: checks that need no library."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tutelage.errors import UserError

__all__ = ["ENSEMBLE", "FEATURE_REWARD", "first_line", "require_exists", "require_model", "run_part"]

_CONFIGS = ("config.json", "adapter_config.json")

FEATURE_REWARD = "feature_reward.json"
"""By this file, a folder with a feature reward is known."""

ENSEMBLE = "ensemble.json"
"""By this file, a folder with several rewards and how they are combined."""


def require_exists(name_or_path: str, field: str = "model_name_or_path") -> None:
    """Raise if the name looks like a mistyped path: its parent folder exists, but the path does not.

    Raises:
        UserError: it is such a path.
    """
    path = Path(name_or_path)
    is_path = path.is_absolute() or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if is_path and not path.exists():
        raise UserError("no such folder.", remedy="Check the path.", file=name_or_path, field=field)


def require_model(
    name_or_path: str, field: str = "model_name_or_path", part: Literal["policy", "reward"] = "policy"
) -> None:
    """A folder that is there holds a model or an adapter, or a run that has such a part.

    Raises:
        UserError: it does not, or it is a path to nothing.
    """
    require_exists(name_or_path, field)
    folder = Path(run_part(name_or_path, part))
    if part == "reward" and any((folder / name).is_file() for name in (FEATURE_REWARD, ENSEMBLE)):
        return
    if part == "reward" and (folder / "policy").is_dir():
        raise UserError(
            "the run has exported no reward: those of --reward likelihood and logp are log-probs of its policies.",
            remedy="Score with the policy (--policy), or give the run of another reward.",
            file=name_or_path,
            field=field,
        )
    if folder.exists() and not any((folder / name).is_file() for name in _CONFIGS):
        raise UserError(
            "holds no model: there is neither config.json nor adapter_config.json.",
            remedy="Give a hub name or the folder of a model, an adapter or a run.",
            file=name_or_path,
            field=field,
        )


def run_part(name_or_path: str, part: Literal["policy", "reward"]) -> str:
    """The model that the folder of a run with a reward stands for; it holds a policy and a reward side by side.

    Any other name or folder is returned unchanged.
    """
    folder = Path(name_or_path)
    has_model = any((folder / name).exists() for name in _CONFIGS)
    return str(folder / part) if (folder / part).is_dir() and not has_model else name_or_path


def first_line(error: Exception) -> str:
    """What a library's error says, short enough for one line."""
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
