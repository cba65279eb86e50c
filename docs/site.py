"""What the site (mkdocs.yml) needs beyond docs/: pages from elsewhere in the repository, and docstrings as Markdown."""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ALSO = "CHANGELOG.md", "CONTRIBUTING.md", "experiments/*/README.md", "experiments/*/*.svg", "experiments/*/*.png"


def on_files(files, config):
    """Add the pages that are not in docs/, under their own path."""
    for path in sorted(path for pattern in ALSO for path in ROOT.glob(pattern)):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Relative links, right in the repository, as they are on the site, where docs/ is the root."""
    here = Path(page.file.abs_src_path).parent.relative_to(ROOT).as_posix()

    def on_site(link):
        path = posixpath.normpath(posixpath.join(here, link[1]))
        return f"]({posixpath.relpath(path.removeprefix('docs/'), posixpath.dirname(page.file.src_uri) or '.')}"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)", on_site, markdown)


class Docstrings(griffe.Extension):
    """Sphinx roles become code, aligned lines of a field and its text become a list."""

    def on_instance(self, *, obj, **_):
        if obj.docstring and not obj.is_alias:
            text = re.sub(r":(?:class|func|meth|mod|attr):`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *)(``[^`]+``(?:, ``[^`]+``)*) {2,}", r"\1- \2: ", text, flags=re.M)
