"""What the build of the documentation does beyond its plugins."""

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files


_root = Path(__file__).parents[1]
_diffrax = "https://docs.kidger.site/diffrax/"


def _notebooks() -> list[Path]:
    return sorted((_root / "notebooks").glob("*.ipynb"))


def _introduction(notebook: Path) -> tuple[str, str]:
    """Its title, and the first sentence below."""
    first = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    title, _, text = first.partition("\n")
    paragraph = text.strip().split("\n")[0]
    # Not after an initial.
    sentence, *_ = re.split(r"(?<=[a-z0-9)`*\]]{2})\. (?=[A-Z])", paragraph)
    return title.removeprefix("# "), sentence.rstrip(".:") + "."


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every notebook in the navigation."""
    assert config.nav is not None
    (section,) = [
        entry["Experiments"] for entry in config.nav if "Experiments" in entry
    ]
    section.extend({_introduction(n)[0]: f"notebooks/{n.name}"} for n in _notebooks())
    return config


def _content(notebook: Path) -> str:
    """With what a cell prints, piece by piece, as one piece."""
    content = json.loads(notebook.read_text())
    for cell in content["cells"]:
        outputs = []
        for output in cell.get("outputs", []):
            is_text = output["output_type"] == "stream"
            if is_text and outputs and outputs[-1]["output_type"] == "stream":
                outputs[-1]["text"].extend(output["text"])
            else:
                outputs.append(output)
        if "outputs" in cell:
            cell["outputs"] = outputs
    return json.dumps(content)


@event_priority(100)  # before the plugin that reads them
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the notebooks, and the pages that are files of the repository, from where
    they are."""
    sources = {f"notebooks/{n.name}": _content(n) for n in _notebooks()}
    sources["changelog.md"] = (_root / "CHANGELOG.md").read_text()
    sources["contributing.md"] = (_root / "CONTRIBUTING.md").read_text()
    for uri, content in sources.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """List every notebook where a page asks for it."""
    lines = []
    for notebook in _notebooks():
        title, sentence = _introduction(notebook)
        lines.append(f"- [{title}](notebooks/{notebook.name}): {sentence}")
    return markdown.replace("<!-- notebooks -->", "\n".join(lines))


def on_env(env, config: MkDocsConfig, files: Files):
    """Link names of diffrax to its documentation, without asking it where they are."""
    for line in (_root / "docs" / "_diffrax.txt").read_text().splitlines():
        name, page = line.split()
        config.plugins["autorefs"].register_url(name, f"{_diffrax}{page}#{name}")
    return env
