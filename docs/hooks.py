"""What the pages say about the code comes from the code: mkdocs fills in markers at build time.

A marker is an HTML comment on a line of its own or inside a table cell:

- `requirements: gating` - the numbered requirements of a concept, each with its property
- `requirements table` - all ids, levels and sentences
- `operations table` - all operations and the requirements that speak about them
- `concepts table` - the concepts and how many requirements each has
- `presets` - the routing of published models
- `families` - the layers of published models and the names of their tensors
- `seen: gating` - real bugs of a concept from docs/data, each with the requirements that cite it
- `picture: gating.one_token` - a picture drawn by docs/pictures/gating.py from what the reference
  computes
- `document: deepseek` - the behaviours of one document, from docs/data/documents
- `documents table` - how many behaviours of each document are right, and how many are not
- `documents: verdicts` - what benchmarks/libraries.py recorded of the documents; also
  `environment`, and `roots` from docs/data/documents_suite.toml
- `equivalences: gating` - questions and answers, read off the tests that decide them
- `calibration: rows` - what benchmarks/calibration.py recorded; also `environment`
- `findings: libraries` - docs/data/findings.toml, library by library; also `sigmoid`, what
  benchmarks/uneven.py recorded
- `matrix: verdicts` - what benchmarks/libraries.py recorded; see docs/pictures/matrix.py for more
- `mutants: survivors` - what benchmarks/mutation.py recorded, with docs/data/mutants.toml; also
  `environment`
- `help: check` - what `moespec check --help` prints
- `rounding: points` - where a target may round, and what it declares then
- `faults: rows` - what benchmarks/faults.py recorded; also `environment`, `operations`
- `scale: links` - what benchmarks/scale_model.py recorded; also `environment`, `times`,
  `published`, `imbalance`, and one number as `scale: times: DeepSeek-V3, prefill, 16: pairs_us`
- `performance: goals` - what benchmarks/gpu.py and benchmarks/cpu_experts.py recorded, or that
  there is no record; also `environment`, `peers`, `conformance`, `missing`, `cpu`
- `terminal: 1: moespec check …` - runs a command, or several joined by `&&`, in a folder with
  docs/examples, shows what they print, and stops the build unless the last ends with that exit code
- `screen: 1: moespec check …` - the same, as a picture in the terminal's colours

An unknown marker stops the build.
"""

import ast
import html
import io
import json
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pictures  # noqa: F401 - mkdocs takes this folder off the path once the hook is loaded
from mkdocs.exceptions import PluginError
from mkdocs.utils import get_relative_url
from moe_conformance.cli import app
from moe_conformance.findings import read_findings
from moe_conformance.pages import source_links
from moe_conformance.registry import ANY, AREAS, requirements
from moe_conformance.target import OPERATIONS, ROUNDING_POINTS
from moe_reference.config import RoutingConfig
from moe_reference.families import FAMILIES
from moe_reference.layouts import Layout
from moe_reference.presets import PRESETS
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text
from typer.testing import CliRunner

DOCS = Path(__file__).parent
MARKER = re.compile(r"<!-- (requirements|requirements table|operations table|concepts table|presets"
                    r"|families|seen|document|documents table|documents|equivalences|calibration"
                    r"|findings|faults|matrix|mutants|performance|picture|help|rounding|scale|screen|terminal)"
                    r"(?:: (.*?))? -->")  # fmt: skip
LOADERS = re.compile(r"<!-- Load mathjax -->.*?<!-- End of mermaid configuration -->", re.DOTALL)
THREAD = re.compile(r"([\w./-]+) ?(#\d+)")
ANY_COMMENT = re.compile(r"<!-- [a-z ]+(?::.*?)? -->")
BESIDE = re.compile(r'(?<= href=")(?!\w+:|#)([^"#]+)(?=[#"])')
"""The file that a link of a notebook leads to, where it is one of this repository."""

