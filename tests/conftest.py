"""Tests keep indexes of shards to themselves."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="nxtp-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
