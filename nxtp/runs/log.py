"""train.log: what a run reports, in its directory."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nxtp.errors import UserError

FILE = "train.log"
# For lines that a terminal shows in another way, such as a progress bar: only the file gets them.
to_file = logging.getLogger("nxtp.to_file")
to_file.propagate = False
to_file.addHandler(logging.NullHandler())


class _File(logging.FileHandler):
    """Ignores the errors of a full disk: the error that ends the run is reported elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def run_log(directory: Path, command: Sequence[str]) -> Iterator[None]:
    """Append all that is logged or warned to train.log: first the command, at the end an error that ends the run."""
    directory.mkdir(parents=True, exist_ok=True)
    handler = _File(directory / FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = logging.getLogger(), to_file
    for logger in loggers:
        logger.addHandler(handler)
    to_file.setLevel(logging.INFO)
    logging.captureWarnings(True)
    to_file.info("%s", shlex.join(command))
    try:
        yield
    except Exception as error:
        to_file.error("%s", error, exc_info=None if isinstance(error, UserError) else error)
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
