"""Tar shards: finding (urls), listing (manifest), counting (counts), indexing (tar_index), fetching (remote, cache,
prefetch) and reading them (reader).

No torch. Start with :class:`nxtp.data.shards.reader.IndexedShards`.
"""
