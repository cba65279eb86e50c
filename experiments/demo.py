"""The last lines of `make demo`: what was reached, where the pictures are, and what to try next."""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
metrics = json.loads((run / "metrics.json").read_text())
minutes = json.loads((run / "run.json").read_text())["wall_time_s"] / 60
images, hit, recall = (metrics[f"val/{name}"] for name in ("images", "hit@1", "recall@10"))
print(f"""
Trained from random weights in {minutes:.1f} minutes. Of {images} unseen scenes, the most probable label is right
in {hit:.0%}, and the ten most probable labels contain {recall:.0%} of what is there.

  {run}/predictions.png   unseen scenes with their labels
  {run}/attention.png     where each label is seen

Next, after `source .venv/bin/activate`:
  nxtp predict photo.jpg --model {run}/model           any image; the model knows 100 concepts, drawn as emoji
  nxtp train -m experiment=demo name=depth model.decoder.depth=1,2,4    a sweep; then: nxtp report runs/depth
  nxtp prepare folder --help                            your own pictures""")
