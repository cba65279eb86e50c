"""How good predicted labels are, in validation while training and in `nxtp evaluate`.

Imports from inference and below, never from train. Start with ``metrics.py`` (exact and semantic match);
``embedders.py`` has the text encoders of the semantic metric, ``curves.py`` what a threshold on probabilities gives and
whether they are true; ``vocabulary.py`` has the classes that alone are ranked; ``command.py`` is `nxtp evaluate`,
``calibrate.py`` `nxtp calibrate`.
"""
