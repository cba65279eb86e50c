"""A run directory: its record, the place of its checkpoints, and how files are written into it.

Start with ``record.py`` (run.json); ``log.py`` writes train.log, ``resume.py`` is where a killed run resumes,
``atomic.py`` how files and directories are written whole or not at all, ``secrets.py`` what may not be in a
configuration. Only ``tracking.py``, the loggers, imports something heavy.
"""
