"""What reading shards and labels imports: commands that only look at them start without torch."""

import json
import subprocess
import sys

LIGHT = [
    *("nxtp.data.config", "nxtp.data.images", "nxtp.data.mixture"),
    *(f"nxtp.data.labels.{name}" for name in ("cleaning", "from_samples", "imagenet", "nouns")),
    *(f"nxtp.data.labels.{name}_nouns" for name in ("hanta", "nltk")),
    *(f"nxtp.data.shards.{name}" for name in ("cache", "manifest", "reader", "tar_index", "urls")),
]
HEAVY = {"torch", "lightning", "transformers", "open_clip", "timm", "webdataset", "wandb", "HanTa", "nltk"}
HEAVY |= {"fsspec", "aiohttp", "matplotlib", "scipy"}


def test_shards_and_labels_import_no_torch():
    code = f"import json, sys, {', '.join(LIGHT)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(json.loads(done.stdout)) & HEAVY == set()


def test_images_and_spelling_need_pillow_and_numpy_only():
    """The ONNX runner uses them where nothing else is installed."""
    code = "import json, sys, nxtp.data.images, nxtp.data.labels.cleaning; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(json.loads(done.stdout)) & (HEAVY | {"hydra", "omegaconf", "safetensors", "click", "rich"}) == set()
