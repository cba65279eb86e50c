"""A trained model outside of nxtp's own commands: ONNX graphs, an HTTP server, a page in a browser.

Imports the packages below it, nxtp.inference above all. Commands import torch and the model only when they need them.

Start at export.py (`nxtp export`), server.py (`nxtp serve`) or app/command.py (`nxtp app`); onnx/ writes the graphs and
runs them without torch.
"""