PAGES = {
    area: f"spec/{area}.md" for area in AREAS.values() if (DOCS / "spec" / f"{area}.md").exists()
}
"""Concepts with a page of their own; the requirements of the others stand on one page."""
EVERYTHING = "spec/requirements.md"
CONCEPT_OF = {
    "activation_quantization": "quantization",
    "activations": "experts",
    "awq_packing": "quantization",
    "bias_update": "load_balancing",
    "bit_packing": "quantization",
    "capacity": "dispatch",
    "checkpoint_files": "modules",
    "checkpoint_layouts": "quantization",
    "checkpoint_parts": "quantization",
    "checkpoints": "modules",
    "checks": "operations",
    "compressed_layouts": "quantization",
    "config": "operations",
    "domain_transforms": "expert_parallel",
    "expert_gathering": "expert_slicing",
    "expert_sources": "quantization",
    "external_shared": "expert_parallel",
    "families": "modules",
    "float4": "quantization",
    "float8": "quantization",
    "gates": "modules",
    "gguf_blocks": "quantization",
    "gguf_loading": "quantization",
    "gptq_packing": "quantization",
    "initialization": "experts",
    "integer_quantization": "quantization",
    "layouts": "experts",
    "loading": "quantization",
    "loss_graph": "load_balancing",
    "marlin_float8": "quantization",
    "marlin_layout": "quantization",
    "packed_joining": "quantization",
    "packed_slicing": "quantization",
    "packed_sources": "quantization",
    "parallel_steps": "expert_parallel",
    "partial_sums": "expert_parallel",
    "placeholders": "quantization",
    "placement": "expert_slicing",
    "presets": "gating",
    "quantized_checks": "quantization",
    "quantized_experts": "quantization",
    "quantized_experts_checks": "quantization",
    "quantized_slicing": "quantization",
    "quantized_tensors": "quantization",
    "ranks": "expert_parallel",
    "routes": "backends",
    "token_slices": "expert_parallel",
    "wrapping": "modules",
}
"""The page of a module that has no page of its own name."""
VERDICTS = ("right", "wrong", "incomplete", "undefined", "not judged")
EXAMPLE_REPORT = "example-report"
COLUMNS = 88
COLOURS = {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "0", "TERM": "xterm-256color"}
"""What makes rich write colours into a pipe, and no moving parts."""
SCREEN = TerminalTheme(
    (20, 20, 24),
    (245, 245, 245),
    [(0, 0, 0), (255, 125, 125), (140, 220, 140), (240, 200, 110), (140, 175, 255),
     (225, 155, 235), (110, 210, 220), (245, 245, 245)],
)  # fmt: skip
"""Each colour, and faint text, is at least 4.5 to 1 against the background."""
SCALE_KEYS = ("model", "phase", "routing", "direction", "ranks")
"""The columns that tell the rows of a table of benchmarks/results/scale_model.json apart."""

_reports: list[Path] = []
_pages: dict[str, tuple[str, str, str]] = {}


def on_config(config):
    """Stop before a page is read if the notebooks were not run."""
    if not any((DOCS / "notebooks").glob("*.ipynb")):
        raise PluginError("no notebook has been run: `make docs` does it, and then builds the site")


def on_page_markdown(markdown, page, config, files):
    """Replace the markers of a page; a search finds the specification of a word first."""
    if page.file.src_uri.startswith("spec/"):
        page.meta.setdefault("search", {"boost": 2})
    filled = MARKER.sub(lambda found: _fill(found[1], found[2], page.file), markdown)
    unknown = ANY_COMMENT.search(filled)
    if unknown:
        raise PluginError(f"{page.file.src_uri}: unknown marker {unknown[0]}")
    return filled


