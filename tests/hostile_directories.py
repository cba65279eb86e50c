"""Model directories that a stranger could send, each with one thing wrong, and what loading them takes.

python tests/hostile_directories.py [DIRECTORY]    makes them, loads each, and prints how it is refused
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

SECONDS, MEGABYTES = 2, 500  # in which each is refused
_PATIENCE = 10  # seconds after which a directory has held the process up
CONFIG, WEIGHTS, TOKENIZER, SETTINGS = "config.yaml", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
Damage = Callable[[Path], object]


def text(name: str, content: str | bytes) -> Damage:
    return lambda d: (d / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def link(name: str, target: str) -> Damage:
    def damage(d: Path) -> None:
        (d / name).unlink()
        (d / name).symlink_to(target)

    return damage


def fifo(name: str) -> Damage:
    def damage(d: Path) -> None:
        (d / name).unlink()
        os.mkfifo(d / name)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda d: [damage(d) for damage in damages]


def value(path: str, new: object) -> Damage:
    """Set one value of config.yaml, at a path of keys."""

    def damage(d: Path) -> None:
        content = yaml.load((d / CONFIG).read_text(), yaml.CSafeLoader)
        *parents, last = path.split(".")
        node = content
        for key in parents:
            node = node[key]
        node[last] = new
        (d / CONFIG).write_text(yaml.dump(content, Dumper=yaml.CSafeDumper))

    return damage


def raw(path: str, new: str) -> Damage:
    """The same with text that no dumper writes."""

    def damage(d: Path) -> None:
        value(path, "@@@")(d)
        text(CONFIG, (d / CONFIG).read_text().replace("'@@@'", new))(d)

    return damage


def vision(**new: object) -> Damage:
    return both(*(value(f"model.encoder.vision.{name}", content) for name, content in new.items()))


def decoder(**new: object) -> Damage:
    return both(*(value(f"model.decoder.config.{name}", content) for name, content in new.items()))


def tokenizer(**new: object) -> Damage:
    def damage(d: Path) -> None:
        (d / TOKENIZER).write_text(json.dumps(json.loads((d / TOKENIZER).read_text()) | new))

    return damage


def settings(**new: object) -> Damage:
    def damage(d: Path) -> None:
        (d / SETTINGS).write_text(json.dumps(json.loads((d / SETTINGS).read_text()) | new))

    return damage


def tensors(change: Callable[[dict], object]) -> Damage:
    def damage(d: Path) -> None:
        found = load_file(d / WEIGHTS)
        change(found)
        save_file(found, d / WEIGHTS)

    return damage


def header(change: Callable[[dict], object]) -> Damage:
    """Rewrite the header of the weights; their bytes stay."""

    def damage(d: Path) -> None:
        data = (d / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + length])
        new = json.dumps(change(content) or content).encode()
        (d / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return damage


def set_length(length: int, size: int | None = None) -> Damage:
    def damage(d: Path) -> None:
        with (d / WEIGHTS).open("r+b") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(size)

    return damage


def many_headers(d: Path) -> None:
    """A header of 12 MB: 200,000 tensors without numbers."""
    rows = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(200_000))
    new = f"{{{rows}}}".encode()
    (d / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new)


def pickled(d: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(3)}, d / WEIGHTS)


def sparse(name: str, size: int) -> Damage:
    return lambda d: os.truncate(d / name, size)


def altered(name: str) -> Callable[[dict], object]:
    def change(content: dict) -> None:
        first = next(key for key in content if key != "__metadata__")
        if name == "overlap":
            second = [key for key in content if key != "__metadata__"][1]
            content[second]["data_offsets"] = content[first]["data_offsets"]
        elif name == "dtype":
            content[first]["dtype"] = "F8_EVIL"
        elif name == "shape":
            content[first]["shape"] = [2**62, 2**62]
        elif name == "negative":
            content[first]["shape"] = [-1]

    return change


def put(number: float) -> Callable[[dict], object]:
    def change(found: dict) -> None:
        next(tensor for name, tensor in found.items() if name.endswith("q_proj.weight"))[0, 0] = number

    return change


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "format: 1\n" + "\n".join(lines) + f"\nmodel: *a{levels - 1}\n"


def no_delimiter(d: Path) -> None:
    content = json.loads((d / TOKENIZER).read_text())
    content["model"]["vocab"].pop(",")
    content["model"]["byte_fallback"] = False
    (d / TOKENIZER).write_text(json.dumps(content))


def huge_ids(d: Path) -> None:
    content = json.loads((d / TOKENIZER).read_text())
    content["model"]["vocab"]["rose"] = 2**31
    (d / TOKENIZER).write_text(json.dumps(content))


HOSTILE: dict[str, Damage] = {
    # what a configuration may refer to
    "environment in the prompt": value("model.prompt", "${oc.env:HOME}"),
    "environment in the decoder": decoder(bos_token_id="${oc.env:UID}"),
    "other node": value("model.prompt", "${model.tokenizer}"),
    "resolver of ours": value("model.prompt", "${nxtp.wandb_offline:}"),
    "open_clip from the hub": both(
        value("model.encoder.name", "hf-hub:evil/tower"), value("model.encoder.vision", None)
    ),
    "open_clip from a path": both(value("model.encoder.name", "local-dir:/tmp"), value("model.encoder.vision", None)),
    "open_clip, unknown": both(value("model.encoder.name", "ViT-Evil"), value("model.encoder.vision", None)),
    "timm from the hub": value("model.encoder.vision", {"timm_model_name": "hf-hub:evil/tower"}),
    "timm from the hub, old": value("model.encoder.vision", {"timm_model_name": "hf_hub:evil/tower"}),
    "timm from a path": value("model.encoder.vision", {"timm_model_name": "local-dir:/tmp"}),
    "timm, unknown": value("model.encoder.vision", {"timm_model_name": "evil"}),
    "timm with weights": value(
        "model.encoder.vision", {"timm_model_name": "resnet18", "timm_model_pretrained": True, "timm_pool": "evil"}
    ),
    "weights of the encoder": value("model.encoder.pretrained", "/etc"),
    "weights of the decoder": value("model.decoder.source", "evil/decoder"),
    "another tokenizer": value("model.tokenizer", "evil/tokenizer"),
    "code": value("model.encoder._target_", "os.system"),
    "python object": raw("model.prompt", "!!python/object/apply:os.system [id]"),
    "attention from the hub": decoder(attn_implementation="evil/kernel", hidden_size=31),
    # YAML
    "aliases": text(CONFIG, bomb()),
    "an anchor that contains itself": text(CONFIG, "format: 1\nmodel: &a {encoder: *a}\n"),
    "deep flow": text(CONFIG, "format: 1\nmodel: " + "[" * 30_000),
    "deep blocks": text(CONFIG, "format: 1\nmodel:\n" + "".join(" " * i + "- \n" for i in range(1, 300))),
    "megabytes of keys": text(CONFIG, "format: 1\nmodel:\n" + "".join(f" k{i}: 1\n" for i in range(200_000))),
    "a string of megabytes": raw("model.prompt", "x" * 5_000_000),
    "a long string": value("model.prompt", "x" * 50_000),
    "keys twice": lambda d: text(CONFIG, (d / CONFIG).read_text() + "format: 1\n")(d),
    "UTF-16": lambda d: text(CONFIG, (d / CONFIG).read_text().encode("utf-16"))(d),
    "invalid UTF-8": text(CONFIG, b"format: 1\nmodel: \xff\xfe\n"),
    "NUL bytes": text(CONFIG, bytes(1000)),
    "empty": text(CONFIG, ""),
    "a list": text(CONFIG, "- 1"),
    "a number of 10,000 digits": raw("model.vocab_size", "9" * 10_000),
    "a hexadecimal number": raw("model.vocab_size", "0x" + "f" * 50_000),
    "a sexagesimal number": raw("model.vocab_size", "1" + ":59" * 15_000),
    "a date": raw("model.prompt", "2001-01-01"),
    "a set": raw("model.prompt", "!!set {a, b}"),
    "a file of two documents": lambda d: text(CONFIG, (d / CONFIG).read_text() + "---\na: 1\n")(d),
    # its shape
    "no model": text(CONFIG, "format: 1\nmodel: null\n"),
    "a model that is text": value("model", "vit"),
    "a later format": value("format", 99),
    "a negative format": value("format", -1),
    "an unknown key": value("model.promt", "x"),
    "a key of another type": value("model.encoder.image_size", "large"),
    "a list for a text": value("model.prompt", ["a"]),
    "files that are a list": value("files", ["a"]),
    "files of no content": value("files", {WEIGHTS: 7}),
    "files of another size": value("files", {WEIGHTS: {"bytes": 5, "sha256": "0"}}),
    "provenance that is text": value("provenance", "x"),
    # numbers
    "10⁹ blocks of the encoder": vision(layers=10**9),
    "10⁹ blocks of the decoder": decoder(num_hidden_layers=10**9),
    "negative blocks": decoder(num_hidden_layers=-1),
    "negative depth": value("model.encoder.depth", -1),
    "depth of 10⁹": value("model.decoder.depth", 10**9),
    "10⁹ classes": decoder(num_labels=10**9),
    "a vocabulary of 10⁹": decoder(vocab_size=10**9),
    "40 GB of width": decoder(hidden_size=100_000, intermediate_size=1_000_000),
    "a width of 2⁶²": decoder(hidden_size=2**62),
    "a width of 0": decoder(hidden_size=0),
    "a negative width": vision(width=-32),
    "no heads": decoder(num_attention_heads=0),
    "negative heads": decoder(num_attention_heads=-4, head_dim=-8, num_key_value_heads=-4),
    "heads that do not fit": decoder(num_key_value_heads=3),
    "an unknown activation": decoder(hidden_act="evil"),
    "another family": decoder(model_type="gpt2"),
    "an image of 10⁶": value("model.encoder.image_size", 10**6),
    "an image of 0": value("model.encoder.image_size", 0),
    "a patch of 0": vision(patch_size=0),
    "a negative patch": vision(patch_size=-8),
    "patches of one pixel": both(vision(patch_size=1), value("model.encoder.image_size", 4096)),
    "positions of 4096²": both(
        vision(patch_size=1, width=4096, pos_embed_type="sin_cos_2d"), value("model.encoder.image_size", 4096)
    ),
    "a deviation of 0": value("model.encoder.std", [0.5, 0.0, 0.5]),
    "a negative deviation": value("model.encoder.std", [0.5, -0.1, 0.5]),
    "a deviation that is no number": value("model.encoder.std", [0.5, float("nan"), 0.5]),
    "an infinite mean": value("model.encoder.mean", [0.5, float("inf"), 0.5]),
    "two channels": value("model.encoder.mean", [0.5, 0.5]),
    "rotary positions without numbers": decoder(
        rope_theta=0, rope_parameters={"rope_type": "default", "rope_theta": 0}
    ),
    # weights
    "weights that are NaN": tensors(put(float("nan"))),
    "weights that are infinite": tensors(put(float("inf"))),
    "weights beyond float32": tensors(
        lambda found: [t.fill_(3e38) for n, t in found.items() if n.endswith("q_proj.weight")]
    ),
    "a tensor too many": tensors(lambda found: found.update(evil=next(iter(found.values())).clone())),
    "a tensor too few": tensors(lambda found: found.pop("image_token")),
    "a pickle": pickled,
    "truncated weights": lambda d: os.truncate(d / WEIGHTS, (d / WEIGHTS).stat().st_size - 10),
    "empty weights": sparse(WEIGHTS, 0),
    "a header of 2⁶³": set_length(2**63),
    "a header of 90 MB of holes": set_length(90_000_000, 100_000_000),
    "a header of 200,000 tensors": many_headers,
    "overlapping tensors": header(altered("overlap")),
    "an unknown type": header(altered("dtype")),
    "a shape of 2¹²⁴": header(altered("shape")),
    "a negative shape": header(altered("negative")),
    "a header that is a list": header(lambda content: [content]),
    "a terabyte of holes": sparse(WEIGHTS, 1 << 40),
    # no files
    "weights from /dev/zero": link(WEIGHTS, "/dev/zero"),
    "configuration from /dev/zero": link(CONFIG, "/dev/zero"),
    "tokenizer from /dev/zero": link(TOKENIZER, "/dev/zero"),
    "tokenizer settings from /dev/random": link(SETTINGS, "/dev/random"),
    "the environment as configuration": link(CONFIG, "/proc/self/environ"),
    "a link to itself": link(CONFIG, CONFIG),
    "weights in a circle": both(link(WEIGHTS, "b"), lambda d: (d / "b").symlink_to(WEIGHTS)),
    "a configuration that waits": fifo(CONFIG),
    "weights that wait": fifo(WEIGHTS),
    "a tokenizer that waits": fifo(TOKENIZER),
    "a directory as weights": lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()),
    # tokenizer
    "a tokenizer without comma": no_delimiter,
    "a tokenizer of huge ids": huge_ids,
    "a tokenizer of no JSON": text(TOKENIZER, "{"),
    "a tokenizer that is a list": text(TOKENIZER, "[]"),
    "a deep tokenizer": text(TOKENIZER, "[" * 100_000),
    "a tokenizer of a gigabyte of holes": sparse(TOKENIZER, 1 << 30),
    "a tokenizer of ten million lists": text(TOKENIZER, '{"model": [' + "[]," * 10_000_000 + "[]]}"),
    "a tokenizer of another library": tokenizer(model={"type": "Evil"}),
    "an exponential pattern": tokenizer(pre_tokenizer=split("(a+)+$")),
    "100,000 added tokens": tokenizer(
        added_tokens=[
            dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
            | {"id": 400 + n, "content": f"<added {n}>"}
            for n in range(100_000)
        ]
    ),
    "an exponential choice": tokenizer(
        normalizer={"type": "Replace", "pattern": {"Regex": "(e|ee)+$"}, "content": "x"}
    ),
    "an unfinished pattern": tokenizer(pre_tokenizer=split("(((")),
    "ten times as many, twenty times": tokenizer(
        normalizer={"type": "Sequence", "normalizers": [replace("e", "e" * 10)] * 20}
    ),
    "labels ten times as long, twenty times": tokenizer(
        decoder={"type": "Sequence", "decoders": [replace(",", "," * 10)] * 20}
    ),
    "code of the tokenizer": settings(auto_map={"AutoTokenizer": ["evil--evil.Evil", None]}),
    "a vocabulary elsewhere": settings(vocab_file="/etc/passwd", tokenizer_class="LlamaTokenizer"),
    "settings of megabytes": text(SETTINGS, '{"a": "' + "x" * 5_000_000 + '"}'),
}


def make(sound: Path, root: Path) -> list[Path]:
    """A directory of each kind below ``root``, made from a sound one.

    The sound one loses its checksums: who makes a hostile directory makes them fit.
    """
    value("files", {})(sound)
    directories = []
    for number, (name, damage) in enumerate(HOSTILE.items()):
        directory = root / f"{number:03d} {re.sub('[^a-zA-Z0-9]+', '-', name)}"
        shutil.copytree(sound, directory)
        damage(directory)
        directories.append(directory)
    return directories


@dataclass
class Refusal:
    """What loading one directory took."""

    kind: str
    error: str | None  # the type of what was raised; None if it was loaded
    message: str
    seconds: float
    megabytes: float  # resident memory, at most, beyond that before


def attempts(directories: list[Path], to: Path) -> None:
    """Load each in this process; write a :class:`Refusal` of each as a line of JSON."""
    from nxtp.inference.recognizer import Recognizer

    def late(*_: object) -> None:
        raise TimeoutError(f"not refused within {_PATIENCE} s")

    signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + (2 << 30),) * 2)  # the machine's memory is not at risk
    with to.open("w") as out:
        for kind, directory in zip(HOSTILE, directories, strict=True):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
            before, start = _status("VmRSS"), time.perf_counter()
            error, message = None, ""
            signal.alarm(_PATIENCE)
            try:
                Recognizer.from_pretrained(directory, device="cpu")
            except BaseException as raised:
                error, message = type(raised).__name__, str(raised)
            signal.alarm(0)
            peak = (_status("VmHWM") - before) / 1e6
            row = Refusal(kind, error, message, time.perf_counter() - start, peak)
            out.write(json.dumps(asdict(row)) + "\n")
            out.flush()


def _status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


def read_refusals(path: Path) -> list[Refusal]:
    return [Refusal(**json.loads(line)) for line in path.read_text().splitlines()]


def main() -> None:
    from helpers import recognizer

    with tempfile.TemporaryDirectory() as made:
        root = Path(sys.argv[1] if len(sys.argv) > 1 else made)
        sound = recognizer().save_pretrained(root / "sound")
        attempts(make(sound, root / "hostile"), root / "refusals.jsonl")
        rows = read_refusals(root / "refusals.jsonl")
    failed = 0
    for row in rows:
        held = row.error == "UserError" and "\n" not in row.message and row.megabytes < MEGABYTES
        failed += not (held and row.seconds < SECONDS)
        mark = " " if held and row.seconds < SECONDS else "!"
        print(f"{mark} {row.seconds:6.2f} s {row.megabytes:6.0f} MB  {row.kind}: {row.error}: {row.message[:150]!r}")
    print(f"{len(rows) - failed} of {len(rows)} are refused in one line, {SECONDS} s and {MEGABYTES} MB")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
