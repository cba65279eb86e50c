"""A trained model in use: load it, predict and classify images, write the predictions.

No Lightning, no torchmetrics; matplotlib only where a picture is drawn.

Start at recognizer.py (the Python API) and predict.py (`nxtp predict`, `nxtp classify`). pretrained.py loads and saves
a model, model_directory.py is the format on disk, streaming.py reads images beside the model, writer.py writes rows.
"""
