"""Precision-recall curves of the samplers in one picture: curve.png, from the evaluations of seed 0.

python experiments/sampling/curves.py
"""

import json
from pathlib import Path

from nxtp.eval.curves import Curve, LabelHits, write_curves

HERE = Path(__file__).parent
RUNS = Path("runs/sampling/laptop")
ARMS = ("one_shot_matched", "one_shot", "greedy", "greedy_no_penalty", "beam")

curves = {}
for arm in ARMS:
    hits = LabelHits()
    for line in (RUNS / f"arm={arm},cut=ten,ranking=prob,seed=0" / "predictions.jsonl").open():
        row = json.loads(line)
        hits.update([row["predictions"]], [row["labels"]])
    curves[arm] = Curve.of(hits)
write_curves(curves, RUNS)
(RUNS / "curve.png").rename(HERE / "curve.png")