def on_page_content(content, page, config, files):
    """Turn a notebook's links, which fit its folder in the repository, into those of the site."""
    if not page.file.src_uri.endswith(".ipynb"):
        return content

    def address(link):
        path = posixpath.normpath(posixpath.join("notebooks", link[1]))
        target = files.get_file_from_path(path.removeprefix("docs/"))
        if target is None or not target.is_documentation_page():
            raise PluginError(f"{page.file.src_uri}: {link[1]} leads to no page")
        return get_relative_url(target.url, page.url)

    return BESIDE.sub(address, content)


def on_post_page(output, page, config):
    """Take out of notebook pages the scripts that would load MathJax and Mermaid from a CDN."""
    _pages[page.file.src_uri] = page.title, _first_sentence(page.content), page.url
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    cut, found = LOADERS.subn("", output)
    if found != 1:
        raise PluginError(f"{page.file.src_uri}: expected one block of loaders, got {found}")
    return cut


def on_post_build(config):
    """Put the whole matrix, the report of the example that fails and llms.txt beside the pages."""
    import_module("pictures.matrix").write(config.site_dir)
    (Path(config.site_dir) / "llms.txt").write_text(_for_language_models(config))
    for report in _reports:
        shutil.copytree(report, Path(config.site_dir) / EXAMPLE_REPORT, dirs_exist_ok=True)
        shutil.rmtree(report.parent)
    _reports.clear()


def _for_language_models(config):
    """The pages by section with what each says first, as llmstxt.org has it."""
    lines = [f"# {config.site_name}", f"> {config.site_description}"]
    for section in config.nav:
        [(name, pages)] = section.items()
        if isinstance(pages, str):
            continue
        lines.append(f"## {name}")
        listed = []
        for page in pages:
            [source] = page.values() if isinstance(page, dict) else [page]
            title, says, address = _pages[source]
            listed.append(f"- [{title}]({address}): {says}")
        lines.append("\n".join(listed))
    return "\n\n".join(lines) + "\n"


def _first_sentence(content):
    """What the first paragraph of a page begins with."""
    for paragraph in re.findall(r"<p>(.*?)</p>", content, flags=re.DOTALL):
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", paragraph)).split())
        if text:
            return re.match(r".*?[.:?!](?= |$)|.*", text)[0]
    return ""


def _fill(kind, argument, file):
    if kind == "requirements":
        return _requirement_blocks(argument)
    if kind == "requirements table":
        return _requirements_table(file)
    if kind == "operations table":
        return _operations_table(file)
    if kind == "concepts table":
        return _concepts_table(file)
    if kind == "presets":
        return _presets()
    if kind == "families":
        return _families()
    if kind == "seen":
        return _seen(argument, file)
    if kind == "document":
        return _document(argument, file)
    if kind == "documents table":
        return _documents_table()
    if kind == "documents":
        return _documents(argument, file)
    if kind == "equivalences":
        return _equivalences(argument)
    if kind == "calibration":
        return _calibration(argument)
    if kind == "findings":
        return _findings(argument, file)
    if kind == "faults":
        return _faults(argument, file)
    if kind == "scale":
        return _scale(argument)
    if kind == "mutants":
        return _mutants(argument)
    if kind == "matrix":
        return import_module("pictures.matrix").part(argument)
    if kind == "performance":
        return import_module("pictures.performance").part(argument)
    if kind == "picture":
        concept, name = argument.split(".")
        return getattr(import_module(f"pictures.{concept}"), name)()
    if kind == "help":
        return _fence(_help(argument))
    if kind == "rounding":
        rows = [[meaning, f"`{name}`"] for name, meaning in ROUNDING_POINTS.items()]
        return _table(["what your code does", "declare"], rows)
    code, _, commands = argument.partition(": ")
    if kind == "screen":
        return _screen(_terminal(commands, int(code), colours=True))
    return _fence(_terminal(commands, int(code)))


