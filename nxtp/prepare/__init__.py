"""Datasets to shards, and a look at shards: what the scripts in data/ share.

Imports from data and below, and the contact sheet from inference; no torch. Start with ``items.py`` (source items to
samples) and ``writer.py`` (samples to shards with a manifest, in parallel, resumable). ``commands.py`` has
`nxtp prepare NAME`, which runs a script of data/ (``scripts/``), and `nxtp data show|verify`.
"""
