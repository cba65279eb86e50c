"""The model: image encoder, projection and truncated language model, and the sequences that they compute.

Imports from: errors. Start with attention_rule.py and layout.py, then model.py (the loss, the prefix, one step).
encoder.py and decoder.py build the two towers, tokenizer.py turns labels into token ids, trainable.py chooses what
trains, meta.py gives its shapes without weights, flops.py computes the cost, weights.py reads and writes weight files.
"""
