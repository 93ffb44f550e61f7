"""The built site as a reader meets it: every page in a browser, and what can be clicked.

A check gives the list of what is wrong, so that the same check shows that the site is right and
that a planted fault is caught.
"""

import html
import re
from urllib.parse import unquote, urljoin, urlsplit

import pytest

WIDE, PHONE = 1280, 390
ALIGNMENT = "moe_align_block_size"
INDEX = "search/search_index.json"
MATRIX = "matrix/matrix.html"
PICTURES = "spec/gating/index.html"
NOTEBOOK = "notebooks/01_gating/index.html"
CODE = "guide/check-your-own/index.html"
SHOWN = {
    "index.html": "home",
    "guide/check-your-own/index.html": "check-your-own",
    "spec/gating/index.html": "gating",
    "notebooks/01_gating/index.html": "notebook",
    "matrix/index.html": "matrix",
    "matrix/matrix.html": "whole-matrix",
    "findings/index.html": "findings",
    "performance/index.html": "performance",
}
"""Pages of which pictures are kept, and the names of those."""
# The contrast that WCAG 2 asks for between text and what lies under it.
READABLE = 4.5

CONTENT = r"""
const found = [];
const short = (element) => element.outerHTML.replace(/\s+/g, " ").slice(0, 120);
const all = (selector) => [...document.querySelectorAll(selector)];

for (const each of all(".arithmatex")) {
  const made = each.querySelector(".katex, .katex-error");
  if (!made) found.push("formula not rendered: " + short(each));
}
// A command that KaTeX does not know is shown as it is, in this colour.
const wrong = ".katex-error, .katex:has(.katex-html [style*='rgb(204, 0, 0)'])";
for (const each of all(wrong)) found.push("formula wrong: " + short(each));

const quoted = "script, noscript, style, textarea, pre, code, .katex, .katex-error, .arithmatex";
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const text = texts.currentNode.data;
  if (texts.currentNode.parentElement.closest(quoted)) continue;
  const raw = text.match(/.{0,20}(\\[()[\]]|\$\$|\\begin\{).{0,20}/);
  if (raw) found.push("raw formula: " + raw[0]);
  const empty = text.match(/.{0,20}\b(TODO|TBD|FIXME|[Ll]orem ipsum)\b.{0,20}/);
  if (empty) found.push("placeholder: " + empty[0]);
}

for (const each of all("img")) {
  if (!(each.getAttribute("alt") || "").trim()) found.push("no alt: " + short(each));
  if (each.complete && !each.naturalWidth) found.push("image not shown: " + short(each));
}
// Icons of the theme stand in controls, which have names of their own.
const icon = "button, label, nav, clipboard-copy, [aria-hidden=true], .md-icon, .md-logo, .twemoji";
for (const each of all("svg")) {
  if (each.closest(icon) || each.parentElement.closest("svg")) continue;
  const title = each.querySelector(":scope > title");
  const name = each.getAttribute("aria-label") || (title && title.textContent) || "";
  if (each.getAttribute("role") !== "img" || !name.trim()) {
    found.push("picture without words: " + short(each));
  }
}
return found;
"""

WIDTH = r"""
const room = document.documentElement.clientWidth, page = document.scrollingElement.scrollWidth;
if (page <= room + 1) return [];
const scrolls = (element) => {
  for (let e = element.parentElement; e && e !== document.body; e = e.parentElement) {
    if (getComputedStyle(e).overflowX !== "visible") return true;
  }
  return false;
};
const guilty = [...document.body.querySelectorAll("*")].filter(
  (each) => each.getBoundingClientRect().right > room + 1 && !scrolls(each));
const names = guilty.slice(0, 3).map((each) => each.outerHTML.replace(/\s+/g, " ").slice(0, 80));
return [`${page} px wide where there are ${room}: ${names.join(" | ")}`];
"""

