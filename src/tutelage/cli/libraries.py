"""What the libraries may say on the screen."""

from __future__ import annotations

import logging
import warnings

from tutelage.launch import process_index
from tutelage.visible import visible

__all__ = ["quiet_libraries"]


class _Visible(logging.Formatter):
    """Names in messages are shown, not obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices off the screen; their warnings stay."""
    import datasets
    from transformers.utils import logging as transformers_logging

    # What one process of several has to warn of, all have.
    logging.basicConfig(level=logging.WARNING if process_index() == 0 else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Visible("%(message)s"))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\..*")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
