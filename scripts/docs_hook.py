"""MkDocs' hook for the site: README.md is its first page, and links to files of the project lead to the repository.

The pages stay readable where they are: on the hub of the repository and in an editor, links such as `../trainers.py`
and `docs/losses.md` are relative to the file that they are in. Nothing is copied by hand.
"""

import os
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Pages of the site that are not in docs/: name in the site -> file of the project.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "log.md": "LOG.md",
}
ASSETS = "assets"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the target of a relative link or picture, up to its #


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of PAGES, and the pictures and the style sheet in assets/."""
    root = os.path.dirname(config.config_file_path)
    for name, source in PAGES.items():
        with open(os.path.join(root, source), encoding="utf-8") as file:
            files.append(File.generated(config, name, content=file.read()))
    for name in sorted(os.listdir(os.path.join(root, ASSETS))):
        if name.endswith((".png", ".css")):
            path = os.path.join(root, ASSETS, name)
            files.append(File.generated(config, f"{ASSETS}/{name}", abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = posixpath.dirname(PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    return LINK.sub(lambda found: site_link(found[1], folder, f"{config.repo_url}/blob/main"), markdown)


def site_link(target: str, folder: str, repository: str) -> str:
    """Return the link of the site for one that is relative to a folder of the project.

    >>> site_link("../trainers.py", "docs", "https://host/repo/blob/main")
    'https://host/repo/blob/main/trainers.py'
    """
    path = posixpath.normpath(posixpath.join(folder, target))
    of_source = {source: name for name, source in PAGES.items()}
    if path in of_source:
        return of_source[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    is_picture = posixpath.dirname(path) == ASSETS and path.endswith(".png")
    return path if is_picture else f"{repository}/{path}"
