"""Captions from a column of NNNNN.parquet, the table that img2dataset writes beside NNNNN.tar."""

from __future__ import annotations

import io

from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.counts import read_content
from nxtp.errors import UserError, some_of


def read_captions(shard: str, column: str, cache: RemoteCache | None) -> dict[str, str]:
    """Key → caption of a shard's samples; those without one are absent.

    Raises:
        OSError: the table cannot be read; RemoteError of a remote one.
        UserError: it has no such column.
    """
    from pyarrow.parquet import ParquetFile

    url = f"{shard.removesuffix('.tar')}.parquet"
    content = io.BytesIO(read_content(url, cache))
    try:
        with ParquetFile(content) as file:
            missing = {"key", column} - set(file.schema_arrow.names)
            if missing:
                found = some_of(file.schema_arrow.names)
                raise UserError(f"data.caption_key: {url} has no column '{min(missing)}'. It has {found}.")
            table = file.read(["key", column]).to_pydict()
    except ValueError as error:  # pyarrow's own, or bytes that are no UTF-8
        raise OSError(f"{url}: {error}") from error
    pairs = zip(table["key"], table[column], strict=True)
    return {str(key): text for key, text in pairs if isinstance(text, str)}
