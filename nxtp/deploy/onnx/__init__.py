"""A model as ONNX graphs, and a runner without torch. `nxtp export DIR --format onnx --out OUT` writes a directory:

    encoder.onnx    pixels uint8 [B, 3, S, S] → image tokens and ``<|image|>``, float32 [B, N + 1, D]
    decoder.onnx    the prefix pass and the cached step of branches: one graph, so that its weights are stored once
    *.onnx.data     their weights; tokenizer.json as in the model directory
    config.json     the runner's configuration (:class:`nxtp.deploy.onnx.runner.Config`)

export.py writes it. runner.py and pixels.py run it with onnxruntime, tokenizers, Pillow and numpy, without torch.
"""
