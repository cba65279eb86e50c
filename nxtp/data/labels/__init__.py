"""Labels: a sample's own or its caption's nouns (from_samples, nouns, …_nouns), their spelling, ImageNet's names.

``nouns.py`` is where a caption becomes nouns. No module imports torch at start.
"""
