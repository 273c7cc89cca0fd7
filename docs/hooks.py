"""What MkDocs does not do by itself: pages outside of docs/, and links to files that are no pages.

On GitHub, README.md is the first page, and a page may lead to any file of the repository. The site
takes README.md, CONTRIBUTING.md and CHANGELOG.md as pages, so that nothing is written twice, and
leads to all other files in the repository, whose address the environment gives at build time.
"""

import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository that are pages, and what the site calls them."""

# A fenced block, which stays as it is, or a link to a path; not to an address or an anchor alone.
FENCE_OR_LINK = re.compile(
    r"^```.*?^```$|\[(?P<text>[^]\[]+)\]\((?P<path>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)", re.M | re.S
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads every link to where its target is on the site, or else in the repository."""
    site_path = page.file.src_uri
    inside = {there: path for path, there in OUTSIDE.items()}
    source = inside.get(site_path, f"docs/{site_path}")

    def led(match: re.Match[str]) -> str:
        if match["path"] is None:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        anchor = match["anchor"] or ""
        there = OUTSIDE.get(target, target.removeprefix("docs/"))
        if target in OUTSIDE or target.startswith("docs/"):
            link = posixpath.relpath(there, posixpath.dirname(site_path) or ".")
            return f"[{match['text']}]({link}{anchor})"
        if config.repo_url:
            return f"[{match['text']}]({config.repo_url.rstrip('/')}/blob/HEAD/{target}{anchor})"
        return match["text"]

    return FENCE_OR_LINK.sub(led, markdown)
