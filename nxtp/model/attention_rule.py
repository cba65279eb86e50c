"""The attention rule, which training, sampling and export share (paper, section 3.3: "non-causal attention mask").

A query q may attend to a key k  ⇔  k ≤ q and (segment[k] = 0 or segment[k] = segment[q])
                                    or q and k are both image tokens.

That is the rule ``independent``. In ``prefix`` a label also sees the labels before it; ``causal`` is k ≤ q alone. They
are those of the paper's table 6, for studies.

Segments are those of :mod:`nxtp.model.layout`: the prefix is 0, label j is j ≥ 1, padding is -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATTENTION = ("independent", "prefix", "causal")


def attention_mask(
    segments_BT: Tensor, num_image_tokens: int, attention: str = "independent", query_start: int = 0
) -> Tensor:
    """The attention rule by broadcasting.

    Args:
        segments_BT: int64 [B, T], the segment number of each token.
        num_image_tokens: the first N tokens of each sequence are image tokens.
        attention: the rule, one of :data:`ATTENTION`.
        query_start: skip the rows before it (queries whose keys are cached).

    Returns:
        bool [B, 1, T - query_start, T], True where the query (row) may attend to the key (column).
        A padding query sees the prefix and earlier padding, so no row is empty; real queries never see padding,
        which comes last.
    """
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    query, key = index[query_start:, None], index[None, :]
    segment_q, segment_k = segments_BT[:, query_start:, None], segments_BT[:, None, :]
    rule = (key <= query).expand(len(segments_BT), -1, -1)
    if attention == "independent":
        rule = rule & ((segment_k == 0) | (segment_k == segment_q))
    if attention != "causal":
        rule = rule | ((query < num_image_tokens) & (key < num_image_tokens))
    return rule.unsqueeze(1)


def branch_mask(prefix_length: int, branches: int, steps: int, device: torch.device | None = None) -> Tensor:
    """The same rule for K branches that grow together behind a cached prefix, one token per branch and step.

    The row of cached keys is ``prefix · K tokens of step 1 · … · K tokens of step n``; the queries are the K tokens of
    step n. Branch j sees the prefix and its own tokens: :func:`attention_mask` with branch j as segment j + 1.

    Returns:
        bool [1, 1, K, P + K·n].
    """
    prefix = torch.ones(branches, prefix_length, dtype=torch.bool, device=device)
    own = torch.eye(branches, dtype=torch.bool, device=device).repeat(1, steps)
    return torch.cat([prefix, own], dim=1)[None, None]
