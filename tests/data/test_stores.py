"""hf:// against the few calls of the hub that its file system makes; docs/data.md says how to try gs:// and az://."""

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
from sites import Site, serving
from small_shards import write_shards

from nxtp.data.config import DataConfig
from nxtp.data.mixture import open_set
from nxtp.errors import UserError


def do_GET(site: Site) -> None:
    """The hub with the one data set a/b."""
    path = unquote(urlsplit(site.path).path)
    listed = re.fullmatch(r"/api/datasets/a/b/tree/main/?(.*)", path)
    directory = Path(site.directory, listed[1]) if listed else None
    answer = {"id": "a/b"} if path == "/api/datasets/a/b" else None
    if directory is not None and directory.is_dir():
        answer = [
            {
                "type": "directory" if file.is_dir() else "file",
                "path": str(file.relative_to(site.directory)),
                "size": file.stat().st_size,
                "oid": "",
            }
            for file in sorted(directory.iterdir())
        ]
    if path.startswith("/datasets/a/b/resolve/main/"):
        site.path = path.removeprefix("/datasets/a/b/resolve/main")
        Site.do_GET(site)
        return
    body = json.dumps(answer or {"error": "not found"}).encode()
    site.send_response(200 if answer else 404)
    if not answer:
        site.send_header("X-Error-Code", "EntryNotFound" if listed else "RepoNotFound")
    site.send_header("Content-Length", str(len(body)))
    site.end_headers()
    site.wfile.write(body)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    write_shards(tmp_path / "train", [5, 6, 7])
    config = DataConfig(cache_dir=str(tmp_path / "cache"), index_dir=str(tmp_path / "index"))
    with serving(tmp_path, do_GET=do_GET) as (address, site):
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
        shards = open_set("train", "hf://datasets/a/b/train", config).shards
        assert len(shards) == 18
        assert set(site.asked) == {"manifest.json"}, "nothing is read of the shards"
        monkeypatch.setattr("nxtp.data.shards.remote.PART", 4096)
        assert [shards.read(i).key for i in range(18)] == [f"{i:06d}" for i in range(18)]
        assert len(set(site.ranges)) > 3, "in parts"
        assert open_set("train", "hf://datasets/a/b/train/*1.tar", config).shards.urls == shards.urls[1:2]
        for spec, message in {
            "train/part-0000{0..3}.tar": r"1 of 4 shards cannot be had \(unreachable shard × 1\): hf://.*/part-00003.tar",
            "nowhere": r"no \*\.tar file found at hf://datasets/a/b/nowhere",
        }.items():
            with pytest.raises(UserError, match=message):
                open_set("train", f"hf://datasets/a/b/{spec}", config)
        with pytest.raises(UserError, match=r"no \*\.tar file found at hf://datasets/a/c"):
            open_set("train", "hf://datasets/a/c", config)