CONTRAST = r"""
const numbers = (colour) => {
  const found = colour.match(/[\d.]+/g).map(Number);
  return found.length === 3 ? [...found, 1] : found;
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
const light = (colour) => {
  const [r, g, b] = colour.map((c) => c / 255).map(
    (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const before = document.body.dataset.mdColorScheme;
if (arguments[0]) document.body.dataset.mdColorScheme = arguments[0];
const page = numbers(getComputedStyle(document.body).backgroundColor).slice(0, 3);
const made = [];
for (const text of document.querySelectorAll(".picture svg text")) {
  const at = text.getBoundingClientRect();
  const x = (at.left + at.right) / 2, y = (at.top + at.bottom) / 2;
  let below = page;
  for (const shape of text.closest("svg").querySelectorAll("rect")) {
    if (!(text.compareDocumentPosition(shape) & Node.DOCUMENT_POSITION_PRECEDING)) continue;
    const box = shape.getBoundingClientRect(), style = getComputedStyle(shape);
    const inside = box.left <= x && x <= box.right && box.top <= y && y <= box.bottom;
    if (inside && style.fill !== "none") below = over(numbers(style.fill), below);
  }
  const style = getComputedStyle(text), colour = numbers(style.fill);
  colour[3] *= Number(style.opacity);
  const both = [light(over(colour, below)), light(below)].sort((a, b) => a - b);
  made.push([(both[1] + 0.05) / (both[0] + 0.05), text.textContent]);
}
const scheme = document.body.dataset.mdColorScheme;
document.body.dataset.mdColorScheme = before;
return {scheme, page: light(page), texts: made};
"""


def page_problems(browser, server, path):
    """Everything that is wrong with one page."""
    console, requests = browser.open(server, path)
    shot = SHOWN.get(path) if not server.replaced else None
    if shot:
        browser.shoot(f"{shot}-{WIDE}")
    found = [f"console: {each}" for each in console]
    found += [f"another host: {each}" for each in requests if not _is_local(each, server)]
    found += browser.run(CONTENT)
    if browser.run("return document.querySelector('.picture') !== null"):
        for scheme in ("default", "slate"):
            found += _faint(browser.run(CONTRAST, scheme))
    browser.resize(PHONE)
    browser.settle()
    found += [f"at a phone's width {each}" for each in browser.run(WIDTH)]
    if shot:
        browser.shoot(f"{shot}-{PHONE}")
    return found + [f"not found: {each}" for each in server.not_found]


def _is_local(url, server):
    return url.startswith((server.url, "data:", "blob:", "about:"))


def search_problems(browser, server):
    """Searching for a name has to lead to the pages about it."""
    browser.open(server, "index.html")
    browser.type("[data-md-component=search-query]", ALIGNMENT)
    found = browser.wait(
        "const links = [...document.querySelectorAll('a.md-search-result__link')];"
        "return links.length ? links.map((each) => each.getAttribute('href')) : null;",
    )
    if not found:
        return [f"nothing found for {ALIGNMENT}"]
    pages = list(dict.fromkeys(urlsplit(each).path for each in found))
    if "alignment" not in pages[0]:
        return [f"{pages[0]} is found before {', '.join(pages[1:])}"]
    return []


def palette_problems(browser, server):
    """Texts in pictures have to be readable on the light page and, once toggled, on the dark."""
    browser.open(server, PICTURES)
    light = browser.run(CONTRAST)
    browser.click("label.md-header__button[for=__palette_1]")
    changed = browser.wait("return document.body.dataset.mdColorScheme === 'slate'", seconds=2)
    dark = browser.run(CONTRAST)
    found = [] if changed else ["the toggle does not change the palette"]
    if not light["page"] > 0.8 or not dark["page"] < 0.1:
        found.append(f"pages of luminance {light['page']:.2f} and {dark['page']:.2f}")
    if not light["texts"]:
        found.append("no text in pictures")
    return found + _faint(light) + _faint(dark)


def _faint(seen):
    return [
        f"{seen['scheme']}: {ratio:.1f} to 1: {text}"
        for ratio, text in seen["texts"]
        if ratio < READABLE
    ]


ROWS, BY_LIBRARY = "tr.requirement", "[data-target]"
FILTERS = {
    "status": (".chip[data-status=crash]", None, ROWS, ":has(td[data-status=crash])"),
    "concept": ("#concept", "gating", ROWS, "[data-concept=gating]"),
    "library": ("#target", "vllm", BY_LIBRARY, "[data-target=vllm]"),
}
"""What to click or to choose from, what to choose, what is filtered, and what fits."""
# The key Home, which chooses the first of a list: all.
FIRST = "\ue011"
ROW = re.compile(r'<tr class="requirement".*?</tr>', re.DOTALL)
COUNT = """
const shown = [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility());
return [shown.length, shown.filter((e) => e.matches(arguments[1])).length];
"""