def _calibration(part):
    record = json.loads((DOCS.parent / "benchmarks/results/calibration.json").read_text())
    if part == "environment":
        machine = record["machine"]
        around = [f"{name}={value} " for name, value in record.get("around", {}).items()]
        return (
            f"`{''.join(around)}{record['command']}` on {record['date']}, "
            f"commit `{record['commit'][:10]}`, torch "
            f"{machine['torch']}, Python {machine['python']}, {machine['platform']}: "
            f"{record['cases']:,} cases, {record['accused']} accusations."
        )
    rows = [
        [each["variant"], each["dtype"], str(each["cases"]), f"{each['worst_z']:.2f}",
         f"{each['worst_rms_of_limit']:.2f}", f"{each['other_bits']:.0%}", str(each["marginal"]),
         str(len(each["accused"]))]
        for each in record["rows"]
    ]  # fmt: skip
    head = ["variant", "dtype", "cases", "error", "row", "other bits", "marginal", "accused"]
    return _table(head, rows)


def _faults(part, file):
    file_of_results = DOCS.parent / "benchmarks/results/faults.json"
    if not file_of_results.exists():
        return "Not measured yet."
    record = json.loads(file_of_results.read_text())
    rows = record["rows"]
    if part == "environment":
        machine = record["machine"]
        first, seeds = record["effort"]["seeds"]
        caught = sum(row["caught"] for row in rows)
        commits = ", ".join(f"`{each[:10]}`" for each in sorted({r["commit"] for r in rows}))
        return (
            f"`{record['command']}` on {record['date']}, commits {commits}, torch "
            f"{machine['torch']}, Python {machine['python']}, {machine['platform']}: "
            f"{len(rows)} faults, each with {seeds} seeds (from {first} on) and "
            f"{record['effort']['examples']} cases per requirement or more: {caught:,} of "
            f"{len(rows) * seeds:,} runs caught it. {record['showing_on_less_than_a_tenth']} show "
            f"on less than a tenth of the cases that are drawn for their operation; they make "
            f"{record['sets_of_failing_requirements']} different sets of requirements fail. The "
            f"median smallest case has {record['median_scalars_of_a_counterexample']:g} numbers."
        )
    if part == "operations":
        made = [
            [f"`{name}`", str(sum(name in row["operations"] for row in rows)),
             str(sum(row["caught"] == row["seeds"] for row in rows if name in row["operations"]))]
            for name in OPERATIONS if any(name in row["operations"] for row in rows)
        ]  # fmt: skip
        return _table(["operation", "faults", "caught with every seed"], made)
    by_id = {each.id: each for each in requirements()}
    made = [
        [f"`{row['fault']}`", ", ".join(_link(by_id[id], file) for id in list(row["by"])[:3]),
         f"{row['caught']}/{row['seeds']}", f"{row['different'] / max(1, row['drawn']):.0%}",
         str(row["median_cases"])]
        for row in rows
    ]  # fmt: skip
    return _table(["fault", "caught by", "seeds", "shows on", "cases until then"], made)


def _mutants(part):
    record = json.loads((DOCS.parent / "benchmarks/results/mutation.json").read_text())
    if part == "environment":
        machine = record["machine"]
        again = f", then `{record['again']['command']}`" if "again" in record else ""
        return (
            f"`{record['command']}`{again} on {record['date']}, commit "
            f"`{record['commit'][:10]}`, torch {machine['torch']}, Python {machine['python']}: "
            f"{record['mutants']} mutants drawn, {record['survived']} survived."
        )
    survivors = [row for row in record["rows"] if row["by"] is None]
    places = Counter(f"{row['mutant'].split(':')[0]}:{row['line'].split(':')[0]}"
                     for row in survivors)  # fmt: skip
    rows = [
        [", ".join(f"`{place}`" for place in each["places"] if place in places),
         str(sum(places[place] for place in each["places"])), each["kind"], each["why"]]
        for each in tomllib.loads((DOCS / "data" / "mutants.toml").read_text())["line"]
        if any(place in places for place in each["places"])
    ]  # fmt: skip
    return _table(["module and line", "mutants", "kind", "why nothing notices"], rows)


