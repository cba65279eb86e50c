"""Names of models: local paths or Hugging Face Hub repositories, and one-line reasons why one cannot be loaded."""

from __future__ import annotations

import logging
from pathlib import Path

from nxtp.errors import UserError, one_line

# Two lines for each try, each printed twice, before the error itself.
_RETRIES = ("thrown while requesting", "Retrying in")
logging.getLogger("huggingface_hub.utils._http").addFilter(lambda r: not any(t in r.getMessage() for t in _RETRIES))


def is_path(source: str | Path) -> bool:
    """Whether a name can only be a path: it is written as one, or its first half is a local directory.

    >>> is_path("./lm"), is_path("a/b/c"), is_path("meta-llama/Llama-2-7b-hf"), is_path("gpt2")
    (True, True, False, False)
    """
    text = str(source)
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or ("/" in text and Path(text).parent.is_dir())


def require_source(source: str | Path, setting: str) -> None:
    """
    Raises:
        UserError: ``source``, the value of ``setting``, can only be a path and does not exist.
    """
    if is_path(source) and not Path(source).exists():
        raise UserError(f"{setting}: '{source}' does not exist.")


def reason(error: BaseException) -> str:
    """The first sentence of a library's error, on one line."""
    text = one_line(error) or type(error).__name__
    return text.split(". ")[0][:200].rstrip(".")
