"""`python -m nxtp.deploy.onnx DIR IMAGE…`: labels of images, where torch is not installed."""

from __future__ import annotations

import argparse
import json
import sys

from nxtp.data.images import find_images
from nxtp.errors import UserError, printable


def main() -> int:
    """The exit code: 1 if an image could not be used."""
    parser = argparse.ArgumentParser(prog="python -m nxtp.deploy.onnx", description=__doc__)
    parser.add_argument("model", metavar="DIR", help="made by nxtp export DIR --onnx OUT")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="images, and directories of them")
    parser.add_argument("--top-k", type=int, default=10, help="labels an image (default 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object an image, a line each")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: one a core)")
    given = parser.parse_args()
    if given.top_k < 1:
        parser.error(f"--top-k {given.top_k}: at least 1, please")
    from nxtp.deploy.onnx.runner import OnnxRecognizer

    recognizer = OnnxRecognizer(given.model, given.threads)
    found, problems = find_images(given.images)
    for path in found:
        try:
            labels = recognizer.predict(path, given.top_k)
        except UserError as problem:
            problems.append(problem)
            continue
        if given.json:
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
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
