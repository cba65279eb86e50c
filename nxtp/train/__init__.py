"""`nxtp train`: composed configuration → run directory.

Imports every package up to eval. Start reading in command.py (one run, from start to end), then module.py (the steps),
optim.py (parameter groups, learning-rate schedule) and callbacks/, one file each. checks.py refuses settings early.
"""
