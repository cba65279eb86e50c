"""`data.caption_key=parquet:COLUMN`: captions of a table beside each shard."""

from collections import Counter

import pyarrow
import pytest
from helpers import jpeg, shard_data
from pyarrow.parquet import write_table

from nxtp.errors import UserError
from nxtp.prepare.writer import write_shard


def test_captions_of_a_table_beside_the_shard(tmp_path):
    for shard in range(2):
        numbers = range(12 * shard, 12 * shard + 12)
        content = [{"__key__": f"{n:02d}", "jpg": jpeg((9, 9, n)), "txt": "a lemon"} for n in numbers]
        write_shard(tmp_path / f"{shard}.tar", content)
        keys = [f"{n:02d}" for n in numbers]
        captions = [None if key == "03" else f"leaf {key}" for key in reversed(keys)]
        table = pyarrow.table({"key": list(reversed(keys)), "url": keys, "rewritten": captions})
        write_table(table, tmp_path / f"{shard}.parquet")
    batches = list(shard_data(str(tmp_path), caption_key="parquet:rewritten").train_dataloader())
    assert {tuple(names) for batch in batches for names in batch.labels} == {("leaf",)}
    assert sum((batch.skipped for batch in batches), Counter()) == {"no caption": 1}
    with pytest.raises(UserError, match=r"0\.parquet has no column 'rewriten'\. It has key, url, rewritten\.$"):
        list(shard_data(str(tmp_path / "0.tar"), caption_key="parquet:rewriten").train_dataloader())
    damaged = (tmp_path / "0.parquet").read_bytes().replace(b"rewritten", b"rewritte\xff")
    (tmp_path / "0.parquet").write_bytes(damaged)
    batches = list(shard_data(str(tmp_path / "0.tar"), caption_key="parquet:rewritten").train_dataloader())
    assert sum((batch.skipped for batch in batches), Counter()) == {"unreadable captions": 12}, "no UTF-8"
    (tmp_path / "0.parquet").write_bytes(b"PAR1" * 9)
    (tmp_path / "1.parquet").unlink()
    batches = list(shard_data(str(tmp_path), caption_key="parquet:rewritten").train_dataloader())
    assert sum((batch.skipped for batch in batches), Counter()) == {"unreadable captions": 24}