def _findings(part, file):
    if part == "sigmoid":
        found = json.loads((DOCS.parent / "benchmarks/results/uneven.json").read_text())
        return (
            f"`{found['function']}` turned {found['not_constant_afterwards']} of "
            f"{found['constant_rows']} constant float32 rows into rows that are not constant "
            f"(`{found['command']}` on {found['date']}, torch {found['machine']['torch']}, "
            f"{found['machine']['platform']})."
        )
    by_id = {each.id: each for each in requirements()}
    versions = {r["library"]: r["version"] for r in import_module("pictures.matrix").records()}
    lines = []
    before = None
    for each in read_findings(DOCS / "data" / "findings.toml"):
        said = each.fields
        library = said["library"]
        if library != before:
            lines.append(f"## {library} {versions.get(library, '')} {{ #{_slug(library)} }}")
        before = library
        ids = ", ".join(_link(by_id[id], file) for id in each.requirements)
        targets = ", ".join(f"`{name}`" for name in each.targets)
        _, _, anchor = each.address.partition("#")
        lines += [f"### {each.title} {{ #{anchor} }}", said["what"].strip()]
        if said.get("example"):
            lines.append(f"**For example.** {said['example'].strip()}")
        if said.get("why"):
            lines.append(f"**Why it matters.** {said['why'].strip()}")
        thread = _linked(said.get("thread") or "No thread about it was found.")
        rare = " It takes more cases than the matrix has." if said.get("rare") else ""
        lines.append(f"**{said['whose'].capitalize()}.** {targets}: {ids}.{rare} {thread}")
        if said.get("upstream"):
            text = " ".join(said["upstream"].split())
            lines.append(f'??? note "A text for their tracker"\n\n{_indented(text)}')
    return "\n\n".join(lines)


def _slug(name):
    return re.sub("[^a-z0-9]+", "-", name.lower())


def _scale(part):
    record = json.loads((DOCS.parent / "benchmarks/results/scale_model.json").read_text())
    if part == "environment":
        machine, hardware = record["machine"], record["modelled_hardware"]
        return (
            f"Computed by `{record['command']}` on {record['date']}, commit "
            f"`{record['commit'][:10]}`, torch {machine['torch']}, Python {machine['python']}, "
            f"{machine['platform']}, seed {record['seed']}. Modelled: {hardware['name']}; "
            f"{hardware['flops'] / 1e12:g} TFLOP/s, memory {hardware['memory'] / 1e12:g} TB/s, "
            f"NVLink {hardware['nvlink'] / 1e9:g} GB/s and network {hardware['network'] / 1e9:g} "
            f"GB/s in one direction. Sources: {hardware['source']}. Models: "
            f"{', '.join(model['source'] for model in record['models'].values())}."
        )
    table, *one = part.split(": ")
    if one:
        keys, column = one
        [row] = [row for row in record[table] if _scale_keys(row) == keys.split(", ")]
        return _scaled(column, row[column])
    columns = {
        "links": ("weights_bytes", "ranks_touched", "hosts_touched", "pairs_nvlink_bytes",
                  "once_nvlink_bytes", "pairs_network_bytes", "once_network_bytes"),
        "times": ("compute_us", "pairs_us", "once_us", "routed_us", "message_bytes"),
        "published": ("model_mb", "published_mb", "floor_us", "published_us",
                      "published_of_floor"),
        "imbalance": ("without_copies", "with_copies", "turn_by_rank"),
    }[table]  # fmt: skip
    head = [re.sub("_(us|mb|bytes)$", "", name).replace("_", " ") for name in columns]

    def shown(rows):
        names = [name for name in SCALE_KEYS[1:] if name in rows[0]]
        cells = [
            [str(row[name]) for name in names] + [_scaled(name, row[name]) for name in columns]
            for row in rows
        ]
        return _table([*names, *(name.replace("nvlink", "NVLink") for name in head)], cells)

    if table == "published":
        return shown(record[table])
    by_model = {name: [row for row in record[table] if row["model"] == name]
                for name in record["models"]}  # fmt: skip
    return "\n\n".join(f'=== "{name}"\n\n{_indented(shown(rows))}'
                       for name, rows in by_model.items())  # fmt: skip


