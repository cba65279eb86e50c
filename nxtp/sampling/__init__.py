"""From a trained model to labels with probabilities: how they are searched for, scored and ordered.

Imports from: errors, config, model, data. Start with one_shot.py; samplers.py picks a sampler by name,
label_probability.py has the probability of a sampled label, ranking.py scores and orders labels, closed_vocabulary.py
computes the probability of given classes.
"""
