"""A run directory: its record, the place of its checkpoints, and how files are written into it.

Start with ``record.py`` (run.json); ``log.py`` writes train.log, ``resume.py`` is where a killed run resumes,
``lock.py`` lets one command at a time write there, ``atomic.py`` is how files and directories are written whole or not
at all, ``processes.py`` which signals reach which process, ``secrets.py`` what may not be in a configuration. Only
``tracking.py``, the loggers, imports something heavy.
"""