def _scale_keys(row):
    return [str(row[name]) for name in SCALE_KEYS if name in row]


def _scaled(column, value):
    """A number with the unit that the name of its column ends with."""
    if column.endswith("_us"):
        return f"{value:,.0f} µs"
    if column.endswith("_mb"):
        return f"{value:.2f} MB"
    if column.endswith("_bytes"):
        thousands = (len(str(int(value))) - 1) // 3
        return f"{value / 1000**thousands:.3g} {('B', 'kB', 'MB', 'GB')[thousands]}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _fence(text, language="text"):
    return f"```{language}\n{text.rstrip()}\n```"


def _linked(source):
    pieces = source_links(source)
    return "".join(f"[{text}]({address})" if address else text for text, address in pieces)


def _link(requirement, file):
    """The id, linked to where the requirement stands in full."""
    page = PAGES.get(requirement.area, EVERYTHING)
    anchor = f"#{requirement.id.lower()}"
    if page == file.src_uri:
        return f"[{requirement.id}]({anchor})"
    return f"[{requirement.id}]({get_relative_url(page, file.src_uri)}{anchor})"


def _requirement_blocks(area):
    found = requirements(area)
    if not found:
        raise PluginError(f"no requirements of '{area}'; concepts are {', '.join(AREAS.values())}")
    return "\n\n".join(_block(each) for each in found)


def _block(each):
    title = each.title[0].upper() + each.title[1:]
    facts = [f"**Why.** {each.reason}"]
    facts.append("**From.** " + "; ".join(_linked(source) for source in each.sources) + ".")
    if each.faults:
        faults = ", ".join(f"`{name}`" for name in each.faults)
        facts.append(f"**Seeded faults that it has to catch.** {faults}.")
    operation = "every operation" if each.operation == ANY else f"`{each.operation}`"
    property_ = _indented(_fence(each.property_source, "python"))
    return "\n\n".join(
        [
            f"### {each.id} · {title} {{ #{each.id.lower()} }}",
            f'<span class="level">{each.level}</span> · {operation}',
            each.sentence,
            *facts,
            f'??? example "The property"\n\n{property_}',
        ]
    )


def _indented(text):
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _cell(text):
    return " ".join(text.split()).replace("|", "\\|")


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _requirements_table(file):
    rows = [
        [_link(r, file), r.level, f"`{r.operation}`", _cell(r.sentence)] for r in requirements()
    ]
    return _table(["id", "level", "operation", "sentence"], rows)


def _operations_table(file):
    rows = []
    for operation in OPERATIONS:
        about = [r for r in requirements() if operation in (r.operation, *r.also)]
        rows.append([f"`{operation}`", ", ".join(_link(r, file) for r in about) or "none yet"])
    rows.append(["all of them", ", ".join(_link(r, file) for r in requirements()
                                          if r.operation == ANY)])  # fmt: skip
    return _table(["operation", "requirements"], rows)


def _concepts_table(file):
    rows = []
    for prefix, area in AREAS.items():
        found = requirements(area)
        page = get_relative_url(PAGES.get(area, EVERYTHING), file.src_uri)
        name = area.replace("_", " ")
        ids = f"{found[0].id} to {found[-1].id}" if found else "none yet"
        rows.append([f"[{name}]({page})" if found else name, f"`{prefix}`", ids])
    return _table(["concept", "ids begin with", "requirements"], rows)


