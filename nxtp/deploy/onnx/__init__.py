"""A model as ONNX graphs, and what runs it without torch: onnxruntime, tokenizers, Pillow and numpy.

A directory of `nxtp export DIR --onnx OUT` holds

    encoder.onnx    pixels uint8 [B, 3, S, S] → image tokens and ``<|image|>``, float32 [B, N + 1, D]
    decoder.onnx    the prefix pass and the cached step of branches; one graph, so that its weights are held once
    *.onnx.data     their weights
    tokenizer.json  as in the model directory
    config.json     what the runner must know (:class:`nxtp.deploy.onnx.runner.Config`)

`export.py` and `int8.py` write it, `runner.py` runs it; the runner and this file import nothing else.
"""

from __future__ import annotations
