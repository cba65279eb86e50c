"""`nxtp bench`: benchmarks against the reference implementation, for a user's own machine.

May import every package but the command line. Start with command.py; the file of each command has its measurement and
its table. Scripts for questions that were answered once are in experiments/benchmarks/.
"""