def _presets():
    defaults = {f.name: f.default for f in fields(RoutingConfig) if f.default is not MISSING}
    rows = []
    for name, config in PRESETS.items():
        changed = [
            f"{field} = {getattr(config, field)}"
            for field, default in defaults.items()
            if field not in ("score", "order", "hash_table") and getattr(config, field) != default
        ]
        rows.append(
            [f"`{name}`", str(config.top_k), config.score, config.order.replace("_", " "),
             ", ".join(changed) or "-"]
        )  # fmt: skip
    return _table(["preset", "K", "score", "order", "what else is not the default"], rows)


def _families():
    rows = []
    for name, family in FAMILIES.items():
        config, names = family.config, family.names
        experts = f"{config.experts.activation}, weight on {config.experts.weight_on}"
        optional = ("router_bias", "selection_bias", "hash_table", "shared", "shared_gate")
        parts = [part.replace("_", " ") for part in optional if getattr(names, part)]
        stored = f"`{names.block}.experts.7.{names.gate}.weight`"
        if names.layout != Layout():
            stored = f"`{names.block}.experts.{names.gate_up}`"
        rows.append([f"`{name}`", experts, ", ".join(parts) or "-", stored])
    return _table(["family", "experts", "optional parts", "a tensor of its experts"], rows)


def _seen(area, file):
    rows = []
    for bug in tomllib.loads((DOCS / "data" / f"{area}_bugs.toml").read_text())["bug"]:
        threads = set(THREAD.findall(bug["threads"]))
        citing = [r for r in requirements() if threads & set(THREAD.findall(", ".join(r.sources)))]
        if not citing and "outside" not in bug:
            raise PluginError(
                f"{area}_bugs.toml: {bug['threads']}: expected a requirement that cites it, or the "
                "field 'outside', got neither"
            )
        caught = ", ".join(_link(each, file) for each in citing) or bug["outside"]
        rows.append([_linked(bug["threads"]), _cell(bug["what"]), _cell(bug["shown_by"]), caught])
    return _table(["thread", "what went wrong", "inputs that show it", "requirement"], rows)


def _document(name, file):
    document = tomllib.loads((DOCS / "data" / "documents" / f"{name}.toml").read_text())
    rows = []
    for each in document["behaviour"]:
        here = ", ".join(_home(dotted, file) for dotted in each["here"]) or each["why"]
        shown = ", ".join(f"`{test}`" for test in each.get("evidence", []))
        said = [each["verdict"], *([_cell(each["note"])] if "note" in each else [])]
        verdict = ". ".join(said) + (f" Shown by {shown}." if shown else "")
        rows.append([_cell(each["place"]), _cell(each["does"]), here, verdict])
    head = ["in the document", "what it does", "here", "is it right"]
    return f"{document['system']}: {document['text']}\n\n" + _table(head, rows)


def _home(dotted, file):
    """A name of this project, linked to the page that documents its module."""
    module = dotted.removeprefix("moe_reference.").split(".")[0]
    page = f"spec/{CONCEPT_OF.get(module, module)}.md"
    short = dotted.removeprefix("moe_reference.")
    if not (DOCS / page).exists():
        raise PluginError(f"{dotted}: expected a page {page} for its module, got none")
    return f"[`{short}`]({get_relative_url(page, file.src_uri)})"


def _documents_table():
    rows = []
    for path in sorted((DOCS / "data" / "documents").glob("*.toml")):
        document = tomllib.loads(path.read_text())
        verdicts = [each["verdict"] for each in document["behaviour"]]
        counts = [str(verdicts.count(verdict)) for verdict in VERDICTS]
        rows.append([f"[{document['system']}](#{path.stem.replace('_', '-')})", *counts])
    return _table(["document", *VERDICTS], rows)


