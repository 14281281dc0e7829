"""What MkDocs does besides: the gallery, which lies with its script, is a page; no page loads what is elsewhere."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

GALLERY = Path(__file__).resolve().parents[1] / "examples" / "attention_gallery"
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//[^>]*>|<link[^>]*\srel=["']?"""
    r"""(?:stylesheet|preconnect|preload|icon)["']?[^>]*\shref=["']?(?:https?:)?//[^>]*>"""
)


def on_files(files, config):
    """Adds the gallery and its pictures."""
    files.append(File.generated(config, "gallery.md", abs_src_path=str(GALLERY / "README.md")))
    for picture in sorted(GALLERY.glob("*.png")):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_post_page(output, page, config):
    """A reader needs no network, and nobody else learns what is read."""
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output
