"""Writes parity_tiny/: a tiny random model in the released naming, and what a plain implementation computes with it.

    python tests/paper/make_parity_fixture.py [DIRECTORY]

Nothing of nxtp is used: a ViT with QuickGELU and a LLaMA decoder with interleaved rotary pairs, straight from
their equations, one sequence at a time, in float64 rounded to float32 at the end.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

IMAGE = {"image_size": 24, "patch_size": 8, "width": 24, "layers": 2, "heads": 2, "activation": "quickgelu"}
DECODER = {
    "dim": 40,
    "n_layers": 2,
    "n_heads": 4,
    "norm_eps": 1e-5,
    "vocab_size": 70,
    "rope_theta": 10000.0,
    "intermediate_size": 40,
}
IDS = {"image_token": 68, "empty_token": 69, "bos": 1, "delimiter": 5, "answer_start_are": 9, "pad": -1}
TOP_K, MAX_UPDATE_ITER, SEED = 7, 6, 16
NEW_TOKENS, PENALTY, BEAMS, EOS, NAMES = 9, 1.3, 2, 2, 15
PROMPT = [IDS["image_token"], IDS["bos"], 6, 11, 7, IDS["answer_start_are"]]
TRAIN_LABELS = [[[20, 21], [30], [40, 41, 42]], [[50], [60, 61]], [[22, 33, 44]]]

Parameters = dict[str, Tensor]


def random_parameters(generator: torch.Generator) -> Parameters:
    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    parameters: Parameters = {}
    width, dim, hidden = IMAGE["width"], DECODER["dim"], DECODER["intermediate_size"]
    tokens = (IMAGE["image_size"] // IMAGE["patch_size"]) ** 2 + 1

    def layer_norm(name: str, size: int) -> None:
        parameters[f"{name}.weight"] = 1 + normal(size, std=0.1)
        parameters[f"{name}.bias"] = normal(size, std=0.1)

    def matrix(name: str, rows: int, columns: int) -> None:
        parameters[f"{name}.weight"] = normal(rows, columns, std=columns**-0.5)

    parameters["vision_encoder.class_embedding"] = normal(width, std=0.5)
    parameters["vision_encoder.positional_embedding"] = normal(tokens, width, std=0.5)
    parameters["vision_encoder.logit_scale"] = torch.tensor(4.6)
    patch = IMAGE["patch_size"]
    parameters["vision_encoder.conv1.weight"] = normal(width, 3, patch, patch, std=(3 * patch**2) ** -0.5)
    layer_norm("vision_encoder.ln_pre", width)
    for i in range(IMAGE["layers"]):
        block = f"vision_encoder.transformer.resblocks.{i}"
        parameters[f"{block}.attn.in_proj_weight"] = normal(3 * width, width, std=width**-0.5)
        parameters[f"{block}.attn.in_proj_bias"] = normal(3 * width, std=0.1)
        matrix(f"{block}.attn.out_proj", width, width)
        parameters[f"{block}.attn.out_proj.bias"] = normal(width, std=0.1)
        layer_norm(f"{block}.ln_1", width)
        matrix(f"{block}.mlp.c_fc", 4 * width, width)
        parameters[f"{block}.mlp.c_fc.bias"] = normal(4 * width, std=0.1)
        matrix(f"{block}.mlp.c_proj", width, 4 * width)
        parameters[f"{block}.mlp.c_proj.bias"] = normal(width, std=0.1)
        layer_norm(f"{block}.ln_2", width)
    layer_norm("vision_encoder.ln_post", width)
    matrix("vision_encoder.proj", dim, width)
    parameters["language_decoder.tok_embeddings.weight"] = normal(DECODER["vocab_size"], dim, std=1.0)
    for i in range(DECODER["n_layers"]):
        block = f"language_decoder.layers.{i}"
        for name in ("wq", "wk", "wv", "wo"):
            matrix(f"{block}.attention.{name}", dim, dim)
        matrix(f"{block}.feed_forward.w1", hidden, dim)
        matrix(f"{block}.feed_forward.w2", dim, hidden)
        matrix(f"{block}.feed_forward.w3", hidden, dim)
        parameters[f"{block}.attention_norm.weight"] = 1 + normal(dim, std=0.1)
        parameters[f"{block}.ffn_norm.weight"] = 1 + normal(dim, std=0.1)
    parameters["language_decoder.norm.weight"] = 1 + normal(dim, std=0.1)
    matrix("language_decoder.output", DECODER["vocab_size"], dim)
    # Large logits of the delimiter, of either sign: some labels end at once, some are cut at the cap.
    parameters["language_decoder.output.weight"][IDS["delimiter"]] *= 2.5
    return parameters


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, maps: list[Tensor] | None = None
) -> Tensor:
    """[T, D] each → [T, D]; the weights [heads, T, T] are appended to ``maps``."""
    length, width = q.shape
    q, k, v = (x.view(length, heads, width // heads).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(width // heads)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if maps is not None:
        maps.append(scores.softmax(dim=-1))
    return (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(length, width)


def encode(p: Parameters, image: Tensor) -> Tensor:
    """[3, S, S] → class token and patch tokens, projected: [1 + N, D]."""
    root, width = "vision_encoder", IMAGE["width"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    patch = IMAGE["patch_size"]
    kernel = p[f"{root}.conv1.weight"].reshape(width, -1)
    grid = range(0, IMAGE["image_size"], patch)
    patches = [image[:, y : y + patch, x : x + patch].reshape(-1) @ kernel.T for y in grid for x in grid]
    x = torch.stack([p[f"{root}.class_embedding"], *patches]) + p[f"{root}.positional_embedding"]
    x = norm(f"{root}.ln_pre", x)
    for i in range(IMAGE["layers"]):
        block = f"{root}.transformer.resblocks.{i}"
        qkv = norm(f"{block}.ln_1", x) @ p[f"{block}.attn.in_proj_weight"].T + p[f"{block}.attn.in_proj_bias"]
        mixed = attention(*qkv.split(width, dim=-1), heads=IMAGE["heads"], mask=None)
        x = x + mixed @ p[f"{block}.attn.out_proj.weight"].T + p[f"{block}.attn.out_proj.bias"]
        h = norm(f"{block}.ln_2", x) @ p[f"{block}.mlp.c_fc.weight"].T + p[f"{block}.mlp.c_fc.bias"]
        h = h * torch.sigmoid(1.702 * h)  # QuickGELU
        x = x + h @ p[f"{block}.mlp.c_proj.weight"].T + p[f"{block}.mlp.c_proj.bias"]
    return norm(f"{root}.ln_post", x) @ p[f"{root}.proj.weight"].T


def rotate(x: Tensor, heads: int) -> Tensor:
    """Rotary embedding of [T, D]: channels 2i and 2i + 1 of a head are one complex number."""
    length, dim = x.shape
    pairs = torch.view_as_complex(x.reshape(length, heads, dim // heads // 2, 2))
    frequency = DECODER["rope_theta"] ** (-torch.arange(0, dim // heads, 2, dtype=x.dtype) / (dim // heads))
    angle = torch.arange(length, dtype=x.dtype)[:, None] * frequency
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(turned).reshape(length, dim)


def decode(p: Parameters, x: Tensor, mask: Tensor, maps: list[Tensor] | None = None) -> Tensor:
    """Embeddings [T, D] at positions 0, 1, … → logits [T, V]."""
    root, heads = "language_decoder", DECODER["n_heads"]

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + DECODER["norm_eps"]).sqrt() * p[f"{name}.weight"]

    for i in range(DECODER["n_layers"]):
        block = f"{root}.layers.{i}"
        h = norm(f"{block}.attention_norm", x)
        q, k, v = (h @ p[f"{block}.attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        mixed = attention(rotate(q, heads), rotate(k, heads), v, heads, mask, maps)
        x = x + mixed @ p[f"{block}.attention.wo.weight"].T
        h = norm(f"{block}.ffn_norm", x)
        gate, up = (h @ p[f"{block}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (gate * torch.sigmoid(gate) * up) @ p[f"{block}.feed_forward.w2.weight"].T
    return norm(f"{root}.norm", x) @ p[f"{root}.output.weight"].T


def mask_of(num_image_tokens: int, segments: list[int]) -> Tensor:
    """The mask of one sequence: ``segments`` of its text tokens, 0 in the prompt, then 1, 2, … for the labels."""
    segments = [0] * num_image_tokens + segments
    rows = []
    for query, own in enumerate(segments):
        both = [query < num_image_tokens and key < num_image_tokens for key in range(len(segments))]
        rows.append([b or (key <= query and segments[key] in (0, own)) for key, b in enumerate(both)])
    return torch.tensor(rows)


def sequence_logits(p: Parameters, image_tokens: Tensor, text: list[int], segments: list[int]) -> Tensor:
    """Logits [N + text, V] behind the image tokens [N, D] (without the class token)."""
    embeddings = torch.cat([image_tokens, p["language_decoder.tok_embeddings.weight"][text]])
    return decode(p, embeddings, mask_of(len(image_tokens), segments))


def sample(p: Parameters, image_tokens: Tensor) -> tuple[Tensor, list[list[int]], list[list[float]]]:
    """First logits [V]; for each label its tokens (delimiter included unless cut) and their probabilities."""

    def last(label: list[int]) -> Tensor:
        return sequence_logits(p, image_tokens, PROMPT + label, [0] * len(PROMPT) + [1] * len(label))[-1]

    first = last([])
    labels, probs = [], []
    for start in first.topk(TOP_K).indices.tolist():
        tokens, chances = [start], [first.softmax(-1)[start].item()]
        while tokens[-1] != IDS["delimiter"] and len(tokens) < MAX_UPDATE_ITER - 1:
            following = last(tokens).softmax(-1)
            tokens.append(int(following.argmax()))
            chances.append(following.max().item())
        labels.append(tokens)
        probs.append(chances)
    return first, labels, probs


def prefix_attention(p: Parameters, image_tokens: Tensor) -> list[Tensor]:
    maps: list[Tensor] = []
    embeddings = torch.cat([image_tokens, p["language_decoder.tok_embeddings.weight"][PROMPT]])
    decode(p, embeddings, mask_of(len(image_tokens), [0] * len(PROMPT)), maps)
    return maps


def text_logits(p: Parameters, image_tokens: Tensor, text: list[int], lagging: bool) -> Tensor:
    """Logits [V] behind a running text: plainly causal, or with the lagging label mask of greedy search."""
    start = len(image_tokens) + len(PROMPT)
    mask = mask_of(len(image_tokens), [0] * (len(PROMPT) + len(text)))
    ends = [start + i for i, token in enumerate(text) if token == IDS["delimiter"]]
    for end in ends[:-1] if lagging else []:
        mask[end + 1 :, start - 1 : end + 1] = False
    embeddings = torch.cat([image_tokens, p["language_decoder.tok_embeddings.weight"][PROMPT + text]])
    return decode(p, embeddings, mask)[-1]


def greedy(p: Parameters, image_tokens: Tensor, penalty: float) -> tuple[list[int], list[float]]:
    text, chances = [], []
    for _ in range(NEW_TOKENS):
        logits = text_logits(p, image_tokens, text, lagging=True).detach().clone()
        for token in set(text):
            logits[token] /= penalty
        text.append(int(logits.argmax()))
        chances.append(logits.softmax(-1).max().item())
    return text, chances


def beam(p: Parameters, image_tokens: Tensor) -> list[int]:
    texts: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(NEW_TOKENS):
        grown = []
        for score, text in texts:
            chances = text_logits(p, image_tokens, text, lagging=False).log_softmax(-1).tolist()
            grown += [(score + chance, [*text, token]) for token, chance in enumerate(chances)]
        texts = sorted(grown, key=lambda item: -item[0])[:BEAMS]
    return [*texts[0][1], EOS]


def sampler_values(p: Parameters, encoded: list[Tensor]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name, penalty in (("greedy", 1.0), ("greedy_penalty", PENALTY)):
        texts = [greedy(p, tokens[1:], penalty) for tokens in encoded]
        values[f"{name}_tokens"] = torch.tensor([text for text, _ in texts])
        values[f"{name}_token_probs"] = torch.tensor([chances for _, chances in texts])
    values["beam_tokens"] = torch.tensor([beam(p, tokens[1:]) for tokens in encoded])
    return values


def rankings(p: Parameters, encoded: list[Tensor]) -> dict[str, list[dict]]:
    """Labels and scores by every ranking, for a spelling in which some labels coincide."""
    embedding = p["language_decoder.tok_embeddings.weight"]
    ranked: dict[str, list[dict]] = {}
    for name in ("prob", "ppl", "sim_mean", "sim_max", "none"):
        ranked[name] = []
        for tokens in encoded:
            _, labels, chances = sample(p, tokens[1:])
            found: dict[str, list[float]] = {}
            for label, probs in zip(labels, chances, strict=True):
                ended = label[-1] == IDS["delimiter"]
                spelled = "".join(f"w{i % NAMES}" for i in (label[:-1] if ended else label))
                if not spelled:
                    continue
                rows = embedding[label if ended else [*label, IDS["delimiter"]]]
                cosine = torch.nn.functional.cosine_similarity(rows[:, None], tokens[None, 1:], dim=-1)
                score = {
                    "prob": math.prod(probs),
                    "ppl": math.prod(probs) ** (1 / len(probs)),
                    "sim_mean": ((2 - 2 * cosine).sqrt() / 2).mean().item(),
                    "sim_max": cosine.amax(dim=1).mean().item(),
                    "none": 0.0,
                }[name]
                found.setdefault(spelled, []).append(score)
            merge = {"prob": sum, "ppl": min, "none": min}.get(name, lambda values: sum(values) / len(values))
            merged = [(spelled, merge(values)) for spelled, values in found.items()]
            if name != "none":
                merged.sort(key=lambda item: item[1], reverse=name in ("prob", "sim_max"))
            scores = [round(score, 5) for _, score in merged]
            ranked[name].append({"labels": [spelled for spelled, _ in merged], "scores": scores})
    return ranked


def padded(rows: list[list], value: float, dtype: torch.dtype) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=dtype)


def expected_values(parameters: Parameters, images: Tensor) -> dict[str, Tensor]:
    p = {name: tensor.double().requires_grad_() for name, tensor in parameters.items()}
    encoded = [encode(p, image) for image in images.double()]
    samples = [sample(p, tokens[1:]) for tokens in encoded]
    labels = padded([label for _, labels, _ in samples for label in labels], IDS["delimiter"], torch.int64)
    probs = padded([chance for _, _, chances in samples for chance in chances], 1.0, torch.float64)

    texts, logits, losses = [], [], []
    for tokens, image_labels in zip(encoded, TRAIN_LABELS, strict=True):
        text, segments = list(PROMPT), [0] * len(PROMPT)
        for number, label in enumerate(image_labels, start=1):
            text += [*label, IDS["delimiter"]]
            segments += [number] * (len(label) + 1)
        out = sequence_logits(p, tokens[1:], text, segments)
        behind = len(tokens) - 1  # supervised: all tokens after <|image|>
        losses += list(-out[behind:-1].log_softmax(-1)[torch.arange(len(text) - 1), text[1:]])
        texts.append(text)
        logits.append(out)
    loss = torch.stack(losses).mean()
    loss.backward()
    train_tokens = padded(texts, IDS["pad"], torch.int64)
    targets = train_tokens.clone()
    targets[:, 0] = IDS["pad"]
    length = len(encoded[0]) - 1 + train_tokens.shape[1]
    train_logits = torch.stack([torch.cat([out, out.new_zeros(length - len(out), out.shape[1])]) for out in logits])

    embedding = "language_decoder.tok_embeddings.weight"
    gradients = {"grad/special_token_row": p[embedding].grad[IDS["image_token"]]}
    for name in (
        "language_decoder.layers.0.attention.wq.weight",
        "language_decoder.layers.1.attention.wk.weight",
        "language_decoder.norm.weight",
        embedding,
        "vision_encoder.proj.weight",
        "vision_encoder.transformer.resblocks.0.attn.in_proj_bias",
        "vision_encoder.ln_post.weight",
    ):
        gradients[f"grad/{name}"] = p[name].grad
    batch, positions = len(images), len(encoded[0]) - 1
    values = {
        "images": images,
        "prompt_ids": torch.tensor(PROMPT),
        "image_tokens_with_cls": torch.stack(encoded),
        "first_logits": torch.stack([first for first, _, _ in samples]),
        "one_shot_tokens": labels.view(batch, TOP_K, -1),
        "one_shot_token_probs": probs.view(batch, TOP_K, -1),
        "train_tokens": train_tokens,
        "train_targets": torch.cat([torch.full((batch, positions), IDS["pad"]), targets], dim=1),
        "train_logits": train_logits,
        "train_loss": loss,
        **gradients,
    }
    maps = [prefix_attention(p, tokens[1:]) for tokens in encoded]
    values |= {f"attention_layer{i}": torch.stack([m[i] for m in maps]) for i in range(DECODER["n_layers"])}
    return as_saved(values)


def as_saved(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.float() if value.is_floating_point() else value).detach().clone() for name, value in values.items()
    }


def main(directory: Path) -> None:
    generator = torch.Generator().manual_seed(SEED)
    parameters = random_parameters(generator)
    size = IMAGE["image_size"]
    images = torch.randn(len(TRAIN_LABELS), 3, size, size, generator=generator)
    directory.mkdir(parents=True, exist_ok=True)
    release = {"epoch": 0, "global_step": 0, "model": {f"module.{name}": value for name, value in parameters.items()}}
    torch.save(release, directory / "release_format.pth")
    save_file(expected_values(parameters, images), directory / "expected.safetensors")
    with torch.no_grad():
        p = {name: tensor.double() for name, tensor in parameters.items()}
        encoded = [encode(p, image) for image in images.double()]
        save_file(as_saved(sampler_values(p, encoded)), directory / "samplers.safetensors")
        spelling = f"token id i is spelled w{{i % {NAMES}}}, end to end, without the delimiter"
        content = {"spelling": spelling, "ranked": rankings(p, encoded)}
        (directory / "ranked_labels.json").write_text(json.dumps(content, indent=1) + "\n")
    meta = {"decoder": DECODER, "encoder": IMAGE, "ids": IDS, "k": TOP_K, "max_update_iter": MAX_UPDATE_ITER}
    meta |= {"seed": SEED, "repetition_penalty": PENALTY, "beams": BEAMS}
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "parity_tiny")
