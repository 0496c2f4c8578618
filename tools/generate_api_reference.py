"""Write the API reference from the docstrings: a page a module, build/api/index.html first.

    make docs

Modules stand in the order of docs/architecture.md. What pdoc warns of is an error, as is a link that leads nowhere.
"""

import argparse
import importlib
import inspect
import pkgutil
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pdoc

import megatron_longact

ROOT = Path(__file__).resolve().parent.parent


def parts() -> dict[str, list[str]]:
    """The modules and rooms right below the package, by part of the tree in docs/architecture.md, in its order."""
    tree = (ROOT / "docs/architecture.md").read_text().split("```")[1].split("examples/")[0]
    found: dict[str, list[str]] = {}
    for title, name in re.findall(r"^ {20,}(\S.*)$|^  (\w+)(?:\.py|/) ", tree, re.MULTILINE):
        if title and not name:
            part = found.setdefault(title, [])
        else:
            part.append(".".join([megatron_longact.__name__, *([name] if name != "__init__" else [])]))
    return {title: part for title, part in found.items() if part}


def first_lines(name: str) -> dict[str, str]:
    """The first line of a module's docstring, and of those below it; of the package itself alone."""
    module = importlib.import_module(name)
    path = [] if module is megatron_longact else getattr(module, "__path__", [])
    below = [importlib.import_module(each.name) for each in pkgutil.walk_packages(path, f"{name}.")]
    return {each.__name__: (inspect.getdoc(each) or "").split("\n")[0] for each in (module, *below)}


def build(folder: Path, *, quick: bool = False) -> int:
    """Write the pages; their number. Raises the first warning of pdoc, and `ValueError` for a link that is broken.

    quick: without the code beside the docstrings and without the search, which take half of the time.
    """
    found = parts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, of all that is not installed here
        lines = {part: {k: v for name in names for k, v in first_lines(name).items()} for part, names in found.items()}
    vars(megatron_longact)["LongAct"] = megatron_longact.LongAct  # pdoc asks for no name that is made on demand
    pdoc.render.configure(
        docformat="markdown", show_source=not quick, search=not quick, template_directory=ROOT / "docs/templates"
    )
    pdoc.render.env.globals["parts"] = lines
    shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _write(folder, [name for names in lines.values() for name in names])
    if broken := broken_links(folder):
        raise ValueError("links that lead nowhere: " + ", ".join(f"{page} -> {target}" for page, target in broken))
    return sum(map(len, lines.values()))


def _write(folder: Path, names: list[str]) -> None:
    """As `pdoc.pdoc` does, which would leave out what a package's `__all__` does not name."""
    documented = {name: pdoc.doc.Module.from_name(name) for name in names}
    for name, module in documented.items():
        page = folder / f"{name.replace('.', '/')}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(pdoc.render.html_module(module, documented))
    (folder / "index.html").write_text(pdoc.render.html_index(documented))
    if index := pdoc.render.search_index(documented):
        (folder / "search.js").write_text(index)


class _Page(HTMLParser):
    """The names of a page that a link can lead to, and where its own links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take both from a tag."""
        for name, value in attrs:
            if name == "id" and value:
                self.names.add(value)
            if name in ("href", "src") and value and ":" not in value.split("/")[0]:
                self.links.add(value)


def broken_links(folder: Path) -> list[tuple[str, str]]:
    """(page, target) of each link to a page that is not there, or to a name that it does not have."""
    pages = {path.resolve(): _Page(path.read_text()) for path in folder.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            target, _, name = link.partition("#")
            file = (path.parent / target).resolve() if target else path
            if not file.is_file() or (name and name not in pages[file].names):
                broken.append((str(path.relative_to(folder.resolve())), link))
    return broken


def main(argv: list[str]) -> int:
    """Build; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build/api", help="Folder. Default: build/api.")
    parser.add_argument("--quick", action="store_true", help="Leave out code and search, which take half of the time.")
    args = parser.parse_args(argv)
    print(f"{build(args.output, quick=args.quick)} pages: {args.output / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
