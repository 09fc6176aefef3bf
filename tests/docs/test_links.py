"""What the documentation points to exists: links and their anchors, files by name, and sections of docs/method.md."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("lighthouse", "torchtitan", "scripts", "studies", "benchmarks", "tests", "docs", "train_configs", "examples")
DOCUMENTS = [
    *sorted(REPOSITORY.glob("*.md")),
    *(path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.md"))),
]
SOURCES = [
    *DOCUMENTS,
    *(
        path
        for folder in FOLDERS
        for suffix in ("py", "toml", "sh", "slurm")
        for path in sorted((REPOSITORY / folder).rglob(f"*.{suffix}"))
        if path.parent != Path(__file__).parent  # they name files that do not exist
    ),
]
METHOD = REPOSITORY / "docs/method.md"
TRAINER = "torchtitan/experiments/lighthouse"

FENCED = re.compile(r"^\s*(```+|~~~+).*?^\s*\1\s*$", re.MULTILINE | re.DOTALL)
NUMBERS = r"((?:\d+(?:\.\d+)?(?:, (?:and )?| and | to )?)+)"


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def prose(path: Path) -> str:
    """A document without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCED.sub("", path.read_text(encoding="utf-8")))


def headings(path: Path) -> list[str]:
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    return re.findall(r"^#{1,6} (.+?)\s*$", text, re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces, and a number for the second of a name."""
    found: set[str] = set()
    for heading in headings(path):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.add(f"{slug}-{count}" if slug in found else slug)
    return found


def broken_links(path: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        missing_anchor = anchor and (to.suffix != ".md" or not to.is_file() or anchor not in anchors(to))
        if not to.exists() or not to.is_relative_to(REPOSITORY) or missing_anchor:
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links(path):
    assert broken_links(path, prose(path)) == []


def test_broken_links_are_seen():
    text = (
        "[a](no_such.md) [b](README.md#no-such) [c](#limits) ![d](docs/chunks.png) [e](https://example.org/x) [f](../x)"
    )
    assert broken_links(REPOSITORY / "README.md", text) == ["no_such.md", "README.md#no-such", "../x"]


# Files


def missing_files(text: str) -> list[str]:
    """Names of files that begin with a folder of the repository."""
    pattern = rf"(?<![\w/.\-])((?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|md|toml|sh|slurm|npz|png|csv))\b"
    return [file for file in re.findall(pattern, text) if not (REPOSITORY / file).exists()]


# The changelog also names files that are gone.
@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "CHANGELOG.md"], ids=name)
def test_files_that_are_named_exist(path):
    # torchtitan is upstream's package: documents say that this file must not exist.
    assert set(missing_files(path.read_text(encoding="utf-8"))) <= {"torchtitan/__init__.py"}


def test_missing_files_are_seen():
    assert missing_files("`docs/method.md`, scripts/gone.py; ../docs/other.md") == ["scripts/gone.py"]


def tree() -> str:
    found = re.search(
        r"^## Files\n.*?```text\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert found
    return found[1]


def test_files_of_the_readme_exist():
    """A name is below the folder of its own line, or of the last line that is not indented."""
    top = Path()
    for line in tree().splitlines():
        first, *rest = re.findall(r"[\w./]+/(?!\w)|[\w./]*\w\.(?:py|sh|slurm|jsonl)\b", line)
        if not line.startswith(" "):
            top = Path(first)
        own = Path(first) if not line.startswith(" ") else top / first
        assert (REPOSITORY / own).exists(), own
        for other in rest:
            places = [folder / other for folder in (own, top, Path())]
            assert other == "metrics.jsonl" or any((REPOSITORY / place).exists() for place in places), (line, other)


@pytest.mark.parametrize("folder", ["lighthouse", TRAINER, "scripts", "studies", "benchmarks", "examples"])
def test_files_are_in_the_readme(folder):
    """Also of modules that are new. Scripts that start a module of the same name are its second door."""
    names = {path.name for path in (REPOSITORY / folder).iterdir() if path.suffix in (".py", ".sh", ".slurm")}
    if folder == "scripts":
        names -= {path.name for path in (REPOSITORY / TRAINER).iterdir()}
    listed = set(re.findall(r"\w+\.(?:py|sh|slurm)", tree()))
    assert names - {"__init__.py"} - listed == set()


# Sections


def sections() -> set[str]:
    return {found[0] for heading in headings(METHOD) if (found := re.match(r"\d+(\.\d+)?", heading))}


def cited_sections(path: Path, text: str) -> set[str]:
    """The sections of docs/method.md that a text names; in method.md itself, and on itself, the name is left out."""
    text = re.sub(r"\s*\n\s*(?:#+ |// |\* )?\s*", " ", text)
    prefix = "" if path == METHOD else r"method\.md[)\]]*(?:\(.*?\))?,? "
    return {
        number
        for found in re.findall(rf"{prefix}sections? {NUMBERS}", text)
        for number in re.findall(r"\d+(?:\.\d+)?", found)
    }


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "method.md" in path.read_text(encoding="utf-8")], ids=name
)
def test_sections_that_are_named_exist(path):
    assert cited_sections(path, path.read_text(encoding="utf-8")) <= sections()


def test_sections_are_seen():
    assert {"1", "10", "10.2", "13"} <= sections()
    assert cited_sections(
        REPOSITORY / "x.py", "(docs/method.md, sections 3\n# and 14). See docs/method.md, section 10.9."
    ) == {"3", "14", "10.9"}
    assert cited_sections(REPOSITORY / "x.md", "[docs/method.md](docs/method.md), sections 10.2 and 12)") == {
        "10.2",
        "12",
    }
    assert len(cited_sections(METHOD, METHOD.read_text(encoding="utf-8"))) > 5


def test_headings_of_the_readme_that_are_named_exist():
    found = {
        heading
        for path in SOURCES
        for heading in re.findall(r"README\.md, ([A-Z]\w+)\b(?!\.)", path.read_text(encoding="utf-8"))
    }
    assert found <= set(headings(REPOSITORY / "README.md"))
