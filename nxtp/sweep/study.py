"""Studies: the folders of experiments/, each with its sweeps as configurations of the group `study`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource

from nxtp.config import OTHER_GROUPS

GROUP = "study"
CHECKOUT = Path(__file__).resolve().parents[2] / "experiments"
NOT_A_SWEEP = ("report",)  # what a study's table and plot show


def study_dirs() -> list[Path]:
    """Where studies are searched: ./experiments, then the checkout's."""
    return [d for d in dict.fromkeys([Path.cwd() / "experiments", CHECKOUT]) if d.is_dir()]


def study_names() -> list[str]:
    """All sweeps, as `study=` takes them: decoder_depth/laptop, …"""
    files = (f for d in study_dirs() for f in d.glob("*/*.yaml") if f.stem not in NOT_A_SWEEP)
    return sorted({f"{f.parent.name}/{f.stem}" for f in files})


class StudySource(ConfigSource):
    """Hydra's source of experiments/<study>/<sweep>.yaml, as <sweep> of the group study/<study>."""

    @staticmethod
    def scheme() -> str:
        return "study"

    def available(self) -> bool:
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        for source, path in self._sources(config_path):
            if source.is_config(path):
                return source.load_config(path)
        raise ConfigLoadError(f"Config not found: {config_path}")

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", GROUP) or any(s.is_group(path) for s, path in self._sources(config_path))

    def is_config(self, config_path: str) -> bool:
        is_sweep = Path(config_path).stem not in NOT_A_SWEEP
        return is_sweep and any(s.is_config(path) for s, path in self._sources(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        sources = [(s, path) for s, path in self._sources(config_path) if s.is_group(path)]
        found = {name for s, path in sources for name in s.list(path, results_filter)}
        return sorted(found - set(NOT_A_SWEEP))

    def _sources(self, config_path: str) -> Iterator[tuple[FileConfigSource, str]]:
        """For each directory of studies, its source and the path inside."""
        group, _, rest = config_path.partition("/")
        for directory in study_dirs() if group == GROUP else []:
            yield FileConfigSource(self.provider, f"file://{directory}"), rest


Plugins.instance().register(StudySource)
OTHER_GROUPS[GROUP] = study_names
