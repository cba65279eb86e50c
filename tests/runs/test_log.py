"""train.log: everything that is reported reaches the file, also what only a terminal would show otherwise."""

import logging
import warnings

import pytest

from nxtp.errors import UserError
from nxtp.runs.log import run_log, to_file


def logged(directory, error: Exception | None = None) -> str:
    with run_log(directory, ["nxtp", "train", "name=my run"]):
        logging.getLogger("nxtp").warning("read a shard")
        to_file.info("step 3")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("slow", stacklevel=1)
        if error is not None:
            raise error
    return (directory / "train.log").read_text()


def test_a_run_appends_to_its_log(tmp_path, capfd):
    for number in (1, 2):
        text = logged(tmp_path)
        for line in ("INFO nxtp train 'name=my run'", "WARNING read a shard", "INFO step 3", "UserWarning: slow"):
            assert text.count(line) == number
    assert "step 3" not in "".join(capfd.readouterr())
    logging.getLogger("nxtp").warning("after the run")
    to_file.warning("after the run")
    assert "after the run" not in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("error", [UserError("no such shard"), ValueError("no such shard")])
def test_the_error_that_ends_a_run_is_in_its_log(tmp_path, error):
    with pytest.raises(type(error)):
        logged(tmp_path, error)
    text = (tmp_path / "train.log").read_text()
    assert "ERROR no such shard" in text
    assert ("Traceback" in text) == (type(error) is ValueError)
