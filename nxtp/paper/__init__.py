"""The published system (arXiv 2312.02142): its checkpoints, its numbers, its way of computing.

Start with ``release.py`` (a released checkpoint in and out; ``rope_order.py`` and ``release_names.py`` have the rules,
``weight_files.py`` reads the files), then ``parity.py`` (our results against recorded ones) and ``reference.py`` (the
published training step and sampler, for the benchmarks).
"""
