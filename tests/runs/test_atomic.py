"""Files and directories that are written whole or not at all, and what is put back after a kill."""

import json
import os
from contextlib import suppress

import pytest

from nxtp.runs.atomic import atomic_directory, atomic_file, recover, replace, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_json(path, {"é": [1]})
    assert json.loads(path.read_text()) == {"é": [1]}
    with suppress(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"é": [1]}
    assert os.listdir(path.parent) == ["a.json"]


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_directory(path) as new:
            (new / "x").write_text(content)
    with suppress(RuntimeError), atomic_directory(path) as new:
        (new / "x").write_text("three")
        raise RuntimeError
    assert (path / "x").read_text() == "two"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "model") as new:
            write_json(new / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "model" / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_directory_and_a_file_replace_each_other(tmp_path):
    path = tmp_path / "last.ckpt"
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("a file")
    replace(tmp_path / "directory", path)
    replace(tmp_path / "file", path)
    assert path.read_text() == "a file"
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_what_a_kill_between_two_renames_set_aside_is_recovered(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with atomic_directory(path) as new:
        (new / "x").write_text("one")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), atomic_directory(path) as new:
            (new / "x").write_text("two")
    assert not path.exists()
    assert recover(path) == path
    assert (path / "x").read_text() == "one"
    assert recover(tmp_path / "other") is None
