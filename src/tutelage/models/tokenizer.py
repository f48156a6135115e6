"""Load a tokenizer; nothing of peft is imported, which takes seconds."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tutelage.errors import UserError
from tutelage.models.paths import first_line, require_exists, run_part

__all__ = ["load_tokenizer"]


def load_tokenizer(
    name_or_path: str, *, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model or an adapter, or with the policy of a run that learned a reward.

    Raises:
        UserError: there is none.
    """
    require_exists(name_or_path)
    name_or_path = run_part(name_or_path, "policy")
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file makes libraries raise nearly anything
        raise UserError(
            f"no tokenizer can be loaded from '{name_or_path}': {first_line(error)}",
            remedy="Save the tokenizer next to the model (tokenizer.save_pretrained).",
            field="model_name_or_path",
        ) from error
