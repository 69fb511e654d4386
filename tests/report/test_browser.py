"""The page in headless Chromium: nothing on the console, nothing wider than the window."""

import json
import re
import shutil
import subprocess
from importlib.resources import files

import jinja2
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]
# measures a copy of the page within a frame of a given width, since a window has a least width
FRAME = """<!DOCTYPE html><iframe id="f" width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe>
<pre id="out"></pre><script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const inner = frame.contentDocument, root = inner.documentElement;
  const wide = [...inner.body.querySelectorAll("*")].filter(one => !one.closest(".scroll, pre, svg, .hidden, .skip"))
    .filter(one => one.getBoundingClientRect().right > root.clientWidth + 1).map(one => one.outerHTML.slice(0, 120));
  const images = [...inner.images].every(one => one.complete && one.naturalWidth > 0);
  const sections = inner.querySelectorAll("section").length;
  const tall = [...inner.querySelectorAll("td code")].filter(one => one.getBoundingClientRect().height > 90)
    .map(one => one.outerHTML.slice(0, 120));
  const found = {{width: root.clientWidth, scroll: root.scrollWidth, wide, tall, images, sections}};
  document.getElementById("out").textContent = JSON.stringify(found);
}};
</script>"""


def chromium(folder, *arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True)


def test_console_is_empty(experiment, tmp_path):
    done = chromium(tmp_path, "--enable-logging=stderr", "--v=0", "--dump-dom", (experiment / "report.html").as_uri())
    assert "CONSOLE" not in done.stderr
    assert "</footer>" in done.stdout


def measure(page, folder, width):
    """Return what is wider than the page in a frame of a width, and whether images and sections are there."""
    page = re.sub(r"<meta http-equiv=.Content-Security-Policy.*?>", "", page)
    outer = FRAME.format(width=width, page=page.replace("&", "&amp;").replace('"', "&quot;"))
    (folder / "outer.html").write_text(outer)
    done = chromium(
        folder,
        f"--window-size={width + 100},1000",
        "--virtual-time-budget=10000",
        "--dump-dom",
        (folder / "outer.html").as_uri(),
    )
    text = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL).group(1)
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&"))


@pytest.mark.parametrize("width", [380, 1400])
def test_no_overflow(experiment, tmp_path, width):
    found = measure((experiment / "report.html").read_text(), tmp_path, width)
    assert found["width"] <= width
    assert found["scroll"] <= found["width"]
    assert found["wide"] == []
    assert found["images"] and found["sections"] > 8


@pytest.mark.parametrize("width", [380, 1400])
def test_findings_with_long_lines_fit(tmp_path, width):
    """The lines of a cure scroll within their frame; they do not widen the finding."""
    folder = files("kd_lightning.report") / "templates"
    macros = jinja2.Environment(loader=jinja2.FileSystemLoader(str(folder))).get_template("macros.html.j2").module
    lines = "model: {" + "soft_weight: 0.5, " * 20
    rows = [("warning", "following", "the student differs " * 9, "train longer", lines)]
    body = f'<section><div class="body">{macros.findings(rows)}</div></section>'
    page = f"<!DOCTYPE html><style>{(folder / 'report.css').read_text()}</style><main>{body}</main>"
    found = measure(page, tmp_path, width)
    assert found["wide"] == []
    assert found["scroll"] <= found["width"] <= width


def test_a_path_in_a_table_is_not_broken_into_letters(tmp_path):
    folder = files("kd_lightning.report") / "templates"
    cells = (
        "<td><code>runs/<wbr>photos/<wbr>label_resnet8/<wbr>version_0</code></td>" + "<td>a name of a network</td>" * 6
    )
    table = f'<div class="scroll"><table><tr>{cells}</tr></table></div>'
    body = f'<section><div class="body">{table}</div></section>'
    page = f"<!DOCTYPE html><style>{(folder / 'report.css').read_text()}</style><main>{body}</main>"
    found = measure(page, tmp_path, 380)
    assert found["tall"] == []
    assert found["scroll"] <= found["width"] <= 380


def test_a_script_in_the_page_would_not_run(experiment, tmp_path):
    """The policy of the page blocks scripts, should a name ever become markup."""
    page = (experiment / "report.html").read_text()
    changed = tmp_path / "page.html"
    changed.write_text(page.replace("</body>", "<script>document.title = 'owned'</script></body>"))
    done = chromium(tmp_path, "--enable-logging=stderr", "--v=0", "--dump-dom", changed.as_uri())
    assert "<title>owned" not in done.stdout
    assert "Content Security Policy" in done.stderr
