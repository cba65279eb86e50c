"""Shards to batches: caption shards, labels, the order of an epoch, batches of pixels and laid-out labels.

Imports errors, config, runs, model and distributed. Start with ``dataset.py``, where a shard becomes a batch, then
``sampler.py`` (order and resuming) and ``datamodule.py`` (Lightning). ``mixture.py`` opens a set of ``config.py``'s
sources; ``shards/`` and ``labels/`` read without torch.
"""
