"""Generates the pages that repeat what the code says; run by mkdocs-gen-files during `mkdocs build`.

index.md, changelog.md, contributing.md   README.md, CHANGELOG.md and CONTRIBUTING.md, with their links adapted
reference/config.md                       the dataclasses of the config schema
reference/cli.md                          the click commands
reference/map.md                          the URLs in the docstrings, and the recipes that name each method
reference/api/                            one page per public module
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "distill"
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "site")]

from links import api_page  # noqa: E402

from distill.files import markdown_table  # noqa: E402


def main() -> None:
    for source, page in (("README", "index"), ("CHANGELOG", "changelog"), ("CONTRIBUTING", "contributing")):
        write(f"{page}.md", root_page(ROOT / f"{source}.md"))
    schema = next(p for p in (PACKAGE / "config" / "schema.py", PACKAGE / "schema.py") if p.exists())
    write("reference/config.md", config_page(schema))
    write("reference/cli.md", cli_page())
    write("reference/map.md", map_page())
    write_api()


def write(page: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return markdown_table(header, [[escape_pipes(cell) for cell in row] for row in rows])


def escape_pipes(cell: str) -> str:
    """A cell whose pipes do not end it; Python-Markdown takes those inside code as they are."""
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in re.split("(`[^`]*`)", cell))


# -- pages from the root of the repository ----------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)\s]+)\)")


def root_page(path: Path) -> str:
    """A Markdown file of the repository's root as a page of docs/: its relative links get one level more, or one less."""

    def replace(match: re.Match) -> str:
        target = match.group(1)
        if re.match(r"[a-z]+:|#", target):
            return match.group(0)
        inside = target.removeprefix("docs/")
        pages = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
        return f"]({inside if inside != target else pages.get(target, '../' + target)})"

    return LINK.sub(replace, path.read_text())


# -- config keys ------------------------------------------------------------------------------------------------------


