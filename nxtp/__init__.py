"""nxtp: object recognition as next token prediction.

Tensor names carry their shape as a suffix where it is not obvious. One legend for the whole package:

    B  images in a batch          N  image tokens of one image
    P  prefix length              T  sequence length (prefix and labels)
    K  labels per image           L  tokens of the longest sampled label
    D  decoder width              H  attention heads          V  vocabulary rows
    S  supervised (source, target) pairs of a batch
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "Recognizer":  # imported on first use: `import nxtp` stays light
        from nxtp.inference.recognizer import Recognizer

        return Recognizer
    raise AttributeError(f"module 'nxtp' has no attribute '{name}'")
