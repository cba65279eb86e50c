"""Studies: the folders of experiments/, each with its sweeps as configurations of the group `study`."""

from __future__ import annotations

from pathlib import Path

from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from nxtp.config import OTHER_GROUPS

GROUP = "study"
CHECKOUT = Path(__file__).resolve().parents[2] / "experiments"
NOT_A_SWEEP = ("report",)  # what a study's table and plot show


def study_dirs() -> list[Path]:
    """Where studies are looked for: ./experiments, then the checkout's."""
    return [d for d in dict.fromkeys([Path.cwd() / "experiments", CHECKOUT]) if d.is_dir()]


def study_names() -> list[str]:
    """All sweeps, as `study=` takes them: decoder_depth/laptop, …"""
    files = (f for d in study_dirs() for f in d.glob("*/*.yaml") if f.stem not in NOT_A_SWEEP)
    return sorted({f"{f.parent.name}/{f.stem}" for f in files})


class StudySource(ConfigSource):
    """Lets Hydra find experiments/<study>/<sweep>.yaml as <sweep> of the group study/<study>."""

    @staticmethod
    def scheme() -> str:
        return "study"

    def available(self) -> bool:
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        name = self._normalize_file_name(config_path)
        for path in self._inside(name):
            if path.is_file():
                text = path.read_text()
                return ConfigResult(
                    provider=self.provider,
                    path=f"study://{path.parent}",
                    config=OmegaConf.create(text),
                    header=self._get_header_dict(text[:512]),
                )
        raise ConfigLoadError(f"Config not found: {config_path}")

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", GROUP) or any(path.is_dir() for path in self._inside(config_path))

    def is_config(self, config_path: str) -> bool:
        name = self._normalize_file_name(config_path)
        return Path(name).stem not in NOT_A_SWEEP and any(path.is_file() for path in self._inside(name))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        found: set[str] = set()
        for directory in self._inside(config_path):
            for entry in directory.iterdir() if directory.is_dir() else ():
                if entry.is_dir() and results_filter != ObjectType.CONFIG:
                    found.add(entry.name)
                if entry.suffix == ".yaml" and entry.stem not in NOT_A_SWEEP and results_filter != ObjectType.GROUP:
                    found.add(entry.stem)
        return sorted(found)

    @staticmethod
    def _inside(config_path: str) -> list[Path]:
        """What a path of the group stands for, in each directory of studies."""
        group, _, rest = config_path.partition("/")
        return [d / rest for d in study_dirs()] if group == GROUP else []


Plugins.instance().register(StudySource)
OTHER_GROUPS[GROUP] = study_names
