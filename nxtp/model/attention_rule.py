"""The attention rule, which training, sampling and export share (paper, section 3.3: "non-causal attention mask").

A query q may attend to a key k  ⇔  k ≤ q and (segment[k] = 0 or segment[k] = segment[q])
                                    or q and k are both image tokens.

Segments are those of :mod:`nxtp.model.layout`: the prefix is 0, label j is j ≥ 1, padding is -1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(segments_BT: Tensor, num_image_tokens: int, query_start: int = 0) -> Tensor:
    """The attention rule by broadcasting.

    Args:
        segments_BT: int64 [B, T], the segment number of each token.
        num_image_tokens: the first N tokens of each sequence are image tokens.
        query_start: skip the rows before it (queries whose keys are cached).

    Returns:
        bool [B, 1, T - query_start, T], True where the query (row) may attend to the key (column).
        A padding query sees the prefix and earlier padding, so no row is empty; real queries never see padding.
    """
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    query, key = index[query_start:, None], index[None, :]
    segment_q, segment_k = segments_BT[:, query_start:, None], segments_BT[:, None, :]
    rule = (key <= query) & ((segment_k == 0) | (segment_k == segment_q))
    both_images = (query < num_image_tokens) & (key < num_image_tokens)
    return (rule | both_images).unsqueeze(1)


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
