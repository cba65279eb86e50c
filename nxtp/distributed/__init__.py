"""Training on several devices: how ranks start, compilation, FSDP2, checkpoints of every form.

Imports errors, runs and model. Everything above is written as for one process.
Start reading in parallelize.py; start.py is what ranks compare before the first step, fsdp2.py is Lightning's strategy,
checkpoints.py what it and the others save.
"""
