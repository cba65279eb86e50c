"""Training on several devices: activation checkpointing, compilation, FSDP2, and checkpoints of every form.

Imports errors, runs and model. Everything above is written as for one process.
Start reading in parallelize.py; fsdp2.py is Lightning's strategy, checkpoints.py what it and the others save.
"""
