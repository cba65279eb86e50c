"""The card of a model that is pushed to the hub."""

from __future__ import annotations

PAPER = "https://arxiv.org/abs/2312.02142"


CARD = """---
{{ card_data }}
---

# {{ name }}

Object recognition as next token prediction ([paper]({{ paper_url }})): images in, ranked labels out.

```python
from nxtp import Recognizer

recognizer = Recognizer.from_pretrained("{{ name }}")
recognizer.predict("photo.jpg", top_k=5)
```

`nxtp predict photo.jpg --model {{ name }} --top-k 5`

## Where the weights come from

```yaml
{{ provenance }}
```
"""
