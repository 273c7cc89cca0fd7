"""What setup.cfg cannot say, because the sources do not know the address of their repository.

The environment gives it at build time as `OTFUSION_REPOSITORY_URL`. The project's links on PyPI and
those of the README, which lead to files of the repository, are made from it; without it there are
none. Everything else about the package is in setup.cfg.
"""

import os
import re
from pathlib import Path

from setuptools import setup

# A picture or a link to a path: not to an address, and not to an anchor of the page.
LINK = re.compile(
    r"(?P<picture>!?)\[(?P<text>[^]\[]*)\]\((?P<path>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)"
)


def readme(repository: str) -> str:
    """Returns README.md with links and pictures that work on any other page."""

    def absolute(match: re.Match[str]) -> str:
        if not repository:
            return match["text"]
        kind = "raw" if match["picture"] else "blob"
        address = f"{repository}/{kind}/HEAD/{match['path']}{match['anchor'] or ''}"
        return f"{match['picture']}[{match['text']}]({address})"

    return LINK.sub(absolute, Path("README.md").read_text(encoding="utf-8"))


def project_urls(repository: str) -> dict[str, str]:
    """Returns the links at the side of the project's page."""
    if not repository:
        return {}
    return {
        "Homepage": os.environ.get("OTFUSION_SITE_URL") or repository,
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
    }


address = os.environ.get("OTFUSION_REPOSITORY_URL", "").rstrip("/")
setup(
    long_description=readme(address),
    long_description_content_type="text/markdown",
    project_urls=project_urls(address),
)
