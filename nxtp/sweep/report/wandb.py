"""Run records that were uploaded to W&B."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from nxtp.errors import UserError
from nxtp.runs.record import FILE
from nxtp.runs.secrets import has_key

log = logging.getLogger("nxtp")


def wandb_records(project: str) -> list[dict[str, Any]]:
    """The run records, run.json, of a W&B project's runs, oldest first. A run without a readable one is told, left out.

    Args:
        project: "entity/project", or "project" of the key's own entity.

    Raises:
        UserError: no key at hand, or W&B does not answer for this project.
    """
    import wandb

    if not has_key():
        raise UserError(f"Reading W&B project '{project}' needs a key: `wandb login`, or set WANDB_API_KEY.")
    records = []
    try:
        for run in wandb.Api().runs(project):
            record = _uploaded(run)
            if record is None:
                log.warning("%s: run '%s' (%s) has no %s: left out.", project, run.name, run.id, FILE)
            else:
                records.append(record)
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"W&B project '{project}' cannot be read: {error}") from error
    return records


def _uploaded(run: Any) -> dict[str, Any] | None:
    if not any(file.name == FILE for file in run.files([FILE])):
        return None
    with tempfile.TemporaryDirectory() as directory:
        run.file(FILE).download(root=directory, replace=True).close()
        try:
            record = json.loads((Path(directory) / FILE).read_text())
        except json.JSONDecodeError:
            return None
    return record if isinstance(record, dict) else None
