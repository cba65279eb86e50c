"""What a run will cost, before it runs: parameters, FLOPs, memory per rank, and a plan for many GPUs.

`nxtp describe` is command.py. May import training and all below it. Start with describe.py; memory.py executes a
training step without data to measure its memory, plan.py computes hours and network traffic by formula.
"""
