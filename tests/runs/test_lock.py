"""One command at a time in a run directory."""

import fcntl
import os
import signal
import threading

import pytest

from nxtp.errors import UserError
from nxtp.runs.lock import announce, read_holder, run_lock


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path``, killed at the end."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        with run_lock(tmp_path, ["nxtp", "train", "name=a b"], 0):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_command_reports_who_holds_the_directory(tmp_path, holder):
    message = rf"in use by 'nxtp train 'name=a b'' \(process {holder} on "
    with pytest.raises(UserError, match=message), run_lock(tmp_path, ["nxtp", "train"], 0):
        pass
    announce(tmp_path, ["nxtp", "other"], 1)
    assert read_holder(tmp_path)["process"]["pid"] == holder


def test_a_second_command_waits_until_the_first_has_died(tmp_path, holder, caplog):
    threading.Timer(0.3, os.kill, [holder, signal.SIGKILL]).start()
    with run_lock(tmp_path, ["nxtp", "train"], 30):
        assert read_holder(tmp_path)["process"]["pid"] == os.getpid()
    assert caplog.text.count("waiting up to 30 s") == 1


def test_a_holder_that_cannot_be_read_is_another_command(tmp_path, holder):
    (tmp_path / ".lock").write_bytes(b'{"command": "nxtp train name=\xc3')  # cut within a character: the disk was full
    with pytest.raises(UserError, match="in use by another command"), run_lock(tmp_path, ["nxtp", "train"], 0):
        pass


def test_forked_children_do_not_hold_it_on(tmp_path):
    with run_lock(tmp_path, ["nxtp"], 0):
        if (child := os.fork()) == 0:
            signal.pause()
    with run_lock(tmp_path, ["nxtp"], 0):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with run_lock(tmp_path, ["nxtp"], 0):
        pass
    assert "cannot be locked (Function not implemented)" in caplog.text
