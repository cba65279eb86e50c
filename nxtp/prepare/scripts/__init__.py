"""The scripts of data/, one per source. An installed package contains them; in a checkout they are read from data/."""

from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(_here if (_here / "coco.py").exists() else _here.parents[2] / "data")]
