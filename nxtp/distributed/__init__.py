"""Several devices: how ranks start, compilation, FSDP2, checkpoints of every form; ranks that share out images.

Imports errors, config, runs and model. Everything above is written as for one process.
Start reading in parallelize.py; rendezvous.py is what ranks tell each other before they have met, start.py what they
compare then, ranks.py how evaluation, prediction and features share out their images, fsdp2.py is Lightning's strategy,
checkpoints.py what it and the others save.
"""
