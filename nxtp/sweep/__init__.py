"""Sweeps and studies: many runs of one command, their state, and what comes out of them.

Start with sweep.py: which runs a command asks for, and how each runs in a process of its own. search/ is
hydra/sweeper=optuna, report/ turns run records into tables and plots, commands.py shows the state. May import train and
all packages below; nothing heavy at import.
"""
