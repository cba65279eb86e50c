"""`python -m nxtp.deploy.onnx DIR IMAGE…`: labels of images without torch."""

from __future__ import annotations

import argparse
import json
import os
import sys

from nxtp.data.images import find_images
from nxtp.errors import UserError, printable


def main() -> int:
    """Returns the exit code: 1 if an image cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m nxtp.deploy.onnx", description=__doc__)
    parser.add_argument("model", metavar="DIR", help="written by nxtp export --format onnx")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="images, or directories with their subdirectories")
    parser.add_argument("--top-k", type=int, default=10, help="labels per image (default 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object per image and line")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: one per core)")
    options = parser.parse_args()
    if options.top_k < 1:
        parser.error(f"--top-k must be ≥ 1, got {options.top_k}")
    from nxtp.deploy.onnx.runner import OnnxRecognizer

    recognizer = OnnxRecognizer(options.model, options.threads)
    found, unreadable = find_images(options.images)
    problems: list[UserError] = [*unreadable]
    for path in found:
        try:
            labels = recognizer.predict(path, options.top_k)
        except UserError as error:
            problems.append(error)
            continue
        if options.json:
            rows = [{"label": label, "probability": probability} for label, probability in labels]
            print(json.dumps({"image": str(path), "labels": rows}))
        else:
            print(printable(path))
            for label, probability in labels:
                print(f"  {probability:.4f}  {label}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader, as head, has enough
        os._exit(1)
    except UserError as error:
        sys.exit(f"error: {error}")