def filter_problems(browser, server):
    """Each filter of the matrix has to leave what fits it, and undone, everything."""
    browser.open(server, MATRIX)
    found = []
    for name, (control, choice, filtered, fits) in FILTERS.items():
        everything, fitting = browser.run(COUNT, filtered, fits)
        assert 0 < fitting < everything, f"{name}: pick a value that some fit, and not all"
        _filter(browser, control, choice)
        shown, left = browser.run(COUNT, filtered, fits)
        if not shown == left == fitting:
            found.append(f"{name}: {shown} shown, {left} of them fit, and {fitting} should")
        _filter(browser, control, choice and FIRST)
        shown, _ = browser.run(COUNT, filtered, fits)
        if shown != everything:
            found.append(f"{name}: {shown} shown after undoing it, {everything} before")
    return found


def _filter(browser, control, choice):
    if choice is None:
        browser.click(control)
    else:
        browser.choose(control, choice)


def solution_problems(browser, server):
    """A solution has to be folded, and to open."""
    browser.open(server, NOTEBOOK)
    code = "details:has(> summary) > .celltag_solution pre"
    visible = f"return document.querySelector('{code}')?.checkVisibility()"
    folded = browser.run(visible)
    if folded is None:
        return ["no folded solution"]
    if folded:
        return ["the solution is open from the start"]
    browser.click("details:has(> .celltag_solution) > summary")
    return [] if browser.run(visible) else ["the solution does not open"]


def copy_problems(browser, server):
    """Each block of code has to have a button that copies it."""
    browser.open(server, CODE)
    button = "button.md-code__button[data-md-type=copy]"
    browser.wait(f"return document.querySelector('{button}')", seconds=3)
    blocks, without = browser.run(
        "const all = [...document.querySelectorAll('.highlight pre > code')];"
        f"return [all.length, all.filter((e) => !e.parentElement.querySelector('{button}')).length]"
    )
    if not blocks or without:
        return [f"{without} of {blocks} blocks of code have no button that copies"]
    browser.click(button)
    said = "return document.querySelector('.md-dialog--active')?.textContent.trim()"
    return [] if browser.wait(said, seconds=3) == "Copied to clipboard" else ["nothing is copied"]


TARGET = re.compile(r"""<(?:a|link)\b[^>]*?\shref=(?:"([^"]*)"|'([^']*)'|([^\s>"']+))""")
NAME = re.compile(r"""\s(?:id|name)=(?:"([^"]*)"|'([^']*)'|([^\s>"']+))""")
SCRIPTS = re.compile(r"<(script|style|svg)\b.*?</\1>", re.DOTALL)


def link_problems(pages):
    """A link inside the site has to lead to a page, and to a place on it.

    Args:
        pages: From the path of each file to its text, None where it is no page.
    """
    base, found = "http://site/", []
    texts = {path: text and SCRIPTS.sub("", text) for path, text in pages.items()}
    places = {path: text and _matches(NAME, text) for path, text in texts.items()}
    for path, text in texts.items():
        for link in sorted(_matches(TARGET, text or "")):
            # The page of what is not found is shown at any address: its links begin with a slash.
            to = urlsplit(urljoin(base + path, link))
            if to.netloc != "site" or to.scheme != "http":
                continue
            target = unquote(to.path).lstrip("/")
            if target.endswith("/") or not target:
                target += "index.html"
            place = unquote(to.fragment)
            if target not in pages:
                found.append(f"{path}: {link} leads nowhere")
            elif place and places[target] is not None and place not in places[target]:
                found.append(f"{path}: {link}: no such place on the page")
    return found


def _matches(pattern, text):
    return {html.unescape("".join(found)) for found in pattern.findall(text)}


@pytest.fixture(scope="module")
def pages(site):
    """The text of each page; other files have none."""
    files = [each for each in site.rglob("*") if each.is_file()]
    return {
        each.relative_to(site).as_posix(): each.read_text() if each.suffix == ".html" else None
        for each in files
    }


def test_page(browser, server, path):
    problems = page_problems(browser, server, path)
    assert not problems, "\n".join([path, *problems])


@pytest.mark.parametrize(
    "check",
    [search_problems, palette_problems, filter_problems, solution_problems, copy_problems],
)
def test_site(browser, server, check):
    problems = check(browser, server)
    assert not problems, "\n".join(problems)