def config_page(path: Path) -> str:
    """Every key of the dataclasses in `path`: type, default, allowed values, and the comment beside it."""
    source = path.read_text()
    tree, notes = ast.parse(source), comments(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    allowed = allowed_values(tree)
    parts = [
        "# Config keys",
        "A run is one YAML file, merged left to right with further files and with `key=value` overrides "
        "([command line](cli.md)). `base: other.yaml` reads another file first. Unknown keys raise an error that suggests "
        "the nearest name.",
        "`roles`, `method` and `data` hold objects: `_target_` is the dotted path of a class, and the other keys are the "
        "arguments of its constructor. Those of the methods, of the adapter and of the data are listed below; other classes are "
        "in the [API](api/index.md). A mapping whose `_target_` changes is replaced whole: `method._target_=CLASS` drops the "
        "other keys of `method`, and prints their names.",
        f"This page is generated from [{path.name}](../../{path.relative_to(ROOT)}).",
        *config_section("RunConfig", "", classes, allowed, notes),
        *roles_section(),
        *data_section(),
        *method_sections(),
    ]
    return "\n\n".join(parts) + "\n"


def config_section(name: str, prefix: str, classes: dict, allowed: dict, notes: dict) -> Iterator[str]:
    """The table of one dataclass, followed by those of the dataclasses that it holds."""
    rows, nested = [], []
    for field in classes[name].body:
        if not isinstance(field, ast.AnnAssign):
            continue
        key, kind = prefix + field.target.id, ast.unparse(field.annotation)
        inner = re.findall(r"\w+", kind)[-1]
        if inner in classes:
            role = "ROLE." if kind.startswith("dict") else ""
            nested.append((inner, f"{key}.{role}"))
            continue
        limit = allowed.get(re.sub(r"\bROLE\b", "*", key), "")
        rows.append((f"`{key}`", meaning(field, notes), f"`{default(field.value)}`", limit, f"`{kind}`"))
    yield f"## {prefix.removesuffix('.') or 'Top level'}"
    yield ast.get_docstring(classes[name]) or ""
    yield table(("key", "meaning", "default", "allowed", "type"), rows)
    for inner, inner_prefix in nested:
        yield from config_section(inner, inner_prefix, classes, allowed, notes)


def roles_section() -> Iterator[str]:
    """Keys of `roles` beside the networks."""
    layout = "`full`: every role has its own weights; `shared_base`: all but the teacher are adapters on its network"
    rows = [("`roles.layout`", layout, "`full`", "`full`, `shared_base`", "`str`")]
    yield "## roles"
    yield (
        "`roles.ROLE` is a network: a `_target_` with its arguments, or the name of another role whose weights it starts from. "
        "The roles of a method are on [its page](../methods/README.md)."
    )
    rows += argument_rows(PACKAGE / "models" / "lora.py", "SharedBase", "roles.adapter.", without=("net",))
    yield table(("key", "meaning", "default", "allowed", "type"), rows)


def data_section() -> Iterator[str]:
    """Arguments of the two kinds of data that the recipes use."""
    for path, name in ((("data", "shards", "dataset.py"), "Shards"), (("data", "toy.py"), "Samples")):
        yield f"## data: {name}"
        rows = argument_rows(PACKAGE.joinpath(*path), name, "data.")
        yield table(("key", "meaning", "default", "allowed", "type"), rows)


def method_sections() -> Iterator[str]:
    """Arguments of every method, after those that all have."""
    yield "## method"
    yield "Every method has these keys; the sections below list its own."
    head = ("key", "meaning", "default", "allowed", "type")
    yield table(head, argument_rows(PACKAGE / "methods" / "base.py", "Method", "method.", without=("roles",)))
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and "Method" in map(ast.unparse, node.bases):
                rows = argument_rows(path, node.name, "method.", without=("roles", "base"))
                if rows:
                    yield f"## method: {node.name}"
                    yield table(head, rows)


def argument_rows(path: Path, name: str, prefix: str, without: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """A row for each argument of a class's constructor; its meaning is that of the docstring's `Args`."""
    node = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)
    init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    texts = argument_texts(ast.get_docstring(node) or "") | argument_texts(ast.get_docstring(init) or "")
    required = len(init.args.args) - len(init.args.defaults)
    pairs = zip(init.args.args[1:], [*[None] * (required - 1), *init.args.defaults])
    rows = []
    for argument, value in [*pairs, *zip(init.args.kwonlyargs, init.args.kw_defaults)]:
        if argument.arg not in without:
            kind = f"`{ast.unparse(argument.annotation)}`" if argument.annotation else ""
            shown = f"`{in_yaml(value)}`" if value else "required"
            rows.append((f"`{prefix}{argument.arg}`", texts.get(argument.arg, ""), shown, "", kind))
    return rows


def argument_texts(docstring: str) -> dict[str, str]:
    """Argument -> text, from the section `Args` of a docstring; `a, b: text` is the text of both."""
    found: dict[str, str] = {}
    match = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    names: list[str] = []
    for line in match.group(1).splitlines() if match else ():
        if start := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = start.group(1).split(", ")
            found |= dict.fromkeys(names, start.group(2))
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def in_yaml(value: ast.expr) -> str:
    """A default as YAML; an expression as in the source."""
    return json.dumps(ast.literal_eval(value)) if is_literal(value) else ast.unparse(value)


def comments(source: str) -> dict[int, str]:
    """Line number -> comment, without the marks of tools."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("# ").strip()
        if token.type == tokenize.COMMENT and not text.startswith(("noqa", "fmt:", "type:")):
            found[token.start[0]] = text
    return found


def meaning(field: ast.AnnAssign, notes: dict[int, str]) -> str:
    """The comment on the field's line, with the pages of docs/ that it names as links."""
    return re.sub(r"docs/([\w/]+)\.md", r"[\1](../\1.md)", notes.get(field.end_lineno, ""))


def default(value: ast.expr | None) -> str:
    """A field's default as YAML; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, ast.Call):
        factory = next(k.value for k in value.keywords if k.arg == "default_factory")
        if not isinstance(factory, ast.Lambda):
            return {"list": "[]", "dict": "{}"}[ast.unparse(factory)]
        value = factory.body
    return json.dumps(ast.literal_eval(value))


def allowed_values(tree: ast.Module) -> dict[str, str]:
    """Key -> its smallest value or its choices, from the LEAST and CHOICES of the schema; `*` stands for any role."""
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and is_literal(node.value)
    }
    limits = {key: f"{least} or more" for key, least in constants.get("LEAST", {}).items()}
    choices = {key: ", ".join(f"`{c}`" for c in values) for key, values in constants.get("CHOICES", {}).items()}
    return limits | choices


def is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True


# -- command line -----------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every verb with its usage, help, arguments and options."""
    from distill.cli import main as group

    intro = "Every command takes `--help`. This page is generated from the commands themselves."
    return "\n\n".join(["# Command line", intro, *cli_section(group, "distill", 2)]) + "\n"


def cli_section(command, name: str, level: int) -> Iterator[str]:
    """One command, followed by its sub-commands."""
    import click

    context = click.Context(command, info_name=name)
    yield f"{'#' * level} {name}"
    yield f"```text\n{' '.join(command.get_usage(context).removeprefix('Usage: ').split())}\n```"
    words = {word for p in command.params for word in re.findall(r"[A-Z]+", p.make_metavar(context))}
    yield from help_paragraphs(command.help or "", words)
    options = [p for p in command.params if isinstance(p, click.Option)]
    if options:
        yield table(("option", "default", "meaning"), [option_row(o, context) for o in options])
    if isinstance(command, click.Group):
        for key, sub in sorted(command.commands.items()):
            yield from cli_section(sub, f"{name} {key}", level + (name != "distill"))


def help_paragraphs(text: str, arguments: set[str]) -> Iterator[str]:
    """Click's help as Markdown: an example becomes a code block, and in text the names of arguments become code."""
    for paragraph in inspect.cleandoc(text).replace("\b\n", "").split("\n\n"):
        first, _, rest = paragraph.partition("\n")
        if first.strip().rstrip(":") in ("Example", "Examples"):
            yield f"```bash\n{inspect.cleandoc(rest)}\n```"
        else:
            text = " ".join(paragraph.split())
            yield re.sub(r"\b[A-Z]{3,}\b", lambda m: f"`{m[0]}`" if m[0] in arguments else m[0], text)


def option_row(option, context) -> tuple[str, str, str]:
    value = "" if option.is_flag else " " + option.make_metavar(context).replace(" RANGE", "")
    names = ", ".join(f"`{name}{value}`" for name in (*option.opts, *option.secondary_opts))
    plain = isinstance(option.default, (str, int, float, Path)) and not option.is_flag
    return names, f"`{option.default}`" if plain else "", option.help or ""


# -- papers -----------------------------------------------------------------------------------------------------------

URL = re.compile(r"https?://[^\s)>\]`,;]+")
AREAS = ("methods", "losses", "solvers", "models", "nets", "metrics", "eval", "data", "export")


def map_page() -> str:
    """Methods with their papers, recipes and pages, then the other modules that cite a source."""
    parts = [
        "# Paper map",
        "Which file implements which paper. This page is generated: the sources are the URLs in the docstrings, the recipes "
        "those whose `method._target_` is the class.",
        "## Methods",
        table(("class", "papers", "file", "recipes", "page"), method_rows()),
    ]
    roots = sorted(PACKAGE.glob("*.py"))
    for area, files in [("Core", roots), *((a.capitalize(), sorted((PACKAGE / a).rglob("*.py"))) for a in AREAS[1:])]:
        rows = [(file_link(f), summary(f), papers(f)) for f in files if papers(f)]
        if rows:
            parts += [f"## {area}", table(("file", "what it is", "sources"), rows)]
    return "\n\n".join(parts) + "\n"


def method_rows() -> list[tuple[str, ...]]:
    recipes = recipes_by_method()
    rows = []
    for path in sorted((PACKAGE / "methods").glob("[a-z]*.py")):
        page = ROOT / "docs" / "methods" / path.name.replace(".py", ".md")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in recipes:
                links = ", ".join(
                    f"[{r.parent.name}/{r.stem}](../../{r.relative_to(ROOT)})" for r in recipes[node.name]
                )
                own_page = f"[page](../methods/{page.name})" if page.exists() else ""
                rows.append((f"`{node.name}`", papers(path), file_link(path), links, own_page))
    return rows


def recipes_by_method() -> dict[str, list[Path]]:
    """Class name -> the toy and digits recipes that train with it."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "configs").glob("toy/*.yaml")) + sorted((ROOT / "configs").glob("digits/*.yaml")):
        found.setdefault(method_of(path), []).append(path)
    return found


def method_of(recipe: Path) -> str:
    """The class that a recipe trains with, from the file itself or from its `base:`; empty for a base without one."""
    text = recipe.read_text()
    if match := re.search(r"_target_: distill\.methods\.(?:\w+\.)?(\w+)", text):
        return match.group(1)
    base = re.search(r"^base: (\S+\.yaml)", text, re.MULTILINE)
    return method_of(recipe.parent / base.group(1)) if base else ""


def papers(path: Path) -> str:
    """Links to all URLs in the docstrings of a file."""
    urls = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            urls += [u.rstrip(".:") for u in URL.findall(ast.get_docstring(node) or "")]
    return ", ".join(f"[{label(u)}]({u})" for u in dict.fromkeys(urls))


def label(url: str) -> str:
    arxiv = re.search(r"arxiv\.org/(?:abs|pdf)/([\w./-]+)", url)
    return f"arXiv:{arxiv.group(1)}" if arxiv else re.sub(r"https?://(www\.)?", "", url).split("/blob/")[0]


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, with its URLs as links."""
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    return URL.sub(link, " ".join(first.split())).rstrip(" ,.:") + "."


def link(match: re.Match) -> str:
    """A bare URL as a short Markdown link; punctuation behind it stays outside."""
    url = match[0].rstrip(".:")
    return f"[{label(url)}]({url}){match[0][len(url) :]}"


def file_link(path: Path) -> str:
    return f"[{path.relative_to(PACKAGE)}](../../{path.relative_to(ROOT)})"


# -- API --------------------------------------------------------------------------------------------------------------


def write_api() -> None:
    """One page per public module, an index of them, and their navigation."""
    nav, rows = mkdocs_gen_files.Nav(), []
    for path in public_modules():
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if package else parts)
        page = api_page(str(path.relative_to(ROOT))).removeprefix("reference/api/")
        write(f"reference/api/{page}", f"# `{name}`\n\n::: {name}\n")
        nav[tuple(name.split(".")[1:]) or ("distill",)] = page
        rows.append((f"[{name}]({page})", summary(path)))
    index = "# API\n\nGenerated from the docstrings of the public modules.\n\n" + table(("module", "what it is"), rows)
    write("reference/api/index.md", index)
    write("reference/api/SUMMARY.md", "".join(["* [Modules](index.md)\n", *nav.build_literate_nav()]))


def public_modules() -> list[Path]:
    """All modules but the command line and those whose name, or whose package's name, starts with an underscore."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda p: (len(p.parts) > len(PACKAGE.parts) + 1, p)):
        names = path.relative_to(PACKAGE).with_suffix("").parts
        private = any(n.startswith("_") and n != "__init__" for n in names)
        if not private and names[0] != "cli" and ast.get_docstring(ast.parse(path.read_text())):
            found.append(path)
    return found


main()
