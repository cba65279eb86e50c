"""A run directory: its record, the place of its checkpoints, and how files are written into it.

Imports only :mod:`nxtp.errors`, nothing heavy. Start with ``record.py`` (run.json); ``resume.py`` is where a killed
run resumes, ``atomic.py`` how files and directories are written whole or not at all, ``secrets.py`` what may not be in
a configuration.
"""