def test_links_lead_somewhere(pages):
    assert MATRIX in pages
    assert "example-report/index.html" in pages
    problems = link_problems(pages)
    assert not problems, "\n".join(problems)


def test_faults_of_a_page_are_caught(browser, replacing, pages):
    """Each planted fault gives the problem beside it, and nothing else is found."""
    path, script = "spec/index.html", "assets/math.js"
    server = replacing({})
    port = server.server_port
    faults = {
        '<script>throw new Error("planted")</script>': "console: .*planted",
        # Another host, and yet this machine.
        f'<link rel="prefetch" href="http://localhost:{port}/index.html">': "another host: .*",
        '<img src="../assets/images/favicon.png">': "no alt: .*",
        '<img src="../assets/images/favicon.png" alt=" ">': "no alt: .*",
        '<p class="arithmatex">\\(\\frac{1}\\)</p>': "formula wrong: .*",
        '<p class="arithmatex">\\(\\nothing\\)</p>': "formula wrong: .*",
        '<p class="arithmatex">x</p>': "formula not rendered: .*",
        "<p>of $$ 5</p>": r"raw formula: \$\$ 5",
        "<p>TBD</p>": "placeholder: TBD",
        '<svg viewBox="0 0 9 9"><rect/></svg>': "picture without words: .*",
        '<svg role="img" viewBox="0 0 9 9"><title> </title></svg>': "picture without words: .*",
        '<div style="width: 600px">wide</div>': "at a phone's width .*600px.*",
        '<script>fetch("../nowhere.json")</script>': "not found: /nowhere.json",
    }
    server.replaced[path] = pages[path].replace("</article>", "".join(faults) + "</article>")
    problems = page_problems(browser, server, path)
    for expected in [*faults.values(), "console: .*nowhere.json.*404.*"]:
        caught = [each for each in problems if re.fullmatch(expected, each, re.DOTALL)]
        assert caught, f"{expected} is not among\n" + "\n".join(problems)
        problems.remove(caught[0])
    assert not problems, "\n".join(problems)

    server = replacing({script: ""})
    problems = page_problems(browser, server, PICTURES)
    assert any(each.startswith("formula not rendered") for each in problems)


@pytest.mark.parametrize(
    ("check", "file", "part", "fault", "problem"),
    [
        (
            search_problems,
            INDEX,
            '"spec/alignment/',
            '"spec/other/',
            ".* is found before",
        ),
        (palette_problems, PICTURES, "currentColor", "#111111", "slate: .* to 1: "),
        (palette_problems, PICTURES, '"slate"', '"default"', "the toggle does not"),
        (filter_problems, MATRIX, "element.hidden = !fits", "", "status: .* should"),
        (filter_problems, MATRIX, "!chosen.delete(status)", "true", "status: .* undoing"),
        (filter_problems, MATRIX, "each.hidden = Bool", "each.off = Bool", "library: .* should"),
        (filter_problems, MATRIX, "concept.value === data.concept", "true", "concept: .* should"),
        (solution_problems, "assets/fold.js", "before(folded)", "before()", "no folded"),
        (solution_problems, "assets/fold.js", "append(title, cell)", "append(cell)", "no folded"),
        (copy_problems, CODE, '"content.code.copy", ', "", ".* have no button"),
    ],
)
def test_fault_is_caught(browser, replacing, site, check, file, part, fault, problem):
    text = (site / file).read_text()
    assert part in text
    text = text.replace(part, fault)
    # The policy of a report names the script that may run, which the planted one is not.
    text = text.replace('http-equiv="Content-Security-Policy"', "")
    if file == MATRIX:
        # A tenth of the rows shows the fault as well, and sooner.
        rows = ROW.findall(text)
        text = ROW.sub(lambda found: found[0] if rows.index(found[0]) % 10 == 0 else "", text)
    problems = check(browser, replacing({file: text}))
    assert any(re.match(problem, each) for each in problems), problems


def test_broken_links_are_caught():
    pages = {
        "index.html": '<a href="a/#here">1</a><a href=a/#there>2</a><a href="b.html">3</a>'
        '<a class="x" href="https://elsewhere/b.html">4</a><a href="a.txt#1">5</a>',
        "a/index.html": '<h2 id="here"><a href="../">6</a><script>id="there"</script>',
        "a.txt": None,
    }
    assert link_problems(pages) == [
        "index.html: a/#there: no such place on the page",
        "index.html: b.html leads nowhere",
    ]