def _documents(part, file):
    if part == "roots":
        by_id = {each.id: each for each in requirements()}
        rows = [
            [f"`{each.targets[0]}`", _cell(each.title),
             ", ".join(_link(by_id[id], file) for id in each.requirements)]
            for each in read_findings(DOCS / "data" / "documents_suite.toml")
        ]  # fmt: skip
        return _table(["target", "what is wrong", "requirements that fail"], rows)
    path = DOCS.parent / "benchmarks/results/libraries/documents.json"
    record = json.loads(path.read_text())
    if part == "environment":
        machine, [first, *_] = record["machine"], record["reports"]
        return (
            f"`moespec check documents --profile {first['effort']['profile']} --seed "
            f"{first['seed']}` on {record['date']}, commit `{record['commit'][:10]}`, torch "
            f"{machine['torch']}, Python {machine['python']}, {machine['platform']}."
        )
    rows = []
    for each in record["reports"]:
        counts = [each["counts"].get(status, 0) for status in ("pass", "fail", "crash", "warn")]
        operations = ", ".join(f"`{name}`" for name in each["target"]["operations"])
        name = f"`{each['target']['name']}`"
        rows.append([name, operations, each["verdict"], *map(str, counts)])
    return _table(["target", "operations", "verdict", "pass", "fail", "crash", "warn"], rows)


def _equivalences(concept):
    found = []
    for path in sorted((DOCS.parent / "reference" / "tests").glob("test_equivalences*.py")):
        for test in ast.parse(path.read_text()).body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith(f"test_{concept}__"):
                parts = ast.get_docstring(test).split("\n\n")
                question, answer, *origin = (" ".join(part.split()) for part in parts)
                read = re.fullmatch(r"(Yes|No|Only (?:if|where))\b(.*)", answer)
                if read is None:
                    raise PluginError(f"{test.name}: expected Yes, No or Only if, got '{answer}'")
                verdict, rest = read.groups()
                lines = [f"### {question}", f"**{verdict}**{rest}"]
                lines += [_linked(each) for each in origin]
                lines.append(f"The test: `{test.name}`.")
                found.append("\n\n".join(lines))
    if not found:
        raise PluginError(f"no equivalences of '{concept}'")
    return "\n\n".join(found)


@cache
def _help(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=88)
    if result.exit_code:
        raise PluginError(f"moespec {command} --help ended with {result.exit_code}")
    return result.output.replace("Usage: root", "Usage: moespec")


def _screen(said):
    """What a terminal shows, as SVG that loads no font, with its text for who cannot see it."""
    text = Text.from_ansi(said)
    longest = max(map(len, text.plain.splitlines()))
    console = Console(record=True, width=longest, file=io.StringIO(), force_terminal=True)
    console.print(text)
    svg = console.export_svg(title="moespec", theme=SCREEN)
    # It would fetch its font from another host; any of fixed width will do.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    # Markdown takes an empty line for the end of a block, and _ and * for emphasis.
    svg = "".join(line.strip() + " " for line in svg.splitlines() if line.strip())
    words = html.escape(" ".join(text.plain.split()), quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)
    return f'<figure class="picture screen" tabindex="0">{svg}</figure>'


@cache
def _terminal(commands, code, colours=False):
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(DOCS / "examples", folder, dirs_exist_ok=True)
    said = []
    for command in commands.split(" && "):
        program, *arguments = shlex.split(command)
        if program != "moespec":
            raise PluginError(f"expected a moespec command, got '{command}'")
        arguments = [
            str(found.relative_to(folder)) if "*" in each else each
            for each in arguments
            for found in (sorted(folder.glob(each)) if "*" in each else [each])
        ]
        ran = subprocess.run(
            [sys.executable, "-m", "moe_conformance", *arguments],
            cwd=folder,
            env={
                **os.environ,
                **(COLOURS if colours else {"NO_COLOR": "1"}),
                "COLUMNS": str(COLUMNS),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        said.append(f"$ {command}\n{ran.stdout}")
    if ran.returncode != code:
        raise PluginError(
            f"'{commands}' ended with {ran.returncode}, not {code}:\n{ran.stdout}{ran.stderr}"
        )
    if code == 1 and len(said) == 1:
        _reports.append(folder / "moespec-report")
    else:
        shutil.rmtree(folder)
    return "\n".join(said)
